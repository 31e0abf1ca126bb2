//! The command line: parse, hand over, print. One file per subcommand.

pub mod args;
mod askpass;
pub mod autoscan;
pub mod check;
pub mod client;
pub mod daemons;
pub mod demo;
pub mod exit;
pub mod forecast;
pub mod generate;
pub mod health;
pub mod instance;
pub mod keep;
pub mod output;
pub mod priority;
pub mod progress;
pub mod scan;
pub mod serve;
pub mod settings;
#[cfg(target_os = "linux")]
mod starved;
pub mod store;
pub mod task;

use std::ffi::OsString;
use std::os::unix::process::CommandExt;

use clap::{ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::cli::exit::Exit;
use crate::node::tls;
use crate::store::StoreError;
use crate::telemetry::{self, LogFormat};

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
    /// Keep the expired keys of a server below a bound, until stopped
    Keep(keep::KeepArgs),
    /// Run the daemon: API, schedules, page
    Serve(serve::ServeArgs),
    /// The instances of a daemon
    Instance(instance::InstanceArgs),
    /// The tasks of a daemon: list, create, follow, pause, cancel
    Task(task::TaskArgs),
    /// The automatic scan of an instance of a daemon
    Autoscan(autoscan::AutoscanArgs),
    /// The daemons that share the records of a daemon
    Daemons(daemons::DaemonsArgs),
    /// Ask whether a daemon is well
    Health(health::HealthArgs),
    /// Look at a server and touch nothing: backlog, rights, what a sweep would meet
    Check(check::CheckArgs),
    /// See what will expire when, by a sample of the keys on a replica
    Forecast(forecast::ForecastArgs),
    /// See the problem and the cure on a private server
    Demo(demo::DemoArgs),
    /// Show what is in force and where it came from
    Settings(settings::SettingsArgs),
    /// The records of a daemon, while it does not run: copy them elsewhere
    Store(store::StoreArgs),
    /// Print the completions of a shell: bash, zsh, fish, elvish, powershell
    Completions(generate::CompletionsArgs),
    /// Write the man pages into a folder
    Man(generate::ManArgs),
}

/// Parses the command line and runs it to its end.
pub fn main() -> Exit {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if let Some(error) = drop_empty_variables(&arguments) {
        output::note(&format!("error: cannot start without the empty variables of the environment: {error}"));
        return Exit::Failed;
    }
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
    match &cli.command {
        // Nobody sits before a daemon: it tells by itself what an operator wants to know.
        Command::Serve(serve) => telemetry::init(cli.verbose + 1, serve.log_format),
        _ => telemetry::init(cli.verbose, LogFormat::Text),
    }
    let _traces = telemetry::trace();
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let here = match &cli.command {
        Command::Scan(scan) => Some((scan.priority, scan.quiet)),
        Command::Keep(keep) => Some((keep.priority, keep.quiet)),
        _ => None,
    };
    if let Some((priority, quiet)) = here {
        priority.apply(quiet);
        // One thread is enough for millions of keys a second, and threads that wake one another are in the server's way.
        runtime.worker_threads(std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2)));
    }
    let inner = matches.subcommand().map_or(&matches, |(_, inner)| inner);
    let result = runtime.enable_all().build().map_err(anyhow::Error::from).and_then(|runtime| {
        let exit = runtime.block_on(dispatch(cli.command, inner));
        // A blocking read of the terminal may still stand there; nothing else is worth waiting for.
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

async fn dispatch(command: Command, matches: &clap::ArgMatches) -> anyhow::Result<Exit> {
    match command {
        Command::Scan(args) => scan::run(args, matches).await,
        Command::Keep(args) => keep::run(args, matches).await,
        Command::Serve(args) => serve::run(args).await,
        Command::Check(args) => check::run(args, matches).await,
        Command::Forecast(args) => forecast::run(args, matches).await,
        Command::Demo(args) => demo::run(args).await,
        Command::Instance(args) => instance::run(args).await,
        Command::Task(args) => task::run(args).await,
        Command::Daemons(args) => daemons::run(args).await,
        Command::Autoscan(args) => autoscan::run(args).await,
        Command::Health(args) => health::run(&args).await,
        Command::Settings(args) => settings::run(args, matches),
        Command::Store(args) => store::run(args).await,
        Command::Completions(args) => generate::completions(&args),
        Command::Man(args) => generate::man(&args),
    }
}

/// clap's own messages; `--help` and `--version` are success, also into a closed pipe.
fn usage(error: &clap::Error) -> Exit {
    let _ = error.print();
    if error.use_stderr() { Exit::Usage } else { Exit::Done }
}

/// Arguments that are URLs and may hold a password, each with the environment variable that does as well. The
/// positional one comes last: what is left of its text then is not the value of a flag.
const URLS: [(&str, &str); 2] = [("replica", "TTLSWEEP_REPLICA"), ("url", "TTLSWEEP_URL")];

/// Starts this program again without those of its variables that are empty: `${NAME:-}` of a compose file is none. Returns only
/// if there are none or if it failed.
fn drop_empty_variables(arguments: &[OsString]) -> Option<std::io::Error> {
    let ours = |name: &OsString| name.to_str().is_some_and(|name| name.starts_with(args::PREFIX));
    let empty = std::env::vars_os().filter(|(name, value)| value.is_empty() && ours(name));
    let empty: Vec<OsString> = empty.map(|(name, _)| name).collect();
    if empty.is_empty() {
        return None;
    }
    Some(again(|program| {
        for name in &empty {
            program.env_remove(name);
        }
        program.args(arguments.iter().skip(1))
    }))
}

/// Starts this program again without the URLs among its arguments that hold a password: everybody on the machine can
/// read a process's arguments, but only its user the environment. Returns only if nothing had to be hidden or if it
/// failed.
fn hide_password(arguments: &[OsString], matches: &clap::ArgMatches) -> Option<std::io::Error> {
    let (rest, hidden) = without_secrets(arguments, matches);
    if hidden.is_empty() {
        return None;
    }
    let typed: Vec<&str> = hidden.iter().map(|(variable, _)| *variable).collect();
    let typed = typed.join(",");
    Some(again(|program| program.args(rest).envs(hidden).env(args::TYPED, typed)))
}

/// Puts this program in its own place, with other arguments or variables. Returns only if it failed.
fn again(change: impl FnOnce(&mut std::process::Command) -> &mut std::process::Command) -> std::io::Error {
    match std::env::current_exe() {
        Ok(program) => change(&mut std::process::Command::new(program)).exec(),
        Err(error) => error,
    }
}

/// The arguments behind the program's name without URLs that hold a password, and those as environment variables.
fn without_secrets(arguments: &[OsString], matches: &clap::ArgMatches) -> (Vec<OsString>, Vec<(&'static str, String)>) {
    let mut inner = matches;
    while let Some((_, deeper)) = inner.subcommand() {
        inner = deeper;
    }
    let mut rest: Vec<OsString> = arguments.iter().skip(1).cloned().collect();
    let mut hidden = Vec::new();
    for (id, variable) in URLS {
        let Ok(Some(url)) = inner.try_get_one::<String>(id) else { continue };
        // A URL may lack its scheme.
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
        // It has those of `scan`, and its bounds.
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
