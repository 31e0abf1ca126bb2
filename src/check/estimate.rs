//! How long a sweep would take. Pure arithmetic.
//!
//! The costs were measured (Redis 5.0 to 8.2 and Valkey 8.0, one small machine): a server spends 0.8 to 1.2 us on each live key that
//! SCAN visits and 1.2 to 2.5 us on each expired key that it frees. EXISTS for each key makes that 1.5 times as long, TTL 3 times. A
//! batch takes one slice of server time and its share of a round trip, which all batches under way divide among them; a batch with a
//! touch waits for its round trips alone. The time to free huge values inside SCAN is not included.

use std::time::Duration;

use crate::check::findings::Cures;
use crate::engine::policy::depth;
use crate::node::info::DbKeys;
use crate::settings::{COUNT_RANGE, ScanSettings, Touch};

/// Server time per key in microseconds, as (least, most).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Cost {
    /// For a live key that SCAN visits.
    pub live_us: (f64, f64),
    /// For an expired key that SCAN frees.
    pub reclaimed_us: (f64, f64),
}

/// The costs that were measured; the head of this module names the servers.
pub(crate) const COST: Cost = Cost { live_us: (0.8, 1.2), reclaimed_us: (1.2, 2.5) };

/// The time that a sweep takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    /// The time at the least cost of each key.
    pub least: Duration,
    /// The time at the highest cost of each key.
    pub most: Duration,
}

/// How long a sweep over `live` and `expired` keys takes with these settings, with `round_trip` to the server.
pub(crate) fn sweep_time(live: u64, expired: u64, settings: &ScanSettings, round_trip: Duration) -> Span {
    let one = |live_us: f64, reclaimed_us: f64| {
        let keys = (live + expired) as f64;
        let scan_us = live as f64 * live_us + expired as f64 * reclaimed_us;
        let steered = settings.max_slice.as_secs_f64() * 1e6 / (scan_us / keys.max(1.0)).max(0.01);
        let count = if settings.max_slice.is_zero() {
            f64::from(settings.count)
        } else {
            steered.clamp(f64::from(*COUNT_RANGE.start()), f64::from(*COUNT_RANGE.end()))
        };
        let (round_trip_s, slice_s) = (round_trip.as_secs_f64(), count * scan_us / keys.max(1.0) / 1e6);
        let (factor, wait_s) = match settings.touch {
            // `auto` touches only a few batches, for the audit.
            Touch::Auto | Touch::None => (1.0, ((round_trip_s + slice_s) / depth::MOST as f64 - slice_s).max(0.0)),
            Touch::Exists => (1.5, 2.0 * round_trip_s),
            Touch::Ttl => (3.0, 2.0 * round_trip_s),
        };
        let waited_s = (keys / count).ceil() * wait_s;
        let paced_s = scan_us * factor / 1e6 / settings.tuning.intensity + waited_s;
        let ceiling_s = settings.tuning.max_keys_per_sec.map_or(0.0, |ceiling| keys / f64::from(ceiling));
        Duration::try_from_secs_f64(paced_s.max(ceiling_s)).unwrap_or(Duration::MAX)
    };
    Span { least: one(COST.live_us.0, COST.reclaimed_us.0), most: one(COST.live_us.1, COST.reclaimed_us.1) }
}

/// Server time that active expiry spends on each key with a TTL that it samples, in microseconds: 3.4 for each key that it frees if
/// one in twelve has expired (measured at effort 10 on 7.0, 8.2 and Valkey 8).
const SAMPLED_US: f64 = 0.28;
/// Share of the keys with a TTL that are expired and still there when active expiry stops at effort 10.
const LEFT: f64 = 0.01;

