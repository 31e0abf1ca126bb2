//! Holds the documents against the program, without a server: links lead somewhere, the tables list every setting with its default, every
//! reason, exit code and metric, and every command, call and settings block is accepted. `tests/it/doc_blocks.rs` runs the blocks.

#[path = "it/support/documents.rs"]
mod documents;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::CommandFactory;
use clap::error::ErrorKind;
use pulldown_cmark::{Event, Parser, Tag, TagEnd};
use ttlsweep::model::throttle::Reason;

use documents::{documents, spans};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
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

/// The code blocks of every document, in this language.
fn blocks(language: &str) -> Vec<(PathBuf, String)> {
    let blocks = documents::blocks().into_iter().filter(|block| block.language == language);
    blocks.map(|block| (block.document, block.text)).collect()
}

/// The path without the names in braces, the query and the brackets that mark what is optional.
fn bare(path: &str) -> String {
    let path = path.split('?').next().unwrap_or_default().replace(['[', ']'], "");
    let parts = path.split('/').map(|part| if part.starts_with('{') || part.starts_with('$') { "*" } else { part });
    parts.collect::<Vec<_>>().join("/").replace("/session-cache/", "/*/")
}

/// The paths of the API, from the table of its routes.
fn routes() -> BTreeSet<String> {
    let code = read(&root().join("src/api/mod.rs"));
    let literals = code.split('"').skip(1).step_by(2).filter(|literal| literal.starts_with('/'));
    literals.map(bare).collect()
}

fn assert_is_a_route(path: &Path, call: &str, routes: &BTreeSet<String>) {
    let call = bare(call);
    let found = match call.strip_prefix("...") {
        Some(end) => routes.iter().any(|route| route.ends_with(end)),
        None => routes.contains(&call),
    };
    assert!(found, "{}: {call} is no route", path.display());
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
            let path = root().join(&path);
            let target = if file.is_empty() { path.clone() } else { path.parent().expect("a folder").join(file) };
            assert!(target.exists(), "{}: {dest_url} does not exist", path.display());
            assert!(
                anchor.is_empty() || anchors(&read(&target)).contains(anchor),
                "{}: {dest_url} names no heading",
                path.display()
            );
        }
    }
}

/// The links that lead out of the repository.
fn external_links() -> BTreeSet<String> {
    let mut links = BTreeSet::new();
    for (_, text) in documents() {
        for event in Parser::new(&text) {
            if let Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) = event
                && dest_url.contains("://")
            {
                links.insert(dest_url.to_string());
            }
        }
    }
    links
}

#[test]
fn every_external_link_is_an_address_that_make_links_can_ask() {
    let links = external_links();
    for link in &links {
        let address = url::Url::parse(link);
        assert!(address.is_ok_and(|address| address.scheme() == "https" && address.has_host()), "{link}");
    }
    assert!(links.len() >= 3, "{links:?}");
}

