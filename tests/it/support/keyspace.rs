//! Keyspaces of known content: expired and live keys, of every type and with every kind of name.
//!
//! "Expired" means expired and still in memory. The content follows from the arguments alone, so that a failing
//! test fails again. One writer at a time: the counts are checked, and a test's own writers begin afterwards.

use std::{collections::BTreeMap, time::Duration};

use redis::{Pipeline, RedisResult, aio::MultiplexedConnection};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};

use super::{
    PATIENCE, probe,
    server::{Kind, Server, Version},
};

/// Commands per write. Their replies, a few bytes each, fit into any socket buffer, so that neither side can
/// wait for the other.
const CHUNK: u64 = 1_000;

/// Keys that live and have a TTL keep it for at least this long, longer than any test.
const LONG_MS: u64 = 3_600_000;

/// The TTL of keys that are to expire soon. It is long against the time within one command: a key whose TTL is
/// over before its command has ended is deleted at once and never stays in memory as an expired one.
const SHORT_MS: u64 = 100;

/// How far two readings of the same expiry may differ on servers that tell only the time left.
const EXPIRY_TOLERANCE_MS: u64 = 250;

/// The TTL of the keys of [`Keyspace::zoo`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// No TTL.
    Forever,
    /// A TTL of one to two hours.
    Long,
    /// Expired already.
    Expired,
}

/// A server of its own with `live` keys that have a long TTL, and `expired` ones.
pub async fn filled(live: u64, expired: u64) -> Server {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    if expired > 0 {
        keys.expired(expired, "expired:").await;
    }
    keys.live_ttl(live, "live:").await;
    server
}

/// One database of a server.
pub struct Keyspace<'a> {
    server: &'a Server,
    db: u32,
}

impl<'a> Keyspace<'a> {
    /// Database `db` of a server.
    pub fn of(server: &'a Server, db: u32) -> Self {
        Self { server, db }
    }

    /// Writes exactly `n` keys that have expired and are still in memory, named `{prefix}{0..n}`.
    ///
    /// Active expiry is off afterwards, on the whole server. On a replica the keys may expire a little later than
    /// on their master, since servers before 7.0 pass on the TTL and not the time of expiry.
    pub async fn expired(&self, n: u64, prefix: &str) {
        self.keep_expired_keys().await;
        let before = self.dbsize().await;
        self.set_all(n, |i| (format!("{prefix}{i}"), Some(SHORT_MS))).await;
        self.until_expired(before + n).await;
    }

    /// Writes `n` string keys without a TTL, named `{prefix}{0..n}`.
    pub async fn live(&self, n: u64, prefix: &str) {
        self.set_all(n, |i| (format!("{prefix}{i}"), None)).await;
    }

    /// Writes `n` string keys that live for one to two hours, named `{prefix}{0..n}`.
    pub async fn live_ttl(&self, n: u64, prefix: &str) {
        let ttl = |i| LONG_MS + i * 7_919 % LONG_MS;
        self.set_all(n, |i| (format!("{prefix}{i}"), Some(ttl(i)))).await;
    }

    /// Writes `n` keys of all types in turn, with binary names among them: see [`name`].
    ///
    /// The first key's name is the prefix itself, which makes the empty name with an empty prefix.
    pub async fn zoo(&self, n: u64, prefix: &str, life: Life, seed: u64) {
        if life == Life::Expired {
            self.keep_expired_keys().await;
        }
        let before = self.dbsize().await;
        let mut connection = self.connection().await;
        let mut random = Random(seed);
        for first in (0..n).step_by(CHUNK as usize) {
            let mut pipeline = redis::pipe();
            for i in first..n.min(first + CHUNK) {
                let key = name(prefix, i, &mut random);
                specimen(&mut pipeline, &key, i, &mut random);
                let ttl = match life {
                    Life::Forever => continue,
                    Life::Long => LONG_MS + random.below(LONG_MS),
                    Life::Expired => SHORT_MS,
                };
                pipeline.cmd("PEXPIRE").arg(&key).arg(ttl).ignore();
            }
            let written: RedisResult<()> = pipeline.query_async(&mut connection).await;
            written.expect("the zoo is written");
        }
        if life == Life::Expired {
            self.until_expired(before + n).await;
        } else {
            assert_eq!(self.dbsize().await, before + n, "every name is new");
        }
    }

