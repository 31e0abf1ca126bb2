//! What a sweep costs the other clients: the time to clean against the latency that they feel, side by side in one run.
//!
//! `make impact`. By environment: `TTLSWEEP_BENCH_LIVE` (2,000,000) and `TTLSWEEP_BENCH_DEAD` (1,000,000) keys,
//! `TTLSWEEP_BENCH_ROUNDS` (3), `TTLSWEEP_BENCH_RATE` (5,000 foreground GETs a second), `TTLSWEEP_BENCH_SERVER`
//! (redis-server on the PATH).
//!
//! The foreground is open loop: a GET is due every 1 / rate seconds whether or not the last one was answered, and its
//! latency counts from when it was due. So a server that stands still for a millisecond shows in every request of that
//! millisecond, and not only in the one that happened to be under way.

#![allow(clippy::print_stdout, reason = "the table is what it is for")]

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

mod common;
use common::Server;

/// How long the foreground is measured without any sweep.
const BASELINE: Duration = Duration::from_secs(10);

fn env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// Who sweeps.
#[derive(Clone, Copy)]
enum Sweep {
    Nobody,
    /// `ttlsweep scan` with these arguments.
    Ours(&'static [&'static str]),
    /// The cloud feature's profile: one SCAN of this COUNT every 5 ms.
    Cloud(u32),
    /// redis-cli --scan: COUNT 10, back to back.
    RedisCli,
}

const CONTENDERS: &[(&str, Sweep)] = &[
    ("no sweep", Sweep::Nobody),
    ("ttlsweep, default", Sweep::Ours(&[])),
    ("ttlsweep, max-slice 50us", Sweep::Ours(&["--max-slice", "50us"])),
    ("ttlsweep, max-slice 100us", Sweep::Ours(&["--max-slice", "100us"])),
    ("ttlsweep, max-slice 200us", Sweep::Ours(&["--max-slice", "200us"])),
    ("COUNT 1000 every 5 ms", Sweep::Cloud(1000)),
    ("redis-cli --scan", Sweep::RedisCli),
];

struct Result {
    took: Duration,
    freed: u64,
    latency: Histogram<u64>,
}

fn main() {
    let (live, dead) = (env("TTLSWEEP_BENCH_LIVE", 2_000_000), env("TTLSWEEP_BENCH_DEAD", 1_000_000));
    let (rounds, rate) = (env("TTLSWEEP_BENCH_ROUNDS", 3), env("TTLSWEEP_BENCH_RATE", 5_000));
    let server = Server::start();
    server.cli(&["DEBUG", "SET-ACTIVE-EXPIRE", "0"]);
    assert_eq!(server.cli(&["DEBUG", "POPULATE", &live.to_string(), "live", "32"]), "OK");
    println!(
        "{live} live and {dead} dead keys, {rate} foreground GETs a second, {rounds} rounds, medians; {}",
        server.version()
    );
    let mut results: Vec<Vec<Result>> = CONTENDERS.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        for ((_, sweep), results) in CONTENDERS.iter().zip(&mut results) {
            fill_dead(&server, live, dead);
            let result = run(&server, *sweep, live, rate);
            if !matches!(sweep, Sweep::Nobody) {
                assert_eq!(result.freed, dead, "everything dead is gone, and nothing else");
            }
            results.push(result);
        }
    }
    let median = |results: &[Result], of: &dyn Fn(&Result) -> f64| {
        let mut values: Vec<f64> = results.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let quantile = |q: f64| move |r: &Result| r.latency.value_at_quantile(q) as f64;
    let base = median(&results[0], &quantile(0.99));
    println!("| sweep | seconds | foreground p50 us | p99 us | p99.9 us | p99 against no sweep |");
    println!("|---|---|---|---|---|---|");
    for ((name, sweep), results) in CONTENDERS.iter().zip(&results) {
        let took = match sweep {
            Sweep::Nobody => "-".to_owned(),
            _ => format!("{:.1}", median(results, &|r| r.took.as_secs_f64())),
        };
        let us = |q: f64| median(results, &quantile(q));
        println!("| {name} | {took} | {:.0} | {:.0} | {:.0} | {:.2} |", us(0.5), us(0.99), us(0.999), us(0.99) / base);
    }
}

fn run(server: &Server, sweep: Sweep, live: u64, rate: u64) -> Result {
    let before = server.dbsize();
    let foreground = Foreground::start(&server.addr(), live, rate);
    let begun = Instant::now();
    match sweep {
        Sweep::Nobody => std::thread::sleep(BASELINE),
        Sweep::Ours(more) => {
            let mut command = Command::new(env!("CARGO_BIN_EXE_ttlsweep"));
            command.args(["scan", &format!("redis://{}", server.addr()), "--quiet"]).args(more);
            assert!(command.status().expect("the program is built").success());
        }
        Sweep::Cloud(count) => every_five_ms(&server.addr(), count),
        Sweep::RedisCli => {
            let mut command = Command::new("redis-cli");
            command.args(["-p", &server.port.to_string(), "--scan"]).stdout(Stdio::null());
            assert!(command.status().expect("redis-cli is on the PATH").success());
        }
    }
    let took = begun.elapsed();
    Result { took, latency: foreground.stop(), freed: before - server.dbsize() }
}

