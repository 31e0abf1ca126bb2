//! The sweep of one shard: DB after DB, batch after batch, through whatever trouble its master has.

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::engine::batch::{self, StillPass};
use crate::engine::control::{Orders, StopReason, stop_ordered};
use crate::engine::observe::{Observation, Observer};
use crate::engine::pacer::Pacer;
use crate::engine::throttle::{self, Decision};
use crate::engine::touch::Toucher;
use crate::engine::{Outcome, ShardPlan};
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::{PassFigures, ScanEvent, ScanEventKind, TouchOutcome};
use crate::model::shard::{DbIndex, RunId, ScanPosition, ShardId};
use crate::model::task::TaskId;
use crate::model::throttle::Reason;
use crate::node::commands;
use crate::node::conn::{Conn, ConnOptions, ScanBatch};
use crate::node::error::{Class, NodeError};
use crate::node::info::Info;
use crate::node::wire::Names;
use crate::settings::ScanSettings;
use crate::store::tally::{Tally, TallyDir};

/// Progress is reported this often.
const REPORT_EVERY: Duration = Duration::from_millis(100);
/// First and longest wait before another attempt.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// The smallest of this many PINGs is the network's share of a round trip.
const PINGS: usize = 20;
/// How often a batch that proved hidden keys is asked again before we say so: a table that was resized in the middle
/// of a SCAN can look like it once, but not again at the same cursor.
const DOUBTS: u32 = 2;
/// Pause between looks at a server that does not delete.
const BLOCKED_EVERY: Duration = Duration::from_millis(250);
/// Lazy frees have settled when nothing is pending and two readings agree; we wait no longer than this.
const SETTLE_WITHIN: Duration = Duration::from_secs(3);
/// Oldest server that is scanned, by the contract's rule.
const OLDEST: (u32, u32) = (4, 0);

/// Why a shard's sweep ends before it is complete.
enum End {
    Stopped(StopReason),
    Failed(Failure),
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
    pub(super) options: ConnOptions,
}

/// Sweeps one shard to its end.
pub(super) async fn run(job: Job, orders: watch::Receiver<Orders>, events: mpsc::Sender<ScanEvent>) -> Outcome {
    let reporter = Reporter { shard: job.shard.id.clone(), events };
    let ended = match ShardScan::connect(job, reporter.clone(), orders).await {
        Ok(mut scan) => scan.sweep().await,
        Err(end) => Err(end),
    };
    match ended {
        Ok(()) => Outcome::Complete,
        Err(End::Stopped(reason)) => Outcome::Stopped(reason),
        Err(End::Failed(failure)) => {
            reporter.say(ScanEventKind::ShardEnded { failure: failure.clone() }).await;
            Outcome::Failed(failure)
        }
    }
}

/// Says what happened. A consumer that is gone has ended the task: nothing is left to tell it.
#[derive(Clone)]
struct Reporter {
    shard: ShardId,
    events: mpsc::Sender<ScanEvent>,
}

impl Reporter {
    async fn say(&self, what: ScanEventKind) {
        let _ = self.events.send(ScanEvent { shard: self.shard.clone(), what }).await;
    }
}

struct ShardScan {
    job: Job,
    reporter: Reporter,
    orders: watch::Receiver<Orders>,
    conn: Conn,
    observer: Observer,
    run_id: Option<RunId>,
    /// Whether cursors follow the rules of one hash table, so that [`batch::hidden`] may judge.
    judges: bool,
    pacer: Pacer,
    toucher: Toucher,
    names: Names,
    hold: Option<(Reason, Instant)>,
}

/// One pass over one DB while it runs.
struct Pass {
    db: DbIndex,
    figures: PassFigures,
    /// From here on deletions were proven to work: where to go back to when they stop.
    proven: ScanPosition,
    doubts: u32,
    still: StillPass,
    untouched: bool,
    reported: Instant,
    tally: Option<Tally>,
}

impl Pass {
    fn begin_again(&mut self) {
        self.figures.restarts += 1;
        self.proven = ScanPosition::NotStarted;
        self.untouched = false;
        self.go_back();
    }

