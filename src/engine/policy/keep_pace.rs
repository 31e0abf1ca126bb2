//! How fast a keep run walks.
//!
//! A walk that goes round and round frees at each place what has expired there since it came by last. Walked evenly, with
//! `lap` for one round, a key stays in memory for `lap` at most after it has expired, and half of that on average: of `inflow`
//! keys that expire each second and that nobody else frees, `inflow * lap / 2` are in memory at any time. So both bounds are a bound
//! on the lap:
//!
//! - `max-delay`: the lap takes no longer than that;
//! - `max-backlog`: the lap takes no longer than `2 * max_backlog / inflow`.
//!
//! An even walk needs half the work of passes at full speed with pauses in between: those have the whole backlog in memory at
//! the end of each pause. And it finds out soon when many keys expire at once, since each place that it comes to tells.
//!
//! `inflow` is what was reclaimed, over the time since the place was walked last. Pure: the loop does the walking.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::model::bounds::{Bounds, KeepFigures};
use crate::model::schedule::BacklogSize;

/// The shares of the bounds, on the backlog and on the delay, that the lap is meant for. The rest is for what cannot be foreseen.
const AIM: (f64, f64) = (0.8, 0.85);
/// From this share of a bound on the walk goes as fast as the limits allow.
const HURRY: f64 = 0.95;
/// Keys a second that are walked at least, so that it is noticed when keys begin to expire: a few thousandths of a server's time.
const LEAST_PER_SEC: f64 = 3_000.0;
/// No lap takes longer, however many keys there are.
const LONGEST_LAP: Duration = Duration::from_secs(6 * 3600);
/// Nor faster: a small keyspace would be walked hundreds of times a second.
const SHORTEST_LAP: Duration = Duration::from_millis(50);
/// Fewer expired keys are no backlog.
const LEAST_BACKLOG: f64 = 100.0;
/// The times of the last lap are kept in so many marks.
const MARKS: f64 = 64.0;
/// What expires lately is what the last keys that were walked told, of which it takes so many to tell, or a quarter of the keyspace.
const LATELY: f64 = 3_000.0;
/// Figures are estimated anew this often.
const ESTIMATE_EVERY: Duration = Duration::from_millis(20);
/// Rest is taken once so much of it is due: shorter sleeps would cost more than they save.
const REST_AT_LEAST: Duration = Duration::from_millis(2);
/// Orders are looked at this often.
const REST_AT_MOST: Duration = Duration::from_millis(250);
/// A lap at full speed that takes so much longer than it may says that the bound cannot be kept.
const TOO_SLOW: f64 = 1.1;

/// Keys that expire each second, smoothed.
#[derive(Debug, Default)]
struct Inflow {
    reclaimed: f64,
    /// Shares of the keyspace that were walked, each times the seconds since it was walked before.
    seconds: f64,
}

impl Inflow {
    fn per_sec(&self) -> f64 {
        if self.seconds > 0.0 { self.reclaimed / self.seconds } else { 0.0 }
    }

    /// Takes in what a share of the keyspace brought; `weight`: how much of what was known before that replaces, from 0 on.
    fn learn(&mut self, reclaimed: f64, seconds: f64, weight: f64) {
        let kept = (-weight).exp();
        self.reclaimed = self.reclaimed * kept + reclaimed;
        self.seconds = self.seconds * kept + seconds;
    }
}

/// What is walked: all DBs of one master.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Keyspace {
    /// Keys by DBSIZE, expired ones included.
    pub keys: u64,
    /// Keys with a TTL, those that have expired included.
    pub expires: u64,
    /// Bytes that a key takes, where the server tells.
    pub bytes_per_key: Option<f64>,
}

/// The limits do not let a bound be kept.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct CannotKeep {
    /// Keys that would have to be walked each second.
    pub needed: f64,
    /// Keys that are walked each second, at the most that the limits allow.
    pub possible: f64,
}

/// The pace of a keep run on one master.
#[derive(Debug)]
pub(crate) struct KeepPace {
    bounds: Bounds,
    keyspace: Keyspace,
    /// The keyspace when the lap began.
    began_with: Keyspace,
    /// Where the walk is, in laps since it began, and when it was at places before that: a lap of them and a little more.
    at: f64,
    marks: VecDeque<(f64, Instant)>,
    /// Where the present lap began, and when.
    lap_began: (f64, Instant),
    /// Whether this lap has rested for the bound's sake.
    has_rested: bool,
    /// Lately, and over half a lap.
    inflow: (Inflow, Inflow),
    /// When the last batch was taken in.
    learnt: Instant,
    /// When the next batch may be sent.
    due: Instant,
    estimated: Instant,
    /// Whether it has been said that the bound cannot be kept.
    told: bool,
    figures: KeepFigures,
}

