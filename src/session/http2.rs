//! A client's connection that speaks HTTP/2: what becomes of it and of its streams, in order.
//!
//! ```text
//! preface, SETTINGS, in time -> driven by one task, in turns; each request gets a place, a turn at the gate, and a task of its own
//!        -> the backend's answer -> 200 -> relay, as any session has it, with the stream for a leg
//! no stream for http.header_timeout, a drain, or a flood -> GOAWAY -> its socket has its last wait like every other
//! ```
//!
//! A connection has the place of a connection, and no session; each stream that is let in has a place like a connection, since it costs as
//! much: a leg toward a backend, and memory.

use std::{
    future::{Future, poll_fn},
    io,
    net::IpAddr,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context as TaskContext, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use h2::{
    Reason as Why, RecvStream, SendStream,
    server::{Connection, SendResponse},
};
use http::{HeaderMap, Method, Request, Response, StatusCode, header::EXPECT};
use http_body::Body as _;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    task::yield_now,
    time::{Instant, Sleep, sleep, sleep_until, timeout},
};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tracing::{debug, warn};

use super::{
    Context, Tunnel,
    http::{Next, Stage, say_ended},
    secure::Client,
};
use crate::{
    admission::{Place, Reason},
    downstream::{self, Body, Floods, Intent, StreamBody},
    listen::{Accounting, ConnectionGuard},
    metrics::{Counted, Handshake},
    net::{self, Back, Kept, Lent, Stream, lend},
    relay::Leg,
    sparse::Sparse,
};

/// Bytes that a connection reads in a turn, so that those whose they are have theirs.
const TURN: usize = 64 << 10;

/// For GOAWAY to be taken, once there are no streams.
const FAREWELL: Duration = Duration::from_secs(2);

/// What a header may take before its request has to ask for memory.
const USUAL_HEADER: usize = 4 << 10;

/// Interim answers that are passed on: 100 alone, which is ours.
const GO_ON: StatusCode = StatusCode::CONTINUE;

/// A request on a stream.
struct Asked {
    request: Request<()>,
    intent: Intent,
    body: RecvStream,
    respond: SendResponse<Bytes>,
    user: User,
}

/// Somebody here has still something to do with a stream. h2 counts more: also those of which only the client has not taken the end.
type User = Arc<()>;

/// Begun in one turn: a request that is refused at once costs more than its bytes.
const BEGUN: usize = 64;

/// Lets a connection run until its end.
struct Driver {
    context: Arc<Context>,
    client: Client,
    connection: Box<Connection<Lent<Watched>, Bytes>>,
    back: Arc<Back<Watched>>,
    is_flooded: Arc<AtomicBool>,
    /// One for each stream.
    users: User,
    /// All streams get a 503.
    refused: Option<Reason>,
    begun: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Until the first request, or as long as nobody has to do with a stream.
    idle: Option<Pin<Box<Sleep>>>,
    /// It gets no more streams.
    is_leaving: bool,
    /// ... and nor does it get more of our time than others that are refused.
    is_cut: bool,
    farewell: Option<Pin<Box<Sleep>>>,
}

/// How it ended.
enum Ended {
    /// By both sides' leave, or an error of one of them.
    Result(Result<(), h2::Error>),
    /// It did not take our GOAWAY.
    Late,
}

impl Context {
    /// A connection that speaks HTTP/2, until its end. `deadline` is that of its first request. `refused`: there is no room for it, so each
    /// request gets a 503.
    pub(super) async fn serve_http2(
        self: Arc<Self>,
        stream: Kept,
        client: Client,
        accounting: Accounting,
        deadline: Instant,
        refused: Option<Reason>,
    ) {
        stream.writable().await;
        let _counted = Counted::new(&self.metrics.http2_connections);
        let is_flooded = Arc::new(AtomicBool::new(false));
        let (lent, back) = lend(Watched { stream, floods: Floods::default(), is_flooded: Arc::clone(&is_flooded) });
        let builder = downstream::stream_server(&self.downstream);
        let greeted = {
            // Both boxed: what follows lasts for long, and would keep room for them.
            let handshake = Box::pin(builder.handshake::<_, Bytes>(lent));
            tokio::select! {
                greeted = handshake => greeted.map(Box::new).map_err(|error| debug!(%client, %error, "no HTTP/2")).ok(),
                () = self.late(deadline) => None,
            }
        };
        let is_done = match greeted {
            Some(connection) => {
                let driver = Driver {
                    context: Arc::clone(&self),
                    client: client.clone(),
                    connection,
                    back: Arc::clone(&back),
                    is_flooded,
                    users: Arc::default(),
                    refused,
                    begun: Box::pin(self.relay.drain.begun()),
                    idle: Some(Box::pin(sleep_until(deadline))),
                    is_leaving: false,
                    is_cut: refused.is_some(),
                    farewell: None,
                };
                driver.drive(&accounting).await
            }
            None => false,
        };
        // The connection has given it back.
        let Some(Watched { stream, .. }) = back.take() else { return };
        let patience = if is_done { self.close } else { self.short_linger() };
        self.linger(stream.into_inner(), &patience, accounting);
    }

