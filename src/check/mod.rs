//! `ttlsweep check`: what a sweep would meet, found out without touching a key.
//!
//! [`inspect`] reads facts, [`assessment::assess`] says what they mean for a sweep, [`estimate`] says how long one would take, and
//! [`backlog::count`] counts the backlog exactly, on a replica. [`instance::inspect`] does this for all masters of an instance, and
//! [`report`] is what people read. Called by `cli::check`, by the API and by `tasks`.
//!
//! Nothing here frees a key, changes when a key was last used, or writes: the commands are INFO, PING, DBSIZE, SELECT, CONFIG GET,
//! COMMAND INFO, ACL WHOAMI, ACL DRYRUN and ACL GETUSER. If the server cannot be asked about a right, SCAN is sent with a cursor that
//! is no number: the server refuses it after its check of rights and before it visits a key. What a missing right or an old version
//! hides is unknown, never an error.

pub(crate) mod assessment;
pub(crate) mod backlog;
pub(crate) mod estimate;
pub(crate) mod facts;
pub(crate) mod findings;
pub(crate) mod instance;
pub(crate) mod report;

use std::time::{Duration, Instant};

use crate::check::facts::{Expiry, Facts, Right, Rights};
use crate::engine::policy::expiry_guard;
use crate::model::failure::FailureKind;
use crate::model::shard::NodeAddr;
use crate::node::commands::{self, Access};
use crate::node::conn::{Conn, ConnOptions};
use crate::node::error::{Class, NodeError};
use crate::node::info::Info;
use crate::settings::ScanSettings;

/// The smallest round trip is that of this many PINGs.
const PINGS: u32 = 10;

/// Reads the facts of a server. If a sweep with these settings would be slow, this takes [`expiry_guard::WATCH_FOR`], to watch how
/// many keys expire.
///
/// # Errors
/// [`NodeError`]: the server is unreachable, refuses the login, does not speak RESP, or has no DB that the settings name.
pub(crate) async fn inspect(
    addr: &NodeAddr,
    options: &ConnOptions,
    settings: Option<&ScanSettings>,
) -> Result<Facts, NodeError> {
    let mut conn = Conn::open(addr, options).await?;
    let (info, may_info) = match commands::info(&mut conn).await {
        Ok(info) => (info, Access::Allowed),
        Err(error) if error.is_no_permission() => (Info::default(), Access::Denied),
        Err(error) => return Err(error),
    };
    for db in settings.map_or(&[][..], |settings| &settings.dbs) {
        match conn.select(*db).await {
            Err(error) if matches!(error.class(), Class::Fatal(FailureKind::NoSuchDb)) => return Err(error),
            // `rights` finds out whether SELECT may be run at all.
            Ok(()) | Err(NodeError::Server { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let user = commands::whoami(&mut conn).await?;
    let mut rights = rights(&mut conn, user.as_deref()).await?;
    rights.set(Right::Info, may_info);
    let expiry = Expiry {
        lazyfree: commands::config(&mut conn, "lazyfree-lazy-expire").await?.map(|value| value == "yes"),
        effort: commands::config(&mut conn, "active-expire-effort").await?.and_then(|value| value.parse().ok()),
        hz: match info.parsed("hz") {
            Some(hz) => Some(hz),
            None => commands::config(&mut conn, "hz").await?.and_then(|value| value.parse().ok()),
        },
    };
    let round_trip = smallest_ping(&mut conn).await?;
    let mut facts = Facts { user, ..Facts::new(addr, info, expiry, rights, round_trip) };
    if settings.is_some_and(|settings| facts.has_to_know_the_flow(settings)) {
        let before = commands::info(&mut conn).await?.parsed::<u64>("expired_keys");
        tokio::time::sleep(expiry_guard::WATCH_FOR).await;
        let after = commands::info(&mut conn).await?.parsed::<u64>("expired_keys");
        facts.expire_per_sec = expiry_guard::flow(before, after);
    }
    Ok(facts)
}

/// What this connection's user may run: by ACL DRYRUN (Redis 7.0), by the user's flags (Redis 6), or else by running the commands
/// that are harmless. EXISTS and TTL are not: they free an expired key.
async fn rights(conn: &mut Conn, user: Option<&str>) -> Result<Rights, NodeError> {
    let mut rights = Rights::default();
    if let Some(user) = user {
        let mut told = false;
        for &right in Right::ALL {
            let allowed = commands::dry_run(conn, user, right.example()).await?;
            rights.set(right, allowed);
            told |= allowed != Access::Unknown;
        }
        if told {
            return Ok(rights);
        }
        if commands::may_do_everything(conn, user).await? == Some(true) {
            for &right in Right::ALL {
                // A user who may run everything still cannot run a command that is not there.
                let there = commands::has_command(conn, right.example()[0]).await? != Some(false);
                rights.set(right, if there { Access::Allowed } else { Access::NoSuchCommand });
            }
            return Ok(rights);
        }
    }
    for (right, cmd) in [
        (Right::Ping, redis::cmd("PING")),
        (Right::Dbsize, redis::cmd("DBSIZE")),
        (Right::Select, redis::cmd("SELECT").arg(0).to_owned()),
        (Right::ClientSetname, redis::cmd("CLIENT").arg("SETNAME").arg("ttlsweep").to_owned()),
        (Right::Scan, commands::scan_that_does_nothing()),
    ] {
        let accepted = commands::is_accepted(conn, right.as_str(), &cmd).await?;
        rights.set(right, accepted);
    }
    Ok(rights)
}

async fn smallest_ping(conn: &mut Conn) -> Result<Option<Duration>, NodeError> {
    let mut smallest = None;
    for _ in 0..PINGS {
        let begun = Instant::now();
        match commands::ping(conn).await {
            Ok(()) => {
                let took = begun.elapsed();
                smallest = Some(smallest.map_or(took, |least: Duration| least.min(took)));
            }
            Err(NodeError::Server { .. }) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    Ok(smallest)
}
