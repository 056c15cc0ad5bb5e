//! Who is let in: places for connections, for those that are turned away with an answer, memory, and the rate of handshakes.
//!
//! A client that can't be served is not reset and not left without an answer: it takes one of a few places for clients
//! that get a 503, and when these are all taken too, it waits in the accept queue. Before that, room is made where a place is kept
//! for somebody who is gone: lingering sockets ([`Spares`]), sessions in their `close.delay` ([`Delays`]).

mod addresses;
mod delays;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    fs::File,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError, RwLock, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, Semaphore, SemaphorePermit},
    time::{Instant, sleep},
};

use self::addresses::{Addresses, TABLE_BYTES};
pub use self::{
    addresses::Pace,
    delays::{Delay, Delays},
};

/// What is wanted; [`crate::budget`] says what is had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Client connections at once; `None`: as many as the host's resources allow.
    pub max_connections: Option<usize>,
    /// Of them so many of one address; `None`: any number.
    pub max_connections_per_address: Option<usize>,
    /// WebSocket handshakes that begin in a second; `None`: any number.
    pub handshakes_per_second: Option<u32>,
    /// Those of one address; `None`: any number.
    pub handshakes_per_address: Option<Pace>,
    /// The longest that a handshake is delayed for that rate.
    pub handshake_delay: Duration,
    /// For the whole process and its sockets.
    pub memory: Memory,
}

/// The limit of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// What the cgroup allows, or `RLIMIT_AS`; none when neither limits it.
    Auto,
    /// None.
    Off,
    /// So many bytes.
    Limit(u64),
}

/// Why a client was turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// As many connections as `limits.max_connections` allows.
    MaxConnections,
    /// `limits.memory` is nearly used up.
    Memory,
    /// No descriptor was left for it, in spite of the budget.
    Descriptors,
    /// No port was left toward the backend.
    Ports,
    /// Its handshake would have had to wait longer than `limits.handshake_delay`.
    Rate,
    /// As many wait for the backend as `upstream.max_waiting` allows.
    MaxWaiting,
    /// It waited for its turn at the backend for `upstream.queue_timeout`.
    QueueTimeout,
    /// It waited as long for one of the connections that WebSockets share.
    PoolFull,
    /// Its route has as many WebSockets that clients share as `pool.max_keys` allows.
    PoolKeys,
    /// Its route shows the backend as many who want to join a shared WebSocket (`pool.authorize`) as may be, or the backend has no turn for it.
    Authorize,
    /// Its address has as many connections as `limits.max_connections_per_address` allows.
    AddressConnections,
    /// Its address has begun as many handshakes as `limits.handshakes_per_address` allows.
    AddressRate,
    /// Its route has as many sessions as its `max_sessions` allows.
    RouteSessions,
}

