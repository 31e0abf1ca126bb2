//! Many shards at a time: no shard waits for the slowest, and each costs little.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::{JoinSet, LocalSet},
};

use crate::support::{
    PATIENCE,
    keyspace::Keyspace,
    probe,
    proxy::{Mode, Proxy},
    run::Running,
    server::Server,
};

/// Real servers, each of some megabytes; `benches/shards.rs` goes up to 200.
const SHARDS: usize = 60;
const LIVE: u64 = 20;
const EXPIRED: u64 = 80;

/// Real servers with expired keys. They are no cluster nodes: in this number, those would keep the machine busy
/// with talking to each other.
async fn start(shards: usize) -> Vec<Server> {
    let local = LocalSet::new();
    local
        .run_until(async {
            let mut starting = JoinSet::new();
            for _ in 0..shards {
                starting.spawn_local(async {
                    let server = Server::start().await;
                    let keys = Keyspace::of(&server, 0);
                    keys.live(LIVE, "live").await;
                    keys.expired(EXPIRED, "expired").await;
                    server
                });
            }
            starting.join_all().await
        })
        .await
}

/// Puts a relay in front of each server. The relay answers that all of them are the masters of one cluster, and passes
/// everything else on to the server. Returns the URL. The relays end with the set.
async fn cluster_of(servers: &[SocketAddr]) -> (String, JoinSet<()>) {
    let mut listeners = Vec::new();
    for &server in servers {
        listeners.push((TcpListener::bind("127.0.0.1:0").await.expect("a port"), server));
    }
    let port = |listener: &TcpListener| listener.local_addr().expect("it is bound").port();
    let mut slots = format!("*{}\r\n", servers.len());
    for (place, (listener, _)) in listeners.iter().enumerate() {
        let edge = |n: usize| 16_384 * n / servers.len();
        slots.push_str(&format!("*3\r\n:{}\r\n:{}\r\n", edge(place), edge(place + 1) - 1));
        slots.push_str(&format!("*3\r\n$9\r\n127.0.0.1\r\n:{0}\r\n$5\r\n{0:05}\r\n", port(listener)));
    }
    // A comma in the URL means a cluster, whatever the nodes say of themselves.
    let url = format!("redis://127.0.0.1:{},127.0.0.1:{}", port(&listeners[1].0), port(&listeners[2].0));
    let mut relays = JoinSet::new();
    for (listener, server) in listeners {
        let slots = slots.clone();
        relays.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(relay(client, server, slots.clone()));
            }
        });
    }
    (url, relays)
}

/// The client sends a command about the cluster on its own, and waits for the answer.
async fn relay(mut client: TcpStream, server: SocketAddr, slots: String) {
    let Ok(mut server) = TcpStream::connect(server).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (mut asked, mut answered) = (vec![0; 16 << 10], vec![0; 16 << 10]);
    loop {
        let sent = tokio::select! {
            Ok(length @ 1..) = client.read(&mut asked) => {
                let text = String::from_utf8_lossy(&asked[..length]).into_owned();
                match text.strip_prefix("*2\r\n$7\r\nCLUSTER\r\n") {
                    Some(what) if what.contains("SLOTS") => client.write_all(slots.as_bytes()).await,
                    Some(_) => client.write_all(b"$16\r\ncluster_state:ok\r\n").await,
                    None => server.write_all(&asked[..length]).await,
                }
            }
            Ok(length @ 1..) = server.read(&mut answered) => client.write_all(&answered[..length]).await,
            else => return,
        };
        if sent.is_err() {
            return;
        }
    }
}

/// Peak memory of the running program so far, in KiB.
fn peak_kib(running: &Running) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", running.pid())).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0 kB");
    line.split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn many_shards_are_swept_at_a_time_and_none_waits_for_the_slowest() {
    let servers = start(SHARDS).await;
    let mut addrs: Vec<SocketAddr> = servers.iter().map(Server::addr).collect();
    // The first shard is silent, and keeps its permit for as long as an answer may take.
    let proxy = Proxy::start(servers[0].addr()).await;
    proxy.set(Mode::Stall);
    addrs[0] = proxy.addr();
    let (url, _relays) = cluster_of(&addrs).await;
    let running = Running::scan(&url, &["--parallel", "8", "--connect-timeout", "60s", "--response-timeout", "60s"]);
    probe("all others are swept", PATIENCE, async || {
        for server in &servers[1..] {
            if server.dbsize(0).await != LIVE {
                return false;
            }
        }
        true
    })
    .await;
    assert_eq!(servers[0].dbsize(0).await, LIVE + EXPIRED, "the silent one has not even begun");
    let memory = peak_kib(&running);
    proxy.set(Mode::Pass);
    let run = running.end().await.expect(0);
    assert_eq!(run.num(), SHARDS as u64 * EXPIRED);
    assert_eq!(run.json()["report"]["shards"].as_array().unwrap().len(), SHARDS);
    // With eight shards at a time, sixty cost little more than eight; this allows for a debug build.
    assert!(memory < 64 << 10, "{memory} KiB");
}
