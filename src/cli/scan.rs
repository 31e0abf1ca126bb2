//! `ttlsweep scan`: one sweep, now.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use clap::{ArgMatches, Args, ValueEnum};
use tokio::signal::unix::{Signal, SignalKind, signal};
use uuid::Uuid;

use crate::api::dto::{Report, ScanOutput};
use crate::cli::args::{self, ServerArgs, SweepArgs};
use crate::cli::askpass;
use crate::cli::exit::Exit;
use crate::cli::output;
use crate::cli::priority::Priority;
use crate::cli::progress::{self, Rows};
use crate::engine::control::{Control, StopReason};
use crate::model::failure::{Failure, FailureKind};
use crate::model::target::Target;
use crate::model::task::{Cause, SweepTexts, TaskState};
use crate::node::conn::ConnOptions;
use crate::settings::raw::{Origin, Problem};
use crate::settings::{self, GivenPassword, Settings};
use crate::store::Store;
use crate::tasks::{self, RunningTask, TaskService, TaskSpec, TaskView};

/// `ttlsweep scan`
#[derive(Debug, Args)]
#[command(after_help = args::scan_examples())]
pub struct ScanArgs {
    /// Where.
    #[command(flatten)]
    pub server: ServerArgs,

    /// How.
    #[command(flatten)]
    pub sweep: SweepArgs,

    /// CPU priority of this process: low (nice 5), normal, idle (only on processors that have nothing else to do)
    #[arg(long, env = "TTLSWEEP_PRIORITY", value_name = "WORD", default_value = "low")]
    #[arg(hide_possible_values = true, hide_env_values = true)]
    pub priority: Priority,

    /// Go on from the checkpoint in --state; =auto: begin where there is none
    #[arg(long, value_name = "WORD", num_args = 0..=1, require_equals = true, default_missing_value = "always")]
    #[arg(hide_possible_values = true)]
    pub resume: Option<Resume>,

    /// Print one JSON object: the task record and a report
    #[arg(long)]
    pub json: bool,

    /// Show no progress and no summary; errors only
    #[arg(long, short, conflicts_with = "json")]
    pub quiet: bool,
}

/// Whether a sweep goes on from a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Resume {
    /// It does, and it is an error where there is none
    Always,
    /// Where there is one; else it begins
    Auto,
}

/// How a view is shown at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Show {
    /// Progress and summary.
    Text,
    /// Progress, and one object.
    Json,
    /// Nothing but errors.
    Quiet,
}

impl Show {
    /// As the options say; clap lets nobody give both.
    pub fn of(json: bool, quiet: bool) -> Self {
        match (json, quiet) {
            (true, _) => Self::Json,
            (false, true) => Self::Quiet,
            (false, false) => Self::Text,
        }
    }
}

/// Runs the command.
///
/// # Errors
/// What cannot be put as an exit code with its own message.
pub async fn run(args: ScanArgs, matches: &ArgMatches) -> anyhow::Result<Exit> {
    let (settings, conn) = match load(&args.server, matches) {
        Ok(loaded) => loaded,
        Err(problems) => return Ok(usage(&problems)),
    };
    sweep(settings, conn, args.resume, Show::of(args.json, args.quiet), Until::Done).await
}

/// When a sweep from the command line ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Every DB was swept.
    Done,
    /// A keep run was told to stop, or has lasted for so long.
    Stopped(Option<Duration>),
}

/// Settings of one sweep, out of what was typed, and how to connect.
///
/// # Errors
/// Every problem.
pub fn load(server: &ServerArgs, matches: &ArgMatches) -> Result<(Settings, ConnOptions), Vec<Problem>> {
    let settings = load_with_bounds(server, matches)?.without_bounds();
    let conn = tasks::conn_options(&settings).map_err(|problem| vec![problem])?;
    Ok((settings, conn))
}

/// Settings out of what was typed, with the bounds of a keep run.
///
/// # Errors
/// Every problem.
pub fn load_with_bounds(server: &ServerArgs, matches: &ArgMatches) -> Result<Settings, Vec<Problem>> {
    let raw = args::layers(matches, server.config.as_ref())?;
    settings::resolve(&raw, password(server.askpass)?)
}

