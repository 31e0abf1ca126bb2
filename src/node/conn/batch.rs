//! Batches: a SCAN or a touch between two readings of a counter, in one write. Separate calls send and receive a batch,
//! so that several connections can each have one under way.

use std::io::{self, Write as _};
use std::pin::Pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, ReadBuf};

use crate::model::shard::ScanPosition;
use crate::node::conn::Conn;
use crate::node::error::NodeError;
use crate::node::info;
use crate::node::wire::{Malformed, Names, ScanReader, ScanReply};

/// DBSIZE, as it is sent (RESP).
const DBSIZE: &str = "*1\r\n$6\r\nDBSIZE\r\n";
/// INFO stats, as it is sent (RESP).
const INFO_STATS: &str = "*2\r\n$4\r\nINFO\r\n$5\r\nstats\r\n";

/// One SCAN to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Where it begins. [`ScanPosition::Finished`] would be sent as 0, like the beginning; no caller asks from there.
    pub from: ScanPosition,
    /// COUNT of the SCAN: about how many keys the server visits.
    pub count: u32,
    /// Whether it has a TYPE that no key has, so that the reply holds no names.
    pub nameless: bool,
    /// The counter that tells how many keys it reclaimed.
    pub counted_by: CountedBy,
}

/// The counter that tells how many expired keys a batch reclaimed. The server runs the commands of a batch back to
/// back, so the difference of a counter before and after is exact. But a server that evicts keys to stay below
/// `maxmemory` does so before any command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CountedBy {
    /// The difference of DBSIZE: exact where nothing is evicted.
    Dbsize,
    /// The difference of `expired_keys` of INFO stats, which does not count evicted keys. Two INFO stats cost a server
    /// about 5 microseconds a batch (Redis 7.0, 8.2). Where INFO has no such field, DBSIZE is used.
    ExpiredKeys,
}

/// The counters just before or just after a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// DBSIZE, expired keys that are still in memory included.
    pub keys: u64,
    /// `expired_keys`; `None` where it was not asked for or INFO does not have it.
    pub expired: Option<u64>,
}

impl Reading {
    /// Expired keys reclaimed between this reading and a later one.
    fn reclaimed_until(self, later: Self) -> u64 {
        match self.expired.zip(later.expired) {
            Some((before, after)) => after.saturating_sub(before),
            None => self.keys.saturating_sub(later.keys),
        }
    }
}

/// A type that no key has.
const NO_TYPE: &str = "ttlsweep-none";

/// What one SCAN between two readings did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// Where the next SCAN begins.
    pub to: ScanPosition,
    /// Keys whose names the reply holds; none for a nameless request.
    pub returned: u64,
    /// The counters just before the SCAN.
    pub before: Reading,
    /// The counters just after the SCAN.
    pub after: Reading,
}

impl Reply {
    /// Expired keys that the SCAN reclaimed.
    pub fn reclaimed(&self) -> u64 {
        self.before.reclaimed_until(self.after)
    }

    /// Keys that the SCAN is known to have scanned: those returned and those reclaimed.
    pub fn seen(&self) -> u64 {
        self.returned + self.reclaimed()
    }
}

/// When a batch was sent and its last byte was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Before the first byte was written.
    pub sent: Instant,
    /// After the last byte was read.
    pub read: Instant,
    /// Whether we waited for the reply. Otherwise the reply waited for us, and its time says nothing about the server.
    pub waited_for: bool,
}

impl Timing {
    /// From the first byte written to the last byte read, round trip included.
    pub fn since_sent(&self) -> Duration {
        self.read.duration_since(self.sent)
    }
}

/// What the touch of the keys of one batch did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TouchReply {
    /// The server's answer for each name, in order; `None` where a cluster node answered with a redirection: the key's
    /// slot is moving to another node.
    pub answers: Vec<Option<i64>>,
    /// The counters just before the touch.
    pub before: Reading,
    /// The counters just after the touch.
    pub after: Reading,
}

impl TouchReply {
    /// Expired keys that the touch reclaimed.
    pub fn reclaimed(&self) -> u64 {
        self.before.reclaimed_until(self.after)
    }
}

/// A batch that was sent and not received yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sent {
    what: What,
    at: Instant,
}

#[derive(Debug, Clone, Copy)]
enum What {
    Scan(Request),
    Touch { command: &'static str, keys: usize, counted_by: CountedBy },
}

impl Conn {
    /// Sends a reading, `SCAN cursor COUNT count`, a reading, in one write. Not in MULTI: the deletions would be
    /// propagated as one transaction, which cluster-aware replication tools reject. Nothing else may be sent until
    /// [`Conn::receive_scan`].
    ///
    /// # Errors
    /// [`NodeError`] of the connection.
    pub async fn send_scan(&mut self, request: Request) -> Result<(), NodeError> {
        self.bounded("SCAN", async |conn| conn.write_scan(request).await).await
    }

