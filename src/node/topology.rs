//! Finds the masters of an instance, and finds them again after a failover or a move of slots.
//!
//! A cluster is asked with CLUSTER SLOTS: every version has it, and it lists exactly the masters that hold keys, each
//! with its slots and replicas. Sentinels are asked with SENTINEL GET-MASTER-ADDR-BY-NAME.
//!
//! Each call asks another node first, so that a node with an old view cannot mislead a sweep for long.

use std::sync::{Mutex, PoisonError};

use redis::Value;

use crate::model::failure::FailureKind;
use crate::model::shard::NodeAddr;
use crate::model::slots::{SLOTS, SlotSet};
use crate::model::target::{Credentials, NodeMap, Place, Target};
use crate::node::commands;
use crate::node::conn::{Conn, ConnOptions};
use crate::node::error::{Class, NodeError};

/// How many nodes one call asks before it gives up, so that a call is bounded in large clusters too: each node may take
/// the time of a connection attempt. The next call asks the others.
const ASK_AT_MOST: usize = 8;
/// How many servers are asked in a chain of replicas before the search for its master gives up.
const HOPS: usize = 4;

/// The kind of an instance, as its URL and its servers say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InstanceKind {
    /// One server that is no node of a cluster.
    Standalone,
    /// One master that sentinels name.
    Sentinel,
    /// Masters that share the hash slots.
    Cluster,
}

/// One master, as a node or a sentinel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Master {
    /// The address at which it is reached.
    pub addr: NodeAddr,
    /// Its node id, in a cluster.
    pub node_id: Option<String>,
    /// Node ids of its replicas.
    pub replicas: Vec<String>,
    /// The hash slots that it owns; empty outside of a cluster.
    pub slots: SlotSet,
}

impl Master {
    fn at(addr: NodeAddr) -> Self {
        Self { addr, node_id: None, replicas: Vec::new(), slots: SlotSet::default() }
    }

    /// Whether the two are the same node.
    pub fn is_same_node(&self, other: &Self) -> bool {
        match (&self.node_id, &other.node_id) {
            (Some(one), Some(another)) => one == another,
            _ => self.addr == other.addr,
        }
    }
}

/// The masters of an instance at one moment, as one node sees them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// The kind of the instance.
    pub kind: InstanceKind,
    /// Its masters, by their lowest slot.
    pub masters: Vec<Master>,
}

impl View {
    /// The hash slots that no master owns; empty outside of a cluster.
    pub fn unowned(&self) -> SlotSet {
        match self.kind {
            InstanceKind::Cluster => self.masters.iter().fold(SlotSet::all(), |left, master| left.minus(&master.slots)),
            InstanceKind::Standalone | InstanceKind::Sentinel => SlotSet::default(),
        }
    }
}

/// Where the masters of one instance can be asked for.
#[derive(Debug)]
pub struct Topology {
    target: Target,
    options: ConnOptions,
    follow: bool,
    /// Nodes or sentinels that can be asked; the first one is asked next.
    known: Mutex<Vec<NodeAddr>>,
    /// See [`View::unowned`]; of the last view.
    unowned: Mutex<SlotSet>,
}

impl Topology {
    /// `follow`: where a standalone server is a replica, use its master.
    pub fn new(target: Target, options: ConnOptions, follow: bool) -> Self {
        let known = match &target.place {
            Place::Standalone(addr) => vec![addr.clone()],
            Place::Cluster(seeds) => seeds.clone(),
            Place::Sentinel { sentinels, .. } => sentinels.clone(),
        };
        Self { target, options, follow, known: Mutex::new(known), unowned: Mutex::default() }
    }

    /// Where the instance is, as its URL says.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// How to connect to its nodes.
    pub fn options(&self) -> &ConnOptions {
        &self.options
    }

    /// Whether a standalone server that is a replica is followed to its master.
    pub fn follow(&self) -> bool {
        self.follow
    }

    /// The hash slots that no master owned when the masters were asked for last.
    pub fn unowned(&self) -> SlotSet {
        self.lock_unowned().clone()
    }

