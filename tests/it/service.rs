//! What the daemon does beyond the contract: the queue, commands to tasks, windows, recovery, reload, and misbehaving clients.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::daemon::{Daemon, EACH_SECOND, instance, window};
use crate::support::keyspace::{Keyspace, filled};
use crate::support::proxy::Proxy;
use crate::support::{PATIENCE, probe, ttlsweep};

/// Slow enough for a test to act during the sweep, and soon done once the ceiling is lifted.
const SLOW: &str = "max-keys-per-sec = 500";

fn hold(task: &Value) -> &str {
    task["holds"][0]["reason"].as_str().unwrap_or("")
}

#[tokio::test]
async fn only_so_many_sweep_at_once_and_the_next_one_follows() {
    let (one, two) = (filled(5_000, 0).await, filled(5_000, 100).await);
    let settings =
        [instance("one", &one.url(), SLOW), instance("two", &two.url(), ""), "[tasks]\nat-once = 1\n".into()];
    let daemon = Daemon::start(&settings.concat()).await;
    let first = daemon.scan("one").await;
    daemon.until(&first, "running").await;
    let second = daemon.scan("two").await;
    let queued = daemon.task(&second).await;
    assert_eq!((&queued["state"], &queued["scanned"]), (&json!("waiting"), &json!(0)));
    daemon.hurry(&first).await;
    assert_eq!(daemon.until(&second, "succeeded").await["reclaimed"], 100);
    let (first, second) = (daemon.task(&first).await, daemon.task(&second).await);
    let (ended, begun) = (first["finished_at"].as_str(), second["started_at"].as_str());
    assert!(ended <= begun, "{ended:?} {begun:?}: times of this form sort as text");
}

#[tokio::test]
async fn a_task_is_paused_resumed_tuned_and_cancelled() {
    let server = filled(6_000, 300).await;
    let daemon = Daemon::start(&instance("cache", &server.url(), SLOW)).await;
    let id = daemon.scan("cache").await;
    daemon.until(&id, "running").await;
    let order = async |what: &str| daemon.post(&format!("/api/v1/tasks/{id}/{what}")).await;
    assert_eq!(order("pause").await.ok()["state"], "paused");
    assert_eq!(order("pause").await.code(), (409, "DCS.4017"));
    assert_eq!(daemon.history("cache").await["records"][0]["status"], "running");
    probe("it stands still", PATIENCE, async || hold(&daemon.task(&id).await) == "paused").await;
    // That nothing is sent cannot be awaited: the server's own count has to stay the same for a while.
    let scans = async || server.info("commandstats").await.get("cmdstat_scan").cloned();
    let before = scans().await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(scans().await, before, "no SCAN is sent to a server whose task is paused");
    assert_eq!(order("resume").await.ok()["state"], "running");
    daemon.hurry(&id).await;
    let done = daemon.until(&id, "succeeded").await;
    assert_eq!((&done["reclaimed"], &done["settings"]["max-keys-per-sec"]), (&json!(300), &json!("0")));
    assert_eq!(order("cancel").await.code(), (409, "DCS.4017"));

    let next = daemon.create(json!({"instance_id": "cache", "max_keys_per_sec": 100, "touch": "ttl"})).await;
    daemon.until(&next, "running").await;
    let cancelled = daemon.post(&format!("/api/v1/tasks/{next}/cancel")).await.ok();
    assert_eq!(cancelled["state"], "cancelled");
    assert!(cancelled["finished_at"].is_string());
    for (name, value) in [("intensity", json!(2)), ("timeout_s", json!(31_536_001))] {
        let wish = json!({"instance_id": "cache", name: value});
        let wrong = daemon.send(daemon.request(Method::POST, "/api/v1/tasks").json(&wish)).await;
        assert_eq!(wrong.code(), (400, "DCS.4800"));
        assert!(wrong.body["error_msg"].as_str().expect("a text").contains(name), "{}", wrong.body);
    }
    let list = daemon.request(Method::POST, "/api/v1/tasks").json(&json!(["cache", null, null, {}, null, null]));
    assert_eq!(daemon.send(list).await.code(), (400, "DCS.4800"), "a list is no object");
}

