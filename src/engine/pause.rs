//! Everything that makes the loop stand still: orders, load, rest, the ceiling. Each wait ends at once when a stop is
//! ordered, and each hold is told with its reason when it begins and when it ends.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::engine::control::{Orders, StopReason, stop_ordered};
use crate::engine::guard::Advice;
use crate::engine::observe::{self, Observation};
use crate::engine::pass::{Pass, REPORT_EVERY};
use crate::engine::shard_scan::{End, ShardScan};
use crate::engine::throttle::{self, Decision};
use crate::model::failure::FailureKind;
use crate::model::progress::ScanEventKind;
use crate::model::throttle::{Limit, Limits, Reason};
use crate::node::commands;
use crate::node::error::NodeError;
use crate::settings::Tuning;

/// During a hold that an observation began, a server of which nothing was seen for this long is asked whether it is there.
const UNSEEN_AT_MOST: Duration = Duration::from_secs(3);
/// How much a new look at the load of others weighs against the ones before: more where it has risen, so that the sweep gives
/// way at once and comes back slowly.
const WEIGHT: (f64, f64) = (0.7, 0.3);

/// What others need of a master, by looks during which the sweep stands still.
#[derive(Debug, Default)]
pub(super) struct Others {
    cpu: Option<f64>,
    ops: Option<u64>,
    looked: Option<Instant>,
}

impl Others {
    /// Whether it is time to look again. Where nothing depends on it, it never is.
    pub(super) fn look_is_due(&self, tuning: &Tuning) -> bool {
        let wanted = tuning.min_intensity < tuning.intensity
            || matches!(tuning.limits, Limits { ops: Limit::At(_), .. } | Limits { cpu: Limit::At(_), .. });
        wanted && self.looked.is_none_or(|looked| looked.elapsed() >= observe::LOOK_EVERY)
    }

    fn learn(&mut self, cpu: Option<f64>, ops: Option<u64>) {
        let smooth = |before: Option<f64>, now: f64| match before {
            Some(before) => before + (now - before) * if now > before { WEIGHT.0 } else { WEIGHT.1 },
            None => now,
        };
        self.cpu = cpu.map(|now| smooth(self.cpu, now));
        self.ops = ops.map(|now| smooth(self.ops.map(|ops| ops as f64), now as f64) as u64);
        self.looked = Some(Instant::now());
    }
}