/// The password that was typed, or that stands in REDISCLI_AUTH.
///
/// # Errors
/// A terminal that cannot be read.
pub fn password(ask: bool) -> Result<Option<GivenPassword>, Vec<Problem>> {
    if ask {
        let typed = askpass::ask("password: ").map_err(|e| {
            vec![Problem { origin: None, message: format!("--askpass: the terminal cannot be read: {e}") }]
        })?;
        // Nothing was begun.
        let Some(secret) = typed else { std::process::exit(Exit::Interrupted as i32) };
        let origin = Origin::Flag("--askpass".to_owned());
        return Ok(Some(GivenPassword { secret, origin }));
    }
    let origin = Origin::Env("REDISCLI_AUTH".to_owned());
    Ok(settings::password_in_env("REDISCLI_AUTH").map(|secret| GivenPassword { secret, origin }))
}

/// Prints problems of the settings.
pub fn usage(problems: &[Problem]) -> Exit {
    for problem in problems {
        output::note(&format!("error: {problem}"));
    }
    Exit::Usage
}

/// The id by which records name a target that has no other: the same for the same address.
pub fn instance_id(target: &Target) -> String {
    Uuid::new_v5(&Uuid::NAMESPACE_URL, target.to_string().as_bytes()).to_string()
}

/// One sweep with bar, summary and signals.
///
/// # Errors
/// A stdout that cannot be written.
pub async fn sweep(
    settings: Settings,
    conn: ConnOptions,
    resume: Option<Resume>,
    show: Show,
    until: Until,
) -> anyhow::Result<Exit> {
    let signals = Signals::listen();
    let running = match begin(&settings, conn, resume).await {
        Ok(running) => running,
        Err(failure) => {
            output::note(&output::failure_text(&failure));
            return Ok(if failure.kind == FailureKind::Store { Exit::Failed } else { Exit::Usage });
        }
    };
    // Whoever stops a keep run has had what was wanted.
    let stopped = if until == Until::Done { StopReason::Interrupted } else { StopReason::Kept };
    let signals = signals.map(|signals| tokio::spawn(signals.obey(running.control.clone(), stopped)));
    if let Until::Stopped(Some(after)) = until {
        let control = running.control.clone();
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            control.stop(StopReason::Kept);
        });
    }
    let shown = (show != Show::Quiet)
        .then(|| tokio::spawn(progress::show(running.view.clone(), |view| Rows::from(view.as_ref()))));
    let view = running.ended().await;
    if let Some(signals) = signals {
        signals.abort();
    }
    if let Some(shown) = shown {
        // It ends with the view's sender; waiting keeps the bar above the summary.
        let _ = shown.await;
    }
    report(&view, &settings, show)?;
    Ok(exit_of(&view))
}

async fn begin(settings: &Settings, conn: ConnOptions, resume: Option<Resume>) -> Result<RunningTask, Failure> {
    let store = match &settings.state {
        Some(path) if resume == Some(Resume::Always) && !path.exists() => {
            let failure = Failure::new(FailureKind::NoSuchDb, format!("there is no state file {}", path.display()));
            return Err(failure.hint("start without --resume, or with --resume=auto; the file is made then"));
        }
        Some(path) => Store::open_file(path).await,
        None if resume.is_some() => {
            let failure = Failure::new(FailureKind::NoSuchDb, "--resume needs the state file of the earlier sweep");
            return Err(failure.hint("name it with --state FILE"));
        }
        None => Store::in_memory().await,
    };
    let service = TaskService::new(store.map_err(|e| e.to_failure())?);
    let spec = TaskSpec::new(instance_id(&settings.target), settings, conn, Cause::Cli);
    let unfinished = service.resumable(&spec.instance_id).await.map_err(|e| e.to_failure())?;
    let task = match (unfinished, resume) {
        (Some(task), Some(_)) => {
            let (begun, wanted) = (dbs_of(&task.sweep), dbs_of(&spec.sweep));
            if begun != wanted {
                let message = format!("the unfinished sweep in the state file is of {begun}, and not of {wanted}");
                let failure = Failure::new(FailureKind::NoSuchDb, message);
                return Err(
                    failure.hint("name the same DBs, take a state file for each, or begin anew without --resume")
                );
            }
            task
        }
        (None, Some(Resume::Always)) => {
            let message = format!("the state file holds no unfinished sweep of {}", spec.target);
            let failure = Failure::new(FailureKind::NoSuchDb, message);
            return Err(failure.hint("start a new one without --resume, or with --resume=auto"));
        }
        (unfinished, _) => {
            if let Some(task) = unfinished
                && !service.store().shards(task.id).await.map_err(|e| e.to_failure())?.is_empty()
            {
                output::note("note: the unfinished sweep in the state file is given up; --resume would go on with it");
            }
            service.create(&spec).await.map_err(|e| e.to_failure())?
        }
    };
    service.start(task, spec).await.map_err(|e| e.to_failure())
}

