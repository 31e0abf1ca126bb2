//! Parsers for the texts of single settings, and how their values are shown. Errors are sentences that show a valid form.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use jiff::civil::Weekday;
use jiff::tz::TimeZone;

use crate::model::shard::DbIndex;
use crate::model::target::Password;
use crate::model::throttle::{Limit, Limits};

/// Parses `off`, `auto`, or a value.
pub(super) fn limit<T, E>(value: impl Fn(&str) -> Result<T, E>) -> impl Fn(&str) -> Result<Limit<T>, String>
where
    E: fmt::Display,
{
    move |text| match text {
        "off" => Ok(Limit::Off),
        "auto" => Ok(Limit::Auto),
        _ => value(text).map(Limit::At).map_err(|e| format!("{e}; or write off or auto")),
    }
}

/// Parses `off` (`None`), or a value.
pub(super) fn unless_off<T, E>(value: impl Fn(&str) -> Result<T, E>) -> impl Fn(&str) -> Result<Option<T>, String>
where
    E: fmt::Display,
{
    move |text| match text {
        "off" => Ok(None),
        _ => value(text).map(Some).map_err(|e| format!("{e}; or write off")),
    }
}

/// Parses a number of bytes, with a binary unit if any: `65536`, `512KiB`, `64MiB`, `1GiB`.
///
/// # Errors
/// A sentence that shows a valid form.
pub fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" | "B" => Some(0),
        "KiB" | "kb" | "K" => Some(10),
        "MiB" | "mb" | "M" => Some(20),
        "GiB" | "gb" | "G" => Some(30),
        _ => None,
    };
    let number = digits.trim().parse::<u64>().ok();
    number
        .zip(shift)
        .and_then(|(number, shift)| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("`{text}` is not a number of bytes such as 65536, 512KiB or 64MiB"))
}

pub(super) fn given(text: &str) -> Result<Option<String>, String> {
    Ok(Some(text.to_owned()).filter(|t| !t.is_empty()))
}

pub(super) fn switch(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| format!("`{text}` is neither true nor false"))
}

pub(super) fn password_in(path: &str) -> Result<Option<Password>, String> {
    if path.is_empty() { Ok(None) } else { read_password(path).map(Some) }
}

/// Largest `max-slice`: a longer one is a mistake, such as a wrong unit.
const LONGEST_SLICE: Duration = Duration::from_millis(100);

pub(super) fn parse_dbs(text: &str) -> Result<Vec<DbIndex>, String> {
    let mut dbs = Vec::new();
    for part in text.split([',', ' ']).filter(|p| !p.is_empty()) {
        let db = part.parse().map(DbIndex).map_err(|_| format!("`{part}` is not a DB number"))?;
        if !dbs.contains(&db) {
            dbs.push(db);
        }
    }
    Ok(dbs)
}

/// Parses a duration with its unit: `75us`, `20ms`, `30s`, `6h`, `1h 30min`.
///
/// # Errors
/// A sentence that shows a valid form.
pub fn duration(text: &str) -> Result<Duration, String> {
    // A day is 24 hours. Months and years have no fixed length and are refused.
    let span = text
        .parse::<jiff::Span>()
        .ok()
        .and_then(|span| span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).ok());
    let parsed = span.and_then(|span| Duration::try_from(span).ok());
    match parsed {
        Some(duration) => Ok(duration),
        None if text.parse::<f64>().is_ok() => Err(format!("`{text}` needs a unit, such as {text}s or {text}min")),
        None => Err(format!("`{text}` is not a duration such as 75us, 20ms, 30s, 90min or 6h")),
    }
}

/// Parses `max-slice`, at most [`LONGEST_SLICE`].
pub(super) fn slice(text: &str) -> Result<Duration, String> {
    if text.parse::<f64>().is_ok_and(|number| number > 0.0) {
        return Err(format!("`{text}` needs a unit, such as {text}us"));
    }
    match duration(text)? {
        long if long > LONGEST_SLICE => Err(format!(
            "`{text}` is too long: all other clients may wait that long behind each batch; at most {}",
            show_duration(LONGEST_SLICE)
        )),
        short => Ok(short),
    }
}

/// Parses a duration above zero.
///
/// # Errors
/// A sentence that shows a valid form.
pub fn positive_duration(text: &str) -> Result<Duration, String> {
    let duration = duration(text)?;
    if duration.is_zero() { Err(format!("`{text}` must be above zero")) } else { Ok(duration) }
}

/// A duration in the form that [`positive_duration`] parses.
pub fn show_duration(duration: Duration) -> String {
    let signed = jiff::SignedDuration::try_from(duration).unwrap_or(jiff::SignedDuration::MAX);
    // ASCII only, for terminals and scripts.
    format!("{signed:#}").replace('µ', "u")
}

