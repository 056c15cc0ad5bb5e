//! What is measured: proxies with their configuration, and the backend behind them.

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
    load::Order,
    namespaces::{Place, Side},
    process::{Death, Process, Start},
    procfs,
    transport::Certificates,
    wire::FEED,
};

/// Every proxy has as many.
pub const WORKERS: usize = 2;

const TIDEGATE: &str = env!("CARGO_BIN_EXE_tidegate");

/// What a route is told that is shared.
const BROADCAST: &str = "pool = { mode = 'shared', shared = 'broadcast' }";

/// Of nginx and haproxy in a namespace of their own, where it is free.
const PORT: u16 = 8080;

/// Sessions of haproxy: with two descriptors each it stays below the 20,000 that it may have.
const HAPROXY_MAXCONN: u32 = 9_900;

/// What stands between load and backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Peer {
    Direct,
    Nginx,
    Haproxy,
    Tidegate,
    /// With one worker.
    #[serde(rename = "tidegate-1")]
    Tidegate1,
    /// With two.
    #[serde(rename = "tidegate-2")]
    Tidegate2,
    /// With one connection to the backend for all who watch the same.
    Broadcast,
    /// Another tidegate, or the same with other settings.
    Other,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Direct => "direct",
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Tidegate => "tidegate",
            Self::Tidegate1 => "tidegate-1",
            Self::Tidegate2 => "tidegate-2",
            Self::Broadcast => "broadcast",
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
    other_binary: PathBuf,
}

impl Tidegates {
    pub fn new(settings: &[Table], other: &[Table], other_binary: Option<&Path>) -> anyhow::Result<Self> {
        let settings = settings.iter().cloned().fold(Table::new(), merged);
        let other_settings = other.iter().cloned().fold(settings.clone(), merged);
        // Legs run in a folder of their own.
        let other_binary = other_binary.unwrap_or(Path::new(TIDEGATE));
        let other_binary = fs::canonicalize(other_binary).with_context(|| other_binary.display().to_string())?;
        Ok(Self { settings, other_settings, other_binary })
    }