impl KeepPace {
    /// A walk that begins now. `before`: what an earlier process counted.
    pub(crate) fn new(bounds: Bounds, before: KeepFigures, now: Instant) -> Self {
        Self {
            bounds,
            keyspace: Keyspace::default(),
            began_with: Keyspace::default(),
            at: 0.0,
            marks: VecDeque::new(),
            lap_began: (0.0, now),
            has_rested: false,
            inflow: Default::default(),
            learnt: now,
            due: now,
            estimated: now,
            told: false,
            figures: KeepFigures { laps: before.laps, missed: before.missed, ..KeepFigures::default() },
        }
    }

    /// Another process: nothing is known of its keys.
    pub(crate) fn forget(&mut self, now: Instant) {
        let before = self.figures;
        *self = Self::new(self.bounds, before, now);
    }

    /// A lap begins over what is there now. Returns the numbers where the limits, by which `fastest` keys are walked each second at most, do
    /// not let the bound be kept, once.
    pub(crate) fn begin_lap(&mut self, keyspace: Keyspace, fastest: Option<f64>, now: Instant) -> Option<CannotKeep> {
        (self.keyspace, self.began_with) = (keyspace, keyspace);
        self.has_rested = false;
        self.lap_began = (self.at, now);
        self.mark(now);
        let possible = fastest.filter(|most| *most < self.needed().unwrap_or(0.0))?;
        self.cannot_keep(possible)
    }

    /// The lap is complete. Returns the numbers where it took too long although it went as fast as the limits let it, once.
    pub(crate) fn end_lap(&mut self, now: Instant) -> Option<CannotKeep> {
        self.figures.laps += 1;
        self.at = self.lap_began.0 + 1.0;
        self.mark(now);
        self.estimate(now);
        let took = now - self.lap_began.1;
        let possible = self.keyspace.keys as f64 / took.as_secs_f64().max(0.001);
        if self.has_rested || possible * TOO_SLOW >= self.needed()? { None } else { self.cannot_keep(possible) }
    }

    /// Keys that have to be walked each second for the bounds to be kept.
    fn needed(&self) -> Option<f64> {
        Some(self.keyspace.keys as f64 / self.longest_lap((1.0, 1.0))?.as_secs_f64().max(0.001))
    }

    fn cannot_keep(&mut self, possible: f64) -> Option<CannotKeep> {
        let needed = self.needed()?;
        (!std::mem::replace(&mut self.told, true)).then_some(CannotKeep { needed, possible })
    }

    /// There are so many keys by now. Those with a TTL are taken for the same share of them as when the lap began.
    pub(crate) fn resize(&mut self, keys: u64) {
        let Keyspace { keys: before, expires, .. } = self.began_with;
        self.keyspace.keys = keys;
        self.keyspace.expires = (keys as f64 * expires as f64 / before.max(1) as f64) as u64;
    }

    /// The walk has come to a share of the lap, in [0, 1], and has freed so many keys on the way there.
    pub(crate) fn walked(&mut self, share: f64, reclaimed: u64, now: Instant) {
        let at = self.lap_began.0 + share.min(1.0);
        let step = at - self.at;
        if step < 0.0 {
            // The pass has gone back. What it walks again counts again.
            self.marks.retain(|(place, _)| *place <= at);
            self.at = at;
            return;
        }
        self.learnt = now;
        // Both ends of the step have been walked before, else what it found may be of any age.
        if let (Some(_), Some(walked_last)) = (self.when(self.at - 1.0), self.when(at - 1.0)) {
            let seconds = step * (now - walked_last).as_secs_f64();
            let found = reclaimed as f64;
            self.inflow.0.learn(found, seconds, step * (self.keyspace.keys as f64 / LATELY).max(4.0));
            self.inflow.1.learn(found, seconds, step * 2.0);
        }
        self.at = at;
        if self.marks.back().is_none_or(|(place, _)| at - place >= 1.0 / MARKS) {
            self.mark(now);
        }
        if !self.figures.lap.is_zero() {
            let earliest = now.checked_sub(REST_AT_LEAST).map_or(self.due, |earliest| self.due.max(earliest));
            self.due = earliest + self.figures.lap.mul_f64(step);
        }
        if now - self.estimated >= ESTIMATE_EVERY {
            self.estimate(now);
        }
    }

