//! The last forecast of each instance, as the JSON of the API.

use std::collections::BTreeSet;

use jiff::Timestamp;
use sqlx::{AnyConnection, Row};

use crate::store::StoreError;

pub(super) async fn set(
    conn: &mut AnyConnection,
    instance_id: &str,
    project_id: &str,
    forecast: &str,
    now: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO forecasts (instance_id, project_id, made_at, forecast) VALUES ($1, $2, $3, $4) \
         ON CONFLICT (instance_id) DO UPDATE SET project_id = excluded.project_id, made_at = excluded.made_at, \
         forecast = excluded.forecast",
    )
    .bind(instance_id)
    .bind(project_id)
    .bind(now.as_millisecond())
    .bind(forecast)
    .execute(conn)
    .await?;
    Ok(())
}

pub(super) async fn get(
    conn: &mut AnyConnection,
    instance_id: &str,
    project_id: &str,
) -> Result<Option<String>, StoreError> {
    let query = sqlx::query("SELECT forecast FROM forecasts WHERE instance_id = $1 AND project_id = $2");
    let row = query.bind(instance_id).bind(project_id).fetch_optional(conn).await?;
    Ok(row.map(|row| row.try_get("forecast")).transpose()?)
}

/// The ids of the instances whose last forecast was made after an instant.
pub(super) async fn made_after(conn: &mut AnyConnection, after: Timestamp) -> Result<BTreeSet<String>, StoreError> {
    let query = sqlx::query("SELECT instance_id FROM forecasts WHERE made_at > $1");
    let rows = query.bind(after.as_millisecond()).fetch_all(conn).await?;
    rows.iter().map(|row| Ok(row.try_get("instance_id")?)).collect()
}
