//! A real Redis or Valkey server of a test's own.
//!
//! [`Server::start`] for the usual one, [`Server::options`] for a special one. It listens on 127.0.0.1 and on a
//! unix socket, keeps nothing on disk, and is killed and its folder removed on drop.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    time::Duration,
};

use redis::{AsyncConnectionConfig, FromRedisValue, RedisResult, Value, aio::MultiplexedConnection};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use super::{PATIENCE, free_port, probe, signal, skipped};

/// The client's own default of half a second is too short on a busy machine.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);

/// How many ports are tried before a start counts as failed: a clash with another test process is rare.
const START_TRIES: u32 = 5;

/// Which family a server belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Redis,
    Valkey,
}

/// A server's own version, such as 7.0.15 (for Valkey not the Redis version that it claims to be).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

/// The product and version of the binary under test.
#[derive(Clone, Copy, Debug)]
struct Binary {
    kind: Kind,
    version: Version,
}

/// How a server is started; see [`Server::options`].
#[derive(Clone, Debug, Default)]
pub struct Options {
    config: Vec<(String, String)>,
    arguments: Vec<String>,
    password: Option<String>,
}

impl Options {
    /// A line of the configuration file, such as `("maxmemory", "10mb")`; a later line wins.
    pub fn with_config(mut self, name: &str, value: &str) -> Self {
        self.config.push((name.to_owned(), value.to_owned()));
        self
    }

    /// An argument on the command line, after the configuration file, such as `--sentinel`.
    pub fn with_arg(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }

    /// The default user's password; [`Server::url`] and [`Server::conn`] use it.
    pub fn with_password(mut self, password: &str) -> Self {
        self.password = Some(password.to_owned());
        self.with_config("requirepass", password)
    }

    /// An ACL user that exists from the start, also after a restart: `("sweeper", "on >pw +scan +dbsize")`.
    pub fn with_user(self, name: &str, rules: &str) -> Self {
        self.with_config("user", &format!("{name} {rules}"))
    }

    /// Starts the server and waits until it answers.
    pub async fn start(self) -> Server {
        let dir = tempfile::Builder::new().prefix("ttlsweep-it-").tempdir().expect("a temporary folder");
        let mut server = Server { port: 0, child: None, options: self, dir };
        for left in (0..START_TRIES).rev() {
            server.port = free_port();
            match server.launch().await {
                Ok(()) => return server,
                Err(Failure::AddressInUse) if left > 0 => {}
                Err(failure) => panic!("{}", server.describe(&failure)),
            }
        }
        unreachable!("the last try returns or panics")
    }
}

/// Why a server did not come up.
#[derive(Debug)]
enum Failure {
    AddressInUse,
    Exited,
}

/// A running server.
pub struct Server {
    port: u16,
    child: Option<Child>,
    options: Options,
    // The last field: the server is killed (see Drop) before its folder goes.
    dir: TempDir,
}

impl Server {
    /// The usual server: no password, nothing kept on disk.
    pub async fn start() -> Self {
        Self::options().start().await
    }

    /// A server with options, to be started with [`Options::start`].
    pub fn options() -> Options {
        Options::default()
    }

    /// The version of the binary under test, known without starting it.
    pub fn version() -> Version {
        binary().version
    }

    /// The family of the binary under test.
    pub fn kind() -> Kind {
        binary().kind
    }

    /// Whether the binary under test was built with TLS; if not, the test is reported as skipped.
    pub fn has_tls() -> bool {
        let has = Self::was_built_with_tls();
        if !has {
            skipped("the server was built without TLS");
        }
        has
    }

    fn was_built_with_tls() -> bool {
        static HAS_TLS: OnceLock<bool> = OnceLock::new();
        *HAS_TLS.get_or_init(|| {
            // A TLS port without a certificate: every binary ends at once, and says why.
            let output = Command::new(binary_path()).args(["--port", "0", "--tls-port", "1"]).output();
            let output = output.unwrap_or_else(|error| panic!("cannot run {}: {error}", binary_path().display()));
            let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            !said.contains("Bad directive") && !said.contains("finding TLS support")
        })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    /// The TCP port; the same after a restart.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The unix socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("redis.sock")
    }

