//! How large the next batch is, and when it may be sent.
//!
//! A foreground request waits behind one batch at most, so what it feels is the length of that batch and not how many
//! there are. Four rules follow:
//!
//! 1. COUNT is steered so that one batch holds the master for about `max_slice`. It is never raised to go faster.
//! 2. Rest leaves the master's CPU to others: batches that held it for `w` in all take `w / intensity` of time at least.
//! 3. The ceiling in keys per second is governor's, with a burst of one batch, or of what the ceiling allows in 5 ms: a timer
//!    ticks in milliseconds, and with less the sweep would oversleep and never come near a high ceiling.
//! 4. Where several batches are under way they are spaced by the length of one, at most two at once: a server works off
//!    whatever has come to it before it looks at anybody else, so batches that arrive together are one long slice to others.
//!
//! The server's time for a batch is what `cmdstat_scan` says, as far as it can be known: its mean corrects ours. Ours is the
//! time since the reply before it, but no more than since it was sent, less the smallest PING round trip. The replies' way
//! through both kernels and our own parsing are in it too, so that it is seldom less than the server worked.

use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use hdrhistogram::Histogram;
use tokio::time::Instant;

use crate::model::progress::SliceSummary;
use crate::node::info::CommandStat;
use crate::settings::{COUNT_RANGE, Tuning};

/// COUNT is reconsidered after this many groups of replies, by the median cost among them: one preempted round trip must not
/// move it.
const STEER_EVERY: usize = 15;

/// Replies that came together are one group; a group that never ends, since we are slower than the server, is cut here.
const GROUP_MOST: u32 = 32;

/// Rest that is owed is paid once it reaches this much: tokio's timer ticks in milliseconds, and shorter sleeps would
/// each be rounded up to one. As much is forgiven where a sleep was too long.
const REST_AT_LEAST: Duration = Duration::from_millis(2);

/// The burst of the ceiling is a second's keys over this: 5 ms of them.
const BURSTS_PER_SEC: u32 = 200;

/// A wait counts for no more than so many usual ones where the mean of waits is compared with the server's own: a process that was
/// not let run, or somebody's slow command, is neither SCAN's time nor the network's.
const UNUSUAL: u32 = 4;

/// The most rest that may be owed: a wait of seconds is seldom the work of one batch, and nobody is listened to while it rests.
const REST_AT_MOST: Duration = Duration::from_secs(1);

/// Longest slice that the histogram tells apart, in microseconds: ten minutes.
const MAX_SLICE_US: u64 = 600_000_000;

/// tokio's clock for governor, so that a test that pauses tokio's time pauses the ceiling too.
#[derive(Debug, Clone)]
struct TokioClock(Instant);

impl Clock for TokioClock {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// The limiter and its burst in keys.
#[derive(Debug)]
struct Ceiling {
    limiter: RateLimiter<NotKeyed, InMemoryState, TokioClock, NoOpMiddleware<Duration>>,
    burst: NonZeroU32,
}

impl Ceiling {
    fn new(keys_per_sec: u32, count: u32) -> Self {
        let at_least_one = |n| NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN);
        let burst = at_least_one(count.max(keys_per_sec / BURSTS_PER_SEC));
        let quota = Quota::per_second(at_least_one(keys_per_sec)).allow_burst(burst);
        Self { limiter: RateLimiter::direct_with_clock(quota, TokioClock(Instant::now())), burst }
    }

    /// Pays for keys. Returns how long to wait until more of them can be paid for, or `None` once all are.
    fn pay(&self, keys: &mut u64) -> Option<Duration> {
        while *keys > 0 {
            // A batch may hold more keys than one burst: it is paid for in parts.
            let part = NonZeroU32::new(u32::try_from(*keys).unwrap_or(u32::MAX))?.min(self.burst);
            match self.limiter.check_n(part).expect("a part is never larger than the burst") {
                Ok(()) => *keys -= u64::from(part.get()),
                Err(early) => return Some(early.wait_time_from(self.limiter.clock().now())),
            }
        }
        None
    }
}

