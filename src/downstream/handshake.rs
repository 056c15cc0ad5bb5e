//! What a client's request is: a WebSocket handshake that may be passed on, a plain request, or neither.
//!
//! Only what this file calls [`Intent::WebSocket`] can ever become a tunnel.

use std::mem::MaybeUninit;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version,
    header::{
        CONNECTION, CONTENT_LENGTH, EXPECT, HOST, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, TRANSFER_ENCODING, UPGRADE,
    },
};

use super::Config;
use crate::fields::{read_header, tokens_of, write_header};

/// Elements that a `Connection` header may have: each costs a look at all headers.
const MAX_CONNECTION_OPTIONS: usize = 32;

/// See [`intent`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intent {
    /// A valid WebSocket handshake.
    WebSocket,
    /// A request to be passed on without any upgrade.
    Plain,
}

/// A request that is not passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// What the client is answered.
    pub status: StatusCode,
    /// Why, for the body and the log.
    pub reason: &'static str,
}

pub(super) const fn refuse(status: StatusCode, reason: &'static str) -> Refusal {
    Refusal { status, reason }
}

/// Header fields of a handshake that is read here; one with more is hyper's.
const MAX_HEADERS: usize = 64;

/// The handshake that `bytes` begin with, and the length of its header, when it is there as a whole and valid.
///
/// Nearly all are, and then hyper is not needed: no body, no second request. `None`: hyper shall look at it, and say what is
/// wrong if something is. Reading is httparse's work either way.
pub fn whole_handshake(bytes: &Bytes, config: &Config) -> Option<(Request<()>, usize)> {
    let mut fields = [const { MaybeUninit::uninit() }; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut []);
    let fields = &mut fields[..config.header_count.min(MAX_HEADERS)];
    let httparse::Status::Complete(length) = head.parse_with_uninit_headers(bytes, fields).ok()? else { return None };
    let target = head.path.filter(|target| target.starts_with('/'))?;
    if length > config.header_bytes || head.method != Some("GET") || head.version != Some(1) {
        return None;
    }
    let mut request = Request::new(());
    *request.uri_mut() = Uri::from_maybe_shared(bytes.slice_ref(target.as_bytes())).ok()?;
    *request.headers_mut() = read_header(head.headers, bytes)?;
    // Whatever is about a body.
    if [CONTENT_LENGTH, TRANSFER_ENCODING, EXPECT].iter().any(|name| request.headers().contains_key(name)) {
        return None;
    }
    (intent(&request) == Ok(Intent::WebSocket)).then_some((request, length))
}

/// A 101 as it goes out.
pub fn encode_switching<B>(response: &Response<B>) -> Vec<u8> {
    let mut head = Vec::with_capacity(512);
    head.extend_from_slice(b"HTTP/1.1 101 Switching Protocols\r\n");
    write_header(response.headers(), &mut head);
    head
}

