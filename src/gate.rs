//! How many handshakes a worker works on at once. In a spike they are begun in order and each is brought to its end, rather
//! than all of them being begun and kept waiting for one another: that takes a tenth of the memory, and less time in all.
//!
//! Who waits in the pending queue costs a socket and nothing else. Workers that share one take from it as they get on, so that one with
//! less of a processor serves fewer. A client that does not go on with its request holds nobody up.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// Handshakes of one worker that are worked on at once.
pub const AT_ONCE: usize = 64;

/// What one of them takes in memory beyond the connection itself, in bytes: two HTTP parsers with their buffers and
/// headers, measured at 43 KiB where hyper reads both legs; one that is there as a whole takes less.
pub const HANDSHAKE_BYTES: u64 = 48 << 10;

/// The longest for which a worker takes nobody from the pending queue. It is for accidents: since nobody keeps a place for longer than
/// [`PROMPT`], 640 begin per second and worker even when the backend answers none.
const WAIT: Duration = Duration::from_secs(5);

/// The longest that one keeps its place while it waits, for its turn or an answer: others may want something else of the
/// backend, or nothing of it.
pub const PROMPT: Duration = Duration::from_millis(100);

/// The longest that the first message of a new session waits for the handshakes of others.
const HOLD: Duration = Duration::from_secs(2);

/// One for each worker; clones are the same.
#[derive(Debug, Clone)]
pub struct Gate {
    slots: Arc<Semaphore>,
    waiters: Arc<Waiters>,
}

/// Those who had to wait for any worker, until they are answered or have had [`PROMPT`]: all workers share the processors.
#[derive(Debug, Default)]
pub struct Waiters {
    size: AtomicUsize,
    is_calm: Notify,
}

/// One that is worked on, until it is dropped.
#[derive(Debug)]
pub struct Permit {
    _slot: Option<OwnedSemaphorePermit>,
    _waiter: Option<Waiter>,
}

/// Those for whom nothing was done yet, first come, first served. Its bound is that of all connections.
#[derive(Debug)]
pub struct PendingQueue<T> {
    queue: Mutex<VecDeque<(T, Waiter)>>,
    /// A permit for each in the queue.
    count: Semaphore,
    waiters: Arc<Waiters>,
}

/// One of the waiters.
#[derive(Debug)]
struct Waiter(Arc<Waiters>);

impl Gate {
    /// Nobody waits.
    pub fn new(waiters: &Arc<Waiters>) -> Self {
        Self { slots: Arc::new(Semaphore::new(AT_ONCE)), waiters: Arc::clone(waiters) }
    }

    /// A place, if one is free. One of them is always with whoever waits for somebody in the pending queue.
    pub fn try_permit(&self) -> Option<Permit> {
        let slot = Arc::clone(&self.slots).try_acquire_owned().ok()?;
        Some(Permit { _slot: Some(slot), _waiter: None })
    }

    /// Waits for a place, for somebody who can't be with another worker any more. After a long wait it goes on without.
    pub async fn turn(&self) -> Permit {
        if let Some(permit) = self.try_permit() {
            return permit;
        }
        let waiter = Waiter::new(&self.waiters);
        let slot = timeout(WAIT, Arc::clone(&self.slots).acquire_owned()).await.ok().and_then(Result::ok);
        Permit { _slot: slot, _waiter: Some(waiter) }
    }

    /// Waits for a turn, then for somebody in the pending queue whose it is; `None`: it was closed, and nobody is left. After a long
    /// wait for a turn it goes on without.
    pub async fn next<T>(&self, pending: &PendingQueue<T>) -> Option<(T, Permit)> {
        let slot = timeout(WAIT, Arc::clone(&self.slots).acquire_owned()).await.ok().and_then(Result::ok);
        let (first, waiter) = pending.first().await?;
        Some((first, Permit { _slot: slot, _waiter: Some(waiter) }))
    }

    /// Nobody waits.
    pub fn is_calm(&self) -> bool {
        self.waiters.size.load(Ordering::Acquire) == 0
    }

    /// Resolves when all who had to wait are answered, or after a while: clients that connect give up sooner than those that
    /// are connected.
    pub async fn calm(&self) {
        // Made before it is looked at: the last of them may be answered in between, on another thread.
        let calm = self.waiters.is_calm.notified();
        if !self.is_calm() {
            let _ = timeout(HOLD, calm).await;
        }
    }
}

impl<T> PendingQueue<T> {
    /// Nobody is in it.
    pub fn new(waiters: &Arc<Waiters>) -> Self {
        Self { queue: Mutex::default(), count: Semaphore::new(0), waiters: Arc::clone(waiters) }
    }

    /// Whether somebody waits.
    pub fn is_empty(&self) -> bool {
        self.count.available_permits() == 0
    }

