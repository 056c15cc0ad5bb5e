//! The real binary in the proxy's namespace, with its log and its metrics.

use super::{
    Board, DEADLINE, Lab, Message, Side,
    cgroup::MemoryGroup,
    lab::{Place, Socket},
};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    os::{fd::OwnedFd, unix::process::CommandExt as _},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use tempfile::TempDir;
use toml::{Table, Value as Toml};

/// What came out of the process.
#[derive(Debug, Default)]
struct Output {
    lines: Vec<Line>,
    /// Of stdout and stderr, those that are at their end.
    ended: usize,
}

/// What became of a wait for a line.
enum Found {
    Line(Value),
    /// The process has ended, and will print no more.
    Never,
}

impl Output {
    /// The first line that `test` accepts; None as long as it may still come.
    fn find(&self, test: impl Fn(&Value) -> bool) -> Option<Found> {
        let mut lines = self.lines.iter();
        match lines.find(|line| !line.json.is_null() && test(&line.json)) {
            Some(line) => Some(Found::Line(line.json.clone())),
            None => (self.ended == 2).then_some(Found::Never),
        }
    }
}

#[derive(Clone, Debug)]
struct Line {
    at: Duration,
    text: String,
    /// `Null` where the line is none, as a panic's message.
    json: Value,
}

/// What is different around one process, from before its first instruction on.
#[derive(Debug, Default)]
pub struct Surroundings<'a> {
    /// `RLIMIT_NOFILE`, soft and hard.
    pub descriptors: Option<u64>,
    /// `RLIMIT_AS`, in bytes.
    pub address_space: Option<u64>,
    pub memory: Option<&'a MemoryGroup>,
    /// Handed over as systemd does it: descriptor 3, `LISTEN_FDS` and `LISTEN_PID`.
    pub listener: Option<OwnedFd>,
    /// `NOTIFY_SOCKET`.
    pub notify: Option<String>,
    /// `WATCHDOG_USEC`.
    pub watchdog: Option<Duration>,
    /// It leads a process group of its own: whatever it starts is ended with it.
    pub leads: bool,
    /// A Ping with this payload makes its session panic.
    pub fault: Option<&'static str>,
    /// A Ping with this payload makes the worker of its session stand still.
    pub stuck: Option<&'static str>,
}

impl Surroundings<'_> {
    /// A shell that makes its own surroundings so and then becomes `program`, with the same pid.
    fn command(&self, lab: &Lab, program: &str) -> Command {
        let mut script = Vec::new();
        if let Some(group) = self.memory {
            script.push(format!("echo $$ > {}", group.procs().display()));
        }
        if let Some(count) = self.descriptors {
            script.push(format!("ulimit -n {count}"));
        }
        if let Some(bytes) = self.address_space {
            script.push(format!("ulimit -v {}", bytes / 1024));
        }
        if self.listener.is_some() {
            script.push("exec 3<&0 0</dev/null; export LISTEN_PID=$$ LISTEN_FDS=1".to_owned());
        }
        // `ip netns exec` would hide the cgroups: it mounts a sysfs of its own.
        let keeps_cgroups = self.memory.is_some();
        let inner = if keeps_cgroups {
            lab.bare_command_in(Side::Proxy, program)
        } else {
            lab.command_in(Side::Proxy, program)
        };
        if script.is_empty() {
            return inner;
        }
        script.push("exec \"$@\"".to_owned());
        let mut command = Command::new("sh");
        command.args(["-ec", &script.join("\n"), "sh"]).arg(inner.get_program()).args(inner.get_args());
        command
    }
}

/// `tidegate run`, killed on drop.
#[derive(Debug)]
pub struct Proxy {
    /// Where clients connect.
    pub address: SocketAddr,
    pub admin: SocketAddr,
    child: Mutex<Child>,
    pid: Pid,
    output: Board<Output>,
    readers: Vec<JoinHandle<()>>,
    place: Place,
    /// The settings of every test, with the address of its backend.
    base: Table,
    config: TempDir,
    leads: bool,
}

