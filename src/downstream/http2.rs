//! Requests on streams of HTTP/2: what they are, and what of them and of their answers may be passed on; and who floods a connection.
//!
//! A request becomes what it would be over HTTP/1.1 (RFC 9113 8, RFC 8441), and is then judged by the same rules (`handshake.rs`). What
//! h2 itself objects to never gets here: it resets streams for pseudo-headers that lack, repeat or come late, for upper case, for
//! connection-specific fields, and for a `TE` other than `trailers`, and answers a header that is too large with 431.

use std::{
    pin::Pin,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Instant, SystemTime},
};

use bytes::Bytes;
use h2::{RecvStream, ext::Protocol, server::Builder};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version,
    header::{
        CONNECTION, CONTENT_LENGTH, COOKIE, DATE, HOST, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, TRANSFER_ENCODING,
        UPGRADE,
    },
    uri::{Authority, PathAndQuery},
};
use http_body::{Body, Frame, SizeHint};
use tokio_tungstenite::tungstenite::handshake::client::generate_key;

use super::{
    Config,
    handshake::{Intent, Refusal, intent, refuse},
};

/// `[http2]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Http2 {
    /// Clients may speak it.
    pub is_on: bool,
    /// Streams of a connection at once.
    pub max_streams: usize,
}

/// What a stream may have under way toward us; also the most that is kept of one that is not read.
const STREAM_WINDOW: u32 = 64 << 10;

/// What a stream may have waiting for the client.
const SEND_BUFFER: usize = 32 << 10;

/// What small frames that are not read may take beyond their length, as h2 counts it (see `upstream/multiplexed/connection.rs`).
const SMALL_FRAMES: usize = 4 << 20;

/// Streams in a connection's life that h2 resets for what their client did wrong; the next is the connection's end (CVE-2025-8671).
const WRONGS: usize = 256;

/// Requests that are reset before anybody has looked at them; the next is the connection's end (CVE-2023-44487).
const UNSEEN: usize = 20;

/// How every connection over which somebody may speak HTTP/2 with prior knowledge begins (RFC 9113 3.4), as far as no request of
/// HTTP/1.1 does.
pub fn begins_http2(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PRI ")
}

/// The HTTP/2 server side of a connection.
pub fn stream_server(config: &Config) -> Builder {
    let max_streams = u32::try_from(config.http2.max_streams).unwrap_or(u32::MAX);
    let mut builder = Builder::new();
    builder
        .enable_connect_protocol()
        .max_concurrent_streams(max_streams)
        .initial_window_size(STREAM_WINDOW)
        // All streams unread at the same time must leave none without a window.
        .initial_connection_window_size(STREAM_WINDOW.saturating_mul(max_streams).clamp(STREAM_WINDOW, (1 << 31) - 1))
        .max_send_buffer_size(SEND_BUFFER)
        .max_header_list_size(u32::try_from(config.header_bytes).unwrap_or(u32::MAX))
        .data_frame_budget(SMALL_FRAMES)
        // What comes for a stream that we have reset is passed over.
        .max_concurrent_reset_streams(config.http2.max_streams.saturating_mul(2))
        .max_pending_accept_reset_streams(UNSEEN)
        .max_local_error_reset_streams(Some(WRONGS));
    builder
}

