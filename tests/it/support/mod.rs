//! The tools of the integration tests: real servers, known keyspaces, a network that misbehaves on command.
//!
//! Everything that is started ends when its handle is dropped.

#![allow(dead_code, reason = "a toolbox: not every test theme uses every tool")]

pub mod browser;
pub mod certs;
pub mod clients;
pub mod cluster;
pub mod daemon;
pub mod documents;
pub mod hook;
pub mod keyspace;
pub mod postgres;
pub mod proxy;
pub mod run;
pub mod server;
pub mod sharded;
pub mod standin;

use std::{
    io::Write,
    process::Command,
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tokio::time::Instant;

/// How often [`probe`] looks; short against everything that the tests wait for.
const PROBE_TICK: Duration = Duration::from_millis(5);

/// How long a test waits for what should take milliseconds: long, since the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `holds` returns true, and panics with `what` if it does not within `timeout`.
///
/// For the test's own task: the future of an async closure cannot be spawned.
pub async fn probe(what: &str, timeout: Duration, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + timeout;
    loop {
        // The condition itself may hang, on a server that is stopped for example.
        let answer = tokio::time::timeout_at(deadline, holds()).await;
        if answer == Ok(true) {
            return;
        }
        assert!(Instant::now() < deadline, "waited {timeout:?} in vain: {what}");
        tokio::time::sleep(PROBE_TICK).await;
    }
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reports that the running test, or a part of it, is skipped, and why. The test runner swallows the output of a passing test; this
/// bypasses it, and `make matrix` counts the lines.
pub fn skipped(why: &str) {
    let thread = std::thread::current();
    let line = format!("SKIPPED {}: {why}\n", thread.name().unwrap_or("a test"));
    // One write, so that lines of parallel tests stay whole.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Sends a signal by name, such as `TERM`, to a process that the test has started. No program is needed for it: a minimal system
/// has no `kill`.
#[track_caller]
pub fn signal(pid: u32, name: &str) {
    let signal = match name {
        "CONT" => Signal::CONT,
        "QUIT" => Signal::QUIT,
        "HUP" => Signal::HUP,
        "INT" => Signal::INT,
        "KILL" => Signal::KILL,
        "STOP" => Signal::STOP,
        "TERM" => Signal::TERM,
        other => panic!("no test sends SIG{other}"),
    };
    kill_process(process(pid), signal).unwrap_or_else(|error| panic!("SIG{name} cannot be sent to {pid}: {error}"));
}

/// Whether a process of this id exists, be it a zombie.
pub fn is_there(pid: u32) -> bool {
    test_kill_process(process(pid)).is_ok()
}

fn process(pid: u32) -> Pid {
    i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process id")
}

/// The command under test, without the settings and secrets in the environment. It runs at normal priority: on a busy
/// machine it would get no processor otherwise.
pub fn ttlsweep() -> Command {
    by(&[])
}

/// The same, started by other programs, such as `nohup`.
pub fn by(starters: &[&str]) -> Command {
    let program = env!("CARGO_BIN_EXE_ttlsweep");
    let mut words = starters.iter().copied().chain([program]);
    let mut command = Command::new(words.next().unwrap_or(program));
    command.args(words);
    without_settings(&mut command);
    command
}

/// Removes the program's settings and secrets from a command's environment.
pub fn without_settings(command: &mut Command) {
    command.env_remove("REDISCLI_AUTH");
    for (name, _) in std::env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text.starts_with("TTLSWEEP_") || name_text.starts_with("OTEL_") {
            command.env_remove(name);
        }
    }
    command.env("TTLSWEEP_PRIORITY", "normal");
}

/// Splits a documented command line as a shell does.
#[track_caller]
pub fn shell_words(line: &str) -> Vec<String> {
    let output = Command::new("sh").args(["-c", &format!("printf '%s\\n' {line}")]).output().expect("a shell");
    assert!(output.status.success() && output.stderr.is_empty(), "{line}: {output:?}");
    String::from_utf8(output.stdout).expect("UTF-8").lines().map(str::to_owned).collect()
}

/// A free TCP port of 127.0.0.1.
///
/// It is below 32768, outside of the range for outgoing connections: a server that is stopped for
/// a while finds its port still free, and a cluster bus (port + 10000) fits beside it.
/// The search begins at a place that depends on the process id, so that test processes seldom try the same port.
pub fn free_port() -> u16 {
    const FIRST: u16 = 11_000;
    const COUNT: u16 = 10_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = std::process::id().wrapping_mul(61) % u32::from(COUNT);
    for _ in 0..COUNT {
        let step = u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
        let offset = (start + step) % u32::from(COUNT);
        let port = FIRST + u16::try_from(offset).expect("below COUNT");
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port from {FIRST} on");
}
