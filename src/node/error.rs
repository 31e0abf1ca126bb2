//! Errors between this program and one server, and what they mean for a sweep.

use std::time::Duration;
use std::{fmt, io};

use crate::model::failure::{Failure, FailureKind};
use crate::model::shard::NodeAddr;
use crate::node::acl;

/// An error with one server. Never holds a secret or a key name.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The connection could not be made.
    #[error("cannot connect to {addr}: {source}")]
    Connect {
        /// The address that was dialled.
        addr: NodeAddr,
        /// The error of the system, or that the time to connect is over.
        #[source]
        source: io::Error,
    },
    /// The TLS handshake failed, or the server refused our certificate.
    #[error("cannot connect to {addr} by TLS: {problem}")]
    Tls {
        /// The address that was dialled.
        addr: NodeAddr,
        /// What TLS found wrong, for the operator.
        problem: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// The peer closed the connection during the TLS handshake: it speaks no TLS, has too many clients, or is stopping.
    #[error("{addr} closed the connection in the middle of the TLS handshake")]
    TlsCut {
        /// The address that was dialled.
        addr: NodeAddr,
    },
    /// The peer of a connection without TLS speaks TLS, or closed the connection as such a peer does.
    #[error("{addr} {problem} in place of an answer to the first command")]
    NotPlain {
        /// The address that was dialled.
        addr: NodeAddr,
        /// `sent a TLS alert` or `closed the connection`.
        problem: &'static str,
    },
    /// The connection was made, and no answer came on it in time.
    #[error("{addr} took the connection and did not answer {during} within {after:?}")]
    Silent {
        /// The address that was dialled.
        addr: NodeAddr,
        /// The exchange that got no answer.
        during: Greeting,
        /// How long we waited, including the time to connect.
        after: Duration,
    },
    /// The connection broke after it was made; a reply may be lost with it.
    #[error("the connection to {addr} was lost: {source}")]
    Lost {
        /// Address of the connection's server.
        addr: NodeAddr,
        /// The I/O error that ended the connection.
        #[source]
        source: io::Error,
    },
    /// No answer came in time.
    #[error("{addr} did not answer {command} within {after:?}")]
    Timeout {
        /// Address of the connection's server.
        addr: NodeAddr,
        /// The command that was sent.
        command: &'static str,
        /// The time that was waited for the answer.
        after: Duration,
    },
    /// No node or sentinel could name the master, or the server that they named is none.
    #[error("{problem}")]
    NoMaster {
        /// What was asked and answered.
        problem: String,
        /// What to do about it.
        hint: Option<String>,
        /// Whether it may pass by itself.
        class: Class,
    },
    /// The peer does not speak RESP, or sent a reply that the command cannot have.
    #[error("{addr} answered {command} with something that is not a valid reply: {detail}")]
    Protocol {
        /// Address of the connection's server.
        addr: NodeAddr,
        /// The command that was sent.
        command: &'static str,
        /// What is wrong with the reply, for the operator.
        detail: String,
    },
    /// The server answered with an error.
    #[error("{addr} refused {command}: {code} {message}")]
    Server {
        /// Address of the connection's server.
        addr: NodeAddr,
        /// The command that was sent.
        command: &'static str,
        /// The first word of the server's error.
        code: String,
        /// The rest of the server's error.
        message: String,
    },
}

/// The first exchange on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Greeting {
    /// The TLS handshake, before any command.
    Tls,
    /// The first command on the connection, such as AUTH or CLIENT SETNAME.
    Command,
}

impl fmt::Display for Greeting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tls => "the TLS handshake",
            Self::Command => "the first command",
        })
    }
}

/// What to do about a [`NodeError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Connect again and go on.
    Transient,
    /// The server loads its data: wait, then go on.
    Loading,
    /// A script keeps the server busy: wait, then go on.
    Busy,
    /// It does not pass by itself.
    Fatal(FailureKind),
}

