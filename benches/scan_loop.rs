//! How fast the loop is, compared with a bare socket and redis-cli, on one real server, in one run.
//!
//! `make bench`, or `cargo bench --bench scan_loop`. By environment: `TTLSWEEP_BENCH_KEYS` (5,000,000),
//! `TTLSWEEP_BENCH_ROUNDS` (3), `TTLSWEEP_BENCH_SERVER` (redis-server on the PATH).
//!
//! Every contender is a process of its own, so that CPU time and peak memory are only its own; they take turns, and the
//! medians are shown. Linux only: CPU time and memory are read from /proc.

#![allow(clippy::print_stdout, reason = "it prints a table")]

use std::process::Command;

#[path = "common/bare.rs"]
mod bare;
mod common;
use bare::bare;
use common::{Measured, Server, measure};

/// COUNT of every contender.
const COUNT: u32 = 100;

fn main() {
    let mut args = std::env::args().skip(1).skip_while(|a| a.starts_with("--bench"));
    match args.next().as_deref() {
        Some("bare") => return bare(&args.next().expect("an address"), COUNT, ""),
        Some("counted") => return bare(&args.next().expect("an address"), COUNT, "*1\r\n$6\r\nDBSIZE\r\n"),
        _ => {}
    }
    let env = |name: &str, default: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let keys = env("TTLSWEEP_BENCH_KEYS", 5_000_000);
    let rounds = env("TTLSWEEP_BENCH_ROUNDS", 3) as usize;
    let server = Server::start();
    assert_eq!(server.cli(&["DEBUG", "POPULATE", &keys.to_string(), "session:user", "32"]), "OK");
    let addr = server.addr();
    println!("{keys} live keys, COUNT {COUNT}, {rounds} rounds, medians; {}", server.version());

    let this = std::env::current_exe().expect("it has a path");
    let this = this.to_str().expect("a path in UTF-8");
    let ours = env!("CARGO_BIN_EXE_ttlsweep");
    let (host, port) = addr.split_once(':').expect("host and port");
    let count = COUNT.to_string();
    let url = format!("redis://{addr}");
    let help = Command::new("redis-cli").arg("--help").output().expect("redis-cli is on the PATH");
    let help = String::from_utf8_lossy(&help.stdout).into_owned() + &String::from_utf8_lossy(&help.stderr);
    let mut contenders: Vec<(&str, Vec<&str>)> = vec![
        ("bare socket", vec![this, "bare", &addr]),
        ("bare socket with DBSIZE around", vec![this, "counted", &addr]),
        (
            "ttlsweep",
            vec![ours, "scan", &url, "--db", "0", "--count", &count, "--max-slice", "0s", "--no-throttle", "--quiet"],
        ),
        ("ttlsweep, default", vec![ours, "scan", &url, "--db", "0", "--quiet"]),
        ("ttlsweep, without names", vec![ours, "scan", &url, "--db", "0", "--payload", "auto", "--quiet"]),
        // COUNT 10 is redis-cli's own default; --count came with 7.2.
        ("redis-cli --scan", vec!["redis-cli", "-h", host, "-p", port, "--scan"]),
    ];
    if help.contains("--count") {
        let command = vec!["redis-cli", "-h", host, "-p", port, "--scan", "--count", &count];
        contenders.push(("redis-cli --scan --count", command));
    }
    let mut results: Vec<Vec<Measured>> = vec![Vec::new(); contenders.len()];
    for _ in 0..rounds {
        for (contender, results) in contenders.iter().zip(&mut results) {
            let (program, args) = contender.1.split_first().expect("a program");
            let before = server.sent();
            let measured = measure(Command::new(program).args(args));
            results.push(Measured { sent: (server.sent() - before) as f64, ..measured });
        }
    }
    let of = |results: &[Measured], of: fn(&Measured) -> f64| {
        common::median(results.iter().map(of)).expect("one round or more")
    };
    let per_sec = |results: &[Measured]| keys as f64 / of(results, |m| m.wall.as_secs_f64());
    let bare_speed = per_sec(&results[0]);
    println!(
        "| contender | keys/s | of the bare socket | client CPU s per million keys | peak memory MiB | bytes sent per key |"
    );
    println!("|---|--:|--:|--:|--:|--:|");
    for ((name, _), results) in contenders.iter().zip(&results) {
        let speed = per_sec(results);
        println!(
            "| {name} | {speed:.0} | {:.2} | {:.2} | {:.1} | {:.2} |",
            speed / bare_speed,
            of(results, |m| m.cpu_s) * 1e6 / keys as f64,
            of(results, |m| m.peak_kib) / 1024.0,
            of(results, |m| m.sent) / keys as f64,
        );
    }
}
