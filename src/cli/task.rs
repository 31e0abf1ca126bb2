//! `ttlsweep task`: lists, creates, follows and commands the tasks of a daemon.

use std::time::{Duration, Instant};

use clap::{ArgGroup, Args, Subcommand};
use reqwest::Method;
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use crate::cli::client::{self, Client, ClientArgs, ClientError};
use crate::cli::exit::Exit;
use crate::cli::output;
use crate::cli::progress::{self, PassRow, Rows, ShardRow, keep_text};
use crate::cli::scan;
use crate::model::bounds::KeepFigures;
use crate::model::failure::{Failure, FailureKind};
use crate::model::task::TaskState;
use crate::settings::positive_duration;

/// Pause before following a task again whose stream ended before the task did.
const FOLLOW_AGAIN_AFTER: Duration = Duration::from_millis(500);
/// How long to wait for a daemon that has gone away, such as for a restart.
const WAIT_FOR_DAEMON: Duration = Duration::from_secs(60);

const COLUMNS: [(&str, &str); 8] = [
    ("id", "/id"),
    ("instance", "/instance_id"),
    ("state", "/state"),
    ("cause", "/cause"),
    ("created", "/created_at"),
    ("ended", "/finished_at"),
    ("reclaimed", "/reclaimed"),
    ("why", "/failure/message"),
];

/// `ttlsweep task`
#[derive(Debug, Args)]
pub(super) struct TaskArgs {
    #[command(subcommand)]
    command: TaskCommand,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Subcommand)]
enum TaskCommand {
    /// List tasks, newest first
    List {
        /// Only tasks of this instance
        #[arg(long, value_name = "ID")]
        instance: Option<String>,
        /// Only tasks in this state: waiting, running, paused, interrupted, succeeded, failed, cancelled
        #[arg(long)]
        state: Option<String>,
        /// Most tasks to list
        #[arg(long, value_name = "N")]
        limit: Option<u32>,
    },
    /// Show a task
    Show {
        /// Id of the task
        id: String,
    },
    /// Sweep an instance now
    Create(CreateArgs),
    /// Follow a task to its end, with the progress of `scan`
    Watch {
        /// Id of the task
        id: String,
    },
    /// Pause a task; its timeout stops until it is resumed
    Pause {
        /// Id of the task
        id: String,
    },
    /// Resume a paused task
    Resume {
        /// Id of the task
        id: String,
    },
    /// Cancel a task; the keys that it reclaimed stay counted
    Cancel {
        /// Id of the task
        id: String,
    },
    /// Change the limits of a task while it runs
    #[command(group = ArgGroup::new("limits of it").required(true).multiple(true))]
    Tune {
        /// Id of the task
        id: String,
        /// Largest share of the master's time, above 0 and up to 1
        #[arg(long, value_name = "SHARE", group = "limits of it")]
        intensity: Option<f64>,
        /// Most keys to scan per second on each master; 0: no ceiling
        #[arg(long, value_name = "KEYS", group = "limits of it")]
        max_keys_per_sec: Option<u32>,
        /// Another limit, such as max-latency=20ms or throttle=false; may be repeated
        #[arg(long = "limit", value_name = "SETTING=VALUE", value_parser = limit, group = "limits of it")]
        limits: Vec<(String, Value)>,
    },
}

/// Parses one `--limit` into the name and the JSON value that the API takes.
fn limit(text: &str) -> Result<(String, Value), String> {
    let (key, value) = text.split_once('=').ok_or("write SETTING=VALUE, such as max-latency=20ms")?;
    let name = key.replace('-', "_");
    let value = match name.as_str() {
        "throttle" => value.parse().map(Value::Bool).map_err(|_| "throttle is true or false".to_owned())?,
        "min_intensity" => json!(value.parse::<f64>().map_err(|_| "min-intensity is a share such as 0.05".to_owned())?),
        _ => Value::String(value.to_owned()),
    };
    Ok((name, value))
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// Id of the instance
    instance: String,
    /// Largest share of the master's time, above 0 and up to 1
    #[arg(long, value_name = "SHARE")]
    intensity: Option<f64>,
    /// Most keys to scan per second on each master; 0: no ceiling
    #[arg(long, value_name = "KEYS")]
    max_keys_per_sec: Option<u32>,
    /// Another limit, such as max-latency=20ms or throttle=false; may be repeated
    #[arg(long = "limit", value_name = "SETTING=VALUE", value_parser = limit)]
    limits: Vec<(String, Value)>,
    /// COUNT of the first SCAN, 10 to 1000
    #[arg(long, value_name = "KEYS")]
    count: Option<u32>,
    /// DBs to sweep, such as 0,3
    #[arg(long, value_name = "N", value_delimiter = ',')]
    db: Vec<u32>,
    /// Command to send for each key that SCAN returned: auto, none, exists, ttl
    #[arg(long, value_name = "MODE")]
    touch: Option<String>,
    /// Longest time that the sweep may take, such as 90min
    #[arg(long, value_name = "TIME", value_parser = positive_duration)]
    timeout: Option<Duration>,
    /// Sweep only while the instance's window is open
    #[arg(long)]
    respect_window: bool,
    /// Follow the task to its end
    #[arg(long)]
    watch: bool,
}

