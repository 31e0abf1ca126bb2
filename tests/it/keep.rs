//! A bound on expired keys is kept, and the keys that this frees are counted exactly: from the command line, and by the daemon.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::clients::client_if_there;
use crate::support::cluster::Cluster;
use crate::support::daemon::{Daemon, instance, window};
use crate::support::hook::Hook;
use crate::support::keyspace::Keyspace;
use crate::support::run::{Running, run, scan};
use crate::support::server::Server;
use crate::support::{PATIENCE, probe, skipped};

/// A delay that is easy to keep.
const KEEP: &str = "[instances.keep]\nmax-delay = \"2s\"\n";

/// A server without active expiry: only the walk frees keys.
async fn server() -> Server {
    let server = Server::start().await;
    server.stop_active_expiry().await;
    server
}

/// Writes keys that expire within a third of a second, while they are walked.
async fn wave(server: &Server, name: &str, keys: u64) {
    let mut pipeline = redis::pipe();
    for n in 0..keys {
        pipeline.cmd("SET").arg(format!("{name}:{n}")).arg(n).arg("PX").arg(1 + 300 * n / keys).ignore();
    }
    let written: redis::RedisResult<()> = pipeline.query_async(&mut server.conn().await).await;
    written.expect("the keys are written");
}

/// Waits until the server has only this many keys in memory.
async fn until_left(server: &Server, keys: u64) {
    probe("what has expired is gone", PATIENCE, async || server.dbsize(0).await == keys).await;
}

/// Waits for a keep run under way, and returns its task.
pub async fn keep_run(daemon: &Daemon) -> Value {
    let mut runs = json!(null);
    probe("a keep run is under way", PATIENCE, async || {
        runs = daemon.get("/api/v1/tasks?cause=keep&state=running").await.ok();
        runs["tasks"][0]["started_at"].is_string()
    })
    .await;
    runs["tasks"][0].clone()
}

fn id_of(task: &Value) -> String {
    task["id"].as_str().expect("an id").to_owned()
}

#[tokio::test]
async fn keys_that_expire_meanwhile_go_and_each_is_counted_until_a_signal_ends_it_in_success() {
    let server = server().await;
    Keyspace::of(&server, 0).live_ttl(2_000, "live:").await;
    let keep = Running::start(["keep", &server.url(), "--json", "--max-delay", "500ms"]);
    for number in 0..3 {
        wave(&server, &format!("wave{number}"), 1_000).await;
        until_left(&server, 2_000).await;
    }
    keep.signal("INT");
    let ended = keep.end().await.expect(0);
    let keep = &ended.json()["report"]["shards"][0]["keep"];
    assert!(keep["laps"].as_u64().unwrap() >= 3 && keep["delay_s"].is_number(), "{keep}");
    assert_eq!((ended.num(), &ended.json()["status"]), (server.expired_keys().await, &json!("success")));
    assert_eq!(ended.total("held_s"), 0.0);
}

#[tokio::test]
async fn two_databases_are_kept_and_one_that_comes_by_keys_later() {
    let server = server().await;
    Keyspace::of(&server, 0).live_ttl(500, "live:").await;
    let keep = Running::start(["keep", &server.url(), "--json", "--max-delay", "500ms", "--max-backlog", "1000"]);
    let mut conn = server.conn_to(3).await;
    probe("it walks", PATIENCE, async || server.info("commandstats").await.contains_key("cmdstat_scan")).await;
    let written: () =
        redis::cmd("SET").arg("k").arg(1).arg("PX").arg(50).query_async(&mut conn).await.expect("written");
    let () = written;
    probe("DB 3 is walked", PATIENCE, async || server.dbsize(3).await == 0).await;
    keep.signal("TERM");
    assert_eq!(keep.end().await.expect(0).num(), 1);
}

#[tokio::test]
async fn a_bound_that_the_limits_do_not_let_be_kept_is_told_with_the_numbers() {
    let server = server().await;
    let keys = Keyspace::of(&server, 0);
    keys.live_ttl(3_000, "live:").await;
    let limits = ["--max-delay", "200ms", "--max-keys-per-sec", "2000", "--count", "10"];
    let keep = Running::start(["keep", &server.url()].iter().chain(&limits));
    keep.says("BOUND MISSED").await;
    keep.says("the bound cannot be kept within the limits").await;
    keep.signal("INT");
    let ended = keep.end().await.expect(0);
    assert!(ended.stdout.contains("the bound cannot be kept within the limits"), "{ended:#?}");
    assert!(
        ended.stdout.contains("max-keys-per-sec 2,000") && ended.stdout.contains("a bound was missed for"),
        "{ended:#?}"
    );
}

