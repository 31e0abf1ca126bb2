//! A real daemon of a test's own, and a client for it.

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Once,
    time::Duration,
};

use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use sqlx::Connection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use tempfile::TempDir;

use super::{PATIENCE, probe, signal, ttlsweep};

/// The project of every instance that the tests configure.
pub const PROJECT: &str = "0123456789abcdef0123456789abcdef";

/// A daemon with its settings file and its store. Killed, and its folder removed, on drop.
pub struct Daemon {
    child: Option<Child>,
    url: String,
    token: Option<String>,
    client: Client,
    dir: TempDir,
}

/// The settings of an automatic scan that is due each second.
pub const EACH_SECOND: &str = "[instances.auto-scan]\nenabled = true\ncron = \"* * * * * *\"\n";

/// An answer of the API.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub body: Value,
}

impl Answer {
    /// Returns the body; panics unless the answer is a success.
    #[track_caller]
    pub fn ok(self) -> Value {
        assert_eq!(self.status, StatusCode::OK, "{}", self.body);
        self.body
    }

    /// The status with the contract's code.
    pub fn code(&self) -> (u16, &str) {
        (self.status.as_u16(), self.body["error_code"].as_str().unwrap_or(""))
    }
}

/// An instance for the settings file: its id, its URL, and more lines.
pub fn instance(id: &str, url: &str, more: &str) -> String {
    format!("[[instances]]\nid = \"{id}\"\nproject_id = \"{PROJECT}\"\nurl = \"{url}\"\n{more}\n")
}

