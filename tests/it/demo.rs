//! `ttlsweep demo` prints correct numbers and leaves nothing behind.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::support::{PATIENCE, is_there, probe, signal, ttlsweep};

/// A demo with its own folder for temporary files, so that the test finds everything that it leaves.
struct Demo {
    tmp: TempDir,
    command: Command,
}

impl Demo {
    fn new(arguments: &[&str]) -> Self {
        let tmp = tempfile::Builder::new().prefix("ttlsweep-it-demo-").tempdir().expect("a temporary folder");
        let mut command = ttlsweep();
        command.arg("demo").args(arguments).env("TMPDIR", tmp.path()).env("TTLSWEEP_DEMO_SERVER", server());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { tmp, command }
    }

    /// Runs the demo to its end. Returns exit code, stdout and stderr.
    fn run(&mut self) -> (i32, String, String) {
        let output = self.command.output().expect("the program runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().expect("no signal"), text(&output.stdout), text(&output.stderr))
    }

    /// Starts the demo and waits until it watches its server. Returns the server's process id too.
    fn start_watching(&mut self) -> (Child, u32) {
        let mut child = self.command.spawn().expect("the program runs");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let mut pid = None;
        for line in lines.by_ref().map_while(Result::ok) {
            if let Some((_, rest)) = line.split_once(" pid ") {
                pid = rest.split(',').next().and_then(|pid| pid.parse().ok());
            }
            if line.contains("reclaimed per second") {
                break;
            }
        }
        // The rest of its output is discarded, and the pipe stays open.
        std::thread::spawn(move || lines.for_each(drop));
        match pid {
            Some(pid) => (child, pid),
            None => panic!("it ended before it watched: {:?}", child.wait()),
        }
    }

    /// Waits until no process and no file of the demo is left.
    async fn nothing_is_left(&self) {
        probe("the demo's folder is empty", PATIENCE, async || {
            std::fs::read_dir(self.tmp.path()).expect("the folder").next().is_none()
        })
        .await;
        probe("the demo's processes have ended", PATIENCE, async || self.processes().is_empty()).await;
    }

    /// Processes that run in the demo's folder, or name it in their environment or arguments (needs /proc).
    fn processes(&self) -> Vec<PathBuf> {
        let folder = self.tmp.path();
        let name = folder.to_str().expect("a plain name").as_bytes();
        let holds = |path: &Path| std::fs::read(path).is_ok_and(|text| text.windows(name.len()).any(|w| w == name));
        let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
        let processes = processes.filter_map(|entry| entry.ok().map(|entry| entry.path()));
        let ours = |process: &PathBuf| {
            std::fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd.starts_with(folder))
                || holds(&process.join("cmdline"))
                || holds(&process.join("environ"))
        };
        processes.filter(ours).collect()
    }
}

/// The server under test.
fn server() -> PathBuf {
    std::env::var_os("TTLSWEEP_TEST_SERVER").map_or_else(|| "redis-server".into(), PathBuf::from)
}

