//! Scheduled scans in real time: intervals of a second, and a daemon that is killed in between.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use sqlx::Connection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};

use crate::support::daemon::{Daemon, EACH_SECOND, instance};
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
    Timestamp::now() + SignedDuration::from_millis(2_000)
}

#[tokio::test]
async fn an_interval_of_zero_runs_once_with_the_count_that_was_set() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(200, "expired:").await;
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
    // Each task was created in the second after its own due time: none was run twice.
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
    Keyspace::of(&server, 0).expired(50, "expired:").await;
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

#[tokio::test]
async fn due_times_that_overtake_each_other_while_the_instance_is_busy_are_counted() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).live_ttl(3_000, "live:").await;
    let slow = format!("max-keys-per-sec = 100\n{EACH_SECOND}");
    let daemon = Daemon::start(&instance("cache", &server.url(), &slow)).await;
    probe("two were skipped", PATIENCE, async || outcome(&daemon, "still_running").await >= 2).await;
    assert_eq!(daemon.history("cache").await["count"], 1, "the first one still runs");
}

/// How long ago the first due time is in the tests of the grace period of five minutes.
const INSIDE: SignedDuration = SignedDuration::from_mins(4);
const BEYOND: SignedDuration = SignedDuration::from_mins(6);

/// A first due time this long ago, in whole seconds, with an hour to the next one.
fn first_before(passed: SignedDuration) -> Timestamp {
    let at = Timestamp::now() - passed;
    Timestamp::from_second(at.as_second()).expect("a time")
}

/// Two servers: that of the instance `cache`, whose schedule is tested, and that of `other`, which is due each second.
async fn two_servers() -> [Server; 2] {
    [Server::start().await, Server::start().await]
}

/// The settings of an automatic scan that is due each hour from `first` on.
fn hourly(enabled: bool, first: Timestamp) -> String {
    format!("[instances.auto-scan]\nenabled = {enabled}\nfirst-scan-at = \"{first}\"\ninterval = \"60min\"\n")
}

/// The settings of both instances, with this schedule of `cache`.
fn both(servers: &[Server; 2], cache: &str) -> String {
    let [one, other] = servers.each_ref().map(Server::url);
    [instance("cache", &one, cache), instance("other", &other, EACH_SECOND)].concat()
}

/// The same, with the first due time of `cache` at `first`.
fn due_at(servers: &[Server; 2], first: Timestamp, more: &str) -> String {
    both(servers, &format!("{more}\n{}", hourly(true, first)))
}

/// Waits until the daemon has checked the schedule of `cache` again, which is certain once `other` has run twice.
async fn checked_again(daemon: &Daemon) {
    let count = async || daemon.history("other").await["count"].as_u64().expect("a number");
    let before = count().await;
    probe("schedules are checked", PATIENCE, async || count().await >= before + 2).await;
}

/// Sets the daemon's record of the last due time back, as if the daemon had run before the due time.
async fn rewind(daemon: &Daemon) {
    let mut conn = daemon.records().await;
    let sql = "UPDATE dues SET handled = handled - 600000 WHERE instance_id = 'cache'";
    let changed = sqlx::query(sql).execute(&mut conn).await.expect("it is written").rows_affected();
    assert_eq!(changed, 1, "the daemon has checked the schedule");
}

/// A daemon that ran until ten minutes ago, with a due time since then.
async fn after_an_absence(servers: &[Server; 2], first: Timestamp, more: &str) -> Daemon {
    let mut daemon = Daemon::start(&due_at(servers, first, more)).await;
    probe("the schedule was checked", PATIENCE, async || has_checked(&daemon).await).await;
    daemon.kill9();
    rewind(&daemon).await;
    daemon.restart().await;
    daemon
}

async fn has_checked(daemon: &Daemon) -> bool {
    let options = SqliteConnectOptions::new().filename(daemon.store()).read_only(true);
    let Ok(mut conn) = SqliteConnection::connect_with(&options).await else { return false };
    let sql = "SELECT COUNT(*) FROM dues WHERE instance_id = 'cache'";
    let marks: Result<i64, _> = sqlx::query_scalar(sql).fetch_one(&mut conn).await;
    marks.is_ok_and(|marks| marks == 1)
}

async fn outcome(daemon: &Daemon, word: &str) -> u64 {
    let text = daemon.figures().await;
    let name = format!("ttlsweep_due_times_total{{redis_instance=\"cache\",outcome=\"{word}\"}} ");
    text.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).unwrap_or(0)
}

