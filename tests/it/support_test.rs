//! Tests of the tools in `support`, which the other tests rely on.

use std::{path::Path, time::Duration};

use redis::RedisResult;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::Instant,
};

use crate::support::{
    PATIENCE,
    keyspace::{Keyspace, Life, assert_same_live},
    probe,
    proxy::{Direction, Mode, Proxy},
    server::{Kind, Server, Version},
    ttlsweep,
};

/// Sends PING and reads one reply of at most 64 bytes; `None` when the connection is closed.
async fn ping(stream: &mut TcpStream) -> Option<Vec<u8>> {
    stream.write_all(b"PING\r\n").await.ok()?;
    let mut reply = [0; 64];
    match stream.read(&mut reply).await {
        Ok(length) if length > 0 => Some(reply[..length].to_vec()),
        _ => None,
    }
}

/// Whether PING is not answered for a while.
async fn is_silent(stream: &mut TcpStream) -> bool {
    let while_ = Duration::from_millis(100);
    tokio::time::timeout(while_, ping(stream)).await.is_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn server_lives_as_long_as_its_handle() {
    let server = Server::start().await;
    let (pid, dir, addr) = (server.pid(), server.dir().to_owned(), server.addr());
    assert!(server.socket().exists());
    assert_eq!(server.info_number("server", "process_id").await, u64::from(pid));
    let name = match Server::kind() {
        Kind::Redis => "redis_version",
        Kind::Valkey => "valkey_version",
    };
    let Version(major, minor, patch) = Server::version();
    let stated = server.info("server").await[name].clone();
    assert_eq!(stated, format!("{major}.{minor}.{patch}"));

    drop(server);
    assert!(!dir.exists());
    assert!(TcpStream::connect(addr).await.is_err());
    assert!(!Path::new("/proc/self").exists() || !Path::new(&format!("/proc/{pid}")).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn restart_keeps_the_port_and_nothing_else() {
    let mut server = Server::start().await;
    let (port, run_id) = (server.port(), server.run_id().await);
    server.cmd(&["SET", "key", "value"]).await;
    server.restart().await;
    assert_eq!(server.port(), port);
    assert_ne!(server.run_id().await, run_id);
    assert_eq!(server.dbsize(0).await, 0);

    server.kill9();
    assert!(TcpStream::connect(server.addr()).await.is_err());
    server.restart().await;
    assert_eq!(server.port(), port);
}

#[tokio::test(flavor = "multi_thread")]
async fn frozen_server_answers_when_it_goes_on() {
    let server = Server::start().await;
    let mut stream = TcpStream::connect(server.addr()).await.unwrap();
    server.sigstop();
    assert!(is_silent(&mut stream).await);
    server.sigcont();
    assert!(ping(&mut stream).await.unwrap().starts_with(b"+PONG\r\n"));
    // A suspended server can be dropped too.
    server.sigstop();
}

#[tokio::test(flavor = "multi_thread")]
async fn password_and_users_are_asked_for() {
    let mut server = Server::options()
        .with_password("main-secret")
        .with_user("looker", "on >look-secret resetkeys -@all +ping +dbsize")
        .start()
        .await;
    // Users survive a restart.
    server.restart().await;
    Keyspace::of(&server, 0).live(10, "k").await;
    assert_eq!(server.dbsize(0).await, 10);

    let url = server.url_as("looker", "look-secret");
    let client = redis::Client::open(url).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let size: u64 = redis::cmd("DBSIZE").query_async(&mut connection).await.unwrap();
    assert_eq!(size, 10);
    let got: RedisResult<String> = redis::cmd("GET").arg("k1").query_async(&mut connection).await;
    assert!(got.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn replica_hides_expired_keys_and_counts_them() {
    let master = Server::options().with_password("secret").start().await;
    let replica = Server::start().await;
    Keyspace::of(&master, 0).live(100, "live").await;
    replica.replica_of(&master).await;
    Keyspace::of(&master, 0).expired(1_000, "expired").await;
    probe("the replica has all keys", PATIENCE, async || replica.dbsize(0).await == 1_100).await;
    probe("the replica hides the expired keys", PATIENCE, async || {
        Keyspace::of(&replica, 0).snapshot_live().await.keys.len() == 100
    })
    .await;
    assert_eq!(replica.dbsize(0).await, 1_100);
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_keys_are_exact_and_only_hidden() {
    let server = Server::start().await;
    let space = Keyspace::of(&server, 3);
    space.live(2_500, "live").await;
    space.live_ttl(1_500, "ttl").await;
    space.expired(3_001, "expired").await;
    space.zoo(600, "zoo-expired", Life::Expired, 1).await;
    space.zoo(600, "", Life::Long, 2).await;
    space.zoo(60, "zoo", Life::Forever, 3).await;
    let (live, expired) = (2_500 + 1_500 + 600 + 60, 3_001 + 600);
    assert_eq!(space.dbsize().await, live + expired);

    let before = space.snapshot_live().await;
    assert_eq!(before.keys.len() as u64, live);
    assert!(before.keys.contains_key(&b""[..]), "the empty name");
    let with_ttl = before.keys.values().filter(|key| key.expires_ms.is_some());
    assert_eq!(with_ttl.count(), 2_100);
    let mut kinds: Vec<_> = before.keys.values().map(|key| key.kind.as_str()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    assert_eq!(kinds, ["hash", "list", "set", "stream", "string", "zset"]);
    assert_eq!(space.dbsize().await, live + expired, "the snapshot frees none");
    assert_eq!(server.expired_keys().await, 0);

    // SCAN frees exactly the expired keys, and does not change the live ones.
    let mut connection = server.conn_to(3).await;
    let mut cursor = 0;
    loop {
        (cursor, _) = redis::cmd("SCAN")
            .arg(cursor)
            .arg("COUNT")
            .arg(100)
            .query_async::<(u64, Vec<Vec<u8>>)>(&mut connection)
            .await
            .unwrap();
        if cursor == 0 {
            break;
        }
    }
    assert_eq!(server.expired_keys().await, expired);
    assert_eq!(space.dbsize().await, live);
    assert_same_live(&before, &space.snapshot_live().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_keys_are_told() {
    let server = Server::start().await;
    let space = Keyspace::of(&server, 0);
    for change in [
        &["PERSIST", "k0"][..],
        &["PEXPIRE", "k1", "9000000"],
        &["APPEND", "k2", "x"],
        &["SET", "k3", "new"],
        &["DEL", "k0"],
    ] {
        server.cmd(&["FLUSHALL"]).await;
        space.live_ttl(3, "k").await;
        let before = space.snapshot_live().await;
        assert_same_live(&before, &space.snapshot_live().await);
        server.cmd(change).await;
        let after = space.snapshot_live().await;
        let told = std::panic::catch_unwind(|| assert_same_live(&before, &after));
        assert!(told.is_err(), "{change:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn proxy_passes_and_counts() {
    let server = Server::start().await;
    let proxy = Proxy::start(server.addr()).await;
    let mut stream = TcpStream::connect(proxy.addr()).await.unwrap();
    assert_eq!(ping(&mut stream).await.unwrap(), b"+PONG\r\n");
    assert_eq!((proxy.accepted(), proxy.connections()), (1, 1));
    assert_eq!(proxy.bytes(Direction::ToServer), 6);
    assert_eq!(proxy.bytes(Direction::ToClient), 7);
    drop(stream);
    probe("the connection is closed", PATIENCE, async || proxy.connections() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn proxy_cuts_and_refuses() {
    let server = Server::start().await;
    let proxy = Proxy::start(server.addr()).await;
    let mut streams = Vec::new();
    for _ in 0..5 {
        let mut stream = TcpStream::connect(proxy.addr()).await.unwrap();
        assert!(ping(&mut stream).await.is_some());
        streams.push(stream);
    }
    proxy.refuse().await;
    assert!(TcpStream::connect(proxy.addr()).await.is_err());
    assert!(ping(&mut streams[0]).await.is_some(), "open ones stay");
    proxy.cut().await;
    assert_eq!(proxy.connections(), 0);
    for stream in &mut streams {
        assert_eq!(ping(stream).await, None);
    }
    proxy.admit().await;
    let mut stream = TcpStream::connect(proxy.addr()).await.unwrap();
    assert!(ping(&mut stream).await.is_some());

    let addr = proxy.addr();
    drop(proxy);
    probe("the dropped proxy is gone", PATIENCE, async || {
        ping(&mut stream).await.is_none() && TcpStream::connect(addr).await.is_err()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn proxy_stalls_delays_trickles_and_loses() {
    let server = Server::start().await;
    let proxy = Proxy::start(server.addr()).await;
    let mut stream = TcpStream::connect(proxy.addr()).await.unwrap();
    proxy.set(Mode::Stall);
    assert!(is_silent(&mut stream).await);
    proxy.set(Mode::Pass);
    let mut pong = [0; 7];
    stream.read_exact(&mut pong).await.unwrap();
    assert_eq!(&pong, b"+PONG\r\n", "what was held is not lost");

    let tick = Duration::from_millis(20);
    proxy.set(Mode::Delay(tick));
    let began = Instant::now();
    assert!(ping(&mut stream).await.is_some());
    assert!(began.elapsed() >= 2 * tick, "once each way");

    proxy.set(Mode::Trickle { bytes: 2, tick });
    let began = Instant::now();
    stream.write_all(b"PING\r\n").await.unwrap();
    stream.read_exact(&mut pong).await.unwrap();
    assert!(began.elapsed() >= 7 * tick, "three pieces there, four back");

    for lost in [Direction::ToServer, Direction::ToClient] {
        proxy.set(Mode::HalfOpen { lost });
        assert!(is_silent(&mut stream).await);
    }
    proxy.set(Mode::Pass);
    assert!(ping(&mut stream).await.unwrap().starts_with(b"+PONG\r\n"));

    proxy.garbage(b"\0what?\r\n");
    assert_eq!(ping(&mut stream).await.unwrap()[..8], *b"\0what?\r\n");
    assert!(proxy.garbage_gone());
}

#[tokio::test(flavor = "multi_thread")]
#[should_panic(expected = "waited 20ms in vain: pigs fly")]
async fn probe_says_what_it_waited_for() {
    probe("pigs fly", Duration::from_millis(20), async || false).await;
}

#[test]
fn command_under_test_runs_without_the_callers_settings() {
    let command = ttlsweep();
    assert!(Path::new(command.get_program()).is_file());
    let set: Vec<_> = command.get_envs().filter(|(_, value)| value.is_some()).map(|(name, _)| name).collect();
    assert_eq!(set, ["TTLSWEEP_PRIORITY"], "it competes for processors, and nothing else is set");
}
