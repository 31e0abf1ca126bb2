//! A sweep that was interrupted or killed goes on where it was, and its count is correct.

use std::path::Path;

use serde_json::Value;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection};

use crate::support::{
    PATIENCE,
    keyspace::Keyspace,
    probe,
    run::{Run, Running, run, scan, state_file},
    server::Server,
};

/// Slow enough for a test to act during the sweep.
const SLOW: [&str; 2] = ["--max-keys-per-sec", "1500"];

#[tokio::test(flavor = "multi_thread")]
async fn sigint_ends_the_batch_prints_the_report_and_resume_finishes() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(2_000, "live").await;
    keys.expired(4_000, "expired").await;
    let (_dir, state) = state_file();
    let state = state.to_str().unwrap();
    for signal in ["INT", "TERM"] {
        let before = server.expired_keys().await;
        let resume = if before > 0 { &["--resume"][..] } else { &[] };
        let running = Running::scan(&server.url(), &[&SLOW[..], &["--state", state], resume].concat());
        probe("the pass is under way", PATIENCE, async || server.expired_keys().await > before + 300).await;
        running.signal(signal);
        let ended = running.end().await.expect(130);
        assert_eq!(ended.json()["report"]["state"], "interrupted");
        assert_eq!(ended.num(), server.expired_keys().await, "SIG{signal}");
        assert!(ended.stderr.contains("--resume"), "{}", ended.stderr);
    }
    for resume in ["--resume", "--resume=auto"] {
        let other = scan(&format!("{}/3", server.url()), &["--state", state, resume]).await.expect(2);
        assert!(other.stderr.contains("is of each DB that holds keys with a TTL, and not of DB 3"), "{}", other.stderr);
    }
    let first_id = scan(&server.url(), &["--state", state, "--resume"]).await.expect(0);
    assert_eq!(first_id.num(), 4_000);
    assert_eq!(first_id.json()["report"]["shards"][0]["dbs"][0]["restarts"], 0, "the cursor was good");
    let nothing_left = scan(&server.url(), &["--state", state, "--resume"]).await.expect(2);
    assert!(nothing_left.stderr.contains("no unfinished sweep"), "{}", nothing_left.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn sigkill_loses_no_more_than_the_count_of_the_batch_under_way() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(2_000, "live").await;
    keys.expired(8_000, "expired").await;
    let (_dir, state) = state_file();
    let state = state.to_str().unwrap();
    const KILLS: u64 = 5;
    for kill in 0..KILLS {
        let before = server.expired_keys().await;
        let resume = if kill > 0 { &["--resume"][..] } else { &[] };
        // COUNT cannot grow here: a batch has at most one hundred keys, and those of one more bucket.
        let more = ["--max-slice", "1us", "--count", "100", "--state", state];
        let running = Running::scan(&server.url(), &[&SLOW[..], &more, resume].concat());
        probe("the pass is under way", PATIENCE, async || server.expired_keys().await > before + 500).await;
        running.signal("KILL");
        assert_eq!(running.end().await.code, None);
    }
    let ended = scan(&server.url(), &["--state", state, "--resume"]).await.expect(0);
    assert_eq!(server.expired_keys().await, 8_000, "every expired key is gone");
    let num = ended.num();
    assert!(num <= 8_000 && num + KILLS * 110 >= 8_000, "{num}");
    // Each kill may have lost the batches of two workers, or of one at the end, and one that was being counted; the report says so.
    let lost = ended.total("lost_replies") as u64;
    assert!((2 * KILLS..=3 * KILLS).contains(&lost), "{ended:?}");
    assert_eq!(server.dbsize(0).await, 2_000);
    assert_eq!(ended.json()["report"]["shards"][0]["dbs"][0]["restarts"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_known_before_a_signal_is_known_after_a_resume() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(1_000, "never").await;
    keys.live_ttl(3_000, "ttl").await;
    keys.expired(2_000, "expired").await;
    let (_dir, state) = state_file();
    let asked = [&SLOW[..], &["--state", state.to_str().unwrap(), "--touch", "ttl"]].concat();
    let running = Running::scan(&server.url(), &asked);
    probe("the pass is under way", PATIENCE, async || server.expired_keys().await > 500).await;
    running.signal("INT");
    let first = running.end().await.expect(130);
    let second = scan(&server.url(), &[&asked[..], &["--resume"]].concat()).await.expect(0);
    let keys_by_ttl = |run: &Run| {
        let ttl = run.json()["report"]["shards"][0]["dbs"][0]["ttl"].clone();
        let within = ttl["within_s"].as_object().expect("a histogram").values().filter_map(Value::as_u64);
        within.sum::<u64>() + ttl["later"].as_u64().unwrap() + ttl["never"].as_u64().unwrap()
    };
    let before = keys_by_ttl(&first);
    assert!((100..3_900).contains(&before), "it was interrupted in the middle: {before}");
    assert_eq!(keys_by_ttl(&second), 4_000, "each key that lives is filed once, whichever process met it");
    for name in ["active_s", "waited_s", "rested_s"] {
        assert!(second.total(name) >= first.total(name), "{name}: {first:?} {second:?}");
    }
    assert_eq!(second.num(), 2_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_journal_that_is_gone_or_damaged_is_noticed_and_the_count_is_said_to_be_the_least() {
    for damage in ["removed", "cut", "noise"] {
        let server = Server::start().await;
        Keyspace::of(&server, 0).expired(12_000, "expired").await;
        let (_dir, state) = state_file();
        let journal = state.with_file_name(format!("{}.tally", state.file_name().unwrap().to_str().unwrap()));
        let args = ["--state", state.to_str().unwrap()];
        let running = Running::scan(&server.url(), &[&SLOW[..], &args].concat());
        probe("a checkpoint is behind it", PATIENCE, async || server.expired_keys().await > 3_500).await;
        running.signal("KILL");
        running.end().await;
        for file in std::fs::read_dir(&journal).expect("it is there").map(|entry| entry.expect("an entry").path()) {
            let bytes = std::fs::read(&file).expect("it can be read");
            match damage {
                "removed" => std::fs::remove_file(&file).expect("it is removed"),
                "cut" => std::fs::write(&file, &bytes[..bytes.len() / 2]).expect("it is written"),
                _ => std::fs::write(&file, vec![0xA5; bytes.len()]).expect("it is written"),
            }
        }
        let run = scan(&server.url(), &[&args[..], &["--resume"]].concat()).await.expect(0);
        assert_eq!(server.dbsize(0).await, 0, "{damage}");
        let warnings = run.json()["report"]["shards"][0]["warnings"].to_string();
        assert!(warnings.contains("is at least the one shown"), "{damage}: {}", run.stdout);
        assert!(run.num() <= 12_000 && run.total("lost_replies") >= 1.0, "{damage}: {}", run.stdout);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_of_another_process_is_not_used() {
    let mut server = Server::start().await;
    Keyspace::of(&server, 0).expired(3_000, "old").await;
    let (_dir, state) = state_file();
    let state = state.to_str().unwrap();
    let running = Running::scan(&server.url(), &[&SLOW[..], &["--state", state]].concat());
    probe("the pass is under way", PATIENCE, async || server.expired_keys().await > 300).await;
    running.signal("INT");
    let first = running.end().await.expect(130).num();
    server.restart().await;
    Keyspace::of(&server, 0).expired(1_000, "new").await;
    let ended = scan(&server.url(), &["--state", state, "--resume"]).await.expect(0);
    assert_eq!(ended.num(), first + 1_000, "the pass began again and missed nothing");
    assert_eq!(server.dbsize(0).await, 0);
    let warnings = ended.json()["report"]["shards"][0]["warnings"].to_string();
    assert!(warnings.contains("restarted since the checkpoint"), "{warnings}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_of_the_checkpoint_is_not_used_where_another_process_answers_before_its_db_has_its_turn() {
    let mut server = Server::start().await;
    Keyspace::of(&server, 1).expired(9_000, "first").await;
    let (_dir, state) = state_file();
    let with_state = ["--state", state.to_str().unwrap()];
    let running = Running::scan(&server.url(), &[&SLOW[..], &with_state].concat());
    probe("the pass is well under way", PATIENCE, async || server.expired_keys().await > 5_000).await;
    running.signal("INT");
    running.end().await.expect(130);

    Keyspace::of(&server, 0).expired(6_000, "another").await;
    let before = server.expired_keys().await;
    let running = Running::scan(&server.url(), &[&SLOW[..], &with_state, &["--resume"]].concat());
    probe("the DB before is under way", PATIENCE, async || server.expired_keys().await > before + 300).await;
    // Otherwise the sweep would find the new process empty, and end.
    running.signal("STOP");
    server.restart().await;
    Keyspace::of(&server, 1).expired(9_000, "second").await;
    running.signal("CONT");
    let run = running.end().await.expect(0);
    assert_eq!(server.dbsize(1).await, 0, "{}", run.stdout);
    let dbs = run.json()["report"]["shards"][0]["dbs"].clone();
    assert_eq!(dbs[1]["restarts"], 1, "{dbs}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_sweep_is_kept_away_from_the_state_file_of_one_that_runs() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(15_000, "expired").await;
    let (_dir, state) = state_file();
    let with_state = ["--state", state.to_str().unwrap()];
    let running = Running::scan(&server.url(), &[&SLOW[..], &with_state].concat());
    probe("the pass is under way", PATIENCE, async || server.expired_keys().await > 300).await;
    let second = scan(&server.url(), &[&with_state[..], &["--resume=auto"]].concat()).await.expect(1);
    assert!(second.stderr.contains("another ttlsweep uses the records in"), "{}", second.stderr);
    assert_eq!(running.end().await.expect(0).num(), 15_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_cuts_even_where_the_server_hangs() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(3_000, "d").await;
    let mut running = Running::scan(&server.url(), &SLOW);
    probe("the pass is under way", PATIENCE, async || server.expired_keys().await > 300).await;
    server.sigstop();
    running.signal("INT");
    running.says("a second signal stops at once").await;
    running.signal("INT");
    probe("it is cut", PATIENCE, async || !running.is_running()).await;
    server.sigcont();
    assert_eq!(running.end().await.code, Some(130));
}

#[tokio::test(flavor = "multi_thread")]
async fn resume_without_something_to_resume_is_a_usage_error() {
    let server = Server::start().await;
    let (_dir, state) = state_file();
    let state = state.to_str().unwrap();
    let no_file = scan(&server.url(), &["--resume"]).await.expect(2);
    assert!(no_file.stderr.contains("--state FILE"), "{}", no_file.stderr);
    let missing = scan(&server.url(), &["--resume", "--state", state]).await.expect(2);
    assert!(missing.stderr.contains("there is no state file"), "{}", missing.stderr);
    // As a timer runs it each night: it begins a new sweep if there is none to go on with.
    for _ in 0..2 {
        scan(&server.url(), &["--resume=auto", "--state", state]).await.expect(0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_whose_time_was_over_goes_on_where_it_was() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.expired(3_000, "d").await;
    keys.live(3_000, "l").await;
    let (_dir, state) = state_file();
    let state = state.to_str().unwrap();
    let slowly = ["--max-keys-per-sec", "2000", "--timeout", "1s", "--state", state];
    let over = scan(&server.url(), &slowly).await.expect(4);
    assert!((1..3_000).contains(&over.num()), "{}", over.num());
    assert!(over.stderr.contains("--resume"), "{}", over.stderr);
    let before = over.total("scanned");
    let whole = scan(&server.url(), &["--state", state, "--resume"]).await.expect(0);
    assert_eq!((whole.num(), whole.json()["id"].clone()), (3_000, over.json()["id"].clone()), "the same task");
    let again = whole.total("scanned") - 6_000.0;
    assert!(again < before / 2.0, "{again} keys were looked at twice, of {before} before");
    scan(&server.url(), &[&slowly[..], &["--db", "0"]].concat()).await.expect(4);
    let anew = scan(&server.url(), &["--state", state]).await.expect(0);
    assert!(anew.stderr.contains("the unfinished sweep in the state file is given up"), "{}", anew.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_file_that_cannot_be_used_is_said_before_anything_is_swept() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(10, "d").await;
    let (dir, state) = state_file();
    std::fs::write(&state, "this is no database, and long enough to be read as one".repeat(100)).unwrap();
    for (path, hint) in [
        (state.to_str().unwrap(), "it was not changed"),
        (dir.path().to_str().unwrap(), "it was not changed"),
        ("/dev/null", "it was not changed"),
        ("/proc/no/such/place.db", "create its folder first"),
    ] {
        let run = run(["scan", &server.url(), "--state", path]).await.expect(1);
        assert!(run.stderr.contains(&format!("cannot open the state file {path}: ")), "{}", run.stderr);
        assert!(run.stderr.contains(hint), "{}", run.stderr);
    }
    assert_eq!(server.expired_keys().await, 0);
    assert_eq!(names_in(dir.path()), ["sweep.db"], "nothing is left beside it");
    assert!(!Path::new("/dev/null.lock").exists());
    assert!(!dir.path().with_extension("lock").exists());
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_another_program_is_refused_and_left_as_it_is() {
    let server = Server::start().await;
    for (mode, names) in [("delete", &["sweep.db"][..]), ("wal", &["sweep.db", "sweep.db-shm", "sweep.db-wal"])] {
        let (dir, state) = state_file();
        let options = SqliteConnectOptions::new().filename(&state).create_if_missing(true);
        let mut theirs = options.connect().await.unwrap();
        for words in
            [&format!("PRAGMA journal_mode = {mode}"), "CREATE TABLE theirs (x)", "INSERT INTO theirs VALUES (1)"]
        {
            sqlx::query(sqlx::AssertSqlSafe(words.to_owned())).execute(&mut theirs).await.unwrap();
        }
        let read = || {
            names
                .iter()
                .filter(|name| !name.ends_with("-shm"))
                .map(|name| std::fs::read(dir.path().join(name)).unwrap())
        };
        let before: Vec<_> = read().collect();
        let run = run(["scan", &server.url(), "--state", state.to_str().unwrap()]).await.expect(1);
        assert!(run.stderr.contains("it is a database of another program"), "{}", run.stderr);
        assert_eq!(names_in(dir.path()), names, "nothing is left beside it");
        assert!(read().eq(before), "{mode}: nothing in it was changed");
    }
}

/// A file of an earlier version, without an application id.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_ours_without_the_mark_is_gone_on_with() {
    let server = Server::start().await;
    let (_dir, state) = state_file();
    let path = state.to_str().unwrap();
    let id = async || {
        let mut file = SqliteConnectOptions::new().filename(&state).connect().await.unwrap();
        let id: i32 = sqlx::query_scalar("PRAGMA application_id").fetch_one(&mut file).await.unwrap();
        (id, file)
    };
    for _ in 0..2 {
        scan(&server.url(), &["--state", path]).await.expect(0);
        let (marked, mut file) = id().await;
        assert_eq!(marked.to_be_bytes(), *b"TTLS");
        sqlx::query("PRAGMA application_id = 0").execute(&mut file).await.unwrap();
        sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").execute(&mut file).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_state_file_is_said_with_what_to_do() {
    let server = Server::start().await;
    let (_dir, state) = state_file();
    let path = state.to_str().unwrap();
    scan(&server.url(), &["--state", path]).await.expect(0);
    // Otherwise SQLite could restore the file from its log.
    let mut file = SqliteConnectOptions::new().filename(&state).connect().await.unwrap();
    sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").execute(&mut file).await.unwrap();
    file.close().await.unwrap();
    let mut bytes = std::fs::read(&state).unwrap();
    bytes[100..].fill(0x5A);
    std::fs::write(&state, bytes).unwrap();
    let run = scan(&server.url(), &["--state", path]).await.expect(1);
    assert!(
        run.stderr.contains("malformed") && run.stderr.contains("move it away with the files beside it"),
        "{}",
        run.stderr
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_while_keys_are_hidden_does_not_make_them_done() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(3, "live").await;
    keys.expired(2, "expired").await;
    server.cmd(&["CLIENT", "PAUSE", "600000", "WRITE"]).await;
    let (_dir, state) = state_file();
    let state = state.to_str().unwrap();
    let running = Running::scan(&server.url(), &["--state", state]);
    running.says("holding: the server hides expired keys").await;
    running.signal("KILL");
    assert_eq!(running.end().await.code, None);
    let resumed = Running::scan(&server.url(), &["--state", state, "--resume"]);
    resumed.says("holding: the server hides expired keys").await;
    server.cmd(&["CLIENT", "UNPAUSE"]).await;
    assert_eq!(resumed.end().await.expect(0).num(), 2);
    assert_eq!(server.dbsize(0).await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_process_finished_is_not_finished_after_a_restart_and_a_resume() {
    let mut server = Server::start().await;
    Keyspace::of(&server, 0).expired(100, "first").await;
    Keyspace::of(&server, 1).expired(4_000, "second").await;
    let (_dir, state) = state_file();
    let state = state.to_str().unwrap();
    let running = Running::scan(&server.url(), &[&SLOW[..], &["--db", "0,1", "--state", state]].concat());
    probe("the second DB is under way", PATIENCE, async || server.expired_keys().await > 400).await;
    // Otherwise the sweep would find the new process empty, and end.
    running.signal("STOP");
    server.restart().await;
    Keyspace::of(&server, 0).expired(500, "again").await;
    Keyspace::of(&server, 1).expired(9_000, "again").await;
    running.signal("CONT");
    probe("the other process is swept", PATIENCE, async || server.expired_keys().await > 100).await;
    running.signal("INT");
    running.end().await.expect(130);
    scan(&server.url(), &["--db", "0,1", "--state", state, "--resume"]).await.expect(0);
    assert_eq!((server.dbsize(0).await, server.dbsize(1).await), (0, 0));
}
