//! Whether the sweep may go on, by what was observed of the master. Pure: the tests below show all of its behaviour.
//!
//! One reason suffices to hold. A hold ends at four fifths of the limit that began it, so that a load that wavers about
//! the limit does not hold and release the sweep again and again. A load above a hard limit has to be observed twice
//! before the sweep gives up; the caller sees to that.

use crate::engine::policy::observation::Observation;
use crate::model::failure::{Failure, FailureKind};
use crate::model::throttle::{Above, Auto, Limit, LimitRow, Limits, Reason, Unit};
use crate::settings::{Tuning, show_duration, span};

/// A hold ends at this share of the limit that began it.
const RELEASE: f64 = 0.8;

/// Share of the main thread's time that other clients may take before the sweep lowers its intensity.
const CALM: f64 = 0.45;
/// Share of the main thread's time of other clients from which the sweep has its least intensity.
const BUSY: f64 = 0.85;

/// What the sweep of a shard is to do.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Decision {
    /// Send the next batch, at the intensity that the operator set.
    Proceed,
    /// Send the next batch, and rest between batches for this lower intensity.
    Rest(f64),
    /// Hold until the next observation, for this reason and with these facts.
    Hold(Reason, Option<String>),
    /// End the sweep of the shard; where a limit was passed, only once that was decided twice in a row.
    Abort(Failure),
}

/// Decides by the last observation, the one before the first batch, and the reason for which the sweep holds now.
pub(crate) fn decide(seen: &Observation, before: &Observation, tuning: &Tuning, held: Option<Reason>) -> Decision {
    if let Some(decision) = impossible(seen) {
        return decision;
    }
    let limits = &tuning.limits;
    if let Some(failure) = over_a_hard_limit(seen, limits) {
        return Decision::Abort(failure);
    }
    if let Some((reason, detail)) = over_a_soft_limit(seen, before, limits, held) {
        return Decision::Hold(reason, Some(detail));
    }
    let share = intensity(seen.others_cpu, tuning);
    if share < tuning.intensity { Decision::Rest(share) } else { Decision::Proceed }
}

/// What makes a sweep impossible, whatever the limits: the server would hide expired keys and not reclaim them.
pub(crate) fn impossible(seen: &Observation) -> Option<Decision> {
    if seen.is_master == Some(false) {
        return Some(Decision::Abort(not_a_master(seen.master.as_deref())));
    }
    let reason = match () {
        () if seen.loading => Reason::Loading,
        () if seen.failover_under_way => Reason::Failover,
        () if seen.writes_paused => Reason::DeletionBlocked,
        () => return None,
    };
    Some(Decision::Hold(reason, None))
}

/// The share of its time that the master can spare: `intensity` while other clients take less than `CALM`, falling in
/// a straight line to `min_intensity` where they take `BUSY`. Where it is unknown what they take, `intensity`.
pub(crate) fn intensity(others_cpu: Option<f64>, tuning: &Tuning) -> f64 {
    let Some(others) = others_cpu else { return tuning.intensity };
    let spare = (BUSY - others) / (BUSY - CALM);
    spare.clamp(tuning.min_intensity, tuning.intensity)
}

fn over_a_hard_limit(seen: &Observation, limits: &Limits) -> Option<Failure> {
    let (row, now, limit) =
        limits.iter().find_map(|(row, limit)| match (row.above, limit, seen.amount(row.measure)) {
            (Above::GiveUp, Limit::At(limit), Some(now)) if now > limit => Some((row, now, limit)),
            _ => None,
        })?;
    let (now, limit) = (show_amount(row.unit, now), show_amount(row.unit, limit));
    let message = format!("{} {now}; the hard limit {} is {limit}", row.says, row.key);
    let failure = Failure::new(FailureKind::LimitPassed, message);
    Some(failure.hint("what was freed stays freed; sweep again when the server is calmer"))
}

