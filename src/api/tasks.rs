//! What the contract lacks: options, progress, pause, resume, cancel, other limits while it runs.

#![allow(unused_qualifications, reason = "in the code that utoipa's attributes make")]

use axum::Json;
use axum::extract::State;
use std::sync::Arc;

use crate::api::auth::Caller;
use crate::api::check_dto::Checked;
use crate::api::dto::time;
use crate::api::error::{ApiError, ErrorBody};
use crate::api::keep::KeepBounds;
use crate::api::requests::{CreateTask, LONGEST_S, ListTasks, TuneTask, invalid_settings, tuning_texts};
use crate::api::task_dto::{InstanceDto, InstanceList, TaskDetails, TaskDto, TaskList};
use crate::api::{App, AppState, At, JsonBody, Params};
use crate::check;
use crate::model::keep::Bounds;
use crate::model::task::{Cause, SweepTexts, TaskId, TaskState};
use crate::settings::serve::{self, Instance};
use crate::store::TaskFilter;
use crate::tasks::{Order, TaskSpec, TaskView, Tune};

/// Tasks of a list that asks for no number.
const LIMIT: u32 = 50;
/// Most tasks of one list.
const MOST: u32 = 1000;

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
    app.set_auto_scan(&instance, None, app.service.store().now()).await?;
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
        (status = 500, body = ErrorBody), (status = 502, body = ErrorBody), (status = 503, body = ErrorBody),
    )
)]
pub async fn check_instance(
    State(app): State<App>,
    caller: Caller,
    At(id): At<String>,
) -> Result<Json<Checked>, ApiError> {
    let instance = app.instance_of(&caller, &id)?;
    let settings = &instance.settings;
    let (view, options) = crate::tasks::masters(settings).await.map_err(ApiError::of_instance)?;
    let order = format!("ttlsweep task create {id}");
    let look = check::instance::look(&view, &options, &settings.scan, &order).await.map_err(ApiError::of_instance)?;
    Ok(Json(Checked::new(&look, settings, &order).with_report(look.text(&settings.scan, &order))))
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
    JsonBody(request): JsonBody<CreateTask>,
) -> Result<Json<TaskDto>, ApiError> {
    let instance = app.instance_of(&caller, &request.instance_id)?;
    if request.timeout_s.is_some_and(|seconds| seconds > LONGEST_S) {
        return Err(ApiError::invalid("timeout_s"));
    }
    let mut texts = SweepTexts::clone(&instance.settings.sweep_texts);
    texts.extend(tuning_texts(request.intensity, request.max_keys_per_sec, request.limits));
    let mut set = |key: &str, text: Option<String>| texts.extend(text.map(|text| (key.to_owned(), text)));
    set("count", request.count.map(|count| count.to_string()));
    set("db", request.db.map(|dbs| dbs.iter().map(|db| db.0.to_string()).collect::<Vec<_>>().join(",")));
    set("touch", request.touch.map(|touch| touch.as_str().to_owned()));
    set("timeout", request.timeout_s.map(|seconds| format!("{seconds}s")));
    let settings = serve::with_texts(&instance.settings, &texts).map_err(invalid_settings)?;
    app.must_be_scannable(&instance).await?;
    let window = instance.window.clone().filter(|_| request.respect_window);
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
    JsonBody(request): JsonBody<TuneTask>,
) -> Result<Json<TaskDetails>, ApiError> {
    let texts = tuning_texts(request.intensity, request.max_keys_per_sec, request.limits);
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
        let what = order.to_string();
        let view = self.service.order(view.task.id, order).await?;
        tracing::info!(task = id, caller = caller.0.name, what, "order carried out");
        Ok(Json(view.as_ref().into()))
    }

    pub(super) async fn describe(&self, instance: &Instance) -> Result<InstanceDto, ApiError> {
        let now = self.service.store().now();
        let latest = match self.service.active_task_of(&instance.id) {
            Some(id) => self.service.find(id).await?.map(|view| view.task.clone()),
            None => self.service.store().latest(&instance.id).await?,
        };
        // The id may have been another project's.
        let latest = latest.filter(|task| task.project_id == instance.project_id);
        let auto_scan = self.service.auto_scan(instance).await?;
        let next = auto_scan.enabled.then(|| auto_scan.recurrence.next_due(now)).flatten();
        Ok(InstanceDto {
            id: instance.id.clone(),
            project_id: instance.project_id.clone(),
            name: instance.name.clone(),
            target: instance.settings.target.to_string(),
            window_open: instance.window.as_ref().map(|window| window.is_open(now)),
            window_changes_at: instance.window.as_ref().and_then(|window| window.next_change(now)).map(time),
            next_scan_at: next.map(time),
            keep: Some(self.service.keep(instance).await?).filter(Bounds::any).map(KeepBounds::from),
            latest: latest.as_ref().map(TaskDto::from),
        })
    }
}
