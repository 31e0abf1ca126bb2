//! The settings of the daemon: a TOML file with the files that it includes, read at the start and at each reload.
//!
//! The defaults are in `serve.toml` and, for how an instance is swept, in `default.toml`. All problems are reported
//! together, each with its line.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use jiff::civil::Time;
use secrecy::SecretString;
use sha2::{Digest, Sha256};

use crate::model::bounds::{BOUND_KEYS, Bounds};
use crate::model::schedule::{AutoScan, BacklogSize, CronRule, Recurrence, Window};
use crate::model::task::SweepTexts;
use crate::model::words::words;
use crate::settings::notify::{self, NotifySettings};
use crate::settings::raw::{KEYS, Origin, Problem, Raw, scalar_text};
use crate::settings::store::StoreLocation;
use crate::settings::table::{File, Table};
use crate::settings::values::{
    parse_sha256, readable, seconds, some_text, time_zone, timestamp, unless_off, weekday, whole,
};
use crate::settings::{self, COUNT_RANGE, GivenPassword, Settings, password_in_env, positive_duration};

/// The text of `serve.toml`, with its comments.
pub const SERVE_TOML: &str = include_str!("serve.toml");

/// Longest interval of the automatic scan in seconds, by the contract: 43200 minutes.
pub const MAX_INTERVAL_S: u32 = 43_200 * 60;
/// Longest timeout of the automatic scan in seconds, by the contract: 86400 minutes.
pub const MAX_TIMEOUT_S: u32 = 86_400 * 60;

/// The valid settings of a daemon.
#[derive(Debug, Clone)]
pub struct ServeSettings {
    /// Address, TLS and credentials of the API.
    pub api: ApiSettings,
    /// Where the records are, and how long ended tasks are kept.
    pub store: StoreSettings,
    /// Name, labels and lease among the daemons that share a database.
    pub daemon: DaemonSettings,
    /// Most sweeps at the same time of this daemon.
    pub at_once: usize,
    /// Most sweeps at the same time of all daemons that share a database; `None`: no bound.
    pub at_once_of_all: Option<usize>,
    /// The webhook; `None`: no notifications.
    pub notify: Option<NotifySettings>,
    /// Time between two forecasts of an instance; zero: on request only.
    pub forecast_every: Duration,
    /// The automatic scan of an instance for which neither the file nor the API sets one.
    pub auto_scan: AutoScan,
    /// The instances, in the order of the files.
    pub instances: Vec<Arc<Instance>>,
    /// Hash of the file and those that it includes, in hexadecimal digits: daemons compare theirs.
    pub hash: String,
}

impl ServeSettings {
    /// The instance with this id.
    pub fn instance(&self, id: &str) -> Option<&Arc<Instance>> {
        self.instances.iter().find(|instance| instance.id == id)
    }
}

/// The table `[api]`: address, TLS, limits and credentials.
#[derive(Debug, Clone)]
pub struct ApiSettings {
    /// Address and port to listen on.
    pub listen: SocketAddr,
    /// PEM files with the certificate chain and the private key; `None`: plain HTTP.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Lines of `tls-cert` and `tls-key` in the file.
    pub lines: Lines,
    /// Most open connections of clients.
    pub max_connections: usize,
    /// Longest time to receive a request, and to answer it.
    pub request_timeout: Duration,
    /// The bearer tokens of `[[api.tokens]]`.
    pub tokens: Vec<Token>,
    /// The key pairs of `[[api.keys]]`.
    pub keys: Vec<AccessKey>,
}

impl ApiSettings {
    /// Whether there are no credentials, so that everybody who can connect may do everything. Valid only with a loopback address.
    pub fn is_open(&self) -> bool {
        self.tokens.is_empty() && self.keys.is_empty()
    }
}

/// What a caller of the API may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Read everything of its projects.
    ServeReader,
    /// Read, and change everything of its projects.
    Operator,
}

