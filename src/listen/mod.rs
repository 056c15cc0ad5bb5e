//! Accepting: bound sockets, accept queues, accept loops.

use std::net::SocketAddr;

/// What the accept loops need to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where clients connect.
    pub address: SocketAddr,
    /// Connections that may wait to be accepted, per accept queue; the kernel clamps it.
    pub backlog: u32,
    /// Threads, each with an accept queue of its own; at least 1.
    pub workers: usize,
}
