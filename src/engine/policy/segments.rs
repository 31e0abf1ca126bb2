//! A pass cut into segments of the cursor space, each walked by one worker.
//!
//! A SCAN loop knows its next cursor only from the last reply, so with one cursor the server is idle for a round trip after each batch.
//! But a walk may begin at any bucket: cut into segments, a pass can have as many cursors as there are workers.
//!
//! Segments are claimed in order. Everything before the *position* of the pass, its lowest cursor, is done: a checkpoint needs to know
//! no more. After a lost connection the segments are forgotten, and the pass goes on at its position. What was walked beyond it is
//! walked again. No key is counted twice, since a key is counted when it is reclaimed.

use crate::model::shard::ScanPosition;
use crate::model::slots::CursorSpace;

/// About how many keys a segment has: many batches, since the last batch of a segment overlaps with the next segment; and few enough to
/// walk them again.
const SEGMENT_KEYS: u64 = 4096;
/// A pass is cut into `2^MOST_BITS` segments at most.
const MOST_BITS: u32 = 12;

/// Identifies a segment within its [`Segments`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentId(u32);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Segment {
    id: SegmentId,
    /// Where its next batch begins.
    at: ScanPosition,
    /// The segment is done once its walk has reached this position.
    end: ScanPosition,
    /// Whether it is walked in batches of COUNT 1.
    closely: bool,
    /// Whether a worker walks it.
    claimed: bool,
}

/// How finely a pass over `keys` is cut, for [`Segments::new`].
pub(crate) fn bits_of(keys: u64) -> u32 {
    (keys / SEGMENT_KEYS).checked_ilog2().unwrap_or(0).min(MOST_BITS)
}

/// The segments of one pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segments {
    space: CursorSpace,
    bits: u32,
    /// Segments that are not done, in any order.
    open: Vec<Segment>,
    /// Everything before this position is done or in `open`.
    frontier: ScanPosition,
    last_id: u32,
}

impl Segments {
    /// A pass of `2^bits` segments that begins, or goes on, at `position`. With 0 bits it is a single segment, which needs no order
    /// of cursors.
    pub(crate) fn new(space: CursorSpace, bits: u32, position: ScanPosition) -> Self {
        Self { space, bits, open: Vec::new(), frontier: position, last_id: 0 }
    }

    /// The position of the pass: everything before it is done.
    pub(crate) fn position(&self) -> ScanPosition {
        let open = self.open.iter().map(|segment| segment.at);
        open.chain([self.frontier]).min_by_key(|&at| self.space.rank(at)).unwrap_or(self.frontier)
    }

    /// The sort key of a position, in the order of the pass.
    pub(crate) fn rank(&self, position: ScanPosition) -> (u16, u64) {
        self.space.rank(position)
    }

    /// Whether the pass is complete once the walk of this segment has reached `to`.
    pub(crate) fn finishes(&self, id: SegmentId, to: ScanPosition) -> bool {
        let last = self.frontier == ScanPosition::Finished || to == ScanPosition::Finished;
        last && self.passes_end(id, to) && self.open.iter().all(|segment| segment.id == id)
    }

    /// Whether several workers can walk the pass.
    pub(crate) fn is_cut(&self) -> bool {
        self.bits > 0
    }

    /// Claims the lowest segment that no worker walks. `None`: there is none left.
    pub(crate) fn claim(&mut self) -> Option<SegmentId> {
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

    /// Gives a segment back, so that another worker can go on with it.
    pub(crate) fn release(&mut self, id: SegmentId) {
        if let Some(segment) = self.get_mut(id) {
            segment.claimed = false;
        }
    }

    /// Where the next batch of a segment begins; `None`: it is done.
    pub(crate) fn at(&self, id: SegmentId) -> Option<ScanPosition> {
        self.get(id).map(|segment| segment.at)
    }

    /// Whether a segment is walked in batches of COUNT 1.
    pub(crate) fn is_walked_closely(&self, id: SegmentId) -> bool {
        self.get(id).is_some_and(|segment| segment.closely)
    }

    /// Whether a segment is done once its walk has reached `to`.
    pub(crate) fn passes_end(&self, id: SegmentId, to: ScanPosition) -> bool {
        self.get(id).is_none_or(|segment| self.space.rank(to) >= self.space.rank(segment.end))
    }

    /// The walk of a segment has reached `to`. Returns whether the segment is done.
    pub(crate) fn advance(&mut self, id: SegmentId, to: ScanPosition) -> bool {
        if self.space.rank(to) > self.space.rank(self.frontier) {
            // The batch has also walked everything up to here that was not claimed yet.
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

    /// Sets a range aside, to be walked again in batches of COUNT 1 before anything else.
    pub(crate) fn walk_closely(&mut self, from: ScanPosition, to: ScanPosition) {
        self.add(from, to, true, false);
    }

    /// Whether a range that begins at `from` was set aside by [`Segments::walk_closely`].
    pub(crate) fn is_set_aside(&self, from: ScanPosition) -> bool {
        self.open.iter().any(|segment| segment.closely && segment.at == from)
    }

    /// Whether a range that was set aside waits for a worker.
    pub(crate) fn has_set_aside(&self) -> bool {
        self.open.iter().any(|segment| segment.closely && !segment.claimed)
    }

    /// Forgets what was walked beyond `position`: the pass goes on from it.
    pub(crate) fn go_on_at(&mut self, position: ScanPosition) {
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

    fn is_finished(segments: &Segments) -> bool {
        segments.open.is_empty() && segments.frontier == ScanPosition::Finished
    }

    /// The range of ranks that a batch has walked.
    type Walked = ((u16, u64), (u16, u64));

    /// Walks a whole pass with `workers`. Each of `turns` says whose turn it is and how many buckets the batch walks. A turn of length
    /// 39 stands for a lost connection: all workers are forgotten.
    fn walk_all(space: &CursorSpace, bits: u32, workers: usize, turns: &[(u8, u8)]) -> Vec<Walked> {
        let mut segments = Segments::new(space.clone(), bits, ScanPosition::NotStarted);
        let mut claimed: Vec<Option<SegmentId>> = vec![None; workers];
        let mut walked = Vec::new();
        let mut trouble = 20;
        let turns = turns.iter().cycle().enumerate();
        for (turn, (whose, length)) in turns {
            if is_finished(&segments) {
                assert_eq!(segments.position(), ScanPosition::Finished);
                return walked;
            }
            let before = segments.position();
            // Every worker has a turn now and then.
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
            assert_eq!(finishes, is_finished(&segments));
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
    fn a_batch_that_walks_through_unclaimed_segments_finishes_them() {
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
