//! Lists of tasks for the API, and the removal of tasks that are no longer kept.

use std::collections::BTreeMap;

use jiff::Timestamp;
use sqlx::any::AnyArguments;
use sqlx::query::Query;
use sqlx::{Any, AnyConnection, AssertSqlSafe, Connection, Row};

use crate::model::task::{Cause, Task, TaskId, TaskState};
use crate::store::StoreError;
use crate::store::rows::{TASK_COLUMNS, number, placeholders, task_id, task_of, time};

/// Most tasks that one call of [`prune`] removes, so that other writers do not wait long.
const PRUNE_AT_ONCE: u32 = 500;

/// Which tasks to list. `None` and an empty list of states match every task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TaskFilter {
    /// Only tasks of these projects; an empty list matches none.
    pub projects: Option<Vec<String>>,
    /// Only tasks of this instance.
    pub instance_id: Option<String>,
    /// Only tasks in one of these states.
    pub states: Vec<TaskState>,
    /// Only tasks with this cause.
    pub cause: Option<Cause>,
    /// Only tasks older than this one.
    pub before: Option<TaskId>,
}

/// One page of a list.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TaskPage {
    /// The tasks of this page, newest first.
    pub tasks: Vec<Task>,
    /// How many tasks match, on all pages.
    pub count: u64,
    /// Expired keys that the matching tasks reclaimed, on all pages.
    pub total: u64,
}

/// The WHERE condition of a statement, with the values of its placeholders in their order.
#[derive(Default)]
struct Condition {
    sql: String,
    values: Vec<String>,
}

impl Condition {
    fn of(filter: &TaskFilter) -> Self {
        let mut condition = Self { sql: "TRUE".to_owned(), values: Vec::new() };
        if let Some(projects) = &filter.projects {
            condition.one_of("project_id", projects.iter().map(String::as_str));
        }
        condition.one_of_any("instance_id", filter.instance_id.as_deref());
        condition.one_of_any("state", filter.states.iter().map(|state| state.as_str()));
        condition.one_of_any("cause", filter.cause.map(Cause::as_str));
        if let Some(before) = filter.before {
            condition.values.push(before.to_string());
            condition.sql.push_str(&format!(" AND id < ${}", condition.values.len()));
        }
        condition
    }

    fn one_of<'a>(&mut self, column: &str, values: impl Iterator<Item = &'a str>) {
        let from = self.values.len() + 1;
        self.values.extend(values.map(str::to_owned));
        let placeholders = placeholders(from..self.values.len() + 1);
        // An empty list matches nothing. PostgreSQL has no syntax for one; `IN (NULL)` means the same.
        let within = if placeholders.is_empty() { "NULL" } else { &placeholders };
        self.sql.push_str(&format!(" AND {column} IN ({within})"));
    }

    /// As [`Self::one_of`], but no values at all match everything.
    fn one_of_any<'a>(&mut self, column: &str, values: impl IntoIterator<Item = &'a str>) {
        let mut values = values.into_iter().peekable();
        if values.peek().is_some() {
            self.one_of(column, values);
        }
    }

    fn bound<'q>(&self, sql: String) -> Query<'q, Any, AnyArguments> {
        self.values.iter().fold(sqlx::query(AssertSqlSafe(sql)), |query, value| query.bind(value.clone()))
    }
}

pub(super) async fn page(
    conn: &mut AnyConnection,
    filter: &TaskFilter,
    offset: u32,
    limit: u32,
) -> Result<TaskPage, StoreError> {
    let condition = Condition::of(filter);
    // One transaction, so that the sums and the page show the same moment.
    let mut tx = conn.begin().await?;
    let sums = format!(
        "SELECT COUNT(*) AS tasks, CAST(COALESCE(SUM(num), 0) AS BIGINT) AS keys FROM tasks WHERE {}",
        condition.sql
    );
    let sums = condition.bound(sums).fetch_one(&mut *tx).await?;
    let query = format!(
        "SELECT {TASK_COLUMNS} FROM tasks WHERE {} ORDER BY id DESC LIMIT {limit} OFFSET {offset}",
        condition.sql
    );
    let rows = condition.bound(query).fetch_all(&mut *tx).await?;
    tx.commit().await?;
    Ok(TaskPage {
        tasks: rows.iter().map(task_of).collect::<Result<_, _>>()?,
        count: number(&sums, "tasks")?,
        total: number(&sums, "keys")?,
    })
}

/// When the last successful task of each instance ended.
pub(super) async fn last_successes(conn: &mut AnyConnection) -> Result<BTreeMap<String, Timestamp>, StoreError> {
    let query =
        sqlx::query("SELECT instance_id, MAX(finished_at) AS at FROM tasks WHERE state = $1 GROUP BY instance_id");
    let rows = query.bind(TaskState::Succeeded.as_str()).fetch_all(conn).await?;
    let of_row = |row| Ok((Row::try_get(row, "instance_id")?, time(Row::try_get(row, "at")?)?));
    rows.iter().map(of_row).collect()
}

/// Removes ended tasks: those that ended before `before`, and the oldest beyond the `keep` newest. Returns their ids.
///
/// The newest ended task of each instance and its newest that succeeded always stay: they tell when it ran last, how that ended, and
/// when it last succeeded. The many tasks of a busy instance must not displace them.
pub(super) async fn prune(conn: &mut AnyConnection, before: Timestamp, keep: u32) -> Result<Vec<TaskId>, StoreError> {
    let rows = sqlx::query(
        "DELETE FROM tasks WHERE id IN (SELECT id FROM tasks AS one WHERE finished_at IS NOT NULL AND (finished_at < $1 \
         OR id IN (SELECT id FROM tasks WHERE finished_at IS NOT NULL ORDER BY id DESC LIMIT $2 OFFSET $3)) \
         AND EXISTS (SELECT 1 FROM tasks AS newer WHERE newer.instance_id = one.instance_id AND newer.id > one.id \
         AND newer.finished_at IS NOT NULL) AND (state <> $4 OR EXISTS (SELECT 1 FROM tasks AS newer \
         WHERE newer.instance_id = one.instance_id AND newer.id > one.id AND newer.state = one.state)) \
         ORDER BY id LIMIT $5) RETURNING id",
    )
    .bind(before.as_millisecond())
    .bind(i64::MAX)
    .bind(i64::from(keep))
    .bind(TaskState::Succeeded.as_str())
    .bind(i64::from(PRUNE_AT_ONCE))
    .fetch_all(&mut *conn)
    .await?;
    sqlx::query("DELETE FROM due_times WHERE due < $1").bind(before.as_millisecond()).execute(conn).await?;
    rows.iter().map(|row| task_id(row.try_get("id")?)).collect()
}
