//! One batch with everything around it, and what its answer tells.

use std::time::Duration;

use crate::engine::batch::{self, Hidden};
use crate::engine::contact::may_be_swept;
use crate::engine::control::stop_ordered;
use crate::engine::pass::{Pass, REPORT_EVERY};
use crate::engine::pause::wait;
use crate::engine::payload::Payload;
use crate::engine::scout::{Second, Walk};
use crate::engine::shard_scan::{End, ShardScan};
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::{ScanEventKind, TouchOutcome};
use crate::model::shard::ScanPosition;
use crate::model::throttle::Reason;
use crate::node::commands;
use crate::node::conn::{Ask, Gauge, ScanBatch};
use crate::node::error::{Class, NodeError};

/// How often a batch that proved hidden keys is asked again before we say so: a table that was resized in the middle
/// of a SCAN can look like it once, but not again at the same cursor.
const DOUBTS: u32 = 2;
/// Pause between looks at a server that does not delete.
const BLOCKED_EVERY: Duration = Duration::from_millis(250);

impl ShardScan {
    /// One batch with everything around it. Leaves the position where it was when the batch has to be asked again.
    pub(super) async fn step(&mut self, pass: &mut Pass) -> Result<(), End> {
        if !self.under_way() {
            self.obey(pass).await?;
            self.look_around(pass).await?;
            self.look(pass).await?;
            self.sit_down(pass).await?;
            self.rest(pass).await?;
        }
        if self.stretches(pass) > 0
            && self.nothing_waits(pass)
            && let Err(error) = self.send_both(pass).await
        {
            return self.lost(error, pass).await;
        }
        let walk = self.next_walk();
        let course = pass.course();
        let ahead = self.conn_of(walk).ahead();
        let from = course.at(walk).unwrap_or(ScanPosition::Finished);
        if ahead.is_some_and(|ask| Some(ask.cursor) != from.to_send()) {
            return self.settle(walk, pass).await.map(|_| ());
        }
        let Some(cursor) = from.to_send() else { return Ok(()) };
        let touch = self.toucher.command();
        let gauge = self.gauge();
        let ask = ahead.unwrap_or_else(|| {
            let nameless = touch.is_none() && self.payload.is_nameless();
            Ask { cursor, count: self.pacer.count(), nameless, gauge }
        });
        let count = ask.count;
        // What is asked of the names of this batch, if it comes with any.
        let touch = touch.filter(|_| !ask.nameless);
        let audit = ask.nameless && self.payload.audit_is_due();
        // A batch without names cannot be touched: one that is to be is not sent ahead.
        let same = !ask.nameless || !(audit || self.toucher.is_near());
        let free = touch.is_none() && same && self.nothing_waits(pass);
        let bits = if free { self.stretches(pass) } else { 0 };
        self.take_turn(walk);
        let conn = self.second.of(walk, &mut self.conn);
        let next = |cursor| {
            let advance = course.advance(&self.space, bits, walk, ScanPosition::from_reply(cursor));
            let cursor = advance.next.filter(|_| free)?.to_send()?;
            Some(Ask { cursor, count: self.pacer.count(), nameless: ask.nameless, gauge })
        };
        let scanned = match conn.scan(ask, touch.is_some().then_some(&mut self.names), next).await {
            Ok(scanned) => scanned,
            Err(error) if ask.nameless && matches!(error.class(), Class::Fatal(FailureKind::Unsupported)) => {
                return self
                    .names_again(pass, format!("the server refuses SCAN with a TYPE that it does not know ({error})"))
                    .await;
            }
            Err(error) => return self.lost(error, pass).await,
        };
        self.patience = None;
        self.account(pass, &scanned, ask);
        let to = ScanPosition::from_reply(scanned.cursor);
        if self.judges && self.space.rank(to) < self.space.rank(from) {
            return self.one_walk(pass).await;
        }
        let advance = course.advance(&self.space, bits, walk, to);
        let finished = advance.course.position == ScanPosition::Finished;
        if ask.nameless {
            let proof = if audit {
                let Some(left_dead) = self.audit_payload(walk, from, pass, ask, &scanned).await? else { return Ok(()) };
                Some(left_dead)
            } else {
                None
            };
            if self.payload.learn(scanned.reclaimed(), proof) {
                return self.names_again(pass, "SCAN without names left expired keys in memory".to_owned()).await;
            }
        } else if self.judges {
            let Some(by_batch) = self.hidden(walk, from, count, pass, &scanned).await? else { return Ok(()) };
            let hidden = if finished { by_batch.max(pass.still.hidden()) } else { by_batch };
            if hidden > 0 {
                return self.blocked(pass, to, hidden).await;
            }
        }
        // Going back may have led far back: the batches up to the doubtful place prove nothing about it.
        if self.space.rank(to) >= self.space.rank(pass.doubted) || scanned.reclaimed() > 0 {
            pass.doubts = 0;
            pass.doubted = ScanPosition::NotStarted;
            self.end_hold(Some(pass)).await;
        }
        if touch.is_some() {
            self.names.truncate(self.toucher.keys());
            pass.untouched |= scanned.returned > self.names.len() as u64;
        }
        match touch.filter(|_| !self.names.is_empty()) {
            Some(command) => {
                // What was freed is safe from here on; the position follows once the batch is done.
                self.write_tally(pass).await;
                if !self.touch(walk, pass, command, &scanned).await? {
                    return Ok(());
                }
            }
            None => {
                pass.untouched |= scanned.returned > 0;
                let outcome = self.toucher.learn(scanned.reclaimed(), 0);
                self.say_touch(outcome).await;
            }
        }
        if finished {
            self.write_tally(pass).await;
            if !self.settle_both(pass).await? {
                return Ok(());
            }
            if !self.confirm(pass).await? {
                return wait(&mut self.orders, BLOCKED_EVERY).await;
            }
        }
        self.check_way(pass, &scanned)?;
        pass.figures.position = advance.course.position;
        pass.scout = advance.course.scout;
        if let (true, Second::Open(second)) = (advance.swapped, &mut self.second) {
            std::mem::swap(&mut self.conn, &mut **second);
        }
        if scanned.reclaimed() > 0 {
            pass.proven = pass.figures.position;
        }
        self.write_tally(pass).await;
        self.pay(pass).await?;
        if pass.reported.elapsed() >= REPORT_EVERY {
            self.report(pass).await;
        }
        Ok(())
    }

