//! The admin listener: the live page, `/livez`, `/readyz`, `/metrics`, `/status`, `/connections`, the drain, and the reload.
//!
//! It runs on a thread of its own, so a busy worker does not delay a probe. GET changes nothing. POST does, and is taken only
//! from loopback addresses or with the token of `admin.token_file`, and not from web pages: whoever can reach the port from elsewhere can look, and
//! nothing else.

mod connections;
mod control;
mod live;

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Mutex, OwnedSemaphorePermit, Semaphore, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, info, warn};

pub use self::control::{Control, Order, Reloaded};
use self::live::Live;
use crate::{
    close::{Keeps, Linger, Patience},
    config::Settings,
    drain::Phase,
    hub::Hubs,
    metrics::Metrics,
    net::{Kept, Stream},
    session::Roster,
    side::Side,
    sparse::Sparse,
    upstream::{self, EndpointState, Upstreams},
};

/// Connections at once, from other hosts and from this one; a further one is closed. They are short: one request each. Nobody elsewhere can
/// keep out who is here: the hooks of a Pod.
const MAX_CONNECTIONS: [usize; 2] = [192, 64];

/// For a request's header, and for a connection as a whole: a dial of the backend may be part of it.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(15);

/// The backend is dialled at most this often, however many ask.
const READINESS_AGE: Duration = Duration::from_secs(5);

/// `/drain/wait`: those that may wait at once, of this host and of others, and how long it waits for a drain to begin. A backend's preStop hook
/// asks it, also when only the backend is restarted. An `httpGet` hook comes from the node, and so from elsewhere.
const MAX_WAITING: usize = 64;
const NO_DRAIN: Duration = Duration::from_secs(3);

/// Answers of megabytes that are made or under way at once, for this host and for others: they are in nobody's budget.
const MAX_LARGE: usize = 4;

/// That are listed: a name may have hundreds.
const MAX_ENDPOINTS: usize = 64;

/// The same of WebSockets that clients share: there may be one for each client.
const MAX_WEBSOCKETS: usize = 64;

/// Said once in a while.
static REFUSED: Sparse = Sparse::new();

/// For the backend's side of the end of a look at it, and for who is not served.
const BRIEF: Patience = Patience { linger: Duration::from_millis(200), linger_max: Duration::from_millis(200) };

/// See the module.
#[derive(Debug)]
pub struct Admin {
    metrics: Arc<Metrics>,
    parts: watch::Receiver<Parts>,
    /// Of each worker.
    rosters: Vec<Arc<Roster>>,
    control: Control,
    linger: Linger,
    waiting: [Semaphore; 2],
    /// See [`MAX_LARGE`].
    large: [Arc<Semaphore>; 2],
    live: Arc<Live>,
    /// What came of the last dial of a backend.
    readiness: Mutex<Option<Dialled>>,
    tracker: TaskTracker,
}

/// What a reload may replace.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The ways to backends.
    pub upstreams: Upstreams,
    /// The WebSockets to them that clients share.
    pub hubs: Hubs,
    /// The last wait of a socket.
    pub close: Patience,
    /// What runs.
    pub settings: Arc<Settings>,
    /// Where clients connect.
    pub address: SocketAddr,
    /// Descriptors that were open when the process began; not known everywhere.
    pub inherited: Option<u64>,
}

#[derive(Debug)]
struct Dialled {
    upstreams: Upstreams,
    at: Instant,
    result: Result<(), String>,
}

/// What `/status` says.
#[derive(Debug, Serialize)]
struct Status {
    version: &'static str,
    /// It changes with a restart.
    pid: u32,
    /// `running`, `delay`, `window`, `lingering` or `drained`.
    phase: &'static str,
    /// Since when, and for how long at most.
    phase_ms: u64,
    phase_left_ms: Option<u64>,
    /// Whether new clients should be sent here, as far as a drain goes.
    accepts: bool,
    /// WebSocket sessions.
    sessions: i64,
    /// Connections of clients, sessions among them.
    connections: i64,
    /// Sockets after our FIN.
    lingering: i64,
    /// So many of them, those that take no connections first.
    endpoints: Vec<EndpointState>,
    /// How many there are besides.
    more_endpoints: usize,
}

