//! Whether SCAN sends the names of the keys back. The sweep needs none of them, and they are nearly all that it reads.
//!
//! Redis 8.2 checks each key's TTL before its type: SCAN with a TYPE that no key has frees the expired keys that it meets and returns
//! nothing, at one and a half times as many keys a second. Redis 6.2 to 7.4 frees them too, but gains nothing and counts a keyspace
//! miss for each. Valkey 8 frees nothing and refuses a type that it does not know.
//!
//! An audit checks this: now and then a range is scanned again with names. Expired keys that the second SCAN reclaims were left by the
//! first. Only a batch with names shows that deletions are not blocked (see [`super::hidden_keys`]), and nothing proves what happens
//! between two audits. So names are the default.

use std::time::Duration;

use tokio::time::Instant;

use crate::settings::Payload;

/// One batch in this many is scanned again with names, and at least one in [`AUDIT_AFTER`]. This costs less than a thirtieth of the
/// bytes.
const AUDIT_EVERY: u64 = 64;
/// If deletions are blocked for longer than this, an audit notices, and the sweep goes back to where a deletion was last seen.
const AUDIT_AFTER: Duration = Duration::from_millis(5);
/// Fewer expired keys than this prove nothing: keys expire between two SCANs.
const PROOF: u64 = 3;

/// Whether the batches of one server process come with names.
#[derive(Debug, Clone)]
pub(crate) struct KeyNames {
    nameless: bool,
    since_audit: u64,
    audited: Option<Instant>,
    freed: u64,
    left_expired: u64,
}

/// How a batch is scanned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NamesMode {
    /// SCAN is sent without TYPE and returns the names.
    Read,
    /// SCAN has a TYPE that no key has and returns no names.
    Left,
    /// Without names, and then again with them.
    Audited,
}

impl KeyNames {
    /// Chooses by the settings. `type_frees_all`: on this server SCAN with a TYPE frees every expired key that it meets.
    pub(crate) fn new(asked: Payload, type_frees_all: bool) -> Self {
        let nameless = match asked {
            Payload::Auto => type_frees_all,
            Payload::Names => false,
            Payload::None => true,
        };
        Self { nameless, since_audit: 0, audited: None, freed: 0, left_expired: 0 }
    }

    /// How the next batch is scanned. The first one without names is audited.
    pub(crate) fn next_batch(&mut self) -> NamesMode {
        if !self.nameless {
            return NamesMode::Read;
        }
        self.since_audit += 1;
        if self.since_audit < AUDIT_EVERY && self.audited.is_some_and(|at| at.elapsed() < AUDIT_AFTER) {
            return NamesMode::Left;
        }
        (self.since_audit, self.audited) = (0, Some(Instant::now()));
        NamesMode::Audited
    }

    /// COUNT of the second SCAN of a range. It has to stay within the keys that the first one visited: those that were not reclaimed are
    /// left. Half of them is well inside.
    pub(crate) fn audit_count(count: u32, freed: u64) -> u32 {
        let left = u64::from(count).saturating_sub(freed);
        u32::try_from(left / 2).unwrap_or(u32::MAX).max(1)
    }

    /// A batch without names is done: `freed` keys were reclaimed by it, and `audit` by the second SCAN, if there was one. Returns
    /// whether it is proven now that SCAN without names leaves expired keys.
    pub(crate) fn learn(&mut self, freed: u64, audit: Option<u64>) -> bool {
        self.freed += freed;
        self.left_expired += audit.unwrap_or(0);
        // The second SCAN covers half of one batch in `AUDIT_EVERY`.
        self.left_expired >= PROOF && self.left_expired * AUDIT_EVERY > self.freed
    }

    /// Reads names from now on. Returns whether that is a change.
    pub(crate) fn give_up(&mut self) -> bool {
        std::mem::take(&mut self.nameless)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_left_out_if_the_server_frees_keys_without_them_or_if_the_settings_say_so() {
        for (asked, frees_all, left) in [
            (Payload::Auto, true, true),
            (Payload::Auto, false, false),
            (Payload::Names, true, false),
            (Payload::None, false, true),
        ] {
            assert_eq!(KeyNames::new(asked, frees_all).nameless, left, "{asked} {frees_all}");
        }
        assert_eq!(KeyNames::new(Payload::Names, true).next_batch(), NamesMode::Read);
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_batch_and_then_one_in_64_or_in_5_ms_is_audited() {
        let mut names = KeyNames::new(Payload::Auto, true);
        let mut audits = async |batches: u32, pause: Duration| {
            let mut audits = 0;
            for _ in 0..batches {
                audits += u32::from(names.next_batch() == NamesMode::Audited);
                tokio::time::advance(pause).await;
            }
            audits
        };
        assert_eq!(audits(641, Duration::ZERO).await, 11);
        assert_eq!(audits(100, Duration::from_millis(5)).await, 99, "all but the one that came at once");
    }

    #[test]
    fn expired_keys_that_the_second_scan_reclaims_bring_the_names_back() {
        let mut left = KeyNames::new(Payload::None, false);
        assert!(!left.learn(0, Some(2)), "two may have expired in between");
        assert!(left.learn(0, Some(2)) && left.give_up() && left.next_batch() == NamesMode::Read);
        assert!(!left.give_up(), "no change");
        let mut fine = KeyNames::new(Payload::Auto, true);
        assert!((0..10_000).all(|n| !fine.learn(5, (n % 64 == 0).then_some(1))), "keys that expired in between");
    }

    #[test]
    fn the_second_scan_stays_within_the_keys_of_the_first() {
        assert_eq!([0, 50, 100, 500].map(|freed| KeyNames::audit_count(100, freed)), [50, 25, 1, 1]);
    }
}
