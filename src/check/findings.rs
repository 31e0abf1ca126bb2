//! Everything that a check can find, one variant each. [`super::assessment`] decides which apply.
//!
//! A finding says what was seen, why it matters and what to do. Its numbers are fields. Its sentences are written only here, so that
//! text and JSON say the same.

use std::time::Duration;

use crate::check::facts::Right;
use crate::model::failure::Failure;
use crate::model::format::grouped;
use crate::model::shard::DbIndex;
use crate::model::slots::SlotSet;
use crate::model::words::words;
use crate::node::acl::{ACL_LINE, ACL_TOUCH};
use crate::node::error::NO_SUCH_COMMAND;
use crate::node::info::{OLDEST, ReplicaLine};
use crate::settings::show_duration;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Severity {
    /// A sweep cannot run here.
    Error,
    /// A sweep can run, but the operator should consider this first.
    Warning,
    /// Nothing has to be done first.
    Note,
}

words!(Severity, "severity", Error = "error", Warning = "warning", Note = "note");

/// Something that an operator should know before a sweep.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Finding {
    /// The server is a replica of this master, if INFO names one.
    Replica(Option<String>),
    /// The server is a sentinel and holds no keys.
    Sentinel,
    /// INFO was read and names no version.
    NoRedis,
    /// The version, as (major, minor), is older than [`OLDEST`].
    TooOld((u32, u32)),
    /// The user may not run commands that a sweep needs.
    MissingRights {
        /// The commands that a sweep with these settings needs and the user may not run.
        rights: Vec<Right>,
        /// The user, if the server names it.
        user: Option<String>,
    },
    /// The server has no commands by these names, and a sweep needs them.
    MissingCommands(Vec<Right>),
    /// No master of the cluster owns these hash slots.
    UnownedSlots(SlotSet),
    /// The backlog could not be counted on the replica, and why.
    NotCounted(String),
    /// The server is loading its data set.
    Loading,
    /// A coordinated failover is under way.
    Failover,
    /// CLIENT PAUSE keeps writes back.
    WritesPaused,
    /// A child process shares memory with the server.
    Fork {
        /// Whether the child writes an RDB file; otherwise it rewrites the AOF.
        bgsave: bool,
    },
    /// Values of expired keys are freed in the main thread.
    FreesInTheForeground,
    /// A replica is behind by this many bytes, silent, or still synchronising.
    ReplicaBehind(ReplicaLine, Option<u64>),
    /// Live keys are evicted while expired ones hold memory.
    Evicting {
        /// Keys evicted since the server was started.
        evicted: u64,
        /// `maxmemory_policy`; `None` where INFO lacks it.
        policy: Option<String>,
    },
    /// The sweep would be too slow for the rate at which keys expire.
    TooSlow {
        /// The failure that the sweep would report.
        harm: Failure,
        /// Whether the sweep would be refused; otherwise `allow-slow` lets it run.
        refused: bool,
    },
    /// The sweep may take longer than its timeout.
    LongerThanTimeout {
        /// The longest time that it may take.
        most: Duration,
        /// The setting `timeout`, which `most` exceeds.
        timeout: Duration,
    },
    /// The settings name DBs that hold no key with a TTL.
    NothingIn(Vec<DbIndex>),
    /// `touch` is `auto`, and EXISTS cannot be sent.
    NoAudit {
        /// Whether the server has no such command; otherwise the user may not run it.
        no_such_command: bool,
        /// The user, if the server names it.
        user: Option<String>,
    },
    /// The backlog is an estimate that may be far too low.
    EstimateMayBeLow,
    /// Active expiry runs at less than the highest effort.
    LowEffort {
        /// `active-expire-effort`, from 1 to 10.
        effort: u32,
        /// What the two cures cost; `None`: the backlog is unknown, or effort 10 would leave as much.
        cures: Option<Cures>,
    },
}

/// Server time of two ways to free the backlog.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Cures {
    /// Active expiry at effort 10, until it stops.
    pub effort: Duration,
    /// Server time of a sweep at the mean cost of a key.
    pub sweep: Duration,
}

impl Cures {
    /// Whether raising the effort costs less than half of a sweep. Half, since it leaves keys behind and holds the server for longer
    /// at a time.
    pub(crate) fn effort_is_cheaper(&self) -> bool {
        self.effort * 2 < self.sweep
    }
}

/// Rounds an estimate up to about two digits.
fn rounded(time: Duration) -> Duration {
    let us = time.as_micros() as u64;
    let unit = 10_u64.pow(us.checked_ilog10().unwrap_or(0).saturating_sub(1));
    Duration::from_micros(us.div_ceil(unit) * unit)
}