/// How long one batch kept us waiting.
#[derive(Debug, Clone, Copy)]
pub struct Wait {
    /// Since it was sent, or where that is later since the last reply of any connection: the server cannot have worked on it
    /// for longer.
    pub own: Duration,
    /// Since it was sent: the way there and back is in it.
    pub since_sent: Duration,
    /// Whether its reply had to be waited for. Else it came together with the one before.
    pub waited_for: bool,
}

/// The next batch may not be sent yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Later {
    /// When to ask again.
    pub at: Instant,
    /// For rest or ceiling; else it is only kept at a distance from those before it.
    pub to_rest: bool,
}

/// Replies that came together.
#[derive(Debug, Default)]
struct Group {
    held: Duration,
    keys: u64,
    batches: u32,
}

/// The pacer of one shard.
#[derive(Debug)]
pub struct Pacer {
    max_slice: Duration,
    count: u32,
    tuning: Tuning,
    /// Share of the master's time that batches take now, `tuning.intensity` at most.
    intensity: f64,
    /// Smallest PING round trip: the network's and both kernels' share of a wait.
    floor: Duration,
    group: Group,
    /// Microseconds per key of the last groups.
    costs: Vec<f64>,
    /// The median of them when COUNT was last reconsidered.
    cost_us: Option<f64>,
    /// Server time by `cmdstat_scan` over server time by our waits, in (0, 1].
    correction: f64,
    /// When the time that batches took has been rested for.
    rested_at: Instant,
    /// Whether rest is being paid.
    resting: bool,
    /// When another batch may follow the last ones at a distance.
    spaced_at: Instant,
    ceiling: Option<Ceiling>,
    /// Keys that were looked at and that the ceiling has not let through yet.
    unpaid: u64,
    slices: Histogram<u64>,
    last_stat: Option<CommandStat>,
    since_stat: (u64, Duration),
    /// About as many waits are longer as are shorter.
    usual: Option<Duration>,
    server_us_per_scan: Option<f64>,
}

impl Pacer {
    /// A pacer that begins with `count`, keeps it where `max_slice` is zero, and knows the smallest PING round trip.
    pub fn new(count: u32, max_slice: Duration, tuning: Tuning, floor: Duration) -> Self {
        Self {
            max_slice,
            count,
            tuning,
            intensity: tuning.intensity,
            floor,
            group: Group::default(),
            costs: Vec::with_capacity(STEER_EVERY),
            cost_us: None,
            correction: 1.0,
            rested_at: Instant::now(),
            resting: false,
            spaced_at: Instant::now(),
            ceiling: tuning.max_keys_per_sec.map(|keys| Ceiling::new(keys, count)),
            unpaid: 0,
            // Two digits keep the histogram below 20 kB, and a slice is not known any better than to a per cent.
            slices: Histogram::new_with_bounds(1, MAX_SLICE_US, 2).expect("the bounds are constants"),
            last_stat: None,
            since_stat: (0, Duration::ZERO),
            usual: None,
            server_us_per_scan: None,
        }
    }

    /// COUNT of the next batch.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The way to the server and back, at its shortest.
    pub fn floor(&self) -> Duration {
        self.floor
    }

    /// Another connection: the way to the server may be shorter or longer now.
    pub fn set_floor(&mut self, floor: Duration) {
        self.floor = floor;
    }

    /// Takes other limits in. Returns whether they are others.
    pub fn tune(&mut self, tuning: Tuning) -> bool {
        if tuning == self.tuning {
            return false;
        }
        if tuning.max_keys_per_sec != self.tuning.max_keys_per_sec {
            self.ceiling = tuning.max_keys_per_sec.map(|keys| Ceiling::new(keys, self.count));
        }
        self.tuning = tuning;
        true
    }

    /// Share of the master's time that batches take now.
    pub fn intensity(&self) -> f64 {
        self.intensity
    }

    /// Takes as much as the master can spare now.
    pub fn set_intensity(&mut self, intensity: f64) {
        self.intensity = intensity;
    }