#[tokio::test]
async fn a_missed_due_time_is_caught_up_once_inside_the_grace_and_beyond_it() {
    for passed in [INSIDE, BEYOND] {
        let servers = two_servers().await;
        Keyspace::of(&servers[0], 0).expired(30, "expired:").await;
        let first = first_before(passed);
        let mut daemon = after_an_absence(&servers, first, "").await;
        probe("it was caught up", PATIENCE, async || daemon.history("cache").await["total"] == 30).await;
        assert_eq!(outcome(&daemon, "run").await, 1);
        let next = daemon.get("/api/v1/instances/cache").await.ok()["next_scan_at"].clone();
        let next: Timestamp = next.as_str().expect("a time").parse().expect("a time");
        assert_eq!(next, first + SignedDuration::from_mins(60), "an hour after the first one, not after the catch-up");
        for _ in 0..2 {
            daemon.restart().await;
            checked_again(&daemon).await;
            assert_eq!(daemon.history("cache").await["count"], 1, "{passed}: never doubled");
        }
    }
}

#[tokio::test]
async fn a_missed_due_time_is_skipped_beyond_the_grace_if_the_window_is_closed() {
    let servers = two_servers().await;
    let now = Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    let hour = |ahead: i64| (&now + SignedDuration::from_hours(ahead)).strftime("%H:%M").to_string();
    let closed = format!("window = {{ start = \"{}\", end = \"{}\" }}", hour(2), hour(4));
    let mut daemon = after_an_absence(&servers, first_before(BEYOND), &closed).await;
    probe("it is skipped", PATIENCE, async || outcome(&daemon, "missed").await == 1).await;
    assert_eq!(daemon.history("cache").await["count"], 0);
    daemon.restart().await;
    checked_again(&daemon).await;
    assert_eq!((daemon.history("cache").await["count"].clone(), outcome(&daemon, "missed").await), (json!(0), 0));
}

/// A daemon whose instance has a paused task and a due time this long ago.
async fn busy_since(servers: &[Server; 2], passed: SignedDuration) -> (Daemon, String) {
    Keyspace::of(&servers[0], 0).live_ttl(3_000, "live:").await;
    let slow = "max-keys-per-sec = 500";
    let mut daemon = Daemon::start(&due_at(servers, first_before(passed), slow)).await;
    let id = daemon.scan("cache").await;
    daemon.until(&id, "running").await;
    daemon.post(&format!("/api/v1/tasks/{id}/pause")).await.ok();
    probe("the schedule was checked", PATIENCE, async || has_checked(&daemon).await).await;
    daemon.kill9();
    rewind(&daemon).await;
    daemon.restart().await;
    (daemon, id)
}

#[tokio::test]
async fn a_due_time_waits_for_a_busy_instance_inside_the_grace() {
    let servers = two_servers().await;
    let (mut daemon, id) = busy_since(&servers, INSIDE).await;
    // Killed while the due scan waits: it waits again after the restart.
    checked_again(&daemon).await;
    daemon.restart().await;
    checked_again(&daemon).await;
    assert_eq!(daemon.history("cache").await["count"], 1, "the paused task is there, and nothing else");
    daemon.post(&format!("/api/v1/tasks/{id}/cancel")).await.ok();
    probe("the due scan follows", PATIENCE, async || daemon.history("cache").await["count"] == 2).await;
    assert_eq!(daemon.history("cache").await["records"][0]["scan_type"], "auto");
    daemon.restart().await;
    checked_again(&daemon).await;
    assert_eq!(daemon.history("cache").await["count"], 2, "once");
}

#[tokio::test]
async fn a_due_time_is_skipped_when_the_instance_is_busy_beyond_the_grace() {
    let servers = two_servers().await;
    let (mut daemon, id) = busy_since(&servers, BEYOND).await;
    probe("it is skipped", PATIENCE, async || outcome(&daemon, "still_running").await == 1).await;
    assert!(daemon.log().contains("a due scan is skipped"), "{}", daemon.log());
    daemon.post(&format!("/api/v1/tasks/{id}/cancel")).await.ok();
    for _ in 0..2 {
        checked_again(&daemon).await;
        assert_eq!(daemon.history("cache").await["count"], 1, "it waits for the next due time");
        daemon.restart().await;
    }
    assert!(daemon.get("/api/v1/instances/cache").await.ok()["next_scan_at"].is_string());
}

