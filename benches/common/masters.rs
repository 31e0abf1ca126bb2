//! Simulated masters of one cluster, in a number in which real servers would limit the measurement. Each holds keys that
//! never expire, one in each bucket of a hash table, and walks it by cursors as a server does. Commands that it does not know it
//! sends to a real server, once. [`everywhere`] starts masters without a cluster, one at each address of this machine.

#![allow(dead_code, reason = "not every benchmark uses all of it")]

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::common::Server;
use super::seed;

/// What all masters share.
struct Cluster {
    slots: String,
    /// Each master has two to this power keys.
    bits: u32,
    real: String,
    answers: Mutex<HashMap<Vec<u8>, Vec<u8>>>,
    /// When each master was last scanned, by its number.
    scanned: Mutex<HashMap<u128, Instant>>,
}

/// Masters without a cluster, one at each address 127.x.x.x, all at one port.
pub struct Everywhere {
    /// The port.
    pub port: u16,
    shared: Arc<Cluster>,
}

impl Everywhere {
    /// When the master at an address was last scanned.
    pub fn scanned(&self, at: Ipv4Addr) -> Option<Instant> {
        self.shared.scanned.lock().expect("nobody panics").get(&u128::from(u32::from(at))).copied()
    }
}

/// Starts the masters on the current runtime.
pub async fn everywhere(bits: u32, real: &Server) -> Everywhere {
    let listener = TcpListener::bind("0.0.0.0:0").await.expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    let shared = Arc::new(Cluster::new(String::new(), bits, real));
    let cluster = shared.clone();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let Ok(SocketAddr::V4(own)) = client.local_addr() else { continue };
            tokio::spawn(serve(client, u128::from(u32::from(*own.ip())), cluster.clone()));
        }
    });
    Everywhere { port, shared }
}

/// Starts masters on the current runtime. Returns the addresses of two of them.
pub async fn start(masters: usize, bits: u32, real: &Server) -> String {
    let mut listeners = Vec::new();
    for _ in 0..masters {
        listeners.push(TcpListener::bind("127.0.0.1:0").await.expect("a free port"));
    }
    let ports: Vec<u16> = listeners.iter().map(|l| l.local_addr().expect("it is bound").port()).collect();
    let slots = seed::cluster_slots(&ports);
    let cluster = Arc::new(Cluster::new(slots, bits, real));
    for (listener, &port) in listeners.into_iter().zip(&ports) {
        let cluster = cluster.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(serve(client, u128::from(port), cluster.clone()));
            }
        });
    }
    seed::seeds(&ports)
}

/// `number` tells the masters apart.
async fn serve(mut client: TcpStream, number: u128, cluster: Arc<Cluster>) {
    let _ = client.set_nodelay(true);
    let (mut input, mut output) = (Vec::new(), Vec::new());
    loop {
        let mut done = 0;
        while let Some((words, length)) = command(&input[done..]) {
            cluster.answer(&words, &input[done..done + length], number, &mut output).await;
            done += length;
        }
        input.drain(..done);
        if !output.is_empty() {
            if client.write_all(&output).await.is_err() {
                return;
            }
            output.clear();
        }
        if !matches!(client.read_buf(&mut input).await, Ok(1..)) {
            return;
        }
    }
}

/// The first command in the text, and its length. `None`: it is not complete yet.
fn command(text: &[u8]) -> Option<(Vec<&str>, usize)> {
    let mut at = 0;
    let number = |at: &mut usize| -> Option<usize> {
        let line = text.get(*at..)?.windows(2).position(|end| end == b"\r\n")?;
        let number = std::str::from_utf8(&text[*at + 1..*at + line]).ok()?.parse().ok()?;
        *at += line + 2;
        Some(number)
    };
    let count = number(&mut at)?;
    let mut words = Vec::with_capacity(count);
    for _ in 0..count {
        let length = number(&mut at)?;
        words.push(std::str::from_utf8(text.get(at..at + length)?).ok()?);
        at += length + 2;
    }
    (at <= text.len()).then_some((words, at))
}

impl Cluster {
    fn new(slots: String, bits: u32, real: &Server) -> Self {
        Self { slots, bits, real: real.addr(), answers: Mutex::default(), scanned: Mutex::default() }
    }

    async fn answer(&self, words: &[&str], raw: &[u8], number: u128, output: &mut Vec<u8>) {
        match words {
            ["SCAN", cursor, ..] => {
                self.scanned.lock().expect("nobody panics").insert(number, Instant::now());
                let count = words.iter().position(|word| *word == "COUNT").and_then(|place| words.get(place + 1));
                let count = count.and_then(|count| count.parse().ok()).unwrap_or(10);
                self.scan(cursor.parse().unwrap_or(0), count, output);
            }
            ["DBSIZE"] => output.extend(format!(":{}\r\n", 1_u64 << self.bits).bytes()),
            ["CLUSTER", what, ..] if what.eq_ignore_ascii_case("SLOTS") => output.extend(self.slots.bytes()),
            ["CLUSTER", ..] => output.extend(b"$16\r\ncluster_state:ok\r\n"),
            ["EXISTS", names @ ..] => output.extend(format!(":{}\r\n", names.len()).bytes()),
            ["INFO", ..] => {
                let info = self.ask(raw).await;
                // Each master has a run id of its own.
                let info = String::from_utf8_lossy(&info).into_owned();
                let (before, id) = info.split_once("run_id:").unwrap_or((&info, ""));
                output.extend(before.bytes());
                if id.len() >= 40 {
                    output.extend(format!("run_id:{number:040}{}", &id[40..]).bytes());
                }
            }
            _ => output.extend(self.ask(raw).await),
        }
    }

    /// Walks `count` buckets. A cursor counts with its bits reversed.
    fn scan(&self, cursor: u64, count: u64, output: &mut Vec<u8>) {
        let place = cursor.reverse_bits() >> (64 - self.bits);
        let next = (place + count).min(1 << self.bits);
        let cursor = if next == 1 << self.bits { 0 } else { (next << (64 - self.bits)).reverse_bits() };
        let text = cursor.to_string();
        output.extend(format!("*2\r\n${}\r\n{text}\r\n*{}\r\n", text.len(), next - place).bytes());
        for n in place..next {
            output.extend(format!("$16\r\nsession:{n:08}\r\n").bytes());
        }
    }

    /// The answer of the real server, which is asked only once for each command.
    async fn ask(&self, raw: &[u8]) -> Vec<u8> {
        let known = |answers: &HashMap<Vec<u8>, Vec<u8>>| answers.get(raw).cloned();
        if let Some(answer) = known(&self.answers.lock().expect("nobody panics")) {
            return answer;
        }
        let mut server = TcpStream::connect(&self.real).await.expect("the server is there");
        // The answer to the PING after it shows where the answer ends.
        server.write_all(&[raw, b"*1\r\n$4\r\nPING\r\n"].concat()).await.expect("the server reads");
        let mut answer = Vec::new();
        while !answer.ends_with(b"+PONG\r\n") {
            assert!(server.read_buf(&mut answer).await.expect("the server answers") > 0, "the server closed");
        }
        answer.truncate(answer.len() - b"+PONG\r\n".len());
        self.answers.lock().expect("nobody panics").insert(raw.to_vec(), answer.clone());
        answer
    }
}