    /// Whether the next batch may be sent; else when to ask again.
    ///
    /// # Errors
    /// The instant.
    pub(crate) fn may_send(&mut self, now: Instant) -> Result<(), Instant> {
        if now - self.estimated >= ESTIMATE_EVERY {
            self.estimate(now);
        }
        let due = self.due.saturating_duration_since(now);
        if self.figures.lap.is_zero() || due < REST_AT_LEAST {
            return Ok(());
        }
        self.has_rested = true;
        Err(now + due.min(REST_AT_MOST))
    }

    /// How well the bounds are kept.
    pub(crate) fn figures(&self) -> KeepFigures {
        self.figures
    }

    fn mark(&mut self, now: Instant) {
        self.marks.push_back((self.at, now));
        // One beyond the lap, to know the times between it and the next one.
        while self.marks.get(1).is_some_and(|(place, _)| *place <= self.at - 1.0) {
            self.marks.pop_front();
        }
    }

    /// When the walk was at a place; `None`: never.
    fn when(&self, place: f64) -> Option<Instant> {
        let after = self.marks.partition_point(|(marked, _)| *marked <= place);
        let (from, then) = *self.marks.get(after.checked_sub(1)?)?;
        let Some((to, later)) = self.marks.get(after) else { return Some(then) };
        let part = if *to > from { (place - from) / (to - from) } else { 0.0 };
        Some(then + (*later - then).mul_f64(part))
    }

    /// Mean time since places were walked, and the longest; `None` before all were.
    fn ages(&self, now: Instant) -> Option<(f64, f64)> {
        let first = (self.at - 1.0, self.when(self.at - 1.0)?);
        let mut points: Vec<(f64, Instant)> = vec![first];
        points.extend(self.marks.iter().filter(|(place, _)| *place > first.0));
        points.push((self.at, now.min(self.learnt.max(self.lap_began.1))));
        let age = |then: Instant| now.saturating_duration_since(then).as_secs_f64();
        let sum: f64 = points.windows(2).map(|w| (w[1].0 - w[0].0) * (age(w[0].1) + age(w[1].1)) / 2.0).sum();
        Some((sum, age(first.1)))
    }

    /// Most expired keys that the bound allows.
    fn max_backlog(&self) -> Option<f64> {
        let keys = match self.bounds.max_backlog? {
            BacklogSize::Keys(keys) => keys as f64,
            BacklogSize::Bytes(bytes) => bytes as f64 / self.keyspace.bytes_per_key?.max(1.0),
            BacklogSize::Percent(percent) => self.keyspace.expires as f64 * percent / 100.0,
        };
        Some(keys.max(LEAST_BACKLOG))
    }

    /// The longest lap that takes these shares of the bounds on the backlog and on the delay; `None`: any does.
    fn longest_lap(&self, (of_backlog, of_delay): (f64, f64)) -> Option<Duration> {
        let inflow = self.inflow.0.per_sec().max(self.inflow.1.per_sec());
        let by_backlog = self.max_backlog().filter(|_| inflow > 0.0).map(|most| 2.0 * of_backlog * most / inflow);
        let by_backlog = by_backlog.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let by_delay = self.bounds.max_delay.map(|most| most.mul_f64(of_delay));
        [by_backlog, by_delay].into_iter().flatten().min()
    }

