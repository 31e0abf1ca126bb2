//! A real PostgreSQL of a test's own, on 127.0.0.1, killed and its folder removed on drop.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use sqlx::{Connection, PgConnection};
use tempfile::TempDir;

use super::{PATIENCE, free_port, probe, signal, skipped};

/// PostgreSQL refuses to run as root: there it runs as `nobody`.
const NOBODY: u32 = 65_534;

/// The server.
pub struct Postgres {
    port: u16,
    bin: PathBuf,
    child: Option<Child>,
    dir: TempDir,
}

impl Postgres {
    /// Starts one with an empty database `records`. `None`: there is no PostgreSQL, which is reported as skipped.
    pub async fn start() -> Option<Self> {
        let Some(bin) = std::env::var_os("TTLSWEEP_TEST_POSTGRES").map(PathBuf::from) else {
            skipped(
                "TTLSWEEP_TEST_POSTGRES names no folder with PostgreSQL's programs (scripts/servers.sh fetch postgres-16)",
            );
            return None;
        };
        let dir = tempfile::Builder::new().prefix("ttlsweep-postgres-").tempdir().expect("a temporary folder");
        let bin = installed(&bin, dir.path());
        let mut server = Self { port: free_port(), bin, child: None, dir };
        let mut initdb = server.command("initdb");
        initdb.args(["--username=ttlsweep", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C", "-D"]);
        let done = initdb.arg(server.data()).output().expect("initdb");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        server.launch().await;
        let mut conn = server.conn_to("postgres").await.expect("it answers");
        sqlx::query("CREATE DATABASE records").execute(&mut conn).await.expect("a database");
        Some(server)
    }

    async fn launch(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join("log")).expect("a log");
        let mut command = self.command("postgres");
        let options = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off", "shared_buffers=32MB"];
        command.arg("-D").arg(self.data()).args(["-p", &self.port.to_string()]);
        for option in options {
            command.args(["-c", option]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.child = Some(command.spawn().expect("postgres starts"));
        probe("PostgreSQL answers", PATIENCE, async || self.conn_to("postgres").await.is_ok()).await;
    }

    /// Stops it at once, as a crash would, and starts it again at the same address.
    pub async fn restart(&mut self) {
        self.stop();
        self.launch().await;
    }

    /// Stops it at once. Committed data is there again after [`Postgres::restart`].
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Immediate shutdown: its own children end with it.
            signal(child.id(), "QUIT");
            let _ = child.wait();
        }
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The URL of the database `records`.
    pub fn url(&self) -> String {
        self.url_at(self.port)
    }

    /// The same through a proxy at another port.
    pub fn url_at(&self, port: u16) -> String {
        format!("postgres://ttlsweep@127.0.0.1:{port}/records?sslmode=disable")
    }

    /// A connection to the records.
    pub async fn conn(&self) -> PgConnection {
        self.conn_to("records").await.expect("PostgreSQL answers")
    }

    /// Makes it a server on which nothing was set up for us: there is no role `ttlsweep`, and only the administrator, whose connection this
    /// returns, needs no password.
    pub async fn administered(&self) -> PgConnection {
        let mut conn = self.conn_to("postgres").await.expect("it answers");
        sqlx::query("CREATE ROLE admin SUPERUSER LOGIN").execute(&mut conn).await.expect("a role");
        let mut conn = self.conn_as("admin", "postgres").await.expect("it answers");
        sqlx::query("ALTER ROLE ttlsweep RENAME TO earlier").execute(&mut conn).await.expect("another name");
        let file: String = sqlx::query_scalar("SHOW hba_file").fetch_one(&mut conn).await.expect("a path");
        let rules = "host all admin 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n";
        fs::write(file, rules).expect("the rules");
        sqlx::query("SELECT pg_reload_conf()").execute(&mut conn).await.expect("a reload");
        probe("it asks for passwords", PATIENCE, async || self.conn_as("earlier", "postgres").await.is_err()).await;
        conn
    }

    async fn conn_to(&self, database: &str) -> Result<PgConnection, sqlx::Error> {
        self.conn_as("ttlsweep", database).await
    }

    async fn conn_as(&self, user: &str, database: &str) -> Result<PgConnection, sqlx::Error> {
        PgConnection::connect(&format!("postgres://{user}@127.0.0.1:{}/{database}?sslmode=disable", self.port)).await
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// One of its programs, run as a user that it accepts.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        let libraries = self.bin.with_file_name("lib");
        command.current_dir("/").env_remove("PGDATA").env("LD_LIBRARY_PATH", libraries);
        if is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop();
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The folder of its programs. As root, a copy that `nobody` can read where the cache lies in root's home.
fn installed(bin: &Path, dir: &Path) -> PathBuf {
    let install = dir.join("install");
    let from = bin.parent().expect("a folder above it");
    let is_open = |folder: &Path| fs::metadata(folder).is_ok_and(|data| data.permissions().mode() & 0o001 != 0);
    if is_root() {
        let _ = chown(dir, Some(NOBODY), Some(NOBODY));
    }
    if is_root() && !from.ancestors().all(is_open) {
        copy(from, &install);
    } else {
        symlink(from, &install).expect("a link");
    }
    install.join("bin")
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder").map(|entry| entry.expect("an entry")) {
        let to = to.join(entry.file_name());
        match entry.file_type().expect("a type") {
            kind if kind.is_dir() => copy(&entry.path(), &to),
            kind if kind.is_symlink() => symlink(fs::read_link(entry.path()).expect("a link"), to).expect("a link"),
            _ => drop(fs::copy(entry.path(), to).expect("a copy")),
        }
    }
}
