//! A bound on expired keys: is it kept at every moment, and what does that take of the server?
//!
//! Keys expire at a steady rate, and as many are written. When each of them expires is written into its name and given with PXAT, so
//! that the backlog, which is DBSIZE less the keys that must be alive, is exact at each sample: ten a second. The server begins
//! with as many live keys as there are in the steady state.
//!
//! By environment: `TTLSWEEP_IMPACT_KEEP` (20000x10;2000x10;2000x600;20000x600): keys a second and their TTL in seconds.

use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use hdrhistogram::Histogram;
use serde::Serialize;
use serde_json::json;

use super::common::comes_first;
use super::common::{Server, median};
use super::contender::{Effort, interrupt, ours, program};
use super::load::OpenLoop;
use super::report::{Output, Table, cell};
use super::wire::{Conn, encode};
use super::{Settings, list};

/// Keys that the foreground reads, which have no TTL.
const LIVE: u64 = 50_000;
/// GETs of them a second.
const RATE: u64 = 2_000;
/// The writer sends what is due this often.
const BATCHES_PER_S: u64 = 200;
/// Samples of the backlog in a second.
const SAMPLES_PER_S: u64 = 10;
/// Keys that are written a second before it begins, at least.
const FILL_PER_S: u64 = 150_000;
/// The bound on the delay of the rows that measure when `expired` events come.
const DELAY: [&str; 2] = ["--max-delay", "1s"];
const BACKLOG: [&str; 2] = ["--max-backlog", "5%"];

#[derive(Clone, Copy)]
enum Keeper {
    Nobody,
    Effort10,
    /// Default sweeps, each as soon as the one before has ended.
    Scans,
    Ours(&'static [&'static str]),
}

impl Keeper {
    fn name(self) -> String {
        match self {
            Self::Nobody => "no sweep".to_owned(),
            Self::Effort10 => "active-expire-effort 10".to_owned(),
            Self::Scans => "ttlsweep scan, again and again".to_owned(),
            Self::Ours(args) => format!("ttlsweep keep {}", args.join(" ")),
        }
    }
}

#[derive(Clone, Copy, Serialize)]
struct Flow {
    per_s: u64,
    ttl_s: u64,
}

#[derive(Serialize)]
struct Row {
    keeper: String,
    /// Of the keys with a TTL that are in memory, those that have expired, in per cent.
    median_percent: f64,
    worst_percent: f64,
    samples: usize,
    /// Share of one processor that the server took, in per cent.
    server_cpu_percent: f64,
    /// What our own process took.
    own_cpu_percent: Option<f64>,
    p99_us: u64,
    p99_of_windows_us: Option<f64>,
    /// How late `expired` events came, in milliseconds: p50, p99 and the latest.
    late_ms: Option<[f64; 3]>,
    /// What it says itself of how long it missed its bound.
    missed_s: Option<f64>,
}

pub fn run(settings: &Settings, output: &mut Output) {
    let flows = std::env::var("TTLSWEEP_IMPACT_KEEP").unwrap_or_else(|_| "20000x10;2000x10;2000x600;20000x600".into());
    let flows: Vec<Flow> = flows.split(';').map(flow_of).collect();
    let mut all = Vec::new();
    for binary in &settings.servers {
        let mut version = String::new();
        for (place, flow) in flows.iter().enumerate() {
            let mut rows = Vec::new();
            for keeper in keepers(&[Keeper::Nobody, Keeper::Effort10, Keeper::Scans, Keeper::Ours(&BACKLOG)]) {
                rows.push(measure(settings, binary, *flow, keeper, false, &mut version));
            }
            // When the events come does not depend on much: one flow tells.
            if place == 0 {
                for keeper in keepers(&[Keeper::Nobody, Keeper::Effort10, Keeper::Ours(&DELAY)]) {
                    rows.push(measure(settings, binary, *flow, keeper, true, &mut version));
                }
            }
            show(*flow, &version, &rows, output);
            all.push(json!({ "server": version, "flow": flow, "rows": rows }));
            output.json("d", json!(all));
        }
    }
}

