//! The check of an instance: of its one master, or of each master of a cluster, with one verdict for all.

use std::fmt::Write as _;

use futures_util::future::join_all;

use crate::check;
use crate::check::assessment::{self, Assessment};
use crate::check::facts::Facts;
use crate::check::findings::Finding;
use crate::check::report::{finding_text, sentence, text};
use crate::model::failure::Failure;
use crate::model::format::{counted, failure_text, grouped};
use crate::node::conn::ConnOptions;
use crate::node::topology::{InstanceKind, Master, View};
use crate::settings::ScanSettings;

/// The check of one master.
#[derive(Debug)]
pub(crate) struct MasterCheck {
    /// What was read of the master.
    pub facts: Facts,
    /// What the facts mean for a sweep.
    pub assessment: Assessment,
    /// The verdict as a sentence.
    pub sentence: String,
}

/// The check of one shard of a cluster.
#[derive(Debug)]
pub(crate) struct ShardCheck {
    /// The shard, by its slots.
    pub shard: String,
    /// The check of its master, or why it could not be checked.
    pub seen: Result<MasterCheck, Failure>,
}

/// The check of an instance.
#[derive(Debug)]
pub(crate) enum InstanceCheck {
    /// A standalone server, or the master that sentinels name.
    One(Box<MasterCheck>),
    /// A cluster, each shard of which is checked by itself.
    Cluster {
        shards: Vec<ShardCheck>,
        /// Findings about the cluster as a whole.
        findings: Vec<Finding>,
    },
}

/// Inspects every master. `command`: the command that sweeps the instance.
///
/// # Errors
/// Why the only master cannot be checked. A failure of one master of a cluster is part of the result.
pub(crate) async fn inspect(
    view: &View,
    options: &ConnOptions,
    scan: &ScanSettings,
    command: &str,
) -> Result<InstanceCheck, Failure> {
    let check = async |master: &Master| match check::inspect(&master.addr, options, Some(scan)).await {
        Ok(facts) => {
            let assessment = assessment::assess(&facts, None, scan);
            let sentence = sentence(&facts, &assessment, command);
            Ok(MasterCheck { facts, assessment, sentence })
        }
        Err(error) => Err(error.into_failure()),
    };
    match &view.masters[..] {
        [master] if view.kind != InstanceKind::Cluster => {
            check(master).await.map(|seen| InstanceCheck::One(Box::new(seen)))
        }
        masters => {
            let checks = masters.iter().map(async |master| {
                let shard = format!("slots {}", master.slots.name());
                ShardCheck { shard, seen: check(master).await }
            });
            let unowned = Some(view.unowned()).filter(|slots| !slots.is_empty());
            let findings = unowned.map(Finding::UnownedSlots).into_iter().collect();
            Ok(InstanceCheck::Cluster { shards: join_all(checks).await, findings })
        }
    }
}

impl InstanceCheck {
    /// Whether a sweep could run on every master.
    pub(crate) fn can_sweep(&self) -> bool {
        match self {
            Self::One(seen) => seen.assessment.can_sweep(),
            Self::Cluster { shards, .. } => {
                shards.iter().all(|shard| shard.seen.as_ref().is_ok_and(|seen| seen.assessment.can_sweep()))
            }
        }
    }

    /// The verdict on the whole instance, as a sentence.
    pub(crate) fn verdict(&self, command: &str) -> String {
        match self {
            Self::One(seen) => seen.sentence.clone(),
            Self::Cluster { shards, .. } => overall(shards, command),
        }
    }

    /// The report that `ttlsweep check` prints without `--json`.
    pub(crate) fn text(&self, scan: &ScanSettings, command: &str) -> String {
        let of = |seen: &MasterCheck| text(&seen.facts, None, &seen.assessment, scan, &seen.sentence);
        let (checks, findings) = match self {
            Self::One(seen) => return of(seen),
            Self::Cluster { shards, findings } => (shards, findings),
        };
        let mut whole = String::new();
        for ShardCheck { shard, seen } in checks {
            let _ = writeln!(whole, "== {shard}");
            match seen {
                Ok(seen) => whole.push_str(&of(seen)),
                Err(failure) => whole.push_str(&format!("{}\n", failure_text(failure))),
            }
            whole.push('\n');
        }
        findings.iter().for_each(|finding| whole.push_str(&finding_text(finding)));
        format!("{whole}cluster: {}\n", overall(checks, command))
    }
}

/// The verdict on all masters together.
fn overall(checks: &[ShardCheck], command: &str) -> String {
    let seen = checks.iter().filter_map(|shard| shard.seen.as_ref().ok());
    let good: Vec<&Assessment> =
        seen.map(|seen| &seen.assessment).filter(|assessment| assessment.can_sweep()).collect();
    let bad = checks.len() - good.len();
    let mut text = if bad > 0 {
        format!("{bad} of {} cannot be swept; see the errors. ", counted(checks.len(), "master"))
    } else {
        String::new()
    };
    let with_ttl: u64 = good.iter().map(|assessment| assessment.swept.size.expires).sum();
    let expired: Option<u64> = good.iter().map(|assessment| assessment.swept.expired.map(|expired| expired.keys)).sum();
    let _ = match expired {
        _ if good.is_empty() => write!(text, "nothing can be swept"),
        _ if with_ttl == 0 => write!(text, "no key has a TTL: there is nothing to sweep"),
        Some(0) => write!(
            text,
            "the servers' own samples show no backlog on {}, and can be far too low; a sweep tells: {command}",
            counted(good.len(), "master")
        ),
        Some(expired) => write!(
            text,
            "about {} of {} keys with a TTL have expired on {}; a sweep frees them: {command}",
            grouped(expired),
            grouped(with_ttl),
            counted(good.len(), "master"),
        ),
        None => write!(text, "how much a sweep would free is unknown"),
    };
    text
}
