//! Several daemons on one PostgreSQL database: if one is killed, suspended, cut off or stopped, each task still has one end, and no
//! two daemons sweep one instance.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::Row;
use tokio::net::{TcpListener, TcpStream};

use crate::sdk;
use crate::support::clients::{client, output, root};
use crate::support::daemon::{Daemon, EACH_SECOND, PROJECT, instance};
use crate::support::hook::Hook;
use crate::support::keyspace::{Keyspace, filled};
use crate::support::postgres::Postgres;
use crate::support::proxy::{Mode, Proxy};
use crate::support::server::Server;
use crate::support::{PATIENCE, probe};

/// A lease that is short enough for a test, renewed each second.
const LEASE: Duration = Duration::from_secs(3);
/// Slow enough for a test to act during the sweep.
const SLOW: &str = "count = 10\nmax-slice = \"1us\"\nmax-keys-per-sec = 400\n";
const EXPIRED: u64 = 3_000;

/// The settings of all daemons: the shared records and these instances.
fn settings(url: &str, journal: &str, instances: &str) -> String {
    format!("[daemon]\nlease = \"3s\"\n{instances}\n[store]\nurl = \"{url}\"\njournal = \"{journal}\"\n")
}

/// Daemons that share a folder for their batch journals, as on shared storage.
struct Fleet {
    daemons: Vec<Daemon>,
    postgres: Postgres,
    _journal: tempfile::TempDir,
}

impl Fleet {
    async fn start(count: usize, instances: &str) -> Option<Self> {
        let postgres = Postgres::start().await?;
        let journal = tempfile::tempdir().expect("a temporary folder");
        let settings = settings(&postgres.url(), &journal.path().display().to_string(), instances);
        let mut daemons = Vec::new();
        for number in 0..count {
            let name = format!("d{number}");
            daemons.push(Daemon::prepare(&settings).launched(|command| named(command, &name)).await);
        }
        Some(Self { daemons, postgres, _journal: journal })
    }

    /// Waits until a daemon owns the task, and returns the daemon's place.
    async fn owner_of(&self, id: &str, asked: usize) -> usize {
        let mut owner = None;
        probe("a daemon has the task", PATIENCE, async || {
            owner = owner_in(&daemons(&self.daemons[asked]).await, id);
            owner.is_some()
        })
        .await;
        owner.expect("found")
    }

    /// Asks each daemon in turn for a scan until one accepts, and returns the task's id with the place of its owner.
    async fn scan(&self, instance: &str, asked: usize) -> (String, usize) {
        let id = self.daemons[asked].scan(instance).await;
        let owner = self.owner_of(&id, asked).await;
        (id, owner)
    }
}

/// Daemons, one of which sweeps a server slowly and has freed some keys.
struct Sweeping {
    server: Server,
    fleet: Fleet,
    id: String,
    /// The place of the daemon that sweeps.
    owner: usize,
}

async fn sweeping(daemons: usize) -> Option<Sweeping> {
    let server = filled(0, EXPIRED).await;
    let fleet = Fleet::start(daemons, &instance("cache", &server.url(), SLOW)).await?;
    let (id, owner) = fleet.scan("cache", 0).await;
    probe("it frees", PATIENCE, async || server.expired_keys().await > 100).await;
    Some(Sweeping { server, fleet, id, owner })
}

fn named(mut command: Command, name: &str) -> Command {
    command.env("TTLSWEEP_DAEMON_NAME", name);
    command
}

async fn daemons(daemon: &Daemon) -> Vec<Value> {
    let mut answer = daemon.get("/api/v1/daemons").await.ok();
    answer["daemons"].as_array_mut().map(std::mem::take).unwrap_or_default()
}

fn owner_in(daemons: &[Value], id: &str) -> Option<usize> {
    let has =
        |daemon: &&Value| daemon["tasks"].as_array().is_some_and(|tasks| tasks.iter().any(|t| t["task_id"] == id));
    let name = daemons.iter().find(has)?["name"].as_str()?;
    name.trim_start_matches('d').parse().ok()
}

fn lost(task: &Value) -> u64 {
    let dbs = task["shards"].as_array().into_iter().flatten().flat_map(|shard| shard["dbs"].as_array().cloned());
    dbs.flatten().filter_map(|db| db["lost_replies"].as_u64()).sum()
}