    /// Takes a reply to a SCAN that looked at so many keys in. Returns how long it held the server.
    pub fn worked(&mut self, keys: u64, wait: Wait) -> Duration {
        let slice = self.slice_of(wait);
        let usual = self.usual.get_or_insert(slice);
        self.since_stat.0 += 1;
        self.since_stat.1 += slice.min(*usual * UNUSUAL);
        *usual = if slice > *usual { *usual + *usual / 8 + Duration::from_micros(1) } else { *usual - *usual / 8 };
        let held = slice.mul_f64(self.correction);
        if wait.waited_for || self.group.batches >= GROUP_MOST {
            self.close_group();
        }
        self.group.held += held;
        self.group.keys += keys.max(1);
        self.group.batches += 1;
        self.owe(held);
        held
    }

    /// So many keys were looked at, which the ceiling has to let through before more are.
    pub fn charge(&mut self, keys: u64) {
        if self.ceiling.is_some() {
            self.unpaid += keys;
        }
    }

    /// Takes the reply to something else than a SCAN of the walk in: a touch, which `cmdstat_scan` does not know, or a second
    /// look, which says nothing of the cost of a key. Returns how long it held the server.
    pub fn worked_beside(&mut self, wait: Wait) -> Duration {
        let held = self.slice_of(wait).mul_f64(self.correction);
        self.slices.saturating_record(micros(held));
        self.owe(held);
        held
    }

    fn slice_of(&mut self, wait: Wait) -> Duration {
        // No reply comes sooner than by the shortest way there and back, whatever PING said at the start; and the server cannot
        // work on what has not come yet.
        self.floor = self.floor.min(wait.since_sent);
        wait.own.min(wait.since_sent - self.floor)
    }

    fn owe(&mut self, held: Duration) {
        if self.intensity < 1.0 {
            let now = Instant::now();
            // What a sleep was longer than owed is made up for, but no more than one rest: a process that was stopped for a
            // minute must not race for the next.
            let from = now.checked_sub(REST_AT_LEAST).map_or(self.rested_at, |earliest| self.rested_at.max(earliest));
            self.rested_at = (from + held.div_f64(self.intensity)).min(now + REST_AT_MOST);
        }
    }

    /// A server writes its replies once it has worked off what had come, so that of several batches one seems to take the time of
    /// all and the others none: each is taken for the mean of its group.
    fn close_group(&mut self) {
        let Group { held, keys, batches } = std::mem::take(&mut self.group);
        if batches == 0 {
            return;
        }
        self.slices.saturating_record_n(micros(held / batches), u64::from(batches));
        self.costs.push(held.as_secs_f64() * 1e6 / keys as f64);
        if self.costs.len() >= STEER_EVERY {
            self.steer();
        }
    }

    fn steer(&mut self) {
        self.costs.sort_by(f64::total_cmp);
        let median = self.costs[self.costs.len() / 2].max(0.01);
        self.costs.clear();
        self.cost_us = Some(median);
        if self.max_slice.is_zero() {
            return;
        }
        let wanted = self.max_slice.as_secs_f64() * 1e6 / median;
        // At most doubled or halved at once: the cost per key of a small batch says little about a large one.
        let bounded = wanted.clamp(f64::from(self.count) / 2.0, f64::from(self.count) * 2.0);
        // Within a tenth it stays: a steady COUNT is easier to read in a slow log.
        if (bounded / f64::from(self.count) - 1.0).abs() > 0.1 {
            self.count = (bounded as u32).clamp(*COUNT_RANGE.start(), *COUNT_RANGE.end());
        }
    }

    /// How long the next batch will hold the server, as far as that is known.
    pub fn expected_slice(&self) -> Duration {
        let us = self.cost_us.map_or(0.0, |cost| cost * f64::from(self.count));
        Duration::from_nanos((us * 1e3) as u64)
    }

