//! Whether keys that SCAN returned must be touched one by one.
//!
//! Every known Redis and Valkey frees an expired key when SCAN meets it. Touching the keys as well would cost time and find only those
//! that expired in the milliseconds between. But a proxy or another engine may answer SCAN from an index of its own. The audit finds
//! out: it touches keys of a few batches with EXISTS. If more of them have expired than SCAN reclaimed, SCAN does not reclaim, and from
//! then on every batch is touched. Once SCAN has reclaimed a key, the audit is only a spot check.

use crate::model::progress::TouchOutcome;
use crate::settings::Touch;

/// This many of the first batches of a shard are audited, all of them.
const AUDIT_FIRST: u64 = 4;
/// While neither SCAN nor the audit has met an expired key, one batch in this many is audited: before [`AUDIT_CLOSELY`] batches, since
/// a small DB has no more; and after them, when audits are rarer since each costs a round trip in which no batch is under way.
const AUDIT_UNPROVEN: (u64, u64) = (8, 64);
/// The number of batches after which [`AUDIT_UNPROVEN`] audits less often.
const AUDIT_CLOSELY: u64 = 512;
/// Once SCAN has reclaimed a key, one batch in this many is audited.
const AUDIT_PROVEN: u64 = 256;
/// How many keys of an audited batch are touched: enough to meet expired keys if there are any, at 1 per cent of the time.
const AUDIT_KEYS: usize = 16;
/// Fewer expired keys than this prove nothing: keys expire between the SCAN and the EXISTS.
const PROOF: u64 = 3;

/// The audit of one server process.
#[derive(Debug, Clone)]
pub(crate) struct TouchAudit {
    mode: Touch,
    /// The command that audits: EXISTS, or TTL where EXISTS counts as a use of the key.
    audit: &'static str,
    outcome: TouchOutcome,
    /// Whether the server has answered such a command.
    may_ask: bool,
    sent: u64,
    freed_by_scan: u64,
    left_expired: u64,
}

impl TouchAudit {
    /// `exists_moves_lru`: on this server EXISTS counts as a use of the key, so the audit uses TTL.
    pub(crate) fn new(mode: Touch, exists_moves_lru: bool) -> Self {
        let audit = if exists_moves_lru { "TTL" } else { "EXISTS" };
        let outcome = match mode {
            Touch::Auto => TouchOutcome::NotNeededYet,
            Touch::None => TouchOutcome::Off,
            Touch::Exists | Touch::Ttl => TouchOutcome::Asked,
        };
        Self { mode, audit, outcome, may_ask: false, sent: 0, freed_by_scan: 0, left_expired: 0 }
    }

    /// What is known so far.
    pub(crate) fn outcome(&self) -> TouchOutcome {
        self.outcome
    }

    /// A batch is about to be sent. Returns the command to touch its keys with, if they are to be touched.
    pub(crate) fn next_batch(&mut self) -> Option<&'static str> {
        let command = self.command_of(self.sent);
        self.sent += 1;
        command
    }

    /// Whether the keys of every batch are to be touched.
    pub(crate) fn touches_all(&self) -> bool {
        matches!(self.mode, Touch::Exists | Touch::Ttl) || self.outcome == TouchOutcome::ScanLeavesExpired
    }

    fn command_of(&self, batch: u64) -> Option<&'static str> {
        match (self.mode, self.outcome) {
            (Touch::Exists, _) => Some("EXISTS"),
            (Touch::Ttl, _) => Some("TTL"),
            (Touch::None, _) | (_, TouchOutcome::NoRight) => None,
            (Touch::Auto, TouchOutcome::ScanLeavesExpired) => Some(self.audit),
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

    /// How many keys of a batch are touched at most: only one until the server has answered, since a server writes each refusal into
    /// its ACL LOG.
    pub(crate) fn keys(&self) -> usize {
        match () {
            () if !self.may_ask => 1,
            () if self.touches_all() => usize::MAX,
            () => AUDIT_KEYS,
        }
    }

    /// Whether the server has answered such a command, so that the user may run it.
    pub(crate) fn may_ask(&self) -> bool {
        self.may_ask
    }

    /// The server has answered the command for a key.
    pub(crate) fn was_answered(&mut self) {
        self.may_ask = true;
    }

    /// A batch is done, with a touch or without. Returns the outcome if it has changed.
    pub(crate) fn learn(&mut self, freed_by_scan: u64, left_expired: u64) -> Option<TouchOutcome> {
        self.freed_by_scan += freed_by_scan;
        self.left_expired += left_expired;
        let found = if self.left_expired >= PROOF && self.left_expired > self.freed_by_scan {
            TouchOutcome::ScanLeavesExpired
        } else if self.freed_by_scan > 0 {
            TouchOutcome::ScanReclaims
        } else {
            TouchOutcome::NothingExpired
        };
        // Without the right there is no audit, and a proof that SCAN does not reclaim stands.
        let open = !matches!(self.outcome, TouchOutcome::ScanLeavesExpired | TouchOutcome::NoRight);
        if self.mode == Touch::Auto && open { self.change(found) } else { None }
    }

    /// The user may not run the command. Returns the outcome if the sweep can do without; `None`: the settings ask for the touch.
    pub(crate) fn refused(&mut self) -> Option<TouchOutcome> {
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

    /// Passes batches in each of which SCAN reclaimed `freed` keys, and counts the audits.
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
    fn until_an_expired_key_is_met_the_audit_goes_on() {
        let mut touch = auto();
        assert_eq!(audits(&mut touch, 6400, 0), 4 + 63 + 92);
        assert_eq!(touch.outcome(), TouchOutcome::NothingExpired);
        for _ in 0..64 {
            let left_expired = u64::from(touch.next_batch().is_some()) * 3;
            touch.learn(0, left_expired);
        }
        assert_eq!(touch.outcome(), TouchOutcome::ScanLeavesExpired);
    }

    #[test]
    fn expired_keys_that_scan_left_make_every_batch_a_touch() {
        let mut touch = auto();
        assert_eq!(touch.learn(0, 2), Some(TouchOutcome::NothingExpired), "two may have expired in between");
        assert_eq!(touch.learn(0, 2), Some(TouchOutcome::ScanLeavesExpired));
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
