//! Why a sweep holds, and the limits on load that make it hold or give up.

use crate::model::words::words;

/// Why the sweep of a shard holds: a word for metrics and records, and a sentence for the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// The connection was lost and is being made again.
    Reconnecting,
    /// The master is gone or is a replica now; the sweep looks for the master that takes its place.
    NoMaster,
    /// Slots have come to the master since the sweep of the shard ended; they are given time to arrive before it is
    /// swept again.
    SlotsMoving,
    /// The server loads its data set.
    Loading,
    /// A script or a module keeps the server busy.
    Busy,
    /// The server hides expired keys and does not delete them: CLIENT PAUSE, or something with the same effect.
    DeletionBlocked,
    /// A coordinated failover is under way.
    Failover,
    /// The server answers PING more slowly than the limit.
    Latency,
    /// A replica is too far behind.
    ReplicaLag,
    /// A replica has not been heard of for too long.
    ReplicaSilent,
    /// The output buffers of the replicas hold too much.
    ReplicaBuffer,
    /// A child process saves or rewrites the data; each page that changes meanwhile is copied.
    Fork,
    /// A replica is receiving the whole data set.
    FullSync,
    /// Too many objects wait to be freed in the background.
    LazyFree,
    /// Other clients send more commands than the limit.
    Ops,
    /// Others take more of the main thread's time than the limit.
    Cpu,
    /// The load that a limit was set on cannot be read.
    Unreadable,
    /// A person paused the task.
    Paused,
    /// The off-peak window is closed.
    OutsideWindow,
    /// As many tasks sweep as may at a time.
    Queued,
    /// As many masters of the instance are being swept as may be at a time.
    Parallel,
    /// The records that several daemons share cannot be reached, so another daemon may take the task over.
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

/// A measure of load that a limit can be set on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// Mean round trip of PING.
    Latency,
    /// Replication stream that the replica furthest behind has not acknowledged.
    ReplicaLag,
    /// Time since the replica that is silent longest was heard of.
    ReplicaSilence,
    /// Contents of the output buffers of all replicas.
    ReplicaBuffer,
    /// Objects that wait to be freed in the background.
    LazyFree,
    /// Commands per second of other clients.
    Ops,
    /// Share of the main thread's time that other clients take.
    Cpu,
}

impl Measure {
    /// Whether every server shows it: where it is unknown, it was not measured yet.
    pub fn is_always_shown(self) -> bool {
        self == Self::Latency
    }
}

/// The unit of a measure: how a setting is read and how people are shown an amount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Amounts in seconds, shown as milliseconds.
    Milliseconds,
    /// Amounts in seconds, shown as a duration.
    Seconds,
    /// Amounts in bytes, shown as MiB.
    Bytes,
    /// Whole numbers: objects, or commands per second.
    Number,
    /// A share, 0 to 1.
    Share,
}

/// What `auto` means, relative to what was seen before the first batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Auto {
    /// No limit, however high the load.
    Off,
    /// So much more than before, so that a replica that was far behind already does not hold the sweep forever.
    More(f64),
    /// So many times as much as before, plus so much. No limit where the amount before is unknown.
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
    /// Key of the setting, as in `default.toml`.
    pub key: &'static str,
    /// The measure that it limits.
    pub measure: Measure,
    /// The unit of the measure.
    pub unit: Unit,
    /// What the value `auto` of the setting means.
    pub auto: Auto,
    /// What a load above the limit does.
    pub above: Above,
    /// The text that an operator reads before the amount.
    pub says: &'static str,
}

const fn hold(
    key: &'static str,
    measure: Measure,
    unit: Unit,
    auto: Auto,
    reason: Reason,
    says: &'static str,
) -> LimitRow {
    LimitRow { key, measure, unit, auto, above: Above::Hold(reason), says }
}

const fn give_up(key: &'static str, measure: Measure, unit: Unit, says: &'static str) -> LimitRow {
    LimitRow { key, measure, unit, auto: Auto::Off, above: Above::GiveUp, says }
}

const MIB: f64 = 1_048_576.0;

const LIMIT_COUNT: usize = 9;

/// Every limit on load. Where the load is above several, the first row gives the reason. The settings, the API and the
/// throttle read this table.
#[rustfmt::skip]
pub const LIMITS: [LimitRow; LIMIT_COUNT] = [
    hold("max-latency", Measure::Latency, Unit::Milliseconds, Auto::Times(5.0, 0.005), Reason::Latency, "PING takes"),
    hold("max-replica-lag", Measure::ReplicaLag, Unit::Bytes, Auto::More(16.0 * MIB), Reason::ReplicaLag, "behind by"),
    hold("max-replica-silence", Measure::ReplicaSilence, Unit::Seconds, Auto::More(10.0), Reason::ReplicaSilent, "silent for"),
    hold("max-replica-buffer", Measure::ReplicaBuffer, Unit::Bytes, Auto::More(32.0 * MIB), Reason::ReplicaBuffer, "waiting:"),
    hold("max-lazyfree", Measure::LazyFree, Unit::Number, Auto::More(100_000.0), Reason::LazyFree, "objects:"),
    hold("max-ops", Measure::Ops, Unit::Number, Auto::Off, Reason::Ops, "commands a second:"),
    hold("max-cpu", Measure::Cpu, Unit::Share, Auto::Off, Reason::Cpu, "share of the main thread:"),
    give_up("abort-latency", Measure::Latency, Unit::Milliseconds, "PING took"),
    give_up("abort-replica-lag", Measure::ReplicaLag, Unit::Bytes, "a replica is behind by"),
];

/// The value of a limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// The setting is off: there is no limit.
    Off,
    /// What fits most servers: see [`Auto`]. Where the load is unknown there is no limit.
    Auto,
    /// What the operator set, in the unit of its row. Where the load is unknown the sweep holds.
    At(f64),
}

/// The limits in force. A load above any of them suffices.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// In the order of [`LIMITS`].
    limits: [Limit; LIMIT_COUNT],
    /// Hold while a child process saves or rewrites, and while a replica receives the whole data set.
    pub hold_during_fork: bool,
}

impl Limits {
    /// Every limit off, and no hold during a fork.
    pub const NONE: Self = Self { limits: [Limit::Off; LIMIT_COUNT], hold_during_fork: false };

    /// Each limit with its row.
    pub fn iter(&self) -> impl Iterator<Item = (&'static LimitRow, Limit)> {
        const ROWS: &[LimitRow] = &LIMITS;
        ROWS.iter().zip(self.limits)
    }

    /// The same limits with another one for this key, which must be that of a row.
    #[must_use]
    pub fn with(mut self, key: &str, limit: Limit) -> Self {
        let row = LIMITS.iter().position(|row| row.key == key);
        debug_assert!(row.is_some(), "no limit is called {key}");
        if let Some(row) = row {
            self.limits[row] = limit;
        }
        self
    }

    /// Whether a limit on this measure has a value of its own.
    pub fn is_set_on(&self, measure: Measure) -> bool {
        self.iter().any(|(row, limit)| row.measure == measure && matches!(limit, Limit::At(_)))
    }
}
