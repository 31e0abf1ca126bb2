//! Masters behind real sentinels, and standalone servers that change their role.

use crate::support::{
    PATIENCE,
    keyspace::Keyspace,
    probe,
    run::{Running, scan},
    server::{self, Options, Server, until_copied},
};

/// Slow enough for a test to act during the sweep.
const SLOW: [&str; 2] = ["--max-keys-per-sec", "3000"];

/// How many sentinels there are, and how many must agree.
const SENTINELS: usize = 3;
const QUORUM: usize = 2;

/// A master, its replica, and sentinels that watch them under the name `main`.
struct Watched {
    master: Server,
    replica: Server,
    sentinels: Vec<Server>,
}

impl Watched {
    async fn start(sentinel_options: Options) -> Self {
        let (master, replica) = pair().await;
        let mut sentinels = Vec::new();
        for _ in 0..SENTINELS {
            let monitor = format!("main 127.0.0.1 {} {QUORUM}", master.port());
            let options = sentinel_options
                .clone()
                .with_arg("--sentinel")
                .with_config("sentinel monitor", &monitor)
                .with_config("sentinel down-after-milliseconds", "main 1000")
                .with_config("sentinel failover-timeout", "main 10000");
            sentinels.push(options.start().await);
        }
        let watched = Self { master, replica, sentinels };
        probe("every sentinel knows the others and the replica", PATIENCE, async || {
            for sentinel in &watched.sentinels {
                let fields: std::collections::HashMap<String, String> =
                    sentinel.query(&["SENTINEL", "MASTER", "main"]).await;
                if fields["num-other-sentinels"] != (SENTINELS - 1).to_string() || fields["num-slaves"] != "1" {
                    return false;
                }
            }
            true
        })
        .await;
        watched
    }

    fn url(&self) -> String {
        let addrs: Vec<_> = self.sentinels.iter().map(|sentinel| sentinel.addr().to_string()).collect();
        format!("redis+sentinel://{}/main", addrs.join(","))
    }
}

/// A master and its replica without active expiry.
async fn pair() -> (Server, Server) {
    let (master, replica) = server::pair().await;
    for server in [&master, &replica] {
        server.stop_active_expiry().await;
    }
    (master, replica)
}

/// Checks that the remaining master has no expired key and every live one.
async fn assert_swept(master: &Server, live: u64) {
    let there: Vec<Vec<u8>> = master.query(&["KEYS", "*"]).await;
    assert_eq!((there.len() as u64, master.dbsize(0).await), (live, live));
}

