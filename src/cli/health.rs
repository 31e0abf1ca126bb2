//! `ttlsweep health`: checks the health of a daemon, for images that have no curl.

use std::time::Duration;

use clap::Args;

use crate::cli::exit::Exit;
use crate::cli::output;

/// Timeout of the request: shorter than that of usual health checks.
const ANSWER_WITHIN: Duration = Duration::from_secs(4);

/// `ttlsweep health`
#[derive(Debug, Args)]
#[command(after_help = "\
Exits with 0 if the daemon is healthy, with 1 if it says that it is not, and with 3 if it cannot be reached. Sends no
token, and accepts any certificate: on its own machine the daemon is asked by another name than its certificate's.

Examples:
  HEALTHCHECK CMD [\"ttlsweep\", \"health\"]
  ttlsweep health --ready --server https://127.0.0.1:8443")]
pub(super) struct HealthArgs {
    /// URL of the daemon
    #[arg(long, env = "TTLSWEEP_SERVER", value_name = "URL", default_value = "http://127.0.0.1:8080")]
    server: String,

    /// Ask whether the daemon can do its work (/readyz), not only whether it answers (/healthz)
    #[arg(long)]
    ready: bool,
}

/// Runs the command.
///
/// # Errors
/// A stdout that cannot be written.
pub(super) async fn run(args: &HealthArgs) -> anyhow::Result<Exit> {
    let path = if args.ready { "/readyz" } else { "/healthz" };
    let server = args.server.trim_end_matches('/');
    let scheme = if server.contains("://") { "" } else { "http://" };
    match ask(&format!("{scheme}{server}{path}")).await {
        Ok(status) if status.is_success() => {
            output::print("ok\n")?;
            Ok(Exit::Done)
        }
        Ok(status) => {
            output::note(&format!("error: {server} answered {status}"));
            Ok(Exit::Failed)
        }
        Err(error) => {
            output::note(&format!("error: cannot reach {server}: {}", output::chain(&error.without_url())));
            Ok(Exit::NoAccess)
        }
    }
}

async fn ask(url: &str) -> Result<reqwest::StatusCode, reqwest::Error> {
    // No proxy of the environment: the daemon is usually on this machine.
    let client = reqwest::Client::builder().no_proxy().timeout(ANSWER_WITHIN).tls_danger_accept_invalid_certs(true);
    Ok(client.build()?.get(url).send().await?.status())
}
