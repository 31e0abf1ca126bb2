//! The DCS contract, line by line, against a daemon with a real server behind it.

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::daemon::{Daemon, PROJECT, instance};
use crate::support::free_port;
use crate::support::keyspace::Keyspace;
use crate::support::server::Server;

const EXPIRED: u64 = 3_000;

fn fields(record: &Value) -> BTreeSet<&str> {
    record.as_object().expect("an object").keys().map(String::as_str).collect()
}

#[tokio::test]
async fn a_scan_is_on_record_from_its_request_on_and_frees_exactly_the_expired_keys() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.expired(EXPIRED, "expired:").await;
    keys.live_ttl(2_000, "live:").await;
    let daemon = Daemon::start(&instance("cache", &server.url(), "")).await;

    for (n, call) in ["scan-expire-keys-task", "auto-expire/scan"].into_iter().enumerate() {
        let record = daemon.post(&Daemon::path("cache", call)).await.ok();
        assert_eq!(fields(&record), BTreeSet::from(["id", "instance_id", "status", "scan_type", "created_at"]));
        assert_eq!((&record["instance_id"], &record["status"]), (&json!("cache"), &json!("waiting")));
        assert_eq!(record["scan_type"], "manual");
        let history = daemon.history("cache").await;
        assert_eq!(history["records"][0]["id"], record["id"], "newest first, and at once");
        assert_eq!(history["count"], n + 1);

        let task = daemon.until(record["id"].as_str().expect("an id"), "succeeded").await;
        let expected = if n == 0 { EXPIRED } else { 0 };
        assert_eq!(task["reclaimed"], expected);
    }
    let history = daemon.history("cache").await;
    assert_eq!(fields(&history), BTreeSet::from(["records", "instance_id", "total", "count"]));
    assert_eq!((&history["total"], &history["count"]), (&json!(EXPIRED), &json!(2)));
    let oldest = &history["records"][1];
    assert_eq!((&oldest["num"], &oldest["status"]), (&json!(EXPIRED), &json!("success")));
    for time in ["created_at", "started_at", "finished_at"] {
        let text = oldest[time].as_str().expect("a time");
        assert!(text.len() == 24 && text.ends_with('Z') && text.as_bytes()[19] == b'.', "{text}");
    }
    assert_eq!(keys.dbsize().await, 2_000);
}

#[tokio::test]
async fn a_history_has_pages_and_filters() {
    let server = Server::start().await;
    let daemon = Daemon::start(&instance("cache", &server.url(), "")).await;
    let empty = daemon.history("cache").await;
    assert_eq!(empty, json!({"records": [], "instance_id": "cache", "total": 0, "count": 0}));
    let mut ids = Vec::new();
    for _ in 0..3 {
        let id = daemon.scan("cache").await;
        daemon.until(&id, "succeeded").await;
        ids.push(id);
    }
    let page = daemon.get(&Daemon::path("cache", "auto-expire/histories?offset=1&limit=1")).await.ok();
    assert_eq!(page["records"].as_array().expect("a list").len(), 1);
    assert_eq!((&page["records"][0]["id"], &page["count"]), (&json!(ids[1]), &json!(3)));
    let failed = daemon.get(&Daemon::path("cache", "auto-expire/histories?status=failed")).await.ok();
    assert_eq!((&failed["records"], &failed["count"]), (&json!([]), &json!(0)));
    for bad in ["offset=-1", "limit=0", "limit=1001", "limit=ten", "status=done"] {
        let answer = daemon.get(&Daemon::path("cache", &format!("auto-expire/histories?{bad}"))).await;
        assert_eq!(answer.code(), (400, "DCS.4800"), "{bad}: {}", answer.body);
    }
}

#[tokio::test]
async fn one_scan_at_a_time_and_every_error_in_the_contracts_form() {
    let (server, replica) = (Server::start().await, Server::start().await);
    replica.replica_of(&server).await;
    Keyspace::of(&server, 0).live_ttl(5_000, "live:").await;
    let nowhere = format!("redis://127.0.0.1:{}", free_port());
    let settings = [
        instance("slow", &server.url(), "max-keys-per-sec = 100"),
        instance("replica", &replica.url(), ""),
        instance("nowhere", &nowhere, ""),
    ]
    .concat();
    let daemon = Daemon::start(&settings).await;

    let id = daemon.scan("slow").await;
    for call in ["scan-expire-keys-task", "auto-expire/scan"] {
        let second = daemon.post(&Daemon::path("slow", call)).await;
        assert_eq!(second.code(), (400, "DCS.4017"));
        assert_eq!(second.body["error_msg"], "This DCS instance job task is still running.");
        assert_eq!(second.body["error_ext_msg"], Value::Null);
    }
    daemon.post(&format!("/api/v1/tasks/{id}/cancel")).await.ok();
    assert_eq!(daemon.history("slow").await["records"][0]["status"], "failed", "cancelled reads failed");

    let refused = daemon.post(&Daemon::path("replica", "scan-expire-keys-task")).await;
    assert_eq!(refused.code(), (400, "DCS.4818"));
    assert_eq!(daemon.history("replica").await["count"], 0);

    let unreachable = daemon.scan("nowhere").await;
    let task = daemon.until(&unreachable, "failed").await;
    assert_eq!(task["failure"]["kind"], "cannot_connect");

    let not_here = daemon.post(&Daemon::path("other", "scan-expire-keys-task")).await;
    assert_eq!(not_here.code(), (404, "DCS.3022"));
    let other_project = daemon.get("/v2/other/instances/slow/auto-expire/histories").await;
    assert_eq!(other_project.code(), (404, "DCS.3022"));
    assert_eq!(daemon.get("/v2/nothing/here").await.code(), (404, "DCS.4001"));
    let method = daemon.send(daemon.request(Method::DELETE, &Daemon::path("slow", "auto-expire/scan"))).await;
    assert_eq!(method.code(), (405, "DCS.5001"));
    let long = daemon.request(Method::PUT, &config_path()).body(vec![b' '; 100_000]);
    assert_eq!(daemon.send(long).await.code(), (413, "DCS.4005"));
}

