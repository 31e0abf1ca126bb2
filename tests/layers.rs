//! Who imports whom: a module only from the layers above it, a room of the engine only from those above it, and no two files each other,
//! however far round. And what is called what: a type has its name for itself.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The order of the table in `src/lib.rs`; within one line, none imports another.
const LAYERS: &[&[&str]] = &[
    &["model"],
    &["settings"],
    &["node", "store", "metrics"],
    &["engine", "notify"],
    &["check"],
    &["forecast"],
    &["tasks"],
    &["scheduler", "keeper", "overdue", "api", "shutdown", "telemetry"],
    &["daemon"],
    &["cli"],
];
/// The rooms of the engine, by the first part of their path.
const ROOMS: &[&[&str]] = &[&["control"], &["plan"], &["policy"], &["sampler", "shards"], &["sweep"], &["rounds"]];

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The modules of the program below a folder, as `engine::sweep::pass`, with their code but for the tests.
fn modules(folder: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut paths = vec![folder.to_owned()];
    while let Some(path) = paths.pop() {
        if path.is_dir() {
            paths.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let inside = path.strip_prefix(src()).unwrap().with_extension("");
            let name: Vec<_> = inside.iter().map(|part| part.to_str().unwrap()).filter(|part| *part != "mod").collect();
            let code = std::fs::read_to_string(&path).unwrap();
            found.push((name.join("::"), code.split("#[cfg(test)]").next().unwrap().to_owned()));
        }
    }
    found
}

/// Every `crate::...` that stands in code, as far as it is a path; a list in braces ends it.
fn used(code: &str) -> BTreeSet<String> {
    let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    let code = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let paths = code.split("crate::").skip(1).map(|rest| rest.split(|c| !is_path(c)).next().unwrap());
    paths.map(|path| path.trim_end_matches(':').to_owned()).collect()
}

fn place(of: &[&[&str]], name: &str) -> usize {
    of.iter().position(|layer| layer.contains(&name)).unwrap_or_else(|| panic!("`{name}` has no layer"))
}

fn part(path: &str, number: usize) -> &str {
    path.split("::").nth(number).unwrap_or_default()
}

#[test]
fn a_module_imports_only_from_the_layers_above_it() {
    let mut seen = 0;
    for (name, code) in modules(&src()) {
        let own = part(&name, 0);
        if ["lib", "main"].contains(&own) {
            continue;
        }
        for path in used(&code) {
            let other = part(&path, 0);
            if other != own {
                assert!(place(LAYERS, other) < place(LAYERS, own), "`{name}` must not import `{path}`");
                seen += 1;
            }
        }
    }
    assert!(seen > 100, "the imports were found: {seen}");
}

#[test]
fn a_room_of_the_engine_imports_only_from_the_rooms_above_it() {
    let mut seen = 0;
    for (name, code) in modules(&src().join("engine")).into_iter().filter(|(name, _)| name != "engine") {
        let own = part(&name, 1);
        for path in used(&code).iter().filter(|path| part(path, 0) == "engine") {
            let other = part(path, 1);
            // A visibility names the engine itself.
            if !other.is_empty() && other != own {
                assert!(place(ROOMS, other) < place(ROOMS, own), "`{name}` must not import `{path}`");
                seen += 1;
            }
        }
    }
    assert!(seen > 30, "the imports were found: {seen}");
}

#[test]
fn no_two_files_import_each_other() {
    let circle = circle();
    assert!(circle.is_empty(), "these import each other: {circle:?}");
}

/// The files that import each other, however far round. A front page with `mod` or `pub mod` is left out: its files import what it defines.
fn circle() -> BTreeSet<String> {
    let modules = modules(&src());
    let names: BTreeSet<&str> = modules.iter().map(|(name, _)| name.as_str()).collect();
    // The longest module that a path begins with.
    let module_of = |path: &str| {
        let parts: Vec<&str> = path.split("::").collect();
        (1..=parts.len()).rev().map(|length| parts[..length].join("::")).find(|name| names.contains(name.as_str()))
    };
    let mut left: BTreeMap<String, BTreeSet<String>> = modules
        .iter()
        .filter(|(_, code)| {
            !code.lines().any(|line| line.trim_start().starts_with("mod ") || line.starts_with("pub mod "))
        })
        .map(|(name, code)| {
            let others = used(code).into_iter().filter_map(|path| module_of(&path)).filter(|other| other != name);
            (name.clone(), others.collect())
        })
        .collect();
    assert!(left.len() > 100, "the files were found: {left:?}");
    // Whoever imports none of the others, or is imported by none, is in no circle.
    while let Some(free) = left.iter().find_map(|(name, others)| {
        let imports = others.iter().any(|other| left.contains_key(other));
        let is_imported = left.values().any(|others| others.contains(name));
        (!imports || !is_imported).then(|| name.clone())
    }) {
        left.remove(&free);
    }
    left.into_keys().collect()
}

/// The types that code defines, also inside functions, but for the associated types of traits.
fn types(code: &str) -> impl Iterator<Item = &str> {
    code.lines().filter_map(|line| {
        let bare = line.trim_start();
        let bare = match bare.strip_prefix("pub(") {
            Some(rest) => rest.split_once(") ")?.1,
            None => bare.strip_prefix("pub ").unwrap_or(bare),
        };
        let (kind, rest) = bare.split_once(' ')?;
        let is_type = ["struct", "enum", "trait"].contains(&kind) || (kind == "type" && !line.starts_with(' '));
        let name = rest.split(|c: char| !c.is_alphanumeric() && c != '_').next()?;
        (is_type && !name.is_empty()).then_some(name)
    })
}

#[test]
fn a_type_name_stands_for_one_thing() {
    let modules = modules(&src());
    let mut places: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (module, code) in &modules {
        types(code).for_each(|name| places.entry(name).or_default().push(module));
    }
    assert!(places.len() > 300, "the types were found: {}", places.len());
    places.retain(|_, places| places.len() > 1);
    assert!(places.is_empty(), "these names stand for several types: {places:#?}");
}
