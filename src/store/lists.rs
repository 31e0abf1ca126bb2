//! Lists of tasks: the contract's history, our own list with its filters, and what has been kept long enough.

use std::collections::BTreeMap;

use jiff::Timestamp;
use sqlx::any::AnyArguments;
use sqlx::query::Query;
use sqlx::{Any, AnyConnection, AssertSqlSafe, Connection, Row};

use crate::model::task::{Cause, Task, TaskId, TaskState};
use crate::store::StoreError;
use crate::store::rows::{TASK_COLUMNS, marks, number, task_id, task_of, time};

/// Ended tasks that one round of [`prune`] removes at most, so that no writer waits long behind it.
const PRUNE_AT_ONCE: u32 = 500;

/// Which tasks somebody wants to see. Empty lists and `None` let everything through.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TaskFilter {
    /// Of these projects; `None`: of all.
    pub projects: Option<Vec<String>>,
    /// Of this instance.
    pub instance_id: Option<String>,
    /// In one of these states.
    pub states: Vec<TaskState>,
    /// Asked for by this.
    pub cause: Option<Cause>,
    /// Older than this task.
    pub before: Option<TaskId>,
}

/// One page of a list.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TaskPage {
    /// The tasks, newest first.
    pub tasks: Vec<Task>,
    /// How many tasks match, on all pages.
    pub count: u64,
    /// The sum of their `num`.
    pub total: u64,
}

/// The condition of a statement, with the values of its placeholders in their order.
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
        let marks = marks(from..self.values.len() + 1);
        // An empty list lets nothing through; PostgreSQL has no way to write one.
        let within = if marks.is_empty() { "NULL" } else { &marks };
        self.sql.push_str(&format!(" AND {column} IN ({within})"));
    }

    /// As [`Self::one_of`], where no value at all lets everything through.
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

/// When each instance was last swept completely.
pub(super) async fn last_successes(conn: &mut AnyConnection) -> Result<BTreeMap<String, Timestamp>, StoreError> {
    let query =
        sqlx::query("SELECT instance_id, MAX(finished_at) AS at FROM tasks WHERE state = $1 GROUP BY instance_id");
    let rows = query.bind(TaskState::Succeeded.as_str()).fetch_all(conn).await?;
    let of_row = |row| Ok((Row::try_get(row, "instance_id")?, time(Row::try_get(row, "at")?)?));
    rows.iter().map(of_row).collect()
}

/// Removes ended tasks: those that ended before `before`, and the oldest beyond `keep`. Returns which.
///
/// The newest ended task of each instance and the newest that succeeded stay, whatever their age and number: they are the answer
/// to "when did it run last, and how did that end" and "when did it last succeed", and a busy instance must not take them away
/// from a quiet one.
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
