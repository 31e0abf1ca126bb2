//! What `ttlsweep check --json` prints and the API's check of an instance answers. `null`: a right or a version hides it.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use crate::api::dto::{FailureDto, ServerDto, SettingsDto, seconds};
use crate::check::facts::{Facts, Right, ServerRole};
use crate::check::findings::Finding;
use crate::check::instance::{InstanceCheck, MasterCheck, ShardCheck};
use crate::check::verdict::{DbBacklog, Verdict};
use crate::settings::{ScanSettings, Settings};

/// Everything that was seen, and what it means.
#[derive(Debug, Serialize, ToSchema)]
pub struct CheckOutput {
    /// Where the instance is.
    pub target: String,
    /// What it is.
    pub server: Option<ServerDto>,
    /// `master`, `replica`, `sentinel` or `unknown`.
    pub role: &'static str,
    /// A replica's master as `host:port`.
    pub master: Option<String>,
    /// It is one node of a cluster.
    pub cluster: bool,
    /// How long the process runs, in seconds.
    pub uptime_s: Option<u64>,
    /// Each DB that holds keys.
    pub dbs: Vec<DbDto>,
    /// The DBs that would be swept, together.
    pub backlog: BacklogDto,
    /// How it frees expired keys by itself.
    pub expiry: ExpiryDto,
    /// Memory and eviction.
    pub memory: MemoryDto,
    /// Its replicas.
    pub replicas: Vec<ReplicaDto>,
    /// What it is busy with.
    pub busy: BusyDto,
    /// `yes`, `no`, `no such command` or `unknown` for each command that a sweep may send.
    pub rights: BTreeMap<&'static str, &'static str>,
    /// What a sweep would be.
    pub sweep: SweepDto,
    /// The worst first.
    pub findings: Vec<FindingDto>,
    /// The sentence at the end.
    pub verdict: String,
    /// The same for people, as `ttlsweep check` prints it. The API's answer has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<String>,
}

/// What was seen of an instance.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Checked {
    /// One server, or the master behind sentinels.
    One(Box<CheckOutput>),
    /// A cluster.
    Cluster(ClusterOutput),
}

/// What was seen of a cluster.
#[derive(Debug, Serialize, ToSchema)]
pub struct ClusterOutput {
    /// Where the instance is.
    pub target: String,
    /// Each master.
    pub shards: Vec<ShardOutput>,
    /// What was seen of the cluster itself.
    pub findings: Vec<FindingDto>,
    /// The verdict on all masters together.
    pub verdict: String,
    /// The same for people, as `ttlsweep check` prints it. The API's answer has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<String>,
}

/// One master of a cluster.
#[derive(Debug, Serialize, ToSchema)]
pub struct ShardOutput {
    /// Its slots.
    pub shard: String,
    /// What was seen of it.
    #[serde(flatten)]
    pub seen: ShardSeen,
}

/// What was seen of a master, or why nothing was.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum ShardSeen {
    /// All of it.
    Looked(Box<CheckOutput>),
    /// Nothing.
    Failed {
        /// Why.
        failure: FailureDto,
    },
}

