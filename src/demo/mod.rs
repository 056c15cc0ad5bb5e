//! The embedded backend of `tidegate demo`: a page, an echo, a room where everybody hears everybody, and a feed.
//!
//! It promises to end as it asks others to end: every WebSocket gets a Close frame, an answer to its own, a FIN, and a
//! reader until the client's FIN. It knows nothing of tidegate; it is an ordinary server that happens to be in the same
//! process. Deliberately not in it: TLS, compression, subprotocols, request bodies, any memory of what was said.
//!
//! | path | what it does |
//! |---|---|
//! | `GET /` | a page that connects to one of the next three |
//! | `/echo` | a WebSocket that sends back text and binary |
//! | `/broadcast` | a WebSocket; what one client sends all get, and every 5 s the time and the number of watchers |
//! | `/feed` | a WebSocket that says ten times a second where a vehicle is, the same to all, and hears nobody |
//! | `GET /feed/connections` | how many WebSockets of `/feed` are open, and how many were opened since the start |
//! | `GET /healthz` | 200 |

mod feed;
mod instructions;
mod room;
mod session;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, SEC_WEBSOCKET_VERSION, UPGRADE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::io::Errno;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_tungstenite::tungstenite;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tungstenite::error::ProtocolError;
use tungstenite::handshake::server::create_response_with_body;

use feed::Feed;
pub use instructions::instructions;
use room::Room;

/// The path of what is the same for everybody, and needs one connection only.
pub const FEED: &str = "/feed";

const PAGE: &str = include_str!("page.html");

/// The page is whole: it may load nothing, and open nothing but a `WebSocket`.
const PAGE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self' ws: wss:";

/// The pause after an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Every bound of the demo. Not a user's business, so not in proxy.toml; a value, so that tests can make them small.
#[derive(Debug, Clone)]
struct Limits {
    /// Open connections, HTTP and WebSocket; the next ones wait in the accept queue.
    connections: usize,
    /// An HTTP request's header, from the connection or the last response on.
    header_timeout: Duration,
    /// The largest HTTP request header, in bytes.
    header_bytes: usize,
    /// The most header fields of a request.
    header_count: usize,
    /// How long a connection may stay HTTP, all its requests together.
    http_age: Duration,
    /// How long an HTTP connection that was asked to end may take for the response under way.
    http_end: Duration,
    /// The largest message of `/echo`, in bytes: what tidegate lets through by default.
    echo_message: usize,
    /// The largest message of `/broadcast`, in bytes, and of what clients say to `/feed`.
    broadcast_message: usize,
    /// Messages that may wait for one client of `/broadcast` or `/feed`; at one more it is too slow.
    queue: usize,
    /// Between two ticks of `/broadcast`.
    tick: Duration,
    /// Between two messages of `/feed`.
    feed_tick: Duration,
    /// How long a client may take for one message.
    write_timeout: Duration,
    /// For our Close to be taken and answered.
    close_timeout: Duration,
    /// After our FIN, for the client's.
    linger: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            header_timeout: Duration::from_secs(10),
            header_bytes: 16 << 10,
            header_count: 100,
            http_age: Duration::from_mins(10),
            http_end: Duration::from_secs(2),
            echo_message: 16 << 20,
            broadcast_message: 64 << 10,
            queue: 64,
            tick: Duration::from_secs(5),
            feed_tick: Duration::from_millis(100),
            write_timeout: Duration::from_secs(30),
            close_timeout: Duration::from_secs(2),
            linger: Duration::from_secs(2),
        }
    }
}

/// What all connections of one demo share.
#[derive(Debug)]
struct Demo {
    limits: Limits,
    room: Room,
    feed: Feed,
    tasks: TaskTracker,
    /// Cancelled: no more requests, and Close 1001 to every WebSocket.
    stop: CancellationToken,
}

/// Serves the demo backend on `listener` until `shutdown`; then every client gets Close 1001, and the last one has
/// ended, or used up its time (about 4 s), when this returns.
///
/// Dropping the future instead has the clients ended in the same way, with nobody waiting for it.
///
/// # Errors
/// Only when the listener itself is broken. What goes wrong on one connection ends that one alone; for want of
/// descriptors or memory it waits.
pub async fn serve(listener: TcpListener, shutdown: CancellationToken) -> io::Result<()> {
    serve_within(Limits::default(), listener, shutdown).await
}

async fn serve_within(limits: Limits, listener: TcpListener, shutdown: CancellationToken) -> io::Result<()> {
    let stop = shutdown.child_token();
    let stop_when_dropped = stop.clone().drop_guard();
    let permits = Arc::new(Semaphore::new(limits.connections));
    let demo = Arc::new(Demo { limits, room: Room::default(), feed: Feed::default(), tasks: TaskTracker::new(), stop });

    demo.tasks.spawn({
        let demo = Arc::clone(&demo);
        async move { demo.stop.run_until_cancelled(demo.room.tick(demo.limits.tick)).await }
    });
    demo.tasks.spawn({
        let demo = Arc::clone(&demo);
        async move { demo.stop.run_until_cancelled(demo.feed.run(demo.limits.feed_tick)).await }
    });
    let result = demo.stop.run_until_cancelled(accept(&demo, &listener, &permits)).await;

    drop(stop_when_dropped);
    // New connections are refused from here on, rather than left unanswered in a queue.
    drop(listener);
    demo.tasks.close();
    demo.tasks.wait().await;
    match result {
        Some(Err(error)) => Err(error),
        Some(Ok(never)) => match never {},
        None => Ok(()),
    }
}

