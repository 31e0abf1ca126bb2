//! The count is exact, every expired key is freed, and nothing else is touched.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::test_runner::{Config, TestRunner};

use crate::support::{
    PATIENCE,
    keyspace::{Keyspace, Life, assert_same_live},
    probe,
    run::{Running, run, scan},
    server::Server,
};

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_dbs_of_all_types_lose_their_expired_keys_and_nothing_else() {
    let server = Server::start().await;
    let (mut before, mut expired) = (BTreeMap::new(), 0);
    for db in 0..16 {
        let keys = Keyspace::of(&server, db);
        keys.zoo(60, "", Life::Forever, u64::from(db)).await;
        keys.zoo(60, "long", Life::Long, 100 + u64::from(db)).await;
        // One DB has no expired keys, and is swept as well.
        let n = 13 * u64::from(db);
        keys.zoo(n, "expired", Life::Expired, 200 + u64::from(db)).await;
        expired += n;
    }
    for db in 0..16 {
        before.insert(db, Keyspace::of(&server, db).snapshot_live().await);
    }
    let run = scan(&server.url(), &[]).await.expect(0);
    assert_eq!(run.num(), expired);
    assert_eq!(server.expired_keys().await, expired);
    let json = run.json();
    let dbs = json["report"]["shards"][0]["dbs"].as_array().unwrap();
    for db in 0..16 {
        assert_eq!(dbs[db as usize]["reclaimed"], 13 * db, "db{db}");
        assert_eq!(server.dbsize(db).await, 120, "db{db}");
        assert_same_live(&before[&db], &Keyspace::of(&server, db).snapshot_live().await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_server_is_swept_with_success() {
    let server = Server::start().await;
    let run = scan(&server.url(), &[]).await.expect(0);
    assert_eq!((run.num(), run.json()["status"].as_str()), (0, Some("success")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_db_without_ttls_is_left_alone_unless_it_is_named() {
    let server = Server::start().await;
    Keyspace::of(&server, 2).live(50, "k").await;
    let scanned = |run: crate::support::run::Run| run.total("scanned");
    assert_eq!(scanned(scan(&server.url(), &[]).await.expect(0)), 0.0);
    assert_eq!(scanned(scan(&server.url(), &["--db", "2"]).await.expect(0)), 50.0);
    let named_by_url = format!("{}/2", server.url().trim_end_matches('/'));
    assert_eq!(scanned(scan(&named_by_url, &[]).await.expect(0)), 50.0);
}

/// Writes, overwrites and deletes its own keys until it is told to stop. None of them expires.
async fn write_until(server: &Server, stop: Arc<AtomicBool>) -> tokio::task::JoinHandle<u64> {
    let mut conn = server.conn().await;
    tokio::spawn(async move {
        let mut round = 0_u64;
        while !stop.load(Ordering::Relaxed) {
            let mut pipeline = redis::pipe();
            for i in 0..100_u64 {
                let key = format!("w{}", (round * 37 + i) % 5000);
                match i % 4 {
                    0 => pipeline.cmd("SET").arg(&key).arg(i).ignore(),
                    1 => pipeline.cmd("SET").arg(&key).arg(i).arg("EX").arg(3600).ignore(),
                    2 => pipeline.cmd("DEL").arg(&key).ignore(),
                    _ => pipeline.cmd("PERSIST").arg(&key).ignore(),
                };
            }
            let written: redis::RedisResult<()> = pipeline.query_async(&mut conn).await;
            written.expect("the writer writes");
            round += 1;
        }
        round
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_count_is_exact_while_other_clients_write() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(10_000, "live").await;
    keys.expired(7_000, "expired").await;
    let stop = Arc::new(AtomicBool::new(false));
    let writers = [write_until(&server, stop.clone()).await, write_until(&server, stop.clone()).await];
    let run = scan(&server.url(), &["--max-keys-per-sec", "20000"]).await.expect(0);
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        assert!(writer.await.unwrap() > 10, "it wrote all the while");
    }
    assert_eq!(run.num(), 7_000);
    assert_eq!(server.expired_keys().await, 7_000);
}

/// A full server evicts keys, expired or live, before any command, also between the commands of one batch.
#[tokio::test(flavor = "multi_thread")]
async fn keys_that_are_evicted_within_a_batch_are_not_counted_as_freed() {
    for more in [["--touch", "auto"], ["--touch", "exists"], ["--payload", "none"]] {
        let server = Server::start().await;
        let keys = Keyspace::of(&server, 0);
        keys.live(60_000, "live").await;
        keys.expired(30_000, "expired").await;
        let used = server.info_number("memory", "used_memory").await;
        server.cmd(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]).await;
        server.cmd(&["CONFIG", "SET", "maxmemory", &(used + 200_000).to_string()]).await;
        let running = Running::scan(&server.url(), &[more[0], more[1], "--max-keys-per-sec", "20000", "--no-throttle"]);
        probe("the sweep has freed some", PATIENCE, async || server.expired_keys().await > 100).await;
        let stop = Arc::new(AtomicBool::new(false));
        let mut conn = server.conn().await;
        let writing = stop.clone();
        let writer = tokio::spawn(async move {
            let value = "x".repeat(100);
            for first in (0_u64..).step_by(200) {
                if writing.load(Ordering::Relaxed) {
                    break;
                }
                let mut pipeline = redis::pipe();
                for i in first..first + 200 {
                    pipeline.cmd("SET").arg(format!("new{i}")).arg(&value).ignore();
                }
                let written: redis::RedisResult<()> = pipeline.query_async(&mut conn).await;
                written.expect("the writer writes");
            }
        });
        let run = running.end().await.expect(0);
        stop.store(true, Ordering::Relaxed);
        writer.await.unwrap();
        let (freed, evicted) = (server.expired_keys().await, server.info_number("stats", "evicted_keys").await);
        assert!(freed > 100 && evicted > 100, "{more:?}: {freed} freed, {evicted} evicted");
        assert_eq!(run.num(), freed, "{more:?}, {evicted} evicted meanwhile");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_expired_key_survives_a_table_that_grows_and_shrinks_during_the_pass() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(3_000, "live").await;
    keys.expired(3_000, "expired").await;
    let running = Running::scan(&server.url(), &["--max-keys-per-sec", "4000", "--count", "10"]);
    probe("the pass has begun", PATIENCE, async || server.expired_keys().await > 100).await;
    // The table is doubled four times, and shrinks again.
    keys.live(50_000, "more").await;
    let grown = server.expired_keys().await;
    let mut conn = server.conn().await;
    for first in (0..50_000).step_by(1000) {
        let mut pipeline = redis::pipe();
        for i in first..first + 1000 {
            pipeline.cmd("DEL").arg(format!("more{i}")).ignore();
        }
        let deleted: redis::RedisResult<()> = pipeline.query_async(&mut conn).await;
        deleted.expect("the keys are deleted");
    }
    assert!(grown < 3_000, "the pass was under way while the table grew");
    let run = running.end().await.expect(0);
    assert_eq!(run.num(), 3_000);
    assert_eq!(server.dbsize(0).await, 3_000);
}

#[test]
fn any_keyspace_is_swept_exactly() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(Server::start());
    let mut runner = TestRunner::new(Config { cases: 12, failure_persistence: None, ..Config::default() });
    let strategy = (0..400_u64, 0..400_u64, 0..700_u64, 0..16_u32, 10..300_u32, 0_u64..);
    runner
        .run(&strategy, |(forever, long, expired, db, count, seed)| {
            runtime.block_on(async {
                server.cmd(&["FLUSHALL"]).await;
                let before_expired = server.expired_keys().await;
                let keys = Keyspace::of(&server, db);
                keys.zoo(forever, "f", Life::Forever, seed).await;
                keys.zoo(long, "l", Life::Long, seed ^ 1).await;
                keys.zoo(expired, "d", Life::Expired, seed ^ 2).await;
                let before = keys.snapshot_live().await;
                let run =
                    scan(&server.url(), &["--db", &db.to_string(), "--count", &count.to_string()]).await.expect(0);
                assert_eq!(run.num(), expired);
                assert_eq!(server.expired_keys().await - before_expired, expired);
                assert_same_live(&before, &keys.snapshot_live().await);
            });
            Ok(())
        })
        .unwrap();
}

/// One field of OBJECT for each live key, such as its idle time.
async fn object(server: &Server, field: &str, n: u64) -> Vec<u64> {
    let mut values = Vec::new();
    for i in 0..n {
        values.push(server.query(&["OBJECT", field, &format!("live{i}")]).await);
    }
    values
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_does_not_count_as_a_use_of_a_key_for_lru() {
    let server = Server::options().with_config("maxmemory-policy", "allkeys-lru").start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(100, "live").await;
    keys.expired(100, "expired").await;
    // The LRU clock ticks in seconds: wait until every key was idle for two.
    probe("keys are idle", PATIENCE, async || object(&server, "IDLETIME", 1).await[0] >= 2).await;
    scan(&server.url(), &[]).await.expect(0);
    let idle = object(&server, "IDLETIME", 100).await;
    assert!(idle.iter().all(|&seconds| seconds >= 2), "{idle:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_does_not_count_as_a_use_of_a_key_for_lfu() {
    let policy = ("maxmemory-policy", "allkeys-lfu");
    // Every use counts at once, and the counter does not decay.
    let server = Server::options()
        .with_config(policy.0, policy.1)
        .with_config("lfu-log-factor", "0")
        .with_config("lfu-decay-time", "0")
        .start()
        .await;
    let keys = Keyspace::of(&server, 0);
    keys.live(100, "live").await;
    keys.expired(100, "expired").await;
    let before = object(&server, "FREQ", 100).await;
    scan(&server.url(), &[]).await.expect(0);
    assert_eq!(object(&server, "FREQ", 100).await, before);
    server.cmd(&["GET", "live0"]).await;
    assert_ne!(object(&server, "FREQ", 1).await[0], before[0], "a use would have shown");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_commands_that_we_promise_are_sent() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(2_000, "live").await;
    keys.expired(1_000, "expired").await;
    for (touch, allowed) in [("none", None), ("auto", Some("exists")), ("ttl", Some("ttl")), ("exists", Some("exists"))]
    {
        server.cmd(&["CONFIG", "RESETSTAT"]).await;
        scan(&server.url(), &["--touch", touch]).await.expect(0);
        let stats = server.info("commandstats").await;
        for command in stats.keys().filter_map(|field| field.strip_prefix("cmdstat_")) {
            let ours = ["scan", "dbsize", "info", "ping", "select", "client|setname", "client"];
            // Commands of the test's own connections.
            let tests = ["config|resetstat", "config", "client|setinfo", "hello"];
            let known = ours.contains(&command) || tests.contains(&command) || Some(command) == allowed;
            assert!(known, "touch {touch} sent {command}");
        }
    }
}

#[tokio::test]
async fn memory_that_stays_with_the_process_is_told_and_what_helps() {
    let server = Server::start().await;
    server.stop_active_expiry().await;
    let mut conn = server.conn().await;
    let value = "x".repeat(300);
    // Each page has live keys as well as keys that expire.
    for chunk in 0..30 {
        let mut pipeline = redis::pipe();
        for n in 0..1_000 {
            let name = format!("{chunk}:{n}");
            pipeline.cmd("SET").arg(format!("live:{name}")).arg(&value).ignore();
            pipeline.cmd("SET").arg(format!("expired:{name}")).arg(&value).arg("PX").arg(1).ignore();
        }
        let written: redis::RedisResult<()> = pipeline.query_async(&mut conn).await;
        written.expect("the keys are written");
    }
    let swept = run(["scan", &server.url()]).await.expect(0);
    assert!(swept.stdout.contains("30,000 expired keys reclaimed"), "{swept:#?}");
    assert!(swept.stdout.contains("resident memory: ") && swept.stdout.contains("MEMORY PURGE"), "{swept:#?}");
    assert_eq!(server.dbsize(0).await, 30_000);
}
