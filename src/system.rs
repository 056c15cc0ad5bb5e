//! What this host, container or pod is and counts: sysctls, limits, memory, CPU, the counters of its network namespace.
//!
//! Read from procfs and cgroupfs, below a root that tests replace. Nothing is changed here, and nothing judged: `doctor/`
//! does that. A file that is missing or unreadable is normal (kernels, containers and namespaces each show a part) and gives
//! `None`.

mod cgroup;

use std::{
    fs, io,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use rustix::{
    param::{clock_ticks_per_second, page_size},
    process::{Resource, Rlimit, getrlimit},
};
use serde::Serialize;

pub use self::cgroup::{Bound, Cpu, Memory, MemoryWatch};

/// A file system to read from.
#[derive(Debug, Clone)]
pub struct System {
    root: PathBuf,
}

impl Default for System {
    /// The one that this process lives in.
    fn default() -> Self {
        Self::new("/")
    }
}

/// Soft and hard limit of a resource; `None` is unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Limit {
    /// What is in force. The process may raise it up to the hard one.
    pub soft: Option<u64>,
    /// The most that the process can have without a privilege.
    pub hard: Option<u64>,
}

impl From<Rlimit> for Limit {
    fn from(limit: Rlimit) -> Self {
        Self { soft: limit.current, hard: limit.maximum }
    }
}

/// Where a process may find itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Surroundings {
    /// A container of a Kubernetes pod.
    Pod,
    /// A container of something else.
    Container,
    /// Neither, as far as can be seen.
    Host,
}

/// Address space of this process, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessMemory {
    /// What `RLIMIT_AS` limits.
    pub virtual_size: u64,
    /// Of that, what is in memory.
    pub resident: u64,
}

/// What this process has used, and since when it is there.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Process {
    /// Of processors, all its threads together, also those that have ended.
    pub cpu_seconds: f64,
    /// When it was started, since 1970.
    pub started_seconds: f64,
    /// That it has now.
    pub threads: u64,
}

/// Memory of the whole host, in bytes, whatever part of it this process may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct HostMemory {
    /// All of it, without what the kernel took for itself.
    pub total: u64,
    /// What can be had without swapping, as the kernel estimates.
    pub available: u64,
}

/// Open files of the whole host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct HostFiles {
    /// That are open.
    pub open: u64,
    /// That may be. Beyond: `ENFILE`.
    pub max: u64,
}

/// The host's connection tracking table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Conntrack {
    /// Connections of this network namespace in it.
    pub count: u64,
    /// Its size. One for all namespaces.
    pub max: u64,
}

/// TCP sockets of the network namespace, IPv4 and IPv6, as far as sockstat tells them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpSockets {
    /// Closed by their process, and not yet gone.
    pub orphans: u64,
    /// In `TIME_WAIT`.
    pub time_wait: u64,
    /// Bytes in the buffers of TCP sockets. Of the whole host.
    pub memory: u64,
}

/// The counters of TCP of one network namespace, at one moment. Whatever runs in the namespace is in them, a backend too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetCounters {
    text: String,
}

impl System {
    /// Below `root`: `/`, but for tests.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The listen backlog's upper bound: `listen()` clamps to it without a word (`__sys_listen` in `net/socket.c`). Each network
    /// namespace has its own, and does not inherit it.
    pub fn somaxconn(&self) -> Option<u64> {
        self.sysctl("net.core.somaxconn")?.parse().ok()
    }

    /// Connections that may be half open, per listening socket, before SYN cookies are sent or SYNs dropped
    /// (`tcp_conn_request` in `net/ipv4/tcp_input.c`). Of the network namespace.
    pub fn tcp_max_syn_backlog(&self) -> Option<u64> {
        self.sysctl("net.ipv4.tcp_max_syn_backlog")?.parse().ok()
    }

    /// Packets that may wait for a CPU before they are dropped (`enqueue_to_backlog` in `net/core/dev.c`). One for the whole
    /// host, and shown only in its first network namespace.
    pub fn netdev_max_backlog(&self) -> Option<u64> {
        self.sysctl("net.core.netdev_max_backlog")?.parse().ok()
    }

