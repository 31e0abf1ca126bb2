//! `ttlsweep daemons`: lists the daemons that share one database.

use clap::Args;
use serde_json::json;

use crate::cli::client::{self, Client, ClientArgs};
use crate::cli::exit::Exit;
use crate::cli::{output, scan};

const COLUMNS: [(&str, &str); 7] = [
    ("name", "/name"),
    ("address", "/address"),
    ("version", "/version"),
    ("heartbeat", "/heartbeat_at"),
    ("lease until", "/lease_until"),
    ("same settings", "/same_settings"),
    ("sweeps", "/sweeps"),
];

/// `ttlsweep daemons`
#[derive(Debug, Args)]
pub(super) struct DaemonsArgs {
    #[command(flatten)]
    client: ClientArgs,
}

/// Runs the command.
///
/// # Errors
/// A stdout that cannot be written.
pub(super) async fn run(args: DaemonsArgs) -> anyhow::Result<Exit> {
    let client = match Client::new(&args.client) {
        Ok(client) => client,
        Err(problem) => return Ok(scan::usage(&[problem])),
    };
    let mut answer = match client.get("/api/v1/daemons").await {
        Ok(answer) => answer,
        Err(error) => return Ok(client::failed(&error)),
    };
    if args.client.json {
        client::print_json(&answer)?;
        return Ok(Exit::Done);
    }
    let daemons = answer["daemons"].as_array_mut().map(std::mem::take).unwrap_or_default();
    let rows = daemons.into_iter().map(|mut daemon| {
        let instances =
            daemon["tasks"].as_array().into_iter().flatten().filter_map(|task| task["instance_id"].as_str());
        let instances = instances.collect::<Vec<_>>().join(" ");
        daemon["sweeps"] = json!(instances);
        daemon
    });
    output::print(&client::table(&rows.collect::<Vec<_>>(), &COLUMNS))?;
    Ok(Exit::Done)
}
