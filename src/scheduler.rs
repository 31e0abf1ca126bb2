//! Starts the scans that are due. Looks at each instance's schedule, asks `model::schedule` what is to be done, and does
//! it; the store remembers which due times were dealt with, so that a restart neither loses nor doubles one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use jiff::Timestamp;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;
use crate::model::failure::{Failure, FailureKind};
use crate::model::schedule::{AutoScan, Decision, GRACE, Moment, Skip, decide, until};
use crate::model::task::{Cause, SweepTexts};
use crate::settings::serve::{self, Instance, ServeSettings};
use crate::store::{Due, Mark, Schedules, StoreError};
use crate::tasks::{TaskError, TaskService, TaskSpec};

/// Longest sleep: the clock may have been set, or the machine may have slept.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// How often a busy instance is looked at while its due scan waits, and after trouble with the store.
const LOOK_SOON: Duration = Duration::from_millis(500);

/// How often it is looked what other daemons have dealt with.
const REFRESH_EVERY: Duration = Duration::from_secs(1);
/// Instances that are looked at at a time: each look at a due one is a few round trips to the records.
const AT_A_TIME: usize = 4;
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

/// What a look at an instance found.
#[derive(Debug)]
struct Looked {
    /// How long nothing will be to do.
    sleep: Duration,
    /// The due time that waits for the scan before it.
    waiting_for: Option<Timestamp>,
    /// The mark, where it is another one now.
    mark: Option<Mark>,
    /// Whether the records do not have that mark yet.
    is_new: bool,
}

impl Scheduler {
    /// Starts due scans until told to stop.
    pub async fn run(mut self, stop: CancellationToken) {
        // For which due time each busy instance is waited for.
        let mut waiting: BTreeMap<String, Timestamp> = BTreeMap::new();
        // The schedules as they were last read, with the marks that were set since.
        let mut known: Option<(Schedules, Instant)> = None;
        // When it was last seen what other daemons have dealt with.
        let mut refreshed = Instant::now();
        // The settings whose instances are known to be the only ones with a mark.
        let mut tidied: Option<Arc<ServeSettings>> = None;
        loop {
            let settings = self.settings.borrow_and_update().clone();
            waiting.retain(|id, _| settings.instance(id).is_some());
            let mut sleep = LOOK_AGAIN;
            if tidied.as_ref().is_none_or(|tidied| !Arc::ptr_eq(tidied, &settings)) {
                let ids: Vec<_> = settings.instances.iter().map(|instance| instance.id.as_str()).collect();
                match self.written(self.service.store().forget_marks_but(&ids).await) {
                    Ok(()) => (tidied, known) = (Some(settings.clone()), None),
                    Err(error) => {
                        tracing::error!(%error, "the marks of instances that are gone cannot be forgotten");
                        sleep = LOOK_SOON;
                    }
                }
            }
            if known.as_ref().is_none_or(|(_, read)| read.elapsed() >= LOOK_AGAIN) {
                match self.read().await {
                    Ok(schedules) => {
                        refreshed = Instant::now();
                        known = Some((schedules, refreshed));
                    }
                    Err(error) => {
                        tracing::error!(%error, "the schedules could not be read");
                        sleep = LOOK_SOON;
                    }
                }
            }
            if let Some((schedules, _)) = &mut known {
                refreshed = self.refresh(schedules, refreshed).await;
                sleep = sleep.min(self.look_at_all(&settings, schedules, &mut waiting).await);
            }
            tokio::select! {
                () = tokio::time::sleep(sleep) => {}
                () = self.changed.notified() => known = None,
                changed = self.settings.changed() => match changed {
                    Ok(()) => known = None,
                    Err(_) => return,
                },
                () = stop.cancelled() => return,
            }
        }
    }

    /// Reads the schedules, and shows the sweeps that other daemons have completed.
    async fn read(&self) -> Result<Schedules, StoreError> {
        let store = self.service.store();
        if store.fleet().is_some() {
            self.service.show_successes().await?;
        }
        store.schedules().await
    }

    /// Takes over what other daemons have dealt with, so that nothing is tried in vain; not more often than each second. Returns when
    /// that was.
    async fn refresh(&self, schedules: &mut Schedules, last: Instant) -> Instant {
        let store = self.service.store();
        if store.fleet().is_none() || last.elapsed() < REFRESH_EVERY {
            return last;
        }
        let after = store.now().checked_sub(GRACE + GRACE).unwrap_or(Timestamp::MIN);
        match store.marks_after(after).await {
            Ok(marks) => marks.into_iter().for_each(|(instance, mark)| schedules.set_mark(&instance, mark)),
            // Then it is tried in vain, which is as right.
            Err(error) => tracing::warn!(%error, "what other daemons have dealt with could not be read"),
        }
        Instant::now()
    }

