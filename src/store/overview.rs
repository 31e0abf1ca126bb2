//! The newest task of many instances, and what it saw, in a number of statements that does not grow with the instances.

use std::collections::BTreeMap;

use jiff::Timestamp;
use sqlx::any::AnyRow;
use sqlx::{AnyConnection, AssertSqlSafe, Row};

use crate::model::task::{Task, TaskId, TaskState};
use crate::store::rows::{TASK_COLUMNS, number, placeholders, task_id, task_of, time, word};
use crate::store::{StoreError, report};

/// Most values of one statement. Both databases take many more; this one is enough for a thousand instances.
const AT_ONCE: usize = 1_000;

/// The newest task of an instance, and when one last succeeded.
#[derive(Debug, Clone, PartialEq)]
pub struct Standing {
    /// Id of the newest task.
    pub latest: TaskId,
    /// The project that the instance belonged to then.
    pub project_id: String,
    /// State of the newest task.
    pub state: TaskState,
    /// Expired keys that the newest task reclaimed.
    pub reclaimed: u64,
    /// When a task of the instance last succeeded.
    pub last_success: Option<Timestamp>,
}

/// The standing of each of these instances; one without a task is left out. It takes two index look-ups per instance, however many tasks
/// there are. COALESCE keeps SQLite from the index by state, which would make it read nearly all succeeded tasks.
pub(super) async fn standings(
    conn: &mut AnyConnection,
    instances: &[&str],
) -> Result<BTreeMap<String, Standing>, StoreError> {
    let sql = |values: usize| {
        let wanted: Vec<_> = (1..=values).map(|place| format!("(${place})")).collect();
        format!(
            "WITH wanted (instance_id) AS (VALUES {}) \
             SELECT newest.id, newest.instance_id, newest.project_id, newest.state, newest.num, \
             (SELECT finished_at FROM tasks AS good WHERE good.instance_id = wanted.instance_id AND COALESCE(good.state, '') = '{}' \
             ORDER BY good.id DESC LIMIT 1) AS succeeded_at \
             FROM wanted JOIN tasks AS newest ON newest.id = \
             (SELECT own.id FROM tasks AS own WHERE own.instance_id = wanted.instance_id ORDER BY own.id DESC LIMIT 1)",
            wanted.join(", "),
            TaskState::Succeeded,
        )
    };
    let mut standings = BTreeMap::new();
    each_row(conn, instances, sql, |row| {
        let standing = Standing {
            latest: task_id(row.try_get("id")?)?,
            project_id: row.try_get("project_id")?,
            state: word(row, "state")?,
            reclaimed: number(row, "num")?,
            last_success: row.try_get::<Option<i64>, _>("succeeded_at")?.map(time).transpose()?,
        };
        standings.insert(row.try_get("instance_id")?, standing);
        Ok(())
    })
    .await?;
    Ok(standings)
}

/// The tasks with these ids; one without a record is left out.
pub(super) async fn tasks(conn: &mut AnyConnection, ids: &[TaskId]) -> Result<BTreeMap<TaskId, Task>, StoreError> {
    let sql = |values: usize| format!("SELECT {TASK_COLUMNS} FROM tasks WHERE id IN ({})", placeholders(1..values + 1));
    let mut tasks = BTreeMap::new();
    each_row(conn, ids, sql, |row| {
        let task = task_of(row)?;
        tasks.insert(task.id, task);
        Ok(())
    })
    .await?;
    Ok(tasks)
}

/// Memory and backlog as the newest checkpoint of a task has them: sums over its shards.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LastSeen {
    /// `used_memory` in bytes of all masters together, as last seen; `None`: unknown.
    pub used_memory: Option<u64>,
    /// Expired keys in memory as a keep run estimates them; `None` for a sweep.
    pub backlog: Option<u64>,
}

/// Memory and backlog of each of these tasks; one without shards is left out.
pub(super) async fn last_seen(
    conn: &mut AnyConnection,
    ids: &[TaskId],
) -> Result<BTreeMap<TaskId, LastSeen>, StoreError> {
    let sql = |values: usize| {
        format!("SELECT task_id, report FROM shards WHERE task_id IN ({})", placeholders(1..values + 1))
    };
    let mut last_seen: BTreeMap<TaskId, LastSeen> = BTreeMap::new();
    each_row(conn, ids, sql, |row| {
        let text: Option<String> = row.try_get("report")?;
        let shard = text.as_deref().map(report::last_seen).unwrap_or_default();
        let sum = last_seen.entry(task_id(row.try_get("task_id")?)?).or_default();
        let add = |sum: &mut Option<u64>, part: Option<u64>| *sum = part.map(|part| sum.unwrap_or(0) + part).or(*sum);
        add(&mut sum.used_memory, shard.used_memory);
        add(&mut sum.backlog, shard.backlog);
        Ok(())
    })
    .await?;
    Ok(last_seen)
}

/// Hands each row that a query finds for these values to `take`. `sql` makes the statement for a number of values, of which each is a
/// parameter; many values take several statements.
async fn each_row(
    conn: &mut AnyConnection,
    values: &[impl ToString],
    sql: impl Fn(usize) -> String,
    mut take: impl FnMut(&AnyRow) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    for some in values.chunks(AT_ONCE) {
        let mut query = sqlx::query(AssertSqlSafe(sql(some.len())));
        for value in some {
            query = query.bind(value.to_string());
        }
        for row in query.fetch_all(&mut *conn).await? {
            take(&row)?;
        }
    }
    Ok(())
}
