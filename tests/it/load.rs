//! A sweep gives way: each hold is provoked on a real server, reported with its reason, and ends by itself.

use std::time::Duration;

use serde_json::json;

use crate::support::daemon::{Daemon, instance};
use crate::support::keyspace::{Keyspace, filled};
use crate::support::proxy::{Mode, Proxy};
use crate::support::run::{Run, Running, run, scan, scan_under_way, state_file};
use crate::support::server::{Kind, Server, Version};
use crate::support::{PATIENCE, probe, skipped};

/// Slow enough for a test to act during the sweep, with a pass too short for the guard.
const SLOW: [&str; 2] = ["--max-keys-per-sec", "1500"];

/// A replica that is online, and the proxy between it and its master.
async fn replica_behind_proxy(master: &Server) -> (Server, Proxy) {
    let (replica, proxy) = (Server::start().await, Proxy::start(master.addr()).await);
    let port = proxy.addr().port().to_string();
    replica.cmd(&["REPLICAOF", "127.0.0.1", &port]).await;
    probe("the replica is online", PATIENCE, async || {
        let line = master.info("replication").await.get("slave0").cloned();
        line.is_some_and(|line| line.contains("state=online"))
    })
    .await;
    (replica, proxy)
}

/// Before 7.2, active expiry does not walk in the order of SCAN.
fn slow_sweeps_harm() -> bool {
    Server::version() >= Version(7, 2, 0) || Server::kind() == Kind::Valkey
}

/// A slow sweep with more arguments that is under way.
async fn under_way(server: &Server, more: &[&str]) -> Running {
    scan_under_way(server, &server.url(), &[&SLOW[..], more].concat(), 300).await
}

/// Waits for the end of the sweep, and checks that it held for this reason and freed this many keys.
async fn ends(running: Running, reason: &str, freed: u64) {
    let run = running.end().await.expect(0);
    assert!(run.held(reason) > 0.0, "{}", run.stdout);
    assert_eq!(run.num(), freed);
}

