//! The processes of a leg: started with a port of their own, watched, ended when they are dropped.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    fs::{self, File},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use clap::ValueEnum;
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use serde::Serialize;
use tokio::time::sleep;

use crate::procfs;

/// nginx and tidegate have as many.
pub const WORKERS: usize = 2;

const TIDEGATE: &str = env!("CARGO_BIN_EXE_tidegate");
const START_LIMIT: Duration = Duration::from_secs(20);
const END_LIMIT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);
const LOG_TAIL_LINES: usize = 20;

/// What stands between load and backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Peer {
    Direct,
    Nginx,
    Tidegate,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Direct => "direct",
            Self::Nginx => "nginx",
            Self::Tidegate => "tidegate",
        })
    }
}

/// How a process that we started is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Death {
    /// SIGTERM: nginx's master then ends its workers, which a SIGKILL would leave behind.
    Term,
    Kill,
}

impl Death {
    fn signal(self) -> Signal {
        match self {
            Self::Term => Signal::TERM,
            Self::Kill => Signal::KILL,
        }
    }
}

/// Asks for a signal at the end of the parent, and becomes `command`; returns only if that fails.
pub fn become_held(death: Death, command: &[OsString]) -> anyhow::Error {
    if let Err(error) = set_parent_process_death_signal(Some(death.signal())) {
        return error.into();
    }
    let [program, arguments @ ..] = command else { return anyhow::anyhow!("no command") };
    anyhow::Error::from(Command::new(program).args(arguments).exec()).context(program.display().to_string())
}

/// A process that was started here. Dropped, it is ended, and its children with it.
#[derive(Debug)]
pub struct Process {
    name: &'static str,
    child: Child,
    death: Death,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Process {
    fn start(folder: &Path, name: &'static str, death: Death, command: &[&OsStr]) -> anyhow::Result<Self> {
        let stdout = folder.join(format!("{name}.out"));
        let stderr = folder.join(format!("{name}.err"));
        let mut held = Command::new(std::env::current_exe()?);
        held.args(["held", if death == Death::Term { "term" } else { "kill" }, "--"]).args(command);
        // What decides is what is said here, not where the program was started.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("TIDEGATE_") || name == "RUST_LOG" {
                held.env_remove(name);
            }
        }
        let child = held
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(File::create(&stdout)?)
            .stderr(File::create(&stderr)?)
            // A Ctrl-C is for us alone: we end the others.
            .process_group(0)
            .spawn()
            .with_context(|| name.to_owned())?;
        Ok(Self { name, child, death, stdout, stderr })
    }

    /// This program in another role.
    pub fn start_self(folder: &Path, name: &'static str, arguments: &[&str]) -> anyhow::Result<Self> {
        let this = std::env::current_exe()?;
        let mut command = vec![this.as_os_str()];
        command.extend(arguments.iter().map(OsStr::new));
        Self::start(folder, name, Death::Kill, &command)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it ends well, and returns what it printed.
    pub async fn wait(&mut self, within: Duration) -> anyhow::Result<String> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "{} ended with {status}: {}", self.name, self.log_tail());
                return Ok(fs::read_to_string(&self.stdout)?);
            }
            ensure!(begun.elapsed() < within, "{} did not end within {} s", self.name, within.as_secs());
            sleep(POLL).await;
        }
    }

    /// Asks again and again, as long as it lives.
    async fn until<T>(&mut self, what: &str, mut ask: impl FnMut(&Self) -> Option<T>) -> anyhow::Result<T> {
        let begun = Instant::now();
        loop {
            if let Some(answer) = ask(self) {
                return Ok(answer);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended with {status} and without {what}: {}", self.name, self.log_tail());
            }
            ensure!(begun.elapsed() < START_LIMIT, "{} goes on without {what}: {}", self.name, self.log_tail());
            sleep(POLL).await;
        }
    }

    /// The last lines of what it printed.
    fn log_tail(&self) -> String {
        let text = [&self.stdout, &self.stderr].map(|file| fs::read_to_string(file).unwrap_or_default()).concat();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A pid is given away again once its exit was waited for, and not before.
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        if self.death == Death::Term {
            let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
            let begun = Instant::now();
            while begun.elapsed() < END_LIMIT {
                if !matches!(self.child.try_wait(), Ok(None)) {
                    return;
                }
                thread::sleep(POLL);
            }
            // Its parent lives and is not waited for yet, so these pids are still those of its children.
            for pid in procfs::children(self.pid()) {
                if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
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

pub async fn start_backend(folder: &Path) -> anyhow::Result<(Process, SocketAddr)> {
    let mut process = Process::start_self(folder, "backend", &["backend"])?;
    let address = process.until("an address", |process| {
        let printed = fs::read_to_string(&process.stdout).ok()?;
        printed.strip_suffix('\n')?.parse().ok()
    });
    let address = address.await?;
    Ok((process, address))
}

/// None for a direct connection.
pub async fn start(folder: &Path, peer: Peer, backend: SocketAddr, logs: bool) -> anyhow::Result<Option<Proxy>> {
    match peer {
        Peer::Direct => Ok(None),
        Peer::Nginx => start_nginx(folder, backend, logs).await.map(Some),
        Peer::Tidegate => start_tidegate(folder, backend, logs).await.map(Some),
    }
}

async fn start_tidegate(folder: &Path, backend: SocketAddr, logs: bool) -> anyhow::Result<Proxy> {
    // The line that says where it listens is needed in any case.
    let filter = if logs { "info" } else { "warn,tidegate::server=info" };
    let config = folder.join("proxy.toml");
    fs::write(
        &config,
        format!(
            "listen.address = \"127.0.0.1:0\"\nlisten.workers = {WORKERS}\nupstream.address = \"{backend}\"\n\
             admin.address = \"off\"\nlog.format = \"json\"\nlog.filter = \"{filter}\"\n"
        ),
    )?;
    let command = [OsStr::new(TIDEGATE), OsStr::new("run"), OsStr::new("--config"), config.as_os_str()];
    let mut process = Process::start(folder, "tidegate", Death::Kill, &command)?;
    let listening = process.until("an address", |process| {
        let printed = fs::read_to_string(&process.stdout).ok()?;
        printed.lines().find_map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).ok()?;
            (line["message"] == "listening").then(|| line["address"].as_str()?.parse().ok())?
        })
    });
    let address = listening.await?;
    Ok(Proxy { address, pids: vec![process.pid()], process })
}