/// One request, and where it came from.
struct Asked<'a> {
    request: &'a Request<Incoming>,
    peer: SocketAddr,
    /// Ours.
    local: Option<IpAddr>,
    /// Set while the answer is one that may take long.
    is_waiting: &'a AtomicBool,
}

impl Admin {
    /// Of a process with these parts.
    pub fn new(
        metrics: Arc<Metrics>,
        parts: watch::Receiver<Parts>,
        rosters: Vec<Arc<Roster>>,
        control: Control,
        linger: Linger,
        tracker: TaskTracker,
    ) -> Self {
        let waiting = [(); 2].map(|()| Semaphore::new(MAX_WAITING));
        let large = [(); 2].map(|()| Arc::new(Semaphore::new(MAX_LARGE)));
        let live = Live::new(Arc::clone(&metrics), parts.clone(), control.watch());
        Self { metrics, parts, rosters, control, linger, waiting, large, live, readiness: Mutex::new(None), tracker }
    }

    /// Serves until the runtime ends. Nobody is let in any more from `closed` on; who was, is still answered. What goes on without
    /// an end of its own ends with `farewell`.
    pub async fn serve(self, listener: TcpListener, closed: CancellationToken, farewell: CancellationToken) {
        let this = Arc::new(self);
        this.tracker.spawn(Arc::clone(&this.live).run(farewell.clone()));
        let slots = MAX_CONNECTIONS.map(|max| Arc::new(Semaphore::new(max)));
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = closed.cancelled() => return,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let local = stream.local_addr().ok().map(|local| local.ip());
                    let slots = &slots[usize::from(is_here(peer.ip(), local))];
                    if let Ok(slot) = Arc::clone(slots).try_acquire_owned() {
                        this.tracker.spawn(Arc::clone(&this).connection(stream, peer, local, slot, farewell.clone()));
                    } else {
                        debug!(%peer, "admin: too many connections");
                        this.linger.add(Side::Client, Stream::Tcp(stream), false, &BRIEF, Keeps::Nothing);
                    }
                }
                Err(error) => {
                    debug!(%error, "admin: accept failed");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        local: Option<IpAddr>,
        slot: OwnedSemaphorePermit,
        farewell: CancellationToken,
    ) {
        let is_waiting = Arc::new(AtomicBool::new(false));
        let service = {
            let (this, is_waiting) = (Arc::clone(&self), Arc::clone(&is_waiting));
            service_fn(move |request| {
                let (this, is_waiting, farewell) = (Arc::clone(&this), Arc::clone(&is_waiting), farewell.clone());
                Box::pin(async move {
                    let is_here = is_here(peer.ip(), local);
                    let tells = ["/", "/live", "/live.json", "/connections", "/status"].contains(&request.uri().path());
                    if tells && local.is_some_and(|local| local.is_loopback()) && !is_meant(request.headers()) {
                        let why =
                            "here Host is an address or localhost: this may be a page whose name was bound anew\n";
                        return Ok(plain(StatusCode::MISDIRECTED_REQUEST, why).map(BodyExt::boxed_unsync));
                    }
                    let slot = match request.uri().path() {
                        "/connections" | "/live.json" => {
                            let Ok(slot) = Arc::clone(&this.large[usize::from(is_here)]).try_acquire_owned() else {
                                let mut busy = plain(StatusCode::SERVICE_UNAVAILABLE, "too many ask for it at once\n");
                                busy.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
                                return Ok(busy.map(BodyExt::boxed_unsync));
                            };
                            Some(slot)
                        }
                        _ => None,
                    };
                    if let Some(answer) = this.live.answer(&request, is_here, &is_waiting, &farewell) {
                        return Ok(answer.map(|body| Held { body, _slot: slot }.boxed_unsync()));
                    }
                    let asked = Asked { request: &request, peer, local, is_waiting: &is_waiting };
                    let answer = this.answer(asked).await;
                    Ok::<_, Infallible>(answer.map(|body| Held { body, _slot: slot }.boxed_unsync()))
                })
            })
        };
        let mut connection = http1::Builder::new()
            .timer(TokioTimer::new())
            // One that stayed would keep others out.
            .keep_alive(false)
            .header_read_timeout(HEADER_TIMEOUT)
            .max_header_size(16 * 1024)
            .serve_connection(TokioIo::new(Kept::new(Stream::Tcp(stream), CONNECTION_TIMEOUT)), service);
        loop {
            match timeout(CONNECTION_TIMEOUT, &mut connection).await {
                Ok(served) => {
                    if let Err(error) = served {
                        debug!(%error, "admin connection ended");
                    }
                    break;
                }
                Err(_) if is_waiting.load(Ordering::Relaxed) => {}
                Err(_) => break,
            }
        }
        let (patience, stream) = (self.parts.borrow().close, connection.into_parts().io.into_inner().into_inner());
        self.linger.add(Side::Client, stream, false, &patience, Keeps::Slot(slot));
    }

