//! A pass cut into segments of the cursor space, each walked by one worker.
//!
//! A SCAN loop knows its next cursor only from the last reply, so one cursor leaves the server idle for a round trip after each
//! batch. A walk may begin at any bucket, though: cut into segments, a pass can have as many cursors as there are workers.
//!
//! Segments are claimed in order. Everything before the *position* of the pass, its lowest cursor, is done: that is all that a
//! checkpoint needs to know. After trouble the segments are forgotten, and the pass goes on at its position. What was walked
//! beyond is walked again; keys that were freed are counted when they are freed, so nothing is counted twice.

use crate::model::shard::ScanPosition;
use crate::model::slots::CursorSpace;

/// Keys of a segment, about: many batches, since the last batch of a segment looks at some keys of the next one as well; and few
/// enough to walk them again after trouble.
const SEGMENT_KEYS: u64 = 4096;
/// A pass is cut into no more than `2^` so many segments.
const MOST_BITS: u32 = 12;

/// Names a segment within its [`Segments`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentId(u32);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Segment {
    id: SegmentId,
    /// Where its walk goes on.
    at: ScanPosition,
    /// It is done once its walk has come here.
    end: ScanPosition,
    /// In batches of COUNT 1.
    closely: bool,
    /// Somebody walks it.
    claimed: bool,
}

/// How finely a pass over so many keys is cut, for [`Segments::new`].
pub fn bits_of(keys: u64) -> u32 {
    (keys / SEGMENT_KEYS).checked_ilog2().unwrap_or(0).min(MOST_BITS)
}

/// The segments of one pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segments {
    space: CursorSpace,
    bits: u32,
    /// Segments that are not done, in no order.
    open: Vec<Segment>,
    /// Everything before it is done or in `open`.
    frontier: ScanPosition,
    last_id: u32,
}

impl Segments {
    /// A pass of `2^bits` segments that begins, or goes on, at `position`. With 0 bits it is one segment, which needs no order of
    /// cursors.
    pub fn new(space: CursorSpace, bits: u32, position: ScanPosition) -> Self {
        Self { space, bits, open: Vec::new(), frontier: position, last_id: 0 }
    }

    /// Everything before it is done.
    pub fn position(&self) -> ScanPosition {
        let open = self.open.iter().map(|segment| segment.at);
        open.chain([self.frontier]).min_by_key(|&at| self.space.rank(at)).unwrap_or(self.frontier)
    }

    /// Orders positions by the way of the pass.
    pub fn rank(&self, position: ScanPosition) -> (u16, u64) {
        self.space.rank(position)
    }

    /// Whether the pass is complete.
    pub fn is_finished(&self) -> bool {
        self.open.is_empty() && self.frontier == ScanPosition::Finished
    }

    /// Whether the pass is complete once the walk of this segment has come to `to`.
    pub fn finishes(&self, id: SegmentId, to: ScanPosition) -> bool {
        let last = self.frontier == ScanPosition::Finished || to == ScanPosition::Finished;
        last && self.passes_end(id, to) && self.open.iter().all(|segment| segment.id == id)
    }

    /// Whether there may be work for several workers.
    pub fn is_cut(&self) -> bool {
        self.bits > 0
    }

    /// Takes the lowest segment that nobody walks. `None`: there is none left.
    pub fn claim(&mut self) -> Option<SegmentId> {
        let space = &self.space;
        if let Some(free) = self.open.iter_mut().filter(|s| !s.claimed).min_by_key(|segment| space.rank(segment.at)) {
            free.claimed = true;
            return Some(free.id);
        }
        if self.frontier == ScanPosition::Finished {
            return None;
        }
        let (at, end) = (self.frontier, self.space.cut_after(self.frontier, self.bits));
        self.frontier = end;
        Some(self.add(at, end, false, true))
    }

    fn add(&mut self, at: ScanPosition, end: ScanPosition, closely: bool, claimed: bool) -> SegmentId {
        self.last_id += 1;
        let id = SegmentId(self.last_id);
        self.open.push(Segment { id, at, end, closely, claimed });
        id
    }

    /// Gives a segment back to be walked on by somebody.
    pub fn release(&mut self, id: SegmentId) {
        if let Some(segment) = self.get_mut(id) {
            segment.claimed = false;
        }
    }

    /// Where the walk of a segment goes on; `None` once it is done.
    pub fn at(&self, id: SegmentId) -> Option<ScanPosition> {
        self.get(id).map(|segment| segment.at)
    }

