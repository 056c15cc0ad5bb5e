//! Many WebSockets on one connection to a backend (RFC 8441): each is a stream, and a reference on its connection.
//!
//! Connections belong to a worker, as sessions do. How many there are, and who gets which, is the pool's to say (`pool/`); here is
//! what a handshake becomes on a stream, and what is done about backends that do not take it. Frames are not looked at: they
//! are the same bytes as over HTTP/1.1.

mod connection;
mod knowledge;

use std::{
    collections::HashMap,
    fmt,
    hash::{Hash, Hasher},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError, Weak},
    task::{Context, Poll, ready},
    thread::{self, ThreadId},
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, ext::Protocol};
use http::{
    Method, Request, Response, StatusCode, Uri, Version,
    header::{
        AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, COOKIE, HOST, HeaderValue, SEC_WEBSOCKET_ACCEPT,
        SEC_WEBSOCKET_KEY, UPGRADE,
    },
    uri::Scheme,
};
use http_body::{Body, Frame};
use tokio::{
    runtime::Handle,
    time::{Instant, timeout_at},
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub(super) use self::knowledge::Knowledge;
use self::{connection::Connection, knowledge::Without};
use super::{
    Answer, Control, Error, Failure, Inner, Placed, Reply, ReplyBody, Upstream,
    endpoints::Endpoint,
    tls::{Speaks, may_be_http2},
};
use crate::{
    drain::Drain,
    metrics::Counted,
    net::{Stream, Tunnel},
    pool::{self, AcquireError, Connector, OpenError, Opened, Pool, Reports},
};

/// What a stream may have under way toward us; also the most that is kept of one that is not read.
const STREAM_WINDOW: u32 = 64 << 10;

/// Times that a handshake is begun on a stream. What the first refused may be the last straw for a connection that is about
/// to end, and goes well on another.
const ATTEMPTS: usize = 2;

/// After an open that failed, until the next one.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// The last wait of a socket.
pub type End = dyn Fn(Stream) + Send + Sync;

/// Where the connections of a worker live.
#[derive(Clone)]
pub struct Home {
    /// Which of how many workers it is, from 0.
    pub worker: usize,
    /// How many there are.
    pub workers: usize,
    /// The worker's.
    pub runtime: Handle,
    /// For their tasks.
    pub tracker: TaskTracker,
    /// From its window on nothing is opened, and nothing is kept that is not used.
    pub drain: Drain,
    /// Takes their sockets.
    pub end: Arc<End>,
}

impl fmt::Debug for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Home").finish_non_exhaustive()
    }
}

/// The connections of each worker that this way has.
#[derive(Debug, Default)]
pub(super) struct Workers(Mutex<HashMap<ThreadId, Arc<Multiplexed>>>);

/// What came of trying.
pub(super) enum Outcome {
    /// The backend's answer, or that there is none and would be none to another way of asking.
    Over(Result<Placed<Answer>, Failure>),
    /// To be asked over HTTP/1.1.
    Dedicated(Doubt),
}

/// What an attempt on a stream came to.
enum Asked {
    Answer(Answer),
    Failed(Error),
    Dedicated(Doubt),
    /// This connection has not looked at it, another one may.
    Elsewhere,
}

/// What the answer over HTTP/1.1 may say about the backend: if it accepts what it has refused on a stream, it can't do that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Doubt(Option<Without>);

impl Doubt {
    /// Nothing.
    pub(super) const NONE: Self = Self(None);

    /// The answer is here.
    pub(super) fn heard(self, endpoint: &Endpoint, answer: &Result<Answer, Failure>) {
        if let (Some(why), Ok(Answer::Tunnel { .. })) = (self.0, answer) {
            endpoint.knowledge.remember(endpoint.name(), why);
        }
    }
}

