//! The commands beside batches that a program sends, each in one place.

use std::time::Duration;

use redis::{Cmd, FromRedisValue, Value};

use crate::model::shard::RunId;
use crate::model::words::words;
use crate::node::conn::Conn;
use crate::node::error::NodeError;
use crate::node::info::Info;

/// INFO of the default sections and of `commandstats`, in one write.
///
/// # Errors
/// [`NodeError`] of the connection or of the plain INFO; a refused `commandstats` only leaves its fields out.
pub async fn info(conn: &mut Conn) -> Result<Info, NodeError> {
    let plain = redis::cmd("INFO");
    let commandstats = redis::cmd("INFO").arg("commandstats").to_owned();
    let [plain, commandstats] = conn.pipeline::<String, 2>("INFO", [&plain, &commandstats]).await?;
    let mut text = plain?;
    if let Ok(more) = commandstats {
        text.push_str(&more);
    }
    Ok(Info::parse(text))
}

/// The server process that answers, by a short section of INFO; `None` where it does not tell.
///
/// # Errors
/// [`NodeError`].
pub async fn run_id(conn: &mut Conn) -> Result<Option<RunId>, NodeError> {
    let info: String = conn.call("INFO", redis::cmd("INFO").arg("server")).await?;
    Ok(Info::parse(info).get("run_id").map(|id| RunId(id.to_owned())))
}

/// What a server has done since it started.
#[derive(Debug, Clone, Copy, Default)]
pub struct Load {
    /// [`Info::main_thread_cpu`].
    pub cpu: Option<Duration>,
    /// `total_commands_processed`, ours included; `None` where INFO lacks it.
    pub commands: Option<u64>,
}

/// Reads the load from two short sections of INFO.
///
/// # Errors
/// [`NodeError`].
pub async fn load(conn: &mut Conn) -> Result<Load, NodeError> {
    let section = |name: &str| redis::cmd("INFO").arg(name).to_owned();
    let [cpu, stats] = conn.pipeline::<String, 2>("INFO", [&section("cpu"), &section("stats")]).await?;
    let (cpu, stats) = (Info::parse(cpu?), Info::parse(stats?));
    Ok(Load { cpu: cpu.main_thread_cpu(), commands: stats.parsed("total_commands_processed") })
}

/// `CONFIG SET`.
///
/// # Errors
/// [`NodeError`].
pub async fn set_config(conn: &mut Conn, parameter: &str, value: &str) -> Result<(), NodeError> {
    conn.call::<String>("CONFIG SET", redis::cmd("CONFIG").arg("SET").arg(parameter).arg(value)).await.map(drop)
}

/// One PING. A server that cannot save answers it with MISCONF, which counts as an answer: SCAN reclaims there all the
/// same.
///
/// # Errors
/// [`NodeError`].
pub async fn ping(conn: &mut Conn) -> Result<(), NodeError> {
    match conn.call::<String>("PING", &redis::cmd("PING")).await {
        Err(NodeError::Server { code, .. }) if code == "MISCONF" => Ok(()),
        answered => answered.map(drop),
    }
}

/// Keys of the selected DB, including expired keys that are still in memory.
///
/// # Errors
/// [`NodeError`].
pub async fn dbsize(conn: &mut Conn) -> Result<u64, NodeError> {
    conn.call("DBSIZE", &redis::cmd("DBSIZE")).await
}

/// One parameter of the server's configuration; `None` where it has none of that name or refuses to show it.
///
/// # Errors
/// [`NodeError`] of the connection.
pub async fn config(conn: &mut Conn, parameter: &str) -> Result<Option<String>, NodeError> {
    let pair = told(conn.call::<Vec<String>>("CONFIG GET", redis::cmd("CONFIG").arg("GET").arg(parameter)).await)?;
    Ok(pair.and_then(|pair| pair.into_iter().nth(1)))
}

/// The ACL user of this connection; `None` before Redis 6 or without the right to ask.
///
/// # Errors
/// [`NodeError`] of the connection.
pub async fn whoami(conn: &mut Conn) -> Result<Option<String>, NodeError> {
    told(conn.call("ACL WHOAMI", redis::cmd("ACL").arg("WHOAMI")).await)
}

