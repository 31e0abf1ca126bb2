//! Metrics for Prometheus. `tasks`, `scheduler`, `keeper`, `notify` and `api` write them, `GET /metrics` reads them.
//!
//! The number of label values is bounded: instances are those of the settings file, everything else is one of a fixed set of words. The
//! label for an instance is `redis_instance`, because Prometheus itself sets `instance` to the address that it scrapes. Names and units
//! follow the conventions of Prometheus: base units, `_total` for counters.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use jiff::Timestamp;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::model::bounds::KeepFigures;
use crate::model::event::EventKind;
use crate::model::progress::{PassCounters, Snapshot, held_by_reason};
use crate::model::task::{Cause, Task, TaskState};
use crate::model::throttle::Reason;

/// Values of `outcome` for a due time.
const DUE_OUTCOMES: [&str; 3] = ["run", "still_running", "missed"];
/// Values of `outcome` for a notification.
const NOTIFICATION_OUTCOMES: [&str; 4] = ["delivered", "retried", "given_up", "dropped"];
/// Buckets of the response times in seconds, from a read of memory to a read of a busy database.
const ANSWER_BOUNDS: [f64; 7] = [0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0];

/// The labels of the metrics of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InstanceLabel {
    redis_instance: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HoldLabels {
    redis_instance: String,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndLabels {
    redis_instance: String,
    cause: &'static str,
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DueLabels {
    redis_instance: String,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AnswerLabels {
    route: String,
    method: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NotificationLabels {
    event: &'static str,
    outcome: &'static str,
}

type Seconds = Counter<f64, AtomicU64>;

/// All metrics. Clones share them.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    scanned: Family<InstanceLabel, Counter>,
    reclaimed: Family<InstanceLabel, Counter>,
    touched: Family<InstanceLabel, Counter>,
    batches: Family<InstanceLabel, Counter>,
    lost_replies: Family<InstanceLabel, Counter>,
    active: Family<InstanceLabel, Seconds>,
    rested: Family<InstanceLabel, Seconds>,
    held: Family<HoldLabels, Seconds>,
    holding: Family<HoldLabels, Gauge>,
    fraction: Family<InstanceLabel, Gauge<f64, AtomicU64>>,
    keep_missed: Family<InstanceLabel, Seconds>,
    keep_backlog: Family<InstanceLabel, Gauge>,
    keep_max_backlog: Family<InstanceLabel, Gauge>,
    keep_delay: Family<InstanceLabel, Gauge<f64, AtomicU64>>,
    ended: Family<EndLabels, Counter>,
    last_success: Family<InstanceLabel, Gauge<f64, AtomicU64>>,
    unfinished: Gauge,
    due_times: Family<DueLabels, Counter>,
    store_errors: Counter,
    daemons: Gauge,
    settings_differ: Gauge,
    notifications: Family<NotificationLabels, Counter>,
    answers: Family<AnswerLabels, Histogram, fn() -> Histogram>,
}

fn answer_times() -> Histogram {
    Histogram::new(ANSWER_BOUNDS)
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("ttlsweep");
        let version = vec![("version", env!("CARGO_PKG_VERSION"))];
        registry.register("build", "The version of this program", Info::new(version));
        macro_rules! register {
            ($name:literal, $help:literal, $metric:expr) => {{
                let metric = $metric;
                registry.register($name, $help, metric.clone());
                metric
            }};
            ($name:literal, $help:literal, $unit:expr, $metric:expr) => {{
                let metric = $metric;
                registry.register_with_unit($name, $help, $unit, metric.clone());
                metric
            }};
        }
        let started: Gauge<f64, AtomicU64> =
            register!("start_timestamp", "When this process began, since 1970", Unit::Seconds, Gauge::default());
        started.set(Timestamp::now().as_millisecond() as f64 / 1000.0);
        let inner = Inner {
            scanned: register!("keys_scanned", "Keys that SCAN visited", Family::default()),
            reclaimed: register!("keys_reclaimed", "Expired keys that were reclaimed", Family::default()),
            touched: register!("keys_touched", "Keys asked with EXISTS or TTL", Family::default()),
            batches: register!("batches", "SCAN batches that were answered", Family::default()),
            lost_replies: register!(
                "lost_replies",
                "Batches, at most, whose keys are not counted: their replies were lost",
                Family::default()
            ),
            active: register!("active", "Time in which batches held a master", Unit::Seconds, Family::default()),
            rested: register!("rested", "Time rested for intensity and ceiling", Unit::Seconds, Family::default()),
            held: register!("held", "Time that sweeps were held, by reason", Unit::Seconds, Family::default()),
            holding: register!(
                "holding",
                "Shards that are held now and tasks that wait to begin, by reason",
                Family::default()
            ),
            fraction: register!(
                "sweep_progress",
                "Share of the sweep under way that is done",
                Unit::Other("ratio".to_owned()),
                Family::default()
            ),
            keep_missed: register!(
                "keep_bound_missed",
                "Time that a bound of a keep run was missed, over all masters",
                Unit::Seconds,
                Family::default()
            ),
            keep_backlog: register!(
                "keep_backlog_keys",
                "Expired keys in memory, as a keep run estimates them, over all masters",
                Family::default()
            ),
            keep_max_backlog: register!(
                "keep_max_backlog_keys",
                "Expired keys that max-backlog allows now, over all masters",
                Family::default()
            ),
            keep_delay: register!(
                "keep_delay",
                "Longest time that a key can be in memory after it has expired, on any master",
                Unit::Seconds,
                Family::default()
            ),
            ended: register!("tasks_ended", "Tasks that ended, by cause and final state", Family::default()),
            last_success: register!(
                "last_success_timestamp",
                "When the last complete sweep ended, since 1970",
                Unit::Seconds,
                Family::default()
            ),
            unfinished: register!("tasks_unfinished", "Tasks that are waiting, running or held", Gauge::default()),
            due_times: register!(
                "due_times",
                "Due times of automatic scans, by what became of them",
                Family::default()
            ),
            store_errors: register!("store_errors", "Reads and writes of the records that failed", Counter::default()),
            daemons: register!("daemons", "Daemons that share the database; 0: it is not shared", Gauge::default()),
            settings_differ: register!(
                "settings_differ",
                "1 if another daemon on the same database has other settings than this one, else 0",
                Gauge::default()
            ),
            notifications: register!(
                "notifications",
                "Requests to the webhook, and notifications that were dropped without one, by outcome",
                Family::default()
            ),
            answers: register!(
                "http_request_duration",
                "Response time of requests to the API",
                Unit::Seconds,
                Family::new_with_constructor(answer_times as fn() -> Histogram)
            ),
            registry,
        };
        for event in EventKind::ALL {
            for outcome in NOTIFICATION_OUTCOMES {
                drop(inner.notifications.get_or_create(&NotificationLabels { event: event.as_str(), outcome }));
            }
        }
        Self(Arc::new(inner))
    }
}

/// Converts OpenMetrics to the older text format: there a counter is declared with the name of its samples (`_total`), an
/// info is a gauge, and there are neither units nor an end mark.
fn classic(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let declared = |line: &str| line.split(' ').nth(2).map(str::to_owned);
    let kinds: std::collections::BTreeMap<_, _> = text
        .lines()
        .filter(|line| line.starts_with("# TYPE "))
        .filter_map(|line| Some((declared(line)?, line.rsplit(' ').next()?)))
        .collect();
    for line in text.lines().filter(|line| *line != "# EOF" && !line.starts_with("# UNIT ")) {
        let name = declared(line).filter(|_| line.starts_with("# "));
        let line = match name.as_deref().and_then(|name| Some((name, *kinds.get(name)?))) {
            Some((name, "counter")) => line.replacen(name, &format!("{name}_total"), 1),
            Some((name, "info")) => line.replacen(name, &format!("{name}_info"), 1).replace(" info", " gauge"),
            _ => line.to_owned(),
        };
        out.push_str(&line);
        out.push('\n');
    }
    out
}

/// Sums over a snapshot of a task. Counters grow by the difference between the sums of two snapshots.
#[derive(Debug, Clone, Default)]
pub struct CounterSums {
    counts: [u64; 5],
    times: [Duration; 2],
    held: std::collections::BTreeMap<Reason, Duration>,
    missed: Duration,
}

impl CounterSums {
    /// Sums over the passes and shards of a snapshot.
    pub fn of(snapshot: &Snapshot) -> Self {
        let missed = snapshot.shards.values().filter_map(|shard| shard.keep).map(|keep| keep.missed).sum();
        let mut sums = Self { held: held_by_reason(snapshot.counters()), missed, ..Self::default() };
        for pass in snapshot.counters() {
            let PassCounters { scanned, reclaimed, touched, batches, lost_replies, active, rested, .. } = pass;
            for (sum, count) in sums.counts.iter_mut().zip([scanned, reclaimed, touched, batches, lost_replies]) {
                *sum += count;
            }
            for (sum, time) in sums.times.iter_mut().zip([active, rested]) {
                *sum += *time;
            }
        }
        sums
    }
}

impl Metrics {
    /// All metrics in the older text format, for readers that do not accept OpenMetrics.
    pub fn encode_classic(&self) -> String {
        classic(&self.encode())
    }

    /// All metrics in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing into a String cannot fail.
        let _ = text::encode(&mut text, &self.0.registry);
        text
    }

    /// Creates the series of an instance before it is swept, so that rates and alerts have a zero to start from. Called for each
    /// instance of the settings at the start and at each reload.
    pub fn introduce(&self, instance: &str) {
        let (inner, label) = (&self.0, InstanceLabel { redis_instance: instance.to_owned() });
        for counter in [&inner.scanned, &inner.reclaimed, &inner.touched, &inner.batches, &inner.lost_replies] {
            drop(counter.get_or_create(&label));
        }
        for time in [&inner.active, &inner.rested, &inner.keep_missed] {
            drop(time.get_or_create(&label));
        }
        drop(inner.last_success.get_or_create(&label));
        for outcome in DUE_OUTCOMES {
            drop(inner.due_times.get_or_create(&DueLabels { redis_instance: instance.to_owned(), outcome }));
        }
        for cause in Cause::ALL.iter().filter(|cause| **cause != Cause::Cli) {
            for state in TaskState::ALL.iter().filter(|state| state.is_final()) {
                let (cause, state) = (cause.as_str(), state.as_str());
                drop(inner.ended.get_or_create(&EndLabels { redis_instance: instance.to_owned(), cause, state }));
            }
        }
    }

    /// Counts what a task did between the sums `before` and `now`, and sets the gauges by the snapshot of `now`.
    pub fn progressed(&self, instance: &str, before: &CounterSums, now: &CounterSums, snapshot: &Snapshot) {
        let label = InstanceLabel { redis_instance: instance.to_owned() };
        let inner = &self.0;
        let counters = [&inner.scanned, &inner.reclaimed, &inner.touched, &inner.batches, &inner.lost_replies];
        for ((family, now), before) in counters.into_iter().zip(now.counts).zip(before.counts) {
            family.get_or_create(&label).inc_by(now.saturating_sub(before));
        }
        for ((family, now), before) in [&inner.active, &inner.rested].into_iter().zip(now.times).zip(before.times) {
            family.get_or_create(&label).inc_by(now.saturating_sub(before).as_secs_f64());
        }
        for (reason, time) in &now.held {
            let since = time.saturating_sub(before.held.get(reason).copied().unwrap_or_default());
            self.0.held.get_or_create(&self.hold_labels(instance, *reason)).inc_by(since.as_secs_f64());
        }
        for &reason in Reason::ALL {
            let shards = snapshot.shards.values().filter(|shard| shard.hold == Some(reason)).count()
                + usize::from(snapshot.waits == Some(reason));
            let labels = self.hold_labels(instance, reason);
            // A series appears with the first hold for its reason and stays, so that it can fall back to 0.
            let known = self.0.holding.get(&labels).is_some();
            if shards > 0 || known {
                self.0.holding.get_or_create(&labels).set(i64::try_from(shards).unwrap_or(i64::MAX));
            }
        }
        self.0.fraction.get_or_create(&label).set(snapshot.fraction());
        let kept: Vec<_> = snapshot.shards.values().filter_map(|shard| shard.keep).collect();
        if !kept.is_empty() {
            let sum = |keys: fn(&KeepFigures) -> Option<u64>| {
                let keys: u64 = kept.iter().filter_map(keys).sum();
                i64::try_from(keys).unwrap_or(i64::MAX)
            };
            inner.keep_missed.get_or_create(&label).inc_by(now.missed.saturating_sub(before.missed).as_secs_f64());
            inner.keep_backlog.get_or_create(&label).set(sum(|keep| keep.backlog));
            inner.keep_max_backlog.get_or_create(&label).set(sum(|keep| keep.max_backlog));
            let delay = kept.iter().filter_map(|keep| keep.delay).max().unwrap_or_default();
            inner.keep_delay.get_or_create(&label).set(delay.as_secs_f64());
        }
    }

    fn hold_labels(&self, instance: &str, reason: Reason) -> HoldLabels {
        HoldLabels { redis_instance: instance.to_owned(), reason: reason.as_str() }
    }

    /// Counts a task that has reached a final state.
    pub fn ended(&self, task: &Task) {
        let labels = EndLabels {
            redis_instance: task.instance_id.clone(),
            cause: task.cause.as_str(),
            state: task.state.as_str(),
        };
        self.0.ended.get_or_create(&labels).inc();
        for &reason in Reason::ALL {
            let labels = self.hold_labels(&task.instance_id, reason);
            if self.0.holding.get(&labels).is_some() {
                self.0.holding.get_or_create(&labels).set(0);
            }
        }
        if let (TaskState::Succeeded, Some(at)) = (task.state, task.finished_at) {
            self.succeeded(&task.instance_id, at);
        }
    }

    /// Sets when an instance was last swept completely.
    pub fn succeeded(&self, instance: &str, at: Timestamp) {
        let label = InstanceLabel { redis_instance: instance.to_owned() };
        self.0.last_success.get_or_create(&label).set(at.as_millisecond() as f64 / 1000.0);
    }

    /// Sets the number of unfinished tasks of this daemon.
    pub fn unfinished(&self, tasks: usize) {
        self.0.unfinished.set(i64::try_from(tasks).unwrap_or(i64::MAX));
    }

    /// Counts a due time by its outcome: `run`, `still_running` or `missed`.
    pub fn due(&self, instance: &str, outcome: &'static str) {
        self.0.due_times.get_or_create(&DueLabels { redis_instance: instance.to_owned(), outcome }).inc();
    }

    /// Sets the number of daemons that share the database, and whether their settings differ.
    pub fn fleet(&self, daemons: usize, settings_differ: bool) {
        self.0.daemons.set(i64::try_from(daemons).unwrap_or(i64::MAX));
        self.0.settings_differ.set(i64::from(settings_differ));
    }

    /// Counts a failed read or write of the records.
    pub fn store_failed(&self) {
        self.0.store_errors.inc();
    }

    /// Counts a notification, or one attempt to send it, by its outcome: `delivered`, `retried`, `given_up` or `dropped`.
    pub fn notified(&self, event: EventKind, outcome: &'static str) {
        self.0.notifications.get_or_create(&NotificationLabels { event: event.as_str(), outcome }).inc();
    }

    /// Counts a request to the API. `route` is the pattern of the route, never the path itself, whose values are unbounded.
    pub fn answered(&self, route: &str, method: &str, status: u16, took: Duration) {
        let labels = AnswerLabels { route: route.to_owned(), method: method.to_owned(), status };
        self.0.answers.get_or_create(&labels).observe(took.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_has_its_series_before_it_is_swept() {
        let metrics = Metrics::default();
        metrics.introduce("cache");
        let text = metrics.encode();
        for series in [
            "ttlsweep_keys_reclaimed_total{redis_instance=\"cache\"} 0",
            "ttlsweep_last_success_timestamp_seconds{redis_instance=\"cache\"} 0.0",
            "ttlsweep_tasks_ended_total{redis_instance=\"cache\",cause=\"schedule\",state=\"failed\"} 0",
            "ttlsweep_due_times_total{redis_instance=\"cache\",outcome=\"missed\"} 0",
        ] {
            assert!(text.contains(series), "{series}\n{text}");
        }
    }

    #[test]
    fn the_older_format_declares_what_its_samples_are_called() {
        let metrics = Metrics::default();
        metrics.due("cache", "run");
        let text = metrics.encode_classic();
        assert!(text.contains("# TYPE ttlsweep_due_times_total counter\nttlsweep_due_times_total{"), "{text}");
        assert!(text.contains("# TYPE ttlsweep_build_info gauge\nttlsweep_build_info{"), "{text}");
        assert!(!text.contains("# EOF") && !text.contains("# UNIT"));
        assert!(metrics.encode().ends_with("# EOF\n"));
    }
}
