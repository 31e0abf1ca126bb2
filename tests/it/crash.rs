//! Kills at random points: every task ends in one correct final state with a correct count, and no record is lost or
//! doubled. A full disk: the API says so, the sweep goes on, and nothing is half written.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::daemon::{Daemon, instance};
use crate::support::keyspace::{Keyspace, Random};
use crate::support::proxy::{Mode, Proxy};
use crate::support::server::Server;
use crate::support::{PATIENCE, probe};

/// Kills in one run.
const KILLS: u64 = 50;
/// Keys that expire in each round.
const EXPIRED: u64 = 400;
/// Batches of ten keys: only the batch under way at a kill may be uncounted.
const PACE: &str = "count = 10\nmax-slice = \"1us\"\nmax-keys-per-sec = 20000\n";
/// How many keys such batches may leave uncounted in all. One kill in ten hits a batch under way; without the batch journal
/// each kill would lose some hundred keys.
const UNCOUNTED: u64 = 20 * 10;

#[tokio::test]
async fn fifty_kills_at_random_points_lose_and_double_nothing() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live_ttl(2_000, "live:").await;
    server.stop_active_expiry().await;
    let mut daemon = Daemon::start(&instance("cache", &server.url(), PACE)).await;
    let seed = u64::from(std::process::id());
    let mut random = Random(seed);
    let mut accepted = BTreeSet::new();
    for round in 0..KILLS {
        short_lived(&server, round).await;
        // A sweep takes about 120 ms: kills hit before its start, in its middle, and while its end is written.
        let answer = daemon.post(&Daemon::path("cache", "scan-expire-keys-task")).await;
        match answer.code() {
            (200, _) => {
                let id = answer.body["id"].as_str().expect("an id").to_owned();
                assert!(accepted.insert(id), "an id comes once");
            }
            (400, "DCS.4017") => {}
            other => panic!("{other:?}: {}", answer.body),
        }
        tokio::time::sleep(Duration::from_millis(random.below(200))).await;
        daemon.restart().await;
    }
    probe("every task has ended", 2 * PATIENCE, async || {
        let unfinished = daemon.get(&Daemon::path("cache", "auto-expire/histories?status=running&limit=1")).await.ok();
        let waiting = daemon.get(&Daemon::path("cache", "auto-expire/histories?status=waiting&limit=1")).await.ok();
        (&unfinished["count"], &waiting["count"]) == (&json!(0), &json!(0))
    })
    .await;
    // All short TTLs are over. One more sweep without a kill frees the keys that expired behind the cursors of the others.
    let last = daemon.scan("cache").await;
    daemon.until(&last, "succeeded").await;
    accepted.insert(last);

    let history = daemon.history("cache").await;
    let records = history["records"].as_array().expect("a list");
    let listed: Vec<_> = records.iter().map(|record| record["id"].as_str().expect("an id").to_owned()).collect();
    assert_eq!(listed.iter().cloned().collect::<BTreeSet<_>>(), accepted, "seed {seed}: none lost, none invented");
    assert_eq!(listed.len(), accepted.len(), "seed {seed}: none doubled");
    assert!(records.iter().all(|record| record["status"] == "success"), "seed {seed}: {history:#}");
    let total = history["total"].as_u64().expect("a number");
    let freed = server.expired_keys().await;
    assert_eq!(freed, KILLS * EXPIRED, "every expired key is gone");
    assert!(total <= freed, "seed {seed}: counted {total} of {freed}: nothing is counted twice");
    assert!(total + UNCOUNTED >= freed, "seed {seed}: counted {total} of {freed}");
    assert_eq!(keys.dbsize().await, 2_000, "every live key is there");
}

/// Writes keys that expire after 50 ms, while a sweep may be running.
async fn short_lived(server: &Server, round: u64) {
    let mut pipeline = redis::pipe();
    for n in 0..EXPIRED {
        pipeline.cmd("SET").arg(format!("expired:{round}:{n}")).arg(n).arg("PX").arg(50).ignore();
    }
    let written: redis::RedisResult<()> = pipeline.query_async(&mut server.conn().await).await;
    written.expect("the keys are written");
}

/// Locks the records: the daemon cannot write them while the connection is held.
async fn lock_the_store(daemon: &Daemon) -> sqlx::SqliteConnection {
    let mut conn = daemon.records().await;
    sqlx::query("BEGIN IMMEDIATE").execute(&mut conn).await.expect("nobody else writes");
    conn
}

