//! Where an instance is, and as which user we connect to it.

use std::path::PathBuf;

use secrecy::SecretSlice;

use crate::model::shard::{DbIndex, NodeAddr};

/// The port of a server whose URL names none.
pub const DEFAULT_PORT: u16 = 6379;

/// The port of a sentinel whose URL names none.
pub const SENTINEL_PORT: u16 = 26379;

/// Where an instance is and how to reach it, without credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// What it is and at which addresses.
    pub place: Place,
    /// Whether all its connections are encrypted.
    pub tls: bool,
}

/// What an instance is, as far as its URL says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// One server. Where it turns out to be a node of a cluster, the whole cluster is meant.
    Standalone(NodeAddr),
    /// Nodes of a cluster, of which one that answers is enough.
    Cluster(Vec<NodeAddr>),
    /// A master that sentinels watch.
    Sentinel {
        /// The sentinels, of which one that knows the master is enough.
        sentinels: Vec<NodeAddr>,
        /// The name under which they watch it.
        master: String,
    },
}

impl Target {
    /// One server at this address, without TLS.
    pub fn standalone(addr: NodeAddr) -> Self {
        Self { place: Place::Standalone(addr), tls: false }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = if self.tls { "rediss" } else { "redis" };
        match &self.place {
            Place::Standalone(NodeAddr::Unix(path)) => write!(f, "unix://{}", path.display()),
            Place::Standalone(addr) => write!(f, "{scheme}://{addr}"),
            Place::Cluster(seeds) => write!(f, "{scheme}://{}", list(seeds)),
            Place::Sentinel { sentinels, master } => {
                let master = percent_encoding::utf8_percent_encode(master, percent_encoding::NON_ALPHANUMERIC);
                write!(f, "{scheme}+sentinel://{}/{master}", list(sentinels))
            }
        }
    }
}

fn list(addrs: &[NodeAddr]) -> String {
    addrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// A password: any bytes. `Debug` never shows it.
pub type Password = SecretSlice<u8>;

/// The user and password for a server. `Debug` never shows the password.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    /// ACL user; `None` is the server's default user.
    pub user: Option<String>,
    /// Password, or `None` for a server that asks for none.
    pub password: Option<Password>,
}

/// What an instance URL says.
#[derive(Debug, Clone)]
pub struct InstanceUrl {
    /// The instance that the URL names.
    pub target: Target,
    /// User and password that stood in the URL.
    pub credentials: Credentials,
    /// The DB that stood in the path.
    pub db: Option<DbIndex>,
}

/// A URL that names no instance. The text never repeats the URL: it may hold a password.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadUrl {
    /// The text cannot be parsed as a URL; holds the parser's reason.
    #[error("not a URL ({0}); expected redis://[user[:password]@]host[:port][/db] or unix:///path")]
    Syntax(String),
    /// The URL has a scheme other than those listed; holds the scheme.
    #[error(
        "scheme `{0}` is not known; use redis://, rediss:// (TLS), redis+sentinel://, rediss+sentinel://, the same with \
         valkey, or unix://"
    )]
    Scheme(String),
    /// The path is no DB number.
    #[error("the path after the host must be a DB number, as in redis://host/3")]
    Db,
    /// A sentinel URL without the name of a master.
    #[error("the sentinel URL names no master; expected redis+sentinel://host:26379,host:26379/MASTER[/db]")]
    Master,
    /// No host or no path.
    #[error("the URL names no {0}")]
    Missing(&'static str),
    /// An IPv6 address of which nobody can tell where its port begins.
    #[error("an IPv6 address in a URL stands in brackets, as in redis://[::1]:6379")]
    Ipv6,
    /// A host before the path of a socket.
    #[error("a socket has no host, and its path begins with a slash, as in unix:///run/redis.sock")]
    SocketHost,
    /// A percent sign that encodes nothing.
    #[error("a `%` in the URL is not followed by two hexadecimal digits; write a percent sign itself as %25")]
    Percent,
    /// What is decoded is no text, where only text has a meaning.
    #[error("a user, host, master or path in the URL is not UTF-8 once it is decoded")]
    NotText,
    /// A query or a fragment where none means anything.
    #[error("`{0}` in the URL means nothing here; percent-encode `?` and `#` inside a password (%3F, %23)")]
    Extra(String),
}