impl Finding {
    /// A stable name for programs.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::Replica(_) => "replica",
            Self::Sentinel => "sentinel",
            Self::NoRedis => "no_redis",
            Self::TooOld(_) => "too_old",
            Self::MissingRights { .. } => "missing_rights",
            Self::MissingCommands(_) => "missing_commands",
            Self::UnownedSlots(_) => "unowned_slots",
            Self::NotCounted(_) => "not_counted",
            Self::Loading => "loading",
            Self::Failover => "failover",
            Self::WritesPaused => "writes_paused",
            Self::Fork { .. } => "fork",
            Self::FreesInTheForeground => "frees_in_the_foreground",
            Self::ReplicaBehind(..) => "replica_behind",
            Self::Evicting { .. } => "evicting",
            Self::TooSlow { .. } => "too_slow",
            Self::LongerThanTimeout { .. } => "longer_than_timeout",
            Self::NothingIn(_) => "nothing_in_db",
            Self::NoAudit { .. } => "no_audit",
            Self::EstimateMayBeLow => "estimate_may_be_low",
            Self::LowEffort { .. } => "low_effort",
        }
    }

    /// How bad the finding is.
    pub(crate) fn severity(&self) -> Severity {
        match self {
            Self::Replica(_)
            | Self::Sentinel
            | Self::NoRedis
            | Self::TooOld(_)
            | Self::MissingRights { .. }
            | Self::MissingCommands(_)
            | Self::TooSlow { refused: true, .. } => Severity::Error,
            Self::UnownedSlots(_)
            | Self::NotCounted(_)
            | Self::Loading
            | Self::Failover
            | Self::WritesPaused
            | Self::Fork { .. }
            | Self::FreesInTheForeground
            | Self::ReplicaBehind(..)
            | Self::Evicting { .. }
            | Self::TooSlow { .. }
            | Self::LongerThanTimeout { .. } => Severity::Warning,
            Self::NothingIn(_) | Self::NoAudit { .. } | Self::EstimateMayBeLow | Self::LowEffort { .. } => {
                Severity::Note
            }
        }
    }

    /// What was seen and why it matters.
    pub(crate) fn message(&self) -> String {
        match self {
            Self::Replica(master) => {
                let of = master.as_deref().map_or_else(String::new, |master| format!(" of {master}"));
                format!("this is a replica{of}: it hides expired keys and frees none until its master does")
            }
            Self::Sentinel => "this is a sentinel: it holds no keys".to_owned(),
            Self::NoRedis => "INFO names no redis_version: this is no Redis or Valkey".to_owned(),
            Self::TooOld((major, minor)) => {
                format!("Redis {major}.{minor} cannot be swept; {}.{} is the oldest", OLDEST.0, OLDEST.1)
            }
            Self::MissingRights { rights, .. } => {
                format!("this user may not run {}, which a sweep sends", list(rights.iter().map(|r| r.as_str())))
            }
            Self::MissingCommands(rights) => {
                format!("the server knows no {} by this name, which a sweep sends", list(rights.iter().map(|r| r.as_str())))
            }
            Self::UnownedSlots(slots) => {
                format!("no master owns the slots {slots}: a sweep skips them, and clients are refused their keys")
            }
            Self::NotCounted(why) => format!("the backlog was not counted: {why}"),
            Self::Loading => "the server is loading its data set; a sweep would hold until that is done".to_owned(),
            Self::Failover => "a failover is under way; deletions are blocked and a sweep would hold".to_owned(),
            Self::WritesPaused => {
                "CLIENT PAUSE keeps writes back; expired keys are hidden and not freed, and a sweep would hold".to_owned()
            }
            Self::Fork { bgsave } => {
                let what = if *bgsave { "writes a snapshot (RDB)" } else { "rewrites the AOF" };
                format!(
                    "a child process {what}; while it runs, each page that a deletion changes is copied, so a sweep \
                     makes memory grow before it shrinks"
                )
            }
            Self::FreesInTheForeground => {
                "lazyfree-lazy-expire is `no`: the value of an expired key is freed inside the SCAN that meets it, and a \
                 huge list, set, hash or sorted set holds the server for as long as that takes"
                    .to_owned()
            }
            Self::ReplicaBehind(replica, behind) => {
                let behind = behind.map_or_else(|| "an unknown number of".to_owned(), |bytes| bytes.to_string());
                let silent = replica.lag_s.map_or_else(String::new, |s| format!(", last heard of {s} s ago"));
                format!(
                    "replica {} is {}, {behind} bytes behind{silent}; each key that a sweep frees sends it one more DEL",
                    replica.addr, replica.state
                )
            }
            Self::Evicting { evicted, policy } => {
                let policy = policy.as_deref().unwrap_or("unknown");
                format!(
                    "{} keys were evicted since the start (policy {policy}): while expired keys hold memory, others make room",
                    grouped(*evicted)
                )
            }
            Self::TooSlow { harm, .. } => harm.message.clone(),
            Self::LongerThanTimeout { most, timeout } => format!(
                "the sweep may take {} and is allowed {}; what it freed until then stays freed",
                show_duration(Duration::from_secs(most.as_secs())),
                show_duration(*timeout)
            ),
            Self::NothingIn(dbs) => {
                let names = list(dbs.iter().map(ToString::to_string));
                format!("{names} {} no key with a TTL: there is nothing to free", if dbs.len() == 1 { "holds" } else { "hold" })
            }
            Self::NoAudit { no_such_command, .. } => {
                let why = if *no_such_command { "the server knows no EXISTS by this name" } else { "this user may not run EXISTS" };
                format!(
                    "{why}: `touch auto` cannot audit whether SCAN frees what it meets (Redis and Valkey do; some proxies and \
                     other engines do not)"
                )
            }
            Self::EstimateMayBeLow => {
                "the backlog is estimated from the server's own sample, which can be far too low: from Redis 7.2 on it is \
                 taken where active expiry just was, and it needs some seconds to follow a wave of expiries"
                    .to_owned()
            }
            Self::LowEffort { effort, cures } => {
                let cost = cures.map_or_else(String::new, |Cures { effort, sweep }| {
                    format!(
                        "; that would take about {} of server time here, a sweep {}",
                        show_duration(rounded(effort)),
                        show_duration(rounded(sweep))
                    )
                });
                format!(
                    "active-expire-effort is {effort}: active expiry stops trying at about 10 % of leftovers (at 10 it \
                     goes on to about 1 %{cost})"
                )
            }
        }
    }

    /// What the operator can do.
    pub(crate) fn advice(&self) -> String {
        match self {
            Self::Replica(Some(master)) => format!("check its master: ttlsweep check redis://{master}"),
            Self::Replica(None) => "check its master".to_owned(),
            Self::Sentinel => "give the URL of the master that it watches".to_owned(),
            Self::NoRedis => "check the port".to_owned(),
            Self::TooOld(_) => "upgrade the server".to_owned(),
            Self::MissingRights { rights, user } => format!("grant it: {}", grant(user.as_deref(), rights)),
            Self::MissingCommands(_) => NO_SUCH_COMMAND.to_owned(),
            Self::UnownedSlots(_) => "see `redis-cli --cluster check`; `--cluster fix` gives them to a master".to_owned(),
            Self::NotCounted(_) => "give --replica the URL of a replica of this master that is in step".to_owned(),
            Self::Loading => "wait until it is done".to_owned(),
            Self::Failover => "wait for its end, then check the new master".to_owned(),
            Self::WritesPaused => "wait for its end, or CLIENT UNPAUSE".to_owned(),
            Self::Fork { .. } => "wait until it has ended".to_owned(),
            Self::FreesInTheForeground => {
                "CONFIG SET lazyfree-lazy-expire yes, at least for the time of the sweep".to_owned()
            }
            Self::ReplicaBehind(..) => {
                "wait until it has caught up; --max-replica-lag holds a sweep by itself".to_owned()
            }
            Self::Evicting { .. } => "sweep before the peak hours, and regularly".to_owned(),
            Self::TooSlow { harm, .. } => harm.hint.clone().unwrap_or_default(),
            Self::LongerThanTimeout { .. } => {
                "allow more with --timeout, or keep a checkpoint with --state and go on with --resume".to_owned()
            }
            Self::NothingIn(_) => "leave --db out to sweep each DB that holds keys with a TTL".to_owned(),
            Self::NoAudit { no_such_command: true, .. } => {
                format!("on Redis and Valkey nothing needs to be done; else {NO_SUCH_COMMAND}")
            }
            Self::NoAudit { user, .. } => format!(
                "on Redis and Valkey nothing needs to be done; behind a proxy or on another engine grant it: {}",
                grant(user.as_deref(), &[Right::Exists, Right::Ttl])
            ),
            Self::EstimateMayBeLow => {
                "count exactly on a replica, at no cost to this server: ttlsweep check with --replica redis://HOST:PORT".to_owned()
            }
            Self::LowEffort { cures: Some(cures), .. } if cures.effort_is_cheaper() => {
                "a higher effort is the cheaper cure here: ttlsweep scan --assist-expiry 1min --state FILE frees most of them that \
                 way before it sweeps (its cycles can hold the server for 43 % of 1/hz)"
                    .to_owned()
            }
            Self::LowEffort { cures: Some(_), .. } => "a sweep is the better cure here, and leaves nothing".to_owned(),
            Self::LowEffort { .. } => {
                "where few of many keys have a TTL, --assist-expiry may be the cheaper cure; its cycles can hold the \
                 server for 43 % of 1/hz"
                    .to_owned()
            }
        }
    }
}

/// The ACL command that gives these rights to the connection's user, or creates a user for ttlsweep if the server names none.
fn grant(user: Option<&str>, rights: &[Right]) -> String {
    let touches = rights.iter().any(|right| matches!(right, Right::Exists | Right::Ttl));
    match user {
        Some(user) => {
            let rules: Vec<_> =
                touches.then(|| "'~*'".to_owned()).into_iter().chain(rights.iter().map(|r| r.rule())).collect();
            format!("ACL SETUSER {user} {}", rules.join(" "))
        }
        None => {
            let sweeps = rights.iter().any(|right| !matches!(right, Right::Exists | Right::Ttl));
            let lines = [sweeps.then_some(ACL_LINE), touches.then_some(ACL_TOUCH)];
            lines.into_iter().flatten().collect::<Vec<_>>().join("; ")
        }
    }
}

fn list(words: impl IntoIterator<Item = impl ToString>) -> String {
    words.into_iter().map(|word| word.to_string()).collect::<Vec<_>>().join(", ")
}
