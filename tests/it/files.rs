//! The TLS files that a daemon's settings name: problems are found before the files are needed, and errors are clear if they disappear
//! while it runs.

use std::path::Path;

use serde_json::json;

use crate::support::certs::{Authority, Validity};
use crate::support::daemon::{Daemon, EACH_SECOND, instance};
use crate::support::keyspace::Keyspace;
use crate::support::run::{Run, run};
use crate::support::server::Server;
use crate::support::{PATIENCE, free_port, probe, ttlsweep};

fn file(path: &Path) -> &str {
    path.to_str().expect("a path")
}

async fn check(text: &str) -> Run {
    let settings = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(settings.path(), text).expect("it is written");
    let mut run = run(["settings", "check", file(settings.path())]).await;
    run.stderr = run.stderr.replace(file(settings.path()), "s.toml");
    run
}

#[tokio::test]
async fn every_tls_file_that_cannot_be_used_is_named_with_its_line() {
    let authority = Authority::new();
    let one = authority.issue("one", &["localhost"], Validity::Now);
    let other = authority.issue("other", &["localhost"], Validity::Now);
    let (cert, key, foreign) = (file(&one.cert), file(&one.key), file(&other.key));
    let text = format!(
        "[api]\ntls-cert = \"{key}\"\ntls-key = \"{cert}\"\n\
         [[instances]]\nid = \"a\"\nproject_id = \"p\"\nurl = \"rediss://a\"\ncacert = \"/nonexistent/ca.pem\"\n\
         cert = \"{key}\"\nkey = \"/nonexistent/key.pem\"\n\
         [[instances]]\nid = \"b\"\nproject_id = \"p\"\nurl = \"rediss://b\"\ncert = \"{cert}\"\nkey = \"{foreign}\"\n\
         insecure = true\n\
         [[instances]]\nid = \"c\"\nproject_id = \"p\"\nurl = \"redis://c\"\ncolour = \"red\"\n"
    );
    let run = check(&text).await.expect(2);
    for problem in [
        format!("s.toml:2: tls-cert: cannot read a certificate from {key}: "),
        format!("s.toml:3: tls-key: cannot read a private key from {cert}: "),
        "s.toml:8: cacert: cannot read a certificate from /nonexistent/ca.pem: ".to_owned(),
        format!("s.toml:9: cert: cannot read a certificate from {key}: "),
        "s.toml:10: key: cannot read a private key from /nonexistent/key.pem: ".to_owned(),
        format!("s.toml:16: key: {foreign}: "),
        "s.toml:22: `colour` is not a setting".to_owned(),
    ] {
        assert!(run.stderr.contains(&problem), "{problem}\n{}", run.stderr);
    }
    assert_eq!(run.stderr.matches("it must be a PEM file").count(), 5, "{}", run.stderr);

    let pair = format!("[api]\ntls-cert = \"{cert}\"\ntls-key = \"{foreign}\"\n");
    let run = check(&pair).await.expect(2);
    assert!(run.stderr.contains("s.toml:3: tls-key: "), "{}", run.stderr);
    let good = format!("[api]\ntls-cert = \"{cert}\"\ntls-key = \"{key}\"\n");
    check(&good).await.expect(0);
}

/// A server that speaks TLS as well as plain RESP, and the authority of its certificate.
struct Encrypted {
    server: Server,
    authority: Authority,
    port: u16,
}

impl Encrypted {
    async fn start() -> Self {
        let authority = Authority::new();
        let identity = authority.issue("server", &["127.0.0.1"], Validity::Now);
        let port = free_port();
        let options = Server::options()
            .with_config("tls-port", &port.to_string())
            .with_config("tls-cert-file", file(&identity.cert))
            .with_config("tls-key-file", file(&identity.key))
            .with_config("tls-ca-cert-file", file(&authority.cacert()))
            .with_config("tls-auth-clients", "no");
        Self { server: options.start().await, authority, port }
    }

    fn settings(&self, more: &str) -> String {
        let cacert = format!("cacert = \"{}\"\nmax-keys-per-sec = 500\n{more}", file(&self.authority.cacert()));
        instance("cache", &format!("rediss://127.0.0.1:{}", self.port), &cacert)
    }

