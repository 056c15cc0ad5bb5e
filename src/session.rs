//! The one place that knows the order of a session:
//!
//! ```text
//! accept -> lobby, while no worker has room -> request, under a deadline -> the backend's handshake -> 101 to the client
//!        -> relay until both legs have ended -> each leg lingers -> closed
//! ```
//!
//! A handshake that is there as a whole (one read, 4 KiB) and is answered with 101 goes this way without hyper (`shake_hands`);
//! everything else is hyper's (`serve`).
//!
//! Whatever goes wrong on the way, no socket is dropped with something still to be said or read on it: a client that
//! is turned away lingers, and so does a backend whose client left before its answer.

use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    io,
    net::{IpAddr, SocketAddr},
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context as TaskContext, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Request, Response, StatusCode,
    header::{ALLOW, CONNECTION, SEC_WEBSOCKET_EXTENSIONS, SEC_WEBSOCKET_VERSION, UPGRADE},
};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    sync::Semaphore,
    time::{Instant, Sleep, sleep, timeout},
};
use tokio_util::task::TaskTracker;
use tower::{ServiceBuilder, ServiceExt, limit::GlobalConcurrencyLimitLayer, load_shed::LoadShedLayer};
use tracing::{debug, info, warn};

use crate::{
    admission::{Admission, Extra, Reason},
    close::{self, Lingered},
    downstream::{self, Body, Intent, Refusal, TimedBody, answer, answer_later},
    drain::Drain,
    fields::tokens,
    gate::{Gate, HANDSHAKE_BYTES, Lobby, Pass, STAY},
    listen::{Guest, Queued, Seats, Stay},
    metrics::{Counted, Handshake, Metrics, Traffic},
    net::{Kept, Lack, Stream, concat, read_ahead},
    relay::{self, Cause, Ended, Gone, Initiator, Leg, Relay, Report},
    side::Side,
    sparse::Sparse,
    upstream::{Answer, Error, Exchange, Failure, Reply, Upstream},
    ws::Rsv,
};

/// The longest last wait for a client that got as far as no request.
const REFUSED_LINGER: Duration = Duration::from_secs(1);

/// The same for a backend's socket when there are too many of them.
const CROWDED_LINGER: Duration = Duration::from_millis(200);

/// What the sessions of one worker share.
#[derive(Debug)]
pub struct Context {
    /// The client's leg.
    pub downstream: downstream::Config,
    /// The relay.
    pub relay: Arc<relay::Config>,
    /// The last wait of each socket.
    pub close: close::Config,
    /// The way to the backend.
    pub upstream: Upstream,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What this worker counts with every message.
    pub traffic: Arc<Traffic>,
    /// The order to end.
    pub drain: Drain,
    /// Every task of the worker.
    pub tracker: TaskTracker,
    /// Its handshakes.
    pub gate: Gate,
    /// Where those wait that no worker has room for.
    pub lobby: Arc<Lobby<Queued>>,
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
    /// Backends' sockets that linger although their client may have left.
    pub leftovers: Arc<Semaphore>,
}

/// Who a session belongs to, for its log lines.
#[derive(Debug)]
struct About {
    client: SocketAddr,
    /// Without the query, which may hold secrets; at most 256 bytes.
    path: String,
    request_id: String,
}

/// A WebSocket handshake that was there as a whole when its connection was begun with.
#[derive(Debug)]
struct Asked {
    request: Request<()>,
    /// The same as it came.
    header: Bytes,
    /// What came behind it.
    early: Bytes,
}

/// What the handshake leaves to the relay.
#[derive(Debug)]
struct Tunnel {
    backend: Leg,
    rsv: Rsv,
    about: About,
}

/// A client's connection as long as it speaks HTTP.
#[derive(Debug)]
struct Stage {
    next: Next,
    /// Until its first request is answered, or turns out to be long in coming.
    pass: Option<Pass>,
    /// A request is here.
    is_asked: bool,
}

/// What becomes of it.
#[derive(Debug)]
enum Next {
    /// Requests and answers.
    Plain,
    /// A WebSocket handshake is under way.
    Upgrading,
    /// The 101 is on its way to the client.
    Tunnel(Box<Tunnel>),
}

impl Context {
    /// Turns a connection away, begins with it, or leaves it in the lobby. To be called on the worker's runtime.
    pub fn accept(self: &Arc<Self>, guest: Guest) {
        let Some(reason) = guest.stay.place.refused else { return self.admit(guest) };
        let Guest { stream, peer, stay } = guest;
        match TcpStream::from_std(stream) {
            Ok(stream) => _ = self.tracker.spawn(Arc::clone(self).turn_away(stream, peer, stay, reason)),
            Err(error) => lost(peer, &error),
        }
    }

    /// Takes connections from the lobby as there is room, until that is closed. They then belong to this worker.
    pub async fn take_on(self: Arc<Self>, seats: Seats) {
        while let Some((Queued { mut guest, .. }, pass)) = self.gate.next(&self.lobby).await {
            guest.stay.seat = seats.one_more();
            self.begin(guest, Some(pass), true);
        }
    }

