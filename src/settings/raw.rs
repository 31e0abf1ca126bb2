//! Settings as text by key, in layers, each with where it came from. Values are not parsed here.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use crate::model::throttle::LIMITS;

/// Every key of a sweep's settings, in the order of `default.toml`, in which `settings show` prints them.
pub static KEYS: LazyLock<Vec<&'static str>> = LazyLock::new(|| {
    let lines = DEFAULT_TOML.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_once(" = ")).map(|(key, _)| key).collect()
});

/// The keys for the address of an instance, the credentials and the state file: they do not say how to sweep.
pub const PLACE_KEYS: &[&str] = &[
    "url",
    "user",
    "password-file",
    "cacert",
    "cert",
    "key",
    "sni",
    "insecure",
    "sentinel-user",
    "sentinel-password-file",
    "node-map",
    "state",
];

/// The keys that may change while a sweep runs.
pub static TUNE_KEYS: LazyLock<Vec<&'static str>> = LazyLock::new(|| {
    const PACE: [&str; 5] = ["intensity", "min-intensity", "max-keys-per-sec", "throttle", "during-fork"];
    let may_change = |key: &&str| PACE.contains(key) || LIMITS.iter().any(|row| row.key == *key);
    KEYS.iter().copied().filter(may_change).collect()
});

/// The text of `default.toml`, with its comments.
pub const DEFAULT_TOML: &str = include_str!("default.toml");

/// Where a value came from. A later layer wins.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// A value of `default.toml`, which is compiled in.
    Default,
    /// A line of a settings file.
    File {
        /// Path of the file as it was given.
        path: PathBuf,
        /// Line in the file, counted from 1.
        line: usize,
    },
    /// The environment variable of this name.
    Env(String),
    /// The command line: the flag with its dashes, or `URL`.
    Flag(String),
}

impl Origin {
    /// Whether a value from this origin overrides one from the other. In the same layer neither does.
    pub fn is_above(&self, other: &Self) -> bool {
        let layer = |origin: &Self| match origin {
            Self::Default => 0,
            Self::File { .. } => 1,
            Self::Env(_) => 2,
            Self::Flag(_) => 3,
        };
        layer(self) > layer(other)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Env(name) => write!(f, "env {name}"),
            Self::Flag(name) => f.write_str(name),
        }
    }
}

/// A problem of the settings or of the arguments.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Problem {
    /// Where the value came from; `None`: the problem is not one of a single value.
    pub origin: Option<Origin>,
    /// What is wrong, and what a valid value looks like.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            Some(origin) => write!(f, "{origin}: {}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

/// The value in force of each key, as text, with its origin.
#[derive(Debug, Clone, Default)]
pub struct Raw {
    values: BTreeMap<&'static str, (String, Origin)>,
}

impl Raw {
    /// The values of `default.toml`.
    ///
    /// # Panics
    /// If `default.toml` is invalid; a test makes sure that it is not.
    pub fn defaults() -> Self {
        let mut raw = Self::default();
        let problems = raw.add_toml(DEFAULT_TOML, |_| Origin::Default);
        assert!(problems.is_empty(), "default.toml: {problems:?}");
        raw
    }

    /// Overrides the values by those of a settings file. An unknown key is a problem whose message names the nearest key.
    ///
    /// # Errors
    /// Every problem of the file.
    pub fn add_file(&mut self, path: &Path) -> Result<(), Vec<Problem>> {
        let whole = |message| vec![Problem { origin: None, message: format!("{}: {message}", path.display()) }];
        let text = std::fs::read_to_string(path).map_err(|e| whole(format!("cannot read it: {e}")))?;
        let problems = self.add_toml(&text, |line| Origin::File { path: path.to_owned(), line });
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }

    /// Replaces the value of one key, and its origin.
    pub fn set(&mut self, key: &'static str, value: String, origin: Origin) {
        self.values.insert(key, (value, origin));
    }

    /// The value in force of a key, with its origin.
    ///
    /// # Panics
    /// If the key is not one of [`KEYS`]; `default.toml` has a value for each of those.
    pub fn get(&self, key: &str) -> (&str, &Origin) {
        let (value, origin) = &self.values[key];
        (value, origin)
    }

    /// The values that say how to sweep: all but those of [`PLACE_KEYS`].
    pub fn sweep_texts(&self) -> BTreeMap<String, String> {
        let sweep = self.values.iter().filter(|(key, _)| !PLACE_KEYS.contains(key));
        sweep.map(|(key, (value, _))| ((*key).to_owned(), value.clone())).collect()
    }

