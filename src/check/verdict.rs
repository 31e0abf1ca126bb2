//! What the facts mean for a sweep. Pure: facts in, findings and figures out.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::check::backlog::{Backlog, NoCount};
use crate::check::estimate::{self, Span};
use crate::check::facts::{Facts, Right, Role, sum};
use crate::check::findings::{Finding, Severity};
use crate::engine::policy::{expiry_guard, profile};
use crate::model::shard::DbIndex;
use crate::model::words::words;
use crate::node::commands::Access;
use crate::node::info::{DbKeys, OLDEST};
use crate::settings::{ScanSettings, Touch};

/// A replica that is further behind in bytes, or has been silent for more seconds, is worth a word.
const BEHIND: (u64, u32) = (8 << 20, 10);

/// What a look found.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// The worst first.
    pub findings: Vec<Finding>,
    /// Each DB that holds keys, and those that were named.
    pub dbs: BTreeMap<DbIndex, DbLook>,
    /// The DBs that would be swept, together.
    pub swept: DbLook,
    /// How long a sweep would take; `None` where INFO does not tell the sizes.
    pub sweep: Option<Span>,
    /// The round trip that the time assumes.
    pub round_trip: Duration,
}

/// What is known of one DB, or of several together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DbLook {
    /// Keys and keys with a TTL, as the server counts them.
    pub size: DbKeys,
    /// Expired keys that are still in memory.
    pub expired: Option<Expired>,
    /// Bytes that they hold, always an estimate: [`Facts::bytes_of`].
    pub bytes: Option<u64>,
}

/// A number of expired keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expired {
    /// So many.
    pub keys: u64,
    /// How that is known.
    pub known: Known,
    /// It may be wrong by as much, because the DB changed during the count; 0 for an estimate.
    pub moved: u64,
}

/// How well a number of keys is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// By the sample of active expiry.
    Estimated,
    /// Counted on a replica.
    Counted,
}

words!(Known, "way of knowing", Estimated = "estimated", Counted = "counted");

impl Verdict {
    /// Whether a sweep could run at all.
    pub fn can_sweep(&self) -> bool {
        !self.has(Severity::Error)
    }

    /// Whether there is a finding of this severity.
    pub fn has(&self, severity: Severity) -> bool {
        self.findings.iter().any(|finding| finding.severity() == severity)
    }
}

/// Judges the facts, with what a replica told where one was asked.
pub fn judge(facts: &Facts, counted: Option<&Result<Backlog, NoCount>>, settings: &ScanSettings) -> Verdict {
    let backlog = counted.and_then(|counted| counted.as_ref().ok());
    let chosen = facts.swept(settings);
    let sizes = facts.dbs.iter().chain(&chosen).map(|(db, size)| (*db, *size));
    let dbs: BTreeMap<DbIndex, DbLook> = sizes.map(|(db, size)| (db, look_of(facts, backlog, db, size))).collect();
    let swept = total(facts, dbs.iter().filter(|(db, _)| chosen.contains_key(db)).map(|(_, look)| look));
    let stale = swept.expired.map_or(0, |expired| expired.keys.min(swept.size.keys));
    let round_trip = facts.round_trip.unwrap_or_default();
    // A server that does not tell its version has not answered INFO: its sizes are unknown, not zero.
    let sweep =
        facts.server.is_some().then(|| estimate::sweep_time(swept.size.keys - stale, stale, settings, round_trip));
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
    Verdict { findings, dbs, swept, sweep, round_trip }
}

fn look_of(facts: &Facts, backlog: Option<&Backlog>, db: DbIndex, size: DbKeys) -> DbLook {
    let estimate = || facts.stale_keys(size).map(|keys| Expired { keys, known: Known::Estimated, moved: 0 });
    let expired = match backlog.and_then(|backlog| backlog.dbs.get(&db)) {
        Some(counted) => Some(Expired { keys: counted.expired, known: Known::Counted, moved: counted.moved }),
        None if size.expires == 0 => Some(Expired { keys: 0, known: Known::Counted, moved: 0 }),
        None => estimate(),
    };
    DbLook { size, expired, bytes: expired.and_then(|expired| facts.bytes_of(expired.keys)) }
}

/// Several DBs together: one estimate among them makes the sum an estimate, and one unknown makes it unknown.
fn total<'a>(facts: &Facts, looks: impl Iterator<Item = &'a DbLook>) -> DbLook {
    let none = Expired { keys: 0, known: Known::Counted, moved: 0 };
    let (size, expired) = looks.fold((DbKeys::default(), Some(none)), |(size, expired), look| {
        let both = expired.zip(look.expired).map(|(one, other)| Expired {
            keys: one.keys + other.keys,
            known: if one.known == Known::Counted { other.known } else { one.known },
            moved: one.moved + other.moved,
        });
        (sum([&size, &look.size]), both)
    });
    // Without INFO nothing is known, and nothing is not zero.
    let expired = expired.filter(|_| facts.server.is_some());
    DbLook { size, expired, bytes: expired.and_then(|expired| facts.bytes_of(expired.keys)) }
}

fn blockers(facts: &Facts, settings: &ScanSettings, findings: &mut Vec<Finding>) {
    match &facts.role {
        Role::Replica { master } => findings.push(Finding::Replica(master.clone())),
        Role::Sentinel => findings.push(Finding::Sentinel),
        Role::Master | Role::Unknown => {}
    }
    match facts.redis_version {
        Some(version) if version < OLDEST => findings.push(Finding::TooOld(version)),
        None if facts.rights.get(Right::Info) == Access::Allowed => findings.push(Finding::NoRedis),
        _ => {}
    }
    // A sentinel knows no keyspace command at all; that it is one says enough.
    if facts.role == Role::Sentinel {
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

fn notes(facts: &Facts, settings: &ScanSettings, swept: DbLook, findings: &mut Vec<Finding>) {
    let empty: Vec<DbIndex> = facts.swept(settings).iter().filter(|(_, k)| k.expires == 0).map(|(db, _)| *db).collect();
    if !empty.is_empty() && facts.server.is_some() {
        findings.push(Finding::NothingIn(empty));
    }
    let exists = facts.rights.get(Right::Exists);
    if settings.touch == Touch::Auto && matches!(exists, Access::Denied | Access::NoSuchCommand) {
        let no_such_command = exists == Access::NoSuchCommand;
        findings.push(Finding::NoAudit { no_such_command, user: facts.user.clone() });
    }
    if swept.expired.is_some_and(|expired| expired.known == Known::Estimated) && facts.role == Role::Master {
        findings.push(Finding::EstimateMayBeLow);
    }
    if let (Some(effort @ 1..10), Some(Expired { keys: 1.., .. })) = (facts.expiry.effort, swept.expired) {
        let cures = swept.expired.and_then(|expired| estimate::cures(swept.size, expired.keys));
        findings.push(Finding::LowEffort { effort, cures });
    }
}
