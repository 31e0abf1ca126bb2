//! Keys with a short TTL keep coming while a contender sweeps without end: does the backlog of expired keys shrink,
//! stay, or grow?
//!
//! The backlog is DBSIZE less the keys that must be alive, and both are exact. The writer's keys are unique, and with
//! every few milliseconds of them it asks the server for its own clock on the same connection; DBSIZE comes behind one
//! of these batches. So nothing has to be guessed about what the server had done when it counted.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::Write as _;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::json;

use super::Settings;
use super::common::comes_first;
use super::common::{Server, median};
use super::contender::{CLOUD, Contender, Effort, NOBODY, Sweep};
use super::plot::{Axis, Line, Scale, lines};
use super::report::{Output, SCAN_TIMES, Table, cell, median_ratio, rounds_of, scan_time_cells};
use super::wire::Conn;

/// How long a key lives.
const TTL: Duration = Duration::from_secs(10);

/// The writer sends what is due this often.
const BATCHES_PER_S: u64 = 200;

/// The worst is looked for behind these seconds: what was there before the sweep came is not its doing.
const SETTLE_S: f64 = 5.0;

/// The end is the median of this many samples, as a pass that has just ended looks better than one under way.
const END: usize = 5;

/// How much of the warm-up is plotted. Before the first TTL is over there is nothing to see.
const PLOTTED_BEFORE_S: f64 = 4.5;

#[derive(Clone, Copy, Serialize)]
struct Sample {
    /// Since the sweep began; below 0 while the server warms up.
    second: f64,
    dbsize: u64,
    alive: u64,
    backlog_percent: f64,
}

#[derive(Serialize)]
struct Round {
    round: u64,
    passes: u64,
    scanned: u64,
    end_percent: f64,
    worst_percent: f64,
    worst_second: f64,
    /// Against the run with no sweep in the same round.
    worst_ratio: Option<f64>,
    /// How long SCANs took by the server's own clock, in microseconds: p99 and p99.9.
    scan_times_us: Option<[f64; 2]>,
    series: Vec<Sample>,
}

pub fn run(settings: &Settings, contenders: &[Contender], output: &mut Output) {
    let contenders: Vec<Contender> =
        contenders.iter().filter(|c| !matches!(c.sweep, Sweep::BackToBack(_) | Sweep::TtlOfEach(_))).cloned().collect();
    let mut all = Vec::new();
    for binary in &settings.servers {
        let mut version = String::new();
        let mut results: Vec<Vec<Round>> = contenders.iter().map(|_| Vec::new()).collect();
        for round in 0..settings.rounds {
            let mut nobody = None;
            for (contender, results) in contenders.iter().zip(&mut results) {
                let server = Server::start_of(binary);
                version = server.version();
                let mut result = measure(settings, &server, contender.sweep, round);
                // It comes first, as the others are compared with it.
                if contender.name == NOBODY {
                    nobody = Some(result.series.clone());
                }
                result.worst_ratio = nobody.as_ref().and_then(|n| ratio_at(n, &result));
                settings.progress(&format!(
                    "b, {version}, round {}: {}: {} passes, backlog {:.1} % at the end, {:.1} % at its worst",
                    round + 1,
                    contender.name,
                    result.passes,
                    result.end_percent,
                    result.worst_percent
                ));
                results.push(result);
            }
        }
        all.push(show(settings, &contenders, &results, &version, output));
        output.json("b", json!(all));
    }
}

