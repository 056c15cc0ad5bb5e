//! The end of a socket: FIN, reading on until the peer's FIN, and only then `close()`.

use std::time::Duration;

/// How long a socket may linger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Without progress.
    pub linger: Duration,
    /// At all.
    pub linger_max: Duration,
}
