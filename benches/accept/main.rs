//! Who should accept, and on which thread should a session then live? An experiment: the same parts of tidegate put together in
//! five ways, under five loads. What was found, and what was decided, is in `docs/accept-loops.md`.
//!
//! ```text
//! connects (open loop) --\
//! talking sessions -------- the proxy, in one of five assemblies ---- backend: echo, and a sink
//! a saturating session --/
//! ```
//!
//! - Each leg has a network namespace of its own and new processes: no `TIME_WAIT`, port or counter of another, and nobody else
//!   listens on the proxy's port (`unshare --net`: as root, or where users may make namespaces).
//! - Interleaved: within a round each load goes through all assemblies, and the order rotates from round to round.
//! - Times are from the moment at which a connect was to begin.
//! - Deliberately absent: pinning, thresholds. It measures; people judge.

#![allow(unreachable_pub, reason = "modules of one program")]

mod backend;
mod client;
#[path = "../common/figures.rs"]
mod figures;
mod leg;
mod noise;
mod process;
#[path = "../common/procfs.rs"]
#[allow(dead_code, reason = "some of it is for compare only")]
mod procfs;
mod proxy;
mod report;
#[path = "../compare/wire.rs"]
#[allow(dead_code, reason = "some of it is for compare only")]
mod wire;

use std::{
    fmt, fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum};
use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

use crate::{
    leg::{Order, Outcome},
    noise::{Begun, Noise},
    process::{Process, end_with_parent},
    proxy::Assembly,
    report::{Report, Row},
};

/// Open files per process: what a small container often has.
const DESCRIPTORS: u64 = 20_000;

/// How often a leg is tried while others use the machine.
const TRIES: u32 = 10;

/// Measures who should accept
#[derive(Debug, Parser)]
#[command(name = "accept", bin_name = "cargo bench --bench accept --", args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    role: Option<Role>,
    #[command(flatten)]
    options: Options,
    /// How often everything is measured
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Only these loads
    #[arg(long, value_delimiter = ',', default_value = "spike,busy,alone,saturated,echo")]
    only: Vec<Workload>,
    /// Only these assemblies
    #[arg(long, value_delimiter = ',', default_value = "per-core,hand-off,shared,multi-1,multi-n")]
    assemblies: Vec<Assembly>,
    /// One round with short legs: to see that it works, not for figures
    #[arg(long)]
    quick: bool,
    /// A leg is repeated, nine times at most, while other programs used more than this percentage of the machine's CPU time
    #[arg(long, default_value_t = 2.0)]
    max_noise: f64,
    /// How long to wait before each leg until others are silent, in seconds
    #[arg(long, default_value_t = 600)]
    patience: u64,
    /// Goes on where an earlier run with the same options ended, in `target/bench/accept.json`
    #[arg(long)]
    append: bool,
    /// Writes every single connect to this folder, one file per leg
    #[arg(long)]
    samples: Option<PathBuf>,
    /// Given by cargo; without it nothing is measured, so that a test run of all targets takes no hour
    #[arg(long, hide = true)]
    bench: bool,
}

/// What else this program is.
#[derive(Debug, Subcommand)]
#[command(disable_help_subcommand = true)]
enum Role {
    #[command(hide = true)]
    Leg { order: String },
    #[command(hide = true)]
    Proxy { assembly: Assembly, backend: SocketAddr },
    #[command(hide = true)]
    Backend,
    #[command(hide = true)]
    Connects { address: SocketAddr, connects: String },
    #[command(hide = true)]
    Flood { address: SocketAddr, flood: String },
    #[command(hide = true)]
    Talk { address: SocketAddr, talk: String },
    #[command(hide = true)]
    Echo { address: SocketAddr, bytes: usize },
}

#[derive(Debug, Clone, clap::Args, Serialize, Deserialize)]
pub struct Options {
    /// Connects at once of `spike`
    #[arg(long, default_value_t = 9500)]
    spike: usize,
    /// Sessions of `busy` that talk, and how many messages per second each sends
    #[arg(long, default_value_t = 500)]
    talkers: usize,
    #[arg(long, default_value_t = 20.0)]
    talk_rate: f64,
    /// Connects at once of `busy`
    #[arg(long, default_value_t = 8000)]
    busy_spike: usize,
    /// Connects per second of `alone` and `saturated`, on average
    #[arg(long, default_value_t = 250.0)]
    rate: f64,
    /// How long for; 10,000 connects and more for a p99.9 that means something
    #[arg(long, default_value_t = 41.0)]
    seconds: f64,
    /// Payload of the saturating session's frames
    #[arg(long, default_value_t = 16)]
    flood_bytes: usize,
    /// Its client's `SO_SNDBUF` (doubled by the kernel), so that no write of it takes long; 0: as large as the kernel likes
    #[arg(long, default_value_t = 65_536)]
    flood_buffer: usize,
    /// How long `echo` is measured
    #[arg(long, default_value_t = 3.0)]
    echo_seconds: f64,
    /// net.core.somaxconn of the namespaces
    #[arg(long, default_value_t = 65_535)]
    somaxconn: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Workload {
    /// Connects at once, into an idle proxy
    Spike,
    /// Connects at once, beside sessions that talk
    Busy,
    /// Connects at a steady rate
    Alone,
    /// The same beside one session that sends as fast as it is read
    Saturated,
    /// Closed loop of messages
    Echo,
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Spike => "spike",
            Self::Busy => "busy",
            Self::Alone => "alone",
            Self::Saturated => "saturated",
            Self::Echo => "echo",
        })
    }
}

