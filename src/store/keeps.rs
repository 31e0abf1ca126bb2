//! The bounds that the API set for instances.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, Row};

use crate::model::bounds::Bounds;
use crate::store::StoreError;
use crate::store::rows::number;

pub(super) async fn set(
    conn: &mut AnyConnection,
    instance_id: &str,
    project_id: &str,
    bounds: Bounds,
    now: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO keeps (instance_id, project_id, max_backlog, max_delay_us, updated_at) VALUES ($1, $2, $3, $4, $5) \
         ON CONFLICT (instance_id) DO UPDATE SET project_id = excluded.project_id, max_backlog = excluded.max_backlog, \
         max_delay_us = excluded.max_delay_us, updated_at = excluded.updated_at",
    )
    .bind(instance_id)
    .bind(project_id)
    .bind(bounds.max_backlog.map(|size| size.to_string()))
    .bind(bounds.max_delay.map(|delay| i64::try_from(delay.as_micros()).unwrap_or(i64::MAX)))
    .bind(now.as_millisecond())
    .execute(conn)
    .await?;
    Ok(())
}

pub(super) async fn forget(conn: &mut AnyConnection, instance_id: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM keeps WHERE instance_id = $1").bind(instance_id).execute(conn).await?;
    Ok(())
}

/// The bounds that the API set, by instance.
#[derive(Debug, Clone, Default)]
pub struct Keeps(BTreeMap<String, (String, Bounds)>);

impl Keeps {
    /// The bounds that the API set for an instance of a project. If all are off, the instance is not kept.
    pub fn get(&self, instance_id: &str, project_id: &str) -> Option<Bounds> {
        let (project, bounds) = self.0.get(instance_id)?;
        (project == project_id).then_some(*bounds)
    }

    /// All bounds, each with the ids of its instance and project.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str, Bounds)> {
        self.0.iter().map(|(instance, (project, bounds))| (instance.as_str(), project.as_str(), *bounds))
    }
}

pub(super) async fn all(conn: &mut AnyConnection) -> Result<Keeps, StoreError> {
    let rows =
        sqlx::query("SELECT instance_id, project_id, max_backlog, max_delay_us FROM keeps").fetch_all(conn).await?;
    let of_row = |row: &AnyRow| Ok((row.try_get("instance_id")?, (row.try_get("project_id")?, bounds_of(row)?)));
    rows.iter().map(of_row).collect::<Result<_, _>>().map(Keeps)
}

fn bounds_of(row: &AnyRow) -> Result<Bounds, StoreError> {
    let size: Option<String> = row.try_get("max_backlog")?;
    let delay = row.try_get::<Option<i64>, _>("max_delay_us")?.map(|_| number(row, "max_delay_us")).transpose()?;
    Ok(Bounds {
        max_backlog: size.map(|text| text.parse().map_err(StoreError::Damaged)).transpose()?,
        max_delay: delay.map(Duration::from_micros),
    })
}
