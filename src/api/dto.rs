//! Wire shapes: the contract's task record, and our report beside it. Model types know nothing of JSON; this file is
//! where the two meet.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;

use crate::model::failure::{Failure, FailureKind};
use crate::model::keep::KeepFigures;
use crate::model::progress::{
    self, PassCounters, PassFigures, ServerFacts, ShardView, Snapshot, TTL_BOUNDS_S, TtlHistogram,
};
use crate::model::task::{Cause, Task};
use crate::settings::{ScanSettings, show_duration, show_limits};

/// A time as the contract writes it: UTC with milliseconds.
pub fn time(at: Timestamp) -> String {
    format!("{at:.3}")
}

/// The contract's numbers are signed 32-bit integers: larger ones are cut to the largest.
pub fn clamp(number: u64) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// The contract's history record.
#[derive(Debug, Serialize, ToSchema)]
pub struct HistoryRecord {
    /// Task id.
    pub id: String,
    /// Instance id.
    pub instance_id: String,
    /// `waiting`, `running`, `success` or `failed`.
    pub status: &'static str,
    /// `manual` or `auto`.
    pub scan_type: &'static str,
    /// Expired keys that this scan released, cut to 32 bits.
    pub num: i32,
    /// When it was asked for.
    pub created_at: String,
    /// When it began; left out before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<String>,
    /// When it ended; left out before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<String>,
}

impl From<&Task> for HistoryRecord {
    fn from(task: &Task) -> Self {
        Self {
            id: task.id.to_string(),
            instance_id: task.instance_id.clone(),
            status: task.state.contract_word(),
            scan_type: match task.cause {
                Cause::Cli | Cause::Api => "manual",
                Cause::Schedule | Cause::Keep => "auto",
            },
            num: clamp(task.num),
            created_at: time(task.created_at),
            started_at: task.started_at.map(time),
            finished_at: task.finished_at.map(time),
        }
    }
}

/// What `ttlsweep scan --json` prints: the history record, and the report beside it.
#[derive(Debug, Serialize, ToSchema)]
pub struct ScanOutput {
    /// The contract's record.
    #[serde(flatten)]
    pub record: HistoryRecord,
    /// Everything else.
    pub report: Report,
}

/// Everything that is known of a task.
#[derive(Debug, Serialize, ToSchema)]
pub struct Report {
    /// Our own, finer state.
    pub state: &'static str,
    /// Where the instance is.
    pub target: String,
    /// The settings used.
    pub settings: SettingsDto,
    /// Sums over all shards and DBs.
    pub totals: Totals,
    /// Each shard.
    pub shards: Vec<ShardDto>,
    /// What is worth knowing of its end and is no failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Why it did not succeed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<FailureDto>,
}

/// The settings of one sweep.
#[derive(Debug, Serialize, ToSchema)]
#[allow(missing_docs, reason = "the names are those of the settings")]
pub struct SettingsDto {
    pub db: Vec<u32>,
    pub count: u32,
    pub max_slice: String,
    pub intensity: f64,
    pub min_intensity: f64,
    pub max_keys_per_sec: u32,
    /// Above which load to hold or to give up: `off`, `auto` or a value.
    pub limits: BTreeMap<String, String>,
    pub allow_slow: bool,
    pub assist_expiry: String,
    pub touch: &'static str,
    pub payload: &'static str,
    pub timeout: String,
    pub parallel: usize,
    pub follow: bool,
}

impl From<&ScanSettings> for SettingsDto {
    fn from(settings: &ScanSettings) -> Self {
        Self {
            db: settings.dbs.iter().map(|db| db.0).collect(),
            count: settings.count,
            max_slice: show_duration(settings.max_slice),
            intensity: settings.tuning.intensity,
            min_intensity: settings.tuning.min_intensity,
            max_keys_per_sec: settings.tuning.max_keys_per_sec.unwrap_or(0),
            limits: show_limits(&settings.tuning.limits)
                .into_iter()
                .map(|(key, text)| (key.replace('-', "_"), text))
                .collect(),
            allow_slow: settings.allow_slow,
            assist_expiry: show_duration(settings.assist_expiry.unwrap_or_default()),
            touch: settings.touch.as_str(),
            payload: settings.payload.as_str(),
            timeout: show_duration(settings.timeout),
            parallel: settings.parallel.map_or(0, usize::from),
            follow: settings.follow,
        }
    }
}