    /// Begins with a connection, or leaves it to whichever worker has room first.
    fn admit(self: &Arc<Self>, guest: Guest) {
        let pass = if self.lobby.is_empty() { self.gate.try_pass() } else { None };
        if pass.is_some() {
            self.begin(guest, pass, false);
            return;
        }
        let counted = Counted::new(&self.metrics.connections_queued);
        if let Err(Queued { guest, .. }) = self.lobby.push(Queued { guest, counted }) {
            // All workers are about to end.
            self.begin(guest, None, false);
        }
    }

    /// Begins with a connection: with its request if that is here already, else with waiting for it, at nobody's cost.
    fn begin(self: &Arc<Self>, guest: Guest, pass: Option<Pass>, has_waited: bool) {
        let Guest { stream, peer, stay } = guest;
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
                    drop(pass);
                    self.tracker.spawn(this.wait(stream, peer, stay));
                    return;
                };
                let stream = Kept::new(Stream::Tcp(stream), self.relay.write_timeout);
                self.tracker.spawn(async move {
                    if let Some((request, length)) = downstream::whole_handshake(&early, &this.downstream) {
                        let asked = Asked { request, header: early.slice(..length), early: early.slice(length..) };
                        this.shake_hands(stream, asked, peer, stay, pass).await;
                    } else {
                        Box::pin(this.serve(stream.rewind(early), peer, stay, pass)).await;
                    }
                });
            }
            Err(error) => lost(peer, &error),
        }
    }

    /// Answers the first request with a 503, whatever it is, and ends the connection.
    async fn turn_away(self: Arc<Self>, stream: TcpStream, client: SocketAddr, mut stay: Stay, reason: Reason) {
        // A loop that only finds its queue empty holds a place for a moment: by now it may be free.
        if !stay.place.is_last_resort()
            && let Some(place) = self.admission.enter().filter(|place| place.refused.is_none())
        {
            stay.place = place;
            self.wait(stream, client, stay).await;
            return;
        }
        self.refuse_for(reason, client);
        // Others wait for its place: it gets the time that a socket gets without progress.
        let header_timeout = self.downstream.header_timeout.min(self.close.linger);
        let stream = Kept::new(Stream::Tcp(stream), self.close.linger);
        let (stream, _) = self.answer_and_end(stream, client, header_timeout, self.refusal(reason)).await;
        self.linger_for(Side::Client, stream, false, &self.short_linger()).await;
        drop(stay);
    }

    /// Gives the one answer that a connection gets, to whatever is asked; with whether that was done.
    async fn answer_and_end(
        &self,
        stream: Kept,
        client: SocketAddr,
        header_timeout: Duration,
        response: Response<Body>,
    ) -> (Stream, bool) {
        let response = Mutex::new(Some(last(response)));
        let service = hyper::service::service_fn(|_| {
            let response = lock(&response).take();
            async { response.ok_or("this connection has had its answer") }
        });
        let mut http = downstream::server(&self.downstream);
        http.header_read_timeout(header_timeout);
        let mut connection = http.serve_connection(TokioIo::new(stream), service);
        let mut hurried = pin!(self.drain.hurried());
        let served = tokio::select! {
            served = &mut connection => {
                served.inspect_err(|error| debug!(%client, %error, "client connection ended")).is_ok()
            }
            () = &mut hurried => false,
        };
        (connection.into_parts().io.into_inner().into_inner(), served)
    }

    /// Counts a client that gets a 503 of ours, and says so once in a while: in a spike there are thousands.
    fn refuse_for(&self, reason: Reason, client: SocketAddr) {
        static SAID: [Sparse; Reason::ALL.len()] = [const { Sparse::new() }; Reason::ALL.len()];
        self.traffic.refuse(reason);
        if let Some(unsaid) = SAID[reason as usize].is_due() {
            warn!(%client, reason = reason.as_str(), fix = reason.fix(), unsaid, "clients are turned away with 503");
        }
    }

    /// What a client is told for whom there is no room now.
    fn refusal(&self, reason: Reason) -> Response<Body> {
        answer_later(StatusCode::SERVICE_UNAVAILABLE, reason.told(), self.downstream.retry_after)
    }

    /// For who sends no request, or a broken one, or one that is refused: our answer and little of our time.
    fn short_linger(&self) -> close::Config {
        let short = |time: Duration| time.min(REFUSED_LINGER);
        close::Config { linger: short(self.close.linger), linger_max: short(self.close.linger_max) }
    }

    /// Waits for the first bytes of a request. This costs next to nothing; what follows does not.
    async fn wait(self: Arc<Self>, stream: TcpStream, client: SocketAddr, stay: Stay) {
        let patience = self.downstream.header_timeout;
        let is_silent = tokio::select! {
            readable = timeout(patience, stream.readable()) => readable.is_err(),
            // It was accepted, so its request may be on its way: an end now would be one without an answer.
            () = self.drain.begun() => timeout(patience.min(REFUSED_LINGER), stream.readable()).await.is_err(),
        };
        if is_silent {
            self.linger_for(Side::Client, Stream::Tcp(stream), false, &self.short_linger()).await;
            return;
        }
        // Whichever worker goes on with it registers it anew.
        match stream.into_std() {
            Ok(stream) => self.admit(Guest { stream, peer: client, stay }),
            Err(error) => lost(client, &error),
        }
    }

    /// A handshake as it should be. Only an answer that is no 101 is left to hyper.
    async fn shake_hands(
        self: Arc<Self>,
        mut stream: Kept,
        asked: Asked,
        client: SocketAddr,
        stay: Stay,
        pass: Option<Pass>,
    ) {
        let Asked { request, header, mut early } = asked;
        let stage = Mutex::new(Stage { next: Next::Plain, pass, is_asked: true });
        let response = {
            let mut answer = pin!(async {
                match self.handshakes.try_acquire() {
                    Ok(_slot) => self.in_time(client, &stage, self.upgrade(request, client, &stage)).await,
                    Err(_) => self.shed(Intent::WebSocket, client),
                }
            });
            let mut hurried = pin!(self.drain.hurried());
            // `None`: nobody waits for it any more.
            poll_fn(|cx| {
                if let Poll::Ready(response) = answer.as_mut().poll(cx) {
                    return Poll::Ready(Some(response));
                }
                // A client that sends more before the answer is not watched any longer, and its kernel keeps the rest.
                if early.is_empty()
                    && let Poll::Ready(read) = stream.poll_some(cx)
                {
                    match read {
                        Ok(bytes) if !bytes.is_empty() => early = bytes,
                        _ => return Poll::Ready(None),
                    }
                }
                hurried.as_mut().poll(cx).map(|()| None)
            })
            .await
        };
        let Stage { next, pass, .. } = stage.into_inner().unwrap_or_else(PoisonError::into_inner);
        // Also of one that was shed.
        drop(pass);
        match (next, response) {
            (Next::Tunnel(tunnel), Some(response)) => {
                let written = stream.write_all(&downstream::encode_switching(&response)).await;
                if let Err(error) = &written {
                    debug!(%client, %error, "client connection ended");
                }
                let stream = written.is_ok().then(|| stream.into_inner());
                self.begin_relay(Leg { stream, early }, tunnel, stay);
            }
            (_, Some(response)) => {
                let stream = stream.rewind(concat(header, early));
                let (stream, is_done) =
                    Box::pin(self.answer_and_end(stream, client, self.downstream.header_timeout, response)).await;
                let patience = if is_done { self.close } else { self.short_linger() };
                self.begin_linger(stream, patience, stay);
            }
            (_, None) => self.begin_linger(stream.into_inner(), self.short_linger(), stay),
        }
    }

    /// What follows a handshake runs in a task of its own: that of the handshake is larger.
    fn begin_relay(self: &Arc<Self>, client: Leg, tunnel: Box<Tunnel>, stay: Stay) {
        let this = Arc::clone(self);
        self.tracker.spawn(async move {
            this.gate.calm().await;
            this.relay(client, *tunnel, stay).await;
        });
    }

    /// The same for a connection that becomes no session.
    fn begin_linger(self: &Arc<Self>, stream: Stream, patience: close::Config, stay: Stay) {
        let this = Arc::clone(self);
        self.tracker.spawn(async move {
            this.linger_for(Side::Client, stream, false, &patience).await;
            drop(stay);
        });
    }

    /// The connection as long as it speaks HTTP.
    async fn serve(self: Arc<Self>, stream: Kept, client: SocketAddr, stay: Stay, pass: Option<Pass>) {
        stream.writable().await;
        let stage = Arc::new(Mutex::new(Stage { next: Next::Plain, pass, is_asked: false }));
        let service = {
            let (this, shared) = (Arc::clone(&self), Arc::clone(&stage));
            let handle = tower::service_fn(move |(request, intent)| {
                let (this, stage) = (Arc::clone(&this), Arc::clone(&shared));
                async move { Ok::<_, Infallible>(this.handle(request, intent, client, &stage).await) }
            });
            let limited = |slots: &Arc<Semaphore>| {
                let limit = GlobalConcurrencyLimitLayer::with_semaphore(Arc::clone(slots));
                ServiceBuilder::new().layer(LoadShedLayer::new()).layer(limit).service(handle.clone())
            };
            let (handshakes, requests) = (limited(&self.handshakes), limited(&self.requests));
            let (this, stage) = (Arc::clone(&self), Arc::clone(&stage));
            hyper::service::service_fn(move |request: Request<Incoming>| {
                lock(&stage).is_asked = true;
                let (this, stage, intent) = (Arc::clone(&this), Arc::clone(&stage), downstream::intent(&request));
                let stack = intent.map(|intent| match intent {
                    Intent::WebSocket => (intent, handshakes.clone()),
                    Intent::Plain => (intent, requests.clone()),
                });
                Box::pin(async move {
                    let response = match stack {
                        // The stack itself fails only when it sheds.
                        Ok((intent, stack)) => {
                            stack.oneshot((request, intent)).await.unwrap_or_else(|_| this.shed(intent, client))
                        }
                        Err(refusal) => this.refuse(client, &request, refusal),
                    };
                    // Also of those that were shed or refused.
                    lock(&stage).pass = None;
                    Ok::<_, Infallible>(response)
                })
            })
        };
        let io = TokioIo::new(stream);
        let mut connection = downstream::server(&self.downstream).serve_connection(io, service);
        let (mut begun, mut hurried) = (pin!(self.drain.begun()), pin!(self.drain.hurried()));
        let (mut draining, mut told) = (false, false);
        // Of a first request that comes in pieces: its deadline, and memory for them.
        let mut pieces: Option<(Pin<Box<Sleep>>, Option<Extra>)> = None;
        let mut is_first = true;
        // `None`: nobody waits for an answer any more, since a second signal came, or the first request did not in time.
        let served = poll_fn(|cx| {
            let mut result = Pin::new(&mut connection).poll(cx);
            if is_first && result.is_pending() {
                let mut stage = lock(&stage);
                is_first = !stage.is_asked;
                if is_first {
                    // Others need not wait for the rest.
                    stage.pass = None;
                    let memory = || self.admission.more_memory(self.downstream.header_bytes as u64);
                    let patience = self.downstream.header_timeout;
                    let (late, memory) = pieces.get_or_insert_with(|| (Box::pin(sleep(patience)), memory()));
                    if memory.is_none() {
                        self.refuse_for(Reason::Memory, client);
                    }
                    if memory.is_none() || late.as_mut().poll(cx).is_ready() {
                        return Poll::Ready(None);
                    }
                } else {
                    pieces = None;
                }
            }
            draining = draining || begun.as_mut().poll(cx).is_ready();
            // A handshake under way is finished: its session is then ended with a Close like the others. Looked at after the
            // connection, which may just have read a request, or answered one.
            if draining && !told && result.is_pending() && !matches!(lock(&stage).next, Next::Upgrading) {
                told = true;
                Pin::new(&mut connection).graceful_shutdown();
                result = Pin::new(&mut connection).poll(cx);
            }
            if result.is_pending() && hurried.as_mut().poll(cx).is_ready() {
                return Poll::Ready(None);
            }
            result.map(Some)
        })
        .await;
        let parts = connection.into_parts();
        let (stream, unread) = parts.io.into_inner().into_parts();
        let next = std::mem::replace(&mut lock(&stage).next, Next::Plain);
        match next {
            Next::Tunnel(tunnel) => {
                // When the 101 could not be written the client is gone; the backend must hear of it.
                let stream = matches!(served, Some(Ok(()))).then_some(stream);
                let client = Leg { stream, early: concat(parts.read_buf, unread) };
                self.begin_relay(client, tunnel, stay);
            }
            Next::Plain | Next::Upgrading => {
                let patience = if let Some(Ok(())) = served { self.close } else { self.short_linger() };
                if let Some(Err(error)) = served {
                    debug!(%client, %error, "client connection ended");
                }
                self.begin_linger(stream, patience, stay);
            }
        }
    }

    /// Answers one request.
    async fn handle(
        self: &Arc<Self>,
        request: Request<Incoming>,
        intent: Intent,
        client: SocketAddr,
        stage: &Mutex<Stage>,
    ) -> Response<Body> {
        match intent {
            Intent::Plain => {
                let response = self.in_time(client, stage, self.plain(request, client)).await;
                self.metrics.request(response.status().as_u16());
                response
            }
            Intent::WebSocket => self.in_time(client, stage, self.upgrade(request.map(|_| ()), client, stage)).await,
        }
    }

    /// An answer may be long in coming: then others have its turn, and there must be memory for it.
    async fn in_time(
        &self,
        client: SocketAddr,
        stage: &Mutex<Stage>,
        answer: impl Future<Output = Response<Body>>,
    ) -> Response<Body> {
        let mut answer = pin!(answer);
        let soon = timeout(STAY, &mut answer).await;
        lock(stage).pass = None;
        if let Ok(response) = soon {
            return response;
        }
        // Beyond those for which the budget has set memory aside.
        if let Some(_memory) = self.admission.more_memory(HANDSHAKE_BYTES) {
            return answer.await;
        }
        lock(stage).next = Next::Plain;
        self.refuse_for(Reason::Memory, client);
        last(self.refusal(Reason::Memory))
    }

    /// Carries a handshake out.
    async fn upgrade(
        self: &Arc<Self>,
        request: Request<()>,
        client: SocketAddr,
        stage: &Mutex<Stage>,
    ) -> Response<Body> {
        lock(stage).next = Next::Upgrading;
        let mut outcome = Outcome { metrics: &self.metrics, begun: Instant::now(), result: Handshake::Abandoned };
        let (result, response, tunnel) = self.websocket(request, client).await;
        outcome.result = result;
        drop(outcome);
        if let Some(tunnel) = tunnel {
            lock(stage).next = Next::Tunnel(Box::new(tunnel));
            response
        } else {
            lock(stage).next = Next::Plain;
            last(response)
        }
    }

    /// Says once in a process that somebody's `X-Forwarded-For` is not believed: it may be the user's own ingress.
    fn doubt(&self, client: IpAddr) {
        if !self.has_doubted.swap(true, Ordering::Relaxed) {
            warn!(%client, "X-Forwarded-* of a client that is not in http.trusted_proxies is replaced; said once");
        }
    }

    /// A request that the backend never sees.
    fn refuse<B>(&self, client: SocketAddr, request: &Request<B>, refusal: Refusal) -> Response<Body> {
        if request.headers().contains_key(UPGRADE) {
            self.metrics.handshake(Handshake::Invalid, Duration::ZERO);
        } else {
            self.metrics.request(refusal.status.as_u16());
        }
        debug!(%client, reason = refusal.reason, "request refused");
        let mut response = answer(refusal.status, refusal.reason);
        let headers = response.headers_mut();
        match refusal.status {
            StatusCode::UPGRADE_REQUIRED => {
                // "the server MUST ... include a |Sec-WebSocket-Version| header" (RFC 6455 4.2.2), and "MUST send
                // an Upgrade header field in a 426 response" (RFC 9110 15.5.22), which Connection must name.
                headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
                headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
                headers.insert(CONNECTION, HeaderValue::from_static("close, Upgrade"));
            }
            StatusCode::METHOD_NOT_ALLOWED => {
                headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"));
            }
            _ => {}
        }
        last(response)
    }

    /// A request too many.
    fn shed(&self, intent: Intent, client: SocketAddr) -> Response<Body> {
        self.refuse_for(Reason::MaxWaiting, client);
        let response = self.refusal(Reason::MaxWaiting);
        match intent {
            Intent::WebSocket => {
                self.metrics.handshake(Handshake::Shed, Duration::ZERO);
                last(response)
            }
            Intent::Plain => {
                self.metrics.request(response.status().as_u16());
                response
            }
        }
    }

    /// The handshake with the backend, and what the client is told of it.
    async fn websocket(
        self: &Arc<Self>,
        mut request: Request<()>,
        client: SocketAddr,
    ) -> (Handshake, Response<Body>, Option<Tunnel>) {
        match self.admission.pace() {
            Ok(Duration::ZERO) => {}
            Ok(delay) => sleep(delay).await,
            Err(reason) => {
                self.refuse_for(reason, client);
                return (Handshake::Shed, self.refusal(reason), None);
            }
        }
        let mut path = request.uri().path().to_owned();
        path.truncate(path.floor_char_boundary(256));
        let about = About { client, path, request_id: downstream::request_id(request.headers()) };
        let trusted = &self.downstream.trusted_proxies;
        if downstream::forward_request(&mut request, client.ip(), trusted, &about.request_id, true) {
            self.doubt(client.ip());
        }
        let exchange = self.upstream.websocket(request);
        match self.carried_out(exchange).await {
            Ok(Answer::Tunnel { stream, early, mut response }) => {
                downstream::forward_response(&mut response, true);
                let tunnel =
                    Tunnel { backend: Leg { stream: Some(stream), early }, rsv: rsv(response.headers()), about };
                (Handshake::Accepted, response.map(|()| empty()), Some(tunnel))
            }
            Ok(Answer::Refusal(reply)) => {
                let status = reply.response.status().as_u16();
                info!(%client, path = about.path, request_id = about.request_id, status, "the backend refused a handshake");
                (Handshake::Refused, self.pass_on(reply), None)
            }
            Err(error) => {
                let About { path, request_id, .. } = &about;
                self.complain(&error, client, Some(path), request_id);
                let result = match error {
                    Error::Unreachable { .. } => Handshake::Unreachable,
                    Error::Shortage { .. } | Error::QueueTimeout => Handshake::Shed,
                    Error::Timeout(_) => Handshake::Timeout,
                    Error::NoAnswer(_) | Error::BadAccept(_) => Handshake::BadBackend,
                    Error::Body(_) => Handshake::Invalid,
                };
                (result, self.blame(&error, client), None)
            }
        }
    }

    /// A request that is no upgrade, streamed both ways.
    async fn plain(self: &Arc<Self>, mut request: Request<Incoming>, client: SocketAddr) -> Response<Body> {
        let id = downstream::request_id(request.headers());
        if downstream::forward_request(&mut request, client.ip(), &self.downstream.trusted_proxies, &id, false) {
            self.doubt(client.ip());
        }
        // A request's body must come as its header must: whoever waits for it holds a place.
        let patience = self.upstream.config().body_timeout.min(self.downstream.header_timeout);
        let body = |body| TimedBody::new(body, patience).cleaning_trailers(downstream::drop_claims);
        let exchange = self.upstream.plain(request.map(body));
        match self.carried_out(exchange).await {
            Ok(reply) => self.pass_on(reply),
            Err(error) => {
                self.complain(&error, client, None, &id);
                self.blame(&error, client)
            }
        }
    }

    /// Waits for an exchange for as long as the client does; then it is ended behind our back.
    async fn carried_out<T: Orphan>(self: &Arc<Self>, exchange: Exchange<T>) -> Result<T, Error> {
        let guarded = Guarded { exchange: Some(exchange), context: Arc::clone(self) };
        guarded.await.map_err(|Failure { error, stream }| {
            if let Some(stream) = stream {
                self.tracker.spawn(Arc::clone(self).linger_owned(stream));
            }
            error
        })
    }

    /// Passes a backend's answer on; its connection is driven, and ended, by a task of its own.
    fn pass_on(self: &Arc<Self>, reply: Reply) -> Response<Body> {
        let Reply { mut response, connection } = reply;
        let this = Arc::clone(self);
        self.tracker.spawn(async move {
            if let Some(stream) = connection.await {
                // Its answer may have been cut short by a client that left: then it may go on writing for long.
                this.linger_left(stream, false).await;
            }
        });
        downstream::forward_response(&mut response, false);
        let patience = self.upstream.config().body_timeout;
        response.map(|body| TimedBody::new(body, patience).boxed())
    }

    /// Says what went wrong. Of each kind once in a while: when a backend is down there are as many as there are clients.
    fn complain(&self, error: &Error, client: SocketAddr, path: Option<&str>, request_id: &str) {
        static SAID: [Sparse; 5] = [const { Sparse::new() }; 5];
        let kind = match error {
            // Said as a client that is turned away, and here with its cause.
            Error::Shortage { .. } => 0,
            Error::QueueTimeout => return,
            Error::Unreachable { .. } => 1,
            Error::Timeout(_) => 2,
            Error::NoAnswer(_) | Error::BadAccept(_) => 3,
            Error::Body(_) => 4,
        };
        if let Some(unsaid) = SAID[kind].is_due() {
            let backend = &self.upstream.config().address;
            warn!(%client, path, request_id, %backend, %error, unsaid, "request failed");
        } else {
            debug!(%client, path, request_id, %error, "request failed");
        }
    }

    /// What a client is told when the backend gave no answer: no addresses, no system errors.
    fn blame(&self, error: &Error, client: SocketAddr) -> Response<Body> {
        let (status, reason) = match error {
            // Not its fault.
            Error::Body(_) => return answer(StatusCode::BAD_REQUEST, "the request's body did not arrive in full"),
            Error::Shortage { lack, .. } => {
                let reason = match lack {
                    Lack::Ports => Reason::Ports,
                    Lack::Descriptors => Reason::Descriptors,
                    Lack::Memory => Reason::Memory,
                };
                self.refuse_for(reason, client);
                return self.refusal(reason);
            }
            Error::QueueTimeout => {
                self.refuse_for(Reason::QueueTimeout, client);
                return self.refusal(Reason::QueueTimeout);
            }
            Error::Unreachable { .. } => (StatusCode::BAD_GATEWAY, "the backend is not reachable"),
            Error::Timeout(reason) => (StatusCode::GATEWAY_TIMEOUT, *reason),
            Error::NoAnswer(_) => (StatusCode::BAD_GATEWAY, "the backend gave no valid answer"),
            Error::BadAccept(reason) => (StatusCode::BAD_GATEWAY, *reason),
        };
        answer_later(status, reason, self.downstream.retry_after)
    }

    /// A session from its 101 to the FINs on both legs, and its log lines.
    async fn relay(self: Arc<Self>, client: Leg, tunnel: Tunnel, stay: Stay) {
        let Tunnel { backend, rsv, about } = tunnel;
        let mut open = Open::new(&self.metrics, about);
        let traffic = Arc::clone(&self.traffic);
        let mut relay = Relay::new(Arc::clone(&self.relay), traffic, self.drain.clone(), rsv, client, backend);
        let first = relay.next_ended().await;
        // Boxed: this state is needed for the last seconds of a session only.
        Box::pin(async {
            let rest = async {
                let second = relay.next_ended().await;
                let report = relay.report();
                self.count(&report);
                open.close(&report);
                drop(open);
                self.let_go(second).await;
            };
            tokio::join!(self.let_go(first), rest);
        })
        .await;
        drop(stay);
    }

    async fn let_go(&self, ended: Ended) {
        if let Some(stream) = ended.stream {
            self.linger(ended.side, stream, ended.is_done).await;
        }
    }

    async fn linger(&self, side: Side, stream: Stream, peer_is_done: bool) {
        self.linger_for(side, stream, peer_is_done, &self.close).await;
    }

    async fn linger_for(&self, side: Side, stream: Stream, peer_is_done: bool, patience: &close::Config) {
        let counted = Counted::new(&self.metrics.lingering);
        let how = match close::linger(stream, peer_is_done, patience).await {
            Lingered::Fin => "fin",
            Lingered::Acked => "acked",
            Lingered::Reset => "reset",
            Lingered::Expired => "expired",
        };
        drop(counted);
        self.metrics.lingered(side, how);
    }

    async fn linger_owned(self: Arc<Self>, stream: Stream) {
        self.linger_left(stream, false).await;
    }

    /// For a backend's socket whose client need not be there any more, and so has no place: of these there are only so many.
    async fn linger_left(&self, stream: Stream, peer_is_done: bool) {
        let slot = self.leftovers.try_acquire().ok();
        let mut patience = self.short_linger();
        if slot.is_none() {
            let short = |time: Duration| time.min(CROWDED_LINGER);
            patience = close::Config { linger: short(patience.linger), linger_max: short(patience.linger_max) };
        }
        self.linger_for(Side::Backend, stream, peer_is_done, &patience).await;
        drop(slot);
    }

    fn count(&self, report: &Report) {
        let clean = abnormal(report).next().is_none();
        self.metrics.close(initiator(report.initiator), report.code, clean, report.ending);
        for cause in abnormal(report) {
            self.metrics.abnormal(cause);
        }
        self.metrics.crossed_messages.inc_by(report.counts[Side::Client as usize].crossed);
    }
}

