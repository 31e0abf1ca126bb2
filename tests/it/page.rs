//! The page in a real browser, with a real daemon and a real server: everything that an operator does there. Its pictures are kept
//! below target/screenshots.

use reqwest::Method;
use serde_json::json;
use thirtyfour::Key;

use crate::support::browser::{Browser, ZONE};
use crate::support::daemon::{Daemon, PROJECT, instance, window};
use crate::support::keyspace::{Keyspace, filled};
use crate::support::{PATIENCE, free_port, probe};

const OTHER_PROJECT: &str = "fedcba9876543210fedcba9876543210";
/// More than one page of the list.
const AWAY: usize = 64;

/// Instances at unreachable addresses, some of them in another project.
fn away() -> String {
    let one = |n: usize| {
        let project = if n.is_multiple_of(8) { OTHER_PROJECT } else { PROJECT };
        format!(
            "[[instances]]\nid = \"away-{n:02}\"\nname = \"Catalog {n:02}\"\nproject_id = \"{project}\"\nurl = \"redis://127.0.0.1:{}\"\n",
            free_port()
        )
    };
    (0..AWAY).map(one).collect()
}

fn named(text: &str, name: &str) -> String {
    text.replacen("project_id", &format!("name = \"{name}\"\nproject_id"), 1)
}

const NAMES: &str = "table.instances tbody .name";

async fn names(browser: &Browser) -> Vec<String> {
    browser.texts(NAMES).await
}

#[tokio::test]
async fn instances_are_found_by_name_state_and_project_and_sorted_and_paged() {
    let Some(browser) = Browser::start().await else { return };
    let server = filled(2_000, 500).await;
    let settings = [named(&instance("cache", &server.url(), &window(false)), "Session cache"), away()].concat();
    let daemon = Daemon::start(&settings).await;
    let swept = daemon.scan("cache").await;
    daemon.until(&swept, "succeeded").await;
    for n in 1..4 {
        let failed = daemon.create(json!({"instance_id": format!("away-{n:02}")})).await;
        daemon.until(&failed, "failed").await;
    }

    browser.open(&format!("{}/", daemon.url()), "list").await;
    assert_eq!(names(&browser).await.len(), 50, "a page");
    assert_eq!(browser.texts(".pager span").await, ["1–50 of 65"]);
    browser.until_text("#zone", &format!("{ZONE}, UTC+4:30")).await;
    browser.until("document.getElementById('live').dataset.live === 'on'").await;
    assert!(browser.texts(".chip").await.concat().contains("failed3"), "{:?}", browser.texts(".chip").await);
    browser.assert_accessible("the list").await;
    browser.picture("list").await;
    browser.click(".pager button:last-child").await;
    browser.until("document.querySelector('.pager span').textContent === '51–65 of 65'").await;
    assert_eq!(names(&browser).await.last().map(String::as_str), Some("Session cache"));

    // By keyboard alone: a slash moves to the search, a tab from there on.
    browser.keys("/").await;
    browser.keys("session").await;
    browser.until(&format!("document.querySelectorAll('{NAMES}').length === 1")).await;
    assert_eq!(names(&browser).await, ["Session cache"], "by name, on whichever page it was");
    assert_eq!(browser.value("document.activeElement.id").await, "search", "who types is not disturbed");
    let row = browser.texts("table.instances tbody tr").await.concat();
    assert!(row.contains("succeeded") && row.contains("500") && row.contains("closed"), "{row}");
    browser.fill("#search", " ").await;
    browser.until("document.querySelector('.pager span').textContent.endsWith('of 65')").await;

    browser.click(".chip.s-failed").await;
    browser.until("document.querySelector('.pager span').textContent.endsWith('of 3')").await;
    assert_eq!(names(&browser).await, ["Catalog 01", "Catalog 02", "Catalog 03"]);
    browser.until_text("table.instances tbody .sub.bad", "connect").await;
    browser.picture("list-failed").await;
    browser.click(".chip.s-failed").await;

    browser.run(&format!("const s = document.querySelector('.tools select'); s.value = '{OTHER_PROJECT}'; s.dispatchEvent(new Event('change'));")).await;
    browser.until("document.querySelector('.pager span').textContent.endsWith('of 8')").await;
    assert!(names(&browser).await.iter().all(|name| name.starts_with("Catalog")));
    browser
        .run("const s = document.querySelector('.tools select'); s.value = ''; s.dispatchEvent(new Event('change'));")
        .await;

    let first = format!("document.querySelector('{NAMES}')?.textContent");
    browser.press("Reclaimed").await;
    browser.until(&format!("{first} === 'Session cache'")).await;
    assert_eq!(browser.value("document.querySelector('th[aria-sort]').getAttribute('aria-sort')").await, "descending");
    // The address holds the view, and opens it again.
    browser.run("location.reload();").await;
    browser.until(&format!("{first} === 'Session cache'")).await;
    browser.ready("list").await;

    for (name, width, dark) in [("list-dark", 1360, true), ("list-phone", 390, false), ("list-phone-dark", 390, true)] {
        browser.screen(width, 844, dark).await;
        browser.assert_accessible(name).await;
        browser.picture(name).await;
    }
    browser.assert_no_errors(&[]).await;
}

