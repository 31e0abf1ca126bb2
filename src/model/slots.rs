//! Hash slots of a cluster, and how SCAN cursors are ordered, also those that hold a slot.

use std::fmt;
use std::ops::RangeInclusive;

use crate::model::shard::{Cursor, ScanPosition};

/// How many hash slots a cluster has.
pub const SLOTS: u16 = 16_384;

/// A set of hash slots, as ranges that are sorted and do not touch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SlotSet(Vec<RangeInclusive<u16>>);

impl SlotSet {
    /// The set of all slots in the ranges. Slots that no cluster has are left out.
    pub fn new(ranges: impl IntoIterator<Item = RangeInclusive<u16>>) -> Self {
        let mut sorted: Vec<_> = ranges.into_iter().filter(|r| !r.is_empty() && *r.end() < SLOTS).collect();
        sorted.sort_by_key(|range| *range.start());
        let mut merged: Vec<RangeInclusive<u16>> = Vec::with_capacity(sorted.len());
        for range in sorted {
            match merged.last_mut() {
                Some(last) if *range.start() <= *last.end() + 1 => {
                    *last = *last.start()..=*last.end().max(range.end());
                }
                _ => merged.push(range),
            }
        }
        Self(merged)
    }

    /// The set of all slots.
    pub fn all() -> Self {
        Self(vec![0..=SLOTS - 1])
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The number of slots in the set.
    pub fn len(&self) -> u32 {
        self.0.iter().map(|r| u32::from(r.end() - r.start()) + 1).sum()
    }

    /// A short name that tells sets apart: the ranges, or of many the first and a checksum over all.
    pub fn name(&self) -> String {
        const SHOWN: usize = 3;
        if self.0.len() <= SHOWN {
            return self.to_string();
        }
        let sum = self.0.iter().flat_map(|r| [*r.start(), *r.end()]).fold(0x811C_9DC5_u32, |sum, slot| {
            slot.to_be_bytes().iter().fold(sum, |sum, byte| (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
        });
        format!("{},+{} ranges #{sum:08x}", Self(self.0[..SHOWN].to_vec()), self.0.len() - SHOWN)
    }

    /// The ranges of the set, lowest first.
    pub fn ranges(&self) -> impl Iterator<Item = &RangeInclusive<u16>> {
        self.0.iter()
    }

    /// The range of the lowest slots; `None` if the set is empty.
    pub fn first(&self) -> Option<&RangeInclusive<u16>> {
        self.0.first()
    }

    /// The number of slots in the set that are below `slot`.
    pub fn below(&self, slot: u16) -> u32 {
        let parts = self.0.iter().take_while(|r| *r.start() < slot);
        parts.map(|r| u32::from((*r.end()).min(slot - 1) - r.start()) + 1).sum()
    }

    /// The slot of the set that has `place` others of the set below it.
    pub fn nth(&self, place: u32) -> Option<u16> {
        let mut below = place;
        for range in &self.0 {
            let len = u32::from(range.end() - range.start()) + 1;
            if below < len {
                return Some(range.start() + below as u16);
            }
            below -= len;
        }
        None
    }

    /// The slots of this set that are not in the other.
    pub fn minus(&self, other: &Self) -> Self {
        let mut left = Vec::new();
        for range in &self.0 {
            let mut from = u32::from(*range.start());
            for hole in other.0.iter().filter(|hole| hole.end() >= range.start() && hole.start() <= range.end()) {
                if u32::from(*hole.start()) > from {
                    left.push(from as u16..=hole.start() - 1);
                }
                from = from.max(u32::from(*hole.end()) + 1);
            }
            if from <= u32::from(*range.end()) {
                left.push(from as u16..=*range.end());
            }
        }
        Self(left)
    }

    /// The slots that are in both sets.
    pub fn common(&self, other: &Self) -> Self {
        self.minus(&self.minus(other))
    }

    /// The number of slots that are in both sets.
    pub fn overlap(&self, other: &Self) -> u32 {
        self.len() - self.minus(other).len()
    }
}

impl fmt::Display for SlotSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, range) in self.0.iter().enumerate() {
            let comma = if place > 0 { "," } else { "" };
            match (range.start(), range.end()) {
                (start, end) if start == end => write!(f, "{comma}{start}")?,
                (start, end) => write!(f, "{comma}{start}-{end}")?,
            }
        }
        Ok(())
    }
}

