//! Forecasts of an instance: shows the last one, and makes a new one.

#![allow(unused_qualifications, reason = "in the code that utoipa's attributes make")]

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use jiff::tz::TimeZone;
use serde::Deserialize;
use utoipa::ToSchema;

use crate::api::auth::Caller;
use crate::api::error::ApiError;
use crate::api::forecast_dto::ForecastOutput;
use crate::api::responses::{Conflict, Forbidden, Guarded, Invalid, Missing, Unreachable};
use crate::api::{App, JsonBody, PathParams};
use crate::forecast::prefixes::By;
use crate::forecast::{self, ForecastRequest, ReadFrom, SAMPLE_KEYS};
use crate::settings::serve::Instance;
use crate::store::Store;

/// Keys to sample in each DB on a master itself: as many as a twentieth of its time allows while the caller waits.
const ON_MASTER: u64 = 20_000;

/// The body to make a forecast. Fields that are left out have the defaults of `ttlsweep forecast`.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct MakeForecast {
    /// Sample on the masters themselves, in a twentieth of their time, if there are no replicas. This frees the expired keys
    /// that it meets.
    pub on_master: bool,
    /// Group keys by the first part of their names.
    pub by_prefix: bool,
    /// Time zone in whose local time the bins of the histogram begin at round times, such as `Europe/Berlin`.
    pub zone: Option<String>,
}

/// Shows the last forecast of an instance.
#[utoipa::path(
    get, path = "/api/v1/instances/{instance_id}/forecast", tag = "instances", operation_id = "get_forecast",
    params(("instance_id" = String, Path)),
    responses((status = 200, body = ForecastOutput), Missing, Guarded)
)]
pub(crate) async fn get_forecast(
    State(app): State<App>,
    caller: Caller,
    PathParams(id): PathParams<String>,
) -> Result<Response, ApiError> {
    let instance = app.instance_of(&caller, &id)?;
    let last = app.service.store().forecast(&instance.id, &instance.project_id).await?;
    let last = last.ok_or_else(ApiError::no_forecast)?;
    Ok(([(header::CONTENT_TYPE, "application/json")], last).into_response())
}

/// Makes a forecast and stores it as the last one of the instance.
#[utoipa::path(
    post, path = "/api/v1/instances/{instance_id}/forecast", tag = "instances", operation_id = "make_forecast",
    params(("instance_id" = String, Path)), request_body = MakeForecast,
    responses((status = 200, body = ForecastOutput), Invalid, Forbidden, Missing, Conflict, Unreachable, Guarded)
)]
pub(crate) async fn make_forecast(
    State(app): State<App>,
    caller: Caller,
    PathParams(id): PathParams<String>,
    JsonBody(request): JsonBody<MakeForecast>,
) -> Result<Json<ForecastOutput>, ApiError> {
    let instance = app.instance_of(&caller, &id)?;
    let zone = match request.zone.as_deref() {
        Some(name) => TimeZone::get(name).map_err(|_| ApiError::invalid("zone"))?,
        None => TimeZone::system(),
    };
    let read_from = if request.on_master { ReadFrom::Master } else { ReadFrom::AnyReplica };
    let by = request.by_prefix.then(By::default);
    let sample = if request.on_master { ON_MASTER } else { SAMPLE_KEYS };
    let request = ForecastRequest { by, sample, ..ForecastRequest::new(read_from, zone) };
    Ok(Json(make(app.service.store(), &instance, request).await?))
}

/// Makes a forecast of an instance and stores it without any parts of key names: those are only in the returned one.
pub(crate) async fn make(
    store: &Store,
    instance: &Instance,
    mut request: ForecastRequest,
) -> Result<ForecastOutput, ApiError> {
    request.dbs.clone_from(&instance.settings.scan.dbs);
    let (view, options) = crate::tasks::masters(&instance.settings).await.map_err(ApiError::of_instance)?;
    let target = instance.settings.target.to_string();
    let mut forecast = forecast::make(target, &view, &options, &request).await.map_err(ApiError::of_instance)?;
    let answer = ForecastOutput::new(&forecast, &request.zone);
    forecast.groups = None;
    let kept = serde_json::to_string(&ForecastOutput::new(&forecast, &request.zone)).unwrap_or_default();
    store.set_forecast(&instance.id, &instance.project_id, &kept).await?;
    Ok(answer)
}
