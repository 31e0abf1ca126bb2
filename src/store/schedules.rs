//! The automatic scans that the API set, and which due times were handled. The table `dues` holds the due position of each instance,
//! `due_times` what became of each due time.

use std::collections::BTreeMap;

use futures_util::TryStreamExt;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, AssertSqlSafe, Row};

use crate::model::schedule::{AutoScan, CronRule, Recurrence};
use crate::model::task::TaskId;
use crate::store::StoreError;
use crate::store::rows::{number, placeholders, time};

/// The automatic scan that the API set for an instance. A row without a project is from before projects were stored.
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

/// Due positions that one statement sets.
const POSITIONS_AT_ONCE: usize = 500;

/// How far the due times of an instance were handled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DuePosition {
    /// Due times up to this instant were run or skipped, or lie before the schedule was put in force.
    pub handled: Timestamp,
    /// The schedule that this counts for, as text; `None`: whichever is in force.
    pub schedule: Option<String>,
}

/// What became of a due time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DueOutcome<'a> {
    /// The due time that was handled.
    pub at: Timestamp,
    /// `run`, or why it was skipped: `still_running` or `missed`.
    pub outcome: &'a str,
}

/// The automatic scans and due positions of all instances, as the store holds them.
#[derive(Debug, Clone, Default)]
pub struct ScheduleState {
    auto_scans: BTreeMap<String, (String, AutoScan)>,
    positions: BTreeMap<String, DuePosition>,
}

impl ScheduleState {
    /// The automatic scan that the API set for an instance of a project.
    pub fn auto_scan(&self, instance_id: &str, project_id: &str) -> Option<&AutoScan> {
        let (project, config) = self.auto_scans.get(instance_id)?;
        (project == project_id || project.is_empty()).then_some(config)
    }

    /// Replaces the due position of an instance. The store is not written.
    pub fn set_position(&mut self, instance_id: &str, position: DuePosition) {
        self.positions.insert(instance_id.to_owned(), position);
    }

    /// The automatic scans that the API set, each with the ids of its instance and project.
    pub(super) fn auto_scans(&self) -> impl Iterator<Item = (&str, &str, &AutoScan)> {
        self.auto_scans.iter().map(|(instance, (project, config))| (instance.as_str(), project.as_str(), config))
    }

    /// The due positions, each with the id of its instance.
    pub(super) fn positions(&self) -> impl Iterator<Item = (&str, &DuePosition)> {
        self.positions.iter().map(|(instance, position)| (instance.as_str(), position))
    }

    /// The due position of an instance; `None` if its schedule was never evaluated.
    pub fn position(&self, instance_id: &str) -> Option<&DuePosition> {
        self.positions.get(instance_id)
    }
}

/// Reads the schedule state of all instances, in two statements.
pub(super) async fn all(conn: &mut AnyConnection) -> Result<ScheduleState, StoreError> {
    let mut schedules = ScheduleState::default();
    // Row by row, to hold one row at a time: there may be ten thousand instances.
    let mut rows = sqlx::query("SELECT * FROM auto_scans").fetch(&mut *conn);
    while let Some(row) = rows.try_next().await? {
        let entry = (row.try_get("project_id")?, auto_scan_of(&row)?);
        schedules.auto_scans.insert(row.try_get("instance_id")?, entry);
    }
    drop(rows);
    let mut rows = sqlx::query("SELECT instance_id, handled, schedule FROM dues").fetch(conn);
    while let Some(row) = rows.try_next().await? {
        let (instance_id, position) = position_in(&row)?;
        schedules.positions.insert(instance_id, position);
    }
    Ok(schedules)
}

/// The due positions after an instant, by instance.
pub(super) async fn due_positions_after(
    conn: &mut AnyConnection,
    after: Timestamp,
) -> Result<Vec<(String, DuePosition)>, StoreError> {
    let query = sqlx::query("SELECT instance_id, handled, schedule FROM dues WHERE handled > $1");
    query.bind(ceil_millis(after)).fetch_all(conn).await?.iter().map(position_in).collect()
}

fn position_in(row: &AnyRow) -> Result<(String, DuePosition), StoreError> {
    let position = DuePosition { handled: time(row.try_get("handled")?)?, schedule: row.try_get("schedule")? };
    Ok((row.try_get("instance_id")?, position))
}

/// Sets due positions, also to an earlier instant.
pub(super) async fn set_due_positions(
    conn: &mut AnyConnection,
    positions: &[(&str, &DuePosition)],
) -> Result<(), StoreError> {
    for some in positions.chunks(POSITIONS_AT_ONCE) {
        let rows: Vec<_> = (0..some.len()).map(|row| format!("({})", placeholders(3 * row + 1..3 * row + 4))).collect();
        let sql = format!(
            "INSERT INTO dues (instance_id, handled, schedule) VALUES {} ON CONFLICT (instance_id) DO UPDATE SET \
             handled = excluded.handled, schedule = excluded.schedule",
            rows.join(", ")
        );
        let mut query = sqlx::query(AssertSqlSafe(sql));
        for (instance_id, position) in some {
            query = query.bind((*instance_id).to_owned()).bind(ceil_millis(position.handled));
            query = query.bind(position.schedule.clone());
        }
        query.execute(&mut *conn).await?;
    }
    Ok(())
}

/// Records what became of a due time, and moves the due position forward to it. Returns false, and changes nothing, if the due time was
/// recorded before.
pub(super) async fn record_due(
    conn: &mut AnyConnection,
    instance_id: &str,
    due: DueOutcome<'_>,
    task: Option<TaskId>,
) -> Result<bool, StoreError> {
    let added = sqlx::query(
        "INSERT INTO due_times (instance_id, due, outcome, task_id) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
    )
    .bind(instance_id)
    .bind(ceil_millis(due.at))
    .bind(due.outcome)
    .bind(task.map(|id| id.to_string()))
    .execute(&mut *conn)
    .await?;
    if added.rows_affected() == 0 {
        // The transaction that recorded it has moved the due position too.
        return Ok(false);
    }
    sqlx::query(
        "INSERT INTO dues (instance_id, handled) VALUES ($1, $2) ON CONFLICT (instance_id) DO UPDATE SET \
         handled = CASE WHEN dues.handled < excluded.handled THEN excluded.handled ELSE dues.handled END",
    )
    .bind(instance_id)
    .bind(ceil_millis(due.at))
    .execute(conn)
    .await?;
    Ok(true)
}

/// Removes the due positions of all other instances.
pub(super) async fn forget_due_positions_except(
    conn: &mut AnyConnection,
    instance_ids: &[&str],
) -> Result<(), StoreError> {
    let sql = format!("DELETE FROM dues WHERE instance_id NOT IN ({})", placeholders(1..instance_ids.len() + 1));
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

/// An instant in milliseconds since 1970, rounded up: rounded down, a due time would lie after its own due position and be due again
/// and again.
fn ceil_millis(at: Timestamp) -> i64 {
    at.as_millisecond() + i64::from(at.subsec_nanosecond() % 1_000_000 > 0)
}
