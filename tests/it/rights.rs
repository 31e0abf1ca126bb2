//! A user who may read no value and write no key can sweep; missing rights are named.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use crate::support::{
    PATIENCE,
    keyspace::Keyspace,
    probe,
    run::{Running, scan},
    server::Server,
    shell_words,
};

/// Runs the ACL line of the documentation.
async fn grant(server: &Server, line: &str) {
    let words = shell_words(&line.replace("PASSWORD", "pw"));
    server.cmd(&words.iter().map(String::as_str).collect::<Vec<_>>()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_acl_line_that_we_print_lets_sweep_and_nothing_else() {
    let server = Server::start().await;
    grant(&server, ttlsweep::node::acl::ACL_LINE).await;
    let keys = Keyspace::of(&server, 0);
    keys.live(500, "live").await;
    keys.expired(500, "expired").await;
    let url = server.url_as("ttlsweep", "pw");
    let run = scan(&url, &[]).await.expect(0);
    assert_eq!(run.num(), 500);
    assert_eq!(run.json()["report"]["shards"][0]["touch"], "not audited: the server refuses EXISTS");

    let client = redis::Client::open(url).unwrap();
    let mut conn = client.get_multiplexed_async_connection().await.unwrap();
    for words in [
        &["GET", "live1"][..],
        &["SET", "live1", "x"],
        &["DEL", "live1"],
        &["TTL", "live1"],
        &["EXISTS", "live1"],
        &["FLUSHALL"],
        &["CONFIG", "GET", "*"],
        &["KEYS", "*"],
        &["SUBSCRIBE", "c"],
    ] {
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]);
        let refused = command.query_async::<redis::Value>(&mut conn).await.unwrap_err();
        assert_eq!(refused.code(), Some("NOPERM"), "{words:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_missing_right_is_named_with_the_line_that_grants_it() {
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(10, "d").await;
    for (missing, command) in
        [("-scan", "SCAN"), ("-dbsize", "DBSIZE"), ("-info", "INFO"), ("-select", "SELECT"), ("-ping", "PING")]
    {
        grant(&server, ttlsweep::node::acl::ACL_LINE).await;
        server.cmd(&["ACL", "SETUSER", "ttlsweep", missing]).await;
        let run = scan(&server.url_as("ttlsweep", "pw"), &["--db", "0"]).await;
        assert!(run.stderr.contains(&format!("refused {command}: NOPERM")), "{missing}: {}", run.stderr);
        assert!(run.stderr.contains("ACL SETUSER ttlsweep on '>PASSWORD'"), "{missing}: {}", run.stderr);
        assert_eq!(run.json()["report"]["failure"]["kind"], "not_allowed");
        assert_eq!(run.code, Some(3), "{missing}");
    }
    assert_eq!(server.expired_keys().await, 0, "nothing was freed uncounted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_missing_is_asked_for_once() {
    let server = Server::start().await;
    grant(&server, ttlsweep::node::acl::ACL_LINE).await;
    Keyspace::of(&server, 0).live_ttl(5_000, "k").await;
    server.cmd(&["ACL", "LOG", "RESET"]).await;
    let run = scan(&server.url_as("ttlsweep", "pw"), &[]).await.expect(0);
    assert_eq!(run.json()["report"]["shards"][0]["touch"], "not audited: the server refuses EXISTS");
    let log: Vec<std::collections::BTreeMap<String, redis::Value>> = server.query(&["ACL", "LOG"]).await;
    let refused: Vec<_> = log.iter().map(|entry| (&entry["object"], &entry["count"])).collect();
    assert!(log.len() == 1 && log[0]["count"] == redis::Value::Int(1), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_server_process_is_asked_anew_what_it_allows() {
    let mut server = Server::start().await;
    grant(&server, ttlsweep::node::acl::ACL_LINE).await;
    Keyspace::of(&server, 0).expired(4_000, "first").await;
    let url = server.url_as("ttlsweep", "pw");
    let running = Running::scan(&url, &["--max-keys-per-sec", "1500", "--db", "0"]);
    probe("the first is swept", PATIENCE, async || server.expired_keys().await > 300).await;
    running.signal("STOP");
    server.restart().await;
    grant(&server, ttlsweep::node::acl::ACL_LINE).await;
    server.cmd(&["ACL", "SETUSER", "ttlsweep", "~*", "+exists"]).await;
    Keyspace::of(&server, 0).expired(2_000, "second").await;
    running.signal("CONT");
    let run = running.end().await.expect(0);
    assert_eq!(server.dbsize(0).await, 0);
    let touch = run.json()["report"]["shards"][0]["touch"].as_str().expect("a sentence").to_owned();
    assert!(touch.starts_with("audited:"), "the first refused EXISTS, the second does not: {touch}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_touch_that_was_asked_for_needs_its_right() {
    let server = Server::start().await;
    grant(&server, ttlsweep::node::acl::ACL_LINE).await;
    Keyspace::of(&server, 0).live(10, "k").await;
    let run = scan(&server.url_as("ttlsweep", "pw"), &["--db", "0", "--touch", "ttl"]).await.expect(1);
    assert!(run.stderr.contains("+ttl"), "{}", run.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_taken_away_during_the_sweep_ends_it_and_what_was_freed_stays_counted() {
    let server = Server::start().await;
    grant(&server, ttlsweep::node::acl::ACL_LINE).await;
    Keyspace::of(&server, 0).expired(5_000, "d").await;
    let running = Running::scan(&server.url_as("ttlsweep", "pw"), &["--max-keys-per-sec", "2000"]);
    probe("the pass has begun", PATIENCE, async || server.expired_keys().await > 100).await;
    server.cmd(&["ACL", "SETUSER", "ttlsweep", "-scan"]).await;
    let run = running.end().await.expect(1);
    assert!(run.stderr.contains("refused SCAN: NOPERM"), "{}", run.stderr);
    assert_eq!(run.json()["status"], "failed");
    assert_eq!(run.num(), server.expired_keys().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_or_missing_password_is_said_without_showing_it() {
    let server = Server::options().with_password("right-pw").start().await;
    let base = format!("127.0.0.1:{}", server.port());
    for (url, hint) in [
        (format!("redis://{base}"), "REDISCLI_AUTH"),
        (format!("redis://:wrong-pw@{base}"), "check user and password"),
        (format!("redis://nobody:wrong-pw@{base}"), "check user and password"),
    ] {
        let run = scan(&url, &[]).await.expect(3);
        assert!(run.stderr.contains(hint), "{}", run.stderr);
        assert!(!format!("{run:?}").contains("wrong-pw"), "{run:?}");
        assert_eq!(run.json()["report"]["failure"]["kind"], "not_authenticated");
    }
}

/// A password may consist of any bytes.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_of_any_bytes_lets_in_by_each_way_to_give_one() {
    let server = Server::start().await;
    let password = b"p\xff%\xe4";
    let mut set = redis::cmd("ACL");
    set.arg("SETUSER").arg("bin").arg("on").arg("~*").arg("+@all").arg([b">", &password[..]].concat());
    let mut conn = server.client().get_multiplexed_async_connection().await.unwrap();
    set.query_async::<()>(&mut conn).await.unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), [&password[..], b"\r\nnot this line"].concat()).unwrap();
    let plain = format!("redis://bin@{}", server.addr());
    let in_url = format!("redis://bin:p%ff%25%e4@{}", server.addr());
    for (url, env, file) in [(&plain, Some(password), None), (&plain, None, Some(file.path())), (&in_url, None, None)] {
        let mut command = crate::support::ttlsweep();
        command.args(["scan", url, "--quiet"]);
        command.envs(env.map(|bytes| ("REDISCLI_AUTH", OsStr::from_bytes(bytes))));
        command.args(file.into_iter().flat_map(|path| [OsStr::new("--password-file"), path.as_os_str()]));
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_without_a_password_is_who_it_says_and_nobody_else() {
    let server = Server::start().await;
    let stranger = scan(&server.url(), &["--user", "nobody"]).await.expect(3);
    assert!(stranger.stderr.contains("refused AUTH: WRONGPASS"), "{}", stranger.stderr);
    server.cmd(&["ACL", "SETUSER", "open", "on", "nopass", "-@all", "+info"]).await;
    let open = scan(&format!("redis://open@{}", server.addr()), &[]).await.expect(3);
    assert!(open.stderr.contains("refused PING: NOPERM"), "{}", open.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_was_renamed_away_is_no_missing_right() {
    for command in ["SCAN", "DBSIZE", "INFO", "SELECT"] {
        let server = Server::options().with_config("rename-command", &format!("{command} hidden")).start().await;
        server.cmd(&["SET", "k", "v"]).await;
        let run = scan(&server.url(), &["--db", "0"]).await.expect(3);
        assert!(run.stderr.contains(&format!("refused {command}: ERR unknown command")), "{}", run.stderr);
        assert!(run.stderr.contains("rename-command") && !run.stderr.contains("ACL SETUSER"), "{}", run.stderr);
        let failure = run.json()["report"]["failure"].clone();
        assert_eq!((&failure["kind"], &failure["error_code"]), (&"unsupported".into(), &"DCS.4818".into()));

        let check = crate::support::run::run(["check", &server.url()]).await;
        let said = format!("{}{}", check.stdout, check.stderr);
        assert!(said.contains(command) && said.contains("rename-command") && !said.contains("ACL SETUSER"), "{said}");
        // Without INFO the sweep cannot begin.
        assert_eq!(check.code, Some(if command == "INFO" { 3 } else { 1 }), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_of_a_server_that_quotes_its_commands_show_no_secret() {
    let no_auth = Server::options().with_config("rename-command", "AUTH \"\"").start().await;
    let run = scan(&format!("redis://:hunter2@127.0.0.1:{}", no_auth.port()), &[]).await;
    assert!(run.stderr.contains("unknown command") && !format!("{run:?}").contains("hunter2"), "{run:?}");

    let no_exists = Server::options().with_config("rename-command", "EXISTS \"\"").start().await;
    Keyspace::of(&no_exists, 0).live_ttl(50, "secret-key-").await;
    let run = scan(&no_exists.url(), &[]).await.expect(0);
    assert_eq!(run.json()["report"]["shards"][0]["touch"], "not audited: the server refuses EXISTS");
    let run = scan(&no_exists.url(), &["--touch", "exists"]).await.expect(1);
    assert!(run.stderr.contains("unknown command") && !format!("{run:?}").contains("secret-key"), "{run:?}");
}
