//! `ttlsweep forecast`: estimates which keys expire when.

use std::time::Duration;

use clap::{ArgMatches, Args};
use jiff::tz::TimeZone;

use crate::api::forecast_dto::ForecastOutput;
use crate::cli::args::{self, ServerArgs};
use crate::cli::check::{failed, replica};
use crate::cli::exit::Exit;
use crate::cli::{output, scan};
use crate::forecast::prefixes::By;
use crate::forecast::{self, ForecastRequest, ReadFrom, SAMPLE_KEYS};
use crate::node::topology::Topology;
use crate::settings::positive_duration;

/// `ttlsweep forecast`
///
/// It reads the TTLs of a random sample of the keys on a replica. No value is read, and nothing is written.
#[derive(Debug, Args)]
#[command(after_help = args::forecast_examples())]
pub(super) struct ForecastArgs {
    /// How to reach the server.
    #[command(flatten)]
    pub server: ServerArgs,

    /// DBs to sample, such as 0,3 [default: each DB that holds keys]
    #[arg(long, env = "TTLSWEEP_DB", value_name = "N", value_delimiter = ',')]
    pub db: Vec<String>,

    /// Sample on this replica of the server; user and password are those of the server unless this URL has its own
    /// [default: one that the master lists as online]
    #[arg(long, env = "TTLSWEEP_REPLICA", hide_env_values = true, value_name = "URL")]
    pub replica: Option<String>,

    /// Sample on the master itself, in a twentieth of its time; this frees the expired keys that it meets
    #[arg(long, conflicts_with = "replica")]
    pub on_master: bool,

    /// About how many keys to sample in each DB of each master; a DB with less than twice as many is read whole
    #[arg(long, value_name = "KEYS", default_value_t = SAMPLE_KEYS)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    pub sample: u64,

    /// How far the histogram looks ahead
    #[arg(long, value_name = "TIME", default_value = "1d", value_parser = positive_duration)]
    pub within: Duration,

    /// Group keys by the first parts of their names; the last part of a name is never shown
    #[arg(long)]
    pub by_prefix: bool,

    /// Separator between the parts of a name
    #[arg(long, value_name = "TEXT", default_value = ":", requires = "by_prefix")]
    #[arg(value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub separator: String,

    /// How many parts of a name make a group
    #[arg(long, value_name = "N", default_value_t = 1, requires = "by_prefix")]
    #[arg(value_parser = clap::value_parser!(u8).range(1..=16))]
    pub depth: u8,

    /// How many groups to show
    #[arg(long, value_name = "N", default_value_t = 20, requires = "by_prefix")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub top: u16,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// A stdout that cannot be written.
pub(super) async fn run(args: ForecastArgs, matches: &ArgMatches) -> anyhow::Result<Exit> {
    let (settings, options) = match scan::load(&args.server, matches) {
        Ok(loaded) => loaded,
        Err(problems) => return Ok(scan::usage(&problems)),
    };
    let read_from = match args.replica.as_deref().map(|url| replica(url, &options)).transpose() {
        Ok(Some((addr, options))) => ReadFrom::Replica(addr, Box::new(options)),
        Ok(None) if args.on_master => ReadFrom::Master,
        Ok(None) => ReadFrom::AnyReplica,
        Err(problem) => return Ok(scan::usage(&[problem])),
    };
    let by = args.by_prefix.then(|| By {
        separator: args.separator.into_bytes(),
        depth: args.depth.into(),
        top: args.top.into(),
    });
    let zone = TimeZone::system();
    let request = ForecastRequest {
        read_from,
        dbs: settings.scan.dbs.clone(),
        sample: args.sample,
        ahead: args.within,
        zone: zone.clone(),
        by,
    };
    let topology = Topology::new(settings.target.clone(), options.clone(), settings.scan.follow);
    let view = match topology.view(None).await {
        Ok(view) => view,
        Err(error) => return failed(&error.into_failure(), &settings, args.json),
    };
    let forecast = match forecast::make(settings.target.to_string(), &view, &options, &request).await {
        Ok(forecast) => forecast,
        Err(failure) => return failed(&failure, &settings, args.json),
    };
    let shown = ForecastOutput::new(&forecast, &zone);
    output::print(&if args.json { format!("{}\n", serde_json::to_string_pretty(&shown)?) } else { shown.report })?;
    Ok(Exit::Done)
}
