//! What is there, read once.

use std::ops::RangeInclusive;

use serde::Serialize;

use crate::system::{Conntrack, Cpu, HostFiles, HostMemory, Limit, Memory, Surroundings, System, descriptor_limit};

/// What is there; `None` is not shown here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Facts {
    /// Where we are.
    pub surroundings: Surroundings,
    /// `net.core.somaxconn`.
    pub somaxconn: Option<u64>,
    /// `net.ipv4.tcp_max_syn_backlog`.
    pub tcp_max_syn_backlog: Option<u64>,
    /// `net.ipv4.tcp_syncookies`.
    pub tcp_syncookies: Option<u64>,
    /// `net.ipv4.tcp_abort_on_overflow`.
    pub tcp_abort_on_overflow: Option<bool>,
    /// `net.core.netdev_max_backlog`.
    pub netdev_max_backlog: Option<u64>,
    /// Packets that were dropped for it.
    pub netdev_drops: Option<u64>,
    /// `net.ipv4.ip_local_port_range`.
    pub port_range: Option<RangeInclusive<u16>>,
    /// `net.ipv4.ip_local_reserved_ports`.
    pub reserved_ports: Vec<RangeInclusive<u16>>,
    /// `RLIMIT_NOFILE`.
    pub descriptors: Limit,
    /// Descriptors open before `run` opens any: the standard three, and what whoever starts us leaves open.
    pub inherited: Option<u64>,
    /// `fs.nr_open`.
    pub nr_open: Option<u64>,
    /// Open files of the whole host.
    pub host_files: Option<HostFiles>,
    /// The lowest CPU quota.
    pub cpu: Option<Cpu>,
    /// What bounds our memory, the lowest first.
    pub memory: Vec<Memory>,
    /// Memory of the whole host.
    pub host_memory: Option<HostMemory>,
    /// The connection tracking table.
    pub conntrack: Option<Conntrack>,
    /// Clients of this network namespace that found an accept queue full, since it began.
    pub listen_overflows: Option<u64>,
    /// The same, and those that were dropped for other reasons.
    pub listen_drops: Option<u64>,
}

impl Facts {
    /// Reads them.
    pub fn gather(system: &System) -> Self {
        let counters = system.net_counters();
        let counter = |name| counters.as_ref().and_then(|counters| counters.get("TcpExt", name));
        Self {
            surroundings: system.surroundings(),
            somaxconn: system.somaxconn(),
            tcp_max_syn_backlog: system.tcp_max_syn_backlog(),
            tcp_syncookies: system.tcp_syncookies(),
            tcp_abort_on_overflow: system.tcp_abort_on_overflow(),
            netdev_max_backlog: system.netdev_max_backlog(),
            netdev_drops: system.netdev_drops(),
            port_range: system.ip_local_port_range(),
            reserved_ports: system.ip_local_reserved_ports().unwrap_or_default(),
            descriptors: descriptor_limit(),
            inherited: system.open_descriptors(),
            nr_open: system.nr_open(),
            host_files: system.host_files(),
            cpu: system.cpu(),
            memory: system.memory(),
            host_memory: system.host_memory(),
            conntrack: system.conntrack(),
            listen_overflows: counter("ListenOverflows"),
            listen_drops: counter("ListenDrops"),
        }
    }
}
