//! Notices an instance with a schedule that has not been swept completely for too long, and reports it once.

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

/// Longest sleep: the clock may have been set, a schedule switched on, an instance swept.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// What it works with.
#[derive(Debug)]
pub struct Overdue {
    /// The tasks.
    pub service: TaskService,
    /// The settings in force.
    pub settings: watch::Receiver<Arc<ServeSettings>>,
    /// Who is told.
    pub notifier: Notifier,
}

/// What is known of an instance.
#[derive(Debug)]
struct Known {
    /// When it was first looked at: the records say nothing of before.
    first_seen: Timestamp,
    last_success: Option<Timestamp>,
    /// The last success, or the first look, of which it was told that it is too long ago.
    told_of: Option<Timestamp>,
}

impl Known {
    fn since(&self) -> Timestamp {
        self.last_success.unwrap_or(self.first_seen)
    }
}

impl Overdue {
    /// Looks until told to stop.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut known = BTreeMap::new();
        loop {
            let settings = self.settings.borrow_and_update().clone();
            let sleep = self.look(&settings, &mut known).await.unwrap_or_else(|error| {
                tracing::error!(%error, "when instances were swept last cannot be looked up");
                LOOK_AGAIN
            });
            tokio::select! {
                () = tokio::time::sleep(sleep) => {}
                changed = self.settings.changed() => if changed.is_err() { return },
                () = stop.cancelled() => return,
            }
        }
    }

    /// Reports the instances for which it is time. Returns how long it will be for none.
    async fn look(&self, settings: &ServeSettings, known: &mut BTreeMap<String, Known>) -> Result<Duration, TaskError> {
        let notify = settings.notify.as_ref().filter(|notify| notify.events.contains(&EventKind::NotSwept));
        let Some(notify) = notify else { return Ok(LOOK_AGAIN) };
        let now = self.service.store().now();
        let mut awaited = BTreeMap::new();
        let schedules = self.service.store().schedules().await?;
        for instance in &settings.instances {
            let set = schedules.auto_scan(&instance.id, &instance.project_id);
            if set.unwrap_or(&instance.auto_scan).enabled {
                awaited.insert(&instance.id, (instance, instance.not_swept_for.unwrap_or(notify.not_swept_for)));
            }
        }
        known.retain(|id, _| awaited.contains_key(id));
        let over = |known: &BTreeMap<String, Known>, id: &String, allowed| {
            known.get(id).is_none_or(|of| left(of.since(), allowed, now).is_zero())
        };
        // The records are asked only where somebody would be told, and not at each look.
        if awaited.iter().any(|(id, (_, allowed))| over(known, id, *allowed)) {
            let successes = self.service.store().last_successes().await?;
            for id in awaited.keys() {
                let new = || Known { first_seen: now, last_success: None, told_of: None };
                known.entry((*id).clone()).or_insert_with(new).last_success = successes.get(*id).copied();
            }
        }
        let mut sleep = LOOK_AGAIN;
        for (id, (instance, allowed)) in awaited {
            let Some(of) = known.get_mut(id) else { continue };
            let (since, left) = (of.since(), left(of.since(), allowed, now));
            if !left.is_zero() {
                sleep = sleep.min(left);
            } else if of.told_of != Some(since) && self.speaks_for_all().await? {
                of.told_of = Some(since);
                tracing::warn!(instance = id, ?allowed, "not swept completely for too long");
                self.notifier.tell(Event::not_swept(id, &instance.project_id, of.last_success, allowed, now));
            }
        }
        Ok(sleep)
    }

    /// Whether this daemon is the oldest of those that share the records: one of them is enough.
    async fn speaks_for_all(&self) -> Result<bool, TaskError> {
        let (own, daemons) = self.service.daemons().await?;
        Ok(daemons.first().map(|daemon| daemon.record.id) == own)
    }
}

/// How much of the time allowed is left; zero where it is over.
fn left(since: Timestamp, allowed: Duration, now: Timestamp) -> Duration {
    let passed = now.duration_since(since).max(SignedDuration::ZERO).unsigned_abs();
    allowed.saturating_sub(passed)
}
