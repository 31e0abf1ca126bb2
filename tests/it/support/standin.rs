//! A simulated server that speaks RESP, for behaviour that no real server can be made to show. It answers INFO, PING and the like as
//! a small master would; a test defines the other answers.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

type Answer = dyn Fn(&[String]) -> Option<Vec<u8>> + Send + Sync;

/// A running simulated server. It ends on drop.
pub struct StandIn {
    addr: SocketAddr,
    listener: JoinHandle<()>,
}

impl StandIn {
    /// Starts one. `answer` gets each command, with its name in capitals; if it returns `None`, the usual answer is sent.
    pub async fn start(answer: impl Fn(&[String]) -> Option<Vec<u8>> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let addr = listener.local_addr().expect("its address");
        let answer: Arc<Answer> = Arc::new(answer);
        let listener = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, answer.clone()));
            }
        });
        Self { addr, listener }
    }

    /// The URL.
    pub fn url(&self) -> String {
        format!("redis://{}", self.addr)
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

/// A bulk string.
pub fn bulk(text: &str) -> Vec<u8> {
    format!("${}\r\n{text}\r\n", text.len()).into_bytes()
}

/// A SCAN reply with these keys.
pub fn page(cursor: u64, names: &[&str]) -> Vec<u8> {
    let mut reply = b"*2\r\n".to_vec();
    reply.extend(bulk(&cursor.to_string()));
    reply.extend(format!("*{}\r\n", names.len()).bytes());
    names.iter().for_each(|name| reply.extend(bulk(name)));
    reply
}

/// INFO of a small master.
pub fn info(mode: &str) -> Vec<u8> {
    bulk(&format!(
        "redis_version:7.0.15\r\nredis_mode:{mode}\r\nrun_id:standin\r\nrole:master\r\nloading:0\r\n\
         used_memory:1000000\r\ndb0:keys=1000,expires=1000,avg_ttl=1\r\n"
    ))
}

async fn serve(stream: TcpStream, answer: Arc<Answer>) {
    // Replies go out one by one, and must not wait for each other's acknowledgements.
    let _ = stream.set_nodelay(true);
    let mut stream = BufReader::new(stream);
    while let Some(words) = command(&mut stream).await {
        let usual = || match words[0].as_str() {
            "INFO" => info("standalone"),
            "PING" => b"+PONG\r\n".to_vec(),
            "DBSIZE" => b":1000\r\n".to_vec(),
            "EXISTS" => b":1\r\n".to_vec(),
            "CLIENT" | "SELECT" | "AUTH" => b"+OK\r\n".to_vec(),
            _ => b"-ERR unknown command\r\n".to_vec(),
        };
        let reply = answer(&words).unwrap_or_else(usual);
        if stream.write_all(&reply).await.is_err() {
            return;
        }
    }
}

/// The next command; `None` at the end of the connection.
async fn command(stream: &mut BufReader<TcpStream>) -> Option<Vec<String>> {
    let mut words = Vec::new();
    for _ in 0..number(stream).await? {
        let length = number(stream).await?;
        let mut word = vec![0; length + 2];
        stream.read_exact(&mut word).await.ok()?;
        word.truncate(length);
        words.push(String::from_utf8_lossy(&word).into_owned());
    }
    words.first_mut()?.make_ascii_uppercase();
    Some(words)
}

async fn number(stream: &mut BufReader<TcpStream>) -> Option<usize> {
    let mut line = String::new();
    stream.read_line(&mut line).await.ok()?;
    line.trim_end().get(1..)?.parse().ok()
}
