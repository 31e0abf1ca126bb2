//! A real server of a benchmark's own, killed on drop, and the measured cost of a program that runs beside it.

#![allow(dead_code, reason = "not every benchmark uses all of it")]

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub struct Server {
    child: Child,
    pub port: u16,
    /// Where sweeps connect, if not directly: a proxy.
    pub way: Option<u16>,
    _dir: tempfile::TempDir,
}

impl Server {
    /// The server that `TTLSWEEP_BENCH_SERVER` names, or the one on the PATH.
    pub fn start() -> Self {
        Self::start_of(&std::env::var("TTLSWEEP_BENCH_SERVER").unwrap_or_else(|_| "redis-server".to_owned()))
    }

    pub fn start_of(binary: &str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("it is bound").port();
        drop(listener);
        let child = Command::new(binary)
            .args(["--save", "", "--appendonly", "no", "--bind", "127.0.0.1", "--enable-debug-command", "local"])
            .args(["--port", &port.to_string(), "--dir"])
            .arg(dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("{binary} cannot be run: {e}"));
        let server = Self { child, port, way: None, _dir: dir };
        let deadline = Instant::now() + Duration::from_secs(10);
        while server.cli(&["PING"]) != "PONG" {
            assert!(Instant::now() < deadline, "the server does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// Leaves the first core to this server, and the others to this process and what it starts, until the result is dropped.
    #[must_use]
    pub fn on_a_core_of_its_own(&self) -> Cores {
        pin(self.child.id(), "0");
        let last = std::thread::available_parallelism().map_or(1, usize::from).saturating_sub(1).max(1);
        pin(std::process::id(), &format!("1-{last}"));
        Cores { last }
    }

    pub fn addr(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn url(&self) -> String {
        format!("redis://{}", self.addr())
    }

    pub fn sweep_port(&self) -> u16 {
        self.way.unwrap_or(self.port)
    }

    pub fn sweep_addr(&self) -> String {
        format!("127.0.0.1:{}", self.sweep_port())
    }

    pub fn sweep_url(&self) -> String {
        format!("redis://{}", self.sweep_addr())
    }

    /// The CPU time that the server has taken so far, in seconds.
    pub fn cpu_s(&self) -> f64 {
        cpu_s(self.child.id())
    }

    pub fn cli(&self, words: &[&str]) -> String {
        let output = Command::new("redis-cli").args(["-p", &self.port.to_string()]).args(words).output();
        String::from_utf8_lossy(&output.expect("redis-cli is on the PATH").stdout).trim().to_owned()
    }

    /// Such as `Redis 7.0.15`. For Valkey its own version, not the Redis version that it also reports.
    pub fn version(&self) -> String {
        let info = self.cli(&["INFO", "server"]);
        let field = |name: &str| info.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
        match (field("valkey_version:"), field("redis_version:")) {
            (Some(version), _) => format!("Valkey {version}"),
            (None, version) => format!("Redis {}", version.unwrap_or("of an unknown version")),
        }
    }

    /// Resets the server's latency histograms.
    pub fn forget_scan_times(&self) {
        // Before 7.0 there is no such command, and an error does no harm.
        self.cli(&["CONFIG", "SET", "latency-tracking-info-percentiles", "99 99.9"]);
        self.cli(&["CONFIG", "RESETSTAT"]);
    }

    /// How long SCANs took since then by the server's own clock, in microseconds: p99 and p99.9. `None` before Redis 7.0, and if
    /// there was no SCAN. Other programs on the machine count only as far as they interrupt the server.
    pub fn scan_times(&self) -> Option<[f64; 2]> {
        let info = self.cli(&["INFO", "latencystats"]);
        let scan = info.lines().find_map(|l| l.trim().strip_prefix("latency_percentiles_usec_scan:"))?.to_owned();
        let of = |name: &str| scan.split(',').find_map(|part| part.strip_prefix(name)?.parse().ok());
        Some([of("p99=")?, of("p99.9=")?])
    }

    /// Bytes that the server has sent to its clients so far.
    pub fn sent(&self) -> u64 {
        let info = self.cli(&["INFO", "stats"]);
        let sent = info.lines().find_map(|l| l.strip_prefix("total_net_output_bytes:")).map(str::trim);
        sent.and_then(|sent| sent.parse().ok()).expect("every server tells")
    }

    pub fn dbsize(&self) -> u64 {
        self.cli(&["DBSIZE"]).parse().expect("a number")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Clock ticks per second in /proc/PID/stat, on every Linux that Rust runs on.
const TICKS: f64 = 100.0;

/// CPU time that a process has used, in seconds.
pub fn cpu_s(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Behind the name in parentheses: state is field 3, utime 14, stime 15.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks = |field: usize| fields.get(field - 3).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(14) + ticks(15)) / TICKS
}

/// The cost of a program.
#[derive(Clone, Copy, Default)]
pub struct Measured {
    pub wall: Duration,
    pub cpu_s: f64,
    pub peak_kib: f64,
    /// Bytes that the server sent meanwhile, if the caller has set it.
    pub sent: f64,
}

/// Runs a program to its end, and reads /proc meanwhile.
pub fn measure(command: &mut Command) -> Measured {
    let begun = Instant::now();
    let mut child = command.stdout(Stdio::null()).spawn().unwrap_or_else(|e| panic!("{command:?} cannot be run: {e}"));
    let mut measured = Measured::default();
    loop {
        if let Some(status) = child.try_wait().expect("it can be asked") {
            assert!(status.success(), "{command:?} ended with {status}");
            measured.wall = begun.elapsed();
            return measured;
        }
        measured.look(child.id());
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Measured {
    fn look(&mut self, pid: u32) {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        self.cpu_s = self.cpu_s.max(cpu_s(pid));
        let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok());
        self.peak_kib = self.peak_kib.max(peak.unwrap_or(0.0));
    }
}

/// The middle of the values, or the mean of the two in the middle. None where there are none.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// Gives this process all cores back when dropped.
pub struct Cores {
    last: usize,
}

impl Drop for Cores {
    fn drop(&mut self) {
        pin(std::process::id(), &format!("0-{}", self.last));
    }
}

/// Pins all threads of a process, and those that it starts, to these cores.
fn pin(process: u32, cores: &str) {
    let args = ["--all-tasks", "--cpu-list", "--pid", cores, &process.to_string()];
    let status = Command::new("taskset").args(args).stdout(Stdio::null()).status();
    assert!(status.is_ok_and(|status| status.success()), "taskset, of util-linux, cannot pin {process} to {cores}");
}

/// Lets this thread run when it has something to do, as it would on a machine of its own. Linux lets a sleeper wake up to 50 us
/// late, which is as much as what is measured here, and on few cores a client waits for the contender's turn to end, and not
/// for the server. Where the kernel or the user's rights do not allow it, every contender is measured with that on top.
pub fn comes_first() {
    let thread = std::fs::read_link("/proc/thread-self").unwrap_or_default();
    if let Some(id) = thread.file_name().and_then(|id| id.to_str()) {
        let _ = std::fs::write(format!("/proc/{id}/timerslack_ns"), "1000");
        let renice = ["-n", "-19", "-p", id];
        let _ = Command::new("renice").args(renice).stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}
