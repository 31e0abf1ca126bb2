//! Whether a task may sweep: not while it is paused, not outside its window, and only while fewer tasks sweep than `at-once` says.

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
    /// Lets `at-once` tasks sweep at a time; `None` for a keep run, which would hold one back forever.
    pub(super) at_once: Option<Arc<Semaphore>>,
    /// Whether a person paused it.
    pub(super) paused: watch::Receiver<bool>,
}

impl Admission {
    /// Holds the task or lets it go on. Returns why it holds.
    pub(super) fn decide(&mut self, control: &Control, admitted: &mut Option<OwnedSemaphorePermit>) -> Option<Reason> {
        let closed = self.window.as_ref().is_some_and(|window| !window.is_open(self.clock.now()));
        let hold = match (*self.paused.borrow_and_update(), closed) {
            (true, _) => Some(Reason::Paused),
            (false, true) => Some(Reason::OutsideWindow),
            (false, false) => self.at_once.as_ref().and_then(|at_once| {
                *admitted = admitted.take().or_else(|| at_once.clone().try_acquire_owned().ok());
                admitted.is_none().then_some(Reason::Queued)
            }),
        };
        if hold.is_some() {
            *admitted = None;
        }
        control.hold(hold);
        hold
    }

    /// Holds the task and lets it go on for as long as this future runs. It counts toward `at-once` until it is held,
    /// or until this future is dropped.
    pub(super) async fn run(mut self, control: Control, mut admitted: Option<OwnedSemaphorePermit>) {
        loop {
            let now = self.clock.now();
            if self.decide(&control, &mut admitted) == Some(Reason::Queued) {
                // The place in the queue lasts as long as this future.
                let free = async {
                    match self.at_once.clone() {
                        Some(at_once) => at_once.acquire_owned().await.ok(),
                        None => None,
                    }
                };
                tokio::select! {
                    free = free => admitted = free,
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
        let mut control = control.watch();
        let met = control.wait_for(|control| control.hold == hold);
        tokio::time::timeout(Duration::from_secs(10), met).await.expect("the hold that was awaited").unwrap();
    }

    #[tokio::test]
    async fn a_paused_task_gives_its_place_to_the_next_one() {
        let at_once = Arc::new(Semaphore::new(1));
        let (pause, paused) = watch::channel(false);
        let (first, second) = (control(), control());
        let admission =
            |paused| Admission { clock: Clock::default(), window: None, at_once: Some(at_once.clone()), paused };
        let (_other, other_paused) = watch::channel(false);
        let one = tokio::spawn(admission(paused).run(first.clone(), None));
        until_hold(&first, None).await;
        until_admitted(&at_once).await;
        let two = tokio::spawn(admission(other_paused).run(second.clone(), None));
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
        let at_once = Arc::new(Semaphore::new(1));
        let taken = at_once.clone().try_acquire_owned().unwrap();
        let (_pause, paused) = watch::channel(false);
        let (first, second) = (control(), control());
        let admission = || Admission {
            clock: Clock::default(),
            window: None,
            at_once: Some(at_once.clone()),
            paused: paused.clone(),
        };
        let one = tokio::spawn(admission().run(first.clone(), None));
        until_hold(&first, Some(Reason::Queued)).await;
        tokio::time::sleep(RECHECK_EVERY / 2).await;
        let two = tokio::spawn(admission().run(second.clone(), None));
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

    async fn until_admitted(at_once: &Semaphore) {
        while at_once.available_permits() > 0 {
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
            at_once: Some(Arc::new(Semaphore::new(1))),
            paused,
        };
        let run = tokio::spawn(admission.run(control.clone(), None));
        until_hold(&control, Some(Reason::OutsideWindow)).await;
        run.abort();
    }
}
