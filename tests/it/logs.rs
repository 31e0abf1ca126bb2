//! What the daemon logs: JSON objects for log collectors, and never a secret or the name of a key.

use std::process::Command;

use reqwest::Method;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::daemon::{Daemon, instance};
use crate::support::keyspace::Keyspace;
use crate::support::server::Server;
use crate::support::{PATIENCE, free_port, probe, ttlsweep};

/// Every secret that the test's daemon gets from its settings or from a caller.
const PASSWORD: &str = "pw-of-the-server-5f1c";
const WRONG_PASSWORD: &str = "pw-that-is-wrong-77ab";
const URL_PASSWORD: &str = "pw-inside-a-url-93de";
const TOKEN: &str = "token-of-a-caller-40aa";
const UNKNOWN_TOKEN: &str = "token-of-nobody-8c2e";
const SIGNING_KEY: &str = "sk-of-an-sdk-e7b1";
const SECRETS: [&str; 6] = [PASSWORD, WRONG_PASSWORD, URL_PASSWORD, TOKEN, UNKNOWN_TOKEN, SIGNING_KEY];
/// The prefix of all keys.
const KEY_NAMES: &str = "customer-4711:";

/// The settings, with more lines for the first instance.
fn settings(server: &Server, refused: &Server, wrong: &str, more: &str) -> String {
    let sha256 = crate::support::hex(&Sha256::digest(TOKEN));
    let api = format!(
        "[api]\nlisten = \"127.0.0.1:0\"\n\
         [[api.tokens]]\nname = \"ops\"\nrole = \"operator\"\nprojects = [\"*\"]\nsha256 = \"{sha256}\"\n\
         [[api.keys]]\nname = \"sdk\"\nrole = \"reader\"\nprojects = [\"*\"]\naccess = \"AKEXAMPLE\"\n\
         secret-env = \"SK_OF_THE_TEST\"\n"
    );
    let url = format!("redis://{}", server.addr());
    let by_url = format!("redis://:{URL_PASSWORD}@127.0.0.1:{}", free_port());
    [
        api,
        instance("cache", &url, &format!("password-env = \"PW_OF_THE_TEST\"\n{more}")),
        instance("refused", &format!("redis://{}", refused.addr()), &format!("password-file = \"{wrong}\"")),
        instance("nowhere", &by_url, "retry-for = \"1s\""),
    ]
    .concat()
}

fn with_secrets(mut command: Command) -> Command {
    command.env("PW_OF_THE_TEST", PASSWORD).env("SK_OF_THE_TEST", SIGNING_KEY);
    // Everything, from every crate.
    command.env("TTLSWEEP_LOG", "trace").env("TTLSWEEP_LOG_FORMAT", "json");
    command
}

