//! A real cluster of a test's own: masters with their replicas, known keys spread over them.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
};

use redis::Value;
use ttlsweep::model::slots::{SLOTS, slot_of};

use super::{
    PATIENCE, free_port, probe,
    server::{Kind, Options, Server, Version},
};

/// How long a node may be silent before the others call it dead. Short, so that failovers are; long enough for a busy
/// machine.
const NODE_TIMEOUT_MS: &str = "2000";

/// The TTL of keys that shall be dead soon.
const SHORT_MS: u64 = 100;

/// A running cluster. Every node listens on 127.0.0.1.
pub struct Cluster {
    /// Masters first, then their replicas in the same order, then nodes that joined.
    pub nodes: Vec<Server>,
    masters: usize,
    tls_ports: Vec<u16>,
}

impl Cluster {
    /// So many masters that share the slots evenly, each with a replica if wanted.
    pub async fn start(masters: usize, with_replicas: bool) -> Self {
        let count = if with_replicas { 2 * masters } else { masters };
        Self::start_with(masters, vec![Server::options(); count], Vec::new()).await
    }

    /// As [`Cluster::start`], without replicas, every node with these options.
    pub async fn start_as(masters: usize, options: Options) -> Self {
        Self::start_with(masters, vec![options; masters], Vec::new()).await
    }

    /// As [`Cluster::start_as`], with a TLS port beside the plain one of each node.
    pub async fn start_with_tls(masters: usize, options: Options) -> Self {
        let tls_ports: Vec<u16> = (0..masters).map(|_| free_port()).collect();
        let options: Vec<Options> =
            tls_ports.iter().map(|port| options.clone().with_config("tls-port", &port.to_string())).collect();
        Self::start_with(masters, options, tls_ports).await
    }

    /// One node for each of the options; so many of them are masters, the others their replicas.
    async fn start_with(masters: usize, options: Vec<Options>, tls_ports: Vec<u16>) -> Self {
        let count = options.len();
        let mut nodes = Vec::new();
        for options in options {
            nodes.push(node(options).await);
        }
        let cluster = Self { nodes, masters, tls_ports };
        for (place, range) in even(masters).into_iter().enumerate() {
            add_slots(&cluster.nodes[place], range).await;
            // Without epochs of their own, nodes that meet would quarrel about them for seconds.
            let epoch = (place + 1).to_string();
            cluster.nodes[place].cmd(&["CLUSTER", "SET-CONFIG-EPOCH", &epoch]).await;
        }
        for node in &cluster.nodes[1..] {
            cluster.meet(node).await;
        }
        probe("every node knows every other", PATIENCE, async || {
            for node in &cluster.nodes {
                if node_lines(node).await.iter().filter(|line| !line.contains("handshake")).count() < count {
                    return false;
                }
            }
            true
        })
        .await;
        let mut pairs = Vec::new();
        for place in masters..count {
            let master = node_id(&cluster.nodes[place - masters]).await;
            probe("it knows its master", PATIENCE, async || {
                cluster.nodes[place].try_query::<Value>(&["CLUSTER", "REPLICATE", &master]).await.is_ok()
            })
            .await;
            pairs.push((node_id(&cluster.nodes[place]).await, master));
        }
        // A master says nothing to the failover order of a node that it does not know as its replica yet.
        probe("every node knows who replicates whom", PATIENCE, async || {
            for node in &cluster.nodes {
                let lines = node_lines(node).await;
                let known = |(replica, master): &(String, String)| {
                    lines.iter().any(|line| {
                        let mut fields = line.split(' ');
                        fields.next() == Some(replica) && fields.nth(2) == Some(master)
                    })
                };
                if !pairs.iter().all(known) {
                    return false;
                }
            }
            true
        })
        .await;
        cluster.until_well().await;
        for place in masters..count {
            probe("the replica is in step", PATIENCE, async || {
                let info = cluster.nodes[place].info("replication").await;
                info.get("master_link_status").map(String::as_str) == Some("up")
            })
            .await;
        }
        for node in &cluster.nodes {
            node.cmd(&["DEBUG", "SET-ACTIVE-EXPIRE", "0"]).await;
        }
        cluster
    }