    /// How many keys the database holds, expired ones included.
    pub async fn dbsize(&self) -> u64 {
        self.server.dbsize(self.db).await
    }

    /// Every live key with its value and expiry. Frees no expired key (KEYS does not), but counts as a use of
    /// each live one: read LRU and LFU data before.
    pub async fn snapshot_live(&self) -> LiveKeys {
        let mut connection = self.connection().await;
        let names: Vec<Vec<u8>> = redis::cmd("KEYS").arg("*").query_async(&mut connection).await.expect("KEYS");
        let exact = tells_expiry();
        let mut keys = BTreeMap::new();
        for chunk in names.chunks(CHUNK as usize) {
            let mut pipeline = redis::pipe();
            for key in chunk {
                pipeline.cmd("TYPE").arg(key).cmd("DUMP").arg(key);
                pipeline.cmd("TIME");
                let expiry = if exact { "PEXPIRETIME" } else { "PTTL" };
                pipeline.cmd(expiry).arg(key);
            }
            let mut replies: Vec<redis::Value> =
                pipeline.query_async(&mut connection).await.expect("the keys are read");
            for (key, reply) in chunk.iter().zip(replies.chunks_mut(4)) {
                keys.insert(key.clone(), LiveKey::read(reply, exact));
            }
        }
        LiveKeys { keys }
    }

    async fn connection(&self) -> MultiplexedConnection {
        self.server.conn_to(self.db).await
    }

    /// Switches off active expiry, which would free expired keys during the test.
    async fn keep_expired_keys(&self) {
        self.server.stop_active_expiry().await;
    }

    /// Waits until every key written with [`SHORT_MS`] has expired, and checks that all are still in memory.
    ///
    /// Uses the server's clock: asking for a key would free it.
    async fn until_expired(&self, expected: u64) {
        let mut connection = self.connection().await;
        let written_ms = time_ms(&mut connection).await;
        probe("the short TTL is over", PATIENCE, async || time_ms(&mut connection).await > written_ms + SHORT_MS).await;
        assert_eq!(self.dbsize().await, expected, "all expired keys are in memory");
    }

    /// Sets `n` string keys, as fast as the server takes them.
    async fn set_all(&self, n: u64, key_and_ttl_ms: impl Fn(u64) -> (String, Option<u64>)) {
        let stream = UnixStream::connect(self.server.socket()).await.expect("the server's socket");
        let mut stream = BufReader::new(stream);
        let mut buffer = Vec::new();
        let mut greetings = 1;
        if let Some(password) = self.server.password() {
            encode(&["AUTH", password], &mut buffer);
            greetings += 1;
        }
        encode(&["SELECT", &self.db.to_string()], &mut buffer);
        exchange(&mut stream, &mut buffer, greetings).await;
        for first in (0..n).step_by(CHUNK as usize) {
            let end = n.min(first + CHUNK);
            for i in first..end {
                let value = format!("value:{i}");
                match key_and_ttl_ms(i) {
                    (key, None) => encode(&["SET", &key, &value], &mut buffer),
                    (key, Some(ttl)) => {
                        encode(&["SET", &key, &value, "PX", &ttl.to_string()], &mut buffer);
                    }
                }
            }
            exchange(&mut stream, &mut buffer, end - first).await;
        }
    }
}

/// The live keys of one database.
#[derive(Clone, PartialEq, Eq)]
pub struct LiveKeys {
    pub keys: BTreeMap<Vec<u8>, LiveKey>,
}

/// One live key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveKey {
    /// The type as the server calls it.
    pub kind: String,
    /// The value as DUMP gives it.
    pub dump: Vec<u8>,
    /// When it expires, in Unix milliseconds.
    pub expires_ms: Option<u64>,
}

impl LiveKey {
    /// Reads the replies to TYPE, DUMP, TIME and PEXPIRETIME (or PTTL).
    fn read(replies: &mut [redis::Value], exact: bool) -> Self {
        let mut replies = replies.iter_mut().map(std::mem::take);
        let mut next = || replies.next().expect("four replies for a key");
        let kind = redis::from_redis_value(next()).expect("a type");
        let dump = redis::from_redis_value(next()).expect("a live key has a value");
        let (seconds, micros): (u64, u64) = redis::from_redis_value(next()).expect("a time");
        let expiry: i64 = redis::from_redis_value(next()).expect("an expiry");
        let now_ms = if exact { 0 } else { seconds * 1000 + micros / 1000 };
        // Negative: no expiry.
        let expires_ms = u64::try_from(expiry).ok().map(|expiry| expiry + now_ms);
        Self { kind, dump, expires_ms }
    }

