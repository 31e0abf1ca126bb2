//! Every code block of the documents runs as it stands there, against servers of the test's own; only addresses are replaced. A block that
//! cannot run here is listed with the reason and with what covers it. One that is neither is a failure.
//!
//! Commands in the text around the blocks are only parsed, by `tests/docs.rs`, but for the few that belong to a block.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};
use tokio::time::timeout;

use crate::keep::keep_run;
use crate::support::clients::{client, client_if_there, root};
use crate::support::daemon::{Daemon, PROJECT, instance};
use crate::support::documents::{Block, blocks, spans};
use crate::support::hook::Hook;
use crate::support::keyspace::Keyspace;
use crate::support::postgres::Postgres;
use crate::support::run::Run;
use crate::support::server::{Server, pair, until_copied};
use crate::support::{PATIENCE, free_port, probe, signal, skipped, without_settings};

/// What a block is for. Blocks of one document with the same use run together, in their order.
#[derive(Debug, PartialEq)]
enum Use {
    FirstCommands,
    Rights,
    OneTest,
    Service,
    Bound,
    Notification,
    Chart,
    Fleet,
    /// It does not run here.
    Covered {
        why: &'static str,
        by: &'static str,
    },
}
use Use::{Bound, Chart, Covered, FirstCommands, Fleet, Notification, OneTest, Rights, Service};

/// Every block: its document, how it begins, and its use.
const BLOCKS: &[(&str, &str, Use)] = &[
    (
        "README.md",
        "make demo",
        Covered {
            why: "`make test` would run itself, and the demo is built for release",
            by: ".ci/run and tests/it/demo.rs",
        },
    ),
    (
        "README.md",
        "keys  expired  used memory",
        Covered {
            why: "output of a demo of minutes",
            by: "tests/it/doc_blocks.rs compares it with the snapshot of src/cli/demo.rs",
        },
    ),
    ("README.md", "ttlsweep check", FirstCommands),
    ("README.md", "done    scanned", FirstCommands),
    ("README.md", "ACL SETUSER", Rights),
    ("CONTRIBUTING.md", "scripts/servers.sh fetch", OneTest),
    ("docs/fleet.md", "include = ", Fleet),
    ("docs/fleet.md", "CREATE ROLE", Fleet),
    ("docs/how-it-works.md", "ACL SETUSER", Rights),
    ("docs/how-it-works.md", "cli, api, scheduler", Covered { why: "a drawing", by: "tests/layers.rs" }),
    ("docs/operations.md", "ttlsweep settings check", Service),
    ("docs/operations.md", "# pip install", Service),
    ("docs/operations.md", "curl ", Service),
    ("docs/operations.md", "[instances.keep]", Bound),
    ("docs/operations.md", "{\"type\": \"task_failed\"", Notification),
    ("docs/operations.md", "helm install", Chart),
];

/// Makes a test of each document, so that none is left out.
macro_rules! documents {
    ($($test:ident: $document:literal,)*) => {
        const DOCUMENTS: &[&str] = &[$($document),*];
        $(
            #[tokio::test]
            async fn $test() {
                run_blocks_of($document).await;
            }
        )*
    };
}

documents! {
    the_blocks_of_the_readme_run: "README.md",
    the_blocks_for_contributors_run: "CONTRIBUTING.md",
    the_blocks_about_several_daemons_run: "docs/fleet.md",
    the_blocks_about_how_it_works_run: "docs/how-it-works.md",
    the_blocks_of_the_operators_guide_run: "docs/operations.md",
}

#[test]
fn every_block_of_every_document_runs_or_is_listed_with_what_covers_it() {
    let mut blocks = blocks();
    for (document, beginning, of) in BLOCKS {
        let listed = |block: &Block| block.document == Path::new(document) && is_of(block, beginning);
        assert_eq!(blocks.extract_if(.., |block| listed(block)).count(), 1, "{document}: `{beginning}`");
        assert!(DOCUMENTS.contains(document), "{document} has no test");
        if let Covered { why, by } = of {
            let file = by.split(' ').next().expect("a path");
            assert!(!why.is_empty() && root().join(file).exists(), "{document}: `{beginning}`: {by}");
        }
    }
    assert!(blocks.is_empty(), "these blocks neither run nor are listed: {blocks:#?}");
}

fn is_of(block: &Block, beginning: &str) -> bool {
    block.text.trim_start().starts_with(beginning)
}

