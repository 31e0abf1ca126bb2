//! Opening the records, wherever they are, and the clock that goes with them.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use sqlx::any::AnyPoolOptions;
use sqlx::migrate::Migrator;
use sqlx::{AnyPool, Executor};

use crate::settings::store::{PostgresUrl, StoreLocation};
use crate::store::file::{self, Found, SQLITE};
use crate::store::journal::JournalDir;
use crate::store::{Store, StoreError};

/// How the schema of a shared database came about.
static POSTGRES: Migrator = sqlx::migrate!("src/store/migrations/postgres");

/// Connections to a file at once: one writes, others read.
const FILE_CONNECTIONS: u32 = 4;
/// Connections of a daemon to a shared database at once.
const SHARED_CONNECTIONS: u32 = 8;
/// Bound on each use of a shared database: a quarter of the shortest lease in use, so that a lease can be tried again in time.
pub(super) const SHARED_WITHIN: Duration = Duration::from_secs(4);
/// What may stand in the path of a URL as it is.
const PATH: AsciiSet = NON_ALPHANUMERIC.remove(b'/').remove(b'.').remove(b'-').remove(b'_').remove(b'~');

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// The machine's own clock, or the database's as it was last heard, carried on by the monotonic clock.
#[derive(Debug, Clone, Default)]
pub struct Clock(Arc<Mutex<Option<(Timestamp, Instant)>>>);

impl Clock {
    /// The time now.
    pub fn now(&self) -> Timestamp {
        let heard = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((then, at)) = heard else { return Timestamp::now() };
        let since = SignedDuration::try_from(at.elapsed()).unwrap_or(SignedDuration::MAX);
        then.checked_add(since).unwrap_or(Timestamp::MAX)
    }

    /// Takes over the database's time, heard just now.
    pub(super) fn set(&self, now: Timestamp) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((now, Instant::now()));
    }
}

impl Store {
    /// Opens the records, makes them where there are none, and brings their schema up to date.
    ///
    /// # Errors
    /// [`StoreError::Open`], [`StoreError::InUse`], [`StoreError::NotOurs`]; [`StoreError::Connect`] for a shared database.
    pub async fn open(location: &StoreLocation) -> Result<Self, StoreError> {
        match location {
            StoreLocation::Sqlite(path) => Self::open_file(path).await,
            StoreLocation::Postgres { url, journal } => Self::open_shared(url, journal).await,
        }
    }

    /// Opens a file of this process only.
    ///
    /// # Errors
    /// [`StoreError::Open`], [`StoreError::InUse`], [`StoreError::NotOurs`].
    pub async fn open_file(path: &Path) -> Result<Self, StoreError> {
        let failed = |source: Cause| StoreError::Open { path: path.to_owned(), source };
        let found = file::look(path).await?;
        let lock = Arc::new(lock(path).await?);
        if found == Found::Unmarked {
            file::mark(path).await.map_err(|e| failed(Box::new(e)))?;
        }
        file::write_ahead(path).await.map_err(|e| failed(Box::new(e)))?;
        let options = AnyPoolOptions::new().max_connections(FILE_CONNECTIONS).after_connect(|conn, _| {
            // With WAL this is safe against a killed process; a power cut may lose the last checkpoints, never the file.
            Box::pin(async move { conn.execute("PRAGMA synchronous = NORMAL").await.map(drop) })
        });
        let url = file_url(path).map_err(|e| failed(Box::new(e)))?;
        let pool = connect(options, &url).await.map_err(|e| failed(Box::new(e)))?;
        SQLITE.run(&pool).await.map_err(|e| failed(Box::new(e)))?;
        let journals = Some(JournalDir::beside(path));
        let clock = Clock::default();
        Ok(Self { pool, clock, journals, shared: None, _lock: Some(lock) })
    }

    /// Records that end with the process.
    ///
    /// # Errors
    /// [`StoreError::Sql`] where SQLite itself fails.
    pub async fn in_memory() -> Result<Self, StoreError> {
        // One connection that is never closed: each further one would see an empty database of its own.
        let options = AnyPoolOptions::new().max_connections(1).idle_timeout(None).max_lifetime(None);
        let pool = connect(options, "sqlite::memory:").await?;
        SQLITE.run(&pool).await.map_err(|e| sqlx::Error::Configuration(Box::new(e)))?;
        let clock = Clock::default();
        Ok(Self { pool, clock, journals: None, shared: None, _lock: None })
    }

    async fn open_shared(url: &PostgresUrl, journal: &Path) -> Result<Self, StoreError> {
        let failed = |source: Cause| StoreError::Connect { url: url.to_string(), source };
        // A daemon whose machine is gone must not keep rows locked until the network finds out.
        let options = AnyPoolOptions::new()
            .max_connections(SHARED_CONNECTIONS)
            .acquire_timeout(SHARED_WITHIN)
            .after_connect(|conn, _| {
                Box::pin(async move { conn.execute("SET idle_in_transaction_session_timeout = '10s'").await.map(drop) })
            });
        let pool = connect(options, url.expose()).await.map_err(|e| failed(Box::new(e)))?;
        // Daemons that start together wait for each other here: the migrator holds a lock in the database.
        POSTGRES.run(&pool).await.map_err(|e| failed(Box::new(e)))?;
        let store = Self {
            pool,
            clock: Clock::default(),
            journals: Some(JournalDir::at(journal)),
            shared: Some(Arc::new(url.clone())),
            _lock: None,
        };
        store.hear_time().await?;
        Ok(store)
    }
}

async fn connect(options: AnyPoolOptions, url: &str) -> Result<AnyPool, sqlx::Error> {
    sqlx::any::install_default_drivers();
    options.connect(url).await
}

/// The file as SQLite's driver takes it. It exists by now.
fn file_url(path: &Path) -> std::io::Result<String> {
    let path = std::fs::canonicalize(path)?;
    let text = path.to_str().ok_or_else(|| std::io::Error::other("its path is not UTF-8"))?;
    Ok(format!("sqlite:{}", utf8_percent_encode(text, &PATH)))
}

/// Who has just ended may leave the lock for a moment to a child that it was making: it is given that long.
const LOCK_WITHIN: Duration = Duration::from_secs(1);
/// How often the lock is tried meanwhile.
const LOCK_EVERY: Duration = Duration::from_millis(20);

async fn lock(store: &Path) -> Result<File, StoreError> {
    let path = file::beside(store, ".lock");
    let file = File::create(&path).map_err(|e| StoreError::Open { path: store.to_owned(), source: Box::new(e) })?;
    let begun = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if begun.elapsed() < LOCK_WITHIN => tokio::time::sleep(LOCK_EVERY).await,
            Err(TryLockError::WouldBlock) => return Err(StoreError::InUse(store.to_owned())),
            // Some network file systems know no locks. There it is up to the operator to run one process only.
            Err(TryLockError::Error(error)) => {
                tracing::warn!(path = %path.display(), %error, "the records cannot be locked");
                break;
            }
        }
    }
    Ok(file)
}
