//! All shards of an instance, in rounds: each shard is swept, and swept again if its master or its slots have moved.
//!
//! # The guarantee when masters move
//!
//! A key that had expired before the sweep of its shard began, and that stayed in the instance, was met by a SCAN of a master that
//! held it all the time. The result of each shard says which node was swept, and which slots that node owned from the beginning of
//! its last pass to the end. When all shards are done, the topology is read once more. A shard gets another pass if another node is
//! its master by then, or if it has gained slots since its pass began; so does a node that has joined. That pass begins once the
//! slots have stopped moving, and there are at most [`ROUNDS`] of them. If slots still move after those, the task fails and says so.
//! (MIGRATE never moves an expired key: it frees it. The rule covers what does: failovers, and servers that move whole slots.)

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::engine::control::{ControlState, StopReason, stop_requested};
use crate::engine::plan::{Outcome, ScanPlan, ShardPlan, uncounted};
use crate::engine::shards::permits::Permits;
use crate::engine::shards::shard_map::ShardMap;
use crate::engine::sweep::{self, ShardJob, ShardResult};
use crate::model::bounds::KeepFigures;
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::{ScanEvent, ScanEventKind};
use crate::model::shard::ShardId;
use crate::model::throttle::Reason;
use crate::node::error::NodeError;
use crate::node::topology::{InstanceKind, Master};
use crate::store::StoredShard;

/// How many more rounds there are because masters or slots moved during the sweep.
pub(crate) const ROUNDS: u32 = 4;
/// Pause between two readings of the topology while it is unknown or moving.
const READ_EVERY: Duration = Duration::from_millis(500);
/// A keep run checks this often whether masters have joined.
const JOINED_EVERY: Duration = Duration::from_secs(10);
/// A keep run retries a master whose sweep has failed after this long.
const AFTER_FAILURE: Duration = Duration::from_secs(60);
/// A failure names at most this many shards; the report names all of them.
const NAMED_AT_MOST: usize = 5;

/// Finds the masters, sweeps every shard, each on its own tokio task, and reports through `events`. Ends when all shards have ended,
/// or after the batches under way once `control` requests a stop. A shard that fails does not end the others.
pub async fn run(
    plan: ScanPlan,
    mut control: watch::Receiver<ControlState>,
    events: mpsc::Sender<ScanEvent>,
) -> Outcome {
    let patience = if plan.patient { plan.settings.retry_for } else { Duration::ZERO };
    let begun = tokio::select! {
        begun = ShardMap::begin(plan.topology.clone(), patience) => begun,
        reason = stop_requested(&mut control) => return Outcome::Stopped(reason),
    };
    let (map, shards) = match begun {
        Ok(begun) => begun,
        Err(error) => return Outcome::Failed(error.into_failure()),
    };
    // A keep run sweeps every master all the time, and takes little of each.
    let permits =
        if plan.settings.tuning.bounds.any() { Permits::for_all() } else { Permits::new(plan.settings.parallel) };
    let mut rounds =
        Rounds { plan, map, permits, control, events, results: BTreeMap::new(), ended_at: BTreeMap::new() };
    match rounds.all(shards).await {
        Ok(()) => rounds.outcome(),
        Err(reason) => Outcome::Stopped(reason),
    }
}

/// The sweep of all shards of an instance.
struct Rounds {
    plan: ScanPlan,
    map: ShardMap,
    permits: Permits,
    control: watch::Receiver<ControlState>,
    events: mpsc::Sender<ScanEvent>,
    /// The last result of each shard.
    results: BTreeMap<ShardId, ShardResult>,
    /// When the last sweep of each shard ended: a keep run retries a shard [`AFTER_FAILURE`] later.
    ended_at: BTreeMap<ShardId, Instant>,
}

impl Rounds {
    async fn all(&mut self, shards: Vec<(ShardId, Master)>) -> Result<(), StopReason> {
        for id in self.plan.known.keys().filter(|id| !shards.iter().any(|(found, _)| found == *id)) {
            let message =
                "its slots have gone to other shards since the checkpoint; those are swept instead".to_owned();
            self.say(id, ScanEventKind::Warned { message }).await;
        }
        for (id, known) in self.plan.known.iter().filter(|(id, _)| !shards.iter().any(|(found, _)| found == *id)) {
            for db in &known.uncounted {
                self.say(id, ScanEventKind::Warned { message: uncounted(*db, None) }).await;
            }
        }
        let plans = shards.into_iter().map(|(id, master)| {
            let known = self.plan.known.get(&id).cloned().unwrap_or_default();
            let StoredShard { view, uncounted } = known;
            let kept = view.keep.unwrap_or_default();
            ShardPlan { id, master, seen: Instant::now(), passes: view.passes, uncounted, kept, restart_reason: None }
        });
        let mut plans: Vec<ShardPlan> = plans.collect();
        let mut round = 0;
        while !plans.is_empty() {
            self.round(plans).await?;
            plans = match self.moved().await? {
                Ok(plans) => plans,
                Err(failure) => {
                    self.fail_all_complete(&failure).await;
                    return Ok(());
                }
            };
            round += 1;
            if round > ROUNDS {
                for plan in plans {
                    let why = plan.restart_reason.unwrap_or_default();
                    let message = format!("{why}, even after {ROUNDS} more passes");
                    let failure = Failure::new(FailureKind::TopologyChanged, message)
                        .hint("sweep again when no slots are being moved");
                    self.fail(plan.id, failure).await;
                }
                return Ok(());
            }
        }
        Ok(())
    }

