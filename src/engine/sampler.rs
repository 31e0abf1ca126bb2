//! The sampler observes one master over a connection of its own: a PING every 50 ms, INFO every [`INFO_EVERY`]. It decides nothing.
//!
//! It cannot observe how busy other clients keep the main thread, since the sweep keeps it busy too: see
//! [`super::policy::foreground`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::engine::policy::observation::Observation;
use crate::model::shard::NodeAddr;
use crate::node::commands;
use crate::node::conn::{Conn, ConnOptions};
use crate::node::error::NodeError;

/// Tokio's timers fire up to this late on an idle machine.
const TIMER_TICK: Duration = Duration::from_millis(2);
/// How often the latency is probed.
const PING_EVERY: Duration = Duration::from_millis(50);
/// Each time after this many ticks INFO is read instead of a PING. INFO costs a server some 100 microseconds: a twentieth of a per
/// cent.
const TICKS_PER_INFO: u32 = 5;
/// A master that waits for its turn is observed only after this many ticks: once a second.
const TICKS_PER_SLOW_INFO: u32 = 4 * TICKS_PER_INFO;
/// How often INFO is read.
pub(crate) const INFO_EVERY: Duration = Duration::from_millis(50 * TICKS_PER_INFO as u64);
/// The latency is the mean of this many PINGs: 0.4 s. The mean and not the median, since one PING that waited for half a second says
/// more than seven that did not.
const PINGS: usize = 8;
/// After this long without an answer to INFO the observation is marked as blind.
const BLIND_AFTER: Duration = Duration::from_secs(3);

/// A running sampler. It ends when this handle is dropped.
#[derive(Debug)]
pub(crate) struct Sampler {
    seen: watch::Receiver<Observation>,
    slow: Arc<AtomicBool>,
    _stop: DropGuard,
}

impl Sampler {
    /// Starts sampling. `first`: what was observed when the sweep connected, so that there is an observation from the first batch on.
    /// While the server is unreachable the last observation stays in place, and after `BLIND_AFTER` it is marked as blind.
    pub(crate) fn start(addr: NodeAddr, options: ConnOptions, first: Observation) -> Self {
        let (sender, seen) = watch::channel(first);
        let stop = CancellationToken::new();
        let token = stop.clone();
        let slow = Arc::new(AtomicBool::new(false));
        let slowed = slow.clone();
        tokio::spawn(async move {
            let sampling =
                Sampling { slow: slowed, addr, options, sender, round_trips: VecDeque::with_capacity(PINGS) };
            token.run_until_cancelled(sampling.run()).await;
        });
        Self { seen, slow, _stop: stop.drop_guard() }
    }

    /// The newest observation, unless it was taken before.
    pub(crate) fn take_new(&mut self) -> Option<Observation> {
        // An error would mean that the sampler has ended, which happens only when this handle is dropped.
        self.seen.has_changed().unwrap_or(false).then(|| self.seen.borrow_and_update().clone())
    }

    /// Observes once a second only, while the master waits for its turn, or at the full rate again.
    pub(crate) fn slow_down(&self, slow: bool) {
        self.slow.store(slow, Ordering::Relaxed);
    }

    /// The mean round trip of the last `PINGS` PINGs.
    pub(crate) fn latency(&self) -> Option<Duration> {
        self.seen.borrow().latency
    }

    /// Waits for the next observation.
    pub(crate) async fn next(&mut self) -> Observation {
        if self.seen.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        self.seen.borrow_and_update().clone()
    }
}

struct Sampling {
    slow: Arc<AtomicBool>,
    addr: NodeAddr,
    options: ConnOptions,
    sender: watch::Sender<Observation>,
    round_trips: VecDeque<Duration>,
}

impl Sampling {
    /// Samples for ever, and reconnects as often as needed.
    async fn run(mut self) {
        let mut answered = Instant::now();
        loop {
            if let Err(error) = self.sample(&mut answered).await {
                tracing::debug!(addr = %self.addr, %error, "the sampler lost its connection");
                if answered.elapsed() > BLIND_AFTER {
                    let why = error.to_string();
                    self.sender.send_if_modified(|seen| seen.blind.replace(why.clone()) != Some(why));
                }
            }
            self.round_trips.clear();
            tokio::time::sleep(INFO_EVERY).await;
        }
    }

    async fn sample(&mut self, answered: &mut Instant) -> Result<(), NodeError> {
        let mut conn = Conn::open(&self.addr, &self.options).await?;
        let mut tick = tokio::time::interval(PING_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        for turn in 0_u32.. {
            // A timer that fires late shows how long this process waits for a processor: not part of the server's latency.
            let ours = tick.tick().await.elapsed().saturating_sub(TIMER_TICK);
            if self.slow.load(Ordering::Relaxed) && !turn.is_multiple_of(TICKS_PER_SLOW_INFO) {
                continue;
            }
            if turn.is_multiple_of(TICKS_PER_INFO) {
                let info = commands::info(&mut conn).await?;
                *answered = Instant::now();
                let latency = self.latency(None);
                self.sender.send_replace(Observation { latency, ..Observation::from_info(&info) });
            } else {
                self.probe(&mut conn, ours).await?;
            }
        }
        Ok(())
    }

    /// Sends one PING. Until it is answered its age counts as a round trip. `ours`: this process's own wait for a processor, which is
    /// subtracted.
    async fn probe(&mut self, conn: &mut Conn, ours: Duration) -> Result<(), NodeError> {
        let begun = Instant::now();
        let mut ping = std::pin::pin!(commands::ping(conn));
        loop {
            tokio::select! {
                biased;
                answer = &mut ping => {
                    answer?;
                    break;
                }
                () = tokio::time::sleep(PING_EVERY) => {
                    let latency = self.latency(Some(begun.elapsed().saturating_sub(ours)));
                    self.sender.send_modify(|seen| seen.latency = latency);
                }
            }
        }
        if self.round_trips.len() == PINGS {
            self.round_trips.pop_front();
        }
        self.round_trips.push_back(begun.elapsed().saturating_sub(ours));
        let latency = self.latency(None);
        // A small change does not wake the sweep.
        self.sender.send_if_modified(|seen| {
            let moved = moved(seen.latency, latency);
            if moved {
                seen.latency = latency;
            }
            moved
        });
        Ok(())
    }

    /// The mean of the last `PINGS`; missing ones count as zero, since the first few are no mean. `under_way`: the age of a PING
    /// without an answer.
    fn latency(&self, under_way: Option<Duration>) -> Option<Duration> {
        let known: Duration = self.round_trips.iter().chain(&under_way).sum();
        let any = !self.round_trips.is_empty() || under_way.is_some();
        any.then(|| known / u32::try_from(PINGS).unwrap_or(1))
    }
}

/// Whether two latencies differ by more than a quarter and by more than a millisecond, which a limit could notice.
fn moved(before: Option<Duration>, now: Option<Duration>) -> bool {
    match (before, now) {
        (Some(before), Some(now)) => {
            let (less, more) = (before.min(now), before.max(now));
            more > less + less / 4 + Duration::from_millis(1)
        }
        (before, now) => before.is_some() != now.is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_changes_of_the_latency_wake_nobody() {
        let us = |us| Some(Duration::from_micros(us));
        assert!(!moved(us(50), us(900)) && moved(us(50), us(1100)) && moved(us(9000), us(50)) && moved(None, us(1)));
    }
}
