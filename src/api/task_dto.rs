//! JSON types of tasks and instances in our own API.

#![allow(unused_qualifications, reason = "in the code that utoipa's attributes make")]

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::dto::{FailureDto, HoldDto, ShardDto, Totals, held_by_reason, time};
use crate::model::bounds::Bounds;
use crate::model::schedule::{AutoScan, Recurrence, Window};
use crate::model::task::{Task, TaskState};
use crate::settings;
use crate::tasks::TaskView;

/// An instance with its newest task.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct InstanceDto {
    /// Id of the instance, as the settings have it.
    pub id: String,
    /// Id of the project that it belongs to.
    pub project_id: String,
    /// Name to show; the id if the settings have none.
    pub name: String,
    /// URL of the instance, without credentials.
    pub target: String,
    /// Whether its off-peak window is open; left out if it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window_open: Option<bool>,
    /// When the window opens or closes next.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window_changes_at: Option<String>,
    /// The next due time of its automatic scan.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_scan_at: Option<String>,
    /// When it was last swept completely.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_success_at: Option<String>,
    /// Expired keys in memory as its newest task last knew them: the estimate of a keep run, or what a complete sweep found and
    /// reclaimed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backlog: Option<u64>,
    /// `used_memory` of all its masters in bytes, as its newest task last saw it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub used_memory: Option<u64>,
    /// Its bounds; left out if it is not kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<KeepBounds>,
    /// Its newest task; left out if it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latest: Option<TaskDto>,
}

/// The bounds of an instance. A bound that is `off` or left out is none; without any bound the instance is not kept.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct KeepBounds {
    /// Most expired keys in the memory of each master: a number of keys, bytes, or a share of its keys with a TTL.
    #[schema(pattern = "^(off|[0-9]{1,12}(KiB|MiB|GiB)?|[0-9]{1,2}%)$", example = "5%")]
    pub max_backlog: Option<String>,
    /// Longest time that a key stays in memory after it has expired.
    #[schema(pattern = "^(off|[1-9][0-9]{0,5}(ms|s|min))$", example = "2s")]
    pub max_delay: Option<String>,
}

impl From<Bounds> for KeepBounds {
    fn from(bounds: Bounds) -> Self {
        let [(_, max_backlog), (_, max_delay)] = settings::bound_texts(bounds);
        Self { max_backlog: Some(max_backlog), max_delay: Some(max_delay) }
    }
}

/// A task as it is recorded.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TaskDto {
    /// Id of the task, a UUID.
    pub id: String,
    /// Id of the instance that it sweeps.
    pub instance_id: String,
    /// Id of the instance's project.
    pub project_id: String,
    /// URL of the instance, without credentials.
    pub target: String,
    /// `waiting`, `running`, `paused`, `interrupted`, `succeeded`, `failed` or `cancelled`.
    pub state: &'static str,
    /// `cli`, `api`, `schedule` or `keep`.
    pub cause: &'static str,
    /// When the task was created.
    pub created_at: String,
    /// When it began; left out before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<String>,
    /// When it ended; left out before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<String>,
    /// Expired keys that it reclaimed, also above 32 bits.
    pub reclaimed: u64,
    /// How much of its timeout it has used, in seconds.
    pub spent_s: f64,
    /// Whether it sweeps only while the instance's window is open.
    pub respect_window: bool,
    /// The settings of the sweep, by name.
    pub settings: BTreeMap<String, String>,
    /// Why it ended as it did, where that is no failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Why it failed; left out if it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<FailureDto>,
}

impl From<&Task> for TaskDto {
    fn from(task: &Task) -> Self {
        Self {
            id: task.id.to_string(),
            instance_id: task.instance_id.clone(),
            project_id: task.project_id.clone(),
            target: task.target.clone(),
            state: task.state.as_str(),
            cause: task.cause.as_str(),
            created_at: time(task.created_at),
            started_at: task.started_at.map(time),
            finished_at: task.finished_at.map(time),
            reclaimed: task.num,
            spent_s: (task.spent.as_secs_f64() * 1000.0).round() / 1000.0,
            respect_window: task.respect_window,
            settings: task.sweep.clone(),
            note: task.note.clone(),
            failure: task.failure.as_ref().map(FailureDto::from),
        }
    }
}

/// A task with its progress in detail.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TaskDetails {
    /// The fields of the task itself.
    #[serde(flatten)]
    pub task: TaskDto,
    /// Share of the sweep that is done, 0 to 1.
    pub progress: f64,
    /// Keys that SCAN has visited so far; a few are visited twice.
    pub scanned: u64,
    /// The holds at this moment; empty while it runs freely.
    pub holds: Vec<HoldDto>,
    /// The shards, in the order of their names.
    pub shards: Vec<ShardDto>,
}

impl From<&TaskView> for TaskDetails {
    fn from(view: &TaskView) -> Self {
        Self {
            task: (&view.task).into(),
            progress: view.progress(),
            scanned: view.snapshot.scanned(),
            holds: view.holds(),
            shards: view.shards(),
        }
    }
}