impl Upstream {
    /// Tries a handshake on a stream of a shared connection, in its turn, if the backend is not known to be unable. Nothing is lost
    /// when it is dropped before the exchange has begun.
    pub(super) async fn multiplexed(&self, request: &Request<()>, home: &Home, control: &Control) -> Outcome {
        let scheme = if self.config().tls.is_on { Scheme::HTTPS } else { Scheme::HTTP };
        let Some(bridged) = bridge(request, scheme) else { return Outcome::Dedicated(Doubt::NONE) };
        let multiplexed = self.of_this_worker(home);
        let deadline = self.deadline();
        let mut attempts = self.attempts();
        loop {
            let waiting = Counted::new(self.inner.metrics.upstream_waiting(true));
            let load = match self.pick(&mut attempts).await {
                Ok(load) => load,
                Err(error) => return Outcome::Over(Err(error.into())),
            };
            let endpoint = Arc::clone(load.get());
            if !endpoint.knowledge.may_speak() {
                return Outcome::Dedicated(Doubt::NONE);
            }
            control.is_for(load.endpoint());
            match endpoint.handshakes.next(deadline).await {
                Some(turn) => control.begin_turn(turn),
                None => return Outcome::Over(Err(Error::QueueTimeout.into())),
            }
            drop(waiting);
            let asked = self.on_a_stream(&multiplexed, &endpoint, &bridged, request, control).await;
            // Whoever goes on takes another one.
            control.end_turn();
            match asked {
                Asked::Answer(answer) => return Outcome::Over(Ok(Placed { what: answer, load })),
                Asked::Failed(error) => return Outcome::Over(Err(error.into())),
                Asked::Dedicated(doubt) => return Outcome::Dedicated(doubt),
                Asked::Elsewhere => attempts.tried.push(endpoint),
            }
        }
    }

    /// `Elsewhere`: no connection came about, and there are other endpoints.
    async fn on_a_stream(
        &self,
        multiplexed: &Multiplexed,
        endpoint: &Arc<Endpoint>,
        bridged: &Request<()>,
        request: &Request<()>,
        control: &Control,
    ) -> Asked {
        let key = Key(Arc::clone(endpoint));
        for _ in 0..ATTEMPTS {
            let lease = match multiplexed.pool.acquire(&key).await {
                Ok(lease) => lease,
                Err(AcquireError::Open(OpenError::Failed(error))) => match &*error {
                    Fault::Backend(error) => return Asked::Failed(error.again()),
                    Fault::Elsewhere => return Asked::Elsewhere,
                    Fault::Without(_) | Fault::Reconfigured => return Asked::Dedicated(Doubt::NONE),
                },
                Err(AcquireError::Full | AcquireError::Timeout) => return Asked::Failed(Error::QueueTimeout),
                Err(AcquireError::Open(_) | AcquireError::Closing) => return Asked::Dedicated(Doubt::NONE),
            };
            match self.ask(lease, endpoint, bridged, request, control).await {
                Asked::Elsewhere => {}
                asked => return asked,
            }
        }
        Asked::Dedicated(Doubt::NONE)
    }

