//! The touch: what it finds and counts, and that it is used if SCAN itself does not reclaim.

use std::net::SocketAddr;
use std::sync::Arc;

use redis::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::{keyspace::Keyspace, run::scan, server::Server};

#[tokio::test(flavor = "multi_thread")]
async fn the_ttl_touch_shows_when_keys_expire() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(30, "never").await;
    keys.live_ttl(50, "in one to two hours ").await;
    keys.expired(20, "expired").await;
    let run = scan(&server.url(), &["--touch", "ttl"]).await.expect(0);
    assert_eq!(run.num(), 20);
    let db = &run.json()["report"]["shards"][0]["dbs"][0];
    assert_eq!(db["touched"], 80);
    let within = |bound: &str| db["ttl"]["within_s"][bound].as_u64().unwrap();
    assert_eq!((db["ttl"]["never"].as_u64(), within("3600") + within("21600")), (Some(30), 50));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_exists_touch_asks_for_every_key_and_finds_that_scan_had_done_the_work() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(500, "live").await;
    keys.expired(500, "expired").await;
    let run = scan(&server.url(), &["--touch", "exists"]).await.expect(0);
    let db = &run.json()["report"]["shards"][0]["dbs"][0];
    assert_eq!((&db["touched"], &db["found_by_touch"]), (&500.into(), &0.into()));
    assert_eq!(run.num(), 500);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_looks_at_a_few_batches_and_trusts_scan() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(5_000, "live").await;
    keys.expired(5_000, "expired").await;
    let run = scan(&server.url(), &[]).await.expect(0);
    let json = run.json();
    let shard = &json["report"]["shards"][0];
    assert!(shard["touch"].as_str().unwrap().starts_with("audited: SCAN frees"), "{}", shard["touch"]);
    let touched = shard["dbs"][0]["touched"].as_u64().unwrap();
    assert!((1..2_500).contains(&touched), "{touched}");
}

#[tokio::test(flavor = "multi_thread")]
async fn if_scan_leaves_expired_keys_every_key_is_touched_and_counted() {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(600, "live").await;
    keys.expired(900, "expired").await;
    let names = (0..600).map(|i| format!("live{i}")).chain((0..900).map(|i| format!("expired{i}"))).collect();
    let indexed = ScanFromIndex::start(server.addr(), names).await;
    let run = scan(&indexed.url(), &[]).await.expect(0);
    let json = run.json();
    let shard = &json["report"]["shards"][0];
    assert!(shard["touch"].as_str().unwrap().contains("so every key was touched"), "{}", shard["touch"]);
    assert_eq!(run.num(), 900);
    assert_eq!(server.expired_keys().await, 900);
    assert_eq!(server.dbsize(0).await, 600);
}

/// Simulates an engine or a proxy whose SCAN answers from an index of its own and frees nothing. Everything else
/// goes to a real server. No server in the tests behaves so.
struct ScanFromIndex(SocketAddr);

impl ScanFromIndex {
    async fn start(server: SocketAddr, names: Vec<String>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let names = Arc::new(names);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(serve(client, server, names.clone()));
            }
        });
        Self(addr)
    }

    fn url(&self) -> String {
        format!("redis://{}", self.0)
    }
}

async fn serve(mut client: TcpStream, server: SocketAddr, names: Arc<Vec<String>>) {
    let redis = redis::Client::open(format!("redis://{server}")).unwrap();
    let mut upstream = redis.get_multiplexed_async_connection().await.unwrap();
    let mut buf = Vec::new();
    loop {
        while let Some((words, len)) = command(&buf) {
            buf.drain(..len);
            let reply = if words[0] == b"SCAN" {
                page(&words, &names)
            } else {
                let mut command = redis::Cmd::new();
                command.arg(&words);
                encode(upstream.send_packed_command(&command).await)
            };
            if client.write_all(&reply).await.is_err() {
                return;
            }
        }
        match client.read_buf(&mut buf).await {
            Ok(n) if n > 0 => {}
            _ => return,
        }
    }
}

/// The command at the start of `buf` and its length.
fn command(buf: &[u8]) -> Option<(Vec<Vec<u8>>, usize)> {
    let len = ttlsweep::node::wire::frame_len(buf).unwrap()?;
    match redis::parse_redis_value(&buf[..len]).unwrap() {
        Value::Array(words) => Some((words.into_iter().map(|w| redis::from_redis_value(w).unwrap()).collect(), len)),
        other => panic!("no command: {other:?}"),
    }
}

/// The page at a cursor, which is a place in the index.
fn page(words: &[Vec<u8>], names: &[String]) -> Vec<u8> {
    let number = |i: usize| -> usize { std::str::from_utf8(&words[i]).unwrap().parse().unwrap() };
    let (from, count) = (number(1), number(3));
    let page = &names[from.min(names.len())..(from + count).min(names.len())];
    let next = if from + count >= names.len() { 0 } else { from + count };
    let mut reply = format!("*2\r\n${}\r\n{next}\r\n*{}\r\n", next.to_string().len(), page.len());
    for name in page {
        reply.push_str(&format!("${}\r\n{name}\r\n", name.len()));
    }
    reply.into_bytes()
}

fn encode(reply: redis::RedisResult<Value>) -> Vec<u8> {
    match reply {
        Ok(Value::Okay) => b"+OK\r\n".to_vec(),
        Ok(Value::Int(n)) => format!(":{n}\r\n").into_bytes(),
        Ok(Value::SimpleString(text)) => format!("+{text}\r\n").into_bytes(),
        Ok(Value::BulkString(bytes)) => {
            [format!("${}\r\n", bytes.len()).as_bytes(), bytes.as_slice(), b"\r\n"].concat()
        }
        Ok(Value::VerbatimString { text, .. }) => format!("${}\r\n{text}\r\n", text.len()).into_bytes(),
        other => format!("-ERR {other:?}\r\n").into_bytes(),
    }
}
