//! The exit codes of the process.

use std::process::ExitCode;

use crate::model::failure::{Failure, FailureKind};
use crate::model::task::TaskState;

/// Documented and stable exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The command did all that was asked.
    Done = 0,
    /// The command failed, or did only a part.
    Failed = 1,
    /// The arguments or the settings are invalid.
    Usage = 2,
    /// No connection, no right, or a server that cannot be swept; nothing was swept.
    NoAccess = 3,
    /// The time allowed (`timeout`) ran out.
    TimedOut = 4,
    /// A signal stopped the command.
    Interrupted = 130,
}

/// The exit codes as `--help` shows them.
pub const HELP: &str = "\
Exit codes:
  0    done
  1    failed, or only partly done
  2    invalid arguments or settings
  3    cannot connect, no right, or a server that cannot be swept
  4    timed out
  130  interrupted by a signal";

impl Exit {
    /// The exit code of a failure. `met`: whether a server had answered INFO before it. `swept`: whether a batch was done before it.
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
            // The first reply was no RESP: the port is another program's. An invalid reply later on is a failure of the server.
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

    /// The exit code of a task that has ended, for the command that ran or followed it. `met` and `swept` as in [`Exit::of`].
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
