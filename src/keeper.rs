//! Sees to it that each instance with a bound has a keep run, while its window is open: begins one where there is none, and ends one
//! whose bounds were changed, so that another takes its place.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;
use crate::model::event::Event;
use crate::model::keep::Bounds;
use crate::model::schedule::until;
use crate::model::task::{Cause, Task, TaskId, TaskState};
use crate::notify::Notifier;
use crate::settings;
use crate::settings::serve::{self, Instance, ServeSettings};
use crate::store::{Keeps, StoreError};
use crate::tasks::{Order, TaskError, TaskService, TaskSpec, TaskView, next_hour};

/// How often it is looked whether runs have ended.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often the bounds that the API set are read again, and after trouble with the records.
const READ_EVERY: Duration = Duration::from_secs(5);
/// How often an instance is looked at whose run another daemon has.
const LOOK_AT_OTHERS: Duration = Duration::from_secs(10);
/// After a run that failed, the next one begins after this long, and after each further failure after twice as long as before.
const AFTER_FAILURE: (SignedDuration, SignedDuration) = (SignedDuration::from_secs(5), SignedDuration::from_hours(1));
/// A bound that has been missed for this long is reported.
const TELL_AFTER: Duration = Duration::from_secs(10);
/// A run that lasted this long before it failed has done its part: the next one begins soon.
const HAS_LASTED: SignedDuration = SignedDuration::from_mins(5);

/// What the keeper works with.
#[derive(Debug)]
pub struct Keeper {
    /// The tasks.
    pub service: TaskService,
    /// The settings in force.
    pub settings: watch::Receiver<Arc<ServeSettings>>,
    /// Told when bounds were changed.
    pub changed: watch::Receiver<()>,
    /// The figures.
    pub metrics: Metrics,
    /// Who is told of a bound that is missed.
    pub notifier: Notifier,
}

/// A run that misses its bound, or has.
#[derive(Debug, Default)]
struct Missed {
    since: Option<Instant>,
    is_told: bool,
}

/// What is known of an instance.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    /// Not before this is anything to do.
    not_before: Option<Instant>,
    /// The last run that failed, and how long the pause after it is.
    failed: Option<(TaskId, SignedDuration)>,
}

