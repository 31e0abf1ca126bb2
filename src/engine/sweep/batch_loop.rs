//! One turn of the loop: wait until nothing holds it, send, receive, judge, count, apply. The head of [`crate::engine`] names the function
//! of each step. [`verdict::judge`] decides what a reply means; only `apply` and what it calls move the pass.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::engine::control::stop_requested;
use crate::engine::policy::key_names::{KeyNames, NamesMode};
use crate::engine::policy::pacer::Wait;
use crate::engine::policy::profile::may_be_swept;
use crate::engine::policy::segments::SegmentId;
use crate::engine::policy::touch_audit::TouchAudit;
use crate::engine::policy::verdict::{self, Answer, Context, Purpose, Restart, Verdict};
use crate::engine::sweep::pass::{Pass, REPORT_EVERY};
use crate::engine::sweep::pipeline::Exchange;
use crate::engine::sweep::session::Session;
use crate::engine::sweep::shard::{End, ShardSweep};
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::{ScanEventKind, TouchOutcome};
use crate::model::shard::ScanPosition;
use crate::model::throttle::Reason;
use crate::node::commands;
use crate::node::conn::{CountedBy, Reply, Request, Timing, TouchReply};
use crate::node::error::{Class, NodeError};

/// A hold begins once hidden keys were proven more often than this: a table that is resized in the middle of a SCAN can look like
/// hidden keys once, but not again at the same cursor.
const SUSPICIONS_BEFORE_HOLD: u32 = 2;
/// Pause before the next batch to a server that does not delete.
const BLOCKED_EVERY: Duration = Duration::from_millis(250);
/// After an error on one connection, the replies on the others are awaited for this long in all.
const DRAIN_WITHIN: Duration = Duration::from_secs(1);

/// The reply of an exchange.
enum Received {
    Scanned(Reply),
    Touched(TouchReply),
}

impl ShardSweep {
    /// Walks the pass to its end.
    pub(super) async fn walk(&mut self, pass: &mut Pass) -> Result<(), End> {
        while pass.figures.checkpoint.position != ScanPosition::Finished {
            self.turn(pass).await?;
        }
        Ok(())
    }

    async fn turn(&mut self, pass: &mut Pass) -> Result<(), End> {
        let stand_still = self.must_stand_still(pass).await?;
        let wake = match stand_still {
            true => None,
            false => match self.send(pass).await {
                Ok(wake) => wake,
                Err(error) => return self.lost(error, pass).await,
            },
        };
        let Some(worker) = pass.pipeline.next(&self.session) else {
            return match wake {
                _ if stand_still => self.stand_still(pass).await,
                Some(until) => self.rest(pass, until).await,
                None => {
                    let what = "nothing of the pass is left to walk, but it is not complete";
                    Err(Failure::new(FailureKind::Protocol, what).into())
                }
            };
        };
        let begins = tokio::select! {
            biased;
            begins = self.session.conns[worker].reply_begins() => begins,
            () = pass.pipeline.timer.until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => return Ok(()),
        };
        if let Err(error) = begins {
            pass.pipeline.workers[worker].exchange = None;
            return self.lost(error, pass).await;
        }
        self.receive(worker, pass, !stand_still).await
    }

