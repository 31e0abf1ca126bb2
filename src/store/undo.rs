//! What has to be put back: the value that a setting of a server had before we changed it, kept beside the state file.
//!
//! Written before the change and removed after it was undone, so that whatever happens in between, the next start finds it.

use std::io::{self, Write};
use std::path::PathBuf;

use sha2::{Digest, Sha256};

use crate::model::shard::NodeAddr;
use crate::store::tally::TallyDir;

/// The note about one setting of one server.
#[derive(Debug, Clone)]
pub struct Undo {
    dir: PathBuf,
    file: PathBuf,
}

impl Undo {
    /// The note about `parameter` of the server at `addr`.
    pub fn new(dir: &TallyDir, addr: &NodeAddr, parameter: &str) -> Self {
        let hash = Sha256::digest(addr.to_string().as_bytes());
        let short: String = hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let dir = dir.path().to_owned();
        Self { file: dir.join(format!("undo-{short}-{parameter}")), dir }
    }

    /// The old value, where there is one to put back.
    pub fn value(&self) -> Option<String> {
        let text = std::fs::read_to_string(&self.file).ok()?;
        text.strip_suffix('\n').map(str::to_owned)
    }

    /// Notes the old value, so that it outlives a crash and a power cut.
    ///
    /// # Errors
    /// Of the file system; then nothing is noted.
    pub fn note(&self, value: &str) -> io::Result<()> {
        std::fs::create_dir_all(&self.dir)?;
        let mut file = tempfile::NamedTempFile::new_in(&self.dir)?;
        // The line's end tells a whole note from a torn one.
        writeln!(file, "{value}")?;
        file.as_file().sync_all()?;
        file.persist(&self.file).map_err(|error| error.error)?;
        std::fs::File::open(&self.dir)?.sync_all()
    }

    /// It was put back.
    pub fn done(&self) {
        let _ = std::fs::remove_file(&self.file);
        // Succeeds only where it was the last file.
        let _ = std::fs::remove_dir(&self.dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_stays_until_it_is_done_and_a_torn_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let tallies = TallyDir::beside(&dir.path().join("state.db"));
        let addr = NodeAddr::Tcp { host: "h".into(), port: 1 };
        let undo = || Undo::new(&tallies, &addr, "active-expire-effort");
        assert_eq!(undo().value(), None);
        undo().note("1").unwrap();
        assert_eq!(undo().value().as_deref(), Some("1"));
        std::fs::write(&undo().file, "1").unwrap();
        assert_eq!(undo().value(), None);
        undo().done();
        assert!(!tallies.path().exists());
    }
}
