//! The pool's state and its one kind of lock. Every change goes the same way: lock the shard of the key, one step of the
//! core, unlock, carry out what it said.
//!
//! Under the lock nothing is sent, woken, spawned, logged, opened or closed, and nothing of the connector is called or
//! dropped; of the key only `Eq`, `Hash`, `Clone` and `Drop`. Lock order: a shard's lock and that of the timers are never held
//! together, nor those of two shards. Since two threads may carry out in another order than they stepped in, each action
//! must be right then too: a reference is owned before its waiter hears of it, a timer says which one it was.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    AcquireError, Config, Connector, Key, Lease, Opened, Report, Reports,
    core::{Action, Cause, Entry, Env, Event, How, Id, Ids, OpenError, Refusal, State, Timer},
    stats::{Census, Stats},
    sync::{Mutex, MutexGuard, Tasks, lock, oneshot, within},
    timers::Timers,
};

/// So that pools that many threads share are not one lock.
#[cfg(not(loom))]
const SHARDS: usize = 16;
#[cfg(loom)]
const SHARDS: usize = 1;

/// What a waiter gets.
pub(super) type Answer<K, C> = Result<(Lease<K, C>, How), AcquireError<<C as Connector<K>>::Error>>;
type CoreEvent<K, C> = Event<Arc<<C as Connector<K>>::Error>>;

pub(super) struct Shared<K: Key, C: Connector<K>> {
    shards: [Mutex<Shard<K, C>>; SHARDS],
    hasher: RandomState,
    connector: C,
    tasks: Tasks,
    pub(super) timers: Arc<Timers<K>>,
    pub(super) stats: Arc<Stats>,
    /// Keys of which anything is remembered, or is still to be carried out.
    keys: AtomicUsize,
    /// Of these, those with more than a failure.
    busy: AtomicUsize,
    /// Every shard has been told.
    closing: AtomicBool,
    /// It was closed, and nothing is left; or nobody has it any more.
    pub(super) closed: CancellationToken,
}

pub(super) struct Shard<K: Key, C: Connector<K>> {
    pub(super) cells: HashMap<K, Cell<K, C>>,
    ids: Ids,
    config: Config,
    closing: bool,
}

/// A key's state machine, and who is behind the numbers in it.
pub(super) struct Cell<K: Key, C: Connector<K>> {
    pub(super) entry: Entry<Arc<C::Error>>,
    waiters: HashMap<Id, oneshot::Sender<Answer<K, C>>>,
    connections: HashMap<Id, Arc<Connection<K, C>>>,
    /// Calls off the open that is under way.
    abort: Option<CancellationToken>,
}

/// One that was opened. The pool has it until it is closed, each lease until it is dropped.
pub(super) struct Connection<K, C: Connector<K>> {
    pub(super) key: K,
    pub(super) slot: Id,
    pub(super) handle: C::Connection,
    pub(super) closed: CancellationToken,
    /// Counted apart from the core, which is checked by it.
    leases: AtomicUsize,
}

/// What is carried out without the lock.
enum Effect<K: Key, C: Connector<K>> {
    Open { slot: Id, abort: CancellationToken, timeout: Duration },
    Abort(CancellationToken),
    Answer(oneshot::Sender<Answer<K, C>>, Answer<K, C>),
    Close { connection: Arc<Connection<K, C>>, cause: Cause },
    Arm { at: std::time::Instant, generation: Id, timer: Timer },
    Disarm { at: std::time::Instant, generation: Id },
    Violation(&'static str),
}

impl<K: Key, C: Connector<K>> Default for Cell<K, C> {
    fn default() -> Self {
        Self { entry: Entry::default(), waiters: HashMap::new(), connections: HashMap::new(), abort: None }
    }
}

impl<K: Key, C: Connector<K>> Cell<K, C> {
    fn census(&self) -> Census {
        let mut census = Census { keys: i64::from(!self.entry.is_empty()), ..Census::default() };
        let signed = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        for (_, slot) in self.entry.slots() {
            census.connections[slot.state.index()] += 1;
            census.references += signed(slot.refs);
        }
        census.waiters = signed(self.entry.waiters());
        census
    }
}

impl State {
    /// Where it stands in [`super::stats::STATES`].
    pub(super) const fn index(self) -> usize {
        match self {
            Self::Opening => 0,
            Self::Open => 1,
            Self::Idle { .. } => 2,
            Self::Draining => 3,
            Self::Closed => 4,
        }
    }
}

impl<K: Key, C: Connector<K>> Shared<K, C> {
    pub(super) fn new(config: Config, connector: C, stats: Arc<Stats>, tasks: Tasks) -> Arc<Self> {
        Arc::new(Self {
            shards: std::array::from_fn(|index| {
                // Numbers are unique in the whole pool.
                let ids = Ids::new(index as Id, SHARDS as Id);
                Mutex::new(Shard { cells: HashMap::new(), ids, config, closing: false })
            }),
            hasher: RandomState::new(),
            connector,
            tasks,
            timers: Arc::new(Timers::new()),
            stats,
            keys: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
            closed: CancellationToken::new(),
        })
    }

