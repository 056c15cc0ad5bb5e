//! From rows to a table: the median of the rounds, the smallest and the largest, and the difference to nginx within each
//! round.

#![expect(clippy::cast_precision_loss, reason = "counts and times far below 2^52")]

use std::{collections::BTreeMap, fmt, fmt::Write as _, fs, thread};

use serde::Serialize;

use crate::{
    Measure, Options,
    load::Outcome,
    peers::{self, Peer, WORKERS},
};

/// One leg.
#[derive(Debug, Serialize)]
pub struct Row {
    pub round: u32,
    pub measure: &'static str,
    /// Payload of a message.
    pub bytes: usize,
    pub peer: Peer,
    /// What was measured, by the names of the columns.
    pub values: BTreeMap<&'static str, f64>,
}

impl Row {
    pub fn new(round: u32, measure: Measure, bytes: usize, peer: Peer, outcome: &Outcome) -> Self {
        let count = outcome.count.max(1) as f64;
        let mut values = BTreeMap::from([("count", outcome.count as f64), ("failures", outcome.failures as f64)]);
        if let Some([before, after]) = outcome.memory {
            values.extend([
                ("rss_kib", after.rss_kib as f64 / count),
                ("pss_kib", after.pss_kib as f64 / count),
                ("rss_growth_kib", (after.rss_kib as f64 - before.rss_kib as f64) / count),
                ("pss_growth_kib", (after.pss_kib as f64 - before.pss_kib as f64) / count),
            ]);
        } else {
            values.insert("per_second", outcome.count as f64 / outcome.seconds);
            values.insert("others_us", outcome.others.us() as f64 / count);
            if peer != Peer::Direct {
                values.insert("cpu_us", outcome.proxy.us() as f64 / count);
                values.insert("user_us", outcome.proxy.user_us as f64 / count);
            }
        }
        let measure = match measure {
            Measure::Echo => "echo",
            Measure::Idle => "idle",
            Measure::Churn => "churn",
        };
        Self { round: round + 1, measure, bytes, peer, values }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {:8}", self.measure, size(self.bytes), self.peer)?;
        for (name, value) in &self.values {
            write!(f, " {name} {}", number(*value))?;
        }
        Ok(())
    }
}

/// Everything that was measured, and where.
#[derive(Debug)]
pub struct Report {
    pub rows: Vec<Row>,
    setting: Setting,
}

#[derive(Debug, Serialize)]
struct Setting {
    command: String,
    tidegate: String,
    nginx: Option<String>,
    kernel: String,
    cpu: String,
    cores: usize,
    workers: usize,
    load_average_before: String,
    debug_build: bool,
    rounds: u32,
    seconds: f64,
    connections: u32,
    sessions: u32,
}

/// What a table says about the rounds of one peer.
#[derive(Debug, Clone, Copy, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Self> {
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

#[derive(Debug, Serialize)]
struct Summary {
    measure: &'static str,
    bytes: usize,
    peer: Peer,
    values: BTreeMap<&'static str, Spread>,
    /// The peer minus nginx in percent of nginx, of the column that the table compares.
    next_to_nginx_percent: Option<Spread>,
}

