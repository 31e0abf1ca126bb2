//! Two batches under way, so that the server need not wait for us.
//!
//! A loop that sends the next SCAN when it has the answer to the last leaves the server idle for a round trip after each: a
//! network's, or what two processes take to wake each other. With slices as short as they should be that is more than
//! half of the time, and longer slices would be felt by others. So a second walk, the scout's, goes on further ahead in the same
//! table, over a connection of its own. Each has one batch under way; while the answer to one travels, the server works on the
//! other.
//!
//! The position of a pass stays one cursor: everything before it is done. What the scout has done further on counts once the
//! main walk has come to where the scout began: then the position moves on to where the scout is, the two change roles, and the
//! other connection begins anew, further on. Whatever goes wrong, the scout's stretch is forgotten and walked again. It is
//! short, and keys that were freed are counted when they are freed, so nothing is counted twice. Pure, but for the sending.

use std::time::Duration;

use tokio::time::timeout;

use crate::engine::pass::Pass;
use crate::engine::shard_scan::{End, ShardScan};
use crate::model::shard::{DbIndex, ScanPosition};
use crate::model::slots::CursorSpace;
use crate::node::commands;
use crate::node::conn::{Ask, Conn};
use crate::node::error::NodeError;

/// Keys of a stretch, about: many batches, since the main walk's last batch before the scout's beginning looks at some keys
/// a second time; and few enough to walk them again after trouble.
const STRETCH: u64 = 4096;
/// A pass is cut into no more than `2^` so many stretches.
const MOST_BITS: u32 = 12;
/// Below this intensity there is one walk.
const MOST_REST: f64 = 0.5;
/// After an error on one connection, the answer on the other is waited for this long.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Which walk a batch belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Walk {
    Main,
    Scout,
}

/// The walk further on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scout {
    /// Where it began.
    pub(super) from: ScanPosition,
    /// Where it goes on.
    pub(super) at: ScanPosition,
}

/// Where both walks stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Course {
    /// Everything before it is done.
    pub(super) position: ScanPosition,
    pub(super) scout: Option<Scout>,
}

/// What an answer makes of a course.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Advance {
    pub(super) course: Course,
    /// Where the connection that answered goes on, if the sweep does.
    pub(super) next: Option<ScanPosition>,
    /// The walks have changed connections.
    pub(super) swapped: bool,
}

impl Course {
    /// Where a walk goes on.
    pub(super) fn at(&self, walk: Walk) -> Option<ScanPosition> {
        match walk {
            Walk::Main => Some(self.position),
            Walk::Scout => self.scout.map(|scout| scout.at),
        }
    }

    /// A batch of `walk` has led to `to`. A pass of `2^bits` stretches; 0: no other scout is sent out.
    pub(super) fn advance(self, space: &CursorSpace, bits: u32, walk: Walk, to: ScanPosition) -> Advance {
        match (walk, self.scout) {
            (Walk::Scout, scout) => {
                let scout = scout.map(|scout| Scout { at: to, ..scout });
                Advance { course: Self { scout, ..self }, next: Some(to), swapped: false }
            }
            (Walk::Main, Some(scout)) if space.rank(to) >= space.rank(scout.from) => {
                let position = if space.rank(to) > space.rank(scout.at) { to } else { scout.at };
                let further = space.further_on(position, bits);
                let scout = further.map(|from| Scout { from, at: from });
                Advance { course: Self { position, scout }, next: further, swapped: true }
            }
            (Walk::Main, _) => Advance { course: Self { position: to, ..self }, next: Some(to), swapped: false },
        }
    }
}

/// How finely a pass over so many keys is cut.
pub(super) fn bits_of(keys: u64) -> u32 {
    (keys / STRETCH).checked_ilog2().unwrap_or(0).min(MOST_BITS)
}

/// The scout's connection.
#[derive(Debug, Default)]
pub(super) enum Second {
    /// Not asked for yet.
    #[default]
    None,
    Open(Box<Conn>),
    /// The server does not let us in a second time. The sweep goes on with one connection.
    Refused,
}

impl Second {
    /// The connection of a walk, with `main` for the main walk's. Where there is one only, it is both's.
    pub(super) fn of<'a>(&'a mut self, walk: Walk, main: &'a mut Conn) -> &'a mut Conn {
        match (walk, self) {
            (Walk::Scout, Self::Open(conn)) => conn,
            _ => main,
        }
    }

