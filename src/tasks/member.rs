//! This daemon among others that share its records: its lease, the tasks that it claims, and the orders that daemons
//! pass to each other.
//!
//! The lease is renewed three times in its length. Until it runs out no other daemon takes our tasks; before it runs
//! out by our own monotonic clock, every sweep holds ([`Reason::StoreUnreachable`](crate::model::throttle::Reason)). A
//! daemon that could not renew it in time finds its row gone, drops its tasks without writing anything about them, and
//! joins again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::SignedDuration;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, MissedTickBehavior};
use uuid::Uuid;

use crate::metrics::Metrics;
use crate::model::task::{Command, IllegalTransition, Task, TaskId};
use crate::settings::serve::ServeSettings;
use crate::store::{Claim, DaemonId, DaemonRecord, Fleet, GivenOrder, PresentDaemon, StoreError, Wake};
use crate::tasks::queue::spec_of;
use crate::tasks::recorder::Order;
use crate::tasks::{TaskError, TaskService, TaskView};

/// How often the lease is renewed in its length.
const RENEWALS: u32 = 3;
/// Sweeps hold before the lease runs out, by its length divided by this: time for the batch under way and for differing
/// clocks.
const MARGIN: u32 = 10;
/// How long to wait after a failed statement before the next attempt.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// How often tasks and orders are read where no notification came.
const POLL_EVERY: Duration = Duration::from_secs(5);
/// A daemon claims as many tasks at a time as it may admit, divided by this, so that daemons share them.
const SHARES: usize = 4;
/// How many keep runs a daemon claims at a time, so that daemons share them.
const KEEPS_AT_ONCE: usize = 4;
/// Notifications of other daemons that come within this time are handled together.
const SETTLE: Duration = Duration::from_millis(10);
/// How often the answer to an order is read where no notification came.
const ANSWER_EVERY: Duration = Duration::from_millis(500);
/// How long the owner of a task may take to answer an order.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// How long a task of an instance that no settings name is kept for a daemon with newer settings, before it fails.
const UNKNOWN_AFTER: SignedDuration = SignedDuration::from_mins(10);
/// How often a daemon claims such a task again to see whether its settings name the instance now.
const RETRY_UNKNOWN: Duration = Duration::from_secs(60);
/// How often a daemon compares its settings with those of the others.
const COMPARE_EVERY: Duration = Duration::from_secs(30);

/// How a daemon joins others that share its records.
#[derive(Debug, Clone)]
pub(crate) struct Membership {
    /// How it presents itself; its id is new each time that it joins.
    pub record: DaemonRecord,
    /// How long its tasks remain its own after a renewal.
    pub lease: Duration,
}

/// The answer of a task's owner to an order. Stored as JSON.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum OrderAnswer {
    Done,
    Ended,
    NotNow { state: String },
    Failed { message: String },
}

/// This daemon among those that share its records.
#[derive(Debug)]
pub(super) struct Member {
    fleet: Fleet,
    membership: Membership,
    settings: watch::Receiver<Arc<ServeSettings>>,
    presence: Mutex<Presence>,
    /// Notified when there may be tasks to claim or orders to answer.
    wake: Notify,
    /// Changes when an order may have been answered.
    answered: watch::Sender<()>,
}

#[derive(Debug, Clone, Copy)]
struct Presence {
    id: DaemonId,
    until: Instant,
}

impl TaskService {
    /// Joins the other daemons on the same records, and goes on in the background: keeps the lease, claims tasks and
    /// answers orders until the service is closed. `schedules_changed` is notified when another daemon changed a
    /// schedule. Does nothing where the records are not shared.
    ///
    /// # Errors
    /// [`TaskError::Store`].
    pub(crate) async fn join(
        &mut self,
        membership: Membership,
        settings: watch::Receiver<Arc<ServeSettings>>,
        schedules_changed: Arc<Notify>,
    ) -> Result<(), TaskError> {
        self.identity = Some(Arc::new(membership.record.clone()));
        let Some(fleet) = self.store.fleet() else { return Ok(()) };
        let presence = Mutex::new(join(&fleet, &membership, settings_hash(&settings)).await?);
        let (wake, answered) = (Notify::new(), watch::Sender::new(()));
        self.member = Some(Arc::new(Member { fleet, membership, settings, presence, wake, answered }));
        for work in [Work::Lease, Work::Claims, Work::Listen(schedules_changed), Work::Compare] {
            let service = self.clone();
            tokio::spawn(async move {
                let closing = service.closing();
                tokio::select! {
                    () = work.run(&service) => {}
                    () = closing.cancelled() => {}
                }
            });
        }
        Ok(())
    }