    fn is_same(&self, other: &Self) -> bool {
        let tolerance = if tells_expiry() { 0 } else { EXPIRY_TOLERANCE_MS };
        let same_expiry = match (self.expires_ms, other.expires_ms) {
            (Some(one), Some(another)) => one.abs_diff(another) <= tolerance,
            (one, another) => one == another,
        };
        same_expiry && self.kind == other.kind && self.dump == other.dump
    }
}

/// Panics, naming some keys, unless every live key is there with the same value and the same expiry.
pub fn assert_same_live(before: &LiveKeys, after: &LiveKeys) {
    let mut differences = Vec::new();
    for (key, old) in &before.keys {
        match after.keys.get(key) {
            None => differences.push(format!("gone: {}", key.escape_ascii())),
            Some(new) if !old.is_same(new) => {
                differences.push(format!("changed: {}\n  from {old:?}\n  to   {new:?}", key.escape_ascii()))
            }
            Some(_) => {}
        }
    }
    let added = after.keys.keys().filter(|key| !before.keys.contains_key(*key));
    differences.extend(added.map(|key| format!("new: {}", key.escape_ascii())));
    assert!(
        differences.is_empty(),
        "{} live keys differ, among them:\n{}",
        differences.len(),
        differences[..differences.len().min(5)].join("\n")
    );
}

/// A small generator (splitmix64): the same numbers on every machine for the same seed.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// The next number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// The name of a zoo's key: the prefix itself, a plain name, one with line ends and spaces, or raw bytes.
fn name(prefix: &str, i: u64, random: &mut Random) -> Vec<u8> {
    let mut name = prefix.as_bytes().to_vec();
    match i {
        0 => {}
        _ if i % 3 == 1 => name.extend(format!(":{i}").bytes()),
        _ if i % 3 == 2 => name.extend(format!(" {i}\r\n*1\r\n\0\"{{é}}").bytes()),
        _ => {
            name.extend([0xFF, 0x00]);
            name.extend(i.to_be_bytes());
            name.extend(random.next().to_le_bytes());
        }
    }
    name
}

/// The command that creates key number `i`; the types take turns.
fn specimen(pipeline: &mut Pipeline, key: &[u8], i: u64, random: &mut Random) {
    let (one, two) = (random.next(), random.next());
    match i % 6 {
        0 => pipeline.cmd("SET").arg(key).arg(one),
        1 => pipeline.cmd("RPUSH").arg(key).arg(one).arg(two),
        2 => pipeline.cmd("HSET").arg(key).arg("one").arg(one),
        3 => pipeline.cmd("SADD").arg(key).arg("member").arg(one),
        4 => pipeline.cmd("ZADD").arg(key).arg(i).arg(one),
        _ => pipeline.cmd("XADD").arg(key).arg("1-1").arg("one").arg(one),
    };
    pipeline.ignore();
}

/// PEXPIRETIME exists from Redis 7.0 on and in every Valkey.
fn tells_expiry() -> bool {
    Server::kind() == Kind::Valkey || Server::version() >= Version(7, 0, 0)
}

/// The server's clock in Unix milliseconds.
async fn time_ms(connection: &mut MultiplexedConnection) -> u64 {
    let (seconds, micros): (u64, u64) = redis::cmd("TIME").query_async(connection).await.expect("TIME");
    u64::try_from(Duration::from_secs(seconds).as_millis()).expect("a date") + micros / 1000
}

/// Appends one command to a buffer.
fn encode(words: &[&str], buffer: &mut Vec<u8>) {
    buffer.extend(format!("*{}\r\n", words.len()).bytes());
    for word in words {
        buffer.extend(format!("${}\r\n{word}\r\n", word.len()).bytes());
    }
}

/// Sends what is in the buffer and reads that many replies, each of which must be one line and no error.
async fn exchange(stream: &mut BufReader<UnixStream>, buffer: &mut Vec<u8>, replies: u64) {
    stream.write_all(buffer).await.expect("the server takes it");
    buffer.clear();
    let mut line = String::new();
    for _ in 0..replies {
        line.clear();
        let length = stream.read_line(&mut line).await.expect("a reply");
        assert!(length > 0 && line.starts_with('+'), "reply: {line:?}");
    }
}
