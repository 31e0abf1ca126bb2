//! Configurations of the automatic scan, and which due times were dealt with.

use std::collections::BTreeMap;

use futures_util::TryStreamExt;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, AssertSqlSafe, Row};

use crate::model::schedule::{AutoScan, CronRule, Recurrence};
use crate::model::task::TaskId;
use crate::store::StoreError;
use crate::store::rows::{self, marks, number, time};

pub(super) async fn auto_scan(
    conn: &mut AnyConnection,
    instance_id: &str,
    project_id: &str,
) -> Result<Option<AutoScan>, StoreError> {
    let query = sqlx::query("SELECT * FROM auto_scans WHERE instance_id = $1 AND project_id IN ($2, '')");
    let row = query.bind(instance_id).bind(project_id).fetch_optional(conn).await?;
    row.as_ref().map(auto_scan_of).transpose()
}

pub(super) async fn set_auto_scan(
    conn: &mut AnyConnection,
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
         count, updated_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT (instance_id) DO UPDATE SET \
         project_id = excluded.project_id, enabled = excluded.enabled, first_scan_at = excluded.first_scan_at, interval_s = excluded.interval_s, \
         cron = excluded.cron, zone = excluded.zone, timeout_s = excluded.timeout_s, count = excluded.count, \
         updated_at = excluded.updated_at",
    )
    .bind(instance_id)
    .bind(project_id)
    .bind(i64::from(config.enabled))
    .bind(first.map(Timestamp::as_millisecond))
    .bind(i64::from(interval_s))
    .bind(cron.map(|rule| rule.expression()))
    .bind(cron.map(|rule| rule.zone()))
    .bind(i64::from(config.timeout_s))
    .bind(i64::from(config.count))
    .bind(config.updated_at.map(Timestamp::as_millisecond))
    .execute(conn)
    .await?;
    Ok(())
}

fn auto_scan_of(row: &AnyRow) -> Result<AutoScan, StoreError> {
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
        enabled: number(row, "enabled")? != 0,
        recurrence,
        timeout_s: small("timeout_s")?,
        count: small("count")?,
        updated_at: row.try_get::<Option<i64>, _>("updated_at")?.map(time).transpose()?,
    })
}

/// Marks that one statement sets.
const MARKS_AT_ONCE: usize = 500;

/// What is known of the due times of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// Due times up to this instant were dealt with, or are nobody's to keep.
    pub handled: Timestamp,
    /// The schedule that it was set for, in words; `None`: whichever is in force.
    pub schedule: Option<String>,
}

/// What became of a due time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due<'a> {
    /// When.
    pub at: Timestamp,
    /// `run`, or why it was skipped.
    pub outcome: &'a str,
}

/// What the records hold of the schedules of all instances.
#[derive(Debug, Clone, Default)]
pub struct Schedules {
    auto_scans: BTreeMap<String, (String, AutoScan)>,
    marks: BTreeMap<String, Mark>,
}

impl Schedules {
    /// The automatic scan that the API set for an instance of a project.
    pub fn auto_scan(&self, instance_id: &str, project_id: &str) -> Option<&AutoScan> {
        let (project, config) = self.auto_scans.get(instance_id)?;
        (project == project_id || project.is_empty()).then_some(config)
    }

    /// Takes over a mark that was set since these were read.
    pub fn set_mark(&mut self, instance_id: &str, mark: Mark) {
        self.marks.insert(instance_id.to_owned(), mark);
    }

    /// All automatic scans that the API set: instance, project, scan.
    pub(super) fn auto_scans(&self) -> impl Iterator<Item = (&str, &str, &AutoScan)> {
        self.auto_scans.iter().map(|(instance, (project, config))| (instance.as_str(), project.as_str(), config))
    }

    /// All marks, by instance.
    pub(super) fn marks(&self) -> impl Iterator<Item = (&str, &Mark)> {
        self.marks.iter().map(|(instance, mark)| (instance.as_str(), mark))
    }

    /// The mark of an instance; `None` for one that was never looked at.
    pub fn mark(&self, instance_id: &str) -> Option<&Mark> {
        self.marks.get(instance_id)
    }
}

