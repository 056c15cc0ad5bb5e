//! What is measured: the peers, tidegate with its configuration, and the backend behind them. The other proxies are in `rivals.rs`.

use std::{
    ffi::OsStr,
    fmt, fs,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::Context as _;
use serde::Serialize;
use toml::{Table, Value};

use crate::{
    ending::{GRACE, Stop},
    load::Order,
    namespaces::{Place, Side},
    process::{Death, Process, Start},
    rivals::Rivals,
    transport::Certificates,
    wire::FEED,
};

/// Every proxy has as many.
pub const WORKERS: usize = 2;

const TIDEGATE: &str = env!("CARGO_BIN_EXE_tidegate");

/// What a route is told that is shared.
const BROADCAST: &str = "pool.mode = 'shared', pool.shared = 'broadcast'";

/// And that its messages may wait for more.
const BATCHED: &str = "pool.batch_delay = '20ms'";

/// Of a proxy that can't choose one, in a namespace of its own, where it is free.
const PORT: u16 = 8080;

/// What stands between load and backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Peer {
    Direct,
    /// A relay that looks at nothing (`null.rs`): what a proxy costs at least.
    Null,
    Nginx,
    Haproxy,
    Envoy,
    Caddy,
    Tidegate,
    /// With one worker.
    #[serde(rename = "tidegate-1")]
    Tidegate1,
    /// With two.
    #[serde(rename = "tidegate-2")]
    Tidegate2,
    /// With one connection to the backend for all who watch the same.
    Broadcast,
    /// The same, where messages wait for more.
    Batched,
    /// Another tidegate, or the same with other settings.
    Other,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Direct => "direct",
            Self::Null => "null",
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Envoy => "envoy",
            Self::Caddy => "caddy",
            Self::Tidegate => "tidegate",
            Self::Tidegate1 => "tidegate-1",
            Self::Tidegate2 => "tidegate-2",
            Self::Broadcast => "broadcast",
            Self::Batched => "batched",
            Self::Other => "other",
        })
    }
}

/// The programs and the settings behind the peers that are tidegates.
#[derive(Debug, Serialize)]
pub struct Tidegates {
    settings: Table,
    other_settings: Table,
    #[serde(skip)]
    binary: PathBuf,
    #[serde(skip)]
    other_binary: PathBuf,
}

impl Tidegates {
    pub fn new(
        (settings, binary): (&[Table], Option<&Path>),
        (other_settings, other_binary): (&[Table], Option<&Path>),
    ) -> anyhow::Result<Self> {
        let settings = settings.iter().cloned().fold(Table::new(), merged);
        let other_settings = other_settings.iter().cloned().fold(settings.clone(), merged);
        // Legs run in a folder of their own.
        let whole = |path: &Path| fs::canonicalize(path).with_context(|| path.display().to_string());
        let binary = whole(binary.unwrap_or(Path::new(TIDEGATE)))?;
        let other_binary = other_binary.map_or_else(|| Ok(binary.clone()), whole)?;
        Ok(Self { settings, other_settings, binary, other_binary })
    }

    fn of(&self, peer: Peer) -> (&Path, Table) {
        let with_workers = |workers: i64| {
            let workers = Table::from_iter([("workers".to_owned(), Value::from(workers))]);
            merged(self.settings.clone(), Table::from_iter([("listen".to_owned(), Value::from(workers))]))
        };
        match peer {
            Peer::Other => (&self.other_binary, self.other_settings.clone()),
            Peer::Tidegate1 => (&self.binary, with_workers(1)),
            Peer::Tidegate2 => (&self.binary, with_workers(2)),
            Peer::Broadcast | Peer::Batched => {
                let more = if peer == Peer::Batched { BATCHED } else { "pool.batch_delay = '0s'" };
                let route = settings(&format!("route = [{{ path = '{FEED}', {BROADCAST}, {more} }}]"));
                (&self.binary, merged(self.settings.clone(), route.expect("it is valid TOML")))
            }
            _ => (&self.binary, self.settings.clone()),
        }
    }

    /// As in "tidegate 0.1.0".
    pub fn version(&self, peer: Peer) -> anyhow::Result<String> {
        let (binary, settings) = self.of(peer);
        let output =
            Command::new(binary).arg("--version").stdin(Stdio::null()).output().context("tidegate --version")?;
        let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        Ok(if settings.is_empty() { version } else { format!("{version} with {}", one_line(&settings)) })
    }
}

/// Settings as they are given on the command line.
pub fn settings(text: &str) -> Result<Table, String> {
    text.parse().map_err(|error: toml::de::Error| error.message().to_owned())
}

/// The settings of both; of the second where both say something.
fn merged(mut first: Table, second: Table) -> Table {
    for (key, value) in second {
        let value = match (first.remove(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => Value::Table(merged(old, new)),
            (_, new) => new,
        };
        first.insert(key, value);
    }
    first
}

fn one_line(settings: &Table) -> String {
    let mut parts = Vec::new();
    for (section, value) in settings {
        match value {
            Value::Table(keys) => parts.extend(keys.iter().map(|(key, value)| format!("{section}.{key} = {value}"))),
            value => parts.push(format!("{section} = {value}")),
        }
    }
    parts.join(", ")
}

/// Where the processes of a leg are, and what they have in common.
#[derive(Debug, Clone, Copy)]
pub struct Site<'a> {
    pub folder: &'a Path,
    pub place: &'a Place,
    pub logs: bool,
    /// It is to be stopped in good order, and has [`GRACE`] for that.
    pub is_stopped: bool,
    /// tidegate is told to end behind the leg, and waited for.
    pub ends_by_itself: bool,
    /// That clients get over TLS; None: plain TCP.
    pub tls: Option<&'a Certificates>,
}

