//! `ttlsweep settings`: shows the settings in force and where each came from, and checks a settings file.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::{ArgMatches, Args, Subcommand};

use crate::cli::args::{self, ServerArgs, SweepArgs};
use crate::cli::exit::Exit;
use crate::cli::{output, scan};
use crate::daemon;
use crate::settings::raw::{KEYS, Raw};
use crate::settings::{self, Settings};

/// `ttlsweep settings`
#[derive(Debug, Args)]
pub(super) struct SettingsArgs {
    #[command(subcommand)]
    command: SettingsCommand,
}

#[derive(Debug, Subcommand)]
enum SettingsCommand {
    /// Print every setting in force and where it came from
    Show(Box<ShowArgs>),
    /// Check a settings file of `ttlsweep serve` and print every problem
    Check(CheckFileArgs),
}

#[derive(Debug, Args)]
struct CheckFileArgs {
    /// The settings file
    file: PathBuf,
}

#[derive(Debug, Args)]
struct ShowArgs {
    #[command(flatten)]
    server: ServerArgs,

    #[command(flatten)]
    sweep: SweepArgs,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// A stdout that cannot be written.
pub(super) fn run(args: SettingsArgs, matches: &ArgMatches) -> anyhow::Result<Exit> {
    let show = match args.command {
        SettingsCommand::Show(show) => show,
        SettingsCommand::Check(check) => return self::check(&check),
    };
    let matches = matches.subcommand().map_or(matches, |(_, inner)| inner);
    let raw = match args::layers(matches, show.server.config.as_ref()) {
        Ok(raw) => raw,
        Err(problems) => return Ok(scan::usage(&problems)),
    };
    let password = match scan::password(show.server.askpass) {
        Ok(password) => password,
        Err(problems) => return Ok(scan::usage(&problems)),
    };
    match settings::resolve(&raw, password) {
        Ok(settings) => {
            let rows = rows(&raw, &settings);
            output::print(&if show.json { json(&rows)? } else { text(&rows) })?;
            Ok(Exit::Done)
        }
        Err(problems) => Ok(scan::usage(&problems)),
    }
}

fn check(args: &CheckFileArgs) -> anyhow::Result<Exit> {
    match daemon::load(&args.file) {
        Ok(settings) => {
            let instances = output::counted(settings.instances.len(), "instance");
            output::print(&format!("{}: valid, {instances}\n", args.file.display()))?;
            Ok(Exit::Done)
        }
        Err(problems) => Ok(scan::usage(&problems)),
    }
}

struct Row {
    key: &'static str,
    value: String,
    origin: String,
}

fn rows(raw: &Raw, settings: &Settings) -> Vec<Row> {
    let mut rows: Vec<Row> = KEYS
        .iter()
        .map(|key| {
            let (value, origin) = raw.get(key);
            let (value, origin) = match *key {
                // The URL may hold a password; the target does not.
                "url" => (settings.target.to_string(), origin.to_string()),
                // A URL that was typed overrides the key: its DB and its user are shown, with the URL's origin.
                "db" if settings.sweep_texts["db"] != value => {
                    (settings.sweep_texts["db"].clone(), raw.get("url").1.to_string())
                }
                "user" if settings.credentials.user.as_deref().is_some_and(|user| user != value) => {
                    (settings.credentials.user.clone().unwrap_or_default(), raw.get("url").1.to_string())
                }
                _ => (value.to_owned(), origin.to_string()),
            };
            Row { key, value, origin }
        })
        .collect();
    let origin = settings.password_from.as_ref().map_or_else(|| "none".to_owned(), ToString::to_string);
    let value = if settings.password_from.is_some() { "(hidden)" } else { "" };
    rows.push(Row { key: "password", value: value.to_owned(), origin });
    rows
}

fn text(rows: &[Row]) -> String {
    let width = rows.iter().map(|r| r.key.len() + r.value.len()).max().unwrap_or(0);
    let mut text = String::new();
    for Row { key, value, origin } in rows {
        let pad = width - key.len() - value.len();
        let _ = writeln!(text, "{key} = {value}{:pad$}  # {origin}", "");
    }
    text
}

fn json(rows: &[Row]) -> anyhow::Result<String> {
    let object: serde_json::Map<_, _> = rows
        .iter()
        .map(|row| (row.key.to_owned(), serde_json::json!({ "value": row.value, "origin": row.origin })))
        .collect();
    Ok(format!("{}\n", serde_json::to_string_pretty(&object)?))
}
