//! When a keep run ends: at each full hour, so that the history has a row for each hour of the clock. Then the next run
//! begins.

use std::sync::Arc;
use std::time::Duration;

use jiff::{RoundMode, Timestamp, TimestampRound, Unit};
use tokio::sync::watch;

use crate::model::task::TaskState;
use crate::store::Clock;
use crate::tasks::TaskView;

/// How often the clock is read at least: it may have been set.
const RECHECK_EVERY: Duration = Duration::from_secs(15);

/// Completes at the next full hour, but not while the run is paused: the next run would not be paused.
pub(super) async fn is_over(clock: &Clock, mut view: watch::Receiver<Arc<TaskView>>) {
    let end = next_hour(clock.now());
    loop {
        let left = Duration::try_from(end.duration_since(clock.now())).unwrap_or_default();
        tokio::time::sleep(left.min(RECHECK_EVERY)).await;
        if left.is_zero() && view.wait_for(|view| view.task.state != TaskState::Paused).await.is_ok() {
            return;
        }
    }
}

/// The first full hour after an instant.
pub(crate) fn next_hour(now: Timestamp) -> Timestamp {
    let hours = TimestampRound::new().smallest(Unit::Hour).mode(RoundMode::Trunc);
    let begun = now.round(hours).unwrap_or(now);
    begun.checked_add(jiff::SignedDuration::from_hours(1)).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_the_history_ends_with_the_hour_of_the_clock() {
        for (now, end) in [
            ("2026-01-01T10:00:00Z", "2026-01-01T11:00:00Z"),
            ("2026-01-01T10:59:59.999Z", "2026-01-01T11:00:00Z"),
            ("2026-01-01T23:30:00Z", "2026-01-02T00:00:00Z"),
        ] {
            assert_eq!(next_hour(now.parse().unwrap()), end.parse().unwrap(), "{now}");
        }
    }
}
