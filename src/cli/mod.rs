//! The command line: parses the arguments, calls the library, prints the result. One file per subcommand.

mod args;
mod askpass;
mod autoscan;
mod check;
mod client;
mod daemons;
mod demo;
pub mod exit;
mod forecast;
mod generate;
mod health;
mod instance;
mod keep;
mod output;
mod priority;
mod progress;
mod scan;
mod serve;
mod settings;
#[cfg(target_os = "linux")]
mod starved;
mod store;
mod task;

use std::ffi::OsString;
use std::os::unix::process::CommandExt;

use clap::{ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::cli::exit::Exit;
use crate::node::tls;
use crate::store::StoreError;
use crate::telemetry::{self, LogFormat};

/// Frees the memory of expired keys that Redis and Valkey still hold.
///
/// Redis frees an expired key when a client accesses it or when its own expiry cycle samples it, and that cycle stops
/// trying while about 10 % of its sample have expired. ttlsweep walks the keyspace with SCAN, which frees the expired
/// keys that it meets, in batches so short that other clients do not notice them. It never deletes a live key and needs
/// no right to read or write one.
#[derive(Debug, Parser)]
#[command(name = "ttlsweep", version, after_help = exit::HELP)]
pub struct Cli {
    #[command(subcommand)]
    command: CliCommand,

    /// Log to stderr; twice for more detail
    #[arg(long, short, action = ArgAction::Count, global = true)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Sweep a server once, now
    Scan(scan::ScanArgs),
    /// Keep the expired keys of a server below a bound, until stopped
    Keep(keep::KeepArgs),
    /// Run the daemon: API, schedules and web page
    Serve(serve::ServeArgs),
    /// The instances of a daemon: list, show, check, keep below a bound
    Instance(instance::InstanceArgs),
    /// The tasks of a daemon: list, create, follow, pause, cancel
    Task(task::TaskArgs),
    /// The automatic scan of an instance of a daemon
    Autoscan(autoscan::AutoscanArgs),
    /// List the daemons that share one database
    Daemons(daemons::DaemonsArgs),
    /// Check the health of a daemon
    Health(health::HealthArgs),
    /// Inspect a server without changing anything: backlog, rights, what a sweep would meet
    Check(check::CheckArgs),
    /// Estimate which keys expire when, from a sample of the keys on a replica
    Forecast(forecast::ForecastArgs),
    /// Show the problem and the sweep on a private server
    Demo(demo::DemoArgs),
    /// Show the settings in force and where each came from; check a settings file
    Settings(settings::SettingsArgs),
    /// Copy the records of a daemon that is stopped
    Store(store::StoreArgs),
    /// Print the completion script of a shell: bash, zsh, fish, elvish, powershell
    Completions(generate::CompletionsArgs),
    /// Write the man pages into a folder
    Man(generate::ManArgs),
}

/// Parses the command line and runs it to its end.
pub fn main() -> Exit {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if let Some(error) = drop_empty_variables(&arguments) {
        output::note(&format!("error: cannot restart this program without its empty environment variables: {error}"));
        return Exit::Failed;
    }
    let matches = match Cli::command().try_get_matches_from(&arguments) {
        Ok(matches) => matches,
        Err(error) => return usage(&error),
    };
    if let Some(error) = hide_password(&arguments, &matches) {
        output::note(&format!("error: cannot hide the password of the URL from the process list: {error}"));
        output::note("  hint: give the password by REDISCLI_AUTH or --password-file instead");
        return Exit::Failed;
    }
    tls::install_provider();
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    match &cli.command {
        // The daemon logs at level info by default: its log is all that an operator sees of it.
        CliCommand::Serve(serve) => telemetry::init(cli.verbose + 1, serve.log_format),
        _ => telemetry::init(cli.verbose, LogFormat::Text),
    }
    let _traces = telemetry::trace();
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let sweeps_here = match &cli.command {
        CliCommand::Scan(scan) => Some((scan.priority, scan.quiet)),
        CliCommand::Keep(keep) => Some((keep.priority, keep.quiet)),
        _ => None,
    };
    if let Some((priority, quiet)) = sweeps_here {
        priority.apply(quiet);
        // One thread is enough for millions of keys per second. More threads wake each other and take processor time from a server
        // on the same machine.
        runtime.worker_threads(std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2)));
    }
    let inner = matches.subcommand().map_or(&matches, |(_, inner)| inner);
    let result = runtime.enable_all().build().map_err(anyhow::Error::from).and_then(|runtime| {
        let exit = runtime.block_on(dispatch(cli.command, inner));
        // Does not wait: a blocking read of the terminal may never return.
        runtime.shutdown_background();
        exit
    });
    result.unwrap_or_else(|error| {
        output::note(&format!("error: {}", output::chain(error.as_ref())));
        if let Some(hint) = error.downcast_ref::<StoreError>().and_then(StoreError::hint) {
            output::note(&format!("  hint: {hint}"));
        }
        Exit::Failed
    })
}

