//! Several workers on one table: no key is missed and none is counted twice, whatever happens during the pass.

use std::time::Duration;

use crate::support::keyspace::Keyspace;
use crate::support::proxy::{Mode, Proxy, behind_proxy};
use crate::support::run::{Run, Running, scan, scan_under_way, state_file};
use crate::support::server::Server;
use crate::support::sharded::Sharded;
use crate::support::{PATIENCE, probe};

/// The delay of each direction: many batches fit into a round trip.
const AWAY: Duration = Duration::from_millis(5);
const EXPIRED: u64 = 40_000;
const LIVE: u64 = 20_000;

/// A server with keys, behind a slow network.
async fn filled() -> (Server, Proxy) {
    let (server, proxy) = behind_proxy(LIVE, EXPIRED).await;
    proxy.set(Mode::Delay(AWAY));
    (server, proxy)
}

async fn under_way(server: &Server, proxy: &Proxy, more: &[&str]) -> Running {
    scan_under_way(server, &proxy.url(), &[&["--max-latency", "off"][..], more].concat(), 2_000).await
}

async fn sweeping_connections(server: &Server) -> usize {
    let clients: String = server.query(&["CLIENT", "LIST"]).await;
    clients.lines().filter(|client| client.contains("cmd=dbsize") || client.contains("cmd=scan")).count()
}

/// Checks that every expired key was freed, and that only lost replies are uncounted.
async fn assert_clean(server: &Server, run: &Run) {
    assert_eq!((server.dbsize(0).await, server.expired_keys().await), (LIVE, EXPIRED));
    let lost = run.total("lost_replies") as u64;
    assert!(run.num() <= EXPIRED && run.num() + lost * 1_000 >= EXPIRED, "{} of {EXPIRED}, {lost} lost", run.num());
    if lost == 0 {
        assert_eq!(run.num(), EXPIRED);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_far_server_is_swept_over_several_connections_that_look_at_few_keys_twice() {
    let (server, proxy) = filled().await;
    let running = under_way(&server, &proxy, &[]).await;
    probe("four connections sweep", PATIENCE, async || sweeping_connections(&server).await >= 4).await;
    let run = running.end().await.expect(0);
    assert_clean(&server, &run).await;
    let scanned = run.total("scanned") as u64;
    assert!((LIVE + EXPIRED..(LIVE + EXPIRED) * 105 / 100).contains(&scanned), "{scanned}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_grows_and_is_written_to_meanwhile_is_swept_to_the_last_key() {
    let (server, proxy) = filled().await;
    let running = under_way(&server, &proxy, &[]).await;
    // Twice as many keys: the table is doubled during the sweep.
    Keyspace::of(&server, 0).live(2 * (LIVE + EXPIRED), "more").await;
    let run = running.end().await.expect(0);
    assert_eq!((server.dbsize(0).await, server.expired_keys().await), (2 * (LIVE + EXPIRED) + LIVE, EXPIRED));
    assert_eq!(run.num(), EXPIRED);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_cut_again_and_again_lose_no_key() {
    let (server, proxy) = filled().await;
    let running = under_way(&server, &proxy, &[]).await;
    for _ in 0..4 {
        proxy.cut_until_back(&server).await;
    }
    assert_clean(&server, &running.end().await.expect(0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_are_hidden_for_a_while_are_freed_in_the_end() {
    let (server, proxy) = filled().await;
    let running = under_way(&server, &proxy, &[]).await;
    for _ in 0..3 {
        let freed = server.expired_keys().await;
        server.cmd(&["CLIENT", "PAUSE", "60000", "WRITE"]).await;
        running.says("holding: the server hides expired keys").await;
        server.cmd(&["CLIENT", "UNPAUSE"]).await;
        probe("it goes on", PATIENCE, async || server.expired_keys().await > freed).await;
    }
    let run = running.end().await.expect(0);
    assert_clean(&server, &run).await;
    assert_eq!(run.num(), EXPIRED);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_goes_on_after_an_interrupt_and_after_a_kill() {
    let (server, proxy) = filled().await;
    let (_dir, state) = state_file();
    let state = ["--state", state.to_str().unwrap()];
    let running = under_way(&server, &proxy, &state).await;
    running.signal("INT");
    let interrupted = running.end().await.expect(130);
    assert_eq!(interrupted.num(), server.expired_keys().await, "every worker was counted to its last batch");
    let resume = [&state[..], &["--resume"]].concat();
    let running = under_way(&server, &proxy, &resume).await;
    running.signal("KILL");
    running.end().await;
    let run = scan(&proxy.url(), &resume).await.expect(0);
    assert_clean(&server, &run).await;
    assert_eq!(run.json()["report"]["shards"][0]["dbs"][0]["restarts"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_has_room_for_no_second_connection_is_swept_over_one() {
    let (server, _proxy) = filled().await;
    // The connections of the test, the sweep and its sampler.
    let clients: String = server.query(&["CLIENT", "LIST"]).await;
    let room = (clients.lines().count() + 2).to_string();
    server.cmd(&["CONFIG", "SET", "maxclients", &room]).await;
    let run = scan(&server.url(), &[]).await.expect(0);
    assert_eq!((run.num(), server.dbsize(0).await), (EXPIRED, LIVE));
}

#[tokio::test(flavor = "multi_thread")]
async fn cursors_that_follow_no_hash_table_are_walked_to_the_last_key() {
    for mode in ["proxy", "standalone"] {
        let mut servers = Vec::new();
        for shard in 0..3 {
            let server = Server::start().await;
            let keys = Keyspace::of(&server, 0);
            keys.live(15_000, &format!("live{shard}:")).await;
            keys.expired(1_500, &format!("expired{shard}:")).await;
            servers.push(server);
        }
        let proxy = Sharded::start(&servers, mode).await;
        let run = scan(&proxy.url(), &["--max-slice", "0s", "--timeout", "60s"]).await.expect(0);
        for server in &servers {
            assert_eq!(server.dbsize(0).await, 15_000, "{mode}: {run:#?}");
        }
        // A proxy that looks like a server gets several workers at first, and does not keep the commands of a batch together.
        assert!(run.num() == 4_500 || mode == "standalone" && run.num() > 4_500, "{mode}: {}", run.num());
    }
}
