//! A network that misbehaves on command: a TCP proxy in front of a server.
//!
//! What it does can change while connections are open. It ends, with its connections, on drop.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
};

use super::{PATIENCE, PROBE_TICK, cluster::Cluster, free_port, keyspace::Keyspace, probe, server::Server};

/// What happens to bytes on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// They pass.
    Pass,
    /// Every chunk is held for this long, in each direction.
    Delay(Duration),
    /// They are held until the mode changes, and then go on in order.
    Stall,
    /// This many bytes pass in each tick.
    Trickle { bytes: usize, tick: Duration },
    /// New connections are closed at once. Open ones stay.
    HangUp,
    /// One direction loses everything, the other passes.
    HalfOpen { lost: Direction },
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    ToServer,
    ToClient,
}

/// A server with `live` keys without a TTL and `expired` ones, behind a proxy.
pub async fn behind_proxy(live: u64, expired: u64) -> (Server, Proxy) {
    let server = Server::start().await;
    let keys = Keyspace::of(&server, 0);
    keys.live(live, "live").await;
    keys.expired(expired, "expired").await;
    let proxy = Proxy::start(server.addr()).await;
    (server, proxy)
}

/// A proxy in front of each node of a cluster, and the `--node-map` that leads to them.
pub async fn before_each_node(cluster: &Cluster) -> (Vec<Proxy>, String) {
    let (mut proxies, mut map) = (Vec::new(), Vec::new());
    for node in &cluster.nodes {
        let proxy = Proxy::start(node.addr()).await;
        map.push(format!("{}={}", node.addr(), proxy.addr()));
        proxies.push(proxy);
    }
    (proxies, map.join(","))
}

/// A running proxy.
pub struct Proxy {
    addr: SocketAddr,
    shared: Arc<Shared>,
    listener: JoinHandle<()>,
}

/// What the control side and the connections share.
struct Shared {
    upstream: SocketAddr,
    mode: watch::Sender<Mode>,
    /// Whether new connections are to be accepted.
    open: watch::Sender<bool>,
    /// Whether the port is open.
    listening: watch::Sender<bool>,
    /// Counts the cuts; a connection lives as long as the number that it began with.
    cuts: watch::Sender<u64>,
    /// Bytes that are put before the next chunk to a client.
    garbage: Mutex<Vec<u8>>,
    /// How many connections live, by the number of cuts at their beginning.
    connections: watch::Sender<BTreeMap<u64, usize>>,
    accepted: AtomicU64,
    to_server: AtomicU64,
    to_client: AtomicU64,
}

impl Proxy {
    /// Starts a proxy on a port of its own; bytes pass.
    pub async fn start(upstream: SocketAddr) -> Self {
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let shared = Arc::new(Shared {
            upstream,
            mode: watch::Sender::new(Mode::Pass),
            open: watch::Sender::new(true),
            listening: watch::Sender::new(false),
            cuts: watch::Sender::new(0),
            garbage: Mutex::default(),
            connections: watch::Sender::default(),
            accepted: AtomicU64::new(0),
            to_server: AtomicU64::new(0),
            to_client: AtomicU64::new(0),
        });
        let listener = tokio::spawn(listen(addr, shared.clone()));
        let proxy = Self { addr, shared, listener };
        proxy.until_listening(true).await;
        proxy
    }

    /// Where clients connect to.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The URL of a server without a password, by way of this proxy.
    pub fn url(&self) -> String {
        format!("redis://{}", self.addr)
    }

    /// Changes what happens to bytes, in open connections too.
    pub fn set(&self, mode: Mode) {
        self.shared.mode.send_replace(mode);
    }

    /// Cuts the connections of a sweep of `server`, and returns when it has connected again and freed more.
    pub async fn cut_until_back(&self, server: &Server) {
        let (accepted, freed) = (self.accepted(), server.expired_keys().await);
        self.cut().await;
        probe("it is back", PATIENCE, async || self.accepted() > accepted && server.expired_keys().await > freed).await;
    }

    /// Closes all open connections, and returns when they are closed. New ones are taken.
    pub async fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
        let cuts = *self.shared.cuts.borrow();
        // Clients may reconnect meanwhile: only those from before the cut are waited for.
        let mut connections = self.shared.connections.subscribe();
        let gone = connections.wait_for(|living| living.keys().all(|&began| began >= cuts));
        tokio::time::timeout(PATIENCE, gone)
            .await
            .expect("a cut closes the connections")
            .expect("the sender lives as long as the proxy");
    }

    /// Closes the port: new connections are refused. Open ones stay.
    pub async fn refuse(&self) {
        self.shared.open.send_replace(false);
        self.until_listening(false).await;
    }

    /// Opens the port again.
    pub async fn admit(&self) {
        self.shared.open.send_replace(true);
        self.until_listening(true).await;
    }

    /// Puts these bytes, once, before the next thing that the server says to any client.
    pub fn garbage(&self, bytes: &[u8]) {
        *self.shared.garbage() = bytes.to_vec();
    }

    /// Whether the garbage has been delivered.
    pub fn garbage_gone(&self) -> bool {
        self.shared.garbage().is_empty()
    }

    /// How many connections have been accepted.
    pub fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    /// How many connections are open.
    pub fn connections(&self) -> usize {
        self.shared.connections.borrow().values().sum()
    }

    /// How many bytes have been handed on that way.
    pub fn bytes(&self, direction: Direction) -> u64 {
        self.shared.counter(direction).load(Ordering::Relaxed)
    }

    async fn until_listening(&self, wanted: bool) {
        let mut listening = self.shared.listening.subscribe();
        let reached = listening.wait_for(|&now| now == wanted);
        tokio::time::timeout(PATIENCE, reached)
            .await
            .expect("the proxy's port opens or closes")
            .expect("the sender lives as long as the proxy");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // The connections are in the listener's JoinSet and end with it.
        self.listener.abort();
    }
}

