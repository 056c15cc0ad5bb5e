//! What a client's request is: a WebSocket handshake that may be passed on, a plain request, or neither.
//!
//! Only what this file calls [`Intent::WebSocket`] can ever become a tunnel.

use std::{mem::MaybeUninit, net::IpAddr};

use bytes::Bytes;
use http::{
    HeaderName, Method, Request, Response, StatusCode, Uri, Version,
    header::{
        CONNECTION, CONTENT_LENGTH, EXPECT, HOST, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, TRANSFER_ENCODING, UPGRADE,
    },
};
use ipnet::IpNet;

use super::{
    Config,
    headers::{SWITCHING, forward_lines, forward_request, is_usual_option},
};
use crate::{
    fields::{Ask, Header, Lines, Spans, spans, text, tokens_of, write_header},
    net::Secured,
};

/// Elements that a `Connection` header may have, empty ones not counted: for each field it is looked up whether it is one of them.
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

/// A handshake that was there as a whole, and is as nearly all are. Its header is looked at where it lies.
#[derive(Debug)]
pub struct Whole {
    lines: Lines,
    target: Uri,
    key: [u8; KEY],
    /// `Connection` lists more than is usual.
    lists_more: bool,
}

impl Whole {
    /// What `bytes` begin with, and what is behind it, when it is there as a whole and as it should be; else they are given back.
    ///
    /// Nearly all are, and then hyper is not needed: no body, no second request. Else hyper shall look at it, and [`intent`] say what is
    /// wrong if something is: what is taken here is what is taken there. Reading is httparse's work either way.
    pub fn read(mut bytes: Bytes, config: &Config) -> Result<(Self, Bytes), Bytes> {
        let Some((usual, length)) = read_usual(&bytes, config) else { return Err(bytes) };
        let Usual { spans, target, key, lists_more } = usual;
        let behind = bytes.split_off(length);
        Ok((Self { lines: Lines::new(bytes, spans), target, key, lists_more }, behind))
    }

    /// As it came.
    pub fn into_bytes(self) -> Bytes {
        self.lines.into_bytes()
    }
}

/// What is found in a handshake.
struct Usual {
    spans: Spans,
    target: Uri,
    key: [u8; KEY],
    lists_more: bool,
}

/// A handshake, and the length of its header.
fn read_usual(bytes: &Bytes, config: &Config) -> Option<(Usual, usize)> {
    let mut fields = [const { MaybeUninit::uninit() }; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut []);
    let fields = &mut fields[..config.header_count.min(MAX_HEADERS)];
    let httparse::Status::Complete(length) = head.parse_with_uninit_headers(bytes, fields).ok()? else { return None };
    let target = head.path.filter(|target| target.starts_with('/'))?;
    if length > config.header_bytes || head.method != Some("GET") || head.version != Some(1) {
        return None;
    }
    let (target, mut facts) = (Uri::try_from(target).ok()?, Facts::default());
    for httparse::Header { name, value } in &*head.headers {
        facts.note(name.as_bytes(), value);
    }
    let is_handshake = facts.judge(&Method::GET, &target, Version::HTTP_11) == Ok(Intent::WebSocket);
    if !is_handshake || facts.length.is_some() || facts.expects {
        return None;
    }
    let key = facts.key.first?.try_into().ok()?;
    Some((Usual { spans: spans(head.headers, bytes)?, target, key, lists_more: facts.options.names_more }, length))
}

/// A valid WebSocket handshake, whoever has read it.
pub trait Opening: Header {
    /// Its answer is written here.
    const IS_WHOLE: bool;

    /// What it is for.
    fn target(&self) -> &Uri;

    /// As it goes on to the backend; see [`forward_request`].
    fn forward(self, client: IpAddr, secured: Option<&Secured>, trusted: &[IpNet], id: &str) -> (Ask, bool);
}

impl Header for &Whole {
    fn values_of(&self, name: &HeaderName) -> impl Iterator<Item = &[u8]> {
        self.lines.values_of(name)
    }
}

impl Opening for &Whole {
    const IS_WHOLE: bool = true;

    fn target(&self) -> &Uri {
        &self.target
    }

