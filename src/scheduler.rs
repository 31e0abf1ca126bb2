//! Starts the scans that are due. Looks at each instance's schedule, asks `model::schedule` what is to be done, and does
//! it; the store remembers which due times were dealt with, so that a restart neither loses nor doubles one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;
use crate::model::failure::{Failure, FailureKind};
use crate::model::schedule::{AutoScan, Decision, GRACE, Moment, Skip, decide, until};
use crate::model::task::Cause;
use crate::settings::serve::{self, Instance, ServeSettings};
use crate::store::{Due, Mark, Schedules, StoreError};
use crate::tasks::{TaskError, TaskService, TaskSpec};

/// Longest sleep: the clock may have been set, or the machine may have slept.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// How often a busy instance is looked at while its due scan waits, and after trouble with the store.
const LOOK_SOON: Duration = Duration::from_millis(500);

/// Missed due times of an instance that are recorded one by one after a long absence.
const MISSED_AT_MOST: usize = 100;

/// What the scheduler works with.
#[derive(Debug)]
pub struct Scheduler {
    /// The tasks.
    pub service: TaskService,
    /// The settings in force.
    pub settings: watch::Receiver<Arc<ServeSettings>>,
    /// Told when a schedule was changed.
    pub changed: Arc<Notify>,
    /// The figures.
    pub metrics: Metrics,
}

impl Scheduler {
    /// Starts due scans until told to stop.
    pub async fn run(mut self, stop: CancellationToken) {
        // For which due time each busy instance is waited for.
        let mut waiting: BTreeMap<String, Timestamp> = BTreeMap::new();
        let mut remembered = Instant::now();
        // The settings whose instances are known to be the only ones with a mark.
        let mut tidied: Option<Arc<ServeSettings>> = None;
        loop {
            let settings = self.settings.borrow_and_update().clone();
            waiting.retain(|id, _| settings.instance(id).is_some());
            let mut sleep = LOOK_AGAIN;
            if tidied.as_ref().is_none_or(|tidied| !Arc::ptr_eq(tidied, &settings)) {
                let ids: Vec<_> = settings.instances.iter().map(|instance| instance.id.as_str()).collect();
                match self.service.store().forget_marks_but(&ids).await {
                    Ok(()) => tidied = Some(settings.clone()),
                    Err(error) => {
                        self.metrics.store_failed();
                        tracing::error!(%error, "the marks of instances that are gone cannot be forgotten");
                        sleep = LOOK_SOON;
                    }
                }
            }
            match self.service.store().schedules().await {
                Ok(schedules) => {
                    for instance in &settings.instances {
                        match self.look(instance, &schedules, &mut waiting).await {
                            Ok(next) => sleep = sleep.min(next),
                            Err(error) => {
                                tracing::error!(instance = instance.id, %error, "a schedule could not be looked at");
                                sleep = sleep.min(LOOK_SOON);
                            }
                        }
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "the schedules could not be read");
                    sleep = LOOK_SOON;
                }
            }
            if remembered.elapsed() >= LOOK_AGAIN {
                remembered = Instant::now();
                self.remember().await;
            }
            tokio::select! {
                () = tokio::time::sleep(sleep) => {}
                () = self.changed.notified() => {}
                changed = self.settings.changed() => if changed.is_err() { return },
                () = stop.cancelled() => return,
            }
        }
    }

    /// Shows the sweeps that other daemons have completed.
    async fn remember(&self) {
        if self.service.store().fleet().is_none() {
            return;
        }
        match self.service.store().last_successes().await {
            Ok(successes) => successes.iter().for_each(|(instance, at)| self.metrics.succeeded(instance, *at)),
            Err(error) => tracing::error!(%error, "what other daemons have swept could not be read"),
        }
    }

    /// Does what is to be done for one instance. Returns how long nothing will be to do.
    async fn look(
        &self,
        instance: &Arc<Instance>,
        schedules: &Schedules,
        waiting: &mut BTreeMap<String, Timestamp>,
    ) -> Result<Duration, TaskError> {
        let store = self.service.store();
        let set = schedules.auto_scan(&instance.id, &instance.project_id);
        let config = set.unwrap_or(&instance.auto_scan);
        let now = store.now();
        let schedule = config.schedule();
        let mark = schedules.mark(&instance.id).cloned();
        let ahead = mark.as_ref().is_some_and(|mark| mark.handled.duration_since(now) > GRACE);
        if ahead {
            tracing::warn!(instance = instance.id, "the clock was set back: due times count from now on");
        }
        let good = |mark: &Mark| !ahead && mark.schedule.as_ref().is_none_or(|of| *of == schedule);
        let Some(mark) = mark.filter(good) else {
            // Due times before a schedule was put in force were nobody's to keep.
            let mark = Mark { handled: now, schedule: Some(schedule) };
            self.written(store.set_mark(&instance.id, &mark).await)?;
            return Ok(Duration::ZERO);
        };
        let handled = mark.handled;
        if mark.schedule.is_none() {
            self.written(store.set_mark(&instance.id, &Mark { handled, schedule: Some(schedule) }).await)?;
        }
        if !config.enabled {
            waiting.remove(&instance.id);
            return Ok(LOOK_AGAIN);
        }
        self.act(instance, config, handled, now, waiting).await
    }

