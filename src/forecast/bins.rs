//! The time ahead in parts that are round in local time, and the spans in which far more keys expire than around them.

use std::ops::Range;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::forecast::estimate::Estimate;

/// The time ahead is cut into so many parts at most.
const MOST: u64 = 144;
/// How long a part may be, in seconds: what people call round.
const ROUND_S: [u64; 19] =
    [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1_800, 3_600, 7_200, 10_800, 21_600, 43_200, 86_400, 604_800];

/// How the time ahead is cut.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Bins {
    /// Now: times ahead are counted from here.
    pub at: Timestamp,
    /// Where the first part begins: at or before now, at a round time.
    pub begin: Timestamp,
    /// Length of each part: one of [`ROUND_S`], or more if `MOST` parts do not reach far enough.
    pub step: Duration,
    /// Number of parts, from `begin` to the end of the time ahead.
    pub number: usize,
}

impl Bins {
    /// Parts that are round in a zone, from now to `ahead`.
    pub(crate) fn new(at: Timestamp, ahead: Duration, zone: &TimeZone) -> Self {
        let ahead_s = ahead.as_secs().max(1);
        let step = ROUND_S.into_iter().find(|step| ahead_s.div_ceil(*step) <= MOST).unwrap_or(ahead_s.div_ceil(MOST));
        let step_ms = i64::try_from(step * 1000).unwrap_or(i64::MAX);
        let offset_ms = i64::from(zone.to_offset(at).seconds()) * 1000;
        let since = (at.as_millisecond() + offset_ms).rem_euclid(step_ms);
        let begin = Timestamp::from_millisecond(at.as_millisecond() - since).unwrap_or(at);
        let number = (ahead.as_millis() as u64 + since as u64).div_ceil(step * 1000);
        Self { at, begin, step: Duration::from_secs(step), number: usize::try_from(number).unwrap_or(usize::MAX) }
    }

    /// The part in which a key with this TTL expires; `None`: behind the last one.
    pub(crate) fn of(&self, ttl: Duration) -> Option<usize> {
        let since = Duration::try_from(self.at.duration_since(self.begin)).unwrap_or_default() + ttl;
        let bin = usize::try_from(since.as_millis() / self.step.as_millis().max(1)).unwrap_or(usize::MAX);
        (bin < self.number).then_some(bin)
    }

    /// When a part begins; of the number of parts, when the last one ends.
    pub(crate) fn begins(&self, bin: usize) -> Timestamp {
        let since = self.step * u32::try_from(bin).unwrap_or(u32::MAX);
        self.begin.checked_add(jiff::SignedDuration::try_from(since).unwrap_or_default()).unwrap_or(Timestamp::MAX)
    }
}

/// A span in which far more keys expire than before and after it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Peak {
    /// Indices of its parts in the histogram.
    pub bins: Range<usize>,
    /// Keys that expire in it.
    pub keys: Estimate,
}

/// So many parts may be one peak.
const RUNS: [usize; 4] = [1, 2, 3, 6];
/// A peak is so many times what expires in as long a time before it, and after it.
const TIMES: f64 = 2.0;
/// It is above those by so many standard errors,
const CLEAR: f64 = 5.0;
/// and by this share of all keys with a TTL.
const SHARE: f64 = 0.02;
/// A longer run has to hold so much more than a shorter one inside it.
const LONGER: f64 = 1.15;
/// The most peaks that a forecast names.
const NAMED: usize = 5;

