//! Warns when a sweep under the idle policy of Linux gets no processor time.

use std::time::Duration;

use crate::cli::output::note;

/// Time between two samples of the processor time.
const SAMPLE_EVERY: Duration = Duration::from_secs(5);
/// The sweep is starved if it waits for a processor this many times as long as it runs, and at least half of the time.
const STARVED: u32 = 9;
/// The sweep is late if a thread waits this long for a processor, on average.
const LATE: Duration = Duration::from_millis(2);

/// Watches the processor time of this process and prints one warning if it is starved or late: its PINGs then look slow as if the
/// server were. Returns after the warning, or where the kernel tells no times.
pub(super) fn warn_once() {
    let Some(mut last) = processor_time() else { return };
    loop {
        std::thread::sleep(SAMPLE_EVERY);
        let Some(now) = processor_time() else { return };
        let (ran, waited) = (now.ran.saturating_sub(last.ran), now.waited.saturating_sub(last.waited));
        let turns = u32::try_from(now.turns.saturating_sub(last.turns)).unwrap_or(u32::MAX);
        last = now;
        let none = waited > SAMPLE_EVERY / 2 && waited > ran * STARVED;
        let late = waited > SAMPLE_EVERY / 10 && waited > LATE * turns;
        if none || late {
            note(
                "warning: this machine has no processor time to spare, so the sweep hardly advances, or far more slowly than it could \
                 (leave out --priority idle)",
            );
            return;
        }
    }
}

/// Processor time of all threads of this process since they began.
#[derive(Clone, Copy, Default)]
struct ProcessorTime {
    ran: Duration,
    /// Time in which a thread was runnable and had no processor.
    waited: Duration,
    turns: u64,
}

/// Reads the scheduler's times; `None` where the kernel does not provide them.
fn processor_time() -> Option<ProcessorTime> {
    let mut sum = ProcessorTime::default();
    for task in std::fs::read_dir("/proc/self/task").ok()? {
        // A thread may have ended meanwhile. The numbers are nanoseconds run, nanoseconds waited, and turns.
        let Ok(text) = std::fs::read_to_string(task.ok()?.path().join("schedstat")) else { continue };
        let mut numbers = text.split_whitespace().map(|number| number.parse::<u64>().ok());
        sum.ran += Duration::from_nanos(numbers.next()??);
        sum.waited += Duration::from_nanos(numbers.next()??);
        sum.turns += numbers.next()??;
    }
    Some(sum)
}
