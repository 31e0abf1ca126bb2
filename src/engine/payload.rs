//! Whether SCAN sends the names of the keys back. The sweep needs none of them, and they are nearly all that it reads.
//!
//! Redis 8.2 looks at each key's TTL before it looks at its type: SCAN with a TYPE that nobody uses frees what it meets and
//! returns nothing, one and a half times as many keys a second. From 6.2 to 7.4 it frees them too, but costs what it saves and
//! counts a keyspace miss for each; on Valkey 8 it frees nothing and refuses a type that it does not know.
//!
//! Nobody has to believe that. Every so often a batch is asked again with its names. Keys that the second SCAN frees were left
//! dead by the first; and only a batch with names shows that deletions are not blocked (see [`crate::engine::batch`]). What is
//! between two audits is proven by nothing else, so names are the default.

use std::time::Duration;

use tokio::time::Instant;

use crate::model::progress::ServerFacts;
use crate::settings;

/// From this version of Redis on, SCAN with a TYPE frees whatever it meets and counts no misses.
const FREES_ALL: (u32, u32) = (8, 2);
/// A batch is asked again with names every so many batches, and at least this often: a pause of deletions that is longer is met
/// by an audit, and the sweep goes back to where a deletion was last seen. Less than a thirtieth of the bytes.
const AUDIT_EVERY: u64 = 64;
/// See [`AUDIT_EVERY`].
const AUDIT_AFTER: Duration = Duration::from_millis(5);
/// Fewer dead keys than this prove nothing: keys expire between two SCANs.
const PROOF: u64 = 3;

/// The payload of one shard.
#[derive(Debug)]
pub struct Payload {
    nameless: bool,
    since_audit: u64,
    audited: Option<Instant>,
    freed: u64,
    left_dead: u64,
}

impl Payload {
    /// Chooses by what was asked for and by what the server is.
    pub fn new(asked: settings::Payload, server: Option<&ServerFacts>, redis_version: Option<(u32, u32)>) -> Self {
        let known = server.is_some_and(|server| server.product == "Redis") && redis_version >= Some(FREES_ALL);
        let nameless = match asked {
            settings::Payload::Auto => known,
            settings::Payload::Names => false,
            settings::Payload::None => true,
        };
        Self { nameless, since_audit: 0, audited: None, freed: 0, left_dead: 0 }
    }

    /// Whether the next batch is to come without names.
    pub fn is_nameless(&self) -> bool {
        self.nameless
    }

    /// Whether the batch under way, which came without names, is to be asked again with them. The first is.
    pub fn audit_is_due(&self) -> bool {
        let due = self.since_audit + 1 >= AUDIT_EVERY || self.audited.is_none_or(|at| at.elapsed() >= AUDIT_AFTER);
        self.nameless && due
    }

    /// COUNT of the second SCAN of a batch. It has to stay within the keys that the first one looked at: of those, so many are
    /// left as were not freed. Half of them is well inside.
    pub fn audit_count(count: u32, freed: u64) -> u32 {
        let left = u64::from(count).saturating_sub(freed);
        u32::try_from(left / 2).unwrap_or(u32::MAX).max(1)
    }

    /// A batch without names went by: what it freed, and what the second SCAN freed where there was one. Returns whether it was
    /// the proof that SCAN without names leaves dead keys.
    pub fn learn(&mut self, freed: u64, audit: Option<u64>) -> bool {
        self.since_audit += 1;
        if audit.is_some() {
            (self.since_audit, self.audited) = (0, Some(Instant::now()));
        }
        self.freed += freed;
        self.left_dead += audit.unwrap_or(0);
        // The second SCAN saw one batch in so many, and half of it.
        self.left_dead >= PROOF && self.left_dead * AUDIT_EVERY > self.freed
    }

    /// It does not do here. Returns whether that is news.
    pub fn give_up(&mut self) -> bool {
        std::mem::take(&mut self.nameless)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::shard::{NodeAddr, RunId};

    fn payload(asked: settings::Payload, product: &str, version: (u32, u32)) -> Payload {
        let server = ServerFacts {
            product: product.to_owned(),
            version: String::new(),
            run_id: RunId(String::new()),
            addr: NodeAddr::Unix("/s".into()),
        };
        Payload::new(asked, Some(&server), Some(version))
    }

    #[test]
    fn names_are_left_out_where_the_server_is_known_to_free_all_the_same_or_where_that_is_asked_for() {
        use settings::Payload::{Auto, Names, None};
        let cases = [
            (Auto, "Redis", (8, 2), true),
            (Auto, "Redis", (9, 0), true),
            (Auto, "Redis", (7, 4), false),
            (Auto, "Valkey", (8, 2), false),
            (Names, "Redis", (8, 2), false),
            (None, "Redis", (7, 0), true),
        ];
        for (asked, product, version, nameless) in cases {
            assert_eq!(payload(asked, product, version).is_nameless(), nameless, "{asked} {product} {version:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_batch_and_then_one_in_64_or_in_5_ms_is_asked_again() {
        let mut payload = payload(settings::Payload::Auto, "Redis", (8, 2));
        let mut audits = async |batches: u32, pause: Duration| {
            let mut audits = 0;
            for _ in 0..batches {
                let due = payload.audit_is_due();
                audits += u32::from(due);
                payload.learn(5, due.then_some(0));
                tokio::time::advance(pause).await;
            }
            audits
        };
        assert_eq!(audits(641, Duration::ZERO).await, 11);
        assert_eq!(audits(100, Duration::from_millis(5)).await, 99, "all but one that came at once");
    }

    #[test]
    fn dead_keys_that_the_second_scan_frees_bring_the_names_back() {
        let mut left = payload(settings::Payload::None, "Valkey", (7, 2));
        assert!(!left.learn(0, Some(2)), "two may have expired in between");
        assert!(left.learn(0, Some(2)) && left.give_up() && !left.audit_is_due());
        assert!(!left.give_up(), "that is known");
        let mut fine = payload(settings::Payload::Auto, "Redis", (8, 2));
        assert!((0..10_000).all(|n| !fine.learn(5, (n % 64 == 0).then_some(1))), "keys that expired in between");
    }

    #[test]
    fn the_second_scan_stays_within_the_keys_of_the_first() {
        assert_eq!([0, 50, 100, 500].map(|freed| Payload::audit_count(100, freed)), [50, 25, 1, 1]);
    }
}
