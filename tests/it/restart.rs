//! One process after the other on the same listening sockets, by SIGUSR2: clients notice no more of it than of a drain.

use crate::harness::{
    Board, DEADLINE, LIMIT, Lab, Side, block,
    crowd::{self, Front, Stage, is_strict, tally},
    lab::Running,
    proxy::Surroundings,
    visit::{self, Errand, Outcome, visit},
};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use rustix::{
    fs::{CWD, FileType, Mode, mknodat},
    process::{Pid, Signal, kill_process},
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener},
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr as UnixAddress, UnixDatagram},
    },
    process::{Command, Stdio},
    sync::mpsc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use tokio::time::{MissedTickBehavior, interval};

/// A process that is replaced does not wait for this delay: a test that did would not end.
/// Nobody but a successor reads the file again: a pipe can be read once.
const DRAIN: &str = "drain = { delay = '1h', window = '200ms' }\nreload.watch = '0s'";

/// tidegate, and what comes after it.
struct Line<'a> {
    front: Front<'a>,
    pids: Vec<u32>,
}

impl<'a> Line<'a> {
    fn start(stage: &'a Stage, settings: &str, backend: SocketAddr) -> Self {
        Self::start_in(stage, Surroundings::default(), settings, backend)
    }

    fn start_in(stage: &'a Stage, surroundings: Surroundings<'_>, settings: &str, backend: SocketAddr) -> Self {
        let front = stage.tidegate_in(Surroundings { leads: true, ..surroundings }, settings, backend);
        let pids = vec![front.pid()];
        Self { front, pids }
    }

    /// The process that serves.
    fn pid(&self) -> u32 {
        *self.pids.last().expect("it began with one")
    }

    #[track_caller]
    fn signal(&self, signal: Signal) {
        let pid = raw(self.pid());
        assert!(self.front.group().contains(&pid), "{pid} has ended before it got {signal:?}");
        kill_process(pid, signal).expect("our own descendant");
    }

    #[track_caller]
    fn logged(&self, message: &str) -> Value {
        self.front.log_where(&format!("'{message}'"), |line| line["message"] == message)
    }

    /// How often something was logged.
    fn count(&self, message: &str) -> usize {
        self.front.log().iter().filter(|line| line["message"] == message).count()
    }

    /// Waits for the next process to serve.
    #[track_caller]
    fn taken_over(&mut self) {
        let is_next = |line: &Value| {
            let known = self.pids.iter().any(|pid| line["pid"] == *pid);
            line["message"] == "this process has taken over" && !known
        };
        let line = self.front.log_where("that the next process has taken over", is_next);
        self.pids.push(line["pid"].as_u64().and_then(|pid| pid.try_into().ok()).expect("a pid"));
    }

    #[track_caller]
    fn restart(&mut self) {
        self.signal(Signal::USR2);
        self.taken_over();
    }

    fn status(&self) -> Value {
        serde_json::from_slice(&self.front.get("/status").body).expect("JSON")
    }

    /// Waits until only the process that serves is left.
    #[track_caller]
    fn alone(&self) {
        self.left(&[raw(self.pid())]);
    }

