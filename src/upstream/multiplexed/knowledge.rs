//! What was found out about a backend: whether it takes WebSockets over HTTP/2, and how many on one connection. Of all workers
//! together, so that it is found out, and said, once.
//!
//! What only one connection has shown is the connection's (`connection.rs`): the next one may be to another process.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use tracing::{info, warn};

/// How long it is believed that a backend does not. It may be replaced by one that does.
const BELIEVED: Duration = Duration::from_mins(10);

/// The same when it was only silent, or closed the connection: it may have been busy, or about to end.
const DOUBTED: Duration = Duration::from_secs(30);

/// For so long the connections of a backend that has shared one may end before its SETTINGS: it is being restarted.
const EXCUSED: Duration = Duration::from_secs(30);

/// After this long without a complaint a connection may have twice as many streams again.
const CALM: Duration = Duration::from_mins(1);

/// Why a backend gets a connection for each WebSocket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(in crate::upstream) enum Without {
    /// What it said was none.
    #[error("it does not speak HTTP/2")]
    Http2,
    /// Of what TLS offered it took something else, or did not say (RFC 9113 3.3).
    #[error("it agrees on no HTTP/2 (ALPN)")]
    Alpn,
    /// The connection ended before it had said anything.
    #[error("it ends connections of HTTP/2 before its SETTINGS")]
    Closed,
    /// Nothing came.
    #[error("it sent no HTTP/2 SETTINGS within 2s")]
    Settings,
    /// It does not advertise it.
    #[error("its HTTP/2 has no extended CONNECT (RFC 8441)")]
    Extension,
    /// It advertises it, but refuses what it then accepts over HTTP/1.1.
    #[error("it advertises extended CONNECT (RFC 8441) and fails at it")]
    Practice,
    /// It advertises it, and then ends the connection or gives no answer.
    #[error("it advertises extended CONNECT (RFC 8441) and does not answer it")]
    Unanswered,
}

impl Without {
    /// For metrics.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Http2 | Self::Alpn => "no_http2",
            Self::Closed => "closed",
            Self::Settings => "no_settings",
            Self::Extension => "no_extension",
            Self::Practice => "fails",
            Self::Unanswered => "unanswered",
        }
    }

    /// The backend itself says so. Anything else may have another cause, and is remembered only if the same endpoint then
    /// accepts over HTTP/1.1.
    pub(super) const fn is_certain(self) -> bool {
        matches!(self, Self::Http2 | Self::Alpn | Self::Extension)
    }

    const fn time(self) -> Duration {
        match self {
            Self::Http2 | Self::Alpn | Self::Extension | Self::Practice => BELIEVED,
            Self::Closed | Self::Settings | Self::Unanswered => DOUBTED,
        }
    }

    const fn fix(self) -> &'static str {
        match self {
            Self::Http2 | Self::Alpn | Self::Extension => {
                "let the backend serve HTTP/2 with RFC 8441, or set pool.mode = \"dedicated\"; a reload tries it at once"
            }
            _ => "see the backend's log, or set pool.mode = \"dedicated\"; a reload tries it at once",
        }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(in crate::upstream) struct Knowledge(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// Until when it is not tried.
    not_before: Option<Instant>,
    /// It has accepted a WebSocket on a stream, and nothing was found against it since.
    has_shared: bool,
    /// Since when its connections end before their SETTINGS.
    failing_since: Option<Instant>,
    /// It did not answer: the next handshake goes over HTTP/1.1, to see whether that is the way or the application.
    suspicion: Option<Without>,
    /// Streams on one connection at most, because it wanted less, and since when.
    fewer: Option<(usize, Instant)>,
    /// It was said that it does not share.
    was_said: bool,
}

impl Knowledge {
    /// It is worth a try.
    pub(super) fn may_speak(&self) -> bool {
        self.lock().not_before.is_none_or(|at| at <= Instant::now())
    }

