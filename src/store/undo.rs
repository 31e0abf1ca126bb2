//! What has to be put back: the value that a setting of a server had before we changed it, kept beside the state file.
//!
//! Written before the change and removed after it was undone, so that whatever happens in between, a later sweep finds it.
//! It is locked for as long as its process means to undo it: one that nobody holds was left behind.

use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::model::shard::NodeAddr;
use crate::store::journal::JournalDir;
use crate::store::report::StoredAddr;

/// What has to be put back, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undo {
    /// The instance: its URL without credentials. Nobody but a sweep of it may log in to `addr`.
    pub target: String,
    /// The server.
    #[serde(with = "StoredAddr")]
    pub addr: NodeAddr,
    /// The setting.
    pub parameter: String,
    /// The value that it had.
    pub value: String,
}

/// The note about it, which is ours for as long as this is not dropped.
#[derive(Debug)]
pub struct UndoNote {
    /// What it says.
    pub undo: Undo,
    file: PathBuf,
    _lock: File,
}

impl Undo {
    /// Notes it, so that it outlives a crash and a power cut.
    ///
    /// # Errors
    /// Of the file system, and `WouldBlock` where another sweep has changed the same setting of the same server. Nothing is
    /// noted then.
    pub fn note(self, dir: &JournalDir) -> io::Result<UndoNote> {
        let hash = Sha256::digest(self.addr.to_string().as_bytes());
        let short: String = hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let file = dir.path().join(format!("undo-{short}-{}", self.parameter));
        if File::open(&file).is_ok_and(|there| !is_free(&there)) {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, "another sweep has changed it and will put it back"));
        }
        std::fs::create_dir_all(dir.path())?;
        let mut new = tempfile::NamedTempFile::new_in(dir.path())?;
        is_free(new.as_file());
        serde_json::to_writer(&mut new, &self)?;
        new.flush()?;
        new.as_file().sync_all()?;
        let lock = new.persist(&file).map_err(|error| error.error)?;
        File::open(dir.path())?.sync_all()?;
        Ok(UndoNote { undo: self, file, _lock: lock })
    }
}

impl UndoNote {
    /// The notes in `dir` that were left behind by whoever wrote them, as far as `ours` says yes.
    pub fn left(dir: &JournalDir, ours: impl Fn(&Undo) -> bool) -> Vec<Self> {
        // No directory: nothing was left.
        let Ok(entries) = std::fs::read_dir(dir.path()) else { return Vec::new() };
        let files = entries.flatten().filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"undo-"));
        files.filter_map(|entry| Self::take(&entry.path(), &ours)).collect()
    }

    fn take(path: &Path, ours: impl Fn(&Undo) -> bool) -> Option<Self> {
        let file = File::open(path).ok()?;
        // A torn one is none: it was never relied upon.
        let undo: Undo = serde_json::from_reader(&file).ok()?;
        // One without a name was done before we had the lock.
        let is_left = ours(&undo) && is_free(&file) && file.metadata().is_ok_and(|data| data.nlink() > 0);
        is_left.then(|| Self { undo, file: path.to_owned(), _lock: file })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.file
    }

    /// It was put back.
    pub fn done(self) {
        let _ = std::fs::remove_file(&self.file);
        if let Some(dir) = self.file.parent() {
            // Succeeds only where it was the last file.
            let _ = std::fs::remove_dir(dir);
        }
    }
}

/// Takes the lock of a note. Some network file systems know no locks: there every note counts as free.
fn is_free(note: &File) -> bool {
    !matches!(note.try_lock(), Err(TryLockError::WouldBlock))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn undo(target: &str) -> Undo {
        let addr = NodeAddr::Tcp { host: target.to_owned(), port: 1 };
        Undo { target: target.to_owned(), addr, parameter: "effort".to_owned(), value: "1".to_owned() }
    }

    fn left(dir: &JournalDir) -> Vec<Undo> {
        UndoNote::left(dir, |undo| undo.target != "foreign").into_iter().map(|note| note.undo).collect()
    }

    #[test]
    fn a_note_is_left_once_its_holder_is_gone_and_until_it_is_done() {
        let dir = tempfile::tempdir().unwrap();
        let journals = JournalDir::beside(&dir.path().join("state.db"));
        assert_eq!(left(&journals), []);
        let note = undo("a").note(&journals).unwrap();
        assert_eq!(left(&journals), [], "it is held");
        assert_eq!(undo("a").note(&journals).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(note);
        assert_eq!(left(&journals), [undo("a")]);
        drop(undo("foreign").note(&journals).unwrap());
        assert_eq!(left(&journals), [undo("a")]);
        for note in UndoNote::left(&journals, |_| true) {
            assert_eq!(left(&journals), [], "what was taken is held");
            note.done();
        }
        assert!(!journals.path().exists());
    }

    #[test]
    fn a_torn_note_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let journals = JournalDir::beside(&dir.path().join("state.db"));
        let file = undo("a").note(&journals).unwrap().path().to_owned();
        let whole = std::fs::read(&file).unwrap();
        std::fs::write(&file, &whole[..whole.len() - 1]).unwrap();
        assert_eq!(left(&journals), []);
    }
}
