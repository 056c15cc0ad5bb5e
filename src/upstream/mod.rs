//! The backend's leg before the relay: dialling, the WebSocket handshake, plain requests.
//!
//! A socket is never dropped here once the backend has seen a byte of it: it is handed back, so that its end can be
//! orderly, whatever came of the request.

mod exchange;

use std::{
    fmt,
    future::Future,
    io,
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
use http_body_util::Empty;
use hyper::body::Incoming;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::net::{self, Address, SocketConfig, Stream};

/// What the backend's leg needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The backend.
    pub address: Address,
    /// For the TCP connection.
    pub connect_timeout: Duration,
    /// For a WebSocket handshake, waiting for its turn and connecting included.
    pub handshake_timeout: Duration,
    /// For the response header to a plain request.
    pub response_timeout: Duration,
    /// For a plain body to move on.
    pub body_timeout: Duration,
    /// WebSocket handshakes under way at once, and dials for plain requests.
    pub max_pending: usize,
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

/// A request to the backend, under way. It has no deadline for its turn: that is the caller's.
#[must_use]
pub struct Exchange<T> {
    future: Pin<Box<dyn Future<Output = Result<T, Failure>> + Send>>,
    control: Arc<Control>,
}

/// What an exchange and its holder tell each other.
#[derive(Default)]
struct Control {
    begun: AtomicBool,
    turn: Mutex<Option<OwnedSemaphorePermit>>,
    given_up: Notify,
}

impl Control {
    async fn given_up(&self) {
        self.given_up.notified().await;
    }

    /// Waits for a turn, first come first served, and keeps it.
    async fn wait_for_turn(&self, turns: &Arc<Semaphore>) {
        let turn = Arc::clone(turns).acquire_owned().await.ok();
        *self.turn.lock().unwrap_or_else(PoisonError::into_inner) = turn;
    }

    fn end_turn(&self) {
        *self.turn.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl<T> Exchange<T> {
    /// The backend may have seen something of it, so it must be carried on to an orderly end. Before that, dropping it
    /// does no harm.
    pub fn has_begun(&self) -> bool {
        self.control.begun.load(Ordering::Relaxed)
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
    config: Arc<Config>,
    socket: Arc<SocketConfig>,
    /// Turns of WebSocket handshakes, and of plain requests' dials: neither can use up the other's.
    handshakes: Arc<Semaphore>,
    dials: Arc<Semaphore>,
}

impl Upstream {
    /// Nothing is connected yet.
    pub fn new(config: Config, socket: SocketConfig) -> Self {
        let turns = || Arc::new(Semaphore::new(config.max_pending));
        let (handshakes, dials) = (turns(), turns());
        Self { config: Arc::new(config), socket: Arc::new(socket), handshakes, dials }
    }

    /// What was configured.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// A connection, within `connect_timeout`.
    pub async fn connect(&self) -> Result<Stream, Error> {
        let dial = net::dial(&self.config.address, &self.socket);
        match tokio::time::timeout(self.config.connect_timeout, dial).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(source)) => Err(Error::Unreachable { address: self.config.address.clone(), source }),
            Err(_) => Err(Error::Timeout("backend did not take the connection in time")),
        }
    }

    /// Passes a valid WebSocket handshake on, in its turn. A 101 is checked (RFC 6455 4.1) before it counts.
    pub fn websocket(&self, request: Request<Empty<Bytes>>) -> Exchange<Answer> {
        let (this, control) = (self.clone(), Arc::new(Control::default()));
        let shared = Arc::clone(&control);
        let future = Box::pin(async move {
            // A turn lasts until the backend's answer: that is what paces a spike.
            control.wait_for_turn(&this.handshakes).await;
            let stream = this.connect().await?;
            control.begun.store(true, Ordering::Relaxed);
            let answer = exchange::websocket(stream, request, &this.config, &control).await;
            control.end_turn();
            answer
        });
        Exchange { future, control: shared }
    }

    /// Passes a plain request on and gives the response when its header is there.
    pub fn plain<B>(&self, request: Request<B>) -> Exchange<Reply>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (this, control) = (self.clone(), Arc::new(Control::default()));
        let shared = Arc::clone(&control);
        let future = Box::pin(async move {
            // Only the dial has a turn: an answer may be long in coming (long polling).
            control.wait_for_turn(&this.dials).await;
            let stream = this.connect().await?;
            control.end_turn();
            control.begun.store(true, Ordering::Relaxed);
            exchange::plain(stream, request, &this.config, &control).await
        });
        Exchange { future, control: shared }
    }
}
