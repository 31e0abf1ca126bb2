//! The calls for monitoring: liveness, readiness, metrics, and the OpenAPI description.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::{OpenApi, ToSchema};

use crate::api::App;
use crate::api::auth::Caller;
use crate::api::error::{ApiError, ErrorBody};
use crate::api::responses::{Forbidden, GuardedWithoutRecords};

/// Longest time for the store to answer a ping.
const STORE_WITHIN: Duration = Duration::from_secs(2);

/// The health of the daemon.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Health {
    /// Always `ok`; an unhealthy daemon answers with an error.
    pub status: &'static str,
    /// Version of the running program.
    pub version: &'static str,
}

const OK: Health = Health { status: "ok", version: env!("CARGO_PKG_VERSION") };

/// Whether the process answers. The records are not read, so that a slow disk does not get the daemon restarted.
#[utoipa::path(get, path = "/healthz", tag = "health", operation_id = "healthz", security(()),
    responses((status = 200, body = Health)))]
pub(crate) async fn healthz() -> Json<Health> {
    Json(OK)
}

/// Whether the daemon can do its work: the records can be read, it has its lease if daemons share them, and it is not stopping.
#[utoipa::path(get, path = "/readyz", tag = "health", operation_id = "readyz", security(()),
    responses((status = 200, body = Health), (status = 503, body = ErrorBody)))]
pub(crate) async fn readyz(State(app): State<App>) -> Result<Json<Health>, ApiError> {
    if app.stopping.is_cancelled() || !app.service.has_lease() {
        return Err(ApiError::unavailable());
    }
    match tokio::time::timeout(STORE_WITHIN, app.service.store().ping()).await {
        Ok(Ok(())) => Ok(Json(OK)),
        _ => Err(ApiError::unavailable()),
    }
}

/// The metrics: in the OpenMetrics text format if the request accepts it, else in the older one of Prometheus.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "health",
    operation_id = "metrics",
    responses(
        (status = 200, content((String = "text/plain"), (String = "application/openmetrics-text"))),
        Forbidden, GuardedWithoutRecords,
    )
)]
pub(crate) async fn metrics(State(app): State<App>, caller: Caller, headers: HeaderMap) -> Result<Response, ApiError> {
    // The metrics are of all projects.
    if caller.0.projects.is_some() {
        return Err(ApiError::forbidden());
    }
    let accepted = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or("");
    Ok(if accepted.contains("application/openmetrics-text") {
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        ([(header::CONTENT_TYPE, kind)], app.metrics.encode()).into_response()
    } else {
        let kind = "text/plain; version=0.0.4; charset=utf-8";
        ([(header::CONTENT_TYPE, kind)], app.metrics.encode_classic()).into_response()
    })
}

/// The OpenAPI description, generated from the code.
pub(crate) async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(Description::openapi())
}

#[derive(OpenApi)]
#[openapi(
    info(title = "ttlsweep", description = "Frees expired keys: the expired-key scan of DCS, with calls beside it for what DCS lacks."),
    servers((url = "/")),
    paths(
        crate::api::dcs::create, crate::api::dcs::scan, crate::api::dcs::history, crate::api::dcs::show_config,
        crate::api::dcs::update_config, crate::api::instances::list_instances,
        crate::api::instances::get_instance, crate::api::instances::list_history,
        crate::api::instances::reset_auto_scan, crate::api::instances::check_instance,
        crate::api::keep::set_keep, crate::api::keep::reset_keep,
        crate::api::forecast::get_forecast, crate::api::forecast::make_forecast,
        crate::api::tasks::list_tasks, crate::api::tasks::create_task, crate::api::tasks::get_task,
        crate::api::tasks::tune_task, crate::api::tasks::pause_task, crate::api::tasks::resume_task,
        crate::api::tasks::cancel_task, crate::api::events::follow_task, crate::api::events::follow_all,
        crate::api::auth::show_caller, crate::api::daemons::list_daemons, crate::api::reload, healthz, readyz, metrics,
    ),
    components(schemas(
        crate::api::requests::CauseWord, crate::api::requests::StateWord, crate::api::instances::InstanceState,
        crate::api::instances::SortBy, crate::api::instances::SortOrder, crate::api::dcs::ContractStatus,
    )),
    modifiers(&TokenSchemes),
    security(("token" = []), ("bearer" = [])),
)]
struct Description;

/// Adds the two ways to send a token to the description.
struct TokenSchemes;

impl utoipa::Modify for TokenSchemes {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
        let components = api.components.get_or_insert_default();
        let token = SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new("X-Auth-Token")));
        components.add_security_scheme("token", token);
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        components.add_security_scheme("bearer", SecurityScheme::Http(bearer));
    }
}
