//! The text that `ttlsweep check` prints, and the report in the API's check of an instance. Pure: facts in, text out.

use std::fmt::Write as _;

use crate::check::assessment::{Assessment, Basis, DbBacklog, Expired};
use crate::check::backlog::{NoCount, ReplicaCount};
use crate::check::estimate::{COST, Span};
use crate::check::facts::{Facts, Right, ServerRole};
use crate::check::findings::{Finding, Severity};
use crate::model::format::{bytes, grouped, span, table};
use crate::node::commands::Access;
use crate::settings::{ScanSettings, show_duration};

/// The facts of one server and what they mean.
pub(crate) fn text(
    facts: &Facts,
    counted: Option<&Result<ReplicaCount, NoCount>>,
    assessment: &Assessment,
    settings: &ScanSettings,
    sentence: &str,
) -> String {
    let mut text = heading(facts);
    text.push_str(&db_table(facts, assessment));
    text.push_str(&sources(counted, assessment));
    text.push('\n');
    for (name, value) in lines(facts, assessment, settings) {
        let _ = writeln!(text, "{name:<9} {value}");
    }
    text.push('\n');
    assessment.findings.iter().for_each(|finding| text.push_str(&finding_text(finding)));
    let _ = writeln!(text, "{}verdict: {sentence}", if assessment.findings.is_empty() { "" } else { "\n" });
    text
}

/// A finding with its advice.
pub(crate) fn finding_text(finding: &Finding) -> String {
    format!("{}: {}\n  hint: {}\n", finding.severity(), finding.message(), finding.advice())
}

fn heading(facts: &Facts) -> String {
    let server = facts.server.as_ref();
    let server = server.map_or_else(|| "server unknown".to_owned(), |s| format!("{} {}", s.product, s.version));
    let role = match &facts.role {
        ServerRole::Master => "master".to_owned(),
        ServerRole::Replica { master: Some(master) } => format!("replica of {master}"),
        ServerRole::Replica { master: None } => "replica".to_owned(),
        ServerRole::Sentinel => "sentinel".to_owned(),
        ServerRole::Unknown => "role unknown".to_owned(),
    };
    let cluster = if facts.cluster { ", cluster node" } else { "" };
    let up = facts.uptime.map_or_else(String::new, |uptime| format!(", up {}", span(uptime)));
    format!("{}  {server}, {role}{cluster}{up}\n", facts.addr)
}

fn db_table(facts: &Facts, assessment: &Assessment) -> String {
    if facts.server.is_none() {
        return "sizes unknown: INFO does not tell\n".to_owned();
    }
    if assessment.dbs.is_empty() {
        return "no keys\n".to_owned();
    }
    let mut rows = vec![["", "keys", "with TTL", "expired", "of them", "hold about"].map(str::to_owned).to_vec()];
    rows.extend(assessment.dbs.iter().map(|(db, backlog)| row(db.to_string(), backlog)));
    if assessment.dbs.len() > 1 {
        rows.push(row("to sweep".to_owned(), &assessment.swept));
    }
    table(&rows)
}

fn row(name: String, backlog: &DbBacklog) -> Vec<String> {
    let unknown = || "unknown".to_owned();
    let expired = |Expired { keys, basis, moved }| match (basis, moved) {
        (Basis::Estimated, _) => format!("~{}", grouped(keys)),
        (Basis::Counted, 0) => grouped(keys),
        (Basis::Counted, moved) => format!("{} +/-{}", grouped(keys), grouped(moved)),
    };
    vec![
        name,
        grouped(backlog.size.keys),
        grouped(backlog.size.expires),
        backlog.expired.map_or_else(unknown, expired),
        backlog.expired.map_or_else(unknown, |expired| share(expired.keys, backlog.size.expires)),
        backlog.bytes.map_or_else(unknown, bytes),
    ]
}

fn share(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.1}%", part as f64 / whole as f64 * 100.0) }
}

/// Where the numbers of the table come from.
fn sources(counted: Option<&Result<ReplicaCount, NoCount>>, assessment: &Assessment) -> String {
    let mut text = String::new();
    let estimated = |backlog: &DbBacklog| backlog.expired.is_some_and(|expired| expired.basis == Basis::Estimated);
    if assessment.dbs.values().any(estimated) {
        text.push_str("~ estimated: keys with a TTL x expired_stale_perc, one figure for all DBs\n");
    }
    if let Some(Ok(ReplicaCount { replica, .. })) = counted {
        let _ = writeln!(text, "expired keys counted on the replica {replica}");
    }
    if assessment.dbs.values().any(|backlog| backlog.bytes.is_some_and(|bytes| bytes > 0)) {
        text.push_str("bytes estimated: expired keys x mean size of a key (used_memory_dataset / keys)\n");
    }
    text
}

