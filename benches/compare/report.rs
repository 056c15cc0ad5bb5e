//! From rows to a table: the median of the rounds, the smallest and the largest, and the difference to nginx within each
//! round.

#![expect(clippy::cast_precision_loss, reason = "counts and times far below 2^52")]

use std::{collections::BTreeMap, fmt, fmt::Write as _, fs, path::Path};

use anyhow::Context as _;
use serde::Serialize;

use crate::{
    Options,
    case::{Case, FEW},
    ending::{self, Timeline},
    fanout,
    figures::{Host, Spread, number},
    histogram::Histogram,
    load::Outcome,
    peers::{Peer, Tidegates, WORKERS},
    plots,
    rivals::Rivals,
    tables::{Column, TABLES, Table},
    transport::{SUITE, Transport},
};

/// One leg.
#[derive(Debug, Serialize)]
pub struct Row {
    pub round: u32,
    #[serde(flatten)]
    pub case: Case,
    pub peer: Peer,
    /// What was measured, by the names of the columns.
    pub values: BTreeMap<String, f64>,
    /// What failed, and how often.
    pub errors: BTreeMap<String, u64>,
    /// How it ended for clients, and for how many.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub endings: BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub histograms: BTreeMap<String, Histogram>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeline: Option<Timeline>,
}

impl Row {
    pub fn new(round: u32, case: Case, peer: Peer, outcome: Outcome) -> Self {
        let count = outcome.count.max(1) as f64;
        let mut values = outcome.values;
        let mut insert = |name: &str, value: f64| _ = values.insert(name.to_owned(), value);
        insert("count", outcome.count as f64);
        insert("failures", outcome.failures as f64);
        if let Some([before, after]) = outcome.memory {
            insert("rss_kib", after.rss_kib as f64 / count);
            insert("pss_kib", after.pss_kib as f64 / count);
            insert("rss_growth_kib", (after.rss_kib as f64 - before.rss_kib as f64) / count);
            insert("pss_growth_kib", (after.pss_kib as f64 - before.pss_kib as f64) / count);
        } else if outcome.seconds > 0.0 {
            // Of a spike those too that were turned away: they cost as well.
            let all = if case.counts_failures() { (outcome.count + outcome.failures) as f64 } else { count };
            insert("per_second", outcome.count as f64 / outcome.seconds);
            insert("others_us", outcome.others.us() as f64 / all);
            if peer != Peer::Direct {
                insert("cpu_us", outcome.proxy.us() as f64 / all);
                insert("user_us", outcome.proxy.user_us as f64 / all);
                insert("system_us", outcome.proxy.system_us as f64 / all);
            }
        }
        let Outcome { errors, endings, histograms, timeline, .. } = outcome;
        Self { round: round + 1, case, peer, values, errors, endings, histograms, timeline }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {:8}", self.case.measure(), self.case, self.peer)?;
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
    pub setting: Setting,
}

#[derive(Debug, Serialize)]
pub struct Setting {
    #[serde(flatten)]
    host: Host,
    tidegate: String,
    /// The second one.
    other: Option<String>,
    /// Of the other proxies, by their names.
    #[serde(flatten)]
    rivals: BTreeMap<String, String>,
    /// Of tidegate and the load generator: what encrypts, and what speaks HTTP/2.
    crates: Option<String>,
    workers: usize,
    rounds: u32,
    seconds: f64,
    at_once: u32,
    /// 0: as many as there can be in that time.
    churn_sessions: u32,
    sessions: u32,
    open_seconds: f64,
    streams: u16,
    /// Whether clients, proxy and backend had network namespaces of their own, where that matters.
    namespaces: bool,
    backend_backlog: u16,
    backend_somaxconn: u32,
    ramp_rate: f64,
    ramp_hold: f64,
}

#[derive(Debug, Serialize)]
pub struct Summary {
    #[serde(flatten)]
    pub case: Case,
    pub peer: Peer,
    pub values: BTreeMap<String, Spread>,
    /// The difference to the peer that the table compares with, in percent, of the column that it compares.
    difference_percent: Option<Spread>,
    /// The same column, less that of the same over TCP, in its unit.
    more_than_plain: Option<Spread>,
    /// The same column, next to that with [`FEW`] sessions, in percent.
    next_to_few: Option<Spread>,
    /// What failed in all rounds, and how often.
    errors: BTreeMap<String, u64>,
    /// How it ended for clients in all rounds, and for how many.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    endings: BTreeMap<String, u64>,
}

impl Report {
    pub fn new(
        options: &Options,
        peers: &[Peer],
        tidegates: &Tidegates,
        rivals: &Rivals,
        namespaces: bool,
    ) -> anyhow::Result<Self> {
        let setting = Setting {
            host: Host::look("compare")?,
            tidegate: tidegates.version(Peer::Tidegate)?,
            other: peers.contains(&Peer::Other).then(|| tidegates.version(Peer::Other)).transpose()?,
            rivals: rivals.versions(),
            crates: options.transport.iter().any(|transport| transport.is_tls()).then(crates).transpose()?,
            workers: WORKERS,
            rounds: options.rounds,
            seconds: options.seconds,
            at_once: options.at_once,
            churn_sessions: options.churn_sessions,
            sessions: options.sessions,
            open_seconds: options.open_seconds,
            streams: options.streams,
            namespaces,
            backend_backlog: options.backend_backlog,
            backend_somaxconn: options.backend_somaxconn,
            ramp_rate: options.ramp_rate,
            ramp_hold: options.ramp_hold,
        };
        Ok(Self { rows: Vec::new(), setting })
    }