#[tokio::test]
async fn without_a_bound_there_is_nothing_to_keep_and_a_scan_keeps_none() {
    let without = run(["keep", "redis://127.0.0.1:1"]).await.expect(2);
    assert!(without.stderr.contains("--max-backlog"), "{without:?}");
    for (option, value) in
        [("--max-backlog", "lots"), ("--max-backlog", "101%"), ("--max-delay", "0s"), ("--max-delay", "2")]
    {
        let wrong = run(["keep", "redis://127.0.0.1:1", option, value]).await.expect(2);
        assert!(wrong.stderr.contains(option), "{wrong:?}");
    }
    let server = server().await;
    Keyspace::of(&server, 0).expired(100, "expired:").await;
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "max-delay = \"1s\"\n").expect("written");
    let path = file.path().to_str().expect("a path");
    assert_eq!(scan(&server.url(), &["--config", path]).await.expect(0).num(), 100, "it ends by itself");
}

#[tokio::test]
async fn masters_of_a_cluster_are_kept_together_although_they_share_a_host() {
    let cluster = Cluster::start(3, false).await;
    let live = cluster.fill(600, 300).await;
    let keep = Running::start(["keep", &cluster.url(), "--json", "--max-delay", "1s"]);
    probe("what has expired is gone", PATIENCE, async || cluster.keys_in_memory().await == live.len() as u64).await;
    cluster.assert_only(&live).await;
    keep.signal("INT");
    let ended = keep.end().await.expect(0);
    let report = &ended.json()["report"];
    let shards = report["shards"].as_array().expect("a list");
    assert!(shards.len() == 3 && shards.iter().all(|shard| shard["keep"].is_object()), "{report:#}");
    assert_eq!(ended.num(), 300);
}

#[tokio::test]
async fn a_master_that_joins_the_cluster_is_kept_too() {
    let mut cluster = Cluster::start(3, false).await;
    let live = cluster.fill(300, 300).await;
    let keep = Running::start(["keep", &cluster.url(), "--json", "--max-delay", "1s"]);
    probe("what has expired is gone", PATIENCE, async || cluster.keys_in_memory().await == live.len() as u64).await;
    let new = cluster.join().await;
    cluster.migrate(0, new, 0..=2_000).await;
    cluster.until_agreed().await;
    let mortal: Vec<String> = (0..600).map(|n| format!("mortal{n}")).collect();
    cluster.set_for_a_moment(&mortal).await;
    probe("what has expired is gone, on the new master too", PATIENCE, async || {
        cluster.keys_in_memory().await == live.len() as u64
    })
    .await;
    assert!(cluster.freed_by(new).await > 0, "it had some");
    keep.signal("INT");
    assert_eq!(keep.end().await.expect(0).num(), 900);
}

#[tokio::test]
async fn a_server_that_is_restarted_is_kept_again() {
    let mut server = server().await;
    Keyspace::of(&server, 0).live_ttl(200, "live:").await;
    let keep = Running::start(["keep", &server.url(), "--json", "--max-delay", "1s"]);
    wave(&server, "first", 100).await;
    until_left(&server, 200).await;
    server.restart().await;
    server.stop_active_expiry().await;
    let left = server.dbsize(0).await;
    wave(&server, "second", 100).await;
    until_left(&server, left).await;
    keep.signal("INT");
    assert_eq!(keep.end().await.expect(0).num(), 200);
}