async fn run_blocks_of(document: &str) {
    let blocks = blocks();
    let mut runs: Vec<(&Use, Vec<&str>)> = Vec::new();
    for block in blocks.iter().filter(|block| block.document == Path::new(document)) {
        let row = BLOCKS.iter().find(|(of, beginning, _)| *of == document && is_of(block, beginning));
        let (_, _, of) = row.unwrap_or_else(|| panic!("{document}: no test runs this block:\n{}", block.text));
        match runs.iter_mut().find(|(known, _)| *known == of) {
            Some((_, together)) => together.push(&block.text),
            None => runs.push((of, vec![&block.text])),
        }
    }
    for (of, blocks) in runs {
        match (of, &blocks[..]) {
            (FirstCommands, [commands, table]) => first_commands(commands, table).await,
            (Rights, [line]) => rights(line).await,
            (OneTest, [commands]) => one_test(commands).await,
            (Service, [commands, python, curl]) => daemon(commands, python, curl).await,
            (Bound, [settings]) => bound(settings).await,
            (Notification, [event]) => notification(event).await,
            (Chart, [command]) => chart(command).await,
            (Fleet, [settings, sql]) => fleet(settings, sql).await,
            (Covered { .. }, _) => {}
            (of, blocks) => panic!("{document}: {of:?} has {} blocks", blocks.len()),
        }
    }
}

/// A folder to run documented lines in, by a shell that finds `ttlsweep` as if it were installed.
struct Shell {
    folder: TempDir,
    variables: Vec<(&'static str, String)>,
}

impl Shell {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("ttlsweep-documents-").tempdir().expect("a temporary folder");
        let shell = Self { folder, variables: Vec::new() };
        std::fs::create_dir(shell.path("bin")).expect("a folder");
        shell.install("ttlsweep", Path::new(env!("CARGO_BIN_EXE_ttlsweep")));
        // An answer that is no success has to end the line as a failure.
        shell.write(".curlrc", "fail\nsilent\nshow-error\nnoproxy = \"*\"\n");
        let home = shell.path("").display().to_string();
        shell.with("CURL_HOME", &home)
    }

    fn with(mut self, variable: &'static str, value: &str) -> Self {
        self.variables.push((variable, value.to_owned()));
        self
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("it is written");
    }

    fn install(&self, name: &str, program: &Path) {
        symlink(program, self.path("bin").join(name)).expect("a link");
    }

    fn command(&self, lines: &str) -> tokio::process::Command {
        let mut command = Command::new("sh");
        without_settings(&mut command);
        let others = std::env::var("PATH").expect("a PATH");
        command.env("PATH", format!("{}:{others}", self.path("bin").display()));
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command.args(["-e", "-c", lines]).current_dir(self.folder.path()).stdin(Stdio::null());
        let mut command = tokio::process::Command::from(command);
        command.kill_on_drop(true);
        command
    }

    /// Runs lines to their end, and panics unless it is a success.
    async fn run(&self, lines: &str) -> Run {
        ended(lines, self.command(lines)).await
    }
}

async fn ended(lines: &str, mut command: tokio::process::Command) -> Run {
    let output = timeout(2 * PATIENCE, command.output()).await.unwrap_or_else(|_| panic!("`{lines}` hangs"));
    let run = Run::from(output.expect("a shell"));
    assert_eq!(run.code, Some(0), "`{lines}`: {run:#?}");
    run
}

/// Whether a program is on the PATH; if not, a part of the test is reported as skipped.
fn has(program: &str) -> bool {
    let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output().expect("a shell");
    if !found.status.success() {
        skipped(&format!("{program} is not on the PATH"));
    }
    found.status.success()
}

/// The command of a document's text that begins like this.
fn span(document: &str, beginning: &str) -> String {
    let first = beginning.split(' ').next().expect("a word");
    let mut found =
        spans(first).into_iter().filter(|(of, span)| of == Path::new(document) && span.starts_with(beginning));
    found.next().unwrap_or_else(|| panic!("{document} has no `{beginning}`")).1
}

/// The words of each line, with `#` for every one that has a digit.
fn form(text: &str) -> Vec<Vec<&str>> {
    let is_figure = |word: &str| word.contains(|c: char| c.is_ascii_digit());
    let words = text.lines().map(str::split_whitespace);
    words.map(|words| words.map(|word| if is_figure(word) { "#" } else { word }).collect()).collect()
}

