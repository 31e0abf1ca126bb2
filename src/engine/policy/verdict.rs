//! What a reply means for its pass. Pure: the table of tests below documents its rules.
//!
//! Each exchange with the server has a [`Purpose`]. Its reply gets a [`Verdict`], which the loop carries out. Some verdicts lead to
//! another exchange about the same range, whose reply is judged in turn. The range is done with [`Verdict::Advance`] or
//! [`Verdict::Finished`].

use crate::engine::policy::cursor_loop::CursorLoop;
use crate::engine::policy::hidden_keys::{Hidden, StillPass, hidden};
use crate::engine::policy::key_names::KeyNames;
use crate::engine::policy::segments::{SegmentId, Segments};
use crate::engine::policy::touch_audit::TouchAudit;
use crate::model::progress::TouchOutcome;
use crate::model::shard::ScanPosition;
use crate::model::slots::CursorSpace;
use crate::node::conn::{Reply, Request};

/// Why a request is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The next batch of a segment.
    Walk,
    /// The next batch of a segment; its keys are then touched with this command.
    WalkToTouch(&'static str),
    /// The next batch of a segment, without names; the same range is then scanned again, with names.
    WalkToAudit,
    /// The second scan of a range, with names.
    AuditNames {
        /// The reply of the first scan, without names.
        first: Reply,
    },
    /// The touch of the keys of a batch.
    Touch {
        /// The command that is sent for each key: EXISTS or TTL.
        command: &'static str,
        /// The reply of the batch.
        scanned: Reply,
    },
}

/// The reply to be judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The reply to a SCAN.
    Scanned(Reply),
    /// The replies to a touch.
    Touched {
        /// Expired keys that SCAN had left and the touch has reclaimed.
        left_expired: u64,
    },
}

/// Why a pass has to begin again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Restart {
    /// The cursors are not those of a hash table: again with one worker, which needs no order of cursors.
    Unordered,
    /// SCAN without names left expired keys in memory: again with names.
    NamesNeeded,
    /// SCAN left expired keys in memory: again, and every key is touched.
    TouchNeeded,
}

impl Restart {
    /// The reason in words, without a full stop.
    pub(crate) fn sentence(&self) -> &'static str {
        match self {
            Self::Unordered => "its cursors are not those of a hash table, as behind some proxies",
            Self::NamesNeeded => "SCAN without names left expired keys in memory",
            Self::TouchNeeded => "SCAN left expired keys in memory, and what was swept before was not touched",
        }
    }
}

/// What a reply means for the pass: the batch loop carries it out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The range is done: its segment goes on at this position.
    Advance(ScanPosition),
    /// The range is done, and with it the pass.
    Finished,
    /// Scan the range again, with names.
    AuditNames,
    /// Touch the keys of the reply with this command.
    TouchKeys(&'static str),
    /// The range up to this position may hold hidden keys: set it aside to be walked in batches of COUNT 1, and judge the reply again.
    WalkClosely(ScanPosition),
    /// Expired keys were hidden instead of deleted: go back, and find out whether deletions work.
    Suspect {
        /// At least this many keys were hidden.
        hidden: u64,
        /// The end of the batch that hid them.
        at: ScanPosition,
    },
    /// What the pass has swept proves nothing: begin it again.
    Restart(Restart),
    /// The cursors lead nowhere, and why.
    Broken(String),
}

/// The state of the pass when the reply comes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    /// The order of the cursors.
    pub space: &'a CursorSpace,
    /// Whether the cursors follow that order.
    pub ordered: bool,
    /// The segments of the pass.
    pub segments: &'a Segments,
    /// What the earlier batches prove about a pass without changes.
    pub still: &'a StillPass,
    /// The cursors of the earlier batches.
    pub cursors: &'a CursorLoop,
    /// What is known about the need to touch keys.
    pub touch: &'a TouchAudit,
    /// What is known about SCAN without names.
    pub names: &'a KeyNames,
    /// Whether keys were returned that were not touched.
    pub untouched: bool,
}

/// Judges the answer to `request`, which was sent in the segment `id` for `purpose`.
pub(crate) fn judge(
    context: &Context<'_>,
    id: SegmentId,
    purpose: Purpose,
    request: &Request,
    answer: Answer,
) -> Verdict {
    match (purpose, answer) {
        (Purpose::Touch { command, scanned }, Answer::Touched { left_expired }) => {
            judge_touch(context, id, command, scanned, left_expired)
        }
        (Purpose::AuditNames { first }, Answer::Scanned(reply)) => judge_audit(context, id, request, first, reply),
        (_, Answer::Scanned(reply)) if context.segments.is_walked_closely(id) => {
            judge_closely(context, id, request, reply)
        }
        (purpose, Answer::Scanned(reply)) => judge_walk(context, id, purpose, request, reply),
        // The loop reads a touch only after it has sent one.
        (_, Answer::Touched { .. }) => Verdict::Broken("a touch was answered that was not sent".to_owned()),
    }
}

