//! The backend's leg before the relay: dialling, the WebSocket handshake, plain requests.
//!
//! A socket is never dropped here once the backend has seen a byte of it: it is handed back, so that its end can be
//! orderly, whatever came of the request.

mod choice;
mod config;
mod endpoints;
mod exchange;
mod handshake;
mod idle;
mod multiplexed;
mod open;
mod routes;
mod rules;
mod tls;
mod turns;
mod ways;

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
use http::{
    HeaderMap, HeaderValue, Request, Response,
    header::{CONNECTION, TE},
};
use http_body::{Body, Frame, SizeHint};
use http_body_util::Empty;
use hyper::body::Incoming;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit},
    time::Instant,
};

pub use self::{
    config::{Addresses, Mode, Pool},
    endpoints::{Load, State as EndpointState},
    multiplexed::{End, Home, StreamBody, extended_connect},
    routes::{Ambiguous, Pattern, Routes},
    rules::{Rules, Seat, Seats},
    tls::Tls,
    ways::{Shared, Upstreams, Way},
};
use self::{
    endpoints::{Endpoints, Registry},
    exchange::Keep,
    idle::Kind,
    multiplexed::{Doubt, Outcome},
    open::Opened,
    turns::Connected,
};
use crate::{
    fields::{Ask, Switching},
    metrics::Metrics,
    net::{Address, Lack, SocketConfig, Sources, Stream},
};

/// What the backend's leg needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The backend.
    pub address: Addresses,
    /// How connections to it are used.
    pub pool: Pool,
    /// Whom it is for. Kept by the session.
    pub rules: Rules,
    /// Whether, and how, they are encrypted.
    pub tls: Tls,
    /// How often names are looked up, while clients come.
    pub resolve_interval: Duration,
    /// An endpoint is left alone after so many connects in a row that failed.
    pub eject_after: u32,
    /// For how long, the first time.
    pub eject_time: Duration,
    /// How often each endpoint is looked at, while clients come; `None`: only those that were left alone.
    pub health_interval: Option<Duration>,
    /// For the TCP connection, and for its TLS.
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

impl Config {
    /// Connections that are to wait for their use, a name counted as one endpoint.
    pub fn idle(&self) -> usize {
        let prewarm = if self.pool.mode == Mode::Multiplexed { 0 } else { self.pool.prewarm };
        self.address.as_slice().len() * (prewarm + self.pool.keep_alive)
    }
}