    fn forward(self, client: IpAddr, secured: Option<&Secured>, trusted: &[IpNet], id: &str) -> (Ask, bool) {
        let lines = (&self.lines, self.lists_more);
        let (head, was_replaced) = forward_lines(&self.target, lines, client, secured, trusted, id);
        (Ask::Written(head, self.key), was_replaced)
    }
}

impl Header for Request<()> {
    fn values_of(&self, name: &HeaderName) -> impl Iterator<Item = &[u8]> {
        self.headers().values_of(name)
    }
}

impl Opening for Request<()> {
    const IS_WHOLE: bool = false;

    fn target(&self) -> &Uri {
        self.uri()
    }

    fn forward(mut self, client: IpAddr, secured: Option<&Secured>, trusted: &[IpNet], id: &str) -> (Ask, bool) {
        let was_replaced = forward_request(&mut self, client, secured, trusted, id, true);
        (Ask::Request(self), was_replaced)
    }
}

/// A 101 as it goes out; see also [`super::forward_switching`].
pub fn encode_switching<B>(response: &Response<B>) -> Vec<u8> {
    let mut head = Vec::with_capacity(512);
    head.extend_from_slice(SWITCHING);
    write_header(response.headers(), &mut head);
    head
}

/// Reads what a request wants (RFC 6455 4.2.1).
///
/// Whoever names `websocket` in `Upgrade` means a handshake, and an invalid one is refused rather than passed on as
/// something else: what the backend makes of it must not depend on how it reads a sloppy request. Any other upgrade
/// (`h2c`) is passed over, as a server may (RFC 9110 7.8), and never reaches the backend.
pub fn intent<B>(request: &Request<B>) -> Result<Intent, Refusal> {
    let mut facts = Facts::default();
    for (name, value) in request.headers() {
        facts.note(name.as_str().as_bytes(), value.as_bytes());
    }
    facts.judge(request.method(), request.uri(), request.version())
}

/// What the fields of a request say, as far as it matters for what it wants: they are looked through once, whoever has read them.
#[derive(Default)]
struct Facts<'a> {
    host: Lone<'a>,
    key: Lone<'a>,
    version: Lone<'a>,
    coding: Lone<'a>,
    /// The first of them; others are hyper's to judge.
    length: Option<&'a [u8]>,
    options: Options,
    protocols: Protocols,
    /// In `Connection` or `Upgrade`.
    has_odd_bytes: bool,
    expects: bool,
}

/// A field that should stand there once.
#[derive(Default)]
struct Lone<'a> {
    first: Option<&'a [u8]>,
    has_more: bool,
}

/// What `Connection` lists.
#[derive(Default)]
struct Options {
    count: usize,
    names_upgrade: bool,
    /// See [`names_what_a_handshake_needs`].
    names_needed: bool,
    /// Something that is not usual.
    names_more: bool,
}

/// What `Upgrade` lists.
#[derive(Default)]
struct Protocols {
    count: usize,
    names_websocket: bool,
}

impl<'a> Lone<'a> {
    fn note(&mut self, value: &'a [u8]) {
        self.has_more = self.first.is_some();
        self.first = self.first.or(Some(value));
    }

    fn only(&self) -> Option<&'a [u8]> {
        self.first.filter(|_| !self.has_more)
    }
}

impl Options {
    fn note(&mut self, option: &str) {
        self.count += 1;
        if option.eq_ignore_ascii_case("upgrade") {
            self.names_upgrade = true;
        } else {
            self.names_needed |= names_what_a_handshake_needs(option);
            self.names_more |= !is_usual_option(option);
        }
    }
}

impl Protocols {
    fn note(&mut self, protocol: &str) {
        self.count += 1;
        self.names_websocket |= protocol.eq_ignore_ascii_case("websocket");
    }
}

