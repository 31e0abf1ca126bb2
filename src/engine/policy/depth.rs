//! How many batches are under way at once.
//!
//! A server is kept busy by as many batches as fit into one round trip: with 75 us of work for each and a round trip of 1 ms some
//! fourteen. More only wait at the server, and others wait with them. So the depth follows what replies tell, as TCP Vegas does
//! for packets: what replies take beyond what they took at a lower depth they have spent in a queue. The depth grows while next to
//! nothing is, and shrinks while more than about one batch is.
//!
//! A network's own wavering grows with its length, so a part of the round trip is allowed for it. Replies that took unusually
//! long say more of our own scheduler than of the server's queue: the quick quarter of a window counts, and two windows in a row.
//! The depth stays at half of what fits into the round trip at least: so many take half of the time that other clients leave, and if
//! replies take long even so, it is not for a queue of our batches.

use std::time::Duration;

/// Most batches under way, and so most connections to one master: beyond 2 ms of round trip a sweep slows down with the distance.
pub(crate) const MOST: usize = 32;
/// The depth grows while replies wait for less than this: the work of so many batches, and a part of the round trip.
const GROW_BELOW: (f64, f64) = (0.25, 1.0 / 16.0);
/// The depth shrinks while replies wait for more than this.
const SHRINK_ABOVE: (f64, f64) = (1.25, 1.0 / 8.0);
/// Fewest replies between two changes.
const WINDOW: usize = 16;
/// A depth that turned out too large is not tried again for so many windows; where it was but one more than a pair, for twice as
/// many the next time, up to so many.
const LEAVE_FOR: (u32, u32) = (8, 512);
/// After so many windows one is spent at half the depth, to see how far the server is now.
const MEASURE_EVERY: u32 = 100;
/// From this intensity on two batches are under way at least: with one the server idles for a message's way after each. Below,
/// two in a row would be as one long batch to others.
const PAIR_FROM: f64 = 0.5;

/// The depth of one pass.
#[derive(Debug, Clone)]
pub(crate) struct Depth {
    now: usize,
    most: usize,
    took: Vec<Duration>,
    /// What the quick quarter of a window took when nothing of ours waited.
    base: Option<Duration>,
    /// The depth to go back to, while one window measures that.
    measuring: Option<usize>,
    windows: u32,
    /// Whether a batch had to wait for rest or ceiling since the last change: more of them would wait as well.
    paced: bool,
    /// Whether the window before had too long a queue.
    suspect: bool,
    /// Windows until it may grow, and how many that will be the next time.
    wait: u32,
    leave_for: u32,
}

impl Depth {
    /// Of a pass that begins at an intensity and can use `most` workers at most.
    pub(crate) fn new(most: usize, intensity: f64) -> Self {
        let most = most.clamp(1, MOST);
        let now = if intensity >= PAIR_FROM { most.min(2) } else { 1 };
        Self {
            now,
            most,
            took: Vec::with_capacity(WINDOW),
            base: None,
            measuring: None,
            windows: 0,
            paced: false,
            suspect: false,
            wait: 0,
            leave_for: LEAVE_FOR.0,
        }
    }

    /// How many batches may be under way.
    pub(crate) fn now(&self) -> usize {
        self.now
    }

    /// No more workers are to be had than this.
    pub(crate) fn limit(&mut self, most: usize) {
        self.most = most.clamp(1, MOST);
        self.now = self.now.min(self.most);
    }

    /// A batch had to wait for rest or ceiling.
    pub(crate) fn was_paced(&mut self) {
        self.paced = true;
    }

    /// Takes in what a reply took since it was sent, where a batch is `work` for the server, its SCAN and everything around it, the
    /// way there and back takes `floor` at least, and other clients leave the share `left` of the server's time, from 0 to 1.
    pub(crate) fn answered(&mut self, took: Duration, floor: Duration, work: Duration, intensity: f64, left: f64) {
        self.took.push(took);
        if self.took.len() < WINDOW.max(2 * self.now) {
            return;
        }
        let quick = self.took.len() / 4;
        let (_, &mut took, _) = self.took.select_nth_unstable(quick);
        self.took.clear();
        // While one batch is on its way no more than so many can be worked on.
        let fit = 2 + (floor.as_secs_f64() * left / work.as_secs_f64().max(1e-6)) as usize;
        let rests = intensity < PAIR_FROM;
        let least = if rests { 1 } else { (fit / 2).max(2).min(self.most) };
        let paced = std::mem::take(&mut self.paced);
        self.adapt(took, work, least, paced, rests);
        self.now = self.now.min(fit).clamp(least, self.most);
    }

