//! Many clients of an id-carrying protocol, JSON-RPC 2.0, on one WebSocket of the backend.
//!
//! ```text
//! client -> relay -> leg -> member.rs -> queue.rs -> serve.rs: core.rs -> relay -> backend
//! client <- relay <- leg <- member.rs <- mailbox.rs <---'
//!
//! core.rs     who asked what and gets which answer, as a state machine without I/O, lock or clock; core/ are its parts
//! message.rs  messages as text
//! methods.rs  which methods are about subscriptions
//! ```
//!
//! A hub is there as long as its clients are, or its WebSocket. That is needed only while somebody waits for an answer or has a subscription:
//! for so long the hub holds a lease of the pool, which else closes the WebSocket after its idle timeout, and opens one for the next request.

pub mod core;
mod mailbox;
mod member;
pub mod message;
pub mod methods;
mod queue;
mod serve;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use http::HeaderValue;
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

use self::{
    core::{Client, Limits},
    mailbox::Mailbox,
    member::Member,
    methods::Methods,
    queue::Queue,
    serve::Server,
};
use super::{
    Config, Kind, Opener,
    inbox::Terms,
    key::Key,
    leg::Leg,
    line::Line,
    memory::Memory,
    roll::{Known, Listed, Roll},
};
use crate::{
    admission::Admission,
    metrics::{Metrics, Traffic},
    net::Local,
    pool::{Pool, Reports},
    upstream::Home,
    ws,
};

/// The hubs of a route.
pub(super) struct Callers {
    hubs: Mutex<HashMap<Key, Arc<Hub>>>,
    route: Arc<str>,
    sharing: Arc<Config>,
    methods: Methods,
    /// What clients may send, and are sent.
    limits: ws::Limits,
    /// By worker.
    homes: Arc<[Home]>,
    metrics: Arc<Metrics>,
    admission: Admission,
    roll: Roll,
    /// Guests of all hubs.
    guests: AtomicUsize,
    /// There is none.
    all_left: Notify,
}

/// What all clients of a key have in common.
#[derive(Debug)]
struct Hub {
    queue: Queue<Opened, Pool<Key, Opener>>,
    /// Those for whom it has to be there. Grows under the lock of the hubs only.
    guests: AtomicUsize,
    /// Of clients.
    numbers: AtomicU64,
    /// What is told of it.
    known: Listed,
}

/// Somebody for whom a hub is to be there.
pub(super) struct Guest {
    callers: Arc<Callers>,
    hub: Arc<Hub>,
}

/// What the pool knows of a WebSocket of a hub's.
#[derive(Debug)]
pub(super) struct Link {
    /// The subprotocol that the backend has chosen.
    pub(super) protocol: Option<HeaderValue>,
    /// Where it leads.
    pub(super) endpoint: Arc<str>,
    /// When the backend's 101 came.
    pub(super) opened_at: Instant,
    /// Nobody needs it any more.
    end: CancellationToken,
}

/// A WebSocket for a hub.
struct Opened {
    line: Line,
    link: Arc<Link>,
    reports: Reports,
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opened").field("link", &self.link).finish_non_exhaustive()
    }
}

