//! What somebody who does not look should be told of.

use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

use crate::model::task::Task;
use crate::model::words::words;

/// The kind of an [`Event`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// A task failed.
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
    /// The same for the same fact, also after a restart, so that who is told twice can tell.
    pub id: Uuid,
    /// When it was noticed.
    pub at: Timestamp,
    /// The instance.
    pub instance_id: String,
    /// Its project.
    pub project_id: String,
    /// What happened.
    pub what: Happened,
}

/// What is told of each kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Happened {
    /// The task as it ended.
    TaskFailed(Box<Task>),
    /// No complete sweep for too long.
    NotSwept {
        /// When the last one ended; `None` where there never was one.
        last_success: Option<Timestamp>,
        /// How long may be between two.
        allowed: Duration,
    },
    /// A bound has been missed for long enough to tell.
    BoundMissed {
        /// The keep run.
        task: Box<Task>,
        /// For how long it has been missed.
        missed: Duration,
        /// The numbers.
        message: String,
    },
}

impl Event {
    /// A keep run that misses its bound. One event for each run at most.
    pub fn bound_missed(task: &Task, missed: Duration, message: String, now: Timestamp) -> Self {
        Self {
            id: Uuid::new_v5(&task.id.0, EventKind::BoundMissed.as_str().as_bytes()),
            at: now,
            instance_id: task.instance_id.clone(),
            project_id: task.project_id.clone(),
            what: Happened::BoundMissed { task: Box::new(task.clone()), missed, message },
        }
    }

    /// A task that has failed.
    pub fn task_failed(task: &Task, now: Timestamp) -> Self {
        Self {
            id: Uuid::new_v5(&task.id.0, EventKind::TaskFailed.as_str().as_bytes()),
            at: now,
            instance_id: task.instance_id.clone(),
            project_id: task.project_id.clone(),
            what: Happened::TaskFailed(Box::new(task.clone())),
        }
    }

    /// An instance that has not been swept completely for longer than allowed.
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

    /// Its kind.
    pub fn kind(&self) -> EventKind {
        match self.what {
            Happened::TaskFailed(_) => EventKind::TaskFailed,
            Happened::NotSwept { .. } => EventKind::NotSwept,
            Happened::BoundMissed { .. } => EventKind::BoundMissed,
        }
    }
}