    fn adapt(&mut self, took: Duration, work: Duration, least: usize, paced: bool, rests: bool) {
        // A window in which the machine stood still is no measure: the base rises by a quarter at once, at most.
        let measured = self.base.map_or(took, |base| took.min(base + base / 4 + work));
        if let Some(before) = self.measuring.take() {
            (self.base, self.now, self.windows) = (Some(measured), before, 0);
            return;
        }
        if self.now <= least {
            self.base = Some(measured);
        }
        let base = *self.base.get_or_insert(took);
        let waits = took.saturating_sub(base);
        let bound = |(batches, share): (f64, f64)| work.mul_f64(batches) + base.mul_f64(share);
        self.wait = self.wait.saturating_sub(1);
        self.windows += 1;
        let too_long = waits > bound(SHRINK_ABOVE);
        if std::mem::replace(&mut self.suspect, too_long) && too_long {
            self.suspect = false;
            self.now = self.now.saturating_sub(1 + self.now / 8).max(least);
            self.wait = LEAVE_FOR.0;
            if self.now == least && least <= 2 {
                self.wait = self.leave_for;
                self.leave_for = (self.leave_for * 2).min(LEAVE_FOR.1);
            }
        } else if paced && rests {
            // At this intensity the master rests between batches: fewer under way suffice.
            self.now = self.now.saturating_sub(1);
        } else if waits < bound(GROW_BELOW) && !paced && self.wait == 0 {
            self.now += 1 + self.now / 4;
        }
        if self.windows >= MEASURE_EVERY && self.now > least {
            self.measuring = Some(self.now);
            self.now /= 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// Lets a server of one queue answer, `away` there and back, 50 us for each batch, and returns where the depth settles.
    fn settle(away: u32, intensity: f64, most: usize) -> Vec<usize> {
        let (slice, mut depth) = (50 * US, Depth::new(most, intensity));
        let mut seen = Vec::new();
        for _ in 0..20_000 {
            let alone = away * US + slice;
            let took = alone.max(depth.now() as u32 * slice);
            if f64::from(depth.now() as u32) * slice.as_secs_f64() / alone.as_secs_f64() > intensity && intensity < 1.0
            {
                depth.was_paced();
            }
            depth.answered(took, away * US, slice, intensity, 1.0);
            seen.push(depth.now());
        }
        seen.split_off(10_000)
    }

    #[test]
    fn the_depth_keeps_the_server_busy_and_about_one_batch_waiting() {
        for (away, from, to) in [(20, 2, 2), (200, 4, 6), (500, 10, 12), (1_000, 18, 22), (4_000, MOST, MOST)] {
            let mut depths = settle(away, 1.0, 100);
            depths.sort();
            // But for the windows that measure, and those that try one more.
            let (low, high) = (depths[depths.len() / 20], depths[depths.len() * 19 / 20]);
            assert!(low >= from && high <= to, "{away} us away: {low} to {high}");
        }
    }

    #[test]
    fn a_network_that_wavers_leaves_the_server_half_busy_at_least() {
        fastrand::seed(7);
        let (slice, away) = (50 * US, 500 * US);
        let mut depth = Depth::new(100, 1.0);
        for reply in 0..20_000 {
            // Every now and then replies are quick for a while; mostly the way takes some two hundred microseconds more.
            let quick = reply / 500 % 8 == 0;
            let way = US.mul_f64(if quick { 0.0 } else { 150.0 + 300.0 * fastrand::f64() });
            depth.answered(away + slice + way, away, slice, 1.0, 1.0);
            assert!(depth.now() >= 6 || reply < 500, "{} after {reply} replies", depth.now());
        }
    }

    #[test]
    fn a_server_that_others_keep_busy_gets_no_more_than_it_can_work_on() {
        let (slice, away) = (50 * US, 1_000 * US);
        let (mut depth, mut most) = (Depth::new(100, 1.0), 0);
        for reply in 0..20_000 {
            // Other clients take three quarters of the time: a batch takes four times as long.
            let queue = 4 * slice * depth.now() as u32;
            depth.answered((away + 4 * slice).max(queue), away, slice, 1.0, 0.25);
            most = if reply < 500 { 0 } else { most.max(depth.now()) };
        }
        assert!((4..=7).contains(&most), "five fit: {most}");
    }

    #[test]
    fn a_sweep_that_rests_has_no_more_under_way_than_it_needs() {
        for (away, intensity, most) in [(20, 0.3, 1), (1_000, 0.05, 2), (1_000, 0.25, 7)] {
            let depths = settle(away, intensity, 100);
            let seen = *depths.iter().max().unwrap();
            assert!(seen <= most, "{away} us away at {intensity}: {seen}");
        }
    }

    #[test]
    fn no_more_workers_than_there_are() {
        assert!(settle(4_000, 1.0, 3).iter().all(|&depth| depth <= 3));
        let mut depth = Depth::new(8, 1.0);
        depth.limit(1);
        assert_eq!(depth.now(), 1);
    }
}