impl<'a> Facts<'a> {
    /// The next line.
    #[inline]
    fn note(&mut self, name: &[u8], value: &'a [u8]) {
        let is = |known: &HeaderName| name.eq_ignore_ascii_case(known.as_str().as_bytes());
        // In this order: of most lengths there is none.
        match name.len() {
            4 if is(&HOST) => self.host.note(value),
            6 if is(&EXPECT) => self.expects = true,
            // Bytes beyond ASCII would hide what else stands in the line.
            7 if is(&UPGRADE) => match text(value) {
                Some(value) => tokens_of(value).for_each(|protocol| self.protocols.note(protocol)),
                None => self.has_odd_bytes = true,
            },
            10 if is(&CONNECTION) => match text(value) {
                Some(value) => tokens_of(value).for_each(|option| self.options.note(option)),
                None => self.has_odd_bytes = true,
            },
            14 if is(&CONTENT_LENGTH) => self.length = self.length.or(Some(value)),
            17 if is(&SEC_WEBSOCKET_KEY) => self.key.note(value),
            17 if is(&TRANSFER_ENCODING) => self.coding.note(value),
            21 if is(&SEC_WEBSOCKET_VERSION) => self.version.note(value),
            _ => {}
        }
    }

    /// What a request with these fields wants; see [`intent`].
    fn judge(&self, method: &Method, target: &Uri, version: Version) -> Result<Intent, Refusal> {
        if method == Method::CONNECT {
            return Err(refuse(StatusCode::METHOD_NOT_ALLOWED, "CONNECT is not supported"));
        }
        // Authority form is for CONNECT, asterisk form for OPTIONS alone (RFC 9112 3.2), and credentials in a target are to be
        // "treated as an error" (RFC 9110 4.2.4): Host would have to be made of it.
        let authority = target.authority();
        if (authority.is_some() && target.scheme().is_none())
            || (target.path() == "*" && method != Method::OPTIONS)
            || authority.is_some_and(|authority| !is_host(authority.as_str().as_bytes()))
        {
            return Err(refuse(StatusCode::BAD_REQUEST, "the target has no valid form"));
        }
        // "A server MUST respond with a 400 (Bad Request) status code to any HTTP/1.1 request message that lacks a Host
        // header field and to any request message that contains more than one" (RFC 9112 3.2).
        if self.host.has_more || (self.host.first.is_none() && version == Version::HTTP_11) {
            return Err(refuse(StatusCode::BAD_REQUEST, "exactly one Host header is required"));
        }
        if self.host.first.is_some_and(|host| !is_host(host)) {
            return Err(refuse(StatusCode::BAD_REQUEST, "Host is no host with a port"));
        }
        if self.has_odd_bytes {
            return Err(refuse(StatusCode::BAD_REQUEST, "Connection and Upgrade must be ASCII"));
        }
        // A backend that counts in 63 bits would take it for less than nothing.
        if self.length.is_some_and(|length| text(length).is_none_or(|text| text.parse::<i64>().is_err())) {
            return Err(refuse(StatusCode::BAD_REQUEST, "Content-Length is out of range"));
        }
        // hyper frames by `chunked` alone and has dropped a Content-Length beside it; another coding would reach the backend
        // unread, and what that makes of it is a guess.
        if self.coding.has_more || self.coding.first.is_some_and(|coding| !coding.eq_ignore_ascii_case(b"chunked")) {
            return Err(refuse(StatusCode::BAD_REQUEST, "Transfer-Encoding must be chunked, once"));
        }
        if self.options.count > MAX_CONNECTION_OPTIONS {
            return Err(refuse(StatusCode::BAD_REQUEST, "Connection lists too much"));
        }
        if !self.protocols.names_websocket {
            return Ok(Intent::Plain);
        }
        if method != Method::GET {
            return Err(refuse(StatusCode::BAD_REQUEST, "a WebSocket handshake must be a GET"));
        }
        if version != Version::HTTP_11 {
            return Err(refuse(StatusCode::BAD_REQUEST, "a WebSocket handshake must be HTTP/1.1"));
        }
        if self.protocols.count > 1 {
            return Err(refuse(StatusCode::BAD_REQUEST, "Upgrade names more than websocket"));
        }
        if !self.options.names_upgrade {
            return Err(refuse(StatusCode::BAD_REQUEST, "Connection does not name upgrade"));
        }
        if self.options.names_needed {
            return Err(refuse(StatusCode::BAD_REQUEST, "Connection names a header that the handshake needs"));
        }
        if self.coding.first.is_some() || self.length.is_some_and(|length| length != b"0") {
            return Err(refuse(StatusCode::BAD_REQUEST, "a WebSocket handshake must not have a body"));
        }
        if self.version.only().is_none_or(|version| version != b"13") {
            return Err(refuse(StatusCode::UPGRADE_REQUIRED, "Sec-WebSocket-Version must be 13"));
        }
        match self.key.only() {
            Some(key) if is_key(key) => Ok(Intent::WebSocket),
            _ => Err(refuse(StatusCode::BAD_REQUEST, "Sec-WebSocket-Key must be 16 bytes in base64")),
        }
    }
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

/// How long one is.
const KEY: usize = 24;

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

