//! The one consumer of scan events and the one hand on a task's state: folds events into the view, publishes it, writes
//! checkpoints, and takes what people ask of the task.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::engine::Outcome;
use crate::engine::control::{Control, StopReason};
use crate::metrics::{CounterSums, Metrics};
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::{ScanEvent, ScanEventKind, Snapshot};
use crate::model::shard::ShardId;
use crate::model::task::{Cause, Command, Task, TaskState, transition};
use crate::store::{Store, StoreError};
use crate::tasks::time_budget::{self, TimeBudget};
use crate::tasks::trace::TaskTrace;
use crate::tasks::{TaskError, TaskView, Tune};

/// What a line of the log says of its task. A sweep from the command line is the only one there.
macro_rules! log_of {
    ($task:expr, $level:ident, $($rest:tt)+) => {{
        let of_daemon = $task.cause != Cause::Cli;
        let instance = of_daemon.then_some($task.instance_id.as_str());
        let task = of_daemon.then(|| tracing::field::display($task.id));
        tracing::$level!(instance, task, $($rest)+)
    }};
}

/// While events come, this often the view is published and the metrics are brought up to date. All shards are summed up then, so
/// that a shard costs the same whether there are ten of them or a thousand.
const PUBLISH_EVERY: Duration = Duration::from_millis(100);
/// A checkpoint is written this often. What happens between two is in the batch journal.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(1);
/// How long to wait before the end of a task is written again after a full disk or the like.
const WRITE_AGAIN: Duration = Duration::from_secs(1);

/// What may be asked of a task that has not ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Hold.
    Pause,
    /// Go on.
    Resume,
    /// End.
    Cancel,
    /// Other limits.
    Tune(Tune),
    /// A keep run: end, as a success, so that another task may begin.
    GiveWay,
}

impl Order {
    /// What it does to the task's state, if that is anything.
    pub(super) fn command(&self) -> Option<Command> {
        match self {
            Self::Pause => Some(Command::Pause),
            Self::Resume => Some(Command::Resume),
            Self::Cancel => Some(Command::Cancel),
            Self::Tune(_) => None,
            Self::GiveWay => Some(Command::Succeed),
        }
    }

    /// Whether it is an order to end the task in this state.
    pub(super) fn ends_as(&self, state: TaskState) -> bool {
        match self {
            Self::Cancel => state == TaskState::Cancelled,
            Self::GiveWay => state == TaskState::Succeeded,
            Self::Pause | Self::Resume | Self::Tune(_) => false,
        }
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pause => f.write_str("pause"),
            Self::Resume => f.write_str("resume"),
            Self::Cancel => f.write_str("cancel"),
            Self::Tune(tune) => write!(f, "tune {tune}"),
            Self::GiveWay => f.write_str("give way"),
        }
    }
}

/// An order with the way back for the answer.
#[derive(Debug)]
pub(super) struct OrderRequest {
    pub(super) order: Order,
    pub(super) answer: oneshot::Sender<Result<(), TaskError>>,
}

pub(super) struct Recorder {
    pub(super) store: Store,
    pub(super) metrics: Metrics,
    pub(super) control: Control,
    pub(super) budget: Arc<TimeBudget>,
    /// Tells the admission whether a person paused the task.
    pub(super) paused: watch::Sender<bool>,
    pub(super) inbox: mpsc::Receiver<OrderRequest>,
    pub(super) task: Task,
    pub(super) snapshot: Snapshot,
    pub(super) view: watch::Sender<Arc<TaskView>>,
    written: Option<Instant>,
    /// Shards of which something happened since the last checkpoint that was written.
    unwritten: BTreeSet<ShardId>,
    /// Something happened that the next tick is to write down, however young the last checkpoint is.
    checkpoint_due: bool,
    /// Something happened since the view was published.
    unpublished: bool,
    store_failed: bool,
    /// Another daemon has the task by now.
    is_lost: bool,
    totals: CounterSums,
    trace: TaskTrace,
}

