//! The answers that are tidegate's own, and what the log says of them.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::atomic::Ordering,
    time::Duration,
};

use http::{
    HeaderValue, Request, Response, StatusCode,
    header::{ALLOW, CONNECTION, ORIGIN, SEC_WEBSOCKET_VERSION, UPGRADE},
};
use tracing::{debug, field::display, warn};

use super::{About, Context, secure::Client};
use crate::{
    admission::Reason,
    downstream::{self, Body, Intent, Refusal, Speaker, answer, answer_later},
    fields::Header,
    metrics::Handshake,
    net::Lack,
    sparse::Sparse,
    upstream::{Ambiguous, At, Error, Way},
};

impl Context {
    /// Counts a client that gets a 503 of ours, and says so once in a while: in a spike there are thousands.
    pub(super) fn refuse_for(&self, reason: Reason, client: SocketAddr) {
        self.refuse_at(reason, client, None);
    }

    /// The same for what there is too little of toward one endpoint.
    pub(super) fn refuse_at(&self, reason: Reason, client: SocketAddr, at: Option<(&str, &At)>) {
        static SAID: [Sparse; Reason::ALL.len()] = [const { Sparse::new() }; Reason::ALL.len()];
        self.relay.traffic.refuse(reason);
        let is_rate = reason == Reason::AddressRate;
        if let Some(unsaid) = SAID[reason as usize].is_due() {
            let (route, endpoint) = at.map(|(route, at)| (route, at.endpoint())).unzip();
            let (endpoint, reason, fix) = (endpoint.flatten(), reason.as_str(), reason.fix());
            if is_rate {
                warn!(%client, reason, fix, unsaid, "clients are turned away with 429");
                return;
            }
            warn!(%client, route, endpoint = endpoint.as_deref(), reason, fix, unsaid, "clients are turned away with 503");
        }
    }

    /// What a client is told for whom there is no room now.
    pub(super) fn refusal(&self, reason: Reason) -> Response<Body> {
        answer_later(StatusCode::SERVICE_UNAVAILABLE, reason.told(), self.downstream.retry_after)
    }

    /// What a client is told whose address may begin no more handshakes for so long.
    pub(super) fn refuse_pace(&self, client: &Client, header: &impl Header) -> Option<Response<Body>> {
        let Speaker::Client(address) = self.speaker(client, header) else { return None };
        let wait = self.admission.pace_address(address).err()?;
        let reason = Reason::AddressRate;
        self.refuse_for(reason, SocketAddr::new(address, client.address.port()));
        // Rounded up: too early it would be refused again.
        let wait = Duration::from_secs(wait.as_secs() + 1).max(self.downstream.retry_after);
        Some(answer_later(StatusCode::TOO_MANY_REQUESTS, reason.told(), wait))
    }

    fn speaker(&self, client: &Client, header: &impl Header) -> Speaker {
        downstream::speaker(header, client.ip(), &self.downstream.trusted_proxies)
    }

    /// What a client is told whom a route is not for.
    pub(super) fn refuse_address(&self, client: &Client, header: &impl Header, way: &Way) -> Option<Response<Body>> {
        static SAID: Sparse = Sparse::new();
        let address = self.speaker(client, header).address();
        if way.upstream.config().rules.admit(address) {
            return None;
        }
        let (route, address) = (&way.route, address.map(|address| address.to_string()));
        let address = address.as_deref().unwrap_or("unknown");
        if let Some(unsaid) = SAID.is_due() {
            let fix = "if it is meant to, change allow or deny of the route; a proxy in front must be in http.trusted_proxies, or it is taken for its clients";
            warn!(%client, address, %route, fix, unsaid, "a client may not use a route: it gets 403");
        } else {
            debug!(%client, address, %route, "a client may not use a route: it gets 403");
        }
        Some(answer(StatusCode::FORBIDDEN, "this path is not for clients of this address"))
    }

