//! What the engine reports, and the one view of it that bar, status line, JSON, page and metrics render.
//!
//! The engine reports what happened as [`ScanEvent`]s. [`Snapshot::apply`] folds them, in order, into the present
//! state. An event about a pass holds everything that is known of the pass, so a reader that missed earlier ones has
//! missed nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::model::bounds::KeepFigures;
use crate::model::failure::Failure;
use crate::model::shard::{DbIndex, NodeAddr, RunId, ScanPosition, ShardId};
use crate::model::slots::CursorSpace;
use crate::model::throttle::Reason;

/// What a server says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerFacts {
    /// `Redis`, `Valkey`, or another name that INFO gives.
    pub product: String,
    /// The product's own version: of Valkey not the Redis version that it is compatible with.
    pub version: String,
    /// `run_id` of INFO: a restart changes it. Empty where INFO has none.
    pub run_id: RunId,
    /// The address at which it was reached.
    pub addr: NodeAddr,
}

/// How long batches held the master, in microseconds: the waits for their replies, scaled to the mean of `cmdstat_scan`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SliceSummary {
    /// Half of the batches were shorter.
    pub p50_us: u64,
    /// 99 of 100 batches were shorter.
    pub p99_us: u64,
    /// The longest batch since the pass began, or since it went on.
    pub max_us: u64,
}

/// Upper bounds in seconds of the classes of [`TtlHistogram`]: a minute, ten, an hour, six, a day, a week.
pub const TTL_BOUNDS_S: [u64; 6] = [60, 600, 3_600, 21_600, 86_400, 604_800];

/// How soon the touched keys expire, as a number of keys for each time span. Filled where `touch` is `ttl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TtlHistogram {
    /// Keys whose remaining time is at most the bound of the same index, and above the bound before.
    pub within: [u64; TTL_BOUNDS_S.len()],
    /// Keys that live longer than the last bound.
    pub later: u64,
    /// Keys without a TTL: they never expire.
    pub never: u64,
}

impl TtlHistogram {
    /// Counts one key by its reply to TTL: seconds left, or -1 for a key without a TTL. A key that is gone (-2) is not
    /// counted.
    pub fn add(&mut self, ttl_s: i64) {
        match u64::try_from(ttl_s) {
            Ok(left) => match TTL_BOUNDS_S.iter().position(|&bound| left <= bound) {
                Some(class) => self.within[class] += 1,
                None => self.later += 1,
            },
            Err(_) if ttl_s == -1 => self.never += 1,
            Err(_) => {}
        }
    }

    /// Adds another histogram to this one.
    pub fn merge(&mut self, other: &Self) {
        for (sum, n) in self.within.iter_mut().zip(other.within) {
            *sum += n;
        }
        self.later += other.later;
        self.never += other.never;
    }

    /// Whether no key was counted.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What is known of the pass over one DB of one shard.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PassFigures {
    /// Where the pass is, for whoever goes on with it.
    pub checkpoint: PassCheckpoint,
    /// What it has done, from its beginning on, over all processes that had a part in it.
    pub counters: PassCounters,
    /// How it goes at this moment.
    pub gauges: PassGauges,
}

/// What a pass needs to go on.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PassCheckpoint {
    /// How far the pass is.
    pub position: ScanPosition,
    /// The server process that the position belongs to: [`RunId::fingerprint`].
    pub process: Option<u64>,
    /// How to read the position.
    pub space: CursorSpace,
    /// DBSIZE when the pass began.
    pub keys_at_start: u64,
    /// `expired_keys` of the server when INFO was last read: the keys that it freed since are the most that a process
    /// that was killed can have left uncounted.
    pub server_expired: Option<u64>,
}