    /// Sends as many batches as may be under way. Returns when to try again if the pacer delays one.
    async fn send(&mut self, pass: &mut Pass) -> Result<Option<Instant>, NodeError> {
        let options = self.job.map.topology().options();
        let depth = self.depth_of(pass);
        pass.pipeline.grow(depth, &mut self.session, options, pass.db).await;
        while pass.pipeline.under_way() < depth {
            let Some(worker) = claim(pass) else { return Ok(None) };
            if let Some(Err(at)) = self.keep.as_mut().map(|keep| keep.pace.may_send(Instant::now())) {
                pass.pipeline.depth.was_paced();
                return Ok(Some(at));
            }
            if let Err(later) = self.pacer.may_send(depth > 2) {
                if later.to_rest {
                    pass.pipeline.depth.was_paced();
                }
                return Ok(Some(later.at));
            }
            let counted_by = self.counted_by();
            let count = self.pacer.count();
            let Session { conns, touch, names, .. } = &mut self.session;
            let Some(segment) = pass.pipeline.workers[worker].segment else { return Ok(None) };
            let Some(from) = pass.segments.at(segment) else { return Ok(None) };
            let exchange = if pass.segments.is_walked_closely(segment) {
                let request = Request { from, count: 1, nameless: false, counted_by };
                Exchange { purpose: Purpose::Walk, request, segment }
            } else {
                compose(segment, from, count, counted_by, touch, names)
            };
            conns[worker].send_scan(exchange.request).await?;
            self.pacer.sent();
            pass.pipeline.workers[worker].exchange = Some(exchange);
        }
        Ok(None)
    }

    /// How many batches may be under way.
    fn depth_of(&self, pass: &Pass) -> usize {
        // While deletions may be blocked, each batch has to be judged before the next one is sent.
        if pass.suspicions > 0 || !pass.segments.is_cut() { 1 } else { pass.pipeline.depth.now() }
    }

    /// What measures how many keys a batch reclaims.
    fn counted_by(&self) -> CountedBy {
        if self.session.seen.may_evict { CountedBy::ExpiredKeys } else { CountedBy::Dbsize }
    }

    /// Receives the reply of a worker's exchange and carries out what it means. `go_on`: the worker's next batch may be sent as soon
    /// as the cursor has arrived.
    async fn receive(&mut self, worker: usize, pass: &mut Pass, go_on: bool) -> Result<(), End> {
        let depth = self.depth_of(pass);
        let counted_by = self.counted_by();
        let Some(exchange) = pass.pipeline.workers[worker].exchange.take() else { return Ok(()) };
        let Exchange { purpose, segment, .. } = exchange;
        // This process may have been suspended, and its lease may have ended meanwhile.
        let may_go_on = go_on
            && self.control.borrow().holds().is_none()
            && purpose == Purpose::Walk
            && pass.pipeline.under_way() < depth
            && !pass.segments.is_walked_closely(segment)
            && !pass.segments.has_set_aside();
        let Session { conns, touch, names, .. } = &mut self.session;
        let (pacer, segments, state) = (&mut self.pacer, &pass.segments, &mut pass.pipeline.workers[worker]);
        let keep = &mut self.keep;
        let mut sent = None;
        let received = match purpose {
            Purpose::Touch { .. } => {
                conns[worker].receive_touch().await.map(|(reply, timing)| (Received::Touched(reply), timing))
            }
            _ => {
                let kept = matches!(purpose, Purpose::WalkToTouch(_)).then_some(&mut state.names);
                let next = |to| {
                    let waits = keep.as_mut().is_some_and(|keep| keep.pace.may_send(Instant::now()).is_err());
                    if !may_go_on || waits || segments.passes_end(segment, to) || pacer.may_send(depth > 2).is_err() {
                        return None;
                    }
                    let next = compose(segment, to, pacer.count(), counted_by, touch, names);
                    pacer.sent();
                    sent = Some(next);
                    Some(next.request)
                };
                conns[worker].receive_scan(kept, next).await.map(|(reply, timing)| (Received::Scanned(reply), timing))
            }
        };
        state.exchange = sent;
        match received {
            Ok((received, timing)) => {
                self.retry = None;
                self.take(worker, exchange, received, timing, pass).await
            }
            Err(error) => self.refused(error, exchange, pass).await,
        }
    }

