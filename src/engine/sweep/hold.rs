//! What makes the batch loop stand still, in this order: control, foreground, throttle, permit, each with no batch under way; then rest
//! and ceiling, which the pacer asks for before each batch. Every wait ends at once when a stop is requested. Each hold is reported with
//! its reason when it begins and when it ends.
//!
//! Control, throttle and permit hold. Foreground, rest and ceiling only rest. Not every hold begins here:
//!
//! | reason | decided by |
//! |---|---|
//! | `Paused`, `OutsideWindow`, `Queued` | `tasks::admission`, through [`crate::engine::control`]; `obey` carries it out |
//! | `StoreUnreachable` | [`ControlState::holds`]; `obey` carries it out |
//! | `Loading`, `Failover`, `DeletionBlocked` | [`throttle::impossible`], whatever the limits |
//! | `Unreadable`, `Fork`, `FullSync`, and each limit of `model::throttle::LIMITS` | [`throttle::decide`] |
//! | `Parallel` | `take_permit` |
//! | `DeletionBlocked`, by the arithmetic of hidden keys | `suspect` in `batch_loop` |
//! | `Reconnecting`, `NoMaster`, `Loading`, `Busy` | `reason_of` in `retry`, after an error |
//! | `SlotsMoving` | `engine::rounds`, between two sweeps of a shard |
//!
//! While `expire_effort` raises the effort of active expiry, before the first batch, it asks [`throttle::decide`] as well.

use std::time::Duration;

use tokio::time::Instant;

use crate::engine::control::{ControlState, StopReason, stop_requested};
use crate::engine::policy::expiry_guard::Advice;
use crate::engine::policy::foreground;
use crate::engine::policy::ledger::Doing;
use crate::engine::policy::observation::Observation;
use crate::engine::policy::throttle::{self, Decision};
use crate::engine::sweep::pass::{Pass, REPORT_EVERY};
use crate::engine::sweep::shard::{End, ShardSweep};
use crate::model::failure::FailureKind;
use crate::model::progress::ScanEventKind;
use crate::model::throttle::Reason;
use crate::node::commands;
use crate::node::error::NodeError;
use crate::settings::Tuning;

/// During a hold by the throttle, a server without a new observation for this long gets a PING, to find out whether it still answers.
const UNSEEN_AT_MOST: Duration = Duration::from_secs(3);

impl ShardSweep {
    /// Reads the control state and the newest observation, and adapts the pace. Returns whether the loop has to stand still as soon as
    /// no batch is under way.
    pub(super) async fn must_stand_still(&mut self, pass: &mut Pass) -> Result<bool, End> {
        let control = *self.control.borrow();
        if control.stop.is_some() || control.holds().is_some() || self.requested_hold {
            return Ok(true);
        }
        self.tune(control.tuning);
        if self.permit.is_none() || self.session.foreground.measurement_is_due(&control.tuning) {
            return Ok(true);
        }
        match self.session.sampler.take_new() {
            Some(new) => self.session.seen = new,
            None if self.session.decided => return Ok(false),
            None => {}
        }
        match self.decide() {
            (_, Decision::Hold(..) | Decision::Abort(_)) => {
                // `throttle` decides again, with no batch under way.
                self.session.decided = false;
                Ok(true)
            }
            (seen, Decision::Proceed) => self.go_on(pass, &seen, control.tuning.intensity).await.map(|()| false),
            (seen, Decision::Rest(share)) => self.go_on(pass, &seen, share).await.map(|()| false),
        }
    }

    /// Stands still as long as anything holds the sweep. Called with no batch under way.
    pub(super) async fn stand_still(&mut self, pass: &mut Pass) -> Result<(), End> {
        self.obey(pass).await?;
        self.measure_foreground_if_due(pass).await?;
        self.throttle(pass).await?;
        self.take_permit(pass).await
    }

    /// Hands changed limits to the pacer and lets the throttle decide again.
    fn tune(&mut self, tuning: Tuning) {
        if self.pacer.tune(tuning) {
            self.pacer.set_intensity(tuning.intensity);
            self.session.decided = false;
        }
    }

