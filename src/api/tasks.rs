//! What the contract lacks: options, progress, pause, resume, cancel, other limits while it runs.

#![allow(unused_qualifications, reason = "in the code that utoipa's attributes make")]

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize};
use std::sync::Arc;
use utoipa::{IntoParams, ToSchema};

use crate::api::auth::Caller;
use crate::api::check_dto::Checked;
use crate::api::dto::{FailureDto, HoldDto, ShardDto, time};
use crate::api::error::{ApiError, ErrorBody};
use crate::api::{App, AppState, At, JsonBody, Params};
use crate::check;
use crate::model::failure::Failure;
use crate::model::task::{Cause, SweepTexts, Task, TaskId, TaskState};
use crate::settings::raw::Problem;
use crate::settings::serve::{self, Instance};
use crate::store::TaskFilter;
use crate::tasks::{Order, TaskSpec, TaskView, Tune};

/// Tasks of a list that asks for no number.
const LIMIT: u32 = 50;
/// Most tasks of one list.
const MOST: u32 = 1000;

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
    /// `cli`, `api` or `schedule`.
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
    /// Why it ended as it did, where that is no failure.
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

/// What a sweep is asked for. What is left out is as the instance's settings say.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateTask {
    /// The instance to sweep.
    pub instance_id: String,
    /// Share of the master's time, above 0 and up to 1.
    #[schema(minimum = 0.000_001, maximum = 1)]
    pub intensity: Option<f64>,
    /// Ceiling in keys per second; 0 for none.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 2_147_483_647)]
    pub max_keys_per_sec: Option<u32>,
    /// Above which load to hold.
    #[serde(default, deserialize_with = "object")]
    pub limits: LimitWishes,
    /// COUNT to begin with.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 10, maximum = 1000)]
    pub count: Option<u32>,
    /// DBs to sweep; empty: each that holds keys with a TTL.
    #[schema(value_type = Option<Vec<DbNumber>>)]
    pub db: Option<Vec<DbNumber>>,
    /// `auto`, `none`, `exists` or `ttl`.
    pub touch: Option<TouchWord>,
    /// How long it may take, in seconds.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1, maximum = 31_536_000)]
    pub timeout_s: Option<u32>,
    /// Sweep only while the instance's window is open.
    #[serde(default)]
    pub respect_window: bool,
}

/// Whether each key that SCAN returned is asked for.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the words of the setting")]
pub enum TouchWord {
    Auto,
    None,
    Exists,
    Ttl,
}

impl TouchWord {
    fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::None => "none",
            Self::Exists => "exists",
            Self::Ttl => "ttl",
        }
    }
}

/// Other limits for a task that has not ended.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TuneTask {
    /// Share of the master's time, above 0 and up to 1.
    #[schema(minimum = 0.000_001, maximum = 1)]
    pub intensity: Option<f64>,
    /// Ceiling in keys per second; 0 for none.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 2_147_483_647)]
    pub max_keys_per_sec: Option<u32>,
    /// Above which load to hold.
    #[serde(default, deserialize_with = "object")]
    pub limits: LimitWishes,
}

/// Above which load a sweep holds or gives up, and how far it gives way: `off`, `auto`, or a value, as the settings of the same
/// names (`_` for `-`) take it. What is left out stays.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "the names are those of the settings")]
pub struct LimitWishes {
    #[schema(minimum = 0.000_001, maximum = 1)]
    pub min_intensity: Option<f64>,
    pub throttle: Option<bool>,
    #[schema(pattern = "^(off|auto|[1-9][0-9]{0,5}(us|ms|s|min))$")]
    pub max_latency: Option<String>,
    #[schema(pattern = "^(off|auto|[0-9]{1,9}(B|KiB|MiB|GiB)?)$")]
    pub max_replica_lag: Option<String>,
    #[schema(pattern = "^(off|auto|[1-9][0-9]{0,5}(us|ms|s|min))$")]
    pub max_replica_silence: Option<String>,
    #[schema(pattern = "^(off|auto|[0-9]{1,9}(B|KiB|MiB|GiB)?)$")]
    pub max_replica_buffer: Option<String>,
    #[schema(pattern = "^(off|auto|[0-9]{1,15})$")]
    pub max_lazyfree: Option<String>,
    #[schema(pattern = "^(off|auto|[0-9]{1,15})$")]
    pub max_ops: Option<String>,
    #[schema(pattern = "^(off|auto|1|0[.][0-9]{0,3}[1-9])$")]
    pub max_cpu: Option<String>,
    #[schema(pattern = "^(hold|go)$")]
    pub during_fork: Option<String>,
    #[schema(pattern = "^(off|auto|[1-9][0-9]{0,5}(us|ms|s|min))$")]
    pub abort_latency: Option<String>,
    #[schema(pattern = "^(off|auto|[0-9]{1,9}(B|KiB|MiB|GiB)?)$")]
    pub abort_replica_lag: Option<String>,
}

