//! Ends a sweep that would leave more expired keys behind than no sweep at all.
//!
//! From Redis 7.2 on, and on every Valkey, active expiry walks the table in the same order as SCAN, and gets stuck in the freshly
//! cleaned part behind a slow SCAN: it finds nothing, stops trying, and keys pile up faster than the sweep reclaims them. Measured with
//! 20,000 keys a second that live for 10 s each: a sweep of 10,000 keys a second made the backlog ten times what it is without a
//! sweep; one of 100,000 made it a third. So a sweep must read well over twice as many keys a second as expire, or its pass must be
//! short.
//!
//! Before the pass: a sweep that is slow by its ceiling or intensity is compared with the flow of expiry, and refused if it would do
//! harm. During the pass: if active expiry has collapsed, the sweep does not make up for it, and keys pile up, then the sweep hurries;
//! if that does not help, it stops. Pure: the loop reads the values.

use std::collections::VecDeque;
use std::time::Duration;

use crate::engine::policy::observation::Observation;
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::PassCounters;
use crate::settings::{ScanSettings, Tuning};

/// A sweep has to read this many times as many keys a second as expire.
const OUTRUN: f64 = 2.0;
/// A pass that ends within this time does no harm: active expiry frees what has piled up as soon as the pass has ended.
const SHORT_PASS: Duration = Duration::from_secs(10);
/// A sweep cannot do harm where fewer keys than this expire each second.
const LEAST_FLOW: f64 = 100.0;
/// The most server time for a key, in microseconds, from which the rests follow.
const SLOW_KEY_US: f64 = 2.5;
/// How long the flow is watched before a slow sweep: keys expire in bursts, and the mean has to span several.
pub(crate) const WATCH_FOR: Duration = Duration::from_secs(4);

/// Active expiry has collapsed once it frees less than this share of the flow before.
const COLLAPSED: f64 = 0.25;
/// The DB grows once it holds this many times as many keys as at the beginning.
const GROWN: f64 = 1.05;
/// The flow during the sweep is the mean of this span.
const WINDOW: Duration = Duration::from_secs(5);
/// The longest time between two samples while a sweep goes on; the rest was a hold.
const LONGEST_BETWEEN: Duration = Duration::from_secs(1);
/// After this much harmful time the sweep hurries, and after twice as much it ends. Harmful time adds up, and harmless time takes half
/// of itself off: on Valkey 8.1 and 9.1 active expiry wakes up for a few seconds each 14 s, and keys pile up in between.
const PATIENCE: Duration = Duration::from_secs(8);

/// Keys that expired each second between two readings of `expired_keys` that are [`WATCH_FOR`] apart.
pub(crate) fn flow(before: Option<u64>, after: Option<u64>) -> Option<f64> {
    let expired = after?.saturating_sub(before?);
    Some(expired as f64 / WATCH_FOR.as_secs_f64())
}

/// The most keys a second that a sweep can read with these limits; `None`: nothing limits it.
pub(crate) fn fastest(tuning: &Tuning) -> Option<f64> {
    let ceiling = tuning.max_keys_per_sec.map(f64::from);
    let rested = (tuning.intensity < 1.0).then_some(tuning.intensity * 1e6 / SLOW_KEY_US);
    match (ceiling, rested) {
        (Some(ceiling), Some(rested)) => Some(ceiling.min(rested)),
        (one, other) => one.or(other),
    }
}

/// Whether a pass over `keys` may be so slow that the flow of expiry has to be known first.
/// `starves`: [`slow_scan_starves_expiry`](super::profile::slow_scan_starves_expiry).
pub(crate) fn has_to_know_the_flow(starves: bool, keys: u64, settings: &ScanSettings) -> bool {
    let pass = fastest(&settings.tuning).map(|per_sec| keys as f64 / per_sec);
    starves && pass.is_some_and(|seconds| seconds > SHORT_PASS.as_secs_f64())
}

/// The failure of a sweep that would do harm: a slow pass over `keys` while `expire_per_sec` keys expire each second. `None`: no harm.
pub(crate) fn harm(starves: bool, keys: u64, expire_per_sec: f64, settings: &ScanSettings) -> Option<Failure> {
    if !has_to_know_the_flow(starves, keys, settings) || expire_per_sec < LEAST_FLOW {
        return None;
    }
    let per_sec = fastest(&settings.tuning)?;
    if per_sec >= OUTRUN * expire_per_sec {
        return None;
    }
    let seconds = keys as f64 / per_sec;
    let message = format!(
        "this sweep would do harm: it reads at most {per_sec:.0} keys a second while {expire_per_sec:.0} expire each \
         second. On this version a sweep that is slower than twice that stops the server's own expiry for the \
         {seconds:.0} s of its pass, and up to {:.0} more expired keys would stay in memory",
        expire_per_sec * seconds,
    );
    let hint = format!(
        "raise max-keys-per-sec above {:.0} and the intensity towards 1, or sweep when fewer keys expire; --allow-slow \
         sweeps anyway",
        OUTRUN * expire_per_sec
    );
    Some(Failure::new(FailureKind::TooSlow, message).hint(hint))
}

