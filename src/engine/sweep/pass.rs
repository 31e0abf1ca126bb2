//! The sweep of one DB: its state, and how it begins, goes back and ends.

use std::time::Duration;

use tokio::time::Instant;

use crate::engine::policy::cursor_loop::CursorLoop;
use crate::engine::policy::expiry_guard::{self, ExpiryGuard};
use crate::engine::policy::hidden_keys::StillPass;
use crate::engine::policy::ledger::Doing;
use crate::engine::policy::segments::{self, Segments};
use crate::engine::sweep::pipeline::Pipeline;
use crate::engine::sweep::shard::{End, ShardSweep};
use crate::model::progress::{PassFigures, PassGauges, ScanEventKind};
use crate::model::shard::{DbIndex, ScanPosition};
use crate::model::slots::CursorSpace;
use crate::node::commands;
use crate::store::journal::Journal;

/// Progress is reported at most this often.
pub(super) const REPORT_EVERY: Duration = Duration::from_millis(100);

/// One pass over one DB while it runs.
pub(super) struct Pass {
    pub(super) db: DbIndex,
    pub(super) figures: PassFigures,
    pub(super) segments: Segments,
    pub(super) pipeline: Pipeline,
    /// When the pass began, or went on after a checkpoint.
    pub(super) begun: Instant,
    /// DBSIZE after the last batch.
    pub(super) keys: u64,
    pub(super) guard: ExpiryGuard,
    /// Live keys that were met.
    pub(super) met: u64,
    /// Share of the cursor space that was walked, from 0 to 1.
    pub(super) walked: f64,
    /// The last position at which deletions were proven to work: the pass goes back to it when they stop.
    pub(super) proven: ScanPosition,
    /// Keys that had been reclaimed when `proven` was set.
    pub(super) reclaimed_at_proof: u64,
    /// How often hidden keys were proven since the last batch that showed deletions at work.
    pub(super) suspicions: u32,
    /// Where hidden keys were last proven: a batch beyond it without hidden keys ends the suspicion.
    pub(super) suspected_at: ScanPosition,
    pub(super) still: StillPass,
    /// Whether keys were returned that were not touched.
    pub(super) untouched: bool,
    pub(super) cursors: CursorLoop,
    /// When progress was last reported.
    pub(super) reported: Instant,
    /// The batch journal; `None`: there is no state file, or the journal could not be written.
    pub(super) journal: Option<Journal>,
}

impl Pass {
    /// Forgets the workers: the pass goes on at its position.
    pub(super) fn forget_workers(&mut self) {
        self.go_on_at(self.figures.checkpoint.position);
        self.cursors.walks_again();
    }

    /// Goes back to where deletions were last proven to work.
    pub(super) fn go_back(&mut self) {
        self.go_on_at(self.proven);
        self.reclaimed_at_proof = self.figures.counters.reclaimed;
        self.cursors = CursorLoop::default();
        self.still = StillPass::default();
        if self.proven != ScanPosition::NotStarted || self.segments.is_cut() {
            self.still.proves_nothing();
        }
    }

    fn go_on_at(&mut self, position: ScanPosition) {
        self.figures.checkpoint.position = position;
        self.segments.go_on_at(position);
        self.pipeline.forget();
        // The pass did not come here batch by batch: the estimate assumes that keys are spread evenly.
        self.walked = self.figures.checkpoint.fraction();
        self.met = (self.walked * self.keys as f64) as u64;
    }
}

