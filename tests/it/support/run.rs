//! The command under test, run to its end or watched while it runs.

use std::{
    ffi::OsStr,
    path::PathBuf,
    process::{Output, Stdio},
};

use serde_json::Value;
use tokio::process::Child;

use super::{PATIENCE, probe, server::Server, ttlsweep};

/// How a run ended.
#[derive(Debug)]
pub struct Run {
    /// The exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// The content of stdout.
    pub stdout: String,
    /// The content of stderr.
    pub stderr: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).expect("stdout is text"),
            stderr: String::from_utf8(output.stderr).expect("stderr is text"),
        }
    }
}

impl Run {
    /// The one object on stdout.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("no single object ({e}): {self:?}"))
    }

    /// `num` of the record.
    #[track_caller]
    pub fn num(&self) -> u64 {
        self.json()["num"].as_u64().expect("num is a number")
    }

    /// A number of `report.totals`.
    #[track_caller]
    pub fn total(&self, name: &str) -> f64 {
        self.json()["report"]["totals"][name].as_f64().unwrap_or_else(|| panic!("no total {name}"))
    }

    /// The shards of the report.
    #[track_caller]
    pub fn shards(&self) -> Vec<Value> {
        self.json()["report"]["shards"].as_array().expect("a list of shards").clone()
    }

    /// Seconds for which the first DB of the first shard was held for a reason.
    #[track_caller]
    pub fn held(&self, reason: &str) -> f64 {
        self.shards()[0]["dbs"][0]["held_s"][reason].as_f64().unwrap_or(0.0)
    }

    /// Panics unless it ended with this code.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        self
    }
}

/// Runs `ttlsweep` with these arguments.
pub async fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Run {
    Running::start(args).end().await
}

/// Runs `ttlsweep scan URL --json` with more arguments.
pub async fn scan(url: &str, more: &[&str]) -> Run {
    run(["scan", url, "--json"].iter().chain(more)).await
}

/// Starts `ttlsweep scan URL --json` with more arguments, and waits until the server has freed `keys` more expired keys.
pub async fn scan_under_way(server: &Server, url: &str, more: &[&str], keys: u64) -> Running {
    let before = server.expired_keys().await;
    let running = Running::scan(url, more);
    probe("the pass is under way", PATIENCE, async || server.expired_keys().await > before + keys).await;
    running
}

/// A `ttlsweep` that runs. Killed on drop.
pub struct Running {
    child: Child,
    stderr: tempfile::NamedTempFile,
}

impl Running {
    /// Starts it.
    pub fn start<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Self {
        let stderr = tempfile::NamedTempFile::new().expect("a temporary file");
        let mut command = tokio::process::Command::from(ttlsweep());
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
        command.stderr(stderr.reopen().expect("the file is open"));
        Self { child: command.spawn().expect("the program is built"), stderr }
    }

    /// Starts `ttlsweep scan URL --json` with more arguments.
    pub fn scan(url: &str, more: &[&str]) -> Self {
        Self::start(["scan", url, "--json"].iter().chain(more))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id().expect("it runs")
    }

    /// Sends it a signal by name, such as `INT`.
    pub fn signal(&self, name: &str) {
        super::signal(self.pid(), name);
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("it can be asked").is_none()
    }

    /// What it has said on stderr so far.
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.stderr.path()).expect("stderr is text")
    }

    /// Waits until its stderr holds `text`.
    pub async fn says(&self, text: &str) {
        let what = format!("stderr says `{text}`");
        probe(&what, PATIENCE, async || self.stderr().contains(text)).await;
    }

    /// Waits for the end.
    pub async fn end(mut self) -> Run {
        let stdout = self.child.stdout.take();
        let wait = async {
            let mut text = String::new();
            if let Some(mut stdout) = stdout {
                use tokio::io::AsyncReadExt;
                stdout.read_to_string(&mut text).await.expect("stdout is text");
            }
            (self.child.wait().await.expect("it can be waited for"), text)
        };
        let (status, stdout) =
            tokio::time::timeout(2 * PATIENCE, wait).await.unwrap_or_else(|_| panic!("it hangs: {}", self.stderr()));
        Run { code: status.code(), stdout, stderr: self.stderr() }
    }
}

/// A folder with a path for a state file in it.
pub fn state_file() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("sweep.db");
    (dir, path)
}
