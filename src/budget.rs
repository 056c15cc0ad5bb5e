//! What this host's descriptors, memory and ports allow, computed once at the start. Pure: facts in, numbers out.
//!
//! ```text
//! descriptors = open at the start (accept queues, runtimes, log, admin listener) + spare (admin connections, looks at
//!               the backend, names, plain requests' backends after their client) + turned away + 1 in reserve
//!             + connections to the backend that wait for their use, up to a sixteenth
//!             + 2 for each pipe that moves large payloads, up to a thirty-second
//!             + 2 for each client connection
//! ```

use std::fmt;

use crate::{
    admission::{Capacity, Reason, connection_bytes},
    gate,
    net::MOST_PIPES,
};

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// `RLIMIT_NOFILE`, raised.
    pub descriptors: u64,
    /// Descriptors that are open before the first client.
    pub open: u64,
    /// Bytes that may be used at all, and those that are used already.
    pub memory: Option<(u64, u64)>,
    /// Threads that serve.
    pub workers: usize,
    /// Ports for connections to the backend, for all source addresses together; `None`: it takes none (a Unix socket).
    pub ports: Option<u64>,
    /// Connections to backends that are to wait for their use (`pool.prewarm`, `pool.keep_alive`).
    pub idle: usize,
    /// Clients speak TLS.
    pub has_tls: bool,
}

/// What can be given, and why not more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// For [`crate::admission::Admission`].
    pub capacity: Capacity,
    /// Descriptors for everything that is neither a client nor its session.
    pub spare: usize,
    /// Connections to backends that may wait for their use.
    pub idle: usize,
    /// Pipes that each worker may have, of two descriptors.
    pub pipes: usize,
    /// What sets the number of connections.
    pub limited_by: LimitedBy,
}

/// What sets the number of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitedBy {
    /// `limits.max_connections`.
    Setting,
    /// `RLIMIT_NOFILE`.
    Descriptors,
    /// `limits.memory`.
    Memory,
    /// The ephemeral ports toward the backend.
    Ports,
}

impl LimitedBy {
    const fn reason(self) -> Reason {
        match self {
            Self::Setting => Reason::MaxConnections,
            Self::Descriptors => Reason::Descriptors,
            Self::Memory => Reason::Memory,
            Self::Ports => Reason::Ports,
        }
    }
}

impl fmt::Display for LimitedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Setting => "limits.max_connections",
            Self::Descriptors => "descriptors",
            Self::Memory => "memory",
            Self::Ports => "ports",
        })
    }
}

/// The limits leave nothing for a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoRoom {
    /// Of descriptors.
    #[error(
        "{descriptors} descriptors (RLIMIT_NOFILE) leave none for clients, since {needed} are needed before the first one: raise \
         the limit (ulimit -Hn), or lower listen.workers and listen.max_sockets"
    )]
    Descriptors {
        /// What there is.
        descriptors: u64,
        /// What it takes to begin.
        needed: u64,
    },
    /// Of memory.
    #[error(
        "a memory limit of {} MiB (limits.memory, the cgroup's or RLIMIT_AS) leaves none for clients, since {} MiB of it are used \
         already and {} are for handshakes: raise it, or lower listen.workers", limit >> 20, used >> 20, handshakes >> 20
    )]
    Memory {
        /// Bytes that may be used.
        limit: u64,
        /// Bytes that are.
        used: u64,
        /// Bytes that are set aside.
        handshakes: u64,
    },
}

/// Per cent of the memory limit that are planned with.
const MEMORY_SHARE: u64 = 85;

/// The most accept queues: each is a descriptor, and they must leave the others to the clients.
pub fn most_queues(descriptors: u64, max_sockets: usize) -> usize {
    usize::try_from(descriptors / 8).unwrap_or(usize::MAX).clamp(1, max_sockets.max(1))
}

