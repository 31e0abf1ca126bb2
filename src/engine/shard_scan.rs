//! The sweep of one shard: DB after DB, batch after batch, through whatever trouble its master has.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::engine::contact::Patience;
use crate::engine::control::{Orders, StopReason};
use crate::engine::observe::{Observation, Observer};
use crate::engine::pacer::Pacer;
use crate::engine::pass::Pass;
use crate::engine::pause::{Others, wait};
use crate::engine::payload::Payload;
use crate::engine::roster::Roster;
use crate::engine::scout::Second;
use crate::engine::seats::{Line, Seat, Seats};
use crate::engine::throttle;
use crate::engine::touch::Toucher;
use crate::engine::{Outcome, ShardPlan};
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::{Memory, PassFigures, ScanEvent, ScanEventKind};
use crate::model::shard::{DbIndex, RunId, ScanPosition, ShardId};
use crate::model::slots::CursorSpace;
use crate::model::task::TaskId;
use crate::model::throttle::Reason;
use crate::node::commands;
use crate::node::conn::Conn;
use crate::node::info::Info;
use crate::node::topology::Master;
use crate::node::wire::Names;
use crate::settings::ScanSettings;
use crate::store::tally::TallyDir;

/// Lazy frees have settled when nothing is pending at a second reading; we wait no longer than this.
const SETTLE_WITHIN: Duration = Duration::from_secs(3);
/// Pause between those readings.
const SETTLE_EVERY: Duration = Duration::from_millis(100);

/// Why a shard's sweep ends before it is complete.
pub(super) enum End {
    Stopped(StopReason),
    Failed(Failure),
    /// The shard is no more: others own its slots.
    Dissolved,
}

impl From<Failure> for End {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// Everything that the sweep of one shard needs to know.
pub(super) struct Job {
    pub(super) shard: ShardPlan,
    pub(super) task: TaskId,
    pub(super) tallies: Option<TallyDir>,
    pub(super) settings: ScanSettings,
    pub(super) roster: Roster,
    pub(super) seats: Seats,
    /// Where the shard stands in the line for its first seat.
    pub(super) line: Option<Line>,
}

/// How the sweep of one shard ended.
pub(super) struct Ended {
    pub(super) outcome: Outcome,
    /// What was swept completely: the node, and the slots that it owned from beginning to end.
    pub(super) swept: Option<Master>,
    /// The figures of each DB.
    pub(super) passes: BTreeMap<DbIndex, PassFigures>,
}

/// Sweeps one shard to its end.
pub(super) async fn run(job: Job, orders: watch::Receiver<Orders>, events: mpsc::Sender<ScanEvent>) -> Ended {
    let reporter = Reporter { shard: job.shard.id.clone(), events };
    let passes = job.shard.passes.clone();
    let (ended, swept, passes) = match ShardScan::connect(job, reporter.clone(), orders).await {
        Ok(mut scan) => {
            let ended = scan.sweep().await;
            scan.put_back_what_was_left().await;
            (ended, Some(scan.master), scan.job.shard.passes)
        }
        Err(end) => (Err(end), None, passes),
    };
    let (outcome, swept) = match ended {
        Ok(()) => (Outcome::Complete, swept),
        Err(End::Stopped(reason)) => (Outcome::Stopped(reason), None),
        Err(End::Dissolved) => {
            let message = "this shard is no more: its slots went to other masters, which are swept for them".to_owned();
            reporter.say(ScanEventKind::Warned { message }).await;
            reporter.say(ScanEventKind::ShardFinished { memory: Memory::default() }).await;
            (Outcome::Complete, None)
        }
        Err(End::Failed(failure)) => {
            reporter.say(ScanEventKind::ShardEnded { failure: failure.clone() }).await;
            (Outcome::Failed(failure), None)
        }
    };
    Ended { outcome, swept, passes }
}

/// Says what happened. A consumer that is gone has ended the task: nothing is left to tell it.
#[derive(Clone)]
pub(super) struct Reporter {
    shard: ShardId,
    events: mpsc::Sender<ScanEvent>,
}

impl Reporter {
    pub(super) async fn say(&self, what: ScanEventKind) {
        let _ = self.events.send(ScanEvent { shard: self.shard.clone(), what }).await;
    }
}

pub(super) struct ShardScan {
    pub(super) job: Job,
    pub(super) reporter: Reporter,
    pub(super) orders: watch::Receiver<Orders>,
    /// The main walk's.
    pub(super) conn: Conn,
    pub(super) second: Second,
    pub(super) observer: Observer,
    /// What was seen before the first batch: limits are relative to it.
    pub(super) before: Observation,
    /// What was seen last.
    pub(super) seen: Observation,
    /// What others need of the master.
    pub(super) others: Others,
    /// Whether all of this was decided upon. Not any more once something new is seen.
    pub(super) decided: bool,
    /// Keys that expired each second before the sweep, as far as the server tells.
    pub(super) flow: Option<f64>,
    pub(super) redis_version: Option<(u32, u32)>,
    pub(super) run_id: Option<RunId>,
    /// Counts the server processes that were met. Passes that an earlier one finished are not finished.
    pub(super) process: u32,
    /// DBs that are finished, and by which process.
    pub(super) done: BTreeMap<DbIndex, u32>,
    /// The node that is swept, and the slots that it owned since the pass began.
    pub(super) master: Master,
    /// Whether cursors follow the rules of a hash table, so that [`crate::engine::batch::hidden`] may judge.
    pub(super) judges: bool,
    /// Whether cursors were seen that do not follow them, whatever the server says that it is.
    pub(super) out_of_order: bool,
    /// How this process's cursors are to be read.
    pub(super) space: CursorSpace,
    pub(super) pacer: Pacer,
    pub(super) toucher: Toucher,
    pub(super) payload: Payload,
    pub(super) names: Names,
    pub(super) hold: Option<(Reason, Instant)>,
    /// Whether the hold is one that the orders asked for, and only they can end.
    pub(super) ordered_hold: bool,
    /// How long trouble is still borne. Gone once a batch was answered.
    pub(super) patience: Option<Patience>,
    /// Why DBs that were finished are swept again.
    pub(super) redo: Option<String>,
    /// The right to sweep now. Given back while the server is away.
    pub(super) seat: Option<Seat>,
}

impl ShardScan {
    async fn sweep(&mut self) -> Result<(), End> {
        let info = self.info(None).await?;
        let server = info.server(self.conn.addr()).ok_or_else(|| {
            Failure::new(FailureKind::Unsupported, "INFO names neither a redis_version nor a valkey_version")
        })?;
        let dbs = self.choose_dbs(&info);
        let memory = info.memory();
        self.reporter.say(ScanEventKind::ShardStarted { server, memory, dbs: dbs.clone() }).await;
        self.reporter.say(ScanEventKind::TouchDecided { outcome: self.toucher.outcome() }).await;
        self.say_skipped().await;
        self.check_checkpoint().await;
        self.put_back_what_was_left().await;
        if let Some(at_most) = self.job.settings.assist_expiry {
            self.assist(at_most).await?;
        }
        let mut dbs = dbs;
        while let Some(db) = dbs.iter().copied().find(|db| self.done.get(db) != Some(&self.process)) {
            let process = self.process;
            self.sweep_db(db).await?;
            self.done.insert(db, self.process);
            if self.process != process {
                // Another node may hold keys in other DBs.
                let info = self.info(None).await?;
                dbs = self.choose_dbs(&info);
            }
        }
        self.seat = None;
        let memory = self.settled_memory().await;
        self.reporter.say(ScanEventKind::ShardFinished { memory }).await;
        Ok(())
    }