impl Proxy {
    /// Starts it with the settings that a test needs, over those that every test needs (without keep-alive to the backend: most
    /// scripts are for one request), and waits until it listens.
    pub fn start(lab: &Lab, settings: &str, backend: SocketAddr, started: Instant) -> Self {
        Self::start_in(lab, Surroundings::default(), settings, backend, started)
    }

    /// As [`Proxy::start`], with less around it than the test itself has, or more.
    pub fn start_in(
        lab: &Lab,
        surroundings: Surroundings<'_>,
        settings: &str,
        backend: SocketAddr,
        started: Instant,
    ) -> Self {
        let base = base(lab, backend);
        let folder = tempfile::tempdir().expect("a folder for the configuration");
        let file = folder.path().join("proxy.toml");
        fs::write(&file, over(&base, settings)).expect("room for the configuration");

        let mut command = surroundings.command(lab, env!("CARGO_BIN_EXE_tidegate"));
        command.args(["run", "-c"]).arg(&file);
        command.stdin(surroundings.listener.map_or_else(Stdio::null, Stdio::from));
        if let Some(path) = surroundings.notify {
            command.env("NOTIFY_SOCKET", path);
        }
        if let Some(time) = surroundings.watchdog {
            command.env("WATCHDOG_USEC", time.as_micros().to_string());
        }
        if surroundings.leads {
            command.process_group(0);
        }
        if let Some(payload) = surroundings.fault {
            command.env("FAULT_PING", payload);
        }
        if let Some(payload) = surroundings.stuck {
            command.env("FAULT_STUCK", payload);
        }
        only_its_file(&mut command);
        Self::spawn(lab, command, base, folder, surroundings.leads, started)
    }

    /// With these arguments, and a folder where its configuration is, as somebody else has written it.
    pub fn start_as(lab: &Lab, arguments: &[String], config: TempDir, started: Instant) -> Self {
        let mut command = lab.command_in(Side::Proxy, env!("CARGO_BIN_EXE_tidegate"));
        command.args(arguments).stdin(Stdio::null());
        only_its_file(&mut command);
        Self::spawn(lab, command, Table::new(), config, false, started)
    }

    fn spawn(lab: &Lab, mut command: Command, base: Table, config: TempDir, leads: bool, started: Instant) -> Self {
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary that was just built");
        let output = Board::new(Output::default());
        let stdout = child.stdout.take().expect("it was asked for");
        let stderr = child.stderr.take().expect("it was asked for");
        let readers = vec![read(stdout, output.clone(), started), read(stderr, output.clone(), started)];
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let pid = Pid::from_child(&child);
        // Made before the waiting, so that a panic in it ends the process.
        let mut proxy = Self {
            address: nowhere,
            admin: nowhere,
            child: Mutex::new(child),
            pid,
            output,
            readers,
            place: lab.place(Side::Proxy),
            base,
            config,
            leads,
        };
        proxy.address = proxy.address_in("listening");
        proxy.admin = proxy.address_in("admin listening");
        proxy.assert_only_listener();
        proxy
    }

    fn address_in(&self, message: &str) -> SocketAddr {
        let line = self.log_where(&format!("'{message}'"), |json| json["message"] == message);
        let address = line["address"].as_str().and_then(|address| address.parse().ok());
        address.unwrap_or_else(|| panic!("no address in {line}"))
    }