/// One SCAN every 5 ms by the clock, or as soon as the last one is answered.
fn every_five_ms(addr: &str, count: u32) {
    let mut conn = Conn::open(addr);
    let mut cursor = "0".to_owned();
    let mut due = Instant::now();
    loop {
        cursor = conn.scan(&cursor, count);
        if cursor == "0" {
            return;
        }
        due = (due + Duration::from_millis(5)).max(Instant::now());
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

/// The other clients.
struct Foreground {
    stop: Arc<AtomicBool>,
    writer: std::thread::JoinHandle<()>,
    reader: std::thread::JoinHandle<Histogram<u64>>,
}

impl Foreground {
    fn start(addr: &str, live: u64, rate: u64) -> Self {
        let mut out = TcpStream::connect(addr).expect("the server is there");
        out.set_nodelay(true).expect("a TCP socket");
        let input = out.try_clone().expect("a second handle");
        let stop = Arc::new(AtomicBool::new(false));
        let due_times = Arc::new(Mutex::new(VecDeque::<Instant>::new()));
        let writer = std::thread::spawn({
            let (stop, due_times) = (stop.clone(), due_times.clone());
            move || {
                let begun = Instant::now();
                for n in 0_u64.. {
                    let due = begun + Duration::from_nanos(1_000_000_000 / rate * n);
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    due_times.lock().expect("no panic holds it").push_back(due);
                    // A step that is coprime to any number of keys up to its size spreads over all of them.
                    let key = format!("live:{}", n.wrapping_mul(7_368_787) % live);
                    let get = format!("*2\r\n$3\r\nGET\r\n${}\r\n{key}\r\n", key.len());
                    out.write_all(get.as_bytes()).expect("the server reads");
                }
                out.shutdown(std::net::Shutdown::Write).expect("an open socket");
            }
        });
        let reader = std::thread::spawn(move || {
            let mut latency = Histogram::new_with_bounds(1, 60_000_000, 3).expect("constants");
            let mut input = BufReader::new(input);
            let (mut line, mut value) = (String::new(), Vec::new());
            loop {
                line.clear();
                if input.read_line(&mut line).expect("the server answers") == 0 {
                    return latency;
                }
                let len: usize = line[1..].trim().parse().expect("a value that is there");
                value.resize(len + 2, 0);
                input.read_exact(&mut value).expect("the value");
                let due = due_times.lock().expect("no panic holds it").pop_front().expect("it was asked for");
                latency.saturating_record((due.elapsed().as_micros() as u64).max(1));
            }
        });
        Self { stop, writer, reader }
    }

    fn stop(self) -> Histogram<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.writer.join().expect("the writer ends");
        self.reader.join().expect("the reader ends")
    }
}

struct Conn {
    out: TcpStream,
    input: BufReader<TcpStream>,
}

impl Conn {
    fn open(addr: &str) -> Self {
        let out = TcpStream::connect(addr).expect("the server is there");
        out.set_nodelay(true).expect("a TCP socket");
        let input = BufReader::with_capacity(1 << 16, out.try_clone().expect("a second handle"));
        Self { out, input }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.input.read_line(&mut line).expect("the server answers");
        line.trim_end().to_owned()
    }

    fn bulk(&mut self) -> Vec<u8> {
        let len: usize = self.line()[1..].parse().expect("a length");
        let mut bytes = vec![0; len + 2];
        self.input.read_exact(&mut bytes).expect("the string");
        bytes.truncate(len);
        bytes
    }

    fn scan(&mut self, cursor: &str, count: u32) -> String {
        let words = ["SCAN", cursor, "COUNT", &count.to_string()].map(|w| format!("${}\r\n{w}\r\n", w.len()));
        self.out.write_all(format!("*4\r\n{}", words.concat()).as_bytes()).expect("the server reads");
        self.line();
        let next = String::from_utf8(self.bulk()).expect("digits");
        let names: usize = self.line()[1..].parse().expect("a length");
        for _ in 0..names {
            self.bulk();
        }
        next
    }
}

/// Writes keys that expire at once, and waits until all have. Those of an earlier run that are still there are
/// overwritten.
fn fill_dead(server: &Server, live: u64, dead: u64) {
    let mut conn = Conn::open(&server.addr());
    for first in (0..dead).step_by(5000) {
        let keys = first..dead.min(first + 5000);
        let set = |i| format!("*5\r\n$3\r\nSET\r\n$15\r\ndead:{i:010}\r\n$1\r\nx\r\n$2\r\nPX\r\n$3\r\n500\r\n");
        conn.out.write_all(keys.clone().map(set).collect::<String>().as_bytes()).expect("the server reads");
        keys.for_each(|_| drop(conn.line()));
    }
    // The clock that keys expire by is the server's, and this is one machine.
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(server.dbsize(), live + dead, "the dead keys are there");
}
