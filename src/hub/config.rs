//! What `pool.mode = "shared"` adds to `[pool]`: who shares a WebSocket, what it is for, and what is kept for whom.

use std::time::Duration;

use http::HeaderName;

use super::rpc::methods::Triple;

/// See the module. Of one route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
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
    /// How long a message waits for more, which go out with it (broadcast).
    pub batch_delay: Duration,
    /// Clients may send messages to the backend (broadcast).
    pub allow_client_messages: bool,
    /// For the answer to a request (rpc).
    pub request_timeout: Duration,
    /// Requests of one client without an answer (rpc).
    pub max_requests: usize,
    /// Subscriptions of one client (rpc).
    pub max_subscriptions: usize,
    /// How one subscribes (rpc).
    pub subscriptions: Vec<Triple>,
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
