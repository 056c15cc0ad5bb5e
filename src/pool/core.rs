//! What the pool does about one key, as a state machine: events go in, actions come out.
//!
//! Not in it: I/O, locks, a clock, a log, random numbers. Connections and waiters are numbers here; who they are is for
//! the caller to know, who also carries the actions out, after unlocking.
//!
//! ```text
//!            StartOpen         Opened              the last reference goes
//! (nothing) ----------> Opening ------> Open ------------------------------> Idle --Timer--> (Close)
//!                          |             |  ^----------- Acquire --------------|
//!            OpenFailed    |             |-- GoAway -----> Draining -- the last reference goes --> (Close)
//! (backoff) <--------------|             |-- PeerClosed -> Closed ---- the last reference goes --> (nothing)
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

/// What a pool may take, for each of its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections that are opened, used or idle. Those that drain don't count: the backend wants others in their place.
    pub max_connections: usize,
    /// Those that wait for a connection or a free reference.
    pub max_waiters: usize,
    /// For how long a connection without a reference is kept; zero: not at all.
    pub idle_timeout: Duration,
    /// Also one that nobody waits for any more when it is open.
    pub keeps_unasked: bool,
    /// After a failed open nothing is opened for at most this long, and at least half of it; after each further one for
    /// twice as long.
    pub backoff: Duration,
    /// The longest of these.
    pub max_backoff: Duration,
}

/// A number that nothing else of the pool had or will have: of a connection, a waiter, a timer.
pub type Id = u64;

/// Gives out numbers in ascending order.
#[derive(Debug, Clone, Copy)]
pub struct Ids {
    next: Id,
    stride: u64,
}

impl Ids {
    /// `first`, `first + stride` and so on.
    pub const fn new(first: Id, stride: u64) -> Self {
        Self { next: first, stride }
    }

    /// The next one.
    pub const fn next(&mut self) -> Id {
        let id = self.next;
        self.next += self.stride;
        id
    }
}

/// What a step has to know of the world.
#[derive(Debug)]
pub struct Env<'a> {
    /// The moment of the step.
    pub now: Instant,
    /// A random number from 0 to 1, new for each step.
    pub jitter: f64,
    /// May differ from those of the step before.
    pub limits: &'a Limits,
    /// The pool is being closed: nothing is granted or opened, and nothing is kept idle. Never becomes false again.
    pub closing: bool,
    /// Numbers for what begins in this step.
    pub ids: &'a mut Ids,
}

/// Why an open came to nothing. Clones are the same error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError<E> {
    /// The connector says so.
    #[error("not connected")]
    Failed(#[source] E),
    /// It took too long.
    #[error("not connected in time")]
    TimedOut,
    /// The connector panicked.
    #[error("the connector panicked")]
    Panicked,
    /// It was called off, since the pool is closed or its runtime ends.
    #[error("given up before it was connected")]
    Aborted,
    /// It was connected, but has ended, drains or takes nobody already.
    #[error("connected, but of no use from the start")]
    Stillborn,
}

/// Why a waiter gets nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal<E> {
    /// No connection was opened: just now, or so shortly before that none is tried.
    Open(OpenError<E>),
    /// Too many wait.
    Full,
    /// The pool is closed.
    Closing,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<E> {
    /// Somebody wants a reference.
    Acquire {
        waiter: Id,
    },
    /// They don't any more. Nothing happens if they have it.
    Cancel {
        waiter: Id,
    },
    /// The open that was started for this slot came to its end. A change of the capacity that was heard of before counts more.
    Opened {
        slot: Id,
        capacity: usize,
    },
    OpenFailed {
        slot: Id,
        error: OpenError<E>,
    },
    /// A reference is given back, whatever became of its connection.
    Release {
        slot: Id,
    },
    /// The backend wants no more references on it; those that are there stay.
    GoAway {
        slot: Id,
    },
    /// References it may have from now on. Those beyond stay.
    CapacityChanged {
        slot: Id,
        capacity: usize,
    },
    /// The peer closed it, or its I/O failed.
    PeerClosed {
        slot: Id,
    },
    /// One that was armed fires.
    Timer {
        timer: Timer,
        generation: Id,
    },
    /// Limits are others than in the step before, or `Env::closing` has become true.
    Changed,
}

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timer {
    /// The connection was idle for long enough.
    Idle { slot: Id },
    /// The failure is long enough ago to be forgotten.
    Failure,
}

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action<E> {
    /// To be answered by `Opened` or `OpenFailed`, exactly once.
    StartOpen {
        slot: Id,
    },
    /// To be answered all the same.
    AbortOpen {
        slot: Id,
    },
    /// The waiter owns a reference on the slot already.
    Grant {
        waiter: Id,
        slot: Id,
        how: How,
    },
    Fail {
        waiter: Id,
        why: Refusal<E>,
    },
    /// Comes exactly once for whatever was opened. With references only if the peer closed it.
    Close {
        slot: Id,
        cause: Cause,
    },
    ArmTimer {
        timer: Timer,
        generation: Id,
        at: Instant,
    },
    /// It would be a no-op. That it is armed may be heard of later than this, if steps are carried out in another order.
    DisarmTimer {
        generation: Id,
        at: Instant,
    },
}

