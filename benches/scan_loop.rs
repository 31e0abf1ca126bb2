//! How fast the loop is: ours beside a bare socket and redis-cli, on one real server, in one run.
//!
//! `make bench`, or `cargo bench --bench scan_loop`. By environment: `TTLSWEEP_BENCH_KEYS` (5,000,000),
//! `TTLSWEEP_BENCH_ROUNDS` (3), `TTLSWEEP_BENCH_SERVER` (redis-server on the PATH).
//!
//! Every contender is a process of its own, so that CPU time and peak memory are its alone; they take turns, and the
//! medians are shown. Linux only: CPU time and memory are read from /proc.

#![allow(clippy::print_stdout, reason = "the table is what it is for")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;

mod common;
use common::{Measured, Server, measure};

/// COUNT of every contender.
const COUNT: u32 = 100;

fn main() {
    let mut args = std::env::args().skip(1).skip_while(|a| a.starts_with("--bench"));
    match args.next().as_deref() {
        Some("bare") => return bare(&args.next().expect("an address"), ""),
        Some("counted") => return bare(&args.next().expect("an address"), "*1\r\n$6\r\nDBSIZE\r\n"),
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
    let median = |results: &[Measured], of: fn(&Measured) -> f64| {
        let mut values: Vec<f64> = results.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let per_sec = |results: &[Measured]| keys as f64 / median(results, |m| m.wall.as_secs_f64());
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
            median(results, |m| m.cpu_s) * 1e6 / keys as f64,
            median(results, |m| m.peak_kib) / 1024.0,
            median(results, |m| m.sent) / keys as f64,
        );
    }
}

/// The least that a client can do: one blocking socket, no parsing beyond the lengths. `around` is sent before and
/// after each SCAN; it must be answered with one line.
fn bare(addr: &str, around: &str) {
    let mut stream = TcpStream::connect(addr).expect("the server is there");
    stream.set_nodelay(true).expect("a TCP socket");
    let (mut buf, mut end) = (vec![0_u8; 64 << 10], 0);
    let mut cursor = b"0".to_vec();
    loop {
        let mut out = format!("{around}*4\r\n$4\r\nSCAN\r\n${}\r\n", cursor.len()).into_bytes();
        out.extend_from_slice(&cursor);
        out.extend_from_slice(format!("\r\n$5\r\nCOUNT\r\n${}\r\n{COUNT}\r\n", COUNT.to_string().len()).as_bytes());
        out.extend_from_slice(around.as_bytes());
        let mut lines = if around.is_empty() { 0 } else { 2 };
        stream.write_all(&out).expect("the server reads");
        let (mut at, mut next, mut left) = (0, Vec::new(), None::<u64>);
        loop {
            // Header lines: *2, $n, the cursor, *n, then $n and a name for each.
            let line_end = |buf: &[u8], at: usize| buf[at..].windows(2).position(|w| w == b"\r\n").map(|p| at + p);
            let number = |line: &[u8]| std::str::from_utf8(&line[1..]).ok().and_then(|t| t.parse::<u64>().ok());
            let mut stuck = true;
            while let Some(stop) = line_end(&buf[..end], at) {
                let line = &buf[at..stop];
                match (line[0], left) {
                    (b':', _) => {
                        lines -= 1;
                        at = stop + 2;
                    }
                    (b'*', None) if next.is_empty() => at = stop + 2,
                    (b'*', None) => {
                        left = number(line);
                        at = stop + 2;
                    }
                    (b'$', _) => {
                        let len = number(line).expect("a length") as usize;
                        if end < stop + 2 + len + 2 {
                            break;
                        }
                        if left.is_none() {
                            next = buf[stop + 2..stop + 2 + len].to_vec();
                        }
                        left = left.map(|n| n - 1);
                        at = stop + 2 + len + 2;
                    }
                    other => panic!("no SCAN reply: {other:?}"),
                }
                if left == Some(0) && lines == 0 {
                    stuck = false;
                    break;
                }
            }
            if !stuck {
                break;
            }
            if end == buf.len() {
                buf.resize(buf.len() * 2, 0);
            }
            let n = stream.read(&mut buf[end..]).expect("the server answers");
            assert!(n > 0, "the server closed the connection");
            end += n;
        }
        end = 0;
        cursor = next;
        if cursor == b"0" {
            return;
        }
    }
}