    /// Packets that were dropped since the host's start because of [`Self::netdev_max_backlog`], on all CPUs and of all network
    /// namespaces: the second column of `/proc/net/softnet_stat` (`softnet_seq_show` in `net/core/net-procfs.c`).
    pub fn netdev_drops(&self) -> Option<u64> {
        let text = self.read("proc/net/softnet_stat")?;
        text.lines().map(|line| u64::from_str_radix(line.split_ascii_whitespace().nth(1)?, 16).ok()).sum()
    }

    /// Whether a client that finds the accept queue full is reset, instead of left to try again (`tcp_check_req` in
    /// `net/ipv4/tcp_minisocks.c`).
    pub fn tcp_abort_on_overflow(&self) -> Option<bool> {
        self.flag("net.ipv4.tcp_abort_on_overflow")
    }

    /// Whether SYN cookies are sent when too many connections are half open: 0 never, 1 then, 2 always (`tcp_conn_request` in
    /// `net/ipv4/tcp_input.c`). Absent from a kernel that was built without them.
    pub fn tcp_syncookies(&self) -> Option<u64> {
        self.sysctl("net.ipv4.tcp_syncookies")?.parse().ok()
    }

    /// Ports that `connect()` chooses from (`inet_hash_connect` in `net/ipv4/inet_hashtables.c`).
    pub fn ip_local_port_range(&self) -> Option<RangeInclusive<u16>> {
        let text = self.sysctl("net.ipv4.ip_local_port_range")?;
        let (first, last) = text.split_once(char::is_whitespace)?;
        Some(first.parse().ok()?..=last.trim_start().parse().ok()?)
    }

