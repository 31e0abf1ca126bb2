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
pub(super) struct ScanArgs {
    /// How to reach the server.
    #[command(flatten)]
    pub server: ServerArgs,

    /// How to sweep.
    #[command(flatten)]
    pub sweep: SweepArgs,

    /// CPU priority of this process: low (nice 5), normal, idle (only on otherwise idle processors)
    #[arg(long, env = "TTLSWEEP_PRIORITY", value_name = "WORD", default_value = "low")]
    #[arg(hide_possible_values = true, hide_env_values = true)]
    pub priority: Priority,

    /// Resume from the checkpoint in --state; =auto: start a new sweep if there is none
    #[arg(long, value_name = "WORD", num_args = 0..=1, require_equals = true, default_missing_value = "always")]
    #[arg(hide_possible_values = true)]
    pub resume: Option<Resume>,

    /// Print one JSON object: the task record and a report
    #[arg(long)]
    pub json: bool,

    /// Print errors only, no progress and no summary
    #[arg(long, short, conflicts_with = "json")]
    pub quiet: bool,
}

/// Whether a sweep resumes from a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Resume {
    /// Resume; without a checkpoint this is an error
    Always,
    /// Resume if there is a checkpoint, else start a new sweep
    Auto,
}

/// What a command that sweeps prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Show {
    /// Progress, and the summary at the end.
    Text,
    /// Progress, and one JSON object at the end.
    Json,
    /// Errors only: no progress and no summary.
    Quiet,
}

impl Show {
    /// By the options `--json` and `--quiet`; clap refuses both together.
    pub(super) fn of(json: bool, quiet: bool) -> Self {
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
/// A stdout that cannot be written. Everything else is printed here and becomes an exit code.
pub(super) async fn run(args: ScanArgs, matches: &ArgMatches) -> anyhow::Result<Exit> {
    let (settings, conn) = match load(&args.server, matches) {
        Ok(loaded) => loaded,
        Err(problems) => return Ok(usage(&problems)),
    };
    sweep(settings, conn, args.resume, Show::of(args.json, args.quiet), Until::Done).await
}

/// When a task from the command line ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Until {
    /// A sweep ends once every DB is swept.
    Done,
    /// A keep run ends by a signal, or after this time.
    Stopped(Option<Duration>),
}

/// The settings of one sweep from the command line, the environment and the settings file, without the bounds of a keep run, and the
/// options of its connections.
///
/// # Errors
/// Every problem of the settings, or of the files of TLS.
pub(super) fn load(server: &ServerArgs, matches: &ArgMatches) -> Result<(Settings, ConnOptions), Vec<Problem>> {
    let settings = load_with_bounds(server, matches)?.without_bounds();
    let conn = tasks::conn_options(&settings).map_err(|problem| vec![problem])?;
    Ok((settings, conn))
}

/// The settings as [`load`] reads them, with the bounds of a keep run.
///
/// # Errors
/// Every problem of the settings.
pub(super) fn load_with_bounds(server: &ServerArgs, matches: &ArgMatches) -> Result<Settings, Vec<Problem>> {
    let raw = args::layers(matches, server.config.as_ref())?;
    settings::resolve(&raw, password(server.askpass)?)
}

/// The password typed on the terminal (`ask`), else the one in REDISCLI_AUTH. Ctrl-C at the prompt ends the process.
///
/// # Errors
/// A terminal that cannot be read.
pub(super) fn password(ask: bool) -> Result<Option<GivenPassword>, Vec<Problem>> {
    if ask {
        let typed = askpass::ask("password: ").map_err(|e| {
            vec![Problem { origin: None, message: format!("--askpass: the terminal cannot be read: {e}") }]
        })?;
        // Exits at once: nothing has been started that would need to be stopped.
        let Some(secret) = typed else { std::process::exit(Exit::Interrupted as i32) };
        let origin = Origin::Flag("--askpass".to_owned());
        return Ok(Some(GivenPassword { secret, origin }));
    }
    let origin = Origin::Env("REDISCLI_AUTH".to_owned());
    Ok(settings::password_in_env("REDISCLI_AUTH").map(|secret| GivenPassword { secret, origin }))
}

/// Prints the problems of arguments or settings, one line each, and returns the exit code for them.
pub(super) fn usage(problems: &[Problem]) -> Exit {
    for problem in problems {
        output::note(&format!("error: {problem}"));
    }
    Exit::Usage
}

/// The instance id in the records of a target that no settings file names: the same for the same address.
pub(super) fn instance_id(target: &Target) -> String {
    Uuid::new_v5(&Uuid::NAMESPACE_URL, target.to_string().as_bytes()).to_string()
}

/// Runs one task with progress, summary and signal handling.
///
/// # Errors
/// A stdout that cannot be written.
pub(super) async fn sweep(
    settings: Settings,
    conn: ConnOptions,
    resume: Option<Resume>,
    show: Show,
    until: Until,
) -> anyhow::Result<Exit> {
    let signals = StopSignals::listen();
    let running = match begin(&settings, conn, resume).await {
        Ok(running) => running,
        Err(failure) => {
            output::note(&output::failure_text(&failure));
            return Ok(if failure.kind == FailureKind::Store { Exit::Failed } else { Exit::Usage });
        }
    };
    // A keep run never ends by itself: stopping it is success, and stopping a sweep is an interruption.
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
        // Waits for the last line of progress, so that the summary comes below it.
        let _ = shown.await;
    }
    report(&view, &settings, show)?;
    Ok(exit_of(&view))
}

