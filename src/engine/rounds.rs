//! All shards of an instance, in rounds: each is swept, and again as long as masters or slots have moved.
//!
//! # What is promised when masters move
//!
//! A key that was dead before its shard's sweep began, and that is still in the instance at the end, was met by a SCAN of a
//! master that had it all the time. Each shard's record says which node was swept and which slots it owned from the
//! beginning of its last pass to the end. When all shards are done the topology is read once more: a shard whose master is
//! another node by then, or that has come by slots since its pass began, and a node that has joined, get another pass once the
//! slots stay where they are, up to [`ROUNDS`] times. If slots still move after those, the task fails and says so. (MIGRATE never
//! moves a dead key: it frees it. The rule covers the ways that do: failovers, and servers that move whole slots.)

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::engine::control::{Orders, StopReason, stop_ordered};
use crate::engine::plan::{Outcome, ScanPlan, ShardPlan, uncounted};
use crate::engine::shards::permits::Permits;
use crate::engine::shards::shard_map::ShardMap;
use crate::engine::sweep::{self, Ended, Job};
use crate::model::failure::{Failure, FailureKind};
use crate::model::keep::KeepFigures;
use crate::model::progress::{ScanEvent, ScanEventKind};
use crate::model::shard::ShardId;
use crate::model::throttle::Reason;
use crate::node::error::NodeError;
use crate::node::topology::{Kind, Master};
use crate::store::StoredShard;

/// How often shards are swept again because masters or slots moved during the sweep.
pub const ROUNDS: u32 = 4;
/// Pause between readings of a topology that is unknown or moves.
const READ_EVERY: Duration = Duration::from_millis(500);
/// A keep run looks this often whether masters have joined,
const JOINED_EVERY: Duration = Duration::from_secs(10);
/// and walks one whose walk has failed again after this long.
const AFTER_FAILURE: Duration = Duration::from_secs(60);
/// At most this many shards are named in a failure; the report has all of them.
const NAMED_AT_MOST: usize = 5;

/// Finds the masters, sweeps every shard, each on its own task, and reports through `events`. Ends when all shards have,
/// or after the batches under way once `orders` say stop. A shard that fails does not end the others.
pub async fn run(plan: ScanPlan, mut orders: watch::Receiver<Orders>, events: mpsc::Sender<ScanEvent>) -> Outcome {
    let patience = if plan.patient { plan.settings.retry_for } else { Duration::ZERO };
    let begun = tokio::select! {
        begun = ShardMap::begin(plan.topology.clone(), patience) => begun,
        reason = stop_ordered(&mut orders) => return Outcome::Stopped(reason),
    };
    let (map, shards) = match begun {
        Ok(begun) => begun,
        Err(error) => return Outcome::Failed(error.into_failure()),
    };
    // A keep run takes every master all the time, and little of each.
    let permits =
        if plan.settings.tuning.bounds.any() { Permits::for_all() } else { Permits::new(plan.settings.parallel) };
    let mut rounds = Rounds { plan, map, permits, orders, events, records: BTreeMap::new(), ended_at: BTreeMap::new() };
    match rounds.all(shards).await {
        Ok(()) => rounds.outcome(),
        Err(reason) => Outcome::Stopped(reason),
    }
}

/// A sweep of all shards.
struct Rounds {
    plan: ScanPlan,
    map: ShardMap,
    permits: Permits,
    orders: watch::Receiver<Orders>,
    events: mpsc::Sender<ScanEvent>,
    records: BTreeMap<ShardId, Ended>,
    ended_at: BTreeMap<ShardId, Instant>,
}

