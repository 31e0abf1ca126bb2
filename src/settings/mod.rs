//! Settings: texts ([`raw`]) are parsed into valid values ([`Settings`]) once, before anything else uses them.
//!
//! The defaults are read from `default.toml` only; the help in `cli/args.rs` repeats them. All problems are reported together.

pub mod notify;
pub mod raw;
pub mod serve;
pub mod store;
mod table;
mod values;

pub use values::{bytes, duration, password_in_env, positive_duration, seconds, show_duration, show_limits, span};

use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use secrecy::ExposeSecret;

use crate::model::bounds::{BOUND_KEYS, Bounds};
use crate::model::schedule::BacklogSize;
use crate::model::shard::DbIndex;
use crate::model::target::{Credentials, InstanceUrl, NodeMap, Password, Place, Target};
use crate::model::task::SweepTexts;
use crate::model::throttle::{LIMITS, Limits, Measure};
use crate::model::words::words;
use crate::settings::raw::{Origin, Problem, Raw};
use crate::settings::values::{given, limit, parse_dbs, password_in, share, slice, switch, unless_off};

/// Valid COUNTs: the contract's range for `scan_keys_count`.
pub const COUNT_RANGE: std::ops::RangeInclusive<u32> = 10..=1000;

/// The command that is sent for each key that SCAN returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touch {
    /// Audit a few batches with EXISTS; if the audit finds expired keys that SCAN left, touch every batch.
    Auto,
    /// Send no command and audit nothing.
    None,
    /// Send EXISTS for each key.
    Exists,
    /// Send TTL for each key; the report then shows how soon keys expire.
    Ttl,
}

words!(Touch, "touch mode", Auto = "auto", None = "none", Exists = "exists", Ttl = "ttl");

/// What SCAN returns: the setting `payload`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    /// No names where the server is known to free expired keys then too, else names.
    Auto,
    /// The names of the keys.
    Names,
    /// No names, on every server whose SCAN takes TYPE.
    None,
}

words!(Payload, "payload", Auto = "auto", Names = "names", None = "none");

/// The settings that may change while a sweep runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tuning {
    /// Largest share of the master's time that batches may take, in (0, 1].
    pub intensity: f64,
    /// Smallest share, to which the intensity falls under load; never above `intensity`.
    pub min_intensity: f64,
    /// Most keys to scan per second on each master; `None`: no ceiling.
    pub max_keys_per_sec: Option<u32>,
    /// Limits on the load of the server, above which the sweep holds or fails.
    pub limits: Limits,
    /// The bounds of a keep run; none for a sweep.
    pub bounds: Bounds,
}

impl Tuning {
    /// Whether the intensity or a limit depends on the load that other clients put on the master.
    pub(crate) fn depends_on_others(&self) -> bool {
        let is_limited = [Measure::Ops, Measure::Cpu].into_iter().any(|measure| self.limits.is_set_on(measure));
        self.min_intensity < self.intensity || is_limited
    }
}

/// The settings of a sweep, without those of its connections.
#[derive(Debug, Clone, PartialEq)]
pub struct ScanSettings {
    /// DBs to sweep; empty: each whose `expires` in INFO keyspace is above 0.
    pub dbs: Vec<DbIndex>,
    /// COUNT of the first SCAN, within [`COUNT_RANGE`].
    pub count: u32,
    /// Target for how long one batch holds the master; zero: COUNT is not adapted.
    pub max_slice: Duration,
    /// The settings that may change while the sweep runs, as it begins.
    pub tuning: Tuning,
    /// Whether to sweep even if keys expire faster than the sweep goes.
    pub allow_slow: bool,
    /// Longest time to raise the server's active-expire-effort before the sweep; `None`: do not.
    pub assist_expiry: Option<Duration>,
    /// The command to send for each key that SCAN returned.
    pub touch: Touch,
    /// Whether SCAN returns key names.
    pub payload: Payload,
    /// Longest time that the sweep may take.
    pub timeout: Duration,
    /// How long to try to reconnect after a connection was lost.
    pub retry_for: Duration,
    /// Masters to sweep at the same time; `None`: one on each host.
    pub parallel: Option<NonZeroUsize>,
    /// Whether to sweep the master of a standalone server that is a replica.
    pub follow: bool,
}

