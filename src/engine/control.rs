//! What may be said to a running sweep: stop, pause, and other limits. One watch channel, read before each batch.

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
    /// The keep run has lasted long enough: that is its success.
    Kept,
    /// Another process has the task by now.
    Lost,
}

/// The orders in force.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Orders {
    /// End after the batch under way.
    pub stop: Option<StopReason>,
    /// Hold before the next batch, and why.
    pub hold: Option<Reason>,
    /// Send no batch from then on: another process may sweep then. `None`: there is no other.
    pub until: Option<Instant>,
    /// The limits.
    pub tuning: Tuning,
}

impl Orders {
    /// Why no batch may be sent now, if that is so.
    pub fn holds(&self) -> Option<Reason> {
        let over = self.until.is_some_and(|until| Instant::now() >= until);
        if over { Some(Reason::StoreUnreachable) } else { self.hold }
    }
}

/// The end that gives orders, held by the task.
#[derive(Debug, Clone)]
pub struct Control(watch::Sender<Orders>);

impl Control {
    /// A control that lets the sweep run with the given settings.
    pub fn new(settings: &ScanSettings) -> Self {
        Self(watch::Sender::new(Orders { stop: None, hold: None, until: None, tuning: settings.tuning }))
    }

    /// The receiving end, for the engine.
    pub fn orders(&self) -> watch::Receiver<Orders> {
        self.0.subscribe()
    }

    /// Tells the sweep to stop. The first reason stays.
    pub fn stop(&self, reason: StopReason) {
        self.0.send_if_modified(|orders| {
            let first = orders.stop.is_none();
            orders.stop = orders.stop.or(Some(reason));
            first
        });
    }

    /// Holds the sweep for a reason, or lets it go on.
    pub fn hold(&self, reason: Option<Reason>) {
        self.0.send_if_modified(|orders| std::mem::replace(&mut orders.hold, reason) != reason);
    }

    /// Lets the sweep send batches until then.
    pub fn lend(&self, until: Instant) {
        self.0.send_modify(|orders| orders.until = Some(until));
    }

    /// Changes the limits.
    pub fn tune(&self, tuning: Tuning) {
        self.0.send_modify(|orders| orders.tuning = tuning);
    }

    /// Waits until a stop was ordered, and says why.
    pub async fn stopped(&self) -> StopReason {
        stop_ordered(&mut self.orders()).await
    }
}

/// Waits until a stop is ordered. Never returns once every [`Control`] is gone without having ordered one.
pub async fn stop_ordered(orders: &mut watch::Receiver<Orders>) -> StopReason {
    let stop = match orders.wait_for(|o| o.stop.is_some()).await {
        Ok(orders) => orders.stop,
        Err(_) => None,
    };
    match stop {
        Some(reason) => reason,
        None => std::future::pending().await,
    }
}
