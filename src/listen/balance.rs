//! Which worker gets a connection: the one that accepted it, unless it is clearly busier than another.
//!
//! The kernel spreads clients over the accept queues by a hash, which is even on average, lumpy for tens, and blind to a
//! session that keeps its worker busy. A session stays with its worker for life, so it is given away before it begins.

use std::{
    net::{SocketAddr, TcpStream as StdStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{runtime::Handle, sync::mpsc, time::Instant};

use crate::{
    admission::Place,
    gate::{PendingQueue, Waiters},
    metrics::Counted,
};

/// A connection that was accepted.
#[derive(Debug)]
pub struct Accepted {
    /// Not registered with any runtime.
    pub stream: StdStream,
    /// The client.
    pub peer: SocketAddr,
    /// What is accounted for it.
    pub accounting: Accounting,
    /// Its PROXY header was read, and `peer` is who that names: what is left of the time for the rest of its request.
    pub left: Option<Duration>,
}

/// One that waits for a worker to have room.
#[derive(Debug)]
pub struct Pending {
    /// It.
    pub accepted: Accepted,
    /// Its place in the metrics of those.
    pub counted: Counted,
}

/// What is accounted for a connection until its last socket is closed.
#[derive(Debug)]
pub struct Accounting {
    /// Its place in the limits.
    pub place: Place,
    /// Its place in the count of its worker.
    pub guard: ConnectionGuard,
    /// Its place in the metrics.
    pub counted: Counted,
}

/// All workers; clones are the same.
#[derive(Debug, Clone)]
pub struct Balancer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    members: Vec<Member>,
    hand_off: bool,
}

#[derive(Debug)]
struct Member {
    runtime: Handle,
    connections: Arc<Connections>,
    /// Bounded by the places that all accepted connections have.
    inbox: mpsc::UnboundedSender<Accepted>,
    /// Where connections wait for a worker: for any of them, unless each keeps its own.
    pending: Arc<PendingQueue<Pending>>,
    pulse: Mutex<Pulse>,
}

/// How much of the time a worker had something to do, and how many connections left it.
#[derive(Debug)]
struct Pulse {
    at: Instant,
    busy: Duration,
    /// Over about [`SETTLED`].
    share: f32,
    /// Since the look before.
    lately: f32,
    gone: usize,
    /// In [`SOON`].
    leaving: usize,
}

/// Those of one worker.
#[derive(Debug, Default)]
struct Connections {
    now: AtomicUsize,
    /// Those that have left it.
    gone: AtomicUsize,
}

/// The count of one worker.
#[derive(Debug, Clone)]
pub struct ConnectionCounter(Arc<Connections>);

/// A connection in the count of its worker.
#[derive(Debug)]
pub struct ConnectionGuard(Arc<Connections>);

/// What is known of a worker's load.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Load {
    connections: usize,
    /// So many of them are about to leave.
    leaving: usize,
    /// 0 to 1.
    busy: f32,
    /// The same, by the last look alone.
    lately: f32,
}

/// The shortest time over which it is said how busy a worker was.
const PULSE: Duration = Duration::from_millis(20);

/// How busy it was over about so long counts: in 20 ms one of two workers with the same work is often busier by far, since other programs have its
/// core, and soon the other one is.
const SETTLED: Duration = Duration::from_millis(500);

/// Differences up to these are none: giving a connection away costs a wake-up of another thread.
const BUSIER: f32 = 0.25;
const MORE: usize = 8;

/// Nor is one that is gone so soon, since so many connections leave: where they come and go by the thousand it is chance, and the next one is
/// the other way round.
const SOON: Duration = Duration::from_millis(100);

impl Balancer {
    /// For each worker its runtime and where what others accept for it goes.
    pub fn new(
        workers: impl IntoIterator<Item = (Handle, mpsc::UnboundedSender<Accepted>)>,
        waiters: &Arc<Waiters>,
        hand_off: bool,
    ) -> Self {
        let shared = Arc::new(PendingQueue::new(waiters));
        let member = |(runtime, inbox)| Member {
            runtime,
            connections: Arc::default(),
            inbox,
            pending: if hand_off { Arc::clone(&shared) } else { Arc::new(PendingQueue::new(waiters)) },
            pulse: Mutex::new(Pulse {
                at: Instant::now(),
                busy: Duration::ZERO,
                share: 0.0,
                lately: 0.0,
                gone: 0,
                leaving: 0,
            }),
        };
        Self { inner: Arc::new(Inner { members: workers.into_iter().map(member).collect(), hand_off }) }
    }

    /// Where connections wait for worker `index`. It is closed with the last clone of this.
    pub fn pending(&self, index: usize) -> Arc<PendingQueue<Pending>> {
        Arc::clone(&self.inner.members[index].pending)
    }

    /// The connections of worker `index`.
    pub fn counter(&self, index: usize) -> ConnectionCounter {
        ConnectionCounter(Arc::clone(&self.inner.members[index].connections))
    }

    /// Gives a connection that worker `by` accepted to whoever is to serve it: `Some` when that is `by` itself.
    pub fn place(
        &self,
        by: usize,
        stream: StdStream,
        peer: SocketAddr,
        place: Place,
        counted: Counted,
    ) -> Option<Accepted> {
        let Inner { members, hand_off } = &*self.inner;
        // Who is turned away is no load.
        let index = if *hand_off && place.refused.is_none() && members.len() > 1 { self.choose(by) } else { by };
        let accounting = Accounting { place, guard: self.counter(index).one_more(), counted };
        let accepted = Accepted { stream, peer, accounting, left: None };
        if index == by {
            return Some(accepted);
        }
        // A worker that takes nobody any more is about to end: so is this one.
        members[index].inbox.send(accepted).err().map(|unsent| unsent.0)
    }

