//! Samplers: they look at a master on their own connection and tick, and write down what they see. They decide nothing.
//!
//! One connection for each master: a PING every 50 ms, INFO every [`INFO_EVERY`]. How busy others keep the main thread
//! cannot be seen from beside a sweep that keeps it busy itself: for that the sweep stands still for [`LOOK_FOR`] now and
//! then, and [`busy_share`] is what was used meanwhile.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::model::shard::{NodeAddr, RunId};
use crate::node::commands;
use crate::node::conn::{Conn, ConnOptions};
use crate::node::error::NodeError;
use crate::node::info::{CommandStat, Info};

/// How often the latency is probed.
const PING_EVERY: Duration = Duration::from_millis(50);
/// How many PINGs go by between two INFOs. INFO costs a server some 100 microseconds: a twentieth of a per cent.
const PINGS_BETWEEN_INFOS: u32 = 5;
/// How often INFO is read.
pub const INFO_EVERY: Duration = Duration::from_millis(50 * PINGS_BETWEEN_INFOS as u64);
/// The latency is the mean of this many PINGs: 0.4 s. A mean, since one PING that waited for half a second says more than
/// seven that did not.
const PINGS: usize = 8;
/// After this long without an answer to INFO nothing is known any more.
const BLIND_AFTER: Duration = Duration::from_secs(3);

/// How often the sweep stands still to see what others need, and for how long: a fiftieth of its time.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);
/// See [`LOOK_EVERY`].
pub const LOOK_FOR: Duration = Duration::from_millis(20);

/// What was last seen of a master. What a right or a version hides is `None` or its harmless value.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Observation {
    /// Whether it is a master.
    pub is_master: Option<bool>,
    /// A replica's master as `host:port`.
    pub master: Option<String>,
    /// The process.
    pub run_id: Option<RunId>,
    /// It loads its data set.
    pub loading: bool,
    /// `master_failover_state` is something else than `no-failover`.
    pub failover_under_way: bool,
    /// Writes are paused (`paused_actions` of INFO clients, on servers that tell).
    pub writes_paused: bool,
    /// `cmdstat_scan`.
    pub scan_stat: Option<CommandStat>,
    /// Objects that are still to be freed in the background.
    pub lazyfree_pending: Option<u64>,
    /// Mean round trip of the last PINGs, one that is under way included as long as it has lasted.
    pub latency: Option<Duration>,
    /// Commands of others per second when the sweep last stood still, smoothed. Set by the sweep.
    pub ops: Option<u64>,
    /// Bytes that the online replica furthest behind has not acknowledged; 0 without replicas.
    pub replica_lag: Option<u64>,
    /// Since the replica that was silent longest last acknowledged anything; zero without replicas.
    pub replica_silence: Option<Duration>,
    /// Bytes in the output buffers of replicas.
    pub replica_buffer: Option<u64>,
    /// A replica is being given the whole data set.
    pub full_sync: bool,
    /// `RDB` or `AOF`: what a child process is writing.
    pub fork: Option<&'static str>,
    /// Share of the main thread's time that others took when the sweep last stood still, smoothed. Set by the sweep.
    pub others_cpu: Option<f64>,
    /// It may evict keys to stay below `maxmemory`.
    pub may_evict: bool,
    /// `expired_keys`, ours included, since the server started.
    pub expired_keys: Option<u64>,
    /// Keys that active expiry alone has freed, on servers that tell.
    pub expired_by_server: Option<u64>,
    /// Share of the keys with a TTL that active expiry found stale.
    pub stale_share: Option<f64>,
    /// INFO was not answered for too long, and why: everything above is old.
    pub blind: Option<String>,
}

impl Observation {
    /// Reads what INFO says.
    pub fn from_info(info: &Info) -> Self {
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
            stale_share: info.stale_share(),
            blind: None,
        }
    }
}

/// A running sampler. It ends when this is dropped.
#[derive(Debug)]
pub struct Observer {
    seen: watch::Receiver<Observation>,
    _stop: DropGuard,
}

impl Observer {
    /// Starts sampling. `first` is what was seen when the sweep connected, so that there is an observation from the
    /// first batch on. A server that cannot be reached leaves the last observation in place, and says after a while that
    /// it is old: the sweep's own connection meets the same trouble.
    pub fn start(addr: NodeAddr, options: ConnOptions, first: Observation) -> Self {
        let (sender, seen) = watch::channel(first);
        let stop = CancellationToken::new();
        let token = stop.clone();
        tokio::spawn(async move {
            let sampler = Sampler { addr, options, sender, round_trips: VecDeque::with_capacity(PINGS) };
            token.run_until_cancelled(sampler.run()).await;
        });
        Self { seen, _stop: stop.drop_guard() }
    }

    /// The observation, if there is one that was not taken yet.
    pub fn take_new(&mut self) -> Option<Observation> {
        // An error means that the sampler has ended, which only happens with this observer.
        self.seen.has_changed().unwrap_or(false).then(|| self.seen.borrow_and_update().clone())
    }