#[tokio::test]
async fn progress_comes_as_events_until_the_end() {
    let server = filled(2_000, 500).await;
    let daemon = Daemon::start(&instance("cache", &server.url(), "max-keys-per-sec = 1000")).await;
    let id = daemon.scan("cache").await;
    let response = daemon.request(Method::GET, &format!("/api/v1/tasks/{id}/events")).send().await.expect("a stream");
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let text = response.text().await.expect("it ends");
    let views: Vec<Value> = text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|data| serde_json::from_str(data).expect("JSON"))
        .collect();
    let last = views.last().expect("a view");
    assert_eq!(
        (&last["state"], &last["reclaimed"], &last["progress"]),
        (&json!("succeeded"), &json!(500), &json!(1.0))
    );
    assert!(views.len() >= 2, "more than the end: {text}");
    let progress: Vec<_> = views.iter().map(|view| view["progress"].as_f64()).collect();
    assert!(progress.is_sorted(), "{progress:?}");
}

#[tokio::test]
async fn a_task_that_has_ended_shows_what_it_showed_while_it_ran() {
    let server = filled(3_000, 500).await;
    let proxy = Proxy::start(server.addr()).await;
    let instances = [
        instance("good", &server.url(), "touch = \"ttl\"\nmax-keys-per-sec = 3000"),
        instance(
            "slow",
            &proxy.url(),
            "touch = \"ttl\"\nmax-keys-per-sec = 1000\nthrottle = false\nretry-for = \"1s\"",
        ),
    ];
    let mut daemon = Daemon::start(&instances.concat()).await;
    let good = daemon.scan("good").await;
    let last_of_good = last_view(&daemon, &good).await;
    assert_eq!(last_of_good["state"], "succeeded");
    let shard = &last_of_good["shards"][0];
    assert!(shard["server"].is_object() && shard["used_memory"]["after"].is_u64(), "{shard}");
    assert!(shard["dbs"][0]["ttl"].is_object() && shard["dbs"][0]["waited_s"].is_f64(), "{shard}");
    let slow = daemon.scan("slow").await;
    probe("it sweeps", PATIENCE, async || daemon.task(&slow).await["scanned"].as_u64() > Some(100)).await;
    let refused = async {
        proxy.refuse().await;
        proxy.cut().await;
    };
    let (last_of_slow, ()) = tokio::join!(last_view(&daemon, &slow), refused);
    assert_eq!(last_of_slow["failure"]["kind"], "cannot_connect");
    assert!(last_of_slow["shards"][0]["failure"].is_object(), "{last_of_slow}");
    for restarted in [false, true] {
        if restarted {
            daemon.restart().await;
        }
        for (id, last) in [(&good, &last_of_good), (&slow, &last_of_slow)] {
            assert_eq!(&daemon.task(id).await, last, "restarted: {restarted}");
        }
    }
}

/// Follows a task, and returns the last view before its stream ended.
async fn last_view(daemon: &Daemon, id: &str) -> Value {
    let response = daemon.request(Method::GET, &format!("/api/v1/tasks/{id}/events")).send().await.expect("a stream");
    let text = response.text().await.expect("it ends");
    let last = text.lines().filter_map(|line| line.strip_prefix("data: ")).next_back().expect("a view");
    serde_json::from_str(last).expect("JSON")
}

