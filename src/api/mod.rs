//! The HTTP API of the daemon: the DCS contract, our own calls beside it, health, metrics, and the web page.
//!
//! [`router`] has all routes; [`listen`] accepts the connections. Handlers decide nothing about tasks: they call `tasks`.
//! They connect to an instance only to inspect it: for a check, for a forecast, and before a task is accepted, as the
//! contract requires.

pub(crate) mod auth;
pub(crate) mod check_dto;
pub(crate) mod daemons;
pub(crate) mod dcs;
pub(crate) mod dto;
pub(crate) mod error;
pub(crate) mod events;
pub(crate) mod forecast;
pub(crate) mod forecast_dto;
pub(crate) mod health;
pub(crate) mod instances;
pub(crate) mod keep;
pub(crate) mod listen;
pub(crate) mod page;
pub(crate) mod requests;
mod responses;
pub(crate) mod signature;
pub(crate) mod task_dto;
pub(crate) mod tasks;

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, MatchedPath, Path, Query, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::{Router, body::Bytes};
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;

use crate::api::auth::Caller;
use crate::api::error::ApiError;
use crate::api::responses::{Forbidden, GuardedWithoutRecords, Invalid};
use crate::metrics::Metrics;
use crate::model::bounds::Bounds;
use crate::model::failure::FailureKind;
use crate::model::schedule::AutoScan;
use crate::settings::raw::Problem;
use crate::settings::serve::{Instance, Role, ServeSettings};
use crate::tasks::TaskService;

/// Longest inspection of an instance before a task is accepted; after that it is accepted without one.
const INSPECT_WITHIN: Duration = Duration::from_secs(2);
/// Header of every response: an id that the log has too.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Reads the settings file again and puts it in force, or returns its problems.
pub(crate) type Reload = Box<dyn Fn() -> Result<(), Vec<Problem>> + Send + Sync>;

/// The state that all handlers share.
pub(crate) struct AppState {
    /// Creates and commands tasks, and gives access to the records.
    pub service: TaskService,
    /// The settings in force; a reload replaces them.
    pub settings: watch::Receiver<Arc<ServeSettings>>,
    /// Metrics to count requests in, and to show.
    pub metrics: Metrics,
    /// Wakes the scheduler after a schedule was changed.
    pub schedule_changed: Arc<Notify>,
    /// Wakes the keeper after bounds were changed.
    pub keep_changed: watch::Sender<()>,
    /// Reads the settings file again, for the call `reload`.
    pub reload: Reload,
    /// Cancelled when the daemon begins to stop: streams end then.
    pub stopping: CancellationToken,
}

/// The state as an argument of handlers.
pub(crate) type App = Arc<AppState>;

/// All routes. Those of the tasks and instances need credentials; the page, health and the description do not.
pub(crate) fn router(app: App) -> Router {
    let guarded = Router::new()
        .route("/v2/{project_id}/instances/{instance_id}/scan-expire-keys-task", post(dcs::create))
        .route("/v2/{project_id}/instances/{instance_id}/auto-expire/scan", post(dcs::scan))
        .route("/v2/{project_id}/instances/{instance_id}/auto-expire/histories", get(dcs::history))
        .route(
            "/v2/{project_id}/instances/{instance_id}/scan-expire-keys/autoscan-config",
            get(dcs::show_config).put(dcs::update_config),
        )
        .route("/api/v1/instances", get(instances::list_instances))
        .route("/api/v1/instances/{instance_id}", get(instances::get_instance))
        .route("/api/v1/instances/{instance_id}/auto-scan", delete(instances::reset_auto_scan))
        .route("/api/v1/instances/{instance_id}/check", post(instances::check_instance))
        .route("/api/v1/instances/{instance_id}/history", get(instances::list_history))
        .route("/api/v1/instances/{instance_id}/keep", put(keep::set_keep).delete(keep::reset_keep))
        .route("/api/v1/instances/{instance_id}/forecast", get(forecast::get_forecast).post(forecast::make_forecast))
        .route("/api/v1/tasks", get(tasks::list_tasks).post(tasks::create_task))
        .route("/api/v1/tasks/{task_id}", get(tasks::get_task).patch(tasks::tune_task))
        .route("/api/v1/tasks/{task_id}/events", get(events::follow_task))
        .route("/api/v1/tasks/{task_id}/pause", post(tasks::pause_task))
        .route("/api/v1/tasks/{task_id}/resume", post(tasks::resume_task))
        .route("/api/v1/tasks/{task_id}/cancel", post(tasks::cancel_task))
        .route("/api/v1/events", get(events::follow_all))
        .route("/api/v1/caller", get(auth::show_caller))
        .route("/api/v1/daemons", get(daemons::list_daemons))
        .route("/api/v1/reload", post(reload))
        .route("/metrics", get(health::metrics))
        .route_layer(middleware::from_fn_with_state(app.clone(), auth::require));
    Router::new()
        .route("/", get(page::page))
        .route("/assets/{name}", get(page::asset))
        .route("/openapi.json", get(health::openapi))
        .route("/healthz", get(health::healthz))
        .route("/readyz", get(health::readyz))
        .merge(guarded)
        .fallback(async || ApiError::no_url())
        .method_not_allowed_fallback(async || ApiError::no_method())
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(app.clone(), observe))
        .with_state(app)
}