/// Why a connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Its peer did so, or its I/O failed.
    Peer,
    /// Nobody used it for long enough.
    Idle,
    /// Nobody uses it any more, after a `GoAway` or since the pool is closed.
    Drained,
}

/// How a reference was come by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// At once, on a connection in use.
    Hit,
    /// At once, on an idle one.
    Revive,
    /// After a wait, on a connection that was just opened.
    Open,
    /// After a wait, on another one.
    Wait,
}

/// See the picture above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Opening,
    Open,
    Idle { generation: Id, until: Instant },
    Draining,
    Closed,
}

/// A connection: one that is there, is to be there, or was there and has references still.
#[derive(Debug)]
pub struct Slot {
    pub state: State,
    pub refs: usize,
    /// `None`: not known yet.
    pub capacity: Option<usize>,
}

/// All about one key.
#[derive(Debug)]
pub struct Entry<E> {
    slots: BTreeMap<Id, Slot>,
    /// The one slot whose open is under way.
    opening: Option<Id>,
    /// First come, first served: numbers ascend.
    waiters: BTreeSet<Id>,
    failure: Option<Failure<E>>,
}

/// The last open failed.
#[derive(Debug)]
struct Failure<E> {
    error: OpenError<E>,
    /// How many failed in a row.
    count: u32,
    /// Until then none is tried again.
    until: Instant,
    generation: Id,
    forgotten_at: Instant,
}

impl<E> Default for Entry<E> {
    fn default() -> Self {
        Self { slots: BTreeMap::new(), opening: None, waiters: BTreeSet::new(), failure: None }
    }
}

impl Slot {
    fn has_room(&self) -> bool {
        matches!(self.state, State::Open | State::Idle { .. }) && self.capacity.is_some_and(|most| self.refs < most)
    }

    /// Whether it counts for `max_connections`.
    fn is_live(&self) -> bool {
        matches!(self.state, State::Opening | State::Open | State::Idle { .. })
    }

    fn change<E>(&mut self, to: State, actions: &mut Vec<Action<E>>) {
        if let State::Idle { generation, until } = std::mem::replace(&mut self.state, to) {
            actions.push(Action::DisarmTimer { generation, at: until });
        }
    }
}