    /// One request, from its place to its answer, or to its session.
    async fn serve_stream(self: Arc<Self>, asked: Asked, client: Client, guard: ConnectionGuard) {
        let Asked { request, intent, body, mut respond, user } = asked;
        if poll_fn(|cx| Poll::Ready(respond.poll_reset(cx).is_ready())).await {
            // Who has taken his request back by now costs the backend nothing.
            return;
        }
        let is_head = request.method() == Method::HEAD;
        let size = header_size(request.headers());
        let memory = if size > USUAL_HEADER { self.admission.more_memory(size as u64).map(Some) } else { Some(None) };
        let place = match memory {
            Some(_) => self.place_for_stream(intent, client.ip()).await,
            None => Err(Reason::Memory),
        };
        let place = match place {
            Ok(place) => place,
            Err(reason) => {
                self.refuse_for(reason, client.address);
                let response = self.refusal(reason);
                self.count_refusal(intent, &response);
                answer_at_once(&mut respond, response, is_head);
                return;
            }
        };
        let accounting = Accounting { place, guard, counted: Counted::new(&self.metrics.http2_streams) };
        match intent {
            Intent::WebSocket => {
                let asked = Asked { request, intent, body, respond, user };
                self.open_tunnel(asked, client, accounting).await;
            }
            Intent::Plain => {
                self.exchange(request, body, respond, &client).await;
                drop(user);
            }
        }
    }

    /// As a connection gets one. A WebSocket is one more of its address, as it would be without its connection; requests come and go.
    async fn place_for_stream(&self, intent: Intent, ip: IpAddr) -> Result<Place, Reason> {
        let mut place = self.any_place().await?;
        let is_proxy = || downstream::is_trusted(ip, &self.downstream.trusted_proxies);
        if intent == Intent::WebSocket && !is_proxy() && !self.admission.count_address(ip.to_canonical(), &mut place) {
            return Err(Reason::AddressConnections);
        }
        Ok(place)
    }

    async fn any_place(&self) -> Result<Place, Reason> {
        let reason = match self.admission.enter() {
            Some(place) => match place.refused {
                None => {
                    self.admission.accepted(&place);
                    return Ok(place);
                }
                Some(reason) => reason,
            },
            None => Reason::MaxConnections,
        };
        self.admission.enter_late().await.ok_or(reason)
    }

    fn count_refusal(&self, intent: Intent, response: &Response<Body>) {
        match intent {
            Intent::WebSocket => self.metrics.handshake(Handshake::Shed, Duration::ZERO),
            Intent::Plain => self.metrics.request(response.status().as_u16()),
        }
    }

