//! How large the next batch is, and how long to rest before it.
//!
//! A foreground request waits behind one batch at most, so what it feels is the length of that batch and not how many
//! there are. Three rules follow:
//!
//! 1. COUNT is steered so that one batch holds the master for about `max_slice`. It is never raised to go faster.
//! 2. Rest leaves the master's CPU to others: after work `w` at intensity `i` the sweep owes `w / i - w`.
//! 3. The ceiling in keys per second is governor's, with a burst of one batch, or of what the ceiling allows in 5 ms: a timer
//!    ticks in milliseconds, and with less the sweep would oversleep and never come near a high ceiling.
//!
//! The server's time for a batch is what `cmdstat_scan` says, as far as it can be known: its mean corrects ours. Ours is the
//! time since the answer before it, but no more than since it was sent, less the smallest PING round trip. The replies' way
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

/// COUNT is reconsidered after this many batches, by the median cost among them: one preempted round trip must not
/// move it.
const STEER_EVERY: usize = 15;

/// Rest that is owed is paid once it reaches this much: tokio's timer ticks in milliseconds, and shorter sleeps would
/// each be rounded up to one.
const REST_AT_LEAST: Duration = Duration::from_millis(2);

/// The burst of the ceiling is a second's keys over this: 5 ms of them.
const BURSTS_PER_SEC: u32 = 200;

/// A wait counts for no more than so many usual ones where the mean of waits is compared with the server's own: a process that was
/// not let run, or somebody's slow command, is neither SCAN's time nor the network's.
const UNUSUAL: u32 = 4;

