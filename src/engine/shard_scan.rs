//! The sweep of one shard: DB after DB, batch after batch, through whatever trouble its master has.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::engine::batch::{self, StillPass, Way};
use crate::engine::contact::Patience;
use crate::engine::control::{Orders, StopReason, stop_ordered};
use crate::engine::observe::{Observation, Observer};
use crate::engine::pacer::Pacer;
use crate::engine::roster::Roster;
use crate::engine::seats::{Line, Seat, Seats};
use crate::engine::throttle::{self, Decision};
use crate::engine::touch::Toucher;
use crate::engine::{Outcome, ShardPlan};
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::{PassFigures, ScanEvent, ScanEventKind, TouchOutcome};
use crate::model::shard::{DbIndex, RunId, ScanPosition, ShardId};
use crate::model::slots::CursorSpace;
use crate::model::task::TaskId;
use crate::model::throttle::Reason;
use crate::node::commands;
use crate::node::conn::{Conn, ScanBatch};
use crate::node::error::{Class, NodeError};
use crate::node::info::Info;
use crate::node::topology::Master;
use crate::node::wire::Names;
use crate::settings::ScanSettings;
use crate::store::tally::{Tally, TallyDir};

/// Progress is reported this often.
const REPORT_EVERY: Duration = Duration::from_millis(100);
/// How often a batch that proved hidden keys is asked again before we say so: a table that was resized in the middle
/// of a SCAN can look like it once, but not again at the same cursor.
const DOUBTS: u32 = 2;
/// Pause between looks at a server that does not delete.
const BLOCKED_EVERY: Duration = Duration::from_millis(250);
/// During a hold that an observation began, a server of which nothing was seen for this long is asked whether it is there.
const UNSEEN_AT_MOST: Duration = Duration::from_secs(3);
/// Lazy frees have settled when nothing is pending and two readings agree; we wait no longer than this.
const SETTLE_WITHIN: Duration = Duration::from_secs(3);

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
        Ok(mut scan) => (scan.sweep().await, Some(scan.master), scan.job.shard.passes),
        Err(end) => (Err(end), None, passes),
    };
    let (outcome, swept) = match ended {
        Ok(()) => (Outcome::Complete, swept),
        Err(End::Stopped(reason)) => (Outcome::Stopped(reason), None),
        Err(End::Dissolved) => {
            let message = "this shard is no more: its slots went to other masters, which are swept for them".to_owned();
            reporter.say(ScanEventKind::Warned { message }).await;
            reporter.say(ScanEventKind::ShardFinished { used_memory: None }).await;
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
    pub(super) conn: Conn,
    pub(super) observer: Observer,
    pub(super) run_id: Option<RunId>,
    /// Counts the server processes that were met. Passes that an earlier one finished are not finished.
    pub(super) process: u32,
    /// DBs that are finished, and by which process.
    pub(super) done: BTreeMap<DbIndex, u32>,
    /// The node that is swept, and the slots that it owned since the pass began.
    pub(super) master: Master,
    /// Whether cursors follow the rules of a hash table, so that [`batch::hidden`] may judge.
    pub(super) judges: bool,
    /// How this process's cursors are to be read.
    pub(super) space: CursorSpace,
    pub(super) pacer: Pacer,
    pub(super) toucher: Toucher,
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

/// One pass over one DB while it runs.
pub(super) struct Pass {
    pub(super) db: DbIndex,
    pub(super) figures: PassFigures,
    /// From here on deletions were proven to work: where to go back to when they stop.
    proven: ScanPosition,
    doubts: u32,
    /// How far a pass has to come before those doubts are gone: where hidden keys were last proven.
    doubted: ScanPosition,
    still: StillPass,
    untouched: bool,
    way: Way,
    reported: Instant,
    tally: Option<Tally>,
}

impl Pass {
    fn begin_again(&mut self) {
        self.figures.restarts += 1;
        self.proven = ScanPosition::NotStarted;
        self.untouched = false;
        self.doubted = ScanPosition::NotStarted;
        self.go_back();
    }

    /// Back to where deletions were last proven to work.
    pub(super) fn go_back(&mut self) {
        self.figures.position = self.proven;
        self.way = Way::default();
        if self.proven == ScanPosition::NotStarted {
            self.still = StillPass::default();
        }
    }
}

impl ShardScan {
    async fn sweep(&mut self) -> Result<(), End> {
        let info = self.info().await?;
        let server = info.server(self.conn.addr()).ok_or_else(|| {
            Failure::new(FailureKind::Unsupported, "INFO names neither a redis_version nor a valkey_version")
        })?;
        let dbs = self.choose_dbs(&info);
        let used_memory = info.parsed("used_memory");
        self.reporter.say(ScanEventKind::ShardStarted { server, used_memory, dbs: dbs.clone() }).await;
        self.reporter.say(ScanEventKind::TouchDecided { outcome: self.toucher.outcome() }).await;
        self.check_checkpoint().await;
        let mut dbs = dbs;
        while let Some(db) = dbs.iter().copied().find(|db| self.done.get(db) != Some(&self.process)) {
            let process = self.process;
            self.sweep_db(db).await?;
            self.done.insert(db, self.process);
            if self.process != process {
                // Another node may hold keys in other DBs.
                let info = self.info().await?;
                dbs = self.choose_dbs(&info);
            }
        }
        self.seat = None;
        let used_memory = self.settled_memory().await;
        self.reporter.say(ScanEventKind::ShardFinished { used_memory }).await;
        Ok(())
    }

    async fn info(&mut self) -> Result<Info, End> {
        loop {
            match commands::info(&mut self.conn).await {
                Ok(info) => return Ok(info),
                Err(error) => self.recover(error, None).await?,
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

    async fn sweep_db(&mut self, db: DbIndex) -> Result<(), End> {
        let mut figures = self.job.shard.passes.remove(&db).unwrap_or_default();
        figures.space = self.space.clone();
        figures.process = self.run_id.as_ref().map(RunId::fingerprint);
        if figures.position == ScanPosition::Finished {
            figures.position = ScanPosition::NotStarted;
            figures.restarts += 1;
            let why = self.redo.clone().or_else(|| self.job.shard.again.clone());
            let why = why.unwrap_or_else(|| "another server process answers".to_owned());
            self.reporter.say(ScanEventKind::PassRestarted { db, why, figures: figures.clone() }).await;
        }
        let mut pass = Pass {
            db,
            proven: figures.position,
            untouched: figures.position != ScanPosition::NotStarted,
            figures,
            doubts: 0,
            doubted: ScanPosition::NotStarted,
            still: StillPass::default(),
            way: Way::default(),
            reported: Instant::now(),
            tally: self.open_tally(db).await,
        };
        // A pass that goes on from a checkpoint has batches that this `still` has not seen: it proves nothing then.
        if pass.figures.position != ScanPosition::NotStarted {
            pass.still.add(&MOVED);
        }
        self.pacer.reset_slices();
        self.reporter.say(ScanEventKind::PassStarted { db, figures: pass.figures.clone() }).await;
        pass.figures.keys_at_start = loop {
            // Alone first: beside a DBSIZE that is refused, a SCAN would free keys that nobody counts.
            let ready = async {
                self.conn.select(db).await?;
                commands::dbsize(&mut self.conn).await
            };
            match ready.await {
                Ok(keys) if pass.figures.batches == 0 => break keys,
                Ok(_) => break pass.figures.keys_at_start,
                Err(error) => self.recover(error, Some(&mut pass)).await?,
            }
        };
        let ended = loop {
            match self.step(&mut pass).await {
                Ok(()) if pass.figures.position == ScanPosition::Finished => break Ok(()),
                Ok(()) => {}
                Err(end) => break Err(end),
            }
        };
        self.end_hold(Some(&mut pass)).await;
        self.fill_in(&mut pass);
        let figures = pass.figures;
        self.job.shard.passes.insert(db, figures.clone());
        match ended {
            Ok(()) => self.reporter.say(ScanEventKind::PassFinished { db, figures }).await,
            Err(_) => self.reporter.say(ScanEventKind::Progressed { db, figures }).await,
        }
        ended
    }

    async fn open_tally(&self, db: DbIndex) -> Option<Tally> {
        let tallies = self.job.tallies.as_ref()?;
        match tallies.open(self.job.task, &self.job.shard.id, db) {
            Ok(tally) => Some(tally),
            Err(error) => {
                self.warn_of_tally(&error).await;
                None
            }
        }
    }

    /// Writes the counts down where a kill cannot reach them.
    async fn write_tally(&self, pass: &mut Pass) {
        if let Some(tally) = &pass.tally
            && let Err(error) = tally.write(&pass.figures)
        {
            pass.tally = None;
            self.warn_of_tally(&error).await;
        }
    }

    async fn warn_of_tally(&self, error: &std::io::Error) {
        let message = format!(
            "the per-batch count cannot be kept beside the state file ({error}): a kill now may lose the count of the \
             last second; free some disk space"
        );
        self.reporter.say(ScanEventKind::Warned { message }).await;
    }

    /// One batch with everything around it. Leaves the position where it was when the batch has to be asked again.
    async fn step(&mut self, pass: &mut Pass) -> Result<(), End> {
        let ahead = self.conn.ahead();
        if ahead.is_none() {
            self.obey(pass).await?;
            self.look(pass).await?;
            self.sit_down().await?;
            self.rest(pass).await?;
        }
        let from = pass.figures.position;
        let Some(cursor) = from.to_send() else { return Ok(()) };
        let count = ahead.map_or_else(|| self.pacer.count(), |(_, count)| count);
        let touch = self.toucher.command();
        let next = (touch.is_none() && self.nothing_waits(pass)).then(|| self.pacer.count());
        let names = touch.is_some().then_some(&mut self.names);
        let scanned = match self.conn.scan(cursor, count, names, next).await {
            Ok(scanned) => scanned,
            Err(error) => return self.lost(error, pass).await,
        };
        self.patience = None;
        self.account(pass, &scanned);
        let next = ScanPosition::from_reply(scanned.cursor);
        let finished = next == ScanPosition::Finished;
        if self.judges {
            let by_batch = batch::hidden(&self.space, from, count, &scanned);
            let hidden = if finished { by_batch.max(pass.still.hidden()) } else { by_batch };
            if hidden > 0 {
                return self.blocked(pass, next, hidden).await;
            }
        }
        // Going back may have led far back: the batches up to the doubtful place prove nothing about it.
        if self.space.rank(next) >= self.space.rank(pass.doubted) || scanned.reclaimed() > 0 {
            pass.doubts = 0;
            pass.doubted = ScanPosition::NotStarted;
            self.end_hold(Some(pass)).await;
        }
        if touch.is_some() {
            self.names.truncate(self.toucher.keys());
            pass.untouched |= scanned.returned > self.names.len() as u64;
        }
        match touch.filter(|_| !self.names.is_empty()) {
            Some(command) => {
                // What was freed is safe from here on; the position follows once the batch is done.
                self.write_tally(pass).await;
                if !self.touch(pass, command, &scanned).await? {
                    return Ok(());
                }
            }
            None => {
                pass.untouched |= scanned.returned > 0;
                let outcome = self.toucher.learn(scanned.reclaimed(), 0);
                self.say_touch(outcome).await;
            }
        }
        if finished {
            self.write_tally(pass).await;
            if !self.confirm(pass).await? {
                return wait(&mut self.orders, BLOCKED_EVERY).await;
            }
        }
        self.check_way(pass, &scanned)?;
        pass.figures.position = next;
        if scanned.reclaimed() > 0 {
            pass.proven = next;
        }
        self.write_tally(pass).await;
        self.pay(pass, &scanned).await?;
        if pass.reported.elapsed() >= REPORT_EVERY {
            self.report(pass).await;
        }
        Ok(())
    }

    /// Whether the batch after the next may be sent before the next one's sums are done: nothing that comes before a
    /// batch has anything to say.
    fn nothing_waits(&self, pass: &Pass) -> bool {
        let orders = self.orders.borrow();
        let orders_wait = orders.stop.is_some() || orders.hold.is_some() || !self.pacer.runs_free(&orders.tuning);
        !orders_wait && self.hold.is_none() && pass.doubts == 0 && !self.observer.has_new()
    }

    /// A batch that was sent ahead from a place that is not where the sweep goes on: what it freed counts all the same.
    async fn settle(&mut self, pass: &mut Pass) -> Result<(), End> {
        let Some((cursor, count)) = self.conn.ahead() else { return Ok(()) };
        match self.conn.scan(cursor, count, None, None).await {
            Ok(scanned) => {
                self.account(pass, &scanned);
                self.write_tally(pass).await;
                Ok(())
            }
            Err(error) => self.lost(error, pass).await,
        }
    }

    /// A batch that was not answered, and with it one that may have been sent ahead.
    async fn lost(&mut self, error: NodeError, pass: &mut Pass) -> Result<(), End> {
        if !matches!(error, NodeError::Server { .. }) {
            pass.figures.lost_replies += 1 + u64::from(self.conn.ahead().is_some());
        }
        self.recover(error, Some(pass)).await
    }

    /// A server, or something in between, whose cursors lead nowhere must not hold us for ever.
    fn check_way(&self, pass: &mut Pass, scanned: &ScanBatch) -> Result<(), Failure> {
        let Some(why) = pass.way.add(scanned) else { return Ok(()) };
        let message = format!("the cursors of {} lead nowhere: {why}", self.conn.addr());
        let failure = Failure::new(FailureKind::Protocol, message);
        Err(failure.hint("is this a Redis or Valkey server, and is nothing in between that answers for it?"))
    }

    async fn sit_down(&mut self) -> Result<(), End> {
        if self.seat.is_none() {
            self.seat = tokio::select! {
                seat = self.job.seats.take(&self.master.addr) => Some(seat),
                reason = stop_ordered(&mut self.orders) => return Err(End::Stopped(reason)),
            };
        }
        Ok(())
    }

    fn account(&mut self, pass: &mut Pass, scanned: &ScanBatch) {
        let seen = scanned.returned + scanned.reclaimed();
        let figures = &mut pass.figures;
        figures.active += self.pacer.worked(seen, scanned.waited, scanned.ahead);
        figures.batches += 1;
        figures.scanned += seen;
        figures.reclaimed += scanned.reclaimed();
        pass.still.add(scanned);
    }

    /// Deletions do not work: stand still at the last place where they did, and look again until they do.
    async fn blocked(&mut self, pass: &mut Pass, at: ScanPosition, hidden: u64) -> Result<(), End> {
        self.settle(pass).await?;
        pass.go_back();
        self.write_tally(pass).await;
        pass.doubts += 1;
        pass.doubted = at;
        if pass.doubts > DOUBTS {
            let detail = format!("at least {hidden} expired keys were hidden and not freed by one batch");
            self.begin_hold(Some(pass), Reason::DeletionBlocked, Some(detail)).await;
            self.report(pass).await;
        }
        wait(&mut self.orders, BLOCKED_EVERY).await
    }

    /// Asks for the keys of a batch. Returns whether the batch is done; if not, the same or an earlier one is next.
    async fn touch(&mut self, pass: &mut Pass, command: &'static str, scanned: &ScanBatch) -> Result<bool, End> {
        let touched = match self.conn.touch(command, &self.names).await {
            Ok(touched) => touched,
            Err(error) if matches!(error.class(), Class::Fatal(_)) && matches!(error, NodeError::Server { .. }) => {
                return match self.toucher.refused() {
                    Some(outcome) => {
                        self.say_touch(Some(outcome)).await;
                        Ok(true)
                    }
                    None => Err(error.into_failure().into()),
                };
            }
            Err(error) => return self.lost(error, pass).await.map(|()| false),
        };
        let gone = if command == "TTL" { -2 } else { 0 };
        let left_dead = touched.answers.iter().filter(|answer| **answer == Some(gone)).count() as u64;
        let figures = &mut pass.figures;
        figures.active += self.pacer.worked(0, touched.waited, false);
        figures.touched += touched.answers.iter().flatten().count() as u64;
        figures.found_by_touch += left_dead;
        figures.reclaimed += touched.keys_before.saturating_sub(touched.keys_after);
        if command == "TTL" {
            touched.answers.iter().flatten().for_each(|&ttl| figures.ttl.add(ttl));
        }
        self.write_tally(pass).await;
        let outcome = self.toucher.learn(scanned.reclaimed(), left_dead);
        self.say_touch(outcome).await;
        if outcome != Some(TouchOutcome::ScanLeavesDead) {
            return Ok(true);
        }
        let why = "SCAN left expired keys in memory, and what was swept before was not touched".to_owned();
        self.done.clear();
        self.redo = Some(why.clone());
        if !pass.untouched {
            return Ok(true);
        }
        self.begin_again(pass, why).await;
        Ok(false)
    }

    async fn say_touch(&self, outcome: Option<TouchOutcome>) {
        if let Some(outcome) = outcome {
            self.reporter.say(ScanEventKind::TouchDecided { outcome }).await;
        }
    }

    /// Takes new orders in. Holds while they say so.
    async fn obey(&mut self, pass: &mut Pass) -> Result<(), End> {
        loop {
            let orders = *self.orders.borrow_and_update();
            stop_of(&orders)?;
            self.pacer.tune(orders.tuning);
            let Some(reason) = orders.hold else {
                if std::mem::take(&mut self.ordered_hold) {
                    self.end_hold(Some(pass)).await;
                }
                return Ok(());
            };
            self.ordered_hold = true;
            self.begin_hold(Some(pass), reason, None).await;
            self.report(pass).await;
            if self.orders.changed().await.is_err() {
                // Nobody is left who could say "go on", and nobody who could say "stop".
                return Err(End::Stopped(StopReason::Interrupted));
            }
        }
    }

    /// Takes a new observation in. Holds until [`throttle::decide`] lets the sweep go on.
    async fn look(&mut self, pass: &mut Pass) -> Result<(), End> {
        let Some(mut observation) = self.observer.take_new() else { return Ok(()) };
        loop {
            if let Some(stat) = observation.scan_stat {
                self.pacer.observe(stat);
            }
            match throttle::decide(&observation) {
                // A hold that the arithmetic began is ended by the arithmetic, in `step`.
                Decision::Proceed => {
                    if self.hold.is_some_and(|(reason, _)| reason != Reason::DeletionBlocked) {
                        self.end_hold(Some(pass)).await;
                    }
                    return Ok(());
                }
                Decision::Abort(failure) if failure.kind == FailureKind::NotAMaster => {
                    self.demoted(failure, pass).await?;
                    // The one that was found was looked at when it was reached.
                    return Ok(());
                }
                Decision::Abort(failure) => return Err(failure.into()),
                Decision::Hold(reason) => {
                    // What was swept since the last proof may have been swept under the same condition.
                    pass.go_back();
                    self.begin_hold(Some(pass), reason, None).await;
                }
            }
            self.write_tally(pass).await;
            observation = tokio::select! {
                next = self.observer.next() => next,
                reason = stop_ordered(&mut self.orders) => return Err(End::Stopped(reason)),
                () = tokio::time::sleep(UNSEEN_AT_MOST) => match commands::ping(&mut self.conn).await {
                    Ok(()) => continue,
                    // The server is gone, and with it whoever would say that the hold is over.
                    Err(error) => return self.recover(error, Some(pass)).await,
                },
            };
        }
    }

    /// Rests for the intensity.
    async fn rest(&mut self, pass: &mut Pass) -> Result<(), End> {
        if let Some(due) = self.pacer.rest_due() {
            let slept = self.doze(pass, due).await?;
            self.pacer.rested(slept);
        }
        Ok(())
    }

    /// Waits for the ceiling after a batch.
    async fn pay(&mut self, pass: &mut Pass, scanned: &ScanBatch) -> Result<(), End> {
        let mut keys = u32::try_from(scanned.returned + scanned.reclaimed()).unwrap_or(u32::MAX);
        while let Some(due) = self.pacer.ceiling_wait(&mut keys) {
            self.doze(pass, due).await?;
        }
        Ok(())
    }

    async fn doze(&mut self, pass: &mut Pass, due: Duration) -> Result<Duration, End> {
        let begun = Instant::now();
        if due >= REPORT_EVERY {
            self.report(pass).await;
        }
        wait(&mut self.orders, due).await?;
        let slept = begun.elapsed();
        pass.figures.rested += slept;
        Ok(slept)
    }

    pub(super) async fn begin_again(&self, pass: &mut Pass, why: String) {
        pass.begin_again();
        pass.figures.process = self.run_id.as_ref().map(RunId::fingerprint);
        self.write_tally(pass).await;
        let figures = pass.figures.clone();
        self.reporter.say(ScanEventKind::PassRestarted { db: pass.db, why, figures }).await;
    }

    pub(super) async fn begin_hold(&mut self, pass: Option<&mut Pass>, reason: Reason, detail: Option<String>) {
        if self.hold.is_some_and(|(current, _)| current == reason) {
            return;
        }
        self.end_hold(pass).await;
        if reason != Reason::Paused {
            // Another master of the host may be swept meanwhile. A pause is the whole task's.
            self.seat = None;
        }
        self.hold = Some((reason, Instant::now()));
        self.reporter.say(ScanEventKind::HoldStarted { reason, detail }).await;
    }

    pub(super) async fn end_hold(&mut self, pass: Option<&mut Pass>) {
        let Some((reason, since)) = self.hold.take() else { return };
        let lasted = since.elapsed();
        if let Some(pass) = pass {
            *pass.figures.held.entry(reason).or_default() += lasted;
        }
        self.reporter.say(ScanEventKind::HoldEnded { reason, lasted }).await;
    }

    fn fill_in(&self, pass: &mut Pass) {
        let figures = &mut pass.figures;
        figures.slice = self.pacer.slices();
        figures.count = self.pacer.count();
        figures.server_us_per_scan = self.pacer.server_us_per_scan();
    }

    async fn report(&mut self, pass: &mut Pass) {
        self.fill_in(pass);
        pass.reported = Instant::now();
        self.reporter.say(ScanEventKind::Progressed { db: pass.db, figures: pass.figures.clone() }).await;
    }

    /// `used_memory` once lazy frees are done, or the last reading.
    async fn settled_memory(&mut self) -> Option<u64> {
        let deadline = Instant::now() + SETTLE_WITHIN;
        let mut last: Option<u64> = None;
        loop {
            let info = commands::info(&mut self.conn).await.ok()?;
            let observation = Observation::from_info(&info);
            let settled = observation.lazyfree_pending == 0 && last == observation.used_memory;
            last = observation.used_memory.or(last);
            if settled || Instant::now() >= deadline {
                return last;
            }
            wait(&mut self.orders, Duration::from_millis(100)).await.ok()?;
        }
    }
}

/// A batch that moved DBSIZE: after it a [`StillPass`] proves nothing.
const MOVED: ScanBatch =
    ScanBatch { cursor: 0, returned: 0, keys_before: 1, keys_after: 0, waited: Duration::ZERO, ahead: false };

fn stop_of(orders: &Orders) -> Result<(), End> {
    orders.stop.map_or(Ok(()), |reason| Err(End::Stopped(reason)))
}

/// Sleeps, unless a stop is ordered.
pub(super) async fn wait(orders: &mut watch::Receiver<Orders>, duration: Duration) -> Result<(), End> {
    tokio::select! {
        () = tokio::time::sleep(duration) => Ok(()),
        reason = stop_ordered(orders) => Err(End::Stopped(reason)),
    }
}