#[tokio::test]
async fn an_instance_with_a_bound_is_kept_and_the_contract_shows_its_run_as_automatic() {
    let server = server().await;
    Keyspace::of(&server, 0).live_ttl(1_000, "live:").await;
    let daemon = Daemon::start(&instance("cache", &server.url(), KEEP)).await;
    let run = keep_run(&daemon).await;
    wave(&server, "wave", 500).await;
    until_left(&server, 1_000).await;
    let history = daemon.history("cache").await;
    assert_eq!(
        (&history["records"][0]["scan_type"], &history["records"][0]["status"]),
        (&json!("auto"), &json!("running"))
    );
    let shown = daemon.get("/api/v1/instances/cache").await.ok();
    assert_eq!(shown["keep"], json!({"max_backlog": "off", "max_delay": "2s"}));
    probe("every key is counted", PATIENCE, async || daemon.task(&id_of(&run)).await["reclaimed"] == 500).await;
    let task = daemon.task(&id_of(&run)).await;
    assert_eq!(task["shards"][0]["keep"]["is_missed"], false, "{task:#}");
    // The known backlogs are shown, and the instance with the largest comes first.
    let other = self::server().await;
    Keyspace::of(&other, 0).expired(70, "expired:").await;
    let both = [instance("other", &other.url(), ""), instance("cache", &server.url(), KEEP)].concat();
    daemon.write_settings(&both);
    daemon.post("/api/v1/reload").await.ok();
    let swept = daemon.scan("other").await;
    daemon.until(&swept, "succeeded").await;
    let mut list = json!(null);
    // The estimate of the keep run falls once the wave is over.
    probe("both are known, and the larger one is first", PATIENCE, async || {
        list = daemon.get("/api/v1/instances?sort=backlog&order=desc").await.ok()["instances"].clone();
        list[0]["id"] == "other" && list[1]["backlog"].is_number()
    })
    .await;
    assert_eq!((&list[0]["id"], &list[0]["backlog"], &list[1]["id"]), (&json!("other"), &json!(70), &json!("cache")));
    let history = daemon.get("/api/v1/instances/cache/history").await.ok();
    assert!(history["sweeps"][0]["backlog"].is_number(), "{history:#}");
    let figures = daemon.figures().await;
    for name in ["keep_bound_missed_seconds_total", "keep_backlog_keys", "keep_delay_seconds"] {
        assert!(figures.contains(&format!("ttlsweep_{name}{{redis_instance=\"cache\"}}")), "{name}\n{figures}");
    }
}

#[tokio::test]
async fn a_keep_run_gives_way_to_a_scan_and_another_one_follows() {
    let server = server().await;
    Keyspace::of(&server, 0).live_ttl(1_000, "live:").await;
    // A keep run does not count toward `at-once`.
    let settings = [instance("cache", &server.url(), KEEP), "[tasks]\nat-once = 1\n".into()];
    let daemon = Daemon::start(&settings.concat()).await;
    let first = id_of(&keep_run(&daemon).await);
    let scan = daemon.scan("cache").await;
    assert_eq!(daemon.task(&first).await["state"], "succeeded", "it has ended before the scan is there");
    daemon.until(&scan, "succeeded").await;
    let second = id_of(&keep_run(&daemon).await);
    assert_ne!(first, second);
    let again = daemon.post(&format!("/api/v1/tasks/{second}/pause")).await.ok();
    assert_eq!(again["state"], "paused");
    let answer = daemon.post(&Daemon::path("cache", "scan-expire-keys-task")).await;
    assert_eq!(answer.code(), (400, "DCS.4017"), "one that a person paused stays");
    daemon.post(&format!("/api/v1/tasks/{second}/resume")).await.ok();
    daemon.until(&second, "running").await;
}

#[tokio::test]
async fn a_keep_run_that_was_cancelled_stays_away_and_other_bounds_make_another_run() {
    let server = server().await;
    Keyspace::of(&server, 0).live_ttl(1_000, "live:").await;
    let daemon = Daemon::start(&instance("cache", &server.url(), KEEP)).await;
    let first = id_of(&keep_run(&daemon).await);
    let path = "/api/v1/instances/cache/keep";
    let changed = daemon.put(path, &json!({"max_backlog": "5%", "max_delay": "3s"})).await.ok();
    assert_eq!(changed["keep"], json!({"max_backlog": "5%", "max_delay": "3s"}));
    daemon.until(&first, "succeeded").await;
    let second = keep_run(&daemon).await;
    assert_eq!((&second["settings"]["max-backlog"], &second["settings"]["max-delay"]), (&json!("5%"), &json!("3s")));
    daemon.post(&format!("/api/v1/tasks/{}/cancel", id_of(&second))).await.ok();
    // The earlier bounds are in force again.
    daemon.send(daemon.request(Method::DELETE, path)).await.ok();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let runs = daemon.get("/api/v1/tasks?cause=keep").await.ok();
    assert_eq!(runs["count"], 2, "the rest of the hour is without: {runs:#}");
    let off = daemon.put(path, &json!({})).await.ok();
    assert_eq!(off["keep"], json!(null), "without any bound it is not kept");
    let wrong = daemon.put(path, &json!({"max_delay": "soon"})).await;
    assert_eq!(wrong.code(), (400, "DCS.4800"));
}

