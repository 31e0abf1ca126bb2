//! INFO, parsed as far as it is needed. A field that a version or a right hides is `None`, never an error.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use crate::model::progress::{Memory, ServerFacts};
use crate::model::shard::{DbIndex, NodeAddr, RunId};

/// Oldest Redis that is swept, as (major, minor): the contract's own rule.
pub const OLDEST: (u32, u32) = (4, 0);

/// The fields of one or more INFO sections. A daemon reads thousands of INFO texts a second: fields are not copied out of them.
#[derive(Debug, Clone, Default)]
pub struct Info {
    text: String,
    /// In the order of the names.
    fields: Vec<Field>,
}

/// Where a field stands in the text.
#[derive(Debug, Clone, Copy)]
struct Field {
    begin: usize,
    colon: usize,
    end: usize,
}

impl Field {
    fn name(self, text: &str) -> &str {
        &text[self.begin..self.colon]
    }

    fn value(self, text: &str) -> &str {
        &text[self.colon + 1..self.end]
    }
}

/// One line of INFO keyspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DbKeys {
    /// Keys, including expired keys that are still in memory.
    pub keys: u64,
    /// Keys with a TTL, including expired keys.
    pub expires: u64,
}

/// One replica, as its master lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaLine {
    /// `ip:port` as the master lists it, before any node map.
    pub addr: String,
    /// `online` or a stage of the synchronisation.
    pub state: String,
    /// Replication offset that it acknowledged, in bytes.
    pub offset: u64,
    /// Seconds since it last acknowledged.
    pub lag_s: Option<u32>,
}

/// `cmdstat_scan`, since the server started or the counters were reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommandStat {
    /// Number of calls by all clients.
    pub calls: u64,
    /// Server time of all calls together, in microseconds.
    pub usec: u64,
}

impl Info {
    /// Parses the text of INFO: lines of `field:value`, between `#` headings and empty lines.
    pub fn parse(text: impl Into<String>) -> Self {
        let text = text.into();
        let (mut begin, mut fields) = (0, Vec::new());
        for line in text.split_inclusive('\n') {
            let field = line.trim_end();
            if let Some(name) = field.find(':').filter(|_| !field.starts_with('#')) {
                fields.push(Field { begin, colon: begin + name, end: begin + field.len() });
            }
            begin += line.len();
        }
        fields.sort_by_key(|field| field.name(&text));
        Self { text, fields }
    }

    /// The text of a field; `None` where INFO lacks the field.
    pub fn get(&self, field: &str) -> Option<&str> {
        let after = self.fields.partition_point(|one| one.name(&self.text) <= field);
        let one = self.fields[..after].last().filter(|one| one.name(&self.text) == field)?;
        Some(one.value(&self.text))
    }

    fn all(&self) -> impl Iterator<Item = (&str, &str)> {
        self.fields.iter().map(|field| (field.name(&self.text), field.value(&self.text)))
    }

    /// A field as a number or another `T`.
    pub fn parsed<T: FromStr>(&self, field: &str) -> Option<T> {
        self.get(field)?.parse().ok()
    }

    /// A field that is `0` or `1`; `None` where INFO lacks it.
    pub fn flag(&self, field: &str) -> Option<bool> {
        self.get(field).map(|v| v == "1")
    }

    /// Product, version and process of the server.
    pub fn server(&self, addr: &NodeAddr) -> Option<ServerFacts> {
        let (product, version) = match (self.get("valkey_version"), self.get("redis_version")) {
            (Some(version), _) => ("Valkey".to_owned(), version),
            (None, Some(version)) => {
                let name = self.get("server_name").filter(|&name| name != "redis");
                (name.map_or_else(|| "Redis".to_owned(), str::to_owned), version)
            }
            (None, None) => return None,
        };
        let run_id = RunId(self.get("run_id").unwrap_or_default().to_owned());
        Some(ServerFacts { product, version: version.to_owned(), run_id, addr: addr.clone() })
    }

    /// Valkey's own version as (major, minor); `None` for other products.
    pub fn valkey_version(&self) -> Option<(u32, u32)> {
        major_minor(self.get("valkey_version")?)
    }

    /// The Redis version whose commands the server has, as (major, minor).
    pub fn redis_version(&self) -> Option<(u32, u32)> {
        major_minor(self.get("redis_version")?)
    }

    /// DBs that hold keys, with their sizes.
    pub fn keyspace(&self) -> BTreeMap<DbIndex, DbKeys> {
        let lines = self.all().filter_map(|(field, value)| {
            let db = DbIndex(field.strip_prefix("db")?.parse().ok()?);
            let part = |name| pairs(value).find(|(k, _)| *k == name).and_then(|(_, v)| v.parse().ok());
            Some((db, DbKeys { keys: part("keys")?, expires: part("expires").unwrap_or(0) }))
        });
        lines.collect()
    }

    /// The replicas that this master lists.
    pub fn replicas(&self) -> Vec<ReplicaLine> {
        let mut replicas: Vec<(u32, ReplicaLine)> = self
            .all()
            .filter_map(|(field, value)| {
                let number = field.strip_prefix("slave")?.parse().ok()?;
                let part = |name| pairs(value).find(|(k, _)| *k == name).map(|(_, v)| v);
                let replica = ReplicaLine {
                    addr: format!("{}:{}", part("ip")?, part("port")?),
                    state: part("state")?.to_owned(),
                    offset: part("offset").and_then(|v| v.parse().ok()).unwrap_or(0),
                    lag_s: part("lag").and_then(|v| v.parse().ok()),
                };
                Some((number, replica))
            })
            .collect();
        replicas.sort_by_key(|(number, _)| *number);
        replicas.into_iter().map(|(_, replica)| replica).collect()
    }

