//! The daemon's tasks: one at a time for each instance, so many at once over all, found again after a restart.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::engine::control::{Control, StopReason};
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::Snapshot;
use crate::model::schedule::Window;
use crate::model::shard::ShardId;
use crate::model::task::{Cause, Command, Task, TaskId, TaskState, transition};
use crate::settings::Settings;
use crate::settings::serve::{self, Instance, ServeSettings};
use crate::store::StoredShard;
use crate::tasks::admission::Admission;
use crate::tasks::recorder::{Order, OrderRequest};
use crate::tasks::{TaskError, TaskService, TaskSpec, TaskView, new_task};

/// How often a task that has ended is looked for until it is gone.
const GONE_SOON: Duration = Duration::from_millis(1);

/// The instance has a task that has not ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the task {0} of this instance has not ended")]
pub struct Busy(pub TaskId);

/// What is on hand.
#[derive(Debug)]
pub(super) struct Queue {
    active: Mutex<BTreeMap<TaskId, ActiveTask>>,
    /// Held from the look for an unfinished task to the record of the new one.
    submitting: tokio::sync::Mutex<()>,
    slots: Arc<Semaphore>,
    slots_wanted: AtomicUsize,
    tracker: TaskTracker,
    closing: CancellationToken,
}

#[derive(Debug, Clone)]
struct ActiveTask {
    instance_id: String,
    control: Control,
    view: watch::Receiver<Arc<TaskView>>,
    orders: mpsc::Sender<OrderRequest>,
}

impl Queue {
    pub(super) fn new(slots: usize) -> Self {
        Self {
            active: Mutex::default(),
            submitting: tokio::sync::Mutex::default(),
            slots: Arc::new(Semaphore::new(slots)),
            slots_wanted: AtomicUsize::new(slots),
            tracker: TaskTracker::new(),
            closing: CancellationToken::new(),
        }
    }

    fn active(&self) -> MutexGuard<'_, BTreeMap<TaskId, ActiveTask>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TaskService {
    /// Records a task and queues it, also where the caller goes away meanwhile: what is on record is on hand. `due`: the due
    /// time that caused it, dealt with in the same write.
    ///
    /// # Errors
    /// [`TaskError::Busy`] where the instance has a task that has not ended; [`TaskError::Store`]; then there is no task.
    pub async fn submit(&self, spec: TaskSpec, due: Option<Timestamp>) -> Result<Task, TaskError> {
        let service = self.clone();
        let submitted = self.queue.tracker.spawn(async move { service.record_and_queue(spec, due).await });
        submitted.await.unwrap_or(Err(TaskError::Closing))
    }

    async fn record_and_queue(&self, spec: TaskSpec, due: Option<Timestamp>) -> Result<Task, TaskError> {
        let _one_at_a_time = self.queue.submitting.lock().await;
        if self.queue.closing.is_cancelled() {
            return Err(TaskError::Closing);
        }
        while let Some(id) = self.active_task_of(&spec.instance_id) {
            // A reader of the records learns of the end a moment before the task leaves this map.
            if !self.store.task(id).await?.is_some_and(|task| task.state.is_final()) {
                return Err(Busy(id).into());
            }
            tokio::time::sleep(GONE_SOON).await;
        }
        let task = new_task(&spec);
        self.store.insert(&task, due).await.inspect_err(|_| self.metrics.store_failed())?;
        self.enqueue(task.clone(), spec, BTreeMap::new());
        Ok(task)
    }

    /// Records a due scan that cannot even begin, as failed, so that the history shows that it was due.
    ///
    /// # Errors
    /// [`TaskError::Store`]; then there is no task.
    pub async fn submit_failed(
        &self,
        instance: &Instance,
        settings: &Settings,
        due: Timestamp,
        failure: Failure,
    ) -> Result<Task, TaskError> {
        // Nothing connects with this; it only describes the task.
        let settings = Settings { tls: None, ..settings.clone() };
        let spec = TaskSpec::of(instance, &settings, Cause::Schedule)?;
        let mut task = new_task(&TaskSpec { window: instance.window.clone(), ..spec });
        task.state = transition(task.state, Command::Fail)?;
        task.finished_at = Some(Timestamp::now());
        task.failure = Some(failure);
        self.store.insert(&task, Some(due)).await.inspect_err(|_| self.metrics.store_failed())?;
        self.metrics.ended(&task);
        Ok(task)
    }