    /// The URL of one node.
    pub fn url(&self) -> String {
        self.nodes[0].url()
    }

    /// The TLS port of a node.
    pub fn tls_port(&self, place: usize) -> u16 {
        self.tls_ports[place]
    }

    /// The replica that was given to a master at the start.
    pub fn replica_of(&self, master: usize) -> &Server {
        &self.nodes[self.masters + master]
    }

    /// Adds an empty node and returns its place.
    pub async fn join(&mut self) -> usize {
        let node = node(Server::options()).await;
        node.cmd(&["DEBUG", "SET-ACTIVE-EXPIRE", "0"]).await;
        self.nodes.push(node);
        let place = self.nodes.len() - 1;
        self.meet(&self.nodes[place]).await;
        let id = node_id(&self.nodes[place]).await;
        probe("everybody knows the node that joined", PATIENCE, async || {
            for node in &self.nodes {
                let lines = node_lines(node).await;
                let others = lines.iter().filter(|line| !line.contains("handshake")).count();
                if others < self.nodes.len() || !lines.iter().any(|line| line.starts_with(&id)) {
                    return false;
                }
            }
            true
        })
        .await;
        self.until_well().await;
        place
    }

    /// Waits until every node thinks that all slots are served.
    pub async fn until_well(&self) {
        probe("the cluster is well", PATIENCE, async || {
            for node in &self.nodes {
                match node.try_query::<String>(&["CLUSTER", "INFO"]).await {
                    Ok(info) if info.contains("cluster_state:ok") => {}
                    _ => return false,
                }
            }
            true
        })
        .await;
    }

    /// Writes so many keys that live for ever and so many that are dead, spread over all slots. Returns the names of those
    /// that live.
    pub async fn fill(&self, live: u64, dead: u64) -> BTreeSet<String> {
        let before = self.keys_in_memory().await;
        let names: BTreeSet<String> = (0..live).map(|n| format!("live{n}")).collect();
        self.write(&names, None).await;
        let mortal: BTreeSet<String> = (0..dead).map(|n| format!("dead{before}:{n}")).collect();
        self.write(&mortal, Some(SHORT_MS)).await;
        self.until_short_ttls_are_over().await;
        assert_eq!(self.keys_in_memory().await, before + live + dead, "all dead keys are in memory");
        for replica in self.masters..self.nodes.len().min(2 * self.masters) {
            let (master, replica) = (&self.nodes[replica - self.masters], &self.nodes[replica]);
            if replica.info("replication").await.get("role").map(String::as_str) == Some("slave") {
                let keys = master.dbsize(0).await;
                probe("the replica has the keys", PATIENCE, async || replica.dbsize(0).await == keys).await;
            }
        }
        names
    }

    /// Writes keys that are dead in a moment, while somebody may free them.
    pub async fn set_for_a_moment(&self, names: &[String]) {
        self.write(&names.iter().cloned().collect(), Some(SHORT_MS)).await;
    }

    /// By the servers' clocks: asking for a key would free it.
    async fn until_short_ttls_are_over(&self) {
        for place in self.masters().await {
            let now = async || {
                let (seconds, micros): (u64, u64) = self.nodes[place].query(&["TIME"]).await;
                seconds * 1_000 + micros / 1_000
            };
            let written = now().await;
            probe("the short TTL is over", PATIENCE, async || now().await > written + SHORT_MS).await;
        }
    }

    pub async fn write(&self, names: &BTreeSet<String>, ttl_ms: Option<u64>) {
        let owners = self.owners().await;
        let mut by_node: BTreeMap<usize, Vec<&String>> = BTreeMap::new();
        for name in names {
            by_node.entry(owners[usize::from(slot_of(name.as_bytes()))]).or_default().push(name);
        }
        for (place, names) in by_node {
            let mut connection = self.nodes[place].conn().await;
            for chunk in names.chunks(1_000) {
                let mut pipeline = redis::pipe();
                for name in chunk {
                    let set = pipeline.cmd("SET").arg(name).arg("value");
                    if let Some(ttl) = ttl_ms {
                        set.arg("PX").arg(ttl);
                    }
                    set.ignore();
                }
                let written: redis::RedisResult<()> = pipeline.query_async(&mut connection).await;
                written.expect("the keys are written");
            }
        }
    }