words!(Role, "role", ServeReader = "reader", Operator = "operator");

/// The rights of a credential.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Name of the credential, for logs.
    pub name: String,
    /// What a caller with it may do.
    pub role: Role,
    /// The projects that it is for; `None`: all.
    pub projects: Option<BTreeSet<String>>,
}

impl Grant {
    /// Whether it is for this project.
    pub fn allows(&self, project: &str) -> bool {
        self.projects.as_ref().is_none_or(|projects| projects.contains(project))
    }
}

/// A token that callers send in `X-Auth-Token`. Only its hash is kept.
#[derive(Debug, Clone)]
pub struct Token {
    /// SHA-256 of the token, which itself is not stored.
    pub sha256: [u8; 32],
    /// When it expires; `None`: never.
    pub expires: Option<Timestamp>,
    /// What a caller with it may do, and where.
    pub grant: Grant,
}

/// A key pair that callers sign requests with.
#[derive(Debug, Clone)]
pub struct AccessKey {
    /// The access key, sent with each request.
    pub access: String,
    /// The secret key, never sent.
    pub secret: SecretString,
    /// What a caller with it may do, and where.
    pub grant: Grant,
}

/// The table `[daemon]`: this daemon among those that share a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonSettings {
    /// Name among the daemons; `None`: the host name.
    pub name: Option<String>,
    /// Labels of what its network reaches: it sweeps the instances whose `where` is one of these, and those without.
    pub labels: Vec<String>,
    /// How long its tasks stay its own after its last heartbeat.
    pub lease: Duration,
}

/// Shortest valid lease: each renewal is a round trip to a database that others use too.
const SHORTEST_LEASE: Duration = Duration::from_secs(2);

/// The table `[store]`: where the records are, and how long ended tasks are kept.
#[derive(Debug, Clone)]
pub struct StoreSettings {
    /// The file or database of the records.
    pub location: StoreLocation,
    /// How long ended tasks are kept.
    pub keep_for: Duration,
    /// How many ended tasks are kept.
    pub keep_tasks: u32,
}

/// An instance that the daemon may sweep: one entry of `[[instances]]`.
#[derive(Debug, Clone)]
pub struct Instance {
    /// Id in the API and in the records.
    pub id: String,
    /// Id of the project that it belongs to.
    pub project_id: String,
    /// Name to show; the id if the file has none.
    pub name: String,
    /// Its address and how it is swept.
    pub settings: Settings,
    /// When a scheduled sweep or a keep run may run; `None`: always.
    pub window: Option<Window>,
    /// The bounds to keep, unless the API has set others.
    pub keep: Bounds,
    /// The automatic scan, unless the API has set another one.
    pub auto_scan: AutoScan,
    /// Smallest backlog for which a due scan begins; `None`: it always does.
    pub min_backlog: Option<BacklogSize>,
    /// The label (`where`) that a daemon needs to sweep it; empty: none.
    pub place: String,
    /// How long it may be without a complete sweep before that is reported; `None`: as long as `[notify]` says.
    pub not_swept_for: Option<Duration>,
    /// Lines of its settings in the file.
    pub lines: Lines,
}

/// File and line of each setting, for problems that are found after the file was read.
pub type Lines = BTreeMap<&'static str, Origin>;

/// Reads and checks a settings file. `check_files` checks the TLS files that the settings name.
///
/// # Errors
/// Every problem of the settings and of those files.
pub fn load(
    path: &Path,
    check_files: impl FnOnce(&ServeSettings) -> Vec<Problem>,
) -> Result<ServeSettings, Vec<Problem>> {
    read(File::read(path)?, check_files)
}

