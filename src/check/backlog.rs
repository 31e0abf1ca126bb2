//! The exact backlog of a master, counted on one of its replicas.
//!
//! A replica hides expired keys from SCAN and deletes none before its master tells it to, but DBSIZE still counts them. So DBSIZE
//! less the keys that one whole SCAN returned is the backlog, and that of the master too if the replica is in step with it. The
//! master is not asked for anything. Nothing is counted on a server that turns out to be no replica: there SCAN would free keys.

use std::collections::BTreeMap;

use crate::check::facts::{Facts, ServerRole};
use crate::model::shard::{DbIndex, NodeAddr, ScanPosition};
use crate::node::commands;
use crate::node::conn::{Conn, ConnOptions, CountedBy, Request};
use crate::node::error::NodeError;
use crate::node::info::Info;
use crate::settings::ScanSettings;

/// The count of one DB of the replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counted {
    /// DBSIZE after the count, expired keys included.
    pub keys: u64,
    /// Expired keys among `keys`, which the replica keeps until its master deletes them.
    pub expired: u64,
    /// By how many keys DBSIZE changed during the count: `expired` may be wrong by as much. 0: it is exact.
    pub moved: u64,
}

/// A count of expired keys on a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReplicaCount {
    /// Address of the replica on which the keys were counted.
    pub replica: NodeAddr,
    /// The DBs that a sweep would walk.
    pub dbs: BTreeMap<DbIndex, Counted>,
}

/// Why nothing could be counted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoCount {
    /// The server that is checked is no master itself.
    #[error("{0} is no master, so it has no replica to count on")]
    NotAMaster(NodeAddr),
    /// The server named as the replica is a master, or does not say what it is.
    #[error("{0} is no replica")]
    NotAReplica(NodeAddr),
    /// It is a replica of another master.
    #[error("{addr} is a replica of another master: {master}")]
    OtherMaster {
        addr: NodeAddr,
        /// Its master, as INFO names it.
        master: String,
    },
    /// Its link is down, or its first synchronisation is not complete.
    #[error("{addr} is not in step with its master: {why}")]
    OutOfStep {
        addr: NodeAddr,
        /// Says which of the two it is, for the message.
        why: String,
    },
    /// The connection was lost, or the replica refuses a command of the count.
    #[error(transparent)]
    Node(#[from] NodeError),
}

/// Counts the expired keys of `master` on the replica at `addr`.
///
/// # Errors
/// [`NoCount`]. Only INFO is sent to a server that is not a replica in step with this master.
pub(crate) async fn count(
    addr: &NodeAddr,
    options: &ConnOptions,
    master: &Facts,
    settings: &ScanSettings,
) -> Result<ReplicaCount, NoCount> {
    if master.role != ServerRole::Master {
        return Err(NoCount::NotAMaster(master.addr.clone()));
    }
    let mut conn = Conn::open(addr, options).await?;
    let info = commands::info(&mut conn).await?;
    in_step(addr, &info, master.replication_id.as_deref())?;
    let replica = Facts { dbs: info.keyspace(), ..master.clone() };
    let mut dbs = BTreeMap::new();
    for db in replica.swept(settings).into_keys() {
        conn.select(db).await?;
        let before = commands::dbsize(&mut conn).await?;
        let mut position = ScanPosition::NotStarted;
        let mut returned = 0;
        let mut after = before;
        while position != ScanPosition::Finished {
            let request =
                Request { from: position, count: settings.count, nameless: false, counted_by: CountedBy::Dbsize };
            let reply = conn.scan(request).await?;
            returned += reply.returned;
            after = reply.after.keys;
            position = reply.to;
        }
        let expired = after.saturating_sub(returned);
        dbs.insert(db, Counted { keys: after, expired, moved: before.abs_diff(after) });
    }
    // The replica may have been promoted or cut off during the count.
    in_step(addr, &commands::info(&mut conn).await?, master.replication_id.as_deref())?;
    Ok(ReplicaCount { replica: addr.clone(), dbs })
}

/// Checks that a server, by its INFO, is a replica that holds what the master of this replication history holds.
///
/// # Errors
/// Why it does not.
pub(crate) fn in_step(addr: &NodeAddr, info: &Info, history: Option<&str>) -> Result<(), NoCount> {
    let addr = addr.clone();
    if info.is_master() != Some(false) {
        return Err(NoCount::NotAReplica(addr));
    }
    // A replica that never had a link has a history of its own, so this comes before the comparison.
    if info.get("master_link_status") != Some("up") {
        return Err(NoCount::OutOfStep { addr, why: "the link is down".to_owned() });
    }
    if info.flag("master_sync_in_progress") == Some(true) {
        return Err(NoCount::OutOfStep { addr, why: "it is taking over the data".to_owned() });
    }
    if info.replication_id().is_none() || info.replication_id() != history {
        let name = info.master_addr().unwrap_or_else(|| "one that it does not name".to_owned());
        return Err(NoCount::OtherMaster { addr, master: name });
    }
    Ok(())
}