fn judge_walk(context: &Context<'_>, id: SegmentId, purpose: Purpose, request: &Request, reply: Reply) -> Verdict {
    let rank = |position| context.space.rank(position);
    if context.ordered && rank(reply.to) < rank(request.from) {
        return Verdict::Restart(Restart::Unordered);
    }
    let mut still = *context.still;
    if !request.nameless {
        still.add(&reply);
        if let Some(verdict) = hidden_in(context, request, &reply) {
            return verdict;
        }
    }
    if context.ordered && !request.nameless && context.segments.finishes(id, reply.to) && still.hidden() > 0 {
        return Verdict::Suspect { hidden: still.hidden(), at: reply.to };
    }
    if let Some(why) = { *context.cursors }.add(&reply) {
        return Verdict::Broken(why);
    }
    match purpose {
        Purpose::WalkToTouch(command) if reply.returned > 0 => Verdict::TouchKeys(command),
        Purpose::WalkToAudit => Verdict::AuditNames,
        _ => go_on(context, id, reply.to),
    }
}

/// Hidden keys in a batch with names. `None`: there is no sign of any, or the range is set aside already.
fn hidden_in(context: &Context<'_>, request: &Request, reply: &Reply) -> Option<Verdict> {
    if !context.ordered {
        return None;
    }
    match hidden(context.space, request.from, request.count, reply) {
        Hidden::Unproven => None,
        Hidden::Keys(hidden) => Some(Verdict::Suspect { hidden, at: reply.to }),
        Hidden::Open if context.segments.is_set_aside(request.from) => None,
        Hidden::Open => Some(Verdict::WalkClosely(reply.to)),
    }
}

fn judge_closely(context: &Context<'_>, id: SegmentId, request: &Request, reply: Reply) -> Verdict {
    if let Hidden::Keys(hidden) = hidden(context.space, request.from, request.count, &reply) {
        return Verdict::Suspect { hidden, at: reply.to };
    }
    if context.space.rank(reply.to) <= context.space.rank(request.from) {
        return Verdict::Restart(Restart::Unordered);
    }
    go_on(context, id, reply.to)
}

fn judge_audit(context: &Context<'_>, id: SegmentId, request: &Request, first: Reply, reply: Reply) -> Verdict {
    if let Some(verdict) = hidden_in(context, request, &reply) {
        return verdict;
    }
    if { context.names.clone() }.learn(first.reclaimed(), Some(reply.reclaimed())) {
        return Verdict::Restart(Restart::NamesNeeded);
    }
    go_on(context, id, first.to)
}

fn judge_touch(
    context: &Context<'_>,
    id: SegmentId,
    command: &'static str,
    scanned: Reply,
    left_expired: u64,
) -> Verdict {
    if !context.touch.may_ask() {
        // That touch of one key tested the right to run the command. Now for all keys.
        return Verdict::TouchKeys(command);
    }
    let found = { context.touch.clone() }.learn(scanned.reclaimed(), left_expired);
    if found == Some(TouchOutcome::ScanLeavesExpired) && context.untouched {
        return Verdict::Restart(Restart::TouchNeeded);
    }
    go_on(context, id, scanned.to)
}

