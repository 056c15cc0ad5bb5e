//! The one place that knows the order of a session:
//!
//! ```text
//! accept -> pending queue, while no worker has room -> PROXY header, TLS, and a request, under a deadline -> the backend's handshake -> 101 to the client
//!        -> relay until both legs have ended -> each leg lingers -> closed
//! ```
//!
//! A handshake that is there as a whole (one read, 4 KiB) and is answered with 101 goes this way without hyper (`shake_hands`);
//! everything else is hyper's (`serve`).
//!
//! Whatever goes wrong on the way, no socket is dropped with something still to be said or read on it: a client that
//! is turned away lingers, and so does a backend whose client left before its answer.

mod answer;
mod current;
mod http;
mod http2;
mod orphan;
mod proxied;
mod report;
mod roster;
mod secure;

use std::{
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, atomic::AtomicBool},
    task::{self, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    net::TcpStream,
    sync::Semaphore,
    time::{Instant, timeout},
};
use tokio_util::task::TaskTracker;

use self::{answer::lost, http::Asked, report::Open, secure::Client};
pub use self::{
    current::Current,
    roster::{Entry, Roster, Session},
};
use crate::{
    admission::{Admission, Place, Reason},
    close::{self, Keeps, Linger},
    downstream::{self, ProxyProtocol, TraceId, Whole},
    gate::{Gate, PendingQueue, Permit},
    hub::{Hubs, Known},
    listen::{Accepted, Accounting, ConnectionCounter, Pending},
    metrics::{Counted, Metrics},
    net::{Kept, Stream, concat, read_ahead, read_ahead_of_ready},
    relay::{self, Ended, Leg, Relay},
    side::Side,
    upstream::{Home, Load, Mode, Seat, Upstreams},
    ws::Rsv,
};

/// The longest last wait for a client that got as far as no request.
const REFUSED_LINGER: Duration = Duration::from_secs(1);

/// The same for a socket without a place when there are too many of them.
const CROWDED_LINGER: Duration = Duration::from_millis(200);

/// What the sessions of one worker share. Each keeps the one that it began with; a clone with other settings counts and limits
/// together with it.
#[derive(Debug, Clone)]
pub struct Context {
    /// The one for whatever begins now.
    pub current: Current,
    /// The client's leg.
    pub downstream: downstream::Config,
    /// The relay, with what is counted with every message, and the order to end.
    pub relay: Arc<relay::Shared>,
    /// Of so many sessions one has its lines in the log; 0: none. One that did not end in order has its last one always.
    pub log_sample: u32,
    /// The last wait of each socket, and who waits.
    pub close: close::Patience,
    /// The sockets in it.
    pub linger: Linger,
    /// The ways to backends.
    pub upstreams: Upstreams,
    /// Where those of their connections live that sessions share.
    pub home: Home,
    /// The WebSockets that sessions share, of all workers.
    pub hubs: Hubs,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Its sessions.
    pub roster: Arc<Roster>,
    /// Every task of the worker.
    pub tracker: TaskTracker,
    /// Its handshakes.
    pub gate: Gate,
    /// Where those wait that no worker has room for.
    pub pending: Arc<PendingQueue<Pending>>,
    /// Who is let in.
    pub admission: Admission,
    /// `upstream.max_waiting` for WebSocket handshakes, for all workers together.
    pub handshakes: Arc<Semaphore>,
    /// The same for plain requests: neither kind can use up the other's.
    pub requests: Arc<Semaphore>,
    /// See [`Context::doubt`].
    pub has_doubted: Arc<AtomicBool>,
    /// Handshakes that are carried on although their client has left.
    pub orphans: Arc<Semaphore>,
    /// Sockets that linger without a place: backends' whose client may have left, and those of an address that has too many.
    pub leftovers: Arc<Semaphore>,
}

