//! What is to be swept and how, and how that ended.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::time::Instant;

use crate::engine::control::StopReason;
use crate::model::bounds::KeepFigures;
use crate::model::failure::Failure;
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
    /// The shard's name in events and records.
    pub(super) id: ShardId,
    /// Where its master was when the topology was read.
    pub(super) master: Master,
    /// When the topology was read.
    pub(super) seen: Instant,
    /// Figures of the DBs that were begun earlier.
    pub(super) passes: BTreeMap<DbIndex, PassFigures>,
    /// DBs whose passes were cut off without a readable batch journal: what their last second reclaimed is not counted.
    pub(super) uncounted: Vec<DbIndex>,
    /// How well the bounds of a keep run were kept so far.
    pub(super) kept: KeepFigures,
    /// Why the shard is swept again; `None` in the first round.
    pub(super) restart_reason: Option<String>,
}

/// The warning about a pass that may have uncounted keys. `at_most`: the most that the server's own count allows.
pub(super) fn uncounted(db: DbIndex, at_most: Option<u64>) -> String {
    let bound = at_most.map(|keys| format!(", and by the server's own count at most {keys} more")).unwrap_or_default();
    format!(
        "{db}: its process was killed or lost, and the batch journal that it wrote is missing or damaged, so what was freed in its last \
         second is not counted: the number of keys freed is at least the one shown{bound}"
    )
}

/// What to sweep and how.
#[derive(Debug, Clone)]
pub struct ScanPlan {
    /// The task that the sweep belongs to.
    pub task: TaskId,
    /// Where the batch journals are written; `None`: there is no state file.
    pub journals: Option<JournalDir>,
    /// Finds the masters and connects to them.
    pub topology: Arc<Topology>,
    /// The shards of the checkpoint.
    pub known: BTreeMap<ShardId, StoredShard>,
    /// How to sweep each shard.
    pub settings: ScanSettings,
    /// Whether to wait up to `retry-for` for an instance that is unreachable at the start; otherwise the sweep fails at once.
    pub patient: bool,
}

/// How a sweep ended, beside a failure.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Every pass of every shard is complete.
    Complete,
    /// It was told to stop.
    Stopped(StopReason),
    /// At least one shard ended early; the others are complete.
    Failed(Failure),
}