/// What a pass has done. Nothing of it becomes less.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PassCounters {
    /// Keys that SCAN scanned: those returned and those reclaimed.
    pub scanned: u64,
    /// Expired keys reclaimed by SCAN and by the touch: the exact difference of DBSIZE around each.
    pub reclaimed: u64,
    /// Keys that were asked for with EXISTS or TTL.
    pub touched: u64,
    /// Of the touched keys, those that had expired although SCAN had returned them.
    pub found_by_touch: u64,
    /// SCANs that the server answered; a SCAN whose reply was lost is in `lost_replies`.
    pub batches: u64,
    /// Of those, SCANs without names in the answer. The number of keys that they scanned is estimated, by the share of
    /// the table that they walked.
    pub nameless: u64,
    /// Batches whose reply was lost with the connection; after a kill, also those that may have been under way. What such a batch
    /// reclaimed is not in `reclaimed`.
    pub lost_replies: u64,
    /// How often the pass began again, because another server process answered or names had to be read.
    pub restarts: u64,
    /// Time in which batches held the master.
    pub active: Duration,
    /// Time rested for the intensity and the ceiling.
    pub rested: Duration,
    /// Time that is neither active nor rested nor held: replies were on their way, or the sweep did its own work.
    pub waited: Duration,
    /// Time in which the sweep held and sent no batch, by reason.
    pub held: BTreeMap<Reason, Duration>,
    /// Remaining TTLs of the touched keys, where `touch` is `ttl`.
    pub ttl: TtlHistogram,
}

/// How a pass goes at this moment.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PassGauges {
    /// Batches that may be under way: sent and not counted yet. Stored in the batch journal only.
    pub under_way: u64,
    /// How long the batches were.
    pub slice: SliceSummary,
    /// COUNT of the next batch.
    pub count: u32,
    /// Share of the master's time that batches take.
    pub intensity: f64,
    /// Server time of one SCAN in microseconds, from `cmdstat_scan`; other clients' SCANs are in it. `None` while
    /// unknown.
    pub server_us_per_scan: Option<f64>,
}

impl PassCheckpoint {
    /// Share of the pass that is done, in `[0, 1]`.
    pub fn fraction(&self) -> f64 {
        self.space.fraction(self.position)
    }
}

impl PassCounters {
    /// Time held for all reasons together.
    pub fn held_total(&self) -> Duration {
        self.held.values().sum()
    }
}

/// Time that passes were held, by reason.
pub fn held_by_reason<'a>(passes: impl IntoIterator<Item = &'a PassCounters>) -> BTreeMap<Reason, Duration> {
    let mut held = BTreeMap::new();
    for (reason, time) in passes.into_iter().flat_map(|pass| &pass.held) {
        *held.entry(*reason).or_default() += *time;
    }
    held
}

/// Whether keys are touched, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TouchOutcome {
    /// No batch has been done yet.
    #[default]
    NotNeededYet,
    /// Neither SCAN nor the audit met an expired key.
    NothingExpired,
    /// The settings ask for no touch.
    Off,
    /// The settings ask for a touch of each key.
    Asked,
    /// The audit found that SCAN reclaims the expired keys that it meets.
    ScanReclaims,
    /// The audit found expired keys that SCAN returned and did not reclaim: every key is touched.
    ScanLeavesExpired,
    /// The user has no right to EXISTS or TTL: there was no audit.
    NoRight,
}

impl TouchOutcome {
    /// One sentence for the report.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::NotNeededYet => "no batch was done",
            Self::NothingExpired => "audited: no expired key was met",
            Self::Off => "no key was touched, as asked",
            Self::Asked => "every key was touched, as asked",
            Self::ScanReclaims => "audited: SCAN frees the expired keys that it meets, no touch needed",
            Self::ScanLeavesExpired => "audited: SCAN left expired keys in memory, so every key was touched",
            Self::NoRight => "not audited: the server refuses EXISTS",
        }
    }
}

/// Something that happened to a shard. The engine sends events in order, to one recorder.
#[derive(Debug, Clone, PartialEq)]
pub struct ScanEvent {
    /// The shard that the event is about.
    pub shard: ShardId,
    /// The kind of the event, with its facts.
    pub what: ScanEventKind,
}

/// What INFO shows of a server's memory.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Memory {
    /// `used_memory` in bytes: what the allocator has given out.
    pub used: Option<u64>,
    /// `used_memory_rss` in bytes: what the operating system has given the process.
    pub rss: Option<u64>,
    /// `maxmemory` in bytes; 0: no limit.
    pub max: Option<u64>,
    /// `evicted_keys`: since the server started, to stay below `maxmemory`.
    pub evicted: Option<u64>,
}