impl InstanceUrl {
    /// Reads
    ///
    /// - `redis://[user[:password]@]host[:port][,host[:port]...][/db]`, or a bare `host:port`; several hosts are nodes of
    ///   one cluster;
    /// - `redis+sentinel://[user[:password]@]host[:port],.../MASTER[/db]`, where the hosts are sentinels and user and
    ///   password are the master's;
    /// - `unix:///path[?db=N]`.
    ///
    /// `rediss` in place of `redis` means TLS; `valkey` and `valkeys` are the same as these two. User, password and the
    /// master's name may be percent-encoded.
    ///
    /// # Errors
    /// [`BadUrl`], which never repeats the text that was given.
    pub fn parse(text: &str) -> Result<Self, BadUrl> {
        let (scheme, rest) = text.split_once("://").unwrap_or(("redis", text));
        let (sentinel, tls) = match scheme {
            "redis" | "valkey" => (false, false),
            "rediss" | "valkeys" => (false, true),
            "redis+sentinel" | "valkey+sentinel" => (true, false),
            "rediss+sentinel" | "valkeys+sentinel" => (true, true),
            "unix" | "redis+unix" | "valkey+unix" => return parse_unix(text),
            other => return Err(BadUrl::Scheme(other.to_owned())),
        };
        if let Some(at) = rest.find(['?', '#']) {
            return Err(extra(&rest[at..]));
        }
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (userinfo, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
        let (user, password) = userinfo.split_once(':').map_or((userinfo, None), |(user, pw)| (user, Some(pw)));
        let credentials = Credentials {
            user: Some(decode_text(user)?).filter(|user| !user.is_empty()),
            password: password.map(|p| decode(p).map(Password::from)).transpose()?,
        };
        let port = if sentinel { SENTINEL_PORT } else { DEFAULT_PORT };
        let mut addrs = hosts.split(',').map(|host| parse_host(host, port)).collect::<Result<Vec<_>, _>>()?;
        let path = path.trim_end_matches('/');
        let (place, db) = if sentinel {
            let (master, db) = path.split_once('/').unwrap_or((path, ""));
            if master.is_empty() {
                return Err(BadUrl::Master);
            }
            (Place::Sentinel { sentinels: addrs, master: decode_text(master)? }, db)
        } else if addrs.len() == 1 {
            (Place::Standalone(addrs.remove(0)), path)
        } else {
            (Place::Cluster(addrs), path)
        };
        let db = match db {
            "" => None,
            number => Some(DbIndex(number.parse().map_err(|_| BadUrl::Db)?)),
        };
        Ok(Self { target: Target { place, tls }, credentials, db })
    }
}

/// `host`, `host:port`, `[v6]` or `[v6]:port`.
fn parse_host(text: &str, default_port: u16) -> Result<NodeAddr, BadUrl> {
    if !text.starts_with('[') && text.matches(':').count() > 1 {
        return Err(BadUrl::Ipv6);
    }
    if text.is_empty() || text.starts_with(':') {
        return Err(BadUrl::Missing("host"));
    }
    // The url crate knows what a host may look like.
    let url = url::Url::parse(&format!("redis://{text}")).map_err(|e| BadUrl::Syntax(e.to_string()))?;
    let host = url.host_str().filter(|h| !h.is_empty()).ok_or(BadUrl::Missing("host"))?;
    let host = decode_text(host.trim_start_matches('[').trim_end_matches(']'))?;
    Ok(NodeAddr::Tcp { host, port: url.port().unwrap_or(default_port) })
}

fn parse_unix(text: &str) -> Result<InstanceUrl, BadUrl> {
    let url = url::Url::parse(text).map_err(|e| BadUrl::Syntax(e.to_string()))?;
    if url.fragment().is_some() {
        return Err(extra("#…"));
    }
    if url.host_str().is_some_and(|host| !host.is_empty()) {
        return Err(BadUrl::SocketHost);
    }
    let path = decode_text(url.path())?;
    if path.trim_matches('/').is_empty() {
        return Err(BadUrl::Missing("socket path"));
    }
    let mut db = None;
    for (key, value) in url.query_pairs() {
        match key.as_ref() {
            "db" => db = Some(DbIndex(value.parse().map_err(|_| BadUrl::Db)?)),
            _ => return Err(extra("?…")),
        }
    }
    let credentials = Credentials {
        user: Some(decode_text(url.username())?).filter(|user| !user.is_empty()),
        password: url.password().map(|p| decode(p).map(Password::from)).transpose()?,
    };
    Ok(InstanceUrl { target: Target::standalone(NodeAddr::Unix(PathBuf::from(path))), credentials, db })
}

/// Only the sign is repeated: what follows may be the rest of a password.
fn extra(text: &str) -> BadUrl {
    let sign: String = text.chars().take(1).collect();
    BadUrl::Extra(if text.len() > 1 { format!("{sign}…") } else { sign })
}

/// Where to reach nodes whose announced addresses do not lead there from here: behind NAT, in containers, through a
/// tunnel. Written `announced=reachable`, each a host or `host:port`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeMap(Vec<(Endpoint, Endpoint)>);

/// A host, and a port where one was written.
type Endpoint = (String, Option<u16>);

impl NodeMap {
    /// Reads `announced=reachable` pairs, separated by commas.
    ///
    /// # Errors
    /// A sentence that names the pair that is none.
    pub fn parse(text: &str) -> Result<Self, String> {
        let pairs = text.split([',', ' ']).filter(|pair| !pair.is_empty()).map(|pair| {
            let wrong = || format!("`{pair}` is not a pair such as 10.0.0.5:6379=localhost:7001 or 10.0.0.5=gateway");
            let (announced, reachable) = pair.split_once('=').ok_or_else(wrong)?;
            let announced = endpoint(announced).ok_or_else(wrong)?;
            let reachable = endpoint(reachable).ok_or_else(wrong)?;
            Ok((announced, reachable))
        });
        pairs.collect::<Result<_, String>>().map(Self)
    }