    /// The task of an instance that has not ended.
    pub fn active_task_of(&self, instance_id: &str) -> Option<TaskId> {
        let active = self.queue.active();
        active.iter().find(|(_, task)| task.instance_id == instance_id).map(|(id, _)| *id)
    }

    /// Takes up what an earlier process left unfinished. Called once, before anything is submitted.
    ///
    /// # Errors
    /// [`TaskError`] where records cannot be read or written.
    pub async fn recover(&self, settings: &ServeSettings) -> Result<(), TaskError> {
        for mut task in self.store.unfinished().await? {
            let spec = settings
                .instance(&task.instance_id)
                .ok_or_else(|| "the instance is no longer in the settings".to_owned())
                .and_then(|instance| spec_of(&task, instance));
            let spec = match spec {
                Ok(_) if self.active_task_of(&task.instance_id).is_some() => {
                    Err("the instance has an older task".to_owned())
                }
                other => other,
            };
            match spec {
                Ok(spec) => {
                    // Read first: that it still says running tells that its process was killed.
                    let known = self.store.shards(task.id).await?;
                    if task.state == TaskState::Running {
                        task.state = transition(task.state, Command::Interrupt)?;
                        self.store.update(&task).await?;
                    }
                    tracing::info!(task = %task.id, instance = task.instance_id, state = %task.state, "taken up again");
                    self.enqueue(task, spec, known);
                }
                Err(why) => self.give_up(task, &why).await?,
            }
        }
        Ok(())
    }

    /// Ends a task that cannot go on, with the count that its batch journal holds.
    async fn give_up(&self, mut task: Task, why: &str) -> Result<(), TaskError> {
        let view = self.stored_view(task.clone()).await?;
        task.num = view.snapshot.reclaimed();
        task.state = transition(task.state, Command::Fail)?;
        task.finished_at = Some(Timestamp::now());
        let message = format!("the daemon was stopped before the sweep was complete, and {why}");
        let failure = Failure::new(FailureKind::Interrupted, message);
        task.failure =
            Some(failure.hint("what it freed is counted; scan again once the settings are as they should be"));
        self.store.checkpoint(&task, view.snapshot.shards.iter()).await?;
        tracing::warn!(task = %task.id, instance = task.instance_id, why, "an unfinished task cannot go on");
        self.metrics.ended(&task);
        if let Some(journals) = self.store.journals() {
            journals.forget(task.id);
        }
        Ok(())
    }

    /// Cannot fail: what is on record is on hand. `known`: what a checkpoint holds of it.
    fn enqueue(&self, task: Task, spec: TaskSpec, known: BTreeMap<ShardId, StoredShard>) {
        let id = task.id;
        let instance_id = task.instance_id.clone();
        let (plan, snapshot) = self.plan(&task, &spec, known);
        let task = Task { num: snapshot.reclaimed(), ..task };
        let mut job = self.job(task, plan, snapshot);
        let admission =
            Admission { window: spec.window, slots: self.queue.slots.clone(), paused: job.recorder.paused.subscribe() };
        let active = ActiveTask {
            instance_id,
            control: job.recorder.control.clone(),
            view: job.recorder.view.subscribe(),
            orders: job.orders.clone(),
        };
        let count = {
            let mut all = self.queue.active();
            all.insert(id, active);
            all.len()
        };
        self.metrics.unfinished(count);
        let service = self.clone();
        self.queue.tracker.spawn(async move {
            job.run(admission, spec.min_backlog, &service.queue.closing).await;
            // A client that sees the end may submit the next task, so this one has to leave the map first.
            let count = {
                let mut all = service.queue.active();
                all.remove(&id);
                all.len()
            };
            service.metrics.unfinished(count);
            job.recorder.publish();
        });
    }

