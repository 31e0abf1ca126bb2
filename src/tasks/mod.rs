//! Tasks, from the request to the record. Only this module changes the state of a task; the command line, the API and
//! the scheduler ask it to.

mod admission;
mod backlog;
mod keep_end;
mod member;
mod queue;
mod recorder;
mod time_budget;
mod trace;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::engine::control::{Control, StopReason};
use crate::engine::{self, Outcome, ScanPlan};
use crate::metrics::Metrics;
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::{ShardView, Snapshot};
use crate::model::schedule::{AutoScan, BacklogSize, Window};
use crate::model::shard::ShardId;
use crate::model::target::Target;
use crate::model::task::{Cause, Command, IllegalTransition, SweepTexts, Task, TaskId, TaskState};
use crate::node::commands;
use crate::node::conn::{CLIENT_NAME, Conn, ConnOptions};
use crate::node::error::NodeError;
use crate::node::tls::Tls;
use crate::node::topology::{Topology, View};
use crate::notify::Notifier;
use crate::settings::raw::{Problem, TUNE_KEYS};
use crate::settings::serve::Instance;
use crate::settings::{self, ScanSettings, Settings, Tuning};
use crate::store::{DaemonRecord, Store, StoreError, StoredShard};
use crate::tasks::admission::Admission;
use crate::tasks::member::Member;
use crate::tasks::queue::Queue;
use crate::tasks::recorder::{OrderRequest, Recorder};
use crate::tasks::time_budget::TimeBudget;

pub(crate) use keep_end::next_hour;
pub(crate) use member::Membership;
pub(crate) use queue::Unfinished;
pub(crate) use recorder::Order;

/// Events that may wait for the recorder. The engine sends a dozen a second and shard; a recorder that is slower than
/// that for long holds the sweep rather than filling the memory.
const EVENT_BUFFER: usize = 256;
/// Orders that may wait for the recorder of a task. The sender of another one waits.
const ORDER_BUFFER: usize = 16;

