//! The backend's leg before the relay: dialling, the WebSocket handshake, plain requests.
//!
//! A socket is never dropped here once the backend has seen a byte of it: it is handed back, so that its end can be
//! orderly, whatever came of the request.

mod exchange;
mod handshake;
mod turns;

use std::{
    fmt,
    future::Future,
    io,
    net::IpAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit},
    time::Instant,
};
use tokio_util::task::TaskTracker;
use tracing::warn;

use self::turns::{Connected, Turns};
use crate::{
    metrics::{Counted, Metrics},
    net::{self, Address, DialError, Lack, SocketConfig, Sources, Stream},
};

/// What the backend's leg needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The backend.
    pub address: Address,
    /// For the TCP connection.
    pub connect_timeout: Duration,
    /// For the answer to a WebSocket handshake, once connected.
    pub handshake_timeout: Duration,
    /// For the response header to a plain request.
    pub response_timeout: Duration,
    /// For a plain body to move on.
    pub body_timeout: Duration,
    /// WebSocket handshakes under way at once; also connections that the backend may not have accepted yet.
    pub max_pending: usize,
    /// Handshakes, and plain requests, that wait for a turn or an answer. Kept by the session.
    pub max_waiting: usize,
    /// For a turn.
    pub queue_timeout: Duration,
    /// Addresses of this host to connect from; empty: the kernel chooses.
    pub source_addresses: Vec<IpAddr>,
    /// The largest response header, in bytes.
    pub header_bytes: usize,
    /// How long the backend may take nothing of a plain request.
    pub write_timeout: Duration,
}

/// Why the backend gave no answer that could be passed on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection.
    #[error("cannot connect to {address} (upstream.address): {source}")]
    Unreachable {
        /// The backend.
        address: Address,
        /// What the system says.
        source: io::Error,
    },
    /// This host has too little of something for one more.
    #[error("cannot connect to {address}: {source}: {lack}")]
    Shortage {
        /// The backend.
        address: Address,
        /// Of what.
        lack: Lack,
        /// What the system says.
        source: io::Error,
    },
    /// Too many others were before it.
    #[error(
        "no turn at the backend within upstream.queue_timeout: more than upstream.max_pending handshakes are under way"
    )]
    QueueTimeout,
    /// A deadline passed.
    #[error("{0}")]
    Timeout(&'static str),
    /// The request's own body came to no end.
    #[error("request body did not arrive in full: {0}")]
    Body(#[source] hyper::Error),
    /// It answered, but not in HTTP, or closed the connection without an answer.
    #[error("backend gave no valid HTTP answer: {0}")]
    NoAnswer(#[source] hyper::Error),
    /// Its 101 does not complete a WebSocket handshake.
    #[error("backend accepted wrongly: {0}")]
    BadAccept(&'static str),
}

/// An error, and the socket that it left behind, if any.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Failure {
    /// What went wrong.
    pub error: Error,
    /// To be ended in order.
    pub stream: Option<Stream>,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, stream: None }
    }
}

/// Drives a connection while a response body is being read, and then gives its socket back.
pub type Connection = Pin<Box<dyn Future<Output = Option<Stream>> + Send>>;

/// A response that is no 101, to be passed on.
pub struct Reply {
    /// With its body.
    pub response: Response<Incoming>,
    /// To be driven meanwhile.
    pub connection: Connection,
}

/// What a backend said to a WebSocket handshake.
pub enum Answer {
    /// A valid 101: a tunnel.
    Tunnel {
        /// Its socket.
        stream: Stream,
        /// What it sent right behind the 101.
        early: Bytes,
        /// The 101.
        response: Response<()>,
    },
    /// Anything else.
    Refusal(Reply),
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Self {
        Self::Refusal(reply)
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reply").field(&self.response).finish()
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tunnel { response, .. } => f.debug_tuple("Tunnel").field(response).finish(),
            Self::Refusal(reply) => reply.fmt(f),
        }
    }
}

impl Connected<'_> {
    /// Whatever came back is a sign that the backend has accepted; silence is none, nor is what the client did wrong.
    fn heard<T>(&self, answer: &Result<T, Failure>) {
        if !matches!(answer, Err(Failure { error: Error::Timeout(_) | Error::Body(_), .. })) {
            self.was_accepted();
        }
    }
}

