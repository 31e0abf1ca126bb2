//! The sweep of one shard: DB after DB, batch after batch, through whatever trouble its master has.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::engine::batch::{self, StillPass, Way};
use crate::engine::contact::Patience;
use crate::engine::control::{Orders, StopReason, stop_ordered};
use crate::engine::guard::{self, Guard};
use crate::engine::observe::{Observation, Observer};
use crate::engine::pacer::Pacer;
use crate::engine::pause::{Others, wait};
use crate::engine::payload::Payload;
use crate::engine::roster::Roster;
use crate::engine::scout::{Course, Scout, Second, Walk};
use crate::engine::seats::{Line, Seat, Seats};
use crate::engine::throttle;
use crate::engine::touch::Toucher;
use crate::engine::{Outcome, ShardPlan};
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::{Memory, PassFigures, ScanEvent, ScanEventKind, TouchOutcome};
use crate::model::shard::{DbIndex, RunId, ScanPosition, ShardId};
use crate::model::slots::CursorSpace;
use crate::model::task::TaskId;
use crate::model::throttle::Reason;
use crate::node::commands;
use crate::node::conn::{Ask, Conn, Gauge, Reading, ScanBatch};
use crate::node::error::{Class, NodeError};
use crate::node::info::Info;
use crate::node::topology::Master;
use crate::node::wire::Names;
use crate::settings::ScanSettings;
use crate::store::tally::{Tally, TallyDir};

/// Progress is reported this often.
pub(super) const REPORT_EVERY: Duration = Duration::from_millis(100);
/// How often a batch that proved hidden keys is asked again before we say so: a table that was resized in the middle
/// of a SCAN can look like it once, but not again at the same cursor.
const DOUBTS: u32 = 2;
/// Pause between looks at a server that does not delete.
const BLOCKED_EVERY: Duration = Duration::from_millis(250);
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
        Ok(mut scan) => (scan.sweep().await, Some(scan.master), scan.job.shard.passes),
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
    /// Whether cursors follow the rules of a hash table, so that [`batch::hidden`] may judge.
    pub(super) judges: bool,
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

/// One pass over one DB while it runs.
pub(super) struct Pass {
    pub(super) db: DbIndex,
    pub(super) figures: PassFigures,
    /// When it began, or went on.
    pub(super) begun: Instant,
    /// DBSIZE after the last batch.
    pub(super) keys: u64,
    pub(super) guard: Guard,
    /// The walk further on, if there is one.
    pub(super) scout: Option<Scout>,
    /// Keys that were met since the walk began and that live.
    met: u64,
    /// Keys that were looked at and that the ceiling has not let through yet.
    pub(super) unpaid: u64,
    /// From here on deletions were proven to work: where to go back to when they stop.
    proven: ScanPosition,
    doubts: u32,
    /// How far a pass has to come before those doubts are gone: where hidden keys were last proven.
    doubted: ScanPosition,
    pub(super) still: StillPass,
    untouched: bool,
    pub(super) way: Way,
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

    /// Where both walks stand.
    pub(super) fn course(&self) -> Course {
        Course { position: self.figures.position, scout: self.scout }
    }

    /// The walk is at a place that it did not come to batch by batch: keys are spread evenly.
    fn meet_by_share(&mut self) {
        self.met = (self.figures.fraction() * self.keys as f64) as u64;
    }