impl<'a> Site<'a> {
    pub fn start(&self, name: &'static str, death: Death, side: Side) -> Start<'a> {
        Start { folder: self.folder, name, death, namespace: self.place.namespace(side), environment: Vec::new() }
    }

    /// For a proxy that can't choose a port itself.
    pub fn free_address(&self) -> anyhow::Result<SocketAddr> {
        let ip = self.place.address(Side::Proxy);
        let port = match self.place {
            Place::Loopback => TcpListener::bind((ip, 0))?.local_addr()?.port(),
            Place::Namespaces => PORT,
        };
        Ok((ip, port).into())
    }
}

/// A proxy that listens.
#[derive(Debug)]
pub struct Proxy {
    pub address: SocketAddr,
    /// Of all its processes, the one that is told to end before its children.
    pub pids: Vec<u32>,
    /// How it is told to end in good order; None: it can't.
    pub stop: Option<Stop>,
    process: Process,
}

impl Proxy {
    /// One process, or one with children that go with it.
    pub fn new(address: SocketAddr, process: Process, children: Vec<u32>, stop: Option<Stop>) -> Self {
        let pids = [vec![process.pid()], children].concat();
        Self { address, pids, stop, process }
    }

    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }
}

/// The backend; on the proxy's place when there is no proxy, so that it has the same limits.
pub async fn start_backend(
    site: &Site<'_>,
    peer: Peer,
    backlog: u16,
    works: bool,
) -> anyhow::Result<(Process, SocketAddr)> {
    let on = if peer == Peer::Direct { Side::Proxy } else { Side::Backend };
    let address = SocketAddr::new(site.place.address(on), 0).to_string();
    let backlog = backlog.to_string();
    let mut arguments = vec!["backend", "--address", &address, "--backlog", &backlog];
    arguments.extend(works.then_some("--works"));
    let mut process = Process::start_self(site.start("backend", Death::Kill, on), &arguments)?;
    let address = process.until("an address", |process| process.printed().strip_suffix('\n')?.parse().ok());
    let address = address.await?;
    Ok((process, address))
}

pub fn start_load(site: &Site<'_>, order: &Order) -> anyhow::Result<Process> {
    let start = site.start("load", Death::Kill, Side::Client);
    Process::start_self(start, &["load", &serde_json::to_string(order)?])
}

/// None for a direct connection.
pub async fn start(
    site: &Site<'_>,
    peer: Peer,
    tidegates: &Tidegates,
    rivals: &Rivals,
    backend: SocketAddr,
) -> anyhow::Result<Option<Proxy>> {
    match peer {
        Peer::Direct => Ok(None),
        Peer::Null => start_null(site, backend).await.map(Some),
        Peer::Nginx | Peer::Haproxy | Peer::Envoy | Peer::Caddy => rivals.start(site, peer, backend).await.map(Some),
        Peer::Tidegate | Peer::Tidegate1 | Peer::Tidegate2 | Peer::Broadcast | Peer::Batched | Peer::Other => {
            let (binary, settings) = tidegates.of(peer);
            start_tidegate(site, binary, settings, backend).await.map(Some)
        }
    }
}

async fn start_null(site: &Site<'_>, backend: SocketAddr) -> anyhow::Result<Proxy> {
    let address = SocketAddr::new(site.place.address(Side::Proxy), 0).to_string();
    let arguments = ["null", "--address", &address, "--backend", &backend.to_string()];
    let mut process = Process::start_self(site.start("null", Death::Kill, Side::Proxy), &arguments)?;
    let address = process.until("an address", |process| process.printed().strip_suffix('\n')?.parse().ok()).await?;
    Ok(Proxy::new(address, process, Vec::new(), None))
}

async fn start_tidegate(site: &Site<'_>, binary: &Path, settings: Table, backend: SocketAddr) -> anyhow::Result<Proxy> {
    let address = SocketAddr::new(site.place.address(Side::Proxy), 0);
    // The line that says where it listens is needed in any case.
    let filter = if site.logs { "info" } else { "warn,tidegate::server=info" };
    let tls = site.tls.map_or_else(String::new, |files| {
        let (chain, key) = (files.chain.display(), files.key.display());
        format!("listen.tls_certificate = '{chain}'\nlisten.tls_key = '{key}'\n")
    });
    // Half a second less than it has: the last Close handshakes take their time too.
    let drain = if site.is_stopped {
        let window = GRACE.as_millis() - 500;
        format!("drain.delay = '0s'\ndrain.window = '{window}ms'\ndrain.timeout = '500ms'\n")
    } else if site.ends_by_itself {
        "drain.delay = '0s'\ndrain.window = '0s'\ndrain.timeout = '500ms'\n".to_owned()
    } else {
        String::new()
    };
    let death = if site.ends_by_itself { Death::Term } else { Death::Kill };
    let base = format!(
        "listen.address = \"{address}\"\nlisten.workers = {WORKERS}\nupstream.address = \"{backend}\"\n\
         admin.address = \"off\"\nlog.format = \"json\"\nlog.filter = \"{filter}\"\n{tls}{drain}"
    );
    let config = site.folder.join("proxy.toml");
    fs::write(&config, merged(base.parse()?, settings).to_string())?;
    let command = [binary.as_os_str(), OsStr::new("run"), OsStr::new("--config"), config.as_os_str()];
    let mut process = Process::start(site.start("tidegate", death, Side::Proxy), &command)?;
    let listening = process.until("an address", |process| {
        process.printed().lines().find_map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).ok()?;
            (line["message"] == "listening").then(|| line["address"].as_str()?.parse().ok())?
        })
    });
    let address = listening.await?;
    Ok(Proxy::new(address, process, Vec::new(), Some(Stop::Term)))
}
