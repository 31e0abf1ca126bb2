//! Signals of the daemon: the first INT or TERM stops it in order, the second cuts; HUP reads the settings again.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit status of a daemon that was cut: 128 + SIGINT, as shells show it.
const CUT: i32 = 130;

/// Signals that are listened to. One that comes before anybody obeys waits until then.
#[derive(Debug)]
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    /// Listens from now on.
    ///
    /// # Errors
    /// Where that cannot be done.
    pub fn listen() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Obeys until the process ends.
    pub async fn obey(mut self, stop: CancellationToken, on_hangup: impl Fn() + Send) {
        loop {
            tokio::select! {
                _ = self.interrupt.recv() => {}
                _ = self.terminate.recv() => {}
                _ = self.hangup.recv() => {
                    on_hangup();
                    continue;
                }
            }
            if stop.is_cancelled() {
                tracing::warn!("cut by a second signal");
                std::process::exit(CUT);
            }
            // First the deed, then the words: nothing that can go wrong with a log may keep the daemon from stopping.
            stop.cancel();
            tracing::info!("stopping: running sweeps end their batch and keep their checkpoint; once more to cut");
        }
    }
}
