//! The records: a file and a database that several daemons share keep the same promises.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tempfile::TempDir;
use ttlsweep::model::bounds::Bounds;
use ttlsweep::model::failure::{Failure, FailureKind};
use ttlsweep::model::progress::{PassCheckpoint, PassCounters, PassFigures, ShardView};
use ttlsweep::model::schedule::{AutoScan, BacklogSize, Recurrence};
use ttlsweep::model::shard::{DbIndex, ScanPosition, ShardId};
use ttlsweep::model::task::{Cause, Task, TaskId, TaskState};
use ttlsweep::model::throttle::Reason;
use ttlsweep::settings::store::StoreLocation;
use ttlsweep::store::{Claim, DaemonId, DaemonRecord, DueOutcome, DuePosition, Fleet, Store, StoreError, TaskFilter};

use crate::support::clients::output;
use crate::support::postgres::Postgres;
use crate::support::{PATIENCE, probe, ttlsweep};

/// A store of each kind, with its folder and its server.
async fn stores() -> Vec<(Store, TempDir, Option<Postgres>)> {
    let file = tempfile::tempdir().unwrap();
    let mut stores = vec![(Store::open_file(&file.path().join("s.db")).await.unwrap(), file, None)];
    if let Some(postgres) = Postgres::start().await {
        let (store, journal) = shared(&postgres).await;
        stores.push((store, journal, Some(postgres)));
    }
    stores
}

async fn shared(postgres: &Postgres) -> (Store, TempDir) {
    let journal = tempfile::tempdir().unwrap();
    let location = StoreLocation::parse(&postgres.url(), None, journal.path()).unwrap();
    (Store::open(&location).await.unwrap(), journal)
}

/// Shared records with a name for the test's messages, and their server.
struct Shared {
    store: Store,
    fleet: Fleet,
    _postgres: Postgres,
    _journal: TempDir,
}

impl Shared {
    async fn start() -> Option<Self> {
        let postgres = Postgres::start().await?;
        let (store, journal) = shared(&postgres).await;
        let fleet = store.fleet().expect("shared records");
        Some(Self { store, fleet, _postgres: postgres, _journal: journal })
    }
}

fn task(store: &Store, instance: &str) -> Task {
    let now = store.now();
    Task {
        id: TaskId::at(now),
        instance_id: instance.to_owned(),
        project_id: "p".to_owned(),
        target: "redis://h".to_owned(),
        sweep: BTreeMap::from([("count".to_owned(), "50".to_owned())]),
        respect_window: true,
        cause: Cause::Api,
        state: TaskState::Waiting,
        created_at: Timestamp::from_millisecond(now.as_millisecond()).unwrap(),
        started_at: None,
        finished_at: None,
        num: 0,
        spent: Duration::ZERO,
        failure: None,
        note: None,
        owner: None,
        fence: 0,
        place: String::new(),
    }
}

fn ended(task: &Task, state: TaskState) -> Task {
    Task { state, finished_at: Some(task.created_at), ..task.clone() }
}

#[tokio::test]
async fn a_record_comes_back_as_it_was_written() {
    for (store, ..) in stores().await {
        let mut task = task(&store, "a");
        store.insert(&task, None).await.unwrap();
        assert_eq!(store.task(task.id).await.unwrap().as_ref(), Some(&task));
        task.state = TaskState::Failed;
        task.started_at = Some(task.created_at);
        task.finished_at = Some(task.created_at);
        task.num = u64::MAX >> 1;
        task.spent = Duration::from_micros(1_234_567);
        // A server's error may hold what a text of PostgreSQL may not: a zero byte.
        task.failure = Some(Failure::new(FailureKind::TooSlow, "slow\0er").hint("faster"));
        task.note = Some("ä ' \" \\".to_owned());
        let shard = ShardId("10.0.0.1:6379".to_owned());
        let checkpoint = PassCheckpoint {
            position: ScanPosition::from_reply(u64::MAX - 1),
            process: Some(u64::MAX),
            ..PassCheckpoint::default()
        };
        let held = BTreeMap::from([(Reason::Latency, Duration::from_millis(5))]);
        let counters = PassCounters { scanned: 7, reclaimed: 5, batches: 3, held, ..PassCounters::default() };
        let figures = PassFigures { checkpoint, counters, ..PassFigures::default() };
        let view = ShardView { passes: BTreeMap::from([(DbIndex(3), figures.clone())]), ..ShardView::default() };
        let view = Arc::new(view);
        for _ in 0..2 {
            store.checkpoint(&task, [(&shard, &view)].into_iter()).await.unwrap();
        }
        task.failure = Some(Failure::new(FailureKind::TooSlow, "slower").hint("faster"));
        assert_eq!(store.task(task.id).await.unwrap(), Some(task.clone()));
        assert_eq!(store.shards(task.id).await.unwrap()[&shard].view.passes[&DbIndex(3)], figures);
        assert_eq!(store.latest("a").await.unwrap(), Some(task));
        assert_eq!(store.latest("b").await.unwrap(), None);
    }
}