/// The counts at a time since the pass began.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Sample {
    at: Duration,
    expired: u64,
    reclaimed: u64,
    scanned: u64,
}

/// What the guard advises after each sample.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Advice {
    /// The sample shows no harm: keep the present pace.
    Fine,
    /// Take the most that is allowed, whatever other clients need.
    Hurry,
    /// The sweep does harm. Advised once in a pass: a sweep that goes on gets `Hurry` from then on.
    Stop(Failure),
}

/// Watches active expiry during a pass.
#[derive(Debug)]
pub(crate) struct ExpiryGuard {
    /// Whether a slow SCAN can stop active expiry on this version.
    guards: bool,
    /// The most keys that the server expired each second, before the sweep or during it: the flow may begin after the sweep.
    most: f64,
    keys_at_start: u64,
    /// The samples of the last [`WINDOW`].
    window: VecDeque<Sample>,
    /// When the last sample was taken, since the pass began.
    advised: Duration,
    /// Harmful time, less half of the harmless time: see [`PATIENCE`].
    harmful: Duration,
    /// Whether `Stop` was advised in this pass.
    told: bool,
}

impl ExpiryGuard {
    /// A guard of a pass over `keys` on a server on which `expire_per_sec` keys expired before.
    /// `starves`: a slow SCAN can stop the active expiry of this version.
    pub(crate) fn new(starves: bool, keys: u64, expire_per_sec: Option<f64>) -> Self {
        Self {
            guards: starves,
            most: expire_per_sec.unwrap_or(0.0),
            keys_at_start: keys,
            window: VecDeque::new(),
            advised: Duration::ZERO,
            harmful: Duration::ZERO,
            told: false,
        }
    }

