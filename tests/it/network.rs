//! Networks that misbehave in front of real servers, and hostile peers: every wait ends, the sweep goes on after every failure
//! or reports it, and no peer can make it use more memory than it may.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use crate::support::{
    PATIENCE,
    cluster::Cluster,
    probe,
    proxy::{Direction, Mode, before_each_node, behind_proxy},
    run::{Run, Running, scan},
    standin::{StandIn, bulk, info, page},
};

/// Slow enough for a test to act during the sweep.
const SLOW: [&str; 2] = ["--max-keys-per-sec", "1500"];
/// Timeouts that a test can wait for. The first connection is tried only once, so they are longer than a busy machine keeps a
/// process waiting.
const SHORT: [&str; 4] = ["--response-timeout", "2s", "--connect-timeout", "3s"];

/// The count is exact if no reply was lost; the deletions are always complete.
#[track_caller]
fn assert_counted(run: &Run, expired: u64) {
    let lost = run.total("lost_replies") as u64;
    assert!(run.num() <= expired && run.num() + lost * 1_000 >= expired, "{} of {expired}, {lost} lost", run.num());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_network_changes_the_time_and_nothing_else() {
    for mode in [Mode::Delay(Duration::from_millis(3)), Mode::Trickle { bytes: 700, tick: Duration::from_millis(1) }] {
        let (server, proxy) = behind_proxy(300, 1_500).await;
        proxy.set(mode);
        let run = scan(&proxy.url(), &[]).await.expect(0);
        assert_eq!(run.num(), 1_500, "{mode:?}");
        assert_eq!(server.dbsize(0).await, 300);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_goes_silent_is_given_up_and_made_again() {
    for mode in
        [Mode::Stall, Mode::HalfOpen { lost: Direction::ToClient }, Mode::HalfOpen { lost: Direction::ToServer }]
    {
        let (server, proxy) = behind_proxy(300, 4_000).await;
        let running = Running::scan(&proxy.url(), &[&SLOW[..], &SHORT].concat());
        probe("the pass is under way", PATIENCE, async || server.expired_keys().await > 300).await;
        proxy.set(mode);
        running.says("holding: the connection was lost").await;
        proxy.set(Mode::Pass);
        let run = running.end().await.expect(0);
        assert_eq!(server.dbsize(0).await, 300, "{mode:?}");
        assert_counted(&run, 4_000);
        assert_eq!(run.json()["report"]["shards"][0]["dbs"][0]["restarts"], 0, "{mode:?}: from the right cursor");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_cuts_again_and_again_is_outlasted() {
    let (server, proxy) = behind_proxy(300, 6_000).await;
    let running = Running::scan(&proxy.url(), &SLOW);
    probe("the pass is under way", PATIENCE, async || server.expired_keys().await > 100).await;
    let mut cuts = 0;
    while server.dbsize(0).await > 1_000 {
        let freed = server.expired_keys().await;
        proxy.cut().await;
        cuts += 1;
        probe("it is back", PATIENCE, async || server.expired_keys().await > freed).await;
    }
    let run = running.end().await.expect(0);
    assert!(cuts > 5, "{cuts}");
    assert_eq!(server.dbsize(0).await, 300);
    assert_counted(&run, 6_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_in_the_middle_ends_in_a_clear_error() {
    for garbage in [&b"\x00\x01\x02\x03 garbage\r\n"[..], b"HTTP/1.1 502 Bad Gateway\r\n\r\n", b"$-7\r\n*5\r\n"] {
        let (server, proxy) = behind_proxy(300, 4_000).await;
        let running = Running::scan(&proxy.url(), &SLOW);
        probe("the pass is under way", PATIENCE, async || server.expired_keys().await > 300).await;
        proxy.garbage(garbage);
        let run = running.end().await;
        // The sampler's connection may have got the garbage instead, which is harmless.
        match run.code {
            Some(0) => assert_counted(&run, 4_000),
            _ => {
                let run = run.expect(1);
                assert!(run.stderr.contains("not a valid reply"), "{}", run.stderr);
                assert_eq!(run.json()["report"]["failure"]["kind"], "protocol");
                assert!(run.num() > 0, "keys that were freed before stay counted");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_shard_delays_no_other() {
    let cluster = Cluster::start(3, false).await;
    cluster.fill(0, 3_000).await;
    let (proxies, map) = before_each_node(&cluster).await;
    // The first shard in the queue is the silent one, and only one is swept at a time.
    proxies[0].set(Mode::Stall);
    let more = ["--node-map", &map, "--parallel", "1"];
    let running = Running::scan(&proxies[1].url(), &[&more[..], &SHORT].concat());
    for place in [1, 2] {
        probe("the others are swept", PATIENCE, async || cluster.nodes[place].dbsize(0).await == 0).await;
    }
    proxies[0].set(Mode::Pass);
    let run = running.end().await.expect(0);
    assert_eq!(cluster.keys_in_memory().await, 0);
    assert_counted(&run, 3_000);
}

/// Runs a sweep of a simulated server to its end, and returns the run with its peak memory in MiB.
async fn scan_hostile(url: &str) -> (Run, u64) {
    let mut running = Running::scan(url, &["--timeout", "60s"]);
    let status = format!("/proc/{}/status", running.pid());
    let mut peak_kib = 0;
    probe("it ends", 3 * PATIENCE, async || {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0 kB");
        let now = line.split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or(0);
        peak_kib = now.max(peak_kib);
        !running.is_running()
    })
    .await;
    (running.end().await, peak_kib / 1024)
}

/// A peer that answers SCAN with `scan` ends the sweep with this text, within a memory limit.
async fn check_hostile(scan: impl Fn(u64) -> Vec<u8> + Send + Sync + 'static, said: &str) {
    let asked = AtomicU64::new(0);
    let peer =
        StandIn::start(move |words| (words[0] == "SCAN").then(|| scan(asked.fetch_add(1, Ordering::Relaxed)))).await;
    let (run, peak_mib) = scan_hostile(&peer.url()).await;
    let run = run.expect(1);
    assert!(run.stderr.contains(said), "expected `{said}`: {}", run.stderr);
    assert!(peak_mib < 100, "{peak_mib} MiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn cursors_that_never_end_are_given_up() {
    // As many names as the largest COUNT: fewer would look like hidden keys, and the sweep would hold.
    let full = |cursor| page(cursor, &["name"; 1_000]);
    check_hostile(move |_| full(7), "lead nowhere").await;
    check_hostile(move |n| full([8, 4, 12, 2][n as usize % 4]), "lead nowhere").await;
    check_hostile(move |n| full(n.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1), "lead nowhere").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_replies_are_refused_before_memory_is_spent() {
    check_hostile(|_| b"*2\r\n$1\r\n5\r\n*999999999\r\n".to_vec(), "SCAN announces 999999999 keys").await;
    check_hostile(|_| b"*2\r\n$1\r\n5\r\n*1\r\n$99999999999999\r\n".to_vec(), "a key name announces").await;
    check_hostile(|_| b":5\r\n".to_vec(), "stands where SCAN has something else").await;
    check_hostile(|_| b"*2\r\n$2\r\nxy\r\n*0\r\n".to_vec(), "the cursor is not a number").await;
    check_hostile(|_| b"+".repeat(1 << 20), "a line is longer than").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_huge_names_costs_no_memory() {
    let name = "x".repeat(1 << 20);
    let flood = page(1 << 40, &vec![name.as_str(); 200]);
    // The names are counted and dropped while they are read, with or without an audit; then the pass ends.
    let peer = StandIn::start(move |words| {
        let first = words.get(1).is_some_and(|cursor| cursor == "0");
        match words[0].as_str() {
            "SCAN" => Some(if first { flood.clone() } else { page(0, &[]) }),
            "DBSIZE" => Some(b":200\r\n".to_vec()),
            _ => None,
        }
    })
    .await;
    let (run, peak_mib) = scan_hostile(&peer.url()).await;
    assert_eq!(run.expect(0).total("scanned"), 200.0);
    assert!(peak_mib < 100, "{peak_mib} MiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_topology_ends_in_a_clear_error() {
    let cluster = |slots: &'static [u8]| {
        StandIn::start(move |words| match words[0].as_str() {
            "INFO" => Some(info("cluster")),
            "CLUSTER" if words[1] == "SLOTS" => Some(slots.to_vec()),
            "CLUSTER" => Some(bulk("cluster_state:ok")),
            _ => None,
        })
    };
    for (slots, said) in [
        (&b"*1\r\n*2\r\n:0\r\n:5\r\n"[..], "a range names no master"),
        (b":5\r\n", "a list is missing"),
        (b"*1048577\r\n", "an array announces 1048577 elements"),
        (b"*0\r\n", "owns a hash slot"),
        (b"*1\r\n*3\r\n:0\r\n:99999\r\n*3\r\n$1\r\nh\r\n:1\r\n$1\r\nx\r\n", "a slot is no number below 16384"),
    ] {
        let peer = cluster(slots).await;
        let (run, peak_mib) = scan_hostile(&peer.url()).await;
        assert!(matches!(run.code, Some(1 | 3)) && run.stderr.contains(said), "expected `{said}`: {run:#?}");
        assert!(peak_mib < 100, "{peak_mib} MiB");
    }
}