impl NodeError {
    /// What to do about the error.
    pub fn class(&self) -> Class {
        match self {
            Self::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Class::Fatal(FailureKind::CannotConnect)
            }
            Self::Connect { .. } | Self::Lost { .. } | Self::Timeout { .. } => Class::Transient,
            Self::Tls { .. } => Class::Fatal(FailureKind::CannotConnect),
            Self::NotPlain { .. } | Self::TlsCut { .. } | Self::Silent { .. } => Class::Transient,
            Self::NoMaster { class, .. } => *class,
            Self::Protocol { .. } => Class::Fatal(FailureKind::Protocol),
            Self::Server { code, message, command, .. } => match code.as_str() {
                "LOADING" => Class::Loading,
                "BUSY" => Class::Busy,
                "TRYAGAIN" | "MASTERDOWN" | "CLUSTERDOWN" => Class::Transient,
                "NOAUTH" | "WRONGPASS" => Class::Fatal(FailureKind::NotAuthenticated),
                "NOPERM" | "DENIED" => Class::Fatal(FailureKind::NotAllowed),
                "ERR" if message.contains("max number of clients") => Class::Transient,
                "ERR"
                    if message.contains("invalid password")
                        || message.contains("without any password")
                        // Redis before 6, which has no ACL users.
                        || message.contains("no password is set")
                        || (*command == "AUTH" && message.contains("wrong number of arguments")) =>
                {
                    Class::Fatal(FailureKind::NotAuthenticated)
                }
                // The message differs between versions; any refusal of SELECT means that there is no such DB.
                "ERR" if *command == "SELECT" && !self.is_unknown_command() => Class::Fatal(FailureKind::NoSuchDb),
                _ => Class::Fatal(FailureKind::Unsupported),
            },
        }
    }

    /// Whether a cluster node refused a command because of the key's slot.
    pub fn is_redirection(&self) -> bool {
        let Self::Server { code, .. } = self else { return false };
        matches!(code.as_str(), "MOVED" | "ASK" | "TRYAGAIN" | "CLUSTERDOWN")
    }

    /// Whether the user lacks the right to the command.
    pub fn is_no_permission(&self) -> bool {
        matches!(self, Self::Server { code, .. } if code == "NOPERM")
    }

    /// Whether the server has no command of that name: it was renamed, or a proxy does not pass it on.
    pub fn is_unknown_command(&self) -> bool {
        let Self::Server { code, message, .. } = self else { return false };
        let message = message.to_ascii_lowercase();
        code == "ERR" && ["unknown command", "unsupported command"].iter().any(|words| message.starts_with(words))
    }

    /// The failure that an operator reads.
    pub fn into_failure(self) -> Failure {
        let kind = match self.class() {
            Class::Fatal(kind) => kind,
            Class::Transient | Class::Loading | Class::Busy => FailureKind::CannotConnect,
        };
        let hint = self.hint(kind);
        Failure { kind, message: self.to_string(), hint }
    }

    fn hint(&self, kind: FailureKind) -> Option<String> {
        let text = match self {
            Self::NoMaster { hint, .. } => return hint.clone(),
            Self::Tls { hint, .. } => hint,
            Self::TlsCut { .. } | Self::Silent { during: Greeting::Tls, .. } => PLAIN,
            Self::Silent { during: Greeting::Command, .. } => {
                "does the process hang, or does a slow command hold it? A longer wait: --connect-timeout"
            }
            Self::NotPlain { .. } => "does this port want TLS? Then write the URL as rediss://...",
            Self::Connect { addr, source } => connect_hint(addr, source.kind()),
            Self::Lost { .. } => {
                "did the server end, or does something in between cut connections? See the server's log"
            }
            Self::Timeout { .. } => {
                "a huge key being freed or a slow command can hold a server that long; a longer wait: --response-timeout"
            }
            Self::Protocol { .. } => "is this a Redis or Valkey port?",
            Self::Server { command, code, message, .. } => return self.hint_to_reply(kind, command, code, message),
        };
        Some(text.to_owned())
    }

    fn hint_to_reply(&self, kind: FailureKind, command: &str, code: &str, message: &str) -> Option<String> {
        let text = match kind {
            _ if self.is_unknown_command() && command.starts_with("CLUSTER") => {
                "several hosts in a URL are nodes of one cluster, which has this command unless it was renamed; sentinels are \
                 named by redis+sentinel://HOST:26379/MASTER"
            }
            _ if self.is_unknown_command() => NO_SUCH_COMMAND,
            FailureKind::NotAllowed => return Some(acl::right_hint(command, code)),
            FailureKind::NotAuthenticated => auth_hint(code, message),
            FailureKind::NoSuchDb if message.contains("cluster mode") => "a cluster of this version has DB 0 only",
            FailureKind::NoSuchDb => {
                "see `databases` in the server's configuration (of a cluster of Valkey 9: `cluster-databases`)"
            }
            _ if message.contains("cluster support disabled") => {
                "several hosts in a URL are nodes of one cluster; name this server alone"
            }
            _ if message.contains("max number of clients") => {
                "it has no room for another connection: see `maxclients` in its configuration, and CLIENT LIST for who is there"
            }
            _ => match code {
                "LOADING" => "it answers once its data is loaded; a sweep waits for that",
                "BUSY" => "SCRIPT KILL, or FUNCTION KILL, ends the script; a sweep waits for its end",
                "TRYAGAIN" | "CLUSTERDOWN" => "see `redis-cli --cluster check`",
                "MASTERDOWN" => "this is a replica that has lost its master: sweep the master",
                _ => return None,
            },
        };
        Some(text.to_owned())
    }
}