impl Recorder {
    #[allow(clippy::too_many_arguments, reason = "each is another thing, and there is one caller")]
    pub(super) fn new(
        store: Store,
        metrics: Metrics,
        control: Control,
        budget: Arc<TimeBudget>,
        paused: watch::Sender<bool>,
        inbox: mpsc::Receiver<OrderRequest>,
        task: Task,
        view: watch::Sender<Arc<TaskView>>,
    ) -> Self {
        let snapshot = view.borrow().snapshot.clone();
        // What an earlier process counted is not counted again.
        let totals = CounterSums::of(&snapshot);
        Self {
            trace: TaskTrace::new(&task),
            store,
            metrics,
            control,
            budget,
            paused,
            inbox,
            task,
            snapshot,
            view,
            written: None,
            unwritten: BTreeSet::new(),
            checkpoint_due: false,
            unpublished: false,
            store_failed: false,
            is_lost: false,
            totals,
        }
    }

    /// Waits until the task may begin, or is told to stop.
    pub(super) async fn wait_for_turn(&mut self) -> Result<(), StopReason> {
        let mut orders = self.control.watch();
        loop {
            let now = *orders.borrow_and_update();
            if let Some(reason) = now.stop {
                return Err(reason);
            }
            if self.snapshot.waits != now.hold {
                if let Some(reason) = now.hold {
                    log_of!(self.task, info, %reason, "waiting: {}", reason.sentence());
                }
                self.snapshot.waits = now.hold;
                self.sum_up();
                self.publish();
            }
            if now.hold.is_none() {
                return Ok(());
            }
            tokio::select! {
                // The control is ours: it cannot go away before us.
                _ = orders.changed() => {}
                Some(asked) = self.inbox.recv() => self.answer(asked).await,
            }
        }
    }

    /// Does something that takes its time, and takes orders in meanwhile. Ends early where the task is told to stop.
    pub(super) async fn obeying<T>(&mut self, work: impl Future<Output = T>) -> Result<T, StopReason> {
        let mut orders = self.control.watch();
        let mut work = std::pin::pin!(work);
        loop {
            if let Some(reason) = orders.borrow_and_update().stop {
                return Err(reason);
            }
            tokio::select! {
                done = &mut work => return Ok(done),
                _ = orders.changed() => {}
                Some(asked) = self.inbox.recv() => self.answer(asked).await,
            }
        }
    }

    /// Marks the task as running. The record may lag behind where it cannot be written: the next checkpoint says it
    /// again.
    pub(super) async fn begin(&mut self) {
        if let Ok(state) = transition(self.task.state, Command::Start) {
            self.task.state = state;
        }
        self.task.started_at = self.task.started_at.or_else(|| Some(self.store.now()));
        self.task.failure = None;
        self.snapshot.started_at = self.task.started_at;
        self.trace.begun();
        self.sum_up();
        self.checkpoint().await;
        self.publish();
    }

