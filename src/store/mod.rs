//! Records that outlive the process: tasks with their checkpoints, in one SQLite file.
//!
//! `tasks` alone changes the state of a task here; the scheduler keeps its due times, and lists are read from everywhere. A checkpoint is one transaction, so a reader never sees half of one, whatever killed the
//! writer. What the last second before a kill freed is in the [`journal`].

mod file;
pub mod journal;
mod lists;
mod report;
mod rows;
mod schedules;
pub mod undo;

pub use file::Foreign;
pub use lists::{TaskFilter, TaskPage};
pub use schedules::Mark;

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use sqlx::migrate::Migrator;
use sqlx::pool::PoolConnection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Connection, Sqlite, SqlitePool};

use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::ShardView;
use crate::model::schedule::AutoScan;
use crate::model::shard::{DbIndex, ScanPosition, ShardId};
use crate::model::task::{Task, TaskId, TaskState};
use crate::store::file::Found;
use crate::store::journal::JournalDir;

/// How long a writer waits for another one: a person may look into the file with other tools.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

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
    /// A statement failed: a full disk, a file that was taken away.
    #[error("cannot read or write the records: {0}")]
    Sql(#[from] sqlx::Error),
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

/// How the schema came about.
static MIGRATOR: Migrator = sqlx::migrate!("src/store/migrations");

/// What is stored of one shard.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StoredShard {
    /// The shard as its task showed it last. What it held for is not kept.
    pub view: ShardView,
    /// The process was killed in the middle of these passes, and the batch journal does not tell what they had counted then.
    pub uncounted: Vec<DbIndex>,
}

/// The records of one file, or of this process only.
#[derive(Debug, Clone)]
pub struct Store {
    pool: SqlitePool,
    journals: Option<JournalDir>,
    /// Keeps other processes away for as long as this is held.
    _lock: Option<Arc<File>>,
}

