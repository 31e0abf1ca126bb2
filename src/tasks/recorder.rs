//! Records one task: the only consumer of its scan events and the only writer of its state while it is active. Folds
//! events into the view, publishes the view, writes checkpoints and carries out orders.

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

/// A log line with the task that it is about; a sweep from the command line needs no name.
macro_rules! log_of {
    ($task:expr, $level:ident, $($rest:tt)+) => {{
        let of_daemon = $task.cause != Cause::Cli;
        let instance = of_daemon.then_some($task.instance_id.as_str());
        let task = of_daemon.then(|| tracing::field::display($task.id));
        tracing::$level!(instance, task, $($rest)+)
    }};
}

/// How often, while events come, the view is published and the metrics are updated. All shards are summed up then, and
/// not for each event, so that an event costs the same in an instance of a thousand shards.
const PUBLISH_EVERY: Duration = Duration::from_millis(100);
/// How often a checkpoint is written. The batch journal holds what happens between two.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(1);
/// How long to wait before the next attempt to write the end of a task, after a full disk or the like.
const WRITE_AGAIN: Duration = Duration::from_secs(1);

/// What a person can ask of a task that has not ended. Passed between daemons as JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Order {
    /// Hold until it is resumed.
    Pause,
    /// Go on after a pause.
    Resume,
    /// End after the batch under way.
    Cancel,
    /// Change the limits on load and pace of the sweep.
    Tune(Tune),
    /// Of a keep run: end, as a success, so that another task may begin.
    GiveWay,
}

impl Order {
    /// The command that it is for the task's state; `None`: the state stays.
    pub(super) fn command(&self) -> Option<Command> {
        match self {
            Self::Pause => Some(Command::Pause),
            Self::Resume => Some(Command::Resume),
            Self::Cancel => Some(Command::Cancel),
            Self::Tune(_) => None,
            Self::GiveWay => Some(Command::GiveWay),
        }
    }

    /// Whether the order ends a task in this state.
    pub(super) fn ends_as(&self, state: TaskState) -> bool {
        let ended = self.command().and_then(|command| transition(TaskState::Running, command).ok());
        ended.is_some_and(TaskState::is_final) && ended == Some(state)
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

/// An order, and where its answer goes.
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
    /// Whether a person paused the task; read by the admission.
    pub(super) paused: watch::Sender<bool>,
    pub(super) inbox: mpsc::Receiver<OrderRequest>,
    pub(super) task: Task,
    pub(super) snapshot: Snapshot,
    pub(super) view: watch::Sender<Arc<TaskView>>,
    written: Option<Instant>,
    /// Shards with events since the last checkpoint that was written.
    unwritten: BTreeSet<ShardId>,
    /// An event came that the next tick has to write, however young the last checkpoint is.
    checkpoint_due: bool,
    /// An event came since the view was published.
    unpublished: bool,
    store_failed: bool,
    /// Another daemon has the task: nothing more may be written.
    is_lost: bool,
    totals: CounterSums,
    trace: TaskTrace,
}

impl Recorder {
    #[allow(clippy::too_many_arguments, reason = "the parts of one struct, and there is one caller")]
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
        // What an earlier process counted is not added to the metrics again.
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

    /// Waits until the task may begin, and carries out orders meanwhile. An error is the reason to stop.
    pub(super) async fn wait_for_turn(&mut self) -> Result<(), StopReason> {
        let mut control = self.control.watch();
        loop {
            let now = *control.borrow_and_update();
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
            // One that was paused just now is about to be held.
            if now.hold.is_none() && self.task.state != TaskState::Paused {
                return Ok(());
            }
            tokio::select! {
                // The channel stays open: the control is ours.
                _ = control.changed() => {}
                Some(asked) = self.inbox.recv() => self.answer(asked).await,
            }
        }
    }

    /// Runs `work` and carries out orders meanwhile. Ends early, with the reason, where the task is told to stop.
    pub(super) async fn with_orders<T>(&mut self, work: impl Future<Output = T>) -> Result<T, StopReason> {
        let mut control = self.control.watch();
        let mut work = std::pin::pin!(work);
        loop {
            if let Some(reason) = control.borrow_and_update().stop {
                return Err(reason);
            }
            tokio::select! {
                done = &mut work => return Ok(done),
                _ = control.changed() => {}
                Some(asked) = self.inbox.recv() => self.answer(asked).await,
            }
        }
    }

    /// Marks the task as running. Where that cannot be recorded, the next checkpoint records it.
    pub(super) async fn begin(&mut self) {
        // One that was paused and let go on is running already.
        if self.task.state != TaskState::Running {
            self.step(Command::Start);
        }
        self.task.failure = None;
        self.snapshot.started_at = self.task.started_at;
        self.trace.begun();
        self.sum_up();
        self.checkpoint().await;
        self.publish();
    }

    /// Handles events and orders until the engine has sent its last event.
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
        // The batch journal has batches and the end of a pass, but not that a pass began again.
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
        let answer = self.carry_out(asked.order).await;
        self.publish();
        // The caller may have gone away.
        let _ = asked.answer.send(answer);
    }

