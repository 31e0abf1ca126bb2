//! JSON types: the contract's task record, and our report beside it. Model types know nothing of JSON: they are converted
//! here.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;

use crate::model::bounds::KeepFigures;
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::{
    self, PassCounters, PassFigures, ServerFacts, ShardView, Snapshot, TTL_BOUNDS_S, TtlHistogram,
};
use crate::model::task::{Cause, Task};
use crate::settings::{ScanSettings, show_duration, show_limits};

/// Formats a time as the contract does: UTC with milliseconds.
pub(crate) fn time(at: Timestamp) -> String {
    format!("{at:.3}")
}

/// Limits a number to the contract's signed 32-bit integers.
pub(crate) fn clamp(number: u64) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// A scan in the contract's history.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct HistoryRecord {
    /// Id of the task, a UUID.
    pub id: String,
    /// Id of the instance, as the settings have it.
    pub instance_id: String,
    /// `waiting`, `running`, `success` or `failed`.
    pub status: &'static str,
    /// `manual`, or `auto` for a scheduled scan and a keep run.
    pub scan_type: &'static str,
    /// Expired keys that this scan reclaimed; at most 2147483647.
    pub num: i32,
    /// When the task was created.
    pub created_at: String,
    /// When the scan began; left out before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<String>,
    /// When the scan ended; left out before.
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
pub(crate) struct ScanOutput {
    /// The fields of the contract's record.
    #[serde(flatten)]
    pub record: HistoryRecord,
    /// What the contract's record lacks.
    pub report: Report,
}

/// The report of a task.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Report {
    /// `waiting`, `running`, `paused`, `interrupted`, `succeeded`, `failed` or `cancelled`.
    pub state: &'static str,
    /// URL of the instance, without credentials.
    pub target: String,
    /// The settings that were used.
    pub settings: SettingsDto,
    /// Sums over all shards and DBs.
    pub totals: Totals,
    /// The shards, in the order of their names.
    pub shards: Vec<ShardDto>,
    /// Why the task ended as it did, where that is no failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Why the task failed; left out if it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<FailureDto>,
}

/// The settings of one sweep.
#[derive(Debug, Serialize, ToSchema)]
#[allow(missing_docs, reason = "the names are those of the settings")]
pub(crate) struct SettingsDto {
    pub db: Vec<u32>,
    pub count: u32,
    pub max_slice: String,
    pub intensity: f64,
    pub min_intensity: f64,
    pub max_keys_per_sec: u32,
    /// Limits on the load, above which the sweep holds or fails: `off`, `auto` or a value.
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

/// Sums over all shards and DBs of a task.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Totals {
    /// Keys that SCAN visited; a few are visited twice.
    pub scanned: u64,
    /// Expired keys reclaimed, also above 32 bits.
    pub reclaimed: u64,
    /// Keys asked for with EXISTS or TTL.
    pub touched: u64,
    /// Batches (SCANs) that were answered.
    pub batches: u64,
    /// Batches, at most, whose keys are not in `reclaimed`: their replies were lost with a connection, or they may have been under way
    /// when the process was killed. If the batch journal is missing, more keys may be uncounted, and a warning of the shard says so.
    pub lost_replies: u64,
    /// Time from start to end, in seconds; `null` before the end.
    pub elapsed_s: Option<f64>,
    /// Time in which batches held a master, in seconds.
    pub active_s: f64,
    /// Time in which replies were on their way and the sweep did its own work, in seconds. Active, waited, rested and held add up to
    /// the time that the sweep of a shard took.
    pub waited_s: f64,
    /// Time rested for intensity and ceiling, in seconds.
    pub rested_s: f64,
    /// Time held for any reason, in seconds.
    pub held_s: f64,
}

/// A shard of a task.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ShardDto {
    /// Name of the shard: its address, its slots, or the name that sentinels give the master.
    pub shard: String,
    /// Its master; `null` until it was reached.
    pub server: Option<ServerDto>,
    /// Whether keys were touched, and why, in a sentence.
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
    /// How well its bounds are kept; left out for a sweep.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<KeepDto>,
    /// The passes over its DBs.
    pub dbs: Vec<PassDto>,
    /// Sentences that an operator should read.
    pub warnings: Vec<String>,
    /// Why the sweep of the shard failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<FailureDto>,
}

/// How well the bounds of a keep run are kept on a master. Numbers of keys are estimates from the laps before.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct KeepDto {
    /// Complete walks over all DBs.
    pub laps: u64,
    /// Expired keys in memory; `null` during the first lap.
    pub backlog: Option<u64>,
    /// Most expired keys that `max-backlog` allows; `null` without this bound.
    pub max_backlog: Option<u64>,
    /// Keys per second that expire and that the server does not reclaim by itself.
    pub inflow_per_s: f64,
    /// Longest time that a key can be in memory after it has expired, in seconds; `null` during the first lap.
    pub delay_s: Option<f64>,
    /// How long a lap is meant to take, in seconds; 0: as fast as the limits allow.
    pub lap_s: f64,
    /// Time for which a bound was missed, in seconds.
    pub missed_s: f64,
    /// Whether a bound is missed now.
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

