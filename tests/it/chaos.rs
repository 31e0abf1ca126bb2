//! Three daemons while everything around them breaks at random: kills, stops for longer than a lease, a network to the database that
//! stalls and is cut, restarts of the database, one daemon whose clock is minutes off. In the end every task is there once with one end,
//! each due time was run once or skipped with a reason, no two daemons swept one instance at once, and each count is right or marked.
//!
//! `TTLSWEEP_CHAOS_SECONDS` and `TTLSWEEP_CHAOS_INSTANCES` make it longer and larger: 600 and 60 are what it was made for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::Method;
use sqlx::{PgConnection, Row};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::support::clients::client_if_there;
use crate::support::daemon::{Daemon, instance};
use crate::support::keyspace::Random;
use crate::support::postgres::Postgres;
use crate::support::probe;
use crate::support::proxy::{Mode, Proxy};
use crate::support::server::Server;

const DAEMONS: usize = 3;
/// The lease of the settings below.
const LEASE: Duration = Duration::from_secs(3);
/// Keys of one batch. A batch that was under way at a kill may be uncounted.
const COUNT: u64 = 20;
/// Expired keys that are written to each instance each second.
const PER_SECOND: u64 = 150;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// SCANs of one connection without a pause: the sender, and the times of the first and the last one, in seconds.
#[derive(Debug, Clone)]
struct Span {
    name: String,
    first: f64,
    last: f64,
}

/// The spans that a server saw, by the address of the connection. Addresses are reused.
type Seen = Arc<Mutex<BTreeMap<String, Vec<Span>>>>;

/// A span ends after this many seconds without a SCAN.
const PAUSE: f64 = 1.0;

