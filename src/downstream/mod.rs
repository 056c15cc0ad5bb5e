//! The client's leg before the relay: reading the request, answering it.

use std::time::Duration;

use ipnet::IpNet;

/// What the client's leg needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// From the connection, or the last response, to the end of a request's header.
    pub header_timeout: Duration,
    /// The largest request header, in bytes.
    pub header_bytes: usize,
    /// The most header fields of a request.
    pub header_count: usize,
    /// Requests waiting for the backend's answer.
    pub max_handshakes: usize,
    /// The `Retry-After` of our own 502, 503 and 504.
    pub retry_after: Duration,
    /// Whose `X-Forwarded-*` are believed.
    pub trusted_proxies: Vec<IpNet>,
}