#[tokio::test]
async fn lists_filter_count_and_sum_the_same() {
    for (store, ..) in stores().await {
        let mut tasks = Vec::new();
        for number in 0..6_u64 {
            let mut one = task(&store, if number % 2 == 0 { "a" } else { "b" });
            one.project_id = format!("p{}", number % 3);
            one = ended(&one, if number == 5 { TaskState::Failed } else { TaskState::Succeeded });
            one.num = number;
            store.insert(&one, None).await.unwrap();
            tasks.push(one);
        }
        let ids = |page: &[Task]| page.iter().map(|task| task.id).collect::<Vec<_>>();
        let all = store.page(&TaskFilter::default(), 0, 4).await.unwrap();
        assert_eq!((ids(&all.tasks), all.count, all.total), (ids(&tasks).into_iter().rev().take(4).collect(), 6, 15));
        let filter = TaskFilter {
            projects: Some(vec!["p0".into(), "p2".into()]),
            instance_id: Some("b".into()),
            states: vec![TaskState::Succeeded, TaskState::Failed],
            cause: Some(Cause::Api),
            before: Some(tasks[5].id),
        };
        assert_eq!(ids(&store.page(&filter, 0, 9).await.unwrap().tasks), [tasks[3].id]);
        let nobody = TaskFilter { projects: Some(Vec::new()), ..TaskFilter::default() };
        assert_eq!(store.page(&nobody, 0, 9).await.unwrap().count, 0);
        let successes = store.last_successes().await.unwrap();
        assert_eq!(successes["a"], tasks[4].created_at);
        assert_eq!(successes["b"], tasks[3].created_at);
        // The newest task of each instance and its newest success stay.
        let later = store.now() + SignedDuration::from_hours(1);
        assert_eq!(store.prune(later, 1_000).await.unwrap(), 3);
        let kept = store.page(&TaskFilter::default(), 0, 9).await.unwrap();
        assert_eq!(ids(&kept.tasks), [tasks[5].id, tasks[4].id, tasks[3].id]);
    }
}

#[tokio::test]
async fn a_due_time_is_dealt_with_once() {
    for (store, ..) in stores().await {
        let at = Timestamp::from_second(1_800_000_000).unwrap();
        let due = DueOutcome { at, outcome: "run" };
        let first = ended(&task(&store, "a"), TaskState::Succeeded);
        store.insert(&first, Some(due)).await.unwrap();
        let again = ended(&task(&store, "a"), TaskState::Succeeded);
        assert!(matches!(store.insert(&again, Some(due)).await, Err(StoreError::AlreadyHandled)));
        assert_eq!(store.task(again.id).await.unwrap(), None, "both or neither");
        assert_eq!(store.skip("a", &[DueOutcome { at, outcome: "missed" }]).await.unwrap(), []);
        let earlier = DueOutcome { at: at - SignedDuration::from_secs(5), outcome: "missed" };
        assert_eq!(store.skip("a", &[earlier, earlier]).await.unwrap(), [earlier]);
        let schedules = store.schedules().await.unwrap();
        assert_eq!(
            schedules.position("a"),
            Some(&DuePosition { handled: at, schedule: None }),
            "the position never goes back"
        );
        assert_eq!(schedules.position("b"), None);
    }
}