    /// The places of the nodes that are masters with slots.
    pub async fn masters(&self) -> Vec<usize> {
        let owners: BTreeSet<usize> = self.owners().await.into_iter().collect();
        owners.into_iter().collect()
    }

    /// Which node owns each slot, as the first node that answers sees it.
    pub async fn owners(&self) -> Vec<usize> {
        let by_port: BTreeMap<i64, usize> =
            self.nodes.iter().enumerate().map(|(place, node)| (i64::from(node.port()), place)).collect();
        let mut owners = vec![usize::MAX; usize::from(SLOTS)];
        for node in &self.nodes {
            let Ok(ranges) = node.try_query::<Vec<Vec<Value>>>(&["CLUSTER", "SLOTS"]).await else { continue };
            for range in ranges {
                let (Value::Int(start), Value::Int(end), Value::Array(master)) = (&range[0], &range[1], &range[2])
                else {
                    panic!("CLUSTER SLOTS: {range:?}");
                };
                let Value::Int(port) = master[1] else { panic!("CLUSTER SLOTS: {range:?}") };
                owners[*start as usize..=*end as usize].fill(by_port[&port]);
            }
            return owners;
        }
        panic!("no node answers");
    }

    /// Keys on all masters, dead ones included.
    pub async fn keys_in_memory(&self) -> u64 {
        let mut keys = 0;
        for place in self.masters().await {
            keys += self.nodes[place].dbsize(0).await;
        }
        keys
    }

    /// Keys that this node has freed because they had expired.
    pub async fn freed_by(&self, place: usize) -> u64 {
        self.nodes[place].expired_keys().await
    }

    /// Panics unless exactly these keys are there, on the masters that own their slots, and no other key, dead or alive.
    pub async fn assert_only(&self, live: &BTreeSet<String>) {
        let mut there = BTreeSet::new();
        for place in self.masters().await {
            let names: Vec<String> = self.nodes[place].query(&["KEYS", "*"]).await;
            let in_memory = self.nodes[place].dbsize(0).await;
            assert_eq!(in_memory, names.len() as u64, "node {place} holds dead keys");
            there.extend(names);
        }
        assert!(there == *live, "{} keys are there, {} should be", there.len(), live.len());
    }

    /// Moves slots with their keys from one master to another, as `redis-cli --cluster reshard` does.
    pub async fn migrate(&self, from: usize, to: usize, slots: RangeInclusive<u16>) {
        let (source, target) = (node_id(&self.nodes[from]).await, node_id(&self.nodes[to]).await);
        let mut at_source = self.nodes[from].conn().await;
        let mut at_target = self.nodes[to].conn().await;
        let port = self.nodes[to].port();
        for slot in slots.clone() {
            let set_slot = |state: &str, node: &str| {
                let mut command = redis::cmd("CLUSTER");
                command.arg("SETSLOT").arg(slot).arg(state).arg(node);
                command
            };
            let _: () = set_slot("IMPORTING", &source).query_async(&mut at_target).await.expect("IMPORTING");
            let _: () = set_slot("MIGRATING", &target).query_async(&mut at_source).await.expect("MIGRATING");
            loop {
                let mut get = redis::cmd("CLUSTER");
                get.arg("GETKEYSINSLOT").arg(slot).arg(100);
                let names: Vec<String> = get.query_async(&mut at_source).await.expect("GETKEYSINSLOT");
                if names.is_empty() {
                    break;
                }
                let mut migrate = redis::cmd("MIGRATE");
                migrate.arg("127.0.0.1").arg(port).arg("").arg(0).arg(5_000).arg("KEYS").arg(&names);
                let _: Value = migrate.query_async(&mut at_source).await.expect("MIGRATE");
            }
            let _: () = set_slot("NODE", &target).query_async(&mut at_target).await.expect("NODE");
            // The source may have heard of it from the target: before 7.0 it then turns into a replica with its last slot,
            // and is no longer to be told.
            let _: redis::RedisResult<()> = set_slot("NODE", &target).query_async(&mut at_source).await;
        }
        // The others hear of it by gossip, some day: they are told as redis-cli tells them. One that cannot be told, since
        // it is away or a replica, follows its master.
        for node in self.nodes.iter().enumerate().filter(|(place, _)| ![from, to].contains(place)).map(|(_, node)| node)
        {
            let mut tell = redis::pipe();
            for slot in slots.clone() {
                tell.cmd("CLUSTER").arg("SETSLOT").arg(slot).arg("NODE").arg(&target).ignore();
            }
            if let Ok(mut conn) = node.client().get_multiplexed_async_connection().await {
                let _: redis::RedisResult<()> = tell.query_async(&mut conn).await;
            }
        }
    }

