//! tidegate next to other proxies, a bare relay and no proxy at all, in one run: CPU time per message, memory per idle session, CPU time
//! per short session, what becomes of thousands of clients that come at once, what a feed costs with thousands who watch it, how long
//! messages are under way, and how sessions end when somebody goes away.
//! What the columns mean and what they leave out is in `docs/benchmarks.md`.
//!
//! ```text
//! load (one thread) ---- direct | null | nginx | haproxy | envoy | caddy | tidegate ---- echo backend (one thread)
//!             TCP, TLS or HTTP/2                                          HTTP/1.1 over TCP
//! ```
//!
//! - All three are processes of their own, started for each leg and ended after it, so that no leg inherits the memory or
//!   the connections of another. Load and backend are this same program under another subcommand.
//! - Interleaved: within a round every measurement goes through all peers, and the order rotates from round to round, so
//!   that a slow minute of the machine meets all of them. Differences are paired: within one round.
//! - Everything it starts has its own process group and dies with it, also on Ctrl-C, on a panic and on SIGKILL; nothing
//!   else is ever signalled.
//! - Deliberately absent: the latency of messages in a closed loop, which cannot tell it, and thresholds. It measures; people judge.

#![allow(unreachable_pub, reason = "modules of one program")]

mod audit;
mod backend;
mod case;
mod ending;
mod fanout;
#[path = "../common/figures.rs"]
mod figures;
mod held;
mod histogram;
mod load;
#[path = "../common/namespaces.rs"]
mod namespaces;
mod null;
mod open;
mod peers;
mod plots;
#[path = "../common/process.rs"]
mod process;
#[path = "../common/procfs.rs"]
mod procfs;
mod ramp;
mod report;
mod rivals;
mod spike;
#[path = "../common/svg.rs"]
#[allow(dead_code, reason = "some of it is for fields only")]
mod svg;
mod tables;
mod transport;
mod watch;
mod wire;

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    pin::pin,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::sleep,
};

use crate::{
    case::{Case, Measure},
    load::{Order, Outcome, Work},
    namespaces::Place,
    peers::{Peer, Site, Tidegates},
    ramp::Ramp,
    report::{Report, Row},
    rivals::Rivals,
    transport::{Certificates, Transport},
};

/// Open files per process: what a small container often has, and enough for 9,000 sessions of two descriptors each.
const DESCRIPTORS: u64 = 20_000;

/// Descriptors of a proxy that are not sessions': listeners, epoll, logs, handshakes under way.
const DESCRIPTORS_SPARE: u64 = 500;

/// Before the measuring begins; in it caches and windows grow to what they will be.
const WARMUP: Duration = Duration::from_millis(500);

/// For `--quiet`: how often a leg is tried, and the pause before the next try.
const TRIES: u32 = 5;
const QUIET_PAUSE: Duration = Duration::from_secs(3);

/// Sessions of `churn` in a second, at least, where their number is given: one that waits a second for its FIN, 64 at once.
const SLOWEST_PER_SECOND: u32 = 50;

/// Beyond the time that a leg measures for: connecting, settling, slow machines.
const LEG_SLACK: Duration = Duration::from_mins(2);

/// Measures tidegate next to other proxies, a bare relay and a direct connection
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
    Backend(backend::Options),
    /// The bare relay
    #[command(hide = true)]
    Null(null::Options),
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

