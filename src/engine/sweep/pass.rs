//! The sweep of one DB: what is known of it while it runs, and how it begins, goes back and ends.

use std::time::Duration;

use tokio::time::Instant;

use crate::engine::policy::cursor_loop::CursorLoop;
use crate::engine::policy::expiry_guard::{self, ExpiryGuard};
use crate::engine::policy::hidden_keys::StillPass;
use crate::engine::policy::ledger::Doing;
use crate::engine::policy::segments::{self, Segments};
use crate::engine::sweep::pipeline::Pipeline;
use crate::engine::sweep::shard::{End, ShardSweep};
use crate::model::progress::{PassFigures, ScanEventKind};
use crate::model::shard::{DbIndex, ScanPosition};
use crate::model::slots::CursorSpace;
use crate::node::commands;
use crate::store::journal::Journal;

/// Progress is reported this often.
pub(super) const REPORT_EVERY: Duration = Duration::from_millis(100);

/// One pass over one DB while it runs.
pub(super) struct Pass {
    pub(super) db: DbIndex,
    pub(super) figures: PassFigures,
    pub(super) segments: Segments,
    pub(super) pipeline: Pipeline,
    /// When it began, or went on.
    pub(super) begun: Instant,
    /// DBSIZE after the last batch.
    pub(super) keys: u64,
    pub(super) guard: ExpiryGuard,
    /// Keys that were met and that live.
    pub(super) met: u64,
    /// Share of the cursor space that was walked.
    pub(super) walked: f64,
    /// From here on deletions were proven to work: where to go back to when they stop.
    pub(super) proven: ScanPosition,
    /// Keys that had been freed then.
    pub(super) freed_at_proof: u64,
    /// How often hidden keys were proven since a batch without any.
    pub(super) doubts: u32,
    /// How far the pass has to come before those doubts are gone: where hidden keys were last proven.
    pub(super) doubted: ScanPosition,
    pub(super) still: StillPass,
    /// Whether keys were returned that were not touched.
    pub(super) untouched: bool,
    pub(super) cursors: CursorLoop,
    pub(super) reported: Instant,
    pub(super) journal: Option<Journal>,
}

impl Pass {
    /// The workers are forgotten, and the pass goes on at its position.
    pub(super) fn forget_workers(&mut self) {
        self.go_on_at(self.figures.position);
        self.cursors.walks_again();
    }

    /// Back to where deletions were last proven to work.
    pub(super) fn go_back(&mut self) {
        self.go_on_at(self.proven);
        self.freed_at_proof = self.figures.reclaimed;
        self.cursors = CursorLoop::default();
        self.still = StillPass::default();
        if self.proven != ScanPosition::NotStarted || self.segments.is_cut() {
            self.still.proves_nothing();
        }
    }

    fn go_on_at(&mut self, position: ScanPosition) {
        self.figures.position = position;
        self.segments.go_on_at(position);
        self.pipeline.forget();
        // It did not come here batch by batch: keys are spread evenly.
        self.walked = self.figures.fraction();
        self.met = (self.walked * self.keys as f64) as u64;
    }
}

