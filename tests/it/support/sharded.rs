//! Several real servers behind one address, as some proxies offer them: a cursor names the server as well, so that it
//! follows no hash table's order.

use std::net::{Ipv4Addr, SocketAddr};

use redis::aio::MultiplexedConnection;
use redis::{RedisResult, Value};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

use super::server::Server;

/// The proxy. It ends on drop.
pub struct Sharded {
    addr: SocketAddr,
    listener: JoinHandle<()>,
}

impl Sharded {
    /// `mode`: the `redis_mode` in its INFO.
    pub async fn start(servers: &[Server], mode: &str) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let mut shards = Vec::new();
        for server in servers {
            shards.push(server.conn().await);
        }
        let mode = format!("redis_mode:{mode}");
        let listener = tokio::spawn(async move {
            let mut clients = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                clients.spawn(serve(client, shards.clone(), mode.clone()));
            }
        });
        Self { addr, listener }
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("redis://{}", self.addr)
    }
}

impl Drop for Sharded {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

/// Answers one client, a command after the other.
async fn serve(client: TcpStream, mut shards: Vec<MultiplexedConnection>, mode: String) {
    // Small answers must not wait for an acknowledgement.
    let _ = client.set_nodelay(true);
    let mut client = BufReader::new(client);
    while let Some(words) = read(&mut client).await {
        let answer = answer(&words, &mut shards, &mode).await.unwrap_or_else(|error| {
            let text = format!("{} {}", error.code().unwrap_or("ERR"), error.detail().unwrap_or("refused"));
            format!("-{text}\r\n").into_bytes()
        });
        if client.write_all(&answer).await.is_err() {
            return;
        }
    }
}

/// The words of the next command.
async fn read(client: &mut BufReader<TcpStream>) -> Option<Vec<Vec<u8>>> {
    let mut words = Vec::new();
    for _ in 0..number(client).await? {
        let mut word = vec![0; number(client).await? + 2];
        client.read_exact(&mut word).await.ok()?;
        word.truncate(word.len() - 2);
        words.push(word);
    }
    Some(words)
}

/// The number of a line such as `*3` or `$12`.
async fn number(client: &mut BufReader<TcpStream>) -> Option<usize> {
    let mut line = String::new();
    client.read_line(&mut line).await.ok()?;
    line.get(1..)?.trim_end().parse().ok()
}

async fn answer(words: &[Vec<u8>], shards: &mut [MultiplexedConnection], mode: &str) -> RedisResult<Vec<u8>> {
    let mut command = redis::Cmd::new();
    words.iter().for_each(|word| {
        command.arg(word);
    });
    match &words[0].to_ascii_uppercase()[..] {
        b"DBSIZE" | b"EXISTS" => {
            let mut sum = 0;
            for shard in shards {
                sum += command.query_async::<u64>(shard).await?;
            }
            Ok(format!(":{sum}\r\n").into_bytes())
        }
        b"SCAN" => {
            let many = shards.len() as u64;
            let cursor: u64 = String::from_utf8_lossy(&words[1]).parse().expect("a cursor");
            let (inner, shard) = (cursor / many, cursor % many);
            let mut scan = redis::cmd("SCAN");
            scan.arg(inner);
            words[2..].iter().for_each(|word| {
                scan.arg(word);
            });
            let (inner, names): (u64, Vec<Vec<u8>>) = scan.query_async(&mut shards[shard as usize]).await?;
            let next = match inner {
                0 if shard + 1 == many => 0,
                0 => shard + 1,
                inner => inner * many + shard,
            };
            let mut reply = format!("*2\r\n${}\r\n{next}\r\n*{}\r\n", next.to_string().len(), names.len()).into_bytes();
            for name in names {
                reply.extend(format!("${}\r\n", name.len()).into_bytes());
                reply.extend(name);
                reply.extend(b"\r\n");
            }
            Ok(reply)
        }
        _ => Ok(encode(command.query_async(&mut shards[0]).await?, mode)),
    }
}

fn encode(value: Value, mode: &str) -> Vec<u8> {
    match value {
        Value::Int(number) => format!(":{number}\r\n").into_bytes(),
        Value::BulkString(text) => {
            let text = String::from_utf8_lossy(&text).replace("redis_mode:standalone", mode);
            // Valkey has a field of its own for the mode as well.
            let text = text.replace("server_mode:standalone", &mode.replace("redis", "server"));
            format!("${}\r\n{text}\r\n", text.len()).into_bytes()
        }
        Value::SimpleString(text) => format!("+{text}\r\n").into_bytes(),
        Value::Okay => b"+OK\r\n".to_vec(),
        Value::Nil => b"$-1\r\n".to_vec(),
        Value::Array(values) => {
            let mut reply = format!("*{}\r\n", values.len()).into_bytes();
            values.into_iter().for_each(|value| reply.extend(encode(value, mode)));
            reply
        }
        other => panic!("{other:?}"),
    }
}