/// Reads what a request wants (RFC 6455 4.2.1).
///
/// Whoever names `websocket` in `Upgrade` means a handshake, and an invalid one is refused rather than passed on as
/// something else: what the backend makes of it must not depend on how it reads a sloppy request. Any other upgrade
/// (`h2c`) is passed over, as a server may (RFC 9110 7.8), and never reaches the backend.
pub fn intent<B>(request: &Request<B>) -> Result<Intent, Refusal> {
    let headers = request.headers();
    if request.method() == Method::CONNECT {
        return Err(refuse(StatusCode::METHOD_NOT_ALLOWED, "CONNECT is not supported"));
    }
    // Authority form is for CONNECT, asterisk form for OPTIONS alone (RFC 9112 3.2), and credentials in a target are to be
    // "treated as an error" (RFC 9110 4.2.4): Host would have to be made of it.
    let target = request.uri();
    let authority = target.authority();
    if (authority.is_some() && target.scheme().is_none())
        || (target.path() == "*" && request.method() != Method::OPTIONS)
        || authority.is_some_and(|authority| !is_host(authority.as_str().as_bytes()))
    {
        return Err(refuse(StatusCode::BAD_REQUEST, "the target has no valid form"));
    }
    // "A server MUST respond with a 400 (Bad Request) status code to any HTTP/1.1 request message that lacks a Host
    // header field and to any request message that contains more than one" (RFC 9112 3.2).
    let mut hosts = headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() || (host.is_none() && request.version() == Version::HTTP_11) {
        return Err(refuse(StatusCode::BAD_REQUEST, "exactly one Host header is required"));
    }
    if host.is_some_and(|host| !is_host(host.as_bytes())) {
        return Err(refuse(StatusCode::BAD_REQUEST, "Host is no host with a port"));
    }
    let [connection, upgrade] = [CONNECTION, UPGRADE].map(|name| headers.get_all(name));
    // Bytes beyond ASCII would hide what else stands in the line.
    if [&connection, &upgrade].iter().any(|field| field.iter().any(|value| value.to_str().is_err())) {
        return Err(refuse(StatusCode::BAD_REQUEST, "Connection and Upgrade must be ASCII"));
    }
    let length = headers.get(CONTENT_LENGTH);
    // A backend that counts in 63 bits would take it for less than nothing.
    if length.is_some_and(|length| length.to_str().map_or(true, |text| text.parse::<i64>().is_err())) {
        return Err(refuse(StatusCode::BAD_REQUEST, "Content-Length is out of range"));
    }
    // hyper frames by `chunked` alone and has dropped a Content-Length beside it; another coding would reach the backend
    // unread, and what that makes of it is a guess.
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let coding = codings.next();
    if codings.next().is_some() || coding.is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"chunked")) {
        return Err(refuse(StatusCode::BAD_REQUEST, "Transfer-Encoding must be chunked, once"));
    }
    let (mut options, mut names_upgrade, mut names_more) = (0, false, false);
    for option in tokens_of(&connection).take(MAX_CONNECTION_OPTIONS + 1) {
        options += 1;
        names_upgrade |= option.eq_ignore_ascii_case("upgrade");
        names_more |= names_what_a_handshake_needs(option);
    }
    if options > MAX_CONNECTION_OPTIONS {
        return Err(refuse(StatusCode::BAD_REQUEST, "Connection lists too much"));
    }
    if !tokens_of(&upgrade).any(|protocol| protocol.eq_ignore_ascii_case("websocket")) {
        return Ok(Intent::Plain);
    }
    if request.method() != Method::GET {
        return Err(refuse(StatusCode::BAD_REQUEST, "a WebSocket handshake must be a GET"));
    }
    if request.version() != Version::HTTP_11 {
        return Err(refuse(StatusCode::BAD_REQUEST, "a WebSocket handshake must be HTTP/1.1"));
    }
    if tokens_of(&upgrade).nth(1).is_some() {
        return Err(refuse(StatusCode::BAD_REQUEST, "Upgrade names more than websocket"));
    }
    if !names_upgrade {
        return Err(refuse(StatusCode::BAD_REQUEST, "Connection does not name upgrade"));
    }
    if names_more {
        return Err(refuse(StatusCode::BAD_REQUEST, "Connection names a header that the handshake needs"));
    }
    if coding.is_some() || length.is_some_and(|length| length.as_bytes() != b"0") {
        return Err(refuse(StatusCode::BAD_REQUEST, "a WebSocket handshake must not have a body"));
    }
    if only(headers, &SEC_WEBSOCKET_VERSION).is_none_or(|version| version.as_bytes() != b"13") {
        return Err(refuse(StatusCode::UPGRADE_REQUIRED, "Sec-WebSocket-Version must be 13"));
    }
    match only(headers, &SEC_WEBSOCKET_KEY) {
        Some(key) if is_key(key.as_bytes()) => Ok(Intent::WebSocket),
        _ => Err(refuse(StatusCode::BAD_REQUEST, "Sec-WebSocket-Key must be 16 bytes in base64")),
    }
}

