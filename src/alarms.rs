//! Who is woken when: at a moment of its own, and all at once. Each worker has one of these for all of its sessions, which is less for each
//! of them than a timer of the runtime and a place in a list. The leg of a shared WebSocket has one for itself.
//!
//! The moments are in a hierarchical timer wheel: six levels of 64 slots, of a millisecond, 64 of these, and so on. One timer of the runtime
//! stands at the next slot that has something in it. When it fires, the one who woke is left to set it again ([`Alarms::tend`]): nothing of
//! it is touched where a runtime may be about to end.

use std::{
    fmt,
    future::Future as _,
    num::NonZeroU32,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Wake, Waker},
    time::Duration,
};

use tokio::{
    task::unconstrained,
    time::{Sleep, sleep_until},
};

use crate::stamp::Stamp;

/// See the module.
pub struct Alarms {
    /// What ticks are counted from.
    begun: Stamp,
    wheel: Mutex<Wheel>,
    /// Locked before the wheel, and never by the bell, which may ring while it is locked.
    sleep: Mutex<Option<Pin<Box<Sleep>>>>,
    /// What the timer wakes.
    bell: Waker,
    /// The timer has fired, and was not set since.
    is_slack: AtomicBool,
}

/// Whose turn it is to be woken: one in the wheel, in four bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place(NonZeroU32);

/// What the timer of the runtime has of the alarms.
struct Bell(Weak<Alarms>);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        if let Some(alarms) = self.0.upgrade() {
            alarms.ring();
        }
    }
}

impl Alarms {
    /// Nobody is to be woken.
    pub fn new() -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            begun: Stamp::now(),
            wheel: Mutex::new(Wheel::new()),
            sleep: Mutex::default(),
            bell: Arc::new(Bell(Weak::clone(this))).into(),
            is_slack: AtomicBool::new(false),
        })
    }

    /// A task that is woken from now on, until it leaves. It has no moment yet.
    pub fn join(&self, waker: &Waker) -> Place {
        self.wheel().join(waker.clone())
    }

    /// It is woken at `at`, and not at the moment that it had. Once it was woken it has none. To be called on the runtime of those in here.
    pub fn set(&self, place: Place, at: Stamp) {
        // Rounded up: nobody is woken too early.
        let tick = (at - self.begun).as_nanos().div_ceil(TICK.as_nanos());
        let is_first = {
            let mut wheel = self.wheel();
            wheel.set(place, u64::try_from(tick).unwrap_or(u64::MAX));
            wheel.next_tick() < wheel.armed
        };
        if is_first {
            self.arm();
        }
    }

    /// Nothing wakes it any more.
    pub fn leave(&self, place: Place) {
        let mut wheel = self.wheel();
        let waker = wheel.leave(place);
        // It may be the one who was to set the timer.
        let deputy = if self.is_slack.load(Ordering::Acquire) { wheel.deputy() } else { None };
        drop(wheel);
        // Either may be the last hold of a task, which leaves in its turn.
        drop(waker);
        if let Some(deputy) = deputy {
            deputy.wake();
        }
    }

    /// Sets the timer if it has fired. To be called, on the runtime of those in here, by each who is woken.
    pub fn tend(&self) {
        if self.is_slack.load(Ordering::Acquire) {
            self.arm();
        }
    }

    /// Wakes all.
    pub fn wake_all(&self) {
        // A task that is woken may leave, on another thread, before this is through.
        let wakers: Vec<_> = self.wheel().wakers().cloned().collect();
        wakers.into_iter().for_each(Waker::wake);
    }

    /// The timer has fired.
    fn ring(&self) {
        let mut wheel = self.wheel();
        wheel.armed = NEVER;
        self.is_slack.store(true, Ordering::Release);
        let now = self.tick();
        let mut due = Vec::new();
        wheel.advance(now, |waker| due.push(waker.clone()));
        if due.is_empty() {
            due.extend(wheel.deputy());
        }
        drop(wheel);
        due.into_iter().for_each(Waker::wake);
    }

    /// Sets the timer to the next tick that has something.
    fn arm(&self) {
        loop {
            let mut sleep = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            let tick = {
                let mut wheel = self.wheel();
                self.is_slack.store(false, Ordering::Release);
                wheel.armed = wheel.next_tick();
                wheel.armed
            };
            if tick == NEVER {
                return;
            }
            let at = (self.begun + Duration::from_millis(tick)).into();
            let sleep = sleep.get_or_insert_with(|| Box::pin(sleep_until(at)));
            sleep.as_mut().reset(at);
            // Whoever's turn it is, it is not his time that is used up.
            let fired = pin!(unconstrained(sleep)).poll(&mut Context::from_waker(&self.bell));
            if fired.is_pending() {
                return;
            }
            self.ring();
        }
    }

    /// The one that has begun.
    fn tick(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn wheel(&self) -> MutexGuard<'_, Wheel> {
        // Nothing under this lock can panic half-way.
        self.wheel.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Alarms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Alarms").finish_non_exhaustive()
    }
}

