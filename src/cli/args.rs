//! The arguments that several subcommands share. Values are text here; `settings` parses and checks them.

use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory};

use crate::cli::{Cli, client, exit};
use crate::settings::raw::{KEYS, Origin, Problem, Raw};
use crate::telemetry;

/// Help of the URL argument. A constant, because rustdoc would read the square brackets of a doc comment as links.
const URL_HELP: &str = "Server, any node of a cluster, or sentinels: redis://[user[:password]@]host[:port][/db], \
                        rediss://... (TLS), redis+sentinel://host:26379,.../MASTER, unix:///path \
                        [default: redis://127.0.0.1:6379]";

/// How to reach the server and log in to it. Every field's default is in `default.toml`.
#[derive(Debug, Args)]
pub(super) struct ServerArgs {
    /// URL of the server; clap shows `URL_HELP` instead of this line.
    #[arg(value_name = "URL", env = "TTLSWEEP_URL", hide_env_values = true, help = URL_HELP)]
    pub url: Option<String>,

    /// ACL user
    #[arg(long, env = "TTLSWEEP_USER", value_name = "NAME", help_heading = "Connection")]
    pub user: Option<String>,

    /// File whose first line is the password (REDISCLI_AUTH works too)
    #[arg(long, env = "TTLSWEEP_PASSWORD_FILE", value_name = "FILE", help_heading = "Connection")]
    pub password_file: Option<String>,

    /// Ask for the password on the terminal
    #[arg(long, help_heading = "Connection")]
    pub askpass: bool,

    /// PEM file with the certificate authorities to trust (for rediss://) [default: the system's]
    #[arg(long, env = "TTLSWEEP_CACERT", value_name = "FILE", help_heading = "TLS")]
    pub cacert: Option<String>,

    /// PEM file with the client certificate, for a server that asks for one
    #[arg(long, env = "TTLSWEEP_CERT", value_name = "FILE", help_heading = "TLS")]
    pub cert: Option<String>,

    /// PEM file with the private key of the client certificate
    #[arg(long, env = "TTLSWEEP_KEY", value_name = "FILE", help_heading = "TLS")]
    pub key: Option<String>,

    /// Host name to send by SNI and to expect in the server's certificate [default: the host]
    #[arg(long, env = "TTLSWEEP_SNI", value_name = "HOST", help_heading = "TLS")]
    pub sni: Option<String>,

    /// Accept any certificate; whoever is in between can then read everything
    #[arg(long, env = "TTLSWEEP_INSECURE", value_name = "BOOL", help_heading = "TLS")]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub insecure: Option<String>,

    /// ACL user for the sentinels
    #[arg(long, env = "TTLSWEEP_SENTINEL_USER", value_name = "NAME", help_heading = "Topology")]
    pub sentinel_user: Option<String>,

    /// File whose first line is the password for the sentinels
    #[arg(long, env = "TTLSWEEP_SENTINEL_PASSWORD_FILE", value_name = "FILE", help_heading = "Topology")]
    pub sentinel_password_file: Option<String>,

    /// Reachable address of an announced node address, such as 10.0.0.5:6379=localhost:7001 or 10.0.0.5=gateway
    #[arg(long, env = "TTLSWEEP_NODE_MAP", value_name = "ANNOUNCED=REACHABLE", value_delimiter = ',')]
    #[arg(help_heading = "Topology")]
    pub node_map: Vec<String>,

    /// Sweep the master instead when a standalone server is or becomes a replica
    #[arg(long, env = "TTLSWEEP_FOLLOW", value_name = "BOOL", help_heading = "Topology")]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub follow: Option<String>,

    /// How long to wait for a connection [default: 5s]
    #[arg(long, env = "TTLSWEEP_CONNECT_TIMEOUT", value_name = "TIME", help_heading = "Connection")]
    pub connect_timeout: Option<String>,

    /// How long to wait for one reply [default: 30s]
    #[arg(long, env = "TTLSWEEP_RESPONSE_TIMEOUT", value_name = "TIME", help_heading = "Connection")]
    pub response_timeout: Option<String>,

    /// Settings file (TOML); the environment and the command line override it
    #[arg(long, env = "TTLSWEEP_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// The options that say how to sweep. Every field's default is in `default.toml`.
// The help below repeats the defaults; a test compares the two.
#[derive(Debug, Args)]
pub(super) struct SweepArgs {
    /// DBs to sweep, such as 0,3 [default: each DB that holds keys with a TTL]
    #[arg(long, env = "TTLSWEEP_DB", value_name = "N", value_delimiter = ',')]
    pub db: Vec<String>,

