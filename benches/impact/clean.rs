//! The reference test of such a service: live keys and dead ones, active expiry off, a steady foreground. How long
//! until the dead are gone, and what did a foreground request wait meanwhile?
//!
//! Every sweep has the foreground without any sweep measured right before and right after it, on the same data: a
//! shared machine is not the same a minute later.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::json;

use super::Settings;
use super::common::{Server, median};
use super::contender::{CLOUD, Contender, Effort, NOBODY, Pass, Sweep};
use super::load::{OpenLoop, Waits};
use super::plot::{Axis, Point, Scale, scatter};
use super::proxy::Proxy;
use super::report::{Output, SCAN_TIMES, Table, cell, median_ratio, rounds_of, scan_time_cells};
use super::wire::{A_DAY, AT_ONCE, Conn};

/// The foreground without any sweep is measured no longer than this where it is a row of its own.
const LONGEST_NOBODY: Duration = Duration::from_secs(60);

/// How long `active-expire-effort 10` is given. It ends by itself nowhere.
const LONGEST_EFFORT: Duration = Duration::from_secs(60);

#[derive(Serialize)]
struct Latency {
    p50_us: u64,
    p99_us: u64,
    /// The median over the windows of their p99.
    p99_of_windows_us: Option<f64>,
    p999_us: u64,
    max_us: u64,
    requests: u64,
}

impl Latency {
    fn of(Waits { all: histogram, windows }: &Waits) -> Self {
        Self {
            p50_us: histogram.value_at_quantile(0.5),
            p99_us: histogram.value_at_quantile(0.99),
            p99_of_windows_us: median(windows.iter().map(|p99| *p99 as f64)),
            p999_us: histogram.value_at_quantile(0.999),
            max_us: histogram.max(),
            requests: histogram.len(),
        }
    }
}

#[derive(Serialize)]
struct Round {
    round: u64,
    seconds: f64,
    reclaimed: u64,
    scanned: u64,
    num: Option<u64>,
    foreground: Latency,
    no_sweep_beside: Latency,
    p99_ratio: f64,
    p99_of_windows_ratio: f64,
    /// How long SCANs took by the server's own clock, in microseconds: p99 and p99.9.
    scan_times_us: Option<[f64; 2]>,
}

pub fn run(settings: &Settings, contenders: &[Contender], output: &mut Output) {
    let contenders: Vec<Contender> = contenders.iter().filter(|c| !c.sweep.is_slow_by_design()).cloned().collect();
    let contenders = &contenders[..];
    let mut server = Server::start();
    let _cores = (settings.round_trip_us > 0).then(|| server.on_a_core_of_its_own());
    let proxy = (settings.round_trip_us > 0).then(|| Proxy::start(&server.addr(), settings.round_trip_us));
    server.way = proxy.as_ref().map(|proxy| proxy.port);
    let mut conn = Conn::open(&server.addr());
    fill_live(settings, &server, &mut conn);
    let mut results: Vec<Vec<Round>> = contenders.iter().map(|_| Vec::new()).collect();
    for round in 0..settings.rounds {
        let mut lengths = Vec::new();
        // No sweep comes last, as it takes as long as the others did on the average.
        let (nobody, sweeps): (Vec<usize>, Vec<usize>) =
            (0..contenders.len()).partition(|i| matches!(contenders[*i].sweep, Sweep::Nobody));
        for i in sweeps.into_iter().chain(nobody) {
            let Contender { name, sweep } = contenders[i].clone();
            let slow = matches!(sweep, Sweep::Cloud(count) if count < 1000);
            if slow && round >= settings.slow_rounds {
                continue;
            }
            fill_dead(settings, &mut conn);
            let mean = lengths.iter().sum::<Duration>().checked_div(lengths.len() as u32).unwrap_or(settings.baseline);
            let result = measure(settings, &server, &mut conn, sweep, round, mean.min(LONGEST_NOBODY));
            if !matches!(sweep, Sweep::Nobody) {
                lengths.push(Duration::from_secs_f64(result.seconds));
            }
            settings.progress(&format!(
                "a, round {}: {name}: {:.2} s, {} reclaimed, p99 {} us, {:.2} times no sweep's, of \
                 windows {:.2}",
                round + 1,
                result.seconds,
                result.reclaimed,
                result.foreground.p99_us,
                result.p99_ratio,
                result.p99_of_windows_ratio
            ));
            results[i].push(result);
        }
    }
    assert_eq!(conn.alive("live", settings.live), settings.live, "every live key is still there");
    show(settings, contenders, &results, &server.version(), output);
}