    /// Takes events and orders in until the engine has sent its last.
    pub(super) async fn consume(&mut self, mut events: mpsc::Receiver<ScanEvent>) {
        let mut tick = tokio::time::interval(PUBLISH_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => self.take(event).await,
                    None => return,
                },
                Some(asked) = self.inbox.recv() => self.answer(asked).await,
                _ = tick.tick(), if self.unpublished || !self.unwritten.is_empty() => {
                    if self.unpublished {
                        self.sum_up();
                        self.publish();
                    }
                    if self.checkpoint_due || self.written.is_none_or(|at| at.elapsed() >= CHECKPOINT_EVERY) {
                        self.checkpoint().await;
                    }
                }
            }
        }
    }

    async fn take(&mut self, event: ScanEvent) {
        log(&event, &self.task);
        self.trace.take(&event);
        // The batch journal tells of batches and of the end of a pass, and not that one has to begin again.
        let at_once = matches!(event.what, ScanEventKind::PassRestarted { .. });
        self.checkpoint_due |= !matches!(event.what, ScanEventKind::Progressed { .. });
        self.unpublished = true;
        self.unwritten.insert(event.shard.clone());
        self.snapshot.apply(event);
        if at_once {
            self.sum_up();
            self.checkpoint().await;
        }
    }

    async fn answer(&mut self, asked: OrderRequest) {
        self.sum_up();
        let answer = self.obey(asked.order).await;
        self.publish();
        // The caller may have gone away meanwhile.
        let _ = asked.answer.send(answer);
    }

    /// Does what was asked, once the record says so: an order that could not be written was not given.
    async fn obey(&mut self, order: Order) -> Result<(), TaskError> {
        match order {
            Order::Pause => {
                self.change(|task| {
                    task.state = transition(task.state, Command::Pause)?;
                    Ok(())
                })
                .await?;
                self.paused.send_replace(true);
            }
            Order::Resume => {
                let now = self.store.now();
                self.change(|task| {
                    task.state = transition(task.state, Command::Resume)?;
                    task.started_at = task.started_at.or(Some(now));
                    Ok(())
                })
                .await?;
                self.paused.send_replace(false);
            }
            Order::Cancel => {
                transition(self.task.state, Command::Cancel)?;
                self.control.stop(StopReason::Cancelled);
            }
            Order::GiveWay => self.control.stop(StopReason::Kept),
            Order::Tune(tune) => {
                let (texts, tuning) = tune.over(&self.task.sweep)?;
                self.change(|task| {
                    task.sweep = texts;
                    Ok(())
                })
                .await?;
                self.control.tune(tuning);
            }
        }
        Ok(())
    }

    async fn change(&mut self, change: impl FnOnce(&mut Task) -> Result<(), TaskError>) -> Result<(), TaskError> {
        let mut changed = self.task.clone();
        change(&mut changed)?;
        self.store.update(&changed).await.inspect_err(|error| self.not_changed(error))?;
        self.task = changed;
        Ok(())
    }

    fn not_changed(&self, error: &StoreError) {
        match error {
            StoreError::Fenced(_) => self.control.stop(StopReason::Lost),
            _ => self.metrics.store_failed(),
        }
    }

    /// Writes how the task ended. `persist`: try again until it is written or this is
    /// cancelled.
    pub(super) async fn finish(&mut self, outcome: Outcome, persist: Option<&CancellationToken>) {
        let running = self.task.state == TaskState::Running;
        let (command, failure) = match outcome {
            Outcome::Complete => (Some(Command::Succeed), None),
            Outcome::Failed(failure) => (Some(Command::Fail), Some(failure)),
            Outcome::Stopped(StopReason::Interrupted) => {
                let failure = Failure::new(FailureKind::Interrupted, "interrupted before the sweep was complete");
                // One that waits or is paused stays so, and is found like that by the next process.
                (running.then_some(Command::Interrupt), running.then_some(failure))
            }
            Outcome::Stopped(StopReason::TimedOut) => {
                (Some(Command::Fail), Some(time_budget::over(self.budget.allowed, &self.snapshot)))
            }
            Outcome::Stopped(StopReason::Kept) => (Some(Command::Succeed), None),
            Outcome::Stopped(StopReason::Cancelled) => (Some(Command::Cancel), None),
            Outcome::Stopped(StopReason::Lost) => {
                log_of!(self.task, warn, "another daemon may have the task by now; nothing more is written of it");
                return;
            }
        };
        if matches!(command, None | Some(Command::Interrupt)) {
            // Another daemon may go on with it at once.
            self.task.owner = None;
        }
        self.snapshot.end();
        if command == Some(Command::Succeed) && self.task.state != TaskState::Running {
            // It was paused while its last batch was under way, or never had to begin.
            let to_running = if self.task.state == TaskState::Paused { Command::Resume } else { Command::Start };
            self.step(to_running);
        }
        if let Some(command) = command {
            self.step(command);
        }
        self.task.failure = failure;
        if self.task.state.is_final() {
            self.task.finished_at = Some(self.store.now());
        }
        self.sum_up();
        log_end(&self.task);
        self.trace.end(&self.task);
        self.checkpoint().await;
        while self.store_failed
            && let Some(closing) = persist
        {
            tokio::select! {
                () = tokio::time::sleep(WRITE_AGAIN) => self.checkpoint().await,
                () = closing.cancelled() => break,
                Some(asked) = self.inbox.recv() => {
                    let _ = asked.answer.send(Err(TaskError::Ended));
                }
            }
        }
        if self.is_lost {
            // How it ends is not ours to say.
            (self.task.state, self.task.finished_at) = (TaskState::Interrupted, None);
            return;
        }
        if self.task.state.is_final() {
            self.metrics.ended(&self.task);
            if !self.store_failed
                && let Some(journals) = self.store.journals()
            {
                journals.forget(self.task.id);
            }
        }
    }

    fn step(&mut self, command: Command) {
        match transition(self.task.state, command) {
            Ok(state) => self.task.state = state,
            Err(error) => tracing::error!(%error, "a task ended in a state that has no end"),
        }
    }

    async fn checkpoint(&mut self) {
        self.written = Some(Instant::now());
        self.checkpoint_due = false;
        self.task.spent = self.budget.spent();
        // A cluster has hundreds of shards, and each event is about one.
        let shards = self.snapshot.shards.iter().filter(|(shard, _)| self.unwritten.contains(*shard));
        match self.store.checkpoint(&self.task, shards).await {
            Ok(()) => {
                self.unwritten.clear();
                self.store_failed = false;
            }
            Err(StoreError::Fenced(_)) => {
                (self.store_failed, self.is_lost) = (false, true);
                self.control.stop(StopReason::Lost);
            }
            Err(error) => self.not_written(&error),
        }
    }

    /// The sweep goes on: what it frees is freed. The next checkpoint holds what this one lacks.
    fn not_written(&mut self, error: &StoreError) {
        tracing::error!(task = %self.task.id, %error, "the checkpoint could not be written");
        self.metrics.store_failed();
        self.store_failed = true;
        for (id, shard) in &mut self.snapshot.shards {
            Arc::make_mut(shard).warn(format!("a checkpoint could not be written: {error}"));
            self.unwritten.insert(id.clone());
        }
    }

    /// Shows the present.
    pub(super) fn publish(&mut self) {
        self.unpublished = false;
        let view = TaskView { task: self.task.clone(), snapshot: self.snapshot.clone() };
        self.view.send_replace(Arc::new(view));
    }

    /// Brings the task's count and the metrics up to date with the shards. Every event is summed up before it is written or shown.
    fn sum_up(&mut self) {
        self.task.num = self.snapshot.reclaimed();
        let totals = CounterSums::of(&self.snapshot);
        self.metrics.progressed(&self.task.instance_id, &self.totals, &totals, &self.snapshot);
        self.totals = totals;
    }
}

