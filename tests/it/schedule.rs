//! Scans that run by themselves, in real time: intervals of a second, and a daemon that dies in between.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::support::daemon::{Daemon, instance};
use crate::support::keyspace::Keyspace;
use crate::support::server::Server;
use crate::support::{PATIENCE, probe};

fn config(first: Timestamp, interval: u32) -> Value {
    let timeout = (interval * 2).max(60);
    json!({"enable_auto_scan": true, "first_scan_at": first.to_string(), "interval": interval, "timeout": timeout,
        "scan_keys_count": 20})
}

async fn set(daemon: &Daemon, config: &Value) {
    daemon.put(&Daemon::path("cache", "scan-expire-keys/autoscan-config"), config).await.ok();
}

fn soon() -> Timestamp {
    Timestamp::now() + SignedDuration::from_millis(700)
}

#[tokio::test]
async fn an_interval_of_zero_runs_once_with_the_count_that_was_set() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).dead(200, "dead:").await;
    let daemon = Daemon::start(&instance("cache", &server.url(), "")).await;
    set(&daemon, &config(soon(), 0)).await;
    probe("the scan has run", PATIENCE, async || daemon.history("cache").await["total"] == 200).await;
    let history = daemon.history("cache").await;
    let record = &history["records"][0];
    assert_eq!((&record["scan_type"], &history["count"]), (&json!("auto"), &json!(1)));
    let task = daemon.until(record["id"].as_str().expect("an id"), "succeeded").await;
    assert_eq!(
        (&task["cause"], &task["settings"]["count"], &task["settings"]["timeout"]),
        (&json!("schedule"), &json!("20"), &json!("60s"))
    );
}

#[tokio::test]
async fn due_times_come_one_after_the_other_and_survive_kills_without_doubling() {
    let server = Server::start().await;
    let mut daemon = Daemon::start(&instance("cache", &server.url(), "")).await;
    let first = soon();
    set(&daemon, &config(first, 1)).await;
    for n in [2, 4, 6] {
        probe("more scans have run", PATIENCE, async || {
            daemon.history("cache").await["count"].as_u64().expect("a number") >= n
        })
        .await;
        daemon.restart().await;
    }
    set(&daemon, &json!({"enable_auto_scan": false})).await;
    let history = daemon.history("cache").await;
    let records = history["records"].as_array().expect("a list");
    // Each was created in the second after its own due time: none was run twice.
    let turns: Vec<i64> = records
        .iter()
        .map(|record| {
            let created: Timestamp = record["created_at"].as_str().expect("a time").parse().expect("a time");
            let late = created.as_millisecond() - first.as_millisecond();
            assert!(late >= 0, "before it was due");
            late / 1000
        })
        .collect();
    let distinct: BTreeSet<_> = turns.iter().collect();
    assert_eq!(distinct.len(), turns.len(), "{turns:?}");
}

#[tokio::test]
async fn a_daemon_that_was_down_at_the_due_time_catches_up_once() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).dead(50, "dead:").await;
    let mut daemon = Daemon::start(&instance("cache", &server.url(), "")).await;
    let first = soon();
    set(&daemon, &config(first, 3600)).await;
    daemon.kill9();
    probe("the due time has passed", PATIENCE, async || Timestamp::now() > first).await;
    daemon.restart().await;
    probe("it was caught up", PATIENCE, async || daemon.history("cache").await["total"] == 50).await;
    daemon.restart().await;
    let next = daemon.get("/api/v1/instances/cache").await.ok();
    assert!(next["next_scan_at"].is_string());
    assert_eq!(daemon.history("cache").await["count"], 1, "once");
}

#[tokio::test]
async fn a_cron_of_the_settings_file_runs_until_the_api_says_otherwise() {
    let server = Server::start().await;
    let cron = "[instances.auto-scan]\nenabled = true\ncron = \"* * * * * *\"\nzone = \"Europe/Berlin\"\n";
    let daemon = Daemon::start(&instance("cache", &server.url(), cron)).await;
    let shown = daemon.get(&Daemon::path("cache", "scan-expire-keys/autoscan-config")).await.ok();
    assert_eq!((&shown["enable_auto_scan"], &shown["scan_keys_count"]), (&json!(true), &json!(50)));
    probe("two scans have run", PATIENCE, async || {
        daemon.history("cache").await["count"].as_u64().expect("a number") >= 2
    })
    .await;
    set(&daemon, &json!({"enable_auto_scan": false})).await;
    let shown = daemon.get("/api/v1/instances/cache").await.ok();
    assert_eq!(shown["next_scan_at"], Value::Null);
}

#[tokio::test]
async fn a_busy_instance_is_waited_for() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).live_ttl(3_000, "live:").await;
    let daemon = Daemon::start(&instance("cache", &server.url(), "max-keys-per-sec = 500")).await;
    let manual = daemon.scan("cache").await;
    daemon.until(&manual, "running").await;
    let first = soon();
    set(&daemon, &config(first, 0)).await;
    probe("the due time has passed", PATIENCE, async || Timestamp::now() > first).await;
    assert_eq!(daemon.history("cache").await["count"], 1, "the manual scan runs");
    daemon.post(&format!("/api/v1/tasks/{manual}/cancel")).await.ok();
    probe("the due scan follows", PATIENCE, async || daemon.history("cache").await["count"] == 2).await;
    assert_eq!(daemon.history("cache").await["records"][0]["scan_type"], "auto");
}