/// What it costs to free `expired` keys by active expiry at effort 10 and by a sweep. `None`: active expiry would stop at once.
///
/// Active expiry samples random keys that have a TTL. While a share `s` of them has expired, it samples `1 / s` keys for each that
/// it frees. So from `s` down to `s'` it samples `ln(s / s')` times as many keys as have a TTL. A sweep visits every key once.
pub(crate) fn cures(size: DbKeys, expired: u64) -> Option<Cures> {
    let share = expired as f64 / size.expires.max(1) as f64;
    let middle = |(least, most): (f64, f64)| f64::midpoint(least, most);
    let live = size.keys.saturating_sub(expired) as f64;
    let sweep_us = live * middle(COST.live_us) + expired as f64 * middle(COST.reclaimed_us);
    (share > LEFT).then(|| Cures {
        effort: Duration::from_secs_f64(size.expires as f64 * SAMPLED_US * (share / LEFT).ln() / 1e6),
        sweep: Duration::from_secs_f64(sweep_us / 1e6),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{self, raw::Raw};

    fn defaults() -> ScanSettings {
        settings::resolve(&Raw::defaults(), None).unwrap().scan
    }

    fn seconds(span: Span) -> (f64, f64) {
        (span.least.as_secs_f64(), span.most.as_secs_f64())
    }

    #[test]
    fn server_time_alone_is_the_measured_cost_per_key() {
        let (least, most) = seconds(sweep_time(1_000_000, 100_000, &defaults(), Duration::ZERO));
        assert!((least - 0.92).abs() < 0.001 && (most - 1.45).abs() < 0.001, "{least} {most}");
    }

    #[test]
    fn batches_under_way_share_the_round_trip_to_a_far_server() {
        let near = sweep_time(10_000_000, 0, &defaults(), Duration::ZERO);
        let away = |millis| sweep_time(10_000_000, 0, &defaults(), Duration::from_millis(millis)).most;
        assert_eq!(away(1), near.most, "twenty batches fill the round trip");
        // 41.7 keys in 50 us at 1.2 us each: 240,000 batches, and each waits a 32nd of 4.05 ms less its own 50 us.
        assert_eq!((away(4) - near.most).as_secs(), 18);
        let mut touching = defaults();
        touching.touch = Touch::Exists;
        let near = sweep_time(10_000_000, 0, &touching, Duration::ZERO);
        let far = sweep_time(10_000_000, 0, &touching, Duration::from_micros(500));
        assert_eq!((far.most - near.most).as_secs(), 240);
    }

    #[test]
    fn without_a_slice_the_count_of_the_settings_is_used() {
        let mut fixed = defaults();
        (fixed.count, fixed.max_slice) = (1000, Duration::ZERO);
        let wait = |settings: &ScanSettings| {
            let of = |round_trip| sweep_time(10_000_000, 0, settings, round_trip).most;
            (of(Duration::from_millis(100)) - of(Duration::ZERO)).as_secs_f64()
        };
        // 10,000 batches of 1.2 ms, and each waits a 32nd of 101.2 ms less those 1.2 ms.
        assert!((wait(&fixed) - 19.6).abs() < 0.1, "{}", wait(&fixed));
    }

    #[test]
    fn rest_and_ceiling_make_it_longer() {
        let mut slow = defaults();
        slow.tuning.intensity = 0.1;
        let (least, _) = seconds(sweep_time(1_000_000, 0, &slow, Duration::ZERO));
        assert!((least - 8.0).abs() < 0.01, "{least}");
        let mut capped = defaults();
        capped.tuning.max_keys_per_sec = Some(1000);
        assert_eq!(sweep_time(900_000, 100_000, &capped, Duration::ZERO).least.as_secs(), 1000);
    }

    #[test]
    fn raising_the_effort_is_cheaper_where_few_of_many_keys_have_a_ttl() {
        let of = |keys, expires, expired| cures(DbKeys { keys, expires }, expired);
        let few = of(10_000_000, 500_000, 50_000).unwrap();
        assert!(few.effort_is_cheaper(), "{few:?}");
        let all = of(1_000_000, 1_000_000, 83_000).unwrap();
        assert!(!all.effort_is_cheaper(), "{all:?}");
        assert_eq!(of(1_000_000, 1_000_000, 9_000), None, "active expiry leaves as many");
        assert_eq!(of(1_000, 0, 0), None);
    }

    #[test]
    fn an_empty_server_takes_no_time() {
        assert_eq!(sweep_time(0, 0, &defaults(), Duration::from_secs(1)).most, Duration::ZERO);
    }
}