    /// The server's own folder.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The process id; panics when it was stopped.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the server was stopped by this test").id()
    }

    /// The URL for the default user, password included.
    pub fn url(&self) -> String {
        match &self.options.password {
            Some(password) => format!("redis://:{password}@{}", self.addr()),
            None => format!("redis://{}", self.addr()),
        }
    }

    /// The URL for an ACL user.
    pub fn url_as(&self, user: &str, password: &str) -> String {
        format!("redis://{user}:{password}@{}", self.addr())
    }

    /// The default user's password.
    pub fn password(&self) -> Option<&str> {
        self.options.password.as_deref()
    }

    /// A client for the default user.
    pub fn client(&self) -> redis::Client {
        redis::Client::open(self.url()).expect("a valid URL")
    }

    /// A new connection on database 0.
    pub async fn conn(&self) -> MultiplexedConnection {
        self.try_conn().await.expect("a connection")
    }

    /// A new connection on a database of its own choice.
    pub async fn conn_to(&self, db: u32) -> MultiplexedConnection {
        let mut connection = self.conn().await;
        let selected: RedisResult<()> = redis::cmd("SELECT").arg(db).query_async(&mut connection).await;
        selected.expect("SELECT");
        connection
    }

    /// Runs one command on a connection of its own and panics if it fails.
    pub async fn cmd(&self, words: &[&str]) -> Value {
        self.query(words).await
    }

    /// As [`Server::cmd`], with the reply as a type of choice.
    pub async fn query<T: FromRedisValue>(&self, words: &[&str]) -> T {
        match self.try_query(words).await {
            Ok(reply) => reply,
            Err(error) => panic!("{}: {error}", words.join(" ")),
        }
    }

    /// As [`Server::query`], for a command that may fail.
    pub async fn try_query<T: FromRedisValue>(&self, words: &[&str]) -> RedisResult<T> {
        let mut connection = self.try_conn().await?;
        let mut command = redis::Cmd::new();
        for word in words {
            command.arg(word);
        }
        command.query_async(&mut connection).await
    }

    /// One section of INFO.
    pub async fn info(&self, section: &str) -> BTreeMap<String, String> {
        let text: String = self.query(&["INFO", section]).await;
        text.lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    /// One number of INFO.
    pub async fn info_number(&self, section: &str, name: &str) -> u64 {
        let info = self.info(section).await;
        info.get(name)
            .and_then(|value| value.parse().ok())
            .unwrap_or_else(|| panic!("no number {name} in INFO {section}"))
    }

    /// How many keys have been freed since the start because they had expired.
    pub async fn expired_keys(&self) -> u64 {
        self.info_number("stats", "expired_keys").await
    }

    /// How many keys a database holds, those included that have expired and are still in memory.
    pub async fn dbsize(&self, db: u32) -> u64 {
        let mut connection = self.conn_to(db).await;
        redis::cmd("DBSIZE").query_async(&mut connection).await.expect("DBSIZE")
    }

    /// Switches active expiry off: only a client that touches an expired key frees it from now on.
    pub async fn stop_active_expiry(&self) {
        self.cmd(&["DEBUG", "SET-ACTIVE-EXPIRE", "0"]).await;
    }

    /// The id of this run of the process; another after a restart.
    pub async fn run_id(&self) -> String {
        self.info("server").await["run_id"].clone()
    }

    /// Makes this server a replica and waits until it has the master's data.
    pub async fn replica_of(&self, master: &Server) {
        if let Some(password) = &master.options.password {
            self.cmd(&["CONFIG", "SET", "masterauth", password]).await;
        }
        let port = master.port.to_string();
        self.cmd(&["REPLICAOF", "127.0.0.1", &port]).await;
        // The master's view lags behind: the replica counts as online with its first acknowledgement, and the fork
        // that fed it is seen until it is reaped.
        probe("the replica is in step with its master, and the master knows", PATIENCE, async || {
            let (ours, theirs) = (self.info("replication").await, master.info("all").await);
            ours.get("master_link_status").map(String::as_str) == Some("up")
                && theirs.get("rdb_bgsave_in_progress").map(String::as_str) == Some("0")
                && theirs.iter().any(|(name, value)| {
                    name.starts_with("slave")
                        && value.contains(&format!("port={},", self.port))
                        && value.contains("state=online")
                })
        })
        .await;
    }

    /// Starts another process on the same port, after killing the one that may still run: same options, no
    /// data, another run id.
    pub async fn restart(&mut self) {
        self.kill9();
        if let Err(failure) = self.launch().await {
            panic!("{}", self.describe(&failure));
        }
    }

    /// Kills the process with SIGKILL; the port stays reserved in practice (`free_port`).
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Both fail only if the process has ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Freezes the process: connections are accepted by the kernel, and nothing is answered.
    pub fn sigstop(&self) {
        signal(self.pid(), "STOP");
    }

    /// Lets a frozen process go on.
    pub fn sigcont(&self) {
        signal(self.pid(), "CONT");
    }

    /// What the server has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    async fn try_conn(&self) -> RedisResult<MultiplexedConnection> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(RESPONSE_TIMEOUT))
            .set_response_timeout(Some(RESPONSE_TIMEOUT));
        self.client().get_multiplexed_async_connection_with_config(&config).await
    }

    /// Starts the process on `self.port` and waits until it answers or has ended.
    async fn launch(&mut self) -> Result<(), Failure> {
        let config = self.dir.path().join("redis.conf");
        std::fs::write(&config, self.config()).expect("the configuration file");
        let log = std::fs::File::create(self.dir.path().join("log")).expect("the log file");
        // A killed process leaves its socket behind, and the readiness probe must not meet it.
        let _ = std::fs::remove_file(self.socket());
        let child = Command::new(binary_path())
            .arg(&config)
            .args(&self.options.arguments)
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stderr(log.try_clone().expect("a second handle"))
            .stdout(log)
            .spawn();
        self.child = Some(child.unwrap_or_else(|error| {
            panic!("cannot start {}: {error}", binary_path().display());
        }));

        let socket = self.socket();
        let mut exited = false;
        let child = self.child.as_mut().expect("just started");
        probe("the server answers PING", PATIENCE, async || {
            exited = child.try_wait().expect("its own child").is_some();
            exited || answers_ping(&socket).await
        })
        .await;
        if !exited {
            return Ok(());
        }
        self.child = None;
        if self.log().contains("Address already in use") { Err(Failure::AddressInUse) } else { Err(Failure::Exited) }
    }

    /// The configuration file. The caller's lines come last, so that they win.
    fn config(&self) -> String {
        let mut lines = vec![
            format!("port {}", self.port),
            "bind 127.0.0.1".to_owned(),
            format!("unixsocket {}", self.socket().display()),
            "save \"\"".to_owned(),
            "appendonly no".to_owned(),
            // A replica is served at once; the default waits 5 s for others to join.
            "repl-diskless-sync yes".to_owned(),
            "repl-diskless-sync-delay 0".to_owned(),
        ];
        if needs_debug_switch(binary()) {
            lines.push("enable-debug-command yes".to_owned());
        }
        for (name, value) in &self.options.config {
            lines.push(format!("{name} {value}"));
        }
        lines.join("\n") + "\n"
    }

    fn describe(&self, failure: &Failure) -> String {
        let path = binary_path();
        let path = path.display();
        format!("{path} did not start ({failure:?}), its log:\n{}", self.log())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill9();
    }
}

