//! The other clients: at a fixed rate, or as fast as the server answers.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::common::comes_first;
use super::wire::{Conn, encode};

/// A step that is coprime to any number of keys up to its size spreads over all of them.
const STEP: u64 = 7_368_787;

fn get_of(n: u64, live: u64) -> Vec<u8> {
    encode(&["GET", &format!("live:{}", n.wrapping_mul(STEP) % live)])
}

fn empty_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).expect("constants")
}

/// What requests waited.
pub struct Waits {
    pub all: Histogram<u64>,
    /// The p99 of each whole [`WINDOW`]. A machine that others share stands still now and then, for longer than the slowest
    /// requests wait; that is in the p99 of everything, and in few of these.
    pub windows: Vec<u64>,
}

/// Long enough for a p99 of a thousand requests, and short enough for twenty of them in a sweep.
const WINDOW: Duration = Duration::from_millis(250);

impl Waits {
    pub fn of_both(mut one: Self, other: Self) -> Self {
        one.all.add(&other.all).expect("the same bounds");
        one.windows.extend(other.windows);
        one
    }
}

/// GETs of live keys at a fixed rate, on one connection. A GET is sent when it is due whether or not the last one was
/// answered, and each must be answered with a value: so it also asserts that live keys stay.
pub struct OpenLoop {
    stop: Arc<AtomicBool>,
    writer: JoinHandle<()>,
    reader: JoinHandle<Waits>,
}

impl OpenLoop {
    pub fn start(addr: &str, live: u64, rate: u64) -> Self {
        let mut input = Conn::open(addr);
        let mut out = input.out.try_clone().expect("a second handle");
        let stop = Arc::new(AtomicBool::new(false));
        let begun = Instant::now();
        let due_of = move |n: u64| begun + Duration::from_nanos(1_000_000_000 * n / rate);
        let writer = std::thread::spawn({
            let stop = stop.clone();
            move || {
                comes_first();
                for n in 0_u64.. {
                    std::thread::sleep(due_of(n).saturating_duration_since(Instant::now()));
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    out.write_all(&get_of(n, live)).expect("the server reads");
                }
                out.shutdown(std::net::Shutdown::Write).expect("an open socket");
            }
        });
        let in_window = (rate as f64 * WINDOW.as_secs_f64()).ceil() as u64;
        let reader = std::thread::spawn(move || {
            comes_first();
            let (mut all, mut window, mut windows) = (empty_histogram(), empty_histogram(), Vec::new());
            for n in 0_u64.. {
                // Answers come in the order of the questions, so the number tells when it was due.
                match input.line() {
                    None => break,
                    Some("$-1") => panic!("a live key is gone: GET number {n}"),
                    Some(header) => {
                        let len: usize = header[1..].parse().expect("a length");
                        input.skip(len + 2);
                    }
                }
                let waited = (due_of(n).elapsed().as_micros() as u64).max(1);
                all.saturating_record(waited);
                window.saturating_record(waited);
                if window.len() >= in_window {
                    windows.push(window.value_at_quantile(0.99));
                    window.reset();
                }
            }
            Waits { all, windows }
        });
        Self { stop, writer, reader }
    }

    pub fn stop(self) -> Waits {
        self.stop.store(true, Ordering::Relaxed);
        self.writer.join().expect("the writer ends");
        self.reader.join().expect("the reader ends")
    }
}

/// GETs of live keys from a number of clients, each of which sends its next one when it has the answer to the last.
pub struct ClosedLoop {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl ClosedLoop {
    /// Each thread serves its share of the clients in turn. The server answers in turn too, so that a thread that
    /// waits for one of them leaves none of the others without a question for long, and no readiness call is needed:
    /// two system calls for a GET are the least that a client can do.
    pub fn start(addr: &str, live: u64, clients: usize, threads: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let serve = |thread: usize| {
            let (stop, answered, addr) = (stop.clone(), answered.clone(), addr.to_owned());
            let clients = (thread..clients).step_by(threads).len();
            std::thread::spawn(move || serve(&addr, live, clients, thread as u64, &stop, &answered))
        };
        let threads = (0..threads).map(serve).collect();
        Self { stop, answered, threads }
    }

    /// How many GETs were answered so far.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    pub fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|t| t.join().expect("the clients end"));
    }
}

fn serve(addr: &str, live: u64, clients: usize, first: u64, stop: &AtomicBool, answered: &AtomicU64) {
    let open = || {
        let stream = TcpStream::connect(addr).expect("the server is there");
        stream.set_nodelay(true).expect("a TCP socket");
        stream
    };
    let mut clients: Vec<TcpStream> = (0..clients).map(|_| open()).collect();
    let mut buf = [0; 256];
    // Threads begin at places far apart, so that they do not read the same keys one after the other.
    let mut n = first << 20;
    let mut next = || {
        n += 1;
        get_of(n, live)
    };
    clients.iter_mut().for_each(|c| c.write_all(&next()).expect("the server reads"));
    while !stop.load(Ordering::Relaxed) {
        for client in &mut clients {
            let mut len = 0;
            while !is_whole(&buf[..len]) {
                let read = client.read(&mut buf[len..]).expect("the server answers");
                assert!(read > 0, "the server closed the connection");
                len += read;
            }
            client.write_all(&next()).expect("the server reads");
        }
        answered.fetch_add(clients.len() as u64, Ordering::Relaxed);
    }
}

/// Is this a whole answer to GET? The values are short enough for the buffer, and one answer at a time is under way.
fn is_whole(bytes: &[u8]) -> bool {
    assert!(!bytes.starts_with(b"$-1") && !bytes.starts_with(b"-"), "a live key is gone");
    let Some(header) = bytes.iter().position(|b| *b == b'\n') else { return false };
    let len = std::str::from_utf8(&bytes[1..header]).ok().and_then(|l| l.trim_end().parse::<usize>().ok());
    bytes.len() == header + 1 + len.expect("a length") + 2
}
