//! How many batches are under way at once.
//!
//! A server is kept busy by as many batches as fit into one round trip: with slices of 50 us and a round trip of 1 ms some
//! twenty. One more only waits at the server, and others wait with it. So the depth follows what replies tell, as TCP Vegas does
//! for packets: what a reply took beyond the round trip's floor and its own slice it spent in a queue, and by Little's law
//! `depth * queued / took` batches stand in that queue. The depth grows while next to none does, and shrinks while more than
//! about one does.
//!
//! Replies that took unusually long say more of our own scheduler than of the server's queue, so the quick quarter counts.

use std::time::Duration;

/// Most batches under way, and so most connections to one master: beyond 2 ms of round trip a sweep slows down with the distance.
pub const MOST: usize = 32;
/// The depth grows below the first and shrinks above the second number of waiting batches.
const QUEUE: (f64, f64) = (0.25, 1.25);
/// Fewest replies between two changes.
const WINDOW: usize = 16;
/// From this intensity on two batches are under way at least: with one the server idles for a message's way after each. Below,
/// two in a row would be as one long batch to others.
const PAIR_FROM: f64 = 0.5;

/// The depth of one pass.
#[derive(Debug, Clone)]
pub struct Depth {
    now: usize,
    most: usize,
    took: Vec<Duration>,
    /// Whether a batch had to wait for the pacer since the last change: more of them would wait as well.
    paced: bool,
}

impl Depth {
    /// Of a pass that begins at an intensity and can use `most` workers at most.
    pub fn new(most: usize, intensity: f64) -> Self {
        let most = most.clamp(1, MOST);
        let now = if intensity >= PAIR_FROM { most.min(2) } else { 1 };
        Self { now, most, took: Vec::with_capacity(WINDOW), paced: false }
    }

    /// How many batches may be under way.
    pub fn now(&self) -> usize {
        self.now
    }

    /// No more workers are to be had than this.
    pub fn limit(&mut self, most: usize) {
        self.most = most.clamp(1, MOST);
        self.now = self.now.min(self.most);
    }

    /// A batch had to wait for the pacer.
    pub fn was_paced(&mut self) {
        self.paced = true;
    }

    /// Takes in what a reply took since it was sent, where one that waits for nobody takes `floor + slice`.
    pub fn answered(&mut self, took: Duration, floor: Duration, slice: Duration, intensity: f64) {
        self.took.push(took);
        if self.took.len() < WINDOW.max(2 * self.now) {
            return;
        }
        let quick = self.took.len() / 4;
        let (_, &mut took, _) = self.took.select_nth_unstable(quick);
        self.took.clear();
        let paced = std::mem::take(&mut self.paced);
        let queued = took.saturating_sub(floor + slice).as_secs_f64();
        let waiting = self.now as f64 * queued / took.as_secs_f64().max(1e-9);
        let rests = intensity < PAIR_FROM;
        if waiting > QUEUE.1 {
            self.now -= (waiting as usize).min(self.now / 2);
        } else if paced && rests {
            // Fewer do.
            self.now -= 1;
        } else if waiting < QUEUE.0 && !paced {
            self.now += 1 + self.now / 4;
        }
        let least = if rests { 1 } else { self.most.min(2) };
        self.now = self.now.clamp(least, self.most);
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
            if f64::from(depth.now() as u32) * slice.as_secs_f64() / alone.as_secs_f64() > intensity && intensity < 1.0 {
                depth.was_paced();
            }
            depth.answered(took, away * US, slice, intensity);
            seen.push(depth.now());
        }
        seen.split_off(10_000)
    }

    #[test]
    fn the_depth_keeps_the_server_busy_and_about_one_batch_waiting() {
        for (away, from, to) in [(20, 2, 3), (200, 5, 7), (500, 11, 14), (1_000, 21, 24), (4_000, MOST, MOST)] {
            let depths = settle(away, 1.0, 100);
            let (least, most) = (*depths.iter().min().unwrap(), *depths.iter().max().unwrap());
            assert!(least >= from && most <= to, "{away} us away: {least} to {most}");
        }
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
        assert!(settle(4_000, 1.0, 3).iter().all(|&depth| depth == 3));
        let mut depth = Depth::new(8, 1.0);
        depth.limit(1);
        assert_eq!(depth.now(), 1);
    }
}