    /// Sends a reading, `command name` for each of the first `keys` names, a reading, in one write. Nothing else may be
    /// sent until [`Conn::receive_touch`].
    ///
    /// # Errors
    /// [`NodeError`] of the connection.
    pub async fn send_touch(
        &mut self,
        command: &'static str,
        names: &Names,
        keys: usize,
        counted_by: CountedBy,
    ) -> Result<(), NodeError> {
        self.out.clear();
        self.put_reading(counted_by);
        for name in names.iter().take(keys) {
            redis::cmd(command).arg(name).write_packed_command(&mut self.out);
        }
        self.put_reading(counted_by);
        let sent = Sent { what: What::Touch { command, keys: names.len().min(keys), counted_by }, at: Instant::now() };
        self.bounded(command, async |conn| {
            conn.send().await?;
            conn.sent = Some(sent);
            Ok(())
        })
        .await
    }

    /// When the batch that is under way was sent; `None`: no batch is.
    pub fn sent_at(&self) -> Option<Instant> {
        self.sent.map(|sent| sent.at)
    }

    /// The SCAN that is under way; `None`: no SCAN is.
    pub fn under_way(&self) -> Option<Request> {
        match self.sent?.what {
            What::Scan(request) => Some(request),
            What::Touch { .. } => None,
        }
    }

    /// Gives up the batch under way, and the connection with it: its reply would be taken for another one's.
    pub fn forget(&mut self) {
        self.in_flight |= self.sent.take().is_some();
    }

