//! The demo's private server: a child process in a folder of its own, gone on every way out.
//!
//! - It listens on loopback only, with a random password, so that no other user of this machine can use it; that
//!   password also proves that the server that answers is ours and not one that took the port first.
//! - It keeps nothing on disk but its log.
//! - Normal end, error, signal and panic: the handle's `Drop` kills it and removes the folder.
//! - `kill -9` of the demo, a closed terminal, or a second Ctrl-C: a shell waits on a pipe that only the demo holds.
//!   When the pipe closes without a word, it kills the server and removes the folder. Only a `kill -9` within the
//!   moment between the two starts leaves the server behind.
//! - Both run in process groups of their own: the Ctrl-C that a terminal sends to the demo does not reach them, so that
//!   the sweep can end its batch.

use std::fs::File;
use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::model::shard::NodeAddr;
use crate::model::target::Credentials;
use crate::node::conn::{Conn, ConnOptions};

/// Names that a server goes by, in the order in which they are looked for.
const BINARIES: [&str; 2] = ["redis-server", "valkey-server"];
/// A port that was free may be taken a moment later.
const START_TRIES: u32 = 5;
/// A server without data is up within a fraction of a second.
const START_WITHIN: Duration = Duration::from_secs(20);
/// How often it is asked whether it is up.
const START_TICK: Duration = Duration::from_millis(20);
/// How much of its log an error shows, in lines.
const LOG_LINES: usize = 5;
/// Waits for a word on stdin. Without one the demo has died: the server goes, and its folder.
const WATCHDOG: &str = r#"read -r word && exit 0; kill -9 "$1"; rm -rf "$2""#;

/// The server on the PATH.
pub fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let mut candidates = BINARIES.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    candidates.find(|candidate| candidate.is_file())
}

fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// A free port below another free one that is 10,000 higher, where a cluster node listens for the others.
fn port_with_bus() -> io::Result<u16> {
    const BUS: u16 = 10_000;
    const TRIES: u32 = 1_000;
    for _ in 0..TRIES {
        let port = free_port()?;
        // Ports that systems hand out lie high: the bus may as well lie there, and the server's port below.
        for port in [port, port.saturating_sub(BUS)] {
            let both = port.checked_add(BUS).map(|bus| [port, bus]).filter(|_| port > 1024);
            if both.is_some_and(|both| both.iter().all(|&p| TcpListener::bind((Ipv4Addr::LOCALHOST, p)).is_ok())) {
                return Ok(port);
            }
        }
    }
    Err(io::Error::new(io::ErrorKind::AddrInUse, "no pair of free ports for a cluster node"))
}

/// A running private server.
#[derive(Debug)]
pub struct DemoServer {
    child: Child,
    watchdog: Option<Child>,
    port: u16,
    password: String,
    // The last field: the server is killed (see Drop) before its folder goes.
    dir: TempDir,
}

/// Why it does not run.
#[derive(Debug, thiserror::Error)]
pub enum CannotStart {
    /// The program could not be run.
    #[error("cannot run {program}")]
    Spawn {
        /// What was to be run.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No folder, no port, no log file.
    #[error("cannot prepare a private server")]
    Prepare(#[from] io::Error),
    /// It ended at once.
    #[error("{program} ended instead of starting; its last words:\n{log}")]
    Ended {
        /// What was run.
        program: PathBuf,
        /// The end of its log.
        log: String,
    },
    /// It runs and does not answer.
    #[error("{program} did not answer within {}s; its last words:\n{log}", START_WITHIN.as_secs())]
    Silent {
        /// What was run.
        program: PathBuf,
        /// The end of its log.
        log: String,
    },
}

impl DemoServer {
    /// Starts one and waits until it answers. Dropping the future ends the server too.
    ///
    /// # Errors
    /// [`CannotStart`].
    pub async fn start(program: &Path) -> Result<Self, CannotStart> {
        Self::start_as(program, &Uuid::new_v4().to_string(), false).await
    }

    /// Starts one with this password, as a node of a cluster where wanted.
    ///
    /// # Errors
    /// [`CannotStart`].
    pub async fn start_as(program: &Path, password: &str, cluster: bool) -> Result<Self, CannotStart> {
        let mut tries = 1;
        loop {
            let mut server = Self::launch(program, password, cluster)?;
            match server.until_up(program).await {
                Err(CannotStart::Ended { log, .. })
                    if tries < START_TRIES && log.contains("Address already in use") =>
                {
                    tries += 1;
                }
                Err(error) => return Err(error),
                Ok(()) => return Ok(server),
            }
        }
    }

    fn launch(program: &Path, password: &str, cluster: bool) -> Result<Self, CannotStart> {
        let dir = tempfile::Builder::new().prefix("ttlsweep-demo-").tempdir()?;
        let port = if cluster { port_with_bus()? } else { free_port()? };
        let password = password.to_owned();
        let mode = if cluster { "cluster-enabled yes\ncluster-node-timeout 5000\n" } else { "" };
        // In a file of a folder that only this user can enter: arguments can be read by everybody.
        let config = dir.path().join("demo.conf");
        std::fs::write(
            &config,
            format!(
                "port {port}\nbind 127.0.0.1\nrequirepass {password}\nsave \"\"\nappendonly no\ndaemonize no\n{mode}dir \"{}\"\n",
                dir.path().display()
            ),
        )?;
        let log = File::create(dir.path().join("log"))?;
        let failed = |program: &Path, source| CannotStart::Spawn { program: program.to_owned(), source };
        let child = Command::new(program)
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .map_err(|source| failed(program, source))?;
        // From here on the child has an owner, whatever fails next.
        let mut server = Self { child, watchdog: None, port, password, dir };
        let watchdog = Command::new("sh")
            .args(["-c", WATCHDOG, "ttlsweep-demo-watchdog", &server.pid().to_string()])
            .arg(server.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(|source| failed(Path::new("sh"), source))?;
        server.watchdog = Some(watchdog);
        Ok(server)
    }

    async fn until_up(&mut self, program: &Path) -> Result<(), CannotStart> {
        let deadline = Instant::now() + START_WITHIN;
        loop {
            if self.child.try_wait()?.is_some() {
                return Err(CannotStart::Ended { program: program.to_owned(), log: self.last_words() });
            }
            // Refused: not up yet, or another server has the port and ours is about to end.
            if Conn::open(&self.addr(), &self.conn_options()).await.is_ok() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(CannotStart::Silent { program: program.to_owned(), log: self.last_words() });
            }
            sleep(START_TICK).await;
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where it listens.
    pub fn addr(&self) -> NodeAddr {
        NodeAddr::Tcp { host: Ipv4Addr::LOCALHOST.to_string(), port: self.port }
    }

    /// Its password.
    pub fn password(&self) -> &str {
        &self.password
    }

    /// How to connect to it.
    pub fn conn_options(&self) -> ConnOptions {
        let credentials = Credentials { user: None, password: Some(self.password.clone().into_bytes().into()) };
        ConnOptions::plain(credentials, Duration::from_secs(5), Duration::from_secs(30))
    }

    fn last_words(&self) -> String {
        let log = std::fs::read(self.dir.path().join("log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }
}

impl Drop for DemoServer {
    fn drop(&mut self) {
        // Each fails only where the process has ended already, which is as good.
        let _ = self.child.kill();
        // Dismissed while the killed child still owns its process id, so that the watchdog can never kill another's.
        if let Some(mut watchdog) = self.watchdog.take() {
            if let Some(mut word) = watchdog.stdin.take() {
                let _ = word.write_all(b"done\n");
            }
            let _ = watchdog.wait();
        }
        let _ = self.child.wait();
    }
}