/// Installs the cryptography that an HTTP client needs, even without TLS.
pub fn provide_crypto() {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

/// A window that is open now, or closed for hours.
pub fn window(open: bool) -> String {
    let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    let hour = |ahead: i64| (&now + jiff::SignedDuration::from_hours(ahead)).strftime("%H:%M").to_string();
    let (start, end) = if open { (hour(-2), hour(2)) } else { (hour(2), hour(4)) };
    format!("[instances.window]\nstart = \"{start}\"\nend = \"{end}\"\n")
}

impl Daemon {
    /// Starts a daemon whose settings file holds `settings` besides listener and store, and waits until it answers.
    pub async fn start(settings: &str) -> Self {
        let daemon = Self::prepare(settings);
        daemon.launched(|command| command).await
    }

    /// As [`Daemon::start`], at this port, which stays the same after a restart.
    pub async fn start_at(port: u16, settings: &str) -> Self {
        Self::start(&format!("[api]\nlisten = \"127.0.0.1:{port}\"\n{settings}")).await
    }

    /// A daemon that is not started yet.
    pub fn prepare(settings: &str) -> Self {
        provide_crypto();
        let dir = tempfile::Builder::new().prefix("ttlsweep-daemon-").tempdir().expect("a temporary folder");
        let client = Client::builder().no_proxy().timeout(PATIENCE).build().expect("a client");
        let daemon = Self { child: None, url: String::new(), token: None, client, dir };
        daemon.write_settings(settings);
        daemon
    }

    /// Starts the daemon with a changed command.
    pub async fn launched(mut self, change: impl FnOnce(Command) -> Command) -> Self {
        self.launch(change).await;
        self
    }

    /// Sends this token from now on.
    pub fn with_token(mut self, token: &str) -> Self {
        self.token = Some(token.to_owned());
        self
    }

    /// Replaces the settings file. An `[api]` table in `settings` replaces the usual one.
    pub fn write_settings(&self, settings: &str) {
        let api = if settings.contains("[api]") { "" } else { "[api]\nlisten = \"127.0.0.1:0\"\n" };
        let path = format!("[store]\npath = \"{}\"\n", self.store().display());
        let store = if settings.contains("[store]") { "" } else { &path };
        let text = format!("{api}{settings}\n{store}");
        std::fs::write(self.settings_path(), text).expect("the settings file");
    }

    pub fn settings_path(&self) -> PathBuf {
        self.dir.path().join("ttlsweep.toml")
    }

    pub fn store(&self) -> PathBuf {
        self.dir.path().join("store.db")
    }

    /// The records, opened beside the daemon.
    pub async fn records(&self) -> SqliteConnection {
        let options = SqliteConnectOptions::new().filename(self.store());
        SqliteConnection::connect_with(&options).await.expect("the store opens")
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// `host:port`.
    pub fn authority(&self) -> &str {
        self.url.split("//").nth(1).expect("a URL")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    async fn launch(&mut self, change: impl FnOnce(Command) -> Command) {
        let (out, log) = (self.dir.path().join("out"), self.dir.path().join("log"));
        let open = |path: &PathBuf| {
            std::fs::OpenOptions::new().create(true).append(true).open(path).expect("a file for the output")
        };
        let _ = std::fs::remove_file(&out);
        // Skips what earlier processes logged.
        let logged = self.log().len();
        let mut command = change(ttlsweep());
        command.args(["serve", "--config"]).arg(self.settings_path());
        command.stdin(Stdio::null()).stdout(open(&out)).stderr(open(&log));
        let mut child = command.spawn().expect("the program is built");
        let mut url = String::new();
        probe("the daemon says where it listens", PATIENCE, async || {
            if let Some(status) = child.try_wait().expect("its own child") {
                panic!("the daemon ended ({status}):\n{}", self.log());
            }
            let text = std::fs::read_to_string(&out).unwrap_or_default();
            let said = text.lines().find_map(|line| line.strip_prefix("listening on ").map(str::to_owned));
            url = said.filter(|_| text.ends_with('\n')).or_else(|| self.logged_url(logged)).unwrap_or_default();
            !url.is_empty()
        })
        .await;
        self.url = url;
        self.child = Some(child);
    }

    /// Where it listens, as a JSON log says behind this place.
    fn logged_url(&self, from: usize) -> Option<String> {
        let log = self.log();
        let lines = log.get(from..)?.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut lines = lines.filter(|line| line["message"] == "listening");
        lines.find_map(|line| line["url"].as_str().map(str::to_owned))
    }

    /// Kills the daemon if it still runs, and starts it again.
    pub async fn restart(&mut self) {
        self.restart_as(|command| command).await;
    }

    /// As [`Daemon::restart`], with a changed command.
    pub async fn restart_as(&mut self, change: impl FnOnce(Command) -> Command) {
        self.kill9();
        self.launch(change).await;
    }

    /// Kills the daemon with SIGKILL.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Sends a signal by name, such as `TERM`.
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// Stops the daemon with SIGTERM and returns its exit code.
    pub async fn stop(&mut self) -> Option<i32> {
        self.signal("TERM");
        let mut child = self.child.take().expect("it runs");
        let mut status = None;
        probe("the daemon stops", PATIENCE, async || {
            status = child.try_wait().expect("its own child");
            status.is_some()
        })
        .await;
        status.and_then(|status| status.code())
    }

    /// A request with the credentials, if any.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.client.request(method, format!("{}{path}", self.url));
        match &self.token {
            Some(token) => request.header("X-Auth-Token", token),
            None => request,
        }
    }

    /// Sends a request. Checks that the answer, whatever it is, has a request id and is JSON.
    pub async fn send(&self, request: RequestBuilder) -> Answer {
        let response = request.send().await.expect("an answer");
        let (status, headers) = (response.status(), response.headers().clone());
        let text = response.text().await.expect("a body");
        assert!(headers.contains_key("x-request-id"), "{status} {text}");
        assert_eq!(headers["content-type"], "application/json", "{status} {text}");
        Answer { status, body: serde_json::from_str(&text).expect("JSON") }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path)).await
    }

    pub async fn post(&self, path: &str) -> Answer {
        self.send(self.request(Method::POST, path)).await
    }

    pub async fn put(&self, path: &str, body: &Value) -> Answer {
        self.send(self.request(Method::PUT, path).json(body)).await
    }

    /// The metrics, as Prometheus reads them.
    pub async fn figures(&self) -> String {
        let answer = self.request(Method::GET, "/metrics").send().await.expect("an answer");
        answer.text().await.expect("text")
    }

    /// The path of one of the contract's calls.
    pub fn path(id: &str, call: &str) -> String {
        format!("/v2/{PROJECT}/instances/{id}/{call}")
    }

    /// Creates a scan by the contract, and returns the task's id.
    pub async fn scan(&self, id: &str) -> String {
        let record = self.post(&Self::path(id, "scan-expire-keys-task")).await.ok();
        record["id"].as_str().expect("an id").to_owned()
    }

    /// Creates a task with options, and returns its id.
    pub async fn create(&self, options: Value) -> String {
        let answer = self.send(self.request(Method::POST, "/api/v1/tasks").json(&options)).await.ok();
        answer["id"].as_str().expect("an id").to_owned()
    }

    /// Lets a slow task finish.
    pub async fn hurry(&self, id: &str) {
        let request = self.request(Method::PATCH, &format!("/api/v1/tasks/{id}"));
        self.send(request.json(&json!({"max_keys_per_sec": 0}))).await.ok();
    }

    /// A task as it is now.
    pub async fn task(&self, id: &str) -> Value {
        self.get(&format!("/api/v1/tasks/{id}")).await.ok()
    }

    /// Waits until a task is in a state, and gives it.
    pub async fn until(&self, id: &str, state: &str) -> Value {
        let mut task = json!(null);
        let what = format!("task {id} is {state}");
        let found = tokio::time::timeout(PATIENCE, async {
            loop {
                task = self.task(id).await;
                if task["state"] == state {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        if found.await.is_err() {
            panic!("waited in vain: {what}, it is {task:#}\n{}", self.log());
        }
        task
    }

    /// The contract's history of an instance, all of it.
    pub async fn history(&self, id: &str) -> Value {
        self.get(&Self::path(id, "auto-expire/histories?limit=1000")).await.ok()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill9();
        if std::thread::panicking() {
            let _ = std::io::Write::write_all(&mut std::io::stderr(), self.log().as_bytes());
        }
    }
}