impl ShardSweep {
    pub(super) async fn sweep_db(&mut self, db: DbIndex) -> Result<(), End> {
        let mut figures = self.job.shard.passes.remove(&db).unwrap_or_default();
        // The checkpoint was of the process that we met first, and another one may answer by now.
        let was_begun = figures.position != ScanPosition::NotStarted;
        let position = match self.session.position_of(&figures) {
            ScanPosition::Finished => ScanPosition::NotStarted,
            position => position,
        };
        figures.space = self.session.space.clone();
        figures.process = self.session.fingerprint();
        figures.position = position;
        if was_begun && position == ScanPosition::NotStarted {
            figures.restarts += 1;
            let why = self.session.again.clone().or_else(|| self.job.shard.again.clone());
            let why = why.unwrap_or_else(|| "another server process answers".to_owned());
            self.reporter.say(ScanEventKind::PassRestarted { db, why, figures: figures.clone() }).await;
        }
        let mut pass = Pass {
            db,
            proven: position,
            freed_at_proof: figures.reclaimed,
            untouched: position != ScanPosition::NotStarted,
            figures,
            segments: Segments::new(CursorSpace::default(), 0, position),
            pipeline: Pipeline::new(self.pacer.intensity()),
            doubts: 0,
            doubted: ScanPosition::NotStarted,
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
        // To people the laps of a keep run are one pass.
        let is_lap = self.keep.as_mut().is_some_and(|keep| !keep.begins(db));
        if !is_lap {
            self.pacer.reset_slices();
            self.reporter.say(ScanEventKind::PassStarted { db, figures: pass.figures.clone() }).await;
        }
        let ended = self.begin_and_walk(&mut pass).await;
        self.last_words(&mut pass).await;
        pass.pipeline.forget();
        self.session.conns.truncate(1);
        self.end_hold().await;
        self.fill_in(&mut pass);
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
            // Alone first: beside a DBSIZE that is refused, a SCAN would free keys that nobody counts.
            let ready = async {
                self.session.conn().select(pass.db).await?;
                commands::dbsize(self.session.conn()).await
            };
            match ready.await {
                Ok(keys) => break keys,
                Err(error) => self.recover(error, Some(pass)).await?,
            }
        };
        if pass.figures.batches == 0 || self.keep.is_some() {
            pass.figures.keys_at_start = pass.keys;
        }
        self.cut(pass, pass.figures.position);
        self.guard_against_harm(pass).await?;
        self.walk(pass).await
    }

    /// Cuts the pass into segments, as finely as this process allows, from `position` on.
    pub(super) fn cut(&self, pass: &mut Pass, position: ScanPosition) {
        // Cursors without order cannot be told apart; a touch after each batch is a round trip that no segment saves.
        let whole = !self.session.ordered || self.session.touch.touches_all();
        let bits = if whole { 0 } else { segments::bits_of(pass.keys) };
        pass.segments = Segments::new(self.session.space.clone(), bits, position);
        if bits > 0 || position != ScanPosition::NotStarted {
            // Segments overlap, and a pass that goes on has batches that this one has not seen.
            pass.still.proves_nothing();
        }
        pass.walked = pass.figures.fraction();
        pass.met = (pass.walked * pass.keys as f64) as u64;
    }

    /// A sweep that is slower than keys expire is refused; any other is watched.
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
                self.reporter.warn(format!("{} (sweeping all the same, as asked)", failure.message)).await;
            }
            rate = now.or(self.session.expired_per_sec);
            break;
        }
        pass.guard = ExpiryGuard::new(self.starves_expiry(), pass.keys, rate);
        pass.begun = Instant::now();
        Ok(())
    }

    /// Whether a sweep that is too slow leaves more expired keys than none. A keep run reclaims what the server's own expiry leaves.
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

    /// Writes the counts down where a kill cannot reach them.
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

    /// What the pass has swept is worth nothing: it begins again.
    pub(super) async fn begin_again(&self, pass: &mut Pass, why: String) {
        pass.figures.restarts += 1;
        pass.figures.process = self.session.fingerprint();
        pass.proven = ScanPosition::NotStarted;
        pass.untouched = false;
        pass.doubted = ScanPosition::NotStarted;
        pass.go_back();
        self.cut(pass, ScanPosition::NotStarted);
        self.write_journal(pass).await;
        let figures = pass.figures.clone();
        self.reporter.say(ScanEventKind::PassRestarted { db: pass.db, why, figures }).await;
    }

    fn fill_in(&mut self, pass: &mut Pass) {
        let figures = &mut pass.figures;
        self.ledger.settle(figures);
        figures.slice = self.pacer.slices();
        figures.count = self.pacer.count();
        figures.intensity = self.pacer.intensity();
        figures.server_us_per_scan = self.pacer.server_us_per_scan();
        figures.server_expired = self.session.seen.expired_keys;
    }

    pub(super) async fn report(&mut self, pass: &mut Pass) {
        self.fill_in(pass);
        pass.reported = Instant::now();
        self.reporter.say(ScanEventKind::Progressed { db: pass.db, figures: pass.figures.clone() }).await;
        if let Some(keep) = &self.keep {
            self.reporter.say(ScanEventKind::Kept { figures: keep.pace.figures() }).await;
        }
    }
}
