//! A network of its own for each test: client, proxy and backend in three namespaces, so that "nobody sent a RST" is a fact
//! about one kernel table and not about everything that runs on the host.
//!
//! ```text
//! client 198.18.x.1 ---- 198.18.x.2 proxy 198.18.x.5 ---- 198.18.x.6 backend
//! ```
//!
//! Where namespaces are not permitted, all three sides are on loopback, and each assertion on counters says that it is left
//! out. `TIDEGATE_LAB=namespaces` makes that a failure, `TIDEGATE_LAB=loopback` asks for it.

use super::{block, left_out, left_out_once};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fmt,
    fs::{self, File},
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::Sub,
    os::fd::AsFd,
    panic::resume_unwind,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
};

const NAMESPACES: &str = "/run/netns";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Client,
    Proxy,
    Backend,
}

impl Side {
    pub const ALL: [Self; 3] = [Self::Client, Self::Proxy, Self::Backend];

    fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Proxy => "proxy",
            Self::Backend => "backend",
        }
    }
}

/// Three joined namespaces, removed on drop.
#[derive(Debug)]
pub struct Lab {
    number: u32,
    /// None: all three are where the test runs.
    namespaces: Option<[Place; 3]>,
}

impl Lab {
    /// A lab with namespaces if they can be had, else on loopback.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        static POSSIBLE: OnceLock<Result<(), String>> = OnceLock::new();

        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let possible = POSSIBLE.get_or_init(probe);
        let lab = Self { number, namespaces: possible.is_ok().then(|| Side::ALL.map(|s| Place::named(number, s))) };
        match possible {
            // The probe succeeded, so a failure here is none to fall back from.
            Ok(()) => lab.build().expect("a lab like the one that was probed"),
            Err(why) => left_out_once("namespaces, and with them exact counts of RST", why),
        }
        lab
    }

    /// Whether a counter counts what happened in this lab and nothing else.
    pub fn counts_are_exact(&self) -> bool {
        self.namespaces.is_some()
    }

    /// The address of `on` that `from` can reach.
    pub fn address(&self, on: Side, from: Side) -> IpAddr {
        // Eight addresses a lab, in two networks of four. Only /run/netns needs names that are unique on the host.
        let base = (self.number + std::process::id() * 64) % 0x4000 * 8;
        let host = match (on, from) {
            (Side::Client, _) => 1,
            (Side::Proxy, Side::Client | Side::Proxy) => 2,
            (Side::Proxy, Side::Backend) => 5,
            (Side::Backend, _) => 6,
        };
        let network = match self.namespaces {
            Some(_) => u32::from(Ipv4Addr::new(198, 18, 0, 0)),
            None => u32::from(Ipv4Addr::new(127, 18, 0, 0)),
        };
        Ipv4Addr::from(network + base + host).into()
    }

    /// Where a side's threads live.
    pub fn place(&self, side: Side) -> Place {
        match &self.namespaces {
            Some(places) => places[side as usize].clone(),
            None => Place(None),
        }
    }

    /// Runs `script` on a thread and a runtime of its own in a side's namespace. Its panic comes out of `join`.
    pub fn spawn_in<T: Send + 'static>(
        &self,
        side: Side,
        script: impl AsyncFnOnce() -> T + Send + 'static,
    ) -> Running<T> {
        Running(self.place(side).spawn(side.name(), || block(script())))
    }

    /// A program that will run in a side's namespace, with the pid that `spawn` returns: `ip netns exec` does not fork.
    pub fn command_in(&self, side: Side, program: impl AsRef<OsStr>) -> Command {
        match self.place(side).0 {
            Some(name) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", &name]).arg(program);
                command
            }
            None => Command::new(program),
        }
    }

    /// As [`Lab::command_in`], and all but the network is as it is here: also what is mounted on /sys.
    pub fn bare_command_in(&self, side: Side, program: impl AsRef<OsStr>) -> Command {
        match self.place(side).file() {
            Some(file) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={}", file.display())).arg("--").arg(program);
                command
            }
            None => Command::new(program),
        }
    }

    /// Sets a sysctl of a side's own network, as "core/somaxconn"; false where that would be the host's.
    #[must_use]
    pub fn set(&self, side: Side, name: &str, value: &str) -> bool {
        if self.namespaces.is_none() {
            left_out(name, "no namespaces");
            return false;
        }
        let set = self.place(side).run(|| fs::write(format!("/proc/sys/net/{name}"), value));
        set.unwrap_or_else(|e| panic!("{name} = {value}: {e}"));
        true
    }

    /// One more address of the proxy, which the backend can answer to; None where there are no namespaces.
    pub fn second_address(&self) -> Option<IpAddr> {
        let Some([_, proxy, _]) = &self.namespaces else {
            left_out("a second address", "no namespaces");
            return None;
        };
        // TEST-NET-1: of no lab's network, so that the backend answers by its default route.
        let address = Ipv4Addr::new(192, 0, 2, 1);
        proxy.ip(&format!("address add {address}/32 dev backend0")).expect("ip address");
        Some(address.into())
    }

    pub fn counters(&self, side: Side) -> Counters {
        let values = self.place(side).run(Counters::read).expect("procfs");
        // Last, so that there is no RST whose cause is not counted.
        let again = Side::ALL.map(|side| self.place(side).run(sent_again).expect("procfs"));
        Counters { exact: self.counts_are_exact(), values, again: again.iter().sum() }
    }

    /// TCP segments that a side's kernel has received; None where that would be the whole host's.
    pub fn segments_in(&self, side: Side) -> Option<i64> {
        let count = || Ok::<_, io::Error>(count_of(&tcp_counters()?, "InSegs"));
        self.counts_are_exact().then(|| self.place(side).run(count).expect("procfs"))
    }

    /// The TCP sockets of a side, as the kernel lists them.
    pub fn sockets(&self, side: Side) -> Vec<Socket> {
        self.place(side).run(Socket::list).expect("procfs")
    }

    /// From here on no packet passes between this side and the proxy, and nobody is told; false where that is not possible.
    #[must_use]
    pub fn cut(&self, side: Side) -> bool {
        self.neighbours(side, "replace", " lladdr 02:00:00:00:00:01 nud permanent")
    }

    /// Undoes [`Lab::cut`].
    pub fn mend(&self, side: Side) {
        self.neighbours(side, "del", "");
    }

    /// Both ends of a link are told of a neighbour that does not exist. The carrier stays, as it does in the field.
    fn neighbours(&self, side: Side, verb: &str, what: &str) -> bool {
        let Some([client, proxy, backend]) = &self.namespaces else {
            left_out("the cut of a link", "no namespaces");
            return false;
        };
        let (far, far_device, near_device) = match side {
            Side::Client => (client, "proxy0", "client0"),
            Side::Backend => (backend, "proxy0", "backend0"),
            Side::Proxy => panic!("the proxy has two links: cut the one or the other"),
        };
        let far_sees = self.address(Side::Proxy, side);
        let near_sees = self.address(side, Side::Proxy);
        far.ip(&format!("neigh {verb} {far_sees} dev {far_device}{what}")).expect("ip neigh");
        proxy.ip(&format!("neigh {verb} {near_sees} dev {near_device}{what}")).expect("ip neigh");
        true
    }

    fn build(&self) -> io::Result<()> {
        // `ip netns add` mounts; one at a time is one thing less to think about.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);

        let [client, proxy, backend] = self.namespaces.as_ref().expect("only called with them");
        let (c, p, b) = (client.name(), proxy.name(), backend.name());
        // A device is named after the side that it leads to.
        ip(&format!(
            "netns add {c}\n\
             netns add {p}\n\
             netns add {b}\n\
             link add proxy0 netns {c} type veth peer name client0 netns {p}\n\
             link add proxy0 netns {b} type veth peer name backend0 netns {p}\n"
        ))?;
        let client_address = self.address(Side::Client, Side::Proxy);
        let front = self.address(Side::Proxy, Side::Client);
        let back = self.address(Side::Proxy, Side::Backend);
        let backend_address = self.address(Side::Backend, Side::Proxy);
        for (place, device, address, gateway) in
            [(client, "proxy0", client_address, front), (backend, "proxy0", backend_address, back)]
        {
            // The route past the proxy is for clients that connect to the backend directly, to compare.
            place.ip(&format!(
                "link set lo up\n\
                 address add {address}/30 dev {device}\n\
                 link set {device} up\n\
                 route add default via {gateway}\n"
            ))?;
        }
        proxy.ip(&format!(
            "link set lo up\n\
             address add {front}/30 dev client0\n\
             address add {back}/30 dev backend0\n\
             link set client0 up\n\
             link set backend0 up\n"
        ))?;
        for place in [client, proxy, backend] {
            place.run(|| {
                // A tail loss probe is answered by a duplicate ACK or, at a socket that is gone, by a RST: nobody's fault.
                fs::write("/proc/sys/net/ipv4/tcp_early_retrans", "0")?;
                fs::write("/proc/sys/net/core/somaxconn", "65535")?;
                fs::write("/proc/sys/net/ipv4/ip_forward", "1")
            })?;
            place.keep_order();
        }
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for place in self.namespaces.iter().flatten() {
            // Perhaps the panic that got us here left it half made: then there is nothing to delete.
            let _ = ip(&format!("netns del {}\n", place.name()));
        }
    }
}