    /// Default limits that cannot be watched here.
    async fn say_skipped(&self) {
        let skipped = throttle::skipped(&self.before, &self.job.settings.tuning.limits);
        if !skipped.is_empty() {
            let message = format!(
                "the server does not tell what these limits need, so they are not watched: {}",
                skipped.join(", ")
            );
            self.reporter.say(ScanEventKind::Warned { message }).await;
        }
    }

    /// INFO, however often the connection is lost. `pass`: the one under way, which goes on in its DB then.
    pub(super) async fn info(&mut self, mut pass: Option<&mut Pass>) -> Result<Info, End> {
        loop {
            match commands::info(&mut self.conn).await {
                Ok(info) => return Ok(info),
                Err(error) => self.recover(error, pass.as_deref_mut()).await?,
            }
        }
    }

    /// A cursor of the checkpoint is worth nothing to another process, and neither is a pass that it finished.
    async fn check_checkpoint(&mut self) {
        let here = self.run_id.as_ref().map(RunId::fingerprint);
        let again = self.job.shard.again.is_some();
        let mut lost = false;
        for (&db, figures) in &mut self.job.shard.passes {
            let ours = !again && here.is_some() && figures.process == here;
            match figures.position {
                ScanPosition::Finished if ours => {
                    self.done.insert(db, self.process);
                    self.reporter.say(ScanEventKind::PassFinished { db, figures: figures.clone() }).await;
                }
                ScanPosition::At(_) if !ours => {
                    figures.position = ScanPosition::NotStarted;
                    figures.restarts += 1;
                    lost = !again;
                }
                _ => {}
            }
        }
        if lost {
            let message = "the server was restarted since the checkpoint: unfinished passes begin again".to_owned();
            self.reporter.say(ScanEventKind::Warned { message }).await;
        }
    }

    /// The DBs that were named; else those of the checkpoint and those that hold keys with a TTL.
    fn choose_dbs(&self, info: &Info) -> Vec<DbIndex> {
        if !self.job.settings.dbs.is_empty() {
            return self.job.settings.dbs.clone();
        }
        let mut dbs: Vec<DbIndex> = self.job.shard.passes.keys().copied().collect();
        dbs.extend(info.keyspace().into_iter().filter(|(_, keys)| keys.expires > 0).map(|(db, _)| db));
        dbs.sort();
        dbs.dedup();
        dbs
    }

    /// Memory once lazy frees are done, or the last reading.
    async fn settled_memory(&mut self) -> Memory {
        let deadline = Instant::now() + SETTLE_WITHIN;
        let mut last: Option<Memory> = None;
        loop {
            let Ok(info) = commands::info(&mut self.conn).await else { return last.unwrap_or_default() };
            let memory = info.memory();
            let pending = Observation::from_info(&info).lazyfree_pending.unwrap_or(0);
            // Others may write all the time: two equal readings need not come.
            let settled = pending == 0 && last.is_some();
            if settled || Instant::now() >= deadline || wait(&mut self.orders, SETTLE_EVERY).await.is_err() {
                return memory;
            }
            last = Some(memory);
        }
    }
}