fn over_a_soft_limit(
    seen: &Observation,
    before: &Observation,
    limits: &Limits,
    held: Option<Reason>,
) -> Option<(Reason, String)> {
    if let Some(why) = seen.blind.as_ref().filter(|_| *limits != Limits::NONE) {
        return Some((Reason::Unreadable, format!("no INFO for seconds: {why}")));
    }
    if limits.hold_during_fork {
        if let Some(what) = seen.fork {
            return Some((Reason::Fork, format!("a child process writes the {what}")));
        }
        if seen.full_sync {
            return Some((Reason::FullSync, "a replica is not online yet".to_owned()));
        }
    }
    limits.iter().find_map(|(row, limit)| match row.above {
        Above::Hold(reason) => over(row, reason, limit, seen, before, held),
        Above::GiveUp => None,
    })
}

/// The reason and the facts of a hold where the load of a row is above its soft limit.
fn over(
    row: &LimitRow,
    reason: Reason,
    limit: Limit,
    seen: &Observation,
    before: &Observation,
    held: Option<Reason>,
) -> Option<(Reason, String)> {
    let before = before.amount(row.measure);
    // A hold begins above `bound` and ends at `release`.
    let (bound, release) = match (limit, row.auto) {
        (Limit::Off, _) | (Limit::Auto, Auto::Off) => return None,
        (Limit::Auto, Auto::More(margin)) => {
            let before = before.unwrap_or(0.0);
            (before + margin, before + margin * RELEASE)
        }
        (Limit::Auto, Auto::Times(times, more)) => {
            let bound = before? * times + more;
            (bound, bound * RELEASE)
        }
        (Limit::At(bound), _) => (bound, bound * RELEASE),
    };
    let Some(now) = seen.amount(row.measure) else {
        let holds = matches!(limit, Limit::At(_)) && !row.measure.is_always_shown();
        return holds.then(|| (Reason::Unreadable, format!("{} is set, and the server does not tell", row.key)));
    };
    let in_force = if held == Some(reason) { release } else { bound };
    let detail =
        || format!("{} {}; the limit is {}", row.says, show_amount(row.unit, now), show_amount(row.unit, bound));
    (now > in_force).then(|| (reason, detail()))
}

/// The `auto` limits that cannot be watched on this server, which does not show the load.
pub(crate) fn skipped(seen: &Observation, limits: &Limits) -> Vec<&'static str> {
    let hidden = limits.iter().filter(|(row, limit)| {
        let is_auto = *limit == Limit::Auto && row.auto != Auto::Off;
        is_auto && !row.measure.is_always_shown() && seen.amount(row.measure).is_none()
    });
    hidden.map(|(row, _)| row.key).collect()
}

/// An amount of load as people read it.
fn show_amount(unit: Unit, amount: f64) -> String {
    match unit {
        Unit::Milliseconds if amount < 0.001 => format!("{:.0} us", amount * 1e6),
        Unit::Milliseconds => format!("{:.1} ms", amount * 1e3),
        Unit::Seconds => show_duration(span(amount)),
        Unit::Bytes => format!("{:.1} MiB", amount / f64::from(1 << 20)),
        Unit::Number => amount.to_string(),
        Unit::Share => format!("{amount:.2}"),
    }
}