fn read(file: File, check_files: impl FnOnce(&ServeSettings) -> Vec<Problem>) -> Result<ServeSettings, Vec<Problem>> {
    let settings = file.root().and_then(|root| {
        let defaults = File::new(Path::new("serve.toml"), SERVE_TOML.to_owned());
        let defaults = defaults.root()?;
        ServeReader { file: &file, defaults: &defaults }.all(&root)
    });
    if let Some(settings) = &settings {
        file.add_problems(check_files(settings));
    }
    let problems = file.into_problems();
    match settings {
        Some(settings) if problems.is_empty() => Ok(settings),
        _ => Err(problems),
    }
}

/// The settings of an instance, with how it is swept made from these texts.
///
/// # Errors
/// Every problem; the messages name the keys.
pub fn with_texts(instance: &Settings, texts: &SweepTexts) -> Result<Settings, Vec<Problem>> {
    let mut raw = Raw::with_texts(texts);
    // `assist-expiry` needs a state file, and the daemon always has its store.
    raw.set("state", "the daemon's".to_owned(), Origin::Default);
    let made = settings::resolve(&raw, None)?;
    Ok(Settings { scan: made.scan, sweep_texts: made.sweep_texts, ..instance.clone() })
}

/// The settings of an instance for a keep run with these bounds.
///
/// # Errors
/// As [`with_texts`].
pub fn with_bounds(instance: &Settings, bounds: Bounds) -> Result<Settings, Vec<Problem>> {
    let mut texts = SweepTexts::clone(&instance.sweep_texts);
    texts.extend(settings::bound_texts(bounds));
    with_texts(instance, &texts)
}

/// The ids and addresses of the instances read so far, to find duplicates.
#[derive(Default)]
struct Known {
    ids: BTreeSet<String>,
    /// The id of the instance at each address.
    targets: BTreeMap<String, String>,
}

struct ServeReader<'a> {
    file: &'a File,
    defaults: &'a toml::de::DeTable<'a>,
}

impl<'a> ServeReader<'a> {
    fn defaults(&self, name: &str) -> Option<&'a toml::de::DeTable<'a>> {
        self.defaults.get(name).and_then(|value| match value.get_ref() {
            toml::de::DeValue::Table(table) => Some(table),
            _ => None,
        })
    }

    fn all(&self, root: &'a toml::de::DeTable<'a>) -> Option<ServeSettings> {
        let root = Table::new(self.file, "", 0, Some(root), None);
        let api = self.api(&root.sub("api", self.defaults("api")));
        let daemon = Self::daemon(&root.sub("daemon", self.defaults("daemon")));
        let store = Self::store(&root.sub("store", self.defaults("store")));
        let tasks = root.sub("tasks", self.defaults("tasks"));
        let at_once = tasks.read("at-once", |text| whole(text, 1..=1024));
        let at_once_of_all = tasks.read("at-once-of-all", |text| whole(text, 0..=1_000_000));
        tasks.no_more();
        let forecast = root.sub("forecast", self.defaults("forecast"));
        let forecast_every = forecast.read("every", settings::duration);
        forecast.no_more();
        let notify = notify::read(&root.sub("notify", self.defaults("notify")));
        let base = Table::new(self.file, "auto-scan", 0, None, self.defaults("auto-scan"));
        let auto_scan = Self::auto_scan(&base);
        let mut instances: Vec<Arc<Instance>> = Vec::new();
        let mut known = Known::default();
        self.instances(&root, &mut instances, &mut known);
        let mut hash = Sha256::new_with_prefix(self.file.text());
        for path in root.optional("include", |pattern| self.file.included(pattern)).unwrap_or_default() {
            let included = match File::read(&path) {
                Ok(included) => included,
                Err(problems) => {
                    self.file.add_problems(problems);
                    continue;
                }
            };
            hash.update(included.text());
            if let Some(own) = included.root() {
                let root = Table::new(&included, "", 0, Some(&own), None);
                ServeReader { file: &included, defaults: self.defaults }.instances(&root, &mut instances, &mut known);
                root.no_more();
            }
            self.file.add_problems(included.into_problems());
        }
        root.no_more();
        Some(ServeSettings {
            api: api?,
            store: store?,
            daemon: daemon?,
            at_once: at_once? as usize,
            at_once_of_all: Some(at_once_of_all? as usize).filter(|most| *most > 0),
            notify: notify?,
            forecast_every: forecast_every?,
            auto_scan: auto_scan?,
            instances,
            hash: hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect(),
        })
    }

