//! Lists of tasks: the contract's history, our own list with its filters, and what has been kept long enough.

use jiff::Timestamp;
use sqlx::{Connection, QueryBuilder, Row, Sqlite, SqliteConnection, SqlitePool};

use crate::model::task::{Cause, Task, TaskId, TaskState};
use crate::store::StoreError;
use crate::store::rows::{TASK_COLUMNS, number, signed, task_of};

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

impl TaskFilter {
    fn push_to(&self, query: &mut QueryBuilder<Sqlite>) {
        query.push(" WHERE TRUE");
        if let Some(projects) = &self.projects {
            query.push(" AND project_id IN (");
            let mut list = query.separated(", ");
            for project in projects {
                list.push_bind(project.clone());
            }
            query.push(")");
        }
        if let Some(instance) = &self.instance_id {
            query.push(" AND instance_id = ").push_bind(instance.clone());
        }
        if !self.states.is_empty() {
            query.push(" AND state IN (");
            let mut list = query.separated(", ");
            for state in &self.states {
                list.push_bind(state.as_str());
            }
            query.push(")");
        }
        if let Some(cause) = self.cause {
            query.push(" AND cause = ").push_bind(cause.as_str());
        }
        if let Some(before) = self.before {
            query.push(" AND id < ").push_bind(before.to_string());
        }
    }
}

pub(super) async fn page(
    conn: &mut SqliteConnection,
    filter: &TaskFilter,
    offset: u32,
    limit: u32,
) -> Result<TaskPage, StoreError> {
    // One transaction, so that the sums and the page show the same moment.
    let mut tx = conn.begin().await?;
    let mut sums = QueryBuilder::new("SELECT COUNT(*) AS tasks, COALESCE(SUM(num), 0) AS keys FROM tasks");
    filter.push_to(&mut sums);
    let sums = sums.build().fetch_one(&mut *tx).await?;
    let mut query = QueryBuilder::new(format!("SELECT {TASK_COLUMNS} FROM tasks"));
    filter.push_to(&mut query);
    query.push(" ORDER BY id DESC LIMIT ").push_bind(limit).push(" OFFSET ").push_bind(offset);
    let rows = query.build().fetch_all(&mut *tx).await?;
    tx.commit().await?;
    Ok(TaskPage {
        tasks: rows.iter().map(task_of).collect::<Result<_, _>>()?,
        count: number(&sums, "tasks")?,
        total: number(&sums, "keys")?,
    })
}

/// Removes ended tasks: those that ended before `before`, and the oldest beyond `keep`. Returns which.
///
/// The newest ended task of each instance and the newest that succeeded stay, whatever their age and number: they are the answer
/// to "when did it run last, and how did that end" and "when did it last succeed", and a busy instance must not take them away
/// from a quiet one.
pub(super) async fn prune(pool: &SqlitePool, before: Timestamp, keep: u32) -> Result<Vec<TaskId>, StoreError> {
    let rows = sqlx::query(
        "DELETE FROM tasks WHERE id IN (SELECT id FROM tasks AS one WHERE finished_at IS NOT NULL AND (finished_at < ? \
         OR id IN (SELECT id FROM tasks WHERE finished_at IS NOT NULL ORDER BY id DESC LIMIT -1 OFFSET ?)) \
         AND EXISTS (SELECT 1 FROM tasks AS newer WHERE newer.instance_id = one.instance_id AND newer.id > one.id \
         AND newer.finished_at IS NOT NULL) AND (state <> ? OR EXISTS (SELECT 1 FROM tasks AS newer \
         WHERE newer.instance_id = one.instance_id AND newer.id > one.id AND newer.state = one.state)) \
         ORDER BY id LIMIT ?) RETURNING id",
    )
    .bind(before.as_millisecond())
    .bind(signed(u64::from(keep)))
    .bind(TaskState::Succeeded.as_str())
    .bind(PRUNE_AT_ONCE)
    .fetch_all(pool)
    .await?;
    let ids = rows.iter().map(|row| {
        let id: String = row.try_get("id")?;
        id.parse().map(TaskId).map_err(|_| StoreError::Damaged(format!("`{id}` is not a task id")))
    });
    ids.collect()
}
