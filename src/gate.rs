//! How many handshakes a worker works on at once. In a spike they are begun in order and each is brought to its end, rather
//! than all of them being begun and kept waiting for one another: that takes a tenth of the memory, and less time in all.
//!
//! Who waits here costs a socket and a small task. A client that does not go on with its request holds nobody up.

use std::{
    sync::{
        Arc,
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
/// headers, measured at 43 KiB.
pub const HANDSHAKE_BYTES: u64 = 48 << 10;

/// The longest wait at the gate. It is for spikes, and no limit: since nobody keeps a place for longer than [`STAY`], 640
/// begin per second and worker even when the backend answers none.
const WAIT: Duration = Duration::from_secs(5);

/// The longest that one keeps its place while it waits, for its turn or an answer: others may want something else of the
/// backend, or nothing of it.
pub const STAY: Duration = Duration::from_millis(100);

/// The longest that the first message of a new session waits for the handshakes of others.
const HOLD: Duration = Duration::from_secs(2);

/// One for each worker.
#[derive(Debug)]
pub struct Gate {
    slots: Arc<Semaphore>,
    crowd: Arc<Crowd>,
}

/// Those who wait at the gates of all workers: these share the processors.
#[derive(Debug, Default)]
pub struct Crowd {
    waiting: AtomicUsize,
    is_calm: Notify,
}

/// One that is worked on, until it is dropped.
#[derive(Debug)]
pub struct Pass {
    _slot: OwnedSemaphorePermit,
    gate: Arc<Gate>,
}

impl Gate {
    /// Nobody waits.
    pub fn new(crowd: &Arc<Crowd>) -> Arc<Self> {
        let slots = Arc::new(Semaphore::new(AT_ONCE));
        Arc::new(Self { slots, crowd: Arc::clone(crowd) })
    }

    /// Waits for a turn, in order; `None`: it was a long wait, so go on without.
    pub async fn pass(self: &Arc<Self>) -> Option<Pass> {
        let slot = if let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() {
            slot
        } else {
            let _waiting = Waiting::new(self);
            timeout(WAIT, Arc::clone(&self.slots).acquire_owned()).await.ok()?.ok()?
        };
        Some(Pass { _slot: slot, gate: Arc::clone(self) })
    }

    /// Resolves when no handshake waits, or after a while: clients that connect give up sooner than those that are connected.
    pub async fn calm(&self) {
        if self.crowd.waiting.load(Ordering::Relaxed) > 0 {
            let _ = timeout(HOLD, self.crowd.is_calm.notified()).await;
        }
    }
}

impl Crowd {
    fn look(&self) {
        if self.waiting.load(Ordering::Relaxed) == 0 {
            self.is_calm.notify_waiters();
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.crowd.look();
    }
}

/// Counted while it waits, also when it is dropped meanwhile.
struct Waiting<'a>(&'a Gate);

impl<'a> Waiting<'a> {
    fn new(gate: &'a Gate) -> Self {
        gate.crowd.waiting.fetch_add(1, Ordering::Relaxed);
        Self(gate)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.crowd.waiting.fetch_sub(1, Ordering::Relaxed);
        self.0.crowd.look();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn the_gate_bounds_what_is_begun_and_the_wait() {
        let gate = Gate::new(&Arc::default());
        let mut inside = Vec::new();
        for _ in 0..AT_ONCE {
            inside.push(gate.pass().await.expect("a slot"));
        }
        let begun = Instant::now();
        assert!(gate.pass().await.is_none());
        assert_eq!(begun.elapsed(), WAIT);
        inside.pop();
        assert!(gate.pass().await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn sessions_begin_when_no_handshake_waits() {
        let gate = Gate::new(&Arc::default());
        let begun = Instant::now();
        gate.calm().await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        let mut inside = Vec::new();
        for _ in 0..AT_ONCE {
            inside.push(gate.pass().await.expect("a slot"));
        }
        let waits = async {
            let _pass = gate.pass().await;
        };
        let calm = async {
            tokio::task::yield_now().await;
            gate.calm().await;
            assert_eq!(begun.elapsed(), Duration::from_millis(100));
        };
        let leaves = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            inside.clear();
        };
        tokio::join!(waits, calm, leaves);
    }
}