/// Makes a stream's request what it would be over HTTP/1.1, and reads what it wants. `is_over`: its header was all of it.
///
/// # Errors
///
/// What the client is to be answered; the backend never sees it.
pub fn from_stream(request: &mut Request<()>, is_over: bool, config: &Config) -> Result<Intent, Refusal> {
    let bad = |reason| Err(refuse(StatusCode::BAD_REQUEST, reason));
    let protocol = request.extensions_mut().remove::<Protocol>();
    let is_websocket = match protocol {
        Some(protocol) if protocol.as_str().eq_ignore_ascii_case("websocket") => true,
        Some(_) => return Err(refuse(StatusCode::NOT_IMPLEMENTED, "the only :protocol here is websocket")),
        // What is left of these is for `intent` to refuse.
        None => false,
    };
    if request.method() == Method::CONNECT && !is_websocket {
        return Err(refuse(StatusCode::METHOD_NOT_ALLOWED, "CONNECT is not supported"));
    }
    // h2 lets any scheme through, and drops it where there is no authority.
    if !matches!(request.uri().scheme_str(), None | Some("http" | "https")) {
        return bad("the scheme must be http or https");
    }
    let authority = request.uri().authority().cloned();
    let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    // "... an absolute path, or '*' for OPTIONS" (RFC 9113 8.3.1). Of a path that is a fragment alone nothing is left, which shows in
    // the target only.
    let is_asterisk = request.method() == Method::OPTIONS && path.as_str() == "*";
    let is_absolute = path.as_str().starts_with('/');
    let target = Uri::from(path);
    if !(is_asterisk || is_absolute && !target.path().is_empty()) {
        return bad("the path must begin with /");
    }
    if authority.as_ref().is_some_and(|authority| authority.as_str().contains('@')) {
        return bad("the target has no valid form");
    }
    *request.uri_mut() = target;
    *request.version_mut() = Version::HTTP_11;
    let headers = request.headers_mut();
    if let Some(reason) = take_host(headers, authority.as_ref()) {
        return bad(reason);
    }
    join_cookies(headers);
    if headers.len() > config.header_count {
        return Err(refuse(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "too many header fields"));
    }
    if headers.get_all(CONTENT_LENGTH).iter().count() > 1 {
        return bad("there is more than one Content-Length");
    }
    if is_over && headers.get_all(CONTENT_LENGTH).iter().any(|length| length.as_bytes() != b"0") {
        return bad("Content-Length does not fit the body");
    }
    if !is_websocket && !is_over && !headers.contains_key(CONTENT_LENGTH) {
        // It says where the body ends; of a GET without it there would be none.
        headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    if is_websocket {
        if is_over {
            return bad("a WebSocket must not end with its handshake");
        }
        *request.method_mut() = Method::GET;
        let headers = request.headers_mut();
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        // "these header fields are not used" (RFC 8441 5); whoever is asked over HTTP/1.1 needs one.
        let key = HeaderValue::from_str(&generate_key());
        headers.insert(SEC_WEBSOCKET_KEY, key.map_err(|_| refuse(StatusCode::BAD_REQUEST, "no key"))?);
    }
    intent(request)
}

/// Host is made of the authority. "... a request that contains a Host header field that differs from the :authority ... SHOULD be
/// treated as malformed" (RFC 9113 8.3.1). `Some`: why it can't be.
fn take_host(headers: &mut HeaderMap, authority: Option<&Authority>) -> Option<&'static str> {
    let authority = authority?;
    let mut hosts = headers.get_all(HOST).iter();
    let (first, more) = (hosts.next(), hosts.next());
    if more.is_some() || first.is_some_and(|host| !host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes()))
    {
        return Some("Host differs from :authority");
    }
    match HeaderValue::from_str(authority.as_str()) {
        Ok(host) => _ = headers.insert(HOST, host),
        Err(_) => return Some("the target has no valid form"),
    }
    None
}

/// "If there are multiple Cookie header fields after decompression, these MUST be concatenated into a single octet string using the
/// two-octet delimiter of 0x3b, 0x20 ... before being passed into a non-HTTP/2 context" (RFC 9113 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let crumbs = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes);
    // An empty one would leave a delimiter at the end, of which HTTP/1.1 does not keep the space.
    let crumbs: Vec<&[u8]> = crumbs.filter(|crumb| !crumb.is_empty()).collect();
    if headers.get_all(COOKIE).iter().count() > 1
        && let Ok(cookie) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..]))
    {
        headers.insert(COOKIE, cookie);
    }
}

/// Makes an answer one for a stream: a 101 becomes the 200 of RFC 8441, and what is about a connection goes (RFC 9113 8.2.2), without
/// which h2 would not send it. `Date` comes, as hyper has it come.
pub fn stream_response<B>(response: &mut Response<B>) {
    static GONE: LazyLock<[HeaderName; 5]> = LazyLock::new(|| {
        let named = ["keep-alive", "proxy-connection"].map(HeaderName::from_static);
        let [keep_alive, proxy_connection] = named;
        [CONNECTION, UPGRADE, TRANSFER_ENCODING, keep_alive, proxy_connection]
    });
    *response.version_mut() = Version::HTTP_2;
    for name in &*GONE {
        response.headers_mut().remove(name);
    }
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        *response.status_mut() = StatusCode::OK;
        response.headers_mut().remove(SEC_WEBSOCKET_ACCEPT);
        return;
    }
    if !response.headers().contains_key(DATE)
        && let Ok(date) = HeaderValue::from_str(&httpdate::fmt_http_date(SystemTime::now()))
    {
        response.headers_mut().insert(DATE, date);
    }
}

