//! The core against a world that only knows what it told it and what it heard, and holds every word against the rules.

use std::collections::{BTreeMap, BTreeSet};

use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, TestRunner},
};

use super::*;

/// A connection as the world outside knows it.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "what was heard of it, each for itself")]
struct Connection {
    is_open: bool,
    is_draining: bool,
    is_dead: bool,
    was_closed: bool,
    capacity: Option<usize>,
    refs: usize,
}

impl Connection {
    fn takes_more(&self) -> bool {
        self.is_open && !self.is_draining && !self.is_dead && !self.was_closed
    }

    fn has_room(&self) -> bool {
        self.takes_more() && self.refs < self.capacity.expect("known of what is open")
    }
}

#[derive(Debug)]
struct World {
    entry: Entry<u32>,
    ids: Ids,
    limits: Limits,
    now: Instant,
    is_closing: bool,
    jitter: f64,
    steps: u64,
    connections: BTreeMap<Id, Connection>,
    opening: Option<Id>,
    waiting: BTreeSet<Id>,
    /// The slot of each lease that is held.
    leases: Vec<Id>,
    timers: BTreeMap<(Instant, Id), Timer>,
    /// Those that were disarmed, but might fire all the same.
    stale: Vec<(Timer, Id)>,
    /// The last open failed with this, so often in a row, and none is tried until then.
    failure: Option<(OpenError<u32>, u32, Instant)>,
}

const IDLE: Duration = Duration::from_secs(10);
const BACKOFF: Duration = Duration::from_secs(1);

impl World {
    fn new(limits: Limits) -> Self {
        Self {
            entry: Entry::default(),
            ids: Ids::new(1, 1),
            limits,
            now: Instant::now(),
            is_closing: false,
            jitter: 0.0,
            steps: 0,
            connections: BTreeMap::new(),
            opening: None,
            waiting: BTreeSet::new(),
            leases: Vec::new(),
            timers: BTreeMap::new(),
            stale: Vec::new(),
            failure: None,
        }
    }

    /// One step, and all that must be true of what the core says to it; gives how much it said.
    #[expect(clippy::needless_pass_by_value, reason = "made for it alone")]
    fn tell(&mut self, event: Event<u32>) -> usize {
        self.steps += 1;
        let mut now_dead = None;
        match &event {
            Event::Acquire { waiter } => assert!(self.waiting.insert(*waiter)),
            Event::Cancel { waiter } => _ = self.waiting.remove(waiter),
            Event::Opened { slot, capacity } if self.opening == Some(*slot) => {
                self.opening = None;
                let connection = self.connections.get_mut(slot).expect("it was started");
                connection.is_open = true;
                connection.capacity.get_or_insert(*capacity);
                if connection.is_draining || connection.is_dead || connection.capacity == Some(0) {
                    now_dead = connection.is_dead.then_some(*slot);
                    self.fails(OpenError::Stillborn);
                } else {
                    self.failure = None;
                }
            }
            Event::OpenFailed { slot, error } if self.opening == Some(*slot) => {
                self.opening = None;
                self.connections.remove(slot);
                self.fails(error.clone());
            }
            Event::GoAway { slot } => {
                if let Some(connection) = self.connections.get_mut(slot) {
                    connection.is_draining = true;
                }
            }
            Event::CapacityChanged { slot, capacity } => {
                if let Some(connection) = self.connections.get_mut(slot) {
                    connection.capacity = Some(*capacity);
                }
            }
            Event::PeerClosed { slot } => {
                if let Some(connection) = self.connections.get_mut(slot) {
                    let was_dead = std::mem::replace(&mut connection.is_dead, true);
                    now_dead = (connection.is_open && !was_dead).then_some(*slot);
                }
            }
            Event::Timer { timer: Timer::Failure, .. } if self.is_due(&event) => self.failure = None,
            Event::Changed if self.is_closing => self.failure = None,
            Event::Release { .. }
            | Event::Timer { .. }
            | Event::Changed
            | Event::Opened { .. }
            | Event::OpenFailed { .. } => {}
        }
        let was_there = self.leases.len();
        let mut actions = Vec::new();
        let limits = self.limits;
        let mut env =
            Env { now: self.now, jitter: self.jitter, limits: &limits, closing: self.is_closing, ids: &mut self.ids };
        self.entry.step(event.clone(), &mut env, &mut actions);
        if let Event::Timer { generation, .. } = &event {
            self.timers.retain(|(_, armed), _| armed != generation);
        }
        for action in &actions {
            self.hear(&event, action, &mut now_dead);
        }
        assert_eq!(now_dead, None, "its leases were not told");
        assert!(matches!(event, Event::Acquire { .. }) || self.leases.len() >= was_there);
        self.connections.retain(|_, connection| !connection.was_closed || connection.refs > 0);
        self.check();
        actions.len()
    }

