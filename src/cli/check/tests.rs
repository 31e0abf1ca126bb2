//! What people read, with fixed facts.

use std::io;
use std::time::Duration;

use super::*;
use crate::check::backlog::Counted;
use crate::check::backlog::{NoCount, ReplicaCount};
use crate::check::facts::{Expiry, Rights};
use crate::check::facts::{Facts, Right};
use crate::model::shard::DbIndex;
use crate::node::commands::Access;
use crate::node::error::NodeError;
use crate::node::info::Info;
use crate::settings::Settings;
use crate::settings::{self, Touch, raw::Raw};

const INFO: &str = "redis_version:7.0.15\r\nredis_mode:standalone\r\nrun_id:abc\r\nuptime_in_seconds:266400\r\nhz:10\r\n\
    used_memory:100663296\r\nused_memory_dataset:96000000\r\nmaxmemory:0\r\nmaxmemory_policy:noeviction\r\n\
    loading:0\r\nrdb_bgsave_in_progress:0\r\naof_rewrite_in_progress:0\r\nexpired_keys:1000\r\n\
    expired_stale_perc:8.20\r\nevicted_keys:0\r\nrole:master\r\nmaster_replid:history\r\nmaster_repl_offset:5000\r\n\
    db0:keys=1000000,expires=900000,avg_ttl=1\r\ndb3:keys=500,expires=0,avg_ttl=0\r\n";

const ORDER: &str = "ttlsweep scan redis://127.0.0.1:6379";

fn addr(port: u16) -> NodeAddr {
    NodeAddr::Tcp { host: "127.0.0.1".into(), port }
}

fn settings() -> Settings {
    settings::resolve(&Raw::defaults(), None).unwrap()
}

fn all_rights() -> Rights {
    let mut rights = Rights::default();
    Right::ALL.iter().for_each(|&right| rights.set(right, Access::Allowed));
    rights
}

/// The facts of a quiet master whose INFO has these lines changed.
fn facts(changes: &[(&str, &str)]) -> Facts {
    let mut info = INFO.to_owned();
    for (from, to) in changes {
        assert!(info.contains(from), "{from}");
        info = info.replace(from, to);
    }
    let expiry = Expiry { lazyfree: Some(true), effort: Some(10), hz: Some(10) };
    Facts::new(&addr(6379), Info::parse(info), expiry, all_rights(), Some(Duration::from_micros(30)))
}

fn shown(facts: &Facts, counted: Option<Result<ReplicaCount, NoCount>>, settings: &Settings) -> String {
    let assessment = assessment::assess(facts, counted.as_ref(), &settings.scan);
    let sentence = sentence(facts, &assessment, ORDER);
    text(facts, counted.as_ref(), &assessment, &settings.scan, &sentence)
}

#[test]
fn a_quiet_master() {
    insta::assert_snapshot!(shown(&facts(&[]), None, &settings()));
}

#[test]
fn everything_that_deserves_a_warning() {
    let mut facts = facts(&[
        ("7.0.15", "7.4.1"),
        ("loading:0", "loading:1"),
        ("rdb_bgsave_in_progress:0", "rdb_bgsave_in_progress:1"),
        ("aof_rewrite_in_progress:0", "aof_rewrite_in_progress:1"),
        ("evicted_keys:0", "evicted_keys:77"),
        ("noeviction", "allkeys-lru"),
        ("maxmemory:0", "maxmemory:104857600"),
        ("redis_mode:standalone", "redis_mode:cluster\r\ncluster_enabled:1\r\nmaster_failover_state:waiting-for-sync"),
        (
            "role:master",
            "role:master\r\npaused_actions:write\r\nslave0:ip=10.0.0.2,port=1,state=wait_bgsave,offset=0,lag=30",
        ),
    ]);
    facts.expiry = Expiry { lazyfree: Some(false), effort: Some(1), hz: Some(10) };
    facts.rights.set(Right::Exists, Access::Denied);
    facts.expire_per_sec = Some(2000.0);
    let mut settings = settings();
    settings.scan.dbs = vec![DbIndex(0), DbIndex(3), DbIndex(7)];
    settings.scan.tuning.max_keys_per_sec = Some(200);
    settings.scan.timeout = Duration::from_secs(60);
    let dead = NodeError::Connect { addr: addr(6380), source: io::ErrorKind::ConnectionRefused.into() };
    insta::assert_snapshot!(shown(&facts, Some(Err(dead.into())), &settings));
}

#[test]
fn a_replica_names_its_master_and_cannot_be_swept() {
    let facts = facts(&[("role:master", "role:slave\r\nmaster_host:10.0.0.1\r\nmaster_port:6379")]);
    insta::assert_snapshot!(shown(&facts, None, &settings()));
}