/// The kinds of [`ScanEvent`], each with what a reader needs to render it.
#[derive(Debug, Clone, PartialEq)]
pub enum ScanEventKind {
    /// The shard is part of the sweep. Its turn may come later.
    ShardFound {
        /// The address of its master.
        addr: NodeAddr,
    },
    /// The shard's master was reached and may be swept.
    ShardStarted {
        /// The server as INFO describes it.
        server: ServerFacts,
        /// Its memory before the first batch.
        memory: Memory,
        /// The DBs that will be swept, in order.
        dbs: Vec<DbIndex>,
    },
    /// Something that an operator should know and that does not stop the sweep.
    Warned {
        /// What was seen, why it matters, what to do.
        message: String,
    },
    /// Another process answers at the master's address.
    ServerChanged {
        /// The process that answers now, as INFO describes it.
        server: ServerFacts,
    },
    /// A pass began, or went on from a checkpoint.
    PassStarted {
        /// The DB that the pass walks.
        db: DbIndex,
        /// The pass as it begins: not empty where it goes on from a checkpoint.
        figures: PassFigures,
    },
    /// Batches were done. Sent a few times a second, however many batches there are.
    Progressed {
        /// The DB that the pass walks.
        db: DbIndex,
        /// The pass as it is now.
        figures: PassFigures,
    },
    /// A pass had to begin again.
    PassRestarted {
        /// The DB that the pass walks.
        db: DbIndex,
        /// The reason as a sentence without a full stop.
        why: String,
        /// The pass, back at its beginning.
        figures: PassFigures,
    },
    /// A pass has come to the end of its DB.
    PassFinished {
        /// The DB that the pass walked.
        db: DbIndex,
        /// The pass at its end.
        figures: PassFigures,
    },
    /// The sweep of this shard began to hold.
    HoldStarted {
        /// Why it holds, for metrics and records.
        reason: Reason,
        /// The facts, such as the load and its limit.
        detail: Option<String>,
    },
    /// The hold is over, and batches may be sent again.
    HoldEnded {
        /// The reason with which the hold began.
        reason: Reason,
        /// How long the hold lasted.
        lasted: Duration,
    },
    /// How well a keep run keeps to its bounds. Sent with the progress.
    Kept {
        /// The numbers as they are now.
        figures: KeepFigures,
    },
    /// It was decided whether keys are touched.
    TouchDecided {
        /// What was decided, and why.
        outcome: TouchOutcome,
    },
    /// Every pass of the shard is complete.
    ShardFinished {
        /// Its memory after the objects that waited to be freed in the background were freed.
        memory: Memory,
        /// How long that was waited for.
        settling: Duration,
    },
    /// The shard's sweep ended early.
    ShardEnded {
        /// What went wrong, and what to do about it.
        failure: Failure,
    },
}

/// One shard as it is now.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ShardView {
    /// The server; `None` until it was reached.
    pub server: Option<ServerFacts>,
    /// The DBs to sweep, in order.
    pub dbs: Vec<DbIndex>,
    /// The pass over each DB that was begun.
    pub passes: BTreeMap<DbIndex, PassFigures>,
    /// The DB that is being swept.
    pub current: Option<DbIndex>,
    /// Why it holds now; `None`: it does not.
    pub hold: Option<Reason>,
    /// The facts of the hold, such as the load and its limit.
    pub hold_detail: Option<String>,
    /// How well a keep run keeps to its bounds here; `None` for a sweep.
    pub keep: Option<KeepFigures>,
    /// Whether keys are touched, and why.
    pub touch: TouchOutcome,
    /// What an operator should know, at most `MAX_WARNINGS` sentences.
    pub warnings: Vec<String>,
    /// Memory before the first batch.
    pub memory_before: Memory,
    /// Memory after the last batch; unknown until then.
    pub memory_after: Memory,
    /// Time waited after the last batch for objects that are freed in the background.
    pub settling: Duration,
    /// Whether every pass is complete.
    pub finished: bool,
    /// Why it ended early; `None`: it did not.
    pub failure: Option<Failure>,
}