    /// Back to where deletions were last proven to work.
    fn go_back(&mut self) {
        self.figures.position = self.proven;
        if self.proven == ScanPosition::NotStarted {
            self.still = StillPass::default();
        }
    }
}

impl ShardScan {
    async fn connect(job: Job, reporter: Reporter, orders: watch::Receiver<Orders>) -> Result<Self, End> {
        let (conn, info, floor) = Self::first_contact(&job, &reporter, orders.clone()).await?;
        let observation = Observation::from_info(&info);
        let tuning = orders.borrow().tuning;
        Ok(Self {
            conn,
            observer: Observer::start(job.shard.addr.clone(), job.options.clone(), observation.clone()),
            run_id: observation.run_id,
            judges: info.mode() == Some("standalone"),
            pacer: Pacer::new(job.settings.count, job.settings.max_slice, tuning, floor),
            toucher: Toucher::new(job.settings.touch, info.redis_version()),
            names: Names::default(),
            hold: None,
            job,
            reporter,
            orders,
        })
    }

    /// Connects once, without retrying: a server that is not there when the sweep begins is the operator's to mend.
    /// One that is loading is waited for.
    async fn first_contact(
        job: &Job,
        reporter: &Reporter,
        mut orders: watch::Receiver<Orders>,
    ) -> Result<(Conn, Info, Duration), End> {
        let mut waited: Option<Instant> = None;
        loop {
            let contact = async {
                let mut conn = Conn::open(&job.shard.addr, &job.options).await?;
                let info = commands::info(&mut conn).await?;
                Ok::<_, NodeError>((conn, info))
            };
            let contact = tokio::select! {
                contact = contact => contact,
                reason = stop_ordered(&mut orders) => return Err(End::Stopped(reason)),
            };
            let reason = match contact {
                Ok((_, info)) if info.flag("loading") == Some(true) => Reason::Loading,
                Ok((mut conn, info)) => {
                    may_be_swept(&info)?;
                    let floor = smallest_ping(&mut conn).await.map_err(|e| e.into_failure())?;
                    if let Some(since) = waited {
                        let ended = ScanEventKind::HoldEnded { reason: Reason::Loading, lasted: since.elapsed() };
                        reporter.say(ended).await;
                    }
                    return Ok((conn, info, floor));
                }
                Err(error) => match error.class() {
                    Class::Loading => Reason::Loading,
                    Class::Busy => Reason::Busy,
                    Class::Transient | Class::Fatal(_) => return Err(error.into_failure().into()),
                },
            };
            if waited.is_none() {
                waited = Some(Instant::now());
                reporter.say(ScanEventKind::HoldStarted { reason, detail: None }).await;
            }
            wait(&mut orders, BACKOFF.1).await?;
        }
    }

    async fn sweep(&mut self) -> Result<(), End> {
        let info = loop {
            match commands::info(&mut self.conn).await {
                Ok(info) => break info,
                Err(error) => self.recover(error, None).await?,
            }
        };
        let server = info.server(self.conn.addr()).ok_or_else(|| {
            Failure::new(FailureKind::Unsupported, "INFO names neither a redis_version nor a valkey_version")
        })?;
        let dbs = self.choose_dbs(&info);
        let used_memory = info.parsed("used_memory");
        self.reporter.say(ScanEventKind::ShardStarted { server, used_memory, dbs: dbs.clone() }).await;
        self.reporter.say(ScanEventKind::TouchDecided { outcome: self.toucher.outcome() }).await;
        self.check_checkpoint().await;
        for db in dbs {
            self.sweep_db(db).await?;
        }
        let used_memory = self.settled_memory().await;
        self.reporter.say(ScanEventKind::ShardFinished { used_memory }).await;
        Ok(())
    }

