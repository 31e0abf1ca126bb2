//! Failures of servers and networks, provoked on real ones.

use std::time::Duration;

use crate::support::{
    PATIENCE,
    keyspace::Keyspace,
    probe,
    proxy::{Mode, Proxy},
    run::{Running, scan, scan_under_way},
    server::Server,
};

/// Slow enough for a test to act during the sweep.
const SLOW: [&str; 2] = ["--max-keys-per-sec", "1500"];

/// A slow sweep that is under way.
async fn under_way(server: &Server, url: &str, more: &[&str]) -> Running {
    scan_under_way(server, url, &[&SLOW[..], more].concat(), 300).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_connection_is_made_again_and_the_sweep_goes_on_from_the_last_cursor() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(1_000, "live").await;
    keys.expired(4_000, "expired").await;
    let proxy = Proxy::start(server.addr()).await;
    let running = under_way(&server, &proxy.url(), &[]).await;
    for _ in 0..3 {
        proxy.cut_until_back(&server).await;
    }
    let run = running.end().await.expect(0);
    assert_eq!(server.dbsize(0).await, 1_000);
    assert_eq!(server.expired_keys().await, 4_000);
    // The count of a lost reply is lost; the report says how many replies those were.
    let lost = run.total("lost_replies") as u64;
    assert!(lost <= 3 && run.num() <= 4_000 && run.num() + lost * 1_000 >= 4_000, "{} {lost}", run.num());
    if lost == 0 {
        assert_eq!(run.num(), 4_000);
    }
    assert!(run.held("reconnecting") > 0.0);
    assert_eq!(run.json()["report"]["shards"][0]["dbs"][0]["restarts"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stays_away_fails_the_sweep_after_the_time_given() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(4_000, "expired").await;
    let proxy = Proxy::start(server.addr()).await;
    let running = under_way(&server, &proxy.url(), &["--retry-for", "500ms"]).await;
    proxy.refuse().await;
    proxy.cut().await;
    let run = running.end().await.expect(1);
    assert!(run.stderr.contains("tried again for 500ms"), "{}", run.stderr);
    assert_eq!(run.json()["status"], "failed");
    assert!(run.num() > 300);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_gets_a_pass_from_the_beginning() {
    let mut server = Server::start().await;
    Keyspace::of(&server, 0).expired(4_000, "expired").await;
    let running = under_way(&server, &server.url(), &[]).await;
    server.restart().await;
    let run = running.end().await.expect(0);
    assert_eq!(run.json()["report"]["shards"][0]["dbs"][0]["restarts"], 1);
    let warnings = run.json()["report"]["shards"][0]["warnings"].to_string();
    assert!(warnings.contains("began again: the server was restarted"), "{warnings}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_server_is_waited_for() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(3_000, "expired").await;
    let running = under_way(&server, &server.url(), &["--response-timeout", "2s", "--connect-timeout", "2s"]).await;
    server.sigstop();
    running.says("holding: the connection was lost").await;
    server.sigcont();
    let run = running.end().await.expect(0);
    assert_eq!(server.expired_keys().await, 3_000);
    assert!(run.held("reconnecting") > 0.0);
}

/// CLIENT PAUSE ... WRITE exists from 6.2 on.
async fn pause(server: &Server) {
    server.cmd(&["CLIENT", "PAUSE", "600000", "WRITE"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_a_paused_server_only_hides_are_never_reported_as_done() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(1_000, "live").await;
    keys.expired(4_000, "expired").await;
    pause(&server).await;
    let running = Running::scan(&server.url(), &[]);
    running.says("holding: the server hides expired keys").await;
    assert_eq!(server.expired_keys().await, 0);
    server.cmd(&["CLIENT", "UNPAUSE"]).await;
    let run = running.end().await.expect(0);
    assert_eq!(run.num(), 4_000);
    assert!(run.held("deletion_blocked") > 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_in_the_middle_hides_nothing_from_the_sweep() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(4_000, "live").await;
    keys.expired(1_000, "expired").await;
    let running = under_way(&server, &server.url(), &["--count", "20"]).await;
    pause(&server).await;
    running.says("holding: the server hides expired keys").await;
    server.cmd(&["CLIENT", "UNPAUSE"]).await;
    assert_eq!(running.end().await.expect(0).num(), 1_000);
    assert_eq!(server.dbsize(0).await, 4_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handful_of_hidden_keys_in_one_batch_is_noticed_too() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(3, "live").await;
    keys.expired(2, "expired").await;
    pause(&server).await;
    let running = Running::scan(&server.url(), &[]);
    running.says("holding: the server hides expired keys").await;
    server.cmd(&["CLIENT", "UNPAUSE"]).await;
    assert_eq!(running.end().await.expect(0).num(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_that_outlasts_the_time_allowed_is_a_failure() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(1_000, "expired").await;
    pause(&server).await;
    let run = scan(&server.url(), &["--timeout", "2s"]).await.expect(4);
    assert_eq!((run.num(), run.json()["status"].as_str()), (0, Some("failed")));
    assert!(run.stderr.contains("the time allowed (2s) was over"), "{}", run.stderr);
    assert!(run.stderr.contains("or see to what held it: the server hides expired keys"), "{}", run.stderr);
    server.cmd(&["CLIENT", "UNPAUSE"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sparse_table_is_not_taken_for_hidden_keys() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(30_000, "gone").await;
    keys.live(50, "live").await;
    keys.expired(50, "expired").await;
    // While a child process runs, the table is not resized.
    let resized = server.try_query::<String>(&["DEBUG", "DICT-RESIZING", "0"]).await.is_ok();
    let mut conn = server.conn().await;
    let mut pipeline = redis::pipe();
    for i in 0..30_000 {
        pipeline.cmd("DEL").arg(format!("gone{i}")).ignore();
    }
    let deleted: redis::RedisResult<()> = pipeline.query_async(&mut conn).await;
    deleted.expect("the keys are deleted");
    let run = scan(&server.url(), &[]).await.expect(0);
    assert_eq!(run.num(), 50, "resizing stopped: {resized}");
    assert_eq!(run.held("deletion_blocked"), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_refused_and_its_master_named() {
    let (master, replica) = (Server::start().await, Server::start().await);
    replica.replica_of(&master).await;
    let run = scan(&replica.url(), &[]).await.expect(3);
    assert!(run.stderr.contains(&format!("redis://127.0.0.1:{}", master.port())), "{}", run.stderr);
    let failure = &run.json()["report"]["failure"];
    assert_eq!((failure["kind"].as_str(), failure["error_code"].as_str()), (Some("not_a_master"), Some("DCS.4818")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_that_becomes_a_replica_ends_the_sweep_with_the_reason() {
    let (server, other) = (Server::start().await, Server::start().await);
    Keyspace::of(&server, 0).expired(4_000, "expired").await;
    let running = under_way(&server, &server.url(), &[]).await;
    server.cmd(&["REPLICAOF", "127.0.0.1", &other.port().to_string()]).await;
    let run = running.end().await.expect(1);
    assert_eq!(run.json()["report"]["failure"]["kind"], "not_a_master");
    assert!(run.num() > 300);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_loads_its_data_is_waited_for() {
    // While it loads, a server answers its clients every two megabytes.
    let server = Server::options().with_config("rdbcompression", "no").start().await;
    let value = "v".repeat(3 << 20);
    for i in 0..10 {
        server.cmd(&["SET", &format!("k{i}"), &value]).await;
    }
    server.cmd(&["CONFIG", "SET", "key-load-delay", "200000"]).await;
    let mut conn = server.conn().await;
    let reload = tokio::spawn(async move {
        let words = redis::cmd("DEBUG").arg("RELOAD").to_owned();
        let _: redis::RedisResult<redis::Value> = words.query_async(&mut conn).await;
    });
    probe("it loads", PATIENCE, async || server.info("persistence").await["loading"] == "1").await;
    let running = Running::scan(&server.url(), &["--db", "0"]);
    running.says("holding: the server is loading").await;
    let run = running.end().await.expect(0);
    assert_eq!(run.total("scanned"), 10.0);
    reload.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_that_keeps_the_server_busy_is_waited_for() {
    let server = Server::options().with_config("lua-time-limit", "50").start().await;
    Keyspace::of(&server, 0).expired(3_000, "expired").await;
    let running = under_way(&server, &server.url(), &[]).await;
    let mut conn = server.conn().await;
    let script = tokio::spawn(async move {
        let words = redis::cmd("EVAL").arg("while true do end").arg(0).to_owned();
        let _: redis::RedisResult<redis::Value> = words.query_async(&mut conn).await;
    });
    running.says("holding: a script keeps the server busy").await;
    server.cmd(&["SCRIPT", "KILL"]).await;
    let run = running.end().await.expect(0);
    assert_eq!(run.num(), 3_000);
    assert!(run.held("busy") > 0.0);
    script.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_time_allowed_ends_the_sweep_and_what_was_freed_stays_counted() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(20_000, "expired").await;
    let run = scan(&server.url(), &["--timeout", "1s", "--max-keys-per-sec", "2000"]).await.expect(4);
    assert_eq!(run.num(), server.expired_keys().await);
    assert!((1..6_000).contains(&run.num()), "{}", run.num());
    assert!(run.json()["finished_at"].is_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_hangs_if_a_peer_does_not_answer() {
    let server = Server::start().await;
    let proxy = Proxy::start(server.addr()).await;
    proxy.set(Mode::Stall);
    let begun = std::time::Instant::now();
    let run = scan(&proxy.url(), &["--connect-timeout", "1s"]).await.expect(3);
    assert!(begun.elapsed() < Duration::from_secs(10), "{run:?}");
    assert!(run.stderr.contains("did not answer the first command within 1s"), "{}", run.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_redis_reply_end_in_a_clear_error() {
    let server = Server::start().await;
    for garbage in
        [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], b"$99999999999999\r\n", b"*1000000000\r\n", b"\x16\x03\x01"]
    {
        let proxy = Proxy::start(server.addr()).await;
        proxy.garbage(garbage);
        let run = scan(&proxy.url(), &[]).await.expect(3);
        assert!(run.stderr.contains("not a valid reply"), "{}", run.stderr);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_db_that_does_not_exist_is_a_usage_error() {
    let server = Server::start().await;
    let run = scan(&server.url(), &["--db", "999"]).await.expect(2);
    assert!(run.stderr.contains("DB index is out of range"), "{}", run.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_huge_key_is_freed_within_the_sweep_whatever_time_that_takes() {
    let server = Server::options().with_config("lazyfree-lazy-expire", "no").start().await;
    server.stop_active_expiry().await;
    let script = "for i = 1, 400 do local m = {} for j = 1, 1000 do m[j] = i * 1000 + j end \
                  redis.call('SADD', KEYS[1], unpack(m)) end return redis.call('PEXPIRE', KEYS[1], 100)";
    server.cmd(&["EVAL", script, "1", "huge"]).await;
    probe("the key has expired", PATIENCE, async || is_hidden(&server).await).await;
    assert_eq!(server.dbsize(0).await, 1);
    assert_eq!(scan(&server.url(), &[]).await.expect(0).num(), 1);
    assert_eq!(server.dbsize(0).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_save_refuses_ping_and_is_swept_all_the_same() {
    let server = Server::options().with_config("save", "3600 100000000").start().await;
    Keyspace::of(&server, 0).expired(500, "expired").await;
    // No snapshot on disk can restore it.
    std::fs::create_dir(server.dir().join("dump.rdb")).expect("a folder");
    server.cmd(&["BGSAVE"]).await;
    probe("PING is refused", PATIENCE, async || {
        server.try_query::<String>(&["PING"]).await.is_err_and(|error| error.code() == Some("MISCONF"))
    })
    .await;
    assert_eq!(scan(&server.url(), &[]).await.expect(0).num(), 500);
    assert_eq!(server.dbsize(0).await, 0);
}

/// KEYS hides expired keys and frees none.
async fn is_hidden(server: &Server) -> bool {
    server.query::<Vec<String>>(&["KEYS", "*"]).await.is_empty()
}