#[tokio::test]
async fn an_operator_sweeps_with_options_tunes_pauses_resumes_and_cancels() {
    let Some(browser) = Browser::start().await else { return };
    let server = filled(20_000, 2_000).await;
    let daemon = Daemon::start(&named(&instance("cache", &server.url(), ""), "Session cache")).await;
    browser.open(&format!("{}/#/instances/cache", daemon.url()), "instance").await;
    browser.until_text("h1 + span", "never swept").await;

    browser.press("Sweep…").await;
    browser.fill("#f-intensity", "2").await;
    browser.press("Sweep now").await;
    browser.until_text("#f-intensity-wrong", "intensity").await;
    assert_eq!(browser.value("document.activeElement.id").await, "f-intensity", "where it is wrong");
    browser.assert_accessible("a refused sweep").await;
    browser.picture("sweep-refused").await;
    assert_eq!(daemon.history("cache").await["count"], 0);
    browser.fill("#f-intensity", "0.5").await;
    // Every limit of the API is there, with what it does.
    let description = daemon.get("/openapi.json").await.ok();
    let limits = description["components"]["schemas"]["LimitWishes"]["properties"].as_object().expect("an object");
    browser.run("document.querySelector('dialog details').open = true;").await;
    for (name, about) in limits {
        let hint = browser.texts(&format!("#f-{name}-hint")).await;
        assert_eq!(hint, [about["description"].as_str().expect("a description")], "{name}");
    }
    browser.fill("#f-max_replica_silence", "long").await;
    browser.press("Sweep now").await;
    browser.until_text("#f-max_replica_silence-wrong", "max-replica-silence").await;
    browser.assert_accessible("a refused limit").await;
    browser.fill("#f-max_replica_silence", "90s").await;
    browser.fill("#f-max_keys_per_sec", "400").await;
    browser.fill("#f-timeout_s", "2h").await;
    browser.press("Sweep now").await;

    let newest = async || daemon.get("/api/v1/instances/cache").await.ok()["latest"].clone();
    browser.until("!document.querySelector('section.running').hidden").await;
    let task = newest().await;
    let id = task["id"].as_str().expect("an id").to_owned();
    let settings = &task["settings"];
    assert_eq!(
        (&settings["intensity"], &settings["max-keys-per-sec"], &settings["timeout"], &settings["max-replica-silence"]),
        (&json!("0.5"), &json!("400"), &json!("7200s"), &json!("90s"))
    );
    // The view is updated by itself.
    browser.until("document.querySelector('.running .meter i').style.width > '0.5%'").await;
    browser.until("document.querySelector('.running .figures').textContent.includes('keys/s')").await;
    browser.until_text(".running .shard", "DB").await;
    browser.assert_accessible("a sweep that runs").await;
    browser.picture("running").await;

    browser.press("Tune…").await;
    browser.until("document.querySelector('dialog[open]')").await;
    assert_eq!(browser.value("document.getElementById('f-max_keys_per_sec').value").await, "400");
    browser.fill("#f-max_keys_per_sec", "600").await;
    browser.press("Tune").await;
    probe("the ceiling is another", PATIENCE, async || daemon.task(&id).await["settings"]["max-keys-per-sec"] == "600")
        .await;
    browser.until("!document.querySelector('dialog')").await;
    browser.press("Pause").await;
    daemon.until(&id, "paused").await;
    browser.until_text(".running .hold", "paused by request").await;
    browser.picture("paused").await;
    browser.press("Resume").await;
    daemon.until(&id, "running").await;
    browser.press("Cancel").await;
    daemon.until(&id, "cancelled").await;
    browser.until_text("h1 + span", "cancelled").await;
    browser.until("document.querySelector('section.running').hidden").await;
    browser.until_text("table.sweeps tbody", "cancelled").await;

    // A sweep that another client begins is shown too.
    let other = daemon.create(json!({"instance_id": "cache", "max_keys_per_sec": 2000})).await;
    browser.until_text("h1 + span", "running").await;
    daemon.hurry(&other).await;
    browser.until_text("h1 + span", "succeeded").await;
    let freed = daemon.task(&other).await["reclaimed"].as_u64().expect("a number");
    assert!((1_000..2_000).contains(&freed), "{freed}: the first one had begun");
    browser.until_text(".tiles", &format!("{},{:03}", freed / 1_000, freed % 1_000)).await;
    browser.assert_no_errors(&[400, 404]).await;
}