/// Why something cannot be done with a task.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TaskError {
    /// The records cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The state of the task does not take the command.
    #[error(transparent)]
    Transition(#[from] IllegalTransition),
    /// The instance has a task that has not ended.
    #[error(transparent)]
    Unfinished(#[from] Unfinished),
    /// The task has ended, or there is none of this id.
    #[error("the task has ended")]
    Ended,
    /// A file that the instance's settings name cannot be used.
    #[error("a file that the instance's settings name cannot be used: {0}")]
    Settings(Problem),
    /// The daemon is stopping and begins no task.
    #[error("the daemon is stopping")]
    Closing,
    /// Another daemon has the task and did not answer in time.
    #[error("the daemon that has the task does not answer")]
    OwnerSilent,
    /// Another daemon has the task and could not carry the order out.
    #[error("the daemon that has the task could not do it: {0}")]
    OwnerFailed(String),
}

impl TaskError {
    /// The failure that an operator reads.
    pub(crate) fn to_failure(&self) -> Failure {
        match self {
            Self::Store(error) => error.to_failure(),
            other => Failure::new(FailureKind::Store, other.to_string()),
        }
    }
}

/// What a task is to do: everything that is known before it is recorded.
#[derive(Debug, Clone)]
pub(crate) struct TaskSpec {
    /// Id of the instance, for the record and the queue.
    pub instance_id: String,
    /// The project of the instance; empty for a sweep from the command line.
    pub project_id: String,
    /// Where the instance is, as its URL says.
    pub target: Target,
    /// What asks for the task.
    pub cause: Cause,
    /// The settings, parsed: how the engine sweeps.
    pub settings: ScanSettings,
    /// The settings as text by key, for the record.
    pub sweep: SweepTexts,
    /// Credentials, TLS and timeouts of its connections.
    pub conn: ConnOptions,
    /// The window outside of which it holds; `None`: it sweeps at any time.
    pub window: Option<Window>,
    /// The backlog below which it ends at once, as a success.
    pub min_backlog: Option<BacklogSize>,
    /// The label that a daemon needs to claim it; empty: each daemon may.
    pub place: String,
}

impl TaskSpec {
    /// A sweep with these settings, at any time.
    pub(crate) fn new(instance_id: String, settings: &Settings, conn: ConnOptions, cause: Cause) -> Self {
        Self {
            instance_id,
            project_id: String::new(),
            target: settings.target.clone(),
            cause,
            settings: settings.scan.clone(),
            sweep: SweepTexts::clone(&settings.sweep_texts),
            conn,
            window: None,
            min_backlog: None,
            place: String::new(),
        }
    }

    /// A sweep of an instance of the daemon, with settings that may differ from the instance's own.
    ///
    /// # Errors
    /// [`TaskError::Settings`] where a certificate or key of the instance cannot be used.
    pub(crate) fn of(instance: &Instance, settings: &Settings, cause: Cause) -> Result<Self, TaskError> {
        let conn = conn_options_of_file(settings).map_err(TaskError::Settings)?;
        let spec = Self::new(instance.id.clone(), settings, conn, cause);
        Ok(Self { project_id: instance.project_id.clone(), place: instance.place.clone(), ..spec })
    }
}

/// How to connect to an instance, by its settings.
///
/// # Errors
/// A certificate or key file that cannot be used.
pub(crate) fn conn_options(settings: &Settings) -> Result<ConnOptions, Problem> {
    let tls = settings.tls.as_ref().map(Tls::load).transpose();
    Ok(ConnOptions {
        credentials: settings.credentials.clone(),
        sentinel_credentials: settings.sentinel_credentials.clone(),
        tls: tls.map_err(|error| Problem { origin: None, message: error.to_string() })?,
        node_map: settings.node_map.clone(),
        client_name: CLIENT_NAME.to_owned(),
        connect_timeout: settings.connect_timeout,
        response_timeout: settings.response_timeout,
    })
}

/// As [`conn_options`], for the daemon's settings file, in which a setting is written without dashes.
fn conn_options_of_file(settings: &Settings) -> Result<ConnOptions, Problem> {
    conn_options(settings).map_err(|problem| {
        let message = problem.message.trim_start_matches("--").to_owned();
        Problem { message, ..problem }
    })
}

/// New limits for a task that has not ended, by the keys of [`TUNE_KEYS`]. Settings of other keys stay.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Tune(SweepTexts);

impl Tune {
    /// Checks the limits of a request.
    ///
    /// # Errors
    /// Every problem; the keys are named.
    pub(crate) fn new(texts: SweepTexts) -> Result<Self, Vec<Problem>> {
        let unknown = texts.keys().find(|key| !TUNE_KEYS.contains(&key.as_str()));
        if let Some(key) = unknown {
            let message = format!("`{key}` cannot be changed while a task runs; these can: {}", TUNE_KEYS.join(", "));
            return Err(vec![Problem { origin: None, message }]);
        }
        settings::tuning_of(&texts)?;
        Ok(Self(texts))
    }

    /// The settings of a task with the new limits, as text and as values.
    fn over(&self, sweep: &SweepTexts) -> Result<(SweepTexts, Tuning), TaskError> {
        let texts: SweepTexts = sweep.iter().chain(&self.0).map(|(key, text)| (key.clone(), text.clone())).collect();
        // Both halves were checked by themselves; the first problem of the whole is enough.
        let first = |problems: Vec<Problem>| TaskError::Settings(problems.into_iter().next().unwrap_or_default());
        let tuning = settings::tuning_of(&texts).map_err(first)?;
        Ok((texts, tuning))
    }
}

impl fmt::Display for Tune {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<_> = self.0.iter().map(|(key, text)| format!("{key}={text}")).collect();
        f.write_str(&texts.join(" "))
    }
}

/// A task as it is now.
#[derive(Debug, Clone)]
pub(crate) struct TaskView {
    /// The record of the task, with its state.
    pub task: Task,
    /// What it has done so far.
    pub snapshot: Snapshot,
}

