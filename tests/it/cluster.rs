//! Sweeps of real clusters: every master is swept, and everything that moves meanwhile is followed.

use serde_json::Value;

use crate::support::{
    PATIENCE,
    cluster::Cluster,
    probe,
    proxy::before_each_node,
    run::{Run, Running, run, scan, state_file},
    server::Server,
};

/// Slow enough for a test to act during the sweep.
const SLOW: [&str; 2] = ["--max-keys-per-sec", "1500"];

/// The shard whose name begins with this.
#[track_caller]
fn shard(run: &Run, name: &str) -> Value {
    let found = run.shards().into_iter().find(|shard| shard["shard"].as_str().unwrap().starts_with(name));
    found.unwrap_or_else(|| panic!("no shard {name}: {run:#?}"))
}

fn warnings(shard: &Value) -> String {
    shard["warnings"].to_string()
}

fn restarts(shard: &Value) -> u64 {
    shard["dbs"].as_array().unwrap().iter().map(|db| db["restarts"].as_u64().unwrap()).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_seed_is_enough_to_sweep_every_master_exactly() {
    let cluster = Cluster::start(3, true).await;
    let live = cluster.fill(2_000, 6_000).await;
    // The seed is a replica: it cannot be swept, but it names the masters.
    let run = scan(&cluster.replica_of(1).url(), &[]).await.expect(0);
    assert_eq!(run.num(), 6_000);
    cluster.assert_only(&live).await;
    let names: Vec<_> = run.shards().iter().map(|shard| shard["shard"].as_str().unwrap().to_owned()).collect();
    assert_eq!(names, ["slots 0-5460", "slots 10922-16383", "slots 5461-10921"]);
    for shard in run.shards() {
        assert_eq!(shard["dbs"][0]["complete"], true);
        assert_eq!(shard["dbs"][0]["restarts"], 0);
        let port = shard["server"]["addr"].as_str().unwrap().rsplit_once(':').unwrap().1.to_owned();
        assert!(cluster.nodes[..3].iter().any(|node| node.port().to_string() == port), "{port} is a master");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn masters_on_one_host_take_turns_unless_a_number_is_given() {
    let cluster = Cluster::start(3, false).await;
    cluster.fill(0, 18_000).await;
    let running = Running::scan(&cluster.url(), &["--max-keys-per-sec", "6000"]);
    probe("the first is under way", PATIENCE, async || cluster.freed_by(0).await > 500).await;
    // In this order, however long each answer takes.
    let others = cluster.freed_by(1).await + cluster.freed_by(2).await;
    assert!(others == 0 || cluster.nodes[0].dbsize(0).await == 0, "the others wait for their turn: {others}");
    running.signal("INT");
    running.end().await.expect(130);
    let (one, two) = (cluster.nodes[1].dbsize(0).await, cluster.nodes[2].dbsize(0).await);
    assert!(one > 3_000 && two > 3_000, "{one} and {two} are left of 6000 each");

    let running = Running::scan(&cluster.url(), &["--max-keys-per-sec", "2000", "--parallel", "3"]);
    probe("both are under way", PATIENCE, async || {
        cluster.nodes[1].dbsize(0).await < one && cluster.nodes[2].dbsize(0).await < two
    })
    .await;
    assert!(cluster.nodes[1].dbsize(0).await > 0, "and neither waits for the other's end");
    running.end().await.expect(0);
    assert_eq!(cluster.keys_in_memory().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_that_hides_its_keys_keeps_no_other_of_its_host_waiting() {
    let cluster = Cluster::start(2, false).await;
    let live = cluster.fill(4_000, 8_000).await;
    cluster.nodes[0].cmd(&["CLIENT", "PAUSE", "600000", "WRITE"]).await;
    let running = Running::scan(&cluster.url(), &SLOW);
    running.says("holding: the server hides expired keys").await;
    probe("the second is under way", PATIENCE, async || cluster.freed_by(1).await > 300).await;
    // This one holds for another reason, and the first one is retried meanwhile.
    cluster.nodes[1].cmd(&["CONFIG", "SET", "rdb-key-save-delay", "300"]).await;
    cluster.nodes[1].cmd(&["BGSAVE"]).await;
    running.says("holding: the server saves or rewrites its data in a child process").await;
    probe("the second is done", PATIENCE, async || {
        let alive: Vec<String> = cluster.nodes[1].query(&["KEYS", "*"]).await;
        cluster.nodes[1].dbsize(0).await == alive.len() as u64
    })
    .await;
    cluster.nodes[0].cmd(&["CLIENT", "UNPAUSE"]).await;
    assert_eq!(running.end().await.expect(0).num(), 8_000);
    cluster.assert_only(&live).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fraction_follows_the_keys() {
    let cluster = Cluster::start(1, false).await;
    cluster.fill(3_000, 3_000).await;
    let running = Running::scan(&cluster.url(), &SLOW);
    probe("half of it is done", PATIENCE, async || cluster.freed_by(0).await > 1_500).await;
    running.signal("INT");
    let run = running.end().await.expect(130);
    let pass = &run.shards()[0]["dbs"][0];
    let (fraction, scanned) = (pass["fraction"].as_f64().unwrap(), pass["scanned"].as_f64().unwrap());
    assert!((fraction - scanned / 6_000.0).abs() < 0.05, "{fraction} of the pass after {scanned} of 6000 keys");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manual_failover_is_followed_and_the_promoted_node_is_swept_from_the_beginning() {
    let cluster = Cluster::start(3, true).await;
    let live = cluster.fill(1_500, 12_000).await;
    let running = Running::scan(&cluster.url(), &SLOW);
    probe("the first is under way", PATIENCE, async || cluster.freed_by(0).await > 500).await;
    // Sometimes a failover takes seconds, and the sweep has to meet it half way.
    running.signal("STOP");
    cluster.failover(0).await;
    running.signal("CONT");
    let run = running.end().await.expect(0);
    cluster.assert_only(&live).await;
    let first = shard(&run, "slots 0-5460");
    assert!(restarts(&first) >= 1, "{first}");
    assert!(warnings(&first).contains(&format!("{} is the master now", cluster.replica_of(0).addr())), "{first}");
    assert_eq!(first["server"]["addr"], cluster.replica_of(0).addr().to_string());
    // The promoted node had received the deletions, so each key is counted once.
    let lost = run.total("lost_replies") as u64;
    assert!(run.num() <= 12_000 && run.num() + lost * 1_000 >= 12_000, "{} {lost}", run.num());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_master_is_followed_to_its_replica() {
    let mut cluster = Cluster::start(3, true).await;
    let live = cluster.fill(1_500, 12_000).await;
    let running = Running::scan(&cluster.nodes[1].url(), &[&SLOW[..], &["--parallel", "3"]].concat());
    probe("the first is under way", PATIENCE, async || cluster.freed_by(0).await > 500).await;
    cluster.nodes[0].kill9();
    let run = running.end().await.expect(0);
    let first = shard(&run, "slots 0-5460");
    assert!(restarts(&first) >= 1, "{first}");
    assert_eq!(first["server"]["addr"], cluster.replica_of(0).addr().to_string());
    cluster.nodes.remove(0);
    cluster.assert_only(&live).await;
}

async fn effort(node: &Server) -> String {
    node.query::<Vec<String>>(&["CONFIG", "GET", "active-expire-effort"]).await.remove(1)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_that_another_took_over_from_gets_its_old_effort_back() {
    let cluster = Cluster::start(3, true).await;
    cluster.fill(0, 6_000).await;
    let (_dir, state) = state_file();
    let (old, new) = (&cluster.nodes[0], cluster.replica_of(0));
    let options =
        ["--max-keys-per-sec", "500", "--parallel", "3", "--connect-timeout", "1s", "--response-timeout", "1s"];
    let assist = ["--assist-expiry", "20s", "--state", state.to_str().unwrap()];
    let running = Running::scan(&cluster.nodes[1].url(), &[&options[..], &assist].concat());
    probe("the effort is raised", PATIENCE, async || effort(old).await == "10").await;
    old.sigstop();
    cluster.until_promoted(0).await;
    probe("the new master is swept", PATIENCE, async || new.expired_keys().await > 0).await;
    old.sigcont();
    let run = running.end().await.expect(0);
    // The next shard that ends restores the effort.
    let said: String = run.shards().iter().map(warnings).collect();
    assert!(
        said.contains(&format!("active-expire-effort of {} was raised to 10 and cannot be put back", old.addr())),
        "{said}"
    );
    assert!(said.contains(&format!("of {} had been left at 10: it was put back to 1", old.addr())), "{said}");
    for node in &cluster.nodes {
        assert_eq!(effort(node).await, "1");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_after_a_kill_and_a_failover_gives_the_old_master_its_effort_back() {
    let cluster = Cluster::start(3, true).await;
    cluster.fill(0, 3_000).await;
    let (_dir, state) = state_file();
    let options = ["--state", state.to_str().unwrap()];
    let running = Running::scan(&cluster.url(), &[&options[..], &["--assist-expiry", "20s"]].concat());
    probe("the effort is raised", PATIENCE, async || effort(&cluster.nodes[0]).await == "10").await;
    running.signal("KILL");
    running.end().await;
    cluster.failover(0).await;
    assert_eq!(effort(&cluster.nodes[0]).await, "10", "no process was left to put it back");
    let run = scan(&cluster.url(), &options).await.expect(0);
    assert!(run.stdout.contains("had been left at 10: it was put back to 1"), "{}", run.stdout);
    assert_eq!(effort(&cluster.nodes[0]).await, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_of_a_shard_that_was_done_already_is_seen_at_the_end() {
    let cluster = Cluster::start(2, true).await;
    let live = cluster.fill(500, 8_000).await;
    let running = Running::scan(&cluster.url(), &SLOW);
    probe("the second is under way", PATIENCE, async || cluster.freed_by(1).await > 100).await;
    running.signal("STOP");
    assert!(cluster.freed_by(0).await > 3_000, "the first is done");
    cluster.failover(0).await;
    running.signal("CONT");
    let run = running.end().await.expect(0);
    let first = shard(&run, "slots 0-8191");
    assert_eq!(restarts(&first), 1, "{first}");
    assert!(warnings(&first).contains("became the master after"), "{first}");
    cluster.assert_only(&live).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_that_move_behind_the_sweep_are_swept_again_where_they_went() {
    let cluster = Cluster::start(2, false).await;
    let live = cluster.fill(2_000, 8_000).await;
    let running = Running::scan(&cluster.url(), &SLOW);
    probe("the first is done, the second under way", PATIENCE, async || cluster.freed_by(1).await > 100).await;
    // From the shard that is not swept yet to the one that is done.
    running.signal("STOP");
    cluster.migrate(1, 0, 16_000..=16_383).await;
    cluster.until_agreed().await;
    running.signal("CONT");
    let run = running.end().await.expect(0);
    let first = shard(&run, "slots 0-8191");
    assert_eq!(restarts(&first), 1, "{first}");
    assert!(warnings(&first).contains("the slots 16000-16383 came to"), "{first}");
    assert_eq!(restarts(&shard(&run, "slots 8192-16383")), 0, "slots that only leave cost no pass");
    cluster.assert_only(&live).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_joins_is_swept_and_one_that_leaves_is_not_missed() {
    let mut cluster = Cluster::start(2, false).await;
    let live = cluster.fill(500, 6_000).await;
    let new = cluster.join().await;
    let running = Running::scan(&cluster.url(), &[&SLOW[..], &["--db", "0"]].concat());
    probe("the first is under way", PATIENCE, async || cluster.freed_by(0).await > 500).await;
    running.signal("STOP");
    // The new node takes a few slots of the first shard. The second hands all its slots to the first, and leaves.
    cluster.migrate(0, new, 0..=99).await;
    cluster.migrate(1, 0, 8_192..=16_383).await;
    cluster.until_agreed().await;
    for place in [0, new] {
        let leaver = crate::support::cluster::node_id(&cluster.nodes[1]).await;
        cluster.nodes[place].cmd(&["CLUSTER", "FORGET", &leaver]).await;
    }
    cluster.nodes[1].kill9();
    running.signal("CONT");
    let run = running.end().await.expect(0);
    cluster.nodes.remove(1);
    cluster.assert_only(&live).await;
    assert_eq!(run.shards().len(), 3, "{run:#?}");
    assert_eq!(shard(&run, "slots 0-99")["dbs"][0]["complete"], true);
    assert!(restarts(&shard(&run, "slots 0-8191")) >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bad_shard_does_not_stop_the_others_and_is_named() {
    let mut cluster = Cluster::start(3, false).await;
    cluster.fill(0, 3_000).await;
    cluster.nodes[1].kill9();
    let run = scan(&cluster.url(), &["--retry-for", "1s"]).await.expect(1);
    assert_eq!(run.json()["report"]["state"], "failed");
    assert_eq!(cluster.nodes[0].dbsize(0).await + cluster.nodes[2].dbsize(0).await, 0, "the others are swept");
    let bad = shard(&run, "slots 5461-10921");
    assert!(bad["failure"]["message"].as_str().unwrap().contains("cannot connect"), "{bad}");
    assert!(run.stderr.contains("1 of 3 shards were not swept completely: slots 5461-10921: "), "{}", run.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_right_is_reported_for_the_node_that_lacks_it() {
    let cluster = Cluster::start(3, false).await;
    cluster.fill(0, 3_000).await;
    for (place, node) in cluster.nodes.iter().enumerate() {
        let scan = if place == 2 { "-scan" } else { "+scan" };
        let rules = format!("on >pw resetkeys -@all +dbsize +info +ping +select +client|setname +cluster|slots {scan}");
        let words: Vec<&str> = ["ACL", "SETUSER", "sweeper"].into_iter().chain(rules.split(' ')).collect();
        node.cmd(&words).await;
    }
    let run = scan(&cluster.nodes[0].url_as("sweeper", "pw"), &[]).await.expect(1);
    let bad = shard(&run, "slots 10922-16383");
    assert_eq!(bad["failure"]["kind"], "not_allowed");
    let said = bad["failure"]["message"].as_str().unwrap();
    assert!(said.contains(&cluster.nodes[2].addr().to_string()) && said.contains("scan"), "{said}");
    assert!(bad["failure"]["hint"].as_str().unwrap().contains("ACL SETUSER"), "{bad}");
    assert_eq!(run.num(), 3_000 - cluster.nodes[2].dbsize(0).await);
    for place in [0, 1] {
        assert_eq!(cluster.nodes[place].dbsize(0).await, 0);
    }

    for node in &cluster.nodes {
        node.cmd(&["ACL", "SETUSER", "sweeper", "-cluster"]).await;
    }
    let run = scan(&cluster.nodes[0].url_as("sweeper", "pw"), &[]).await.expect(3);
    assert!(run.stderr.contains("+cluster|slots"), "{}", run.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn announced_addresses_are_reached_by_the_node_map() {
    let cluster = Cluster::start(3, false).await;
    let live = cluster.fill(100, 3_000).await;
    let (proxies, map) = before_each_node(&cluster).await;
    let run = scan(&proxies[0].url(), &["--node-map", &map]).await.expect(0);
    assert_eq!(run.num(), 3_000);
    cluster.assert_only(&live).await;
    for (proxy, shard) in proxies.iter().zip(["slots 0-", "slots 5461-", "slots 10922-"]) {
        assert_eq!(self::shard(&run, shard)["server"]["addr"], proxy.addr().to_string());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_sweep_of_a_cluster_goes_on_where_it_was() {
    let cluster = Cluster::start(3, true).await;
    let live = cluster.fill(1_000, 9_000).await;
    let (_dir, state) = state_file();
    let state = ["--state", state.to_str().unwrap()];
    let running = Running::scan(&cluster.url(), &[&SLOW[..], &state].concat());
    probe("one is under way or done", PATIENCE, async || {
        cluster.freed_by(0).await + cluster.freed_by(1).await + cluster.freed_by(2).await > 4_000
    })
    .await;
    running.signal("KILL");
    assert_eq!(running.end().await.code, None);
    let run = scan(&cluster.url(), &[&state[..], &["--resume"]].concat()).await.expect(0);
    cluster.assert_only(&live).await;
    // Only the batch under way is lost: one thousand keys at most.
    assert!(run.num() <= 9_000 && run.num() >= 8_000, "{}", run.num());
    assert_eq!(run.shards().iter().map(restarts).sum::<u64>(), 0, "every cursor was good");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_is_down_is_swept_where_its_masters_are_there() {
    let mut cluster = Cluster::start(3, false).await;
    cluster.fill(600, 3_000).await;
    cluster.nodes[2].kill9();
    probe("the cluster is down", PATIENCE, async || {
        let info: String = cluster.nodes[0].query(&["CLUSTER", "INFO"]).await;
        info.contains("cluster_state:fail")
    })
    .await;
    // Every node refuses EXISTS with CLUSTERDOWN now, but not SCAN.
    let run = scan(&cluster.url(), &["--retry-for", "500ms", "--touch", "exists"]).await.expect(1);
    for place in [0, 1] {
        let names: Vec<String> = cluster.nodes[place].query(&["KEYS", "*"]).await;
        assert_eq!(cluster.nodes[place].dbsize(0).await, names.len() as u64, "no expired key is left");
    }
    assert!(run.stderr.contains("1 of 3 shards"), "{}", run.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_a_paused_master_only_hides_are_never_reported_as_done() {
    assert_waits_for_a_paused_master(1_000, 4_000).await;
}

/// Sweeps a paused master: nothing is freed until the pause is over, and then everything.
async fn assert_waits_for_a_paused_master(live: u64, expired: u64) {
    let cluster = Cluster::start(1, false).await;
    let live = cluster.fill(live, expired).await;
    cluster.nodes[0].cmd(&["CLIENT", "PAUSE", "600000", "WRITE"]).await;
    let running = Running::scan(&cluster.url(), &[]);
    running.says("holding: the server hides expired keys").await;
    assert_eq!(cluster.freed_by(0).await, 0);
    cluster.nodes[0].cmd(&["CLIENT", "UNPAUSE"]).await;
    assert_eq!(running.end().await.expect(0).num(), expired);
    cluster.assert_only(&live).await;
}

/// If each slot has a table of its own, a batch passes through several tables and may end at its bucket limit.
#[tokio::test(flavor = "multi_thread")]
async fn sparse_tables_of_slots_are_not_taken_for_hidden_keys() {
    let cluster = Cluster::start(1, false).await;
    let mut conn = cluster.nodes[0].conn().await;
    // 130 of 1,024 buckets: with a few keys less the table would shrink.
    let (slots, keys, left) = (100_u32, 1_000_u32, 130_u32);
    for slot in 0..slots {
        let mut fill = redis::pipe();
        for key in 0..keys {
            fill.cmd("SET").arg(format!("{{{slot}}}:{key}")).arg("value").ignore();
        }
        (left..keys).for_each(|key| {
            fill.cmd("DEL").arg(format!("{{{slot}}}:{key}")).ignore();
        });
        let filled: redis::RedisResult<()> = fill.query_async(&mut conn).await;
        filled.expect("the keys are written");
    }
    let options = ["--db", "0", "--count", "50", "--max-slice", "0s", "--touch", "none", "--timeout", "20s"];
    let run = scan(&cluster.url(), &options).await.expect(0);
    let pass = &run.shards()[0]["dbs"][0];
    assert_eq!(pass["held_s"]["deletion_blocked"], Value::Null, "{pass}");
    // A range that is walked again in batches of COUNT 1 is not counted twice.
    let live = f64::from(slots * left);
    let scanned = pass["scanned"].as_f64().expect("a number");
    assert!((live..1.5 * live).contains(&scanned), "{scanned} of {live} keys");
}

/// A pass in which few keys are hidden, in tables so small that each batch goes through several.
#[tokio::test(flavor = "multi_thread")]
async fn a_few_keys_that_a_paused_master_hides_in_small_tables_are_never_reported_as_done() {
    assert_waits_for_a_paused_master(40_000, 2_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn check_inspects_every_master_and_touches_no_key() {
    let mut cluster = Cluster::start(3, false).await;
    cluster.fill(300, 900).await;
    let run = run(["check", &cluster.url(), "--json"]).await.expect(0);
    let shards = run.json()["shards"].as_array().unwrap().clone();
    assert_eq!(shards.len(), 3);
    let with_ttl: u64 = shards.iter().map(|shard| shard["backlog"]["expires"].as_u64().unwrap_or(0)).sum();
    assert_eq!(with_ttl, 900, "{shards:#?}");
    assert_eq!(cluster.keys_in_memory().await, 1_200);
    let text = self::run(["check", &cluster.url()]).await.expect(0).stdout;
    assert!(text.contains("== slots 5461-10921") && text.contains("cluster: "), "{text}");

    cluster.nodes[2].kill9();
    let run = self::run(["check", &cluster.url(), "--json"]).await.expect(1);
    let bad = &run.json()["shards"][2];
    assert_eq!(bad["failure"]["kind"], "cannot_connect", "{bad}");
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_that_no_master_owns_are_said_with_their_ranges() {
    let cluster = Cluster::start(3, false).await;
    // Otherwise a node that owns slots refuses commands while other slots have no owner.
    for node in &cluster.nodes {
        node.cmd(&["CONFIG", "SET", "cluster-require-full-coverage", "no"]).await;
    }
    cluster.fill(0, 900).await;
    // A node that does not know yet tells the others that the slots have an owner.
    probe("the slots have no owner", PATIENCE, async || {
        for node in &cluster.nodes {
            for slot in ["100", "101", "16383"] {
                let _ = node.try_query::<()>(&["CLUSTER", "DELSLOTS", slot]).await;
            }
        }
        for node in &cluster.nodes {
            let info: String = node.query(&["CLUSTER", "INFO"]).await;
            if !info.contains("cluster_slots_assigned:16381") {
                return false;
            }
        }
        true
    })
    .await;
    let url = cluster.url();
    let run = scan(&url, &[]).await.expect(0);
    let note = run.json()["report"]["note"].to_string();
    assert!(note.contains("no master owns the slots 100-101,16383"), "{note}");
    let summary = self::run(["scan", &url]).await.expect(0).stdout;
    assert!(summary.contains("note: no master owns the slots 100-101,16383"), "{summary}");
    let checked = self::run(["check", &url, "--json"]).await.expect(0).json();
    assert_eq!(checked["findings"][0]["code"], "unowned_slots", "{checked:#}");
    let text = self::run(["check", &url]).await.expect(0).stdout;
    assert!(text.contains("warning: no master owns the slots 100-101,16383"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn short_pauses_of_a_master_hide_nothing_from_the_sweep() {
    let cluster = Cluster::start(3, false).await;
    let live = cluster.fill(12_000, 3_000).await;
    let running = Running::scan(&cluster.url(), &[&SLOW[..], &["--parallel", "3"]].concat());
    probe("the pass is under way", PATIENCE, async || cluster.freed_by(0).await > 50).await;
    for _ in 0..3 {
        cluster.nodes[0].cmd(&["CLIENT", "PAUSE", "350", "WRITE"]).await;
        let freed = cluster.freed_by(0).await;
        probe("deletions work again, or no expired key is left", PATIENCE, async || {
            let alive: Vec<String> = cluster.nodes[0].query(&["KEYS", "*"]).await;
            cluster.freed_by(0).await > freed || cluster.nodes[0].dbsize(0).await == alive.len() as u64
        })
        .await;
    }
    let run = running.end().await.expect(0);
    assert_eq!(run.num(), 3_000);
    cluster.assert_only(&live).await;
}
