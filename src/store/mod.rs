//! Records that outlive the process: tasks with their checkpoints, schedules and bounds, in one SQLite file or in a PostgreSQL database
//! that several daemons share.
//!
//! Callers see no SQL, and no difference between the two but [`Store::fleet`], which only a shared database has. Each statement is written
//! once, in SQL that both databases take. Only `tasks` changes the state of a task; the scheduler writes due positions; every module may
//! read. A checkpoint is one transaction, so a reader never sees half of one, even if the writer is killed. What was reclaimed since the
//! last checkpoint is in the [`journal`].

mod copy;
mod file;
mod fleet;
mod forecasts;
pub mod journal;
mod keeps;
mod lists;
mod open;
mod overview;
mod report;
mod rows;
mod schedules;
pub mod undo;

pub use copy::Amount;
pub use file::Foreign;
pub use fleet::{Claim, DaemonId, DaemonRecord, Ears, Fleet, GivenOrder, PresentDaemon, Wake};
pub use keeps::Keeps;
pub use lists::{TaskFilter, TaskPage};
pub use open::Clock;
use open::SHARED_WITHIN;
pub use overview::{LastSeen, Standing};
pub use schedules::{DueOutcome, DuePosition, ScheduleState};

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use sqlx::{AnyConnection, AnyPool, Connection};

use crate::model::bounds::Bounds;
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::ShardView;
use crate::model::schedule::AutoScan;
use crate::model::shard::{DbIndex, ScanPosition, ShardId};
use crate::model::task::{Task, TaskId, TaskState};
use crate::settings::store::PostgresUrl;
use crate::store::journal::JournalDir;

