//! Clusters that not every server supports: several DBs, slots that move as a whole, host names, nodes that do not know their
//! address.

use redis::Value;
use serde_json::json;

use crate::support::cluster::{Cluster, node_id};
use crate::support::run::{Run, Running, scan};
use crate::support::server::{Kind, Server, Version};
use crate::support::{PATIENCE, probe, run::run, skipped};

/// Whether the server under test has the features of this version of Valkey; if not, the test is reported as skipped.
fn since_valkey(version: Version, what: &str) -> bool {
    let can = Server::kind() == Kind::Valkey && Server::version() >= version;
    if !can {
        skipped(&format!("this server knows no {what}"));
    }
    can
}

/// Writes `of_each` keys that expire at once into a DB of each master.
async fn write_expired(cluster: &Cluster, db: u32, of_each: usize) {
    for node in &cluster.nodes {
        let mut conn = node.conn_to(db).await;
        let mut written = 0;
        for n in 0.. {
            let mut set = redis::cmd("SET");
            // Keys of other masters are refused with MOVED.
            if set.arg(format!("expired:{n}")).arg("x").arg("PX").arg(1).query_async::<()>(&mut conn).await.is_ok() {
                written += 1;
            }
            if written == of_each {
                break;
            }
        }
    }
}

fn addresses(run: &Run) -> Vec<String> {
    let report = run.json();
    let shards = report["report"]["shards"].as_array().expect("shards");
    shards.iter().map(|shard| shard["server"]["addr"].as_str().expect("an address").to_owned()).collect()
}

fn bulk(text: &str) -> Value {
    Value::BulkString(text.into())
}

/// The masters' endpoints in CLUSTER SLOTS of the first node.
async fn endpoints(cluster: &Cluster) -> Vec<Value> {
    let ranges: Vec<(u16, u16, Vec<Value>)> = cluster.nodes[0].query(&["CLUSTER", "SLOTS"]).await;
    ranges.into_iter().map(|(_, _, mut master)| master.swap_remove(0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_db_of_a_cluster_with_several_is_swept_and_counted() {
    if !since_valkey(Version(9, 0, 0), "cluster with several DBs") {
        return;
    }
    let cluster = Cluster::start_as(2, Server::options().with_config("cluster-databases", "16")).await;
    let live = cluster.fill(500, 0).await;
    write_expired(&cluster, 0, 300).await;
    write_expired(&cluster, 3, 700).await;
    let found = run(["check", &cluster.url(), "--json"]).await.json();
    let dbs = |shard: usize| found["shards"][shard]["dbs"].clone();
    assert_eq!((&dbs(0)[1]["db"], &dbs(1)[1]["db"]), (&json!(3), &json!(3)), "{found:#}");
    let run = scan(&cluster.url(), &[]).await.expect(0);
    assert_eq!(run.num(), 2_000);
    cluster.assert_only(&live).await;
    for node in &cluster.nodes {
        assert_eq!(node.dbsize(3).await, 0);
    }
    let beyond = scan(&cluster.url(), &["--db", "20"]).await.expect(2);
    assert!(beyond.stderr.contains("cluster-databases"), "{}", beyond.stderr);
    assert!(!beyond.stderr.contains("DB 0 only"), "{}", beyond.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_that_move_as_a_whole_during_the_sweep_are_swept_where_they_went() {
    if !since_valkey(Version(9, 0, 0), "CLUSTER MIGRATESLOTS") {
        return;
    }
    let cluster = Cluster::start(2, false).await;
    let live = cluster.fill(2_000, 8_000).await;
    let slow = ["--max-keys-per-sec", "2000", "--max-slice", "1ms"];
    let mut running = Running::scan(&cluster.url(), &slow);
    probe("the first is done, the second under way", PATIENCE, async || cluster.freed_by(1).await > 100).await;
    let target = node_id(&cluster.nodes[0]).await;
    cluster.nodes[1].cmd(&["CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", "15000", "16383", "NODE", &target]).await;
    probe("the slots have moved", PATIENCE, async || cluster.owners().await[15_000..].iter().all(|owner| *owner == 0))
        .await;
    assert!(running.is_running(), "the slots moved while it swept");
    let run = running.end().await.expect(0);
    let report = run.json().to_string();
    assert!(report.contains("the slots 15000-16383 came to"), "{report}");
    cluster.until_agreed().await;
    let freed = cluster.freed_by(0).await + cluster.freed_by(1).await;
    assert_eq!(run.num(), freed, "{}", run.stdout);
    cluster.assert_only(&live).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_announce_host_names_or_no_endpoint_at_all_are_reached() {
    if Server::kind() == Kind::Redis && Server::version() < Version(7, 0, 0) {
        return skipped("this server announces no host name");
    }
    // The announced names, the preferred kind, the answer of CLUSTER SLOTS, and where the sweep connects.
    let forms = [
        ("localhost", "hostname", bulk("localhost"), "localhost"),
        ("\"\"", "hostname", bulk("?"), "127.0.0.1"),
        ("localhost", "unknown-endpoint", Value::Nil, "127.0.0.1"),
    ];
    for (announced, preferred, said, host) in forms {
        let options = Server::options()
            .with_config("cluster-announce-hostname", announced)
            .with_config("cluster-preferred-endpoint-type", preferred);
        let cluster = Cluster::start_as(2, options).await;
        let live = cluster.fill(200, 1_000).await;
        assert_eq!(endpoints(&cluster).await, [said.clone(), said.clone()], "{preferred}");
        let run = scan(&cluster.url(), &[]).await.expect(0);
        assert_eq!(run.num(), 1_000, "{preferred}, {said:?}");
        cluster.assert_only(&live).await;
        let expected: Vec<String> = cluster.nodes.iter().map(|node| format!("{host}:{}", node.port())).collect();
        assert_eq!(addresses(&run), expected, "{preferred}, {said:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_node_that_does_not_know_its_own_address_is_swept() {
    let cluster = Cluster::start(1, false).await;
    let live = cluster.fill(200, 1_000).await;
    assert_eq!(endpoints(&cluster).await, [bulk("")]);
    let run = scan(&cluster.url(), &[]).await.expect(0);
    assert_eq!(run.num(), 1_000);
    cluster.assert_only(&live).await;
    assert_eq!(addresses(&run), [cluster.nodes[0].addr().to_string()]);
}