/// Counts a handshake when it is over, also when its client left and the future was dropped.
struct Outcome<'a> {
    metrics: &'a Metrics,
    begun: Instant,
    result: Handshake,
}

impl Drop for Outcome<'_> {
    fn drop(&mut self) {
        self.metrics.handshake(self.result, self.begun.elapsed());
    }
}

/// An exchange whose client may leave: what the backend has begun is then brought to an orderly end all the same.
struct Guarded<T: Orphan> {
    exchange: Option<Exchange<T>>,
    context: Arc<Context>,
}

impl<T: Orphan> Future for Guarded<T> {
    type Output = Result<T, Failure>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let exchange = self.exchange.as_mut().expect("a future is not polled after it is ready");
        let result = std::task::ready!(Pin::new(exchange).poll(cx));
        self.exchange = None;
        Poll::Ready(result)
    }
}

impl<T: Orphan> Drop for Guarded<T> {
    fn drop(&mut self) {
        let Some(exchange) = self.exchange.take().filter(Exchange::has_begun) else { return };
        let context = Arc::clone(&self.context);
        // Others may have its turn. How many are carried on is bounded apart; the rest gets its FIN at once.
        exchange.end_turn();
        let is_worth_waiting = T::IS_WORTH_WAITING && exchange.is_connected();
        let slot = if is_worth_waiting { Arc::clone(&context.orphans).try_acquire_owned().ok() } else { None };
        if slot.is_none() {
            exchange.give_up();
        }
        self.context.tracker.spawn(async move {
            match exchange.await {
                Ok(orphan) => orphan.end(context).await,
                Err(Failure { stream: Some(stream), .. }) => context.linger_left(stream, false).await,
                Err(Failure { stream: None, .. }) => {}
            }
            drop(slot);
        });
    }
}

