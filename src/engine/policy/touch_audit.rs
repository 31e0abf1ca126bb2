//! Whether keys that SCAN returned must be asked for one by one.
//!
//! Every Redis and Valkey that we know frees an expired key when SCAN meets it, so asking again costs time and finds
//! only what expired in the milliseconds between. A proxy or another engine may answer SCAN from an index of its own.
//! The audit tells: it asks with EXISTS for the keys of a few batches. Where more of them are dead than SCAN freed, SCAN
//! does not reclaim, and from then on every batch is touched. A SCAN that freed keys has proven that it does, so then
//! the audit is only a spot check.

use crate::model::progress::TouchOutcome;
use crate::settings::Touch;

/// The first batches of a shard are audited, this many.
const AUDIT_FIRST: u64 = 4;
/// While neither SCAN nor the audit has met a dead key, every so many batches: among the first ones closely, since a small
/// DB has no more, and then seldom, since an audit costs a round trip in which no batch is under way.
const AUDIT_UNPROVEN: (u64, u64) = (8, 64);
/// So many batches are the first ones.
const AUDIT_CLOSELY: u64 = 512;
/// Once SCAN has freed a key, every so many batches.
const AUDIT_PROVEN: u64 = 256;
/// Of an audited batch this many keys are asked: enough to meet dead keys where there are any, and 1 per cent of the time.
const AUDIT_KEYS: usize = 16;
/// Fewer dead keys than this prove nothing: keys expire between the SCAN and the EXISTS.
const PROOF: u64 = 3;

/// The touch of one server process.
#[derive(Debug, Clone)]
pub struct TouchAudit {
    mode: Touch,
    /// The command that audits.
    audit: &'static str,
    outcome: TouchOutcome,
    /// Whether the server has answered one of these commands.
    may_ask: bool,
    sent: u64,
    freed_by_scan: u64,
    left_expired: u64,
}

impl TouchAudit {
    /// `exists_moves_lru`: EXISTS is no command to look with on this server, and TTL is.
    pub fn new(mode: Touch, exists_moves_lru: bool) -> Self {
        let audit = if exists_moves_lru { "TTL" } else { "EXISTS" };
        let outcome = match mode {
            Touch::Auto => TouchOutcome::NotNeededYet,
            Touch::None => TouchOutcome::Off,
            Touch::Exists | Touch::Ttl => TouchOutcome::Asked,
        };
        Self { mode, audit, outcome, may_ask: false, sent: 0, freed_by_scan: 0, left_expired: 0 }
    }

    /// What is known so far.
    pub fn outcome(&self) -> TouchOutcome {
        self.outcome
    }