#[tokio::test]
async fn an_instance_shows_what_its_sweeps_brought_and_what_held_them() {
    let Some(browser) = Browser::start().await else { return };
    let server = filled(3_000, 700).await;
    let daemon = Daemon::start(&named(&instance("cache", &server.url(), ""), "Session cache")).await;
    let first = daemon.create(json!({"instance_id": "cache", "max_keys_per_sec": 1000})).await;
    daemon.until(&first, "running").await;
    daemon.post(&format!("/api/v1/tasks/{first}/pause")).await.ok();
    probe("it stands still", PATIENCE, async || daemon.task(&first).await["holds"][0]["reason"] == "paused").await;
    daemon.post(&format!("/api/v1/tasks/{first}/resume")).await.ok();
    daemon.hurry(&first).await;
    daemon.until(&first, "succeeded").await;
    for round in 1..=3 {
        Keyspace::of(&server, 0).expired(round * 400, &format!("more:{round}:")).await;
        let id = daemon.scan("cache").await;
        daemon.until(&id, "succeeded").await;
    }

    browser.open(&format!("{}/#/", daemon.url()), "list").await;
    browser.click(".name").await;
    browser.ready("instance").await;
    assert_eq!(browser.texts("h1").await, ["Session cache"]);
    assert_eq!(browser.value("document.querySelectorAll('.drawing .column').length").await, 4);
    let heights = "[...document.querySelectorAll('.drawing .column')].map((c) => Number(c.querySelector('.bar-fill').getAttribute('height')))";
    let heights: Vec<f64> = serde_json::from_value(browser.value(heights).await).expect("heights");
    // 700, 400, 800 and 1200 keys.
    assert!(heights[1] < heights[0] && heights[0] < heights[2] && heights[2] < heights[3], "{heights:?}");
    assert_eq!(browser.texts(".legend li").await.first().map(String::as_str), Some("paused"));
    browser.run("document.querySelector('.chart').focus();").await;
    browser.keys(Key::Left).await;
    browser.until_text(".readout", "1,200 keys").await;
    browser.keys(Key::Enter).await;
    browser.until_text("tr.opened .shard", "DB").await;
    let shown = browser.texts("tr.opened").await.concat();
    assert!(shown.contains("1,200") && shown.contains("Settings of this sweep"), "{shown}");
    // Each sweep, with its holds.
    browser.click(&format!("tr[data-task=\"{first}\"] button")).await;
    browser.until("document.querySelectorAll('tr.opened').length === 2").await;
    let held = browser.texts("tr.opened").await.pop().expect("the last");
    assert!(held.contains("Held: paused"), "{held}");
    browser.press("Sample…").await;
    browser.press("Sample now").await;
    // There is no replica: the page says what to do.
    browser.until("document.querySelector('dialog p.wrong')?.textContent.length > 10").await;
    browser.assert_accessible("a refused forecast").await;
    browser.click("#f-on_master").await;
    browser.press("Sample now").await;
    browser.until("document.querySelector('.forecast-db svg')").await;
    let outlook = browser.texts(".forecast-db").await.concat();
    assert!(outlook.contains("DB 0 3,000 keys") && outlook.contains("With a TTL3,000"), "{outlook}");

    browser.press("Check now").await;
    browser.until_text(".verdict", "").await;
    browser.until("document.querySelector('.findings')").await;
    assert!(!browser.texts(".verdict").await.concat().is_empty());
    browser.assert_accessible("an instance").await;
    browser.screen(1360, 2000, false).await;
    browser.picture("instance").await;
    for (name, width, dark) in [("instance-dark", 1360, true), ("instance-phone", 390, false)] {
        browser.screen(width, 1600, dark).await;
        browser.until("document.querySelector('.drawing svg').clientWidth <= document.querySelector('.drawing').clientWidth + 1").await;
        browser.assert_accessible(name).await;
        browser.picture(name).await;
    }
    browser.screen(1360, 900, false).await;
    browser.run("location.hash = '#/sweeps';").await;
    browser.ready("sweeps").await;
    let sweeps = browser.texts("tbody tr").await;
    assert!(sweeps.len() == 4 && sweeps.iter().all(|row| row.starts_with("Session cache")), "{sweeps:?}");
    browser.assert_accessible("the sweeps").await;
    browser.run("location.hash = '#/daemons';").await;
    browser.ready("daemons").await;
    browser.assert_accessible("the daemons").await;
    // There was no forecast at first, and there is no replica to make one on.
    browser.assert_no_errors(&[404, 409, 502]).await;
}

