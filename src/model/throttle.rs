//! Why a sweep holds.

use std::fmt;
use std::str::FromStr;

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
    /// A person paused the task.
    Paused,
    /// The off-peak window is closed.
    OutsideWindow,
    /// As many sweeps run as may run at once.
    Queued,
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
    Paused = "paused",
    OutsideWindow = "outside_window",
    Queued = "queued",
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
            Self::Paused => "paused by request",
            Self::OutsideWindow => "the off-peak window is closed; going on when it opens",
            Self::Queued => "as many sweeps run as may run at once; going on when one of them ends",
        }
    }
}
