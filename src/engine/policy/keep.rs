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

use crate::model::keep::{Bounds, KeepFigures};
use crate::model::schedule::BacklogSize;

/// The shares of the bounds, on the backlog and on the delay, that the lap is meant for. The rest is for what cannot be foreseen.
const AIM: (f64, f64) = (0.8, 0.85);
/// From this share of a bound on the walk goes as fast as the limits allow.
const HURRY: f64 = 0.95;
/// The walk never goes slower: what expires all at once has to be noticed.
const LONGEST_LAP: Duration = Duration::from_secs(600);
/// Nor faster: a small table would be walked hundreds of times a second.
const SHORTEST_LAP: Duration = Duration::from_millis(50);
/// Fewer expired keys are no backlog.
const LEAST_BACKLOG: f64 = 100.0;
/// The times of the last lap are kept in so many marks.
const MARKS: f64 = 64.0;
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
    /// Shares of the table that were walked, each times the seconds since it was walked before.
    seconds: f64,
}

impl Inflow {
    fn per_sec(&self) -> f64 {
        if self.seconds > 0.0 { self.reclaimed / self.seconds } else { 0.0 }
    }

    /// Takes in what a share of the table brought; `weight`: how much of what was known before that replaces, from 0 on.
    fn learn(&mut self, reclaimed: f64, seconds: f64, weight: f64) {
        let kept = (-weight).exp();
        self.reclaimed = self.reclaimed * kept + reclaimed;
        self.seconds = self.seconds * kept + seconds;
    }
}

/// What is walked: all DBs of one master.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Table {
    /// Keys in it.
    pub keys: u64,
    /// Keys with a TTL, those that have expired included.
    pub expires: u64,
    /// Bytes that a key takes, where the server tells.
    pub bytes_per_key: Option<f64>,
}

/// The limits do not let a bound be kept.
#[derive(Debug, Clone, PartialEq)]
pub struct CannotKeep {
    /// Keys that would have to be walked each second.
    pub needed: f64,
    /// Keys that were walked each second, at the most that the limits allow.
    pub possible: f64,
}

/// The pace of a keep run on one master.
#[derive(Debug)]
pub struct KeepPace {
    bounds: Bounds,
    table: Table,
    /// Where the walk is, in laps since it began, and when it was at places before that: a lap of them and a little more.
    at: f64,
    marks: VecDeque<(f64, Instant)>,
    /// Where the present lap began, and when.
    lap_began: (f64, Instant),
    /// Whether this lap has rested for the bound's sake.
    has_rested: bool,
    /// Of a short time, and of half a lap.
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
    pub fn new(bounds: Bounds, before: KeepFigures, now: Instant) -> Self {
        Self {
            bounds,
            table: Table::default(),
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

    /// Other bounds from now on.
    pub fn set_bounds(&mut self, bounds: Bounds) {
        if bounds != self.bounds {
            (self.bounds, self.told) = (bounds, false);
        }
    }

    /// Another process: nothing is known of its keys.
    pub fn forget(&mut self, now: Instant) {
        let before = self.figures;
        *self = Self::new(self.bounds, before, now);
    }

    /// A lap begins over what is there now.
    pub fn begin_lap(&mut self, table: Table, now: Instant) {
        self.table = table;
        self.has_rested = false;
        self.lap_began = (self.at, now);
        self.mark(now);
    }

    /// The lap is complete. Returns the numbers where the limits do not let the bound be kept, once.
    pub fn end_lap(&mut self, now: Instant) -> Option<CannotKeep> {
        self.figures.laps += 1;
        self.at = self.lap_began.0 + 1.0;
        self.mark(now);
        self.estimate(now);
        let (took, longest) = (now - self.lap_began.1, self.longest_lap((1.0, 1.0))?);
        if self.has_rested || took <= longest.mul_f64(TOO_SLOW) {
            return None;
        }
        let per_sec = |lap: Duration| self.table.keys as f64 / lap.as_secs_f64().max(0.001);
        (!std::mem::replace(&mut self.told, true))
            .then(|| CannotKeep { needed: per_sec(longest), possible: per_sec(took) })
    }

    /// The walk has come to a share of the lap, in [0, 1], and has freed so many keys on the way there.
    pub fn walked(&mut self, share: f64, reclaimed: u64, now: Instant) {
        let at = self.lap_began.0 + share.min(1.0);
        let step = at - self.at;
        if step < 0.0 {
            // The pass has gone back. What it walks again counts again.
            self.marks.retain(|(place, _)| *place <= at);
            self.at = at;
            return;
        }
        let waited = now - std::mem::replace(&mut self.learnt, now);
        if let Some(walked_last) = self.when(at - 1.0) {
            let seconds = step * (now - walked_last).as_secs_f64();
            let found = reclaimed as f64;
            // A quarter of a lap, or as many keys as tell something, but not less than a second and a part of the lap.
            let short = (step * 16.0).max(waited.as_secs_f64()).min((found / 400.0).max(step * 4.0));
            self.inflow.0.learn(found, seconds, short);
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
    pub fn may_send(&mut self, now: Instant) -> Result<(), Instant> {
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
    pub fn figures(&self) -> KeepFigures {
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
            BacklogSize::Bytes(bytes) => bytes as f64 / self.table.bytes_per_key?.max(1.0),
            BacklogSize::Percent(percent) => self.table.expires as f64 * percent / 100.0,
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
        let lap = self.longest_lap(AIM).unwrap_or(LONGEST_LAP);
        self.figures.lap = if hurries { Duration::ZERO } else { lap.clamp(SHORTEST_LAP, LONGEST_LAP) };
        if hurries {
            self.due = now;
        }
    }
}
