//! The last observation of a master.

use std::time::Duration;

use crate::model::shard::RunId;
use crate::model::throttle::Measure;
use crate::node::info::{CommandStat, Info};

/// What was last observed of a master, from INFO and PING. What a right or a version hides is `None`, or false.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Observation {
    /// Whether it is a master; `None`: unknown.
    pub is_master: Option<bool>,
    /// Of a replica: its master as `host:port`.
    pub master: Option<String>,
    /// Identifies the server process; `None` where INFO has no `run_id`.
    pub run_id: Option<RunId>,
    /// Whether it is loading its data set.
    pub loading: bool,
    /// Whether a coordinated failover is under way: `master_failover_state` is not `no-failover`.
    pub failover_under_way: bool,
    /// Whether writes are paused: `paused_actions` of INFO clients, on servers that show it.
    pub writes_paused: bool,
    /// Calls and time of all clients' SCANs; `None` where INFO lacks `cmdstat_scan`.
    pub scan_stat: Option<CommandStat>,
    /// CPU time of the main thread, or of the whole process.
    pub cpu: Option<Duration>,
    /// Objects that wait to be freed in the background.
    pub lazyfree_pending: Option<u64>,
    /// Mean round trip of the last PINGs; one that is under way counts with the time that it has taken.
    pub latency: Option<Duration>,
    /// Commands per second of other clients: [`Foreground::ops`](crate::engine::policy::foreground::Foreground::ops),
    /// set by the sweep.
    pub ops: Option<u64>,
    /// Bytes that the online replica furthest behind has not acknowledged; 0 without replicas.
    pub replica_lag: Option<u64>,
    /// Since the replica that was silent longest last acknowledged anything; zero without replicas.
    pub replica_silence: Option<Duration>,
    /// Bytes in the output buffers of replicas.
    pub replica_buffer: Option<u64>,
    /// Whether a replica is receiving the whole data set.
    pub full_sync: bool,
    /// What a child process writes: `RDB` or `AOF`; `None`: there is no child.
    pub fork: Option<&'static str>,
    /// Share of the main thread's time of other clients:
    /// [`Foreground::cpu`](crate::engine::policy::foreground::Foreground::cpu), set by the sweep.
    pub others_cpu: Option<f64>,
    /// Whether it may evict keys to stay below `maxmemory`.
    pub may_evict: bool,
    /// Keys that expired since the server started, including those that the sweep reclaimed: `expired_keys`.
    pub expired_keys: Option<u64>,
    /// Of those, keys that active expiry reclaimed, on servers that show it: `expired_keys_active`.
    pub expired_by_server: Option<u64>,
    /// Share of the keys with a TTL that have expired, as active expiry last saw it: `expired_stale_perc`.
    pub expired_share: Option<f64>,
    /// Why INFO was not answered for too long, so that everything above is old; `None`: it was answered.
    pub blind: Option<String>,
}

impl Observation {
    /// The part of an observation that INFO gives.
    pub(crate) fn from_info(info: &Info) -> Self {
        let replicas = info.parsed::<u64>("connected_slaves").map(|_| info.replicas());
        let sent = info.parsed::<u64>("master_repl_offset");
        let online = || replicas.iter().flatten().filter(|replica| replica.state == "online");
        let writing = |field| info.flag(field) == Some(true);
        Self {
            is_master: info.is_master(),
            master: info.master_addr(),
            run_id: info.get("run_id").map(|id| RunId(id.to_owned())),
            loading: info.flag("loading") == Some(true),
            failover_under_way: info.get("master_failover_state").is_some_and(|state| state != "no-failover"),
            writes_paused: info.get("paused_actions").is_some_and(|actions| actions != "none"),
            scan_stat: info.scan_stat(),
            cpu: info.main_thread_cpu(),
            lazyfree_pending: info.parsed("lazyfree_pending_objects"),
            latency: None,
            ops: None,
            replica_lag: replicas
                .as_ref()
                .and(sent)
                .map(|sent| online().map(|replica| sent.saturating_sub(replica.offset)).max().unwrap_or(0)),
            replica_silence: replicas
                .as_ref()
                .map(|_| Duration::from_secs(online().filter_map(|replica| replica.lag_s).max().unwrap_or(0).into())),
            replica_buffer: info.parsed("mem_clients_slaves"),
            full_sync: replicas.iter().flatten().any(|replica| replica.state != "online"),
            fork: match () {
                () if writing("rdb_bgsave_in_progress") => Some("RDB"),
                () if writing("aof_rewrite_in_progress") => Some("AOF"),
                () => None,
            },
            others_cpu: None,
            may_evict: info.may_evict(),
            expired_keys: info.parsed("expired_keys"),
            expired_by_server: info.parsed("expired_keys_active"),
            expired_share: info.expired_share(),
            blind: None,
        }
    }

    /// The amount of a measure, in the unit of its row of [`LIMITS`](crate::model::throttle::LIMITS); `None`: unknown.
    pub(crate) fn amount(&self, measure: Measure) -> Option<f64> {
        let seconds = |span: Option<Duration>| span.map(|span| span.as_secs_f64());
        let number = |number: Option<u64>| number.map(|number| number as f64);
        match measure {
            Measure::Latency => seconds(self.latency),
            Measure::ReplicaLag => number(self.replica_lag),
            Measure::ReplicaSilence => seconds(self.replica_silence),
            Measure::ReplicaBuffer => number(self.replica_buffer),
            Measure::LazyFree => number(self.lazyfree_pending),
            Measure::Ops => number(self.ops),
            Measure::Cpu => self.others_cpu,
        }
    }
}

#[cfg(test)]
impl Observation {
    /// Of a server that has answered so many SCANs in so many microseconds.
    pub(crate) fn of_scans(calls: u64, usec: u64) -> Self {
        Self { scan_stat: Some(CommandStat { calls, usec }), ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_replica_counts_and_one_that_is_not_online_is_a_full_sync() {
        let info = |replicas: &str| {
            let text = format!("role:master\r\nconnected_slaves:2\r\nmaster_repl_offset:1000\r\n{replicas}");
            Observation::from_info(&Info::parse(text))
        };
        let online =
            "slave0:ip=a,port=1,state=online,offset=900,lag=0\r\nslave1:ip=b,port=1,state=online,offset=400,lag=7\r\n";
        let seen = info(online);
        assert_eq!((seen.replica_lag, seen.replica_silence), (Some(600), Some(Duration::from_secs(7))));
        assert!(!seen.full_sync);
        let syncing = info("slave0:ip=a,port=1,state=wait_bgsave,offset=0,lag=0\r\n");
        assert!(syncing.full_sync && syncing.replica_lag == Some(0), "its offset says nothing");
        assert_eq!(Observation::from_info(&Info::parse("role:master\r\n")).replica_lag, None, "hidden is unknown");
    }
}
