//! The backend's leg before the relay: dialling, the handshake, plain requests.

use std::time::Duration;

use crate::net::Address;

/// What the backend's leg needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The backend.
    pub address: Address,
    /// For the TCP connection.
    pub connect_timeout: Duration,
    /// For a WebSocket handshake, waiting for its turn and connecting included.
    pub handshake_timeout: Duration,
    /// For the response header to a plain request.
    pub response_timeout: Duration,
    /// For a plain body to move on.
    pub body_timeout: Duration,
    /// Dials and WebSocket handshakes under way at once.
    pub max_pending: usize,
    /// The largest response header, in bytes.
    pub header_bytes: usize,
}
