//! What the server's own clock says of the batches.
//!
//! From this side, a batch takes the time between replies, which includes the way of the replies through both kernels, parsing, and
//! whatever the network does. INFO tells the server's side, a few times a second: `cmdstat_scan` the time of all SCANs, and the CPU
//! time of the main thread all of its work.
//!
//! A batch costs the server more than its SCAN: it reads the request, writes the reply, and runs the commands around SCAN. That is no
//! slice, since other clients' requests come in between, but it fills the server's time as well. Its CPU time tells how much it is.

use std::time::Duration;

use tokio::time::Instant;

use crate::engine::policy::observation::Observation;
use crate::node::info::CommandStat;

/// In the mean that is compared with the server's own, a wait counts for at most this many usual ones: a preempted process, or another
/// client's slow command, is neither SCAN's time nor the network's.
const UNUSUAL: u32 = 4;
/// The least share of a wait that is the server's.
const LEAST_SHARE: f64 = 0.05;
/// The CPU time of the server is divided among this many batches at least: beside few of them, other work counts for too much.
const BATCHES_FOR_CPU: u64 = 100;
/// For fewer commands of other clients than this in a second a far sweep is not slowed down: hardly any of them waits.
const FEW_OPS: u64 = 500;
/// What a batch costs the server beside SCAN is taken to be this much at most: more is somebody else's work.
const MOST_BESIDE: Duration = Duration::from_micros(100);

/// What INFO told. If it equals the one before, INFO was not read again.
#[derive(Debug, Clone, Copy, PartialEq)]
struct ClockReading {
    scans: Option<CommandStat>,
    cpu: Option<Duration>,
}

/// What was seen from this side since the last reading.
#[derive(Debug, Default)]
struct Since {
    batches: u64,
    keys: u64,
    waits: Duration,
}

/// Compares the server's clock with ours.
#[derive(Debug)]
pub(super) struct ServerClock {
    last: Option<(ClockReading, Instant)>,
    since: Since,
    /// About the median of the waits.
    usual: Option<Duration>,
    correction: f64,
    us_per_key: Option<f64>,
    us_per_scan: Option<f64>,
    beside: Duration,
    is_alone: bool,
}

impl Default for ServerClock {
    fn default() -> Self {
        Self {
            last: None,
            since: Since::default(),
            usual: None,
            correction: 1.0,
            us_per_key: None,
            us_per_scan: None,
            beside: Duration::ZERO,
            is_alone: false,
        }
    }
}

impl ServerClock {
    /// Server time by `cmdstat_scan` divided by server time by waits, in (0, 1]: right for the sum of many.
    pub(super) fn correction(&self) -> f64 {
        self.correction
    }

    /// Microseconds per key by the last `cmdstat_scan`; `None`: not read yet, or other clients sent SCANs as well.
    pub(super) fn us_per_key(&self) -> Option<f64> {
        self.us_per_key
    }

    /// Mean server time of one SCAN in microseconds, of any client, by `cmdstat_scan`; `None`: not read yet.
    pub(super) fn us_per_scan(&self) -> Option<f64> {
        self.us_per_scan
    }

    /// Server time of a batch beside SCAN. Zero: not known yet, or of no concern since hardly any other client waits.
    pub(super) fn beside(&self) -> Duration {
        self.beside
    }

    /// Whether other clients send so few commands that hardly any of them waits; false as long as that is unknown.
    pub(super) fn is_alone(&self) -> bool {
        self.is_alone
    }

    /// Adds the wait for a batch of `keys`.
    pub(super) fn waited(&mut self, keys: u64, wait: Duration) {
        let usual = self.usual.get_or_insert(wait);
        self.since.batches += 1;
        self.since.keys += keys;
        self.since.waits += wait.min(*usual * UNUSUAL);
        *usual = if wait > *usual { *usual + *usual / 8 + Duration::from_micros(1) } else { *usual - *usual / 8 };
    }

    /// Adds an observation. `slice`: what SCAN is expected to take where the server does not tell.
    pub(super) fn observe(&mut self, seen: &Observation, slice: Duration) {
        self.is_alone = seen.ops.is_some_and(|ops| ops < FEW_OPS);
        let (now, reading) = (Instant::now(), ClockReading { scans: seen.scan_stat, cpu: seen.cpu });
        if self.last.is_some_and(|(last, _)| last == reading) {
            // The observation is new, but only its latency.
            return;
        }
        let since = std::mem::take(&mut self.since);
        let Some((last, at)) = self.last.replace((reading, now)) else { return };
        if let (Some(before), Some(after)) = (last.scans, reading.scans) {
            self.learn_scans(before, after, &since);
        }
        if self.is_alone {
            self.beside = Duration::ZERO;
        } else if let (Some(before), Some(after), Some(others)) = (last.cpu, reading.cpu, seen.others_cpu) {
            let spent = after.saturating_sub(before).saturating_sub((now - at).mul_f64(others));
            self.learn_cpu(spent, since.batches, slice);
        }
    }