/// The slot of a key: CRC16 (XMODEM) of its name modulo 16384, or of the part in the first braces where that is not
/// empty. By the cluster specification.
pub fn slot_of(name: &[u8]) -> u16 {
    let tag = name.iter().position(|&byte| byte == b'{').and_then(|open| {
        let rest = &name[open + 1..];
        rest.iter().position(|&byte| byte == b'}').filter(|&length| length > 0).map(|length| &rest[..length])
    });
    let crc = tag.unwrap_or(name).iter().fold(0_u16, |crc, &byte| {
        (0..8).fold(crc ^ u16::from(byte) << 8, |crc, _| if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 })
    });
    crc % SLOTS
}

/// What the cursors of a pass mean.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum CursorSpace {
    /// One hash table for the DB: a standalone server, or a cluster node before Redis 7.4 and Valkey 8.
    #[default]
    OneTable,
    /// One hash table for each slot: the low 14 bits of the cursor are the slot. The node owns these.
    BySlot(SlotSet),
}

impl CursorSpace {
    /// Share of the pass that is done, in `[0, 1]`.
    pub fn fraction(&self, position: ScanPosition) -> f64 {
        match (position, self) {
            (ScanPosition::NotStarted, _) => 0.0,
            (ScanPosition::Finished, _) => 1.0,
            (ScanPosition::At(cursor), Self::OneTable) => cursor.fraction(),
            (ScanPosition::At(cursor), Self::BySlot(owned)) => {
                let (slot, inside) = split(cursor);
                // A slot that is being imported is swept too and not owned: the fraction then stands for a moment.
                let inside = if owned.below(slot + 1) > owned.below(slot) { in_64_bits(inside) } else { 0.0 };
                ((f64::from(owned.below(slot)) + inside) / f64::from(owned.len().max(1))).min(1.0)
            }
        }
    }

    /// A position as a value that grows during a pass: the next position of a real server always has a greater one.
    pub fn rank(&self, position: ScanPosition) -> (u16, u64) {
        match (position, self) {
            (ScanPosition::NotStarted, _) => (0, 0),
            (ScanPosition::Finished, _) => (u16::MAX, u64::MAX),
            (ScanPosition::At(cursor), Self::OneTable) => (0, cursor.0.get().reverse_bits()),
            (ScanPosition::At(cursor), Self::BySlot(_)) => split(cursor),
        }
    }

    /// With the pass cut into `2^bits` parts, where the part behind the one of `position` begins;
    /// [`ScanPosition::Finished`] where that is the last one. A SCAN may begin at any bucket: a walk from one place
    /// that ends at or behind a later one meets each key that is there meanwhile between the two, as a whole pass does.
    pub fn cut_after(&self, position: ScanPosition, bits: u32) -> ScanPosition {
        let (slot, inside) = self.rank(position);
        let cursor = match self {
            Self::OneTable => {
                let Some(unused) = 64_u32.checked_sub(bits).filter(|&unused| unused < 64) else {
                    return ScanPosition::Finished;
                };
                let part = (inside >> unused) + 1;
                if part >> bits > 0 {
                    return ScanPosition::Finished;
                }
                (part << unused).reverse_bits()
            }
            Self::BySlot(owned) => {
                let width = (owned.len() >> bits).max(1);
                owned.nth((owned.below(slot) / width + 1) * width).map_or(0, u64::from)
            }
        };
        ScanPosition::from_reply(cursor)
    }
}

/// The slot, and how far the walk of its table has come: bits reversed, so that it grows.
fn split(cursor: Cursor) -> (u16, u64) {
    let cursor = cursor.0.get();
    ((cursor % u64::from(SLOTS)) as u16, (cursor / u64::from(SLOTS)).reverse_bits())
}

