//! What one address may have: connections at once, and handshakes in a time. A table of a fixed size, made when the first of these limits is
//! set.
//!
//! An IPv6 client is counted by its /64, which is what one subscriber has. When the table is full the address is forgotten that has had no
//! connection for longest; when all of them have one, whoever comes is not counted: a limit per address is nothing against
//! somebody who has more addresses than this.

use std::{
    fmt,
    hash::{BuildHasher as _, RandomState},
    net::IpAddr,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::lock;

/// So many in so much time; as many at once after a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// At least 1.
    pub count: u32,
    /// A second, a minute or an hour.
    pub per: Duration,
}

/// Of all addresses. One for the process.
pub(super) struct Addresses {
    /// 0: any number.
    connections: AtomicUsize,
    /// Nanoseconds between two handshakes, and how far ahead of that somebody may be; 0: any number.
    interval: AtomicU64,
    ahead: AtomicU64,
    table: OnceLock<Box<[Mutex<Shard>]>>,
    hasher: RandomState,
    begun: Instant,
}

/// Its addresses, by their hash; those without a connection also by when they were last heard of.
struct Shard {
    /// The first of each chain.
    heads: Box<[u32]>,
    slots: Vec<Slot>,
    /// The one without a connection that was heard of first, and last.
    oldest: u32,
    newest: u32,
}

struct Slot {
    key: u64,
    /// When its next handshake would be due at an even pace, in nanoseconds.
    due: u64,
    connections: u32,
    /// The next of the same chain.
    next: u32,
    /// Of those without a connection.
    older: u32,
    newer: u32,
}

const SHARDS: usize = 16;
/// In each shard.
const SLOTS: usize = 4096;
const NONE: u32 = u32::MAX;

/// What the table takes, in bytes.
pub(super) const TABLE_BYTES: u64 = (SHARDS * SLOTS * (size_of::<Slot>() + size_of::<u32>())) as u64;

impl Addresses {
    pub(super) fn new() -> Self {
        let zero = || AtomicU64::new(0);
        let (connections, interval, ahead) = (AtomicUsize::new(0), zero(), zero());
        let (table, hasher, begun) = (OnceLock::new(), RandomState::new(), Instant::now());
        Self { connections, interval, ahead, table, hasher, begun }
    }

    /// Other limits from now on; connections that were not counted until now are not. True: the table was made for that.
    pub(super) fn set(&self, connections: Option<usize>, handshakes: Option<Pace>) -> bool {
        self.connections.store(connections.unwrap_or(0), Ordering::Relaxed);
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let (interval, ahead) = handshakes.map_or((0, 0), |Pace { count, per }| {
            let interval = per / count.max(1);
            (nanos(interval), nanos(per.saturating_sub(interval)))
        });
        self.ahead.store(ahead, Ordering::Relaxed);
        self.interval.store(interval, Ordering::Relaxed);
        let is_new = self.table.get().is_none() && (connections.is_some() || handshakes.is_some());
        if is_new {
            self.table.get_or_init(|| (0..SHARDS).map(|_| Mutex::new(Shard::new())).collect());
        }
        is_new
    }

    /// One more connection of `ip`, with what [`Self::leave`] is to be told of it; `Ok(None)`: it is not counted. `Err`: it has as many as
    /// it may.
    pub(super) fn connect(&self, ip: IpAddr) -> Result<Option<u64>, ()> {
        let most = self.connections.load(Ordering::Relaxed);
        if most == 0 {
            return Ok(None);
        }
        let key = key(ip);
        let counted = self.with(key, |slot| {
            let may = usize::try_from(slot.connections).is_ok_and(|count| count < most);
            slot.connections += u32::from(may);
            may
        });
        match counted {
            None => Ok(None),
            Some(true) => Ok(Some(key)),
            Some(false) => Err(()),
        }
    }

    /// One connection less.
    pub(super) fn leave(&self, key: u64) {
        // Whoever has a connection is not forgotten.
        self.with(key, |slot| slot.connections = slot.connections.saturating_sub(1));
    }

    /// A handshake of `ip`. `Err`: it has to wait for so long.
    pub(super) fn handshake(&self, ip: IpAddr, now: Instant) -> Result<(), Duration> {
        let (interval, ahead) = (self.interval.load(Ordering::Relaxed), self.ahead.load(Ordering::Relaxed));
        if interval == 0 {
            return Ok(());
        }
        let now = u64::try_from(now.saturating_duration_since(self.begun).as_nanos()).unwrap_or(u64::MAX);
        let result = self.with(key(ip), |slot| {
            let due = slot.due.max(now);
            let late = (due - now).saturating_sub(ahead);
            if late > 0 {
                return Err(Duration::from_nanos(late));
            }
            slot.due = due.saturating_add(interval);
            Ok(())
        });
        result.unwrap_or(Ok(()))
    }

