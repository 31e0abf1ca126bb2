//! The sweep of one DB: what is known of it while it runs, and how it begins, goes back and ends.

use std::time::Duration;

use tokio::time::Instant;

use crate::engine::batch::{StillPass, Way};
use crate::engine::guard::{self, Guard};
use crate::engine::pause::wait;
use crate::engine::scout::{Course, Scout, Second};
use crate::engine::shard_scan::{End, ShardScan};
use crate::model::progress::{PassFigures, ScanEventKind};
use crate::model::shard::{DbIndex, RunId, ScanPosition};
use crate::node::commands;
use crate::store::tally::Tally;

/// Progress is reported this often.
pub(super) const REPORT_EVERY: Duration = Duration::from_millis(100);

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
    pub(super) met: u64,
    /// Keys that were looked at and that the ceiling has not let through yet.
    pub(super) unpaid: u64,
    /// From here on deletions were proven to work: where to go back to when they stop.
    pub(super) proven: ScanPosition,
    pub(super) doubts: u32,
    /// How far a pass has to come before those doubts are gone: where hidden keys were last proven.
    pub(super) doubted: ScanPosition,
    pub(super) still: StillPass,
    pub(super) untouched: bool,
    pub(super) way: Way,
    pub(super) reported: Instant,
    pub(super) tally: Option<Tally>,
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
    pub(super) async fn sweep_db(&mut self, db: DbIndex) -> Result<(), End> {
        let mut figures = self.job.shard.passes.remove(&db).unwrap_or_default();
        let here = self.run_id.as_ref().map(RunId::fingerprint);
        // The checkpoint was of the process that we met first, and another one may answer by now.
        let of_another = matches!(figures.position, ScanPosition::At(_)) && (here.is_none() || figures.process != here);
        figures.space = self.space.clone();
        figures.process = here;
        if figures.position == ScanPosition::Finished || of_another {
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
            pass.still.misses_a_batch();
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
            pass.figures.rested += guard::WATCH_FOR;
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
}