#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "they are flags of a command line")]
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
    /// How long one leg of `echo`, `churn` and `fanout` is measured
    #[arg(long, default_value_t = 3.0, value_parser = seconds)]
    seconds: f64,
    /// How clients come in `echo`, `idle` and `churn`; the backend has plain HTTP/1.1 in any case
    #[arg(long, value_delimiter = ',', default_value = "plain")]
    transport: Vec<Transport>,
    /// Sessions of one connection, over HTTP/2
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=100))]
    streams: u16,
    /// What tidegate is measured next to [default: direct, null, and what is installed of the others]
    #[arg(long, value_delimiter = ',')]
    peers: Option<Vec<Next>>,
    /// Where Envoy is [default: looked for on PATH]
    #[arg(long, value_name = "PATH")]
    envoy: Option<PathBuf>,
    /// Where Caddy is [default: looked for on PATH]
    #[arg(long, value_name = "PATH")]
    caddy: Option<PathBuf>,
    /// Settings of tidegate as TOML, beside its defaults: `listen.max_sockets = 16`
    #[arg(long, value_name = "TOML", value_parser = peers::settings)]
    tidegate: Vec<toml::Table>,
    /// Measures a second tidegate too, `other`, with these settings beside the first one's
    #[arg(long, value_name = "TOML", value_parser = peers::settings)]
    other: Vec<toml::Table>,
    /// The binary that is measured as tidegate [default: the one that cargo has built for this]
    #[arg(long, value_name = "PATH")]
    tidegate_binary: Option<PathBuf>,
    /// Behind each leg tidegate is told to end, and waited for: a build that counts what it does writes that down at its end (.ci/static)
    #[arg(long)]
    ends_by_itself: bool,
    /// Measures a second tidegate too, `other`: this binary [default: the first one's]
    #[arg(long, value_name = "PATH")]
    other_binary: Option<PathBuf>,
    /// Sessions of `echo`
    #[arg(long, value_delimiter = ',', default_value = "64", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    connections: Vec<u32>,
    /// Messages of `echo` under way at once, on one session after the other [default: each session always has one]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    under_way: Option<u32>,
    /// Sessions of a leg of `churn`; 0: as many as come to their end in `--seconds`
    #[arg(long, default_value_t = 0)]
    churn_sessions: u32,
    /// Sessions under way at once in `churn`, and while those of other measures connect
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=5000))]
    at_once: u32,
    /// Sessions of `idle`
    #[arg(long, default_value_t = 9000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    sessions: u32,
    /// The proxies write a log line per session [default: none does]
    #[arg(long)]
    logs: bool,
    /// A leg of `spike`, `waves`, `held`, `ramp`, `open` or `audit` is repeated, up to five times, when other programs used more than this
    /// much of the CPUs meanwhile, in percent; the least disturbed counts [default: the first counts]
    #[arg(long, value_name = "PERCENT")]
    quiet: Option<f64>,
    /// Clients of `spike`, all at once
    #[arg(long, value_delimiter = ',', default_value = "3000,5000,9500")]
    spike: Vec<u32>,
    /// The clients of `spike` send a plain GET instead of an upgrade
    #[arg(long)]
    plain: bool,
    /// How many waves `waves` has, one each second
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    waves: u32,
    /// Clients of a wave, all at once
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..))]
    wave_clients: u32,
    /// Sessions that `held` holds
    #[arg(long, default_value_t = 7500)]
    held: u32,
    /// Clients that come to them, all at once
    #[arg(long, default_value_t = 1900, value_parser = clap::value_parser!(u32).range(1..))]
    held_clients: u32,
    /// Clients that `ramp` has more each second
    #[arg(long, default_value_t = 4.0, value_parser = seconds)]
    ramp_rate: f64,
    /// Clients that `ramp` has at once in the end
    #[arg(long, default_value_t = 700, value_parser = clap::value_parser!(u32).range(1..))]
    ramp_clients: u32,
    /// For how long `ramp` then keeps them as many, in seconds
    #[arg(long, default_value_t = 10.0, value_parser = seconds)]
    ramp_hold: f64,
    /// Watchers of the feed in `fanout`
    #[arg(long, value_delimiter = ',', default_value = "100,1000,5000", value_parser = clap::value_parser!(u32).range(1..))]
    watchers: Vec<u32>,
    /// In `fanout` what a proxy sends is received by a thread of the kernel instead of in the proxy's system call: as root, with ethtool
    #[arg(long)]
    receive_apart: bool,
    /// Sessions of `open`
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    open_sessions: u32,
    /// Messages that all of these send in a second
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    open_rate: u32,
    /// Payload of such a message, in bytes
    #[arg(long, default_value_t = 128)]
    open_bytes: usize,
    /// How long one leg of `open` is measured
    #[arg(long, default_value_t = 10.0, value_parser = seconds)]
    open_seconds: f64,
    /// Sessions of `audit`, 500 of them in a second
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    audit_sessions: u32,
    /// Sessions of `drain` and `kill`
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    ending_sessions: u32,
    /// A folder for plots (SVG) of what was measured [default: none are made]
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
    /// `net.core.somaxconn` in the proxy's namespace
    #[arg(long, value_delimiter = ',', default_value = "128,65535")]
    somaxconn: Vec<u32>,
    /// `net.core.somaxconn` in the backend's namespace
    #[arg(long, default_value_t = 65535)]
    backend_somaxconn: u32,
    /// What the backend's one accept loop asks of `listen()`; Tomcat's default is 100
    #[arg(long, default_value_t = 65535)]
    backend_backlog: u16,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if (0.1..=3600.0).contains(&seconds) { Ok(seconds) } else { Err("between 0.1 and 3600".to_owned()) }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Next {
    Nginx,
    Haproxy,
    Envoy,
    Caddy,
    /// A relay that looks at nothing: what a proxy costs at least
    Null,
    /// No proxy
    Direct,
    /// Nothing: tidegate alone
    None,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.role {
        Some(Role::Load { order }) => load::main(&order),
        Some(Role::Backend(options)) => backend::main(&options),
        Some(Role::Null(options)) => null::main(&options),
        Some(Role::Held { signal, namespace, command }) => {
            Err(process::become_held(signal, namespace.as_deref(), &command))
        }
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

/// Measures until it is done or a signal comes, and reports what there is by then.
fn measure(options: &Options) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let stopped = async {
            tokio::select! {
                _ = interrupt.recv() => "interrupted",
                _ = terminate.recv() => "terminated",
            }
        };
        compare(options, stopped).await
    })
}