/// The failure of a server that is, or has become, a replica.
pub(crate) fn not_a_master(master: Option<&str>) -> Failure {
    let failure = Failure::new(
        FailureKind::NotAMaster,
        match master {
            Some(master) => format!("the server is a replica of {master}; a replica hides expired keys and frees none"),
            None => "the server is a replica; a replica hides expired keys and frees none".to_owned(),
        },
    );
    match master {
        Some(master) => failure.hint(format!("sweep its master, redis://{master}, or let --follow find it")),
        None => failure,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::settings::{raw::Raw, resolve};

    fn tuning() -> Tuning {
        resolve(&Raw::defaults(), None).unwrap().scan.tuning
    }

    fn calm() -> Observation {
        Observation {
            is_master: Some(true),
            latency: Some(Duration::from_micros(100)),
            replica_lag: Some(0),
            replica_silence: Some(Duration::ZERO),
            replica_buffer: Some(0),
            lazyfree_pending: Some(0),
            ops: Some(10),
            ..Observation::default()
        }
    }

    #[test]
    fn figures_as_large_as_they_can_be_break_nothing() {
        let most = Observation {
            replica_lag: Some(u64::MAX),
            replica_silence: Some(Duration::from_secs(u32::MAX.into())),
            replica_buffer: Some(u64::MAX),
            lazyfree_pending: Some(u64::MAX),
            ..calm()
        };
        assert_eq!(decide(&calm(), &most, &tuning(), None), Decision::Proceed);
    }

    #[test]
    fn a_replica_that_was_always_far_behind_holds_nothing_once_it_is_where_it_was() {
        let behind = |mib: u64| Observation { replica_lag: Some(mib << 20), ..calm() };
        let holds = |now: u64, held| matches!(decide(&behind(now), &behind(200), &tuning(), held), Decision::Hold(..));
        assert!(!holds(216, None) && holds(217, None), "16 MiB more than before");
        assert!(holds(213, Some(Reason::ReplicaLag)), "more than four fifths of that");
        assert!(!holds(212, Some(Reason::ReplicaLag)) && !holds(200, Some(Reason::ReplicaLag)));
    }

    /// The reason for which the sweep holds, in a table of one observation after a calm one.
    fn held(seen: &Observation, tuning: &Tuning, held: Option<Reason>) -> Option<Reason> {
        match decide(seen, &calm(), tuning, held) {
            Decision::Hold(reason, _) => Some(reason),
            Decision::Proceed | Decision::Rest(_) => None,
            Decision::Abort(failure) => panic!("{failure}"),
        }
    }

    #[test]
    fn what_makes_a_sweep_impossible_holds_it_whatever_the_limits() {
        let none = Tuning { limits: Limits::NONE, ..tuning() };
        for tuning in [tuning(), none] {
            assert_eq!(decide(&calm(), &calm(), &tuning, None), Decision::Proceed);
            assert_eq!(held(&Observation::default(), &tuning, None), None, "an unknown role is not a replica");
            let cases = [
                (Observation { loading: true, ..calm() }, Reason::Loading),
                (Observation { failover_under_way: true, ..calm() }, Reason::Failover),
                (Observation { writes_paused: true, ..calm() }, Reason::DeletionBlocked),
            ];
            for (seen, reason) in cases {
                assert_eq!(held(&seen, &tuning, None), Some(reason));
            }
            let demoted = Observation {
                is_master: Some(false),
                master: Some("h:1".into()),
                loading: true,
                ..Observation::default()
            };
            let decision = decide(&demoted, &calm(), &tuning, None);
            assert!(matches!(decision, Decision::Abort(f) if f.message.contains("h:1")));
        }
    }

    #[test]
    fn each_figure_over_its_default_limit_holds_with_its_reason_and_no_limit_holds_for_none() {
        let ms = Duration::from_millis;
        let cases = [
            (Observation { latency: Some(ms(6)), ..calm() }, Reason::Latency),
            (Observation { replica_lag: Some((16 << 20) + 1), ..calm() }, Reason::ReplicaLag),
            (Observation { replica_silence: Some(ms(11_000)), ..calm() }, Reason::ReplicaSilent),
            (Observation { replica_buffer: Some((32 << 20) + 1), ..calm() }, Reason::ReplicaBuffer),
            (Observation { lazyfree_pending: Some(100_001), ..calm() }, Reason::LazyFree),
            (Observation { fork: Some("RDB"), ..calm() }, Reason::Fork),
            (Observation { full_sync: true, ..calm() }, Reason::FullSync),
            (Observation { blind: Some("timed out".to_owned()), ..calm() }, Reason::Unreadable),
        ];
        let none = Tuning { limits: Limits::NONE, ..tuning() };
        for (seen, reason) in cases {
            assert_eq!(held(&seen, &tuning(), None), Some(reason));
            assert_eq!(held(&seen, &none, None), None);
        }
        let busy = Observation { ops: Some(1_000_000), ..calm() };
        assert_eq!(held(&busy, &tuning(), None), None, "by default the intensity gives way, not the sweep");
        let limits = tuning().limits.with("max-ops", Limit::At(999_999.0)).with("max-cpu", Limit::At(0.5));
        let strict = Tuning { limits, ..tuning() };
        assert_eq!(held(&busy, &strict, None), Some(Reason::Ops));
        let quiet_but_busy = Observation { others_cpu: Some(0.51), ..calm() };
        assert_eq!(held(&quiet_but_busy, &strict, None), Some(Reason::Cpu));
    }

    #[test]
    fn limits_are_relative_to_what_was_seen_before_the_first_batch() {
        let before = Observation { replica_lag: Some(1 << 30), latency: Some(Duration::from_millis(10)), ..calm() };
        assert_eq!(decide(&before, &before, &tuning(), None), Decision::Proceed, "it was so before we came");
        let more = Observation { replica_lag: Some((1 << 30) + (17 << 20)), ..before.clone() };
        assert!(matches!(decide(&more, &before, &tuning(), None), Decision::Hold(Reason::ReplicaLag, Some(text))
            if text == "behind by 1041.0 MiB; the limit is 1040.0 MiB"));
    }

    #[test]
    fn a_hold_ends_at_four_fifths_of_its_limit() {
        let at = |ms| Observation { latency: Some(Duration::from_millis(ms)), ..calm() };
        let tuning = Tuning { limits: tuning().limits.with("max-latency", Limit::At(0.01)), ..tuning() };
        assert_eq!(held(&at(9), &tuning, None), None);
        assert_eq!(held(&at(11), &tuning, None), Some(Reason::Latency));
        assert_eq!(held(&at(9), &tuning, Some(Reason::Latency)), Some(Reason::Latency), "it wavers");
        assert_eq!(held(&at(9), &tuning, Some(Reason::Fork)), None, "another hold has another limit");
        assert_eq!(held(&at(8), &tuning, Some(Reason::Latency)), None);
    }

    #[test]
    fn a_limit_that_was_set_on_a_hidden_figure_holds_and_a_default_one_is_skipped() {
        let hidden = Observation { replica_lag: None, ..calm() };
        assert_eq!(held(&hidden, &tuning(), None), None);
        assert_eq!(skipped(&hidden, &tuning().limits), ["max-replica-lag"]);
        let set = Tuning { limits: tuning().limits.with("max-replica-lag", Limit::At(1.0)), ..tuning() };
        assert_eq!(held(&hidden, &set, None), Some(Reason::Unreadable));
    }

    #[test]
    fn a_hard_limit_ends_the_sweep_and_names_itself() {
        let limits = tuning().limits.with("abort-replica-lag", Limit::At(f64::from(64 << 20)));
        let tuning = Tuning { limits: limits.with("abort-latency", Limit::Auto), ..tuning() };
        let behind = Observation { replica_lag: Some(65 << 20), ..calm() };
        assert!(matches!(decide(&behind, &calm(), &tuning, None), Decision::Abort(failure)
            if failure.kind == FailureKind::LimitPassed && failure.message.contains("abort-replica-lag is 64.0 MiB")));
    }

    #[test]
    fn the_intensity_falls_as_others_need_the_main_thread() {
        let tuning = tuning();
        let at = |others| (intensity(Some(others), &tuning) * 100.0).round() / 100.0;
        assert_eq!([0.0, 0.44, 0.65, 0.75, 0.85, 1.0].map(at), [1.0, 1.0, 0.5, 0.25, 0.05, 0.05]);
        assert_eq!(intensity(None, &tuning), 1.0, "unknown: the operator's word");
        let low = Tuning { intensity: 0.3, min_intensity: 0.02, ..tuning };
        assert_eq!((intensity(Some(0.0), &low), intensity(Some(1.0), &low)), (0.3, 0.02));
        let busy = Observation { others_cpu: Some(0.65), ..calm() };
        assert!(matches!(decide(&busy, &calm(), &tuning, None), Decision::Rest(share) if (share - 0.5).abs() < 0.01));
    }
}
