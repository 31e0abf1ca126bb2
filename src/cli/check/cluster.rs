//! `ttlsweep check` of a cluster: the look at a server, at each of its masters.

use std::fmt::Write as _;

use serde_json::json;

use crate::api::check_dto::CheckOutput;
use crate::api::dto::FailureDto;
use crate::check;
use crate::check::verdict::{self, Verdict};
use crate::cli::check::{sentence, text};
use crate::cli::exit::Exit;
use crate::cli::output::{self, grouped};
use crate::model::failure::Failure;
use crate::node::conn::ConnOptions;
use crate::node::topology::Master;
use crate::settings::Settings;

/// What was seen of one master.
struct Look {
    shard: String,
    seen: Result<(check::facts::Facts, Verdict, String), Failure>,
}

/// Looks at each master and prints what was seen, and one verdict for all.
///
/// # Errors
/// A stdout that cannot be written.
pub(super) async fn run(
    masters: &[Master],
    options: &ConnOptions,
    settings: &Settings,
    as_json: bool,
) -> anyhow::Result<Exit> {
    let mut looks = Vec::new();
    for master in masters {
        let seen = match check::look(&master.addr, options).await {
            Ok(facts) => {
                let verdict = verdict::judge(&facts, None, &settings.scan);
                let sentence = sentence(&facts, &verdict, settings);
                Ok((facts, verdict, sentence))
            }
            Err(error) => Err(error.into_failure()),
        };
        looks.push(Look { shard: format!("slots {}", master.slots.name()), seen });
    }
    let all = overall(&looks, settings);
    output::print(&if as_json {
        format!("{}\n", serde_json::to_string_pretty(&object(looks.iter(), settings, &all)?)?)
    } else {
        let mut whole = String::new();
        for Look { shard, seen } in &looks {
            let _ = writeln!(whole, "== {shard}");
            match seen {
                Ok((facts, verdict, sentence)) => {
                    whole.push_str(&text(facts, None, verdict, &settings.scan, sentence));
                }
                Err(failure) => whole.push_str(&format!("{}\n", output::failure_text(failure))),
            }
            whole.push('\n');
        }
        format!("{whole}cluster: {all}\n")
    })?;
    let can_all = looks.iter().all(|look| look.seen.as_ref().is_ok_and(|(_, verdict, _)| verdict.can_sweep()));
    Ok(if can_all { Exit::Done } else { Exit::Failed })
}

fn object<'a>(
    looks: impl Iterator<Item = &'a Look>,
    settings: &Settings,
    all: &str,
) -> anyhow::Result<serde_json::Value> {
    let mut shards = Vec::new();
    for Look { shard, seen } in looks {
        let mut value = match seen {
            Ok((facts, verdict, sentence)) => {
                let output = CheckOutput::new(facts.addr.to_string(), facts, verdict, &settings.scan, sentence.clone());
                serde_json::to_value(output)?
            }
            Err(failure) => json!({ "failure": FailureDto::from(failure) }),
        };
        value["shard"] = json!(shard);
        shards.push(value);
    }
    Ok(json!({ "target": settings.target.to_string(), "shards": shards, "verdict": all }))
}

/// The verdict on all masters together.
fn overall(looks: &[Look], settings: &Settings) -> String {
    let seen = looks.iter().filter_map(|look| look.seen.as_ref().ok());
    let good: Vec<&Verdict> = seen.map(|(_, verdict, _)| verdict).filter(|verdict| verdict.can_sweep()).collect();
    let bad = looks.len() - good.len();
    let mut text = if bad > 0 {
        format!("{bad} of {} masters cannot be swept; see the errors. ", looks.len())
    } else {
        String::new()
    };
    let with_ttl: u64 = good.iter().map(|verdict| verdict.swept.size.expires).sum();
    let expired: Option<u64> = good.iter().map(|verdict| verdict.swept.expired.map(|expired| expired.keys)).sum();
    let _ = match expired {
        _ if good.is_empty() => write!(text, "nothing can be swept"),
        Some(0) => write!(text, "no backlog to be seen on {} masters", good.len()),
        Some(expired) => write!(
            text,
            "about {} of {} keys with a TTL have expired on {} masters; a sweep frees them: ttlsweep scan {}",
            grouped(expired),
            grouped(with_ttl),
            good.len(),
            settings.target,
        ),
        None => write!(text, "how much a sweep would free is unknown"),
    };
    text
}
