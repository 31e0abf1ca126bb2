//! What people and scripts see: help, errors, settings, streams, exit codes.

use std::process::Stdio;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{
    PATIENCE, by,
    daemon::{Daemon, instance, window},
    keyspace::Keyspace,
    probe,
    run::{Running, run, scan},
    server::Server,
    signal, ttlsweep, without_settings,
};

#[tokio::test]
async fn help_texts_match_their_snapshots() {
    for (name, args) in [
        ("help", &["--help"][..]),
        ("help_scan", &["scan", "--help"]),
        ("help_keep", &["keep", "--help"]),
        ("help_forecast", &["forecast", "--help"]),
        ("help_settings_show", &["settings", "show", "--help"]),
    ] {
        let run = run(args).await.expect(0);
        insta::assert_snapshot!(name, run.stdout);
    }
}

#[tokio::test]
async fn completions_and_man_pages_know_every_command_and_flag() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = run(["completions", shell]).await.expect(0).stdout;
        for word in ["scan", "autoscan", "max-keys-per-sec", "assist-expiry"] {
            assert!(script.contains(word), "{shell} lacks {word}");
        }
    }
    let bash = run(["completions", "bash"]).await.expect(0).stdout;
    let complete = format!(
        "{bash}\nCOMP_WORDS=(ttlsweep scan --max-k) COMP_CWORD=2\n_ttlsweep ttlsweep --max-k scan\necho ${{COMPREPLY[@]}}"
    );
    let output = std::process::Command::new("bash").args(["-c", &complete]).output().expect("bash is there");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "--max-keys-per-sec", "{output:?}");
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("man1");
    run(["man", folder.to_str().unwrap()]).await.expect(0);
    let page = std::fs::read_to_string(folder.join("ttlsweep-scan.1")).unwrap();
    assert!(page.contains("max\\-keys\\-per\\-sec"), "{page}");
    for name in ["ttlsweep.1", "ttlsweep-task-tune.1"] {
        assert!(folder.join(name).exists(), "{name}");
    }
    run(["man", "/dev/null/man"]).await.expect(1);
}