#[tokio::test]
async fn any_daemon_answers_for_a_task_that_another_has() {
    let server = filled(0, EXPIRED).await;
    let Some(fleet) = Fleet::start(2, &instance("cache", &server.url(), SLOW)).await else { return };
    let (id, owner) = fleet.scan("cache", 0).await;
    let other = &fleet.daemons[1 - owner];
    let seen = other.until(&id, "running").await;
    assert_eq!(seen["instance_id"], "cache");
    assert_eq!(other.post(&Daemon::path("cache", "scan-expire-keys-task")).await.code(), (400, "DCS.4017"));
    let order = async |what: &str| other.post(&format!("/api/v1/tasks/{id}/{what}")).await;
    assert_eq!(order("pause").await.ok()["state"], "paused");
    assert_eq!(fleet.daemons[owner].task(&id).await["state"], "paused");
    // The other daemon reports the reason of the hold too.
    probe("the reason is reported", PATIENCE, async || other.task(&id).await["holds"][0]["reason"] == "paused").await;
    assert_eq!(order("pause").await.code(), (409, "DCS.4017"));
    assert_eq!(order("resume").await.ok()["state"], "running");
    let mut events = other.request(Method::GET, &format!("/api/v1/tasks/{id}/events")).send().await.expect("a stream");
    let first = events.chunk().await.expect("an event").expect("an event");
    assert!(String::from_utf8_lossy(&first).contains(&id));
    other.hurry(&id).await;
    let done = other.until(&id, "succeeded").await;
    assert_eq!((&done["reclaimed"], &done["settings"]["max-keys-per-sec"]), (&json!(EXPIRED), &json!("0")));
    let mut rest = String::new();
    while let Ok(Some(chunk)) = events.chunk().await {
        rest.push_str(&String::from_utf8_lossy(&chunk));
    }
    assert!(rest.contains("\"state\":\"succeeded\""), "the stream ends with the task: {rest}");
    assert_eq!(order("cancel").await.code(), (409, "DCS.4017"));
    assert_eq!(other.history("cache").await["records"][0]["num"], EXPIRED);
    Keyspace::of(&server, 0).expired(EXPIRED, "more:").await;
    // At the pace of the instance: a much slower sweep might be refused as slower than keys expire.
    let (next, owner) = fleet.scan("cache", owner).await;
    let cancelled = fleet.daemons[1 - owner].post(&format!("/api/v1/tasks/{next}/cancel")).await.ok();
    assert_eq!(cancelled["state"], "cancelled");
}

#[tokio::test]
async fn a_cancel_by_another_daemon_is_done_also_where_the_end_is_recorded_before_the_answer() {
    let server = filled(0, EXPIRED).await;
    let Some(fleet) = Fleet::start(2, &instance("cache", &server.url(), SLOW)).await else { return };
    let late = "CREATE FUNCTION late() RETURNS trigger AS 'BEGIN PERFORM pg_sleep(2); RETURN NEW; END' LANGUAGE plpgsql; \
                CREATE TRIGGER late BEFORE UPDATE ON orders FOR EACH ROW EXECUTE FUNCTION late()";
    sqlx::raw_sql(late)
        .execute(&mut fleet.postgres.conn().await)
        .await
        .expect("answers to orders are late from now on");
    let (id, owner) = fleet.scan("cache", 0).await;
    let cancelled = fleet.daemons[1 - owner].post(&format!("/api/v1/tasks/{id}/cancel")).await.ok();
    assert_eq!(cancelled["state"], "cancelled");
}

#[tokio::test]
async fn a_task_goes_on_elsewhere_within_two_leases_of_a_kill_and_counts_exactly() {
    let Some(Sweeping { server, mut fleet, id, owner }) = sweeping(3).await else { return };
    fleet.daemons[owner].kill9();
    let killed = Instant::now();
    let before = server.expired_keys().await;
    probe("another goes on", PATIENCE, async || server.expired_keys().await > before).await;
    let took = killed.elapsed();
    let asked = (owner + 1) % 3;
    assert_ne!(fleet.owner_of(&id, asked).await, owner);
    fleet.daemons[asked].hurry(&id).await;
    let task = fleet.daemons[asked].until(&id, "succeeded").await;
    let reclaimed = task["reclaimed"].as_u64().expect("a number");
    // Batches of ten keys that were under way at the kill may be uncounted; then the record says so.
    assert!(reclaimed == EXPIRED || reclaimed + 20 >= EXPIRED && lost(&task) > 0, "{task:#}");
    assert_eq!(server.expired_keys().await, EXPIRED);
    assert!(took < 3 * LEASE, "{took:?}: two leases, and a machine that others use");
}

