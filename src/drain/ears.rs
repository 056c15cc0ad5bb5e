//! Who hears the order to end, at less than a future each: there is one for every session.

use std::{
    num::NonZeroU32,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::Waker,
};

use slab::Slab;

use super::Drain;

/// Lists of those who listen. Sessions of different workers are in different ones, as far as that goes: each begins and ends
/// with a look into its own.
#[derive(Debug, Default)]
pub(super) struct Ears([Mutex<Slab<Waker>>; LISTS]);

const LISTS: usize = 16;

/// The drain, and who is woken by each of its orders. The flags say what was ordered: they are set before anybody is woken.
#[derive(Debug)]
pub struct Ear {
    drain: Drain,
    /// The place in a list.
    place: Option<Place>,
}

/// One in four bytes, since there is one for every session: the number of the list, that of the place in it, and one more.
#[derive(Debug, Clone, Copy)]
struct Place(NonZeroU32);

impl Place {
    fn new(list: u8, key: usize) -> Self {
        let place = u32::try_from(key * LISTS + usize::from(list) + 1).ok().and_then(NonZeroU32::new);
        Self(place.expect("a process has far fewer than 2^28 sessions"))
    }

    const fn list_and_key(self) -> (usize, usize) {
        let place = self.0.get() as usize - 1;
        (place % LISTS, place / LISTS)
    }
}

impl Ears {
    fn list(&self, index: usize) -> MutexGuard<'_, Slab<Waker>> {
        self.0[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes all.
    pub(super) fn wake(&self) {
        for index in 0..LISTS {
            // A task that is woken may end, on another thread, before this is through.
            let wakers: Vec<_> = self.list(index).iter().map(|(_, waker)| waker.clone()).collect();
            wakers.into_iter().for_each(Waker::wake);
        }
    }
}

impl Ear {
    /// It hears nothing yet.
    pub const fn new(drain: Drain) -> Self {
        Self { drain, place: None }
    }

    /// The drain.
    pub const fn drain(&self) -> &Drain {
        &self.drain
    }

    /// From now on the task is woken by each order; those that were given before are to be looked at by whoever calls this, after it.
    /// Later calls do nothing: it is always the same task.
    pub fn listen(&mut self, waker: &Waker) {
        if self.place.is_none() {
            let list = list_of_thread();
            let key = self.drain.inner.ears.list(usize::from(list)).insert(waker.clone());
            self.place = Some(Place::new(list, key));
        }
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        if let Some((list, key)) = self.place.map(Place::list_and_key) {
            self.drain.inner.ears.list(list).try_remove(key);
        }
    }
}

/// Threads take lists in turn.
fn list_of_thread() -> u8 {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static LIST: u8 = (NEXT.fetch_add(1, Ordering::Relaxed) % LISTS).to_le_bytes()[0]);
    LIST.with(|list| *list)
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, atomic::AtomicU32},
        task::Wake,
        time::Duration,
    };

    use super::{
        super::{Config, Readiness},
        *,
    };

    #[derive(Debug, Default)]
    struct Count(AtomicU32);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn drain() -> Drain {
        Drain::new(Config {
            delay: Duration::ZERO,
            window: Duration::from_secs(1),
            quiet: Duration::ZERO,
            timeout: Duration::from_secs(1),
            close_code: 1001,
            reason: String::new(),
            readiness: Readiness::AfterDelay,
        })
    }

    /// Each order wakes each listener once, on whatever thread it is, and nobody who has gone.
    #[test]
    fn each_order_is_heard_once() {
        let drain = drain();
        let ears: Vec<_> = (0..40)
            .map(|_| {
                let (drain, count) = (drain.clone(), Arc::new(Count::default()));
                std::thread::spawn(move || {
                    let mut ear = Ear::new(drain);
                    for _ in 0..2 {
                        ear.listen(&Arc::clone(&count).into());
                    }
                    (ear, count)
                })
                .join()
                .unwrap()
            })
            .collect();
        let woken = |ears: &[(Ear, Arc<Count>)]| {
            ears.iter().map(|(_, count)| count.0.load(Ordering::Relaxed)).collect::<Vec<_>>()
        };
        for _ in 0..2 {
            drain.begin();
            assert_eq!(woken(&ears), vec![1; 40]);
        }
        let (gone, left): (Vec<_>, Vec<_>) = ears.into_iter().enumerate().partition(|(index, _)| index % 3 == 0);
        let strip = |ears: Vec<(usize, (Ear, Arc<Count>))>| ears.into_iter().map(|(_, ear)| ear).collect::<Vec<_>>();
        let (gone, left) = (strip(gone), strip(left));
        let counts: Vec<_> = gone
            .into_iter()
            .map(|(ear, count)| {
                drop(ear);
                count
            })
            .collect();
        drain.hurry();
        assert_eq!(woken(&left), vec![2; left.len()]);
        assert!(counts.iter().all(|count| count.0.load(Ordering::Relaxed) == 1));
        // Places are given again.
        let mut ear = Ear::new(drain.clone());
        ear.listen(Waker::noop());
        let places: usize = (0..LISTS).map(|list| drain.inner.ears.list(list).len()).sum();
        assert_eq!(places, left.len() + 1);
    }
}