impl Store {
    /// Opens the file, makes it where there is none, and brings its schema up to date.
    ///
    /// # Errors
    /// [`StoreError::Open`], [`StoreError::InUse`], [`StoreError::NotOurs`].
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let failed =
            |source: Box<dyn std::error::Error + Send + Sync>| StoreError::Open { path: path.to_owned(), source };
        let found = file::look(path).await?;
        let lock = Arc::new(lock(path)?);
        if found == Found::Unmarked {
            file::mark(path).await.map_err(|e| failed(Box::new(e)))?;
        }
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // With WAL this is safe against a killed process; a power cut may lose the last checkpoints, never the file.
            .synchronous(SqliteSynchronous::Normal)
            .busy_timeout(BUSY_TIMEOUT);
        let pool =
            SqlitePoolOptions::new().max_connections(4).connect_with(options).await.map_err(|e| failed(Box::new(e)))?;
        let store = Self { pool, journals: Some(JournalDir::beside(path)), _lock: Some(lock) };
        store.migrate().await.map_err(|e| failed(Box::new(e)))?;
        Ok(store)
    }

    /// Records that end with the process.
    ///
    /// # Errors
    /// [`StoreError::Sql`] where SQLite itself fails.
    pub async fn in_memory() -> Result<Self, StoreError> {
        // One connection that is never closed: each further one would see an empty database of its own.
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_with(SqliteConnectOptions::new().in_memory(true))
            .await?;
        let store = Self { pool, journals: None, _lock: None };
        store.migrate().await.map_err(|e| sqlx::Error::Configuration(Box::new(e)))?;
        Ok(store)
    }

    async fn migrate(&self) -> Result<(), sqlx::migrate::MigrateError> {
        MIGRATOR.run(&self.pool).await
    }

    /// Where per-batch counts go, if the records outlive the process.
    pub fn journals(&self) -> Option<&JournalDir> {
        self.journals.as_ref()
    }

    /// Adds a task. Where a schedule caused it, `due` is marked as dealt with in the same transaction: both or neither, so
    /// that a crash neither loses nor doubles it.
    ///
    /// # Errors
    /// [`StoreError::Sql`].
    pub async fn insert(&self, task: &Task, due: Option<Timestamp>) -> Result<(), StoreError> {
        let mut conn = self.pool.acquire().await?;
        let written = async {
            let mut tx = conn.begin().await?;
            rows::insert_task(&mut *tx, task).await?;
            if let Some(due) = due {
                schedules::set_handled(&mut *tx, &task.instance_id, due).await?;
            }
            tx.commit().await?;
            Ok(())
        };
        let written = written.await;
        self.let_go(conn, written)
    }

    /// What is known of the due times of an instance; `None` for one that was never looked at.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn mark(&self, instance_id: &str) -> Result<Option<Mark>, StoreError> {
        schedules::mark(&self.pool, instance_id).await
    }

    /// Sets the mark of an instance's due times, also back.
    ///
    /// # Errors
    /// [`StoreError::Sql`].
    pub async fn set_mark(&self, instance_id: &str, mark: &Mark) -> Result<(), StoreError> {
        schedules::set_mark(&self.pool, instance_id, mark).await
    }

    /// Marks due times up to an instant as dealt with.
    ///
    /// # Errors
    /// [`StoreError::Sql`].
    pub async fn set_handled(&self, instance_id: &str, handled: Timestamp) -> Result<(), StoreError> {
        schedules::set_handled(&self.pool, instance_id, handled).await
    }

    /// Forgets the marks of all other instances: one that comes back begins anew.
    ///
    /// # Errors
    /// [`StoreError::Sql`].
    pub async fn forget_marks_but<'a>(&self, instance_ids: impl Iterator<Item = &'a str>) -> Result<(), StoreError> {
        schedules::forget_marks_but(&self.pool, instance_ids).await
    }

    /// The automatic scan that the API set for an instance of a project.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn auto_scan(&self, instance_id: &str, project_id: &str) -> Result<Option<AutoScan>, StoreError> {
        schedules::auto_scan(&self.pool, instance_id, project_id).await
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
        let mut conn = self.pool.acquire().await?;
        let written = async {
            let mut tx = conn.begin().await?;
            match config {
                Some(config) => schedules::set_auto_scan(&mut *tx, instance_id, project_id, config).await?,
                None => schedules::forget_auto_scan(&mut *tx, instance_id).await?,
            }
            schedules::set_mark(&mut *tx, instance_id, &Mark { handled: now, schedule: None }).await?;
            tx.commit().await?;
            Ok(())
        };
        let written = written.await;
        self.let_go(conn, written)
    }

    /// One page of the tasks that match, newest first, with how many there are and what they freed.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn page(&self, filter: &TaskFilter, offset: u32, limit: u32) -> Result<TaskPage, StoreError> {
        let mut conn = self.pool.acquire().await?;
        let page = lists::page(&mut conn, filter, offset, limit).await;
        self.let_go(conn, page)
    }

    /// Removes some of the ended tasks that are kept no longer: ended before `before`, or beyond the `keep` newest. The
    /// newest one of each instance always stays. Returns how many went; more than none means that there may be others.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn prune(&self, before: Timestamp, keep: u32) -> Result<usize, StoreError> {
        let gone = lists::prune(&self.pool, before, keep).await?;
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
        sqlx::query("SELECT 1").execute(&self.pool).await?;
        Ok(())
    }

    /// Writes the task's state, times, count and failure.
    ///
    /// # Errors
    /// [`StoreError::Sql`].
    pub async fn update(&self, task: &Task) -> Result<(), StoreError> {
        rows::update_task(&self.pool, task).await
    }

    /// One task.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn task(&self, id: TaskId) -> Result<Option<Task>, StoreError> {
        rows::task(&self.pool, id).await
    }

    /// The newest task of an instance, by time of creation.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn latest(&self, instance_id: &str) -> Result<Option<Task>, StoreError> {
        rows::latest(&self.pool, instance_id).await
    }

    /// Every task that is not in a final state.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn unfinished(&self) -> Result<Vec<Task>, StoreError> {
        let words: Vec<&str> = TaskState::ALL.iter().filter(|s| !s.is_final()).map(|s| s.as_str()).collect();
        rows::in_states(&self.pool, &words).await
    }

    /// Writes the task with the figures and positions of these shards, in one transaction.
    ///
    /// # Errors
    /// [`StoreError::Sql`]; then nothing of it was written.
    pub async fn checkpoint(
        &self,
        task: &Task,
        shards: impl Iterator<Item = (&ShardId, &Arc<ShardView>)>,
    ) -> Result<(), StoreError> {
        let mut conn = self.pool.acquire().await?;
        let written = async {
            let mut tx = conn.begin().await?;
            rows::update_task(&mut *tx, task).await?;
            for (shard, view) in shards {
                rows::upsert_shard(&mut tx, task.id, shard, view).await?;
                for (db, figures) in &view.passes {
                    rows::upsert_pass(&mut tx, task.id, shard, *db, figures).await?;
                }
            }
            tx.commit().await?;
            Ok(())
        };
        let written = written.await;
        self.let_go(conn, written)
    }

    /// The shards of a task as its last checkpoint left them, brought forward by the batch journal where that is newer. Where the
    /// record still says running, its process was killed: the batches that were under way then are lost replies.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn shards(&self, id: TaskId) -> Result<BTreeMap<ShardId, StoredShard>, StoreError> {
        let stored = rows::shards(&self.pool, id).await?;
        let stored = stored.into_iter().map(|(shard, view)| (shard, StoredShard { view, uncounted: Vec::new() }));
        let mut shards: BTreeMap<ShardId, StoredShard> = stored.collect();
        if let Some(journals) = &self.journals {
            // A process that was killed before its first checkpoint has counted all the same.
            for shard in journals.shards(id) {
                shards.entry(shard).or_default();
            }
            let killed = rows::task(&self.pool, id).await?.is_some_and(|task| task.state == TaskState::Running);
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

    /// Gives a connection back, unless a write on it failed: what could not be written could perhaps not be rolled back
    /// either, and the next transaction would be one inside that one, whose commit writes nothing.
    fn let_go<T>(&self, mut conn: PoolConnection<Sqlite>, written: Result<T, StoreError>) -> Result<T, StoreError> {
        // Records in memory are in this one connection.
        if written.is_err() && self.journals.is_some() {
            conn.close_on_drop();
        }
        written
    }

    /// Closes the file. A store that was dropped instead is still whole.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

fn lock(store: &Path) -> Result<File, StoreError> {
    let path = file::beside(store, ".lock");
    let file = File::create(&path).map_err(|e| StoreError::Open { path: store.to_owned(), source: Box::new(e) })?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(StoreError::InUse(store.to_owned())),
        // Some network file systems know no locks. There it is up to the operator to run one process only.
        Err(TryLockError::Error(error)) => {
            tracing::warn!(path = %path.display(), %error, "the records cannot be locked")
        }
    }
    Ok(file)
}