impl ShardScan {
    /// Takes new orders in. Holds while they say so.
    pub(super) async fn obey(&mut self, pass: &mut Pass) -> Result<(), End> {
        loop {
            let orders = *self.orders.borrow_and_update();
            stop_of(&orders)?;
            if self.pacer.tune(orders.tuning) {
                self.adapt(orders.tuning.intensity);
                self.decided = false;
            }
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

    /// Stands still for a moment, now and then, to see what others need.
    pub(super) async fn look_around(&mut self, pass: &mut Pass) -> Result<(), End> {
        if !self.others.look_is_due(&self.orders.borrow().tuning) {
            return Ok(());
        }
        let begun = Instant::now();
        match self.measure_others().await {
            Ok(()) => {
                self.decided = false;
                self.pacer.stood_still(begun.elapsed());
                pass.figures.rested += begun.elapsed();
                Ok(())
            }
            Err(error) => self.recover(error, Some(pass)).await,
        }
    }

    /// An observation with what others need beside it.
    pub(super) fn beside_others(&self, seen: Observation) -> Observation {
        Observation { others_cpu: self.others.cpu, ops: self.others.ops, ..seen }
    }

    pub(super) async fn measure_others(&mut self) -> Result<(), NodeError> {
        let before = commands::load(&mut self.conn).await?;
        let from = Instant::now();
        tokio::time::sleep(observe::LOOK_FOR).await;
        let after = commands::load(&mut self.conn).await?;
        let span = from.elapsed();
        let commands = after.commands.zip(before.commands).map(|(now, then)| now.saturating_sub(then));
        // Two of them were ours.
        let ops = commands.map(|all| (all.saturating_sub(2) as f64 / span.as_secs_f64()) as u64);
        self.others.learn(observe::busy_share(before.cpu, after.cpu, span), ops);
        Ok(())
    }

    /// Takes a new observation in. Holds until [`throttle::decide`] lets the sweep go on.
    pub(super) async fn look(&mut self, pass: &mut Pass) -> Result<(), End> {
        match self.observer.take_new() {
            Some(new) => self.seen = new,
            None if self.decided => return Ok(()),
            None => {}
        }
        let mut suspect = false;
        loop {
            let seen = self.beside_others(self.seen.clone());
            if let Some(stat) = seen.scan_stat {
                self.pacer.observe(stat);
            }
            let tuning = self.orders.borrow().tuning;
            let held = self.hold.map(|(reason, _)| reason);
            match throttle::decide(&seen, &self.before, &tuning, held) {
                Decision::Proceed => return self.go_on(pass, &seen, tuning.intensity).await,
                Decision::Rest(share) => return self.go_on(pass, &seen, share).await,
                Decision::Abort(failure) if failure.kind == FailureKind::NotAMaster => {
                    self.demoted(failure, pass).await?;
                    // The one that was found was looked at when it was reached.
                    return Ok(());
                }
                // One look may have met a moment.
                Decision::Abort(failure) if failure.kind == FailureKind::LimitPassed && !suspect => suspect = true,
                Decision::Abort(failure) => return Err(failure.into()),
                Decision::Hold(reason, detail) => {
                    suspect = false;
                    if matches!(reason, Reason::Loading | Reason::Failover | Reason::DeletionBlocked) {
                        // What was swept since the last proof may have been swept under the same condition.
                        pass.go_back();
                    }
                    if self.begin_hold(Some(pass), reason, detail).await {
                        self.report(pass).await;
                    }
                }
            }
            self.write_tally(pass).await;
            self.seen = tokio::select! {
                next = self.observer.next() => next,
                reason = stop_ordered(&mut self.orders) => return Err(End::Stopped(reason)),
                () = tokio::time::sleep(UNSEEN_AT_MOST) => match commands::ping(&mut self.conn).await {
                    Ok(()) => continue,
                    // The server is gone, and with it whoever would say that the hold is over.
                    Err(error) => return self.recover(error, Some(pass)).await,
                },
            };
            if self.others.look_is_due(&tuning)
                && let Err(error) = self.measure_others().await
            {
                return self.recover(error, Some(pass)).await;
            }
        }
    }

    /// Nothing holds the sweep: how much may it take?
    async fn go_on(&mut self, pass: &mut Pass, seen: &Observation, share: f64) -> Result<(), End> {
        // A hold that the arithmetic began is ended by the arithmetic, in `step`.
        if self.hold.is_some_and(|(reason, _)| reason != Reason::DeletionBlocked) {
            self.end_hold(Some(pass)).await;
        }
        let advice = pass.guard.look(pass.begun.elapsed(), seen, &pass.figures, pass.keys);
        let most = self.orders.borrow().tuning.intensity;
        match advice {
            Advice::Fine => self.adapt(share),
            Advice::Hurry => self.adapt(most),
            Advice::Stop(failure) if !self.job.settings.allow_slow => return Err(failure.into()),
            Advice::Stop(failure) => {
                self.adapt(most);
                let message = format!("{} (sweeping on, as asked)", failure.message);
                self.reporter.say(ScanEventKind::Warned { message }).await;
            }
        }
        Ok(())
    }

    fn adapt(&mut self, share: f64) {
        self.decided = true;
        self.pacer.set_intensity(share);
    }

    /// Rests for the intensity.
    pub(super) async fn rest(&mut self, pass: &mut Pass) -> Result<(), End> {
        if let Some(due) = self.pacer.rest_due() {
            let slept = self.doze(pass, due).await?;
            self.pacer.rested(slept);
        }
        Ok(())
    }

    /// Waits for the ceiling after a batch.
    pub(super) async fn pay(&mut self, pass: &mut Pass) -> Result<(), End> {
        let mut keys = u32::try_from(std::mem::take(&mut pass.unpaid)).unwrap_or(u32::MAX);
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

    /// Begins a hold, unless it holds for this reason already. Returns whether it did.
    pub(super) async fn begin_hold(&mut self, pass: Option<&mut Pass>, reason: Reason, detail: Option<String>) -> bool {
        if self.hold.is_some_and(|(current, _)| current == reason) {
            return false;
        }
        self.end_hold(pass).await;
        if reason != Reason::Paused {
            // Another master of the host may be swept meanwhile. A pause is the whole task's.
            self.seat = None;
        }
        self.hold = Some((reason, Instant::now()));
        self.reporter.say(ScanEventKind::HoldStarted { reason, detail }).await;
        true
    }

    pub(super) async fn end_hold(&mut self, pass: Option<&mut Pass>) {
        let Some((reason, since)) = self.hold.take() else { return };
        let lasted = since.elapsed();
        if let Some(pass) = pass {
            *pass.figures.held.entry(reason).or_default() += lasted;
        }
        self.reporter.say(ScanEventKind::HoldEnded { reason, lasted }).await;
    }
}

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
