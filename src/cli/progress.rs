//! The progress of a task on stderr: a bar for each pass on a terminal, else status lines that become rarer with time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::cli::output::{grouped, note, span};
use crate::model::bounds::KeepFigures;
use crate::model::progress::PassFigures;
use crate::model::shard::DbIndex;
use crate::tasks::TaskView;

/// How often the bars are redrawn.
const REDRAW: Duration = Duration::from_millis(100);
/// From this many shards on the bars of completed passes are removed, to leave room for the others.
const BARS_AT_MOST: usize = 8;
/// Steps of a bar: each is 0.01 %.
const STEPS: u64 = 10_000;
/// An ETA is shown once this share of the pass is done and this time has passed: before that it would be a guess.
const ETA_FROM: (f64, Duration) = (0.02, Duration::from_secs(1));

/// What is shown of one task, whether it runs in this process or in a daemon.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Rows {
    /// The shards, in the order of their names.
    pub shards: Vec<ShardRow>,
}

/// What is shown of one shard.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct ShardRow {
    /// Name of the shard: its address, its slots, or the name that sentinels give the master.
    pub name: String,
    /// Why it is held, in words; `None` while it is not.
    pub hold: Option<String>,
    /// How well its bounds are kept, in words; `None` where it is swept once.
    pub keep: Option<String>,
    /// Its warnings so far. A keep run shows them at once, since its end is far away; of a sweep the summary has them.
    pub warnings: Vec<String>,
    /// Its passes, in the order of their DBs.
    pub passes: Vec<PassRow>,
}

/// What is shown of one pass.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct PassRow {
    /// The number of its DB.
    pub db: u32,
    /// Share of the cursor space that is done, 0 to 1.
    pub fraction: f64,
    /// Whether the whole DB was walked.
    pub complete: bool,
    /// Keys that SCAN has visited so far.
    pub scanned: u64,
    /// Expired keys reclaimed so far.
    pub reclaimed: u64,
    /// Median slice of the batches, in microseconds.
    pub slice_p50_us: u64,
    /// Share of the master's time that batches may take now, 0 to 1.
    pub intensity: f64,
}

impl From<&TaskView> for Rows {
    fn from(view: &TaskView) -> Self {
        let pass = |(db, figures): (&DbIndex, &PassFigures)| PassRow {
            db: db.0,
            fraction: figures.checkpoint.fraction(),
            complete: figures.checkpoint.position.to_send().is_none(),
            scanned: figures.counters.scanned,
            reclaimed: figures.counters.reclaimed,
            slice_p50_us: figures.gauges.slice.p50_us,
            intensity: figures.gauges.intensity,
        };
        let shards = view.snapshot.shards.iter().map(|(id, shard)| ShardRow {
            name: id.to_string(),
            hold: shard.hold_text(),
            keep: shard
                .keep
                .as_ref()
                .map(|figures| keep_text(figures, shard.passes.values().map(|pass| pass.counters.reclaimed).sum())),
            warnings: shard.warnings.clone(),
            passes: shard.passes.iter().map(pass).collect(),
        });
        Self { shards: shards.collect() }
    }
}

/// How well the bounds of a shard are kept, in one line.
pub(super) fn keep_text(figures: &KeepFigures, reclaimed: u64) -> String {
    let Some(backlog) = figures.backlog else {
        return format!("first lap, to find out how many keys expire; {} reclaimed", grouped(reclaimed));
    };
    let most = figures.max_backlog.map(|most| format!(" of {} allowed", grouped(most))).unwrap_or_default();
    let delay = figures.delay.map(|delay| format!(", none for longer than {}", span(delay))).unwrap_or_default();
    let missed = if figures.is_missed { "BOUND MISSED: " } else { "" };
    let lap = if figures.lap.is_zero() { "as fast as it may".to_owned() } else { span(figures.lap) };
    format!(
        "{missed}about {} expired keys in memory{most}{delay}; {} keys/s expire and stay; lap {lap}; {} reclaimed",
        grouped(backlog),
        grouped(figures.inflow as u64),
        grouped(reclaimed)
    )
}

/// Shows the progress of a task until the sender of its views is dropped.
pub(super) async fn show<V>(view: watch::Receiver<V>, rows: impl Fn(&V) -> Rows) {
    // A terminal that cannot move its cursor (TERM=dumb) gets lines, as a pipe does.
    let no_bars = ProgressDrawTarget::stderr().is_hidden();
    if no_bars { lines(view, rows).await } else { bars(view, rows).await }
}

