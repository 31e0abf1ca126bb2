//! OpenTelemetry spans of a task: the task, in it its shards, and in each shard its passes and holds.
//!
//! They go to the tracer that [`crate::telemetry`] sets up where the environment names a receiver, and else nowhere.

use std::collections::BTreeMap;
use std::time::SystemTime;

use opentelemetry::trace::{SpanBuilder, Status, TraceContextExt, Tracer};
use opentelemetry::{Context, KeyValue, global};

use crate::model::failure::Failure;
use crate::model::progress::{PassCounters, ScanEvent, ScanEventKind, ServerFacts};
use crate::model::shard::{DbIndex, ShardId};
use crate::model::task::{Task, TaskState};

/// The open spans of one task.
#[derive(Debug)]
pub(super) struct TaskTrace {
    task: Context,
    shards: BTreeMap<ShardId, ShardTrace>,
}

#[derive(Debug)]
struct ShardTrace {
    shard: Context,
    passes: BTreeMap<DbIndex, Context>,
    hold: Option<Context>,
}

impl ShardTrace {
    fn end(self) {
        for span in self.hold.iter().chain(self.passes.values()).chain([&self.shard]) {
            span.span().end();
        }
    }
}

impl TaskTrace {
    /// Opens the span of a task, which begins when the task was created, or now where it goes on after an interruption.
    pub(super) fn new(task: &Task) -> Self {
        let attributes = [
            KeyValue::new("ttlsweep.task.id", task.id.to_string()),
            KeyValue::new("ttlsweep.task.cause", task.cause.as_str()),
            KeyValue::new("ttlsweep.instance.id", task.instance_id.clone()),
            KeyValue::new("ttlsweep.project.id", task.project_id.clone()),
        ];
        let mut builder = SpanBuilder::from_name("task").with_attributes(attributes);
        if task.started_at.is_none() {
            builder = builder.with_start_time(SystemTime::from(task.created_at));
        }
        Self { task: opened(builder, &Context::new()), shards: BTreeMap::new() }
    }

    /// Notes that the task begins to sweep.
    pub(super) fn begun(&self) {
        self.task.span().add_event("begun", Vec::new());
    }

    /// Opens or closes the span that an event is about.
    pub(super) fn take(&mut self, event: &ScanEvent) {
        if let ScanEventKind::ShardStarted { server, .. } = &event.what {
            let shard =
                opened(SpanBuilder::from_name("shard").with_attributes(facts(&event.shard, server)), &self.task);
            let new = ShardTrace { shard, passes: BTreeMap::new(), hold: None };
            // The shard is swept again, since its master moved.
            if let Some(before) = self.shards.insert(event.shard.clone(), new) {
                before.end();
            }
            return;
        }
        let Some(of) = self.shards.get_mut(&event.shard) else {
            if let ScanEventKind::ShardEnded { failure } = &event.what {
                failed(&self.task, failure);
            }
            return;
        };
        match &event.what {
            ScanEventKind::PassStarted { db, .. } => {
                let db_index = KeyValue::new("ttlsweep.db", i64::from(db.0));
                of.passes.insert(*db, opened(SpanBuilder::from_name("pass").with_attributes([db_index]), &of.shard));
            }
            ScanEventKind::PassRestarted { db, why, .. } => {
                let why = vec![KeyValue::new("why", why.clone())];
                of.passes.get(db).inspect(|pass| pass.span().add_event("begun again", why));
            }
            ScanEventKind::PassFinished { db, figures } => {
                if let Some(pass) = of.passes.remove(db) {
                    pass.span().set_attributes(counts(&figures.counters));
                    pass.span().end();
                }
            }
            ScanEventKind::HoldStarted { reason, .. } => {
                let reason = KeyValue::new("ttlsweep.hold.reason", reason.as_str());
                let hold = opened(SpanBuilder::from_name("hold").with_attributes([reason]), &of.shard);
                if let Some(before) = of.hold.replace(hold) {
                    before.span().end();
                }
            }
            ScanEventKind::HoldEnded { .. } => {
                if let Some(hold) = of.hold.take() {
                    hold.span().end();
                }
            }
            ScanEventKind::ShardFinished { .. } => self.end_shard(&event.shard, None),
            ScanEventKind::ShardEnded { failure } => self.end_shard(&event.shard, Some(failure)),
            ScanEventKind::Warned { message } => {
                let message = vec![KeyValue::new("message", message.clone())];
                of.shard.span().add_event("warned", message);
            }
            _ => {}
        }
    }

    fn end_shard(&mut self, id: &ShardId, failure: Option<&Failure>) {
        let Some(ended) = self.shards.remove(id) else { return };
        if let Some(failure) = failure {
            failed(&ended.shard, failure);
        }
        ended.end();
    }

    /// Closes every open span: the task has ended, or is left to the next process.
    pub(super) fn end(&mut self, task: &Task) {
        std::mem::take(&mut self.shards).into_values().for_each(ShardTrace::end);
        let span = self.task.span();
        span.set_attribute(KeyValue::new("ttlsweep.task.state", task.state.as_str()));
        span.set_attribute(number("ttlsweep.keys.reclaimed", task.num));
        match &task.failure {
            Some(failure) if task.state == TaskState::Failed => failed(&self.task, failure),
            _ => {}
        }
        span.end();
    }
}

fn opened(builder: SpanBuilder, parent: &Context) -> Context {
    parent.with_span(global::tracer("ttlsweep").build_with_context(builder, parent))
}

fn failed(span: &Context, failure: &Failure) {
    span.span().set_attribute(KeyValue::new("error.type", failure.kind.as_str()));
    span.span().set_status(Status::error(failure.message.clone()));
}

/// Attributes with the names of OpenTelemetry's conventions for databases, where these have a name.
fn facts(shard: &ShardId, server: &ServerFacts) -> [KeyValue; 4] {
    [
        KeyValue::new("ttlsweep.shard", shard.to_string()),
        KeyValue::new("db.system.name", "redis"),
        KeyValue::new("ttlsweep.server", format!("{} {}", server.product, server.version)),
        KeyValue::new("network.peer.address", server.addr.to_string()),
    ]
}

fn counts(pass: &PassCounters) -> [KeyValue; 4] {
    [
        number("ttlsweep.keys.scanned", pass.scanned),
        number("ttlsweep.keys.reclaimed", pass.reclaimed),
        number("ttlsweep.batches", pass.batches),
        number("ttlsweep.lost_replies", pass.lost_replies),
    ]
}

fn number(name: &'static str, number: u64) -> KeyValue {
    KeyValue::new(name, i64::try_from(number).unwrap_or(i64::MAX))
}