#[tokio::test]
async fn a_schedule_is_edited_and_what_is_refused_stands_at_its_field() {
    let Some(browser) = Browser::start().await else { return };
    let server = filled(10, 10).await;
    let settings = [
        named(&instance("cache", &server.url(), ""), "Session cache"),
        "[instances.auto-scan]\nenabled = true\ncron = \"30 3 * * *\"\n".into(),
    ];
    let daemon = Daemon::start(&settings.concat()).await;
    browser.open(&format!("{}/#/instances/cache", daemon.url()), "instance").await;
    let due = daemon.get("/api/v1/instances/cache").await.ok();
    assert_eq!(browser.value("document.querySelector('.due time').dateTime").await, due["upcoming"][0]);
    // 03:30 UTC in the reader's time zone.
    assert!(browser.texts(".due time").await[0].ends_with(" 08:00"), "{:?}", browser.texts(".due time").await);

    browser.press("Edit…").await;
    let set = async |css: &str, value: &str| {
        browser.run(&format!("document.querySelector('{css}').value = '{value}';")).await;
    };
    set("#f-first_scan_at", "2020-01-01T00:00:00").await;
    browser.fill("#f-interval", "6h").await;
    browser.fill("#f-timeout", "1d").await;
    browser.press("Save").await;
    browser.until_text("#f-first_scan_at-wrong", "later than the current time").await;
    set("#f-first_scan_at", "2199-01-01T04:30:00").await;
    browser.fill("#f-timeout", "11h").await;
    browser.press("Save").await;
    browser.until_text("#f-timeout-wrong", "interval * 2").await;
    browser.until("document.querySelector('#f-first_scan_at-wrong').textContent === ''").await;
    browser.assert_accessible("a refused schedule").await;
    browser.picture("schedule-refused").await;
    browser.fill("#f-timeout", "12h").await;
    browser.fill("#f-scan_keys_count", "200").await;
    browser.press("Save").await;
    browser.until("!document.querySelector('dialog')").await;
    let path = Daemon::path("cache", "scan-expire-keys/autoscan-config");
    let now = daemon.get(&path).await.ok();
    assert_eq!(
        (&now["first_scan_at"], &now["interval"], &now["timeout"], &now["scan_keys_count"]),
        (&json!("2199-01-01T00:00:00.000Z"), &json!(21_600), &json!(43_200), &json!(200)),
        "as typed in the reader's zone"
    );
    browser.until_text("dl", "every 6 h").await;

    browser.press("Edit…").await;
    browser.click("#f-enable_auto_scan").await;
    browser.press("Save").await;
    browser.until_text("dl", "off").await;
    assert_eq!(daemon.get(&path).await.ok()["enable_auto_scan"], false);
    browser.press("Edit…").await;
    browser.press("Reset to the settings file").await;
    browser.until_text("dl", "30 3 * * *").await;
    browser.assert_no_errors(&[400, 404]).await;
}

