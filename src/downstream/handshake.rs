//! What a client's request is: a WebSocket handshake that may be passed on, a plain request, or neither.
//!
//! Only what this file calls [`Intent::WebSocket`] can ever become a tunnel.

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Version,
    header::{CONNECTION, CONTENT_LENGTH, HOST, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, TRANSFER_ENCODING, UPGRADE},
};

use crate::fields::{has_token, tokens};

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

const fn refuse(status: StatusCode, reason: &'static str) -> Refusal {
    Refusal { status, reason }
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
        || authority.is_some_and(|authority| authority.as_str().contains('@'))
    {
        return Err(refuse(StatusCode::BAD_REQUEST, "the target has no valid form"));
    }
    // "A server MUST respond with a 400 (Bad Request) status code to any HTTP/1.1 request message that lacks a Host
    // header field and to any request message that contains more than one" (RFC 9112 3.2).
    let hosts = headers.get_all(HOST).iter().count();
    if hosts > 1 || (hosts == 0 && request.version() == Version::HTTP_11) {
        return Err(refuse(StatusCode::BAD_REQUEST, "exactly one Host header is required"));
    }
    // hyper frames by `chunked` alone and has dropped a Content-Length beside it; another coding would reach the backend
    // unread, and what that makes of it is a guess.
    let codings = headers.get_all(TRANSFER_ENCODING).iter().collect::<Vec<_>>();
    if !matches!(codings[..], [] | [_])
        || codings.iter().any(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"chunked"))
    {
        return Err(refuse(StatusCode::BAD_REQUEST, "Transfer-Encoding must be chunked, once"));
    }
    if tokens(headers, &CONNECTION).take(MAX_CONNECTION_OPTIONS + 1).count() > MAX_CONNECTION_OPTIONS {
        return Err(refuse(StatusCode::BAD_REQUEST, "Connection lists too much"));
    }
    if !has_token(headers, &UPGRADE, "websocket") {
        return Ok(Intent::Plain);
    }
    if request.method() != Method::GET {
        return Err(refuse(StatusCode::BAD_REQUEST, "a WebSocket handshake must be a GET"));
    }
    if request.version() != Version::HTTP_11 {
        return Err(refuse(StatusCode::BAD_REQUEST, "a WebSocket handshake must be HTTP/1.1"));
    }
    if tokens(headers, &UPGRADE).count() != 1 {
        return Err(refuse(StatusCode::BAD_REQUEST, "Upgrade names more than websocket"));
    }
    if !has_token(headers, &CONNECTION, "upgrade") {
        return Err(refuse(StatusCode::BAD_REQUEST, "Connection does not name upgrade"));
    }
    if tokens(headers, &CONNECTION).any(names_what_a_handshake_needs) {
        return Err(refuse(StatusCode::BAD_REQUEST, "Connection names a header that the handshake needs"));
    }
    let has_body = headers.contains_key(TRANSFER_ENCODING)
        || headers.get(CONTENT_LENGTH).is_some_and(|length| length.as_bytes() != b"0");
    if has_body {
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
