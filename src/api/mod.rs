//! What leaves the process for other programs, and what they may ask: the DCS contract, our own calls beside it,
//! health, figures, and a page.
//!
//! [`router`] is everything that is answered; [`listen`] brings the requests. The API decides nothing about tasks: it
//! asks `tasks`, and never touches an instance but for the first look that the contract wants.

pub mod auth;
pub mod check_dto;
pub mod daemons;
pub mod dcs;
pub mod dto;
pub mod error;
pub mod events;
pub mod forecast;
pub mod forecast_dto;
pub mod health;
pub mod instances;
pub mod keep;
pub mod listen;
pub mod page;
pub mod requests;
pub mod signature;
pub mod task_dto;
pub mod tasks;

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
use crate::api::error::{ApiError, ErrorBody};
use crate::metrics::Metrics;
use crate::model::failure::FailureKind;
use crate::model::keep::Bounds;
use crate::model::schedule::AutoScan;
use crate::settings::raw::Problem;
use crate::settings::serve::{Instance, Role, ServeSettings};
use crate::tasks::TaskService;

/// How long the look at an instance may take before its task is accepted without one.
const LOOK_WITHIN: Duration = Duration::from_secs(2);
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Reads the settings again and puts them in force, or says what is wrong with them.
pub type Reload = Box<dyn Fn() -> Result<(), Vec<Problem>> + Send + Sync>;

/// What the handlers share.
pub struct AppState {
    /// The tasks.
    pub service: TaskService,
    /// The settings in force.
    pub settings: watch::Receiver<Arc<ServeSettings>>,
    /// The figures.
    pub metrics: Metrics,
    /// Wakes the scheduler.
    pub schedule_changed: Arc<Notify>,
    /// Wakes the keeper.
    pub keep_changed: watch::Sender<()>,
    /// Takes changed settings in.
    pub reload: Reload,
    /// Cancelled when the daemon begins to stop: streams end.
    pub stopping: CancellationToken,
}

/// The state as handlers take it.
pub type App = Arc<AppState>;

/// Everything that is answered.
pub fn router(app: App) -> Router {
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
        .layer(middleware::from_fn_with_state(app.clone(), watch_over))
        .with_state(app)
}

/// Bounds the time of an answer, gives it an id, and counts it.
async fn watch_over(State(app): State<App>, request: Request, next: Next) -> Response {
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
    // Methods are of the client's making; the ones that have a route are not.
    let method = if status == 405 || route == "none" { "other" } else { method.as_str() };
    tracing::debug!(id, method, route, status, ?took, "answered");
    app.metrics.answered(route, method, status, took);
    response
}

fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    tracing::error!(text, "a handler broke");
    ApiError::internal().into_response()
}

/// Reads the settings file again. An invalid file changes nothing.
#[utoipa::path(
    post, path = "/api/v1/reload", tag = "settings", operation_id = "reload",
    responses(
        (status = 200, body = Reloaded), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 403, body = ErrorBody), (status = 413, body = ErrorBody), (status = 503, body = ErrorBody),
    )
)]
pub async fn reload(State(app): State<App>, caller: Caller) -> Result<Json<Reloaded>, ApiError> {
    // The settings are of all projects.
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

/// What a reload put in force.
#[derive(Debug, serde::Serialize, utoipa::ToSchema)]
pub struct Reloaded {
    /// How many instances there are now.
    pub instances: usize,
}

impl AppState {
    /// The contract's look before a task is accepted: a server that can never be scanned is refused at once. One that
    /// cannot be reached just now is not: its task will say so.
    async fn must_be_scannable(&self, instance: &Instance) -> Result<(), ApiError> {
        let look = crate::tasks::look(&instance.settings);
        match tokio::time::timeout(LOOK_WITHIN, look).await {
            Ok(Err(failure)) if matches!(failure.kind, FailureKind::Unsupported | FailureKind::NotAMaster) => {
                tracing::info!(instance = instance.id, %failure, "refused");
                Err(ApiError::cannot_scan())
            }
            _ => Ok(()),
        }
    }

    /// Sets the bounds of an instance, or forgets what was set.
    async fn set_keep(&self, instance: &Instance, bounds: Option<Bounds>) -> Result<(), ApiError> {
        let store = self.service.store();
        let set = store.set_keep(&instance.id, &instance.project_id, bounds, store.now()).await;
        set.inspect_err(|_| self.metrics.store_failed())?;
        self.keep_changed.send_replace(());
        Ok(())
    }

    /// Sets the automatic scan of an instance, or forgets what was set.
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

/// Parts of the path. A part that is no text names nothing that exists.
pub struct At<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for At<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        Path::from_request_parts(parts, state).await.map(|Path(at)| Self(at)).map_err(|_| ApiError::no_url())
    }
}

/// Parameters of the query.
pub struct Params<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Params<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let query = Query::from_request_parts(parts, state).await;
        query.map(|Query(params)| Self(params)).map_err(|_| ApiError::invalid("query"))
    }
}

/// The body as it came.
pub struct RawBody(pub Bytes);

impl<S: Send + Sync> FromRequest<S> for RawBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        Bytes::from_request(request, state).await.map(Self).map_err(|_| ApiError::too_large())
    }
}

/// The body as JSON of a known form, whatever the Content-Type says.
pub struct JsonBody<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let RawBody(body) = RawBody::from_request(request, state).await?;
        if body.is_empty() {
            return Err(ApiError::empty_body());
        }
        let value: serde_json::Value = serde_json::from_slice(&body).map_err(|_| ApiError::not_json())?;
        if !value.is_object() {
            // serde would take a list for the fields in their order.
            return Err(ApiError::invalid("body (it is no JSON object)"));
        }
        // serde's sentence names the field and what it should be, and repeats at most one value of the caller's own.
        T::deserialize(value).map(Self).map_err(|e| ApiError::invalid(format_args!("body ({e})")))
    }
}
