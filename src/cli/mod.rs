//! The command line: parse, hand over, print. One file per subcommand.

pub mod args;
pub mod exit;
pub mod output;
pub mod progress;
pub mod scan;
pub mod settings;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::unix::process::CommandExt;

use clap::{ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::cli::exit::Exit;
use crate::node::tls;

/// Frees the memory of expired keys that Redis and Valkey still hold.
///
/// Redis frees an expired key when somebody touches it or when its own cycle meets it, and that cycle stops trying at
/// about 10 % leftovers. ttlsweep walks the keyspace with SCAN, which frees what it meets, in batches so short that
/// other clients do not feel them. It never deletes a live key and needs no right to read or write one.
#[derive(Debug, Parser)]
#[command(name = "ttlsweep", version, after_help = exit::HELP)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Say more on stderr; twice for still more
    #[arg(long, short, action = ArgAction::Count, global = true)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Sweep a server once, now
    Scan(scan::ScanArgs),
    /// Show what is in force and where it came from
    Settings(settings::SettingsArgs),
}

/// Parses the command line and runs it to its end.
pub fn main() -> Exit {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let matches = match Cli::command().try_get_matches_from(&arguments) {
        Ok(matches) => matches,
        Err(error) => return usage(&error),
    };
    if let Some(error) = hide_password(&arguments, &matches) {
        output::note(&format!("error: cannot hide the password of the URL from the process list: {error}"));
        output::note("  hint: give it by REDISCLI_AUTH or --password-file instead");
        return Exit::Failed;
    }
    tls::install_provider();
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    log_to_stderr(cli.verbose);
    let inner = matches.subcommand().map_or(&matches, |(_, inner)| inner);
    let result =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(anyhow::Error::from).and_then(
            |runtime| {
                let exit = runtime.block_on(dispatch(cli.command, inner));
                // A blocking read of the terminal may still stand there; nothing else is worth waiting for.
                runtime.shutdown_background();
                exit
            },
        );
    result.unwrap_or_else(|error| {
        output::note(&format!("error: {error:#}"));
        Exit::Failed
    })
}

async fn dispatch(command: Command, matches: &clap::ArgMatches) -> anyhow::Result<Exit> {
    match command {
        Command::Scan(args) => scan::run(args, matches).await,
        Command::Settings(args) => settings::run(args, matches),
    }
}

/// clap's own messages; `--help` and `--version` are success, also into a closed pipe.
fn usage(error: &clap::Error) -> Exit {
    let _ = error.print();
    if error.use_stderr() { Exit::Usage } else { Exit::Done }
}

/// Starts this program again without the URL among its arguments, where that holds a password: everybody on the
/// machine can read a process's arguments, but only its user the environment. Returns only if nothing had to be hidden
/// or if it failed.
fn hide_password(arguments: &[OsString], matches: &clap::ArgMatches) -> Option<std::io::Error> {
    let (_, mut inner) = matches.subcommand()?;
    while let Some((_, deeper)) = inner.subcommand() {
        inner = deeper;
    }
    if inner.try_contains_id("url").ok()? && inner.value_source("url") == Some(clap::parser::ValueSource::CommandLine) {
        let url = inner.get_one::<String>("url")?;
        let has_password = url
            .split_once("://")
            .is_some_and(|(_, rest)| rest.rsplit_once('@').is_some_and(|(userinfo, _)| userinfo.contains(':')));
        if has_password {
            let rest = arguments.iter().skip(1).filter(|&argument| argument.to_str() != Some(url));
            let program = std::env::current_exe().ok()?;
            return Some(std::process::Command::new(program).args(rest).env("TTLSWEEP_URL", url).exec());
        }
    }
    None
}

fn log_to_stderr(verbose: u8) {
    let level = match verbose {
        0 => "off",
        1 => "ttlsweep=info",
        _ => "ttlsweep=debug",
    };
    let filter = EnvFilter::try_from_env("TTLSWEEP_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_setting_has_a_flag_and_an_environment_variable() {
        let command = Cli::command();
        let scan = command.find_subcommand("scan").unwrap();
        for key in crate::settings::raw::KEYS {
            let id = key.replace('-', "_");
            let argument = scan.get_arguments().find(|a| a.get_id() == id.as_str());
            let argument = argument.unwrap_or_else(|| panic!("no flag for `{key}`"));
            let env = argument.get_env().and_then(|e| e.to_str());
            assert_eq!(env, Some(format!("TTLSWEEP_{}", id.to_uppercase()).as_str()));
        }
    }
}
