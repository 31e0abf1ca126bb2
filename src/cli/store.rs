//! `ttlsweep store`: the records of a daemon, while it does not run.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::cli::exit::Exit;
use crate::cli::{client, output, scan};
use crate::settings::raw::Problem;
use crate::settings::store::StoreLocation;
use crate::store::{Amount, Store};

/// `ttlsweep store`
#[derive(Debug, Args)]
pub struct StoreArgs {
    #[command(subcommand)]
    command: StoreCommand,
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// Copy all records from one place to another: from an SQLite file to PostgreSQL, or back
    #[command(after_help = COPY_HELP)]
    Copy(CopyArgs),
}

const COPY_HELP: &str = "\
Stop the daemons of both places first. A copy that was cut goes on when it is begun again. Passwords come from PGPASSWORD or
~/.pgpass, as for psql.

Examples:
  ttlsweep store copy --from sqlite:/var/lib/ttlsweep/ttlsweep.db --to postgres://ttlsweep@db.example/ttlsweep
  ttlsweep store copy --from postgres://ttlsweep@db.example/ttlsweep --to sqlite:backup.db --json";

#[derive(Debug, Args)]
struct CopyArgs {
    /// Where the records are: sqlite:FILE or postgres://USER@HOST/DATABASE
    #[arg(long, value_name = "URL")]
    from: String,

    /// Where they go
    #[arg(long, value_name = "URL")]
    to: String,

    /// The folder of batch journals that belongs to a PostgreSQL database
    #[arg(long, value_name = "FOLDER", default_value = "ttlsweep.tally")]
    journal: PathBuf,

    /// Print what there is on both ends as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Records that cannot be read or written.
pub async fn run(args: StoreArgs) -> anyhow::Result<Exit> {
    let StoreCommand::Copy(args) = args.command;
    let place = |text: &str| {
        StoreLocation::parse(text, None, &args.journal).map_err(|message| Problem { origin: None, message })
    };
    let (from, to) = match (place(&args.from), place(&args.to)) {
        (Ok(from), Ok(to)) => (from, to),
        (from, to) => {
            let problems: Vec<_> = [from.err(), to.err()].into_iter().flatten().collect();
            return Ok(scan::usage(&problems));
        }
    };
    if let StoreLocation::Sqlite(path) = &from
        && !path.exists()
    {
        output::note(&format!("error: there is no state file {}", path.display()));
        return Ok(Exit::Failed);
    }
    let (source, target) = (Store::open(&from).await?, Store::open(&to).await?);
    for (store, location) in [(&source, &from), (&target, &to)] {
        let Some(fleet) = store.fleet() else { continue };
        let names: Vec<_> = fleet.daemons().await?.into_iter().map(|daemon| daemon.record.name).collect();
        if !names.is_empty() {
            output::note(&format!("error: these daemons use the records in {location}: {}", names.join(", ")));
            output::note(
                "  hint: stop them; one that was killed is gone once its lease has run out and another daemon has run",
            );
            return Ok(Exit::Failed);
        }
    }
    let before = source.amount().await?;
    let bar =
        ProgressBar::new(before.tasks).with_style(ProgressStyle::with_template("{bar:40} {pos}/{len} tasks, {eta}")?);
    source.copy_to(&target, || bar.inc(1)).await?;
    bar.finish_and_clear();
    let after = target.amount().await?;
    source.close().await;
    target.close().await;
    let is_whole = holds(&before, &after);
    if args.json {
        client::print_json(&json!({ "from": shown(&before), "to": shown(&after), "complete": is_whole }))?;
    } else {
        let Amount { tasks, keys, auto_scans, due_times } = after;
        output::print(&format!(
            "{to} has {tasks} tasks that freed {keys} keys, {auto_scans} automatic scans, {due_times} due times\n"
        ))?;
    }
    if !is_whole {
        output::note(&format!("error: {from} has more: {before:?}; begin the copy again"));
    }
    Ok(if is_whole { Exit::Done } else { Exit::Failed })
}

/// Whether a place has all that another has. What was cut off may have freed more than its record said.
fn holds(from: &Amount, to: &Amount) -> bool {
    to.tasks >= from.tasks && to.keys >= from.keys && to.auto_scans >= from.auto_scans && to.due_times >= from.due_times
}

fn shown(amount: &Amount) -> serde_json::Value {
    let Amount { tasks, keys, auto_scans, due_times } = amount;
    json!({ "tasks": tasks, "reclaimed": keys, "auto_scans": auto_scans, "due_times": due_times })
}
