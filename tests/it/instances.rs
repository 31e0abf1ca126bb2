//! Many instances by the API: found, sorted and paged in few statements, with what each sweep brought; one stream of all tasks.

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection, Executor};

use crate::support::daemon::{Daemon, PROJECT, instance};
use crate::support::keyspace::Keyspace;
use crate::support::server::Server;
use crate::support::{PATIENCE, probe};

const OTHER_PROJECT: &str = "fedcba9876543210fedcba9876543210";
const MANY: usize = 1_000;
const RECORDS: usize = 100_000;

fn ids(list: &Value) -> Vec<&str> {
    let instances = list["instances"].as_array().expect("a list");
    instances.iter().map(|instance| instance["id"].as_str().expect("an id")).collect()
}

async fn list(daemon: &Daemon, query: &str) -> Value {
    daemon.get(&format!("/api/v1/instances?{query}")).await.ok()
}

/// Instances that nobody sweeps, named against the order of their ids.
fn many(count: usize) -> String {
    let one = |n: usize| {
        let project = if n.is_multiple_of(2) { PROJECT } else { OTHER_PROJECT };
        format!(
            "[[instances]]\nid = \"i{n:04}\"\nname = \"Shop {:04}\"\nproject_id = \"{project}\"\nurl = \"redis://10.0.{}.{}:6379\"\n",
            count - n,
            n / 250,
            n % 250
        )
    };
    (0..count).map(one).collect()
}

/// Writes so many records of ended tasks, in turn of each instance, the newest of which freed `n` keys and left `n` MiB; the newest of
/// every fifth instance failed.
async fn fill_records(daemon: &Daemon, instances: usize, records: usize) {
    let mut db = daemon.records().await;
    let mut tx = db.begin().await.expect("a transaction");
    let numbers =
        format!("WITH RECURSIVE n (n) AS (VALUES (0) UNION ALL SELECT n + 1 FROM n WHERE n < {}) ", records - 1);
    let is_newest = format!("n >= {}", records - instances);
    let (of, id) = (format!("(n % {instances})"), "printf('01900000-%04x-7000-8000-%012x', n / 65536, n)");
    // One a second until now: the daemon deletes what is older than it keeps.
    let at = format!("((CAST(strftime('%s', 'now') AS INTEGER) - {records} + n) * 1000)");
    let tasks = format!(
        "{numbers} INSERT INTO tasks (id, instance_id, project_id, target, cause, state, created_at, started_at, finished_at, num, sweep) \
         SELECT {id}, printf('i%04d', {of}), CASE WHEN {of} % 2 = 0 THEN '{PROJECT}' ELSE '{OTHER_PROJECT}' END, 'redis://x', 'schedule', \
         CASE WHEN {is_newest} AND {of} % 5 = 0 THEN 'failed' ELSE 'succeeded' END, {at}, {at} + 100, {at} + 900, CASE WHEN {is_newest} THEN {of} ELSE 9 END, '{{}}' FROM n"
    );
    let seen = "'{\"version\":1,\"server\":null,\"dbs\":[0],\"touch\":\"scan_reclaims\",\"warnings\":[],\"memory_before\":{\"used\":'";
    let shards = format!(
        "{numbers} INSERT INTO shards (task_id, shard, report) SELECT {id}, 'a:1', {seen} || (({of} + 1) * 1048576) || \
         ',\"max\":0,\"evicted\":0}},\"memory_after\":{{\"used\":' || ({of} * 1048576) || ',\"max\":0,\"evicted\":0}},\"settling\":\
         {{\"secs\":0,\"nanos\":0}},\"finished\":true,\"failure\":null,\"passes\":{{}}}}' FROM n WHERE {is_newest}"
    );
    for statement in [tasks, shards] {
        tx.execute(sqlx::AssertSqlSafe(statement)).await.expect("it is written");
    }
    tx.commit().await.expect("it is written");
}