/// Panics unless the text has lines of the same form, one after the other.
#[track_caller]
fn assert_has_form(text: &str, documented: &str) {
    let (lines, form) = (form(text), form(documented));
    assert!(lines.windows(form.len()).any(|lines| lines == form), "{documented}\nis not of the form of\n{text}");
}

#[test]
fn the_demo_prints_what_the_readme_shows() {
    let snapshot = "src/cli/snapshots/ttlsweep__cli__demo__tests__before_and_after_stand_side_by_side.snap";
    let printed = std::fs::read_to_string(root().join(snapshot)).expect("the snapshot");
    let blocks = blocks();
    let shown = blocks.iter().find(|block| is_of(block, "keys  expired  used memory")).expect("the block");
    assert_has_form(&printed, &shown.text);
}

async fn first_commands(commands: &str, table: &str) {
    let (master, replica) = pair().await;
    let keys = Keyspace::of(&master, 0);
    keys.expired(200, "expired:").await;
    keys.live_ttl(1_000, "live:").await;
    until_copied(&master, &replica).await;
    let shell = Shell::new();
    let mut ran = Vec::new();
    for line in commands.replace("redis://cache:6379", &master.url()).lines() {
        let name = line.split(' ').nth(1).expect("a subcommand");
        // It would run until a signal.
        let line = if name == "keep" { line.replacen("keep ", "keep --for 1s ", 1) } else { line.to_owned() };
        let shown = shell.run(&line).await;
        assert!(shown.stdout.len() + shown.stderr.len() > 0, "{line}");
        if name == "scan" {
            assert_eq!(master.dbsize(0).await, 1_000, "the expired keys are reclaimed");
            assert_has_form(&shown.stdout, table);
        }
        ran.push(name.to_owned());
    }
    assert_eq!(ran, ["check", "scan", "keep", "forecast"]);
}

/// The user that the line makes can sweep; `rights.rs` checks that it can do nothing else.
async fn rights(line: &str) {
    if !has("redis-cli") {
        return;
    }
    let (server, shell) = (Server::start().await, Shell::new());
    Keyspace::of(&server, 0).expired(200, "expired:").await;
    let client = format!("redis-cli -p {}", server.port());
    // Quoted for the shell, and for the client's own prompt.
    for granted in [format!("{client} {line}"), format!("{client} <<'END'\n{line}END\n")] {
        server.cmd(&["ACL", "DELUSER", "ttlsweep"]).await;
        assert_eq!(shell.run(&granted).await.stdout.trim(), "OK", "{granted}");
    }
    let scan = span("docs/how-it-works.md", "REDISCLI_AUTH=PASSWORD ttlsweep scan");
    shell.run(&scan.replace("cache:6379", &server.addr().to_string())).await;
    assert_eq!(server.dbsize(0).await, 0);
}

/// The commands start the tests that they name, on the server that they name. Here these tests are only listed: the matrix runs them.
async fn one_test(commands: &str) {
    let path = Command::new(root().join("scripts/servers.sh")).args(["path", "redis-7.0"]).output().expect("it runs");
    let server = PathBuf::from(String::from_utf8(path.stdout).expect("a path").trim());
    if !server.exists() {
        return skipped("redis-7.0 is not there (scripts/servers.sh fetch redis-7.0)");
    }
    let shell = Shell::new();
    // In place of cargo, which would build all of this again: this very test program.
    let cargo = "#!/bin/sh\n[ \"$1 $2 $3\" = 'test --test it' ] || exit 1\nshift 3\n\
        command -v redis-server\necho \"$TTLSWEEP_TEST_SERVER\"\nexec \"$THIS\" \"$@\" --list\n";
    shell.write("bin/cargo", cargo);
    let shell = shell.with("THIS", std::env::current_exe().expect("its path").to_str().expect("text"));
    shell.run("chmod +x bin/cargo").await;
    let mut command = shell.command(commands);
    command.current_dir(root());
    let said = ended(commands, command).await.stdout;
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[..2].iter().map(Path::new).collect::<Vec<_>>(), [&server, &server]);
    assert!(lines.iter().filter(|line| line.starts_with("walks::") && line.ends_with(": test")).count() > 3, "{said}");
}

/// A daemon that a documented line has started, and the address that it says.
struct Started {
    child: Child,
    said: String,
    /// Open as long as it runs: it may say more.
    _stdout: Lines<BufReader<ChildStdout>>,
}

