//! Starts the scans that are due. Evaluates the schedule of each instance by `model::schedule::decide` and carries out the
//! decision. The store keeps which due times were handled, so that a restart neither loses nor repeats one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use jiff::Timestamp;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;
use crate::model::failure::{Failure, FailureKind};
use crate::model::schedule::{AutoScan, DueDecision, GRACE, Moment, Skip, decide, until};
use crate::model::task::{Cause, SweepTexts};
use crate::settings::serve::{self, Instance, ServeSettings};
use crate::store::{DueOutcome, DuePosition, ScheduleState, StoreError};
use crate::tasks::{TaskError, TaskService, TaskSpec};

/// Longest sleep between two rounds: meanwhile the clock may be set, or the machine may be suspended.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);
/// Sleep while a due scan waits for a busy instance, and after an error of the store.
const SHORT_SLEEP: Duration = Duration::from_millis(500);

/// Time between two reads of the due times that other daemons have handled.
const REFRESH_EVERY: Duration = Duration::from_secs(1);
/// Instances that are evaluated at the same time. A due one takes a few round trips to the store.
const CONCURRENCY: usize = 4;
/// Most missed due times of an instance that are recorded after a long absence.
const MISSED_AT_MOST: usize = 100;

/// The scheduler and what it needs.
#[derive(Debug)]
pub(crate) struct Scheduler {
    /// Starts tasks, and gives access to the store.
    pub service: TaskService,
    /// The settings in force; a change starts a round at once.
    pub settings: watch::Receiver<Arc<ServeSettings>>,
    /// Notified by the API, or for another daemon, when a schedule was changed.
    pub changed: Arc<Notify>,
    /// Counts due times and errors of the store.
    pub metrics: Metrics,
}

/// The result of evaluating the schedule of one instance.
#[derive(Debug)]
struct Evaluation {
    /// Time until the instance has to be evaluated again.
    sleep: Duration,
    /// The due time that waits for the scan before it.
    waiting_for: Option<Timestamp>,
    /// The new due position; `None`: unchanged.
    position: Option<DuePosition>,
    /// Whether the due position still has to be written to the store.
    is_unwritten: bool,
}