    /// COUNT of the first SCAN, 10 to 1000; it is then adapted to max-slice [default: 100]
    #[arg(long, env = "TTLSWEEP_COUNT", value_name = "KEYS", help_heading = "Pace")]
    pub count: Option<String>,

    /// How long one batch may hold the server [default: 50us]
    #[arg(long, env = "TTLSWEEP_MAX_SLICE", value_name = "TIME", help_heading = "Pace")]
    pub max_slice: Option<String>,

    /// Largest share of the server's time that batches may take, above 0 and up to 1 [default: 1]
    #[arg(long, env = "TTLSWEEP_INTENSITY", value_name = "SHARE", help_heading = "Pace")]
    pub intensity: Option<String>,

    /// Smallest share, while other clients keep the server busy [default: 0.05]
    #[arg(long, env = "TTLSWEEP_MIN_INTENSITY", value_name = "SHARE", help_heading = "Pace")]
    pub min_intensity: Option<String>,

    /// Most keys to scan per second on each master [default: no ceiling]
    #[arg(long, env = "TTLSWEEP_MAX_KEYS_PER_SEC", value_name = "KEYS", help_heading = "Pace")]
    pub max_keys_per_sec: Option<String>,

    /// Masters to sweep at the same time [default: one on each host]
    #[arg(long, env = "TTLSWEEP_PARALLEL", value_name = "N", help_heading = "Pace")]
    pub parallel: Option<String>,

    /// Watch the server's load, and hold or slow down for it [default: true]
    #[arg(long, env = "TTLSWEEP_THROTTLE", value_name = "BOOL", help_heading = "Load")]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub throttle: Option<String>,

    /// The same as --throttle=false: a fixed intensity, and no limit on latency, replicas, forks and lazy frees
    #[arg(long, help_heading = "Load")]
    pub no_throttle: bool,

    /// Hold while a PING takes longer (mean over 0.4 s) [default: 5 ms plus five times the time before]
    #[arg(long, env = "TTLSWEEP_MAX_LATENCY", value_name = "TIME", help_heading = "Load")]
    pub max_latency: Option<String>,

    /// Hold while a replica is further behind [default: 16MiB more than before]
    #[arg(long, env = "TTLSWEEP_MAX_REPLICA_LAG", value_name = "BYTES", help_heading = "Load")]
    pub max_replica_lag: Option<String>,

    /// Hold while a replica has been silent for longer [default: 10s more than before]
    #[arg(long, env = "TTLSWEEP_MAX_REPLICA_SILENCE", value_name = "TIME", help_heading = "Load")]
    pub max_replica_silence: Option<String>,

    /// Hold while more data waits to be sent to replicas [default: 32MiB more than before]
    #[arg(long, env = "TTLSWEEP_MAX_REPLICA_BUFFER", value_name = "BYTES", help_heading = "Load")]
    pub max_replica_buffer: Option<String>,

    /// Hold while more objects wait to be freed in the background [default: 100000 more than before]
    #[arg(long, env = "TTLSWEEP_MAX_LAZYFREE", value_name = "N", help_heading = "Load")]
    pub max_lazyfree: Option<String>,

    /// Hold while other clients send more commands per second [default: off]
    #[arg(long, env = "TTLSWEEP_MAX_OPS", value_name = "N", help_heading = "Load")]
    pub max_ops: Option<String>,

    /// Hold while other clients take a larger share of the main thread's time, 0 to 1 [default: off]
    #[arg(long, env = "TTLSWEEP_MAX_CPU", value_name = "SHARE", help_heading = "Load")]
    pub max_cpu: Option<String>,

    /// While the server saves, rewrites its AOF or sends a replica all its data: hold or go [default: hold]
    #[arg(long, env = "TTLSWEEP_DURING_FORK", value_name = "WORD", help_heading = "Load")]
    pub during_fork: Option<String>,

    /// Give up when a PING takes longer [default: off]
    #[arg(long, env = "TTLSWEEP_ABORT_LATENCY", value_name = "TIME", help_heading = "Load")]
    pub abort_latency: Option<String>,

