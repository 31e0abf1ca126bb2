//! Reads the tables of a settings file: knows the line of each value, collects every problem, finds unknown keys.

use std::cell::RefCell;
use std::fmt::Display;
use std::path::{Path, PathBuf};

use secrecy::{ExposeSecret, SecretString};
use toml::de::{DeTable, DeValue};

use crate::settings::raw::{KEYS, Origin, Problem, scalar_text};
use crate::settings::values::read_password;

/// One file while it is read, with the problems found so far.
#[derive(Debug)]
pub(super) struct File {
    path: PathBuf,
    text: String,
    /// Offset of the end of each line, in bytes.
    ends: Vec<usize>,
    problems: RefCell<Vec<Problem>>,
}

impl File {
    /// Reads the text of a file; it is not parsed yet.
    pub(super) fn read(path: &Path) -> Result<Self, Vec<Problem>> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| vec![Problem { origin: None, message: format!("cannot read {}: {e}", path.display()) }])?;
        Ok(Self::new(path, text))
    }

    pub(super) fn new(path: &Path, text: String) -> Self {
        let ends = text.match_indices('\n').map(|(at, _)| at).collect();
        Self { path: path.to_owned(), text, ends, problems: RefCell::default() }
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// The files that match a pattern such as `instances.d/*.toml`, relative to the folder of this file, sorted by name.
    pub(super) fn included(&self, pattern: &str) -> Result<Vec<PathBuf>, String> {
        let folder = self.path.parent().unwrap_or(Path::new(""));
        let pattern = folder.join(pattern);
        let pattern = pattern.to_str().ok_or("is not UTF-8")?;
        let paths = glob::glob(pattern).map_err(|error| format!("`{pattern}` is not a pattern of files: {error}"))?;
        paths.map(|path| path.map_err(|error| error.to_string())).collect()
    }

    pub(super) fn origin(&self, offset: usize) -> Origin {
        let line = self.ends.partition_point(|end| *end < offset) + 1;
        Origin::File { path: self.path.clone(), line }
    }

    pub(super) fn problem(&self, offset: usize, message: impl Into<String>) {
        self.problems.borrow_mut().push(Problem { origin: Some(self.origin(offset)), message: message.into() });
    }

    pub(super) fn add_problems(&self, problems: Vec<Problem>) {
        self.problems.borrow_mut().extend(problems);
    }

    /// All problems, in the order of their lines.
    pub(super) fn into_problems(self) -> Vec<Problem> {
        let mut problems = self.problems.into_inner();
        problems.sort_by(|a, b| a.origin.cmp(&b.origin));
        problems
    }

    /// The file parsed as a table; `None` with a problem if it is not valid TOML.
    pub(super) fn root(&self) -> Option<DeTable<'_>> {
        match DeTable::parse(&self.text) {
            Ok(table) => Some(table.into_inner()),
            Err(e) => {
                self.problem(e.span().map_or(0, |span| span.start), e.message());
                None
            }
        }
    }
}

/// One table of a file, with the table of its defaults.
pub(super) struct Table<'a> {
    file: &'a File,
    name: String,
    offset: usize,
    own: Option<&'a DeTable<'a>>,
    defaults: Option<&'a DeTable<'a>>,
    /// The keys that were read, to find the unknown ones.
    asked: RefCell<Vec<&'static str>>,
}

impl<'a> Table<'a> {
    pub(super) fn new(
        file: &'a File,
        name: impl Into<String>,
        offset: usize,
        own: Option<&'a DeTable<'a>>,
        defaults: Option<&'a DeTable<'a>>,
    ) -> Self {
        Self { file, name: name.into(), offset, own, defaults, asked: RefCell::default() }
    }

    /// Whether the file has this table at all.
    pub(super) fn is_there(&self) -> bool {
        self.own.is_some()
    }

    /// Whether the file itself gives this key a value.
    pub(super) fn has(&self, key: &str) -> bool {
        self.own.is_some_and(|own| own.contains_key(key))
    }

    /// Offset of a key in the file, in bytes; of its table if the file does not have the key.
    pub(super) fn offset_of(&self, key: &str) -> usize {
        self.own.and_then(|own| own.get_key_value(key)).map_or(self.offset, |(key, _)| key.span().start)
    }

    /// File and line of [`Self::offset_of`].
    pub(super) fn origin_of(&self, key: &str) -> Origin {
        self.file.origin(self.offset_of(key))
    }

    /// Reads a value; `None` with a problem if it is invalid, or missing without a default.
    pub(super) fn read<T, E: Display>(&self, key: &'static str, parse: impl FnOnce(&str) -> Result<T, E>) -> Option<T> {
        self.asked.borrow_mut().push(key);
        let value = self.own.and_then(|own| own.get(key)).or_else(|| self.defaults.and_then(|d| d.get(key)));
        let Some(value) = value else {
            self.complain(key, format!("[{}] needs `{key}`", self.name));
            return None;
        };
        let Some(text) = scalar_text(value.get_ref()) else {
            self.complain(key, format!("{key}: must be a single value or a list of values"));
            return None;
        };
        match parse(&text) {
            Ok(value) => Some(value),
            Err(e) => {
                self.complain(key, format!("{key}: {e}"));
                None
            }
        }
    }