    /// One task: as it is now where it is on hand, else as it was recorded.
    ///
    /// # Errors
    /// [`TaskError::Store`].
    pub async fn find(&self, id: TaskId) -> Result<Option<Arc<TaskView>>, TaskError> {
        if let Some(view) = self.watch(id) {
            return Ok(Some(view.borrow().clone()));
        }
        match self.store.task(id).await? {
            Some(task) => Ok(Some(Arc::new(self.stored_view(task).await?))),
            None => Ok(None),
        }
    }

    async fn stored_view(&self, task: Task) -> Result<TaskView, TaskError> {
        let stored = self.store.shards(task.id).await?;
        let shards = stored.into_iter().map(|(id, shard)| (id, Arc::new(shard.view))).collect();
        let snapshot = Snapshot { started_at: task.started_at, shards, waits: None };
        Ok(TaskView { task, snapshot })
    }

    /// The view of a task that is on hand, as it changes.
    pub fn watch(&self, id: TaskId) -> Option<watch::Receiver<Arc<TaskView>>> {
        self.queue.active().get(&id).map(|task| task.view.clone())
    }

    /// Gives an order to a task, and returns its view once that is carried out. A cancelled task has ended by then.
    ///
    /// # Errors
    /// [`TaskError::Ended`] for a task that is not on hand; [`TaskError::Transition`] for an order that makes no sense
    /// now; [`TaskError::Store`] for one that could not be recorded, and was not carried out.
    pub async fn order(&self, id: TaskId, order: Order) -> Result<Arc<TaskView>, TaskError> {
        let Some(active) = self.queue.active().get(&id).cloned() else { return Err(TaskError::Ended) };
        let cancel = order == Order::Cancel;
        let (answer, answered) = oneshot::channel();
        active.orders.send(OrderRequest { order, answer }).await.map_err(|_| TaskError::Ended)?;
        answered.await.map_err(|_| TaskError::Ended)??;
        let mut view = active.view;
        if cancel {
            // The sender goes with the task, which has published its end before.
            let _ = view.wait_for(|view| view.task.state.is_final()).await;
        }
        let view = view.borrow().clone();
        Ok(view)
    }

    /// Lets another number of tasks sweep at once. Those that sweep already are not disturbed.
    pub fn set_slots(&self, slots: usize) {
        let before = self.queue.slots_wanted.swap(slots, Ordering::SeqCst);
        if slots > before {
            self.queue.slots.add_permits(slots - before);
            return;
        }
        let queue = self.queue.clone();
        self.queue.tracker.spawn(async move {
            let fewer = u32::try_from(before - slots).unwrap_or(u32::MAX);
            tokio::select! {
                taken = queue.slots.acquire_many(fewer) => {
                    if let Ok(taken) = taken { taken.forget() }
                }
                () = queue.closing.cancelled() => {}
            }
        });
    }

    /// Tells every task to end after its batch and to keep its checkpoint, and waits until all have.
    pub async fn close(&self) {
        {
            let _nobody_submits = self.queue.submitting.lock().await;
            self.queue.closing.cancel();
        }
        for task in self.queue.active().values() {
            task.control.stop(StopReason::Interrupted);
        }
        self.queue.tracker.close();
        self.queue.tracker.wait().await;
    }
}

/// How an unfinished task goes on: with the settings that it began with.
fn spec_of(task: &Task, instance: &Instance) -> Result<TaskSpec, String> {
    if instance.settings.target.to_string() != task.target {
        return Err(format!("the instance has another address now: {}", instance.settings.target));
    }
    let settings = serve::with_texts(&instance.settings, &task.sweep).map_err(|problems| {
        let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
        format!("its settings are no longer valid: {}", problems.join("; "))
    })?;
    let window: Option<Window> = instance.window.clone().filter(|_| task.respect_window);
    let spec = TaskSpec::of(instance, &settings, task.cause).map_err(|error| error.to_string())?;
    // What had not begun is still weighed.
    let weighed = task.cause == Cause::Schedule && task.started_at.is_none();
    Ok(TaskSpec { window, min_backlog: instance.min_backlog.filter(|_| weighed), ..spec })
}
