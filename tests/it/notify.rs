//! Notifications to a webhook: signed, sent again until accepted, and never delaying a sweep.

use std::time::{Duration, Instant};

use base64::Engine as _;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::support::daemon::{Daemon, instance};
use crate::support::hook::{Answer, Call, Hook};
use crate::support::keyspace::Keyspace;
use crate::support::server::Server;
use crate::support::{PATIENCE, free_port, probe};

/// The settings for this webhook, and an unreachable instance.
fn settings(url: &str, more: &str) -> String {
    let gone = instance("gone", &format!("redis://127.0.0.1:{}", free_port()), "retry-for = \"1ms\"");
    format!("[notify]\nurl = \"{url}\"\n{more}\n{gone}")
}

/// Whether the signature follows the specification of Standard Webhooks, for a secret without a prefix.
fn is_signed(call: &Call, secret: &str) -> bool {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("any length will do");
    mac.update(format!("{}.{}.", call.header("webhook-id"), call.header("webhook-timestamp")).as_bytes());
    mac.update(&call.body);
    let known = base64::engine::general_purpose::STANDARD.encode(mac.finalize().into_bytes());
    call.header("webhook-signature") == format!("v1,{known}")
}

async fn counted(daemon: &Daemon, event: &str, outcome: &str, times: u64) {
    let line = format!("ttlsweep_notifications_total{{event=\"{event}\",outcome=\"{outcome}\"}} {times}");
    probe(&line, PATIENCE, async || daemon.figures().await.contains(&line)).await;
}

#[tokio::test]
async fn a_failed_task_is_told_signed_and_a_complete_one_is_not() {
    let (hook, server) = (Hook::start(&[]).await, Server::start().await);
    let secret = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(secret.path(), "a shared secret\n").expect("it is written");
    let signed = format!("secret-file = \"{}\"", secret.path().display());
    let well = instance("well", &server.url(), "");
    let mut daemon = Daemon::start(&(settings(hook.url(), &signed) + well.as_str())).await;
    let complete = daemon.scan("well").await;
    daemon.until(&complete, "succeeded").await;
    let id = daemon.scan("gone").await;
    let task = daemon.until(&id, "failed").await;
    let call = hook.wait_for(1).await.remove(0);
    assert!(is_signed(&call, "a shared secret"), "{call:?}");
    assert!(!is_signed(&call, "another"));
    assert_eq!(call.header("content-type"), "application/json");
    let told = call.json();
    assert_eq!((&told["type"], told["id"].as_str()), (&"task_failed".into(), Some(call.header("webhook-id"))));
    assert_eq!((&told["data"]["instance_id"], &told["data"]["task"]["id"]), (&"gone".into(), &task["id"]));
    assert_eq!(told["data"]["task"]["failure"]["message"], task["failure"]["message"]);
    counted(&daemon, "task_failed", "delivered", 1).await;
    assert_eq!(daemon.stop().await, Some(0));
    assert_eq!(hook.calls().len(), 1);
}

#[tokio::test]
async fn no_notification_is_sent_without_a_url() {
    let hook = Hook::start(&[]).await;
    for more in ["events = []", "events = [\"not_swept\"]"] {
        let mut daemon = Daemon::start(&settings(hook.url(), more)).await;
        let id = daemon.scan("gone").await;
        daemon.until(&id, "failed").await;
        // The remaining events are sent once more before the end.
        assert_eq!(daemon.stop().await, Some(0));
        assert_eq!(hook.calls().len(), 0, "{more}");
    }
}

#[tokio::test]
async fn what_is_not_taken_is_sent_again_with_the_same_id() {
    let hook = Hook::start(&[Answer::Status(503), Answer::Status(429)]).await;
    let daemon = Daemon::start(&settings(hook.url(), "")).await;
    daemon.scan("gone").await;
    let calls = hook.wait_for(3).await;
    let ids: Vec<_> = calls.iter().map(|call| call.header("webhook-id").to_owned()).collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    assert!(calls.iter().all(|call| call.headers.get("webhook-signature").is_none()), "there is no secret");
    counted(&daemon, "task_failed", "retried", 2).await;
    counted(&daemon, "task_failed", "delivered", 1).await;
}

