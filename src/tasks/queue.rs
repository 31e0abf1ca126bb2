//! The daemon's tasks: at most one for each instance, a limited number that sweep at the same time, and all found again
//! after a restart.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::engine::control::{Control, StopReason};
use crate::model::event::Event;
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::{ShardView, Snapshot};
use crate::model::schedule::Window;
use crate::model::shard::ShardId;
use crate::model::task::{Cause, Command, Task, TaskId, TaskState};
use crate::model::throttle::Reason;
use crate::settings::Settings;
use crate::settings::serve::{self, Instance, ServeSettings};
use crate::store::{DueOutcome, StoreError, StoredShard};
use crate::tasks::admission::Admission;
use crate::tasks::recorder::{Order, OrderRequest};
use crate::tasks::{TaskError, TaskService, TaskSpec, TaskView, new_task};

/// How often the record of a task that another daemon has is read, for those who follow it.
const POLL_OTHERS: Duration = Duration::from_secs(1);
/// How many keep runs a new task asks to give way before it fails: another daemon may begin the next one in between.
const GIVE_WAY_AT_MOST: usize = 5;
/// How often it is checked whether a task that has ended has left the active tasks.
const RECHECK_ENDED: Duration = Duration::from_millis(1);

/// The instance has a task that has not ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the task {0} of this instance has not ended")]
pub(crate) struct Unfinished(pub TaskId);

/// The active tasks of this process, and how many of them may sweep at a time.
#[derive(Debug)]
pub(super) struct Queue {
    active: Mutex<BTreeMap<TaskId, ActiveTask>>,
    /// Changes whenever a task becomes active.
    arrived: watch::Sender<()>,
    /// Held from the check for an unfinished task until the new one is recorded.
    submitting: tokio::sync::Mutex<()>,
    at_once: Arc<Semaphore>,
    /// How many tasks may sweep at a time. Where it was lowered, `at_once` has more permits until enough tasks have ended.
    at_once_wanted: AtomicUsize,
    tracker: TaskTracker,
    closing: CancellationToken,
}

#[derive(Debug, Clone)]
struct ActiveTask {
    instance_id: String,
    /// Whether it is a keep run, which does not count toward `at-once` and gives way.
    keeps: bool,
    control: Control,
    view: watch::Receiver<Arc<TaskView>>,
    orders: mpsc::Sender<OrderRequest>,
}

impl Queue {
    pub(super) fn new(at_once: usize) -> Self {
        Self {
            active: Mutex::default(),
            arrived: watch::Sender::new(()),
            submitting: tokio::sync::Mutex::default(),
            at_once: Arc::new(Semaphore::new(at_once)),
            at_once_wanted: AtomicUsize::new(at_once),
            tracker: TaskTracker::new(),
            closing: CancellationToken::new(),
        }
    }

    fn active(&self) -> MutexGuard<'_, BTreeMap<TaskId, ActiveTask>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TaskService {
    /// Records a task and queues it, also where the caller goes away meanwhile: a recorded task is active, or, where
    /// several daemons share the records, waits for one that may admit it. `due`: the due time that caused it, marked as
    /// handled in the same write.
    ///
    /// # Errors
    /// [`TaskError::Unfinished`] where the instance has a task that has not ended; [`TaskError::Store`]; then there is no task.
    pub(crate) async fn submit(&self, spec: TaskSpec, due: Option<Timestamp>) -> Result<Task, TaskError> {
        let is_keep = spec.cause == Cause::Keep;
        for _ in 0..GIVE_WAY_AT_MOST {
            let (service, spec) = (self.clone(), spec.clone());
            let submitted = self.queue.tracker.spawn(async move { service.record_and_queue(spec, due).await });
            match submitted.await.unwrap_or(Err(TaskError::Closing)) {
                Err(TaskError::Unfinished(Unfinished(other))) if !is_keep && self.gives_way(other).await? => {}
                submitted => return submitted,
            }
        }
        Err(TaskError::OwnerSilent)
    }

    /// Ends a keep run so that another task of its instance may begin. Returns false where the task is no keep run or
    /// is paused.
    async fn gives_way(&self, id: TaskId) -> Result<bool, TaskError> {
        match self.store.task(id).await? {
            Some(task) if gives_way(&task) => match self.order(id, Order::GiveWay).await {
                Ok(_) | Err(TaskError::Ended) => Ok(true),
                Err(error) => Err(error),
            },
            _ => Ok(false),
        }
    }