/// Those that are wanted.
fn keepers(all: &[Keeper]) -> Vec<Keeper> {
    let only = list("TTLSWEEP_IMPACT_ONLY", "");
    let is_wanted = |keeper: &&Keeper| only.is_empty() || only.iter().any(|word| keeper.name().contains(word.as_str()));
    all.iter().filter(is_wanted).copied().collect()
}

fn flow_of(text: &str) -> Flow {
    let parts = text.trim().split_once('x').and_then(|(rate, ttl)| Some((rate.parse().ok()?, ttl.parse().ok()?)));
    let (per_s, ttl_s) = parts.unwrap_or_else(|| panic!("TTLSWEEP_IMPACT_KEEP: {text:?} is not such as 20000x10"));
    Flow { per_s, ttl_s }
}

/// How long it settles, and how long it is measured then: what keeps a long TTL comes by every place once in most of a minute.
fn times(flow: Flow) -> (u64, u64) {
    if flow.ttl_s <= 60 { (15, 25) } else { (70, 60) }
}

fn measure(
    settings: &Settings,
    binary: &str,
    flow: Flow,
    keeper: Keeper,
    with_events: bool,
    version: &mut String,
) -> Row {
    let server = Arc::new(Server::start_of(binary));
    *version = server.version();
    let (settle, measured) = times(flow);
    let mut conn = Conn::open(&server.addr());
    conn.ask_ok(&["DEBUG", "POPULATE", &LIVE.to_string(), "live", "32"]);
    let keys = flow.per_s * flow.ttl_s;
    let begins = SystemTime::now() + Duration::from_secs(1 + keys / FILL_PER_S);
    fill(&mut conn, flow, begins);
    assert!(SystemTime::now() < begins, "{keys} keys were not written in time");
    if with_events {
        conn.ask_ok(&["CONFIG", "SET", "notify-keyspace-events", "Ex"]);
    }
    let begun = Instant::now() + begins.duration_since(SystemTime::now()).unwrap_or_default();
    let seconds = settle + measured;
    let samples = Arc::new(Mutex::new(Vec::new()));
    let writer = std::thread::spawn({
        let (addr, samples) = (server.addr(), samples.clone());
        move || write(&addr, flow, begins, begun, seconds, &samples)
    });
    let events = with_events.then(|| Events::listen(&server.addr(), begun + Duration::from_secs(settle)));
    let effort = matches!(keeper, Keeper::Effort10).then(|| Effort::set(&server));
    let kept = match keeper {
        Keeper::Ours(args) => Some(Ours::start(&server, args)),
        _ => None,
    };
    let scans = matches!(keeper, Keeper::Scans).then(|| {
        let (server, end) = (server.clone(), begun + Duration::from_secs(seconds));
        std::thread::spawn(move || {
            while Instant::now() < end {
                ours(&server, &[], Some(end));
            }
        })
    });
    std::thread::sleep((begun + Duration::from_secs(settle)).saturating_duration_since(Instant::now()));
    let foreground = OpenLoop::start(&server.addr(), LIVE, RATE);
    let (from, cpu) = (Instant::now(), server.cpu_s());
    let own = kept.as_ref().map(|kept| super::common::cpu_s(kept.0.id()));
    writer.join().expect("the writer ends");
    let span = from.elapsed().as_secs_f64();
    let server_cpu_percent = 100.0 * (server.cpu_s() - cpu) / span;
    let own_cpu_percent =
        kept.as_ref().zip(own).map(|(kept, own)| 100.0 * (super::common::cpu_s(kept.0.id()) - own) / span);
    let waits = foreground.stop();
    let late_ms = events.map(Events::stop);
    let missed_s = kept.map(Ours::stop);
    scans.into_iter().for_each(|scans| scans.join().expect("the sweeps end"));
    drop(effort);
    let samples = samples.lock().expect("no panic").clone();
    let settled: Vec<f64> =
        samples.iter().filter(|(at, _)| *at >= settle as f64).map(|(_, percent)| *percent).collect();
    let row = Row {
        keeper: keeper.name(),
        median_percent: median(settled.iter().copied()).expect("samples"),
        worst_percent: settled.iter().copied().fold(0.0, f64::max),
        samples: settled.len(),
        server_cpu_percent,
        own_cpu_percent,
        p99_us: waits.all.value_at_quantile(0.99),
        p99_of_windows_us: median(waits.windows.iter().map(|p99| *p99 as f64)),
        late_ms,
        missed_s,
    };
    settings.progress(&format!(
        "d, {version}, {} keys/s, TTL {} s: {}: backlog {:.2} %, at its worst {:.2} %, server {:.1} %, p99 {} us{}",
        flow.per_s,
        flow.ttl_s,
        row.keeper,
        row.median_percent,
        row.worst_percent,
        row.server_cpu_percent,
        row.p99_us,
        row.late_ms.map(|[_, p99, _]| format!(", events {p99:.0} ms late")).unwrap_or_default()
    ));
    row
}

