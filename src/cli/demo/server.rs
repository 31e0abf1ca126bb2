//! The demo's private server: a child process in a temporary folder. Both are removed however the demo ends.
//!
//! - It listens on loopback only, with a random password, so that no other user of this machine can use it. The
//!   password also proves that the server that answers is ours and not one that took the port first.
//! - It writes nothing to disk but its log.
//! - Normal end, error, signal and panic: the handle's `Drop` kills it and removes the folder.
//! - `kill -9` of the demo, a closed terminal, or a second Ctrl-C: a watchdog shell reads from a pipe that only the demo
//!   holds. If the pipe closes before a word was written to it, the watchdog kills the server and removes the folder.
//!   Only a `kill -9` between the start of the server and that of the watchdog leaves the server behind.
//! - Server and watchdog run in process groups of their own: the Ctrl-C that a terminal sends to the demo does not reach
//!   them, so that the sweep can end its batch.

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

/// Names of server programs, in the order in which the PATH is searched for them.
const BINARIES: [&str; 2] = ["redis-server", "valkey-server"];
/// Starts to try, each on another port: a port that was free may be taken before the server binds it.
const START_TRIES: u32 = 5;
/// Longest time until a server answers. Without data it takes a fraction of a second.
const START_WITHIN: Duration = Duration::from_secs(20);
/// Time between two attempts to connect to a server that starts.
const START_TICK: Duration = Duration::from_millis(20);
/// Lines of the server's log that an error shows, from its end.
const LOG_LINES: usize = 5;
/// The watchdog: reads a word from stdin. If the pipe closes without one the demo has died, so it kills the server ($1) and removes
/// the folder ($2).
const WATCHDOG: &str = r#"read -r word && exit 0; kill -9 "$1"; rm -rf "$2""#;

/// Finds a server program on the PATH.
pub(super) fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let mut candidates = BINARIES.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    candidates.find(|candidate| candidate.is_file())
}

fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// A free port for which the port 10,000 above is free too: there a cluster node listens for the other nodes.
fn port_with_bus() -> io::Result<u16> {
    const BUS: u16 = 10_000;
    const TRIES: u32 = 1_000;
    for _ in 0..TRIES {
        let port = free_port()?;
        // The ports that systems hand out are high, often too high for one 10,000 above: then this one is tried as the bus port.
        for port in [port, port.saturating_sub(BUS)] {
            let both = port.checked_add(BUS).map(|bus| [port, bus]).filter(|_| port > 1024);
            if both.is_some_and(|both| both.iter().all(|&p| TcpListener::bind((Ipv4Addr::LOCALHOST, p)).is_ok())) {
                return Ok(port);
            }
        }
    }
    Err(io::Error::new(io::ErrorKind::AddrInUse, "no pair of free ports for a cluster node"))
}

/// A running private server. Dropping it kills the server and removes its folder.
#[derive(Debug)]
pub(super) struct DemoServer {
    child: Child,
    watchdog: Option<Child>,
    port: u16,
    password: String,
    // Must be the last field: the folder is removed after the server was killed (see Drop).
    dir: TempDir,
}

/// Why a private server could not be started.
#[derive(Debug, thiserror::Error)]
pub(super) enum CannotStart {
    /// The program could not be run.
    #[error("cannot run {program}")]
    Spawn {
        /// The server program, or `sh` for the watchdog.
        program: PathBuf,
        /// Error of the operating system.
        #[source]
        source: io::Error,
    },
    /// The folder, a port or the log file could not be had.
    #[error("cannot prepare a private server")]
    Prepare(#[from] io::Error),
    /// The server exited before it answered.
    #[error("{program} exited while starting; the end of its log:\n{log}")]
    Ended {
        /// Path of the server program.
        program: PathBuf,
        /// The last lines of its log.
        log: String,
    },
    /// The server runs and does not answer.
    #[error("{program} did not answer within {}s; the end of its log:\n{log}", START_WITHIN.as_secs())]
    Silent {
        /// Path of the server program.
        program: PathBuf,
        /// The last lines of its log.
        log: String,
    },
}

impl DemoServer {
    /// Starts a server with a random password and waits until it answers. Dropping the future kills the server too.
    ///
    /// # Errors
    /// [`CannotStart`].
    pub(super) async fn start(program: &Path) -> Result<Self, CannotStart> {
        Self::start_as(program, &Uuid::new_v4().to_string(), false).await
    }

    /// Starts a server with this password, as a cluster node if `cluster`. Dropping the future kills the server too.
    ///
    /// # Errors
    /// [`CannotStart`].
    pub(super) async fn start_as(program: &Path, password: &str, cluster: bool) -> Result<Self, CannotStart> {
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
        // The password goes into a file in a folder that only this user can enter: arguments can be read by every user.
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
        // From here on the handle owns the child and kills it, whatever fails next.
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
                return Err(CannotStart::Ended { program: program.to_owned(), log: self.log_end() });
            }
            // An error means that the server is not up yet, or that another one has the port and ours is about to exit.
            if Conn::open(&self.addr(), &self.conn_options()).await.is_ok() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(CannotStart::Silent { program: program.to_owned(), log: self.log_end() });
            }
            sleep(START_TICK).await;
        }
    }

    /// The process id of the server.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The TCP port on loopback.
    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// The address to connect to.
    pub(super) fn addr(&self) -> NodeAddr {
        NodeAddr::Tcp { host: Ipv4Addr::LOCALHOST.to_string(), port: self.port }
    }

    /// The password of the default user.
    pub(super) fn password(&self) -> &str {
        &self.password
    }

    /// Options for a connection, with the password.
    pub(super) fn conn_options(&self) -> ConnOptions {
        let credentials = Credentials { user: None, password: Some(self.password.clone().into_bytes().into()) };
        ConnOptions::plain(credentials, Duration::from_secs(5), Duration::from_secs(30))
    }

    fn log_end(&self) -> String {
        let log = std::fs::read(self.dir.path().join("log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }
}

impl Drop for DemoServer {
    fn drop(&mut self) {
        // Errors are ignored: these calls fail only if the process has ended already.
        let _ = self.child.kill();
        // The watchdog ends before the killed child is reaped: until then the process id is the child's, and no other process can get it.
        if let Some(mut watchdog) = self.watchdog.take() {
            if let Some(mut word) = watchdog.stdin.take() {
                let _ = word.write_all(b"done\n");
            }
            let _ = watchdog.wait();
        }
        let _ = self.child.wait();
    }
}
