//! The CPU priority of this process, which may run on the server's machine.
//!
//! Measured on two processors shared with the server, beside busy-looping processes: the time to sweep 500,000 keys as a multiple of
//! `normal` was 1.0 with nice 5 beside one of them and 1.0 to 1.7 beside two, up to 5.0 with nice 10, and over 30 with nice 19 and the
//! idle policy. So `low` is nice 5.

use clap::ValueEnum;

#[cfg(target_os = "linux")]
use crate::cli::starved;

/// The nice value that `low` adds.
#[cfg(target_os = "linux")]
const LOW: i32 = 5;

/// How this process competes for processors with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Priority {
    /// Run only on processors that are otherwise idle; on a machine that is never idle the sweep does not advance
    Idle,
    /// Leave other programs the larger share: a nice value of 5
    Low,
    /// Compete like any other program
    Normal,
}

impl Priority {
    /// Sets the priority of this thread and of those that it starts later. Where the system does not allow it or has no such thing,
    /// the sweep runs at normal priority.
    /// `quiet`: do not warn when `idle` gets no processor time.
    pub(super) fn apply(self, quiet: bool) {
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
                    // Before the change, so that the watching thread keeps normal priority.
                    if !quiet {
                        let _ = std::thread::Builder::new().name("starved?".to_owned()).spawn(starved::warn_once);
                    }
                    let policy = ThreadSchedulePolicy::Normal(Policy::Idle);
                    let _ = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, policy);
                }
            }
        }
    }
}