/// TLS settings. The files are not read yet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TlsSettings {
    /// PEM file with the certificate authorities to trust; `None`: those of the system.
    pub cacert: Option<PathBuf>,
    /// PEM files with the client certificate and its private key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Host name to send by SNI and to expect in the server's certificate; `None`: the host of the connection.
    pub sni: Option<String>,
    /// Whether to accept any certificate.
    pub insecure: bool,
}

/// The valid settings of one instance and its sweep.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Address of the instance, without credentials.
    pub target: Target,
    /// User and password for the servers.
    pub credentials: Credentials,
    /// Where the password came from; `None`: there is none.
    pub password_from: Option<Origin>,
    /// User and password for the sentinels.
    pub sentinel_credentials: Credentials,
    /// TLS settings; `None`: the URL asks for no TLS.
    pub tls: Option<TlsSettings>,
    /// Reachable addresses for announced ones.
    pub node_map: NodeMap,
    /// Longest time to open a connection.
    pub connect_timeout: Duration,
    /// Longest time to wait for a reply.
    pub response_timeout: Duration,
    /// The settings of the sweep itself.
    pub scan: ScanSettings,
    /// The state file; `None`: the task and its checkpoint are not kept.
    pub state: Option<PathBuf>,
    /// The texts that `scan` was parsed from, by key. They are stored with the task, and `scan` can be made from them again.
    pub sweep_texts: Arc<SweepTexts>,
}

impl Settings {
    /// These settings without the bounds of a keep run, for one sweep.
    #[must_use]
    pub fn without_bounds(mut self) -> Self {
        self.scan.tuning.bounds = Bounds::default();
        let texts = Arc::make_mut(&mut self.sweep_texts);
        BOUND_KEYS.iter().for_each(|key| drop(texts.insert((*key).to_owned(), "off".to_owned())));
        self
    }
}

/// A password that is not the value of a key: from `REDISCLI_AUTH`, `--askpass`, or `password-env` of the daemon's file.
#[derive(Debug, Clone)]
pub struct GivenPassword {
    /// The password, which may be empty.
    pub secret: Password,
    /// Where the password came from.
    pub origin: Origin,
}

