//! Restarts: one process takes the place of another, and no client finds the door closed.
//!
//! ```text
//! old  SIGUSR2 -- starts the binary -> listens on --------------------> go -> lets go, drains, ends
//! new             its start: reads, binds, `ready` -> waits for `go` -------> accepts
//! ```
//!
//! The listening sockets are passed on as systemd does it (`LISTEN_FDS`, `LISTEN_FDNAMES`), and with them one end of a stream.
//! On it the new process says `ready`, and what it has taken, when nothing is left in its start that could fail. Nobody is
//! accepted by it before the old one says `go`: so until then it can be ended without harm to anybody. Clients that come in
//! between wait in the accept queues, which both hold. `LISTEN_PID` is not set: it would have to be made between `fork` and
//! `exec`.
//!
//! Not in here: what a process does when it was replaced (`server.rs`, [`crate::drain`]), what a service manager is told of it
//! ([`crate::notify`]), and starting another path, other
//! arguments or another environment than this process was started with.

use std::{
    env,
    ffi::{OsStr, OsString},
    fmt, fs, future,
    future::Future,
    io::{self, Write as _},
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt as _, net::UnixStream as StdUnixStream, process::CommandExt as _},
    },
    path::{self, Path, PathBuf},
    pin::Pin,
    process::{self, Child, Command, ExitStatus},
    time::Duration,
};

use command_fds::{CommandFdExt as _, FdMapping};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    signal::unix::{Signal, SignalKind, signal},
    time::{sleep, timeout},
};
use tracing::{info, warn};

use crate::net::PREDECESSOR_NAME;

/// How long a new process may take to become ready: then it is ended, and this one goes on.
pub const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// The first descriptor that is passed (`SD_LISTEN_FDS_START` in `sd_listen_fds(3)`).
const FIRST: i32 = 3;

/// How often it is looked whether a process that let go of its stream has ended.
const LOOK: Duration = Duration::from_millis(10);

/// Of what the new process says.
const MAX_LINE: usize = 256;

/// What is passed on: sockets with their names.
pub type Passed = Vec<(OwnedFd, &'static str)>;

/// How this process was started, so that it can be done again.
#[derive(Debug, Clone)]
struct Image {
    /// Where it was found. Another file may be there by now: that is what a restart is for.
    program: PathBuf,
    /// As what.
    name: OsString,
    arguments: Vec<OsString>,
}

/// Restarts of this process: when one is asked for, and what becomes of it.
pub struct Restarts {
    image: Image,
    signal: Signal,
    /// The one that is under way.
    attempt: Option<Attempt>,
}

type Attempt = Pin<Box<dyn Future<Output = Result<Successor, Failure>> + Send>>;

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// A restart is asked for, and none is under way.
    Asked,
    /// A process waits to take over.
    Ready(Successor),
}

/// A process that is ready to take over, or on its way to that. It is ended with this, unless it took over.
#[derive(Debug)]
pub struct Successor {
    /// Before the stream: who sees the stream's end while it lives, takes over.
    child: Running,
    stream: UnixStream,
    /// It has taken the listening sockets of the clients; otherwise it has others.
    pub has_clients: bool,
    /// It has taken the admin listener.
    pub has_admin: bool,
}

/// A child that is ended with this.
#[derive(Debug)]
struct Running(Option<Child>);

/// Why there is no successor.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("it cannot be started")]
    Start(#[source] io::Error),
    #[error("it ended ({0}); its log says why")]
    Ended(ExitStatus),
    #[error("it was not ready after {} s", .0.as_secs_f64())]
    Late(Duration),
    #[error("it said something that is not understood: {0:?}")]
    Strange(String),
    #[error("it cannot be talked to")]
    Stream(#[source] io::Error),
}

/// The process that this one takes over from.
#[derive(Debug)]
pub struct Predecessor {
    stream: UnixStream,
}

impl Restarts {
    /// To be made early: what was started must still be where it was, and the signal's default action is to end the process.
    pub fn new() -> io::Result<Self> {
        Ok(Self { image: Image::of_this_process(), signal: signal(SignalKind::user_defined2())?, attempt: None })
    }

    /// Waits for SIGUSR2, or the end of the attempt that is under way. Can be dropped at any time without losing anything.
    pub async fn next(&mut self) -> Event {
        loop {
            let attempt = async {
                match &mut self.attempt {
                    Some(attempt) => attempt.await,
                    None => future::pending().await,
                }
            };
            let ended = tokio::select! {
                ended = attempt => ended,
                _ = self.signal.recv() => {
                    if process::id() == 1 {
                        warn!("SIGUSR2: not as PID 1, with whose end the container ends; nothing is done");
                    } else if self.attempt.is_some() {
                        warn!("SIGUSR2: a restart is under way already; nothing is done");
                    } else {
                        return Event::Asked;
                    }
                    continue;
                }
            };
            self.attempt = None;
            match ended {
                Ok(successor) => return Event::Ready(successor),
                Err(failure) => refused(&failure),
            }
        }
    }

    /// Starts the new process. [`Self::next`] says when it is ready, unless that fails, which is only logged.
    pub fn begin(&mut self, passed: Passed) {
        match self.image.start(passed) {
            Ok(successor) => {
                info!(pid = successor.pid(), program = %self.image.program.display(), "restarting: a new process is started");
                self.attempt = Some(Box::pin(successor.ready(READY_TIMEOUT)));
            }
            Err(error) => refused(&Failure::Start(error)),
        }
    }

    /// Ends a process that is not ready yet, if there is one: this one is about to end.
    pub fn give_up(&mut self) {
        if self.attempt.take().is_some() {
            warn!("a drain has begun: the restart is given up");
        }
    }
}

impl fmt::Debug for Restarts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Restarts").field("image", &self.image).finish_non_exhaustive()
    }
}

