//! Finds instances with a schedule that have not been swept completely for too long, and reports each once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::model::event::{Event, EventKind};
use crate::notify::Notifier;
use crate::settings::serve::ServeSettings;
use crate::tasks::{TaskError, TaskService};

/// Longest sleep between two checks: meanwhile the clock may be set, a schedule switched on, an instance swept.
const CHECK_EVERY: Duration = Duration::from_secs(60);

/// The check and what it needs.
#[derive(Debug)]
pub(crate) struct Overdue {
    /// Gives access to the records and their clock.
    pub service: TaskService,
    /// The settings in force; a change starts a check at once.
    pub settings: watch::Receiver<Arc<ServeSettings>>,
    /// Sends the notifications of overdue instances.
    pub notifier: Notifier,
}

/// When an instance was last swept, and reported.
#[derive(Debug)]
struct LastSweep {
    /// When it was first checked: of an instance without a success the time counts from here.
    first_seen: Timestamp,
    last_success: Option<Timestamp>,
    /// The value of [`Self::since`] that was reported already.
    reported: Option<Timestamp>,
}

impl LastSweep {
    /// The instant from which the time without a complete sweep counts.
    fn since(&self) -> Timestamp {
        self.last_success.unwrap_or(self.first_seen)
    }
}

impl Overdue {
    /// Checks the instances until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut last_sweeps = BTreeMap::new();
        loop {
            let settings = self.settings.borrow_and_update().clone();
            let sleep = self.check(&settings, &mut last_sweeps).await.unwrap_or_else(|error| {
                tracing::error!(%error, "cannot read when the instances were last swept");
                CHECK_EVERY
            });
            tokio::select! {
                () = tokio::time::sleep(sleep) => {}
                changed = self.settings.changed() => if changed.is_err() { return },
                () = stop.cancelled() => return,
            }
        }
    }

    /// Reports the instances that are overdue now. Returns the time until the next one can be.
    async fn check(
        &self,
        settings: &ServeSettings,
        last_sweeps: &mut BTreeMap<String, LastSweep>,
    ) -> Result<Duration, TaskError> {
        let notify = settings.notify.as_ref().filter(|notify| notify.events.contains(&EventKind::NotSwept));
        let Some(notify) = notify else { return Ok(CHECK_EVERY) };
        let now = self.service.store().now();
        let mut awaited = BTreeMap::new();
        let schedules = self.service.store().schedules().await?;
        for instance in &settings.instances {
            let set = schedules.auto_scan(&instance.id, &instance.project_id);
            if set.unwrap_or(&instance.auto_scan).enabled {
                awaited.insert(&instance.id, (instance, instance.not_swept_for.unwrap_or(notify.not_swept_for)));
            }
        }
        last_sweeps.retain(|id, _| awaited.contains_key(id));
        let over = |last_sweeps: &BTreeMap<String, LastSweep>, id: &String, allowed| {
            last_sweeps.get(id).is_none_or(|of| left(of.since(), allowed, now).is_zero())
        };
        // The successes are read from the records only if an instance seems overdue, not at each check.
        if awaited.iter().any(|(id, (_, allowed))| over(last_sweeps, id, *allowed)) {
            let successes = self.service.store().last_successes().await?;
            for id in awaited.keys() {
                let new = || LastSweep { first_seen: now, last_success: None, reported: None };
                last_sweeps.entry((*id).clone()).or_insert_with(new).last_success = successes.get(*id).copied();
            }
        }
        let mut sleep = CHECK_EVERY;
        for (id, (instance, allowed)) in awaited {
            let Some(of) = last_sweeps.get_mut(id) else { continue };
            let (since, left) = (of.since(), left(of.since(), allowed, now));
            if !left.is_zero() {
                sleep = sleep.min(left);
            } else if of.reported != Some(since) && self.reports_for_all().await? {
                of.reported = Some(since);
                tracing::warn!(instance = id, ?allowed, "not swept completely for too long");
                self.notifier.notify(Event::not_swept(id, &instance.project_id, of.last_success, allowed, now));
            }
        }
        Ok(sleep)
    }

    /// Whether this daemon is the oldest of those that share a database: only that one reports.
    async fn reports_for_all(&self) -> Result<bool, TaskError> {
        let (own, daemons) = self.service.daemons().await?;
        Ok(daemons.first().map(|daemon| daemon.record.id) == own)
    }
}

/// The rest of the allowed time; zero once it is over.
fn left(since: Timestamp, allowed: Duration, now: Timestamp) -> Duration {
    let passed = now.duration_since(since).max(SignedDuration::ZERO).unsigned_abs();
    allowed.saturating_sub(passed)
}