    /// Reads `[[instances]]` of one file and adds them to those of the files before it.
    fn instances<'b>(&'b self, root: &Table<'b>, instances: &mut Vec<Arc<Instance>>, known: &mut Known)
    where
        'a: 'b,
    {
        let tables = root.list("instances");
        for table in &tables {
            let Some(mut instance) = self.instance(table) else { continue };
            if !known.ids.insert(instance.id.clone()) {
                table.complain("id", format!("id: `{}` is taken by an instance above", instance.id));
                continue;
            }
            let other = known.targets.insert(instance.settings.target.to_string(), instance.id.clone());
            if let Some(other) = other {
                let message =
                    format!("url: the instance `{other}` has the same address: it would be swept twice at once");
                table.complain("url", message);
            }
            // Most instances have the same texts, which are shared: ten thousand copies would be most of the daemon's memory.
            let texts = instances.last().map(|other: &Arc<Instance>| &other.settings.sweep_texts);
            if let Some(texts) = texts.filter(|texts| **texts == instance.settings.sweep_texts) {
                instance.settings.sweep_texts = texts.clone();
            }
            instances.push(Arc::new(instance));
        }
    }

    fn daemon(table: &Table<'a>) -> Option<DaemonSettings> {
        let name = table.optional("name", some_text);
        let labels = table.read("labels", |text| {
            let labels: Vec<_> = text.split(',').map(str::trim).filter(|label| !label.is_empty()).collect();
            Ok::<_, String>(labels.into_iter().map(str::to_owned).collect())
        });
        let lease = table.read("lease", |text| match positive_duration(text)? {
            lease if lease < SHORTEST_LEASE => Err(format!("`{text}` is shorter than 2s")),
            lease => Ok(lease),
        });
        table.no_more();
        Some(DaemonSettings { name, labels: labels?, lease: lease? })
    }

