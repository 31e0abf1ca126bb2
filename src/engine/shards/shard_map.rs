//! Which master belongs to which shard, even after some of them have moved.
//!
//! A shard keeps its name for the whole task while its master fails over, its slots migrate and nodes join and leave. The shard map
//! remembers the nodes and slots that each shard had, and finds the shard again in each new view of the cluster. [`assign`] is pure,
//! and its tests show its whole behaviour.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::model::shard::ShardId;
use crate::model::slots::SlotSet;
use crate::model::target::Place;
use crate::node::error::{Class, NodeError};
use crate::node::topology::{InstanceKind, Master, Topology, View};

/// Pause before the nodes are asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// What the map remembers of one shard.
#[derive(Debug, Clone, Default, PartialEq)]
struct KnownShard {
    /// The id of the node that was its master in the last view.
    master: Option<String>,
    /// The ids of all nodes that were its master or a replica of it.
    nodes: BTreeSet<String>,
    /// The slots that its master owned in the last view.
    slots: SlotSet,
}

impl KnownShard {
    fn update(&mut self, master: &Master) {
        self.master.clone_from(&master.node_id);
        self.nodes.extend(master.node_id.clone());
        self.nodes.extend(master.replicas.iter().cloned());
        self.slots = master.slots.clone();
    }
}

/// Which master holds a shard at present.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::engine) enum Location {
    /// This master owns the shard's slots.
    At(Master),
    /// Nowhere: other shards own all of its slots.
    Dissolved,
}

/// The shards of a task.
#[derive(Debug, Clone)]
pub(in crate::engine) struct ShardMap {
    topology: Arc<Topology>,
    kind: InstanceKind,
    known: Arc<Mutex<BTreeMap<ShardId, KnownShard>>>,
}

impl ShardMap {
    /// Finds the masters for the first time, and names the shards. Tries for `patience` if no node is reachable, and without limit
    /// while a node is loading or busy.
    ///
    /// # Errors
    /// [`NodeError`]: nothing can be swept.
    pub(in crate::engine) async fn begin(
        topology: Arc<Topology>,
        patience: Duration,
    ) -> Result<(Self, Vec<(ShardId, Master)>), NodeError> {
        let (begun, mut warned_of) = (Instant::now(), String::new());
        let view = loop {
            let (error, is_there) = match topology.view(None).await {
                Ok(view) => break view,
                Err(error) if matches!(error.class(), Class::Loading | Class::Busy) => (error, true),
                Err(error) if error.class() == Class::Transient && begun.elapsed() < patience => (error, false),
                Err(error) => return Err(error),
            };
            match (&error, &topology.target().place) {
                // A standalone server needs no topology: its shard waits until it answers, and reports a hold.
                (NodeError::Server { command, .. }, Place::Standalone(addr))
                    if is_there && !command.starts_with("CLUSTER") =>
                {
                    let master =
                        Master { addr: addr.clone(), node_id: None, replicas: Vec::new(), slots: SlotSet::default() };
                    break View { kind: InstanceKind::Standalone, masters: vec![master] };
                }
                _ if warned_of == error.to_string() => {}
                _ => {
                    tracing::warn!(%error, "waiting for a node that can name the masters");
                    warned_of = error.to_string();
                }
            }
            tokio::time::sleep(ASK_AGAIN).await;
        };
        let mut known = BTreeMap::new();
        let mut shards = Vec::new();
        for master in view.masters {
            let id = name(topology.target(), &master, &known);
            known.entry(id.clone()).or_insert_with(KnownShard::default).update(&master);
            shards.push((id, master));
        }
        Ok((Self { topology, kind: view.kind, known: Arc::new(Mutex::new(known)) }, shards))
    }

    /// Whether the instance is a server alone, a cluster, or behind sentinels.
    pub(in crate::engine) fn kind(&self) -> InstanceKind {
        self.kind
    }

    /// Finds the instance's masters and connects to them.
    pub(in crate::engine) fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Whether the topology can name another master when one is gone or demoted.
    pub(in crate::engine) fn follows(&self) -> bool {
        self.kind != InstanceKind::Standalone || self.topology.follow()
    }