    /// Carries an order out once it is recorded: an order that cannot be recorded is refused.
    async fn carry_out(&mut self, order: Order) -> Result<(), TaskError> {
        match order {
            Order::Pause => {
                let now = self.store.now();
                self.change(|task| Ok(task.apply(Command::Pause, now)?)).await?;
                self.paused.send_replace(true);
            }
            Order::Resume => {
                let now = self.store.now();
                self.change(|task| Ok(task.apply(Command::Resume, now)?)).await?;
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

    /// Records how the task ended. `persist`: try again until it is recorded or this token is cancelled.
    pub(super) async fn finish(&mut self, outcome: Outcome, persist: Option<&CancellationToken>) {
        let running = self.task.state == TaskState::Running;
        let (command, failure) = match outcome {
            Outcome::Complete => (Some(Command::Succeed), None),
            Outcome::Failed(failure) => (Some(Command::Fail), Some(failure)),
            Outcome::Stopped(StopReason::Interrupted) => {
                let failure = Failure::new(FailureKind::Interrupted, "interrupted before the sweep was complete");
                // A task that waits or is paused stays so, and the next process finds it like that.
                (running.then_some(Command::Interrupt), running.then_some(failure))
            }
            Outcome::Stopped(StopReason::TimedOut) => {
                (Some(Command::Fail), Some(time_budget::over(self.budget.allowed, &self.snapshot)))
            }
            Outcome::Stopped(StopReason::Kept) => (Some(Command::GiveWay), None),
            Outcome::Stopped(StopReason::Cancelled) => (Some(Command::Cancel), None),
            Outcome::Stopped(StopReason::Lost) => {
                log_of!(
                    self.task,
                    warn,
                    "another daemon may have the task by now; this one records nothing more of it"
                );
                return;
            }
        };
        if matches!(command, None | Some(Command::Interrupt)) {
            // Another daemon may take it up at once.
            self.task.owner = None;
        }
        self.snapshot.end();
        if matches!(command, Some(Command::Succeed | Command::GiveWay)) && self.task.state == TaskState::Paused {
            // It was paused while its last batch was under way.
            self.step(Command::Resume);
        }
        if let Some(command) = command {
            self.step(command);
        }
        self.task.failure = failure;
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
            // Nothing of this end was recorded.
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
        if let Err(error) = self.task.apply(command, self.store.now()) {
            tracing::error!(%error, "the state of a task does not allow what happened to it");
        }
    }

    async fn checkpoint(&mut self) {
        self.written = Some(Instant::now());
        self.checkpoint_due = false;
        self.task.spent = self.budget.spent();
        // Only shards with events: a cluster may have hundreds.
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

    /// The sweep goes on, since what it reclaims stays reclaimed. The next checkpoint holds what this one lacks.
    fn not_written(&mut self, error: &StoreError) {
        tracing::error!(task = %self.task.id, %error, "the checkpoint could not be written");
        self.metrics.store_failed();
        self.store_failed = true;
        for (id, shard) in &mut self.snapshot.shards {
            Arc::make_mut(shard).warn(format!("a checkpoint could not be written: {error}"));
            self.unwritten.insert(id.clone());
        }
    }

    /// Publishes the view as it is now.
    pub(super) fn publish(&mut self) {
        self.unpublished = false;
        let view = TaskView { task: self.task.clone(), snapshot: self.snapshot.clone() };
        self.view.send_replace(Arc::new(view));
    }

    /// Updates the task's count and the metrics from the shards. Called before anything is written or published.
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
            log_of!(task, info, %shard, %db, position = %figures.checkpoint.position, "pass begun");
        }
        ScanEventKind::Progressed { db, figures } => {
            log_of!(task, trace, %shard, %db, scanned = figures.counters.scanned, reclaimed = figures.counters.reclaimed, "progress");
        }
        ScanEventKind::Kept { figures } => log_of!(task, trace, %shard, ?figures, "kept"),
        ScanEventKind::PassRestarted { db, why, .. } => log_of!(task, warn, %shard, %db, why, "pass begun again"),
        ScanEventKind::PassFinished { db, figures } => {
            log_of!(task, info, %shard, %db, scanned = figures.counters.scanned, reclaimed = figures.counters.reclaimed, "pass complete");
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

/// Logs how a task ended, or that it is left to the next process.
fn log_end(task: &Task) {
    let (state, reclaimed, note) = (&task.state, task.num, task.note.as_deref());
    match &task.failure {
        Some(failure) if failure.kind != FailureKind::Interrupted => {
            let hint = failure.hint.as_deref();
            log_of!(task, error, %state, reclaimed, kind = %failure.kind, hint, "task ended: {failure}");
        }
        _ if task.state.is_final() => log_of!(task, info, %state, reclaimed, note, "task ended"),
        _ => log_of!(task, info, %state, reclaimed, "task left for the next start"),
    }
}