async fn until_promoted(replica: &Server) {
    probe("the replica is promoted", PATIENCE, async || {
        // A promotion may close the connection that asks for it.
        replica.try_query::<String>(&["INFO", "replication"]).await.is_ok_and(|info| info.contains("role:master"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_master_that_sentinels_name_is_swept_exactly() {
    let mut watched = Watched::start(Server::options()).await;
    let keys = Keyspace::of(&watched.master, 0);
    keys.live(500, "live").await;
    keys.expired(3_000, "expired").await;
    let run = scan(&watched.url(), &[]).await.expect(0);
    assert_eq!(run.num(), 3_000);
    assert_eq!(run.shards()[0]["shard"], "main");
    assert_eq!(run.shards()[0]["server"]["addr"], watched.master.addr().to_string());
    assert_swept(&watched.master, 500).await;

    // One sentinel that answers is enough.
    watched.sentinels[0].kill9();
    scan(&watched.url(), &[]).await.expect(0);

    let url = watched.url().replace("/main", "/other");
    let run = scan(&url, &[]).await.expect(3);
    assert!(run.stderr.contains("watches no master named `other`"), "{}", run.stderr);
    assert!(run.stderr.contains("it watches: main"), "{}", run.stderr);
    let url = format!("redis+sentinel://{}/main", watched.master.addr());
    let run = scan(&url, &[]).await.expect(3);
    assert!(run.stderr.contains("is no sentinel"), "{}", run.stderr);
    let (one, another) = (watched.sentinels[1].addr(), watched.sentinels[2].addr());
    let run = scan(&format!("redis://{one},{another}"), &[]).await.expect(3);
    assert!(run.stderr.contains("sentinels are named by redis+sentinel://"), "{}", run.stderr);
    let run = scan(&format!("redis://{one}"), &[]).await.expect(3);
    assert!(run.stderr.contains("this is a sentinel") && run.stderr.contains("redis+sentinel://"), "{}", run.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn sentinels_have_credentials_of_their_own() {
    let watched = Watched::start(Server::options()).await;
    Keyspace::of(&watched.master, 0).expired(1_000, "expired").await;
    // The sentinels and the master have different passwords.
    for sentinel in &watched.sentinels {
        sentinel.cmd(&["ACL", "SETUSER", "watcher", "on", ">spw", "+@all", "~*"]).await;
        sentinel.cmd(&["ACL", "SETUSER", "default", "resetpass", "-@all"]).await;
    }
    watched.master.cmd(&["ACL", "SETUSER", "sweeper", "on", ">mpw", "+@all", "~*"]).await;
    let url = watched.url().replace("redis+sentinel://", "redis+sentinel://sweeper:mpw@");
    let run = scan(&url, &[]).await.expect(3);
    assert!(run.stderr.contains("no node could say who the masters are"), "{}", run.stderr);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, "spw\n").unwrap();
    let own = ["--sentinel-user", "watcher", "--sentinel-password-file", file.path().to_str().unwrap()];
    assert_eq!(scan(&url, &own).await.expect(0).num(), 1_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_that_sentinels_order_is_followed() {
    let watched = Watched::start(Server::options()).await;
    let keys = Keyspace::of(&watched.master, 0);
    keys.live(1_000, "live").await;
    keys.expired(8_000, "expired").await;
    until_copied(&watched.master, &watched.replica).await;
    let running = Running::scan(&watched.url(), &SLOW);
    probe("the pass is under way", PATIENCE, async || watched.master.expired_keys().await > 500).await;
    watched.sentinels[0].cmd(&["SENTINEL", "FAILOVER", "main"]).await;
    until_promoted(&watched.replica).await;
    let run = running.end().await.expect(0);
    let shard = run.shards().remove(0);
    assert_eq!(shard["server"]["addr"], watched.replica.addr().to_string());
    assert!(shard["dbs"][0]["restarts"].as_u64() >= Some(1), "{shard}");
    // The old master keeps its role for seconds: its pass may even end before the promotion is noticed.
    let said = shard["warnings"].to_string();
    assert!(said.contains("is the master now") || said.contains("became the master after"), "{shard}");
    assert_swept(&watched.replica, 1_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_that_dies_is_followed_to_the_one_that_sentinels_promote() {
    let mut watched = Watched::start(Server::options()).await;
    let keys = Keyspace::of(&watched.master, 0);
    keys.live(1_000, "live").await;
    keys.expired(8_000, "expired").await;
    until_copied(&watched.master, &watched.replica).await;
    let running = Running::scan(&watched.url(), &SLOW);
    probe("the pass is under way", PATIENCE, async || watched.master.expired_keys().await > 500).await;
    watched.master.kill9();
    let run = running.end().await.expect(0);
    assert_eq!(run.shards()[0]["server"]["addr"], watched.replica.addr().to_string());
    assert_swept(&watched.replica, 1_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standalone_server_that_becomes_a_replica_stops_the_sweep() {
    let (master, replica) = pair().await;
    Keyspace::of(&master, 0).expired(8_000, "expired").await;
    let running = Running::scan(&master.url(), &SLOW);
    probe("the pass is under way", PATIENCE, async || master.expired_keys().await > 500).await;
    replica.cmd(&["REPLICAOF", "NO", "ONE"]).await;
    master.cmd(&["REPLICAOF", "127.0.0.1", &replica.port().to_string()]).await;
    let run = running.end().await.expect(1);
    assert_eq!(run.json()["report"]["failure"]["kind"], "not_a_master");
    assert!(run.stderr.contains(&format!("a replica of {}", replica.addr())), "{}", run.stderr);
    assert!(run.stderr.contains("--follow"), "{}", run.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standalone_server_that_becomes_a_replica_is_followed_where_that_is_wanted() {
    let (master, replica) = pair().await;
    let keys = Keyspace::of(&master, 0);
    keys.live(1_000, "live").await;
    keys.expired(8_000, "expired").await;
    until_copied(&master, &replica).await;
    let running = Running::scan(&master.url(), &[&SLOW[..], &["--follow"]].concat());
    probe("the pass is under way", PATIENCE, async || master.expired_keys().await > 500).await;
    replica.cmd(&["REPLICAOF", "NO", "ONE"]).await;
    master.cmd(&["REPLICAOF", "127.0.0.1", &replica.port().to_string()]).await;
    let run = running.end().await.expect(0);
    assert_eq!(run.shards()[0]["server"]["addr"], replica.addr().to_string());
    assert!(run.shards()[0]["dbs"][0]["restarts"].as_u64() >= Some(1));
    assert_swept(&replica, 1_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_in_the_url_leads_to_its_master_where_that_is_wanted() {
    let (master, replica) = pair().await;
    Keyspace::of(&master, 0).expired(1_000, "expired").await;
    let refused = scan(&replica.url(), &[]).await.expect(3);
    assert_eq!(refused.json()["report"]["failure"]["kind"], "not_a_master");
    assert_eq!(scan(&replica.url(), &["--follow"]).await.expect(0).num(), 1_000);
    assert_eq!(master.dbsize(0).await, 0);
}