#[tokio::test]
async fn instances_are_searched_filtered_sorted_and_paged() {
    let daemon = Daemon::start(&many(10)).await;
    fill_records(&daemon, 9, 45).await;
    let all = list(&daemon, "").await;
    assert_eq!(ids(&all).len(), 10, "a list without a limit is whole");
    assert_eq!(ids(&all)[0], "i0000", "in the order of the settings");
    assert_eq!((&all["total"], &all["projects"]), (&json!(10), &json!([PROJECT, OTHER_PROJECT])));
    assert_eq!(all["counts"], json!({"failed": 2, "succeeded": 7, "never": 1}));
    let last = &all["instances"][8];
    assert_eq!((&last["used_memory"], &last["latest"]["reclaimed"]), (&json!(8 << 20), &json!(8)));
    assert!(last["last_success_at"].is_string());

    let named = list(&daemon, "sort=name").await;
    assert_eq!(ids(&named)[0], "i0009", "the name, and not the id");
    let page = list(&daemon, "sort=name&offset=4&limit=3").await;
    assert_eq!((ids(&page), &page["total"]), (vec!["i0005", "i0004", "i0003"], &json!(10)));
    assert_eq!(ids(&list(&daemon, "sort=reclaimed&order=desc&limit=2").await), ["i0008", "i0007"]);
    assert_eq!(ids(&list(&daemon, "sort=memory&limit=2").await), ["i0009", "i0000"], "what is not known comes first");
    // Those whose newest failed were swept completely before all others.
    assert_eq!(ids(&list(&daemon, "sort=last_success&limit=3").await), ["i0009", "i0000", "i0005"]);

    let failed = list(&daemon, "state=failed").await;
    assert_eq!((ids(&failed), &failed["counts"]["succeeded"]), (vec!["i0000", "i0005"], &json!(7)));
    assert_eq!(ids(&list(&daemon, "state=never").await), ["i0009"]);
    assert_eq!(ids(&list(&daemon, "search=SHOP%200007").await), ["i0003"]);
    assert_eq!(ids(&list(&daemon, "search=10.0.0.4").await), ["i0004"], "an address");
    assert_eq!(ids(&list(&daemon, &format!("project_id={OTHER_PROJECT}&limit=2")).await), ["i0001", "i0003"]);
    assert_eq!(list(&daemon, "search=nothing").await["total"], 0);
    for wrong in ["limit=0", "limit=1001", "sort=colour", "order=up", "state=done", "offset=-1"] {
        let answer = daemon.get(&format!("/api/v1/instances?{wrong}")).await;
        assert_eq!(answer.code(), (400, "DCS.4800"), "{wrong}");
    }
    let names = daemon.get("/api/v1/tasks?limit=5").await.ok()["instance_names"].clone();
    assert_eq!(names["i0008"], "Shop 0002", "{names}");
}

/// How many statements a request costs, by the log of the database's driver: the mean of many requests, among which the few
/// statements that the daemon makes by itself meanwhile hardly count.
async fn statements(daemon: &Daemon, path: &str) -> usize {
    const REQUESTS: usize = 20;
    let count = || daemon.log().matches("summary=").count();
    let before = count();
    for _ in 0..REQUESTS {
        daemon.get(path).await.ok();
    }
    (count() - before) / REQUESTS
}

#[tokio::test]
async fn a_page_of_a_thousand_instances_costs_as_many_statements_as_one_of_ten() {
    let logged = async |instances: usize, records: usize| {
        let daemon = Daemon::prepare(&many(instances));
        let daemon = daemon
            .launched(|mut command| {
                command.env("TTLSWEEP_LOG", "warn,sqlx::query=debug");
                command
            })
            .await;
        fill_records(&daemon, instances, records).await;
        daemon
    };
    let (few, many) = (logged(10, 100).await, logged(MANY, RECORDS).await);
    for query in ["limit=50&sort=name", "limit=50&sort=memory&order=desc", "limit=50&state=failed&sort=last_success"] {
        let path = format!("/api/v1/instances?{query}");
        let (of_few, of_many) = (statements(&few, &path).await, statements(&many, &path).await);
        // A few of the daemon's own may be among them; one for each instance would be fifty.
        assert!(of_few > 0 && of_many <= of_few + 3, "{query}: {of_few} and {of_many}");
        let answer = many.request(Method::GET, &path).send().await.expect("an answer").text().await.expect("a body");
        assert!(answer.len() < 64 << 10, "{query}: {} bytes", answer.len());
        let list: Value = serde_json::from_str(&answer).expect("JSON");
        assert_eq!(ids(&list).len(), 50);
    }
    let path = "/api/v1/instances/i0001/history?limit=100&shards=false";
    assert!(statements(&many, path).await <= 10, "of all sweeps of a page together");
    let history = many.get(path).await.ok();
    assert_eq!((history["total"].as_u64(), history["sweeps"].as_array().map(Vec::len)), (Some(100), Some(100)));
}

