//! From outcomes to tables: the median of the rounds, the smallest and the largest.

use std::{collections::BTreeMap, fmt, fmt::Write as _, fs, path::Path};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::{
    Options, Workload,
    figures::{Host, Spread, number},
    leg::Outcome,
    proxy::{Assembly, WORKERS},
};

/// One leg.
#[derive(Debug, Serialize, Deserialize)]
pub struct Row {
    pub round: u32,
    pub workload: Workload,
    pub assembly: Assembly,
    pub values: BTreeMap<String, f64>,
    pub metrics: BTreeMap<String, f64>,
    /// Microseconds of each connect, in order of size.
    connects: Vec<u64>,
}

impl Row {
    pub fn new(round: u32, workload: Workload, assembly: Assembly, outcome: &Outcome) -> Self {
        let metrics = outcome.metrics.iter().map(|(name, value)| (name.clone(), *value)).collect();
        let mut connects: Vec<u64> = outcome.rows.iter().map(|row| row.upgraded).collect();
        connects.sort_unstable();
        Self { round: round + 1, workload, assembly, values: outcome.values.clone(), metrics, connects }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:8}", self.workload, self.assembly)?;
        for (name, value) in self.values.iter().chain(&self.metrics) {
            write!(f, " {name} {}", number(*value))?;
        }
        Ok(())
    }
}

#[derive(Debug, Serialize)]
struct Setting {
    #[serde(flatten)]
    host: Host,
    tidegate: &'static str,
    workers: usize,
    options: Options,
}

/// Everything that was measured, and where.
#[derive(Debug)]
pub struct Report {
    pub rows: Vec<Row>,
    setting: Setting,
}

type Columns = &'static [(&'static str, &'static str)];

const CONNECTS: Columns = &[
    ("p50", "p50"),
    ("p99", "p99"),
    ("p99.9", "p999"),
    ("max", "max"),
    ("most sessions on one thread, %", "most_percent"),
    ("failed", "failures"),
    ("ListenOverflows", "overflows"),
    ("proxy CPU us per connect", "cpu_per_connect_us"),
];
const BUSY: Columns = &[
    ("p50", "p50"),
    ("p99", "p99"),
    ("p99.9", "p999"),
    ("max", "max"),
    ("most sessions on one thread, %", "most_percent"),
    ("failed", "failures"),
    ("ListenOverflows", "overflows"),
    ("messages meanwhile: p99", "message_p99"),
    ("max", "message_max"),
    ("messages before: p99", "quiet_p99"),
    ("p99.9", "quiet_p999"),
    ("proxy CPU us per message", "quiet_cpu_us"),
];
const STEADY: Columns = &[
    ("p50", "p50"),
    ("p99", "p99"),
    ("p99.9", "p999"),
    ("max", "max"),
    ("of it the client's own: p99.9", "late_p999"),
    ("busiest thread, % of a core", "busiest_share"),
    ("failed", "failures"),
];
const SPLIT: Columns = &[
    ("p50", "p50"),
    ("p99", "p99"),
    ("p99.9", "p999"),
    ("max", "max"),
    ("of it the client's own: p99.9", "late_p999"),
    ("busiest thread, % of a core", "busiest_share"),
    ("failed", "failures"),
    ("saturating session, MB/s", "flood_mb_per_second"),
    ("served beside it, %", "same_percent"),
    ("p99.9 of those", "same_p999"),
    ("p99.9 of the others", "other_p999"),
];
const ECHO: Columns = &[
    ("proxy CPU us per message", "cpu_us"),
    ("of it user", "user_us"),
    ("messages per second", "per_second"),
    ("load + backend CPU us", "others_us"),
    ("most sessions on one thread, %", "most_percent"),
    ("failed", "failures"),
];

impl Report {
    pub fn new(options: &Options) -> anyhow::Result<Self> {
        let setting = Setting {
            host: Host::look("accept")?,
            tidegate: env!("CARGO_PKG_VERSION"),
            workers: WORKERS,
            options: options.clone(),
        };
        Ok(Self { rows: Vec::new(), setting })
    }

    /// Takes over the rounds of an earlier run.
    pub fn append_to(&mut self, file: &Path) -> anyhow::Result<u32> {
        #[derive(Deserialize)]
        struct Document {
            rows: Vec<Row>,
        }
        let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let Document { rows } = serde_json::from_str(&text)?;
        self.rows = rows;
        Ok(self.rows.iter().map(|row| row.round).max().unwrap_or(0))
    }

    fn values(&self, workload: Workload, assembly: Assembly, name: &str) -> BTreeMap<u32, f64> {
        let rows = self.rows.iter().filter(|row| (row.workload, row.assembly) == (workload, assembly));
        rows.filter_map(|row| Some((row.round, *row.values.get(name)?))).collect()
    }

    fn spread(&self, workload: Workload, assembly: Assembly, name: &str) -> Option<Spread> {
        Spread::of(self.values(workload, assembly, name).into_values().collect())
    }

    /// The connects of all rounds together: their number and their p99.9 in milliseconds.
    fn pooled(&self, workload: Workload, assembly: Assembly) -> (usize, f64) {
        let rows = self.rows.iter().filter(|row| (row.workload, row.assembly) == (workload, assembly));
        let mut connects: Vec<u64> = rows.flat_map(|row| row.connects.iter().copied()).collect();
        connects.sort_unstable();
        (connects.len(), quantile(&connects, 999).unwrap_or(f64::NAN))
    }