#[tokio::test]
async fn usage_errors_exit_with_2_and_say_what_would_be_right() {
    for args in [
        &["scan", "--count", "5"][..],
        &["scan", "http://x"],
        &["scan", "--timeout", "10"],
        &["scan", "--intensity", "1e-30"],
        &["scan", "--throttle=true", "--no-throttle"],
        &["scan", "--password-file", "/dev/null", "--askpass"],
        &["scan", "--nonsense"],
        &["scan", "redis://user:p%zz@127.0.0.1:1"],
        &["scan", "redis://::1:6379"],
        &["scan", "unix://run/redis.sock"],
        &["scan", "redis://127.0.0.1:1", "--sentinel-user", "ann"],
        &["check", "redis://127.0.0.1:1", "--replica", "redis://127.0.0.1:2/3"],
        &["task", "list", "--server", "ftp://127.0.0.1"],
        &["task", "list", "--token-file", "/nonexistent"],
        &["instance", "list", "--ca-file", "/dev/null"],
        &["task", "tune", "0199"],
        &["nonsense"],
        &[],
        &["scan", "--config", "/nonexistent.toml"],
    ] {
        let run = run(args).await.expect(2);
        assert!(run.stdout.is_empty() && !run.stderr.is_empty(), "{run:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_misspelt_variable_is_an_error_and_one_of_another_program_is_not() {
    let server = Server::start().await;
    let scan = |name: &str| ttlsweep().args(["scan", &server.url()]).env(name, "0.1").output().unwrap();
    for (typed, meant) in [
        ("TTLSWEEP_INTENSTIY", "TTLSWEEP_INTENSITY"),
        ("TTLSWEEP_MAX_KEYS", "TTLSWEEP_MAX_KEYS_PER_SEC"),
        ("TTLSWEEP_SLICE", "TTLSWEEP_MAX_SLICE"),
        ("TTLSWEEP_NO_THROTTLE", "TTLSWEEP_THROTTLE"),
    ] {
        let misspelt = scan(typed);
        assert_eq!(misspelt.status.code(), Some(2), "{typed}");
        let said = String::from_utf8_lossy(&misspelt.stderr).into_owned();
        assert!(said.contains(typed) && said.contains(&format!("did you mean {meant}?")), "{said}");
    }
    for other in ["TTLSWEEP_PORT_8080_TCP_ADDR", "TTLSWEEP_SERVICE_HOST", "TTLSWEEP_PORT"] {
        assert_eq!(scan(other).status.code(), Some(0), "{other}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn empty_variables_and_those_of_the_client_are_ignored() {
    let server = Server::start().await;
    let mut scan = ttlsweep();
    scan.args(["scan", &server.url(), "--quiet"]).env("TTLSWEEP_TOKEN", "try-me");
    for name in ["URL", "DB", "CONFIG", "PRIORITY", "MAX_LATENCY", "NONSENSE"] {
        scan.env(format!("TTLSWEEP_{name}"), "");
    }
    let output = scan.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A password in the URL makes the program start itself again, with the same arguments.
#[tokio::test(flavor = "multi_thread")]
async fn a_url_that_is_typed_wins_over_the_environment_with_all_that_it_holds() {
    let server = Server::options().with_password("right").start().await;
    Keyspace::of(&server, 3).expired(10, "d").await;
    let mut scan = ttlsweep();
    scan.args(["scan", &format!("{}/3", server.url()), "--quiet"]);
    let output = scan.env("TTLSWEEP_DB", "0").env("REDISCLI_AUTH", "wrong").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(server.dbsize(3).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_that_goes_away_ends_a_sweep_in_order_unless_it_was_told_to_outlive_it() {
    // If the test runner ignores the signal, the sweep inherits that.
    for (starters, code) in [(&["env", "--default-signal=HUP"][..], 130), (&["nohup"], 0)] {
        let server = Server::start().await;
        Keyspace::of(&server, 0).expired(2_000, "d").await;
        let mut command = tokio::process::Command::from(by(starters));
        command.args(["scan", &server.url(), "--json", "--max-keys-per-sec", "1000"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let sweep = command.spawn().expect("env and nohup of coreutils are there");
        probe("it sweeps", PATIENCE, async || server.expired_keys().await > 100).await;
        signal(sweep.id().expect("it runs"), "HUP");
        let run = crate::support::run::Run::from(sweep.wait_with_output().await.unwrap()).expect(code);
        assert_eq!(run.num(), server.expired_keys().await, "{starters:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_typed_wins_over_the_environment_also_where_it_is_its_contrary() {
    let show = ["settings", "show", "--no-throttle", "--json"];
    let output = ttlsweep().args(show).env("TTLSWEEP_THROTTLE", "true").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("--no-throttle"), "{text}");
}

/// Errors of servers that cannot be swept, each with the advice for it. Nothing is swept, so the exit code is 3.
#[tokio::test(flavor = "multi_thread")]
async fn each_refusal_has_advice_that_fits() {
    let (one, other) = (Server::start().await, Server::start().await);
    let dir = tempfile::tempdir().unwrap();
    for (url, hint) in [
        (format!("redis://{},{}", one.addr(), other.addr()), "name this server alone"),
        (format!("redis+sentinel://{}/main", one.addr()), "a sentinel URL names sentinels"),
        (format!("redis://:pw@{}", one.addr()), "asks for no password"),
        (format!("unix://{}", dir.path().display()), "nobody listens at this path"),
        (format!("unix://{}/none", dir.path().display()), "no socket is at this path"),
        (format!("unix:///{}", "long".repeat(50)), "is a server's socket at this path?"),
    ] {
        let run = scan(&url, &[]).await.expect(3);
        assert!(run.stderr.contains(hint), "{url}: {}", run.stderr);
    }

    let full = Server::options().with_config("maxclients", "10").start().await;
    let mut held = Vec::new();
    loop {
        let mut stream = tokio::net::TcpStream::connect(full.addr()).await.unwrap();
        stream.write_all(b"PING\r\n").await.unwrap();
        let mut answer = [0; 5];
        stream.read_exact(&mut answer).await.unwrap();
        if answer == *b"-ERR " {
            break;
        }
        held.push(stream);
    }
    let run = scan(&full.url(), &[]).await.expect(3);
    assert!(run.stderr.contains("max number of clients") && run.stderr.contains("`maxclients`"), "{}", run.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_db_that_is_not_there_is_said_as_the_server_has_it() {
    let server = Server::start().await;
    for db in ["16", "4294967295"] {
        let run = scan(&server.url(), &["--db", db]).await.expect(2);
        assert!(run.stderr.contains("see `databases`"), "{}", run.stderr);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_server_there_is_said_with_the_next_step() {
    let port = crate::support::free_port();
    let run = scan(&format!("redis://127.0.0.1:{port}"), &[]).await.expect(3);
    assert!(run.stderr.contains("Connection refused") && run.stderr.contains("hint: "), "{}", run.stderr);
    assert_eq!(run.json()["status"], "failed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_works_and_a_missing_one_is_explained() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(10, "d").await;
    assert_eq!(scan(&format!("unix://{}", server.socket().display()), &[]).await.expect(0).num(), 10);
    let run = scan("unix:///nonexistent/redis.sock", &[]).await.expect(3);
    assert!(run.stderr.contains("no socket is at this path"), "{}", run.stderr);
}

#[tokio::test]
async fn settings_show_says_what_is_in_force_and_where_it_came_from() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("s.toml");
    std::fs::write(&file, "count = 200\nintensity = 0.5\ntouch = \"none\"\n").unwrap();
    let mut command = ttlsweep();
    command.args(["settings", "show", "--config", file.to_str().unwrap(), "--touch", "ttl"]);
    command.args(["redis://ann:hunter2@cache:7000/3"]);
    command.env("TTLSWEEP_INTENSITY", "0.25");
    let output = command.output().unwrap();
    let shown = String::from_utf8(output.stdout).unwrap().replace(file.to_str().unwrap(), "s.toml");
    insta::assert_snapshot!(shown);
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_come_from_the_environment_or_a_file_too() {
    let server = Server::options().with_password("pw-of-file").start().await;
    let url = format!("redis://127.0.0.1:{}", server.port());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pw");
    std::fs::write(&file, "pw-of-file\n").unwrap();
    scan(&url, &["--password-file", file.to_str().unwrap()]).await.expect(0);
    let status = ttlsweep().args(["scan", &url, "--quiet"]).env("REDISCLI_AUTH", "pw-of-file").output().unwrap();
    assert!(status.status.success() && status.stdout.is_empty() && status.stderr.is_empty(), "{status:?}");
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn the_process_list_does_not_show_the_password_of_the_url() {
    let server = Server::options().with_password("hunter2").start().await;
    Keyspace::of(&server, 0).expired(3_000, "d").await;
    let running = Running::scan(&server.url(), &["--max-keys-per-sec", "2000"]);
    probe("the pass is under way", PATIENCE, async || server.expired_keys().await > 100).await;
    let arguments = std::fs::read(format!("/proc/{}/cmdline", running.pid())).unwrap();
    assert!(!String::from_utf8_lossy(&arguments).contains("hunter2"), "{}", arguments.escape_ascii());
    let run = running.end().await.expect(0);
    assert!(!format!("{run:?}").contains("hunter2"), "{run:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_most_talkative_log_holds_no_secret_and_no_key_name() {
    let server = Server::options().with_password("hunter2").start().await;
    Keyspace::of(&server, 0).live(50, "secret-key-").await;
    Keyspace::of(&server, 0).expired(50, "secret-expired-").await;
    let mut command = ttlsweep();
    command.args(["scan", &server.url(), "-vv", "--touch", "ttl"]).env("TTLSWEEP_LOG", "trace");
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + String::from_utf8_lossy(&output.stdout).as_ref();
    assert!(output.status.success() && said.contains("pass complete"), "{said}");
    assert!(!said.contains("hunter2") && !said.contains("secret-"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_pipe_is_success() {
    let server = Server::start().await;
    let mut child =
        ttlsweep().args(["scan", &server.url()]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_shows_a_bar_and_a_pipe_shows_lines() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(6_000, "d").await;
    let running = Running::start(["scan", &server.url(), "--max-keys-per-sec", "3000"]);
    running.says("db0").await;
    let run = running.end().await.expect(0);
    assert!(run.stderr.contains("keys/s") && run.stderr.contains("ETA"), "{}", run.stderr);
    assert!(run.stdout.contains("done: 6,000 expired keys reclaimed"), "{}", run.stdout);
}

#[tokio::test]
async fn on_a_terminal_a_bar_grows_and_the_summary_comes_last() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.expired(1_000, "expired").await;
    keys.live(2_000, "live").await;
    let text = on_a_terminal(&server, "xterm").await;
    let bar = text.find("keys/s").expect("a bar with the speed");
    let summary = text.rfind("reclaimed").expect("a summary");
    assert!(text.contains("\u{1b}[") && text.contains('%') && bar < summary, "{text:?}");
    assert_eq!(server.dbsize(0).await, 2_000);
}

/// The output of a sweep of some seconds on a terminal of this kind.
async fn on_a_terminal(server: &Server, kind: &str) -> String {
    // `script` gives its child a terminal of its own.
    let line = format!("{} scan {} --max-keys-per-sec 2000", env!("CARGO_BIN_EXE_ttlsweep"), server.url());
    let mut command = std::process::Command::new("script");
    without_settings(&mut command);
    let mut command = tokio::process::Command::from(command);
    command.args(["-q", "-e", "-c", &line, "/dev/null"]).env("TERM", kind).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.expect("script of util-linux is there");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

#[tokio::test]
async fn a_terminal_that_cannot_move_its_cursor_gets_lines() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.expired(1_000, "expired").await;
    // Long enough for a status line, which comes every few seconds.
    keys.live(12_000, "live").await;
    let text = on_a_terminal(&server, "dumb").await;
    assert!(text.contains("keys/s") && !text.contains('\u{1b}'), "{text:?}");
}

/// Types something at the password prompt, and returns the terminal's output after the end.
async fn ask_on_a_terminal(url: &str, typed: &[u8]) -> String {
    let seen = tempfile::NamedTempFile::new().unwrap();
    let line = format!("{} scan {url} --quiet --askpass; echo code $?; stty -a", env!("CARGO_BIN_EXE_ttlsweep"));
    let mut command = std::process::Command::new("script");
    without_settings(&mut command);
    let mut command = tokio::process::Command::from(command);
    command.args(["-q", "-f", "-c", &line]).arg(seen.path()).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut asking = command.kill_on_drop(true).spawn().expect("script of util-linux is there");
    let shown = || String::from_utf8_lossy(&std::fs::read(seen.path()).unwrap()).into_owned();
    probe("it asks", PATIENCE, async || shown().contains("password: ")).await;
    let mut keys = asking.stdin.take().unwrap();
    keys.write_all(typed).await.unwrap();
    asking.wait().await.unwrap();
    shown()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_asked_for_and_whoever_interrupts_has_a_terminal_that_shows_what_is_typed() {
    let server = Server::options().with_password("s3cret").start().await;
    let url = format!("redis://{}", server.addr());
    for (typed, code) in [(&b"s3cret\n"[..], 0), (b"wrong\n", 3), (b"s3c\x03", 130)] {
        let shown = ask_on_a_terminal(&url, typed).await;
        assert!(shown.contains(&format!("code {code}\r\n")), "{shown}");
        let modes: Vec<&str> = shown.split_whitespace().collect();
        assert!(modes.contains(&"echo") && modes.contains(&"isig") && !shown.contains("s3c"), "{shown}");
    }
}

#[tokio::test]
async fn a_terminal_shows_why_a_sweep_waits_that_has_no_pass_yet() {
    let server = Server::start().await;
    let daemon = Daemon::start(&instance("cache", &server.url(), &window(false))).await;
    let id = daemon.create(serde_json::json!({"instance_id": "cache", "respect_window": true})).await;
    let seen = tempfile::NamedTempFile::new().unwrap();
    let line = format!("{} task watch {id} --server {}", env!("CARGO_BIN_EXE_ttlsweep"), daemon.url());
    let mut command = tokio::process::Command::new("script");
    command.args(["-q", "-f", "-e", "-c", &line]).arg(seen.path()).stdin(Stdio::null()).stdout(Stdio::null());
    command.env("TERM", "xterm");
    let mut watching = command.kill_on_drop(true).spawn().expect("script of util-linux is there");
    probe("the terminal says why", PATIENCE, async || {
        std::fs::read_to_string(seen.path()).is_ok_and(|text| text.contains("holding: the off-peak window is closed"))
    })
    .await;
    daemon.post(&format!("/api/v1/tasks/{id}/cancel")).await.ok();
    assert_eq!(watching.wait().await.unwrap().code(), Some(1), "cancelled is not done");
}

/// A program that spins until this is dropped.
struct Spinning(std::process::Child);

impl Spinning {
    fn on(cpu: &str) -> Self {
        let mut command = std::process::Command::new("taskset");
        Self(
            command
                .args(["-c", cpu, "sh", "-c", "while :; do :; done"])
                .spawn()
                .expect("taskset of util-linux is there"),
        )
    }
}

impl Drop for Spinning {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_sweep_that_gets_no_processor_says_so_and_low_priority_gets_some() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(6_000, "expired").await;
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim();
    let cpu = allowed.split(['-', ',']).next().unwrap();
    let pin = |sweep: &Running| {
        let pinned = std::process::Command::new("taskset").args(["-acp", cpu, &sweep.pid().to_string()]).output();
        assert!(pinned.unwrap().status.success());
    };
    // It need not reach its first batch before that: on a busy machine it does not.
    let starved = Running::scan(&server.url(), &["--priority", "idle", "--max-keys-per-sec", "500"]);
    let spinning = Spinning::on(cpu);
    pin(&starved);
    starved.says("no processor time to spare").await;
    // Before another client frees the keys that it still has to read, which would end it.
    starved.signal("INT");
    let low = Running::scan(&server.url(), &["--priority", "low", "--max-keys-per-sec", "1000"]);
    pin(&low);
    low.end().await.expect(0);
    drop(spinning);
    starved.end().await.expect(130);
}
