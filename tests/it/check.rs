//! `ttlsweep check` reports what is there and touches no key.

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Output, Stdio};

use serde_json::Value;
use ttlsweep::node::acl::ACL_LINE;

use crate::support::keyspace::Keyspace;
use crate::support::server::{Kind, Server, Version};
use crate::support::{PATIENCE, free_port, probe, shell_words, ttlsweep};

fn check(arguments: &[&str]) -> Output {
    ttlsweep().arg("check").args(arguments).output().expect("the program runs")
}

/// The object that `check --json` prints, and its exit code.
#[track_caller]
fn check_json(arguments: &[&str]) -> (Value, i32) {
    let output = check(&[&["--json"], arguments].concat());
    let text = String::from_utf8_lossy(&output.stdout);
    let object = serde_json::from_str(&text)
        .unwrap_or_else(|e| panic!("{e}: {text}\n{}", String::from_utf8_lossy(&output.stderr)));
    (object, output.status.code().expect("no signal"))
}

fn codes(object: &Value) -> Vec<&str> {
    let findings = object["findings"].as_array().expect("a list");
    findings.iter().map(|finding| finding["code"].as_str().expect("a word")).collect()
}

/// How often each command was called, by its first word; `config|set` has an entry of its own.
async fn calls(server: &Server) -> BTreeMap<String, u64> {
    let mut calls = BTreeMap::new();
    for (field, value) in server.info("commandstats").await {
        let Some(name) = field.strip_prefix("cmdstat_") else { continue };
        let name = if name == "config|set" { name } else { name.split('|').next().unwrap_or(name) };
        let of_it: u64 = value.split([',', '=']).nth(1).and_then(|n| n.parse().ok()).expect("calls=N");
        *calls.entry(name.to_owned()).or_default() += of_it;
    }
    calls
}