    fn is_due(&self, event: &Event<u32>) -> bool {
        matches!(event, Event::Timer { generation, .. } if self.timers.keys().any(|(_, armed)| armed == generation))
    }

    fn fails(&mut self, error: OpenError<u32>) {
        let count = self.failure.take().map_or(0, |(_, count, _)| count);
        if !self.is_closing {
            let longest = (0..count).fold(BACKOFF, |longest, _| (2 * longest).min(self.limits.max_backoff));
            let until = self.now + longest.min(self.limits.max_backoff).mul_f64(0.5 + self.jitter / 2.0);
            self.failure = Some((error, count + 1, until));
        }
    }

    fn live(&self) -> usize {
        self.connections.values().filter(|one| one.takes_more()).count() + usize::from(self.opening_counts())
    }

    fn opening_counts(&self) -> bool {
        self.opening.is_some_and(|slot| {
            let connection = &self.connections[&slot];
            !connection.is_draining && !connection.is_dead
        })
    }

    fn hear(&mut self, event: &Event<u32>, action: &Action<u32>, now_dead: &mut Option<Id>) {
        match action {
            Action::StartOpen { slot } => {
                assert_eq!(self.opening, None, "two opens under way");
                assert!(!self.is_closing && !self.waiting.is_empty(), "nobody wants it");
                assert!(self.live() < self.limits.max_connections, "too many connections");
                let fails_until = self.failure.as_ref().map(|failure| failure.2);
                assert!(fails_until.is_none_or(|until| self.now >= until), "opened before the backoff was over");
                self.opening = Some(*slot);
                assert!(self.connections.insert(*slot, Connection::default()).is_none(), "a number came twice");
            }
            Action::AbortOpen { slot } => assert!(self.is_closing && self.opening == Some(*slot)),
            Action::Grant { waiter, slot, how } => {
                assert_eq!(self.waiting.first(), Some(waiter), "not in turn, or twice");
                self.waiting.pop_first();
                let most = self.connections.values().filter(|one| one.has_room()).map(|one| one.refs).max();
                let connection = self.connections.get_mut(slot).expect("a grant on nothing");
                assert!(connection.has_room(), "a grant on {connection:?}");
                assert_eq!(most, Some(connection.refs), "there is a fuller one");
                let expected = match event {
                    Event::Acquire { .. } if connection.refs == 0 => How::Revive,
                    Event::Acquire { .. } => How::Hit,
                    Event::Opened { .. } => How::Open,
                    _ => How::Wait,
                };
                assert_eq!(*how, expected);
                connection.refs += 1;
                self.leases.push(*slot);
            }
            Action::Fail { waiter, why } => {
                assert!(self.waiting.remove(waiter), "resolved twice, or never asked");
                match why {
                    Refusal::Open(error) if self.is_closing => {
                        assert!(matches!(event, Event::OpenFailed { .. } | Event::Opened { .. }), "{error:?}");
                    }
                    Refusal::Open(error) => {
                        assert_eq!(Some(error), self.failure.as_ref().map(|failure| &failure.0), "another error");
                    }
                    Refusal::Full => assert!(self.waiting.len() >= self.limits.max_waiters),
                    Refusal::Closing => assert!(self.is_closing),
                }
            }
            Action::Close { slot, cause } => {
                let connection = self.connections.get_mut(slot).expect("a Close of nothing");
                assert!(connection.is_open, "a Close of what was not opened");
                assert!(!std::mem::replace(&mut connection.was_closed, true), "closed twice");
                match cause {
                    Cause::Peer => assert_eq!(now_dead.take(), Some(*slot), "its peer did not close it"),
                    Cause::Idle => assert_eq!(connection.refs, 0, "closed in use"),
                    Cause::Drained => {
                        assert_eq!(connection.refs, 0, "closed in use");
                        assert!(connection.is_draining || self.is_closing || matches!(event, Event::Opened { .. }));
                    }
                }
            }
            Action::ArmTimer { timer, generation, at } => {
                assert!(*at >= self.now);
                assert!(self.timers.insert((*at, *generation), *timer).is_none(), "a number came twice");
            }
            Action::DisarmTimer { generation, at } => {
                let timer = self.timers.remove(&(*at, *generation)).expect("it was armed, and has not fired");
                self.stale.push((timer, *generation));
            }
        }
    }