/// A task that was started.
#[derive(Debug)]
pub(crate) struct RunningTask {
    /// Stops the task or changes its limits.
    pub control: Control,
    /// The latest view. A slow reader misses views; it never holds the sweep.
    pub view: watch::Receiver<Arc<TaskView>>,
    ended: JoinHandle<()>,
}

impl RunningTask {
    /// Waits until the task has ended and its record is written. Returns the last view.
    pub(crate) async fn ended(self) -> Arc<TaskView> {
        if let Err(panic) = self.ended.await {
            tracing::error!(%panic, "the recorder broke");
        }
        self.view.borrow().clone()
    }
}

/// Creates, starts and finds tasks. A clone is the same service.
#[derive(Debug, Clone)]
pub(crate) struct TaskService {
    store: Store,
    metrics: Metrics,
    queue: Arc<Queue>,
    /// How this daemon presents itself to others; `None` where it is no daemon.
    identity: Option<Arc<DaemonRecord>>,
    /// This daemon among those that share the records; `None` where it is alone.
    member: Option<Arc<Member>>,
    notifier: Option<Notifier>,
}

impl TaskService {
    /// A service on these records that lets one task sweep at a time.
    pub(crate) fn new(store: Store) -> Self {
        Self::with_at_once(store, Metrics::default(), 1)
    }

    /// A service on these records that lets so many queued tasks sweep at the same time.
    pub(crate) fn with_at_once(store: Store, metrics: Metrics, at_once: usize) -> Self {
        Self { store, metrics, queue: Arc::new(Queue::new(at_once)), identity: None, member: None, notifier: None }
    }

    /// The same service, which reports failed tasks to this notifier.
    #[must_use]
    pub(crate) fn telling(self, notifier: Notifier) -> Self {
        Self { notifier: Some(notifier), ..self }
    }

