//! A random sample of the keys of a DB, free of any bias: whole pieces of its hash tables.
//!
//! RANDOMKEY prefers keys in thin places, and the replies to SCAN with a COUNT hold more of what lies behind long gaps. A piece is a
//! fixed stretch of the cursor space, drawn without looking: each key is in exactly one of them, and each piece of a stratum is drawn
//! with the same chance.
//!
//! A piece is walked by SCAN with COUNT 1, which ends at the first bucket that holds a key: so all names of a reply are of one bucket,
//! and the reply's cursor tells where that bucket ends. A bucket belongs to the piece in which it ends. Walked one after the other,
//! all pieces give every key exactly once, also where the table is larger or smaller than the cut, and while it is rehashed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::model::slots::{SLOTS, SlotSet, slot_of};
use crate::node::conn::Conn;
use crate::node::error::NodeError;

/// About so many keys are in a piece, or up to twice as many.
const KEYS_IN_PIECE: u64 = 64;
/// The spread among pieces is known from no fewer of them.
const LEAST_PIECES: u64 = 30;

/// How much of a server's time is taken.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// Commands in one write, which the server runs back to back.
    commands: usize,
    /// Of the time, how much is spent waiting for it.
    share: f64,
}

impl Pace {
    /// Nobody waits for a replica, or few do.
    pub(crate) const REPLICA: Self = Self { commands: 100, share: 0.5 };
    /// Everybody waits for a master.
    pub(crate) const MASTER: Self = Self { commands: 10, share: 0.05 };

    /// Leaves the server alone for as long as what has begun then makes necessary.
    async fn rest(self, begun: Instant) {
        tokio::time::sleep(begun.elapsed().mul_f64(1.0 / self.share - 1.0)).await;
    }
}

/// The hash tables of a DB, and how they are cut into pieces.
#[derive(Debug, Clone)]
pub(crate) struct Tables {
    keys: u64,
    /// Those that are cut into most pieces come first, so that the pieces of a stratum follow each other.
    tables: Vec<HashTable>,
}

/// One hash table, which is cut into `2^bits` pieces.
#[derive(Debug, Clone, Copy)]
struct HashTable {
    /// The hash slot whose keys it holds; `None`: it holds all keys of the DB.
    slot: Option<u16>,
    bits: u32,
    /// The number of its first piece.
    first: PieceNumber,
}

impl HashTable {
    fn pieces(self) -> u64 {
        1 << self.bits
    }
}

/// A piece, by its number.
pub(crate) type PieceNumber = u64;

/// Pieces that are like each other, and those of them that were drawn.
#[derive(Debug, Clone)]
pub(crate) struct Stratum {
    /// The pieces to look at.
    pub drawn: Vec<PieceNumber>,
    /// How many pieces there are.
    pub pieces: u64,
}

impl Stratum {
    /// How many pieces were drawn, and of how many.
    pub(crate) fn part(&self) -> (f64, f64) {
        (self.drawn.len() as f64, self.pieces as f64)
    }
}

impl Tables {
    /// One table with so many keys.
    pub(crate) fn one(keys: u64) -> Self {
        Self::new(keys, [(None, keys)])
    }

    /// A table for each of these slots, with so many keys. `keys` are those of all slots together.
    pub(crate) fn by_slot(keys: u64, sizes: impl IntoIterator<Item = (u16, u64)>) -> Self {
        Self::new(keys, sizes.into_iter().map(|(slot, keys)| (Some(slot), keys)))
    }

    fn new(keys: u64, sizes: impl IntoIterator<Item = (Option<u16>, u64)>) -> Self {
        let table = |(slot, keys)| HashTable { slot, bits: bits_of(keys), first: 0 };
        let mut tables: Vec<_> = sizes.into_iter().map(table).collect();
        tables.sort_by_key(|table| std::cmp::Reverse(table.bits));
        let mut first = 0;
        for table in &mut tables {
            table.first = first;
            first += table.pieces();
        }
        Self { keys, tables }
    }