/// Parses and checks the texts. User, password and DB of a URL belong to the layer of the URL; in the same layer a separate
/// setting overrides them.
///
/// # Errors
/// Every problem, not only the first.
pub fn resolve(raw: &Raw, password: Option<GivenPassword>) -> Result<Settings, Vec<Problem>> {
    let mut reader = Reader { raw, problems: Vec::new() };
    let url = reader.read("url", InstanceUrl::parse);
    let user = reader.read("user", given);
    let password_file = reader.read("password-file", password_in);
    let sentinel_user = reader.read("sentinel-user", given);
    let sentinel_password = reader.read("sentinel-password-file", password_in);
    let tls = resolve_tls(&mut reader, url.as_ref().is_none_or(|url| url.target.tls));
    let wants_sentinels = url.as_ref().is_none_or(|url| matches!(url.target.place, Place::Sentinel { .. }));
    if !wants_sentinels {
        for key in ["sentinel-user", "sentinel-password-file"] {
            if !raw.get(key).0.is_empty() {
                reader.complain(
                    key,
                    "has no meaning without sentinels; write the URL as redis+sentinel://HOST:26379/MASTER",
                );
            }
        }
    }
    let node_map = reader.read("node-map", NodeMap::parse);
    let follow = reader.read("follow", switch);
    let parallel = reader.read("parallel", |text| match text.parse::<usize>() {
        Ok(shards) => Ok(NonZeroUsize::new(shards)),
        Err(_) => Err(format!("`{text}` is not a number of masters (0: one on each host)")),
    });
    let dbs = reader.read("db", parse_dbs);
    let count = reader.read("count", |text| match text.parse() {
        Ok(count) if COUNT_RANGE.contains(&count) => Ok(count),
        _ => Err(format!("`{text}` is not a COUNT between {} and {}", COUNT_RANGE.start(), COUNT_RANGE.end())),
    });
    let max_slice = reader.read("max-slice", slice);
    let tuning = tuning(&mut reader);
    let allow_slow = reader.read("allow-slow", switch);
    let assist_expiry = reader.read("assist-expiry", |text| duration(text).map(|d| Some(d).filter(|d| !d.is_zero())));
    let touch = reader.read("touch", |text| {
        Touch::from_str(text).map_err(|_| format!("`{text}` is not one of auto, none, exists, ttl"))
    });
    let payload = reader.read("payload", |text| {
        Payload::from_str(text).map_err(|_| format!("`{text}` is not one of auto, names, none"))
    });
    let timeout = reader.read("timeout", positive_duration);
    let connect_timeout = reader.read("connect-timeout", positive_duration);
    let response_timeout = reader.read("response-timeout", positive_duration);
    let retry_for = reader.read("retry-for", positive_duration);
    let state = reader.read("state", |text| Ok::<_, String>(Some(text).filter(|t| !t.is_empty()).map(PathBuf::from)));

    if payload == Some(Payload::None) && matches!(touch, Some(Touch::Exists | Touch::Ttl)) {
        reader.complain("payload", "touch exists and ttl need names; set payload to names, or touch to auto or none");
    }
    if assist_expiry.flatten().is_some() && state == Some(None) {
        reader.complain("assist-expiry", "needs a state file (--state FILE), to restore the old value after a crash");
    }
    let problems = reader.problems;
    let resolved = (|| {
        let InstanceUrl { target, credentials, db } = url?;
        let target_tls = target.tls;
        let by_url = raw.get("url").1;
        let url_wins = |key: &str| by_url.is_above(raw.get(key).1);
        let (mut dbs, mut sweep_texts) = (dbs?, raw.sweep_texts());
        if let Some(db) = db.filter(|_| dbs.is_empty() || url_wins("db")) {
            dbs = vec![db];
            // The texts do not contain the URL, so the DB must be among them.
            sweep_texts.insert("db".to_owned(), db.0.to_string());
        }
        let user = if url_wins("user") { credentials.user.or(user?) } else { user?.or(credentials.user) };
        let in_file = password_file?.map(|secret| (secret, raw.get("password-file").1.clone()));
        let given = password.map(|given| (given.secret, given.origin));
        let in_url = credentials.password.map(|secret| (secret, by_url.clone()));
        // An empty password counts as none.
        let passwords = [in_file, given, in_url].into_iter().flatten().filter(|(p, _)| !p.expose_secret().is_empty());
        let password = passwords.reduce(|best, next| if next.1.is_above(&best.1) { next } else { best });
        let (password, password_from) = password.unzip();
        Some(Settings {
            target,
            credentials: Credentials { user, password },
            password_from,
            sentinel_credentials: Credentials { user: sentinel_user?, password: sentinel_password? },
            tls: target_tls.then_some(tls?),
            node_map: node_map?,
            connect_timeout: connect_timeout?,
            response_timeout: response_timeout?,
            scan: ScanSettings {
                dbs,
                count: count?,
                max_slice: max_slice?,
                tuning: tuning?,
                allow_slow: allow_slow?,
                assist_expiry: assist_expiry?,
                touch: touch?,
                payload: payload?,
                timeout: timeout?,
                retry_for: retry_for?,
                parallel: parallel?,
                follow: follow?,
            },
            state: state?,
            sweep_texts: Arc::new(sweep_texts),
        })
    })();
    match resolved {
        Some(settings) if problems.is_empty() => Ok(settings),
        _ => Err(problems),
    }
}

