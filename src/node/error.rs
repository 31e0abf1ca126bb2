//! What can go wrong between us and one server, and what it means for a sweep.

use std::time::Duration;
use std::{fmt, io};

use crate::model::failure::{Failure, FailureKind};
use crate::model::shard::NodeAddr;
use crate::node::tls::PLAIN;

/// Trouble with one server. Never holds a secret or a key name.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The connection could not be made.
    #[error("cannot connect to {addr}: {source}")]
    Connect {
        /// Where.
        addr: NodeAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection was made, and could not be encrypted as it should.
    #[error("cannot connect to {addr} by TLS: {problem}")]
    Tls {
        /// Where.
        addr: NodeAddr,
        /// What is wrong.
        problem: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// The peer hung up during the TLS handshake: it speaks none, or has no room, or is about to go.
    #[error("{addr} closed the connection in the middle of the TLS handshake")]
    TlsCut {
        /// Where.
        addr: NodeAddr,
    },
    /// The peer of a connection without TLS speaks TLS, or hung up as such a peer does.
    #[error("{addr} {problem} in place of an answer to the first command")]
    NotPlain {
        /// Where.
        addr: NodeAddr,
        /// What it did.
        problem: &'static str,
    },
    /// The connection was made, and nothing was said on it in time.
    #[error("{addr} took the connection and did not answer {during} within {after:?}")]
    Silent {
        /// Where.
        addr: NodeAddr,
        /// What was not answered.
        during: Greeting,
        /// How long we waited, the making of the connection included.
        after: Duration,
    },
    /// The connection broke.
    #[error("the connection to {addr} was lost: {source}")]
    Lost {
        /// Where.
        addr: NodeAddr,
        /// How.
        #[source]
        source: io::Error,
    },
    /// No answer came in time.
    #[error("{addr} did not answer {command} within {after:?}")]
    Timeout {
        /// Where.
        addr: NodeAddr,
        /// The command that was sent.
        command: &'static str,
        /// How long we waited.
        after: Duration,
    },
    /// Nobody could say where the master is, or who was said to be it is none.
    #[error("{problem}")]
    NoMaster {
        /// What was asked and answered.
        problem: String,
        /// What to do about it.
        hint: Option<String>,
        /// Whether it may pass.
        class: Class,
    },
    /// The peer does not speak RESP, or answered with a shape that the command does not have.
    #[error("{addr} answered {command} with something that is not a valid reply: {detail}")]
    Protocol {
        /// Where.
        addr: NodeAddr,
        /// The command that was sent.
        command: &'static str,
        /// What was wrong.
        detail: String,
    },
    /// The server answered with an error.
    #[error("{addr} refused {command}: {code} {message}")]
    Server {
        /// Where.
        addr: NodeAddr,
        /// The command that was sent.
        command: &'static str,
        /// First word of the error.
        code: String,
        /// The rest.
        message: String,
    },
}

/// What is said first on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Greeting {
    /// The TLS handshake.
    Tls,
    /// AUTH, or CLIENT SETNAME.
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
    /// It will not get better by itself.
    Fatal(FailureKind),
}

