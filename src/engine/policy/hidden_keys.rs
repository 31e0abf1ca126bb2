//! Expired keys that the server hides: it neither returns nor deletes them, because it may not delete just now. Arithmetic on the
//! replies proves that there are some. Called by [`super::verdict`].

use crate::model::shard::ScanPosition;
use crate::model::slots::CursorSpace;
use crate::node::conn::Reply;

/// The most buckets that one SCAN walks, whether it finds keys or not: the server's loop counts down from 10 x COUNT and tests the
/// counter after it has walked a bucket. Seen on Redis 6.2, 7.0, 8.2 and Valkey 8.0.
fn bucket_limit(count: u32) -> u64 {
    u64::from(count) * 10 + 1
}

/// What a batch proves about hidden keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hidden {
    /// The batch proves neither that keys are hidden nor that none are.
    Unproven,
    /// The batch visited at least this many keys that it neither returned nor reclaimed.
    Keys(u64),
    /// The batch brought fewer keys than COUNT, with or without hidden keys. Its whole range has to be walked again in batches of
    /// COUNT 1, which prove it either way and also reclaim what is not hidden any more.
    Open,
}

/// What this batch proves about hidden keys.
///
/// A SCAN ends when it has visited COUNT keys, or walked the most buckets that it may, or reached the end of the table. If neither of
/// the last two ended it and `returned + reclaimed` is below COUNT, the missing keys were hidden. The cursors show how many buckets it
/// walked: each bucket adds one unit, 2^(64 - bits of the table), to the bit-reversed cursor. So a walk that ended at the limit advanced
/// by the limit times a power of two. If the table has shrunk since the cursor was given, the first of these buckets began before the
/// cursor.
///
/// If each slot has a table of its own, a walk through several tables does not show how many buckets it walked. A table shrinks when
/// one bucket in ten holds a key, so on average COUNT keys are met before the limit, but sometimes fewer.
pub fn hidden(space: &CursorSpace, from: ScanPosition, count: u32, reply: &Reply) -> Hidden {
    let next = reply.to;
    if next == ScanPosition::Finished || from == ScanPosition::Finished {
        return Hidden::Unproven;
    }
    let missing = u64::from(count).saturating_sub(reply.seen());
    let ((table, begin), (next_table, end)) = (space.rank(from), space.rank(next));
    // Which table comes first is known only after the first batch.
    let by_slot = matches!(space, CursorSpace::BySlot(_));
    let crossed = table != next_table || (by_slot && from == ScanPosition::NotStarted);
    match missing {
        0 => Hidden::Unproven,
        _ if crossed => Hidden::Open,
        _ if (0..=end.trailing_zeros().min(63)).any(|k| (end >> k).wrapping_sub(begin >> k) == bucket_limit(count)) => {
            Hidden::Unproven
        }
        keys => Hidden::Keys(keys),
    }
}

/// What a whole pass without changes proves: every DBSIZE was the same and nothing was reclaimed, yet SCAN returned fewer keys than
/// DBSIZE counts. SCAN returns each key that exists from beginning to end, so the others were hidden. This is the only proof for a DB
/// that is so small that every batch ends at the end of the table.
#[derive(Debug, Clone, Copy, Default)]
pub struct StillPass {
    keys: Option<u64>,
    moved: bool,
    returned: u64,
}

impl StillPass {
    /// Adds the reply of a batch of the pass.
    pub fn add(&mut self, reply: &Reply) {
        self.moved |= reply.after.keys != reply.before.keys || self.keys.is_some_and(|keys| keys != reply.before.keys);
        self.keys = Some(reply.after.keys);
        self.returned += reply.returned;
    }

    /// A part of the pass was not added, was walked without names, or was walked twice: the pass proves nothing.
    pub fn proves_nothing(&mut self) {
        self.moved = true;
    }