/// Gives the daemon another schedule of `cache`, and waits until it has checked that.
async fn set_and_checked(daemon: &Daemon, servers: &[Server; 2], cache: &str) {
    daemon.write_settings(&both(servers, cache));
    daemon.post("/api/v1/reload").await.ok();
    checked_again(daemon).await;
}

#[tokio::test]
async fn a_schedule_that_is_switched_on_or_changed_runs_nothing_for_the_time_before() {
    let servers = two_servers().await;
    let first = Timestamp::now() + SignedDuration::from_secs(2);
    let daemon = Daemon::start(&instance("cache", &servers[0].url(), &hourly(false, first))).await;
    // A due time passes while the schedule is switched off.
    set_and_checked(&daemon, &servers, &hourly(false, first)).await;
    probe("the time has passed", PATIENCE, async || Timestamp::now() > first).await;
    set_and_checked(&daemon, &servers, &hourly(true, first)).await;
    assert_eq!(daemon.history("cache").await["count"], 0, "it was switched on after its due time");
    // A schedule that would have been due a second ago.
    let earlier = Timestamp::now() - SignedDuration::from_secs(1);
    set_and_checked(&daemon, &servers, &hourly(true, earlier)).await;
    assert_eq!(daemon.history("cache").await["count"], 0, "it was changed after that time");
    let soon = soon();
    set_and_checked(&daemon, &servers, &hourly(true, soon)).await;
    probe("the time that comes is kept", PATIENCE, async || daemon.history("cache").await["count"] == 1).await;
    set_and_checked(&daemon, &servers, &hourly(true, soon)).await;
    assert_eq!(daemon.history("cache").await["count"], 1, "once, although it was not due on a whole millisecond");
}

#[tokio::test]
async fn a_schedule_that_is_new_or_changed_at_a_restart_runs_nothing_for_the_time_before() {
    let servers = two_servers().await;
    let mut daemon = Daemon::start(&both(&servers, "")).await;
    for (what, passed) in [("new", INSIDE), ("changed", BEYOND)] {
        checked_again(&daemon).await;
        daemon.kill9();
        rewind(&daemon).await;
        daemon.write_settings(&due_at(&servers, first_before(passed), ""));
        daemon.restart().await;
        checked_again(&daemon).await;
        assert_eq!(daemon.history("cache").await["count"], 0, "{what}");
        assert_eq!(outcome(&daemon, "missed").await, 0, "{what}");
    }
}

#[tokio::test]
async fn a_clock_that_was_once_ahead_stops_no_schedule() {
    let server = Server::start().await;
    let mut daemon = Daemon::start(&instance("cache", &server.url(), EACH_SECOND)).await;
    let count = async |daemon: &Daemon| daemon.history("cache").await["count"].as_u64().expect("a number");
    probe("it runs", PATIENCE, async || count(&daemon).await >= 1).await;
    daemon.kill9();
    let mut conn = daemon.records().await;
    let year = "UPDATE dues SET handled = handled + 31536000000";
    sqlx::query(year).execute(&mut conn).await.expect("it is written");
    drop(conn);
    daemon.restart().await;
    let before = count(&daemon).await;
    probe("it goes on", PATIENCE, async || count(&daemon).await > before).await;
    assert!(daemon.log().contains("the clock was set back"), "{}", daemon.log());
}

#[tokio::test]
async fn a_schedule_of_the_file_comes_back_once_what_the_api_set_is_forgotten() {
    let server = Server::start().await;
    let cron = "[instances.auto-scan]\nenabled = true\ncron = \"0 0 3 1 1 *\"\n";
    let daemon = Daemon::start(&instance("cache", &server.url(), cron)).await;
    let next = async || daemon.get("/api/v1/instances/cache").await.ok()["next_scan_at"].clone();
    let by_file = next().await;
    assert!(by_file.is_string(), "{by_file}");
    set(&daemon, &json!({"enable_auto_scan": false})).await;
    assert_eq!(next().await, Value::Null);
    let reset = daemon.request(reqwest::Method::DELETE, "/api/v1/instances/cache/auto-scan");
    assert_eq!(daemon.send(reset).await.ok()["next_scan_at"], by_file);
    assert_eq!(next().await, by_file);
}
