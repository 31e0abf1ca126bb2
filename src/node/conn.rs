//! One connection to one server, with a bound on every wait.

use std::io;
use std::pin::Pin;
use std::time::Duration;

use redis::{Cmd, FromRedisValue, Value};
use secrecy::ExposeSecret;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout_at;

use crate::model::shard::{DbIndex, NodeAddr};
use crate::model::target::{Credentials, NodeMap};
use crate::node::error::{Class, Greeting, NodeError};
use crate::node::tls::{self, Tls};
use crate::node::wire::{self, Integer, Malformed};

use batch::Sent;

mod batch;

pub use batch::{CountedBy, Reading, Reply, Request, Timing, TouchReply};

/// Size of the read buffer in bytes: a SCAN reply of COUNT 1000 with names of 30 bytes fits in one read.
const READ_BUFFER: usize = 64 << 10;

/// How to connect to the nodes of an instance.
#[derive(Debug, Clone)]
pub struct ConnOptions {
    /// User and password for the servers.
    pub credentials: Credentials,
    /// User and password for the sentinels.
    pub sentinel_credentials: Credentials,
    /// How to encrypt; `None`: not at all. Unix sockets are never encrypted.
    pub tls: Option<Tls>,
    /// Where to reach nodes that announce other addresses.
    pub node_map: NodeMap,
    /// Our name in CLIENT LIST; without spaces.
    pub client_name: String,
    /// The longest wait for a connection, handshake included.
    pub connect_timeout: Duration,
    /// The longest wait for one answer. Freeing a huge key can hold a server for many seconds.
    pub response_timeout: Duration,
}

/// The name in CLIENT LIST, where the options give no other.
pub const CLIENT_NAME: &str = "ttlsweep";

