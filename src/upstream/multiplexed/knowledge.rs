//! What was found out about a backend: whether it takes WebSockets over HTTP/2, and how many on one connection. Of all workers
//! together, so that it is found out, and said, once.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use tracing::warn;

/// How long it is believed that a backend does not. It may be replaced by one that does.
const BELIEVED: Duration = Duration::from_mins(10);

/// The same when it said nothing at all: it may have been busy.
const DOUBTED: Duration = Duration::from_secs(30);

/// Why a backend gets a connection for each WebSocket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(in crate::upstream) enum Without {
    /// What it said was none, or it closed the connection.
    #[error("it does not speak HTTP/2")]
    Http2,
    /// Of what TLS offered it took something else, or did not say (RFC 9113 3.3).
    #[error("it agrees on no HTTP/2 (ALPN)")]
    Alpn,
    /// Nothing came.
    #[error("it sent no HTTP/2 SETTINGS within 2s")]
    Settings,
    /// It does not advertise it.
    #[error("its HTTP/2 has no extended CONNECT (RFC 8441)")]
    Extension,
    /// It advertises it, but refuses what it then accepts over HTTP/1.1.
    #[error("it advertises extended CONNECT (RFC 8441) and fails at it")]
    Practice,
}

/// See the module.
#[derive(Debug, Default)]
pub(in crate::upstream) struct Knowledge {
    /// Until when it is not tried.
    not_before: Mutex<Option<Instant>>,
    /// It has accepted a WebSocket.
    is_proven: AtomicBool,
    /// Streams on one connection at most, because it wanted less; 0: it said nothing of the kind.
    streams: AtomicUsize,
    was_said: AtomicBool,
}

impl Knowledge {
    /// It is worth a try.
    pub(super) fn may_speak(&self) -> bool {
        self.lock().is_none_or(|at| at <= Instant::now())
    }

    /// It refuses requests, and not the way they come in.
    pub(super) fn is_proven(&self) -> bool {
        self.is_proven.load(Ordering::Relaxed)
    }

    /// It has accepted one.
    pub(super) fn prove(&self) {
        self.is_proven.store(true, Ordering::Relaxed);
    }

    /// It is to be left alone with it, for a while that is not the same for all.
    pub(super) fn remember(&self, endpoint: &str, why: Without) {
        let base = if why == Without::Settings { DOUBTED } else { BELIEVED };
        *self.lock() = Some(Instant::now() + base.mul_f64(rand::random_range(0.75..1.25)));
        self.is_proven.store(false, Ordering::Relaxed);
        if !self.was_said.swap(true, Ordering::Relaxed) {
            let hint = "pool.mode is \"multiplexed\"; said once";
            warn!(backend = endpoint, %why, hint, "each WebSocket gets a connection of its own to this backend");
        }
    }

    /// It may be another one by now: a reload.
    pub(in crate::upstream) fn forget(&self) {
        *self.lock() = None;
        self.streams.store(0, Ordering::Relaxed);
        self.was_said.store(false, Ordering::Relaxed);
    }

    /// Streams on one connection, of `max` that are configured.
    pub(super) fn streams(&self, max: usize) -> usize {
        match self.streams.load(Ordering::Relaxed) {
            0 => max,
            fewer => max.min(fewer),
        }
    }

    /// It wants less: half of what it had.
    pub(super) fn calm_down(&self, max: usize) {
        let half = (self.streams(max) / 2).max(1);
        self.streams.store(half, Ordering::Relaxed);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.not_before.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