fn since_1970(at: SystemTime) -> Duration {
    at.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970")
}

fn set(out: &mut String, expires_ms: u128, number: u64) {
    let (name, at) = (format!("k:{expires_ms}:{number}"), expires_ms.to_string());
    let _ = write!(
        out,
        "*5\r\n$3\r\nSET\r\n${}\r\n{name}\r\n$32\r\n{}\r\n$4\r\nPXAT\r\n${}\r\n{at}\r\n",
        name.len(),
        "x".repeat(32),
        at.len()
    );
}

/// Writes the keys of the steady state: those that would have been written before it begins.
fn fill(conn: &mut Conn, flow: Flow, begins: SystemTime) {
    conn.send(&["CLIENT", "REPLY", "OFF"]);
    let begins_ms = since_1970(begins).as_millis();
    let mut out = String::new();
    let keys = flow.per_s * flow.ttl_s;
    for number in 0..keys {
        set(&mut out, begins_ms + u128::from(number * 1000 / flow.per_s), number);
        if out.len() > 1 << 18 || number + 1 == keys {
            conn.out.write_all(out.as_bytes()).expect("the server reads");
            out.clear();
        }
    }
    conn.ask_ok(&["CLIENT", "REPLY", "ON"]);
}

/// Writes the keys of each moment when they are due, and samples the backlog by the server's own clock.
fn write(addr: &str, flow: Flow, begins: SystemTime, begun: Instant, seconds: u64, samples: &Mutex<Vec<(f64, f64)>>) {
    comes_first();
    let mut conn = Conn::open(addr);
    let begins_us = since_1970(begins).as_micros();
    let per_batch = flow.per_s / BATCHES_PER_S;
    let (all, ttl_us) = (flow.per_s * flow.ttl_s, u128::from(flow.ttl_s) * 1_000_000);
    let mut text = String::new();
    for batch in 0..seconds * BATCHES_PER_S {
        text.clear();
        for number in batch * per_batch..(batch + 1) * per_batch {
            set(&mut text, (begins_us + ttl_us) / 1000 + u128::from(number * 1000 / flow.per_s), all + number);
        }
        let is_sample = batch % (BATCHES_PER_S / SAMPLES_PER_S) == 0;
        if is_sample {
            text += "*1\r\n$4\r\nTIME\r\n*1\r\n$6\r\nDBSIZE\r\n";
        }
        let due = begun + Duration::from_micros(1_000_000 * batch / BATCHES_PER_S);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        conn.out.write_all(text.as_bytes()).expect("the server reads");
        for _ in 0..per_batch {
            assert_eq!(conn.line(), Some("+OK"), "a SET is done");
        }
        if is_sample {
            assert_eq!(conn.number(), 2, "TIME has two parts");
            let part = |bytes: Vec<u8>| String::from_utf8(bytes).ok().and_then(|t| t.parse().ok()).expect("digits");
            let (seconds, micros): (u128, u128) = (part(conn.bulk()), part(conn.bulk()));
            let now = seconds * 1_000_000 + micros;
            let dbsize = conn.number() as u64 - LIVE;
            let expired = (now.saturating_sub(begins_us) * u128::from(flow.per_s) / 1_000_000) as u64;
            let written = all + (batch + 1) * per_batch;
            let alive = written - expired.min(written);
            let backlog = dbsize.saturating_sub(alive);
            let at = now.saturating_sub(begins_us) as f64 / 1e6;
            samples.lock().expect("no panic").push((at, 100.0 * backlog as f64 / dbsize.max(1) as f64));
        }
    }
}