/// As in the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.role {
        Some(role) => be(role),
        None if cli.bench => measure(cli),
        None => {
            eprintln!("nothing is measured: run it as `cargo bench --bench accept`");
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

fn be(role: Role) -> anyhow::Result<()> {
    end_with_parent()?;
    match role {
        Role::Leg { order } => leg::main(&order),
        Role::Proxy { assembly, backend } => proxy::main(assembly, backend),
        Role::Backend => backend::main(),
        Role::Connects { address, connects } => client::connects(address, serde_json::from_str(&connects)?),
        Role::Flood { address, flood } => client::flood(address, serde_json::from_str(&flood)?),
        Role::Talk { address, talk } => client::talk(address, serde_json::from_str(&talk)?),
        Role::Echo { address, bytes } => client::echo(address, bytes),
    }
}

fn measure(mut cli: Cli) -> anyhow::Result<()> {
    if cli.quick {
        cli.rounds = 1;
        cli.options.seconds = cli.options.seconds.min(4.0);
        cli.options.echo_seconds = 1.0;
        cli.patience = 0;
        cli.max_noise = 100.0;
    }
    raise_descriptors()?;
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().context("a folder above target/tmp")?;
    let folder = target.join("bench");
    for folder in [Some(&folder), cli.samples.as_ref()].into_iter().flatten() {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let mut report = Report::new(&cli.options)?;
    let first = if cli.append { report.append_to(&folder.join("accept.json"))? } else { 0 };
    let last = first + cli.rounds;
    for round in first..last {
        let mut assemblies = cli.assemblies.clone();
        assemblies.rotate_left(round as usize % cli.assemblies.len());
        let mut workloads = cli.only.clone();
        if round % 2 == 1 {
            workloads.reverse();
        }
        // Loads inside, so that `alone` and `saturated` of one assembly, whose ratio counts, are neighbours.
        for &assembly in &assemblies {
            for &workload in &workloads {
                let begun = Instant::now();
                let outcome = quiet_leg(&cli, round, workload, assembly)
                    .with_context(|| format!("round {}, {workload} through {assembly}", round + 1))?;
                let row = Row::new(round, workload, assembly, &outcome);
                let took = begun.elapsed().as_secs_f64();
                eprintln!("round {} of {last}: {row}, took {took:.1} s", round + 1);
                if let Some(error) = &outcome.first_error {
                    eprintln!("  the first failure: {error}");
                }
                if let Some(folder) = &cli.samples {
                    let file = folder.join(format!("{}-{workload}-{assembly}.json", round + 1));
                    fs::write(&file, serde_json::to_string(&outcome)?).with_context(|| file.display().to_string())?;
                }
                report.rows.push(row);
            }
        }
        // After each round: a long run that is interrupted has not been in vain.
        fs::write(folder.join("accept.json"), report.json()? + "\n")?;
        fs::write(folder.join("accept.md"), report.markdown())?;
    }
    print!("{}", report.markdown());
    Ok(())
}

/// A leg in which the machine had little else to do; else the one with the least of that.
fn quiet_leg(cli: &Cli, round: u32, workload: Workload, assembly: Assembly) -> anyhow::Result<Outcome> {
    let mut quietest: Option<(f64, Outcome)> = None;
    for _ in 0..TRIES {
        noise::wait_for_quiet(cli.max_noise, Duration::from_secs(cli.patience))?;
        let begun = Begun::now()?;
        let mut outcome = leg(&cli.options, round, workload, assembly)?;
        let Noise { others_percent, stolen_percent } = begun.noise()?;
        let values = [("others_percent", others_percent), ("stolen_percent", stolen_percent)];
        outcome.values.extend(values.map(|(name, value)| (name.to_owned(), value)));
        let sum = others_percent + stolen_percent;
        if quietest.as_ref().is_none_or(|(least, _)| sum < *least) {
            quietest = Some((sum, outcome));
        }
        if sum <= cli.max_noise {
            break;
        }
        eprintln!("  {workload} through {assembly}: others used {sum:.1} % of the machine");
    }
    Ok(quietest.context("at least one try")?.1)
}

fn leg(options: &Options, round: u32, workload: Workload, assembly: Assembly) -> anyhow::Result<Outcome> {
    // The same moments for all assemblies of a round.
    let order = Order { assembly, workload, seed: round.into(), options: options.clone() };
    let unshare: &[&str] = if geteuid().is_root() {
        &["unshare", "--net", "--"]
    } else {
        &["unshare", "--user", "--map-root-user", "--net", "--"]
    };
    Process::start("leg", unshare, &[&serde_json::to_string(&order)?])?.hear()
}

/// As many descriptors as are permitted, for this process and those it starts.
fn raise_descriptors() -> io::Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.unwrap_or(DESCRIPTORS).min(DESCRIPTORS);
    if current != Some(wanted) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum })?;
    }
    Ok(())
}
