//! Parses RESP2 replies, within bounds on size and depth.
//!
//! Two readers work on the same buffer. [`frame_len`] finds where a whole reply ends, so that the redis crate may
//! decode it; [`ScanReader`] parses a SCAN reply as it arrives and keeps the cursor, the number of names and, only
//! where they are wanted, the names themselves.

use std::fmt;

/// Longest header line (`*3`, `$12`, `:42`, an error's text) that we accept, in bytes.
const MAX_LINE: usize = 4096;
/// Deepest nesting that we accept. INFO, CLUSTER SHARDS and ACL GETUSER stay below 6.
const MAX_DEPTH: usize = 16;
/// Longest whole reply other than SCAN, in bytes. INFO of a large server is some 20 kB, CLUSTER SHARDS of 1,000 nodes
/// below 1 MB.
pub const MAX_FRAME: usize = 16 << 20;
/// Most names in one SCAN reply. A bucket chain or a small-table rehash can exceed COUNT, but not 1,000 times over.
const MAX_NAMES: u64 = 1_000_000;
/// Longest key name that Redis stores (`proto-max-bulk-len` may raise it from 512 MB; a name that long is skipped as
/// it streams by, so it costs no memory).
const MAX_NAME: u64 = 4 << 30;
/// Most bytes of names that are kept for touching one batch. Names beyond that are counted and not kept.
pub const MAX_KEPT: usize = 1 << 20;
/// Most elements in one reply other than SCAN, at all depths together: each costs some sixty bytes once it is decoded.
/// CLUSTER SLOTS of a cluster in which every slot is a range of its own has some 500,000.
const MAX_ITEMS: u64 = 1 << 20;

/// Why bytes are no valid reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Malformed(pub String);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn malformed<T>(text: impl Into<String>) -> Result<T, Malformed> {
    Err(Malformed(text.into()))
}

/// One header line: its type byte, its content, and its length with the CRLF.
struct Line<'a> {
    kind: u8,
    content: &'a [u8],
    len: usize,
}

impl Line<'_> {
    fn number(&self) -> Result<i64, Malformed> {
        // Parses the lengths of millions of key names: a plain loop instead of str::parse.
        let (negative, digits) = match self.content {
            [b'-', rest @ ..] => (true, rest),
            all => (false, all),
        };
        if digits.is_empty() || digits.len() > 18 {
            return malformed("a length or number is missing or too large");
        }
        let mut value = 0_i64;
        for &digit in digits {
            if !digit.is_ascii_digit() {
                return malformed("a length or number holds something other than digits");
            }
            value = value * 10 + i64::from(digit - b'0');
        }
        Ok(if negative { -value } else { value })
    }
}

/// The line at the start of `buf`, or `None` while its end has not arrived.
fn line(buf: &[u8]) -> Result<Option<Line<'_>>, Malformed> {
    let Some(&kind) = buf.first() else { return Ok(None) };
    if !matches!(kind, b'+' | b'-' | b':' | b'$' | b'*') {
        return malformed(format!("it begins with the byte 0x{kind:02x}"));
    }
    match buf.iter().take(MAX_LINE).position(|&b| b == b'\n') {
        Some(end) if end >= 2 && buf[end - 1] == b'\r' => {
            Ok(Some(Line { kind, content: &buf[1..end - 1], len: end + 1 }))
        }
        Some(_) => malformed("a line does not end with CR LF"),
        None if buf.len() >= MAX_LINE => malformed(format!("a line is longer than {MAX_LINE} bytes")),
        None => Ok(None),
    }
}

/// Length in bytes of the whole reply at the start of `buf`, or `None` while a part is missing.
///
/// # Errors
/// [`Malformed`] as soon as the bytes cannot become a reply within the bounds.
pub fn frame_len(buf: &[u8]) -> Result<Option<usize>, Malformed> {
    let mut pending: Vec<u64> = vec![1];
    let mut announced = 0;
    let mut at = 0;
    while let Some(left) = pending.last_mut() {
        if *left == 0 {
            pending.pop();
            continue;
        }
        *left -= 1;
        let Some(line) = line(&buf[at..])? else { return Ok(None) };
        at += line.len;
        match line.kind {
            b'$' => {
                let len = line.number()?;
                if len >= 0 {
                    let len = usize::try_from(len).unwrap_or(usize::MAX);
                    if len > MAX_FRAME {
                        return malformed(format!("a string announces {len} bytes"));
                    }
                    at += len + 2;
                }
            }
            b'*' => {
                let items = line.number()?;
                if items > 0 {
                    announced += items as u64;
                    if announced > MAX_ITEMS {
                        return malformed(format!("an array announces {items} elements"));
                    }
                    if pending.len() >= MAX_DEPTH {
                        return malformed(format!("arrays nest deeper than {MAX_DEPTH}"));
                    }
                    pending.push(items as u64);
                }
            }
            _ => {}
        }
        if at > MAX_FRAME {
            return malformed(format!("a reply is longer than {MAX_FRAME} bytes"));
        }
        if at > buf.len() {
            return Ok(None);
        }
    }
    Ok(Some(at))
}