    fn api(&self, table: &Table<'a>) -> Option<ApiSettings> {
        let listen = table.read("listen", |text| {
            text.parse::<SocketAddr>()
                .map_err(|_| format!("`{text}` is not an address and port such as 127.0.0.1:8080"))
        });
        let cert = table.optional("tls-cert", readable);
        let key = table.optional("tls-key", readable);
        let max_connections = table.read("max-connections", |text| whole(text, 1..=1_000_000));
        let request_timeout = table.read("request-timeout", positive_duration);
        let (tokens, keys) = (table.list("tokens"), table.list("keys"));
        // An invalid credential still counts: a typo must not open the API to everybody.
        let is_open = tokens.is_empty() && keys.is_empty();
        let tokens: Vec<_> = tokens.iter().filter_map(Self::token).collect();
        let keys: Vec<_> = keys.iter().filter_map(Self::access_key).collect();
        table.no_more();
        let tls = match (cert, key) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            _ => {
                table.complain("tls-cert", "tls-cert and tls-key go together");
                None
            }
        };
        let lines = ["tls-cert", "tls-key"].map(|key| (key, table.origin_of(key))).into();
        let api = ApiSettings {
            listen: listen?,
            tls,
            lines,
            max_connections: max_connections? as usize,
            request_timeout: request_timeout?,
            tokens,
            keys,
        };
        if is_open && !api.listen.ip().is_loopback() {
            let message = format!(
                "listen: {} can be reached by others, and no credentials are configured: add [[api.tokens]] or \
                 [[api.keys]], or listen on 127.0.0.1",
                api.listen
            );
            table.complain("listen", message);
        }
        Some(api)
    }

    fn grant(table: &Table<'a>) -> Option<Grant> {
        let name = table.read("name", some_text);
        let role = table
            .read("role", |text| Role::from_str(text).map_err(|_| format!("`{text}` is neither reader nor operator")));
        let projects = table.read("projects", |text| {
            let projects: BTreeSet<String> = text.split(',').filter(|p| !p.is_empty()).map(str::to_owned).collect();
            match () {
                () if projects.is_empty() => Err("name at least one project, or \"*\" for all"),
                () if projects.contains("*") => Ok(None),
                () => Ok(Some(projects)),
            }
        });
        Some(Grant { name: name?, role: role?, projects: projects? })
    }

    fn token(table: &Table<'a>) -> Option<Token> {
        let grant = Self::grant(table);
        let sha256 = table.read("sha256", parse_sha256);
        let expires = table.optional("expires", timestamp);
        table.no_more();
        Some(Token { sha256: sha256?, expires, grant: grant? })
    }

    fn access_key(table: &Table<'a>) -> Option<AccessKey> {
        let grant = Self::grant(table);
        let access = table.read("access", some_text);
        let secret = table.secret("secret-env", "secret-file", |_| Ok(()));
        if secret.is_none() && !table.has("secret-env") && !table.has("secret-file") {
            table.complain("access", "a key needs its secret by `secret-env` or `secret-file`");
        }
        table.no_more();
        Some(AccessKey { access: access?, secret: secret?, grant: grant? })
    }

    fn store(table: &Table<'a>) -> Option<StoreSettings> {
        let path = table.read("path", |text| some_text(text).map(PathBuf::from));
        let password = table.secret("password-env", "password-file", |_| Ok(()));
        let journal = table.read("journal", |text| some_text(text).map(PathBuf::from))?;
        if table.has("path") && table.has("url") {
            table.complain("path", "path: is short for url = \"sqlite:FILE\"; give one of path and url");
        }
        let location = table.optional("url", |text| StoreLocation::parse(text, password.as_ref(), &journal));
        let keep_for = table.read("keep-for", |text| match text.strip_suffix('d').map(str::parse::<u64>) {
            Some(Ok(days)) if days > 0 => Ok(Duration::from_secs(days.saturating_mul(86_400))),
            _ => positive_duration(text),
        });
        let keep_tasks = table.read("keep-tasks", |text| whole(text, 1..=u32::MAX));
        table.no_more();
        let location = location.or(path.map(StoreLocation::Sqlite));
        Some(StoreSettings { location: location?, keep_for: keep_for?, keep_tasks: keep_tasks? })
    }

    fn instance(&self, table: &Table<'a>) -> Option<Instance> {
        let id = table.read("id", |text| {
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_' || c == '.';
            match () {
                () if text.is_empty() || text.len() > 64 => Err(format!("`{text}` must be 1 to 64 characters long")),
                () if !text.chars().all(plain) => {
                    Err(format!("`{text}` may hold letters, digits, `-`, `_` and `.` only"))
                }
                () => Ok(text.to_owned()),
            }
        });
        let project_id = table.read("project_id", some_text);
        let name = table.optional("name", some_text);
        let place = table.optional("where", some_text).unwrap_or_default();
        let auto_scan = Self::auto_scan(&table.sub("auto-scan", self.defaults("auto-scan")));
        let window = Self::window(&table.sub("window", self.defaults("window")));
        let keep = Self::keep(&table.sub("keep", None));
        let min_backlog = table.optional("min-backlog", BacklogSize::from_str);
        let not_swept_for = table.optional("not-swept-for", positive_duration);
        let password = table.optional("password-env", |name| {
            password_in_env(name).ok_or_else(|| format!("the environment variable {name} is not set"))
        });
        let password = password.map(|secret| GivenPassword { secret, origin: table.origin_of("password-env") });
        let sweep = self.sweep(table, password);
        let id = id?;
        let (settings, lines) = sweep?;
        Some(Instance {
            name: name.unwrap_or_else(|| id.clone()),
            id,
            project_id: project_id?,
            settings,
            lines,
            window: window?,
            auto_scan: auto_scan?,
            keep: keep?,
            min_backlog,
            place,
            not_swept_for,
        })
    }

    /// Reads the settings that `ttlsweep scan` has too.
    fn sweep(&self, table: &Table<'a>, password: Option<GivenPassword>) -> Option<(Settings, Lines)> {
        let mut raw = Raw::defaults();
        // `assist-expiry` needs a state file, and the daemon always has its store; an instance cannot choose one.
        raw.set("state", "the daemon's".to_owned(), Origin::Default);
        let mut lines = Lines::new();
        if !table.has("url") {
            table.complain("id", "an instance needs its `url`");
        }
        table.rest(|key, value, offset| {
            let Some(known) = KEYS.iter().copied().find(|known| *known == key && *known != "state") else {
                return false;
            };
            match scalar_text(value) {
                _ if BOUND_KEYS.contains(&known) => {
                    self.file.problem(offset, format!("{known}: belongs in the table [instances.keep]"));
                }
                Some(text) => {
                    lines.insert(known, self.file.origin(offset));
                    raw.set(known, text, self.file.origin(offset));
                }
                None => self.file.problem(offset, format!("{known}: must be a single value or a list of values")),
            }
            true
        });
        let settings = settings::resolve(&raw, password).map_err(|problems| self.file.add_problems(problems)).ok()?;
        Some((settings, lines))
    }

    fn auto_scan(table: &Table<'a>) -> Option<AutoScan> {
        let enabled = table
            .read("enabled", |text| text.parse::<bool>().map_err(|_| format!("`{text}` is neither true nor false")));
        let first = table.optional("first-scan-at", timestamp);
        let interval_s = table.read("interval", |text| match text {
            "0" | "0s" | "0min" => Ok(0),
            _ => seconds(text, MAX_INTERVAL_S),
        });
        let timeout_s = table.read("timeout", |text| seconds(text, MAX_TIMEOUT_S));
        let count = table.read("scan-keys-count", |text| whole(text, COUNT_RANGE));
        let cron = table.optional("cron", some_text);
        let zone = table.read("zone", time_zone);
        table.no_more();
        let (enabled, interval_s, timeout_s, zone) = (enabled?, interval_s?, timeout_s?, zone?);
        let recurrence = match cron {
            Some(_) if table.has("first-scan-at") || table.has("interval") => {
                table.complain("cron", "cron: takes the place of first-scan-at and interval; give one or the other");
                return None;
            }
            Some(expression) => match CronRule::parse(&expression, zone) {
                Ok(rule) => Recurrence::Cron(Box::new(rule)),
                Err(message) => {
                    table.complain("cron", format!("cron: {message}"));
                    return None;
                }
            },
            None => Recurrence::Every { first, interval_s },
        };
        match &recurrence {
            Recurrence::Every { first: None, .. } if enabled => {
                table.complain("enabled", "enabled: needs first-scan-at and interval, or cron");
            }
            // The contract's rule for `timeout` and `interval`.
            Recurrence::Every { interval_s, .. } if timeout_s < 2 || timeout_s / 2 < *interval_s => {
                table.complain("timeout", "timeout: must be at least twice the interval, and at least 2s");
            }
            _ => {}
        }
        Some(AutoScan { enabled, recurrence, timeout_s, count: count?, updated_at: None })
    }

    fn keep(table: &Table<'a>) -> Option<Bounds> {
        let max_backlog = table.optional("max-backlog", unless_off(BacklogSize::from_str));
        let max_delay = table.optional("max-delay", unless_off(positive_duration));
        table.no_more();
        let bounds = Bounds { max_backlog: max_backlog.flatten(), max_delay: max_delay.flatten() };
        if table.is_there() && !table.has("max-backlog") && !table.has("max-delay") {
            table.complain("max-backlog", "[keep] needs max-backlog or max-delay");
            return None;
        }
        Some(bounds)
    }

    fn window(table: &Table<'a>) -> Option<Option<Window>> {
        if !table.is_there() {
            return Some(None);
        }
        let days = table.read("days", |text| {
            let days: Result<Vec<_>, _> = text.split(',').map(|day| weekday(day.trim())).collect();
            days.and_then(|days| if days.is_empty() { Err("name at least one day".to_owned()) } else { Ok(days) })
        });
        let time = |text: &str| {
            let full = if text.len() == 5 { format!("{text}:00") } else { text.to_owned() };
            full.parse::<Time>().map_err(|_| format!("`{text}` is not a time of day such as \"02:30\""))
        };
        let start = table.read("start", time);
        let end = table.read("end", time);
        let zone = table.read("zone", time_zone);
        table.no_more();
        Some(Some(Window { days: days?, start: start?, end: end?, zone: zone? }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ServeSettings, Vec<Problem>> {
        read(File::new(Path::new("s.toml"), text.to_owned()), |_| Vec::new())
    }

    #[test]
    fn an_empty_file_is_valid_and_listens_on_loopback_only() {
        let settings = parse("").unwrap();
        assert!(settings.api.listen.ip().is_loopback() && settings.api.is_open());
        assert_eq!((settings.auto_scan.count, settings.auto_scan.timeout_s), (50, 2880 * 60));
        for nobody in ["", "tokens = []\n", "tokens = []\nkeys = []\n"] {
            let problems = parse(&format!("[api]\nlisten = \"0.0.0.0:80\"\n{nobody}")).unwrap_err();
            assert!(problems[0].to_string().starts_with("s.toml:2: listen: 0.0.0.0:80 can be reached by others"));
        }
    }

    #[test]
    fn every_problem_is_found_at_once_with_its_line_and_cure() {
        let problems = parse(include_str!("tests/broken.toml")).unwrap_err();
        let shown: Vec<_> = problems.iter().map(ToString::to_string).collect();
        insta::assert_snapshot!(shown.join("\n"));
    }

    #[test]
    fn the_example_file_is_valid_and_says_what_it_shows() {
        let settings = parse(include_str!("../../deploy/ttlsweep.toml")).unwrap();
        let told = include_str!("../../deploy/ttlsweep.toml").split_once("# [notify]").unwrap().1;
        let told = told.lines().take_while(|line| line.starts_with("# ") || line.is_empty());
        let told: Vec<_> =
            told.filter_map(|line| line.strip_prefix("# ")).filter(|line| !line.contains("-file")).collect();
        let told = parse(&format!("[notify]\nurl = \"http://h/\"\n{}", told.join("\n"))).unwrap().notify.unwrap();
        assert_eq!((told.not_swept_for, told.events.len()), (Duration::from_secs(172_800), 2));
        let cache = settings.instance("session-cache").unwrap();
        assert!(cache.auto_scan.enabled && cache.window.is_some());
        assert_eq!(cache.settings.scan.max_slice, Duration::from_micros(30));
    }

    #[test]
    fn a_sweep_can_be_made_again_from_its_texts() {
        for url in ["redis://h", "redis://h/3", "unix:///s?db=3"] {
            let text = format!(
                "[[instances]]\nid = \"a\"\nproject_id = \"p\"\nurl = \"{url}\"\nintensity = 0.25\ncount = 20\n"
            );
            let settings = parse(&text).unwrap();
            let instance = &settings.instances[0].settings;
            assert_eq!(with_texts(instance, &instance.sweep_texts).unwrap().scan, instance.scan, "{url}");
            assert_eq!(instance.scan.dbs.len(), usize::from(url.contains('3')));
            assert!(!instance.sweep_texts.contains_key("url"));
        }
    }
}
