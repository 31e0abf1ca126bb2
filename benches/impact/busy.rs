//! A master near its limit: how much of its throughput is left to the other clients while a contender sweeps over and
//! over, and how far does the sweep come?
//!
//! Again the other clients are measured without any sweep right before and right after, without stopping them.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::json;

use super::Settings;
use super::common::{Server, median};
use super::contender::{CLOUD, Contender, NOBODY, Sweep};
use super::load::ClosedLoop;
use super::plot::{Axis, Point, Scale, scatter};
use super::report::{Output, Table, cell, median_ratio, rounds_of};
use super::wire::{A_DAY, Conn};

const CLIENTS: usize = 20;

/// Threads that they share. On two cores, fewer of them leave the server idle in between, and one for each client
/// spends its time on switching.
const THREADS: usize = 4;

/// What the connections need to come into their stride.
const START: Duration = Duration::from_millis(500);

#[derive(Serialize, Clone, Copy)]
struct Window {
    gets_per_s: f64,
    /// CPU time that the server took of this time: about 1 where its main thread is what limits.
    server_cpu_share: f64,
}

#[derive(Serialize)]
struct Round {
    round: u64,
    before: Window,
    during: Window,
    after: Window,
    /// GETs a second against those without any sweep.
    ratio: f64,
    passes: u64,
    keys_per_s: f64,
}

pub fn run(settings: &Settings, contenders: &[Contender], output: &mut Output) {
    let wanted = |c: &&Contender| match c.sweep {
        Sweep::Nobody | Sweep::Ours { .. } | Sweep::RedisCli(None) => true,
        _ => c.name == CLOUD,
    };
    let contenders: Vec<Contender> = contenders.iter().filter(wanted).cloned().collect();
    let server = Server::start();
    let mut conn = Conn::open(&server.addr());
    settings.progress(&format!("c: filling {} live keys", settings.live));
    // With a TTL: a DB in which nothing can expire is skipped by whoever looks.
    conn.fill("live", settings.live, A_DAY);
    let mut results: Vec<Vec<Round>> = contenders.iter().map(|_| Vec::new()).collect();
    for round in 0..settings.rounds {
        for (contender, results) in contenders.iter().zip(&mut results) {
            let result = measure(settings, &server, contender.sweep, round);
            assert_eq!(conn.dbsize(), settings.live, "every live key is still there");
            settings.progress(&format!(
                "c, round {}: {}: {:.0} GET/s, {:.2} of no sweep's {:.0}; {:.0} keys/s swept; server CPU {:.2} without",
                round + 1,
                contender.name,
                result.during.gets_per_s,
                result.ratio,
                f64::midpoint(result.before.gets_per_s, result.after.gets_per_s),
                result.keys_per_s,
                result.before.server_cpu_share
            ));
            results.push(result);
        }
    }
    assert_eq!(conn.alive("live", settings.live), settings.live, "every live key is still there");
    show(settings, &contenders, &results, &server.version(), output);
}

fn measure(settings: &Settings, server: &Server, sweep: Sweep, round: u64) -> Round {
    let load = ClosedLoop::start(&server.addr(), settings.live, CLIENTS, THREADS);
    std::thread::sleep(START);
    let window = |work: &mut dyn FnMut()| {
        let (begun, cpu, answered) = (Instant::now(), server.cpu_s(), load.answered());
        work();
        let seconds = begun.elapsed().as_secs_f64();
        Window {
            gets_per_s: (load.answered() - answered) as f64 / seconds,
            server_cpu_share: (server.cpu_s() - cpu) / seconds,
        }
    };
    let before = window(&mut || std::thread::sleep(settings.baseline / 2));
    let (mut passes, mut took) = (Vec::new(), Duration::ZERO);
    let during = window(&mut || {
        let begun = Instant::now();
        passes = sweep.again_and_again(server, begun + settings.busy);
        took = begun.elapsed();
    });
    let after = window(&mut || std::thread::sleep(settings.baseline / 2));
    load.stop();
    for pass in &passes {
        assert!(pass.num.is_none_or(|num| num == 0), "nothing has expired, and it says so");
    }
    Round {
        round,
        before,
        during,
        after,
        ratio: during.gets_per_s / f64::midpoint(before.gets_per_s, after.gets_per_s),
        passes: passes.iter().filter(|p| p.whole).count() as u64,
        keys_per_s: passes.iter().map(|p| p.scanned).sum::<u64>() as f64 / took.as_secs_f64(),
    }
}

fn show(settings: &Settings, contenders: &[Contender], results: &[Vec<Round>], version: &str, output: &mut Output) {
    let Settings { live, rounds, .. } = *settings;
    let title = format!(
        "Busy master: {CLIENTS} closed-loop clients, {live} live keys, {version}, swept over and over for {} s, medians of {rounds} rounds",
        settings.busy.as_secs()
    );
    let columns = [
        "sweep",
        "rounds",
        "GET/s",
        "GET/s / no sweep beside it",
        "GET/s / COUNT 1000 at 200/s",
        "whole passes",
        "keys/s swept",
        "keys/s / COUNT 1000 at 200/s",
        "server CPU without sweep",
    ];
    let mut table = Table::new(&title, &columns);
    let cloud = rounds_of(contenders, results, CLOUD);
    let (mut points, mut medians) = (Vec::new(), serde_json::Map::new());
    for (contender, rounds) in contenders.iter().zip(results) {
        let of = |of: fn(&Round) -> f64| median(rounds.iter().map(of));
        let (gets, ratio, keys) = (of(|r| r.during.gets_per_s), of(|r| r.ratio), of(|r| r.keys_per_s));
        // Of the shares, not of the bare numbers: each has its own machine-minute.
        let to_cloud = median_ratio(rounds, cloud, |r| r.round, |r| r.ratio);
        let keys_to_cloud = median_ratio(rounds, cloud, |r| r.round, |r| r.keys_per_s);
        let sweeps = contender.name != NOBODY;
        let cells = [
            rounds.len().to_string(),
            cell(gets, 0),
            cell(ratio, 2),
            cell(to_cloud, 2),
            cell(of(|r| r.passes as f64).filter(|_| sweeps), 0),
            cell(keys.filter(|_| sweeps), 0),
            cell(keys_to_cloud.filter(|_| sweeps), 2),
            cell(of(|r| f64::midpoint(r.before.server_cpu_share, r.after.server_cpu_share)), 2),
        ];
        table.row(contender.name, &cells);
        medians.insert(
            contender.name.to_owned(),
            json!({ "gets_per_s": gets, "ratio_to_no_sweep": ratio, "ratio_to_cloud": to_cloud, "keys_per_s": keys }),
        );
        if let (Some(x), Some(y), true) = (keys, ratio, sweeps) {
            points.push(Point { label: contender.name, x, y });
        }
    }
    output.markdown(&table.end());
    let all: serde_json::Map<_, _> =
        contenders.iter().zip(results).map(|(c, r)| (c.name.to_owned(), json!(r))).collect();
    output.json("c", json!({ "server": version, "medians": medians, "rounds": all }));
    let svg = scatter(
        &format!("{CLIENTS} closed-loop clients: what is left to them against how fast the sweep goes"),
        &Axis { title: "keys swept a second", scale: Scale::Log },
        &Axis { title: "GET/s against no sweep", scale: Scale::Linear },
        &points,
        Some((NOBODY, 1.0)),
    );
    output.plot("busy.svg", &svg);
}
