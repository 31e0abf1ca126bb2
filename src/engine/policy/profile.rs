//! How a server behaves, by its product and version: the one table of differences.

use crate::engine::policy::throttle;
use crate::model::failure::{Failure, FailureKind};
use crate::node::info::{Info, OLDEST};
use crate::node::topology::InstanceKind;

/// The version of Redis, or of the Redis that a Valkey is compatible with, as (major, minor).
type Version = Option<(u32, u32)>;

/// From this version of Redis on, SCAN with a TYPE frees every expired key that it meets and counts no misses.
const TYPE_FREES_ALL: (u32, u32) = (8, 2);
/// From this version on, EXISTS leaves a key's LRU clock alone.
const EXISTS_IS_QUIET: (u32, u32) = (6, 2);
/// From this version on, active expiry walks the table in the same order as SCAN.
const SAME_ORDER: (u32, u32) = (7, 2);
/// From these versions of Redis and Valkey on, a cluster node has a hash table for each slot, and its cursors hold the slot.
const SLOT_TABLES: ((u32, u32), (u32, u32)) = ((7, 4), (8, 0));

/// Whether a slow SCAN can stop active expiry on this version: see [`super::expiry_guard`].
pub(crate) fn slow_scan_starves_expiry(redis_version: Version) -> bool {
    redis_version >= Some(SAME_ORDER)
}

/// How one server process behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ServerProfile {
    /// A DB has a hash table for each slot.
    pub slot_tables: bool,
    /// Cursors have the order that [`CursorSpace`](crate::model::slots::CursorSpace) describes. Those of a proxy may not.
    pub ordered_cursors: bool,
    /// SCAN with a TYPE that no key has frees every expired key that it meets.
    pub type_frees_all: bool,
    /// EXISTS counts as a use of the key.
    pub exists_moves_lru: bool,
    /// A slow SCAN can stop active expiry.
    pub slow_scan_starves_expiry: bool,
}

impl ServerProfile {
    /// The profile of a server, by its INFO.
    pub(crate) fn of(info: &Info) -> Self {
        let (redis, valkey) = (info.redis_version(), info.valkey_version());
        let slot_tables = match valkey {
            Some(version) => version >= SLOT_TABLES.1,
            None => redis >= Some(SLOT_TABLES.0),
        };
        Self {
            slot_tables: slot_tables && info.mode() == Some("cluster"),
            ordered_cursors: matches!(info.mode(), Some("standalone" | "cluster")),
            type_frees_all: valkey.is_none() && redis >= Some(TYPE_FREES_ALL),
            exists_moves_lru: redis.is_some_and(|version| version < EXISTS_IS_QUIET),
            slow_scan_starves_expiry: slow_scan_starves_expiry(redis),
        }
    }
}

/// Checks that a server, by its INFO, can be swept.
///
/// # Errors
/// Why it cannot.
pub fn may_be_swept(kind: InstanceKind, info: &Info) -> Result<(), Failure> {
    match info.redis_version() {
        None => {
            let failure =
                Failure::new(FailureKind::Unsupported, "INFO names no redis_version: this is no Redis or Valkey");
            return Err(failure.hint("check the port"));
        }
        Some(version) if version < OLDEST => {
            let (major, minor) = version;
            let message =
                format!("Redis {major}.{minor} cannot be swept; {}.{} is the oldest (DCS.4818)", OLDEST.0, OLDEST.1);
            return Err(Failure::new(FailureKind::Unsupported, message).hint("upgrade the server"));
        }
        Some(_) => {}
    }
    match info.mode() {
        Some("sentinel") => {
            let failure = Failure::new(FailureKind::Unsupported, "this is a sentinel; it holds no keys");
            return Err(failure.hint("give the master that it watches: redis+sentinel://HOST:26379/MASTER"));
        }
        // The server was busy or loading when the topology was read.
        Some("cluster") if kind == InstanceKind::Standalone => {
            let message =
                "this is a node of a cluster, which was unknown when the sweep began, since the server did not answer";
            return Err(Failure::new(FailureKind::Unsupported, message).hint("start again: the whole cluster is swept"));
        }
        _ => {}
    }
    match info.is_master() {
        Some(false) => Err(throttle::not_a_master(info.master_addr().as_deref())),
        Some(true) | None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_and_versions_behave_as_measured() {
        let table = [
            ("redis_version:5.0.14", "standalone"),
            ("redis_version:6.2.14", "standalone"),
            ("redis_version:7.2.6", "cluster"),
            ("redis_version:7.4.1", "cluster"),
            ("redis_version:8.2.3", "standalone"),
            ("redis_version:7.2.4\r\nvalkey_version:7.2.5", "cluster"),
            ("redis_version:7.2.4\r\nvalkey_version:8.0.1", "cluster"),
            ("redis_version:7.2.4\r\nvalkey_version:9.1.2", "standalone"),
            ("redis_version:7.0.15", "proxy"),
        ];
        let rows = table.map(|(version, mode)| {
            let profile = ServerProfile::of(&Info::parse(format!("{version}\r\nredis_mode:{mode}\r\n")));
            format!("{} {mode}: {profile:?}", version.replace("\r\n", " "))
        });
        insta::assert_snapshot!(rows.join("\n"));
    }

    #[test]
    fn what_may_not_be_swept_is_refused_with_the_reason() {
        let refused = |text: &str| {
            let failure = may_be_swept(InstanceKind::Standalone, &Info::parse(text)).unwrap_err();
            format!("[{}] {}\n  hint: {}", failure.kind, failure.message, failure.hint.unwrap_or("-".into()))
        };
        let cases = [
            "redis_version:3.2.12\r\nrole:master\r\n",
            "some_other_engine:1\r\n",
            "redis_version:7.0.15\r\nredis_mode:sentinel\r\n",
            "redis_version:7.0.15\r\nredis_mode:cluster\r\nrole:master\r\n",
            "redis_version:7.0.15\r\nrole:slave\r\nmaster_host:10.0.0.1\r\nmaster_port:6379\r\n",
        ];
        insta::assert_snapshot!(cases.map(refused).join("\n"));
        assert_eq!(
            may_be_swept(InstanceKind::Standalone, &Info::parse("redis_version:4.0.0\r\nrole:master\r\n")),
            Ok(())
        );
    }
}