    /// Handles an exchange whose reply cannot be judged.
    async fn refused(&mut self, error: NodeError, exchange: Exchange, pass: &mut Pass) -> Result<(), End> {
        let fatal = matches!(error.class(), Class::Fatal(_)) && matches!(error, NodeError::Server { .. });
        if let (Purpose::Touch { scanned, .. }, true) = (exchange.purpose, fatal) {
            let Some(outcome) = self.session.touch.refused() else { return Err(error.into_failure().into()) };
            self.say_touch(Some(outcome)).await;
            let verdict = self.go_on_at(exchange.segment, scanned.to, pass);
            return self.apply(exchange, verdict, pass).await;
        }
        if exchange.request.nameless && matches!(error.class(), Class::Fatal(FailureKind::Unsupported)) {
            let why = format!("the server refuses SCAN with a TYPE that it does not know ({error})");
            return self.read_names(pass, why).await;
        }
        self.lost(error, pass).await
    }

    /// Judges a reply, counts it, and carries the verdict out, or sends the follow-up that the verdict asks for.
    async fn take(
        &mut self,
        worker: usize,
        exchange: Exchange,
        received: Received,
        timing: Timing,
        pass: &mut Pass,
    ) -> Result<(), End> {
        let answer = match &received {
            Received::Scanned(reply) => Answer::Scanned(*reply),
            Received::Touched(reply) => Answer::Touched { left_expired: left_expired(exchange.purpose, reply) },
        };
        let mut verdict = self.judge(&exchange, answer, pass);
        let mut is_set_aside = false;
        if let Verdict::WalkClosely(to) = verdict {
            is_set_aside = true;
            pass.segments.walk_closely(exchange.request.from, to);
            pass.still.proves_nothing();
            verdict = self.judge(&exchange, answer, pass);
        }
        self.count(&exchange, &received, timing, pass);
        // A range that is set aside may still turn out to hide keys.
        if !is_set_aside && !matches!(verdict, Verdict::Suspect { .. }) {
            self.clear_suspicions(&exchange, answer, pass).await;
        }
        match (verdict, answer) {
            (Verdict::AuditNames, Answer::Scanned(first)) => {
                let count = KeyNames::audit_count(exchange.request.count, first.reclaimed());
                let request = Request { count, nameless: false, ..exchange.request };
                let sent = self.session.conns[worker].send_scan(request).await;
                let purpose = Purpose::AuditNames { first };
                self.follow_up(worker, Exchange { purpose, request, ..exchange }, sent, pass).await
            }
            (Verdict::TouchKeys(command), _) => {
                let scanned = match (exchange.purpose, answer) {
                    (Purpose::Touch { scanned, .. }, _) | (_, Answer::Scanned(scanned)) => scanned,
                    (_, Answer::Touched { .. }) => return Ok(()),
                };
                // The server has answered for one key, so the user may run the command: now for the other keys.
                if matches!(exchange.purpose, Purpose::Touch { .. }) {
                    self.session.touch.was_answered();
                }
                let keys = self.session.touch.keys();
                let names = &pass.pipeline.workers[worker].names;
                pass.untouched |= scanned.returned > names.len().min(keys) as u64;
                // The count is safe from here on; the position follows once the batch is done.
                self.write_journal(pass).await;
                let counted_by = self.counted_by();
                let names = &pass.pipeline.workers[worker].names;
                let sent = self.session.conns[worker].send_touch(command, names, keys, counted_by).await;
                let purpose = Purpose::Touch { command, scanned };
                self.follow_up(worker, Exchange { purpose, ..exchange }, sent, pass).await
            }
            (verdict, _) => {
                self.learn(&exchange, answer, pass).await;
                self.apply(exchange, verdict, pass).await
            }
        }
    }

    fn judge(&self, exchange: &Exchange, answer: Answer, pass: &Pass) -> Verdict {
        let context = Context {
            space: &self.session.space,
            ordered: self.session.ordered,
            segments: &pass.segments,
            still: &pass.still,
            cursors: &pass.cursors,
            touch: &self.session.touch,
            names: &self.session.names,
            untouched: pass.untouched,
        };
        verdict::judge(&context, exchange.segment, exchange.purpose, &exchange.request, answer)
    }

