//! Why a task or a shard ended without success, in words that an operator can act on.

use std::fmt;

use crate::model::words::words;

/// The kind of a failure: decides the exit code and the error code of the contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FailureKind {
    /// No connection could be made, or it was lost for longer than we retry.
    CannotConnect,
    /// The user or password is wrong, or missing where the server wants one.
    NotAuthenticated,
    /// The user lacks a right that the sweep needs.
    NotAllowed,
    /// The server is a replica.
    NotAMaster,
    /// The server cannot be scanned: too old, or no Redis at all.
    Unsupported,
    /// A DB that was named does not exist.
    NoSuchDb,
    /// The time that the task was allowed is over.
    TimedOut,
    /// The process was asked to end.
    Interrupted,
    /// The load was above a hard limit.
    LimitPassed,
    /// The sweep would be, or was, so slow that it slows the server's own expiry by more than it reclaims.
    TooSlow,
    /// Masters or slots moved faster than they could be swept.
    TopologyChanged,
    /// A reply that no server of this protocol should give.
    Protocol,
    /// The records could not be written.
    Store,
}

words!(
    FailureKind,
    "failure kind",
    CannotConnect = "cannot_connect",
    NotAuthenticated = "not_authenticated",
    NotAllowed = "not_allowed",
    NotAMaster = "not_a_master",
    Unsupported = "unsupported",
    NoSuchDb = "no_such_db",
    TimedOut = "timed_out",
    Interrupted = "interrupted",
    LimitPassed = "limit_passed",
    TooSlow = "too_slow",
    TopologyChanged = "topology_changed",
    Protocol = "protocol",
    Store = "store",
);

/// What went wrong and what to do about it. Holds no secret and no key name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Decides the exit code, and the error code of the contract.
    pub kind: FailureKind,
    /// What happened and why, without a full stop.
    pub message: String,
    /// What the operator can do next; `None`: there is no advice.
    pub hint: Option<String>,
}

impl Failure {
    /// A failure without a hint.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None }
    }

    /// Sets the hint, in place of an earlier one.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
