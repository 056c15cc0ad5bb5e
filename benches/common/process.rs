//! A process of a leg: started in its side's namespace, watched, ended when it is dropped.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use clap::ValueEnum;
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use tokio::time::sleep;

use crate::{namespaces, procfs};

const START_LIMIT: Duration = Duration::from_secs(20);
const END_LIMIT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);
const LOG_TAIL_LINES: usize = 20;

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

/// Asks for a signal at the end of the parent, enters a namespace, and becomes `command`; returns only if that fails.
pub fn become_held(death: Death, namespace: Option<&Path>, command: &[OsString]) -> anyhow::Error {
    if let Err(error) = set_parent_process_death_signal(Some(death.signal())) {
        return error.into();
    }
    if let Some(Err(error)) = namespace.map(namespaces::enter) {
        return error;
    }
    let [program, arguments @ ..] = command else { return anyhow::anyhow!("no command") };
    anyhow::Error::from(Command::new(program).args(arguments).exec()).context(program.display().to_string())
}

/// Where and how a process is started.
#[derive(Debug, Clone)]
pub struct Start<'a> {
    /// For its files.
    pub folder: &'a Path,
    pub name: &'static str,
    pub death: Death,
    /// None: that of this process.
    pub namespace: Option<PathBuf>,
    /// Beside what this process has.
    pub environment: Vec<(&'static str, OsString)>,
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
    pub fn start(start: Start<'_>, command: &[&OsStr]) -> anyhow::Result<Self> {
        let Start { folder, name, death, namespace, environment } = start;
        let stdout = folder.join(format!("{name}.out"));
        let stderr = folder.join(format!("{name}.err"));
        let mut held = Command::new(std::env::current_exe()?);
        held.args(["held", if death == Death::Term { "term" } else { "kill" }]);
        if let Some(namespace) = namespace {
            held.arg("--namespace").arg(namespace);
        }
        held.arg("--").args(command);
        // What decides is what is said here, not where the program was started.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("TIDEGATE_") || name == "RUST_LOG" {
                held.env_remove(name);
            }
        }
        let child = held
            .envs(environment)
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
    pub fn start_self(start: Start<'_>, arguments: &[&str]) -> anyhow::Result<Self> {
        let this = std::env::current_exe()?;
        let mut command = vec![this.as_os_str()];
        command.extend(arguments.iter().map(OsStr::new));
        Self::start(start, &command)
    }

    /// What it printed on stdout so far.
    pub fn printed(&self) -> String {
        fs::read_to_string(&self.stdout).unwrap_or_default()
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
    pub async fn until<T>(&mut self, what: &str, mut ask: impl FnMut(&Self) -> Option<T>) -> anyhow::Result<T> {
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
    pub fn log_tail(&self) -> String {
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
