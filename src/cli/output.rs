//! What a command prints: text on stdout, notes on stderr, and the summary of a task.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::time::Duration;

pub(super) use crate::model::format::{bytes, counted, failure_text, grouped, span, table};
use crate::model::progress::{ShardView, TTL_BOUNDS_S, TtlHistogram, held_by_reason};
use crate::model::task::TaskState;
use crate::tasks::TaskView;

/// Writes to stdout. A closed pipe is success: the reader has read enough.
///
/// # Errors
/// Any other error of stdout.
pub(super) fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Writes a line to stderr. An error is ignored: there is no other place to report it.
pub(super) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// An error with its causes, separated by colons. A cause whose text is already in the message is left out.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut causes = vec![error.to_string()];
    let mut inner = error.source();
    while let Some(cause) = inner {
        let text = cause.to_string();
        if !causes.iter().any(|before| before.contains(&text)) {
            causes.push(text);
        }
        inner = cause.source();
    }
    causes.join(": ")
}

/// The summary of a task that has ended or was interrupted, for a terminal.
pub(super) fn summary(view: &TaskView) -> String {
    let mut text = String::new();
    let task = &view.task;
    // The failure of the only shard is also the task's, which is printed at the end.
    let alone = view.snapshot.shards.len() == 1;
    for (shard, shard_view) in &view.snapshot.shards {
        match (&shard_view.server, &shard_view.failure) {
            (Some(server), _) => {
                let addr = server.addr.to_string();
                // Shards of a cluster or behind sentinels have names of their own: the address is printed beside them.
                let at = if addr == shard.0 { String::new() } else { format!("  {addr}") };
                let _ = writeln!(text, "{shard}{at}  {} {}", server.product, server.version);
                text.push_str(&pass_table(shard_view));
                text.push_str(&shard_lines(shard_view));
            }
            (None, Some(_)) if !alone => {
                let _ = writeln!(text, "{shard}  not reached");
            }
            (None, _) => continue,
        }
        if let (false, Some(failure)) = (alone, &shard_view.failure) {
            let _ = writeln!(text, "{}", failure_text(failure));
        }
        text.push('\n');
    }
    let elapsed = task.started_at.map(|start| {
        let end = task.finished_at.unwrap_or_else(jiff::Timestamp::now);
        Duration::try_from(end.duration_since(start)).unwrap_or_default()
    });
    let word = match task.state {
        TaskState::Succeeded => "done",
        TaskState::Cancelled => "cancelled",
        TaskState::Failed => "failed",
        TaskState::Interrupted => "interrupted",
        TaskState::Waiting | TaskState::Running | TaskState::Paused => "not ended",
    };
    let _ = writeln!(
        text,
        "{word}: {} expired keys reclaimed, {} keys scanned, in {}",
        grouped(view.snapshot.reclaimed()),
        grouped(view.snapshot.scanned()),
        span(elapsed.unwrap_or_default()),
    );
    if view.snapshot.lost_replies() > 0 {
        let _ = writeln!(
            text,
            "the replies of up to {} were lost with a connection or a killed process; the keys that those reclaimed are not counted",
            counted(view.snapshot.lost_replies() as usize, "batch")
        );
    }
    if let Some(note) = &task.note {
        let _ = writeln!(text, "note: {note}");
    }
    text
}

fn pass_table(shard: &ShardView) -> String {
    if shard.passes.is_empty() {
        return "no DB holds keys with a TTL: nothing to sweep\n".to_owned();
    }
    let heading = [
        "",
        "done",
        "scanned",
        "reclaimed",
        "touched",
        "batches",
        "active",
        "waited",
        "rested",
        "held",
        "slice p50",
        "p99",
        "max",
    ];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for (db, figures) in &shard.passes {
        let us = |us: u64| if figures.counters.batches == 0 { "-".to_owned() } else { format!("{us}us") };
        rows.push(vec![
            db.to_string(),
            format!("{:.0}%", figures.checkpoint.fraction() * 100.0),
            grouped(figures.counters.scanned),
            grouped(figures.counters.reclaimed),
            grouped(figures.counters.touched),
            grouped(figures.counters.batches),
            span(figures.counters.active),
            span(figures.counters.waited),
            span(figures.counters.rested),
            span(figures.counters.held_total()),
            us(figures.gauges.slice.p50_us),
            us(figures.gauges.slice.p99_us),
            us(figures.gauges.slice.max_us),
        ]);
    }
    table(&rows)
}

