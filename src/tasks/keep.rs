//! When a keep run ends. It would go on for ever: its record is closed now and then, so that a history has a row for each hour of
//! the clock, and another run begins.

use std::sync::Arc;
use std::time::Duration;

use jiff::{RoundMode, Timestamp, TimestampRound, Unit};
use tokio::sync::watch;

use crate::engine::ScanPlan;
use crate::node::topology::{Kind, View};
use crate::store::Clock;
use crate::tasks::TaskView;

/// The clock is looked at again this often: it may have been set.
const LOOK_AGAIN: Duration = Duration::from_secs(15);
/// Shards that go on beside one that has failed do so for this long. The next run tries all of them again.
const AFTER_FAILURE: Duration = Duration::from_secs(60);

/// Ends when the run has lasted long enough: at the next full hour; where masters or slots of a cluster have moved; and some time after
/// a shard has failed.
pub(super) async fn is_over(clock: &Clock, plan: &ScanPlan, mut view: watch::Receiver<Arc<TaskView>>) {
    let failed = async {
        let any = |view: &Arc<TaskView>| view.snapshot.shards.values().any(|shard| shard.failure.is_some());
        let has_failed = view.wait_for(any).await.is_ok();
        if !has_failed {
            return std::future::pending().await;
        }
        tokio::time::sleep(AFTER_FAILURE).await;
    };
    tokio::select! {
        () = hour_is_over(clock) => {}
        () = has_moved(plan) => {}
        () = failed => {}
    }
}

async fn hour_is_over(clock: &Clock) {
    let end = next_hour(clock.now());
    loop {
        let left = Duration::try_from(end.duration_since(clock.now())).unwrap_or_default();
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left.min(LOOK_AGAIN)).await;
    }
}

/// The first full hour after an instant.
pub fn next_hour(now: Timestamp) -> Timestamp {
    let hours = TimestampRound::new().smallest(Unit::Hour).mode(RoundMode::Trunc);
    let begun = now.round(hours).unwrap_or(now);
    begun.checked_add(jiff::SignedDuration::from_hours(1)).unwrap_or(now)
}

/// Ends when the masters of a cluster, or their slots, are others than at the beginning. While nobody can say, they are not.
async fn has_moved(plan: &ScanPlan) {
    let mut first: Option<View> = None;
    loop {
        if let Ok(view) = plan.topology.view(None).await {
            if view.kind != Kind::Cluster {
                return std::future::pending().await;
            }
            let places =
                |view: &View| view.masters.iter().map(|m| (m.addr.clone(), m.slots.clone())).collect::<Vec<_>>();
            match &first {
                None => first = Some(view),
                Some(first) if places(first) != places(&view) => return,
                Some(_) => {}
            }
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
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