#[tokio::test]
async fn an_automatic_scan_belongs_to_the_project_that_set_it() {
    for (store, ..) in stores().await {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let recurrence = Recurrence::Every { first: Some(now), interval_s: 60 };
        let config = AutoScan { enabled: true, recurrence, timeout_s: 120, count: 10, updated_at: Some(now) };
        store.set_auto_scan("a", "p", Some(&config), now).await.unwrap();
        assert_eq!(store.auto_scan("a", "p").await.unwrap().as_ref(), Some(&config));
        assert_eq!(store.auto_scan("a", "other").await.unwrap(), None);
        let schedules = store.schedules().await.unwrap();
        assert_eq!(schedules.auto_scan("a", "p"), Some(&config));
        assert_eq!(schedules.auto_scan("a", "other"), None);
        store.set_auto_scan("a", "p", None, now).await.unwrap();
        assert_eq!(store.auto_scan("a", "p").await.unwrap(), None);
    }
}

#[tokio::test]
async fn bounds_and_the_last_forecast_belong_to_the_project_that_set_them() {
    for (store, ..) in stores().await {
        let bounds =
            Bounds { max_backlog: Some(BacklogSize::Percent(2.5)), max_delay: Some(Duration::from_millis(1_500)) };
        store.set_keep("a", "p", Some(bounds), store.now()).await.unwrap();
        store.set_keep("b", "p", Some(Bounds::default()), store.now()).await.unwrap();
        let keeps = store.keeps().await.unwrap();
        assert_eq!((keeps.get("a", "p"), keeps.get("a", "q"), keeps.get("c", "p")), (Some(bounds), None, None));
        assert_eq!(keeps.get("b", "p"), Some(Bounds::default()), "not kept, whatever the settings say");
        store.set_keep("a", "p", None, store.now()).await.unwrap();
        assert_eq!(store.keeps().await.unwrap().get("a", "p"), None);

        let before = store.now().checked_sub(SignedDuration::from_secs(1)).unwrap();
        for forecast in ["{}", "{\"at\": 1}"] {
            store.set_forecast("a", "p", forecast).await.unwrap();
        }
        assert_eq!(store.forecast("a", "p").await.unwrap().as_deref(), Some("{\"at\": 1}"));
        assert_eq!(store.forecast("a", "q").await.unwrap(), None);
        assert_eq!(store.forecasts_after(before).await.unwrap(), BTreeSet::from(["a".to_owned()]));
        assert!(store.forecasts_after(store.now() + SignedDuration::from_secs(1)).await.unwrap().is_empty());
    }
}

async fn member(fleet: &Fleet, lease: Duration) -> DaemonId {
    let id = DaemonId::generate();
    let record = DaemonRecord {
        id,
        name: "d".into(),
        version: "1".into(),
        address: "h:1".into(),
        labels: vec!["net=a".into(), "net=b".into()],
        settings: "hash".into(),
        started_at: Timestamp::from_second(1_800_000_000).unwrap(),
    };
    fleet.join(&record, lease).await.unwrap();
    id
}

fn claim(owner: DaemonId, most: usize) -> Claim {
    Claim { owner, labels: Vec::new(), most, of_keeps: false, most_of_all: None, but: Vec::new() }
}

const LONG: Duration = Duration::from_secs(3600);
/// A lease that has already run out.
const NONE: Duration = Duration::ZERO;

#[tokio::test]
async fn there_is_never_a_second_unfinished_task_of_an_instance() {
    let Some(postgres) = Postgres::start().await else { return };
    let (store, _journal) = shared(&postgres).await;
    let first = task(&store, "a");
    store.insert(&first, None).await.unwrap();
    assert!(matches!(store.insert(&task(&store, "a"), None).await, Err(StoreError::Unfinished(_))));
    store.update(&ended(&first, TaskState::Cancelled)).await.unwrap();
    store.insert(&task(&store, "a"), None).await.unwrap();
}

