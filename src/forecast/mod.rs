//! What will expire when: the TTLs of a random sample of the keys, read on a replica, with an error for every figure.
//!
//! [`sample`] looks at whole pieces of the hash tables, drawn at random; [`tally`] counts what the pieces held, and [`estimate`] makes
//! figures of the counts. [`bins`] cuts the time ahead and finds the peaks, and [`prefixes`] groups keys by the first parts of their
//! names. [`report`] is what people read. Called by `cli::forecast` and by the API.
//!
//! No value is read and nothing is written. The commands are INFO, DBSIZE, SELECT, SCAN and PTTL, on replicas of a
//! cluster READONLY, and where a cluster has a table for each slot CLUSTER COUNTKEYSINSLOT, which may be refused. On a replica nothing is freed; on a master SCAN frees the expired keys that it meets.

pub(crate) mod bins;
pub(crate) mod estimate;
pub(crate) mod outlook;
pub(crate) mod prefixes;
pub(crate) mod report;
pub(crate) mod sample;
pub(crate) mod tally;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::check::backlog::in_step;
use crate::engine::policy::profile::ServerProfile;
use crate::forecast::bins::{Bins, Peak};
use crate::forecast::estimate::Estimate;
use crate::forecast::outlook::Outlook;
use crate::forecast::prefixes::{By, PrefixGroup, PrefixGroups};
use crate::forecast::sample::{Pace, Tables, Walk, slot_sizes};
use crate::forecast::tally::Tally;
use crate::model::failure::{Failure, FailureKind};
use crate::model::shard::{DbIndex, NodeAddr};
use crate::node::commands;
use crate::node::conn::{Conn, ConnOptions};
use crate::node::error::NodeError;
use crate::node::info::Info;
use crate::node::topology::{InstanceKind, Master, View};

/// Keys of each DB of each master that are looked at where nobody says how many.
pub(crate) const SAMPLE_KEYS: u64 = 100_000;
/// How far the histogram looks ahead where nobody says.
pub(crate) const AHEAD: Duration = Duration::from_secs(24 * 3600);

/// Where the keys are looked at.
#[derive(Debug, Clone)]
pub(crate) enum ReadFrom {
    /// On a replica of each master, one that the master lists as online.
    AnyReplica,
    /// On this replica; only the instance's one master can have it.
    Replica(NodeAddr, Box<ConnOptions>),
    /// On the master itself, slowly.
    Master,
}

/// What a caller asks of a forecast.
#[derive(Debug, Clone)]
pub(crate) struct ForecastRequest {
    /// On which servers the keys are looked at.
    pub read_from: ReadFrom,
    /// Which DBs; empty: each that holds keys.
    pub dbs: Vec<DbIndex>,
    /// About how many keys of each DB of each master. One that holds less than twice as many is counted whole.
    pub sample: u64,
    /// How far the histogram looks ahead.
    pub ahead: Duration,
    /// In whose local time the histogram's parts are round.
    pub zone: TimeZone,
    /// Whether keys are grouped by the first parts of their names.
    pub by: Option<By>,
}

impl ForecastRequest {
    /// A forecast on any replica.
    pub(crate) fn new(read_from: ReadFrom, zone: TimeZone) -> Self {
        Self { read_from, dbs: Vec::new(), sample: SAMPLE_KEYS, ahead: AHEAD, zone, by: None }
    }
}

/// Where a master's keys were looked at.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Source {
    /// Address of the master whose keys these are.
    pub master: NodeAddr,
    /// Who was asked: a replica, or the master itself.
    pub addr: NodeAddr,
    /// Keys that were looked at.
    pub looked_at: u64,
    /// How long the walk over the sample took, connecting included.
    pub took: Duration,
    /// The user may not ask how many keys are in which hash slot: where few slots hold most keys, the errors are too small.
    pub slots_are_unknown: bool,
}

/// An estimate of which keys expire when, from a sample.
#[derive(Debug, Clone)]
pub(crate) struct Forecast {
    /// Where the instance is, without any secret.
    pub target: String,
    /// When it was looked at. Times ahead are counted from then.
    pub at: Timestamp,
    /// The same by the clock that nobody sets.
    pub begun: Instant,
    /// Which server was looked at for each master.
    pub sources: Vec<Source>,
    /// Each DB, over all masters.
    pub dbs: BTreeMap<DbIndex, Outlook>,
    /// The sum over all DBs.
    pub total: Outlook,
    /// How the time ahead is cut.
    pub bins: Bins,
    /// Spans in which far more keys expire than before and after, the largest first.
    pub peaks: Vec<Peak>,
    /// The groups of most keys, where they were asked for.
    pub groups: Option<Vec<PrefixGroup>>,
}

