//! Lap after lap over all DBs, at the pace that keeps a bound, until it is told to stop.

use std::time::Duration;

use tokio::time::Instant;

use crate::engine::policy::expiry_guard;
use crate::engine::policy::keep_pace::{CannotKeep, Keyspace};
use crate::engine::policy::ledger::Doing;
use crate::engine::sweep::shard::{End, ShardSweep};
use crate::model::format::grouped;
use crate::model::progress::ScanEventKind;
use crate::model::shard::{DbIndex, ScanPosition};
use crate::node::commands;
use crate::node::info::Info;

/// A server without keys that have a TTL is looked at again this often.
const EMPTY_EVERY: Duration = Duration::from_millis(250);

impl ShardSweep {
    /// Walks until a stop is ordered. Then the memory is looked at once more.
    pub(super) async fn keep_laps(&mut self, info: Info) -> Result<(), End> {
        let ended = self.laps(info).await;
        if let Some(keep) = &self.keep {
            self.reporter.say(ScanEventKind::Kept { figures: keep.pace.figures() }).await;
        }
        if let Err(End::Stopped(_)) = &ended
            && let Ok(info) = commands::info(self.session.conn()).await
        {
            let (memory, settling) = (info.memory(), Duration::ZERO);
            self.reporter.say(ScanEventKind::ShardFinished { memory, settling }).await;
        }
        ended
    }

    async fn laps(&mut self, mut info: Info) -> Result<(), End> {
        loop {
            self.lap(&info).await?;
            info = self.info().await?;
        }
    }

    /// One lap over the DBs that hold keys with a TTL.
    async fn lap(&mut self, info: &Info) -> Result<(), End> {
        let sizes = info.keyspace();
        let mut dbs: Vec<(DbIndex, u64)> = Vec::new();
        let mut keyspace = Keyspace::default();
        for db in self.choose_dbs(info) {
            let Some(size) = sizes.get(&db).filter(|size| size.expires > 0) else { continue };
            dbs.push((db, size.keys));
            keyspace.keys += size.keys;
            keyspace.expires += size.expires;
        }
        let all_keys: u64 = sizes.values().map(|size| size.keys).sum();
        let dataset = info.parsed::<f64>("used_memory_dataset");
        keyspace.bytes_per_key = dataset.map(|bytes| bytes / all_keys.max(1) as f64);
        if dbs.is_empty() {
            self.ledger.turn_to(Doing::Resting);
            let waited = self.wait(EMPTY_EVERY).await;
            self.ledger.turn_to(Doing::Exchanging);
            return waited;
        }
        let session = self.session.number;
        let Some(keep) = &mut self.keep else { return Ok(()) };
        let fastest = expiry_guard::fastest(&self.control.borrow().tuning);
        if let Some(cannot) = keep.pace.begin_lap(keyspace, fastest, Instant::now()) {
            self.reporter.warn(self.cannot_keep(&cannot)).await;
        }
        let mut before = 0.0;
        for (db, keys) in dbs {
            if let Some(keep) = &mut self.keep {
                let share = keys as f64 / keyspace.keys.max(1) as f64;
                keep.span = (before, share);
                keep.other_keys = keyspace.keys - keys;
                before += share;
            }
            self.sweep_db(db).await?;
            if let Some(figures) = self.job.shard.passes.get_mut(&db) {
                figures.checkpoint.position = ScanPosition::NotStarted;
            }
            if self.session.number != session {
                // What is where, only this process knows.
                return Ok(());
            }
        }
        if let Some(cannot) = self.keep.as_mut().and_then(|keep| keep.pace.end_lap(Instant::now())) {
            self.reporter.warn(self.cannot_keep(&cannot)).await;
        }
        Ok(())
    }

    fn cannot_keep(&self, cannot: &CannotKeep) -> String {
        let tuning = self.control.borrow().tuning;
        let ceiling = tuning.max_keys_per_sec.map(|keys| format!(", max-keys-per-sec {}", grouped(keys.into())));
        let backlog = self.keep.as_ref().map(|keep| keep.pace.figures()).and_then(|figures| figures.backlog);
        format!(
            "the bound cannot be kept within the limits: {} keys a second would have to be walked, and {} can be (intensity {:.2}{}){}. \
             It goes on as fast as it may",
            grouped(cannot.needed as u64),
            grouped(cannot.possible as u64),
            self.pacer.intensity(),
            ceiling.unwrap_or_default(),
            backlog.map(|keys| format!("; about {} expired keys are in memory", grouped(keys))).unwrap_or_default(),
        )
    }
}
