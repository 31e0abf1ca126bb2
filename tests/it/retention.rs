//! Which ended tasks are kept and which are deleted: by age, by number, and never a task that is still needed.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::Connection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};

use crate::support::daemon::{Daemon, instance};
use crate::support::keyspace::Keyspace;
use crate::support::server::Server;
use crate::support::{PATIENCE, probe};

/// How many rows of a table belong to other tasks than these.
async fn rows_of_others(daemon: &Daemon, table: &str, ids: &[String]) -> i64 {
    let options = SqliteConnectOptions::new().filename(daemon.store()).read_only(true);
    let mut conn = SqliteConnection::connect_with(&options).await.expect("the store opens");
    let marks = vec!["?"; ids.len()].join(", ");
    let column = if table == "tasks" { "id" } else { "task_id" };
    let sql = format!("SELECT COUNT(*) FROM {table} WHERE {column} NOT IN ({marks})");
    let mut query = sqlx::query_scalar(sqlx::AssertSqlSafe(sql));
    for id in ids {
        query = query.bind(id.clone());
    }
    query.fetch_one(&mut conn).await.expect("a number")
}

/// Applies a retention by a reload, as an operator would.
async fn keep(daemon: &Daemon, instances: &str, retention: &str) {
    daemon.write_settings(instances);
    let path = daemon.settings_path();
    // The table of the store is the last one in the file.
    let text = std::fs::read_to_string(&path).expect("the settings") + retention;
    std::fs::write(&path, text).expect("the settings are written");
    daemon.post("/api/v1/reload").await.ok();
}

async fn listed(daemon: &Daemon) -> Vec<String> {
    let list = daemon.get("/api/v1/tasks").await.ok();
    let tasks = list["tasks"].as_array().expect("a list");
    tasks.iter().map(|task| task["id"].as_str().expect("an id").to_owned()).collect()
}

#[tokio::test]
async fn ended_tasks_go_by_number_and_by_age_but_never_an_unfinished_one_nor_the_last_of_an_instance() {
    let (held, quiet, busy) = (Server::start().await, Server::start().await, Server::start().await);
    Keyspace::of(&held, 0).live_ttl(3_000, "live:").await;
    Keyspace::of(&held, 0).expired(40, "expired:").await;
    Keyspace::of(&quiet, 0).expired(7, "expired:").await;
    Keyspace::of(&busy, 0).live_ttl(20, "live:").await;
    let instances = [
        instance("held", &held.url(), "max-keys-per-sec = 500"),
        instance("quiet", &quiet.url(), ""),
        instance("busy", &busy.url(), ""),
    ]
    .concat();
    let mut daemon = Daemon::start(&instances).await;

    // The oldest task has not ended. Then there are one of an instance that is seldom swept, and many of another.
    let paused = daemon.scan("held").await;
    daemon.until(&paused, "running").await;
    daemon.post(&format!("/api/v1/tasks/{paused}/pause")).await.ok();
    let mut ended = Vec::new();
    for id in ["quiet", "busy", "busy", "busy", "busy"] {
        let id = daemon.scan(id).await;
        daemon.until(&id, "succeeded").await;
        ended.insert(0, id);
    }
    assert_eq!(listed(&daemon).await.len(), 6, "by default nothing of this goes");

    let expected = [&ended[0], &ended[1], &ended[4], &paused].map(String::clone);
    keep(&daemon, &instances, "keep-tasks = 2\n").await;
    probe("beyond the number they go", PATIENCE, async || listed(&daemon).await.len() <= 4).await;
    assert_eq!(listed(&daemon).await, expected);
    assert_eq!(daemon.get(&format!("/api/v1/tasks/{}", ended[3])).await.code(), (404, "DCS.4001"));
    let history = daemon.history("quiet").await;
    assert_eq!((&history["count"], &history["total"]), (&json!(1), &json!(7)), "its last run is still on record");
    for table in ["tasks", "shards", "passes", "holds"] {
        assert_eq!(rows_of_others(&daemon, table, &expected).await, 0, "no row of {table} is left behind");
    }

    let expected = [&ended[0], &ended[4], &paused].map(String::clone);
    let all_ended = Instant::now();
    probe("all of them are older than a second", PATIENCE, async || all_ended.elapsed() > Duration::from_secs(1)).await;
    keep(&daemon, &instances, "keep-for = \"1s\"\n").await;
    probe("beyond the age they go", PATIENCE, async || listed(&daemon).await.len() <= 3).await;
    assert_eq!(listed(&daemon).await, expected);

    // The next process finds nothing more to delete when it starts.
    daemon.restart().await;
    let next = daemon.scan("quiet").await;
    daemon.until(&next, "succeeded").await;
    daemon.restart().await;
    probe("the one before it may go now", PATIENCE, async || !listed(&daemon).await.contains(&ended[4])).await;
    assert_eq!(listed(&daemon).await, [&next, &ended[0], &paused].map(String::clone));
    let shown = daemon.get("/api/v1/instances").await.ok();
    let latest = |place: usize| shown["instances"][place]["latest"]["id"].clone();
    assert_eq!([latest(0), latest(1), latest(2)], [&paused, &next, &ended[0]].map(|id| Value::from(id.clone())));

    daemon.post(&format!("/api/v1/tasks/{paused}/resume")).await.ok();
    daemon.hurry(&paused).await;
    let done = daemon.until(&paused, "succeeded").await;
    assert_eq!(done["reclaimed"], 40, "what had not ended has lost nothing");
}

#[tokio::test]
async fn the_last_success_of_an_instance_stays_behind_newer_failures() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).live_ttl(20, "live:").await;
    let instances = instance("cache", &server.url(), "");
    let mut daemon = Daemon::start(&instances).await;
    let mut ended = Vec::new();
    for _ in 0..3 {
        let id = daemon.scan("cache").await;
        daemon.until(&id, "succeeded").await;
        ended.insert(0, id);
    }
    daemon.kill9();
    let mut conn = daemon.records().await;
    let failed = "UPDATE tasks SET state = 'failed' WHERE id = ?";
    sqlx::query(failed).bind(&ended[0]).execute(&mut conn).await.expect("it is written");
    drop(conn);
    daemon.restart().await;
    keep(&daemon, &instances, "keep-tasks = 1\n").await;
    probe("the others go", PATIENCE, async || listed(&daemon).await.len() <= 2).await;
    assert_eq!(listed(&daemon).await, ended[..2]);
}
