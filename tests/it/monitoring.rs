//! Monitoring of the daemon: metrics that promtool accepts, alerts that fire when they should, a dashboard whose panels a real
//! Prometheus can answer. `make clients` gets these programs.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::sdk::daemon;
use crate::support::clients::{client, output, root};
use crate::support::daemon::Daemon;
use crate::support::keyspace::Keyspace;
use crate::support::server::Server;
use crate::support::{PATIENCE, free_port, probe};

#[tokio::test]
async fn promtool_accepts_the_figures() {
    let server = Server::start().await;
    let daemon = daemon(&server).await;
    let id = daemon.scan("cache").await;
    daemon.until(&id, "succeeded").await;
    let text = daemon.with_token("figures").figures().await;
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), &text).expect("it is written");
    let mut check = Command::new(client("promtool"));
    check.args(["check", "metrics"]).stdin(std::fs::File::open(file.path()).expect("it is there"));
    let run = output(check).await;
    let said = String::from_utf8_lossy(&run.stderr).into_owned() + String::from_utf8_lossy(&run.stdout).as_ref();
    assert!(run.status.success() && said.trim().is_empty(), "{said}\n{text}");
}

#[tokio::test]
async fn alerts_fire_when_they_should_and_only_then() {
    for what in [["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]] {
        let mut promtool = Command::new(client("promtool"));
        promtool.args(what).current_dir(root().join("deploy/prometheus"));
        let run = output(promtool).await;
        let said = String::from_utf8_lossy(&run.stderr).into_owned() + String::from_utf8_lossy(&run.stdout).as_ref();
        assert!(run.status.success(), "{said}");
    }
}

/// A Prometheus of a test's own, killed on drop.
struct Prometheus {
    child: Child,
    url: String,
    client: reqwest::Client,
    _dir: tempfile::TempDir,
}

impl Prometheus {
    /// Scrapes the daemon each second and evaluates the shipped alerts.
    fn start(daemon: &Daemon) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let config = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [{}]\nscrape_configs:\n- job_name: ttlsweep\n  \
             authorization: {{credentials: figures}}\n  static_configs: [{{targets: [\"{}\"]}}]\n",
            root().join("deploy/prometheus/alerts.yml").display(),
            daemon.authority(),
        );
        std::fs::write(dir.path().join("prometheus.yml"), config).expect("it is written");
        let port = free_port();
        let child = Command::new(client("prometheus"))
            .arg(format!("--config.file={}", dir.path().join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("it can be run");
        Self { child, url: format!("http://127.0.0.1:{port}"), client: reqwest::Client::new(), _dir: dir }
    }

    async fn get(&self, path: &str, query: &[(&str, &str)]) -> Option<Value> {
        let request = self.client.get(format!("{}{path}", self.url)).query(query).timeout(Duration::from_secs(5));
        let text = request.send().await.ok()?.text().await.ok()?;
        serde_json::from_str(&text).ok()
    }

    /// The value of an expression now. `None`: Prometheus does not understand it, or is not up yet.
    async fn ask(&self, expr: &str) -> Option<Vec<Value>> {
        let answer = self.get("/api/v1/query", &[("query", expr)]).await?;
        answer["data"]["result"].as_array().cloned()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The expressions of a dashboard with their variables filled in, each with the title of its panel.
fn expressions(dashboard: &Value) -> Vec<(String, String)> {
    let panels = dashboard["panels"].as_array().expect("panels").iter();
    let targets = panels.flat_map(|panel| {
        let targets = panel["targets"].as_array().cloned().unwrap_or_default();
        targets.into_iter().map(move |target| (panel["title"].clone(), target["expr"].clone()))
    });
    targets
        .map(|(title, expr)| {
            let mut expr = expr.as_str().expect("an expression").to_owned();
            for (variable, value) in
                [("$redis_instance", ".*"), ("$__rate_interval", "1m"), ("$__range", "5m"), ("$__interval", "1m")]
            {
                expr = expr.replace(variable, value);
            }
            (title.as_str().expect("a title").to_owned(), expr)
        })
        .collect()
}

#[tokio::test]
async fn a_real_prometheus_answers_every_panel_of_the_dashboard() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(500, "expired:").await;
    Keyspace::of(&server, 0).live_ttl(2_000, "live:").await;
    let daemon = daemon(&server).await;
    let prometheus = Prometheus::start(&daemon);
    let asked = async |expr: &str| prometheus.ask(expr).await.unwrap_or_default();
    probe("it scrapes the daemon", PATIENCE, async || !asked("up{job=\"ttlsweep\"} == 1").await.is_empty()).await;
    // So that there is a hold to show.
    let slow = serde_json::json!({"instance_id": "cache", "max_keys_per_sec": 500});
    let id = daemon.create(slow).await;
    daemon.until(&id, "running").await;
    daemon.post(&format!("/api/v1/tasks/{id}/pause")).await.ok();
    probe("the hold is seen", PATIENCE, async || !asked("ttlsweep_holding{reason=\"paused\"} == 1").await.is_empty())
        .await;
    daemon.post(&format!("/api/v1/tasks/{id}/resume")).await.ok();
    daemon.hurry(&id).await;
    daemon.until(&id, "succeeded").await;
    probe("its end is seen", PATIENCE, async || {
        !asked("ttlsweep_tasks_ended_total{state=\"succeeded\"} == 1").await.is_empty()
    })
    .await;
    daemon.put("/api/v1/instances/cache/keep", &serde_json::json!({"max_backlog": "50%"})).await.ok();
    let text = std::fs::read_to_string(root().join("deploy/grafana/ttlsweep.json")).expect("it is there");
    let dashboard: Value = serde_json::from_str(&text).expect("JSON");
    let expressions = expressions(&dashboard);
    assert!(expressions.len() >= 15, "{expressions:?}");
    for (title, expr) in &expressions {
        let what = format!("the panel `{title}` has data: {expr}");
        probe(&what, PATIENCE, async || prometheus.ask(expr).await.is_some_and(|result| !result.is_empty())).await;
    }
    let rules = prometheus.get("/api/v1/rules", &[]).await.expect("an answer");
    let rules = rules["data"]["groups"][0]["rules"].as_array().expect("rules").clone();
    assert!(rules.len() >= 7 && rules.iter().all(|rule| rule["health"] == "ok"), "{rules:?}");
    assert_eq!(asked("ALERTS").await, Vec::<Value>::new(), "all is well");
}
