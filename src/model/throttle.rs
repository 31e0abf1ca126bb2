//! Why a sweep holds, and the limits that make it.

use crate::model::words::words;

/// Why the sweep of a shard stands still for a while. The operator's sentence and the metric label both come
/// from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// The connection was lost and is being made again.
    Reconnecting,
    /// The master is gone or demoted, and the one that takes its place is looked for.
    NoMaster,
    /// The shard is swept, and slots have come to its master since: they are given time to arrive before it is swept again.
    SlotsMoving,
    /// The server loads its data set.
    Loading,
    /// A script or a module keeps the server busy.
    Busy,
    /// The server hides expired keys and does not delete them: CLIENT PAUSE, or something that acts like it.
    DeletionBlocked,
    /// A coordinated failover is under way.
    Failover,
    /// The server answers PING more slowly than the limit.
    Latency,
    /// A replica has acknowledged too little of what it was sent.
    ReplicaLag,
    /// A replica has not been heard of for too long.
    ReplicaSilent,
    /// Too much waits in the output buffers of replicas.
    ReplicaBuffer,
    /// A child process saves or rewrites: each page that changes meanwhile is copied.
    Fork,
    /// A replica is being given the whole data set.
    FullSync,
    /// The background frees lag behind.
    LazyFree,
    /// Other clients send more commands than the limit.
    Ops,
    /// Others take more of the main thread's time than the limit.
    Cpu,
    /// A figure that a limit was set on cannot be read.
    Unreadable,
    /// A person paused the task.
    Paused,
    /// The off-peak window is closed.
    OutsideWindow,
    /// As many tasks run as may run at once.
    Queued,
    /// As many masters of the instance are swept as may be at a time.
    Parallel,
    /// The records that several daemons share cannot be reached, and another daemon may take the task over.
    StoreUnreachable,
}

words!(
    Reason,
    "hold reason",
    Reconnecting = "reconnecting",
    NoMaster = "no_master",
    SlotsMoving = "slots_moving",
    Loading = "loading",
    Busy = "busy",
    DeletionBlocked = "deletion_blocked",
    Failover = "failover",
    Latency = "latency",
    ReplicaLag = "replica_lag",
    ReplicaSilent = "replica_silent",
    ReplicaBuffer = "replica_buffer",
    Fork = "fork",
    FullSync = "full_sync",
    LazyFree = "lazy_free",
    Ops = "ops",
    Cpu = "cpu",
    Unreadable = "unreadable",
    Paused = "paused",
    OutsideWindow = "outside_window",
    Queued = "queued",
    Parallel = "parallel",
    StoreUnreachable = "store_unreachable",
);

impl Reason {
    /// One sentence for the operator.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::Reconnecting => "the connection was lost; connecting again",
            Self::NoMaster => "the master is gone or is a replica now; looking for the one that takes its place",
            Self::SlotsMoving => "slots are moving between masters; waiting until they stay, to sweep where they went",
            Self::Loading => "the server is loading its data set",
            Self::Busy => "a script keeps the server busy",
            Self::DeletionBlocked => {
                "the server hides expired keys without deleting them (CLIENT PAUSE?); waiting for that to end"
            }
            Self::Failover => "a failover is under way",
            Self::Latency => "the server answers slowly (max-latency)",
            Self::ReplicaLag => "a replica is too far behind (max-replica-lag)",
            Self::ReplicaSilent => "a replica has not been heard of for too long (max-replica-silence)",
            Self::ReplicaBuffer => "too much waits to be sent to replicas (max-replica-buffer)",
            Self::Fork => "the server saves or rewrites its data in a child process (during-fork)",
            Self::FullSync => "a replica is being given the whole data set (during-fork)",
            Self::LazyFree => "the server has many objects still to free in the background (max-lazyfree)",
            Self::Ops => "other clients are busy (max-ops)",
            Self::Cpu => "others take much of the server's time (max-cpu)",
            Self::Unreadable => "a figure with a limit on it cannot be read",
            Self::Paused => "paused by request",
            Self::OutsideWindow => "the off-peak window is closed; going on when it opens",
            Self::Queued => "as many tasks run as may run at once (at-once); going on when one of them ends",
            Self::StoreUnreachable => {
                "the records cannot be reached, and another daemon may take the task over; going on once they can"
            }
            Self::Parallel => "another master is being swept (parallel); going on when it is this one's turn",
        }
    }
}

/// What a limit can be set on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// Mean round trip of PING.
    Latency,
    /// What the replica furthest behind has not acknowledged.
    ReplicaLag,
    /// Since a replica last acknowledged anything.
    ReplicaSilence,
    /// What waits in the output buffers of all replicas.
    ReplicaBuffer,
    /// Objects that wait to be freed in the background.
    LazyFree,
    /// Commands of others per second.
    Ops,
    /// Share of the main thread's time that others take.
    Cpu,
}