impl Reason {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 13] = [
        Self::MaxConnections,
        Self::Memory,
        Self::Descriptors,
        Self::Ports,
        Self::Rate,
        Self::MaxWaiting,
        Self::QueueTimeout,
        Self::PoolFull,
        Self::PoolKeys,
        Self::Authorize,
        Self::AddressConnections,
        Self::AddressRate,
        Self::RouteSessions,
    ];

    /// For metrics and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::MaxConnections => "max_connections",
            Self::Memory => "memory",
            Self::Descriptors => "descriptors",
            Self::Ports => "ports",
            Self::Rate => "rate",
            Self::MaxWaiting => "max_waiting",
            Self::QueueTimeout => "queue_timeout",
            Self::PoolFull => "pool_full",
            Self::PoolKeys => "pool_keys",
            Self::Authorize => "authorize",
            Self::AddressConnections => "address_connections",
            Self::AddressRate => "address_rate",
            Self::RouteSessions => "route_sessions",
        }
    }

    /// For whoever reads the log.
    pub const fn fix(self) -> &'static str {
        match self {
            Self::MaxConnections => "raise limits.max_connections, or run more replicas",
            Self::Memory => "raise the memory limit (the container's, or limits.memory), or run more replicas",
            Self::Descriptors => {
                "raise RLIMIT_NOFILE (ulimit -n, or the container runtime's); `tidegate doctor` says how"
            }
            Self::Ports => "name more addresses of this host in upstream.source_addresses, or use a Unix socket",
            Self::Rate => "limits.handshakes_per_second is at work",
            Self::MaxWaiting => "the backend is slow to answer; raise upstream.max_waiting if they may wait",
            Self::QueueTimeout => {
                "the backend is slow to answer; raise upstream.max_pending if it can bear more at once"
            }
            Self::PoolFull => "raise pool.max_connections or pool.max_streams",
            Self::Authorize => {
                "clients join faster than the backend judges them (pool.authorize): it is slow to answer, or too many come at once"
            }
            Self::PoolKeys => "raise pool.max_keys of the route, if its backend can bear as many WebSockets",
            Self::RouteSessions => "raise max_sessions of the route, if its backend can bear more",
            Self::AddressConnections => {
                "limits.max_connections_per_address is at work; raise it if many sit behind this address (a NAT), or name it in \
                 http.trusted_proxies if it is a proxy of yours"
            }
            Self::AddressRate => {
                "limits.handshakes_per_address is at work; raise it if many sit behind this address (a NAT), or name it in \
                 http.trusted_proxies if it is a proxy of yours"
            }
        }
    }

    /// For the client: what it can make of it, and nothing about this host.
    pub const fn told(self) -> &'static str {
        match self {
            Self::MaxConnections | Self::Memory | Self::Descriptors | Self::Ports => "no room for another connection",
            Self::Rate | Self::AddressRate => "too many handshakes at once",
            Self::AddressConnections => "too many connections of one address",
            Self::RouteSessions => "too many sessions for this path",
            Self::MaxWaiting | Self::QueueTimeout | Self::PoolFull | Self::PoolKeys | Self::Authorize => {
                "too many requests are waiting for the backend"
            }
        }
    }
}

/// What a connection takes in memory, in bytes: 3 KiB of ours for a session at rest and 12 for a plain connection that is
/// kept alive, the rest the kernel's two sockets.
pub const CONNECTION_BYTES: u64 = 16 << 10;

/// What TLS with its client adds to that: keys and buffers, measured at 8 KiB for a session at rest. A handshake that is under way
/// takes 14 before there is anything else.
pub const TLS_BYTES: u64 = 12 << 10;

/// What a connection takes in memory.
pub const fn connection_bytes(has_tls: bool) -> u64 {
    if has_tls { CONNECTION_BYTES + TLS_BYTES } else { CONNECTION_BYTES }
}

/// A place is for two sockets, and each of them may linger without the other.
const HALVES: u8 = 2;

/// The part of all places that is to be free while sessions wait only for their `close.delay`.
const FEW: usize = 16;

/// Until the place of such a session is free: how often, and at which interval, a client that found none tries again. In all as long as a 503
/// tells it to stay away (`Retry-After`).
const TRIES: (u32, Duration) = (100, Duration::from_millis(10));

/// Per cent of the memory limit: from the first on nobody more is let in, below the second all are again; in between they are
/// little by little.
const MEMORY_FULL: u64 = 90;
const MEMORY_EASY: u64 = 80;

/// What there is to give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Client connections.
    pub connections: usize,
    /// Clients that are being turned away.
    pub turned_away: usize,
    /// Bytes for connections; `None`: no limit.
    pub memory: Option<u64>,
    /// Bytes for each.
    pub connection_bytes: u64,
    /// What to say when there is no place for another connection: what their number follows from.
    pub full: Reason,
}

/// Memory beyond that of a place, until it is dropped.
#[derive(Debug)]
pub struct Extra {
    inner: Arc<Inner>,
    memory: u64,
}

