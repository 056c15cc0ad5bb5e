//! One leg: fresh namespaces and processes, the clients' work, and what the kernel counted on both sides meanwhile.

#![expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    net::SocketAddr,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tokio::time::sleep;

use crate::{
    backend::Seen,
    clients::{LIMIT, Order, Outcome},
    namespaces::{self, Place, Side},
    process::{Death, Process, Start},
    procfs::{Cpu, counter},
    stories::{Leg, Load, SOMAXCONN, Through},
};

const TIDEGATE: &str = env!("CARGO_BIN_EXE_tidegate");

/// Beyond what a client may take: slow machines.
const SLACK: Duration = Duration::from_mins(2);

/// How long sessions of the backend may take to end once the clients are gone, and how often is looked.
const SETTLE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(100);

/// What is read of a namespace: the table, the name there.
const COUNTERS: [(&str, &str); 6] = [
    ("snmp", "OutRsts"),
    ("snmp", "EstabResets"),
    ("netstat", "ListenOverflows"),
    ("netstat", "TCPAbortOnData"),
    ("netstat", "TCPAbortOnClose"),
    ("netstat", "TCPAbortOnLinger"),
];

pub async fn run(leg: &Leg, in_namespaces: bool, folder: &Path) -> anyhow::Result<Outcome> {
    let place = if in_namespaces { Place::namespaces(leg.somaxconn, SOMAXCONN)? } else { Place::Loopback };
    for side in [Side::Client, Side::Proxy, Side::Backend] {
        if let Some(namespace) = place.namespace(side) {
            prepare(&namespace)?;
        }
    }
    let (mut backend, backend_address) = start_backend(leg, &place, folder).await?;
    let tidegate = match leg.through {
        Through::Tidegate => Some(start_tidegate(leg, &place, folder, backend_address).await?),
        _ => None,
    };
    let address = tidegate.as_ref().map_or(backend_address, |(_, address)| *address);
    // Direct, both are the same.
    let front = tidegate.as_ref().map_or(backend.pid(), |(process, _)| process.pid());
    let before = [counters(front)?, counters(backend.pid())?];

    let Load { manner, sessions, burst, every_ms, at_most } = leg.load;
    let order = Order { address, manner, sessions, burst, every_ms, at_most };
    let start = Start {
        folder,
        name: "clients",
        death: Death::Kill,
        namespace: place.namespace(Side::Client),
        environment: Vec::new(),
    };
    let mut clients = Process::start_self(start, &["clients", &serde_json::to_string(&order)?])?;
    let printed = clients.wait(LIMIT + SLACK).await;
    let printed =
        printed.with_context(|| tidegate.as_ref().map(|(process, _)| process.log_tail()).unwrap_or_default())?;
    let mut outcome: Outcome = serde_json::from_str(printed.trim()).context("what the clients say")?;

    let seen = settle(&mut backend).await;
    let after = [counters(front)?, counters(backend.pid())?];
    let counted = |side: usize, name| after[side][name].saturating_sub(before[side][name]) as f64;
    let values = [
        ("front_overflows", counted(0, "ListenOverflows")),
        ("front_out_rsts", counted(0, "OutRsts")),
        ("backend_overflows", counted(1, "ListenOverflows")),
        ("backend_out_rsts", counted(1, "OutRsts")),
        ("backend_estab_resets", counted(1, "EstabResets")),
        // Sent there, or got there while a session was under way.
        ("backend_rsts", counted(1, "OutRsts").max(counted(1, "EstabResets"))),
        ("abort_on_data", counted(1, "TCPAbortOnData")),
        ("abort_on_close", counted(1, "TCPAbortOnClose")),
        ("abort_on_linger", counted(1, "TCPAbortOnLinger")),
        ("backend_cpu_ms", Cpu::of(&[backend.pid()])?.us() as f64 / 1e3),
        ("backend_sessions", seen.accepted as f64),
        ("backend_open", seen.open as f64),
        ("failed_writes", seen.failed_writes as f64),
    ];
    outcome.values.extend(values.map(|(name, value)| (name.to_owned(), value)));
    Ok(outcome)
}