    /// Back to where deletions were last proven to work.
    pub(super) fn go_back(&mut self) {
        self.figures.position = self.proven;
        self.scout = None;
        self.meet_by_share();
        self.way = Way::default();
        if self.proven == ScanPosition::NotStarted {
            self.still = StillPass::default();
        }
    }
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
        self.put_back_effort().await;
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
            begun: Instant::now(),
            keys: 0,
            scout: None,
            met: 0,
            unpaid: 0,
            guard: Guard::new(None, 0, None),
            tally: self.open_tally(db).await,
        };
        // A pass that goes on from a checkpoint has batches that this `still` has not seen: it proves nothing then.
        if pass.figures.position != ScanPosition::NotStarted {
            pass.still.add(&MOVED);
        }
        self.pacer.reset_slices();
        self.reporter.say(ScanEventKind::PassStarted { db, figures: pass.figures.clone() }).await;
        pass.keys = loop {
            // Alone first: beside a DBSIZE that is refused, a SCAN would free keys that nobody counts.
            let ready = async {
                self.conn.select(db).await?;
                commands::dbsize(&mut self.conn).await
            };
            match ready.await {
                Ok(keys) => break keys,
                Err(error) => self.recover(error, Some(&mut pass)).await?,
            }
        };
        if pass.figures.batches == 0 {
            pass.figures.keys_at_start = pass.keys;
        }
        pass.meet_by_share();
        self.guard_against_harm(&mut pass).await?;
        let ended = loop {
            match self.step(&mut pass).await {
                Ok(()) if pass.figures.position == ScanPosition::Finished => break Ok(()),
                Ok(()) => {}
                Err(end) => break Err(end),
            }
        };
        self.last_words(&mut pass).await;
        self.second = Second::default();
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

    /// A sweep that is slower than keys expire is refused; any other is watched.
    async fn guard_against_harm(&mut self, pass: &mut Pass) -> Result<(), End> {
        let mut flow = self.flow;
        while guard::has_to_know_the_flow(self.redis_version, pass.keys, &self.job.settings) {
            let process = self.process;
            let before = self.info(Some(pass)).await?.parsed::<u64>("expired_keys");
            wait(&mut self.orders, guard::WATCH_FOR).await?;
            let after = self.info(Some(pass)).await?.parsed::<u64>("expired_keys");
            if self.process != process {
                continue;
            }
            let now = guard::flow(before, after);
            if let Some(now) = now
                && let Some(failure) = guard::harm(self.redis_version, pass.keys, now, &self.job.settings)
            {
                if !self.job.settings.allow_slow {
                    return Err(failure.into());
                }
                let message = format!("{} (sweeping all the same, as asked)", failure.message);
                self.reporter.say(ScanEventKind::Warned { message }).await;
            }
            flow = now.or(self.flow);
            break;
        }
        pass.guard = Guard::new(self.redis_version, pass.keys, flow);
        pass.begun = Instant::now();
        Ok(())
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
    pub(super) async fn write_tally(&self, pass: &mut Pass) {
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
        if !self.under_way() {
            self.obey(pass).await?;
            self.look_around(pass).await?;
            self.look(pass).await?;
            self.sit_down().await?;
            self.rest(pass).await?;
        }
        if self.stretches(pass) > 0
            && self.nothing_waits(pass)
            && let Err(error) = self.send_both(pass).await
        {
            return self.lost(error, pass).await;
        }
        let walk = self.next_walk();
        let course = pass.course();
        let ahead = self.conn_of(walk).ahead();
        let from = course.at(walk).unwrap_or(ScanPosition::Finished);
        if ahead.is_some_and(|ask| Some(ask.cursor) != from.to_send()) {
            return self.settle(walk, pass).await.map(|_| ());
        }
        let Some(cursor) = from.to_send() else { return Ok(()) };
        let touch = self.toucher.command();
        let gauge = self.gauge();
        let ask = ahead.unwrap_or_else(|| {
            let nameless = touch.is_none() && self.payload.is_nameless();
            Ask { cursor, count: self.pacer.count(), nameless, gauge }
        });
        let count = ask.count;
        // What is asked of the names of this batch, if it comes with any.
        let touch = touch.filter(|_| !ask.nameless);
        let audit = ask.nameless && self.payload.audit_is_due();
        // A batch without names cannot be touched: one that is to be is not sent ahead.
        let same = !ask.nameless || !(audit || self.toucher.is_near());
        let free = touch.is_none() && same && self.nothing_waits(pass);
        let bits = if free { self.stretches(pass) } else { 0 };
        self.take_turn(walk);
        let conn = self.second.of(walk, &mut self.conn);
        let next = |cursor| {
            let advance = course.advance(&self.space, bits, walk, ScanPosition::from_reply(cursor));
            let cursor = advance.next.filter(|_| free)?.to_send()?;
            Some(Ask { cursor, count: self.pacer.count(), nameless: ask.nameless, gauge })
        };
        let scanned = match conn.scan(ask, touch.is_some().then_some(&mut self.names), next).await {
            Ok(scanned) => scanned,
            Err(error) if ask.nameless && matches!(error.class(), Class::Fatal(FailureKind::Unsupported)) => {
                return self
                    .names_again(pass, format!("the server refuses SCAN with a TYPE that it does not know ({error})"))
                    .await;
            }
            Err(error) => return self.lost(error, pass).await,
        };
        self.patience = None;
        self.account(pass, &scanned, ask);
        let to = ScanPosition::from_reply(scanned.cursor);
        let advance = course.advance(&self.space, bits, walk, to);
        let finished = advance.course.position == ScanPosition::Finished;
        if ask.nameless {
            let proof = if audit {
                let Some(left_dead) = self.audit_payload(walk, from, pass, ask, &scanned).await? else { return Ok(()) };
                Some(left_dead)
            } else {
                None
            };
            if self.payload.learn(scanned.reclaimed(), proof) {
                return self.names_again(pass, "SCAN without names left expired keys in memory".to_owned()).await;
            }
        } else if self.judges {
            let by_batch = batch::hidden(&self.space, from, count, &scanned);
            let hidden = if finished { by_batch.max(pass.still.hidden()) } else { by_batch };
            if hidden > 0 {
                return self.blocked(pass, to, hidden).await;
            }
        }
        // Going back may have led far back: the batches up to the doubtful place prove nothing about it.
        if self.space.rank(to) >= self.space.rank(pass.doubted) || scanned.reclaimed() > 0 {
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
                if !self.touch(walk, pass, command, &scanned).await? {
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
            if !self.settle_both(pass).await? {
                return Ok(());
            }
            if !self.confirm(pass).await? {
                return wait(&mut self.orders, BLOCKED_EVERY).await;
            }
        }
        self.check_way(pass, &scanned)?;
        pass.figures.position = advance.course.position;
        pass.scout = advance.course.scout;
        if let (true, Second::Open(second)) = (advance.swapped, &mut self.second) {
            std::mem::swap(&mut self.conn, &mut **second);
        }
        if scanned.reclaimed() > 0 {
            pass.proven = pass.figures.position;
        }
        self.write_tally(pass).await;
        self.pay(pass).await?;
        if pass.reported.elapsed() >= REPORT_EVERY {
            self.report(pass).await;
        }
        Ok(())
    }

    /// Asks again for a batch that came without names, with them. Returns how many keys the first time had left dead; `None` where
    /// the batch has to be asked again.
    async fn audit_payload(
        &mut self,
        walk: Walk,
        from: ScanPosition,
        pass: &mut Pass,
        ask: Ask,
        first: &ScanBatch,
    ) -> Result<Option<u64>, End> {
        let count = Payload::audit_count(ask.count, first.reclaimed());
        let again = Ask { count, nameless: false, ..ask };
        let scanned = match self.conn_of(walk).scan(again, None, |_| None).await {
            Ok(scanned) => scanned,
            Err(error) => return self.lost(error, pass).await.map(|()| None),
        };
        self.account(pass, &scanned, again);
        // It looked at keys that were counted the first time.
        pass.figures.scanned -= scanned.returned;
        pass.met = pass.met.saturating_sub(scanned.returned);
        let hidden = batch::hidden(&self.space, from, count, &scanned);
        if self.judges && hidden > 0 {
            return self.blocked(pass, ScanPosition::from_reply(scanned.cursor), hidden).await.map(|()| None);
        }
        Ok(Some(scanned.reclaimed()))
    }

    /// SCAN without names does not do here: from now on they come back, and what was swept without them is swept again.
    async fn names_again(&mut self, pass: &mut Pass, why: String) -> Result<(), End> {
        if !self.payload.give_up() {
            // The answer to the other walk has said so.
            return Ok(());
        }
        if pass.figures.nameless > 0 {
            self.done.clear();
            self.redo = Some(why.clone());
            self.begin_again(pass, why).await;
        } else {
            let message = format!("{why}: its names are read");
            self.reporter.say(ScanEventKind::Warned { message }).await;
        }
        Ok(())
    }

    /// Whether the batch after the next may be sent before the next one's sums are done: nothing that comes before a
    /// batch has anything to say.
    fn nothing_waits(&self, pass: &Pass) -> bool {
        let orders = self.orders.borrow();
        let orders_wait = orders.stop.is_some() || orders.hold.is_some() || !self.pacer.runs_free(&orders.tuning);
        let look_waits = self.observer.has_new() || self.others.look_is_due(&orders.tuning);
        !orders_wait && !look_waits && self.hold.is_none() && pass.doubts == 0
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

    pub(super) fn account(&mut self, pass: &mut Pass, scanned: &ScanBatch, ask: Ask) {
        let reclaimed = scanned.reclaimed();
        let figures = &mut pass.figures;
        let seen = if ask.nameless {
            // Keys that live are not in the reply. The keys that were not met yet are spread over the rest of the table, so the
            // share of that rest which was walked tells how many were met now.
            let from = if ask.cursor == 0 { ScanPosition::NotStarted } else { ScanPosition::from_reply(ask.cursor) };
            let (from, to) =
                (figures.space.fraction(from), figures.space.fraction(ScanPosition::from_reply(scanned.cursor)));
            let walked_by_scout =
                pass.scout.map_or(0.0, |scout| figures.space.fraction(scout.at) - figures.space.fraction(scout.from));
            let done = figures.space.fraction(figures.position) + walked_by_scout;
            let to_come = scanned.before.keys.saturating_sub(pass.met);
            let walked = ((to - from) / (1.0 - done).max(f64::EPSILON)).clamp(0.0, 1.0);
            figures.nameless += 1;
            // A batch that tells nothing about the keys that it looked at proves nothing about a whole pass.
            pass.still.add(&MOVED);
            reclaimed.max((walked * to_come as f64).round() as u64)
        } else {
            pass.still.add(scanned);
            scanned.returned + reclaimed
        };
        figures.active += self.pacer.worked(seen.max(1), scanned.waited, scanned.ahead);
        figures.batches += 1;
        figures.scanned += seen;
        figures.reclaimed += reclaimed;
        pass.keys = scanned.after.keys;
        pass.met += seen.saturating_sub(reclaimed);
        // Where it is not known how many were looked at, COUNT is the least.
        pass.unpaid += if ask.nameless { seen.max(u64::from(ask.count)) } else { seen };
    }

    /// Deletions do not work: stand still at the last place where they did, and look again until they do.
    async fn blocked(&mut self, pass: &mut Pass, at: ScanPosition, hidden: u64) -> Result<(), End> {
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

    /// What tells how many keys the next batch frees.
    pub(super) fn gauge(&self) -> Gauge {
        if self.seen.may_evict { Gauge::ExpiredKeys } else { Gauge::Dbsize }
    }

    /// Asks for the keys of a batch. Returns whether the batch is done; if not, the same or an earlier one is next.
    async fn touch(
        &mut self,
        walk: Walk,
        pass: &mut Pass,
        command: &'static str,
        scanned: &ScanBatch,
    ) -> Result<bool, End> {
        let gauge = self.gauge();
        let conn = self.second.of(walk, &mut self.conn);
        let touched = match conn.touch(command, &self.names, gauge).await {
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
        // A long touch is not run back to back: what others did in between is not ours.
        figures.reclaimed += touched.reclaimed().min(left_dead);
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

    pub(super) async fn begin_again(&self, pass: &mut Pass, why: String) {
        pass.begin_again();
        pass.figures.process = self.run_id.as_ref().map(RunId::fingerprint);
        self.write_tally(pass).await;
        let figures = pass.figures.clone();
        self.reporter.say(ScanEventKind::PassRestarted { db: pass.db, why, figures }).await;
    }

    fn fill_in(&self, pass: &mut Pass) {
        let figures = &mut pass.figures;
        figures.slice = self.pacer.slices();
        figures.count = self.pacer.count();
        figures.intensity = self.pacer.intensity();
        figures.server_us_per_scan = self.pacer.server_us_per_scan();
    }

    pub(super) async fn report(&mut self, pass: &mut Pass) {
        self.fill_in(pass);
        pass.reported = Instant::now();
        self.reporter.say(ScanEventKind::Progressed { db: pass.db, figures: pass.figures.clone() }).await;
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

/// A batch that moved DBSIZE: after it a [`StillPass`] proves nothing.
pub(super) const MOVED: ScanBatch = ScanBatch {
    cursor: 0,
    returned: 0,
    before: Reading { keys: 1, expired: None },
    after: Reading { keys: 0, expired: None },
    waited: Duration::ZERO,
    ahead: false,
};