    /// Whether a segment is walked in batches of COUNT 1.
    pub fn is_walked_closely(&self, id: SegmentId) -> bool {
        self.get(id).is_some_and(|segment| segment.closely)
    }

    /// Whether the walk of a segment is at its end once it has come to `to`.
    pub fn passes_end(&self, id: SegmentId, to: ScanPosition) -> bool {
        self.get(id).is_none_or(|segment| self.space.rank(to) >= self.space.rank(segment.end))
    }

    /// The walk of a segment has come to `to`. Returns whether it is done.
    pub fn advance(&mut self, id: SegmentId, to: ScanPosition) -> bool {
        if self.space.rank(to) > self.space.rank(self.frontier) {
            // It has come through whatever nobody has claimed yet.
            self.frontier = to;
        }
        if self.passes_end(id, to) {
            self.open.retain(|segment| segment.id != id);
            return true;
        }
        if let Some(segment) = self.get_mut(id) {
            segment.at = to;
        }
        false
    }

    /// Sets a range aside that is to be walked once more in batches of COUNT 1, before anything else.
    pub fn walk_closely(&mut self, from: ScanPosition, to: ScanPosition) {
        self.add(from, to, true, false);
    }

    /// Whether the range that begins there was set aside by [`Segments::walk_closely`].
    pub fn is_set_aside(&self, from: ScanPosition) -> bool {
        self.open.iter().any(|segment| segment.closely && segment.at == from)
    }

    /// Whether a range that was set aside waits for a worker.
    pub fn has_set_aside(&self) -> bool {
        self.open.iter().any(|segment| segment.closely && !segment.claimed)
    }

    /// Forgets what was walked beyond `position`: the pass goes on there.
    pub fn go_on_at(&mut self, position: ScanPosition) {
        self.open.clear();
        self.frontier = position;
    }

    fn get(&self, id: SegmentId) -> Option<&Segment> {
        self.open.iter().find(|segment| segment.id == id)
    }

