//! Sessions that `close.delay` holds: their clients have left, and the backend is not told yet.
//!
//! Each keeps a place in the limits meanwhile. When places become few, each client that comes ends the delay of the oldest.

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
    by_age: BTreeMap<u64, Entry>,
    next: u64,
    /// Those whose delay was ended, and that still have their places.
    leaving: usize,
}

#[derive(Debug)]
struct Entry {
    waker: Waker,
    is_over: Arc<AtomicBool>,
    sockets: usize,
}

/// One of them, until it is dropped: with its session, if its delay was ended.
#[derive(Debug)]
pub struct Delay {
    delays: Arc<Delays>,
    id: u64,
    is_over: Arc<AtomicBool>,
}

impl Delays {
    /// Of one more session that has so many sockets left. Its task is woken when its delay is over before its time.
    #[must_use]
    pub fn begin(self: &Arc<Self>, waker: &Waker, sockets: usize) -> Delay {
        let is_over = Arc::new(AtomicBool::new(false));
        let mut held = self.lock();
        let id = held.next;
        held.next += 1;
        held.by_age.insert(id, Entry { waker: waker.clone(), is_over: Arc::clone(&is_over), sockets });
        drop(held);
        Delay { delays: Arc::clone(self), id, is_over }
    }

    /// Ends the oldest, and gives the number of its sockets, whose places are free when its backend has taken leave; `None`: there is none.
    pub(super) fn end_oldest(&self) -> Option<usize> {
        let mut held = self.lock();
        let (_, Entry { waker, is_over, sockets }) = held.by_age.pop_first()?;
        held.leaving += 1;
        drop(held);
        is_over.store(true, Ordering::Release);
        waker.wake();
        Some(sockets)
    }

    /// A place will be free before long.
    pub(super) fn is_any_leaving(&self) -> bool {
        self.lock().leaving > 0
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
        let mut held = self.delays.lock();
        let gone = held.by_age.remove(&self.id);
        held.leaving -= usize::from(gone.is_none());
        // Its waker may be the last hold of a task, which is not to be dropped under the lock.
        drop(held);
        drop(gone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_is_over_first_and_who_has_gone_is_not_asked() {
        let delays = Arc::new(Delays::default());
        assert_eq!(delays.end_oldest(), None);
        let mut all: Vec<_> = (0..3).map(|sockets| delays.begin(Waker::noop(), sockets)).collect();
        drop(all.remove(0));
        assert_eq!(delays.end_oldest(), Some(1));
        assert!(delays.is_any_leaving());
        assert_eq!(all.iter().map(Delay::is_over).collect::<Vec<_>>(), [true, false]);
        assert_eq!(delays.end_oldest(), Some(2));
        assert!(all.iter().all(Delay::is_over));
        assert_eq!(delays.end_oldest(), None);
        drop(all);
        assert!(!delays.is_any_leaving());
    }
}