#[tokio::test]
async fn a_pause_ends_the_help_for_the_servers_own_expiry() {
    let server = filled(0, 100_000).await;
    // The share of expired keys in its sample then stays high, so that the assistance does not end by itself.
    server.cmd(&["DEBUG", "SET-ACTIVE-EXPIRE", "1"]).await;
    let stale = async || server.info("stats").await["expired_stale_perc"].parse::<f64>().expect("a share");
    probe("it has sampled expired keys", PATIENCE, async || stale().await > 3.0).await;
    server.stop_active_expiry().await;
    let daemon = Daemon::start(&instance("cache", &server.url(), "assist-expiry = \"10min\"")).await;
    let effort = async || server.query::<Vec<String>>(&["CONFIG", "GET", "active-expire-effort"]).await[1].clone();
    let id = daemon.scan("cache").await;
    probe("the effort is raised", PATIENCE, async || effort().await == "10").await;
    daemon.post(&format!("/api/v1/tasks/{id}/pause")).await.ok();
    probe("it is put back", PATIENCE, async || effort().await == "1").await;
    probe("it is held", PATIENCE, async || hold(&daemon.task(&id).await) == "paused").await;
    daemon.post(&format!("/api/v1/tasks/{id}/resume")).await.ok();
    daemon.until(&id, "succeeded").await;
    assert_eq!(server.dbsize(0).await, 0);
}

#[tokio::test]
async fn a_closed_window_holds_what_respects_it_and_nothing_else() {
    let server = filled(1_000, 100).await;
    let daemon = Daemon::start(&instance("cache", &server.url(), &window(false))).await;
    assert_eq!(daemon.get("/api/v1/instances/cache").await.ok()["window_open"], false);
    let respectful = daemon.create(json!({"instance_id": "cache", "respect_window": true})).await;
    let task = daemon.task(&respectful).await;
    assert_eq!((&task["state"], &task["respect_window"]), (&json!("waiting"), &json!(true)));
    probe("it says why it waits", PATIENCE, async || hold(&daemon.task(&respectful).await) == "outside_window").await;
    let held = "ttlsweep_holding{redis_instance=\"cache\",reason=\"outside_window\"}";
    assert!(daemon.figures().await.contains(&format!("{held} 1")));
    daemon.post(&format!("/api/v1/tasks/{respectful}/cancel")).await.ok();
    assert_eq!(daemon.until(&respectful, "cancelled").await["holds"], json!([]));
    let urgent = daemon.scan("cache").await;
    assert_eq!(daemon.until(&urgent, "succeeded").await["reclaimed"], 100);
    assert!(daemon.figures().await.contains(&format!("{held} 0")));
}

#[tokio::test]
async fn a_sweep_is_held_when_its_window_closes_and_goes_on_when_it_opens() {
    let server = filled(6_000, 100).await;
    let daemon = Daemon::start(&instance("cache", &server.url(), SLOW)).await;
    // Open until three seconds from now, then closed for four.
    let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    let time = |ahead: i64| (&now + jiff::SignedDuration::from_secs(ahead)).strftime("%H:%M:%S").to_string();
    let window = format!("[instances.window]\nstart = \"{}\"\nend = \"{}\"\n", time(7), time(3));
    daemon.write_settings(&instance("cache", &server.url(), &format!("{SLOW}\n{window}")));
    daemon.post("/api/v1/reload").await.ok();
    let id = daemon.create(json!({"instance_id": "cache", "respect_window": true})).await;
    daemon.until(&id, "running").await;
    probe("the window closes", PATIENCE, async || hold(&daemon.task(&id).await) == "outside_window").await;
    let held = daemon.task(&id).await;
    assert_eq!(held["state"], "running");
    assert_eq!(daemon.history("cache").await["records"][0]["status"], "running");
    probe("it goes on", PATIENCE, async || daemon.task(&id).await["scanned"] != held["scanned"]).await;
    daemon.hurry(&id).await;
    let done = daemon.until(&id, "succeeded").await;
    assert_eq!(done["reclaimed"], 100);
    let of = |name: &str| done["shards"][0]["dbs"][0]["held_s"][name].as_f64().unwrap_or_default();
    assert!(of("outside_window") > 1.0, "{done:#}");
    let seconds = |name: &str| -> i64 {
        let time: jiff::Timestamp = done[name].as_str().expect("a time").parse().expect("a time");
        time.as_millisecond()
    };
    let took = (seconds("finished_at") - seconds("started_at")) as f64 / 1000.0;
    let spent = done["spent_s"].as_f64().expect("a number");
    assert!(spent < took - 1.0, "the closed window does not count: {spent} of {took}");
}

