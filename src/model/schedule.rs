//! When scans run by themselves: due times, the grace after them, and the off-peak window.
//!
//! Pure functions of instants: the caller passes the present time. Called by `scheduler`, which acts on
//! [`decide`], and by `tasks`, which holds a sweep outside its [`Window`].

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use croner::Cron;
use croner::parser::{CronParser, Seconds};
use jiff::civil::{Date, DateTime, Time, Weekday};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, ToSpan};

/// How long a due scan waits for the scan before it, by the contract. After that the due time is skipped.
pub const GRACE: SignedDuration = SignedDuration::from_mins(5);

/// A cron expression in a time zone.
#[derive(Debug, Clone)]
pub struct CronRule {
    cron: Cron,
    zone: TimeZone,
}

impl CronRule {
    /// Reads five fields (minute, hour, day of month, month, day of week), or six with seconds in front.
    ///
    /// # Errors
    /// A sentence about the field that is wrong.
    pub fn parse(expression: &str, zone: TimeZone) -> Result<Self, String> {
        let parser = CronParser::builder().seconds(Seconds::Optional).build();
        let cron = parser
            .parse(expression)
            .map_err(|e| format!("`{expression}` is not a cron expression such as `0 3 * * *`: {e}"))?;
        Ok(Self { cron, zone })
    }

    /// The expression as it was written.
    pub fn expression(&self) -> &str {
        self.cron.as_str()
    }

    /// The name of its time zone.
    pub fn zone(&self) -> &str {
        self.zone.iana_name().unwrap_or("UTC")
    }

    fn next(&self, after: Timestamp) -> Option<Timestamp> {
        let next = self.cron.find_next_occurrence(&after.to_zoned(self.zone.clone()), false);
        next.ok().map(|zoned| zoned.timestamp())
    }

    fn latest(&self, at: Timestamp) -> Option<Timestamp> {
        let latest = self.cron.find_previous_occurrence(&at.to_zoned(self.zone.clone()), true);
        latest.ok().map(|zoned| zoned.timestamp())
    }
}

impl PartialEq for CronRule {
    fn eq(&self, other: &Self) -> bool {
        (self.expression(), self.zone()) == (other.expression(), other.zone())
    }
}

/// The rule by which scans are due.
#[derive(Debug, Clone, PartialEq)]
pub enum Recurrence {
    /// At `first + n * interval`; only once where the interval is 0, and never where `first` is not known yet.
    Every {
        /// The first due time; `None`: not known yet, so nothing is due.
        first: Option<Timestamp>,
        /// Seconds from one due time to the next.
        interval_s: u32,
    },
    /// At the times of a cron expression, in its own time zone.
    Cron(Box<CronRule>),
}

impl Recurrence {
    /// The first due time after an instant.
    pub fn next_due(&self, after: Timestamp) -> Option<Timestamp> {
        match self {
            Self::Every { first, interval_s } => {
                let first = (*first)?;
                if after < first { Some(first) } else { nth(first, *interval_s, turns(first, *interval_s, after)? + 1) }
            }
            Self::Cron(rule) => rule.next(after),
        }
    }

    /// The last due time at or before an instant.
    pub fn latest_due(&self, at: Timestamp) -> Option<Timestamp> {
        match self {
            Self::Every { first, interval_s } => {
                let first = (*first).filter(|first| *first <= at)?;
                match interval_s {
                    0 => Some(first),
                    _ => nth(first, *interval_s, turns(first, *interval_s, at)?),
                }
            }
            Self::Cron(rule) => rule.latest(at),
        }
    }
}

/// How many whole intervals have passed since `first`; `None` where there is no interval.
fn turns(first: Timestamp, interval_s: u32, at: Timestamp) -> Option<i64> {
    // Whole nanoseconds, so that a first time with milliseconds is met exactly.
    let passed = at.as_nanosecond() - first.as_nanosecond();
    let turns = passed.checked_div_euclid(i128::from(interval_s) * 1_000_000_000)?;
    i64::try_from(turns).ok()
}

