//! The least of a client: one blocking connection, and the data that the scenarios need.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

/// SETs in one write while filling.
const CHUNK: u64 = 5_000;

/// Milliseconds that a key of a fill may live for it to be dead at once, or to outlive every run.
pub const AT_ONCE: u64 = 1;
pub const A_DAY: u64 = 86_400_000;

pub struct Conn {
    pub out: TcpStream,
    input: BufReader<TcpStream>,
    line: Vec<u8>,
}

impl Conn {
    pub fn open(addr: &str) -> Self {
        let out = TcpStream::connect(addr).expect("the server is there");
        out.set_nodelay(true).expect("a TCP socket");
        let input = BufReader::with_capacity(1 << 16, out.try_clone().expect("a second handle"));
        Self { out, input, line: Vec::new() }
    }

    /// Sends without waiting for the answer.
    pub fn send(&mut self, words: &[&str]) {
        self.out.write_all(&encode(words)).expect("the server reads");
    }

    /// One line of an answer, without its end. None where the server closed the connection.
    pub fn line(&mut self) -> Option<&str> {
        self.line.clear();
        if self.input.read_until(b'\n', &mut self.line).expect("the server answers") == 0 {
            return None;
        }
        let line = std::str::from_utf8(&self.line).expect("a header is ASCII").trim_end();
        assert!(!line.starts_with('-'), "the server refuses: {line}");
        Some(line)
    }

    /// The number in `:12`, `$12` or `*12`.
    pub fn number(&mut self) -> i64 {
        let line = self.line().expect("an open connection");
        line[1..].parse().unwrap_or_else(|_| panic!("a number was due, not {line}"))
    }

    pub fn bulk(&mut self) -> Vec<u8> {
        let len = self.number();
        let mut bytes = vec![0; usize::try_from(len).expect("a string that is there") + 2];
        self.input.read_exact(&mut bytes).expect("the string");
        bytes.truncate(bytes.len() - 2);
        bytes
    }

    /// Reads a string and drops it where it lies.
    pub fn skip_bulk(&mut self) {
        let len = self.number();
        self.skip(usize::try_from(len).expect("a string that is there") + 2);
    }

    /// Drops that many bytes.
    pub fn skip(&mut self, mut left: usize) {
        while left > 0 {
            let there = self.input.fill_buf().expect("the server answers").len().min(left);
            assert!(there > 0, "the server closed the connection");
            self.input.consume(there);
            left -= there;
        }
    }

    pub fn ask_number(&mut self, words: &[&str]) -> i64 {
        self.send(words);
        self.number()
    }

    pub fn ask_text(&mut self, words: &[&str]) -> String {
        self.send(words);
        String::from_utf8_lossy(&self.bulk()).into_owned()
    }

    pub fn ask_ok(&mut self, words: &[&str]) {
        self.send(words);
        let line = self.line().expect("an open connection");
        assert_eq!(line, "+OK", "{words:?}");
    }

    pub fn dbsize(&mut self) -> u64 {
        self.ask_number(&["DBSIZE"]).try_into().expect("a count")
    }

    /// One SCAN: the next cursor, and how many names came with it. They are dropped, or put into `names`.
    pub fn scan(&mut self, cursor: &str, count: u32, names: Option<&mut Vec<Vec<u8>>>) -> (String, u64) {
        self.send(&["SCAN", cursor, "COUNT", &count.to_string()]);
        self.number();
        let next = String::from_utf8(self.bulk()).expect("digits");
        let number = self.number();
        match names {
            None => (0..number).for_each(|_| self.skip_bulk()),
            Some(names) => {
                names.clear();
                names.extend((0..number).map(|_| self.bulk()));
            }
        }
        (next, number.try_into().expect("a count"))
    }

    /// How many SCANs the server has answered so far, whoever sent them.
    pub fn scans_answered(&mut self) -> u64 {
        let stats = self.ask_text(&["INFO", "commandstats"]);
        let calls = stats.lines().find_map(|l| l.strip_prefix("cmdstat_scan:calls=")?.split(',').next()?.parse().ok());
        calls.unwrap_or(0)
    }

    /// Writes the keys `prefix:0` to `prefix:number-1`, each to live for `ms`. Those of an earlier fill that are still
    /// there are overwritten. Without replies, which are half of the server's work here.
    pub fn fill(&mut self, prefix: &str, number: u64, ms: u64) {
        self.send(&["CLIENT", "REPLY", "OFF"]);
        let mut out = Vec::new();
        let (value, ms) = ("x".repeat(if ms == AT_ONCE { 1 } else { 32 }), ms.to_string());
        for first in (0..number).step_by(CHUNK as usize) {
            out.clear();
            for i in first..number.min(first + CHUNK) {
                out.extend_from_slice(&encode(&["SET", &format!("{prefix}:{i}"), &value, "PX", &ms]));
            }
            self.out.write_all(&out).expect("the server reads");
        }
        // Its answer comes when all before it is done.
        self.ask_ok(&["CLIENT", "REPLY", "ON"]);
    }

    /// How many of the keys `prefix:0` to `prefix:number-1` are alive.
    pub fn alive(&mut self, prefix: &str, number: u64) -> u64 {
        let mut alive = 0;
        for first in (0..number).step_by(1000) {
            let mut words = vec!["EXISTS".to_owned()];
            words.extend((first..number.min(first + 1000)).map(|i| format!("{prefix}:{i}")));
            alive += self.ask_number(&words.iter().map(String::as_str).collect::<Vec<_>>());
        }
        alive.try_into().expect("a count")
    }
}

pub fn encode<T: AsRef<[u8]>>(words: &[T]) -> Vec<u8> {
    let mut out = Vec::with_capacity(64);
    let _ = write!(out, "*{}\r\n", words.len());
    for word in words {
        let _ = write!(out, "${}\r\n", word.as_ref().len());
        out.extend_from_slice(word.as_ref());
        out.extend_from_slice(b"\r\n");
    }
    out
}
