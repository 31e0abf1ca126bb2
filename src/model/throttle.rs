//! Why a sweep holds, and the limits that make it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::model::task::words;

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

/// A limit on one figure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit<T> {
    /// None.
    Off,
    /// What fits most servers, relative to what was seen before the first batch. Skipped where the figure is unknown.
    Auto,
    /// What the operator set. Where the figure is unknown the sweep holds.
    At(T),
}

impl<T: fmt::Display> fmt::Display for Limit<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Auto => f.write_str("auto"),
            Self::At(limit) => limit.fmt(f),
        }
    }
}

/// Above which load a sweep holds (soft limits), and above which it gives up (hard limits). Any of them suffices.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Mean round trip of PING.
    pub latency: Limit<Duration>,
    /// Bytes that the replica furthest behind has not acknowledged.
    pub replica_lag: Limit<u64>,
    /// Since a replica last acknowledged anything.
    pub replica_silence: Limit<Duration>,
    /// Bytes in the output buffers of all replicas.
    pub replica_buffer: Limit<u64>,
    /// Objects that wait to be freed in the background.
    pub lazyfree: Limit<u64>,
    /// Commands of others per second.
    pub ops: Limit<u64>,
    /// Share of the main thread's time that others take, 0 to 1.
    pub cpu: Limit<f64>,
    /// Hold while a child process saves or rewrites, and while a replica is given the whole data set.
    pub hold_during_fork: bool,
    /// Hard: mean round trip of PING.
    pub abort_latency: Limit<Duration>,
    /// Hard: bytes that the replica furthest behind has not acknowledged.
    pub abort_replica_lag: Limit<u64>,
}

impl Limits {
    /// No limit at all.
    pub const NONE: Self = Self {
        latency: Limit::Off,
        replica_lag: Limit::Off,
        replica_silence: Limit::Off,
        replica_buffer: Limit::Off,
        lazyfree: Limit::Off,
        ops: Limit::Off,
        cpu: Limit::Off,
        hold_during_fork: false,
        abort_latency: Limit::Off,
        abort_replica_lag: Limit::Off,
    };
}