    fn get(&self) -> Option<&Conn> {
        match self {
            Self::Open(conn) => Some(conn),
            _ => None,
        }
    }
}

impl ShardScan {
    /// Whether an answer is still to come on any connection.
    pub(super) fn under_way(&self) -> bool {
        self.conn.ahead().is_some() || self.second.get().is_some_and(|conn| conn.ahead().is_some())
    }

    /// Whose answer comes next.
    pub(super) fn next_walk(&self) -> Walk {
        match (self.conn.sent_at(), self.second.get().and_then(Conn::sent_at)) {
            (Some(main), Some(scout)) if scout < main => Walk::Scout,
            (None, Some(_)) => Walk::Scout,
            _ => Walk::Main,
        }
    }

    /// The connection of a walk. The time until the other's last answer was the other's.
    pub(super) fn take_turn(&mut self, walk: Walk) {
        let other = match walk {
            Walk::Main => self.second.get().and_then(Conn::answered_at),
            Walk::Scout => self.conn.answered_at(),
        };
        self.conn_of(walk).answered(other);
    }

    /// The connection of a walk.
    pub(super) fn conn_of(&mut self, walk: Walk) -> &mut Conn {
        self.second.of(walk, &mut self.conn)
    }

    /// Into how many stretches a pass is cut, as a power of two; 0 where one walk does, or where nobody knows which cursor lies
    /// before which.
    pub(super) fn stretches(&self, pass: &Pass) -> u32 {
        // A sweep that rests more than it works waits for no round trip, and two batches in a row are as one long one to others.
        let rests = self.pacer.intensity() < MOST_REST;
        let one = rests || self.toucher.touches_all() || !self.judges || matches!(self.second, Second::Refused);
        if one { 0 } else { bits_of(pass.keys) }
    }

    /// Lets both connections have a batch under way.
    pub(super) async fn send_both(&mut self, pass: &mut Pass) -> Result<(), NodeError> {
        if matches!(self.second, Second::None) {
            self.second = self.open_second(pass.db).await;
        }
        let gauge = self.gauge();
        // A batch without names cannot be touched.
        let nameless = self.payload.is_nameless() && self.toucher.command().is_none();
        let Second::Open(second) = &mut self.second else { return Ok(()) };
        if self.conn.ahead().is_some() && second.ahead().is_some() {
            return Ok(());
        }
        let course = pass.course();
        let scout = match course.scout {
            Some(scout) => scout,
            None => {
                let Some(from) = self.space.further_on(course.position, bits_of(pass.keys)) else { return Ok(()) };
                // A walk that begins in the middle looks at keys that the other has looked at.
                pass.still.misses_a_batch();
                *pass.scout.insert(Scout { from, at: from })
            }
        };
        for (conn, at) in [(&mut self.conn, course.position), (second, scout.at)] {
            if let (None, Some(cursor)) = (conn.ahead(), at.to_send()) {
                let ask = Ask { cursor, count: self.pacer.count(), nameless, gauge };
                conn.send_ahead(ask).await?;
            }
        }
        Ok(())
    }

    /// Another connection to the same process, in the same DB.
    async fn open_second(&self, db: DbIndex) -> Second {
        let opened = async {
            let mut conn = Conn::open(self.conn.addr(), self.job.roster.topology().options()).await?;
            let info = commands::info(&mut conn).await?;
            conn.select(db).await?;
            Ok::<_, NodeError>((info.get("run_id").map(str::to_owned), conn))
        };
        match opened.await {
            Ok((Some(run_id), conn)) if self.run_id.as_ref().is_some_and(|ours| ours.0 == run_id) => {
                Second::Open(Box::new(conn))
            }
            Ok(_) => Second::Refused,
            Err(error) => {
                tracing::debug!(%error, "no second connection: sweeping with one");
                Second::Refused
            }
        }
    }

