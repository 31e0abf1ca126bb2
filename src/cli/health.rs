//! `ttlsweep health`: whether a daemon is well, for health checks where there is no curl.

use std::time::Duration;

use clap::Args;

use crate::cli::exit::Exit;
use crate::cli::output;

/// How long the daemon may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(4);

/// `ttlsweep health`
#[derive(Debug, Args)]
#[command(after_help = "\
Ends with 0 where the daemon is well, with 1 where it says that it is not, and with 3 where it cannot be reached. Sends
no token, and takes any certificate: that of a daemon that is asked on its own machine is for another name.

Examples:
  HEALTHCHECK CMD [\"ttlsweep\", \"health\"]
  ttlsweep health --ready --server https://127.0.0.1:8443")]
pub struct HealthArgs {
    /// The daemon
    #[arg(long, env = "TTLSWEEP_SERVER", value_name = "URL", default_value = "http://127.0.0.1:8080")]
    server: String,

    /// Ask whether it can do its work (/readyz), not only whether it answers (/healthz)
    #[arg(long)]
    ready: bool,
}

/// Asks, and says what the answer was.
///
/// # Errors
/// A stdout that cannot be written.
pub async fn run(args: &HealthArgs) -> anyhow::Result<Exit> {
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
    // A proxy of the environment is for others than one's own machine.
    let client = reqwest::Client::builder().no_proxy().timeout(ANSWER_WITHIN).tls_danger_accept_invalid_certs(true);
    Ok(client.build()?.get(url).send().await?.status())
}