fn nth(first: Timestamp, interval_s: u32, turn: i64) -> Option<Timestamp> {
    let ahead = i64::from(interval_s).checked_mul(turn)?;
    first.checked_add(SignedDuration::from_secs(ahead)).ok()
}

/// The automatic scan of one instance, as the API or the settings file sets it.
#[derive(Debug, Clone, PartialEq)]
pub struct AutoScan {
    /// Whether its due times start scans.
    pub enabled: bool,
    /// The rule by which its scans are due.
    pub recurrence: Recurrence,
    /// How long each scan may take, in seconds.
    pub timeout_s: u32,
    /// COUNT of the first SCAN of each scan.
    pub count: u32,
    /// When the API last changed it; `None`: never.
    pub updated_at: Option<Timestamp>,
}

impl AutoScan {
    /// When it runs, as a text for the records: two schedules with the same text are due at the same times.
    pub fn schedule(&self) -> String {
        match &self.recurrence {
            _ if !self.enabled => "off".to_owned(),
            Recurrence::Every { first: None, .. } => "never".to_owned(),
            Recurrence::Every { first: Some(first), interval_s } => format!("every {interval_s} s from {first}"),
            Recurrence::Cron(rule) => format!("cron {} in {}", rule.expression(), rule.zone()),
        }
    }
}

/// What [`decide`] has to know of an instance at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// The time at which it is decided.
    pub now: Timestamp,
    /// Due times up to this one have been handled.
    pub handled: Timestamp,
    /// Whether the instance has a task that has not ended.
    pub busy: bool,
    /// The due time that waits for the busy instance, if one does.
    pub waiting_for: Option<Timestamp>,
    /// Whether the window is open; true where there is no window.
    pub window_open: bool,
}

/// Why a due time passes without a scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Skip {
    /// The scan before it ran longer than the grace, or until the next due time.
    StillRunning,
    /// No daemon was there at the due time, and the window is closed now.
    Missed,
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StillRunning => {
                "the scan before it still ran five minutes after the due time, or when the next one came"
            }
            Self::Missed => "no daemon was there at the due time, and the next one or the end of the window came first",
        })
    }
}

/// What is to be done about a schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DueDecision {
    /// Nothing is due before this instant; where it is `None`, never.
    Sleep(Option<Timestamp>),
    /// The instance is busy: decide again soon, until the grace is over.
    Wait(Timestamp),
    /// Run the scan that was due at this time.
    Run(Timestamp),
    /// Pass this due time over.
    Skip(Timestamp, Skip),
}

/// Decides what to do now. However many due times were missed, only the latest counts: one scan makes up for all.
pub fn decide(recurrence: &Recurrence, moment: Moment) -> DueDecision {
    let Moment { now, handled, busy, waiting_for, window_open } = moment;
    let due = match recurrence.latest_due(now) {
        Some(due) if due > handled => due,
        _ => return DueDecision::Sleep(recurrence.next_due(now.max(handled))),
    };
    let in_grace = now.duration_since(due) <= GRACE;
    match (in_grace, busy) {
        (true, true) => DueDecision::Wait(due),
        (true, false) => DueDecision::Run(due),
        (false, true) => DueDecision::Skip(due, Skip::StillRunning),
        (false, false) if waiting_for == Some(due) => DueDecision::Skip(due, Skip::StillRunning),
        (false, false) if window_open => DueDecision::Run(due),
        (false, false) => DueDecision::Skip(due, Skip::Missed),
    }
}

/// An off-peak window: on each of its days it opens at `start` and closes at `end`, on the next day where `end` is not
/// after `start`. Local time of `zone`; a time that a clock change skips is the moment after the gap, one that comes
/// twice is the first.
#[derive(Debug, Clone, PartialEq)]
pub struct Window {
    /// The days on which it opens.
    pub days: Vec<Weekday>,
    /// Local time at which it opens.
    pub start: Time,
    /// Local time at which it closes.
    pub end: Time,
    /// The time zone of `days`, `start` and `end`.
    pub zone: TimeZone,
}

