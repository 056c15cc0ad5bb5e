//! Who may put something into a queue that is full: first come, first served, and nobody is woken for nothing.
//!
//! What is small takes memory for all of it together, beyond what is free; what is larger brings its own, and so is let in whenever it is alone.
//!
//! It counts what is in the queue, and knows those who wait; the queue is its owner's, who has the lock as well, and wakes without it.

use std::{
    collections::{BTreeMap, HashMap},
    task::Waker,
};

use super::memory::{FREE, Memory};

/// See the module.
#[derive(Debug)]
pub(super) struct Turnstile {
    most: usize,
    most_bytes: usize,
    /// What is in the queue, and the places of those who were called.
    count: usize,
    bytes: usize,
    /// Of these, bytes of those that bring no memory.
    small: usize,
    /// For them.
    memory: Memory,
    /// By their numbers, which ascend.
    waiting: BTreeMap<u64, Waiting>,
    /// Each has a place that nobody else gets, until it comes or leaves; of so many bytes.
    called: HashMap<u64, usize>,
    next: u64,
}

#[derive(Debug)]
struct Waiting {
    bytes: usize,
    waker: Waker,
}

/// Somebody's place among those who wait, if there is one. Whoever has one comes again, or leaves.
#[derive(Debug, Default)]
pub(super) struct Ticket(Option<u64>);

impl Turnstile {
    /// For so many things, of so many bytes together, as far as there is memory; a larger one alone is let in all the same.
    pub(super) fn new(most: usize, most_bytes: usize, memory: Memory) -> Self {
        let (waiting, called) = (BTreeMap::new(), HashMap::new());
        Self { most, most_bytes, count: 0, bytes: 0, small: 0, memory, waiting, called, next: 0 }
    }

    fn fits(&mut self, bytes: usize) -> bool {
        let has_room = self.count < self.most && self.bytes.saturating_add(bytes) <= self.most_bytes;
        // Where it is not alone others will go, and it is asked for anew.
        self.count == 0 || has_room && self.memory.fit(self.small + small(bytes))
    }

    fn take(&mut self, bytes: usize) {
        self.count += 1;
        self.bytes += bytes;
        self.small += small(bytes);
    }

    fn give_back(&mut self, bytes: usize) {
        self.count = self.count.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
        self.small = self.small.saturating_sub(small(bytes));
        self.memory.fit(self.small);
    }

    /// Whether something of so many bytes may go in now; else its owner waits. With the same ticket it is the same thing.
    pub(super) fn enter(&mut self, ticket: &mut Ticket, bytes: usize, waker: &Waker) -> bool {
        if let Some(number) = ticket.0 {
            if self.called.remove(&number).is_some() {
                ticket.0 = None;
                return true;
            }
            if let Some(waiting) = self.waiting.get_mut(&number) {
                waiting.waker.clone_from(waker);
                return false;
            }
        }
        if self.waiting.is_empty() && self.fits(bytes) {
            ticket.0 = None;
            self.take(bytes);
            return true;
        }
        self.waiting.insert(self.next, Waiting { bytes, waker: waker.clone() });
        ticket.0 = Some(self.next);
        self.next += 1;
        false
    }

    /// Something of so many bytes has gone out. Gives those who may come now.
    pub(super) fn exit(&mut self, bytes: usize) -> Vec<Waker> {
        self.give_back(bytes);
        self.call()
    }

    /// Its owner doesn't want to go in any more. Gives those who may come now.
    pub(super) fn leave(&mut self, ticket: &mut Ticket) -> Vec<Waker> {
        let Some(number) = ticket.0.take() else { return Vec::new() };
        match self.called.remove(&number) {
            Some(bytes) => self.give_back(bytes),
            None => _ = self.waiting.remove(&number),
        }
        self.call()
    }

    /// The queue is gone: gives all who wait, none of whom has a place.
    pub(super) fn call_all(&mut self) -> Vec<Waker> {
        self.called.clear();
        std::mem::take(&mut self.waiting).into_values().map(|waiting| waiting.waker).collect()
    }

    fn call(&mut self) -> Vec<Waker> {
        let mut woken = Vec::new();
        while let Some((_, first)) = self.waiting.first_key_value()
            && self.fits(first.bytes)
            && let Some((number, Waiting { bytes, waker })) = self.waiting.pop_first()
        {
            self.take(bytes);
            self.called.insert(number, bytes);
            woken.push(waker);
        }
        woken
    }
}