/// The one who lets in; clones are the same.
#[derive(Debug, Clone)]
pub struct Admission {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    full: Reason,
    connections: Arc<Semaphore>,
    turned_away: Arc<Semaphore>,
    /// A place was given back.
    freed: Notify,
    /// Those who have places that they can do without.
    spares: RwLock<Vec<Weak<dyn Spares>>>,
    delays: Arc<Delays>,
    /// Halves of places: with fewer of them to be had, delays are cut short.
    few: usize,
    /// Clients that wait for the place of a session whose delay was cut short.
    late: Semaphore,
    memory: Option<Reserved>,
    /// Of it for each connection that comes.
    connection_bytes: AtomicU64,
    reserve: Mutex<Reserve>,
    /// It could not be taken again: others had all descriptors.
    lacks_reserve: AtomicBool,
    rate: Mutex<Option<Rate>>,
    addresses: Arc<Addresses>,
}

/// Who keeps places that are worth less than a new client's.
pub trait Spares: fmt::Debug + Send + Sync {
    /// How many.
    fn count(&self) -> usize;

    /// Gives one back; false: there is none.
    fn give_one_up(&self) -> bool;
}

/// Memory that was promised to connections.
#[derive(Debug)]
struct Reserved {
    budget: u64,
    bytes: AtomicU64,
    /// At most `budget`; lower when what is really used came close to the limit.
    ceiling: AtomicU64,
    /// What was used when the ceiling was last lowered.
    used: AtomicU64,
}

/// A connection's place, until its last socket is closed.
#[derive(Debug)]
pub struct Place {
    inner: Arc<Inner>,
    /// In bytes.
    memory: u32,
    /// Of a place among the connections, or, if it is `refused`, places among those who are turned away.
    halves: u8,
    /// It has the descriptor that was kept in reserve.
    has_reserve: bool,
    /// It is in the count of its address, which is this one.
    is_visitor: bool,
    visitor: u64,
    /// Why it gets a 503 and nothing else.
    pub refused: Option<Reason>,
}

impl Admission {
    /// Everything is free. The reserve descriptor is taken now.
    pub fn new(capacity: Capacity, config: &Config) -> Self {
        let slots = |count: usize| Arc::new(Semaphore::new(count.min(Semaphore::MAX_PERMITS)));
        let memory = capacity.memory.map(|budget| Reserved {
            budget,
            bytes: AtomicU64::new(0),
            ceiling: AtomicU64::new(budget),
            used: AtomicU64::new(0),
        });
        let rate = Mutex::new(Rate::of(config, None));
        let inner = Inner {
            full: capacity.full,
            connections: slots(capacity.connections.saturating_mul(HALVES as usize)),
            turned_away: slots(capacity.turned_away),
            freed: Notify::new(),
            spares: RwLock::default(),
            delays: Arc::default(),
            few: (capacity.connections / FEW).max(1) * HALVES as usize,
            late: Semaphore::new(capacity.turned_away.div_ceil(2)),
            memory,
            connection_bytes: AtomicU64::new(capacity.connection_bytes),
            reserve: Mutex::new(Reserve { file: open_any(), is_in_use: false }),
            lacks_reserve: AtomicBool::new(false),
            rate,
            addresses: Arc::new(Addresses::new()),
        };
        let this = Self { inner: Arc::new(inner) };
        this.limit_addresses(config);
        this
    }

    fn limit_addresses(&self, config: &Config) {
        let inner = &self.inner;
        let is_new = inner.addresses.set(config.max_connections_per_address, config.handshakes_per_address);
        // It is there, so it counts, whatever else there is.
        if is_new && let Some(memory) = &inner.memory {
            memory.bytes.fetch_add(TABLE_BYTES, Ordering::Relaxed);
        }
    }

    /// Counts a connection of `ip`, until its place is given back or only lingers. False: there are as many as there may be, and it is to be
    /// turned away: for that it has another place now, if it has any.
    pub fn count_address(&self, ip: IpAddr, place: &mut Place) -> bool {
        if let Ok(visitor) = self.inner.addresses.connect(ip) {
            place.forget_address();
            (place.is_visitor, place.visitor) = (visitor.is_some(), visitor.unwrap_or_default());
            return true;
        }
        // One address must not have the places of all while it is told so.
        let halves = u8::from(self.inner.turn_away());
        *place = self.place(halves, 0, Some(Reason::AddressConnections));
        false
    }