/// Accepts for ever, and ends only with the listener.
async fn accept(demo: &Arc<Demo>, listener: &TcpListener, permits: &Arc<Semaphore>) -> io::Result<Infallible> {
    loop {
        let permit = Arc::clone(permits).acquire_owned().await.expect("nobody closes the semaphore");
        match listener.accept().await {
            Ok((stream, _)) => {
                prepare(&stream);
                demo.tasks.spawn(serve_http(Arc::clone(demo), stream, permit));
            }
            Err(error) => match Errno::from_io_error(&error) {
                // The client left while it waited.
                Some(Errno::CONNABORTED | Errno::INTR) => {}
                Some(Errno::BADF | Errno::INVAL | Errno::NOTSOCK) => return Err(error),
                // A full table of descriptors stays full for a while; without a pause this loop would spin.
                _ => {
                    tracing::warn!(%error, "the demo backend cannot accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

/// Small messages leave at once, and a client that vanished is noticed without a word on the WebSocket: Pings of ours
/// would show up in what the visitor came to see.
fn prepare(stream: &TcpStream) {
    let keepalive =
        socket2::TcpKeepalive::new().with_time(Duration::from_mins(1)).with_interval(Duration::from_secs(15));
    // Failing, either leaves a connection that works, and that a write or the client's end will end.
    let _ = stream.set_nodelay(true);
    let _ = socket2::SockRef::from(stream).set_tcp_keepalive(&keepalive);
}

/// The HTTP part of a connection. A WebSocket goes on in a task of its own, so that hyper's buffers are gone by then.
async fn serve_http(demo: Arc<Demo>, stream: TcpStream, permit: OwnedSemaphorePermit) {
    let permit = Arc::new(permit);
    let limits = demo.limits.clone();
    let stop = demo.stop.clone();
    let service = service_fn(|request| {
        let response = answer(&demo, request, &permit);
        async { Ok::<_, Infallible>(response) }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.header_timeout)
            .max_buf_size(limits.header_bytes)
            .max_headers(limits.header_count)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
    );
    let ended = tokio::select! {
        ended = &mut connection => Some(ended),
        () = stop.cancelled() => None,
        () = tokio::time::sleep(limits.http_age) => None,
    };
    let ended = if let Some(ended) = ended {
        ended
    } else {
        connection.as_mut().graceful_shutdown();
        tokio::time::timeout(limits.http_end, connection).await.unwrap_or(Ok(()))
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection to the demo backend ended before its time");
    }
}

fn answer(demo: &Arc<Demo>, request: Request<Incoming>, permit: &Arc<OwnedSemaphorePermit>) -> Response<Full<Bytes>> {
    match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/") => {
            let mut response = Response::new(Full::from(PAGE));
            let headers = response.headers_mut();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
            headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(PAGE_POLICY));
            headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
            response
        }
        (&Method::GET | &Method::HEAD, "/healthz") => plain(StatusCode::OK, "ok\n"),
        (_, "/echo") => upgrade(demo, request, permit, session::Kind::Echo),
        (_, "/broadcast") => upgrade(demo, request, permit, session::Kind::Broadcast),
        (_, FEED) => upgrade(demo, request, permit, session::Kind::Feed),
        (&Method::GET | &Method::HEAD, "/feed/connections") => plain(StatusCode::OK, demo.feed.connections()),
        _ => plain(StatusCode::NOT_FOUND, "there is /, /echo, /broadcast, /feed, /feed/connections and /healthz\n"),
    }
}

fn upgrade(
    demo: &Arc<Demo>,
    mut request: Request<Incoming>,
    permit: &Arc<OwnedSemaphorePermit>,
    kind: session::Kind,
) -> Response<Full<Bytes>> {
    match create_response_with_body(&request, Full::default) {
        Ok(response) => {
            let upgraded = hyper::upgrade::on(&mut request);
            demo.tasks.spawn(session::run(Arc::clone(demo), upgraded, kind, Arc::clone(permit)));
            response
        }
        Err(error) => {
            let asked = !matches!(
                error,
                tungstenite::Error::Protocol(
                    ProtocolError::MissingUpgradeWebSocketHeader
                        | ProtocolError::MissingConnectionUpgradeHeader
                        | ProtocolError::MissingSecWebSocketVersionHeader
                )
            );
            if asked {
                return plain(StatusCode::BAD_REQUEST, "this is no WebSocket handshake\n");
            }
            // RFC 9110 15.5.22: "The server MUST send an Upgrade header field in a 426 response".
            let mut response = plain(StatusCode::UPGRADE_REQUIRED, "this path speaks WebSocket\n");
            response.headers_mut().insert(UPGRADE, HeaderValue::from_static("websocket"));
            response.headers_mut().insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
            response
        }
    }
}

fn plain(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