/// The runtime's own resolution.
const TICK: Duration = Duration::from_millis(1);

/// The tick that does not come.
const NEVER: u64 = u64::MAX;

const LEVELS: u32 = 6;

/// Of a level, and the bits of a tick that choose among them.
const SLOTS: usize = 64;
const BITS: u32 = 6;

/// Nodes are made so many at a time: what is made and not in use is little, however many there are, or few.
const CHUNK: usize = 16;

/// No node.
const NONE: u32 = u32::MAX;

/// The moments, and whose they are. It knows no clock.
struct Wheel {
    /// The tick up to which all were told of.
    now: u64,
    /// What the timer stands at.
    armed: u64,
    /// The first of each slot, by level.
    heads: [[u32; SLOTS]; LEVELS as usize],
    /// The slots that have any, by level.
    taken: [u64; LEVELS as usize],
    #[expect(clippy::vec_box, reason = "all of them in one would be moved, and doubled, when there is one more")]
    nodes: Vec<Box<[Node; CHUNK]>>,
    /// The first of those that nobody has.
    free: u32,
}

/// One who is in it. There is one for every session.
struct Node {
    /// `None`: nobody has it.
    waker: Option<Waker>,
    /// 0: it has no moment.
    tick: u64,
    /// In its slot. Of those that nobody has, the next one.
    before: u32,
    after: u32,
}

impl Place {
    const fn new(index: u32) -> Self {
        Self(NonZeroU32::MIN.saturating_add(index))
    }

    const fn index(self) -> u32 {
        self.0.get() - 1
    }
}

impl Wheel {
    const fn new() -> Self {
        Self {
            now: 0,
            armed: NEVER,
            heads: [[NONE; SLOTS]; LEVELS as usize],
            taken: [0; LEVELS as usize],
            nodes: Vec::new(),
            free: NONE,
        }
    }

    fn node(&mut self, index: u32) -> &mut Node {
        let index = index as usize;
        &mut self.nodes[index / CHUNK][index % CHUNK]
    }

    fn join(&mut self, waker: Waker) -> Place {
        if self.free == NONE {
            let first = u32::try_from(self.nodes.len() * CHUNK).expect("a process has far fewer than 2^32 sessions");
            let mut after = first;
            self.nodes.push(Box::new(std::array::from_fn(|_| {
                after += 1;
                Node { waker: None, tick: 0, before: NONE, after }
            })));
            self.free = first;
            self.node(after - 1).after = NONE;
        }
        let index = self.free;
        let node = self.node(index);
        let after = std::mem::replace(&mut node.after, NONE);
        node.waker = Some(waker);
        self.free = after;
        Place::new(index)
    }

    fn leave(&mut self, place: Place) -> Option<Waker> {
        let index = place.index();
        self.unset(index);
        let free = std::mem::replace(&mut self.free, index);
        let node = self.node(index);
        node.after = free;
        node.waker.take()
    }

    /// What is past is the next tick.
    fn set(&mut self, place: Place, tick: u64) {
        self.unset(place.index());
        let tick = tick.clamp(self.now + 1, NEVER - 1);
        self.node(place.index()).tick = tick;
        self.link(place.index(), tick);
    }

    /// The level and the slot of a tick to come: the level is that of the highest digit in which it differs from now.
    fn slot(&self, tick: u64) -> (usize, usize) {
        let differs = (self.now ^ tick) | (SLOTS as u64 - 1);
        let level = (differs.ilog2() / BITS).min(LEVELS - 1);
        (level as usize, digit(tick, level))
    }

    fn link(&mut self, index: u32, tick: u64) {
        let (level, slot) = self.slot(tick);
        let after = std::mem::replace(&mut self.heads[level][slot], index);
        self.taken[level] |= 1 << slot;
        let node = self.node(index);
        (node.before, node.after) = (NONE, after);
        if after != NONE {
            self.node(after).before = index;
        }
    }

    fn unset(&mut self, index: u32) {
        let node = self.node(index);
        let tick = std::mem::take(&mut node.tick);
        if tick == 0 {
            return;
        }
        let (before, after) = (node.before, node.after);
        if after != NONE {
            self.node(after).before = before;
        }
        if before != NONE {
            self.node(before).after = after;
            return;
        }
        // Still where it was put: before now gets to a slot that it stands in, all in there are put elsewhere.
        let (level, slot) = self.slot(tick);
        self.heads[level][slot] = after;
        if after == NONE {
            self.taken[level] &= !(1 << slot);
        }
    }