    /// `None`: it is not in the table, and there is no room for it.
    fn with<T>(&self, key: u64, change: impl FnOnce(&mut Slot) -> T) -> Option<T> {
        let hash = self.hasher.hash_one(key);
        let shards = self.table.get()?;
        let shard = &shards[usize::try_from(hash >> 32).unwrap_or(0) % SHARDS];
        lock(shard).with(key, hash, |key| self.hasher.hash_one(key), change)
    }
}

impl Shard {
    fn new() -> Self {
        let heads = vec![NONE; SLOTS].into_boxed_slice();
        Self { heads, slots: Vec::with_capacity(SLOTS), oldest: NONE, newest: NONE }
    }

    fn with<T>(
        &mut self,
        key: u64,
        hash: u64,
        hash_of: impl FnOnce(u64) -> u64,
        change: impl FnOnce(&mut Slot) -> T,
    ) -> Option<T> {
        let found = self.find(key, hash);
        let index = match found {
            Some(index) => {
                if self.slots[at(index)].connections == 0 {
                    self.leave_idle(index);
                }
                index
            }
            None => self.add(key, hash, hash_of)?,
        };
        let result = change(&mut self.slots[at(index)]);
        if self.slots[at(index)].connections == 0 {
            self.join_idle(index);
        }
        Some(result)
    }

    fn find(&self, key: u64, hash: u64) -> Option<u32> {
        let mut index = self.heads[chain(hash)];
        while index != NONE && self.slots[at(index)].key != key {
            index = self.slots[at(index)].next;
        }
        (index != NONE).then_some(index)
    }

    /// In the place of the oldest without a connection, if there is no other.
    fn add(&mut self, key: u64, hash: u64, hash_of: impl FnOnce(u64) -> u64) -> Option<u32> {
        let slot = |next| Slot { key, due: 0, connections: 0, next, older: NONE, newer: NONE };
        let index = if self.slots.len() < SLOTS {
            self.slots.push(slot(NONE));
            u32::try_from(self.slots.len() - 1).ok()?
        } else {
            let index = self.oldest;
            if index == NONE {
                return None;
            }
            self.leave_idle(index);
            self.leave_chain(index, chain(hash_of(self.slots[at(index)].key)));
            index
        };
        let head = &mut self.heads[chain(hash)];
        self.slots[at(index)] = slot(std::mem::replace(head, index));
        Some(index)
    }

    fn leave_chain(&mut self, index: u32, chain: usize) {
        let next = self.slots[at(index)].next;
        if self.heads[chain] == index {
            self.heads[chain] = next;
            return;
        }
        let mut before = self.heads[chain];
        while before != NONE {
            let link = &mut self.slots[at(before)].next;
            if *link == index {
                *link = next;
                return;
            }
            before = *link;
        }
    }

    fn leave_idle(&mut self, index: u32) {
        let Slot { older, newer, .. } = self.slots[at(index)];
        match older {
            NONE => self.oldest = newer,
            older => self.slots[at(older)].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.slots[at(newer)].older = older,
        }
    }

    fn join_idle(&mut self, index: u32) {
        let newest = std::mem::replace(&mut self.newest, index);
        let slot = &mut self.slots[at(index)];
        (slot.older, slot.newer) = (newest, NONE);
        match newest {
            NONE => self.oldest = index,
            newest => self.slots[at(newest)].newer = index,
        }
    }
}

const fn at(index: u32) -> usize {
    index as usize
}

fn chain(hash: u64) -> usize {
    usize::try_from(hash & 0xffff_ffff).unwrap_or(0) % SLOTS
}

/// IPv4 addresses are where no IPv6 network is (`0::/8` is reserved, RFC 4291 2.4).
fn key(ip: IpAddr) -> u64 {
    match ip.to_canonical() {
        IpAddr::V4(ip) => 1 << 32 | u64::from(ip.to_bits()),
        IpAddr::V6(ip) => u64::try_from(ip.to_bits() >> 64).unwrap_or(0),
    }
}

