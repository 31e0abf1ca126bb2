//! A forecast is right within its stated error, reads replicas and not masters, and shows no name of a key.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::cluster::Cluster;
use crate::support::daemon::{Daemon, instance};
use crate::support::keyspace::Keyspace;
use crate::support::run::run;
use crate::support::server::{Server, pair};
use crate::support::{PATIENCE, probe};

const HOUR_MS: u64 = 3_600_000;

/// Writes keys with these TTLs in milliseconds; 0: no TTL.
async fn write(server: &Server, prefix: &str, ttls_ms: impl Iterator<Item = u64>) -> u64 {
    let mut conn = server.conn().await;
    let ttls: Vec<u64> = ttls_ms.collect();
    for (chunk, ttls) in ttls.chunks(1_000).enumerate() {
        let mut pipeline = redis::pipe();
        for (n, ttl) in ttls.iter().enumerate() {
            let set = pipeline.cmd("SET").arg(format!("{prefix}:{chunk}:{n}")).arg("x");
            if *ttl > 0 {
                set.arg("PX").arg(*ttl).ignore()
            } else {
                set.ignore()
            };
        }
        let written: redis::RedisResult<()> = pipeline.query_async(&mut conn).await;
        written.expect("the keys are written");
    }
    ttls.len() as u64
}

async fn until_there(replica: &Server, keys: u64) {
    probe("the replica has every key", PATIENCE, async || replica.dbsize(0).await == keys).await;
}

/// `ttlsweep forecast URL --json` with more arguments.
async fn forecast(url: &str, more: &[&str]) -> Value {
    run(["forecast", url, "--json"].iter().chain(more)).await.expect(0).json()
}

fn keys(figure: &Value) -> u64 {
    figure["keys"].as_u64().expect("a number of keys")
}

/// Panics if a figure is further from the truth than five standard errors.
#[track_caller]
fn near(figure: &Value, truth: u64, what: &str) {
    let error = figure["keys_error"].as_u64().expect("an error") as f64 / 1.96 * 5.0;
    let off = keys(figure).abs_diff(truth) as f64;
    assert!(off <= error.max(1.0), "{what}: {figure} and not {truth}");
}

#[tokio::test]
async fn a_small_database_is_counted_whole_on_a_replica_that_the_master_names() {
    let (master, replica) = pair().await;
    let all = write(&master, "forever", (0..300).map(|_| 0)).await
        + write(&master, "minutes", (0..200).map(|_| 30 * 60_000)).await
        + write(&master, "days", (0..100).map(|n| 25 * HOUR_MS + n)).await;
    until_there(&replica, all).await;
    let scans = async |server: &Server| server.info("commandstats").await.contains_key("cmdstat_scan");
    let found = forecast(&master.url(), &[]).await;
    let total = &found["total"];
    assert_eq!((&total["keys"], keys(&total["with_ttl"]), keys(&total["without_ttl"])), (&json!(600), 300, 300));
    assert_eq!(total["with_ttl"]["keys_error"], 0);
    let within: Vec<u64> = total["within"].as_array().expect("a list").iter().map(keys).collect();
    assert_eq!(within, [0, 0, 200, 0, 0, 100]);
    assert_eq!(found["sources"][0]["addr"], json!(format!("127.0.0.1:{}", replica.port())));
    assert!(scans(&replica).await && !scans(&master).await, "the master is asked for INFO only");
    let text = run(["forecast", &master.url(), "--replica", &replica.url()]).await.expect(0).stdout;
    assert!(text.contains("on a replica") && text.contains("1 hour") && !text.contains("minutes:"), "{text}");
}

