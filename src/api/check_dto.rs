//! JSON types of a check, for `ttlsweep check --json` and the API. A value is `null` if a missing right or the server's version hides it.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use crate::api::dto::{FailureDto, ServerDto, SettingsDto, seconds};
use crate::check::assessment::{Assessment, DbBacklog};
use crate::check::facts::{Facts, Right, ServerRole};
use crate::check::findings::Finding;
use crate::check::instance::{InstanceCheck, MasterCheck, ShardCheck};
use crate::settings::{ScanSettings, Settings};

/// What was found about one server, and what it means for a sweep.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CheckOutput {
    /// URL of the instance, without credentials.
    pub target: String,
    /// Product and version of the server.
    pub server: Option<ServerDto>,
    /// `master`, `replica`, `sentinel` or `unknown`.
    pub role: &'static str,
    /// Of a replica: its master as `host:port`.
    pub master: Option<String>,
    /// Whether the server is a node of a cluster.
    pub cluster: bool,
    /// Seconds since the process started.
    pub uptime_s: Option<u64>,
    /// The DBs that hold keys.
    pub dbs: Vec<DbDto>,
    /// Sums over the DBs that would be swept.
    pub backlog: BacklogDto,
    /// Settings and state of the server's own expiry.
    pub expiry: ExpiryDto,
    /// Memory of the server, and its eviction.
    pub memory: CheckMemoryDto,
    /// The replicas that the master lists.
    pub replicas: Vec<ReplicaDto>,
    /// What could hold a sweep now.
    pub busy: BusyDto,
    /// `yes`, `no`, `no such command` or `unknown` for each command that a sweep may send.
    pub rights: BTreeMap<&'static str, &'static str>,
    /// Whether a sweep could run, and how long it would take.
    pub sweep: SweepDto,
    /// The findings, the most severe first.
    pub findings: Vec<FindingDto>,
    /// The verdict in one sentence.
    pub verdict: String,
    /// The report for people, as `ttlsweep check` prints it. Only the API has this field.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<String>,
}

/// The result of a check of an instance.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Checked {
    /// One server, or the master behind sentinels.
    One(Box<CheckOutput>),
    /// A cluster, with the result of each master.
    Cluster(ClusterOutput),
}

/// The result of a check of a cluster.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ClusterOutput {
    /// URL of the instance, without credentials.
    pub target: String,
    /// The masters, in the order of their slots.
    pub shards: Vec<ShardOutput>,
    /// Findings about the cluster itself.
    pub findings: Vec<FindingDto>,
    /// The verdict on all masters together, in one sentence.
    pub verdict: String,
    /// The report for people, as `ttlsweep check` prints it. Only the API has this field.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<String>,
}

/// One master of a cluster.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ShardOutput {
    /// Name of the shard: its ranges of slots.
    pub shard: String,
    /// The result of its check, or why there is none.
    #[serde(flatten)]
    pub seen: ShardSeen,
}

/// The result of a check of one master, or why there is none.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum ShardSeen {
    /// The result of the check.
    Looked(Box<CheckOutput>),
    /// The master could not be inspected.
    Failed {
        /// Why it could not be inspected.
        failure: FailureDto,
    },
}

impl Checked {
    /// Converts the result of a check. `order` is the command that would sweep the instance, for the verdict.
    pub(crate) fn new(look: &InstanceCheck, settings: &Settings, order: &str) -> Self {
        let of = |target: String, seen: &MasterCheck| {
            Box::new(CheckOutput::new(target, &seen.facts, &seen.assessment, &settings.scan, seen.sentence.clone()))
        };
        let target = settings.target.to_string();
        let (looks, findings) = match look {
            InstanceCheck::One(seen) => return Self::One(of(target, seen)),
            InstanceCheck::Cluster { shards, findings } => (shards, findings),
        };
        let shards = looks.iter().map(|ShardCheck { shard, seen }| {
            let seen = match seen {
                Ok(seen) => ShardSeen::Looked(of(seen.facts.addr.to_string(), seen)),
                Err(failure) => ShardSeen::Failed { failure: failure.into() },
            };
            ShardOutput { shard: shard.clone(), seen }
        });
        let (shards, findings) = (shards.collect(), findings.iter().map(FindingDto::from).collect());
        Self::Cluster(ClusterOutput { target, shards, findings, verdict: look.verdict(order), report: None })
    }

    /// Adds the report for people.
    pub(crate) fn with_report(mut self, text: String) -> Self {
        match &mut self {
            Self::One(output) => output.report = Some(text),
            Self::Cluster(output) => output.report = Some(text),
        }
        self
    }
}

/// A DB with its keys.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DbDto {
    /// Number of the DB, from 0.
    pub db: u32,
    /// How many keys the DB holds, and how many have expired.
    #[serde(flatten)]
    pub backlog: BacklogDto,
}

/// Numbers of keys of one DB, or sums over several.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct BacklogDto {
    /// All keys, expired ones included.
    pub keys: u64,
    /// Keys with a TTL, expired ones included.
    pub expires: u64,
    /// Expired keys that are still in memory.
    pub expired: Option<u64>,
    /// `estimated` or `counted`: how `expired` was found out.
    pub expired_is: Option<&'static str>,
    /// By how much a counted `expired` may be wrong, because the DB changed during the count.
    pub moved: u64,
    /// Bytes of memory that the expired keys take; always an estimate.
    pub expired_bytes: Option<u64>,
}

impl From<&DbBacklog> for BacklogDto {
    fn from(look: &DbBacklog) -> Self {
        Self {
            keys: look.size.keys,
            expires: look.size.expires,
            expired: look.expired.map(|expired| expired.keys),
            expired_is: look.expired.map(|expired| expired.basis.as_str()),
            moved: look.expired.map_or(0, |expired| expired.moved),
            expired_bytes: look.bytes,
        }
    }
}