/// Reads the settings that may change while a sweep runs; `None` with problems if one of them is invalid.
fn tuning(reader: &mut Reader<'_>) -> Option<Tuning> {
    let intensity = reader.read("intensity", share);
    let min_intensity = reader.read("min-intensity", share);
    let max_keys_per_sec = reader.read("max-keys-per-sec", |text| match text.parse::<u32>() {
        Ok(0) => Ok(None),
        Ok(keys) => Ok(Some(keys)),
        Err(_) => Err(format!("`{text}` is not a whole number of keys per second (0: no ceiling)")),
    });
    let throttle = reader.read("throttle", switch);
    let mut limits = Some(Limits::NONE);
    for row in &LIMITS {
        let limit = reader.read(row.key, limit(row.unit));
        limits = limits.zip(limit).map(|(limits, limit)| limits.with(row.key, limit));
    }
    let hold_during_fork = reader.read("during-fork", |text| match text {
        "hold" => Ok(true),
        "go" => Ok(false),
        _ => Err(format!("`{text}` is neither hold nor go")),
    });
    let max_backlog = reader.read("max-backlog", unless_off(BacklogSize::from_str));
    let max_delay = reader.read("max-delay", unless_off(positive_duration));
    let mut limits = limits?;
    limits.hold_during_fork = hold_during_fork?;
    let (intensity, min_intensity, throttle) = (intensity?, min_intensity?, throttle?);
    if !throttle {
        // A limit from a lower layer is what --no-throttle switches off. In the same or a higher layer it would silently not apply.
        let switch = reader.raw.get("throttle").1;
        let typed = |key: &str| {
            let (text, origin) = reader.raw.get(key);
            text != "off" && *origin != Origin::Default && !switch.is_above(origin)
        };
        let in_vain: Vec<_> = LIMITS.iter().map(|row| row.key).filter(|key| typed(key)).collect();
        for key in in_vain {
            reader.complain(key, "is not watched without throttle, which switches off every limit on load");
        }
    }
    Some(Tuning {
        intensity,
        min_intensity: if throttle { min_intensity.min(intensity) } else { intensity },
        max_keys_per_sec: max_keys_per_sec?,
        limits: if throttle { limits } else { Limits::NONE },
        bounds: Bounds { max_backlog: max_backlog?, max_delay: max_delay? },
    })
}

/// Parses the settings that may change while a sweep runs; keys without a text have their defaults.
///
/// # Errors
/// Every problem; the messages name the keys.
pub fn tuning_of(texts: &SweepTexts) -> Result<Tuning, Vec<Problem>> {
    let raw = Raw::with_texts(texts);
    let mut reader = Reader { raw: &raw, problems: Vec::new() };
    match tuning(&mut reader) {
        Some(tuning) if reader.problems.is_empty() => Ok(tuning),
        _ => Err(reader.problems),
    }
}

/// The texts of these bounds, by key.
pub fn bound_texts(bounds: Bounds) -> [(String, String); 2] {
    let off = || "off".to_owned();
    [
        ("max-backlog".to_owned(), bounds.max_backlog.map_or_else(off, |size| size.to_string())),
        ("max-delay".to_owned(), bounds.max_delay.map_or_else(off, show_duration)),
    ]
}