fn measure(settings: &Settings, server: &Server, sweep: Sweep, round: u64) -> Round {
    let mut input = Conn::open(&server.addr());
    let out = input.out.try_clone().expect("a second handle");
    let (per_batch, seconds) = (settings.inflow / BATCHES_PER_S, settings.warm_up + settings.sweep);
    let begun = Instant::now();
    let writer = std::thread::spawn(move || write(out, begun, per_batch, seconds));
    let reader = std::thread::spawn(move || read(&mut input, per_batch, seconds));

    let sweep_begins = begun + Duration::from_secs(settings.warm_up);
    std::thread::sleep(sweep_begins.saturating_duration_since(Instant::now()));
    server.forget_scan_times();
    let effort = matches!(sweep, Sweep::Effort10).then(|| Effort::set(server));
    let passes = sweep.again_and_again(server, begun + Duration::from_secs(seconds));
    drop(effort);
    let scan_times_us = server.scan_times();
    writer.join().expect("the writer ends");
    let mut series = reader.join().expect("the reader ends");

    series.iter_mut().for_each(|s| s.second -= settings.warm_up as f64);
    let swept: Vec<Sample> = series.iter().filter(|s| s.second > 0.0).copied().collect();
    let last = &swept[swept.len().saturating_sub(END)..];
    let settled: Vec<&Sample> = swept.iter().filter(|s| s.second > SETTLE_S).collect();
    let settled = if settled.is_empty() { swept.iter().collect() } else { settled };
    let worst = settled.into_iter().max_by(|a, b| a.backlog_percent.total_cmp(&b.backlog_percent));
    let worst = worst.expect("at least one sample while it swept");
    Round {
        round,
        passes: passes.iter().filter(|p| p.whole).count() as u64,
        scanned: passes.iter().map(|p| p.scanned).sum(),
        end_percent: median(last.iter().map(|s| s.backlog_percent)).expect("at least one sample"),
        worst_percent: worst.backlog_percent,
        worst_second: worst.second,
        worst_ratio: None,
        scan_times_us,
        series,
    }
}

/// Writes the keys of each batch when they are due, whether or not the server keeps up.
fn write(mut out: std::net::TcpStream, begun: Instant, per_batch: u64, seconds: u64) {
    comes_first();
    let ttl = TTL.as_millis().to_string();
    let mut text = String::new();
    for batch in 0..seconds * BATCHES_PER_S {
        text.clear();
        for i in batch * per_batch..(batch + 1) * per_batch {
            let len = ttl.len();
            let _ = write!(text, "*5\r\n$3\r\nSET\r\n$12\r\nk:{i:010}\r\n$1\r\nx\r\n$2\r\nPX\r\n${len}\r\n{ttl}\r\n");
        }
        text += "*1\r\n$4\r\nTIME\r\n";
        if ends_a_second(batch) {
            text += "*1\r\n$6\r\nDBSIZE\r\n";
        }
        let due = begun + Duration::from_micros(1_000_000 * batch / BATCHES_PER_S);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        out.write_all(text.as_bytes()).expect("the server reads");
    }
}

fn ends_a_second(batch: u64) -> bool {
    batch % BATCHES_PER_S == BATCHES_PER_S - 1
}

/// Keeps the books: when was each batch written by the server's clock, and how many of them are alive at a DBSIZE?
fn read(input: &mut Conn, per_batch: u64, seconds: u64) -> Vec<Sample> {
    let mut alive: VecDeque<Duration> = VecDeque::new();
    let (mut first, mut series) = (None, Vec::new());
    for batch in 0..seconds * BATCHES_PER_S {
        for _ in 0..per_batch {
            assert_eq!(input.line(), Some("+OK"), "a SET is done");
        }
        assert_eq!(input.number(), 2, "TIME has two parts");
        let part = |bytes: Vec<u8>| String::from_utf8(bytes).ok().and_then(|t| t.parse().ok()).expect("digits");
        let now = Duration::from_secs(part(input.bulk())) + Duration::from_micros(part(input.bulk()));
        alive.push_back(now);
        if ends_a_second(batch) {
            let dbsize = input.number() as u64;
            while alive.front().is_some_and(|written| *written + TTL < now) {
                alive.pop_front();
            }
            let alive = alive.len() as u64 * per_batch;
            // The oldest batch may be expiring just now, in part, and one may lie across two turns of the server.
            assert!(dbsize + 2 * per_batch >= alive, "of {alive} live keys some are gone: DBSIZE is {dbsize}");
            let second = (now - *first.get_or_insert(now)).as_secs_f64() + 1.0;
            let backlog_percent = 100.0 * dbsize.saturating_sub(alive) as f64 / alive as f64;
            series.push(Sample { second, dbsize, alive, backlog_percent });
        }
    }
    series
}