/// Whether this process may make namespaces; the reason if not.
fn probe() -> Result<(), String> {
    let wish = std::env::var("TIDEGATE_LAB").unwrap_or_default();
    if wish == "loopback" {
        return Err("TIDEGATE_LAB=loopback".to_owned());
    }
    sweep();
    let lab = Lab { number: u32::MAX / 128, namespaces: Some(Side::ALL.map(|side| Place::named(u32::MAX, side))) };
    let built = lab.build().map_err(|e| format!("no network namespaces here: {e}"));
    if let Err(why) = &built {
        assert!(wish != "namespaces", "TIDEGATE_LAB=namespaces, but {why}");
    }
    built
}

/// Removes what a killed test run left behind: nobody else knows its names.
fn sweep() {
    for entry in fs::read_dir(NAMESPACES).into_iter().flatten().flatten() {
        let name = entry.file_name().into_string().unwrap_or_default();
        let pid = name.strip_prefix("tidegate-").and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| !PathBuf::from(format!("/proc/{pid}")).exists()) {
            let _ = ip(&format!("netns del {name}\n"));
        }
    }
}

/// Runs a batch of `ip` commands where we are.
fn ip(batch: &str) -> io::Result<()> {
    Place(None).ip(batch)
}

/// A namespace by name, or the one that the process is in.
#[derive(Clone, Debug)]
pub struct Place(Option<String>);

