//! How connections to a backend are used, and what one or several of them are called.
//!
//! Not here: the deadlines and limits of one connection ([`super::Config`]), WebSockets that clients share (`hub/`), and what is made of all this.

use std::{fmt, time::Duration};

use crate::net::Address;

/// `[pool]`, as one route has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// What is shared.
    pub mode: Mode,
    /// Open connections kept ready per endpoint, for WebSocket handshakes.
    pub prewarm: usize,
    /// How long one of those is kept before another takes its place.
    pub prewarm_max_age: Duration,
    /// Idle connections of plain HTTP kept per endpoint.
    pub keep_alive: usize,
    /// How long each of those is kept.
    pub keep_alive_timeout: Duration,
    /// References to one connection at once (multiplexed).
    pub max_streams: usize,
    /// Handshakes on one connection in its life (multiplexed); 0: any number.
    pub max_uses: usize,
    /// Connections per worker and endpoint (multiplexed).
    pub max_connections: usize,
    /// From the last reference to the end of a connection; zero: at once (multiplexed).
    pub idle_timeout: Duration,
    /// For a stream that nobody reads (multiplexed).
    pub stall_timeout: Duration,
    /// How often a silent connection is asked whether it is still there (multiplexed); `None`: never.
    pub ping_interval: Option<Duration>,
}

/// What clients share of the connections to a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Nothing: one for each WebSocket.
    Dedicated,
    /// A connection of HTTP/2, with a stream for each WebSocket (RFC 8441).
    Multiplexed,
    /// A WebSocket: `hub/` does that, on connections as for [`Mode::Dedicated`].
    Shared,
}

impl Mode {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dedicated => "dedicated",
            Self::Multiplexed => "multiplexed",
            Self::Shared => "shared",
        }
    }
}

/// Where a backend is: one address, or several that serve the same. Never empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Addresses(Vec<Address>);

impl Addresses {
    /// `None`: there is none among them.
    pub fn new(addresses: Vec<Address>) -> Option<Self> {
        (!addresses.is_empty()).then_some(Self(addresses))
    }

    /// All of them, one at least.
    pub fn as_slice(&self) -> &[Address] {
        &self.0
    }
}

impl From<Address> for Addresses {
    fn from(address: Address) -> Self {
        Self(vec![address])
    }
}

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, address) in self.0.iter().enumerate() {
            write!(f, "{}{address}", if index > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}