    /// How many keys this pass proves to be hidden.
    pub fn hidden(&self) -> u64 {
        if self.moved { 0 } else { self.keys.unwrap_or(0).saturating_sub(self.returned) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::conn::Reading;

    fn batch(cursor: u64, returned: u64, keys_before: u64, keys_after: u64) -> Reply {
        let reading = |keys| Reading { keys, expired: None };
        let (before, after) = (reading(keys_before), reading(keys_after));
        Reply { to: ScanPosition::from_reply(cursor), returned, before, after }
    }

    /// The cursor after `buckets` buckets of a table of 2^`bits`.
    fn cursor(buckets: u64, bits: u32) -> u64 {
        (buckets << (64 - bits)).reverse_bits()
    }

    #[test]
    fn fewer_keys_than_count_before_the_bucket_limit_are_hidden_keys() {
        let walked = |buckets, returned, before, after| {
            hidden(
                &CursorSpace::OneTable,
                ScanPosition::NotStarted,
                100,
                &batch(cursor(buckets, 12), returned, before, after),
            )
        };
        assert_eq!(walked(131, 30, 3700, 3700), Hidden::Keys(70), "returned 30 of 100");
        assert_eq!(walked(131, 30, 3700, 3630), Hidden::Unproven, "the other 70 were reclaimed");
        assert_eq!(walked(131, 104, 3700, 3700), Hidden::Unproven, "more than asked for");
    }

    #[test]
    fn a_sparse_table_ends_at_the_bucket_limit_and_proves_nothing() {
        for count in [10_u32, 75, 99, 100, 640, 1000] {
            for bits in [15, 20, 30] {
                let limit = bucket_limit(count);
                let from = ScanPosition::from_reply(cursor(limit, bits));
                assert_eq!(
                    hidden(&CursorSpace::OneTable, from, count, &batch(cursor(2 * limit, bits), 0, 5, 5)),
                    Hidden::Unproven,
                    "{count} {bits}"
                );
            }
        }
    }

    #[test]
    fn a_table_that_has_shrunk_under_the_cursor_ends_at_the_bucket_limit_as_well() {
        for count in [10_u32, 75, 640] {
            let (limit, small) = (bucket_limit(count), 14);
            // A cursor of a table with 16 times as many buckets, so that it lies inside a bucket of the small one.
            for part in [1, 5, 15] {
                let from = ScanPosition::from_reply(cursor(16 * 7 + part, small + 4));
                let at_limit = batch(cursor(7 + limit, small), 0, 5, 5);
                assert_eq!(hidden(&CursorSpace::OneTable, from, count, &at_limit), Hidden::Unproven, "{count} {part}");
                let before = batch(cursor(7 + limit - 1, small), 0, 5, 5);
                let keys = Hidden::Keys(count.into());
                assert_eq!(hidden(&CursorSpace::OneTable, from, count, &before), keys, "{count} {part}");
            }
        }
    }

    #[test]
    fn within_the_table_of_a_slot_the_bucket_limit_is_known_and_through_several_it_is_not() {
        let space = CursorSpace::BySlot(crate::model::slots::SlotSet::new([0..=100]));
        let at = |buckets: u64, bits: u32, slot: u64| cursor(buckets, bits) << 14 | slot;
        let from = ScanPosition::from_reply(at(100, 12, 7));
        let of = |from, next, returned| hidden(&space, from, 100, &batch(next, returned, 3700, 3700));
        assert_eq!(of(from, at(231, 12, 7), 30), Hidden::Keys(70));
        assert_eq!(of(from, at(1101, 12, 7), 30), Hidden::Unproven, "the bucket limit");
        assert_eq!(of(from, at(231, 12, 8), 30), Hidden::Open, "into the next table");
        assert_eq!(of(from, at(231, 12, 8), 100), Hidden::Unproven, "as many as were asked for");
        assert_eq!(
            of(ScanPosition::NotStarted, at(1001, 12, 0), 30),
            Hidden::Open,
            "from the start, in an unknown table"
        );
    }

    #[test]
    fn the_end_of_the_table_proves_nothing() {
        let end = batch(0, 3, 50, 50);
        assert_eq!(hidden(&CursorSpace::OneTable, ScanPosition::NotStarted, 100, &end), Hidden::Unproven);
    }

    #[test]
    fn a_still_pass_that_returned_too_few_hides_the_rest() {
        let mut still = StillPass::default();
        still.add(&batch(7, 30, 50, 50));
        still.add(&batch(0, 10, 50, 50));
        assert_eq!(still.hidden(), 10);
        still.add(&batch(0, 0, 51, 51));
        assert_eq!(still.hidden(), 0, "a client wrote: nothing is proven");
    }
}
