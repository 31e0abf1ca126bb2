//! Starts the scans that are due. Looks at each instance's schedule, asks `model::schedule` what is to be done, and does
//! it; the store remembers which due times were dealt with, so that a restart neither loses nor doubles one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;
use crate::model::failure::{Failure, FailureKind};
use crate::model::schedule::{AutoScan, Decision, GRACE, Moment, Skip, decide, until};
use crate::model::task::Cause;
use crate::settings::serve::{self, Instance, ServeSettings};
use crate::tasks::{TaskError, TaskService, TaskSpec};

/// Longest sleep: the clock may have been set, or the machine may have slept.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// How often a busy instance is looked at while its due scan waits, and after trouble with the store.
const LOOK_SOON: Duration = Duration::from_millis(500);

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
        // The schedules in force at the last look, once there was one.
        let mut in_force: Option<BTreeMap<String, AutoScan>> = None;
        loop {
            let settings = self.settings.borrow_and_update().clone();
            waiting.retain(|id, _| settings.instance(id).is_some());
            let (mut seen, mut all_seen) = (BTreeMap::new(), true);
            let mut sleep = LOOK_AGAIN;
            for instance in &settings.instances {
                let before = in_force.as_ref().map(|in_force| in_force.get(&instance.id));
                match self.look(instance, before, &mut waiting).await {
                    Ok((config, next)) => {
                        seen.insert(instance.id.clone(), config);
                        sleep = sleep.min(next);
                    }
                    Err(error) => {
                        tracing::error!(instance = instance.id, %error, "a schedule could not be looked at");
                        seen.extend(before.flatten().map(|config| (instance.id.clone(), config.clone())));
                        all_seen = false;
                        sleep = sleep.min(LOOK_SOON);
                    }
                }
            }
            // Whoever was not seen at the first look is no newcomer at the second.
            if all_seen || in_force.is_some() {
                in_force = Some(seen);
            }
            tokio::select! {
                () = tokio::time::sleep(sleep) => {}
                () = self.changed.notified() => {}
                changed = self.settings.changed() => if changed.is_err() { return },
                () = stop.cancelled() => return,
            }
        }
    }

    /// Does what is to be done for one instance. `before`: its schedule at the last look, if there was a look; `Some(None)`: it
    /// had none. Returns the schedule, and how long nothing will be to do.
    async fn look(
        &self,
        instance: &Arc<Instance>,
        before: Option<Option<&AutoScan>>,
        waiting: &mut BTreeMap<String, Timestamp>,
    ) -> Result<(AutoScan, Duration), TaskError> {
        let config = self.service.auto_scan(instance).await?;
        let now = Timestamp::now();
        let handled = self.service.store().handled(&instance.id).await?;
        // What the API set says itself from when on it counts.
        let other = |before: &AutoScan| {
            config.updated_at.is_none() && (before.rhythm != config.rhythm || (config.enabled && !before.enabled))
        };
        let began = before.is_some_and(|before| before.is_none_or(other));
        let off = !config.enabled && handled.is_some_and(|handled| config.rhythm.latest_due(now) > Some(handled));
        let ahead = handled.is_some_and(|handled| handled.duration_since(now) > GRACE);
        if ahead {
            tracing::warn!(instance = instance.id, "the clock was set back: due times count from now on");
        }
        if handled.is_none() || began || off || ahead {
            // Due times before this moment were nobody's to keep.
            self.service.store().reset_handled(&instance.id, now).await?;
            return Ok((config, Duration::ZERO));
        }
        let next = match handled {
            Some(handled) if config.enabled => self.act(instance, &config, handled, now, waiting).await?,
            _ => {
                waiting.remove(&instance.id);
                LOOK_AGAIN
            }
        };
        Ok((config, next))
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
        let moment = Moment {
            now,
            handled,
            busy: self.service.on_hand(&instance.id).is_some(),
            waiting_for: waiting.get(&instance.id).copied(),
            window_open: instance.window.as_ref().is_none_or(|window| window.is_open(now)),
        };
        match decide(&config.rhythm, moment) {
            Decision::Sleep(next) => Ok(next.map_or(LOOK_AGAIN, |next| until(now, next))),
            Decision::Wait(due) => {
                waiting.insert(instance.id.clone(), due);
                Ok(LOOK_SOON)
            }
            Decision::Skip(due, why) => {
                tracing::warn!(instance = instance.id, %due, "a due scan is skipped: {why}");
                self.service.store().set_handled(&instance.id, due).await?;
                let outcome = match why {
                    Skip::StillRunning => "still_running",
                    Skip::Missed => "missed",
                };
                self.metrics.due(&instance.id, outcome);
                waiting.remove(&instance.id);
                Ok(Duration::ZERO)
            }
            Decision::Run(due) => match self.begin(instance, config, due).await {
                Ok(()) => {
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
