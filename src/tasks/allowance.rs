//! The time that a task is allowed. Time in which a person or a window held it does not count.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::engine::control::Orders;

/// The time spent is brought up to date this often, for the checkpoints.
const TICK: Duration = Duration::from_millis(500);

/// How much time a task may take, and how much it has taken.
#[derive(Debug)]
pub(super) struct Allowance {
    /// All of it.
    pub(super) allowed: Duration,
    spent: Mutex<Duration>,
}

impl Allowance {
    /// An allowance of which a part was spent before an interruption.
    pub(super) fn new(allowed: Duration, spent: Duration) -> Self {
        Self { allowed, spent: Mutex::new(spent) }
    }

    /// What was spent so far.
    pub(super) fn spent(&self) -> Duration {
        *self.spent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spend(&self, time: Duration) {
        *self.spent.lock().unwrap_or_else(PoisonError::into_inner) += time;
    }

    /// Counts, and returns once everything is spent.
    pub(super) async fn used_up(&self, mut orders: watch::Receiver<Orders>) {
        loop {
            if orders.borrow_and_update().hold.is_some() {
                if orders.changed().await.is_err() {
                    return std::future::pending().await;
                }
                continue;
            }
            let left = self.allowed.saturating_sub(self.spent());
            if left.is_zero() {
                return;
            }
            let begun = Instant::now();
            let gone = tokio::select! {
                () = tokio::time::sleep(left.min(TICK)) => false,
                changed = orders.changed() => changed.is_err(),
            };
            self.spend(begun.elapsed());
            if gone {
                // Nobody can hold it any more; the clock runs on.
                tokio::time::sleep(self.allowed.saturating_sub(self.spent())).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::control::Control;
    use crate::model::throttle::Reason;
    use crate::settings::raw::Raw;

    #[tokio::test(start_paused = true)]
    async fn time_outside_a_window_does_not_count() {
        let control = Control::new(&crate::settings::resolve(&Raw::defaults(), None).unwrap().scan);
        let allowance = Allowance::new(Duration::from_secs(10), Duration::from_secs(2));
        let begun = Instant::now();
        let hold = async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            control.hold(Some(Reason::OutsideWindow));
            tokio::time::sleep(Duration::from_secs(3600)).await;
            control.hold(None);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = allowance.used_up(control.orders()) => {}
            () = hold => {}
        }
        assert_eq!(begun.elapsed().as_secs(), 3600 + 8, "two of ten seconds were spent before");
        assert_eq!(allowance.spent(), Duration::from_secs(10));
    }
}
