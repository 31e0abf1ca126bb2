//! JSON types of a forecast, for the API and `ttlsweep forecast --json`.

use jiff::tz::TimeZone;
use serde::Serialize;
use utoipa::ToSchema;

use crate::api::dto::{seconds, time};
use crate::forecast::Forecast;
use crate::forecast::estimate::Estimate;
use crate::forecast::outlook::Outlook;
use crate::forecast::prefixes::{PrefixGroup, SOON};
use crate::forecast::report::{peak_text, text, times};
use crate::model::progress::TTL_BOUNDS_S;

/// An estimate of which keys expire when. An error is the half width of the 95 % confidence interval; 0 if all keys were read.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ForecastOutput {
    /// URL of the instance, without credentials.
    pub target: String,
    /// When the sample was taken.
    pub at: String,
    /// Time zone in whose local time the bins begin at round times.
    pub zone: String,
    /// Where the keys of each master were sampled.
    pub sources: Vec<SourceDto>,
    /// The estimate over all DBs together, without `db`.
    pub total: OutlookDto,
    /// The estimate for each DB, by its number.
    pub dbs: Vec<OutlookDto>,
    /// Spans in which far more keys expire than before and after, the largest first.
    pub peaks: Vec<PeakDto>,
    /// Groups by the first parts of key names; left out unless requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefixes: Option<Vec<PrefixDto>>,
    /// The report for people, as `ttlsweep forecast` prints it.
    pub report: String,
}

/// Where the keys of a master were sampled.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SourceDto {
    /// Address of the master whose keys were sampled.
    pub master: String,
    /// Address of the server that was sampled: a replica, or the master itself.
    pub addr: String,
    /// Number of keys in the sample.
    pub looked_at: u64,
    /// Time that the sampling took, in seconds.
    pub took_s: f64,
}

/// The estimate for one DB, or for all of them.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct OutlookDto {
    /// Number of the DB; left out for all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub db: Option<u32>,
    /// Keys in memory, expired ones included.
    pub keys: u64,
    /// Number of keys in the sample.
    pub looked_at: u64,
    /// Live keys with a TTL.
    pub with_ttl: Figure,
    /// Live keys without a TTL.
    pub without_ttl: Figure,
    /// Expired keys that are still in memory.
    pub expired: Figure,
    /// Keys that expire within a bound, and not within the bound before.
    pub within: Vec<WithinDto>,
    /// Keys that expire after the last bound.
    pub later: Figure,
    /// The histogram: bins of equal length.
    pub bins: Vec<BinDto>,
}

/// An estimated number of keys and the memory that they take.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub(crate) struct Figure {
    /// Estimated number of keys over all masters, scaled from the sample.
    pub keys: u64,
    /// Error of `keys`: half of the confidence interval.
    pub keys_error: u64,
    /// Memory in bytes by the mean size of a key; `null` if the server hides its memory.
    pub bytes: Option<u64>,
}

/// The keys that expire within a bound.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct WithinDto {
    /// The bound, in seconds from now.
    pub within_s: u64,
    /// How many keys, and their memory.
    #[serde(flatten)]
    pub figure: Figure,
}

/// The keys that expire in one bin of the histogram.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct BinDto {
    /// Time at which the bin begins (RFC 3339, UTC).
    pub from: String,
    /// Time at which the bin ends and the next one begins (RFC 3339, UTC).
    pub to: String,
    /// How many keys, and their memory.
    #[serde(flatten)]
    pub figure: Figure,
}

/// A span in which far more keys expire than before and after it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PeakDto {
    /// Time at which the first bin of the span begins (RFC 3339, UTC).
    pub from: String,
    /// Time at which the last bin of the span ends (RFC 3339, UTC).
    pub to: String,
    /// How many keys, and their memory.
    #[serde(flatten)]
    pub figure: Figure,
    /// The peak as a sentence.
    pub sentence: String,
}

/// The keys whose names begin with the same parts.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PrefixDto {
    /// The parts that the names begin with; bytes that are not printable ASCII are escaped. Empty: names of one part.
    pub prefix: String,
    /// Live keys of the group.
    pub keys: u64,
    /// Error of `keys`: half of the confidence interval.
    pub keys_error: u64,
    /// Live keys with a TTL.
    pub with_ttl: u64,
    /// Live keys that expire within `soon_s`.
    pub soon: u64,
    /// The bound of `soon`, in seconds.
    pub soon_s: u64,
    /// Live keys without a TTL.
    pub without_ttl: u64,
}

fn whole(number: f64) -> u64 {
    number.round() as u64
}

impl Figure {
    fn new(estimate: Estimate, outlook: &Outlook) -> Self {
        let Estimate { keys, .. } = estimate;
        Self { keys: whole(keys), keys_error: whole(estimate.error()), bytes: outlook.bytes(keys) }
    }
}

impl OutlookDto {
    fn new(db: Option<u32>, outlook: &Outlook, forecast: &Forecast) -> Self {
        let figure = |estimate| Figure::new(estimate, outlook);
        let within = TTL_BOUNDS_S.into_iter().zip(outlook.within);
        Self {
            db,
            keys: outlook.keys,
            looked_at: outlook.looked_at,
            with_ttl: figure(outlook.with_ttl),
            without_ttl: figure(outlook.without_ttl),
            expired: figure(outlook.expired()),
            within: within.map(|(within_s, keys)| WithinDto { within_s, figure: figure(keys) }).collect(),
            later: figure(outlook.later),
            bins: outlook
                .bins
                .iter()
                .enumerate()
                .map(|(bin, keys)| {
                    let (from, to) = times(forecast, &(bin..bin + 1));
                    BinDto { from: time(from), to: time(to), figure: figure(*keys) }
                })
                .collect(),
        }
    }
}

impl From<&PrefixGroup> for PrefixDto {
    fn from(group: &PrefixGroup) -> Self {
        Self {
            prefix: group.prefix.clone(),
            keys: whole(group.keys.keys),
            keys_error: whole(group.keys.error()),
            with_ttl: whole(group.with_ttl.keys),
            soon: whole(group.soon.keys),
            soon_s: SOON.as_secs(),
            without_ttl: whole(group.without_ttl.keys),
        }
    }
}

impl ForecastOutput {
    /// Converts a forecast; the report has local times of this zone.
    pub(crate) fn new(forecast: &Forecast, zone: &TimeZone) -> Self {
        let peak = |peak: &crate::forecast::bins::Peak| {
            let (from, to) = times(forecast, &peak.bins);
            PeakDto {
                from: time(from),
                to: time(to),
                figure: Figure::new(peak.keys, &forecast.total),
                sentence: peak_text(forecast, peak, zone),
            }
        };
        Self {
            target: forecast.target.clone(),
            at: time(forecast.at),
            zone: zone.iana_name().unwrap_or("local").to_owned(),
            sources: forecast
                .sources
                .iter()
                .map(|source| SourceDto {
                    master: source.master.to_string(),
                    addr: source.addr.to_string(),
                    looked_at: source.looked_at,
                    took_s: seconds(source.took),
                })
                .collect(),
            total: OutlookDto::new(None, &forecast.total, forecast),
            dbs: forecast.dbs.iter().map(|(db, outlook)| OutlookDto::new(Some(db.0), outlook, forecast)).collect(),
            peaks: forecast.peaks.iter().map(peak).collect(),
            prefixes: forecast.groups.as_ref().map(|groups| groups.iter().map(PrefixDto::from).collect()),
            report: text(forecast, zone),
        }
    }
}