    /// Asks for the masters. `kind`: what the instance turned out to be earlier, if it is known.
    ///
    /// # Errors
    /// [`NodeError`] of the node that was asked; of several nodes [`NodeError::NoMaster`] with the error of each.
    pub async fn view(&self, kind: Option<InstanceKind>) -> Result<View, NodeError> {
        match (&self.target.place, kind) {
            (Place::Sentinel { master, .. }, _) => self.sentinel(master).await,
            (Place::Standalone(_), None | Some(InstanceKind::Standalone)) => self.standalone().await,
            (Place::Standalone(_) | Place::Cluster(_), _) => self.cluster().await,
        }
    }

    /// One server, or the cluster that it turns out to belong to.
    async fn standalone(&self) -> Result<View, NodeError> {
        let mut errors = Vec::new();
        for addr in self.turns() {
            match self.lead(addr).await {
                Ok(None) => return self.cluster().await,
                Ok(Some(master)) => {
                    if self.follow {
                        self.remember(vec![master.clone()]);
                    }
                    return Ok(View { kind: InstanceKind::Standalone, masters: vec![Master::at(master)] });
                }
                Err(error) => errors.push(error),
            }
        }
        Err(one_of(errors))
    }

    /// The server itself, or its master where replicas are followed; `None`: it is a node of a cluster.
    async fn lead(&self, mut addr: NodeAddr) -> Result<Option<NodeAddr>, NodeError> {
        for _ in 0..HOPS {
            let mut conn = Conn::open(&addr, &self.options).await?;
            let info = match commands::info(&mut conn).await {
                Ok(info) => info,
                // Whether it is a cluster stays unknown. Every caller that needs INFO meets the same refusal.
                Err(error) if error.is_no_permission() => return Ok(Some(addr)),
                Err(error) => return Err(error),
            };
            if info.mode() == Some("cluster") {
                return Ok(None);
            }
            match info.master_endpoint().filter(|_| self.follow && info.is_master() == Some(false)) {
                Some((host, port)) => addr = self.options.node_map.reach(NodeAddr::Tcp { host, port }),
                None => return Ok(Some(addr)),
            }
        }
        Err(NodeError::NoMaster {
            problem: format!("{HOPS} replicas in a row lead from {} to no master", self.target),
            hint: Some("see `replicaof` on each; do they replicate from each other?".to_owned()),
            class: Class::Fatal(FailureKind::NotAMaster),
        })
    }

    async fn sentinel(&self, master: &str) -> Result<View, NodeError> {
        let mut errors = Vec::new();
        for addr in self.turns() {
            match self.ask_sentinel(&addr, master).await {
                Ok(addr) => return Ok(View { kind: InstanceKind::Sentinel, masters: vec![Master::at(addr)] }),
                Err(error) => errors.push(error),
            }
        }
        Err(one_of(errors))
    }

    async fn cluster(&self) -> Result<View, NodeError> {
        let mut errors = Vec::new();
        let mut in_trouble = None;
        let turns = self.turns();
        let asked = turns.len();
        for addr in turns {
            match self.ask_node(&addr).await {
                Ok((masters, true)) => return self.cluster_view(masters),
                // Its view may be old, as in the smaller part of a partitioned cluster; or the whole cluster has failed.
                Ok((masters, false)) => in_trouble = in_trouble.or(Some(masters)),
                Err(error) => errors.push(error),
            }
        }
        match in_trouble {
            Some(masters) => self.cluster_view(masters),
            None => {
                self.pass_over(asked);
                Err(one_of(errors))
            }
        }
    }

    fn cluster_view(&self, masters: Vec<Master>) -> Result<View, NodeError> {
        if masters.is_empty() {
            return Err(NodeError::NoMaster {
                problem: format!("no node of the cluster {} owns a hash slot", self.target),
                hint: Some("give the nodes slots: `redis-cli --cluster create`, or `--cluster fix`".to_owned()),
                class: Class::Transient,
            });
        }
        let view = View { kind: InstanceKind::Cluster, masters };
        *self.lock_unowned() = view.unowned();
        Ok(view)
    }

