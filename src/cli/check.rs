//! `ttlsweep check`: inspects a server without changing anything.

use clap::parser::ValueSource;
use clap::{ArgMatches, Args};

use crate::api::check_dto::{CheckOutput, Checked};
use crate::api::dto::FailureDto;
use crate::check;
use crate::check::assessment;
use crate::check::backlog;
use crate::check::instance;
use crate::check::report::{sentence, text};
use crate::cli::args::{self, ServerArgs, SweepArgs};
use crate::cli::exit::Exit;
use crate::cli::output;
use crate::cli::scan;
use crate::model::failure::Failure;
use crate::model::shard::NodeAddr;
use crate::model::target::{InstanceUrl, Place};
use crate::node::conn::ConnOptions;
use crate::node::topology::{InstanceKind, Topology};
use crate::settings::Settings;
use crate::settings::raw::{KEYS, Origin, Problem};

/// `ttlsweep check`
///
/// It takes the options of `scan`: write `check` in place of `scan` to see what that sweep would meet.
#[derive(Debug, Args)]
#[command(after_help = args::check_examples())]
pub(super) struct CheckArgs {
    /// How to reach the server.
    #[command(flatten)]
    pub server: ServerArgs,

    /// How the sweep would go.
    #[command(flatten)]
    pub sweep: SweepArgs,

    /// Count the backlog exactly on this replica of the server; user and password are those of the server unless this URL
    /// has its own
    #[arg(long, env = "TTLSWEEP_REPLICA", hide_env_values = true, value_name = "URL")]
    pub replica: Option<String>,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// A stdout that cannot be written.
pub(super) async fn run(args: CheckArgs, matches: &ArgMatches) -> anyhow::Result<Exit> {
    let (settings, options) = match scan::load(&args.server, matches) {
        Ok(loaded) => loaded,
        Err(problems) => return Ok(scan::usage(&problems)),
    };
    let replica = match args.replica.as_deref().map(|url| replica(url, &options)).transpose() {
        Ok(replica) => replica,
        Err(problem) => return Ok(scan::usage(&[problem])),
    };
    let order = order(&settings, matches);
    let topology = Topology::new(settings.target.clone(), options.clone(), settings.scan.follow);
    let view = match topology.view(None).await {
        Ok(view) => view,
        Err(error) => return failed(&error.into_failure(), &settings, args.json),
    };
    let Some((replica, replica_options)) = replica else {
        let look = match instance::inspect(&view, &options, &settings.scan, &order).await {
            Ok(look) => look,
            Err(failure) => return failed(&failure, &settings, args.json),
        };
        output::print(&if args.json {
            let object = Checked::new(&look, &settings, &order);
            format!("{}\n", serde_json::to_string_pretty(&object)?)
        } else {
            look.text(&settings.scan, &order)
        })?;
        return Ok(if look.can_sweep() { Exit::Done } else { Exit::Failed });
    };
    if view.kind == InstanceKind::Cluster {
        let message = "--replica counts for one master, and this is a cluster".to_owned();
        return Ok(scan::usage(&[Problem { origin: None, message }]));
    }
    let facts = match check::inspect(&view.masters[0].addr, &options, Some(&settings.scan)).await {
        Ok(facts) => facts,
        Err(error) => return failed(&error.into_failure(), &settings, args.json),
    };
    let counted = backlog::count(&replica, &replica_options, &facts, &settings.scan).await;
    let assessment = assessment::assess(&facts, Some(&counted), &settings.scan);
    let sentence = sentence(&facts, &assessment, &order);
    output::print(&if args.json {
        let object = CheckOutput::new(settings.target.to_string(), &facts, &assessment, &settings.scan, sentence);
        format!("{}\n", serde_json::to_string_pretty(&object)?)
    } else {
        text(&facts, Some(&counted), &assessment, &settings.scan, &sentence)
    })?;
    Ok(if assessment.can_sweep() { Exit::Done } else { Exit::Failed })
}

/// The command that would sweep the inspected instance. It holds no password: the user gives that as for `check`.
fn order(settings: &Settings, matches: &ArgMatches) -> String {
    let typed = |id: &str| {
        matches!(matches.try_contains_id(id), Ok(true)) && matches.value_source(id) == Some(ValueSource::CommandLine)
    };
    let mut url = settings.target.to_string();
    let is_unix = url.starts_with("unix:");
    if let (Some(user), Some(at), false) = (&settings.credentials.user, url.find("://"), is_unix) {
        let user = percent_encoding::utf8_percent_encode(user, percent_encoding::NON_ALPHANUMERIC);
        url.insert_str(at + 3, &format!("{user}@"));
    }
    if let (&[db], false) = (&settings.scan.dbs[..], typed("db")) {
        url.push_str(&format!("{}{}", if is_unix { "?db=" } else { "/" }, db.0));
    }
    let mut keys = KEYS.iter().filter(|key| **key != "url").map(|key| key.replace('-', "_"));
    let more = keys.any(|key| typed(&key)) || typed("config") || typed("no_throttle");
    format!("ttlsweep scan {url}{}", if more { " (and the same options)" } else { "" })
}

/// Prints the failure of an inspection that saw nothing, with `--json` as an object too, and returns the exit code.
pub(super) fn failed(failure: &Failure, settings: &Settings, json: bool) -> anyhow::Result<Exit> {
    if json {
        let object = serde_json::json!({ "target": settings.target.to_string(), "failure": FailureDto::from(failure) });
        output::print(&format!("{}\n", serde_json::to_string_pretty(&object)?))?;
    }
    output::note(&output::failure_text(failure));
    Ok(Exit::of(failure, false, false))
}

/// The address of `--replica` and how to connect to it: by the options of the master, with credentials of its own if the URL has some.
pub(super) fn replica(url: &str, main: &ConnOptions) -> Result<(NodeAddr, ConnOptions), Problem> {
    let problem = |message| Problem { origin: Some(Origin::Flag("--replica".to_owned())), message };
    let url = InstanceUrl::parse(url).map_err(|e| problem(e.to_string()))?;
    if url.db.is_some() {
        return Err(problem("a DB has no meaning in this URL; --db names those that are counted".to_owned()));
    }
    let Place::Standalone(addr) = url.target.place else {
        return Err(problem("name one server, the replica itself".to_owned()));
    };
    let mut options = main.clone();
    if !url.target.tls {
        options.tls = None;
    } else if options.tls.is_none() {
        let message = "TLS to the replica needs TLS to the server too: write its URL as rediss://".to_owned();
        return Err(problem(message));
    }
    if url.credentials.user.is_some() || url.credentials.password.is_some() {
        options.credentials = url.credentials;
    }
    Ok((addr, options))
}

#[cfg(test)]
mod tests;