impl Started {
    async fn by(shell: &Shell, line: &str) -> Self {
        let mut command = shell.command(&format!("exec 2>log\nexec {line}"));
        let mut child = command.stdout(Stdio::piped()).spawn().expect("a shell");
        let mut stdout = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let said = timeout(PATIENCE, stdout.next_line()).await.expect("it says where it listens").expect("text");
        let said = said.unwrap_or_else(|| panic!("{}", std::fs::read_to_string(shell.path("log")).unwrap_or_default()));
        Self { child, said, _stdout: stdout }
    }

    fn url(&self) -> &str {
        self.said.strip_prefix("listening on ").expect("an address")
    }

    async fn stop(mut self) {
        signal(self.child.id().expect("it runs"), "TERM");
        let status = timeout(PATIENCE, self.child.wait()).await.expect("it stops").expect("its own child");
        assert!(status.success(), "{status}");
    }
}

/// The example file with a server and with credentials for each client; then the SDK and curl.
async fn daemon(commands: &str, python: &str, curl: &str) {
    const GUIDE: &str = "docs/operations.md";
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(200, "expired:").await;
    let shell = Shell::new().with("TOKEN", "TOKEN").with("PROJECT", PROJECT);
    let hash = shell.run(&span(GUIDE, "printf %s TOKEN")).await.stdout;
    let hash = hash.split(' ').next().expect("the hash");
    let example = std::fs::read_to_string(root().join("deploy/ttlsweep.toml")).expect("the example");
    let example = example.replace("127.0.0.1:8080", "127.0.0.1:0").replace("redis://127.0.0.1:6379", &server.url());
    // Its schedule must not begin a sweep meanwhile.
    let example = example.replace("enabled = true", "enabled = false");
    shell.write("secret", "SKEXAMPLE\n");
    let of = |name: &str| format!("name = \"{name}\"\nrole = \"operator\"\nprojects = [\"{PROJECT}\"]\n");
    let token = format!("[[api.tokens]]\n{}sha256 = \"{hash}\"\n", of("curl"));
    let key = format!("[[api.keys]]\n{}access = \"AKEXAMPLE\"\nsecret-file = \"secret\"\n", of("sdk"));
    shell.write("ttlsweep.toml", &format!("{example}\n{token}{key}"));

    let [check, serve] = commands.lines().collect::<Vec<_>>()[..] else { panic!("{commands}") };
    shell.run(check).await;
    let daemon = Started::by(&shell, serve).await;
    let url = daemon.url().to_owned();
    let port = url.rsplit(':').next().expect("a port");
    assert!(serve.contains(&daemon.said.replace(port, "8080")), "{serve}: {}", daemon.said);

    let at_daemon = |lines: &str| lines.replace("http://127.0.0.1:8080", &url);
    let curls = at_daemon(curl);
    let [create, history] = curls.lines().collect::<Vec<_>>()[..] else { panic!("{curl}") };
    let answer = async |line: &str| -> Value { serde_json::from_str(&shell.run(line).await.stdout).expect("JSON") };
    let swept = async |times: usize| {
        probe("the history has the sweep", PATIENCE, async || {
            let history = answer(history).await;
            let records = history["records"].as_array().expect("records");
            records.len() == times && records.iter().all(|record| record["status"] == "success")
        })
        .await;
    };
    let given = format!("ak, sk, project_id = \"AKEXAMPLE\", \"SKEXAMPLE\", \"{PROJECT}\"\n{}", at_daemon(python));
    shell.write("client.py", &given);
    let with_sdk = format!("{} client.py", client("python").display());
    let has_curl = has("curl");
    shell.run(&with_sdk).await;
    if has_curl {
        swept(1).await;
        assert_eq!(server.dbsize(0).await, 0, "the SDK has begun a sweep");
        assert_eq!(answer(create).await["status"], "waiting");
        swept(2).await;
    }
    daemon.stop().await;
}

async fn bound(settings: &str) {
    let server = Server::start().await;
    let daemon = Daemon::start(&instance("session-cache", &server.url(), settings)).await;
    keep_run(&daemon).await;
    let shown = daemon.get("/api/v1/instances/session-cache").await.ok();
    assert_eq!(shown["keep"], json!({"max_backlog": "5%", "max_delay": "2s"}));
}