#[tokio::test]
async fn a_history_has_what_each_sweep_brought_and_what_held_it() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.dead(300, "dead:").await;
    keys.live_ttl(1_000, "live:").await;
    Keyspace::of(&server, 3).dead(50, "dead:").await;
    let daemon = Daemon::start(&instance("cache", &server.url(), "")).await;
    let first = daemon.create(json!({"instance_id": "cache", "max_keys_per_sec": 500})).await;
    daemon.until(&first, "running").await;
    daemon.post(&format!("/api/v1/tasks/{first}/pause")).await.ok();
    let held =
        async || daemon.get("/api/v1/instances/cache/history").await.ok()["sweeps"][0]["holds"][0]["reason"].clone();
    probe("it stands still", PATIENCE, async || held().await == "paused").await;
    daemon.post(&format!("/api/v1/tasks/{first}/resume")).await.ok();
    daemon.hurry(&first).await;
    daemon.until(&first, "succeeded").await;
    let evicted = evict(&server).await;
    let second = daemon.scan("cache").await;
    daemon.until(&second, "succeeded").await;

    let history = daemon.get("/api/v1/instances/cache/history").await.ok();
    assert_eq!((&history["total"], &history["reclaimed"]), (&json!(2), &json!(350)));
    let sweep = &history["sweeps"][1];
    assert_eq!((&history["sweeps"][0]["id"], &sweep["id"]), (&json!(second), &json!(first)), "newest first");
    assert_eq!(
        (&sweep["reclaimed"], &sweep["totals"]["reclaimed"], &sweep["progress"]),
        (&json!(350), &json!(350), &json!(1.0))
    );
    assert!(sweep["held_s"]["paused"].as_f64() > Some(0.0), "{sweep:#}");
    assert!(sweep["freed_bytes"].is_i64(), "{sweep:#}");
    assert_eq!((&sweep["evicted_keys"], &sweep["evicted_keys_after"]), (&json!(0), &json!(evicted)), "{sweep:#}");
    assert!(history["sweeps"][0]["evicted_keys_after"].is_null(), "there is no later one");
    let dbs = sweep["shards"][0]["dbs"].as_array().expect("DBs");
    let freed: Vec<_> = dbs.iter().map(|db| (db["db"].as_u64(), db["reclaimed"].as_u64())).collect();
    assert_eq!(freed, [(Some(0), Some(300)), (Some(3), Some(50))]);
    assert_eq!(daemon.task(&first).await["shards"], sweep["shards"], "the report of the task itself");

    let brief = daemon.get("/api/v1/instances/cache/history?shards=false&offset=1&limit=1").await.ok();
    assert_eq!(brief["sweeps"].as_array().map(Vec::len), Some(1));
    assert_eq!(brief["sweeps"][0]["evicted_keys_after"], evicted, "by the sweep before the page");
    assert!(brief["sweeps"][0]["shards"].is_null() && brief["sweeps"][0]["masters"] == 1, "{brief:#}");
    for wrong in ["limit=0", "limit=201", "shards=maybe"] {
        let answer = daemon.get(&format!("/api/v1/instances/cache/history?{wrong}")).await;
        assert_eq!(answer.code(), (400, "DCS.4800"), "{wrong}");
    }
    assert_eq!(daemon.get("/api/v1/instances/other/history").await.code(), (404, "DCS.3022"));
}

/// Has a server evict keys for a moment, and returns how many.
async fn evict(server: &Server) -> u64 {
    server.cmd(&["CONFIG", "SET", "maxmemory-policy", "allkeys-random"]).await;
    server.cmd(&["CONFIG", "SET", "maxmemory", "1mb"]).await;
    probe("keys are evicted", PATIENCE, async || server.info_number("stats", "evicted_keys").await > 0).await;
    server.cmd(&["CONFIG", "SET", "maxmemory", "0"]).await;
    server.info_number("stats", "evicted_keys").await
}

/// The lists of tasks that a stream has told of, as far as they have come.
async fn events(response: &mut reqwest::Response, text: &mut String) -> Vec<Value> {
    let chunk = tokio::time::timeout(PATIENCE, response.chunk()).await.expect("something comes").expect("a chunk");
    text.push_str(std::str::from_utf8(&chunk.expect("it goes on")).expect("UTF-8"));
    let end = text.rfind('\n').map_or(0, |end| end + 1);
    let whole: String = text.drain(..end).collect();
    let data = whole.lines().filter_map(|line| line.strip_prefix("data: "));
    data.flat_map(|data| serde_json::from_str::<Vec<Value>>(data).expect("a list")).collect()
}

