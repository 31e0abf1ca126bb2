//! Records that outlive the process: tasks with their checkpoints, in one SQLite file or in a PostgreSQL database that several daemons
//! share.
//!
//! Callers see no SQL and no difference between the two but [`Store::fleet`], which only shared records have. Statements are written
//! once, in what both databases take. `tasks` alone changes the state of a task here; the scheduler keeps its due times, and lists are read from everywhere. A checkpoint is one transaction, so a reader never sees half of one, whatever killed the
//! writer. What the last second before a kill freed is in the [`journal`].

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
pub use overview::{Glance, Standing};
pub use schedules::{Due, Mark, Schedules};

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use sqlx::{AnyConnection, AnyPool, Connection};

use crate::model::failure::{Failure, FailureKind};
use crate::model::keep::Bounds;
use crate::model::progress::ShardView;
use crate::model::schedule::AutoScan;
use crate::model::shard::{DbIndex, ScanPosition, ShardId};
use crate::model::task::{Task, TaskId, TaskState};
use crate::settings::store::PostgresUrl;
use crate::store::journal::JournalDir;

/// Trouble with the records.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be opened or is no store.
    #[error("cannot open the state file {path}: {source}")]
    Open {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The file is another program's, or no database at all.
    #[error("cannot open the state file {path}: {why}")]
    NotOurs {
        /// Which file.
        path: PathBuf,
        /// What it is.
        why: Foreign,
    },
    /// Another process has it open: both would take up the same unfinished tasks, and count into the same records.
    #[error(
        "another ttlsweep uses the records in {0}: wait for its end, or name another file (--state FILE, or [store] path of a \
         daemon)"
    )]
    InUse(PathBuf),
    /// The database of several daemons cannot be used.
    #[error("cannot open the records in {url}: {source}")]
    Connect {
        /// Which one, without a password.
        url: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A statement failed: a full disk, a file that was taken away, a database that is away.
    #[error("cannot read or write the records: {0}")]
    Sql(#[from] sqlx::Error),
    /// The database did not answer in time.
    #[error("the records did not answer within {0:?}")]
    Silent(Duration),
    /// Another owner has the task by now: what was to be written is void.
    #[error("the task {0} was taken over by another daemon")]
    Fenced(TaskId),
    /// Another daemon has dealt with this due time.
    #[error("another daemon has dealt with this due time")]
    DealtWith,
    /// The instance has a task that has not ended.
    #[error("the instance {0} has a task that has not ended")]
    Unfinished(String),
    /// A record holds what we never wrote.
    #[error("a record is damaged: {0}")]
    Damaged(String),
    /// The batch journal cannot be written.
    #[error("cannot write the batch journal: {0}")]
    Journal(#[from] std::io::Error),
}

impl StoreError {
    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        file::hint(self)
    }

    /// The failure that an operator reads.
    pub fn to_failure(&self) -> Failure {
        let failure = Failure::new(FailureKind::Store, self.to_string());
        match self.hint() {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

/// What is stored of one shard.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StoredShard {
    /// The shard as its task showed it last.
    pub view: ShardView,
    /// The process was killed in the middle of these passes, and the batch journal does not tell what they had counted then.
    pub uncounted: Vec<DbIndex>,
}

/// The records of one file, of one database, or of this process only. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Store {
    pool: AnyPool,
    clock: Clock,
    journals: Option<JournalDir>,
    /// The database that other daemons use too.
    shared: Option<Arc<PostgresUrl>>,
    /// Keeps other processes away for as long as this is held.
    _lock: Option<Arc<File>>,
}

impl Store {
    /// Does something with one connection. One on which something failed is not used again: what could not be written could perhaps not
    /// be rolled back either, and the next transaction would be one inside that one, whose commit writes nothing.
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
        // Records in memory have no journal, and are in their one connection.
        if self.journals.is_some() && matches!(done, Err(StoreError::Sql(_) | StoreError::Silent(_))) {
            conn.close_on_drop();
        }
        done
    }

    /// As [`Self::run`], in one transaction: all of it is written, or nothing.
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

    /// Where per-batch counts go, if the records outlive the process.
    pub fn journals(&self) -> Option<&JournalDir> {
        self.journals.as_ref()
    }

    /// What daemons that share the records need of them; `None` where there is one process only.
    pub fn fleet(&self) -> Option<Fleet> {
        self.shared.is_some().then(|| Fleet(self.clone()))
    }

    /// The time that decides what is due: the database's, where several daemons share it.
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// The clock of [`Self::now`].
    pub fn clock(&self) -> Clock {
        self.clock.clone()
    }

    /// Adds a task. Where a schedule caused it, its due time is marked as dealt with in the same transaction: both or neither, so
    /// that a crash neither loses nor doubles it.
    ///
    /// # Errors
    /// [`StoreError::DealtWith`], [`StoreError::Unfinished`] where the records are shared and another daemon was quicker;
    /// [`StoreError::Sql`]. There is no task then.
    pub async fn insert(&self, task: &Task, due: Option<Due<'_>>) -> Result<(), StoreError> {
        self.transact(async |conn| {
            if let Some(due) = due
                && !schedules::deal_with(&mut *conn, &task.instance_id, due, Some(task.id)).await?
            {
                return Err(StoreError::DealtWith);
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

    /// What the records hold of the schedules of all instances.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn schedules(&self) -> Result<Schedules, StoreError> {
        self.run(schedules::all).await
    }

    /// The marks that lie after an instant, by instance: what other daemons have dealt with since.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn marks_after(&self, after: Timestamp) -> Result<Vec<(String, Mark)>, StoreError> {
        self.run(async |conn| schedules::marks_after(conn, after).await).await
    }

    /// Sets the marks of the due times of instances, also back.
    ///
    /// # Errors
    /// [`StoreError::Sql`]; then none of them was set.
    pub async fn set_marks(&self, marks: &[(&str, &Mark)]) -> Result<(), StoreError> {
        if marks.is_empty() {
            return Ok(());
        }
        self.transact(async |conn| schedules::set_marks(conn, marks).await).await
    }

    /// Records that due times are skipped. Returns those that nobody had dealt with yet.
    ///
    /// # Errors
    /// [`StoreError::Sql`].
    pub async fn skip<'a>(&self, instance_id: &str, dues: &[Due<'a>]) -> Result<Vec<Due<'a>>, StoreError> {
        self.transact(async |conn| {
            let mut new = Vec::new();
            for due in dues {
                if schedules::deal_with(&mut *conn, instance_id, *due, None).await? {
                    new.push(*due);
                }
            }
            Ok(new)
        })
        .await
    }

    /// Forgets the marks of all other instances: one that comes back begins anew. Of shared records nothing is forgotten: another
    /// daemon may know more instances.
    ///
    /// # Errors
    /// [`StoreError::Sql`].
    pub async fn forget_marks_but(&self, instance_ids: &[&str]) -> Result<(), StoreError> {
        if self.shared.is_some() {
            return Ok(());
        }
        self.run(async |conn| schedules::forget_marks_but(conn, instance_ids).await).await
    }

    /// The automatic scan that the API set for an instance of a project.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn auto_scan(&self, instance_id: &str, project_id: &str) -> Result<Option<AutoScan>, StoreError> {
        self.run(async |conn| schedules::auto_scan(conn, instance_id, project_id).await).await
    }

    /// Sets the automatic scan of an instance, or forgets it. Due times before `now` are none of it.
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
            schedules::set_marks(&mut *conn, &[(instance_id, &Mark { handled: now, schedule: None })]).await?;
            if self.shared.is_some() {
                fleet::notify(conn, fleet::SCHEDULES).await?;
            }
            Ok(())
        })
        .await
    }

    /// The bounds that the API set.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn keeps(&self) -> Result<Keeps, StoreError> {
        self.run(keeps::all).await
    }

    /// Sets the bounds that an instance is kept to, or forgets what was set. Without any bound it is not kept.
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

    /// The last forecast of an instance, in JSON.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn forecast(&self, instance_id: &str, project_id: &str) -> Result<Option<String>, StoreError> {
        self.run(async |conn| forecasts::get(conn, instance_id, project_id).await).await
    }

    /// Keeps a forecast as the last one of its instance.
    ///
    /// # Errors
    /// [`StoreError::Sql`].
    pub async fn set_forecast(&self, instance_id: &str, project_id: &str, forecast: &str) -> Result<(), StoreError> {
        let now = self.now();
        self.run(async |conn| forecasts::set(conn, instance_id, project_id, forecast, now).await).await
    }

    /// The instances whose last forecast was made after an instant.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn forecasts_after(&self, after: Timestamp) -> Result<BTreeSet<String>, StoreError> {
        self.run(async |conn| forecasts::made_after(conn, after).await).await
    }

    /// One page of the tasks that match, newest first, with how many there are and what they freed.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn page(&self, filter: &TaskFilter, offset: u32, limit: u32) -> Result<TaskPage, StoreError> {
        self.run(async |conn| lists::page(conn, filter, offset, limit).await).await
    }

    /// When each instance was last swept completely.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn last_successes(&self) -> Result<BTreeMap<String, Timestamp>, StoreError> {
        self.run(lists::last_successes).await
    }

    /// Removes some of the ended tasks that are kept no longer: ended before `before`, or beyond the `keep` newest. The
    /// newest one of each instance always stays. Returns how many went; more than none means that there may be others.
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

    /// Whether records can be read now.
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

    /// One task.
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

    /// Writes the task with the figures and positions of these shards, in one transaction.
    ///
    /// # Errors
    /// [`StoreError::Fenced`], [`StoreError::Sql`]; then nothing of it was written.
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

    /// The shards of a task as its last checkpoint left them, brought forward by the batch journal where that is newer. Where the
    /// record still says running, its process was killed: the batches that were under way then are lost replies.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn shards(&self, id: TaskId) -> Result<BTreeMap<ShardId, StoredShard>, StoreError> {
        let stored = self.shards_of(&[id]).await?.remove(&id).unwrap_or_default();
        let stored = stored.into_iter().map(|(shard, view)| (shard, StoredShard { view, uncounted: Vec::new() }));
        let mut shards: BTreeMap<ShardId, StoredShard> = stored.collect();
        if let Some(journals) = &self.journals {
            // A process that was killed before its first checkpoint has counted all the same.
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
                    let counted = pass.batches;
                    let line = lines.get(db);
                    let fits = line.is_some_and(|line| line.is_some_and(|line| line.bring_forward(pass)));
                    if killed && pass.position != ScanPosition::Finished {
                        pass.lost_replies += pass.under_way;
                        if !fits && (counted > 0 || line.is_some()) {
                            pass.lost_replies += 1;
                            stored.uncounted.push(*db);
                        }
                    }
                }
            }
        }
        Ok(shards)
    }

    /// The shards of each of these tasks as its last checkpoint left them, without what a batch journal holds; a task without any is
    /// left out.
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

    /// How each of these instances stands by its records; one without a task is left out.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn standings(&self, instances: &[&str]) -> Result<BTreeMap<String, Standing>, StoreError> {
        self.run(async |conn| overview::standings(conn, instances).await).await
    }

    /// These tasks, as far as there are records of them.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn tasks(&self, ids: &[TaskId]) -> Result<BTreeMap<TaskId, Task>, StoreError> {
        self.run(async |conn| overview::tasks(conn, ids).await).await
    }

    /// Memory and backlog of each of these tasks, as its shards were seen last; a task without a shard is left out.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn glances(&self, ids: &[TaskId]) -> Result<BTreeMap<TaskId, Glance>, StoreError> {
        self.run(async |conn| overview::glances(conn, ids).await).await
    }

    /// Closes the database. A store that was dropped instead is still whole.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}
