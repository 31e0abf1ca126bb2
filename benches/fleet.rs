//! What many instances and several daemons cost the database and the machine, and how late sweeps begin.
//!
//! `make bench`, or `cargo bench --bench fleet`. For each number of daemons on one PostgreSQL: idle, then a burst of due times at one
//! moment, then the due times of an hour. Then daemons are killed, and the time until another one sends the next batch is measured. The
//! instances are simulated small masters, one at each address 127.x.x.x.
//!
//! By environment: `TTLSWEEP_BENCH_INSTANCES` (10000), `TTLSWEEP_BENCH_DAEMONS` (1,2,4), `TTLSWEEP_BENCH_BURST` (1000),
//! `TTLSWEEP_BENCH_KILLS` (8), `TTLSWEEP_TEST_POSTGRES` (the folder with PostgreSQL's programs, from scripts/servers.sh),
//! `TTLSWEEP_BENCH_SERVER` (redis-server on the PATH). Linux only: CPU time and memory are read from /proc.

#![allow(clippy::print_stdout, reason = "it prints a table")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use sqlx::{PgConnection, Row};

mod common;
#[path = "common/masters.rs"]
mod masters;
#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../tests/it/support/postgres.rs"]
mod postgres;
#[allow(dead_code, reason = "other benchmarks use the rest")]
#[path = "common/seed.rs"]
mod seed;
use common::{Server, cpu_s};
use masters::Everywhere;
use postgres::Postgres;

/// Keys of a simulated master, as a power of two.
const BITS: u32 = 8;
/// Keys of the simulated master that is swept while daemons are killed, as a power of two: half an hour at its pace.
const SLOW_BITS: u32 = 14;
/// How long each quiet stretch is measured.
const STRETCH: Duration = Duration::from_secs(30);
/// The longest time that a daemon takes to start: it reads ten thousand instances and records their schedules.
const START: Duration = Duration::from_secs(15);

// `postgres.rs` of the tests needs these.
const PATIENCE: Duration = Duration::from_secs(60);

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

fn skipped(why: &str) {
    println!("the table of several daemons is left out: {why}");
}

fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args(["-s", name, &pid.to_string()]).status();
    assert!(status.is_ok_and(|status| status.success()), "SIG{name} to {pid}");
}

