//! How large the next batch is, and when it may be sent.
//!
//! A request of another client waits behind one batch at most. So what that client notices is the length of a batch, and not how many
//! batches there are. Four rules follow:
//!
//! 1. COUNT is steered so that one batch holds the master for about `max_slice`. It is never raised to go faster.
//! 2. Rest leaves the master's CPU to other clients: batches that held it for `w` in all take at least `w / intensity`.
//! 3. The ceiling in keys per second is enforced by governor, with a burst of one batch, or of what the ceiling allows in 5 ms: timers
//!    tick in milliseconds, and with a smaller burst the sweep would oversleep and never reach a high ceiling.
//! 4. If several batches are under way they are spaced by the length of one: a server finishes everything that has arrived before it
//!    reads from other clients, so to them batches that arrive together are one long slice. This process is seldom on time to fifty
//!    microseconds, so a delay is made up for, by one batch; by three where hardly any other client could wait for them.
//!
//! The server's time for a batch is measured from this side: the time since the previous reply, but no more than since the batch was
//! sent, less the smallest PING round trip. It is seldom less than the server worked; [`server_clock`](super::server_clock) corrects it.

use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use hdrhistogram::Histogram;
use tokio::time::Instant;

use crate::engine::policy::observation::Observation;
use crate::engine::policy::server_clock::ServerClock;
use crate::model::progress::SliceSummary;
use crate::settings::{COUNT_RANGE, Tuning};

/// COUNT is adjusted after this many groups of replies, by their median cost: one round trip with a preempted process must not change
/// it.
const STEER_EVERY: usize = 15;

/// Replies that came together are one group. If this side is slower than the server a group never ends, and is cut at this size.
const GROUP_MOST: u32 = 32;

/// Rests are collected until they reach this length: tokio's timer ticks in milliseconds, and each shorter sleep would be rounded up to
/// one. A sleep that was too long is made up for by at most this much.
const REST_AT_LEAST: Duration = Duration::from_millis(2);

/// The burst of the ceiling is the keys of a second divided by this: those of 5 ms.
const BURSTS_PER_SEC: u32 = 200;

/// The longest rest that may be owed: a wait of seconds is seldom the work of one batch, and no observation is read during a rest.
const REST_AT_MOST: Duration = Duration::from_secs(1);

/// Where the server's own time is known, waits adjust COUNT only if a key seems to cost more than so many times that: on a network
/// that wavers by more than a slice they say little, and the server's time is read again in a quarter of a second.
const DEARER: f64 = 3.0;

/// How many batches may follow at once to make up for a delay of this process: in general, and while hardly any other client sends
/// commands, or nothing is to depend on other clients.
const MADE_UP_FOR: (u32, u32) = (1, 3);

/// The longest slice that the histogram can hold, in microseconds: ten minutes.
const HISTOGRAM_TOP_US: u64 = 600_000_000;

/// Tokio's clock for governor, so that a test that pauses tokio's time pauses the ceiling too.
#[derive(Debug, Clone)]
struct TokioClock(Instant);

impl Clock for TokioClock {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// The limiter, and its burst in keys.
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

    /// Pays for as many of the keys as the ceiling allows now. Returns how long to wait for more; `None`: all are paid for.
    fn pay(&self, keys: &mut u64) -> Option<Duration> {
        while *keys > 0 {
            // A batch may have more keys than one burst: it is paid for in parts.
            let part = NonZeroU32::new(u32::try_from(*keys).unwrap_or(u32::MAX))?.min(self.burst);
            match self.limiter.check_n(part).expect("a part is never larger than the burst") {
                Ok(()) => *keys -= u64::from(part.get()),
                Err(early) => return Some(early.wait_time_from(self.limiter.clock().now())),
            }
        }
        None
    }
}

/// How long the reply to one batch took.
#[derive(Debug, Clone, Copy)]
pub struct Wait {
    /// Since the batch was sent or the last reply came on any connection, whichever is later: the server cannot have worked on the
    /// batch for longer.
    pub own: Duration,
    /// Since the batch was sent, network included.
    pub since_sent: Duration,
    /// Whether the reply had to be awaited. Otherwise it came together with the previous one.
    pub waited_for: bool,
}