#[tokio::test]
async fn one_stream_tells_of_all_tasks_from_the_first_to_the_last_view() {
    let (one, two) = (Server::start().await, Server::start().await);
    for server in [&one, &two] {
        Keyspace::of(server, 0).live_ttl(3_000, "live:").await;
        Keyspace::of(server, 0).dead(200, "dead:").await;
    }
    let other = instance("two", &two.url(), "").replace(PROJECT, OTHER_PROJECT);
    // SHA-256 of `figures` and of `secret`.
    let token = |name: &str, projects: &str, sha256: &str| {
        format!(
            "[[api.tokens]]\nname = \"{name}\"\nrole = \"operator\"\nprojects = [\"{projects}\"]\nsha256 = \"{sha256}\"\n"
        )
    };
    let settings = [
        "[api]\nlisten = \"127.0.0.1:0\"\n".to_owned(),
        token("all", "*", "dc2e3999e6b3e23f3327c0e6cb9a3d6cde4ab7cc16a46ec0fe716df8ce2717b9"),
        token("some", PROJECT, "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"),
        "[tasks]\nat-once = 2\n".to_owned(),
        instance("one", &one.url(), ""),
        other,
    ];
    let daemon = Daemon::start(&settings.concat()).await.with_token("figures");
    let first = daemon.create(json!({"instance_id": "one", "max_keys_per_sec": 500})).await;
    daemon.until(&first, "running").await;
    let stream = async |token: &str| {
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        let request = client.get(format!("{}/api/v1/events", daemon.url())).header("X-Auth-Token", token);
        let response = request.send().await.expect("a stream");
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        response
    };
    let (mut all, mut some) = (stream("figures").await, stream("secret").await);
    let (mut all_text, mut some_text) = (String::new(), String::new());
    let mut told = events(&mut all, &mut all_text).await;
    assert_eq!(
        (&told[0]["id"], &told[0]["state"]),
        (&json!(first), &json!("running")),
        "what runs already comes at once"
    );
    assert!(told[0]["shards"].is_null() && told[0]["progress"].is_f64(), "{}", told[0]);
    // One that has ended before the next event is due.
    let second = daemon.create(json!({"instance_id": "two"})).await;
    daemon.until(&second, "succeeded").await;
    daemon.hurry(&first).await;
    daemon.until(&first, "succeeded").await;
    let ended = |told: &[Value], id: &str| {
        told.iter().any(|task| task["id"] == id && task["state"] == "succeeded" && task["reclaimed"] == 200)
    };
    while !ended(&told, &first) || !ended(&told, &second) {
        told.extend(events(&mut all, &mut all_text).await);
    }
    let mut visible = Vec::new();
    while !ended(&visible, &first) {
        visible.extend(events(&mut some, &mut some_text).await);
    }
    assert!(visible.iter().all(|task| task["instance_id"] == "one"), "of its own project only: {visible:#?}");
}

#[tokio::test]
async fn the_page_is_made_of_files_that_a_browser_keeps_and_nothing_inline() {
    let daemon = Daemon::start("").await;
    let get = async |path: &str| daemon.request(Method::GET, path).send().await.expect("an answer");
    let page = get("/").await;
    let policy = page.headers()["content-security-policy"].to_str().expect("text").to_owned();
    assert!(
        policy.starts_with("default-src 'none'; script-src 'self'; style-src 'self'") && !policy.contains("unsafe"),
        "{policy}"
    );
    let html = page.text().await.expect("text");
    assert!(!html.contains("<style") && !html.contains(" style=") && !html.contains("onclick"), "{html}");
    // Each module that the page loads is there, of its own kind, and known again by its tag.
    let mut wanted = vec!["style.css".to_owned(), "main.js".to_owned()];
    let mut seen = Vec::new();
    while let Some(name) = wanted.pop() {
        let asset = get(&format!("/assets/{name}")).await;
        assert_eq!(asset.status(), 200, "{name}");
        let kind = if name.ends_with(".css") { "text/css" } else { "text/javascript" };
        assert!(asset.headers()["content-type"].to_str().expect("text").starts_with(kind), "{name}");
        assert_eq!(asset.headers()["x-content-type-options"], "nosniff");
        let tag = asset.headers()["etag"].clone();
        let again = daemon.request(Method::GET, &format!("/assets/{name}")).header("If-None-Match", tag).send().await;
        let again = again.expect("an answer");
        assert_eq!((again.status().as_u16(), again.text().await.expect("text").len()), (304, 0), "{name}");
        let text = asset.text().await.expect("text");
        assert!(
            !text.contains("http://") && !text.contains("https://") || text.contains("www.w3.org/2000/svg"),
            "{name}"
        );
        for other in text.split("from \"./").skip(1).filter_map(|rest| rest.split('"').next()) {
            if !seen.contains(&other.to_owned()) && !wanted.contains(&other.to_owned()) {
                wanted.push(other.to_owned());
            }
        }
        seen.push(name);
    }
    assert!(seen.len() >= 8, "{seen:?}");
    assert_eq!(daemon.get("/assets/other.js").await.code(), (404, "DCS.4001"));
    assert_eq!(daemon.get("/assets/index.html").await.code(), (404, "DCS.4001"));
    assert_eq!(daemon.get("/api/v1/caller").await.ok(), json!({"name": "loopback", "role": "operator"}));
}