    /// Sweeps these shards at the same time, as many as there are permits for.
    async fn round(&mut self, plans: Vec<ShardPlan>) -> Result<(), StopReason> {
        let mut shards = JoinSet::new();
        let mut names = HashMap::new();
        for shard in plans {
            self.spawn(shard, &mut shards, &mut names).await;
        }
        let mut stopped = None;
        let mut check_at = Instant::now() + JOINED_EVERY;
        loop {
            let ended = tokio::select! {
                ended = shards.join_next_with_id() => ended,
                () = tokio::time::sleep_until(check_at), if self.keeps() && stopped.is_none() => {
                    for shard in self.joined(&names).await {
                        self.spawn(shard, &mut shards, &mut names).await;
                    }
                    check_at = Instant::now() + JOINED_EVERY;
                    continue;
                }
            };
            let Some(ended) = ended else { break };
            let (task, ended) = match ended {
                Ok((task, ended)) => (task, ended),
                Err(panic) => {
                    let failure =
                        Failure::new(FailureKind::Protocol, format!("the sweep of a shard broke off: {panic}"));
                    let outcome = Outcome::Failed(failure);
                    (panic.id(), ShardResult { outcome, swept: None, passes: BTreeMap::new() })
                }
            };
            if let Outcome::Stopped(reason) = ended.outcome {
                stopped = Some(reason);
            }
            if let Some(id) = names.remove(&task) {
                self.ended_at.insert(id.clone(), Instant::now());
                self.results.insert(id, ended);
            }
        }
        // A stop explains every other early end.
        stopped.map_or(Ok(()), Err)
    }

    async fn spawn(
        &self,
        shard: ShardPlan,
        shards: &mut JoinSet<ShardResult>,
        names: &mut HashMap<tokio::task::Id, ShardId>,
    ) {
        self.say(&shard.id, ScanEventKind::ShardFound { addr: shard.master.addr.clone() }).await;
        let id = shard.id.clone();
        let turn = self.permits.queue_up(&shard.master.addr).await;
        let job = ShardJob {
            shard,
            task: self.plan.task,
            journals: self.plan.journals.clone(),
            settings: self.plan.settings.clone(),
            map: self.map.clone(),
            permits: self.permits.clone(),
            turn: Some(turn),
        };
        let handle = shards.spawn(sweep::run(job, self.control.clone(), self.events.clone()));
        names.insert(handle.id(), id);
    }

    /// Whether this is a keep run: it does not end by itself.
    fn keeps(&self) -> bool {
        self.plan.settings.tuning.bounds.any()
    }

    /// Masters that a keep run does not sweep yet: those that have joined, and those whose sweep failed [`AFTER_FAILURE`] ago. None
    /// while the topology cannot be read.
    async fn joined(&self, walked: &HashMap<tokio::task::Id, ShardId>) -> Vec<ShardPlan> {
        if self.map.kind() == InstanceKind::Standalone {
            return Vec::new();
        }
        let masters = match self.map.read_again().await {
            Ok(masters) => masters,
            Err(error) => {
                tracing::debug!(%error, "the topology cannot be read again");
                return Vec::new();
            }
        };
        let rests = |id: &ShardId| self.ended_at.get(id).is_some_and(|at| at.elapsed() < AFTER_FAILURE);
        let new = masters.into_iter().filter(|(id, _)| !walked.values().any(|name| name == id) && !rests(id));
        let plan = |(id, master): (ShardId, Master)| {
            let passes = self.results.get(&id).map(|ended| ended.passes.clone()).unwrap_or_default();
            let (uncounted, kept) = (Vec::new(), KeepFigures::default());
            ShardPlan { id, master, seen: Instant::now(), passes, uncounted, kept, restart_reason: None }
        };
        new.map(plan).collect()
    }

    /// Reads the topology once more. Returns the shards that have to be swept again or for the first time.
    async fn moved(&mut self) -> Result<Result<Vec<ShardPlan>, Failure>, StopReason> {
        let any_complete = self.results.values().any(|ended| ended.outcome == Outcome::Complete);
        if self.map.kind() == InstanceKind::Standalone || !any_complete {
            return Ok(Ok(Vec::new()));
        }
        let mut control = self.control.clone();
        let settled = tokio::select! {
            settled = self.settled() => settled,
            reason = stop_requested(&mut control) => return Err(reason),
        };
        Ok(settled.map_err(|error| {
            let mut failure = error.into_failure();
            failure.message =
                format!("every shard was swept, but it is unknown whether one moved meanwhile: {}", failure.message);
            failure
        }))
    }