    #[track_caller]
    fn left(&self, expected: &[Pid]) {
        let begun = Instant::now();
        loop {
            let group = self.front.group();
            if group == expected {
                return;
            }
            assert!(begun.elapsed() < LIMIT, "{group:?} run, not {expected:?}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the process that serves has so many descriptors open.
    #[track_caller]
    fn has_open(&self, expected: usize) {
        let begun = Instant::now();
        loop {
            let folder = fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("our own descendant");
            let open: Vec<_> = folder.flatten().filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
            if open.len() == expected {
                return;
            }
            assert!(begun.elapsed() < DEADLINE, "{} descriptors and not {expected}: {open:#?}", open.len());
            thread::sleep(Duration::from_millis(5));
        }
    }
}

fn raw(pid: u32) -> Pid {
    Pid::from_raw(pid.try_into().expect("a pid")).expect("no process has 0")
}

/// Sessions that wait for what comes; how they ended.
fn sessions(lab: &Lab, address: SocketAddr, count: usize) -> Running<Vec<String>> {
    let open = Board::new(false);
    let running = {
        let open = open.clone();
        lab.spawn_in(Side::Client, async move || {
            let members = crowd::connect(address, count).await;
            open.change(|open| *open = true);
            crowd::together(members, async |mut member| member.rest().await.summary()).await
        })
    };
    open.wait(LIMIT, |open| open.then_some(())).expect("sessions that begin");
    running
}

#[track_caller]
fn assert_closed(sessions: Running<Vec<String>>, count: usize) {
    assert_eq!(tally(sessions.join()), BTreeMap::from([("Close 1001, Fin".to_owned(), count)]));
}

#[track_caller]
fn assert_served(stage: &Stage, address: SocketAddr) {
    let visits = stage.clients(async || [visit(address, Errand::Echo).await, visit(address, Errand::Get).await]);
    visit::assert_served(&visits, 2);
}

/// From one process to the next and again to the next: whoever had a session keeps it until its Close, whoever comes is served
/// by the new one, and nothing but what is passed on goes from one to the other. The last one closes in order what it was given.
#[test]
fn a_successor_serves_and_the_old_sessions_end_with_a_close() {
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let mut line = Line::start(&stage, DRAIN, backend.address);
    let address = line.front.address;
    let descriptors = line.front.descriptors();
    assert_eq!(line.status()["pid"], line.pid());
    for _ in 0..2 {
        let old = sessions(stage.lab(), address, 20);
        line.restart();
        let status = line.status();
        assert_eq!((&status["pid"], &status["phase"]), (&line.pid().into(), &"running".into()));
        assert_served(&stage, address);
        assert_closed(old, 20);
        line.alone();
        line.has_open(descriptors);
    }
    assert_eq!(line.front.wait_status().code(), Some(0), "of the first one");
    let last = sessions(stage.lab(), address, 20);
    line.signal(Signal::TERM);
    line.logged("SIGTERM");
    line.signal(Signal::TERM);
    assert_closed(last, 20);
    line.left(&[]);
    // It knew that nobody else listens any more.
    assert_eq!(line.count("drained"), 3);
    line.front.assert_no_rst();
}

/// A new process that fails is nobody's concern but its own, and when what it failed of is mended, the next one does not.
#[test]
fn a_new_process_that_fails_leaves_the_old_one_serving() {
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let mut line = Line::start(&stage, DRAIN, backend.address);
    let (address, file) = (line.front.address, line.front.config_file());
    let descriptors = line.front.descriptors();
    let old = sessions(stage.lab(), address, 20);
    let good = fs::read_to_string(&file).expect("what the harness wrote");
    fs::write(&file, "listen.adress = 1").expect("our own file");
    line.signal(Signal::USR2);
    let refused = line.logged("no restart: this process goes on");
    assert!(refused["error"].as_str().is_some_and(|error| error.contains("78")), "{refused}");
    let status = line.status();
    assert_eq!((&status["pid"], &status["phase"]), (&line.pid().into(), &"running".into()));
    assert_eq!(status["sessions"], 20);
    assert_served(&stage, address);
    line.alone();
    fs::write(&file, good).expect("our own file");
    line.restart();
    assert_served(&stage, address);
    assert_closed(old, 20);
    line.alone();
    line.has_open(descriptors);
    line.front.assert_no_rst();
}

/// Makes the configuration one that whoever reads it waits for; gives what was in it.
fn hold_config(line: &Line<'_>) -> String {
    let file = line.front.config_file();
    let text = fs::read_to_string(&file).expect("what the harness wrote");
    fs::remove_file(&file).expect("our own file");
    mknodat(CWD, &file, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a pipe with a name");
    text
}

/// What can be read only once is not asked for by a second process: it would run on the defaults.
#[test]
fn no_restart_with_a_configuration_from_a_pipe() {
    let mut tidegate = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    let pipes = tidegate.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut tidegate = pipes.args(["run", "--config", "/dev/stdin"]).spawn().expect("the binary that was just built");
    let config = "listen.address = '127.0.0.1:0'\nadmin.address = 'off'\ndrain = { delay = '0s', window = '0s' }";
    tidegate.stdin.take().expect("a pipe").write_all(config.as_bytes()).expect("it reads");
    let log = BufReader::new(tidegate.stdout.take().expect("a pipe")).lines();
    let (said, heard) = mpsc::channel();
    let reading = thread::spawn(move || log.map_while(Result::ok).all(|line| said.send(line).is_ok()));
    let logged = |text: &str| std::iter::from_fn(|| heard.recv_timeout(DEADLINE).ok()).any(|line| line.contains(text));
    let is_ready = logged("listening");
    let signal = |signal| kill_process(raw(tidegate.id()), signal).expect("our own child");
    signal(Signal::USR2);
    let is_refused = logged("SIGUSR2: the configuration came from a pipe");
    signal(Signal::TERM);
    let status = tidegate.wait().expect("our own child");
    let _ = reading.join();
    assert!(is_ready && is_refused && status.success(), "{is_ready} {is_refused} {status}");
}

/// Who asks again while a restart is under way has asked for nothing.
#[test]
fn one_restart_at_a_time() {
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let mut line = Line::start(&stage, DRAIN, backend.address);
    let address = line.front.address;
    let old = sessions(stage.lab(), address, 1);
    let config = hold_config(&line);
    line.signal(Signal::USR2);
    line.logged("restarting: a new process is started");
    line.signal(Signal::USR2);
    line.logged("SIGUSR2: a restart is under way already; nothing is done");
    assert_served(&stage, address);
    fs::write(line.front.config_file(), config).expect("somebody reads it");
    line.taken_over();
    assert_closed(old, 1);
    line.alone();
    assert_eq!(line.count("restarting: a new process is started"), 1);
    line.front.assert_no_rst();
}

/// A process that is to end does not begin anew, nor does it leave one behind that was just beginning.
#[test]
fn a_drain_gives_up_the_restart() {
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let line = Line::start(&stage, DRAIN, backend.address);
    let old = sessions(stage.lab(), line.front.address, 1);
    hold_config(&line);
    line.signal(Signal::USR2);
    line.logged("restarting: a new process is started");
    assert_eq!(line.front.group().len(), 2);
    line.signal(Signal::TERM);
    line.logged("a drain has begun: the restart is given up");
    line.alone();
    line.signal(Signal::USR2);
    line.logged("SIGUSR2: a drain has begun; nothing is done");
    line.signal(Signal::TERM);
    assert_closed(old, 1);
    assert_eq!(line.front.wait_exit(DEADLINE).code(), Some(0));
    line.front.assert_no_rst();
}

/// With another address in the configuration the new process listens there, and the old one closes its own in order. Of the admin
/// listener likewise.
#[test]
fn a_successor_may_listen_elsewhere() {
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let mut line = Line::start(&stage, DRAIN, backend.address);
    let address = line.front.address;
    let free = stage.lab().place(Side::Proxy).run(|| TcpListener::bind((address.ip(), 0)).and_then(|l| l.local_addr()));
    let other = free.expect("port 0 is free");
    let file = line.front.config_file();
    let config = fs::read_to_string(&file).expect("what the harness wrote");
    let mut config: toml::Table = config.parse().expect("TOML");
    let mut set = |section: &str, value: String| {
        config[section].as_table_mut().expect("a section").insert("address".to_owned(), value.into());
    };
    set("listen", other.to_string());
    set("admin", "off".to_owned());
    fs::write(&file, config.to_string()).expect("our own file");
    let old = sessions(stage.lab(), address, 20);
    line.restart();
    assert_served(&stage, other);
    assert_closed(old, 20);
    line.alone();
    line.front.assert_no_rst();
    let late = stage.clients(async || visit(address, Errand::Get).await.outcome);
    assert_eq!(late, Outcome::Unconnected(std::io::ErrorKind::ConnectionRefused));
}

/// What a service manager is told, and by whom: it believes nobody but the process that it knows as the main one.
#[test]
fn the_service_manager_knows_who_serves() {
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let folder = tempfile::tempdir().expect("a folder for a socket");
    let path = folder.path().join("notify").to_str().expect("UTF-8").to_owned();
    let name = format!("tidegate-test-{}", std::process::id());
    let places = [
        (path.clone(), UnixAddress::from_pathname(&path).expect("a short path")),
        (format!("@{name}"), UnixAddress::from_abstract_name(&name).expect("a short name")),
    ];
    for (place, address) in places {
        let manager = stage.lab().place(Side::Proxy).run(|| UnixDatagram::bind_addr(&address)).expect("a new name");
        manager.set_read_timeout(Some(DEADLINE)).expect("a socket");
        // What is told again and again: `notify::`.
        let told = || loop {
            let mut bytes = [0; 256];
            let count = manager.recv(&mut bytes).expect("a word in time");
            let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
            if ["READY=", "STOPPING="].iter().any(|word| text.starts_with(word)) {
                break text;
            }
        };
        let surroundings = Surroundings { notify: Some(place), ..Surroundings::default() };
        let mut line = Line::start_in(&stage, surroundings, DRAIN, backend.address);
        let serves = |pid: u32| format!("READY=1\nMAINPID={pid}\n");
        assert_eq!(told(), serves(line.pid()));
        line.restart();
        // First by the one that is believed, then by the one that is from then on.
        assert_eq!([told(), told()], [serves(line.pid()), serves(line.pid())]);
        line.alone();
        line.signal(Signal::TERM);
        assert!(told().starts_with("STOPPING=1\n"));
        line.logged("SIGTERM");
        line.signal(Signal::TERM);
        line.left(&[]);
    }
}

/// How many clients of a [`Stream`] there are at most: on a machine that is slow for a while more than it can serve would still
/// be waiting when the drain has no time left.
const AT_ONCE: usize = 16;

/// Clients that come one after the other, 200 in a second or as many as are served, until it is dropped.
struct Stream {
    outcomes: Board<BTreeMap<Outcome, usize>>,
    stopped: Board<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Stream {
    fn start(lab: &Lab, address: SocketAddr) -> Self {
        let (outcomes, stopped) = (Board::new(BTreeMap::new()), Board::new(false));
        let run = {
            let (outcomes, stopped) = (outcomes.clone(), stopped.clone());
            async move || {
                let mut ticks = interval(Duration::from_millis(5));
                ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
                let mut visits = FuturesUnordered::new();
                loop {
                    let is_open = !stopped.read(|stopped| *stopped);
                    tokio::select! {
                        _ = ticks.tick(), if is_open && visits.len() < AT_ONCE => {
                            let errand = if visits.len() % 2 == 0 { Errand::Echo } else { Errand::Get };
                            visits.push(visit(address, errand));
                        }
                        Some(visit) = visits.next() => outcomes.change(|all| *all.entry(visit.outcome).or_default() += 1),
                        else => return,
                    }
                }
            }
        };
        let thread = Some(lab.place(Side::Client).spawn("stream", move || block(run())));
        Self { outcomes, stopped, thread }
    }

    /// Waits for so many more.
    #[track_caller]
    fn wait(&self, more: usize) {
        let sum = |all: &BTreeMap<Outcome, usize>| all.values().sum::<usize>();
        let until = self.outcomes.read(sum) + more;
        let reached = self.outcomes.wait(LIMIT, |all| (sum(all) >= until).then_some(()));
        assert!(reached.is_some(), "{until} clients never came: {:?}", self.outcomes);
    }

    fn stop(&mut self) {
        self.stopped.change(|stopped| *stopped = true);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(!matches!(ended, Some(Err(_))) || thread::panicking(), "the stream panicked");
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Restarts in a row while clients come: each of them connects and gets its answer, and whoever has a session when its process is
/// replaced gets a Close.
#[test]
fn restarts_in_a_row_lose_nobody() {
    let restarts = if is_strict() { 10 } else { 3 };
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let mut line = Line::start(&stage, DRAIN, backend.address);
    let address = line.front.address;
    let mut stream = Stream::start(stage.lab(), address);
    let mut old = Vec::new();
    for _ in 0..restarts {
        stream.wait(100);
        old.push(sessions(stage.lab(), address, 20));
        line.restart();
    }
    stream.wait(100);
    stream.stop();
    let outcomes = stream.outcomes.read(Clone::clone);
    println!("{restarts} restarts under {} connects: {outcomes:?}", outcomes.values().sum::<usize>());
    let is_orderly = |outcome: &Outcome| matches!(outcome, Outcome::Served | Outcome::Closed(1001));
    let others: BTreeMap<_, _> = outcomes.iter().filter(|(outcome, _)| !is_orderly(outcome)).collect();
    assert_eq!(others, BTreeMap::new());
    for sessions in old {
        assert_closed(sessions, 20);
    }
    line.alone();
    assert_eq!((line.count("drained"), line.pids.len()), (restarts, restarts + 1));
    let counters = line.front.counters();
    if counters.is_exact() {
        assert_eq!(
            ["ListenOverflows", "ListenDrops", "TCPAbortOnClose"].map(|name| counters.get(name)),
            [0; 3],
            "{counters:?}"
        );
    }
    line.front.assert_no_rst();
}