fn shard_lines(shard: &ShardView) -> String {
    let mut text = String::new();
    if let (Some(before), Some(after)) = (shard.memory_before.used, shard.memory_after.used) {
        let change = if after <= before {
            format!("{} less", bytes(before - after))
        } else {
            format!("{} more", bytes(after - before))
        };
        let limit = shard.memory_before.max.filter(|max| *max > 0).map(|max| format!("; maxmemory is {}", bytes(max)));
        let (before, after, limit) = (bytes(before), bytes(after), limit.unwrap_or_default());
        let _ = writeln!(text, "used memory: {before} before, {after} after ({change}){limit}");
    }
    if let (Some(before), Some(after)) = (shard.memory_before.rss, shard.memory_after.rss) {
        let ratio = |rss: u64, used: Option<u64>| used.filter(|used| *used > 0).map(|used| rss as f64 / used as f64);
        let ratio = |rss, used| ratio(rss, used).map(|ratio| format!(", {ratio:.2} of used")).unwrap_or_default();
        let _ = writeln!(
            text,
            "resident memory: {} before{}, {} after{}",
            bytes(before),
            ratio(before, shard.memory_before.used),
            bytes(after),
            ratio(after, shard.memory_after.used)
        );
    }
    if let Some(kept) = shard.kept_by_allocator() {
        let _ = writeln!(
            text,
            "note: {} of the freed memory stays with the process and is used for new keys: the allocator returns whole pages only, and most \
             of them still hold other keys. MEMORY PURGE returns the empty ones; activedefrag moves keys together",
            bytes(kept)
        );
    }
    if let Some(evicted) = shard.evicted().filter(|keys| *keys > 0) {
        let _ = writeln!(
            text,
            "evicted meanwhile: {} keys, to stay below maxmemory; they are not counted as reclaimed",
            grouped(evicted)
        );
    }
    if let Some(keep) = &shard.keep {
        let _ = writeln!(
            text,
            "kept: {}, which took {} of the server's time; a bound was missed for {}",
            counted(keep.laps as usize, "lap"),
            span(shard.passes.values().map(|figures| figures.counters.active).sum()),
            span(keep.missed)
        );
    }
    let _ = writeln!(text, "touch: {}", shard.touch.sentence());
    let nameless: u64 = shard.passes.values().map(|figures| figures.counters.nameless).sum();
    if nameless > 0 {
        let batches = shard.passes.values().map(|figures| figures.counters.batches).sum();
        let _ = writeln!(
            text,
            "payload: {} of {} batches came without names; their number of scanned keys is an estimate, that of reclaimed keys is exact",
            grouped(nameless),
            grouped(batches)
        );
    }
    let mut ttl = TtlHistogram::default();
    shard.passes.values().for_each(|figures| ttl.merge(&figures.counters.ttl));
    for (reason, time) in held_by_reason(shard.passes.values().map(|pass| &pass.counters)) {
        let _ = writeln!(text, "held {}: {}", span(time), reason.sentence());
    }
    if !ttl.is_empty() {
        text.push_str(&ttl_table(&ttl));
    }
    for warning in &shard.warnings {
        let _ = writeln!(text, "warning: {warning}");
    }
    text
}