    /// A WebSocket's handshake on a stream, and what follows it.
    async fn open_tunnel(self: Arc<Self>, asked: Asked, client: Client, accounting: Accounting) {
        let Asked { request, mut body, mut respond, user, .. } = asked;
        let stage = Mutex::new(Stage::new(None));
        let mut early = Bytes::new();
        let response = {
            let mut answer = pin!(async {
                let permit = self.gate.turn().await;
                stage.lock().unwrap_or_else(PoisonError::into_inner).permit = Some(permit);
                match self.handshakes.try_acquire() {
                    Ok(_slot) => {
                        let answer = pin!(self.upgrade(request, &client, &stage));
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
                // As with a socket: one that sends more before the answer is not watched any longer, but for its reset.
                while early.is_empty()
                    && let Poll::Ready(data) = body.poll_data(cx)
                {
                    match data {
                        Some(Ok(bytes)) => {
                            let _ = body.flow_control().release_capacity(bytes.len());
                            early = bytes;
                        }
                        Some(Err(_)) | None => return Poll::Ready(None),
                    }
                }
                if respond.poll_reset(cx).is_ready() {
                    return Poll::Ready(None);
                }
                hurried.as_mut().poll(cx).map(|()| None)
            })
            .await
        };
        let Stage { next, permit, .. } = stage.into_inner().unwrap_or_else(PoisonError::into_inner);
        drop(permit);
        match (next, response) {
            (Next::Tunnel(tunnel), Some(response)) => {
                let leg = |send| Stream::Multiplexed(Box::new(net::Tunnel::of_client(send, body, Box::new(user))));
                self.answer_tunnel(respond, response, leg, early, tunnel, accounting);
            }
            // Over HTTP/1.1 it is an answer like others. Here it would be the 200 of a WebSocket (RFC 8441 5).
            (_, Some(response)) if response.status().is_success() => {
                debug!(%client, status = %response.status(), "the backend did not accept a WebSocket, and its answer can't be passed on");
                let told = "the backend did not accept the WebSocket";
                let response = downstream::answer_later(StatusCode::BAD_GATEWAY, told, self.downstream.retry_after);
                self.answer_stream(respond, response, false).await;
            }
            (_, Some(response)) => self.answer_stream(respond, response, false).await,
            (_, None) => respond.send_reset(Why::CANCEL),
        }
    }

    /// The 200 of a WebSocket.
    fn answer_tunnel(
        self: &Arc<Self>,
        mut respond: SendResponse<Bytes>,
        response: Response<Body>,
        leg: impl FnOnce(SendStream<Bytes>) -> Stream,
        early: Bytes,
        tunnel: Box<Tunnel>,
        accounting: Accounting,
    ) {
        let mut response = response.map(drop);
        downstream::stream_response(&mut response);
        match respond.send_response(response, false) {
            Ok(send) => {
                self.begin_session(leg(send), early, true, tunnel, accounting);
            }
            // It was reset in this very moment: the backend must hear of it.
            Err(_) => self.begin_relay(Leg { stream: None, early: Bytes::new() }, tunnel, accounting),
        }
    }

    /// A request that is no WebSocket, streamed both ways.
    async fn exchange(
        self: &Arc<Self>,
        request: Request<()>,
        body: RecvStream,
        mut respond: SendResponse<Bytes>,
        client: &Client,
    ) {
        let is_head = request.method() == Method::HEAD;
        let wants_to_be_told = request
            .headers()
            .get(EXPECT)
            .is_some_and(|expected| expected.as_bytes().eq_ignore_ascii_case(b"100-continue") && !body.is_end_stream());
        let wanted = Arc::new(AtomicBool::new(false));
        let request = request.map(|()| StreamBody::new(body, Arc::clone(&wanted)));
        let stage = Mutex::new(Stage::new(None));
        let response = {
            let mut answer = pin!(async {
                let permit = self.gate.turn().await;
                stage.lock().unwrap_or_else(PoisonError::into_inner).permit = Some(permit);
                match self.requests.try_acquire() {
                    Ok(_slot) => {
                        let answer = pin!(self.plain(request, client, &stage));
                        let response = self.in_time(client.address, &stage, answer).await;
                        self.metrics.request(response.status().as_u16());
                        response
                    }
                    Err(_) => self.shed(Intent::Plain, client.address),
                }
            });
            let mut hurried = pin!(self.relay.drain.hurried());
            let mut is_told = !wants_to_be_told;
            poll_fn(|cx| {
                let answered = answer.as_mut().poll(cx);
                if let Poll::Ready(response) = answered {
                    return Poll::Ready(Some(response));
                }
                if !is_told && wanted.load(Ordering::Relaxed) {
                    is_told = true;
                    let mut go_on = Response::new(());
                    *go_on.status_mut() = GO_ON;
                    let _ = respond.send_informational(go_on);
                }
                if respond.poll_reset(cx).is_ready() {
                    return Poll::Ready(None);
                }
                hurried.as_mut().poll(cx).map(|()| None)
            })
            .await
        };
        drop(stage);
        match response {
            Some(response) => self.answer_stream(respond, response, is_head).await,
            None => respond.send_reset(Why::CANCEL),
        }
    }

    /// An answer with its body, as its client takes it.
    async fn answer_stream(&self, mut respond: SendResponse<Bytes>, mut response: Response<Body>, is_head: bool) {
        downstream::stream_response(&mut response);
        let (head, mut body) = response.into_parts();
        let is_over = is_head || body.is_end_stream();
        let Ok(mut send) = respond.send_response(Response::from_parts(head, ()), is_over) else { return };
        if is_over {
            return;
        }
        let mut hurried = pin!(self.relay.drain.hurried());
        loop {
            // `None`: nobody waits for it any more.
            let frame = poll_fn(|cx| {
                if hurried.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(None);
                }
                if let Poll::Ready(frame) = Pin::new(&mut body).poll_frame(cx) {
                    return Poll::Ready(Some(frame));
                }
                send.poll_reset(cx).map(|_| None)
            });
            match frame.await {
                Some(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        let written = tokio::select! {
                            written = write_all(&mut send, data, self.relay.config.write_timeout) => written,
                            () = &mut hurried => None,
                        };
                        if written.is_none() {
                            send.send_reset(Why::CANCEL);
                            return;
                        }
                    }
                    Err(frame) => {
                        if let Ok(trailers) = frame.into_trailers() {
                            let _ = send.send_trailers(trailers);
                            return;
                        }
                    }
                },
                Some(None) => {
                    let _ = send.send_data(Bytes::new(), true);
                    return;
                }
                // What is cut short must not look whole.
                Some(Some(Err(_))) => {
                    // h2 drops what was not written yet, and the connection's task has its turn first.
                    yield_now().await;
                    return send.send_reset(Why::INTERNAL_ERROR);
                }
                None => return send.send_reset(Why::CANCEL),
            }
        }
    }
}

