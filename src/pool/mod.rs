//! Connections that many share: opened for the first who wants one, by nobody else meanwhile, shared by those who come,
//! and closed when the last of them has gone and nobody came for a while.
//!
//! Knows neither HTTP nor frames nor sockets: a [`Connector`] opens and closes, and what it opens tells by its
//! [`Reports`] what becomes of it. For what belongs to one session alone there is nothing to be shared, and no pool.
//!
//! ```text
//! mod.rs     what others use: Pool, Lease, Connector, Reports
//! shared.rs  the lock, and what is done about what the core says
//! core.rs    what is done about a key, as a state machine without I/O, lock or clock
//! timers.rs  one task for all that is waited for
//! stats.rs   what is counted
//! sync.rs    what loom puts itself in the place of
//! ```

pub mod core;
mod shared;
pub mod stats;
mod sync;
mod timers;

use std::{
    error::Error,
    fmt,
    hash::Hash,
    ops::Deref,
    sync::Arc,
    time::{Duration, Instant},
};

pub use self::core::{How, Id, Limits, OpenError};
use self::{
    core::Event,
    shared::{Answer, Connection, Shared},
    stats::{Refused, Stats},
    sync::{Tasks, oneshot, within},
};

/// What connections are told apart by. None of its code may take long: part of it runs under a lock.
pub trait Key: Clone + Eq + Hash + fmt::Display + Send + Sync + 'static {}

impl<T: Clone + Eq + Hash + fmt::Display + Send + Sync + 'static> Key for T {}

/// Opens connections and closes them. Never called under a lock, and may use the pool.
pub trait Connector<K>: Send + Sync + Sized + 'static {
    /// What leases give access to.
    type Connection: Send + Sync + 'static;
    /// All who waited get the same one.
    type Error: Error + Send + Sync + 'static;

    /// Runs in a task of its own. Dropped when it takes longer than `open_timeout`, or when the pool is closed. `reports` is
    /// for whoever sees what becomes of the connection, and to be dropped when that is over.
    fn open(
        &self,
        key: &K,
        reports: Reports,
    ) -> impl Future<Output = Result<Opened<Self::Connection>, Self::Error>> + Send;

    /// Nobody uses it any more: to be closed in an orderly way, by a task, since this may not block. Not called for those
    /// that reported their end. May be called from any thread, in no runtime, also while a panic unwinds: it must not panic.
    fn close(&self, key: &K, connection: &Self::Connection);
}

/// A new connection.
#[derive(Debug, Clone, Copy)]
pub struct Opened<T> {
    /// What leases give access to.
    pub connection: T,
    /// References that it may have at the same time. Of a change that was reported before, that is what counts.
    pub capacity: usize,
}

/// By which a connection says what becomes of it, from its own task. Dropped, it says that the connection has ended: so
/// that is known also when its task panics.
pub struct Reports(Box<dyn Fn(Report) + Send + Sync>);

/// See [`Reports`].
#[derive(Debug, Clone, Copy)]
enum Report {
    GoAway,
    Capacity(usize),
    Closed,
}

impl Reports {
    /// Nobody else is to come on it, by the backend's will or for its age; those who are stay.
    pub fn go_away(&self) {
        (self.0)(Report::GoAway);
    }

    /// References it may have from now on; more than these stay if they are there.
    pub fn capacity(&self, capacity: usize) {
        (self.0)(Report::Capacity(capacity));
    }
}

impl Drop for Reports {
    fn drop(&mut self) {
        (self.0)(Report::Closed);
    }
}

impl fmt::Debug for Reports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reports").finish_non_exhaustive()
    }
}

/// What a pool may do and take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// For each key.
    pub limits: Limits,
    /// An open that takes longer has failed.
    pub open_timeout: Duration,
    /// Nobody waits longer for a reference.
    pub max_wait: Duration,
}

/// Why there is no lease.
#[derive(Debug, thiserror::Error)]
pub enum AcquireError<E: Error + 'static> {
    /// No connection was opened: just now, or so shortly before that none is tried.
    #[error(transparent)]
    Open(OpenError<Arc<E>>),
    /// As many wait as may.
    #[error("too many wait for a connection")]
    Full,
    /// None was opened, and no reference given back, within `max_wait`.
    #[error("no connection was free in time")]
    Timeout,
    /// It is being closed.
    #[error("the pool is closed")]
    Closing,
}

