//! Tasks from wish to record. The only writer of task state; command line, API and scheduler all come here.

mod recorder;

use std::sync::Arc;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::engine::control::{Control, StopReason};
use crate::engine::{self, Outcome, ScanPlan};
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::{ShardView, Snapshot};
use crate::model::target::Target;
use crate::model::task::{Cause, Command, IllegalTransition, Task, TaskId, TaskState, transition};
use crate::node::conn::ConnOptions;
use crate::node::topology::Topology;
use crate::settings::ScanSettings;
use crate::store::{Store, StoreError};

/// Events that may wait for the recorder. The engine sends a dozen a second and shard; a recorder that is slower than
/// that for long holds the sweep rather than filling the memory.
const EVENT_BUFFER: usize = 256;

/// Trouble with a task.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// The records cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A command that the task's state does not take.
    #[error(transparent)]
    Transition(#[from] IllegalTransition),
}

/// What somebody wants swept.
#[derive(Debug, Clone)]
pub struct TaskSpec {
    /// The instance.
    pub instance_id: String,
    /// Where it is.
    pub target: Target,
    /// Who asks.
    pub cause: Cause,
    /// How to sweep it.
    pub settings: ScanSettings,
    /// How to connect.
    pub conn: ConnOptions,
}

/// A task with its present view.
#[derive(Debug, Clone)]
pub struct TaskView {
    /// The record.
    pub task: Task,
    /// The figures.
    pub snapshot: Snapshot,
}

/// A task that was started.
#[derive(Debug)]
pub struct RunningTask {
    /// Pause, stop, other limits.
    pub control: Control,
    /// The latest view. A slow reader misses views, never holds the sweep.
    pub view: watch::Receiver<Arc<TaskView>>,
    ended: JoinHandle<()>,
}

impl RunningTask {
    /// Waits until the task has ended and its record is written. Returns the last view.
    pub async fn ended(self) -> Arc<TaskView> {
        if let Err(panic) = self.ended.await {
            tracing::error!(%panic, "the recorder broke");
        }
        self.view.borrow().clone()
    }
}

/// Creates, starts and finds tasks.
#[derive(Debug, Clone)]
pub struct TaskService {
    store: Store,
}

impl TaskService {
    /// A service on these records.
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    /// Records a task in state `Waiting`.
    ///
    /// # Errors
    /// [`TaskError::Store`]; then there is no task.
    pub async fn create(&self, spec: &TaskSpec) -> Result<Task, TaskError> {
        let task = Task {
            id: TaskId::generate(),
            instance_id: spec.instance_id.clone(),
            target: spec.target.to_string(),
            cause: spec.cause,
            state: TaskState::Waiting,
            created_at: Timestamp::now(),
            started_at: None,
            finished_at: None,
            num: 0,
            failure: None,
        };
        // Which shards it has is known once its masters were asked; the first checkpoint names them.
        self.store.insert(&task, &[]).await?;
        Ok(task)
    }

    /// The newest task of an instance where that can go on: its process was killed or interrupted before it ended.
    ///
    /// # Errors
    /// [`TaskError::Store`].
    pub async fn resumable(&self, instance_id: &str) -> Result<Option<Task>, TaskError> {
        let Some(mut task) = self.store.latest(instance_id).await? else { return Ok(None) };
        if task.state == TaskState::Running {
            // Whoever ran it wrote no end: the process was killed.
            task.state = transition(task.state, Command::Interrupt)?;
        }
        Ok((!task.state.is_final()).then_some(task))
    }

    /// Starts a task that is waiting, or one that was interrupted, from its checkpoint.
    ///
    /// # Errors
    /// [`TaskError`]; then nothing was started.
    pub async fn start(&self, mut task: Task, spec: TaskSpec) -> Result<RunningTask, TaskError> {
        task.state = transition(task.state, Command::Start)?;
        task.started_at = task.started_at.or_else(|| Some(Timestamp::now()));
        task.failure = None;
        let known = self.store.shards(task.id).await?;
        self.store.update(&task).await?;
        let plan = ScanPlan {
            task: task.id,
            tallies: self.store.tallies().cloned(),
            topology: Arc::new(Topology::new(spec.target, spec.conn, spec.settings.follow)),
            known,
            settings: spec.settings,
        };
        Ok(self.launch(task, plan))
    }

    fn launch(&self, task: Task, plan: ScanPlan) -> RunningTask {
        let control = Control::new(&plan.settings);
        let timeout = plan.settings.timeout;
        let (sender, events) = tokio::sync::mpsc::channel(EVENT_BUFFER);
        let mut snapshot = Snapshot { started_at: task.started_at, ..Snapshot::default() };
        for (id, shard) in &plan.known {
            // What the checkpoint holds counts from the first view on, however soon the task is stopped again, and also
            // where its slots have gone to other shards since.
            let view = ShardView { passes: shard.passes.clone(), ..ShardView::default() };
            snapshot.shards.insert(id.clone(), view);
        }
        let (view_sender, view) = watch::channel(Arc::new(TaskView { task: task.clone(), snapshot }));
        let engine = tokio::spawn({
            let control = control.clone();
            async move {
                let run = engine::run(plan, control.orders(), sender);
                tokio::pin!(run);
                tokio::select! {
                    outcome = &mut run => outcome,
                    () = tokio::time::sleep(timeout) => {
                        control.stop(StopReason::TimedOut);
                        run.await
                    }
                }
            }
        });
        let recorder = recorder::Recorder::new(self.store.clone(), task, view_sender);
        let ended = tokio::spawn(async move {
            let recorder = recorder.consume(events).await;
            let outcome = engine.await.unwrap_or_else(|panic| {
                Outcome::Failed(Failure::new(FailureKind::Protocol, format!("the sweep broke: {panic}")))
            });
            recorder.finish(outcome, timeout).await;
        });
        RunningTask { control, view, ended }
    }
}