    /// Give up when a replica is further behind [default: off]
    #[arg(long, env = "TTLSWEEP_ABORT_REPLICA_LAG", value_name = "BYTES", help_heading = "Load")]
    pub abort_replica_lag: Option<String>,

    /// Sweep even if keys expire faster than the sweep goes, which does harm on Redis and Valkey from 7.2 on
    #[arg(long, env = "TTLSWEEP_ALLOW_SLOW", value_name = "BOOL", help_heading = "Load")]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub allow_slow: Option<String>,

    /// First raise active-expire-effort for at most this long (needs CONFIG SET, and --state) [default: 0s]
    #[arg(long, env = "TTLSWEEP_ASSIST_EXPIRY", value_name = "TIME", help_heading = "Load")]
    pub assist_expiry: Option<String>,

    /// What SCAN returns: names, none (faster, proves less), auto (none on Redis from 8.2 on) [default: names]
    #[arg(long, env = "TTLSWEEP_PAYLOAD", value_name = "WORD")]
    pub payload: Option<String>,

    /// Command to send for each key that SCAN returned: auto, none, exists, ttl [default: auto]
    #[arg(long, env = "TTLSWEEP_TOUCH", value_name = "MODE")]
    pub touch: Option<String>,

    /// Longest time that the sweep may take [default: 360min]
    #[arg(long, env = "TTLSWEEP_TIMEOUT", value_name = "TIME")]
    pub timeout: Option<String>,

    /// How long to try to reconnect after a lost connection [default: 5min]
    #[arg(long, env = "TTLSWEEP_RETRY_FOR", value_name = "TIME", help_heading = "Connection")]
    pub retry_for: Option<String>,