    fn of(&self, peer: Peer) -> (&Path, Table) {
        let with_workers = |workers: i64| {
            let workers = Table::from_iter([("workers".to_owned(), Value::from(workers))]);
            merged(self.settings.clone(), Table::from_iter([("listen".to_owned(), Value::from(workers))]))
        };
        match peer {
            Peer::Other => (&self.other_binary, self.other_settings.clone()),
            Peer::Tidegate1 => (Path::new(TIDEGATE), with_workers(1)),
            Peer::Tidegate2 => (Path::new(TIDEGATE), with_workers(2)),
            Peer::Broadcast => {
                let route = settings(&format!("route = [{{ path = '{FEED}', {BROADCAST} }}]"));
                (Path::new(TIDEGATE), merged(self.settings.clone(), route.expect("it is valid TOML")))
            }
            _ => (Path::new(TIDEGATE), self.settings.clone()),
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
    /// That clients get over TLS; None: plain TCP.
    pub tls: Option<&'a Certificates>,
}

impl<'a> Site<'a> {
    fn start(&self, name: &'static str, death: Death, side: Side) -> Start<'a> {
        Start { folder: self.folder, name, death, namespace: self.place.namespace(side) }
    }

    /// For a proxy that can't choose a port itself.
    fn free_address(&self) -> anyhow::Result<SocketAddr> {
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
    /// Of all its processes.
    pub pids: Vec<u32>,
    process: Process,
}

impl Proxy {
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
    backend: SocketAddr,
) -> anyhow::Result<Option<Proxy>> {
    match peer {
        Peer::Direct => Ok(None),
        Peer::Nginx => start_nginx(site, backend).await.map(Some),
        Peer::Haproxy => start_haproxy(site, backend).await.map(Some),
        Peer::Tidegate | Peer::Tidegate1 | Peer::Tidegate2 | Peer::Broadcast | Peer::Other => {
            let (binary, settings) = tidegates.of(peer);
            start_tidegate(site, binary, settings, backend).await.map(Some)
        }
    }
}

async fn start_tidegate(site: &Site<'_>, binary: &Path, settings: Table, backend: SocketAddr) -> anyhow::Result<Proxy> {
    let address = SocketAddr::new(site.place.address(Side::Proxy), 0);
    // The line that says where it listens is needed in any case.
    let filter = if site.logs { "info" } else { "warn,tidegate::server=info" };
    let tls = site.tls.map_or_else(String::new, |files| {
        let (chain, key) = (files.chain.display(), files.key.display());
        format!("listen.tls_certificate = '{chain}'\nlisten.tls_key = '{key}'\n")
    });
    let base = format!(
        "listen.address = \"{address}\"\nlisten.workers = {WORKERS}\nupstream.address = \"{backend}\"\n\
         admin.address = \"off\"\nlog.format = \"json\"\nlog.filter = \"{filter}\"\n{tls}"
    );
    let config = site.folder.join("proxy.toml");
    fs::write(&config, merged(base.parse()?, settings).to_string())?;
    let command = [binary.as_os_str(), OsStr::new("run"), OsStr::new("--config"), config.as_os_str()];
    let mut process = Process::start(site.start("tidegate", Death::Kill, Side::Proxy), &command)?;
    let listening = process.until("an address", |process| {
        process.printed().lines().find_map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).ok()?;
            (line["message"] == "listening").then(|| line["address"].as_str()?.parse().ok())?
        })
    });
    let address = listening.await?;
    Ok(Proxy { address, pids: vec![process.pid()], process })
}

async fn start_nginx(site: &Site<'_>, backend: SocketAddr) -> anyhow::Result<Proxy> {
    let address = site.free_address()?;
    let access_log = if site.logs { "nginx.access.log" } else { "off" };
    let (ssl, tls) = site.tls.map_or_else(Default::default, |files| {
        let (chain, key) = (files.chain.display(), files.key.display());
        // Tickets and no cache, as the others have it.
        let tls = format!(
            "ssl_certificate {chain};
        ssl_certificate_key {key};
        ssl_protocols TLSv1.3;
        ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
        ssl_ecdh_curve X25519;
        ssl_session_tickets on;"
        );
        ("ssl ", tls)
    });
    let config = site.folder.join("nginx.conf");
    fs::write(
        &config,
        format!(
            "daemon off;
worker_processes {WORKERS};
pid nginx.pid;
error_log stderr;
events {{ worker_connections 20000; }}
http {{
    access_log {access_log};
    client_body_temp_path client_body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    map $http_upgrade $connection_upgrade {{
        default upgrade;
        ''      close;
    }}
    server {{
        listen {address} {ssl}backlog=65535 reuseport;
        {tls}
        location / {{
            proxy_pass http://{backend};
            proxy_http_version 1.1;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_read_timeout 1h;
            proxy_send_timeout 1h;
        }}
    }}
}}
"
        ),
    )?;
    let [nginx, p, e, stderr, c] = ["nginx", "-p", "-e", "stderr", "-c"].map(OsStr::new);
    let command = [nginx, p, site.folder.as_os_str(), e, stderr, c, config.as_os_str()];
    let mut process = Process::start(site.start("nginx", Death::Term, Side::Proxy), &command)?;
    let workers = process.until("a listening socket and its workers", |process| {
        procfs::only_listener(address.port(), &[process.pid()]).ok()?;
        let workers = procfs::children(process.pid());
        (workers.len() == WORKERS).then_some(workers)
    });
    let mut pids = workers.await?;
    pids.insert(0, process.pid());
    Ok(Proxy { address, pids, process })
}

async fn start_haproxy(site: &Site<'_>, backend: SocketAddr) -> anyhow::Result<Proxy> {
    let address = site.free_address()?;
    let log = if site.logs { "log stdout format raw local0" } else { "" };
    let tls = site.tls.map_or_else(String::new, |files| {
        format!(
            "ssl crt {} alpn h2,http/1.1 ssl-min-ver TLSv1.3 ciphersuites TLS_AES_128_GCM_SHA256 curves X25519",
            files.both.display()
        )
    });
    let config = site.folder.join("haproxy.cfg");
    fs::write(
        &config,
        format!(
            "global
    nbthread {WORKERS}
    maxconn {HAPROXY_MAXCONN}
    {log}
defaults
    mode http
    log global
    option httplog
    backlog 65535
    timeout connect 1m
    timeout client 1h
    timeout server 1h
    timeout tunnel 1h
    timeout http-request 1m
    timeout queue 1h
frontend front
    bind {address} shards by-thread {tls}
    default_backend back
backend back
    server one {backend}
"
        ),
    )?;
    let [haproxy, foreground, f] = ["haproxy", "-db", "-f"].map(OsStr::new);
    let command = [haproxy, foreground, f, config.as_os_str()];
    let mut process = Process::start(site.start("haproxy", Death::Kill, Side::Proxy), &command)?;
    let listening =
        process.until("a listening socket", |process| procfs::only_listener(address.port(), &[process.pid()]).ok());
    listening.await?;
    Ok(Proxy { address, pids: vec![process.pid()], process })
}

/// As in "nginx/1.22.1 (OpenSSL 3.0.19)".
pub fn nginx_version() -> anyhow::Result<String> {
    let output = Command::new("nginx").arg("-V").stdin(Stdio::null()).output().context("nginx is not installed")?;
    let printed = String::from_utf8_lossy(&output.stderr);
    let version = printed.lines().next().and_then(|line| line.strip_prefix("nginx version: "));
    let version = version.context("nginx -V does not say its version")?;
    // "built with OpenSSL 3.0.17 1 Jul 2025 (running with OpenSSL 3.0.19 27 Jan 2026)"; without the second where they are the same.
    Ok(with_openssl(version, printed.lines().find(|line| line.starts_with("built with OpenSSL "))))
}

/// The last version that `line` names.
fn with_openssl(version: &str, line: Option<&str>) -> String {
    let openssl = line.and_then(|line| line.rsplit_once("OpenSSL ")?.1.split_whitespace().next());
    openssl.map_or_else(|| version.to_owned(), |openssl| format!("{version} (OpenSSL {openssl})"))
}

/// As in "`HAProxy` 2.6.12-1+deb12u4 (OpenSSL 3.0.19)".
pub fn haproxy_version() -> anyhow::Result<String> {
    let output =
        Command::new("haproxy").arg("-vv").stdin(Stdio::null()).output().context("haproxy is not installed")?;
    let printed = String::from_utf8_lossy(&output.stdout);
    let version = printed.split_whitespace().skip_while(|word| *word != "version").nth(1);
    let version = version.context("haproxy -vv does not say its version")?;
    let openssl = printed.lines().find(|line| line.starts_with("Running on OpenSSL version"));
    Ok(with_openssl(&format!("HAProxy {version}"), openssl))
}
