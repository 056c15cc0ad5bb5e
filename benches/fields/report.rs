//! From outcomes to tables: the median of the rounds, the smallest and the largest, and the report's own figures above them.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    fs, thread,
};

use serde::Serialize;

use crate::{
    clients::Outcome,
    stories::{Story, Through},
};

/// One leg.
#[derive(Debug, Serialize)]
pub struct Row {
    pub story: usize,
    pub round: u32,
    pub through: Through,
    pub label: String,
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// Where all of it was measured.
#[derive(Debug, Serialize)]
pub struct Setting {
    command: String,
    kernel: String,
    cpu: String,
    cores: usize,
    load_average_before: String,
    in_namespaces: bool,
    debug_build: bool,
}

/// What the rounds of a leg have in common.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

/// A line of a table, and of a plot.
#[derive(Debug, Serialize)]
pub struct Line {
    pub story: usize,
    pub through: Through,
    pub label: String,
    pub values: BTreeMap<String, Spread>,
}

impl Setting {
    pub fn new(in_namespaces: bool) -> anyhow::Result<Self> {
        let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
        let dashes = if arguments.is_empty() { "" } else { "-- " };
        let read = |file| fs::read_to_string(file).unwrap_or_default().trim().to_owned();
        let cpu = read("/proc/cpuinfo");
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown");
        Ok(Self {
            command: format!("cargo bench --bench fields {dashes}{}", arguments.join(" ")).trim_end().to_owned(),
            kernel: read("/proc/sys/kernel/osrelease"),
            cpu: cpu.trim_start_matches(['\t', ' ', ':']).to_owned(),
            cores: thread::available_parallelism()?.get(),
            // Without the processes that there are.
            load_average_before: read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(", "),
            in_namespaces,
            debug_build: cfg!(debug_assertions),
        })
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.in_namespaces {
            "three network namespaces for each leg"
        } else {
            "on loopback: somaxconn is the host's, and the counters are those of everything on it"
        };
        let Self { command, kernel, cpu, cores, load_average_before, .. } = self;
        write!(
            f,
            "`{command}`: Linux {kernel}, {cores} cores ({cpu}), load average before {load_average_before}, {place}."
        )?;
        if self.debug_build { write!(f, " **A debug build: these figures say nothing.**") } else { Ok(()) }
    }
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

/// The report's own lines first, then each leg in its order.
pub fn lines(story: &Story, rows: &[Row]) -> Vec<Line> {
    let reported = story.reported.iter().map(|reported| {
        let values = reported.values.iter();
        let values =
            values.map(|(name, value)| ((*name).to_owned(), Spread { median: *value, min: *value, max: *value }));
        Line {
            story: story.number,
            through: Through::Report,
            label: reported.label.to_owned(),
            values: values.collect(),
        }
    });
    let measured = story.legs.iter().filter_map(|leg| {
        let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for row in rows {
            if (row.story, row.through, &row.label) == (story.number, leg.through, &leg.label) {
                for (name, value) in &row.outcome.values {
                    values.entry(name.clone()).or_default().push(*value);
                }
            }
        }
        let values: BTreeMap<String, Spread> =
            values.into_iter().filter_map(|(name, values)| Some((name, Spread::of(values)?))).collect();
        (!values.is_empty()).then(|| Line {
            story: story.number,
            through: leg.through,
            label: leg.label.clone(),
            values,
        })
    });
    reported.chain(measured).collect()
}

pub fn markdown(story: &Story, lines: &[Line]) -> String {
    let mut text = String::new();
    write_markdown(&mut text, story, lines).expect("writing to a String does not fail");
    text
}

fn write_markdown(text: &mut String, story: &Story, lines: &[Line]) -> fmt::Result {
    let Story { number, title, says, doubts, here, columns, .. } = story;
    writeln!(text, "## {number}. {title}\n")?;
    writeln!(text, "- **The report**: {says}")?;
    writeln!(text, "- **Doubts**: {doubts}")?;
    writeln!(text, "- **Here**: {here}\n")?;
    writeln!(text, "![{title}](field-report-{number}.svg)\n")?;
    let headings: Vec<&str> = columns.iter().map(|(heading, _)| *heading).collect();
    writeln!(text, "| | | {} |", headings.join(" | "))?;
    writeln!(text, "|---|---|{}", "---:|".repeat(columns.len()))?;
    for line in lines {
        write!(text, "| {} | {} |", line.through, line.label)?;
        for (_, name) in *columns {
            match line.values.get(*name) {
                Some(spread) => write!(text, " {spread} |")?,
                None => write!(text, " – |")?,
            }
        }
        writeln!(text)?;
    }
    writeln!(text)
}

/// Three digits that count.
pub fn number(value: f64) -> String {
    let digits = match value.abs() {
        whole if whole.fract() == 0.0 => 0,
        small if small < 10.0 => 2,
        medium if medium < 100.0 => 1,
        _ => 0,
    };
    let text = format!("{value:.digits$}");
    // "12,345".
    if digits > 0 || text.len() <= 3 {
        return text;
    }
    let (head, tail) = text.split_at(text.len() - 3);
    if head.len() > 3 {
        let (first, middle) = head.split_at(head.len() - 3);
        return format!("{first},{middle},{tail}");
    }
    format!("{head},{tail}")
}