async fn start_nginx(folder: &Path, backend: SocketAddr, logs: bool) -> anyhow::Result<Proxy> {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    let access_log = if logs { "nginx.access.log" } else { "off" };
    let config = folder.join("nginx.conf");
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
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://{backend};
            proxy_http_version 1.1;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection \"upgrade\";
            proxy_read_timeout 1h;
            proxy_send_timeout 1h;
        }}
    }}
}}
"
        ),
    )?;
    let [nginx, p, e, stderr, c] = ["nginx", "-p", "-e", "stderr", "-c"].map(OsStr::new);
    let command = [nginx, p, folder.as_os_str(), e, stderr, c, config.as_os_str()];
    let mut process = Process::start(folder, "nginx", Death::Term, &command)?;
    let workers = process.until("a listening socket and its workers", |process| {
        procfs::only_listener(port, &[process.pid()]).ok()?;
        let workers = procfs::children(process.pid());
        (workers.len() == WORKERS).then_some(workers)
    });
    let mut pids = workers.await?;
    pids.insert(0, process.pid());
    Ok(Proxy { address: (Ipv4Addr::LOCALHOST, port).into(), pids, process })
}

/// As in "nginx/1.22.1".
pub fn nginx_version() -> anyhow::Result<String> {
    let output = Command::new("nginx").arg("-v").stdin(Stdio::null()).output().context("nginx is not installed")?;
    let printed = String::from_utf8_lossy(&output.stderr);
    let version = printed.trim().strip_prefix("nginx version: ").context("nginx -v does not say its version")?;
    Ok(version.to_owned())
}

/// As in "tidegate 0.1.0".
pub fn tidegate_version() -> anyhow::Result<String> {
    let output = Command::new(TIDEGATE).arg("--version").stdin(Stdio::null()).output().context("tidegate --version")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