    fn go_on_at(&self, segment: SegmentId, to: ScanPosition, pass: &Pass) -> Verdict {
        if pass.segments.finishes(segment, to) { Verdict::Finished } else { Verdict::Advance(to) }
    }

    /// Notes the worker's next exchange about the same range, unless it could not be sent.
    async fn follow_up(
        &mut self,
        worker: usize,
        exchange: Exchange,
        sent: Result<(), NodeError>,
        pass: &mut Pass,
    ) -> Result<(), End> {
        match sent {
            Ok(()) => {
                pass.pipeline.workers[worker].exchange = Some(exchange);
                Ok(())
            }
            Err(error) => self.lost(error, pass).await,
        }
    }

    /// Counts a reply, whatever its verdict.
    fn count(&mut self, exchange: &Exchange, received: &Received, timing: Timing, pass: &mut Pass) {
        let pipeline = &mut pass.pipeline;
        let before = pipeline.last_read.replace(timing.read).map_or(timing.sent, |read| read.max(timing.sent));
        let own = timing.read.duration_since(before);
        let wait = Wait { own, since_sent: timing.since_sent(), waited_for: timing.waited_for };
        match received {
            Received::Scanned(reply) => {
                let held = self.count_scan(exchange, reply, wait, pass);
                self.ledger.worked(held);
                let work = self.pacer.expected_work();
                if !work.is_zero() {
                    let (floor, intensity) = (self.pacer.floor(), self.pacer.intensity());
                    let left = 1.0 - self.session.foreground.cpu.unwrap_or(0.0);
                    pass.pipeline.depth.answered(wait.since_sent, floor, work, intensity, left);
                }
            }
            Received::Touched(reply) => {
                self.ledger.worked(self.pacer.worked_beside(wait));
                let left_expired = left_expired(exchange.purpose, reply);
                let counters = &mut pass.figures.counters;
                counters.found_by_touch += left_expired;
                counters.reclaimed += left_expired;
                // The one key that tests the right is touched again with the others.
                if self.session.touch.may_ask() {
                    let answers = reply.answers.iter().flatten();
                    counters.touched += answers.clone().count() as u64;
                    if matches!(exchange.purpose, Purpose::Touch { command: "TTL", .. }) {
                        answers.for_each(|&ttl| counters.ttl.add(ttl));
                    }
                }
            }
        }
    }

    fn count_scan(&mut self, exchange: &Exchange, reply: &Reply, wait: Wait, pass: &mut Pass) -> Duration {
        let Exchange { purpose, request, segment } = exchange;
        let reclaimed = reply.reclaimed();
        let counters = &mut pass.figures.counters;
        counters.batches += 1;
        counters.reclaimed += reclaimed;
        pass.keys = reply.after.keys;
        if pass.segments.is_walked_closely(*segment) {
            // These keys were counted as scanned before.
            return self.pacer.worked_beside(wait);
        }
        if matches!(purpose, Purpose::AuditNames { .. }) {
            // These keys were counted by the first SCAN, but for the expired ones that it left.
            counters.scanned += reclaimed;
            self.pacer.charge(reply.seen());
            return self.pacer.worked_beside(wait);
        }
        let share = |position| pass.figures.checkpoint.space.fraction(position);
        let walked = (share(reply.to) - share(request.from)).max(0.0);
        let seen = if request.nameless {
            // Live keys are not in the reply. The keys that were not met yet are spread over the rest of the table, so the share of
            // that rest which this batch walked tells how many it met.
            let to_come = reply.before.keys.saturating_sub(pass.met);
            let part = (walked / (1.0 - pass.walked).max(f64::EPSILON)).clamp(0.0, 1.0);
            counters.nameless += 1;
            // A batch without names cannot show hidden keys, so the whole pass cannot either.
            pass.still.proves_nothing();
            reclaimed.max((part * to_come as f64).round() as u64)
        } else {
            pass.still.add(reply);
            reply.seen()
        };
        pass.walked += walked;
        if let Some(keep) = &mut self.keep {
            keep.walked(pass.walked, reclaimed, pass.keys);
        }
        pass.met += seen.saturating_sub(reclaimed);
        counters.scanned += seen;
        // How many keys a batch without names visited is an estimate: COUNT is the least.
        self.pacer.charge(if request.nameless { seen.max(u64::from(request.count)) } else { seen });
        self.pacer.worked(seen, wait)
    }