/// What a backend gave to a client that is gone.
trait Orphan: Send + 'static {
    /// The backend's answer obliges us to something: a 101 to a Close.
    const IS_WORTH_WAITING: bool;

    /// Ends it in order.
    fn end(self, context: Arc<Context>) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

impl Orphan for Reply {
    const IS_WORTH_WAITING: bool = false;

    fn end(self, context: Arc<Context>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            drop(self.response);
            if let Some(stream) = self.connection.await {
                context.linger_left(stream, false).await;
            }
        })
    }
}

impl Orphan for Answer {
    const IS_WORTH_WAITING: bool = true;

    fn end(self, context: Arc<Context>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        match self {
            Self::Refusal(reply) => reply.end(context),
            Self::Tunnel { stream, early, response } => Box::pin(async move {
                // A session whose client was reset: the backend gets its Close, and time to answer it.
                let client = Leg { stream: None, early: Bytes::new() };
                let backend = Leg { stream: Some(stream), early };
                let (config, traffic) = (Arc::clone(&context.relay), Arc::clone(&context.traffic));
                let rsv = rsv(response.headers());
                let mut relay = Relay::new(config, traffic, context.drain.clone(), rsv, client, backend);
                for _ in Side::BOTH {
                    let ended = relay.next_ended().await;
                    context.let_go(ended).await;
                }
            }),
        }
    }
}