/// The body of a request on a stream. What was not passed on is not given back to the client's flow control.
#[derive(Debug)]
pub struct StreamBody {
    recv: RecvStream,
    /// Bytes that were read last; whoever asks for more has passed them on.
    lent: usize,
    has_data_ended: bool,
    wanted: Arc<AtomicBool>,
}

impl StreamBody {
    /// Of a stream. `wanted` becomes true when it is first read, which is when its client should be told to go on (`Expect`).
    pub const fn new(recv: RecvStream, wanted: Arc<AtomicBool>) -> Self {
        Self { recv, lent: 0, has_data_ended: false, wanted }
    }
}

impl Body for StreamBody {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        let this = self.get_mut();
        this.wanted.store(true, Ordering::Relaxed);
        let lent = std::mem::take(&mut this.lent);
        // Fails only when more is given back than came.
        let _ = this.recv.flow_control().release_capacity(lent);
        if !this.has_data_ended {
            if let Some(data) = ready!(this.recv.poll_data(cx)) {
                let data = data?;
                this.lent = data.len();
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            this.has_data_ended = true;
        }
        let trailers = ready!(this.recv.poll_trailers(cx))?;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.recv.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

/// Counts the frames of a client that bring nobody anything, and that h2 answers, or passes over, any number of: PING, SETTINGS, PRIORITY,
/// `WINDOW_UPDATE`, `RST_STREAM` and those that nobody knows. DATA and headers are h2's to bound.
///
/// It sees what comes and what goes out, and looks at the headers of frames only.
#[derive(Debug)]
pub struct Floods {
    /// Bytes until the next frame's header.
    skip: u64,
    /// The preface comes first.
    header: [u8; 9],
    filled: usize,
    /// What may still come.
    left: [Allowance; 3],
}

/// What one kind of frame may be.
#[derive(Debug, Clone, Copy)]
struct Allowance {
    count: f64,
    max: f64,
    per_second: f64,
    at: Instant,
}

/// Length of the preface (RFC 9113 3.4).
const PREFACE: u64 = 24;

/// Frames at once, and in each second: of those that ask for an answer or for nothing, streams that are reset, and windows that are
/// opened without having been used. Browsers ping every few seconds, and some once per DATA frame to measure the path.
const CALM: (f64, f64) = (10_000.0, 1_000.0);
const RESETS: (f64, f64) = (1_000.0, 100.0);
const WINDOWS: (f64, f64) = (20_000.0, 2_000.0);

/// A window may be opened for each so many bytes that went out: one for the stream and one for the connection per smallest message.
const BYTES_PER_WINDOW: f64 = 5.0;

impl Allowance {
    fn new((max, per_second): (f64, f64)) -> Self {
        Self { count: max, max, per_second, at: Instant::now() }
    }

    /// False: it is used up.
    fn take(&mut self) -> bool {
        if self.count < 1.0 {
            let now = Instant::now();
            self.count = (self.count + (now - self.at).as_secs_f64() * self.per_second).min(self.max);
            self.at = now;
            if self.count < 1.0 {
                return false;
            }
        }
        self.count -= 1.0;
        true
    }
}

impl Default for Floods {
    fn default() -> Self {
        Self { skip: PREFACE, header: [0; 9], filled: 0, left: [CALM, RESETS, WINDOWS].map(Allowance::new) }
    }
}

impl Floods {
    /// So many bytes went out.
    #[expect(clippy::cast_precision_loss, reason = "bytes of one write")]
    pub fn sent(&mut self, bytes: usize) {
        let windows = &mut self.left[2];
        windows.count = (windows.count + bytes as f64 / BYTES_PER_WINDOW).min(windows.max);
    }

    /// These came; false: too much of it was for nothing.
    pub fn received(&mut self, mut bytes: &[u8]) -> bool {
        loop {
            let skip = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
            self.skip -= skip as u64;
            bytes = &bytes[skip..];
            if bytes.is_empty() {
                return true;
            }
            let count = bytes.len().min(self.header.len() - self.filled);
            self.header[self.filled..self.filled + count].copy_from_slice(&bytes[..count]);
            self.filled += count;
            bytes = &bytes[count..];
            if self.filled < self.header.len() {
                return true;
            }
            self.filled = 0;
            let [a, b, c, kind, ..] = self.header;
            self.skip = u64::from(u32::from_be_bytes([0, a, b, c]));
            // RFC 9113 6.
            let of = match kind {
                // DATA, HEADERS, GOAWAY, CONTINUATION: GOAWAY is the last but one of a connection, and ends it when it comes often.
                0 | 1 | 9 => continue,
                3 => 1,
                8 => 2,
                _ => 0,
            };
            if !self.left[of].take() {
                return false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).expect("a short one");
        [&[0, 0, length, kind, 0, 0, 0, 0, 1], payload].concat()
    }

    fn begun() -> Floods {
        let mut floods = Floods::default();
        assert!(floods.received(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"));
        floods
    }

    /// Frames that are for something pass in any number, whatever is in them, and however they are cut.
    #[test]
    fn data_is_no_flood() {
        let one = [frame(0, &frame(6, &[0; 8])), frame(1, b"a header"), frame(9, b"")].concat();
        for size in [1, 2, 7, 10, 1000] {
            let mut floods = begun();
            let many = one.repeat(20_000);
            assert!(many.chunks(size).all(|piece| floods.received(piece)), "in pieces of {size}");
        }
    }

    /// Each kind has an allowance of its own; windows may be opened for what went out.
    #[test]
    fn what_is_for_nothing_is_counted() {
        for (kind, least) in [(2, 10_000), (4, 10_000), (6, 10_000), (0x42, 10_000), (3, 1_000), (8, 20_000)] {
            let mut floods = begun();
            let one = frame(kind, &[0, 0, 0, 1]);
            let passed = (0..200_000).take_while(|_| floods.received(&one)).count();
            // While this went on some more were allowed.
            assert!((least..200_000).contains(&passed), "{kind}: {passed}");
            if kind == 8 {
                let again = (0..200_000).all(|_| {
                    floods.sent(10);
                    floods.received(&one) && floods.received(&one)
                });
                assert!(again, "one for the stream and one for the connection, for each byte that was sent");
            }
        }
    }

    /// What is left of a path that is a fragment alone is no path, and would be no line of HTTP/1.1.
    #[test]
    fn a_fragment_is_no_path() {
        let config = crate::config::Settings::default().downstream;
        for (path, is_one) in [("#a", false), ("?a", false), ("*", false), ("/#a", true), ("/?a", true)] {
            let mut request = Request::new(());
            let uri = Uri::builder().scheme("https").authority("a.test").path_and_query(path);
            *request.uri_mut() = uri.build().expect("what h2 takes");
            let result = from_stream(&mut request, true, &config);
            assert_eq!(result.is_ok(), is_one, "{path}: {result:?} {}", request.uri());
        }
    }

    /// A handshake on a stream, with what it becomes.
    #[test]
    fn a_handshake_becomes_one_of_http1() {
        let config = crate::config::Settings::default().downstream;
        let mut request = Request::builder()
            .method(Method::CONNECT)
            .uri("https://app.test/chat?a")
            .version(Version::HTTP_2)
            .extension(Protocol::from_static("websocket"))
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", "theirs")
            .header("cookie", "a=b")
            .header("cookie", "c=d")
            .body(())
            .expect("a request");
        assert_eq!(from_stream(&mut request, false, &config), Ok(Intent::WebSocket));
        assert_eq!((request.method(), request.uri().to_string()), (&Method::GET, "/chat?a".to_owned()));
        let headers = request.headers();
        assert_eq!(
            (&headers[HOST], &headers[COOKIE]),
            (&HeaderValue::from_static("app.test"), &HeaderValue::from_static("a=b; c=d"))
        );
        assert_eq!(headers.get_all(SEC_WEBSOCKET_KEY).iter().count(), 1);
        assert_ne!(headers[SEC_WEBSOCKET_KEY], "theirs");
    }
}