fn refused(failure: &Failure) {
    let source = std::error::Error::source(failure).map(ToString::to_string);
    warn!(error = %failure, source, "no restart: this process goes on");
}

impl Image {
    fn of_this_process() -> Self {
        let mut arguments = env::args_os();
        let name = arguments.next().unwrap_or_default();
        let program = find(&name, env::var_os("PATH").as_deref(), env::current_exe().ok().as_deref());
        Self { program, name, arguments: arguments.collect() }
    }

    fn start(&self, passed: Passed) -> io::Result<Successor> {
        let (stream, theirs) = StdUnixStream::pair()?;
        stream.set_nonblocking(true)?;
        let stream = UnixStream::from_std(stream)?;
        let (mut sockets, mut names): (Vec<OwnedFd>, Vec<&str>) = passed.into_iter().unzip();
        sockets.push(theirs.into());
        names.push(PREDECESSOR_NAME);
        let mappings = sockets.into_iter().zip(FIRST..).map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd });
        let mut command = Command::new(&self.program);
        command.arg0(&self.name).args(&self.arguments);
        command.env_remove("LISTEN_PID").env_remove("LISTEN_FDS_FIRST_FD");
        // The watchdog is the new process's, too: it is for whoever serves.
        command.env_remove("WATCHDOG_PID");
        command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        // Done in the child: nothing else that this process might start gets them, and all others are closed by its `exec`.
        command.fd_mappings(mappings.collect()).map_err(io::Error::other)?;
        let child = Running(Some(command.spawn()?));
        Ok(Successor { child, stream, has_clients: false, has_admin: false })
    }
}

/// The path under which a program was started as `name`, when what runs is `current`.
///
/// Not simply `current`, which has no symbolic links: a deploy may be a link that points elsewhere by now. Nor simply `name`,
/// which is whatever the one who started it wrote there.
fn find(name: &OsStr, search: Option<&OsStr>, current: Option<&Path>) -> PathBuf {
    let candidates: Vec<PathBuf> = if name.as_bytes().contains(&b'/') {
        path::absolute(name).into_iter().collect()
    } else {
        let folders = search.map(env::split_paths).into_iter().flatten();
        folders.filter_map(|folder| path::absolute(folder.join(name)).ok()).collect()
    };
    let is_it = |candidate: &&PathBuf| match current {
        Some(current) => fs::canonicalize(candidate).is_ok_and(|real| real == current),
        None => candidate.is_file(),
    };
    if let Some(found) = candidates.iter().find(is_it) {
        return found.clone();
    }
    let current = current.unwrap_or(Path::new(name));
    // The kernel's mark of a file that was replaced since (`d_path` in fs/d_path.c).
    let path = current.as_os_str().as_bytes();
    PathBuf::from(OsStr::from_bytes(path.strip_suffix(b" (deleted)").unwrap_or(path)))
}

impl Successor {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.0.as_ref().map_or(0, Child::id)
    }

    /// Waits until it says so.
    async fn ready(mut self, within: Duration) -> Result<Self, Failure> {
        match timeout(within, self.hear()).await {
            Ok(heard) => heard?,
            Err(_) => return Err(Failure::Late(within)),
        }
        Ok(self)
    }

    async fn hear(&mut self) -> Result<(), Failure> {
        let mut line = Vec::new();
        while !line.ends_with(b"\n") && line.len() < MAX_LINE {
            if self.stream.read_buf(&mut line).await.map_err(Failure::Stream)? == 0 {
                return Err(self.child.ended().await);
            }
        }
        let line = String::from_utf8_lossy(&line);
        let mut words = line.split_ascii_whitespace();
        if words.next() != Some("ready") || !line.ends_with('\n') {
            return Err(Failure::Strange(line.into_owned()));
        }
        for word in words {
            match word {
                "clients" => self.has_clients = true,
                "admin" => self.has_admin = true,
                // Of a version to come.
                _ => {}
            }
        }
        Ok(())
    }

    /// It is to take over. When that fails it is ended: it has served nobody.
    pub async fn go(mut self) -> io::Result<()> {
        self.stream.write_all(b"go\n").await?;
        // From here on it lives longer than this process.
        self.child.0 = None;
        Ok(())
    }
}