#[tokio::test]
async fn a_sample_is_as_near_to_the_truth_as_it_says_and_a_mass_of_keys_at_one_time_is_named() {
    let (master, replica) = pair().await;
    let even = (0..60_000).map(|n| 60_000 + n * 23 * HOUR_MS / 60_000);
    let all = write(&master, "even", even).await
        + write(&master, "mass", (0..20_000).map(|n| 10 * HOUR_MS + n)).await
        + write(&master, "forever", (0..20_000).map(|_| 0)).await
        + write(&master, "week", (0..10_000).map(|_| 200 * HOUR_MS)).await;
    until_there(&replica, all).await;
    let found = forecast(&master.url(), &["--sample", "11000"]).await;
    let total = &found["total"];
    let looked_at = total["looked_at"].as_u64().expect("a number");
    assert!((8_000..15_000).contains(&looked_at), "{looked_at}");
    near(&total["with_ttl"], 90_000, "with a TTL");
    near(&total["without_ttl"], 20_000, "without");
    near(&total["later"], 10_000, "later than a week");
    near(&total["within"][4], 60_000 * 17 / 23 + 20_000, "within six hours to a day");
    assert!(total["with_ttl"]["keys_error"].as_u64() < Some(5_000), "and that is near: {}", total["with_ttl"]);
    let peaks = found["peaks"].as_array().expect("a list");
    assert_eq!(peaks.len(), 1, "{peaks:#?}");
    let per_bin = 60_000 / (23 * 6);
    near(&peaks[0], 20_000 + per_bin, "the peak");
    let of_bins: u64 = total["bins"].as_array().expect("a list").iter().map(keys).sum();
    assert!(
        of_bins.abs_diff(keys(&total["with_ttl"]) - keys(&total["later"])) < 200,
        "each key is in a part: {of_bins}"
    );
}

#[tokio::test]
async fn names_are_grouped_by_their_first_parts_and_no_last_part_is_shown() {
    let (master, replica) = pair().await;
    let all = write(&master, "session:web", (0..300).map(|_| 30 * 60_000)).await
        + write(&master, "user", (0..200).map(|_| 0)).await
        + write(&master, "secret-name", (0..1).map(|_| 0)).await;
    until_there(&replica, all).await;
    let found = forecast(&master.url(), &["--by-prefix", "--top", "2"]).await;
    let groups = found["prefixes"].as_array().expect("a list");
    let shown: Vec<_> = groups.iter().map(|g| (g["prefix"].as_str().unwrap(), keys(g), g["soon"].clone())).collect();
    assert_eq!(shown, [("session:", 300, json!(300)), ("user:", 200, json!(0))]);
    assert_eq!(forecast(&master.url(), &[]).await["prefixes"], json!(null), "off unless it is asked for");
}

#[tokio::test]
async fn expired_keys_that_a_replica_hides_are_estimated() {
    let (master, replica) = pair().await;
    Keyspace::of(&master, 0).expired(400, "expired:").await;
    Keyspace::of(&master, 0).live_ttl(1_000, "live:").await;
    until_there(&replica, 1_400).await;
    let found = forecast(&master.url(), &[]).await;
    assert_eq!((keys(&found["total"]["with_ttl"]), keys(&found["total"]["expired"])), (1_000, 400));
    assert_eq!(master.dbsize(0).await, 1_400, "nothing was freed");
}

#[tokio::test]
async fn without_a_replica_the_master_is_looked_at_only_where_that_is_asked_for() {
    let server = Server::start().await;
    write(&server, "k", (0..500).map(|_| HOUR_MS)).await;
    let refused = run(["forecast", &server.url()]).await.expect(3);
    assert!(refused.stderr.contains("--on-master") && refused.stdout.is_empty(), "{refused:?}");
    let found = forecast(&server.url(), &["--on-master"]).await;
    assert_eq!(keys(&found["total"]["with_ttl"]), 500);
    let other = Server::start().await;
    let wrong = run(["forecast", &server.url(), "--replica", &other.url()]).await.expect(3);
    assert!(wrong.stderr.contains("is no replica"), "{wrong:?}");
    let empty = forecast(&other.url(), &["--on-master"]).await;
    assert_eq!((keys(&empty["total"]["with_ttl"]), empty["dbs"].as_array().map(Vec::len)), (0, Some(0)));
}

#[tokio::test]
async fn a_user_that_may_read_no_value_is_enough() {
    let (master, replica) = pair().await;
    until_there(&replica, write(&master, "k", (0..50).map(|_| HOUR_MS)).await).await;
    for server in [&master, &replica] {
        let rules = ["-@all", "+scan", "+pttl", "+dbsize", "+info", "+ping", "+select", "~*", ">pw", "on"];
        let words: Vec<&str> = ["ACL", "SETUSER", "looker"].into_iter().chain(rules).collect();
        server.cmd(&words).await;
    }
    assert_eq!(keys(&forecast(&master.url_as("looker", "pw"), &[]).await["total"]["with_ttl"]), 50);
}

#[tokio::test]
async fn every_master_of_a_cluster_is_looked_at_on_a_replica_of_its_own() {
    let cluster = Cluster::start(3, true).await;
    let live = cluster.fill(900, 0).await;
    let found = probe_forecast(&cluster.url(), live.len() as u64).await;
    let sources = found["sources"].as_array().expect("a list");
    assert!(sources.len() == 3 && sources.iter().all(|source| source["addr"] != source["master"]), "{sources:#?}");
    let one = cluster.url();
    let named = run(["forecast", &one, "--replica", "redis://127.0.0.1:1"]).await.expect(3);
    assert!(named.stderr.contains("leave --replica out"), "{named:?}");
}