/// Product, version and address of a server.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ServerDto {
    /// Name of the product, such as `Redis` or `Valkey`.
    pub product: String,
    /// Version of the product, such as `7.0.15`.
    pub version: String,
    /// Address of the connection to it.
    pub addr: String,
}

impl From<&ServerFacts> for ServerDto {
    fn from(server: &ServerFacts) -> Self {
        Self { product: server.product.clone(), version: server.version.clone(), addr: server.addr.to_string() }
    }
}

/// An amount of memory in bytes, before and after the sweep.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct MemoryDto {
    /// The value when the sweep began.
    pub before: Option<u64>,
    /// The value after the sweep, once background frees were done.
    pub after: Option<u64>,
}

/// The pass over one DB of one shard.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PassDto {
    /// Number of the DB, from 0.
    pub db: u32,
    /// Whether the whole DB was walked.
    pub complete: bool,
    /// Share of the cursor space that is done, 0 to 1.
    pub fraction: f64,
    /// DBSIZE when the pass began.
    pub keys_at_start: u64,
    /// Keys that SCAN visited; a few are visited twice.
    pub scanned: u64,
    /// Expired keys that were reclaimed in this DB.
    pub reclaimed: u64,
    /// Keys asked for with EXISTS or TTL.
    pub touched: u64,
    /// Expired keys that SCAN had left and the touch reclaimed.
    pub found_by_touch: u64,
    /// Batches (SCANs) that were answered.
    pub batches: u64,
    /// Batches, at most, whose keys are not in `reclaimed`, since their replies were lost.
    pub lost_replies: u64,
    /// How often the pass began again.
    pub restarts: u64,
    /// Batches that came without names.
    pub nameless: u64,
    /// COUNT of the last SCAN.
    pub count: u32,
    /// Share of the master's time that batches were allowed at the end, 0 to 1.
    pub intensity: f64,
    /// How long single batches held the master, in microseconds.
    pub slice_us: SliceDto,
    /// Mean server time of a SCAN in microseconds by `cmdstat_scan`, SCANs of other clients included.
    pub server_us_per_scan: Option<f64>,
    /// Time in which batches held the master, in seconds.
    pub active_s: f64,
    /// Time waited for replies, in seconds.
    pub waited_s: f64,
    /// Time rested for intensity and ceiling, in seconds.
    pub rested_s: f64,
    /// Time held by reason, in seconds.
    pub held_s: BTreeMap<&'static str, f64>,
    /// Remaining TTLs of the live keys; only with touch `ttl`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl: Option<TtlDto>,
}

/// Quantiles of the slices in microseconds, scaled to the mean of `cmdstat_scan` where that was read.
#[derive(Debug, Serialize, ToSchema)]
#[allow(missing_docs, reason = "the names of quantiles")]
pub(crate) struct SliceDto {
    pub p50: u64,
    pub p99: u64,
    pub max: u64,
}

/// Histogram of the remaining TTLs of live keys.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TtlDto {
    /// Number of keys that expire within this many seconds, and not within the bound before.
    pub within_s: BTreeMap<u64, u64>,
    /// Keys that expire after the last bound.
    pub later: u64,
    /// Keys without a TTL: they never expire.
    pub never: u64,
}

/// Why a shard is held.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct HoldDto {
    /// Name of the shard; empty: the whole task, which has not begun.
    pub shard: String,
    /// The reason as a word, such as `latency`.
    pub reason: &'static str,
    /// The reason as a sentence.
    pub sentence: String,
}

/// Why a task or a shard failed.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct FailureDto {
    /// The kind of failure as a word, such as `cannot_connect`.
    pub kind: &'static str,
    /// The contract's error code, if it has one for this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_code: Option<&'static str>,
    /// What happened and why, in a sentence.
    pub message: String,
    /// What to do about it, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// The contract's error code for a failure: `DCS.4818` for a server that cannot be swept; it has none for others.
pub(crate) fn contract_code(kind: FailureKind) -> Option<&'static str> {
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
    // Rounded to milliseconds: more digits would suggest an accuracy that the measurements do not have.
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
    /// Converts the view of a shard.
    pub(crate) fn new(shard: String, view: &ShardView) -> Self {
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

/// Time for which the passes of a task were held, by reason, in seconds.
pub(super) fn held_by_reason(snapshot: &Snapshot) -> BTreeMap<&'static str, f64> {
    let held = progress::held_by_reason(snapshot.counters());
    held.into_iter().map(|(reason, time)| (reason.as_str(), seconds(time))).collect()
}

impl Totals {
    /// Sums over the passes of a task.
    pub(crate) fn new(task: &Task, snapshot: &Snapshot) -> Self {
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
    /// Makes the report of a task.
    pub(crate) fn new(task: &Task, snapshot: &Snapshot, settings: &ScanSettings) -> Self {
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
