//! What the pool waits for, in one place: one task sleeps until the next of them.
//!
//! At most one for each idle connection and each key that fails.

use std::{collections::BTreeMap, time::Instant};

use tokio::sync::Notify;

use super::{
    core::{Id, Timer},
    sync::{Mutex, lock},
};

#[derive(Debug)]
pub(super) struct Timers<K> {
    armed: Mutex<BTreeMap<(Instant, Id), (K, Timer)>>,
    /// Another one is the next.
    changed: Notify,
}

impl<K> Timers<K> {
    pub(super) fn new() -> Self {
        Self { armed: Mutex::new(BTreeMap::new()), changed: Notify::new() }
    }

    pub(super) fn arm(&self, at: Instant, generation: Id, key: K, timer: Timer) {
        let mut armed = lock(&self.armed);
        armed.insert((at, generation), (key, timer));
        let is_next = armed.first_key_value().is_some_and(|(next, _)| *next == (at, generation));
        drop(armed);
        if is_next {
            self.changed.notify_one();
        }
    }

    pub(super) fn disarm(&self, at: Instant, generation: Id) {
        let disarmed = lock(&self.armed).remove(&(at, generation));
        // The key is dropped without the lock.
        drop(disarmed);
    }

    /// Takes out the next one that is for a failure.
    #[cfg(not(loom))]
    pub(super) fn take_failure(&self) -> Option<(K, Timer, Id)> {
        let mut armed = lock(&self.armed);
        let (at, generation) =
            armed.iter().find_map(|(at, (_, timer))| matches!(timer, Timer::Failure).then_some(*at))?;
        armed.remove(&(at, generation)).map(|(key, timer)| (key, timer, generation))
    }

    /// Takes out those that are due.
    pub(super) fn due(&self, now: Instant) -> impl Iterator<Item = (K, Timer, Id)> + use<K> {
        let mut armed = lock(&self.armed);
        let later = armed.split_off(&(now, Id::MAX));
        let due = std::mem::replace(&mut *armed, later);
        due.into_iter().map(|((_, generation), (key, timer))| (key, timer, generation))
    }

    #[cfg(not(loom))]
    pub(super) fn next(&self) -> Option<Instant> {
        lock(&self.armed).first_key_value().map(|((at, _), _)| *at)
    }

    /// Resolves when the next one is another, or was since this resolved last.
    #[cfg(not(loom))]
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    #[cfg(all(test, not(loom)))]
    pub(super) fn len(&self) -> usize {
        lock(&self.armed).len()
    }
}