    /// A handshake of `ip`. `Err`: not before so much time has passed.
    pub fn pace_address(&self, ip: IpAddr) -> Result<(), Duration> {
        self.inner.addresses.handshake(ip, Instant::now())
    }

    /// A place for a connection that is about to be accepted, be it for an answer that turns it away; `None`: not even that.
    pub fn enter(&self) -> Option<Place> {
        let inner = &self.inner;
        let reason = match self.reserve_memory() {
            Some(bytes) => {
                loop {
                    if let Ok(permit) = inner.connections.try_acquire_many(u32::from(HALVES)) {
                        permit.forget();
                        return Some(self.place(HALVES, bytes, None));
                    }
                    if !self.make_room() {
                        break;
                    }
                }
                inner.give_back(u64::from(bytes));
                inner.full
            }
            None => Reason::Memory,
        };
        inner.turn_away().then(|| self.place(1, 0, Some(reason)))
    }

    /// A client was accepted, with this place: when few are left, sessions that only wait for their `close.delay` are to make room for the
    /// next one, or for this.
    pub fn accepted(&self, place: &Place) {
        let inner = &self.inner;
        let free = inner.connections.available_permits();
        if place.refused.is_some() || free < inner.few && free + self.spare_halves() < inner.few {
            self.end_delays();
        }
    }

    /// A place's worth of them, the oldest; false: there is none.
    fn end_delays(&self) -> bool {
        // One place is for two sockets, and who has lost its client has one.
        let mut halves = 0;
        while halves < HALVES as usize
            && let Some(sockets) = self.inner.delays.end_oldest()
        {
            halves += sockets.max(1);
        }
        halves > 0
    }

    /// A place for a client that got none at first: one that is free by now, or that of a session whose delay was cut short; `None`: there
    /// is none.
    pub async fn enter_late(&self) -> Option<Place> {
        let served = || self.enter().filter(|place| place.refused.is_none());
        // The places of those who are turned away are for clients that get their answer now.
        let Ok(_waiting) = self.inner.late.try_acquire() else { return served() };
        let (tries, interval) = TRIES;
        for _ in 0..tries {
            // In this order: whoever leaves gives his place back before.
            let is_coming = self.inner.delays.is_any_leaving();
            if let Some(place) = served() {
                return Some(place);
            }
            // Places that became free for those who wait may have gone to clients that came later.
            if !is_coming && !self.end_delays() {
                return None;
            }
            sleep(interval).await;
        }
        served()
    }

    /// Where sessions in their `close.delay` are found.
    pub fn delays(&self) -> Arc<Delays> {
        Arc::clone(&self.inner.delays)
    }

    /// Resolves when [`Self::enter`] is worth another try. Of several that wait one is woken for each place; when it has
    /// no use for it, the next one is.
    pub async fn room(&self) {
        self.inner.freed.notified().await;
    }

    /// `spares` is asked for a place when there is none for a new client.
    pub fn ask_for_room(&self, spares: Weak<dyn Spares>) {
        self.inner.spares.write().unwrap_or_else(PoisonError::into_inner).push(spares);
    }

    fn spare_halves(&self) -> usize {
        let spares = self.inner.spares.read().unwrap_or_else(PoisonError::into_inner);
        spares.iter().filter_map(Weak::upgrade).map(|spares| spares.count()).sum()
    }

    fn make_room(&self) -> bool {
        let spares = self.inner.spares.read().unwrap_or_else(PoisonError::into_inner);
        let with_most = spares.iter().filter_map(Weak::upgrade).max_by_key(|spares| spares.count());
        with_most.is_some_and(|spares| spares.give_one_up())
    }

    /// Memory for what a connection takes beyond its own; `None`: there is not enough.
    pub fn more_memory(&self, bytes: u64) -> Option<Extra> {
        let Some(memory) = &self.inner.memory else { return Some(Extra { inner: Arc::clone(&self.inner), memory: 0 }) };
        memory.take(bytes).then(|| Extra { inner: Arc::clone(&self.inner), memory: bytes })
    }