    /// These cursors are not a hash table's, and where the walks stand to each other is unknown: begins again, with one.
    async fn one_walk(&mut self, pass: &mut Pass) -> Result<(), End> {
        (self.judges, self.out_of_order) = (false, true);
        self.settle_both(pass).await?;
        let why = "its cursors are not those of a hash table, as behind some proxies".to_owned();
        self.done.clear();
        self.redo = Some(why.clone());
        self.second = Second::default();
        self.begin_again(pass, why).await;
        Ok(())
    }

    /// Asks again for a batch that came without names, with them. Returns how many keys the first time had left dead; `None` where
    /// the batch has to be asked again.
    async fn audit_payload(
        &mut self,
        walk: Walk,
        from: ScanPosition,
        pass: &mut Pass,
        ask: Ask,
        first: &ScanBatch,
    ) -> Result<Option<u64>, End> {
        let count = Payload::audit_count(ask.count, first.reclaimed());
        let again = Ask { count, nameless: false, ..ask };
        let scanned = match self.conn_of(walk).scan(again, None, |_| None).await {
            Ok(scanned) => scanned,
            Err(error) => return self.lost(error, pass).await.map(|()| None),
        };
        self.account(pass, &scanned, again);
        // It looked at keys that were counted the first time.
        pass.figures.scanned -= scanned.returned;
        pass.met = pass.met.saturating_sub(scanned.returned);
        if self.judges {
            let Some(hidden) = self.hidden(walk, from, count, pass, &scanned).await? else { return Ok(None) };
            if hidden > 0 {
                return self.blocked(pass, ScanPosition::from_reply(scanned.cursor), hidden).await.map(|()| None);
            }
        }
        Ok(Some(scanned.reclaimed()))
    }