    /// Each shard under its lock, one after the other.
    pub(super) fn shards(&self) -> impl Iterator<Item = MutexGuard<'_, Shard<K, C>>> {
        self.shards.iter().map(lock)
    }

    #[expect(clippy::cast_possible_truncation, reason = "any bits of it will do")]
    fn shard(&self, key: &K) -> MutexGuard<'_, Shard<K, C>> {
        lock(&self.shards[self.hasher.hash_one(key) as usize % SHARDS])
    }

    pub(super) fn keys(&self) -> usize {
        self.keys.load(Ordering::Relaxed)
    }

    pub(super) fn busy(&self) -> usize {
        self.busy.load(Ordering::Relaxed)
    }

    pub(super) fn look(&self, key: &K, at: impl Fn(&Entry<Arc<C::Error>>) -> bool) -> bool {
        self.shard(key).cells.get(key).is_some_and(|cell| at(&cell.entry))
    }

    /// Asks for a reference; the answer may be there at once. Gives the waiter's number.
    pub(super) fn ask(self: &Arc<Self>, key: &K) -> (Id, oneshot::Receiver<Answer<K, C>>, Duration) {
        let (sender, receiver) = oneshot::channel();
        let (mut waiter, mut max_wait) = (0, Duration::ZERO);
        self.apply_with(key, |cell, ids, config| {
            waiter = ids.next();
            max_wait = config.max_wait;
            cell.waiters.insert(waiter, sender);
            Event::Acquire { waiter }
        });
        (waiter, receiver, max_wait)
    }

    pub(super) fn apply(self: &Arc<Self>, key: &K, event: CoreEvent<K, C>) {
        self.apply_with(key, |_, _, _| event);
    }

    fn apply_with(
        self: &Arc<Self>,
        key: &K,
        event: impl FnOnce(&mut Cell<K, C>, &mut Ids, &Config) -> CoreEvent<K, C>,
    ) {
        // Before the lock: a clock is no user's code, but takes its time.
        let (now, jitter) = (Instant::now().into_std(), rand::random());
        let (effects, is_forgotten) = {
            let mut shard = self.shard(key);
            let Shard { cells, ids, config, closing } = &mut *shard;
            if !cells.contains_key(key) {
                cells.insert(key.clone(), Cell::default());
            }
            let cell = cells.get_mut(key).expect("it was just put there");
            let (before, was_busy) = (cell.census(), cell.entry.is_busy());
            let event = event(cell, ids, config);
            let mut actions = Vec::new();
            let mut env = Env { now, jitter, limits: &config.limits, closing: *closing, ids };
            cell.entry.step(event, &mut env, &mut actions);
            let effects = self.effects(cell, actions, config);
            let (after, is_busy) = (cell.census(), cell.entry.is_busy());
            match (was_busy, is_busy) {
                (false, true) => _ = self.busy.fetch_add(1, Ordering::Relaxed),
                (true, false) => _ = self.busy.fetch_sub(1, Ordering::Relaxed),
                _ => {}
            }
            if after.keys == 0 {
                cells.remove(key);
            }
            self.stats.change(&before, &after);
            if (before.keys, after.keys) == (0, 1) {
                self.keys.fetch_add(1, Ordering::SeqCst);
            }
            (effects, (before.keys, after.keys) == (1, 0))
        };
        for effect in effects {
            self.carry_out(key, effect);
        }
        // Only now: who waits for the pool to be closed may rely on every connection having been closed.
        if is_forgotten {
            self.keys.fetch_sub(1, Ordering::SeqCst);
        }
        self.look_whether_closed();
    }

    /// Says in terms of senders and connections what the core said in numbers.
    fn effects(
        self: &Arc<Self>,
        cell: &mut Cell<K, C>,
        actions: Vec<Action<Arc<C::Error>>>,
        config: &Config,
    ) -> Vec<Effect<K, C>> {
        let mut effects = Vec::with_capacity(actions.len());
        for action in actions {
            let effect = match action {
                Action::StartOpen { slot } => {
                    let abort = CancellationToken::new();
                    cell.abort = Some(abort.clone());
                    Some(Effect::Open { slot, abort, timeout: config.open_timeout })
                }
                Action::AbortOpen { .. } => cell.abort.take().map(Effect::Abort),
                Action::Grant { waiter, slot, how } => {
                    cell.waiters.remove(&waiter).zip(cell.connections.get(&slot)).map(|(sender, connection)| {
                        connection.leases.fetch_add(1, Ordering::Relaxed);
                        let lease = Lease { shared: Arc::clone(self), connection: Arc::clone(connection) };
                        Effect::Answer(sender, Ok((lease, how)))
                    })
                }
                Action::Fail { waiter, why } => cell.waiters.remove(&waiter).map(|sender| {
                    let error = match why {
                        Refusal::Open(error) => AcquireError::Open(error),
                        Refusal::Full => AcquireError::Full,
                        Refusal::Closing => AcquireError::Closing,
                    };
                    Effect::Answer(sender, Err(error))
                }),
                Action::Close { slot, cause } => cell.connections.remove(&slot).map(|connection| {
                    if cause != Cause::Peer && connection.leases.load(Ordering::Relaxed) > 0 {
                        effects.push(Effect::Violation("a connection in use is closed"));
                    }
                    Effect::Close { connection, cause }
                }),
                Action::ArmTimer { timer, generation, at } => Some(Effect::Arm { at, generation, timer }),
                Action::DisarmTimer { generation, at } => Some(Effect::Disarm { at, generation }),
            };
            effects.push(effect.unwrap_or(Effect::Violation("the core speaks of what is not there")));
        }
        effects.extend(cell.entry.violation(&config.limits).map(Effect::Violation));
        effects
    }

    fn carry_out(self: &Arc<Self>, key: &K, effect: Effect<K, C>) {
        match effect {
            Effect::Open { slot, abort, timeout } => self.open(key.clone(), slot, abort, timeout),
            Effect::Abort(abort) => abort.cancel(),
            // A waiter that has left does not take it: then a lease is dropped here, which locks again.
            Effect::Answer(sender, answer) => drop(sender.send(answer)),
            Effect::Close { connection, cause } => {
                connection.closed.cancel();
                if cause == Cause::Idle {
                    self.stats.idle_close();
                }
                if cause != Cause::Peer {
                    self.connector.close(key, &connection.handle);
                }
            }
            Effect::Arm { at, generation, timer } => self.timers.arm(at, generation, key.clone(), timer),
            Effect::Disarm { at, generation } => self.timers.disarm(at, generation),
            Effect::Violation(what) => {
                self.stats.violation();
                tracing::error!(what, "an invariant of the pool does not hold; this is a mistake in tidegate");
            }
        }
    }

    /// Lets timers fire until the pool is closed or dropped.
    #[cfg(not(loom))]
    pub(super) fn start_timers(self: &Arc<Self>) {
        let (pool, timers, closed) = (Arc::downgrade(self), Arc::clone(&self.timers), self.closed.clone());
        self.tasks.spawn(async move {
            loop {
                let next = timers.next();
                let sleep = async {
                    match next {
                        Some(next) => tokio::time::sleep_until(next.into()).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = closed.cancelled() => return,
                    () = timers.changed() => continue,
                    () = sleep => {}
                }
                let Some(pool) = pool.upgrade() else { return };
                pool.fire(Instant::now().into_std());
            }
        });
    }

    /// Lets those fire that are due.
    pub(super) fn fire(self: &Arc<Self>, now: std::time::Instant) {
        for (key, timer, generation) in self.timers.due(now) {
            self.apply(&key, Event::Timer { timer, generation });
        }
    }

    /// The failure that would be forgotten next is forgotten now.
    #[cfg(not(loom))]
    pub(super) fn forget_failure(self: &Arc<Self>) {
        if let Some((key, timer, generation)) = self.timers.take_failure() {
            self.apply(&key, Event::Timer { timer, generation });
        }
    }

    /// Opens a connection in a task of its own, which answers the core whatever happens to it.
    fn open(self: &Arc<Self>, key: K, slot: Id, abort: CancellationToken, timeout: Duration) {
        let opening = Opening { shared: Arc::clone(self), key, slot, is_answered: false };
        self.tasks.spawn(async move {
            let reports = opening.reports();
            let result = tokio::select! {
                biased;
                () = abort.cancelled() => Err(OpenError::Aborted),
                result = within(timeout, opening.shared.connector.open(&opening.key, reports)) => match result {
                    Some(result) => result.map_err(|error| OpenError::Failed(Arc::new(error))),
                    None => Err(OpenError::TimedOut),
                },
            };
            opening.answer(result);
        });
    }

    /// Nothing is given out or opened from now on; what is idle is closed, and what is in use when it was given back.
    pub(super) fn close(self: &Arc<Self>) {
        for mut shard in self.shards() {
            shard.closing = true;
        }
        // No key comes from now on, so none can come after the last one went.
        self.closing.store(true, Ordering::SeqCst);
        self.tell_all();
        self.look_whether_closed();
    }

    fn tell_all(self: &Arc<Self>) {
        let keys: Vec<K> = self.shards().flat_map(|shard| shard.cells.keys().cloned().collect::<Vec<_>>()).collect();
        for key in &keys {
            self.apply(key, Event::Changed);
        }
    }

    fn look_whether_closed(&self) {
        if self.closing.load(Ordering::SeqCst) && self.keys.load(Ordering::SeqCst) == 0 {
            self.closed.cancel();
        }
    }
}

