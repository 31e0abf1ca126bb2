//! At what priority a sweep runs on its own machine, which may be the server's as well.

use clap::ValueEnum;

#[cfg(target_os = "linux")]
use crate::cli::starved;

/// Who comes first when processors are short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Priority {
    /// Everybody else: the sweep runs where a processor has nothing else to do, and steps aside at once
    Idle,
    /// Mostly everybody else: the sweep has a nice value of 19, and gets a little time on a machine that is never idle
    Low,
    /// Nobody
    Normal,
}

impl Priority {
    /// Gives this thread, and each that it starts from now on, the priority. Where that is not allowed, or there is no such
    /// thing, the sweep runs like any other program.
    /// `quiet`: nothing is to be said about what that means.
    pub fn apply(self, quiet: bool) {
        #[cfg(target_os = "linux")]
        {
            use thread_priority::{
                NormalThreadSchedulePolicy as Policy, ThreadPriority, ThreadSchedulePolicy,
                set_thread_priority_and_policy, thread_native_id,
            };
            let policy = match self {
                Self::Idle => Policy::Idle,
                Self::Low => Policy::Other,
                Self::Normal => return,
            };
            // Before: what it starts keeps the priority that we have.
            if self == Self::Idle && !quiet {
                let _ = std::thread::Builder::new().name("starved?".to_owned()).spawn(starved::say);
            }
            let policy = ThreadSchedulePolicy::Normal(policy);
            let _ = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, policy);
        }
    }
}
