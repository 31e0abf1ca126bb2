//! One connection to one server, with a bound on every wait.

use std::io::{self, Write as _};
use std::pin::Pin;
use std::time::{Duration, Instant};

use redis::{Cmd, FromRedisValue, Value};
use secrecy::ExposeSecret;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use crate::model::shard::{DbIndex, NodeAddr};
use crate::model::target::{Credentials, NodeMap};
use crate::node::error::NodeError;
use crate::node::info;
use crate::node::tls::{self, Tls};
use crate::node::wire::{self, Integer, Malformed, Names, ScanReader, ScanReply};

/// Size of the read buffer in bytes: a SCAN reply of COUNT 1000 with names of 30 bytes fits in one read.
const READ_BUFFER: usize = 64 << 10;

/// How we connect.
#[derive(Debug, Clone)]
pub struct ConnOptions {
    /// Who we are.
    pub credentials: Credentials,
    /// Who we are for sentinels.
    pub sentinel_credentials: Credentials,
    /// How to encrypt; `None`: not at all. Unix sockets never are.
    pub tls: Option<Tls>,
    /// Where to reach nodes that announce other addresses.
    pub node_map: NodeMap,
    /// Bound on making a connection, handshake included.
    pub connect_timeout: Duration,
    /// Bound on one answer. Freeing a huge key can hold a server for seconds: do not set it short.
    pub response_timeout: Duration,
}

/// DBSIZE as it goes over the wire.
const DBSIZE: &str = "*1\r\n$6\r\nDBSIZE\r\n";
/// INFO stats as it goes over the wire.
const INFO_STATS: &str = "*2\r\n$4\r\nINFO\r\n$5\r\nstats\r\n";

impl ConnOptions {
    /// Options for plain connections that lead where they say.
    pub fn plain(credentials: Credentials, connect_timeout: Duration, response_timeout: Duration) -> Self {
        Self {
            credentials,
            sentinel_credentials: Credentials::default(),
            tls: None,
            node_map: NodeMap::default(),
            connect_timeout,
            response_timeout,
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send + Sync {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send + Sync> Stream for T {}

/// What one SCAN is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// Where to go on; 0 is the beginning.
    pub cursor: u64,
    /// COUNT.
    pub count: u32,
    /// With a TYPE that nobody uses, so that no names come back.
    pub nameless: bool,
    /// What is to tell how many keys it freed.
    pub gauge: Gauge,
}

/// What tells how many expired keys a batch freed: the server runs the commands of a batch back to back, so a counter read
/// just before and just after tells exactly. But where it evicts keys to stay below `maxmemory`, it does so before any
/// command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gauge {
    /// The difference of DBSIZE: exact where nothing is evicted.
    Dbsize,
    /// The difference of `expired_keys` of INFO stats, which evicted keys are not in. Two INFO stats cost a server some 5
    /// microseconds a batch (Redis 7.0, 8.2). A server whose INFO has no such field is taken at its DBSIZE.
    ExpiredKeys,
}

/// What was read beside a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// DBSIZE.
    pub keys: u64,
    /// `expired_keys`, where that was asked for and is known.
    pub expired: Option<u64>,
}

impl Reading {
    /// Expired keys that were freed up to a later reading.
    fn freed_until(self, later: Self) -> u64 {
        match self.expired.zip(later.expired) {
            Some((before, after)) => after.saturating_sub(before),
            None => self.keys.saturating_sub(later.keys),
        }
    }
}

/// The type that no key has.
const NOBODYS_TYPE: &str = "ttlsweep-none";

/// What one SCAN between two readings did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScanBatch {
    /// The next cursor; 0 at the end.
    pub cursor: u64,
    /// Keys in the reply.
    pub returned: u64,
    /// Just before.
    pub before: Reading,
    /// Just after.
    pub after: Reading,
    /// How long we waited for it: from the first byte written, or where that is later from the end of the answer before (see
    /// [`Conn::answered`]), to the last byte read. The server cannot have worked on it for longer.
    pub waited: Duration,
    /// It was sent while another batch was under way, so that its way to the server is not in `waited`.
    pub ahead: bool,
}