/// The schedules of all instances, in two statements.
pub(super) async fn all(conn: &mut AnyConnection) -> Result<Schedules, StoreError> {
    let mut schedules = Schedules::default();
    // Row by row: there may be ten thousand of them.
    let mut rows = sqlx::query("SELECT * FROM auto_scans").fetch(&mut *conn);
    while let Some(row) = rows.try_next().await? {
        let entry = (row.try_get("project_id")?, auto_scan_of(&row)?);
        schedules.auto_scans.insert(row.try_get("instance_id")?, entry);
    }
    drop(rows);
    let mut rows = sqlx::query("SELECT instance_id, handled, schedule FROM dues").fetch(conn);
    while let Some(row) = rows.try_next().await? {
        let (instance_id, mark) = mark_in(&row)?;
        schedules.marks.insert(instance_id, mark);
    }
    Ok(schedules)
}

/// The marks that lie after an instant.
pub(super) async fn marks_after(conn: &mut AnyConnection, after: Timestamp) -> Result<Vec<(String, Mark)>, StoreError> {
    let query = sqlx::query("SELECT instance_id, handled, schedule FROM dues WHERE handled > $1");
    query.bind(mark_of(after)).fetch_all(conn).await?.iter().map(mark_in).collect()
}

fn mark_in(row: &AnyRow) -> Result<(String, Mark), StoreError> {
    let mark = Mark { handled: time(row.try_get("handled")?)?, schedule: row.try_get("schedule")? };
    Ok((row.try_get("instance_id")?, mark))
}

/// Sets marks, wherever they were.
pub(super) async fn set_marks(conn: &mut AnyConnection, marks: &[(&str, &Mark)]) -> Result<(), StoreError> {
    for some in marks.chunks(MARKS_AT_ONCE) {
        let rows: Vec<_> = (0..some.len()).map(|row| format!("({})", rows::marks(3 * row + 1..3 * row + 4))).collect();
        let sql = format!(
            "INSERT INTO dues (instance_id, handled, schedule) VALUES {} ON CONFLICT (instance_id) DO UPDATE SET \
             handled = excluded.handled, schedule = excluded.schedule",
            rows.join(", ")
        );
        let mut query = sqlx::query(AssertSqlSafe(sql));
        for (instance_id, mark) in some {
            query = query.bind((*instance_id).to_owned()).bind(mark_of(mark.handled)).bind(mark.schedule.clone());
        }
        query.execute(&mut *conn).await?;
    }
    Ok(())
}

/// Records what became of a due time and moves the mark forward, within its schedule. Returns whether nobody had dealt with it yet.
pub(super) async fn deal_with(
    conn: &mut AnyConnection,
    instance_id: &str,
    due: Due<'_>,
    task: Option<TaskId>,
) -> Result<bool, StoreError> {
    let added = sqlx::query(
        "INSERT INTO due_times (instance_id, due, outcome, task_id) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
    )
    .bind(instance_id)
    .bind(mark_of(due.at))
    .bind(due.outcome)
    .bind(task.map(|id| id.to_string()))
    .execute(&mut *conn)
    .await?;
    if added.rows_affected() == 0 {
        // Whoever did has moved the mark with it.
        return Ok(false);
    }
    sqlx::query(
        "INSERT INTO dues (instance_id, handled) VALUES ($1, $2) ON CONFLICT (instance_id) DO UPDATE SET \
         handled = CASE WHEN dues.handled < excluded.handled THEN excluded.handled ELSE dues.handled END",
    )
    .bind(instance_id)
    .bind(mark_of(due.at))
    .execute(conn)
    .await?;
    Ok(true)
}

/// Forgets the marks of all other instances.
pub(super) async fn forget_marks_but(conn: &mut AnyConnection, instance_ids: &[&str]) -> Result<(), StoreError> {
    let sql = format!("DELETE FROM dues WHERE instance_id NOT IN ({})", marks(1..instance_ids.len() + 1));
    let mut query = sqlx::query(AssertSqlSafe(sql));
    for id in instance_ids {
        query = query.bind(*id);
    }
    query.execute(conn).await?;
    Ok(())
}

pub(super) async fn forget_auto_scan(conn: &mut AnyConnection, instance_id: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM auto_scans WHERE instance_id = $1").bind(instance_id).execute(conn).await?;
    Ok(())
}

/// An instant in whole milliseconds, and never before the time itself: a due time that seems to lie after its own mark would be due
/// again and again.
fn mark_of(handled: Timestamp) -> i64 {
    handled.as_millisecond() + i64::from(handled.subsec_nanosecond() % 1_000_000 > 0)
}
