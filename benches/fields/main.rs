//! Five reports from the field, repeated: direct to a backend with one poller and a backlog of 100, and through tidegate. One command
//! makes a table and a plot for each, with the report's own figures and the doubts about it beside what shows here. What they mean is in
//! `docs/field-reports.md`.
//!
//! ```text
//! clients (one thread) ---- direct | tidegate ---- backend: 100 ms for a result, in three parts
//! ```
//!
//! - Each leg has three network namespaces of its own and new processes, where it may (root): no `TIME_WAIT`, port or counter of another.
//! - Interleaved: a round goes through all legs of all reports.
//! - What it starts dies with it, also on Ctrl-C and on SIGKILL.
//! - Deliberately absent: thresholds, and other proxies, which are in `compare`. It measures; people judge.

#![allow(unreachable_pub, reason = "modules of one program")]

mod backend;
mod clients;
#[path = "../common/figures.rs"]
mod figures;
mod leg;
#[path = "../common/namespaces.rs"]
#[allow(dead_code, reason = "some of it is for compare only")]
mod namespaces;
mod plot;
#[path = "../common/process.rs"]
mod process;
#[path = "../common/procfs.rs"]
#[allow(dead_code, reason = "some of it is for compare only")]
mod procfs;
mod report;
mod stories;
#[path = "../common/svg.rs"]
#[allow(dead_code, reason = "some of it is for compare only")]
mod svg;

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    report::{Line, Row, Setting},
    stories::Story,
};

/// Open files per process: what a small container often has.
const DESCRIPTORS: u64 = 20_000;

/// Repeats five reports from the field
#[derive(Debug, Parser)]
#[command(name = "fields", bin_name = "cargo bench --bench fields --", args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    role: Option<Role>,
    /// How often everything is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Only these reports
    #[arg(long, value_delimiter = ',', default_value = "1,2,3,4,5")]
    only: Vec<usize>,
    /// One round with a tenth of the clients: to see that it works, not for figures
    #[arg(long)]
    quick: bool,
    /// Given by cargo; without it nothing is measured, so that a test run of all targets takes no hour
    #[arg(long, hide = true)]
    bench: bool,
}

/// What else this program is.
#[derive(Debug, Subcommand)]
#[command(disable_help_subcommand = true)]
enum Role {
    #[command(hide = true)]
    Clients { order: String },
    #[command(hide = true)]
    Backend(backend::Options),
    /// Turns into another program, which gets a signal when the one that started it ends
    #[command(hide = true)]
    Held {
        signal: process::Death,
        #[arg(long)]
        namespace: Option<PathBuf>,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.role {
        Some(Role::Clients { order }) => clients::main(&order),
        Some(Role::Backend(options)) => backend::main(&options),
        Some(Role::Held { signal, namespace, command }) => {
            Err(process::become_held(signal, namespace.as_deref(), &command))
        }
        None if cli.bench => measure(&cli),
        None => {
            eprintln!("nothing is measured: run it as `cargo bench --bench fields`");
            return ExitCode::SUCCESS;
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(cli: &Cli) -> anyhow::Result<()> {
    raise_descriptors()?;
    let in_namespaces = namespaces_or_note();
    let setting = Setting::new(in_namespaces)?;
    let mut stories = stories::all(cli.quick);
    stories.retain(|story| cli.only.contains(&story.number));
    let rounds = if cli.quick { 1 } else { cli.rounds };
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().context("a folder above target/tmp")?;
    let results = target.join("bench");
    fs::create_dir_all(&results)?;
    let folder = tempfile::Builder::new().prefix("tidegate-fields-").tempdir();
    let folder = folder.context("a folder for configurations and logs")?;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut rows = Vec::new();
        for round in 1..=rounds {
            // The leg is dropped on a signal, and with it every process and namespace that it owns.
            tokio::select! {
                result = measure_round(&stories, round, in_namespaces, folder.path(), &mut rows) => result?,
                _ = interrupt.recv() => bail!("interrupted in round {round}"),
                _ = terminate.recv() => bail!("terminated in round {round}"),
            }
            // After each round: a long run that is interrupted has not been in vain.
            write(&results, &setting, &stories, &rows)?;
        }
        Ok(())
    })?;
    println!("tables and plots are in {}: fields.md, fields.json, field-report-*.svg", results.display());
    Ok(())
}

async fn measure_round(
    stories: &[Story],
    round: u32,
    in_namespaces: bool,
    folder: &Path,
    rows: &mut Vec<Row>,
) -> anyhow::Result<()> {
    for story in stories {
        // In turn from the one end and from the other.
        let mut legs: Vec<_> = story.legs.iter().collect();
        if round.is_multiple_of(2) {
            legs.reverse();
        }
        for leg in legs {
            let begun = Instant::now();
            let name = format!("round {round}, report {}, {}, {}", story.number, leg.through, leg.label);
            let outcome = leg::run(leg, in_namespaces, folder).await.with_context(|| name.clone())?;
            let values: Vec<String> = story
                .columns
                .iter()
                .filter_map(|(_, column)| Some(format!("{column} {}", figures::number(*outcome.values.get(*column)?))))
                .collect();
            eprintln!("{name}: {}; took {:.1} s", values.join(", "), begun.elapsed().as_secs_f64());
            for (error, count) in &outcome.errors {
                eprintln!("  {count} x {error}");
            }
            let (through, label) = (leg.through, leg.label.clone());
            rows.push(Row { story: story.number, round, through, label, outcome });
        }
    }
    Ok(())
}

fn write(folder: &Path, setting: &Setting, stories: &[Story], rows: &[Row]) -> anyhow::Result<()> {
    #[derive(Serialize)]
    struct Document<'a> {
        setting: &'a Setting,
        lines: &'a [Line],
        rows: &'a [Row],
    }
    let mut text = format!("{setting}\n\n");
    let mut all = Vec::new();
    for story in stories {
        let lines = report::lines(story, rows);
        text += &report::markdown(story, &lines);
        fs::write(folder.join(format!("field-report-{}.svg", story.number)), plot::svg(story, &lines))?;
        all.extend(lines);
    }
    fs::write(folder.join("fields.md"), text)?;
    let document = Document { setting, lines: &all, rows };
    fs::write(folder.join("fields.json"), serde_json::to_string_pretty(&document)? + "\n")?;
    Ok(())
}

/// Whether network namespaces can be had. If not, those who read the figures must know.
fn namespaces_or_note() -> bool {
    let possible = namespaces::possible();
    if let Err(error) = &possible {
        eprintln!(
            "no network namespaces ({error:#}): everything is on loopback, somaxconn and all counters are the host's"
        );
    }
    possible.is_ok()
}

/// As many descriptors as are permitted, for this process and those it starts, and no more than a small container has.
fn raise_descriptors() -> io::Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.unwrap_or(DESCRIPTORS).min(DESCRIPTORS);
    if current != Some(wanted) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum })?;
    }
    Ok(())
}