/// Who a session belongs to, for its log lines.
#[derive(Debug)]
struct About {
    client: Client,
    /// Without the query, which may hold secrets; at most 256 bytes.
    path: Box<str>,
    request_id: Box<str>,
    /// Boxed, since most have none.
    trace_id: Option<Box<TraceId>>,
    /// Of the configuration; empty: none is for its path.
    route: Arc<str>,
    /// The WebSocket that it shares with others.
    shared: Option<Arc<Known>>,
}

/// A connection, as long as it is no session.
type Serving = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What the handshake leaves to the relay.
#[derive(Debug)]
struct Tunnel {
    backend: Leg,
    /// Its own; where WebSockets are shared it is that of the one.
    load: Option<Load>,
    endpoint: Arc<str>,
    rsv: Rsv,
    about: About,
    /// Of its route.
    seat: Seat,
    /// The 101 as it goes out, if it is written here.
    written: Vec<u8>,
}

/// What a session begins with.
#[derive(Debug)]
struct Given {
    client: Leg,
    tunnel: Box<Tunnel>,
    accounting: Accounting,
}

/// A session that is relayed. There are thousands of them, so it is no `async` block: that would keep what it was made of, too.
struct Running {
    /// Until both legs have ended, like all that belongs to it.
    open: Option<Open>,
    relay: Relay,
    accounting: Option<Accounting>,
    seat: Option<Seat>,
}

/// The allocator takes 7 bytes more, since what it gives has to be aligned, and has blocks of 384: one byte more would be 64. Builds for
/// tests know more of each socket.
#[cfg(not(debug_assertions))]
const _: () = assert!(size_of::<Running>() + align_of::<Running>() - 1 <= 384);

impl Running {
    fn new(context: &Arc<Context>, given: Given) -> Self {
        let Given { client, tunnel, accounting } = given;
        let Tunnel { backend, load, endpoint, rsv, about, seat, .. } = *tunnel;
        let way = match backend.stream {
            Some(Stream::Multiplexed(_)) => Mode::Multiplexed,
            Some(Stream::Local(_)) => Mode::Shared,
            _ => Mode::Dedicated,
        };
        let open = Open::new(context, about, (endpoint, load), way);
        let relay = Relay::new(Arc::clone(&context.relay), rsv, client, backend);
        Self { relay, open: Some(open), accounting: Some(accounting), seat: Some(seat) }
    }
}

impl Future for Running {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<()> {
        let Self { relay, open, accounting, seat } = &mut *self;
        loop {
            let ended = ready!(relay.poll_ended(cx));
            let (Some(about), Some(Accounting { place, .. })) = (&mut *open, &mut *accounting) else {
                return Poll::Ready(());
            };
            let context = Arc::clone(about.context());
            if relay.is_open() {
                context.let_go(ended, place.split().map_or(Keeps::Nothing, Keeps::Place));
                continue;
            }
            let report = relay.report();
            let clean = context.count(&report);
            about.close(&report, clean);
            *open = None;
            if let Some(Accounting { place, guard, counted }) = accounting.take() {
                context.let_go(ended, Keeps::Place(place.last_half()));
                drop((guard, counted, seat.take()));
            }
            return Poll::Ready(());
        }
    }
}

impl Given {
    /// Waits for something else.
    async fn wait_until(&mut self, other: impl Future<Output = ()>) {
        match &mut self.tunnel.backend.stream {
            Some(stream) => stream.wait_until(other).await,
            None => other.await,
        }
    }
}

impl Context {
    /// The one for whatever begins now: another one after a reload.
    pub fn latest(self: &Arc<Self>) -> Arc<Self> {
        self.current.get().unwrap_or_else(|| Arc::clone(self))
    }