    /// Where an announced address is reached. A pair with a port goes before one without.
    pub fn reach(&self, announced: NodeAddr) -> NodeAddr {
        let NodeAddr::Tcp { host, port } = announced else { return announced };
        let find = |wanted: Option<u16>| self.0.iter().find(|((h, p), _)| *h == host && *p == wanted);
        match find(Some(port)).or_else(|| find(None)) {
            Some((_, (to, to_port))) => NodeAddr::Tcp { host: to.clone(), port: to_port.unwrap_or(port) },
            None => NodeAddr::Tcp { host, port },
        }
    }
}

fn endpoint(text: &str) -> Option<Endpoint> {
    let (host, port) = match text.rsplit_once(':') {
        // An IPv6 address with a port is written in brackets; without brackets its last colon is no port's.
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, Some(port.parse().ok()?)),
        _ => (text, None),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    (!host.is_empty()).then(|| (host.to_owned(), port))
}

/// The bytes that a percent-encoded part of a URL stands for.
fn decode(text: &str) -> Result<Vec<u8>, BadUrl> {
    let is_code = |code: &[u8]| code.iter().all(u8::is_ascii_hexdigit);
    let mut behind_signs = text.split('%').skip(1).map(str::as_bytes);
    if behind_signs.any(|rest| !rest.get(..2).is_some_and(is_code)) {
        return Err(BadUrl::Percent);
    }
    Ok(percent_encoding::percent_decode_str(text).collect())
}

fn decode_text(text: &str) -> Result<String, BadUrl> {
    String::from_utf8(decode(text)?).map_err(|_| BadUrl::NotText)
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
        assert_eq!(url.credentials.password.as_ref().map(|p| p.expose_secret()), password.map(str::as_bytes));
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
        check("rediss://cache.example", "rediss://cache.example:6379", None, None, None);
        check("valkeys://:p@[::1]", "rediss://[::1]:6379", None, Some("p"), None);
    }

