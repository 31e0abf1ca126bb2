//! A network of a given length: a proxy that holds each byte for half a round trip in each direction, and limits nothing else.
//!
//! It is a process of its own: the benchmark's program, started anew with `proxy` as its argument. One thread, which waits in one
//! call for bytes and for the next ones that are due, and which the machine lets run before others, as a network needs no
//! processor. Every byte is held for the same time, so what came first is due first, and one queue serves all connections.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// One direction of a connection.
struct Way {
    from: Rc<TcpStream>,
    to: Rc<TcpStream>,
}

/// Bytes on their way. An empty chunk is the end of the direction.
struct Chunk {
    due: Instant,
    to: Rc<TcpStream>,
    bytes: Vec<u8>,
}

/// The proxy, killed on drop.
pub struct Proxy {
    child: Child,
    pub port: u16,
}

impl Proxy {
    /// Starts one in front of a server, with a round trip of so many microseconds.
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

/// Serves for ever where the arguments of this process say so.
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
    super::common::comes_first();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    println!("{}", listener.local_addr().expect("it is bound").port());
    let mut ways: Vec<Way> = Vec::new();
    let mut on_the_way: VecDeque<Chunk> = VecDeque::new();
    let mut buf = vec![0_u8; 256 << 10];
    loop {
        let left = on_the_way.front().map(|chunk| chunk.due.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec { tv_sec: 0, tv_nsec: left.subsec_nanos().into() });
        let mut fds: Vec<PollFd<'_>> = ways.iter().map(|way| PollFd::new(&*way.from, PollFlags::IN)).collect();
        fds.push(PollFd::new(&listener, PollFlags::IN));
        // A signal may cut the wait short.
        let _ = poll(&mut fds, left.as_ref());
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let due = Instant::now() + one_way;
        let mut place = 0;
        ways.retain(|Way { from, to }| {
            place += 1;
            if !ready[place - 1] {
                return true;
            }
            let read = (&**from).read(&mut buf).unwrap_or(0);
            on_the_way.push_back(Chunk { due, to: to.clone(), bytes: buf[..read].to_vec() });
            read > 0
        });
        if ready.last() == Some(&true)
            && let Ok((client, _)) = listener.accept()
            && let Ok(server) = TcpStream::connect(upstream)
            && client.set_nodelay(true).and_then(|()| server.set_nodelay(true)).is_ok()
        {
            let (client, server) = (Rc::new(client), Rc::new(server));
            ways.push(Way { from: client.clone(), to: server.clone() });
            ways.push(Way { from: server, to: client });
        }
        while let Some(chunk) = on_the_way.pop_front_if(|chunk| chunk.due <= Instant::now()) {
            let _ = match chunk.bytes.is_empty() {
                true => chunk.to.shutdown(Shutdown::Write),
                false => (&*chunk.to).write_all(&chunk.bytes),
            };
        }
    }
}