    /// The defaults, overridden by texts such as [`Raw::sweep_texts`] returns. Unknown keys and those of [`PLACE_KEYS`] are ignored.
    pub fn with_texts(texts: &BTreeMap<String, String>) -> Self {
        let mut raw = Self::defaults();
        for (key, text) in texts {
            if let Some(key) = Self::key(key).filter(|key| !PLACE_KEYS.contains(key)) {
                raw.set(key, text.clone(), Origin::Default);
            }
        }
        raw
    }

    /// The key with this name, if there is one.
    pub fn key(name: &str) -> Option<&'static str> {
        KEYS.iter().copied().find(|key| *key == name)
    }

    fn add_toml(&mut self, text: &str, origin: impl Fn(usize) -> Origin) -> Vec<Problem> {
        let line_at = |offset: usize| text[..offset.min(text.len())].matches('\n').count() + 1;
        let table = match toml::de::DeTable::parse(text) {
            Ok(table) => table,
            Err(e) => {
                let line = e.span().map_or(1, |span| line_at(span.start));
                return vec![Problem { origin: Some(origin(line)), message: e.message().to_owned() }];
            }
        };
        let mut problems = Vec::new();
        for (key, value) in table.get_ref() {
            let origin = origin(line_at(key.span().start));
            let Some(known) = KEYS.iter().find(|k| *k == key.get_ref()) else {
                problems.push(Problem { origin: Some(origin), message: unknown_key(key.get_ref()) });
                continue;
            };
            match scalar_text(value.get_ref()) {
                Some(text) => self.set(known, text, origin),
                None => problems.push(Problem {
                    origin: Some(origin),
                    message: format!("`{known}` must be a single value or a list of values"),
                }),
            }
        }
        problems
    }
}

/// A TOML value as it would be typed on the command line; lists with commas.
pub(super) fn scalar_text(value: &toml::de::DeValue<'_>) -> Option<String> {
    use toml::de::DeValue as V;
    match value {
        V::String(text) => Some(text.to_string()),
        V::Integer(number) => Some(number.to_string()),
        V::Float(number) => Some(number.to_string()),
        V::Boolean(flag) => Some(flag.to_string()),
        V::Array(items) => {
            let items: Option<Vec<_>> = items.iter().map(|item| scalar_text(item.get_ref())).collect();
            items.map(|items| items.join(","))
        }
        V::Datetime(_) | V::Table(_) => None,
    }
}

/// Tables that only a settings file of the daemon has.
const DAEMON_TABLES: [&str; 4] = ["api", "store", "tasks", "instances"];

fn unknown_key(key: &str) -> String {
    if DAEMON_TABLES.contains(&key) {
        return format!("`{key}` belongs in a settings file of `ttlsweep serve`, and this is one of a single sweep");
    }
    let dashed = key.replace('_', "-").to_lowercase();
    match KEYS.iter().find(|k| **k == dashed || k.starts_with(&dashed) || dashed.starts_with(*k)) {
        Some(near) => format!("`{key}` is not a setting; did you mean `{near}`?"),
        None => format!("`{key}` is not a setting; `ttlsweep settings show` lists them all"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::bounds::BOUND_KEYS;

    #[test]
    fn every_key_that_the_program_knows_has_a_default() {
        let known = PLACE_KEYS.iter().chain(BOUND_KEYS).copied().chain(LIMITS.iter().map(|row| row.key));
        for key in known {
            assert!(KEYS.contains(&key), "`{key}` is missing in default.toml");
        }
    }

    #[test]
    fn every_key_has_a_default_and_every_default_is_a_key() {
        let raw = Raw::defaults();
        for key in KEYS.iter() {
            raw.get(key);
        }
        assert_eq!(raw.values.len(), KEYS.len());
    }

    #[test]
    fn all_problems_of_a_file_are_found_at_once_with_their_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.toml");
        std::fs::write(&path, "count = 5\nmax_slice = \"1ms\"\n\nnonsense = 1\n[table]\n").unwrap();
        let problems = Raw::defaults().add_file(&path).unwrap_err();
        let shown: Vec<_> = problems.iter().map(|p| p.to_string().replace(path.to_str().unwrap(), "s.toml")).collect();
        insta::assert_snapshot!(shown.join("\n"));
    }

    #[test]
    fn a_syntax_error_names_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.toml");
        std::fs::write(&path, "count = 5\nurl = \n").unwrap();
        let problems = Raw::defaults().add_file(&path).unwrap_err();
        assert!(problems[0].to_string().contains("s.toml:2: "), "{}", problems[0]);
    }
}