/// The hint where a command is unknown.
pub const NO_SUCH_COMMAND: &str = "see `rename-command` in the server's configuration; a sweep sends each command by its own \
                                   name. Where this is a proxy that does not pass it on, sweep the server behind it";

/// The hint where the peer breaks the TLS handshake off.
pub(super) const PLAIN: &str =
    "does this port speak TLS? See `tls-port` in the server's configuration; without TLS write redis://";

/// The hint where no connection can be made.
fn connect_hint(addr: &NodeAddr, kind: io::ErrorKind) -> &'static str {
    use io::ErrorKind as E;
    match (addr, kind) {
        (NodeAddr::Unix(_), E::NotFound | E::NotADirectory) => {
            "no socket is at this path; see `unixsocket` in the server's configuration"
        }
        (NodeAddr::Unix(_), E::ConnectionRefused) => {
            "nobody listens at this path: is it a socket, and of a server that runs? See `unixsocket` in its configuration"
        }
        (NodeAddr::Unix(_), E::PermissionDenied) => "this user may not open the socket; see `unixsocketperm`",
        (NodeAddr::Unix(_), _) => "is a server's socket at this path? See `unixsocket` in its configuration",
        (_, E::ConnectionRefused) => {
            "is the server running there, and is it the right port? Try `redis-cli -h HOST -p PORT ping`"
        }
        (_, E::TimedOut) => "is a firewall in between? A longer wait: --connect-timeout",
        (_, E::PermissionDenied) => "this machine does not let the program connect there: see its firewall",
        _ => "check the host name, the port and the network in between",
    }
}