    /// Turns a connection away, begins with it, or leaves it in the pending queue. To be called on the worker's runtime.
    pub fn accept(self: &Arc<Self>, accepted: Accepted) {
        let (is_unproxied, refused) = (self.is_unproxied(accepted.peer.ip()), accepted.accounting.place.refused);
        let mut accepted = accepted;
        // Of a client behind a balancer the address is not known yet.
        let is_unknown = self.downstream.proxy_protocol == ProxyProtocol::Required;
        let place = &mut accepted.accounting.place;
        if !is_unproxied && refused.is_none() && (is_unknown || self.count_address(accepted.peer, place)) {
            return self.admit(accepted);
        }
        let refused = accepted.accounting.place.refused;
        let Accepted { stream, peer, accounting, .. } = accepted;
        match (TcpStream::from_std(stream), refused) {
            (Ok(stream), Some(reason)) if !is_unproxied => {
                self.tracker.spawn(Arc::clone(self).turn_away(stream, peer, accounting, reason, None));
            }
            (Ok(stream), _) => self.end_unproxied(stream, peer, accounting),
            (Err(error), _) => lost(peer, &error),
        }
    }

    /// Takes connections from the pending queue as there is room, until that is closed. They then belong to this worker.
    pub async fn take_on(self: Arc<Self>, counter: ConnectionCounter) {
        while let Some((Pending { mut accepted, .. }, permit)) = self.gate.next(&self.pending).await {
            counter.take(&mut accepted.accounting.guard);
            self.latest().begin(accepted, Some(permit), true);
        }
    }

    /// A place for a handshake, if one is free and nobody waits for it.
    fn room_at_once(&self) -> Option<Permit> {
        if self.pending.is_empty() { self.gate.try_permit() } else { None }
    }

    /// Begins with a connection, or leaves it to whichever worker has room first.
    fn admit(self: &Arc<Self>, accepted: Accepted) {
        let permit = self.room_at_once();
        if permit.is_some() {
            self.begin(accepted, permit, false);
            return;
        }
        let counted = Counted::new(&self.metrics.connections_queued);
        if let Err(Pending { accepted, .. }) = self.pending.push(Pending { accepted, counted }) {
            // All workers are about to end.
            self.begin(accepted, None, false);
        }
    }

    /// Begins with a connection: with its request if that is here already, else with waiting for it, at nobody's cost.
    fn begin(self: &Arc<Self>, accepted: Accepted, permit: Option<Permit>, has_waited: bool) {
        let Some(Accepted { stream, peer, accounting, left }) = self.hear(accepted) else { return };
        if let (Some(reason), Some(left)) = (accounting.place.refused, left) {
            match TcpStream::from_std(stream) {
                Ok(stream) => {
                    let this = Arc::clone(self);
                    self.tracker.spawn(this.turn_away(stream, peer, accounting, reason, Some(left)));
                }
                Err(error) => lost(peer, &error),
            }
            return;
        }
        let this = Arc::clone(self);
        // Before it is registered: after that it would have to be waited for, even if it has something.
        let mut early = read_ahead(&stream);
        // It may have lost its patience: then the backend need not hear of it.
        if has_waited
            && let Some(first) = &early
            && let Some(more) = read_ahead(&stream)
        {
            early = Some(if more.is_empty() { more } else { concat(first.clone(), more) });
        }
        match TcpStream::from_std(stream) {
            Ok(stream) => {
                let Some(early) = early else {
                    drop(permit);
                    self.tracker.spawn(this.wait(stream, peer, accounting, left));
                    return;
                };
                if let Some(serving) = this.begin_with(stream, early, peer, accounting, permit, left) {
                    self.tracker.spawn(serving);
                }
            }
            Err(error) => lost(peer, &error),
        }
    }