fn go_on(context: &Context<'_>, id: SegmentId, to: ScanPosition) -> Verdict {
    if context.segments.finishes(id, to) { Verdict::Finished } else { Verdict::Advance(to) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::slots::SlotSet;
    use crate::node::conn::{CountedBy, Reading};
    use crate::settings::{Payload, Touch};

    /// One table of 4,096 buckets, and a batch of COUNT 100 from a quarter of it on, in a pass of four segments.
    struct Case {
        space: CursorSpace,
        ordered: bool,
        from: ScanPosition,
        count: u32,
        nameless: bool,
        purpose: Purpose,
        answer: Answer,
        segments: Segments,
        id: SegmentId,
        still: StillPass,
        cursors: CursorLoop,
        touch: TouchAudit,
        names: KeyNames,
        untouched: bool,
    }

    /// The position after this many buckets of that table.
    fn at(buckets: u64) -> ScanPosition {
        ScanPosition::from_reply((buckets << 52).reverse_bits())
    }

    /// A position in the table of a slot, which has 4,096 buckets as well.
    fn in_slot(slot: u64, buckets: u64) -> ScanPosition {
        ScanPosition::from_reply((buckets << 52).reverse_bits() << 14 | slot)
    }

    fn reply(to: ScanPosition, returned: u64, freed: u64) -> Reply {
        let reading = |keys| Reading { keys, expired: None };
        Reply { to, returned, before: reading(50_000), after: reading(50_000 - freed) }
    }

    impl Case {
        fn walk(to: ScanPosition, returned: u64, freed: u64) -> Self {
            let space = CursorSpace::OneTable;
            let mut segments = Segments::new(space.clone(), 2, at(1024));
            let id = segments.claim().unwrap();
            let mut touch = TouchAudit::new(Touch::Auto, false);
            touch.was_answered();
            let mut still = StillPass::default();
            still.proves_nothing();
            Self {
                space,
                ordered: true,
                from: at(1024),
                count: 100,
                nameless: false,
                purpose: Purpose::Walk,
                answer: Answer::Scanned(reply(to, returned, freed)),
                segments,
                id,
                still,
                cursors: CursorLoop::default(),
                touch,
                names: KeyNames::new(Payload::Names, false),
                untouched: true,
            }
        }

        fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
            change(&mut self);
            self
        }

        /// A pass of one segment, from its beginning.
        fn whole(self) -> Self {
            self.with(|case| {
                case.segments = Segments::new(case.space.clone(), 0, ScanPosition::NotStarted);
                case.id = case.segments.claim().unwrap();
                case.from = ScanPosition::NotStarted;
                case.still = StillPass::default();
            })
        }

        /// A node with a table for each slot from 0 to 99, in one segment that begins at `from`.
        fn by_slot(self, from: ScanPosition) -> Self {
            self.with(|case| {
                case.space = CursorSpace::BySlot(SlotSet::new([0..=99]));
                case.segments = Segments::new(case.space.clone(), 0, from);
                case.id = case.segments.claim().unwrap();
                case.from = from;
            })
        }

        fn purpose(self, purpose: Purpose) -> Self {
            self.with(|case| case.purpose = purpose)
        }

        /// Cursors without a known order, in one segment.
        fn unordered(self) -> Self {
            self.whole().with(|case| case.ordered = false)
        }

        fn nameless(self) -> Self {
            self.with(|case| {
                case.nameless = true;
                case.names = KeyNames::new(Payload::None, false);
            })
        }

        /// The same range, set aside to be walked closely.
        fn closely(self) -> Self {
            self.with(|case| {
                case.count = 1;
                case.segments = Segments::new(case.space.clone(), 0, at(2000));
                case.segments.walk_closely(at(1024), at(1100));
                case.id = case.segments.claim().unwrap();
            })
        }

        fn audited(self, first: Reply) -> Self {
            self.nameless().with(|case| {
                case.nameless = false;
                case.count = 50;
                case.purpose = Purpose::AuditNames { first };
            })
        }

        fn touched(self, left_expired: u64) -> Self {
            let scanned = reply(at(1124), 100, 0);
            self.purpose(Purpose::Touch { command: "EXISTS", scanned })
                .with(|case| case.answer = Answer::Touched { left_expired })
        }

        fn judge(&self) -> Verdict {
            let context = Context {
                space: &self.space,
                ordered: self.ordered,
                segments: &self.segments,
                still: &self.still,
                cursors: &self.cursors,
                touch: &self.touch,
                names: &self.names,
                untouched: self.untouched,
            };
            let request =
                Request { from: self.from, count: self.count, nameless: self.nameless, counted_by: CountedBy::Dbsize };
            judge(&context, self.id, self.purpose, &request, self.answer)
        }
    }

    /// A pass without changes over 50,000 keys, of which `returned` were returned.
    fn still_with(returned: u64) -> StillPass {
        let mut still = StillPass::default();
        let reading = Reading { keys: 50_000, expired: None };
        still.add(&Reply { to: at(1), returned, before: reading, after: reading });
        still
    }

    /// Cursors that are found to go in a circle once one more leads to `to`.
    fn nearly_a_circle(to: ScanPosition) -> CursorLoop {
        let mut cursors = CursorLoop::default();
        loop {
            let mut next = cursors;
            if next.add(&reply(to, 0, 0)).is_some() {
                return cursors;
            }
            cursors = next;
        }
    }

    #[test]
    fn every_rule_of_what_a_reply_means() {
        use Purpose::{Walk, WalkToAudit, WalkToTouch};
        use Verdict::{Advance, AuditNames, Finished, TouchKeys, WalkClosely};
        let walk = Case::walk;
        let suspect = |hidden, at| Verdict::Suspect { hidden, at };
        let restart = Verdict::Restart;
        let end = ScanPosition::Finished;
        let limit = at(1024 + 1001);
        let exists = WalkToTouch("EXISTS");
        let table = [
            // A batch of the walk.
            ("as many keys as asked for", walk(at(1124), 100, 0), Advance(at(1124))),
            ("more keys than asked for", walk(at(1124), 107, 3), Advance(at(1124))),
            ("keys that were reclaimed count as scanned", walk(at(1124), 30, 70), Advance(at(1124))),
            ("the most buckets of one SCAN: a sparse table", walk(limit, 0, 0), Advance(limit)),
            ("past the end of its segment", walk(at(2050), 100, 0), Advance(at(2050))),
            ("a worker of an earlier segment meets the end", walk(end, 3, 0), Finished),
            ("the end, with all keys returned", walk(end, 50_000, 0).whole(), Finished),
            (
                "the end of the last segment while another is open",
                walk(end, 3, 0).with(|case| {
                    case.segments = Segments::new(case.space.clone(), 1, ScanPosition::NotStarted);
                    case.segments.claim().unwrap();
                    case.id = case.segments.claim().unwrap();
                    case.from = at(2048);
                }),
                Advance(end),
            ),
            (
                "the end of the last open segment",
                walk(end, 3, 0).with(|case| {
                    case.segments = Segments::new(case.space.clone(), 1, at(2048));
                    case.id = case.segments.claim().unwrap();
                    case.from = at(2048);
                }),
                Finished,
            ),
            (
                "the end while a range is set aside",
                walk(end, 3, 0).with(|case| {
                    case.segments.walk_closely(at(16), at(32));
                }),
                Advance(end),
            ),
            // Batches that bring fewer keys than COUNT, which hidden keys explain.
            (
                "fewer keys than asked for, and nothing that ended the SCAN",
                walk(at(1124), 30, 0),
                suspect(70, at(1124)),
            ),
            ("one key too few", walk(at(1124), 90, 9), suspect(1, at(1124))),
            (
                "hidden keys are found before the keys are touched",
                walk(at(1124), 30, 0).purpose(exists),
                suspect(70, at(1124)),
            ),
            (
                "nothing moved in a whole pass and keys are missing",
                walk(end, 100, 0).whole().with(|case| case.still = still_with(40_000)),
                suspect(9_900, end),
            ),
            (
                "a client wrote during the pass",
                walk(end, 100, 0).whole().with(|case| {
                    case.still = still_with(40_000);
                    case.still.proves_nothing();
                }),
                Finished,
            ),
            (
                "the last batch itself freed keys",
                walk(end, 100, 5).whole().with(|case| case.still = still_with(40_000)),
                Finished,
            ),
            (
                "a still pass proves nothing to cursors without order",
                walk(end, 100, 0).unordered().with(|case| case.still = still_with(40_000)),
                Finished,
            ),
            // A table for each slot: the end of one table ends a SCAN early.
            (
                "within the table of a slot",
                walk(in_slot(7, 131), 30, 0).by_slot(in_slot(7, 100)),
                suspect(70, in_slot(7, 131)),
            ),
            (
                "into the next table with fewer keys",
                walk(in_slot(8, 1), 30, 0).by_slot(in_slot(7, 100)),
                WalkClosely(in_slot(8, 1)),
            ),
            (
                "into the next table with as many keys as asked for",
                walk(in_slot(8, 1), 100, 0).by_slot(in_slot(7, 100)),
                Advance(in_slot(8, 1)),
            ),
            (
                "a range that was set aside already",
                walk(in_slot(8, 1), 30, 0).by_slot(in_slot(7, 100)).with(|case| {
                    case.segments.walk_closely(in_slot(7, 100), in_slot(8, 1));
                }),
                Advance(in_slot(8, 1)),
            ),
            (
                "from the start, in an unknown table",
                walk(in_slot(0, 1001), 30, 0).by_slot(ScanPosition::NotStarted),
                WalkClosely(in_slot(0, 1001)),
            ),
            ("the last slot's end", walk(end, 3, 0).by_slot(in_slot(99, 100)), Finished),
            // Ranges that are walked again with COUNT 1.
            ("a bucket with a key", walk(at(1025), 1, 0).closely(), Advance(at(1025))),
            ("a bucket whose key was freed", walk(at(1025), 0, 1).closely(), Advance(at(1025))),
            ("the most buckets without a key", walk(at(1024 + 11), 0, 0).closely(), Advance(at(1035))),
            ("fewer buckets without a key", walk(at(1024 + 7), 0, 0).closely(), suspect(1, at(1031))),
            ("no further than before", walk(at(1024), 1, 0).closely(), restart(Restart::Unordered)),
            ("the end of the range, the pass goes on", walk(at(1100), 1, 0).closely(), Advance(at(1100))),
            // Cursors that go back, or that have no order.
            ("back in a hash table", walk(at(1000), 100, 0), restart(Restart::Unordered)),
            ("back where no order is known", walk(at(7), 100, 0).unordered(), Advance(at(7))),
            ("few keys where no order is known", walk(at(7), 3, 0).unordered(), Advance(at(7))),
            (
                "round in a circle",
                walk(at(7), 100, 0).unordered().with(|case| {
                    case.cursors = nearly_a_circle(at(7));
                }),
                Verdict::Broken("they go round in a circle".to_owned()),
            ),
            ("the end where no order is known", walk(end, 3, 0).unordered(), Finished),
            // Batches whose keys are touched, and what the touch finds.
            ("a batch to be touched", walk(at(1124), 100, 0).purpose(exists), TouchKeys("EXISTS")),
            ("a batch to be touched that returned nothing", walk(limit, 0, 0).purpose(exists), Advance(limit)),
            ("touched, all alive", walk(at(1124), 100, 0).touched(0), Advance(at(1124))),
            ("touched, two had just expired", walk(at(1124), 100, 0).touched(2), Advance(at(1124))),
            ("touched, SCAN had left three", walk(at(1124), 100, 0).touched(3), restart(Restart::TouchNeeded)),
            (
                "touched, SCAN had left three, and every key was touched before",
                walk(at(1124), 100, 0).touched(3).with(|case| {
                    case.untouched = false;
                }),
                Advance(at(1124)),
            ),
            (
                "touched, three left, but SCAN has freed more",
                walk(at(1124), 100, 0).touched(3).with(|case| {
                    case.touch.learn(9, 0);
                }),
                Advance(at(1124)),
            ),
            (
                "touched, as asked, whatever is left",
                walk(at(1124), 100, 0).touched(50).with(|case| {
                    case.touch = TouchAudit::new(Touch::Exists, false);
                    case.touch.was_answered();
                }),
                Advance(at(1124)),
            ),
            (
                "the one key that tests the right",
                walk(at(1124), 100, 0).touched(0).with(|case| {
                    case.touch = TouchAudit::new(Touch::Auto, false);
                }),
                TouchKeys("EXISTS"),
            ),
            (
                "touched behind the last batch",
                walk(at(1124), 100, 0).touched(0).with(|case| {
                    case.purpose = Purpose::Touch { command: "EXISTS", scanned: reply(end, 100, 0) };
                }),
                Finished,
            ),
            // Batches without names, and the audit that reads the names.
            ("without names few keys prove nothing", walk(at(1124), 0, 5).nameless(), Advance(at(1124))),
            ("without names, to be audited", walk(at(1124), 0, 5).nameless().purpose(WalkToAudit), AuditNames),
            ("the end, to be audited", walk(end, 0, 5).nameless().purpose(WalkToAudit), AuditNames),
            ("the audit finds nothing", walk(at(1074), 50, 0).audited(reply(at(1124), 0, 9)), Advance(at(1124))),
            ("the audit finds two", walk(at(1074), 48, 2).audited(reply(at(1124), 0, 9)), Advance(at(1124))),
            (
                "the audit finds three",
                walk(at(1074), 47, 3).audited(reply(at(1124), 0, 0)),
                restart(Restart::NamesNeeded),
            ),
            (
                "the audit finds three of many",
                walk(at(1074), 47, 3).audited(reply(at(1124), 0, 100)).with(|case| {
                    case.names.learn(100, None);
                }),
                Advance(at(1124)),
            ),
            (
                "the audit finds hidden keys",
                walk(at(1074), 20, 0).audited(reply(at(1124), 0, 9)),
                suspect(30, at(1074)),
            ),
            ("the audit of the last batch", walk(at(1074), 50, 0).audited(reply(end, 0, 9)), Finished),
            ("names without an audit", walk(at(1124), 100, 0).purpose(Walk), Advance(at(1124))),
        ];
        for (what, case, expected) in table {
            assert_eq!(case.judge(), expected, "{what}");
        }
    }
}
