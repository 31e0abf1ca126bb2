//! The command line as a client of the daemon.

use serde_json::json;

use crate::support::certs::{Authority, Validity};
use crate::support::cluster::Cluster;
use crate::support::daemon::{Daemon, instance};
use crate::support::keyspace::Keyspace;
use crate::support::proxy::Proxy;
use crate::support::run::{Run, Running, run};
use crate::support::server::Server;
use crate::support::{PATIENCE, free_port, probe, ttlsweep};

async fn ask(daemon: &Daemon, args: &[&str]) -> Run {
    run(args.iter().copied().chain(["--server", daemon.url()])).await
}

#[tokio::test]
async fn a_task_is_created_followed_and_listed_from_the_command_line() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.expired(500, "expired:").await;
    keys.live_ttl(2_500, "live:").await;
    let daemon = Daemon::start(&instance("cache", &server.url(), "")).await;

    let task = ["task", "create", "cache", "--max-keys-per-sec", "2000", "--watch", "--json"];
    let run = ask(&daemon, &task).await.expect(0);
    let task = run.json();
    assert_eq!((&task["state"], &task["reclaimed"]), (&json!("succeeded"), &json!(500)));
    assert!(run.stderr.contains("keys/s") && run.stderr.contains("ETA"), "the lines of scan: {}", run.stderr);
    let id = task["id"].as_str().expect("an id");

    let list = ask(&daemon, &["task", "list", "--state", "succeeded"]).await.expect(0);
    assert!(list.stdout.contains(id) && list.stdout.contains("500"), "{}", list.stdout);
    let watched = ask(&daemon, &["task", "watch", id]).await.expect(0);
    assert!(watched.stdout.contains("succeeded"), "one that has ended is shown at once: {}", watched.stdout);
    let late = ask(&daemon, &["task", "pause", id]).await.expect(1);
    assert!(late.stderr.contains("DCS.4017: The task has ended."), "{}", late.stderr);

    let instances = ask(&daemon, &["instance", "list"]).await.expect(0);
    assert!(instances.stdout.contains("cache") && instances.stdout.contains("succeeded"), "{}", instances.stdout);
    let found =
        ask(&daemon, &["instance", "list", "--search", "CACHE", "--state", "succeeded", "--sort", "memory"]).await;
    assert!(found.expect(0).stdout.contains("cache"));
    let none = ask(&daemon, &["instance", "list", "--state", "failed", "--json"]).await.expect(0);
    assert_eq!((&none.json()["total"], &none.json()["counts"]), (&json!(0), &json!({"succeeded": 1})));
    let history = ask(&daemon, &["instance", "history", "cache", "--limit", "5"]).await.expect(0);
    assert!(history.stdout.contains(id) && history.stdout.contains("500"), "{}", history.stdout);
    let unknown = ask(&daemon, &["instance", "show", "other"]).await.expect(1);
    assert!(unknown.stderr.contains("DCS.3022: This DCS instance does not exist."), "{}", unknown.stderr);
}

/// The output of `ttlsweep check` without its figures, which change from one check to the next.
fn words(text: &str) -> Vec<String> {
    let is_figure = |word: &str| word.contains(|c: char| c.is_ascii_digit()) || ["B", "KiB", "MiB"].contains(&word);
    let lines = text.lines().map(|line| {
        let words = line.split_whitespace().map(|word| word.trim_end_matches(','));
        words.filter(|word| !is_figure(word)).collect::<Vec<_>>().join(" ")
    });
    lines.collect()
}

/// The names of all fields, nested ones included.
fn names(value: &serde_json::Value) -> serde_json::Value {
    match value {
        serde_json::Value::Object(fields) => fields.iter().map(|(name, value)| (name.clone(), names(value))).collect(),
        serde_json::Value::Array(items) => items.iter().map(names).collect(),
        _ => json!(null),
    }
}

