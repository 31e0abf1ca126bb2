//! The list of the daemons that share a database.

#![allow(unused_qualifications, reason = "in the code that utoipa's attributes make")]

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use crate::api::App;
use crate::api::auth::Caller;
use crate::api::dto::time;
use crate::api::error::ApiError;
use crate::api::responses::Guarded;

/// A daemon of those that share a database.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DaemonDto {
    /// Id of this run of the daemon.
    pub id: String,
    /// Name of the daemon: `--name`, `[daemon] name` or its host name.
    pub name: String,
    /// Whether this daemon answers the request.
    pub answers: bool,
    /// Version of the program that it runs.
    pub version: String,
    /// Address of its API, as it sees that itself.
    pub address: String,
    /// Labels of what its network reaches: it sweeps the instances whose `where` is one of these, and those without `where`.
    pub labels: Vec<String>,
    /// When this run of it started.
    pub started_at: String,
    /// When it last renewed its lease.
    pub heartbeat_at: String,
    /// Seconds since it last renewed its lease.
    pub heartbeat_age_s: f64,
    /// When its lease expires, and others may take over its tasks.
    pub lease_until: String,
    /// Hash of its settings files, in hexadecimal digits.
    pub settings: String,
    /// Whether its settings are those of the daemon that answers.
    pub same_settings: bool,
    /// Its unfinished tasks, as far as the caller may see them.
    pub tasks: Vec<DaemonTaskDto>,
}

/// A task of a daemon.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DaemonTaskDto {
    /// Id of the unfinished task.
    pub task_id: String,
    /// Id of the instance that it sweeps.
    pub instance_id: String,
}

/// The daemons that share a database.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DaemonList {
    /// The daemons, the oldest first.
    pub daemons: Vec<DaemonDto>,
}

/// Lists the daemons that share a database, with the tasks of each. With SQLite there is one daemon.
#[utoipa::path(
    get, path = "/api/v1/daemons", tag = "daemons", operation_id = "list_daemons",
    responses((status = 200, body = DaemonList), Guarded)
)]
pub(crate) async fn list_daemons(State(app): State<App>, caller: Caller) -> Result<Json<DaemonList>, ApiError> {
    let (own, daemons) = app.service.daemons().await?;
    let now = app.service.store().now();
    let settings = app.settings.borrow().clone();
    let may_see = |id: &str| settings.instance(id).is_none_or(|instance| caller.0.allows(&instance.project_id));
    let daemons = daemons.into_iter().map(|daemon| {
        let record = daemon.record;
        let tasks = daemon.tasks.into_iter().filter(|(_, instance_id)| may_see(instance_id));
        DaemonDto {
            id: record.id.to_string(),
            name: record.name,
            answers: Some(record.id) == own,
            version: record.version,
            address: record.address,
            labels: record.labels,
            started_at: time(record.started_at),
            heartbeat_at: time(daemon.heartbeat_at),
            heartbeat_age_s: now.duration_since(daemon.heartbeat_at).as_secs_f64().max(0.0),
            lease_until: time(daemon.lease_until),
            same_settings: record.settings == settings.hash,
            settings: record.settings,
            tasks: tasks.map(|(id, instance_id)| DaemonTaskDto { task_id: id.to_string(), instance_id }).collect(),
        }
    });
    Ok(Json(DaemonList { daemons: daemons.collect() }))
}
