//! tidegate next to nginx and next to no proxy at all, in one run: CPU time per message, memory per idle session, CPU
//! time per short session. What the columns mean and what they leave out is in `docs/benchmarks.md`.
//!
//! ```text
//! load (one thread) ---- direct | nginx | tidegate ---- echo backend (one thread)
//! ```
//!
//! - All three are processes of their own, started for each leg and ended after it, so that no leg inherits the memory or
//!   the connections of another. Load and backend are this same program under another subcommand.
//! - Interleaved: within a round every measurement goes through all peers, and the order rotates from round to round, so
//!   that a slow minute of the machine meets all of them. Differences are paired: within one round.
//! - Everything it starts has its own process group and dies with it, also on Ctrl-C, on a panic and on SIGKILL; nothing
//!   else is ever signalled.
//! - Deliberately absent: latency (a closed loop cannot tell it), and thresholds. It measures; people judge.

#![allow(unreachable_pub, reason = "modules of one program")]

mod backend;
mod load;
mod peers;
mod procfs;
mod report;
mod wire;

use std::{
    ffi::OsString,
    fs, io,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    load::{Order, Outcome, Work},
    peers::{Peer, Process},
    report::{Report, Row},
};

/// Open files per process: what a small container often has, and enough for 9,000 sessions of two descriptors each.
const DESCRIPTORS: u64 = 20_000;

/// Descriptors of a proxy that are not sessions': listeners, epoll, logs, handshakes under way.
const DESCRIPTORS_SPARE: u64 = 500;

/// Before the measuring begins; in it caches and windows grow to what they will be.
const WARMUP: Duration = Duration::from_millis(500);

/// The payload that every idle session has echoed once, and that of a short session.
const IDLE_BYTES: usize = 16 * 1024;
const CHURN_BYTES: usize = 64;

/// Beyond the time that a leg measures for: connecting, settling, slow machines.
const LEG_SLACK: Duration = Duration::from_mins(2);

/// Measures tidegate next to nginx and a direct connection
#[derive(Debug, Parser)]
#[command(name = "compare", bin_name = "cargo bench --bench compare --", args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    role: Option<Role>,
    #[command(flatten)]
    options: Options,
    /// Given by cargo; without it nothing is measured, so that a test run of all targets takes no hour
    #[arg(long, hide = true)]
    bench: bool,
}

/// What else this program is.
#[derive(Debug, Subcommand)]
#[command(disable_help_subcommand = true)]
enum Role {
    /// The load generator: one order, as JSON
    #[command(hide = true)]
    Load { order: String },
    /// The echo backend
    #[command(hide = true)]
    Backend,
    /// Turns into another program, which gets a signal when the one that started it ends
    #[command(hide = true)]
    Held {
        signal: peers::Death,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
}

#[derive(Debug, clap::Args)]
struct Options {
    /// How often everything is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// What is measured
    #[arg(long, value_delimiter = ',', default_value = "echo,idle,churn")]
    only: Vec<Measure>,
    /// Payloads of `echo`, in bytes
    #[arg(long, value_delimiter = ',', default_value = "64,1024,16384,262144")]
    sizes: Vec<usize>,
    /// How long one leg of `echo` and `churn` is measured
    #[arg(long, default_value_t = 3.0, value_parser = seconds)]
    seconds: f64,
    /// What tidegate is measured next to [default: both, nginx if it is installed]
    #[arg(long, value_delimiter = ',')]
    peers: Option<Vec<Next>>,
    /// Connections of `echo`, and sessions under way at once in `churn` and while `idle` connects
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=5000))]
    connections: u32,
    /// Sessions of `idle`
    #[arg(long, default_value_t = 9000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    sessions: u32,
    /// Both proxies write their log line per session, as they do by default [default: neither does]
    #[arg(long)]
    logs: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if (0.1..=3600.0).contains(&seconds) { Ok(seconds) } else { Err("between 0.1 and 3600".to_owned()) }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Measure {
    /// Closed loop of messages: CPU time per message
    Echo,
    /// Sessions that do nothing: memory per session
    Idle,
    /// Connect, upgrade, one echo, Close handshake: CPU time per session
    Churn,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Next {
    /// From the system's packages
    Nginx,
    /// No proxy
    Direct,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.role {
        Some(Role::Load { order }) => load::main(&order),
        Some(Role::Backend) => backend::main(),
        Some(Role::Held { signal, command }) => Err(peers::become_held(signal, &command)),
        None if cli.bench => measure(&cli.options),
        None => {
            eprintln!("nothing is measured: run it as `cargo bench --bench compare`");
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

/// Measures, or is ended by a signal: then the future is dropped, and with it every process and file that it owns.
fn measure(options: &Options) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            result = compare(options) => result,
            _ = interrupt.recv() => bail!("interrupted: everything that was started is ended"),
            _ = terminate.recv() => bail!("terminated: everything that was started is ended"),
        }
    })
}