    use http::HeaderValue;
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
                let (ours, behind) = Whole::read(whole.clone(), &config()).unwrap_or_else(|_| panic!("{text:?}"));
                let theirs = by_hyper(text.as_bytes()).await.unwrap_or_else(|| panic!("hyper: {text:?}"));
                assert_eq!((&ours.target, &ours.lines.to_map()), (theirs.uri(), theirs.headers()), "{text}");
                assert!(behind.is_empty());
                let with_frames = Bytes::from([text.as_bytes(), b"\x81\x80abcd"].concat());
                let (ours, behind) = Whole::read(with_frames, &config()).unwrap_or_else(|_| panic!("{text:?}"));
                assert_eq!((ours.into_bytes(), &behind[..]), (whole.clone(), &b"\x81\x80abcd"[..]));
                for end in 0..text.len() {
                    let part = whole.slice(..end);
                    assert_eq!(Whole::read(part.clone(), &config()).err(), Some(part), "{end} of {text}");
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
        let refused = |name: &'static str, value: &[u8]| {
            let request = Request::builder().version(Version::HTTP_11).header(HOST, "a").header(UPGRADE, "websocket");
            let request = request.header(name, HeaderValue::from_bytes(value).unwrap()).body(()).unwrap();
            intent(&request).unwrap_err().reason
        };
        assert_eq!(refused("upgrade", b"websock\x91\x8b"), "Connection and Upgrade must be ASCII");
        assert_eq!(refused("connection", b"a, \xe9"), "Connection and Upgrade must be ASCII");
        assert_eq!(refused("content-length", b"9223372036854775808"), "Content-Length is out of range");
        assert_eq!(refused("connection", "a,".repeat(33).as_bytes()), "Connection lists too much");
        let host = Request::builder().header(HOST, "a, b").body(()).unwrap();
        assert_eq!(intent(&host).unwrap_err().reason, "Host is no host with a port");
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
            ("GET / HTTP/1.1", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"),
            ("GET / HTTP/1.1", "Upgrade: h2c\r\n"),
            ("GET / HTTP/1.1", "Connection: Origin\r\n"),
            ("GET / HTTP/1.1", "Connection: \u{e9}\r\n"),
            ("GET / HTTP/1.1", "a : b\r\n"),
            ("GET / HTTP/1.1", "a\u{0}: b\r\n"),
            ("GET / HTTP/1.1", "a: b\r\n c\r\n"),
            ("GET / HTTP/1.1", &many),
            ("GET / HTTP/1.1", &long),
        ] {
            let bytes = Bytes::from(handshake(line, more));
            assert_eq!(Whole::read(bytes.clone(), &config()).err(), Some(bytes), "{line} {more}");
        }
        for (from, to) in [
            ("Host: a", "Host: a, b"),
            ("Host: a", "Host: \u{e9}"),
            ("Host: a", "X-Host: a"),
            (": websocket", ": h2c"),
            (": Upgrade", ": close"),
            (": 13", ": 12"),
            (": 13", ": 13, 13"),
            ("Q==", "Q="),
            ("Q==", "QQ="),
            ("Q==", "*=="),
        ] {
            let text = handshake("GET / HTTP/1.1", "");
            assert!(text.contains(from), "{from}");
            let bytes = Bytes::from(text.replace(from, to));
            assert_eq!(Whole::read(bytes.clone(), &config()).err(), Some(bytes), "{to}");
        }
        let few = Config { header_count: 4, ..config() };
        assert!(Whole::read(handshake("GET / HTTP/1.1", "").into(), &few).is_err());
    }
}