fn in_64_bits(reversed: u64) -> f64 {
    reversed as f64 / 18_446_744_073_709_551_616.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn members(set: &SlotSet) -> BTreeSet<u16> {
        set.0.iter().flat_map(Clone::clone).collect()
    }

    fn ranges() -> impl Strategy<Value = SlotSet> {
        // A narrow span, so that ranges meet and overlap.
        proptest::collection::vec((0_u16..60, 0_u16..9), 0..8)
            .prop_map(|parts| SlotSet::new(parts.into_iter().map(|(from, len)| from..=from + len)))
    }

    proptest! {
        #[test]
        fn a_slot_set_is_the_set_of_its_members(a in ranges(), b in ranges(), slot in 0_u16..80) {
            let (in_a, in_b) = (members(&a), members(&b));
            prop_assert_eq!(a.len() as usize, in_a.len());
            prop_assert_eq!(a.below(slot) as usize, in_a.range(..slot).count());
            prop_assert_eq!(members(&a.minus(&b)), in_a.difference(&in_b).copied().collect::<BTreeSet<_>>());
            prop_assert_eq!(a.overlap(&b) as usize, in_a.intersection(&in_b).count());
            prop_assert_eq!(SlotSet::new(a.0.clone()), a);
        }

        #[test]
        fn the_fraction_stays_within_one_whatever_the_cursor(cursor: u64, owned in ranges()) {
            let fraction = CursorSpace::BySlot(owned).fraction(ScanPosition::from_reply(cursor));
            prop_assert!((0.0..=1.0).contains(&fraction));
        }
    }

    #[test]
    fn the_fraction_counts_the_owned_slots_below_the_cursors() {
        let space = CursorSpace::BySlot(SlotSet::new([100..=103, 16_380..=16_383]));
        let at = |slot: u64, inside: u64| space.fraction(ScanPosition::from_reply(inside << 14 | slot));
        assert_eq!(at(100, 0), 0.0);
        assert_eq!(at(100, 1), 0.5 / 8.0);
        assert_eq!(at(102, 0), 2.0 / 8.0);
        assert_eq!(at(5000, 1), 4.0 / 8.0, "a slot that is only passing through");
        assert_eq!(at(16_383, 1), 7.5 / 8.0);
    }

    #[test]
    fn a_pass_moves_up_through_slots_and_their_tables() {
        let space = CursorSpace::BySlot(SlotSet::new([0..=SLOTS - 1]));
        let rank = |slot: u64, inside: u64| space.rank(ScanPosition::from_reply(inside << 14 | slot));
        assert!(space.rank(ScanPosition::NotStarted) < rank(0, 2));
        assert!(rank(0, 2) < rank(0, 1) && rank(0, 1) < rank(0, 3) && rank(0, 3) < rank(1, 0));
        assert!(rank(16_383, 3) < space.rank(ScanPosition::Finished));
    }

    #[test]
    fn keys_have_the_slots_of_the_specification() {
        // The specification's own examples, and what servers say.
        assert_eq!(slot_of(b"123456789"), 0x31C3);
        assert_eq!(slot_of(b"{user1000}.following"), slot_of(b"user1000"));
        assert_eq!(slot_of(b"foo{}{bar}"), 8_363);

        assert_eq!(slot_of(b"foo{{bar}}zap"), slot_of(b"{bar"));
        assert_eq!(slot_of(b"foo"), 12_182);
    }

    #[test]
    fn slots_are_shown_as_ranges() {
        let set = SlotSet::new([7..=7, 0..=3, 4..=5, 100..=200]);
        assert_eq!(set.to_string(), "0-5,7,100-200");
        assert_eq!(set.name(), "0-5,7,100-200");
        let many = |last| SlotSet::new([0..=1, 3..=4, 6..=7, 9..=10, 12..=last]).name();
        assert!(many(13).starts_with("0-1,3-4,6-7,+2 ranges #"), "{}", many(13));
        assert_ne!(many(13), many(14));
    }
}
