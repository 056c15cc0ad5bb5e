//! What the pools count. One of these may be shared by several of them, and is written from any thread.
//!
//! Never by key: keys come from outside.

use std::{
    sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use super::core::{How, OpenError};

/// Upper bounds of what an acquire took, in seconds; what took longer is in none of them.
pub const ACQUIRE_BOUNDS_SECONDS: [f64; 16] = {
    let mut bounds = [0.000_5; 16];
    let mut index = 1;
    while index < bounds.len() {
        bounds[index] = bounds[index - 1] * 2.0;
        index += 1;
    }
    bounds
};

/// How opens ended, by the name of the label.
pub const OPENS: [&str; 5] = ["opened", "failed", "timeout", "panicked", "aborted"];

/// How references were come by, in the order of [`How`].
pub const HOWS: [&str; 4] = ["hit", "revive", "open", "wait"];

/// Why an acquire gave none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    Failed,
    Full,
    Timeout,
    Closing,
    Cancelled,
}

/// The same, by the name of the label.
pub const REFUSALS: [&str; 5] = ["failed", "full", "timeout", "closing", "cancelled"];

/// The states of a connection, in the order of [`Census::connections`].
pub const STATES: [&str; 5] = ["opening", "open", "idle", "draining", "closed"];

/// All of it.
#[derive(Debug, Default)]
pub struct Stats {
    opens: [AtomicU64; OPENS.len()],
    acquires: [Acquires; HOWS.len()],
    refusals: [AtomicU64; REFUSALS.len()],
    connections: [AtomicI64; STATES.len()],
    references: AtomicI64,
    waiters: AtomicI64,
    keys: AtomicI64,
    idle_closes: AtomicU64,
    goaways: AtomicU64,
    violations: AtomicU64,
}

#[derive(Debug, Default)]
struct Acquires {
    buckets: [AtomicU64; ACQUIRE_BOUNDS_SECONDS.len() + 1],
    nanos: AtomicU64,
}

/// What there is at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Census {
    /// By state, in the order of [`STATES`].
    pub connections: [i64; STATES.len()],
    /// Leases that are held.
    pub references: i64,
    /// Those that wait for one.
    pub waiters: i64,
    /// Keys of which anything is remembered.
    pub keys: i64,
}

/// What acquires of one kind took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Took {
    /// How many took no longer than each of [`ACQUIRE_BOUNDS_SECONDS`] but longer than the one before; then, the rest.
    pub buckets: [u64; ACQUIRE_BOUNDS_SECONDS.len() + 1],
    /// All together.
    pub seconds: f64,
}

impl Stats {
    pub(super) fn opened<E>(&self, result: Result<(), &OpenError<E>>) {
        let index = match result {
            Ok(()) => 0,
            Err(OpenError::Failed(_) | OpenError::Stillborn) => 1,
            Err(OpenError::TimedOut) => 2,
            Err(OpenError::Panicked) => 3,
            Err(OpenError::Aborted) => 4,
        };
        self.opens[index].fetch_add(1, Relaxed);
    }

    pub(super) fn acquired(&self, how: How, took: Duration) {
        let acquires = &self.acquires[how as usize];
        let bucket = ACQUIRE_BOUNDS_SECONDS.iter().position(|bound| took.as_secs_f64() <= *bound);
        acquires.buckets[bucket.unwrap_or(ACQUIRE_BOUNDS_SECONDS.len())].fetch_add(1, Relaxed);
        acquires.nanos.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }

    pub(super) fn refused(&self, why: Refused) {
        self.refusals[why as usize].fetch_add(1, Relaxed);
    }

    pub(super) fn idle_close(&self) {
        self.idle_closes.fetch_add(1, Relaxed);
    }

    pub(super) fn goaway(&self) {
        self.goaways.fetch_add(1, Relaxed);
    }

    pub(super) fn violation(&self) {
        self.violations.fetch_add(1, Relaxed);
    }

    /// One key's part was `before`, and is `after`.
    pub(super) fn change(&self, before: &Census, after: &Census) {
        let add = |gauge: &AtomicI64, before: i64, after: i64| {
            if before != after {
                gauge.fetch_add(after - before, Relaxed);
            }
        };
        for (index, gauge) in self.connections.iter().enumerate() {
            add(gauge, before.connections[index], after.connections[index]);
        }
        add(&self.references, before.references, after.references);
        add(&self.waiters, before.waiters, after.waiters);
        add(&self.keys, before.keys, after.keys);
    }

    /// Opens that ended, in the order of [`OPENS`].
    pub fn opens(&self) -> [u64; OPENS.len()] {
        self.opens.each_ref().map(|count| count.load(Relaxed))
    }

    /// Acquires that gave a reference, in the order of [`HOWS`].
    pub fn acquires(&self) -> [Took; HOWS.len()] {
        self.acquires.each_ref().map(|acquires| Took {
            buckets: acquires.buckets.each_ref().map(|count| count.load(Relaxed)),
            seconds: Duration::from_nanos(acquires.nanos.load(Relaxed)).as_secs_f64(),
        })
    }

    /// Acquires that gave none, in the order of [`REFUSALS`].
    pub fn refusals(&self) -> [u64; REFUSALS.len()] {
        self.refusals.each_ref().map(|count| count.load(Relaxed))
    }

    /// What there is now.
    pub fn census(&self) -> Census {
        Census {
            connections: self.connections.each_ref().map(|gauge| gauge.load(Relaxed)),
            references: self.references.load(Relaxed),
            waiters: self.waiters.load(Relaxed),
            keys: self.keys.load(Relaxed),
        }
    }

    /// Connections that were closed since nobody used them for long enough.
    pub fn idle_closes(&self) -> u64 {
        self.idle_closes.load(Relaxed)
    }

    /// Connections whose backend wanted no more of them.
    pub fn goaways(&self) -> u64 {
        self.goaways.load(Relaxed)
    }

    /// Times at which something did not hold that must hold always. A mistake in the pool: anything but 0 is an alert.
    pub fn violations(&self) -> u64 {
        self.violations.load(Relaxed)
    }
}
