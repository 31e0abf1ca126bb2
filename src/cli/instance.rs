//! `ttlsweep instance`: the instances of a daemon.

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::Value;

use crate::cli::client::{self, Client, ClientArgs, cell};
use crate::cli::exit::Exit;
use crate::cli::output;

const COLUMNS: [(&str, &str); 8] = [
    ("id", "/id"),
    ("name", "/name"),
    ("target", "/target"),
    ("window open", "/window_open"),
    ("next scan", "/next_scan_at"),
    ("latest", "/latest/state"),
    ("ended", "/latest/finished_at"),
    ("reclaimed", "/latest/reclaimed"),
];

/// `ttlsweep instance`
#[derive(Debug, Args)]
pub struct InstanceArgs {
    #[command(subcommand)]
    command: InstanceCommand,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Subcommand)]
enum InstanceCommand {
    /// List the instances that you may see
    List,
    /// Show one instance
    Show {
        /// Its id
        id: String,
    },
    /// Look at an instance and touch nothing
    Check {
        /// Its id
        id: String,
    },
}

/// Runs the command.
///
/// # Errors
/// A stdout that cannot be written, a file that cannot be read.
pub async fn run(args: InstanceArgs) -> anyhow::Result<Exit> {
    let client = Client::new(&args.client)?;
    let answer = match &args.command {
        InstanceCommand::List => client.get("/api/v1/instances").await,
        InstanceCommand::Show { id } => client.get(&format!("/api/v1/instances/{id}")).await,
        InstanceCommand::Check { id } => {
            client.send(Method::POST, &format!("/api/v1/instances/{id}/check"), None).await
        }
    };
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => return Ok(client::failed(&error)),
    };
    if args.client.json {
        client::print_json(&answer)?;
        return Ok(Exit::Done);
    }
    let none = Vec::new();
    output::print(&match args.command {
        InstanceCommand::List => client::table(answer["instances"].as_array().unwrap_or(&none), &COLUMNS),
        InstanceCommand::Show { .. } => client::table(&[answer], &COLUMNS),
        InstanceCommand::Check { .. } => answer["masters"].as_array().unwrap_or(&none).iter().map(checked).collect(),
    })?;
    Ok(Exit::Done)
}

fn checked(master: &Value) -> String {
    let known = |name: &str| cell(master, name);
    let mut text = format!(
        "{}  {} {}, {}\n{} keys, {} with a TTL, {} expired ({})\n",
        known("/target"),
        known("/server/product"),
        known("/server/version"),
        known("/role"),
        known("/backlog/keys"),
        known("/backlog/expires"),
        known("/backlog/expired"),
        known("/backlog/expired_is"),
    );
    for finding in master["findings"].as_array().into_iter().flatten() {
        let known = |name: &str| cell(finding, name);
        text.push_str(&format!("{}: {}\n  hint: {}\n", known("/severity"), known("/message"), known("/advice")));
    }
    text.push_str(&format!("verdict: {}\n", known("/verdict")));
    text
}
