//! What the facts mean for a sweep. Pure: facts in, findings and numbers out.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::check::backlog::{NoCount, ReplicaCount};
use crate::check::estimate::{self, Span};
use crate::check::facts::{Facts, Right, ServerRole, sum};
use crate::check::findings::{Finding, Severity};
use crate::engine::policy::{expiry_guard, profile};
use crate::model::shard::DbIndex;
use crate::model::words::words;
use crate::node::commands::Access;
use crate::node::info::{DbKeys, OLDEST};
use crate::settings::{ScanSettings, Touch};

/// A replica that is more bytes behind, or has been silent for more seconds, is a finding.
const BEHIND: (u64, u32) = (8 << 20, 10);

/// What a check of one server found.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Assessment {
    /// The findings, the worst first.
    pub findings: Vec<Finding>,
    /// Each DB that holds keys or that the settings name.
    pub dbs: BTreeMap<DbIndex, DbBacklog>,
    /// The DBs that would be swept, together.
    pub swept: DbBacklog,
    /// How long a sweep would take; `None`: INFO does not tell the sizes.
    pub sweep: Option<Span>,
    /// The round trip that `sweep` assumes.
    pub round_trip: Duration,
}

/// The backlog of one DB, or of several together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct DbBacklog {
    /// Keys, and keys with a TTL, as the server counts them.
    pub size: DbKeys,
    /// Expired keys that are still in memory.
    pub expired: Option<Expired>,
    /// Bytes that the expired keys hold, always an estimate: [`Facts::bytes_of`].
    pub bytes: Option<u64>,
}

/// A number of expired keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Expired {
    /// Counted or estimated, as `basis` says.
    pub keys: u64,
    /// Where the number comes from.
    pub basis: Basis,
    /// By how much the number may be wrong, because the DB changed during the count; 0 for an estimate.
    pub moved: u64,
}

/// Where a number of expired keys comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Basis {
    /// The server's own sample, taken by active expiry.
    Estimated,
    /// A count on a replica.
    Counted,
}

words!(Basis, "way of knowing", Estimated = "estimated", Counted = "counted");

impl Assessment {
    /// Whether a sweep could run at all.
    pub(crate) fn can_sweep(&self) -> bool {
        !self.has(Severity::Error)
    }

    /// Whether there is a finding of this severity.
    pub(crate) fn has(&self, severity: Severity) -> bool {
        self.findings.iter().any(|finding| finding.severity() == severity)
    }
}

/// Assesses the facts. `counted`: the count on a replica, if one was asked for.
pub(crate) fn assess(
    facts: &Facts,
    counted: Option<&Result<ReplicaCount, NoCount>>,
    settings: &ScanSettings,
) -> Assessment {
    let backlog = counted.and_then(|counted| counted.as_ref().ok());
    let chosen = facts.swept(settings);
    let sizes = facts.dbs.iter().chain(&chosen).map(|(db, size)| (*db, *size));
    let dbs: BTreeMap<DbIndex, DbBacklog> =
        sizes.map(|(db, size)| (db, backlog_of(facts, backlog, db, size))).collect();
    let swept = total(facts, dbs.iter().filter(|(db, _)| chosen.contains_key(db)).map(|(_, db)| db));
    let expired = swept.expired.map_or(0, |expired| expired.keys.min(swept.size.keys));
    let round_trip = facts.round_trip.unwrap_or_default();
    // A server that does not tell its version has not answered INFO: its sizes are unknown, not zero.
    let sweep =
        facts.server.is_some().then(|| estimate::sweep_time(swept.size.keys - expired, expired, settings, round_trip));
    let mut findings = Vec::new();
    blockers(facts, settings, &mut findings);
    if let Some(Err(error)) = counted {
        findings.push(Finding::NotCounted(error.to_string()));
    }
    state(facts, &mut findings);
    if let Some(evicted) = facts.memory.evicted.filter(|&evicted| evicted > 0 && swept.size.expires > 0) {
        findings.push(Finding::Evicting { evicted, policy: facts.memory.policy.clone() });
    }
    if let Some(sweep) = sweep {
        pace(facts, settings, sweep, &mut findings);
    }
    notes(facts, settings, swept, &mut findings);
    findings.sort_by_key(Finding::severity);
    Assessment { findings, dbs, swept, sweep, round_trip }
}

fn backlog_of(facts: &Facts, backlog: Option<&ReplicaCount>, db: DbIndex, size: DbKeys) -> DbBacklog {
    let estimate = || facts.expired_keys(size).map(|keys| Expired { keys, basis: Basis::Estimated, moved: 0 });
    let expired = match backlog.and_then(|backlog| backlog.dbs.get(&db)) {
        Some(counted) => Some(Expired { keys: counted.expired, basis: Basis::Counted, moved: counted.moved }),
        None if size.expires == 0 => Some(Expired { keys: 0, basis: Basis::Counted, moved: 0 }),
        None => estimate(),
    };
    DbBacklog { size, expired, bytes: expired.and_then(|expired| facts.bytes_of(expired.keys)) }
}

