//! The relay of one session.

use std::time::Duration;

/// What the relay needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The largest message payload, in bytes on the wire.
    pub max_message: u64,
    /// The largest frame payload, in bytes.
    pub max_frame: u64,
    /// Frames up to this payload are passed on only when whole.
    pub hold_frame: usize,
    /// How long an incomplete frame is held.
    pub hold_timeout: Duration,
    /// Silence after which a side gets a Ping; zero: never.
    pub ping_interval: Duration,
    /// Silence after a Ping that means the side is gone.
    pub pong_timeout: Duration,
    /// How long a side may take none of the bytes that wait for it.
    pub write_timeout: Duration,
    /// How long the backend is not told that a client left without waiting.
    pub close_delay: Duration,
    /// For a peer's answering Close.
    pub close_handshake_timeout: Duration,
    /// What the backend gets when the client left without a Close.
    pub client_lost_code: u16,
    /// What the client gets when the backend left without a Close.
    pub backend_lost_code: u16,
    /// What the client gets when the backend broke the protocol or a limit.
    pub backend_error_code: u16,
}