    /// Takes a reading of `cmdstat_scan` in.
    pub fn observe(&mut self, stat: CommandStat) {
        if self.last_stat == Some(stat) {
            // The same reading, which comes with a newer latency.
            return;
        }
        let last = self.last_stat.replace(stat);
        let (batches, slices) = std::mem::take(&mut self.since_stat);
        let Some(last) = last else { return };
        let (calls, usec) = (stat.calls.saturating_sub(last.calls), stat.usec.saturating_sub(last.usec));
        if calls == 0 {
            return;
        }
        let mean = usec as f64 / calls as f64;
        self.server_us_per_scan = Some(mean);
        // With other clients' SCANs among them the mean is not ours.
        let ours = batches > 0 && calls <= batches + batches / 5 + 2;
        if ours && !slices.is_zero() {
            let by_round_trip = slices.as_secs_f64() * 1e6 / batches as f64;
            self.correction = (mean / by_round_trip).clamp(0.05, 1.0);
        }
    }

    /// Whether the next batch may be sent now. `spaced`: at a distance from those before it.
    ///
    /// # Errors
    /// When to ask again, and what for.
    pub fn may_send(&mut self, spaced: bool) -> Result<(), Later> {
        let now = Instant::now();
        let owed = self.rested_at.saturating_duration_since(now);
        self.resting = if self.resting { !owed.is_zero() } else { owed >= REST_AT_LEAST };
        if self.resting {
            return Err(Later { at: self.rested_at, to_rest: true });
        }
        if spaced && self.spaced_at > now {
            return Err(Later { at: self.spaced_at, to_rest: false });
        }
        match self.ceiling.as_ref().and_then(|ceiling| ceiling.pay(&mut self.unpaid)) {
            Some(wait) => Err(Later { at: now + wait, to_rest: true }),
            None => Ok(()),
        }
    }

    /// A batch was sent.
    pub fn sent(&mut self) {
        let (now, slice) = (Instant::now(), self.expected_slice());
        // One of them may follow at once.
        let from = now.checked_sub(slice).map_or(self.spaced_at, |earliest| self.spaced_at.max(earliest));
        self.spaced_at = from + slice;
    }

    /// How long batches were, all since this pacer was made or [`Pacer::reset_slices`].
    pub fn slices(&mut self) -> SliceSummary {
        self.close_group();
        SliceSummary {
            p50_us: self.slices.value_at_quantile(0.5),
            p99_us: self.slices.value_at_quantile(0.99),
            max_us: self.slices.max(),
        }
    }

    /// Forgets how long batches were: a new DB begins.
    pub fn reset_slices(&mut self) {
        self.group = Group::default();
        self.slices.reset();
    }

    /// Server time of one SCAN in microseconds by `cmdstat_scan`, where it was read.
    pub fn server_us_per_scan(&self) -> Option<f64> {
        self.server_us_per_scan
    }
}