/// Why the backend gave no answer that could be passed on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection.
    #[error("cannot connect to {address}: {source}")]
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
    /// It is connected, and TLS does not come about, or broke before there was an answer.
    #[error("no TLS with {backend}: {what}")]
    Tls {
        /// The backend.
        backend: String,
        /// What is wrong, and what may be done about it.
        what: String,
    },
    /// Too many others were before it.
    #[error(
        "no turn at the backend within upstream.queue_timeout: more than upstream.max_pending handshakes are under way"
    )]
    QueueTimeout,
    /// Too many others have the connections that are shared.
    #[error(
        "no stream was free within upstream.queue_timeout: pool.max_connections of pool.max_streams each are in use"
    )]
    PoolFull,
    /// It says so itself, on a stream.
    #[error("backend takes no more WebSockets now (REFUSED_STREAM or ENHANCE_YOUR_CALM)")]
    Busy,
    /// A deadline passed.
    #[error("{0}")]
    Timeout(&'static str),
    /// The request's own body came to no end.
    #[error("request body did not arrive in full: {0}")]
    Body(#[source] hyper::Error),
    /// It answered, but not in HTTP, or closed the connection without an answer.
    #[error("backend gave no valid HTTP answer: {0}")]
    NoAnswer(#[source] Arc<hyper::Error>),
    /// The same on a stream of a shared connection.
    #[error("backend gave no valid HTTP/2 answer: {0}")]
    NoStream(#[source] h2::Error),
    /// Its 101 does not complete a WebSocket handshake.
    #[error("backend accepted wrongly: {0}")]
    BadAccept(&'static str),
}

impl Error {
    /// The same for another one who waited for it.
    #[must_use]
    pub fn again(&self) -> Self {
        let copy = |error: &io::Error| io::Error::new(error.kind(), error.to_string());
        match self {
            Self::Unreachable { address, source } => {
                Self::Unreachable { address: address.clone(), source: copy(source) }
            }
            Self::Shortage { address, lack, source } => {
                Self::Shortage { address: address.clone(), lack: *lack, source: copy(source) }
            }
            Self::Tls { backend, what } => Self::Tls { backend: backend.clone(), what: what.clone() },
            Self::QueueTimeout => Self::QueueTimeout,
            Self::PoolFull => Self::PoolFull,
            Self::Busy => Self::Busy,
            Self::Timeout(what) => Self::Timeout(what),
            Self::BadAccept(what) => Self::BadAccept(what),
            Self::NoAnswer(error) => Self::NoAnswer(Arc::clone(error)),
            // Of requests with a body, and of streams: nobody waits with others for these.
            Self::Body(_) | Self::NoStream(_) => Self::Timeout("backend did not answer in time"),
        }
    }
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
    pub response: Response<ReplyBody>,
    /// To be driven meanwhile.
    pub connection: Connection,
}

/// What a response has behind its header.
#[derive(Debug)]
pub enum ReplyBody {
    /// On a connection of its own.
    Connection(Incoming),
    /// On a stream of a shared one.
    Stream(StreamBody),
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match self.get_mut() {
            Self::Connection(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
            Self::Stream(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Connection(body) => body.is_end_stream(),
            Self::Stream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Connection(body) => body.size_hint(),
            Self::Stream(body) => body.size_hint(),
        }
    }
}

/// What is said otherwise is that each connection has one request.
fn stay_open(headers: &mut HeaderMap) {
    // "A sender of TE MUST also send a 'TE' connection option" (RFC 9110 10.1.4).
    if headers.contains_key(TE) {
        headers.insert(CONNECTION, HeaderValue::from_static("TE"));
    } else {
        headers.remove(CONNECTION);
    }
}

/// What a backend said to a WebSocket handshake.
pub enum Answer {
    /// A valid 101: a tunnel.
    Tunnel {
        /// Its socket.
        stream: Stream,
        /// What it sent right behind the 101.
        early: Bytes,
        /// That of the 101.
        head: Switching,
    },
    /// Anything else.
    Refusal(Reply),
}

/// What an endpoint gave, and its count there, to be held until that is over.
#[derive(Debug)]
pub struct Placed<T> {
    /// What it gave.
    pub what: T,
    /// Its count.
    pub load: Load,
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
            Self::Tunnel { head, .. } => f.debug_tuple("Tunnel").field(head).finish(),
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
    endpoint: Mutex<Option<Arc<str>>>,
    given_up: Notify,
    /// A byte of an answer, at the last try that failed.
    has_heard: AtomicBool,
    /// Its client.
    is_left: AtomicBool,
}

impl Control {
    /// The backend may see something of it from now on.
    fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
        self.connected.store(true, Ordering::Relaxed);
    }

    /// Nothing came of it, and it is tried anew: until then the backend sees nothing of it.
    fn begin_anew(&self) {
        self.end_turn();
        self.begun.store(false, Ordering::Relaxed);
        self.connected.store(false, Ordering::Relaxed);
    }

    fn has_heard(&self, has_heard: bool) {
        self.has_heard.store(has_heard, Ordering::Relaxed);
    }

    /// The backend's last word was the end of a connection that had waited, without a byte of an answer: it had ended it before
    /// it saw the request, or so that this can't be told from that.
    fn was_stale<T>(&self, answer: &Result<T, Failure>) -> bool {
        matches!(answer, Err(Failure { error: Error::NoAnswer(_), .. })) && !self.has_heard.load(Ordering::Relaxed)
    }

    /// Nobody waits for it any more.
    fn is_left(&self) -> bool {
        self.is_left.load(Ordering::Relaxed)
    }

    async fn given_up(&self) {
        self.given_up.notified().await;
    }

    fn begin_turn(&self, turn: OwnedSemaphorePermit) {
        *self.turn.lock().unwrap_or_else(PoisonError::into_inner) = Some(turn);
    }

    fn end_turn(&self) {
        *self.turn.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn is_for(&self, endpoint: &Arc<str>) {
        *self.endpoint.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(endpoint));
    }
}

/// Which endpoint an exchange is with, also after its end; by default none.
#[derive(Clone, Default)]
pub struct At(Arc<Control>);

impl At {
    /// With this one, or none.
    pub fn of(endpoint: Option<Arc<str>>) -> Self {
        Self(Arc::new(Control { endpoint: Mutex::new(endpoint), ..Control::default() }))
    }

    /// The last one that it was begun with.
    pub fn endpoint(&self) -> Option<Arc<str>> {
        self.0.endpoint.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl fmt::Debug for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("At").field(&self.endpoint()).finish()
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

    /// Which endpoint it is with.
    pub fn at(&self) -> At {
        At(Arc::clone(&self.control))
    }

    /// Nobody waits for it any more: others may have its turn.
    pub fn end_turn(&self) {
        self.control.is_left.store(true, Ordering::Relaxed);
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
    endpoints: Endpoints,
    sources: Sources,
    metrics: Arc<Metrics>,
    /// Ports toward one endpoint, for all sources together; 0: nobody knows.
    ports: u64,
    shared: multiplexed::Workers,
    idle: idle::Workers,
}

impl Upstream {
    /// Nothing is connected yet. `ports` is how many there are toward one endpoint, if that is known.
    fn new(
        config: Config,
        socket: SocketConfig,
        metrics: Arc<Metrics>,
        ports: Option<u64>,
        registry: &Arc<Registry>,
    ) -> Self {
        let endpoints = Endpoints::new(&config.address, registry);
        let sources = Sources::new(&config.source_addresses);
        let (ports, shared) = (ports.unwrap_or(0), multiplexed::Workers::default());
        let idle = idle::Workers::default();
        let inner = Inner { config, socket, endpoints, sources, metrics, ports, shared, idle };
        Self { inner: Arc::new(inner) }
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.inner.config.queue_timeout
    }

    /// What was configured.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// Passes a valid WebSocket handshake on, in its turn. A 101 is checked (RFC 6455 4.1) before it counts.
    pub fn websocket(&self, ask: Ask, home: &Home) -> Exchange<Placed<Answer>> {
        let (this, home, control) = (self.clone(), home.clone(), Arc::new(Control::default()));
        let shared = Arc::clone(&control);
        let future = Box::pin(async move {
            let (first, doubt) = if this.inner.config.pool.mode == Mode::Multiplexed {
                match Box::pin(this.multiplexed(&ask.request(), &home, &control)).await {
                    Outcome::Dedicated(first, doubt) => (first, doubt),
                    Outcome::Over(result) => return result,
                }
            } else {
                (None, Doubt::NONE)
            };
            let kind = if this.inner.config.pool.mode == Mode::Multiplexed { Kind::Agreed } else { Kind::Prewarm };
            let mut idle = this.idle(&home, kind);
            let mut first = first;
            loop {
                let Opened { stream, load, fresh, _pending } = this
                    .open(true, &*home.end, idle.as_deref().map(|idle| (idle, kind)), first.take(), &control)
                    .await?;
                let connected = fresh.map(|(turn, begun)| load.get().connects.connected(turn, begun));
                let answer = exchange::websocket(stream, &ask, &this.inner.config, &control).await;
                match (connected, idle.take()) {
                    (Some(connected), _) => connected.heard(&answer),
                    (None, Some(idle)) if control.was_stale(&answer) => {
                        idle.was_stale(kind, answer.err().and_then(|failure| failure.stream));
                        control.begin_anew();
                        continue;
                    }
                    (None, _) => {}
                }
                doubt.heard(load.get(), &answer);
                control.end_turn();
                return Ok(Placed { what: answer?, load });
            }
        });
        Exchange { future, control: shared }
    }

    /// Passes a plain request on, in its turn, and gives the response when its header is there.
    ///
    /// One that may be sent twice (idempotent and without a body, RFC 9110 9.2.2) gets a connection that others have used before,
    /// if one waits; and a fresh one, if the backend ends that without a byte of an answer. All others get a fresh one at once.
    pub fn plain<B>(&self, mut request: Request<B>, home: &Home) -> Exchange<Placed<Reply>>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (this, home, control) = (self.clone(), home.clone(), Arc::new(Control::default()));
        let shared = Arc::clone(&control);
        let future = Box::pin(async move {
            let idle = this.idle(&home, Kind::KeepAlive);
            if idle.is_some() {
                stay_open(request.headers_mut());
            }
            let keep = |load: &Load| {
                let (idle, endpoint) = (Arc::clone(idle.as_ref()?), Arc::clone(load.get()));
                Some(Box::new(move |stream| idle.keep(&endpoint, stream)) as Keep)
            };
            let config = &this.inner.config;
            let again = request.body().is_end_stream() && request.method().is_idempotent();
            if let (true, Some(idle)) = (again, &idle) {
                let (head, _) = request.into_parts();
                let mut waiting = Some((&**idle, Kind::KeepAlive));
                loop {
                    let Opened { stream, load, fresh, _pending } =
                        this.open(false, &*home.end, waiting, None, &control).await?;
                    let connected = fresh.map(|(turn, begun)| load.get().connects.connected(turn, begun));
                    let request = Request::from_parts(head.clone(), Empty::<Bytes>::new());
                    let answer = exchange::plain(stream, request, config, &control, keep(&load)).await;
                    match (connected, waiting.take()) {
                        (Some(connected), _) => connected.heard(&answer),
                        (None, Some((idle, kind))) if control.was_stale(&answer) => {
                            idle.was_stale(kind, answer.err().and_then(|failure| failure.stream));
                            control.begin_anew();
                            continue;
                        }
                        (None, _) => {}
                    }
                    return Ok(Placed { what: answer?, load });
                }
            }
            let Opened { stream, load, fresh, _pending } = this.open(false, &*home.end, None, None, &control).await?;
            let connected = fresh.map(|(turn, begun)| load.get().connects.connected(turn, begun));
            let answer = exchange::plain(stream, request, config, &control, keep(&load)).await;
            if let Some(connected) = connected {
                connected.heard(&answer);
            }
            Ok(Placed { what: answer?, load })
        });
        Exchange { future, control: shared }
    }
}