#[tokio::test]
async fn a_killed_daemon_goes_on_where_it_was_and_counts_what_it_freed() {
    let server = filled(4_000, 2_000).await;
    let mut daemon = Daemon::start(&instance("cache", &server.url(), "max-keys-per-sec = 2000")).await;
    let id = daemon.scan("cache").await;
    probe("it has freed something", PATIENCE, async || daemon.task(&id).await["reclaimed"] != json!(0)).await;
    let freed = daemon.task(&id).await["reclaimed"].as_u64().expect("a number");
    daemon.restart().await;
    let task = daemon.until(&id, "succeeded").await;
    assert!(freed < 2_000 && server.expired_keys().await == 2_000, "{freed}");
    let counted = task["reclaimed"].as_u64().expect("a number");
    // The batch under way at the kill, of at most 100 keys, may be uncounted; those of a second would be 2,000.
    assert!((1_900..=2_000).contains(&counted), "{counted}");
    assert_eq!(task["shards"][0]["dbs"][0]["restarts"], 0, "the same process: from the same cursor");
    assert_eq!(task["shards"][0]["dbs"][0]["lost_replies"], 2, "what may be uncounted is reported");
    assert_eq!(daemon.history("cache").await["count"], 1);
}

#[tokio::test]
async fn a_scan_that_goes_on_waits_for_a_server_that_is_up_later_than_the_daemon() {
    let mut server = filled(5_000, 100).await;
    let mut daemon = Daemon::start(&instance("cache", &server.url(), SLOW)).await;
    let id = daemon.scan("cache").await;
    daemon.until(&id, "running").await;
    daemon.kill9();
    server.kill9();
    daemon.restart().await;
    probe("it waits", PATIENCE, async || daemon.log().contains("waiting for a node")).await;
    server.restart().await;
    daemon.until(&id, "succeeded").await;
}

#[tokio::test]
async fn the_db_of_an_instances_url_is_swept_and_no_other_whoever_asks() {
    let server = filled(10, 100).await;
    Keyspace::of(&server, 3).expired(50, "expired:").await;
    let daemon = Daemon::start(&instance("cache", &format!("{}/3", server.url()), "")).await;
    let id = daemon.create(json!({"instance_id": "cache"})).await;
    let task = daemon.until(&id, "succeeded").await;
    assert_eq!((&task["reclaimed"], &task["settings"]["db"]), (&json!(50), &json!("3")));
    assert_eq!(server.dbsize(0).await, 110, "the other DB was left alone");
}

#[tokio::test]
async fn a_stopped_daemon_keeps_what_waits_what_is_paused_and_what_runs() {
    let (one, two, three) = (filled(3_000, 10).await, filled(10, 10).await, filled(3_000, 10).await);
    let settings = [
        instance("one", &one.url(), SLOW),
        instance("two", &two.url(), &window(false)),
        instance("three", &three.url(), SLOW),
    ]
    .concat();
    let mut daemon = Daemon::start(&settings).await;
    let running = daemon.scan("one").await;
    let waiting = daemon.create(json!({"instance_id": "two", "respect_window": true})).await;
    let paused = daemon.scan("three").await;
    daemon.until(&running, "running").await;
    daemon.until(&paused, "running").await;
    daemon.post(&format!("/api/v1/tasks/{paused}/pause")).await.ok();
    assert_eq!(daemon.stop().await, Some(0));
    daemon.restart().await;
    assert_eq!(daemon.task(&waiting).await["state"], "waiting");
    assert_eq!(daemon.task(&paused).await["state"], "paused");
    daemon.until(&running, "running").await;
    daemon.hurry(&running).await;
    assert_eq!(daemon.until(&running, "succeeded").await["reclaimed"], 10);
    daemon.post(&format!("/api/v1/tasks/{paused}/resume")).await.ok();
    daemon.hurry(&paused).await;
    assert_eq!(daemon.until(&paused, "succeeded").await["reclaimed"], 10);
}

