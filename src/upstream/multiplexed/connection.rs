//! One HTTP/2 connection to a backend: opened, driven, and ended in order. Its streams are `mod.rs`'s matter.
//!
//! ```text
//! dial, in turn -> preface, SETTINGS -> the backend's SETTINGS, in time -> does it take extended CONNECT? -> driven by a task of
//! its own: GOAWAY and limits reported, pings -> nobody uses it: GOAWAY -> its socket has its last wait like every other
//! ```

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use h2::{
    Ping, PingPong, Reason, SendStream,
    client::{Builder, ResponseFuture, SendRequest},
};
use http::Request;
use tokio::{
    sync::Notify,
    time::{Instant, Sleep, sleep, sleep_until, timeout},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tracing::debug;

use super::{Home, STREAM_WINDOW, Without};
use crate::{
    net::{Back, Lent, Stream, lend},
    pool::Reports,
    upstream::{Config, endpoints::Endpoint},
};

/// A backend that speaks HTTP/2 says so at once: SETTINGS are the first it sends. One that waits for the end of a request in
/// HTTP/1.1 says nothing, and its client waits for this.
const SETTINGS_TIMEOUT: Duration = Duration::from_secs(2);

/// For so long a connection that has refused a stream gets no more than it then had.
const LOWERED: Duration = Duration::from_secs(5);

/// For GOAWAY to be taken.
const FAREWELL: Duration = Duration::from_secs(2);

/// Bytes that a connection reads in a turn, so that those whose they are have theirs: they join small frames, of which h2 would keep
/// each in a few hundred bytes, and never give back the room for the most that there were.
const TURN: usize = 64 << 10;

/// What small frames may take beyond their length, as h2 counts it: each of less than 256 bytes as if it had as many. A turn of the
/// smallest messages (2 bytes, 11 with their frame) comes to 2 MiB; that what is not read is not counted, see `Tunnel`.
const SMALL_FRAMES: usize = 8 << 20;

/// What one stream may have waiting for the backend's windows.
const SEND_BUFFER: usize = 64 << 10;

/// What leases give access to. Dropped, or told to, it ends as soon as no stream is left.
#[derive(Debug)]
pub(in crate::upstream) struct Connection {
    sender: SendRequest<Bytes>,
    /// Streams that were begun.
    uses: AtomicUsize,
    /// With so many it takes nobody else; 0: it takes any number.
    max_uses: usize,
    reports: Arc<Told>,
    over: CancellationToken,
    shown: Arc<Shown>,
}

/// What this connection has shown of its backend.
#[derive(Debug, Default)]
struct Shown {
    /// It has accepted a WebSocket.
    is_proven: AtomicBool,
    /// It wanted less, which counts once.
    has_complained: AtomicBool,
    /// Streams that it may have for a while, since it refused more.
    lowered: Mutex<Option<(usize, Instant)>>,
    /// Tells the driver.
    news: Notify,
}

impl Shown {
    /// ... and until when.
    fn lowered(&self) -> Option<(usize, Instant)> {
        let mut lowered = self.lowered.lock().unwrap_or_else(PoisonError::into_inner);
        lowered.take_if(|(_, until)| *until <= Instant::now());
        *lowered
    }
}

/// What the pool is told of a connection, by its driver and by its users; `None`: that it has ended.
#[derive(Debug)]
struct Told(Mutex<Option<Reports>>);

impl Told {
    fn with(&self, tell: impl FnOnce(&Reports)) {
        if let Some(reports) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            tell(reports);
        }
    }

    fn ended(&self) {
        let reports = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Without the lock.
        drop(reports);
    }
}

impl Connection {
    /// Begins a stream. An error: it has just ended, or is about to.
    pub(super) fn begin(&self, request: Request<()>) -> Result<(ResponseFuture, SendStream<Bytes>), h2::Error> {
        let begun = self.sender.clone().send_request(request, false)?;
        if self.uses.fetch_add(1, Ordering::Relaxed) + 1 == self.max_uses {
            self.reports.with(Reports::go_away);
        }
        Ok(begun)
    }

    /// It has accepted a WebSocket: whatever it refuses from now on, it refuses for what it is.
    pub(super) fn prove(&self) {
        self.shown.is_proven.store(true, Ordering::Relaxed);
    }

    /// See [`Connection::prove`].
    pub(super) fn is_proven(&self) -> bool {
        self.shown.is_proven.load(Ordering::Relaxed)
    }

    /// It refuses a stream that it said it would take, and `has` others: for a while it gets no more than these.
    pub(super) fn refuses(&self, has: usize) {
        *self.shown.lowered.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((has.max(1), Instant::now() + LOWERED));
        // At once, so that whoever was refused does not get this one again.
        self.reports.with(|reports| reports.capacity(has.max(1)));
        self.shown.news.notify_one();
    }

