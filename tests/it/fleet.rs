//! The daemon with instances that are more than one server: a cluster, and a master behind sentinels.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::support::cluster::Cluster;
use crate::support::daemon::{Daemon, instance};
use crate::support::keyspace::Keyspace;
use crate::support::server::Server;
use crate::support::{PATIENCE, probe};

const MASTERS: usize = 3;

/// Batches of ten keys, slow enough for a test to act during the sweep; two may be under way at a kill.
const SLOW: &str = "count = 10\nmax-slice = \"1us\"\nmax-keys-per-sec = 200\n";
const UNCOUNTED: u64 = 20;

fn shards(task: &Value) -> &[Value] {
    task["shards"].as_array().expect("a list")
}

/// A figure of each shard.
fn by_shard(task: &Value, name: &str) -> Vec<u64> {
    let sum = |shard: &Value| {
        let dbs = shard["dbs"].as_array().expect("a list").iter();
        dbs.map(|db| db[name].as_u64().expect("a number")).sum()
    };
    shards(task).iter().map(sum).collect()
}

async fn freed(cluster: &Cluster) -> Vec<u64> {
    let mut freed = Vec::new();
    for place in 0..MASTERS {
        freed.push(cluster.freed_by(place).await);
    }
    freed
}

#[tokio::test]
async fn a_cluster_is_swept_shard_by_shard_and_counted_exactly() {
    let cluster = Cluster::start(MASTERS, false).await;
    let live = cluster.fill(600, 900).await;
    let daemon = Daemon::start(&instance("sessions", &cluster.url(), "")).await;

    let check = daemon.post("/api/v1/instances/sessions/check").await.ok();
    assert_eq!(check["shards"].as_array().map(Vec::len), Some(MASTERS), "{check:#}");
    assert_eq!(freed(&cluster).await.iter().sum::<u64>(), 0, "the check frees nothing");

    let id = daemon.scan("sessions").await;
    let task = daemon.until(&id, "succeeded").await;
    cluster.assert_only(&live).await;
    assert_eq!((&task["reclaimed"], &task["progress"]), (&json!(900), &json!(1.0)));
    let history = daemon.history("sessions").await;
    assert_eq!((&history["records"][0]["num"], &history["total"]), (&json!(900), &json!(900)));
    // Each shard has the figures of its own master, and the record keeps them after the end of the task.
    let mut own = freed(&cluster).await;
    let mut counted = by_shard(&task, "reclaimed");
    own.sort_unstable();
    counted.sort_unstable();
    assert_eq!(counted, own, "{task:#}");
    assert!(counted.iter().all(|&keys| keys > 0), "{counted:?}");
    let names: BTreeSet<_> = shards(&task).iter().map(|shard| shard["shard"].as_str()).collect();
    assert_eq!(names.len(), MASTERS, "{names:?}");
}

#[tokio::test]
async fn the_sweep_of_a_cluster_is_paused_resumed_and_cancelled() {
    let cluster = Cluster::start(MASTERS, false).await;
    cluster.fill(3_000, 600).await;
    let daemon = Daemon::start(&instance("sessions", &cluster.url(), &format!("{SLOW}parallel = {MASTERS}\n"))).await;
    let id = daemon.scan("sessions").await;
    let order = async |what: &str| daemon.post(&format!("/api/v1/tasks/{id}/{what}")).await.ok();
    probe("every shard has begun", PATIENCE, async || {
        let task = daemon.task(&id).await;
        shards(&task).len() == MASTERS && by_shard(&task, "scanned").iter().all(|&keys| keys > 0)
    })
    .await;
    assert_eq!(order("pause").await["state"], "paused");
    probe("every shard stands still", PATIENCE, async || {
        let task = daemon.task(&id).await;
        let holds = task["holds"].as_array().expect("a list");
        holds.len() == MASTERS && holds.iter().all(|hold| hold["reason"] == "paused")
    })
    .await;
    let before = daemon.task(&id).await["scanned"].clone();
    assert_eq!(order("resume").await["state"], "running");
    probe("it goes on", PATIENCE, async || daemon.task(&id).await["scanned"] != before).await;
    let task = order("cancel").await;
    let counted: u64 = by_shard(&task, "reclaimed").iter().sum();
    assert_eq!((&task["state"], &task["reclaimed"]), (&json!("cancelled"), &json!(counted)));
    assert_eq!(freed(&cluster).await.iter().sum::<u64>(), counted, "a cancelled task has counted all that it freed");
    assert_eq!(daemon.history("sessions").await["records"][0]["status"], "failed");
}

#[tokio::test]
async fn a_killed_daemon_goes_on_with_every_shard_where_it_was() {
    let cluster = Cluster::start(MASTERS, false).await;
    let live = cluster.fill(1_500, 1_500).await;
    let mut daemon = Daemon::start(&instance("sessions", &cluster.url(), &format!("{SLOW}parallel = 2\n"))).await;
    let id = daemon.scan("sessions").await;
    // Two shards are under way, and one waits for its turn.
    probe("two shards have freed something", PATIENCE, async || {
        by_shard(&daemon.task(&id).await, "reclaimed").iter().filter(|&&keys| keys > 20).count() == 2
    })
    .await;
    daemon.restart().await;
    let before: u64 = freed(&cluster).await.iter().sum();
    assert!(before < 1_500, "the kill was in the middle: {before}");
    daemon.hurry(&id).await;
    let task = daemon.until(&id, "succeeded").await;
    cluster.assert_only(&live).await;
    let counted = task["reclaimed"].as_u64().expect("a number");
    let least = 1_500 - 2 * UNCOUNTED;
    assert!((least..=1_500).contains(&counted), "{counted}: {task:#}");
    assert_eq!(by_shard(&task, "restarts"), [0; MASTERS], "the same processes: from the same cursors");
    assert_eq!(shards(&task).len(), MASTERS);
    assert_eq!(daemon.history("sessions").await["count"], 1);
}

#[tokio::test]
async fn a_master_behind_a_sentinel_is_found_again_after_a_kill() {
    let master = Server::start().await;
    let keys = Keyspace::of(&master, 0);
    keys.expired(500, "expired:").await;
    keys.live_ttl(1_500, "live:").await;
    let monitor = format!("main 127.0.0.1 {} 1", master.port());
    let sentinel = Server::options().with_arg("--sentinel").with_config("sentinel monitor", &monitor).start().await;
    let url = format!("redis+sentinel://{}/main", sentinel.addr());
    let mut daemon = Daemon::start(&instance("sessions", &url, SLOW)).await;
    let id = daemon.scan("sessions").await;
    probe("it has freed something", PATIENCE, async || daemon.task(&id).await["reclaimed"] != json!(0)).await;
    daemon.restart().await;
    daemon.hurry(&id).await;
    let task = daemon.until(&id, "succeeded").await;
    assert_eq!((master.expired_keys().await, keys.dbsize().await), (500, 1_500));
    let counted = task["reclaimed"].as_u64().expect("a number");
    assert!((500 - UNCOUNTED..=500).contains(&counted), "{task:#}");
    assert_eq!(task["target"], url);
}
