//! How fast the loop is over a network, compared with bare sockets and redis-cli, through a proxy that only delays.
//!
//! `make bench`, or `cargo bench --bench round_trip`. By environment: `TTLSWEEP_BENCH_RTT_KEYS` (2,000,000),
//! `TTLSWEEP_BENCH_RTTS` in microseconds (0,200,500,1000,4000; 0 is without the proxy), `TTLSWEEP_BENCH_ROUNDS` (3),
//! `TTLSWEEP_BENCH_RTT_ONLY` (prefixes of contenders, separated by semicolons), `TTLSWEEP_BENCH_SERVER` (redis-server on the PATH).
//!
//! The server has a core of its own, as if the others came from another machine. The proxy is a process of its own and takes CPU time as
//! well: on a machine of two cores it shares one with the sweep. The contenders take turns, and medians are shown. Linux only.

#![allow(clippy::print_stdout, reason = "it prints a table")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Instant;

#[path = "common/bare.rs"]
mod bare;
mod common;
#[path = "common/proxy.rs"]
mod proxy;
use common::{Measured, Server, measure, median};

fn main() {
    let mut args = std::env::args().skip(1).skip_while(|a| a.starts_with("--bench"));
    match args.next().as_deref() {
        Some("bare") => {
            let (addr, count) = (args.next().expect("an address"), args.next().expect("COUNT"));
            return bare::bare(&addr, count.parse().expect("a number"), "");
        }
        _ => proxy::serve_if_asked(),
    }
    let env = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
    let keys: u64 = env("TTLSWEEP_BENCH_RTT_KEYS", "2000000").parse().expect("a number of keys");
    let rounds: usize = env("TTLSWEEP_BENCH_ROUNDS", "3").parse().expect("a number");
    let rtts = env("TTLSWEEP_BENCH_RTTS", "0,200,500,1000,4000");
    let rtts: Vec<u64> = rtts.split(',').map(|us| us.parse().expect("microseconds")).collect();
    let only = env("TTLSWEEP_BENCH_RTT_ONLY", "");
    let wanted = |name: &str| only.is_empty() || only.split(';').any(|wanted| name.starts_with(wanted));
    let server = Server::start();
    let _cores = server.on_a_core_of_its_own();
    assert_eq!(server.cli(&["DEBUG", "POPULATE", &keys.to_string(), "session:user", "32"]), "OK");
    let ours = [env!("CARGO_BIN_EXE_ttlsweep"), "scan", "URL", "--db", "0", "--quiet", "--max-latency", "off"];
    let this = std::env::current_exe().expect("it has a path");
    let this = this.to_str().expect("a path in UTF-8");
    let contenders: Vec<(&str, Vec<&str>)> = vec![
        ("ttlsweep, default", ours.to_vec()),
        ("ttlsweep, `--no-throttle`", [&ours[..], &["--no-throttle"]].concat()),
        ("bare socket, COUNT 100", vec![this, "bare", "ADDR", "100"]),
        ("bare socket, COUNT 1000", vec![this, "bare", "ADDR", "1000"]),
        ("redis-cli --scan", vec!["redis-cli", "-h", "127.0.0.1", "-p", "PORT", "--scan"]),
    ];
    let contenders: Vec<_> = contenders.into_iter().filter(|(name, _)| wanted(name)).collect();
    println!("{keys} live keys, {rounds} rounds, medians; {}", server.version());
    println!(
        "| round trip | PING p50 us | contender | keys/s | of loopback | client CPU s per million keys | peak memory MiB | server CPU s |"
    );
    println!("|---|--:|---|--:|--:|--:|--:|--:|");
    // A machine's speed drifts: each round visits all round trips.
    let mut rows: Vec<Row> = rtts.into_iter().map(|us| Row::new(us, &server, contenders.len())).collect();
    for _ in 0..rounds {
        for row in &mut rows {
            row.pings.push(ping(row.port));
            for ((_, command), results) in contenders.iter().zip(&mut row.results) {
                let place = |word: &&str| match *word {
                    "URL" => format!("redis://127.0.0.1:{}", row.port),
                    "ADDR" => format!("127.0.0.1:{}", row.port),
                    "PORT" => row.port.to_string(),
                    other => other.to_owned(),
                };
                let before = server.cpu_s();
                let measured = measure(Command::new(command[0]).args(command[1..].iter().map(place)));
                results.push((measured, server.cpu_s() - before));
            }
        }
    }
    let mut at_loopback = vec![None; contenders.len()];
    for row in &rows {
        for (((name, _), results), at_loopback) in contenders.iter().zip(&row.results).zip(&mut at_loopback) {
            let of = |of: fn(&(Measured, f64)) -> f64| median(results.iter().map(of)).expect("one round or more");
            let speed = keys as f64 / of(|(m, _)| m.wall.as_secs_f64());
            let share = speed / *at_loopback.get_or_insert(speed);
            println!(
                "| {} ms | {:.0} | {name} | {speed:.0} | {share:.2} | {:.2} | {:.1} | {:.2} |",
                row.us as f64 / 1e3,
                median(row.pings.iter().copied()).expect("one round or more"),
                of(|(m, _)| m.cpu_s) * 1e6 / keys as f64,
                of(|(m, _)| m.peak_kib) / 1024.0,
                of(|(_, server)| *server),
            );
        }
    }
}

/// One round trip, and what was measured there.
struct Row {
    us: u64,
    port: u16,
    _proxy: Option<proxy::Proxy>,
    pings: Vec<f64>,
    /// Of each contender: each run, with the CPU time of the server in seconds.
    results: Vec<Vec<(Measured, f64)>>,
}

impl Row {
    fn new(us: u64, server: &Server, contenders: usize) -> Self {
        let proxy = (us > 0).then(|| proxy::Proxy::start(&server.addr(), us));
        let port = proxy.as_ref().map_or(server.port, |proxy| proxy.port);
        let results = (0..contenders).map(|_| Vec::new()).collect();
        Self { us, port, _proxy: proxy, pings: Vec::new(), results }
    }
}

/// The median of 200 PINGs in microseconds: the real round trip of the proxy.
fn ping(port: u16) -> f64 {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    stream.set_nodelay(true).expect("a TCP socket");
    let times = (0..200).map(|_| {
        let begun = Instant::now();
        stream.write_all(b"PING\r\n").expect("it reads");
        stream.read_exact(&mut [0_u8; 7]).expect("it answers");
        begun.elapsed().as_secs_f64() * 1e6
    });
    median(times).expect("there are 200")
}