    /// Ends the suspicion that deletions are blocked, once a batch reclaims keys or gets past the suspected place without hidden keys.
    async fn clear_suspicions(&mut self, exchange: &Exchange, answer: Answer, pass: &mut Pass) {
        let Answer::Scanned(reply) = answer else { return };
        // A batch without names cannot show hidden keys. Batches before the suspected place prove nothing about it: going back may have
        // led far before it.
        let rank = |position| self.session.space.rank(position);
        let is_past = !exchange.request.nameless && rank(reply.to) >= rank(pass.suspected_at);
        if is_past || reply.reclaimed() > 0 {
            pass.suspicions = 0;
            pass.suspected_at = ScanPosition::NotStarted;
            self.end_hold().await;
        }
    }

    /// Learns about the server from a range that is done.
    async fn learn(&mut self, exchange: &Exchange, answer: Answer, pass: &mut Pass) {
        let outcome = match (exchange.purpose, answer) {
            (Purpose::Touch { scanned, .. }, Answer::Touched { left_expired }) => {
                self.session.touch.learn(scanned.reclaimed(), left_expired)
            }
            (Purpose::AuditNames { first }, Answer::Scanned(reply)) => {
                self.session.names.learn(first.reclaimed(), Some(reply.reclaimed()));
                self.session.touch.learn(first.reclaimed(), 0)
            }
            (_, Answer::Scanned(reply)) => {
                pass.cursors.add(&reply);
                pass.untouched |= reply.returned > 0 || exchange.request.nameless;
                if exchange.request.nameless {
                    self.session.names.learn(reply.reclaimed(), None);
                }
                self.session.touch.learn(reply.reclaimed(), 0)
            }
            (_, Answer::Touched { .. }) => None,
        };
        self.say_touch(outcome).await;
        if outcome == Some(TouchOutcome::ScanLeavesExpired) {
            self.session.sweep_again(Restart::TouchNeeded.sentence());
        }
    }

    async fn say_touch(&self, outcome: Option<TouchOutcome>) {
        if let Some(outcome) = outcome {
            self.reporter.say(ScanEventKind::TouchDecided { outcome }).await;
        }
    }

    async fn apply(&mut self, exchange: Exchange, verdict: Verdict, pass: &mut Pass) -> Result<(), End> {
        match verdict {
            Verdict::Advance(to) => self.advance(exchange.segment, to, pass).await,
            Verdict::Finished => {
                self.write_journal(pass).await;
                if !self.confirm(pass).await? {
                    return self.wait(BLOCKED_EVERY).await;
                }
                self.advance(exchange.segment, ScanPosition::Finished, pass).await;
            }
            Verdict::Suspect { hidden, at } => return self.suspect(hidden, at, pass).await,
            Verdict::Restart(why) => return self.restart(why, pass).await,
            Verdict::Broken(why) => {
                let message = format!("the cursors of {} lead nowhere: {why}", self.session.addr());
                let failure = Failure::new(FailureKind::Protocol, message);
                let hint = "is this a Redis or Valkey server, or does a proxy answer in its place?";
                return Err(failure.hint(hint).into());
            }
            // `take` has sent the follow-up.
            Verdict::AuditNames | Verdict::TouchKeys(_) | Verdict::WalkClosely(_) => {}
        }
        if pass.reported.elapsed() >= REPORT_EVERY {
            self.report(pass).await;
        }
        Ok(())
    }