    fn place(&self, halves: u8, memory: u32, refused: Option<Reason>) -> Place {
        Place::new(&self.inner, halves, memory, refused)
    }

    /// For one connection; `None`: there is not enough.
    fn reserve_memory(&self) -> Option<u32> {
        match &self.inner.memory {
            None => Some(0),
            Some(memory) => {
                let bytes = self.inner.connection_bytes.load(Ordering::Relaxed);
                let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
                memory.take(u64::from(bytes)).then_some(bytes)
            }
        }
    }

    /// Gives up the descriptor that is kept in reserve, so that the head of the accept queue can be turned away although
    /// there is no other; `None` when it is in use.
    pub fn last_resort(&self) -> Option<Place> {
        let mut reserve = lock(&self.inner.reserve);
        if reserve.is_in_use {
            return None;
        }
        // Another thread may have been faster when it was to be opened again.
        reserve.file.take().or_else(open_any)?;
        reserve.is_in_use = true;
        drop(reserve);
        let mut place = self.place(0, 0, Some(Reason::Descriptors));
        place.has_reserve = true;
        Some(place)
    }

    /// How long a handshake has to wait for its turn at the configured rate; `Err`: too long.
    pub fn pace(&self) -> Result<Duration, Reason> {
        match &mut *lock(&self.inner.rate) {
            None => Ok(Duration::ZERO),
            Some(rate) => rate.next(Instant::now()).ok_or(Reason::Rate),
        }
    }

    /// Another rate from now on; whoever has his moment keeps it. So many bytes are promised to each who comes. Everything else is
    /// given out once, by the budget.
    pub fn reconfigure(&self, config: &Config, connection_bytes: u64) {
        self.inner.connection_bytes.store(connection_bytes, Ordering::Relaxed);
        self.limit_addresses(config);
        let mut rate = lock(&self.inner.rate);
        *rate = Rate::of(config, rate.as_ref());
    }

    /// What is used now of what may be used at all. To be told every so often; lowers and lifts what is given.
    pub fn observe_memory(&self, used: u64, limit: u64) {
        if self.inner.memory.as_ref().is_some_and(|memory| memory.observe(used, limit)) {
            self.inner.freed.notify_waiters();
        }
    }

    /// Bytes that are promised to connections, and how many may be.
    pub fn memory(&self) -> Option<(u64, u64)> {
        let memory = self.inner.memory.as_ref()?;
        Some((memory.bytes.load(Ordering::Relaxed), memory.ceiling.load(Ordering::Relaxed)))
    }
}

impl Place {
    fn new(inner: &Arc<Inner>, halves: u8, memory: u32, refused: Option<Reason>) -> Self {
        let inner = Arc::clone(inner);
        Self { inner, memory, halves, has_reserve: false, is_visitor: false, visitor: 0, refused }
    }

    fn forget_address(&mut self) {
        if std::mem::take(&mut self.is_visitor) {
            self.inner.addresses.leave(self.visitor);
        }
    }

    /// Half of it, for one of the two sockets of a session that lingers before the other: it takes a descriptor and no memory
    /// that was promised. `None`: it has no two.
    pub fn split(&mut self) -> Option<Self> {
        self.halves = self.halves.checked_sub(1).filter(|left| *left > 0)?;
        Some(Self::new(&self.inner, 1, 0, self.refused))
    }

    /// What its last socket needs while it lingers.
    #[must_use]
    pub fn last_half(mut self) -> Self {
        let spare = self.split();
        self.forget_address();
        self.inner.give_back(u64::from(std::mem::take(&mut self.memory)));
        drop(spare);
        self
    }

    /// There is none, not even for an answer.
    pub fn is_nothing(&self) -> bool {
        self.halves == 0 && !self.has_reserve
    }