    /// The masters, and whether the cluster is well, as one node sees both.
    async fn ask_node(&self, addr: &NodeAddr) -> Result<(Vec<Master>, bool), NodeError> {
        let mut conn = Conn::open(addr, &self.options).await?;
        let slots = redis::cmd("CLUSTER").arg("SLOTS").to_owned();
        let reply: Value = conn.call("CLUSTER SLOTS", &slots).await?;
        let wrong = |detail| NodeError::Protocol { addr: addr.clone(), command: "CLUSTER SLOTS", detail };
        let (masters, replicas) = read_slots(&reply, addr, &self.options.node_map).map_err(wrong)?;
        let info = redis::cmd("CLUSTER").arg("INFO").to_owned();
        let ok = match conn.call::<String>("CLUSTER INFO", &info).await {
            Ok(text) => !text.contains("cluster_state:fail"),
            // The right to it is optional: it only serves to prefer nodes that see the cluster well.
            Err(error) if error.is_no_permission() => true,
            Err(error) => return Err(error),
        };
        self.remember(masters.iter().map(|master| master.addr.clone()).chain(replicas).collect());
        Ok((masters, ok))
    }

    async fn ask_sentinel(&self, addr: &NodeAddr, master: &str) -> Result<NodeAddr, NodeError> {
        let mut options = self.options.clone();
        options.credentials = options.sentinel_credentials.clone();
        let mut conn = Conn::open(addr, &options).await.map_err(|error| sentinel_error(error, &options.credentials))?;
        let command = redis::cmd("SENTINEL").arg("GET-MASTER-ADDR-BY-NAME").arg(master).to_owned();
        let found: Option<(String, u16)> = match conn.call("SENTINEL GET-MASTER-ADDR-BY-NAME", &command).await {
            Err(error) if error.is_unknown_command() => {
                return Err(NodeError::NoMaster {
                    problem: format!("{addr} is no sentinel: it knows no command SENTINEL"),
                    hint: Some("a sentinel URL names sentinels (port 26379), not servers".to_owned()),
                    class: Class::Fatal(FailureKind::Unsupported),
                });
            }
            other => other?,
        };
        match found {
            Some((host, port)) => Ok(self.options.node_map.reach(NodeAddr::Tcp { host, port })),
            None => {
                let names = watched(&mut conn).await;
                Err(NodeError::NoMaster {
                    problem: format!("the sentinel {addr} watches no master named `{master}`"),
                    hint: names.map(|names| format!("it watches: {names}")),
                    class: Class::Fatal(FailureKind::Unsupported),
                })
            }
        }
    }

    /// The nodes to ask, one after the other until one answers. The next call begins with another one.
    fn turns(&self) -> Vec<NodeAddr> {
        let mut known = self.lock();
        let turns = known.iter().take(ASK_AT_MOST).cloned().collect();
        if !known.is_empty() {
            known.rotate_left(1);
        }
        turns
    }

    /// Makes the next call ask other nodes, since none of the `asked` ones answered.
    fn pass_over(&self, asked: usize) {
        let mut known = self.lock();
        // `turns` has moved one of them to the end already.
        let others = asked.saturating_sub(1);
        if others < known.len() {
            known.rotate_left(others);
        }
    }