async fn dispatch(command: CliCommand, matches: &clap::ArgMatches) -> anyhow::Result<Exit> {
    match command {
        CliCommand::Scan(args) => scan::run(args, matches).await,
        CliCommand::Keep(args) => keep::run(args, matches).await,
        CliCommand::Serve(args) => serve::run(args).await,
        CliCommand::Check(args) => check::run(args, matches).await,
        CliCommand::Forecast(args) => forecast::run(args, matches).await,
        CliCommand::Demo(args) => demo::run(args).await,
        CliCommand::Instance(args) => instance::run(args).await,
        CliCommand::Task(args) => task::run(args).await,
        CliCommand::Daemons(args) => daemons::run(args).await,
        CliCommand::Autoscan(args) => autoscan::run(args).await,
        CliCommand::Health(args) => health::run(&args).await,
        CliCommand::Settings(args) => settings::run(args, matches),
        CliCommand::Store(args) => store::run(args).await,
        CliCommand::Completions(args) => generate::completions(&args),
        CliCommand::Man(args) => generate::man(&args),
    }
}

/// Prints clap's own message. `--help` and `--version` are success, also where stdout is a closed pipe.
fn usage(error: &clap::Error) -> Exit {
    let _ = error.print();
    if error.use_stderr() { Exit::Usage } else { Exit::Done }
}

/// The arguments that are URLs and may hold a password, each with its environment variable. The positional one comes
/// last: an argument with the same text as the value of a flag is gone by then.
const URLS: [(&str, &str); 2] = [("replica", "TTLSWEEP_REPLICA"), ("url", "TTLSWEEP_URL")];

/// Restarts this program without its empty environment variables: `${NAME:-}` in a compose file sets an empty one and means none.
/// Returns only if there are none, or with the error.
fn drop_empty_variables(arguments: &[OsString]) -> Option<std::io::Error> {
    let ours = |name: &OsString| name.to_str().is_some_and(|name| name.starts_with(args::PREFIX));
    let empty = std::env::vars_os().filter(|(name, value)| value.is_empty() && ours(name));
    let empty: Vec<OsString> = empty.map(|(name, _)| name).collect();
    if empty.is_empty() {
        return None;
    }
    Some(restart(|program| {
        for name in &empty {
            program.env_remove(name);
        }
        program.args(arguments.iter().skip(1))
    }))
}

/// Restarts this program with the URLs that hold a password in its environment and not in its arguments: every user of the
/// machine can read the arguments of a process, and only its own user the environment. Returns only if no argument holds
/// a password, or with the error.
fn hide_password(arguments: &[OsString], matches: &clap::ArgMatches) -> Option<std::io::Error> {
    let (rest, hidden) = without_secrets(arguments, matches);
    if hidden.is_empty() {
        return None;
    }
    let typed: Vec<&str> = hidden.iter().map(|(variable, _)| *variable).collect();
    let typed = typed.join(",");
    Some(restart(|program| program.args(rest).envs(hidden).env(args::TYPED, typed)))
}

/// Replaces this process by the same program with other arguments or variables. Returns only an error.
fn restart(change: impl FnOnce(&mut std::process::Command) -> &mut std::process::Command) -> std::io::Error {
    match std::env::current_exe() {
        Ok(program) => change(&mut std::process::Command::new(program)).exec(),
        Err(error) => error,
    }
}