fn log(event: &ScanEvent, task: &Task) {
    let shard = &event.shard;
    match &event.what {
        ScanEventKind::ShardFound { addr } => log_of!(task, debug, %shard, %addr, "part of the sweep"),
        ScanEventKind::ShardStarted { server, dbs, .. } => {
            let (product, version) = (&server.product, &server.version);
            log_of!(task, info, %shard, product, version, dbs = dbs.len(), "sweep begun");
        }
        ScanEventKind::ServerChanged { server } => {
            let (product, version) = (&server.product, &server.version);
            log_of!(task, warn, %shard, product, version, "another server process answers");
        }
        ScanEventKind::Warned { message } => log_of!(task, warn, %shard, "{message}"),
        ScanEventKind::PassStarted { db, figures } => {
            log_of!(task, info, %shard, %db, position = %figures.position, "pass begun");
        }
        ScanEventKind::Progressed { db, figures } => {
            log_of!(task, trace, %shard, %db, scanned = figures.scanned, reclaimed = figures.reclaimed, "progress");
        }
        ScanEventKind::Kept { figures } => log_of!(task, trace, %shard, ?figures, "kept"),
        ScanEventKind::PassRestarted { db, why, .. } => log_of!(task, warn, %shard, %db, why, "pass begun again"),
        ScanEventKind::PassFinished { db, figures } => {
            log_of!(task, info, %shard, %db, scanned = figures.scanned, reclaimed = figures.reclaimed, "pass complete");
        }
        ScanEventKind::HoldStarted { reason, detail } => {
            log_of!(task, warn, %shard, %reason, detail, "holding: {}", reason.sentence());
        }
        ScanEventKind::HoldEnded { reason, lasted } => log_of!(task, info, %shard, %reason, ?lasted, "going on"),
        ScanEventKind::TouchDecided { outcome } => log_of!(task, debug, %shard, "{}", outcome.sentence()),
        ScanEventKind::ShardFinished { .. } => log_of!(task, info, %shard, "sweep complete"),
        ScanEventKind::ShardEnded { failure } => {
            log_of!(task, error, %shard, kind = %failure.kind, hint = failure.hint, "{failure}");
        }
    }
}

/// How a task ended, or that it is left for the next process.
fn log_end(task: &Task) {
    let (state, reclaimed, note) = (&task.state, task.num, task.note.as_deref());
    match &task.failure {
        Some(failure) if failure.kind != FailureKind::Interrupted => {
            let hint = failure.hint.as_deref();
            log_of!(task, error, %state, reclaimed, kind = %failure.kind, hint, "task ended: {failure}");
        }
        _ if task.state.is_final() => log_of!(task, info, %state, reclaimed, note, "task ended"),
        _ => log_of!(task, info, %state, reclaimed, "task kept for the next start"),
    }
}
