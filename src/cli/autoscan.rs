//! `ttlsweep autoscan`: shows and sets the automatic scan of an instance, by the calls of the contract.

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};

use crate::cli::client::{self, Client, ClientArgs, ClientError};
use crate::cli::exit::Exit;
use crate::cli::output;
use crate::cli::scan;
use crate::settings;
use crate::settings::serve::MAX_TIMEOUT_S;

const COLUMNS: [(&str, &str); 7] = [
    ("instance", "/instance_id"),
    ("enabled", "/enable_auto_scan"),
    ("first", "/first_scan_at"),
    ("interval s", "/interval"),
    ("timeout s", "/timeout"),
    ("count", "/scan_keys_count"),
    ("updated", "/updated_at"),
];

/// `ttlsweep autoscan`
#[derive(Debug, Args)]
pub(super) struct AutoscanArgs {
    #[command(subcommand)]
    command: AutoscanCommand,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Subcommand)]
enum AutoscanCommand {
    /// Show the automatic scan of an instance
    Show {
        /// Id of the instance
        instance: String,
    },
    /// Switch the automatic scan on
    Set {
        /// Id of the instance
        instance: String,
        /// First due time, UTC, such as 2030-01-31T02:00:00Z
        #[arg(long, value_name = "TIME")]
        first_scan_at: String,
        /// Time from one due time to the next, such as 1d or 90min, or in seconds; 0: scan once
        #[arg(long, value_name = "TIME", value_parser = whole_seconds)]
        interval: u32,
        /// Longest time that a scan may take, in the same forms; at least twice the interval
        #[arg(long, value_name = "TIME", value_parser = whole_seconds)]
        timeout: u32,
        /// COUNT of the first SCAN, 10 to 1000
        #[arg(long, value_name = "KEYS")]
        scan_keys_count: u32,
    },
    /// Switch the automatic scan off; its other settings stay
    Off {
        /// Id of the instance
        instance: String,
    },
    /// Undo what was set here: the automatic scan of the daemon's settings file applies again
    Reset {
        /// Id of the instance
        instance: String,
    },
}

/// Whole seconds, typed as a number (the contract's form) or as a duration.
fn whole_seconds(text: &str) -> Result<u32, String> {
    text.parse().or_else(|_| settings::seconds(text, MAX_TIMEOUT_S))
}

/// Runs the command.
///
/// # Errors
/// A stdout that cannot be written.
pub(super) async fn run(args: AutoscanArgs) -> anyhow::Result<Exit> {
    let client = match Client::new(&args.client) {
        Ok(client) => client,
        Err(problem) => return Ok(scan::usage(&[problem])),
    };
    let answer = match &args.command {
        AutoscanCommand::Show { instance } => ask(&client, instance, None).await,
        AutoscanCommand::Off { instance } => ask(&client, instance, Some(json!({"enable_auto_scan": false}))).await,
        AutoscanCommand::Reset { instance } => reset(&client, instance).await,
        AutoscanCommand::Set { instance, first_scan_at, interval, timeout, scan_keys_count } => {
            let body = json!({
                "enable_auto_scan": true,
                "first_scan_at": first_scan_at,
                "interval": interval,
                "timeout": timeout,
                "scan_keys_count": scan_keys_count,
            });
            ask(&client, instance, Some(body)).await
        }
    };
    match answer {
        Ok(answer) if args.client.json => client::print_json(&answer)?,
        Ok(answer) => output::print(&client::table(&[answer], &COLUMNS))?,
        Err(error) => return Ok(client::failed(&error)),
    }
    Ok(Exit::Done)
}

/// Shows the automatic scan, or changes it (`body`). The contract's path needs the project too, so the instance is asked for it first.
async fn ask(client: &Client, instance: &str, body: Option<Value>) -> Result<Value, ClientError> {
    let known = client.get(&format!("/api/v1/instances/{instance}")).await?;
    let project = known["project_id"].as_str().unwrap_or("");
    let path = format!("/v2/{project}/instances/{instance}/scan-expire-keys/autoscan-config");
    match &body {
        None => client.get(&path).await,
        Some(body) => client.send(Method::PUT, &path, Some(body)).await,
    }
}

async fn reset(client: &Client, instance: &str) -> Result<Value, ClientError> {
    client.send(Method::DELETE, &format!("/api/v1/instances/{instance}/auto-scan"), None).await?;
    ask(client, instance, None).await
}
