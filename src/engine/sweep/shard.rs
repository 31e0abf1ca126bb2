//! The sweep of one shard, DB after DB, through lost connections, restarts and failovers of its master.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::engine::control::{ControlState, StopReason};
use crate::engine::plan::{Outcome, ShardPlan, uncounted};
use crate::engine::policy::ledger::Ledger;
use crate::engine::policy::observation::Observation;
use crate::engine::policy::pacer::Pacer;
use crate::engine::policy::retry_budget::RetryBudget;
use crate::engine::policy::throttle;
use crate::engine::shards::permits::{Permit, Permits, Turn};
use crate::engine::shards::shard_map::ShardMap;
use crate::engine::sweep::lap_state::LapState;
use crate::engine::sweep::session::Session;
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::{Memory, PassFigures, ScanEvent, ScanEventKind};
use crate::model::shard::{DbIndex, ScanPosition, ShardId};
use crate::model::task::TaskId;
use crate::model::throttle::Reason;
use crate::node::commands;
use crate::node::info::Info;
use crate::node::topology::Master;
use crate::settings::ScanSettings;
use crate::store::journal::JournalDir;

/// Lazy frees have settled when nothing is pending at a second reading. The sweep waits for that no longer than this.
const SETTLE_WITHIN: Duration = Duration::from_secs(3);
/// Pause between two readings of the pending lazy frees.
const SETTLE_EVERY: Duration = Duration::from_millis(100);

/// Why a shard's sweep ends before it is complete.
pub(super) enum End {
    Stopped(StopReason),
    Failed(Failure),
    /// Other shards own all slots of this one.
    Dissolved,
}

impl From<Failure> for End {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// Everything that the sweep of one shard needs.
pub(in crate::engine) struct ShardJob {
    pub(in crate::engine) shard: ShardPlan,
    pub(in crate::engine) task: TaskId,
    pub(in crate::engine) journals: Option<JournalDir>,
    pub(in crate::engine) settings: ScanSettings,
    pub(in crate::engine) map: ShardMap,
    pub(in crate::engine) permits: Permits,
    /// The shard's place in the queue for its first permit.
    pub(in crate::engine) turn: Option<Turn>,
}

/// How the sweep of one shard ended.
pub(in crate::engine) struct ShardResult {
    pub(in crate::engine) outcome: Outcome,
    /// The node that was swept completely, with the slots that it owned from beginning to end.
    pub(in crate::engine) swept: Option<Master>,
    /// The figures of each DB.
    pub(in crate::engine) passes: BTreeMap<DbIndex, PassFigures>,
}

/// Sweeps one shard to its end.
pub(in crate::engine) async fn run(
    job: ShardJob,
    control: watch::Receiver<ControlState>,
    events: mpsc::Sender<ScanEvent>,
) -> ShardResult {
    let reporter = Reporter { shard: job.shard.id.clone(), events };
    let passes = job.shard.passes.clone();
    let (ended, swept, passes) = match ShardSweep::connect(job, reporter.clone(), control).await {
        Ok(mut sweep) => {
            let ended = sweep.sweep().await;
            sweep.restore_from_notes().await;
            (ended, Some(sweep.session.master), sweep.job.shard.passes)
        }
        Err(end) => (Err(end), None, passes),
    };
    let (outcome, swept) = match ended {
        Ok(()) => (Outcome::Complete, swept),
        Err(End::Stopped(reason)) => (Outcome::Stopped(reason), None),
        Err(End::Dissolved) => {
            let message = "this shard is gone: its slots went to other masters, which are swept instead".to_owned();
            reporter.say(ScanEventKind::Warned { message }).await;
            let (memory, settling) = (Memory::default(), Duration::ZERO);
            reporter.say(ScanEventKind::ShardFinished { memory, settling }).await;
            (Outcome::Complete, None)
        }
        Err(End::Failed(failure)) => {
            reporter.say(ScanEventKind::ShardEnded { failure: failure.clone() }).await;
            (Outcome::Failed(failure), None)
        }
    };
    ShardResult { outcome, swept, passes }
}

/// Sends events. The consumer is gone only when the task has ended: nobody needs the event.
#[derive(Clone)]
pub(super) struct Reporter {
    shard: ShardId,
    events: mpsc::Sender<ScanEvent>,
}

impl Reporter {
    pub(super) async fn say(&self, what: ScanEventKind) {
        let _ = self.events.send(ScanEvent { shard: self.shard.clone(), what }).await;
    }