/// The next batch may not be sent yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Later {
    /// The time at which [`Pacer::may_send`] is worth asking again.
    pub at: Instant,
    /// Whether the reason is rest or the ceiling; otherwise the batch is only spaced.
    pub to_rest: bool,
}

/// A group: replies between which this side did not have to wait, cut at [`GROUP_MOST`].
#[derive(Debug, Default)]
struct Group {
    /// How long they held the server, together.
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
    /// Share of the master's time that batches may take now, at most `tuning.intensity`.
    intensity: f64,
    /// The smallest round trip of a PING: the share of the network and both kernels in a wait.
    floor: Duration,
    /// Replies of the group that has not ended yet.
    group: Group,
    /// Microseconds per key of the last groups.
    costs: Vec<f64>,
    /// What a key was taken to cost when COUNT was last adjusted.
    cost_us: Option<f64>,
    /// What the server's own clock says.
    clock: ServerClock,
    /// When all rest that is owed will be paid.
    rested_at: Instant,
    /// Whether rest is being paid now.
    resting: bool,
    /// When the next batch may follow if batches are spaced.
    spaced_at: Instant,
    ceiling: Option<Ceiling>,
    /// Keys that were scanned and that the ceiling has not allowed for yet.
    unpaid: u64,
    slices: Histogram<u64>,
}

