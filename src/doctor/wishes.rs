//! What the settings want of the host, and what tidegate will make of what is there, by the same functions that it starts with.

use std::net::SocketAddr;

use super::Facts;
use crate::{
    admission::Memory,
    budget::{Budget, Host, LimitedBy, NoRoom, most_queues},
    config::Settings,
    net::{Address, Wish},
    system::{self, Memory as Bounded},
    upstream::{Addresses, Mode},
};

/// What the settings want of the host.
#[derive(Debug, Clone)]
pub(super) struct Wishes {
    pub listen: SocketAddr,
    pub admin: Option<SocketAddr>,
    pub backend: Address,
    /// Those that there are besides, also of routes; each once.
    pub other_backends: Vec<Address>,
    /// Sessions share connections, whatever backend they are with.
    pub all_share: bool,
    pub backlog: u32,
    /// Accept queues at most.
    pub max_sockets: usize,
    /// Accept queues at least.
    pub accept_loops: usize,
    pub workers: usize,
    /// `None`: as many as the host allows.
    pub max_connections: Option<usize>,
    /// At least 1: where none is set, the kernel chooses one.
    pub source_addresses: u64,
    pub memory: Memory,
    /// Connections to backends that are to wait for their use.
    pub idle: usize,
    /// Clients speak TLS.
    pub has_tls: bool,
}

impl From<&Settings> for Wishes {
    fn from(settings: &Settings) -> Self {
        let Settings { listen, limits, upstream, admin, .. } = settings;
        let mut backends: Vec<Address> = Vec::new();
        let of_routes: Vec<_> = settings.ways().map(|(_, way)| way.address).collect();
        for address in [&upstream.address].into_iter().chain(&of_routes).flat_map(Addresses::as_slice) {
            if !backends.contains(address) {
                backends.push(address.clone());
            }
        }
        let other_backends = backends.split_off(1);
        Self {
            listen: listen.address,
            admin: admin.address,
            backend: backends.remove(0),
            other_backends,
            all_share: upstream.pool.mode != Mode::Dedicated
                && settings.ways().all(|(_, way)| way.pool.mode != Mode::Dedicated),
            backlog: listen.backlog,
            max_sockets: listen.max_sockets,
            accept_loops: listen.accept_loops,
            workers: listen.workers,
            max_connections: limits.max_connections,
            source_addresses: wide(upstream.source_addresses.len()).max(1),
            memory: limits.memory,
            idle: upstream.idle() + settings.ways().map(|(_, way)| way.idle()).sum::<usize>(),
            has_tls: settings.downstream.tls.server.is_some(),
        }
    }
}

impl Wishes {
    pub(super) fn backends(&self) -> impl Iterator<Item = &Address> {
        [&self.backend].into_iter().chain(&self.other_backends)
    }
}

/// What tidegate will do here.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// The limit that it raises its own to.
    pub descriptors: u64,
    /// Accept queues.
    pub sockets: u64,
    /// What the kernel grants each; `None`: it does not say.
    pub granted: Option<u64>,
    /// Sessions that each resource allows, as if it was the only one that is short. `None`: any number.
    pub by_descriptors: u64,
    pub by_ports: Option<u64>,
    pub by_memory: Option<u64>,
    /// All of them together, and the shortest; `limits.max_connections` is one.
    pub connections: u64,
    pub limited_by: LimitedBy,
}

/// Descriptors that are open before the first client, besides those that were inherited, the accept queues and the admin
/// listener: those of the main thread's runtime and signals and the log's, and those of each worker's.
const OPEN: u64 = 8;
const OPEN_PER_WORKER: u64 = 4;

/// What the process takes before the first client, in bytes. What is used now would be that of whoever runs here already.
const PROCESS_BYTES: u64 = 8 << 20;

/// So many that they are never what is short.
const ANY: u64 = u64::MAX / 4;