    /// A connection from the first bytes of its request on. Boxed, it is moved once; the runtime moves it about four times. `None`: it has
    /// ended.
    fn begin_with(
        self: Arc<Self>,
        stream: TcpStream,
        early: Bytes,
        peer: SocketAddr,
        accounting: Accounting,
        permit: Option<Permit>,
        left: Option<Duration>,
    ) -> Option<Serving> {
        let deadline = left.map(|left| Instant::now() + left);
        if let Some(server) = self.downstream.tls.server.clone() {
            if early.is_empty() {
                self.linger(Stream::Tcp(stream), &self.short_linger(), accounting);
                return None;
            }
            return Some(Box::pin(self.serve_secure(server, stream, early, peer, accounting, permit, deadline)));
        }
        let stream = Kept::new(Stream::Tcp(stream), self.relay.config.write_timeout);
        let mut peer = Client::plain(peer);
        if self.downstream.http2.is_on && downstream::begins_http2(&early) {
            drop(permit);
            peer.is_http2 = true;
            let deadline = deadline.unwrap_or_else(|| Instant::now() + self.downstream.header_timeout);
            return Some(Box::pin(self.serve_http2(stream.rewind(early), peer, accounting, deadline, None)));
        }
        Some(Box::pin(async move {
            match Whole::read(early, &self.downstream) {
                Ok((handshake, early)) => {
                    self.shake_hands(stream, Asked { handshake, early }, peer, accounting, permit).await;
                }
                Err(early) => {
                    Box::pin(self.serve(stream.rewind(early), peer, accounting, permit, deadline)).await;
                }
            }
        }))
    }

    /// In the count of its address, unless that is a proxy's, which has those of many. False: it is to be turned away.
    fn count_address(&self, client: SocketAddr, place: &mut Place) -> bool {
        let ip = client.ip().to_canonical();
        let is_proxy = downstream::is_trusted(ip, &self.downstream.trusted_proxies);
        is_proxy || self.admission.count_address(ip, place)
    }

