//! How the process tells its sessions to end.
//!
//! One [`Drain`] is shared by all. It is asked twice at most: politely, with a plan, and then urgently. It knows
//! nothing of sessions; each of them takes its own moment from the plan. When it is asked what, is said by [`Phases`].

mod ears;
mod phases;

use std::{
    sync::{
        Arc, OnceLock, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use self::ears::Ears;
pub use self::phases::{Act, Phase, Phases, Status};

use crate::{alarms::Alarms, stamp::Stamp};

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
    /// From when on `/readyz` says no.
    pub readiness: Readiness,
}

impl Config {
    /// How long a session is given, from its moment on, for its next exchange, behind which it is closed. One that has been
    /// quiet for some time may be about to speak, and what it says would cross the Close; one that was just answered
    /// is not.
    pub fn exchange(&self) -> Duration {
        (self.quiet * 50).min(self.window / 4)
    }
}

/// When a draining process stops to be ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// With its listeners: Kubernetes takes a terminating pod out of its endpoints by itself.
    AfterDelay,
    /// At once: for balancers that know it from the probe alone.
    Immediate,
}

/// The moments of one session's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moments {
    /// From here on the first quiet point is taken.
    pub from: Stamp,
    /// It is closed by now, quiet or not.
    pub until: Stamp,
}

/// The process-wide order to end; clones are the same order.
#[derive(Debug, Clone)]
pub struct Drain {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: RwLock<Arc<Config>>,
    status: watch::Sender<Status>,
    /// When the window began, and how long it is; set before `begun` is cancelled.
    window: OnceLock<(Instant, Duration)>,
    /// What the tokens say, readable without their locks: sessions look with every message.
    has_begun: AtomicBool,
    is_hurried: AtomicBool,
    begun: CancellationToken,
    urgent: CancellationToken,
    ears: Ears,
}

impl Drain {
    /// Nobody is told anything yet.
    pub fn new(config: Config) -> Self {
        let running = Status { phase: Phase::Running, since: Instant::now(), until: None };
        let inner = Inner {
            config: RwLock::new(Arc::new(config)),
            status: watch::Sender::new(running),
            window: OnceLock::new(),
            has_begun: AtomicBool::new(false),
            is_hurried: AtomicBool::new(false),
            begun: CancellationToken::new(),
            urgent: CancellationToken::new(),
            ears: Ears::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// From now on all who are in there are woken by each order; those that were given before are to be looked at by whoever joins, after it.
    pub fn wakes(&self, alarms: &Arc<Alarms>) {
        self.inner.ears.add(alarms);
    }

    /// What is configured.
    pub fn config(&self) -> Arc<Config> {
        Arc::clone(&self.inner.config.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// From now on this; a window that is open stays as long as it is.
    pub fn reconfigure(&self, config: Config) {
        *self.inner.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
    }

    /// Says where the process is on its way.
    pub fn publish(&self, status: Status) {
        self.inner.status.send_if_modified(|old| std::mem::replace(old, status) != status);
    }

    /// Where the process is on its way; it can be waited for a change.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.inner.status.subscribe()
    }

    /// Whether new clients should be sent here, as far as a drain goes.
    pub fn is_ready(&self) -> bool {
        let phase = self.inner.status.borrow().phase;
        match self.config().readiness {
            _ if self.has_begun() => false,
            Readiness::AfterDelay => phase <= Phase::Delay,
            Readiness::Immediate => phase == Phase::Running,
        }
    }

    /// Opens the window: sessions begin to end, listeners stop. Idempotent.
    pub fn begin(&self) {
        self.inner.window.get_or_init(|| (Instant::now(), self.config().window));
        if !self.inner.has_begun.swap(true, Ordering::AcqRel) {
            self.inner.begun.cancel();
            self.inner.ears.wake();
        }
    }

    /// Everything ends now, still with Close frames. Idempotent; begins the drain when it has not begun.
    pub fn hurry(&self) {
        self.begin();
        if !self.inner.is_hurried.swap(true, Ordering::AcqRel) {
            self.inner.urgent.cancel();
            self.inner.ears.wake();
        }
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
        let (start, window) = *self.inner.window.get_or_init(|| (Instant::now(), self.config().window));
        // Also the last one has time for its exchange.
        let spread = window.saturating_sub(self.config().exchange());
        let start = Stamp::from(start);
        Moments { from: start + spread.mul_f64(share.clamp(0.0, 1.0)), until: start + window }
    }
}