    /// The first slot that has any, with the tick at which it begins. Those of a lower level come first.
    fn next(&self) -> Option<(usize, usize, u64)> {
        let (level, taken) = (0..LEVELS).zip(self.taken).find(|(_, taken)| *taken != 0)?;
        let bits = BITS * level;
        // The slot that it is in comes last: in there are only those of the next round, and these only in the highest level.
        let first = (digit(self.now, level) + 1) % SLOTS;
        let ahead = taken.rotate_right(u32::try_from(first).expect("below 64")).trailing_zeros() as usize;
        let slot = (first + ahead) % SLOTS;
        let round = self.now >> bits >> BITS << BITS << bits;
        let begins = round + ((slot as u64) << bits);
        // In the highest level only: what is too far away for it goes round.
        let begins = if begins <= self.now { begins.saturating_add(1 << bits << BITS) } else { begins };
        Some((level as usize, slot, begins))
    }

    fn next_tick(&self) -> u64 {
        self.next().map_or(NEVER, |(_, _, begins)| begins)
    }

    /// Goes on to a tick, and tells of all who have their moment until then.
    fn advance(&mut self, to: u64, mut tell: impl FnMut(&Waker)) {
        while let Some((level, slot, begins)) = self.next()
            && begins <= to
        {
            self.now = begins;
            self.taken[level] &= !(1 << slot);
            let mut index = std::mem::replace(&mut self.heads[level][slot], NONE);
            while index != NONE {
                let node = self.node(index);
                let (tick, after) = (node.tick, node.after);
                if tick > begins {
                    self.link(index, tick);
                } else {
                    node.tick = 0;
                    if let Some(waker) = &node.waker {
                        tell(waker);
                    }
                }
                index = after;
            }
        }
        self.now = self.now.max(to);
    }

    /// One of those whose moment is next.
    fn deputy(&mut self) -> Option<Waker> {
        let (level, slot, _) = self.next()?;
        let index = self.heads[level][slot];
        self.node(index).waker.clone()
    }

    fn wakers(&self) -> impl Iterator<Item = &Waker> {
        self.nodes.iter().flat_map(|nodes| nodes.iter()).filter_map(|node| node.waker.as_ref())
    }
}

