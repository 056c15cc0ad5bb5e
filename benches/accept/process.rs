//! Processes of a leg: this same program in other roles, spoken to in lines of JSON, ended when they are dropped.
//!
//! A role says one line when it is ready, then one line for each line that it is told. It ends with its standard input, and
//! the kernel ends it with the thread that started it, so that nothing is left behind on a panic, Ctrl-C or SIGKILL.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, ensure};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde::{Serialize, de::DeserializeOwned};

/// A process that was started here.
#[derive(Debug)]
pub struct Process {
    name: &'static str,
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Process {
    /// This program in another role; `wrapper` is a command that becomes it.
    pub fn start(name: &'static str, wrapper: &[&str], arguments: &[&str]) -> anyhow::Result<Self> {
        let this = std::env::current_exe()?;
        let mut command = match wrapper {
            [] => Command::new(&this),
            [program, rest @ ..] => {
                let mut command = Command::new(program);
                command.args(rest).arg(&this);
                command
            }
        };
        command.arg(name).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {name} ({command:?})"))?;
        let stdin = child.stdin.take().context("stdin is a pipe")?;
        let stdout = BufReader::new(child.stdout.take().context("stdout is a pipe")?);
        Ok(Self { name, child, stdin, stdout })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its next line.
    pub fn hear<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        ensure!(line.ends_with('\n'), "{} has ended", self.name);
        serde_json::from_str(&line).with_context(|| format!("{} said {line:?}", self.name))
    }

    /// Asks for the next line.
    pub fn ask<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        self.stdin.write_all(b"\n").with_context(|| self.name.to_owned())?;
        self.hear()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Errors: it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// To be called first in a role.
pub fn end_with_parent() -> io::Result<()> {
    Ok(set_parent_process_death_signal(Some(Signal::KILL))?)
}

/// Says a line.
pub fn say(value: &impl Serialize) -> anyhow::Result<()> {
    let mut line = serde_json::to_string(value)?;
    line.push('\n');
    let mut out = io::stdout().lock();
    out.write_all(line.as_bytes())?;
    Ok(out.flush()?)
}

/// Waits until the next line is asked for; false: nobody will ask any more.
pub fn is_asked() -> anyhow::Result<bool> {
    Ok(io::stdin().lock().read_line(&mut String::new())? > 0)
}
