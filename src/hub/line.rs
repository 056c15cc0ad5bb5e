//! The WebSocket to the backend that clients share: a client of ours, whose frames go through an ordinary relay.
//!
//! So what a backend's leg is owed, it gets from whom it always gets it: pings, deadlines, limits, the Close handshake, the last wait. The
//! other end of that relay is a pipe within this process. Its session is nobody's: it is in no count of clients or of what they sent.

use std::{
    fmt::Write as _,
    future::poll_fn,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Sink as _, StreamExt as _};
use http::{
    HeaderMap, HeaderName, HeaderValue, Request, StatusCode,
    header::{
        ALLOW, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LANGUAGE, CONTENT_TYPE, LOCATION, RETRY_AFTER,
        SEC_WEBSOCKET_PROTOCOL, UPGRADE, WWW_AUTHENTICATE,
    },
};
use http_body_util::{BodyExt as _, Limited};
use tokio::{
    io::{DuplexStream, duplex},
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message, Utf8Bytes,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

use crate::{
    drain::Drain,
    fields::Ask,
    metrics::Metrics,
    net::Stream,
    relay::{self, Cause, Gone, Leg, Relay, Report},
    side::Side,
    upstream::{Answer, Error, Failure, Home, Load, Placed, Reply, Upstream},
    ws::{self, Code, Rsv},
};

/// Bytes on their way between the relay and us, in each direction.
const PIPE: usize = 32 << 10;

/// Of the backend's reasons for a refusal, what is passed on to all who wait.
const REFUSAL_BYTES: usize = 64 << 10;

/// The fields of a refusal that are for whoever gets it. A Set-Cookie, say, would be one session for all of them.
const FOR_ALL: [HeaderName; 9] = [
    CONTENT_TYPE,
    CONTENT_ENCODING,
    CONTENT_LANGUAGE,
    CACHE_CONTROL,
    WWW_AUTHENTICATE,
    RETRY_AFTER,
    LOCATION,
    ALLOW,
    UPGRADE,
];

/// Of these, the ones that say what its body is.
const OF_BODY: [HeaderName; 3] = [CONTENT_TYPE, CONTENT_ENCODING, CONTENT_LANGUAGE];

/// Until all of them are here.
pub(super) const REFUSAL_TIMEOUT: Duration = Duration::from_secs(2);

/// Of a route, opens that nobody waits for any more, and those that only show a handshake.
const EXTRA: usize = 256;

/// Why one that is back is of no use: its clients were told another subprotocol.
pub(super) const OTHER_PROTOCOL: &str = "it chooses another subprotocol";

/// The way there.
#[derive(Clone)]
pub(super) struct Lines {
    /// Places for what is no client's WebSocket.
    extra: Arc<Semaphore>,
    upstream: Upstream,
    relay: Arc<relay::Config>,
    socket: WebSocketConfig,
    metrics: Arc<Metrics>,
}

/// Why there is no WebSocket.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The backend gave no answer.
    #[error("{error}")]
    Upstream {
        /// Why.
        error: Error,
        /// The endpoint that was tried last, if any was.
        endpoint: Option<Arc<str>>,
    },
    /// It said no.
    #[error("the backend refused it with {}", .0.status)]
    Refused(Arc<Refused>),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Upstream { error, endpoint: None }
    }
}

/// What a backend said in place of 101.
#[derive(Debug)]
pub struct Refused {
    /// Its status.
    pub status: StatusCode,
    /// Of its header fields those that are for all who get it.
    pub headers: HeaderMap,
    /// All of what it said; nothing, if that is too long.
    pub body: Bytes,
    /// Which one it was.
    pub endpoint: Arc<str>,
}

/// A WebSocket to the backend. Dropped, it is ended as that of a client which has vanished.
pub(super) struct Line {
    socket: WebSocketStream<DuplexStream>,
    relay: Relayed,
    /// What is wrong with what came.
    error: Option<String>,
    has_spoken: bool,
    is_over_message: bool,
    metrics: Arc<Metrics>,
    /// The subprotocol that the backend has chosen.
    pub(super) protocol: Option<HeaderValue>,
    /// Where it is.
    pub(super) endpoint: Arc<str>,
}

/// The relay of a line, which that asks how it goes. Both are of one thread, so nobody waits for the lock.
#[derive(Clone)]
struct Relayed(Arc<Mutex<Relay>>);