    /// Draws pieces that hold about so many keys, none twice, by strata, so that what differs between these makes no error. Hash tags may
    /// put most keys into few slots: a slot from which enough pieces are drawn is a stratum of its own. The other slots with several
    /// pieces are one, and those with a single one, which holds few keys, another.
    ///
    /// The same share of each stratum is drawn, but enough to know the spread, and all pieces where that would be the half.
    pub(crate) fn draw(&self, keys: u64) -> Vec<Stratum> {
        let share = (keys as f64 / self.keys.max(1) as f64).min(1.0);
        let wanted = |pieces: u64| ((share * pieces as f64).ceil() as u64).max(LEAST_PIECES);
        let stratum = |table: &HashTable| {
            let is_enough = wanted(table.pieces()) > LEAST_PIECES;
            (is_enough.then_some(table.first), table.bits > 0)
        };
        let strata = self.tables.chunk_by(|one, next| stratum(one) == stratum(next));
        let draw = |tables: &[HashTable]| {
            let pieces: u64 = tables.iter().map(|table| table.pieces()).sum();
            let (all, wanted) = (tables[0].first..tables[0].first + pieces, wanted(pieces));
            if wanted > pieces / 2 {
                return Stratum { drawn: all.collect(), pieces };
            }
            let mut drawn = BTreeSet::new();
            while (drawn.len() as u64) < wanted {
                drawn.insert(fastrand::u64(all.clone()));
            }
            Stratum { drawn: drawn.into_iter().collect(), pieces }
        };
        strata.map(draw).collect()
    }

    /// Where a piece begins and ends.
    fn range(&self, number: PieceNumber) -> Range {
        let behind = self.tables.partition_point(|table| table.first <= number);
        let HashTable { slot, bits, first } = self.tables[behind - 1];
        let part = number - first;
        let first = if bits == 0 { 0 } else { part << (64 - bits) };
        Range { slot, first, last: first | (u64::MAX >> bits) }
    }
}

fn bits_of(keys: u64) -> u32 {
    (keys / KEYS_IN_PIECE).checked_ilog2().unwrap_or(0)
}

