//! Forecasts of an instance: the last one, and a new one.

#![allow(unused_qualifications, reason = "in the code that utoipa's attributes make")]

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use jiff::tz::TimeZone;
use serde::Deserialize;
use utoipa::ToSchema;

use crate::api::auth::Caller;
use crate::api::error::{ApiError, ErrorBody};
use crate::api::forecast_dto::ForecastOutput;
use crate::api::{App, At, JsonBody};
use crate::forecast::prefixes::By;
use crate::forecast::{self, Place, Request, SAMPLE_KEYS};
use crate::settings::serve::Instance;
use crate::store::Store;

/// Keys of each DB of each master that are looked at on a master: as many as a twentieth of its time allows while somebody waits.
const ON_MASTER: u64 = 20_000;

/// How a forecast is made. What is left out is as `ttlsweep forecast` has it.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MakeForecast {
    /// Look on the masters themselves, in a twentieth of their time, where there are no replicas. Expired keys that are met
    /// there are freed.
    pub on_master: bool,
    /// Group keys by the first part of their names.
    pub by_prefix: bool,
    /// In which zone's time the parts of the histogram are round, such as `Europe/Berlin`.
    pub zone: Option<String>,
}

/// The last forecast of an instance.
#[utoipa::path(
    get, path = "/api/v1/instances/{instance_id}/forecast", tag = "instances", operation_id = "get_forecast",
    params(("instance_id" = String, Path)),
    responses(
        (status = 200, body = ForecastOutput), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 413, body = ErrorBody), (status = 500, body = ErrorBody), (status = 503, body = ErrorBody),
    )
)]
pub async fn get_forecast(State(app): State<App>, caller: Caller, At(id): At<String>) -> Result<Response, ApiError> {
    let instance = app.instance_of(&caller, &id)?;
    let last = app.service.store().forecast(&instance.id, &instance.project_id).await?;
    let last = last.ok_or_else(ApiError::no_forecast)?;
    Ok(([(header::CONTENT_TYPE, "application/json")], last).into_response())
}

/// Makes a forecast and keeps it as the last one.
#[utoipa::path(
    post, path = "/api/v1/instances/{instance_id}/forecast", tag = "instances", operation_id = "make_forecast",
    params(("instance_id" = String, Path)), request_body = MakeForecast,
    responses(
        (status = 200, body = ForecastOutput), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 403, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 413, body = ErrorBody), (status = 500, body = ErrorBody), (status = 502, body = ErrorBody),
        (status = 503, body = ErrorBody),
    )
)]
pub async fn make_forecast(
    State(app): State<App>,
    caller: Caller,
    At(id): At<String>,
    JsonBody(request): JsonBody<MakeForecast>,
) -> Result<Json<ForecastOutput>, ApiError> {
    let instance = app.instance_of(&caller, &id)?;
    let zone = match request.zone.as_deref() {
        Some(name) => TimeZone::get(name).map_err(|_| ApiError::invalid("zone"))?,
        None => TimeZone::system(),
    };
    let place = if request.on_master { Place::Master } else { Place::AnyReplica };
    let by = request.by_prefix.then(By::default);
    let sample = if request.on_master { ON_MASTER } else { SAMPLE_KEYS };
    let request = Request { by, sample, ..Request::new(place, zone) };
    Ok(Json(make(app.service.store(), &instance, request).await?))
}

/// Makes a forecast of an instance and keeps it. Of the names nothing is kept: those that were asked for are in the answer only.
pub async fn make(store: &Store, instance: &Instance, mut request: Request) -> Result<ForecastOutput, ApiError> {
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