    /// Moves the file away, and returns a function that moves it back.
    fn hide(&self) -> impl Fn() + use<> {
        let (here, away) = (self.authority.cacert(), self.authority.cacert().with_extension("away"));
        std::fs::rename(&here, &away).expect("it is renamed");
        move || std::fs::rename(&away, &here).expect("it is renamed back")
    }
}

#[tokio::test]
async fn a_file_that_goes_away_is_named_to_callers_and_the_task_that_needs_it_is_not_lost() {
    if !Server::has_tls() {
        return;
    }
    let encrypted = Encrypted::start().await;
    Keyspace::of(&encrypted.server, 0).expired(300, "expired:").await;
    Keyspace::of(&encrypted.server, 0).live_ttl(3_000, "live:").await;
    let mut daemon = Daemon::start(&encrypted.settings("")).await;
    let bring_back = encrypted.hide();
    let path = encrypted.authority.cacert();
    let path = file(&path);
    for answer in [
        daemon.post(&Daemon::path("cache", "scan-expire-keys-task")).await,
        daemon
            .send(daemon.request(reqwest::Method::POST, "/api/v1/tasks").json(&json!({"instance_id": "cache"})))
            .await,
    ] {
        assert_eq!(answer.code(), (503, "DCS.5000"));
        let message = answer.body["error_msg"].as_str().expect("a text").to_owned();
        assert!(message.contains("cacert: cannot read a certificate from") && message.contains(path), "{message}");
    }
    let check = daemon.post("/api/v1/instances/cache/check").await;
    assert_eq!(check.code(), (502, "DCS.5000"));
    assert!(check.body["error_msg"].as_str().expect("a text").starts_with("cacert: "), "{}", check.body);
    assert_eq!(daemon.history("cache").await["count"], 0, "no record of what never was");
    let reload = daemon.post("/api/v1/reload").await;
    assert_eq!(reload.code(), (400, "DCS.4800"), "a reload takes in nothing that cannot be used: {}", reload.body);

    bring_back();
    let id = daemon.scan("cache").await;
    probe("it has freed something", PATIENCE, async || daemon.task(&id).await["reclaimed"] != json!(0)).await;
    daemon.kill9();
    let bring_back = encrypted.hide();
    // A daemon with unusable settings does not start, so it does not fail any task.
    let refused = ttlsweep().args(["serve", "--config"]).arg(daemon.settings_path()).output().expect("it runs");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("cacert: cannot read a certificate from"), "{said}");
    bring_back();
    daemon.restart().await;
    daemon.until(&id, "running").await;
    daemon.hurry(&id).await;
    let task = daemon.until(&id, "succeeded").await;
    let counted = task["reclaimed"].as_u64().expect("a number");
    // At 500 keys a second a batch has 50 keys at most; the batch under way at the kill may be uncounted.
    assert!((200..=300).contains(&counted), "{task:#}");
    assert_eq!(encrypted.server.expired_keys().await, 300);
}

#[tokio::test]
async fn a_due_scan_whose_file_is_gone_is_on_record_as_failed_once_for_each_due_time() {
    if !Server::has_tls() {
        return;
    }
    let encrypted = Encrypted::start().await;
    let daemon = Daemon::start(&encrypted.settings(EACH_SECOND)).await;
    let bring_back = encrypted.hide();
    let failed = async || daemon.get("/api/v1/tasks?state=failed").await.ok();
    probe("a due scan has failed", PATIENCE, async || failed().await["count"] != json!(0)).await;
    let task = failed().await["tasks"][0].clone();
    assert_eq!((&task["cause"], &task["reclaimed"]), (&json!("schedule"), &json!(0)));
    let message = task["failure"]["message"].as_str().expect("a text");
    assert!(message.contains("cacert: cannot read a certificate from"), "{message}");
    assert!(task["failure"]["hint"].is_string(), "{task}");
    bring_back();
    probe("the next one runs", PATIENCE, async || {
        daemon.get("/api/v1/tasks?state=succeeded").await.ok()["count"] != json!(0)
    })
    .await;
    let all = daemon.get("/api/v1/tasks?limit=1000").await.ok();
    let mut seconds: Vec<_> = all["tasks"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|task| task["created_at"].as_str().expect("a time")[..19].to_owned())
        .collect();
    let tasks = seconds.len();
    seconds.dedup();
    assert_eq!(seconds.len(), tasks, "one for each due time");
}