fn config_path() -> String {
    Daemon::path("cache", "scan-expire-keys/autoscan-config")
}

#[tokio::test]
async fn a_configuration_is_checked_kept_and_survives_a_restart() {
    let server = Server::start().await;
    let mut daemon = Daemon::start(&instance("cache", &server.url(), "")).await;
    let unset = daemon.get(&config_path()).await.ok();
    let defaults = json!({"instance_id": "cache", "enable_auto_scan": false, "interval": 86_400, "timeout": 172_800,
        "scan_keys_count": 50});
    assert_eq!(unset, defaults);

    let wanted = json!({"enable_auto_scan": true, "first_scan_at": "2999-06-15T02:21:18.669", "interval": 3600,
        "timeout": 7200, "scan_keys_count": 1000});
    let set = daemon.put(&config_path(), &wanted).await.ok();
    assert_eq!(set["first_scan_at"], "2999-06-15T02:21:18.669Z");
    assert!(set["updated_at"].is_string());
    assert_eq!(daemon.get(&config_path()).await.ok(), set);

    let mut late = wanted.clone();
    late["timeout"] = json!(7199);
    assert_eq!(daemon.put(&config_path(), &late).await.code(), (400, "DCS.4821"));
    let empty = daemon.send(daemon.request(Method::PUT, &config_path())).await;
    assert_eq!(empty.code(), (400, "DCS.4004"));
    let broken = daemon.send(daemon.request(Method::PUT, &config_path()).body("{")).await;
    assert_eq!(broken.code(), (400, "DCS.4005"));
    assert_eq!(daemon.get(&config_path()).await.ok(), set, "what was refused changed nothing");

    let off = daemon.put(&config_path(), &json!({"enable_auto_scan": false, "interval": 60})).await.ok();
    assert_eq!((&off["enable_auto_scan"], &off["interval"]), (&json!(false), &json!(3600)));
    assert_eq!(off["first_scan_at"], set["first_scan_at"]);
    daemon.restart().await;
    assert_eq!(daemon.get(&config_path()).await.ok(), off);
}

#[tokio::test]
async fn what_an_instance_left_behind_in_one_project_is_not_the_next_projects() {
    let server = Server::start().await;
    let settings = instance("cache", &server.url(), "");
    let mut daemon = Daemon::start(&settings).await;
    let id = daemon.scan("cache").await;
    daemon.until(&id, "succeeded").await;
    let wanted = json!({"enable_auto_scan": true, "first_scan_at": "2999-06-15T02:21:18.669Z", "interval": 3600,
        "timeout": 7200, "scan_keys_count": 1000});
    daemon.put(&config_path(), &wanted).await.ok();
    let seen = async |daemon: &Daemon, project: &str| {
        let path = format!("/v2/{project}/instances/cache");
        let history = daemon.get(&format!("{path}/auto-expire/histories")).await.ok();
        let config = daemon.get(&format!("{path}/scan-expire-keys/autoscan-config")).await.ok();
        let shown = daemon.get("/api/v1/instances/cache").await.ok();
        (history["count"] == 1, config["enable_auto_scan"] == true, shown["latest"]["id"] == json!(id))
    };
    assert_eq!(seen(&daemon, PROJECT).await, (true, true, true));
    daemon.write_settings(&settings.replace(PROJECT, "another"));
    daemon.restart().await;
    assert_eq!(seen(&daemon, "another").await, (false, false, false));
    daemon.write_settings(&settings);
    daemon.restart().await;
    assert_eq!(seen(&daemon, PROJECT).await, (true, true, true), "and it is there where it belongs");
}

/// Tokens named after their roles; `{hash of ...}` is filled in.
const TOKENS: &str = r#"
[api]
listen = "127.0.0.1:0"
[[api.tokens]]
name = "operator"
role = "operator"
projects = ["*"]
sha256 = "{hash of operator}"
[[api.tokens]]
name = "reader"
role = "reader"
projects = ["0123456789abcdef0123456789abcdef"]
sha256 = "{hash of reader}"
[[api.tokens]]
name = "former"
role = "operator"
projects = ["*"]
sha256 = "{hash of former}"
expires = "2020-01-01T00:00:00Z"
"#;