    async fn advance(&mut self, segment: SegmentId, to: ScanPosition, pass: &mut Pass) {
        let freed = pass.figures.counters.reclaimed;
        let done = pass.segments.advance(segment, to);
        for worker in pass.pipeline.workers.iter_mut().filter(|worker| worker.segment == Some(segment)) {
            if done {
                worker.segment = None;
            } else if pass.segments.has_set_aside() && worker.exchange.is_none() {
                // What was set aside comes first.
                pass.segments.release(segment);
                worker.segment = None;
            }
        }
        pass.figures.checkpoint.position = pass.segments.position();
        // One of each worker, and the one that is being counted.
        pass.figures.gauges.under_way = self.depth_of(pass) as u64 + 1;
        if freed > pass.reclaimed_at_proof {
            (pass.reclaimed_at_proof, pass.proven) = (freed, pass.figures.checkpoint.position);
        }
        self.write_journal(pass).await;
    }

    /// Receives and counts everything under way, without moving the pass. Returns whether that worked; if not, the connection was
    /// lost and the sweep has recovered.
    async fn settle(&mut self, pass: &mut Pass) -> Result<bool, End> {
        while let Some(worker) = pass.pipeline.next(&self.session) {
            match self.receive_and_count(worker, pass).await {
                Ok(()) => {}
                Err(error) => return self.lost(error, pass).await.map(|()| false),
            }
        }
        self.write_journal(pass).await;
        Ok(true)
    }

