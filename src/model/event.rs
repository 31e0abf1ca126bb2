//! Events that are reported to a webhook, for people who do not watch the page.

use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

use crate::model::task::Task;
use crate::model::words::words;

/// The kind of an [`Event`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// A task ended with a failure.
    TaskFailed,
    /// An instance that is swept by schedule has not been swept completely for too long.
    NotSwept,
    /// A keep run misses its bound.
    BoundMissed,
}

words!(EventKind, "event", TaskFailed = "task_failed", NotSwept = "not_swept", BoundMissed = "bound_missed",);

/// What happened, and to which instance.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Made from the fact itself, so that a receiver recognizes a repetition, also after a restart.
    pub id: Uuid,
    /// When the daemon noticed it.
    pub at: Timestamp,
    /// The instance that it is about.
    pub instance_id: String,
    /// The project of the instance.
    pub project_id: String,
    /// The kind of the event, with its facts.
    pub what: Happened,
}

/// The facts of each kind of event.
#[derive(Debug, Clone, PartialEq)]
pub enum Happened {
    /// A task that failed, with the record of its end.
    TaskFailed(Box<Task>),
    /// No sweep of the instance was complete for longer than allowed.
    NotSwept {
        /// When the last complete sweep ended; `None` where there was none.
        last_success: Option<Timestamp>,
        /// The longest time allowed between two complete sweeps.
        allowed: Duration,
    },
    /// A keep run has missed its bound for long enough to report it.
    BoundMissed {
        /// The task of the keep run.
        task: Box<Task>,
        /// How long the bound has been missed.
        missed: Duration,
        /// By how much, as a sentence: [`KeepFigures::miss_text`](crate::model::bounds::KeepFigures::miss_text).
        message: String,
    },
}

impl Event {
    /// A keep run misses its bound. Each run has at most one such event.
    pub fn bound_missed(task: &Task, missed: Duration, message: String, now: Timestamp) -> Self {
        Self {
            id: Uuid::new_v5(&task.id.0, EventKind::BoundMissed.as_str().as_bytes()),
            at: now,
            instance_id: task.instance_id.clone(),
            project_id: task.project_id.clone(),
            what: Happened::BoundMissed { task: Box::new(task.clone()), missed, message },
        }
    }

    /// The event that `task` failed. Its id depends on the task alone, so that a receiver can tell a repetition: a daemon never tries a
    /// failed task again. It goes on with one whose end could not be recorded, and the failure of that one is a repetition.
    pub fn task_failed(task: &Task, now: Timestamp) -> Self {
        Self {
            id: Uuid::new_v5(&task.id.0, EventKind::TaskFailed.as_str().as_bytes()),
            at: now,
            instance_id: task.instance_id.clone(),
            project_id: task.project_id.clone(),
            what: Happened::TaskFailed(Box::new(task.clone())),
        }
    }

    /// No sweep of an instance was complete for longer than allowed.
    pub fn not_swept(
        instance_id: &str,
        project_id: &str,
        last_success: Option<Timestamp>,
        allowed: Duration,
        now: Timestamp,
    ) -> Self {
        let since = last_success.map_or_else(|| "never".to_owned(), |at| at.to_string());
        let fact = format!("ttlsweep:{}:{project_id}:{instance_id}:{since}", EventKind::NotSwept);
        Self {
            id: Uuid::new_v5(&Uuid::NAMESPACE_URL, fact.as_bytes()),
            at: now,
            instance_id: instance_id.to_owned(),
            project_id: project_id.to_owned(),
            what: Happened::NotSwept { last_success, allowed },
        }
    }

    /// The kind of the event.
    pub fn kind(&self) -> EventKind {
        match self.what {
            Happened::TaskFailed(_) => EventKind::TaskFailed,
            Happened::NotSwept { .. } => EventKind::NotSwept,
            Happened::BoundMissed { .. } => EventKind::BoundMissed,
        }
    }
}
