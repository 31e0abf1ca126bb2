//! Letting the server itself do what it does more cheaply.
//!
//! Active expiry walks only the keys that have a TTL, and stops near 10 per cent of stale ones, or near 1 per cent with
//! `active-expire-effort 10`. Where few of many keys have a TTL that costs far less per freed key than SCAN. So, where the
//! operator asks for it, the effort is raised for a while, under the same throttle as the sweep, which then frees the rest.
//!
//! The old value is noted beside the state file before anything is changed, put back on every way out, and put back by the
//! next start where there was no way out.

use std::time::Duration;

use tokio::time::Instant;

use crate::engine::observe::Observation;
use crate::engine::pause::wait;
use crate::engine::shard_scan::{End, ShardScan};
use crate::engine::throttle::{self, Decision};
use crate::model::failure::FailureKind;
use crate::model::progress::ScanEventKind;
use crate::node::commands;
use crate::node::error::NodeError;
use crate::store::undo::Undo;

const PARAMETER: &str = "active-expire-effort";
const MOST: &str = "10";
/// Once active expiry finds no more than this share stale it has done what it can: at the highest effort it stops at 1 %.
const SETTLED: f64 = 0.015;
/// The share that the server tells is a moving mean: it has to be given this long to follow.
const AT_LEAST: Duration = Duration::from_secs(2);
/// Pause between looks.
const LOOK_EVERY: Duration = Duration::from_millis(250);

impl ShardScan {
    fn undo(&self) -> Option<Undo> {
        self.job.tallies.as_ref().map(|dir| Undo::new(dir, self.conn.addr(), PARAMETER))
    }

    /// Puts back what a sweep before this one could not.
    pub(super) async fn put_back_effort(&mut self) {
        let Some(undo) = self.undo() else { return };
        let Some(value) = undo.value() else { return };
        let message = match commands::set_config(&mut self.conn, PARAMETER, &value).await {
            Ok(()) => {
                undo.done();
                format!("an earlier sweep had raised {PARAMETER} and was killed: it was put back to {value}")
            }
            Err(error) => format!(
                "an earlier sweep had raised {PARAMETER} and was killed, and it cannot be put back ({error}): run \
                 CONFIG SET {PARAMETER} {value}"
            ),
        };
        self.reporter.say(ScanEventKind::Warned { message }).await;
    }

    /// Raises the effort until few stale keys are left, for `at_most` that long.
    pub(super) async fn assist(&mut self, at_most: Duration) -> Result<(), End> {
        let message = match self.raise().await {
            Ok(Ok(())) => {
                let begun = Instant::now();
                let before = self.before.stale_share;
                let ended = self.watch_expiry(at_most).await;
                self.put_back_effort_quietly().await;
                let (stale, freed) = ended?;
                format!(
                    "{PARAMETER} was {MOST} for {:.1} s: the server freed {freed} keys itself, and its sample of stale keys \
                     went from {} to {}",
                    begun.elapsed().as_secs_f64(),
                    percent(before),
                    percent(stale),
                )
            }
            Ok(Err(why)) => format!("the server's own expiry was not helped: {why}"),
            Err(error) => {
                self.recover(error, None).await?;
                // The answer was lost, and perhaps not the order.
                self.put_back_effort_quietly().await;
                "the server's own expiry was not helped: the connection was lost".to_owned()
            }
        };
        self.reporter.say(ScanEventKind::Warned { message }).await;
        Ok(())
    }

    /// The outer error is the connection's; the inner one says why the effort was not raised.
    async fn raise(&mut self) -> Result<Result<(), String>, NodeError> {
        let Some(undo) = self.undo() else { return Ok(Err("there is no state file".to_owned())) };
        let Some(value) = commands::config(&mut self.conn, PARAMETER).await? else {
            return Ok(Err(format!("the server does not tell its {PARAMETER} (no right to CONFIG GET?)")));
        };
        if value == MOST {
            return Ok(Err(format!("{PARAMETER} is {MOST} already")));
        }
        if let Err(error) = undo.note(&value) {
            return Ok(Err(format!("its old value cannot be kept beside the state file: {error}")));
        }
        match commands::set_config(&mut self.conn, PARAMETER, MOST).await {
            Ok(()) => Ok(Ok(())),
            Err(error @ NodeError::Server { .. }) => {
                undo.done();
                Ok(Err(error.to_string()))
            }
            Err(error) => Err(error),
        }
    }

    /// Waits until few stale keys are left. Returns their share and what was freed meanwhile.
    async fn watch_expiry(&mut self, at_most: Duration) -> Result<(Option<f64>, u64), End> {
        let begun = Instant::now();
        let first = self.before.expired_keys.unwrap_or(0);
        let mut suspect = false;
        loop {
            wait(&mut self.orders, LOOK_EVERY).await?;
            let info = self.info(None).await?;
            let mut seen = Observation::from_info(&info);
            seen.latency = self.observer.latency();
            let freed = seen.expired_keys.unwrap_or(0).saturating_sub(first);
            let settled = seen.stale_share.is_none_or(|share| share < SETTLED) && begun.elapsed() >= AT_LEAST;
            let held = self.hold.map(|(reason, _)| reason);
            let tuning = self.orders.borrow().tuning;
            match throttle::decide(&seen, &self.before, &tuning, held) {
                Decision::Proceed | Decision::Rest(_) if settled || begun.elapsed() >= at_most => {
                    return Ok((seen.stale_share, freed));
                }
                Decision::Proceed | Decision::Rest(_) if held.is_some() => {
                    self.end_hold(None).await;
                    let _ = commands::set_config(&mut self.conn, PARAMETER, MOST).await;
                }
                Decision::Proceed | Decision::Rest(_) => {}
                Decision::Hold(reason, detail) => {
                    // The note stays: the value that it holds is in force meanwhile.
                    if let Some(value) = self.undo().and_then(|undo| undo.value()) {
                        let _ = commands::set_config(&mut self.conn, PARAMETER, &value).await;
                    }
                    self.begin_hold(None, reason, detail).await;
                }
                // The sweep itself meets it next, and follows.
                Decision::Abort(failure) if failure.kind == FailureKind::NotAMaster => {
                    return Ok((seen.stale_share, freed));
                }
                Decision::Abort(failure) if failure.kind == FailureKind::LimitPassed && !suspect => {
                    suspect = true;
                    continue;
                }
                Decision::Abort(failure) => return Err(failure.into()),
            }
            suspect = false;
        }
    }

    /// Puts the old value back after we have raised it. Where that fails the note stays, and the next start does it.
    async fn put_back_effort_quietly(&mut self) {
        self.end_hold(None).await;
        let Some(undo) = self.undo() else { return };
        let Some(value) = undo.value() else { return };
        if commands::set_config(&mut self.conn, PARAMETER, &value).await.is_ok() {
            undo.done();
        } else {
            self.put_back_effort().await;
        }
    }
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "unknown".to_owned(), |share| format!("{:.1} %", share * 100.0))
}