impl CreateArgs {
    fn body(&self) -> Value {
        let mut body = Map::new();
        let mut set = |name: &str, value: Value| {
            if !value.is_null() {
                body.insert(name.to_owned(), value);
            }
        };
        set("instance_id", json!(self.instance));
        set("intensity", json!(self.intensity));
        set("max_keys_per_sec", json!(self.max_keys_per_sec));
        set("limits", json!(self.limits.iter().cloned().collect::<Map<_, _>>()));
        set("count", json!(self.count));
        set("db", if self.db.is_empty() { Value::Null } else { json!(self.db) });
        set("touch", json!(self.touch));
        set("timeout_s", json!(self.timeout.map(|timeout| timeout.as_secs().max(1))));
        set("respect_window", json!(self.respect_window));
        Value::Object(body)
    }
}

/// Runs the command.
///
/// # Errors
/// A stdout that cannot be written.
pub(super) async fn run(args: TaskArgs) -> anyhow::Result<Exit> {
    let client = match Client::new(&args.client) {
        Ok(client) => client,
        Err(problem) => return Ok(scan::usage(&[problem])),
    };
    match ask(&client, &args.command).await {
        Ok(answer) => {
            let followed = matches!(args.command, TaskCommand::Watch { .. })
                || matches!(&args.command, TaskCommand::Create(create) if create.watch);
            show(&answer, args.client.json)?;
            Ok(if followed { ended(&answer) } else { Exit::Done })
        }
        Err(error) => Ok(client::failed(&error)),
    }
}

async fn ask(client: &Client, command: &TaskCommand) -> Result<Value, ClientError> {
    let command_task =
        async |id: &str, what: &str| client.send(Method::POST, &format!("/api/v1/tasks/{id}/{what}"), None).await;
    match command {
        TaskCommand::List { instance, state, limit } => {
            let limit = limit.map(|limit| limit.to_string());
            let filters = [("instance_id", instance.clone()), ("state", state.clone()), ("limit", limit)];
            client.get(&client::with_query("/api/v1/tasks", filters)).await
        }
        TaskCommand::Show { id } => client.get(&format!("/api/v1/tasks/{id}")).await,
        TaskCommand::Create(create) => {
            let task = client.send(Method::POST, "/api/v1/tasks", Some(&create.body())).await?;
            match task["id"].as_str() {
                Some(id) if create.watch => follow(client, id).await,
                _ => Ok(task),
            }
        }
        TaskCommand::Watch { id } => follow(client, id).await,
        TaskCommand::Pause { id } => command_task(id, "pause").await,
        TaskCommand::Resume { id } => command_task(id, "resume").await,
        TaskCommand::Cancel { id } => command_task(id, "cancel").await,
        TaskCommand::Tune { id, intensity, max_keys_per_sec, limits } => {
            let mut body = Map::new();
            body.extend(intensity.map(|share| ("intensity".to_owned(), json!(share))));
            body.extend(max_keys_per_sec.map(|keys| ("max_keys_per_sec".to_owned(), json!(keys))));
            body.insert("limits".to_owned(), json!(limits.iter().cloned().collect::<Map<_, _>>()));
            client.send(Method::PATCH, &format!("/api/v1/tasks/{id}"), Some(&Value::Object(body))).await
        }
    }
}

/// Prints why a task failed, and returns the exit code that `scan` would have ended with.
fn ended(task: &Value) -> Exit {
    let text = |name: &str| task["failure"][name].as_str();
    let kind = text("kind").and_then(|kind| kind.parse::<FailureKind>().ok());
    let failure = kind.map(|kind| Failure {
        hint: text("hint").map(str::to_owned),
        ..Failure::new(kind, text("message").unwrap_or_default())
    });
    if let Some(failure) = &failure {
        output::note(&output::failure_text(failure));
    }
    let state = task["state"].as_str().and_then(|state| state.parse::<TaskState>().ok());
    let shards = || task["shards"].as_array().into_iter().flatten();
    let met = shards().any(|shard| shard["server"].is_object());
    let mut passes = shards().filter_map(|shard| shard["dbs"].as_array()).flatten();
    let swept = passes.any(|pass| pass["batches"].as_u64().is_some_and(|batches| batches > 0));
    Exit::of_task(state, failure.as_ref(), met, swept)
}

