//! Detects cursors that lead nowhere: a broken or hostile server must not keep a pass going for ever.

use crate::model::shard::ScanPosition;
use crate::node::conn::Reply;

/// The cursors of one pass.
///
/// A circle is detected by remembering one position, and another after twice as many batches, so that a circle of any length is found
/// in the end (Brent's method). Cursors without a circle and without an end are detected by the keys: SCAN returns a key a few times at
/// most, so it cannot return many times as many keys as the DB holds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CursorLoop {
    mark: Option<ScanPosition>,
    batches: u64,
    until_next_mark: u64,
    met: u32,
    seen: u64,
    keys: u64,
}

impl Default for CursorLoop {
    fn default() -> Self {
        Self { mark: None, batches: 0, until_next_mark: 1, met: 0, seen: 0, keys: 0 }
    }
}

impl CursorLoop {
    /// A position that comes this often is in a circle. It may come twice if the table was resized in between.
    const MET_AT_MOST: u32 = 3;
    /// SCAN may return this many times the most keys that the DB held, and this many more.
    const SEEN_AT_MOST: (u64, u64) = (10, 1_000_000);

    /// Positions may come again from now on, since a part is walked again on purpose. The keys that were returned still count.
    pub(crate) fn walks_again(&mut self) {
        (self.mark, self.met) = (None, 0);
    }

    /// Adds a batch. Returns why the cursors lead nowhere, if they are known to.
    pub(crate) fn add(&mut self, reply: &Reply) -> Option<String> {
        let next = reply.to;
        self.seen += reply.returned;
        self.keys = self.keys.max(reply.before.keys);
        self.met += u32::from(self.mark == Some(next));
        self.batches += 1;
        if self.batches == self.until_next_mark {
            let until_next_mark = self.until_next_mark * 2;
            *self = Self { mark: Some(next), batches: 0, until_next_mark, met: 0, ..*self };
        }
        let (times, more) = Self::SEEN_AT_MOST;
        if self.met >= Self::MET_AT_MOST {
            Some("they go round in a circle".to_owned())
        } else if self.seen > self.keys.saturating_mul(times).saturating_add(more) {
            Some(format!("SCAN returned {} keys of a DB that held {} at most", self.seen, self.keys))
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::conn::Reading;

    fn batch(cursor: u64, returned: u64, keys: u64) -> Reply {
        let reading = Reading { keys, expired: None };
        Reply { to: ScanPosition::from_reply(cursor), returned, before: reading, after: reading }
    }

    #[test]
    fn a_circle_of_any_length_is_found_and_ascending_cursors_are_none() {
        for length in [1_u64, 2, 7, 1000] {
            let mut cursors = CursorLoop::default();
            let steps = (0..).position(|n: u64| cursors.add(&batch(1 + n % length, 1, 1 << 40)).is_some());
            assert!(steps.is_some_and(|steps| steps as u64 <= 16 * length + 16), "{length}: {steps:?}");
        }
        let mut cursors = CursorLoop::default();
        let in_an_index = |n: u64| batch(n * 100, 100, 10_000_000);
        assert!((1..100_000).all(|n| cursors.add(&in_an_index(n)).is_none()));
    }

    #[test]
    fn a_part_that_is_walked_again_after_each_of_many_cuts_is_no_circle() {
        let walk = |cursors: &mut CursorLoop| (1..4).find_map(|n| cursors.add(&batch(n, 1, 60_000)));
        let mut cursors = CursorLoop::default();
        for _ in 0..100 {
            assert_eq!(walk(&mut cursors), None);
            cursors.walks_again();
        }
        let told = (0..100).find_map(|_| walk(&mut cursors));
        assert_eq!(told.as_deref(), Some("they go round in a circle"), "and without a cut it is one");
    }

    #[test]
    fn cursors_without_an_end_are_detected_by_the_keys() {
        let mut cursors = CursorLoop::default();
        let steps = (0..).position(|n: u64| cursors.add(&batch(n + 1, 1000, 5000)).is_some());
        assert_eq!(steps, Some(1050));
    }
}