#[tokio::test(flavor = "multi_thread")]
async fn check_frees_nothing_and_visits_no_key() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(300, "live:").await;
    keys.live_ttl(300, "ttl:").await;
    keys.expired(500, "expired:").await;
    let (expired, before) = (server.expired_keys().await, calls(&server).await);

    let (object, code) = check_json(&[&server.url()]);

    assert_eq!(code, 0, "{object:#}");
    assert_eq!(server.dbsize(0).await, 1100);
    assert_eq!(server.expired_keys().await, expired);
    let after = calls(&server).await;
    let changed = after.iter().filter(|(name, calls)| before.get(*name) != Some(calls));
    let changed: BTreeSet<&str> = changed.map(|(name, _)| name.as_str()).collect();
    // The commands that check may send, and those of this test.
    let harmless = BTreeSet::from(["acl", "client", "command", "config", "dbsize", "hello", "info", "ping", "select"]);
    assert!(changed.is_subset(&harmless), "{changed:?}");
    assert_eq!(object["role"], "master");
    assert_eq!((&object["backlog"]["keys"], &object["backlog"]["expires"]), (&1100.into(), &800.into()));
    assert_eq!((&object["rights"]["SCAN"], &object["rights"]["EXISTS"]), (&"yes".into(), &"yes".into()));
    assert_eq!(object["expiry"]["active_expire_effort"], 1);
    assert_eq!(object["expiry"]["lazyfree_lazy_expire"], Server::kind() == Kind::Valkey);
    assert_eq!(object["busy"]["bgsave"], false);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_estimate_is_near_the_expired_keys_that_active_expiry_leaves() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live_ttl(18_400, "ttl:").await;
    keys.expired(1_600, "expired:").await;
    server.cmd(&["DEBUG", "SET-ACTIVE-EXPIRE", "1"]).await;
    probe("the server's sample has followed", PATIENCE, async || {
        let stats = server.info("stats").await;
        stats["expired_stale_perc"].parse::<f64>().expect("a number") > 4.0
    })
    .await;

    let (object, _) = check_json(&[&server.url()]);

    let left = server.dbsize(0).await - 18_400;
    let estimate = object["backlog"]["expired"].as_u64().expect("a number");
    assert!((left / 3..=left * 2).contains(&estimate), "{estimate} for {left}");
    assert_eq!(object["backlog"]["expired_is"], "estimated");
    assert!(object["backlog"]["expired_bytes"].as_u64().expect("bytes") > estimate * 20);
    assert!(codes(&object).contains(&"estimate_may_be_low"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_tells_the_exact_backlog_and_the_master_is_left_alone() {
    let master = Server::start().await;
    Keyspace::of(&master, 0).live(2000, "live:").await;
    Keyspace::of(&master, 0).expired(3000, "expired:").await;
    Keyspace::of(&master, 3).live_ttl(100, "ttl:").await;
    Keyspace::of(&master, 3).expired(50, "expired:").await;
    Keyspace::of(&master, 5).live(10, "live:").await;
    let replica = Server::start().await;
    replica.replica_of(&master).await;

    let (object, code) = check_json(&[&master.url(), "--replica", &replica.url()]);

    assert_eq!(code, 0, "{object:#}");
    let of_db = |n: usize| {
        let db = &object["dbs"][n];
        (db["db"].as_u64().unwrap(), db["expired"].as_u64().unwrap(), db["moved"].as_u64().unwrap())
    };
    assert_eq!([of_db(0), of_db(1), of_db(2)], [(0, 3000, 0), (3, 50, 0), (5, 0, 0)]);
    assert_eq!((&object["backlog"]["expired"], &object["backlog"]["expired_is"]), (&3050.into(), &"counted".into()));
    assert_eq!(object["replicas"].as_array().expect("a list").len(), 1);
    assert!(!codes(&object).contains(&"estimate_may_be_low"));
    assert_eq!((master.expired_keys().await, master.dbsize(0).await), (0, 5000));
    assert_eq!(replica.dbsize(0).await, 5000);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_replica_of_this_master_is_counted_on() {
    let master = Server::start().await;
    Keyspace::of(&master, 0).expired(10, "expired:").await;
    let other = Server::start().await;
    Keyspace::of(&other, 0).expired(10, "expired:").await;
    let others_replica = Server::start().await;
    others_replica.replica_of(&other).await;
    let nobody = format!("redis://127.0.0.1:{}", free_port());
    for (url, why) in [
        (other.url(), "is no replica"),
        (others_replica.url(), "is a replica of another master"),
        (nobody, "cannot connect"),
    ] {
        let (object, code) = check_json(&[&master.url(), "--replica", &url]);
        assert_eq!(code, 0, "{object:#}");
        let finding = &object["findings"][0];
        assert_eq!(finding["code"], "not_counted");
        assert!(finding["message"].as_str().unwrap().contains(why), "{finding}");
        assert_eq!(object["backlog"]["expired_is"], "estimated");
    }
    // A count on a master would have freed the keys.
    assert_eq!((other.dbsize(0).await, other.expired_keys().await), (10, 0));

    let (object, code) = check_json(&[&others_replica.url()]);
    assert_eq!(code, 1, "a replica cannot be swept");
    assert_eq!(object["findings"][0]["code"], "replica");
    assert_eq!(object["master"], other.addr().to_string());
    assert_eq!(object["backlog"]["expired"], Value::Null, "a replica has no sample of its own");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_user_with_the_least_rights_learns_that_they_suffice() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(500, "expired:").await;
    let words = shell_words(&ACL_LINE.replace("PASSWORD", "secret"));
    server.cmd(&words.iter().map(String::as_str).collect::<Vec<_>>()).await;

    let (object, code) = check_json(&[&server.url_as("ttlsweep", "secret")]);

    assert_eq!(code, 0, "{object:#}");
    let verdict = object["verdict"].as_str().unwrap();
    assert!(
        verdict.ends_with(&format!("ttlsweep scan redis://ttlsweep@{}", server.addr())),
        "as the same user: {verdict}"
    );
    for right in ["SCAN", "DBSIZE", "INFO", "PING", "SELECT", "CLIENT SETNAME"] {
        assert_eq!(object["rights"][right], "yes", "{right}");
    }
    assert_eq!(object["rights"]["EXISTS"], "unknown");
    assert_eq!(object["expiry"]["lazyfree_lazy_expire"], Value::Null);
    assert_eq!(object["sweep"]["can_run"], true);
    // Even the test of the right to SCAN has visited no key.
    assert_eq!((server.dbsize(0).await, server.expired_keys().await), (500, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_right_is_found_with_and_without_dry_run() {
    let mut options = Server::options()
        .with_user("blind", "on >pw resetkeys -@all +ping +info +dbsize +select")
        .with_user("nothing", "on >pw resetkeys -@all");
    if has_dry_run() {
        options =
            options.with_user("asks", "on >pw resetkeys -@all +ping +info +dbsize +select +acl|whoami +acl|dryrun");
    }
    let server = options.start().await;
    let users: &[_] = if has_dry_run() { &["blind", "asks"] } else { &["blind"] };
    for user in users {
        let output = check(&[&server.url_as(user, "pw")]);
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("error: this user may not run SCAN, which a sweep sends"), "{text}");
        let grant = if *user == "asks" { "grant it: ACL SETUSER asks +scan\n" } else { ACL_LINE };
        assert!(text.contains(grant), "for this user, if the server names it: {text}");
    }
    let (object, code) = check_json(&[&server.url_as("nothing", "pw")]);
    assert_eq!((code, &object["server"], &object["role"]), (1, &Value::Null, &"unknown".into()));
    assert_eq!(object["rights"]["INFO"], "no");
}

/// ACL DRYRUN came with Redis 7.0, and every Valkey has it.
fn has_dry_run() -> bool {
    Server::kind() == Kind::Valkey || Server::version() >= Version(7, 0, 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_connection_and_no_password_are_exit_3_and_bad_usage_is_2() {
    let server = Server::options().with_password("right").start().await;
    let nobody = format!("redis://127.0.0.1:{}", free_port());
    let wrong = format!("redis://:hunter2@{}", server.addr());
    let bad = [server.url(), "--replica".to_owned(), "http://:hunter2@h".to_owned()];
    let (object, code) = check_json(&[&nobody]);
    assert_eq!((&object["failure"]["kind"], code), (&"cannot_connect".into(), 3));
    for (arguments, code) in [(vec![nobody], 3), (vec![wrong], 3), (bad.to_vec(), 2)] {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let output = check(&arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{error}");
        assert!(error.starts_with("error: ") && !error.contains("hunter2"), "{error}");
        assert!(output.stdout.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_replicas_password_is_not_in_the_process_list() {
    // Accepts and never answers, so that the program stays alive to be inspected.
    let silent = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let url = format!("redis://{}", silent.local_addr().expect("an address"));
    let mut program = ttlsweep();
    program.args(["check", &url, "--replica", "redis://:hunter2@127.0.0.1:1"]).stderr(Stdio::null());
    let mut child = program.spawn().expect("the program runs");
    let arguments = format!("/proc/{}/cmdline", child.id());
    if Path::new(&arguments).exists() {
        let (connection, _) = silent.accept().expect("it connects");
        let line = std::fs::read_to_string(&arguments).expect("its arguments");
        assert!(line.contains("check") && !line.contains("hunter2"), "{line}");
        drop(connection);
    }
    let _ = child.kill();
    let _ = child.wait();
}
