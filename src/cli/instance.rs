//! `ttlsweep instance`: lists, shows, checks and keeps the instances of a daemon.

use clap::{ArgGroup, Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};

use crate::cli::client::{self, Client, ClientArgs};
use crate::cli::exit::Exit;
use crate::cli::output;
use crate::cli::scan;

const COLUMNS: [(&str, &str); 10] = [
    ("id", "/id"),
    ("name", "/name"),
    ("target", "/target"),
    ("window open", "/window_open"),
    ("next scan", "/next_scan_at"),
    ("max backlog", "/keep/max_backlog"),
    ("max delay", "/keep/max_delay"),
    ("latest", "/latest/state"),
    ("ended", "/latest/finished_at"),
    ("reclaimed", "/latest/reclaimed"),
];
const HISTORY: [(&str, &str); 8] = [
    ("id", "/id"),
    ("state", "/state"),
    ("cause", "/cause"),
    ("created", "/created_at"),
    ("took s", "/totals/elapsed_s"),
    ("reclaimed", "/reclaimed"),
    ("bytes freed", "/freed_bytes"),
    ("held s", "/totals/held_s"),
];

/// `ttlsweep instance`
#[derive(Debug, Args)]
pub(super) struct InstanceArgs {
    #[command(subcommand)]
    command: InstanceCommand,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Subcommand)]
enum InstanceCommand {
    /// List the instances that these credentials may see
    List {
        /// Only instances whose name, id or address contains this text
        #[arg(long, value_name = "TEXT")]
        search: Option<String>,
        /// Only instances of this project
        #[arg(long, value_name = "ID")]
        project: Option<String>,
        /// Only instances whose newest task is waiting, running, paused, interrupted, succeeded, failed or cancelled; never:
        /// only those without a task
        #[arg(long)]
        state: Option<String>,
        /// Sort by name, last_success, reclaimed, memory or backlog
        #[arg(long, value_name = "BY")]
        sort: Option<String>,
        /// Sort in descending order
        #[arg(long)]
        descending: bool,
        /// Most instances to list
        #[arg(long, value_name = "N")]
        limit: Option<u32>,
    },
    /// Show one instance
    Show {
        /// Id of the instance
        id: String,
    },
    /// List the sweeps of an instance and their results, newest first
    History {
        /// Id of the instance
        id: String,
        /// Most sweeps to list
        #[arg(long, value_name = "N")]
        limit: Option<u32>,
    },
    /// Inspect an instance without changing anything
    Check {
        /// Id of the instance
        id: String,
    },
    /// Keep the expired keys of an instance below a bound
    #[command(group = ArgGroup::new("what").required(true).multiple(true), after_help = KEEP_EXAMPLES)]
    Keep {
        /// Id of the instance
        id: String,
        /// Most expired keys in memory on each master: a share of its keys with a TTL (5%), a number of keys, or bytes (64MiB)
        #[arg(long, value_name = "SIZE", group = "what")]
        max_backlog: Option<String>,
        /// Longest time that a key stays in memory after it has expired, such as 2s
        #[arg(long, value_name = "TIME", group = "what")]
        max_delay: Option<String>,
        /// Set no bound, whatever the daemon's settings file says
        #[arg(long, group = "what", conflicts_with_all = ["max_backlog", "max_delay", "reset"])]
        off: bool,
        /// Undo what was set here: the bounds of the daemon's settings file apply again
        #[arg(long, group = "what", conflicts_with_all = ["max_backlog", "max_delay"])]
        reset: bool,
    },
}

const KEEP_EXAMPLES: &str = "\
Examples:
  ttlsweep instance keep cache --max-backlog 5%
  ttlsweep instance keep cache --max-delay 2s --max-backlog 64MiB
  ttlsweep instance keep cache --off";

/// Runs the command.
///
/// # Errors
/// A stdout that cannot be written.
pub(super) async fn run(args: InstanceArgs) -> anyhow::Result<Exit> {
    let client = match Client::new(&args.client) {
        Ok(client) => client,
        Err(problem) => return Ok(scan::usage(&[problem])),
    };
    let answer = match &args.command {
        InstanceCommand::List { search, project, state, sort, descending, limit } => {
            let parameters = [
                ("search", search.clone()),
                ("project_id", project.clone()),
                ("state", state.clone()),
                ("sort", sort.clone()),
                ("order", descending.then(|| "desc".to_owned())),
                ("limit", limit.map(|limit| limit.to_string())),
            ];
            client.get(&client::with_query("/api/v1/instances", parameters)).await
        }
        InstanceCommand::History { id, limit } => {
            let parameters = [("shards", Some("false".to_owned())), ("limit", limit.map(|limit| limit.to_string()))];
            client.get(&client::with_query(&format!("/api/v1/instances/{id}/history"), parameters)).await
        }
        InstanceCommand::Show { id } => client.get(&format!("/api/v1/instances/{id}")).await,
        InstanceCommand::Check { id } => {
            client.send(Method::POST, &format!("/api/v1/instances/{id}/check"), None).await
        }
        InstanceCommand::Keep { id, max_backlog, max_delay, off: _, reset } => {
            let path = format!("/api/v1/instances/{id}/keep");
            match reset {
                true => client.send(Method::DELETE, &path, None).await,
                false => {
                    let bounds = json!({ "max_backlog": max_backlog, "max_delay": max_delay });
                    client.send(Method::PUT, &path, Some(&bounds)).await
                }
            }
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
        InstanceCommand::List { .. } => client::table(answer["instances"].as_array().unwrap_or(&none), &COLUMNS),
        InstanceCommand::History { .. } => client::table(answer["sweeps"].as_array().unwrap_or(&none), &HISTORY),
        _ => client::table(&[answer], &COLUMNS),
    })?;
    Ok(Exit::Done)
}

/// Prints the report of a check, and returns the exit code of `ttlsweep check`.
fn checked(mut answer: Value, as_json: bool) -> anyhow::Result<Exit> {
    let report = answer.as_object_mut().and_then(|answer| answer.remove("report"));
    match report {
        Some(Value::String(report)) if !as_json => output::print(&report)?,
        _ => client::print_json(&answer)?,
    }
    let can_run = |checked: &Value| checked["sweep"]["can_run"] == true;
    let can_all = match answer["shards"].as_array() {
        Some(shards) => shards.iter().all(can_run),
        None => can_run(&answer),
    };
    Ok(if can_all { Exit::Done } else { Exit::Failed })
}