#[tokio::test]
async fn a_webhook_that_was_down_gets_the_event_once_it_is_up() {
    let port = free_port();
    let daemon = Daemon::prepare(&settings(&format!("http://127.0.0.1:{port}/hooks/geheim"), ""));
    // As on a system without certificates of public authorities.
    let bare = |mut command: std::process::Command| {
        command.env("SSL_CERT_FILE", "/dev/null");
        command
    };
    let daemon = daemon.launched(bare).await;
    daemon.scan("gone").await;
    counted(&daemon, "task_failed", "retried", 1).await;
    let hook = Hook::start_at(port, &[]).await;
    hook.wait_for(1).await;
    counted(&daemon, "task_failed", "delivered", 1).await;
}

#[tokio::test]
async fn a_webhook_that_refuses_is_not_asked_again_and_its_address_stays_secret() {
    let hook = Hook::start(&[Answer::Status(404)]).await;
    let daemon = Daemon::start(&settings(hook.url(), "format = \"slack\"")).await;
    daemon.scan("gone").await;
    counted(&daemon, "task_failed", "given_up", 1).await;
    let text = hook.calls()[0].json();
    assert!(text["text"].as_str().expect("a text").contains("the sweep of gone failed"), "{text}");
    assert_eq!(text.as_object().expect("an object").len(), 1);
    let log = daemon.log();
    assert!(log.contains("notification given up: the webhook answered 404"), "{log}");
    assert!(!log.contains("geheim"), "{log}");
}

#[tokio::test]
async fn a_webhook_that_never_answers_slows_neither_sweeps_nor_the_end() {
    let (hook, server) = (Hook::start(&[Answer::Never; 9]).await, Server::start().await);
    Keyspace::of(&server, 0).expired(500, "expired:").await;
    let well = instance("well", &server.url(), "");
    let mut daemon = Daemon::start(&(settings(hook.url(), "") + well.as_str())).await;
    let id = daemon.scan("gone").await;
    daemon.until(&id, "failed").await;
    hook.wait_for(1).await;
    let id = daemon.scan("well").await;
    assert_eq!(daemon.until(&id, "succeeded").await["reclaimed"], 500);
    let begun = Instant::now();
    assert_eq!(daemon.stop().await, Some(0));
    // The daemon waits 3 s for the webhook, whose own limit is 10 s.
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    assert!(daemon.log().contains("notifications were not delivered before the daemon stopped"), "{}", daemon.log());
}

#[tokio::test]
async fn what_was_not_told_yet_is_tried_once_more_when_the_daemon_stops() {
    let hook = Hook::start(&[Answer::Status(500), Answer::Status(500), Answer::Status(500)]).await;
    let mut daemon = Daemon::start(&settings(hook.url(), "")).await;
    daemon.scan("gone").await;
    hook.wait_for(3).await;
    // The next attempt would be 4 s later.
    let begun = Instant::now();
    assert_eq!(daemon.stop().await, Some(0));
    assert_eq!(hook.calls().len(), 4);
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn an_instance_with_a_schedule_that_is_not_swept_for_too_long_is_told_once_and_anew_after_a_sweep() {
    let (hook, server) = (Hook::start(&[]).await, Server::start().await);
    let (url, other) = (server.url(), Server::start().await);
    let far = "not-swept-for = \"1s\"\n[instances.auto-scan]\nenabled = true\ncron = \"0 0 1 1 *\"\n";
    let settings = [
        format!("[notify]\nurl = \"{}\"\n", hook.url()),
        instance("late", &url, far),
        // This instance has no automatic scan.
        instance("by-hand", &other.url(), "not-swept-for = \"1s\""),
    ];
    let daemon = Daemon::start(&settings.concat()).await;
    let told = hook.wait_for(1).await[0].json();
    assert_eq!((&told["type"], &told["data"]["instance_id"]), (&"not_swept".into(), &"late".into()));
    assert_eq!((told["data"]["last_success_at"].is_null(), &told["data"]["allowed_s"]), (true, &1.0.into()));
    let id = daemon.scan("late").await;
    daemon.until(&id, "succeeded").await;
    // A change of the settings makes the daemon check at once.
    daemon.write_settings(&settings.concat());
    daemon.signal("HUP");
    let told = hook.wait_for(2).await[1].json();
    assert_eq!(told["data"]["last_success_at"], daemon.task(&id).await["finished_at"]);
    counted(&daemon, "not_swept", "delivered", 2).await;
}
