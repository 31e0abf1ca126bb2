//! What many shards cost the client: one process sweeps 1, 10, 50 and 200 real servers, all at a time.
//!
//! `make bench`, or `cargo bench --bench shards`. By environment: `TTLSWEEP_BENCH_SHARDS` (1,10,50,200),
//! `TTLSWEEP_BENCH_SHARD_KEYS` (20,000 keys in each), `TTLSWEEP_BENCH_SERVER` (redis-server on the PATH).
//!
//! The servers are real; stand-ins in front of them make them look like the masters of one cluster. Linux only: CPU time and memory are read
//! from /proc.

#![allow(clippy::print_stdout, reason = "the table is what it is for")]

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

mod common;
#[path = "common/seed.rs"]
mod seed;
use common::Server;

/// Clock ticks per second in /proc/PID/stat, on every Linux that Rust runs on.
const TICKS: f64 = 100.0;

fn main() {
    let env = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
    let keys: u64 = env("TTLSWEEP_BENCH_SHARD_KEYS", "20000").parse().expect("a number of keys");
    let sizes: Vec<usize> =
        env("TTLSWEEP_BENCH_SHARDS", "1,10,50,200").split(',').map(|n| n.parse().expect("a number")).collect();
    let most = sizes.iter().copied().max().expect("one number or more");
    let servers: Vec<Server> = (0..most).map(|_| Server::start()).collect();
    for server in &servers {
        assert_eq!(server.cli(&["DEBUG", "POPULATE", &keys.to_string(), "session:user", "32"]), "OK");
    }
    println!("{keys} live keys in each shard, all shards at a time; {}", servers[0].version());
    println!("| shards | s | keys/s | client CPU ms per shard | peak memory MiB | KiB more per shard |");
    println!("|---|---|---|---|---|---|");
    let mut first = None;
    for shards in sizes {
        let ports: Vec<u16> = servers[..shards].iter().map(|server| server.port).collect();
        let url = format!("redis://{}", seed::cluster_of(&ports));
        let measured = measure(&url, shards);
        let (one, kib) = *first.get_or_insert((shards, measured.peak_kib));
        let more = match shards - one {
            0 => "-".to_owned(),
            others => format!("{:.0}", (measured.peak_kib - kib) / others as f64),
        };
        let seconds = measured.wall.as_secs_f64();
        println!(
            "| {shards} | {seconds:.2} | {:.0} | {:.1} | {:.1} | {more} |",
            keys as f64 * shards as f64 / seconds,
            measured.cpu_s * 1e3 / shards as f64,
            measured.peak_kib / 1024.0,
        );
    }
}

#[derive(Default)]
struct Measured {
    wall: Duration,
    cpu_s: f64,
    peak_kib: f64,
}

/// Runs one sweep to its end, looking at /proc meanwhile.
fn measure(url: &str, parallel: usize) -> Measured {
    let begun = Instant::now();
    let mut child = Command::new(env!("CARGO_BIN_EXE_ttlsweep"))
        .args(["scan", url, "--db", "0", "--quiet", "--parallel", &parallel.to_string()])
        .stdout(Stdio::null())
        .spawn()
        .expect("the program runs");
    let mut measured = Measured::default();
    loop {
        if let Some(status) = child.try_wait().expect("it can be asked") {
            assert!(status.success(), "the sweep ended with {status}");
            measured.wall = begun.elapsed();
            return measured;
        }
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", child.id())).unwrap_or_default();
        let stat = read("stat");
        // Behind the name in parentheses: state is field 3, utime 14, stime 15.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        let ticks = |field: usize| fields.get(field - 3).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
        measured.cpu_s = measured.cpu_s.max((ticks(14) + ticks(15)) / TICKS);
        let peak =
            read("status").lines().find_map(|l| l.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok());
        measured.peak_kib = measured.peak_kib.max(peak.unwrap_or(0.0));
        std::thread::sleep(Duration::from_millis(10));
    }
}