/// Looks at a sample of the keys of every master.
///
/// # Errors
/// Why one of them cannot be looked at: then there is no forecast.
pub(crate) async fn make(
    target: String,
    view: &View,
    options: &ConnOptions,
    request: &ForecastRequest,
) -> Result<Forecast, Failure> {
    if matches!(request.read_from, ReadFrom::Replica(..)) && view.masters.len() != 1 {
        let message = format!("the cluster has {} masters, each with replicas of its own", view.masters.len());
        return Err(
            Failure::new(FailureKind::NotAMaster, message).hint("leave --replica out: each master names its own")
        );
    }
    let at = Timestamp::now();
    let bins = Bins::new(at, request.ahead, &request.zone);
    let mut forecast = Forecast {
        target,
        at,
        begun: Instant::now(),
        sources: Vec::new(),
        dbs: BTreeMap::new(),
        total: Outlook::default(),
        bins,
        peaks: Vec::new(),
        groups: None,
    };
    let mut groups = request.by.clone().map(PrefixGroups::new);
    for master in &view.masters {
        let begun = Instant::now();
        let mut looker = Looker::open(view.kind, master, options, request).await?;
        let looked_at = looker.look(request, &mut forecast, groups.as_mut()).await?;
        forecast.sources.push(Source {
            master: master.addr.clone(),
            addr: looker.conn.addr().clone(),
            looked_at,
            took: begun.elapsed(),
            slots_are_unknown: looker.slots_are_unknown,
        });
    }
    for outlook in forecast.dbs.values() {
        forecast.total.add(outlook);
    }
    forecast.total.bins.resize(forecast.bins.number, Estimate::default());
    forecast.peaks = bins::peaks(&forecast.total.bins, forecast.total.with_ttl.keys);
    forecast.groups = groups.map(PrefixGroups::largest);
    Ok(forecast)
}

/// A connection to a server whose keys are looked at.
struct Looker {
    conn: Conn,
    info: Info,
    profile: ServerProfile,
    master: Master,
    /// The master's replication history, where a replica is asked: it must still be of it at the end.
    history: Option<Option<String>>,
    pace: Pace,
    /// Whether the server did not tell how many keys are in which slot.
    slots_are_unknown: bool,
}

impl Looker {
    async fn open(
        kind: InstanceKind,
        master: &Master,
        options: &ConnOptions,
        request: &ForecastRequest,
    ) -> Result<Self, Failure> {
        let failed = NodeError::into_failure;
        let mut conn = Conn::open(&master.addr, options).await.map_err(failed)?;
        let info = commands::info(&mut conn).await.map_err(failed)?;
        let profile = ServerProfile::of(&info);
        if !profile.ordered_cursors {
            let message = format!("{} may be a proxy: what its cursors stand for is not known", master.addr);
            return Err(not_here(message).hint("name the servers behind it"));
        }
        let history = info.replication_id().map(str::to_owned);
        let on_replica = async |addr: &NodeAddr, options: &ConnOptions| {
            let mut conn = Conn::open(addr, options).await.map_err(failed)?;
            let info = commands::info(&mut conn).await.map_err(failed)?;
            in_step(addr, &info, history.as_deref()).map_err(|error| not_here(error.to_string()))?;
            if kind == InstanceKind::Cluster {
                conn.call::<()>("READONLY", &redis::cmd("READONLY")).await.map_err(failed)?;
            }
            Ok::<_, Failure>((conn, info))
        };
        let (conn, info, history, pace) = match &request.read_from {
            ReadFrom::Master => (conn, info, None, Pace::MASTER),
            ReadFrom::Replica(addr, options) => {
                let (conn, info) = on_replica(addr, options).await?;
                (conn, info, Some(history.clone()), Pace::REPLICA)
            }
            ReadFrom::AnyReplica => {
                let mut lines = info.replicas();
                lines.retain(|line| line.state == "online");
                // The one that is furthest.
                lines.sort_by_key(|line| std::cmp::Reverse(line.offset));
                let mut why = "it lists no replica that is online".to_owned();
                let mut found = None;
                for line in lines {
                    let Some(addr) = tcp(&line.addr).map(|addr| options.node_map.reach(addr)) else {
                        continue;
                    };
                    match on_replica(&addr, options).await {
                        Ok(replica) => {
                            found = Some(replica);
                            break;
                        }
                        Err(failure) => why = failure.message,
                    }
                }
                let (conn, info) = found.ok_or_else(|| no_replica(&master.addr, &why))?;
                (conn, info, Some(history.clone()), Pace::REPLICA)
            }
        };
        Ok(Self { conn, info, profile, master: master.clone(), history, pace, slots_are_unknown: false })
    }

