//! Whether a task may sweep: not while it is paused, not outside its window, and only in a slot.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::engine::control::Control;
use crate::model::schedule::{Window, until};
use crate::model::throttle::Reason;
use crate::store::Clock;

/// How often the window is checked at least: the clock may have been set.
const RECHECK_EVERY: Duration = Duration::from_secs(30);

/// What one task needs to sweep.
#[derive(Debug)]
pub(super) struct Admission {
    /// The clock by which the window opens and closes.
    pub(super) clock: Clock,
    /// The window outside of which it holds.
    pub(super) window: Option<Window>,
    /// The slots that all tasks share; `None` for a keep run, which would keep one forever.
    pub(super) slots: Option<Arc<Semaphore>>,
    /// Whether a person paused it.
    pub(super) paused: watch::Receiver<bool>,
}

impl Admission {
    /// Holds the task or lets it go on. Returns why it holds.
    pub(super) fn decide(&mut self, control: &Control, slot: &mut Option<OwnedSemaphorePermit>) -> Option<Reason> {
        let closed = self.window.as_ref().is_some_and(|window| !window.is_open(self.clock.now()));
        let hold = match (*self.paused.borrow_and_update(), closed) {
            (true, _) => Some(Reason::Paused),
            (false, true) => Some(Reason::OutsideWindow),
            (false, false) => self.slots.as_ref().and_then(|slots| {
                *slot = slot.take().or_else(|| slots.clone().try_acquire_owned().ok());
                slot.is_none().then_some(Reason::Queued)
            }),
        };
        if hold.is_some() {
            *slot = None;
        }
        control.hold(hold);
        hold
    }

    /// Holds the task and lets it go on for as long as this future runs. The slot is released while the task is held,
    /// and when this future is dropped.
    pub(super) async fn keep(mut self, control: Control, mut slot: Option<OwnedSemaphorePermit>) {
        loop {
            let now = self.clock.now();
            if self.decide(&control, &mut slot) == Some(Reason::Queued) {
                // The place in the queue lasts as long as this future.
                let free = async {
                    match self.slots.clone() {
                        Some(slots) => slots.acquire_owned().await.ok(),
                        None => None,
                    }
                };
                tokio::select! {
                    free = free => slot = free,
                    _ = self.paused.changed() => {}
                    () = until_closed(self.window.as_ref(), &self.clock) => {}
                }
                continue;
            }
            tokio::select! {
                changed = self.paused.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(recheck_after(self.window.as_ref(), now)) => {}
            }
        }
    }
}

/// Completes when the window is closed.
async fn until_closed(window: Option<&Window>, clock: &Clock) {
    let Some(window) = window else { return std::future::pending().await };
    while window.is_open(clock.now()) {
        tokio::time::sleep(recheck_after(Some(window), clock.now())).await;
    }
}

/// How long to wait before the window is checked again.
fn recheck_after(window: Option<&Window>, now: Timestamp) -> Duration {
    let change = window.and_then(|window| window.next_change(now));
    change.map_or(RECHECK_EVERY, |change| until(now, change).min(RECHECK_EVERY))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::throttle::Reason;
    use crate::settings::raw::Raw;
    use crate::settings::resolve;
    use jiff::tz::TimeZone;

    fn control() -> Control {
        Control::new(&resolve(&Raw::defaults(), None).unwrap().scan)
    }

    async fn until_hold(control: &Control, hold: Option<Reason>) {
        let mut orders = control.watch();
        let met = orders.wait_for(|orders| orders.hold == hold);
        tokio::time::timeout(Duration::from_secs(10), met).await.expect("the hold that was awaited").unwrap();
    }

    #[tokio::test]
    async fn a_paused_task_gives_its_place_to_the_next_one() {
        let slots = Arc::new(Semaphore::new(1));
        let (pause, paused) = watch::channel(false);
        let (first, second) = (control(), control());
        let admission =
            |paused| Admission { clock: Clock::default(), window: None, slots: Some(slots.clone()), paused };
        let (_other, other_paused) = watch::channel(false);
        let one = tokio::spawn(admission(paused).keep(first.clone(), None));
        until_hold(&first, None).await;
        until_slot_is_taken(&slots).await;
        let two = tokio::spawn(admission(other_paused).keep(second.clone(), None));
        until_hold(&second, Some(Reason::Queued)).await;
        pause.send(true).unwrap();
        until_hold(&first, Some(Reason::Paused)).await;
        until_hold(&second, None).await;
        pause.send(false).unwrap();
        until_hold(&first, Some(Reason::Queued)).await;
        two.abort();
        until_hold(&first, None).await;
        one.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn tasks_that_wait_for_a_place_get_it_in_the_order_in_which_they_came() {
        let slots = Arc::new(Semaphore::new(1));
        let taken = slots.clone().try_acquire_owned().unwrap();
        let (_pause, paused) = watch::channel(false);
        let (first, second) = (control(), control());
        let admission =
            || Admission { clock: Clock::default(), window: None, slots: Some(slots.clone()), paused: paused.clone() };
        let one = tokio::spawn(admission().keep(first.clone(), None));
        until_hold(&first, Some(Reason::Queued)).await;
        tokio::time::sleep(RECHECK_EVERY / 2).await;
        let two = tokio::spawn(admission().keep(second.clone(), None));
        until_hold(&second, Some(Reason::Queued)).await;
        // The first one looks again meanwhile.
        tokio::time::sleep(RECHECK_EVERY * 3 / 4).await;
        drop(taken);
        until_hold(&first, None).await;
        assert_eq!(second.watch().borrow().hold, Some(Reason::Queued));
        one.abort();
        until_hold(&second, None).await;
        two.abort();
    }

    async fn until_slot_is_taken(slots: &Semaphore) {
        while slots.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_closed_window_holds() {
        let (_pause, paused) = watch::channel(false);
        let now = Timestamp::now().to_zoned(TimeZone::UTC);
        // Opens in a few days only.
        let day = now.date().weekday().wrapping_add(3_i64);
        let window = Window { days: vec![day], start: now.time(), end: now.time(), zone: TimeZone::UTC };
        assert_ne!(day, now.date().weekday());
        let control = control();
        let admission = Admission {
            clock: Clock::default(),
            window: Some(window),
            slots: Some(Arc::new(Semaphore::new(1))),
            paused,
        };
        let keep = tokio::spawn(admission.keep(control.clone(), None));
        until_hold(&control, Some(Reason::OutsideWindow)).await;
        keep.abort();
    }
}