    fn learn_scans(&mut self, before: CommandStat, after: CommandStat, since: &Since) {
        let (calls, usec) = (after.calls.saturating_sub(before.calls), after.usec.saturating_sub(before.usec));
        if calls == 0 {
            return;
        }
        let mean = usec as f64 / calls as f64;
        self.us_per_scan = Some(mean);
        // If other clients sent SCANs as well, the mean is not that of this sweep.
        let Since { batches, keys, waits } = *since;
        let ours = batches > 0 && calls <= batches + batches / 5 + 2;
        if ours && !waits.is_zero() {
            let by_wait = waits.as_secs_f64() * 1e6 / batches as f64;
            self.correction = (mean / by_wait).clamp(LEAST_SHARE, 1.0);
        }
        self.us_per_key = (ours && keys > 0).then(|| mean * batches as f64 / keys as f64);
    }

    /// `spent`: CPU time of the main thread but for that of other clients.
    fn learn_cpu(&mut self, spent: Duration, batches: u64, slice: Duration) {
        if batches < BATCHES_FOR_CPU {
            return;
        }
        let scan_us = self.us_per_scan.unwrap_or(slice.as_secs_f64() * 1e6);
        let beside_us = spent.as_secs_f64() * 1e6 / batches as f64 - scan_us;
        let beside = Duration::try_from_secs_f64(beside_us * 1e-6).unwrap_or_default().min(MOST_BESIDE);
        // The load by other clients is measured less often than the CPU time: the mean of some readings is right.
        self.beside = if self.beside.is_zero() { beside } else { (self.beside * 3 + beside) / 4 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// Ten batches of 100 keys that took 100 us each, as seen from here, and then this reading after one of zeros.
    fn after(calls: u64, usec: u64) -> ServerClock {
        let mut clock = ServerClock::default();
        clock.observe(&Observation::of_scans(0, 0), US);
        (0..10).for_each(|_| clock.waited(100, 100 * US));
        clock.observe(&Observation::of_scans(calls, usec), US);
        clock
    }

    #[test]
    fn commandstats_correct_the_waits() {
        let clock = after(10, 500);
        assert_eq!((clock.correction(), clock.us_per_key(), clock.us_per_scan()), (0.5, Some(0.5), Some(50.0)));
    }

    #[test]
    fn other_clients_scans_do_not_correct_ours() {
        let clock = after(1_000, 1_000);
        assert_eq!((clock.correction(), clock.us_per_key(), clock.us_per_scan()), (1.0, None, Some(1.0)));
    }

    #[test]
    fn a_reading_that_is_seen_twice_counts_once() {
        let mut clock = after(10, 500);
        (0..10).for_each(|_| clock.waited(100, 100 * US));
        clock.observe(&Observation { latency: Some(7 * US), ..Observation::of_scans(10, 500) }, US);
        clock.observe(&Observation::of_scans(20, 1_000), US);
        assert_eq!((clock.correction(), clock.us_per_key()), (0.5, Some(0.5)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_work_beside_scan_is_the_batches_share_of_the_cpu_time_without_that_for_other_clients() {
        let mut clock = ServerClock::default();
        let at = |turn: u32, ops| Observation {
            // 75 us of SCAN and 25 us beside it for each batch, and 50 ms for others.
            cpu: Some(turn * (1_000 * 100 * US + Duration::from_millis(50))),
            others_cpu: Some(0.2),
            ops: Some(ops),
            ..Observation::of_scans(u64::from(turn) * 1_000, u64::from(turn) * 75_000)
        };
        for turn in 0..20 {
            clock.observe(&at(turn, 10_000), 75 * US);
            (0..1_000).for_each(|_| clock.waited(75, 95 * US));
            tokio::time::advance(Duration::from_millis(250)).await;
        }
        assert!((24 * US..27 * US).contains(&clock.beside()) && !clock.is_alone(), "{:?}", clock.beside());
        clock.observe(&at(20, 100), 75 * US);
        assert!(clock.is_alone() && clock.beside().is_zero(), "there is nobody to wait");
    }
}