    /// What must hold between any two steps.
    fn check(&self) {
        assert_eq!(self.entry.violation(&self.limits), None);
        assert_eq!(self.entry.waiters(), self.waiting.len());
        let mut refs = BTreeMap::new();
        for slot in &self.leases {
            *refs.entry(*slot).or_insert(0) += 1;
        }
        for (id, slot) in self.entry.slots() {
            assert_eq!(slot.refs, refs.remove(&id).unwrap_or(0), "references are not the leases");
            assert_eq!(slot.refs, self.connections[&id].refs);
        }
        assert_eq!(refs, BTreeMap::new(), "leases on what is forgotten");
        assert_eq!(self.entry.slots().count(), self.connections.len());
        if !self.waiting.is_empty() {
            assert!(!self.connections.values().any(Connection::has_room), "somebody waits next to a free reference");
            assert!(self.opening.is_some() || self.live() >= self.limits.max_connections, "somebody waits for nothing");
        }
        // Timers are those of idle connections, and of the failure.
        let idle = |one: &Connection| one.is_open && one.refs == 0;
        assert!(self.connections.values().filter(|one| idle(one)).all(|one| !one.is_dead && !one.is_draining));
        let idle = self.connections.values().filter(|one| idle(one)).count();
        assert_eq!(self.timers.len(), idle + usize::from(self.failure.is_some()));
        assert!(idle == 0 || !self.is_closing, "kept idle while the pool closes");
    }

    /// What comes next, drawn from a number.
    fn event(&mut self, drawn: u32) {
        let (op, drawn) = (drawn % 32, drawn as usize / 32);
        self.jitter = f64::from(op) / 32.0;
        let pick = |from: usize| drawn % from.max(1);
        let slot = self.connections.keys().nth(pick(self.connections.len())).copied();
        // Of what never was, or is not any more.
        let slot = slot.filter(|_| drawn % 61 != 0).unwrap_or(drawn as Id % 50);
        match op {
            0..9 => {
                let waiter = self.ids.next();
                self.tell(Event::Acquire { waiter });
            }
            9..11 => {
                let waiter = self.waiting.iter().nth(pick(self.waiting.len())).copied().unwrap_or(1);
                self.tell(Event::Cancel { waiter });
            }
            11..15 => {
                let slot = self.opening.filter(|_| drawn % 61 != 0).unwrap_or(slot);
                let event = match op {
                    14 => {
                        Event::OpenFailed { slot, error: OpenError::Failed(u32::try_from(drawn).expect("it was one")) }
                    }
                    _ => Event::Opened { slot, capacity: pick(5) },
                };
                self.tell(event);
            }
            15..22 if !self.leases.is_empty() => self.release(pick(self.leases.len())),
            15..22 => _ = self.tell(Event::Release { slot: 0 }),
            22 => _ = self.tell(Event::GoAway { slot }),
            23..25 => _ = self.tell(Event::CapacityChanged { slot, capacity: pick(6) }),
            25..27 => _ = self.tell(Event::PeerClosed { slot }),
            27..29 => self.fire(pick(self.timers.len())),
            29 if !self.stale.is_empty() => {
                let (timer, generation) = self.stale.swap_remove(pick(self.stale.len()));
                assert_eq!(self.tell(Event::Timer { timer, generation }), 0, "a stale timer did something");
            }
            30 if drawn % 16 == 0 => {
                self.limits.max_connections = pick(4);
                self.limits.idle_timeout = if drawn % 3 == 0 { Duration::ZERO } else { IDLE };
                self.tell(Event::Changed);
            }
            _ => self.now += Duration::from_millis(drawn as u64 % 700),
        }
    }