fn ttl_table(ttl: &TtlHistogram) -> String {
    let names = ["1 minute", "10 minutes", "1 hour", "6 hours", "1 day", "7 days"];
    debug_assert_eq!(names.len(), TTL_BOUNDS_S.len());
    let mut rows = vec![vec!["keys expire within".to_owned(), "keys".to_owned()]];
    for (name, keys) in names.iter().zip(ttl.within) {
        rows.push(vec![format!("  {name}"), grouped(keys)]);
    }
    rows.push(vec!["  later".to_owned(), grouped(ttl.later)]);
    rows.push(vec!["  never".to_owned(), grouped(ttl.never)]);
    table(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::failure::{Failure, FailureKind};
    use crate::model::progress::{
        Memory, PassCheckpoint, PassCounters, PassFigures, PassGauges, ScanEvent, ScanEventKind, ServerFacts,
        SliceSummary, Snapshot, TouchOutcome,
    };
    use crate::model::shard::{DbIndex, NodeAddr, RunId, ScanPosition, ShardId};
    use crate::model::task::{Cause, Task, TaskId};
    use crate::model::throttle::Reason;

    /// A task that ended, with every figure set.
    fn view() -> TaskView {
        let shard = ShardId("127.0.0.1:6379".into());
        let mut snapshot = Snapshot::default();
        let mut figures = PassFigures {
            checkpoint: PassCheckpoint {
                position: ScanPosition::Finished,
                keys_at_start: 1_000_000,
                ..PassCheckpoint::default()
            },
            counters: PassCounters {
                scanned: 1_000_123,
                reclaimed: 82_000,
                touched: 400,
                batches: 13_335,
                active: Duration::from_millis(1100),
                waited: Duration::from_millis(180),
                rested: Duration::from_millis(20),
                ..PassCounters::default()
            },
            gauges: PassGauges { slice: SliceSummary { p50_us: 71, p99_us: 96, max_us: 412 }, ..PassGauges::default() },
        };
        figures.counters.held.insert(Reason::Reconnecting, Duration::from_millis(350));
        figures.counters.ttl.add(30);
        figures.counters.ttl.add(-1);
        let what = [
            ScanEventKind::ShardStarted {
                server: ServerFacts {
                    product: "Redis".into(),
                    version: "7.0.15".into(),
                    run_id: RunId("r".into()),
                    addr: NodeAddr::Tcp { host: "127.0.0.1".into(), port: 6379 },
                },
                memory: Memory { used: Some(96 << 20), rss: Some(120 << 20), max: Some(100 << 20), evicted: Some(70) },
                dbs: vec![DbIndex(0)],
            },
            ScanEventKind::TouchDecided { outcome: TouchOutcome::ScanReclaims },
            ScanEventKind::PassFinished { db: DbIndex(0), figures },
            ScanEventKind::Warned { message: "a thing to know".into() },
            ScanEventKind::ShardFinished {
                memory: Memory { used: Some(88 << 20), rss: Some(119 << 20), max: Some(100 << 20), evicted: Some(77) },
                settling: Duration::from_millis(100),
            },
        ];
        for what in what {
            snapshot.apply(ScanEvent { shard: shard.clone(), what });
        }
        let start = jiff::Timestamp::from_second(1_700_000_000).unwrap();
        let task = Task {
            id: TaskId(uuid::Uuid::nil()),
            instance_id: "i".into(),
            project_id: String::new(),
            sweep: Default::default(),
            respect_window: false,
            target: "redis://127.0.0.1:6379".into(),
            cause: Cause::Cli,
            state: TaskState::Succeeded,
            created_at: start,
            started_at: Some(start),
            finished_at: Some(start + Duration::from_millis(1500)),
            num: 82_000,
            spent: Duration::ZERO,
            failure: None,
            note: None,
            owner: None,
            fence: 0,
            place: String::new(),
        };
        TaskView { task, snapshot }
    }

    #[test]
    fn the_summary_shows_every_figure() {
        insta::assert_snapshot!(summary(&view()));
    }

    #[test]
    fn the_json_is_the_contracts_record_with_a_report_beside_it() {
        let view = view();
        let raw = crate::settings::raw::Raw::defaults();
        let settings = crate::settings::resolve(&raw, None).unwrap().scan;
        let output = crate::api::dto::ScanOutput {
            record: (&view.task).into(),
            report: crate::api::dto::Report::new(&view.task, &view.snapshot, &settings),
        };
        insta::assert_snapshot!(serde_json::to_string_pretty(&output).unwrap());
    }

    #[test]
    fn an_error_says_what_and_what_next() {
        let failure = Failure::new(FailureKind::NotAMaster, "the server is a replica").hint("sweep its master");
        assert_eq!(failure_text(&failure), "error: the server is a replica\n  hint: sweep its master");
    }

    #[test]
    fn numbers_are_shown_for_people() {
        assert_eq!([grouped(0), grouped(999), grouped(1000), grouped(1_234_567)], ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([bytes(0), bytes(1023), bytes(1536), bytes(5 << 30)], ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]);
        let spans = [0, 850, 12_345, 250_000, 7_380_000].map(|ms| span(Duration::from_millis(ms)));
        assert_eq!(spans, ["0s", "850ms", "12.3s", "4m 10s", "2h 03m"]);
    }
}