    pub(super) async fn warn(&self, message: String) {
        self.say(ScanEventKind::Warned { message }).await;
    }
}

/// The sweep of one shard. Whatever belongs to one server process is in `session`.
pub(super) struct ShardSweep {
    pub(super) job: ShardJob,
    pub(super) reporter: Reporter,
    pub(super) control: watch::Receiver<ControlState>,
    pub(super) session: Session,
    pub(super) pacer: Pacer,
    pub(super) ledger: Ledger,
    /// Why the sweep holds, and since when.
    pub(super) hold: Option<(Reason, Instant)>,
    /// Whether the hold was requested through `control`, so that only `control` can end it.
    pub(super) requested_hold: bool,
    /// How long the sweep goes on trying to reconnect. Reset by the first batch that is answered.
    pub(super) retry: Option<RetryBudget>,
    /// The permit to sweep now. Given back for the time of every hold but a pause.
    pub(super) permit: Option<Permit>,
    /// The pace of a keep run; `None`: the sweep ends once every DB is swept.
    pub(super) keep: Option<LapState>,
}

impl ShardSweep {
    async fn sweep(&mut self) -> Result<(), End> {
        let info = self.info().await?;
        let server = self.session.facts(&info).ok_or_else(|| {
            Failure::new(FailureKind::Unsupported, "INFO names neither a redis_version nor a valkey_version")
        })?;
        let mut dbs = self.choose_dbs(&info);
        let memory = info.memory();
        self.reporter.say(ScanEventKind::ShardStarted { server, memory, dbs: dbs.clone() }).await;
        self.reporter.say(ScanEventKind::TouchDecided { outcome: self.session.touch.outcome() }).await;
        self.say_skipped().await;
        self.say_uncounted(&info).await;
        if self.keep.is_some() {
            // The checkpoint does not tell when a place was last walked, so the first lap starts from the beginning.
            self.job
                .shard
                .passes
                .values_mut()
                .for_each(|figures| figures.checkpoint.position = ScanPosition::NotStarted);
        } else {
            self.check_checkpoint().await;
        }
        self.restore_from_notes().await;
        if let Some(at_most) = self.job.settings.assist_expiry {
            self.assist(at_most).await?;
        }
        if self.keep.is_some() {
            return self.keep_laps(info).await;
        }
        while let Some(db) = dbs.iter().copied().find(|db| !self.session.finished.contains(db)) {
            let session = self.session.number;
            self.sweep_db(db).await?;
            self.session.finished.insert(db);
            if self.session.number != session {
                // Another node may hold keys in other DBs.
                let info = self.info().await?;
                dbs = self.choose_dbs(&info);
            }
        }
        self.permit = None;
        let begun = Instant::now();
        let memory = self.settled_memory().await;
        self.reporter.say(ScanEventKind::ShardFinished { memory, settling: begun.elapsed() }).await;
        Ok(())
    }

    /// Warns of default limits that this server gives no reading for.
    async fn say_skipped(&self) {
        let skipped = throttle::skipped(&self.session.baseline, &self.job.settings.tuning.limits);
        if !skipped.is_empty() {
            let message = format!(
                "the server does not report what these limits need, so they are not watched: {}",
                skipped.join(", ")
            );
            self.reporter.warn(message).await;
        }
    }

    /// Warns of keys that were reclaimed in the last second before a kill and not counted: at most what the server freed since the
    /// checkpoint.
    async fn say_uncounted(&self, info: &Info) {
        for &db in &self.job.shard.uncounted {
            let figures = self.job.shard.passes.get(&db).filter(|figures| self.session.owns(&figures.checkpoint));
            let since = figures.and_then(|figures| figures.checkpoint.server_expired);
            let at_most = info.parsed::<u64>("expired_keys").zip(since).and_then(|(now, then)| now.checked_sub(then));
            self.reporter.warn(uncounted(db, at_most)).await;
        }
    }

    /// Takes over the passes of the checkpoint that this server process has finished. Positions of another process are dropped.
    async fn check_checkpoint(&mut self) {
        let again = self.job.shard.restart_reason.is_some();
        let mut lost = false;
        for (&db, figures) in &mut self.job.shard.passes {
            let ours = !again && self.session.owns(&figures.checkpoint);
            match figures.checkpoint.position {
                ScanPosition::Finished if ours => {
                    self.session.finished.insert(db);
                    self.reporter.say(ScanEventKind::PassFinished { db, figures: figures.clone() }).await;
                }
                ScanPosition::At(_) if !ours => {
                    figures.checkpoint.position = ScanPosition::NotStarted;
                    figures.counters.restarts += 1;
                    lost = !again;
                }
                _ => {}
            }
        }
        if lost {
            let message = "the server was restarted since the checkpoint: unfinished passes begin again".to_owned();
            self.reporter.warn(message).await;
        }
    }

    /// The DBs that the settings name, or else those of the checkpoint and those that hold keys with a TTL.
    pub(super) fn choose_dbs(&self, info: &Info) -> Vec<DbIndex> {
        if !self.job.settings.dbs.is_empty() {
            return self.job.settings.dbs.clone();
        }
        let mut dbs: Vec<DbIndex> = self.job.shard.passes.keys().copied().collect();
        dbs.extend(info.keyspace().into_iter().filter(|(_, keys)| keys.expires > 0).map(|(db, _)| db));
        dbs.sort();
        dbs.dedup();
        dbs
    }

    /// The memory once lazy frees have settled, or the last reading.
    async fn settled_memory(&mut self) -> Memory {
        let deadline = Instant::now() + SETTLE_WITHIN;
        let mut last: Option<Memory> = None;
        loop {
            let Ok(info) = commands::info(self.session.conn()).await else { return last.unwrap_or_default() };
            let memory = info.memory();
            let pending = Observation::from_info(&info).lazyfree_pending.unwrap_or(0);
            // Two equal readings may never come, since other clients may write all the time.
            let settled = pending == 0 && last.is_some();
            if settled || Instant::now() >= deadline || self.wait(SETTLE_EVERY).await.is_err() {
                return memory;
            }
            last = Some(memory);
        }
    }
}