impl Plan {
    pub(super) fn new(facts: &Facts, wishes: &Wishes) -> Self {
        let descriptors = facts.descriptors.hard.or(facts.nr_open).unwrap_or(ANY);
        let most = most_queues(descriptors, wishes.max_sockets);
        let workers = wishes.workers.min(most);
        let wish = Wish { backlog: wishes.backlog, queues: wishes.accept_loops.clamp(workers, most), most };
        let granted = facts.somaxconn.map(|somaxconn| somaxconn.min(u64::from(wishes.backlog)));
        let limit = granted.map_or(wishes.backlog, |granted| u32::try_from(granted).unwrap_or(u32::MAX));
        let sockets = wide(wish.sockets(limit));

        let open = facts.inherited.unwrap_or(3)
            + sockets
            + OPEN
            + OPEN_PER_WORKER * wide(workers)
            + u64::from(wishes.admin.is_some());
        let memory = match wishes.memory {
            Memory::Auto => facts.memory.first().map(|Bounded { limit, .. }| *limit),
            // The lower one counts.
            Memory::Limit(bytes) => Some(facts.memory.first().map_or(bytes, |Bounded { limit, .. }| bytes.min(*limit))),
            Memory::Off => None,
        };
        // A port is taken toward one destination.
        let ports = match &facts.port_range {
            _ if wishes.all_share => None,
            Some(range) if wishes.backends().all(|backend| matches!(backend, Address::Tcp { .. })) => {
                let each = system::usable_ports(range, &facts.reserved_ports).saturating_mul(wishes.source_addresses);
                Some(each.saturating_mul(wide(wishes.backends().count())))
            }
            _ => None,
        };
        let memory = memory.map(|limit| (limit, PROCESS_BYTES));
        let whole = Host { descriptors, open, memory, workers, ports, idle: wishes.idle, has_tls: wishes.has_tls };
        let count =
            |host: Host, wanted| Budget::new(&host, wanted).map_or(0, |budget| wide(budget.capacity.connections));
        let by_descriptors = count(Host { memory: None, ports: None, ..whole }, None);
        // Asked apart, since without descriptors there is no budget at all.
        let by_memory = memory.map(|_| count(Host { descriptors: ANY, ports: None, ..whole }, None));
        let limited_by = match Budget::new(&whole, wishes.max_connections) {
            Ok(budget) => budget.limited_by,
            Err(NoRoom::Descriptors { .. }) => LimitedBy::Descriptors,
            Err(NoRoom::Memory { .. }) => LimitedBy::Memory,
        };
        Self {
            descriptors,
            sockets,
            granted,
            by_descriptors,
            by_ports: ports,
            by_memory,
            connections: count(whole, wishes.max_connections),
            limited_by,
        }
    }

    /// Connections that may wait to be accepted, in all queues together.
    pub(super) fn effective(&self) -> Option<u64> {
        self.granted.map(|granted| granted.saturating_mul(self.sockets))
    }
}

/// The limit of memory, in bytes, with which [`Budget`] has room for so many connections.
pub(super) fn memory_for(connections: u64, wishes: &Wishes) -> u64 {
    let room = |limit| {
        let host = Host {
            descriptors: ANY,
            open: 0,
            memory: Some((limit, PROCESS_BYTES)),
            workers: wishes.workers,
            ports: None,
            idle: wishes.idle,
            has_tls: wishes.has_tls,
        };
        Budget::new(&host, None).map_or(0, |budget| wide(budget.capacity.connections))
    };
    // What it leaves free is its own matter: a limit is asked for, and another, until one is enough.
    let (mut few, mut enough) = (0, 16 << 20);
    while room(enough) < connections {
        (few, enough) = (enough, enough * 2);
    }
    while enough - few > 1 << 20 {
        let middle = few + (enough - few) / 2;
        if room(middle) < connections { few = middle } else { enough = middle }
    }
    enough
}

pub(super) fn wide(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}