/// The hint where the server refuses user or password.
fn auth_hint(code: &str, message: &str) -> &'static str {
    match code {
        "NOAUTH" => {
            "the server wants a password: REDISCLI_AUTH, --password-file or --askpass (and --user for an ACL user)"
        }
        _ if message.contains("without any password") || message.contains("no password is set") => {
            "the server asks for no password: leave it out, or is this another server than you think?"
        }
        _ if message.contains("wrong number of arguments") => "Redis before 6 has no ACL users: leave the user out",
        _ => "check user and password; `redis-cli --user USER --askpass ping` must answer PONG",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(code: &str, message: &str, expected: Class) {
        let error = NodeError::Server {
            addr: NodeAddr::Tcp { host: "h".into(), port: 1 },
            command: "SCAN",
            code: code.into(),
            message: message.into(),
        };
        assert_eq!(error.class(), expected, "{code} {message}");
    }

    #[test]
    fn server_errors_are_told_apart() {
        check("LOADING", "Redis is loading the dataset in memory", Class::Loading);
        check("BUSY", "Redis is busy running a script.", Class::Busy);
        check("ERR", "max number of clients reached", Class::Transient);
        check("NOAUTH", "Authentication required.", Class::Fatal(FailureKind::NotAuthenticated));
        check("ERR", "invalid password", Class::Fatal(FailureKind::NotAuthenticated));
        check("NOPERM", "User u has no permissions", Class::Fatal(FailureKind::NotAllowed));
        check("DENIED", "Redis is running in protected mode", Class::Fatal(FailureKind::NotAllowed));
        check("ERR", "unknown command 'SCAN'", Class::Fatal(FailureKind::Unsupported));
    }

    #[test]
    fn every_error_says_what_happened_and_what_to_do() {
        let addr = NodeAddr::Tcp { host: "cache".into(), port: 6379 };
        let connect = |kind, text: &str| NodeError::Connect { addr: addr.clone(), source: io::Error::new(kind, text) };
        let path = NodeAddr::Unix("/run/redis.sock".into());
        let socket = |kind, text: &str| NodeError::Connect { addr: path.clone(), source: io::Error::new(kind, text) };
        let server = |command, code: &str, message: &str| NodeError::Server {
            addr: addr.clone(),
            command,
            code: code.into(),
            message: message.into(),
        };
        let errors = [
            connect(io::ErrorKind::ConnectionRefused, "Connection refused"),
            connect(io::ErrorKind::PermissionDenied, "Permission denied"),
            socket(io::ErrorKind::ConnectionRefused, "Connection refused"),
            socket(io::ErrorKind::NotFound, "No such file or directory"),
            socket(io::ErrorKind::PermissionDenied, "Permission denied"),
            socket(io::ErrorKind::InvalidInput, "path must be shorter than SUN_LEN"),
            connect(io::ErrorKind::TimedOut, "no connection within 5s"),
            connect(io::ErrorKind::Other, "failed to lookup address information"),
            NodeError::Silent { addr: addr.clone(), during: Greeting::Tls, after: Duration::from_secs(5) },
            NodeError::Silent { addr: addr.clone(), during: Greeting::Command, after: Duration::from_secs(5) },
            NodeError::Lost { addr: addr.clone(), source: io::Error::other("Connection reset by peer") },
            NodeError::Timeout { addr: addr.clone(), command: "SCAN", after: Duration::from_secs(30) },
            NodeError::Protocol { addr: addr.clone(), command: "PING", detail: "it begins with the byte 0x48".into() },
            server("PING", "NOAUTH", "Authentication required."),
            server("AUTH", "WRONGPASS", "invalid username-password pair or user is disabled."),
            server("SCAN", "NOPERM", "this user has no permissions to run the 'scan' command"),
            server("TTL", "NOPERM", "this user has no permissions to run the 'ttl' command"),
            server("PING", "DENIED", "Redis is running in protected mode because protected mode is enabled"),
            server("SELECT", "ERR", "DB index is out of range"),
            server("SCAN", "LOADING", "Redis is loading the dataset in memory"),
            server("SCAN", "BUSY", "Redis is busy running a script."),
            server("SELECT", "ERR", "SELECT is not allowed in cluster mode"),
            server("SELECT", "ERR", "unknown command 'SELECT'"),
            server("SCAN", "ERR", "unknown command 'SCAN'"),
            server("INFO", "ERR", "unsupported command 'info'"),
            server("CLUSTER SLOTS", "ERR", "This instance has cluster support disabled"),
            server("CLUSTER SLOTS", "NOPERM", "this user has no permissions to run the 'cluster|slots' command"),
            server("SENTINEL GET-MASTER-ADDR-BY-NAME", "NOPERM", "this user has no permissions to run the command"),
            server("CLIENT SETNAME", "ERR", "max number of clients reached"),
            server("AUTH", "ERR", "AUTH <password> called without any password configured for the default user."),
            server("AUTH", "ERR", "wrong number of arguments for 'auth' command"),
            server("SCAN", "CLUSTERDOWN", "The cluster is down"),
            server("SCAN", "MASTERDOWN", "Link with MASTER is down and replica-serve-stale-data is set to 'no'."),
        ];
        let shown: Vec<_> = errors
            .into_iter()
            .map(|error| {
                let failure = error.into_failure();
                format!("[{}] {}\n  hint: {}", failure.kind, failure.message, failure.hint.unwrap_or("-".into()))
            })
            .collect();
        insta::assert_snapshot!(shown.join("\n"));
    }
}
