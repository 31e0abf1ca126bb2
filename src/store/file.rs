//! Finds out whether a state file is ours. This is done before anything is created or changed, so that the file of another program stays
//! as it is and no lock or journal appears beside it.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteError, SqliteJournalMode};
use sqlx::{ConnectOptions, Connection};

use crate::store::StoreError;

/// The migrations of the SQLite schema.
pub(super) static SQLITE: Migrator = sqlx::migrate!("src/store/migrations/sqlite");
/// The application id in the SQLite header of our files: `TTLS` in ASCII.
const APPLICATION_ID: i32 = i32::from_be_bytes(*b"TTLS");
/// The first bytes of every SQLite file.
const MAGIC: &[u8] = b"SQLite format 3\0";
/// Offset of the application id in the header: four bytes, big-endian.
const ID_AT: usize = 68;

/// Error codes of SQLite that have a hint.
const SQLITE_CORRUPT: u32 = 11;
const SQLITE_FULL: u32 = 13;
const SQLITE_NOTADB: u32 = 26;

/// Why a file is not ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Foreign {
    /// It is a folder or a device.
    #[error("it is not a regular file")]
    NotAFile,
    /// It does not begin as an SQLite file does; an SQLite file whose beginning is damaged looks the same.
    #[error("it is not an SQLite database")]
    NotSqlite,
    /// It is an SQLite database without our application id.
    #[error("it is a database of another program")]
    OtherProgram,
}

/// What was found at the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// A file with our application id.
    Ours,
    /// No file, an empty one, or a file of ours from before it had an application id.
    Unmarked,
}

/// Finds out whether the file is ours.
///
/// # Errors
/// [`StoreError::NotOurs`], or [`StoreError::Open`] where it cannot be read and written.
pub(super) async fn identify(path: &Path) -> Result<Found, StoreError> {
    let not_ours = |why| StoreError::NotOurs { path: path.to_owned(), why };
    let failed = |source: std::io::Error| StoreError::Open { path: path.to_owned(), source: Box::new(source) };
    match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Unmarked),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.is_file() => return Err(not_ours(Foreign::NotAFile)),
        // An empty file may have been created for us, to set its owner and mode.
        Ok(found) if found.len() == 0 => return Ok(Found::Unmarked),
        Ok(_) => {}
    }
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
    let Some(id) = application_id(file).map_err(failed)? else { return Err(not_ours(Foreign::NotSqlite)) };
    match id {
        APPLICATION_ID => Ok(Found::Ours),
        0 if began_as_ours(path).await => Ok(Found::Unmarked),
        _ => Err(not_ours(Foreign::OtherProgram)),
    }
}

/// Writes our application id into a file, and creates the file if there is none. This comes first: in WAL mode a change may stay in the
/// file beside it for long, where the header does not show it.
///
/// # Errors
/// Any error of SQLite.
pub(super) async fn mark(path: &Path) -> Result<(), sqlx::Error> {
    let mut conn = SqliteConnectOptions::new().filename(path).create_if_missing(true).connect().await?;
    sqlx::query(sqlx::AssertSqlSafe(format!("PRAGMA application_id = {APPLICATION_ID}"))).execute(&mut conn).await?;
    conn.close().await
}

/// Puts a file into WAL mode, which is kept in the file. Done with a single connection: the pool would retry an unusable file as if it
/// were busy.
///
/// # Errors
/// Any error of SQLite.
pub(super) async fn write_ahead(path: &Path) -> Result<(), sqlx::Error> {
    let options = SqliteConnectOptions::new().filename(path).journal_mode(SqliteJournalMode::Wal);
    options.connect().await?.close().await
}

/// The application id in the header; `None`: it is not an SQLite file.
fn application_id(mut file: File) -> std::io::Result<Option<i32>> {
    let mut header = Vec::new();
    file.by_ref().take(100).read_to_end(&mut header)?;
    let id = header.get(ID_AT..ID_AT + 4).and_then(|id| id.try_into().ok());
    Ok(id.filter(|_| header.starts_with(MAGIC)).map(i32::from_be_bytes))
}

/// Whether our first migration made the tables of a file without an application id.
async fn began_as_ours(path: &Path) -> bool {
    let Some(first) = SQLITE.iter().next() else { return false };
    let options = SqliteConnectOptions::new().filename(path).read_only(true);
    // Without a WAL file beside it the database file is complete, and as immutable SQLite creates none to read it.
    let options = options.immutable(!beside(path, "-wal").exists());
    let Ok(mut conn) = options.connect().await else { return false };
    let checksum = checksum(&mut conn).await;
    let _ = conn.close().await;
    checksum.is_some_and(|checksum| checksum == *first.checksum)
}

async fn checksum(conn: &mut SqliteConnection) -> Option<Vec<u8>> {
    let first = sqlx::query_scalar("SELECT checksum FROM _sqlx_migrations ORDER BY version LIMIT 1");
    first.fetch_optional(conn).await.ok().flatten()
}

/// What the user can do about an error of the store.
pub(super) fn hint(error: &StoreError) -> Option<&'static str> {
    const DAMAGED: &str = "it is damaged: restore a backup, or move it away with the files beside it (-wal, -shm, .lock, .tally) to \
                           start with an empty one";
    let (sqlx, migrate, io) = match error {
        StoreError::NotOurs { why: Foreign::NotSqlite, .. } => {
            return Some("it was not changed: name another file, or move this one away if it was the state file");
        }
        StoreError::NotOurs { .. } => return Some("it was not changed: name another file"),
        StoreError::Open { source, .. } => (source.downcast_ref(), source.downcast_ref(), source.downcast_ref()),
        StoreError::Sql(error) => (Some(error), None, None),
        StoreError::Damaged(_) => return Some(DAMAGED),
        StoreError::InUse(_) | StoreError::Journal(_) => return None,
        StoreError::Connect { .. } => {
            return Some("is the database there, and may this user log in and create tables in it? See [store] url");
        }
        StoreError::Silent(_) => return Some("is the database reachable from here, or overloaded?"),
        StoreError::Fenced(_) | StoreError::AlreadyHandled | StoreError::Unfinished(_) => return None,
    };
    let sqlx: Option<&sqlx::Error> = match migrate {
        Some(sqlx::migrate::MigrateError::VersionMissing(_) | sqlx::migrate::MigrateError::VersionMismatch(_)) => {
            return Some("another version of ttlsweep created it: use that version, or name another file");
        }
        Some(sqlx::migrate::MigrateError::Execute(error) | sqlx::migrate::MigrateError::ExecuteMigration(error, _)) => {
            Some(error)
        }
        _ => sqlx,
    };
    let of_sqlite = sqlx.and_then(sqlx::Error::as_database_error);
    let of_sqlite = of_sqlite.filter(|error| error.try_downcast_ref::<SqliteError>().is_some());
    let code = of_sqlite.and_then(|error| error.code()?.parse::<u32>().ok());
    // The low byte is the error code; the higher ones make it an extended code.
    match (code.map(|code| code & 0xFF), io.map(std::io::Error::kind)) {
        (Some(SQLITE_CORRUPT | SQLITE_NOTADB), _) => Some(DAMAGED),
        (Some(SQLITE_FULL), _) => Some("its disk is full: free some space"),
        (_, Some(ErrorKind::NotFound | ErrorKind::NotADirectory)) => Some("create its folder first"),
        (_, Some(ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem)) => {
            Some("this user needs the right to write the file and its folder")
        }
        _ => None,
    }
}

/// The path with `suffix` appended to its file name.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}