#[tokio::test]
async fn an_instance_that_left_the_settings_leaves_no_task_running() {
    let server = filled(3_000, 50).await;
    let mut daemon = Daemon::start(&instance("cache", &server.url(), SLOW)).await;
    let id = daemon.scan("cache").await;
    probe("it has freed something", PATIENCE, async || daemon.task(&id).await["reclaimed"] != json!(0)).await;
    daemon.kill9();
    let freed = server.expired_keys().await;
    daemon.write_settings("");
    daemon.restart().await;
    let task = daemon.task(&id).await;
    assert_eq!(task["state"], "failed");
    // A batch that was under way at the kill may be uncounted.
    let (counted, lost) = (task["reclaimed"].as_u64().expect("a number"), 3 * 1_000);
    assert!(counted <= freed && counted + lost >= freed && counted > 0, "{counted} of {freed}");
    assert!(task["failure"]["message"].as_str().expect("a text").contains("no longer in the settings"));
}

#[tokio::test]
async fn settings_are_read_again_without_disturbing_what_runs() {
    let (one, two) = (filled(3_000, 10).await, filled(10, 10).await);
    let daemon = Daemon::start(&instance("one", &one.url(), SLOW)).await;
    let running = daemon.scan("one").await;
    daemon.until(&running, "running").await;

    daemon.write_settings("[[instances]]\nid = \"broken\"\n");
    let refused = daemon.post("/api/v1/reload").await;
    assert_eq!(refused.code(), (400, "DCS.4800"));
    assert!(refused.body["error_msg"].as_str().expect("a text").contains("needs `project_id`"), "{}", refused.body);
    daemon.get("/api/v1/instances/one").await.ok();

    daemon.write_settings(&[instance("one", &one.url(), SLOW), instance("two", &two.url(), "")].concat());
    daemon.signal("HUP");
    probe("the new instance is there", PATIENCE, async || daemon.get("/api/v1/instances/two").await.status == 200)
        .await;
    assert_eq!(daemon.task(&running).await["state"], "running");
    let second = daemon.scan("two").await;
    daemon.until(&second, "succeeded").await;
    daemon.hurry(&running).await;
    daemon.until(&running, "succeeded").await;
}

#[tokio::test]
async fn lists_have_filters() {
    let (one, two) = (filled(10, 5).await, filled(10, 7).await);
    let daemon = Daemon::start(&[instance("one", &one.url(), ""), instance("two", &two.url(), "")].concat()).await;
    let mut ids = Vec::new();
    for id in ["one", "two", "one"] {
        let id = daemon.scan(id).await;
        daemon.until(&id, "succeeded").await;
        ids.push(id);
    }
    let list = async |query: &str| {
        let list = daemon.get(&format!("/api/v1/tasks?{query}")).await.ok();
        let ids: Vec<_> = list["tasks"].as_array().expect("a list").iter().map(|task| task["id"].clone()).collect();
        (ids, list["count"].clone(), list["reclaimed"].clone())
    };
    assert_eq!(list("").await, (vec![json!(ids[2]), json!(ids[1]), json!(ids[0])], json!(3), json!(12)));
    assert_eq!(list("instance_id=two").await, (vec![json!(ids[1])], json!(1), json!(7)));
    assert_eq!(list(&format!("before={}&limit=1", ids[2])).await.0, [json!(ids[1])]);
    assert_eq!(list("state=failed").await.0, Vec::<Value>::new());
    assert_eq!(list("cause=schedule").await.0, Vec::<Value>::new());
    let instances = daemon.get("/api/v1/instances").await.ok();
    assert_eq!(instances["instances"][0]["latest"]["id"], ids[2]);
}

