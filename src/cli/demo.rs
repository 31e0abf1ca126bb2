//! `ttlsweep demo`: shows the problem and the sweep on a private server.
//!
//! Writes keys of which some expire at once, watches how slowly the server itself reclaims those, sweeps, and compares.
//! Every number is read from the server: the expired keys are DBSIZE minus the keys that were written to live.

mod cluster;
mod server;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep};

use crate::cli::demo::server::DemoServer;
use crate::cli::exit::Exit;
use crate::cli::output::{self, bytes, grouped, note, span};
use crate::cli::scan::{self, Show, Until};
use crate::node::commands;
use crate::node::conn::Conn;
use crate::node::error::NodeError;
use crate::settings::raw::{Origin, Raw};
use crate::settings::{self, GivenPassword, Settings};

/// Of every 25 keys 2 expire at once: 8 %, just below the share at which active expiry stops trying.
const EXPIRING: (u64, u64) = (2, 25);
/// TTL of the keys that expire at once. They are written among the others, so that their share never exceeds 8 % and active expiry
/// stays slow.
const SHORT_TTL: Duration = Duration::from_millis(100);
/// Keys that one script writes: few enough that a signal is handled at once.
const CHUNK: u64 = 10_000;
/// Writes the keys with the numbers `ARGV[1]` to `ARGV[2]` on the server itself, so that no key goes over the network.
const WRITE: &str = "\
for i = tonumber(ARGV[1]), tonumber(ARGV[2]) do
  local ttl = 3600000 + i % 3600000
  if i % tonumber(ARGV[4]) < tonumber(ARGV[3]) then ttl = ARGV[5] end
  local tag = #ARGV > 5 and '{' .. ARGV[6 + i % (#ARGV - 5)] .. '}:' or ''
  redis.call('SET', 'session:' .. tag .. i, 'the state of a session, forty bytes long', 'PX', ttl)
end";
/// Time between two readings while the server is watched: on a terminal, and where stderr is a log.
const WATCH_TICK: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(1));
/// The error on a machine without a server.
const NO_SERVER: &str = "error: the demo needs redis-server or valkey-server and neither is on the PATH: \
    `apt install redis-server` (Debian, Ubuntu), `brew install redis` (macOS), or name one with --server PATH";

/// `ttlsweep demo`
#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// Server program to run [default: redis-server or valkey-server on the PATH]
    #[arg(long, env = "TTLSWEEP_DEMO_SERVER", value_name = "PATH")]
    pub server: Option<PathBuf>,

    /// Use a cluster of three private masters
    #[arg(long)]
    pub cluster: bool,

    /// How many keys to write; a million takes about 160 MB of memory
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1_000..=100_000_000))]
    pub keys: u64,

    /// How long to watch the server before the sweep
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = settings::positive_duration)]
    pub watch: Duration,
}

/// Sums over the private servers at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ServerTotals {
    keys: u64,
    expired: u64,
    used_memory: Option<u64>,
}

/// What active expiry reclaimed while the server was watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Watched {
    reclaimed: u64,
    during: Duration,
}

impl Watched {
    fn per_sec(self) -> f64 {
        self.reclaimed as f64 / self.during.as_secs_f64().max(0.001)
    }
}

/// Runs the command.
///
/// # Errors
/// A server that does not start, and a stdout that cannot be written.
pub(super) async fn run(args: DemoArgs) -> anyhow::Result<Exit> {
    let Some(program) = args.server.clone().or_else(server::find) else {
        note(NO_SERVER);
        return Ok(Exit::Failed);
    };
    // Before a server is started: from here on a signal ends the demo by dropping its servers, which kills them.
    let mut signals = EndSignals::listen()?;
    let servers = tokio::select! {
        servers = start(&program, args.cluster) => servers?,
        () = signals.next() => return Ok(Exit::Interrupted),
    };
    let (mut conns, live, watched, before) = tokio::select! {
        prepared = prepare(&servers, &args) => match prepared {
            Ok(prepared) => prepared,
            Err(error) => return Ok(lost(error)),
        },
        () = signals.next() => return Ok(Exit::Interrupted),
    };
    note("\nnow a sweep:");
    let begun = Instant::now();
    // The sweep handles signals itself: it ends its batch and reports.
    let exit =
        scan::sweep(settings_for(&servers[0])?, servers[0].conn_options(), None, Show::Text, Until::Done).await?;
    let took = begun.elapsed();
    if exit != Exit::Done {
        return Ok(exit);
    }
    let after = match read(&mut conns, live).await {
        Ok(after) => after,
        Err(error) => return Ok(lost(error)),
    };
    output::print(&comparison(before, after, watched, took))?;
    if after.keys != live {
        note(&format!(
            "error: {} live keys were written and {} keys are there now",
            grouped(live),
            grouped(after.keys)
        ));
        return Ok(Exit::Failed);
    }
    Ok(Exit::Done)
}