/// As h2 counts it (RFC 9113 6.5.2).
fn header_size(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
}

/// Writes as much as the client's windows and the bound of what waits here allow, in turns; `None`: it is gone, or takes nothing.
async fn write_all(send: &mut SendStream<Bytes>, mut bytes: Bytes, patience: Duration) -> Option<()> {
    while !bytes.is_empty() {
        send.reserve_capacity(bytes.len());
        while send.capacity() == 0 {
            timeout(patience, poll_fn(|cx| send.poll_capacity(cx))).await.ok()??.ok()?;
        }
        let now = bytes.split_to(bytes.len().min(send.capacity()));
        send.send_data(now, false).ok()?;
    }
    Some(())
}

/// An answer of our own, whose body is here as a whole: a few words, for which nobody has to wait.
fn answer_at_once(respond: &mut SendResponse<Bytes>, mut response: Response<Body>, is_head: bool) {
    downstream::stream_response(&mut response);
    let (head, mut body) = response.into_parts();
    let mut cx = TaskContext::from_waker(Waker::noop());
    let text = match Pin::new(&mut body).poll_frame(&mut cx) {
        Poll::Ready(Some(Ok(frame))) => frame.into_data().unwrap_or_default(),
        _ => Bytes::new(),
    };
    let is_over = is_head || text.is_empty();
    if let Ok(mut send) = respond.send_response(Response::from_parts(head, ()), is_over)
        && !is_over
    {
        let _ = send.send_data(text, true);
    }
}

impl Driver {
    /// True: it ended in order.
    async fn drive(mut self, accounting: &Accounting) -> bool {
        let ended = poll_fn(|cx| self.poll(cx, accounting)).await;
        let client = &self.client;
        match ended {
            Ended::Result(Ok(())) => !self.is_cut,
            Ended::Result(Err(error)) => {
                say_ended(client, None, error.get_io(), &error);
                false
            }
            Ended::Late => {
                debug!(%client, "a client does not take the end of its connection");
                false
            }
        }
    }