    /// Counts what could not be written.
    fn written<T>(&self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        result.inspect_err(|_| self.metrics.store_failed())
    }

    /// Does what the schedule wants.
    async fn act(
        &self,
        instance: &Arc<Instance>,
        config: &AutoScan,
        handled: Timestamp,
        now: Timestamp,
        waiting: &mut BTreeMap<String, Timestamp>,
    ) -> Result<Duration, TaskError> {
        let is_due = config.recurrence.latest_due(now).is_some_and(|due| due > handled);
        let moment = Moment {
            now,
            handled,
            busy: is_due && self.service.is_busy(&instance.id).await?,
            waiting_for: waiting.get(&instance.id).copied(),
            window_open: instance.window.as_ref().is_none_or(|window| window.is_open(now)),
        };
        let decision = decide(&config.recurrence, moment);
        if let Decision::Wait(due) | Decision::Skip(due, _) | Decision::Run(due) = decision {
            self.overtaken(instance, moment.waiting_for, due).await?;
            self.missed(instance, config, handled, due).await?;
        }
        match decision {
            Decision::Sleep(next) => Ok(next.map_or(LOOK_AGAIN, |next| until(now, next))),
            Decision::Wait(due) => {
                waiting.insert(instance.id.clone(), due);
                Ok(LOOK_SOON)
            }
            Decision::Skip(due, why) => {
                self.skip(instance, &[due], why).await?;
                waiting.remove(&instance.id);
                Ok(Duration::ZERO)
            }
            Decision::Run(due) => match self.begin(instance, config, due).await {
                // Another daemon was quicker: it is dealt with.
                Ok(()) | Err(TaskError::Store(StoreError::DealtWith)) => {
                    waiting.remove(&instance.id);
                    Ok(Duration::ZERO)
                }
                // Somebody was quicker; the grace goes on.
                Err(TaskError::Busy(_)) => {
                    waiting.insert(instance.id.clone(), due);
                    Ok(LOOK_SOON)
                }
                Err(TaskError::Closing) => Ok(LOOK_AGAIN),
                Err(error) => Err(error),
            },
        }
    }

    /// Records the due times before `due` that nobody looked at in time, as far as they are not ages ago.
    async fn missed(
        &self,
        instance: &Instance,
        config: &AutoScan,
        handled: Timestamp,
        due: Timestamp,
    ) -> Result<(), TaskError> {
        let earlier = |at: &Timestamp| config.recurrence.next_due(*at).filter(|next| *next < due);
        let missed: Vec<_> = std::iter::successors(earlier(&handled), earlier).take(MISSED_AT_MOST).collect();
        if missed.is_empty() { Ok(()) } else { self.skip(instance, &missed, Skip::Missed).await }
    }

    async fn skip(&self, instance: &Instance, dues: &[Timestamp], why: Skip) -> Result<(), TaskError> {
        let outcome = match why {
            Skip::StillRunning => "still_running",
            Skip::Missed => "missed",
        };
        let dues: Vec<_> = dues.iter().map(|at| Due { at: *at, outcome }).collect();
        // One of several daemons says so.
        for due in self.written(self.service.store().skip(&instance.id, &dues).await)? {
            tracing::warn!(instance = instance.id, due = %due.at, "a due scan is skipped: {why}");
            self.metrics.due(&instance.id, outcome);
        }
        Ok(())
    }

    /// Where the next due time comes within the grace of the one before, that one is not waited for any longer.
    async fn overtaken(
        &self,
        instance: &Instance,
        waited_for: Option<Timestamp>,
        due: Timestamp,
    ) -> Result<(), TaskError> {
        match waited_for.filter(|earlier| *earlier < due) {
            Some(earlier) => self.skip(instance, &[earlier], Skip::StillRunning).await,
            None => Ok(()),
        }
    }

    async fn begin(&self, instance: &Instance, config: &AutoScan, due: Timestamp) -> Result<(), TaskError> {
        let mut texts = instance.settings.sweep_texts.clone();
        texts.insert("count".to_owned(), config.count.to_string());
        texts.insert("timeout".to_owned(), format!("{}s", config.timeout_s));
        // Both were checked when they were set; if a stored one is wrong all the same, the instance's own will do.
        let settings = serve::with_texts(&instance.settings, &texts).unwrap_or_else(|problems| {
            tracing::error!(instance = instance.id, ?problems, "the automatic scan's settings are not valid");
            instance.settings.clone()
        });
        let spec = match TaskSpec::of(instance, &settings, Cause::Schedule) {
            Ok(spec) => spec,
            // It would fail at each look until somebody puts the file back: once for each due time is enough.
            Err(error @ TaskError::Settings(_)) => {
                tracing::error!(instance = instance.id, %error, %due, "a due scan cannot begin");
                let failure = Failure::new(FailureKind::CannotConnect, error.to_string());
                let failure =
                    failure.hint("put the file back where the settings name it; the next due scan reads it again");
                self.service.submit_failed(instance, &settings, due, failure).await?;
                self.metrics.due(&instance.id, "run");
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let spec = TaskSpec { window: instance.window.clone(), min_backlog: instance.min_backlog, ..spec };
        let task = self.service.submit(spec, Some(due)).await?;
        tracing::info!(instance = instance.id, task = %task.id, %due, "a scan is due");
        self.metrics.due(&instance.id, "run");
        Ok(())
    }
}
