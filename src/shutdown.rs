//! Signals of the daemon: the first SIGINT or SIGTERM stops it in order, the second one at once; SIGHUP reloads the settings.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit status after a second signal: 128 + SIGINT, as shells show it.
const INTERRUPTED: i32 = 130;

/// The signal handlers of the daemon. A signal that arrives before [`Self::obey`] runs is kept for it.
#[derive(Debug)]
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    /// Installs the handlers.
    ///
    /// # Errors
    /// If a handler cannot be installed.
    pub(crate) fn listen() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Handles signals until the process ends: cancels `stop` or calls `on_hangup`.
    pub(crate) async fn obey(mut self, stop: CancellationToken, on_hangup: impl Fn() + Send) {
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
                tracing::warn!("stopped at once by a second signal");
                std::process::exit(INTERRUPTED);
            }
            // Before the log line: a log that blocks must not keep the daemon from stopping.
            stop.cancel();
            tracing::info!(
                "stopping: running sweeps end their batch and write their checkpoint; a second signal stops at once"
            );
        }
    }
}