    /// CPU time of the main thread; of the whole process on servers that do not tell it.
    pub fn main_thread_cpu(&self) -> Option<Duration> {
        let seconds = |field| self.parsed::<f64>(field);
        let main = seconds("used_cpu_user_main_thread").zip(seconds("used_cpu_sys_main_thread"));
        let both = main.or_else(|| seconds("used_cpu_user").zip(seconds("used_cpu_sys")));
        both.and_then(|(user, system)| Duration::try_from_secs_f64(user + system).ok())
    }

    /// The server time of SCAN. Needs INFO commandstats.
    pub fn scan_stat(&self) -> Option<CommandStat> {
        let value = self.get("cmdstat_scan")?;
        let part = |name| pairs(value).find(|(k, _)| *k == name).and_then(|(_, v)| v.parse().ok());
        Some(CommandStat { calls: part("calls")?, usec: part("usec")? })
    }

    /// The fields of INFO about memory and evicted keys.
    pub fn memory(&self) -> Memory {
        Memory {
            used: self.parsed("used_memory"),
            rss: self.parsed("used_memory_rss"),
            max: self.parsed("maxmemory"),
            evicted: self.parsed("evicted_keys"),
        }
    }

    /// Whether the server may evict keys, before any command, to stay below `maxmemory`.
    pub fn may_evict(&self) -> bool {
        let limited = self.parsed::<u64>("maxmemory").is_some_and(|max| max > 0);
        limited && self.get("maxmemory_policy").is_none_or(|policy| policy != "noeviction")
    }

    /// Share of the keys with a TTL that have expired and are still in memory, as active expiry last saw it: a moving
    /// mean over its samples in all DBs together.
    pub fn expired_share(&self) -> Option<f64> {
        self.parsed::<f64>("expired_stale_perc").map(|percent| percent / 100.0)
    }

    /// The replication history that the data belongs to: the same on a master and its replicas.
    pub fn replication_id(&self) -> Option<&str> {
        self.get("master_replid")
    }

    /// `standalone`, `cluster` or `sentinel`. Valkey calls the field `server_mode`.
    pub fn mode(&self) -> Option<&str> {
        self.get("redis_mode").or_else(|| self.get("server_mode"))
    }

    /// Whether the server is a master; `None` where INFO does not say.
    pub fn is_master(&self) -> Option<bool> {
        self.get("role").map(|role| role == "master")
    }

    /// A replica's master as host and port.
    pub fn master_endpoint(&self) -> Option<(String, u16)> {
        Some((self.get("master_host")?.to_owned(), self.parsed("master_port")?))
    }

    /// A replica's master as `host:port`.
    pub fn master_addr(&self) -> Option<String> {
        self.master_endpoint().map(|(host, port)| format!("{host}:{port}"))
    }
}

/// `expired_keys` in the text of INFO stats, without parsing the rest: it is read thousands of times a second.
pub fn expired_keys(stats: &str) -> Option<u64> {
    stats.lines().find_map(|line| line.strip_prefix("expired_keys:"))?.trim_end().parse().ok()
}

fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next().flatten().unwrap_or(0)))
}

fn pairs(value: &str) -> impl Iterator<Item = (&str, &str)> {
    value.split(',').filter_map(|pair| pair.split_once('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# Server\r\nredis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:8.0.1\r\nrun_id:abc\r\n\
        \r\n# Replication\r\nrole:master\r\nslave1:ip=::1,port=7,state=online,offset=5,lag=0\r\n\
        slave0:ip=10.0.0.1,port=6,state=wait_bgsave,offset=0,lag=9,type=replica\r\n\
        # Commandstats\r\ncmdstat_scan:calls=10,usec=900,usec_per_call=90.00\r\n\
        # Keyspace\r\ndb0:keys=12,expires=7,avg_ttl=0,subexpiry=0\r\ndb15:keys=1,expires=0,avg_ttl=0\r\n";

    #[test]
    fn valkey_gives_its_own_version_and_the_redis_version_it_speaks() {
        let info = Info::parse(TEXT);
        let facts = info.server(&NodeAddr::Tcp { host: "h".into(), port: 1 }).unwrap();
        assert_eq!((facts.product.as_str(), facts.version.as_str()), ("Valkey", "8.0.1"));
        assert_eq!(info.redis_version(), Some((7, 2)));
    }

    #[test]
    fn keyspace_replicas_and_command_statistics_are_read() {
        let info = Info::parse(TEXT);
        let keyspace = info.keyspace();
        assert_eq!(keyspace[&DbIndex(0)], DbKeys { keys: 12, expires: 7 });
        assert_eq!(keyspace[&DbIndex(15)], DbKeys { keys: 1, expires: 0 });
        let replicas = info.replicas();
        assert_eq!(replicas[0].addr, "10.0.0.1:6");
        assert_eq!((replicas[1].state.as_str(), replicas[1].lag_s), ("online", Some(0)));
        assert_eq!(info.scan_stat(), Some(CommandStat { calls: 10, usec: 900 }));
    }

    #[test]
    fn a_field_that_stands_twice_has_its_last_value() {
        let info = Info::parse("a:1\r\nab:2\r\n\r\na:x:y \r\nb:");
        assert_eq!(
            ["a", "ab", "b", "", "c"].map(|name| info.get(name)),
            [Some("x:y"), Some("2"), Some(""), None, None]
        );
    }

    #[test]
    fn text_that_is_no_info_has_no_facts() {
        let info = Info::parse("hello\r\n# world: x\r\n");
        assert_eq!(info.server(&NodeAddr::Unix("/x".into())), None);
        assert!(info.keyspace().is_empty());
    }
}