impl Place {
    fn named(number: u32, side: Side) -> Self {
        let pid = std::process::id();
        Self(Some(format!("tidegate-{pid}-{number}-{}", side.name())))
    }

    fn name(&self) -> &str {
        self.0.as_deref().expect("a named place")
    }

    /// The file that keeps the namespace alive; None where there is no namespace.
    pub fn file(&self) -> Option<PathBuf> {
        self.0.as_ref().map(|name| PathBuf::from(NAMESPACES).join(name))
    }

    /// Moves the calling thread, which must be one of ours: libtest's threads serve other tests after this one. Sockets stay where they
    /// were made, so that one thread can have clients in several labs.
    pub fn enter(&self) -> io::Result<()> {
        let Some(file) = self.file() else {
            return Ok(());
        };
        let namespace = File::open(file)?;
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        Ok(())
    }

    /// Runs `work` there and waits for it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let there = || {
            self.enter().expect("the namespace is there until the lab is dropped");
            work()
        };
        // A panic there is to name the test.
        let name = thread::current().name().unwrap_or("test").to_owned();
        let thread = thread::Builder::new().name(name);
        thread::scope(|scope| thread.spawn_scoped(scope, there).expect("a thread").join())
            .unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Runs `work` there meanwhile.
    pub fn spawn<T: Send + 'static>(&self, name: &str, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let place = self.clone();
        // Entered before this returns: the lab may be dropped before the thread gets its first turn.
        let (entered, has_entered) = std::sync::mpsc::channel();
        let there = move || {
            place.enter().expect("the namespace is there until the lab is dropped");
            let _ = entered.send(());
            work()
        };
        let thread = thread::Builder::new().name(name.to_owned()).spawn(there).expect("a thread");
        let _ = has_entered.recv();
        thread
    }

    /// Has one core take what arrives, whichever core sent it. Else a delayed ACK, sent by a timer, may be overtaken by the FIN
    /// that a program sends a millisecond later on another core; an ACK for what is long past then finds no socket any more and
    /// is answered by a RST: one in some 2,000 connections of a busy machine, and nobody's fault.
    fn keep_order(&self) {
        // Only `ip netns exec` sees the sysfs of the namespace. A kernel without RPS has no such file.
        let script = "for cpus in /sys/class/net/*/queues/rx-*/rps_cpus; do echo 1 > $cpus; done";
        let mut command = Command::new("ip");
        command.args(["netns", "exec", self.name(), "sh", "-c", script]).stderr(Stdio::null());
        let _ = command.status();
    }

    fn ip(&self, batch: &str) -> io::Result<()> {
        let mut command = Command::new("ip");
        if let Some(name) = &self.0 {
            command.args(["-n", name]);
        }
        let mut child =
            command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let mut stdin = child.stdin.take().expect("it was asked for");
        stdin.write_all(batch.as_bytes())?;
        drop(stdin);
        let output = child.wait_with_output()?;
        if output.status.success() {
            return Ok(());
        }
        let message = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
        Err(io::Error::other(message))
    }
}