/// The speed of a pass, measured since its first view: a resumed pass has earlier counts.
struct PassSpeed {
    since: Instant,
    scanned: u64,
    fraction: f64,
}

impl PassSpeed {
    fn new(pass: &PassRow) -> Self {
        Self { since: Instant::now(), scanned: pass.scanned, fraction: pass.fraction }
    }

    fn keys_per_sec(&self, pass: &PassRow) -> f64 {
        let keys = pass.scanned.saturating_sub(self.scanned) as f64;
        keys / self.since.elapsed().as_secs_f64().max(0.001)
    }

    fn eta(&self, pass: &PassRow) -> Option<Duration> {
        eta(self.since.elapsed(), self.fraction, pass.fraction)
    }
}

/// Time left at the speed so far; `None` until [`ETA_FROM`] is reached.
fn eta(elapsed: Duration, fraction_then: f64, fraction_now: f64) -> Option<Duration> {
    let done = fraction_now - fraction_then;
    if done < ETA_FROM.0 || elapsed < ETA_FROM.1 {
        return None;
    }
    Duration::try_from_secs_f64(elapsed.as_secs_f64() * (1.0 - fraction_now) / done).ok()
}

/// Speed, counts and ETA of a pass in one line.
fn pass_text(pass: &PassRow, speed: &PassSpeed) -> String {
    let eta = speed.eta(pass).map_or_else(|| "N/A".to_owned(), span);
    // Full intensity is not shown. A lower one is: it says why the sweep is slow.
    let part = (pass.intensity > 0.0 && pass.intensity < 0.995).then(|| format!(", at {:.0}%", pass.intensity * 100.0));
    format!(
        "{} keys/s{}, {} reclaimed, slice {}us, ETA {eta}",
        grouped(speed.keys_per_sec(pass) as u64),
        part.unwrap_or_default(),
        grouped(pass.reclaimed),
        pass.slice_p50_us,
    )
}

/// The warnings of keep runs that were not shown yet; adds them to `shown`.
fn new_warnings(rows: &Rows, shown: &mut BTreeSet<(String, String)>) -> Vec<String> {
    let kept = rows.shards.iter().filter(|shard| shard.keep.is_some());
    let all = kept.flat_map(|shard| shard.warnings.iter().map(|warning| (shard.name.clone(), warning.clone())));
    let new = all.filter(|one| shown.insert(one.clone()));
    new.map(|(shard, warning)| format!("{shard}: warning: {warning}")).collect()
}