/// A request to the backend, under way. Each of its waits has a deadline.
#[must_use]
pub struct Exchange<T> {
    future: Pin<Box<dyn Future<Output = Result<T, Failure>> + Send>>,
    control: Arc<Control>,
}

/// What an exchange and its holder tell each other.
#[derive(Default)]
struct Control {
    begun: AtomicBool,
    connected: AtomicBool,
    turn: Mutex<Option<OwnedSemaphorePermit>>,
    given_up: Notify,
}

impl Control {
    async fn given_up(&self) {
        self.given_up.notified().await;
    }

    fn begin_turn(&self, turn: OwnedSemaphorePermit) {
        *self.turn.lock().unwrap_or_else(PoisonError::into_inner) = Some(turn);
    }

    fn end_turn(&self) {
        *self.turn.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl<T> Exchange<T> {
    /// The backend's kernel may have seen something of it, so it must be carried on to an orderly end: a dial that is just
    /// dropped answers the SYN-ACK with a RST. Before that, dropping it does no harm.
    pub fn has_begun(&self) -> bool {
        self.control.begun.load(Ordering::Relaxed)
    }

    /// The backend may have seen something of it.
    pub fn is_connected(&self) -> bool {
        self.control.connected.load(Ordering::Relaxed)
    }

    /// Nobody waits for it any more: others may have its turn.
    pub fn end_turn(&self) {
        self.control.end_turn();
    }

    /// It fails as soon as it is polled, and gives its socket back.
    pub fn give_up(&self) {
        self.control.given_up.notify_one();
    }
}

impl<T> Future for Exchange<T> {
    type Output = Result<T, Failure>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.future.as_mut().poll(cx)
    }
}

impl<T> fmt::Debug for Exchange<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exchange").field("begun", &self.has_begun()).finish_non_exhaustive()
    }
}

/// The way to the backend; clones share its limits.
#[derive(Debug, Clone)]
pub struct Upstream {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: Config,
    socket: SocketConfig,
    /// Connections that the backend may not have accepted yet, of both kinds.
    connects: Arc<Turns>,
    /// WebSocket handshakes until they are answered. Plain requests have no part in these: an answer may be long in coming
    /// (long polling).
    handshakes: Arc<Turns>,
    sources: Sources,
    metrics: Arc<Metrics>,
    /// Ports toward the backend, for all sources together; 0: it takes none, or nobody knows.
    ports: u64,
    /// That they become scarce was said.
    has_warned: AtomicBool,
}

impl Upstream {
    /// Nothing is connected yet. `ports` is how many ephemeral ports one address has, if that is known.
    pub fn new(config: Config, socket: SocketConfig, metrics: Arc<Metrics>, ports: Option<u64>) -> Self {
        let turns = [(); 2].map(|()| Arc::new(Turns::new(config.max_pending)));
        Self::with(config, socket, metrics, ports, turns)
    }

    /// The way from now on; this one remains for those who have begun with it. To the same backend both share their turns: what
    /// it can bear has not changed.
    #[must_use]
    pub fn reconfigured(
        &self,
        config: Config,
        socket: SocketConfig,
        ports: Option<u64>,
        tracker: &TaskTracker,
    ) -> Self {
        let Inner { config: old, connects, handshakes, metrics, .. } = &*self.inner;
        let turns = [connects, handshakes].map(|turns| {
            if old.address != config.address {
                return Arc::new(Turns::new(config.max_pending));
            }
            turns.resize(old.max_pending, config.max_pending, tracker);
            Arc::clone(turns)
        });
        Self::with(config, socket, Arc::clone(metrics), ports, turns)
    }

    fn with(
        config: Config,
        socket: SocketConfig,
        metrics: Arc<Metrics>,
        ports: Option<u64>,
        [connects, handshakes]: [Arc<Turns>; 2],
    ) -> Self {
        let sources = Sources::new(&config.source_addresses);
        let ports = match config.address {
            Address::Tcp { .. } => ports.unwrap_or(0).saturating_mul(sources.count() as u64),
            Address::Unix(_) => 0,
        };
        metrics.upstream_ports_limit.set(i64::try_from(ports).unwrap_or(i64::MAX));
        let has_warned = AtomicBool::new(false);
        let inner = Inner { config, socket, connects, handshakes, sources, metrics, ports, has_warned };
        Self { inner: Arc::new(inner) }
    }