    /// Whether the lease holds, so that no other daemon may have the tasks of this one.
    pub(crate) fn has_lease(&self) -> bool {
        self.member.as_ref().is_none_or(|member| Instant::now() < member.until())
    }

    /// The id of this daemon, and all daemons that share the records: only this one where they are not shared.
    ///
    /// # Errors
    /// [`TaskError::Store`].
    pub(crate) async fn daemons(&self) -> Result<(Option<DaemonId>, Vec<PresentDaemon>), TaskError> {
        if let Some(member) = &self.member {
            return Ok((Some(member.presence().id), member.fleet.daemons().await?));
        }
        let Some(identity) = &self.identity else { return Ok((None, Vec::new())) };
        let now = self.store.now();
        let record = DaemonRecord::clone(identity);
        let alone = PresentDaemon { record, heartbeat_at: now, lease_until: now, tasks: self.active_tasks() };
        Ok((Some(identity.id), vec![alone]))
    }
}

/// The background work of a member.
enum Work {
    Lease,
    Claims,
    Listen(Arc<Notify>),
    Compare,
}

impl Work {
    async fn run(self, service: &TaskService) {
        let Some(member) = service.member.clone() else { return };
        match self {
            Self::Lease => member.keep_lease(service).await,
            Self::Claims => member.claim_and_answer(service).await,
            Self::Listen(changed) => member.listen(service, &changed).await,
            Self::Compare => member.compare(&service.metrics).await,
        }
    }
}

impl Member {
    fn presence(&self) -> Presence {
        *self.presence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_presence(&self, presence: Presence) {
        *self.presence.lock().unwrap_or_else(PoisonError::into_inner) = presence;
    }

    /// Until when tasks may send batches, by the last renewal of the lease.
    pub(super) fn until(&self) -> Instant {
        self.presence().until
    }

    /// Has tasks claimed and orders answered soon.
    pub(super) fn wake_claims(&self) {
        self.wake.notify_one();
    }

    async fn keep_lease(&self, service: &TaskService) {
        loop {
            let sent = Instant::now();
            let hash = settings_hash(&self.settings);
            let renewed = self.fleet.renew(self.presence().id, &hash, self.membership.lease).await;
            let next = match renewed {
                Ok(true) => {
                    self.set_presence(Presence { until: sent + sweep_time(self.membership.lease), ..self.presence() });
                    service.lend(self.until());
                    self.reap(&service.metrics).await;
                    sent + self.membership.lease / RENEWALS
                }
                Ok(false) => {
                    tracing::warn!(
                        "the lease of this daemon ran out and other daemons may have its tasks; joining anew"
                    );
                    service.lose_all();
                    match join(&self.fleet, &self.membership, hash).await {
                        Ok(presence) => self.set_presence(presence),
                        Err(error) => self.failed(&service.metrics, &error),
                    }
                    sent + RETRY_AFTER
                }
                Err(error) => {
                    self.failed(&service.metrics, &error);
                    Instant::now() + RETRY_AFTER
                }
            };
            tokio::time::sleep_until(next).await;
        }
    }

    fn failed(&self, metrics: &Metrics, error: &StoreError) {
        metrics.store_failed();
        tracing::error!(%error, "cannot renew the lease of this daemon");
    }

    /// Releases the tasks of daemons whose lease has run out.
    async fn reap(&self, metrics: &Metrics) {
        match self.fleet.reap().await {
            Ok(gone) => {
                for daemon in gone {
                    tracing::warn!(daemon, "a daemon is gone; other daemons may claim its tasks");
                    self.wake_claims();
                }
            }
            Err(error) => {
                metrics.store_failed();
                tracing::error!(%error, "cannot look for daemons whose lease has run out");
            }
        }
    }

    async fn claim_and_answer(&self, service: &TaskService) {
        let mut tick = tokio::time::interval(POLL_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Tasks of instances that our settings do not name, and when each was claimed last.
        let mut unknown: BTreeMap<TaskId, Instant> = BTreeMap::new();
        let mut settings = self.settings.clone();
        let answering = Arc::new(Mutex::new(BTreeSet::new()));
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = self.wake.notified() => {}
                changed = settings.changed() => match changed {
                    Ok(()) => unknown.clear(),
                    Err(_) => return,
                },
            }
            unknown.retain(|_, seen| seen.elapsed() < RETRY_UNKNOWN);
            let done = async {
                self.claim(service, &mut unknown, false).await?;
                self.claim(service, &mut unknown, true).await?;
                self.answer_orders(service, &answering).await
            };
            if let Err(error) = done.await {
                service.metrics.store_failed();
                tracing::error!(%error, "cannot claim tasks");
            }
        }
    }