#[tokio::test]
async fn an_instance_is_kept_to_bounds_that_are_set_and_shown_there() {
    let Some(browser) = Browser::start().await else { return };
    let server = filled(2_000, 500).await;
    let daemon = Daemon::start(&named(&instance("cache", &server.url(), ""), "Session cache")).await;
    browser.open(&format!("{}/#/instances/cache", daemon.url()), "instance").await;
    browser.press("Bounds…").await;
    browser.fill("#f-max_backlog", "much").await;
    browser.press("Save").await;
    browser.until_text("#f-max_backlog-wrong", "max-backlog").await;
    browser.assert_accessible("refused bounds").await;
    browser.fill("#f-max_backlog", "5%").await;
    browser.press("Save").await;
    browser.until_text(".tiles", "backlog at most 5%").await;
    browser.until_text(".tile strong", "").await;
    assert_eq!(daemon.get("/api/v1/instances/cache").await.ok()["keep"]["max_backlog"], "5%");
    // The keep run begins by itself, and the page shows that it keeps its bounds.
    browser.until("[...document.querySelectorAll('.tile strong')].some((e) => e.textContent === 'kept')").await;
    browser.until_text(".running .shard", "Bounds: ").await;
    assert!(!browser.texts("button").await.iter().any(|text| text == "Cancel"), "it ends with its bounds");
    browser.assert_accessible("a kept instance").await;
    browser.picture("kept").await;
    browser.run("location.hash = '#/';").await;
    browser.until_text("table.instances tbody", "kept to its bounds").await;
    browser.run("location.hash = '#/instances/cache';").await;
    browser.ready("instance").await;
    browser.press("Bounds…").await;
    browser.press("Reset to the settings file").await;
    browser.until("!document.querySelector('.tiles').textContent.includes('Bound')").await;
    browser.until("document.querySelector('section.running').hidden").await;
    browser.assert_no_errors(&[400, 404]).await;
}

#[tokio::test]
async fn a_reader_may_only_read_and_a_wrong_token_is_refused() {
    let Some(browser) = Browser::start().await else { return };
    let server = filled(10, 10).await;
    // SHA-256 of `figures`.
    let api = "[api]\nlisten = \"127.0.0.1:0\"\n[[api.tokens]]\nname = \"desk\"\nrole = \"reader\"\nprojects = [\"*\"]\nsha256 = \
               \"dc2e3999e6b3e23f3327c0e6cb9a3d6cde4ab7cc16a46ec0fe716df8ce2717b9\"\n";
    let daemon = Daemon::start(&format!("{api}{}", instance("cache", &server.url(), ""))).await;
    browser.open(&format!("{}/", daemon.url()), "login").await;
    browser.assert_accessible("the login").await;
    browser.picture("login").await;
    browser.fill("#token", "guess").await;
    browser.press("Log in").await;
    browser.until_text("#login-error", "Invalid token").await;
    browser.fill("#token", "figures").await;
    browser.keys(Key::Enter).await;
    browser.ready("list").await;
    browser.until_text("#caller", "desk · reader").await;
    assert!(browser.texts("table.instances button.small").await.is_empty(), "no order");
    browser.click(".name").await;
    browser.ready("instance").await;
    for word in ["Sweep…", "Edit…", "Check now"] {
        assert!(!browser.texts("button").await.iter().any(|text| text == word), "{word}");
    }
    browser.assert_accessible("an instance that was never swept").await;
    browser.picture("reader").await;
    assert_eq!(daemon.request(Method::GET, "/api/v1/caller").send().await.expect("an answer").status(), 401);
    browser.assert_no_errors(&[401, 404]).await;
}