    fn estimate(&mut self, now: Instant) {
        let since = now - std::mem::replace(&mut self.estimated, now);
        let max_backlog = self.max_backlog();
        let figures = &mut self.figures;
        figures.max_backlog = max_backlog.map(|most| most as u64);
        let Some((mean, longest)) = self.ages(now) else {
            // As fast as it may, to find out.
            (self.figures.lap, self.figures.backlog, self.figures.delay) = (Duration::ZERO, None, None);
            return;
        };
        let (lately, before) = (self.inflow.0.per_sec(), self.inflow.1.per_sec());
        // What more expires than before has done so lately, so that places that were walked since have it too.
        let backlog = lately * mean + (lately - before).max(0.0) * (longest - mean);
        let figures = &mut self.figures;
        figures.inflow = lately;
        figures.backlog = Some(backlog as u64);
        figures.delay = Duration::try_from_secs_f64(longest).ok();
        let over = |share: f64| {
            max_backlog.is_some_and(|most| backlog > most * share)
                || self.bounds.max_delay.is_some_and(|most| longest > most.as_secs_f64() * share)
        };
        figures.is_missed = over(1.0);
        if figures.is_missed {
            figures.missed += since;
        }
        let hurries = over(HURRY);
        let idle = LONGEST_LAP.min(Duration::from_secs_f64(self.keyspace.keys as f64 / LEAST_PER_SEC));
        let lap = self.longest_lap(AIM).unwrap_or(idle).min(idle).max(SHORTEST_LAP);
        self.figures.lap = if hurries { Duration::ZERO } else { lap };
        if hurries {
            self.due = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A keyspace of places, in which keys expire evenly and are freed where the walk comes by.
    struct Server {
        places: Vec<f64>,
        /// Keys that the walk may look at each second.
        most: f64,
        /// What is known of that before.
        limit: Option<f64>,
        keys: u64,
        now: Instant,
        at: usize,
        worst: f64,
        walked: f64,
    }

    impl Server {
        fn new(keys: u64, most: f64) -> Self {
            Self {
                places: vec![0.0; (keys as usize / 200).min(1000)],
                most,
                limit: None,
                keys,
                now: Instant::now(),
                at: 0,
                worst: 0.0,
                walked: 0.0,
            }
        }

        fn backlog(&self) -> f64 {
            self.places.iter().sum()
        }

        /// Time passes, and so many keys expire each second.
        fn pass(&mut self, time: Duration, expire: f64) {
            self.now += time;
            let each = expire * time.as_secs_f64() / self.places.len() as f64;
            self.places.iter_mut().for_each(|place| *place += each);
            self.worst = self.worst.max(self.backlog());
        }

        /// Walks for so long while keys expire.
        fn run(&mut self, pace: &mut KeepPace, time: Duration, expire: impl Fn(Duration) -> f64) -> Vec<CannotKeep> {
            let (begun, mut told) = (self.now, Vec::new());
            let batch = Duration::from_secs_f64(self.keys as f64 / self.places.len() as f64 / self.most);
            while self.now - begun < time {
                if self.at == 0 {
                    let keyspace = Keyspace { keys: self.keys, expires: self.keys, bytes_per_key: Some(100.0) };
                    told.extend(pace.begin_lap(keyspace, self.limit, self.now));
                }
                if let Err(later) = pace.may_send(self.now) {
                    self.pass(later - self.now, expire(self.now - begun));
                    continue;
                }
                self.pass(batch, expire(self.now - begun));
                let found = self.places[self.at].floor();
                self.places[self.at] -= found;
                self.at += 1;
                self.walked += self.keys as f64 / self.places.len() as f64;
                pace.walked(self.at as f64 / self.places.len() as f64, found as u64, self.now);
                if self.at == self.places.len() {
                    told.extend(pace.end_lap(self.now));
                    self.at = 0;
                }
            }
            told
        }
    }

    fn bounds(max_backlog: &str, max_delay: Option<Duration>) -> Bounds {
        Bounds { max_backlog: max_backlog.parse().ok(), max_delay }
    }

    fn pace(server: &Server, bounds: Bounds) -> KeepPace {
        KeepPace::new(bounds, KeepFigures::default(), server.now)
    }

    #[test]
    fn a_steady_flow_is_kept_below_the_bound_and_not_far_below() {
        for (keys, expire) in [(200_000, 20_000.0), (1_200_000, 2_000.0), (20_000, 2_000.0), (5_000_000, 50_000.0)] {
            let mut server = Server::new(keys, 600_000.0);
            let mut pace = pace(&server, bounds("5%", None));
            assert!(server.run(&mut pace, 100 * 1000 * MS, |_| expire).is_empty(), "{keys} {expire}");
            (server.worst, server.walked) = (0.0, 0.0);
            let told = server.run(&mut pace, 200 * 1000 * MS, |_| expire);
            let most = keys as f64 * 0.05;
            assert!(told.is_empty() && server.worst <= most, "{keys} {expire}: {} of {most}", server.worst);
            // Half a lap's flow is in memory, so this is the least that has to be walked.
            let least = keys as f64 * expire / (2.0 * most) * 200.0;
            assert!(server.walked < 1.6 * least, "{keys} {expire}: {} of {least}", server.walked);
        }
    }

    #[test]
    fn the_estimate_is_near_the_truth() {
        let mut server = Server::new(400_000, 600_000.0);
        let mut pace = pace(&server, bounds("5%", None));
        server.run(&mut pace, 60 * 1000 * MS, |_| 10_000.0);
        let (estimate, truth) = (pace.figures().backlog.unwrap() as f64, server.backlog());
        assert!((estimate / truth - 1.0).abs() < 0.15, "{estimate} {truth}");
    }

    #[test]
    fn keys_that_all_expire_at_once_are_noticed_soon_and_freed() {
        let mut server = Server::new(1_000_000, 600_000.0);
        let mut pace = pace(&server, bounds("5%", None));
        server.run(&mut pace, 30 * 1000 * MS, |_| 10.0);
        // A third of all keys, within a second.
        server.run(&mut pace, 1000 * MS, |_| 330_000.0);
        server.run(&mut pace, 3 * 1000 * MS, |_| 10.0);
        assert!(server.backlog() < 50_000.0, "{}", server.backlog());
    }

    #[test]
    fn a_flow_that_begins_passes_the_bound_for_a_moment_at_most() {
        let mut server = Server::new(1_000_000, 600_000.0);
        let mut pace = pace(&server, bounds("5%", None));
        server.run(&mut pace, 30 * 1000 * MS, |_| 0.0);
        server.worst = 0.0;
        server.run(&mut pace, 60 * 1000 * MS, |_| 20_000.0);
        assert!(server.worst < 1.2 * 50_000.0, "{}", server.worst);
    }

    #[test]
    fn no_key_stays_longer_than_the_delay() {
        let mut server = Server::new(200_000, 600_000.0);
        let delay = 1000 * MS;
        let mut pace = pace(&server, bounds("", Some(delay)));
        server.run(&mut pace, 10 * 1000 * MS, |_| 5_000.0);
        let before = pace.figures().missed;
        for _ in 0..200 {
            server.run(&mut pace, 50 * MS, |_| 5_000.0);
            assert!(pace.figures().delay.unwrap() <= delay, "{:?}", pace.figures());
        }
        assert_eq!(pace.figures().missed, before);
    }

    #[test]
    fn where_nothing_expires_hardly_anything_is_walked() {
        let mut server = Server::new(1_000_000, 600_000.0);
        let mut pace = pace(&server, bounds("5%", None));
        server.run(&mut pace, 10 * 1000 * MS, |_| 0.0);
        server.walked = 0.0;
        server.run(&mut pace, 100 * 1000 * MS, |_| 0.0);
        assert!(server.walked < 1.1 * 100.0 * LEAST_PER_SEC, "{}", server.walked);
    }

    #[test]
    fn a_bound_beyond_the_limits_is_told_once_with_the_numbers_and_goes_on_as_fast_as_it_may() {
        let mut server = Server::new(1_000_000, 50_000.0);
        let mut pace = pace(&server, bounds("1%", None));
        let told = server.run(&mut pace, 120 * 1000 * MS, |_| 20_000.0);
        assert_eq!(told.len(), 1, "{told:?}");
        assert!((told[0].possible / 50_000.0 - 1.0).abs() < 0.1 && told[0].needed > 500_000.0, "{told:?}");
        let figures = pace.figures();
        assert!(figures.is_missed && figures.lap.is_zero() && figures.missed > 60 * 1000 * MS, "{figures:?}");
    }

    #[test]
    fn a_ceiling_that_is_too_low_for_the_delay_is_told_before_anything_is_walked() {
        let mut server = Server::new(1_000_000, 50_000.0);
        server.limit = Some(50_000.0);
        let mut pace = pace(&server, bounds("", Some(5_000 * MS)));
        let told = server.run(&mut pace, MS, |_| 0.0);
        assert_eq!(told, [CannotKeep { needed: 200_000.0, possible: 50_000.0 }]);
        assert!(server.run(&mut pace, 100 * 1000 * MS, |_| 0.0).is_empty(), "once");
    }

    #[test]
    fn another_process_is_walked_anew_and_what_was_missed_stays_counted() {
        let mut server = Server::new(200_000, 50_000.0);
        let mut pace = pace(&server, bounds("1%", None));
        server.run(&mut pace, 60 * 1000 * MS, |_| 20_000.0);
        let before = pace.figures();
        pace.forget(server.now);
        assert_eq!(
            (pace.figures().missed, pace.figures().laps, pace.figures().backlog),
            (before.missed, before.laps, None)
        );
    }
}