    /// Finds one shard's master. This is `last`, without a request, if there is no topology to follow.
    ///
    /// # Errors
    /// [`NodeError`]: no node could name the master.
    pub(in crate::engine) async fn find(&self, id: &ShardId, last: &Master) -> Result<Location, NodeError> {
        if !self.follows() {
            return Ok(Location::At(last.clone()));
        }
        let view = self.topology.view(Some(self.kind)).await?;
        let mut known = self.lock();
        let (owners, _) = assign(self.kind, &known, &view);
        if let Some(master) = owners.get(id) {
            if let Some(shard) = known.get_mut(id) {
                shard.update(master);
            }
            return Ok(Location::At(master.clone()));
        }
        let slots = known.get(id).map(|shard| shard.slots.clone()).unwrap_or_default();
        let orphaned = view.masters.iter().fold(slots.clone(), |left, master| left.minus(&master.slots));
        if orphaned.is_empty() {
            return Ok(Location::Dissolved);
        }
        Err(NodeError::NoMaster {
            problem: format!("no node owns the slots {orphaned} of the shard `{id}`"),
            hint: Some("see `redis-cli --cluster check`".to_owned()),
            class: Class::Transient,
        })
    }

    /// Finds every shard's master, new shards included.
    ///
    /// # Errors
    /// [`NodeError`]: no node could name the masters.
    pub(in crate::engine) async fn read_again(&self) -> Result<Vec<(ShardId, Master)>, NodeError> {
        let view = self.topology.view(Some(self.kind)).await?;
        let mut known = self.lock();
        let (owners, strangers) = assign(self.kind, &known, &view);
        let mut all: Vec<(ShardId, Master)> = owners.into_iter().collect();
        for master in strangers {
            all.push((name(self.topology.target(), &master, &known), master));
        }
        for (id, master) in &all {
            known.entry(id.clone()).or_default().update(master);
        }
        Ok(all)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<ShardId, KnownShard>> {
        // A panic inside `update` could leave a shard half updated; the next view corrects it.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Names a new shard; a number tells it from a shard that has the name already.
fn name(target: &crate::model::target::Target, master: &Master, taken: &BTreeMap<ShardId, KnownShard>) -> ShardId {
    let base = match &target.place {
        _ if !master.slots.is_empty() => format!("slots {}", master.slots.name()),
        Place::Sentinel { master, .. } => master.clone(),
        // The address in the URL, even if `follow` led to another.
        Place::Standalone(addr) => addr.to_string(),
        Place::Cluster(_) => master.addr.to_string(),
    };
    let mut id = ShardId(base.clone());
    let mut number = 1;
    while taken.contains_key(&id) {
        number += 1;
        id = ShardId(format!("{base} ({number})"));
    }
    id
}

/// Finds the shards in a view. Returns the master of each shard that has one, and the masters that belong to no shard.
///
/// The node that was a shard's master stays its master while it owns slots. If it owns none, one of the remaining masters takes its
/// place: one that was its replica, or else the one that owns most of its slots. For a promotion changes the node and keeps the slots,
/// and a node that is replaced hands all its slots to another.
fn assign(
    kind: InstanceKind,
    known: &BTreeMap<ShardId, KnownShard>,
    view: &View,
) -> (BTreeMap<ShardId, Master>, Vec<Master>) {
    if kind != InstanceKind::Cluster {
        let owners = known.keys().cloned().zip(view.masters.iter().cloned()).collect();
        return (owners, Vec::new());
    }
    let mut owners = BTreeMap::new();
    let mut free: Vec<&Master> = view.masters.iter().filter(|master| !master.slots.is_empty()).collect();
    for (id, shard) in known {
        let same = free.iter().position(|master| master.node_id.is_some() && master.node_id == shard.master);
        if let Some(place) = same {
            owners.insert(id.clone(), free.remove(place).clone());
        }
    }
    let mut pairs: Vec<(bool, u32, &ShardId, &Master)> = Vec::new();
    for (id, shard) in known.iter().filter(|(id, _)| !owners.contains_key(*id)) {
        for &master in &free {
            let overlap = master.slots.overlap(&shard.slots);
            if overlap > 0 {
                let promoted = master.node_id.as_ref().is_some_and(|node| shard.nodes.contains(node));
                pairs.push((promoted, overlap, id, master));
            }
        }
    }
    pairs.sort_by_key(|&(promoted, overlap, ..)| std::cmp::Reverse((promoted, overlap)));
    for (_, _, id, master) in pairs {
        if !owners.contains_key(id)
            && let Some(place) = free.iter().position(|&other| std::ptr::eq(other, master))
        {
            owners.insert(id.clone(), free.remove(place).clone());
        }
    }
    (owners, free.into_iter().cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::shard::NodeAddr;

    fn master(node: &str, replicas: &[&str], slots: &[std::ops::RangeInclusive<u16>]) -> Master {
        Master {
            addr: NodeAddr::Tcp { host: node.to_owned(), port: 1 },
            node_id: Some(node.to_owned()),
            replicas: replicas.iter().map(|id| (*id).to_owned()).collect(),
            slots: SlotSet::new(slots.iter().cloned()),
        }
    }

    fn known(masters: &[Master]) -> BTreeMap<ShardId, KnownShard> {
        let mut known = BTreeMap::new();
        for (master, name) in masters.iter().zip(["A", "B", "C"]) {
            known.entry(ShardId(name.to_owned())).or_insert_with(KnownShard::default).update(master);
        }
        known
    }

    /// Begins with a (0-99, replica ra) and b (100-199, replica rb), and checks which node is whose master in the next view.
    #[track_caller]
    fn check(view: &[Master], expected: &str) {
        let before = known(&[master("a", &["ra"], &[0..=99]), master("b", &["rb"], &[100..=199])]);
        let view = View { kind: InstanceKind::Cluster, masters: view.to_vec() };
        let (owners, strangers) = assign(InstanceKind::Cluster, &before, &view);
        let mut shown: Vec<String> =
            owners.iter().map(|(id, master)| format!("{id}={}", master.node_id.as_ref().unwrap())).collect();
        shown.extend(strangers.iter().map(|master| format!("new={}", master.node_id.as_ref().unwrap())));
        assert_eq!(shown.join(" "), expected);
    }

    #[test]
    fn nothing_moved() {
        check(&[master("a", &[], &[0..=99]), master("b", &[], &[100..=199])], "A=a B=b");
    }

    #[test]
    fn a_promoted_replica_is_the_shards_master() {
        check(&[master("ra", &["a"], &[0..=99]), master("b", &[], &[100..=199])], "A=ra B=b");
    }

    #[test]
    fn slots_that_migrate_leave_each_shard_its_master() {
        check(&[master("a", &[], &[0..=9]), master("b", &[], &[10..=199])], "A=a B=b");
    }

    #[test]
    fn a_node_that_joins_is_a_new_shard() {
        check(
            &[master("a", &[], &[0..=49]), master("b", &[], &[100..=199]), master("n", &[], &[50..=99])],
            "A=a B=b new=n",
        );
    }

    #[test]
    fn a_node_that_takes_all_slots_of_another_takes_its_shard() {
        check(&[master("n", &[], &[0..=99]), master("b", &[], &[100..=199])], "A=n B=b");
    }

    #[test]
    fn a_shard_whose_slots_went_to_another_is_dissolved() {
        check(&[master("b", &[], &[0..=199])], "B=b");
    }

    #[test]
    fn both_masters_failed_over_and_slots_migrated_between() {
        check(&[master("rb", &[], &[60..=199]), master("ra", &[], &[0..=59])], "A=ra B=rb");
    }

    #[test]
    fn a_shards_name_is_its_slots_and_never_taken_twice() {
        let target = crate::model::target::Target::standalone(NodeAddr::Tcp { host: "seed".into(), port: 1 });
        let one = master("a", &[], &[0..=99]);
        let mut taken = BTreeMap::new();
        assert_eq!(name(&target, &one, &taken).0, "slots 0-99");
        taken.insert(ShardId("slots 0-99".into()), KnownShard::default());
        assert_eq!(name(&target, &one, &taken).0, "slots 0-99 (2)");
    }
}