    /// Holds while the control state says so, or while the lease is over.
    async fn obey(&mut self, pass: &mut Pass) -> Result<(), End> {
        loop {
            let control = *self.control.borrow_and_update();
            check_stop(&control)?;
            self.tune(control.tuning);
            let Some(reason) = control.holds() else {
                if std::mem::take(&mut self.requested_hold) {
                    self.end_hold().await;
                }
                return Ok(());
            };
            self.requested_hold = true;
            self.begin_hold(reason, None).await;
            self.report(pass).await;
            if self.control.changed().await.is_err() {
                // Every `Control` is gone: nothing can end this hold any more.
                return Err(End::Stopped(StopReason::Interrupted));
            }
        }
    }

    /// Stands still for a moment, if that is due, to measure the load by other clients.
    async fn measure_foreground_if_due(&mut self, pass: &mut Pass) -> Result<(), End> {
        if !self.session.foreground.measurement_is_due(&self.control.borrow().tuning) {
            return Ok(());
        }
        if self.hold.is_none() {
            self.ledger.turn_to(Doing::Resting);
        }
        let measured = self.measure_foreground().await;
        if self.hold.is_none() {
            self.ledger.turn_to(Doing::Exchanging);
        }
        match measured {
            Ok(()) => {
                self.session.decided = false;
                Ok(())
            }
            Err(error) => self.recover(error, Some(pass)).await,
        }
    }

    /// Measures the load by other clients for [`foreground::MEASURE_FOR`]. Called with no batch under way.
    pub(super) async fn measure_foreground(&mut self) -> Result<(), NodeError> {
        let before = commands::load(self.session.conn()).await?;
        let from = Instant::now();
        tokio::time::sleep(foreground::MEASURE_FOR).await;
        let after = commands::load(self.session.conn()).await?;
        let span = from.elapsed();
        let commands = after.commands.zip(before.commands).map(|(now, then)| now.saturating_sub(then));
        // Two of these commands were our own.
        let ops = commands.map(|all| (all.saturating_sub(2) as f64 / span.as_secs_f64()) as u64);
        self.session.foreground.learn(foreground::busy_share(before.cpu, after.cpu, span), ops);
        Ok(())
    }

    /// The last observation, and what the throttle decides on it.
    fn decide(&mut self) -> (Observation, Decision) {
        let seen = self.session.with_foreground(self.session.seen.clone());
        self.pacer.observe(&seen);
        let held = self.hold.map(|(reason, _)| reason);
        let decision = throttle::decide(&seen, &self.session.baseline, &self.control.borrow().tuning, held);
        (seen, decision)
    }

    /// Holds until [`throttle::decide`] lets the sweep go on.
    async fn throttle(&mut self, pass: &mut Pass) -> Result<(), End> {
        match self.session.sampler.take_new() {
            Some(new) => self.session.seen = new,
            None if self.session.decided => return Ok(()),
            None => {}
        }
        let mut suspect = false;
        loop {
            let tuning = self.control.borrow().tuning;
            let (seen, decision) = self.decide();
            match decision {
                Decision::Proceed => return self.go_on(pass, &seen, tuning.intensity).await,
                Decision::Rest(share) => return self.go_on(pass, &seen, share).await,
                Decision::Abort(failure) if failure.kind == FailureKind::NotAMaster => {
                    self.demoted(failure, pass).await?;
                    // The new master was observed when it was reached.
                    return Ok(());
                }
                // One observation may be an outlier: a hard limit needs two.
                Decision::Abort(failure) if failure.kind == FailureKind::LimitPassed && !suspect => suspect = true,
                Decision::Abort(failure) => return Err(failure.into()),
                Decision::Hold(reason, detail) => {
                    suspect = false;
                    if matches!(reason, Reason::Loading | Reason::Failover | Reason::DeletionBlocked) {
                        // What was swept since deletions were last proven may have been swept while they were blocked.
                        pass.go_back();
                    }
                    if self.begin_hold(reason, detail).await {
                        self.report(pass).await;
                    }
                }
            }
            self.write_journal(pass).await;
            self.session.seen = tokio::select! {
                next = self.session.sampler.next() => next,
                reason = stop_requested(&mut self.control) => return Err(End::Stopped(reason)),
                () = tokio::time::sleep(UNSEEN_AT_MOST) => match commands::ping(self.session.conn()).await {
                    Ok(()) => continue,
                    // The server is gone. Without a new connection nothing would end this hold.
                    Err(error) => return self.recover(error, Some(pass)).await,
                },
            };
            if self.session.foreground.measurement_is_due(&tuning)
                && let Err(error) = self.measure_foreground().await
            {
                return self.recover(error, Some(pass)).await;
            }
        }
    }