    /// Claims tasks as long as there are any and this daemon may admit more.
    /// `of_keeps`: keep runs, which are always admitted; else the other tasks.
    async fn claim(
        &self,
        service: &TaskService,
        unknown: &mut BTreeMap<TaskId, Instant>,
        of_keeps: bool,
    ) -> Result<(), TaskError> {
        loop {
            // Not all at once, so that daemons that wake together share the tasks.
            let most = if of_keeps { KEEPS_AT_ONCE } else { service.may_admit().div_ceil(SHARES) };
            let settings = self.settings.borrow().clone();
            // Without a lease no task is ours.
            if most == 0 || Instant::now() >= self.until() || service.closing().is_cancelled() {
                return Ok(());
            }
            // A task that was lost may still be ending in this process.
            let but = unknown.keys().copied().chain(service.active_tasks().into_iter().map(|(id, _)| id)).collect();
            let claim = Claim {
                owner: self.presence().id,
                labels: self.membership.record.labels.clone(),
                most,
                most_of_all: settings.at_once_of_all.filter(|_| !of_keeps),
                of_keeps,
                but,
            };
            let tasks = self.fleet.claim(&claim).await?;
            if tasks.is_empty() {
                return Ok(());
            }
            for task in tasks {
                self.begin(service, &settings, task, unknown).await?;
            }
        }
    }

    async fn begin(
        &self,
        service: &TaskService,
        settings: &ServeSettings,
        task: Task,
        unknown: &mut BTreeMap<TaskId, Instant>,
    ) -> Result<(), TaskError> {
        let Some(instance) = settings.instance(&task.instance_id) else {
            if service.store.now().duration_since(task.created_at) > UNKNOWN_AFTER {
                return service.give_up(task, "the instance is no longer in the settings").await;
            }
            tracing::warn!(task = %task.id, instance = task.instance_id, "the settings of this daemon do not name the instance of a task");
            unknown.insert(task.id, Instant::now());
            return Ok(service.store.update(&Task { owner: None, ..task }).await?);
        };
        match spec_of(&task, instance) {
            Ok(spec) => service.take_up(task, spec).await,
            Err(why) => service.give_up(task, &why).await,
        }
    }

    async fn answer_orders(
        &self,
        service: &TaskService,
        answering: &Arc<Mutex<BTreeSet<Uuid>>>,
    ) -> Result<(), TaskError> {
        for given in self.fleet.orders_to(self.presence().id).await? {
            if !answering.lock().unwrap_or_else(PoisonError::into_inner).insert(given.id) {
                continue;
            }
            let (service, fleet, answering) = (service.clone(), self.fleet.clone(), answering.clone());
            tokio::spawn(async move {
                let answer = OrderAnswer::of(carry_out(&service, &given).await);
                let text = serde_json::to_string(&answer).unwrap_or_default();
                if let Err(error) = fleet.answer(given.id, &text).await {
                    tracing::error!(%error, "an order was carried out, and the answer could not be written");
                }
                answering.lock().unwrap_or_else(PoisonError::into_inner).remove(&given.id);
            });
        }
        Ok(())
    }

