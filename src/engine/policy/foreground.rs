//! The load that other clients put on a master.

use std::time::Duration;

use tokio::time::Instant;

use crate::settings::Tuning;

/// How often the sweep pauses to measure the load of other clients: with [`MEASURE_FOR`], a fiftieth of its time.
pub(crate) const MEASURE_EVERY: Duration = Duration::from_secs(1);
/// How long it pauses for that.
pub(crate) const MEASURE_FOR: Duration = Duration::from_millis(20);
/// The weight of a new measurement against those before: larger where the load has risen, so that the sweep gives way
/// at once and comes back slowly.
const WEIGHT: (f64, f64) = (0.7, 0.3);

/// The load of other clients, by measurements for which the sweep pauses.
#[derive(Debug, Default)]
pub(crate) struct Foreground {
    /// Share of the main thread's time that they take, from 0 to 1, smoothed; `None`: unknown.
    pub cpu: Option<f64>,
    /// Their commands per second, smoothed; `None`: unknown.
    pub ops: Option<u64>,
    measured: Option<Instant>,
}

impl Foreground {
    /// Whether it is time to measure again. Never where nothing depends on it.
    pub(crate) fn measurement_is_due(&self, tuning: &Tuning) -> bool {
        tuning.depends_on_others() && self.measured.is_none_or(|measured| measured.elapsed() >= MEASURE_EVERY)
    }

    /// Adds a measurement: the share of the main thread (0 to 1) and the commands per second of other clients; `None`: unknown.
    pub(crate) fn learn(&mut self, cpu: Option<f64>, ops: Option<u64>) {
        let smooth = |before: Option<f64>, now: f64| match before {
            Some(before) => before + (now - before) * if now > before { WEIGHT.0 } else { WEIGHT.1 },
            None => now,
        };
        self.cpu = cpu.map(|now| smooth(self.cpu, now));
        self.ops = ops.map(|now| smooth(self.ops.map(|ops| ops as f64), now as f64) as u64);
        self.measured = Some(Instant::now());
    }
}

/// The share of a time span in which a thread worked, by its CPU time before and after.
pub(crate) fn busy_share(before: Option<Duration>, after: Option<Duration>, span: Duration) -> Option<f64> {
    let worked = after?.checked_sub(before?)?;
    (!span.is_zero()).then(|| (worked.as_secs_f64() / span.as_secs_f64()).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_worked_a_quarter_of_the_time_is_a_quarter_busy() {
        let ms = Duration::from_millis;
        assert_eq!(busy_share(Some(ms(100)), Some(ms(105)), ms(20)), Some(0.25));
        assert_eq!(busy_share(None, Some(ms(105)), ms(20)), None);
        assert_eq!(busy_share(Some(ms(105)), Some(ms(5)), ms(20)), None, "another process");
    }

    #[tokio::test(start_paused = true)]
    async fn the_sweep_gives_way_at_once_and_comes_back_slowly() {
        let mut others = Foreground::default();
        let mut seen = Vec::new();
        for cpu in [0.0, 1.0, 0.0] {
            others.learn(Some(cpu), Some(0));
            seen.push(others.cpu.unwrap());
        }
        assert!((seen[1] - 0.7).abs() < 1e-9 && (seen[2] - 0.49).abs() < 1e-9, "{seen:?}");
    }
}