impl Running {
    /// It has let go of its stream: it may still have to say why.
    async fn ended(&mut self) -> Failure {
        loop {
            match self.0.as_mut().map(Child::try_wait) {
                Some(Ok(Some(status))) => return Failure::Ended(status),
                Some(Ok(None)) => sleep(LOOK).await,
                Some(Err(error)) => return Failure::Stream(error),
                None => return Failure::Stream(io::ErrorKind::NotFound.into()),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // At once, and it has nobody to take leave of: it accepts nothing before it took over.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Predecessor {
    /// Says that this process is ready to take over, and what it has taken of what was passed.
    pub fn tell_ready(mut stream: StdUnixStream, has_clients: bool, has_admin: bool) -> io::Result<Self> {
        let words = [Some("ready"), has_clients.then_some("clients"), has_admin.then_some("admin")];
        let words: Vec<&str> = words.into_iter().flatten().collect();
        stream.write_all(format!("{}\n", words.join(" ")).as_bytes())?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream: UnixStream::from_std(stream)? })
    }

    /// Waits until it lets this process take over, or is gone without a word: then nobody else is there.
    pub async fn lets_go(&mut self) {
        let mut byte = [0];
        // An error of a stream between two processes is its end.
        let _ = self.stream.read(&mut byte).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    fn image(script: &str) -> Image {
        let arguments = ["-c", script].map(OsString::from).to_vec();
        Image { program: "/bin/sh".into(), name: "sh".into(), arguments }
    }

    async fn start(script: &str, within: Duration) -> Result<Successor, Failure> {
        image(script).start(Vec::new()).expect("a shell").ready(within).await
    }

    const LONG: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn what_it_says_is_heard() {
        let ready = start("echo ready clients tomorrow >&3; read go <&3; exit 0", LONG).await.unwrap();
        assert_eq!((ready.has_clients, ready.has_admin), (true, false));
        ready.go().await.unwrap();
        let names = format!("1:{PREDECESSOR_NAME}:");
        let script = format!(
            "test \"$LISTEN_FDS:$LISTEN_FDNAMES:$LISTEN_PID\" = {names} && echo ready admin >&3; exec sleep 1000"
        );
        let ready = start(&script, LONG).await.unwrap();
        assert_eq!((ready.has_clients, ready.has_admin), (false, true));
    }

    #[tokio::test]
    async fn a_process_that_is_not_ready_is_ended() {
        assert!(matches!(start("exit 78", LONG).await, Err(Failure::Ended(status)) if status.code() == Some(78)));
        // What it does after it has closed its stream, as to flush its log, is waited for.
        let last = start("exec 3>&-; sleep 0.1; exit 7", LONG).await;
        assert!(matches!(last, Err(Failure::Ended(status)) if status.code() == Some(7)), "{last:?}");
        assert!(
            matches!(start("echo hello >&3; exec sleep 1000", LONG).await, Err(Failure::Strange(said)) if said == "hello\n")
        );
        let begun = image("echo $$ >&3; exec sleep 1000").start(Vec::new()).unwrap();
        let pid = begun.pid();
        assert!(matches!(begun.ready(Duration::from_millis(50)).await, Err(Failure::Late(_) | Failure::Strange(_))));
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "it is ended and was waited for");
    }

    #[tokio::test]
    async fn one_that_never_says_anything_is_not_waited_for_any_longer() {
        let late = start("exec sleep 1000", Duration::from_millis(50)).await;
        assert!(matches!(late, Err(Failure::Late(_))), "{late:?}");
    }

    /// A link that is moved to the next version is followed anew, a file that was replaced is found again, and a name that
    /// somebody made up is not believed.
    #[test]
    fn the_program_is_found_as_it_was_started() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let (real, link) = (root.join("tidegate-1"), root.join("tidegate"));
        fs::write(&real, "").unwrap();
        fs::set_permissions(&real, fs::Permissions::from_mode(0o755)).unwrap();
        symlink(&real, &link).unwrap();
        let search = env::join_paths([Path::new("/nowhere"), &root]).unwrap();
        let found = |name: &str| find(OsStr::new(name), Some(&search), Some(&real));
        assert_eq!(found(link.to_str().unwrap()), link);
        assert_eq!(found("tidegate"), link);
        assert_eq!(found("tidegate-1"), real);
        for made_up in ["-tidegate", "/bin/sh", "", "./tidegate"] {
            assert_eq!(found(made_up), real, "{made_up}");
        }
        let deleted = PathBuf::from(format!("{} (deleted)", real.display()));
        assert_eq!(find(OsStr::new("x"), None, Some(&deleted)), real);
    }
}