/// Whether a command may be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Access {
    /// This user may run it.
    Allowed,
    /// This user may not run it.
    Denied,
    /// The server has no command of this name: see [`NodeError::is_unknown_command`].
    NoSuchCommand,
    /// Only running it would tell, and it is not harmless.
    #[default]
    Unknown,
}

words!(Access, "access", Allowed = "yes", Denied = "no", NoSuchCommand = "no such command", Unknown = "unknown",);

/// Whether `user` may run a command, asked without running it; unknown before Redis 7.0 or without the right to ask.
///
/// # Errors
/// [`NodeError`] of the connection.
pub async fn dry_run(conn: &mut Conn, user: &str, command: &[&str]) -> Result<Access, NodeError> {
    let verdict = conn.call::<String>("ACL DRYRUN", redis::cmd("ACL").arg("DRYRUN").arg(user).arg(command)).await;
    match verdict {
        // DRYRUN itself fails for a command that was renamed.
        Err(NodeError::Server { code, message, .. }) if code == "ERR" && message.starts_with("Command ") => {
            Ok(Access::NoSuchCommand)
        }
        verdict => Ok(match told(verdict)?.as_deref() {
            Some("OK") => Access::Allowed,
            Some(_) => Access::Denied,
            None => Access::Unknown,
        }),
    }
}

/// Whether `user` may run every command on every key, as the flags of ACL GETUSER tell on Redis 6 (later servers have
/// no such flags, but they have [`dry_run`]); `None` without the right to ask.
///
/// # Errors
/// [`NodeError`] of the connection.
pub async fn may_do_everything(conn: &mut Conn, user: &str) -> Result<Option<bool>, NodeError> {
    let rules = told(conn.call::<Vec<Value>>("ACL GETUSER", redis::cmd("ACL").arg("GETUSER").arg(user)).await)?;
    let Some(rules) = rules else { return Ok(None) };
    let flags = rules.chunks(2).find_map(|pair| match pair {
        [name, flags] if String::from_redis_value_ref(name).is_ok_and(|name| name == "flags") => {
            Vec::<String>::from_redis_value_ref(flags).ok()
        }
        _ => None,
    });
    Ok(flags.map(|flags| ["allcommands", "allkeys"].iter().all(|flag| flags.iter().any(|f| f == flag))))
}

/// Whether the server has a command of this name; `None` without the right to ask.
///
/// # Errors
/// [`NodeError`] of the connection.
pub async fn has_command(conn: &mut Conn, name: &str) -> Result<Option<bool>, NodeError> {
    let found = told(conn.call::<Vec<Value>>("COMMAND INFO", redis::cmd("COMMAND").arg("INFO").arg(name)).await)?;
    Ok(found.map(|found| found.first().is_some_and(|command| *command != Value::Nil)))
}

/// Whether a harmless command is accepted, by running it. An error that is not about rights comes from the command
/// itself, which was thus accepted.
///
/// # Errors
/// [`NodeError`] of the connection.
pub async fn is_accepted(conn: &mut Conn, name: &'static str, cmd: &Cmd) -> Result<Access, NodeError> {
    match conn.call::<Value>(name, cmd).await {
        Ok(_) => Ok(Access::Allowed),
        Err(error) if error.is_unknown_command() => Ok(Access::NoSuchCommand),
        Err(NodeError::Server { code, .. }) => Ok(match code.as_str() {
            "NOPERM" => Access::Denied,
            "ERR" => Access::Allowed,
            // LOADING, BUSY and the like say nothing about rights.
            _ => Access::Unknown,
        }),
        Err(error) => Err(error),
    }
}

/// A SCAN that scans no key: the server checks the rights, and then refuses the cursor or the COUNT. For [`is_accepted`].
pub fn scan_that_does_nothing() -> Cmd {
    redis::cmd("SCAN").arg("none").arg("COUNT").arg("none").to_owned()
}

/// The server's answer; `None` where it refused.
fn told<T>(answer: Result<T, NodeError>) -> Result<Option<T>, NodeError> {
    match answer {
        Ok(told) => Ok(Some(told)),
        Err(NodeError::Server { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}
