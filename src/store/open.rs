//! Opens the records, in a file, a shared database or memory, and provides their clock.

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

/// The migrations of the PostgreSQL schema.
static POSTGRES: Migrator = sqlx::migrate!("src/store/migrations/postgres");

/// Most connections to an SQLite file: one writes, others read.
const FILE_CONNECTIONS: u32 = 4;
/// Most connections of one daemon to a shared database.
const SHARED_CONNECTIONS: u32 = 8;
/// Timeout of each use of a shared database. Short against the default lease of 15 s, so that a renewal can be tried again in time.
pub(super) const SHARED_WITHIN: Duration = Duration::from_secs(4);
/// The characters that are escaped in the path of a URL.
const PATH: AsciiSet = NON_ALPHANUMERIC.remove(b'/').remove(b'.').remove(b'-').remove(b'_').remove(b'~');

type BoxedError = Box<dyn std::error::Error + Send + Sync>;

/// The machine's clock, or the database's time as last read, advanced by the machine's monotonic clock.
#[derive(Debug, Clone, Default)]
pub struct Clock(Arc<Mutex<Option<(Timestamp, Instant)>>>);

impl Clock {
    /// The current time by this clock.
    pub fn now(&self) -> Timestamp {
        let last_read = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((then, at)) = last_read else { return Timestamp::now() };
        let since = SignedDuration::try_from(at.elapsed()).unwrap_or(SignedDuration::MAX);
        then.checked_add(since).unwrap_or(Timestamp::MAX)
    }

    /// Takes over the database's time, which was read just now.
    pub(super) fn set(&self, now: Timestamp) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((now, Instant::now()));
    }
}

impl Store {
    /// Opens the records, creates them if there are none, and migrates their schema.
    ///
    /// # Errors
    /// [`StoreError::Open`], [`StoreError::InUse`], [`StoreError::NotOurs`]; [`StoreError::Connect`] for a shared database.
    pub async fn open(location: &StoreLocation) -> Result<Self, StoreError> {
        match location {
            StoreLocation::Sqlite(path) => Self::open_file(path).await,
            StoreLocation::Postgres { url, journal } => Self::open_shared(url, journal).await,
        }
    }

    /// Opens an SQLite file and locks it for this process.
    ///
    /// # Errors
    /// [`StoreError::Open`], [`StoreError::InUse`], [`StoreError::NotOurs`].
    pub async fn open_file(path: &Path) -> Result<Self, StoreError> {
        let failed = |source: BoxedError| StoreError::Open { path: path.to_owned(), source };
        let found = file::identify(path).await?;
        let lock = Arc::new(lock(path).await?);
        if found == Found::Unmarked {
            file::mark(path).await.map_err(|e| failed(Box::new(e)))?;
        }
        file::write_ahead(path).await.map_err(|e| failed(Box::new(e)))?;
        let options = AnyPoolOptions::new().max_connections(FILE_CONNECTIONS).after_connect(|conn, _| {
            // With WAL a killed process loses nothing; a power cut may lose the last checkpoints, but cannot damage the file.
            Box::pin(async move { conn.execute("PRAGMA synchronous = NORMAL").await.map(drop) })
        });
        let url = file_url(path).map_err(|e| failed(Box::new(e)))?;
        let pool = connect(options, &url).await.map_err(|e| failed(Box::new(e)))?;
        SQLITE.run(&pool).await.map_err(|e| failed(Box::new(e)))?;
        let journals = Some(JournalDir::beside(path));
        let clock = Clock::default();
        Ok(Self { pool, clock, journals, shared: None, _lock: Some(lock) })
    }

    /// Opens records in memory, which end with the process.
    ///
    /// # Errors
    /// [`StoreError::Sql`].
    pub async fn in_memory() -> Result<Self, StoreError> {
        // One connection that is never closed: each connection has a memory database of its own.
        let options = AnyPoolOptions::new().max_connections(1).idle_timeout(None).max_lifetime(None);
        let pool = connect(options, "sqlite::memory:").await?;
        SQLITE.run(&pool).await.map_err(|e| sqlx::Error::Configuration(Box::new(e)))?;
        let clock = Clock::default();
        Ok(Self { pool, clock, journals: None, shared: None, _lock: None })
    }

    async fn open_shared(url: &PostgresUrl, journal: &Path) -> Result<Self, StoreError> {
        let failed = |source: BoxedError| StoreError::Connect { url: url.to_string(), source };
        // The open transaction of a daemon whose machine is lost must not lock rows until TCP notices.
        let options = AnyPoolOptions::new()
            .max_connections(SHARED_CONNECTIONS)
            .acquire_timeout(SHARED_WITHIN)
            .after_connect(|conn, _| {
                Box::pin(async move { conn.execute("SET idle_in_transaction_session_timeout = '10s'").await.map(drop) })
            });
        let pool = connect(options, url.expose()).await.map_err(|e| failed(Box::new(e)))?;
        // Daemons that start together wait for each other here: the migrator takes a lock in the database.
        POSTGRES.run(&pool).await.map_err(|e| failed(Box::new(e)))?;
        let store = Self {
            pool,
            clock: Clock::default(),
            journals: Some(JournalDir::at(journal)),
            shared: Some(Arc::new(url.clone())),
            _lock: None,
        };
        store.sync_clock().await?;
        Ok(store)
    }
}

async fn connect(options: AnyPoolOptions, url: &str) -> Result<AnyPool, sqlx::Error> {
    sqlx::any::install_default_drivers();
    options.connect(url).await
}

/// The URL of an existing file for SQLite's driver.
fn file_url(path: &Path) -> std::io::Result<String> {
    let path = std::fs::canonicalize(path)?;
    let text = path.to_str().ok_or_else(|| std::io::Error::other("its path is not UTF-8"))?;
    Ok(format!("sqlite:{}", utf8_percent_encode(text, &PATH)))
}

/// How long to wait for the lock: a process that has just ended may have left it for a moment to a child that it was forking.
const LOCK_WITHIN: Duration = Duration::from_secs(1);
/// Time between two attempts to lock.
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
            // Some network file systems have no locks. There the operator must make sure that only one process runs.
            Err(TryLockError::Error(error)) => {
                tracing::warn!(path = %path.display(), %error, "cannot lock the records");
                break;
            }
        }
    }
    Ok(file)
}