#[tokio::test]
async fn without_the_journal_of_a_lost_machine_the_record_says_that_its_count_is_a_lower_bound() {
    let server = filled(0, EXPIRED).await;
    let Some(postgres) = Postgres::start().await else { return };
    let cache = instance("cache", &server.url(), SLOW);
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let settings = |dir: &tempfile::TempDir| settings(&postgres.url(), &dir.path().display().to_string(), &cache);
    let mut first = Daemon::prepare(&settings(&one)).launched(|command| named(command, "d0")).await;
    let id = first.scan("cache").await;
    probe("it frees", PATIENCE, async || server.expired_keys().await > 500).await;
    first.kill9();
    let second = Daemon::prepare(&settings(&two)).launched(|command| named(command, "d1")).await;
    probe("the other has it", PATIENCE, async || owner_in(&daemons(&second).await, &id).is_some()).await;
    second.hurry(&id).await;
    let task = second.until(&id, "succeeded").await;
    assert_eq!(server.expired_keys().await, EXPIRED);
    assert!(lost(&task) > 0, "{task:#}");
    let reclaimed = task["reclaimed"].as_u64().expect("a number");
    let warnings = task["shards"][0]["warnings"].to_string();
    let bound = warnings.split("at most ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok());
    let bound = bound.unwrap_or_else(|| panic!("no bound: {warnings}"));
    assert!((EXPIRED - bound..=EXPIRED).contains(&reclaimed), "{reclaimed} and at most {bound} more");
    // The last checkpoint was written within a second or two before the kill, at 400 keys a second.
    assert!(bound < 1_500, "{bound}");
}

#[tokio::test]
async fn a_daemon_that_stood_still_for_longer_than_its_lease_sends_and_writes_nothing_more() {
    let Some(Sweeping { server, fleet, id, owner }) = sweeping(2).await else { return };
    fleet.daemons[owner].signal("STOP");
    let other = &fleet.daemons[1 - owner];
    probe("the other has it", PATIENCE, async || owner_in(&daemons(other).await, &id) == Some(1 - owner)).await;
    fleet.daemons[owner].signal("CONT");
    probe("it learns of it", PATIENCE, async || fleet.daemons[owner].log().contains("joining anew")).await;
    // The late daemon has not changed the record.
    other.until(&id, "running").await;
    // It owns no task now, and serves those of the other daemon.
    fleet.daemons[owner].hurry(&id).await;
    let task = fleet.daemons[owner].until(&id, "succeeded").await;
    assert_eq!(server.expired_keys().await, EXPIRED);
    let reclaimed = task["reclaimed"].as_u64().expect("a number");
    assert!(reclaimed == EXPIRED || reclaimed + 20 >= EXPIRED && lost(&task) > 0, "{task:#}");
    assert_eq!(daemons(other).await.len(), 2, "it has joined anew");
}

#[tokio::test]
async fn a_daemon_that_stops_in_order_hands_its_tasks_over_at_once() {
    let Some(Sweeping { server: _server, mut fleet, id, owner }) = sweeping(2).await else { return };
    assert_eq!(fleet.daemons[owner].stop().await, Some(0));
    let stopped = Instant::now();
    let other = &fleet.daemons[1 - owner];
    probe("the other has it", PATIENCE, async || owner_in(&daemons(other).await, &id) == Some(1 - owner)).await;
    assert!(stopped.elapsed() < LEASE, "it need not wait for the lease: {:?}", stopped.elapsed());
    other.hurry(&id).await;
    let task = other.until(&id, "succeeded").await;
    assert_eq!((&task["reclaimed"], lost(&task)), (&json!(EXPIRED), 0));
    assert_eq!(daemons(other).await.len(), 1);
}

#[tokio::test]
async fn while_the_database_is_away_the_sweep_goes_on_until_the_lease_ends_and_then_holds() {
    let server = filled(0, 6_000).await;
    let Some(mut postgres) = Postgres::start().await else { return };
    let proxy = Proxy::start(([127, 0, 0, 1], postgres.port()).into()).await;
    let journal = tempfile::tempdir().unwrap();
    let url = postgres.url_at(proxy.addr().port());
    let cache = instance("cache", &server.url(), SLOW);
    let daemon = Daemon::start(&settings(&url, &journal.path().display().to_string(), &cache)).await;
    let id = daemon.scan("cache").await;
    probe("it frees", PATIENCE, async || server.expired_keys().await > 100).await;
    proxy.set(Mode::Stall);
    let stalled = Instant::now();
    let before = server.expired_keys().await;
    probe("it goes on", PATIENCE, async || server.expired_keys().await > before + 50).await;
    let mut last = (server.expired_keys().await, Instant::now());
    probe("it holds", PATIENCE, async || {
        let now = server.expired_keys().await;
        if now != last.0 {
            last = (now, Instant::now());
        }
        last.1.elapsed() > Duration::from_millis(500)
    })
    .await;
    assert!(last.1 - stalled < LEASE, "the last key was freed within the lease: {:?}", last.1 - stalled);
    let answer = daemon.get("/api/v1/daemons").await;
    assert_eq!(answer.code(), (503, "DCS.5000"), "{}", answer.body);
    assert!(answer.body["error_msg"].to_string().contains("records"), "{}", answer.body);
    assert_eq!(daemon.get("/readyz").await.status, 503);
    // It stays alive: a restart by an orchestrator would not help.
    assert_eq!(daemon.get("/healthz").await.status, 200);
    proxy.set(Mode::Pass);
    probe("it goes on", PATIENCE, async || server.expired_keys().await > last.0).await;
    postgres.restart().await;
    let freed = server.expired_keys().await;
    probe("a restart of PostgreSQL is survived", PATIENCE, async || server.expired_keys().await > freed + 100).await;
    probe("it answers again", PATIENCE, async || daemon.get("/readyz").await.status == 200).await;
    daemon.hurry(&id).await;
    let task = daemon.until(&id, "succeeded").await;
    assert_eq!(task["reclaimed"], 6_000, "{task:#}");
    let held = &task["shards"][0]["dbs"][0]["held_s"];
    assert!(held["store_unreachable"].as_f64().is_some_and(|s| s > 0.0), "{task:#}");
}

#[tokio::test]
async fn a_due_time_runs_once_however_many_daemons_look() {
    let server = filled(0, 10).await;
    let Some(fleet) = Fleet::start(3, &instance("cache", &server.url(), EACH_SECOND)).await else { return };
    probe("some were due", PATIENCE, async || fleet.daemons[0].history("cache").await["count"].as_u64() >= Some(5))
        .await;
    let mut conn = fleet.postgres.conn().await;
    let rows =
        sqlx::query("SELECT due, outcome, task_id FROM due_times ORDER BY due").fetch_all(&mut conn).await.unwrap();
    let dues: Vec<i64> = rows.iter().map(|row| row.get("due")).collect();
    // Every second once.
    assert!(dues.windows(2).all(|pair| pair[1] - pair[0] == 1_000), "{dues:?}");
    let ran: BTreeSet<String> = rows.iter().filter_map(|row| row.get::<Option<String>, _>("task_id")).collect();
    let tasks = sqlx::query("SELECT id FROM tasks WHERE created_at < $1").bind(dues[dues.len() - 1] + 900);
    let tasks: BTreeSet<String> = tasks.fetch_all(&mut conn).await.unwrap().iter().map(|row| row.get("id")).collect();
    assert!(tasks.is_subset(&ran), "a task for each due time and a due time for each task: {tasks:?} {ran:?}");
    assert_eq!(ran.len(), rows.iter().filter(|row| row.get::<String, _>("outcome") == "run").count());
}

#[tokio::test]
async fn an_instance_is_swept_only_by_a_daemon_that_reaches_it() {
    let server = filled(0, 100).await;
    let Some(postgres) = Postgres::start().await else { return };
    let journal = tempfile::tempdir().unwrap();
    let far = instance("far", &server.url(), "where = \"net=far\"\n");
    let settings = settings(&postgres.url(), &journal.path().display().to_string(), &far);
    let near = Daemon::prepare(&settings).launched(|command| named(command, "d0")).await;
    let id = near.scan("far").await;
    let started = Instant::now();
    probe("it is not claimed", PATIENCE, async || {
        let task = near.task(&id).await;
        assert_eq!((&task["state"], &task["holds"][0]["reason"]), (&json!("waiting"), &json!("queued")));
        started.elapsed() > Duration::from_secs(1)
    })
    .await;
    let reaches = |command| {
        let mut command = named(command, "d1");
        command.env("TTLSWEEP_LABELS", "net=far,net=other");
        command
    };
    let reaching = Daemon::prepare(&settings).launched(reaches).await;
    assert_eq!(near.until(&id, "succeeded").await["reclaimed"], 100);
    assert_eq!(daemons(&reaching).await[1]["labels"], json!(["net=far", "net=other"]));
}

#[tokio::test]
async fn daemons_with_other_settings_are_named() {
    let server = filled(0, 1).await;
    let Some(postgres) = Postgres::start().await else { return };
    let journal = tempfile::tempdir().unwrap();
    let journal = journal.path().display().to_string();
    let one = settings(&postgres.url(), &journal, &instance("cache", &server.url(), ""));
    let first = Daemon::prepare(&one).launched(|command| named(command, "d0")).await;
    let other = Daemon::prepare(&format!("# other\n{one}")).launched(|command| named(command, "d1")).await;
    let same = |daemons: &[Value]| daemons.iter().map(|d| d["same_settings"] == true).collect::<Vec<_>>();
    assert_eq!(same(&daemons(&first).await), [true, false]);
    probe("it warns", PATIENCE, async || other.log().contains("other settings")).await;
    probe("a figure says so", PATIENCE, async || other.figures().await.contains("ttlsweep_settings_differ 1")).await;
    assert!(other.figures().await.contains("ttlsweep_daemons 2"));
}

#[tokio::test]
async fn a_paused_task_of_a_lost_daemon_waits_for_a_person_and_goes_on_elsewhere() {
    let Some(Sweeping { server: _server, mut fleet, id, owner }) = sweeping(2).await else { return };
    fleet.daemons[owner].post(&format!("/api/v1/tasks/{id}/pause")).await.ok();
    fleet.daemons[owner].kill9();
    let other = &fleet.daemons[1 - owner];
    probe("the lease runs out", PATIENCE, async || daemons(other).await.len() == 1).await;
    assert_eq!(other.task(&id).await["state"], "paused");
    other.hurry(&id).await;
    assert_ne!(other.post(&format!("/api/v1/tasks/{id}/resume")).await.ok()["state"], "paused");
    let task = other.until(&id, "succeeded").await;
    assert_eq!(task["reclaimed"], EXPIRED, "{task:#}");
}

/// Hands each connection to the next of several addresses, as the service of an orchestrator does.
async fn balancer(upstreams: Vec<String>) -> (String, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("its address"));
    let serving = tokio::spawn(async move {
        for upstream in upstreams.iter().cycle() {
            let Ok((mut client, _)) = listener.accept().await else { return };
            let Ok(mut server) = TcpStream::connect(upstream).await else { continue };
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut client, &mut server).await });
        }
    });
    (url, serving)
}