    /// Waits until every node that answers agrees on the owners of the slots.
    pub async fn until_agreed(&self) {
        probe("all nodes agree on the slots", PATIENCE, async || {
            let mut views = BTreeSet::new();
            for node in &self.nodes {
                if let Ok(lines) = node.try_query::<String>(&["CLUSTER", "NODES"]).await {
                    // The id and the slots of each line; a node shows its own open migrations in brackets.
                    let mut owned: Vec<String> = lines
                        .lines()
                        .map(|line| {
                            let fields = line
                                .split(' ')
                                .enumerate()
                                .filter(|(n, field)| *n == 0 || (*n > 7 && !field.starts_with('[')));
                            fields.map(|(_, field)| field).collect::<Vec<_>>().join(" ")
                        })
                        .filter(|line| line.contains(' '))
                        .collect();
                    owned.sort();
                    views.insert(owned);
                }
            }
            views.len() == 1
        })
        .await;
    }

    /// Makes the replica of a master take its place, with the master's help, and waits until it has.
    pub async fn failover(&self, master: usize) {
        let replica = self.replica_of(master);
        replica.cmd(&["CLUSTER", "FAILOVER"]).await;
        self.until_promoted(master).await;
    }

    /// Waits until the replica of a master has taken its place.
    pub async fn until_promoted(&self, master: usize) {
        let replica = self.replica_of(master);
        probe("the replica is promoted", PATIENCE, async || {
            replica.try_query::<String>(&["INFO", "replication"]).await.is_ok_and(|info| info.contains("role:master"))
        })
        .await;
    }

    async fn meet(&self, node: &Server) {
        // With tls-cluster nodes find each other by their TLS ports.
        let place = self.nodes.iter().position(|other| other.port() == node.port());
        let tls = place.and_then(|place| self.tls_ports.get(place));
        let port = tls.copied().unwrap_or_else(|| node.port()).to_string();
        self.nodes[0].cmd(&["CLUSTER", "MEET", "127.0.0.1", &port]).await;
    }
}

async fn node(options: Options) -> Server {
    let mut options = options
        .with_config("cluster-enabled", "yes")
        .with_config("cluster-node-timeout", NODE_TIMEOUT_MS)
        // A replica may take over however old its data is: the tests kill masters at once.
        .with_config("cluster-replica-validity-factor", "0");
    if Server::kind() == Kind::Valkey || Server::version() >= Version(7, 0, 0) {
        // As fast as the tests read it; MOVED would name it otherwise.
        options = options.with_config("cluster-allow-replica-migration", "no");
    }
    options.start().await
}

async fn add_slots(node: &Server, range: RangeInclusive<u16>) {
    let mut words = vec!["CLUSTER".to_owned(), "ADDSLOTS".to_owned()];
    words.extend(range.map(|slot| slot.to_string()));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    node.cmd(&words).await;
}

/// The slots of each of so many masters.
fn even(masters: usize) -> Vec<RangeInclusive<u16>> {
    let edge = |n: usize| (usize::from(SLOTS) * n / masters) as u16;
    (0..masters).map(|n| edge(n)..=edge(n + 1) - 1).collect()
}

/// The id of a node in its cluster.
pub async fn node_id(node: &Server) -> String {
    node.query(&["CLUSTER", "MYID"]).await
}

async fn node_lines(node: &Server) -> Vec<String> {
    let text: String = node.query(&["CLUSTER", "NODES"]).await;
    text.lines().map(str::to_owned).collect()
}