#[tokio::test]
async fn a_thousand_slow_clients_stop_neither_a_sweep_nor_the_health_answer() {
    let server = filled(20_000, 5_000).await;
    let daemon = Daemon::start(&instance("cache", &server.url(), "")).await;
    // Each connection takes a descriptor of this process too.
    rlimit::increase_nofile_limit(4_096).expect("descriptors");
    let mut clients = Vec::new();
    for n in 0..1_000 {
        let mut stream = TcpStream::connect(daemon.authority()).await.expect("a connection");
        // Half a header, a missing body, and a client that does not read.
        let begin = match n % 3 {
            0 => "GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ".to_owned(),
            1 => format!(
                "PUT {} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n{{",
                Daemon::path("cache", "x")
            ),
            _ => "GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".to_owned(),
        };
        stream.write_all(begin.as_bytes()).await.expect("it is taken");
        clients.push(stream);
    }
    let id = daemon.scan("cache").await;
    let begun = Instant::now();
    daemon.get("/healthz").await.ok();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    for (n, client) in clients.iter_mut().enumerate().filter(|(n, _)| n % 3 == 0) {
        client.write_all(b"s").await.unwrap_or_else(|e| panic!("client {n}: {e}"));
    }
    assert_eq!(daemon.until(&id, "succeeded").await["reclaimed"], 5_000);
}

#[tokio::test]
async fn a_client_that_does_not_finish_its_header_is_cut() {
    let settings = "[api]\nlisten = \"127.0.0.1:0\"\nrequest-timeout = \"500ms\"\n";
    let daemon = Daemon::start(settings).await;
    let mut stream = TcpStream::connect(daemon.authority()).await.expect("a connection");
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n").await.expect("it is taken");
    let mut rest = Vec::new();
    let cut = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
    assert!(cut.is_ok(), "the connection is closed");
    let long = format!("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: {}\r\n\r\n", "x".repeat(100_000));
    let mut stream = TcpStream::connect(daemon.authority()).await.expect("a connection");
    let _ = stream.write_all(long.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("an end");
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    daemon.get("/healthz").await.ok();
}

#[tokio::test]
async fn what_a_sweep_did_is_in_the_figures() {
    let server = filled(1_000, 250).await;
    let daemon = Daemon::start(&instance("cache", &server.url(), "")).await;
    let id = daemon.scan("cache").await;
    daemon.until(&id, "succeeded").await;
    let text = daemon.figures().await;
    for line in [
        "ttlsweep_keys_reclaimed_total{redis_instance=\"cache\"} 250",
        "ttlsweep_tasks_ended_total{redis_instance=\"cache\",cause=\"api\",state=\"succeeded\"} 1",
        "ttlsweep_tasks_unfinished 0",
        "ttlsweep_sweep_progress_ratio{redis_instance=\"cache\"} 1.0",
    ] {
        assert!(text.lines().any(|have| have == line), "{line}\n{text}");
    }
    // A path that a client invents is not a label.
    daemon.get("/no/such/path").await;
    let open = daemon.request(Method::GET, "/metrics").header("Accept", "application/openmetrics-text; version=1.0.0");
    let text = open.send().await.expect("an answer").text().await.expect("text");
    assert!(text.ends_with("# EOF\n") && !text.contains("no/such/path"), "{text}");
}

#[tokio::test]
async fn when_it_last_succeeded_is_known_after_a_restart_too() {
    let server = filled(10, 5).await;
    let mut daemon = Daemon::start(&instance("cache", &server.url(), "")).await;
    let last_success = async |daemon: &Daemon| {
        let text = daemon.figures().await;
        let name = "ttlsweep_last_success_timestamp_seconds{redis_instance=\"cache\"} ";
        text.lines().find_map(|line| line.strip_prefix(name).map(str::to_owned))
    };
    assert_eq!(last_success(&daemon).await.as_deref(), Some("0.0"), "there before the first sweep");
    let id = daemon.scan("cache").await;
    daemon.until(&id, "succeeded").await;
    let before = last_success(&daemon).await;
    assert_ne!(before.as_deref(), Some("0.0"));
    daemon.restart().await;
    assert_eq!(last_success(&daemon).await, before);
}

#[tokio::test]
async fn a_second_daemon_is_kept_away_from_the_records() {
    let mut daemon = Daemon::start("").await;
    let second = ttlsweep().args(["serve", "--config"]).arg(daemon.settings_path()).output().expect("it runs");
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(1), "{said}");
    assert!(said.contains("another ttlsweep uses the records in") && said.contains("[store] path"), "{said}");
    daemon.get("/readyz").await.ok();
    daemon.restart().await;
}