/// The value of a header that stands there exactly once.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a HeaderValue> {
    let mut values = headers.get_all(name).iter();
    values.next().filter(|_| values.next().is_none())
}

/// "uri-host [ ':' port ]" (RFC 9110 7.2), or nothing, "when the target URI has no authority". A comma is legal in a name, and would be
/// taken for that of a list.
fn is_host(host: &[u8]) -> bool {
    let (is_name, port) = if let Some(rest) = host.strip_prefix(b"[") {
        let Some(end) = rest.iter().position(|byte| *byte == b']') else { return false };
        (rest[..end].iter().all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b':' | b'.')), &rest[end + 1..])
    } else {
        let (name, port) = host.split_at(host.iter().position(|byte| *byte == b':').unwrap_or(host.len()));
        (name.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+;=".contains(byte)), port)
    };
    let is_port = match port {
        [] | [b':'] => true,
        [b':', digits @ ..] if digits.iter().all(u8::is_ascii_digit) => {
            std::str::from_utf8(digits).is_ok_and(|digits| digits.parse::<u16>().is_ok())
        }
        _ => false,
    };
    is_name && is_port
}

/// "a base64-encoded value that, when decoded, is 16 bytes in length" (RFC 6455 4.2.1): 22 characters and "==".
fn is_key(key: &[u8]) -> bool {
    // Trailing bits that ought to be zero are not looked at, as in other servers.
    key.split_at_checked(22).is_some_and(|(digits, padding)| {
        padding == b"==" && digits.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/'))
    })
}

