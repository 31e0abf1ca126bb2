//! One master with its replicas, and positions of its sweep.

use std::fmt;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::str::FromStr;

/// Names a shard for the life of its task: the address of a standalone server, the name that sentinels give a master,
/// or the hash slots that a cluster master owned when the task met it (`slots 0-5460`). A failover changes none of these,
/// so a task that is resumed finds its shards; one whose slots have changed meanwhile has another name and is swept anew.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardId(pub String);

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The address at which a server process listens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NodeAddr {
    /// A host name or address, and a port.
    Tcp {
        /// Host name, IPv4 or IPv6 address, without brackets.
        host: String,
        /// TCP port, from a URL or as a node announces it.
        port: u16,
    },
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for NodeAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// `run_id` of INFO: changes with every start of the server process. A cursor means nothing to another process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunId(pub String);

impl RunId {
    /// A hash of the run id, stored with each position. Two processes share one with a chance of 1 in 2^64.
    pub fn fingerprint(&self) -> u64 {
        // FNV-1a: stable across versions of this program, which a hasher of the standard library is not.
        self.0.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
    }
}

/// Number of a logical database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DbIndex(pub u32);

impl fmt::Display for DbIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "db{}", self.0)
    }
}

/// A SCAN cursor somewhere inside a pass. `0` is not one: it means both "start" and "end" on the wire, and
/// [`ScanPosition`] keeps those two apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor(pub NonZeroU64);

impl Cursor {
    /// The share of the hash space that lies behind this cursor, in `[0, 1)`.
    ///
    /// SCAN counts with the bits of the cursor reversed, highest bit first, so the reversed cursor grows evenly
    /// from 0 to 2^64 whatever the size of the table. Holds where a DB is one table: see
    /// [`CursorSpace`](crate::model::slots::CursorSpace), which every caller asks.
    pub fn fraction(self) -> f64 {
        // 2^64 as a float; the division cannot reach 1.0 for any cursor that a real table yields.
        self.0.get().reverse_bits() as f64 / 18_446_744_073_709_551_616.0
    }
}

/// How far a pass has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScanPosition {
    /// No batch was done; the first SCAN sends 0.
    #[default]
    NotStarted,
    /// The next SCAN sends this cursor.
    At(Cursor),
    /// The server answered 0: the pass is complete.
    Finished,
}

impl ScanPosition {
    /// The position that the cursor of a SCAN reply stands for.
    pub fn from_reply(cursor: u64) -> Self {
        NonZeroU64::new(cursor).map_or(Self::Finished, |c| Self::At(Cursor(c)))
    }

    /// The cursor to send next; `None` where the pass is complete.
    pub fn to_send(self) -> Option<u64> {
        match self {
            Self::NotStarted => Some(0),
            Self::At(cursor) => Some(cursor.0.get()),
            Self::Finished => None,
        }
    }
}

impl fmt::Display for ScanPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotStarted => f.write_str("start"),
            Self::At(cursor) => write!(f, "{}", cursor.0),
            Self::Finished => f.write_str("end"),
        }
    }
}

/// A stored position that is none of `start`, `end` or a non-zero number.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a scan position: expected `start`, `end` or a cursor above 0")]
pub struct BadPosition(String);

impl FromStr for ScanPosition {
    type Err = BadPosition;

    fn from_str(text: &str) -> Result<Self, BadPosition> {
        match text {
            "start" => Ok(Self::NotStarted),
            "end" => Ok(Self::Finished),
            number => {
                number.parse::<NonZeroU64>().map(|c| Self::At(Cursor(c))).map_err(|_| BadPosition(text.to_owned()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::slots::CursorSpace;
    use proptest::prelude::*;

    #[test]
    fn zero_from_the_server_is_the_end_and_zero_to_the_server_is_the_start() {
        assert_eq!(ScanPosition::from_reply(0), ScanPosition::Finished);
        assert_eq!(ScanPosition::NotStarted.to_send(), Some(0));
        assert_eq!(ScanPosition::Finished.to_send(), None);
    }

    #[test]
    fn fraction_follows_the_reversed_bits() {
        let at = |c| CursorSpace::OneTable.fraction(ScanPosition::from_reply(c));
        assert_eq!(at(1), 0.5);
        assert_eq!(at(2), 0.25);
        assert_eq!(at(3), 0.75);
        assert_eq!(CursorSpace::OneTable.fraction(ScanPosition::Finished), 1.0);
        assert_eq!(CursorSpace::OneTable.fraction(ScanPosition::NotStarted), 0.0);
    }

    #[test]
    fn an_ipv6_address_is_shown_in_brackets() {
        let addr = NodeAddr::Tcp { host: "::1".into(), port: 6379 };
        assert_eq!(addr.to_string(), "[::1]:6379");
    }

    proptest! {
        #[test]
        fn a_position_survives_its_text_form(cursor: u64) {
            let position = ScanPosition::from_reply(cursor);
            prop_assert_eq!(position.to_string().parse::<ScanPosition>().unwrap(), position);
        }

        #[test]
        fn fraction_stays_within_one_for_every_cursor(cursor: u64) {
            let fraction = CursorSpace::OneTable.fraction(ScanPosition::from_reply(cursor));
            prop_assert!((0.0..=1.0).contains(&fraction));
        }
    }
}
