//! From outcomes to tables: the median of the rounds, the smallest and the largest, and the report's own figures above them.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
};

use serde::Serialize;

use crate::{
    clients::Outcome,
    figures::{Host, Spread},
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
    #[serde(flatten)]
    host: Host,
    in_namespaces: bool,
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
        Ok(Self { host: Host::look("fields")?, in_namespaces })
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.in_namespaces {
            "three network namespaces for each leg"
        } else {
            "on loopback: somaxconn is the host's, and the counters are those of everything on it"
        };
        let Host { command, kernel, cpu, cores, load_average_before, debug_build } = &self.host;
        write!(
            f,
            "`{command}`: Linux {kernel}, {cores} cores ({cpu}), load average before {load_average_before}, {place}."
        )?;
        if *debug_build { write!(f, " **A debug build: these figures say nothing.**") } else { Ok(()) }
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
