//! Whether a sweep under the idle policy of Linux gets any processor time.

use std::time::Duration;

use crate::cli::output::note;

/// How often we look whether the sweep gets any time.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// It gets none where it waits this many times as long as it runs, and at least half of the time.
const STARVED: u32 = 9;
/// It gets it too late where a thread waits as long as this for its turn, on the mean.
const LATE: Duration = Duration::from_millis(2);

/// Under the idle policy a machine that is never idle gives a sweep nothing, and then its PINGs look slow as if that were
/// the server's doing. Says so once.
pub fn say() {
    let Some(mut last) = processor_time() else { return };
    loop {
        std::thread::sleep(LOOK_EVERY);
        let Some(now) = processor_time() else { return };
        let (ran, waited) = (now.ran.saturating_sub(last.ran), now.waited.saturating_sub(last.waited));
        let turns = u32::try_from(now.turns.saturating_sub(last.turns)).unwrap_or(u32::MAX);
        last = now;
        let none = waited > LOOK_EVERY / 2 && waited > ran * STARVED;
        let late = waited > LOOK_EVERY / 10 && waited > LATE * turns;
        if none || late {
            note(
                "warning: this machine has no processor time to spare, so the sweep stands still most of the time, or comes late \
                 and reads far fewer keys than it could (leave out --priority idle)",
            );
            return;
        }
    }
}

/// What the threads of this process have had.
#[derive(Clone, Copy, Default)]
struct Had {
    ran: Duration,
    /// For a processor.
    waited: Duration,
    turns: u64,
}

fn processor_time() -> Option<Had> {
    let mut sum = Had::default();
    for task in std::fs::read_dir("/proc/self/task").ok()? {
        // A thread may end while we look. The file's numbers are nanoseconds run, nanoseconds waited, and turns.
        let Ok(text) = std::fs::read_to_string(task.ok()?.path().join("schedstat")) else { continue };
        let mut numbers = text.split_whitespace().map(|number| number.parse::<u64>().ok());
        sum.ran += Duration::from_nanos(numbers.next()??);
        sum.waited += Duration::from_nanos(numbers.next()??);
        sum.turns += numbers.next()??;
    }
    Some(sum)
}