impl ShardSweep {
    pub(super) async fn sweep_db(&mut self, db: DbIndex) -> Result<(), End> {
        let mut figures = self.job.shard.passes.remove(&db).unwrap_or_default();
        // The position may come from another server process than the one that answers now.
        let was_begun = figures.checkpoint.position != ScanPosition::NotStarted;
        let position = match self.session.position_of(&figures.checkpoint) {
            ScanPosition::Finished => ScanPosition::NotStarted,
            position => position,
        };
        figures.checkpoint.space = self.session.space.clone();
        figures.checkpoint.process = self.session.fingerprint();
        figures.checkpoint.position = position;
        if was_begun && position == ScanPosition::NotStarted {
            figures.counters.restarts += 1;
            let why = self.session.restart_reason.clone().or_else(|| self.job.shard.restart_reason.clone());
            let why = why.unwrap_or_else(|| "another server process answers".to_owned());
            self.reporter.say(ScanEventKind::PassRestarted { db, why, figures: figures.clone() }).await;
        }
        let mut pass = Pass {
            db,
            proven: position,
            reclaimed_at_proof: figures.counters.reclaimed,
            untouched: position != ScanPosition::NotStarted,
            figures,
            segments: Segments::new(CursorSpace::default(), 0, position),
            pipeline: Pipeline::new(self.pacer.intensity()),
            suspicions: 0,
            suspected_at: ScanPosition::NotStarted,
            still: StillPass::default(),
            cursors: CursorLoop::default(),
            reported: Instant::now(),
            begun: Instant::now(),
            keys: 0,
            met: 0,
            walked: 0.0,
            guard: ExpiryGuard::new(false, 0, None),
            journal: self.open_journal(db).await,
        };
        // The laps of a keep run are reported as one pass.
        let is_lap = self.keep.as_mut().is_some_and(|keep| !keep.begins(db));
        if !is_lap {
            self.pacer.reset_slices();
            self.reporter.say(ScanEventKind::PassStarted { db, figures: pass.figures.clone() }).await;
        }
        let ended = self.begin_and_walk(&mut pass).await;
        self.drain(&mut pass).await;
        pass.pipeline.forget();
        self.session.conns.truncate(1);
        self.end_hold().await;
        self.update_figures(&mut pass);
        let figures = pass.figures;
        self.job.shard.passes.insert(db, figures.clone());
        match ended {
            Ok(()) if self.keep.is_none() => self.reporter.say(ScanEventKind::PassFinished { db, figures }).await,
            _ => self.reporter.say(ScanEventKind::Progressed { db, figures }).await,
        }
        ended
    }

    async fn begin_and_walk(&mut self, pass: &mut Pass) -> Result<(), End> {
        pass.keys = loop {
            // DBSIZE alone first: in a batch whose DBSIZE is refused, SCAN would reclaim keys that are not counted.
            let ready = async {
                self.session.conn().select(pass.db).await?;
                commands::dbsize(self.session.conn()).await
            };
            match ready.await {
                Ok(keys) => break keys,
                Err(error) => self.recover(error, Some(pass)).await?,
            }
        };
        if pass.figures.counters.batches == 0 || self.keep.is_some() {
            pass.figures.checkpoint.keys_at_start = pass.keys;
        }
        self.cut(pass, pass.figures.checkpoint.position);
        self.guard_against_harm(pass).await?;
        self.walk(pass).await
    }

    /// Cuts the pass into segments from `position` on, if the cursors of this server process allow that.
    pub(super) fn cut(&self, pass: &mut Pass, position: ScanPosition) {
        // Segments need ordered cursors, and save no round trip if every batch is followed by a touch.
        let whole = !self.session.ordered || self.session.touch.touches_all();
        let bits = if whole { 0 } else { segments::bits_of(pass.keys) };
        pass.segments = Segments::new(self.session.space.clone(), bits, position);
        if bits > 0 || position != ScanPosition::NotStarted {
            // Segments overlap, and a pass that goes on did not see its earlier batches.
            pass.still.proves_nothing();
        }
        pass.walked = pass.figures.checkpoint.fraction();
        pass.met = (pass.walked * pass.keys as f64) as u64;
    }

