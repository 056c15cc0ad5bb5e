//! Turns at the backend: how many connections it may have before it that it has not accepted yet.
//!
//! A backend with a short backlog loses connections when a spike is handed on to it, and `connect()` succeeds long before
//! the backend accepts. An answer, or an end, is the proof that it did: for that connection, and since an accept queue is
//! first in, first out, for all that were connected before it was begun. Those that were begun at the same time may be
//! behind it in the queue, in whatever order this process learnt of them.

use std::{
    collections::VecDeque,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until},
};
use tokio_util::task::TaskTracker;

use crate::slots;

/// A connection on which nothing was heard for this long is held to be accepted: a backend that serves long polls alone
/// would otherwise be paced to a standstill. One that accepts nobody for longer may see its queue overflow.
const ACCEPTED_BY_NOW: Duration = Duration::from_secs(1);

/// First come, first served.
#[derive(Debug)]
pub(super) struct Turns {
    free: Arc<Semaphore>,
    connected: Mutex<Waiting>,
    /// Held by the one who looks for turns that are overdue.
    sweeper: tokio::sync::Mutex<()>,
    /// How many there are.
    size: AtomicUsize,
    /// Those of connections that nobody waits for, with the moment: whoever needs one has it.
    spare: Mutex<Vec<(Instant, OwnedSemaphorePermit)>>,
}

/// Turns of connections that may not be accepted yet.
#[derive(Debug, Default)]
struct Waiting {
    /// How many were connected so far, which numbers them.
    count: u64,
    /// In the order in which they were connected, with the moment; the last one is the last of the count. `None`: it is over.
    turns: VecDeque<Option<(Instant, OwnedSemaphorePermit)>>,
}

impl Waiting {
    /// Where that of a number is, or would be; `None`: it and those before it are over.
    fn position(&self, number: u64) -> Option<usize> {
        self.turns.len().checked_sub(usize::try_from(self.count - number).ok()?)
    }

    fn connect(&mut self, turn: OwnedSemaphorePermit) -> u64 {
        self.turns.push_back(Some((Instant::now(), turn)));
        self.count += 1;
        self.count - 1
    }

    /// Ends a turn.
    fn take(&mut self, number: u64) -> Option<(Instant, OwnedSemaphorePermit)> {
        let position = self.position(number)?;
        self.turns.get_mut(position)?.take()
    }

    /// Ends those before a number, and forgets those that are over.
    fn take_until(&mut self, number: u64) -> Vec<(Instant, OwnedSemaphorePermit)> {
        let position = self.position(number).unwrap_or(0);
        let ended = self.turns.drain(..position).flatten().collect();
        while let Some(None) = self.turns.front() {
            self.turns.pop_front();
        }
        ended
    }
}

/// A connection whose turn lasts until it is known to be accepted, whatever becomes of whoever holds this.
#[derive(Debug)]
pub(super) struct Connected<'a> {
    turns: &'a Turns,
    number: u64,
    begun: Begun,
}

/// The moment at which a connection is begun: how many were connected by then.
#[derive(Debug, Clone, Copy)]
pub(super) struct Begun(u64);

impl Turns {
    pub(super) fn new(count: usize) -> Self {
        Self {
            free: Arc::new(Semaphore::new(count)),
            connected: Mutex::default(),
            sweeper: tokio::sync::Mutex::default(),
            size: AtomicUsize::new(count),
            spare: Mutex::default(),
        }
    }

    /// `to` of them from now on, where there were `from`; those that are taken stay so.
    pub(super) fn resize(&self, from: usize, to: usize, tracker: &TaskTracker) {
        self.size.store(to, Ordering::Relaxed);
        slots::resize(&self.free, from, to, tracker);
    }

    /// A turn; `None`: none came in time.
    pub(super) async fn next(&self, deadline: Instant) -> Option<OwnedSemaphorePermit> {
        // Most need not wait, and so need no timer.
        if let Ok(turn) = Arc::clone(&self.free).try_acquire_owned() {
            return Some(turn);
        }
        let spare = self.spare_ones().pop();
        drop(spare);
        let mut turn = pin!(Arc::clone(&self.free).acquire_owned());
        // One of those who wait looks for turns that are overdue; when it has its own, the next one does.
        let _sweeper = tokio::select! {
            biased;
            turn = &mut turn => return turn.ok(),
            sweeper = self.sweeper.lock() => sweeper,
            () = sleep_until(deadline) => return None,
        };
        loop {
            let look = self.end_overdue().min(deadline);
            tokio::select! {
                biased;
                turn = &mut turn => return turn.ok(),
                () = sleep_until(look) => if look == deadline { return None },
            }
        }
    }