    async fn receive_and_count(&mut self, worker: usize, pass: &mut Pass) -> Result<(), NodeError> {
        let Some(exchange) = pass.pipeline.workers[worker].exchange else { return Ok(()) };
        let conn = &mut self.session.conns[worker];
        let received = match exchange.purpose {
            Purpose::Touch { .. } => {
                conn.receive_touch().await.map(|(reply, timing)| (Received::Touched(reply), timing))
            }
            _ => conn.receive_scan(None, |_| None).await.map(|(reply, timing)| (Received::Scanned(reply), timing)),
        };
        pass.pipeline.workers[worker].exchange = None;
        match received {
            Ok((received, timing)) => {
                self.count(&exchange, &received, timing, pass);
                Ok(())
            }
            // A refused batch has reclaimed nothing, and the next one will be refused too.
            Err(NodeError::Server { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Handles a batch without an answer: counts what else is under way, then reconnects.
    async fn lost(&mut self, error: NodeError, pass: &mut Pass) -> Result<(), End> {
        if !matches!(error, NodeError::Server { .. }) {
            pass.figures.counters.lost_replies += 1;
        }
        self.drain(pass).await;
        self.recover(error, Some(pass)).await
    }

    /// Counts what is still under way when the pass ends or its connections do, for [`DRAIN_WITHIN`] at most.
    pub(super) async fn drain(&mut self, pass: &mut Pass) {
        let deadline = Instant::now() + DRAIN_WITHIN;
        while let Some(worker) = pass.pipeline.next(&self.session) {
            if !matches!(timeout_at(deadline, self.receive_and_count(worker, pass)).await, Ok(Ok(()))) {
                pass.pipeline.workers[worker].exchange = None;
                self.session.conns[worker].forget();
                pass.figures.counters.lost_replies += 1;
            }
        }
    }

    /// Deletions may be blocked: goes back to where they last worked, and tries again until they do.
    async fn suspect(&mut self, hidden: u64, at: ScanPosition, pass: &mut Pass) -> Result<(), End> {
        // A reply that is still to come must not be taken for that of a batch after the wait.
        if !self.settle(pass).await? {
            return Ok(());
        }
        pass.go_back();
        self.write_journal(pass).await;
        pass.suspicions += 1;
        pass.suspected_at = at;
        if pass.suspicions > SUSPICIONS_BEFORE_HOLD {
            let detail = format!("at least {hidden} expired keys were hidden and not freed by one batch");
            self.begin_hold(Reason::DeletionBlocked, Some(detail)).await;
            self.report(pass).await;
            // Another master of the host may be swept meanwhile; `begin_hold` gives the permit back only the first time.
            self.permit = None;
            // The server may be a replica now. The sampler cannot tell: its connection may lead to another server.
            let info = tokio::select! {
                info = commands::info(self.session.conn()) => info,
                reason = stop_requested(&mut self.control) => return Err(End::Stopped(reason)),
            };
            match info {
                Ok(info) => {
                    if let Err(failure) = may_be_swept(self.job.map.kind(), &info) {
                        return self.demoted(failure, pass).await;
                    }
                }
                Err(error) => return self.recover(error, Some(pass)).await,
            }
        }
        self.wait(BLOCKED_EVERY).await
    }

    /// Begins the pass again, and with it the finished passes of this process: what they swept proves nothing.
    async fn restart(&mut self, why: Restart, pass: &mut Pass) -> Result<(), End> {
        if !self.settle(pass).await? {
            return Ok(());
        }
        match why {
            Restart::Unordered => self.session.ordered = false,
            Restart::NamesNeeded => _ = self.session.names.give_up(),
            Restart::TouchNeeded => {}
        }
        self.session.sweep_again(why.sentence());
        self.begin_again(pass, why.sentence().to_owned()).await;
        Ok(())
    }

    /// The server refuses SCAN without names: from now on names are read, and what was swept without them is swept again.
    async fn read_names(&mut self, pass: &mut Pass, why: String) -> Result<(), End> {
        if !self.session.names.give_up() {
            // Another worker's reply has said so already.
            return Ok(());
        }
        if pass.figures.counters.nameless == 0 {
            self.reporter.warn(format!("{why}: names are read")).await;
            return Ok(());
        }
        if self.settle(pass).await? {
            self.session.sweep_again(&why);
            self.begin_again(pass, why).await;
        }
        Ok(())
    }
}

/// The idle worker that sends next: the one in the lowest segment, or else one that claims a new segment. `None`: no worker is idle,
/// or nothing is left to walk.
fn claim(pass: &mut Pass) -> Option<usize> {
    let segments = &mut pass.segments;
    let idle = |number: &usize| pass.pipeline.workers[*number].exchange.is_none();
    let numbers = (0..pass.pipeline.workers.len()).filter(idle);
    let walking = numbers.clone().filter_map(|number| {
        let at = segments.at(pass.pipeline.workers[number].segment?)?;
        Some((segments.rank(at), number))
    });
    if let Some((_, number)) = walking.min() {
        return Some(number);
    }
    let number = numbers.min()?;
    pass.pipeline.workers[number].segment = Some(segments.claim()?);
    Some(number)
}

/// The next batch of a segment.
fn compose(
    segment: SegmentId,
    from: ScanPosition,
    count: u32,
    counted_by: CountedBy,
    touch: &mut TouchAudit,
    names: &mut KeyNames,
) -> Exchange {
    let (purpose, nameless) = match touch.next_batch() {
        // A batch without names cannot be touched.
        Some(command) => (Purpose::WalkToTouch(command), false),
        None => match names.next_batch() {
            NamesMode::Read => (Purpose::Walk, false),
            NamesMode::Left => (Purpose::Walk, true),
            NamesMode::Audited => (Purpose::WalkToAudit, true),
        },
    };
    Exchange { purpose, request: Request { from, count, nameless, counted_by }, segment }
}

/// Expired keys that SCAN had left and a touch has reclaimed. The smaller of two counts: a key may be gone because a client has deleted
/// it since the SCAN, and a long touch does not run back to back, so DBSIZE may hold changes by other clients.
fn left_expired(purpose: Purpose, reply: &TouchReply) -> u64 {
    let no_key = if matches!(purpose, Purpose::Touch { command: "TTL", .. }) { -2 } else { 0 };
    let gone = reply.answers.iter().filter(|answer| **answer == Some(no_key)).count() as u64;
    reply.reclaimed().min(gone)
}