fn lost(client: SocketAddr, error: &io::Error) {
    static SAID: Sparse = Sparse::new();
    if let Some(unsaid) = SAID.is_due() {
        let fix = "raise fs.epoll.max_user_watches, or the memory limit";
        warn!(%client, %error, fix, unsaid, "cannot watch a client's socket: it is closed without an answer");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Nothing under these locks can panic half-way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes it the last response of its connection: behind a handshake that failed, what the client has sent already may be
/// the frames of the tunnel that it hoped for, and must not be read as requests.
fn last(mut response: Response<Body>) -> Response<Body> {
    response.headers_mut().entry(CONNECTION).or_insert(HeaderValue::from_static("close"));
    response
}

fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed()
}

/// Which reserved bits the extensions of a 101 allow.
fn rsv(headers: &HeaderMap) -> Rsv {
    let mut rsv = Rsv::None;
    for extension in tokens(headers, &SEC_WEBSOCKET_EXTENSIONS) {
        let name = extension.split(';').next().unwrap_or_default().trim();
        match name {
            "" => {}
            "permessage-deflate" => rsv = Rsv::Deflate,
            _ => return Rsv::Any,
        }
    }
    rsv
}

const fn initiator(initiator: Initiator) -> &'static str {
    match initiator {
        Initiator::Client => "client",
        Initiator::Backend => "backend",
        Initiator::Tidegate => "tidegate",
    }
}

