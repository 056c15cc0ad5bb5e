//! How connections to a backend are used, and what one or several of them are called.
//!
//! Not here: the deadlines and limits of one connection ([`super::Config`]), and what is made of all this.

use std::{fmt, time::Duration};

use http::HeaderName;

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
    /// How WebSockets are shared (shared).
    pub sharing: Sharing,
}

/// What `pool.mode = "shared"` adds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sharing {
    /// What one WebSocket is for all of its clients; `None`: not said.
    pub kind: Option<Kind>,
    /// Whose handshake the backend gets to see.
    pub authorize: Authorize,
    /// Request header fields that tell clients apart, besides those that always do.
    pub key_headers: Vec<HeaderName>,
    /// Of those that always do, these do not.
    pub ignore_headers: Vec<HeaderName>,
    /// WebSockets of a route toward the backend at once.
    pub max_keys: usize,
    /// How long clients wait for a backend that was lost.
    pub reconnect_grace: Duration,
    /// Messages that are kept for clients that are behind (broadcast), or wait for the backend.
    pub queue_messages: usize,
    /// The same in bytes.
    pub queue_bytes: usize,
    /// What becomes of a client that is behind by more.
    pub slow_client: SlowClient,
    /// What a client gets of what was before it (broadcast).
    pub replay: Replay,
    /// How many of these messages with [`Replay::LastN`].
    pub replay_messages: usize,
    /// Clients may send messages to the backend (broadcast).
    pub allow_client_messages: bool,
    /// For the answer to a request (rpc).
    pub request_timeout: Duration,
    /// Requests of one client without an answer (rpc).
    pub max_requests: usize,
    /// Subscriptions of one client (rpc).
    pub max_subscriptions: usize,
    /// How one subscribes (rpc).
    pub subscriptions: Vec<Subscription>,
    /// Methods of notifications that are for all clients; a `*` at the end stands for any rest (rpc).
    pub notifications: Vec<String>,
}

/// What clients share of a WebSocket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Each message of the backend goes to all of them.
    Broadcast,
    /// JSON-RPC 2.0: each answer goes to who has asked.
    Rpc,
}

/// Whose handshake the backend gets to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authorize {
    /// That of the first of those who are alike.
    First,
    /// That of each: of whoever joins on a connection that is ended at once.
    Always,
}

/// What becomes of a client that is behind by more than is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlowClient {
    /// Close 1013.
    Disconnect,
    /// It goes on with the oldest message that is kept.
    DropOldest,
    /// It goes on with the newest one.
    Conflate,
}

/// What a client gets of what was before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replay {
    /// Nothing.
    None,
    /// The last message.
    Last,
    /// Several.
    LastN,
}

/// The methods of one kind of subscription.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    /// Begins one.
    pub subscribe: String,
    /// Ends one.
    pub unsubscribe: String,
    /// What the backend tells of one by.
    pub notification: String,
}

impl fmt::Display for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.subscribe, self.unsubscribe, self.notification)
    }
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