#[tokio::test]
async fn the_check_of_an_instance_says_what_the_check_of_a_server_says() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).live_ttl(100, "live:").await;
    let cluster = Cluster::start(3, false).await;
    cluster.fill(30, 30).await;
    let replica = Server::start().await;
    replica.replica_of(&server).await;
    let gone = format!("redis://127.0.0.1:{}", free_port());
    let instances = [("cache", server.url(), 0), ("sessions", cluster.url(), 0), ("copy", replica.url(), 1)];
    let settings: String = instances.iter().map(|(id, url, _)| instance(id, url, "")).collect();
    let daemon = Daemon::start(&format!("{settings}{}", instance("gone", &gone, ""))).await;
    let (local, remote) = (run(["check", &gone]).await, ask(&daemon, &["instance", "check", "gone"]).await);
    let (local, remote) = (local.expect(3).stderr, remote.expect(3).stderr);
    assert_eq!(remote.replace("DCS.5000: ", ""), local, "what happened and what to do next");
    for (id, url, code) in &instances {
        let local = run(["check", url]).await.expect(*code);
        let remote = ask(&daemon, &["instance", "check", id]).await.expect(*code);
        // Each names its own command for a sweep.
        let local_text = local.stdout.replace(&format!("ttlsweep scan {url}"), &format!("ttlsweep task create {id}"));
        assert_eq!(words(&remote.stdout), words(&local_text));
        assert!(local.stdout.contains("verdict: "), "{}", local.stdout);
        let local = run(["check", url, "--json"]).await.expect(*code).json();
        let remote = ask(&daemon, &["instance", "check", id, "--json"]).await.expect(*code).json();
        assert_eq!(names(&remote), names(&local), "{remote:#}");
        assert_eq!(remote["target"], local["target"]);
    }
}

#[tokio::test]
async fn tasks_are_controlled_from_the_command_line() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).live_ttl(3_000, "live:").await;
    let daemon = Daemon::start(&instance("cache", &server.url(), "max-keys-per-sec = 200")).await;
    let id = daemon.scan("cache").await;
    daemon.until(&id, "running").await;
    for (order, state) in [("pause", "paused"), ("resume", "running")] {
        let run = ask(&daemon, &["task", order, &id, "--json"]).await.expect(0);
        assert_eq!(run.json()["state"], state);
    }
    let tuned = ask(&daemon, &["task", "tune", &id, "--intensity", "0.5", "--json"]).await.expect(0);
    assert_eq!(tuned.json()["settings"]["intensity"], "0.5");
    let run = ask(&daemon, &["task", "cancel", &id, "--json"]).await.expect(0);
    assert_eq!(run.json()["state"], "cancelled");

    let brief = ["task", "create", "cache", "--max-keys-per-sec", "100", "--timeout", "7s", "--watch"];
    let brief = ask(&daemon, &brief).await.expect(4);
    assert!(brief.stderr.contains("error: the time allowed (7s) was over"), "{}", brief.stderr);
    assert!(brief.stderr.contains("hint: it rested most of the time: raise --max-keys-per-sec"), "{}", brief.stderr);

    let set = ["autoscan", "set", "cache", "--first-scan-at", "2999-01-01T00:00:00Z", "--interval", "1min"];
    let rest = ["--timeout", "120", "--scan-keys-count", "30", "--json"];
    let run = ask(&daemon, &[&set[..], &rest[..]].concat()).await.expect(0);
    assert_eq!(run.json()["first_scan_at"], "2999-01-01T00:00:00.000Z");
    assert_eq!((&run.json()["interval"], &run.json()["timeout"]), (&json!(60), &json!(120)));
    let off = ask(&daemon, &["autoscan", "off", "cache"]).await.expect(0);
    assert!(off.stdout.contains("2999-01-01T00:00:00.000Z"), "what was set is kept: {}", off.stdout);
    let bad = ["autoscan", "set", "cache", "--first-scan-at", "2020-01-01T00:00:00Z", "--interval", "60"];
    let bad = ask(&daemon, &[&bad[..], &rest[..]].concat()).await.expect(2);
    assert!(bad.stderr.contains("DCS.4819"), "{}", bad.stderr);
}

#[tokio::test]
async fn a_daemon_that_is_not_there_is_said_in_one_line() {
    let port = free_port();
    let run = run(["task", "list", "--server", &format!("http://127.0.0.1:{port}")]).await.expect(3);
    assert!(run.stderr.starts_with("error: cannot reach the daemon at http://127.0.0.1:"), "{}", run.stderr);
    assert!(run.stderr.contains("Connection refused"), "{}", run.stderr);
    assert!(run.stderr.contains("hint: is `ttlsweep serve` running there"), "{}", run.stderr);
}

#[tokio::test]
async fn health_tells_a_daemon_that_is_well_from_one_that_is_not_and_from_none() {
    let other = axum::Router::new().route("/healthz", axum::routing::get(async || "I am well"));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, other).await });
    assert_eq!(run(["health", "--server", &url]).await.expect(0).stdout, "ok\n");
    let unwell = run(["health", "--ready", "--server", &url]).await.expect(1);
    assert!(unwell.stderr.contains("answered 404"), "{}", unwell.stderr);
    let gone = run(["health", "--server", &format!("127.0.0.1:{}", free_port())]).await.expect(3);
    assert!(gone.stderr.contains("Connection refused"), "{}", gone.stderr);
}