/// A subscriber of the `expired` events, which say when they should have come.
struct Events {
    stop: Arc<AtomicBool>,
    reader: std::thread::JoinHandle<Histogram<u64>>,
    waker: Conn,
}

impl Events {
    fn listen(addr: &str, from: Instant) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut conn = Conn::open(addr);
        let waker = Conn::open(addr);
        let stopped = stop.clone();
        let reader = std::thread::spawn(move || {
            comes_first();
            conn.send(&["SUBSCRIBE", "__keyevent@0__:expired", "enough"]);
            for _ in 0..2 {
                skip_message(&mut conn);
                conn.number();
            }
            let mut late = Histogram::new_with_bounds(1, 3_600_000, 3).expect("constants");
            while !stopped.load(Ordering::Relaxed) {
                skip_message(&mut conn);
                let name = String::from_utf8(conn.bulk()).expect("our names are text");
                let due = name.split(':').nth(1).and_then(|ms| ms.parse::<u128>().ok());
                if let Some(due) = due.filter(|_| Instant::now() >= from) {
                    let now = since_1970(SystemTime::now()).as_millis();
                    late.saturating_record(now.saturating_sub(due) as u64 + 1);
                }
            }
            late
        });
        Self { stop, reader, waker }
    }

    fn stop(mut self) -> [f64; 3] {
        self.stop.store(true, Ordering::Relaxed);
        self.waker.out.write_all(&encode(&["PUBLISH", "enough", "-"])).expect("the server reads");
        let late = self.reader.join().expect("the reader ends");
        [late.value_at_quantile(0.5) as f64, late.value_at_quantile(0.99) as f64, late.max() as f64]
    }
}

/// The length of a message, its kind and its channel.
fn skip_message(conn: &mut Conn) {
    conn.number();
    conn.skip_bulk();
    conn.skip_bulk();
}

/// Our own process.
struct Ours(Child);

impl Ours {
    fn start(server: &Server, args: &[&str]) -> Self {
        Self(program("keep", &server.url(), args).spawn().expect("the program is built"))
    }

    /// Ends it. Returns how long it missed its bound, as it says.
    fn stop(mut self) -> f64 {
        interrupt(&self.0);
        let mut json = String::new();
        self.0.stdout.take().expect("it is piped").read_to_string(&mut json).expect("UTF-8");
        assert!(self.0.wait().expect("it can be asked").success(), "{json}");
        let record: serde_json::Value = serde_json::from_str(&json).expect("one JSON object");
        record.pointer("/report/shards/0/keep/missed_s").and_then(serde_json::Value::as_f64).expect("it says so")
    }
}

fn show(flow: Flow, version: &str, rows: &[Row], output: &mut Output) {
    let title = format!("Keep: {} keys a second expire, TTL {} s, {version}", flow.per_s, flow.ttl_s);
    let columns = [
        "",
        "backlog, % of the keys with a TTL",
        "at its worst, %",
        "server CPU, %",
        "of that more than no sweep",
        "own CPU, %",
        "foreground p99, us",
        "of windows, us",
        "events late p50, ms",
        "p99",
        "latest",
    ];
    let mut table = Table::new(&title, &columns);
    let mut nobody = None;
    for row in rows {
        if row.keeper == Keeper::Nobody.name() {
            nobody = Some(row.server_cpu_percent);
        }
        let late = |place: usize| cell(row.late_ms.map(|late| late[place]), 0);
        table.row(
            &row.keeper,
            &[
                cell(Some(row.median_percent), 2),
                cell(Some(row.worst_percent), 2),
                cell(Some(row.server_cpu_percent), 1),
                cell(nobody.map(|nobody| row.server_cpu_percent - nobody), 1),
                cell(row.own_cpu_percent, 1),
                row.p99_us.to_string(),
                cell(row.p99_of_windows_us, 0),
                late(0),
                late(1),
                late(2),
            ],
        );
    }
    output.markdown(&table.end());
}
