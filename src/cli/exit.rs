//! How the process ends.

use std::process::ExitCode;

use crate::model::failure::{Failure, FailureKind};
use crate::model::task::TaskState;

/// Documented and stable exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Everything was done.
    Done = 0,
    /// Failed, or only a part was done.
    Failed = 1,
    /// Wrong usage or settings.
    Usage = 2,
    /// No connection, not allowed, or no server that can be swept: nothing was.
    NoAccess = 3,
    /// The time allowed was over.
    TimedOut = 4,
    /// Ended by a signal.
    Interrupted = 130,
}

/// The codes as the help shows them.
pub const HELP: &str = "\
Exit codes:
  0    done
  1    failed, or only a part was done
  2    wrong usage or settings
  3    cannot connect, not allowed, or no server that can be swept
  4    the time allowed was over
  130  interrupted";

impl Exit {
    /// The code of a failure. `met`: whether a server had said who it is before. `swept`: whether a batch was done.
    pub fn of(failure: &Failure, met: bool, swept: bool) -> Self {
        match failure.kind {
            FailureKind::CannotConnect
            | FailureKind::NotAuthenticated
            | FailureKind::NotAllowed
            | FailureKind::NotAMaster
            | FailureKind::Unsupported
                if !swept =>
            {
                Self::NoAccess
            }
            // Another program's port. A server that answers nonsense later on is none.
            FailureKind::Protocol if !met => Self::NoAccess,
            FailureKind::NoSuchDb => Self::Usage,
            FailureKind::TimedOut => Self::TimedOut,
            FailureKind::Interrupted => Self::Interrupted,
            FailureKind::NotAMaster
            | FailureKind::Unsupported
            | FailureKind::LimitPassed
            | FailureKind::TooSlow
            | FailureKind::TopologyChanged
            | FailureKind::CannotConnect
            | FailureKind::NotAuthenticated
            | FailureKind::NotAllowed
            | FailureKind::Protocol
            | FailureKind::Store => Self::Failed,
        }
    }

    /// The code of a task that has ended, for the command that ran or followed it. `met` and `swept` as in [`Exit::of`].
    pub fn of_task(state: Option<TaskState>, failure: Option<&Failure>, met: bool, swept: bool) -> Self {
        match (failure, state) {
            (Some(failure), _) => Self::of(failure, met, swept),
            (None, Some(TaskState::Succeeded)) => Self::Done,
            (None, _) => Self::Failed,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_has_its_code() {
        let table: Vec<_> = FailureKind::ALL
            .iter()
            .map(|&kind| {
                let failure = Failure::new(kind, "");
                let code = |met, swept| Exit::of(&failure, met, swept) as u8;
                let codes = [code(false, false), code(true, false), code(true, true)];
                format!(
                    "{kind:<18} {:>3} before, {:>3} once a server was met, {:>3} once it was swept",
                    codes[0], codes[1], codes[2]
                )
            })
            .collect();
        insta::assert_snapshot!(table.join("\n"));
    }
}
