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
    io,
    pin::{Pin, pin},
    sync::{Arc, Mutex, PoisonError, Weak},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, ext::Protocol};
use http::{
    HeaderMap, Method, Request, Response, StatusCode, Uri, Version,
    header::{
        AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, COOKIE, HOST, HeaderValue, SEC_WEBSOCKET_ACCEPT,
        SEC_WEBSOCKET_KEY, SERVER, UPGRADE,
    },
    response::Parts,
    uri::Scheme,
};
use http_body::{Body, Frame};
use tokio::{
    runtime::Handle,
    sync::OwnedSemaphorePermit,
    time::{Instant, timeout_at},
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::debug;

pub(super) use self::knowledge::Knowledge;
use self::{connection::Connection, knowledge::Without};
use super::{
    Answer, Control, Error, Failure, Inner, Placed, Reply, ReplyBody, Upstream,
    endpoints::{Endpoint, Load},
    open::LATE,
    tls::{Speaks, may_be_http2},
};
use crate::{
    drain::Drain,
    fields::Switching,
    metrics::Counted,
    net::{Peer, Stream, Tunnel},
    pool::{self, AcquireError, Connector, KeySnapshot, OpenError, Opened, Pool, Reports},
};

/// What a stream may have under way toward us; also the most that is kept of one that is not read.
const STREAM_WINDOW: u32 = 64 << 10;

/// Times that a handshake is begun on a stream. What the first refused may be the last straw for a connection that is about
/// to end, and goes well on another.
const ATTEMPTS: usize = 2;

const UNANSWERED: &str = "backend did not answer in time";

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

impl Home {
    /// A task of its worker, from any thread. Boxed, since each kind of future has the runtime's code for tasks once more, and those that
    /// are no sessions are rare.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let task: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(task);
        self.tracker.spawn_on(task, &self.runtime);
    }
}

impl fmt::Debug for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Home").finish_non_exhaustive()
    }
}

/// The connections of each worker that this way has.
#[derive(Debug, Default)]
pub(super) struct Workers(Mutex<HashMap<usize, Arc<Multiplexed>>>);

impl Workers {
    /// What each of them has toward each endpoint.
    pub(super) fn snapshot(&self) -> Vec<KeySnapshot> {
        let all: Vec<_> = self.0.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        all.iter().flat_map(|worker| worker.pool.snapshot()).collect()
    }
}

/// What came of trying.
pub(super) enum Outcome {
    /// The backend's answer, or that there is none and would be none to another way of asking.
    Over(Result<Placed<Answer>, Failure>),
    /// To be asked over HTTP/1.1: there, if it is known where.
    Dedicated(Option<Load>, Doubt),
}

/// What an attempt on a stream came to.
enum Asked {
    Answer(Answer),
    Failed(Error),
    /// No connection came about; another endpoint may be tried.
    Unreached(Error),
    /// By a name of `metrics::FALLBACKS`.
    Dedicated(&'static str, Doubt),
    /// The backend has not seen it, another connection may take it.
    Unsent,
    /// The backend says that it has not looked at it.
    Refused,
}

/// What the answer over HTTP/1.1 may say about an endpoint: if it accepts what it has refused on a stream, it can't do that.
#[derive(Debug)]
pub(super) struct Doubt(Option<(Arc<Endpoint>, Without)>);

impl Doubt {
    /// Nothing.
    pub(super) const NONE: Self = Self(None);

    fn of(endpoint: &Arc<Endpoint>, why: Without) -> Self {
        Self(Some((Arc::clone(endpoint), why)))
    }