    /// Every listening socket of our port is ours: with `SO_REUSEPORT` a second process could take half of the clients.
    fn assert_only_listener(&self) {
        let sockets = self.sockets();
        // Where all labs are on loopback, another may have the same port of another address.
        let is_ours = |local: SocketAddr| {
            let [own, other] = [self.address.ip(), local.ip()];
            local.port() == self.address.port() && (own == other || own.is_unspecified() || other.is_unspecified())
        };
        let ours: Vec<String> = fs::read_dir(format!("/proc/{}/fd", self.pid))
            .expect("our own child")
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .map(|link| link.to_string_lossy().into_owned())
            .collect();
        let listening: Vec<_> = sockets.iter().filter(|s| s.state == "LISTEN" && is_ours(s.local)).collect();
        assert!(!listening.is_empty(), "nothing listens on {}: {sockets:?}", self.address);
        for socket in listening {
            let ours = ours.contains(&format!("socket:[{}]", socket.inode));
            assert!(ours, "somebody else listens on {}: {socket:?}", self.address);
        }
    }

    /// What it was started with; a process that it starts reads it again.
    pub fn config_file(&self) -> PathBuf {
        self.config.path().join("proxy.toml")
    }

    /// The processes of its group that run, itself among them.
    pub fn group(&self) -> Vec<Pid> {
        assert!(self.leads, "it is in the group of the tests");
        group(self.pid)
    }

