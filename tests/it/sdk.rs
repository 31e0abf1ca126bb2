//! Real clients: the public Python SDK runs all five calls, and a fuzzer that reads the API's own description finds nothing
//! wrong. `make clients` gets them.

use std::process::Command;

use serde_json::{Value, json};

use crate::support::clients::{client, output, root};
use crate::support::daemon::{Daemon, PROJECT, instance};
use crate::support::keyspace::Keyspace;
use crate::support::server::Server;

pub const EXPIRED: u64 = 1_500;

/// A key pair whose secret is in the environment, and tokens of the SHA-256 of `secret` and of `figures`.
pub const CREDENTIALS: &str = r#"
[api]
listen = "127.0.0.1:0"
[[api.keys]]
name = "sdk"
role = "operator"
projects = ["0123456789abcdef0123456789abcdef"]
access = "AKEXAMPLE"
secret-env = "SK_OF_THE_TEST"
[[api.tokens]]
name = "fuzzer"
role = "operator"
projects = ["0123456789abcdef0123456789abcdef"]
sha256 = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"
[[api.tokens]]
name = "prometheus"
role = "reader"
projects = ["*"]
sha256 = "dc2e3999e6b3e23f3327c0e6cb9a3d6cde4ab7cc16a46ec0fe716df8ce2717b9"
"#;
const TOKEN: &str = "secret";

/// A daemon with the clients' credentials.
pub async fn daemon(server: &Server) -> Daemon {
    let settings = format!("{CREDENTIALS}{}", instance("cache", &server.url(), ""));
    let secret = |mut command: Command| {
        command.env("SK_OF_THE_TEST", "SKEXAMPLE");
        command
    };
    Daemon::prepare(&settings).launched(secret).await.with_token(TOKEN)
}

async fn all_five_calls(more: &[&str], secret: &str) -> (Value, Daemon, Server) {
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(EXPIRED, "expired:").await;
    let daemon = daemon(&server).await;
    let mut sdk = Command::new(client("python"));
    sdk.arg(root().join("tests/it/sdk.py")).args([daemon.url(), "cache", PROJECT, "AKEXAMPLE", secret]).args(more);
    let run = output(sdk).await;
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(run.status.success(), "{said}\n{}", daemon.log());
    (serde_json::from_slice(&run.stdout).expect("one object"), daemon, server)
}

pub fn check(seen: &Value) {
    assert_eq!(seen["created"]["status"], "waiting");
    assert_eq!((&seen["first"]["total"], &seen["first"]["count"]), (&json!(EXPIRED), &json!(1)));
    assert_eq!((&seen["first"]["records"][0]["num"], &seen["second"]["count"]), (&json!(EXPIRED), &json!(2)));
    assert_eq!(seen["second"]["records"][0]["id"], seen["again"]["id"], "newest first");
    assert_eq!(seen["filtered"]["records"].as_array().map(Vec::len), Some(1));
    assert_eq!(seen["shown"]["interval"], 3600);
    assert_eq!((&seen["set"]["scan_keys_count"], &seen["shown"]["enable_auto_scan"]), (&json!(20), &json!(true)));
    assert_eq!(seen["error"], json!([404, "DCS.3022", "This DCS instance does not exist.", true]));
}

#[tokio::test]
async fn the_public_sdk_runs_all_five_calls_signed() {
    let (seen, _daemon, _server) = all_five_calls(&[], "SKEXAMPLE").await;
    check(&seen);
}

#[tokio::test]
async fn the_public_sdk_runs_all_five_calls_with_a_token() {
    let (seen, _daemon, _server) = all_five_calls(&[TOKEN], "no secret").await;
    check(&seen);
}

#[tokio::test]
async fn a_wrong_secret_is_refused() {
    let server = Server::start().await;
    let daemon = daemon(&server).await;
    let mut sdk = Command::new(client("python"));
    sdk.arg(root().join("tests/it/sdk.py")).args([daemon.url(), "cache", PROJECT, "AKEXAMPLE", "wrong"]);
    let run = output(sdk).await;
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(!run.status.success() && said.contains("DCS.1001"), "{said}");
    assert_eq!(daemon.history("cache").await["count"], 0);
}

#[tokio::test]
async fn a_fuzzer_that_reads_the_description_finds_nothing_wrong() {
    let server = Server::start().await;
    let daemon = daemon(&server).await;
    let schemathesis = client("python").with_file_name("schemathesis");
    let mut fuzz = Command::new(schemathesis);
    fuzz.arg("--config-file").arg(root().join("tests/it/schemathesis.toml"));
    fuzz.args(["run", &format!("{}/openapi.json", daemon.url()), "--header", &format!("X-Auth-Token: {TOKEN}")]);
    fuzz.args(["--max-examples", "15", "--seed", "1", "--no-color", "--phases", "examples,coverage,fuzzing"]);
    // The fuzzer keeps its findings in its folder: a run must not depend on earlier ones.
    let folder = tempfile::tempdir().expect("a temporary folder");
    fuzz.args(["--request-timeout", "20"]).current_dir(folder.path());
    let run = output(fuzz).await;
    let said = String::from_utf8_lossy(&run.stdout).into_owned();
    assert!(run.status.success(), "{said}");
    daemon.get("/healthz").await.ok();
}
