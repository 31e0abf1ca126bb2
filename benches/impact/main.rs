//! What a sweep costs the other clients and what it brings, beside other ways to sweep, in one run on one machine.
//!
//! `make impact`, or `cargo build --release` and then `cargo run --release -p ttlsweep-impact`. Four scenarios, each on real servers of its own:
//!
//! - **a**, [`clean`]: live and dead keys, a steady foreground. Seconds to clean, and the latency of the foreground.
//! - **b**, [`inflow`]: keys with a short TTL keep coming. The backlog of expired keys, second by second.
//! - **c**, [`busy`]: clients that keep the server busy. What is left to them, and how far the sweep comes.
//! - **d**, [`keep`]: keys expire all the time. Is a bound kept at every moment, how late do `expired` events come, and what does the
//!   server work for that?
//!
//! The foreground of a is open loop: a GET is due every 1 / rate seconds whether or not the last one was answered, and
//! its latency counts from when it was due. So a server that stands still for a millisecond shows in every request of
//! that millisecond, and not only in the one that happened to be under way.
//!
//! The contenders take turns, round by round; medians are shown, and ratios are taken within a round. Nothing is
//! asserted of speed. That what is dead goes, that what is alive stays, and that `num` is exact is asserted throughout.
//! Linux only: CPU time is read from /proc.
//!
//! By environment (the default in parentheses):
//!
//! - `TTLSWEEP_IMPACT_SCENARIOS` (a,b,c,d), and `TTLSWEEP_IMPACT_ONLY`: only contenders whose name holds one of these
//!   words, such as `no sweep;default;profile, COUNT 1000`. `TTLSWEEP_IMPACT_LOOPS`: more rows of a plain socket that
//!   scans back to back, each a COUNT: `25,50`. `TTLSWEEP_IMPACT_OURS`: more rows of our own, each the arguments of a
//!   scan, with semicolons: `--max-slice 30us;--intensity 0.5`.
//! - `TTLSWEEP_BENCH_LIVE` (2,000,000) and `TTLSWEEP_BENCH_DEAD` (1,000,000): keys of a; c has the live ones.
//!   The full reference test is 10,000,000 and 5,000,000. Its first round takes three quarters of an hour, of which the
//!   cloud profile's COUNT 50 takes 25 minutes by its clock: 15,000,000 keys at 10,000 a second.
//! - `TTLSWEEP_IMPACT_LIVE_TTL` (0): 1 gives the live keys of a a TTL of a day. Without one, active expiry finds
//!   nothing but dead keys among those that it looks at, which is the best that it can meet.
//! - `TTLSWEEP_IMPACT_RTT` (0): in a, sweeps reach the server by a proxy that makes their round trip so many microseconds long. The
//!   foreground does not. The server has a core of its own then, as it would if the sweep came from another machine.
//! - `TTLSWEEP_BENCH_ROUNDS` (3), and `TTLSWEEP_IMPACT_SLOW_ROUNDS` (1): in how many of these, in a, the contenders
//!   run whose time is set by the clock and is minutes.
//! - `TTLSWEEP_BENCH_RATE` (5,000): GETs a second of the foreground of a.
//! - `TTLSWEEP_IMPACT_BASELINE_S` (10): how long no sweep is measured beside each sweep, half before, half after.
//! - `TTLSWEEP_IMPACT_INFLOW` (20,000): keys written a second in b, `TTLSWEEP_IMPACT_WARM_UP_S` (15) until the sweep
//!   begins, `TTLSWEEP_IMPACT_SWEEP_S` (40) how long it goes on. So b takes 8 minutes for each server and round.
//! - `TTLSWEEP_IMPACT_BUSY_S` (20): how long a sweep goes on in c.
//! - `TTLSWEEP_BENCH_SERVER` (redis-server on the PATH): the server of a and c; `TTLSWEEP_IMPACT_SERVERS` (the same):
//!   those of b and d, with commas.
//! - `TTLSWEEP_IMPACT_SPINNERS` (0): so many other processes keep the machine's cores busy meanwhile.
//! - `TTLSWEEP_IMPACT_OUT` (target/impact): where `impact.md`, `impact.json` and the plots go.

use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use serde_json::json;

mod busy;
mod clean;
#[path = "../common/mod.rs"]
mod common;
mod contender;
mod inflow;
mod keep;
mod load;
mod plot;
#[path = "../common/proxy.rs"]
mod proxy;
mod report;
mod wire;

/// What the environment says.
struct Settings {
    live: u64,
    dead: u64,
    live_ttl: bool,
    round_trip_us: u64,
    rounds: u64,
    slow_rounds: u64,
    rate: u64,
    baseline: Duration,
    inflow: u64,
    warm_up: u64,
    sweep: u64,
    busy: Duration,
    spinners: u64,
    servers: Vec<String>,
}

