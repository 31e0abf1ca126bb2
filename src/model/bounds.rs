//! Bounds on expired keys: what an operator asks of a keep run, and how well the run keeps to it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::format::{counted, grouped, span};
use crate::model::schedule::BacklogSize;
use crate::model::shard::ShardId;

/// The bounds: a task whose settings have one that is not `off` is a keep run.
pub const BOUND_KEYS: &[&str] = &["max-backlog", "max-delay"];

/// The bounds of a keep run, at least one of which is set; of a sweep none is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Bounds {
    /// The most expired keys that a master may hold in memory.
    pub max_backlog: Option<BacklogSize>,
    /// The longest time that a key may stay in memory after it has expired.
    pub max_delay: Option<Duration>,
}

impl Bounds {
    /// Whether a bound is set.
    pub fn any(&self) -> bool {
        self.max_backlog.is_some() || self.max_delay.is_some()
    }
}

/// How well a keep run keeps to its bounds on one master. Numbers of keys are estimates, made from what the laps
/// reclaimed; times are exact.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct KeepFigures {
    /// Laps, complete walks over all DBs, so far.
    pub laps: u64,
    /// Expired keys in memory now; `None` during the first lap, which measures them.
    pub backlog: Option<u64>,
    /// The most expired keys that the bound allows now; `None` without a bound on the backlog.
    pub max_backlog: Option<u64>,
    /// Keys per second that expire and that only the keep run reclaims.
    pub inflow: f64,
    /// The longest time that a key can have been in memory after it expired: the age of the oldest visit to any part of
    /// the keyspace.
    pub delay: Option<Duration>,
    /// How long a lap should take now; zero: as fast as the limits allow.
    pub lap: Duration,
    /// For how long a bound was missed, all times together.
    pub missed: Duration,
    /// Whether a bound is missed now.
    pub is_missed: bool,
}

impl KeepFigures {
    /// By how much a shard misses its bounds, as part of a sentence.
    pub fn miss_text(&self, shard: &ShardId) -> String {
        let keys = counted(self.backlog.unwrap_or_default() as usize, "expired key");
        let most = self.max_backlog.map(|most| format!(", and {} are allowed", grouped(most))).unwrap_or_default();
        let delay = self.delay.map(|delay| format!("; keys stay for up to {}", span(delay))).unwrap_or_default();
        format!("about {keys} in the memory of {shard}{most}{delay}")
    }
}