/// An error of the records.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be opened.
    #[error("cannot open the state file {path}: {source}")]
    Open {
        /// Path of the state file.
        path: PathBuf,
        /// Error of the file system, of SQLite or of a migration.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The file belongs to another program, or is no database.
    #[error("cannot open the state file {path}: {why}")]
    NotOurs {
        /// Path of the file, which was not changed.
        path: PathBuf,
        /// What was found at the path.
        why: Foreign,
    },
    /// Another process uses the file: both would resume the same unfinished tasks, and count into the same records.
    #[error(
        "another ttlsweep uses the records in {0}: wait for its end, or name another file (--state FILE, or [store] path for a \
         daemon)"
    )]
    InUse(PathBuf),
    /// The shared database cannot be opened.
    #[error("cannot open the records in {url}: {source}")]
    Connect {
        /// URL of the database, without a password.
        url: String,
        /// Error of the connection or of a migration.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A statement failed: the disk is full, the file was removed, the database cannot be reached.
    #[error("cannot read or write the records: {0}")]
    Sql(#[from] sqlx::Error),
    /// The shared database did not answer in time.
    #[error("the records did not answer within {0:?}")]
    Silent(Duration),
    /// Another daemon owns the task by now: nothing was written.
    #[error("the task {0} was taken over by another daemon")]
    Fenced(TaskId),
    /// The due time was recorded before.
    #[error("another daemon has handled this due time")]
    AlreadyHandled,
    /// The instance has a task that has not ended.
    #[error("the instance {0} has a task that has not ended")]
    Unfinished(String),
    /// A record holds a value that this program never writes.
    #[error("a record is damaged: {0}")]
    Damaged(String),
    /// The batch journal cannot be written.
    #[error("cannot write the batch journal: {0}")]
    Journal(#[from] std::io::Error),
}

impl StoreError {
    /// What the user can do about the error.
    pub fn hint(&self) -> Option<&'static str> {
        file::hint(self)
    }

    /// The error as the failure of a task, with its hint.
    pub fn to_failure(&self) -> Failure {
        let failure = Failure::new(FailureKind::Store, self.to_string());
        match self.hint() {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

/// A shard as it was stored.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StoredShard {
    /// The shard as of its last checkpoint, brought forward by the batch journal.
    pub view: ShardView,
    /// The DBs in whose pass the process was killed and whose batch journal is missing or damaged: what they reclaimed since the
    /// checkpoint is not counted.
    pub uncounted: Vec<DbIndex>,
}

/// The records in a file, in a shared database, or in memory. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Store {
    pool: AnyPool,
    clock: Clock,
    journals: Option<JournalDir>,
    /// URL of the shared database; `None`: only this process uses the records.
    shared: Option<Arc<PostgresUrl>>,
    /// The lock file, which keeps other processes out while it is open.
    _lock: Option<Arc<File>>,
}

impl Store {
    /// Runs `work` with one connection. A connection on which a statement failed is not used again: its transaction may still be open,
    /// and the next one would then be nested in it, with a commit that writes nothing.
    async fn run<T>(
        &self,
        work: impl AsyncFnOnce(&mut AnyConnection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut conn = self.pool.acquire().await?;
        let done = match self.shared {
            None => work(&mut conn).await,
            Some(_) => {
                let done = tokio::time::timeout(SHARED_WITHIN, work(&mut conn)).await;
                done.unwrap_or(Err(StoreError::Silent(SHARED_WITHIN)))
            }
        };
        // Records in memory (which have no journal) live in their only connection: it must stay open.
        if self.journals.is_some() && matches!(done, Err(StoreError::Sql(_) | StoreError::Silent(_))) {
            conn.close_on_drop();
        }
        done
    }

    /// Runs `work` as [`Self::run`] does, in one transaction: everything is written, or nothing.
    async fn transact<T>(
        &self,
        work: impl AsyncFnOnce(&mut AnyConnection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.run(async |conn| {
            let mut tx = conn.begin().await?;
            let done = work(&mut tx).await?;
            tx.commit().await?;
            Ok(done)
        })
        .await
    }

    /// The folder of the batch journals; `None` for records in memory.
    pub fn journals(&self) -> Option<&JournalDir> {
        self.journals.as_ref()
    }

    /// The operations for daemons that share a database; `None` if only this process uses the records.
    pub fn fleet(&self) -> Option<Fleet> {
        self.shared.is_some().then(|| Fleet(self.clone()))
    }

    /// The current time: the database's where daemons share one, so that all of them agree on what is due.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// The clock behind [`Self::now`], for modules without the store.
    pub fn clock(&self) -> Clock {
        self.clock.clone()
    }

    /// Adds a task. The due time of a scheduled one is recorded in the same transaction, so that a crash neither loses nor repeats it.
    ///
    /// # Errors
    /// With a shared database [`StoreError::AlreadyHandled`] and [`StoreError::Unfinished`], if another daemon was first;
    /// [`StoreError::Sql`]. No task is added then.
    pub async fn insert(&self, task: &Task, due: Option<DueOutcome<'_>>) -> Result<(), StoreError> {
        self.transact(async |conn| {
            if let Some(due) = due
                && !schedules::record_due(&mut *conn, &task.instance_id, due, Some(task.id)).await?
            {
                return Err(StoreError::AlreadyHandled);
            }
            if !rows::insert_task(&mut *conn, task).await? {
                return Err(StoreError::Unfinished(task.instance_id.clone()));
            }
            if self.shared.is_some() {
                fleet::notify(conn, fleet::TASKS).await?;
            }
            Ok(())
        })
        .await
    }

    /// The automatic scans that the API set, and the due positions of all instances.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn schedules(&self) -> Result<ScheduleState, StoreError> {
        self.run(schedules::all).await
    }

    /// The due positions after an instant, by instance: other daemons may have moved them.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn due_positions_after(&self, after: Timestamp) -> Result<Vec<(String, DuePosition)>, StoreError> {
        self.run(async |conn| schedules::due_positions_after(conn, after).await).await
    }

    /// Sets the due positions of instances, also to an earlier instant.
    ///
    /// # Errors
    /// [`StoreError::Sql`]; then none of them was set.
    pub async fn set_due_positions(&self, positions: &[(&str, &DuePosition)]) -> Result<(), StoreError> {
        if positions.is_empty() {
            return Ok(());
        }
        self.transact(async |conn| schedules::set_due_positions(conn, positions).await).await
    }

    /// Records due times as skipped. Returns those that were not recorded before.
    ///
    /// # Errors
    /// [`StoreError::Sql`].
    pub async fn skip<'a>(
        &self,
        instance_id: &str,
        outcomes: &[DueOutcome<'a>],
    ) -> Result<Vec<DueOutcome<'a>>, StoreError> {
        self.transact(async |conn| {
            let mut new = Vec::new();
            for due in outcomes {
                if schedules::record_due(&mut *conn, instance_id, *due, None).await? {
                    new.push(*due);
                }
            }
            Ok(new)
        })
        .await
    }

    /// Removes the due positions of all other instances; one that comes back later counts its due times from then on. With a shared
    /// database nothing is removed: another daemon may have more instances in its settings.
    ///
    /// # Errors
    /// [`StoreError::Sql`].
    pub async fn forget_due_positions_except(&self, instance_ids: &[&str]) -> Result<(), StoreError> {
        if self.shared.is_some() {
            return Ok(());
        }
        self.run(async |conn| schedules::forget_due_positions_except(conn, instance_ids).await).await
    }

    /// The automatic scan that the API set for an instance of a project.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn auto_scan(&self, instance_id: &str, project_id: &str) -> Result<Option<AutoScan>, StoreError> {
        self.run(async |conn| schedules::auto_scan(conn, instance_id, project_id).await).await
    }

    /// Sets the automatic scan of an instance, or removes it (`None`). Its due times count from `now` on.
    ///
    /// # Errors
    /// [`StoreError::Sql`].
    pub async fn set_auto_scan(
        &self,
        instance_id: &str,
        project_id: &str,
        config: Option<&AutoScan>,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        self.transact(async |conn| {
            match config {
                Some(config) => schedules::set_auto_scan(&mut *conn, instance_id, project_id, config).await?,
                None => schedules::forget_auto_scan(&mut *conn, instance_id).await?,
            }
            schedules::set_due_positions(&mut *conn, &[(instance_id, &DuePosition { handled: now, schedule: None })])
                .await?;
            if self.shared.is_some() {
                fleet::notify(conn, fleet::SCHEDULES).await?;
            }
            Ok(())
        })
        .await
    }

    /// The bounds that the API set, of all instances.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn keeps(&self) -> Result<Keeps, StoreError> {
        self.run(keeps::all).await
    }

    /// Sets the bounds of an instance, or removes what was set (`None`). Bounds that are all off mean that it is not kept.
    ///
    /// # Errors
    /// [`StoreError::Sql`].
    pub async fn set_keep(
        &self,
        instance_id: &str,
        project_id: &str,
        bounds: Option<Bounds>,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        self.transact(async |conn| {
            match bounds {
                Some(bounds) => keeps::set(&mut *conn, instance_id, project_id, bounds, now).await?,
                None => keeps::forget(&mut *conn, instance_id).await?,
            }
            if self.shared.is_some() {
                fleet::notify(conn, fleet::SCHEDULES).await?;
            }
            Ok(())
        })
        .await
    }

    /// The last forecast of an instance, as the JSON of the API.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn forecast(&self, instance_id: &str, project_id: &str) -> Result<Option<String>, StoreError> {
        self.run(async |conn| forecasts::get(conn, instance_id, project_id).await).await
    }

    /// Replaces the last forecast of an instance.
    ///
    /// # Errors
    /// [`StoreError::Sql`].
    pub async fn set_forecast(&self, instance_id: &str, project_id: &str, forecast: &str) -> Result<(), StoreError> {
        let now = self.now();
        self.run(async |conn| forecasts::set(conn, instance_id, project_id, forecast, now).await).await
    }

    /// The ids of the instances whose last forecast was made after an instant.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn forecasts_after(&self, after: Timestamp) -> Result<BTreeSet<String>, StoreError> {
        self.run(async |conn| forecasts::made_after(conn, after).await).await
    }

    /// One page of the tasks that match, newest first, with their number and the keys that they reclaimed, on all pages.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn page(&self, filter: &TaskFilter, offset: u32, limit: u32) -> Result<TaskPage, StoreError> {
        self.run(async |conn| lists::page(conn, filter, offset, limit).await).await
    }

    /// When the last successful task of each instance ended.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn last_successes(&self) -> Result<BTreeMap<String, Timestamp>, StoreError> {
        self.run(lists::last_successes).await
    }

    /// Removes some of the ended tasks that are no longer kept: those that ended before `before`, and those beyond the `keep`
    /// newest. The newest one of each instance always stays. Returns how many were removed; unless 0, there may be more.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn prune(&self, before: Timestamp, keep: u32) -> Result<usize, StoreError> {
        let gone = self.run(async |conn| lists::prune(conn, before, keep).await).await?;
        if let Some(journals) = &self.journals {
            gone.iter().for_each(|id| journals.forget(*id));
        }
        Ok(gone.len())
    }

    /// Checks that the records can be read now.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn ping(&self) -> Result<(), StoreError> {
        self.run(async |conn| {
            sqlx::query("SELECT 1").execute(conn).await?;
            Ok(())
        })
        .await
    }

    /// Writes the task's state, times, count and failure.
    ///
    /// # Errors
    /// [`StoreError::Fenced`], [`StoreError::Sql`].
    pub async fn update(&self, task: &Task) -> Result<(), StoreError> {
        self.run(async |conn| rows::update_task(conn, task).await).await
    }

    /// The task with this id.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn task(&self, id: TaskId) -> Result<Option<Task>, StoreError> {
        self.run(async |conn| rows::task(conn, id).await).await
    }

    /// The newest task of an instance, by time of creation.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn latest(&self, instance_id: &str) -> Result<Option<Task>, StoreError> {
        self.run(async |conn| rows::latest(conn, instance_id).await).await
    }

    /// Every task that is not in a final state.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn unfinished(&self) -> Result<Vec<Task>, StoreError> {
        let words: Vec<&str> = TaskState::ALL.iter().filter(|s| !s.is_final()).map(|s| s.as_str()).collect();
        self.run(async |conn| rows::in_states(conn, &words).await).await
    }

    /// Writes the task with the positions and counts of these shards, in one transaction.
    ///
    /// # Errors
    /// [`StoreError::Fenced`], [`StoreError::Sql`]; nothing is written then.
    pub async fn checkpoint(
        &self,
        task: &Task,
        shards: impl Iterator<Item = (&ShardId, &Arc<ShardView>)>,
    ) -> Result<(), StoreError> {
        let shards: Vec<_> = shards.collect();
        self.transact(async |conn| {
            rows::update_task(&mut *conn, task).await?;
            for (shard, view) in &shards {
                rows::upsert_shard(&mut *conn, task.id, shard, view).await?;
                for (db, figures) in &view.passes {
                    rows::upsert_pass(&mut *conn, task.id, shard, *db, figures).await?;
                }
            }
            if task.state.is_final() && self.shared.is_some() {
                fleet::notify(conn, fleet::TASKS).await?;
            }
            Ok(())
        })
        .await
    }

    /// The shards of a task as of its last checkpoint, brought forward by the batch journal where that is newer. If the record still says
    /// running, the process was killed: the batches that were under way then are counted as lost replies.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn shards(&self, id: TaskId) -> Result<BTreeMap<ShardId, StoredShard>, StoreError> {
        let stored = self.shards_of(&[id]).await?.remove(&id).unwrap_or_default();
        let stored = stored.into_iter().map(|(shard, view)| (shard, StoredShard { view, uncounted: Vec::new() }));
        let mut shards: BTreeMap<ShardId, StoredShard> = stored.collect();
        if let Some(journals) = &self.journals {
            // A process that was killed before its first checkpoint has only the journal.
            for shard in journals.shards(id) {
                shards.entry(shard).or_default();
            }
            let killed = self.task(id).await?.is_some_and(|task| task.state == TaskState::Running);
            for (shard, stored) in &mut shards {
                let lines = journals.read(id, shard);
                for &db in lines.keys() {
                    stored.view.passes.entry(db).or_default();
                }
                for (db, pass) in &mut stored.view.passes {
                    let counted = pass.counters.batches;
                    let line = lines.get(db);
                    let fits = line.is_some_and(|line| line.is_some_and(|line| line.bring_forward(pass)));
                    if killed && pass.checkpoint.position != ScanPosition::Finished {
                        pass.counters.lost_replies += pass.gauges.under_way;
                        if !fits && (counted > 0 || line.is_some()) {
                            pass.counters.lost_replies += 1;
                            stored.uncounted.push(*db);
                        }
                    }
                }
            }
        }
        Ok(shards)
    }

    /// The shards of each of these tasks as of its last checkpoint, without the batch journal. A task without shards is left out.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn shards_of(
        &self,
        ids: &[TaskId],
    ) -> Result<BTreeMap<TaskId, BTreeMap<ShardId, ShardView>>, StoreError> {
        if ids.is_empty() {
            return Ok(BTreeMap::new());
        }
        self.run(async |conn| rows::shards(conn, ids).await).await
    }

    /// The newest task and the last success of each of these instances. One without a task is left out.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn standings(&self, instances: &[&str]) -> Result<BTreeMap<String, Standing>, StoreError> {
        self.run(async |conn| overview::standings(conn, instances).await).await
    }

    /// The tasks with these ids. One without a record is left out.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn tasks(&self, ids: &[TaskId]) -> Result<BTreeMap<TaskId, Task>, StoreError> {
        self.run(async |conn| overview::tasks(conn, ids).await).await
    }

    /// Memory and backlog of each of these tasks, as last seen. A task without shards is left out.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn last_seen(&self, ids: &[TaskId]) -> Result<BTreeMap<TaskId, LastSeen>, StoreError> {
        self.run(async |conn| overview::last_seen(conn, ids).await).await
    }

    /// Closes the connections. Dropping the store instead damages nothing.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}
