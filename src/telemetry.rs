//! What the program logs about itself, on stderr: lines for people, or one JSON object a line for what collects logs of
//! containers. No secret and no key name is in any of them, at any level.
//!
//! Set up once, by `cli`, before anything else runs. Figures are in `metrics`, not here.

use std::io::{self, IsTerminal};

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// The environment variable whose filter takes the place of the level: `debug`, or `ttlsweep::engine=trace`.
pub const FILTER: &str = "TTLSWEEP_LOG";

/// How a line of the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line: `timestamp`, `level`, `message`, `target`, and the facts beside them.
    Json,
}

/// Begins to log. `verbose`: 0 for nothing, 1 for what an operator wants to know, 2 for more.
pub fn init(verbose: u8, format: LogFormat) {
    let level = match verbose {
        0 => "off",
        1 => "ttlsweep=info",
        _ => "ttlsweep=debug",
    };
    let (filter, wrong) = match std::env::var(FILTER).map(EnvFilter::try_new) {
        Ok(Ok(filter)) => (filter, None),
        Ok(Err(error)) => (EnvFilter::new(level), Some(error)),
        Err(_) => (EnvFilter::new(level), None),
    };
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        // It would say so on the same stderr, and panic where that cannot be written either: a full disk.
        .log_internal_errors(false);
    match format {
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).init(),
        LogFormat::Json => {
            lines.json().flatten_event(true).with_current_span(false).with_span_list(false).init();
            // Without this a panic is several lines of text among the objects.
            std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "the program broke")));
        }
    }
    if let Some(error) = wrong {
        tracing::warn!(%error, "{FILTER} is no filter such as debug or ttlsweep::engine=trace");
    }
}