/// An object, and no list: serde would take one for the fields in their order.
fn object<'de, D: Deserializer<'de>, T: serde::de::DeserializeOwned>(deserializer: D) -> Result<T, D::Error> {
    let fields = serde_json::Map::deserialize(deserializer)?;
    T::deserialize(serde_json::Value::Object(fields)).map_err(serde::de::Error::custom)
}

/// The texts that a wish for other limits makes.
fn tuning_texts(intensity: Option<f64>, max_keys_per_sec: Option<u32>, limits: LimitWishes) -> SweepTexts {
    let wishes = [
        ("intensity", intensity.map(|share| share.to_string())),
        ("max-keys-per-sec", max_keys_per_sec.map(|keys| keys.to_string())),
        ("min-intensity", limits.min_intensity.map(|share| share.to_string())),
        ("throttle", limits.throttle.map(|on| on.to_string())),
        ("max-latency", limits.max_latency),
        ("max-replica-lag", limits.max_replica_lag),
        ("max-replica-silence", limits.max_replica_silence),
        ("max-replica-buffer", limits.max_replica_buffer),
        ("max-lazyfree", limits.max_lazyfree),
        ("max-ops", limits.max_ops),
        ("max-cpu", limits.max_cpu),
        ("during-fork", limits.during_fork),
        ("abort-latency", limits.abort_latency),
        ("abort-replica-lag", limits.abort_replica_lag),
    ];
    wishes.into_iter().filter_map(|(key, text)| Some((key.to_owned(), text?))).collect()
}

/// What is wrong with the settings that a caller wishes.
fn invalid_settings(problems: Vec<Problem>) -> ApiError {
    let problems: Vec<_> = problems.into_iter().map(|problem| problem.message).collect();
    ApiError::invalid(format_args!("settings ({})", problems.join("; ")))
}

/// The number of a logical database.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[schema(value_type = u32, minimum = 0, maximum = 2_147_483_647)]
pub struct DbNumber(#[serde(deserialize_with = "whole_number")] pub u32);

/// A whole number in JSON's sense: 60.0 is one.
fn whole_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let number = f64::deserialize(deserializer)?;
    if number.fract() == 0.0 && (0.0..=f64::from(i32::MAX)).contains(&number) {
        // Exact: a double holds every whole number of 32 bits.
        Ok(number as u32)
    } else {
        Err(serde::de::Error::custom(format_args!("{number} is not a whole number of 31 bits")))
    }
}

fn whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    #[derive(Deserialize)]
    struct Whole(#[serde(deserialize_with = "whole_number")] u32);
    Ok(Option::<Whole>::deserialize(deserializer)?.map(|Whole(number)| number))
}

/// Which tasks to list.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ListTasks {
    /// Of this instance.
    pub instance_id: Option<String>,
    /// In this state.
    pub state: Option<StateWord>,
    /// Asked for by this.
    pub cause: Option<CauseWord>,
    /// Older than this task: the last one of the list before.
    #[param(value_type = Option<uuid::Uuid>)]
    pub before: Option<uuid::Uuid>,
    /// At most so many.
    #[param(minimum = 1, maximum = 1000)]
    pub limit: Option<u32>,
}

/// Our own states.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the words of `TaskState`")]
pub enum StateWord {
    Waiting,
    Running,
    Paused,
    Interrupted,
    Succeeded,
    Failed,
    Cancelled,
}