fn fill_live(settings: &Settings, server: &Server, conn: &mut Conn) {
    let Settings { live, dead, .. } = *settings;
    settings.progress(&format!("a: filling {live} live keys, then {dead} dead ones before each sweep"));
    assert_eq!(server.cli(&["DEBUG", "SET-ACTIVE-EXPIRE", "0"]), "OK");
    if settings.live_ttl {
        conn.fill("live", live, A_DAY);
    } else {
        conn.ask_ok(&["DEBUG", "POPULATE", &live.to_string(), "live", "32"]);
    }
    assert_eq!(conn.dbsize(), live, "the live keys are there");
}

/// Those that nobody has reclaimed are as dead as new ones.
fn fill_dead(settings: &Settings, conn: &mut Conn) {
    let all = settings.live + settings.dead;
    if conn.dbsize() != all {
        conn.fill("dead", settings.dead, AT_ONCE);
        // The clock that keys expire by is the server's, and this is one machine.
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(conn.dbsize(), all, "the dead keys are there");
}

fn measure(
    settings: &Settings,
    server: &Server,
    conn: &mut Conn,
    sweep: Sweep,
    round: u64,
    nobody_takes: Duration,
) -> Round {
    let Settings { live, dead, rate, .. } = *settings;
    let foreground = || OpenLoop::start(&server.addr(), live, rate);
    let alone = || {
        let foreground = foreground();
        std::thread::sleep(settings.baseline / 2);
        foreground.stop()
    };
    let before = alone();

    server.forget_scan_times();
    let load = foreground();
    let begun = Instant::now();
    let pass = match sweep {
        Sweep::Effort10 => effort(settings, server, conn),
        Sweep::Nobody => sweep.pass(server, Some(begun + nobody_takes)),
        _ => sweep.pass(server, None),
    };
    let took = begun.elapsed();
    let latency = load.stop();
    let scan_times_us = server.scan_times();
    if matches!(sweep, Sweep::Effort10) {
        assert_eq!(server.cli(&["DEBUG", "SET-ACTIVE-EXPIRE", "0"]), "OK");
    }

    let beside = Waits::of_both(before, alone());
    let reclaimed = (live + dead).checked_sub(conn.dbsize()).expect("nobody writes");
    match sweep {
        Sweep::Nobody => assert_eq!(reclaimed, 0, "with no sweep and active expiry off, keys stay"),
        // It stops before the end by design, and must not have gone further than the dead.
        Sweep::Effort10 => assert!(reclaimed <= dead, "only dead keys are gone"),
        _ => assert_eq!(reclaimed, dead, "everything dead is gone, and nothing else"),
    }
    if let Some(num) = pass.num {
        assert_eq!(num, dead, "what it says that it reclaimed is what is gone");
    }
    let (foreground, no_sweep_beside) = (Latency::of(&latency), Latency::of(&beside));
    // No whole window makes no ratio, and medians leave out what is no number.
    let of_windows = |latency: &Latency| latency.p99_of_windows_us.unwrap_or(f64::NAN);
    Round {
        round,
        seconds: took.as_secs_f64(),
        reclaimed,
        scanned: pass.scanned,
        num: pass.num,
        p99_ratio: foreground.p99_us as f64 / no_sweep_beside.p99_us as f64,
        p99_of_windows_ratio: of_windows(&foreground) / of_windows(&no_sweep_beside),
        foreground,
        no_sweep_beside,
        scan_times_us,
    }
}

/// Until the dead are below 1 % of the keys that had a TTL, where it stops by design, or it has had its time.
fn effort(settings: &Settings, server: &Server, conn: &mut Conn) -> Pass {
    let with_ttl = settings.dead + if settings.live_ttl { settings.live } else { 0 };
    let begun = Instant::now();
    let _effort = Effort::set(server);
    assert_eq!(server.cli(&["DEBUG", "SET-ACTIVE-EXPIRE", "1"]), "OK");
    while (conn.dbsize() - settings.live) * 100 >= with_ttl && begun.elapsed() < LONGEST_EFFORT {
        std::thread::sleep(Duration::from_millis(20));
    }
    Pass::default()
}

fn show(settings: &Settings, contenders: &[Contender], results: &[Vec<Round>], version: &str, output: &mut Output) {
    let Settings { live, dead, rate, rounds, .. } = *settings;
    let title = format!(
        "Cleaning: {live} live keys {} and {dead} dead ones, {rate} foreground GETs a second, {version}, sweeps {}, medians of {rounds} rounds",
        if settings.live_ttl { "with a TTL" } else { "without a TTL" },
        match settings.round_trip_us {
            0 => "beside the server".to_owned(),
            us => format!("{} ms away", us as f64 / 1e3),
        }
    );
    let columns = [
        "sweep",
        "rounds",
        "seconds",
        "seconds / COUNT 1000 at 200/s",
        "p50 us",
        "p99 us",
        "p99.9 us",
        "p99 / no sweep beside it",
        "p99 - no sweep's, us",
        "of windows",
        "p99 / COUNT 1000 at 200/s",
        "dead keys reclaimed",
        SCAN_TIMES[0],
        SCAN_TIMES[1],
    ];
    let mut table = Table::new(&title, &columns);
    let cloud = rounds_of(contenders, results, CLOUD);
    let (mut points, mut medians) = (Vec::new(), serde_json::Map::new());
    for (Contender { name, sweep }, rounds) in contenders.iter().zip(results) {
        let of = |of: fn(&Round) -> f64| median(rounds.iter().map(of));
        let seconds = of(|r| r.seconds);
        let p99 = of(|r| r.foreground.p99_us as f64);
        let p99_ratio = of(|r| r.p99_ratio);
        let seconds_to_cloud = median_ratio(rounds, cloud, |r| r.round, |r| r.seconds);
        let windows_ratio = of(|r| r.p99_of_windows_ratio);
        let p99_to_cloud = median_ratio(rounds, cloud, |r| r.round, |r| r.foreground.p99_us as f64);
        let cleans = !matches!(sweep, Sweep::Nobody);
        let [scan_p99, scan_p999] = scan_time_cells(rounds.iter().filter_map(|r| r.scan_times_us));
        let cells = [
            rounds.len().to_string(),
            cell(seconds.filter(|_| cleans), 2),
            cell(seconds_to_cloud.filter(|_| cleans), 2),
            cell(of(|r| r.foreground.p50_us as f64), 0),
            cell(p99, 0),
            cell(of(|r| r.foreground.p999_us as f64), 0),
            cell(p99_ratio, 2),
            cell(of(|r| r.foreground.p99_us as f64 - r.no_sweep_beside.p99_us as f64), 0),
            cell(windows_ratio, 2),
            cell(p99_to_cloud, 2),
            cell(of(|r| r.reclaimed as f64), 0),
            scan_p99,
            scan_p999,
        ];
        table.row(name, &cells);
        medians.insert(
            (*name).to_owned(),
            json!({ "seconds": seconds, "p99_us": p99, "p99_ratio_to_no_sweep": p99_ratio,
                "p99_of_windows_ratio_to_no_sweep": windows_ratio,
                "seconds_ratio_to_cloud": seconds_to_cloud, "p99_ratio_to_cloud": p99_to_cloud }),
        );
        if let (Some(x), Some(y), true) = (seconds, p99, cleans) {
            points.push(Point { label: name, x, y });
        }
    }
    output.markdown(&table.end());
    let all: serde_json::Map<_, _> =
        contenders.iter().zip(results).map(|(c, r)| (c.name.to_owned(), json!(r))).collect();
    output.json("a", json!({ "server": version, "medians": medians, "rounds": all }));
    // Of all that was measured beside the sweeps, which is more than the one row.
    let nobody = median(results.iter().flatten().map(|r| r.no_sweep_beside.p99_us as f64));
    let svg = scatter(
        &format!("{live} live and {dead} dead keys: time to clean against what others wait"),
        &Axis { title: "seconds to clean", scale: Scale::Log },
        &Axis { title: "p99 of a foreground GET, us", scale: Scale::Log },
        &points,
        nobody.map(|y| (NOBODY, y)),
    );
    output.plot("clean.svg", &svg);
}