/// The causes for which a session counts as abnormal, of `metrics::ABNORMAL`.
fn abnormal(report: &Report) -> impl Iterator<Item = &'static str> + '_ {
    let sides = Side::BOTH.into_iter().filter_map(|side| {
        let index = side as usize;
        let unanswered = report.told[index] && !report.heard[index];
        let [fin, reset, silent, stalled, violation, no_answer] = match side {
            Side::Client => [
                "client_fin",
                "client_reset",
                "client_silent",
                "client_stalled",
                "client_violation",
                "client_no_answer",
            ],
            Side::Backend => [
                "backend_fin",
                "backend_reset",
                "backend_silent",
                "backend_stalled",
                "backend_violation",
                "backend_no_answer",
            ],
        };
        // How it left is told by its first sign: a RST for our data after its Close and FIN is normal.
        let first = match report.cause {
            Cause::Gone(gone, how) if gone == side => Some(how),
            _ => None,
        };
        match first.or(report.gone[index]) {
            Some(Gone::Silent) => Some(silent),
            Some(Gone::Stalled) => Some(stalled),
            Some(Gone::Broke(_)) => Some(violation),
            Some(Gone::Reset) if first.is_some() => Some(reset),
            Some(Gone::Fin) if first.is_some() => Some(fin),
            _ if unanswered => Some(no_answer),
            _ => None,
        }
    });
    sides.chain((report.cut != [false; 2]).then_some("cut_inside_frame"))
}