    /// It has accepted one.
    pub(super) fn prove(&self, endpoint: &str) {
        let mut known = self.lock();
        (known.not_before, known.suspicion, known.failing_since, known.has_shared) = (None, None, None, true);
        if std::mem::take(&mut known.was_said) {
            drop(known);
            info!(backend = endpoint, "WebSockets share connections to this backend");
        }
    }

    /// A connection has ended before its SETTINGS. True: that is no sign, since it has shared until just now.
    pub(super) fn is_excused(&self) -> bool {
        let mut known = self.lock();
        known.has_shared && known.failing_since.get_or_insert_with(Instant::now).elapsed() < EXCUSED
    }

    /// SETTINGS have come.
    pub(super) fn has_spoken(&self) {
        self.lock().failing_since = None;
    }

    /// It gave no answer on a stream.
    pub(super) fn suspect(&self, why: Without) {
        self.lock().suspicion = Some(why);
    }

    /// What is to be looked into, by one.
    pub(super) fn suspicion(&self) -> Option<Without> {
        self.lock().suspicion.take()
    }

    /// It is to be left alone with it, for a while that is not the same for all.
    pub(super) fn remember(&self, endpoint: &str, why: Without) {
        let time = why.time().mul_f64(rand::random_range(0.75..1.25));
        let mut known = self.lock();
        (known.not_before, known.has_shared) = (Some(Instant::now() + time), false);
        if !std::mem::replace(&mut known.was_said, true) {
            drop(known);
            let (again_in_secs, fix) = (time.as_secs(), why.fix());
            warn!(backend = endpoint, %why, again_in_secs, fix, "each WebSocket gets a connection of its own to this backend");
        }
    }

    /// It may be another one by now: a reload.
    pub(in crate::upstream) fn forget(&self) {
        *self.lock() = Known::default();
    }

    /// Streams on one connection, of `max` that are configured.
    pub(super) fn streams(&self, max: usize) -> usize {
        self.lock().streams(max)
    }

    /// It wants less: half of what it had.
    pub(super) fn calm_down(&self, endpoint: &str, max: usize) {
        let mut known = self.lock();
        let before = known.streams(max);
        let after = (before / 2).max(1);
        known.fewer = Some((after, Instant::now()));
        drop(known);
        let fix = "lower pool.max_streams, or let the backend bear more; it doubles again with each minute";
        warn!(
            backend = endpoint,
            before, after, fix, "a backend wants fewer streams on a connection (ENHANCE_YOUR_CALM)"
        );
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn streams(&self, max: usize) -> usize {
        let Some((fewer, at)) = self.fewer else { return max };
        let doubled = u32::try_from(at.elapsed().as_secs() / CALM.as_secs()).unwrap_or(u32::MAX);
        max.min(fewer.saturating_mul(2_usize.saturating_pow(doubled)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a backend complained of is not held against it for ever.
    #[tokio::test(start_paused = true)]
    async fn a_lowered_limit_grows_back() {
        let knowledge = Knowledge::default();
        for expected in [32, 16, 8] {
            knowledge.calm_down("app:1", 64);
            assert_eq!(knowledge.streams(64), expected);
        }
        for expected in [16, 32, 64, 64] {
            tokio::time::advance(CALM).await;
            assert_eq!(knowledge.streams(64), expected);
        }
    }

    /// A backend that has shared is excused for the time of a restart; it may have been replaced by one that can't.
    #[tokio::test(start_paused = true)]
    async fn a_restart_is_excused() {
        let knowledge = Knowledge::default();
        assert!(!knowledge.is_excused());
        knowledge.prove("app:1");
        assert!(knowledge.is_excused());
        tokio::time::advance(EXCUSED / 2).await;
        assert!(knowledge.is_excused());
        knowledge.has_spoken();
        tokio::time::advance(EXCUSED / 2).await;
        assert!(knowledge.is_excused());
        tokio::time::advance(EXCUSED).await;
        assert!(!knowledge.is_excused());
        knowledge.prove("app:1");
        knowledge.forget();
        assert!(!knowledge.is_excused(), "it may be another one");
    }
}