    /// What a client is told for whose route there are too many sessions.
    pub(super) fn refuse_session(&self, client: &Client, route: &str) -> Response<Body> {
        debug!(%client, route, "as many sessions as max_sessions allows");
        self.refuse_for(Reason::RouteSessions, client.address);
        self.refusal(Reason::RouteSessions)
    }

    /// Says once in a process that somebody's `X-Forwarded-For` is not believed: it may be the user's own ingress.
    pub(super) fn doubt(&self, client: IpAddr) {
        if !self.has_doubted.swap(true, Ordering::Relaxed) {
            warn!(%client, "X-Forwarded-* of a client that is not in http.trusted_proxies is replaced; said once");
        }
    }

    /// A request that the backend never sees.
    pub(super) fn refuse<B>(&self, client: SocketAddr, request: &Request<B>, refusal: Refusal) -> Response<Body> {
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

    /// A request that could be one for another route. Its path is said without its query, which may hold secrets.
    pub(super) fn refuse_path(&self, client: SocketAddr, path: &str, ambiguous: &Ambiguous<'_, Way>) -> Response<Body> {
        static SAID: Sparse = Sparse::new();
        const TOLD: &str =
            "the path can be read in more than one way; send it without dot segments, and encode only what has to be";
        self.metrics.ambiguous_paths.inc();
        let Ambiguous { chosen: Way { route, .. }, other: Way { route: other, .. } } = ambiguous;
        let path = &path[..path.floor_char_boundary(256)];
        if let Some(unsaid) = SAID.is_due() {
            let fix = "have it sent without dot segments, doubled slashes and parameters of segments, and with nothing encoded that \
                       need not be; or lead both ways to the same route";
            warn!(%client, path, %route, %other, fix, unsaid, "a path can be read in two ways: it gets 400");
        } else {
            debug!(%client, path, %route, %other, "a path can be read in two ways: it gets 400");
        }
        answer(StatusCode::BAD_REQUEST, TOLD)
    }

    /// A request too many.
    pub(super) fn shed(&self, intent: Intent, client: SocketAddr) -> Response<Body> {
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

    /// What a client is told when the backend gave no answer: no addresses, no system errors.
    pub(super) fn blame(&self, error: &Error, client: SocketAddr, route: &str, at: &At) -> Response<Body> {
        let reason = match error {
            // Not its fault.
            Error::Body(_) => return answer(StatusCode::BAD_REQUEST, "the request's body did not arrive in full"),
            Error::Shortage { lack, .. } => {
                let reason = match lack {
                    Lack::Ports => Reason::Ports,
                    Lack::Descriptors => Reason::Descriptors,
                    Lack::Memory => Reason::Memory,
                };
                self.refuse_at(reason, client, Some((route, at)));
                return self.refusal(reason);
            }
            Error::QueueTimeout => {
                self.refuse_at(Reason::QueueTimeout, client, Some((route, at)));
                return self.refusal(Reason::QueueTimeout);
            }
            Error::PoolFull => {
                self.refuse_at(Reason::PoolFull, client, Some((route, at)));
                return self.refusal(Reason::PoolFull);
            }
            Error::Busy => "the backend takes nobody else now",
            Error::Unreachable { .. } => "the backend is not reachable",
            Error::Tls { .. } => "there is no secure connection to the backend",
            Error::NoAnswer(_) | Error::NoStream(_) => "the backend gave no valid answer",
            Error::Timeout(reason) | Error::BadAccept(reason) => reason,
        };
        answer_later(status_of(error), reason, self.downstream.retry_after)
    }

    /// An answer of a backend that could end in more than one place.
    pub(super) fn refuse_length(&self, endpoint: &str) -> Response<Body> {
        static SAID: Sparse = Sparse::new();
        if let Some(unsaid) = SAID.is_due() {
            let fix = "it must send one Content-Length, or Transfer-Encoding: chunked once";
            warn!(endpoint, fix, unsaid, "a backend's answer says its length wrongly or twice: it becomes 502");
        }
        answer_later(StatusCode::BAD_GATEWAY, "the backend gave no valid answer", self.downstream.retry_after)
    }
}

/// A handshake of a page that may not.
pub(super) fn refuse_origin(client: SocketAddr, header: &impl Header) -> Response<Body> {
    static SAID: Sparse = Sparse::new();
    let origins: Vec<_> = header.values_of(&ORIGIN).map(<[u8]>::escape_ascii).collect();
    let mut origin = origins.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    // Escaped it is ASCII.
    origin.truncate(256);
    if let Some(unsaid) = SAID.is_due() {
        let fix = "if its pages are meant to connect, add it to http.allowed_origins";
        warn!(%client, origin, fix, unsaid, "a web page is not allowed to connect: it gets 403");
    } else {
        debug!(%client, origin, "a web page is not allowed to connect: it gets 403");
    }
    answer(StatusCode::FORBIDDEN, "pages of this Origin may not open WebSockets here")
}

/// Says what went wrong. Of each kind once in a while: when a backend is down there are as many as there are clients.
pub(super) fn complain(error: &Error, about: &About, at: &At) {
    static SAID: [Sparse; 6] = [const { Sparse::new() }; 6];
    let kind = match error {
        // Said as a client that is turned away, and here with its cause.
        Error::Shortage { .. } => 0,
        Error::QueueTimeout | Error::PoolFull => return,
        Error::Unreachable { .. } => 1,
        Error::Timeout(_) => 2,
        Error::NoAnswer(_) | Error::NoStream(_) | Error::BadAccept(_) | Error::Busy => 3,
        Error::Body(_) => 4,
        Error::Tls { .. } => 5,
    };
    let About { client, path, request_id, trace_id, route, .. } = about;
    let trace_id = trace_id.as_ref().map(display);
    let endpoint = at.endpoint();
    let endpoint = endpoint.as_deref();
    if let Some(unsaid) = SAID[kind].is_due() {
        warn!(%client, path, request_id, trace_id, %route, endpoint, %error, unsaid, "request failed");
    } else {
        debug!(%client, path, request_id, trace_id, %route, endpoint, %error, "request failed");
    }
}

/// Says that the backend could not be asked about a client, for whatever reason. Those whom the client wanted to join notice nothing.
pub(super) fn say_unasked(error: &Error, about: &About, at: &At) {
    static SAID: Sparse = Sparse::new();
    let About { client, path, request_id, trace_id, route, .. } = about;
    let trace_id = trace_id.as_ref().map(display);
    let endpoint = at.endpoint();
    let endpoint = endpoint.as_deref();
    if let Some(unsaid) = SAID.is_due() {
        warn!(%client, path, request_id, trace_id, %route, endpoint, %error, unsaid, "the backend could not be asked whether a client may join a shared WebSocket (pool.authorize)");
    }
}

/// Of an answer in place of the one that the backend did not give.
pub(super) fn status_of(error: &Error) -> StatusCode {
    match error {
        Error::Timeout(_) => StatusCode::GATEWAY_TIMEOUT,
        Error::Busy => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::BAD_GATEWAY,
    }
}

pub(super) fn lost(client: SocketAddr, error: &io::Error) {
    static SAID: Sparse = Sparse::new();
    if let Some(unsaid) = SAID.is_due() {
        let fix = "raise fs.epoll.max_user_watches, or the memory limit";
        warn!(%client, %error, fix, unsaid, "cannot watch a client's socket: it is closed without an answer");
    }
}

/// Makes it the last response of its connection: behind a handshake that failed, what the client has sent already may be
/// the frames of the tunnel that it hoped for, and must not be read as requests.
pub(super) fn last(mut response: Response<Body>) -> Response<Body> {
    response.headers_mut().entry(CONNECTION).or_insert(HeaderValue::from_static("close"));
    response
}