/// Limits the time of a request, gives its response an id, logs and counts it.
async fn observe(State(app): State<App>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let within = app.settings.borrow().api.request_timeout;
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let id = uuid::Uuid::now_v7().simple().to_string();
    let answered = tokio::time::timeout(within, next.run(request)).await;
    let mut response = answered.unwrap_or_else(|_| ApiError::unavailable().into_response());
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    let (route, status, took) = (route.as_deref().unwrap_or("none"), response.status().as_u16(), begun.elapsed());
    // A client may invent methods; as labels only those of a matched route are bounded.
    let method = if status == 405 || route == "none" { "other" } else { method.as_str() };
    tracing::debug!(id, method, route, status, ?took, "answered");
    app.metrics.answered(route, method, status, took);
    response
}

fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    tracing::error!(text, "a handler panicked");
    ApiError::internal().into_response()
}

/// Reads the settings file again. An invalid file changes nothing.
#[utoipa::path(
    post, path = "/api/v1/reload", tag = "settings", operation_id = "reload",
    responses((status = 200, body = Reloaded), Invalid, Forbidden, GuardedWithoutRecords)
)]
pub(crate) async fn reload(State(app): State<App>, caller: Caller) -> Result<Json<Reloaded>, ApiError> {
    // The settings concern all projects.
    if caller.0.projects.is_some() || caller.0.role < Role::Operator {
        return Err(ApiError::forbidden());
    }
    let reload = tokio::task::spawn_blocking({
        let app = app.clone();
        move || (app.reload)()
    });
    match reload.await.map_err(|_| ApiError::internal())? {
        Ok(()) => Ok(Json(Reloaded { instances: app.settings.borrow().instances.len() })),
        Err(problems) => {
            let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
            Err(ApiError { message: problems.join("\n"), ..ApiError::invalid("settings file") })
        }
    }
}

/// The result of a reload.
#[derive(Debug, serde::Serialize, utoipa::ToSchema)]
pub(crate) struct Reloaded {
    /// Number of instances in the settings now.
    pub instances: usize,
}

impl AppState {
    /// Refuses an instance whose server can never be swept, as the contract requires before a task is accepted. A server
    /// that cannot be reached now is accepted: its task will fail with the reason.
    async fn must_be_scannable(&self, instance: &Instance) -> Result<(), ApiError> {
        let inspection = crate::tasks::may_be_swept(&instance.settings);
        match tokio::time::timeout(INSPECT_WITHIN, inspection).await {
            Ok(Err(failure)) if matches!(failure.kind, FailureKind::Unsupported | FailureKind::NotAMaster) => {
                tracing::info!(instance = instance.id, %failure, "the instance cannot be swept: request refused");
                Err(ApiError::cannot_scan())
            }
            _ => Ok(()),
        }
    }

    /// Sets the bounds of an instance, or removes what the API set (`None`), and wakes the keeper.
    async fn set_keep(&self, instance: &Instance, bounds: Option<Bounds>) -> Result<(), ApiError> {
        let store = self.service.store();
        let set = store.set_keep(&instance.id, &instance.project_id, bounds, store.now()).await;
        set.inspect_err(|_| self.metrics.store_failed())?;
        self.keep_changed.send_replace(());
        Ok(())
    }

    /// Sets the automatic scan of an instance, or removes what the API set (`None`), and wakes the scheduler.
    async fn set_auto_scan(
        &self,
        instance: &Instance,
        config: Option<&AutoScan>,
        now: Timestamp,
    ) -> Result<(), ApiError> {
        let set = self.service.store().set_auto_scan(&instance.id, &instance.project_id, config, now).await;
        set.inspect_err(|_| self.metrics.store_failed())?;
        self.schedule_changed.notify_one();
        Ok(())
    }
}

/// Path parameters. If they cannot be decoded the response is 404.
pub(crate) struct PathParams<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for PathParams<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        Path::from_request_parts(parts, state).await.map(|Path(params)| Self(params)).map_err(|_| ApiError::no_url())
    }
}

/// Query parameters. If they are invalid the response is `DCS.4800`.
pub(crate) struct QueryParams<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for QueryParams<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let query = Query::from_request_parts(parts, state).await;
        query.map(|Query(params)| Self(params)).map_err(|_| ApiError::invalid("query"))
    }
}

/// The body as received; longer ones than `auth::MAX_BODY` are refused.
pub(crate) struct RawBody(pub Bytes);

impl<S: Send + Sync> FromRequest<S> for RawBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        Bytes::from_request(request, state).await.map(Self).map_err(|_| ApiError::too_large())
    }
}

/// The body as JSON of a known form. The Content-Type is ignored.
pub(crate) struct JsonBody<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let RawBody(body) = RawBody::from_request(request, state).await?;
        if body.is_empty() {
            return Err(ApiError::empty_body());
        }
        let value: serde_json::Value = serde_json::from_slice(&body).map_err(|_| ApiError::not_json())?;
        if !value.is_object() {
            // serde would accept an array of the fields in their order.
            return Err(ApiError::invalid("body (it is not a JSON object)"));
        }
        // serde's message names the field and its type; of the request it contains at most one value.
        T::deserialize(value).map(Self).map_err(|e| ApiError::invalid(format_args!("body ({e})")))
    }
}