/// What comes of a backend.
pub(super) enum Heard {
    /// A message; true: text.
    Message(bool, Bytes),
    /// Its Close, with the code and the reason, if it gave any.
    Close(Option<(u16, String)>),
    /// It is gone.
    Lost,
}

/// A Close of the backend's, as the frame that all of its clients get. `None`: it restarts or fails, and comes back.
pub(super) fn for_all(close: Option<(u16, String)>) -> Option<Bytes> {
    let frame = match close {
        Some((1001 | 1006 | 1011 | 1012 | 1013, _)) => return None,
        Some((code, reason)) => Code::new(code).map(|code| ws::CloseFrame::new(code, &reason)),
        None => None,
    };
    Some(Bytes::copy_from_slice(frame.unwrap_or(ws::CloseFrame::EMPTY).to_frame(None).as_bytes()))
}

/// As [`for_all`], of a backend that clients say something to: a Close that is about a message is about that of one of them. The others
/// have nothing to do with it.
pub(super) fn for_all_who_speak(close: Option<(u16, String)>) -> Option<Bytes> {
    match close {
        Some((1002 | 1003 | 1007 | 1008 | 1009, _)) => None,
        other => for_all(other),
    }
}

impl Lines {
    /// `websocket.hold_timeout`.
    pub(super) fn hold_timeout(&self) -> Duration {
        self.relay.hold_timeout
    }

    /// To this backend, by these rules.
    pub(super) fn new(upstream: &Upstream, relay: &relay::Config, metrics: &Arc<Metrics>) -> Self {
        let lost = Code::RESTART.get();
        let relay = relay::Config {
            // What its sessions are given is theirs.
            max_age: None,
            idle_timeout: None,
            max_control_rate: 0,
            // Of clients' messages the fragments are joined, and for them each message is cut anew.
            max_frame: relay.max_message,
            close_delay: Duration::ZERO,
            // Whatever went wrong, the next one may go well.
            backend_lost_code: lost,
            backend_error_code: lost,
            ..relay.clone()
        };
        let limit = usize::try_from(relay.max_message).unwrap_or(usize::MAX);
        let socket = WebSocketConfig::default()
            .read_buffer_size(PIPE)
            .write_buffer_size(0)
            .max_write_buffer_size(limit.saturating_add(PIPE))
            .max_message_size(Some(limit))
            .max_frame_size(Some(limit));
        let (extra, metrics) = (Arc::new(Semaphore::new(EXTRA)), Arc::clone(metrics));
        Self { extra, upstream: upstream.clone(), relay: Arc::new(relay), socket, metrics }
    }

    /// Opens one on a worker. What is under way when this is dropped is ended in order.
    pub(super) async fn open(&self, request: Request<()>, home: &Home) -> Result<Line, Fault> {
        self.open_at(request, home, None).await
    }

    /// Shows the backend a handshake, and ends what comes of it. `None`: there are as many as may be.
    pub(super) async fn show(&self, request: Request<()>, home: &Home) -> Option<Result<(), Fault>> {
        let place = Arc::clone(&self.extra).try_acquire_owned().ok()?;
        let opened = self.open_at(request, home, Some(place)).await;
        Some(opened.map(|line| home.spawn(line.end(Code::NORMAL))))
    }

    /// Until it has ended it has this place, if it needs one.
    async fn open_at(
        &self,
        request: Request<()>,
        home: &Home,
        place: Option<OwnedSemaphorePermit>,
    ) -> Result<Line, Fault> {
        let (done, opened) = oneshot::channel();
        home.spawn(self.clone().dial(request, home.clone(), done, place));
        // It is dropped unanswered only when the process ends.
        opened.await.unwrap_or(Err(Error::Timeout("the process ends").into()))
    }