    /// Reads a text that may be missing or empty.
    pub(super) fn optional<T, E: Display>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        self.asked.borrow_mut().push(key);
        let value = self.own.and_then(|own| own.get(key)).or_else(|| self.defaults.and_then(|d| d.get(key)))?;
        if scalar_text(value.get_ref()).is_some_and(|text| text.is_empty()) { None } else { self.read(key, parse) }
    }

    /// Reads a secret from the environment variable that `env` names or from the first line of the file that `file` names. A settings
    /// file never holds the secret itself.
    pub(super) fn secret(
        &self,
        env: &'static str,
        file: &'static str,
        check: impl Fn(&str) -> Result<(), String>,
    ) -> Option<SecretString> {
        let from_env = self.optional(env, |name| match std::env::var(name) {
            Ok(secret) if !secret.is_empty() => check(&secret).map(|()| SecretString::from(secret)),
            Err(std::env::VarError::NotUnicode(_)) => Err(format!("the environment variable {name} is not UTF-8")),
            _ => Err(format!("the environment variable {name} is not set")),
        });
        let from_file = self.optional(file, |path| {
            let bytes = read_password(path)?;
            let text = std::str::from_utf8(bytes.expose_secret()).map_err(|_| format!("{path} is not UTF-8"))?;
            check(text).map(|()| SecretString::from(text))
        });
        from_env.or(from_file)
    }

    /// The table of this name inside this one.
    pub(super) fn sub(&self, key: &'static str, defaults: Option<&'a DeTable<'a>>) -> Table<'a> {
        self.asked.borrow_mut().push(key);
        let own = self.own.and_then(|own| own.get(key));
        let table = own.and_then(|value| match value.get_ref() {
            DeValue::Table(table) => Some(table),
            _ => None,
        });
        if own.is_some() && table.is_none() {
            self.complain(key, format!("`{key}` must be a table"));
        }
        Table::new(self.file, key, self.offset_of(key), table, defaults)
    }

    /// The tables of a list such as `[[instances]]`.
    pub(super) fn list(&self, key: &'static str) -> Vec<Table<'a>> {
        self.asked.borrow_mut().push(key);
        let Some(value) = self.own.and_then(|own| own.get(key)) else { return Vec::new() };
        let DeValue::Array(items) = value.get_ref() else {
            self.complain(key, format!("`{key}` must be a list of tables, each beginning with [[{key}]]"));
            return Vec::new();
        };
        let tables = items.iter().filter_map(|item| match item.get_ref() {
            DeValue::Table(table) => {
                // The span that the parser gives a table of an array is not its first line; that of its first key is.
                let offset = table.iter().map(|(key, _)| key.span().start).min().unwrap_or(item.span().start);
                Some(Table::new(self.file, key, offset, Some(table), None))
            }
            _ => {
                self.complain(key, format!("`{key}` must be a list of tables, each beginning with [[{key}]]"));
                None
            }
        });
        tables.collect()
    }

    /// Calls `take` for each key that was not read yet. Where it returns false the key is a problem.
    pub(super) fn rest(&self, mut take: impl FnMut(&str, &DeValue<'_>, usize) -> bool) {
        let Some(own) = self.own else { return };
        for (key, value) in own {
            let asked = self.asked.borrow();
            if asked.iter().any(|asked| *asked == key.get_ref())
                || take(key.get_ref(), value.get_ref(), key.span().start)
            {
                continue;
            }
            let name: &str = key.get_ref();
            let dashed = name.replace('_', "-");
            let sweeps = self.name.starts_with("instances");
            let near = asked
                .iter()
                .chain(KEYS.iter().filter(|_| sweeps))
                .find(|known| **known == dashed || known.starts_with(&dashed) || dashed.starts_with(**known));
            let advice = match near {
                Some(near) => format!("; did you mean `{near}`?"),
                None if self.name.is_empty() && KEYS.contains(&dashed.as_str()) => {
                    "; a setting of a sweep belongs below [[instances]], or is this a file for `ttlsweep scan`?"
                        .to_owned()
                }
                None => String::new(),
            };
            let place = if self.name.is_empty() { String::new() } else { format!(" of [{}]", self.name) };
            self.file.problem(key.span().start, format!("`{name}` is not a setting{place}{advice}"));
        }
    }

    /// Makes every key that was not read a problem.
    pub(super) fn no_more(&self) {
        self.rest(|_, _, _| false);
    }

    /// Records a problem at the line of a key.
    pub(super) fn complain(&self, key: &str, message: impl Into<String>) {
        self.file.problem(self.offset_of(key), message);
    }
}