#[tokio::test]
async fn the_public_sdk_runs_all_five_calls_against_several_daemons_behind_one_address() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(sdk::EXPIRED, "expired:").await;
    let Some(postgres) = Postgres::start().await else { return };
    let journal = tempfile::tempdir().unwrap();
    let instances = format!("{}{}", sdk::CREDENTIALS, instance("cache", &server.url(), ""));
    let settings = settings(&postgres.url(), &journal.path().display().to_string(), &instances);
    let mut fleet = Vec::new();
    for number in 0..3 {
        let secret = |command| {
            let mut command = named(command, &format!("d{number}"));
            command.env("SK_OF_THE_TEST", "SKEXAMPLE");
            command
        };
        fleet.push(Daemon::prepare(&settings).launched(secret).await);
    }
    let (url, serving) = balancer(fleet.iter().map(|daemon| daemon.authority().to_owned()).collect()).await;
    let mut client_of_sdk = Command::new(client("python"));
    client_of_sdk.arg(root().join("tests/it/sdk.py")).args([&url, "cache", PROJECT, "AKEXAMPLE", "SKEXAMPLE"]);
    let run = output(client_of_sdk).await;
    serving.abort();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    sdk::check(&serde_json::from_slice(&run.stdout).expect("one object"));
}

#[tokio::test]
async fn a_rolling_update_loses_and_doubles_no_task() {
    let server = filled(0, 10).await;
    let Some(mut fleet) = Fleet::start(3, &instance("cache", &server.url(), EACH_SECOND)).await else { return };
    let settings = std::fs::read_to_string(fleet.daemons[0].settings_path()).expect("its settings");
    for number in 3..6 {
        // As an orchestrator does: start a new daemon, and when it is ready, stop an old one.
        let new = Daemon::prepare(&settings).launched(|command| named(command, &format!("d{number}"))).await;
        probe("it is ready", PATIENCE, async || new.get("/readyz").await.status == 200).await;
        fleet.daemons.push(new);
        let mut old = fleet.daemons.remove(0);
        assert_eq!(old.stop().await, Some(0));
        let before = fleet.daemons[0].history("cache").await["count"].as_u64();
        probe("scans go on", PATIENCE, async || fleet.daemons[0].history("cache").await["count"].as_u64() > before)
            .await;
    }
    let mut conn = fleet.postgres.conn().await;
    let rows = sqlx::query("SELECT due FROM due_times ORDER BY due").fetch_all(&mut conn).await.unwrap();
    let dues: Vec<i64> = rows.iter().map(|row| row.get("due")).collect();
    assert!(dues.windows(2).all(|pair| pair[1] - pair[0] == 1_000), "{dues:?}");
    let failed = sqlx::query("SELECT id FROM tasks WHERE state = 'failed'").fetch_all(&mut conn).await.unwrap();
    assert!(failed.is_empty(), "{} failed", failed.len());
    let now = daemons(&fleet.daemons[0]).await;
    assert_eq!(now.iter().map(|daemon| daemon["name"].as_str().unwrap()).collect::<Vec<_>>(), ["d3", "d4", "d5"]);
}