fn lines(facts: &Facts, assessment: &Assessment, settings: &ScanSettings) -> Vec<(&'static str, String)> {
    let known = |value: Option<String>| value.unwrap_or_else(|| "unknown".to_owned());
    let yes_no = |value: bool| if value { "yes" } else { "no" }.to_owned();
    let expiry = &facts.expiry;
    let memory = &facts.memory;
    let mut lines = vec![
        (
            "expiry",
            format!(
                "active-expire-effort {}, hz {}, lazyfree-lazy-expire {}",
                known(expiry.effort.map(|effort| effort.to_string())),
                known(expiry.hz.map(|hz| hz.to_string())),
                known(expiry.lazyfree.map(yes_no)),
            ),
        ),
        (
            "memory",
            format!(
                "used {}, limit {}, policy {}, evicted keys {}",
                known(memory.used.map(bytes)),
                known(memory.max.map(|max| if max == 0 { "none".to_owned() } else { bytes(max) })),
                known(memory.policy.clone()),
                known(memory.evicted.map(grouped)),
            ),
        ),
    ];
    if facts.replicas.is_empty() {
        let none = if facts.role == ServerRole::Unknown { "unknown" } else { "none" };
        lines.push(("replicas", none.to_owned()));
    }
    for replica in &facts.replicas {
        let behind = known(facts.behind(replica).map(bytes));
        let heard = known(replica.lag_s.map(|s| format!("{s}s ago")));
        let line = format!("{} {}, {behind} behind, last heard of {heard}", replica.addr, replica.state);
        lines.push(("replicas", line));
    }
    let fork = match (facts.busy.bgsave, facts.busy.aof_rewrite) {
        (None, None) => "unknown",
        (Some(true), _) => "writing an RDB file",
        (_, Some(true)) => "rewriting the AOF",
        _ => "none",
    };
    lines.push(("fork", fork.to_owned()));
    let rights = |access| {
        let rights = Right::ALL.iter().filter(|right| facts.rights.get(**right) == access);
        rights.map(|right| right.as_str()).collect::<Vec<_>>().join(", ")
    };
    let groups = [
        ("", rights(Access::Allowed)),
        ("; not allowed: ", rights(Access::Denied)),
        ("; not known by this name: ", rights(Access::NoSuchCommand)),
        ("; unknown until tried: ", rights(Access::Unknown)),
    ];
    let groups = groups.iter().filter(|(_, names)| !names.is_empty());
    let rights = groups.map(|(word, names)| format!("{word}{names}")).collect::<String>();
    lines.push(("rights", rights.trim_start_matches("; ").to_owned()));
    if assessment.can_sweep() {
        lines.push(("a sweep", sweep_line(assessment, settings)));
    }
    lines
}

fn range(sweep: Span) -> String {
    let (least, most) = (span(sweep.least), span(sweep.most));
    if least == most { most } else { format!("{least} to {most}") }
}

fn sweep_line(assessment: &Assessment, settings: &ScanSettings) -> String {
    let Some(sweep) = assessment.sweep else { return "takes an unknown time: the sizes are unknown".to_owned() };
    let ceiling = settings
        .tuning
        .max_keys_per_sec
        .map_or_else(|| "no ceiling".to_owned(), |ceiling| format!("at most {} keys/s", grouped(ceiling.into())));
    let us = |(least, most): (f64, f64)| format!("{least}-{most}us");
    format!(
        "takes {} at intensity {}, {ceiling}, touch {}\n          \
         (assumed: {} of server time per live key, {} per expired key, a round trip of {}us, two {} slices under way)",
        range(sweep),
        settings.tuning.intensity,
        settings.touch,
        us(COST.live_us),
        us(COST.reclaimed_us),
        assessment.round_trip.as_micros(),
        show_duration(settings.max_slice),
    )
}

/// The verdict as a sentence. `command`: the command that sweeps this server.
pub(crate) fn sentence(facts: &Facts, assessment: &Assessment, command: &str) -> String {
    if !assessment.can_sweep() {
        return "a sweep cannot run here; see the errors".to_owned();
    }
    let swept = assessment.swept;
    let (Some(sweep), Some(expired)) = (assessment.sweep, swept.expired) else {
        return "a sweep can run; how much it would free is unknown".to_owned();
    };
    if facts.total().expires == 0 {
        return "no key has a TTL: there is nothing to sweep".to_owned();
    }
    if expired.keys == 0 && expired.basis == Basis::Counted {
        return "no expired key is in memory: a sweep would free nothing".to_owned();
    }
    if expired.keys == 0 {
        return format!(
            "the server's own sample shows no backlog, and can be far too low: count with ttlsweep check --replica URL, or \
             sweep, which takes {}: {command}",
            range(sweep)
        );
    }
    let about = if expired.basis == Basis::Estimated || expired.moved > 0 { "about " } else { "" };
    let hold = swept.bytes.map_or_else(String::new, |held| format!(" and hold about {}", bytes(held)));
    let first = if assessment.has(Severity::Warning) { "; see the warnings first" } else { "" };
    format!(
        "{about}{} of {} keys with a TTL have expired{hold}; a sweep frees them in {}: {command}{first}",
        grouped(expired.keys),
        grouped(swept.size.expires),
        range(sweep),
    )
}