/// The worst of a run against the run with no sweep at the same second.
fn ratio_at(nobody: &[Sample], round: &Round) -> Option<f64> {
    let near = |s: &&Sample| (s.second - round.worst_second).abs() < 0.5;
    Some(round.worst_percent / nobody.iter().find(near)?.backlog_percent)
}

fn show(
    settings: &Settings,
    contenders: &[Contender],
    results: &[Vec<Round>],
    version: &str,
    output: &mut Output,
) -> serde_json::Value {
    let Settings { inflow, sweep, rounds, .. } = *settings;
    let title = format!(
        "Inflow: {inflow} keys a second with a TTL of {} s, swept over and over for {sweep} s, {version}, medians of {rounds} rounds",
        TTL.as_secs()
    );
    let columns = [
        "sweep",
        "rounds",
        "passes",
        "backlog at the end, % of live",
        "at its worst, %",
        "worst / no sweep at that second",
        "end / no sweep",
        "end / COUNT 1000 at 200/s",
        SCAN_TIMES[0],
        SCAN_TIMES[1],
    ];
    let mut table = Table::new(&title, &columns);
    let (nobody, cloud) = (rounds_of(contenders, results, NOBODY), rounds_of(contenders, results, CLOUD));
    let (mut plotted, mut medians) = (Vec::new(), serde_json::Map::new());
    for (contender, rounds) in contenders.iter().zip(results) {
        let of = |of: fn(&Round) -> f64| median(rounds.iter().map(of));
        let (end, worst) = (of(|r| r.end_percent), of(|r| r.worst_percent));
        let worst_ratio = median(rounds.iter().filter_map(|r| r.worst_ratio));
        let to_nobody = median_ratio(rounds, nobody, |r| r.round, |r| r.end_percent);
        let to_cloud = median_ratio(rounds, cloud, |r| r.round, |r| r.end_percent);
        let sweeps = !matches!(contender.sweep, Sweep::Nobody | Sweep::Effort10);
        let [scan_p99, scan_p999] = scan_time_cells(rounds.iter().filter_map(|r| r.scan_times_us));
        let cells = [
            rounds.len().to_string(),
            cell(of(|r| r.passes as f64).filter(|_| sweeps), 0),
            cell(end, 1),
            cell(worst, 1),
            cell(worst_ratio, 2),
            cell(to_nobody, 2),
            cell(to_cloud, 2),
            scan_p99,
            scan_p999,
        ];
        table.row(contender.name, &cells);
        // Each second is the median of the rounds too.
        let seconds = rounds.iter().map(|r| r.series.len()).min().unwrap_or(0);
        let series: Vec<(f64, f64)> = (0..seconds)
            .filter_map(|s| {
                let at = |of: fn(&Sample) -> f64| median(rounds.iter().map(|r| of(&r.series[s])));
                Some((at(|s| s.second)?, at(|s| s.backlog_percent)?))
            })
            .collect();
        medians.insert(
            contender.name.to_owned(),
            json!({ "end_percent": end, "worst_percent": worst, "worst_ratio_to_no_sweep": worst_ratio,
                "end_ratio_to_no_sweep": to_nobody, "end_ratio_to_cloud": to_cloud, "series": series }),
        );
        let points = series.into_iter().filter(|(second, _)| *second > -PLOTTED_BEFORE_S).collect();
        plotted.push(Line { label: contender.name, points, plain: contender.name == NOBODY });
    }
    output.markdown(&table.end());
    let svg = lines(
        &format!("{inflow} keys a second, TTL {} s, {version}: expired keys still held", TTL.as_secs()),
        &Axis { title: "seconds since the sweep began", scale: Scale::Linear },
        &Axis { title: "backlog, % of the live keys", scale: Scale::Log },
        &plotted,
    );
    let name = version.to_lowercase().replace(' ', "-");
    output.plot(&format!("inflow-{name}.svg"), &svg);
    let all: serde_json::Map<_, _> =
        contenders.iter().zip(results).map(|(c, r)| (c.name.to_owned(), json!(r))).collect();
    json!({ "server": version, "medians": medians, "rounds": all })
}