impl From<StateWord> for TaskState {
    fn from(word: StateWord) -> Self {
        match word {
            StateWord::Waiting => Self::Waiting,
            StateWord::Running => Self::Running,
            StateWord::Paused => Self::Paused,
            StateWord::Interrupted => Self::Interrupted,
            StateWord::Succeeded => Self::Succeeded,
            StateWord::Failed => Self::Failed,
            StateWord::Cancelled => Self::Cancelled,
        }
    }
}

/// Who asked.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the words of `Cause`")]
pub enum CauseWord {
    Cli,
    Api,
    Schedule,
}

impl From<CauseWord> for Cause {
    fn from(word: CauseWord) -> Self {
        match word {
            CauseWord::Cli => Self::Cli,
            CauseWord::Api => Self::Api,
            CauseWord::Schedule => Self::Schedule,
        }
    }
}

/// Lists the instances that the caller may see.
#[utoipa::path(
    get, path = "/api/v1/instances", tag = "instances", operation_id = "list_instances",
    responses(
        (status = 200, body = InstanceList), (status = 401, body = ErrorBody), (status = 413, body = ErrorBody),
        (status = 500, body = ErrorBody), (status = 503, body = ErrorBody),
    )
)]
pub async fn list_instances(State(app): State<App>, caller: Caller) -> Result<Json<InstanceList>, ApiError> {
    let settings = app.settings.borrow().clone();
    let mut instances = Vec::new();
    for instance in settings.instances.iter().filter(|instance| caller.0.allows(&instance.project_id)) {
        instances.push(app.describe(instance).await?);
    }
    Ok(Json(InstanceList { instances }))
}

/// Shows one instance.
#[utoipa::path(
    get, path = "/api/v1/instances/{instance_id}", tag = "instances", operation_id = "get_instance",
    params(("instance_id" = String, Path)),
    responses(
        (status = 200, body = InstanceDto), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 413, body = ErrorBody), (status = 500, body = ErrorBody), (status = 503, body = ErrorBody),
    )
)]
pub async fn get_instance(
    State(app): State<App>,
    caller: Caller,
    At(id): At<String>,
) -> Result<Json<InstanceDto>, ApiError> {
    let instance = app.instance_of(&caller, &id)?;
    Ok(Json(app.describe(&instance).await?))
}

/// Forgets the automatic scan that the API set: from now on the settings file's is in force again.
#[utoipa::path(
    delete, path = "/api/v1/instances/{instance_id}/auto-scan", tag = "instances", operation_id = "reset_auto_scan",
    params(("instance_id" = String, Path)),
    responses(
        (status = 200, body = InstanceDto), (status = 401, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 413, body = ErrorBody), (status = 500, body = ErrorBody),
        (status = 503, body = ErrorBody),
    )
)]
pub async fn reset_auto_scan(
    State(app): State<App>,
    caller: Caller,
    At(id): At<String>,
) -> Result<Json<InstanceDto>, ApiError> {
    let instance = app.instance_of(&caller, &id)?;
    app.service.store().set_auto_scan(&instance.id, None, Timestamp::now()).await?;
    app.schedule_changed.notify_one();
    tracing::info!(instance = instance.id, caller = caller.0.name, "automatic scan as the settings file has it");
    Ok(Json(app.describe(&instance).await?))
}

/// Looks at an instance and touches nothing: backlog, rights, what a sweep would meet.
#[utoipa::path(
    post, path = "/api/v1/instances/{instance_id}/check", tag = "instances", operation_id = "check_instance",
    params(("instance_id" = String, Path)),
    responses(
        (status = 200, body = Checked), (status = 401, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 413, body = ErrorBody),
        (status = 500, body = ErrorBody), (status = 503, body = ErrorBody),
    )
)]
pub async fn check_instance(
    State(app): State<App>,
    caller: Caller,
    At(id): At<String>,
) -> Result<Json<Checked>, ApiError> {
    let instance = app.instance_of(&caller, &id)?;
    let settings = &instance.settings;
    // An operator may know why the instance does not answer; no secret is in it.
    let unreachable = |failure: Failure| ApiError::conflict(failure.to_string());
    let (view, options) = crate::tasks::masters(settings).await.map_err(unreachable)?;
    let look = check::instance::look(&view, &options, settings).await.map_err(unreachable)?;
    Ok(Json(Checked::new(&look, settings).with_report(look.text(settings))))
}