    /// It has the descriptor that was kept in reserve.
    pub fn is_last_resort(&self) -> bool {
        self.has_reserve
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.forget_address();
        self.inner.give_back(u64::from(self.memory));
        if self.has_reserve {
            self.inner.take_reserve(&mut lock(&self.inner.reserve));
        } else if self.inner.lacks_reserve.load(Ordering::Relaxed) {
            let mut reserve = lock(&self.inner.reserve);
            if !reserve.is_in_use && reserve.file.is_none() {
                self.inner.take_reserve(&mut reserve);
            }
        }
        // Given back before somebody is told.
        let slots = if self.refused.is_some() { &self.inner.turned_away } else { &self.inner.connections };
        slots.add_permits(usize::from(self.halves));
        self.inner.freed.notify_one();
    }
}

impl Drop for Extra {
    fn drop(&mut self) {
        self.inner.give_back(self.memory);
        self.inner.freed.notify_one();
    }
}

impl Inner {
    /// When there is none now, whoever gives his own descriptor back tries again.
    fn take_reserve(&self, reserve: &mut Reserve) {
        *reserve = Reserve { file: open_any(), is_in_use: false };
        self.lacks_reserve.store(reserve.file.is_none(), Ordering::Relaxed);
    }

    /// A place among those who are turned away; false: there is none.
    fn turn_away(&self) -> bool {
        self.turned_away.try_acquire().map(SemaphorePermit::forget).is_ok()
    }

    fn give_back(&self, bytes: u64) {
        if let Some(memory) = &self.memory {
            memory.bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}

impl Reserved {
    fn take(&self, bytes: u64) -> bool {
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let fits = before.saturating_add(bytes) <= self.ceiling.load(Ordering::Relaxed);
        if !fits {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        fits
    }

    /// Memory that the allocator has and does not use counts as used, so a full reading does not say that those who are in
    /// must become fewer; only that they must not become more.
    ///
    /// True when there is more to give than before.
    fn observe(&self, used: u64, limit: u64) -> bool {
        let share = used.saturating_mul(100) / limit.max(1);
        let ceiling = self.ceiling.load(Ordering::Relaxed);
        if share >= MEMORY_FULL {
            let promised = self.bytes.load(Ordering::Relaxed);
            let before = self.used.load(Ordering::Relaxed);
            let mut lower = ceiling.min(promised);
            // Still growing, by more than noise: what was promised turned out to be more.
            if used > before.saturating_add(limit / 100) {
                self.used.store(used, Ordering::Relaxed);
                lower -= lower / 16;
            }
            self.ceiling.store(lower.max(self.budget / 16), Ordering::Relaxed);
            return false;
        }
        self.used.store(0, Ordering::Relaxed);
        let higher = if share < MEMORY_EASY { self.budget } else { (ceiling + self.budget / 64).min(self.budget) };
        self.ceiling.store(higher, Ordering::Relaxed);
        higher > ceiling
    }
}

/// Handshakes at an even pace: each has its moment, the next one is an interval later. A pause is not saved up, so
/// there are no bursts.
#[derive(Debug)]
struct Rate {
    interval: Duration,
    longest: Duration,
    /// The first moment that nobody has.
    free: Option<Instant>,
}

impl Rate {
    /// What is configured, if anything; the first moment is free that was free `before`.
    fn of(config: &Config, before: Option<&Self>) -> Option<Self> {
        let rate = Self::new(config.handshakes_per_second?, config.handshake_delay);
        // Those who wait have their moments; who comes now need not wait as long as the old rate made it.
        let next = Instant::now() + rate.interval;
        Some(Self { free: before.and_then(|before| before.free).map(|free| free.min(next)), ..rate })
    }

    fn new(per_second: u32, longest: Duration) -> Self {
        Self { interval: Duration::from_secs(1) / per_second.max(1), longest, free: None }
    }

    fn next(&mut self, now: Instant) -> Option<Duration> {
        let moment = self.free.map_or(now, |free| free.max(now));
        let delay = moment - now;
        if delay > self.longest {
            return None;
        }
        self.free = Some(moment + self.interval);
        Some(delay)
    }
}

/// A descriptor for the worst case.
#[derive(Debug)]
struct Reserve {
    file: Option<File>,
    is_in_use: bool,
}

/// Any file will do.
fn open_any() -> Option<File> {
    File::open("/dev/null").ok()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Nothing under these locks can panic half-way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
