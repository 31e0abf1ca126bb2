//! A forecast as people read it: a picture of the time ahead, and the peaks in words.

use std::fmt::Write as _;
use std::ops::Range;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::forecast::Forecast;
use crate::forecast::bins::Peak;
use crate::forecast::estimate::Estimate;
use crate::forecast::outlook::Outlook;
use crate::model::format::{bytes, grouped, span, table};

/// Lines of the picture, at most.
const LINES: usize = 24;
/// Letters of the longest bar.
const WIDTH: usize = 40;
/// Why the errors may be too small, and what to do.
const SLOTS_ARE_UNKNOWN: &str = "note: the user may not ask how many keys are in which hash slot; if hash tags put most keys into few \
slots, the errors are too small (grant '+cluster|countkeysinslot')\n";
const WITHIN: [&str; 6] = ["1 minute", "10 minutes", "1 hour", "6 hours", "1 day", "7 days"];

/// Everything, in a zone's time.
pub(crate) fn text(forecast: &Forecast, zone: &TimeZone) -> String {
    let mut text = String::new();
    let at = forecast.at.to_zoned(zone.clone());
    let _ = writeln!(text, "{} at {}", forecast.target, at.strftime("%Y-%m-%d %H:%M:%S %Z"));
    for source in &forecast.sources {
        let role = if source.addr == source.master { "the master" } else { "a replica" };
        let _ = writeln!(
            text,
            "{}: {} keys looked at on {role}, {}, in {}",
            source.master,
            grouped(source.looked_at),
            source.addr,
            span(source.took)
        );
    }
    if forecast.sources.iter().any(|source| source.slots_are_unknown) {
        text.push_str(SLOTS_ARE_UNKNOWN);
    }
    let _ = writeln!(text);
    text.push_str(&sizes(forecast));
    let _ = writeln!(text);
    text.push_str(&soon(&forecast.total));
    let _ = writeln!(text);
    text.push_str(&picture(forecast, zone));
    for peak in &forecast.peaks {
        let _ = writeln!(text, "peak: {}", peak_text(forecast, peak, zone));
    }
    if let Some(groups) = &forecast.groups {
        let heading = ["names that begin with", "keys", "with a TTL", "within an hour", "without"];
        let mut rows = vec![heading.map(str::to_owned).to_vec()];
        rows.extend(groups.iter().map(|group| {
            let name = if group.prefix.is_empty() { "(one part)".to_owned() } else { group.prefix.clone() };
            vec![name, number(group.keys), number(group.with_ttl), number(group.soon), number(group.without_ttl)]
        }));
        let _ = write!(text, "\n{}", table(&rows));
    }
    text
}

/// A number with its error, which is left out where there is none.
fn number(estimate: Estimate) -> String {
    let keys = grouped(estimate.keys.round() as u64);
    match estimate.error().round() as u64 {
        0 => keys,
        error => format!("{keys} ±{}", grouped(error)),
    }
}

fn sizes(forecast: &Forecast) -> String {
    let heading = ["", "keys", "live with a TTL", "without", "expired, in memory", "bytes a key"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    let mut row = |name: String, outlook: &Outlook| {
        let each = outlook.bytes_per_key.map_or_else(|| "-".to_owned(), |each| grouped(each as u64));
        rows.push(vec![
            name,
            grouped(outlook.keys),
            number(outlook.with_ttl),
            number(outlook.without_ttl),
            number(outlook.expired()),
            each,
        ]);
    };
    forecast.dbs.iter().for_each(|(db, outlook)| row(db.to_string(), outlook));
    if forecast.dbs.len() > 1 {
        row("all".to_owned(), &forecast.total);
    }
    table(&rows)
}

fn soon(outlook: &Outlook) -> String {
    let mut rows = vec![vec!["expire within".to_owned(), "keys".to_owned(), "memory".to_owned()]];
    let mut row = |name: &str, keys: Estimate| {
        let memory = outlook.bytes(keys.keys).map_or_else(|| "-".to_owned(), bytes);
        rows.push(vec![format!("  {name}"), number(keys), memory]);
    };
    let mut sum = Estimate::default();
    for (name, within) in WITHIN.iter().zip(outlook.within) {
        sum += within;
        row(name, sum);
    }
    row("later", outlook.later);
    table(&rows)
}

fn picture(forecast: &Forecast, zone: &TimeZone) -> String {
    let bins = &forecast.total.bins;
    let in_line = bins.len().div_ceil(LINES).max(1);
    let lines: Vec<(usize, Estimate)> =
        bins.chunks(in_line).enumerate().map(|(line, bins)| (line * in_line, bins.iter().copied().sum())).collect();
    let most = lines.iter().map(|(_, keys)| keys.keys).fold(0.0, f64::max);
    let days = forecast.bins.step.as_secs() * in_line as u64 * LINES as u64 > 86_400;
    let mut rows = Vec::new();
    for (bin, keys) in lines {
        let begins = forecast.bins.begins(bin).to_zoned(zone.clone());
        let format = if days { "%a %d %H:%M" } else { "%H:%M" };
        let halves = if most > 0.0 { (keys.keys / most * 2.0 * WIDTH as f64).round() as usize } else { 0 };
        let bar = format!("{}{}", "█".repeat(halves / 2), if halves % 2 == 1 { "▌" } else { "" });
        rows.push(format!("{}  {bar:<WIDTH$}  {}", begins.strftime(format), number(keys)).trim_end().to_owned());
    }
    let each = span(forecast.bins.step * u32::try_from(in_line).unwrap_or(1));
    format!("keys that expire in each {each} from then on, local time\n{}\n", rows.join("\n"))
}

/// When the first of these bins begins and the last one ends.
pub(crate) fn times(forecast: &Forecast, bins: &Range<usize>) -> (Timestamp, Timestamp) {
    (forecast.bins.begins(bins.start), forecast.bins.begins(bins.end))
}

/// `4,100,000 keys (about 390 MiB) expire between 02:00 and 02:10`.
pub(crate) fn peak_text(forecast: &Forecast, peak: &Peak, zone: &TimeZone) -> String {
    let (from, to) = times(forecast, &peak.bins);
    let (from, to) = (from.to_zoned(zone.clone()), to.to_zoned(zone.clone()));
    let today = from.date() == forecast.at.to_zoned(zone.clone()).date();
    let memory = forecast.total.bytes(peak.keys.keys).map(|size| format!(" (about {})", bytes(size)));
    format!(
        "{} keys{} expire between {} and {}",
        number(peak.keys),
        memory.unwrap_or_default(),
        from.strftime(if today { "%H:%M:%S" } else { "%a %d %H:%M:%S" }),
        to.strftime("%H:%M:%S")
    )
}
