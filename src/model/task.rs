//! A task: one sweep or keep run of one instance, its states, and what changes them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use std::time::Duration;

use jiff::Timestamp;
use uuid::{ContextV7, Uuid};

use crate::model::bounds::BOUND_KEYS;
use crate::model::failure::Failure;
use crate::model::words::words;

/// The id of a task, a UUID of version 7: ids sort by time of creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskId(pub Uuid);

impl TaskId {
    /// A new id, which sorts behind all ids that this process made at this time or before.
    pub fn at(now: Timestamp) -> Self {
        static CONTEXT: Mutex<ContextV7> = Mutex::new(ContextV7::new());
        let seconds = u64::try_from(now.as_second()).unwrap_or(0);
        let nanos = u32::try_from(now.subsec_nanosecond()).unwrap_or(0);
        Self(Uuid::new_v7(uuid::Timestamp::from_unix(&CONTEXT, seconds, nanos)))
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What asked for a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// A person at the command line.
    Cli,
    /// A call of the API.
    Api,
    /// A schedule, at a due time.
    Schedule,
    /// The bounds of an instance that is kept.
    Keep,
}

words!(Cause, "cause", Cli = "cli", Api = "api", Schedule = "schedule", Keep = "keep");

/// The state of a task, as it is stored. Being throttled or outside a window is a live condition of `Running`, not a
/// state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TaskState {
    /// Recorded; no batch was sent yet.
    Waiting,
    /// Sweeping, or held for a reason.
    Running,
    /// A person paused it; only a person lets it go on.
    Paused,
    /// The process ended before the task; the task can go on from its checkpoint.
    Interrupted,
    /// Every pass of every shard is complete.
    Succeeded,
    /// Ended with a failure; what was reclaimed before stays counted.
    Failed,
    /// A person ended it; what was reclaimed before stays counted.
    Cancelled,
}

words!(
    TaskState,
    "task state",
    Waiting = "waiting",
    Running = "running",
    Paused = "paused",
    Interrupted = "interrupted",
    Succeeded = "succeeded",
    Failed = "failed",
    Cancelled = "cancelled",
);

impl TaskState {
    /// Whether the task has ended.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// The contract's four words: `waiting`, `running`, `success`, `failed`.
    pub fn contract_word(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Running | Self::Paused | Self::Interrupted => "running",
            Self::Succeeded => "success",
            Self::Failed | Self::Cancelled => "failed",
        }
    }
}

/// What changes the state of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// The first batch may be sent, now or again after an interruption.
    Start,
    /// A person pauses the task.
    Pause,
    /// A person lets a paused task go on.
    Resume,
    /// A person lets a paused task go on that no process has: the process that takes it up next starts it.
    Requeue,
    /// The process ends before the task, whose checkpoint stays.
    Interrupt,
    /// Every pass of every shard is complete.
    Succeed,
    /// A keep run ends, whether it had begun or not: for another task of its instance, or for the next run.
    GiveWay,
    /// The task cannot go on.
    Fail,
    /// A person cancels the task.
    Cancel,
    /// A person lets a failed task go on from its checkpoint.
    Retry,
}

impl Command {
    /// Every command, so that tests can check the whole table of transitions.
    pub const ALL: &'static [Self] = &[
        Self::Start,
        Self::Pause,
        Self::Resume,
        Self::Requeue,
        Self::Interrupt,
        Self::Succeed,
        Self::GiveWay,
        Self::Fail,
        Self::Cancel,
        Self::Retry,
    ];
}

/// A command that the task's state does not take.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a task that is {state} cannot take the command {command:?}")]
pub struct IllegalTransition {
    /// The state of the task.
    pub state: TaskState,
    /// The command that was refused.
    pub command: Command,
}

/// The one transition function: the state after a command. [`Task::apply`] changes a task.
///
/// # Errors
/// [`IllegalTransition`] where the table has no cell.
pub fn transition(state: TaskState, command: Command) -> Result<TaskState, IllegalTransition> {
    use Command as C;
    use TaskState as S;
    match (state, command) {
        (S::Waiting | S::Interrupted, C::Start) => Ok(S::Running),
        (S::Waiting | S::Running | S::Interrupted, C::Pause) => Ok(S::Paused),
        (S::Paused, C::Resume) => Ok(S::Running),
        (S::Paused, C::Requeue) => Ok(S::Interrupted),
        (S::Waiting | S::Running, C::Interrupt) => Ok(S::Interrupted),
        (S::Running, C::Succeed) => Ok(S::Succeeded),
        (S::Waiting | S::Running | S::Interrupted, C::GiveWay) => Ok(S::Succeeded),
        (S::Waiting | S::Running | S::Paused | S::Interrupted, C::Fail) => Ok(S::Failed),
        (S::Waiting | S::Running | S::Paused | S::Interrupted, C::Cancel) => Ok(S::Cancelled),
        (S::Failed, C::Retry) => Ok(S::Interrupted),
        (state, command) => Err(IllegalTransition { state, command }),
    }
}

/// How a task sweeps: the settings as text by key, complete enough to make them again.
pub type SweepTexts = BTreeMap<String, String>;