impl<E: Clone> Entry<E> {
    /// There is nothing to be remembered.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty() && self.waiters.is_empty() && self.failure.is_none()
    }

    /// It has a connection, or somebody wants one: not only a failure that is remembered.
    pub fn is_busy(&self) -> bool {
        !self.slots.is_empty() || !self.waiters.is_empty()
    }

    /// Connections, oldest first.
    pub fn slots(&self) -> impl Iterator<Item = (Id, &Slot)> {
        self.slots.iter().map(|(id, slot)| (*id, slot))
    }

    /// One more gets a reference at once.
    pub fn has_room(&self) -> bool {
        self.slots.values().any(Slot::has_room)
    }

    /// An open is under way.
    pub fn is_opening(&self) -> bool {
        self.opening.is_some()
    }

    /// How many wait.
    pub fn waiters(&self) -> usize {
        self.waiters.len()
    }

    /// Opens fail, and the next one is tried at this moment at the earliest.
    pub fn fails_until(&self) -> Option<Instant> {
        self.failure.as_ref().map(|failure| failure.until)
    }

    /// Takes in what happened, and says what is to be done about it. What comes too late (of a slot, waiter or timer that is
    /// not there any more) changes nothing.
    pub fn step(&mut self, event: Event<E>, env: &mut Env<'_>, actions: &mut Vec<Action<E>>) {
        let mut how = How::Wait;
        let mut newcomer = None;
        match event {
            Event::Acquire { waiter } => {
                self.waiters.insert(waiter);
                newcomer = Some(waiter);
                how = How::Hit;
            }
            Event::Cancel { waiter } => _ = self.waiters.remove(&waiter),
            Event::Opened { slot: id, capacity } if self.opening == Some(id) => {
                self.opening = None;
                how = How::Open;
                if let Some(slot) = self.slots.get_mut(&id) {
                    let capacity = *slot.capacity.get_or_insert(capacity);
                    // One that takes nobody would be opened, closed and opened again, as fast as it goes.
                    if slot.state == State::Opening && capacity > 0 {
                        slot.state = State::Open;
                        self.recover(actions);
                    } else {
                        let cause = if slot.state == State::Closed { Cause::Peer } else { Cause::Drained };
                        self.slots.remove(&id);
                        self.fail(OpenError::Stillborn, env, actions);
                        actions.push(Action::Close { slot: id, cause });
                    }
                }
            }
            Event::OpenFailed { slot, error } if self.opening == Some(slot) => {
                self.opening = None;
                self.slots.remove(&slot);
                self.fail(error, env, actions);
            }
            Event::Release { slot } => {
                if let Some(slot) = self.slots.get_mut(&slot) {
                    slot.refs = slot.refs.saturating_sub(1);
                }
            }
            Event::GoAway { slot } => {
                if let Some(slot) = self.slots.get_mut(&slot).filter(|slot| slot.is_live()) {
                    slot.change(State::Draining, actions);
                }
            }
            Event::CapacityChanged { slot, capacity } => {
                if let Some(slot) = self.slots.get_mut(&slot) {
                    slot.capacity = Some(capacity);
                }
            }
            Event::PeerClosed { slot: id } => {
                if let Some(slot) = self.slots.get_mut(&id).filter(|slot| slot.state != State::Closed) {
                    slot.change(State::Closed, actions);
                    if self.opening != Some(id) {
                        actions.push(Action::Close { slot: id, cause: Cause::Peer });
                    }
                }
            }
            Event::Timer { timer: Timer::Idle { slot: id }, generation } => {
                if self.slots.get(&id).is_some_and(
                    |slot| matches!(slot.state, State::Idle { generation: current, .. } if current == generation),
                ) {
                    self.slots.remove(&id);
                    actions.push(Action::Close { slot: id, cause: Cause::Idle });
                }
            }
            Event::Timer { timer: Timer::Failure, generation } => {
                self.failure.take_if(|failure| failure.generation == generation);
            }
            Event::Changed if env.closing => {
                self.recover(actions);
                actions.extend(self.opening.map(|slot| Action::AbortOpen { slot }));
            }
            Event::Opened { .. } | Event::OpenFailed { .. } | Event::Changed => {}
        }
        self.settle(how, env, actions);
        if let Some(waiter) = newcomer
            && self.waiters.len() > env.limits.max_waiters
            && self.waiters.remove(&waiter)
        {
            actions.push(Action::Fail { waiter, why: Refusal::Full });
        }
    }

    /// Whatever happened: gives out what there is, asks for what is missing, lets go of what nobody uses.
    fn settle(&mut self, how: How, env: &mut Env<'_>, actions: &mut Vec<Action<E>>) {
        if env.closing {
            self.refuse_all(&Refusal::Closing, actions);
        }
        while !self.waiters.is_empty() {
            // The fullest first, so that the others become idle; of two, the older one.
            let room = self.slots.iter_mut().rev().filter(|(_, slot)| slot.has_room());
            let Some((&id, slot)) = room.max_by_key(|(_, slot)| slot.refs) else { break };
            let Some(waiter) = self.waiters.pop_first() else { break };
            let how = if how == How::Hit && slot.refs == 0 { How::Revive } else { how };
            slot.refs += 1;
            slot.change(State::Open, actions);
            actions.push(Action::Grant { waiter, slot: id, how });
        }
        let keeps = !env.closing && !env.limits.idle_timeout.is_zero();
        let keeps_new = keeps && (how != How::Open || env.limits.keeps_unasked);
        let opening = self.opening;
        self.slots.retain(|id, slot| {
            if slot.refs > 0 || opening == Some(*id) {
                return true;
            }
            match slot.state {
                State::Idle { .. } if keeps => true,
                State::Open if keeps_new => {
                    let (generation, until) = (env.ids.next(), env.now + env.limits.idle_timeout);
                    slot.state = State::Idle { generation, until };
                    actions.push(Action::ArmTimer { timer: Timer::Idle { slot: *id }, generation, at: until });
                    true
                }
                // Its Close was said when the peer closed it.
                State::Closed => false,
                State::Opening | State::Open | State::Idle { .. } | State::Draining => {
                    let is_drained = env.closing || slot.state == State::Draining;
                    slot.change(State::Closed, actions);
                    let cause = if is_drained { Cause::Drained } else { Cause::Idle };
                    actions.push(Action::Close { slot: *id, cause });
                    false
                }
            }
        });
        // What was just let go of leaves room for another one.
        let live = self.slots.values().filter(|slot| slot.is_live()).count();
        if !self.waiters.is_empty() && self.opening.is_none() && live < env.limits.max_connections {
            if let Some(failure) = self.failure.as_ref().filter(|failure| env.now < failure.until) {
                let why = Refusal::Open(failure.error.clone());
                self.refuse_all(&why, actions);
            } else {
                let id = env.ids.next();
                self.opening = Some(id);
                self.slots.insert(id, Slot { state: State::Opening, refs: 0, capacity: None });
                actions.push(Action::StartOpen { slot: id });
            }
        }
    }

    /// An open failed: for everybody who waits, and for those who come before the backoff is over.
    fn fail(&mut self, error: OpenError<E>, env: &mut Env<'_>, actions: &mut Vec<Action<E>>) {
        self.refuse_all(&Refusal::Open(error.clone()), actions);
        let before = self.recover(actions);
        if env.closing {
            return;
        }
        let limits = env.limits;
        let longest = limits.backoff.saturating_mul(1 << before.min(20)).min(limits.max_backoff);
        let until = env.now + longest.mul_f64(0.5 + env.jitter.clamp(0.0, 1.0) / 2.0);
        // Remembered for longer than it counts, or the next failure would be taken for the first.
        let (generation, forgotten_at) = (env.ids.next(), until + limits.max_backoff);
        self.failure = Some(Failure { error, count: before.saturating_add(1), until, generation, forgotten_at });
        actions.push(Action::ArmTimer { timer: Timer::Failure, generation, at: forgotten_at });
    }

    /// Forgets that opens failed; says how many did.
    fn recover(&mut self, actions: &mut Vec<Action<E>>) -> u32 {
        self.failure.take().map_or(0, |failure| {
            actions.push(Action::DisarmTimer { generation: failure.generation, at: failure.forgotten_at });
            failure.count
        })
    }

    fn refuse_all(&mut self, why: &Refusal<E>, actions: &mut Vec<Action<E>>) {
        let waiters = std::mem::take(&mut self.waiters);
        actions.extend(waiters.into_iter().map(|waiter| Action::Fail { waiter, why: why.clone() }));
    }

    /// What must hold after each step, and does not; it is cheap enough to be asked always.
    pub fn violation(&self, limits: &Limits) -> Option<&'static str> {
        let mut live = 0;
        for (id, slot) in &self.slots {
            let is_opening = self.opening == Some(*id);
            live += usize::from(slot.is_live());
            match slot.state {
                State::Opening if !is_opening => return Some("two opens under way"),
                _ if is_opening && slot.refs > 0 => return Some("a reference on what is not open"),
                State::Idle { .. } if slot.refs > 0 => return Some("an idle connection has references"),
                State::Open | State::Draining | State::Closed if !is_opening && slot.refs == 0 => {
                    return Some("a connection is kept that nobody uses");
                }
                _ if slot.has_room() && !self.waiters.is_empty() => {
                    return Some("somebody waits next to a free reference");
                }
                _ => {}
            }
        }
        if !self.waiters.is_empty() && self.opening.is_none() && live < limits.max_connections {
            return Some("somebody waits for nothing");
        }
        None
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