#[tokio::test]
async fn instances_come_from_a_folder_of_files_too() {
    let (one, two) = (filled(0, 5).await, filled(0, 7).await);
    let listen = "[api]\nlisten = \"127.0.0.1:0\"\n";
    let settings = format!("include = \"instances.d/*.toml\"\n{listen}{}", instance("one", &one.url(), ""));
    let daemon = Daemon::prepare(&settings);
    let folder = daemon.settings_path().with_file_name("instances.d");
    std::fs::create_dir(&folder).expect("a folder");
    std::fs::write(folder.join("b.toml"), instance("two", &two.url(), "")).expect("a file");
    let daemon = daemon.launched(|command| command).await;
    let id = daemon.scan("two").await;
    assert_eq!(daemon.until(&id, "succeeded").await["reclaimed"], 7);
    // A problem in one of the files is reported with its own line, and nothing is applied.
    std::fs::write(
        folder.join("c.toml"),
        format!("\n{}\n[api]\nlisten = \"127.0.0.1:1\"\n", instance("two", "redis://x", "")),
    )
    .unwrap();
    let refused = daemon.post("/api/v1/reload").await;
    let message = refused.body["error_msg"].as_str().unwrap_or_default();
    assert_eq!(refused.status, 400, "{message}");
    assert!(
        message.contains("c.toml:3: id: `two` is taken") && message.contains("`api` is not a setting"),
        "{message}"
    );
    std::fs::remove_file(folder.join("c.toml")).expect("a file");
    std::fs::remove_file(folder.join("b.toml")).expect("a file");
    assert_eq!(daemon.post("/api/v1/reload").await.ok()["instances"], 1);
}