#[test]
fn a_user_without_rights_sees_what_is_known_and_what_to_grant() {
    let mut rights = Rights::default();
    for (right, access) in [
        (Right::Ping, Access::Allowed),
        (Right::Info, Access::Denied),
        (Right::Scan, Access::Denied),
        (Right::Dbsize, Access::Allowed),
    ] {
        rights.set(right, access);
    }
    let facts = Facts::new(&addr(6379), Info::default(), Expiry::default(), rights, None);
    insta::assert_snapshot!(shown(&facts, None, &settings()));
}

#[test]
fn a_count_on_a_replica_takes_the_place_of_the_estimate() {
    let facts = facts(&[("db3:keys=500,expires=0", "db3:keys=500,expires=500")]);
    let exact = Counted { keys: 1_000_000, expired: 82_000, moved: 0 };
    let moving = Counted { keys: 500, expired: 7, moved: 2 };
    let dbs = [(DbIndex(0), exact), (DbIndex(3), moving)].into();
    let count = ReplicaCount { replica: addr(6380), dbs };
    insta::assert_snapshot!(shown(&facts, Some(Ok(count)), &settings()));
}

#[test]
fn what_cannot_be_swept_at_all() {
    let old = shown(&facts(&[("7.0.15", "3.2.0")]), None, &settings());
    let sentinel = shown(&facts(&[("mode:standalone", "mode:sentinel"), ("role:master\r\n", "")]), None, &settings());
    let other = Facts::new(&addr(80), Info::parse("hello\r\n"), Expiry::default(), all_rights(), None);
    let other = shown(&other, None, &settings());
    for (text, error) in [(old, "Redis 3.2 cannot"), (sentinel, "this is a sentinel"), (other, "no Redis or Valkey")] {
        assert!(text.contains("error: ") && text.contains(error), "{text}");
        assert!(text.contains("verdict: a sweep cannot run here"), "{text}");
    }
}

#[test]
fn a_touch_that_is_not_allowed_names_its_own_grant() {
    let mut facts = facts(&[]);
    facts.rights.set(Right::Ttl, Access::Denied);
    let mut settings = settings();
    assert!(!shown(&facts, None, &settings).contains("error: "), "without the touch nobody needs TTL");
    settings.scan.touch = Touch::Ttl;
    let text = shown(&facts, None, &settings);
    assert!(text.contains("error: this user may not run TTL"), "{text}");
    assert!(text.contains("grant it: ACL SETUSER ttlsweep '~*' +exists +ttl"), "{text}");
    facts.rights.set(Right::Scan, Access::Denied);
    let both = shown(&facts, None, &settings);
    assert!(both.contains("-@all +scan") && both.contains("; ACL SETUSER ttlsweep '~*' +exists +ttl"), "{both}");
    facts.rights.set(Right::Scan, Access::Allowed);
    facts.user = Some("ann".to_owned());
    let text = shown(&facts, None, &settings);
    assert!(text.contains("grant it: ACL SETUSER ann '~*' +ttl"), "to whom we are, and what is missing: {text}");
}

#[test]
fn a_command_that_was_renamed_away_is_no_missing_right() {
    let mut facts = facts(&[]);
    facts.rights.set(Right::Scan, Access::NoSuchCommand);
    facts.rights.set(Right::Exists, Access::NoSuchCommand);
    let text = shown(&facts, None, &settings());
    assert!(text.contains("error: the server knows no SCAN by this name"), "{text}");
    assert!(text.contains("note: the server knows no EXISTS by this name"), "{text}");
    assert!(text.contains("rename-command") && !text.contains("ACL SETUSER"), "{text}");
}

#[test]
fn nothing_to_sweep_is_said() {
    let none = shown(&facts(&[("expires=900000", "expires=0")]), None, &settings());
    assert!(none.contains("verdict: no key has a TTL"), "{none}");
    let clean = shown(&facts(&[("8.20", "0.00")]), None, &settings());
    assert!(clean.contains("verdict: the server's own sample shows no backlog, and can be far too low"), "{clean}");
}

#[test]
fn the_json_holds_every_figure() {
    let facts = facts(&[("role:master", "role:master\r\nslave0:ip=10.0.0.2,port=6379,state=online,offset=4990,lag=1")]);
    let settings = settings();
    let assessment = assessment::assess(&facts, None, &settings.scan);
    let sentence = sentence(&facts, &assessment, ORDER);
    let object = CheckOutput::new(settings.target.to_string(), &facts, &assessment, &settings.scan, sentence);
    insta::assert_snapshot!(serde_json::to_string_pretty(&object).unwrap());
}