/// Reads the TLS settings. Giving one with a URL that does not ask for TLS is a problem: the password would be sent
/// unencrypted by mistake.
fn resolve_tls(reader: &mut Reader<'_>, wanted: bool) -> Option<TlsSettings> {
    let file = |text: &str| Ok::<_, String>(Some(text).filter(|t| !t.is_empty()).map(PathBuf::from));
    let cacert = reader.read("cacert", file);
    let cert = reader.read("cert", file);
    let key = reader.read("key", file);
    let sni = reader.read("sni", given);
    let insecure = reader.read("insecure", switch);
    let (cacert, cert, key, sni) = (cacert?, cert?, key?, sni?);
    if !wanted {
        for name in ["cacert", "cert", "sni", "insecure"] {
            if !matches!(reader.raw.get(name).0, "" | "false") {
                reader.complain(name, "has no meaning without TLS; write the URL as rediss://...");
            }
        }
    }
    let identity = match (cert, key) {
        (Some(cert), Some(key)) => Some((cert, key)),
        (None, None) => None,
        (cert, _) => {
            let (name, missing) = if cert.is_some() { ("cert", "key") } else { ("key", "cert") };
            reader.complain(name, &format!("needs {missing} too: certificate and private key go together"));
            return None;
        }
    };
    Some(TlsSettings { cacert, identity, sni, insecure: insecure? })
}