    /// The store that holds the tasks and their checkpoints.
    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// Puts the time of the last complete sweep of each instance into the metrics, so that an alert on it survives a
    /// restart.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(crate) async fn show_successes(&self) -> Result<(), StoreError> {
        for (instance, at) in self.store.last_successes().await? {
            self.metrics.succeeded(&instance, at);
        }
        Ok(())
    }

    /// The automatic scan in force: what the API set, else what the settings say.
    ///
    /// # Errors
    /// [`TaskError::Store`].
    pub(crate) async fn auto_scan(&self, instance: &Instance) -> Result<AutoScan, TaskError> {
        let set = self.store.auto_scan(&instance.id, &instance.project_id).await?;
        Ok(set.unwrap_or_else(|| instance.auto_scan.clone()))
    }

    /// Records a task in state `Waiting`.
    ///
    /// # Errors
    /// [`TaskError::Store`]; then there is no task.
    pub(crate) async fn create(&self, spec: &TaskSpec) -> Result<Task, TaskError> {
        let task = new_task(spec, self.store.now());
        // Which shards it has is known once its masters were asked; the first checkpoint names them.
        self.store.insert(&task, None).await?;
        Ok(task)
    }

    /// The newest task of an instance, where that can go on: its process was killed or interrupted before the task
    /// ended, or the task failed.
    ///
    /// # Errors
    /// [`TaskError::Store`].
    pub(crate) async fn resumable(&self, instance_id: &str) -> Result<Option<Task>, TaskError> {
        let Some(mut task) = self.store.latest(instance_id).await? else { return Ok(None) };
        match task.state {
            // Its process was killed: it wrote no end.
            TaskState::Running => task.apply(Command::Interrupt, self.store.now())?,
            TaskState::Failed => task.apply(Command::Retry, self.store.now())?,
            _ => {}
        }
        Ok((!task.state.is_final()).then_some(task))
    }

    /// Starts a waiting or interrupted task from its checkpoint, without a place in the queue.
    ///
    /// # Errors
    /// [`TaskError`]; then nothing was started.
    pub(crate) async fn start(&self, mut task: Task, spec: TaskSpec) -> Result<RunningTask, TaskError> {
        task.apply(Command::Start, self.store.now())?;
        // A sweep from the command line gets its whole time budget again.
        task.spent = Duration::ZERO;
        let (plan, snapshot) = self.plan(&task, &spec, self.store.shards(task.id).await?);
        self.store.update(&task).await?;
        let run = self.prepare(task, plan, snapshot);
        let (control, view) = (run.recorder.control.clone(), run.recorder.view.subscribe());
        let ended = tokio::spawn(async move {
            let mut run = run;
            run.sweep(None).await;
            run.recorder.publish();
        });
        Ok(RunningTask { control, view, ended })
    }

    /// The plan for the engine, from the checkpoint on, and the view that the checkpoint gives.
    fn plan(&self, task: &Task, spec: &TaskSpec, known: BTreeMap<ShardId, StoredShard>) -> (ScanPlan, Snapshot) {
        let mut snapshot = Snapshot { started_at: task.started_at, ..Snapshot::default() };
        for (id, shard) in &known {
            // The counters of the checkpoint are in every view, also where the task is stopped at once, and where the
            // slots of a shard have gone to others since.
            let view =
                ShardView { failure: None, finished: false, hold: None, hold_detail: None, ..shard.view.clone() };
            snapshot.shards.insert(id.clone(), Arc::new(view));
        }
        let plan = ScanPlan {
            task: task.id,
            journals: self.store.journals().cloned(),
            topology: Arc::new(Topology::new(spec.target.clone(), self.named(&spec.conn), spec.settings.follow)),
            known,
            settings: spec.settings.clone(),
            // No person waits for a due scan, nor for one that goes on after a restart, perhaps of the whole machine:
            // the server may come up later.
            patient: task.cause == Cause::Schedule || task.cause == Cause::Api && task.started_at.is_some(),
        };
        (plan, snapshot)
    }

    /// With the name of this daemon in CLIENT LIST, where several daemons share the records.
    fn named(&self, conn: &ConnOptions) -> ConnOptions {
        let names = self.identity.as_ref().filter(|_| self.member.is_some());
        let name = names
            .map(|identity| format!("{CLIENT_NAME}:{}", identity.name.replace(|c: char| !c.is_ascii_graphic(), "-")));
        ConnOptions { client_name: name.unwrap_or_else(|| CLIENT_NAME.to_owned()), ..conn.clone() }
    }

    /// A task with what it needs to run in this process.
    fn prepare(&self, task: Task, plan: ScanPlan, snapshot: Snapshot) -> TaskRun {
        let control = Control::new(&plan.settings);
        if let Some(member) = &self.member {
            control.lend(member.until());
        }
        // A keep run has no time budget: that its time is over is no failure.
        let allowed = if task.keeps() { Duration::MAX } else { plan.settings.timeout };
        let budget = Arc::new(TimeBudget::new(allowed, task.spent));
        let view = watch::Sender::new(Arc::new(TaskView { task: task.clone(), snapshot }));
        let (orders, inbox) = mpsc::channel(ORDER_BUFFER);
        let paused = watch::Sender::new(task.state == TaskState::Paused);
        let recorder =
            Recorder::new(self.store.clone(), self.metrics.clone(), control, budget, paused, inbox, task, view);
        TaskRun { recorder, plan, orders }
    }
}

/// A task that this process has, with all that it needs to sweep.
struct TaskRun {
    recorder: Recorder,
    plan: ScanPlan,
    orders: mpsc::Sender<OrderRequest>,
}

impl TaskRun {
    /// Waits until the task is admitted, sweeps, and records the end.
    async fn run(&mut self, mut admission: Admission, min_backlog: Option<BacklogSize>, closing: &CancellationToken) {
        let control = self.recorder.control.clone();
        let mut admitted = None;
        admission.decide(&control, &mut admitted);
        let work = async {
            match self.recorder.wait_for_turn().await {
                Err(reason) => self.recorder.finish(Outcome::Stopped(reason), Some(closing)).await,
                Ok(()) => {
                    self.recorder.begin().await;
                    match self.recorder.with_orders(nothing_to_gain(&self.plan, min_backlog)).await {
                        Err(reason) => self.recorder.finish(Outcome::Stopped(reason), Some(closing)).await,
                        Ok(Some(note)) => {
                            self.recorder.task.note = Some(note);
                            self.recorder.finish(Outcome::Complete, Some(closing)).await;
                        }
                        Ok(None) => self.sweep(Some(closing)).await,
                    }
                }
            }
        };
        tokio::select! {
            () = work => {}
            () = admission.run(control, admitted) => {}
        }
    }