    /// A cursor of the checkpoint is worth nothing to another process.
    async fn check_checkpoint(&mut self) {
        if self.job.shard.run_id == self.run_id {
            return;
        }
        let mut lost = false;
        for figures in self.job.shard.passes.values_mut() {
            if matches!(figures.position, ScanPosition::At(_)) {
                figures.position = ScanPosition::NotStarted;
                figures.restarts += 1;
                lost = true;
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
        let figures = self.job.shard.passes.remove(&db).unwrap_or_default();
        if figures.position == ScanPosition::Finished {
            self.reporter.say(ScanEventKind::PassFinished { db, figures }).await;
            return Ok(());
        }
        let mut pass = Pass {
            db,
            proven: figures.position,
            figures,
            doubts: 0,
            still: StillPass::default(),
            untouched: false,
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
        self.obey(pass).await?;
        self.look(pass).await?;
        self.rest(pass).await?;
        let from = pass.figures.position;
        let Some(cursor) = from.to_send() else { return Ok(()) };
        let count = self.pacer.count();
        let touch = self.toucher.command();
        let names = touch.is_some().then_some(&mut self.names);
        let scanned = match self.conn.scan(cursor, count, names).await {
            Ok(scanned) => scanned,
            Err(error) => {
                if !matches!(error, NodeError::Server { .. }) {
                    pass.figures.lost_replies += 1;
                }
                return self.recover(error, Some(pass)).await;
            }
        };
        self.account(pass, &scanned);
        if self.judges {
            let hidden = batch::hidden(from, count, &scanned);
            if hidden > 0 {
                return self.blocked(pass, hidden).await;
            }
        }
        pass.figures.position = ScanPosition::from_reply(scanned.cursor);
        self.write_tally(pass).await;
        if scanned.reclaimed() > 0 {
            pass.proven = pass.figures.position;
        }
        if pass.figures.position == ScanPosition::Finished && self.judges && pass.still.hidden() > 0 {
            // Nothing was reclaimed in a still pass, so `proven` is its beginning.
            return self.blocked(pass, pass.still.hidden()).await;
        }
        pass.doubts = 0;
        self.end_hold(Some(pass)).await;
        match touch.filter(|_| !self.names.is_empty()) {
            Some(command) => self.touch(pass, from, command, &scanned).await?,
            None => {
                pass.untouched |= scanned.returned > 0;
                let outcome = self.toucher.passed(scanned.reclaimed());
                self.say_touch(outcome).await;
            }
        }
        self.pay(pass, &scanned).await?;
        if pass.figures.position == ScanPosition::Finished {
            self.confirm_master(pass).await?;
        }
        if pass.reported.elapsed() >= REPORT_EVERY {
            self.report(pass).await;
        }
        Ok(())
    }

    fn account(&mut self, pass: &mut Pass, scanned: &ScanBatch) {
        let seen = scanned.returned + scanned.reclaimed();
        let figures = &mut pass.figures;
        figures.active += self.pacer.worked(seen, scanned.round_trip);
        figures.batches += 1;
        figures.scanned += seen;
        figures.reclaimed += scanned.reclaimed();
        pass.still.add(scanned);
    }

    /// Deletions do not work: stand still at the last place where they did, and look again until they do.
    async fn blocked(&mut self, pass: &mut Pass, hidden: u64) -> Result<(), End> {
        pass.go_back();
        pass.doubts += 1;
        if pass.doubts > DOUBTS {
            let detail = format!("at least {hidden} expired keys were hidden and not freed by one batch");
            self.begin_hold(Some(pass), Reason::DeletionBlocked, Some(detail)).await;
            self.report(pass).await;
        }
        wait(&mut self.orders, BLOCKED_EVERY).await
    }

    async fn touch(
        &mut self,
        pass: &mut Pass,
        from: ScanPosition,
        command: &'static str,
        scanned: &ScanBatch,
    ) -> Result<(), End> {
        let touched = match self.conn.touch(command, &self.names).await {
            Ok(touched) => touched,
            Err(error) if error.is_no_permission() => match self.toucher.refused() {
                Some(outcome) => {
                    self.say_touch(Some(outcome)).await;
                    return Ok(());
                }
                None => return Err(error.into_failure().into()),
            },
            Err(error) => {
                // The keys of this batch were not all asked for: the same batch once more.
                pass.figures.position = from;
                pass.figures.lost_replies += u64::from(!matches!(error, NodeError::Server { .. }));
                return self.recover(error, Some(pass)).await;
            }
        };
        let gone = if command == "TTL" { -2 } else { 0 };
        let left_dead = touched.answers.iter().filter(|&&answer| answer == gone).count() as u64;
        let figures = &mut pass.figures;
        figures.active += self.pacer.worked(0, touched.round_trip);
        figures.touched += touched.answers.len() as u64;
        figures.found_by_touch += left_dead;
        figures.reclaimed += touched.keys_before.saturating_sub(touched.keys_after);
        if command == "TTL" {
            touched.answers.iter().for_each(|&ttl| figures.ttl.add(ttl));
        }
        self.write_tally(pass).await;
        let outcome = self.toucher.touched(scanned.reclaimed(), left_dead);
        self.say_touch(outcome).await;
        if outcome == Some(TouchOutcome::ScanLeavesDead) && pass.untouched {
            let why = "SCAN left expired keys in memory, and earlier batches were not touched".to_owned();
            self.begin_again(pass, why).await;
        }
        Ok(())
    }

    async fn say_touch(&self, outcome: Option<TouchOutcome>) {
        if let Some(outcome) = outcome {
            self.reporter.say(ScanEventKind::TouchDecided { outcome }).await;
        }
    }

    /// Takes new orders in. Holds while paused.
    async fn obey(&mut self, pass: &mut Pass) -> Result<(), End> {
        loop {
            let orders = *self.orders.borrow_and_update();
            stop_of(&orders)?;
            self.pacer.tune(orders.tuning);
            if !orders.paused {
                if self.hold.is_some_and(|(reason, _)| reason == Reason::Paused) {
                    self.end_hold(Some(pass)).await;
                }
                return Ok(());
            }
            self.begin_hold(Some(pass), Reason::Paused, None).await;
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
                Decision::Abort(failure) => return Err(failure.into()),
                Decision::Hold(reason) => {
                    // What was swept since the last proof may have been swept under the same condition.
                    pass.go_back();
                    self.begin_hold(Some(pass), reason, None).await;
                }
            }
            observation = tokio::select! {
                next = self.observer.next() => next,
                reason = stop_ordered(&mut self.orders) => return Err(End::Stopped(reason)),
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

    /// A pass is complete only where its server was a master to the end.
    async fn confirm_master(&mut self, pass: &mut Pass) -> Result<(), End> {
        match commands::info(&mut self.conn).await {
            Ok(info) => may_be_swept(&info).map_err(End::from),
            // Coming back checks the role as well.
            Err(error) => self.recover(error, Some(pass)).await,
        }
    }

    /// Brings the connection back after `error`, or ends the sweep where that cannot help. Afterwards the position is
    /// the last one where the process is the same, else the beginning.
    async fn recover(&mut self, error: NodeError, mut pass: Option<&mut Pass>) -> Result<(), End> {
        let mut error = error;
        let mut lost_at = Instant::now();
        let mut backoff = BACKOFF.0;
        loop {
            let reason = match error.class() {
                Class::Fatal(_) => return Err(error.into_failure().into()),
                Class::Transient => Reason::Reconnecting,
                Class::Loading => Reason::Loading,
                Class::Busy => Reason::Busy,
            };
            if reason != Reason::Reconnecting {
                // It answers: only the task's own time limits how long it may stay so.
                lost_at = Instant::now();
            }
            if lost_at.elapsed() >= self.job.settings.retry_for {
                let mut failure = error.into_failure();
                failure.message = format!("{} (tried again for {:?})", failure.message, self.job.settings.retry_for);
                return Err(failure.into());
            }
            self.begin_hold(pass.as_deref_mut(), reason, Some(error.to_string())).await;
            wait(&mut self.orders, backoff).await?;
            backoff = (backoff * 2).min(BACKOFF.1);
            error = match self.reconnect(pass.as_deref_mut()).await {
                Ok(()) => return Ok(()),
                Err(Retry::Again(error)) => error,
                Err(Retry::End(end)) => return Err(end),
            };
        }
    }

    async fn reconnect(&mut self, mut pass: Option<&mut Pass>) -> Result<(), Retry> {
        let contact = async {
            let mut conn = Conn::open(&self.job.shard.addr, &self.job.options).await?;
            let info = commands::info(&mut conn).await?;
            if info.flag("loading") == Some(true) {
                return Err(loading(&conn));
            }
            let floor = smallest_ping(&mut conn).await?;
            if let Some(pass) = &pass {
                conn.select(pass.db).await?;
            }
            Ok::<_, NodeError>((conn, info, floor))
        };
        let mut orders = self.orders.clone();
        let (conn, info, floor) = tokio::select! {
            contact = contact => contact.map_err(Retry::Again)?,
            reason = stop_ordered(&mut orders) => return Err(Retry::End(End::Stopped(reason))),
        };
        may_be_swept(&info).map_err(|failure| Retry::End(failure.into()))?;
        self.conn = conn;
        self.pacer.set_floor(floor);
        let run_id = Observation::from_info(&info).run_id;
        self.end_hold(pass.as_deref_mut()).await;
        if run_id != self.run_id {
            self.run_id = run_id;
            if let Some(pass) = pass
                && pass.figures.position != ScanPosition::NotStarted
            {
                self.begin_again(pass, "the server was restarted".to_owned()).await;
            }
            if let Some(server) = info.server(self.conn.addr()) {
                self.reporter.say(ScanEventKind::ServerChanged { server }).await;
            }
        }
        Ok(())
    }

    async fn begin_again(&self, pass: &mut Pass, why: String) {
        pass.begin_again();
        self.write_tally(pass).await;
        let figures = pass.figures.clone();
        self.reporter.say(ScanEventKind::PassRestarted { db: pass.db, why, figures }).await;
    }

    async fn begin_hold(&mut self, pass: Option<&mut Pass>, reason: Reason, detail: Option<String>) {
        if self.hold.is_some_and(|(current, _)| current == reason) {
            return;
        }
        self.end_hold(pass).await;
        self.hold = Some((reason, Instant::now()));
        self.reporter.say(ScanEventKind::HoldStarted { reason, detail }).await;
    }

    async fn end_hold(&mut self, pass: Option<&mut Pass>) {
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

enum Retry {
    Again(NodeError),
    End(End),
}

/// A batch that moved DBSIZE: after it a [`StillPass`] proves nothing.
const MOVED: ScanBatch =
    ScanBatch { cursor: 0, returned: 0, keys_before: 1, keys_after: 0, round_trip: Duration::ZERO };

fn loading(conn: &Conn) -> NodeError {
    NodeError::Server {
        addr: conn.addr().clone(),
        command: "SCAN",
        code: "LOADING".to_owned(),
        message: "the server is loading its data set".to_owned(),
    }
}

fn may_be_swept(info: &Info) -> Result<(), Failure> {
    match info.redis_version() {
        None => {
            let failure =
                Failure::new(FailureKind::Unsupported, "INFO names no redis_version: this is no Redis or Valkey");
            return Err(failure.hint("check the port"));
        }
        Some(version) if version < OLDEST => {
            let (major, minor) = version;
            let message = format!("Redis {major}.{minor} cannot be swept; 4.0 is the oldest (DCS.4818)");
            return Err(Failure::new(FailureKind::Unsupported, message).hint("upgrade the server"));
        }
        Some(_) => {}
    }
    if info.mode() == Some("sentinel") {
        let failure = Failure::new(FailureKind::Unsupported, "this is a sentinel; it holds no keys");
        return Err(failure.hint("give the URL of the master that it watches"));
    }
    match info.is_master() {
        Some(false) => Err(throttle::not_a_master(info.master_addr().as_deref())),
        Some(true) | None => Ok(()),
    }
}

async fn smallest_ping(conn: &mut Conn) -> Result<Duration, NodeError> {
    let mut smallest = Duration::MAX;
    for _ in 0..PINGS {
        let begun = std::time::Instant::now();
        commands::ping(conn).await?;
        smallest = smallest.min(begun.elapsed());
    }
    Ok(smallest)
}

fn stop_of(orders: &Orders) -> Result<(), End> {
    orders.stop.map_or(Ok(()), |reason| Err(End::Stopped(reason)))
}

/// Sleeps, unless a stop is ordered.
async fn wait(orders: &mut watch::Receiver<Orders>, duration: Duration) -> Result<(), End> {
    tokio::select! {
        () = tokio::time::sleep(duration) => Ok(()),
        reason = stop_ordered(orders) => Err(End::Stopped(reason)),
    }
}