/// A master and its replica.
pub async fn pair() -> (Server, Server) {
    let (master, replica) = (Server::start().await, Server::start().await);
    replica.replica_of(&master).await;
    (master, replica)
}

/// Waits until a replica holds as many keys as its master: it is "in step" before the master begins to stream to it.
pub async fn until_copied(master: &Server, replica: &Server) {
    let keys = master.dbsize(0).await;
    probe("the replica has the keys", PATIENCE, async || replica.dbsize(0).await == keys).await;
}

/// Whether the server answers. Asked over its own socket, which no other server can have, and which is opened
/// after the TCP port. A server that asks for a password is up; one that is loading is not.
async fn answers_ping(socket: &Path) -> bool {
    let Ok(mut stream) = UnixStream::connect(socket).await else {
        return false;
    };
    let mut reply = [0; 64];
    if stream.write_all(b"PING\r\n").await.is_err() {
        return false;
    }
    match stream.read(&mut reply).await {
        Ok(length) => reply[..length].starts_with(b"+PONG") || reply.starts_with(b"-NOAUTH"),
        Err(_) => false,
    }
}

/// The server that the tests run against.
fn binary_path() -> PathBuf {
    std::env::var_os("TTLSWEEP_TEST_SERVER").map_or_else(|| "redis-server".into(), PathBuf::from)
}

/// Asks the binary once who it is: `Redis server v=7.0.15 ...` or `Valkey server v=8.0.1 ...`.
fn binary() -> Binary {
    static BINARY: OnceLock<Binary> = OnceLock::new();
    *BINARY.get_or_init(|| {
        let path = binary_path();
        let output = Command::new(&path)
            .arg("--version")
            .output()
            .unwrap_or_else(|error| panic!("cannot run {}: {error} (see scripts/servers.sh)", path.display()));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let kind = if text.starts_with("Valkey") { Kind::Valkey } else { Kind::Redis };
        let version = text
            .split_once("v=")
            .and_then(|(_, rest)| parse_version(rest.split_whitespace().next()?))
            .unwrap_or_else(|| panic!("{}: no version in {text:?}", path.display()));
        Binary { kind, version }
    })
}

fn parse_version(text: &str) -> Option<Version> {
    let mut parts = text.splitn(3, '.').map(str::parse);
    let mut next = || parts.next()?.ok();
    Some(Version(next()?, next()?, next()?))
}

/// From Redis 7.0 on, and in every Valkey, DEBUG must be allowed; before that the switch is unknown.
fn needs_debug_switch(binary: Binary) -> bool {
    binary.kind == Kind::Valkey || binary.version >= Version(7, 0, 0)
}
