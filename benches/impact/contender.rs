//! Who sweeps, and one pass of each.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::common::Server;
use super::wire::{Conn, encode};

/// What is given to `ttlsweep scan` beside the URL.
const DEFAULT: &[&str] = &[];
/// All of the server's time, whatever else the server does.
const INTENSITY_1: &[&str] = &["--intensity", "1"];
/// Given as well where the program knows it: there, even intensity 1 gives way when others suffer.
const NO_THROTTLE: &str = "--no-throttle";

/// COUNT of redis-cli, which it says in no option before 7.2.
const REDIS_CLI_COUNT: u32 = 10;

/// The clock of the cloud profile: one SCAN each 5 ms, so 200 a second.
const TICK: Duration = Duration::from_millis(5);

/// How often a program is asked whether it has ended.
const POLL: Duration = Duration::from_millis(2);

pub const NOBODY: &str = "no sweep";
/// What every other contender is compared with, beside no sweep.
pub const CLOUD: &str = "cloud profile, COUNT 1000";

#[derive(Clone, Copy)]
pub enum Sweep {
    Nobody,
    /// `ttlsweep scan` with these arguments.
    Ours {
        args: &'static [&'static str],
        no_throttle: bool,
    },
    /// One SCAN of this COUNT each 5 ms by the clock.
    Cloud(u32),
    /// `redis-cli --scan`, with --count or without.
    RedisCli(Option<u32>),
    /// SCANs of this COUNT back to back on a plain socket, the names dropped.
    BackToBack(u32),
    /// The same, and one TTL for each name, pipelined.
    TtlOfEach(u32),
    /// A pass of SCANs of COUNT 50 each 5 ms by the clock, over the hash space in segments out of order.
    Shuffled,
    /// SCANs of COUNT 100 back to back, and after so many keys, or at the end of the pass, this rest.
    Bursts {
        keys: u64,
        rest: Duration,
    },
    /// No sweep, but the server's own expiry at `active-expire-effort 10`.
    Effort10,
}

#[derive(Clone)]
pub struct Contender {
    pub name: &'static str,
    pub sweep: Sweep,
}

/// What one pass did, or the part of it that there was time for.
#[derive(Clone, Copy, Default)]
pub struct Pass {
    pub whole: bool,
    /// Keys looked at. For redis-cli, which does not say, its SCANs times its COUNT.
    pub scanned: u64,
    /// What it says itself.
    pub num: Option<u64>,
}

/// All of them, in the order of the tables.
pub fn all() -> Vec<Contender> {
    let ours = |args| Sweep::Ours { args, no_throttle: false };
    let no_throttle = help_of(&executable(), &["scan", "--help"]).contains(NO_THROTTLE);
    let counted_cli = help_of("redis-cli", &["--help"]).contains("--count");
    let mut contenders = vec![
        (NOBODY, Sweep::Nobody),
        ("ttlsweep, default", ours(DEFAULT)),
        ("ttlsweep, intensity 1 (--no-throttle)", Sweep::Ours { args: INTENSITY_1, no_throttle }),
        ("cloud profile, COUNT 50", Sweep::Cloud(50)),
        ("cloud profile, COUNT 100", Sweep::Cloud(100)),
        (CLOUD, Sweep::Cloud(1000)),
        ("redis-cli --scan", Sweep::RedisCli(None)),
        // Before 7.2 redis-cli has no --count, so the row says what was run in its place.
        match counted_cli {
            true => ("redis-cli --scan --count 1000", Sweep::RedisCli(Some(1000))),
            false => ("plain loop, COUNT 1000", Sweep::BackToBack(1000)),
        },
        ("COUNT 1000 and TTL of each", Sweep::TtlOfEach(1000)),
        ("active-expire-effort 10", Sweep::Effort10),
        // What might make a slow sweep harmless: the same 10,000 keys a second as the cloud profile's COUNT 50, in another order
        // or in bursts.
        ("COUNT 50 at 200/s, segments out of order", Sweep::Shuffled),
        ("bursts of 5,000 keys, rests of 0.5 s", Sweep::Bursts { keys: 5_000, rest: Duration::from_millis(500) }),
        ("bursts of 40,000 keys, rests of 4 s", Sweep::Bursts { keys: 40_000, rest: Duration::from_secs(4) }),
        ("whole passes, rests of 20 s", Sweep::Bursts { keys: u64::MAX, rest: Duration::from_secs(20) }),
    ];
    let loops = std::env::var("TTLSWEEP_IMPACT_LOOPS").unwrap_or_default();
    contenders.extend(
        loops
            .split(',')
            .filter_map(|count| count.trim().parse().ok())
            .map(|count: u32| (forever(&format!("plain loop, COUNT {count}")), Sweep::BackToBack(count))),
    );
    let more = std::env::var("TTLSWEEP_IMPACT_OURS").unwrap_or_default();
    contenders.extend(more.split(';').map(str::trim).filter(|args| !args.is_empty()).map(|args| {
        let words: Vec<&'static str> = args.split_whitespace().map(forever).collect();
        (forever(&format!("ttlsweep {args}")), ours(Vec::leak(words)))
    }));
    contenders.into_iter().map(|(name, sweep)| Contender { name, sweep }).collect()
}