/// Lists tasks, newest first.
#[utoipa::path(
    get, path = "/api/v1/tasks", tag = "tasks", operation_id = "list_tasks", params(ListTasks),
    responses(
        (status = 200, body = TaskList), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 413, body = ErrorBody), (status = 500, body = ErrorBody), (status = 503, body = ErrorBody),
    )
)]
pub async fn list_tasks(
    State(app): State<App>,
    caller: Caller,
    Params(list): Params<ListTasks>,
) -> Result<Json<TaskList>, ApiError> {
    let limit = list.limit.unwrap_or(LIMIT);
    if !(1..=MOST).contains(&limit) {
        return Err(ApiError::invalid("limit"));
    }
    let filter = TaskFilter {
        projects: caller.0.projects.as_ref().map(|projects| projects.iter().cloned().collect()),
        instance_id: list.instance_id,
        states: list.state.map(TaskState::from).into_iter().collect(),
        cause: list.cause.map(Cause::from),
        before: list.before.map(TaskId),
    };
    let page = app.service.store().page(&filter, 0, limit).await?;
    let tasks = page.tasks.iter().map(TaskDto::from).collect();
    Ok(Json(TaskList { tasks, count: page.count, reclaimed: page.total }))
}

/// Creates a task.
#[utoipa::path(
    post, path = "/api/v1/tasks", tag = "tasks", operation_id = "create_task", request_body = CreateTask,
    responses(
        (status = 200, body = TaskDto), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 403, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 413, body = ErrorBody), (status = 500, body = ErrorBody), (status = 503, body = ErrorBody),
    )
)]
pub async fn create_task(
    State(app): State<App>,
    caller: Caller,
    JsonBody(wish): JsonBody<CreateTask>,
) -> Result<Json<TaskDto>, ApiError> {
    let instance = app.instance_of(&caller, &wish.instance_id)?;
    let mut texts = instance.settings.sweep_texts.clone();
    texts.extend(tuning_texts(wish.intensity, wish.max_keys_per_sec, wish.limits));
    let mut set = |key: &str, text: Option<String>| texts.extend(text.map(|text| (key.to_owned(), text)));
    set("count", wish.count.map(|count| count.to_string()));
    set("db", wish.db.map(|dbs| dbs.iter().map(|db| db.0.to_string()).collect::<Vec<_>>().join(",")));
    set("touch", wish.touch.map(|touch| touch.as_str().to_owned()));
    set("timeout", wish.timeout_s.map(|seconds| format!("{seconds}s")));
    let settings = serve::with_texts(&instance.settings, &texts).map_err(invalid_settings)?;
    app.must_be_scannable(&instance).await?;
    let window = instance.window.clone().filter(|_| wish.respect_window);
    let spec = TaskSpec { window, ..TaskSpec::of(&instance, &settings, Cause::Api)? };
    let task = app.service.submit(spec, None).await?;
    tracing::info!(task = %task.id, instance = instance.id, caller = caller.0.name, "task created");
    Ok(Json((&task).into()))
}

/// Shows one task with its progress.
#[utoipa::path(
    get, path = "/api/v1/tasks/{task_id}", tag = "tasks", operation_id = "get_task",
    params(("task_id" = uuid::Uuid, Path)),
    responses(
        (status = 200, body = TaskDetails), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 413, body = ErrorBody), (status = 500, body = ErrorBody), (status = 503, body = ErrorBody),
    )
)]
pub async fn get_task(
    State(app): State<App>,
    caller: Caller,
    At(id): At<String>,
) -> Result<Json<TaskDetails>, ApiError> {
    let view = app.view(&caller, &id).await?;
    Ok(Json(view.as_ref().into()))
}

