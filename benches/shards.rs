//! What many shards cost the client.
//!
//! `make bench`, or `cargo bench --bench shards`. Two tables:
//!
//! - One process sweeps 1, 10, 50 and 200 real servers as fast as it can. Relays in front of the servers make them
//!   look like the masters of one cluster.
//! - One process sweeps 1, 10, 200 and 1,000 simulated masters, each at the same few keys a second, so that the servers are not the
//!   limit: this shows what one more shard costs while it is swept. The process itself, its start and its timers, is in the row of one
//!   shard. Where the last row takes longer than the others, the sweep and the masters have filled the machine.
//!
//! By environment: `TTLSWEEP_BENCH_SHARDS` (1,10,50,200), `TTLSWEEP_BENCH_SHARD_KEYS` (20,000 keys in each of those),
//! `TTLSWEEP_BENCH_STANDINS` (1,10,200,1000), `TTLSWEEP_BENCH_ROUNDS` (3, of the second table), `TTLSWEEP_BENCH_SERVER`
//! (redis-server on the PATH). Linux only: CPU time and memory are read from /proc.

#![allow(clippy::print_stdout, reason = "it prints a table")]

use std::process::Command;

mod common;
#[path = "common/masters.rs"]
mod masters;
#[path = "common/seed.rs"]
mod seed;
use common::{Server, measure, median};

/// Keys of a simulated master, as a power of two, and how many of them are swept in a second: a pass takes ten seconds and more, and the
/// largest number of shards leaves cores idle.
const STANDIN_BITS: u32 = 12;
const STANDIN_RATE: u32 = 300;

fn main() {
    let _ = rlimit::increase_nofile_limit(u64::MAX);
    real_servers();
    stand_ins();
}

fn env(name: &str, default: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| default.to_owned())
}

fn numbers(name: &str, default: &str) -> Vec<usize> {
    env(name, default).split(',').filter(|n| !n.is_empty()).map(|n| n.parse().expect("a number")).collect()
}

fn stand_ins() {
    let sizes = numbers("TTLSWEEP_BENCH_STANDINS", "1,10,200,1000");
    let rounds: usize = env("TTLSWEEP_BENCH_ROUNDS", "3").parse().expect("a number of rounds");
    if sizes.is_empty() {
        return;
    }
    let real = Server::start();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let mut measured: Vec<Vec<(f64, f64)>> = vec![Vec::new(); sizes.len()];
    for _ in 0..rounds {
        for (&shards, measured) in sizes.iter().zip(&mut measured) {
            let url = format!("redis://{}", runtime.block_on(masters::start(shards, STANDIN_BITS, &real)));
            let (parallel, rate) = (shards.to_string(), STANDIN_RATE.to_string());
            let mut sweep = Command::new(env!("CARGO_BIN_EXE_ttlsweep"));
            let paced = ["--db", "0", "--quiet", "--parallel", &parallel, "--max-keys-per-sec", &rate];
            let one = measure(sweep.args(["scan", &url]).args(paced));
            measured.push((one.wall.as_secs_f64(), one.cpu_s * 1e3 / one.wall.as_secs_f64()));
        }
    }
    println!(
        "\n{} live keys in each stand-in, {STANDIN_RATE} a second, all at a time; medians of {rounds} rounds",
        1 << STANDIN_BITS
    );
    println!("| stand-ins | s | client CPU ms per second | per shard | of each shard after the first row |");
    println!("|---|---|---|---|---|");
    let mut first = None;
    for (&shards, measured) in sizes.iter().zip(&measured) {
        let seconds = median(measured.iter().map(|(seconds, _)| *seconds)).expect("one round or more");
        let cpu = median(measured.iter().map(|(_, cpu)| *cpu)).expect("one round or more");
        let (one, base) = *first.get_or_insert((shards, cpu));
        let more = match shards - one {
            0 => "-".to_owned(),
            others => format!("{:.2}", (cpu - base) / others as f64),
        };
        println!("| {shards} | {seconds:.1} | {cpu:.0} | {:.2} | {more} |", cpu / shards as f64);
    }
}

fn real_servers() {
    let keys: u64 = env("TTLSWEEP_BENCH_SHARD_KEYS", "20000").parse().expect("a number of keys");
    let sizes = numbers("TTLSWEEP_BENCH_SHARDS", "1,10,50,200");
    if sizes.is_empty() {
        return;
    }
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