    /// The peer that all others are compared with: where there is no nginx but a second tidegate, that is the first one. nginx has no
    /// WebSockets over HTTP/2.
    fn with(&self, table: &Table, transport: Transport) -> Peer {
        let s = &self.setting;
        let (with, is_there) = match (table.with, transport) {
            (Peer::Nginx, Transport::H2) => (Peer::Haproxy, s.rivals.contains_key("haproxy")),
            (Peer::Nginx, _) => (Peer::Nginx, s.rivals.contains_key("nginx")),
            (with, _) => (with, true),
        };
        if !is_there && s.other.is_some() { Peer::Tidegate } else { with }
    }

    pub fn summaries(&self) -> Vec<Summary> {
        let mut groups: Vec<(Case, Peer)> = self.rows.iter().map(|row| (row.case, row.peer)).collect();
        groups.sort_unstable();
        groups.dedup();
        groups.into_iter().map(|(case, peer)| self.summary(case, peer)).collect()
    }

    fn summary(&self, case: Case, peer: Peer) -> Summary {
        let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        let mut errors: BTreeMap<String, u64> = BTreeMap::new();
        let mut endings: BTreeMap<String, u64> = BTreeMap::new();
        for row in self.rows.iter().filter(|row| (row.case, row.peer) == (case, peer)) {
            for (name, value) in &row.values {
                values.entry(name.clone()).or_default().push(*value);
            }
            for (error, count) in &row.errors {
                *errors.entry(error.clone()).or_default() += count;
            }
            for (ending, count) in &row.endings {
                *endings.entry(ending.clone()).or_default() += count;
            }
        }
        let table = TABLES.iter().find(|table| table.measure == case.measure()).expect("each measure has a table");
        // Of each round what is compared: differences are those within one.
        let compared = |case: Case, peer: Peer| -> BTreeMap<u32, f64> {
            let rows = self.rows.iter().filter(|row| (row.case, row.peer) == (case, peer));
            rows.filter_map(|row| Some((row.round, *row.values.get(table.compared?)?))).collect()
        };
        let values_here = compared(case, peer);
        let in_percent_of = |others: &BTreeMap<u32, f64>| {
            Spread::of(
                values_here
                    .iter()
                    .filter_map(|(round, value)| {
                        let other = others.get(round).filter(|other| **other > 0.0)?;
                        Some((value - other) / other * 100.0)
                    })
                    .collect(),
            )
        };
        let with = self.with(table, case.transport());
        let plain = compared(case.plain(), peer);
        let more = values_here.iter().filter_map(|(round, value)| Some(value - plain.get(round)?));
        Summary {
            case,
            peer,
            values: values.into_iter().filter_map(|(name, values)| Some((name, Spread::of(values)?))).collect(),
            difference_percent: if peer == with { None } else { in_percent_of(&compared(case, with)) },
            more_than_plain: if case.plain() == case { None } else { Spread::of(more.collect()) },
            next_to_few: case.with_few().and_then(|few| in_percent_of(&compared(few, peer))),
            errors,
            endings,
        }
    }