/// Sums.
#[derive(Debug, Serialize, ToSchema)]
pub struct Totals {
    /// Keys that SCAN looked at.
    pub scanned: u64,
    /// Expired keys freed, not cut.
    pub reclaimed: u64,
    /// Keys asked with EXISTS or TTL.
    pub touched: u64,
    /// SCANs answered.
    pub batches: u64,
    /// Batches whose reply was lost: what they freed is not in `reclaimed`.
    pub lost_replies: u64,
    /// From start to end, in seconds; `null` before the end.
    pub elapsed_s: Option<f64>,
    /// Time in which batches held a master, in seconds.
    pub active_s: f64,
    /// Time in which answers were on their way and the sweep did its own work, in seconds. Active, waited, rested and held add up to
    /// the time that the sweep of a shard took.
    pub waited_s: f64,
    /// Time rested for intensity and ceiling, in seconds.
    pub rested_s: f64,
    /// Time held, in seconds.
    pub held_s: f64,
}

/// One shard.
#[derive(Debug, Serialize, ToSchema)]
pub struct ShardDto {
    /// Its name.
    pub shard: String,
    /// What its master is.
    pub server: Option<ServerDto>,
    /// What the audit found.
    pub touch: &'static str,
    /// `used_memory` in bytes, before and after.
    pub used_memory: MemoryDto,
    /// `used_memory_rss` in bytes, before and after: what the operating system sees.
    pub used_memory_rss: MemoryDto,
    /// `maxmemory` in bytes; 0: no limit.
    pub maxmemory: Option<u64>,
    /// Keys that the server had evicted before the sweep, since it was started.
    pub evicted_keys_before: Option<u64>,
    /// Keys that the server evicted during the sweep, to stay below `maxmemory`: they are not in `reclaimed`. `null` before
    /// the end.
    pub evicted_keys: Option<u64>,
    /// How well its bounds are kept; left out where it is swept once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<KeepDto>,
    /// Each DB.
    pub dbs: Vec<PassDto>,
    /// Things to know.
    pub warnings: Vec<String>,
    /// Why it ended early.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<FailureDto>,
}

/// How well the bounds of a keep run are kept on a master. Keys are estimated, by what the laps before brought.
#[derive(Debug, Serialize, ToSchema)]
pub struct KeepDto {
    /// Complete walks over all DBs.
    pub laps: u64,
    /// Expired keys in memory; `null` during the first lap.
    pub backlog: Option<u64>,
    /// Most of them that `max-backlog` allows; `null` without it.
    pub max_backlog: Option<u64>,
    /// Keys that expire each second and that only the walk frees.
    pub inflow_per_s: f64,
    /// Longest time that a key can be in memory after it has expired, in seconds; `null` during the first lap.
    pub delay_s: Option<f64>,
    /// How long a lap is meant to take, in seconds; 0: as fast as the limits allow.
    pub lap_s: f64,
    /// How long a bound was missed, in seconds.
    pub missed_s: f64,
    /// Whether one is missed now.
    pub is_missed: bool,
}

impl From<&KeepFigures> for KeepDto {
    fn from(figures: &KeepFigures) -> Self {
        Self {
            laps: figures.laps,
            backlog: figures.backlog,
            max_backlog: figures.max_backlog,
            inflow_per_s: (figures.inflow * 10.0).round() / 10.0,
            delay_s: figures.delay.map(seconds),
            lap_s: seconds(figures.lap),
            missed_s: seconds(figures.missed),
            is_missed: figures.is_missed,
        }
    }
}

/// A server.
#[derive(Debug, Serialize, ToSchema)]
pub struct ServerDto {
    /// `Redis`, `Valkey`.
    pub product: String,
    /// Its own version.
    pub version: String,
    /// Where it was reached.
    pub addr: String,
}

impl From<&ServerFacts> for ServerDto {
    fn from(server: &ServerFacts) -> Self {
        Self { product: server.product.clone(), version: server.version.clone(), addr: server.addr.to_string() }
    }
}