fn names_what_a_handshake_needs(token: &str) -> bool {
    ["host", "origin", "content-length", "transfer-encoding"].iter().any(|name| token.eq_ignore_ascii_case(name))
        || token.get(..14).is_some_and(|start| start.eq_ignore_ascii_case("sec-websocket-"))
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        sync::{Arc, Mutex},
    };

    use http_body_util::Empty;
    use hyper::{body::Incoming, service::service_fn};
    use hyper_util::rt::TokioIo;
    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::downstream::server;

    fn config() -> Config {
        crate::config::Settings::default().downstream
    }

    const FIELDS: &str = "Host: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                          Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

    fn handshake(line: &str, more: &str) -> String {
        format!("{line}\r\n{FIELDS}{more}\r\n")
    }

    /// What hyper makes of it.
    async fn by_hyper(bytes: &[u8]) -> Option<Request<()>> {
        let seen = Arc::new(Mutex::new(None));
        let service = service_fn(|request: Request<Incoming>| {
            *seen.lock().unwrap() = Some(request.map(|_| ()));
            async { Ok::<_, Infallible>(Response::new(Empty::<bytes::Bytes>::new())) }
        });
        let (mut client, io) = tokio::io::duplex(64 << 10);
        client.write_all(bytes).await.unwrap();
        client.shutdown().await.unwrap();
        let _ = server(&config()).serve_connection(TokioIo::new(io), service).await;
        seen.lock().unwrap().take()
    }

    /// Whichever way a handshake is read, it is the same; and what is no handshake, or not whole, is hyper's.
    #[tokio::test]
    async fn a_whole_handshake_is_what_hyper_says() {
        for (line, more) in [
            ("GET / HTTP/1.1", ""),
            ("GET /chat?a=b%20c&d='e' HTTP/1.1", "Cookie: a=b; c=d\r\nCookie:   twice \t\r\nX-Empty:\r\n"),
            ("GET /\u{e4}\u{f6} HTTP/1.1", "X-Text: \u{e4}\r\nSec-WebSocket-Protocol: a, b\r\n"),
        ] {
            for text in [handshake(line, more), handshake(line, more).replace("\r\n", "\n")] {
                let whole = Bytes::from(text.clone());
                let (request, length) = whole_handshake(&whole, &config()).unwrap_or_else(|| panic!("{text:?}"));
                let theirs = by_hyper(text.as_bytes()).await.unwrap_or_else(|| panic!("hyper: {text:?}"));
                assert_eq!((request.uri(), request.headers()), (theirs.uri(), theirs.headers()), "{text}");
                assert_eq!(length, text.len());
                let with_frames = Bytes::from([text.as_bytes(), b"\x81\x80abcd"].concat());
                assert_eq!(whole_handshake(&with_frames, &config()).map(|(_, length)| length), Some(text.len()));
                for end in 0..text.len() {
                    assert!(whole_handshake(&whole.slice(..end), &config()).is_none(), "{end} of {text}");
                }
            }
        }
    }

    #[test]
    fn a_101_says_nothing_of_a_body() {
        let mut response = Response::new(());
        for (name, value) in [("content-length", "0"), ("transfer-encoding", "chunked"), ("trailer", "a"), ("b", "c")] {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        crate::downstream::forward_response(&mut response, true);
        let expected = "HTTP/1.1 101 Switching Protocols\r\nb: c\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n";
        assert_eq!(String::from_utf8_lossy(&encode_switching(&response)), expected);
    }

    #[test]
    fn hosts() {
        for host in [
            "",
            "a",
            "a:80",
            "a:",
            "A-b_c.example.",
            "%61",
            "127.0.0.1:65535",
            "[::1]",
            "[::ffff:1.2.3.4]:80",
            "[]",
            ":80",
        ] {
            assert!(is_host(host.as_bytes()), "{host:?}");
        }
        for host in [
            "a, b", "a,b", "a b", "a/b", "a?b", "user@a", "a:65536", "a:+80", "a:8x", "[::1", "[::1]a", "[g]", "a:1:2",
            "\u{e9}",
        ] {
            assert!(!is_host(host.as_bytes()), "{host:?}");
        }
    }

    #[test]
    fn fields_that_hide_something() {
        let refused = |name: &'static str, value: &'static [u8]| {
            let request = Request::builder().version(Version::HTTP_11).header(HOST, "a").header(UPGRADE, "websocket");
            let request = request.header(name, HeaderValue::from_bytes(value).unwrap()).body(()).unwrap();
            intent(&request).unwrap_err().reason
        };
        assert_eq!(refused("upgrade", b"websock\x91\x8b"), "Connection and Upgrade must be ASCII");
        assert_eq!(refused("connection", b"a, \xe9"), "Connection and Upgrade must be ASCII");
        assert_eq!(refused("content-length", b"9223372036854775808"), "Content-Length is out of range");
    }

    #[test]
    fn what_is_hypers_to_judge() {
        let many = "a: b\r\n".repeat(100);
        let long = format!("a: {}\r\n", "b".repeat(config().header_bytes));
        for (line, more) in [
            ("GET http://a/ HTTP/1.1", ""),
            ("GET * HTTP/1.1", ""),
            ("GET / HTTP/1.0", ""),
            ("POST / HTTP/1.1", ""),
            ("GET /a b HTTP/1.1", ""),
            ("GET / HTTP/1.1", "Content-Length: 0\r\n"),
            ("GET / HTTP/1.1", "Content-Length: 5\r\n"),
            ("GET / HTTP/1.1", "Transfer-Encoding: chunked\r\n"),
            ("GET / HTTP/1.1", "Expect: 100-continue\r\n"),
            ("GET / HTTP/1.1", "Host: b\r\n"),
            ("GET / HTTP/1.1", "Sec-WebSocket-Version: 8\r\n"),
            ("GET / HTTP/1.1", "a : b\r\n"),
            ("GET / HTTP/1.1", "a\u{0}: b\r\n"),
            ("GET / HTTP/1.1", "a: b\r\n c\r\n"),
            ("GET / HTTP/1.1", &many),
            ("GET / HTTP/1.1", &long),
        ] {
            assert!(whole_handshake(&handshake(line, more).into(), &config()).is_none(), "{line} {more}");
        }
        let few = Config { header_count: 4, ..config() };
        assert!(whole_handshake(&handshake("GET / HTTP/1.1", "").into(), &few).is_none());
    }
}