async fn compare(options: &Options, stopped: impl Future<Output = &'static str>) -> anyhow::Result<()> {
    let mut stopped = pin!(stopped);
    let descriptors = raise_descriptors()?;
    let in_namespaces = options.only.iter().any(|measure| measure.in_namespaces()) && namespaces_or_note();
    let cases = case::all(options, in_namespaces);
    for case in &cases {
        let needed = case.sessions() * 2 + DESCRIPTORS_SPARE;
        ensure!(
            needed <= descriptors,
            "{} sessions at once need {needed} descriptors per process, there are {descriptors}: {case} of {}",
            case.sessions(),
            case.measure()
        );
    }
    if options.receive_apart {
        let tried = namespaces::possible().and_then(|()| apart(options.backend_somaxconn));
        tried.context("--receive-apart is not possible here")?;
    }
    let (peers, rivals) = peers(options)?;
    let tidegates = Tidegates::new(
        (&options.tidegate, options.tidegate_binary.as_deref()),
        (&options.other, options.other_binary.as_deref()),
    )?;
    let folder = tempfile::Builder::new().prefix("tidegate-compare-").tempdir();
    let folder = folder.context("a folder for configurations and logs")?;
    let mut report = Report::new(options, &peers, &tidegates, &rivals, in_namespaces)?;
    let setup = Setup { folder: folder.path(), options, tidegates: &tidegates, rivals: &rivals, in_namespaces };

    let mut stopped_by = None;
    'rounds: for round in 0..options.rounds {
        for &case in &cases {
            let mut order: Vec<Peer> =
                peers.iter().copied().filter(|peer| case.is_for(*peer, options.peers.is_some())).collect();
            let first = round as usize % order.len();
            order.rotate_left(first);
            for &peer in &order {
                let begun = Instant::now();
                let outcome = tokio::select! {
                    outcome = quiet_leg(&setup, case, peer) => outcome,
                    // The leg is dropped, and with it every process and file and namespace that it owns.
                    signal = &mut stopped => {
                        stopped_by = Some(signal);
                        break 'rounds;
                    }
                };
                let outcome = outcome
                    .with_context(|| format!("round {}, {} {case} through {peer}", round + 1, case.measure()))?;
                let row = Row::new(round, case, peer, outcome);
                let seconds = begun.elapsed().as_secs_f64();
                eprintln!("round {} of {}: {row}, took {seconds:.1} s", round + 1, options.rounds);
                for (error, count) in &row.errors {
                    eprintln!("  {count} x {error}");
                }
                report.rows.push(row);
            }
        }
    }

    print!("{}", report.markdown());
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().context("a folder above target/tmp")?;
    let file = target.join("bench/compare.json");
    fs::create_dir_all(target.join("bench"))?;
    fs::write(&file, report.json()? + "\n").with_context(|| file.display().to_string())?;
    if let Some(folder) = &options.plots {
        report.plot(folder).with_context(|| folder.display().to_string())?;
    }
    match stopped_by {
        Some(signal) => bail!("{signal}: the figures are those of {} legs", report.rows.len()),
        None => Ok(()),
    }
}