impl Shared {
    fn counter(&self, direction: Direction) -> &AtomicU64 {
        match direction {
            Direction::ToServer => &self.to_server,
            Direction::ToClient => &self.to_client,
        }
    }

    fn garbage(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.garbage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Accepts connections whenever the port is to be open, for ever.
async fn listen(addr: SocketAddr, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    let mut open = shared.open.subscribe();
    loop {
        if open.wait_for(|&open| open).await.is_err() {
            return;
        }
        let listener = bind(addr).await;
        shared.listening.send_replace(true);
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let Ok((client, _)) = accepted else { continue };
                    shared.accepted.fetch_add(1, Ordering::Relaxed);
                    connections.spawn(connection(client, Life::new(shared.clone())));
                }
                Some(_) = connections.join_next() => {}
                _ = open.wait_for(|&open| !open) => break,
            }
        }
        drop(listener);
        shared.listening.send_replace(false);
    }
}

/// Opens the port. `until_listening` times out if that never succeeds.
async fn bind(addr: SocketAddr) -> TcpListener {
    loop {
        match TcpListener::bind(addr).await {
            Ok(listener) => return listener,
            Err(_) => tokio::time::sleep(PROBE_TICK).await,
        }
    }
}

/// Counts a connection for as long as it lives, however it ends, and tells it when it is cut.
struct Life {
    shared: Arc<Shared>,
    cuts: watch::Receiver<u64>,
    began: u64,
}

impl Life {
    fn new(shared: Arc<Shared>) -> Self {
        let cuts = shared.cuts.subscribe();
        let began = *cuts.borrow();
        shared.connections.send_modify(|living| *living.entry(began).or_default() += 1);
        Self { shared, cuts, began }
    }

    async fn cut(&mut self) {
        // An error means that the proxy is gone, which is a cut too.
        let _ = self.cuts.wait_for(|&cuts| cuts > self.began).await;
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        self.shared.connections.send_modify(|living| {
            if let Some(count) = living.get_mut(&self.began) {
                *count -= 1;
            }
            living.retain(|_, count| *count > 0);
        });
    }
}

/// Serves one client until either side ends it or it is cut.
async fn connection(client: TcpStream, mut life: Life) {
    let shared = life.shared.clone();
    if *shared.mode.borrow() == Mode::HangUp {
        return;
    }
    // Bound after `life` and so closed before it ends: "not counted" means closed.
    let mut client = client;
    let Ok(mut server) = TcpStream::connect(shared.upstream).await else {
        return;
    };
    // Small requests must not wait for each other's acknowledgements.
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let both = async {
        tokio::try_join!(
            pump(from_client, to_server, Direction::ToServer, &shared),
            pump(from_server, to_client, Direction::ToClient, &shared),
        )
    };
    tokio::select! {
        _ = both => {}
        () = life.cut() => {}
    }
}

/// Moves bytes one way until their end, which is handed on too.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    direction: Direction,
    shared: &Shared,
) -> std::io::Result<()> {
    let mut mode = shared.mode.subscribe();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return to.shutdown().await;
        }
        if direction == Direction::ToClient {
            let garbage = std::mem::take(&mut *shared.garbage());
            to.write_all(&garbage).await?;
        }
        forward(&buffer[..length], &mut to, direction, &mut mode, shared).await?;
    }
}

/// Hands on one chunk the way the mode says, following the mode when it changes on the way.
async fn forward(
    mut chunk: &[u8],
    to: &mut (impl AsyncWrite + Unpin),
    direction: Direction,
    mode: &mut watch::Receiver<Mode>,
    shared: &Shared,
) -> std::io::Result<()> {
    while !chunk.is_empty() {
        let now = *mode.borrow_and_update();
        let (wait, length) = match now {
            Mode::Stall => {
                // The sender lives as long as the proxy, and this connection no longer.
                let _ = mode.changed().await;
                continue;
            }
            Mode::HalfOpen { lost } if lost == direction => return Ok(()),
            Mode::Pass | Mode::HangUp | Mode::HalfOpen { .. } => (Duration::ZERO, chunk.len()),
            Mode::Delay(delay) => (delay, chunk.len()),
            Mode::Trickle { bytes, tick } => (tick, bytes.clamp(1, chunk.len())),
        };
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        let (head, rest) = chunk.split_at(length);
        // Counted first, so that a byte that was received is always counted.
        shared.counter(direction).fetch_add(head.len() as u64, Ordering::Relaxed);
        to.write_all(head).await?;
        chunk = rest;
    }
    Ok(())
}