/// The number that follows a word at the start of a line, such as `before  19,990`.
fn numbers(text: &str, word: &str) -> Vec<u64> {
    let line = text.lines().find(|line| line.starts_with(word)).unwrap_or_else(|| panic!("no `{word}` in {text}"));
    let words = line.split_whitespace().map(|word| word.replace(',', ""));
    words.filter_map(|word| word.parse().ok()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_frees_the_expired_keys_and_keeps_the_live_ones() {
    let mut demo = Demo::new(&["--keys", "20000", "--watch", "1s"]);
    let (code, stdout, stderr) = demo.run();
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(stderr.contains("writing 20,000 keys with a TTL, of which 1,600 expire now"), "{stderr}");
    let (before, after) = (numbers(&stdout, "before"), numbers(&stdout, "after"));
    assert_eq!(after[..2], [18_400, 0], "{stdout}");
    let [keys, expired] = before[..2] else { panic!("{stdout}") };
    assert_eq!(keys, 18_400 + expired);
    // Active expiry takes some of them while they are written and watched; most are left for the sweep.
    assert!((800..=1_600).contains(&expired), "{stdout}");
    let swept = numbers(&stdout, "done:")[0];
    assert!(swept <= expired && swept > expired / 2, "{stdout}");
    demo.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_of_a_cluster_sweeps_three_masters_and_leaves_nothing() {
    let mut demo = Demo::new(&["--cluster", "--keys", "20000", "--watch", "1s"]);
    let (code, stdout, stderr) = demo.run();
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert_eq!(stderr.matches("a private server: ").count(), 3, "{stderr}");
    assert_eq!(stdout.matches("\nslots ").count() + usize::from(stdout.starts_with("slots ")), 3, "{stdout}");
    assert_eq!(numbers(&stdout, "after")[1], 0, "{stdout}");
    assert!(numbers(&stdout, "done:")[0] >= 800, "{stdout}");
    demo.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_midway_leaves_nothing() {
    for name in ["INT", "TERM"] {
        let mut demo = Demo::new(&["--keys", "1000", "--watch", "10min"]);
        let (mut child, server) = demo.start_watching();
        assert!(is_there(server), "its server runs");
        assert!(!demo.processes().is_empty() || !Path::new("/proc/self").exists());
        signal(child.id(), name);
        let status = child.wait().expect("its own child");
        assert_eq!(status.code(), Some(130), "SIG{name}");
        assert!(!is_there(server), "its server has ended with it");
        demo.nothing_is_left().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn even_a_killed_demo_leaves_nothing() {
    let mut demo = Demo::new(&["--keys", "1000", "--watch", "10min"]);
    let (mut child, _) = demo.start_watching();
    child.kill().expect("its own child");
    let _ = child.wait();
    demo.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demo_whose_server_dies_says_so_and_leaves_nothing() {
    let mut demo = Demo::new(&["--keys", "1000", "--watch", "10min"]);
    let (mut child, server) = demo.start_watching();
    signal(server, "KILL");
    assert_eq!(child.wait().expect("its own child").code(), Some(1));
    demo.nothing_is_left().await;
}

#[test]
fn without_a_server_one_line_says_how_to_get_one() {
    let mut demo = Demo::new(&[]);
    demo.command.env_remove("TTLSWEEP_DEMO_SERVER").env("PATH", demo.tmp.path());
    let (code, stdout, stderr) = demo.run();
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains("apt install redis-server") && stderr.contains("brew install redis"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_is_no_server_is_an_error_and_leaves_nothing() {
    let script = tempfile::Builder::new().prefix("ttlsweep-it-script-").tempdir().expect("a folder");
    let path = write_script(script.path(), "echo 'bad directive: port'; exit 1");
    let missing = script.path().join("missing");
    for (program, says) in [(path, "bad directive: port"), (missing, "cannot run")] {
        let mut demo = Demo::new(&["--server", program.to_str().expect("a plain name")]);
        let (code, _, stderr) = demo.run();
        assert_eq!(code, 1, "{stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(says), "{stderr}");
        demo.nothing_is_left().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_taken_is_tried_again() {
    let script = tempfile::Builder::new().prefix("ttlsweep-it-script-").tempdir().expect("a folder");
    let real = server();
    let body = format!(
        "[ -e '{0}/tried' ] && exec '{1}' \"$@\"; : > '{0}/tried'; echo 'bind: Address already in use'; exit 1",
        script.path().display(),
        real.display()
    );
    let program = write_script(script.path(), &body);
    let mut demo =
        Demo::new(&["--keys", "1000", "--watch", "10ms", "--server", program.to_str().expect("a plain name")]);
    let (code, stdout, stderr) = demo.run();
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(script.path().join("tried").exists(), "the first try failed as it should");
    demo.nothing_is_left().await;
}

fn write_script(folder: &Path, body: &str) -> PathBuf {
    let path = folder.join("server");
    std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).expect("the script");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("executable");
    path
}