    /// Runs the engine to its end and records how it ended.
    async fn sweep(&mut self, persist: Option<&CancellationToken>) {
        let (sender, events) = mpsc::channel(EVENT_BUFFER);
        let control = self.recorder.control.clone();
        let budget = self.recorder.budget.clone();
        let plan = self.plan.clone();
        let is_hourly = self.recorder.task.cause == Cause::Keep;
        let (clock, view) = (self.recorder.store.clock(), self.recorder.view.subscribe());
        let engine = tokio::spawn(async move {
            let run = engine::run(plan, control.watch(), sender);
            tokio::pin!(run);
            tokio::select! {
                outcome = &mut run => outcome,
                () = keep_end::is_over(&clock, view), if is_hourly => {
                    control.stop(StopReason::Kept);
                    run.await
                }
                () = budget.used_up(control.watch()) => {
                    control.stop(StopReason::TimedOut);
                    run.await
                }
            }
        });
        self.recorder.consume(events).await;
        let unowned = self.plan.topology.unowned();
        if !unowned.is_empty() {
            let note = format!(
                "no master owns the slots {unowned}: their keys were not swept; see `redis-cli --cluster check`"
            );
            self.recorder.task.note = Some(note);
        }
        let outcome = engine.await.unwrap_or_else(|panic| {
            Outcome::Failed(Failure::new(FailureKind::Protocol, format!("the sweep broke: {panic}")))
        });
        self.recorder.finish(outcome, persist).await;
    }
}

/// Why a due scan would gain too little to begin; `None`: it may begin.
async fn nothing_to_gain(plan: &ScanPlan, min_backlog: Option<BacklogSize>) -> Option<String> {
    let least = min_backlog?;
    let masters = plan.topology.view(None).await.ok()?.masters;
    backlog::nothing_to_gain(&masters, plan.topology.options(), &plan.settings, least).await
}

/// The first record of a task.
fn new_task(spec: &TaskSpec, now: Timestamp) -> Task {
    Task {
        id: TaskId::at(now),
        instance_id: spec.instance_id.clone(),
        project_id: spec.project_id.clone(),
        target: spec.target.to_string(),
        sweep: spec.sweep.clone(),
        respect_window: spec.window.is_some(),
        cause: spec.cause,
        state: TaskState::Waiting,
        created_at: now,
        started_at: None,
        finished_at: None,
        num: 0,
        spent: Default::default(),
        failure: None,
        note: None,
        owner: None,
        fence: 0,
        place: spec.place.clone(),
    }
}

/// The masters of an instance, and how to connect to them.
///
/// # Errors
/// Why they cannot be found.
pub(crate) async fn masters(settings: &Settings) -> Result<(View, ConnOptions), Failure> {
    let conn =
        conn_options_of_file(settings).map_err(|problem| Failure::new(FailureKind::CannotConnect, problem.message))?;
    let topology = Topology::new(settings.target.clone(), conn.clone(), settings.scan.follow);
    Ok((topology.view(None).await.map_err(NodeError::into_failure)?, conn))
}

/// Whether an instance can be swept, by INFO of each of its masters.
///
/// # Errors
/// Why it cannot be swept.
pub(crate) async fn may_be_swept(settings: &Settings) -> Result<(), Failure> {
    let (view, options) = masters(settings).await?;
    for master in view.masters {
        let mut conn = Conn::open(&master.addr, &options).await.map_err(NodeError::into_failure)?;
        let info = commands::info(&mut conn).await.map_err(NodeError::into_failure)?;
        engine::may_be_swept(view.kind, &info)?;
    }
    Ok(())
}