    async fn answer(self: &Arc<Self>, asked: Asked<'_>) -> Response<Full<Bytes>> {
        let Asked { request, peer, local, is_waiting } = asked;
        let is_look = matches!(*request.method(), Method::GET | Method::HEAD);
        let changes = match request.uri().path() {
            "/drain" | "/undrain" | "/reload" | "/log" => true,
            "/" | "/live" | "/live.json" | "/livez" | "/readyz" | "/metrics" | "/status" | "/connections"
            | "/drain/wait" => false,
            _ => return plain(StatusCode::NOT_FOUND, format!("not found: there are {PATHS}\n")),
        };
        let (is_right, allow) =
            if changes { (*request.method() == Method::POST, "POST") } else { (is_look, "GET, HEAD") };
        if !is_right {
            let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, format!("only {allow}\n"));
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allow));
            return response;
        }
        let path = request.uri().path();
        if changes && let Err(reason) = self.may_change(request.headers(), peer.ip(), local) {
            let command = match path {
                "/drain" => "drain",
                "/undrain" => "drain --undo",
                "/log" => "log",
                _ => "reload",
            };
            if let Some(unsaid) = REFUSED.is_due() {
                warn!(%peer, path, reason, unsaid, "admin: refused");
            }
            let fix = format!("run `tidegate {command}` where the proxy runs");
            return plain(StatusCode::FORBIDDEN, format!("{reason}: {fix}\n"));
        }
        match request.uri().path() {
            "/livez" => plain(StatusCode::OK, "ok\n"),
            "/readyz" => self.readyz().await,
            "/metrics" => typed("application/openmetrics-text; version=1.0.0; charset=utf-8", self.metrics.encode()),
            "/status" => self.status(StatusCode::OK),
            "/connections" => self.connections(request.uri().query().unwrap_or_default()),
            "/drain" => {
                info!(%peer, "a drain is asked for");
                self.control.drain().await;
                self.status(StatusCode::ACCEPTED)
            }
            "/undrain" => {
                info!(%peer, "the drain is to be undone");
                if self.control.undo().await {
                    return self.status(StatusCode::OK);
                }
                plain(StatusCode::CONFLICT, "too late: listeners are closed, or the process is to end\n")
            }
            "/log" => {
                let Some(filter) = request.uri().query().and_then(|query| query.strip_prefix("filter=")) else {
                    return plain(StatusCode::BAD_REQUEST, "say which: POST /log?filter=info,tidegate=debug\n");
                };
                // At a level that most filters let through, and before this one may not.
                warn!(%peer, filter, "the log gets another filter, until log.filter is changed or the process ends");
                match self.control.filter(filter.to_owned()).await {
                    Some(Ok(())) => plain(
                        StatusCode::OK,
                        format!("log.filter is {filter:?}, until the file says another, or a restart\n"),
                    ),
                    Some(Err(error)) => plain(StatusCode::BAD_REQUEST, format!("{filter:?} is no filter: {error}\n")),
                    None => plain(StatusCode::SERVICE_UNAVAILABLE, "the process is about to end\n"),
                }
            }
            "/reload" => {
                info!(%peer, "a reload is asked for");
                let Some(Reloaded { status, json }) = self.control.reload().await else {
                    return plain(
                        StatusCode::SERVICE_UNAVAILABLE,
                        "not reloaded: too many ask, or it is about to end\n",
                    );
                };
                let mut response = typed("application/json", json);
                *response.status_mut() = status;
                response
            }
            "/drain/wait" => {
                let Ok(_slot) = self.waiting[usize::from(is_here(peer.ip(), local))].try_acquire() else {
                    return plain(StatusCode::SERVICE_UNAVAILABLE, "too many wait already\n");
                };
                is_waiting.store(true, Ordering::Relaxed);
                let is_drained = self.control.drained(NO_DRAIN).await;
                is_waiting.store(false, Ordering::Relaxed);
                plain(StatusCode::OK, if is_drained { "drained\n" } else { "not draining\n" })
            }
            _ => plain(StatusCode::OK, format!("tidegate: {PATHS}\n")),
        }
    }

    /// Who may change something: whoever is on this host, or in this Pod, or has the token. A browser sends `Origin` with each POST, also of a page that a name
    /// was bound anew for.
    fn may_change(&self, headers: &HeaderMap, peer: IpAddr, local: Option<IpAddr>) -> Result<(), &'static str> {
        if headers.contains_key(header::ORIGIN) {
            return Err("not from a web page");
        }
        if is_here(peer, local) {
            return Ok(());
        }
        match (&self.parts.borrow().settings.admin.token, bearer(headers)) {
            (None, _) => Err("only from the host or Pod itself, unless there is an admin.token_file"),
            (Some(token), Some(said)) if token.is(said) => Ok(()),
            (Some(_), Some(_)) => Err("this is not the token"),
            (Some(_), None) => Err("only from the host or Pod itself, or with `Authorization: Bearer` and the token"),
        }
    }

    fn connections(&self, query: &str) -> Response<Full<Bytes>> {
        match connections::connections(query, &self.rosters, &self.parts.borrow()) {
            Ok(text) => typed("application/json", text),
            Err(what) => plain(StatusCode::BAD_REQUEST, format!("{what}\n")),
        }
    }

    fn status(&self, code: StatusCode) -> Response<Full<Bytes>> {
        let status = self.control.status();
        let (endpoints, more_endpoints) = self.parts.borrow().upstreams.endpoints(MAX_ENDPOINTS);
        let now = Instant::now();
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let status = Status {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            phase: status.phase.as_str(),
            phase_ms: millis(now.saturating_duration_since(status.since)),
            phase_left_ms: status.until.map(|until| millis(until.saturating_duration_since(now))),
            accepts: status.phase <= Phase::Delay,
            sessions: self.metrics.sessions.get(),
            connections: self.metrics.connections.get(),
            lingering: self.metrics.lingering.get(),
            endpoints,
            more_endpoints,
        };
        let mut text = serde_json::to_string(&status).expect("numbers and texts are JSON");
        text.push('\n');
        let mut response = typed("application/json", text);
        *response.status_mut() = code;
        response
    }

    /// 200 when a new client would be served: not draining (after the delay), and the backend takes connections.
    async fn readyz(self: &Arc<Self>) -> Response<Full<Bytes>> {
        if !self.control.is_ready() {
            return plain(StatusCode::SERVICE_UNAVAILABLE, "draining\n");
        }
        // In a task of its own: a prober that does not wait must not make the next one dial again.
        let this = Arc::clone(self);
        let asked = self.tracker.spawn(async move {
            // Held during the dial, so that those who ask at once share one.
            let mut readiness = this.readiness.lock().await;
            let upstreams = this.parts.borrow().upstreams.clone();
            match &*readiness {
                Some(Dialled { upstreams: of, at, result }) if of.is(&upstreams) && at.elapsed() < READINESS_AGE => {
                    result.clone()
                }
                _ => {
                    let result = this.dial(&upstreams).await;
                    let was = readiness.as_ref().is_none_or(|dialled| dialled.result.is_ok());
                    match &result {
                        Err(error) if was => warn!(error, "not ready"),
                        Ok(()) if !was => info!("ready again"),
                        _ => {}
                    }
                    this.metrics.saw_backend(result.is_ok());
                    *readiness = Some(Dialled { upstreams, at: Instant::now(), result: result.clone() });
                    result
                }
            }
        });
        let result = asked.await.unwrap_or_else(|error| Err(error.to_string()));
        match result {
            Ok(()) => plain(StatusCode::OK, "ok\n"),
            Err(error) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")),
        }
    }

    /// Connects to the backend, any endpoint of it, and leaves again by FIN. Those of routes do not count: others still have one.
    async fn dial(&self, upstreams: &Upstreams) -> Result<(), String> {
        let linger = self.linger.clone();
        let end = move |stream| linger.add(Side::Backend, stream, false, &BRIEF, Keeps::Nothing);
        let (stream, result) = match upstreams.otherwise().connect(&end).await {
            Ok(stream) => (Some(stream), Ok(())),
            Err(upstream::Failure { error, stream }) => (stream, Err(format!("[upstream]: {error}"))),
        };
        // A backend may answer the end of a connection without a request, or wait for one before it closes: its side of the
        // end is waited for, but not for long.
        if let Some(stream) = stream {
            end(stream);
        }
        result
    }
}

