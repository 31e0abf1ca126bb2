//! Makes sure that each instance with a bound has a keep run while its window is open: starts one if there is none, and ends one whose
//! bounds were changed, so that a new one replaces it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;
use crate::model::bounds::Bounds;
use crate::model::event::Event;
use crate::model::schedule::until;
use crate::model::task::{Cause, Task, TaskId, TaskState};
use crate::notify::Notifier;
use crate::settings;
use crate::settings::serve::{self, Instance, ServeSettings};
use crate::store::{Keeps, StoreError};
use crate::tasks::{Order, TaskError, TaskService, TaskSpec, TaskView, next_hour};

/// Time between two rounds over the instances.
const CHECK_EVERY: Duration = Duration::from_millis(500);
/// Time between two reads of the bounds that the API set, and pause after an error.
const READ_EVERY: Duration = Duration::from_secs(5);
/// Time between two checks of an instance whose task another daemon has.
const CHECK_OTHERS_EVERY: Duration = Duration::from_secs(10);
/// Pause between a failed run and the next one: the first, doubled after each further failure, and the longest.
const AFTER_FAILURE: (SignedDuration, SignedDuration) = (SignedDuration::from_secs(5), SignedDuration::from_hours(1));
/// A bound that has been missed for this long is reported.
const REPORT_AFTER: Duration = Duration::from_secs(10);
/// After a run that lasted this long before it failed, the pause is the first one again.
const HAS_LASTED: SignedDuration = SignedDuration::from_mins(5);

/// The keeper and what it needs.
#[derive(Debug)]
pub(crate) struct Keeper {
    /// Starts and ends tasks, and gives access to the store.
    pub service: TaskService,
    /// The settings in force; a change starts a round at once.
    pub settings: watch::Receiver<Arc<ServeSettings>>,
    /// Changes when the API has set bounds.
    pub changed: watch::Receiver<()>,
    /// Counts errors of the store.
    pub metrics: Metrics,
    /// Sends the notifications of missed bounds.
    pub notifier: Notifier,
}

/// What is known of a run that misses its bound, or did.
#[derive(Debug, Default)]
struct Missed {
    /// Since when the bound is missed; `None`: it is kept now.
    since: Option<Instant>,
    /// Whether this run was reported already.
    is_reported: bool,
}

/// When an instance without a task here is checked next.
#[derive(Debug, Clone, Copy, Default)]
struct NextCheck {
    /// Not before this instant; `None`: in the next round.
    not_before: Option<Instant>,
    /// The last run that failed, and the pause after it.
    failed: Option<(TaskId, SignedDuration)>,
}

