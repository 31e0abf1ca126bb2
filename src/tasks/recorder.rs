//! The one consumer of scan events: folds them into the view, publishes it, and writes checkpoints.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::engine::Outcome;
use crate::engine::control::StopReason;
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::{ScanEvent, ScanEventKind, Snapshot};
use crate::model::task::{Command, Task, transition};
use crate::store::Store;
use crate::tasks::TaskView;

/// A checkpoint is written this often. What happens between two is in the tally.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(1);

pub(super) struct Recorder {
    store: Store,
    task: Task,
    snapshot: Snapshot,
    view: watch::Sender<Arc<TaskView>>,
    written: Option<Instant>,
    store_failed: bool,
}

impl Recorder {
    pub(super) fn new(store: Store, task: Task, view: watch::Sender<Arc<TaskView>>) -> Self {
        let snapshot = view.borrow().snapshot.clone();
        Self { store, task, snapshot, view, written: None, store_failed: false }
    }

    /// Takes events in until the engine has sent its last.
    pub(super) async fn consume(mut self, mut events: mpsc::Receiver<ScanEvent>) -> Self {
        while let Some(event) = events.recv().await {
            log(&event);
            // Where a pass begins or ends the checkpoint must say so at once.
            let at_once = !matches!(event.what, ScanEventKind::Progressed { .. });
            self.snapshot.apply(event);
            self.task.num = self.snapshot.reclaimed();
            self.publish();
            if at_once || self.written.is_none_or(|at| at.elapsed() >= CHECKPOINT_EVERY) {
                self.checkpoint().await;
            }
        }
        self
    }

    /// Writes how the task ended.
    pub(super) async fn finish(mut self, outcome: Outcome, timeout: Duration) {
        let (command, failure) = match outcome {
            Outcome::Complete => (Command::Succeed, None),
            Outcome::Failed(failure) => (Command::Fail, Some(failure)),
            Outcome::Stopped(StopReason::Interrupted) => {
                let failure = Failure::new(FailureKind::Interrupted, "interrupted before the sweep was complete");
                (Command::Interrupt, Some(failure))
            }
            Outcome::Stopped(StopReason::TimedOut) => {
                let message = format!("the time allowed ({timeout:?}) was over before the sweep was complete");
                let failure = Failure::new(FailureKind::TimedOut, message);
                (Command::Fail, Some(failure.hint("allow more with --timeout, or more speed with --intensity")))
            }
            Outcome::Stopped(StopReason::Cancelled) => (Command::Cancel, None),
        };
        match transition(self.task.state, command) {
            Ok(state) => self.task.state = state,
            Err(error) => tracing::error!(%error, "a task ended in a state that has no end"),
        }
        self.task.failure = failure;
        if self.task.state.is_final() {
            self.task.finished_at = Some(Timestamp::now());
        }
        self.checkpoint().await;
        if self.task.state.is_final()
            && !self.store_failed
            && let Some(tallies) = self.store.tallies()
        {
            tallies.forget(self.task.id);
        }
        self.publish();
    }

    async fn checkpoint(&mut self) {
        self.written = Some(Instant::now());
        match self.store.checkpoint(&self.task, &self.snapshot).await {
            Ok(()) => self.store_failed = false,
            Err(error) => {
                // The sweep goes on: what it frees is freed. The next checkpoint holds everything again.
                tracing::error!(%error, "the checkpoint could not be written");
                self.store_failed = true;
                for shard in self.snapshot.shards.values_mut() {
                    shard.warn(format!("a checkpoint could not be written: {error}"));
                }
            }
        }
    }

    fn publish(&self) {
        let view = TaskView { task: self.task.clone(), snapshot: self.snapshot.clone() };
        self.view.send_replace(Arc::new(view));
    }
}

fn log(event: &ScanEvent) {
    let shard = &event.shard;
    match &event.what {
        ScanEventKind::ShardFound { addr } => tracing::debug!(%shard, %addr, "part of the sweep"),
        ScanEventKind::ShardStarted { server, dbs, .. } => {
            let (product, version) = (&server.product, &server.version);
            tracing::info!(%shard, product, version, dbs = dbs.len(), "sweep begun");
        }
        ScanEventKind::ServerChanged { server } => {
            tracing::warn!(%shard, product = server.product, version = server.version, "another server process answers");
        }
        ScanEventKind::Warned { message } => tracing::warn!(%shard, "{message}"),
        ScanEventKind::PassStarted { db, figures } => {
            tracing::info!(%shard, %db, position = %figures.position, "pass begun");
        }
        ScanEventKind::Progressed { db, figures } => {
            tracing::trace!(%shard, %db, scanned = figures.scanned, reclaimed = figures.reclaimed, "progress");
        }
        ScanEventKind::PassRestarted { db, why, .. } => tracing::warn!(%shard, %db, why, "pass begun again"),
        ScanEventKind::PassFinished { db, figures } => {
            tracing::info!(%shard, %db, scanned = figures.scanned, reclaimed = figures.reclaimed, "pass complete");
        }
        ScanEventKind::HoldStarted { reason, detail } => {
            tracing::warn!(%shard, %reason, detail, "holding: {}", reason.sentence());
        }
        ScanEventKind::HoldEnded { reason, lasted } => tracing::info!(%shard, %reason, ?lasted, "going on"),
        ScanEventKind::TouchDecided { outcome } => tracing::debug!(%shard, "{}", outcome.sentence()),
        ScanEventKind::ShardFinished { .. } => tracing::info!(%shard, "sweep complete"),
        ScanEventKind::ShardEnded { failure } => {
            tracing::error!(%shard, kind = %failure.kind, hint = failure.hint, "{failure}");
        }
    }
}