    fn choose(&self, by: usize) -> usize {
        let loads: Vec<Load> = self.inner.members.iter().map(Member::load).collect();
        least(&loads, by)
    }
}

impl Member {
    fn load(&self) -> Load {
        let mut pulse = self.pulse.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let passed = now - pulse.at;
        if passed >= PULSE {
            let busy = self.runtime.metrics().worker_total_busy_duration(0);
            let lately = (busy.saturating_sub(pulse.busy).as_secs_f32() / passed.as_secs_f32()).min(1.0);
            let weight = (passed.as_secs_f32() / SETTLED.as_secs_f32()).min(1.0);
            let share = pulse.share + (lately - pulse.share) * weight;
            let gone = self.connections.gone.load(Ordering::Relaxed);
            let leaving = gone.wrapping_sub(pulse.gone) as u128 * SOON.as_micros() / passed.as_micros();
            let leaving = usize::try_from(leaving).unwrap_or(usize::MAX);
            *pulse = Pulse { at: now, busy, share, lately, gone, leaving };
        }
        let Pulse { share, lately, leaving, .. } = *pulse;
        Load { connections: self.connections.now.load(Ordering::Relaxed), leaving, busy: share, lately }
    }
}

impl ConnectionCounter {
    /// Counts a connection of any worker here from now on.
    pub fn take(&self, guard: &mut ConnectionGuard) {
        // Who stays has not left.
        if !Arc::ptr_eq(&self.0, &guard.0) {
            *guard = self.one_more();
        }
    }

    /// One more connection.
    pub fn one_more(&self) -> ConnectionGuard {
        self.0.now.fetch_add(1, Ordering::Relaxed);
        ConnectionGuard(Arc::clone(&self.0))
    }
}

impl ConnectionGuard {
    /// One more in the same count: a stream is as much work as a connection.
    #[must_use]
    pub fn one_more(&self) -> Self {
        ConnectionCounter(Arc::clone(&self.0)).one_more()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for member in &self.members {
            member.pending.close();
        }
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::Relaxed);
        self.0.gone.fetch_add(1, Ordering::Relaxed);
    }
}

/// Who should serve a connection that `by` accepted.
fn least(loads: &[Load], by: usize) -> usize {
    let mut least = by;
    for (index, load) in loads.iter().enumerate() {
        if load.is_clearly_less(&loads[least]) {
            least = index;
        }
    }
    least
}

impl Load {
    /// Being busy counts before the number of connections: one may be worth a thousand others.
    fn is_clearly_less(&self, other: &Self) -> bool {
        // Also still: what was busy a moment ago may have nothing to do any more.
        let is_busier = |a: &Self, b: &Self| a.busy - b.busy >= BUSIER && a.lately - b.lately >= BUSIER;
        if is_busier(self, other) || is_busier(other, self) {
            return self.busy < other.busy;
        }
        // Half of them may stay for long, however many come and go beside them.
        let staying = other.connections - other.leaving.min(other.connections / 2);
        self.connections + MORE + other.connections / 16 < staying
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(loads: &[(usize, f32)], by: usize) -> usize {
        let loads: Vec<_> = loads
            .iter()
            .map(|(connections, busy)| Load { connections: *connections, leaving: 0, busy: *busy, lately: *busy })
            .collect();
        least(&loads, by)
    }

    #[test]
    fn who_accepted_serves_unless_another_has_clearly_less() {
        assert_eq!(chosen(&[(0, 0.0), (0, 0.0)], 1), 1);
        assert_eq!(chosen(&[(0, 0.0), (8, 0.0)], 1), 1);
        assert_eq!(chosen(&[(0, 0.0), (9, 0.0)], 1), 0);
        assert_eq!(chosen(&[(1000, 0.2), (1060, 0.2)], 1), 1);
        assert_eq!(chosen(&[(1000, 0.2), (1100, 0.2)], 1), 0);
        assert_eq!(chosen(&[(50, 0.0), (30, 0.0), (10, 0.0)], 0), 2);
    }

    #[test]
    fn those_who_are_about_to_leave_are_no_load() {
        let load = |connections, leaving| Load { connections, leaving, busy: 0.5, lately: 0.5 };
        assert_eq!(least(&[load(20, 400), load(44, 400)], 1), 1);
        assert_eq!(least(&[load(20, 0), load(44, 10)], 1), 0);
        assert_eq!(least(&[load(20, 0), load(44, 16)], 1), 1);
        // Thousands that come and go hide half of those who stay, and no more.
        assert_eq!(least(&[load(20, 4000), load(500, 4000)], 1), 0);
    }

    #[test]
    fn who_was_busy_and_is_not_any_more_is_no_busier() {
        let load = |busy, lately| Load { connections: 10, leaving: 0, busy, lately };
        assert_eq!(least(&[load(0.1, 0.1), load(0.9, 0.1)], 1), 1);
        assert_eq!(least(&[load(0.1, 0.1), load(0.2, 0.9)], 1), 1);
        assert_eq!(least(&[load(0.1, 0.1), load(0.9, 0.9)], 1), 0);
    }

    #[test]
    fn one_session_that_keeps_its_worker_busy_outweighs_many() {
        assert_eq!(chosen(&[(1, 1.0), (500, 0.1)], 0), 1);
        assert_eq!(chosen(&[(1, 1.0), (500, 0.1)], 1), 1);
        // Both busy: the numbers decide.
        assert_eq!(chosen(&[(1, 1.0), (500, 0.9)], 1), 0);
    }
}