/// A script on its thread.
#[derive(Debug)]
pub struct Running<T>(JoinHandle<T>);

impl<T> Running<T> {
    /// Its result; its panic is passed on.
    pub fn join(self) -> T {
        self.0.join().unwrap_or_else(|panic| resume_unwind(panic))
    }
}

/// All TCP counters of the calling thread's namespace. `/proc/net` would be that of the main thread.
fn tcp_counters() -> io::Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    for table in ["snmp", "netstat"] {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{table}"))?;
        let mut lines = text.lines();
        while let (Some(names), Some(values)) = (lines.next(), lines.next()) {
            if names.starts_with("Tcp") {
                let named = names.split(' ').zip(values.split(' ')).skip(1);
                all.extend(named.map(|(name, value)| (name.to_owned(), value.to_owned())));
            }
        }
    }
    Ok(all)
}

fn count_of(all: &BTreeMap<String, String>, name: &str) -> i64 {
    let text = all.get(name).unwrap_or_else(|| panic!("this kernel has no {name}"));
    text.parse().expect("counters are numbers")
}

/// Segments that the calling thread's namespace has sent a second time, but for those that open a connection.
fn sent_again() -> io::Result<i64> {
    let all = tcp_counters()?;
    Ok(count_of(&all, "RetransSegs") - count_of(&all, "TCPSynRetrans"))
}

/// The kernel's TCP counters of one namespace that tell of abortive closes and of turned away connections.
#[derive(Clone, PartialEq, Eq)]
pub struct Counters {
    exact: bool,
    values: BTreeMap<&'static str, i64>,
    /// Segments that any side of the lab has sent a second time. Nothing is lost in a lab, but a kernel that gets no processor for
    /// 200 ms repeats its last FIN; what acknowledges the second one finds no socket, and is answered by a RST that no program sees.
    again: i64,
}

impl Counters {
    const NAMES: [&'static str; 10] = [
        "OutRsts",
        "EstabResets",
        "TCPAbortOnClose",
        "TCPAbortOnData",
        "TCPAbortOnLinger",
        "TCPAbortOnTimeout",
        "TCPAbortOnMemory",
        "TCPAbortFailed",
        "ListenOverflows",
        "ListenDrops",
    ];