impl Pacer {
    /// A pacer that begins with `count`, and keeps it if `max_slice` is zero. `floor`: the smallest round trip of a PING.
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
            clock: ServerClock::default(),
            rested_at: Instant::now(),
            resting: false,
            spaced_at: Instant::now(),
            ceiling: tuning.max_keys_per_sec.map(|keys| Ceiling::new(keys, count)),
            unpaid: 0,
            // Two digits keep the histogram below 20 kB, and a slice is measured no better than to a per cent.
            slices: Histogram::new_with_bounds(1, HISTOGRAM_TOP_US, 2).expect("the bounds are constants"),
        }
    }

    /// COUNT of the next batch.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The smallest round trip so far, of a PING or of a batch.
    pub fn floor(&self) -> Duration {
        self.floor
    }

    /// Sets the shortest round trip: it may differ on a new connection.
    pub fn set_floor(&mut self, floor: Duration) {
        self.floor = floor;
    }

    /// Applies limits. Returns whether they have changed.
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

    /// Share of the master's time that batches may take now.
    pub fn intensity(&self) -> f64 {
        self.intensity
    }

    /// Sets the share of the master's time that batches may take now.
    pub fn set_intensity(&mut self, intensity: f64) {
        self.intensity = intensity;
    }

    /// Adds the reply to a SCAN that visited `keys`. Returns how long it held the server.
    pub fn worked(&mut self, keys: u64, wait: Wait) -> Duration {
        let slice = self.slice_of(wait);
        self.clock.waited(keys, slice);
        let held = slice.mul_f64(self.clock.correction());
        if wait.waited_for || self.group.batches >= GROUP_MOST {
            self.close_group();
        }
        self.group.held += held;
        self.group.keys += keys.max(1);
        self.group.batches += 1;
        self.owe(held);
        held
    }

    /// Charges scanned keys to the ceiling, which delays the next batch until they are allowed for.
    pub fn charge(&mut self, keys: u64) {
        if self.ceiling.is_some() {
            self.unpaid += keys;
        }
    }

    /// Adds the reply to a request that does not show the cost of a key: a touch, which `cmdstat_scan` does not include, or the second
    /// SCAN of a range. Returns how long it held the server.
    pub fn worked_beside(&mut self, wait: Wait) -> Duration {
        let held = self.slice_of(wait).mul_f64(self.clock.correction());
        self.slices.saturating_record(micros(held));
        self.owe(held);
        held
    }

    fn slice_of(&mut self, wait: Wait) -> Duration {
        // A reply that came sooner than the shortest PING shows that the round trip is shorter. The server cannot work on a batch before
        // it has arrived.
        self.floor = self.floor.min(wait.since_sent);
        wait.own.min(wait.since_sent - self.floor)
    }

    fn owe(&mut self, held: Duration) {
        if self.intensity < 1.0 {
            let now = Instant::now();
            // A sleep that was too long is made up for, but by no more than one rest: a process that was suspended for a minute must
            // not send without rest for the next minute.
            let from = now.checked_sub(REST_AT_LEAST).map_or(self.rested_at, |earliest| self.rested_at.max(earliest));
            self.rested_at = (from + held.div_f64(self.intensity)).min(now + REST_AT_MOST);
        }
    }

    /// Ends a group. A server writes its replies when it has finished everything that had arrived, so that one of several batches seems
    /// to take the time of all and the others none: each counts as the mean of its group.
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
        let by_waits = self.costs[self.costs.len() / 2].max(0.03);
        let cost = self.clock.us_per_key().map_or(by_waits, |by_server| by_server.max(by_waits / DEARER));
        self.costs.clear();
        self.cost_us = Some(cost);
        if self.max_slice.is_zero() {
            return;
        }
        let wanted = self.max_slice.as_secs_f64() * 1e6 / cost;
        // At most doubled or halved: the cost per key of a small batch says little about that of a large one.
        let bounded = wanted.clamp(f64::from(self.count) / 2.0, f64::from(self.count) * 2.0);
        // No change below a tenth: a steady COUNT is easier to read in a slow log.
        if (bounded / f64::from(self.count) - 1.0).abs() > 0.1 {
            self.count = (bounded as u32).clamp(*COUNT_RANGE.start(), *COUNT_RANGE.end());
        }
    }

    /// How long the next batch will probably hold the server; zero before the first adjustment.
    pub fn expected_slice(&self) -> Duration {
        let us = self.cost_us.map_or(0.0, |cost| cost * f64::from(self.count));
        Duration::from_nanos((us * 1e3) as u64)
    }

    /// How long the next batch will probably keep the server's main thread busy, SCAN and everything around it; only SCAN where other
    /// clients send few commands. Zero before the first adjustment.
    pub fn expected_work(&self) -> Duration {
        let slice = self.expected_slice();
        if slice.is_zero() { slice } else { slice + self.clock.beside() }
    }

    /// Adds an observation, with what it says of the server's own time.
    pub(crate) fn observe(&mut self, seen: &Observation) {
        self.clock.observe(seen, self.expected_slice());
    }

    /// Checks that the next batch may be sent now. `spaced`: batches keep the distance of a slice.
    ///
    /// # Errors
    /// When to ask again.
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

    /// Notes that a batch was sent now: the next spaced batch waits for one expected slice.
    pub fn sent(&mut self) {
        let (now, slice) = (Instant::now(), self.expected_slice());
        let nobody_waits = self.clock.is_alone() || !self.tuning.depends_on_others();
        let delay = slice * if nobody_waits { MADE_UP_FOR.1 } else { MADE_UP_FOR.0 };
        let from = now.checked_sub(delay).map_or(self.spaced_at, |earliest| self.spaced_at.max(earliest));
        self.spaced_at = from + slice;
    }

    /// How long batches held the server since the last [`Pacer::reset_slices`].
    pub fn slices(&mut self) -> SliceSummary {
        self.close_group();
        SliceSummary {
            p50_us: self.slices.value_at_quantile(0.5),
            p99_us: self.slices.value_at_quantile(0.99),
            max_us: self.slices.max(),
        }
    }

    /// Forgets how long batches held the server, when a new DB begins.
    pub fn reset_slices(&mut self) {
        self.group = Group::default();
        self.slices.reset();
    }

    /// Mean server time of one SCAN in microseconds, by `cmdstat_scan`; `None`: not read yet.
    pub fn server_us_per_scan(&self) -> Option<f64> {
        self.clock.us_per_scan()
    }
}