    /// Takes a turn for a connection that nobody waits for, if more than half of all are free. It is held as one of a connection
    /// without an answer, but goes to the first who needs it: what is opened ahead never keeps anybody waiting.
    pub(super) fn spare(&self) -> bool {
        let mut spare = self.spare_ones();
        spare.retain(|(at, _)| at.elapsed() < ACCEPTED_BY_NOW);
        if self.free.available_permits() * 2 <= self.size.load(Ordering::Relaxed) {
            return false;
        }
        let turn = Arc::clone(&self.free).try_acquire_owned();
        spare.extend(turn.ok().map(|turn| (Instant::now(), turn)));
        true
    }

    fn spare_ones(&self) -> std::sync::MutexGuard<'_, Vec<(Instant, OwnedSemaphorePermit)>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called just before a connection is begun.
    pub(super) fn begin(&self) -> Begun {
        Begun(self.lock().count)
    }

    /// Keeps the turn of a connection that was just made until it is known to be accepted.
    pub(super) fn connected(&self, turn: OwnedSemaphorePermit, begun: Begun) -> Connected<'_> {
        let number = self.lock().connect(turn);
        Connected { turns: self, number, begun }
    }

    /// Ends the turns of those that must be accepted by now; gives the moment of the next one.
    fn end_overdue(&self) -> Instant {
        let mut connected = self.lock();
        while let Some(oldest) = connected.turns.front() {
            if let Some((at, _)) = oldest
                && *at + ACCEPTED_BY_NOW > Instant::now()
            {
                return *at + ACCEPTED_BY_NOW;
            }
            drop(connected.turns.pop_front());
        }
        // One that is connected from now on is due later than this.
        Instant::now() + ACCEPTED_BY_NOW
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.connected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connected<'_> {
    /// The backend has answered, or ended it.
    pub(super) fn was_accepted(&self) {
        let mut connected = self.turns.lock();
        let own = connected.take(self.number);
        let earlier = connected.take_until(self.begun.0);
        drop(connected);
        // Wakes those whose turn it is, without the lock.
        drop((own, earlier));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deadline() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    async fn connect(turns: &Turns) -> Connected<'_> {
        let turn = turns.next(deadline()).await.expect("a turn");
        turns.connected(turn, turns.begin())
    }

    /// An answer ends the turns of all that were connected before it was begun, and of none that came later.
    #[tokio::test(start_paused = true)]
    async fn an_answer_is_a_sign_for_those_before_it() {
        let turns = Turns::new(3);
        let mut connected = Vec::new();
        for _ in 0..3 {
            connected.push(connect(&turns).await);
        }
        assert_eq!(turns.free.available_permits(), 0);
        connected[1].was_accepted();
        assert_eq!(turns.free.available_permits(), 2);
        connected[0].was_accepted();
        assert_eq!(turns.free.available_permits(), 2);
        // Who gives up has a connection in the backend's queue all the same.
        connected.clear();
        assert_eq!(turns.free.available_permits(), 2);
    }

    /// Of two that were begun at the same time, either may be the first in the backend's queue, whichever is seen first here.
    #[tokio::test(start_paused = true)]
    async fn an_answer_is_no_sign_for_those_beside_it() {
        let turns = Turns::new(2);
        let begun = turns.begin();
        let mut connected = Vec::new();
        for _ in 0..2 {
            connected.push(turns.connected(turns.next(deadline()).await.expect("a turn"), begun));
        }
        connected[1].was_accepted();
        assert_eq!(turns.free.available_permits(), 1);
        connected[0].was_accepted();
        assert_eq!(turns.free.available_permits(), 2);
    }

    /// What is opened ahead takes half of the turns, and those only as long as nobody else needs them.
    #[tokio::test(start_paused = true)]
    async fn spare_turns_go_to_whoever_needs_them() {
        let turns = Turns::new(4);
        assert!(turns.spare() && turns.spare() && !turns.spare(), "half");
        let begun = Instant::now();
        let mut held = Vec::new();
        for _ in 0..4 {
            held.push(turns.next(deadline()).await.expect("a turn"));
        }
        assert_eq!(begun.elapsed(), Duration::ZERO, "nobody waits for what was opened ahead");
        assert!(!turns.spare());
        held.clear();
        assert!(turns.spare() && turns.spare() && !turns.spare());
        tokio::time::sleep(ACCEPTED_BY_NOW).await;
        assert!(turns.spare(), "by now they are accepted");
    }

    #[tokio::test(start_paused = true)]
    async fn without_any_answer_turns_end_by_themselves() {
        let turns = Turns::new(1);
        for _ in 0..3 {
            let begun = Instant::now();
            connect(&turns).await;
            connect(&turns).await;
            assert_eq!(begun.elapsed().as_secs(), 1);
            tokio::time::sleep(ACCEPTED_BY_NOW).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_wait_for_a_turn_is_bounded() {
        let turns = Turns::new(1);
        let turn = turns.next(deadline()).await;
        let begun = Instant::now();
        assert!(turn.is_some() && turns.next(deadline()).await.is_none());
        assert_eq!(begun.elapsed(), Duration::from_secs(5));
    }
}
