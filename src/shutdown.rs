//! Signals of the daemon: the first INT or TERM stops it in order, the second cuts; HUP reads the settings again.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit status of a daemon that was cut: 128 + SIGINT, as shells show it.
const CUT: i32 = 130;

/// Obeys signals until the process ends.
///
/// # Errors
/// Where the signals cannot be listened to.
pub fn obey_signals(stop: CancellationToken, on_hangup: impl Fn() + Send + 'static) -> std::io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {
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
    });
    Ok(())
}