#[tokio::test]
async fn a_sample_of_a_cluster_is_as_near_as_it_says_also_where_hash_tags_put_most_keys_into_few_slots() {
    let cluster = Cluster::start(3, true).await;
    let names = |prefix: &str, many: u64| (0..many).map(|n| format!("{prefix}{n}")).collect();
    cluster.write(&names("spread:", 30_000), None).await;
    cluster.write(&names("{tenant-1}:", 30_000), Some(12 * HOUR_MS)).await;
    cluster.write(&names("{tenant-2}:", 20_000), Some(12 * HOUR_MS)).await;
    cluster.write(&names("{tenant-3}:", 10_000), Some(200 * HOUR_MS)).await;
    probe("the replicas have every key", PATIENCE, async || {
        let mut keys = 0;
        for master in 0..3 {
            keys += cluster.replica_of(master).dbsize(0).await;
        }
        keys == 90_000
    })
    .await;
    let found = forecast(&cluster.url(), &["--sample", "8000"]).await;
    let total = &found["total"];
    let looked_at = total["looked_at"].as_u64().expect("a number");
    assert!((15_000..45_000).contains(&looked_at), "{looked_at}");
    near(&total["with_ttl"], 60_000, "with a TTL");
    near(&total["without_ttl"], 30_000, "without");
    near(&total["later"], 10_000, "later than a week");
    near(&total["within"][4], 50_000, "within six hours to a day");
    assert!(total["with_ttl"]["keys_error"].as_u64() < Some(3_000), "and that is near: {}", total["with_ttl"]);
    assert!(!found["report"].as_str().expect("a text").contains("countkeysinslot"), "{found:#}");
}

/// The forecast, as soon as the replicas have every key.
async fn probe_forecast(url: &str, all: u64) -> Value {
    let mut found = json!(null);
    probe("the replicas have every key", PATIENCE, async || {
        found = forecast(url, &[]).await;
        let total = &found["total"];
        keys(&total["with_ttl"]) + keys(&total["without_ttl"]) == all
    })
    .await;
    found
}

#[tokio::test]
async fn a_daemon_makes_a_forecast_on_request_and_keeps_the_last_one_without_names() {
    let (master, replica) = pair().await;
    until_there(&replica, write(&master, "secret", (0..50).map(|_| HOUR_MS)).await).await;
    let mut daemon = Daemon::start(&instance("cache", &master.url(), "")).await;
    let path = "/api/v1/instances/cache/forecast";
    assert_eq!(daemon.get(path).await.code(), (404, "DCS.4001"));
    let request = daemon.request(Method::POST, path).json(&json!({"by_prefix": true, "zone": "Europe/Berlin"}));
    let made = daemon.send(request).await.ok();
    assert_eq!((keys(&made["total"]["with_ttl"]), &made["prefixes"][0]["prefix"]), (50, &json!("secret:")));
    daemon.restart().await;
    let last = daemon.get(path).await.ok();
    assert_eq!((&last["at"], &last["prefixes"], &last["zone"]), (&made["at"], &json!(null), &json!("Europe/Berlin")));
    assert!(!last.to_string().contains("secret"), "{last}");
    let wrong = daemon.request(Method::POST, path).json(&json!({"zone": "Mars"}));
    assert_eq!(daemon.send(wrong).await.code(), (400, "DCS.4800"));
}

#[tokio::test]
async fn a_daemon_makes_forecasts_by_itself_where_the_settings_want_that() {
    let (master, replica) = pair().await;
    until_there(&replica, write(&master, "k", (0..20).map(|_| HOUR_MS)).await).await;
    let alone = Server::start().await;
    let instances = [instance("alone", &alone.url(), ""), instance("cache", &master.url(), "")].concat();
    let daemon = Daemon::start(&format!("{instances}[forecast]\nevery = \"1d\"\n")).await;
    let path = "/api/v1/instances/cache/forecast";
    probe("a forecast is there", Duration::from_secs(20), async || daemon.get(path).await.status.is_success()).await;
    let none = daemon.send(daemon.request(Method::POST, "/api/v1/instances/alone/forecast").json(&json!({}))).await;
    assert_eq!(none.status.as_u16(), 409, "{}", none.body);
}