    /// If something has moved, waits until two readings agree, so that a long resharding costs one more pass and not one for each
    /// slot.
    async fn settled(&self) -> Result<Vec<ShardPlan>, NodeError> {
        let patience = Instant::now() + self.plan.settings.retry_for;
        let mut plans = self.uncovered(patience).await?;
        if plans.is_empty() {
            return Ok(plans);
        }
        let held = Instant::now();
        let reason = Reason::SlotsMoving;
        let holding: Vec<ShardId> = plans.iter().map(|plan| plan.id.clone()).collect();
        for id in &holding {
            self.say(id, ScanEventKind::HoldStarted { reason, detail: None }).await;
        }
        let place = |plan: &ShardPlan| (plan.id.clone(), plan.master.addr.clone(), plan.master.slots.clone());
        while Instant::now() < patience {
            tokio::time::sleep(READ_EVERY).await;
            let next = self.uncovered(patience).await?;
            let settled = plans.iter().map(place).eq(next.iter().map(place));
            plans = next;
            if settled {
                break;
            }
        }
        for id in &holding {
            self.say(id, ScanEventKind::HoldEnded { reason, lasted: held.elapsed() }).await;
        }
        Ok(plans)
    }

    /// Reads where the masters are, again and again while no node answers, and plans what has to be swept again.
    async fn uncovered(&self, patience: Instant) -> Result<Vec<ShardPlan>, NodeError> {
        loop {
            match self.map.read_again().await {
                Ok(now) => return Ok(now.into_iter().filter_map(|(id, master)| self.replan(id, master)).collect()),
                Err(error) if Instant::now() >= patience => return Err(error),
                Err(error) => tracing::warn!(%error, "the topology cannot be read again"),
            }
            tokio::time::sleep(READ_EVERY).await;
        }
    }

    /// The plan to sweep a shard again, if what was swept does not cover what is there now.
    fn replan(&self, id: ShardId, master: Master) -> Option<ShardPlan> {
        let (why, passes) = match self.results.get(&id) {
            // It has failed already, and says why.
            Some(ShardResult { outcome: Outcome::Failed(_) | Outcome::Stopped(_), .. }) => return None,
            Some(ShardResult { swept: Some(swept), passes, .. }) => {
                let gained = master.slots.minus(&swept.slots);
                let why = if !swept.is_same_node(&master) {
                    format!("{} became the master after {} was swept", master.addr, swept.addr)
                } else if !gained.is_empty() {
                    format!("the slots {gained} came to {} after its pass had begun", master.addr)
                } else {
                    return None;
                };
                (why, passes.clone())
            }
            Some(ShardResult { passes, .. }) => (format!("{} owns slots again", master.addr), passes.clone()),
            None => (format!("{} joined the cluster during the sweep", master.addr), BTreeMap::new()),
        };
        let (uncounted, kept) = (Vec::new(), KeepFigures::default());
        Some(ShardPlan { id, master, seen: Instant::now(), passes, uncounted, kept, restart_reason: Some(why) })
    }

    async fn fail_all_complete(&mut self, failure: &Failure) {
        let complete = self.results.iter().filter(|(_, ended)| ended.outcome == Outcome::Complete);
        let ids: Vec<ShardId> = complete.map(|(id, _)| id.clone()).collect();
        for id in ids {
            self.fail(id, failure.clone()).await;
        }
    }

    async fn fail(&mut self, id: ShardId, failure: Failure) {
        self.say(&id, ScanEventKind::ShardEnded { failure: failure.clone() }).await;
        let ended = ShardResult { outcome: Outcome::Failed(failure), swept: None, passes: BTreeMap::new() };
        self.results.insert(id, ended);
    }

    async fn say(&self, shard: &ShardId, what: ScanEventKind) {
        // The consumer is gone only when the task has ended: nobody needs the event.
        let _ = self.events.send(ScanEvent { shard: shard.clone(), what }).await;
    }

    /// The outcome of the instance: a failure names the shards that failed.
    fn outcome(&self) -> Outcome {
        let failures: Vec<(&ShardId, &Failure)> = self
            .results
            .iter()
            .filter_map(|(id, ended)| match &ended.outcome {
                Outcome::Failed(failure) => Some((id, failure)),
                _ => None,
            })
            .collect();
        let Some(&(_, first)) = failures.first() else { return Outcome::Complete };
        if self.results.len() == 1 {
            return Outcome::Failed(first.clone());
        }
        let mut named: Vec<String> =
            failures.iter().take(NAMED_AT_MOST).map(|(id, failure)| format!("{id}: {failure}")).collect();
        if failures.len() > NAMED_AT_MOST {
            named.push(format!("and {} more", failures.len() - NAMED_AT_MOST));
        }
        let message = format!(
            "{} of {} shards were not swept completely: {}",
            failures.len(),
            self.results.len(),
            named.join("; ")
        );
        Outcome::Failed(Failure { kind: first.kind, message, hint: first.hint.clone() })
    }
}