impl<E: Error + 'static> Clone for AcquireError<E> {
    fn clone(&self) -> Self {
        match self {
            Self::Open(error) => Self::Open(error.clone()),
            Self::Full => Self::Full,
            Self::Timeout => Self::Timeout,
            Self::Closing => Self::Closing,
        }
    }
}

/// Clones are the same pool. To be closed before its tracker is waited for.
pub struct Pool<K: Key, C: Connector<K>> {
    shared: Arc<Shared<K, C>>,
}

impl<K: Key, C: Connector<K>> Clone for Pool<K, C> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<K: Key, C: Connector<K>> fmt::Debug for Pool<K, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").finish_non_exhaustive()
    }
}

impl<K: Key, C: Connector<K>> Pool<K, C> {
    /// Nothing is open. Its tasks run on `runtime`, whoever asks, and belong to `tracker`; `stats` may be shared with others.
    #[cfg(not(loom))]
    pub fn new(
        config: Config,
        connector: C,
        stats: Arc<Stats>,
        tracker: &tokio_util::task::TaskTracker,
        runtime: &tokio::runtime::Handle,
    ) -> Self {
        let tasks = Tasks { tracker: tracker.clone(), runtime: runtime.clone() };
        let shared = Shared::new(config, connector, stats, tasks);
        shared.start_timers();
        Self { shared }
    }

    /// A reference, as soon as there is one. May be dropped at any time.
    pub async fn acquire(&self, key: &K) -> Result<Lease<K, C>, AcquireError<C::Error>> {
        let begun = tokio::time::Instant::now();
        let mut waiting = Waiting::new(&self.shared, key);
        let answer = match waiting.answer() {
            Some(answer) => Some(answer),
            None => within(waiting.max_wait, waiting.answered()).await,
        };
        let Some(answer) = answer else {
            waiting.leaves_as = Refused::Timeout;
            return Err(AcquireError::Timeout);
        };
        let stats = &self.shared.stats;
        match &answer {
            Ok((_, how)) => stats.acquired(*how, begun.elapsed()),
            Err(AcquireError::Open(_)) => stats.refused(Refused::Failed),
            Err(AcquireError::Full) => stats.refused(Refused::Full),
            Err(AcquireError::Timeout) => stats.refused(Refused::Timeout),
            Err(AcquireError::Closing) => stats.refused(Refused::Closing),
        }
        answer.map(|(lease, _)| lease)
    }

    /// There is a reference for one more, at once and on a connection that is there.
    pub fn has_room(&self, key: &K) -> bool {
        self.shared.look(key, core::Entry::has_room)
    }

    /// Anything is remembered of the key.
    pub fn knows(&self, key: &K) -> bool {
        self.shared.look(key, |entry| !entry.is_empty())
    }

    /// Keys of which anything is remembered.
    pub fn keys(&self) -> usize {
        self.shared.keys()
    }

    /// There is a connection of the key, or somebody wants one.
    pub fn is_busy(&self, key: &K) -> bool {
        self.shared.look(key, core::Entry::is_busy)
    }

    /// Keys of which that is true.
    pub fn busy(&self) -> usize {
        self.shared.busy()
    }

    /// One less of the keys of which only a failure is remembered: that which would be forgotten next. For whoever bounds them.
    #[cfg(not(loom))]
    pub fn forget_failure(&self) {
        self.shared.forget_failure();
    }

    /// A connection is being opened.
    pub fn is_opening(&self, key: &K) -> bool {
        self.shared.look(key, core::Entry::is_opening)
    }

    /// Nothing is opened or given out from now on. Connections that nobody uses are closed at once, the others when they are
    /// given back.
    pub fn close(&self) {
        self.shared.close();
    }

    /// Resolves when it was closed, and every lease was given back.
    pub async fn closed(&self) {
        self.shared.closed.cancelled().await;
    }