    fn of_this_worker(&self, home: &Home) -> Arc<Multiplexed> {
        let mut workers = self.inner.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Multiplexed::new(self, home));
        Arc::clone(workers.entry(thread::current().id()).or_insert_with(new))
    }

    /// One handshake on one stream.
    async fn ask(
        &self,
        lease: Lease,
        endpoint: &Endpoint,
        bridged: &Request<()>,
        request: &Request<()>,
        control: &Control,
    ) -> Asked {
        let (Inner { config, .. }, knowledge) = (&*self.inner, &endpoint.knowledge);
        let deadline = Instant::now() + config.handshake_timeout;
        // An error here: it has just ended, or is about to.
        let Ok((response, mut send)) = lease.sender().send_request(bridged.clone(), false) else {
            return Asked::Elsewhere;
        };
        control.begin();
        let answered = tokio::select! {
            biased;
            () = control.given_up() => None,
            answered = timeout_at(deadline, response) => answered.ok(),
        };
        let response = match answered {
            Some(Ok(response)) => response,
            Some(Err(error)) => return self.failed(error, &lease, endpoint),
            // With its handles the stream goes too: RST_STREAM (CANCEL).
            None => return Asked::Failed(Error::Timeout("backend did not answer in time")),
        };
        let status = response.status();
        if status.is_success() && (knowledge.is_proven() || is_of_a_tunnel(&response)) {
            knowledge.prove();
            let (parts, recv) = response.into_parts();
            let mut response = Response::from_parts(parts, ());
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            *response.version_mut() = Version::HTTP_11;
            let key = request.headers().get(SEC_WEBSOCKET_KEY).map(HeaderValue::as_bytes).unwrap_or_default();
            // "these header fields are not used [in extended CONNECT]" (RFC 8441 5): the client's is ours to answer.
            if let Ok(accept) = HeaderValue::from_str(&derive_accept_key(key)) {
                response.headers_mut().insert(SEC_WEBSOCKET_ACCEPT, accept);
            }
            let tunnel = Tunnel::new(send, recv, config.pool.stall_timeout, lease);
            let stream = Stream::Multiplexed(Box::new(tunnel));
            return Asked::Answer(Answer::Tunnel { stream, early: Bytes::new(), response });
        }
        if !knowledge.is_proven() && !is_of_the_application(status) {
            return Asked::Dedicated(Doubt(Some(Without::Practice)));
        }
        let _ = send.send_data(Bytes::new(), true);
        let response = response.map(|recv| ReplyBody::Stream(StreamBody { recv, _lease: lease }));
        Asked::Answer(Reply { response, connection: Box::pin(async { None }) }.into())
    }

    /// What is to be done when there was no answer.
    fn failed(&self, error: h2::Error, lease: &Lease, endpoint: &Endpoint) -> Asked {
        let knowledge = &endpoint.knowledge;
        match error.reason() {
            // "The endpoint refused the stream prior to performing any application processing" (RFC 9113 7).
            Some(Reason::REFUSED_STREAM) => {
                lease.refuses();
                Asked::Elsewhere
            }
            Some(Reason::ENHANCE_YOUR_CALM) => {
                knowledge.calm_down(self.inner.config.pool.max_streams);
                lease.refuses();
                Asked::Elsewhere
            }
            Some(Reason::HTTP_1_1_REQUIRED) => {
                knowledge.remember(endpoint.name(), Without::Practice);
                Asked::Dedicated(Doubt::NONE)
            }
            // It was on its way when the connection ended, or when that was announced.
            _ if error.is_io() || (error.is_go_away() && error.is_remote() && knowledge.is_proven()) => {
                Asked::Elsewhere
            }
            _ if !knowledge.is_proven() => Asked::Dedicated(Doubt(Some(Without::Practice))),
            _ => Asked::Failed(Error::NoStream(error)),
        }
    }
}

/// A server that knows no extended CONNECT although it advertises it may give it to the application as a request like any other, and
/// that answers with a page. "A server MUST NOT send any Transfer-Encoding or Content-Length header fields in a 2xx response to
/// CONNECT" (RFC 9110 9.3.6), and what has a type is content.
fn is_of_a_tunnel(response: &Response<RecvStream>) -> bool {
    let headers = response.headers();
    !response.body().is_end_stream() && !headers.contains_key(CONTENT_LENGTH) && !headers.contains_key(CONTENT_TYPE)
}

/// Statuses that no server answers for its lack of extended CONNECT.
fn is_of_the_application(status: StatusCode) -> bool {
    status.is_redirection()
        || matches!(
            status,
            StatusCode::UNAUTHORIZED
                | StatusCode::FORBIDDEN
                | StatusCode::PROXY_AUTHENTICATION_REQUIRED
                | StatusCode::TOO_MANY_REQUESTS
        )
}

/// A handshake of HTTP/1.1 as one of HTTP/2 (RFC 8441 5); `None`: its Host can't be said there.
fn bridge(request: &Request<()>, scheme: Scheme) -> Option<Request<()>> {
    let mut headers = request.headers().clone();
    let host = headers.remove(HOST)?;
    for name in [CONNECTION, UPGRADE, SEC_WEBSOCKET_KEY] {
        headers.remove(name);
    }
    for (name, value) in &mut headers {
        // Many clients share the table that indexed ones would be kept in (RFC 7541 7.1.3).
        value.set_sensitive([AUTHORIZATION, COOKIE].contains(name));
    }
    let target = request.uri().path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let mut bridged = Request::new(());
    *bridged.method_mut() = Method::CONNECT;
    *bridged.uri_mut() =
        Uri::builder().scheme(scheme).authority(host.as_bytes()).path_and_query(target).build().ok()?;
    *bridged.version_mut() = Version::HTTP_2;
    *bridged.headers_mut() = headers;
    bridged.extensions_mut().insert(Protocol::from_static("websocket"));
    Some(bridged)
}

type Lease = pool::Lease<Key, Opener>;

/// Connections are to an endpoint.
#[derive(Clone)]
struct Key(Arc<Endpoint>);

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).hash(state);
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.name())
    }
}

/// The connections of one worker.
#[derive(Debug)]
struct Multiplexed {
    pool: Pool<Key, Opener>,
    gone: CancellationToken,
}