/// The least number of bytes freed that is told from other changes of the memory.
const WORTH_A_WORD: u64 = 4 << 20;

/// The most warnings that are kept for a shard, so that long trouble cannot fill the memory.
const MAX_WARNINGS: usize = 20;

impl ShardView {
    /// Keys that were evicted from the first batch to the last, where the server shows it. A server that was restarted
    /// meanwhile has forgotten those before the restart.
    pub fn evicted(&self) -> Option<u64> {
        self.memory_after.evicted.zip(self.memory_before.evicted).map(|(after, before)| after.saturating_sub(before))
    }

    /// Bytes of the freed memory that the allocator kept; `None` unless more than half of a notable amount did not
    /// return to the operating system.
    pub fn kept_by_allocator(&self) -> Option<u64> {
        let freed = self.memory_before.used?.checked_sub(self.memory_after.used?)?;
        let returned = self.memory_before.rss?.saturating_sub(self.memory_after.rss?);
        (freed >= WORTH_A_WORD && returned < freed / 2).then(|| freed - returned)
    }

    /// Why it holds, as people read it: the reason's sentence with the facts.
    pub fn hold_text(&self) -> Option<String> {
        let reason = self.hold?;
        Some(match &self.hold_detail {
            Some(detail) => format!("{}: {detail}", reason.sentence()),
            None => reason.sentence().to_owned(),
        })
    }

    /// Adds a warning, unless it is there already or there are too many.
    pub fn warn(&mut self, message: String) {
        if self.warnings.len() < MAX_WARNINGS && !self.warnings.contains(&message) {
            self.warnings.push(message);
        }
    }
}

/// The one view of a running or ended task.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Snapshot {
    /// Every shard, by name. One view shares shards that did not change with the next.
    pub shards: BTreeMap<ShardId, Arc<ShardView>>,
    /// When the sweep began; `None`: it has not.
    pub started_at: Option<Timestamp>,
    /// Why it has not begun; `None`: it has, or may.
    pub waits: Option<Reason>,
}

impl Snapshot {
    /// Applies one event. Events of one shard must come in the order in which they happened.
    pub fn apply(&mut self, event: ScanEvent) {
        let shard = Arc::make_mut(self.shards.entry(event.shard).or_default());
        match event.what {
            // A shard that ended and is swept again has not ended.
            ScanEventKind::ShardFound { .. } => (shard.failure, shard.finished) = (None, false),
            ScanEventKind::ShardStarted { server, memory, dbs } => {
                let same = shard.server.as_ref().is_some_and(|before| before.run_id == server.run_id);
                if !same || shard.memory_before == Memory::default() {
                    shard.memory_before = memory;
                }
                shard.server = Some(server);
                shard.dbs = dbs;
            }
            ScanEventKind::Warned { message } => shard.warn(message),
            ScanEventKind::ServerChanged { server } => {
                shard.server = Some(server);
                // The memory of another process.
                shard.memory_before = Memory::default();
            }
            ScanEventKind::PassStarted { db, figures } | ScanEventKind::Progressed { db, figures } => {
                shard.current = Some(db);
                shard.passes.insert(db, figures);
            }
            ScanEventKind::PassRestarted { db, why, figures } => {
                shard.passes.insert(db, figures);
                shard.warn(format!("{db}: the pass began again: {why}"));
            }
            ScanEventKind::PassFinished { db, figures } => {
                shard.passes.insert(db, figures);
                shard.current = None;
            }
            ScanEventKind::HoldStarted { reason, detail } => (shard.hold, shard.hold_detail) = (Some(reason), detail),
            ScanEventKind::HoldEnded { .. } => (shard.hold, shard.hold_detail) = (None, None),
            ScanEventKind::Kept { figures } => shard.keep = Some(figures),
            ScanEventKind::TouchDecided { outcome } => shard.touch = outcome,
            ScanEventKind::ShardFinished { memory, settling } => {
                shard.finished = true;
                shard.memory_after = memory;
                shard.settling = settling;
            }
            ScanEventKind::ShardEnded { failure } => {
                shard.hold = None;
                shard.failure = Some(failure);
            }
        }
    }