impl Scheduler {
    /// Starts due scans until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        // The due time that waits, for each busy instance.
        let mut waiting: BTreeMap<String, Timestamp> = BTreeMap::new();
        // The schedule state as it was last read, with the due positions that were set since, and when it was read.
        let mut known: Option<(ScheduleState, Instant)> = None;
        // When the due times that other daemons have handled were last read.
        let mut refreshed = Instant::now();
        // The settings for which the due positions of all other instances were removed from the store.
        let mut tidied: Option<Arc<ServeSettings>> = None;
        loop {
            let settings = self.settings.borrow_and_update().clone();
            waiting.retain(|id, _| settings.instance(id).is_some());
            let mut sleep = LONGEST_SLEEP;
            if tidied.as_ref().is_none_or(|tidied| !Arc::ptr_eq(tidied, &settings)) {
                let ids: Vec<_> = settings.instances.iter().map(|instance| instance.id.as_str()).collect();
                match self.count_failure(self.service.store().forget_due_positions_except(&ids).await) {
                    Ok(()) => (tidied, known) = (Some(settings.clone()), None),
                    Err(error) => {
                        tracing::error!(%error, "cannot remove the due positions of instances that left the settings");
                        sleep = SHORT_SLEEP;
                    }
                }
            }
            if known.as_ref().is_none_or(|(_, read)| read.elapsed() >= LONGEST_SLEEP) {
                match self.read().await {
                    Ok(schedules) => {
                        refreshed = Instant::now();
                        known = Some((schedules, refreshed));
                    }
                    Err(error) => {
                        tracing::error!(%error, "cannot read the schedules");
                        sleep = SHORT_SLEEP;
                    }
                }
            }
            if let Some((schedules, _)) = &mut known {
                refreshed = self.refresh(schedules, refreshed).await;
                sleep = sleep.min(self.evaluate_all(&settings, schedules, &mut waiting).await);
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

    /// Reads the schedule state, and updates the metrics by the sweeps that other daemons have completed.
    async fn read(&self) -> Result<ScheduleState, StoreError> {
        let store = self.service.store();
        if store.fleet().is_some() {
            self.service.show_successes().await?;
        }
        store.schedules().await
    }

    /// Takes over the due positions that other daemons have moved, at most once per [`REFRESH_EVERY`], so that this one does not try
    /// their due times. Returns when that was done last.
    async fn refresh(&self, schedules: &mut ScheduleState, last: Instant) -> Instant {
        let store = self.service.store();
        if store.fleet().is_none() || last.elapsed() < REFRESH_EVERY {
            return last;
        }
        let after = store.now().checked_sub(GRACE + GRACE).unwrap_or(Timestamp::MIN);
        match store.due_positions_after(after).await {
            Ok(positions) => positions.into_iter().for_each(|(id, position)| schedules.set_position(&id, position)),
            // Without them a due time is tried in vain: the store refuses one that was handled.
            Err(error) => tracing::warn!(%error, "cannot read which due times other daemons have handled"),
        }
        Instant::now()
    }

    /// Evaluates the schedules of all instances, [`CONCURRENCY`] at the same time. Returns the time until the next round.
    async fn evaluate_all(
        &self,
        settings: &ServeSettings,
        schedules: &mut ScheduleState,
        waiting: &mut BTreeMap<String, Timestamp>,
    ) -> Duration {
        // Starts at a random instance: daemons that evaluate at the same moment then rarely try the same due time.
        let random = usize::try_from(Timestamp::now().subsec_nanosecond()).unwrap_or(0);
        let (before, after) = settings.instances.split_at(random % settings.instances.len().max(1));
        let in_turn = after.iter().chain(before).map(|instance| (instance.clone(), waiting.get(&instance.id).copied()));
        let in_turn: Vec<_> = in_turn.collect();
        let known: &ScheduleState = schedules;
        let evaluations = futures_util::stream::iter(in_turn)
            .map(|(instance, waits)| async move { (self.evaluate(&instance, known, waits).await, instance) });
        let evaluations: Vec<_> = evaluations.buffer_unordered(CONCURRENCY).collect().await;
        let mut sleep = LONGEST_SLEEP;
        let unwritten = evaluations.iter().filter_map(|(evaluation, instance)| {
            let evaluation = evaluation.as_ref().ok().filter(|evaluation| evaluation.is_unwritten)?;
            Some((instance.id.as_str(), evaluation.position.as_ref()?))
        });
        let unwritten: Vec<_> = unwritten.collect();
        let written = self.count_failure(self.service.store().set_due_positions(&unwritten).await);
        if let Err(error) = &written {
            tracing::error!(%error, "cannot write the due positions of schedules");
            sleep = SHORT_SLEEP;
        }
        for (evaluation, instance) in evaluations {
            let evaluation = match evaluation {
                Ok(evaluation) => evaluation,
                Err(error) => {
                    tracing::error!(instance = instance.id, %error, "cannot evaluate the schedule of an instance");
                    sleep = sleep.min(SHORT_SLEEP);
                    continue;
                }
            };
            sleep = sleep.min(evaluation.sleep);
            match evaluation.waiting_for {
                Some(due) => drop(waiting.insert(instance.id.clone(), due)),
                None => drop(waiting.remove(&instance.id)),
            }
            if let Some(position) = evaluation.position.filter(|_| !evaluation.is_unwritten || written.is_ok()) {
                schedules.set_position(&instance.id, position);
            }
        }
        sleep
    }

    /// Evaluates the schedule of one instance and carries out the decision.
    async fn evaluate(
        &self,
        instance: &Arc<Instance>,
        schedules: &ScheduleState,
        waiting_for: Option<Timestamp>,
    ) -> Result<Evaluation, TaskError> {
        let store = self.service.store();
        let set = schedules.auto_scan(&instance.id, &instance.project_id);
        let config = set.unwrap_or(&instance.auto_scan);
        let now = store.now();
        let schedule = config.schedule();
        let position = schedules.position(&instance.id);
        let ahead = position.is_some_and(|position| position.handled.duration_since(now) > GRACE);
        if ahead {
            tracing::warn!(instance = instance.id, "the clock was set back: due times count from now on");
        }
        let is_valid = |position: &&DuePosition| !ahead && position.schedule.as_ref().is_none_or(|of| *of == schedule);
        // Without a valid position only due times from now on count: those before the schedule was put in force were never due.
        let handled = position.filter(is_valid).map_or(now, |position| position.handled);
        let position = match position.filter(is_valid) {
            Some(position) if position.schedule.is_some() => None,
            _ => Some(DuePosition { handled, schedule: Some(schedule) }),
        };
        let is_unwritten = position.is_some();
        if !config.enabled {
            return Ok(Evaluation { sleep: LONGEST_SLEEP, waiting_for: None, position, is_unwritten });
        }
        let evaluation = self.carry_out(instance, config, handled, now, waiting_for).await?;
        Ok(Evaluation { position: evaluation.position.or(position), is_unwritten, ..evaluation })
    }

    /// Counts an error of the store in the metrics.
    fn count_failure<T>(&self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        result.inspect_err(|_| self.metrics.store_failed())
    }

    /// Decides what the schedule needs now, and does it.
    async fn carry_out(
        &self,
        instance: &Arc<Instance>,
        config: &AutoScan,
        handled: Timestamp,
        now: Timestamp,
        waiting_for: Option<Timestamp>,
    ) -> Result<Evaluation, TaskError> {
        let is_due = config.recurrence.latest_due(now).is_some_and(|due| due > handled);
        let moment = Moment {
            now,
            handled,
            busy: is_due && self.service.is_busy(&instance.id).await?,
            waiting_for,
            window_open: instance.window.as_ref().is_none_or(|window| window.is_open(now)),
        };
        let decision = decide(&config.recurrence, moment);
        if let DueDecision::Wait(due) | DueDecision::Skip(due, _) | DueDecision::Run(due) = decision {
            self.skip_superseded(instance, waiting_for, due).await?;
            self.skip_missed(instance, config, handled, due).await?;
        }
        let handled = |due| {
            let position = DuePosition { handled: due, schedule: Some(config.schedule()) };
            Evaluation { sleep: Duration::ZERO, waiting_for: None, position: Some(position), is_unwritten: false }
        };
        let unchanged = |sleep, waiting_for| Evaluation { sleep, waiting_for, position: None, is_unwritten: false };
        let waits = |due| unchanged(SHORT_SLEEP, Some(due));
        match decision {
            DueDecision::Sleep(next) => {
                let sleep = next.map_or(LONGEST_SLEEP, |next| until(now, next));
                Ok(unchanged(sleep, waiting_for))
            }
            DueDecision::Wait(due) => Ok(waits(due)),
            DueDecision::Skip(due, why) => {
                self.skip(instance, &[due], why).await?;
                Ok(handled(due))
            }
            DueDecision::Run(due) => match self.start_scan(instance, config, due).await {
                // AlreadyHandled: another daemon has started or skipped it.
                Ok(()) | Err(TaskError::Store(StoreError::AlreadyHandled)) => Ok(handled(due)),
                // A task of the API was submitted just before; the due time waits for its end, within the grace.
                Err(TaskError::Unfinished(_)) => Ok(waits(due)),
                Err(TaskError::Closing) => Ok(unchanged(LONGEST_SLEEP, waiting_for)),
                Err(error) => Err(error),
            },
        }
    }

    /// Records the due times between `handled` and `due` as missed, at most [`MISSED_AT_MOST`].
    async fn skip_missed(
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

    /// Records due times as skipped, and logs and counts them.
    async fn skip(&self, instance: &Instance, due_times: &[Timestamp], why: Skip) -> Result<(), TaskError> {
        let outcome = match why {
            Skip::StillRunning => "still_running",
            Skip::Missed => "missed",
        };
        let outcomes: Vec<_> = due_times.iter().map(|at| DueOutcome { at: *at, outcome }).collect();
        // The store returns those that no other daemon has handled: each is logged and counted once.
        for due in self.count_failure(self.service.store().skip(&instance.id, &outcomes).await)? {
            tracing::warn!(instance = instance.id, due = %due.at, "a due scan is skipped: {why}");
            self.metrics.due(&instance.id, outcome);
        }
        Ok(())
    }

    /// Records the due time that waited as skipped if the next one is due already.
    async fn skip_superseded(
        &self,
        instance: &Instance,
        waiting_for: Option<Timestamp>,
        due: Timestamp,
    ) -> Result<(), TaskError> {
        match waiting_for.filter(|earlier| *earlier < due) {
            Some(earlier) => self.skip(instance, &[earlier], Skip::StillRunning).await,
            None => Ok(()),
        }
    }

    /// Submits the scan of a due time. If its settings name a file that cannot be read, records a failed task in its place.
    async fn start_scan(&self, instance: &Instance, config: &AutoScan, due: Timestamp) -> Result<(), TaskError> {
        let mut texts = SweepTexts::clone(&instance.settings.sweep_texts);
        texts.insert("count".to_owned(), config.count.to_string());
        texts.insert("timeout".to_owned(), format!("{}s", config.timeout_s));
        // Both were checked when they were set. If a stored one is invalid all the same, the instance's own settings are used.
        let settings = serve::with_texts(&instance.settings, &texts).unwrap_or_else(|problems| {
            tracing::error!(instance = instance.id, ?problems, "the automatic scan's settings are not valid");
            instance.settings.clone()
        });
        let spec = match TaskSpec::of(instance, &settings, Cause::Schedule) {
            Ok(spec) => spec,
            // It would fail in each round until the file is restored: one failed task for each due time is enough.
            Err(error @ TaskError::Settings(_)) => {
                tracing::error!(instance = instance.id, %error, %due, "a due scan cannot start");
                let failure = Failure::new(FailureKind::CannotConnect, error.to_string());
                let failure = failure.hint("restore the file that the settings name; the next due scan reads it again");
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