    /// Keys that a batch with names has hidden, for sure. Where the batch leaves it open its way is walked once more, closely.
    /// `None`: the batch has to be asked again.
    async fn hidden(
        &mut self,
        walk: Walk,
        from: ScanPosition,
        count: u32,
        pass: &mut Pass,
        batch: &ScanBatch,
    ) -> Result<Option<u64>, End> {
        match batch::hidden(&self.space, from, count, batch) {
            Hidden::Unproven => return Ok(Some(0)),
            Hidden::Keys(keys) => return Ok(Some(keys)),
            Hidden::Open => {}
        }
        // The batch after it may be under way, and comes again.
        pass.still.misses_a_batch();
        if !self.settle(walk, pass).await? {
            return Ok(None);
        }
        let (gauge, to) = (self.gauge(), ScanPosition::from_reply(batch.cursor));
        let mut at = from;
        while let Some(cursor) = at.to_send().filter(|_| self.space.rank(at) < self.space.rank(to)) {
            if self.orders.borrow().stop.is_some() {
                return Ok(None);
            }
            let ask = Ask { cursor, count: 1, nameless: false, gauge };
            let scanned = match self.conn_of(walk).scan(ask, None, |_| None).await {
                Ok(scanned) => scanned,
                Err(error) => return self.lost(error, pass).await.map(|()| None),
            };
            // Keys that were looked at before. What it says of the cost of a key is nothing to go by.
            pass.figures.active += self.pacer.worked(0, scanned.waited, scanned.since_sent);
            pass.figures.batches += 1;
            pass.figures.reclaimed += scanned.reclaimed();
            pass.keys = scanned.after.keys;
            if let Hidden::Keys(keys) = batch::hidden(&self.space, at, 1, &scanned) {
                return Ok(Some(keys));
            }
            let next = ScanPosition::from_reply(scanned.cursor);
            if self.space.rank(next) <= self.space.rank(at) {
                // No hash table's cursors: the batches after it tell.
                break;
            }
            at = next;
        }
        Ok(Some(0))
    }

    /// SCAN without names does not do here: from now on they come back, and what was swept without them is swept again.
    async fn names_again(&mut self, pass: &mut Pass, why: String) -> Result<(), End> {
        if !self.payload.give_up() {
            // The answer to the other walk has said so.
            return Ok(());
        }
        if pass.figures.nameless > 0 {
            self.done.clear();
            self.redo = Some(why.clone());
            self.begin_again(pass, why).await;
        } else {
            let message = format!("{why}: its names are read");
            self.reporter.say(ScanEventKind::Warned { message }).await;
        }
        Ok(())
    }

    /// Whether the batch after the next may be sent before the next one's sums are done: nothing that comes before a
    /// batch has anything to say.
    fn nothing_waits(&self, pass: &Pass) -> bool {
        let orders = self.orders.borrow();
        let orders_wait = orders.stop.is_some() || orders.hold.is_some() || !self.pacer.runs_free(&orders.tuning);
        let look_waits = self.observer.has_new() || self.others.look_is_due(&orders.tuning);
        !orders_wait && !look_waits && self.hold.is_none() && pass.doubts == 0
    }

    /// A server, or something in between, whose cursors lead nowhere must not hold us for ever.
    fn check_way(&self, pass: &mut Pass, scanned: &ScanBatch) -> Result<(), Failure> {
        let Some(why) = pass.way.add(scanned) else { return Ok(()) };
        let message = format!("the cursors of {} lead nowhere: {why}", self.conn.addr());
        let failure = Failure::new(FailureKind::Protocol, message);
        Err(failure.hint("is this a Redis or Valkey server, and is nothing in between that answers for it?"))
    }

    /// Takes a seat, and says so where there is none.
    async fn sit_down(&mut self, pass: &mut Pass) -> Result<(), End> {
        if self.seat.is_some() {
            return Ok(());
        }
        self.seat = self.job.seats.take_now(&self.master.addr);
        if self.seat.is_none() {
            self.begin_hold(Some(pass), Reason::Queued, None).await;
            self.report(pass).await;
            self.seat = tokio::select! {
                seat = self.job.seats.take(&self.master.addr) => Some(seat),
                reason = stop_ordered(&mut self.orders) => return Err(End::Stopped(reason)),
            };
            self.end_hold(Some(pass)).await;
        }
        Ok(())
    }

    pub(super) fn account(&mut self, pass: &mut Pass, scanned: &ScanBatch, ask: Ask) {
        let reclaimed = scanned.reclaimed();
        let figures = &mut pass.figures;
        let seen = if ask.nameless {
            // Keys that live are not in the reply. The keys that were not met yet are spread over the rest of the table, so the
            // share of that rest which was walked tells how many were met now.
            let from = if ask.cursor == 0 { ScanPosition::NotStarted } else { ScanPosition::from_reply(ask.cursor) };
            let (from, to) =
                (figures.space.fraction(from), figures.space.fraction(ScanPosition::from_reply(scanned.cursor)));
            let walked_by_scout =
                pass.scout.map_or(0.0, |scout| figures.space.fraction(scout.at) - figures.space.fraction(scout.from));
            let done = figures.space.fraction(figures.position) + walked_by_scout;
            let to_come = scanned.before.keys.saturating_sub(pass.met);
            let walked = ((to - from) / (1.0 - done).max(f64::EPSILON)).clamp(0.0, 1.0);
            figures.nameless += 1;
            // A batch that tells nothing about the keys that it looked at proves nothing about a whole pass.
            pass.still.misses_a_batch();
            reclaimed.max((walked * to_come as f64).round() as u64)
        } else {
            pass.still.add(scanned);
            scanned.returned + reclaimed
        };
        figures.active += self.pacer.worked(seen.max(1), scanned.waited, scanned.since_sent);
        figures.batches += 1;
        figures.scanned += seen;
        figures.reclaimed += reclaimed;
        pass.keys = scanned.after.keys;
        pass.met += seen.saturating_sub(reclaimed);
        // Where it is not known how many were looked at, COUNT is the least.
        pass.unpaid += if ask.nameless { seen.max(u64::from(ask.count)) } else { seen };
    }