    /// Looks at each DB. Returns at how many keys.
    async fn look(
        &mut self,
        request: &ForecastRequest,
        forecast: &mut Forecast,
        mut groups: Option<&mut PrefixGroups>,
    ) -> Result<u64, Failure> {
        let keyspace = self.info.keyspace();
        let dbs: Vec<DbIndex> =
            if request.dbs.is_empty() { keyspace.keys().copied().collect() } else { request.dbs.clone() };
        let all_keys: u64 = keyspace.values().map(|size| size.keys).sum();
        let dataset = self.info.parsed::<f64>("used_memory_dataset");
        let bytes_per_key = dataset.map(|bytes| bytes / all_keys.max(1) as f64);
        let mut looked_at = 0;
        for db in dbs {
            let failed = NodeError::into_failure;
            self.conn.select(db).await.map_err(failed)?;
            let keys = commands::dbsize(&mut self.conn).await.map_err(failed)?;
            let tables = self.tables(keys).await.map_err(failed)?;
            let mut outlook = Outlook::default();
            for stratum in tables.draw(request.sample) {
                let mut tally = Tally::new(forecast.bins.clone());
                let part = stratum.part();
                let mut walk = Walk::new(&tables, stratum.drawn, self.pace, forecast.begun);
                while let Some(piece) = walk.next(&mut self.conn).await.map_err(failed)? {
                    if let Some(groups) = groups.as_deref_mut() {
                        groups.add(&piece);
                    }
                    tally.add(&piece);
                }
                if let Some(groups) = groups.as_deref_mut() {
                    groups.end_stratum(part);
                }
                outlook.add(&tally.outlook(part));
            }
            let size = keyspace.get(&db).copied().unwrap_or_default();
            let outlook = Outlook { keys, expires: size.expires, bytes_per_key, ..outlook };
            looked_at += outlook.looked_at;
            forecast.dbs.entry(db).or_default().add(&outlook);
        }
        self.still_in_step().await?;
        Ok(looked_at)
    }

    /// The hash tables of the selected DB. Where hash tags put most keys into few slots, those are cut into more pieces; without the
    /// right to ask which slots these are, all are cut alike, and a sample may miss a large slot without its error telling.
    async fn tables(&mut self, keys: u64) -> Result<Tables, NodeError> {
        if !self.profile.slot_tables {
            return Ok(Tables::one(keys));
        }
        let slots = &self.master.slots;
        if let Some(sizes) = slot_sizes(&mut self.conn, slots, self.pace).await? {
            return Ok(Tables::by_slot(keys, sizes));
        }
        self.slots_are_unknown = true;
        let each = keys / u64::from(slots.len().max(1));
        Ok(Tables::by_slot(keys, slots.ranges().cloned().flatten().map(|slot| (slot, each))))
    }

    /// It may have been promoted or cut off meanwhile.
    async fn still_in_step(&mut self) -> Result<(), Failure> {
        let Some(history) = self.history.clone() else { return Ok(()) };
        let info = commands::info(&mut self.conn).await.map_err(NodeError::into_failure)?;
        in_step(self.conn.addr(), &info, history.as_deref()).map_err(|error| not_here(error.to_string()))
    }
}

/// `host:port`, as a master lists its replicas.
fn tcp(text: &str) -> Option<NodeAddr> {
    let (host, port) = text.rsplit_once(':')?;
    Some(NodeAddr::Tcp { host: host.to_owned(), port: port.parse().ok()? })
}

fn not_here(message: String) -> Failure {
    Failure::new(FailureKind::Unsupported, message)
}

fn no_replica(master: &NodeAddr, why: &str) -> Failure {
    let message = format!("no replica of {master} can be looked at: {why}");
    not_here(message).hint(
        "name one with --replica URL, or look on the master itself with --on-master (slowly, and the expired keys that it meets are freed)",
    )
}