/// Whether network namespaces can be had. If not, those who read the figures must know.
fn namespaces_or_note() -> bool {
    let possible = namespaces::possible();
    if let Err(error) = &possible {
        eprintln!(
            "no network namespaces ({error:#}): everything is on loopback, somaxconn is the host's, and overflows and \
             RSTs are counts of everything on the host"
        );
    }
    possible.is_ok()
}

/// Where what arrives is received by threads of the kernel, and these.
fn apart(somaxconn: u32) -> anyhow::Result<(Place, Vec<u32>)> {
    let place = Place::namespaces(somaxconn, somaxconn)?;
    let receivers = place.receive_apart()?;
    Ok((place, receivers))
}

/// What all legs have in common.
struct Setup<'a> {
    folder: &'a Path,
    options: &'a Options,
    tidegates: &'a Tidegates,
    rivals: &'a Rivals,
    in_namespaces: bool,
}

/// A leg; with `--quiet` the first one that other programs left alone, or the one that they disturbed least.
async fn quiet_leg(setup: &Setup<'_>, case: Case, peer: Peer) -> anyhow::Result<Outcome> {
    let strangers = |outcome: &Outcome| outcome.values.get("strangers_percent").copied().unwrap_or_default();
    let mut best: Option<Outcome> = None;
    let mut tries = 1;
    loop {
        let outcome = leg(setup, case, peer).await?;
        let percent = strangers(&outcome);
        if best.as_ref().is_none_or(|best| percent < strangers(best)) {
            best = Some(outcome);
        }
        let done = setup.options.quiet.is_none_or(|limit| percent <= limit) || tries == TRIES;
        if let Some(best) = best.take_if(|_| done) {
            return Ok(best);
        }
        eprintln!("once more: other programs used {percent} % of the CPUs");
        tries += 1;
        sleep(QUIET_PAUSE).await;
    }
}

