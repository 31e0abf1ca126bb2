//! Undo notes: the value that a setting of a server had before we changed it, in a file beside the state file.
//!
//! A note is written before the change and removed after the value was restored, so that after a crash in between a later
//! sweep finds it. Its process keeps it locked until then: an unlocked note was left behind.

use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::model::shard::NodeAddr;
use crate::store::journal::JournalDir;
use crate::store::report::StoredAddr;

/// The value to restore, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undo {
    /// URL of the instance, without credentials. Only a sweep of this instance has the credentials for `addr`.
    pub target: String,
    /// Address of the server whose setting was changed.
    #[serde(with = "StoredAddr")]
    pub addr: NodeAddr,
    /// Name of the server's setting.
    pub parameter: String,
    /// Value of the setting before the change.
    pub value: String,
}

/// An undo note that this process has locked. Dropping it unlocks the note and leaves the file.
#[derive(Debug)]
pub struct UndoNote {
    /// The content of the note.
    pub undo: Undo,
    file: PathBuf,
    _lock: File,
}

impl Undo {
    /// Writes and locks the note. It survives a crash and a power cut.
    ///
    /// # Errors
    /// Any error of the file system, and `WouldBlock` if another sweep has changed the same setting of the same server. No note is
    /// written then.
    pub fn note(self, dir: &JournalDir) -> io::Result<UndoNote> {
        let hash = Sha256::digest(self.addr.to_string().as_bytes());
        let short: String = hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let file = dir.path().join(format!("undo-{short}-{}", self.parameter));
        if File::open(&file).is_ok_and(|there| !try_lock(&there)) {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, "another sweep has changed it and will restore it"));
        }
        std::fs::create_dir_all(dir.path())?;
        let mut new = tempfile::NamedTempFile::new_in(dir.path())?;
        try_lock(new.as_file());
        serde_json::to_writer(&mut new, &self)?;
        new.flush()?;
        new.as_file().sync_all()?;
        let lock = new.persist(&file).map_err(|error| error.error)?;
        File::open(dir.path())?.sync_all()?;
        Ok(UndoNote { undo: self, file, _lock: lock })
    }
}

impl UndoNote {
    /// Locks and returns the notes in `dir` that their processes left behind and for which `ours` is true.
    pub fn left(dir: &JournalDir, ours: impl Fn(&Undo) -> bool) -> Vec<Self> {
        // Without the folder there are no notes.
        let Ok(entries) = std::fs::read_dir(dir.path()) else { return Vec::new() };
        let files = entries.flatten().filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"undo-"));
        files.filter_map(|entry| Self::take(&entry.path(), &ours)).collect()
    }

    fn take(path: &Path, ours: impl Fn(&Undo) -> bool) -> Option<Self> {
        let file = File::open(path).ok()?;
        // A torn note is ignored: the setting is changed only after the note was written completely.
        let undo: Undo = serde_json::from_reader(&file).ok()?;
        // No link: the note was removed between the open and the lock.
        let is_left = ours(&undo) && try_lock(&file) && file.metadata().is_ok_and(|data| data.nlink() > 0);
        is_left.then(|| Self { undo, file: path.to_owned(), _lock: file })
    }

    /// The path of the note.
    pub fn path(&self) -> &Path {
        &self.file
    }

    /// Removes the note: the value was restored.
    pub fn done(self) {
        let _ = std::fs::remove_file(&self.file);
        if let Some(dir) = self.file.parent() {
            // Fails, as intended, while other files are in the folder.
            let _ = std::fs::remove_dir(dir);
        }
    }
}

/// Tries to lock a note. Where the file system has no locks, every note counts as unlocked.
fn try_lock(note: &File) -> bool {
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