async fn probe(what: &str, within: Duration, mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + within;
    while !holds().await {
        assert!(Instant::now() < end, "waited {within:?} in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// A daemon, killed on drop.
struct Daemon {
    child: Child,
}

impl Daemon {
    fn start(settings: &std::path::Path, name: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ttlsweep"))
            .args(["serve", "--name", name, "--config"])
            .arg(settings)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program is built");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let line = lines.next().expect("it says where it listens").expect("text");
        assert!(line.starts_with("listening on "), "{line}");
        Self { child }
    }

    fn cpu_s(&self) -> f64 {
        cpu_s(self.child.id())
    }

    fn memory_mib(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0");
        line.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0) / 1024.0
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn address(instance: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 1, 0, 0)) + u32::try_from(instance).expect("a small number"))
}

/// The settings of all daemons: `due(i)` is when instance `i` is due.
fn settings(
    count: usize,
    port: u16,
    postgres: &Postgres,
    more: &str,
    due: impl Fn(usize) -> Option<Timestamp>,
) -> tempfile::NamedTempFile {
    let journal = std::env::temp_dir().join(format!("ttlsweep-bench-{}", std::process::id()));
    let mut text = format!(
        "[api]\nlisten = \"127.0.0.1:0\"\n[tasks]\nat-once = 64\n[store]\nurl = \"{}\"\njournal = \"{}\"\n",
        postgres.url(),
        journal.display()
    );
    for instance in 0..count {
        let at = address(instance);
        text.push_str(&format!(
            "[[instances]]\nid = \"i{instance}\"\nproject_id = \"p\"\nurl = \"redis://{at}:{port}\"\ndb = 0\n{more}"
        ));
        if let Some(due) = due(instance) {
            let due = due.strftime("%Y-%m-%dT%H:%M:%SZ");
            text.push_str(&format!(
                "[instances.auto-scan]\nenabled = true\nfirst-scan-at = \"{due}\"\ninterval = \"0\"\n"
            ));
        }
    }
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(file.path(), text).expect("the settings");
    file
}

/// Statements that the database has logged since the last call.
struct Statements(usize);

impl Statements {
    fn take(&mut self, postgres: &Postgres) -> usize {
        let log = postgres.log();
        let count =
            log.lines().filter(|line| line.contains("LOG:  execute ") || line.contains("LOG:  statement: ")).count();
        count - std::mem::replace(&mut self.0, count)
    }
}

/// The value at a share of a sorted list.
fn quantile(sorted: &[i64], share: f64) -> i64 {
    sorted.get(((sorted.len() as f64 * share) as usize).min(sorted.len().saturating_sub(1))).copied().unwrap_or(0)
}

/// How long after its due time each task began, sorted, in milliseconds.
async fn delays(conn: &mut PgConnection, from: Timestamp, to: Timestamp) -> Vec<i64> {
    let sql = "SELECT started_at - due AS late FROM due_times JOIN tasks ON tasks.id = task_id \
               WHERE due >= $1 AND due < $2 AND started_at IS NOT NULL ORDER BY late";
    let rows = sqlx::query(sql).bind(from.as_millisecond()).bind(to.as_millisecond()).fetch_all(conn).await;
    rows.expect("the records").iter().map(|row| row.get("late")).collect()
}

async fn count(conn: &mut PgConnection, sql: &'static str) -> i64 {
    sqlx::query(sql).fetch_one(conn).await.expect("the records").get(0)
}

async fn table(standins: &Everywhere, instances: usize, daemons: usize, burst: usize) -> bool {
    let Some(postgres) = Postgres::start().await else { return false };
    let mut conn = postgres.conn().await;
    sqlx::query("ALTER DATABASE records SET log_statement = 'all'").execute(&mut conn).await.expect("a superuser");
    let now = Timestamp::now();
    let at = |seconds: f64| now + SignedDuration::from_millis((seconds * 1_000.0) as i64);
    let started = (START * (u32::try_from(daemons).unwrap_or(1) + 1)).as_secs_f64();
    let burst_at = started + STRETCH.as_secs_f64() + 5.0;
    let hour_at = burst_at + STRETCH.as_secs_f64();
    let spread = 3_600.0 / (instances - burst).max(1) as f64;
    let due = |instance: usize| {
        Some(if instance < burst { at(burst_at) } else { at(hour_at + (instance - burst) as f64 * spread) })
    };
    let file = settings(instances, standins.port, &postgres, "", due);
    let running: Vec<Daemon> = (0..daemons).map(|place| Daemon::start(file.path(), &format!("d{place}"))).collect();
    let until = async |seconds: f64| {
        let left = at(seconds).duration_since(Timestamp::now());
        tokio::time::sleep(Duration::try_from(left).unwrap_or_default()).await;
    };
    until(started).await;
    let mut statements = Statements(0);
    statements.take(&postgres);
    let cpu: Vec<f64> = running.iter().map(Daemon::cpu_s).collect();
    until(started + STRETCH.as_secs_f64()).await;
    let idle = statements.take(&postgres) as f64 / STRETCH.as_secs_f64();
    let idle_cpu: f64 = running.iter().zip(&cpu).map(|(daemon, before)| daemon.cpu_s() - before).sum();
    until(burst_at).await;
    let begun = Instant::now();
    probe("the burst is claimed", PATIENCE, async || {
        let sql = "SELECT COUNT(*) FROM tasks WHERE fence > 0";
        usize::try_from(count(&mut conn, sql).await).is_ok_and(|claimed| claimed >= burst)
    })
    .await;
    let claimed = begun.elapsed();
    until(hour_at).await;
    let late = delays(&mut conn, at(burst_at - 2.0), at(hour_at - 1.0)).await;
    statements.take(&postgres);
    let cpu: Vec<f64> = running.iter().map(Daemon::cpu_s).collect();
    until(hour_at + STRETCH.as_secs_f64()).await;
    let busy = statements.take(&postgres) as f64 / STRETCH.as_secs_f64();
    let busy_cpu: f64 = running.iter().zip(&cpu).map(|(daemon, before)| daemon.cpu_s() - before).sum();
    let hour = delays(&mut conn, at(hour_at - 1.0), at(hour_at + STRETCH.as_secs_f64() - 2.0)).await;
    let memory = running.iter().map(Daemon::memory_mib).fold(0.0, f64::max);
    let share = |cpu: f64| cpu * 100.0 / daemons as f64 / STRETCH.as_secs_f64();
    println!(
        "| {daemons} | {idle:.1} | {busy:.0} | {:.1} | {:.1} | {memory:.0} | {:.1} | {} / {} | {} / {} |",
        share(idle_cpu),
        share(busy_cpu),
        claimed.as_secs_f64(),
        quantile(&late, 0.5),
        quantile(&late, 0.99),
        quantile(&hour, 0.5),
        quantile(&hour, 0.99),
    );
    true
}

/// Kills the daemon that sweeps, again and again. Returns the times until another daemon sent a batch, sorted, in milliseconds.
async fn kills(standins: &Everywhere, kills: usize) -> Vec<i64> {
    let Some(postgres) = Postgres::start().await else { return Vec::new() };
    let mut conn = postgres.conn().await;
    // A batch each second.
    let slow = "count = 10\nmax-slice = \"0s\"\nmax-keys-per-sec = 10\n";
    let file = settings(1, standins.port, &postgres, slow, |_| Some(Timestamp::now() + SignedDuration::from_secs(5)));
    let mut daemons = [Daemon::start(file.path(), "d0"), Daemon::start(file.path(), "d1")];
    let mut times = Vec::new();
    for _ in 0..kills {
        let mut owner = String::new();
        probe("a daemon sweeps", PATIENCE, async || {
            let sql = "SELECT name FROM daemons JOIN tasks ON owner = daemons.id WHERE state = 'running'";
            owner =
                sqlx::query(sql).fetch_optional(&mut conn).await.ok().flatten().map_or(String::new(), |row| row.get(0));
            !owner.is_empty() && standins.scanned(address(0)).is_some()
        })
        .await;
        // At any point between two renewals.
        tokio::time::sleep(Duration::from_millis(u64::from(Timestamp::now().subsec_millisecond().unsigned_abs()) * 5))
            .await;
        let place = usize::from(owner == "d1");
        let killed = Instant::now();
        let _ = daemons[place].child.kill();
        probe("another goes on", PATIENCE, async || {
            standins.scanned(address(0)).is_some_and(|at| at > killed + Duration::from_millis(50))
        })
        .await;
        times.push(i64::try_from(killed.elapsed().as_millis()).unwrap_or(i64::MAX));
        daemons[place] = Daemon::start(file.path(), &owner);
    }
    times.sort_unstable();
    times
}

fn main() {
    let _ = rlimit::increase_nofile_limit(u64::MAX);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let real = Server::start();
        let standins = masters::everywhere(BITS, &real).await;
        let instances = number("TTLSWEEP_BENCH_INSTANCES", 10_000);
        let burst = number("TTLSWEEP_BENCH_BURST", 1_000).min(instances);
        println!("{instances} instances, stand-ins of {} keys; a burst of {burst} at one moment, the others within an hour", 1 << BITS);
        println!(
            "| daemons | statements/s idle | in that hour | CPU % of a daemon idle | in that hour | MiB of a daemon | burst claimed in s | \
             due to begun, burst, p50 / p99 ms | in that hour |"
        );
        println!("|---|---|---|---|---|---|---|---|---|");
        let daemons = std::env::var("TTLSWEEP_BENCH_DAEMONS").unwrap_or_else(|_| "1,2,4".to_owned());
        for daemons in daemons.split(',').filter(|number| !number.is_empty()) {
            if !table(&standins, instances, daemons.parse().expect("a number"), burst).await {
                return;
            }
        }
        let standins = masters::everywhere(SLOW_BITS, &real).await;
        let times = kills(&standins, number("TTLSWEEP_BENCH_KILLS", 8)).await;
        println!("\nkill -9 to the next batch of another daemon, lease 15 s, {} kills", times.len());
        println!("| median s | p99 s |\n|---|---|");
        let seconds = |share| quantile(&times, share) as f64 / 1_000.0;
        println!("| {:.1} | {:.1} |", seconds(0.5), seconds(0.99));
    });
}