    /// It wants less. True: for the first time.
    pub(super) fn complains(&self) -> bool {
        self.shown.news.notify_one();
        !self.shown.has_complained.swap(true, Ordering::Relaxed)
    }

    /// Nobody uses it any more.
    pub(super) fn end(&self) {
        self.over.cancel();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.end();
    }
}

/// Makes a connection of a stream, and leaves it to a task; gives it with the streams that it may have.
pub(super) async fn open(
    stream: Stream,
    config: &Config,
    endpoint: &Arc<Endpoint>,
    home: &Home,
    reports: Reports,
) -> Result<(Connection, usize), Without> {
    let (header_bytes, config) = (config.header_bytes, &config.pool);
    let (lent, back) = lend(stream);
    let end = Arc::clone(&home.end);
    // Its socket has been used: it is ended in order, whatever comes of this, also when it is given up.
    let ending = Ending { back: Arc::clone(&back), end };
    let limit = endpoint.knowledge.streams(config.max_streams);
    let mut builder = Builder::new();
    builder
        .enable_push(false)
        // None before its SETTINGS have come.
        .initial_max_send_streams(0)
        .initial_window_size(STREAM_WINDOW)
        // All streams unread at the same time must leave none without a window (hyper#2899).
        .initial_connection_window_size(connection_window(config.max_streams))
        .max_send_buffer_size(SEND_BUFFER)
        .max_header_list_size(u32::try_from(header_bytes).unwrap_or(u32::MAX))
        .data_frame_budget(SMALL_FRAMES)
        // What comes for a stream that we have reset is passed over, for as many as may have been.
        .max_concurrent_reset_streams(config.max_streams.saturating_mul(4))
        .max_local_error_reset_streams(None);
    let greeted = timeout(SETTINGS_TIMEOUT, async {
        let (sender, mut connection) = builder.handshake(lent).await?;
        let pings = connection.ping_pong();
        poll_fn(|cx| {
            if let Poll::Ready(result) = Pin::new(&mut connection).poll(cx) {
                return Poll::Ready(Err(result.err()));
            }
            if sender.current_max_send_streams() == 0 {
                return Poll::Pending;
            }
            Poll::Ready(Ok(()))
        })
        .await
        .map_err(|error: Option<h2::Error>| error.unwrap_or_else(|| Reason::PROTOCOL_ERROR.into()))?;
        let takes_websockets = sender.is_extended_connect_protocol_enabled();
        Ok::<_, h2::Error>((sender, connection, pings, takes_websockets))
    });
    let (sender, connection, pings, takes_websockets) = match greeted.await {
        Ok(Ok(greeted)) => greeted,
        Ok(Err(error)) => {
            debug!(backend = endpoint.name(), %error, "no HTTP/2");
            // What h2 itself objects to are bytes that came.
            return Err(if error.is_library() { Without::Http2 } else { Without::Closed });
        }
        Err(_) => return Err(Without::Settings),
    };
    endpoint.knowledge.has_spoken();
    let (reports, over) = (Arc::new(Told(Mutex::new(Some(reports)))), CancellationToken::new());
    let shown = Arc::new(Shown::default());
    let peer_max = connection.max_concurrent_send_streams();
    let driver = Driver {
        connection,
        probe: Some(sender.clone()),
        over: Box::pin(over.clone().cancelled_owned()),
        is_leaving: false,
        farewell: None,
        pings: pings.zip(config.ping_interval).map(|(pings, interval)| Pings::new(pings, interval)),
        back,
        max_streams: config.max_streams,
        capacity: limit.min(peer_max),
        endpoint: Arc::clone(endpoint),
        reports: Arc::clone(&reports),
        shown: Arc::clone(&shown),
    };
    let capacity = driver.capacity;
    home.tracker.spawn(async move {
        // In this order: the connection goes first, and gives its socket back.
        driver.drive().await;
        drop(ending);
    });
    let (uses, max_uses) = (AtomicUsize::new(0), config.max_uses);
    let connection = Connection { sender, uses, max_uses, reports, over, shown };
    if !takes_websockets {
        return Err(Without::Extension);
    }
    Ok((connection, capacity))
}

/// At most what HTTP/2 allows.
fn connection_window(max_streams: usize) -> u32 {
    let window = u32::try_from(max_streams).unwrap_or(u32::MAX).saturating_mul(STREAM_WINDOW);
    window.clamp(STREAM_WINDOW, (1 << 31) - 1)
}

/// Lets a connection run until its end.
struct Driver {
    connection: h2::client::Connection<Lent<Stream>, Bytes>,
    /// Tells whether streams may still be begun; `None`: none are to be, and the connection ends with the last of them.
    probe: Option<SendRequest<Bytes>>,
    over: Pin<Box<WaitForCancellationFutureOwned>>,
    /// It was said that it gets no more streams.
    is_leaving: bool,
    /// For the end.
    farewell: Option<Pin<Box<Sleep>>>,
    pings: Option<Pings>,
    back: Arc<Back<Stream>>,
    max_streams: usize,
    /// Streams as reported last.
    capacity: usize,
    endpoint: Arc<Endpoint>,
    reports: Arc<Told>,
    shown: Arc<Shown>,
}

