//! `ttlsweep serve`: the daemon.

use std::path::PathBuf;

use clap::Args;

use crate::cli::exit::Exit;
use crate::cli::{output, scan};
use crate::daemon;

/// `ttlsweep serve`
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Settings file (TOML); check it with `ttlsweep settings check FILE`
    #[arg(long, env = "TTLSWEEP_CONFIG", value_name = "FILE")]
    pub config: PathBuf,
}

/// Runs the daemon until a signal.
///
/// # Errors
/// Where it cannot start.
pub async fn run(args: ServeArgs) -> anyhow::Result<Exit> {
    let settings = match daemon::load(&args.config) {
        Ok(settings) => settings,
        Err(problems) => return Ok(scan::usage(&problems)),
    };
    let scheme = if settings.api.tls.is_some() { "https" } else { "http" };
    daemon::run(args.config, settings, |address| {
        // Scripts wait for this line; whoever closed stdout does not.
        let _ = output::print(&format!("listening on {scheme}://{address}\n"));
    })
    .await?;
    Ok(Exit::Done)
}
