//! The stored report of a shard: everything that its view shows and that has no column of its own.
//!
//! A checkpoint needs only the columns; the report is for people. It is one JSON text with a version. A text of another
//! version is ignored: the task can still be resumed from the columns, and its view lacks what the report would have shown.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::bounds::KeepFigures;
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::{Memory, PassFigures, ServerFacts, ShardView, TTL_BOUNDS_S, TouchOutcome, TtlHistogram};
use crate::model::shard::{DbIndex, NodeAddr, RunId};
use crate::model::slots::{CursorSpace, SlotSet};

/// The version of the text. Raise it when a field changes its meaning; a new field only needs `#[serde(default)]`.
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct StoredReport {
    version: u32,
    server: Option<StoredServer>,
    dbs: Vec<u32>,
    #[serde(with = "StoredTouch")]
    touch: TouchOutcome,
    warnings: Vec<String>,
    #[serde(with = "StoredMemory")]
    memory_before: Memory,
    #[serde(with = "StoredMemory")]
    memory_after: Memory,
    settling: Duration,
    finished: bool,
    failure: Option<StoredFailure>,
    /// Why the shard was held when this was written, with details, for readers on other daemons than the task's owner.
    #[serde(default)]
    hold: Option<String>,
    #[serde(default)]
    hold_detail: Option<String>,
    #[serde(default)]
    keep: Option<KeepFigures>,
    passes: BTreeMap<u32, StoredPass>,
}

#[derive(Debug, Serialize, Deserialize)]
struct StoredServer {
    product: String,
    version: String,
    run_id: String,
    #[serde(with = "StoredAddr")]
    addr: NodeAddr,
}

/// The stored form of an address.
#[derive(Serialize, Deserialize)]
#[serde(remote = "NodeAddr", rename_all = "snake_case")]
pub(super) enum StoredAddr {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "TouchOutcome", rename_all = "snake_case")]
enum StoredTouch {
    NotNeededYet,
    #[serde(rename = "nothing_dead")]
    NothingExpired,
    Off,
    Asked,
    ScanReclaims,
    #[serde(rename = "scan_leaves_dead")]
    ScanLeavesExpired,
    NoRight,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Memory")]
struct StoredMemory {
    used: Option<u64>,
    #[serde(default)]
    rss: Option<u64>,
    max: Option<u64>,
    evicted: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
struct StoredFailure {
    kind: String,
    message: String,
    hint: Option<String>,
}

/// What is stored of a pass and has no column.
#[derive(Debug, Serialize, Deserialize)]
struct StoredPass {
    waited: Duration,
    nameless: u64,
    count: u32,
    intensity: f64,
    server_us_per_scan: Option<f64>,
    #[serde(default)]
    server_expired: Option<u64>,
    /// The ranges of slots that the cursors go through; `None`: the DB is one table.
    slots: Option<Vec<(u16, u16)>>,
    #[serde(with = "StoredTtl")]
    ttl: TtlHistogram,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "TtlHistogram")]
struct StoredTtl {
    within: [u64; TTL_BOUNDS_S.len()],
    later: u64,
    never: u64,
}

/// The report of a shard as JSON.
pub(super) fn to_json(view: &ShardView) -> String {
    let report = StoredReport {
        version: VERSION,
        server: view.server.as_ref().map(|server| StoredServer {
            product: server.product.clone(),
            version: server.version.clone(),
            run_id: server.run_id.0.clone(),
            addr: server.addr.clone(),
        }),
        dbs: view.dbs.iter().map(|db| db.0).collect(),
        touch: view.touch,
        warnings: view.warnings.clone(),
        memory_before: view.memory_before,
        memory_after: view.memory_after,
        settling: view.settling,
        finished: view.finished,
        failure: view.failure.as_ref().map(|failure| StoredFailure {
            kind: failure.kind.to_string(),
            message: failure.message.clone(),
            hint: failure.hint.clone(),
        }),
        hold: view.hold.map(|reason| reason.to_string()),
        hold_detail: view.hold_detail.clone(),
        keep: view.keep,
        passes: view.passes.iter().map(|(db, figures)| (db.0, StoredPass::of(figures))).collect(),
    };
    serde_json::to_string(&report).unwrap_or_default()
}

/// Memory and backlog of one shard as its newest checkpoint has them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct ShardLastSeen {
    /// `used_memory` in bytes after the sweep, else before it.
    pub(super) used_memory: Option<u64>,
    /// Expired keys in memory as a keep run estimates them.
    pub(super) backlog: Option<u64>,
}

/// Reads memory and backlog from a stored report, without the rest of it. A text of another version gives nothing.
pub(super) fn last_seen(json: &str) -> ShardLastSeen {
    #[derive(Deserialize)]
    struct Seen {
        version: u32,
        #[serde(with = "StoredMemory")]
        memory_before: Memory,
        #[serde(with = "StoredMemory")]
        memory_after: Memory,
        #[serde(default)]
        keep: Option<KeepFigures>,
    }
    match serde_json::from_str::<Seen>(json) {
        Ok(seen) if seen.version == VERSION => ShardLastSeen {
            used_memory: seen.memory_after.used.or(seen.memory_before.used),
            backlog: seen.keep.and_then(|keep| keep.backlog),
        },
        _ => ShardLastSeen::default(),
    }
}

