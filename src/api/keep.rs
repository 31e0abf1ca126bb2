//! Setting and resetting the bounds of an instance.

#![allow(unused_qualifications, reason = "in the code that utoipa's attributes make")]

use axum::Json;
use axum::extract::State;

use crate::api::auth::Caller;
use crate::api::error::ApiError;
use crate::api::requests::invalid_settings;
use crate::api::responses::{Forbidden, Guarded, Invalid, Missing};
use crate::api::task_dto::{InstanceDetails, KeepBounds};
use crate::api::{App, JsonBody, PathParams};
use crate::model::task::SweepTexts;
use crate::settings;

/// Sets the bounds of an instance. If both are off it is not kept, whatever the settings file says.
#[utoipa::path(
    put, path = "/api/v1/instances/{instance_id}/keep", tag = "instances", operation_id = "set_keep",
    params(("instance_id" = String, Path)), request_body = KeepBounds,
    responses((status = 200, body = InstanceDetails), Invalid, Forbidden, Missing, Guarded)
)]
pub(crate) async fn set_keep(
    State(app): State<App>,
    caller: Caller,
    PathParams(id): PathParams<String>,
    JsonBody(request): JsonBody<KeepBounds>,
) -> Result<Json<InstanceDetails>, ApiError> {
    let instance = app.instance_of(&caller, &id)?;
    let texts = [("max-backlog", request.max_backlog), ("max-delay", request.max_delay)];
    let texts: SweepTexts = texts.into_iter().filter_map(|(key, text)| Some((key.to_owned(), text?))).collect();
    let bounds = settings::tuning_of(&texts).map_err(invalid_settings)?.bounds;
    app.set_keep(&instance, Some(bounds)).await?;
    tracing::info!(instance = instance.id, caller = caller.0.name, ?bounds, "bounds set");
    Ok(Json(app.details(&instance).await?))
}

/// Removes the bounds that the API set: those of the settings file apply again.
#[utoipa::path(
    delete, path = "/api/v1/instances/{instance_id}/keep", tag = "instances", operation_id = "reset_keep",
    params(("instance_id" = String, Path)),
    responses((status = 200, body = InstanceDetails), Forbidden, Missing, Guarded)
)]
pub(crate) async fn reset_keep(
    State(app): State<App>,
    caller: Caller,
    PathParams(id): PathParams<String>,
) -> Result<Json<InstanceDetails>, ApiError> {
    let instance = app.instance_of(&caller, &id)?;
    app.set_keep(&instance, None).await?;
    tracing::info!(instance = instance.id, caller = caller.0.name, "bounds reset to those of the settings file");
    Ok(Json(app.details(&instance).await?))
}
