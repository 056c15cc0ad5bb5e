//! The clients' legs of one worker that wait for the next message: woken there, by one task, however many they are.
//!
//! So the hub wakes each worker once for a batch, and not each client from another thread.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::Waker,
};

use slab::Slab;
use tokio::sync::Notify;

/// See the module. Its lock is contended by nobody: all who take it are of the same thread.
#[derive(Default)]
pub(super) struct Ward {
    waiting: Mutex<Slab<Waiting>>,
    /// Something came.
    news: Notify,
    /// There is somebody who wakes.
    is_watched: AtomicBool,
}

struct Waiting {
    /// Whose it is: the place may be somebody else's by now.
    leg: u64,
    waker: Waker,
    /// It can't take more, and is only to know when this message is no longer kept.
    holds: Option<u64>,
}

/// A leg's place in it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bed(usize);

impl Ward {
    fn lock(&self) -> MutexGuard<'_, Slab<Waiting>> {
        // Nothing under this lock can panic half-way.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A leg waits from now on, in place of whatever it waited for before. `holds`: see [`Waiting`].
    pub(super) fn wait(&self, leg: u64, bed: Option<Bed>, waker: &Waker, holds: Option<u64>) -> Bed {
        let mut waiting = self.lock();
        if let Some(Bed(place)) = bed
            && let Some(known) = waiting.get_mut(place).filter(|known| known.leg == leg)
        {
            known.waker.clone_from(waker);
            known.holds = holds;
            return Bed(place);
        }
        Bed(waiting.insert(Waiting { leg, waker: waker.clone(), holds }))
    }

    /// A leg waits no longer.
    pub(super) fn leave(&self, leg: u64, bed: Bed) {
        let mut waiting = self.lock();
        let is_there = waiting.get(bed.0).is_some_and(|known| known.leg == leg);
        let gone = is_there.then(|| waiting.remove(bed.0));
        drop(waiting);
        // Whatever its waker does.
        drop(gone);
    }

    /// Whether there was nobody yet who wakes: from now on there is.
    pub(super) fn begin(&self) -> bool {
        !self.is_watched.swap(true, Ordering::Relaxed)
    }

    /// Somebody may be waiting.
    pub(super) fn is_watched(&self) -> bool {
        self.is_watched.load(Ordering::Relaxed)
    }

    /// Something came; to be said once for all that goes out together.
    pub(super) fn call(&self) {
        self.news.notify_one();
    }

    /// Until something comes.
    pub(super) async fn called(&self) {
        self.news.notified().await;
    }

    /// Wakes all who wait; of those who can't take more only whoever waits for a message before `first`. All: it is over.
    pub(super) fn wake(&self, first: u64, all: bool, woken: &mut Vec<Waker>) {
        let mut waiting = self.lock();
        waiting.retain(|_, leg| {
            let stays = !all && leg.holds.is_some_and(|message| message >= first);
            if !stays {
                woken.push(std::mem::replace(&mut leg.waker, Waker::noop().clone()));
            }
            stays
        });
        if waiting.is_empty() {
            // As large as the last crowd, for as long as the next one lasts.
            waiting.clear();
        }
        drop(waiting);
        woken.drain(..).for_each(Waker::wake);
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.lock().len()
    }
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

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Each who waits is woken once; who can't take more, only when what it waits for is gone; who has left, never.
    #[test]
    fn who_waits_is_woken_once() {
        let ward = Ward::default();
        let counts: [Arc<Count>; 3] = std::array::from_fn(|_| Arc::default());
        let [reads, holds, leaves] = counts.each_ref().map(|count| Waker::from(Arc::clone(count)));
        let bed = ward.wait(1, None, &reads, None);
        let held = ward.wait(2, None, &holds, Some(7));
        let left = ward.wait(3, None, &leaves, None);
        // Said again it is the same.
        assert_eq!(ward.wait(1, Some(bed), &reads, None).0, bed.0);
        ward.leave(3, left);
        let told = || counts.each_ref().map(|count| count.0.load(Ordering::Relaxed));
        ward.wake(7, false, &mut Vec::new());
        assert_eq!((told(), ward.len()), ([1, 0, 0], 1));
        ward.wake(8, false, &mut Vec::new());
        assert_eq!((told(), ward.len()), ([1, 1, 0], 0));
        // Its place is somebody else's by now.
        let other = ward.wait(4, None, &reads, None);
        ward.leave(1, bed);
        ward.leave(2, held);
        assert_eq!(ward.len(), 1);
        let _ = ward.wait(4, Some(other), &reads, Some(9));
        ward.wake(0, true, &mut Vec::new());
        assert_eq!((told(), ward.len()), ([2, 1, 0], 0));
    }
}