#[tokio::test]
async fn an_instance_is_checked_without_touching_a_key() {
    let server = filled(100, 50).await;
    let daemon = Daemon::start(&instance("cache", &server.url(), "")).await;
    let seen = daemon.post("/api/v1/instances/cache/check").await.ok();
    assert_eq!((&seen["role"], &seen["dbs"][0]["keys"]), (&json!("master"), &json!(150)));
    assert_eq!(server.expired_keys().await, 0);
}

#[tokio::test]
async fn a_due_scan_with_nothing_to_gain_ends_at_once_and_says_so() {
    let server = filled(1_000, 0).await;
    let settings = format!("min-backlog = 1000000\n{EACH_SECOND}");
    let daemon = Daemon::start(&instance("cache", &server.url(), &settings)).await;
    probe("a due scan has ended", PATIENCE, async || {
        daemon.history("cache").await["records"][0]["status"] == "success"
    })
    .await;
    let list = daemon.get("/api/v1/tasks?state=succeeded").await.ok();
    let note = list["tasks"][0]["note"].as_str().expect("a note");
    assert!(note.starts_with("nothing to gain: about 0 of 1000 keys"), "{note}");
    assert!(!server.info("commandstats").await.contains_key("cmdstat_scan"), "no SCAN was sent");
}

#[tokio::test]
async fn a_due_scan_that_weighs_the_backlog_of_a_server_that_hangs_can_be_cancelled() {
    let server = filled(100, 0).await;
    let settings = format!("min-backlog = 1\n{EACH_SECOND}");
    let daemon = Daemon::start(&instance("cache", &server.url(), &settings)).await;
    server.sigstop();
    let mut id = String::new();
    probe("a due scan weighs the backlog", PATIENCE, async || {
        let running = daemon.get("/api/v1/tasks?state=running").await.ok();
        id = running["tasks"][0]["id"].as_str().unwrap_or_default().to_owned();
        !id.is_empty()
    })
    .await;
    let cancelled = daemon.post(&format!("/api/v1/tasks/{id}/cancel")).await;
    server.sigcont();
    assert_eq!(cancelled.ok()["state"], "cancelled");
}

#[tokio::test]
async fn a_caller_without_credentials_is_answered_before_its_body_is_read() {
    let hash = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
    let token = format!("[[api.tokens]]\nname = \"t\"\nrole = \"operator\"\nprojects = \"*\"\nsha256 = \"{hash}\"\n");
    let daemon = Daemon::start(&format!("[api]\nlisten = \"127.0.0.1:0\"\n{token}")).await;
    let mut stream = TcpStream::connect(daemon.authority()).await.expect("a connection");
    let head = "POST /api/v1/tasks HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 60000\r\n\r\n{";
    stream.write_all(head.as_bytes()).await.expect("it is taken");
    let mut answer = [0; 64];
    let read = tokio::time::timeout(PATIENCE, stream.read(&mut answer)).await.expect("an answer").expect("bytes");
    let answer = String::from_utf8_lossy(&answer[..read]).into_owned();
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
}