impl NodeError {
    /// What to do about it.
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
                        // Redis before 6, which knows no users.
                        || message.contains("no password is set")
                        || (*command == "AUTH" && message.contains("wrong number of arguments")) =>
                {
                    Class::Fatal(FailureKind::NotAuthenticated)
                }
                "ERR"
                    if message.contains("DB index is out of range")
                        || message.contains("not allowed in cluster mode") =>
                {
                    Class::Fatal(FailureKind::NoSuchDb)
                }
                _ => Class::Fatal(FailureKind::Unsupported),
            },
        }
    }

    /// Whether a cluster node does not answer for a key because of its slot.
    pub fn is_redirection(&self) -> bool {
        let Self::Server { code, .. } = self else { return false };
        matches!(code.as_str(), "MOVED" | "ASK" | "TRYAGAIN" | "CLUSTERDOWN")
    }

    /// Whether the server said that a right is missing.
    pub fn is_no_permission(&self) -> bool {
        matches!(self, Self::Server { code, .. } if code == "NOPERM")
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
        let text = match (self, kind) {
            (Self::NoMaster { hint, .. }, _) => return hint.clone(),
            (Self::Tls { hint, .. }, _) => hint,
            (Self::TlsCut { .. } | Self::Silent { during: Greeting::Tls, .. }, _) => PLAIN,
            (Self::Silent { during: Greeting::Command, .. }, _) => {
                "does the process hang, or does a slow command hold it? A longer wait: --connect-timeout"
            }
            (Self::NotPlain { .. }, _) => "does this port want TLS? Then write the URL as rediss://...",
            (Self::Connect { source, .. }, _) => match source.kind() {
                io::ErrorKind::ConnectionRefused => {
                    "is the server running there, and is it the right port? Try `redis-cli -h HOST -p PORT ping`"
                }
                io::ErrorKind::NotFound => "no socket is at this path; see `unixsocket` in the server's configuration",
                io::ErrorKind::PermissionDenied => "this user may not open the socket; see `unixsocketperm`",
                io::ErrorKind::TimedOut => "is a firewall in between? A longer wait: --connect-timeout",
                _ => "check the host name, the port and the network in between",
            },
            (Self::Server { code, .. }, FailureKind::NotAllowed) if code == "DENIED" => {
                "the server is in protected mode: connect through its loopback address, or give it a password"
            }
            (Self::Server { code, .. }, FailureKind::NotAuthenticated) if code == "NOAUTH" => {
                "the server wants a password: REDISCLI_AUTH, --password-file or --askpass (and --user for an ACL user)"
            }
            (_, FailureKind::NotAuthenticated) => {
                "check user and password; `redis-cli --user USER --askpass ping` must answer PONG"
            }
            (Self::Server { command: "EXISTS" | "TTL", .. }, FailureKind::NotAllowed) => {
                let line = crate::node::commands::ACL_TOUCH;
                return Some(format!("sweep without it (--touch none), or grant what the touch needs: {line}"));
            }
            (Self::Server { command, .. }, FailureKind::NotAllowed) if command.starts_with("CLUSTER") => {
                let (line, cluster) = (crate::node::commands::ACL_LINE, crate::node::commands::ACL_CLUSTER);
                return Some(format!("grant on every node what the sweep of a cluster needs: {line} {cluster}"));
            }
            (_, FailureKind::NotAllowed) => {
                return Some(format!("grant what a sweep needs: {}", crate::node::commands::ACL_LINE));
            }
            (Self::Timeout { .. }, _) => {
                "a huge key being freed or a slow command can hold a server that long; a longer wait: --response-timeout"
            }
            (Self::Protocol { .. }, _) => "is this a Redis or Valkey port, and without TLS?",
            (_, FailureKind::NoSuchDb) => "see `databases` in the server's configuration; a cluster has DB 0 only",
            _ => return None,
        };
        Some(text.to_owned())
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
        check("ERR", "DB index is out of range", Class::Fatal(FailureKind::NoSuchDb));
        check("ERR", "SELECT is not allowed in cluster mode", Class::Fatal(FailureKind::NoSuchDb));
        check("ERR", "unknown command 'SCAN'", Class::Fatal(FailureKind::Unsupported));
    }

    #[test]
    fn every_error_says_what_happened_and_what_to_do() {
        let addr = NodeAddr::Tcp { host: "cache".into(), port: 6379 };
        let connect = |kind, text: &str| NodeError::Connect { addr: addr.clone(), source: io::Error::new(kind, text) };
        let server = |command, code: &str, message: &str| NodeError::Server {
            addr: addr.clone(),
            command,
            code: code.into(),
            message: message.into(),
        };
        let errors = [
            connect(io::ErrorKind::ConnectionRefused, "Connection refused"),
            connect(io::ErrorKind::NotFound, "No such file or directory"),
            connect(io::ErrorKind::PermissionDenied, "Permission denied"),
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
            server("SCAN", "ERR", "unknown command 'SCAN'"),
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
