//! One WebSocket of the backend for many clients: each of its messages goes to all of them.
//!
//! ```text
//! backend -> relay -> feed.rs -> ring.rs: each message once -> member.rs: a place in the ring per client -> leg -> relay -> client
//!            delay.rs: waits for more     ward.rs: wakes those of a worker there
//! backend <- relay <- feed.rs <- inbound.rs <- member.rs, if allow_client_messages
//! ```
//!
//! Nobody is waited for: neither a client that does not read, nor a worker that is busy.

mod delay;
mod feed;
mod inbound;
mod member;
mod ring;
mod ward;

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::HeaderValue;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::{
    feed::Feed,
    inbound::Inbound,
    member::Member,
    ring::{Batch, Ring},
    ward::Ward,
};
use super::{
    Opener,
    key::Key,
    line::Fault,
    roll::{Known, Listed, State},
};
use crate::{
    admission::Admission,
    hub::{Config, End, Kind, Replay, leg::Leg, memory::Memory},
    metrics::{Metrics, Traffic},
    net::Local,
    pool::Reports,
    upstream::Home,
};

/// What all clients of a key have in common.
pub(super) struct Hub {
    ring: Ring,
    /// Messages that are kept for those who are behind.
    queue_messages: usize,
    /// By worker.
    wards: Box<[Ward]>,
    /// Of a route where clients may say something.
    inbound: Option<Inbound>,
    sharing: Arc<Config>,
    /// Of a client's message, in bytes.
    max_message: u64,
    /// For a client's message that has begun.
    hold_timeout: Duration,
    /// Of a frame to a client.
    max_frame: u64,
    metrics: Arc<Metrics>,
    /// Nobody needs it any more.
    end: CancellationToken,
    /// What is told of it, and the number of its clients, those in their handshake included.
    known: Listed,
    /// Of legs.
    numbers: AtomicU64,
    opened_at: Instant,
    protocol: Option<HeaderValue>,
    endpoint: Mutex<Arc<str>>,
}

/// A client's presence, until it is dropped.
pub(super) struct Present(Arc<Hub>);

impl Hub {
    /// Opens one on this worker. `reports` are dropped with its end.
    pub(super) async fn open(opener: &Opener, key: &Key, home: &Home, reports: Reports) -> Result<Arc<Self>, Fault> {
        let known = opener.roll.enter(&opener.route, Kind::Broadcast, key.digest());
        let line = opener.lines.open(key.request(), home).await?;
        known.is_at(&line.endpoint);
        let Config { queue_messages, queue_bytes, batch_delay, allow_client_messages, .. } = *opener.sharing;
        let batch = if batch_delay.is_zero() {
            Batch::default()
        } else {
            Batch { messages: queue_messages / 2, bytes: queue_bytes / 2 }
        };
        let hub = Arc::new(Self {
            ring: Ring::new(queue_bytes, batch, Memory::new(&opener.admission)),
            // Room for what waits, as in bytes.
            queue_messages: queue_messages + batch.messages,
            wards: (0..home.workers).map(|_| Ward::default()).collect(),
            inbound: allow_client_messages
                .then(|| Inbound::new(queue_messages, queue_bytes, Memory::new(&opener.admission))),
            sharing: Arc::clone(&opener.sharing),
            max_message: opener.limits.message.min(queue_bytes as u64),
            hold_timeout: opener.hold_timeout,
            max_frame: opener.limits.frame,
            metrics: Arc::clone(&opener.metrics),
            end: CancellationToken::new(),
            known,
            numbers: AtomicU64::new(0),
            opened_at: Instant::now(),
            protocol: line.protocol.clone(),
            endpoint: Mutex::new(Arc::clone(&line.endpoint)),
        });
        let feed = Feed::new(&hub, opener, key, home);
        home.spawn(feed.run(line, reports));
        Ok(hub)
    }

    /// Nobody needs it any more: it ends in order.
    pub(super) fn close(&self) {
        self.known.is(State::Closing);
        self.end.cancel();
    }

