//! Tasks beyond the contract: options, progress, pause, resume, cancel, other limits while a task runs.

#![allow(unused_qualifications, reason = "in the code that utoipa's attributes make")]

use axum::Json;
use axum::extract::State;
use std::collections::BTreeSet;
use std::sync::Arc;

use crate::api::auth::Caller;
use crate::api::error::ApiError;
use crate::api::requests::{CreateTask, LONGEST_S, ListTasks, TuneTask, invalid_settings, tuning_texts};
use crate::api::responses::{Conflict, Forbidden, Guarded, Invalid, Missing};
use crate::api::task_dto::{TaskDetails, TaskDto, TaskList};
use crate::api::{App, AppState, JsonBody, PathParams, QueryParams};
use crate::model::task::{Cause, SweepTexts, TaskId, TaskState};
use crate::settings::serve::{self, Instance};
use crate::store::TaskFilter;
use crate::tasks::{Order, TaskSpec, TaskView, Tune};

/// Tasks of a list without `limit`.
const LIMIT: u32 = 50;
/// Largest `limit` of a list.
const MOST: u32 = 1000;

/// Lists the tasks that the caller may see, newest first.
#[utoipa::path(
    get, path = "/api/v1/tasks", tag = "tasks", operation_id = "list_tasks", params(ListTasks),
    responses((status = 200, body = TaskList), Invalid, Guarded)
)]
pub(crate) async fn list_tasks(
    State(app): State<App>,
    caller: Caller,
    QueryParams(list): QueryParams<ListTasks>,
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
    let tasks: Vec<_> = page.tasks.iter().map(TaskDto::from).collect();
    let ids: BTreeSet<_> = tasks.iter().map(|task| task.instance_id.as_str()).collect();
    let settings = app.settings.borrow().clone();
    let is_named =
        |instance: &&Arc<Instance>| ids.contains(instance.id.as_str()) && caller.0.allows(&instance.project_id);
    let named = settings.instances.iter().filter(is_named);
    let instance_names = named.map(|instance| (instance.id.clone(), instance.name.clone())).collect();
    Ok(Json(TaskList { tasks, count: page.count, reclaimed: page.total, instance_names }))
}

/// Creates a task that sweeps an instance now.
#[utoipa::path(
    post, path = "/api/v1/tasks", tag = "tasks", operation_id = "create_task", request_body = CreateTask,
    responses((status = 200, body = TaskDto), Invalid, Forbidden, Missing, Conflict, Guarded)
)]
pub(crate) async fn create_task(
    State(app): State<App>,
    caller: Caller,
    JsonBody(request): JsonBody<CreateTask>,
) -> Result<Json<TaskDto>, ApiError> {
    let instance = app.instance_of(&caller, &request.instance_id)?;
    if request.timeout_s.is_some_and(|seconds| seconds > LONGEST_S) {
        return Err(ApiError::invalid("timeout_s"));
    }
    let mut texts = SweepTexts::clone(&instance.settings.sweep_texts);
    texts.extend(tuning_texts(request.intensity, request.max_keys_per_sec, &request.limits));
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
    responses((status = 200, body = TaskDetails), Missing, Guarded)
)]
pub(crate) async fn get_task(
    State(app): State<App>,
    caller: Caller,
    PathParams(id): PathParams<String>,
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
            responses((status = 200, body = TaskDetails), Forbidden, Missing, Conflict, Guarded)
        )]
        pub(crate) async fn $name(
            State(app): State<App>,
            caller: Caller,
            PathParams(id): PathParams<String>,
        ) -> Result<Json<TaskDetails>, ApiError> {
            app.give(&caller, &id, $order).await
        }
    )+};
}

orders! {
    /// Pauses a task. Its timeout stops until it is resumed.
    pause_task = "/api/v1/tasks/{task_id}/pause", Order::Pause;
    /// Resumes a paused task.
    resume_task = "/api/v1/tasks/{task_id}/resume", Order::Resume;
    /// Cancels a task. The keys that it reclaimed stay counted.
    cancel_task = "/api/v1/tasks/{task_id}/cancel", Order::Cancel;
}

/// Changes the limits of an unfinished task.
#[utoipa::path(
    patch, path = "/api/v1/tasks/{task_id}", tag = "tasks", operation_id = "tune_task",
    params(("task_id" = uuid::Uuid, Path)), request_body = TuneTask,
    responses((status = 200, body = TaskDetails), Invalid, Forbidden, Missing, Conflict, Guarded)
)]
pub(crate) async fn tune_task(
    State(app): State<App>,
    caller: Caller,
    PathParams(id): PathParams<String>,
    JsonBody(request): JsonBody<TuneTask>,
) -> Result<Json<TaskDetails>, ApiError> {
    let texts = tuning_texts(request.intensity, request.max_keys_per_sec, &request.limits);
    let tune = Tune::new(texts).map_err(invalid_settings)?;
    app.give(&caller, &id, Order::Tune(tune)).await
}

impl AppState {
    /// The task with this id, if the caller may see it.
    pub(super) async fn view(&self, caller: &Caller, id: &str) -> Result<Arc<TaskView>, ApiError> {
        let id = id.parse().map(TaskId).map_err(|_| ApiError::no_task())?;
        let view = self.service.find(id).await?.ok_or_else(ApiError::no_task)?;
        if caller.0.allows(&view.task.project_id) { Ok(view) } else { Err(ApiError::no_task()) }
    }

    /// Gives an order to a task that the caller may see.
    async fn give(&self, caller: &Caller, id: &str, order: Order) -> Result<Json<TaskDetails>, ApiError> {
        let view = self.view(caller, id).await?;
        let what = order.to_string();
        let view = self.service.order(view.task.id, order).await?;
        tracing::info!(task = id, caller = caller.0.name, what, "order carried out");
        Ok(Json(view.as_ref().into()))
    }
}
