//! What was read of a server. `None`: a missing right or an old version hides the value.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::engine::policy::{expiry_guard, profile};
use crate::model::progress::{Memory, ServerFacts};
use crate::model::shard::{DbIndex, NodeAddr};
use crate::model::words::words;
use crate::node::commands::Access;
use crate::node::info::{DbKeys, Info, ReplicaLine};
use crate::settings::{ScanSettings, Touch};

/// The role of a server, as far as a sweep depends on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ServerRole {
    /// It deletes expired keys, so that a sweep has an effect.
    Master,
    /// It hides expired keys and frees none by itself.
    Replica {
        /// Its master as `host:port`; `None` where INFO names none.
        master: Option<String>,
    },
    /// It watches masters and holds no keys.
    Sentinel,
    /// INFO does not give a role.
    Unknown,
}

/// How the server frees expired keys by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Expiry {
    /// `lazyfree-lazy-expire`: whether the value of an expired key is freed in the background.
    pub lazyfree: Option<bool>,
    /// `active-expire-effort`, 1 to 10; also `None` before Redis 6.
    pub effort: Option<u32>,
    /// `hz`: cycles of active expiry per second.
    pub hz: Option<u32>,
}

/// What INFO says of memory and eviction; `None` where it lacks the field.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct MemoryFacts {
    /// `used_memory` in bytes, the server's own overhead included.
    pub used: Option<u64>,
    /// `used_memory_dataset` in bytes: without the server's own overhead.
    pub dataset: Option<u64>,
    /// `maxmemory` in bytes; 0 means no limit.
    pub max: Option<u64>,
    /// `maxmemory_policy`: which keys are evicted at `maxmemory`.
    pub policy: Option<String>,
    /// Keys evicted since the server was started.
    pub evicted: Option<u64>,
}

/// What the server is busy with, as far as a sweep should know.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Busy {
    /// A child process writes an RDB file or a full synchronisation.
    pub bgsave: Option<bool>,
    /// A child process rewrites the AOF.
    pub aof_rewrite: Option<bool>,
    /// The data set is being loaded.
    pub loading: bool,
    /// A coordinated failover is under way.
    pub failover: bool,
    /// CLIENT PAUSE keeps writes back.
    pub writes_paused: bool,
}

/// A command that a sweep sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "each variant is the command of its name")]
pub(crate) enum Right {
    Scan,
    Dbsize,
    Info,
    Ping,
    Select,
    ClientSetname,
    Exists,
    Ttl,
}

words!(
    Right,
    "right",
    Scan = "SCAN",
    Dbsize = "DBSIZE",
    Info = "INFO",
    Ping = "PING",
    Select = "SELECT",
    ClientSetname = "CLIENT SETNAME",
    Exists = "EXISTS",
    Ttl = "TTL",
);

impl Right {
    /// The command with valid arguments, for ACL DRYRUN.
    pub(crate) fn example(self) -> &'static [&'static str] {
        match self {
            Self::Scan => &["SCAN", "0"],
            Self::Dbsize => &["DBSIZE"],
            Self::Info => &["INFO"],
            Self::Ping => &["PING"],
            Self::Select => &["SELECT", "0"],
            Self::ClientSetname => &["CLIENT", "SETNAME", "ttlsweep"],
            Self::Exists => &["EXISTS", "ttlsweep"],
            Self::Ttl => &["TTL", "ttlsweep"],
        }
    }

    /// The command as an ACL rule names it.
    pub(crate) fn rule(self) -> String {
        let name = self.as_str().to_lowercase();
        // A subcommand is quoted for the shell, as in `acl::ACL_LINE`.
        if name.contains(' ') { format!("'+{}'", name.replace(' ', "|")) } else { format!("+{name}") }
    }

    /// Whether a sweep with these settings fails without this right.
    pub(crate) fn is_needed(self, settings: &ScanSettings) -> bool {
        match self {
            Self::Scan | Self::Dbsize | Self::Info | Self::Ping | Self::Select => true,
            Self::ClientSetname => false,
            Self::Exists => settings.touch == Touch::Exists,
            Self::Ttl => settings.touch == Touch::Ttl,
        }
    }
}

/// The commands that this user may run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Rights(pub BTreeMap<Right, Access>);

impl Rights {
    /// Whether this command may be run.
    pub(crate) fn get(&self, right: Right) -> Access {
        self.0.get(&right).copied().unwrap_or_default()
    }

    /// Sets what the server answered.
    pub(crate) fn set(&mut self, right: Right, access: Access) {
        self.0.insert(right, access);
    }
}