    /// Goes on at the share of the master's time that throttle and expiry guard allow.
    async fn go_on(&mut self, pass: &mut Pass, seen: &Observation, share: f64) -> Result<(), End> {
        // The batch loop began the hold for blocked deletions, and only a batch can end it.
        if self.hold.is_some_and(|(reason, _)| reason != Reason::DeletionBlocked) {
            self.end_hold().await;
        }
        let advice = pass.guard.advise(pass.begun.elapsed(), seen, &pass.figures.counters, pass.keys);
        let most = self.control.borrow().tuning.intensity;
        self.session.decided = true;
        match advice {
            Advice::Fine => self.pacer.set_intensity(share),
            Advice::Hurry => self.pacer.set_intensity(most),
            Advice::Stop(failure) if !self.job.settings.allow_slow => return Err(failure.into()),
            Advice::Stop(failure) => {
                self.pacer.set_intensity(most);
                self.reporter.warn(format!("{} (going on, since allow-slow is set)", failure.message)).await;
            }
        }
        Ok(())
    }

    /// Takes a permit, and holds while there is none.
    async fn take_permit(&mut self, pass: &mut Pass) -> Result<(), End> {
        if self.permit.is_some() {
            return Ok(());
        }
        self.permit = self.job.permits.take_now(&self.session.master.addr);
        if self.permit.is_none() {
            self.begin_hold(Reason::Parallel, None).await;
            self.report(pass).await;
            self.session.sampler.slow_down(true);
            let permit = tokio::select! {
                permit = self.job.permits.take(&self.session.master.addr) => permit,
                reason = stop_requested(&mut self.control) => return Err(End::Stopped(reason)),
            };
            self.session.sampler.slow_down(false);
            self.permit = Some(permit);
            self.end_hold().await;
        }
        Ok(())
    }

    /// Rests until the pacer allows the next batch. Called with no batch under way.
    pub(super) async fn rest(&mut self, pass: &mut Pass, until: Instant) -> Result<(), End> {
        let due = until.saturating_duration_since(Instant::now());
        if due >= REPORT_EVERY {
            self.report(pass).await;
        }
        self.ledger.turn_to(Doing::Resting);
        let rested = tokio::select! {
            () = pass.pipeline.timer.until(until) => Ok(()),
            reason = stop_requested(&mut self.control) => Err(End::Stopped(reason)),
        };
        self.ledger.turn_to(Doing::Exchanging);
        rested
    }

    /// Begins a hold, unless the sweep holds for this reason already. Returns whether a hold began.
    pub(super) async fn begin_hold(&mut self, reason: Reason, detail: Option<String>) -> bool {
        if self.hold.is_some_and(|(current, _)| current == reason) {
            return false;
        }
        self.end_hold().await;
        if reason != Reason::Paused {
            // Another master of the host may be swept meanwhile; a pause holds them all.
            self.permit = None;
        }
        self.hold = Some((reason, Instant::now()));
        self.ledger.turn_to(Doing::Holding(reason));
        self.reporter.say(ScanEventKind::HoldStarted { reason, detail }).await;
        true
    }

    pub(super) async fn end_hold(&mut self) {
        let Some((reason, since)) = self.hold.take() else { return };
        self.ledger.turn_to(Doing::Exchanging);
        self.reporter.say(ScanEventKind::HoldEnded { reason, lasted: since.elapsed() }).await;
    }
}

fn check_stop(control: &ControlState) -> Result<(), End> {
    control.stop.map_or(Ok(()), |reason| Err(End::Stopped(reason)))
}