    /// Ports in that range that are never chosen: "8080,9000-9010" (`proc_do_large_bitmap` in `kernel/sysctl.c`).
    pub fn ip_local_reserved_ports(&self) -> Option<Vec<RangeInclusive<u16>>> {
        let text = self.sysctl("net.ipv4.ip_local_reserved_ports")?;
        let ranges = text.split(',').filter(|range| !range.is_empty()).map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            Some(first.parse().ok()?..=last.parse().ok()?)
        });
        ranges.collect()
    }

    /// Ports of the range that are not reserved: connections from one address to one address and port.
    pub fn ephemeral_ports(&self) -> Option<u64> {
        Some(usable_ports(&self.ip_local_port_range()?, &self.ip_local_reserved_ports().unwrap_or_default()))
    }

    /// The connection tracking table, where it exists and is shown (`net/netfilter/nf_conntrack_standalone.c`).
    pub fn conntrack(&self) -> Option<Conntrack> {
        Some(Conntrack {
            count: self.sysctl("net.netfilter.nf_conntrack_count")?.parse().ok()?,
            max: self.sysctl("net.netfilter.nf_conntrack_max")?.parse().ok()?,
        })
    }

    /// What `RLIMIT_NOFILE` itself can be raised to (`do_prlimit` in `kernel/sys.c`).
    pub fn nr_open(&self) -> Option<u64> {
        self.sysctl("fs.nr_open")?.parse().ok()
    }

    /// `fs.file-nr` (`proc_nr_files` in `fs/file_table.c`), the last number of which is `fs.file-max`.
    pub fn host_files(&self) -> Option<HostFiles> {
        let text = self.sysctl("fs.file-nr")?;
        let mut numbers = text.split_ascii_whitespace();
        let open = numbers.next()?.parse().ok()?;
        Some(HostFiles { open, max: numbers.nth(1)?.parse().ok()? })
    }

    /// Descriptors that this process has open now.
    pub fn open_descriptors(&self) -> Option<u64> {
        let folder = self.root.join("proc/self/fd");
        // Since Linux 6.2 the folder's size is their number (`proc_fd_getattr` in fs/proc/fd.c), which spares us the making of
        // an inode for each. Other file systems mean something else by it.
        if self.root == Path::new("/")
            && let Some(count) = fs::metadata(&folder).ok().map(|folder| folder.len()).filter(|len| *len > 0)
        {
            return Some(count);
        }
        // Reading it takes one itself.
        let count = fs::read_dir(folder).ok()?.flatten().count();
        Some(u64::try_from(count).unwrap_or(u64::MAX).saturating_sub(1))
    }

    /// Sizes of this process, from `/proc/self/statm` (`proc_pid_statm` in `fs/proc/array.c`).
    pub fn process_memory(&self) -> Option<ProcessMemory> {
        statm(&self.read("proc/self/statm")?)
    }

    /// From `/proc/self/stat` (`do_task_stat` in `fs/proc/array.c`), and the host's start from `/proc/stat`.
    #[expect(clippy::cast_precision_loss, reason = "ticks and seconds, as floats are what metrics are")]
    pub fn process(&self) -> Option<Process> {
        let text = self.read("proc/self/stat")?;
        // Behind the name, which may have spaces and brackets.
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        // The third field is the first one here.
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        let ticks = clock_ticks_per_second() as f64;
        let host = self.read("proc/stat")?;
        let booted = host.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse::<u64>().ok()?;
        Some(Process {
            cpu_seconds: (field(14)? + field(15)?) as f64 / ticks,
            started_seconds: booted as f64 + field(22)? as f64 / ticks,
            threads: field(20)?,
        })
    }

    /// Sizes of the process that started this one.
    pub fn parent_memory(&self) -> Option<ProcessMemory> {
        statm(&self.read(&format!("proc/{}/statm", rustix::process::getppid()?))?)
    }

    /// From `/proc/meminfo` (`meminfo_proc_show` in `fs/proc/meminfo.c`).
    pub fn host_memory(&self) -> Option<HostMemory> {
        let text = self.read("proc/meminfo")?;
        let bytes = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
            kib.checked_mul(1024)
        };
        Some(HostMemory { total: bytes("MemTotal")?, available: bytes("MemAvailable")? })
    }

    /// From the line "TCP:" of `/proc/net/sockstat` (`sockstat_seq_show` in `net/ipv4/proc.c`).
    pub fn tcp_sockets(&self) -> Option<TcpSockets> {
        let text = self.read("proc/net/sockstat")?;
        let line = text.lines().find_map(|line| line.strip_prefix("TCP: "))?;
        let value = |name: &str| {
            let mut words = line.split_ascii_whitespace().skip_while(|word| *word != name);
            words.nth(1)?.parse::<u64>().ok()
        };
        Some(TcpSockets { orphans: value("orphan")?, time_wait: value("tw")?, memory: pages(value("mem")?) })
    }

    /// From `/proc/net/netstat` and `/proc/net/snmp` (`net/ipv4/proc.c`), those of one of them if only that is there.
    pub fn net_counters(&self) -> Option<NetCounters> {
        let texts = ["proc/net/netstat", "proc/net/snmp"].map(|path| self.read(path));
        texts.iter().any(Option::is_some).then(|| NetCounters { text: texts.into_iter().flatten().collect() })
    }

    /// Whether Kubernetes, or something else that makes containers, left its marks.
    pub fn surroundings(&self) -> Surroundings {
        let cgroup = self.read("proc/self/cgroup").unwrap_or_default();
        // The kubelet writes /etc/hosts for every pod, those with the host's network included.
        let is_managed = self.read("etc/hosts").is_some_and(|hosts| hosts.starts_with("# Kubernetes-managed"));
        if is_managed || cgroup.contains("kubepods") || self.exists("var/run/secrets/kubernetes.io") {
            return Surroundings::Pod;
        }
        let marks = [".dockerenv", "run/.containerenv", "run/systemd/container"];
        let names = ["docker", "containerd", "libpod", "lxc"];
        if marks.iter().any(|mark| self.exists(mark)) || names.iter().any(|name| cgroup.contains(name)) {
            return Surroundings::Container;
        }
        Surroundings::Host
    }

    fn flag(&self, name: &str) -> Option<bool> {
        self.sysctl(name)?.parse::<u64>().ok().map(|value| value != 0)
    }

    /// The value of a sysctl by its dotted name, trimmed.
    fn sysctl(&self, name: &str) -> Option<String> {
        let text = self.read(&format!("proc/sys/{}", name.replace('.', "/")))?;
        Some(text.trim().to_owned())
    }

    fn exists(&self, path: &str) -> bool {
        self.root.join(path).exists()
    }

    fn read(&self, path: &str) -> Option<String> {
        self.try_read(path).ok()
    }

    fn try_read(&self, path: impl AsRef<Path>) -> io::Result<String> {
        fs::read_to_string(self.root.join(path))
    }
}