/// Completes a view, whose passes have the values of their columns, by a stored report. A text that cannot be read changes nothing.
pub(super) fn complete(view: &mut ShardView, json: &str) {
    #[derive(Deserialize)]
    struct VersionOnly {
        version: u32,
    }
    let version = serde_json::from_str::<VersionOnly>(json).map(|text| text.version);
    if version.as_ref().is_ok_and(|version| *version != VERSION) {
        return;
    }
    let report: StoredReport = match serde_json::from_str(json) {
        Ok(report) => report,
        Err(error) => {
            tracing::warn!(%error, "cannot read the stored report of a shard; its checkpoint is used without it");
            return;
        }
    };
    view.server = report.server.map(|server| ServerFacts {
        product: server.product,
        version: server.version,
        run_id: RunId(server.run_id),
        addr: server.addr,
    });
    view.dbs = report.dbs.into_iter().map(DbIndex).collect();
    view.touch = report.touch;
    view.warnings = report.warnings;
    (view.memory_before, view.memory_after) = (report.memory_before, report.memory_after);
    view.settling = report.settling;
    view.finished = report.finished;
    view.failure = report.failure.and_then(|failure| {
        let kind: FailureKind = failure.kind.parse().ok()?;
        Some(Failure { kind, message: failure.message, hint: failure.hint })
    });
    view.hold = report.hold.and_then(|reason| reason.parse().ok());
    view.hold_detail = report.hold_detail;
    view.keep = report.keep;
    for (db, pass) in report.passes {
        if let Some(figures) = view.passes.get_mut(&DbIndex(db)) {
            pass.complete(figures);
        }
    }
}

impl StoredPass {
    fn of(figures: &PassFigures) -> Self {
        Self {
            waited: figures.counters.waited,
            nameless: figures.counters.nameless,
            count: figures.gauges.count,
            intensity: figures.gauges.intensity,
            server_us_per_scan: figures.gauges.server_us_per_scan,
            server_expired: figures.checkpoint.server_expired,
            slots: match &figures.checkpoint.space {
                CursorSpace::OneTable => None,
                CursorSpace::BySlot(slots) => Some(slots.ranges().map(|r| (*r.start(), *r.end())).collect()),
            },
            ttl: figures.counters.ttl,
        }
    }

    fn complete(self, figures: &mut PassFigures) {
        figures.counters.waited = self.waited;
        figures.counters.nameless = self.nameless;
        figures.gauges.count = self.count;
        figures.gauges.intensity = self.intensity;
        figures.gauges.server_us_per_scan = self.server_us_per_scan;
        figures.checkpoint.server_expired = self.server_expired;
        figures.checkpoint.space = match self.slots {
            None => CursorSpace::OneTable,
            Some(ranges) => CursorSpace::BySlot(SlotSet::new(ranges.into_iter().map(|(from, to)| from..=to))),
        };
        figures.counters.ttl = self.ttl;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::progress::{PassCheckpoint, PassCounters, PassGauges};
    use crate::model::throttle::Reason;

    fn view() -> ShardView {
        let figures = PassFigures {
            checkpoint: PassCheckpoint {
                space: CursorSpace::BySlot(SlotSet::new([0..=100, 16_383..=16_383])),
                server_expired: Some(11),
                ..PassCheckpoint::default()
            },
            counters: PassCounters {
                waited: Duration::from_micros(1_234_567),
                nameless: 3,
                ttl: TtlHistogram { within: [1, 2, 3, 4, 5, 6], later: 7, never: 8 },
                ..PassCounters::default()
            },
            gauges: PassGauges { count: 45, intensity: 0.25, server_us_per_scan: Some(17.5), ..PassGauges::default() },
        };
        ShardView {
            server: Some(ServerFacts {
                product: "Valkey".into(),
                version: "8.0.1".into(),
                run_id: RunId("ab".into()),
                addr: NodeAddr::Unix("/run/valkey.sock".into()),
            }),
            dbs: vec![DbIndex(0), DbIndex(7)],
            passes: BTreeMap::from([(DbIndex(7), figures)]),
            touch: TouchOutcome::ScanLeavesExpired,
            warnings: vec!["w".into()],
            memory_before: Memory { used: Some(9), rss: Some(12), max: Some(0), evicted: None },
            memory_after: Memory { used: Some(8), rss: None, max: None, evicted: Some(1) },
            keep: Some(KeepFigures { laps: 3, backlog: Some(5), inflow: 1.5, ..KeepFigures::default() }),
            settling: Duration::from_millis(100),
            finished: true,
            failure: Some(Failure::new(FailureKind::TooSlow, "slow").hint("faster")),
            hold: Some(Reason::Latency),
            hold_detail: Some("9 ms".into()),
            ..ShardView::default()
        }
    }

    fn bare() -> ShardView {
        ShardView { passes: BTreeMap::from([(DbIndex(7), PassFigures::default())]), ..ShardView::default() }
    }

    #[test]
    fn a_view_comes_back_as_it_was_stored() {
        let mut read = bare();
        complete(&mut read, &to_json(&view()));
        assert_eq!(read, view());
    }

    #[test]
    fn the_text_stays_readable_for_later_versions() {
        insta::assert_snapshot!(to_json(&view()));
    }

    #[test]
    fn a_text_of_another_version_or_a_damaged_one_changes_nothing() {
        for text in ["", "{}", r#"{"version":2,"server":7}"#, r#"{"version":1}"#] {
            let mut read = bare();
            complete(&mut read, text);
            assert_eq!(read, bare(), "{text}");
        }
    }
}
