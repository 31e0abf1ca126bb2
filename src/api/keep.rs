//! Setting and resetting the bounds of an instance.

#![allow(unused_qualifications, reason = "in the code that utoipa's attributes make")]

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::auth::Caller;
use crate::api::error::ApiError;
use crate::api::requests::invalid_settings;
use crate::api::responses::{Forbidden, Guarded, Invalid, Missing};
use crate::api::task_dto::InstanceDetails;
use crate::api::{App, JsonBody, PathParams};
use crate::model::bounds::Bounds;
use crate::model::task::SweepTexts;
use crate::settings;

/// The bounds of an instance. A bound that is `off` or left out is none; without any bound the instance is not kept.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct KeepBounds {
    /// Most expired keys in the memory of each master: a number of keys, bytes, or a share of its keys with a TTL.
    #[schema(pattern = "^(off|[0-9]{1,12}(KiB|MiB|GiB)?|[0-9]{1,2}%)$", example = "5%")]
    pub max_backlog: Option<String>,
    /// Longest time that a key stays in memory after it has expired.
    #[schema(pattern = "^(off|[1-9][0-9]{0,5}(ms|s|min))$", example = "2s")]
    pub max_delay: Option<String>,
}

impl From<Bounds> for KeepBounds {
    fn from(bounds: Bounds) -> Self {
        let [(_, max_backlog), (_, max_delay)] = settings::bound_texts(bounds);
        Self { max_backlog: Some(max_backlog), max_delay: Some(max_delay) }
    }
}

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