/// A task as it is recorded.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    /// Set when the task is created; never changes.
    pub id: TaskId,
    /// Id of the instance that it sweeps.
    pub instance_id: String,
    /// The project of the instance; empty for a sweep from the command line.
    pub project_id: String,
    /// The instance's address, without any secret.
    pub target: String,
    /// The settings that it uses.
    pub sweep: SweepTexts,
    /// Whether it sweeps only while the instance's window is open.
    pub respect_window: bool,
    /// What asked for the task.
    pub cause: Cause,
    /// Its state; changed by [`Task::apply`] only.
    pub state: TaskState,
    /// When it was recorded, which may be long before it sweeps.
    pub created_at: Timestamp,
    /// When it first began to sweep.
    pub started_at: Option<Timestamp>,
    /// When it reached a final state.
    pub finished_at: Option<Timestamp>,
    /// Expired keys that it has reclaimed.
    pub num: u64,
    /// How much of its time budget it has used: the time that a person or a window held it does not count.
    pub spent: Duration,
    /// Why it failed or was interrupted.
    pub failure: Option<Failure>,
    /// What an operator should know about its end beside a failure.
    pub note: Option<String>,
    /// The daemon that sweeps it, where several share the records; `None`: no daemon.
    pub owner: Option<String>,
    /// The fencing number: raised whenever the owner changes, so that a late write of an earlier owner is void.
    pub fence: u64,
    /// The label that a daemon needs to claim it; empty: each daemon may.
    pub place: String,
}

impl Task {
    /// Carries a command out: the only change of the state, and of the times that go with it.
    ///
    /// # Errors
    /// [`IllegalTransition`] where the state does not take the command; then nothing has changed.
    pub fn apply(&mut self, command: Command, now: Timestamp) -> Result<(), IllegalTransition> {
        self.state = transition(self.state, command)?;
        match command {
            Command::Start => {
                self.started_at = self.started_at.or(Some(now));
                (self.failure, self.finished_at) = (None, None);
            }
            Command::Resume => self.started_at = self.started_at.or(Some(now)),
            Command::Succeed | Command::GiveWay | Command::Fail | Command::Cancel => self.finished_at = Some(now),
            Command::Retry => self.finished_at = None,
            Command::Pause | Command::Requeue | Command::Interrupt => {}
        }
        Ok(())
    }

    /// Whether it is a keep run, which does not end by itself.
    pub fn keeps(&self) -> bool {
        BOUND_KEYS.iter().any(|key| self.sweep.get(*key).is_some_and(|text| text != "off"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_transition_table() {
        let mut table = format!("{:<12}", "");
        for command in Command::ALL {
            table.push_str(&format!("{:<12}", format!("{command:?}")));
        }
        for &state in TaskState::ALL {
            table.push_str(&format!("\n{:<12}", state.as_str()));
            for &command in Command::ALL {
                let cell = transition(state, command).map_or("-", TaskState::as_str);
                table.push_str(&format!("{cell:<12}"));
            }
        }
        let table: Vec<&str> = table.lines().map(str::trim_end).collect();
        insta::assert_snapshot!(table.join("\n"));
    }

    #[test]
    fn a_command_sets_the_times_of_its_state() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let task = |state| Task {
            id: TaskId(Uuid::nil()),
            instance_id: "a".into(),
            project_id: String::new(),
            target: "redis://h".into(),
            sweep: SweepTexts::new(),
            respect_window: false,
            cause: Cause::Api,
            state,
            created_at: at(0),
            started_at: None,
            finished_at: None,
            num: 0,
            spent: Duration::ZERO,
            failure: None,
            note: None,
            owner: None,
            fence: 0,
            place: String::new(),
        };
        let seconds = |task: &Task| {
            let second = |time: Option<Timestamp>| time.map_or("-".to_owned(), |time| time.as_second().to_string());
            format!("{:<12} started {:<3} finished {}", task.state, second(task.started_at), second(task.finished_at))
        };
        let mut shown = Vec::new();
        for commands in [
            &[Command::Start, Command::Interrupt, Command::Start, Command::Fail, Command::Retry, Command::Start][..],
            &[Command::Pause, Command::Resume, Command::Succeed],
            &[Command::Pause, Command::Requeue, Command::GiveWay],
            &[Command::Interrupt, Command::Cancel, Command::Cancel],
        ] {
            let mut task = task(TaskState::Waiting);
            for (second, command) in (1..).zip(commands) {
                let done = task.apply(*command, at(second)).map_or("refused", |()| "");
                shown.push(
                    format!("{second} {:<10}{} {done}", format!("{command:?}"), seconds(&task)).trim_end().to_owned(),
                );
            }
            shown.push(String::new());
        }
        insta::assert_snapshot!(shown.join("\n"));
    }

    #[test]
    fn a_final_state_takes_no_command_but_to_try_again_what_failed() {
        for &state in TaskState::ALL.iter().filter(|s| s.is_final()) {
            for &command in Command::ALL.iter().filter(|c| (state, **c) != (TaskState::Failed, Command::Retry)) {
                assert_eq!(transition(state, command), Err(IllegalTransition { state, command }));
            }
        }
    }

    #[test]
    fn every_state_survives_its_word() {
        for &state in TaskState::ALL {
            assert_eq!(state.as_str().parse::<TaskState>().unwrap(), state);
        }
    }

    #[test]
    fn ids_sort_by_time() {
        let now = Timestamp::now();
        let (first, second) = (TaskId::at(now), TaskId::at(now));
        let later = TaskId::at(now + jiff::SignedDuration::from_millis(5));
        assert!(first < second && second < later);
    }
}