#[tokio::test]
async fn tasks_are_claimed_once_the_oldest_first_and_by_who_reaches_them() {
    let Some(shared) = Shared::start().await else { return };
    let (store, fleet) = (shared.store.clone(), shared.fleet.clone());
    let (one, two) = (member(&fleet, LONG).await, member(&fleet, LONG).await);
    let mut tasks = Vec::new();
    for (number, place) in ["", "", "net=b", "net=z", ""].into_iter().enumerate() {
        let mut new = task(&store, &format!("i{number}"));
        new.place = place.to_owned();
        store.insert(&new, None).await.unwrap();
        tasks.push(new.id);
    }
    let got = |claimed: Result<Vec<Task>, StoreError>| claimed.unwrap().iter().map(|task| task.id).collect::<Vec<_>>();
    assert_eq!(got(fleet.claim(&claim(one, 1)).await), [tasks[0]]);
    let but = Claim { but: vec![tasks[1]], labels: vec!["net=a".into(), "net=b".into()], ..claim(two, 1) };
    assert_eq!(got(fleet.claim(&but).await), [tasks[2]], "not what it is told to leave");
    let capped = |most_of_all| Claim { most_of_all: Some(most_of_all), but: vec![tasks[0]], ..claim(one, 9) };
    assert_eq!(got(fleet.claim(&capped(2)).await), []);
    assert_eq!(got(fleet.claim(&capped(3)).await), [tasks[1]]);
    assert_eq!(got(fleet.claim(&claim(two, 9)).await), [tasks[4]], "and nothing that its network does not reach");
    let has = Claim { but: vec![tasks[0], tasks[1]], ..claim(one, 9) };
    assert_eq!(got(fleet.claim(&has).await), []);
    let lost = Claim { but: vec![tasks[0]], ..claim(one, 9) };
    assert_eq!(got(fleet.claim(&lost).await), [tasks[1]], "an answer that was lost on its way is given again");
    let daemons = fleet.daemons().await.unwrap();
    let held: Vec<usize> = daemons.iter().map(|daemon| daemon.tasks.len()).collect();
    assert_eq!(held.iter().sum::<usize>(), 4, "{held:?}");
}

#[tokio::test]
async fn a_late_write_of_an_earlier_owner_changes_nothing() {
    let Some(shared) = Shared::start().await else { return };
    let (store, fleet) = (shared.store.clone(), shared.fleet.clone());
    store.insert(&task(&store, "a"), None).await.unwrap();
    let (gone, next) = (member(&fleet, NONE).await, member(&fleet, LONG).await);
    let old = fleet.claim(&claim(gone, 1)).await.unwrap().remove(0);
    assert_eq!(fleet.reap().await.unwrap(), [gone.to_string()]);
    assert!(!fleet.renew(gone, "hash", LONG).await.unwrap(), "it learns that it is gone");
    let late = Task { num: 99, ..old.clone() };
    assert!(matches!(store.update(&late).await, Err(StoreError::Fenced(_))));
    assert!(fleet.claim(&claim(gone, 1)).await.is_err(), "and can claim nothing");
    let mut claimed = Vec::new();
    // The rows stay locked until the server has noticed the end of that attempt.
    probe("another claims it", PATIENCE, async || {
        claimed = fleet.claim(&claim(next, 1)).await.unwrap();
        !claimed.is_empty()
    })
    .await;
    let new = claimed.remove(0);
    assert!(new.fence > old.fence);
    let shard = ShardId("s".to_owned());
    let view = Arc::new(ShardView::default());
    let late = store.checkpoint(&late, [(&shard, &view)].into_iter()).await;
    assert!(matches!(late, Err(StoreError::Fenced(_))));
    assert!(store.shards(old.id).await.unwrap().is_empty(), "all of it or nothing");
    assert_eq!(store.task(old.id).await.unwrap(), Some(new));
}

#[tokio::test]
async fn a_daemon_that_renews_in_time_keeps_its_tasks_and_one_that_leaves_frees_them() {
    let Some(shared) = Shared::start().await else { return };
    let (store, fleet) = (shared.store.clone(), shared.fleet.clone());
    store.insert(&task(&store, "a"), None).await.unwrap();
    let one = member(&fleet, NONE).await;
    let taken = fleet.claim(&claim(one, 1)).await.unwrap().remove(0);
    assert!(fleet.renew(one, "hash", LONG).await.unwrap(), "late, and nobody took anything");
    assert_eq!(fleet.reap().await.unwrap(), Vec::<String>::new());
    store.update(&taken).await.unwrap();
    fleet.leave(one).await.unwrap();
    assert!(fleet.daemons().await.unwrap().is_empty());
    assert_eq!(store.task(taken.id).await.unwrap().unwrap().owner, None);
}

