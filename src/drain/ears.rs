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
    fn new(list: u8, key: usize) -> Option<Self> {
        let place = key.checked_mul(LISTS)?.checked_add(usize::from(list) + 1)?;
        u32::try_from(place).ok().and_then(NonZeroU32::new).map(Self)
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
            self.place = Place::new(list, key);
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
