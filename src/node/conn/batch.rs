//! Batches: a SCAN or a touch between two readings, in one write, and another one sent before it is asked for.

use std::io::{self, Write as _};
use std::time::{Duration, Instant};

use crate::node::conn::Conn;
use crate::node::error::NodeError;
use crate::node::info;
use crate::node::wire::{Malformed, Names, ScanReader, ScanReply};

/// DBSIZE as it goes over the wire.
const DBSIZE: &str = "*1\r\n$6\r\nDBSIZE\r\n";
/// INFO stats as it goes over the wire.
const INFO_STATS: &str = "*2\r\n$4\r\nINFO\r\n$5\r\nstats\r\n";

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
    /// From the first byte written to the last byte read, whatever was answered in between: the way there and back is in it.
    pub since_sent: Duration,
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

/// A batch that was sent and not asked for yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ahead {
    ask: Ask,
    at: Instant,
}

impl Conn {
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
            let sent = match conn.ahead.take() {
                Some(sent) if sent.ask == ask => sent.at,
                Some(_) => return Err(conn.lost(io::Error::other("another batch is under way"))),
                None => conn.send_scan(ask).await?,
            };
            let before = conn.read_gauge(ask.gauge).await?;
            let page = conn.read_scan(names.as_deref_mut(), next).await?;
            let after = conn.read_gauge(ask.gauge).await?;
            let read_at = Instant::now();
            let begun = conn.answered.map_or(sent, |at| at.max(sent));
            conn.answered = Some(read_at);
            let (waited, since_sent) = (read_at.duration_since(begun), read_at.duration_since(sent));
            // All of them were read, so the connection stays in step whichever was refused.
            let before = before?;
            let (cursor, returned) = page?;
            Ok(ScanBatch { cursor, returned, before, after: after?, waited, since_sent })
        })
        .await
    }

    /// Sends a batch whose answer is to be read later, by [`Conn::scan`].
    ///
    /// # Errors
    /// [`NodeError`] of the connection.
    pub async fn send_ahead(&mut self, ask: Ask) -> Result<(), NodeError> {
        self.bounded("SCAN", async |conn| {
            let at = conn.send_scan(ask).await?;
            conn.ahead = Some(Ahead { ask, at });
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
            conn.answered = Some(Instant::now());
            if let Some(error) = refused {
                return Err(error);
            }
            Ok(TouchBatch { answers, before: before?, after: after?, waited })
        })
        .await
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
                        self.ahead = Some(Ahead { ask, at });
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