#[tokio::test]
async fn a_kill_before_the_first_checkpoint_loses_no_count() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.expired(2_000, "expired:").await;
    keys.live_ttl(1_000, "live:").await;
    let proxy = Proxy::start(server.addr()).await;
    let pace = "count = 10\nmax-slice = \"1us\"\nmax-keys-per-sec = 1000\n";
    let mut daemon = Daemon::start(&instance("cache", &proxy.url(), pace)).await;
    // The task is recorded without shards: its connection hangs until the store is locked.
    proxy.set(Mode::Stall);
    let id = daemon.scan("cache").await;
    daemon.until(&id, "running").await;
    let lock = lock_the_store(&daemon).await;
    proxy.set(Mode::Pass);
    probe("it frees keys", PATIENCE, async || server.expired_keys().await >= 300).await;
    daemon.kill9();
    let freed = server.expired_keys().await;
    drop(lock);
    assert!(freed < 2_000, "the kill was in the middle: {freed}");
    let mut rows = lock_the_store(&daemon).await;
    let written: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM shards").fetch_one(&mut rows).await.expect("a number");
    assert_eq!(written, 0, "no checkpoint was written");
    drop(rows);
    daemon.restart().await;
    daemon.hurry(&id).await;
    let task = daemon.until(&id, "succeeded").await;
    assert_eq!(server.expired_keys().await, 2_000);
    let counted = task["reclaimed"].as_u64().expect("a number");
    // Two batches of ten keys may have been under way.
    assert!((1_980..=2_000).contains(&counted), "{counted} of 2000, {freed} before the kill");
    assert_eq!(task["shards"].as_array().map(Vec::len), Some(1), "{task:#}");
}

#[tokio::test]
async fn a_full_disk_is_reported_and_survived() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.expired(300, "expired:").await;
    keys.live_ttl(3_000, "live:").await;
    let settings = instance("cache", &server.url(), "max-keys-per-sec = 1500");
    // SIGXFSZ is ignored, so that writes beyond the limit below fail as they do on a full disk.
    let ignoring = |command: std::process::Command| {
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""]).arg(command.get_program());
        shell
    };
    let mut daemon = Daemon::prepare(&settings).launched(ignoring).await;
    let id = daemon.scan("cache").await;
    daemon.until(&id, "running").await;
    limit_files(&daemon, 1);
    let refused = daemon.put(&Daemon::path("cache", "scan-expire-keys/autoscan-config"), &off()).await;
    assert_eq!(refused.code(), (500, "DCS.5000"), "{}", refused.body);
    assert!(!refused.body.to_string().contains("disk"), "no internals: {}", refused.body);
    daemon.get("/healthz").await.ok();
    // The sweep goes on until the server has freed all keys.
    probe("the sweep goes on", PATIENCE, async || server.expired_keys().await == 300).await;
    limit_files(&daemon, 1 << 30);
    let task = daemon.until(&id, "succeeded").await;
    assert_eq!(task["reclaimed"], 300, "{task:#}\n{}", daemon.log());
    daemon.restart().await;
    assert_eq!(daemon.task(&id).await["reclaimed"], 300);
    assert_eq!(daemon.history("cache").await["count"], 1);
}

fn off() -> Value {
    json!({"enable_auto_scan": false})
}

/// Limits the size of each file of the daemon.
fn limit_files(daemon: &Daemon, bytes: u64) {
    let limit = format!("--fsize={bytes}:");
    let set = std::process::Command::new("prlimit").args(["--pid", &daemon.pid().to_string(), &limit]).status();
    assert!(set.expect("prlimit runs").success());
}

#[tokio::test]
async fn a_client_that_goes_away_while_its_task_is_recorded_leaves_no_task_that_never_runs() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(100, "expired:").await;
    let daemon = Daemon::start(&instance("cache", &server.url(), "")).await;
    let mut lock = lock_the_store(&daemon).await;
    let scan = daemon.request(reqwest::Method::POST, &Daemon::path("cache", "scan-expire-keys-task"));
    let gone = scan.timeout(Duration::from_secs(3)).send().await;
    assert!(gone.is_err_and(|error| error.is_timeout()), "the record cannot be written yet");
    sqlx::query("ROLLBACK").execute(&mut lock).await.expect("the lock ends");
    let history = async || daemon.history("cache").await;
    probe("it was recorded and it runs", PATIENCE, async || history().await["records"][0]["status"] == "success").await;
    assert_eq!((&history().await["count"], &history().await["total"]), (&json!(1), &json!(100)));
}