    /// Refuses a sweep that is slower than keys expire, and starts the guard that watches any other.
    async fn guard_against_harm(&mut self, pass: &mut Pass) -> Result<(), End> {
        let settings = self.job.settings.clone();
        let mut rate = self.session.expired_per_sec;
        loop {
            let starves = self.starves_expiry();
            if !expiry_guard::has_to_know_the_flow(starves, pass.keys, &settings) {
                break;
            }
            let session = self.session.number;
            let before = self.info_in(pass).await?.parsed::<u64>("expired_keys");
            self.ledger.turn_to(Doing::Resting);
            let waited = self.wait(expiry_guard::WATCH_FOR).await;
            self.ledger.turn_to(Doing::Exchanging);
            waited?;
            let after = self.info_in(pass).await?.parsed::<u64>("expired_keys");
            if self.session.number != session {
                continue;
            }
            let now = expiry_guard::flow(before, after);
            if let Some(now) = now
                && let Some(failure) = expiry_guard::harm(starves, pass.keys, now, &settings)
            {
                if !settings.allow_slow {
                    return Err(failure.into());
                }
                self.reporter.warn(format!("{} (going on, since allow-slow is set)", failure.message)).await;
            }
            rate = now.or(self.session.expired_per_sec);
            break;
        }
        pass.guard = ExpiryGuard::new(self.starves_expiry(), pass.keys, rate);
        pass.begun = Instant::now();
        Ok(())
    }

    /// Whether a sweep that is too slow leaves more expired keys than none. A keep run reclaims what active expiry leaves.
    fn starves_expiry(&self) -> bool {
        self.session.profile.slow_scan_starves_expiry && self.keep.is_none()
    }

    async fn open_journal(&self, db: DbIndex) -> Option<Journal> {
        let journals = self.job.journals.as_ref()?;
        match journals.open(self.job.task, &self.job.shard.id, db) {
            Ok(journal) => Some(journal),
            Err(error) => {
                self.warn_of_journal(&error).await;
                None
            }
        }
    }

    /// Writes the counts to the batch journal, where they survive a kill.
    pub(super) async fn write_journal(&self, pass: &mut Pass) {
        if let Some(journal) = &pass.journal
            && let Err(error) = journal.write(&pass.figures)
        {
            pass.journal = None;
            self.warn_of_journal(&error).await;
        }
    }

    async fn warn_of_journal(&self, error: &std::io::Error) {
        let message = format!(
            "the per-batch count cannot be kept beside the state file ({error}): a kill now may lose the count of the \
             last second; free some disk space"
        );
        self.reporter.warn(message).await;
    }

    /// Begins the pass again: what it has swept proves nothing.
    pub(super) async fn begin_again(&self, pass: &mut Pass, why: String) {
        pass.figures.counters.restarts += 1;
        pass.figures.checkpoint.process = self.session.fingerprint();
        pass.proven = ScanPosition::NotStarted;
        pass.untouched = false;
        pass.suspected_at = ScanPosition::NotStarted;
        pass.go_back();
        self.cut(pass, ScanPosition::NotStarted);
        self.write_journal(pass).await;
        let figures = pass.figures.clone();
        self.reporter.say(ScanEventKind::PassRestarted { db: pass.db, why, figures }).await;
    }

    /// Brings the figures of the pass up to date.
    fn update_figures(&mut self, pass: &mut Pass) {
        let figures = &mut pass.figures;
        self.ledger.settle(&mut figures.counters);
        figures.checkpoint.server_expired = self.session.seen.expired_keys;
        figures.gauges = PassGauges {
            under_way: figures.gauges.under_way,
            slice: self.pacer.slices(),
            count: self.pacer.count(),
            intensity: self.pacer.intensity(),
            server_us_per_scan: self.pacer.server_us_per_scan(),
        };
    }

    pub(super) async fn report(&mut self, pass: &mut Pass) {
        self.update_figures(pass);
        pass.reported = Instant::now();
        self.reporter.say(ScanEventKind::Progressed { db: pass.db, figures: pass.figures.clone() }).await;
        if let Some(keep) = &self.keep {
            self.reporter.say(ScanEventKind::Kept { figures: keep.pace.figures() }).await;
        }
    }
}