    /// How many times as long a connect takes beside a saturating session, within each round.
    fn ratio(&self, assembly: Assembly, name: &str) -> Option<Spread> {
        let alone = self.values(Workload::Alone, assembly, name);
        let saturated = self.values(Workload::Saturated, assembly, name);
        let ratios = saturated.iter().filter_map(|(round, value)| Some(value / alone.get(round)?));
        Spread::of(ratios.collect())
    }

    pub fn markdown(&self) -> String {
        let mut text = String::new();
        self.write_markdown(&mut text).expect("writing to a String does not fail");
        text
    }

    fn write_markdown(&self, text: &mut String) -> fmt::Result {
        let Setting { options: o, .. } = &self.setting;
        let s = &self.setting;
        writeln!(text, "`{}`\n", s.host.command)?;
        writeln!(
            text,
            "tidegate {}; Linux {}, {} cores ({}), {} workers; load average before: {}; somaxconn {}; {} rounds. Median \
             (min..max) of the rounds. Connects in milliseconds from the moment they were to begin until their 101.",
            s.tidegate,
            s.host.kernel,
            s.host.cores,
            s.host.cpu,
            s.workers,
            s.host.load_average_before,
            o.somaxconn,
            self.rows.iter().map(|row| row.round).max().unwrap_or(0),
        )?;
        if s.host.debug_build {
            writeln!(text, "\n**A debug build: these figures say nothing.**")?;
        }
        let tables = [
            (Workload::Spike, format!("{} connects at once, idle", o.spike), CONNECTS),
            (
                Workload::Busy,
                format!("{} connects at once beside {} sessions at {}/s", o.busy_spike, o.talkers, o.talk_rate),
                BUSY,
            ),
            (Workload::Alone, format!("{} connects per second for {} s", o.rate, o.seconds), STEADY),
            (
                Workload::Saturated,
                format!(
                    "the same beside a session that saturates a thread (frames of {} B, SO_SNDBUF {})",
                    o.flood_bytes, o.flood_buffer
                ),
                SPLIT,
            ),
            (Workload::Echo, "steady echo: 64 sessions, 64 B, closed loop".to_owned(), ECHO),
        ];
        for (workload, title, columns) in tables {
            let mut assemblies: Vec<Assembly> =
                self.rows.iter().filter(|row| row.workload == workload).map(|row| row.assembly).collect();
            assemblies.sort_unstable();
            assemblies.dedup();
            if assemblies.is_empty() {
                continue;
            }
            writeln!(text, "\n### {workload}: {title}\n")?;
            let titles: Vec<&str> = columns.iter().map(|(title, _)| *title).collect();
            writeln!(text, "| | {} |", titles.join(" | "))?;
            writeln!(text, "|---|{}", "---:|".repeat(columns.len()))?;
            for assembly in assemblies {
                write!(text, "| {assembly} |")?;
                for (_, name) in columns {
                    match self.spread(workload, assembly, name) {
                        Some(spread) => write!(text, " {spread} |")?,
                        None => write!(text, " – |")?,
                    }
                }
                writeln!(text)?;
            }
        }
        self.write_ratios(text)
    }

    fn write_ratios(&self, text: &mut String) -> fmt::Result {
        let mut lines = String::new();
        for assembly in [Assembly::PerCore, Assembly::HandOff, Assembly::Shared, Assembly::Multi1, Assembly::MultiN] {
            let Some(ratio) = self.ratio(assembly, "p999") else { continue };
            let of = |workload| {
                let spread = self.spread(workload, assembly, "p999").map(|spread| spread.to_string());
                (self.pooled(workload, assembly), spread.unwrap_or_default())
            };
            let (((count, alone), alone_rounds), ((count_beside, beside), beside_rounds)) =
                (of(Workload::Alone), of(Workload::Saturated));
            writeln!(
                lines,
                "| {assembly} | {} | {} | **{}** | {} | {alone_rounds} | {beside_rounds} | {ratio} |",
                number(alone),
                number(beside),
                number(beside / alone),
                count.min(count_beside),
            )?;
        }
        if lines.is_empty() {
            return Ok(());
        }
        writeln!(text, "\n### One session saturating its worker: p99.9 of connect-to-101 of the others, ms\n")?;
        writeln!(
            text,
            "| | without it, all rounds | with it | **ratio** | connects at least | without it, by round | with it | ratio |"
        )?;
        writeln!(text, "|---|---:|---:|---:|---:|---:|---:|---:|")?;
        text.write_str(&lines)
    }

    pub fn json(&self) -> serde_json::Result<String> {
        #[derive(Serialize)]
        struct Document<'a> {
            setting: &'a Setting,
            rows: &'a [Row],
        }
        serde_json::to_string_pretty(&Document { setting: &self.setting, rows: &self.rows })
    }
}

/// In milliseconds, of microseconds in order of size.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
pub fn quantile(micros: &[u64], per_mille: usize) -> Option<f64> {
    let index = (micros.len() * per_mille).div_ceil(1000).max(1) - 1;
    micros.get(index).map(|micros| *micros as f64 / 1e3)
}