impl Settings {
    fn read() -> Self {
        let server = std::env::var("TTLSWEEP_BENCH_SERVER").unwrap_or_else(|_| "redis-server".to_owned());
        Self {
            live: number("TTLSWEEP_BENCH_LIVE", 2_000_000),
            dead: number("TTLSWEEP_BENCH_DEAD", 1_000_000),
            live_ttl: number("TTLSWEEP_IMPACT_LIVE_TTL", 0) > 0,
            round_trip_us: number("TTLSWEEP_IMPACT_RTT", 0),
            rounds: number("TTLSWEEP_BENCH_ROUNDS", 3),
            slow_rounds: number("TTLSWEEP_IMPACT_SLOW_ROUNDS", 1),
            rate: number("TTLSWEEP_BENCH_RATE", 5_000),
            baseline: Duration::from_secs(number("TTLSWEEP_IMPACT_BASELINE_S", 10)),
            inflow: number("TTLSWEEP_IMPACT_INFLOW", 20_000),
            warm_up: number("TTLSWEEP_IMPACT_WARM_UP_S", 15),
            sweep: number("TTLSWEEP_IMPACT_SWEEP_S", 40),
            busy: Duration::from_secs(number("TTLSWEEP_IMPACT_BUSY_S", 20)),
            spinners: number("TTLSWEEP_IMPACT_SPINNERS", 0),
            servers: list("TTLSWEEP_IMPACT_SERVERS", &server),
        }
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "live": self.live, "dead": self.dead, "live_ttl": self.live_ttl, "round_trip_us": self.round_trip_us, "rounds": self.rounds,
            "slow_rounds": self.slow_rounds, "rate_per_s": self.rate, "baseline_s": self.baseline.as_secs(),
            "inflow_per_s": self.inflow, "warm_up_s": self.warm_up, "sweep_s": self.sweep,
            "busy_s": self.busy.as_secs(), "spinners": self.spinners,
        })
    }

    #[allow(clippy::print_stderr, reason = "somebody waits for minutes")]
    fn progress(&self, text: &str) {
        eprintln!("impact: {text}");
    }
}

fn number(name: &str, default: u64) -> u64 {
    let Ok(text) = std::env::var(name) else { return default };
    text.replace('_', "").parse().unwrap_or_else(|_| panic!("{name} is a number, not {text:?}"))
}

fn list(name: &str, default: &str) -> Vec<String> {
    let text = std::env::var(name).unwrap_or_else(|_| default.to_owned());
    // Names hold commas: where there is a semicolon, that cuts.
    let cut = if text.contains(';') { ';' } else { ',' };
    text.split(cut).map(str::trim).filter(|t| !t.is_empty()).map(str::to_owned).collect()
}

/// Processes that take all the processor time that they are given, killed on drop.
struct Spinners(Vec<Child>);

impl Spinners {
    fn start(n: u64) -> Self {
        let spin = || Command::new("sh").args(["-c", "while :; do :; done"]).spawn().expect("a shell");
        Self((0..n).map(|_| spin()).collect())
    }
}

impl Drop for Spinners {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn main() {
    proxy::serve_if_asked();
    let settings = Settings::read();
    let only = list("TTLSWEEP_IMPACT_ONLY", "");
    let mut contenders = contender::all();
    contenders.retain(|c| only.is_empty() || only.iter().any(|o| c.name.contains(o.as_str())));
    let scenarios = list("TTLSWEEP_IMPACT_SCENARIOS", "a,b,c,d");
    assert!(!contenders.is_empty() || scenarios == ["d"], "TTLSWEEP_IMPACT_ONLY leaves no contender");
    let unknown = scenarios.iter().find(|s| !["a", "b", "c", "d"].contains(&s.as_str()));
    assert!(unknown.is_none(), "TTLSWEEP_IMPACT_SCENARIOS knows a, b, c and d, not {unknown:?}");

    let folder = std::env::var_os("TTLSWEEP_IMPACT_OUT").map_or_else(|| PathBuf::from("target/impact"), PathBuf::from);
    let _spinners = Spinners::start(settings.spinners);
    let mut output = report::Output::new(folder, settings.json(), &contenders);
    for scenario in &scenarios {
        match scenario.as_str() {
            "a" => clean::run(&settings, &contenders, &mut output),
            "b" => inflow::run(&settings, &contenders, &mut output),
            "d" => keep::run(&settings, &mut output),
            _ => busy::run(&settings, &contenders, &mut output),
        }
    }
}