    /// Whether there is an observation that was not taken yet.
    pub fn has_new(&self) -> bool {
        self.seen.has_changed().unwrap_or(false)
    }

    /// The mean round trip of the last PINGs.
    pub fn latency(&self) -> Option<Duration> {
        self.seen.borrow().latency
    }

    /// Waits for the next observation.
    pub async fn next(&mut self) -> Observation {
        if self.seen.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        self.seen.borrow_and_update().clone()
    }
}

struct Sampler {
    addr: NodeAddr,
    options: ConnOptions,
    sender: watch::Sender<Observation>,
    round_trips: VecDeque<Duration>,
}

impl Sampler {
    /// Samples for ever, and connects again whenever that is needed.
    async fn run(mut self) {
        let mut answered = Instant::now();
        loop {
            if let Err(error) = self.sample(&mut answered).await {
                tracing::debug!(addr = %self.addr, %error, "the sampler lost its connection");
                if answered.elapsed() > BLIND_AFTER {
                    let why = error.to_string();
                    self.sender.send_if_modified(|seen| seen.blind.replace(why.clone()) != Some(why));
                }
            }
            self.round_trips.clear();
            tokio::time::sleep(INFO_EVERY).await;
        }
    }

    async fn sample(&mut self, answered: &mut Instant) -> Result<(), NodeError> {
        let mut conn = Conn::open(&self.addr, &self.options).await?;
        let mut tick = tokio::time::interval(PING_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        for turn in 0_u32.. {
            tick.tick().await;
            if turn.is_multiple_of(PINGS_BETWEEN_INFOS) {
                let info = commands::info(&mut conn).await?;
                *answered = Instant::now();
                let latency = self.latency(None);
                self.sender.send_replace(Observation { latency, ..Observation::from_info(&info) });
            } else {
                self.probe(&mut conn).await?;
            }
        }
        Ok(())
    }

    /// One PING. As long as it is not answered its age counts.
    async fn probe(&mut self, conn: &mut Conn) -> Result<(), NodeError> {
        let begun = Instant::now();
        let mut ping = std::pin::pin!(commands::ping(conn));
        loop {
            tokio::select! {
                biased;
                answer = &mut ping => {
                    answer?;
                    break;
                }
                () = tokio::time::sleep(PING_EVERY) => {
                    let latency = self.latency(Some(begun.elapsed()));
                    self.sender.send_modify(|seen| seen.latency = latency);
                }
            }
        }
        if self.round_trips.len() == PINGS {
            self.round_trips.pop_front();
        }
        self.round_trips.push_back(begun.elapsed());
        let latency = self.latency(None);
        // Not worth waking anybody for while it hardly moves.
        self.sender.send_if_modified(|seen| {
            let moved = moved(seen.latency, latency);
            if moved {
                seen.latency = latency;
            }
            moved
        });
        Ok(())
    }

    /// Over the last [`PINGS`], those that were not made yet counting nothing: what the first ones say is no mean.
    fn latency(&self, under_way: Option<Duration>) -> Option<Duration> {
        let known: Duration = self.round_trips.iter().chain(&under_way).sum();
        let any = !self.round_trips.is_empty() || under_way.is_some();
        any.then(|| known / u32::try_from(PINGS).unwrap_or(1))
    }
}

/// Whether two latencies differ by a quarter and by what a limit could notice.
fn moved(before: Option<Duration>, now: Option<Duration>) -> bool {
    match (before, now) {
        (Some(before), Some(now)) => {
            let (less, more) = (before.min(now), before.max(now));
            more > less + less / 4 + Duration::from_millis(1)
        }
        (before, now) => before.is_some() != now.is_some(),
    }
}

/// Share of a span in which a thread worked, by its CPU time at both ends.
pub fn busy_share(before: Option<Duration>, after: Option<Duration>, span: Duration) -> Option<f64> {
    let worked = after?.checked_sub(before?)?;
    (!span.is_zero()).then(|| (worked.as_secs_f64() / span.as_secs_f64()).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_replica_counts_and_one_that_is_not_online_is_a_full_sync() {
        let info = |replicas: &str| {
            let text = format!("role:master\r\nconnected_slaves:2\r\nmaster_repl_offset:1000\r\n{replicas}");
            Observation::from_info(&Info::parse(&text))
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

    #[test]
    fn a_thread_that_worked_a_quarter_of_the_time_is_a_quarter_busy() {
        let ms = Duration::from_millis;
        assert_eq!(busy_share(Some(ms(100)), Some(ms(105)), ms(20)), Some(0.25));
        assert_eq!(busy_share(None, Some(ms(105)), ms(20)), None);
        assert_eq!(busy_share(Some(ms(105)), Some(ms(5)), ms(20)), None, "another process");
    }

    #[test]
    fn small_changes_of_the_latency_wake_nobody() {
        let us = |us| Some(Duration::from_micros(us));
        assert!(!moved(us(50), us(900)) && moved(us(50), us(1100)) && moved(us(9000), us(50)) && moved(None, us(1)));
    }
}
