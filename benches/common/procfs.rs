//! What the kernel says about processes: CPU time, memory, children, and who listens on a port.

use std::{collections::HashSet, fs, ops::Sub, thread, time::Instant};

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};

/// Ticks per second of the times in `/proc/PID/stat`: 100 in every Linux of today, whatever the kernel's own HZ.
const USER_HZ: u64 = 100;

/// CPU time of processes, all their threads included, those that have ended too. Resolution: 10 ms each.
///
/// The sum is exact. How it is split between user and system is sampled by most kernels, at each timer tick.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Cpu {
    pub user_us: u64,
    pub system_us: u64,
}

impl Cpu {
    pub fn of(pids: &[u32]) -> anyhow::Result<Self> {
        let mut sum = Self::default();
        for pid in pids {
            let file = format!("/proc/{pid}/stat");
            let stat = fs::read_to_string(&file).context(file)?;
            // The second field is the program's name in parentheses, which may hold anything.
            let (_, fields) = stat.rsplit_once(')').context("no name in stat")?;
            let mut fields = fields.split_ascii_whitespace();
            // utime and stime are fields 14 and 15 of proc_pid_stat(5); this starts with the third.
            let user: u64 = fields.nth(11).context("no utime")?.parse()?;
            let system: u64 = fields.next().context("no stime")?.parse()?;
            sum.user_us += user * 1_000_000 / USER_HZ;
            sum.system_us += system * 1_000_000 / USER_HZ;
        }
        Ok(sum)
    }

    pub fn us(self) -> u64 {
        self.user_us + self.system_us
    }
}

impl Sub for Cpu {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            // Sampled, so that one part may go back by a tick.
            user_us: self.user_us.saturating_sub(before.user_us),
            system_us: self.system_us.saturating_sub(before.system_us),
        }
    }
}

/// Memory of processes in KiB. What several of them share counts once each in `rss`, and in parts in `pss`.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Memory {
    pub rss_kib: u64,
    pub pss_kib: u64,
}

impl Memory {
    pub fn of(pids: &[u32]) -> anyhow::Result<Self> {
        let mut sum = Self::default();
        for pid in pids {
            // Walks the page tables; VmRSS is kept per CPU and off by some pages.
            let file = format!("/proc/{pid}/smaps_rollup");
            let rollup = fs::read_to_string(&file).context(file)?;
            let value = |name: &str| -> anyhow::Result<u64> {
                let line = rollup.lines().find_map(|line| line.strip_prefix(name)).with_context(|| name.to_owned())?;
                Ok(line.trim().trim_end_matches(" kB").parse()?)
            };
            sum.rss_kib += value("Rss:")?;
            sum.pss_kib += value("Pss:")?;
        }
        Ok(sum)
    }
}

/// One of what the kernel counts of TCP in the network namespace of a process: the table is "snmp" or "netstat".
pub fn counter(pid: u32, table: &str, name: &str) -> anyhow::Result<u64> {
    let file = format!("/proc/{pid}/net/{table}");
    let text = fs::read_to_string(&file).context(file)?;
    let lines: Vec<&str> = text.lines().collect();
    // A line of names, and below it one of values.
    let pairs = lines.chunks_exact(2).filter(|pair| pair[0].starts_with("Tcp"));
    let mut pairs = pairs.flat_map(|pair| pair[0].split(' ').zip(pair[1].split(' ')));
    let (_, value) = pairs.find(|(key, _)| *key == name).with_context(|| format!("no {name}"))?;
    Ok(value.parse()?)
}

/// What the kernel counts of TCP in one network namespace.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Counters {
    pub listen_overflows: u64,
    pub listen_drops: u64,
    pub out_rsts: u64,
    /// Sockets that were closed with something unread.
    pub aborts_on_close: u64,
    /// Sockets that got data when their program had closed them.
    pub aborts_on_data: u64,
}

impl Counters {
    /// Of the namespace that a process is in.
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let value = |table, name| counter(pid, table, name);
        Ok(Self {
            listen_overflows: value("netstat", "ListenOverflows")?,
            listen_drops: value("netstat", "ListenDrops")?,
            out_rsts: value("snmp", "OutRsts")?,
            aborts_on_close: value("netstat", "TCPAbortOnClose")?,
            aborts_on_data: value("netstat", "TCPAbortOnData")?,
        })
    }
}

impl Sub for Counters {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            listen_overflows: self.listen_overflows - before.listen_overflows,
            listen_drops: self.listen_drops - before.listen_drops,
            out_rsts: self.out_rsts - before.out_rsts,
            aborts_on_close: self.aborts_on_close - before.aborts_on_close,
            aborts_on_data: self.aborts_on_data - before.aborts_on_data,
        }
    }
}