/// The peaks, the largest first. A run has a neighbour on either side: what stands at the edge cannot be told from a decay.
pub(crate) fn peaks(bins: &[Estimate], with_ttl: f64) -> Vec<Peak> {
    let sum = |range: Range<usize>| bins[range].iter().copied().sum::<Estimate>();
    let mut found: Vec<Peak> = Vec::new();
    for run in RUNS {
        // The first part is not whole.
        for from in run + 1..bins.len().saturating_sub(2 * run - 1) {
            let (span, before, after) = (from..from + run, sum(from - run..from), sum(from + run..from + 2 * run));
            let keys = sum(span.clone());
            let beside = if before.keys > after.keys { before } else { after };
            let above = keys.keys - beside.keys;
            let clear = CLEAR * keys.standard_error().hypot(beside.standard_error());
            if keys.keys >= TIMES * beside.keys && above > clear && above > SHARE * with_ttl && above > 0.0 {
                found.push(Peak { bins: span, keys });
            }
        }
    }
    // Of those that overlap the one with most keys stays, where a longer one counts for less.
    let weight = |peak: &Peak| {
        let longer = RUNS.iter().position(|run| *run == peak.bins.len()).unwrap_or_default();
        peak.keys.keys / LONGER.powi(longer as i32)
    };
    found.sort_by(|one, other| weight(other).total_cmp(&weight(one)));
    let mut peaks: Vec<Peak> = Vec::new();
    for peak in found {
        let overlaps = |other: &Peak| peak.bins.start < other.bins.end && other.bins.start < peak.bins.end;
        if !peaks.iter().any(overlaps) && peaks.len() < NAMED {
            peaks.push(peak);
        }
    }
    peaks.sort_by(|one, other| other.keys.keys.total_cmp(&one.keys.keys));
    peaks
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn parts_are_round_in_local_time() {
        let zone = TimeZone::get("Asia/Kolkata").unwrap();
        let at: Timestamp = "2026-01-01T10:07:30Z".parse().unwrap();
        let bins = Bins::new(at, 24 * 3600 * SECOND, &zone);
        assert_eq!((bins.step, bins.begin), (600 * SECOND, "2026-01-01T10:00:00Z".parse().unwrap()));
        assert_eq!(bins.number, 145, "the first one has begun");
        let hours = Bins::new(at, 100 * 3600 * SECOND, &zone);
        assert_eq!(
            (hours.step, hours.begin),
            (3600 * SECOND, "2026-01-01T09:30:00Z".parse().unwrap()),
            "half past, in UTC"
        );
        assert_eq!(
            (bins.of(Duration::ZERO), bins.of(149 * SECOND), bins.of(150 * SECOND)),
            (Some(0), Some(0), Some(1))
        );
        assert_eq!(bins.of(25 * 3600 * SECOND), None);
        assert_eq!(bins.begins(1), "2026-01-01T10:10:00Z".parse().unwrap());
    }

    /// Keys that expire at these times, looked at in pieces of which every tenth was drawn.
    fn sampled(ttls: impl Iterator<Item = f64>) -> Vec<Estimate> {
        let bins = Bins::new("2026-01-01T10:00:00Z".parse().unwrap(), 24 * 3600 * SECOND, &TimeZone::UTC);
        let mut counts = vec![0_f64; bins.number];
        for ttl in ttls.filter(|ttl| *ttl >= 0.0) {
            if let Some(bin) = bins.of(Duration::from_secs_f64(ttl)) {
                counts[bin] += f64::from(u8::from(fastrand::u8(..10) == 0));
            }
        }
        counts.into_iter().map(|count| Estimate { keys: count * 10.0, variance: count * 90.0, missed: 0.0 }).collect()
    }

    #[test]
    fn an_even_decay_or_an_even_flow_has_no_peak_and_a_mass_of_keys_at_one_time_has_one() {
        for seed in 0..40 {
            fastrand::seed(seed);
            let keys = 100_000;
            for half_life in [60.0, 600.0, 3_600.0, 36_000.0] {
                let decay = (0..keys).map(|_| -half_life * fastrand::f64().log2());
                assert_eq!(peaks(&sampled(decay), f64::from(keys)), [], "seed {seed}: a half life of {half_life} s");
            }
            for longest in [300.0, 5_000.0, 86_400.0] {
                let flow = (0..keys).map(|_| longest * fastrand::f64());
                assert_eq!(peaks(&sampled(flow), f64::from(keys)), [], "seed {seed}: up to {longest} s");
            }
            let flow = (0..keys).map(|_| 86_400.0 * fastrand::f64());
            let mass = (0..keys / 5).map(|_| 50_000.0 + 200.0 * fastrand::f64());
            let found = peaks(&sampled(flow.chain(mass)), f64::from(keys) * 1.2);
            assert_eq!(found.len(), 1, "seed {seed}: {found:?}");
            let bin = 50_000 / 600;
            assert!(found[0].bins.contains(&bin), "seed {seed}: {found:?}");
            assert!((found[0].keys.keys / 20_700.0 - 1.0).abs() < 0.1, "seed {seed}: {found:?}");
        }
    }

    #[test]
    fn a_peak_that_lies_across_two_parts_is_one() {
        fastrand::seed(1);
        let flow = (0..50_000).map(|_| 86_400.0 * fastrand::f64());
        let mass = (0..30_000).map(|_| 59_700.0 + 600.0 * fastrand::f64());
        let found = peaks(&sampled(flow.chain(mass)), 80_000.0);
        assert_eq!((found.len(), found[0].bins.clone()), (1, 99..101), "{found:?}");
    }
}