struct Reader<'a> {
    raw: &'a Raw,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    /// Records a problem of a value that is valid by itself and wrong beside other settings. A flag names the key already.
    fn complain(&mut self, key: &str, why: &str) {
        let origin = self.raw.get(key).1.clone();
        let message = match origin {
            Origin::Flag(_) => why.to_owned(),
            _ => format!("{key} {why}"),
        };
        self.problems.push(Problem { origin: Some(origin), message });
    }

    fn read<T, E: fmt::Display>(&mut self, key: &str, parse: impl FnOnce(&str) -> Result<T, E>) -> Option<T> {
        let (text, origin) = self.raw.get(key);
        match parse(text) {
            Ok(value) => Some(value),
            Err(e) => {
                let message = match origin {
                    // The flag already says which setting it is.
                    Origin::Flag(_) => e.to_string(),
                    _ => format!("{key}: {e}"),
                };
                self.problems.push(Problem { origin: Some(origin.clone()), message });
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pairs: &[(&'static str, &str)]) -> Raw {
        let mut raw = Raw::defaults();
        for (key, value) in pairs {
            raw.set(key, (*value).to_owned(), Origin::Flag(format!("--{key}")));
        }
        raw
    }

    #[test]
    fn the_defaults_are_valid() {
        let settings = resolve(&Raw::defaults(), None).unwrap();
        assert_eq!(settings.target.to_string(), "redis://127.0.0.1:6379");
        assert_eq!(settings.scan.timeout, Duration::from_secs(360 * 60));
    }

    #[test]
    fn every_problem_is_reported_at_once_in_words() {
        let raw = with(&[
            ("url", "http://x"),
            ("password-file", "/nonexistent/pw"),
            ("db", "0,x"),
            ("count", "5"),
            ("max-slice", "75"),
            ("intensity", "0"),
            ("max-keys-per-sec", "-1"),
            ("touch", "maybe"),
            ("timeout", "0s"),
            ("retry-for", "soon"),
            ("cert", "me.pem"),
            ("insecure", "yes"),
            ("node-map", "10.0.0.1"),
            ("follow", "maybe"),
            ("parallel", "all"),
        ]);
        let problems = resolve(&raw, None).unwrap_err();
        let shown: Vec<_> = problems.iter().map(ToString::to_string).collect();
        insta::assert_snapshot!(shown.join("\n"));
    }

    #[test]
    fn dbs_named_beat_the_one_in_the_url() {
        let settings = resolve(&with(&[("url", "redis://h/3")]), None).unwrap();
        assert_eq!(settings.scan.dbs, [DbIndex(3)]);
        let settings = resolve(&with(&[("url", "redis://h/3"), ("db", "1,2,1")]), None).unwrap();
        assert_eq!(settings.scan.dbs, [DbIndex(1), DbIndex(2)]);
    }

    #[test]
    fn a_password_given_apart_beats_the_one_in_the_url_and_no_debug_output_shows_it() {
        let given = GivenPassword { secret: b"two".to_vec().into(), origin: Origin::Flag("--askpass".to_owned()) };
        let settings = resolve(&with(&[("url", "redis://u:one@h")]), Some(given)).unwrap();
        assert_eq!(settings.credentials.password.as_ref().unwrap().expose_secret(), b"two");
        let shown = format!("{settings:?}");
        assert!(!shown.contains("one@") && !shown.contains("two"), "{shown}");
    }

    #[test]
    fn the_parts_of_a_typed_url_override_environment_and_file() {
        let mut raw = with(&[("url", "redis://ann:one@h/3")]);
        let env = |name: &str| Origin::Env(name.to_owned());
        raw.set("db", "0".to_owned(), env("TTLSWEEP_DB"));
        raw.set("user", "bob".to_owned(), Origin::File { path: "s.toml".into(), line: 1 });
        let given = || Some(GivenPassword { secret: b"two".to_vec().into(), origin: env("REDISCLI_AUTH") });
        let shown = |raw: &Raw| {
            let settings = resolve(raw, given()).unwrap();
            let Credentials { user, password } = settings.credentials;
            let (user, password) =
                (user.unwrap(), String::from_utf8(password.unwrap().expose_secret().to_vec()).unwrap());
            (settings.scan.dbs[0].0, settings.sweep_texts["db"].clone(), user, password)
        };
        assert_eq!(shown(&raw), (3, "3".to_owned(), "ann".to_owned(), "one".to_owned()));
        raw.set("url", "redis://ann:one@h/3".to_owned(), env("TTLSWEEP_URL"));
        assert_eq!(shown(&raw), (0, "0".to_owned(), "ann".to_owned(), "two".to_owned()));
        let none = resolve(&with(&[("url", "redis://:@h")]), None).unwrap();
        assert!(none.credentials.password.is_none() && none.password_from.is_none(), "an empty one is none");
    }

    #[test]
    fn a_limit_that_is_given_where_the_throttle_is_switched_off_is_refused_and_one_further_down_is_not() {
        let mut raw = with(&[("throttle", "false"), ("abort-latency", "5ms"), ("max-keys-per-sec", "9")]);
        let problems = resolve(&raw, None).unwrap_err();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].to_string().starts_with("--abort-latency: is not watched"), "{problems:?}");
        raw.set("abort-latency", "5ms".to_owned(), Origin::Env("TTLSWEEP_ABORT_LATENCY".to_owned()));
        assert_eq!(resolve(&raw, None).unwrap().scan.tuning.limits, Limits::NONE);
    }

    #[test]
    fn credentials_for_sentinels_without_sentinels_are_refused() {
        let user = |url| resolve(&with(&[("url", url), ("sentinel-user", "ann")]), None);
        for url in ["redis://h", "redis://h,i", "unix:///s"] {
            let problems = user(url).unwrap_err();
            assert!(problems[0].to_string().starts_with("--sentinel-user: has no meaning without sentinels"), "{url}");
        }
        assert_eq!(user("redis+sentinel://h/m").unwrap().sentinel_credentials.user.as_deref(), Some("ann"));
    }

    #[test]
    fn tls_files_without_tls_or_without_their_other_half_are_refused() {
        let problems = |pairs: &[(&'static str, &str)]| {
            let problems = resolve(&with(pairs), None).map(drop).unwrap_err();
            problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
        };
        let plain = problems(&[("url", "redis://h"), ("cacert", "ca.pem"), ("sni", "name")]);
        assert_eq!(plain.matches("rediss://").count(), 2, "{plain}");
        let half = problems(&[("url", "rediss://h"), ("key", "k.pem")]);
        assert!(half.contains("--key: needs cert"), "{half}");
        let settings = resolve(&with(&[("url", "rediss://h"), ("insecure", "true")]), None).unwrap();
        assert!(settings.tls.unwrap().insecure);
        assert!(resolve(&with(&[("url", "redis://h")]), None).unwrap().tls.is_none());
    }
}
