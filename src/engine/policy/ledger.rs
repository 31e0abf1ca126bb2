//! Where the time of a sweep goes. Each moment counts as active, waited, rested or held, so that the four add up to the time taken,
//! however the sweep ends.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::progress::PassCounters;
use crate::model::throttle::Reason;

/// What the sweep is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Doing {
    /// Batches or other requests are under way. [`Ledger::worked`] tells how much of this time the server worked on batches; the rest
    /// is waiting.
    Exchanging,
    /// The sweep rests for the intensity or the ceiling, or to measure the foreground or the flow of expiry.
    Resting,
    /// The sweep holds for this reason and sends no batch.
    Holding(Reason),
}

/// Time that is not in the figures of a pass yet.
#[derive(Debug)]
pub(crate) struct Ledger {
    doing: Doing,
    since: Instant,
    exchanged: Duration,
    worked: Duration,
    rested: Duration,
    held: BTreeMap<Reason, Duration>,
}

impl Default for Ledger {
    /// The ledger of a sweep that begins now.
    fn default() -> Self {
        Self {
            doing: Doing::Exchanging,
            since: Instant::now(),
            exchanged: Duration::ZERO,
            worked: Duration::ZERO,
            rested: Duration::ZERO,
            held: BTreeMap::new(),
        }
    }
}

impl Ledger {
    /// From now on the sweep does something else.
    pub(crate) fn turn_to(&mut self, doing: Doing) {
        let now = Instant::now();
        let lasted = now - std::mem::replace(&mut self.since, now);
        match std::mem::replace(&mut self.doing, doing) {
            Doing::Exchanging => self.exchanged += lasted,
            Doing::Resting => self.rested += lasted,
            Doing::Holding(reason) => *self.held.entry(reason).or_default() += lasted,
        }
    }

    /// Adds time for which a batch held the master.
    pub(crate) fn worked(&mut self, active: Duration) {
        self.worked += active;
    }

    /// Moves everything up to now into the counters of a pass.
    pub(crate) fn settle(&mut self, counters: &mut PassCounters) {
        self.turn_to(self.doing);
        counters.rested += std::mem::take(&mut self.rested);
        for (reason, time) in std::mem::take(&mut self.held) {
            *counters.held.entry(reason).or_default() += time;
        }
        // There cannot be more work than time. An estimate that is too large is carried over to the next call.
        let worked = self.worked.min(self.exchanged);
        counters.active += worked;
        counters.waited += self.exchanged - worked;
        self.worked -= worked;
        self.exchanged = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn every_moment_is_in_one_of_the_four() {
        let begun = Instant::now();
        let mut ledger = Ledger::default();
        let mut counters = PassCounters::default();
        let ms = Duration::from_millis;
        for (doing, lasts, active) in [
            (Doing::Exchanging, 7, 5),
            (Doing::Resting, 20, 0),
            (Doing::Exchanging, 3, 4),
            (Doing::Holding(Reason::Fork), 50, 0),
            (Doing::Exchanging, 5, 1),
            (Doing::Holding(Reason::Fork), 8, 0),
        ] {
            ledger.turn_to(doing);
            tokio::time::advance(ms(lasts)).await;
            ledger.worked(ms(active));
            ledger.settle(&mut counters);
        }
        assert_eq!((counters.active, counters.rested), (ms(10), ms(20)), "a millisecond of work was paid off later");
        assert_eq!((counters.waited, counters.held[&Reason::Fork]), (ms(5), ms(58)));
        let all = counters.active + counters.waited + counters.rested + counters.held_total();
        assert_eq!(all, begun.elapsed());
    }
}
