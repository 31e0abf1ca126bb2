//! The exact backlog of a master, counted on one of its replicas.
//!
//! A replica hides expired keys from SCAN and deletes none before its master tells it to, and DBSIZE still counts them.
//! So DBSIZE less the keys that one whole SCAN returned is the backlog: that of the master too where the replica is in
//! step with it. The master is not asked for anything. On a server that turned out to be no replica nothing is counted:
//! there SCAN would free keys.

use std::collections::BTreeMap;

use crate::check::facts::{Facts, Role};
use crate::model::shard::{DbIndex, NodeAddr, ScanPosition};
use crate::node::commands;
use crate::node::conn::{Conn, ConnOptions, Gauge, Request};
use crate::node::error::NodeError;
use crate::node::info::Info;
use crate::settings::ScanSettings;

/// What one DB of the replica holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counted {
    /// DBSIZE after the count, expired keys included.
    pub keys: u64,
    /// Expired keys among them.
    pub expired: u64,
    /// By how much DBSIZE moved during the count: `expired` may be wrong by as much. 0: it is exact.
    pub moved: u64,
}

/// What the replica told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backlog {
    /// Where it was counted.
    pub replica: NodeAddr,
    /// Each DB that holds keys with a TTL.
    pub dbs: BTreeMap<DbIndex, Counted>,
}

impl Backlog {
    /// All DBs together.
    pub fn total(&self) -> Counted {
        self.dbs.values().fold(Counted { keys: 0, expired: 0, moved: 0 }, |sum, db| Counted {
            keys: sum.keys + db.keys,
            expired: sum.expired + db.expired,
            moved: sum.moved + db.moved,
        })
    }
}

/// Why nothing could be counted.
#[derive(Debug, thiserror::Error)]
pub enum NoCount {
    /// The server that was looked at is no master itself.
    #[error("{0} is no master, so it has no replica to count on")]
    NotAMaster(NodeAddr),
    /// It is a master, or does not say what it is.
    #[error("{0} is no replica")]
    NotAReplica(NodeAddr),
    /// It replicates something else.
    #[error("{addr} is a replica of another master: {master}")]
    OtherMaster {
        /// The replica.
        addr: NodeAddr,
        /// Its master as it names it.
        master: String,
    },
    /// Its link is down, or it still takes over the data.
    #[error("{addr} is not in step with its master: {why}")]
    OutOfStep {
        /// The replica.
        addr: NodeAddr,
        /// In which way.
        why: String,
    },
    /// It was lost, or it does not allow the count.
    #[error(transparent)]
    Node(#[from] NodeError),
}

/// Counts the expired keys of `master` on the replica at `addr`.
///
/// # Errors
/// [`NoCount`]. Nothing but INFO was sent to a server that is no replica in step with this master.
pub async fn count(
    addr: &NodeAddr,
    options: &ConnOptions,
    master: &Facts,
    settings: &ScanSettings,
) -> Result<Backlog, NoCount> {
    if master.role != Role::Master {
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
            let request = Request { from: position, count: settings.count, nameless: false, gauge: Gauge::Dbsize };
            let reply = conn.scan(request).await?;
            returned += reply.returned;
            after = reply.after.keys;
            position = reply.to;
        }
        let expired = after.saturating_sub(returned);
        dbs.insert(db, Counted { keys: after, expired, moved: before.abs_diff(after) });
    }
    // It may have been promoted or cut off while we counted.
    in_step(addr, &commands::info(&mut conn).await?, master.replication_id.as_deref())?;
    Ok(Backlog { replica: addr.clone(), dbs })
}

/// Whether a server, by its INFO, is a replica that holds what the master of this replication history holds.
///
/// # Errors
/// Why not.
pub fn in_step(addr: &NodeAddr, info: &Info, history: Option<&str>) -> Result<(), NoCount> {
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