    fn release(&mut self, index: usize) {
        let slot = self.leases.swap_remove(index);
        self.connections.get_mut(&slot).expect("it has a lease").refs -= 1;
        self.tell(Event::Release { slot });
    }

    fn fire(&mut self, index: usize) {
        let Some((&(at, generation), &timer)) = self.timers.iter().nth(index) else { return };
        self.now = self.now.max(at);
        assert!(
            self.tell(Event::Timer { timer, generation }) > 0 || timer == Timer::Failure,
            "nothing came of a timer"
        );
    }

    /// Everybody goes, and every timer fires: nothing may be left.
    fn end(&mut self, closes: bool) {
        if closes {
            self.is_closing = true;
            self.tell(Event::Changed);
            let waiter = self.ids.next();
            self.tell(Event::Acquire { waiter });
            assert!(self.waiting.is_empty() && self.timers.is_empty());
        }
        while let Some(waiter) = self.waiting.first().copied() {
            self.tell(Event::Cancel { waiter });
        }
        if let Some(slot) = self.opening {
            self.tell(Event::Opened { slot, capacity: 1 });
        }
        while !self.leases.is_empty() {
            self.release(0);
        }
        while !self.timers.is_empty() {
            self.fire(0);
        }
        assert!(self.entry.is_empty() && self.connections.is_empty() && self.opening.is_none());
    }
}

/// A million random steps in short runs: after each, references are the leases, at most one open is under way, nothing in
/// use is closed but by its peer, nobody is answered twice or forgotten; and at the end nothing is left.
#[test]
fn whatever_happens_the_rules_hold() {
    let config = Config { cases: 2_500, failure_persistence: None, ..Config::default() };
    let steps = std::cell::Cell::new(0);
    let limits = (0_usize..4, 0_usize..12, any::<bool>());
    TestRunner::new(config)
        .run(&(limits, vec(any::<u32>(), 400..600), any::<bool>()), |(limits, drawn, closes)| {
            let (max_connections, max_waiters, keeps) = limits;
            let mut world = World::new(Limits {
                max_connections,
                max_waiters,
                idle_timeout: if keeps { IDLE } else { Duration::ZERO },
                keeps_unasked: true,
                backoff: BACKOFF,
                max_backoff: 5 * BACKOFF,
            });
            for drawn in drawn {
                world.event(drawn);
            }
            world.end(closes);
            steps.set(steps.get() + world.steps);
            Ok(())
        })
        .unwrap();
    assert!(steps.get() >= 1_000_000, "{} steps", steps.get());
}

/// What is open when nobody waits for it any more is kept idle, or closed at once, as it is wanted.
#[test]
fn what_nobody_waits_for_is_kept_or_closed() {
    for keeps_unasked in [true, false] {
        let limits = Limits {
            max_connections: 1,
            max_waiters: 9,
            idle_timeout: IDLE,
            keeps_unasked,
            backoff: BACKOFF,
            max_backoff: BACKOFF,
        };
        let (mut entry, mut ids, now) = (Entry::<u32>::default(), Ids::new(1, 1), Instant::now());
        let mut step = |event| {
            let mut actions = Vec::new();
            entry.step(
                event,
                &mut Env { now, jitter: 0.0, limits: &limits, closing: false, ids: &mut ids },
                &mut actions,
            );
            (actions, entry.is_empty(), entry.is_busy())
        };
        let (actions, ..) = step(Event::Acquire { waiter: 100 });
        let [Action::StartOpen { slot }] = actions[..] else { panic!("{actions:?}") };
        assert_eq!(step(Event::Cancel { waiter: 100 }), (vec![], false, true));
        let (actions, is_empty, is_busy) = step(Event::Opened { slot, capacity: 9 });
        assert_eq!((is_empty, is_busy), (!keeps_unasked, keeps_unasked));
        assert_eq!(actions.contains(&Action::Close { slot, cause: Cause::Idle }), !keeps_unasked, "{actions:?}");
    }
}