/// One measurement through one peer, with processes of its own.
async fn leg(setup: &Setup<'_>, case: Case, peer: Peer) -> anyhow::Result<Outcome> {
    let Setup { folder, options, tidegates, rivals, in_namespaces } = *setup;
    let somaxconn = options.backend_somaxconn;
    let (place, receivers) = match (case, case.somaxconn()) {
        (Case::Fanout { received_apart: true, .. }, _) => apart(somaxconn)?,
        (_, Some(proxy)) if in_namespaces => (Place::namespaces(proxy, somaxconn)?, Vec::new()),
        _ => (Place::Loopback, Vec::new()),
    };
    let transport = case.transport();
    let certificates = transport.is_tls().then(|| Certificates::write(folder)).transpose()?;
    let is_stopped = matches!(case, Case::Drain { .. });
    let site = Site {
        folder,
        place: &place,
        logs: options.logs,
        is_stopped,
        ends_by_itself: options.ends_by_itself,
        tls: certificates.as_ref(),
    };
    let (backend, backend_address) =
        peers::start_backend(&site, peer, options.backend_backlog, matches!(case, Case::Ramp { .. })).await?;
    let proxy = peers::start(&site, peer, tidegates, rivals, backend_address).await?;
    let address = proxy.as_ref().map_or(backend_address, |proxy| proxy.address);
    let only_backend = || procfs::only_listener(backend_address.port(), &[backend.pid()]);
    let only_proxy = || proxy.as_ref().map_or(Ok(()), |proxy| procfs::only_listener(address.port(), &proxy.pids));
    only_backend()?;
    only_proxy()?;

    let (warmup, seconds) = (WARMUP.as_secs_f64(), options.seconds);
    let ramp = Ramp { rate: options.ramp_rate, clients: options.ramp_clients, hold: options.ramp_hold };
    let order = Order {
        address,
        proxy: proxy.as_ref().map(|proxy| proxy.pids.clone()).unwrap_or_default(),
        backend: backend.pid(),
        receivers,
        stop: proxy.as_ref().and_then(|proxy| proxy.stop),
        connections: match case {
            Case::Echo { sessions, .. } => sessions as usize,
            _ => options.at_once as usize,
        },
        bytes: case.bytes(),
        transport,
        roots: certificates.as_ref().map(|files| files.roots.clone()),
        streams: options.streams.into(),
        work: match case {
            Case::Echo { under_way, .. } => Work::Echo { under_way: under_way as usize, warmup, seconds },
            Case::Idle { .. } => Work::Idle { sessions: options.sessions as usize },
            Case::Churn { .. } => Work::Churn { warmup, seconds, sessions: options.churn_sessions.into() },
            Case::Spike { clients, plain, .. } => Work::Spike { clients: clients as usize, plain },
            Case::Waves { waves, clients, .. } => Work::Waves { waves, clients: clients as usize },
            Case::Held { sessions, clients, .. } => {
                Work::Held { sessions: sessions as usize, clients: clients as usize }
            }
            Case::Ramp { .. } => Work::Ramp(ramp),
            Case::Fanout { watchers, .. } => Work::Fanout { watchers: watchers as usize, seconds },
            Case::Open { sessions, rate, .. } => {
                Work::Open { sessions: sessions as usize, rate, seconds: options.open_seconds }
            }
            Case::Audit { sessions, waits, .. } => Work::Audit { sessions: sessions as usize, waits },
            Case::Drain { sessions } => Work::Drain { sessions: sessions as usize },
            Case::Kill { sessions } => Work::Kill { sessions: sessions as usize },
        },
    };
    let lasts = match case {
        Case::Churn { .. } if options.churn_sessions > 0 => {
            Duration::from_secs((options.churn_sessions / SLOWEST_PER_SECOND).into())
        }
        Case::Echo { .. } | Case::Churn { .. } => WARMUP + Duration::from_secs_f64(seconds),
        Case::Idle { .. } => Duration::ZERO,
        Case::Spike { .. } => spike::LIMIT,
        Case::Waves { waves, .. } => spike::LIMIT + Duration::from_secs(waves.into()),
        Case::Held { .. } => spike::LIMIT * 2,
        Case::Ramp { .. } => ramp.duration(),
        Case::Fanout { .. } => fanout::WARMUP + Duration::from_secs_f64(seconds),
        Case::Open { .. } => open::WARMUP + Duration::from_secs_f64(options.open_seconds) + open::GRACE,
        Case::Audit { sessions, .. } => Duration::from_secs((sessions / audit::RATE).into()),
        Case::Drain { .. } | Case::Kill { .. } => ending::AFTER,
    };
    let mut load = peers::start_load(&site, &order)?;
    let printed = load.wait(lasts + LEG_SLACK).await.and_then(|printed| {
        serde_json::from_str(printed.trim()).with_context(|| format!("load printed {:?}", printed.trim()))
    });
    let mut outcome: Outcome = printed.map_err(|error| match &proxy {
        Some(proxy) => error.context(format!("the end of the log of {peer}:\n{}", proxy.log_tail())),
        None => error,
    })?;
    // Again: who joined meanwhile took a part of the load. Whoever was to end has no port any more.
    if !matches!(case, Case::Kill { .. }) {
        only_backend()?;
    }
    if !is_stopped {
        only_proxy()?;
    }
    if let Case::Audit { sessions, .. } = case {
        audit::backend_saw(&backend, sessions as usize, &mut outcome).await;
    }
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

/// In the order of the first round, and where the others are.
fn peers(options: &Options) -> anyhow::Result<(Vec<Peer>, Rivals)> {
    let asked = |peer| options.peers.as_ref().map(|peers| peers.contains(&peer));
    let mut peers = Vec::new();
    for (next, peer) in [(Next::Direct, Peer::Direct), (Next::Null, Peer::Null)] {
        peers.extend(asked(next).unwrap_or(true).then_some(peer));
    }
    let mut rivals = Rivals::default();
    let others = [
        (Next::Nginx, Peer::Nginx, None),
        (Next::Haproxy, Peer::Haproxy, None),
        (Next::Envoy, Peer::Envoy, options.envoy.as_deref()),
        (Next::Caddy, Peer::Caddy, options.caddy.as_deref()),
    ];
    for (next, peer, path) in others {
        let asked = asked(next);
        if asked == Some(false) {
            continue;
        }
        match rivals.add(peer, path) {
            Ok(()) => peers.push(peer),
            Err(error) if asked.is_some() || path.is_some() => {
                return Err(error.context(format!("{peer} was asked for")));
            }
            Err(error) => eprintln!("without {peer}: {error:#}"),
        }
    }
    peers.extend([Peer::Tidegate, Peer::Tidegate1, Peer::Tidegate2, Peer::Broadcast, Peer::Batched]);
    if !options.other.is_empty() || options.other_binary.is_some() {
        peers.push(Peer::Other);
    }
    Ok((peers, rivals))
}