const PATHS: &str = "/ in a browser, /live /live.json /livez /readyz /metrics /status /connections /drain/wait; \
                     POST /drain /undrain /reload /log";

/// A body that holds a place until it is gone.
struct Held<B> {
    body: B,
    _slot: Option<OwnedSemaphorePermit>,
}

impl<B: Body<Data = Bytes, Error = Infallible> + Unpin> Body for Held<B> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Host is no name that anybody can bind to a loopback address: a browser would let a page of that name read what comes.
fn is_meant(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST) else { return true };
    let Ok(host) = host.to_str() else { return false };
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.is_empty() || name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
}

/// What is said to be the token (RFC 6750 2.1).
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let (scheme, said) = headers.get(header::AUTHORIZATION)?.as_bytes().split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then_some(said.trim_ascii())
}

/// From an address of its own it comes from here too: that of the listener need not be a loopback one.
fn is_here(peer: IpAddr, local: Option<IpAddr>) -> bool {
    peer.to_canonical().is_loopback() || local == Some(peer)
}

fn typed(content_type: &'static str, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn plain(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = typed("text/plain; charset=utf-8", text);
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_that_cannot_be_bound_anew() {
        let of = |host: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_static(host));
            is_meant(&headers)
        };
        assert!(is_meant(&HeaderMap::new()));
        for host in
            ["", "localhost", "LocalHost:9090", "127.0.0.1", "127.0.0.1:9090", "[::1]", "[::1]:9090", "10.0.0.1:80"]
        {
            assert!(of(host), "{host}");
        }
        for host in ["evil.example", "evil.example:9090", "localhost.evil.example", "127.0.0.1.evil.example:9090"] {
            assert!(!of(host), "{host}");
        }
    }
}
