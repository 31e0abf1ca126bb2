//! Where an instance is, and who we are there.

use std::path::PathBuf;

use secrecy::SecretString;

use crate::model::shard::{DbIndex, NodeAddr};

/// The port of a server whose URL names none.
pub const DEFAULT_PORT: u16 = 6379;

/// Where an instance is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// One server.
    Standalone(NodeAddr),
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Standalone(NodeAddr::Unix(path)) => write!(f, "unix://{}", path.display()),
            Self::Standalone(addr) => write!(f, "redis://{addr}"),
        }
    }
}

/// Who we are for a server. `Debug` never shows the password.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    /// ACL user; `None` is the server's default user.
    pub user: Option<String>,
    /// Password, or `None` for a server that asks for none.
    pub password: Option<SecretString>,
}

/// What an instance URL says.
#[derive(Debug, Clone)]
pub struct InstanceUrl {
    /// Where it is.
    pub target: Target,
    /// User and password that stood in the URL.
    pub credentials: Credentials,
    /// The DB that stood in the path.
    pub db: Option<DbIndex>,
}

/// A URL that names no instance. The text never repeats the URL: it may hold a password.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadUrl {
    /// No URL at all.
    #[error("not a URL ({0}); expected redis://[user[:password]@]host[:port][/db] or unix:///path")]
    Syntax(String),
    /// Another scheme.
    #[error("scheme `{0}` is not known; use redis://, valkey:// or unix://")]
    Scheme(String),
    /// The path is no DB number.
    #[error("the path after the host must be a DB number, as in redis://host/3")]
    Db,
    /// No host or no path.
    #[error("the URL names no {0}")]
    Missing(&'static str),
    /// A query or a fragment where none means anything.
    #[error("`{0}` in the URL means nothing here; percent-encode `?` and `#` inside a password (%3F, %23)")]
    Extra(String),
}

impl InstanceUrl {
    /// Reads `redis://[user[:password]@]host[:port][/db]`, `valkey://` likewise, `unix:///path[?db=N]`, or a bare
    /// `host:port`. User and password may be percent-encoded.
    ///
    /// # Errors
    /// [`BadUrl`], which never repeats the text that was given.
    pub fn parse(text: &str) -> Result<Self, BadUrl> {
        let with_scheme;
        let text = if text.contains("://") {
            text
        } else {
            with_scheme = format!("redis://{text}");
            &with_scheme
        };
        let url = url::Url::parse(text).map_err(|e| BadUrl::Syntax(e.to_string()))?;
        if let Some(fragment) = url.fragment() {
            return Err(BadUrl::Extra(format!("#{}", "…".repeat(usize::from(!fragment.is_empty())))));
        }
        let credentials = Credentials {
            user: Some(decode(url.username())).filter(|user| !user.is_empty()),
            password: url.password().map(|p| SecretString::from(decode(p))),
        };
        let (target, db) = match url.scheme() {
            "redis" | "valkey" => (tcp_target(&url)?, path_db(&url)?),
            "unix" | "redis+unix" | "valkey+unix" => (unix_target(&url)?, query_db(&url)?),
            other => return Err(BadUrl::Scheme(other.to_owned())),
        };
        Ok(Self { target, credentials, db })
    }
}

fn tcp_target(url: &url::Url) -> Result<Target, BadUrl> {
    if url.query().is_some() {
        return Err(BadUrl::Extra("?…".to_owned()));
    }
    let host = url.host_str().filter(|h| !h.is_empty()).ok_or(BadUrl::Missing("host"))?;
    let host = decode(host.trim_start_matches('[').trim_end_matches(']'));
    Ok(Target::Standalone(NodeAddr::Tcp { host, port: url.port().unwrap_or(DEFAULT_PORT) }))
}

fn path_db(url: &url::Url) -> Result<Option<DbIndex>, BadUrl> {
    match url.path().trim_matches('/') {
        "" => Ok(None),
        number => number.parse().map(|n| Some(DbIndex(n))).map_err(|_| BadUrl::Db),
    }
}

fn unix_target(url: &url::Url) -> Result<Target, BadUrl> {
    let path = decode(url.path());
    if path.trim_matches('/').is_empty() {
        return Err(BadUrl::Missing("socket path"));
    }
    Ok(Target::Standalone(NodeAddr::Unix(PathBuf::from(path))))
}

fn query_db(url: &url::Url) -> Result<Option<DbIndex>, BadUrl> {
    let mut db = None;
    for (key, value) in url.query_pairs() {
        match key.as_ref() {
            "db" => db = Some(DbIndex(value.parse().map_err(|_| BadUrl::Db)?)),
            _ => return Err(BadUrl::Extra("?…".to_owned())),
        }
    }
    Ok(db)
}

fn decode(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use secrecy::ExposeSecret;

    #[track_caller]
    fn check(text: &str, target: &str, user: Option<&str>, password: Option<&str>, db: Option<u32>) {
        let url = InstanceUrl::parse(text).unwrap();
        assert_eq!(url.target.to_string(), target);
        assert_eq!(url.credentials.user.as_deref(), user);
        assert_eq!(url.credentials.password.as_ref().map(|p| p.expose_secret()), password);
        assert_eq!(url.db, db.map(DbIndex));
    }

    #[test]
    fn urls_that_operators_write() {
        check("redis://127.0.0.1", "redis://127.0.0.1:6379", None, None, None);
        check("valkey://cache.example:7000/3", "redis://cache.example:7000", None, None, Some(3));
        check("redis://:s3cret@h", "redis://h:6379", None, Some("s3cret"), None);
        check("redis://ann:p%40ss@h:1/0", "redis://h:1", Some("ann"), Some("p@ss"), Some(0));
        check("redis://ann@h", "redis://h:6379", Some("ann"), None, None);
        check("redis://[::1]:7", "redis://[::1]:7", None, None, None);
        check("localhost:7000", "redis://localhost:7000", None, None, None);
        check("unix:///run/redis.sock", "unix:///run/redis.sock", None, None, None);
        check("unix:///run/redis.sock?db=2", "unix:///run/redis.sock", None, None, Some(2));
    }

    #[test]
    fn bad_urls_are_refused_without_repeating_the_secret() {
        for (text, expected) in [
            ("http://:hunter2@h", BadUrl::Scheme("http".into())),
            ("redis://:hunter2@h/notadb", BadUrl::Db),
            ("unix://", BadUrl::Missing("socket path")),
            ("redis://:hunter2@h/0#hunter2", BadUrl::Extra("#…".into())),
        ] {
            let error = InstanceUrl::parse(text).unwrap_err();
            assert_eq!(error, expected);
            assert!(!error.to_string().contains("hunter2"));
        }
    }
}
