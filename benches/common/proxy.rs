//! A network with a given round trip: a proxy that holds each byte for half of it in each direction, and limits nothing else.
//!
//! It is a process of its own: the benchmark's program, started again with the argument `proxy`. One thread. Since every byte is
//! held for the same time, one queue and one timer serve all connections in order. It uses timers of the kernel, since those of
//! tokio tick in milliseconds.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

type Writer = Rc<tokio::sync::Mutex<OwnedWriteHalf>>;

/// Bytes on their way. An empty chunk is the end of the connection.
struct Chunk {
    due: Instant,
    to: Writer,
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Line {
    on_the_way: Mutex<VecDeque<Chunk>>,
    more: Notify,
}

/// The proxy, killed on drop.
pub struct Proxy {
    child: Child,
    pub port: u16,
}

impl Proxy {
    /// Starts one in front of a server, with a round trip in microseconds.
    pub fn start(upstream: &str, round_trip_us: u64) -> Self {
        let this = std::env::current_exe().expect("it has a path");
        let args = ["proxy", upstream, &(round_trip_us / 2).to_string()];
        let mut child = Command::new(this).args(args).stdout(Stdio::piped()).spawn().expect("the proxy can be run");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("it is piped")).read_line(&mut line).expect("it says its port");
        Self { child, port: line.trim().parse().expect("a port") }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves for ever if the arguments of this process say so.
pub fn serve_if_asked() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [word, upstream, one_way_us] = &args[..]
        && word == "proxy"
    {
        serve(upstream, Duration::from_micros(one_way_us.parse().expect("microseconds")));
    }
}

/// Serves for ever. The port is printed once it listens.
#[allow(clippy::print_stdout, reason = "the port is what the bench waits for")]
fn serve(upstream: &str, one_way: Duration) -> ! {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        println!("{}", listener.local_addr().expect("it is bound").port());
        let line = Rc::new(Line::default());
        tokio::task::spawn_local(deliver(line.clone()));
        loop {
            let Ok((client, _)) = listener.accept().await else { continue };
            let Ok(server) = TcpStream::connect(upstream).await else { continue };
            let (Ok(()), Ok(())) = (client.set_nodelay(true), server.set_nodelay(true)) else { continue };
            let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
            for (from, to) in [(from_client, to_server), (from_server, to_client)] {
                let to = Rc::new(tokio::sync::Mutex::new(to));
                tokio::task::spawn_local(take(line.clone(), from, to, one_way));
            }
        }
    })
}

async fn take(line: Rc<Line>, mut from: OwnedReadHalf, to: Writer, one_way: Duration) {
    let mut buf = vec![0_u8; 256 << 10];
    loop {
        let read = from.read(&mut buf).await.unwrap_or(0);
        let chunk = Chunk { due: Instant::now() + one_way, to: to.clone(), bytes: buf[..read].to_vec() };
        line.on_the_way.lock().expect("one thread").push_back(chunk);
        line.more.notify_one();
        if read == 0 {
            return;
        }
    }
}

async fn deliver(line: Rc<Line>) {
    let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
    let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags).expect("a timer");
    #[allow(deprecated, reason = "its successor is unsafe for the sake of types that close their descriptor")]
    let timer: AsyncFd<OwnedFd> = AsyncFd::new(timer).expect("a runtime with I/O");
    loop {
        let next = line.on_the_way.lock().expect("one thread").pop_front();
        let Some(chunk) = next else {
            line.more.notified().await;
            continue;
        };
        let left = chunk.due.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
            let value = Timespec { tv_sec: 0, tv_nsec: left.subsec_nanos().into() };
            let once = Itimerspec { it_interval: zero, it_value: value };
            rustix::time::timerfd_settime(&timer, TimerfdTimerFlags::empty(), &once).expect("a timer can be set");
            let expired = |fd: &OwnedFd| Ok(rustix::io::read(fd, &mut [0_u8; 8])?);
            timer.async_io(tokio::io::Interest::READABLE, expired).await.expect("a timer can be read");
        }
        let mut to = chunk.to.lock().await;
        if chunk.bytes.is_empty() {
            let _ = to.shutdown().await;
        } else {
            let _ = to.write_all(&chunk.bytes).await;
        }
    }
}