fn micros(span: Duration) -> u64 {
    (span.as_micros() as u64).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::bounds::Bounds;
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

    /// The reply to a batch while no other is under way.
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
            // 0.75 us a key; in one wait in twenty the process was preempted.
            let held = u64::from(pacer.count()) * 3 / 4;
            let late = if batch % 20 == 0 { 20_000 } else { 0 };
            let keys = u64::from(pacer.count());
            alone(&mut pacer, keys, (20 + held + late) as u32 * US);
            (calls, usec) = (calls + 1, usec + held);
            if batch % 100 == 0 {
                pacer.observe(&Observation::of_scans(calls, usec));
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

    /// Share of the time that batches of 100 us take, with a round trip of `away` and `depth` batches under way.
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
    async fn a_suspended_process_does_not_make_up_for_the_time() {
        let mut pacer = pacer(100, 0.25, None);
        alone(&mut pacer, 100, 1_020 * US);
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(pacer.may_send(false), Ok(()));
        alone(&mut pacer, 100, 2_020 * US);
        let later = Later { at: Instant::now() + 6_000 * US, to_rest: true };
        assert_eq!(pacer.may_send(false), Err(later), "8 ms less the 2 ms that are made up for");
    }

    #[tokio::test(start_paused = true)]
    async fn at_intensity_one_nothing_is_owed() {
        let mut pacer = pacer(100, 1.0, None);
        for _ in 0..1000 {
            alone(&mut pacer, 100, 120 * US);
        }
        assert_eq!(pacer.may_send(false), Ok(()));
    }

    /// When six spaced batches are sent after a second without any, in slices.
    async fn sent_after_a_delay(pacer: &mut Pacer) -> [u32; 6] {
        let slice = pacer.expected_slice();
        assert!((60 * US..90 * US).contains(&slice), "{slice:?}");
        tokio::time::advance(Duration::from_secs(1)).await;
        let begun = Instant::now();
        let mut at = [0; 6];
        for at in &mut at {
            if let Err(then) = pacer.may_send(true) {
                tokio::time::advance(then.at - Instant::now()).await;
            }
            pacer.sent();
            *at = (begun.elapsed().as_secs_f64() / slice.as_secs_f64()).round() as u32;
        }
        assert_eq!(pacer.may_send(false), Ok(()));
        at
    }

    #[tokio::test(start_paused = true)]
    async fn batches_are_spaced_by_their_length_and_a_delay_is_made_up_for_by_one() {
        let mut pacer = Pacer::new(75, 75 * US, Tuning { min_intensity: 0.5, ..tuning(1.0, None) }, 20 * US);
        settle(&mut pacer, 1.0);
        assert_eq!(sent_after_a_delay(&mut pacer).await, [0, 0, 1, 2, 3, 4]);
        pacer.observe(&Observation { ops: Some(10_000), ..Observation::of_scans(0, 0) });
        assert_eq!(sent_after_a_delay(&mut pacer).await, [0, 0, 1, 2, 3, 4]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_delay_is_made_up_for_by_three_batches_where_nobody_waits() {
        let mut pacer = Pacer::new(75, 75 * US, Tuning { min_intensity: 0.5, ..tuning(1.0, None) }, 20 * US);
        settle(&mut pacer, 1.0);
        pacer.observe(&Observation { ops: Some(100), ..Observation::of_scans(0, 0) });
        assert_eq!(sent_after_a_delay(&mut pacer).await, [0, 0, 0, 0, 1, 2]);
        let mut pacer = self::pacer(75, 1.0, None);
        settle(&mut pacer, 1.0);
        assert_eq!(sent_after_a_delay(&mut pacer).await, [0, 0, 0, 0, 1, 2], "nothing depends on other clients");
    }

    #[test]
    fn on_a_network_that_wavers_by_more_than_a_slice_count_stays_where_the_servers_clock_wants_it() {
        fastrand::seed(7);
        let mut pacer = pacer(100, 1.0, None);
        let (mut calls, mut usec, mut counts) = (0, 0.0, Vec::new());
        for batch in 0..20_000_u32 {
            let keys = pacer.count();
            // 1 us a key; the way takes 60 us more on the average, and often far less.
            let (held, way) = (f64::from(keys), -60.0 * fastrand::f64().max(1e-9).ln());
            let waited = 20 * US + US.mul_f64(held + way);
            alone(&mut pacer, u64::from(keys), waited);
            (calls, usec) = (calls + 1, usec + held);
            if batch % 1_000 == 0 {
                pacer.observe(&Observation::of_scans(calls, usec as u64));
            }
            if batch > 2_000 {
                counts.push(pacer.count());
            }
        }
        let (low, high) = (counts.iter().min(), counts.iter().max());
        assert!(low >= Some(&60) && high <= Some(&90), "{low:?} to {high:?} where 75 take the slice");
    }

    /// How long `batches` of `keys` take if only the ceiling limits them.
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
