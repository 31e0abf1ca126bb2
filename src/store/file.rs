//! Which program a state file belongs to. Checked before anything is made or changed, so that the file of another program is left
//! as it is, and nothing is left beside it.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteError, SqliteJournalMode};
use sqlx::{ConnectOptions, Connection};

use crate::store::StoreError;

/// How the schema of a file came about.
pub(super) static SQLITE: Migrator = sqlx::migrate!("src/store/migrations/sqlite");
/// Marks a file as ours, in the field that SQLite has for it: `TTLS`.
const APPLICATION_ID: i32 = i32::from_be_bytes(*b"TTLS");
/// What an SQLite file begins with.
const MAGIC: &[u8] = b"SQLite format 3\0";
/// Where its header has the application id, in four bytes, the highest first.
const ID_AT: usize = 68;

/// SQLite's own numbers of what can be wrong with a file.
const SQLITE_CORRUPT: u32 = 11;
const SQLITE_FULL: u32 = 13;
const SQLITE_NOTADB: u32 = 26;

/// Why a file is not ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Foreign {
    /// A folder, a device.
    #[error("it is no regular file")]
    NoFile,
    /// Something else than SQLite's, or of SQLite and damaged at its beginning.
    #[error("it is no SQLite database")]
    NoDatabase,
    /// A database without our mark.
    #[error("it is a database of another program")]
    OfOthers,
}

/// What is at the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// A file with our mark.
    Ours,
    /// Nothing, or a file of ours from before there was a mark.
    Unmarked,
}

/// Looks whose the file is.
///
/// # Errors
/// [`StoreError::NotOurs`], or [`StoreError::Open`] where it cannot be read and written.
pub(super) async fn look(path: &Path) -> Result<Found, StoreError> {
    let not_ours = |why| StoreError::NotOurs { path: path.to_owned(), why };
    let failed = |source: std::io::Error| StoreError::Open { path: path.to_owned(), source: Box::new(source) };
    match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Unmarked),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.is_file() => return Err(not_ours(Foreign::NoFile)),
        // Somebody made it for us.
        Ok(found) if found.len() == 0 => return Ok(Found::Unmarked),
        Ok(_) => {}
    }
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
    let Some(id) = application_id(file).map_err(failed)? else { return Err(not_ours(Foreign::NoDatabase)) };
    match id {
        APPLICATION_ID => Ok(Found::Ours),
        0 if began_as_ours(path).await => Ok(Found::Unmarked),
        _ => Err(not_ours(Foreign::OfOthers)),
    }
}

/// Marks a file as ours, and makes it where there is none. The mark is in the file itself before anything else is: once a
/// file is in WAL mode, what is written may stand beside it for long.
///
/// # Errors
/// Of SQLite.
pub(super) async fn mark(path: &Path) -> Result<(), sqlx::Error> {
    let mut conn = SqliteConnectOptions::new().filename(path).create_if_missing(true).connect().await?;
    sqlx::query(sqlx::AssertSqlSafe(format!("PRAGMA application_id = {APPLICATION_ID}"))).execute(&mut conn).await?;
    conn.close().await
}

/// Puts a file into WAL mode, which stays with it. The pool would take a file that cannot be used for one that is busy.
///
/// # Errors
/// Of SQLite.
pub(super) async fn write_ahead(path: &Path) -> Result<(), sqlx::Error> {
    let options = SqliteConnectOptions::new().filename(path).journal_mode(SqliteJournalMode::Wal);
    options.connect().await?.close().await
}

/// The application id in the header of an SQLite file; `None`: it is none.
fn application_id(mut file: File) -> std::io::Result<Option<i32>> {
    let mut header = Vec::new();
    file.by_ref().take(100).read_to_end(&mut header)?;
    let id = header.get(ID_AT..ID_AT + 4).and_then(|id| id.try_into().ok());
    Ok(id.filter(|_| header.starts_with(MAGIC)).map(i32::from_be_bytes))
}

/// Whether the tables of a file without a mark were made by our first migration.
async fn began_as_ours(path: &Path) -> bool {
    let Some(first) = SQLITE.iter().next() else { return false };
    let options = SqliteConnectOptions::new().filename(path).read_only(true);
    // Without a log beside it the file is whole, and SQLite need not make one to read it.
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

/// What to do about a file that was found and not opened.
pub(super) fn hint(error: &StoreError) -> Option<&'static str> {
    const DAMAGED: &str = "it is damaged: put a copy in its place, or move it away with what lies beside it (-wal, -shm, .lock, \
                           .tally) and begin anew";
    let (sqlx, migrate, io) = match error {
        StoreError::NotOurs { why: Foreign::NoDatabase, .. } => {
            return Some(
                "nothing in it was changed: name another file, or move this one away if it was the state file",
            );
        }
        StoreError::NotOurs { .. } => return Some("nothing in it was changed: name another file"),
        StoreError::Open { source, .. } => (source.downcast_ref(), source.downcast_ref(), source.downcast_ref()),
        StoreError::Sql(error) => (Some(error), None, None),
        StoreError::Damaged(_) => return Some(DAMAGED),
        StoreError::InUse(_) | StoreError::Journal(_) => return None,
        StoreError::Connect { .. } => {
            return Some("is the database there, and may this user log in and make tables in it? See [store] url");
        }
        StoreError::Silent(_) => return Some("is the database reachable from here, or overloaded?"),
        StoreError::Fenced(_) | StoreError::DealtWith | StoreError::Unfinished(_) => return None,
    };
    let sqlx: Option<&sqlx::Error> = match migrate {
        Some(sqlx::migrate::MigrateError::VersionMissing(_) | sqlx::migrate::MigrateError::VersionMismatch(_)) => {
            return Some("another version of ttlsweep made it: use that one, or name another file");
        }
        Some(sqlx::migrate::MigrateError::Execute(error) | sqlx::migrate::MigrateError::ExecuteMigration(error, _)) => {
            Some(error)
        }
        _ => sqlx,
    };
    let of_sqlite = sqlx.and_then(sqlx::Error::as_database_error);
    let of_sqlite = of_sqlite.filter(|error| error.try_downcast_ref::<SqliteError>().is_some());
    let code = of_sqlite.and_then(|error| error.code()?.parse::<u32>().ok());
    // The low byte is the error, and what is above tells its kinds apart.
    match (code.map(|code| code & 0xFF), io.map(std::io::Error::kind)) {
        (Some(SQLITE_CORRUPT | SQLITE_NOTADB), _) => Some(DAMAGED),
        (Some(SQLITE_FULL), _) => Some("make room on its disk"),
        (_, Some(ErrorKind::NotFound | ErrorKind::NotADirectory)) => Some("make its folder first"),
        (_, Some(ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem)) => {
            Some("this user must be able to write the file and in its folder")
        }
        _ => None,
    }
}

/// The path of a file beside another.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}
