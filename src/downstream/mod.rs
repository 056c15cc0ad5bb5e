//! The client's leg before the relay: what a request wants, what may be passed on of it, and our own answers.

mod body;
mod handshake;
mod headers;
mod http2;
mod origin;
mod proxy;
mod tls;

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::server::conn::http1;
use hyper_util::rt::TokioTimer;
use ipnet::IpNet;

pub use self::{
    body::TimedBody,
    handshake::{Intent, Opening, Refusal, Whole, encode_switching, intent},
    headers::{
        Speaker, TraceId, drop_claims, forward_request, forward_response, forward_switching, is_length_clear,
        is_trusted, request_id, speaker, trace_id,
    },
    http2::{Floods, Http2, StreamBody, begins_http2, from_stream, stream_response, stream_server},
    origin::{BadOrigin, Origin, is_allowed},
    proxy::{BadProxyHeader, ProxyHeader, ProxyProtocol, V2_MOST, proxy_header},
    tls::{ClientAuth, Tls},
};

/// What the client's leg needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// To the first byte of a connection, and from there, or from the last response, to the end of a request's header. What a
    /// client waits for its turn does not count.
    pub header_timeout: Duration,
    /// Bytes in a second that a client has to send of a request's body, over and above `header_timeout`; 0: any number.
    pub body_rate: u32,
    /// The largest request header, in bytes.
    pub header_bytes: usize,
    /// The most header fields of a request.
    pub header_count: usize,
    /// The `Retry-After` of our own 502, 503 and 504.
    pub retry_after: Duration,
    /// Connections begin with a PROXY header.
    pub proxy_protocol: ProxyProtocol,
    /// Whose `X-Forwarded-*` are believed, and who may send PROXY headers.
    pub trusted_proxies: Vec<IpNet>,
    /// Clients speak TLS.
    pub tls: Tls,
    /// Clients may speak HTTP/2.
    pub http2: Http2,
    /// Whose pages may open WebSockets; none: all.
    pub allowed_origins: Vec<Origin>,
}

/// What goes back to a client.
pub type Body = BoxBody<Bytes, BoxError>;

/// Whatever made a body end early.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The HTTP/1 server side of every client connection.
pub fn server(config: &Config) -> http1::Builder {
    let mut server = http1::Builder::new();
    server
        .timer(TokioTimer::new())
        .header_read_timeout(config.header_timeout)
        .max_headers(config.header_count)
        .max_header_size(config.header_bytes)
        // hyper wants at least 8 KiB; room for one header and some body.
        .max_buf_size(config.header_bytes.max(8 * 1024));
    server
}

/// An answer of our own: a short reason in plain text.
pub fn answer(status: StatusCode, reason: &str) -> Response<Body> {
    let text = Bytes::from(format!("{status}: {reason}\n"));
    let mut response = Response::new(Full::new(text).map_err(|never| match never {}).boxed());
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}

/// As [`answer`], for a state that passes: with `Retry-After` in whole seconds, at least one.
pub fn answer_later(status: StatusCode, reason: &str, retry_after: Duration) -> Response<Body> {
    let mut response = answer(status, reason);
    let seconds = retry_after.as_secs().max(1);
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    response
}