    async fn record_and_queue(&self, spec: TaskSpec, due: Option<Timestamp>) -> Result<Task, TaskError> {
        let _one_at_a_time = self.queue.submitting.lock().await;
        if self.queue.closing.is_cancelled() {
            return Err(TaskError::Closing);
        }
        if let Some(member) = &self.member {
            let task = new_task(&spec, self.store.now());
            self.insert(&task, due).await?;
            member.wake_claims();
            return Ok(task);
        }
        while let Some(id) = self.active_task_of(&spec.instance_id) {
            // The end of a task is recorded a moment before it leaves the active tasks.
            if !self.store.task(id).await?.is_some_and(|task| task.state.is_final()) {
                return Err(Unfinished(id).into());
            }
            tokio::time::sleep(RECHECK_ENDED).await;
        }
        let task = new_task(&spec, self.store.now());
        self.insert(&task, due).await?;
        self.enqueue(task.clone(), spec, BTreeMap::new());
        Ok(task)
    }

    async fn insert(&self, task: &Task, due: Option<Timestamp>) -> Result<(), TaskError> {
        let due = due.map(|at| DueOutcome { at, outcome: "run" });
        match self.store.insert(task, due).await {
            Ok(()) => Ok(()),
            Err(StoreError::Unfinished(instance)) => {
                let other = self.store.latest(&instance).await?;
                Err(Unfinished(other.map_or(task.id, |other| other.id)).into())
            }
            Err(error @ StoreError::AlreadyHandled) => Err(error.into()),
            Err(error) => {
                self.metrics.store_failed();
                Err(error.into())
            }
        }
    }

    /// Records a due scan that cannot even begin, as failed, so that the history shows that it was due.
    ///
    /// # Errors
    /// [`TaskError::Store`]; then there is no task.
    pub(crate) async fn submit_failed(
        &self,
        instance: &Instance,
        settings: &Settings,
        due: Timestamp,
        failure: Failure,
    ) -> Result<Task, TaskError> {
        // Without TLS files, which may be what is wrong: these settings only describe the task.
        let settings = Settings { tls: None, ..settings.clone() };
        let spec = TaskSpec::of(instance, &settings, Cause::Schedule)?;
        let now = self.store.now();
        let mut task = new_task(&TaskSpec { window: instance.window.clone(), ..spec }, now);
        task.apply(Command::Fail, now)?;
        task.failure = Some(failure);
        self.insert(&task, Some(due)).await?;
        self.metrics.ended(&task);
        self.tell(&task);
        Ok(task)
    }

    /// Reports a failed task to the webhook, where one is set.
    fn tell(&self, task: &Task) {
        if let (TaskState::Failed, Some(notifier)) = (task.state, &self.notifier) {
            notifier.notify(Event::task_failed(task, self.store.now()));
        }
    }

    /// Whether an instance has a task, here or on another daemon, that has not ended and does not give way to others.
    ///
    /// # Errors
    /// [`TaskError::Store`].
    pub(crate) async fn is_busy(&self, instance_id: &str) -> Result<bool, TaskError> {
        let here = {
            let active = self.queue.active();
            active.values().find(|task| task.instance_id == instance_id).map(|task| task.view.borrow().task.clone())
        };
        let latest = match here {
            None if self.member.is_some() => self.store.latest(instance_id).await?,
            here => here,
        };
        Ok(latest.is_some_and(|task| !task.state.is_final() && !gives_way(&task)))
    }

    /// The active task of an instance in this process.
    pub(crate) fn active_task_of(&self, instance_id: &str) -> Option<TaskId> {
        let active = self.queue.active();
        active.iter().find(|(_, task)| task.instance_id == instance_id).map(|(id, _)| *id)
    }