/// What this thing takes of the memory for all of them.
const fn small(bytes: usize) -> usize {
    if bytes > FREE { 0 } else { bytes }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        task::Wake,
    };

    use super::*;
    use crate::hub::memory::{PORTION, tests::budget};

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// For each place that becomes free one is woken, in the order in which they came; nobody gets in before them, and who leaves
    /// makes way for the next. Method: one place, many who want it.
    #[test]
    fn who_came_first_is_served_first() {
        let mut turnstile = Turnstile::new(1, 100, Memory::new(&budget(None)));
        let counts: [Arc<Count>; 5] = std::array::from_fn(|_| Arc::default());
        let wakers = counts.each_ref().map(|count| Waker::from(Arc::clone(count)));
        let mut tickets: [Ticket; 5] = std::array::from_fn(|_| Ticket::default());
        let told = || counts.each_ref().map(|count| count.0.load(Ordering::Relaxed));
        let wake = |woken: Vec<Waker>| woken.into_iter().for_each(Waker::wake);
        for (at, waker) in wakers.iter().enumerate() {
            assert_eq!(turnstile.enter(&mut tickets[at], 10, waker), at == 0);
        }
        assert!(!turnstile.enter(&mut tickets[2], 10, &wakers[2]));
        wake(turnstile.exit(10));
        assert_eq!(told(), [0, 1, 0, 0, 0]);
        // The place is that one's, whoever asks.
        assert!(!turnstile.enter(&mut tickets[0], 10, &wakers[0]));
        assert!(!turnstile.enter(&mut tickets[2], 10, &wakers[2]));
        wake(turnstile.leave(&mut tickets[1]));
        assert_eq!(told(), [0, 1, 1, 0, 0]);
        wake(turnstile.leave(&mut tickets[3]));
        assert!(turnstile.enter(&mut tickets[2], 10, &wakers[2]));
        wake(turnstile.exit(10));
        assert_eq!(told(), [0, 1, 1, 0, 1]);
        assert!(turnstile.enter(&mut tickets[4], 10, &wakers[4]));
        wake(turnstile.exit(10));
        assert!(turnstile.enter(&mut tickets[0], 10, &wakers[0]));
        assert_eq!(told(), [1, 1, 1, 0, 1]);
        wake(turnstile.exit(10));
        assert!(turnstile.waiting.is_empty() && turnstile.called.is_empty());
        assert_eq!((turnstile.count, turnstile.bytes), (0, 0));
    }

    /// A large thing that goes makes room for as many small ones as fit.
    #[test]
    fn as_many_are_woken_as_fit() {
        let mut turnstile = Turnstile::new(9, 100, Memory::new(&budget(None)));
        let mut tickets: [Ticket; 5] = std::array::from_fn(|_| Ticket::default());
        let waker = Waker::noop();
        assert!(turnstile.enter(&mut tickets[0], 1000, waker));
        for ticket in &mut tickets[1..] {
            assert!(!turnstile.enter(ticket, 40, waker));
        }
        assert_eq!(turnstile.exit(1000).len(), 2);
        assert_eq!(turnstile.leave(&mut tickets[1]).len(), 1);
        assert!(turnstile.enter(&mut tickets[2], 40, waker) && turnstile.enter(&mut tickets[3], 40, waker));
        assert!(!turnstile.enter(&mut tickets[4], 40, waker));
    }

    /// Small things take memory together, large ones have it; who finds none waits for others to go, and alone nobody waits. Method: a budget of
    /// one portion.
    #[test]
    fn who_finds_no_memory_waits() {
        let admission = budget(Some(PORTION));
        let taken = || admission.memory().expect("a budget").0;
        let mut turnstile = Turnstile::new(99, 1 << 20, Memory::new(&admission));
        let (mut ticket, waker) = (Ticket::default(), Waker::noop());
        assert!(turnstile.enter(&mut ticket, FREE, waker) && turnstile.enter(&mut ticket, FREE + 1, waker));
        assert_eq!(taken(), 0);
        let others = admission.more_memory(PORTION as u64).expect("all of it");
        assert!(!turnstile.enter(&mut ticket, 1, waker));
        assert_eq!(turnstile.exit(FREE + 1).len(), 0);
        assert_eq!(turnstile.exit(FREE).len(), 1);
        assert!(turnstile.enter(&mut ticket, 1, waker) && !turnstile.enter(&mut ticket, FREE, waker));
        drop(others);
        assert_eq!((turnstile.leave(&mut ticket).len(), taken()), (0, 0));
        for _ in 0..4 {
            assert!(turnstile.enter(&mut ticket, FREE, waker));
        }
        assert!(taken() == PORTION as u64 && !turnstile.enter(&mut ticket, FREE, waker));
        assert_eq!(turnstile.exit(1).len(), 1);
        assert_eq!((0..5).map(|_| turnstile.exit(FREE).len()).sum::<usize>(), 0);
        assert_eq!((turnstile.count, turnstile.small, taken()), (0, 0, 0));
    }
}