/// A reply to a command that returns an integer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Integer {
    /// The integer that the server returned.
    Number(i64),
    /// The text of an error.
    Refused(String),
}

/// The integer at the start of `buf` with its length in bytes, or the text of an error that stands in its place;
/// `None` while a part is missing. The quick way for the replies of DBSIZE and EXISTS.
///
/// # Errors
/// [`Malformed`] where another kind of reply stands there.
pub fn integer(buf: &[u8]) -> Result<Option<(usize, Integer)>, Malformed> {
    let Some(line) = line(buf)? else { return Ok(None) };
    match line.kind {
        b':' => Ok(Some((line.len, Integer::Number(line.number()?)))),
        b'-' => Ok(Some((line.len, Integer::Refused(String::from_utf8_lossy(line.content).into_owned())))),
        kind => malformed(format!("`{}` stands where a number is expected", kind as char)),
    }
}

/// The key names of one batch, back to back in one allocation that is used again.
#[derive(Debug, Default)]
pub struct Names {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Names {
    /// Removes the names and keeps the allocation.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    /// Whether there is room for a name of this length.
    fn has_room(&self, len: usize) -> bool {
        self.bytes.len() + len <= MAX_KEPT
    }

    /// Keeps the first `keys` names.
    pub fn truncate(&mut self, keys: usize) {
        self.ends.truncate(keys);
        self.bytes.truncate(self.ends.last().copied().unwrap_or(0));
    }

    /// Number of names in the reply.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are no names.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The names, in the order in which they came.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.bytes[start..end])
    }
}

/// The reply to a SCAN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScanReply {
    /// The next cursor and how many keys were returned.
    Page {
        /// Where the next SCAN begins; 0: the walk is complete.
        cursor: u64,
        /// Number of keys in this reply.
        returned: u64,
    },
    /// An error line, without the dash. Its text is at the start of the buffer handed in; see [`ScanReader::error`].
    Refused,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Start,
    CursorHeader,
    NamesHeader,
    NameHeader,
    /// Bytes of a name (and its CRLF) still to come; and whether it is kept.
    NameBody {
        left: u64,
        keep: bool,
    },
}

/// The length that a header such as `$17\r\n` announces, and the header's own length, for lengths of one to three
/// digits; `None` for all else, right or wrong.
fn short_name(buf: &[u8]) -> Option<(usize, usize)> {
    let mut len = 0;
    for (place, &byte) in buf.get(1..5)?.iter().enumerate() {
        match byte {
            b'0'..=b'9' => len = len * 10 + usize::from(byte - b'0'),
            b'\r' if place > 0 && buf[0] == b'$' && buf.get(place + 2) == Some(&b'\n') => {
                return Some((len, place + 3));
            }
            _ => return None,
        }
    }
    None
}

/// Parses one SCAN reply as it arrives.
#[derive(Debug)]
pub struct ScanReader {
    step: Step,
    cursor: u64,
    returned: u64,
    left: u64,
    error: String,
}

impl Default for ScanReader {
    fn default() -> Self {
        Self { step: Step::Start, cursor: 0, returned: 0, left: 0, error: String::new() }
    }
}

impl ScanReader {
    /// The error line, after [`ScanReply::Refused`].
    pub fn error(&self) -> &str {
        &self.error
    }

    /// The cursor, once it has come. It comes before the names.
    pub fn cursor(&self) -> Option<u64> {
        matches!(self.step, Step::NameHeader | Step::NameBody { .. }).then_some(self.cursor)
    }