/// Why a connection has come to its end.
enum Ended {
    /// Orderly, or by an error.
    Result(Result<(), h2::Error>),
    /// It answered no ping.
    Silent,
    /// It did not take our GOAWAY.
    Late,
}

impl Driver {
    async fn drive(mut self) {
        let shown = Arc::clone(&self.shown);
        let ended = loop {
            let until = shown.lowered().map_or_else(|| Instant::now() + LOWERED, |(_, until)| until);
            tokio::select! {
                biased;
                ended = poll_fn(|cx| self.poll(cx)) => break ended,
                () = shown.news.notified() => {}
                () = sleep_until(until), if self.has_less() => {}
            }
        };
        let backend = self.endpoint.name();
        match &ended {
            Ended::Result(Ok(())) => {}
            Ended::Result(Err(error)) => {
                let is_tired = error.is_remote() && error.reason() == Some(Reason::ENHANCE_YOUR_CALM);
                if is_tired && !shown.has_complained.swap(true, Ordering::Relaxed) {
                    self.endpoint.knowledge.calm_down(backend, self.max_streams);
                }
                debug!(backend, %error, "a shared connection has ended");
            }
            Ended::Silent => debug!(backend, "a shared connection answers no ping: it is given up"),
            Ended::Late => debug!(backend, "a shared connection does not take its end"),
        }
        // The pool hears of it before its streams do, so that none of those who then come again get this one.
        self.reports.ended();
    }

    /// Streams that both sides want.
    fn wanted(&self) -> usize {
        let wanted = self.endpoint.knowledge.streams(self.max_streams);
        let lowered = self.shown.lowered().map_or(usize::MAX, |(streams, _)| streams);
        wanted.min(lowered).min(self.connection.max_concurrent_send_streams())
    }

    /// There are less than were configured, which may not be for ever.
    fn has_less(&self) -> bool {
        self.capacity < self.max_streams
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        if self.probe.is_some() && self.over.as_mut().poll(cx).is_ready() {
            self.probe = None;
            self.farewell = Some(Box::pin(sleep(FAREWELL)));
        }
        self.back.begin_turn(TURN);
        if let Poll::Ready(result) = Pin::new(&mut self.connection).poll(cx) {
            return Poll::Ready(Ended::Result(result));
        }
        if let Some(probe) = &mut self.probe
            && !self.is_leaving
        {
            // An error here is a GOAWAY that has come, which h2 says in no other way as long as there are streams.
            self.is_leaving = matches!(probe.poll_ready(cx), Poll::Ready(Err(_)));
            if self.is_leaving {
                debug!(backend = self.endpoint.name(), "a shared connection takes nobody else");
                self.reports.with(Reports::go_away);
            }
            let capacity = self.wanted();
            if capacity != self.capacity {
                self.capacity = capacity;
                self.reports.with(|reports| reports.capacity(capacity));
            }
        }
        if let Some(farewell) = &mut self.farewell
            && farewell.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Ended::Late);
        }
        if let Some(pings) = &mut self.pings
            && pings.poll(cx, &self.back).is_ready()
        {
            return Poll::Ready(Ended::Silent);
        }
        Poll::Pending
    }
}

/// Asks a silent connection whether it is there.
struct Pings {
    sender: PingPong,
    interval: Duration,
    timer: Pin<Box<Sleep>>,
    is_asked: bool,
}

impl Pings {
    fn new(sender: PingPong, interval: Duration) -> Self {
        Self { sender, interval, timer: Box::pin(sleep(interval)), is_asked: false }
    }

    /// Ready: it is not.
    fn poll(&mut self, cx: &mut Context<'_>, back: &Back<Stream>) -> Poll<()> {
        while self.timer.as_mut().poll(cx).is_ready() {
            // Whatever came is an answer.
            let was_heard = back.was_heard();
            if self.is_asked && !was_heard {
                return Poll::Ready(());
            }
            self.is_asked = !was_heard;
            if self.is_asked {
                // An earlier one may not be answered yet: then that is the question.
                let _ = self.sender.send_ping(Ping::opaque());
            }
            self.timer.as_mut().reset(Instant::now() + self.interval);
        }
        // So that the next one can be sent.
        let _ = self.sender.poll_pong(cx);
        Poll::Pending
    }
}

/// Hands the socket over to its last wait, when the connection has given it back.
struct Ending {
    back: Arc<Back<Stream>>,
    end: Arc<super::End>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        if let Some(stream) = self.back.take() {
            (self.end)(stream);
        }
    }
}
