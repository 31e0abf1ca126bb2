//! How a running sweep is controlled: stop, hold, and other limits. One watch channel, read before each batch.

use tokio::sync::watch;
use tokio::time::Instant;

use crate::model::throttle::Reason;
use crate::settings::{ScanSettings, Tuning};

/// Why a sweep is told to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// The process ends; the task may go on later.
    Interrupted,
    /// The task's time is over.
    TimedOut,
    /// A person ended the task.
    Cancelled,
    /// The keep run has lasted as long as it was asked to: that is its success.
    Kept,
    /// Another process owns the task now.
    Lost,
}

/// What the task wants of its sweep now. Written through [`Control`], read by the sweep of each shard.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ControlState {
    /// End after the batches under way.
    pub stop: Option<StopReason>,
    /// Hold before the next batch, for this reason.
    pub hold: Option<Reason>,
    /// When the lease of the task ends: no batch is sent after it, since another process may sweep then. `None`: there is no lease.
    pub until: Option<Instant>,
    /// The pace and the limits.
    pub tuning: Tuning,
}

impl ControlState {
    /// Why no batch may be sent now; `None`: one may.
    pub fn holds(&self) -> Option<Reason> {
        let over = self.until.is_some_and(|until| Instant::now() >= until);
        if over { Some(Reason::StoreUnreachable) } else { self.hold }
    }
}

/// The sending end, held by the task.
#[derive(Debug, Clone)]
pub(crate) struct Control(watch::Sender<ControlState>);

impl Control {
    /// A control that lets the sweep run with the given settings.
    pub(crate) fn new(settings: &ScanSettings) -> Self {
        Self(watch::Sender::new(ControlState { stop: None, hold: None, until: None, tuning: settings.tuning }))
    }

    /// A receiving end, for the engine.
    pub(crate) fn watch(&self) -> watch::Receiver<ControlState> {
        self.0.subscribe()
    }

    /// Tells the sweep to stop. The first reason stays.
    pub(crate) fn stop(&self, reason: StopReason) {
        self.0.send_if_modified(|state| {
            let first = state.stop.is_none();
            state.stop = state.stop.or(Some(reason));
            first
        });
    }

    /// Holds the sweep for a reason, or lets it go on.
    pub(crate) fn hold(&self, reason: Option<Reason>) {
        self.0.send_if_modified(|state| std::mem::replace(&mut state.hold, reason) != reason);
    }

    /// Lets the sweep send batches until the lease ends.
    pub(crate) fn lend(&self, until: Instant) {
        self.0.send_modify(|state| state.until = Some(until));
    }

    /// Changes the pace and the limits.
    pub(crate) fn tune(&self, tuning: Tuning) {
        self.0.send_modify(|state| state.tuning = tuning);
    }
}

/// Waits until a stop is requested. Never returns once every [`Control`] is gone without having requested one.
pub(crate) async fn stop_requested(control: &mut watch::Receiver<ControlState>) -> StopReason {
    let stop = match control.wait_for(|state| state.stop.is_some()).await {
        Ok(state) => state.stop,
        Err(_) => None,
    };
    match stop {
        Some(reason) => reason,
        None => std::future::pending().await,
    }
}