    fn sockets(&self) -> Vec<Socket> {
        self.place.run(Socket::list).expect("procfs")
    }

    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// What it has used of the processors until now; in steps of 10 ms, as the kernel tells it.
    pub fn cpu_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).expect("our own child");
        // The name, in parentheses, may contain anything; behind it come the fields from the third on.
        let (_, fields) = stat.rsplit_once(')').expect("the kernel's format");
        let ticks = fields.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().expect("a number"));
        Duration::from_millis(10 * ticks.sum::<u64>())
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid)).expect("our own child").count()
    }

    /// The same without the ends of pipes: it keeps a few of those that large payloads go through, for the next ones.
    pub fn descriptors_but_pipes(&self) -> usize {
        let links = fs::read_dir(format!("/proc/{}/fd", self.pid)).expect("our own child");
        let is_pipe = |link: io::Result<PathBuf>| link.is_ok_and(|to| to.to_string_lossy().starts_with("pipe:"));
        links.flatten().filter(|link| !is_pipe(fs::read_link(link.path()))).count()
    }

    /// From now on it may have so many descriptors open; those that it has stay.
    pub fn limit_descriptors(&self, count: u64) {
        let limit = Rlimit { current: Some(count), maximum: Some(count) };
        prlimit(Some(self.pid), Resource::Nofile, limit).expect("our own child");
    }

    /// Where its configuration is.
    pub fn config(&self) -> PathBuf {
        self.config.path().join("proxy.toml")
    }

    /// What is in the file with these settings over those of every test.
    pub fn configuration(&self, settings: &str) -> String {
        over(&self.base, settings)
    }

    /// Puts a file with other settings in the place of the old one, in one step.
    pub fn configure(&self, settings: &str) {
        let new = self.config.path().join("new.toml");
        fs::write(&new, self.configuration(settings)).expect("room for the configuration");
        fs::rename(new, self.config()).expect("the same folder");
    }

    pub fn sigterm(&self) {
        self.signal(Signal::TERM);
    }

    pub fn sigkill(&self) {
        self.signal(Signal::KILL);
    }

    /// Only to a process that is still ours: a pid is given away again once its exit was waited for.
    pub fn signal(&self, signal: Signal) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        let exited = child.try_wait().expect("our own child");
        assert_eq!(exited, None, "the proxy has ended before it got {signal:?}");
        kill_process(self.pid, signal).expect("our own child");
    }

    pub fn exit_status(&self) -> Option<ExitStatus> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        child.try_wait().expect("our own child")
    }

    /// Waits for its end; panics after `within`.
    #[track_caller]
    pub fn wait_exit(&self, within: Duration) -> ExitStatus {
        // Its outputs close when it exits; that is awaited, and only then the status asked for.
        let closed = self.output.wait(within, |output| (output.ended == 2).then_some(()));
        assert!(closed.is_some(), "the proxy does not end within {within:?}");
        self.wait_status()
    }

    /// As [`Proxy::wait_exit`], where others hold its outputs: those that it has started.
    #[track_caller]
    pub fn wait_status(&self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.exit_status() {
                return status;
            }
            assert!(begun.elapsed() < DEADLINE, "the proxy does not end");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// The log's lines up to now, those that are no JSON left out.
    pub fn log(&self) -> Vec<Value> {
        let json = |line: &Line| (!line.json.is_null()).then(|| line.json.clone());
        self.output.read(|output| output.lines.iter().filter_map(json).collect())
    }

    /// Everything it printed, with the offset of each line.
    pub fn printed(&self) -> Vec<(Duration, String)> {
        self.output.read(|output| output.lines.iter().map(|l| (l.at, l.text.clone())).collect())
    }

    /// The first line of the log that `test` accepts, waiting for it. A line's fields are at its top level.
    #[track_caller]
    pub fn log_where(&self, what: &str, test: impl Fn(&Value) -> bool) -> Value {
        let found = self.output.wait(DEADLINE, |output| output.find(&test));
        self.logged(what, found)
    }

    /// As [`Proxy::log_where`], for async code.
    pub async fn has_logged(&self, what: &str, test: impl Fn(&Value) -> bool) -> Value {
        let found = self.output.until(DEADLINE, |output| output.find(&test)).await;
        self.logged(what, found)
    }

    #[track_caller]
    fn logged(&self, what: &str, found: Option<Found>) -> Value {
        let printed = || self.printed().into_iter().map(|(_, line)| line).collect::<Vec<_>>().join("\n");
        match found {
            Some(Found::Line(line)) => line,
            Some(Found::Never) => panic!("the proxy has ended and never logged {what}:\n{}", printed()),
            None => panic!("the proxy never logged {what}:\n{}", printed()),
        }
    }

    /// One request to the admin listener, on a connection of its own.
    pub fn admin(&self, request: &Message) -> io::Result<Message> {
        let within = DEADLINE;
        self.place.run(|| {
            let mut stream = TcpStream::connect_timeout(&self.admin, within)?;
            stream.set_read_timeout(Some(within))?;
            stream.write_all(&request.clone().set("Connection", "close").set("Host", "localhost").bytes())?;
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes)?;
            let (mut response, length) = Message::parse_head(&bytes)
                .ok_or_else(|| io::Error::other(format!("no head in {} bytes", bytes.len())))?;
            let body = response.framing().body(&bytes[length..], true)?;
            (response.body, _) = body.ok_or_else(|| io::Error::other("half a body"))?;
            Ok(response)
        })
    }

    pub fn get(&self, target: &str) -> Message {
        self.admin(&Message::get(target)).unwrap_or_else(|e| panic!("GET {target} on the admin listener: {e}"))
    }

    pub fn metrics(&self) -> Metrics {
        let response = self.get("/metrics");
        assert_eq!(response.code(), 200, "{response:?}");
        Metrics::parse(&response.text())
    }

    /// Asks until the metrics are as `test` wants them: what is counted after an event may be a moment late.
    #[track_caller]
    pub fn metrics_when(&self, what: &str, test: impl Fn(&Metrics) -> bool) -> Metrics {
        let begun = Instant::now();
        loop {
            let metrics = self.metrics();
            if test(&metrics) {
                return metrics;
            }
            assert!(begun.elapsed() < DEADLINE, "the metrics never said {what}: {metrics:#?}");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = child.kill();
        let _ = child.wait();
        // Its descendants hold its outputs. One that is just starting another is ended before the other is looked for again.
        loop {
            let left = if self.leads { group(self.pid) } else { Vec::new() };
            if left.is_empty() {
                break;
            }
            for pid in left {
                let _ = kill_process(pid, Signal::KILL);
            }
            thread::sleep(Duration::from_millis(1));
        }
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

/// The processes of a group, without those that have ended and that nobody has asked for yet.
fn group(leader: Pid) -> Vec<Pid> {
    let processes = fs::read_dir("/proc").expect("procfs").flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter_map(Pid::from_raw);
    let is_member = |pid: &Pid| {
        // One that is gone since is none.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // Behind the name, which may contain anything: the state, the parent, the group.
        let fields = stat.rsplit_once(')').map(|(_, fields)| fields.split_whitespace().collect::<Vec<_>>());
        fields.is_some_and(|fields| !matches!(fields[0], "Z" | "X") && fields[2] == leader.to_string())
    };
    pids.filter(is_member).collect()
}

/// What decides is the file, not where the test was started.
fn only_its_file(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TIDEGATE_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
}

/// The settings of every test. Nobody is to be given up, and so reset, because the whole machine stood still for two seconds.
fn base(lab: &Lab, backend: SocketAddr) -> Table {
    let front = SocketAddr::new(lab.address(Side::Proxy, Side::Client), 0);
    let text = format!(
        "listen.address = '{front}'\n\
         upstream.address = '{backend}'\n\
         admin.address = '127.0.0.1:0'\n\
         pool.keep_alive = 0\n\
         close.linger = '10s'\n\
         log.format = 'json'\n\
         log.filter = 'info,tidegate=debug'\n"
    );
    text.parse().expect("valid TOML")
}

fn over(base: &Table, settings: &str) -> String {
    let mut config = base.clone();
    merge(&mut config, settings.parse().expect("the test's TOML"));
    config.to_string()
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Toml::Table(into)), Toml::Table(from)) => merge(into, from),
            (_, value) => _ = into.insert(key, value),
        }
    }
}

