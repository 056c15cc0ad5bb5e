//! Three fresh network namespaces for a leg, so that a limit can be set for one side alone, and every count is that of one
//! side of one leg and of nothing else on the host.
//!
//! ```text
//! client 198.18.0.1 ---- 198.18.0.2 proxy 198.18.0.5 ---- 198.18.0.6 backend
//! ```
//!
//! Not here: namespaces for whoever is not root. Then a leg is on loopback with the limits of the host, and says so.

use std::{
    fs::{self, File},
    io::Write as _,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context as _, bail, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

const NAMESPACES: &str = "/run/netns";
const PREFIX: &str = "compare-";

const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
const FRONT: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);
const BACK: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 5);
const BACKEND: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 6);

/// The ends of both pairs.
const DEVICES: [(Side, &str, Ipv4Addr); 4] = [
    (Side::Client, "proxy0", CLIENT),
    (Side::Proxy, "client0", FRONT),
    (Side::Proxy, "backend0", BACK),
    (Side::Backend, "proxy0", BACKEND),
];

/// Packets in front of a device: some for each of as many sessions as there may be.
const QUEUE: u32 = 100_000;

/// Enough for 50,000 short connections, and beyond all ports that anything here listens on.
const PORT_RANGE: &str = "10000 65535";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Client,
    Proxy,
    Backend,
}

impl Side {
    const ALL: [Self; 3] = [Self::Client, Self::Proxy, Self::Backend];

    /// Named after this process, so that what a killed one left behind can be told from what is in use.
    fn name(self) -> String {
        format!("{PREFIX}{}-{self:?}", std::process::id()).to_lowercase()
    }
}

/// Where the processes of a leg are.
#[derive(Debug)]
pub enum Place {
    Loopback,
    /// Removed when this is dropped.
    Namespaces,
}

impl Place {
    /// `net.core.somaxconn` of the proxy's namespace and of the backend's.
    pub fn namespaces(proxy_somaxconn: u32, backend_somaxconn: u32) -> anyhow::Result<Self> {
        sweep();
        let [client, proxy, backend] = Side::ALL.map(Side::name);
        let place = Self::Namespaces;
        ip(
            None,
            &format!(
                "netns add {client}
netns add {proxy}
netns add {backend}
link add proxy0 netns {client} type veth peer name client0 netns {proxy}
link add proxy0 netns {backend} type veth peer name backend0 netns {proxy}
"
            ),
        )?;
        for (side, device, address) in DEVICES {
            let batch = format!("link set lo up\naddress add {address}/30 dev {device}\nlink set {device} up\n");
            ip(Some(&side.name()), &batch)?;
        }
        for side in Side::ALL {
            let somaxconn = if side == Side::Backend { backend_somaxconn } else { proxy_somaxconn };
            within(&place.namespace(side).expect("not loopback"), || {
                fs::write("/proc/sys/net/core/somaxconn", somaxconn.to_string())?;
                fs::write("/proc/sys/net/ipv4/ip_local_port_range", PORT_RANGE)?;
                Ok(())
            })?;
        }
        Ok(place)
    }

    /// From now on what arrives is received by threads of the kernel, one for each device, and no longer within the system call of who sends it.
    /// These are they, as far as this process can see threads of the kernel.
    ///
    /// veth leaves a packet to NAPI, which may have a thread, only where the end that receives has GRO, and the one that sends cuts its segments
    /// itself (`veth_skb_is_eligible_for_gro`, drivers/net/veth.c). In front of it is a queue: its own has 256 packets, and what is more
    /// would be dropped.
    pub fn receive_apart(&self) -> anyhow::Result<Vec<u32>> {
        ensure!(matches!(self, Self::Namespaces), "on loopback who sends receives too");
        let before = receivers();
        for (side, device, _) in DEVICES {
            let script = format!(
                "ethtool -K {device} gro on tso off; tc qdisc add dev {device} root pfifo limit {QUEUE}; echo 1 >/sys/class/net/{device}/threaded"
            );
            // It has the namespace's own /sys.
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &side.name(), "sh", "-ec", &script]).stdin(Stdio::null());
            let output = command.output().context("ip (iproute2)")?;
            let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
            ensure!(
                output.status.success(),
                "veth can't receive in a thread of its own (ethtool, tc, Linux 5.13): {said}"
            );
        }
        Ok(receivers().into_iter().filter(|pid| !before.contains(pid)).collect())
    }

    /// The file of a side's namespace. None: that of this process.
    pub fn namespace(&self, side: Side) -> Option<PathBuf> {
        match self {
            Self::Loopback => None,
            Self::Namespaces => Some(Path::new(NAMESPACES).join(side.name())),
        }
    }

    /// Where a program of this side listens.
    pub fn address(&self, side: Side) -> IpAddr {
        match (self, side) {
            (Self::Loopback, _) => Ipv4Addr::LOCALHOST,
            (Self::Namespaces, Side::Client) => CLIENT,
            (Self::Namespaces, Side::Proxy) => FRONT,
            (Self::Namespaces, Side::Backend) => BACKEND,
        }
        .into()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if matches!(self, Self::Namespaces) {
            for side in Side::ALL {
                // Perhaps it was never made.
                let _ = ip(None, &format!("netns del {}\n", side.name()));
            }
        }
    }
}

/// Whether namespaces can be had; the reason if not.
pub fn possible() -> anyhow::Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "not root");
    Place::namespaces(4096, 4096).map(drop)
}

/// Moves this process there, which must have no other thread.
pub fn enter(namespace: &Path) -> anyhow::Result<()> {
    let file = File::open(namespace).with_context(|| namespace.display().to_string())?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
    Ok(())
}

/// Runs `work` on a thread there.
fn within(namespace: &Path, work: impl FnOnce() -> anyhow::Result<()> + Send) -> anyhow::Result<()> {
    let there = || enter(namespace).and_then(|()| work());
    thread::scope(|scope| scope.spawn(there).join()).expect("work does not panic")
}

/// Removes what a killed run left behind: nobody else knows its names.
fn sweep() {
    for entry in fs::read_dir(NAMESPACES).into_iter().flatten().flatten() {
        let name = entry.file_name().into_string().unwrap_or_default();
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = ip(None, &format!("netns del {name}\n"));
        }
    }
}

/// The kernel's threads that receive for devices of these names, of whatever namespace.
fn receivers() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_one = |pid: &u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        DEVICES.iter().any(|(_, device, _)| name.starts_with(&format!("napi/{device}-")))
    };
    pids.filter(is_one).collect()
}

/// Runs a batch of `ip` commands.
fn ip(namespace: Option<&str>, batch: &str) -> anyhow::Result<()> {
    let mut command = Command::new("ip");
    if let Some(name) = namespace {
        command.args(["-n", name]);
    }
    command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().context("ip (iproute2)")?;
    child.stdin.take().context("no stdin")?.write_all(batch.as_bytes())?;
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    bail!("ip: {}, {}", output.status, String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; "))
}