/// The sum of several DBs. One estimate makes the sum an estimate, and one unknown makes it unknown.
fn total<'a>(facts: &Facts, dbs: impl Iterator<Item = &'a DbBacklog>) -> DbBacklog {
    let none = Expired { keys: 0, basis: Basis::Counted, moved: 0 };
    let (size, expired) = dbs.fold((DbKeys::default(), Some(none)), |(size, expired), db| {
        let both = expired.zip(db.expired).map(|(one, other)| Expired {
            keys: one.keys + other.keys,
            basis: if one.basis == Basis::Counted { other.basis } else { one.basis },
            moved: one.moved + other.moved,
        });
        (sum([&size, &db.size]), both)
    });
    // Without INFO the backlog is unknown, not zero.
    let expired = expired.filter(|_| facts.server.is_some());
    DbBacklog { size, expired, bytes: expired.and_then(|expired| facts.bytes_of(expired.keys)) }
}

fn blockers(facts: &Facts, settings: &ScanSettings, findings: &mut Vec<Finding>) {
    match &facts.role {
        ServerRole::Replica { master } => findings.push(Finding::Replica(master.clone())),
        ServerRole::Sentinel => findings.push(Finding::Sentinel),
        ServerRole::Master | ServerRole::Unknown => {}
    }
    match facts.redis_version {
        Some(version) if version < OLDEST => findings.push(Finding::TooOld(version)),
        None if facts.rights.get(Right::Info) == Access::Allowed => findings.push(Finding::NoRedis),
        _ => {}
    }
    // A sentinel has no keyspace command at all: `Finding::Sentinel` says enough.
    if facts.role == ServerRole::Sentinel {
        return;
    }
    let needed = |access| {
        let rights = Right::ALL.iter().copied();
        rights.filter(|right| right.is_needed(settings) && facts.rights.get(*right) == access).collect::<Vec<_>>()
    };
    let (denied, absent) = (needed(Access::Denied), needed(Access::NoSuchCommand));
    if !denied.is_empty() {
        findings.push(Finding::MissingRights { rights: denied, user: facts.user.clone() });
    }
    if !absent.is_empty() {
        findings.push(Finding::MissingCommands(absent));
    }
}

fn state(facts: &Facts, findings: &mut Vec<Finding>) {
    let busy = facts.busy;
    findings.extend(busy.loading.then_some(Finding::Loading));
    findings.extend(busy.failover.then_some(Finding::Failover));
    findings.extend(busy.writes_paused.then_some(Finding::WritesPaused));
    findings.extend((busy.bgsave == Some(true)).then_some(Finding::Fork { bgsave: true }));
    findings.extend((busy.aof_rewrite == Some(true)).then_some(Finding::Fork { bgsave: false }));
    findings.extend((facts.expiry.lazyfree == Some(false)).then_some(Finding::FreesInTheForeground));
    for replica in &facts.replicas {
        let behind = facts.behind(replica);
        let late = behind.is_some_and(|bytes| bytes > BEHIND.0) || replica.lag_s.is_some_and(|s| s > BEHIND.1);
        if replica.state != "online" || late {
            findings.push(Finding::ReplicaBehind(replica.clone(), behind));
        }
    }
}

fn pace(facts: &Facts, settings: &ScanSettings, sweep: Span, findings: &mut Vec<Finding>) {
    if sweep.most > settings.timeout {
        findings.push(Finding::LongerThanTimeout { most: sweep.most, timeout: settings.timeout });
    }
    let starves = profile::slow_scan_starves_expiry(facts.redis_version);
    if let Some(flow) = facts.expire_per_sec
        && let Some(harm) = expiry_guard::harm(starves, facts.longest_pass(settings), flow, settings)
    {
        findings.push(Finding::TooSlow { harm, refused: !settings.allow_slow });
    }
}

fn notes(facts: &Facts, settings: &ScanSettings, swept: DbBacklog, findings: &mut Vec<Finding>) {
    let empty: Vec<DbIndex> = facts.swept(settings).iter().filter(|(_, k)| k.expires == 0).map(|(db, _)| *db).collect();
    if !empty.is_empty() && facts.server.is_some() {
        findings.push(Finding::NothingIn(empty));
    }
    let exists = facts.rights.get(Right::Exists);
    if settings.touch == Touch::Auto && matches!(exists, Access::Denied | Access::NoSuchCommand) {
        let no_such_command = exists == Access::NoSuchCommand;
        findings.push(Finding::NoAudit { no_such_command, user: facts.user.clone() });
    }
    if swept.expired.is_some_and(|expired| expired.basis == Basis::Estimated) && facts.role == ServerRole::Master {
        findings.push(Finding::EstimateMayBeLow);
    }
    if let (Some(effort @ 1..10), Some(Expired { keys: 1.., .. })) = (facts.expiry.effort, swept.expired) {
        let cures = swept.expired.and_then(|expired| estimate::cures(swept.size, expired.keys));
        findings.push(Finding::LowEffort { effort, cures });
    }
}