impl Load {
    /// Whether every server tells it: one that is unknown was not asked for yet.
    pub fn is_always_told(self) -> bool {
        self == Self::Latency
    }
}

/// How the amounts of a load are counted, read from a setting, and shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Seconds; shown as milliseconds.
    Milliseconds,
    /// Seconds.
    Seconds,
    /// Bytes; shown as MiB.
    Bytes,
    /// A whole number.
    Number,
    /// A share, 0 to 1.
    Share,
}

/// What `auto` means, relative to what was seen before the first batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Auto {
    /// No limit.
    Off,
    /// So much more than before, so that a replica that was far behind already does not hold the sweep for ever.
    More(f64),
    /// So many times as much as before, and so much more. No limit where it is unknown what was before.
    Times(f64, f64),
}

/// What a load above the limit does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Above {
    /// A soft limit: the sweep holds, for this reason.
    Hold(Reason),
    /// A hard limit: the sweep gives up once this is seen twice in a row.
    GiveUp,
}

/// One row of [`LIMITS`]. Amounts are in the unit of the row. The default is in `default.toml`, as that of every setting.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LimitRow {
    /// The setting.
    pub key: &'static str,
    /// What the limit is on.
    pub load: Load,
    /// How that is counted.
    pub unit: Unit,
    /// What `auto` means.
    pub auto: Auto,
    /// What happens above the limit.
    pub above: Above,
    /// What the operator reads before the amount.
    pub says: &'static str,
}

const fn hold(key: &'static str, load: Load, unit: Unit, auto: Auto, reason: Reason, says: &'static str) -> LimitRow {
    LimitRow { key, load, unit, auto, above: Above::Hold(reason), says }
}

const fn give_up(key: &'static str, load: Load, unit: Unit, says: &'static str) -> LimitRow {
    LimitRow { key, load, unit, auto: Auto::Off, above: Above::GiveUp, says }
}

const MIB: f64 = 1_048_576.0;

/// Every limit on load. Of several that are passed, the first gives the reason. Settings, tuning, what is shown and what is
/// decided are made of this table.
#[rustfmt::skip]
pub const LIMITS: [LimitRow; 9] = [
    hold("max-latency", Load::Latency, Unit::Milliseconds, Auto::Times(5.0, 0.005), Reason::Latency, "PING takes"),
    hold("max-replica-lag", Load::ReplicaLag, Unit::Bytes, Auto::More(16.0 * MIB), Reason::ReplicaLag, "behind by"),
    hold("max-replica-silence", Load::ReplicaSilence, Unit::Seconds, Auto::More(10.0), Reason::ReplicaSilent, "silent for"),
    hold("max-replica-buffer", Load::ReplicaBuffer, Unit::Bytes, Auto::More(32.0 * MIB), Reason::ReplicaBuffer, "waiting:"),
    hold("max-lazyfree", Load::LazyFree, Unit::Number, Auto::More(100_000.0), Reason::LazyFree, "objects:"),
    hold("max-ops", Load::Ops, Unit::Number, Auto::Off, Reason::Ops, "commands a second:"),
    hold("max-cpu", Load::Cpu, Unit::Share, Auto::Off, Reason::Cpu, "share of the main thread:"),
    give_up("abort-latency", Load::Latency, Unit::Milliseconds, "PING took"),
    give_up("abort-replica-lag", Load::ReplicaLag, Unit::Bytes, "a replica is behind by"),
];

/// A limit that is in force.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// None.
    Off,
    /// What fits most servers: see [`Auto`]. Skipped where the load is unknown.
    Auto,
    /// What the operator set, in the unit of its row. Where the load is unknown the sweep holds.
    At(f64),
}

/// The limits in force. Passing any of them suffices.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// In the order of [`LIMITS`].
    limits: [Limit; LIMITS.len()],
    /// Hold while a child process saves or rewrites, and while a replica is given the whole data set.
    pub hold_during_fork: bool,
}

impl Limits {
    /// No limit at all.
    pub const NONE: Self = Self { limits: [Limit::Off; LIMITS.len()], hold_during_fork: false };

    /// Each limit with its row.
    pub fn iter(&self) -> impl Iterator<Item = (&'static LimitRow, Limit)> {
        const ROWS: &[LimitRow] = &LIMITS;
        ROWS.iter().zip(self.limits)
    }

    /// Sets the limit of this key; one that has no row is left alone.
    #[must_use]
    pub fn with(mut self, key: &str, limit: Limit) -> Self {
        if let Some(place) = LIMITS.iter().position(|row| row.key == key) {
            self.limits[place] = limit;
        }
        self
    }

    /// Whether an amount of this load holds or ends the sweep.
    pub fn is_set_on(&self, load: Load) -> bool {
        self.iter().any(|(row, limit)| row.load == load && matches!(limit, Limit::At(_)))
    }
}