impl Window {
    /// Whether the window is open at an instant.
    pub fn is_open(&self, at: Timestamp) -> bool {
        self.closes(at).is_some()
    }

    /// When it opens or closes next; `None` for a window without days, which never does.
    pub fn next_change(&self, at: Timestamp) -> Option<Timestamp> {
        self.closes(at).or_else(|| self.opens(at))
    }

    /// When the window that is open now closes.
    fn closes(&self, at: Timestamp) -> Option<Timestamp> {
        let today = at.to_zoned(self.zone.clone()).date();
        let spans = [today.yesterday().ok(), Some(today)].into_iter().flatten().filter_map(|day| self.span(day));
        spans.filter(|(open, close)| *open <= at && at < *close).map(|(_, close)| close).max()
    }

    fn opens(&self, at: Timestamp) -> Option<Timestamp> {
        let today = at.to_zoned(self.zone.clone()).date();
        // A week and a day: a window on one day of the week that has just closed opens again in a week.
        let days = (0..=8).filter_map(|ahead| today.checked_add(ahead.days()).ok());
        days.filter_map(|day| self.span(day)).map(|(open, _)| open).find(|open| *open > at)
    }

    /// The window that opens on a day, if one does.
    fn span(&self, day: Date) -> Option<(Timestamp, Timestamp)> {
        if !self.days.contains(&day.weekday()) {
            return None;
        }
        let last = if self.end > self.start { day } else { day.tomorrow().ok()? };
        let open = self.instant(day.to_datetime(self.start))?;
        let close = self.instant(last.to_datetime(self.end))?;
        // A window that lies in the hour that a clock change skips does not open that day.
        (open < close).then_some((open, close))
    }

    fn instant(&self, local: DateTime) -> Option<Timestamp> {
        self.zone.to_ambiguous_zoned(local).compatible().ok().map(|zoned| zoned.timestamp())
    }
}

/// The size of a backlog: the least for which a due scan begins, or the most that a keep run allows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum BacklogSize {
    /// A number of expired keys.
    Keys(u64),
    /// Bytes that the expired keys take.
    Bytes(u64),
    /// Expired keys as per cent of the keys with a TTL.
    Percent(f64),
}

impl FromStr for BacklogSize {
    type Err = String;

    /// Reads `10000`, `64MiB` or `5%`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a backlog such as 10000 (keys), 64MiB or 5%");
        if let Some(percent) = text.strip_suffix('%') {
            let percent: f64 = percent.trim().parse().map_err(|_| wrong())?;
            return if (0.0..=100.0).contains(&percent) { Ok(Self::Percent(percent)) } else { Err(wrong()) };
        }
        for (unit, shift) in [("KiB", 10), ("MiB", 20), ("GiB", 30)] {
            if let Some(number) = text.strip_suffix(unit) {
                let number: u64 = number.trim().parse().map_err(|_| wrong())?;
                return number.checked_mul(1 << shift).map(Self::Bytes).ok_or_else(wrong);
            }
        }
        text.parse().map(Self::Keys).map_err(|_| wrong())
    }
}

impl fmt::Display for BacklogSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keys(keys) => write!(f, "{keys}"),
            Self::Bytes(bytes) => write!(f, "{}KiB", bytes >> 10),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