/// The sum of the four times in the report.
fn time_told(run: &Run) -> f64 {
    ["active_s", "waited_s", "rested_s", "held_s"].iter().map(|time| run.total(time)).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn active_waited_rested_and_held_add_up_to_the_time_taken_however_a_sweep_ends() {
    let server = filled(0, 20_000).await;
    let over = scan(&server.url(), &["--max-keys-per-sec", "100", "--timeout", "4s"]).await.expect(4);
    let hint = over.json()["report"]["failure"]["hint"].clone();
    assert_eq!(
        hint,
        "it rested most of the time: raise --max-keys-per-sec or --intensity, or allow more with --timeout"
    );
    let held = Running::scan(&server.url(), &["--max-keys-per-sec", "1000", "--max-ops", "1", "--timeout", "6s"]);
    let mut busy = server.conn().await;
    let busy = tokio::spawn(async move {
        loop {
            redis::cmd("PING").exec_async(&mut busy).await.expect("it answers");
        }
    });
    let held = held.end().await.expect(4);
    busy.abort();
    let begun = std::time::Instant::now();
    let interrupted = under_way(&server, &[]).await;
    let freed = server.expired_keys().await;
    probe("about a second of it", PATIENCE, async || server.expired_keys().await > freed + 2_000).await;
    interrupted.signal("INT");
    let interrupted = interrupted.end().await.expect(130);
    // The interrupted record has no duration; this one includes the start of the program.
    let (told, taken) = (time_told(&interrupted), begun.elapsed().as_secs_f64());
    assert!((0.9..=taken).contains(&told), "interrupted: {taken} s, {told} s told: {}", interrupted.stdout);
    let complete = scan(&server.url(), &["--max-keys-per-sec", "5000"]).await.expect(0);
    for (run, what) in [(over, "over"), (held, "held"), (complete, "complete")] {
        let (taken, told) = (run.total("elapsed_s"), time_told(&run));
        // The first connection and the last record are not part of the sweep, and take long on a busy machine.
        assert!((taken - told).abs() <= taken * 0.01 + 0.15, "{what}: {taken} s, {told} s told: {}", run.stdout);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stood_still_holds_the_sweep_for_its_latency() {
    let server = filled(0, 6_000).await;
    let running = under_way(&server, &[]).await;
    server.cmd(&["DEBUG", "SLEEP", "0.6"]).await;
    ends(running, "latency", 6_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_that_saves_holds_the_sweep_until_it_is_done() {
    let server = filled(0, 6_000).await;
    Keyspace::of(&server, 0).live(4_000, "live").await;
    let running = under_way(&server, &[]).await;
    // A millisecond for each key: seconds in all.
    server.cmd(&["CONFIG", "SET", "rdb-key-save-delay", "300"]).await;
    server.cmd(&["BGSAVE"]).await;
    running.says("holding: the server saves or rewrites its data in a child process").await;
    let run = running.end().await.expect(0);
    assert!(run.held("fork") > 0.2, "{}", run.stdout);
    assert_eq!(run.num(), 6_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_falls_behind_holds_the_sweep_until_it_has_caught_up() {
    let server = filled(0, 6_000).await;
    let (_replica, proxy) = replica_behind_proxy(&server).await;
    let running = under_way(&server, &["--max-replica-lag", "8KiB"]).await;
    proxy.set(Mode::Stall);
    running.says("holding: a replica is too far behind").await;
    let freed = server.expired_keys().await;
    assert!(freed < 6_000, "it holds before the end");
    proxy.set(Mode::Pass);
    ends(running, "replica_lag", 6_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_replica_holds_the_sweep_until_it_is_heard_again() {
    let server = filled(0, 20_000).await;
    let (_replica, proxy) = replica_behind_proxy(&server).await;
    proxy.set(Mode::Stall);
    let running = Running::scan(&server.url(), &[&SLOW[..], &["--max-replica-silence", "2s"]].concat());
    running.says("holding: a replica has not been heard of").await;
    assert!(server.expired_keys().await < 20_000, "it holds before the end");
    proxy.set(Mode::Pass);
    ends(running, "replica_silent", 20_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_no_room_for_the_sampler_holds_the_sweep_and_says_why() {
    let server = filled(0, 20_000).await;
    // No client can connect later, not even the test.
    let mut inside = server.conn().await;
    let running = under_way(&server, &[]).await;
    redis::cmd("CONFIG").arg("SET").arg("maxclients").arg(1).exec_async(&mut inside).await.unwrap();
    let clients: String = redis::cmd("CLIENT").arg("LIST").query_async(&mut inside).await.unwrap();
    let sampler = clients.lines().find(|client| client.contains("cmd=ping") || client.contains("cmd=info"));
    let id =
        sampler.and_then(|client| client.strip_prefix("id=")?.split(' ').next()).expect("the sampler's connection");
    redis::cmd("CLIENT").arg("KILL").arg("ID").arg(id).exec_async(&mut inside).await.unwrap();
    running.says("holding: a figure with a limit on it cannot be read").await;
    running.says("max number of clients reached").await;
    redis::cmd("CONFIG").arg("SET").arg("maxclients").arg(1_000).exec_async(&mut inside).await.unwrap();
    ends(running, "unreadable", 20_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_sync_holds_the_sweep_until_the_replica_is_online() {
    let server = filled(0, 6_000).await;
    // The master waits for more replicas before it begins: during that time the replica is not online.
    server.cmd(&["CONFIG", "SET", "repl-diskless-sync", "yes"]).await;
    server.cmd(&["CONFIG", "SET", "repl-diskless-sync-delay", "2"]).await;
    let replica = Server::start().await;
    let running = under_way(&server, &[]).await;
    replica.cmd(&["REPLICAOF", "127.0.0.1", &server.addr().port().to_string()]).await;
    running.says("holding: a replica is being given the whole data set").await;
    assert!(server.expired_keys().await < 6_000, "it holds before the end");
    ends(running, "full_sync", 6_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_a_replica_holds_the_sweep_until_it_is_sent() {
    let server = filled(0, 6_000).await;
    // The replication backlog does not count.
    server.cmd(&["CONFIG", "SET", "repl-backlog-size", "16384"]).await;
    let (_replica, proxy) = replica_behind_proxy(&server).await;
    let limits = ["--max-replica-buffer", "1MiB", "--max-replica-lag", "off", "--max-replica-silence", "off"];
    let running = under_way(&server, &limits).await;
    proxy.set(Mode::Stall);
    // Both kernels' buffers fill first.
    let value = "x".repeat(1 << 20);
    for _ in 0..24 {
        server.cmd(&["SET", "large", &value]).await;
    }
    running.says("holding: too much waits to be sent to replicas").await;
    assert!(server.expired_keys().await < 6_000, "it holds before the end");
    proxy.set(Mode::Pass);
    ends(running, "replica_buffer", 6_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_that_wait_to_be_freed_hold_the_sweep_until_they_are() {
    if Server::version() < Version(7, 0, 0) && Server::kind() == Kind::Redis {
        return skipped("this server frees two million keys in less time than lies between two readings of INFO");
    }
    let server = filled(0, 6_000).await;
    let mut other = server.conn_to(1).await;
    redis::cmd("DEBUG").arg(&["POPULATE", "2000000"]).exec_async(&mut other).await.unwrap();
    let running = under_way(&server, &["--max-lazyfree", "1000"]).await;
    redis::cmd("FLUSHDB").arg("ASYNC").exec_async(&mut other).await.unwrap();
    running.says("holding: the server has many objects still to free in the background").await;
    ends(running, "lazy_free", 6_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_load_holds_the_sweep_where_a_limit_on_it_was_set() {
    let server = filled(0, 6_000).await;
    let running = under_way(&server, &["--max-ops", "2000"]).await;
    let mut conn = server.conn().await;
    let load = tokio::spawn(async move {
        loop {
            let mut pipe = redis::pipe();
            (0..1000).for_each(|_| {
                pipe.cmd("PING").ignore();
            });
            pipe.query_async::<()>(&mut conn).await.unwrap();
        }
    });
    running.says("holding: other clients are busy").await;
    load.abort();
    ends(running, "ops", 6_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hard_limit_ends_the_sweep_and_without_throttle_no_limit_does() {
    let server = filled(0, 1_000).await;
    let run = scan(&server.url(), &["--abort-latency", "1us"]).await;
    // A sweep of a thousand keys may be over before the latency is sampled twice.
    if run.code == Some(1) {
        assert_eq!(run.json()["report"]["failure"]["kind"], "limit_passed", "{}", run.stdout);
    }
    let server = filled(0, 6_000).await;
    let run = scan(&server.url(), &[&SLOW[..], &["--abort-latency", "1us"]].concat()).await.expect(1);
    assert_eq!(run.json()["report"]["failure"]["kind"], "limit_passed", "{}", run.stdout);
    let run = scan(&server.url(), &["--no-throttle", "--abort-latency", "1us", "--max-latency", "1us"]).await.expect(2);
    assert_eq!(run.stderr.matches("is not watched without throttle").count(), 2, "{}", run.stderr);
    let file = server.dir().join("limits.toml");
    std::fs::write(&file, "abort-latency = \"1us\"\nmax-latency = \"1us\"\n").expect("a file");
    let file = file.to_str().expect("a path");
    let run = scan(&server.url(), &["--no-throttle", "--config", file]).await.expect(0);
    assert_eq!(run.held("latency"), 0.0);
    assert_eq!(server.dbsize(0).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limits_of_a_task_can_be_changed_while_it_runs() {
    let server = filled(0, 6_000).await;
    let daemon = Daemon::start(&instance("cache", &server.url(), "max-keys-per-sec = 3000")).await;
    let id = daemon.create(json!({"instance_id": "cache", "limits": {"max_latency": "1us"}})).await;
    probe("it holds for the latency", PATIENCE, async || daemon.task(&id).await["holds"][0]["reason"] == "latency")
        .await;
    let path = format!("/api/v1/tasks/{id}");
    let request = daemon.request(reqwest::Method::PATCH, &path);
    daemon.send(request.json(&json!({"limits": {"max_latency": "soon"}}))).await.code();
    let request = daemon.request(reqwest::Method::PATCH, &path);
    daemon.send(request.json(&json!({"limits": {"max_latency": "off"}, "max_keys_per_sec": 0}))).await.ok();
    let task = daemon.until(&id, "succeeded").await;
    assert_eq!(task["reclaimed"], 6_000, "{task}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_that_is_slower_than_keys_expire_is_refused_unless_it_is_asked_for() {
    let server = Server::start().await;
    server.cmd(&["DEBUG", "SET-ACTIVE-EXPIRE", "1"]).await;
    let flow = flow(&server).await;
    probe("keys expire all the time", PATIENCE, async || server.expired_keys().await > 6_000).await;
    // A twentieth of the flow: the server expires in bursts, and a short window may see few of them.
    let slow = ["--max-keys-per-sec", "300"];
    let predicted = run(["check", &server.url(), "--json"].into_iter().chain(slow)).await;
    let findings = predicted.json()["findings"].to_string();
    assert_eq!(
        (predicted.code == Some(1), findings.contains("too_slow")),
        (slow_sweeps_harm(), slow_sweeps_harm()),
        "{findings}"
    );
    if !slow_sweeps_harm() {
        let running = Running::scan(&server.url(), &slow);
        probe("it sweeps", PATIENCE, async || running.stderr().contains("db0")).await;
        running.signal("INT");
        running.end().await.expect(130);
        return skipped("a slow sweep does this server's own expiry no harm: none is refused");
    }
    let refused = scan(&server.url(), &slow).await.expect(1);
    assert_eq!(refused.json()["report"]["failure"]["kind"], "too_slow", "{}", refused.stdout);
    assert_eq!(refused.num(), 0, "it was refused before it began");
    assert!(refused.stderr.contains("--allow-slow"), "{}", refused.stderr);
    scan(&server.url(), &[]).await.expect(0);
    flow.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_cut_while_the_flow_is_watched_leads_back_to_the_same_db() {
    let server = filled(0, 200).await;
    let third = Keyspace::of(&server, 3);
    third.live_ttl(18_000, "live").await;
    third.expired(2_000, "expired").await;
    let proxy = Proxy::start(server.addr()).await;
    // Slow enough that the flow of expiry is watched first, on servers on which slow sweeps can do harm.
    let selects = async || server.info("commandstats").await.get("cmdstat_select").cloned();
    let before = selects().await;
    let running = Running::scan(&proxy.url(), &["--db", "3", "--max-keys-per-sec", "1500"]);
    probe("it has selected its DB", PATIENCE, async || selects().await != before).await;
    proxy.cut_until_back(&server).await;
    probe("it sweeps", PATIENCE, async || server.expired_keys().await > 50).await;
    assert_eq!(server.dbsize(0).await, 200, "another DB is not swept");
    assert!(server.dbsize(3).await < 20_000);
    running.signal("INT");
    running.end().await.expect(130);
}

#[tokio::test(flavor = "multi_thread")]
async fn assisted_expiry_puts_the_old_effort_back_also_after_a_kill() {
    let server = filled(0, 3_000).await;
    let (_dir, state) = state_file();
    let state = state.to_str().unwrap();
    let effort = async || server.query::<Vec<String>>(&["CONFIG", "GET", "active-expire-effort"]).await[1].clone();
    let mut args = vec!["--state", state, "--assist-expiry", "20s"];
    let run = scan(&server.url(), &args).await.expect(0);
    assert!(run.stdout.contains("active-expire-effort was 10 for"), "{}", run.stdout);
    assert_eq!((effort().await.as_str(), server.dbsize(0).await), ("1", 0));

    Keyspace::of(&server, 0).expired(3_000, "more").await;
    let running = Running::scan(&server.url(), &args);
    probe("the effort is raised", PATIENCE, async || effort().await == "10").await;
    running.signal("KILL");
    running.end().await;
    assert_eq!(effort().await, "10", "no process was left to put it back");
    args.truncate(2);
    let run = scan(&server.url(), &args).await.expect(0);
    assert!(run.stdout.contains("it was put back to 1"), "{}", run.stdout);
    assert_eq!((effort().await.as_str(), server.dbsize(0).await), ("1", 0));
    let without = scan(&server.url(), &["--assist-expiry", "20s"]).await.expect(2);
    assert!(without.stderr.contains("needs a state file"), "{}", without.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn assisted_expiry_knows_the_load_that_others_make() {
    let server = filled(0, 3_000).await;
    let (_dir, state) = state_file();
    let limits = ["--max-ops", "1000000", "--max-cpu", "1", "--timeout", "30s"];
    let assist = ["--assist-expiry", "5s", "--state", state.to_str().unwrap()];
    scan(&server.url(), &[&limits[..], &assist].concat()).await.expect(0);
    assert_eq!(server.dbsize(0).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_without_names_frees_the_same_and_finds_a_server_out_where_it_does_not() {
    let server = filled(0, 30_000).await;
    let keys = Keyspace::of(&server, 0);
    keys.live(30_000, "live").await;
    let run = scan(&server.url(), &["--payload", "none"]).await.expect(0);
    assert!(run.total("touched") > 0.0, "the audit asks for names anyway");
    assert_eq!((run.num(), server.dbsize(0).await), (30_000, 30_000));
    let pass = run.json()["report"]["shards"][0]["dbs"][0].clone();
    let nameless = pass["nameless"].as_u64().unwrap();
    let refuses = Server::kind() == Kind::Valkey;
    assert_eq!(nameless > 0, !refuses, "{pass}");
    if refuses {
        assert!(run.stdout.contains("refuses SCAN with a TYPE"), "{}", run.stdout);
    } else {
        let scanned = pass["scanned"].as_f64().unwrap();
        assert!((55_000.0..68_000.0).contains(&scanned), "an estimate by the share of the table: {scanned}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_is_noticed_without_names_too() {
    if Server::kind() == Kind::Valkey {
        return skipped("Valkey sends names, so a sweep without them is refused");
    }
    let server = filled(0, 3_000).await;
    Keyspace::of(&server, 0).live(6_000, "live").await;
    let running = under_way(&server, &["--payload", "none"]).await;
    server.cmd(&["CLIENT", "PAUSE", "60000", "WRITE"]).await;
    running.says("holding: the server hides expired keys").await;
    server.cmd(&["CLIENT", "UNPAUSE"]).await;
    assert_eq!(running.end().await.expect(0).num(), 3_000);
    assert_eq!(server.dbsize(0).await, 6_000);
}

/// Writes 3,000 keys a second with a TTL of six seconds, until this task is aborted.
async fn flow(server: &Server) -> tokio::task::JoinHandle<()> {
    let mut conn = server.conn().await;
    tokio::spawn(async move {
        let mut tick = tokio::time::interval(Duration::from_millis(20));
        for batch in 0_u32.. {
            tick.tick().await;
            let mut pipe = redis::pipe();
            for n in 0..60 {
                pipe.cmd("SET").arg(batch * 60 + n).arg("x").arg("PX").arg(6_000).ignore();
            }
            pipe.query_async::<()>(&mut conn).await.unwrap();
        }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_that_stops_the_servers_own_expiry_is_found_out_while_it_runs() {
    if !slow_sweeps_harm() {
        return skipped("a slow sweep does this server's own expiry no harm");
    }
    let server = Server::start().await;
    server.cmd(&["DEBUG", "SET-ACTIVE-EXPIRE", "1"]).await;
    let flow = flow(&server).await;
    probe("keys expire all the time", PATIENCE, async || server.expired_keys().await > 6_000).await;
    let slow = ["-v", "--max-keys-per-sec", "1000", "--allow-slow"];
    // Five seconds until the flow is known, and sixteen of patience or more. If active expiry wakes up now
    // and then, a pass may end before that.
    for pass in 1.. {
        let mut running = Running::scan(&server.url(), &slow);
        running.says("this sweep would do harm").await;
        let mut said = false;
        probe("the harm is seen, or the pass ends", 3 * PATIENCE, async || {
            said = running.stderr().contains("this sweep does harm");
            said || !running.is_running()
        })
        .await;
        if said {
            running.signal("INT");
            running.end().await.expect(130);
            break;
        }
        running.end().await.expect(0);
        assert!(pass < 4, "the harm is not seen");
    }
    flow.abort();
    // A sweep at full speed does no harm, and frees what the slow one left.
    let fast = scan(&server.url(), &[]).await.expect(0);
    assert!(!fast.stdout.contains("harm"), "{}", fast.stdout);
}
