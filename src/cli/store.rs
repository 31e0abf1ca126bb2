//! `ttlsweep store`: copies the records of a daemon that is stopped.

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
pub(super) struct StoreArgs {
    #[command(subcommand)]
    command: StoreCommand,
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// Copy all records from an SQLite file to a PostgreSQL database, or back
    #[command(after_help = COPY_HELP)]
    Copy(CopyArgs),
}

const COPY_HELP: &str = "\
Stop the daemons of both places first. A copy that was interrupted continues when the same command is run again. Passwords
come from PGPASSWORD or ~/.pgpass, as for psql.

Examples:
  ttlsweep store copy --from sqlite:/var/lib/ttlsweep/ttlsweep.db --to postgres://ttlsweep@db.example/ttlsweep
  ttlsweep store copy --from postgres://ttlsweep@db.example/ttlsweep --to sqlite:backup.db --json";

#[derive(Debug, Args)]
struct CopyArgs {
    /// Where to copy from: sqlite:FILE or postgres://USER@HOST/DATABASE
    #[arg(long, value_name = "URL")]
    from: String,

    /// Where to copy to, in the same forms
    #[arg(long, value_name = "URL")]
    to: String,

    /// The folder of batch journals that belongs to a PostgreSQL database
    #[arg(long, value_name = "FOLDER", default_value = "ttlsweep.tally")]
    journal: PathBuf,

    /// Print how many records both places hold, as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Records that cannot be read or written.
pub(super) async fn run(args: StoreArgs) -> anyhow::Result<Exit> {
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
                "  hint: stop them; one that was killed stays listed until its lease has expired and another daemon has run",
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
            "{to} has {tasks} tasks that reclaimed {keys} keys, {auto_scans} automatic scans, {due_times} due times\n"
        ))?;
    }
    if !is_whole {
        output::note(&format!("error: the copy is not complete: {from} has more ({before:?}); run the command again"));
    }
    Ok(if is_whole { Exit::Done } else { Exit::Failed })
}

/// Whether a place has all records of another. It may count more keys: a task that was killed is copied with the counts of its batch
/// journal, which are newer than its record.
fn holds(from: &Amount, to: &Amount) -> bool {
    to.tasks >= from.tasks && to.keys >= from.keys && to.auto_scans >= from.auto_scans && to.due_times >= from.due_times
}

fn shown(amount: &Amount) -> serde_json::Value {
    let Amount { tasks, keys, auto_scans, due_times } = amount;
    json!({ "tasks": tasks, "reclaimed": keys, "auto_scans": auto_scans, "due_times": due_times })
}