impl Keeper {
    /// Starts and ends keep runs until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut next_checks: BTreeMap<String, NextCheck> = BTreeMap::new();
        let mut missed = BTreeMap::new();
        let mut set: Option<(Keeps, Instant)> = None;
        loop {
            let settings = self.settings.borrow_and_update().clone();
            if set.as_ref().is_none_or(|(_, read)| read.elapsed() >= READ_EVERY) {
                match self.service.store().keeps().await {
                    Ok(read) => set = Some((read, Instant::now())),
                    Err(error) => self.failed(&error.into(), None),
                }
            }
            if let Some((set, _)) = &set {
                self.check_all(&settings, set, &mut next_checks, &mut missed).await;
            }
            tokio::select! {
                () = tokio::time::sleep(CHECK_EVERY) => {}
                changed = self.changed.changed() => match changed {
                    Ok(()) => {
                        set = None;
                        next_checks.clear();
                    }
                    Err(_) => return,
                },
                changed = self.settings.changed() => match changed {
                    Ok(()) => next_checks.clear(),
                    Err(_) => return,
                },
                () = stop.cancelled() => return,
            }
        }
    }

    /// One round over all instances.
    async fn check_all(
        &self,
        settings: &ServeSettings,
        set: &Keeps,
        next_checks: &mut BTreeMap<String, NextCheck>,
        missed: &mut BTreeMap<TaskId, Missed>,
    ) {
        let bounds_of = |instance: &Instance| set.get(&instance.id, &instance.project_id).unwrap_or(instance.keep);
        let bounds = settings.instances.iter().map(|instance| (instance, bounds_of(instance)));
        let mut kept: BTreeMap<&str, _> =
            bounds.filter(|(_, bounds)| bounds.any()).map(|kept| (kept.0.id.as_str(), kept)).collect();
        let views = self.service.active_views();
        missed.retain(|id, _| views.contains_key(id));
        for view in views.into_values() {
            let view = view.borrow().clone();
            self.report_miss(&view, missed);
            let task = &view.task;
            let bounds = kept.get(task.instance_id.as_str()).map(|(_, bounds)| *bounds).unwrap_or_default();
            if task.cause == Cause::Keep && !keeps_to(task, bounds) {
                // It has other bounds than those in force: it ends, and a new run takes them.
                match self.service.order(task.id, Order::GiveWay).await {
                    Ok(_) | Err(TaskError::Ended) => {}
                    Err(error) => self.failed(&error, Some(&task.instance_id)),
                }
            }
            kept.remove(task.instance_id.as_str());
        }
        for (instance, bounds) in kept.into_values() {
            let next = next_checks.entry(instance.id.clone()).or_default();
            if next.not_before.is_some_and(|at| at > Instant::now()) {
                continue;
            }
            match self.check(instance, bounds, next).await {
                Ok(wait) => next.not_before = Some(Instant::now() + wait),
                Err(error) => {
                    next.not_before = Some(Instant::now() + READ_EVERY);
                    self.failed(&error, Some(&instance.id));
                }
            }
        }
    }

    /// Reports a bound that has been missed for a while, once in each run.
    fn report_miss(&self, view: &TaskView, missed: &mut BTreeMap<TaskId, Missed>) {
        let shards = view.snapshot.shards.iter().filter_map(|(id, shard)| Some((id, shard.keep?)));
        let Some((shard, figures)) = shards.into_iter().find(|(_, keep)| keep.is_missed) else {
            // The entry stays, so that the same run is not reported twice.
            if let Some(missed) = missed.get_mut(&view.task.id) {
                missed.since = None;
            }
            return;
        };
        let of = missed.entry(view.task.id).or_default();
        let lasted = of.since.get_or_insert_with(Instant::now).elapsed();
        if lasted < REPORT_AFTER || std::mem::replace(&mut of.is_reported, true) {
            return;
        }
        let message = figures.miss_text(shard);
        tracing::warn!(instance = view.task.instance_id, task = %view.task.id, "the bound is missed: {message}");
        self.notifier.notify(Event::bound_missed(&view.task, REPORT_AFTER, message, self.service.store().now()));
    }

    /// Logs an error, and counts it if it is one of the store.
    fn failed(&self, error: &TaskError, instance: Option<&str>) {
        if matches!(error, TaskError::Store(_)) {
            self.metrics.store_failed();
        }
        tracing::error!(instance, %error, "cannot check the bounds of an instance");
    }

    /// Starts the run of an instance without a task here, if it is time. Returns the time until the next check.
    async fn check(
        &self,
        instance: &Arc<Instance>,
        bounds: Bounds,
        next: &mut NextCheck,
    ) -> Result<Duration, TaskError> {
        let now = self.service.store().now();
        if instance.window.as_ref().is_some_and(|window| !window.is_open(now)) {
            return Ok(CHECK_EVERY);
        }
        let wait = match self.service.store().latest(&instance.id).await? {
            Some(task) if !task.state.is_final() => CHECK_OTHERS_EVERY,
            Some(Task { cause: Cause::Keep, state: TaskState::Cancelled, finished_at: Some(at), .. }) => {
                // A run that was cancelled starts again with the next hour.
                until(now, next_hour(at))
            }
            Some(task @ Task { cause: Cause::Keep, state: TaskState::Failed, finished_at: Some(at), .. }) => {
                until(now, at.checked_add(next.pause_after(&task, at)).unwrap_or(at))
            }
            _ => Duration::ZERO,
        };
        if !wait.is_zero() {
            return Ok(wait.min(CHECK_OTHERS_EVERY));
        }
        self.begin(instance, bounds).await?;
        Ok(CHECK_EVERY)
    }

    async fn begin(&self, instance: &Arc<Instance>, bounds: Bounds) -> Result<(), TaskError> {
        let settings = serve::with_bounds(&instance.settings, bounds)
            .map_err(|problems| TaskError::Settings(problems.into_iter().next().unwrap_or_default()))?;
        let spec = TaskSpec::of(instance, &settings, Cause::Keep)?;
        let spec = TaskSpec { window: instance.window.clone(), ..spec };
        match self.service.submit(spec, None).await {
            Ok(task) => tracing::info!(instance = instance.id, task = %task.id, "a keep run begins"),
            // Another task was submitted just before, or the daemon stops: the next check sees.
            Err(TaskError::Unfinished(_) | TaskError::Closing | TaskError::Store(StoreError::Unfinished(_))) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

impl NextCheck {
    /// The pause between a failed run and the next one.
    fn pause_after(&mut self, task: &Task, failed: Timestamp) -> SignedDuration {
        let lasted = task.started_at.is_some_and(|began| failed.duration_since(began) >= HAS_LASTED);
        let pause = match self.failed {
            Some((id, pause)) if id == task.id => pause,
            Some((_, pause)) if !lasted => (pause * 2).min(AFTER_FAILURE.1),
            _ => AFTER_FAILURE.0,
        };
        self.failed = Some((task.id, pause));
        pause
    }
}

/// Whether a task was created with these bounds.
fn keeps_to(task: &Task, bounds: Bounds) -> bool {
    settings::bound_texts(bounds).iter().all(|(key, text)| task.sweep.get(key) == Some(text))
}