    /// It is this very one, and not one that took its place.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.inner.config.queue_timeout
    }

    /// What was configured.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// Ports toward the backend, for all sources together; `None`: it takes none, or nobody knows.
    pub fn ports(&self) -> Option<u64> {
        (self.inner.ports > 0).then_some(self.inner.ports)
    }

    /// A connection, within `connect_timeout`.
    pub async fn connect(&self) -> Result<Stream, Error> {
        let Inner { config, socket, sources, .. } = &*self.inner;
        let dial = net::dial(&config.address, sources, socket, || self.one_more_port());
        match tokio::time::timeout(config.connect_timeout, dial).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(DialError::Io(source))) => Err(Error::Unreachable { address: config.address.clone(), source }),
            Ok(Err(DialError::Shortage { lack, error: source })) => {
                Err(Error::Shortage { address: config.address.clone(), lack, source })
            }
            Err(_) => Err(Error::Timeout("backend did not take the connection in time")),
        }
    }

    /// Says it once when four fifths of the ports are in use, and again only after they were not for a while.
    fn one_more_port(&self) -> Counted {
        let Inner { metrics, ports, has_warned, .. } = &*self.inner;
        let counted = Counted::new(&metrics.upstream_ports);
        let in_use = u64::try_from(metrics.upstream_ports.get()).unwrap_or(0);
        if *ports > 0 {
            if in_use * 10 >= ports * 8 {
                if !has_warned.swap(true, Ordering::Relaxed) {
                    let fix = "name more addresses of this host in upstream.source_addresses, widen \
                               net.ipv4.ip_local_port_range, or use a Unix socket";
                    warn!(in_use, limit = ports, fix, "ports toward the backend become scarce");
                }
            } else if in_use * 10 < ports * 6 {
                has_warned.store(false, Ordering::Relaxed);
            }
        }
        counted
    }

    /// Passes a valid WebSocket handshake on, in its turn. A 101 is checked (RFC 6455 4.1) before it counts.
    pub fn websocket(&self, request: Request<()>) -> Exchange<Answer> {
        let (this, control) = (self.clone(), Arc::new(Control::default()));
        let shared = Arc::clone(&control);
        let future = Box::pin(async move {
            let waiting = Counted::new(this.inner.metrics.upstream_waiting(true));
            let deadline = this.deadline();
            control.begin_turn(this.inner.handshakes.next(deadline).await.ok_or(Error::QueueTimeout)?);
            let turn = this.inner.connects.next(deadline).await.ok_or(Error::QueueTimeout)?;
            drop(waiting);
            let _pending = Counted::new(this.inner.metrics.upstream_pending(true));
            control.begun.store(true, Ordering::Relaxed);
            let begun = this.inner.connects.begin();
            let stream = this.connect().await?;
            control.connected.store(true, Ordering::Relaxed);
            let connected = this.inner.connects.connected(turn, begun);
            let answer = exchange::websocket(stream, request, &this.inner.config, &control).await;
            connected.heard(&answer);
            control.end_turn();
            answer
        });
        Exchange { future, control: shared }
    }

    /// Passes a plain request on, in its turn, and gives the response when its header is there.
    pub fn plain<B>(&self, request: Request<B>) -> Exchange<Reply>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (this, control) = (self.clone(), Arc::new(Control::default()));
        let shared = Arc::clone(&control);
        let future = Box::pin(async move {
            let waiting = Counted::new(this.inner.metrics.upstream_waiting(false));
            let turn = this.inner.connects.next(this.deadline()).await.ok_or(Error::QueueTimeout)?;
            drop(waiting);
            let _pending = Counted::new(this.inner.metrics.upstream_pending(false));
            control.begun.store(true, Ordering::Relaxed);
            let begun = this.inner.connects.begin();
            let stream = this.connect().await?;
            control.connected.store(true, Ordering::Relaxed);
            let connected = this.inner.connects.connected(turn, begun);
            let answer = exchange::plain(stream, request, &this.inner.config, &control).await;
            connected.heard(&answer);
            answer
        });
        Exchange { future, control: shared }
    }
}
