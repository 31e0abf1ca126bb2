//! Configurations of the automatic scan, and which due times were dealt with.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use sqlx::sqlite::SqliteRow;
use sqlx::{QueryBuilder, Row, Sqlite, SqliteExecutor};

use crate::model::schedule::{AutoScan, CronRule, Recurrence};
use crate::store::StoreError;
use crate::store::rows::{number, time};

pub(super) async fn auto_scan(
    executor: impl SqliteExecutor<'_>,
    instance_id: &str,
    project_id: &str,
) -> Result<Option<AutoScan>, StoreError> {
    let query = sqlx::query("SELECT * FROM auto_scans WHERE instance_id = ? AND project_id IN (?, '')");
    let row = query.bind(instance_id).bind(project_id).fetch_optional(executor).await?;
    row.as_ref().map(auto_scan_of).transpose()
}

pub(super) async fn set_auto_scan(
    executor: impl SqliteExecutor<'_>,
    instance_id: &str,
    project_id: &str,
    config: &AutoScan,
) -> Result<(), StoreError> {
    let (first, interval_s, cron) = match &config.recurrence {
        Recurrence::Every { first, interval_s } => (*first, *interval_s, None),
        Recurrence::Cron(rule) => (None, 0, Some(rule)),
    };
    sqlx::query(
        "INSERT INTO auto_scans (instance_id, project_id, enabled, first_scan_at, interval_s, cron, zone, timeout_s, \
         count, updated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (instance_id) DO UPDATE SET \
         project_id = excluded.project_id, enabled = excluded.enabled, first_scan_at = excluded.first_scan_at, interval_s = excluded.interval_s, \
         cron = excluded.cron, zone = excluded.zone, timeout_s = excluded.timeout_s, count = excluded.count, \
         updated_at = excluded.updated_at",
    )
    .bind(instance_id)
    .bind(project_id)
    .bind(config.enabled)
    .bind(first.map(Timestamp::as_millisecond))
    .bind(interval_s)
    .bind(cron.map(|rule| rule.expression()))
    .bind(cron.map(|rule| rule.zone()))
    .bind(config.timeout_s)
    .bind(config.count)
    .bind(config.updated_at.map(Timestamp::as_millisecond))
    .execute(executor)
    .await?;
    Ok(())
}

fn auto_scan_of(row: &SqliteRow) -> Result<AutoScan, StoreError> {
    let small = |column| {
        number(row, column).and_then(|n| {
            u32::try_from(n).map_err(|_| StoreError::Damaged(format!("{column} of an automatic scan is {n}")))
        })
    };
    let recurrence = match row.try_get::<Option<String>, _>("cron")? {
        Some(expression) => {
            let zone: Option<String> = row.try_get("zone")?;
            let zone = TimeZone::get(zone.as_deref().unwrap_or("UTC"))
                .map_err(|e| StoreError::Damaged(format!("the zone of an automatic scan: {e}")))?;
            Recurrence::Cron(Box::new(CronRule::parse(&expression, zone).map_err(StoreError::Damaged)?))
        }
        None => Recurrence::Every {
            first: row.try_get::<Option<i64>, _>("first_scan_at")?.map(time).transpose()?,
            interval_s: small("interval_s")?,
        },
    };
    Ok(AutoScan {
        enabled: row.try_get("enabled")?,
        recurrence,
        timeout_s: small("timeout_s")?,
        count: small("count")?,
        updated_at: row.try_get::<Option<i64>, _>("updated_at")?.map(time).transpose()?,
    })
}

/// What is known of the due times of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// Due times up to this instant were dealt with, or are nobody's to keep.
    pub handled: Timestamp,
    /// The schedule that it was set for, in words; `None`: whichever is in force.
    pub schedule: Option<String>,
}

pub(super) async fn mark(executor: impl SqliteExecutor<'_>, instance_id: &str) -> Result<Option<Mark>, StoreError> {
    let query = sqlx::query("SELECT handled, schedule FROM dues WHERE instance_id = ?").bind(instance_id);
    let row = query.fetch_optional(executor).await?;
    row.map(|row| Ok(Mark { handled: time(row.try_get("handled")?)?, schedule: row.try_get("schedule")? })).transpose()
}

/// Sets the mark, wherever it was.
pub(super) async fn set_mark(
    executor: impl SqliteExecutor<'_>,
    instance_id: &str,
    mark: &Mark,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO dues (instance_id, handled, schedule) VALUES (?, ?, ?) ON CONFLICT (instance_id) DO UPDATE SET \
         handled = excluded.handled, schedule = excluded.schedule",
    )
    .bind(instance_id)
    .bind(mark_of(mark.handled))
    .bind(&mark.schedule)
    .execute(executor)
    .await?;
    Ok(())
}

/// Moves the mark forward, within its schedule.
pub(super) async fn set_handled(
    executor: impl SqliteExecutor<'_>,
    instance_id: &str,
    handled: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO dues (instance_id, handled) VALUES (?, ?) ON CONFLICT (instance_id) DO UPDATE SET \
         handled = MAX(handled, excluded.handled)",
    )
    .bind(instance_id)
    .bind(mark_of(handled))
    .execute(executor)
    .await?;
    Ok(())
}

/// Forgets the marks of all other instances.
pub(super) async fn forget_marks_but<'a>(
    executor: impl SqliteExecutor<'_>,
    instance_ids: impl Iterator<Item = &'a str>,
) -> Result<(), StoreError> {
    let mut query = QueryBuilder::<Sqlite>::new("DELETE FROM dues WHERE instance_id NOT IN (");
    let mut list = query.separated(", ");
    for id in instance_ids {
        list.push_bind(id.to_owned());
    }
    query.push(")");
    query.build().execute(executor).await?;
    Ok(())
}

pub(super) async fn forget_auto_scan(executor: impl SqliteExecutor<'_>, instance_id: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM auto_scans WHERE instance_id = ?").bind(instance_id).execute(executor).await?;
    Ok(())
}

/// The mark in whole milliseconds, and never before the time itself: a due time that seems to lie after its own mark would be due
/// again and again.
fn mark_of(handled: Timestamp) -> i64 {
    handled.as_millisecond() + i64::from(handled.subsec_nanosecond() % 1_000_000 > 0)
}
