//! The time that a task may take. Time in which a person or a window holds it does not count.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::engine::control::ControlState;
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::{PassCounters, Snapshot, held_by_reason};
use crate::settings::show_duration;

/// How often the time spent is updated, for the checkpoints.
const TICK: Duration = Duration::from_millis(500);

/// How much time a task may take, and how much it has taken.
#[derive(Debug)]
pub(super) struct TimeBudget {
    /// The time that the task may take.
    pub(super) allowed: Duration,
    spent: Mutex<Duration>,
}

impl TimeBudget {
    /// A budget of which `spent` was used before an interruption.
    pub(super) fn new(allowed: Duration, spent: Duration) -> Self {
        Self { allowed, spent: Mutex::new(spent) }
    }

    /// The time spent so far.
    pub(super) fn spent(&self) -> Duration {
        *self.spent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spend(&self, time: Duration) {
        *self.spent.lock().unwrap_or_else(PoisonError::into_inner) += time;
    }

    /// Counts the time spent, and completes once it is all that is allowed.
    pub(super) async fn used_up(&self, mut orders: watch::Receiver<ControlState>) {
        loop {
            if orders.borrow_and_update().holds().is_some() {
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
                // The control is gone, so nothing can hold the task any more.
                tokio::time::sleep(self.allowed.saturating_sub(self.spent())).await;
            }
        }
    }
}

/// The failure of a sweep whose time is over. The hint names what took most of that time.
pub(super) fn over(allowed: Duration, snapshot: &Snapshot) -> Failure {
    let sum = |time: fn(&PassCounters) -> Duration| -> Duration { snapshot.counters().map(time).sum() };
    let (active, waited, rested) = (sum(|pass| pass.active), sum(|pass| pass.waited), sum(|pass| pass.rested));
    let held = held_by_reason(snapshot.counters()).into_iter().max_by_key(|(_, time)| *time);
    let holds = snapshot.shards.values().find_map(|shard| shard.hold);
    let hint = match held.filter(|(_, time)| *time > active.max(waited).max(rested)).map(|(reason, _)| reason).or(holds) {
        Some(reason) => format!("allow more with --timeout, or see to what held it: {}", reason.sentence()),
        None if rested > active.max(waited) => {
            "it rested most of the time: raise --max-keys-per-sec or --intensity, or allow more with --timeout"
                .to_owned()
        }
        None if waited > active => {
            "most of that time it waited for answers: is the server far away, does it hang, or do slow commands hold it? Or allow \
             more with --timeout"
                .to_owned()
        }
        None => "allow more with --timeout".to_owned(),
    };
    let message = format!("the time allowed ({}) was over before the sweep was complete", show_duration(allowed));
    Failure::new(FailureKind::TimedOut, message).hint(hint)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::engine::control::Control;
    use crate::model::progress::{PassCounters, PassFigures, ShardView};
    use crate::model::shard::{DbIndex, ShardId};
    use crate::model::throttle::Reason;
    use crate::settings::raw::Raw;

    #[tokio::test(start_paused = true)]
    async fn time_outside_a_window_does_not_count() {
        let control = Control::new(&crate::settings::resolve(&Raw::defaults(), None).unwrap().scan);
        let budget = TimeBudget::new(Duration::from_secs(10), Duration::from_secs(2));
        let begun = Instant::now();
        let hold = async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            control.hold(Some(Reason::OutsideWindow));
            tokio::time::sleep(Duration::from_secs(3600)).await;
            control.hold(None);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = budget.used_up(control.watch()) => {}
            () = hold => {}
        }
        assert_eq!(begun.elapsed().as_secs(), 3600 + 8, "two of ten seconds were spent before");
        assert_eq!(budget.spent(), Duration::from_secs(10));
    }

    #[test]
    fn the_end_of_the_time_names_what_took_it() {
        let s = Duration::from_secs;
        let hint = |active, waited, rested, held: &[(Reason, Duration)], hold| {
            let held = held.iter().copied().collect();
            let counters = PassCounters { active, waited, rested, held, ..PassCounters::default() };
            let figures = PassFigures { counters, ..PassFigures::default() };
            let shard = ShardView { passes: [(DbIndex(0), figures)].into(), hold, ..ShardView::default() };
            let snapshot =
                Snapshot { shards: [(ShardId("a:1".to_owned()), Arc::new(shard))].into(), ..Snapshot::default() };
            over(s(5_400), &snapshot).hint.unwrap()
        };
        insta::assert_snapshot!(
            [
                hint(s(4_000), s(50), s(10), &[], None),
                hint(s(60), s(4_000), s(10), &[], None),
                hint(s(10), s(60), s(5_000), &[(Reason::Latency, s(50))], None),
                hint(s(10), s(5), s(60), &[(Reason::Latency, s(50)), (Reason::Fork, s(61))], None),
                hint(s(10), s(5), s(60), &[], Some(Reason::DeletionBlocked)),
                over(s(5_400), &Snapshot::default()).message,
            ]
            .join("\n"),
            @r"
        allow more with --timeout
        most of that time it waited for answers: is the server far away, does it hang, or do slow commands hold it? Or allow more with --timeout
        it rested most of the time: raise --max-keys-per-sec or --intensity, or allow more with --timeout
        allow more with --timeout, or see to what held it: the server saves or rewrites its data in a child process (during-fork)
        allow more with --timeout, or see to what held it: the server hides expired keys without deleting them (CLIENT PAUSE?); waiting for that to end
        the time allowed (1h 30m) was over before the sweep was complete
        "
        );
    }
}
