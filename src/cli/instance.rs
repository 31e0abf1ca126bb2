//! `ttlsweep instance`: the instances of a daemon.

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::Value;

use crate::cli::client::{self, Client, ClientArgs};
use crate::cli::exit::Exit;
use crate::cli::output;
use crate::cli::scan;

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
/// A stdout that cannot be written.
pub async fn run(args: InstanceArgs) -> anyhow::Result<Exit> {
    let client = match Client::new(&args.client) {
        Ok(client) => client,
        Err(problem) => return Ok(scan::usage(&[problem])),
    };
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
    if matches!(args.command, InstanceCommand::Check { .. }) {
        return checked(answer, args.client.json);
    }
    if args.client.json {
        client::print_json(&answer)?;
        return Ok(Exit::Done);
    }
    let none = Vec::new();
    output::print(&match args.command {
        InstanceCommand::List => client::table(answer["instances"].as_array().unwrap_or(&none), &COLUMNS),
        InstanceCommand::Show { .. } | InstanceCommand::Check { .. } => client::table(&[answer], &COLUMNS),
    })?;
    Ok(Exit::Done)
}

/// Prints what `ttlsweep check` would, and ends with its code.
fn checked(mut answer: Value, as_json: bool) -> anyhow::Result<Exit> {
    let report = answer.as_object_mut().and_then(|answer| answer.remove("report"));
    match report {
        Some(Value::String(report)) if !as_json => output::print(&report)?,
        _ => client::print_json(&answer)?,
    }
    let can_run = |look: &Value| look["sweep"]["can_run"] == true;
    let can_all = match answer["shards"].as_array() {
        Some(shards) => shards.iter().all(can_run),
        None => can_run(&answer),
    };
    Ok(if can_all { Exit::Done } else { Exit::Failed })
}