fn micros(span: Duration) -> u64 {
    (span.as_micros() as u64).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::keep::Bounds;
    use crate::model::throttle::Limits;

    const US: Duration = Duration::from_micros(1);

    fn pacer(count: u32, intensity: f64, max_keys_per_sec: Option<u32>) -> Pacer {
        Pacer::new(count, 75 * US, tuning(intensity, max_keys_per_sec), 20 * US)
    }

    fn tuning(intensity: f64, max_keys_per_sec: Option<u32>) -> Tuning {
        Tuning {
            intensity,
            min_intensity: intensity,
            max_keys_per_sec,
            limits: Limits::NONE,
            bounds: Bounds::default(),
        }
    }

    /// A batch that nothing was under way beside.
    fn alone(pacer: &mut Pacer, keys: u64, waited: Duration) -> Duration {
        pacer.worked(keys, Wait { own: waited, since_sent: waited, waited_for: true })
    }

    /// Feeds batches whose server time is `us_per_key` per key, and returns the COUNT they end at.
    fn settle(pacer: &mut Pacer, us_per_key: f64) -> u32 {
        for _ in 0..200 {
            let keys = pacer.count();
            alone(pacer, u64::from(keys), 20 * US + US.mul_f64(us_per_key * f64::from(keys)));
        }
        pacer.count()
    }

    #[test]
    fn count_settles_where_a_batch_takes_the_slice() {
        let mut pacer = pacer(100, 1.0, None);
        assert!((68..=82).contains(&settle(&mut pacer, 1.0)));
        assert!((27..=33).contains(&settle(&mut pacer, 2.5)));
        assert_eq!(settle(&mut pacer, 100.0), 10);
        assert_eq!(settle(&mut pacer, 0.01), 1000);
    }

    #[test]
    fn batches_that_are_answered_at_once_share_their_time() {
        for together in [2_u32, 5, 20] {
            let mut pacer = Pacer::new(100, 75 * US, tuning(1.0, None), 20 * US);
            for batch in 0..1_000 {
                let keys = pacer.count();
                let all = together * US.mul_f64(f64::from(keys));
                let first = batch % together == 0;
                let own = if first { all + 20 * US } else { US };
                pacer.worked(u64::from(keys), Wait { own, since_sent: all + 20 * US, waited_for: first });
            }
            assert!((65..=85).contains(&pacer.count()), "1 us a key, {together} together: {}", pacer.count());
            let slices = pacer.slices();
            assert!((60..=110).contains(&slices.p50_us), "{together} together: {slices:?}");
        }
    }

    #[test]
    fn without_a_slice_count_stays() {
        let mut pacer = Pacer::new(100, Duration::ZERO, tuning(1.0, None), 20 * US);
        assert_eq!(settle(&mut pacer, 100.0), 100);
    }

    #[test]
    fn one_preempted_wait_does_not_move_count() {
        let mut pacer = pacer(75, 1.0, None);
        for batch in 0..60 {
            let us = if batch % 7 == 0 { 50_000 } else { 95 };
            alone(&mut pacer, 75, us * US);
        }
        assert_eq!(pacer.count(), 75);
    }

    #[test]
    fn waits_that_were_not_the_servers_do_not_make_batches_long() {
        let mut pacer = pacer(100, 1.0, None);
        let (mut calls, mut usec) = (0, 0);
        let mut counts = Vec::new();
        for batch in 0..2_000_u64 {
            // 0.75 us a key; one wait in twenty is that of a process that was not let run.
            let held = u64::from(pacer.count()) * 3 / 4;
            let late = if batch % 20 == 0 { 20_000 } else { 0 };
            let keys = u64::from(pacer.count());
            alone(&mut pacer, keys, (20 + held + late) as u32 * US);
            (calls, usec) = (calls + 1, usec + held);
            if batch % 100 == 0 {
                pacer.observe(CommandStat { calls, usec });
            }
            counts.push(pacer.count());
        }
        let most = counts[200..].iter().max();
        assert!(most.is_some_and(|&most| most <= 200), "a slice of 75 us is 100 keys: {most:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stall_of_seconds_owes_no_minute_of_rest() {
        let mut pacer = pacer(100, 0.1, None);
        alone(&mut pacer, 100, Duration::from_secs(5));
        assert_eq!(pacer.may_send(false), Err(Later { at: Instant::now() + REST_AT_MOST, to_rest: true }));
    }

    /// Share of the time that batches of 100 us took, whose way there and back takes `away`, with `depth` of them under way.
    async fn share_taken(pacer: &mut Pacer, away: Duration, depth: u32) -> f64 {
        let begun = Instant::now();
        let mut held = Duration::ZERO;
        while begun.elapsed() < Duration::from_secs(1) {
            while let Err(then) = pacer.may_send(false) {
                tokio::time::sleep_until(then.at).await;
            }
            tokio::time::advance((100 * US).max((away + 100 * US) / depth)).await;
            let wait = Wait { own: 120 * US, since_sent: 120 * US, waited_for: true };
            held += pacer.worked(100, wait);
        }
        held.as_secs_f64() / begun.elapsed().as_secs_f64()
    }

    #[tokio::test(start_paused = true)]
    async fn the_intensity_is_the_share_of_the_time_however_far_the_server_and_however_many_batches() {
        for (intensity, away, depth, share) in [
            (0.25, 20, 1, 0.25),
            (0.05, 20, 1, 0.05),
            (0.25, 1_000, 1, 0.091),
            (0.25, 1_000, 12, 0.25),
            (0.8, 1_000, 12, 0.8),
        ] {
            let taken = share_taken(&mut pacer(100, intensity, None), away * US, depth).await;
            assert!((taken / share - 1.0).abs() < 0.05, "{intensity} at {away} us, {depth} deep: {taken}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_stop_is_not_made_up_for() {
        let mut pacer = pacer(100, 0.25, None);
        alone(&mut pacer, 100, 1_020 * US);
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(pacer.may_send(false), Ok(()));
        alone(&mut pacer, 100, 2_020 * US);
        let later = Later { at: Instant::now() + 6_000 * US, to_rest: true };
        assert_eq!(pacer.may_send(false), Err(later), "8 ms less the 2 ms that are forgiven");
    }

    #[tokio::test(start_paused = true)]
    async fn at_intensity_one_nothing_is_owed() {
        let mut pacer = pacer(100, 1.0, None);
        for _ in 0..1000 {
            alone(&mut pacer, 100, 120 * US);
        }
        assert_eq!(pacer.may_send(false), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn batches_that_would_be_sent_together_are_spaced_by_their_length_but_for_two() {
        let mut pacer = pacer(75, 1.0, None);
        settle(&mut pacer, 1.0);
        let slice = pacer.expected_slice();
        assert!((60 * US..90 * US).contains(&slice), "{slice:?}");
        tokio::time::advance(Duration::from_secs(1)).await;
        let begun = Instant::now();
        let mut at = Vec::new();
        for _ in 0..6 {
            if let Err(then) = pacer.may_send(true) {
                tokio::time::advance(then.at - Instant::now()).await;
            }
            pacer.sent();
            at.push(begun.elapsed());
        }
        assert_eq!(at, [0, 0, 1, 2, 3, 4].map(|slices| slices * slice));
        assert_eq!(pacer.may_send(false), Ok(()));
    }

    #[test]
    fn commandstats_correct_the_waits() {
        let mut pacer = pacer(100, 0.5, None);
        pacer.observe(CommandStat { calls: 0, usec: 0 });
        for _ in 0..10 {
            alone(&mut pacer, 100, 120 * US);
        }
        pacer.observe(CommandStat { calls: 10, usec: 500 });
        assert_eq!(pacer.server_us_per_scan(), Some(50.0));
        assert_eq!(alone(&mut pacer, 100, 120 * US), 50 * US);
    }

    #[test]
    fn other_clients_scans_do_not_correct_ours() {
        let mut pacer = pacer(100, 0.5, None);
        pacer.observe(CommandStat { calls: 0, usec: 0 });
        alone(&mut pacer, 100, 120 * US);
        pacer.observe(CommandStat { calls: 1000, usec: 1000 });
        assert_eq!(alone(&mut pacer, 100, 120 * US), 100 * US);
    }

    /// How long so many batches of so many keys take under the ceiling alone.
    async fn seconds_of(batches: u32, keys: u64, mut pacer: Pacer) -> f64 {
        let begun = Instant::now();
        for _ in 0..batches {
            pacer.charge(keys);
            while let Err(then) = pacer.may_send(false) {
                tokio::time::sleep_until(then.at).await;
            }
        }
        begun.elapsed().as_secs_f64()
    }

    #[tokio::test(start_paused = true)]
    async fn the_ceiling_holds_over_time_and_follows_tokios_clock() {
        // 6,500 keys at 1,000 a second, less the burst of the first 100.
        let took = seconds_of(50, 130, pacer(100, 1.0, Some(1000))).await;
        assert!((6.3..6.6).contains(&took), "{took}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_high_ceiling_is_reached_though_timers_tick_in_milliseconds() {
        let took = seconds_of(10_000, 50, pacer(50, 1.0, Some(500_000))).await;
        assert!((0.98..1.05).contains(&took), "{took}");
    }
}