/// A few words that live as long as the program.
fn forever(text: &str) -> &'static str {
    Box::leak(text.to_owned().into_boxed_str())
}

fn help_of(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program} cannot be run: {e}"));
    // redis-cli prints its help to stderr in some versions.
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

impl Sweep {
    /// How it is run, for the JSON file.
    pub fn describe(self) -> String {
        match self {
            Self::Nobody => "nothing".to_owned(),
            Self::Ours { .. } => {
                format!("ttlsweep scan URL --json {}", self.our_args().join(" ")).trim_end().to_owned()
            }
            Self::Cloud(count) => format!("SCAN COUNT {count} each {} ms by the clock", TICK.as_millis()),
            Self::RedisCli(None) => format!("redis-cli --scan (COUNT {REDIS_CLI_COUNT}), back to back"),
            Self::RedisCli(Some(count)) => format!("redis-cli --scan --count {count}"),
            Self::BackToBack(count) => format!("SCAN COUNT {count} on a blocking socket, back to back"),
            Self::TtlOfEach(count) => format!("SCAN COUNT {count} and a pipelined TTL of each name, back to back"),
            Self::Shuffled => format!("SCAN COUNT 50 each {} ms, {SEGMENTS} segments out of order", TICK.as_millis()),
            Self::Bursts { keys, rest } => {
                format!("SCAN COUNT {BURST_COUNT} back to back, after {keys} keys a rest of {} s", rest.as_secs_f64())
            }
            Self::Effort10 => "CONFIG SET active-expire-effort 10, no sweep".to_owned(),
        }
    }

    /// Whether it is an attempt at a slow sweep that does no harm, which only a flow of keys can show.
    pub fn is_slow_by_design(self) -> bool {
        matches!(self, Self::Shuffled | Self::Bursts { .. })
    }

    fn our_args(self) -> Vec<&'static str> {
        match self {
            Self::Ours { args, no_throttle } => {
                args.iter().copied().chain(no_throttle.then_some(NO_THROTTLE)).collect()
            }
            _ => Vec::new(),
        }
    }

    /// One pass, or as much of it as there is time for. Who does not sweep waits for that time.
    pub fn pass(self, server: &Server, until: Option<Instant>) -> Pass {
        let pass = match self {
            Self::Nobody | Self::Effort10 => {
                let until = until.expect("what has no end is given one");
                std::thread::sleep(until.saturating_duration_since(Instant::now()));
                Pass::default()
            }
            Self::Ours { .. } => ours(server, &self.our_args(), until),
            Self::RedisCli(count) => redis_cli(server, count, until),
            Self::Cloud(count) => scan(server, count, Some(TICK), false, until),
            Self::BackToBack(count) => scan(server, count, None, false, until),
            Self::TtlOfEach(count) => scan(server, count, None, true, until),
            Self::Shuffled => shuffled(server, until),
            Self::Bursts { keys, rest } => bursts(server, keys, rest, until),
        };
        assert!(pass.whole || until.is_some(), "a pass with no time limit comes to its end");
        pass
    }

    /// Pass after pass until the time is over.
    pub fn again_and_again(self, server: &Server, until: Instant) -> Vec<Pass> {
        let mut passes = Vec::new();
        while Instant::now() < until {
            passes.push(self.pass(server, Some(until)));
        }
        passes
    }
}