async fn start_backend(leg: &Leg, place: &Place, folder: &Path) -> anyhow::Result<(Process, SocketAddr)> {
    // In the proxy's place when there is none, so that it has the same limits.
    let side = if leg.through == Through::Direct { Side::Proxy } else { Side::Backend };
    let address = SocketAddr::new(place.address(side), 0).to_string();
    let numbers = [leg.backlog.to_string(), leg.pollers.to_string(), leg.close_delay_ms.to_string()];
    let [backlog, pollers, close_delay] = &numbers;
    let arguments =
        ["backend", "--address", &address, "--backlog", backlog, "--pollers", pollers, "--close-delay-ms", close_delay];
    let start = Start {
        folder,
        name: "backend",
        death: Death::Kill,
        namespace: place.namespace(side),
        environment: Vec::new(),
    };
    let mut backend = Process::start_self(start, &arguments)?;
    let address = backend.until("an address", |process| process.printed().lines().next()?.parse().ok()).await?;
    Ok((backend, address))
}

async fn start_tidegate(
    leg: &Leg,
    place: &Place,
    folder: &Path,
    backend: SocketAddr,
) -> anyhow::Result<(Process, SocketAddr)> {
    let address = SocketAddr::new(place.address(Side::Proxy), 0);
    let config = folder.join("proxy.toml");
    let text = format!(
        "listen.address = \"{address}\"\nlisten.workers = {}\nupstream.address = \"{backend}\"\nadmin.address = \"off\"\n\
         log.format = \"json\"\nlog.filter = \"warn,tidegate::server=info\"\n{}\n",
        leg.workers, leg.settings
    );
    fs::write(&config, text)?;
    let start = Start {
        folder,
        name: "tidegate",
        death: Death::Kill,
        namespace: place.namespace(Side::Proxy),
        environment: Vec::new(),
    };
    let command = [OsStr::new(TIDEGATE), OsStr::new("run"), OsStr::new("--config"), config.as_os_str()];
    let mut process = Process::start(start, &command)?;
    let listening = process.until("an address", |process| {
        process.printed().lines().find_map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).ok()?;
            (line["message"] == "listening").then(|| line["address"].as_str()?.parse().ok())?
        })
    });
    let address = listening.await?;
    Ok((process, address))
}

/// What the backend has seen once its last session is over, or at the end of the patience.
async fn settle(backend: &mut Process) -> Seen {
    let begun = Instant::now();
    loop {
        // Its word may be as old as this.
        sleep(POLL).await;
        let printed = backend.printed();
        let seen: Seen = printed.lines().rev().find_map(|line| serde_json::from_str(line).ok()).unwrap_or_default();
        if seen.open == 0 || begun.elapsed() > SETTLE {
            return seen;
        }
    }
}

/// Of the namespace that a process is in.
fn counters(pid: u32) -> anyhow::Result<BTreeMap<&'static str, u64>> {
    COUNTERS.into_iter().map(|(table, name)| Ok((name, counter(pid, table, name)?))).collect()
}

/// Sets what has to be the same everywhere, and is not what a report is about.
fn prepare(namespace: &Path) -> anyhow::Result<()> {
    let write = || {
        namespaces::enter(namespace)?;
        // Without tail-loss probes, which the other side may answer with a RST when a session is over.
        fs::write("/proc/sys/net/ipv4/tcp_early_retrans", "0")?;
        // With 60 s or less the kernel keeps no whole socket behind a close(): it answers what still comes with the same RSTs, and does not
        // count them as TCPAbortOnData.
        fs::write("/proc/sys/net/ipv4/tcp_fin_timeout", "120")?;
        Ok(())
    };
    thread::scope(|scope| scope.spawn(write).join()).expect("it does not panic")
}