/// Reports that a private server was lost: it was killed, or the machine ran out of memory.
fn lost(error: NodeError) -> Exit {
    note(&output::failure_text(&error.into_failure()));
    Exit::Failed
}

/// Starts one server, or three that form a cluster.
async fn start(program: &Path, cluster: bool) -> anyhow::Result<Vec<DemoServer>> {
    if cluster { cluster::start(program).await } else { Ok(vec![DemoServer::start(program).await?]) }
}

/// Writes the keys and watches the servers. Returns the connections, the number of live keys, what active expiry reclaimed, and the
/// reading after that.
async fn prepare(
    servers: &[DemoServer],
    args: &DemoArgs,
) -> Result<(Vec<Conn>, u64, Watched, ServerTotals), NodeError> {
    let mut conns = Vec::new();
    for server in servers {
        let mut conn = Conn::open(&server.addr(), &server.conn_options()).await?;
        let info = commands::info(&mut conn).await?;
        let name = info.server(conn.addr()).map_or_else(String::new, |s| format!("{} {}, ", s.product, s.version));
        note(&format!("a private server: {name}pid {}, on {}", server.pid(), server.addr()));
        conns.push(conn);
    }
    // Each server gets an equal part of the keys, and of each part the same share expires.
    let parts = servers.len() as u64;
    let keys_of = |place: u64| args.keys / parts + u64::from(place < args.keys % parts);
    let expiring: u64 = (0..parts).map(|place| expiring(keys_of(place))).sum();
    let live = args.keys - expiring;
    note(&format!("writing {} keys with a TTL, of which {} expire now", grouped(args.keys), grouped(expiring)));
    for (place, conn) in conns.iter_mut().enumerate() {
        let tags = if servers.len() > 1 { cluster::tags(place) } else { Vec::new() };
        write(conn, keys_of(place as u64), &tags).await?;
    }
    sleep(SHORT_TTL * 2).await;
    note(&format!("watching for {} how the server reclaims them by itself:", span(args.watch)));
    let watched = watch(&mut conns, live, args.watch).await?;
    let before = read(&mut conns, live).await?;
    Ok((conns, live, watched, before))
}

/// How many of the first `keys` keys expire at once, as [`WRITE`] picks them.
fn expiring(keys: u64) -> u64 {
    let (some, of) = EXPIRING;
    keys / of * some + (keys % of).min(some)
}

/// Writes `keys` keys. In a cluster each name has one of the hash tags, whose slots belong to this server.
async fn write(conn: &mut Conn, keys: u64, tags: &[String]) -> Result<(), NodeError> {
    for first in (0..keys).step_by(CHUNK as usize) {
        let last = (first + CHUNK).min(keys) - 1;
        let mut script = redis::cmd("EVAL");
        script.arg(WRITE).arg(0).arg(first).arg(last).arg(EXPIRING.0).arg(EXPIRING.1);
        script.arg(SHORT_TTL.as_millis() as u64).arg(tags);
        conn.call::<()>("EVAL", &script).await?;
    }
    Ok(())
}

/// The keys on all servers, expired ones included.
async fn dbsize(conns: &mut [Conn]) -> Result<u64, NodeError> {
    let mut keys = 0;
    for conn in conns {
        keys += commands::dbsize(conn).await?;
    }
    Ok(keys)
}

