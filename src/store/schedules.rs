//! Configurations of the automatic scan, and which due times were dealt with.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteExecutor};

use crate::model::schedule::{AutoScan, CronRule, Rhythm};
use crate::store::StoreError;
use crate::store::rows::{number, time};

pub(super) async fn auto_scan(
    executor: impl SqliteExecutor<'_>,
    instance_id: &str,
) -> Result<Option<AutoScan>, StoreError> {
    let query = sqlx::query("SELECT * FROM auto_scans WHERE instance_id = ?").bind(instance_id);
    query.fetch_optional(executor).await?.as_ref().map(auto_scan_of).transpose()
}

pub(super) async fn set_auto_scan(
    executor: impl SqliteExecutor<'_>,
    instance_id: &str,
    config: &AutoScan,
) -> Result<(), StoreError> {
    let (first, interval_s, cron) = match &config.rhythm {
        Rhythm::Every { first, interval_s } => (*first, *interval_s, None),
        Rhythm::Cron(rule) => (None, 0, Some(rule)),
    };
    sqlx::query(
        "INSERT INTO auto_scans (instance_id, enabled, first_scan_at, interval_s, cron, zone, timeout_s, count, \
         updated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (instance_id) DO UPDATE SET \
         enabled = excluded.enabled, first_scan_at = excluded.first_scan_at, interval_s = excluded.interval_s, \
         cron = excluded.cron, zone = excluded.zone, timeout_s = excluded.timeout_s, count = excluded.count, \
         updated_at = excluded.updated_at",
    )
    .bind(instance_id)
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
    let rhythm = match row.try_get::<Option<String>, _>("cron")? {
        Some(expression) => {
            let zone: Option<String> = row.try_get("zone")?;
            let zone = TimeZone::get(zone.as_deref().unwrap_or("UTC"))
                .map_err(|e| StoreError::Damaged(format!("the zone of an automatic scan: {e}")))?;
            Rhythm::Cron(Box::new(CronRule::parse(&expression, zone).map_err(StoreError::Damaged)?))
        }
        None => Rhythm::Every {
            first: row.try_get::<Option<i64>, _>("first_scan_at")?.map(time).transpose()?,
            interval_s: small("interval_s")?,
        },
    };
    Ok(AutoScan {
        enabled: row.try_get("enabled")?,
        rhythm,
        timeout_s: small("timeout_s")?,
        count: small("count")?,
        updated_at: row.try_get::<Option<i64>, _>("updated_at")?.map(time).transpose()?,
    })
}

pub(super) async fn handled(
    executor: impl SqliteExecutor<'_>,
    instance_id: &str,
) -> Result<Option<Timestamp>, StoreError> {
    let query = sqlx::query("SELECT handled FROM dues WHERE instance_id = ?").bind(instance_id);
    query.fetch_optional(executor).await?.map(|row| time(row.try_get("handled")?)).transpose()
}

/// Which way the mark may be moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Move {
    /// Forward only.
    Forward,
    /// To that time, wherever it was.
    To,
}

/// Moves the mark of the due times that were dealt with.
pub(super) async fn set_handled(
    executor: impl SqliteExecutor<'_>,
    instance_id: &str,
    handled: Timestamp,
    way: Move,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO dues (instance_id, handled) VALUES (?1, ?2) ON CONFLICT (instance_id) DO UPDATE SET \
         handled = CASE WHEN ?3 THEN MAX(handled, excluded.handled) ELSE excluded.handled END",
    )
    .bind(instance_id)
    .bind(mark_of(handled))
    .bind(way == Move::Forward)
    .execute(executor)
    .await?;
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
