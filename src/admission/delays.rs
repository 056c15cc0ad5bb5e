//! Sessions that `close.delay` holds: their clients have left, and the backend is not told yet.
//!
//! Each keeps a place in the limits meanwhile. When places become few, the delay of the oldest is over.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::Waker,
};

/// Those of all workers, by the order in which they came.
#[derive(Debug, Default)]
pub struct Delays {
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    by_age: BTreeMap<u64, (Waker, Arc<AtomicBool>)>,
    next: u64,
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub struct Delay {
    delays: Arc<Delays>,
    id: u64,
    is_over: Arc<AtomicBool>,
}

impl Delays {
    /// Of one more session. Its task is woken when its delay is over before its time.
    #[must_use]
    pub fn begin(self: &Arc<Self>, waker: &Waker) -> Delay {
        let is_over = Arc::new(AtomicBool::new(false));
        let mut held = self.lock();
        let id = held.next;
        held.next += 1;
        held.by_age.insert(id, (waker.clone(), Arc::clone(&is_over)));
        drop(held);
        Delay { delays: Arc::clone(self), id, is_over }
    }

    /// Ends the oldest; false: there is none. Its place is free when its backend has taken leave.
    pub(super) fn end_oldest(&self) -> bool {
        let oldest = self.lock().by_age.pop_first();
        let Some((_, (waker, is_over))) = oldest else { return false };
        is_over.store(true, Ordering::Release);
        waker.wake();
        true
    }

    pub(super) fn is_any(&self) -> bool {
        !self.lock().by_age.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        // Nothing under this lock can panic half-way.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Delay {
    /// Somebody else needs its place.
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }
}

impl Drop for Delay {
    fn drop(&mut self) {
        // Its waker may be the last hold of a task, which is not to be dropped under the lock.
        let gone = self.delays.lock().by_age.remove(&self.id);
        drop(gone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_is_over_first_and_who_has_gone_is_not_asked() {
        let delays = Arc::new(Delays::default());
        assert!(!delays.end_oldest());
        let mut all: Vec<_> = (0..3).map(|_| delays.begin(Waker::noop())).collect();
        drop(all.remove(0));
        assert!(delays.end_oldest());
        assert_eq!(all.iter().map(Delay::is_over).collect::<Vec<_>>(), [true, false]);
        assert!(delays.end_oldest());
        assert!(all.iter().all(Delay::is_over));
        assert!(!delays.end_oldest());
    }
}
