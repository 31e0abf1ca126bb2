//! The documents say what is: their links lead somewhere, their tables know every setting, reason, exit code and metric, and their
//! commands are ones that the program takes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use pulldown_cmark::{CodeBlockKind, Event, Parser, Tag, TagEnd};
use ttlsweep::model::throttle::Reason;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every document, by its path.
fn documents() -> Vec<(PathBuf, String)> {
    let folders = [root(), root().join("docs")];
    let files = folders.iter().flat_map(|folder| std::fs::read_dir(folder).expect("a folder").flatten());
    let paths = files.map(|file| file.path()).filter(|path| path.extension().is_some_and(|ext| ext == "md"));
    paths.map(|path| (path.clone(), read(&path))).collect()
}

fn reference() -> String {
    read(&root().join("docs/reference.md"))
}

/// The anchors that a renderer makes of the headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let (mut anchors, mut heading) = (BTreeSet::new(), None::<String>);
    for event in Parser::new(text) {
        match event {
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::Text(part) | Event::Code(part) => {
                if let Some(heading) = &mut heading {
                    heading.push_str(&part);
                }
            }
            Event::End(TagEnd::Heading(_)) => {
                let heading = heading.take().unwrap_or_default().to_lowercase();
                let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
                anchors.insert(kept.collect::<String>().replace(' ', "-"));
            }
            _ => {}
        }
    }
    anchors
}

/// The code blocks in this language.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let (mut blocks, mut block) = (Vec::new(), None::<String>);
    for event in Parser::new(text) {
        match event {
            Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(info))) if &*info == language => {
                block = Some(String::new())
            }
            Event::Text(part) => {
                if let Some(block) = &mut block {
                    block.push_str(&part);
                }
            }
            Event::End(TagEnd::CodeBlock) => blocks.extend(block.take()),
            _ => {}
        }
    }
    blocks
}

#[test]
fn every_link_inside_the_repository_leads_somewhere() {
    for (path, text) in documents() {
        for event in Parser::new(&text) {
            let Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) = event else { continue };
            if dest_url.contains("://") {
                continue;
            }
            let (file, anchor) = dest_url.split_once('#').unwrap_or((&dest_url, ""));
            let target = if file.is_empty() { path.clone() } else { path.parent().expect("a folder").join(file) };
            assert!(target.exists(), "{}: {dest_url} is not there", path.display());
            assert!(
                anchor.is_empty() || anchors(&read(&target)).contains(anchor),
                "{}: {dest_url} names no heading",
                path.display()
            );
        }
    }
}

#[test]
fn the_reference_knows_every_setting_reason_exit_code_and_metric() {
    let reference = reference();
    for key in ttlsweep::settings::raw::KEYS.iter() {
        assert!(reference.contains(&format!("`{key}`")), "the setting `{key}` is missing");
    }
    for reason in Reason::ALL {
        assert!(reference.contains(&format!("`{reason}`")), "the reason `{reason}` is missing");
    }
    for line in ttlsweep::cli::exit::HELP.lines().skip(1) {
        let code = line.split_whitespace().next().expect("a code");
        assert!(reference.contains(&format!("| {code} |")), "the exit code {code} is missing");
    }
    let metrics = ttlsweep::metrics::Metrics::default().encode_classic();
    let families = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ttlsweep_")?.split(' ').next());
    for family in families {
        assert!(reference.contains(family), "the metric {family} is missing");
    }
}

#[test]
fn the_defaults_of_the_reference_are_those_in_force() {
    let defaults: toml::Table = read(&root().join("src/settings/default.toml")).parse().expect("TOML");
    let reference = reference();
    let rows = reference.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| `")?.split(" | ");
        Some((cells.next()?.trim_end_matches('`').to_owned(), cells.next()?.to_owned()))
    });
    let rows: std::collections::BTreeMap<_, _> = rows.collect();
    let mut compared = 0;
    for (key, value) in &defaults {
        let Some(told) = rows.get(key.as_str()) else { continue };
        let value = match value {
            toml::Value::String(text) if !text.is_empty() => text.clone(),
            toml::Value::Integer(number) => number.to_string(),
            toml::Value::Float(number) => number.to_string(),
            toml::Value::Boolean(yes) => yes.to_string(),
            _ => continue,
        };
        assert!(told.trim_matches('`') == value, "{key} is {value}, and the reference says {told}");
        compared += 1;
    }
    assert!(compared >= 12, "only {compared} defaults were compared");
}

#[test]
fn every_command_of_the_documents_is_one_that_the_program_takes() {
    let mut tried = 0;
    for (path, text) in documents() {
        for line in blocks(&text, "sh").iter().flat_map(|block| block.lines()) {
            let line = line.split('#').next().unwrap_or_default().trim();
            let words = line.split_whitespace().skip_while(|word| word.contains('=') && !word.starts_with('-'));
            let words: Vec<&str> = words.collect();
            if words.first() != Some(&"ttlsweep") {
                continue;
            }
            let parsed = ttlsweep::cli::Cli::command().try_get_matches_from(&words);
            assert!(parsed.is_ok(), "{}: {line}: {}", path.display(), parsed.expect_err("it was refused"));
            tried += 1;
        }
    }
    assert!(tried >= 4, "only {tried} commands were found");
}

#[test]
fn the_readme_is_a_front_door_and_no_house() {
    let words = read(&root().join("README.md")).split_whitespace().count();
    assert!(words <= 900, "{words} words");
}
