//! The proxies that tidegate is measured next to: where they are, which versions, and their configurations. All have two workers, deep
//! queues, long timeouts, room for all sessions, no log lines, and [`GRACE`] for an orderly stop; all else is their default.
//!
//! Not here: Envoy and Caddy over TLS and HTTP/2.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs,
    net::SocketAddr,
    path::{Path, absolute},
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};
use serde_json::json;

use crate::{
    ending::{GRACE, Stop},
    namespaces::Side,
    peers::{Peer, Proxy, Site, WORKERS},
    process::{Death, Process},
    procfs,
};

/// Sessions of haproxy: with two descriptors each it stays below the 20,000 that it may have.
const HAPROXY_MAXCONN: u32 = 9_900;

/// Of Envoy's circuit breakers, whose defaults are 1,024: more than there ever are.
const ENVOY_MAX: u32 = 100_000;

/// What there is to be measured next to.
#[derive(Debug, Default)]
pub struct Rivals(BTreeMap<Peer, Rival>);

#[derive(Debug)]
struct Rival {
    program: OsString,
    version: String,
}

impl Rivals {
    /// Adds one that is found on PATH, or at `path`.
    pub fn add(&mut self, peer: Peer, path: Option<&Path>) -> anyhow::Result<()> {
        // Legs run in a folder of their own.
        let program = path.map(absolute).transpose()?.map_or_else(|| peer.to_string().into(), OsString::from);
        let version = match peer {
            Peer::Nginx => nginx_version(&program),
            Peer::Haproxy => haproxy_version(&program),
            Peer::Envoy => envoy_version(&program),
            Peer::Caddy => caddy_version(&program),
            _ => bail!("{peer} is no other program"),
        }?;
        self.0.insert(peer, Rival { program, version });
        Ok(())
    }

    /// By their names.
    pub fn versions(&self) -> BTreeMap<String, String> {
        self.0.iter().map(|(peer, rival)| (peer.to_string(), rival.version.clone())).collect()
    }

    pub async fn start(&self, site: &Site<'_>, peer: Peer, backend: SocketAddr) -> anyhow::Result<Proxy> {
        let program = &self.0.get(&peer).with_context(|| format!("{peer} was not looked for"))?.program;
        match peer {
            Peer::Nginx => start_nginx(site, program, backend).await,
            Peer::Haproxy => start_haproxy(site, program, backend).await,
            Peer::Envoy => start_envoy(site, program, backend).await,
            Peer::Caddy => start_caddy(site, program, backend).await,
            _ => bail!("{peer} is no other program"),
        }
    }
}

async fn listening(process: &mut Process, address: SocketAddr) -> anyhow::Result<()> {
    process.until("a listening socket", |process| procfs::only_listener(address.port(), &[process.pid()]).ok()).await
}

async fn start_nginx(site: &Site<'_>, program: &OsStr, backend: SocketAddr) -> anyhow::Result<Proxy> {
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
worker_shutdown_timeout {}s;
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
",
            GRACE.as_secs()
        ),
    )?;
    let [p, e, stderr, c] = ["-p", "-e", "stderr", "-c"].map(OsStr::new);
    let command = [program, p, site.folder.as_os_str(), e, stderr, c, config.as_os_str()];
    let mut process = Process::start(site.start("nginx", Death::Term, Side::Proxy), &command)?;
    let workers = process.until("a listening socket and its workers", |process| {
        procfs::only_listener(address.port(), &[process.pid()]).ok()?;
        let workers = procfs::children(process.pid());
        (workers.len() == WORKERS).then_some(workers)
    });
    let workers = workers.await?;
    Ok(Proxy::new(address, process, workers, Some(Stop::Quit)))
}

async fn start_haproxy(site: &Site<'_>, program: &OsStr, backend: SocketAddr) -> anyhow::Result<Proxy> {
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
    hard-stop-after {}s
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
",
            GRACE.as_secs()
        ),
    )?;
    let [foreground, f] = ["-db", "-f"].map(OsStr::new);
    let command = [program, foreground, f, config.as_os_str()];
    let mut process = Process::start(site.start("haproxy", Death::Kill, Side::Proxy), &command)?;
    listening(&mut process, address).await?;
    Ok(Proxy::new(address, process, Vec::new(), Some(Stop::Usr1)))
}

