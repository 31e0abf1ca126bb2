//! The batch journal: the counts of a pass, written after each batch.
//!
//! With a checkpoint each second alone, a killed process would lose the counts of the last second. A database commit for
//! each batch would cost as much as the batch. So each pass has a file of 64 bytes that is overwritten in place after
//! each batch: one `pwrite` into the page cache, about a microsecond. It survives the process, though not a power cut:
//! then the checkpoint counts. After a kill only the batches that were under way are not counted, and the line holds
//! their number.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::model::progress::PassFigures;
use crate::model::shard::{DbIndex, ScanPosition, ShardId};
use crate::model::task::TaskId;
use crate::store::file;

/// Length of the line in bytes: eight little-endian 64-bit numbers.
const LINE: usize = 64;
/// The cursor that stands for "finished": SCAN cannot answer it, since no table has 2^64 buckets.
const FINISHED: u64 = u64::MAX;

/// Suffix of the file that holds the name of the shard. The journals of its passes end with the number of their DB instead.
const NAME: &str = "name";

/// The line of a pass: position and counts after a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalLine {
    position: ScanPosition,
    process: u64,
    scanned: u64,
    reclaimed: u64,
    touched: u64,
    batches: u64,
    under_way: u64,
}

impl JournalLine {
    /// The counts that must survive a kill.
    pub fn of(figures: &PassFigures) -> Self {
        Self {
            position: figures.position,
            process: figures.process.unwrap_or(0),
            scanned: figures.scanned,
            reclaimed: figures.reclaimed,
            touched: figures.touched,
            batches: figures.batches,
            under_way: figures.under_way,
        }
    }

    /// Replaces the counts of an older checkpoint by those of this line. Returns false and changes nothing if the line is older than the
    /// checkpoint: a line is written before the checkpoint that covers it, so an older one does not belong to it.
    pub fn bring_forward(&self, figures: &mut PassFigures) -> bool {
        let fits = self.batches >= figures.batches;
        if fits {
            figures.position = self.position;
            figures.process = Some(self.process);
            figures.scanned = self.scanned;
            figures.reclaimed = self.reclaimed;
            figures.touched = self.touched;
            figures.batches = self.batches;
            figures.under_way = self.under_way;
        }
        fits
    }

    fn to_bytes(self) -> [u8; LINE] {
        let cursor = self.position.to_send().unwrap_or(FINISHED);
        let fields = [cursor, self.process, self.scanned, self.reclaimed, self.touched, self.batches, self.under_way];
        let mut bytes = [0; LINE];
        for (place, field) in bytes.chunks_exact_mut(8).zip(fields.iter().chain([&checksum(&fields)])) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: &[u8; LINE]) -> Option<Self> {
        let mut fields = [0_u64; LINE / 8];
        for (field, place) in fields.iter_mut().zip(bytes.chunks_exact(8)) {
            *field = u64::from_le_bytes(place.try_into().ok()?);
        }
        let [cursor, process, scanned, reclaimed, touched, batches, under_way, sum] = fields;
        if checksum(&fields[..LINE / 8 - 1]) != sum {
            return None;
        }
        let position = match cursor {
            0 => ScanPosition::NotStarted,
            FINISHED => ScanPosition::Finished,
            other => ScanPosition::from_reply(other),
        };
        Some(Self { position, process, scanned, reclaimed, touched, batches, under_way })
    }
}

/// Detects torn and foreign lines. It is not cryptographic: an attacker who can write the file can compute it anyway.
fn checksum(fields: &[u64]) -> u64 {
    fields
        .iter()
        .fold(0x9E37_79B9_7F4A_7C15, |sum, field| (sum ^ field).rotate_left(23).wrapping_mul(0xFF51_AFD7_ED55_8CCD))
}

/// The folder of all batch journals of one store.
#[derive(Debug, Clone)]
pub struct JournalDir(PathBuf);

impl JournalDir {
    /// The folder beside the state file: the file's name with `.tally` appended.
    pub fn beside(state: &Path) -> Self {
        Self(file::beside(state, ".tally"))
    }

    /// The folder at this path, for records that are not in a file.
    pub fn at(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// The path of the folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    fn prefix(task: TaskId, shard: &ShardId) -> String {
        // The name of a shard may contain slashes and colons; a hash of it is a valid file name.
        let hash = Sha256::digest(shard.0.as_bytes());
        let short: String = hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        format!("{task}-{short}-")
    }

    /// Opens the batch journal of one pass for writing.
    ///
    /// # Errors
    /// Any error of the file system.
    pub fn open(&self, task: TaskId, shard: &ShardId, db: DbIndex) -> io::Result<Journal> {
        match self.open_once(task, shard, db) {
            // Another task has ended meanwhile and removed the empty folder.
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.open_once(task, shard, db),
            opened => opened,
        }
    }