/// Settings and state of the server's own expiry.
#[derive(Debug, Serialize, ToSchema)]
#[allow(missing_docs, reason = "the names are those of the server's configuration")]
pub(crate) struct ExpiryDto {
    pub lazyfree_lazy_expire: Option<bool>,
    pub active_expire_effort: Option<u32>,
    pub hz: Option<u32>,
    /// Share of the keys with a TTL that have expired, 0 to 1, by the server's own sample (`expired_stale_perc`).
    pub stale_share: Option<f64>,
}

/// Memory in bytes, and eviction.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = CheckMemory)]
#[allow(missing_docs, reason = "the names are those of INFO")]
pub(crate) struct CheckMemoryDto {
    pub used_memory: Option<u64>,
    pub used_memory_dataset: Option<u64>,
    pub maxmemory: Option<u64>,
    pub maxmemory_policy: Option<String>,
    pub evicted_keys: Option<u64>,
}

/// A replica of the server.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ReplicaDto {
    /// Address of the replica, as the master lists it.
    pub addr: String,
    /// `online`, or the stage of its synchronisation.
    pub state: String,
    /// Bytes of the replication stream that it has not acknowledged.
    pub behind_bytes: Option<u64>,
    /// Seconds since it last reported.
    pub lag_s: Option<u64>,
}

/// What could hold a sweep now.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct BusyDto {
    /// Whether a child process writes an RDB file.
    pub bgsave: Option<bool>,
    /// Whether a child process rewrites the AOF.
    pub aof_rewrite: Option<bool>,
    /// Whether the data set is being loaded.
    pub loading: bool,
    /// Whether a coordinated failover is under way.
    pub failover: bool,
    /// Whether CLIENT PAUSE stops writes.
    pub writes_paused: bool,
}

/// The forecast of a sweep.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SweepDto {
    /// Whether a sweep could run.
    pub can_run: bool,
    /// Shortest time that it would take, in seconds.
    pub least_s: Option<f64>,
    /// Longest time that it would take, in seconds.
    pub most_s: Option<f64>,
    /// Measured round trip that these times assume, in microseconds.
    pub round_trip_us: u64,
    /// Settings that these times assume.
    pub settings: SettingsDto,
}

/// A finding of a check.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct FindingDto {
    /// `error` (a sweep cannot run), `warning` or `note`.
    pub severity: &'static str,
    /// Name of the kind of finding; it does not change between versions.
    pub code: &'static str,
    /// What was found, and why it matters.
    pub message: String,
    /// What to do about it.
    pub advice: String,
}

impl From<&Finding> for FindingDto {
    fn from(finding: &Finding) -> Self {
        Self {
            severity: finding.severity().as_str(),
            code: finding.code(),
            message: finding.message(),
            advice: finding.advice(),
        }
    }
}

impl CheckOutput {
    /// Converts the result of a check of one server; `sentence` is the verdict.
    pub(crate) fn new(
        target: String,
        facts: &Facts,
        assessment: &Assessment,
        settings: &ScanSettings,
        sentence: String,
    ) -> Self {
        let (role, master) = match &facts.role {
            ServerRole::Master => ("master", None),
            ServerRole::Replica { master } => ("replica", master.clone()),
            ServerRole::Sentinel => ("sentinel", None),
            ServerRole::Unknown => ("unknown", None),
        };
        let memory = &facts.memory;
        Self {
            target,
            server: facts.server.as_ref().map(ServerDto::from),
            role,
            master,
            cluster: facts.cluster,
            uptime_s: facts.uptime.map(|uptime| uptime.as_secs()),
            dbs: assessment.dbs.iter().map(|(db, look)| DbDto { db: db.0, backlog: look.into() }).collect(),
            backlog: (&assessment.swept).into(),
            expiry: ExpiryDto {
                lazyfree_lazy_expire: facts.expiry.lazyfree,
                active_expire_effort: facts.expiry.effort,
                hz: facts.expiry.hz,
                // INFO gives per cent with two decimals: more digits here would be noise of the conversion.
                stale_share: facts.expired_share.map(|share| (share * 1e4).round() / 1e4),
            },
            memory: CheckMemoryDto {
                used_memory: memory.used,
                used_memory_dataset: memory.dataset,
                maxmemory: memory.max,
                maxmemory_policy: memory.policy.clone(),
                evicted_keys: memory.evicted,
            },
            replicas: facts
                .replicas
                .iter()
                .map(|replica| ReplicaDto {
                    addr: replica.addr.clone(),
                    state: replica.state.clone(),
                    behind_bytes: facts.behind(replica),
                    lag_s: replica.lag_s.map(u64::from),
                })
                .collect(),
            busy: BusyDto {
                bgsave: facts.busy.bgsave,
                aof_rewrite: facts.busy.aof_rewrite,
                loading: facts.busy.loading,
                failover: facts.busy.failover,
                writes_paused: facts.busy.writes_paused,
            },
            rights: Right::ALL.iter().map(|&right| (right.as_str(), facts.rights.get(right).as_str())).collect(),
            sweep: SweepDto {
                can_run: assessment.can_sweep(),
                least_s: assessment.sweep.map(|sweep| seconds(sweep.least)),
                most_s: assessment.sweep.map(|sweep| seconds(sweep.most)),
                round_trip_us: assessment.round_trip.as_micros() as u64,
                settings: settings.into(),
            },
            findings: assessment.findings.iter().map(FindingDto::from).collect(),
            verdict: sentence,
            report: None,
        }
    }
}