#[tokio::test]
async fn many_claims_at_once_give_each_task_to_one_daemon() {
    let Some(shared) = Shared::start().await else { return };
    let (store, fleet) = (shared.store.clone(), shared.fleet.clone());
    for number in 0..60 {
        store.insert(&task(&store, &format!("i{number}")), None).await.unwrap();
    }
    let mut claims = tokio::task::JoinSet::new();
    for _ in 0..6 {
        let (fleet, id) = (fleet.clone(), member(&fleet, LONG).await);
        claims.spawn(async move {
            let mut got = Vec::new();
            loop {
                match fleet.claim(&Claim { but: got.clone(), ..claim(id, 3) }).await.unwrap() {
                    tasks if tasks.is_empty() => return got,
                    tasks => got.extend(tasks.into_iter().map(|task| task.id)),
                }
            }
        });
    }
    let mut got: Vec<TaskId> = claims.join_all().await.into_iter().flatten().collect();
    got.sort();
    let count = got.len();
    got.dedup();
    assert_eq!((count, got.len()), (60, 60));
}

#[tokio::test]
async fn a_database_that_is_not_there_is_named_without_its_password() {
    let location = StoreLocation::parse("postgres://me:s3cret@127.0.0.1:1/records", None, Path::new("j")).unwrap();
    let error = Store::open(&location).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("postgres://me@127.0.0.1:1/records") && !text.contains("s3cret"), "{text}");
    assert!(error.hint().is_some());
}

#[tokio::test]
async fn records_are_copied_whole_and_a_copy_that_was_cut_goes_on() {
    let Some(postgres) = Postgres::start().await else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s.db");
    let source = Store::open_file(&path).await.unwrap();
    let at = Timestamp::from_second(1_800_000_000).unwrap();
    let shard = ShardId("s".to_owned());
    let counters = PassCounters { reclaimed: 7, scanned: 9, batches: 1, ..PassCounters::default() };
    let figures = PassFigures { counters, ..PassFigures::default() };
    let view = Arc::new(ShardView { passes: BTreeMap::from([(DbIndex(0), figures)]), ..ShardView::default() });
    let mut tasks = Vec::new();
    for number in 0..250_i64 {
        let one = task(&source, &format!("i{number}"));
        let one = if number == 0 { one } else { Task { num: 7, ..ended(&one, TaskState::Succeeded) } };
        source
            .insert(&one, Some(DueOutcome { at: at + SignedDuration::from_secs(number), outcome: "run" }))
            .await
            .unwrap();
        source.checkpoint(&one, [(&shard, &view)].into_iter()).await.unwrap();
        tasks.push(one);
    }
    let recurrence = Recurrence::Every { first: Some(at), interval_s: 60 };
    let config = AutoScan { enabled: true, recurrence, timeout_s: 120, count: 10, updated_at: Some(at) };
    source.set_auto_scan("i1", "p", Some(&config), at).await.unwrap();
    let bounds = Bounds { max_backlog: Some(BacklogSize::Bytes(1 << 20)), max_delay: None };
    source.set_keep("i1", "p", Some(bounds), at).await.unwrap();
    let (target, _journal) = shared(&postgres).await;
    // A part of the copy is there already.
    target.insert(&tasks[3], None).await.unwrap();
    source.close().await;
    drop(source);
    let url = postgres.url();
    let copy = async |from: String, to: String| {
        let mut command = ttlsweep();
        command.args(["store", "copy", "--json", "--from", &from, "--to", &to]);
        output(command).await
    };
    let file = format!("sqlite:{}", path.display());
    let back = format!("sqlite:{}", folder.path().join("back.db").display());
    for (from, to) in [(&file, &url), (&file, &url), (&url, &back)] {
        let run = copy(from.clone(), to.clone()).await;
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let seen: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
        assert_eq!(seen["from"], seen["to"], "{seen:#}");
        assert_eq!((&seen["to"]["tasks"], &seen["to"]["reclaimed"]), (&250.into(), &(249 * 7).into()));
        assert_eq!((&seen["to"]["auto_scans"], &seen["to"]["due_times"]), (&1.into(), &250.into()));
    }
    let back = Store::open_file(&folder.path().join("back.db")).await.unwrap();
    for task in &tasks {
        assert_eq!(back.task(task.id).await.unwrap().as_ref(), Some(task));
    }
    assert_eq!(back.shards(tasks[9].id).await.unwrap()[&shard].view, *view);
    assert_eq!(back.auto_scan("i1", "p").await.unwrap(), Some(config));
    assert_eq!(back.keeps().await.unwrap().get("i1", "p"), Some(bounds));
    let fleet = target.fleet().expect("shared records");
    member(&fleet, LONG).await;
    let refused = copy(url, file).await;
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("stop them"), "{refused:?}");
}