impl ConnOptions {
    /// Options for connections without TLS, to addresses that are reached as they are announced.
    pub fn plain(credentials: Credentials, connect_timeout: Duration, response_timeout: Duration) -> Self {
        Self {
            credentials,
            sentinel_credentials: Credentials::default(),
            tls: None,
            node_map: NodeMap::default(),
            client_name: CLIENT_NAME.to_owned(),
            connect_timeout,
            response_timeout,
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send + Sync {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send + Sync> Stream for T {}

/// One connection. Commands run one after the other. A call that is dropped before its answer came breaks the
/// connection: the next call fails at once and does not read the answer of the first.
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
    sent: Option<Sent>,
    waited_for: bool,
}

/// Bounds the wait for an answer. tokio's `timeout` would arm and disarm a timer for each of millions of batches; this
/// one is armed once and, when it fires, checks whether the deadline has moved.
#[derive(Default)]
struct Watchdog(Option<Pin<Box<tokio::time::Sleep>>>);

impl Watchdog {
    /// Completes once `deadline` has passed, whatever deadline an earlier call had.
    async fn expires(&mut self, deadline: tokio::time::Instant) {
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
    /// Connects, authenticates, and sets the name in CLIENT LIST where that is allowed.
    ///
    /// # Errors
    /// [`NodeError`] for a server that is not reached in time or refuses the user.
    pub async fn open(addr: &NodeAddr, options: &ConnOptions) -> Result<Self, NodeError> {
        let deadline = tokio::time::Instant::now() + options.connect_timeout;
        let after = options.connect_timeout;
        let failed = |source| NodeError::Connect { addr: addr.clone(), source };
        let late = |_| failed(io::Error::new(io::ErrorKind::TimedOut, format!("no connection within {after:?}")));
        let silent = |during| move |_| NodeError::Silent { addr: addr.clone(), during, after };
        let stream: Box<dyn Stream> = match addr {
            NodeAddr::Tcp { host, port } => {
                let connect = TcpStream::connect((host.as_str(), *port));
                let stream = timeout_at(deadline, connect).await.map_err(late)?.map_err(failed)?;
                stream.set_nodelay(true).map_err(failed)?;
                match &options.tls {
                    Some(tls) => {
                        let encrypt = tls.encrypt(stream, host, addr);
                        Box::new(timeout_at(deadline, encrypt).await.map_err(silent(Greeting::Tls))??)
                    }
                    None => Box::new(stream),
                }
            }
            NodeAddr::Unix(path) => {
                Box::new(timeout_at(deadline, UnixStream::connect(path)).await.map_err(late)?.map_err(failed)?)
            }
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
            sent: None,
            waited_for: false,
        };
        let plain = options.tls.is_none() && matches!(addr, NodeAddr::Tcp { .. });
        let handshake = timeout_at(deadline, conn.handshake(&options.credentials, &options.client_name));
        match handshake.await.map_err(silent(Greeting::Command))? {
            Err(error) if plain => Err(conn.recognize_tls(error)),
            other => other.map(|()| conn),
        }
    }

    async fn handshake(&mut self, credentials: &Credentials, client_name: &str) -> Result<(), NodeError> {
        if credentials.user.is_some() || credentials.password.is_some() {
            let mut auth = redis::cmd("AUTH");
            if let Some(user) = &credentials.user {
                auth.arg(user);
            }
            // A user without a password needs AUTH too: otherwise the connection would be that of the default user.
            auth.arg(credentials.password.as_ref().map_or(&b""[..], |password| password.expose_secret()));
            self.call::<()>("AUTH", &auth).await?;
        }
        // The name helps an operator who reads CLIENT LIST; a sweep does not need it.
        let name = redis::cmd("CLIENT").arg("SETNAME").arg(client_name).to_owned();
        match self.call::<()>("CLIENT SETNAME", &name).await {
            // This is how a server that has reached `maxclients` refuses a connection.
            Err(error) if matches!(error.class(), Class::Transient) => Err(error),
            Err(NodeError::Server { code, .. }) if code == "NOPERM" || code == "ERR" => Ok(()),
            other => other,
        }
    }

    /// Recognizes a server that waits for a TLS handshake: it answers the first command with an alert, or closes the
    /// connection.
    fn recognize_tls(&self, error: NodeError) -> NodeError {
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

    /// The address of the server.
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

    /// Runs one command, which errors call `name`.
    ///
    /// # Errors
    /// [`NodeError`] of the server, of the network, or for a reply that is no `T`.
    pub async fn call<T: FromRedisValue>(&mut self, name: &'static str, cmd: &Cmd) -> Result<T, NodeError> {
        let [reply] = self.pipeline(name, [cmd]).await?;
        reply
    }

    /// Runs commands in one write. The outer error is of the connection, the inner ones are of the server.
    ///
    /// # Errors
    /// [`NodeError`] of the connection.
    pub async fn pipeline<T: FromRedisValue, const N: usize>(
        &mut self,
        name: &'static str,
        cmds: [&Cmd; N],
    ) -> Result<[Result<T, NodeError>; N], NodeError> {
        let replies = self.call_all(name, cmds).await?;
        Ok(replies.try_into().unwrap_or_else(|_| unreachable!("N commands have N replies")))
    }

    /// As [`Self::pipeline`], for a number of commands that is not known before.
    ///
    /// # Errors
    /// [`NodeError`] of the connection.
    pub async fn call_all<'a, T: FromRedisValue>(
        &mut self,
        name: &'static str,
        cmds: impl IntoIterator<Item = &'a Cmd>,
    ) -> Result<Vec<Result<T, NodeError>>, NodeError> {
        self.out.clear();
        let mut number = 0;
        for cmd in cmds {
            cmd.write_packed_command(&mut self.out);
            number += 1;
        }
        let values = self
            .bounded(name, async |conn| {
                conn.send().await?;
                let mut values = Vec::with_capacity(number);
                for _ in 0..number {
                    values.push(conn.read_value(name).await?);
                }
                Ok(values)
            })
            .await?;
        Ok(values.into_iter().map(|value| self.convert(name, value)).collect())
    }

    /// Runs `exchange` within the response timeout. Marks the connection as broken where it ends with answers unread.
    async fn bounded<T>(
        &mut self,
        command: &'static str,
        exchange: impl AsyncFnOnce(&mut Self) -> Result<T, NodeError>,
    ) -> Result<T, NodeError> {
        // An answer that is still to come has to be received first.
        if self.in_flight || self.sent.is_some() {
            return Err(self.lost(io::Error::other("the answer to an earlier command was not read")));
        }
        self.in_flight = true;
        let after = self.response_timeout;
        // Taken out because the exchange borrows the whole connection.
        let mut watchdog = self.watchdog.take().unwrap_or_default();
        let deadline = tokio::time::Instant::now() + after;
        let result = tokio::select! {
            biased;
            result = exchange(self) => result,
            () = watchdog.expires(deadline) => Err(NodeError::Timeout { addr: self.addr.clone(), command, after }),
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

    /// Reads more bytes into the buffer, behind those that are unread.
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
                // A reply is larger than the buffer. `frame_len` bounds its size.
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

    fn convert<T: FromRedisValue>(&self, command: &'static str, value: Value) -> Result<T, NodeError> {
        if let Value::ServerError(error) = &value {
            let text = format!("{} {}", error.code(), error.details().unwrap_or(""));
            return Err(self.refused(command, &text));
        }
        T::from_redis_value(value).map_err(|e| self.malformed(command, Malformed(e.to_string())))
    }

    fn refused(&self, command: &'static str, text: &str) -> NodeError {
        // The error for an unknown command repeats its arguments: a password or a key name may be among them.
        let text = text.split(", with args beginning with").next().unwrap_or_default();
        let (code, message) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        NodeError::Server { addr: self.addr.clone(), command, code: code.to_owned(), message: message.to_owned() }
    }

    fn malformed(&self, command: &'static str, why: Malformed) -> NodeError {
        NodeError::Protocol { addr: self.addr.clone(), command, detail: why.0 }
    }

    fn lost(&self, source: io::Error) -> NodeError {
        // With TLS 1.3 a server refuses a client certificate only after the handshake, in place of its first answer.
        if let Some(error) = tls::explain(&self.addr, &source) {
            return error;
        }
        NodeError::Lost { addr: self.addr.clone(), source }
    }
}