/// The part of a tick that chooses a slot of a level.
#[expect(clippy::cast_possible_truncation, reason = "that is what is wanted")]
const fn digit(tick: u64, level: u32) -> usize {
    (tick >> (BITS * level)) as usize % SLOTS
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::atomic::AtomicU32, task::Poll};

    use proptest::{collection::vec, prelude::*};
    use tokio::{
        task::JoinSet,
        time::{Instant, advance},
    };

    use super::*;

    #[derive(Debug, Default)]
    struct Count(AtomicU32);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Count {
        fn taken(&self) -> u32 {
            self.0.swap(0, Ordering::Relaxed)
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Join,
        /// One of those who are there, by a number; so many ticks from now, some of them in the past.
        Set(usize, u64, bool),
        Leave(usize),
        Advance(u64),
    }

    fn far() -> impl Strategy<Value = u64> {
        (0..38_u32, any::<u64>()).prop_map(|(bits, random)| random & ((1 << bits) - 1))
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            2 => Just(Step::Join),
            6 => (any::<usize>(), far(), prop::bool::weighted(0.1)).prop_map(|(who, ticks, past)| Step::Set(who, ticks, past)),
            1 => any::<usize>().prop_map(Step::Leave),
            3 => far().prop_map(Step::Advance),
        ]
    }

    proptest! {
        /// A wheel and a map from moments to those who have them are given the same, in any order: they tell of the same ones at the
        /// same time, and none is due before the tick that the wheel says is the next to look at.
        #[test]
        fn the_wheel_is_as_good_as_a_map(steps in vec(step(), 1..300)) {
            let (mut wheel, mut now) = (Wheel::new(), 0_u64);
            let mut all: Vec<(Place, Arc<Count>)> = Vec::new();
            let mut moments: BTreeMap<Place, u64> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Join => {
                        let count = Arc::new(Count::default());
                        all.push((wheel.join(Arc::clone(&count).into()), count));
                    }
                    Step::Set(who, ticks, is_past) if !all.is_empty() => {
                        let (place, _) = all[who % all.len()];
                        let tick = if is_past { now.saturating_sub(ticks) } else { now + ticks };
                        wheel.set(place, tick);
                        moments.insert(place, tick.max(now + 1));
                    }
                    Step::Leave(who) if !all.is_empty() => {
                        let (place, count) = all.swap_remove(who % all.len());
                        moments.remove(&place);
                        prop_assert!(wheel.leave(place).is_some_and(|waker| waker.will_wake(&Arc::clone(&count).into())));
                    }
                    Step::Advance(ticks) => {
                        now += ticks;
                        wheel.advance(now, Waker::wake_by_ref);
                        for (place, count) in &all {
                            let is_due = moments.get(place).is_some_and(|tick| *tick <= now);
                            prop_assert_eq!(count.taken(), u32::from(is_due), "{:?} at {}", place, now);
                        }
                        moments.retain(|_, tick| *tick > now);
                    }
                    Step::Set(..) | Step::Leave(_) => {}
                }
                let first = moments.values().min();
                prop_assert_eq!(first.is_some(), wheel.next().is_some());
                prop_assert!(first.is_none_or(|first| wheel.next_tick() <= *first && wheel.next_tick() > now));
                prop_assert_eq!(wheel.wakers().count(), all.len());
            }
        }
    }

    /// Waits until it is woken at its moment, or for anything else.
    async fn wait(alarms: Arc<Alarms>, at: Stamp) {
        let mut place = None;
        std::future::poll_fn(|cx| {
            alarms.tend();
            if Stamp::now() >= at {
                return Poll::Ready(());
            }
            if place.is_none() {
                let new = alarms.join(cx.waker());
                alarms.set(new, at);
                place = Some(new);
            }
            Poll::Pending
        })
        .await;
        if let Some(place) = place {
            alarms.leave(place);
        }
    }

    /// Tasks that wait for a moment each, from milliseconds to days: all are woken, none too early, and none later than two ticks after it.
    #[tokio::test(start_paused = true)]
    async fn each_is_woken_at_its_moment() {
        let (alarms, begun) = (Alarms::new(), Instant::now());
        let mut tasks = JoinSet::new();
        for nth in 0..400_u64 {
            let at = begun + Duration::from_micros(nth.pow(4) * 9 + 1);
            let alarms = Arc::clone(&alarms);
            tasks.spawn(async move {
                wait(alarms, at.into()).await;
                let late = Instant::now().duration_since(at);
                assert!(late <= TICK * 2, "{nth}: {late:?}");
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended.expect("none is late");
        }
        assert!(begun.elapsed() > Duration::from_hours(60));
    }

    /// Those who are to set the timer go, one after the other, without a look at it: the last one is woken all the same.
    #[tokio::test(start_paused = true)]
    async fn whoever_goes_leaves_the_timer_to_another() {
        let alarms = Alarms::new();
        let counts: Vec<_> = (0..3).map(|_| Arc::new(Count::default())).collect();
        let places: Vec<_> = counts.iter().map(|count| alarms.join(&Arc::clone(count).into())).collect();
        let now = Stamp::now();
        for (place, seconds) in places.iter().zip([1, 20, 30]) {
            alarms.set(*place, now + Duration::from_secs(seconds));
        }
        let taken = || counts.iter().map(|count| count.taken()).collect::<Vec<_>>();
        advance(Duration::from_secs(15)).await;
        assert_eq!(taken(), [1, 0, 0]);
        // The timer is not set, and the first one does not set it.
        alarms.leave(places[0]);
        assert_eq!(taken(), [0, 1, 0]);
        alarms.leave(places[1]);
        assert_eq!(taken(), [0, 0, 1]);
        alarms.tend();
        advance(Duration::from_secs(14)).await;
        while taken()[2] > 0 {
            alarms.tend();
            tokio::task::yield_now().await;
        }
        assert!(now.elapsed() < Duration::from_secs(30));
        advance(Duration::from_millis(1002)).await;
        assert_eq!(taken(), [0, 0, 1]);
    }

    /// All are woken at once, whether they have a moment or not, and none who has gone. Places are given again.
    #[test]
    fn all_are_woken() {
        let (alarms, count) = (Alarms::new(), Arc::new(Count::default()));
        let waker = Arc::clone(&count).into();
        let places: Vec<_> = (0..1000).map(|_| alarms.join(&waker)).collect();
        alarms.wake_all();
        assert_eq!(count.taken(), 1000);
        places.iter().step_by(2).for_each(|place| alarms.leave(*place));
        alarms.wake_all();
        assert_eq!(count.taken(), 500);
        let again: Vec<_> = (0..500).map(|_| alarms.join(&waker)).collect();
        assert!(again.iter().all(|place| places.contains(place)));
    }
}