macro_rules! orders {
    ($($(#[$doc:meta])* $name:ident = $path:literal, $order:expr;)+) => {$(
        $(#[$doc])*
        #[utoipa::path(
            post, path = $path, tag = "tasks", operation_id = stringify!($name),
            params(("task_id" = uuid::Uuid, Path)),
            responses(
                (status = 200, body = TaskDetails), (status = 401, body = ErrorBody), (status = 403, body = ErrorBody),
                (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 413, body = ErrorBody),
                (status = 500, body = ErrorBody), (status = 503, body = ErrorBody),
            )
        )]
        pub async fn $name(
            State(app): State<App>,
            caller: Caller,
            At(id): At<String>,
        ) -> Result<Json<TaskDetails>, ApiError> {
            app.give(&caller, &id, $order).await
        }
    )+};
}

orders! {
    /// Holds a task. The time until it is resumed does not count.
    pause_task = "/api/v1/tasks/{task_id}/pause", Order::Pause;
    /// Lets a paused task go on.
    resume_task = "/api/v1/tasks/{task_id}/resume", Order::Resume;
    /// Ends a task. What it freed stays freed and counted.
    cancel_task = "/api/v1/tasks/{task_id}/cancel", Order::Cancel;
}

/// Changes the limits of a task that has not ended.
#[utoipa::path(
    patch, path = "/api/v1/tasks/{task_id}", tag = "tasks", operation_id = "tune_task",
    params(("task_id" = uuid::Uuid, Path)), request_body = TuneTask,
    responses(
        (status = 200, body = TaskDetails), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 403, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 413, body = ErrorBody), (status = 500, body = ErrorBody), (status = 503, body = ErrorBody),
    )
)]
pub async fn tune_task(
    State(app): State<App>,
    caller: Caller,
    At(id): At<String>,
    JsonBody(wish): JsonBody<TuneTask>,
) -> Result<Json<TaskDetails>, ApiError> {
    let texts = tuning_texts(wish.intensity, wish.max_keys_per_sec, wish.limits);
    let tune = Tune::new(texts).map_err(invalid_settings)?;
    app.give(&caller, &id, Order::Tune(tune)).await
}

impl AppState {
    /// An instance that the caller may see.
    pub(super) fn instance_of(&self, caller: &Caller, id: &str) -> Result<Arc<Instance>, ApiError> {
        let settings = self.settings.borrow();
        let instance = settings.instance(id).filter(|instance| caller.0.allows(&instance.project_id));
        instance.cloned().ok_or_else(ApiError::no_instance)
    }

    /// A task that the caller may see.
    pub(super) async fn view(&self, caller: &Caller, id: &str) -> Result<Arc<TaskView>, ApiError> {
        let id = id.parse().map(TaskId).map_err(|_| ApiError::no_task())?;
        let view = self.service.find(id).await?.ok_or_else(ApiError::no_task)?;
        if caller.0.allows(&view.task.project_id) { Ok(view) } else { Err(ApiError::no_task()) }
    }

    async fn give(&self, caller: &Caller, id: &str, order: Order) -> Result<Json<TaskDetails>, ApiError> {
        let view = self.view(caller, id).await?;
        let what = format!("{order:?}");
        let view = self.service.order(view.task.id, order).await?;
        tracing::info!(task = id, caller = caller.0.name, what, "order carried out");
        Ok(Json(view.as_ref().into()))
    }

    async fn describe(&self, instance: &Instance) -> Result<InstanceDto, ApiError> {
        let now = jiff::Timestamp::now();
        let latest = match self.service.on_hand(&instance.id) {
            Some(id) => self.service.find(id).await?.map(|view| TaskDto::from(&view.task)),
            None => self.service.store().latest(&instance.id).await?.as_ref().map(TaskDto::from),
        };
        let auto_scan = self.service.auto_scan(instance).await?;
        let next = auto_scan.enabled.then(|| auto_scan.rhythm.next_due(now)).flatten();
        Ok(InstanceDto {
            id: instance.id.clone(),
            project_id: instance.project_id.clone(),
            name: instance.name.clone(),
            target: instance.settings.target.to_string(),
            window_open: instance.window.as_ref().map(|window| window.is_open(now)),
            window_changes_at: instance.window.as_ref().and_then(|window| window.next_change(now)).map(time),
            next_scan_at: next.map(time),
            latest,
        })
    }
}
