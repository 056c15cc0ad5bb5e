//! How the process tells its sessions to end.

use std::time::Duration;

/// How a drain goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Goes on accepting for this long.
    pub delay: Duration,
    /// Sessions are closed one by one, spread over this.
    pub window: Duration,
    /// A session is closed when nothing was on the wire for this long.
    pub quiet: Duration,
    /// After the window, until the process ends whatever is left.
    pub timeout: Duration,
    /// The Close code for clients.
    pub close_code: u16,
    /// Its reason text, at most 123 bytes.
    pub reason: String,
}