    /// Keeps the nodes of a view and of the URL, in the order in which they are asked, and forgets the others.
    fn remember(&self, mut met: Vec<NodeAddr>) {
        met.extend(match &self.target.place {
            Place::Standalone(addr) => vec![addr.clone()],
            Place::Cluster(seeds) => seeds.clone(),
            Place::Sentinel { .. } => Vec::new(),
        });
        let mut known = self.lock();
        known.retain(|addr| met.contains(addr));
        for addr in met {
            if !known.contains(&addr) {
                known.push(addr);
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<NodeAddr>> {
        // A panic cannot leave a list of addresses half changed.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_unowned(&self) -> std::sync::MutexGuard<'_, SlotSet> {
        // A panic cannot leave a set of slots half changed.
        self.unowned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The error of a sentinel that refuses user or password: those of the URL are the master's, so the hint names the
/// sentinels' own.
fn sentinel_error(error: NodeError, credentials: &Credentials) -> NodeError {
    let class = error.class();
    if class != Class::Fatal(FailureKind::NotAuthenticated) {
        return error;
    }
    let hint = match credentials.password {
        None => {
            "the sentinel wants a password of its own: --sentinel-password-file (and --sentinel-user for an ACL user)"
        }
        Some(_) => "check --sentinel-user and --sentinel-password-file; a sentinel that has no password wants neither",
    };
    NodeError::NoMaster { problem: error.to_string(), hint: Some(hint.to_owned()), class }
}

/// The names of the masters that a sentinel watches; `None` where it does not tell.
async fn watched(conn: &mut Conn) -> Option<String> {
    let command = redis::cmd("SENTINEL").arg("MASTERS").to_owned();
    let masters: Vec<std::collections::HashMap<String, String>> = conn.call("SENTINEL MASTERS", &command).await.ok()?;
    let names: Vec<String> = masters.into_iter().filter_map(|mut fields| fields.remove("name")).take(20).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

/// The error to show where no node answered. An error that an operator has to mend goes before one that may pass.
fn one_of(mut errors: Vec<NodeError>) -> NodeError {
    if errors.len() == 1 {
        return errors.remove(0);
    }
    let lasting = errors.iter().position(|error| matches!(error.class(), Class::Fatal(_)));
    let said: Vec<String> = errors.iter().map(ToString::to_string).collect();
    let (class, hint) = match (lasting, errors.is_empty()) {
        (_, true) => (Class::Transient, None),
        (lasting, false) => {
            let first = errors.remove(lasting.unwrap_or(0));
            (first.class(), first.into_failure().hint)
        }
    };
    NodeError::NoMaster { problem: format!("no node could say who the masters are: {}", said.join("; ")), hint, class }
}

/// Reads the reply to CLUSTER SLOTS: masters by their lowest slot, and the addresses of all replicas.
///
/// Each range is `[start, end, master, replica...]`, each node `[endpoint, port, id, metadata...]`. An endpoint that is
/// null is the address that was asked; one that is empty or `?` is unknown, and the metadata may hold the IP.
fn read_slots(reply: &Value, asked: &NodeAddr, map: &NodeMap) -> Result<(Vec<Master>, Vec<NodeAddr>), String> {
    let mut masters: Vec<(Master, Vec<std::ops::RangeInclusive<u16>>)> = Vec::new();
    let mut replicas: Vec<NodeAddr> = Vec::new();
    for range in array(reply)? {
        let [start, end, owner, others @ ..] = array(range)? else {
            return Err("a range names no master".to_owned());
        };
        let slots = slot(start)?..=slot(end)?;
        if slots.is_empty() {
            return Err("a range ends before it begins".to_owned());
        }
        let (addr, id) = read_node(owner, asked, map)?;
        let mut ids = Vec::with_capacity(others.len());
        for other in others {
            let (addr, id) = read_node(other, asked, map)?;
            if !replicas.contains(&addr) {
                replicas.push(addr);
            }
            ids.push(id);
        }
        match masters.iter_mut().find(|(master, _)| master.node_id.as_ref() == Some(&id)) {
            Some((_, ranges)) => ranges.push(slots),
            None => {
                let master = Master { addr, node_id: Some(id), replicas: ids, slots: SlotSet::default() };
                masters.push((master, vec![slots]));
            }
        }
    }
    let mut masters: Vec<Master> =
        masters.into_iter().map(|(master, ranges)| Master { slots: SlotSet::new(ranges), ..master }).collect();
    masters.sort_by_key(|master| master.slots.first().map(|range| *range.start()));
    Ok((masters, replicas))
}

fn read_node(value: &Value, asked: &NodeAddr, map: &NodeMap) -> Result<(NodeAddr, String), String> {
    let [endpoint, Value::Int(port), id, metadata @ ..] = array(value)? else {
        return Err("a node has no endpoint, port and id".to_owned());
    };
    let port = u16::try_from(*port).map_err(|_| format!("{port} is no port"))?;
    let id = text(id)?.ok_or("a node has no id")?;
    let named = text(endpoint)?.filter(|name| !name.is_empty() && name != "?");
    let host = match named.or_else(|| ip_in(metadata)) {
        Some(host) => host,
        None => match asked {
            NodeAddr::Tcp { host, .. } => host.clone(),
            NodeAddr::Unix(_) => "127.0.0.1".to_owned(),
        },
    };
    Ok((map.reach(NodeAddr::Tcp { host, port }), id))
}

/// The value behind `ip` in a node's metadata, a flat list of names and values.
fn ip_in(metadata: &[Value]) -> Option<String> {
    let fields = array(metadata.first()?).ok()?;
    let place = fields.iter().position(|field| text(field).ok().flatten().as_deref() == Some("ip"))?;
    text(fields.get(place + 1)?).ok().flatten().filter(|ip| !ip.is_empty())
}

fn array(value: &Value) -> Result<&[Value], String> {
    match value {
        Value::Array(items) => Ok(items),
        _ => Err("a list is missing".to_owned()),
    }
}

fn text(value: &Value) -> Result<Option<String>, String> {
    match value {
        Value::Nil => Ok(None),
        Value::BulkString(bytes) => Ok(Some(String::from_utf8_lossy(bytes).into_owned())),
        Value::SimpleString(text) => Ok(Some(text.clone())),
        _ => Err("a text is missing".to_owned()),
    }
}

fn slot(value: &Value) -> Result<u16, String> {
    match value {
        Value::Int(number) => u16::try_from(*number).ok().filter(|&slot| slot < SLOTS),
        _ => None,
    }
    .ok_or_else(|| "a slot is no number below 16384".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    fn node(host: Value, port: i64, id: &str) -> Value {
        Value::Array(vec![host, Value::Int(port), bulk(id)])
    }

    fn range(start: i64, end: i64, nodes: Vec<Value>) -> Value {
        Value::Array([vec![Value::Int(start), Value::Int(end)], nodes].concat())
    }

    fn asked() -> NodeAddr {
        NodeAddr::Tcp { host: "seed".into(), port: 1 }
    }

    #[test]
    fn ranges_of_one_master_become_one_shard_and_replicas_are_remembered() {
        let reply = Value::Array(vec![
            range(5461, 10922, vec![node(bulk("10.0.0.2"), 6379, "b")]),
            range(0, 5459, vec![node(bulk("10.0.0.1"), 6379, "a"), node(bulk("10.0.0.4"), 6379, "r")]),
            range(10923, 16383, vec![node(bulk("10.0.0.1"), 6379, "a")]),
        ]);
        let map = NodeMap::parse("10.0.0.2=gateway").unwrap();
        let (masters, replicas) = read_slots(&reply, &asked(), &map).unwrap();
        let shown: Vec<_> = masters.iter().map(|m| format!("{} {}", m.addr, m.slots)).collect();
        assert_eq!(shown, ["10.0.0.1:6379 0-5459,10923-16383", "gateway:6379 5461-10922"]);
        assert_eq!(masters[0].replicas, ["r"]);
        assert_eq!(replicas[0].to_string(), "10.0.0.4:6379");
    }

    #[test]
    fn a_node_without_an_endpoint_is_reached_where_we_asked_or_at_its_ip() {
        let metadata = Value::Array(vec![bulk("ip"), bulk("10.9.9.9")]);
        let hidden = Value::Array(vec![bulk("?"), Value::Int(7), bulk("x"), metadata]);
        for (node, expected) in
            [(node(Value::Nil, 7, "x"), "seed:7"), (node(bulk(""), 7, "x"), "seed:7"), (hidden, "10.9.9.9:7")]
        {
            let reply = Value::Array(vec![range(0, 1, vec![node])]);
            let (masters, _) = read_slots(&reply, &asked(), &NodeMap::default()).unwrap();
            assert_eq!(masters[0].addr.to_string(), expected);
        }
    }

    #[test]
    fn what_is_no_slot_table_is_refused() {
        let one = || vec![node(bulk("h"), 7, "x")];
        for wrong in [
            Value::Int(5),
            Value::Array(vec![Value::Array(vec![Value::Int(0), Value::Int(1)])]),
            Value::Array(vec![range(0, 16_384, one())]),
            Value::Array(vec![range(-1, 3, one())]),
            Value::Array(vec![range(5, 3, one())]),
            Value::Array(vec![range(0, 3, vec![node(bulk("h"), 70_000, "x")])]),
            Value::Array(vec![range(0, 3, vec![node(bulk("h"), 7, "x"), Value::Nil])]),
        ] {
            assert!(read_slots(&wrong, &asked(), &NodeMap::default()).is_err(), "{wrong:?}");
        }
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Nil),
            (-2_i64..70_000).prop_map(Value::Int),
            proptest::collection::vec(any::<u8>(), 0..6).prop_map(Value::BulkString),
            Just(bulk("ip")),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| proptest::collection::vec(inner, 0..6).prop_map(Value::Array))
    }

    proptest! {
        #[test]
        fn no_reply_makes_the_reader_panic(reply in any_value()) {
            let _ = read_slots(&reply, &asked(), &NodeMap::default());
        }
    }
}
