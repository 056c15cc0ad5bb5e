//! What the integration tests stand on: a network of three namespaces, the real binary, and peers that speak raw bytes.
//!
//! - [`Scene`]: what a test sees; it owns all of the following and reports everything when the test fails.
//! - [`lab`]: the namespaces and their TCP counters.
//! - [`proxy`]: the `tidegate` process, its log, its metrics.
//! - [`peer`]: a WebSocket and HTTP peer for both roles, over [`ws`] and [`http`]; it shares no code with tidegate.
//! - [`wire`]: what it speaks over: a socket, or TLS.
//! - [`transcript`]: what a peer saw, with the time and the end of it.
//! - [`backend`]: backends that follow a script, mostly a bad one.
//! - [`front`]: the same on streams of HTTP/2 connections.
//! - [`streams`]: clients on streams of an HTTP/2 connection.
//! - [`tls`]: the same over TLS.
//! - [`kubelet`]: a Pod of a shipped manifest, started, probed and ended as the kubelet does it.
//! - [`cgroup`]: little memory for one process.
//! - [`crowd`]: thousands of peers at once, where neither a script nor a transcript each can be afforded.
//! - [`visit`]: clients of a crowd of whom all outcomes are counted, also the bad ones.
//! - [`talk`]: clients of a crowd that talk until they are told to go.
//! - [`feed`]: feeds, and clients of a crowd that watch them.
//! - [`report`]: what is printed when a test fails.
//!
//! No wait is without a bound, and no bound is an assertion about speed: [`DEADLINE`] and [`LIMIT`] only end a hanging test.

#![allow(dead_code, unreachable_pub, reason = "a tool box: not every tool is needed by the tests of one day")]

pub mod backend;
pub mod cgroup;
pub mod crowd;
pub mod feed;
pub mod front;
pub mod http;
pub mod kubelet;
pub mod lab;
pub mod peer;
pub mod proxy;
pub mod report;
pub mod scene;
pub mod streams;
pub mod talk;
pub mod tls;
pub mod transcript;
pub mod visit;
pub mod wire;
pub mod ws;

use std::{
    fmt,
    sync::{Arc, Once},
    time::Duration,
};
use tokio::{sync::watch, time::timeout};

pub use http::Message;
pub use lab::{Lab, Side};
pub use peer::Peer;
pub use scene::{Dial, Scene};
pub use transcript::{End, Seen};
pub use ws::{Frame, NO_CODE};

/// The bound of one wait. More than the proxy's own longest default of an ending (`close.linger_max`).
pub const DEADLINE: Duration = Duration::from_secs(45);

/// The bound of a whole script.
pub const LIMIT: Duration = Duration::from_mins(4);

/// A value that several threads see and any of them can wait for, from async code or not.
pub struct Board<T>(Arc<watch::Sender<T>>);

impl<T> Clone for Board<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T: fmt::Debug> fmt::Debug for Board<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.borrow().fmt(f)
    }
}

impl<T> Board<T> {
    pub fn new(value: T) -> Self {
        Self(Arc::new(watch::Sender::new(value)))
    }

    pub fn change<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let mut result = None;
        self.0.send_modify(|value| result = Some(change(value)));
        result.expect("send_modify calls its closure")
    }

    pub fn read<R>(&self, read: impl FnOnce(&T) -> R) -> R {
        read(&self.0.borrow())
    }

    /// Waits until `test` finds what it looks for; None after `within`.
    pub async fn until<R>(&self, within: Duration, mut test: impl FnMut(&T) -> Option<R>) -> Option<R> {
        let mut changes = self.0.subscribe();
        let found = async {
            loop {
                if let Some(found) = test(&changes.borrow_and_update()) {
                    return found;
                }
                changes.changed().await.expect("self holds a sender");
            }
        };
        timeout(within, found).await.ok()
    }

    /// As [`Board::until`], for code that is not async.
    pub fn wait<R>(&self, within: Duration, test: impl FnMut(&T) -> Option<R>) -> Option<R> {
        block(self.until(within, test))
    }
}

/// Something that has happened or has not: lets a client's script, a backend's script and the test wait for each other.
#[derive(Clone, Debug)]
pub struct Gate {
    name: &'static str,
    open: Board<bool>,
}

impl Gate {
    pub fn new(name: &'static str) -> Self {
        let open = Board::new(false);
        Self { name, open }
    }

    pub fn open(&self) {
        self.open.change(|open| *open = true);
    }

    pub async fn passed(&self) {
        let opened = self.open.until(LIMIT, |open| open.then_some(())).await;
        opened.unwrap_or_else(|| panic!("nobody opened the gate '{}'", self.name));
    }

    /// As [`Gate::passed`], for code that is not async.
    pub fn pass(&self) {
        block(self.passed());
    }
}

/// Runs a future to its end on the calling thread.
///
/// Thousands of clients in one future must not share one budget of tokio's: beyond it they are put off, and woken last in, first
/// out, so that on a busy machine some of them had no turn for a minute.
pub fn block<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime needs an epoll and an eventfd")
        .block_on(tokio::task::unconstrained(future))
}

/// Says that something is not being asserted. Not with `eprintln!`, which libtest swallows when the test passes.
pub fn left_out(what: &str, why: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "left out: {what} ({why})");
}

/// As [`left_out`], for what concerns all tests of a run.
pub fn left_out_once(what: &str, why: &str) {
    static SAID: Once = Once::new();
    SAID.call_once(|| left_out(what, why));
}