    /// Puts one behind the others; it is given back when the pending queue is closed.
    pub fn push(&self, last: T) -> Result<(), T> {
        let mut queue = self.lock();
        if self.count.is_closed() {
            return Err(last);
        }
        queue.push_back((last, Waiter::new(&self.waiters)));
        drop(queue);
        self.count.add_permits(1);
        Ok(())
    }

    /// Nobody comes any more. Those inside are still taken.
    pub fn close(&self) {
        self.count.close();
    }

    async fn first(&self) -> Option<(T, Waiter)> {
        match self.count.acquire().await {
            Ok(permit) => permit.forget(),
            // Closed: the rest goes without waiting.
            Err(_) => _ = self.count.forget_permits(1),
        }
        self.lock().pop_front()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<(T, Waiter)>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiter {
    fn new(waiters: &Arc<Waiters>) -> Self {
        waiters.size.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(waiters))
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if self.0.size.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.is_calm.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{task::yield_now, time::Instant};

    fn full(gate: &Gate) -> Vec<Permit> {
        (0..AT_ONCE).map(|_| gate.try_permit().expect("a slot")).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn the_gate_bounds_what_is_begun_and_the_wait() {
        let waiters = Arc::default();
        let (gate, pending) = (Gate::new(&waiters), PendingQueue::new(&waiters));
        let mut inside = full(&gate);
        assert!(gate.try_permit().is_none());
        pending.push(1).expect("it is open");
        pending.push(2).expect("it is open");
        let begun = Instant::now();
        assert!(gate.next(&pending).await.is_some());
        assert_eq!(begun.elapsed(), WAIT);
        inside.pop();
        assert!(gate.next(&pending).await.is_some());
        assert_eq!(begun.elapsed(), WAIT);
    }

    #[tokio::test(start_paused = true)]
    async fn sessions_begin_when_all_who_waited_are_answered() {
        let waiters = Arc::default();
        let (gate, pending) = (Gate::new(&waiters), PendingQueue::new(&waiters));
        let begun = Instant::now();
        gate.calm().await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        pending.push(()).expect("it is open");
        let waits = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let _permit = gate.next(&pending).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        let calm = async {
            gate.calm().await;
            assert_eq!(begun.elapsed(), Duration::from_millis(150));
        };
        tokio::join!(waits, calm);
    }

    /// Whoever can't go elsewhere waits for a place of this worker's, before those who come later, and not for ever.
    #[tokio::test(start_paused = true)]
    async fn who_has_begun_with_a_worker_waits_for_it() {
        let waiters = Arc::default();
        let gate = Gate::new(&waiters);
        let begun = Instant::now();
        drop(gate.turn().await);
        let mut inside = full(&gate);
        let (_permit, ()) = tokio::join!(gate.turn(), async {
            yield_now().await;
            assert_eq!(waiters.size.load(Ordering::Relaxed), 1);
            inside.pop();
        });
        assert_eq!(begun.elapsed(), Duration::ZERO);
        drop(gate.turn().await);
        assert_eq!((begun.elapsed(), waiters.size.load(Ordering::Relaxed)), (WAIT, 1));
    }

    /// Whichever worker has room takes the next one, in the order in which they came.
    #[tokio::test(start_paused = true)]
    async fn workers_take_from_a_lobby_as_they_get_on() {
        let waiters = Arc::default();
        let (busy, free, pending) = (Gate::new(&waiters), Gate::new(&waiters), PendingQueue::new(&waiters));
        let mut inside = full(&busy);
        for number in 0..4 {
            pending.push(number).expect("it is open");
        }
        let (busy_one, free_one) = tokio::join!(busy.next(&pending), async {
            let mut taken = Vec::new();
            for _ in 0..2 {
                taken.push(free.next(&pending).await.expect("one waits"));
            }
            // No timer is due before this.
            inside.pop();
            taken
        });
        assert_eq!(free_one.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(busy_one.as_ref().map(|(number, _)| *number), Some(2));
        drop((busy_one, free_one));
        assert_eq!(waiters.size.load(Ordering::Relaxed), 1, "the one in the queue");
    }

    /// Nobody is forgotten in a pending queue that is closed.
    #[tokio::test(start_paused = true)]
    async fn a_closed_lobby_is_emptied() {
        let waiters = Arc::default();
        let (gate, pending) = (Gate::new(&waiters), PendingQueue::new(&waiters));
        pending.push(1).expect("it is open");
        pending.close();
        assert_eq!(pending.push(2), Err(2));
        assert!(matches!(gate.next(&pending).await, Some((1, _))));
        assert!(pending.is_empty());
        assert!(gate.next(&pending).await.is_none());
        let waiting = PendingQueue::<u8>::new(&waiters);
        let (ended, ()) = tokio::join!(gate.next(&waiting), async {
            yield_now().await;
            waiting.close();
        });
        assert!(ended.is_none());
    }
}