    /// Answers the first request with a 503, whatever it is, and ends the connection. `left`: it is known who it is.
    async fn turn_away(
        self: Arc<Self>,
        stream: TcpStream,
        mut client: SocketAddr,
        mut accounting: Accounting,
        mut reason: Reason,
        left: Option<Duration>,
    ) {
        let is_unknown = self.downstream.proxy_protocol == ProxyProtocol::Required && left.is_none();
        // A loop that only finds its queue empty holds a place for a moment: by now it may be free.
        if !accounting.place.is_last_resort()
            && reason != Reason::AddressConnections
            && let Some(place) = self.admission.enter_late().await
        {
            accounting.place = place;
            if is_unknown || self.count_address(client, &mut accounting.place) {
                self.wait(stream, client, accounting, None).await;
                return;
            }
            reason = Reason::AddressConnections;
        }
        if accounting.place.is_nothing() {
            self.refuse_for(reason, client);
            drop(accounting);
            return self.linger_left(Side::Client, Stream::Tcp(stream));
        }
        // Others wait for its place: it gets the time that a socket gets without progress.
        let header_timeout = self.downstream.header_timeout.min(self.close.linger);
        let deadline = Instant::now() + header_timeout;
        if is_unknown {
            match self.heard(&stream, client, deadline).await {
                Ok(named) => client = named,
                Err(why) => return self.end_unheard(stream, client, accounting, &why),
            }
        }
        self.refuse_for(reason, client);
        let is_last_resort = accounting.place.is_last_resort();
        let (stream, early) = match self.secure_for_answer(stream, client, deadline, is_last_resort).await {
            Ok(secured) => secured,
            Err(Some(stream)) => return self.linger(stream, &self.short_linger(), accounting),
            Err(None) => return,
        };
        let is_http2 = stream.is_http2() || self.downstream.http2.is_on && downstream::begins_http2(&early);
        let stream = Kept::new(stream, self.close.linger).rewind(early);
        if is_http2 {
            let client = Client { is_http2, ..Client::plain(client) };
            return self.serve_http2(stream, client, accounting, deadline, Some(reason)).await;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let (stream, _) = self.answer_and_end(stream, client, left, self.refusal(reason)).await;
        self.linger(stream, &self.short_linger(), accounting);
    }

    /// For who sends no request, or a broken one, or one that is refused: our answer and little of our time.
    fn short_linger(&self) -> close::Patience {
        let short = |time: Duration| time.min(REFUSED_LINGER);
        close::Patience { linger: short(self.close.linger), linger_max: short(self.close.linger_max) }
    }

    /// Waits for the first bytes of a request. This costs next to nothing; what follows does not.
    async fn wait(
        self: Arc<Self>,
        stream: TcpStream,
        client: SocketAddr,
        accounting: Accounting,
        left: Option<Duration>,
    ) {
        let patience = left.unwrap_or(self.downstream.header_timeout);
        let begun = Instant::now();
        let is_silent = tokio::select! {
            readable = timeout(patience, stream.readable()) => readable.is_err(),
            // It was accepted, so its request may be on its way: an end now would be one without an answer.
            () = self.relay.drain.begun() => timeout(patience.min(REFUSED_LINGER), stream.readable()).await.is_err(),
        };
        if is_silent {
            self.linger(Stream::Tcp(stream), &self.short_linger(), accounting);
            return;
        }
        let this = self.latest();
        // Once it has begun it has one deadline for all.
        let left = left.map(|left| left.saturating_sub(begun.elapsed()));
        // With room here, and nothing of the kernel's to be looked at first, it goes on in this task, registered as it is.
        if (this.downstream.proxy_protocol == ProxyProtocol::Off || left.is_some())
            && let Some(permit) = this.room_at_once()
            && let Some(early) = read_ahead_of_ready(&stream)
        {
            drop(self);
            if let Some(serving) = this.begin_with(stream, early, client, accounting, Some(permit), left) {
                serving.await;
            }
            return;
        }
        // Whichever worker goes on with it registers it anew.
        match stream.into_std() {
            Ok(stream) => this.admit(Accepted { stream, peer: client, accounting, left }),
            Err(error) => lost(client, &error),
        }
    }

    /// A session from its 101 to the FINs on both legs, and its log lines: in a task of its own, since that of the handshake is larger.
    fn begin_relay(self: &Arc<Self>, client: Leg, tunnel: Box<Tunnel>, accounting: Accounting) {
        let mut given = Given { client, tunnel, accounting };
        // The runtime aligns its own allocation to two lines of the cache, which costs up to 127 bytes more the larger that is: so all is
        // in a box.
        if self.gate.is_calm() {
            self.tracker.spawn(Box::pin(Running::new(self, given)));
            return;
        }
        let this = Arc::clone(self);
        self.tracker.spawn(Box::pin(async move {
            given.wait_until(this.gate.calm()).await;
            this.tracker.spawn(Box::pin(Running::new(&this, given)));
        }));
    }

    fn let_go(&self, ended: Ended, keeps: Keeps) {
        match ended.stream {
            Some(stream) if ended.has_ended && stream.is_bare() => self.linger.close_ended(ended.side, stream),
            Some(stream) => self.linger.add(ended.side, stream, ended.is_done, &self.close, keeps),
            None => {}
        }
    }

    /// The end of a client's connection that becomes no session.
    fn linger(&self, stream: Stream, patience: &close::Patience, accounting: Accounting) {
        let Accounting { place, guard, counted } = accounting;
        self.linger.add(Side::Client, stream, false, patience, Keeps::Place(place.last_half()));
        drop((guard, counted));
    }

    /// For a socket that has no place, such as a backend's whose client need not be there any more: of these there are only so many.
    fn linger_left(&self, side: Side, stream: Stream) {
        let slot = Arc::clone(&self.leftovers).try_acquire_owned().ok();
        let mut patience = self.short_linger();
        if slot.is_none() {
            let short = |time: Duration| time.min(CROWDED_LINGER);
            patience = close::Patience { linger: short(patience.linger), linger_max: short(patience.linger_max) };
        }
        self.linger.add(side, stream, false, &patience, slot.map_or(Keeps::Nothing, Keeps::Slot));
    }
}
