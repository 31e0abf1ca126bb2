//! What many shards cost the client: one process sweeps 1, 10, 50 and 200 real servers, all at a time.
//!
//! `make bench`, or `cargo bench --bench shards`. By environment: `TTLSWEEP_BENCH_SHARDS` (1,10,50,200),
//! `TTLSWEEP_BENCH_SHARD_KEYS` (20,000 keys in each), `TTLSWEEP_BENCH_SERVER` (redis-server on the PATH).
//!
//! The servers are real; stand-ins in front of them make them look like the masters of one cluster. Linux only: CPU time and memory are read
//! from /proc.

#![allow(clippy::print_stdout, reason = "the table is what it is for")]

use std::process::Command;

mod common;
#[path = "common/seed.rs"]
mod seed;
use common::{Server, measure};

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
        let parallel = shards.to_string();
        let mut sweep = Command::new(env!("CARGO_BIN_EXE_ttlsweep"));
        let measured = measure(sweep.args(["scan", &url, "--db", "0", "--quiet", "--parallel", &parallel]));
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
