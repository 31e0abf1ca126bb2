//! Sleeps that are shorter than a millisecond. Tokio's timers tick in milliseconds; batches are spaced by some 50 microseconds.

use tokio::time::Instant;

/// A kernel timer where there is one, made at the first use and kept.
#[derive(Debug, Default)]
pub(super) struct Timer {
    #[cfg(target_os = "linux")]
    kernel: Option<tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>>,
}

impl Timer {
    /// Completes at `at`, or up to a millisecond later if the kernel timer cannot be used. May be dropped half-way and called again.
    pub(super) async fn until(&mut self, at: Instant) {
        #[cfg(target_os = "linux")]
        if self.by_kernel(at).await.is_ok() {
            return;
        }
        tokio::time::sleep_until(at).await;
    }

    #[cfg(target_os = "linux")]
    async fn by_kernel(&mut self, at: Instant) -> std::io::Result<()> {
        use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
        use tokio::io::Interest;
        use tokio::io::unix::AsyncFd;

        let left = at.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        let timer = match self.kernel.take() {
            Some(timer) => timer,
            None => {
                let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
                let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
                #[allow(
                    deprecated,
                    reason = "its successor is unsafe, for types that close their descriptor early; this one owns it"
                )]
                AsyncFd::with_interest(timer, Interest::READABLE)?
            }
        };
        let timer = self.kernel.insert(timer);
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value =
            Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() };
        let once = Itimerspec { it_interval: zero, it_value: value };
        rustix::time::timerfd_settime(&*timer, TimerfdTimerFlags::empty(), &once)?;
        let expired = |fd: &std::os::fd::OwnedFd| Ok(rustix::io::read(fd, &mut [0_u8; 8])?);
        timer.async_io(Interest::READABLE, expired).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn the_timer_never_fires_early_and_may_be_dropped_half_way() {
        let mut timer = Timer::default();
        for micros in [0, 1, 50, 300, 50, 2_000] {
            let begun = Instant::now();
            let cut = Duration::from_millis(1);
            let _ = tokio::time::timeout(cut, timer.until(begun + Duration::from_secs(60))).await;
            let begun = Instant::now();
            let sleep = Duration::from_micros(micros);
            timer.until(begun + sleep).await;
            assert!(begun.elapsed() >= sleep, "{:?} of {sleep:?}", begun.elapsed());
        }
    }
}
