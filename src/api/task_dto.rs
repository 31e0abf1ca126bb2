//! Tasks and instances as the own API answers with them.

#![allow(unused_qualifications, reason = "in the code that utoipa's attributes make")]

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use crate::api::dto::{FailureDto, HoldDto, ShardDto, Totals, held_by_reason, time};
use crate::api::keep::KeepBounds;
use crate::model::schedule::{AutoScan, Recurrence, Window};
use crate::model::task::{Task, TaskState};
use crate::tasks::TaskView;

/// An instance.
#[derive(Debug, Serialize, ToSchema)]
pub struct InstanceDto {
    /// Its id.
    pub id: String,
    /// Its project.
    pub project_id: String,
    /// What people call it.
    pub name: String,
    /// Where it is, without any secret.
    pub target: String,
    /// Whether its off-peak window is open; left out where it has none.
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
    /// Expired keys in memory as its newest task knew them last: a keep run estimates them; a complete sweep has found, and freed, so many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backlog: Option<u64>,
    /// `used_memory` of all its masters in bytes, as its newest task saw it last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub used_memory: Option<u64>,
    /// The bounds that it is kept to; left out where it is not kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep: Option<KeepBounds>,
    /// Its newest task.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latest: Option<TaskDto>,
}

/// A task.
#[derive(Debug, Serialize, ToSchema)]
pub struct TaskDto {
    /// Its id.
    pub id: String,
    /// The instance that it sweeps.
    pub instance_id: String,
    /// The instance's project.
    pub project_id: String,
    /// Where the instance is, without any secret.
    pub target: String,
    /// `waiting`, `running`, `paused`, `interrupted`, `succeeded`, `failed` or `cancelled`.
    pub state: &'static str,
    /// `cli`, `api`, `schedule` or `keep`.
    pub cause: &'static str,
    /// When it was asked for.
    pub created_at: String,
    /// When it began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<String>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<String>,
    /// Expired keys that it freed; not cut.
    pub reclaimed: u64,
    /// How much of the time allowed it has used, in seconds.
    pub spent_s: f64,
    /// Whether it sweeps only while the window is open.
    pub respect_window: bool,
    /// The settings used, by name.
    pub settings: BTreeMap<String, String>,
    /// What is worth knowing of its end and is no failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Why it did not succeed.
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

/// A task with everything that is known of its progress.
#[derive(Debug, Serialize, ToSchema)]
pub struct TaskDetails {
    /// The record.
    #[serde(flatten)]
    pub task: TaskDto,
    /// Share that is done, 0 to 1.
    pub progress: f64,
    /// Keys that SCAN looked at.
    pub scanned: u64,
    /// Why it stands still at this moment.
    pub holds: Vec<HoldDto>,
    /// Each shard.
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
pub struct TaskList {
    /// The tasks.
    pub tasks: Vec<TaskDto>,
    /// How many match, beyond this list too.
    pub count: u64,
    /// Expired keys that all of those freed.
    pub reclaimed: u64,
    /// What people call the instances of the tasks in this list, by id, as far as the settings name them.
    pub instance_names: BTreeMap<String, String>,
}

/// Instances that the caller may see.
#[derive(Debug, Serialize, ToSchema)]
pub struct InstanceList {
    /// The instances of this page.
    pub instances: Vec<InstanceDto>,
    /// How many match, on every page.
    pub total: u64,
    /// How many match but for `state`, by the state of their newest task; `never`: that have none.
    #[schema(value_type = BTreeMap<String, u64>)]
    pub counts: BTreeMap<&'static str, u64>,
    /// The projects of all instances that the caller may see.
    pub projects: Vec<String>,
}

/// An instance with its schedule and how it is swept.
#[derive(Debug, Serialize, ToSchema)]
pub struct InstanceDetails {
    /// What a list shows too.
    #[serde(flatten)]
    pub instance: InstanceDto,
    /// The next due times of its automatic scan.
    pub upcoming: Vec<String>,
    /// Its off-peak window.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<WindowDto>,
    /// Its automatic scan.
    pub schedule: ScheduleDto,
    /// `api` or `file`: who set its bounds, or that it has none.
    pub keep_source: &'static str,
    /// The settings that a sweep has where nobody asks for others, by name.
    pub settings: BTreeMap<String, String>,
}

/// An off-peak window.
#[derive(Debug, Serialize, ToSchema)]
pub struct WindowDto {
    /// The days on which it opens, `Mon` to `Sun`.
    pub days: Vec<String>,
    /// When it opens, in local time of the zone.
    pub start: String,
    /// When it closes; on the next day where this is not after `start`.
    pub end: String,
    /// Its time zone.
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

/// An automatic scan, also one that the contract has no words for.
#[derive(Debug, Serialize, ToSchema)]
pub struct ScheduleDto {
    /// Whether it runs.
    pub enabled: bool,
    /// `api` or `file`: who set it.
    pub source: &'static str,
    /// The cron expression, where it is by one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cron: Option<String>,
    /// The time zone of that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// The first due time, where it is by an interval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_scan_at: Option<String>,
    /// Seconds from one due time to the next; 0: once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval_s: Option<u32>,
    /// How long a scan may take, in seconds.
    pub timeout_s: u32,
    /// COUNT that a scan begins with.
    pub count: u32,
}

/// Who set something.
pub(super) fn source(by_api: bool) -> &'static str {
    if by_api { "api" } else { "file" }
}

impl ScheduleDto {
    /// As it is in force. `by_api`: it was set by the API, and not by the settings file.
    pub fn new(auto_scan: &AutoScan, by_api: bool) -> Self {
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

/// A sweep with what it brought.
#[derive(Debug, Serialize, ToSchema)]
pub struct HistoryEntry {
    /// The record.
    #[serde(flatten)]
    pub task: TaskDto,
    /// Share that is done, 0 to 1.
    pub progress: f64,
    /// Sums over all shards and DBs.
    pub totals: Totals,
    /// `used_memory` of all masters before the sweep less that after it, in bytes: what it freed less what clients wrote meanwhile. Left
    /// out where one of them was not seen twice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub freed_bytes: Option<i64>,
    /// Expired keys in memory: those that a keep run estimates, at its end or now; those that a complete sweep has found, and freed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backlog: Option<u64>,
    /// Keys that the masters evicted during the sweep, to stay below `maxmemory`. Left out where one of them does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evicted_keys: Option<u64>,
    /// Keys that the masters evicted from the end of the sweep to the beginning of the next one. Left out of the newest sweep, and where
    /// a master was restarted or is not in both.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evicted_keys_after: Option<u64>,
    /// Time held by reason, in seconds.
    #[schema(value_type = BTreeMap<String, f64>)]
    pub held_s: BTreeMap<&'static str, f64>,
    /// How many masters it swept.
    pub masters: usize,
    /// Why it stands still at this moment.
    pub holds: Vec<HoldDto>,
    /// Each shard with its DBs, its warnings and why it ended early; left out where they were not asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shards: Option<Vec<ShardDto>>,
}

impl HistoryEntry {
    /// What is known of a task, with the task of the same instance that came next.
    pub fn new(view: &TaskView, next: Option<&TaskView>, with_shards: bool) -> Self {
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

/// A task as a stream of all of them shows it.
#[derive(Debug, Serialize, ToSchema)]
pub struct TaskProgress {
    /// Its id.
    pub id: String,
    /// The instance that it sweeps.
    pub instance_id: String,
    /// Its state.
    pub state: &'static str,
    /// `cli`, `api`, `schedule` or `keep`.
    pub cause: &'static str,
    /// When it was asked for.
    pub created_at: String,
    /// When it began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<String>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<String>,
    /// Share that is done, 0 to 1.
    pub progress: f64,
    /// Keys that SCAN looked at.
    pub scanned: u64,
    /// Expired keys that it freed.
    pub reclaimed: u64,
    /// Why it stands still at this moment, at most three of its masters.
    pub holds: Vec<HoldDto>,
    /// What is worth knowing of its end and is no failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Why it did not succeed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<FailureDto>,
}

/// Holds of one task in a stream of all: a cluster has hundreds of masters.
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