    /// File to keep the task and its checkpoint in, for --resume
    #[arg(long, env = "TTLSWEEP_STATE", value_name = "FILE")]
    pub state: Option<String>,
}

/// The examples and exit codes below `scan --help`.
pub(super) fn scan_examples() -> String {
    format!(
        "\
Examples:
  ttlsweep scan                                         sweep the server on this machine
  ttlsweep scan redis://cache:6379 --max-slice 30us     shorter batches: gentler, slower
  ttlsweep scan unix:///run/redis.sock --db 0,3 --json  two DBs, with a JSON record
  ttlsweep scan rediss://node1 --parallel 3             a cluster over TLS, three masters at a time
  ttlsweep scan redis+sentinel://s1,s2,s3/mymaster      the master that these sentinels name
  ttlsweep scan --state sweep.db                        keep a checkpoint, for --resume

{}",
        exit::HELP
    )
}

/// The examples and exit codes below `keep --help`.
pub(super) fn keep_examples() -> String {
    format!(
        "\
Examples:
  ttlsweep keep --max-backlog 5%                        at most 5 % of the keys with a TTL expired
  ttlsweep keep redis://cache --max-delay 2s            `expired` events come at most 2 s late
  ttlsweep keep --max-backlog 64MiB --intensity 0.2     a bound in bytes, a fifth of the time
  ttlsweep keep --max-delay 5s --for 1h --json          for an hour, with a JSON record

{}",
        exit::HELP
    )
}

/// The examples and exit codes below `forecast --help`.
pub(super) fn forecast_examples() -> String {
    format!(
        "\
Examples:
  ttlsweep forecast redis://cache                       the next day, from a replica that is found
  ttlsweep forecast redis://m --replica redis://r:6379  from this replica
  ttlsweep forecast --on-master --within 1h             the next hour, slowly, on the master itself
  ttlsweep forecast redis://cache --by-prefix --depth 2 which groups of keys expire, which never do

{}",
        exit::HELP
    )
}

/// The examples and exit codes below `check --help`.
pub(super) fn check_examples() -> String {
    format!(
        "\
Examples:
  ttlsweep check                                        inspect the server on this machine
  ttlsweep check redis://cache --max-keys-per-sec 50000 would this sweep be refused, how long is it?
  ttlsweep check redis://m --replica redis://r:6379     count the expired keys exactly on a replica

{}",
        exit::HELP
    )
}

/// The settings of all layers, not parsed yet: defaults, overridden by the file, the environment and the command line.
///
/// # Errors
/// Misspelt variables of the environment, or every problem of the settings file, or flags that exclude each other.
pub(super) fn layers(matches: &ArgMatches, config: Option<&PathBuf>) -> Result<Raw, Vec<Problem>> {
    let misspelt = misspelt();
    if !misspelt.is_empty() {
        return Err(misspelt);
    }
    let mut raw = Raw::defaults();
    if let Some(path) = config {
        raw.add_file(path)?;
    }
    for key in KEYS.iter() {
        let id = key.replace('-', "_");
        let Ok(Some(values)) = matches.try_get_raw(&id) else { continue };
        let values: Vec<_> = values.map(|value| value.to_string_lossy()).collect();
        let variable = format!("{PREFIX}{}", id.to_uppercase());
        let origin = match matches.value_source(&id) {
            Some(ValueSource::EnvVariable) if !was_typed(&variable) => Origin::Env(variable),
            _ if *key == "url" => Origin::Flag("URL".to_owned()),
            _ => Origin::Flag(format!("--{key}")),
        };
        raw.set(key, values.join(","), origin);
    }
    // A typed flag may override a variable of the environment. clap's `conflicts_with` does not tell the two apart and would refuse that.
    let mut problems = Vec::new();
    for (id, flag, key, text) in
        [("no_throttle", "--no-throttle", "throttle", "false"), ("askpass", "--askpass", "password-file", "")]
    {
        if matches.try_get_one::<bool>(id).ok().flatten() != Some(&true) {
            continue;
        }
        if matches.value_source(&key.replace('-', "_")) == Some(ValueSource::CommandLine) {
            let message = format!("cannot be used with --{key}");
            problems.push(Problem { origin: Some(Origin::Flag(flag.to_owned())), message });
        }
        raw.set(key, text.to_owned(), Origin::Flag(flag.to_owned()));
    }
    if problems.is_empty() { Ok(raw) } else { Err(problems) }
}

/// Prefix of the program's environment variables.
pub(super) const PREFIX: &str = "TTLSWEEP_";
/// The variable that lists, separated by commas, the variables whose values came from the command line: `cli::hide_password` sets it.
pub(super) const TYPED: &str = "TTLSWEEP_TYPED";

fn was_typed(variable: &str) -> bool {
    std::env::var(TYPED).is_ok_and(|typed| typed.split(',').any(|name| name == variable))
}

/// Similarity, 0 to 1, from which on an unknown variable counts as a misspelt one. Others are ignored: for a service named `ttlsweep`
/// Kubernetes sets TTLSWEEP_PORT and the like.
const MISSPELT_FROM: f64 = 0.75;

/// Unknown environment variables whose names resemble a known one. Each is an error: a limit whose name is misspelt would silently
/// not apply.
fn misspelt() -> Vec<Problem> {
    let set = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    let set: Vec<String> = set.filter(|name| name.starts_with(PREFIX)).collect();
    if set.is_empty() {
        return Vec::new();
    }
    // The variables that are read without clap come first.
    let mut known = [telemetry::FILTER, client::TOKEN, TYPED].map(str::to_owned).to_vec();
    variables_of(&Cli::command(), &mut known);
    let problems = set.into_iter().filter(|name| !known.contains(name)).filter_map(|name| {
        // TTLSWEEP_NO_THROTTLE is meant as TTLSWEEP_THROTTLE: `--no-throttle` has no variable.
        let typed = name[PREFIX.len()..].trim_start_matches("NO_");
        let similarity = |known: &&String| {
            let known = known.strip_prefix(PREFIX).unwrap_or(known);
            let by_letters = strsim::normalized_damerau_levenshtein(typed, known);
            let by_words = typed.split('_').all(|word| known.split('_').any(|other| other == word));
            // A name that contains all the typed words wins over any other; of several the shortest one wins.
            if by_words { 1.0 + by_letters } else { by_letters }
        };
        let meant =
            known.iter().filter(|name| *name != TYPED).max_by(|a, b| similarity(a).total_cmp(&similarity(b)))?;
        let message = format!("no setting has this name; did you mean {meant}?");
        (similarity(&meant) >= MISSPELT_FROM).then(|| Problem { origin: Some(Origin::Env(name.clone())), message })
    });
    problems.collect()
}

fn variables_of(command: &clap::Command, names: &mut Vec<String>) {
    names.extend(command.get_arguments().filter_map(|a| Some(a.get_env()?.to_str()?.to_owned())));
    command.get_subcommands().for_each(|inner| variables_of(inner, names));
}
