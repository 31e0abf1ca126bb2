//! A bound on expired keys: what an operator asks for, and how well it is kept.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::format::{counted, grouped, span};
use crate::model::schedule::BacklogSize;
use crate::model::shard::ShardId;

/// What a keep run keeps to. At least one of the two is set where there is a keep run.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Bounds {
    /// Most expired keys that may be in the memory of a master.
    pub max_backlog: Option<BacklogSize>,
    /// Longest time that a key may stay in memory after it has expired.
    pub max_delay: Option<Duration>,
}

impl Bounds {
    /// Whether anything is bounded.
    pub fn any(&self) -> bool {
        self.max_backlog.is_some() || self.max_delay.is_some()
    }
}

/// How well a master is kept. Estimates, made from what the laps reclaimed; figures of time are exact.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct KeepFigures {
    /// Complete walks over all DBs.
    pub laps: u64,
    /// Expired keys in memory now; `None` during the first lap, which finds out.
    pub backlog: Option<u64>,
    /// Most expired keys that the bound allows now; `None` without a bound on the backlog.
    pub max_backlog: Option<u64>,
    /// Keys that expire each second and that nothing but the walk frees.
    pub inflow: f64,
    /// Longest time that a key can be in memory after it has expired: since the place that waits longest was walked.
    pub delay: Option<Duration>,
    /// How long a lap is meant to take now; zero: as fast as the limits allow.
    pub lap: Duration,
    /// How long a bound was missed.
    pub missed: Duration,
    /// Whether one is missed now.
    pub is_missed: bool,
}

impl KeepFigures {
    /// How far a bound is missed on a shard, in words.
    pub fn miss_text(&self, shard: &ShardId) -> String {
        let keys = counted(self.backlog.unwrap_or_default() as usize, "expired key");
        let most = self.max_backlog.map(|most| format!(", and {} are allowed", grouped(most))).unwrap_or_default();
        let delay = self.delay.map(|delay| format!("; keys stay for up to {}", span(delay))).unwrap_or_default();
        format!("about {keys} in the memory of {shard}{most}{delay}")
    }
}