impl Budget {
    /// `wanted` is `limits.max_connections`.
    pub fn new(host: &Host, wanted: Option<usize>) -> Result<Self, NoRoom> {
        let Host { descriptors, open, memory, workers, ports, idle, has_tls } = *host;
        let connection_bytes = connection_bytes(has_tls);
        let spare = (descriptors / 16).clamp(4, 256);
        let turned_away = (descriptors / 32).clamp(2, 256);
        // Without one of these a connection is opened when it is needed, so clients come first.
        let idle = (idle as u64).min(descriptors / 16).min(ports.map_or(u64::MAX, |ports| ports / 16));
        // Without one of these a payload is copied.
        let pipes = (descriptors / 64 / (workers as u64).max(1)).min(MOST_PIPES as u64);
        let needed = open + spare + turned_away + idle + pipes * 2 * workers as u64 + 1;
        let by_descriptors = descriptors.saturating_sub(needed) / 2;
        if by_descriptors == 0 {
            return Err(NoRoom::Descriptors { descriptors, needed });
        }
        let handshakes = (workers * gate::AT_ONCE) as u64 * gate::HANDSHAKE_BYTES;
        let memory = match memory {
            None => None,
            Some((limit, used)) => match (limit / 100 * MEMORY_SHARE).checked_sub(used + handshakes) {
                Some(bytes) if bytes >= connection_bytes => Some(bytes),
                _ => return Err(NoRoom::Memory { limit, used, handshakes }),
            },
        };
        let candidates = [
            (Some(by_descriptors), LimitedBy::Descriptors),
            // A quarter is for what some of them take beyond that: handshakes that wait for long, headers in pieces.
            (memory.map(|bytes| bytes / 4 * 3 / connection_bytes), LimitedBy::Memory),
            (ports.map(|ports| ports - idle), LimitedBy::Ports),
            (wanted.and_then(|wanted| u64::try_from(wanted).ok()), LimitedBy::Setting),
        ];
        let all = candidates.into_iter().filter_map(|(count, by)| Some((count?, by)));
        let (connections, limited_by) = all.min_by_key(|(count, _)| *count).expect("descriptors are always counted");
        let whole = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
        let capacity = Capacity {
            connections: whole(connections),
            turned_away: whole(turned_away),
            memory,
            connection_bytes,
            full: limited_by.reason(),
        };
        Ok(Self { capacity, spare: whole(spare), idle: whole(idle), pipes: whole(pipes), limited_by })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Host =
        Host { descriptors: 20_000, open: 160, memory: None, workers: 2, ports: None, idle: 0, has_tls: false };

    fn budget(host: Host, wanted: Option<usize>) -> (usize, LimitedBy) {
        let budget = Budget::new(&host, wanted).expect("room");
        (budget.capacity.connections, budget.limited_by)
    }

    /// The scarcest resource decides, and a wish only when it is within all of them.
    #[test]
    fn what_is_scarcest_decides() {
        assert_eq!(budget(HOST, None), (9_599, LimitedBy::Descriptors));
        assert_eq!(budget(Host { idle: 40, ..HOST }, None), (9_579, LimitedBy::Descriptors));
        assert_eq!(budget(Host { idle: 100_000, ..HOST }, None), (8_974, LimitedBy::Descriptors));
        assert_eq!(budget(HOST, Some(100)), (100, LimitedBy::Setting));
        assert_eq!(budget(HOST, Some(1_000_000)), (9_599, LimitedBy::Descriptors));
        assert_eq!(budget(Host { ports: Some(500), ..HOST }, None), (500, LimitedBy::Ports));
        let small = Host { memory: Some((64 << 20, 8 << 20)), ..HOST };
        assert_eq!(budget(small, None), (1_939, LimitedBy::Memory));
        assert_eq!(budget(Host { has_tls: true, ..small }, None), (1_108, LimitedBy::Memory));
        let used_up = Host { memory: Some((1 << 20, 8 << 20)), ..HOST };
        assert!(matches!(Budget::new(&used_up, None), Err(NoRoom::Memory { .. })));
    }

    #[test]
    fn few_descriptors_serve_a_few_and_fewer_none() {
        let few = Host { descriptors: 64, open: 24, ..HOST };
        assert_eq!(budget(few, None), (16, LimitedBy::Descriptors));
        assert_eq!(most_queues(64, 128), 8);
        assert_eq!(most_queues(20_000, 128), 128);
        assert_eq!(most_queues(4, 128), 1);
        let none = Host { descriptors: 24, open: 20, ..HOST };
        assert_eq!(Budget::new(&none, None), Err(NoRoom::Descriptors { descriptors: 24, needed: 27 }));
    }

    proptest::proptest! {
        /// Whatever was found, what is given fits into the descriptors.
        #[test]
        fn it_always_fits(descriptors in 1_u64..1 << 20, open in 0_u64..1 << 10, idle in 0_usize..1 << 12) {
            if let Ok(Budget { capacity, spare, idle, pipes, .. }) = Budget::new(&Host { descriptors, open, idle, ..HOST }, None) {
                let given = capacity.connections * 2 + capacity.turned_away + spare + idle + pipes * 2 * HOST.workers + 1;
                proptest::prop_assert!(given as u64 + open <= descriptors);
            }
        }
    }
}
