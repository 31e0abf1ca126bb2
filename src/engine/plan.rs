//! What is to be swept and how, and how that ended.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::time::Instant;

use crate::engine::control::StopReason;
use crate::model::failure::Failure;
use crate::model::keep::KeepFigures;
use crate::model::progress::PassFigures;
use crate::model::shard::{DbIndex, ShardId};
use crate::model::task::TaskId;
use crate::node::topology::{Master, Topology};
use crate::settings::ScanSettings;
use crate::store::StoredShard;
use crate::store::journal::JournalDir;

/// One shard to be swept, and what is known of it from a checkpoint or an earlier round.
#[derive(Debug, Clone)]
pub(super) struct ShardPlan {
    /// Its name in events and records.
    pub(super) id: ShardId,
    /// Where its master was when the topology was read.
    pub(super) master: Master,
    /// When that was.
    pub(super) seen: Instant,
    /// Figures of DBs that were begun earlier.
    pub(super) passes: BTreeMap<DbIndex, PassFigures>,
    /// DBs whose passes were cut off, and nothing tells what their last second freed.
    pub(super) uncounted: Vec<DbIndex>,
    /// How well its bounds were kept until then.
    pub(super) kept: KeepFigures,
    /// Why it is swept again, where an earlier round has swept it.
    pub(super) again: Option<String>,
}

/// What is said of a pass of which something may be uncounted; with the bound that the server's own count gives, if it gives one.
pub(super) fn uncounted(db: DbIndex, at_most: Option<u64>) -> String {
    let bound = at_most.map(|keys| format!(", and by the server's own count at most {keys} more")).unwrap_or_default();
    format!(
        "{db}: its process was killed or lost, and the batch journal that it wrote is not here or damaged, so what was freed in its last \
         second is not counted: the number of keys freed is at least the one shown{bound}"
    )
}

/// What to sweep and how.
#[derive(Debug, Clone)]
pub struct ScanPlan {
    /// The task that it belongs to.
    pub task: TaskId,
    /// Where the counts of each batch are kept against a kill.
    pub journals: Option<JournalDir>,
    /// Where the masters are, and how to connect to them.
    pub topology: Arc<Topology>,
    /// What a checkpoint knows of shards.
    pub known: BTreeMap<ShardId, StoredShard>,
    /// How to sweep each.
    pub settings: ScanSettings,
    /// Whether an instance that is away at the start is waited for, for the time of a lost connection. Else that fails at once.
    pub patient: bool,
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