impl Checked {
    /// Puts it together. `order`: the command that sweeps the instance.
    pub fn new(look: &InstanceCheck, settings: &Settings, order: &str) -> Self {
        let of = |target: String, seen: &MasterCheck| {
            Box::new(CheckOutput::new(target, &seen.facts, &seen.verdict, &settings.scan, seen.sentence.clone()))
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

    /// With what people read.
    pub fn with_report(mut self, text: String) -> Self {
        match &mut self {
            Self::One(output) => output.report = Some(text),
            Self::Cluster(output) => output.report = Some(text),
        }
        self
    }
}

/// One DB.
#[derive(Debug, Serialize, ToSchema)]
pub struct DbDto {
    /// Its number.
    pub db: u32,
    /// Its keys.
    #[serde(flatten)]
    pub backlog: BacklogDto,
}

/// Keys of one DB, or of several together.
#[derive(Debug, Serialize, ToSchema)]
pub struct BacklogDto {
    /// Keys, expired ones included.
    pub keys: u64,
    /// Keys with a TTL, expired ones included.
    pub expires: u64,
    /// Expired keys that are still in memory.
    pub expired: Option<u64>,
    /// `estimated` or `counted`.
    pub expired_is: Option<&'static str>,
    /// By how much a counted `expired` may be wrong, because the DB changed during the count.
    pub moved: u64,
    /// Bytes that the expired keys hold, always an estimate.
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

/// How the server frees expired keys by itself.
#[derive(Debug, Serialize, ToSchema)]
#[allow(missing_docs, reason = "the names are those of the server's configuration")]
pub struct ExpiryDto {
    pub lazyfree_lazy_expire: Option<bool>,
    pub active_expire_effort: Option<u32>,
    pub hz: Option<u32>,
    /// Share of the keys with a TTL that have expired, by its own sample, 0 to 1.
    pub stale_share: Option<f64>,
}

/// Memory in bytes, and eviction.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = CheckMemory)]
#[allow(missing_docs, reason = "the names are those of INFO")]
pub struct MemoryDto {
    pub used_memory: Option<u64>,
    pub used_memory_dataset: Option<u64>,
    pub maxmemory: Option<u64>,
    pub maxmemory_policy: Option<String>,
    pub evicted_keys: Option<u64>,
}

/// One replica.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReplicaDto {
    /// Its address.
    pub addr: String,
    /// `online` or a stage of the synchronisation.
    pub state: String,
    /// How many bytes it is behind.
    pub behind_bytes: Option<u64>,
    /// Seconds since it was last heard of.
    pub lag_s: Option<u64>,
}

/// What the server is busy with.
#[derive(Debug, Serialize, ToSchema)]
pub struct BusyDto {
    /// A child writes an RDB file.
    pub bgsave: Option<bool>,
    /// A child rewrites the AOF.
    pub aof_rewrite: Option<bool>,
    /// The data set is being loaded.
    pub loading: bool,
    /// A coordinated failover is under way.
    pub failover: bool,
    /// CLIENT PAUSE keeps writes back.
    pub writes_paused: bool,
}

/// What a sweep would be.
#[derive(Debug, Serialize, ToSchema)]
pub struct SweepDto {
    /// Whether it could run at all.
    pub can_run: bool,
    /// How long it would take at least, in seconds.
    pub least_s: Option<f64>,
    /// How long it would take at most, in seconds.
    pub most_s: Option<f64>,
    /// The round trip that this assumes, in microseconds.
    pub round_trip_us: u64,
    /// The settings that this assumes.
    pub settings: SettingsDto,
}

/// One finding.
#[derive(Debug, Serialize, ToSchema)]
pub struct FindingDto {
    /// `error` (a sweep cannot run), `warning` or `note`.
    pub severity: &'static str,
    /// A stable word.
    pub code: &'static str,
    /// What was seen and why it matters.
    pub message: String,
    /// What to do.
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
    /// Puts it together; `sentence` is the verdict in words.
    pub fn new(target: String, facts: &Facts, verdict: &Verdict, settings: &ScanSettings, sentence: String) -> Self {
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
            dbs: verdict.dbs.iter().map(|(db, look)| DbDto { db: db.0, backlog: look.into() }).collect(),
            backlog: (&verdict.swept).into(),
            expiry: ExpiryDto {
                lazyfree_lazy_expire: facts.expiry.lazyfree,
                active_expire_effort: facts.expiry.effort,
                hz: facts.expiry.hz,
                // INFO gives the per cent with two digits.
                stale_share: facts.expired_share.map(|share| (share * 1e4).round() / 1e4),
            },
            memory: MemoryDto {
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
                can_run: verdict.can_sweep(),
                least_s: verdict.sweep.map(|sweep| seconds(sweep.least)),
                most_s: verdict.sweep.map(|sweep| seconds(sweep.most)),
                round_trip_us: verdict.round_trip.as_micros() as u64,
                settings: settings.into(),
            },
            findings: verdict.findings.iter().map(FindingDto::from).collect(),
            verdict: sentence,
            report: None,
        }
    }
}