#[tokio::test]
async fn one_of_several_daemons_tells_what_is_not_swept_and_another_does_once_that_is_gone() {
    let (hook, server) = (Hook::start(&[]).await, Server::start().await);
    let far = "not-swept-for = \"1s\"\n[instances.auto-scan]\nenabled = true\ncron = \"0 0 1 1 *\"\n";
    let settings = format!("[notify]\nurl = \"{}\"\n{}", hook.url(), instance("late", &server.url(), far));
    let Some(mut fleet) = Fleet::start(2, &settings).await else { return };
    let id = hook.wait_for(1).await[0].json()["id"].clone();
    // A reload makes the daemon check at once.
    let reload = async |daemon: &Daemon| {
        let before = daemon.log().matches("settings reloaded").count();
        daemon.signal("HUP");
        probe("it reads its settings again", PATIENCE, async || {
            daemon.log().matches("settings reloaded").count() > before
        })
        .await;
    };
    for _ in 0..3 {
        reload(&fleet.daemons[0]).await;
        reload(&fleet.daemons[1]).await;
    }
    assert_eq!(hook.calls().len(), 1);
    assert_eq!(fleet.daemons[0].stop().await, Some(0));
    probe("the other one tells", PATIENCE, async || {
        reload(&fleet.daemons[1]).await;
        hook.calls().len() > 1
    })
    .await;
    let again = hook.calls()[1].json();
    assert_eq!((&again["type"], &again["id"]), (&"not_swept".into(), &id));
}