#[tokio::test]
async fn a_log_of_everything_is_json_and_holds_no_secret_and_no_key_name() {
    let server = Server::options().with_password(PASSWORD).start().await;
    let refused = Server::options().with_password("another-one").start().await;
    let keys = Keyspace::of(&server, 0);
    keys.expired(200, KEY_NAMES).await;
    keys.live_ttl(800, KEY_NAMES).await;
    let wrong = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(wrong.path(), WRONG_PASSWORD).expect("it is written");
    let wrong = wrong.path().to_str().expect("a path").to_owned();
    let good = settings(&server, &refused, &wrong, "touch = \"ttl\"\nmax-keys-per-sec = 300");
    let mut daemon = Daemon::prepare(&good).launched(with_secrets).await.with_token(TOKEN);
    let mut said = Vec::new();

    let id = daemon.scan("cache").await;
    daemon.until(&id, "running").await;
    daemon.restart_as(with_secrets).await;
    said.push(daemon.until(&id, "succeeded").await);
    for id in ["refused", "nowhere"] {
        let answer = daemon.post(&Daemon::path(id, "scan-expire-keys-task")).await;
        let task = answer.body["id"].as_str().map(str::to_owned);
        said.push(answer.body);
        if let Some(task) = task {
            said.push(daemon.until(&task, "failed").await);
        }
    }
    for id in ["cache", "refused", "nowhere"] {
        said.push(daemon.post(&format!("/api/v1/instances/{id}/check")).await.body);
    }
    for path in ["/api/v1/instances", "/api/v1/tasks", "/openapi.json"] {
        said.push(daemon.get(path).await.body);
    }
    let url = format!("{}/api/v1/tasks", daemon.url());
    let http = reqwest::Client::builder().no_proxy().build().expect("a client");
    let ask = |header: &str, value: String| daemon.send(http.request(Method::GET, &url).header(header, value));
    let signature = format!("SDK-HMAC-SHA256 Access=AKEXAMPLE, SignedHeaders=x-sdk-date, Signature={}", "0".repeat(64));
    for (header, value) in [
        ("X-Auth-Token", UNKNOWN_TOKEN.to_owned()),
        ("Authorization", format!("Bearer {UNKNOWN_TOKEN}")),
        ("Authorization", signature),
    ] {
        let answer = ask(header, value).await;
        assert_eq!(answer.status, 401, "{}", answer.body);
        said.push(answer.body);
    }
    // A refused reload logs the problems; an accepted one logs what it applied.
    daemon.write_settings(&settings(&server, &refused, &wrong, "url = 5"));
    said.push(daemon.post("/api/v1/reload").await.body);
    daemon.write_settings(&good);
    said.push(daemon.post("/api/v1/reload").await.ok());
    said.push(Value::String(daemon.figures().await));
    assert_eq!(daemon.stop().await, Some(0));

    let log = daemon.log();
    let lines: Vec<Value> =
        log.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect();
    let messages = |what: &str| lines.iter().filter(|line| line["message"] == what).count();
    assert_eq!((messages("listening"), messages("stopped")), (2, 1), "{log}");
    for line in &lines {
        assert!(line["timestamp"].is_string() && line["level"].is_string() && line["target"].is_string(), "{line}");
    }
    assert!(lines.iter().any(|line| line["level"] == "TRACE"), "everything is logged");
    let answers = Value::from(said).to_string();
    for secret in SECRETS.into_iter().chain([KEY_NAMES]) {
        assert!(!answers.contains(secret), "the API says `{secret}`");
        if let Some(line) = log.lines().find(|line| line.contains(secret)) {
            panic!("the log says `{secret}`: {line}");
        }
    }
}

#[tokio::test]
async fn a_daemon_that_cannot_start_says_so_in_the_same_form() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("s.toml");
    let serve = |text: &str| {
        std::fs::write(&path, text).expect("it is written");
        let run = ttlsweep().args(["serve", "--log-format", "json", "--config"]).arg(&path).output().expect("it runs");
        let log = String::from_utf8(run.stderr).expect("text");
        let lines: Vec<Value> =
            log.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect();
        assert!(run.stdout.is_empty(), "nothing beside the log");
        (run.status.code(), lines)
    };
    let (code, lines) = serve("[api]\nlisten = 5\nnonsense = 1\n");
    assert_eq!((code, lines.len()), (Some(2), 2), "{lines:?}");
    assert_eq!(lines[0]["level"], "ERROR");
    assert!(lines[0]["problem"].as_str().expect("a text").contains("s.toml:2: listen"), "{lines:?}");
    let (code, lines) = serve("[api]\nlisten = \"127.0.0.1:0\"\n[store]\npath = \"/nonexistent/store.db\"\n");
    assert_eq!((code, lines.len()), (Some(1), 1), "{lines:?}");
    assert!(lines[0]["message"].as_str().expect("a text").contains("/nonexistent/store.db"), "{lines:?}");
}

#[tokio::test]
async fn without_a_wish_the_log_is_for_people_and_says_what_happens() {
    let server = Server::start().await;
    let nowhere = format!("redis://127.0.0.1:{}", free_port());
    let settings = [instance("cache", &server.url(), ""), instance("nowhere", &nowhere, "")];
    let daemon = Daemon::start(&settings.concat()).await;
    let id = daemon.scan("cache").await;
    daemon.until(&id, "succeeded").await;
    probe("the end is logged", PATIENCE, async || daemon.log().contains("task ended")).await;
    let log = daemon.log();
    for what in ["task created", "sweep begun", "sweep complete", "task ended"] {
        let line = log.lines().find(|line| line.contains(what)).unwrap_or_else(|| panic!("no `{what}`: {log}"));
        assert!(line.contains(&id) && line.contains("cache"), "{line}");
    }
    let gone = daemon.scan("nowhere").await;
    daemon.until(&gone, "failed").await;
    probe("the failure is logged", PATIENCE, async || daemon.log().contains("task ended: cannot connect")).await;
    assert!(log.lines().all(|line| !line.starts_with('{')) && log.contains(" INFO ttlsweep::"), "{log}");
    assert_eq!(json!(log.contains("DEBUG")), json!(false));
}
