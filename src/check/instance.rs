//! The look at an instance: at its one master, or at each master of a cluster, with one verdict for all.

use std::fmt::Write as _;

use futures_util::future::join_all;

use crate::check;
use crate::check::facts::Facts;
use crate::check::findings::Finding;
use crate::check::report::{finding_text, sentence, text};
use crate::check::verdict::{self, Verdict};
use crate::model::failure::Failure;
use crate::model::format::{counted, failure_text, grouped};
use crate::node::conn::ConnOptions;
use crate::node::topology::{Kind, Master, View};
use crate::settings::ScanSettings;

/// What was seen of one master.
#[derive(Debug)]
pub struct Seen {
    /// The facts.
    pub facts: Facts,
    /// What they mean.
    pub verdict: Verdict,
    /// The same in words.
    pub sentence: String,
}

/// One master of a cluster, or why it was not seen.
#[derive(Debug)]
pub struct ShardLook {
    /// Its slots.
    pub shard: String,
    /// What was seen of it.
    pub seen: Result<Seen, Failure>,
}

/// What was seen of an instance.
#[derive(Debug)]
pub enum Look {
    /// The one master of a standalone server or behind sentinels.
    One(Box<Seen>),
    /// A cluster.
    Cluster {
        /// Each master.
        shards: Vec<ShardLook>,
        /// What was seen of the cluster itself.
        findings: Vec<Finding>,
    },
}

/// Looks at every master. `order`: the command that sweeps the instance.
///
/// # Errors
/// Why the only one cannot be looked at; a cluster's are said beside those that can.
pub async fn look(view: &View, options: &ConnOptions, scan: &ScanSettings, order: &str) -> Result<Look, Failure> {
    let look = async |master: &Master| match check::look(&master.addr, options, Some(scan)).await {
        Ok(facts) => {
            let verdict = verdict::judge(&facts, None, scan);
            let sentence = sentence(&facts, &verdict, order);
            Ok(Seen { facts, verdict, sentence })
        }
        Err(error) => Err(error.into_failure()),
    };
    match &view.masters[..] {
        [master] if view.kind != Kind::Cluster => look(master).await.map(|seen| Look::One(Box::new(seen))),
        masters => {
            let looks = masters.iter().map(async |master| {
                let shard = format!("slots {}", master.slots.name());
                ShardLook { shard, seen: look(master).await }
            });
            let unowned = Some(view.unowned()).filter(|slots| !slots.is_empty());
            let findings = unowned.map(Finding::UnownedSlots).into_iter().collect();
            Ok(Look::Cluster { shards: join_all(looks).await, findings })
        }
    }
}

impl Look {
    /// Whether a sweep could run everywhere.
    pub fn can_sweep(&self) -> bool {
        match self {
            Self::One(seen) => seen.verdict.can_sweep(),
            Self::Cluster { shards, .. } => {
                shards.iter().all(|look| look.seen.as_ref().is_ok_and(|seen| seen.verdict.can_sweep()))
            }
        }
    }

    /// The verdict on the whole instance.
    pub fn verdict(&self, order: &str) -> String {
        match self {
            Self::One(seen) => seen.sentence.clone(),
            Self::Cluster { shards, .. } => overall(shards, order),
        }
    }

    /// Everything, for people.
    pub fn text(&self, scan: &ScanSettings, order: &str) -> String {
        let of = |seen: &Seen| text(&seen.facts, None, &seen.verdict, scan, &seen.sentence);
        let (looks, findings) = match self {
            Self::One(seen) => return of(seen),
            Self::Cluster { shards, findings } => (shards, findings),
        };
        let mut whole = String::new();
        for ShardLook { shard, seen } in looks {
            let _ = writeln!(whole, "== {shard}");
            match seen {
                Ok(seen) => whole.push_str(&of(seen)),
                Err(failure) => whole.push_str(&format!("{}\n", failure_text(failure))),
            }
            whole.push('\n');
        }
        findings.iter().for_each(|finding| whole.push_str(&finding_text(finding)));
        format!("{whole}cluster: {}\n", overall(looks, order))
    }
}

/// The verdict on all masters together.
fn overall(looks: &[ShardLook], order: &str) -> String {
    let seen = looks.iter().filter_map(|look| look.seen.as_ref().ok());
    let good: Vec<&Verdict> = seen.map(|seen| &seen.verdict).filter(|verdict| verdict.can_sweep()).collect();
    let bad = looks.len() - good.len();
    let mut text = if bad > 0 {
        format!("{bad} of {} cannot be swept; see the errors. ", counted(looks.len(), "master"))
    } else {
        String::new()
    };
    let with_ttl: u64 = good.iter().map(|verdict| verdict.swept.size.expires).sum();
    let expired: Option<u64> = good.iter().map(|verdict| verdict.swept.expired.map(|expired| expired.keys)).sum();
    let _ = match expired {
        _ if good.is_empty() => write!(text, "nothing can be swept"),
        _ if with_ttl == 0 => write!(text, "no key has a TTL: there is nothing to sweep"),
        Some(0) => write!(
            text,
            "the servers' own samples show no backlog on {}, and can be far too low; a sweep tells: {order}",
            counted(good.len(), "master")
        ),
        Some(expired) => write!(
            text,
            "about {} of {} keys with a TTL have expired on {}; a sweep frees them: {order}",
            grouped(expired),
            grouped(with_ttl),
            counted(good.len(), "master"),
        ),
        None => write!(text, "how much a sweep would free is unknown"),
    };
    text
}