/// Everything that was read of a server.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Facts {
    /// Where the server was reached.
    pub addr: NodeAddr,
    /// Product, version and process; `None` where INFO gives no version.
    pub server: Option<ServerFacts>,
    /// The Redis version whose commands the server has, as (major, minor).
    pub redis_version: Option<(u32, u32)>,
    /// The role that INFO gives.
    pub role: ServerRole,
    /// Whether the server is a node of a cluster.
    pub cluster: bool,
    /// How long the process has been running.
    pub uptime: Option<Duration>,
    /// Number of keys in each DB, from INFO keyspace, which lists only DBs that hold keys.
    pub dbs: BTreeMap<DbIndex, DbKeys>,
    /// Share of the keys with a TTL that have expired and are still in memory, from 0 to 1: see [`Info::expired_share`].
    pub expired_share: Option<f64>,
    /// Keys that expire each second; `None` also if that was not watched.
    pub expire_per_sec: Option<f64>,
    /// How the server frees expired keys by itself.
    pub expiry: Expiry,
    pub memory: MemoryFacts,
    /// The replicas that the server lists, whatever their state.
    pub replicas: Vec<ReplicaLine>,
    /// The server's own replication offset in bytes.
    pub replication_offset: Option<u64>,
    /// The replication history that the data belongs to.
    pub replication_id: Option<String>,
    /// What the server is busy with.
    pub busy: Busy,
    /// The ACL user of the connection.
    pub user: Option<String>,
    /// The commands that this user may run.
    pub rights: Rights,
    /// The smallest PING round trip.
    pub round_trip: Option<Duration>,
}

impl Facts {
    /// Facts from what was read.
    pub(crate) fn new(
        addr: &NodeAddr,
        info: Info,
        expiry: Expiry,
        rights: Rights,
        round_trip: Option<Duration>,
    ) -> Self {
        let Memory { used, max, evicted, .. } = info.memory();
        Self {
            addr: addr.clone(),
            server: info.server(addr),
            redis_version: info.redis_version(),
            role: match (info.mode(), info.is_master()) {
                (Some("sentinel"), _) => ServerRole::Sentinel,
                (_, Some(true)) => ServerRole::Master,
                (_, Some(false)) => ServerRole::Replica { master: info.master_addr() },
                (_, None) => ServerRole::Unknown,
            },
            cluster: info.flag("cluster_enabled") == Some(true),
            uptime: info.parsed("uptime_in_seconds").map(Duration::from_secs),
            dbs: info.keyspace(),
            expired_share: info.expired_share(),
            expire_per_sec: None,
            expiry,
            memory: MemoryFacts {
                dataset: info.parsed("used_memory_dataset"),
                policy: info.get("maxmemory_policy").map(str::to_owned),
                used,
                max,
                evicted,
            },
            replicas: info.replicas(),
            replication_offset: info.parsed("master_repl_offset"),
            replication_id: info.replication_id().map(str::to_owned),
            busy: Busy {
                bgsave: info.flag("rdb_bgsave_in_progress"),
                aof_rewrite: info.flag("aof_rewrite_in_progress"),
                loading: info.flag("loading") == Some(true),
                failover: info.get("master_failover_state").is_some_and(|state| state != "no-failover"),
                writes_paused: info.get("paused_actions").is_some_and(|actions| actions != "none"),
            },
            user: None,
            rights,
            round_trip,
        }
    }

    /// The sizes of all DBs together.
    pub(crate) fn total(&self) -> DbKeys {
        sum(self.dbs.values())
    }

    /// The DBs that a sweep with these settings walks: those that are named, or else each that holds keys with a TTL.
    pub(crate) fn swept(&self, settings: &ScanSettings) -> BTreeMap<DbIndex, DbKeys> {
        if settings.dbs.is_empty() {
            self.dbs.iter().filter(|(_, keys)| keys.expires > 0).map(|(db, keys)| (*db, *keys)).collect()
        } else {
            settings.dbs.iter().map(|db| (*db, self.dbs.get(db).copied().unwrap_or_default())).collect()
        }
    }

    /// Whether a sweep with these settings is so slow that the flow of expiry decides whether it does harm.
    pub(crate) fn has_to_know_the_flow(&self, settings: &ScanSettings) -> bool {
        let keys = self.longest_pass(settings);
        let starves = profile::slow_scan_starves_expiry(self.redis_version);
        self.role == ServerRole::Master && expiry_guard::has_to_know_the_flow(starves, keys, settings)
    }

    /// Keys in the largest DB that would be swept.
    pub(crate) fn longest_pass(&self, settings: &ScanSettings) -> u64 {
        self.swept(settings).values().map(|db| db.keys).max().unwrap_or(0)
    }

    /// Expired keys in a DB of this size, by the sample of active expiry. A replica has no such sample, since it expires nothing.
    pub(crate) fn expired_keys(&self, keys: DbKeys) -> Option<u64> {
        if matches!(self.role, ServerRole::Replica { .. }) {
            return None;
        }
        self.expired_share.map(|share| (keys.expires as f64 * share).round() as u64)
    }

    /// Bytes that this many keys hold if each has the mean size: the data set divided by the number of all keys.
    pub(crate) fn bytes_of(&self, keys: u64) -> Option<u64> {
        let all = self.total().keys;
        if all == 0 {
            return Some(0);
        }
        self.memory.dataset.map(|dataset| (dataset as f64 / all as f64 * keys as f64) as u64)
    }

    /// How many bytes the replica is behind.
    pub(crate) fn behind(&self, replica: &ReplicaLine) -> Option<u64> {
        self.replication_offset.map(|offset| offset.saturating_sub(replica.offset))
    }
}

/// The sizes of these DBs together.
pub(crate) fn sum<'a>(dbs: impl IntoIterator<Item = &'a DbKeys>) -> DbKeys {
    dbs.into_iter()
        .fold(DbKeys::default(), |sum, db| DbKeys { keys: sum.keys + db.keys, expires: sum.expires + db.expires })
}
