//! Copies records from one store to another: from the file of one daemon to a database that several share, or back.

use std::sync::Arc;

use jiff::Timestamp;
use sqlx::{AnyConnection, Row};

use crate::model::task::{Command, Task, TaskId, TaskState, transition};
use crate::store::keeps;
use crate::store::rows::{number, task_id, time};
use crate::store::schedules::{self, DueOutcome};
use crate::store::{Store, StoreError, TaskFilter};

/// Tasks, or due times, of one page.
const AT_ONCE: u32 = 200;

/// How many records a store holds, to compare both ends of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Amount {
    /// Number of tasks, ended ones included.
    pub tasks: u64,
    /// Expired keys that these tasks reclaimed.
    pub keys: u64,
    /// Number of automatic scans that the API set.
    pub auto_scans: u64,
    /// Number of due times that were run or skipped.
    pub due_times: u64,
}

impl Store {
    /// How many records the store holds.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn amount(&self) -> Result<Amount, StoreError> {
        let count = async |conn: &mut AnyConnection, sql: &'static str| {
            number(&sqlx::query(sql).fetch_one(conn).await?, "number")
        };
        self.transact(async |conn| {
            Ok(Amount {
                tasks: count(&mut *conn, "SELECT COUNT(*) AS number FROM tasks").await?,
                keys: count(&mut *conn, "SELECT CAST(COALESCE(SUM(num), 0) AS BIGINT) AS number FROM tasks").await?,
                auto_scans: count(&mut *conn, "SELECT COUNT(*) AS number FROM auto_scans").await?,
                due_times: count(conn, "SELECT COUNT(*) AS number FROM due_times").await?,
            })
        })
        .await
    }

    /// Copies everything but forecasts into another store. Tasks that are there already are updated, so an interrupted copy can be run
    /// again. No other process may use either store meanwhile. A task whose process was killed is copied as interrupted, with the counts
    /// of its batch journal. Calls `copied` after each task.
    ///
    /// # Errors
    /// [`StoreError`]; each record that was copied until then is complete.
    pub async fn copy_to(&self, other: &Self, mut copied: impl FnMut()) -> Result<(), StoreError> {
        let mut offset = 0;
        loop {
            let page = self.page(&TaskFilter::default(), offset, AT_ONCE).await?;
            if page.tasks.is_empty() {
                break;
            }
            for task in page.tasks {
                self.copy_task(other, task).await?;
                copied();
            }
            offset += AT_ONCE;
        }
        self.copy_schedules(other).await
    }

    async fn copy_task(&self, other: &Self, task: Task) -> Result<(), StoreError> {
        let shards = self.shards(task.id).await?;
        let mut task = Task { owner: None, ..task };
        if task.state == TaskState::Running
            && let Ok(state) = transition(task.state, Command::Interrupt)
        {
            task.state = state;
            task.num = shards.values().flat_map(|shard| shard.view.passes.values()).map(|pass| pass.reclaimed).sum();
        }
        if other.task(task.id).await?.is_none() {
            other.insert(&task, None).await?;
        }
        let shards: Vec<_> = shards.into_iter().map(|(id, shard)| (id, Arc::new(shard.view))).collect();
        other.checkpoint(&task, shards.iter().map(|(id, view)| (id, view))).await
    }

    async fn copy_schedules(&self, other: &Self) -> Result<(), StoreError> {
        let (schedules, kept, now) = (self.schedules().await?, self.keeps().await?, self.now());
        let mut offset = 0;
        loop {
            let due_times = self.run(async |conn| due_times(conn, offset).await).await?;
            if due_times.is_empty() {
                break;
            }
            other
                .transact(async |conn| {
                    for (instance, at, outcome, task) in &due_times {
                        schedules::record_due(&mut *conn, instance, DueOutcome { at: *at, outcome }, *task).await?;
                    }
                    Ok(())
                })
                .await?;
            offset += AT_ONCE;
        }
        // After the due times: recording one moves the due position.
        other
            .transact(async |conn| {
                for (instance, project, config) in schedules.auto_scans() {
                    schedules::set_auto_scan(&mut *conn, instance, project, config).await?;
                }
                for (instance, project, bounds) in kept.iter() {
                    keeps::set(&mut *conn, instance, project, bounds, now).await?;
                }
                schedules::set_due_positions(conn, &schedules.positions().collect::<Vec<_>>()).await
            })
            .await
    }
}

/// A row of `due_times`: instance, due time, outcome, task.
type DueTime = (String, Timestamp, String, Option<TaskId>);

async fn due_times(conn: &mut AnyConnection, offset: u32) -> Result<Vec<DueTime>, StoreError> {
    let sql = "SELECT instance_id, due, outcome, task_id FROM due_times ORDER BY instance_id, due LIMIT $1 OFFSET $2";
    let rows = sqlx::query(sql).bind(i64::from(AT_ONCE)).bind(i64::from(offset)).fetch_all(conn).await?;
    let of_row = |row| {
        let task: Option<String> = Row::try_get(row, "task_id")?;
        let task = task.map(task_id).transpose()?;
        Ok((Row::try_get(row, "instance_id")?, time(Row::try_get(row, "due")?)?, Row::try_get(row, "outcome")?, task))
    };
    rows.iter().map(of_row).collect()
}