/// Watches a server with MONITOR until this task is aborted. The stream begins before the first sweep.
async fn watch(server: &Server) -> (Seen, Vec<tokio::task::JoinHandle<()>>) {
    let seen = Seen::default();
    let mut stream = TcpStream::connect(server.addr()).await.expect("it listens");
    stream.write_all(b"MONITOR\r\n").await.expect("it reads");
    let spans = seen.clone();
    let scans = tokio::spawn(async move {
        let mut lines = BufReader::new(stream).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            // +1700000000.123456 [0 127.0.0.1:50000] "SCAN" "0" ...
            let mut words = line.trim_start_matches('+').split_whitespace();
            let (at, _, addr, command) = (words.next(), words.next(), words.next(), words.next());
            let (Some(at), Some(addr), Some("\"SCAN\"")) = (at.and_then(|at| at.parse().ok()), addr, command) else {
                continue;
            };
            let addr = addr.trim_end_matches(']').to_owned();
            let mut spans = spans.lock().expect("no panic");
            let spans = spans.entry(addr).or_default();
            match spans.last_mut().filter(|span| at - span.last < PAUSE) {
                Some(span) => span.last = at,
                None => spans.push(Span { name: String::new(), first: at, last: at }),
            }
        }
    });
    let mut conn = server.conn().await;
    let named = seen.clone();
    let names = tokio::spawn(async move {
        loop {
            let list: String = redis::cmd("CLIENT").arg("LIST").query_async(&mut conn).await.unwrap_or_default();
            for line in list.lines() {
                let field = |key: &str| line.split(' ').find_map(|word| word.strip_prefix(key)).unwrap_or_default();
                let name = field("name=").strip_prefix("ttlsweep:").unwrap_or_default();
                if let Some(span) =
                    named.lock().expect("no panic").get_mut(field("addr=")).and_then(|spans| spans.last_mut())
                    && !name.is_empty()
                {
                    name.clone_into(&mut span.name);
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    (seen, vec![scans, names])
}

struct Fleet {
    daemons: Vec<Daemon>,
    proxies: Vec<Proxy>,
    postgres: Postgres,
}

impl Fleet {
    /// The command that starts the daemon at this place.
    fn starter(place: usize) -> impl FnOnce(std::process::Command) -> std::process::Command {
        move |mut command| {
            command.env("TTLSWEEP_DAEMON_NAME", format!("d{place}"));
            if let Some(library) = client_if_there("faketime").filter(|_| place == 2) {
                command.env("LD_PRELOAD", library).env("FAKETIME", "+4m").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
            }
            command
        }
    }

    /// Breaks one thing at random, and repairs it.
    async fn break_something(&mut self, random: &mut Random) -> &'static str {
        let place = random.below(DAEMONS as u64) as usize;
        match random.below(10) {
            0..=2 => {
                self.daemons[place].restart_as(Self::starter(place)).await;
                "kill -9"
            }
            3 | 4 => {
                self.daemons[place].signal("STOP");
                tokio::time::sleep(LEASE + Duration::from_millis(random.below(3_000))).await;
                self.daemons[place].signal("CONT");
                "stop for longer than a lease"
            }
            5 | 6 => {
                self.proxies[place].set(Mode::Stall);
                tokio::time::sleep(Duration::from_millis(500 + random.below(5_000))).await;
                self.proxies[place].set(Mode::Pass);
                "stall"
            }
            7 => {
                self.proxies[place].cut().await;
                "cut"
            }
            8 => {
                assert_eq!(self.daemons[place].stop().await, Some(0), "a daemon stops in order");
                self.daemons[place].restart_as(Self::starter(place)).await;
                "stop in order"
            }
            _ => {
                self.postgres.restart().await;
                "restart of PostgreSQL"
            }
        }
    }
}

#[tokio::test]
async fn whatever_breaks_each_task_ends_once_and_no_instance_is_swept_by_two_daemons() {
    let seconds = number("TTLSWEEP_CHAOS_SECONDS", 30);
    let count = number("TTLSWEEP_CHAOS_INSTANCES", 4) as usize;
    let Some(postgres) = Postgres::start().await else { return };
    let mut servers = Vec::new();
    for _ in 0..count {
        let server = Server::start().await;
        server.stop_active_expiry().await;
        servers.push(server);
    }
    let journal = tempfile::tempdir().expect("a temporary folder");
    let mut instances = String::new();
    for (number, server) in servers.iter().enumerate() {
        let cron = format!("*/{} * * * * *", 2 + number % 3);
        let more = format!(
            "count = {COUNT}\nmax-slice = \"1us\"\nmax-keys-per-sec = 1000\n[instances.auto-scan]\nenabled = true\ncron = \"{cron}\"\n"
        );
        instances.push_str(&instance(&format!("i{number}"), &server.url(), &more));
    }
    let mut fleet = Fleet { daemons: Vec::new(), proxies: Vec::new(), postgres };
    for place in 0..DAEMONS {
        let proxy = Proxy::start(([127, 0, 0, 1], fleet.postgres.port()).into()).await;
        let url = fleet.postgres.url_at(proxy.addr().port());
        let settings = format!(
            "[daemon]\nlease = \"3s\"\n[tasks]\nat-once = 32\n{instances}\n[store]\nurl = \"{url}\"\njournal = \"{}\"\n",
            journal.path().display()
        );
        fleet.proxies.push(proxy);
        fleet.daemons.push(Daemon::prepare(&settings).launched(Fleet::starter(place)).await);
    }
    let mut watched = Vec::new();
    for server in &servers {
        watched.push(watch(server).await);
    }

    let seed = u64::from(std::process::id());
    let mut random = Random(seed);
    let (mut accepted, mut events) = (BTreeSet::new(), Vec::new());
    let mut written = vec![0_u64; count];
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut last = Instant::now();
    while Instant::now() < end {
        let due = (last.elapsed().as_secs_f64() * PER_SECOND as f64) as u64;
        last = Instant::now();
        for (place, server) in servers.iter().enumerate() {
            let due = due.clamp(1, 2_000);
            let mut pipe = redis::pipe();
            for key in 0..due {
                pipe.cmd("SET").arg(format!("k:{}", written[place] + key)).arg(0).arg("PX").arg(1).ignore();
            }
            pipe.query_async::<()>(&mut server.conn().await).await.expect("it writes");
            written[place] += due;
        }
        // A client asks one of the daemons for a scan; that daemon may be down.
        let asked = &fleet.daemons[random.below(DAEMONS as u64) as usize];
        let path = Daemon::path(&format!("i{}", random.below(count as u64)), "scan-expire-keys-task");
        let request = asked.request(Method::POST, &path).timeout(Duration::from_secs(5)).send().await;
        if let Ok(response) = request
            && response.status() == 200
            && let Ok(record) = response.json::<serde_json::Value>().await
        {
            accepted.insert(record["id"].as_str().expect("an id").to_owned());
        }
        events.push(fleet.break_something(&mut random).await);
    }
    println!("seed {seed}: {events:?}");

    // No scan is due any more, and the tasks under way end.
    for daemon in &fleet.daemons {
        let text = std::fs::read_to_string(daemon.settings_path()).expect("its settings");
        std::fs::write(daemon.settings_path(), text.replace("enabled = true", "enabled = false")).expect("a file");
        daemon.signal("HUP");
    }
    let mut conn = fleet.postgres.conn().await;
    let ended = async || unfinished(&mut conn).await == 0;
    probe("every task has ended", Duration::from_secs(90), ended).await;
    for (place, server) in servers.iter().enumerate() {
        let id = format!("i{place}");
        let mut task = String::new();
        probe("a last scan is taken", Duration::from_secs(60), async || {
            let answer = fleet.daemons[0].post(&Daemon::path(&id, "scan-expire-keys-task")).await;
            task = answer.body["id"].as_str().unwrap_or_default().to_owned();
            answer.status == 200
        })
        .await;
        fleet.daemons[0].until(&task, "succeeded").await;
        accepted.insert(task);
        assert_eq!(server.expired_keys().await, written[place], "seed {seed}: all that was written is gone");
    }

    summary(&mut conn, &accepted).await;
    tasks_ended_once(&mut conn, &accepted, seed).await;
    dues_were_dealt_with(&mut conn, seed).await;
    for (place, server) in servers.iter().enumerate() {
        let sql = "SELECT CAST(COALESCE(SUM(num), 0) AS BIGINT) AS num FROM tasks WHERE instance_id = $1";
        let counted: i64 = sqlx::query(sql).bind(format!("i{place}")).fetch_one(&mut conn).await.unwrap().get("num");
        let sql = "SELECT CAST(COALESCE(SUM(lost_replies), 0) AS BIGINT) AS lost FROM passes JOIN tasks ON id = task_id \
                   WHERE instance_id = $1";
        let lost: i64 = sqlx::query(sql).bind(format!("i{place}")).fetch_one(&mut conn).await.unwrap().get("lost");
        let (counted, freed) = (counted.unsigned_abs(), server.expired_keys().await);
        assert!(counted <= freed, "seed {seed}: i{place}: {counted} counted, {freed} freed");
        assert!(
            freed - counted <= lost.unsigned_abs() * COUNT,
            "seed {seed}: i{place}: {counted} of {freed}, {lost} lost replies"
        );
    }
    for (place, (seen, watchers)) in watched.into_iter().enumerate() {
        watchers.iter().for_each(tokio::task::JoinHandle::abort);
        one_at_a_time(&seen.lock().expect("no panic"), place, seed);
    }
}

async fn unfinished(conn: &mut PgConnection) -> i64 {
    let sql = "SELECT COUNT(*) AS tasks FROM tasks WHERE finished_at IS NULL";
    sqlx::query(sql).fetch_one(conn).await.map_or(-1, |row| row.get("tasks"))
}

/// A summary for the test's output.
async fn summary(conn: &mut PgConnection, accepted: &BTreeSet<String>) {
    for sql in [
        "SELECT outcome AS what, COUNT(*) AS number FROM due_times GROUP BY outcome",
        "SELECT 'owners of a task: ' || fence AS what, COUNT(*) AS number FROM tasks GROUP BY fence ORDER BY fence",
    ] {
        for row in sqlx::query(sql).fetch_all(&mut *conn).await.unwrap() {
            println!("{}: {}", row.get::<String, _>("what"), row.get::<i64, _>("number"));
        }
    }
    println!("accepted by hand: {}", accepted.len());
}

async fn tasks_ended_once(conn: &mut PgConnection, accepted: &BTreeSet<String>, seed: u64) {
    let rows = sqlx::query("SELECT id, state, failure_message FROM tasks ORDER BY id").fetch_all(conn).await.unwrap();
    let states: BTreeMap<String, String> = rows.iter().map(|row| (row.get("id"), row.get("state"))).collect();
    assert_eq!(states.len(), rows.len());
    for id in accepted {
        assert!(states.contains_key(id), "seed {seed}: the task {id} was accepted and is lost");
    }
    for row in &rows {
        let why: Option<String> = row.get("failure_message");
        assert_eq!(row.get::<String, _>("state"), "succeeded", "seed {seed}: {}: {why:?}", row.get::<String, _>("id"));
    }
}

/// Each instance has a row for each due time from its first to its last.
async fn dues_were_dealt_with(conn: &mut PgConnection, seed: u64) {
    let rows = sqlx::query("SELECT instance_id, due, outcome, task_id FROM due_times ORDER BY instance_id, due");
    let rows = rows.fetch_all(&mut *conn).await.unwrap();
    let mut dues: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    let mut ran = BTreeSet::new();
    for row in &rows {
        dues.entry(row.get("instance_id")).or_default().push(row.get("due"));
        match (row.get::<String, _>("outcome").as_str(), row.get::<Option<String>, _>("task_id")) {
            ("run", Some(task)) => assert!(ran.insert(task), "seed {seed}: a task for each due time"),
            ("missed" | "still_running", None) => {}
            other => panic!("seed {seed}: {other:?}"),
        }
    }
    for (instance, dues) in dues {
        let number: i64 = instance.trim_start_matches('i').parse().unwrap();
        let every = (2 + number % 3) * 1_000;
        // A minute is a multiple of 2, 3 and 4 seconds.
        assert!(dues.windows(2).all(|pair| pair[1] - pair[0] == every), "seed {seed}: {instance}: {dues:?}");
    }
    let rows = sqlx::query("SELECT id FROM tasks WHERE cause = 'schedule'").fetch_all(conn).await.unwrap();
    let scheduled: BTreeSet<String> = rows.iter().map(|row| row.get("id")).collect();
    assert_eq!(scheduled, ran, "seed {seed}: a due time for each scheduled task");
}

/// The spans in which two daemons sent SCANs to one server do not overlap.
fn one_at_a_time(seen: &BTreeMap<String, Vec<Span>>, place: usize, seed: u64) {
    let seen: Vec<&Span> = seen.values().flatten().collect();
    let known: Vec<&Span> = seen.iter().filter(|span| !span.name.is_empty()).copied().collect();
    assert!(
        known.len() * 2 > seen.len(),
        "seed {seed}: i{place}: {} of {} connections are known",
        known.len(),
        seen.len()
    );
    for (number, one) in known.iter().enumerate() {
        for other in &known[number + 1..] {
            let apart = one.last < other.first || other.last < one.first || one.name == other.name;
            assert!(apart, "seed {seed}: i{place} is swept by two daemons at once: {one:?} {other:?}");
        }
    }
}