    /// Takes in the answer to what a walk has under way: what it freed counts, wherever the sweep goes on.
    async fn take_in(&mut self, walk: Walk, pass: &mut Pass) -> Result<(), NodeError> {
        let conn = self.conn_of(walk);
        let Some(ask) = conn.ahead() else { return Ok(()) };
        match conn.scan(ask, None, |_| None).await {
            Ok(scanned) => {
                self.account(pass, &scanned, ask);
                self.write_tally(pass).await;
                Ok(())
            }
            // Refused, it has freed nothing, and the walk that goes on is told the same.
            Err(NodeError::Server { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// A batch from a place where the sweep does not go on. Returns whether nothing went wrong; else the sweep has gone back.
    pub(super) async fn settle(&mut self, walk: Walk, pass: &mut Pass) -> Result<bool, End> {
        self.take_turn(walk);
        match self.take_in(walk, pass).await {
            Ok(()) => Ok(true),
            Err(error) => self.lost(error, pass).await.map(|()| false),
        }
    }

    /// The end of a pass: no batch may be under way any more. Returns what [`ShardScan::settle`] does.
    pub(super) async fn settle_both(&mut self, pass: &mut Pass) -> Result<bool, End> {
        Ok(self.settle(Walk::Main, pass).await? && self.settle(Walk::Scout, pass).await?)
    }

    /// A batch that was not answered, and with it those that may have been sent ahead.
    pub(super) async fn lost(&mut self, error: NodeError, pass: &mut Pass) -> Result<(), End> {
        if !matches!(error, NodeError::Server { .. }) {
            pass.figures.lost_replies += 1;
        }
        self.last_words(pass).await;
        pass.scout = None;
        pass.way.walks_again();
        self.recover(error, Some(pass)).await
    }

    /// Takes in what is under way, without much patience: the connections are given up.
    pub(super) async fn last_words(&mut self, pass: &mut Pass) {
        for walk in [Walk::Main, Walk::Scout] {
            if !matches!(timeout(LAST_WORD, self.take_in(walk, pass)).await, Ok(Ok(()))) {
                self.conn_of(walk).forget();
                pass.figures.lost_replies += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::slots::SlotSet;
    use proptest::prelude::*;

    /// Walks a whole pass in an order of turns, with batches of any length. Returns the intervals that were walked, by rank.
    fn walk_all(space: &CursorSpace, bits: u32, turns: &[(bool, u8)]) -> Vec<((u16, u64), (u16, u64))> {
        let mut course = Course { position: ScanPosition::NotStarted, scout: None };
        let mut walked = Vec::new();
        for (scout_turn, length) in turns.iter().cycle().take(100_000) {
            if course.position == ScanPosition::Finished {
                return walked;
            }
            if course.scout.is_none() {
                course.scout = space.further_on(course.position, bits).map(|from| Scout { from, at: from });
            }
            let walk = if *scout_turn { Walk::Scout } else { Walk::Main };
            let Some(from) = course.at(walk).filter(|at| *at != ScanPosition::Finished) else { continue };
            let to = step(space, from, *length);
            walked.push((space.rank(from), space.rank(to)));
            let advance = course.advance(space, bits, walk, to);
            assert!(space.rank(advance.course.position) >= space.rank(course.position), "never back");
            course = advance.course;
        }
        panic!("the pass does not end: {course:?}")
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
        fn two_walks_leave_no_gap_and_look_at_little_twice(
            turns in prop::collection::vec((any::<bool>(), 0_u8..40), 2..60),
            bits in 1_u32..8,
            by_slot in any::<bool>(),
        ) {
            prop_assume!(turns.iter().any(|(scout, _)| !scout));
            let slots = SlotSet::new([5..=40, 100..=100, 200..=230]);
            let space = if by_slot { CursorSpace::BySlot(slots.clone()) } else { CursorSpace::OneTable };
            let mut walked = walk_all(&space, bits, &turns);
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

    #[test]
    fn a_scout_that_was_reached_hands_its_place_over() {
        let space = CursorSpace::OneTable;
        let at = |share: f64| ScanPosition::from_reply((((share * 1024.0) as u64) << 54).reverse_bits());
        let scout = Scout { from: at(0.25), at: at(0.375) };
        let course = Course { position: at(0.125), scout: Some(scout) };
        let near = course.advance(&space, 3, Walk::Main, at(0.2));
        assert_eq!((near.course.position, near.course.scout, near.swapped), (at(0.2), Some(scout), false));
        let there = course.advance(&space, 3, Walk::Main, at(0.25));
        let anew = Scout { from: at(0.625), at: at(0.625) };
        assert_eq!(there.course, Course { position: at(0.375), scout: Some(anew) });
        assert_eq!((there.next, there.swapped), (Some(anew.from), true));
        let past = course.advance(&space, 0, Walk::Main, at(0.5));
        assert_eq!(past.course, Course { position: at(0.5), scout: None });
    }
}