#[tokio::test]
async fn a_killed_daemon_goes_on_with_its_keep_run_and_counts_each_key_once() {
    let server = server().await;
    Keyspace::of(&server, 0).live_ttl(1_000, "live:").await;
    let mut daemon = Daemon::start(&instance("cache", &server.url(), KEEP)).await;
    let run = id_of(&keep_run(&daemon).await);
    wave(&server, "before", 300).await;
    until_left(&server, 1_000).await;
    daemon.restart().await;
    wave(&server, "after", 300).await;
    until_left(&server, 1_000).await;
    probe("every key is counted", PATIENCE, async || {
        let task = daemon.task(&run).await;
        let lost = task["shards"][0]["dbs"][0]["lost_replies"].as_u64().unwrap_or(0);
        // A batch may have been under way at the kill; then it is marked as lost.
        task["reclaimed"] == 600 || lost > 0 && task["reclaimed"].as_u64() <= Some(600)
    })
    .await;
    assert_eq!(daemon.task(&run).await["state"], "running", "the same run");
    assert_eq!(daemon.stop().await, Some(0));
}

#[tokio::test]
async fn the_history_has_a_row_for_each_hour_of_the_clock() {
    let Some(library) = client_if_there("faketime") else {
        return skipped("libfaketime is not on this machine (make clients gets it)");
    };
    let server = server().await;
    Keyspace::of(&server, 0).live_ttl(1_000, "live:").await;
    // For the daemon it is a few seconds before the full hour.
    let now = jiff::Timestamp::now().as_second();
    let ahead = (3_600 - now % 3_600) - 14;
    let daemon = Daemon::prepare(&instance("cache", &server.url(), KEEP));
    let daemon = daemon
        .launched(|mut command| {
            command
                .env("LD_PRELOAD", &library)
                .env("FAKETIME", format!("{ahead:+}"))
                .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
            command
        })
        .await;
    let first = id_of(&keep_run(&daemon).await);
    wave(&server, "first", 300).await;
    until_left(&server, 1_000).await;
    let ended = daemon.until(&first, "succeeded").await;
    let finished = ended["finished_at"].as_str().expect("a time");
    assert!(finished.contains(":00:0"), "with the hour: {finished}");
    let second = keep_run(&daemon).await;
    assert_ne!(id_of(&second), first);
    wave(&server, "second", 200).await;
    until_left(&server, 1_000).await;
    probe("each counts its own", PATIENCE, async || {
        let second = daemon.task(&id_of(&second)).await["reclaimed"].as_u64();
        ended["reclaimed"].as_u64().zip(second).map(|(one, other)| one + other) == Some(500)
    })
    .await;
}

#[tokio::test]
async fn outside_of_its_window_an_instance_is_not_kept() {
    let server = server().await;
    let settings = instance("cache", &server.url(), &format!("{KEEP}{}", window(false)));
    let other = self::server().await;
    Keyspace::of(&other, 0).live_ttl(10, "live:").await;
    let daemon = Daemon::start(&format!("{settings}{}", instance("other", &other.url(), KEEP))).await;
    // The run of the other instance shows that the daemon has checked both.
    let run = keep_run(&daemon).await;
    assert_eq!(run["instance_id"], "other");
    assert_eq!(daemon.get("/api/v1/tasks?instance_id=cache").await.ok()["count"], 0);
}

#[tokio::test]
async fn a_bound_that_is_missed_for_long_is_told_to_the_webhook() {
    let server = server().await;
    Keyspace::of(&server, 0).live_ttl(3_000, "live:").await;
    let hook = Hook::start(&[]).await;
    let notify = format!("[notify]\nurl = \"{}\"\n", hook.url());
    let slow = "max-keys-per-sec = 2000\ncount = 10\n[instances.keep]\nmax-delay = \"200ms\"\n";
    let _daemon = Daemon::start(&format!("{}{notify}", instance("cache", &server.url(), slow))).await;
    let told = hook.wait_for(1).await[0].json();
    assert_eq!(told["type"], "bound_missed", "{told:#}");
    assert_eq!(
        (&told["data"]["instance_id"], &told["data"]["max_delay"]),
        (&json!("cache"), &json!("200ms")),
        "{told:#}"
    );
}