/// A figure of memory in bytes.
#[derive(Debug, Serialize, ToSchema)]
pub struct MemoryDto {
    /// When the sweep began.
    pub before: Option<u64>,
    /// After it, once lazy frees had settled.
    pub after: Option<u64>,
}

/// One DB of one shard.
#[derive(Debug, Serialize, ToSchema)]
pub struct PassDto {
    /// The DB.
    pub db: u32,
    /// Whether the pass is complete.
    pub complete: bool,
    /// Share that is done, 0 to 1.
    pub fraction: f64,
    /// DBSIZE when it began.
    pub keys_at_start: u64,
    /// Keys that SCAN looked at.
    pub scanned: u64,
    /// Expired keys freed.
    pub reclaimed: u64,
    /// Keys asked with EXISTS or TTL.
    pub touched: u64,
    /// Dead keys that SCAN had left.
    pub found_by_touch: u64,
    /// SCANs answered.
    pub batches: u64,
    /// Replies lost.
    pub lost_replies: u64,
    /// How often it began again.
    pub restarts: u64,
    /// Of the batches, those that came without names.
    pub nameless: u64,
    /// COUNT at the end.
    pub count: u32,
    /// Share of the master's time that was taken at the end.
    pub intensity: f64,
    /// How long batches held the master.
    pub slice_us: SliceDto,
    /// Server time of one SCAN by `cmdstat_scan`, other clients' in it.
    pub server_us_per_scan: Option<f64>,
    /// Time in which batches held the master, in seconds.
    pub active_s: f64,
    /// Time waited, in seconds.
    pub waited_s: f64,
    /// Time rested, in seconds.
    pub rested_s: f64,
    /// Time held by reason, in seconds.
    pub held_s: BTreeMap<&'static str, f64>,
    /// Remaining TTLs of the keys that live, with touch `ttl`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl: Option<TtlDto>,
}

/// Microseconds, brought to the mean of `cmdstat_scan` where that was read.
#[derive(Debug, Serialize, ToSchema)]
#[allow(missing_docs, reason = "quantiles")]
pub struct SliceDto {
    pub p50: u64,
    pub p99: u64,
    pub max: u64,
}

/// When keys expire.
#[derive(Debug, Serialize, ToSchema)]
pub struct TtlDto {
    /// Keys that expire within this many seconds, and not within the bound before.
    pub within_s: BTreeMap<u64, u64>,
    /// Keys that live longer than the last bound.
    pub later: u64,
    /// Keys without a TTL.
    pub never: u64,
}

/// Why a shard stands still.
#[derive(Debug, Serialize, ToSchema)]
pub struct HoldDto {
    /// Which shard; empty: the whole task, which has not begun.
    pub shard: String,
    /// The reason's word.
    pub reason: &'static str,
    /// The reason as people read it.
    pub sentence: String,
}

/// A failure.
#[derive(Debug, Serialize, ToSchema)]
pub struct FailureDto {
    /// Its kind.
    pub kind: &'static str,
    /// The contract's code where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_code: Option<&'static str>,
    /// What happened and why.
    pub message: String,
    /// What to do next.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// The contract's code for a failure, where it has one: `DCS.4818` for what cannot be scanned.
pub fn contract_code(kind: FailureKind) -> Option<&'static str> {
    matches!(kind, FailureKind::Unsupported | FailureKind::NotAMaster).then_some("DCS.4818")
}

impl From<&Failure> for FailureDto {
    fn from(failure: &Failure) -> Self {
        Self {
            kind: failure.kind.as_str(),
            error_code: contract_code(failure.kind),
            message: failure.message.clone(),
            hint: failure.hint.clone(),
        }
    }
}

pub(super) fn seconds(span: Duration) -> f64 {
    // Milliseconds are as fine as anything here is known; more digits would only look exact.
    (span.as_secs_f64() * 1000.0).round() / 1000.0
}