async fn start_envoy(site: &Site<'_>, program: &OsStr, backend: SocketAddr) -> anyhow::Result<Proxy> {
    let address = site.free_address()?;
    let socket =
        |address: SocketAddr| json!({ "socket_address": { "address": address.ip(), "port_value": address.port() } });
    let kind = |name: &str| format!("type.googleapis.com/envoy.extensions.{name}");
    let access_log = if site.logs {
        json!([{
            "name": "envoy.access_loggers.stdout",
            "typed_config": { "@type": kind("access_loggers.stream.v3.StdoutAccessLog") },
        }])
    } else {
        json!([])
    };
    // Not said: delayed_close_timeout. By its default a FIN comes 1 s behind all else, unless the peer's came before.
    let manager = json!({
        "@type": kind("filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "front",
        "codec_type": "HTTP1",
        "upgrade_configs": [{ "upgrade_type": "websocket" }],
        "stream_idle_timeout": "3600s",
        "access_log": access_log,
        "route_config": { "virtual_hosts": [{
            "name": "all",
            "domains": ["*"],
            "routes": [{ "match": { "prefix": "/" }, "route": { "cluster": "back", "timeout": "0s" } }],
        }] },
        "http_filters": [{
            "name": "envoy.filters.http.router",
            "typed_config": { "@type": kind("filters.http.router.v3.Router") },
        }],
    });
    let config = json!({
        "admin": { "address": socket(SocketAddr::new(address.ip(), 0)) },
        "static_resources": {
            "listeners": [{
                "name": "front",
                "address": socket(address),
                "enable_reuse_port": true,
                "tcp_backlog_size": 65535,
                "filter_chains": [{ "filters": [{
                    "name": "envoy.filters.network.http_connection_manager",
                    "typed_config": manager,
                }] }],
            }],
            "clusters": [{
                "name": "back",
                "type": "STATIC",
                "connect_timeout": "60s",
                "circuit_breakers": { "thresholds": [{
                    "max_connections": ENVOY_MAX,
                    "max_pending_requests": ENVOY_MAX,
                    "max_requests": ENVOY_MAX,
                }] },
                "load_assignment": {
                    "cluster_name": "back",
                    "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": socket(backend) } }] }],
                },
            }],
        },
    });
    let file = site.folder.join("envoy.json");
    fs::write(&file, config.to_string())?;
    let admin = site.folder.join("envoy.admin");
    let _ = fs::remove_file(&admin);
    let (workers, grace) = (WORKERS.to_string(), GRACE.as_secs().to_string());
    let [c, concurrency, alone, level, error, drain, at] = [
        "--config-path",
        "--concurrency",
        "--disable-hot-restart",
        "--log-level",
        "error",
        "--drain-time-s",
        "--admin-address-path",
    ]
    .map(OsStr::new);
    let (workers, grace) = (OsStr::new(&workers), OsStr::new(&grace));
    let (file, admin_file) = (file.as_os_str(), admin.as_os_str());
    let command = [program, c, file, concurrency, workers, alone, level, error, drain, grace, at, admin_file];
    let mut process = Process::start(site.start("envoy", Death::Kill, Side::Proxy), &command)?;
    listening(&mut process, address).await?;
    let admin = process.until("an admin address", |_| fs::read_to_string(&admin).ok()?.trim().parse().ok()).await?;
    Ok(Proxy::new(address, process, Vec::new(), Some(Stop::Envoy(admin))))
}

async fn start_caddy(site: &Site<'_>, program: &OsStr, backend: SocketAddr) -> anyhow::Result<Proxy> {
    let address = site.free_address()?;
    let mut server = json!({
        "listen": [address],
        "automatic_https": { "disable": true },
        "protocols": ["h1"],
        "routes": [{ "handle": [{
            "handler": "reverse_proxy",
            "upstreams": [{ "dial": backend }],
            "transport": { "protocol": "http", "dial_timeout": "60s" },
        }] }],
    });
    if site.logs {
        server["logs"] = json!({});
    }
    let level = if site.logs { "INFO" } else { "ERROR" };
    let config = json!({
        "admin": { "disabled": true, "config": { "persist": false } },
        "logging": { "logs": { "default": { "level": level } } },
        "apps": { "http": { "grace_period": format!("{}s", GRACE.as_secs()), "servers": { "front": server } } },
    });
    let file = site.folder.join("caddy.json");
    fs::write(&file, config.to_string())?;
    let mut start = site.start("caddy", Death::Kill, Side::Proxy);
    // As many threads as the others have workers; and nothing of it is kept.
    start.environment.push(("GOMAXPROCS", WORKERS.to_string().into()));
    start.environment.extend(["HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"].map(|name| (name, site.folder.into())));
    let [run, config] = ["run", "--config"].map(OsStr::new);
    let mut process = Process::start(start, &[program, run, config, file.as_os_str()])?;
    listening(&mut process, address).await?;
    Ok(Proxy::new(address, process, Vec::new(), Some(Stop::Term)))
}

/// What a program says on stdout and stderr when it is asked for its version.
fn printed(program: &OsStr, argument: &str) -> anyhow::Result<(String, String)> {
    let output = Command::new(program).arg(argument).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("{} is not there", program.display()))?;
    Ok((String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

/// As in "nginx/1.22.1 (OpenSSL 3.0.19)".
fn nginx_version(program: &OsStr) -> anyhow::Result<String> {
    let (_, printed) = printed(program, "-V")?;
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
fn haproxy_version(program: &OsStr) -> anyhow::Result<String> {
    let (printed, _) = printed(program, "-vv")?;
    let version = printed.split_whitespace().skip_while(|word| *word != "version").nth(1);
    let version = version.context("haproxy -vv does not say its version")?;
    let openssl = printed.lines().find(|line| line.starts_with("Running on OpenSSL version"));
    Ok(with_openssl(&format!("HAProxy {version}"), openssl))
}

/// As in "Envoy 1.40.0".
fn envoy_version(program: &OsStr) -> anyhow::Result<String> {
    let (printed, _) = printed(program, "--version")?;
    // "envoy  version: REVISION/1.40.0/Clean/RELEASE/BoringSSL".
    let version = printed.split_once("version: ").and_then(|(_, version)| version.split('/').nth(1));
    Ok(format!("Envoy {}", version.context("envoy --version does not say its version")?))
}

/// As in "Caddy 2.11.7".
fn caddy_version(program: &OsStr) -> anyhow::Result<String> {
    let (printed, _) = printed(program, "version")?;
    let version = printed.strip_prefix('v').and_then(|version| version.split_whitespace().next());
    Ok(format!("Caddy {}", version.context("caddy version does not say its version")?))
}
