//! `ttlsweep keep`: sweeps again and again to keep a bound on expired keys.

use std::time::Duration;

use clap::{ArgMatches, Args};

use crate::cli::args::{self, ServerArgs, SweepArgs};
use crate::cli::exit::Exit;
use crate::cli::output;
use crate::cli::priority::Priority;
use crate::cli::scan::{self, Show, Until};
use crate::settings::positive_duration;
use crate::tasks;

/// `ttlsweep keep`
#[derive(Debug, Args)]
#[command(after_help = args::keep_examples(), mut_arg("timeout", |timeout| timeout.hide(true)))]
#[command(mut_arg("parallel", |parallel| parallel.hide(true)), mut_arg("allow_slow", |slow| slow.hide(true)))]
#[command(mut_arg("state", |state| state.hide(true)), mut_arg("assist_expiry", |assist| assist.hide(true)))]
pub(super) struct KeepArgs {
    /// How to reach the server.
    #[command(flatten)]
    pub server: ServerArgs,

    /// Most expired keys in memory on each master: a share of its keys with a TTL (5%), a number of keys, or bytes (64MiB)
    #[arg(long, env = "TTLSWEEP_MAX_BACKLOG", value_name = "SIZE")]
    pub max_backlog: Option<String>,

    /// Longest time that a key stays in memory after it has expired, such as 2s
    #[arg(long, env = "TTLSWEEP_MAX_DELAY", value_name = "TIME")]
    pub max_delay: Option<String>,

    /// Stop after this time [default: run until a signal]
    #[arg(long = "for", value_name = "TIME", value_parser = positive_duration)]
    pub keep_for: Option<Duration>,

    /// How to sweep.
    #[command(flatten)]
    pub sweep: SweepArgs,

    /// CPU priority of this process: low (nice 5), normal, idle (only on otherwise idle processors)
    #[arg(long, env = "TTLSWEEP_PRIORITY", value_name = "WORD", default_value = "low")]
    #[arg(hide_possible_values = true, hide_env_values = true)]
    pub priority: Priority,

    /// Print one JSON object at the end: the task record and a report
    #[arg(long)]
    pub json: bool,

    /// Print errors only, no status and no summary
    #[arg(long, short, conflicts_with = "json")]
    pub quiet: bool,
}

/// Runs the command.
///
/// # Errors
/// A stdout that cannot be written. Everything else is printed here and becomes an exit code.
pub(super) async fn run(args: KeepArgs, matches: &ArgMatches) -> anyhow::Result<Exit> {
    let settings = match scan::load_with_bounds(&args.server, matches) {
        Ok(settings) => settings,
        Err(problems) => return Ok(scan::usage(&problems)),
    };
    if !settings.scan.tuning.bounds.any() {
        output::note("error: no bound is set: give --max-backlog (such as 5%), --max-delay (such as 2s), or both");
        return Ok(Exit::Usage);
    }
    let conn = match tasks::conn_options(&settings) {
        Ok(conn) => conn,
        Err(problem) => return Ok(scan::usage(&[problem])),
    };
    scan::sweep(settings, conn, None, Show::of(args.json, args.quiet), Until::Stopped(args.keep_for)).await
}