impl fmt::Debug for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Addresses").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{Ipv4Addr, Ipv6Addr},
        sync::Arc,
    };

    use super::*;

    fn addresses(connections: Option<usize>, handshakes: Option<Pace>) -> Arc<Addresses> {
        let addresses = Addresses::new();
        assert!(addresses.set(connections, handshakes));
        Arc::new(addresses)
    }

    /// A connection, until it is dropped.
    struct Visitor {
        addresses: Arc<Addresses>,
        key: u64,
    }

    impl Drop for Visitor {
        fn drop(&mut self) {
            self.addresses.leave(self.key);
        }
    }

    fn connect(addresses: &Arc<Addresses>, ip: IpAddr) -> Result<Option<Visitor>, ()> {
        let key = addresses.connect(ip)?;
        Ok(key.map(|key| Visitor { addresses: Arc::clone(addresses), key }))
    }

    fn v4(number: u32) -> IpAddr {
        Ipv4Addr::from_bits(number).into()
    }

    fn counts(addresses: &Addresses) -> (usize, usize) {
        let shards: Vec<_> = addresses.table.get().unwrap().iter().map(lock).collect();
        let idle = |shard: &Shard| shard.slots.iter().filter(|slot| slot.connections == 0).count();
        let memory = |shard: &Shard| shard.slots.capacity() * size_of::<Slot>() + shard.heads.len() * size_of::<u32>();
        for shard in &shards {
            let (mut index, mut listed) = (shard.oldest, 0);
            while index != NONE {
                (index, listed) = (shard.slots[at(index)].newer, listed + 1);
            }
            assert_eq!(listed, idle(shard), "who has no connection is in the list, and nobody else");
        }
        (
            shards.iter().map(|shard| shard.slots.len() - idle(shard)).sum(),
            shards.iter().map(|shard| memory(shard)).sum(),
        )
    }

    #[test]
    fn connections_of_one_address() {
        let addresses = addresses(Some(2), None);
        let mut held: Vec<_> = (0..2).map(|_| connect(&addresses, v4(1)).unwrap().unwrap()).collect();
        assert!(connect(&addresses, v4(1)).is_err());
        // The same in IPv6, and another one.
        assert!(connect(&addresses, Ipv4Addr::from_bits(1).to_ipv6_mapped().into()).is_err());
        held.push(connect(&addresses, v4(2)).unwrap().unwrap());
        held.remove(0);
        held.push(connect(&addresses, v4(1)).unwrap().unwrap());
        assert!(connect(&addresses, v4(1)).is_err());
        // A subscriber's network is one, his neighbour's another.
        let six = |network: u16, host: u16| IpAddr::from(Ipv6Addr::new(0x2001, 0xdb8, 0, network, 0, 0, 0, host));
        held.extend((1..3).map(|host| connect(&addresses, six(1, host)).unwrap().unwrap()));
        assert!(connect(&addresses, six(1, 3)).is_err());
        held.push(connect(&addresses, six(2, 1)).unwrap().unwrap());
        assert_eq!(counts(&addresses).0, 4);
        drop(held);
        assert_eq!(counts(&addresses).0, 0);
        addresses.set(None, None);
        assert!(connect(&addresses, v4(1)).unwrap().is_none());
    }

    #[test]
    fn handshakes_of_one_address() {
        let addresses = addresses(None, Some(Pace { count: 20, per: Duration::from_secs(1) }));
        let now = Instant::now();
        let begin = |ip, at| addresses.handshake(v4(ip), now + at);
        for _ in 0..20 {
            begin(1, Duration::ZERO).unwrap();
        }
        let wait = begin(1, Duration::ZERO).unwrap_err();
        assert_eq!(wait.as_millis(), 50);
        begin(2, Duration::ZERO).unwrap();
        begin(1, wait).unwrap();
        begin(1, wait).unwrap_err();
        // After a pause as many at once as before, and no more.
        for _ in 0..20 {
            begin(1, Duration::from_mins(10)).unwrap();
        }
        begin(1, Duration::from_mins(10)).unwrap_err();
    }

    /// However many come, it stays as large as it was made; who has a connection is remembered, who came last as well, and the others make
    /// room.
    #[test]
    fn a_full_table_stays_as_it_is() {
        let addresses = addresses(Some(1), Some(Pace { count: 1, per: Duration::from_hours(1) }));
        let empty = counts(&addresses).1;
        assert_eq!(empty as u64, TABLE_BYTES);
        let now = Instant::now();
        let held: Vec<_> = (0..1000).map(|ip| connect(&addresses, v4(ip)).unwrap().unwrap()).collect();
        for ip in 1000..201_000 {
            addresses.handshake(v4(ip), now).unwrap();
        }
        assert_eq!(counts(&addresses), (1000, empty));
        assert!((0..1000).all(|ip| connect(&addresses, v4(ip)).is_err()));
        assert!((200_000..201_000).all(|ip| addresses.handshake(v4(ip), now).is_err()));
        assert!((1000..2000).all(|ip| addresses.handshake(v4(ip), now).is_ok()), "they were not forgotten");
        drop(held);
        // With a connection of each there is no room for any more, who are not counted, and nobody is confused with another.
        let all: Vec<_> = (0..200_000).filter_map(|ip| connect(&addresses, v4(ip)).unwrap()).collect();
        assert_eq!(counts(&addresses), (SHARDS * SLOTS, empty));
        assert_eq!(all.len(), SHARDS * SLOTS);
        assert!(
            all.iter()
                .all(|visitor| connect(&addresses, v4(u32::try_from(visitor.key & 0xffff_ffff).unwrap())).is_err())
        );
        drop(all);
        assert_eq!(counts(&addresses), (0, empty));
    }
}