    /// Passes on the notifications of other daemons.
    async fn listen(&self, service: &TaskService, schedules_changed: &Notify) {
        loop {
            let listened = async {
                let mut notifications = self.fleet.listen().await?;
                // Notifications from before were missed: everything may have changed.
                let mut wakes = BTreeSet::from([Wake::Tasks, Wake::Schedules, Wake::Orders]);
                loop {
                    for wake in std::mem::take(&mut wakes) {
                        match wake {
                            Wake::Tasks => self.wake_claims(),
                            Wake::Schedules => schedules_changed.notify_one(),
                            Wake::Orders => {
                                self.answered.send_replace(());
                                self.wake_claims();
                            }
                        }
                    }
                    wakes.insert(notifications.next().await?);
                    let settled = Instant::now() + SETTLE;
                    while let Ok(wake) = tokio::time::timeout_at(settled, notifications.next()).await {
                        wakes.insert(wake?);
                    }
                }
            };
            let ended: Result<(), StoreError> = listened.await;
            if let Err(error) = ended {
                tracing::warn!(%error, "no notifications of other daemons arrive; reading the records at intervals");
                service.metrics.store_failed();
            }
            tokio::time::sleep(RETRY_AFTER).await;
        }
    }

    /// Warns while other daemons have other settings.
    async fn compare(&self, metrics: &Metrics) {
        let mut differed = false;
        loop {
            if let Ok(daemons) = self.fleet.daemons().await {
                let ours = settings_hash(&self.settings);
                let others = daemons.iter().filter(|daemon| daemon.record.settings != ours);
                let others: Vec<_> = others.map(|daemon| daemon.record.name.as_str()).collect();
                metrics.fleet(daemons.len(), !others.is_empty());
                if !others.is_empty() && !differed {
                    let others = others.join(", ");
                    tracing::warn!(others, "these daemons have other settings than this one");
                }
                differed = !others.is_empty();
            }
            tokio::time::sleep(COMPARE_EVERY).await;
        }
    }

    /// Gives an order to a task that another daemon has, or no daemon.
    pub(super) async fn order(
        &self,
        service: &TaskService,
        id: TaskId,
        order: Order,
    ) -> Result<Arc<TaskView>, TaskError> {
        let given = GivenOrder {
            id: Uuid::new_v4(),
            task: id,
            what: serde_json::to_string(&order).map_err(|error| TaskError::OwnerFailed(error.to_string()))?,
        };
        let mut answered = self.answered.subscribe();
        let deadline = Instant::now() + ANSWER_WITHIN;
        let mut is_given = false;
        loop {
            let Some(task) = service.store.task(id).await? else { return Err(TaskError::Ended) };
            if task.state.is_final() {
                if !is_given {
                    return Err(TaskError::Ended);
                }
                if let Some(answer) = self.answer_to(&given).await? {
                    return self.answered_by(service, id, answer, &order).await;
                }
                self.fleet.take_back(given.id).await?;
                // The owner records the end of a task before it answers the order to end it.
                return if order.ends_as(task.state) { self.view(service, id).await } else { Err(TaskError::Ended) };
            }
            if task.owner.is_none() {
                if is_given && !self.fleet.take_back(given.id).await? {
                    // The owner answered before it left.
                    return self.view(service, id).await;
                }
                match order_unowned(service, task, &order).await {
                    // A daemon has claimed it just now.
                    Err(TaskError::Store(StoreError::Fenced(_))) => {}
                    Err(error) => return Err(error),
                    Ok(()) => {
                        self.wake_claims();
                        return self.view(service, id).await;
                    }
                }
            } else if !is_given {
                self.fleet.give(&given).await?;
                is_given = true;
            }
            if let Some(answer) = self.answer_to(&given).await? {
                return self.answered_by(service, id, answer, &order).await;
            }
            if Instant::now() >= deadline {
                self.fleet.take_back(given.id).await?;
                return Err(TaskError::OwnerSilent);
            }
            let _ = tokio::time::timeout(ANSWER_EVERY, answered.changed()).await;
        }
    }

