//! What benches that compare tell of their figures, and of where they were measured.

use std::{fmt, fs, thread};

use serde::Serialize;

/// What the rounds of a leg have in common.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (&min, &max) = (values.first()?, values.last()?);
        let middle = values.len() / 2;
        let median =
            if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) };
        Some(Self { median, min, max })
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [median, min, max] = [self.median, self.min, self.max].map(number);
        if min == max { f.write_str(&median) } else { write!(f, "{median} ({min}..{max})") }
    }
}

/// Where all of it was measured, and by which command.
#[derive(Debug, Serialize)]
pub struct Host {
    pub command: String,
    pub kernel: String,
    pub cpu: String,
    pub cores: usize,
    /// Of one, five and fifteen minutes.
    pub load_average_before: String,
    pub debug_build: bool,
}

impl Host {
    /// As it is now, for the bench of this name.
    pub fn look(bench: &str) -> anyhow::Result<Self> {
        let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
        let dashes = if arguments.is_empty() { "" } else { "-- " };
        let read = |file| fs::read_to_string(file).unwrap_or_default().trim().to_owned();
        let cpu = read("/proc/cpuinfo");
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown");
        Ok(Self {
            command: format!("cargo bench --bench {bench} {dashes}{}", arguments.join(" ")).trim_end().to_owned(),
            kernel: read("/proc/sys/kernel/osrelease"),
            cpu: cpu.trim_start_matches(['\t', ' ', ':']).to_owned(),
            cores: thread::available_parallelism()?.get(),
            // Without the processes that there are.
            load_average_before: read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(", "),
            debug_build: cfg!(debug_assertions),
        })
    }
}

/// Three digits that count: "0.12", "12.3", "12,345".
pub fn number(value: f64) -> String {
    let digits = match value.abs() {
        whole if whole.fract() == 0.0 => 0,
        small if small < 10.0 => 2,
        medium if medium < 100.0 => 1,
        _ => 0,
    };
    let text = format!("{value:.digits$}");
    if digits > 0 { text } else { grouped(&text) }
}

/// A whole number, with a comma before each three digits.
pub fn grouped(digits: &str) -> String {
    let (sign, digits) = digits.strip_prefix('-').map_or(("", digits), |digits| ("-", digits));
    let groups = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect::<Vec<_>>();
    format!("{sign}{}", groups.join(","))
}