#[test]
#[ignore = "asks other sites, which CI cannot reach: `make links` runs it"]
fn every_external_link_answers() {
    let answers = |link: &String| {
        let options = ["--silent", "--show-error", "--fail", "--location", "--max-time", "20", "--retry", "2"];
        let asked = Command::new("curl").args(options).args(["--output", "/dev/null", "--"]).arg(link).status();
        asked.expect("curl is there").success()
    };
    let silent: Vec<String> = external_links().into_iter().filter(|link| !answers(link)).collect();
    assert!(silent.is_empty(), "{silent:#?}");
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

/// The cell that shows a default in the reference.
fn shown(default: &toml::Value) -> String {
    match default {
        toml::Value::String(text) if text.contains("://") => format!("`{text}`"),
        toml::Value::String(text) => text.clone(),
        // A default that depends on the server or the URL is in the last column.
        toml::Value::Array(_) => String::new(),
        toml::Value::Integer(number) => number.to_string(),
        toml::Value::Float(number) => number.to_string(),
        toml::Value::Boolean(yes) => yes.to_string(),
        other => panic!("no row shows {other:?}"),
    }
}

/// The table of settings in the reference, made from `default.toml`: its keys, their defaults and the comment above them.
fn settings_table() -> String {
    let text = read(&root().join("src/settings/default.toml"));
    let defaults: toml::Table = text.parse().expect("TOML");
    let (mut comment, mut keys) = (Vec::new(), Vec::new());
    let mut table = "| key | default | |\n|---|---|---|\n".to_owned();
    for line in text.lines().chain([""]) {
        if let Some(words) = line.strip_prefix('#') {
            comment.push(words.trim());
        } else if let Some((key, _)) = line.split_once(" = ") {
            keys.push(key);
        } else {
            // A comment without keys below it is about the file.
            let comment = std::mem::take(&mut comment).join(" ");
            let keys = std::mem::take(&mut keys);
            let mut each: Vec<String> = keys.iter().map(|key| shown(&defaults[*key])).collect();
            each.dedup();
            let names: Vec<String> = keys.iter().map(|key| format!("`{key}`")).collect();
            if !keys.is_empty() {
                table += &format!("| {} | {} | {comment} |\n", names.join(", "), each.join(", "));
            }
        }
    }
    table
}

#[test]
fn the_settings_table_of_the_reference_is_made_from_the_defaults() {
    let reference = reference();
    let begins = reference.find("| key | default | |").expect("the table of settings");
    let length = reference[begins..].find("\n\n").expect("something follows it") + 1;
    let made = settings_table();
    let is_current = reference[begins..begins + length] == made;
    if !is_current && std::env::var_os("UPDATE_DOCS").is_some() {
        let (before, after) = (&reference[..begins], &reference[begins + length..]);
        std::fs::write(root().join("docs/reference.md"), format!("{before}{made}{after}")).expect("it can be written");
        return;
    }
    assert!(
        is_current,
        "docs/reference.md is behind default.toml: UPDATE_DOCS=1 cargo test --test docs, and look at the diff"
    );
}

#[test]
fn the_help_of_scan_names_the_default_of_each_setting() {
    let defaults: toml::Table = read(&root().join("src/settings/default.toml")).parse().expect("TOML");
    let command = ttlsweep::cli::Cli::command();
    let scan = command.find_subcommand("scan").expect("a subcommand");
    let mut compared = 0;
    for arg in scan.get_arguments() {
        let (Some(name), Some(help)) = (arg.get_long(), arg.get_help()) else { continue };
        let (Some(value), Some((_, said))) = (defaults.get(name), help.to_string().split_once("[default: ").map(owned))
        else {
            continue;
        };
        let value = shown(value);
        // What these mean is said in words.
        if !["auto", "", "0"].contains(&value.as_str()) {
            assert_eq!(said.trim_end_matches(']'), value, "--{name}");
            compared += 1;
        }
    }
    assert!(compared > 10, "{compared} defaults");
}

fn owned((one, other): (&str, &str)) -> (String, String) {
    (one.to_owned(), other.to_owned())
}

/// Whether the program accepts a command. The beginning of a longer command is accepted as well.
fn is_taken(words: &[String]) -> Result<(), clap::Error> {
    match ttlsweep::cli::Cli::command().try_get_matches_from(words) {
        Ok(_) => Ok(()),
        Err(error) => match error.kind() {
            ErrorKind::MissingRequiredArgument
            | ErrorKind::MissingSubcommand
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => Ok(()),
            _ => Err(error),
        },
    }
}

#[test]
fn every_command_block_is_one_that_would_run() {
    let routes = routes();
    let makefile = read(&root().join("Makefile"));
    let mut tried = 0;
    for (path, block) in blocks("sh") {
        for line in block.replace("\\\n", " ").lines() {
            let line = line.split(" #").next().unwrap_or_default().trim();
            let words: Vec<String> =
                words_of(line).into_iter().skip_while(|word| word.split('=').count() == 2).collect();
            let Some((program, arguments)) = words.split_first() else { continue };
            let place = path.display();
            match program.as_str() {
                "ttlsweep" => {
                    let taken = ttlsweep::cli::Cli::command().try_get_matches_from(&words);
                    assert!(taken.is_ok(), "{place}: {line}: {}", taken.expect_err("it was refused"));
                }
                "make" => assert!(makefile.contains(&format!("\n{}:", arguments[0])), "{place}: {line}"),
                "cargo" => assert!(root().join(format!("tests/{}", arguments[2])).exists(), "{place}: {line}"),
                "helm" => assert!(root().join(&arguments[2]).join("Chart.yaml").exists(), "{place}: {line}"),
                "curl" => {
                    let url = arguments.iter().find_map(|word| word.strip_prefix("http://127.0.0.1:8080"));
                    assert_is_a_route(&path, url.expect("the address of the daemon"), &routes);
                }
                script if script.starts_with("scripts/") => assert!(root().join(script).exists(), "{place}: {line}"),
                other => panic!("{place}: no check knows `{other}`"),
            }
            tried += 1;
        }
    }
    assert!(tried >= 12, "only {tried} commands were found");
}

/// Splits a line as a shell does, as far as the documents need it: quotes and `$(...)` hold words together.
fn words_of(line: &str) -> Vec<String> {
    let (mut words, mut quote) = (vec![String::new()], None);
    for c in line.chars() {
        match quote {
            Some(open) if c == open => quote = None,
            None if c == '(' => quote = Some(')'),
            None if c == '"' || c == '\'' => quote = Some(c),
            None if c == ' ' => words.push(String::new()),
            _ => words.last_mut().expect("a word").push(c),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[test]
fn every_command_in_the_text_is_one_that_the_program_takes() {
    let placeholders = [("N", "1"), ("SHARE", "0.5"), ("SIZE", "5%"), ("TIME", "1h"), ("SHELL", "bash")];
    let targets: BTreeSet<String> = read(&root().join("Makefile"))
        .lines()
        .filter_map(|line| line.split_once(':').filter(|_| !line.starts_with(['\t', '#', ' '])))
        .map(|(name, _)| name.to_owned())
        .collect();
    let commands = spans("ttlsweep");
    for (path, span) in &commands {
        let id = "00000000-0000-0000-0000-000000000000";
        let word = |word: &str| match placeholders.iter().find(|(name, _)| *name == word) {
            Some((_, value)) => (*value).to_owned(),
            None if word == "ID" && span.starts_with("ttlsweep task") => id.to_owned(),
            None => word.to_owned(),
        };
        let words: Vec<String> = span.replace(['[', ']'], "").split_whitespace().map(word).collect();
        assert!(is_taken(&words).is_ok(), "{}: {span}: {}", path.display(), is_taken(&words).unwrap_err());
    }
    assert!(commands.len() >= 40, "only {} commands were found", commands.len());
    for (path, span) in spans("make") {
        for target in span.split(' ').skip(1).take_while(|word| !word.contains('=')) {
            assert!(targets.contains(target), "{}: `{span}`: there is no target {target}", path.display());
        }
    }
}

#[test]
fn every_call_in_the_text_is_a_route_of_the_api() {
    let routes = routes();
    let mut tried = 0;
    for (path, call) in ["GET", "POST", "PUT", "PATCH", "DELETE"].into_iter().flat_map(spans) {
        let (_, target) = call.split_once(' ').expect("a method and a path");
        // The paths with and without what is in brackets.
        let optional = target.match_indices('[').map(|(at, _)| &target[..at]);
        for target in optional.chain([target]) {
            assert_is_a_route(&path, target, &routes);
            tried += 1;
        }
    }
    assert!(tried >= 20, "only {tried} calls were found");
}

#[test]
fn every_settings_block_is_accepted() {
    let instance = "[[instances]]\nid = \"a\"\nproject_id = \"p\"\nurl = \"redis://cache:6379\"\n";
    let token = "[[api.tokens]]\nsha256 = \"0000000000000000000000000000000000000000000000000000000000000000\"\nname = \"a\"\nrole = \"reader\"\nprojects = [\"p\"]\n";
    for (path, block) in blocks("toml") {
        let folder = tempfile::tempdir().expect("a folder");
        // A fragment is completed; files that it names lie beside it.
        let mut text = match block.contains("[instances.") {
            true => format!("{instance}{block}"),
            false => format!("{block}{instance}"),
        };
        if text.contains("0.0.0.0") {
            text = format!("{text}{token}");
        }
        text = text.replace("/etc/ttlsweep/", "").replace("instances.d/", "");
        std::fs::write(folder.path().join("records-password"), "secret\n").expect("a file");
        let file = folder.path().join("ttlsweep.settings");
        std::fs::write(&file, text).expect("a file");
        let program = env!("CARGO_BIN_EXE_ttlsweep");
        let checked = Command::new(program)
            .args(["settings", "check"])
            .arg(&file)
            .current_dir(folder.path())
            .output()
            .expect("the program");
        assert!(checked.status.success(), "{}: {}", path.display(), String::from_utf8_lossy(&checked.stderr));
    }
}

#[test]
fn every_acl_line_is_the_one_that_the_program_prints() {
    for (path, block) in blocks("text").into_iter().filter(|(_, block)| block.starts_with("ACL ")) {
        assert_eq!(block.trim(), ttlsweep::node::acl::ACL_LINE, "{}", path.display());
    }
}

#[test]
fn the_readme_stays_short() {
    let words = read(&root().join("README.md")).split_whitespace().count();
    assert!(words <= 900, "{words} words");
}