/// The path of the program: beside this one, where `make impact` has built both.
fn executable() -> String {
    let program = std::env::current_exe().expect("it has a path").with_file_name("ttlsweep");
    assert!(program.is_file(), "{} is missing: cargo build --release", program.display());
    program.into_os_string().into_string().expect("a path in UTF-8")
}

/// The program with a subcommand and an address, which prints one JSON object.
pub fn program(subcommand: &str, url: &str, args: &[&str]) -> Command {
    let mut command = Command::new(executable());
    // What the caller has set for this benchmark or for a sweep of their own must not change the contender.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TTLSWEEP_") || name == "REDISCLI_AUTH") {
        command.env_remove(name);
    }
    command.args([subcommand, url, "--json"]).args(args).stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

/// Has the program print what it did, and end. The standard library can only kill.
pub fn interrupt(child: &Child) {
    let _ = Command::new("sh").args(["-c", &format!("kill -INT {}", child.id())]).stderr(Stdio::null()).status();
}

/// One sweep, which is interrupted where it lasts longer than that.
pub fn ours(server: &Server, args: &[&str], until: Option<Instant>) -> Pass {
    let mut command = program("scan", &server.sweep_url(), args);
    let mut child = command.spawn().expect("the program is built");
    let in_time = wait(&mut child, until);
    if !in_time {
        interrupt(&child);
        wait(&mut child, None);
    }
    let status = child.wait().expect("it can be asked");
    let mut json = String::new();
    child.stdout.take().expect("it is piped").read_to_string(&mut json).expect("UTF-8");
    // 130: interrupted, as asked for.
    assert!(status.success() || (!in_time && status.code() == Some(130)), "{command:?} ended with {status}: {json}");
    if json.is_empty() {
        // Interrupted before it had a task.
        return Pass::default();
    }
    let record: serde_json::Value = serde_json::from_str(&json).expect("one JSON object");
    let scanned = record["report"]["totals"]["scanned"].as_u64().expect("it counts");
    Pass { whole: status.success(), scanned, num: record["num"].as_u64() }
}

fn redis_cli(server: &Server, count: Option<u32>, until: Option<Instant>) -> Pass {
    let mut conn = Conn::open(&server.sweep_addr());
    let before = conn.scans_answered();
    let mut command = Command::new("redis-cli");
    command.args(["-p", &server.sweep_port().to_string(), "--scan"]).stdout(Stdio::null());
    if let Some(count) = count {
        command.args(["--count", &count.to_string()]);
    }
    let mut child = command.spawn().expect("redis-cli is on the PATH");
    let whole = wait(&mut child, until);
    if !whole {
        child.kill().expect("it is ours");
    }
    let status = child.wait().expect("it can be asked");
    assert!(status.success() || !whole, "{command:?} ended with {status}");
    let scans = conn.scans_answered() - before;
    Pass { whole, scanned: scans * u64::from(count.unwrap_or(REDIS_CLI_COUNT)), num: None }
}

/// Waits for the end of a program; false where the time is over first.
fn wait(child: &mut Child, until: Option<Instant>) -> bool {
    loop {
        if child.try_wait().expect("it can be asked").is_some() {
            return true;
        }
        if is_over(until) {
            return false;
        }
        std::thread::sleep(POLL);
    }
}