    /// The answer is here, of this endpoint.
    pub(super) fn heard(self, from: &Arc<Endpoint>, answer: &Result<Answer, Failure>) {
        let Self(Some((endpoint, why))) = self else { return };
        if !Arc::ptr_eq(&endpoint, from) {
            return;
        }
        match answer {
            Ok(Answer::Tunnel { .. }) => endpoint.knowledge.remember(endpoint.name(), why),
            // The next one may show it.
            _ if why == Without::Unanswered => endpoint.knowledge.suspect(why),
            _ => {}
        }
    }
}

impl Upstream {
    /// Tries a handshake on a stream of a shared connection, in its turn, if the backend is not known to be unable. Nothing is lost
    /// when it is dropped before the exchange has begun.
    pub(super) async fn multiplexed(&self, request: &Request<()>, home: &Home, control: &Control) -> Outcome {
        let Inner { config, endpoints, metrics, .. } = &*self.inner;
        let fall_back = |why, load: Option<Load>, doubt| {
            let backend = load.as_ref().map(Load::endpoint);
            debug!(backend = backend.map(|name| &**name), why, "a WebSocket gets a connection of its own");
            metrics.pool_fallback(why);
            Outcome::Dedicated(load, doubt)
        };
        let scheme = if config.tls.is_on { Scheme::HTTPS } else { Scheme::HTTP };
        let Some(bridged) = extended_connect(request, scheme) else { return fall_back("host", None, Doubt::NONE) };
        let multiplexed = self.of_this_worker(home);
        let deadline = self.deadline();
        let mut attempts = self.attempts(&*home.end);
        let mut asked_before = 0;
        loop {
            let waiting = Counted::new(metrics.upstream_waiting(true));
            let load = match self.pick(&mut attempts).await {
                Ok(load) => load,
                Err(error) => return Outcome::Over(Err(attempts.failure.take().unwrap_or(error).into())),
            };
            let endpoint = Arc::clone(load.get());
            control.is_for(load.endpoint());
            let begun = Instant::now();
            let reached = tokio::select! {
                biased;
                // While it waits, others may find that nobody is there.
                () = endpoints.is_in_vain(&endpoint, &attempts.tried) => {
                    attempts.tried.push(endpoint);
                    continue;
                }
                reached = multiplexed.reach(&endpoint, deadline) => reached,
            };
            drop(waiting);
            let asked = match reached {
                Ok((lease, turn)) => {
                    control.begin_turn(turn);
                    let asked = self.ask(lease, &endpoint, &bridged, request, control).await;
                    control.end_turn();
                    asked
                }
                Err(asked) => asked,
            };
            // Whoever has left is not asked for again.
            let may_go_on = !control.is_left();
            match asked {
                Asked::Answer(answer) => return Outcome::Over(Ok(Placed { what: answer, load })),
                Asked::Unreached(error) => {
                    attempts.tried.push(endpoint);
                    attempts.spend(begun.elapsed());
                    if !attempts.is_left() || !endpoints.has_another(&attempts.tried, false) {
                        return Outcome::Over(Err(error.into()));
                    }
                    // Counted with the connect, which is for all who waited for it.
                    debug!(%error, "another endpoint is tried");
                    attempts.failure = Some(error);
                }
                Asked::Dedicated(why, doubt) if may_go_on => {
                    control.begin_anew();
                    return fall_back(why, Some(load), doubt);
                }
                Asked::Unsent if may_go_on && asked_before + 1 == ATTEMPTS => {
                    control.begin_anew();
                    return fall_back("unsent", Some(load), Doubt::NONE);
                }
                Asked::Unsent | Asked::Refused if may_go_on && asked_before + 1 < ATTEMPTS => {
                    control.begin_anew();
                    asked_before += 1;
                }
                Asked::Failed(error) => return Outcome::Over(Err(error.into())),
                Asked::Refused => return Outcome::Over(Err(Error::Busy.into())),
                Asked::Dedicated(..) | Asked::Unsent => return Outcome::Over(Err(Error::Timeout(UNANSWERED).into())),
            }
        }
    }

    fn of_this_worker(&self, home: &Home) -> Arc<Multiplexed> {
        let mut workers = self.inner.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Multiplexed::new(self, home));
        Arc::clone(workers.entry(home.worker).or_insert_with(new))
    }