#[tokio::test]
async fn a_client_without_system_certificates_can_use_a_daemon_without_tls() {
    let daemon = Daemon::start("").await;
    for what in [&["instance", "list"][..], &["health"]] {
        let mut command = ttlsweep();
        command.args(what).args(["--server", daemon.url()]).env("SSL_CERT_FILE", "/dev/null");
        let run = tokio::task::spawn_blocking(move || command.output().expect("it runs")).await.expect("no panic");
        assert!(run.status.success(), "{what:?}: {}", String::from_utf8_lossy(&run.stderr));
    }
}

#[tokio::test]
async fn a_server_of_something_else_is_no_daemon() {
    let other = axum::Router::new().route("/api/v1/instances", axum::routing::get(async || "<html>hello</html>"));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, other).await });
    for what in [["task", "list"], ["instance", "list"]] {
        let run = run(what.into_iter().chain(["--server", &url])).await.expect(3);
        assert!(run.stderr.contains("hint: is that a `ttlsweep serve`"), "{}", run.stderr);
    }
}

#[tokio::test]
async fn a_task_is_followed_through_a_restart_of_the_daemon() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).live_ttl(5_000, "live:").await;
    let mut daemon = Daemon::start_at(free_port(), &instance("cache", &server.url(), "max-keys-per-sec = 1000")).await;
    let id = daemon.scan("cache").await;
    daemon.until(&id, "running").await;
    let server_flag = daemon.authority().to_owned();
    let watching = Running::start(["task", "watch", &id, "--server", &server_flag, "--json"]);
    watching.says("keys/s").await;
    daemon.restart().await;
    daemon.until(&id, "running").await;
    daemon.hurry(&id).await;
    let run = watching.end().await.expect(0);
    assert_eq!(run.json()["state"], "succeeded");
}

#[tokio::test]
async fn the_api_speaks_tls_to_those_who_trust_its_authority() {
    let authority = Authority::new();
    let identity = authority.issue("daemon", &["127.0.0.1"], Validity::Now);
    let settings = format!(
        "[api]\nlisten = \"127.0.0.1:0\"\ntls-cert = \"{}\"\ntls-key = \"{}\"\n",
        identity.cert.display(),
        identity.key.display()
    );
    let daemon = Daemon::start(&settings).await;
    assert!(daemon.url().starts_with("https://"));
    let ca = authority.cacert();
    let ca = ca.to_str().expect("a path");
    ask(&daemon, &["instance", "list", "--ca-file", ca]).await.expect(0);
    // The health check sends no secret, so the certificate may be for another name.
    ask(&daemon, &["health", "--ready"]).await.expect(0);
    let stranger = ask(&daemon, &["instance", "list"]).await.expect(3);
    assert!(stranger.stderr.contains("invalid peer certificate"), "{}", stranger.stderr);
    assert!(stranger.stderr.contains("hint: name the authority"), "{}", stranger.stderr);
    let plain = daemon.url().replace("https", "http");
    run(["instance", "list", "--server", &plain]).await.expect(3);
    // A renewed certificate is used after a reload; it has another authority, so that the test can tell the difference.
    let other = Authority::new();
    let renewed = other.issue("renewed", &["127.0.0.1"], Validity::Now);
    std::fs::copy(&renewed.cert, &identity.cert).expect("the file is replaced");
    std::fs::copy(&renewed.key, &identity.key).expect("the file is replaced");
    daemon.signal("HUP");
    let new_ca = other.cacert();
    let new_ca = new_ca.to_str().expect("a path");
    probe("the new certificate is shown", PATIENCE, async || {
        ask(&daemon, &["instance", "list", "--ca-file", new_ca]).await.code == Some(0)
    })
    .await;
    ask(&daemon, &["instance", "list", "--ca-file", ca]).await.expect(3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_followed_task_ends_with_the_code_that_scan_would_end_with() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.expired(3_000, "expired:").await;
    let proxy = Proxy::start(server.addr()).await;
    let pace = "max-keys-per-sec = 1000\nthrottle = false\nretry-for = \"10ms\"";
    let daemon = Daemon::start(&instance("cache", &proxy.url(), pace)).await;
    let id = daemon.scan("cache").await;
    probe("it sweeps", PATIENCE, async || server.expired_keys().await > 200).await;
    let watching = Running::start(["task", "watch", &id, "--server", daemon.url()]);
    watching.says("keys/s").await;
    probe("it fails", PATIENCE, async || {
        // The sampler's connection may get the garbage instead, which is harmless.
        proxy.garbage(b"\0what?\r\n");
        daemon.task(&id).await["state"] == "failed"
    })
    .await;
    let again = ask(&daemon, &["task", "watch", &id]).await;
    for watched in [watching.end().await, again] {
        // 3 would mean that nothing was swept.
        let watched = watched.expect(1);
        assert!(watched.stderr.contains("not a valid reply"), "{}", watched.stderr);
    }
}