impl PassDto {
    fn new(db: u32, figures: &PassFigures) -> Self {
        Self {
            db,
            complete: figures.checkpoint.position.to_send().is_none(),
            fraction: figures.checkpoint.fraction(),
            keys_at_start: figures.checkpoint.keys_at_start,
            scanned: figures.counters.scanned,
            reclaimed: figures.counters.reclaimed,
            touched: figures.counters.touched,
            found_by_touch: figures.counters.found_by_touch,
            batches: figures.counters.batches,
            lost_replies: figures.counters.lost_replies,
            restarts: figures.counters.restarts,
            nameless: figures.counters.nameless,
            count: figures.gauges.count,
            intensity: (figures.gauges.intensity * 1000.0).round() / 1000.0,
            slice_us: SliceDto {
                p50: figures.gauges.slice.p50_us,
                p99: figures.gauges.slice.p99_us,
                max: figures.gauges.slice.max_us,
            },
            server_us_per_scan: figures.gauges.server_us_per_scan.map(|us| (us * 10.0).round() / 10.0),
            active_s: seconds(figures.counters.active),
            waited_s: seconds(figures.counters.waited),
            rested_s: seconds(figures.counters.rested),
            held_s: figures.counters.held.iter().map(|(reason, held)| (reason.as_str(), seconds(*held))).collect(),
            ttl: (!figures.counters.ttl.is_empty()).then(|| TtlDto::from(&figures.counters.ttl)),
        }
    }
}

impl From<&TtlHistogram> for TtlDto {
    fn from(ttl: &TtlHistogram) -> Self {
        Self { within_s: TTL_BOUNDS_S.into_iter().zip(ttl.within).collect(), later: ttl.later, never: ttl.never }
    }
}

impl ShardDto {
    /// What is known of a shard.
    pub fn new(shard: String, view: &ShardView) -> Self {
        Self {
            shard,
            server: view.server.as_ref().map(ServerDto::from),
            touch: view.touch.sentence(),
            used_memory: MemoryDto { before: view.memory_before.used, after: view.memory_after.used },
            used_memory_rss: MemoryDto { before: view.memory_before.rss, after: view.memory_after.rss },
            maxmemory: view.memory_before.max,
            evicted_keys_before: view.memory_before.evicted,
            evicted_keys: view.evicted(),
            keep: view.keep.as_ref().map(KeepDto::from),
            dbs: view.passes.iter().map(|(db, figures)| PassDto::new(db.0, figures)).collect(),
            warnings: view.warnings.clone(),
            failure: view.failure.as_ref().map(FailureDto::from),
        }
    }
}

/// Time that the passes of a task were held, by reason, in seconds.
pub(super) fn held_by_reason(snapshot: &Snapshot) -> BTreeMap<&'static str, f64> {
    let held = progress::held_by_reason(snapshot.counters());
    held.into_iter().map(|(reason, time)| (reason.as_str(), seconds(time))).collect()
}

impl Totals {
    /// The sums of a task.
    pub fn new(task: &Task, snapshot: &Snapshot) -> Self {
        let sum = |field: fn(&PassCounters) -> u64| snapshot.counters().map(field).sum();
        let time = |field: fn(&PassCounters) -> Duration| seconds(snapshot.counters().map(field).sum());
        let elapsed = task.started_at.zip(task.finished_at).map(|(start, end)| end.duration_since(start));
        Self {
            scanned: snapshot.scanned(),
            reclaimed: snapshot.reclaimed(),
            touched: sum(|pass| pass.touched),
            batches: sum(|pass| pass.batches),
            lost_replies: snapshot.lost_replies(),
            elapsed_s: elapsed.map(|span| span.as_millis() as f64 / 1000.0),
            active_s: time(|pass| pass.active),
            waited_s: time(|pass| pass.waited) + seconds(snapshot.shards.values().map(|shard| shard.settling).sum()),
            rested_s: time(|pass| pass.rested),
            held_s: time(PassCounters::held_total),
        }
    }
}

impl Report {
    /// The report of a task.
    pub fn new(task: &Task, snapshot: &Snapshot, settings: &ScanSettings) -> Self {
        Self {
            state: task.state.as_str(),
            target: task.target.clone(),
            settings: settings.into(),
            totals: Totals::new(task, snapshot),
            shards: snapshot.shards.iter().map(|(shard, view)| ShardDto::new(shard.0.clone(), view)).collect(),
            note: task.note.clone(),
            failure: task.failure.as_ref().map(FailureDto::from),
        }
    }
}