    /// Advises at a time since the pass began, from an observation, the counters of the pass and DBSIZE.
    pub(crate) fn advise(&mut self, at: Duration, seen: &Observation, counters: &PassCounters, keys: u64) -> Advice {
        let Some(expired) = seen.expired_by_server.or(seen.expired_keys).filter(|_| self.guards) else {
            return Advice::Fine;
        };
        // The time of a hold is not the sweep's doing.
        let since = at.saturating_sub(std::mem::replace(&mut self.advised, at)).min(LONGEST_BETWEEN);
        let now = Sample { at, expired, reclaimed: counters.reclaimed, scanned: counters.scanned };
        self.window.push_back(now);
        while self.window.get(1).is_some_and(|second| at.saturating_sub(second.at) >= WINDOW) {
            self.window.pop_front();
        }
        let first = self.window[0];
        let span = at.saturating_sub(first.at);
        if span < WINDOW {
            return Advice::Fine;
        }
        let per_sec = |of: fn(&Sample) -> u64| of(&now).saturating_sub(of(&first)) as f64 / span.as_secs_f64();
        let by_us = per_sec(|seen| seen.reclaimed);
        let expired = per_sec(|seen| seen.expired);
        // `expired_keys` includes the keys that the sweep reclaimed.
        let by_server = if seen.expired_by_server.is_some() { expired } else { (expired - by_us).max(0.0) };
        self.most = self.most.max(by_server);
        let before = self.most;
        // A fast sweep does no harm, whatever happens meanwhile.
        let slow = per_sec(|seen| seen.scanned) < before * OUTRUN;
        let grown = keys as f64 > self.keys_at_start as f64 * GROWN;
        if before < LEAST_FLOW || !slow || by_server >= before * COLLAPSED || by_server + by_us >= before || !grown {
            self.harmful = self.harmful.saturating_sub(since / 2);
            return Advice::Fine;
        }
        self.harmful = (self.harmful + since).min(3 * PATIENCE);
        if self.harmful < PATIENCE {
            return Advice::Fine;
        }
        if self.told || self.harmful < 2 * PATIENCE {
            return Advice::Hurry;
        }
        self.told = true;
        let message = format!(
            "this sweep does harm: the server expired up to {before:.0} keys a second and expires {by_server:.0} now, \
             the sweep frees {by_us:.0}, and the DB has grown from {} to {keys} keys",
            self.keys_at_start
        );
        let hint = "let it read more keys a second (max-keys-per-sec, intensity), or sweep when fewer keys expire; \
                    --allow-slow sweeps anyway";
        Advice::Stop(Failure::new(FailureKind::TooSlow, message).hint(hint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{raw::Raw, resolve};

    const NEW: bool = true;
    const OLD: bool = false;

    fn with(max_keys_per_sec: Option<u32>, intensity: f64) -> ScanSettings {
        let mut settings = resolve(&Raw::defaults(), None).unwrap().scan;
        settings.tuning.max_keys_per_sec = max_keys_per_sec;
        settings.tuning.intensity = intensity;
        settings
    }

    #[test]
    fn a_sweep_that_is_slower_than_keys_expire_is_refused_with_the_numbers() {
        let refused = harm(NEW, 200_000, 20_000.0, &with(Some(10_000), 1.0)).unwrap();
        insta::assert_snapshot!(format!("{refused}\n  hint: {}", refused.hint.clone().unwrap()));
        let cases = [
            (harm(OLD, 200_000, 20_000.0, &with(Some(10_000), 1.0)), "before 7.2 it does no harm"),
            (harm(NEW, 200_000, 20_000.0, &with(None, 1.0)), "as fast as it can"),
            (harm(NEW, 200_000, 4_000.0, &with(Some(10_000), 1.0)), "fast enough"),
            (harm(NEW, 90_000, 20_000.0, &with(Some(10_000), 1.0)), "a short pass"),
            (harm(NEW, 200_000, 50.0, &with(Some(10), 1.0)), "hardly anything expires"),
        ];
        for (harm, why) in cases {
            assert_eq!(harm, None, "{why}");
        }
        assert!(harm(NEW, 1_000_000, 20_000.0, &with(None, 0.05)).is_some(), "the intensity makes it slow too");
    }

    /// Takes a sample each quarter of a second. Each phase lasts some seconds, with rates per second: keys that the server expires, keys
    /// that the sweep reclaims, keys that it reads, and by how many keys the DB grows.
    fn advice(guard: &mut ExpiryGuard, phases: &[(u64, [u64; 4])]) -> Vec<Advice> {
        let mut sums = [0; 4];
        let mut advice = Vec::new();
        for (quarter, rates) in
            phases.iter().flat_map(|(seconds, rates)| vec![rates; *seconds as usize * 4]).enumerate()
        {
            let [by_server, by_us, read, growth] = sums;
            let seen = Observation { expired_keys: Some(by_server + by_us), ..Observation::default() };
            // The pass went on from a checkpoint with a million keys.
            let reclaimed = 1_000_000 + by_us;
            let counters = PassCounters { reclaimed, scanned: read, ..PassCounters::default() };
            advice.push(guard.advise(Duration::from_millis(250) * quarter as u32, &seen, &counters, 200_000 + growth));
            sums.iter_mut().zip(rates).for_each(|(sum, rate)| *sum += rate / 4);
        }
        advice.dedup();
        advice
    }

    #[test]
    fn if_expiry_collapses_and_keys_pile_up_the_sweep_hurries_and_then_stops() {
        let guard = || ExpiryGuard::new(NEW, 200_000, Some(20_000.0));
        let harm = [500, 3_000, 10_000, 16_500];
        let course = advice(&mut guard(), &[(30, harm)]);
        assert!(
            matches!(&course[..], [Advice::Fine, Advice::Hurry, Advice::Stop(failure), ..]
            if failure.message.contains("up to 20000 keys a second and expires 500 now")),
            "{course:?}"
        );
        let harmless = [
            ([18_000, 3_000, 10_000, 16_500], "the server keeps up"),
            ([500, 21_000, 30_000, 16_500], "the sweep reclaims as much"),
            ([500, 3_000, 10_000, 0], "nothing piles up"),
            ([500, 3_000, 50_000, 16_500], "a fast sweep is not the cause"),
        ];
        for (flow, why) in harmless {
            assert_eq!(advice(&mut guard(), &[(30, flow)]), [Advice::Fine], "{why}");
        }
        let old = &mut ExpiryGuard::new(OLD, 200_000, Some(20_000.0));
        assert_eq!(advice(old, &[(30, harm)]), [Advice::Fine]);
    }

    #[test]
    fn expiry_that_wakes_up_now_and_then_does_not_hide_the_harm() {
        let (harm, awake) = ([500, 900, 1_000, 2_500], [4_500, 900, 1_000, 0]);
        let waves: Vec<_> = (0..4).flat_map(|_| [(14, harm), (4, awake)]).collect();
        let course = advice(&mut ExpiryGuard::new(NEW, 200_000, Some(3_000.0)), &waves);
        assert!(course.iter().any(|advice| matches!(advice, Advice::Stop(_))), "{course:?}");
    }

    #[test]
    fn a_flow_that_begins_after_the_pass_is_guarded_too() {
        let quiet = [0, 0, 10_000, 0];
        let course = advice(
            &mut ExpiryGuard::new(NEW, 200_000, Some(0.0)),
            &[(20, quiet), (10, [6_000, 0, 10_000, 0]), (30, [100, 3_000, 10_000, 16_500])],
        );
        assert!(
            matches!(&course[..], [Advice::Fine, Advice::Hurry, Advice::Stop(_), Advice::Hurry]),
            "harm is reported once: {course:?}"
        );
    }
}