    pub fn markdown(&self) -> String {
        let mut text = String::new();
        let result = self.write_markdown(&mut text);
        result.expect("writing to a String does not fail");
        text
    }

    fn write_markdown(&self, text: &mut String) -> fmt::Result {
        let s = &self.setting;
        writeln!(text, "`{}`\n", s.host.command)?;
        let programs = [Some(s.tidegate.clone()), s.other.as_ref().map(|other| format!("other: {other}"))];
        let programs =
            programs.into_iter().chain(s.rivals.values().cloned().map(Some)).chain([s.crates.clone()]).flatten();
        writeln!(
            text,
            "{}; Linux {}, {} cores ({}), {} workers each; load average before: {}; rounds: {}. Median (min..max) of \
             them.",
            programs.collect::<Vec<_>>().join(", "),
            s.host.kernel,
            s.host.cores,
            s.host.cpu,
            s.workers,
            s.host.load_average_before,
            s.rounds,
        )?;
        if s.host.debug_build {
            writeln!(text, "\n**A debug build: these figures say nothing.**")?;
        }
        let summaries = self.summaries();
        for table in TABLES {
            let with = self.with(&table, Transport::Plain);
            let with_http2 = self.with(&table, Transport::H2);
            let Table { measure, title, compared, columns, .. } = table;
            let rows: Vec<&Summary> = summaries.iter().filter(|summary| summary.case.measure() == measure).collect();
            if rows.is_empty() {
                continue;
            }
            writeln!(text, "\n### {title}\n\n{}\n", self.circumstances(measure))?;
            // Where something can't be measured for any of them, it is left out.
            let is_there = |name: &str| rows.iter().any(|row| row.values.contains_key(name));
            let columns = columns.iter().copied().flatten().copied();
            let columns: Vec<Column> = columns.filter(|(_, name)| is_there(name)).collect();
            let names: Vec<String> = columns.iter().map(|(title, _)| (*title).to_owned()).collect();
            let compared = columns.iter().find(|(_, name)| Some(*name) == compared);
            let with_http2 = if rows.iter().any(|row| row.case.transport() == Transport::H2) && with_http2 != with {
                format!(" (HTTP/2: to {with_http2})")
            } else {
                String::new()
            };
            let more = rows.iter().any(|row| row.more_than_plain.is_some());
            let few = rows.iter().any(|row| row.next_to_few.is_some());
            let mut titles = names;
            titles.extend(more.then(|| "more than over TCP".to_owned()));
            titles.extend(compared.filter(|_| few).map(|(compared, _)| format!("{compared} next to {FEW} sessions")));
            titles.extend(compared.map(|(compared, _)| format!("{compared} next to {with}{with_http2}")));
            writeln!(text, "| | through | {} |", titles.join(" | "))?;
            writeln!(text, "|---:|---|{}", "---:|".repeat(titles.len()))?;
            for row in &rows {
                write!(text, "| {} | {} |", row.case, row.peer)?;
                let cell = |text: Option<String>| text.unwrap_or_else(|| "–".to_owned());
                let mut cells: Vec<String> =
                    columns.iter().map(|(_, name)| cell(row.values.get(*name).map(Spread::to_string))).collect();
                let percent = |Spread { median, min, max }| format!("{median:+.0} % ({min:+.0}..{max:+.0})");
                cells.extend(more.then(|| cell(row.more_than_plain.map(|more| more.to_string()))));
                cells.extend(compared.filter(|_| few).map(|_| cell(row.next_to_few.map(percent))));
                cells.extend(compared.map(|_| cell(row.difference_percent.map(percent))));
                writeln!(text, " {} |", cells.join(" | "))?;
            }
            for row in &rows {
                let dropped = row.values.get("packets_dropped").map_or(0.0, |dropped| dropped.max);
                if dropped > 0.0 {
                    writeln!(
                        text,
                        "\nIn a round of {} through {} up to {dropped} packets were dropped: a queue of received ones, a core's \
                         (netdev_max_backlog) or a device's, was full.",
                        row.case, row.peer
                    )?;
                }
            }
            for (what, of) in [("Ends", |row: &Summary| &row.endings), ("Failures", |row: &Summary| &row.errors)]
                as [(&str, fn(&Summary) -> &BTreeMap<String, u64>); 2]
            {
                for row in rows.iter().filter(|row| !of(row).is_empty()) {
                    write!(text, "\n{what} of {} through {}:", row.case, row.peer)?;
                    for (nth, (name, count)) in of(row).iter().enumerate() {
                        write!(text, "{} {count} x {name}", if nth == 0 { "" } else { ";" })?;
                    }
                    writeln!(text)?;
                }
            }
        }
        Ok(())
    }