fn read(from: impl Read + Send + 'static, output: Board<Output>, started: Instant) -> JoinHandle<()> {
    thread::spawn(move || {
        // Bytes that are no UTF-8 end the reading, which a test that waits for a line then sees.
        for text in BufReader::new(from).lines().map_while(Result::ok) {
            let json = serde_json::from_str(&text).unwrap_or(Value::Null);
            let at = started.elapsed();
            output.change(|output| output.lines.push(Line { at, text, json }));
        }
        output.change(|output| output.ended += 1);
    })
}

/// The samples of one `/metrics`, by `name{labels}` as it is written there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    pub fn parse(text: &str) -> Self {
        let samples = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
        let sample = |line: &str| {
            // A label's value may contain a space, nothing after the labels does but the value and a time.
            let end_of_name = line.rfind('}').map_or_else(|| line.find(' '), |brace| Some(brace + 1));
            let (name, rest) = line.split_at(end_of_name.unwrap_or(line.len()));
            let value = rest.split_whitespace().next().and_then(|value| value.parse().ok());
            (name.to_owned(), value.unwrap_or_else(|| panic!("a sample without a value: {line}")))
        };
        Self(samples.map(sample).collect())
    }

    /// A sample; 0 where there is none, because a counter with labels appears with its first event.
    pub fn get(&self, name: &str) -> f64 {
        self.0.get(name).copied().unwrap_or(0.0)
    }

    /// The sum over all labels.
    pub fn sum(&self, name: &str) -> f64 {
        let of_name = self.0.iter().filter(|(key, _)| key.split('{').next() == Some(name));
        of_name.map(|(_, value)| value).sum()
    }

    /// The sum over all that have this label: `reason="memory"`.
    pub fn sum_with(&self, name: &str, label: &str) -> f64 {
        let is_meant = |key: &str| {
            let (of, labels) = key.trim_end_matches('}').split_once('{').unwrap_or((key, ""));
            of == name && labels.split(',').any(|found| found == label)
        };
        self.0.iter().filter(|(key, _)| is_meant(key)).map(|(_, value)| value).sum()
    }

    /// A whole number, as of a counter.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "counters of a test are small")]
    pub fn count(&self, name: &str) -> u64 {
        self.get(name).round() as u64
    }

    pub fn all(&self) -> &BTreeMap<String, f64> {
        &self.0
    }
}