/// A real event has every documented field.
async fn notification(event: &str) {
    let hook = Hook::start(&[]).await;
    let gone = format!("redis://127.0.0.1:{}", free_port());
    let gone = instance("session-cache", &gone, "retry-for = \"1ms\"");
    let daemon = Daemon::start(&format!("[notify]\nurl = \"{}\"\n{gone}", hook.url())).await;
    daemon.scan("session-cache").await;
    let sent = hook.wait_for(1).await.remove(0).json();
    assert_has_fields(&sent, &serde_json::from_str(event).expect("JSON"));
    assert_eq!(sent["data"]["instance_id"], "session-cache");
}

/// A documented text that ends in `...` is the beginning of the real one.
#[track_caller]
fn assert_has_fields(real: &Value, documented: &Value) {
    match documented {
        Value::Object(fields) => {
            for (name, documented) in fields {
                assert_has_fields(real.get(name).unwrap_or_else(|| panic!("no {name}: {real:#}")), documented);
            }
        }
        Value::String(text) => {
            let begins = text.strip_suffix("...").unwrap_or_default();
            assert!(real.as_str().is_some_and(|real| real.starts_with(begins)), "{documented}: {real}");
        }
        other => assert!(other.is_number() && real.is_number(), "{documented}: {real}"),
    }
}

/// Without a cluster: what would be installed is rendered, by the same words but one.
async fn chart(command: &str) {
    let Some(helm) = client_if_there("helm").filter(|path| path.is_file()) else {
        return skipped("helm is not on this machine");
    };
    let shell = Shell::new();
    shell.install("helm", &helm);
    symlink(root().join("deploy"), shell.path("deploy")).expect("a link");
    symlink(root().join("deploy/helm/ttlsweep/ci/full.yaml"), shell.path("mine.yaml")).expect("a link");
    let rendered = shell.run(&command.replace("helm install", "helm template")).await.stdout;
    assert!(rendered.contains("kind: Deployment"), "{rendered}");
}

/// A database as the SQL makes it, the records of one daemon copied to it, and a daemon with the settings.
async fn fleet(settings: &str, sql: &str) {
    const PASSWORD: &str = "of the records";
    let Some(postgres) = Postgres::start().await else { return };
    let mut admin = postgres.administered().await;
    // CREATE DATABASE has to be alone.
    for statement in sql.replace("...", PASSWORD).split_inclusive(";\n") {
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&mut admin).await.expect("it is valid");
    }
    let server = Server::start().await;
    Keyspace::of(&server, 0).expired(200, "expired:").await;
    let at_test = |text: &str| {
        let database = format!("127.0.0.1:{}", postgres.port());
        text.replace("db.example", &database).replace("sslmode=verify-full", "sslmode=disable")
    };

    let shell = Shell::new().with("PGPASSWORD", PASSWORD);
    shell.run(&format!("ttlsweep scan {} --state ttlsweep.db", server.url())).await;
    let copied = shell.run(&at_test(&span("docs/fleet.md", "ttlsweep store copy"))).await;
    assert!(copied.stdout.contains("1 tasks that reclaimed 200 keys"), "{copied:?}");

    let daemon = Daemon::prepare("").with_token("secret");
    let settings_file = daemon.settings_path();
    let folder = settings_file.parent().expect("a folder");
    std::fs::create_dir(folder.join("instances.d")).expect("a folder");
    std::fs::write(folder.join("instances.d/one.toml"), instance("cache", &server.url(), "")).expect("written");
    std::fs::write(folder.join("records-password"), PASSWORD).expect("written");
    let token = "name = \"ops\"\nrole = \"operator\"\nprojects = [\"*\"]\n\
        sha256 = \"2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b\"\n";
    let settings = at_test(settings).replace("0.0.0.0:8080", "127.0.0.1:0");
    let settings = ["/etc/ttlsweep", "/var/lib/ttlsweep"]
        .iter()
        .fold(settings, |settings, documented| settings.replace(documented, &folder.display().to_string()));
    daemon.write_settings(&format!("{settings}[[api.tokens]]\n{token}"));
    shell.run(&format!("ttlsweep settings check {}", settings_file.display())).await;
    let daemon = daemon.launched(|command| command).await;
    let id = daemon.scan("cache").await;
    daemon.until(&id, "succeeded").await;
    let tasks = daemon.get("/api/v1/tasks").await.ok();
    assert_eq!(tasks["count"], 2, "with the one that was copied: {tasks:#}");
}
