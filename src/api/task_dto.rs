//! Tasks and instances as the own API answers with them.

#![allow(unused_qualifications, reason = "in the code that utoipa's attributes make")]

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use crate::api::dto::{FailureDto, HoldDto, ShardDto, time};
use crate::api::keep::KeepBounds;
use crate::model::task::Task;
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
        let shards = &view.snapshot.shards;
        Self {
            task: (&view.task).into(),
            progress: (view.snapshot.fraction() * 10_000.0).round() / 10_000.0,
            scanned: view.snapshot.scanned(),
            holds: view.holds(),
            shards: shards.iter().map(|(shard, view)| ShardDto::new(shard.0.clone(), view)).collect(),
        }
    }
}

impl TaskView {
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
}

/// All instances that the caller may see.
#[derive(Debug, Serialize, ToSchema)]
pub struct InstanceList {
    /// The instances, in the order of the settings.
    pub instances: Vec<InstanceDto>,
}