    /// Those of the calling thread's namespace.
    fn read() -> io::Result<BTreeMap<&'static str, i64>> {
        let all = tcp_counters()?;
        Ok(Self::NAMES.map(|name| (name, count_of(&all, name))).into())
    }

    pub fn get(&self, name: &str) -> i64 {
        *self.values.get(name).unwrap_or_else(|| panic!("{name} is none of {:?}", Self::NAMES))
    }

    /// So many RSTs may be answers to what was sent twice.
    pub fn excused(&self) -> i64 {
        self.again
    }

    /// Whether this is the count of one lab, or that of the whole host.
    pub fn is_exact(&self) -> bool {
        self.exact
    }

    /// This namespace neither sent a RST nor received one, aborted nothing and turned nobody away.
    #[track_caller]
    pub fn assert_no_rst(&self) {
        self.assert_zero(&Self::NAMES);
    }

    /// As [`Counters::assert_no_rst`], where a peer resets on purpose: a RST received counts as an `EstabResets`, too.
    #[track_caller]
    pub fn assert_sent_no_rst(&self) {
        self.assert_zero(&Self::NAMES.map(|name| if name == "EstabResets" { "OutRsts" } else { name }));
    }

    /// As [`Counters::assert_sent_no_rst`], where the accept queue was too short.
    #[track_caller]
    pub fn assert_aborted_nothing(&self) {
        let is_abort = |name: &&str| !name.starts_with("Listen") && *name != "EstabResets";
        self.assert_zero(&Self::NAMES.into_iter().filter(is_abort).collect::<Vec<_>>());
    }

    #[track_caller]
    fn assert_zero(&self, names: &[&str]) {
        if !self.exact {
            left_out("that no RST was sent", "the counters are the whole host's");
            return;
        }
        let bound = |name: &str| if name == "OutRsts" { self.excused() } else { 0 };
        let moved = names.iter().any(|name| self.get(name) > bound(name));
        assert!(!moved, "an abortive close or a connection turned away: {self:?}");
    }
}

/// Only what is not zero.
impl fmt::Debug for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let again = ("sent again by any side", self.again);
        let all = self.values.iter().map(|(name, value)| (*name, *value)).chain([again]);
        f.debug_map().entries(all.filter(|(_, value)| *value != 0)).finish()
    }
}

impl Sub for &Counters {
    type Output = Counters;

    fn sub(self, earlier: Self) -> Counters {
        let values = self.values.iter().map(|(name, value)| (*name, value - earlier.get(name)));
        Counters { exact: self.exact, values: values.collect(), again: self.again - earlier.again }
    }
}

/// A line of `/proc/net/tcp`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub state: &'static str,
    /// Bytes written and not yet acked.
    pub unacked: u64,
    /// Bytes received and not yet read; of a listening socket, connections that wait to be accepted.
    pub unread: u64,
    /// 0: no process holds it any more.
    pub inode: u64,
}

impl Socket {
    /// Those of the calling thread's namespace.
    pub fn list() -> io::Result<Vec<Self>> {
        let v4 = fs::read_to_string("/proc/thread-self/net/tcp")?;
        // Absent where IPv6 is.
        let v6 = fs::read_to_string("/proc/thread-self/net/tcp6").unwrap_or_default();
        let lines = v4.lines().skip(1).chain(v6.lines().skip(1));
        Ok(lines.map(|line| Self::parse(line).expect("the kernel's format")).collect())
    }

    fn parse(line: &str) -> Option<Self> {
        const STATES: [&str; 12] = [
            "ESTABLISHED",
            "SYN_SENT",
            "SYN_RECV",
            "FIN_WAIT1",
            "FIN_WAIT2",
            "TIME_WAIT",
            "CLOSE",
            "CLOSE_WAIT",
            "LAST_ACK",
            "LISTEN",
            "CLOSING",
            "NEW_SYN_RECV",
        ];
        let fields: Vec<&str> = line.split_whitespace().collect();
        let state = usize::from_str_radix(fields.get(3)?, 16).ok()?;
        let (unacked, unread) = fields.get(4)?.split_once(':')?;
        Some(Self {
            local: address(fields.get(1)?)?,
            remote: address(fields.get(2)?)?,
            state: STATES.get(state.checked_sub(1)?)?,
            unacked: u64::from_str_radix(unacked, 16).ok()?,
            unread: u64::from_str_radix(unread, 16).ok()?,
            inode: fields.get(9)?.parse().ok()?,
        })
    }
}

/// `0100007F:1F90`: words of 32 bits in the byte order of the host.
fn address(hex: &str) -> Option<SocketAddr> {
    let (words, port) = hex.split_once(':')?;
    let mut bytes = Vec::new();
    for word in words.as_bytes().chunks(8) {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        _ => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical(),
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}