/// The text of each limit, by the key of its setting.
pub fn show_limits(limits: &Limits) -> BTreeMap<&'static str, String> {
    let span = |limit: Limit<Duration>| match limit {
        Limit::At(span) => show_duration(span),
        Limit::Off => "off".to_owned(),
        Limit::Auto => "auto".to_owned(),
    };
    BTreeMap::from([
        ("max-latency", span(limits.latency)),
        ("max-replica-lag", limits.replica_lag.to_string()),
        ("max-replica-silence", span(limits.replica_silence)),
        ("max-replica-buffer", limits.replica_buffer.to_string()),
        ("max-lazyfree", limits.lazyfree.to_string()),
        ("max-ops", limits.ops.to_string()),
        ("max-cpu", limits.cpu.to_string()),
        ("during-fork", if limits.hold_during_fork { "hold" } else { "go" }.to_owned()),
        ("abort-latency", span(limits.abort_latency)),
        ("abort-replica-lag", limits.abort_replica_lag.to_string()),
    ])
}

pub(super) fn read_password(path: &str) -> Result<Password, String> {
    let bytes = std::fs::read(path).map_err(|e| format!("cannot read {path}: {e}"))?;
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if line.is_empty() {
        return Err(format!("the first line of {path} is empty; it must be the password"));
    }
    Ok(Password::from(line.to_vec()))
}

/// The password in an environment variable; `None` if the variable is not set.
pub fn password_in_env(name: &str) -> Option<Password> {
    std::env::var_os(name).map(OsString::into_vec).map(Password::from)
}

/// Parses a SHA-256 of 64 hexadecimal digits.
pub(super) fn parse_sha256(text: &str) -> Result<[u8; 32], String> {
    let wrong = || "must be the SHA-256 of the token in 64 hexadecimal digits: printf %s TOKEN | sha256sum".to_owned();
    if text.len() != 64 || !text.is_ascii() {
        return Err(wrong());
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        let pair = std::str::from_utf8(pair).map_err(|_| wrong())?;
        *byte = u8::from_str_radix(pair, 16).map_err(|_| wrong())?;
    }
    Ok(bytes)
}

pub(super) fn some_text(text: &str) -> Result<String, String> {
    if text.trim().is_empty() { Err("must not be empty".to_owned()) } else { Ok(text.to_owned()) }
}

pub(super) fn readable(text: &str) -> Result<PathBuf, String> {
    match std::fs::File::open(text) {
        Ok(_) => Ok(PathBuf::from(text)),
        Err(e) => Err(format!("cannot read {text}: {e}")),
    }
}

pub(super) fn whole(text: &str, range: std::ops::RangeInclusive<u32>) -> Result<u32, String> {
    match text.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(format!("`{text}` is not a whole number between {} and {}", range.start(), range.end())),
    }
}

/// Parses a duration of whole seconds, at most `at_most` of them.
///
/// # Errors
/// A sentence that shows a valid form.
pub fn seconds(text: &str, at_most: u32) -> Result<u32, String> {
    let duration = positive_duration(text)?;
    match u32::try_from(duration.as_secs()) {
        Ok(seconds) if duration.subsec_nanos() == 0 && seconds <= at_most => Ok(seconds),
        _ => Err(format!("`{text}` must be whole seconds, at most {} minutes", at_most / 60)),
    }
}

pub(super) fn timestamp(text: &str) -> Result<Timestamp, String> {
    text.parse().map_err(|_| format!("`{text}` is not a UTC time such as 2026-01-31T02:00:00Z"))
}

pub(super) fn time_zone(text: &str) -> Result<TimeZone, String> {
    TimeZone::get(text).map_err(|_| format!("`{text}` is not a time zone such as Europe/Berlin or UTC"))
}

pub(super) fn weekday(text: &str) -> Result<Weekday, String> {
    match text {
        "mon" => Ok(Weekday::Monday),
        "tue" => Ok(Weekday::Tuesday),
        "wed" => Ok(Weekday::Wednesday),
        "thu" => Ok(Weekday::Thursday),
        "fri" => Ok(Weekday::Friday),
        "sat" => Ok(Weekday::Saturday),
        "sun" => Ok(Weekday::Sunday),
        _ => Err(format!("`{text}` is not one of mon, tue, wed, thu, fri, sat, sun")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_what_they_show() {
        for text in ["75us", "20ms", "30s", "6h", "360min", "1h 30min", "2d"] {
            let duration = positive_duration(text).unwrap();
            assert_eq!(positive_duration(&show_duration(duration)).unwrap(), duration, "{text}");
        }
    }
}