impl<K: Key, C: Connector<K>> Drop for Shared<K, C> {
    fn drop(&mut self) {
        // Ends the task of the timers.
        self.closed.cancel();
    }
}

impl<K, C: Connector<K>> Connection<K, C> {
    pub(super) fn leases(&self) -> usize {
        self.leases.load(Ordering::Relaxed)
    }

    /// A lease is about to be given back.
    pub(super) fn leave(&self) {
        self.leases.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An open that is under way: the core is told of its end also when its task panics or is dropped.
struct Opening<K: Key, C: Connector<K>> {
    shared: Arc<Shared<K, C>>,
    key: K,
    slot: Id,
    is_answered: bool,
}

impl<K: Key, C: Connector<K>> Opening<K, C> {
    fn reports(&self) -> Reports {
        // Not the pool itself: a connection must not keep alive what it belongs to.
        let (shared, key, slot): (Weak<_>, _, _) = (Arc::downgrade(&self.shared), self.key.clone(), self.slot);
        Reports(Box::new(move |report| {
            if let Some(shared) = shared.upgrade() {
                let event = match report {
                    Report::GoAway => {
                        shared.stats.goaway();
                        Event::GoAway { slot }
                    }
                    Report::Capacity(capacity) => Event::CapacityChanged { slot, capacity },
                    Report::Closed => Event::PeerClosed { slot },
                };
                shared.apply(&key, event);
            }
        }))
    }

    fn answer(mut self, result: Result<Opened<C::Connection>, OpenError<Arc<C::Error>>>) {
        self.is_answered = true;
        match result {
            Ok(opened) => self.succeed(opened),
            Err(error) => self.fail(error),
        }
    }

    fn succeed(&self, Opened { connection, capacity }: Opened<C::Connection>) {
        let Self { shared, key, slot, .. } = self;
        let connection = Arc::new(Connection {
            key: key.clone(),
            slot: *slot,
            handle: connection,
            closed: CancellationToken::new(),
            leases: AtomicUsize::new(0),
        });
        shared.stats.opened::<()>(Ok(()));
        shared.apply_with(key, |cell, _, _| {
            cell.abort = None;
            cell.connections.insert(*slot, connection);
            Event::Opened { slot: *slot, capacity }
        });
    }

    fn fail(&self, error: OpenError<Arc<C::Error>>) {
        self.shared.stats.opened(Err(&error));
        self.shared.apply_with(&self.key, |cell, _, _| {
            cell.abort = None;
            Event::OpenFailed { slot: self.slot, error }
        });
    }
}

impl<K: Key, C: Connector<K>> Drop for Opening<K, C> {
    fn drop(&mut self) {
        if !self.is_answered {
            self.fail(if std::thread::panicking() { OpenError::Panicked } else { OpenError::Aborted });
        }
    }
}