    /// Waits for the first bytes of the reply to the batch under way. May be dropped at any time and called again.
    ///
    /// # Errors
    /// [`NodeError`] of the connection; a timeout where the response timeout has passed since the batch was sent.
    pub async fn reply_begins(&mut self) -> Result<(), NodeError> {
        if self.start < self.end {
            return Ok(());
        }
        let Some(sent) = self.sent else { return Ok(()) };
        (self.start, self.end) = (0, 0);
        let command = match sent.what {
            What::Scan(_) => "SCAN",
            What::Touch { command, .. } => command,
        };
        let after = self.response_timeout;
        let mut watchdog = self.watchdog.take().unwrap_or_default();
        let deadline = tokio::time::Instant::from_std(sent.at) + after;
        let (stream, buf, waited_for) = (&mut self.stream, &mut self.buf, &mut self.waited_for);
        let read = std::future::poll_fn(|cx| {
            let mut into = ReadBuf::new(buf);
            match Pin::new(&mut *stream).poll_read(cx, &mut into) {
                Poll::Ready(Ok(())) => Poll::Ready(Ok(into.filled().len())),
                Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                Poll::Pending => {
                    *waited_for = true;
                    Poll::Pending
                }
            }
        });
        let read = tokio::select! {
            biased;
            read = read => Some(read),
            () = watchdog.expires(deadline) => None,
        };
        self.watchdog = Some(watchdog);
        match read {
            Some(Ok(0)) => Err(self.lost(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed it"))),
            Some(Ok(bytes)) => {
                self.end = bytes;
                Ok(())
            }
            Some(Err(error)) => Err(self.lost(error)),
            None => Err(NodeError::Timeout { addr: self.addr.clone(), command, after }),
        }
    }

    /// Receives the reply to what [`Conn::send_scan`] sent. `names` receives the key names where it is given.
    ///
    /// `next` is called with the next position as soon as that has come. The request that it returns is sent at once,
    /// so that the server works while we read the names and evaluate the reply.
    ///
    /// # Errors
    /// [`NodeError`]; the first refusal among them.
    pub async fn receive_scan(
        &mut self,
        mut names: Option<&mut Names>,
        next: impl FnOnce(ScanPosition) -> Option<Request>,
    ) -> Result<(Reply, Timing), NodeError> {
        if let Some(names) = names.as_deref_mut() {
            names.clear();
        }
        self.reply_begins().await?;
        let (request, sent) = match self.sent.take() {
            Some(Sent { what: What::Scan(request), at }) => (request, at),
            _ => return Err(self.lost(io::Error::other("no batch is under way"))),
        };
        let waited_for = std::mem::take(&mut self.waited_for);
        self.bounded("SCAN", async |conn| {
            let before = conn.receive_reading(request.counted_by).await?;
            let page = conn.read_scan(names.as_deref_mut(), next).await?;
            let after = conn.receive_reading(request.counted_by).await?;
            let timing = Timing { sent, read: Instant::now(), waited_for };
            // All replies were read, so the connection can go on, whichever was refused.
            let before = before?;
            let (to, returned) = page?;
            Ok((Reply { to, returned, before, after: after? }, timing))
        })
        .await
    }

    /// Receives the replies to what [`Conn::send_touch`] sent.
    ///
    /// # Errors
    /// [`NodeError`]; the first refusal among them.
    pub async fn receive_touch(&mut self) -> Result<(TouchReply, Timing), NodeError> {
        self.reply_begins().await?;
        let (command, keys, counted_by, sent) = match self.sent.take() {
            Some(Sent { what: What::Touch { command, keys, counted_by }, at }) => (command, keys, counted_by, at),
            _ => return Err(self.lost(io::Error::other("no touch is under way"))),
        };
        let waited_for = std::mem::take(&mut self.waited_for);
        self.bounded(command, async |conn| {
            let before = conn.receive_reading(counted_by).await?;
            let mut answers = Vec::with_capacity(keys);
            let mut refused = None;
            for _ in 0..keys {
                match conn.read_integer(command).await? {
                    Ok(answer) => answers.push(Some(answer)),
                    Err(error) if error.is_redirection() => answers.push(None),
                    Err(error) => refused = refused.or(Some(error)),
                }
            }
            let after = conn.receive_reading(counted_by).await?;
            let timing = Timing { sent, read: Instant::now(), waited_for };
            if let Some(error) = refused {
                return Err(error);
            }
            Ok((TouchReply { answers, before: before?, after: after? }, timing))
        })
        .await
    }

    /// Sends one SCAN and receives its reply.
    ///
    /// # Errors
    /// [`NodeError`]; the first refusal among them.
    pub async fn scan(&mut self, request: Request) -> Result<Reply, NodeError> {
        self.send_scan(request).await?;
        Ok(self.receive_scan(None, |_| None).await?.0)
    }

    /// Sends one SCAN and notes that it is under way.
    async fn write_scan(&mut self, request: Request) -> Result<(), NodeError> {
        self.out.clear();
        // Packed by hand: it is sent millions of times, and `Cmd` allocates for each.
        let (cursor, count) = (request.from.to_send().unwrap_or(0).to_string(), request.count.to_string());
        let words = [&cursor, "COUNT", &count, "TYPE", NO_TYPE];
        let words = if request.nameless { &words[..] } else { &words[..3] };
        self.put_reading(request.counted_by);
        let _ = write!(self.out, "*{}\r\n$4\r\nSCAN\r\n", words.len() + 1);
        for word in words {
            // Writing into memory cannot fail.
            let _ = write!(self.out, "${}\r\n{word}\r\n", word.len());
        }
        self.put_reading(request.counted_by);
        let sent = Sent { what: What::Scan(request), at: Instant::now() };
        self.send().await?;
        self.sent = Some(sent);
        Ok(())
    }

    /// Appends the commands of a reading.
    fn put_reading(&mut self, counted_by: CountedBy) {
        self.out.extend_from_slice(DBSIZE.as_bytes());
        if counted_by == CountedBy::ExpiredKeys {
            self.out.extend_from_slice(INFO_STATS.as_bytes());
        }
    }

    /// Reads what [`Conn::put_reading`] asked for. The inner error is the first refusal.
    async fn receive_reading(&mut self, counted_by: CountedBy) -> Result<Result<Reading, NodeError>, NodeError> {
        let keys = self.read_integer("DBSIZE").await?;
        let stats = match counted_by {
            CountedBy::Dbsize => None,
            CountedBy::ExpiredKeys => Some(self.read_value("INFO").await?),
        };
        let reading = || {
            let keys = self.count_of(keys?)?;
            let stats = stats.map(|stats| self.convert::<String>("INFO", stats)).transpose()?;
            Ok(Reading { keys, expired: stats.and_then(|stats| info::expired_keys(&stats)) })
        };
        Ok(reading())
    }

    async fn read_scan(
        &mut self,
        mut names: Option<&mut Names>,
        next: impl FnOnce(ScanPosition) -> Option<Request>,
    ) -> Result<Result<(ScanPosition, u64), NodeError>, NodeError> {
        let mut reader = ScanReader::default();
        let mut next = Some(next);
        loop {
            let unread = &self.buf[self.start..self.end];
            let (eaten, reply) = reader.feed(unread, names.as_deref_mut()).map_err(|e| self.malformed("SCAN", e))?;
            self.start += eaten;
            match reply {
                Some(ScanReply::Page { cursor, returned }) => {
                    return Ok(Ok((ScanPosition::from_reply(cursor), returned)));
                }
                Some(ScanReply::Refused) => return Ok(Err(self.refused("SCAN", reader.error()))),
                None => {}
            }
            match reader.cursor() {
                Some(cursor) if next.is_some() => {
                    let next = next.take().and_then(|next| next(ScanPosition::from_reply(cursor)));
                    if let Some(request) = next {
                        self.write_scan(request).await?;
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
}