    /// Takes up the tasks that an earlier process left unfinished. Called once, before a task is submitted. Does
    /// nothing where several daemons share the records: they claim such tasks.
    ///
    /// # Errors
    /// [`TaskError`] where records cannot be read or written.
    pub(crate) async fn recover(&self, settings: &ServeSettings) -> Result<(), TaskError> {
        if self.member.is_some() {
            return Ok(());
        }
        for task in self.store.unfinished().await? {
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
                Ok(spec) => self.take_up(task, spec).await?,
                Err(why) => self.give_up(task, &why).await?,
            }
        }
        Ok(())
    }

    /// Goes on with a recorded task.
    pub(super) async fn take_up(&self, mut task: Task, spec: TaskSpec) -> Result<(), TaskError> {
        // Read before the state is changed: a task that still says running is one whose process was killed.
        let known = self.store.shards(task.id).await?;
        if task.state == TaskState::Running {
            task.apply(Command::Interrupt, self.store.now())?;
            self.store.update(&task).await?;
        }
        tracing::info!(task = %task.id, instance = task.instance_id, state = %task.state, "taken up");
        self.enqueue(task, spec, known);
        Ok(())
    }

    /// Ends a task that cannot go on, with the count that its batch journal holds.
    pub(super) async fn give_up(&self, mut task: Task, why: &str) -> Result<(), TaskError> {
        let view = self.stored_view(task.clone()).await?;
        task.num = view.snapshot.reclaimed();
        task.apply(Command::Fail, self.store.now())?;
        let message = format!("the daemon was stopped before the sweep was complete, and {why}");
        let failure = Failure::new(FailureKind::Interrupted, message);
        task.failure =
            Some(failure.hint("what it freed is counted; scan again once the settings are as they should be"));
        self.store.checkpoint(&task, view.snapshot.shards.iter()).await?;
        tracing::warn!(task = %task.id, instance = task.instance_id, why, "an unfinished task cannot go on");
        self.metrics.ended(&task);
        self.tell(&task);
        if let Some(journals) = self.store.journals() {
            journals.forget(task.id);
        }
        Ok(())
    }

    /// Makes a recorded task active. Cannot fail: every recorded task is active or waits for a daemon. `known`: its
    /// checkpoint.
    fn enqueue(&self, task: Task, spec: TaskSpec, known: BTreeMap<ShardId, StoredShard>) {
        let id = task.id;
        let instance_id = task.instance_id.clone();
        let (plan, snapshot) = self.plan(&task, &spec, known);
        let task = Task { num: snapshot.reclaimed(), ..task };
        let task_keeps = task.keeps();
        let mut run = self.prepare(task, plan, snapshot);
        let admission = Admission {
            clock: self.store.clock(),
            window: spec.window,
            at_once: (!task_keeps).then(|| self.queue.at_once.clone()),
            paused: run.recorder.paused.subscribe(),
        };
        let active = ActiveTask {
            instance_id,
            keeps: task_keeps,
            control: run.recorder.control.clone(),
            view: run.recorder.view.subscribe(),
            orders: run.orders.clone(),
        };
        let count = {
            let mut all = self.queue.active();
            all.insert(id, active);
            all.len()
        };
        self.metrics.unfinished(count);
        self.queue.arrived.send_replace(());
        let service = self.clone();
        self.queue.tracker.spawn(async move {
            run.run(admission, spec.min_backlog, &service.queue.closing).await;
            // A client that sees the end may submit the next task at once, so the task leaves the active ones before
            // its end is published.
            let count = {
                let mut all = service.queue.active();
                all.remove(&id);
                all.len()
            };
            service.metrics.unfinished(count);
            service.tell(&run.recorder.task);
            run.recorder.publish();
            if let Some(member) = &service.member {
                member.wake_claims();
            }
        });
    }

    /// One task: as it is now where this process has it, else as it was recorded.
    ///
    /// # Errors
    /// [`TaskError::Store`].
    pub(crate) async fn find(&self, id: TaskId) -> Result<Option<Arc<TaskView>>, TaskError> {
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
        Ok(self.view_of(task, stored.into_iter().map(|(id, shard)| (id, shard.view))))
    }

    fn view_of(&self, task: Task, shards: impl Iterator<Item = (ShardId, ShardView)>) -> TaskView {
        // The hold of a stored view is of the present only while a daemon sweeps the task.
        let present = |view: ShardView| match &task.owner {
            Some(_) => view,
            None => ShardView { hold: None, hold_detail: None, ..view },
        };
        let shards = shards.map(|(id, view)| (id, Arc::new(present(view)))).collect();
        let is_queued = self.member.is_some() && task.owner.is_none() && task.state == TaskState::Waiting;
        let snapshot = Snapshot { started_at: task.started_at, shards, waits: is_queued.then_some(Reason::Queued) };
        TaskView { task, snapshot }
    }

    /// As [`Self::find`], for many tasks whose records were just read. The number of statements does not grow with that
    /// of the tasks.
    ///
    /// # Errors
    /// [`TaskError::Store`].
    pub(crate) async fn views(&self, tasks: Vec<Task>) -> Result<Vec<Arc<TaskView>>, TaskError> {
        let here = self.active_views();
        let away: Vec<_> = tasks.iter().map(|task| task.id).filter(|id| !here.contains_key(id)).collect();
        let mut shards = self.store.shards_of(&away).await?;
        let views = tasks.into_iter().map(|task| match here.get(&task.id) {
            Some(view) => view.borrow().clone(),
            None => {
                let shards = shards.remove(&task.id).unwrap_or_default();
                Arc::new(self.view_of(task, shards.into_iter()))
            }
        });
        Ok(views.collect())
    }

    /// The views of all active tasks of this process, as they change. Each ends with its task.
    pub(crate) fn active_views(&self) -> BTreeMap<TaskId, watch::Receiver<Arc<TaskView>>> {
        self.queue.active().iter().map(|(id, task)| (*id, task.view.clone())).collect()
    }

    /// Changes whenever a task becomes active in this process.
    pub(crate) fn arrivals(&self) -> watch::Receiver<()> {
        self.queue.arrived.subscribe()
    }

    /// The unfinished tasks on the same records that other daemons have, and those that wait for a daemon.
    ///
    /// # Errors
    /// [`TaskError::Store`].
    pub(crate) async fn elsewhere(&self) -> Result<Vec<Arc<TaskView>>, TaskError> {
        if self.member.is_none() {
            return Ok(Vec::new());
        }
        let mut tasks = self.store.unfinished().await?;
        let here = self.active_views();
        tasks.retain(|task| !here.contains_key(&task.id));
        self.views(tasks).await
    }

    /// The view of an active task of this process, as it changes.
    pub(crate) fn watch(&self, id: TaskId) -> Option<watch::Receiver<Arc<TaskView>>> {
        self.queue.active().get(&id).map(|task| task.view.clone())
    }

    /// The view of a task, as it changes, whichever daemon has the task. It ends with the task.
    pub(crate) fn follow(&self, view: Arc<TaskView>) -> watch::Receiver<Arc<TaskView>> {
        if let Some(views) = self.watch(view.task.id) {
            return views;
        }
        let id = view.task.id;
        let (sender, views) = watch::channel(view);
        if self.member.is_some() {
            let service = self.clone();
            tokio::spawn(async move {
                while !sender.borrow().task.state.is_final() {
                    tokio::select! {
                        () = sender.closed() => return,
                        () = tokio::time::sleep(POLL_OTHERS) => {}
                    }
                    // While the records cannot be read the view stays as it was.
                    if let Ok(Some(view)) = service.find(id).await {
                        sender.send_replace(view);
                    }
                }
            });
        }
        views
    }

    /// Gives an order to a task and returns the view once the order is carried out. A cancelled task has ended by then.
    ///
    /// # Errors
    /// [`TaskError::Ended`] for a task that is not active; [`TaskError::Transition`] where its state does not take the order;
    /// [`TaskError::Store`] where the order could not be recorded, and was not carried out; [`TaskError::OwnerSilent`] and
    /// [`TaskError::OwnerFailed`] where another daemon has the task.
    pub(crate) async fn order(&self, id: TaskId, order: Order) -> Result<Arc<TaskView>, TaskError> {
        match (self.order_here(id, order.clone()).await, &self.member) {
            // This process does not have it, or no longer.
            (Err(TaskError::Ended | TaskError::Store(StoreError::Fenced(_))), Some(member)) => {
                member.order(self, id, order).await
            }
            (done, _) => done,
        }
    }

    /// As [`Self::order`], for a task that this process has.
    pub(super) async fn order_here(&self, id: TaskId, order: Order) -> Result<Arc<TaskView>, TaskError> {
        let Some(active) = self.queue.active().get(&id).cloned() else { return Err(TaskError::Ended) };
        let ends = matches!(order, Order::Cancel | Order::GiveWay);
        let (answer, answered) = oneshot::channel();
        active.orders.send(OrderRequest { order, answer }).await.map_err(|_| TaskError::Ended)?;
        answered.await.map_err(|_| TaskError::Ended)??;
        let mut view = active.view;
        if ends {
            // The channel closes with the task, after its end was published.
            let _ = view.wait_for(|view| view.task.state.is_final()).await;
        }
        let view = view.borrow().clone();
        Ok(view)
    }

    /// Sets how many tasks may sweep at the same time. Those that sweep already go on.
    pub(crate) fn set_at_once(&self, at_once: usize) {
        let before = self.queue.at_once_wanted.swap(at_once, Ordering::SeqCst);
        if at_once > before {
            self.queue.at_once.add_permits(at_once - before);
            return;
        }
        let queue = self.queue.clone();
        self.queue.tracker.spawn(async move {
            let fewer = u32::try_from(before - at_once).unwrap_or(u32::MAX);
            tokio::select! {
                taken = queue.at_once.acquire_many(fewer) => {
                    if let Ok(taken) = taken { taken.forget() }
                }
                () = queue.closing.cancelled() => {}
            }
        });
    }

    /// How many more tasks this process could sweep now. Those that a person or a window holds do not count.
    pub(super) fn may_admit(&self) -> usize {
        let active = self.queue.active();
        let held = |task: &&ActiveTask| {
            let hold = task.control.watch().borrow().hold;
            task.keeps || matches!(hold, Some(Reason::Paused | Reason::OutsideWindow))
        };
        let busy = active.len() - active.values().filter(held).count();
        self.queue.at_once_wanted.load(Ordering::SeqCst).saturating_sub(busy)
    }

    /// The active tasks of this process, with their instances.
    pub(super) fn active_tasks(&self) -> Vec<(TaskId, String)> {
        self.queue.active().iter().map(|(id, task)| (*id, task.instance_id.clone())).collect()
    }

    /// Lets every active task send batches until this instant.
    pub(super) fn lend(&self, until: tokio::time::Instant) {
        self.queue.active().values().for_each(|task| task.control.lend(until));
    }

    /// Stops every active task: another daemon may have it by now.
    pub(super) fn lose_all(&self) {
        self.queue.active().values().for_each(|task| task.control.stop(StopReason::Lost));
    }

    /// Cancelled when the process begins to stop.
    pub(super) fn closing(&self) -> CancellationToken {
        self.queue.closing.clone()
    }

    /// Tells every task to end after its batch, with a checkpoint, and waits until all have ended.
    pub(crate) async fn close(&self) {
        {
            let _nobody_submits = self.queue.submitting.lock().await;
            self.queue.closing.cancel();
        }
        for task in self.queue.active().values() {
            task.control.stop(StopReason::Interrupted);
        }
        self.queue.tracker.close();
        self.queue.tracker.wait().await;
        if let Some(member) = &self.member {
            member.leave().await;
        }
    }
}

/// Whether a task ends where another task of its instance is to begin: a keep run that is not paused.
fn gives_way(task: &Task) -> bool {
    task.cause == Cause::Keep && task.state != TaskState::Paused
}

/// The specification of an unfinished task: it goes on with the settings that it began with.
pub(super) fn spec_of(task: &Task, instance: &Instance) -> Result<TaskSpec, String> {
    if instance.settings.target.to_string() != task.target {
        return Err(format!("the instance has another address now: {}", instance.settings.target));
    }
    let settings = serve::with_texts(&instance.settings, &task.sweep).map_err(|problems| {
        let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
        format!("its settings are no longer valid: {}", problems.join("; "))
    })?;
    let window: Option<Window> = instance.window.clone().filter(|_| task.respect_window);
    let spec = TaskSpec::of(instance, &settings, task.cause).map_err(|error| error.to_string())?;
    // A due scan that had not begun is still compared with `min-backlog`.
    let compares = task.cause == Cause::Schedule && task.started_at.is_none();
    Ok(TaskSpec { window, min_backlog: instance.min_backlog.filter(|_| compares), ..spec })
}