    /// The handshake, and then the relay until its end.
    async fn dial(
        self,
        request: Request<()>,
        home: Home,
        mut done: oneshot::Sender<Result<Line, Fault>>,
        mut place: Option<OwnedSemaphorePermit>,
    ) {
        let mut exchange = self.upstream.websocket(Ask::Request(request), &home);
        let at = exchange.at();
        let answer = tokio::select! {
            biased;
            answer = &mut exchange => answer,
            () = done.closed() => {
                if !exchange.has_begun() {
                    return;
                }
                exchange.end_turn();
                place = place.or_else(|| Arc::clone(&self.extra).try_acquire_owned().ok());
                // A 101 obliges us to a Close; for anything less nobody waits, nor where there are too many already.
                if !exchange.is_connected() || place.is_none() {
                    exchange.give_up();
                }
                exchange.await
            }
        };
        let (stream, early, head, load) = match answer {
            Ok(Placed { what: Answer::Tunnel { stream, early, head }, load }) => (stream, early, head, load),
            Ok(Placed { what: Answer::Refusal(reply), load }) => {
                let refused = refused(reply, load, &home).await;
                drop(done.send(Err(Fault::Refused(Arc::new(refused)))));
                return;
            }
            Err(Failure { error, stream }) => {
                if let Some(stream) = stream {
                    (home.end)(stream);
                }
                drop(done.send(Err(Fault::Upstream { error, endpoint: at.endpoint() })));
                return;
            }
        };
        let (ours, theirs) = duplex(PIPE);
        let client = Leg { stream: Some(Stream::Local(Box::new(theirs))), early: Bytes::new() };
        let drain = Drain::new((*home.drain.config()).clone());
        let backend = Leg { stream: Some(stream), early };
        let relay = Relayed::new(&self.relay, &drain, client, backend);
        let line = Line {
            socket: WebSocketStream::from_raw_socket(ours, Role::Client, Some(self.socket)).await,
            relay: relay.clone(),
            error: None,
            has_spoken: false,
            is_over_message: false,
            metrics: Arc::clone(&self.metrics),
            protocol: head.into_map().remove(SEC_WEBSOCKET_PROTOCOL),
            endpoint: Arc::clone(load.endpoint()),
        };
        // Nobody may be there any more: then it is dropped here, and the backend gets its Close.
        drop(done.send(Ok(line)));
        relay.run(&home, &drain).await;
        if let Some(cause) = abnormal(&relay.lock().report()) {
            self.metrics.abnormal(cause);
        }
        drop((load, place));
    }
}

impl Relayed {
    fn new(config: &relay::Config, drain: &Drain, client: Leg, backend: Leg) -> Self {
        let (config, drain) = (config.clone(), drain.clone());
        let shared = relay::Shared::new(config, Arc::default(), drain, Arc::default());
        let relay = Relay::new(Arc::new(shared), Rsv::None, client, backend);
        Self(Arc::new(Mutex::new(relay)))
    }

    fn lock(&self) -> MutexGuard<'_, Relay> {
        // After a panic it says so itself.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Relays until both legs have ended. It does not follow a drain of the process, which ends its clients first, but hurries with it.
    async fn run(&self, home: &Home, drain: &Drain) {
        let mut hurried = pin!(home.drain.hurried());
        for _ in Side::BOTH {
            let ended = loop {
                tokio::select! {
                    biased;
                    // All that it knows is in the relay, which is free again after each turn.
                    ended = poll_fn(|cx| pin!(self.lock().next_ended()).poll(cx)) => break ended,
                    () = &mut hurried, if !drain.is_hurried() => drain.hurry(),
                }
            };
            if let (Side::Backend, Some(stream)) = (ended.side, ended.stream) {
                (home.end)(stream);
            }
        }
    }
}

/// What a backend has done to end it, for the log.
fn told(report: &Report) -> String {
    match report.cause {
        Cause::Close => {
            let mut told = "Close".to_owned();
            // To a string nothing fails.
            if let Some(code) = report.sent[Side::Backend as usize] {
                let _ = write!(told, " {code}");
            }
            if !report.reason.is_empty() {
                let _ = write!(told, ": {}", report.reason.escape_debug());
            }
            told
        }
        Cause::Gone(Side::Backend, gone) => match gone {
            Gone::Fin => "FIN without Close".to_owned(),
            Gone::Reset => "RST".to_owned(),
            Gone::Silent => "silent for websocket.pong_timeout".to_owned(),
            Gone::Stalled => "takes nothing for websocket.write_timeout".to_owned(),
            Gone::Broke(violation) => violation.to_string(),
        },
        Cause::Fault => "a bug in tidegate: please report it".to_owned(),
        Cause::Gone(Side::Client, _) | Cause::Drain | Cause::Age | Cause::Idle | Cause::Slow => String::new(),
    }
}