/// Shows the progress of a task until it has ended, and returns its last view.
async fn follow(client: &Client, id: &str) -> Result<Value, ClientError> {
    let (sender, views) = watch::channel(Value::Null);
    let bar = tokio::spawn(progress::show(views, rows));
    let ended = until_ended(client, id, &sender).await;
    drop(sender);
    // Waits for the last line of progress, so that later output comes below it.
    let _ = bar.await;
    ended
}

/// Sends every view to `views` until the task has ended, and returns the last one. Follows again when the stream ends or the daemon
/// restarts.
async fn until_ended(client: &Client, id: &str, views: &watch::Sender<Value>) -> Result<Value, ClientError> {
    let mut seen: Option<Instant> = None;
    loop {
        let see = |view| drop(views.send_replace(view));
        let task = match client.follow(&format!("/api/v1/tasks/{id}/events"), see).await {
            Ok(()) => {
                seen = Some(Instant::now());
                client.get(&format!("/api/v1/tasks/{id}")).await
            }
            Err(error) => Err(error),
        };
        match task {
            Ok(task) if task["finished_at"].is_string() => return Ok(task),
            // The daemon ends a stream from time to time, so that the credentials of its reader are checked again.
            Ok(_) => {}
            // The daemon may be restarting; it resumes its tasks then.
            Err(ClientError::Unreachable { .. }) if seen.is_some_and(|at| at.elapsed() < WAIT_FOR_DAEMON) => {}
            Err(error) => return Err(error),
        }
        tokio::time::sleep(FOLLOW_AGAIN_AFTER).await;
    }
}

/// The rows to show of a task, from the daemon's JSON.
fn rows(view: &Value) -> Rows {
    let hold = |shard: &str| {
        let holds = view["holds"].as_array().into_iter().flatten();
        let mut mine = holds.filter(|hold| hold["shard"] == shard);
        mine.next().and_then(|hold| hold["sentence"].as_str()).map(str::to_owned)
    };
    let number = |pass: &Value, name: &str| pass.pointer(name).and_then(Value::as_u64).unwrap_or_default();
    let pass = |pass: &Value| PassRow {
        db: u32::try_from(number(pass, "/db")).unwrap_or_default(),
        fraction: pass["fraction"].as_f64().unwrap_or_default(),
        complete: pass["complete"].as_bool().unwrap_or_default(),
        scanned: number(pass, "/scanned"),
        reclaimed: number(pass, "/reclaimed"),
        slice_p50_us: number(pass, "/slice_us/p50"),
        intensity: pass["intensity"].as_f64().unwrap_or_default(),
    };
    let shards = view["shards"].as_array().into_iter().flatten().map(|shard| {
        let name = shard["shard"].as_str().unwrap_or_default();
        let passes = shard["dbs"].as_array().into_iter().flatten().map(pass).collect();
        let dbs = shard["dbs"].as_array().into_iter().flatten();
        let reclaimed = dbs.filter_map(|db| db["reclaimed"].as_u64()).sum();
        let keep = shard["keep"].is_object().then(|| keep_text(&keep_of(&shard["keep"]), reclaimed));
        let warnings = shard["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned);
        ShardRow { name: name.to_owned(), hold: hold(name), keep, warnings: warnings.collect(), passes }
    });
    // A task that has not begun has no shards, but a hold without a shard that says what it waits for.
    let waits = hold("").map(|hold| ShardRow { name: "waiting,".to_owned(), hold: Some(hold), ..ShardRow::default() });
    Rows { shards: waits.into_iter().chain(shards).collect() }
}

/// The state of a keep run on one shard, from the daemon's JSON.
fn keep_of(keep: &Value) -> KeepFigures {
    let span = |name: &str| keep[name].as_f64().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    KeepFigures {
        laps: keep["laps"].as_u64().unwrap_or_default(),
        backlog: keep["backlog"].as_u64(),
        max_backlog: keep["max_backlog"].as_u64(),
        inflow: keep["inflow_per_s"].as_f64().unwrap_or_default(),
        delay: span("delay_s"),
        lap: span("lap_s").unwrap_or_default(),
        missed: span("missed_s").unwrap_or_default(),
        is_missed: keep["is_missed"].as_bool().unwrap_or_default(),
    }
}

fn show(answer: &Value, json: bool) -> anyhow::Result<()> {
    if json {
        return client::print_json(answer);
    }
    let one = [answer.clone()];
    let tasks = answer["tasks"].as_array().map_or(one.as_slice(), Vec::as_slice);
    output::print(&client::table(tasks, &COLUMNS))?;
    Ok(())
}