/// Which DBs a sweep is of.
fn dbs_of(sweep: &SweepTexts) -> String {
    let text = sweep.get("db").map_or("", String::as_str);
    let dbs: BTreeSet<&str> = text.split([',', ' ']).filter(|db| !db.is_empty()).collect();
    match dbs.len() {
        0 => "each DB that holds keys with a TTL".to_owned(),
        _ => format!("DB {}", dbs.into_iter().collect::<Vec<_>>().join(",")),
    }
}

/// Signals that are listened to. The first ends the sweep after its batch, the second ends the process. A terminal that goes away
/// is one as well, unless whoever started this wants it to go on (nohup).
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Option<Signal>,
}

impl Signals {
    /// Listens from now on; one that comes before anybody obeys waits until then. `None` where that cannot be done.
    fn listen() -> Option<Self> {
        Some(Self {
            interrupt: signal(SignalKind::interrupt()).ok()?,
            terminate: signal(SignalKind::terminate()).ok()?,
            hangup: if hangup_is_ignored() { None } else { signal(SignalKind::hangup()).ok() },
        })
    }

    async fn obey(mut self, control: Control, reason: StopReason) {
        let mut first = true;
        loop {
            let hung_up = async {
                match &mut self.hangup {
                    Some(hangup) => hangup.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = self.interrupt.recv() => {}
                _ = self.terminate.recv() => {}
                _ = hung_up => {}
            }
            if !first {
                std::process::exit(Exit::Interrupted as i32);
            }
            first = false;
            output::note("stopping after this batch; once more to cut");
            control.stop(reason);
        }
    }
}

/// Whether SIGHUP was ignored when we were started. Where nobody tells, it is left as it is.
fn hangup_is_ignored() -> bool {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return true };
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // Bit 0 is signal 1, SIGHUP.
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_none_or(|mask| mask & 1 == 1)
}

fn report(view: &Arc<TaskView>, settings: &Settings, show: Show) -> anyhow::Result<()> {
    match show {
        Show::Json => {
            let output = ScanOutput {
                record: (&view.task).into(),
                report: Report::new(&view.task, &view.snapshot, &settings.scan),
            };
            output::print(&format!("{}\n", serde_json::to_string_pretty(&output)?))?;
        }
        Show::Text => output::print(&output::summary(view))?,
        Show::Quiet => {}
    }
    if let Some(failure) = &view.task.failure {
        output::note(&output::failure_text(failure));
    }
    let unfinished = matches!(view.task.state, TaskState::Interrupted | TaskState::Failed);
    if unfinished
        && show != Show::Quiet
        && view.snapshot.passes().next().is_some()
        && let Some(path) = &settings.state
    {
        output::note(&format!("the checkpoint is kept; go on with --state {} --resume", path.display()));
    }
    Ok(())
}

fn exit_of(view: &TaskView) -> Exit {
    let met = view.snapshot.shards.values().any(|shard| shard.server.is_some());
    let swept = view.snapshot.passes().any(|pass| pass.batches > 0);
    Exit::of_task(Some(view.task.state), view.task.failure.as_ref(), met, swept)
}