async fn bars<V>(mut view: watch::Receiver<V>, rows: impl Fn(&V) -> Rows) {
    let style = ProgressStyle::with_template("{prefix:4} {bar:16} {percent:>3}% {wide_msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    // A line without a bar, for a shard that is held before its first pass.
    let waits =
        ProgressStyle::with_template("{prefix} {wide_msg}").unwrap_or_else(|_| ProgressStyle::default_spinner());
    let multi = MultiProgress::new();
    let mut passes: BTreeMap<(String, u32), (ProgressBar, PassSpeed)> = BTreeMap::new();
    let mut waiting: BTreeMap<String, ProgressBar> = BTreeMap::new();
    let mut warned = BTreeSet::new();
    loop {
        let open = view.changed().await.is_ok();
        let now = rows(&view.borrow_and_update());
        for warning in new_warnings(&now, &mut warned) {
            // An error on stderr is ignored. The line appears above the bars.
            let _ = multi.println(warning);
        }
        let alone = now.shards.len() <= 1;
        let waits_now = |shard: &&ShardRow| shard.keep.is_some() || shard.hold.is_some() && shard.passes.is_empty();
        waiting.retain(|name, line| {
            let stays = now.shards.iter().filter(waits_now).any(|shard| shard.name == *name);
            if !stays {
                line.finish_and_clear();
            }
            stays
        });
        for shard in now.shards.iter().filter(waits_now).take(BARS_AT_MOST) {
            let line = waiting.entry(shard.name.clone()).or_insert_with(|| {
                let line = multi.add(ProgressBar::new_spinner().with_style(waits.clone()));
                line.set_prefix(shard.name.clone());
                line
            });
            line.set_message(match (&shard.hold, &shard.keep) {
                (None, Some(keep)) => keep.clone(),
                (hold, _) => format!("holding: {}", hold.as_deref().unwrap_or_default()),
            });
            line.tick();
        }
        for shard in now.shards.iter().filter(|shard| shard.keep.is_none()) {
            for pass in &shard.passes {
                let (bar, speed) = passes.entry((shard.name.clone(), pass.db)).or_insert_with(|| {
                    let bar = multi.add(ProgressBar::new(STEPS).with_style(style.clone()));
                    let db = DbIndex(pass.db);
                    bar.set_prefix(if alone { db.to_string() } else { format!("{} {db}", shard.name) });
                    (bar, PassSpeed::new(pass))
                });
                if bar.is_finished() {
                    if pass.complete {
                        continue;
                    }
                    // The shard is swept again because its master or its slots have moved.
                    bar.reset();
                }
                bar.set_position((pass.fraction * STEPS as f64) as u64);
                bar.set_message(match &shard.hold {
                    Some(hold) => format!("holding: {hold}"),
                    None if pass.complete => {
                        let keys = speed.keys_per_sec(pass) as u64;
                        format!("{} keys/s, {} reclaimed", grouped(keys), grouped(pass.reclaimed))
                    }
                    None => pass_text(pass, speed),
                });
                if pass.complete && now.shards.len() > BARS_AT_MOST {
                    bar.finish_and_clear();
                } else if pass.complete {
                    bar.abandon();
                }
            }
        }
        if !open {
            break;
        }
        tokio::time::sleep(REDRAW).await;
    }
    waiting.values().for_each(ProgressBar::finish_and_clear);
    for (bar, _) in passes.values().filter(|(bar, _)| !bar.is_finished()) {
        bar.abandon();
    }
}

/// Time to the next status line: 1 s in the first minute, 10 s up to ten minutes, then 1 min.
fn line_every(elapsed: Duration) -> Duration {
    Duration::from_secs(match elapsed.as_secs() {
        0..60 => 1,
        60..600 => 10,
        _ => 60,
    })
}

async fn lines<V>(mut view: watch::Receiver<V>, rows: impl Fn(&V) -> Rows) {
    let begun = Instant::now();
    let mut due = begun + line_every(Duration::ZERO);
    let mut speeds: BTreeMap<(String, u32), PassSpeed> = BTreeMap::new();
    let (mut holds, mut warned) = (BTreeMap::new(), BTreeSet::new());
    loop {
        // Also without a new view: while a server does not answer nothing changes, and the status line is still due.
        tokio::select! {
            changed = view.changed() => if changed.is_err() { return },
            () = tokio::time::sleep_until(due) => {}
        }
        let now = rows(&view.borrow_and_update());
        let elapsed = begun.elapsed();
        for warning in new_warnings(&now, &mut warned) {
            note(&format!("{:>7} {warning}", span(elapsed)));
        }
        let is_due = Instant::now() >= due;
        for ShardRow { name, hold, keep, passes, .. } in &now.shards {
            if holds.insert(name.clone(), hold.clone()).as_ref() != Some(hold)
                && let Some(hold) = hold
            {
                note(&format!("{:>7} {name} holding: {hold}", span(elapsed)));
            }
            if let Some(keep) = keep {
                if is_due && hold.is_none() {
                    note(&format!("{:>7} {name}: {keep}", span(elapsed)));
                }
                continue;
            }
            let Some(pass) = passes.iter().rfind(|pass| !pass.complete) else { continue };
            let speed = speeds.entry((name.clone(), pass.db)).or_insert_with(|| PassSpeed::new(pass));
            if is_due && hold.is_none() {
                let (db, percent) = (DbIndex(pass.db), pass.fraction * 100.0);
                note(&format!("{:>7} {name} {db} {percent:.1}%: {}", span(elapsed), pass_text(pass, speed)));
            }
        }
        if is_due {
            due = Instant::now() + line_every(elapsed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_no_eta_without_ground() {
        let secs = Duration::from_secs;
        assert_eq!(eta(secs(10), 0.0, 0.01), None, "too little done");
        assert_eq!(eta(Duration::from_millis(900), 0.0, 0.5), None, "too early");
        assert_eq!(eta(secs(10), 0.0, 0.5), Some(secs(10)));
        assert_eq!(eta(secs(10), 0.5, 0.75), Some(secs(10)), "a resumed pass counts from where it went on");
        assert_eq!(eta(secs(10), 0.5, 0.2), None, "a pass that began again");
    }

    #[test]
    fn the_status_line_thins_with_time() {
        let every = |s| line_every(Duration::from_secs(s)).as_secs();
        assert_eq!([every(0), every(59), every(60), every(599), every(600), every(9999)], [1, 1, 10, 10, 60, 60]);
    }
}