async fn watch(conns: &mut [Conn], live: u64, during: Duration) -> Result<Watched, NodeError> {
    let bar = std::io::stderr().is_terminal().then(|| {
        let style =
            ProgressStyle::with_template("  {spinner} {msg}").unwrap_or_else(|_| ProgressStyle::default_spinner());
        ProgressBar::new_spinner().with_style(style)
    });
    let tick = if bar.is_some() { WATCH_TICK.0 } else { WATCH_TICK.1 };
    let begun = Instant::now();
    let first = dbsize(conns).await?;
    loop {
        sleep(tick.min(during.saturating_sub(begun.elapsed()))).await;
        let now = dbsize(conns).await?;
        let watched = Watched { reclaimed: first.saturating_sub(now), during: begun.elapsed() };
        let line = format!(
            "{} expired keys in memory, {:.0} reclaimed per second",
            grouped(now.saturating_sub(live)),
            watched.per_sec()
        );
        match &bar {
            Some(bar) => {
                bar.set_message(line);
                bar.tick();
            }
            None => note(&format!("  {:>5} {line}", span(watched.during))),
        }
        if watched.during >= during {
            if let Some(bar) = bar {
                bar.abandon();
            }
            return Ok(watched);
        }
    }
}

async fn read(conns: &mut [Conn], live: u64) -> Result<ServerTotals, NodeError> {
    let keys = dbsize(conns).await?;
    let mut used_memory = Some(0);
    for conn in conns {
        let used: Option<u64> = commands::info(conn).await?.parsed("used_memory");
        used_memory = used_memory.zip(used).map(|(sum, used)| sum + used);
    }
    Ok(ServerTotals { keys, expired: keys.saturating_sub(live), used_memory })
}

/// The settings of a plain `ttlsweep scan` of this server: the defaults.
fn settings_for(server: &DemoServer) -> anyhow::Result<Settings> {
    let mut raw = Raw::defaults();
    raw.set("url", format!("redis://{}", server.addr()), Origin::Flag("URL".to_owned()));
    let password =
        GivenPassword { secret: server.password().as_bytes().to_vec().into(), origin: Origin::Flag("demo".to_owned()) };
    settings::resolve(&raw, Some(password)).map_err(|problems| {
        let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
        anyhow::anyhow!(problems.join("; "))
    })
}

fn comparison(before: ServerTotals, after: ServerTotals, watched: Watched, took: Duration) -> String {
    let row = |name: &str, totals: ServerTotals| {
        let memory = totals.used_memory.map_or_else(|| "unknown".to_owned(), bytes);
        vec![name.to_owned(), grouped(totals.keys), grouped(totals.expired), memory]
    };
    let heading = ["", "keys", "expired", "used memory"].map(str::to_owned).to_vec();
    let table = output::table(&[heading, row("before", before), row("after", after)]);
    let alone = if watched.reclaimed == 0 {
        format!("active expiry alone reclaimed none in {}", span(watched.during))
    } else {
        let needed = Duration::try_from_secs_f64(before.expired as f64 / watched.per_sec()).unwrap_or(Duration::MAX);
        format!("active expiry alone, at the measured {:.0} keys/s: {}", watched.per_sec(), span(needed))
    };
    format!("\n{table}\nthe sweep took {}; {alone}\n", span(took))
}

/// The signals that end the demo: SIGINT (Ctrl-C) and SIGTERM.
struct EndSignals {
    interrupt: Signal,
    terminate: Signal,
}

impl EndSignals {
    fn listen() -> std::io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expiring_keys_are_counted_as_the_script_picks_them() {
        for keys in [1_000, 1_001, 1_002, 1_003, 20_000, 20_024] {
            let picked = (0..keys).filter(|i| i % EXPIRING.1 < EXPIRING.0).count() as u64;
            assert_eq!(expiring(keys), picked, "{keys}");
        }
    }

    #[test]
    fn before_and_after_stand_side_by_side() {
        let before = ServerTotals { keys: 999_900, expired: 79_900, used_memory: Some(140_000_000) };
        let after = ServerTotals { keys: 920_000, expired: 0, used_memory: Some(130_000_000) };
        let watched = Watched { reclaimed: 100, during: Duration::from_secs(4) };
        let took = Duration::from_millis(1640);
        insta::assert_snapshot!(comparison(before, after, watched, took));
        let idle = Watched { reclaimed: 0, ..watched };
        let text = comparison(before, after, idle, took);
        assert!(text.contains("active expiry alone reclaimed none in 4.0s"), "{text}");
    }
}