async fn begin(settings: &Settings, conn: ConnOptions, resume: Option<Resume>) -> Result<RunningTask, Failure> {
    let store = match &settings.state {
        Some(path) if resume == Some(Resume::Always) && !path.exists() => {
            let failure = Failure::new(FailureKind::NoSuchDb, format!("there is no state file {}", path.display()));
            return Err(failure.hint("start without --resume, or with --resume=auto, which creates the file"));
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
                    failure.hint("name the same DBs, use another state file, or start a new sweep without --resume")
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
                output::note("note: the unfinished sweep in the state file is given up; --resume would continue it");
            }
            service.create(&spec).await.map_err(|e| e.to_failure())?
        }
    };
    service.start(task, spec).await.map_err(|e| e.to_failure())
}

/// The DBs of a sweep in words, for error messages.
fn dbs_of(sweep: &SweepTexts) -> String {
    let text = sweep.get("db").map_or("", String::as_str);
    let dbs: BTreeSet<&str> = text.split([',', ' ']).filter(|db| !db.is_empty()).collect();
    match dbs.len() {
        0 => "each DB that holds keys with a TTL".to_owned(),
        _ => format!("DB {}", dbs.into_iter().collect::<Vec<_>>().join(",")),
    }
}

/// The signals that stop a sweep: SIGINT, SIGTERM, and SIGHUP unless it was ignored when the process started (nohup). The first one
/// ends the sweep after the batch under way, the second one ends the process at once.
struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Option<Signal>,
}

impl StopSignals {
    /// Listens from now on: a signal that arrives before [`Self::obey`] runs is kept for it. `None` if the handlers cannot be installed.
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
            output::note("stopping after this batch; a second signal stops at once");
            control.stop(reason);
        }
    }
}

/// Whether SIGHUP was ignored when the process started. True where /proc does not tell: the signal's action is then left unchanged.
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
        output::note(&format!("the checkpoint is kept; resume with --state {} --resume", path.display()));
    }
    Ok(())
}

fn exit_of(view: &TaskView) -> Exit {
    let met = view.snapshot.shards.values().any(|shard| shard.server.is_some());
    let swept = view.snapshot.passes().any(|pass| pass.counters.batches > 0);
    Exit::of_task(Some(view.task.state), view.task.failure.as_ref(), met, swept)
}