/// A table of a measurement: its title, and its columns with what they are called in [`Row::values`]. The first is compared.
type Table = (&'static str, &'static str, &'static [(&'static str, &'static str)]);

const TABLES: [Table; 3] = [
    (
        "echo",
        "Echo, closed loop: a message is one there and one back",
        &[
            ("proxy CPU us per message", "cpu_us"),
            ("of it user", "user_us"),
            ("messages per second", "per_second"),
            ("load + backend CPU us", "others_us"),
            ("failures", "failures"),
        ],
    ),
    (
        "idle",
        "Idle sessions, each after one echo: memory of the proxy's processes, KiB per session",
        &[
            ("RSS growth", "rss_growth_kib"),
            ("PSS growth", "pss_growth_kib"),
            ("RSS", "rss_kib"),
            ("PSS", "pss_kib"),
            ("sessions", "count"),
            ("failures", "failures"),
        ],
    ),
    (
        "churn",
        "Churn: connect, upgrade, one echo, Close handshake, FIN",
        &[
            ("proxy CPU us per session", "cpu_us"),
            ("of it user", "user_us"),
            ("sessions per second", "per_second"),
            ("load + backend CPU us", "others_us"),
            ("failures", "failures"),
        ],
    ),
];

impl Report {
    pub fn new(options: &Options, peers: &[Peer]) -> anyhow::Result<Self> {
        let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
        let read = |file| fs::read_to_string(file).unwrap_or_default().trim().to_owned();
        let cpu = read("/proc/cpuinfo");
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown");
        let setting = Setting {
            command: ["cargo bench --bench compare --".to_owned(), arguments.join(" ")].join(" ").trim_end().to_owned(),
            tidegate: peers::tidegate_version()?,
            nginx: peers.contains(&Peer::Nginx).then(peers::nginx_version).transpose()?,
            kernel: read("/proc/sys/kernel/osrelease"),
            cpu: cpu.trim_start_matches(['\t', ' ', ':']).to_owned(),
            cores: thread::available_parallelism()?.get(),
            workers: WORKERS,
            load_average_before: read("/proc/loadavg"),
            debug_build: cfg!(debug_assertions),
            rounds: options.rounds,
            seconds: options.seconds,
            connections: options.connections,
            sessions: options.sessions,
        };
        Ok(Self { rows: Vec::new(), setting })
    }

    fn summaries(&self) -> Vec<Summary> {
        let mut summaries: Vec<Summary> = Vec::new();
        for (measure, _, columns) in TABLES {
            let (_, compared) = columns[0];
            let mut groups: Vec<(usize, Peer)> =
                self.rows.iter().filter(|row| row.measure == measure).map(|row| (row.bytes, row.peer)).collect();
            groups.sort_unstable();
            groups.dedup();
            for (bytes, peer) in groups {
                let of = |peer: Peer, name: &str| -> BTreeMap<u32, f64> {
                    let rows = self.rows.iter();
                    let rows = rows.filter(|row| (row.measure, row.bytes, row.peer) == (measure, bytes, peer));
                    rows.filter_map(|row| Some((row.round, *row.values.get(name)?))).collect()
                };
                let spread = |name| Some((name, Spread::of(of(peer, name).into_values().collect())?));
                let nginx = of(Peer::Nginx, compared);
                let differences = of(peer, compared).into_iter().filter_map(|(round, value)| {
                    let nginx = nginx.get(&round).filter(|nginx| **nginx > 0.0)?;
                    Some((value - nginx) / nginx * 100.0)
                });
                summaries.push(Summary {
                    measure,
                    bytes,
                    peer,
                    values: columns.iter().filter_map(|(_, name)| spread(*name)).collect(),
                    next_to_nginx_percent: if peer == Peer::Nginx { None } else { Spread::of(differences.collect()) },
                });
            }
        }
        summaries
    }

    pub fn markdown(&self) -> String {
        let mut text = String::new();
        let result = self.write_markdown(&mut text);
        result.expect("writing to a String does not fail");
        text
    }

    fn write_markdown(&self, text: &mut String) -> fmt::Result {
        let s = &self.setting;
        writeln!(text, "`{}`\n", s.command)?;
        writeln!(
            text,
            "{}, {}; Linux {}, {} cores ({}), {} workers each; load average before: {}; {} rounds, {} s per leg, {} \
             connections, {} idle sessions. Median (min..max) of the rounds.",
            s.tidegate,
            s.nginx.as_deref().unwrap_or("no nginx"),
            s.kernel,
            s.cores,
            s.cpu,
            s.workers,
            s.load_average_before,
            s.rounds,
            s.seconds,
            s.connections,
            s.sessions
        )?;
        if s.debug_build {
            writeln!(text, "\n**A debug build: these figures say nothing.**")?;
        }
        let summaries = self.summaries();
        for (measure, title, columns) in TABLES {
            let rows: Vec<&Summary> = summaries.iter().filter(|summary| summary.measure == measure).collect();
            if rows.is_empty() {
                continue;
            }
            writeln!(text, "\n### {title}\n")?;
            let names: Vec<&str> = columns.iter().map(|(title, _)| *title).collect();
            writeln!(text, "| payload | through | {} | {} next to nginx |", names.join(" | "), names[0])?;
            writeln!(text, "|---:|---|{}", "---:|".repeat(names.len() + 1))?;
            for row in rows {
                write!(text, "| {} | {} |", size(row.bytes), row.peer)?;
                for (_, name) in columns {
                    match row.values.get(name) {
                        Some(spread) => write!(text, " {spread} |")?,
                        None => write!(text, " – |")?,
                    }
                }
                match row.next_to_nginx_percent {
                    Some(Spread { median, min, max }) => writeln!(text, " {median:+.0} % ({min:+.0}..{max:+.0}) |")?,
                    None => writeln!(text, " – |")?,
                }
            }
        }
        Ok(())
    }

    pub fn json(&self) -> serde_json::Result<String> {
        #[derive(Serialize)]
        struct Document<'a> {
            setting: &'a Setting,
            summaries: Vec<Summary>,
            rows: &'a [Row],
        }
        serde_json::to_string_pretty(&Document {
            setting: &self.setting,
            summaries: self.summaries(),
            rows: &self.rows,
        })
    }
}

/// Three digits that count.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        whole if whole.fract() == 0.0 => 0,
        small if small < 10.0 => 2,
        medium if medium < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$}")
}

fn size(bytes: usize) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        _ if bytes.is_multiple_of(1024) => format!("{} KiB", bytes / 1024),
        _ => format!("{:.1} KiB", bytes as f64 / 1024.0),
    }
}
