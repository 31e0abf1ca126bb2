//! The sweep.
//!
//! # How a key is reclaimed
//!
//! Redis frees an expired key when somebody touches it or when its own cycle samples it. SCAN touches: for each key
//! that it is about to return, the server checks the TTL and deletes what is over, before it replies. So a sweep is one
//! SCAN cursor per DB from 0 to 0, without MATCH and without TYPE (either makes some servers skip keys), and needs no
//! right to read or write a key.
//!
//! # How it is counted
//!
//! Each batch is `DBSIZE`, `SCAN cursor COUNT n`, `DBSIZE` in one write. The server runs the commands of one buffer back
//! to back, so the difference is what this SCAN freed, whatever others do.
//!
//! # How it stays gentle
//!
//! See [`pacer`]: short batches, rest by intensity, a ceiling. [`throttle`] decides by what [`observe`] saw whether the
//! sweep may go on at all.
//!
//! # How it stays truthful
//!
//! A server that may not delete just now (paused, failing over, a replica) hides expired keys instead, and a naive
//! sweep would "succeed". [`batch`] proves hidden keys by arithmetic; the loop then stands still at the same cursor
//! until deletions work again. After a lost connection it goes on from the last cursor if the process is the same
//! (`run_id`), and begins the pass again if it is not, since a cursor means nothing to another process.
//!
//! Called by `tasks` and by nobody else. Never writes a record, never prints, never decides about more than one shard.

pub mod batch;
pub mod control;
pub mod observe;
pub mod pacer;
mod shard_scan;
pub mod throttle;
pub mod touch;

pub use shard_scan::may_be_swept;

use std::collections::BTreeMap;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::engine::control::{Orders, StopReason};
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::{PassFigures, ScanEvent};
use crate::model::shard::{DbIndex, NodeAddr, RunId, ShardId};
use crate::model::task::TaskId;
use crate::node::conn::ConnOptions;
use crate::settings::ScanSettings;
use crate::store::tally::TallyDir;

/// One shard of a plan, and what is known of it from a checkpoint.
#[derive(Debug, Clone)]
pub struct ShardPlan {
    /// Its name in events and records.
    pub id: ShardId,
    /// Where its master is.
    pub addr: NodeAddr,
    /// The process that the positions below belong to.
    pub run_id: Option<RunId>,
    /// Figures of DBs that were begun earlier.
    pub passes: BTreeMap<DbIndex, PassFigures>,
}

/// What to sweep and how.
#[derive(Debug, Clone)]
pub struct ScanPlan {
    /// The task that it belongs to.
    pub task: TaskId,
    /// Where the counts of each batch are kept against a kill.
    pub tallies: Option<TallyDir>,
    /// The shards.
    pub shards: Vec<ShardPlan>,
    /// How to sweep each.
    pub settings: ScanSettings,
    /// How to connect to each.
    pub conn: ConnOptions,
}

/// How a sweep ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Every pass of every shard is complete.
    Complete,
    /// It was told to stop.
    Stopped(StopReason),
    /// At least one shard ended early; the others are complete.
    Failed(Failure),
}

/// Sweeps every shard of the plan, each on its own task, and reports through `events`. Ends when all shards have, or
/// after the batches under way once `orders` say stop. A shard that fails does not end the others.
pub async fn run(plan: ScanPlan, orders: watch::Receiver<Orders>, events: mpsc::Sender<ScanEvent>) -> Outcome {
    let mut shards = JoinSet::new();
    for shard in plan.shards {
        let job = shard_scan::Job {
            shard,
            task: plan.task,
            tallies: plan.tallies.clone(),
            settings: plan.settings.clone(),
            options: plan.conn.clone(),
        };
        shards.spawn(shard_scan::run(job, orders.clone(), events.clone()));
    }
    let mut outcome = Outcome::Complete;
    while let Some(ended) = shards.join_next().await {
        let ended = ended.unwrap_or_else(|panic| {
            Outcome::Failed(Failure::new(FailureKind::Protocol, format!("the sweep of a shard broke: {panic}")))
        });
        outcome = match (outcome, ended) {
            // A stop explains everything else that ended early.
            (stopped @ Outcome::Stopped(_), _) | (_, stopped @ Outcome::Stopped(_)) => stopped,
            (failed @ Outcome::Failed(_), _) | (_, failed @ Outcome::Failed(_)) => failed,
            (Outcome::Complete, Outcome::Complete) => Outcome::Complete,
        };
    }
    outcome
}