/// The time from now to an instant; zero where the instant has passed.
pub fn until(now: Timestamp, then: Timestamp) -> Duration {
    Duration::try_from(then.duration_since(now)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn every(first: &str, interval_s: u32) -> Recurrence {
        Recurrence::Every { first: Some(at(first)), interval_s }
    }

    fn window(days: &[Weekday], start: &str, end: &str, zone: &str) -> Window {
        Window {
            days: days.to_vec(),
            start: start.parse().unwrap(),
            end: end.parse().unwrap(),
            zone: TimeZone::get(zone).unwrap(),
        }
    }

    const DAILY: [Weekday; 7] = [
        Weekday::Monday,
        Weekday::Tuesday,
        Weekday::Wednesday,
        Weekday::Thursday,
        Weekday::Friday,
        Weekday::Saturday,
        Weekday::Sunday,
    ];

    fn moment(now: &str, handled: &str) -> Moment {
        Moment { now: at(now), handled: at(handled), busy: false, waiting_for: None, window_open: true }
    }

    #[test]
    fn due_times_are_first_plus_n_intervals() {
        let recurrence = every("2026-01-01T00:00:00.5Z", 3600);
        assert_eq!(recurrence.latest_due(at("2026-01-01T00:00:00Z")), None);
        assert_eq!(recurrence.next_due(at("2025-01-01T00:00:00Z")), Some(at("2026-01-01T00:00:00.5Z")));
        assert_eq!(recurrence.latest_due(at("2026-01-01T02:00:00.5Z")), Some(at("2026-01-01T02:00:00.5Z")));
        assert_eq!(recurrence.next_due(at("2026-01-01T02:00:00.5Z")), Some(at("2026-01-01T03:00:00.5Z")));
    }

    #[test]
    fn an_interval_of_zero_is_due_once() {
        let recurrence = every("2026-01-01T00:00:00Z", 0);
        assert_eq!(recurrence.next_due(at("2025-12-31T00:00:00Z")), Some(at("2026-01-01T00:00:00Z")));
        assert_eq!(recurrence.next_due(at("2026-01-01T00:00:00Z")), None);
        let after = moment("2026-01-01T00:00:01Z", "2026-01-01T00:00:00Z");
        assert_eq!(decide(&recurrence, after), DueDecision::Sleep(None));
    }

    #[test]
    fn a_busy_instance_is_waited_for_during_the_grace_and_then_skipped() {
        let due = at("2026-01-01T12:00:00Z");
        let recurrence = every("2026-01-01T12:00:00Z", 86_400);
        let busy = |now| Moment { busy: true, ..moment(now, "2026-01-01T00:00:00Z") };
        assert_eq!(decide(&recurrence, busy("2026-01-01T11:59:59Z")), DueDecision::Sleep(Some(due)));
        assert_eq!(decide(&recurrence, busy("2026-01-01T12:00:00Z")), DueDecision::Wait(due));
        assert_eq!(decide(&recurrence, busy("2026-01-01T12:05:00Z")), DueDecision::Wait(due));
        assert_eq!(decide(&recurrence, busy("2026-01-01T12:05:01Z")), DueDecision::Skip(due, Skip::StillRunning));
        let free = |now| Moment { waiting_for: Some(due), ..moment(now, "2026-01-01T00:00:00Z") };
        assert_eq!(decide(&recurrence, free("2026-01-01T12:04:00Z")), DueDecision::Run(due));
        assert_eq!(decide(&recurrence, free("2026-01-01T12:05:01Z")), DueDecision::Skip(due, Skip::StillRunning));
    }

    #[test]
    fn a_daemon_that_was_down_catches_up_once_if_the_window_is_open() {
        let recurrence = every("2026-01-01T00:00:00Z", 3600);
        let back = moment("2026-01-03T00:30:00Z", "2026-01-01T00:00:00Z");
        let due = at("2026-01-03T00:00:00Z");
        assert_eq!(decide(&recurrence, back), DueDecision::Run(due));
        assert_eq!(decide(&recurrence, Moment { window_open: false, ..back }), DueDecision::Skip(due, Skip::Missed));
        let then = Moment { handled: due, ..back };
        assert_eq!(decide(&recurrence, then), DueDecision::Sleep(Some(at("2026-01-03T01:00:00Z"))), "no burst");
    }

    #[test]
    fn cron_follows_the_clock_of_its_zone() {
        let rule = CronRule::parse("30 2 * * *", TimeZone::get("Europe/Berlin").unwrap()).unwrap();
        let recurrence = Recurrence::Cron(Box::new(rule));
        assert_eq!(recurrence.next_due(at("2026-01-10T00:00:00Z")), Some(at("2026-01-10T01:30:00Z")), "winter: +1");
        assert_eq!(recurrence.next_due(at("2026-07-10T00:00:00Z")), Some(at("2026-07-10T00:30:00Z")), "summer: +2");
        assert_eq!(recurrence.latest_due(at("2026-07-10T00:30:00Z")), Some(at("2026-07-10T00:30:00Z")));
        assert!(CronRule::parse("61 * * * *", TimeZone::UTC).unwrap_err().contains("0 3 * * *"));
    }

    #[test]
    fn a_cron_with_one_time_keeps_it_through_clock_changes_and_one_with_several_follows_the_clock() {
        let dues = |expression: &str, from: &str, until: &str| {
            let rule = CronRule::parse(expression, TimeZone::get("Europe/Berlin").unwrap()).unwrap();
            let recurrence = Recurrence::Cron(Box::new(rule));
            let next = |after: &Timestamp| recurrence.next_due(*after).filter(|due| *due <= at(until));
            let dues: Vec<_> = std::iter::successors(next(&at(from)), next).collect();
            for due in &dues {
                assert_eq!(recurrence.latest_due(*due), Some(*due), "{expression}");
            }
            dues.iter().map(Timestamp::to_string).collect::<Vec<_>>()
        };
        let gap = ("2026-03-29T00:00:00Z", "2026-03-29T20:00:00Z");
        assert_eq!(dues("30 2 * * *", gap.0, gap.1), ["2026-03-29T01:00:00Z"], "moved to the end of the gap");
        assert_eq!(dues("30 2,14 * * *", gap.0, gap.1), ["2026-03-29T12:30:00Z"], "left out");
        let fold = ("2026-10-24T20:00:00Z", "2026-10-25T10:00:00Z");
        assert_eq!(dues("30 2 * * *", fold.0, fold.1), ["2026-10-25T00:30:00Z"], "the first of two");
        assert_eq!(dues("30 2,14 * * *", fold.0, fold.1), ["2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z"], "both");
    }

    #[test]
    fn a_window_may_cross_midnight_and_belongs_to_the_day_it_opens() {
        let friday = window(&[Weekday::Friday], "22:00", "04:00", "UTC");
        for (time, open) in [
            ("2026-01-02T21:59:59Z", false),
            ("2026-01-02T22:00:00Z", true),
            ("2026-01-03T03:59:59Z", true),
            ("2026-01-03T04:00:00Z", false),
            ("2026-01-03T23:00:00Z", false),
        ] {
            assert_eq!(friday.is_open(at(time)), open, "{time}");
        }
        assert_eq!(friday.next_change(at("2026-01-02T23:00:00Z")), Some(at("2026-01-03T04:00:00Z")));
        assert_eq!(friday.next_change(at("2026-01-03T04:00:00Z")), Some(at("2026-01-09T22:00:00Z")));
        let always = window(&DAILY, "00:00", "00:00", "UTC");
        assert!(always.is_open(at("2026-01-02T00:00:00Z")) && always.is_open(at("2026-01-02T23:59:59Z")));
    }

    #[test]
    fn a_window_follows_the_clock_changes_both_ways() {
        // On 29 March 2026 Berlin skips from 02:00 to 03:00; on 25 October 03:00 is 02:00 once more.
        let night = window(&DAILY, "02:30", "04:00", "Europe/Berlin");
        assert_eq!(night.next_change(at("2026-03-29T00:00:00Z")), Some(at("2026-03-29T01:30:00Z")), "moved to 03:30");
        assert_eq!(night.next_change(at("2026-03-29T01:30:00Z")), Some(at("2026-03-29T02:00:00Z")));
        let gap = window(&DAILY, "02:15", "02:45", "Europe/Berlin");
        assert_eq!(gap.next_change(at("2026-03-29T00:00:00Z")), Some(at("2026-03-29T01:15:00Z")), "moved as a whole");
        assert_eq!(night.next_change(at("2026-10-25T00:00:00Z")), Some(at("2026-10-25T00:30:00Z")), "the first 02:30");
        assert_eq!(night.next_change(at("2026-10-25T00:30:00Z")), Some(at("2026-10-25T03:00:00Z")), "2.5 hours long");
    }

    #[test]
    fn backlogs_read_what_they_show() {
        for text in ["10000", "64KiB", "5%", "0.5%"] {
            assert_eq!(text.parse::<BacklogSize>().unwrap().to_string(), text);
        }
        assert_eq!("2MiB".parse::<BacklogSize>().unwrap(), BacklogSize::Bytes(2 << 20));
        assert!("much".parse::<BacklogSize>().is_err() && "101%".parse::<BacklogSize>().is_err());
    }

    const ZONES: [&str; 6] =
        ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "Africa/Casablanca"];

    fn instants() -> impl Strategy<Value = Timestamp> {
        // 2024 to 2030, to the millisecond: a dozen clock changes of each zone.
        (1_704_067_200_000_i64..1_893_456_000_000).prop_map(|ms| Timestamp::from_millisecond(ms).unwrap())
    }

    fn recurrences() -> impl Strategy<Value = Recurrence> {
        let every = (instants(), 0_u32..200_000)
            .prop_map(|(first, interval_s)| Recurrence::Every { first: Some(first), interval_s });
        let cron = (0..60, 0..24, 0..ZONES.len()).prop_map(|(minute, hour, zone)| {
            let zone = TimeZone::get(ZONES[zone]).unwrap();
            Recurrence::Cron(Box::new(CronRule::parse(&format!("{minute} {hour} * * *"), zone).unwrap()))
        });
        prop_oneof![every, cron]
    }

    fn windows() -> impl Strategy<Value = Window> {
        let times = (0_i8..24, 0_i8..60, 0_i8..24, 0_i8..60, 0..ZONES.len(), 1_u8..128);
        times.prop_map(|(h1, m1, h2, m2, zone, days)| Window {
            days: DAILY.iter().enumerate().filter(|(n, _)| days >> n & 1 == 1).map(|(_, day)| *day).collect(),
            start: Time::constant(h1, m1, 0, 0),
            end: Time::constant(h2, m2, 0, 0),
            zone: TimeZone::get(ZONES[zone]).unwrap(),
        })
    }

    proptest! {
        #[test]
        fn between_the_latest_and_the_next_due_time_there_is_none(recurrence in recurrences(), now in instants()) {
            let (latest, next) = (recurrence.latest_due(now), recurrence.next_due(now));
            prop_assert!(latest.is_none_or(|due| due <= now));
            prop_assert!(next.is_none_or(|due| due > now));
            if let Some(next) = next {
                let just_before = next - SignedDuration::from_nanos(1);
                prop_assert_eq!(recurrence.latest_due(next), Some(next));
                prop_assert_eq!(recurrence.latest_due(just_before), latest);
            }
        }

        #[test]
        fn each_due_time_is_dealt_with_once_and_in_order(recurrence in recurrences(), begun in instants(), steps in prop::collection::vec((1_i64..100_000, any::<bool>(), any::<bool>()), 1..60)) {
            let (mut now, mut handled, mut waiting_for) = (begun, begun, None);
            for (seconds, busy, window_open) in steps {
                now += SignedDuration::from_secs(seconds);
                match decide(&recurrence, Moment { now, handled, busy, waiting_for, window_open }) {
                    DueDecision::Sleep(wake) => prop_assert!(wake.is_none_or(|wake| wake > now)),
                    DueDecision::Wait(due) => { prop_assert!(busy && due > handled); waiting_for = Some(due); }
                    DueDecision::Run(due) => { prop_assert!(!busy && due > handled && due <= now); handled = due; }
                    DueDecision::Skip(due, _) => { prop_assert!(due > handled && due <= now); handled = due; }
                }
            }
        }

        #[test]
        fn a_window_changes_exactly_when_it_says(window in windows(), now in instants()) {
            let Some(change) = window.next_change(now) else { return Err(TestCaseError::fail("it has days")); };
            prop_assert!(change > now);
            let open = window.is_open(now);
            let just_before = change - SignedDuration::from_nanos(1);
            prop_assert_eq!(window.is_open(just_before), open);
            // An opening opens; a closing may touch the opening of the next day.
            if !open { prop_assert!(window.is_open(change)); }
        }
    }
}