    fn open_once(&self, task: TaskId, shard: &ShardId, db: DbIndex) -> io::Result<Journal> {
        std::fs::create_dir_all(&self.0)?;
        let prefix = Self::prefix(task, shard);
        // The process may be killed before the first checkpoint names the shard, and its name cannot be got from the hash.
        let name = self.0.join(format!("{prefix}{NAME}"));
        if std::fs::read(&name).ok().as_deref() != Some(shard.0.as_bytes()) {
            std::fs::write(&name, &shard.0)?;
        }
        let path = self.0.join(format!("{prefix}{}", db.0));
        Ok(Journal(OpenOptions::new().write(true).create(true).truncate(false).open(path)?))
    }

    /// The shards of a task that have a batch journal. One whose name file is damaged is left out.
    pub fn shards(&self, task: TaskId) -> Vec<ShardId> {
        let Ok(entries) = std::fs::read_dir(&self.0) else { return Vec::new() };
        let shards = entries.flatten().filter_map(|entry| {
            let file = entry.file_name();
            let file = file.to_str().filter(|file| file.starts_with(&task.to_string()) && file.ends_with(NAME))?;
            let shard = ShardId(std::fs::read_to_string(entry.path()).ok()?);
            (file == format!("{}{NAME}", Self::prefix(task, &shard))).then_some(shard)
        });
        shards.collect()
    }

    /// The line of each pass of a shard, by DB; `None`: it is damaged. A pass that has written nothing yet is left out.
    pub fn read(&self, task: TaskId, shard: &ShardId) -> BTreeMap<DbIndex, Option<JournalLine>> {
        let prefix = Self::prefix(task, shard);
        let Ok(entries) = std::fs::read_dir(&self.0) else { return BTreeMap::new() };
        let lines = entries.flatten().filter_map(|entry| {
            let db = entry.file_name().to_str()?.strip_prefix(&prefix)?.parse().ok()?;
            let bytes = std::fs::read(entry.path()).ok().filter(|bytes| !bytes.is_empty())?;
            Some((DbIndex(db), bytes.as_slice().try_into().ok().and_then(JournalLine::from_bytes)))
        });
        lines.collect()
    }

    /// Removes the journals of a task whose last checkpoint holds everything. Errors are ignored: a file that stays does no harm.
    pub fn forget(&self, task: TaskId) {
        let Ok(entries) = std::fs::read_dir(&self.0) else { return };
        let prefix = task.to_string();
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        // Fails, as intended, while journals of other tasks are in the folder.
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// The batch journal of one pass.
#[derive(Debug)]
pub struct Journal(File);

impl Journal {
    /// Overwrites the line.
    ///
    /// # Errors
    /// Any error of the file system; the old line is then intact, or the file is damaged.
    pub fn write(&self, figures: &PassFigures) -> io::Result<()> {
        self.0.write_all_at(&JournalLine::of(figures).to_bytes(), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::Timestamp;

    fn figures(position: ScanPosition, reclaimed: u64, batches: u64) -> PassFigures {
        PassFigures { position, reclaimed, batches, scanned: 9, touched: 1, ..PassFigures::default() }
    }

    #[test]
    fn the_last_line_is_read_back_and_only_moves_forward() {
        let dir = tempfile::tempdir().unwrap();
        let journals = JournalDir::beside(&dir.path().join("state.db"));
        let (task, shard, db) = (TaskId::at(Timestamp::now()), ShardId("unix:///a/b".into()), DbIndex(3));
        assert!(journals.read(task, &shard).is_empty());
        let journal = journals.open(task, &shard, db).unwrap();
        for position in [ScanPosition::NotStarted, ScanPosition::from_reply(7), ScanPosition::Finished] {
            let written = figures(position, 5, 2);
            journal.write(&written).unwrap();
            let line = journals.read(task, &shard)[&db];
            assert_eq!(line, Some(JournalLine::of(&written)));
        }
        assert_eq!(journals.shards(task), std::slice::from_ref(&shard));
        assert!(journals.shards(TaskId::at(Timestamp::now())).is_empty());
        let line = journals.read(task, &shard)[&db].unwrap();
        let mut older = figures(ScanPosition::from_reply(1), 1, 1);
        assert!(line.bring_forward(&mut older));
        assert_eq!((older.reclaimed, older.position), (5, ScanPosition::Finished));
        let mut newer = figures(ScanPosition::from_reply(1), 8, 3);
        assert!(!line.bring_forward(&mut newer));
        assert_eq!(newer.reclaimed, 8);
        journals.forget(task);
        assert!(journals.read(task, &shard).is_empty() && journals.shards(task).is_empty());
    }

    #[test]
    fn a_torn_line_is_no_line() {
        let whole = JournalLine::of(&figures(ScanPosition::from_reply(7), 5, 2)).to_bytes();
        for place in 0..LINE {
            let mut torn = whole;
            torn[place] ^= 0x40;
            assert_eq!(JournalLine::from_bytes(&torn), None, "byte {place}");
        }
        assert_eq!(JournalLine::from_bytes(&[0; LINE]), None);
    }
}