impl TaskView {
    fn progress(&self) -> f64 {
        (self.snapshot.fraction() * 10_000.0).round() / 10_000.0
    }

    fn shards(&self) -> Vec<ShardDto> {
        self.snapshot.shards.iter().map(|(shard, view)| ShardDto::new(shard.0.clone(), view)).collect()
    }

    fn holds(&self) -> Vec<HoldDto> {
        let held = self.snapshot.shards.iter().filter_map(|(shard, view)| {
            view.hold.map(|reason| HoldDto {
                shard: shard.0.clone(),
                reason: reason.as_str(),
                sentence: view.hold_text().unwrap_or_default(),
            })
        });
        let waits = self.snapshot.waits.map(|reason| HoldDto {
            shard: String::new(),
            reason: reason.as_str(),
            sentence: reason.sentence().to_owned(),
        });
        waits.into_iter().chain(held).collect()
    }
}

/// A list of tasks, newest first.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TaskList {
    /// The tasks of this page.
    pub tasks: Vec<TaskDto>,
    /// Number of matching tasks, over all pages.
    pub count: u64,
    /// Expired keys that all matching tasks reclaimed.
    pub reclaimed: u64,
    /// Names of the instances of the tasks in this list, by id, as far as the settings have them.
    pub instance_names: BTreeMap<String, String>,
}

/// Instances that the caller may see.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct InstanceList {
    /// The instances of this page.
    pub instances: Vec<InstanceDto>,
    /// Number of matching instances, over all pages.
    pub total: u64,
    /// Number of instances by the state of their newest task (`never`: without one), matching all parameters but `state`.
    #[schema(value_type = BTreeMap<String, u64>)]
    pub counts: BTreeMap<&'static str, u64>,
    /// Ids of the projects of all instances that the caller may see.
    pub projects: Vec<String>,
}

/// An instance with its schedule and settings.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct InstanceDetails {
    /// The fields of the instance itself.
    #[serde(flatten)]
    pub instance: InstanceDto,
    /// The next due times of its automatic scan.
    pub upcoming: Vec<String>,
    /// Its off-peak window; left out if it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<WindowDto>,
    /// Its automatic scan, set by the API or the settings file.
    pub schedule: ScheduleDto,
    /// `api` or `file`: where its bounds, or the lack of them, were set.
    pub keep_source: &'static str,
    /// The settings of its sweeps, by name, unless a request has others.
    pub settings: BTreeMap<String, String>,
}

/// An off-peak window, in which scheduled sweeps may run.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct WindowDto {
    /// Days on which it opens, `Mon` to `Sun`.
    pub days: Vec<String>,
    /// When it opens, in local time of the zone.
    pub start: String,
    /// When it closes, in local time; on the next day if this is not after `start`.
    pub end: String,
    /// Name of its time zone.
    pub zone: String,
}

impl From<&Window> for WindowDto {
    fn from(window: &Window) -> Self {
        let day = |day: &jiff::civil::Weekday| format!("{day:?}").chars().take(3).collect();
        Self {
            days: window.days.iter().map(day).collect(),
            start: window.start.strftime("%H:%M").to_string(),
            end: window.end.strftime("%H:%M").to_string(),
            zone: window.zone.iana_name().unwrap_or("UTC").to_owned(),
        }
    }
}

/// An automatic scan, by an interval or by a cron expression.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ScheduleDto {
    /// Whether it is switched on.
    pub enabled: bool,
    /// `api` or `file`: where it was set.
    pub source: &'static str,
    /// The cron expression; left out if it has an interval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cron: Option<String>,
    /// Time zone of the cron expression.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// The first due time; left out with a cron expression.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_scan_at: Option<String>,
    /// Seconds from one due time to the next; 0: once. Left out with a cron expression.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval_s: Option<u32>,
    /// Longest time that a scan may take, in seconds.
    pub timeout_s: u32,
    /// COUNT of the first SCAN.
    pub count: u32,
}

/// The word for where something was set.
pub(super) fn source(by_api: bool) -> &'static str {
    if by_api { "api" } else { "file" }
}

impl ScheduleDto {
    /// Converts the automatic scan in force. `by_api`: the API has set it, and not the settings file.
    pub(crate) fn new(auto_scan: &AutoScan, by_api: bool) -> Self {
        let (rule, every) = match &auto_scan.recurrence {
            Recurrence::Cron(rule) => (Some(rule), None),
            Recurrence::Every { first, interval_s } => (None, Some((*first, *interval_s))),
        };
        Self {
            enabled: auto_scan.enabled,
            source: source(by_api),
            cron: rule.map(|rule| rule.expression().to_owned()),
            zone: rule.map(|rule| rule.zone().to_owned()),
            first_scan_at: every.and_then(|(first, _)| first).map(time),
            interval_s: every.map(|(_, interval_s)| interval_s),
            timeout_s: auto_scan.timeout_s,
            count: auto_scan.count,
        }
    }
}