/// With `tick`, a SCAN is sent when it is due, or as soon as the last one is answered; what was missed is not made up
/// for, so that it never comes faster than the clock.
fn scan(server: &Server, count: u32, tick: Option<Duration>, ttl: bool, until: Option<Instant>) -> Pass {
    let mut conn = Conn::open(&server.sweep_addr());
    let (mut cursor, mut names, mut out) = ("0".to_owned(), Vec::new(), Vec::new());
    let mut pass = Pass::default();
    let mut due = Instant::now();
    loop {
        let (next, number) = conn.scan(&cursor, count, ttl.then_some(&mut names));
        pass.scanned += number;
        if ttl {
            out.clear();
            names.iter().for_each(|name| out.extend(encode(&[b"TTL".as_slice(), name])));
            std::io::Write::write_all(&mut conn.out, &out).expect("the server reads");
            for _ in &names {
                conn.number();
            }
        }
        cursor = next;
        if cursor == "0" {
            pass.whole = true;
            return pass;
        }
        if is_over(until) {
            return pass;
        }
        if let Some(tick) = tick {
            wait_for(tick, &mut due);
        }
    }
}

fn is_over(until: Option<Instant>) -> bool {
    until.is_some_and(|until| Instant::now() >= until)
}

/// Waits for the next tick. What was missed is not made up for.
fn wait_for(tick: Duration, due: &mut Instant) {
    *due = (*due + tick).max(Instant::now());
    std::thread::sleep(due.saturating_duration_since(Instant::now()));
}

/// Into how many segments the hash space is cut. A prime step takes all of them, far from one another.
const SEGMENTS: u64 = 256;
const SEGMENT_STEP: u64 = 101;

fn shuffled(server: &Server, until: Option<Instant>) -> Pass {
    let mut conn = Conn::open(&server.sweep_addr());
    let mut pass = Pass::default();
    let mut due = Instant::now();
    // SCAN counts the reversed bits of its cursor up.
    let bits = SEGMENTS.trailing_zeros();
    for segment in (0..SEGMENTS).map(|n| n * SEGMENT_STEP % SEGMENTS) {
        let mut cursor = (segment << (u64::BITS - bits)).reverse_bits();
        loop {
            let (next, number) = conn.scan(&cursor.to_string(), 50, None);
            pass.scanned += number;
            cursor = next.parse().expect("a cursor");
            if is_over(until) {
                return pass;
            }
            wait_for(TICK, &mut due);
            if cursor == 0 || cursor.reverse_bits() >> (u64::BITS - bits) != segment {
                break;
            }
        }
    }
    Pass { whole: true, ..pass }
}

/// COUNT of a burst.
const BURST_COUNT: u32 = 100;

fn bursts(server: &Server, keys: u64, rest: Duration, until: Option<Instant>) -> Pass {
    let mut conn = Conn::open(&server.sweep_addr());
    let mut pass = Pass::default();
    let (mut cursor, mut in_burst) = ("0".to_owned(), 0);
    while !pass.whole && !is_over(until) {
        let (next, number) = conn.scan(&cursor, BURST_COUNT, None);
        pass.scanned += number;
        // The dead among them are not returned.
        in_burst += u64::from(BURST_COUNT);
        pass.whole = next == "0";
        cursor = next;
        if pass.whole || in_burst >= keys {
            in_burst = 0;
            let left = until.map_or(rest, |until| until.saturating_duration_since(Instant::now()));
            std::thread::sleep(rest.min(left));
        }
    }
    pass
}

/// The server's own expiry at its hardest, for as long as this lives.
pub struct Effort<'a>(&'a Server);

impl<'a> Effort<'a> {
    pub fn set(server: &'a Server) -> Self {
        assert_eq!(server.cli(&["CONFIG", "SET", "active-expire-effort", "10"]), "OK");
        Self(server)
    }
}

impl Drop for Effort<'_> {
    fn drop(&mut self) {
        // 1 is the default of every server that knows the setting.
        self.0.cli(&["CONFIG", "SET", "active-expire-effort", "1"]);
    }
}
