//! A forecast as the API and `ttlsweep forecast --json` give it.

use jiff::tz::TimeZone;
use serde::Serialize;
use utoipa::ToSchema;

use crate::api::dto::{seconds, time};
use crate::forecast::estimate::Estimate;
use crate::forecast::prefixes::{Group, SOON};
use crate::forecast::report::{peak_text, text, times};
use crate::forecast::{Forecast, Outlook};
use crate::model::progress::TTL_BOUNDS_S;

/// What will expire when. Errors: in 19 of 20 cases the truth is no further away; 0 where all keys were looked at.
#[derive(Debug, Serialize, ToSchema)]
pub struct ForecastOutput {
    /// Where the instance is, without any secret.
    pub target: String,
    /// When it was looked at.
    pub at: String,
    /// The zone in whose time the parts of the histogram are round.
    pub zone: String,
    /// Where each master's keys were looked at.
    pub sources: Vec<SourceDto>,
    /// All DBs together.
    pub total: OutlookDto,
    /// Each DB.
    pub dbs: Vec<OutlookDto>,
    /// Spans in which far more keys expire than before and after, the largest first.
    pub peaks: Vec<PeakDto>,
    /// By the first parts of key names, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefixes: Option<Vec<PrefixDto>>,
    /// The same for people.
    pub report: String,
}

/// Where a master's keys were looked at.
#[derive(Debug, Serialize, ToSchema)]
pub struct SourceDto {
    /// The master.
    pub master: String,
    /// Who was asked: a replica, or the master itself.
    pub addr: String,
    /// Keys that were looked at.
    pub looked_at: u64,
    /// How long that took, in seconds.
    pub took_s: f64,
}

/// One DB, or all of them.
#[derive(Debug, Serialize, ToSchema)]
pub struct OutlookDto {
    /// The DB; left out for all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub db: Option<u32>,
    /// Keys in memory, expired ones included.
    pub keys: u64,
    /// Keys that were looked at.
    pub looked_at: u64,
    /// Live keys with a TTL.
    pub with_ttl: Figure,
    /// Live keys without a TTL.
    pub without_ttl: Figure,
    /// Expired keys in memory.
    pub expired: Figure,
    /// Keys that expire within so many seconds, and not within the bound before.
    pub within: Vec<WithinDto>,
    /// Keys that live longer than the last bound.
    pub later: Figure,
    /// The time ahead in parts of equal length.
    pub bins: Vec<BinDto>,
}

/// A number of keys, with its error, and the bytes that they take, where the server tells its memory.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub struct Figure {
    /// The number.
    pub keys: u64,
    /// Its error.
    pub keys_error: u64,
    /// Their memory, by the mean size of a key.
    pub bytes: Option<u64>,
}

/// Keys that expire within a bound.
#[derive(Debug, Serialize, ToSchema)]
pub struct WithinDto {
    /// The bound in seconds.
    pub within_s: u64,
    /// How many.
    #[serde(flatten)]
    pub figure: Figure,
}

/// Keys that expire in a part of the time ahead.
#[derive(Debug, Serialize, ToSchema)]
pub struct BinDto {
    /// From when.
    pub from: String,
    /// To when.
    pub to: String,
    /// How many.
    #[serde(flatten)]
    pub figure: Figure,
}

/// A peak.
#[derive(Debug, Serialize, ToSchema)]
pub struct PeakDto {
    /// From when.
    pub from: String,
    /// To when.
    pub to: String,
    /// How many.
    #[serde(flatten)]
    pub figure: Figure,
    /// The same in words.
    pub sentence: String,
}

/// Keys whose names begin alike.
#[derive(Debug, Serialize, ToSchema)]
pub struct PrefixDto {
    /// The beginning; bytes that are no letters are escaped. Empty: names of one part.
    pub prefix: String,
    /// Live keys.
    pub keys: u64,
    /// The error of that.
    pub keys_error: u64,
    /// Those with a TTL.
    pub with_ttl: u64,
    /// Those that expire within `soon_s`.
    pub soon: u64,
    /// What soon is, in seconds.
    pub soon_s: u64,
    /// Those without a TTL.
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

impl From<&Group> for PrefixDto {
    fn from(group: &Group) -> Self {
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
    /// A forecast, in a zone's time.
    pub fn new(forecast: &Forecast, zone: &TimeZone) -> Self {
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