    /// One handshake on one stream.
    async fn ask(
        &self,
        lease: Lease,
        endpoint: &Arc<Endpoint>,
        bridged: &Request<()>,
        request: &Request<()>,
        control: &Control,
    ) -> Asked {
        let (Inner { config, .. }, knowledge) = (&*self.inner, &endpoint.knowledge);
        let deadline = Instant::now() + config.handshake_timeout;
        let Ok((response, mut send)) = lease.begin(bridged.clone()) else { return Asked::Unsent };
        control.begin();
        let answered = tokio::select! {
            biased;
            () = control.given_up() => return Asked::Failed(Error::Timeout(UNANSWERED)),
            answered = timeout_at(deadline, response) => answered,
        };
        let response = match answered {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return self.failed(error, &lease, endpoint),
            // With its handles the stream goes too: RST_STREAM (CANCEL).
            Err(_) => {
                if !lease.is_proven() {
                    knowledge.suspect(Without::Unanswered);
                }
                return Asked::Failed(Error::Timeout(UNANSWERED));
            }
        };
        let (status, peer) = (response.status(), peer(response.headers()));
        if status.is_success() && is_of_a_tunnel(&response) {
            lease.prove();
            knowledge.prove(endpoint.name());
            let (Parts { mut headers, .. }, recv) = response.into_parts();
            let key = request.headers().get(SEC_WEBSOCKET_KEY).map(HeaderValue::as_bytes).unwrap_or_default();
            // "these header fields are not used [in extended CONNECT]" (RFC 8441 5): the client's is ours to answer.
            if let Ok(accept) = HeaderValue::from_str(&derive_accept_key(key)) {
                headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
            }
            let tunnel = Tunnel::new(send, recv, config.pool.stall_timeout, peer, lease);
            let stream = Stream::Multiplexed(Box::new(tunnel));
            return Asked::Answer(Answer::Tunnel { stream, early: Bytes::new(), head: Switching::Map(headers) });
        }
        if !lease.is_proven() && !is_of_the_application(status) {
            return Asked::without(endpoint, Without::Practice);
        }
        // Without it the stream is reset when its handles go, which is when all of the answer was read.
        if peer == Peer::EndsStreams {
            let _ = send.send_data(Bytes::new(), true);
        }
        let response = response.map(|recv| ReplyBody::Stream(StreamBody { recv, _lease: lease }));
        Asked::Answer(Reply { response, connection: Box::pin(async { None }) }.into())
    }

    /// What is to be done when there was no answer. What the backend may have looked at is not sent again, but for one case: as
    /// long as the connection has shown no WebSocket it is asked for over HTTP/1.1, since a backend that can't do it may fail in any way.
    fn failed(&self, error: h2::Error, lease: &Lease, endpoint: &Arc<Endpoint>) -> Asked {
        match error.reason() {
            // "The endpoint refused the stream prior to performing any application processing" (RFC 9113 7).
            Some(Reason::REFUSED_STREAM) if error.is_remote() => {
                lease.refuses(lease.references().saturating_sub(1));
                return Asked::Refused;
            }
            // h2 gives it to those streams only that are behind the last one of which it says that it was looked at.
            _ if error.is_go_away() && error.is_remote() => return Asked::Unsent,
            Some(Reason::ENHANCE_YOUR_CALM) if error.is_remote() => {
                if lease.complains() {
                    endpoint.knowledge.calm_down(endpoint.name(), self.inner.config.pool.max_streams);
                }
                return Asked::Failed(Error::Busy);
            }
            // It may be so for this path only.
            Some(Reason::HTTP_1_1_REQUIRED) if lease.is_proven() => return Asked::Dedicated("required", Doubt::NONE),
            _ => {}
        }
        if lease.is_proven() {
            return Asked::Failed(Error::NoStream(error));
        }
        Asked::without(endpoint, if error.is_io() { Without::Unanswered } else { Without::Practice })
    }
}