    async fn answer_to(&self, given: &GivenOrder) -> Result<Option<OrderAnswer>, TaskError> {
        let Some(text) = self.fleet.answer_to(given.id).await? else { return Ok(None) };
        self.fleet.take_back(given.id).await?;
        let unread = |error: serde_json::Error| TaskError::OwnerFailed(error.to_string());
        serde_json::from_str(&text).map(Some).map_err(unread)
    }

    async fn answered_by(
        &self,
        service: &TaskService,
        id: TaskId,
        answer: OrderAnswer,
        order: &Order,
    ) -> Result<Arc<TaskView>, TaskError> {
        answer.into_result(order)?;
        self.view(service, id).await
    }

    async fn view(&self, service: &TaskService, id: TaskId) -> Result<Arc<TaskView>, TaskError> {
        service.find(id).await?.ok_or(TaskError::Ended)
    }

    /// Gives up the lease at the end, so that other daemons need not wait until it runs out.
    pub(super) async fn leave(&self) {
        if let Err(error) = self.fleet.leave(self.presence().id).await {
            tracing::warn!(%error, "cannot give up the lease; other daemons take the tasks over once it has run out");
        }
    }
}

impl OrderAnswer {
    fn of(done: Result<(), TaskError>) -> Self {
        match done {
            Ok(()) => Self::Done,
            Err(TaskError::Ended) => Self::Ended,
            Err(TaskError::Transition(error)) => Self::NotNow { state: error.state.to_string() },
            Err(error) => Self::Failed { message: error.to_string() },
        }
    }

    fn into_result(self, order: &Order) -> Result<(), TaskError> {
        match self {
            Self::Done => Ok(()),
            Self::Ended => Err(TaskError::Ended),
            Self::NotNow { state } => match (state.parse(), order.command()) {
                (Ok(state), Some(command)) => Err(IllegalTransition { state, command }.into()),
                _ => Err(TaskError::OwnerFailed(format!("it is {state}"))),
            },
            Self::Failed { message } => Err(TaskError::OwnerFailed(message)),
        }
    }
}

async fn carry_out(service: &TaskService, given: &GivenOrder) -> Result<(), TaskError> {
    let order: Order = serde_json::from_str(&given.what).map_err(|error| TaskError::OwnerFailed(error.to_string()))?;
    service.order_here(given.task, order).await.map(drop)
}

/// Carries an order out on the record of a task that no daemon has.
async fn order_unowned(service: &TaskService, mut task: Task, order: &Order) -> Result<(), TaskError> {
    let now = service.store.now();
    match order {
        Order::Pause => task.apply(Command::Pause, now)?,
        Order::Resume => task.apply(Command::Requeue, now)?,
        Order::Cancel => task.apply(Command::Cancel, now)?,
        Order::GiveWay => task.apply(Command::GiveWay, now)?,
        Order::Tune(tune) => task.sweep = tune.over(&task.sweep)?.0,
    }
    if task.state.is_final() {
        task.num = service.find(task.id).await?.map_or(task.num, |view| view.snapshot.reclaimed());
    }
    service.store.update(&task).await?;
    if task.state.is_final() {
        service.metrics.ended(&task);
    }
    Ok(())
}

/// Joins the other daemons, with a new id.
async fn join(fleet: &Fleet, membership: &Membership, settings: String) -> Result<Presence, StoreError> {
    let sent = Instant::now();
    let id = DaemonId::generate();
    let record = DaemonRecord { id, settings, ..membership.record.clone() };
    fleet.join(&record, membership.lease).await?;
    Ok(Presence { id, until: sent + sweep_time(membership.lease) })
}

/// How long sweeps may send batches after a renewal was sent.
fn sweep_time(lease: Duration) -> Duration {
    lease - lease / MARGIN
}

fn settings_hash(settings: &watch::Receiver<Arc<ServeSettings>>) -> String {
    settings.borrow().hash.clone()
}