impl ScanBatch {
    /// Expired keys that the SCAN freed.
    pub fn reclaimed(&self) -> u64 {
        self.before.freed_until(self.after)
    }
}

/// What touching the keys of one batch did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TouchBatch {
    /// The server's answer for each name, in order; `None` where a cluster node sent us elsewhere: the key's slot is on
    /// its way from one node to another.
    pub answers: Vec<Option<i64>>,
    /// Just before.
    pub before: Reading,
    /// Just after.
    pub after: Reading,
    /// From the first byte written to the last byte read.
    pub waited: Duration,
}

impl TouchBatch {
    /// Expired keys that the touch freed.
    pub fn reclaimed(&self) -> u64 {
        self.before.freed_until(self.after)
    }
}

/// One connection. Commands run one after the other. A call that was dropped half way leaves it broken: the next one
/// fails at once instead of reading the other's answer.
pub struct Conn {
    stream: Box<dyn Stream>,
    addr: NodeAddr,
    response_timeout: Duration,
    buf: Vec<u8>,
    start: usize,
    end: usize,
    out: Vec<u8>,
    in_flight: bool,
    watchdog: Option<Watchdog>,
    ahead: Option<Ahead>,
    answered: Option<Instant>,
}

/// A batch that was sent and not asked for yet.
#[derive(Debug, Clone, Copy)]
struct Ahead {
    ask: Ask,
    at: Instant,
    /// Nothing was under way when it was sent.
    first: bool,
}

/// Bounds the wait for an answer. tokio's `timeout` would arm and disarm a timer for each of millions of batches; this one
/// is armed once and, when it fires, looks whether the deadline has moved on meanwhile.
#[derive(Default)]
struct Watchdog(Option<Pin<Box<tokio::time::Sleep>>>);

impl Watchdog {
    /// Completes at the deadline.
    async fn bites(&mut self, deadline: tokio::time::Instant) {
        let timer = self.0.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        loop {
            timer.as_mut().await;
            if tokio::time::Instant::now() >= deadline {
                return;
            }
            timer.as_mut().reset(deadline);
        }
    }
}

impl std::fmt::Debug for Conn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Conn").field("addr", &self.addr).finish_non_exhaustive()
    }
}

impl Conn {
    /// Connects, authenticates and names the connection `ttlsweep` where that is allowed.
    ///
    /// # Errors
    /// [`NodeError`] for a server that is not reached in time or does not let us in.
    pub async fn open(addr: &NodeAddr, options: &ConnOptions) -> Result<Self, NodeError> {
        let late = || NodeError::Connect {
            addr: addr.clone(),
            source: io::Error::new(
                io::ErrorKind::TimedOut,
                match options.tls {
                    Some(_) => format!("no TLS connection within {:?} (is it a TLS port?)", options.connect_timeout),
                    None => format!("no connection within {:?}", options.connect_timeout),
                },
            ),
        };
        timeout(options.connect_timeout, Self::dial(addr, options)).await.map_err(|_| late())?
    }