    /// What there is, for people. Keys come one after the other, not all of the same moment.
    pub fn snapshot(&self) -> Vec<KeySnapshot> {
        let mut keys = Vec::new();
        for shard in self.shared.shards() {
            for (key, cell) in &shard.cells {
                let connections = cell.entry.slots().map(|(id, slot)| ConnectionSnapshot {
                    id,
                    state: stats::STATES[slot.state.index()],
                    references: slot.refs,
                    capacity: slot.capacity,
                });
                let fails_until = cell.entry.fails_until();
                keys.push((key.clone(), connections.collect(), cell.entry.waiters(), fails_until));
            }
        }
        // Without the lock, since it is the key's own code.
        keys.into_iter()
            .map(|(key, connections, waiters, fails_until)| KeySnapshot {
                key: key.to_string(),
                connections,
                waiters,
                fails_until,
            })
            .collect()
    }
}

/// A key at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeySnapshot {
    /// As it displays itself.
    pub key: String,
    /// Oldest first.
    pub connections: Vec<ConnectionSnapshot>,
    /// Those who wait for a reference.
    pub waiters: usize,
    /// The last open failed; until then none is tried.
    pub fails_until: Option<Instant>,
}

/// A connection at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionSnapshot {
    /// Ascends with the time of the opens of a key.
    pub id: Id,
    /// One of [`stats::STATES`].
    pub state: &'static str,
    /// Leases that are held.
    pub references: usize,
    /// As many as may be; `None`: not known yet.
    pub capacity: Option<usize>,
}

/// Somebody who waits; dropped, they don't any more.
struct Waiting<'a, K: Key, C: Connector<K>> {
    shared: &'a Arc<Shared<K, C>>,
    key: &'a K,
    waiter: Id,
    receiver: oneshot::Receiver<Answer<K, C>>,
    max_wait: Duration,
    is_answered: bool,
    /// Counted if it is dropped before it is answered.
    leaves_as: Refused,
}

impl<'a, K: Key, C: Connector<K>> Waiting<'a, K, C> {
    fn new(shared: &'a Arc<Shared<K, C>>, key: &'a K) -> Self {
        let (waiter, receiver, max_wait) = shared.ask(key);
        Self { shared, key, waiter, receiver, max_wait, is_answered: false, leaves_as: Refused::Cancelled }
    }

    /// The answer, if it is there.
    fn answer(&mut self) -> Option<Answer<K, C>> {
        let answer = self.receiver.try_recv().ok()?;
        self.is_answered = true;
        Some(answer)
    }

    async fn answered(&mut self) -> Answer<K, C> {
        // Nobody drops a waiter unanswered while there is a pool.
        let answer = (&mut self.receiver).await.unwrap_or(Err(AcquireError::Closing));
        self.is_answered = true;
        answer
    }
}

impl<K: Key, C: Connector<K>> Drop for Waiting<'_, K, C> {
    fn drop(&mut self) {
        // A lease that is on its way goes with the channel, and gives itself back.
        if !self.is_answered {
            self.shared.stats.refused(self.leaves_as);
            self.shared.apply(self.key, Event::Cancel { waiter: self.waiter });
        }
    }
}

/// A reference on a connection; dropped, it is given back, at once and in any case.
pub struct Lease<K: Key, C: Connector<K>> {
    shared: Arc<Shared<K, C>>,
    connection: Arc<Connection<K, C>>,
}

impl<K: Key, C: Connector<K>> Lease<K, C> {
    /// How many leases its connection has, this one among them.
    pub fn references(&self) -> usize {
        self.connection.leases()
    }

    /// Whether the connection has ended under it.
    pub fn is_closed(&self) -> bool {
        self.connection.closed.is_cancelled()
    }

    /// Resolves when the connection has ended under it.
    pub async fn closed(&self) {
        self.connection.closed.cancelled().await;
    }
}

impl<K: Key, C: Connector<K>> Deref for Lease<K, C> {
    type Target = C::Connection;

    fn deref(&self) -> &C::Connection {
        &self.connection.handle
    }
}

impl<K: Key, C: Connector<K>> Drop for Lease<K, C> {
    fn drop(&mut self) {
        self.connection.leave();
        self.shared.apply(&self.connection.key, Event::Release { slot: self.connection.slot });
    }
}

impl<K: Key, C: Connector<K>> fmt::Debug for Lease<K, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("connection", &self.connection.slot).finish_non_exhaustive()
    }
}

#[cfg(all(test, loom))]
mod loom;
#[cfg(all(test, not(loom)))]
mod tests;
