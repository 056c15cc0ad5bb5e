//! A client's connection as long as it speaks HTTP: its requests, and the handshake that ends that.

use std::{
    convert::Infallible,
    error::Error as _,
    fmt,
    future::{Future, poll_fn},
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{Arc, Mutex, PoisonError},
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderValue, Request, Response, StatusCode,
    header::{SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_EXTENSIONS, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL},
};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::{
    io::AsyncWriteExt,
    sync::Semaphore,
    time::{Instant, Sleep, sleep, sleep_until, timeout},
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tower::{ServiceBuilder, ServiceExt, limit::GlobalConcurrencyLimitLayer, load_shed::LoadShedLayer};
use tracing::{debug, field::display, info, warn};

use super::{
    About, Context, Tunnel,
    answer::{complain, last, refuse_origin, say_unasked, status_of},
    secure::Client,
};
use crate::{
    admission::{Extra, Reason},
    close::Keeps,
    downstream::{self, Body, BoxError, Intent, Opening, TimedBody, Whole, answer_later},
    fields::{Header, Switching, tokens},
    gate::{HANDSHAKE_BYTES, PROMPT, Permit},
    hub::{Fault, Joined, Refusal, Refused},
    listen::Accounting,
    metrics::{Handshake, Metrics},
    net::{Kept, Stream, concat, is_too_slow},
    relay::Leg,
    side::Side,
    sparse::Sparse,
    upstream::{Answer, At, Error, Mode, Placed, Reply, Seat, Way},
    ws::Rsv,
};

/// That a backend refuses a handshake is said once in a while: whoever has no right to one may ask a thousand times.
static REFUSED: Sparse = Sparse::new();
static UNAUTHORIZED: Sparse = Sparse::new();

/// What is said then: of a handshake of its client's own or of many, and of one that is only shown.
const REFUSED_TO_OPEN: (&Sparse, &str) = (&REFUSED, "the backend refused a handshake");
const REFUSED_TO_JOIN: (&Sparse, &str) =
    (&UNAUTHORIZED, "the backend refused a client that was to join a shared WebSocket (pool.authorize)");

/// A WebSocket handshake that was there as a whole when its connection was begun with.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) handshake: Whole,
    /// What came behind it.
    pub(super) early: Bytes,
}

impl About {
    fn new(client: &Client, path: &str, header: &impl Header, route: &Arc<str>) -> Self {
        Self {
            client: client.clone(),
            path: told(path),
            request_id: downstream::request_id(header),
            trace_id: downstream::trace_id(header).map(Box::new),
            route: Arc::clone(route),
            shared: None,
        }
    }
}

/// Of a path, what is told of it: at most 256 bytes, and nothing that a terminal or a log would obey.
fn told(path: &str) -> Box<str> {
    let path = &path[..path.floor_char_boundary(256)];
    if path.bytes().all(|byte| byte.is_ascii_graphic()) { path.into() } else { path.escape_debug().to_string().into() }
}

/// A client's connection as long as it speaks HTTP.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) next: Next,
    /// Until its first request is answered, or turns out to be long in coming.
    pub(super) permit: Option<Permit>,
    /// A request is here.
    is_asked: bool,
    /// That of the last plain request.
    route: Option<Arc<str>>,
}

impl Stage {
    /// A request is here.
    pub(super) const fn new(permit: Option<Permit>) -> Self {
        Self { next: Next::Plain, permit, is_asked: true, route: None }
    }
}

/// What becomes of it.
#[derive(Debug)]
pub(super) enum Next {
    /// Requests and answers.
    Plain,
    /// A WebSocket handshake is under way.
    Upgrading,
    /// The 101 is on its way to the client.
    Tunnel(Box<Tunnel>),
}

impl Context {
    /// Gives the one answer that a connection gets, to whatever is asked; with whether that was done.
    pub(super) async fn answer_and_end(
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
        let mut hurried = pin!(self.relay.drain.hurried());
        let served = tokio::select! {
            served = &mut connection => {
                served.inspect_err(|error| debug!(%client, %error, "client connection ended")).is_ok()
            }
            () = &mut hurried => false,
        };
        (connection.into_parts().io.into_inner().into_inner(), served)
    }