    fn get_mut(&mut self, id: SegmentId) -> Option<&mut Segment> {
        self.open.iter_mut().find(|segment| segment.id == id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::slots::SlotSet;
    use proptest::prelude::*;

    /// Interval of ranks that a batch has walked.
    type Walked = ((u16, u64), (u16, u64));

    /// Walks a whole pass with `workers`, whose turns come as `turns` say: whose, and how many buckets a batch walks. A turn of
    /// length 39 is trouble: all workers are forgotten.
    fn walk_all(space: &CursorSpace, bits: u32, workers: usize, turns: &[(u8, u8)]) -> Vec<Walked> {
        let mut segments = Segments::new(space.clone(), bits, ScanPosition::NotStarted);
        let mut claimed: Vec<Option<SegmentId>> = vec![None; workers];
        let mut walked = Vec::new();
        let mut trouble = 20;
        let turns = turns.iter().cycle().enumerate();
        for (turn, (whose, length)) in turns {
            if segments.is_finished() {
                assert_eq!(segments.position(), ScanPosition::Finished);
                return walked;
            }
            let before = segments.position();
            // Nobody waits for ever: each has a turn now and then.
            let worker = (usize::from(*whose) + turn / 7) % workers;
            if *length == 39 && trouble > 0 {
                trouble -= 1;
                segments.go_on_at(before);
                claimed.fill(None);
                continue;
            }
            let Some(id) = claimed[worker].or_else(|| segments.claim()) else { continue };
            let from = segments.at(id).expect("a claimed segment is open");
            let to = step(space, from, *length);
            walked.push((space.rank(from), space.rank(to)));
            let finishes = segments.finishes(id, to);
            claimed[worker] = if segments.advance(id, to) { None } else { Some(id) };
            assert_eq!(finishes, segments.is_finished());
            assert!(space.rank(segments.position()) >= space.rank(before), "never back");
        }
        unreachable!("the turns never end")
    }

    /// One batch of a server whose tables have 2^10 buckets.
    fn step(space: &CursorSpace, from: ScanPosition, buckets: u8) -> ScanPosition {
        let (slot, inside) = space.rank(from);
        let end = (inside >> 54) + u64::from(buckets) + 1;
        let (slot, bucket) = match space {
            CursorSpace::OneTable if end >= 1 << 10 => return ScanPosition::Finished,
            CursorSpace::OneTable => (0, end),
            CursorSpace::BySlot(owned) => {
                let owned_from = owned.nth(owned.below(slot)).unwrap();
                let (slot, end) = if owned_from == slot { (slot, end) } else { (owned_from, u64::from(buckets) + 1) };
                match (end >= 1 << 10, owned.nth(owned.below(slot) + 1)) {
                    (false, _) => (slot, end),
                    (true, Some(next)) => (next, 0),
                    (true, None) => return ScanPosition::Finished,
                }
            }
        };
        let inside = (bucket << 54).reverse_bits();
        ScanPosition::from_reply(if *space == CursorSpace::OneTable { inside } else { inside << 14 | u64::from(slot) })
    }

    proptest! {
        #[test]
        fn any_number_of_workers_leaves_no_gap_whatever_the_trouble(
            turns in prop::collection::vec((any::<u8>(), 0_u8..40), 2..60),
            bits in 0_u32..8,
            workers in 1_usize..=16,
            by_slot in any::<bool>(),
        ) {
            let slots = SlotSet::new([5..=40, 100..=100, 200..=230]);
            let space = if by_slot { CursorSpace::BySlot(slots.clone()) } else { CursorSpace::OneTable };
            let mut walked = walk_all(&space, bits, workers, &turns);
            walked.sort();
            let mut covered = (0, 0);
            for (from, to) in walked {
                // Slots that are not owned have nothing in between.
                let gap = match (&space, from) {
                    (CursorSpace::BySlot(owned), (slot, 0)) if covered.0 < slot => owned.below(slot) > owned.below(covered.0 + 1)
                        || (owned.below(covered.0 + 1) > owned.below(covered.0) && covered.1 > 0),
                    _ => from > covered,
                };
                prop_assert!(!gap, "nobody walked from {covered:?} to {from:?}");
                covered = covered.max(to);
            }
            prop_assert_eq!(covered, space.rank(ScanPosition::Finished));
        }
    }

    fn at(share: f64) -> ScanPosition {
        ScanPosition::from_reply((((share * 1024.0) as u64) << 54).reverse_bits())
    }

    #[test]
    fn the_position_is_the_lowest_cursor_and_moves_on_when_the_lowest_segment_is_done() {
        let mut segments = Segments::new(CursorSpace::OneTable, 2, ScanPosition::NotStarted);
        let (first, second) = (segments.claim().unwrap(), segments.claim().unwrap());
        assert_eq!((segments.at(first), segments.at(second)), (Some(ScanPosition::NotStarted), Some(at(0.25))));
        assert!(!segments.advance(second, at(0.375)));
        assert_eq!(segments.position(), ScanPosition::NotStarted, "the first has not begun");
        assert!(segments.advance(first, at(0.26)));
        assert_eq!(segments.position(), at(0.375));
        let third = segments.claim().unwrap();
        assert_eq!(segments.at(third), Some(at(0.5)));
    }

    #[test]
    fn a_batch_that_leads_through_segments_that_nobody_has_claimed_has_done_them() {
        let mut segments = Segments::new(CursorSpace::OneTable, 3, ScanPosition::NotStarted);
        let first = segments.claim().unwrap();
        assert!(segments.advance(first, at(0.3)));
        assert_eq!(segments.position(), at(0.3));
        let next = segments.claim().unwrap();
        assert!(segments.passes_end(next, at(0.375)) && !segments.passes_end(next, at(0.374)));
        assert!(segments.finishes(next, ScanPosition::Finished));
    }

    #[test]
    fn a_range_that_is_set_aside_holds_the_position_and_is_claimed_first() {
        let mut segments = Segments::new(CursorSpace::OneTable, 0, ScanPosition::NotStarted);
        let walk = segments.claim().unwrap();
        segments.walk_closely(at(0.0625), at(0.125));
        segments.advance(walk, at(0.125));
        assert!(segments.has_set_aside() && segments.is_set_aside(at(0.0625)));
        assert_eq!(segments.position(), at(0.0625));
        segments.release(walk);
        let closely = segments.claim().unwrap();
        assert!(segments.is_walked_closely(closely) && !segments.has_set_aside());
        assert!(segments.advance(closely, at(0.125)));
        assert_eq!((segments.claim(), segments.position()), (Some(walk), at(0.125)));
        assert!(!segments.finishes(walk, at(0.5)) && segments.finishes(walk, ScanPosition::Finished));
    }

    #[test]
    fn a_pass_is_cut_by_its_keys() {
        assert_eq!([0, 4_095, 8_191, 8_192, 1 << 20, 1 << 40].map(bits_of), [0, 0, 0, 1, 8, 12]);
    }
}