    fn poll(&mut self, cx: &mut TaskContext<'_>, accounting: &Accounting) -> Poll<Ended> {
        self.back.begin_turn(TURN);
        let mut begun = 0;
        loop {
            if begun == BEGUN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            match self.connection.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, respond)))) => {
                    begun += 1;
                    self.begin(request, respond, accounting);
                    continue;
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Ended::Result(Err(error))),
                Poll::Ready(None) => return Poll::Ready(Ended::Result(Ok(()))),
                Poll::Pending => {}
            }
            if self.is_flooded.swap(false, Ordering::Relaxed) {
                static SAID: Sparse = Sparse::new();
                if let Some(unsaid) = SAID.is_due() {
                    let streams = Arc::strong_count(&self.users) - 1;
                    warn!(client = %self.client, streams, unsaid, "a client floods its connection with frames that are for nothing: it is ended");
                }
                (self.is_leaving, self.is_cut) = (true, true);
                self.farewell = Some(Box::pin(sleep(FAREWELL)));
                self.connection.abrupt_shutdown(Why::ENHANCE_YOUR_CALM);
                continue;
            }
            if !self.is_leaving && (self.begun.as_mut().poll(cx).is_ready() || self.poll_idle(cx).is_ready()) {
                self.is_leaving = true;
                self.connection.graceful_shutdown();
                continue;
            }
            break;
        }
        if self.is_leaving && !self.is_used() {
            // Its client may still have to take the end of what it asked for.
            let is_owed = self.connection.has_streams() && !self.is_cut;
            let patience = if is_owed { self.context.relay.config.write_timeout } else { FAREWELL };
            let farewell = self.farewell.get_or_insert_with(|| Box::pin(sleep(patience)));
            return farewell.as_mut().poll(cx).map(|()| Ended::Late);
        }
        Poll::Pending
    }

    fn is_used(&self) -> bool {
        Arc::strong_count(&self.users) > 1
    }

    /// Ready: nobody has had to do with a stream for long enough. A client may keep an ended one in h2's count, by not taking its end.
    fn poll_idle(&mut self, cx: &mut TaskContext<'_>) -> Poll<()> {
        if self.is_used() {
            self.idle = None;
            return Poll::Pending;
        }
        let is_owed = self.connection.has_streams();
        let patience =
            if is_owed { self.context.relay.config.write_timeout } else { self.context.downstream.header_timeout };
        self.idle.get_or_insert_with(|| Box::pin(sleep(patience))).as_mut().poll(cx)
    }

    /// Begins with a request, or refuses it.
    fn begin(&mut self, request: Request<RecvStream>, mut respond: SendResponse<Bytes>, accounting: &Accounting) {
        self.idle = None;
        if self.is_leaving {
            // Its client may ask elsewhere: nobody has looked at it (RFC 9113 8.7).
            return respond.send_reset(Why::REFUSED_STREAM);
        }
        let is_head = request.method() == Method::HEAD;
        // A connection may outlive many reloads.
        let context = self.context.latest();
        if let Some(reason) = self.refused {
            answer_at_once(&mut respond, context.refusal(reason), is_head);
            self.is_leaving = true;
            return self.connection.graceful_shutdown();
        }
        let (head, body) = request.into_parts();
        let mut request = Request::from_parts(head, ());
        let intent = match downstream::from_stream(&mut request, body.is_end_stream(), &context.downstream) {
            Ok(intent) => intent,
            Err(refusal) => {
                let response = context.refuse(self.client.address, &request, refusal);
                return answer_at_once(&mut respond, response, is_head);
            }
        };
        let (client, guard) = (self.client.clone(), accounting.guard.one_more());
        let asked = Asked { request, intent, body, respond, user: Arc::clone(&self.users) };
        let tracker = context.tracker.clone();
        // Boxed: h2 keeps its waker, and with that the task's memory, until somebody else waits for this stream. Without its future that is
        // little.
        tracker.spawn(Box::pin(context.serve_stream(asked, client, guard)));
    }
}

/// A client's connection, of which frames are counted that are for nothing.
#[derive(Debug)]
struct Watched {
    stream: Kept,
    floods: Floods,
    is_flooded: Arc<AtomicBool>,
}

impl AsyncRead for Watched {
    fn poll_read(self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.is_flooded.load(Ordering::Relaxed) {
            // Whoever drives it looks at this next.
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, buffer);
        if read.is_ready() && !this.floods.received(&buffer.filled()[before..]) {
            this.is_flooded.store(true, Ordering::Relaxed);
        }
        read
    }
}

impl AsyncWrite for Watched {
    fn poll_write(self: Pin<&mut Self>, cx: &mut TaskContext<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let wrote = Pin::new(&mut this.stream).poll_write(cx, bytes);
        this.count(wrote)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let wrote = Pin::new(&mut this.stream).poll_write_vectored(cx, bytes);
        this.count(wrote)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

impl Watched {
    fn count(&mut self, wrote: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(count)) = &wrote {
            self.floods.sent(*count);
        }
        wrote
    }
}