/// The most rest that one batch can owe: a wait of seconds is seldom its work, and nobody is listened to while it rests.
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
    /// Microseconds per key of the last batches, each with the one before it.
    costs: Vec<f64>,
    /// How long the batch before held the server, and its keys.
    before: (Duration, u64),
    /// Server time by `cmdstat_scan` over server time by our waits, in (0, 1].
    correction: f64,
    owed: Duration,
    /// Rest that was longer than owed, since a timer ticks in milliseconds. Counts towards the next.
    ahead: Duration,
    ceiling: Option<Ceiling>,
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
            costs: Vec::with_capacity(STEER_EVERY),
            before: (Duration::ZERO, 0),
            correction: 1.0,
            owed: Duration::ZERO,
            ahead: Duration::ZERO,
            ceiling: tuning.max_keys_per_sec.map(|keys| Ceiling::new(keys, count)),
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

    /// Takes one exchange with the server in: we waited so long for `keys` to be looked at, since the answer before it or since it
    /// was sent, and so long in all since it was sent. Returns how long it held the server.
    pub fn worked(&mut self, keys: u64, waited: Duration, since_sent: Duration) -> Duration {
        // No answer comes sooner than by the shortest way there and back, whatever PING said at the start; and the server cannot
        // work on what has not come yet.
        self.floor = self.floor.min(since_sent);
        let slice = waited.min(since_sent - self.floor);
        if keys > 0 {
            // A touch is no SCAN: `cmdstat_scan` does not know it.
            let usual = self.usual.get_or_insert(slice);
            self.since_stat.0 += 1;
            self.since_stat.1 += slice.min(*usual * UNUSUAL);
            *usual = if slice > *usual { *usual + *usual / 8 + Duration::from_micros(1) } else { *usual - *usual / 8 };
        }
        let held = slice.mul_f64(self.correction);
        self.slices.saturating_record((held.as_micros() as u64).max(1));
        let rest = held.div_f64(self.intensity).saturating_sub(held).min(REST_AT_MOST);
        self.owed += rest.saturating_sub(self.ahead);
        self.ahead = self.ahead.saturating_sub(rest);
        if keys > 0 && !self.max_slice.is_zero() {
            // A server writes its answers once it has worked off what had come, so that of two batches one seems to take both their
            // time and the other none.
            let (before, keys_before) = std::mem::replace(&mut self.before, (held, keys));
            self.costs.push((before + held).as_secs_f64() * 1e6 / (keys_before + keys) as f64);
            if self.costs.len() == STEER_EVERY {
                self.steer();
            }
        }
        held
    }

    fn steer(&mut self) {
        self.costs.sort_by(f64::total_cmp);
        let median = self.costs[STEER_EVERY / 2].max(0.01);
        self.costs.clear();
        let wanted = self.max_slice.as_secs_f64() * 1e6 / median;
        // At most doubled or halved at once: the cost per key of a small batch says little about a large one.
        let bounded = wanted.clamp(f64::from(self.count) / 2.0, f64::from(self.count) * 2.0);
        // Within a tenth it stays: a steady COUNT is easier to read in a slow log.
        if (bounded / f64::from(self.count) - 1.0).abs() > 0.1 {
            self.count = (bounded as u32).clamp(*COUNT_RANGE.start(), *COUNT_RANGE.end());
        }
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

    /// Whether the next batch needs to wait neither for a rest nor for the ceiling under these limits, so that it may be sent
    /// before the last one's sums are done.
    pub fn runs_free(&self, tuning: &Tuning) -> bool {
        *tuning == self.tuning && self.ceiling.is_none() && self.rest_due().is_none()
    }

    /// How long to rest now, or `None` where nothing worth a sleep is owed.
    pub fn rest_due(&self) -> Option<Duration> {
        (self.owed >= REST_AT_LEAST).then_some(self.owed)
    }

    /// Takes a rest in. What a sleep was longer than owed is made up for, but no more than one rest: a process that was
    /// stopped for a minute must not race for the next.
    pub fn rested(&mut self, slept: Duration) {
        self.ahead = slept.saturating_sub(self.owed).min(REST_AT_LEAST);
        self.owed = self.owed.saturating_sub(slept);
    }

    /// The sweep stood still for another reason, which was rest as well.
    pub fn stood_still(&mut self, slept: Duration) {
        self.owed = self.owed.saturating_sub(slept);
    }

    /// How long the ceiling makes us wait before `keys` that were just looked at are paid for, or `None` once they are.
    /// Ask again after the wait.
    pub fn ceiling_wait(&self, keys: &mut u32) -> Option<Duration> {
        let ceiling = self.ceiling.as_ref()?;
        while let Some(left) = NonZeroU32::new(*keys) {
            // A batch may hold more keys than one burst: it is paid for in parts.
            let part = left.min(ceiling.burst);
            match ceiling.limiter.check_n(part).expect("a part is never larger than the burst") {
                Ok(()) => *keys -= part.get(),
                Err(early) => return Some(early.wait_time_from(ceiling.limiter.clock().now())),
            }
        }
        None
    }

    /// How long batches were, all since this pacer was made.
    pub fn slices(&self) -> SliceSummary {
        SliceSummary {
            p50_us: self.slices.value_at_quantile(0.5),
            p99_us: self.slices.value_at_quantile(0.99),
            max_us: self.slices.max(),
        }
    }

    /// Forgets how long batches were: a new DB begins.
    pub fn reset_slices(&mut self) {
        self.slices.reset();
    }

    /// Server time of one SCAN in microseconds by `cmdstat_scan`, where it was read.
    pub fn server_us_per_scan(&self) -> Option<f64> {
        self.server_us_per_scan
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::throttle::Limits;

    const US: Duration = Duration::from_micros(1);

    fn pacer(count: u32, intensity: f64, max_keys_per_sec: Option<u32>) -> Pacer {
        Pacer::new(count, 75 * US, tuning(intensity, max_keys_per_sec), 20 * US)
    }

    fn tuning(intensity: f64, max_keys_per_sec: Option<u32>) -> Tuning {
        Tuning { intensity, min_intensity: intensity, max_keys_per_sec, limits: Limits::NONE }
    }

    /// A batch that nothing was under way beside.
    fn alone(pacer: &mut Pacer, keys: u64, waited: Duration) -> Duration {
        pacer.worked(keys, waited, waited)
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
    fn two_batches_that_are_answered_at_once_are_half_of_their_time_each() {
        let mut pacer = Pacer::new(100, 75 * US, tuning(1.0, None), 20 * US);
        for batch in 0..200 {
            let keys = pacer.count();
            let both = 2 * US.mul_f64(f64::from(keys));
            let waited = if batch % 2 == 0 { both + 20 * US } else { US };
            pacer.worked(u64::from(keys), waited, both + 20 * US);
        }
        assert!((65..=85).contains(&pacer.count()), "1 us a key: {}", pacer.count());
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

    #[test]
    fn a_stall_of_seconds_owes_no_minute_of_rest() {
        let mut pacer = pacer(100, 0.1, None);
        alone(&mut pacer, 100, Duration::from_secs(5));
        assert_eq!(pacer.rest_due(), Some(REST_AT_MOST));
    }

    #[test]
    fn rest_is_work_over_intensity_less_work() {
        let mut pacer = pacer(100, 0.25, None);
        assert_eq!(pacer.rest_due(), None);
        for _ in 0..10 {
            alone(&mut pacer, 100, 120 * US);
        }
        assert_eq!(pacer.rest_due(), Some(3000 * US));
        pacer.rested(4000 * US);
        assert_eq!(pacer.rest_due(), None);
        for _ in 0..10 {
            alone(&mut pacer, 100, 120 * US);
        }
        assert_eq!(pacer.rest_due(), Some(2000 * US), "the last rest was 1 ms too long");
        pacer.rested(Duration::from_secs(60));
        for _ in 0..20 {
            alone(&mut pacer, 100, 120 * US);
        }
        assert_eq!(pacer.rest_due(), Some(4000 * US), "a long stop is not made up for");
    }

    #[test]
    fn at_intensity_one_nothing_is_owed() {
        let mut pacer = pacer(100, 1.0, None);
        for _ in 0..1000 {
            alone(&mut pacer, 100, 120 * US);
        }
        assert_eq!(pacer.rest_due(), None);
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
    async fn seconds_of(batches: u32, keys: u32, pacer: Pacer) -> f64 {
        let begun = Instant::now();
        for _ in 0..batches {
            let mut unpaid = keys;
            while let Some(wait) = pacer.ceiling_wait(&mut unpaid) {
                tokio::time::sleep(wait).await;
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