/// A sweep or keep run with its results.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct HistoryEntry {
    /// The fields of the task itself.
    #[serde(flatten)]
    pub task: TaskDto,
    /// Share of the sweep that is done, 0 to 1.
    pub progress: f64,
    /// Sums over all shards and DBs.
    pub totals: Totals,
    /// `used_memory` of all masters before the sweep minus that after it, in bytes: what it freed minus what clients wrote meanwhile.
    /// Left out if the memory of a master was not read twice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub freed_bytes: Option<i64>,
    /// Expired keys in memory: the estimate of a keep run, now or at its end, or what a complete sweep found and reclaimed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backlog: Option<u64>,
    /// Keys that the masters evicted during the sweep, to stay below `maxmemory`. Left out if one of them hides the number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evicted_keys: Option<u64>,
    /// Keys that the masters evicted from the end of the sweep to the beginning of the next one. Left out of the newest sweep, and where
    /// a master was restarted or is not in both.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evicted_keys_after: Option<u64>,
    /// Time held by reason, in seconds.
    #[schema(value_type = BTreeMap<String, f64>)]
    pub held_s: BTreeMap<&'static str, f64>,
    /// Number of masters that it sweeps.
    pub masters: usize,
    /// The holds at this moment; empty while it runs freely.
    pub holds: Vec<HoldDto>,
    /// The shards with their DBs, warnings and failures; left out if the request has `shards` false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shards: Option<Vec<ShardDto>>,
}

impl HistoryEntry {
    /// Converts the view of a task. `next` is the next task of the same instance.
    pub(crate) fn new(view: &TaskView, next: Option<&TaskView>, with_shards: bool) -> Self {
        let snapshot = &view.snapshot;
        let evicted: Option<Vec<u64>> = snapshot.shards.values().map(|shard| shard.evicted()).collect();
        let freed = |shard: &crate::model::progress::ShardView| {
            let (before, after) = (shard.memory_before.used?, shard.memory_after.used?);
            Some(i64::try_from(before).ok()? - i64::try_from(after).ok()?)
        };
        let freed: Option<Vec<i64>> = snapshot.shards.values().map(|shard| freed(shard)).collect();
        Self {
            task: (&view.task).into(),
            progress: view.progress(),
            totals: Totals::new(&view.task, snapshot),
            freed_bytes: freed.filter(|freed| !freed.is_empty()).map(|freed| freed.iter().sum()),
            backlog: snapshot
                .backlog()
                .or((view.task.state == TaskState::Succeeded && !view.task.keeps()).then_some(view.task.num)),
            evicted_keys: evicted.filter(|evicted| !evicted.is_empty()).map(|evicted| evicted.iter().sum()),
            evicted_keys_after: next.and_then(|next| snapshot.evicted_until(&next.snapshot)),
            held_s: held_by_reason(snapshot),
            masters: snapshot.shards.len(),
            holds: view.holds(),
            shards: with_shards.then(|| view.shards()),
        }
    }
}

/// A task in the stream of all tasks.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TaskProgress {
    /// Id of the task, a UUID.
    pub id: String,
    /// Id of the instance that it sweeps.
    pub instance_id: String,
    /// State of the task: see the field of the same name of a task.
    pub state: &'static str,
    /// `cli`, `api`, `schedule` or `keep`.
    pub cause: &'static str,
    /// When the task was created.
    pub created_at: String,
    /// When it began; left out before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<String>,
    /// When it ended; left out before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<String>,
    /// Share of the sweep that is done, 0 to 1.
    pub progress: f64,
    /// Keys that SCAN has visited so far; a few are visited twice.
    pub scanned: u64,
    /// Expired keys that it reclaimed so far.
    pub reclaimed: u64,
    /// The current holds of at most three of its masters.
    pub holds: Vec<HoldDto>,
    /// Why it ended as it did, where that is no failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Why it failed; left out if it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<FailureDto>,
}

/// Most holds of one task in the stream of all tasks: a cluster may have hundreds of masters.
const FEW_HOLDS: usize = 3;

impl From<&TaskView> for TaskProgress {
    fn from(view: &TaskView) -> Self {
        let task = &view.task;
        let mut holds = view.holds();
        holds.truncate(FEW_HOLDS);
        Self {
            id: task.id.to_string(),
            instance_id: task.instance_id.clone(),
            state: task.state.as_str(),
            cause: task.cause.as_str(),
            created_at: time(task.created_at),
            started_at: task.started_at.map(time),
            finished_at: task.finished_at.map(time),
            progress: view.progress(),
            scanned: view.snapshot.scanned(),
            reclaimed: task.num,
            holds,
            note: task.note.clone(),
            failure: task.failure.as_ref().map(FailureDto::from),
        }
    }
}