impl Asked {
    /// What is certain was remembered where it was found.
    fn without(endpoint: &Arc<Endpoint>, why: Without) -> Self {
        Self::Dedicated(why.as_str(), if why.is_certain() { Doubt::NONE } else { Doubt::of(endpoint, why) })
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

/// Hypercorn forgets a stream when it has answered a Close, without ending it, or when its application has returned; a DATA frame
/// that comes then, if only an empty one with END_STREAM, ends the whole connection (0.18.0; its issue 329). It
/// is known by the name that it gives itself. Behind another proxy it is `hypercorn-h11`, and the streams are that proxy's.
fn peer(headers: &HeaderMap) -> Peer {
    match headers.get(SERVER) {
        Some(name) if name == "hypercorn-h2" => Peer::ForgetsStreams,
        _ => Peer::EndsStreams,
    }
}

/// A handshake of HTTP/1.1 as one of HTTP/2 (RFC 8441 5); `None`: its Host can't be said there.
pub fn extended_connect(request: &Request<()>, scheme: Scheme) -> Option<Request<()>> {
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
        let patience = *queue_timeout + *connect_timeout + Duration::from_secs(5);
        let settings = pool::Config {
            limits: pool::Limits {
                max_connections: config.max_connections,
                max_waiters: *max_waiting,
                idle_timeout: config.idle_timeout,
                keeps_unasked: true,
                backoff: BACKOFF.0,
                max_backoff: BACKOFF.1,
            },
            // Each of its parts has a deadline of its own, after which it ends in order.
            open_timeout: patience,
            // Whoever waits for the end of an open does so for longer than for others to leave (`reach`).
            max_wait: patience,
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

    /// A reference on a connection, and then a turn for the handshake on it, so that none is held by somebody who can't go on.
    async fn reach(&self, endpoint: &Arc<Endpoint>, deadline: Instant) -> Result<(Lease, OwnedSemaphorePermit), Asked> {
        let (key, knowledge) = (Key(Arc::clone(endpoint)), &endpoint.knowledge);
        let may_speak = knowledge.may_speak();
        // Where others are well there is a place, whatever was found out meanwhile.
        if !self.pool.has_room(&key) {
            if !may_speak {
                return Err(Asked::Dedicated("known", Doubt::NONE));
            }
            if let Some(why) = knowledge.suspicion() {
                return Err(Asked::without(endpoint, why));
            }
        }
        let mut acquired = pin!(self.pool.acquire(&key));
        let lease = match timeout_at(deadline, &mut acquired).await {
            Ok(acquired) => acquired,
            // That has deadlines of its own.
            Err(_) if self.pool.is_opening(&key) => acquired.await,
            Err(_) => Err(AcquireError::Timeout),
        };
        let lease = lease.map_err(|error| match error {
            AcquireError::Open(OpenError::Failed(fault)) => match &*fault {
                Fault::Backend(error) => Asked::Failed(error.again()),
                Fault::Unreached(error) => Asked::Unreached(error.again()),
                Fault::Without(why) => Asked::without(endpoint, *why),
                Fault::Reconfigured => Asked::Dedicated("closing", Doubt::NONE),
            },
            AcquireError::Full | AcquireError::Timeout => Asked::Failed(Error::PoolFull),
            AcquireError::Open(OpenError::TimedOut) => Asked::Failed(Error::Timeout(LATE)),
            AcquireError::Open(OpenError::Aborted) | AcquireError::Closing => Asked::Dedicated("closing", Doubt::NONE),
            AcquireError::Open(OpenError::Stillborn | OpenError::Panicked) => Asked::Dedicated("unsent", Doubt::NONE),
        })?;
        if !lease.is_proven() {
            if !may_speak {
                return Err(Asked::Dedicated("known", Doubt::NONE));
            }
            if let Some(why) = knowledge.suspicion() {
                return Err(Asked::without(endpoint, why));
            }
        }
        let turn = endpoint.handshakes.next(deadline).await.ok_or(Asked::Failed(Error::QueueTimeout))?;
        Ok((lease, turn))
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
    #[error("{0}")]
    Unreached(Error),
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
        let mut attempts = upstream.attempts(&*self.home.end);
        let dialled = upstream.dial(endpoint, &mut attempts, config.connect_timeout, Speaks::Http2).await;
        let stream = dialled.map_err(|failure| match failure {
            None => Fault::Unreached(attempts.failure.take().unwrap_or(Error::Timeout(LATE))),
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
            endpoint.knowledge.remember(endpoint.name(), Without::Alpn);
            // Several may wait for it: one of them has it, the others one of their own each.
            if let Some(stream) = upstream.idle_of(&self.home).agree(endpoint, stream) {
                (self.home.end)(stream);
            }
            return Err(Without::Alpn.into());
        }
        let opened = connection::open(stream, config, endpoint, &self.home, reports).await;
        if !matches!(opened, Err(Without::Settings)) {
            connected.was_accepted();
        }
        match opened {
            Ok((connection, capacity)) => Ok(Opened { connection, capacity }),
            Err(why @ (Without::Closed | Without::Settings)) if endpoint.knowledge.is_excused() => {
                let Inner { endpoints, metrics, .. } = &*upstream.inner;
                if endpoints.has_another(&attempts.tried, false) {
                    metrics.upstream_retries.inc();
                }
                if why == Without::Settings {
                    return Err(Fault::Unreached(Error::Timeout(LATE)));
                }
                let source = io::Error::other("it ended a connection of HTTP/2 before its SETTINGS");
                Err(Fault::Unreached(Error::Unreachable { address: endpoint.address().clone(), source }))
            }
            Err(why) => {
                if why.is_certain() {
                    endpoint.knowledge.remember(endpoint.name(), why);
                }
                Err(why.into())
            }
        }
    }

    fn close(&self, _: &Key, connection: &Connection) {
        connection.end();
    }
}

/// The body of a refusal on a stream, which ends with it. What its client does not take waits with h2, also small frames, which are not
/// joined: for that to be more than a connection may hold, each of 64 such clients would have to be refused with more than 500 of them.
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

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr, TcpListener};

    use super::*;
    use crate::{
        config::Settings,
        metrics::Metrics,
        net::Address,
        upstream::{Addresses, Mode, Upstreams},
    };

    /// A way of two endpoints at which nobody listens.
    fn to_nobody() -> (Upstream, [SocketAddr; 2], Settings) {
        let mut settings = Settings::default();
        let listeners = [(); 2].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port"));
        let at = listeners.map(|listener| listener.local_addr().expect("bound"));
        let addresses = at.map(|at| Address::Tcp { host: at.ip().to_string(), port: at.port() });
        settings.upstream.address = Addresses::new(addresses.to_vec()).expect("two");
        settings.upstream.pool.mode = Mode::Multiplexed;
        let upstreams =
            Upstreams::new(settings.upstream.clone(), [], &settings.socket, &Arc::new(Metrics::new()), None);
        (upstreams.otherwise().clone(), at, settings)
    }

    /// Another proxy in front of Hypercorn takes END_STREAM as anybody does, and may count resets.
    #[test]
    fn who_forgets_its_streams() {
        for (server, wanted) in [
            (Some("hypercorn-h2"), Peer::ForgetsStreams),
            (Some("hypercorn-h11"), Peer::EndsStreams),
            (Some("nginx"), Peer::EndsStreams),
            (None, Peer::EndsStreams),
        ] {
            let headers = server.map(|name| (SERVER, HeaderValue::from_static(name))).into_iter().collect();
            assert_eq!(peer(&headers), wanted, "{server:?}");
        }
    }

    /// What an answer over HTTP/1.1 shows, it shows of the endpoint that gave it.
    #[tokio::test]
    async fn a_doubt_is_about_one_endpoint() {
        let (upstream, ..) = to_nobody();
        let mut attempts = upstream.attempts(&drop);
        let mut loads = Vec::new();
        for _ in 0..2 {
            let load = upstream.pick(&mut attempts).await.expect("an endpoint");
            attempts.tried.push(Arc::clone(load.get()));
            loads.push(load);
        }
        let [doubted, other] = [0, 1].map(|index: usize| Arc::clone(loads[index].get()));
        let accepted = || {
            let socket = std::os::unix::net::UnixStream::pair().expect("a pair").0;
            socket.set_nonblocking(true).expect("a socket");
            let stream = Stream::Unix(tokio::net::UnixStream::from_std(socket).expect("a runtime"));
            Ok(Answer::Tunnel { stream, early: Bytes::new(), head: Switching::Map(HeaderMap::new()) })
        };
        for (from, why) in [(&other, Without::Practice), (&doubted, Without::Closed)] {
            Doubt::of(&doubted, why).heard(from, &accepted());
            assert_eq!(doubted.knowledge.may_speak(), Arc::ptr_eq(from, &other));
            assert!(other.knowledge.may_speak());
        }
        doubted.knowledge.forget();
        Doubt::of(&doubted, Without::Closed).heard(&doubted, &Err(Error::QueueTimeout.into()));
        assert!(doubted.knowledge.may_speak(), "nothing was accepted");
    }

    /// When nobody is there at all, the client hears of the last one that was tried.
    #[tokio::test]
    async fn the_last_failure_is_the_answer() {
        let (upstream, at, settings) = to_nobody();
        let home = Home {
            worker: 0,
            workers: 1,
            runtime: Handle::current(),
            tracker: TaskTracker::new(),
            drain: Drain::new(settings.drain),
            end: Arc::new(drop),
        };
        let request = Request::builder().uri("/").header(HOST, "app").body(()).expect("a request");
        let outcome = upstream.multiplexed(&request, &home, &Control::default()).await;
        let Outcome::Over(Err(Failure { error: Error::Unreachable { address, source }, .. })) = outcome else {
            panic!("another outcome");
        };
        assert_eq!(source.kind(), io::ErrorKind::ConnectionRefused);
        assert!(at.iter().any(|at| at.to_string() == address.to_string()), "{address}");
    }
}