    /// A handshake as it should be. Only an answer that is no 101 is left to hyper.
    pub(super) async fn shake_hands(
        self: Arc<Self>,
        mut stream: Kept,
        asked: Asked,
        client: Client,
        accounting: Accounting,
        permit: Option<Permit>,
    ) {
        let Asked { handshake, mut early } = asked;
        let stage = Mutex::new(Stage::new(permit));
        let response = {
            let mut answer = pin!(async {
                match self.handshakes.try_acquire() {
                    Ok(_slot) => {
                        let answer = pin!(self.upgrade(&handshake, &client, &stage));
                        self.in_time(client.address, &stage, answer).await
                    }
                    Err(_) => self.shed(Intent::WebSocket, client.address),
                }
            });
            let mut hurried = pin!(self.relay.drain.hurried());
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
        let Stage { next, permit, .. } = stage.into_inner().unwrap_or_else(PoisonError::into_inner);
        // Also of one that was shed.
        drop(permit);
        match (next, response) {
            (Next::Tunnel(mut tunnel), Some(response)) => {
                if tunnel.written.is_empty() {
                    tunnel.written = downstream::encode_switching(&response);
                }
                let written = stream.write_all(&tunnel.written).await;
                if let Err(error) = &written {
                    debug!(%client, %error, "client connection ended");
                }
                self.begin_session(stream.into_inner(), early, written.is_ok(), tunnel, accounting);
            }
            (_, Some(response)) => {
                let stream = stream.rewind(concat(handshake.into_bytes(), early));
                let (stream, is_done) =
                    Box::pin(self.answer_and_end(stream, client.address, self.downstream.header_timeout, response))
                        .await;
                let patience = if is_done { self.close } else { self.short_linger() };
                self.linger(stream, &patience, accounting);
            }
            (_, None) => self.linger(stream.into_inner(), &self.short_linger(), accounting),
        }
    }

    /// The connection as long as it speaks HTTP. `deadline` is that of its first header, when it has begun before.
    pub(super) async fn serve(
        self: Arc<Self>,
        stream: Kept,
        client: Client,
        accounting: Accounting,
        permit: Option<Permit>,
        deadline: Option<Instant>,
    ) {
        stream.writable().await;
        // An answer must be taken as a request must come: whoever takes it holds a place.
        let stream = stream.at_pace(self.downstream.body_rate, self.downstream.header_timeout);
        let stage = Arc::new(Mutex::new(Stage { next: Next::Plain, permit, is_asked: false, route: None }));
        let service = {
            let (this, shared, whose) = (Arc::clone(&self), Arc::clone(&stage), client.clone());
            let handle = tower::service_fn(move |(request, intent)| {
                // A connection that is kept alive may outlive many reloads.
                let (this, stage, client) = (this.latest(), Arc::clone(&shared), whose.clone());
                async move { Ok::<_, Infallible>(this.handle(request, intent, &client, &stage).await) }
            });
            let limited = |slots: &Arc<Semaphore>| {
                let limit = GlobalConcurrencyLimitLayer::with_semaphore(Arc::clone(slots));
                ServiceBuilder::new().layer(LoadShedLayer::new()).layer(limit).service(handle.clone())
            };
            let (handshakes, requests) = (limited(&self.handshakes), limited(&self.requests));
            let (this, stage, client) = (Arc::clone(&self), Arc::clone(&stage), client.address);
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
                    lock(&stage).permit = None;
                    Ok::<_, Infallible>(response)
                })
            })
        };
        let io = TokioIo::new(stream);
        let mut connection = downstream::server(&self.downstream).serve_connection(io, service);
        let (mut begun, mut hurried) = (pin!(self.relay.drain.begun()), pin!(self.relay.drain.hurried()));
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
                    stage.permit = None;
                    let memory = || self.admission.more_memory(self.downstream.header_bytes as u64);
                    let late = || deadline.unwrap_or_else(|| Instant::now() + self.downstream.header_timeout);
                    let (late, memory) = pieces.get_or_insert_with(|| (Box::pin(sleep_until(late())), memory()));
                    if memory.is_none() {
                        self.refuse_for(Reason::Memory, client.address);
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
                let is_told = matches!(served, Some(Ok(())));
                self.latest().begin_session(stream, concat(parts.read_buf, unread), is_told, tunnel, accounting);
            }
            Next::Plain | Next::Upgrading => {
                let patience = if let Some(Ok(())) = served { self.close } else { self.short_linger() };
                if let Some(Err(error)) = served {
                    let io = error.source().and_then(|error| error.downcast_ref());
                    say_ended(&client, lock(&stage).route.as_deref(), io, &error);
                }
                self.linger(stream, &patience, accounting);
            }
        }
    }

    /// After a 101. Where that could not be written in full the client can't be a part of it, and the backend must hear of it.
    pub(super) fn begin_session(
        self: &Arc<Self>,
        stream: Stream,
        early: Bytes,
        is_told: bool,
        tunnel: Box<Tunnel>,
        mut accounting: Accounting,
    ) {
        let mut client = Leg { stream: Some(stream), early };
        if !is_told && let Some(stream) = client.stream.take() {
            let keeps = accounting.place.split().map_or(Keeps::Nothing, Keeps::Place);
            self.linger.add(Side::Client, stream, false, &self.short_linger(), keeps);
        }
        self.begin_relay(client, tunnel, accounting);
    }

    /// Answers one request.
    async fn handle(
        self: &Arc<Self>,
        request: Request<Incoming>,
        intent: Intent,
        client: &Client,
        stage: &Mutex<Stage>,
    ) -> Response<Body> {
        match intent {
            Intent::Plain => {
                let answer = pin!(self.plain(request, client, stage));
                let response = self.in_time(client.address, stage, answer).await;
                self.metrics.request(response.status().as_u16());
                response
            }
            Intent::WebSocket => {
                let answer = pin!(self.upgrade(request.map(|_| ()), client, stage));
                self.in_time(client.address, stage, answer).await
            }
        }
    }

    /// An answer may be long in coming: then others have its turn, and there must be memory for it. It is pinned by the caller, or this future
    /// would have room for it twice.
    pub(super) async fn in_time(
        &self,
        client: SocketAddr,
        stage: &Mutex<Stage>,
        mut answer: Pin<&mut impl Future<Output = Response<Body>>>,
    ) -> Response<Body> {
        let soon = timeout(PROMPT, answer.as_mut()).await;
        lock(stage).permit = None;
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
    pub(super) async fn upgrade(
        self: &Arc<Self>,
        opening: impl Opening,
        client: &Client,
        stage: &Mutex<Stage>,
    ) -> Response<Body> {
        lock(stage).next = Next::Upgrading;
        let mut outcome = Outcome { metrics: &self.metrics, begun: Instant::now(), result: Handshake::Abandoned };
        let (result, response, tunnel) = self.websocket(opening, client).await;
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

    /// The handshake with the backend, and what the client is told of it.
    async fn websocket<O: Opening>(
        self: &Arc<Self>,
        opening: O,
        client: &Client,
    ) -> (Handshake, Response<Body>, Option<Tunnel>) {
        if !downstream::is_allowed(&opening, &self.downstream.allowed_origins) {
            return (Handshake::Origin, refuse_origin(client.address, &opening), None);
        }
        if let Some(response) = self.refuse_pace(client, &opening) {
            return (Handshake::Shed, response, None);
        }
        match self.admission.pace() {
            Ok(Duration::ZERO) => {}
            Ok(delay) => sleep(delay).await,
            Err(reason) => {
                self.refuse_for(reason, client.address);
                return (Handshake::Shed, self.refusal(reason), None);
            }
        }
        let path = opening.target().path();
        let way = match self.upstreams.choose(path) {
            Ok(way) => way,
            Err(ambiguous) => return (Handshake::Invalid, self.refuse_path(client.address, path, &ambiguous), None),
        };
        if let Some(response) = self.refuse_address(client, &opening, way) {
            return (Handshake::Denied, response, None);
        }
        let Way { route, upstream, seats } = way;
        let Some(seat) = seats.take(upstream.config().rules.max_sessions) else {
            return (Handshake::Shed, self.refuse_session(client, route), None);
        };
        let about = About::new(client, path, &opening, route);
        let (secured, trusted) = (client.secured.as_deref(), &self.downstream.trusted_proxies);
        let (ask, was_doubted) = opening.forward(client.ip(), secured, trusted, &about.request_id);
        if was_doubted {
            self.doubt(client.ip());
        }
        if upstream.config().pool.mode == Mode::Shared {
            // Boxed, as all that most handshakes do not come to: each has room for the largest of its steps.
            return Box::pin(self.join(ask.request().into_owned(), about, seat)).await;
        }
        let exchange = upstream.websocket(ask, &self.home);
        let at = exchange.at();
        match self.carried_out(exchange).await {
            Ok(Placed { what: Answer::Tunnel { stream, early, head }, load }) => {
                let backend = Leg { stream: Some(stream), early };
                let (endpoint, load) = (Arc::clone(load.endpoint()), Some(load));
                let mut response = Response::new(empty());
                *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
                let (written, rsv) = match head {
                    Switching::Lines(lines) if O::IS_WHOLE => (downstream::forward_switching(&lines), rsv_of(&lines)),
                    head => {
                        *response.headers_mut() = head.into_map();
                        downstream::forward_response(&mut response, true);
                        (Vec::new(), rsv_of(response.headers()))
                    }
                };
                let tunnel = Tunnel { backend, load, endpoint, rsv, about, seat, written };
                (Handshake::Accepted, response, Some(tunnel))
            }
            Ok(Placed { what: Answer::Refusal(reply), load }) => {
                let status = reply.response.status().as_u16();
                say_refused(&about, load.endpoint(), status, REFUSED_TO_OPEN);
                (Handshake::Refused, self.pass_on(Placed { what: reply, load }, upstream.config().body_timeout), None)
            }
            Err(error) => self.fail(&error, &about, &at),
        }
    }

    /// What becomes of a handshake to which the backend gave no answer.
    fn fail(&self, error: &Error, about: &About, at: &At) -> (Handshake, Response<Body>, Option<Tunnel>) {
        complain(error, about, at);
        (result_of(error), self.blame(error, about.client.address, &about.route, at), None)
    }

    /// A handshake where those who are alike share one WebSocket. Of the backend's 101 a client gets what is for all of them.
    async fn join(
        self: &Arc<Self>,
        request: Request<()>,
        mut about: About,
        seat: Seat,
    ) -> (Handshake, Response<Body>, Option<Tunnel>) {
        let key = request.headers().get(SEC_WEBSOCKET_KEY).map(|key| key.as_bytes().to_owned()).unwrap_or_default();
        let client = about.client.address;
        let shed = |reason, endpoint| {
            self.refuse_at(reason, client, Some((&about.route, &At::of(endpoint))));
            (Handshake::Shed, self.refusal(reason), None)
        };
        match self.hubs.join(&about.route, request, &self.home, &self.relay.traffic, &self.admission).await {
            Ok(Joined { leg, protocol, endpoint, known }) => {
                about.shared = Some(known);
                let mut response = Response::new(empty());
                *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
                let headers = response.headers_mut();
                if let Ok(accept) = HeaderValue::from_str(&derive_accept_key(&key)) {
                    headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
                }
                if let Some(protocol) = protocol {
                    headers.insert(SEC_WEBSOCKET_PROTOCOL, protocol);
                }
                downstream::forward_response(&mut response, true);
                let backend = Leg { stream: Some(leg), early: Bytes::new() };
                let (load, rsv, written) = (None, Rsv::None, Vec::new());
                let tunnel = Tunnel { backend, load, endpoint, rsv, about, seat, written };
                (Handshake::Accepted, response, Some(tunnel))
            }
            Err(Refusal::Backend(Fault::Refused(refused))) => {
                say_refused(&about, &refused.endpoint, refused.status.as_u16(), REFUSED_TO_OPEN);
                (Handshake::Refused, told_of(&refused), None)
            }
            Err(Refusal::Probe(Fault::Refused(refused))) => {
                say_refused(&about, &refused.endpoint, refused.status.as_u16(), REFUSED_TO_JOIN);
                (Handshake::Unauthorized, told_of(&refused), None)
            }
            Err(Refusal::Backend(Fault::Upstream { error, endpoint })) => self.fail(&error, &about, &At::of(endpoint)),
            Err(Refusal::Probe(Fault::Upstream { error, endpoint })) => match result_of(&error) {
                Handshake::Shed => shed(Reason::Authorize, endpoint),
                result => {
                    say_unasked(&error, &about, &At::of(endpoint));
                    let status = status_of(&error);
                    let response = answer_later(
                        status,
                        "the backend could not be asked who may join",
                        self.downstream.retry_after,
                    );
                    (result, response, None)
                }
            },
            Err(Refusal::Keys) => shed(Reason::PoolKeys, None),
            Err(Refusal::Busy) => shed(Reason::QueueTimeout, None),
            Err(Refusal::Probes) => shed(Reason::Authorize, None),
            Err(Refusal::Closing) => {
                let what = "the server is going away";
                let response = answer_later(StatusCode::SERVICE_UNAVAILABLE, what, self.downstream.retry_after);
                (Handshake::Shed, response, None)
            }
        }
    }

    /// A request that is no upgrade, streamed both ways.
    pub(super) async fn plain<B>(
        self: &Arc<Self>,
        mut request: Request<B>,
        client: &Client,
        stage: &Mutex<Stage>,
    ) -> Response<Body>
    where
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        let path = request.uri().path();
        let way = match self.upstreams.choose(path) {
            Ok(way) => way,
            Err(ambiguous) => return self.refuse_path(client.address, path, &ambiguous),
        };
        if let Some(response) = self.refuse_address(client, request.headers(), way) {
            return response;
        }
        let Way { route, upstream, .. } = way;
        lock(stage).route = Some(Arc::clone(route));
        let about = About::new(client, path, request.headers(), route);
        let (secured, trusted) = (client.secured.as_deref(), &self.downstream.trusted_proxies);
        if downstream::forward_request(&mut request, client.ip(), secured, trusted, &about.request_id, false) {
            self.doubt(client.ip());
        }
        let body_timeout = upstream.config().body_timeout;
        // A request's body must come as its header must: whoever waits for it holds a place.
        let patience = body_timeout.min(self.downstream.header_timeout);
        let rate = self.downstream.body_rate;
        let body = |body| TimedBody::new(body, patience).at_pace(rate).cleaning_trailers(downstream::drop_claims);
        let exchange = upstream.plain(request.map(body), &self.home);
        let at = exchange.at();
        match self.carried_out(exchange).await {
            Ok(reply) => self.pass_on(reply, body_timeout),
            Err(error) => {
                complain(&error, &about, &at);
                self.blame(&error, client.address, &about.route, &at)
            }
        }
    }

    /// Passes a backend's answer on; its connection is driven, and ended, by a task of its own.
    fn pass_on(self: &Arc<Self>, reply: Placed<Reply>, patience: Duration) -> Response<Body> {
        let Placed { what: Reply { mut response, connection }, load } = reply;
        let this = Arc::clone(self);
        let endpoint = Arc::clone(load.endpoint());
        self.tracker.spawn(async move {
            if let Some(stream) = connection.await {
                // Its answer may have been cut short by a client that left: then it may go on writing for long.
                this.linger_left(Side::Backend, stream);
            }
            drop(load);
        });
        if !downstream::is_length_clear(response.headers()) {
            return self.refuse_length(&endpoint);
        }
        downstream::forward_response(&mut response, false);
        response.map(|body| TimedBody::new(body, patience).boxed())
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

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Nothing under these locks can panic half-way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed()
}

/// A client's connection came to an end that was none in order. Who takes too slowly what he is sent may be one of thousands who do so on purpose.
pub(super) fn say_ended(client: &Client, route: Option<&str>, io: Option<&io::Error>, error: &dyn fmt::Display) {
    static SLOW: Sparse = Sparse::new();
    if io.is_some_and(is_too_slow)
        && let Some(unsaid) = SLOW.is_due()
    {
        let fix = "http.body_rate is what it has to take in a second, over HTTP/2 anything at all within websocket.write_timeout; many at once may be \
                   an attack";
        warn!(%client, route, fix, unsaid, "a client takes its answer too slowly: its connection is ended");
    } else {
        debug!(%client, route, %error, "client connection ended");
    }
}

/// Of a handshake to which the backend gave no answer.
fn result_of(error: &Error) -> Handshake {
    match error {
        Error::Unreachable { .. } => Handshake::Unreachable,
        Error::Shortage { .. } | Error::QueueTimeout | Error::PoolFull => Handshake::Shed,
        Error::Timeout(_) => Handshake::Timeout,
        Error::Tls { .. } | Error::NoAnswer(_) | Error::NoStream(_) | Error::BadAccept(_) => Handshake::BadBackend,
        Error::Busy => Handshake::Refused,
        Error::Body(_) => Handshake::Invalid,
    }
}

/// What a backend said to one handshake for many.
fn told_of(refused: &Refused) -> Response<Body> {
    let Refused { status, headers, body, .. } = refused;
    let mut response = Response::new(Full::new(body.clone()).map_err(|never| match never {}).boxed());
    (*response.status_mut(), *response.headers_mut()) = (*status, headers.clone());
    downstream::forward_response(&mut response, false);
    response
}

fn say_refused(about: &About, endpoint: &str, status: u16, (said, what): (&Sparse, &str)) {
    let About { client, path, request_id, trace_id, route, .. } = about;
    let trace_id = trace_id.as_ref().map(display);
    if let Some(unsaid) = said.is_due() {
        info!(%client, path, request_id, trace_id, %route, endpoint, status, unsaid, "{what}");
    } else {
        debug!(%client, path, request_id, trace_id, %route, endpoint, status, "{what}");
    }
}

/// Which reserved bits the extensions of a 101 allow.
pub(super) fn rsv(head: &Switching) -> Rsv {
    match head {
        Switching::Lines(lines) => rsv_of(lines),
        Switching::Map(headers) => rsv_of(headers),
    }
}

fn rsv_of(header: &impl Header) -> Rsv {
    let mut rsv = Rsv::None;
    for extension in tokens(header, &SEC_WEBSOCKET_EXTENSIONS) {
        let name = extension.split(';').next().unwrap_or_default().trim();
        match name {
            "" => {}
            "permessage-deflate" => rsv = Rsv::Deflate,
            _ => return Rsv::Any,
        }
    }
    rsv
}
