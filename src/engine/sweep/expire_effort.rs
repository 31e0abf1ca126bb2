//! `assist-expiry`: the server's own active expiry frees what it can free more cheaply, before the sweep.
//!
//! Active expiry visits only keys that have a TTL. It stops when about 10 per cent of them have expired, or about 1 per cent with
//! `active-expire-effort 10`. If few of many keys have a TTL, that costs far less per key than SCAN. So, if the operator asks for it,
//! the effort is raised for a while, under the same throttle as the sweep, and the sweep then reclaims the rest.
//!
//! The old value is noted beside the state file before it is changed, and restored on every way out, even if another server has taken
//! over meanwhile. If the server does not answer, the end of the sweep tries again, and then every later sweep of the instance.

use std::time::Duration;

use tokio::time::Instant;

use crate::engine::policy::observation::Observation;
use crate::engine::policy::throttle::{self, Decision};
use crate::engine::sweep::shard::{End, ShardSweep};
use crate::model::failure::FailureKind;
use crate::model::shard::NodeAddr;
use crate::node::commands;
use crate::node::conn::{Conn, ConnOptions};
use crate::node::error::NodeError;
use crate::store::undo::{Undo, UndoNote};

const PARAMETER: &str = "active-expire-effort";
const MOST: &str = "10";
/// Active expiry is done once no more than this share of its sample has expired: at the highest effort it stops at 1 %.
const SETTLED: f64 = 0.015;
/// The server's share of expired keys is a moving mean, which needs this long to follow.
const AT_LEAST: Duration = Duration::from_secs(2);
/// Pause between two readings of INFO.
const READ_EVERY: Duration = Duration::from_millis(250);

impl ShardSweep {
    /// Restores the values that earlier sweeps of this instance, or this sweep, could not restore.
    pub(super) async fn restore_from_notes(&mut self) {
        let Some(dir) = &self.job.journals else { return };
        let target = self.job.map.topology().target().to_string();
        let ours = |undo: &Undo| undo.target == target || undo.addr == *self.session.addr();
        for note in UndoNote::left(dir, ours) {
            let Undo { addr, parameter, value, .. } = note.undo.clone();
            if self.restore(note).await {
                let message = format!("{parameter} of {addr} had been left at {MOST}: it was put back to {value}");
                self.reporter.warn(message).await;
            }
        }
    }

    /// Raises the effort until few expired keys are left, but no longer than `at_most`.
    pub(super) async fn assist(&mut self, at_most: Duration) -> Result<(), End> {
        let note = match self.raise().await {
            Ok(Ok(note)) => note,
            Ok(Err(why)) => {
                self.reporter.warn(format!("active-expire-effort was not raised: {why}")).await;
                return Ok(());
            }
            Err(error) => {
                self.recover(error, None).await?;
                self.reporter.warn("active-expire-effort was not raised: the connection was lost".to_owned()).await;
                // The answer was lost, but the server may have carried out the CONFIG SET.
                self.restore_from_notes().await;
                return Ok(());
            }
        };
        let (begun, before, addr) = (Instant::now(), self.session.baseline.expired_share, note.undo.addr.clone());
        let watched = self.watch_expiry(at_most, &note.undo.value).await;
        self.end_hold().await;
        self.restore(note).await;
        let what = match watched? {
            Some((left, freed)) => format!(
                "the server freed {freed} keys itself, and the expired share of its sample went from {} to {}",
                percent(before),
                percent(left)
            ),
            None => format!("then {addr} was restarted, or another server took over"),
        };
        self.reporter.warn(format!("{PARAMETER} was {MOST} for {:.1} s: {what}", begun.elapsed().as_secs_f64())).await;
        Ok(())
    }

    /// Notes the old effort and raises it. The outer error is that of the connection; the inner one says why the effort was not raised.
    async fn raise(&mut self) -> Result<Result<UndoNote, String>, NodeError> {
        let Some(dir) = self.job.journals.clone() else { return Ok(Err("there is no state file".to_owned())) };
        let Some(value) = commands::config(self.session.conn(), PARAMETER).await? else {
            return Ok(Err(format!("the server does not tell its {PARAMETER} (no right to CONFIG GET?)")));
        };
        if value == MOST {
            return Ok(Err(format!("{PARAMETER} is {MOST} already")));
        }
        let target = self.job.map.topology().target().to_string();
        let undo = Undo { target, addr: self.session.addr().clone(), parameter: PARAMETER.to_owned(), value };
        let note = match undo.note(&dir) {
            Ok(note) => note,
            Err(error) => return Ok(Err(format!("its old value cannot be kept beside the state file: {error}"))),
        };
        match commands::set_config(self.session.conn(), PARAMETER, MOST).await {
            Ok(()) => Ok(Ok(note)),
            Err(error @ NodeError::Server { .. }) => {
                note.done();
                Ok(Err(error.to_string()))
            }
            Err(error) => Err(error),
        }
    }