    /// Parses as much of `buf` as it can. Returns the number of bytes used, and the reply once it is complete. Stops
    /// once where the names begin, so that the caller may use the cursor before they are read. Names are appended to
    /// `names` where it is given.
    ///
    /// # Errors
    /// [`Malformed`] as soon as the bytes cannot become a SCAN reply within the bounds.
    pub fn feed(&mut self, buf: &[u8], mut names: Option<&mut Names>) -> Result<(usize, Option<ScanReply>), Malformed> {
        let mut at = 0;
        loop {
            if self.step == Step::NameHeader && self.left == 0 {
                return Ok((at, Some(ScanReply::Page { cursor: self.cursor, returned: self.returned })));
            }
            if self.step == Step::NameHeader
                && let Some((len, header)) = short_name(&buf[at..])
            {
                // The quick way for nearly every name. Other names are parsed below.
                let whole = header + len + 2;
                if let (Some(name), true) = (buf.get(at + header..at + header + len), at + whole <= buf.len()) {
                    if let Some(names) = names.as_deref_mut().filter(|names| names.has_room(len)) {
                        names.bytes.extend_from_slice(name);
                        names.ends.push(names.bytes.len());
                    }
                    at += whole;
                    self.left -= 1;
                    continue;
                }
            }
            if let Step::NameBody { left, keep } = self.step {
                let here = left.min((buf.len() - at) as u64) as usize;
                if let (true, Some(names)) = (keep, names.as_deref_mut()) {
                    names.bytes.extend_from_slice(&buf[at..at + here]);
                }
                at += here;
                let left = left - here as u64;
                if left > 0 {
                    self.step = Step::NameBody { left, keep };
                    return Ok((at, None));
                }
                if let (true, Some(names)) = (keep, names.as_deref_mut()) {
                    // The CRLF came along with the name.
                    let end = names.bytes.len() - 2;
                    names.bytes.truncate(end);
                    names.ends.push(end);
                }
                self.left -= 1;
                self.step = Step::NameHeader;
                continue;
            }
            let Some(line) = line(&buf[at..])? else { return Ok((at, None)) };
            match (self.step, line.kind) {
                (Step::Start, b'-') => {
                    self.error = String::from_utf8_lossy(line.content).into_owned();
                    return Ok((at + line.len, Some(ScanReply::Refused)));
                }
                (Step::Start, b'*') if line.number()? == 2 => {
                    at += line.len;
                    self.step = Step::CursorHeader;
                }
                (Step::CursorHeader, b'$') if (1..=20).contains(&line.number()?) => {
                    let len = line.number()? as usize;
                    if buf.len() < at + line.len + len + 2 {
                        // Wait for the digits too, so that the cursor never straddles two calls.
                        return Ok((at, None));
                    }
                    at += line.len;
                    let digits = &buf[at..at + len];
                    let text = std::str::from_utf8(digits).unwrap_or("");
                    self.cursor = match text.parse() {
                        Ok(cursor) => cursor,
                        Err(_) => return malformed("the cursor is not a number"),
                    };
                    at += len + 2;
                    self.step = Step::NamesHeader;
                }
                (Step::NamesHeader, b'*') => {
                    let items = line.number()?;
                    at += line.len;
                    self.left = u64::try_from(items).unwrap_or(0);
                    if self.left > MAX_NAMES {
                        return malformed(format!("SCAN announces {items} keys"));
                    }
                    self.returned = self.left;
                    self.step = Step::NameHeader;
                    return Ok((at, None));
                }
                (Step::NameHeader, b'$') => {
                    let len = line.number()?;
                    let Some(len) = u64::try_from(len).ok().filter(|&len| len <= MAX_NAME) else {
                        return malformed(format!("a key name announces {len} bytes"));
                    };
                    at += line.len;
                    let keep = len <= MAX_KEPT as u64 && names.as_deref().is_some_and(|n| n.has_room(len as usize));
                    self.step = Step::NameBody { left: len + 2, keep };
                }
                (_, kind) => return malformed(format!("`{}` stands where SCAN has something else", kind as char)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reply(cursor: u64, names: &[Vec<u8>]) -> Vec<u8> {
        let text = cursor.to_string();
        let mut bytes = format!("*2\r\n${}\r\n{text}\r\n*{}\r\n", text.len(), names.len()).into_bytes();
        for name in names {
            bytes.extend_from_slice(format!("${}\r\n", name.len()).as_bytes());
            bytes.extend_from_slice(name);
            bytes.extend_from_slice(b"\r\n");
        }
        bytes
    }

    /// Feeds `bytes` in pieces of `chunk`, as a socket would, and returns the reply, the names and what was left over.
    fn feed_all(bytes: &[u8], chunk: usize) -> Result<(Option<ScanReply>, Names, usize), Malformed> {
        let (mut reader, mut names, mut buf, mut used) = (ScanReader::default(), Names::default(), Vec::new(), 0);
        for piece in bytes.chunks(chunk) {
            buf.extend_from_slice(piece);
            loop {
                let (eaten, reply) = reader.feed(&buf, Some(&mut names))?;
                buf.drain(..eaten);
                used += eaten;
                if reply.is_some() {
                    return Ok((reply, names, bytes.len() - used));
                }
                if eaten == 0 {
                    break;
                }
            }
        }
        Ok((None, names, bytes.len() - used))
    }

    proptest! {
        #[test]
        fn a_scan_reply_is_read_the_same_however_it_is_cut(
            cursor: u64,
            names in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..20),
            chunk in 1_usize..60,
        ) {
            let mut bytes = reply(cursor, &names);
            bytes.extend_from_slice(b":7\r\n");
            let (got, kept, rest) = feed_all(&bytes, chunk).unwrap();
            prop_assert_eq!(got, Some(ScanReply::Page { cursor, returned: names.len() as u64 }));
            prop_assert_eq!(kept.iter().map(<[u8]>::to_vec).collect::<Vec<_>>(), names);
            prop_assert!(rest >= 4);
        }

        #[test]
        fn garbage_never_panics_and_never_claims_more_than_there_is(bytes: Vec<u8>) {
            if let Ok(Some(len)) = frame_len(&bytes) {
                prop_assert!(len <= bytes.len());
            }
            if let Ok((eaten, _)) = ScanReader::default().feed(&bytes, None) {
                prop_assert!(eaten <= bytes.len());
            }
        }

        #[test]
        fn resp_like_garbage_never_panics(
            parts in proptest::collection::vec(
                prop_oneof!["[*$:+-]-?[0-9]{0,19}\r\n", "[a-z]{0,9}\r\n"], 0..12)
        ) {
            let bytes = parts.concat().into_bytes();
            let _ = frame_len(&bytes);
            let _ = ScanReader::default().feed(&bytes, Some(&mut Names::default()));
        }
    }

    #[test]
    fn the_first_names_can_be_kept() {
        let (_, mut names, _) = feed_all(&reply(1, &[b"a".to_vec(), b"bc".to_vec(), b"".to_vec()]), 100).unwrap();
        names.truncate(2);
        assert_eq!(names.iter().collect::<Vec<_>>(), [&b"a"[..], b"bc"]);
        names.truncate(0);
        assert!(names.is_empty());
    }

    #[test]
    fn a_whole_frame_is_found_and_a_part_is_waited_for() {
        let whole = b"*2\r\n$3\r\nabc\r\n*1\r\n:5\r\n+more\r\n";
        assert_eq!(frame_len(whole), Ok(Some(21)));
        for cut in 0..21 {
            assert_eq!(frame_len(&whole[..cut]), Ok(None), "cut at {cut}");
        }
    }

    #[test]
    fn hostile_lengths_are_refused_before_memory_is_spent() {
        assert!(frame_len(b"$99999999999\r\n").is_err());
        assert!(frame_len(b"*99999999999\r\n").is_err());
        assert!(frame_len("*1\r\n".repeat(100).as_bytes()).is_err());
        assert!(frame_len(&vec![b'+'; MAX_LINE + 1]).is_err());
        assert!(frame_len(b"HTTP/1.1 400 Bad Request\r\n").is_err());
        assert!(feed_all(b"*2\r\n$1\r\n0\r\n*99999999999\r\n", 1000).is_err());
        assert!(feed_all(b"*2\r\n$1\r\n0\r\n*1\r\n$99999999999999\r\n", 1000).is_err());
        assert!(feed_all(b"*2\r\n$30\r\n", 1000).is_err());
    }

    #[test]
    fn a_flood_of_long_names_is_counted_and_not_kept() {
        let names = vec![vec![b'x'; MAX_KEPT / 4]; 12];
        let (got, kept, _) = feed_all(&reply(1, &names), 1 << 20).unwrap();
        assert_eq!(got, Some(ScanReply::Page { cursor: 1, returned: names.len() as u64 }));
        assert_eq!(kept.len(), 4);
    }

    #[test]
    fn many_small_arrays_cannot_announce_more_than_one_large_one() {
        let nested = "*2\r\n*900000\r\n".to_owned() + &":1\r\n".repeat(900_000) + "*900000\r\n";
        assert!(frame_len(nested.as_bytes()).is_err());
    }

    #[test]
    fn an_error_line_in_place_of_the_page_is_handed_over() {
        let mut reader = ScanReader::default();
        let (eaten, reply) = reader.feed(b"-NOPERM no scan\r\n:1\r\n", None).unwrap();
        assert_eq!((eaten, reply), (17, Some(ScanReply::Refused)));
        assert_eq!(reader.error(), "NOPERM no scan");
    }
}
