//! How the process tells its sessions to end.
//!
//! One [`Drain`] is shared by all. It is asked twice at most: politely, with a plan, and then urgently. It knows
//! nothing of sessions; each of them takes its own moment from the plan.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

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

/// The moments of one session's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moments {
    /// From here on the first quiet point is taken.
    pub from: Instant,
    /// It is closed by now, quiet or not.
    pub until: Instant,
}

/// The process-wide order to end; clones are the same order.
#[derive(Debug, Clone)]
pub struct Drain {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: Config,
    /// When the window began; set before `begun` is cancelled.
    window: OnceLock<Instant>,
    /// What the tokens say, readable without their locks: sessions look with every message.
    has_begun: AtomicBool,
    is_hurried: AtomicBool,
    begun: CancellationToken,
    urgent: CancellationToken,
}

impl Drain {
    /// Nobody is told anything yet.
    pub fn new(config: Config) -> Self {
        let inner = Inner {
            config,
            window: OnceLock::new(),
            has_begun: AtomicBool::new(false),
            is_hurried: AtomicBool::new(false),
            begun: CancellationToken::new(),
            urgent: CancellationToken::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// What was configured.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// Opens the window: sessions begin to end, listeners stop. Idempotent.
    pub fn begin(&self) {
        self.inner.window.get_or_init(Instant::now);
        self.inner.has_begun.store(true, Ordering::Release);
        self.inner.begun.cancel();
    }

    /// Everything ends now, still with Close frames. Idempotent; begins the drain when it has not begun.
    pub fn hurry(&self) {
        self.begin();
        self.inner.is_hurried.store(true, Ordering::Release);
        self.inner.urgent.cancel();
    }

    /// The window is open.
    pub fn has_begun(&self) -> bool {
        self.inner.has_begun.load(Ordering::Acquire)
    }

    /// Everything is to end now.
    pub fn is_hurried(&self) -> bool {
        self.inner.is_hurried.load(Ordering::Acquire)
    }

    /// Resolves when the window opens.
    pub fn begun(&self) -> WaitForCancellationFutureOwned {
        self.inner.begun.clone().cancelled_owned()
    }

    /// Resolves when everything is to end now.
    pub fn hurried(&self) -> WaitForCancellationFutureOwned {
        self.inner.urgent.clone().cancelled_owned()
    }

    /// A session's own moments: `share`, 0 to 1, is its place in the window.
    pub fn moments(&self, share: f64) -> Moments {
        let start = self.inner.window.get().copied().unwrap_or_else(Instant::now);
        let window = self.inner.config.window;
        Moments { from: start + window.mul_f64(share.clamp(0.0, 1.0)), until: start + window }
    }
}