/// Connections that are established at the ports on which a process listens, in its namespace.
pub fn connections(pid: u32) -> anyhow::Result<usize> {
    let file = format!("/proc/{pid}/net/tcp");
    let table = fs::read_to_string(&file).context(file)?;
    let sockets: Vec<(&str, &str, &str)> = table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let &[_, local, _, state, _, _, _, _, _, inode, ..] = fields.as_slice() else { return None };
            Some((local, state, inode))
        })
        .collect();
    let ours: HashSet<String> = fs::read_dir(format!("/proc/{pid}/fd"))?
        .flatten()
        .filter_map(|fd| Some(fs::read_link(fd.path()).ok()?.to_string_lossy().into_owned()))
        .collect();
    let listens = |inode: &str| ours.contains(&format!("socket:[{inode}]"));
    let at: Vec<&str> =
        sockets.iter().filter(|(_, state, inode)| *state == "0A" && listens(inode)).map(|(local, ..)| *local).collect();
    Ok(sockets.iter().filter(|(local, state, _)| *state == "01" && at.contains(local)).count())
}

/// CPU time that all programs of the host have used, without that of interrupts, which belongs to nobody.
pub fn cpu_of_all() -> anyhow::Result<u64> {
    let stat = fs::read_to_string("/proc/stat").context("stat")?;
    let mut ticks = 0;
    // user, nice and system of all cores.
    for field in stat.split_ascii_whitespace().skip(1).take(3) {
        ticks += field.parse::<u64>()?;
    }
    Ok(ticks * 1_000_000 / USER_HZ)
}

/// What programs have used of the CPUs that are none of ours.
#[derive(Debug)]
pub struct Strangers {
    all_us: u64,
    begun: Instant,
}

impl Strangers {
    pub fn begin() -> anyhow::Result<Self> {
        Ok(Self { all_us: cpu_of_all()?, begun: Instant::now() })
    }

    /// Of all cores, since then, where `ours_us` was ours. Ticks are coarse: a few per cent are none.
    #[expect(clippy::cast_precision_loss, reason = "times far below 2^52")]
    pub fn percent(&self, ours_us: u64) -> anyhow::Result<f64> {
        let strangers_us = (cpu_of_all()? - self.all_us).saturating_sub(ours_us) as f64;
        let cores = thread::available_parallelism()?.get() as f64;
        Ok((strangers_us / (self.begun.elapsed().as_secs_f64() * 1e6 * cores) * 100.0).round())
    }
}

/// Whether a process goes on: one that has ended is there until its parent has looked at it.
pub fn goes_on(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, fields)| !fields.starts_with(['Z', 'X']))
}

/// Packets that the host threw away because a core's queue of received ones was full (`net.core.netdev_max_backlog`).
pub fn packets_dropped() -> anyhow::Result<u64> {
    let table = fs::read_to_string("/proc/net/softnet_stat").context("softnet_stat")?;
    let dropped = |line: &str| u64::from_str_radix(line.split(' ').nth(1)?, 16).ok();
    Ok(table.lines().filter_map(dropped).sum())
}

/// Packets that the devices of a process's network namespace had no room for, received or sent.
pub fn device_drops(pid: u32) -> anyhow::Result<u64> {
    let file = format!("/proc/{pid}/net/dev");
    let table = fs::read_to_string(&file).context(file)?;
    let fields = table.lines().filter_map(|line| line.split_once(':')).map(|(_, fields)| fields);
    // The fourth of eight, and of the eight after those.
    let drops = fields.flat_map(|fields| fields.split_ascii_whitespace().skip(3).step_by(8));
    drops.map(|count| Ok(count.parse::<u64>()?)).sum()
}

/// The processes that `pid`'s main thread has started and that live.
pub fn children(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// That every listening socket of a TCP port, in the namespace of `pids`, belongs to one of `pids`, and that there is one: with `SO_REUSEPORT` a
/// process that was forgotten takes half of the connections, and the figures are those of two programs.
pub fn only_listener(port: u16, pids: &[u32]) -> anyhow::Result<()> {
    let ours: Vec<String> = pids
        .iter()
        .filter_map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).ok())
        .flat_map(|fds| fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok()))
        .map(|link| link.to_string_lossy().into_owned())
        .filter(|link| link.starts_with("socket:"))
        .collect();
    let mut listeners = 0;
    for table in
        pids.first().into_iter().flat_map(|pid| ["tcp", "tcp6"].map(|table| format!("/proc/{pid}/net/{table}")))
    {
        let Ok(table) = fs::read_to_string(table) else { continue };
        for line in table.lines().skip(1) {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let &[_, local, _, "0A", _, _, _, _, _, inode, ..] = fields.as_slice() else { continue };
            if local.rsplit_once(':').and_then(|(_, hex)| u16::from_str_radix(hex, 16).ok()) == Some(port) {
                ensure!(ours.contains(&format!("socket:[{inode}]")), "another process listens on port {port}");
                listeners += 1;
            }
        }
    }
    ensure!(listeners > 0, "none of the processes {pids:?} listens on port {port}");
    Ok(())
}