/// How many keys are in each of these slots, or `None` without the right to CLUSTER COUNTKEYSINSLOT.
///
/// # Errors
/// [`NodeError`] of the connection.
pub(crate) async fn slot_sizes(
    conn: &mut Conn,
    slots: &SlotSet,
    pace: Pace,
) -> Result<Option<Vec<(u16, u64)>>, NodeError> {
    let slots: Vec<u16> = slots.ranges().cloned().flatten().collect();
    let mut sizes = Vec::with_capacity(slots.len());
    for some in slots.chunks(pace.commands) {
        let count = |slot: &u16| redis::cmd("CLUSTER").arg("COUNTKEYSINSLOT").arg(*slot).to_owned();
        let commands: Vec<_> = some.iter().map(count).collect();
        let begun = Instant::now();
        let replies = conn.call_all::<u64>("CLUSTER COUNTKEYSINSLOT", &commands).await?;
        pace.rest(begun).await;
        for (slot, reply) in some.iter().zip(replies) {
            match reply {
                Ok(keys) => sizes.push((*slot, keys)),
                Err(error) if error.is_no_permission() => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
    Ok(Some(sizes))
}

/// A stretch of the cursor space, by rank: SCAN counts the reversed bits of its cursor up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    slot: Option<u16>,
    first: u64,
    last: u64,
}

/// The slot is in the low bits of a cursor.
const SLOT_BITS: u32 = SLOTS.trailing_zeros();

impl Range {
    fn cursor(&self) -> u64 {
        match self.slot {
            None => self.first.reverse_bits(),
            Some(slot) => self.first.reverse_bits() << SLOT_BITS | u64::from(slot),
        }
    }

    /// The last rank of the bucket that a reply with this cursor was about.
    fn ends(&self, cursor: u64) -> u64 {
        match self.slot {
            None if cursor == 0 => u64::MAX,
            None => cursor.reverse_bits() - 1,
            // The walk has gone on to another slot, or there is none.
            Some(slot) if cursor == 0 || cursor & u64::from(SLOTS - 1) != u64::from(slot) => u64::MAX,
            Some(_) => (cursor >> SLOT_BITS).reverse_bits() - 1,
        }
    }
}

/// A key of the sample that has not expired.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Key {
    /// Its name, which may be any bytes.
    pub name: Vec<u8>,
    /// How long it lives from the beginning of the forecast on; `None`: for ever.
    pub ttl: Option<Duration>,
}

/// The keys of one piece.
pub(crate) type Piece = Vec<Key>;

/// A walk of one piece.
struct Walker {
    range: Range,
    cursor: u64,
    names: Vec<Vec<u8>>,
}

/// Walks pieces, many at a time.
pub(crate) struct Walk {
    to_come: std::vec::IntoIter<Range>,
    walkers: Vec<Walker>,
    /// Pieces that are done, and that nobody has taken yet.
    done: Vec<Piece>,
    pace: Pace,
    /// TTLs are counted from here, however long the walk takes.
    from: Instant,
}

impl Walk {
    /// A walk of these pieces. TTLs are counted from `from`.
    pub(crate) fn new(tables: &Tables, pieces: Vec<PieceNumber>, pace: Pace, from: Instant) -> Self {
        let ranges: Vec<_> = pieces.into_iter().map(|number| tables.range(number)).collect();
        Self { to_come: ranges.into_iter(), walkers: Vec::new(), done: Vec::new(), pace, from }
    }

    /// The next piece, or `None` after the last one.
    ///
    /// # Errors
    /// [`NodeError`].
    pub(crate) async fn next(&mut self, conn: &mut Conn) -> Result<Option<Piece>, NodeError> {
        loop {
            if let Some(piece) = self.done.pop() {
                return Ok(Some(piece));
            }
            let more = self.pace.commands - self.walkers.len();
            let new = self.to_come.by_ref().take(more);
            self.walkers.extend(new.map(|range| Walker { cursor: range.cursor(), range, names: Vec::new() }));
            if self.walkers.is_empty() {
                return Ok(None);
            }
            self.step(conn).await?;
        }
    }

    /// One SCAN for each piece under way; then the TTLs of the pieces that are done.
    async fn step(&mut self, conn: &mut Conn) -> Result<(), NodeError> {
        let scan = |walker: &Walker| redis::cmd("SCAN").arg(walker.cursor).arg("COUNT").arg(1).to_owned();
        let commands: Vec<_> = self.walkers.iter().map(scan).collect();
        let begun = Instant::now();
        let replies = conn.call_all::<(String, Vec<Vec<u8>>)>("SCAN", &commands).await?;
        self.pace.rest(begun).await;
        let mut names: Vec<(usize, Vec<u8>)> = Vec::new();
        let mut ended = 0;
        let mut walkers = Vec::new();
        for (mut walker, reply) in std::mem::take(&mut self.walkers).into_iter().zip(replies) {
            let (cursor, found) = reply?;
            let cursor: u64 = cursor.parse().map_err(|_| NodeError::Protocol {
                addr: conn.addr().clone(),
                command: "SCAN",
                detail: format!("the cursor {cursor:?} is no number"),
            })?;
            let end = walker.range.ends(cursor);
            if end <= walker.range.last {
                let ours = |name: &Vec<u8>| walker.range.slot.is_none_or(|slot| slot_of(name) == slot);
                walker.names.extend(found.into_iter().filter(ours));
            }
            if end < walker.range.last {
                walker.cursor = cursor;
                walkers.push(walker);
            } else {
                names.extend(walker.names.into_iter().map(|name| (ended, name)));
                ended += 1;
            }
        }
        self.walkers = walkers;
        let mut pieces = vec![Piece::new(); ended];
        for some in names.chunks(self.pace.commands) {
            let commands: Vec<_> = some.iter().map(|(_, name)| redis::cmd("PTTL").arg(name).to_owned()).collect();
            let begun = Instant::now();
            let replies = conn.call_all::<i64>("PTTL", &commands).await?;
            let since = self.from.elapsed();
            self.pace.rest(begun).await;
            for ((piece, name), reply) in some.iter().zip(replies) {
                let ttl = match reply? {
                    // It has expired meanwhile, or was deleted.
                    -2 => continue,
                    ms => u64::try_from(ms).ok().map(|ms| Duration::from_millis(ms) + since),
                };
                pieces[*piece].push(Key { name: name.clone(), ttl });
            }
        }
        self.done = pieces;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(tables: &Tables) -> u64 {
        tables.tables.iter().map(|table| table.pieces()).sum()
    }

    #[test]
    fn pieces_cover_the_cursor_space_without_a_gap_or_an_overlap() {
        for keys in [0, 1, 127, 128, 129, 100_000, 10_000_000] {
            let table = Tables::one(keys);
            let mut next = 0_u128;
            for number in 0..pieces(&table) {
                let range = table.range(number);
                assert_eq!(u128::from(range.first), next, "{keys} keys, piece {number}");
                next = u128::from(range.last) + 1;
            }
            assert_eq!(next, 1 << 64, "{keys} keys");
            let in_piece = keys / pieces(&table);
            assert!(in_piece < 2 * KEYS_IN_PIECE, "{keys} keys: {in_piece} in a piece");
        }
    }

    #[test]
    fn a_table_for_each_slot_is_cut_by_slot() {
        let slots = SlotSet::new([0..=9, 16_380..=16_383]);
        let sizes = slots.ranges().cloned().flatten().map(|slot| (slot, 256));
        let table = Tables::by_slot(14 * 256, sizes);
        assert_eq!(pieces(&table), 14 * 4);
        let last = table.range(pieces(&table) - 1);
        assert_eq!((last.slot, last.first, last.last), (Some(16_383), 3 << 62, u64::MAX));
        assert_eq!(last.cursor(), 3 << SLOT_BITS | 16_383);
        assert_eq!(last.ends(5), u64::MAX, "the reply leads to another slot");
    }

    #[test]
    fn a_slot_with_many_keys_is_cut_into_pieces_as_small_as_those_of_the_others() {
        let table = Tables::by_slot(128_100, [(3, 50), (7, 0), (9, 128_000), (11, 50)]);
        assert_eq!(pieces(&table), 1 + 1 + 1_024 + 1);
        let heavy: Vec<_> = (0..1_024).map(|number| table.range(number)).collect();
        assert!(heavy.iter().all(|range| range.slot == Some(9)));
        assert_eq!((heavy[0].first, heavy[1_023].last), (0, u64::MAX));
        assert!(heavy.windows(2).all(|two| two[0].last + 1 == two[1].first));
        assert_eq!(table.range(1_026), Range { slot: Some(11), first: 0, last: u64::MAX });
    }

    #[test]
    fn what_is_drawn_is_drawn_once_and_small_tables_are_taken_whole() {
        let table = Tables::one(1_000_000);
        let [stratum] = &table.draw(100_000)[..] else { panic!("one table is one stratum") };
        let distinct: BTreeSet<_> = stratum.drawn.iter().collect();
        assert_eq!(distinct.len(), stratum.drawn.len());
        assert_eq!(stratum.pieces, pieces(&table));
        assert!((stratum.drawn.len() as f64 / stratum.pieces as f64 - 0.1).abs() < 0.01);
        let small = &Tables::one(150_000).draw(100_000)[0];
        assert_eq!(small.drawn.len() as u64, small.pieces);
    }

    #[test]
    fn slots_with_many_keys_are_drawn_apart_from_each_other_and_from_the_rest() {
        let light = (100..1_100).map(|slot| (slot, 2));
        let table =
            Tables::by_slot(122_000, [(7, 40_000), (3, 70_000), (5, 5_000), (9, 5_000)].into_iter().chain(light));
        let strata = table.draw(12_200);
        let sizes: Vec<_> = strata.iter().map(|stratum| (stratum.drawn.len(), stratum.pieces)).collect();
        assert_eq!(sizes, [(103, 1_024), (52, 512), (30, 128), (100, 1_000)]);
        let mut first = 0;
        for stratum in strata {
            assert!(stratum.drawn.iter().all(|piece| (first..first + stratum.pieces).contains(piece)));
            first += stratum.pieces;
        }
        assert_eq!(first, pieces(&table));
        assert_eq!(Tables::by_slot(2_000, (0..1_000).map(|slot| (slot, 2))).draw(1 << 40).len(), 1);
    }
}