impl Callers {
    /// Nobody is there.
    pub(super) fn new(
        route: &Arc<str>,
        sharing: &Arc<Config>,
        limits: ws::Limits,
        homes: &Arc<[Home]>,
        metrics: &Arc<Metrics>,
        admission: &Admission,
        roll: &Roll,
    ) -> Arc<Self> {
        Arc::new(Self {
            hubs: Mutex::default(),
            route: Arc::clone(route),
            sharing: Arc::clone(sharing),
            methods: Methods::new(sharing.subscriptions.clone()).for_all(&sharing.notifications),
            limits,
            homes: Arc::clone(homes),
            metrics: Arc::clone(metrics),
            admission: admission.clone(),
            roll: roll.clone(),
            guests: AtomicUsize::new(0),
            all_left: Notify::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Arc<Hub>>> {
        // Nothing under this lock can panic half-way.
        self.hubs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more for the hub of this key. `None`: there is none, and no place for one more.
    pub(super) fn enter(self: &Arc<Self>, key: &Key) -> Option<Guest> {
        let Config { queue_messages, queue_bytes, max_keys, .. } = *self.sharing;
        let mut hubs = self.lock();
        let (hub, is_new) = match hubs.get(key) {
            Some(hub) => (Arc::clone(hub), false),
            None if hubs.len() >= max_keys => return None,
            None => {
                let queue = Queue::new(queue_messages, queue_bytes, Memory::new(&self.admission));
                let (guests, numbers) = (AtomicUsize::new(0), AtomicU64::new(0));
                let known = self.roll.enter(&self.route, Kind::Rpc, key.digest());
                let hub = Arc::new(Hub { queue, guests, numbers, known });
                hubs.insert(key.clone(), Arc::clone(&hub));
                (hub, true)
            }
        };
        hub.guests.fetch_add(1, Ordering::Relaxed);
        self.guests.fetch_add(1, Ordering::Relaxed);
        drop(hubs);
        if is_new {
            let home = &self.homes[key.share(self.homes.len())];
            let server = Server::new(&hub, self, key, home);
            home.tracker.spawn_on(server.run(), &home.runtime);
        }
        Some(Guest { callers: Arc::clone(self), hub })
    }

    /// The hub is not needed any more, if that is so: whoever comes finds another one.
    fn leave(&self, key: &Key, hub: &Arc<Hub>) -> bool {
        let mut hubs = self.lock();
        let is_needed = hub.guests.load(Ordering::Relaxed) > 0 || !hub.queue.is_empty();
        if !is_needed {
            remove(&mut hubs, key, hub);
        }
        !is_needed
    }

    /// The hub has ended, whatever it was needed for.
    fn forget(&self, key: &Key, hub: &Arc<Hub>) {
        remove(&mut self.lock(), key, hub);
    }

    /// Resolves when nobody is there.
    pub(super) async fn left(&self) {
        loop {
            let left = self.all_left.notified();
            if self.guests.load(Ordering::Relaxed) == 0 {
                return;
            }
            left.await;
        }
    }

    fn core_limits(&self) -> Limits {
        let Config { max_requests, max_subscriptions, request_timeout, .. } = *self.sharing;
        let max_message_bytes = usize::try_from(self.limits.message).unwrap_or(usize::MAX);
        Limits { max_requests, max_subscriptions, request_timeout, max_message_bytes }
    }
}

fn remove(hubs: &mut HashMap<Key, Arc<Hub>>, key: &Key, hub: &Arc<Hub>) {
    if hubs.get(key).is_some_and(|known| Arc::ptr_eq(known, hub)) {
        hubs.remove(key);
    }
}

impl fmt::Debug for Callers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Callers").field("route", &self.route).field("guests", &self.guests).finish_non_exhaustive()
    }
}

impl Guest {
    fn queue(&self) -> &Queue<Opened, Pool<Key, Opener>> {
        &self.hub.queue
    }

    /// What is told of its hub.
    pub(super) fn known(&self) -> Arc<Known> {
        self.hub.known.known()
    }

    /// One that no other client of the hub has.
    fn number(&self) -> Client {
        self.hub.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// A client's leg, on its worker.
    pub(super) fn leg(self, pool: Pool<Key, Opener>, terms: Terms, traffic: &Arc<Traffic>) -> Box<dyn Local> {
        let Callers { sharing, limits, metrics, admission, .. } = &*self.callers;
        let memory = Memory::new(admission);
        let mailbox = Mailbox::new(sharing.queue_messages, sharing.queue_bytes, memory, Arc::clone(metrics));
        let max_message = limits.message.min(sharing.queue_bytes as u64);
        Box::new(Leg::new(Member::new(self, mailbox, pool, max_message, terms), Arc::clone(traffic)))
    }

    /// The backend's 101 is here. `reports` are dropped with the WebSocket.
    pub(super) fn opened(&self, line: Line, reports: Reports) -> Arc<Link> {
        let known = Arc::new(Link {
            protocol: line.protocol.clone(),
            endpoint: Arc::clone(&line.endpoint),
            opened_at: Instant::now(),
            end: CancellationToken::new(),
        });
        self.queue().open(Opened { line, link: Arc::clone(&known), reports });
        known
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.hub.guests.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.hub.queue.wake();
        }
        if self.callers.guests.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.callers.all_left.notify_waiters();
        }
    }
}

impl fmt::Debug for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guest").field("hub", &self.hub).finish_non_exhaustive()
    }
}

impl Link {
    /// Nobody needs it any more: it ends in order.
    pub(super) fn close(&self) {
        self.end.cancel();
    }
}