    /// Looks at each instance, some at a time. Returns how long nothing will be to do.
    async fn look_at_all(
        &self,
        settings: &ServeSettings,
        schedules: &mut Schedules,
        waiting: &mut BTreeMap<String, Timestamp>,
    ) -> Duration {
        // Daemons that look at the same moment begin at different places.
        let random = usize::try_from(Timestamp::now().subsec_nanosecond()).unwrap_or(0);
        let (before, after) = settings.instances.split_at(random % settings.instances.len().max(1));
        let in_turn = after.iter().chain(before).map(|instance| (instance.clone(), waiting.get(&instance.id).copied()));
        let in_turn: Vec<_> = in_turn.collect();
        let known: &Schedules = schedules;
        let looks = futures_util::stream::iter(in_turn)
            .map(|(instance, waits)| async move { (self.look(&instance, known, waits).await, instance) });
        let looked: Vec<_> = looks.buffer_unordered(AT_A_TIME).collect().await;
        let mut sleep = LOOK_AGAIN;
        let new = looked.iter().filter_map(|(looked, instance)| {
            let mark = looked.as_ref().ok().filter(|looked| looked.is_new)?.mark.as_ref()?;
            Some((instance.id.as_str(), mark))
        });
        let new: Vec<_> = new.collect();
        let written = self.written(self.service.store().set_marks(&new).await);
        if let Err(error) = &written {
            tracing::error!(%error, "the marks of schedules could not be written");
            sleep = LOOK_SOON;
        }
        for (looked, instance) in looked {
            let looked = match looked {
                Ok(looked) => looked,
                Err(error) => {
                    tracing::error!(instance = instance.id, %error, "a schedule could not be looked at");
                    sleep = sleep.min(LOOK_SOON);
                    continue;
                }
            };
            sleep = sleep.min(looked.sleep);
            match looked.waiting_for {
                Some(due) => drop(waiting.insert(instance.id.clone(), due)),
                None => drop(waiting.remove(&instance.id)),
            }
            if let Some(mark) = looked.mark.filter(|_| !looked.is_new || written.is_ok()) {
                schedules.set_mark(&instance.id, mark);
            }
        }
        sleep
    }

    /// Does what is to be done for one instance.
    async fn look(
        &self,
        instance: &Arc<Instance>,
        schedules: &Schedules,
        waiting_for: Option<Timestamp>,
    ) -> Result<Looked, TaskError> {
        let store = self.service.store();
        let set = schedules.auto_scan(&instance.id, &instance.project_id);
        let config = set.unwrap_or(&instance.auto_scan);
        let now = store.now();
        let schedule = config.schedule();
        let mark = schedules.mark(&instance.id);
        let ahead = mark.is_some_and(|mark| mark.handled.duration_since(now) > GRACE);
        if ahead {
            tracing::warn!(instance = instance.id, "the clock was set back: due times count from now on");
        }
        let good = |mark: &&Mark| !ahead && mark.schedule.as_ref().is_none_or(|of| *of == schedule);
        // Due times before a schedule was put in force were nobody's to keep.
        let handled = mark.filter(good).map_or(now, |mark| mark.handled);
        let mark = match mark.filter(good) {
            Some(mark) if mark.schedule.is_some() => None,
            _ => Some(Mark { handled, schedule: Some(schedule) }),
        };
        let is_new = mark.is_some();
        if !config.enabled {
            return Ok(Looked { sleep: LOOK_AGAIN, waiting_for: None, mark, is_new });
        }
        let looked = self.act(instance, config, handled, now, waiting_for).await?;
        Ok(Looked { mark: looked.mark.or(mark), is_new, ..looked })
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
        waiting_for: Option<Timestamp>,
    ) -> Result<Looked, TaskError> {
        let is_due = config.recurrence.latest_due(now).is_some_and(|due| due > handled);
        let moment = Moment {
            now,
            handled,
            busy: is_due && self.service.is_busy(&instance.id).await?,
            waiting_for,
            window_open: instance.window.as_ref().is_none_or(|window| window.is_open(now)),
        };
        let decision = decide(&config.recurrence, moment);
        if let Decision::Wait(due) | Decision::Skip(due, _) | Decision::Run(due) = decision {
            self.overtaken(instance, waiting_for, due).await?;
            self.missed(instance, config, handled, due).await?;
        }
        let dealt_with = |due| {
            let mark = Mark { handled: due, schedule: Some(config.schedule()) };
            Looked { sleep: Duration::ZERO, waiting_for: None, mark: Some(mark), is_new: false }
        };
        let waits = |due| Looked { sleep: LOOK_SOON, waiting_for: Some(due), mark: None, is_new: false };
        match decision {
            Decision::Sleep(next) => {
                let sleep = next.map_or(LOOK_AGAIN, |next| until(now, next));
                Ok(Looked { sleep, waiting_for, mark: None, is_new: false })
            }
            Decision::Wait(due) => Ok(waits(due)),
            Decision::Skip(due, why) => {
                self.skip(instance, &[due], why).await?;
                Ok(dealt_with(due))
            }
            Decision::Run(due) => match self.begin(instance, config, due).await {
                // Or another daemon was quicker.
                Ok(()) | Err(TaskError::Store(StoreError::DealtWith)) => Ok(dealt_with(due)),
                // Somebody was quicker; the grace goes on.
                Err(TaskError::Busy(_)) => Ok(waits(due)),
                Err(TaskError::Closing) => Ok(Looked { sleep: LOOK_AGAIN, waiting_for, mark: None, is_new: false }),
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
        let mut texts = SweepTexts::clone(&instance.settings.sweep_texts);
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