impl Multiplexed {
    fn new(upstream: &Upstream, home: &Home) -> Self {
        let super::Config { pool: config, connect_timeout, queue_timeout, max_waiting, .. } = &upstream.inner.config;
        let settings = pool::Config {
            limits: pool::Limits {
                max_connections: config.max_connections,
                max_waiters: *max_waiting,
                idle_timeout: config.idle_timeout,
                backoff: BACKOFF.0,
                max_backoff: BACKOFF.1,
            },
            // Each of its parts has a deadline of its own, after which it ends in order.
            open_timeout: *queue_timeout + *connect_timeout + Duration::from_secs(5),
            max_wait: *queue_timeout,
        };
        let opener = Opener { upstream: Arc::downgrade(&upstream.inner), home: home.clone() };
        let stats = Arc::clone(&upstream.inner.metrics.pools);
        let pool = Pool::new(settings, opener, stats, &home.tracker, &home.runtime);
        let gone = CancellationToken::new();
        let (of, over, drain) = (pool.clone(), gone.clone(), home.drain.clone());
        home.tracker.spawn_on(
            async move {
                tokio::select! {
                    () = drain.begun() => {}
                    () = over.cancelled() => {}
                }
                of.close();
            },
            &home.runtime,
        );
        Self { pool, gone }
    }
}

impl Drop for Multiplexed {
    /// Those who use its connections have them until they end.
    fn drop(&mut self) {
        self.gone.cancel();
    }
}

/// Why there is no connection to share.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error(transparent)]
    Backend(#[from] Error),
    #[error(transparent)]
    Without(#[from] Without),
    /// Nobody is there, and another endpoint may be tried.
    #[error("not connected; there are others")]
    Elsewhere,
    #[error("this way to the backend is given up")]
    Reconfigured,
}

/// Opens connections for a worker.
#[derive(Debug)]
pub(super) struct Opener {
    /// Weak, since its connections belong to it.
    upstream: Weak<Inner>,
    home: Home,
}

impl Connector<Key> for Opener {
    type Connection = Connection;
    type Error = Fault;

    async fn open(&self, key: &Key, reports: Reports) -> Result<Opened<Connection>, Fault> {
        let upstream = Upstream { inner: self.upstream.upgrade().ok_or(Fault::Reconfigured)? };
        let (Key(endpoint), config) = (key, upstream.config());
        let turn = endpoint.connects.next(upstream.deadline()).await.ok_or(Error::QueueTimeout)?;
        let begun = endpoint.connects.begin();
        let dialled = upstream.dial(endpoint, &mut upstream.attempts(), config.connect_timeout, Speaks::Http2).await;
        let stream = dialled.map_err(|failure| match failure {
            None => Fault::Elsewhere,
            Some(Failure { error, stream }) => {
                if let Some(stream) = stream {
                    (self.home.end)(stream);
                }
                Fault::Backend(error)
            }
        })?;
        let connected = endpoint.connects.connected(turn, begun);
        if !may_be_http2(&stream) {
            connected.was_accepted();
            // Nothing was said on it, but several may wait for it: those who come next have one of their own each.
            (self.home.end)(stream);
            endpoint.knowledge.remember(endpoint.name(), Without::Alpn);
            return Err(Without::Alpn.into());
        }
        let opened = connection::open(stream, config, endpoint, &self.home, reports).await;
        if !matches!(opened, Err(Without::Settings)) {
            connected.was_accepted();
        }
        match opened {
            Ok((connection, capacity)) => Ok(Opened { connection, capacity }),
            Err(why) => {
                endpoint.knowledge.remember(endpoint.name(), why);
                Err(why.into())
            }
        }
    }

    fn close(&self, _: &Key, connection: &Connection) {
        connection.end();
    }
}

/// The body of a refusal on a stream, which ends with it.
pub struct StreamBody {
    recv: RecvStream,
    _lease: Lease,
}

impl fmt::Debug for StreamBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamBody").finish_non_exhaustive()
    }
}

impl Body for StreamBody {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        if let Some(data) = ready!(self.recv.poll_data(cx)) {
            let data = data.inspect(|bytes| {
                // Fails only when more is given back than came.
                let _ = self.recv.flow_control().release_capacity(bytes.len());
            });
            return Poll::Ready(Some(data.map(Frame::data)));
        }
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        self.recv.is_end_stream()
    }
}
