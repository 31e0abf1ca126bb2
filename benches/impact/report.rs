//! What goes out: Markdown on stdout and in a file, JSON with everything, plots; and the sums behind them.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use serde_json::{Map, Value, json};

use super::common::median;
use super::contender::Contender;

/// Everything goes here, and is written anew after each scenario, so that a run that is cut leaves what it has.
pub struct Output {
    folder: PathBuf,
    markdown: String,
    json: Map<String, Value>,
}

impl Output {
    pub fn new(folder: PathBuf, settings: Value, contenders: &[Contender]) -> Self {
        std::fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{} cannot be made: {e}", folder.display()));
        let how: Map<String, Value> =
            contenders.iter().map(|c| (c.name.to_owned(), Value::String(c.sweep.describe()))).collect();
        let json = Map::from_iter([
            ("machine".to_owned(), machine()),
            ("settings".to_owned(), settings),
            ("contenders".to_owned(), how.into()),
        ]);
        let mut output = Self { folder, markdown: String::new(), json };
        let fact = |name: &str| output.json["machine"][name].as_str().unwrap_or("unknown").to_owned();
        let text = format!(
            "{}, {} cores, Linux {}, a loopback round trip takes {} us; commit {}\n",
            fact("cpu"),
            output.json["machine"]["cores"],
            fact("kernel"),
            output.json["machine"]["round_trip_us"],
            fact("commit")
        );
        output.markdown(&text);
        output
    }

    #[allow(clippy::print_stdout, reason = "the table is what it is for")]
    pub fn markdown(&mut self, text: &str) {
        println!("{text}");
        self.markdown += text;
        self.markdown.push('\n');
        self.write("impact.md", &self.markdown);
    }

    pub fn json(&mut self, name: &str, value: Value) {
        self.json.insert(name.to_owned(), value);
        self.write("impact.json", &serde_json::to_string_pretty(&self.json).expect("plain data"));
    }

    pub fn plot(&self, file: &str, svg: &str) {
        self.write(file, svg);
    }

    fn write(&self, file: &str, text: &str) {
        let path = self.folder.join(file);
        std::fs::write(&path, text).unwrap_or_else(|e| panic!("{} cannot be written: {e}", path.display()));
    }
}

/// Where this was measured. What cannot be told is null.
fn machine() -> Value {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu =
        cpus.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name.to_owned()));
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok().map(|k| k.trim().to_owned());
    let cores = std::thread::available_parallelism().ok().map(usize::from);
    let commit = Command::new("git").args(["describe", "--always", "--dirty"]).output().ok();
    let commit = commit.filter(|o| o.status.success()).map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
    json!({ "cpu": cpu, "cores": cores, "kernel": kernel, "round_trip_us": round_trip_us(), "commit": commit })
}

/// What a message to another thread and back over loopback takes with no work at either end, in microseconds, the median of
/// many. Machines differ in it by a factor of five, and a loop of small batches is made of it.
fn round_trip_us() -> u64 {
    let trips = || {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let mut near = TcpStream::connect(listener.local_addr()?)?;
        let (mut far, _) = listener.accept()?;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        let echo = std::thread::spawn(move || {
            let mut byte = [0];
            while far.read_exact(&mut byte).and_then(|()| far.write_all(&byte)).is_ok() {}
        });
        let mut trips = Vec::new();
        for _ in 0..5_000 {
            let begun = Instant::now();
            near.write_all(&[0])?;
            near.read_exact(&mut [0])?;
            trips.push(begun.elapsed().as_secs_f64() * 1e6);
        }
        drop(near);
        echo.join().expect("it only echoes");
        Ok::<_, std::io::Error>(trips)
    };
    median(trips().expect("loopback is there")).expect("many trips").round() as u64
}

/// The median over those rounds in which both were measured, so that what slowed the machine down slowed both.
pub fn median_ratio<R>(ours: &[R], others: &[R], round: impl Fn(&R) -> u64, of: impl Fn(&R) -> f64) -> Option<f64> {
    median(ours.iter().filter_map(|r| {
        let other = others.iter().find(|o| round(o) == round(r))?;
        Some(of(r) / of(other))
    }))
}

/// The result of a contender, by its name.
pub fn rounds_of<'a, R>(contenders: &[Contender], rounds: &'a [Vec<R>], name: &str) -> &'a [R] {
    contenders.iter().position(|c| c.name == name).map_or(&[], |i| rounds[i].as_slice())
}

/// A number with so many digits behind the point, or a dash.
pub fn cell(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |v| format!("{v:.digits$}"))
}

/// The columns of [`scan_time_cells`].
pub const SCAN_TIMES: [&str; 2] = ["SCAN p99 us, server's clock", "p99.9 us"];

/// How long SCANs took by the server's own clock: p99 and p99.9, each the median of the rounds in which the server told.
pub fn scan_time_cells(times_us: impl Iterator<Item = [f64; 2]> + Clone) -> [String; 2] {
    [0, 1].map(|quantile| cell(median(times_us.clone().map(|times| times[quantile])), 0))
}

pub struct Table {
    text: String,
}

impl Table {
    pub fn new(title: &str, columns: &[&str]) -> Self {
        let mut text = format!("### {title}\n\n");
        let _ = writeln!(text, "| {} |", columns.join(" | "));
        let _ = writeln!(text, "|---|{}", "--:|".repeat(columns.len() - 1));
        Self { text }
    }

    pub fn row(&mut self, name: &str, cells: &[String]) {
        let _ = writeln!(self.text, "| {name} | {} |", cells.join(" | "));
    }

    pub fn end(self) -> String {
        self.text
    }
}