/// The cause for which it counts as abnormal, of `metrics::ABNORMAL`: as for a session, but its client is us.
fn abnormal(report: &Report) -> Option<&'static str> {
    let backend = Side::Backend as usize;
    // How it left is told by its first sign: a RST for our data after its Close and FIN is normal.
    let first = match report.cause {
        Cause::Fault => return Some("panic"),
        Cause::Gone(Side::Backend, how) => Some(how),
        _ => None,
    };
    let is_unanswered = report.told[backend] && !report.heard[backend];
    match first.or(report.gone[backend]) {
        Some(Gone::Silent) => Some("backend_silent"),
        Some(Gone::Stalled) => Some("backend_stalled"),
        Some(Gone::Broke(_)) => Some("backend_violation"),
        Some(Gone::Reset) if first.is_some() => Some("backend_reset"),
        Some(Gone::Fin) if first.is_some() => Some("backend_fin"),
        _ => is_unanswered.then_some("backend_no_answer"),
    }
}

/// Reads all of a refusal, as far as it is short.
async fn refused(reply: Reply, load: Load, home: &Home) -> Refused {
    let Reply { response, connection } = reply;
    let (end, endpoint) = (Arc::clone(&home.end), Arc::clone(load.endpoint()));
    home.spawn(async move {
        if let Some(stream) = connection.await {
            end(stream);
        }
        drop(load);
    });
    let (head, body) = response.into_parts();
    let body = timeout(REFUSAL_TIMEOUT, Limited::new(body, REFUSAL_BYTES).collect()).await;
    let body = body.ok().and_then(Result::ok).map(http_body_util::Collected::to_bytes);
    let mut headers = HeaderMap::new();
    // Without a body there is nothing that could be of some type, or encoded: a client would fail to decode it.
    let is_meant = |name: &HeaderName| FOR_ALL.contains(name) && (body.is_some() || !OF_BODY.contains(name));
    for (name, value) in head.headers.iter().filter(|(name, _)| is_meant(name)) {
        headers.append(name.clone(), value.clone());
    }
    Refused { status: head.status, headers, body: body.unwrap_or_default(), endpoint }
}

impl Line {
    /// What comes next. Pings of the backend are answered meanwhile.
    pub(super) fn poll_heard(&mut self, cx: &mut Context<'_>) -> Poll<Heard> {
        loop {
            let heard = match std::task::ready!(self.socket.poll_next_unpin(cx)) {
                Some(Ok(Message::Text(text))) => Heard::Message(true, text.into()),
                Some(Ok(Message::Binary(bytes))) => Heard::Message(false, bytes),
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
                Some(Ok(Message::Close(close))) => {
                    let code = close.as_ref().map(|close| close.code.into());
                    self.is_over_message =
                        self.has_spoken && matches!(code, Some(1002 | 1003 | 1007 | 1008 | 1009 | 1011));
                    Heard::Close(close.map(|close| (close.code.into(), close.reason.to_string())))
                }
                Some(Err(error)) => {
                    // What the relay does not look at, since it passes it on as it is.
                    if let tungstenite::Error::Utf8(_) = error {
                        self.metrics.abnormal("backend_violation");
                    }
                    self.error = Some(error.to_string());
                    Heard::Lost
                }
                None => Heard::Lost,
            };
            return Poll::Ready(heard);
        }
    }

    /// How the backend has ended it, for the log; after [`Heard::Close`] or [`Heard::Lost`].
    pub(super) fn how(&self) -> String {
        let told = told(&self.relay.lock().report());
        if told.is_empty() { self.error.clone().unwrap_or_default() } else { told }
    }

    /// After [`Heard::Close`]: what a client had said may be the reason, so that the backend itself is well.
    pub(super) fn is_over_message(&self) -> bool {
        self.is_over_message
    }

    /// It takes another message. An end is heard by [`Line::poll_heard`].
    pub(super) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        Pin::new(&mut self.socket).poll_ready(cx).map(|ready| ready.is_ok())
    }

    /// Sends a message, of which text is UTF-8; after [`Line::poll_ready`].
    pub(super) fn send(&mut self, is_text: bool, payload: Bytes) {
        let message = match Utf8Bytes::try_from(payload.clone()) {
            Ok(text) if is_text => Message::Text(text),
            _ => Message::Binary(payload),
        };
        self.has_spoken = true;
        let _ = Pin::new(&mut self.socket).start_send(message);
    }

    /// Has what was sent go out.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) {
        let _ = Pin::new(&mut self.socket).poll_flush(cx);
    }

    /// Ends it: a Close, unless the backend has sent one, and then whatever it still says. The relay has the deadlines.
    pub(super) async fn end(mut self, code: Code) {
        let close = CloseFrame { code: CloseCode::from(code.get()), reason: Utf8Bytes::default() };
        let _ = self.socket.close(Some(close)).await;
        while let Some(Ok(_)) = self.socket.next().await {}
    }
}