/// How many ports of `range` are in none of `reserved`, which may overlap.
pub fn usable_ports(range: &RangeInclusive<u16>, reserved: &[RangeInclusive<u16>]) -> u64 {
    let usable = range.clone().filter(|port| !reserved.iter().any(|reserved| reserved.contains(port)));
    u64::try_from(usable.count()).unwrap_or(u64::MAX)
}

/// `RLIMIT_NOFILE` of this process: one more than the highest descriptor.
pub fn descriptor_limit() -> Limit {
    getrlimit(Resource::Nofile).into()
}

/// `RLIMIT_AS` of this process, in bytes.
pub fn address_space_limit() -> Limit {
    getrlimit(Resource::As).into()
}

impl NetCounters {
    /// A counter by the group and the name that it has in the file: `("TcpExt", "ListenOverflows")`, `("Tcp", "OutRsts")`.
    /// `None`: this kernel does not count it.
    pub fn get(&self, group: &str, name: &str) -> Option<u64> {
        let mut lines = self.text.lines().filter_map(|line| line.strip_prefix(group)?.strip_prefix(": "));
        // A line of names, and behind it one of values.
        while let (Some(names), Some(values)) = (lines.next(), lines.next()) {
            let mut both = names.split(' ').zip(values.split(' '));
            if let Some((_, value)) = both.find(|(found, _)| *found == name) {
                return value.parse().ok();
            }
        }
        None
    }
}

fn statm(text: &str) -> Option<ProcessMemory> {
    let mut numbers = text.split_ascii_whitespace().map(|number| number.parse().ok().map(pages));
    Some(ProcessMemory { virtual_size: numbers.next()??, resident: numbers.next()?? })
}