    /// A batch is sent. Returns the command to ask with for its keys, if they are to be asked for.
    pub fn next_batch(&mut self) -> Option<&'static str> {
        let command = self.command_of(self.sent);
        self.sent += 1;
        command
    }

    /// Whether the keys of every batch are to be asked for.
    pub fn touches_all(&self) -> bool {
        matches!(self.mode, Touch::Exists | Touch::Ttl) || self.outcome == TouchOutcome::ScanLeavesDead
    }

    fn command_of(&self, batch: u64) -> Option<&'static str> {
        match (self.mode, self.outcome) {
            (Touch::Exists, _) => Some("EXISTS"),
            (Touch::Ttl, _) => Some("TTL"),
            (Touch::None, _) | (_, TouchOutcome::NoRight) => None,
            (Touch::Auto, TouchOutcome::ScanLeavesDead) => Some(self.audit),
            (Touch::Auto, _) => {
                let every = match () {
                    () if self.freed_by_scan > 0 => AUDIT_PROVEN,
                    () if batch < AUDIT_CLOSELY => AUDIT_UNPROVEN.0,
                    () => AUDIT_UNPROVEN.1,
                };
                let due = batch < AUDIT_FIRST || batch.is_multiple_of(every);
                due.then_some(self.audit)
            }
        }
    }

    /// Of the keys of a batch that is touched, how many are asked: only one until the server has answered, since a server
    /// notes each refusal in its ACL LOG.
    pub fn keys(&self) -> usize {
        match () {
            () if !self.may_ask => 1,
            () if self.touches_all() => usize::MAX,
            () => AUDIT_KEYS,
        }
    }

    /// Whether the server has answered such a question.
    pub fn may_ask(&self) -> bool {
        self.may_ask
    }

    /// The server has answered the command for a key.
    pub fn was_answered(&mut self) {
        self.may_ask = true;
    }

    /// A batch went by, with a touch or without. Returns the outcome where it changed.
    pub fn learn(&mut self, freed_by_scan: u64, left_expired: u64) -> Option<TouchOutcome> {
        self.freed_by_scan += freed_by_scan;
        self.left_expired += left_expired;
        let found = if self.left_expired >= PROOF && self.left_expired > self.freed_by_scan {
            TouchOutcome::ScanLeavesDead
        } else if self.freed_by_scan > 0 {
            TouchOutcome::ScanReclaims
        } else {
            TouchOutcome::NothingDead
        };
        // A user without the right is not audited, and a finding against SCAN stands.
        let open = !matches!(self.outcome, TouchOutcome::ScanLeavesDead | TouchOutcome::NoRight);
        if self.mode == Touch::Auto && open { self.change(found) } else { None }
    }

    /// The user may not ask. Returns the outcome where the sweep can do without, `None` where the touch was asked for.
    pub fn refused(&mut self) -> Option<TouchOutcome> {
        if self.mode == Touch::Auto { self.change(TouchOutcome::NoRight) } else { None }
    }

    fn change(&mut self, outcome: TouchOutcome) -> Option<TouchOutcome> {
        let changed = self.outcome != outcome;
        self.outcome = outcome;
        changed.then_some(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auto() -> TouchAudit {
        TouchAudit::new(Touch::Auto, false)
    }

    /// Lets batches go by, each with what SCAN freed in it, and counts the audits.
    fn audits(touch: &mut TouchAudit, batches: u64, freed: u64) -> u64 {
        let mut audits = 0;
        for _ in 0..batches {
            audits += u64::from(touch.next_batch() == Some("EXISTS"));
            touch.learn(freed, 0);
        }
        audits
    }

    #[test]
    fn a_server_whose_scan_reclaims_is_audited_now_and_then() {
        let mut touch = auto();
        assert_eq!(audits(&mut touch, 2560, 8), 4 + 9);
        assert_eq!(touch.outcome(), TouchOutcome::ScanReclaims);
    }

    #[test]
    fn while_no_dead_key_was_met_the_audit_stays_awake() {
        let mut touch = auto();
        assert_eq!(audits(&mut touch, 6400, 0), 4 + 63 + 92);
        assert_eq!(touch.outcome(), TouchOutcome::NothingDead);
        for _ in 0..64 {
            let left_expired = u64::from(touch.next_batch().is_some()) * 3;
            touch.learn(0, left_expired);
        }
        assert_eq!(touch.outcome(), TouchOutcome::ScanLeavesDead);
    }

    #[test]
    fn dead_keys_that_scan_left_make_every_batch_a_touch() {
        let mut touch = auto();
        assert_eq!(touch.learn(0, 2), Some(TouchOutcome::NothingDead), "two may have expired in between");
        assert_eq!(touch.learn(0, 2), Some(TouchOutcome::ScanLeavesDead));
        for _ in 0..1000 {
            assert!(touch.next_batch().is_some());
            assert_eq!(touch.learn(0, 0), None);
        }
    }

    #[test]
    fn keys_that_expire_between_scan_and_audit_do_not_accuse_scan() {
        let mut touch = auto();
        for _ in 0..100 {
            touch.learn(10, 1);
        }
        assert_eq!(touch.outcome(), TouchOutcome::ScanReclaims);
    }

    #[test]
    fn without_the_right_there_is_no_audit_and_a_touch_that_was_asked_for_fails() {
        let mut touch = auto();
        assert_eq!(touch.refused(), Some(TouchOutcome::NoRight));
        assert_eq!(touch.next_batch(), None);
        assert_eq!(TouchAudit::new(Touch::Ttl, false).refused(), None);
    }

    #[test]
    fn the_right_is_asked_for_with_one_key() {
        for (mode, keys) in [(Touch::Auto, AUDIT_KEYS), (Touch::Exists, usize::MAX)] {
            let mut touch = TouchAudit::new(mode, false);
            assert_eq!(touch.keys(), 1);
            touch.was_answered();
            assert_eq!(touch.keys(), keys);
        }
    }

    #[test]
    fn old_servers_are_audited_without_moving_the_lru_clock() {
        assert_eq!(TouchAudit::new(Touch::Auto, true).next_batch(), Some("TTL"));
    }
}