    /// Nothing more comes: who joins needs another one.
    pub(super) fn is_over(&self) -> bool {
        self.ring.is_over()
    }

    /// When the backend's 101 came.
    pub(super) fn opened_at(&self) -> Instant {
        self.opened_at
    }

    /// The subprotocol that the backend has chosen.
    pub(super) fn protocol(&self) -> Option<HeaderValue> {
        self.protocol.clone()
    }

    /// Where it leads.
    pub(super) fn endpoint(&self) -> Arc<str> {
        Arc::clone(&self.endpoint.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What is told of it.
    pub(super) fn known(&self) -> Arc<Known> {
        self.known.known()
    }

    /// Somebody is there for whom it is to stay.
    pub(super) fn enter(self: &Arc<Self>) -> Present {
        self.known.clients.fetch_add(1, Ordering::Relaxed);
        Present(Arc::clone(self))
    }

    /// A client's leg, on its worker. `lease` is given back with it.
    pub(super) fn leg(
        self: &Arc<Self>,
        present: Present,
        home: &Home,
        traffic: &Arc<Traffic>,
        admission: &Admission,
        lease: impl fmt::Debug + Send + Sync + 'static,
    ) -> Box<dyn Local> {
        let at = self.ring.behind(self.replayed());
        if self.wards[home.worker].begin() {
            home.spawn(Arc::clone(self).watch(home.worker));
        }
        let member = Member::new(present, at, home.worker, admission.clone(), Box::new(lease));
        Box::new(Leg::new(member, Arc::clone(traffic)))
    }

    /// Wakes the clients of a worker, on that worker, until it is over.
    async fn watch(self: Arc<Self>, worker: usize) {
        let (ward, mut woken) = (&self.wards[worker], Vec::new());
        loop {
            ward.called().await;
            let is_over = self.ring.is_over();
            ward.wake(self.ring.first(), is_over, &mut woken);
            if is_over {
                return;
            }
        }
    }

    /// What a client gets of what was before it.
    fn replayed(&self) -> usize {
        match self.sharing.replay {
            Replay::None => 0,
            Replay::Last => 1,
            Replay::LastN => self.sharing.replay_messages,
        }
    }

    /// Messages came. Gives whether they wait for more.
    fn push(&self, frames: Vec<Bytes>) -> bool {
        self.metrics.shared_messages.inc_by(frames.len() as u64);
        // Where nobody is behind, what is kept is for whoever joins.
        let most = if self.is_alone() { self.replayed() } else { self.queue_messages };
        let (grown, goes_out) = self.ring.push(frames, most);
        self.metrics.shared_queue_bytes.inc_by(grown);
        if goes_out {
            self.call();
        }
        !goes_out
    }

    /// What waits goes out.
    fn go_out(&self) {
        self.ring.go_out();
        self.call();
    }

    /// Once for all that goes out together.
    fn call(&self) {
        for ward in self.wards.iter().filter(|ward| ward.is_watched()) {
            ward.call();
        }
    }

    /// Nothing more comes. The first end counts.
    fn finish(&self, end: End) {
        self.known.is(State::Closing);
        self.ring.finish(end);
        // Also those whose watch is about to begin.
        self.wards.iter().for_each(Ward::call);
    }

    fn is_alone(&self) -> bool {
        self.known.clients.load(Ordering::Relaxed) == 0
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.metrics.shared_queue_bytes.dec_by(i64::try_from(self.ring.bytes()).unwrap_or(i64::MAX));
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub").field("known", &self.known).finish_non_exhaustive()
    }
}

impl Present {
    fn hub(&self) -> &Arc<Hub> {
        &self.0
    }

    /// One that nobody else has.
    fn number(&self) -> u64 {
        self.0.numbers.fetch_add(1, Ordering::Relaxed)
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        self.0.known.clients.fetch_sub(1, Ordering::Relaxed);
    }
}