    #[test]
    fn a_password_may_be_any_bytes() {
        let url = InstanceUrl::parse("redis://:a%ff%00%25@h").unwrap();
        assert_eq!(url.credentials.password.unwrap().expose_secret(), b"a\xff\0%");
    }

    #[test]
    fn urls_of_clusters_and_sentinels() {
        check("redis://a:1,b,[::1]:3", "redis://a:1,b:6379,[::1]:3", None, None, None);
        check(
            "redis+sentinel://ann:p%2Cw@s1,s2:5000/my%20master/2",
            "redis+sentinel://s1:26379,s2:5000/my%20master",
            Some("ann"),
            Some("p,w"),
            Some(2),
        );
        check("valkeys+sentinel://s1/m", "rediss+sentinel://s1:26379/m", None, None, None);
        let shown = InstanceUrl::parse("redis+sentinel://s1/my%20master").unwrap().target.to_string();
        assert_eq!(InstanceUrl::parse(&shown).unwrap().target.to_string(), shown);
    }

    #[test]
    fn announced_addresses_lead_where_the_map_says() {
        let map = NodeMap::parse("10.0.0.5:6379=localhost:7001, 10.0.0.5=gateway,[fd00::1]:1=[::1]:2").unwrap();
        let reach = |host: &str, port| map.reach(NodeAddr::Tcp { host: host.into(), port }).to_string();
        assert_eq!(reach("10.0.0.5", 6379), "localhost:7001");
        assert_eq!(reach("10.0.0.5", 6380), "gateway:6380");
        assert_eq!(reach("fd00::1", 1), "[::1]:2");
        assert_eq!(reach("10.0.0.6", 6379), "10.0.0.6:6379");
        for wrong in ["10.0.0.5", "a=", "=b", "a:x=b"] {
            assert!(NodeMap::parse(wrong).unwrap_err().contains(wrong), "{wrong}");
        }
    }

    #[test]
    fn bad_urls_are_refused_without_repeating_the_secret() {
        for (text, expected) in [
            ("http://:hunter2@h", BadUrl::Scheme("http".into())),
            ("redis://:hunter2@h/notadb", BadUrl::Db),
            ("unix://", BadUrl::Missing("socket path")),
            ("redis://:hunter2@h/0#hunter2", BadUrl::Extra("#…".into())),
            ("redis://:hunter2@h,/0", BadUrl::Missing("host")),
            ("redis+sentinel://:hunter2@h", BadUrl::Master),
            ("redis+sentinel://:hunter2@h/m/x", BadUrl::Db),
            ("redis://user:hunter2%zz@h", BadUrl::Percent),
            ("redis://user:hunter2%@h", BadUrl::Percent),
            ("redis://hunter2%f@h", BadUrl::Percent),
            ("redis://hunter2%ff@h", BadUrl::NotText),
            ("redis+sentinel://:hunter2@h/%2", BadUrl::Percent),
            ("unix:///run/hunter2%zz", BadUrl::Percent),
            ("unix://hunter2/redis.sock", BadUrl::SocketHost),
            ("redis://::1:6379", BadUrl::Ipv6),
            ("redis://:hunter2@fd00::1", BadUrl::Ipv6),
            ("::1", BadUrl::Ipv6),
        ] {
            let error = InstanceUrl::parse(text).unwrap_err();
            assert_eq!(error, expected);
            assert!(!error.to_string().contains("hunter2"));
        }
    }
}