#[tokio::test]
async fn lists_and_the_stream_of_all_tasks_show_what_another_daemon_sweeps() {
    let Some(sweeping) = sweeping(2).await else { return };
    let (id, other) = (sweeping.id.as_str(), &sweeping.fleet.daemons[1 - sweeping.owner]);
    let mut stream = other.request(Method::GET, "/api/v1/events").send().await.expect("a stream");
    let mut text = String::new();
    let until = async |stream: &mut reqwest::Response, text: &mut String, state: &str| {
        let wanted = [format!("\"id\":\"{id}\""), format!("\"state\":\"{state}\"")];
        let told = tokio::time::timeout(PATIENCE, async {
            while !text.lines().any(|line| wanted.iter().all(|word| line.contains(word))) {
                let chunk = stream.chunk().await.expect("a chunk").expect("it goes on");
                text.push_str(std::str::from_utf8(&chunk).expect("UTF-8"));
            }
        });
        assert!(told.await.is_ok(), "{state}: {text}");
    };
    until(&mut stream, &mut text, "running").await;
    for query in ["sort=memory", "sort=last_success&order=desc", "state=running&sort=name&limit=1"] {
        let list = other.get(&format!("/api/v1/instances?{query}")).await.ok();
        assert_eq!((&list["total"], &list["counts"]["running"]), (&json!(1), &json!(1)), "{query}");
        let seen = &list["instances"][0];
        assert_eq!((&seen["latest"]["id"], seen["used_memory"].is_u64()), (&json!(id), true), "{query}: {seen:#}");
    }
    // By its checkpoints, which come each second.
    probe("its history goes on", PATIENCE, async || {
        let history = other.get("/api/v1/instances/cache/history").await.ok();
        history["sweeps"][0]["totals"]["reclaimed"].as_u64() > Some(0)
    })
    .await;
    other.hurry(id).await;
    until(&mut stream, &mut text, "succeeded").await;
    let after = other.get("/api/v1/instances/cache").await.ok();
    assert!(after["last_success_at"].is_string() && after["latest"]["reclaimed"] == EXPIRED, "{after:#}");
}

#[tokio::test]
async fn a_keep_run_goes_on_with_another_daemon_and_gives_way_to_a_scan_that_any_of_them_is_asked_for() {
    let server = filled(0, 500).await;
    Keyspace::of(&server, 0).live_ttl(1_000, "live:").await;
    let kept = instance("cache", &server.url(), "[instances.keep]\nmax-delay = \"2s\"\n");
    let Some(mut fleet) = Fleet::start(2, &kept).await else { return };
    let mut runs = json!(null);
    probe("one keep run is under way", PATIENCE, async || {
        runs = fleet.daemons[0].get("/api/v1/tasks?cause=keep&state=running").await.ok();
        runs["count"] == 1
    })
    .await;
    let id = runs["tasks"][0]["id"].as_str().expect("an id").to_owned();
    probe("the expired keys are gone", PATIENCE, async || server.dbsize(0).await == 1_000).await;
    let owner = fleet.owner_of(&id, 0).await;
    fleet.daemons[owner].kill9();
    let heir = &fleet.daemons[1 - owner];
    probe("the other one goes on with it", PATIENCE, async || {
        owner_in(&daemons(heir).await, &id) == Some(1 - owner) && heir.task(&id).await["state"] == "running"
    })
    .await;
    let count = heir.get("/api/v1/tasks?cause=keep").await.ok()["count"].clone();
    assert_eq!(count, 1, "no second run was begun meanwhile");
    fleet.daemons[owner].restart_as(|command| named(command, &format!("d{owner}"))).await;
    let scan = fleet.daemons[owner].scan("cache").await;
    let run = fleet.daemons[owner].task(&id).await;
    assert_eq!(run["state"], "succeeded", "it gave way");
    assert!(lost(&run) > 0 || run["reclaimed"] == 500, "{run:#}");
    fleet.daemons[owner].until(&scan, "succeeded").await;
    probe("another run follows", PATIENCE, async || {
        fleet.daemons[owner].get("/api/v1/tasks?cause=keep&state=running").await.ok()["count"] == 1
    })
    .await;
}