/// A session between its two log lines. Dropped without a report it was cut: by the end of the drain, or by a panic.
struct Open<'a> {
    about: About,
    begun: Instant,
    metrics: &'a Metrics,
    is_closed: bool,
    _counted: Counted,
}

impl<'a> Open<'a> {
    fn new(metrics: &'a Metrics, about: About) -> Self {
        let About { client, path, request_id } = &about;
        info!(%client, path, request_id, "open");
        let counted = Counted::new(&metrics.sessions);
        Self { about, begun: Instant::now(), metrics, is_closed: false, _counted: counted }
    }

    fn close(&mut self, report: &Report) {
        self.is_closed = true;
        let [from_client, from_backend] = report.counts;
        let [client_sent, backend_sent] = report.sent;
        let [client_got, backend_got] = report.got;
        let causes = abnormal(report).collect::<Vec<_>>().join(",");
        let why = match report.cause {
            Cause::Gone(side, Gone::Broke(violation)) => format!("{}: {violation}", side.as_str()),
            Cause::Drain => "drain".to_owned(),
            _ => String::new(),
        };
        info!(
            client = %self.about.client,
            path = self.about.path,
            request_id = self.about.request_id,
            initiator = initiator(report.initiator),
            code = report.code,
            reason = %report.reason.escape_debug(),
            client_sent,
            client_got,
            backend_sent,
            backend_got,
            clean = causes.is_empty(),
            abnormal = causes,
            why,
            duration_ms = millis(self.begun.elapsed()),
            ending_ms = millis(report.ending),
            messages_from_client = from_client.messages,
            messages_from_backend = from_backend.messages,
            bytes_from_client = from_client.bytes,
            bytes_from_backend = from_backend.bytes,
            crossed = from_client.crossed,
            "close"
        );
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if self.is_closed {
            return;
        }
        let (cause, why) = if std::thread::panicking() {
            ("panic", "a bug in tidegate: please report it")
        } else {
            ("drain_cut", "drain.timeout was over")
        };
        self.metrics.close("tidegate", None, false, Duration::ZERO);
        self.metrics.abnormal(cause);
        let About { client, path, request_id } = &self.about;
        let duration_ms = millis(self.begun.elapsed());
        warn!(%client, path, request_id, initiator = "tidegate", clean = false, abnormal = cause, why, duration_ms, "close");
    }
}

/// A number for the log.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
