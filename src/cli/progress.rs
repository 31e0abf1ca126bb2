//! What people see while a sweep runs: a bar for each pass on a terminal, else a status line that thins with time.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::cli::output::{grouped, note, span};
use crate::model::progress::{PassFigures, ShardView};
use crate::model::shard::{DbIndex, ShardId};
use crate::tasks::TaskView;

/// The bar is drawn anew this often.
const REDRAW: Duration = Duration::from_millis(100);
/// With more shards than this the bars of those that are done make room.
const BARS_AT_MOST: usize = 8;
/// Steps of a bar: a tenth of a per mille each.
const STEPS: u64 = 10_000;
/// There is ground for an ETA after this much of the pass, and this long.
const ETA_GROUND: (f64, Duration) = (0.02, Duration::from_secs(1));

/// Shows the views of a task until its sender is gone.
pub async fn show(view: watch::Receiver<Arc<TaskView>>) {
    if std::io::stderr().is_terminal() { bars(view).await } else { lines(view).await }
}

/// How fast a pass goes: by the views since it was first seen.
struct Pace {
    since: Instant,
    scanned: u64,
    fraction: f64,
}

impl Pace {
    fn new(figures: &PassFigures) -> Self {
        Self { since: Instant::now(), scanned: figures.scanned, fraction: figures.fraction() }
    }

    fn keys_per_sec(&self, figures: &PassFigures) -> f64 {
        let keys = figures.scanned.saturating_sub(self.scanned) as f64;
        keys / self.since.elapsed().as_secs_f64().max(0.001)
    }

    fn eta(&self, figures: &PassFigures) -> Option<Duration> {
        eta(self.since.elapsed(), self.fraction, figures.fraction())
    }
}

/// Time left at the pace so far, or `None` while there is no ground for one.
fn eta(elapsed: Duration, fraction_then: f64, fraction_now: f64) -> Option<Duration> {
    let done = fraction_now - fraction_then;
    if done < ETA_GROUND.0 || elapsed < ETA_GROUND.1 {
        return None;
    }
    Duration::try_from_secs_f64(elapsed.as_secs_f64() * (1.0 - fraction_now) / done).ok()
}

/// The figures of a pass in one line.
fn figures_text(figures: &PassFigures, pace: &Pace) -> String {
    let eta = pace.eta(figures).map_or_else(|| "N/A".to_owned(), span);
    format!(
        "{} keys/s, {} reclaimed, slice {}us, ETA {eta}",
        grouped(pace.keys_per_sec(figures) as u64),
        grouped(figures.reclaimed),
        figures.slice.p50_us,
    )
}

fn hold_text(shard: &ShardView) -> Option<String> {
    shard.hold.map(|reason| format!("holding: {}", reason.sentence()))
}

async fn bars(mut view: watch::Receiver<Arc<TaskView>>) {
    let style = ProgressStyle::with_template("{prefix:4} {bar:16} {percent:>3}% {wide_msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let multi = MultiProgress::new();
    let mut passes: BTreeMap<(ShardId, DbIndex), (ProgressBar, Pace)> = BTreeMap::new();
    loop {
        let open = view.changed().await.is_ok();
        let now = view.borrow_and_update().clone();
        let alone = now.snapshot.shards.len() <= 1;
        for (id, shard) in &now.snapshot.shards {
            for (db, figures) in &shard.passes {
                let (bar, pace) = passes.entry((id.clone(), *db)).or_insert_with(|| {
                    let bar = multi.add(ProgressBar::new(STEPS).with_style(style.clone()));
                    bar.set_prefix(if alone { db.to_string() } else { format!("{id} {db}") });
                    (bar, Pace::new(figures))
                });
                let complete = figures.position.to_send().is_none();
                if bar.is_finished() {
                    if complete {
                        continue;
                    }
                    // A shard that is swept again, since a master or slots have moved.
                    bar.reset();
                }
                bar.set_position((figures.fraction() * STEPS as f64) as u64);
                bar.set_message(match hold_text(shard) {
                    Some(hold) => hold,
                    None if complete => {
                        let keys = pace.keys_per_sec(figures) as u64;
                        format!("{} keys/s, {} reclaimed", grouped(keys), grouped(figures.reclaimed))
                    }
                    None => figures_text(figures, pace),
                });
                if complete && now.snapshot.shards.len() > BARS_AT_MOST {
                    bar.finish_and_clear();
                } else if complete {
                    bar.abandon();
                }
            }
        }
        if !open {
            break;
        }
        tokio::time::sleep(REDRAW).await;
    }
    for (bar, _) in passes.values().filter(|(bar, _)| !bar.is_finished()) {
        bar.abandon();
    }
}

/// How long to wait for the next line: a second in the first minute, ten up to ten minutes, then a minute.
fn line_every(elapsed: Duration) -> Duration {
    Duration::from_secs(match elapsed.as_secs() {
        0..60 => 1,
        60..600 => 10,
        _ => 60,
    })
}

async fn lines(mut view: watch::Receiver<Arc<TaskView>>) {
    let begun = Instant::now();
    let mut due = begun + line_every(Duration::ZERO);
    let mut paces: BTreeMap<(ShardId, DbIndex), Pace> = BTreeMap::new();
    let mut holds = BTreeMap::new();
    while view.changed().await.is_ok() {
        let now = view.borrow_and_update().clone();
        let elapsed = begun.elapsed();
        let is_due = Instant::now() >= due;
        for (id, shard) in &now.snapshot.shards {
            if holds.insert(id.clone(), shard.hold) != Some(shard.hold)
                && let Some(hold) = hold_text(shard)
            {
                note(&format!("{:>7} {id} {hold}", span(elapsed)));
            }
            let Some((db, figures)) = shard.current.and_then(|db| shard.passes.get_key_value(&db)) else { continue };
            let pace = paces.entry((id.clone(), *db)).or_insert_with(|| Pace::new(figures));
            if is_due && shard.hold.is_none() {
                let percent = figures.fraction() * 100.0;
                note(&format!("{:>7} {id} {db} {percent:.1}%: {}", span(elapsed), figures_text(figures, pace)));
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