impl Rounds {
    async fn all(&mut self, shards: Vec<(ShardId, Master)>) -> Result<(), StopReason> {
        for id in self.plan.known.keys().filter(|id| !shards.iter().any(|(found, _)| found == *id)) {
            let message = "its slots have gone to other shards since the checkpoint, which are swept for it".to_owned();
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
            ShardPlan { id, master, seen: Instant::now(), passes: view.passes, uncounted, kept, again: None }
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
                    let why = plan.again.unwrap_or_default();
                    let message = format!("{why}, after {ROUNDS} more passes each time");
                    let failure = Failure::new(FailureKind::TopologyChanged, message)
                        .hint("sweep again when no slots are being moved");
                    self.fail(plan.id, failure).await;
                }
                return Ok(());
            }
        }
        Ok(())
    }

    /// Sweeps these shards side by side, as far as there are permits.
    async fn round(&mut self, plans: Vec<ShardPlan>) -> Result<(), StopReason> {
        let mut shards = JoinSet::new();
        let mut names = HashMap::new();
        for shard in plans {
            self.spawn(shard, &mut shards, &mut names).await;
        }
        let mut stopped = None;
        let mut look_at = Instant::now() + JOINED_EVERY;
        loop {
            let ended = tokio::select! {
                ended = shards.join_next_with_id() => ended,
                () = tokio::time::sleep_until(look_at), if self.keeps() && stopped.is_none() => {
                    for shard in self.joined(&names).await {
                        self.spawn(shard, &mut shards, &mut names).await;
                    }
                    look_at = Instant::now() + JOINED_EVERY;
                    continue;
                }
            };
            let Some(ended) = ended else { break };
            let (task, ended) = match ended {
                Ok((task, ended)) => (task, ended),
                Err(panic) => {
                    let failure = Failure::new(FailureKind::Protocol, format!("the sweep of a shard broke: {panic}"));
                    let outcome = Outcome::Failed(failure);
                    (panic.id(), Ended { outcome, swept: None, passes: BTreeMap::new() })
                }
            };
            if let Outcome::Stopped(reason) = ended.outcome {
                stopped = Some(reason);
            }
            if let Some(id) = names.remove(&task) {
                self.ended_at.insert(id.clone(), Instant::now());
                self.records.insert(id, ended);
            }
        }
        // A stop explains everything else that ended early.
        stopped.map_or(Ok(()), Err)
    }

    async fn spawn(
        &self,
        shard: ShardPlan,
        shards: &mut JoinSet<Ended>,
        names: &mut HashMap<tokio::task::Id, ShardId>,
    ) {
        self.say(&shard.id, ScanEventKind::ShardFound { addr: shard.master.addr.clone() }).await;
        let id = shard.id.clone();
        let turn = self.permits.queue_up(&shard.master.addr).await;
        let job = Job {
            shard,
            task: self.plan.task,
            journals: self.plan.journals.clone(),
            settings: self.plan.settings.clone(),
            map: self.map.clone(),
            permits: self.permits.clone(),
            turn: Some(turn),
        };
        let handle = shards.spawn(sweep::run(job, self.orders.clone(), self.events.clone()));
        names.insert(handle.id(), id);
    }

    /// Whether this is a keep run, which does not end by itself.
    fn keeps(&self) -> bool {
        self.plan.settings.tuning.bounds.any()
    }

    /// Masters of a keep run that are not walked: those that have joined, and those whose walk failed a while ago. While nobody can say
    /// who the masters are, there are none.
    async fn joined(&self, walked: &HashMap<tokio::task::Id, ShardId>) -> Vec<ShardPlan> {
        if self.map.kind() == Kind::Standalone {
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
            let passes = self.records.get(&id).map(|ended| ended.passes.clone()).unwrap_or_default();
            let (uncounted, kept) = (Vec::new(), KeepFigures::default());
            ShardPlan { id, master, seen: Instant::now(), passes, uncounted, kept, again: None }
        };
        new.map(plan).collect()
    }

    /// Reads the topology once more. Returns the shards that have to be swept again, or for the first time.
    async fn moved(&mut self) -> Result<Result<Vec<ShardPlan>, Failure>, StopReason> {
        let any_complete = self.records.values().any(|ended| ended.outcome == Outcome::Complete);
        if self.map.kind() == Kind::Standalone || !any_complete {
            return Ok(Ok(Vec::new()));
        }
        let mut orders = self.orders.clone();
        let settled = tokio::select! {
            settled = self.settled() => settled,
            reason = stop_ordered(&mut orders) => return Err(reason),
        };
        Ok(settled.map_err(|error| {
            let mut failure = error.into_failure();
            failure.message =
                format!("every shard was swept, but whether one moved meanwhile is unknown: {}", failure.message);
            failure
        }))
    }

    /// Where something moved, waits until two readings agree, so that a long resharding costs one more pass and not one for
    /// each slot.
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

    /// Reads where the masters are, again and again while nobody answers, and plans what has to be swept again.
    async fn uncovered(&self, patience: Instant) -> Result<Vec<ShardPlan>, NodeError> {
        loop {
            match self.map.read_again().await {
                Ok(now) => return Ok(now.into_iter().filter_map(|(id, master)| self.again(id, master)).collect()),
                Err(error) if Instant::now() >= patience => return Err(error),
                Err(error) => tracing::warn!(%error, "the topology cannot be read again"),
            }
            tokio::time::sleep(READ_EVERY).await;
        }
    }

    /// The plan to sweep a shard again, where what was swept does not cover what is there now.
    fn again(&self, id: ShardId, master: Master) -> Option<ShardPlan> {
        let (why, passes) = match self.records.get(&id) {
            // It has its failure already.
            Some(Ended { outcome: Outcome::Failed(_) | Outcome::Stopped(_), .. }) => return None,
            Some(Ended { swept: Some(swept), passes, .. }) => {
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
            Some(Ended { passes, .. }) => (format!("{} owns slots again", master.addr), passes.clone()),
            None => (format!("{} joined the cluster during the sweep", master.addr), BTreeMap::new()),
        };
        let (uncounted, kept) = (Vec::new(), KeepFigures::default());
        Some(ShardPlan { id, master, seen: Instant::now(), passes, uncounted, kept, again: Some(why) })
    }

    async fn fail_all_complete(&mut self, failure: &Failure) {
        let complete = self.records.iter().filter(|(_, ended)| ended.outcome == Outcome::Complete);
        let ids: Vec<ShardId> = complete.map(|(id, _)| id.clone()).collect();
        for id in ids {
            self.fail(id, failure.clone()).await;
        }
    }

    async fn fail(&mut self, id: ShardId, failure: Failure) {
        self.say(&id, ScanEventKind::ShardEnded { failure: failure.clone() }).await;
        let ended = Ended { outcome: Outcome::Failed(failure), swept: None, passes: BTreeMap::new() };
        self.records.insert(id, ended);
    }

    async fn say(&self, shard: &ShardId, what: ScanEventKind) {
        // A consumer that is gone has ended the task: nothing is left to tell it.
        let _ = self.events.send(ScanEvent { shard: shard.clone(), what }).await;
    }

    /// One outcome of all: the failures name their shards.
    fn outcome(&self) -> Outcome {
        let failures: Vec<(&ShardId, &Failure)> = self
            .records
            .iter()
            .filter_map(|(id, ended)| match &ended.outcome {
                Outcome::Failed(failure) => Some((id, failure)),
                _ => None,
            })
            .collect();
        let Some(&(_, first)) = failures.first() else { return Outcome::Complete };
        if self.records.len() == 1 {
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
            self.records.len(),
            named.join("; ")
        );
        Outcome::Failed(Failure { kind: first.kind, message, hint: first.hint.clone() })
    }
}