    /// Waits until few expired keys are left. Returns their share and how many keys were freed meanwhile; `None`: another server is
    /// swept now. `value`: the old effort, which is in force during holds.
    async fn watch_expiry(&mut self, at_most: Duration, value: &str) -> Result<Option<(Option<f64>, u64)>, End> {
        let (begun, process) = (Instant::now(), self.session.number);
        let first = self.session.baseline.expired_keys.unwrap_or(0);
        let mut suspect = false;
        loop {
            self.wait(READ_EVERY).await?;
            let info = self.info().await?;
            if self.session.number != process {
                return Ok(None);
            }
            let control = *self.control.borrow();
            if self.session.foreground.measurement_is_due(&control.tuning)
                && let Err(error) = self.measure_foreground().await
            {
                self.recover(error, None).await?;
                continue;
            }
            let seen = Observation { latency: self.session.sampler.latency(), ..Observation::from_info(&info) };
            let seen = self.session.with_foreground(seen);
            let freed = seen.expired_keys.unwrap_or(0).saturating_sub(first);
            let settled = seen.expired_share.is_none_or(|share| share < SETTLED) && begun.elapsed() >= AT_LEAST;
            let held = self.hold.map(|(reason, _)| reason);
            let is_over = begun.elapsed() >= at_most || control.holds().is_some();
            match throttle::decide(&seen, &self.session.baseline, &control.tuning, held) {
                // A requested hold ends the assistance: the sweep itself reports it.
                Decision::Proceed | Decision::Rest(_) | Decision::Hold(..) if is_over => {
                    return Ok(Some((seen.expired_share, freed)));
                }
                Decision::Proceed | Decision::Rest(_) if settled => return Ok(Some((seen.expired_share, freed))),
                Decision::Proceed | Decision::Rest(_) if held.is_some() => {
                    self.end_hold().await;
                    let _ = commands::set_config(self.session.conn(), PARAMETER, MOST).await;
                }
                Decision::Proceed | Decision::Rest(_) => {}
                Decision::Hold(reason, detail) => {
                    let _ = commands::set_config(self.session.conn(), PARAMETER, value).await;
                    self.begin_hold(reason, detail).await;
                }
                // The sweep finds the new master.
                Decision::Abort(failure) if failure.kind == FailureKind::NotAMaster => {
                    return Ok(Some((seen.expired_share, freed)));
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

    /// Restores the old value on the server where it was changed. If that fails, warns, and leaves the note for the next attempt.
    async fn restore(&mut self, note: UndoNote) -> bool {
        let Undo { addr, parameter, value, .. } = &note.undo;
        let mut done = Ok(());
        // A full server has no room for another connection.
        if addr != self.session.addr() || commands::set_config(self.session.conn(), parameter, value).await.is_err() {
            done = set_config_at(addr, self.job.map.topology().options(), parameter, value).await;
        }
        match done {
            Ok(()) => note.done(),
            Err(error) => {
                let message = format!(
                    "{parameter} of {addr} was raised to {MOST} and cannot be put back to {value} now: {error}. Sweeps of this \
                     instance try again. Or run CONFIG SET {parameter} {value} there and remove {}",
                    note.path().display()
                );
                self.reporter.warn(message).await;
                return false;
            }
        }
        true
    }
}

/// Sets a parameter over a connection of its own. Waits no longer for the answer than for a connection: a server that was swept before
/// must not delay the sweep of this one.
async fn set_config_at(addr: &NodeAddr, options: &ConnOptions, parameter: &str, value: &str) -> Result<(), NodeError> {
    let limit = options.connect_timeout;
    let options = ConnOptions { response_timeout: options.response_timeout.min(limit), ..options.clone() };
    let mut conn = Conn::open(addr, &options).await?;
    commands::set_config(&mut conn, parameter, value).await
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "unknown".to_owned(), |share| format!("{:.1} %", share * 100.0))
}