fn hash(token: &str) -> String {
    use sha2::{Digest, Sha256};
    crate::support::hex(&Sha256::digest(token.as_bytes()))
}

fn with_tokens(instance: &str) -> String {
    let fill = |text: String, token: &str| text.replace(&format!("{{hash of {token}}}"), &hash(token));
    ["operator", "reader", "former"].iter().fold(TOKENS.to_owned(), |text, token| fill(text, token)) + instance
}

#[tokio::test]
async fn a_token_that_is_taken_away_reads_no_further_events() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).live_ttl(5_000, "live:").await;
    let settings = with_tokens(&instance("slow", &server.url(), "max-keys-per-sec = 100"));
    let daemon = Daemon::start(&settings).await.with_token("operator");
    let id = daemon.scan("slow").await;
    daemon.until(&id, "running").await;
    let events = format!("/api/v1/tasks/{id}/events");
    let mut stream = daemon.request(Method::GET, &events).send().await.expect("a stream");
    assert!(stream.chunk().await.expect("it is open").is_some());
    daemon.write_settings(&settings.replace(&hash("operator"), &hash("another")));
    daemon.post("/api/v1/reload").await.ok();
    while stream.chunk().await.expect("it ends in order").is_some() {}
    assert_eq!(daemon.get(&events).await.code(), (401, "DCS.1001"));
    assert_eq!(daemon.with_token("another").task(&id).await["state"], "running", "the task itself goes on");
}

#[tokio::test]
async fn callers_are_known_by_their_token_and_may_do_what_their_role_allows() {
    let server = Server::start().await;
    let daemon = Daemon::start(&with_tokens(&instance("cache", &server.url(), ""))).await;
    let history = Daemon::path("cache", "auto-expire/histories");
    let scan = Daemon::path("cache", "scan-expire-keys-task");
    let ask = async |token: &str, method: Method, path: &str| {
        let answer = daemon.send(daemon.request(method, path).header("X-Auth-Token", token)).await;
        (answer.status.as_u16(), answer.body["error_code"].as_str().unwrap_or("").to_owned())
    };
    let answer = |status, code: &str| (status, code.to_owned());
    assert_eq!(daemon.get(&history).await.code(), (401, "DCS.1003"));
    assert_eq!(ask("wrong", Method::GET, &history).await, answer(401, "DCS.1001"));
    assert_eq!(ask("former", Method::GET, &history).await, answer(401, "DCS.1002"));
    assert_eq!(ask("reader", Method::GET, &history).await, answer(200, ""));
    assert_eq!(ask("reader", Method::POST, &scan).await, answer(403, "DCS.2003"));
    let other = "/v2/other/instances/cache/auto-expire/histories";
    assert_eq!(ask("reader", Method::GET, other).await, answer(401, "DCS.1004"));
    assert_eq!(ask("operator", Method::GET, other).await, answer(404, "DCS.3022"));
    assert_eq!(ask("operator", Method::POST, &scan).await, answer(200, ""));
    assert_eq!(ask("reader", Method::POST, "/api/v1/reload").await, answer(403, "DCS.2003"));
    assert_eq!(ask("reader", Method::GET, "/metrics").await, answer(403, "DCS.2003"), "it tells of all projects");
    let figures = daemon.request(Method::GET, "/metrics").header("X-Auth-Token", "operator").send().await;
    assert_eq!(figures.expect("an answer").status(), 200);
    let bearer = daemon.send(daemon.request(Method::GET, &history).bearer_auth("reader")).await;
    assert_eq!(bearer.status, 200);
    daemon.get("/healthz").await.ok();
    daemon.get("/readyz").await.ok();
    assert!(!daemon.log().contains(&hash("operator")) && !daemon.log().contains("X-Auth-Token"));
}

#[tokio::test]
async fn without_credentials_a_listener_for_others_is_refused() {
    let daemon = Daemon::prepare("[api]\nlisten = \"0.0.0.0:0\"\n");
    let path = daemon.settings_path();
    let run = crate::support::run::run(["serve", "--config", path.to_str().expect("a path")]).await.expect(2);
    assert!(run.stderr.contains("no credentials are configured"), "{}", run.stderr);
}

#[tokio::test]
async fn without_credentials_other_sites_are_refused() {
    let server = Server::start().await;
    let daemon = Daemon::start(&instance("cache", &server.url(), "")).await;
    let path = Daemon::path("cache", "scan-expire-keys-task");
    for (name, value) in [("Origin", "http://evil.example"), ("Host", "evil.example")] {
        let answer = daemon.send(daemon.request(Method::POST, &path).header(name, value)).await;
        assert_eq!(answer.code(), (403, "DCS.2003"), "{name}");
    }
    assert_eq!(daemon.history("cache").await["count"], 0, "nothing was begun");
}
