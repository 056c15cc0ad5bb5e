//! Turns at the backend: how many connections it may have before it that it has not accepted yet.
//!
//! A backend with a short backlog loses connections when a spike is handed on to it, and `connect()` succeeds long before
//! the backend accepts. An answer is the proof that it did.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until, timeout},
};

/// A connection that nobody answered on for this long is held to be accepted, even though no later one was answered
/// either: a backend that serves long polls alone would otherwise be paced to a standstill.
const ACCEPTED_BY_NOW: Duration = Duration::from_secs(1);

/// First come, first served.
#[derive(Debug)]
pub(super) struct Turns {
    free: Arc<Semaphore>,
    patience: Duration,
    next: AtomicU64,
    /// Turns of connections without an answer, in the order in which they were connected.
    connected: Mutex<BTreeMap<u64, OwnedSemaphorePermit>>,
}

/// A turn of a connection that the backend may not have accepted yet.
#[derive(Debug)]
pub(super) struct Connected<'a> {
    turns: &'a Turns,
    number: u64,
    since: Instant,
}

impl Turns {
    pub(super) fn new(count: usize, patience: Duration) -> Self {
        let free = Arc::new(Semaphore::new(count));
        Self { free, patience, next: AtomicU64::new(0), connected: Mutex::default() }
    }

    /// A turn; `None`: none came in time.
    pub(super) async fn next(&self) -> Option<OwnedSemaphorePermit> {
        // Most need not wait, and so need no timer.
        if let Ok(turn) = Arc::clone(&self.free).try_acquire_owned() {
            return Some(turn);
        }
        timeout(self.patience, Arc::clone(&self.free).acquire_owned()).await.ok()?.ok()
    }

    /// Keeps the turn of a connection that was just made, until there is a sign that the backend has accepted it.
    pub(super) fn connected(&self, turn: OwnedSemaphorePermit) -> Connected<'_> {
        let mut connected = self.lock();
        // Under the lock, so that numbers are in the order of the map's keys and of connections.
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        connected.insert(number, turn);
        drop(connected);
        Connected { turns: self, number, since: Instant::now() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, OwnedSemaphorePermit>> {
        self.connected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connected<'_> {
    /// The backend has answered. An accept queue is first in, first out: it has also accepted all that were connected before.
    pub(super) fn answered(&self) {
        let mut connected = self.turns.lock();
        let later = connected.split_off(&(self.number + 1));
        let accepted = std::mem::replace(&mut *connected, later);
        drop(connected);
        // Wakes those whose turn it is, without the lock.
        drop(accepted);
    }

    /// Resolves when its turn has ended for want of patience.
    pub(super) async fn is_over(&self) {
        sleep_until(self.since + ACCEPTED_BY_NOW).await;
        self.end();
    }

    fn end(&self) {
        let turn = self.turns.lock().remove(&self.number);
        drop(turn);
    }
}

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer ends the turns of all that were connected before it, and of none that came later.
    #[tokio::test(start_paused = true)]
    async fn an_answer_is_a_sign_for_those_before_it() {
        let turns = Turns::new(3, Duration::from_secs(5));
        let mut connected = Vec::new();
        for _ in 0..3 {
            connected.push(turns.connected(turns.next().await.expect("a turn")));
        }
        assert_eq!(turns.free.available_permits(), 0);
        connected[1].answered();
        assert_eq!(turns.free.available_permits(), 2);
        drop(connected.pop());
        assert_eq!(turns.free.available_permits(), 3);
        drop(connected);
        assert_eq!(turns.free.available_permits(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn without_any_answer_turns_end_by_themselves() {
        let turns = Turns::new(1, Duration::from_secs(5));
        let first = turns.connected(turns.next().await.expect("a turn"));
        tokio::join!(first.is_over(), async {
            let begun = Instant::now();
            assert!(turns.next().await.is_some());
            assert_eq!(begun.elapsed(), ACCEPTED_BY_NOW);
        });
    }

    #[tokio::test(start_paused = true)]
    async fn the_wait_for_a_turn_is_bounded() {
        let turns = Turns::new(1, Duration::from_secs(5));
        let turn = turns.next().await;
        let begun = Instant::now();
        assert!(turn.is_some() && turns.next().await.is_none());
        assert_eq!(begun.elapsed(), Duration::from_secs(5));
    }
}