async fn compare(options: &Options) -> anyhow::Result<()> {
    let descriptors = raise_descriptors()?;
    let needed = u64::from(options.sessions) * 2 + DESCRIPTORS_SPARE;
    ensure!(
        !options.only.contains(&Measure::Idle) || needed <= descriptors,
        "{} idle sessions need {needed} descriptors per process, there are {descriptors}: use --sessions",
        options.sessions
    );
    let peers = peers(options)?;
    let folder = tempfile::Builder::new().prefix("tidegate-compare-").tempdir();
    let folder = folder.context("a folder for configurations and logs")?;
    let mut report = Report::new(options, &peers)?;

    for round in 0..options.rounds {
        let mut order = peers.clone();
        order.rotate_left(round as usize % peers.len());
        for &measure in &options.only {
            let sizes = match measure {
                Measure::Echo => options.sizes.as_slice(),
                Measure::Idle => &[IDLE_BYTES],
                Measure::Churn => &[CHURN_BYTES],
            };
            for &bytes in sizes {
                for &peer in &order {
                    // Without a proxy there is no memory of a proxy.
                    if (measure, peer) == (Measure::Idle, Peer::Direct) {
                        continue;
                    }
                    let begun = Instant::now();
                    let outcome = leg(folder.path(), options, measure, bytes, peer)
                        .await
                        .with_context(|| format!("round {}, {measure:?} {bytes} B through {peer}", round + 1))?;
                    let row = Row::new(round, measure, bytes, peer, &outcome);
                    eprintln!(
                        "round {} of {}: {row}, took {:.1} s",
                        round + 1,
                        options.rounds,
                        begun.elapsed().as_secs_f64()
                    );
                    if let Some(error) = &outcome.first_error {
                        eprintln!("  {} failures, the first: {error}", outcome.failures);
                    }
                    report.rows.push(row);
                }
            }
        }
    }

    print!("{}", report.markdown());
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().context("a folder above target/tmp")?;
    let file = target.join("bench/compare.json");
    fs::create_dir_all(target.join("bench"))?;
    fs::write(&file, report.json()? + "\n").with_context(|| file.display().to_string())?;
    Ok(())
}

/// One measurement through one peer, with processes of its own.
async fn leg(folder: &Path, options: &Options, measure: Measure, bytes: usize, peer: Peer) -> anyhow::Result<Outcome> {
    let (backend, backend_address) = peers::start_backend(folder).await?;
    let proxy = peers::start(folder, peer, backend_address, options.logs).await?;
    let address = proxy.as_ref().map_or(backend_address, |proxy| proxy.address);
    let connections = options.connections as usize;
    let only_listeners = || {
        procfs::only_listener(backend_address.port(), &[backend.pid()])?;
        proxy.as_ref().map_or(Ok(()), |proxy| procfs::only_listener(address.port(), &proxy.pids))
    };
    only_listeners()?;

    let (warmup, seconds) = (WARMUP.as_secs_f64(), options.seconds);
    let order = Order {
        address,
        proxy: proxy.as_ref().map(|proxy| proxy.pids.clone()).unwrap_or_default(),
        backend: backend.pid(),
        connections,
        bytes,
        work: match measure {
            Measure::Echo => Work::Echo { warmup, seconds },
            Measure::Idle => Work::Idle { sessions: options.sessions as usize },
            Measure::Churn => Work::Churn { warmup, seconds },
        },
    };
    let mut load = Process::start_self(folder, "load", &["load", &serde_json::to_string(&order)?])?;
    let printed = load.wait(WARMUP + Duration::from_secs_f64(seconds) + LEG_SLACK).await.and_then(|printed| {
        serde_json::from_str(printed.trim()).with_context(|| format!("load printed {:?}", printed.trim()))
    });
    let outcome = printed.map_err(|error| match &proxy {
        Some(proxy) => error.context(format!("the end of the log of {peer}:\n{}", proxy.log_tail())),
        None => error,
    })?;
    // Again: who joined meanwhile took a part of the load.
    only_listeners()?;
    Ok(outcome)
}

/// As many descriptors as are permitted, for this process and those it starts.
fn raise_descriptors() -> io::Result<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.unwrap_or(DESCRIPTORS).min(DESCRIPTORS);
    if current != Some(wanted) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum })?;
    }
    Ok(wanted)
}

/// In the order of the first round.
fn peers(options: &Options) -> anyhow::Result<Vec<Peer>> {
    let asked = |peer| options.peers.as_ref().map(|peers| peers.contains(&peer));
    let mut peers = Vec::new();
    if asked(Next::Direct).unwrap_or(true) {
        peers.push(Peer::Direct);
    }
    match (asked(Next::Nginx), peers::nginx_version()) {
        (Some(false), _) => {}
        (_, Ok(_)) => peers.push(Peer::Nginx),
        (Some(true), Err(error)) => return Err(error.context("nginx was asked for")),
        (None, Err(error)) => eprintln!("without nginx: {error:#}"),
    }
    peers.push(Peer::Tidegate);
    Ok(peers)
}