    /// Deletions do not work: stand still at the last place where they did, and look again until they do.
    async fn blocked(&mut self, pass: &mut Pass, at: ScanPosition, hidden: u64) -> Result<(), End> {
        // An answer that is still to come is none to the batches after the wait.
        if !self.settle_both(pass).await? {
            return Ok(());
        }
        pass.go_back();
        self.write_tally(pass).await;
        pass.doubts += 1;
        pass.doubted = at;
        if pass.doubts > DOUBTS {
            let detail = format!("at least {hidden} expired keys were hidden and not freed by one batch");
            self.begin_hold(Some(pass), Reason::DeletionBlocked, Some(detail)).await;
            self.report(pass).await;
            // Another master of the host may be swept meanwhile, each time anew.
            self.seat = None;
            // It may have become a replica, and the sampler may look at another server: its connection is another one.
            match commands::info(&mut self.conn).await {
                Ok(info) => {
                    if let Err(failure) = may_be_swept(self.job.roster.kind(), &info) {
                        return self.demoted(failure, pass).await;
                    }
                }
                Err(error) => return self.recover(error, Some(pass)).await,
            }
        }
        wait(&mut self.orders, BLOCKED_EVERY).await
    }

    /// What tells how many keys the next batch frees.
    pub(super) fn gauge(&self) -> Gauge {
        if self.seen.may_evict { Gauge::ExpiredKeys } else { Gauge::Dbsize }
    }

    /// Asks for the keys of a batch. Returns whether the batch is done; if not, the same or an earlier one is next.
    async fn touch(
        &mut self,
        walk: Walk,
        pass: &mut Pass,
        command: &'static str,
        scanned: &ScanBatch,
    ) -> Result<bool, End> {
        let gauge = self.gauge();
        let conn = self.second.of(walk, &mut self.conn);
        let touched = match conn.touch(command, &self.names, gauge).await {
            Ok(touched) => touched,
            Err(error) if matches!(error.class(), Class::Fatal(_)) && matches!(error, NodeError::Server { .. }) => {
                return match self.toucher.refused() {
                    Some(outcome) => {
                        self.say_touch(Some(outcome)).await;
                        Ok(true)
                    }
                    None => Err(error.into_failure().into()),
                };
            }
            Err(error) => return self.lost(error, pass).await.map(|()| false),
        };
        let no_key = if command == "TTL" { -2 } else { 0 };
        let gone = touched.answers.iter().filter(|answer| **answer == Some(no_key)).count() as u64;
        let figures = &mut pass.figures;
        figures.active += self.pacer.worked(0, touched.waited, touched.waited);
        figures.touched += touched.answers.iter().flatten().count() as u64;
        // A key may also be gone because its owner has deleted it since the SCAN. And a long touch is not run back to back: what
        // others did in between is not ours.
        let left_dead = touched.reclaimed().min(gone);
        figures.found_by_touch += left_dead;
        figures.reclaimed += left_dead;
        if command == "TTL" {
            touched.answers.iter().flatten().for_each(|&ttl| figures.ttl.add(ttl));
        }
        self.write_tally(pass).await;
        let outcome = self.toucher.learn(scanned.reclaimed(), left_dead);
        self.say_touch(outcome).await;
        if outcome != Some(TouchOutcome::ScanLeavesDead) {
            return Ok(true);
        }
        let why = "SCAN left expired keys in memory, and what was swept before was not touched".to_owned();
        self.done.clear();
        self.redo = Some(why.clone());
        if !pass.untouched {
            return Ok(true);
        }
        self.begin_again(pass, why).await;
        Ok(false)
    }

    async fn say_touch(&self, outcome: Option<TouchOutcome>) {
        if let Some(outcome) = outcome {
            self.reporter.say(ScanEventKind::TouchDecided { outcome }).await;
        }
    }
}