impl Keeper {
    /// Looks until told to stop.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut known: BTreeMap<String, Known> = BTreeMap::new();
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
                self.look_at_all(&settings, set, &mut known, &mut missed).await;
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                changed = self.changed.changed() => match changed {
                    Ok(()) => {
                        set = None;
                        known.clear();
                    }
                    Err(_) => return,
                },
                changed = self.settings.changed() => match changed {
                    Ok(()) => known.clear(),
                    Err(_) => return,
                },
                () = stop.cancelled() => return,
            }
        }
    }

    async fn look_at_all(
        &self,
        settings: &ServeSettings,
        set: &Keeps,
        known: &mut BTreeMap<String, Known>,
        missed: &mut BTreeMap<TaskId, Missed>,
    ) {
        let bounds_of = |instance: &Instance| set.get(&instance.id, &instance.project_id).unwrap_or(instance.keep);
        let bounds = settings.instances.iter().map(|instance| (instance, bounds_of(instance)));
        let mut kept: BTreeMap<&str, _> =
            bounds.filter(|(_, bounds)| bounds.any()).map(|kept| (kept.0.id.as_str(), kept)).collect();
        let views = self.service.on_hand();
        missed.retain(|id, _| views.contains_key(id));
        for view in views.into_values() {
            let view = view.borrow().clone();
            self.tell_of_misses(&view, missed);
            let task = &view.task;
            let bounds = kept.get(task.instance_id.as_str()).map(|(_, bounds)| *bounds).unwrap_or_default();
            if task.cause == Cause::Keep && !keeps_to(task, bounds) {
                // Bounds of its own time: another run has the new ones.
                match self.service.order(task.id, Order::GiveWay).await {
                    Ok(_) | Err(TaskError::Ended) => {}
                    Err(error) => self.failed(&error, Some(&task.instance_id)),
                }
            }
            kept.remove(task.instance_id.as_str());
        }
        for (instance, bounds) in kept.into_values() {
            let known = known.entry(instance.id.clone()).or_default();
            if known.not_before.is_some_and(|at| at > Instant::now()) {
                continue;
            }
            match self.look(instance, bounds, known).await {
                Ok(wait) => known.not_before = Some(Instant::now() + wait),
                Err(error) => {
                    known.not_before = Some(Instant::now() + READ_EVERY);
                    self.failed(&error, Some(&instance.id));
                }
            }
        }
    }

    /// Reports a bound that has been missed for a while, once in each run.
    fn tell_of_misses(&self, view: &TaskView, missed: &mut BTreeMap<TaskId, Missed>) {
        let shards = view.snapshot.shards.iter().filter_map(|(id, shard)| Some((id, shard.keep?)));
        let Some((shard, figures)) = shards.into_iter().find(|(_, keep)| keep.is_missed) else {
            // Told once is enough for this run.
            if let Some(missed) = missed.get_mut(&view.task.id) {
                missed.since = None;
            }
            return;
        };
        let of = missed.entry(view.task.id).or_default();
        let lasted = of.since.get_or_insert_with(Instant::now).elapsed();
        if lasted < TELL_AFTER || std::mem::replace(&mut of.is_told, true) {
            return;
        }
        let message = figures.miss_text(shard);
        tracing::warn!(instance = view.task.instance_id, task = %view.task.id, "the bound is missed: {message}");
        self.notifier.tell(Event::bound_missed(&view.task, TELL_AFTER, message, self.service.store().now()));
    }

    fn failed(&self, error: &TaskError, instance: Option<&str>) {
        if matches!(error, TaskError::Store(_)) {
            self.metrics.store_failed();
        }
        tracing::error!(instance, %error, "what is to be kept could not be looked at");
    }

    /// Begins the run of an instance that this daemon has no task of, where it is time. Returns for how long nothing is to do.
    async fn look(&self, instance: &Arc<Instance>, bounds: Bounds, known: &mut Known) -> Result<Duration, TaskError> {
        let now = self.service.store().now();
        if instance.window.as_ref().is_some_and(|window| !window.is_open(now)) {
            return Ok(LOOK_EVERY);
        }
        let wait = match self.service.store().latest(&instance.id).await? {
            Some(task) if !task.state.is_final() => LOOK_AT_OTHERS,
            Some(Task { cause: Cause::Keep, state: TaskState::Cancelled, finished_at: Some(at), .. }) => {
                // Whoever cancelled it has the rest of the hour without.
                until(now, next_hour(at))
            }
            Some(task @ Task { cause: Cause::Keep, state: TaskState::Failed, finished_at: Some(at), .. }) => {
                until(now, at.checked_add(known.pause_after(&task, at)).unwrap_or(at))
            }
            _ => Duration::ZERO,
        };
        if !wait.is_zero() {
            return Ok(wait.min(LOOK_AT_OTHERS));
        }
        self.begin(instance, bounds).await?;
        Ok(LOOK_EVERY)
    }

    async fn begin(&self, instance: &Arc<Instance>, bounds: Bounds) -> Result<(), TaskError> {
        let settings = serve::kept(&instance.settings, bounds)
            .map_err(|problems| TaskError::Settings(problems.into_iter().next().unwrap_or_default()))?;
        let spec = TaskSpec::of(instance, &settings, Cause::Keep)?;
        let spec = TaskSpec { window: instance.window.clone(), ..spec };
        match self.service.submit(spec, None).await {
            Ok(task) => tracing::info!(instance = instance.id, task = %task.id, "a keep run begins"),
            // Somebody was quicker.
            Err(TaskError::Busy(_) | TaskError::Closing | TaskError::Store(StoreError::Unfinished(_))) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

impl Known {
    /// How long after a run that failed the next one begins.
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

/// Whether a run has these bounds.
fn keeps_to(task: &Task, bounds: Bounds) -> bool {
    settings::bound_texts(bounds).iter().all(|(key, text)| task.sweep.get(key) == Some(text))
}