/// The arguments after the program's name without the URLs that hold a password, and these URLs as environment variables.
fn without_secrets(arguments: &[OsString], matches: &clap::ArgMatches) -> (Vec<OsString>, Vec<(&'static str, String)>) {
    let mut inner = matches;
    while let Some((_, deeper)) = inner.subcommand() {
        inner = deeper;
    }
    let mut rest: Vec<OsString> = arguments.iter().skip(1).cloned().collect();
    let mut hidden = Vec::new();
    for (id, variable) in URLS {
        let Ok(Some(url)) = inner.try_get_one::<String>(id) else { continue };
        // The scheme may be missing: `ann:pw@host` is a URL too.
        let behind_scheme = url.split_once("://").map_or(url.as_str(), |(_, rest)| rest);
        let has_password = behind_scheme.rsplit_once('@').is_some_and(|(userinfo, _)| userinfo.contains(':'));
        if !has_password || inner.value_source(id) != Some(clap::parser::ValueSource::CommandLine) {
            continue;
        }
        let flag = format!("--{id}");
        let mut kept: Vec<OsString> = Vec::with_capacity(rest.len());
        for argument in rest {
            let is_value = kept.last().is_some_and(|last| last.to_str() == Some(&flag));
            if argument.to_str() == Some(url) && (is_value || id == "url") {
                if is_value {
                    kept.pop();
                }
            } else if argument.to_str() != Some(&format!("{flag}={url}")) {
                kept.push(argument);
            }
        }
        rest = kept;
        hidden.push((variable, url.clone()));
    }
    (rest, hidden)
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
        // `keep` takes every key: those of `scan` and the bounds.
        let keep = command.find_subcommand("keep").unwrap();
        for key in crate::settings::raw::KEYS.iter() {
            let id = key.replace('-', "_");
            let argument = keep.get_arguments().find(|a| a.get_id() == id.as_str());
            let argument = argument.unwrap_or_else(|| panic!("no flag for `{key}`"));
            let env = argument.get_env().and_then(|e| e.to_str());
            assert_eq!(env, Some(format!("TTLSWEEP_{}", id.to_uppercase()).as_str()));
        }
    }
    #[track_caller]
    fn check_hidden(line: &str, rest: &str, hidden: &[(&str, &str)]) {
        let arguments: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let matches = Cli::command().try_get_matches_from(&arguments).unwrap();
        let (kept, variables) = without_secrets(&arguments, &matches);
        assert_eq!(kept.join(std::ffi::OsStr::new(" ")), rest);
        let variables: Vec<_> = variables.iter().map(|(name, url)| (*name, url.as_str())).collect();
        assert_eq!(variables, hidden);
    }

    #[test]
    fn urls_with_a_password_leave_the_arguments_and_others_stay() {
        check_hidden("ttlsweep scan redis://h --db 0", "scan redis://h --db 0", &[]);
        check_hidden("ttlsweep scan redis://ann@h", "scan redis://ann@h", &[]);
        check_hidden("ttlsweep scan ann:pw@h:7000", "scan", &[("TTLSWEEP_URL", "ann:pw@h:7000")]);
        check_hidden("ttlsweep -v scan redis://:pw@h --db 0", "-v scan --db 0", &[("TTLSWEEP_URL", "redis://:pw@h")]);
        check_hidden(
            "ttlsweep check redis://:a@h --replica redis://:b@r --json",
            "check --json",
            &[("TTLSWEEP_REPLICA", "redis://:b@r"), ("TTLSWEEP_URL", "redis://:a@h")],
        );
        check_hidden(
            "ttlsweep check --replica=redis://:b@r redis://h",
            "check redis://h",
            &[("TTLSWEEP_REPLICA", "redis://:b@r")],
        );
        check_hidden(
            "ttlsweep check --replica redis://:a@h redis://:a@h",
            "check",
            &[("TTLSWEEP_REPLICA", "redis://:a@h"), ("TTLSWEEP_URL", "redis://:a@h")],
        );
        check_hidden(
            "ttlsweep settings show redis://:a@h --json",
            "settings show --json",
            &[("TTLSWEEP_URL", "redis://:a@h")],
        );
    }
}
