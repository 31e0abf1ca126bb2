//! `ttlsweep serve`: runs the daemon until a signal stops it.

use std::path::PathBuf;

use clap::Args;

use crate::cli::exit::Exit;
use crate::cli::{output, scan};
use crate::daemon;
use crate::store::StoreError;
use crate::telemetry::LogFormat;

/// `ttlsweep serve`
#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// Settings file (TOML); check it with `ttlsweep settings check FILE`
    #[arg(long, env = "TTLSWEEP_CONFIG", value_name = "FILE")]
    pub config: PathBuf,

    /// Name of this daemon among those that share its database; default: [daemon] name of the settings, else the host name
    #[arg(long, env = "TTLSWEEP_DAEMON_NAME", value_name = "NAME")]
    pub name: Option<String>,

    /// Label of what this daemon's network reaches, in place of [daemon] labels; repeat it or separate several by commas
    #[arg(long = "label", env = "TTLSWEEP_LABELS", value_delimiter = ',', value_name = "LABEL")]
    pub labels: Vec<String>,

    /// Format of the log on stderr; with json nothing is printed on stdout
    #[arg(long, env = "TTLSWEEP_LOG_FORMAT", value_enum, default_value_t, value_name = "FORMAT")]
    pub log_format: LogFormat,
}

/// Runs the daemon until a signal stops it.
///
/// # Errors
/// If it cannot start and the log is text; with JSON the error is logged here instead.
pub(super) async fn run(args: ServeArgs) -> anyhow::Result<Exit> {
    let json = args.log_format == LogFormat::Json;
    let identity = daemon::Identity { name: args.name, labels: args.labels };
    let settings = match daemon::load(&args.config) {
        Ok(settings) => settings,
        Err(problems) if json => {
            problems.iter().for_each(|problem| tracing::error!(%problem, "the settings are not valid"));
            return Ok(Exit::Usage);
        }
        Err(problems) => return Ok(scan::usage(&problems)),
    };
    let scheme = if settings.api.tls.is_some() { "https" } else { "http" };
    let ended = daemon::run(args.config, settings, identity, |address| {
        let url = format!("{scheme}://{address}");
        if json {
            // Log collectors often merge stdout with stderr: a line of text would break the stream of JSON objects.
            tracing::info!(url, "listening");
        } else {
            // Scripts wait for this line. An error is ignored: if stdout is closed, nobody waits.
            let _ = output::print(&format!("listening on {url}\n"));
        }
    })
    .await;
    match ended {
        Err(error) if json => {
            let hint = error.downcast_ref::<StoreError>().and_then(StoreError::hint);
            tracing::error!(hint, "{error:#}");
            Ok(Exit::Failed)
        }
        ended => ended.map(|()| Exit::Done),
    }
}