/// So many pages in bytes.
fn pages(count: u64) -> u64 {
    count.saturating_mul(u64::try_from(page_size()).unwrap_or(4096))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A root with these files in it.
    pub(super) fn fixture(files: &[(&str, &str)]) -> (tempfile::TempDir, System) {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let system = System::new(folder.path());
        (folder, system)
    }

    /// Each sysctl in the form that the kernel prints it.
    #[test]
    fn sysctls() {
        let (_folder, system) = fixture(&[
            ("proc/sys/net/core/somaxconn", "4096\n"),
            ("proc/sys/net/core/netdev_max_backlog", "1000\n"),
            ("proc/sys/net/ipv4/tcp_max_syn_backlog", "512\n"),
            ("proc/sys/net/ipv4/tcp_abort_on_overflow", "1\n"),
            ("proc/sys/net/ipv4/tcp_syncookies", "2\n"),
            ("proc/sys/net/ipv4/ip_local_port_range", "32768\t60999\n"),
            ("proc/sys/net/ipv4/ip_local_reserved_ports", "8080,9000-9010\n"),
            ("proc/sys/net/netfilter/nf_conntrack_count", "7\n"),
            ("proc/sys/net/netfilter/nf_conntrack_max", "65536\n"),
            ("proc/sys/fs/nr_open", "1048576\n"),
            ("proc/sys/fs/file-nr", "448\t0\t9223372036854775807\n"),
        ]);
        assert_eq!(system.somaxconn(), Some(4096));
        assert_eq!(system.netdev_max_backlog(), Some(1000));
        assert_eq!(system.tcp_max_syn_backlog(), Some(512));
        assert_eq!(system.tcp_abort_on_overflow(), Some(true));
        assert_eq!(system.tcp_syncookies(), Some(2));
        assert_eq!(system.ip_local_port_range(), Some(32_768..=60_999));
        assert_eq!(system.ip_local_reserved_ports(), Some(vec![8080..=8080, 9000..=9010]));
        assert_eq!(system.ephemeral_ports(), Some(28_232));
        assert_eq!(usable_ports(&(9000..=9020), &[8080..=8080, 8999..=9001, 9001..=9002, 9020..=9030]), 21 - 3 - 1);
        assert_eq!(system.conntrack(), Some(Conntrack { count: 7, max: 65_536 }));
        assert_eq!(system.nr_open(), Some(1_048_576));
        assert_eq!(system.host_files(), Some(HostFiles { open: 448, max: i64::MAX.unsigned_abs() }));
    }

    /// What is not there, or not what it should be, is `None`, and no reserved port is an empty list.
    #[test]
    fn what_is_missing_is_none() {
        let (_folder, system) = fixture(&[
            ("proc/sys/net/core/somaxconn", "many\n"),
            ("proc/sys/net/ipv4/ip_local_port_range", "32768\n"),
            ("proc/sys/net/ipv4/ip_local_reserved_ports", "\n"),
            ("proc/sys/net/netfilter/nf_conntrack_count", "7\n"),
            ("proc/net/sockstat", "sockets: used 13\n"),
            ("proc/self/statm", "1\n"),
        ]);
        assert_eq!(system.somaxconn(), None);
        assert_eq!(system.tcp_syncookies(), None);
        assert_eq!(system.ip_local_port_range(), None);
        assert_eq!(system.ip_local_reserved_ports(), Some(Vec::new()));
        assert_eq!(system.conntrack(), None);
        assert_eq!(system.host_files(), None);
        assert_eq!(system.tcp_sockets(), None);
        assert_eq!(system.process_memory(), None);
        assert_eq!(system.host_memory(), None);
        assert_eq!(system.net_counters(), None);
        assert_eq!(system.netdev_drops(), None);
        assert_eq!(system.open_descriptors(), None);
        assert_eq!(system.surroundings(), Surroundings::Host);
    }

    /// Counters by group and name: "Tcp" is not "`TcpExt`", a value below zero is none, a kernel without a counter has none.
    #[test]
    fn counters() {
        let (_folder, system) = fixture(&[
            (
                "proc/net/netstat",
                "TcpExt: SyncookiesSent ListenOverflows ListenDrops\nTcpExt: 0 12 13\nIpExt: InOctets\nIpExt: 5\n",
            ),
            ("proc/net/snmp", "Ip: Forwarding\nIp: 1\nTcp: MaxConn OutRsts ListenDrops\nTcp: -1 3 99\n"),
        ]);
        let counters = system.net_counters().unwrap();
        assert_eq!(counters.get("TcpExt", "ListenOverflows"), Some(12));
        assert_eq!(counters.get("TcpExt", "ListenDrops"), Some(13));
        assert_eq!(counters.get("TcpExt", "OutRsts"), None);
        assert_eq!(counters.get("Tcp", "OutRsts"), Some(3));
        assert_eq!(counters.get("Tcp", "MaxConn"), None);
        assert_eq!(counters.get("IpExt", "InOctets"), Some(5));
        assert_eq!(counters.get("Ext", "ListenDrops"), None);

        let (_folder, only_snmp) = fixture(&[("proc/net/snmp", "Tcp: OutRsts\nTcp: 3\n")]);
        assert_eq!(only_snmp.net_counters().unwrap().get("Tcp", "OutRsts"), Some(3));
    }

    /// A name may have brackets and spaces; and our own is told.
    #[test]
    fn processes() {
        let (_folder, system) = fixture(&[
            ("proc/self/stat", "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 9 0 1000 11 12\n"),
            ("proc/stat", "cpu 1 2\nbtime 1700000000\nprocesses 5\n"),
        ]);
        let ticks = f64::from(u32::try_from(clock_ticks_per_second()).unwrap());
        let expected =
            Process { cpu_seconds: 200.0 / ticks, started_seconds: 1_700_000_000.0 + 1000.0 / ticks, threads: 9 };
        assert_eq!(system.process(), Some(expected));
        assert!(System::default().process().is_some_and(|own| own.threads > 0 && own.started_seconds > 1e9));
    }

    #[test]
    fn sizes_and_sockets() {
        let page = u64::try_from(page_size()).unwrap();
        let (_folder, system) = fixture(&[
            ("proc/self/statm", "1000 250 100 10 0 500 0\n"),
            ("proc/meminfo", "MemTotal:       4096 kB\nMemFree: 1 kB\nMemAvailable:   1024 kB\n"),
            ("proc/net/sockstat", "sockets: used 13\nTCP: inuse 1 orphan 4 tw 9 alloc 3 mem 287\nUDP: inuse 0 mem 5\n"),
            ("proc/net/softnet_stat", "02d0e7f0 00000a18 00000012\n017dda42 00000002 00000000\n"),
            ("proc/self/fd/0", ""),
            ("proc/self/fd/1", ""),
            ("proc/self/fd/2", ""),
        ]);
        assert_eq!(system.process_memory(), Some(ProcessMemory { virtual_size: 1000 * page, resident: 250 * page }));
        assert_eq!(system.host_memory(), Some(HostMemory { total: 4 << 20, available: 1 << 20 }));
        assert_eq!(system.tcp_sockets(), Some(TcpSockets { orphans: 4, time_wait: 9, memory: 287 * page }));
        assert_eq!(system.netdev_drops(), Some(0xa18 + 2));
        assert_eq!(system.open_descriptors(), Some(2), "one of them is the reading itself");
    }

    #[test]
    fn marks_of_containers() {
        for (path, text, expected) in [
            ("etc/hosts", "127.0.0.1 localhost\n", Surroundings::Host),
            ("etc/hosts", "# Kubernetes-managed hosts file.\n127.0.0.1 localhost\n", Surroundings::Pod),
            ("etc/hosts", "# Kubernetes-managed hosts file (host network).\n", Surroundings::Pod),
            ("proc/self/cgroup", "0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-2.scope\n", Surroundings::Pod),
            ("proc/self/cgroup", "4:memory:/docker/0a1b\n", Surroundings::Container),
            ("proc/self/cgroup", "0::/user.slice/user-0.slice\n", Surroundings::Host),
            (".dockerenv", "", Surroundings::Container),
            ("run/.containerenv", "", Surroundings::Container),
        ] {
            let (_folder, system) = fixture(&[(path, text)]);
            assert_eq!(system.surroundings(), expected, "{path}: {text}");
        }
    }

    /// The real files have the form that the fixtures have: what every Linux shows is found.
    #[test]
    fn this_system() {
        let system = System::default();
        assert!(system.somaxconn().is_some_and(|value| value > 0));
        assert!(system.ip_local_port_range().is_some_and(|range| !range.is_empty()));
        let counters = system.net_counters().unwrap();
        for (group, name) in [
            ("TcpExt", "ListenOverflows"),
            ("TcpExt", "ListenDrops"),
            ("TcpExt", "TCPAbortOnData"),
            ("TcpExt", "TCPAbortOnClose"),
            ("TcpExt", "TCPAbortOnMemory"),
            ("TcpExt", "TCPAbortOnTimeout"),
            ("TcpExt", "TCPAbortOnLinger"),
            ("TcpExt", "TCPAbortFailed"),
            ("TcpExt", "TCPTimeouts"),
            ("TcpExt", "DelayedACKs"),
            ("TcpExt", "DelayedACKLost"),
            ("Tcp", "OutRsts"),
            ("Tcp", "EstabResets"),
        ] {
            assert!(counters.get(group, name).is_some(), "{group} {name}");
        }
        assert!(system.tcp_sockets().is_some());
        let memory = system.process_memory().unwrap();
        assert!(memory.resident > 0 && memory.resident < memory.virtual_size, "{memory:?}");
        let host = system.host_memory().unwrap();
        assert!(host.available < host.total, "{host:?}");
        assert!(descriptor_limit().soft.is_none_or(|soft| soft > system.open_descriptors().unwrap()));
    }

    /// One more open file is one more descriptor, by the fast way and by the slow one.
    #[test]
    fn descriptors_are_counted() {
        // Other tests open and close files meanwhile, but not thousands of them.
        let (fast, slow) = (System::default(), System::new("/proc/.."));
        for system in [fast, slow] {
            let before = system.open_descriptors().unwrap();
            let files: Vec<_> = (0..500).map(|_| fs::File::open("/proc/self/statm").unwrap()).collect();
            let after = system.open_descriptors().unwrap();
            assert!(after > before + 250 && after < before + 750, "{before} {after}");
            drop(files);
        }
    }
}