    /// Clears holds and the current DBs: the task has ended, or is left to the next process.
    pub fn end(&mut self) {
        self.waits = None;
        for shard in self.shards.values_mut().map(Arc::make_mut) {
            (shard.hold, shard.hold_detail, shard.current) = (None, None, None);
        }
    }

    /// Every pass of every shard.
    pub fn passes(&self) -> impl Iterator<Item = &PassFigures> {
        self.shards.values().flat_map(|s| s.passes.values())
    }

    /// The counters of every pass of every shard.
    pub fn counters(&self) -> impl Iterator<Item = &PassCounters> {
        self.passes().map(|pass| &pass.counters)
    }

    /// Expired keys reclaimed so far.
    pub fn reclaimed(&self) -> u64 {
        self.counters().map(|pass| pass.reclaimed).sum()
    }

    /// Expired keys in memory, as a keep run estimates them; `None` where it does not know all masters yet, and for a
    /// sweep.
    pub fn backlog(&self) -> Option<u64> {
        let known: Option<Vec<u64>> = self.shards.values().map(|shard| shard.keep?.backlog).collect();
        known.filter(|known| !known.is_empty()).map(|known| known.iter().sum())
    }

    /// Keys that the masters evicted between the end of this sweep and the beginning of a later one; `None` where a
    /// master does not tell, was restarted meanwhile or is not in the later sweep.
    pub fn evicted_until(&self, later: &Self) -> Option<u64> {
        let of = |(id, shard): (&ShardId, &Arc<ShardView>)| {
            let before = shard.memory_after.evicted?;
            later.shards.get(id)?.memory_before.evicted?.checked_sub(before)
        };
        let known: Option<Vec<u64>> = self.shards.iter().map(of).collect();
        known.filter(|known| !known.is_empty()).map(|known| known.iter().sum())
    }

    /// Keys scanned so far, over all passes of all shards.
    pub fn scanned(&self) -> u64 {
        self.counters().map(|pass| pass.scanned).sum()
    }

    /// Batches whose reply was lost.
    pub fn lost_replies(&self) -> u64 {
        self.counters().map(|pass| pass.lost_replies).sum()
    }

    /// Share of the sweep that is done, 0 to 1, weighted by the keys of each DB of each shard that is known so far.
    pub fn fraction(&self) -> f64 {
        let (mut done, mut all) = (0.0, 0.0);
        for shard in self.shards.values() {
            for pass in shard.passes.values() {
                let weight = pass.checkpoint.keys_at_start.max(1) as f64;
                done += weight * pass.checkpoint.fraction();
                all += weight;
            }
            // The size of a DB that was not begun is unknown here: it counts as the mean of the others.
            let known = shard.passes.len();
            let to_come = shard.dbs.iter().filter(|db| !shard.passes.contains_key(db)).count();
            let weights: f64 = shard.passes.values().map(|pass| pass.checkpoint.keys_at_start.max(1) as f64).sum();
            all += to_come as f64 * if known == 0 { 1.0 } else { weights / known as f64 };
        }
        if all > 0.0 { done / all } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ttls_are_filed_by_their_upper_bound() {
        let mut histogram = TtlHistogram::default();
        for ttl in [-2, -1, 0, 60, 61, 604_800, 604_801] {
            histogram.add(ttl);
        }
        assert_eq!(histogram.within, [2, 1, 0, 0, 0, 1]);
        assert_eq!((histogram.later, histogram.never), (1, 1));
    }

    #[test]
    fn warnings_are_bounded_and_said_once() {
        let mut snapshot = Snapshot::default();
        let shard = ShardId("a".into());
        for n in 0..100 {
            for _ in 0..2 {
                let what = ScanEventKind::Warned { message: format!("w{n}") };
                snapshot.apply(ScanEvent { shard: shard.clone(), what });
            }
        }
        assert_eq!(snapshot.shards[&shard].warnings.len(), MAX_WARNINGS);
    }
}
