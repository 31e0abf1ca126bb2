//! The CPU priority of this process. Its machine may be the server's as well.
//!
//! Time to sweep 500,000 keys beside spinning processes, on two processors that the server shares, as a multiple of `normal`: nice 5
//! took 1.0 beside one of them and 1.0 to 1.7 beside two, nice 10 up to 5.0, nice 19 and the idle policy over 30. So `low` is nice 5.

use clap::ValueEnum;

#[cfg(target_os = "linux")]
use crate::cli::starved;

/// What `low` adds to the nice value.
#[cfg(target_os = "linux")]
const LOW: i32 = 5;

/// How this process competes when processors are short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Priority {
    /// Run only where a processor has nothing else to do; on a machine that is never idle the sweep stands still
    Idle,
    /// Give others the larger share: a nice value of 5
    Low,
    /// Compete like any other program
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
            match self {
                Self::Normal => {}
                Self::Low => {
                    let _ = rustix::process::nice(LOW);
                }
                Self::Idle => {
                    // Before: what it starts keeps the priority that we have.
                    if !quiet {
                        let _ = std::thread::Builder::new().name("starved?".to_owned()).spawn(starved::say);
                    }
                    let policy = ThreadSchedulePolicy::Normal(Policy::Idle);
                    let _ = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, policy);
                }
            }
        }
    }
}