    async fn dial(addr: &NodeAddr, options: &ConnOptions) -> Result<Self, NodeError> {
        let failed = |source| NodeError::Connect { addr: addr.clone(), source };
        let stream: Box<dyn Stream> = match addr {
            NodeAddr::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(failed)?;
                stream.set_nodelay(true).map_err(failed)?;
                match &options.tls {
                    Some(tls) => Box::new(tls.encrypt(stream, host, addr).await?),
                    None => Box::new(stream),
                }
            }
            NodeAddr::Unix(path) => Box::new(UnixStream::connect(path).await.map_err(failed)?),
        };
        let mut conn = Self {
            stream,
            addr: addr.clone(),
            response_timeout: options.response_timeout,
            buf: vec![0; READ_BUFFER],
            start: 0,
            end: 0,
            out: Vec::new(),
            in_flight: false,
            watchdog: None,
            ahead: None,
            answered: None,
        };
        let plain = options.tls.is_none() && matches!(addr, NodeAddr::Tcp { .. });
        match conn.handshake(&options.credentials).await {
            Err(error) if plain => Err(conn.recognise_tls(error)),
            other => other.map(|()| conn),
        }
    }

    async fn handshake(&mut self, credentials: &Credentials) -> Result<(), NodeError> {
        if let Some(password) = &credentials.password {
            let mut auth = redis::cmd("AUTH");
            if let Some(user) = &credentials.user {
                auth.arg(user);
            }
            auth.arg(password.expose_secret());
            self.call::<()>("AUTH", &auth).await?;
        }
        // A name in CLIENT LIST is a courtesy to the operator; a user without the right sweeps all the same.
        let name = redis::cmd("CLIENT").arg("SETNAME").arg("ttlsweep").to_owned();
        match self.call::<()>("CLIENT SETNAME", &name).await {
            Err(NodeError::Server { code, .. }) if code == "NOPERM" || code == "ERR" => Ok(()),
            other => other,
        }
    }

    /// A server that waits for a TLS handshake takes our first command for garbage: it sends an alert or hangs up.
    fn recognise_tls(&self, error: NodeError) -> NodeError {
        /// The first byte of a TLS alert.
        const ALERT: u8 = 0x15;
        let problem = match &error {
            NodeError::Protocol { .. } if self.buf[..self.end].first() == Some(&ALERT) => "sent a TLS alert",
            NodeError::Lost { source, .. }
                if matches!(source.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) =>
            {
                "closed the connection"
            }
            _ => return error,
        };
        NodeError::NotPlain { addr: self.addr.clone(), problem }
    }

    /// Where it leads.
    pub fn addr(&self) -> &NodeAddr {
        &self.addr
    }

    /// Selects a DB.
    ///
    /// # Errors
    /// [`NodeError`]; a DB that does not exist is [`NodeError::Server`].
    pub async fn select(&mut self, db: DbIndex) -> Result<(), NodeError> {
        self.call("SELECT", redis::cmd("SELECT").arg(db.0)).await
    }

    /// Runs one command. `name` is how errors call it.
    ///
    /// # Errors
    /// [`NodeError`], of the server, the network, or of a reply that is no `T`.
    pub async fn call<T: FromRedisValue>(&mut self, name: &'static str, cmd: &Cmd) -> Result<T, NodeError> {
        let [reply] = self.pipeline(name, [cmd]).await?;
        reply
    }

    /// Runs commands in one write. The outer error is the connection's, the inner ones the server's.
    ///
    /// # Errors
    /// [`NodeError`] of the connection.
    pub async fn pipeline<T: FromRedisValue, const N: usize>(
        &mut self,
        name: &'static str,
        cmds: [&Cmd; N],
    ) -> Result<[Result<T, NodeError>; N], NodeError> {
        self.out.clear();
        for cmd in cmds {
            cmd.write_packed_command(&mut self.out);
        }
        let values = self
            .bounded(name, async |conn| {
                conn.send().await?;
                let mut values = Vec::with_capacity(N);
                for _ in 0..N {
                    values.push(conn.read_value(name).await?);
                }
                Ok(values)
            })
            .await?;
        let replies: Vec<_> = values.into_iter().map(|value| self.convert(name, value)).collect();
        Ok(replies.try_into().unwrap_or_else(|_| unreachable!("N commands have N replies")))
    }

    /// A reading, `SCAN cursor COUNT count`, a reading, in one write. Not in MULTI: the deletions would be propagated as
    /// one transaction, which cluster-aware replication tools reject. `names` receives the key names where it is given.
    ///
    /// `next` is told the next cursor as soon as it has come. What it wants to ask is sent then, so that the server works
    /// while we read the names and do our sums. It must be asked for by the next call: see [`Conn::ahead`].
    ///
    /// # Errors
    /// [`NodeError`]; the first refusal among them.
    pub async fn scan(
        &mut self,
        ask: Ask,
        mut names: Option<&mut Names>,
        next: impl FnOnce(u64) -> Option<Ask>,
    ) -> Result<ScanBatch, NodeError> {
        if let Some(names) = names.as_deref_mut() {
            names.clear();
        }
        self.bounded("SCAN", async |conn| {
            let (begun, ahead) = match conn.ahead.take() {
                Some(sent) if sent.ask == ask => (conn.answered.map_or(sent.at, |at| at.max(sent.at)), !sent.first),
                Some(_) => return Err(conn.lost(io::Error::other("another batch is under way"))),
                None => (conn.send_scan(ask).await?, false),
            };
            let before = conn.read_gauge(ask.gauge).await?;
            let page = conn.read_scan(names.as_deref_mut(), next).await?;
            let after = conn.read_gauge(ask.gauge).await?;
            let read_at = Instant::now();
            conn.answered = Some(read_at);
            let waited = read_at.duration_since(begun);
            // All of them were read, so the connection stays in step whichever was refused.
            let before = before?;
            let (cursor, returned) = page?;
            Ok(ScanBatch { cursor, returned, before, after: after?, waited, ahead })
        })
        .await
    }

    /// Sends a batch whose answer is to be read later, by [`Conn::scan`]. `first`: nothing is under way.
    ///
    /// # Errors
    /// [`NodeError`] of the connection.
    pub async fn send_ahead(&mut self, ask: Ask, first: bool) -> Result<(), NodeError> {
        self.bounded("SCAN", async |conn| {
            let at = conn.send_scan(ask).await?;
            conn.ahead = Some(Ahead { ask, at, first });
            Ok(())
        })
        .await
    }

    /// A batch that was sent and not yet asked for. No other command may come before it.
    pub fn ahead(&self) -> Option<Ask> {
        self.ahead.map(|sent| sent.ask)
    }

    /// Gives up the batch that was sent ahead.
    pub fn forget(&mut self) {
        self.ahead = None;
    }

    /// When the batch was sent that was not asked for yet.
    pub fn sent_at(&self) -> Option<Instant> {
        self.ahead.map(|sent| sent.at)
    }

    /// When the last answer to a batch had been read.
    pub fn answered_at(&self) -> Option<Instant> {
        self.answered
    }

    /// Another connection's batch was answered: until then, the server worked on that one.
    pub fn answered(&mut self, at: Option<Instant>) {
        self.answered = self.answered.max(at);
    }

    /// Sends one batch and says when.
    async fn send_scan(&mut self, ask: Ask) -> Result<Instant, NodeError> {
        self.out.clear();
        // Packed by hand: this one is sent millions of times, and `Cmd` allocates for each.
        let (cursor, count) = (ask.cursor.to_string(), ask.count.to_string());
        let words = [&cursor, "COUNT", &count, "TYPE", NOBODYS_TYPE];
        let words = if ask.nameless { &words[..] } else { &words[..3] };
        self.put_gauge(ask.gauge);
        let _ = write!(self.out, "*{}\r\n$4\r\nSCAN\r\n", words.len() + 1);
        for word in words {
            // A write into memory cannot fail.
            let _ = write!(self.out, "${}\r\n{word}\r\n", word.len());
        }
        self.put_gauge(ask.gauge);
        let at = Instant::now();
        self.send().await?;
        Ok(at)
    }

    /// Asks for a reading.
    fn put_gauge(&mut self, gauge: Gauge) {
        self.out.extend_from_slice(DBSIZE.as_bytes());
        if gauge == Gauge::ExpiredKeys {
            self.out.extend_from_slice(INFO_STATS.as_bytes());
        }
    }

    /// Reads what [`Conn::put_gauge`] asked for. The inner error is the first refusal.
    async fn read_gauge(&mut self, gauge: Gauge) -> Result<Result<Reading, NodeError>, NodeError> {
        let keys = self.read_integer("DBSIZE").await?;
        let stats = match gauge {
            Gauge::Dbsize => None,
            Gauge::ExpiredKeys => Some(self.read_value("INFO").await?),
        };
        let reading = || {
            let keys = self.count_of(keys?)?;
            let stats = stats.map(|stats| self.convert::<String>("INFO", stats)).transpose()?;
            Ok(Reading { keys, expired: stats.and_then(|stats| info::expired_keys(&stats)) })
        };
        Ok(reading())
    }

    /// A reading, `command name` for each name, a reading, in one write.
    ///
    /// # Errors
    /// [`NodeError`]; the first refusal among them.
    pub async fn touch(&mut self, command: &'static str, names: &Names, gauge: Gauge) -> Result<TouchBatch, NodeError> {
        self.out.clear();
        self.put_gauge(gauge);
        for name in names.iter() {
            redis::cmd(command).arg(name).write_packed_command(&mut self.out);
        }
        self.put_gauge(gauge);
        self.bounded(command, async |conn| {
            let begun = Instant::now();
            conn.send().await?;
            let before = conn.read_gauge(gauge).await?;
            let mut answers = Vec::with_capacity(names.len());
            let mut refused = None;
            for _ in 0..names.len() {
                match conn.read_integer(command).await? {
                    Ok(answer) => answers.push(Some(answer)),
                    Err(error) if error.is_redirection() => answers.push(None),
                    Err(error) => refused = refused.or(Some(error)),
                }
            }
            let after = conn.read_gauge(gauge).await?;
            let waited = begun.elapsed();
            if let Some(error) = refused {
                return Err(error);
            }
            Ok(TouchBatch { answers, before: before?, after: after?, waited })
        })
        .await
    }

    /// Runs `exchange` within the response timeout and marks the connection broken unless it ended in step.
    async fn bounded<T>(
        &mut self,
        command: &'static str,
        exchange: impl AsyncFnOnce(&mut Self) -> Result<T, NodeError>,
    ) -> Result<T, NodeError> {
        let out_of_turn = self.ahead.is_some() && command != "SCAN";
        if self.in_flight || out_of_turn {
            return Err(self.lost(io::Error::other("an earlier command was left half way")));
        }
        self.in_flight = true;
        let after = self.response_timeout;
        // Taken out for the time of the exchange, which needs the rest of the connection for itself.
        let mut watchdog = self.watchdog.take().unwrap_or_default();
        let deadline = tokio::time::Instant::now() + after;
        let result = tokio::select! {
            biased;
            result = exchange(self) => result,
            () = watchdog.bites(deadline) => Err(NodeError::Timeout { addr: self.addr.clone(), command, after }),
        };
        self.watchdog = Some(watchdog);
        self.in_flight = !matches!(result, Ok(_) | Err(NodeError::Server { .. }));
        result
    }

    async fn send(&mut self) -> Result<(), NodeError> {
        let sent = async {
            self.stream.write_all(&self.out).await?;
            self.stream.flush().await
        };
        let result = sent.await;
        result.map_err(|e| self.lost(e))
    }

    /// Reads more bytes behind those that are in the buffer.
    async fn fill(&mut self) -> Result<(), NodeError> {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
            if self.buf.len() > READ_BUFFER {
                self.buf.truncate(READ_BUFFER);
                self.buf.shrink_to_fit();
            }
        } else if self.end == self.buf.len() {
            if self.start > 0 {
                self.buf.copy_within(self.start..self.end, 0);
                self.end -= self.start;
                self.start = 0;
            } else {
                // A reply larger than the buffer. `frame_len` bounds how far this goes.
                self.buf.resize(self.buf.len() * 2, 0);
            }
        }
        match self.stream.read(&mut self.buf[self.end..]).await {
            Ok(0) => Err(self.lost(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed it"))),
            Ok(n) => {
                self.end += n;
                Ok(())
            }
            Err(e) => Err(self.lost(e)),
        }
    }

    async fn read_value(&mut self, command: &'static str) -> Result<Value, NodeError> {
        loop {
            let unread = &self.buf[self.start..self.end];
            if let Some(len) = wire::frame_len(unread).map_err(|e| self.malformed(command, e))? {
                let value = redis::parse_redis_value(&unread[..len])
                    .map_err(|e| self.malformed(command, Malformed(e.to_string())))?;
                self.start += len;
                return Ok(value);
            }
            self.fill().await?;
        }
    }

    async fn read_integer(&mut self, command: &'static str) -> Result<Result<i64, NodeError>, NodeError> {
        loop {
            let unread = &self.buf[self.start..self.end];
            if let Some((len, reply)) = wire::integer(unread).map_err(|e| self.malformed(command, e))? {
                self.start += len;
                return Ok(match reply {
                    Integer::Number(number) => Ok(number),
                    Integer::Refused(text) => Err(self.refused(command, &text)),
                });
            }
            self.fill().await?;
        }
    }

    async fn read_scan(
        &mut self,
        mut names: Option<&mut Names>,
        next: impl FnOnce(u64) -> Option<Ask>,
    ) -> Result<Result<(u64, u64), NodeError>, NodeError> {
        let mut reader = ScanReader::default();
        let mut next = Some(next);
        loop {
            let unread = &self.buf[self.start..self.end];
            let (eaten, reply) = reader.feed(unread, names.as_deref_mut()).map_err(|e| self.malformed("SCAN", e))?;
            self.start += eaten;
            match reply {
                Some(ScanReply::Page { cursor, returned }) => return Ok(Ok((cursor, returned))),
                Some(ScanReply::Refused) => return Ok(Err(self.refused("SCAN", reader.error()))),
                None => {}
            }
            match reader.cursor() {
                Some(cursor) if next.is_some() => {
                    if let Some(ask) = next.take().and_then(|next| next(cursor)) {
                        let at = self.send_scan(ask).await?;
                        self.ahead = Some(Ahead { ask, at, first: false });
                    }
                }
                _ if eaten == 0 => self.fill().await?,
                _ => {}
            }
        }
    }

    fn count_of(&self, keys: i64) -> Result<u64, NodeError> {
        u64::try_from(keys).map_err(|_| self.malformed("DBSIZE", Malformed(format!("{keys} keys"))))
    }

    fn convert<T: FromRedisValue>(&self, command: &'static str, value: Value) -> Result<T, NodeError> {
        if let Value::ServerError(error) = &value {
            let text = format!("{} {}", error.code(), error.details().unwrap_or(""));
            return Err(self.refused(command, &text));
        }
        T::from_redis_value(value).map_err(|e| self.malformed(command, Malformed(e.to_string())))
    }

    fn refused(&self, command: &'static str, text: &str) -> NodeError {
        // An unknown command's error repeats what was sent with it: a password, a key name.
        let text = text.split(", with args beginning with").next().unwrap_or_default();
        let (code, message) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        NodeError::Server { addr: self.addr.clone(), command, code: code.to_owned(), message: message.to_owned() }
    }

    fn malformed(&self, command: &'static str, why: Malformed) -> NodeError {
        NodeError::Protocol { addr: self.addr.clone(), command, detail: why.0 }
    }

    fn lost(&self, source: io::Error) -> NodeError {
        // With TLS 1.3 a server refuses our certificate only after the handshake, in place of its first answer.
        if let Some(error) = tls::explain(&self.addr, &source) {
            return error;
        }
        NodeError::Lost { addr: self.addr.clone(), source }
    }
}