    /// What a table's rows have in common.
    fn circumstances(&self, measure: &str) -> String {
        let s = &self.setting;
        let ramp = match measure {
            "ramp" => format!("{} clients more per second, then {} s as many. ", s.ramp_rate, s.ramp_hold),
            _ => String::new(),
        };
        let tls = match s.crates {
            Some(_) => format!(
                " TLS: {SUITE}; every server gives tickets, none has a cache. HTTP/2: over the same TLS, {} sessions on a connection, \
                 which is there already in echo and churn.",
                s.streams
            ),
            None => String::new(),
        };
        match measure {
            "echo" => format!("{} s per leg.{tls}", s.seconds),
            "churn" if s.churn_sessions > 0 => {
                let sessions = number(f64::from(s.churn_sessions));
                format!("{sessions} sessions per leg, {} at once.{tls}", s.at_once)
            }
            "churn" => format!("{} s per leg, {} sessions at once.{tls}", s.seconds, s.at_once),
            "open" => format!("{} s per leg. Times are from when a message was due.", s.open_seconds),
            "drain" => format!(
                "Each client has a message echoed five times a second; a proxy has {} s to stop.",
                ending::GRACE.as_secs()
            ),
            "kill" => "Each client has a message echoed five times a second.".to_owned(),
            "idle" => format!("{} sessions.{tls}", s.sessions),
            "fanout" => format!(
                "{} messages of {} in a second, {} s per leg. `tidegate` has a connection to the backend for each watcher, `broadcast` \
                 one for all, `batched` too, and its messages wait up to 20 ms for more.",
                fanout::RATE,
                size(fanout::BYTES),
                s.seconds
            ),
            _ if s.namespaces => format!(
                "{ramp}Clients, proxy and backend in network namespaces of their own; the backend's backlog {}, its somaxconn {}.",
                s.backend_backlog, s.backend_somaxconn
            ),
            _ => {
                "**On loopback: overflows, drops and RSTs are those of the host, and somaxconn is its own.**".to_owned()
            }
        }
    }

    /// Pictures of all that was measured, each in a file.
    pub fn plot(&self, folder: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(folder)?;
        let s = &self.setting;
        let rounds = if s.rounds == 1 { "one round".to_owned() } else { format!("{} rounds", s.rounds) };
        let about = format!(
            "Linux {}, {} cores ({}), {} workers each, {rounds}",
            s.host.kernel, s.host.cores, s.host.cpu, s.workers
        );
        let about = if s.host.debug_build { format!("a debug build, which says nothing; {about}") } else { about };
        let programs = [Some(&s.tidegate), s.other.as_ref()].into_iter().flatten().chain(s.rivals.values());
        let programs = programs.map(String::as_str).collect::<Vec<_>>().join(", ");
        let summaries = self.summaries();
        for table in &TABLES {
            let summaries: Vec<&Summary> = summaries.iter().filter(|row| row.case.measure() == table.measure).collect();
            let rows: Vec<&Row> = self.rows.iter().filter(|row| row.case.measure() == table.measure).collect();
            for plot in table.plots.iter().filter(|_| !rows.is_empty()) {
                let file = folder.join(plot.file).with_extension("svg");
                let picture = plots::plot(plot, [&programs, &about], &summaries, &rows);
                fs::write(&file, picture).with_context(|| file.display().to_string())?;
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

/// The versions that the lock file says.
fn crates() -> anyhow::Result<String> {
    let lock: toml::Table = include_str!("../../Cargo.lock").parse()?;
    let packages = lock.get("package").and_then(toml::Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let version = |name: &str| {
        let package =
            packages.iter().find(|package| package.get("name").and_then(toml::Value::as_str) == Some(name))?;
        Some(format!("{name} {}", package.get("version")?.as_str()?))
    };
    Ok(["rustls", "ring", "h2"].into_iter().filter_map(version).collect::<Vec<_>>().join(", "))
}

pub fn size(bytes: usize) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        _ if bytes.is_multiple_of(1024) => format!("{} KiB", bytes / 1024),
        _ => format!("{:.1} KiB", bytes as f64 / 1024.0),
    }
}
