//! Connections to a backend that wait for somebody to use them: fresh ones for WebSocket handshakes (`pool.prewarm`), and those on
//! which plain requests were answered (`pool.keep_alive`). And for a moment one that was meant for HTTP/2, until one of those who waited for it
//! has its turn.
//!
//! Each worker has its own, since a socket belongs to its runtime. The bounds are for all workers together: of `prewarm` each has
//! an equal share, the first ones one more where that leaves a rest; `keep_alive` is counted at the endpoint. All of them, of all
//! ways, have a slot of those that the budget has set aside.
//!
//! ```text
//! prewarm:     keeper -> dial, in a spare turn -> waits --.
//! keep_alive:  a complete answer -----------------> waits --+-> looked at -> used -> nothing heard but its end: a fresh one, once
//!                                                           '-> too old, ended by the backend, drain, reload: FIN
//! ```
//!
//! A reload hands those on that would be made the same way again; what a session of before leaves behind is not among them.
//!
//! Not here: what is sent on them, and what may be sent twice (`exchange.rs`, `mod.rs`). A connection that was upgraded never comes
//! here.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, OwnedSemaphorePermit},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{
    Failure, Home, Inner, Mode, Upstream,
    endpoints::Endpoint,
    tls::{self, Speaks},
};
use crate::{
    metrics::{Counted, IdleUse},
    net::{self, DialError, Stream},
};

/// How often those that wait are looked at. One that the backend has ended is not used in any case; this is how long its descriptor
/// is held for nothing.
const LOOK: Duration = Duration::from_millis(250);

/// Until it is seen whether a turn is to spare now.
const NO_TURN: Duration = Duration::from_millis(50);

/// After a dial in vain, until the next one: twice as long with each in a row.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// Whoever a connection is for that agreed on HTTP/1.1 takes it in this time, or has no turn yet.
const AGREED: Duration = Duration::from_secs(2);

/// Of the age at which a prewarmed connection is replaced, as a part of `prewarm_max_age`: those that were opened together are not to
/// end together.
const SPREAD: std::ops::Range<f64> = 0.75..1.0;

/// What connections wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A WebSocket handshake.
    Prewarm,
    /// A plain request.
    KeepAlive,
    /// A WebSocket handshake for which HTTP/2 was wanted, and HTTP/1.1 is what TLS has agreed on. Neither configured nor counted.
    Agreed,
}

/// Those of each worker, for one way.
#[derive(Debug, Default)]
pub(super) struct Workers {
    all: Mutex<HashMap<usize, Arc<Idle>>>,
    /// Nobody will use them any more.
    closed: CancellationToken,
}

impl Workers {
    /// All of them are for `heirs` to have, as far as these want them, the first ones before others; the rest is ended. None waits here
    /// from now on.
    pub(super) fn hand_over(&self, heirs: &[&Upstream]) {
        let all: Vec<_> = self.all.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        for idle in all {
            for Shelf { endpoint, prewarmed, kept, agreed, .. } in idle.clear() {
                let all = [(Kind::Prewarm, prewarmed), (Kind::KeepAlive, kept), (Kind::Agreed, agreed)];
                for (kind, mut waiting) in all {
                    for heir in heirs {
                        waiting = heir.idle_of(&idle.home).inherit(kind, &endpoint, waiting);
                    }
                    for waiting in waiting {
                        (idle.home.end)(waiting.stream);
                    }
                }
            }
        }
        self.closed.cancel();
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}

/// Those of one worker.
#[derive(Debug)]
pub(super) struct Idle {
    /// Weak, since this belongs to it.
    upstream: Weak<Inner>,
    home: Home,
    shelves: Mutex<Shelves>,
    /// Something was used, or put here.
    wake: Notify,
    closed: CancellationToken,
}

#[derive(Debug, Default)]
struct Shelves {
    /// A task looks after them.
    is_kept: bool,
    /// That task has ended.
    is_closed: bool,
    /// Few, or as many as a name has addresses.
    all: Vec<Shelf>,
}

/// What waits for an endpoint. The last of each is the youngest.
#[derive(Debug)]
struct Shelf {
    endpoint: Arc<Endpoint>,
    prewarmed: Vec<Waiting>,
    kept: Vec<Waiting>,
    agreed: Vec<Waiting>,
    /// One is being dialled: one at a time.
    is_opening: bool,
    /// Dials in vain, in a row.
    failures: u32,
    not_before: Instant,
}

#[derive(Debug)]
struct Waiting {
    stream: Stream,
    since: Instant,
    until: Instant,
    _slot: Option<OwnedSemaphorePermit>,
    _counted: Option<Counted>,
    _place: Option<Place>,
}

impl Waiting {
    /// The backend has said nothing since, and not ended it. Of one that was just made its TLS may still have to say something, and as
    /// with any fresh one its end is seen when it is used.
    fn is_as_left(&mut self, kind: Kind) -> bool {
        kind == Kind::Agreed || self.stream.is_silent()
    }
}

/// One of an endpoint's `keep_alive`.
#[derive(Debug)]
struct Place(Arc<Endpoint>);

impl Place {
    fn new(endpoint: &Arc<Endpoint>, most: usize) -> Option<Self> {
        let one_more = |count: usize| (count < most).then_some(count + 1);
        endpoint.kept.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        Some(Self(Arc::clone(endpoint)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.kept.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How many are in waiting at an endpoint for plain requests, on all workers.
pub(super) type Count = AtomicUsize;

impl Shelf {
    fn new(endpoint: Arc<Endpoint>) -> Self {
        let (prewarmed, kept, agreed) = (Vec::new(), Vec::new(), Vec::new());
        Self { endpoint, prewarmed, kept, agreed, is_opening: false, failures: 0, not_before: Instant::now() }
    }

    fn of(&mut self, kind: Kind) -> &mut Vec<Waiting> {
        match kind {
            Kind::Prewarm => &mut self.prewarmed,
            Kind::KeepAlive => &mut self.kept,
            Kind::Agreed => &mut self.agreed,
        }
    }

    /// All that waits.
    fn into_waiting(self) -> impl Iterator<Item = Waiting> {
        self.prewarmed.into_iter().chain(self.kept).chain(self.agreed)
    }
}

impl Shelves {
    fn of(&mut self, endpoint: &Arc<Endpoint>) -> &mut Shelf {
        let found = self.all.iter().position(|shelf| Arc::ptr_eq(&shelf.endpoint, endpoint));
        let index = found.unwrap_or_else(|| {
            self.all.push(Shelf::new(Arc::clone(endpoint)));
            self.all.len() - 1
        });
        &mut self.all[index]
    }
}

impl Upstream {
    /// Those of a worker that may be used, if any may.
    pub(super) fn idle(&self, home: &Home, kind: Kind) -> Option<Arc<Idle>> {
        let pool = &self.inner.config.pool;
        let is_wanted = match kind {
            Kind::Prewarm => self.share(home) > 0,
            Kind::KeepAlive => pool.keep_alive > 0,
            Kind::Agreed => pool.mode == Mode::Multiplexed,
        };
        is_wanted.then(|| self.idle_of(home))
    }

    /// Opens what `prewarm` wants, and keeps it so. Once is enough.
    pub(super) fn prewarm(&self, home: &Home) {
        if let Some(idle) = self.idle(home, Kind::Prewarm) {
            idle.is_to_be_kept(&mut idle.shelves());
        }
    }

    /// Both make connections in the same way.
    pub(super) fn connects_like(&self, other: &Self) -> bool {
        let (own, others) = (&self.inner, &other.inner);
        own.config.tls == others.config.tls
            && own.config.source_addresses == others.config.source_addresses
            && own.socket == others.socket
    }

    /// What a worker has of `prewarm`. Handshakes on streams of a shared connection have no use for it.
    fn share(&self, home: &Home) -> usize {
        let pool = &self.inner.config.pool;
        if pool.mode == Mode::Multiplexed {
            return 0;
        }
        pool.prewarm / home.workers + usize::from(home.worker < pool.prewarm % home.workers)
    }

    pub(super) fn idle_of(&self, home: &Home) -> Arc<Idle> {
        let Workers { all, closed } = &self.inner.idle;
        let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            Arc::new(Idle {
                upstream: Arc::downgrade(&self.inner),
                home: home.clone(),
                shelves: Mutex::default(),
                wake: Notify::new(),
                closed: closed.clone(),
            })
        };
        Arc::clone(all.entry(home.worker).or_insert_with(new))
    }
}

impl Idle {
    fn shelves(&self) -> MutexGuard<'_, Shelves> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, kind: Kind, what: IdleUse) {
        if kind == Kind::Agreed {
            return;
        }
        if let Some(inner) = self.upstream.upgrade() {
            inner.metrics.idle_use(kind as usize, what);
        }
    }

    /// One that the backend has not ended, as far as can be told here.
    pub(super) fn take(&self, kind: Kind, endpoint: &Arc<Endpoint>) -> Option<Stream> {
        let found = loop {
            let Some(mut waiting) = self.shelves().of(endpoint).of(kind).pop() else { break None };
            if waiting.until > Instant::now() && waiting.is_as_left(kind) {
                break Some(waiting.stream);
            }
            if waiting.until > Instant::now() {
                self.count(kind, IdleUse::Stale);
            }
            (self.home.end)(waiting.stream);
        };
        self.count(kind, if found.is_some() { IdleUse::Hit } else { IdleUse::Miss });
        if kind == Kind::Prewarm {
            self.wake.notify_one();
        }
        found
    }

    /// Nothing came of one that was used but its end.
    pub(super) fn was_stale(&self, kind: Kind, stream: Option<Stream>) {
        self.count(kind, IdleUse::Stale);
        if let Some(stream) = stream {
            (self.home.end)(stream);
        }
    }

    /// A connection whose request is answered in full, and that the backend has not said it would end. Given back if there is no room.
    pub(super) fn keep(self: &Arc<Self>, endpoint: &Arc<Endpoint>, stream: Stream) -> Option<Stream> {
        let Some(inner) = self.upstream.upgrade() else { return Some(stream) };
        let pool = &inner.config.pool;
        let mut shelves = self.shelves();
        if shelves.is_closed || self.is_over() {
            return Some(stream);
        }
        let Some(place) = Place::new(endpoint, pool.keep_alive) else { return Some(stream) };
        let Ok(slot) = inner.endpoints.idle_slot() else { return Some(stream) };
        let counted = Counted::new(&inner.metrics.idle[Kind::KeepAlive as usize]);
        let since = Instant::now();
        let until = since + pool.keep_alive_timeout;
        let (slot, counted) = (Some(slot), Some(counted));
        let waiting = Waiting { stream, since, until, _slot: slot, _counted: counted, _place: Some(place) };
        shelves.of(endpoint).kept.push(waiting);
        self.is_to_be_kept(&mut shelves);
        self.wake.notify_one();
        None
    }

    /// A connection on which TLS has agreed on HTTP/1.1, for one of those who wanted HTTP/2 of it. It has no slot of those that wait: each
    /// open has one at most, and its client would dial another. Given back if nothing waits any more.
    pub(super) fn agree(self: &Arc<Self>, endpoint: &Arc<Endpoint>, stream: Stream) -> Option<Stream> {
        let mut shelves = self.shelves();
        if shelves.is_closed || self.is_over() {
            return Some(stream);
        }
        let since = Instant::now();
        let until = since + AGREED;
        shelves.of(endpoint).agreed.push(Waiting { stream, since, until, _slot: None, _counted: None, _place: None });
        self.is_to_be_kept(&mut shelves);
        self.wake.notify_one();
        None
    }

    /// Goes on with some of those that waited at the same worker for another way, the youngest ones; gives back the others.
    fn inherit(self: &Arc<Self>, kind: Kind, endpoint: &Arc<Endpoint>, mut all: Vec<Waiting>) -> Vec<Waiting> {
        let Some(upstream) = self.upstream.upgrade().map(|inner| Upstream { inner }) else { return all };
        let is_there = upstream.inner.endpoints.now().iter().any(|one| Arc::ptr_eq(one, endpoint));
        if all.is_empty() || !is_there || self.is_over() {
            return all;
        }
        let pool = &upstream.inner.config.pool;
        let (most, age) = match kind {
            Kind::Prewarm => (self.share(&upstream), pool.prewarm_max_age),
            Kind::KeepAlive => (pool.keep_alive, pool.keep_alive_timeout),
            Kind::Agreed => return all,
        };
        let mut shelves = self.shelves();
        let row = shelves.of(endpoint).of(kind);
        // There may be fewer at the endpoint than before, of all workers.
        let is_full = kind == Kind::KeepAlive && endpoint.kept.load(Ordering::Relaxed) > most;
        let count = if is_full { 0 } else { most.saturating_sub(row.len()).min(all.len()) };
        if count == 0 {
            return all;
        }
        for mut waiting in all.split_off(all.len() - count) {
            waiting.until = waiting.until.min(waiting.since + age);
            row.push(waiting);
        }
        // Of another way there may be some already.
        row.sort_by_key(|waiting| waiting.since);
        self.is_to_be_kept(&mut shelves);
        self.wake.notify_one();
        all
    }

    /// What waits here, where nothing waits from now on.
    fn clear(&self) -> Vec<Shelf> {
        let mut shelves = self.shelves();
        shelves.is_closed = true;
        std::mem::take(&mut shelves.all)
    }

    fn is_over(&self) -> bool {
        self.closed.is_cancelled() || self.home.drain.has_begun()
    }

    fn is_to_be_kept(self: &Arc<Self>, shelves: &mut Shelves) {
        if !std::mem::replace(&mut shelves.is_kept, true) {
            self.home.tracker.spawn_on(Arc::clone(self).look_after(), &self.home.runtime);
        }
    }

    /// Ends those that are not to be used, and opens others, until the drain's window opens or its way is given up.
    async fn look_after(self: Arc<Self>) {
        let mut look = Instant::now();
        while let Some(inner) = self.upstream.upgrade() {
            let upstream = Upstream { inner };
            if look <= Instant::now() {
                look = self.tidy_up(&upstream);
            }
            let wake = self.refill(&upstream).map_or(look, |wake| wake.min(look));
            drop(upstream);
            tokio::select! {
                biased;
                () = self.home.drain.begun() => break,
                () = self.closed.cancelled() => break,
                () = sleep_until(wake) => {}
                // What was put here last is due after the next look.
                () = self.wake.notified() => look = look.min(Instant::now() + LOOK),
            }
        }
        for waiting in self.clear().into_iter().flat_map(Shelf::into_waiting) {
            (self.home.end)(waiting.stream);
        }
    }

    /// Ends what is too old, what the backend has ended, and what is for an endpoint that is gone; when this is to be done again.
    fn tidy_up(&self, upstream: &Upstream) -> Instant {
        let (now, share) = (Instant::now(), self.share(upstream));
        if share > 0 {
            upstream.inner.endpoints.ask(&upstream.inner.config);
        }
        let endpoints = upstream.inner.endpoints.now();
        let mut next = now + Duration::from_hours(1);
        let mut over = Vec::new();
        let mut shelves = self.shelves();
        shelves.all.retain_mut(|shelf| {
            let is_there = endpoints.iter().any(|endpoint| Arc::ptr_eq(endpoint, &shelf.endpoint));
            for kind in [Kind::Prewarm, Kind::KeepAlive, Kind::Agreed] {
                let waiting = shelf.of(kind);
                let is_over = |it: &mut Waiting| !is_there || it.until <= now || !it.is_as_left(kind);
                over.extend(waiting.extract_if(.., is_over));
                let first = waiting.iter().map(|it| it.until).min();
                next = first.map_or(next, |first| next.min(first).min(now + LOOK));
            }
            is_there
        });
        if share > 0 {
            next = next.min(now + LOOK);
        }
        drop(shelves);
        for waiting in over {
            (self.home.end)(waiting.stream);
        }
        next
    }

    /// Begins to open what is missing; when it has to be seen to again, if not when one of these is done.
    fn refill(self: &Arc<Self>, upstream: &Upstream) -> Option<Instant> {
        let (now, share) = (Instant::now(), self.share(upstream));
        if share == 0 {
            return None;
        }
        let mut wake: Option<Instant> = None;
        for endpoint in upstream.inner.endpoints.now() {
            // It is looked at by others, and none of its clients come here.
            if endpoint.is_ejected() {
                continue;
            }
            let mut shelves = self.shelves();
            let row = shelves.of(&endpoint);
            if row.is_opening || row.prewarmed.len() >= share {
                continue;
            }
            let mut later = |at: Instant| wake = Some(wake.map_or(at, |wake| wake.min(at)));
            if row.not_before > now {
                later(row.not_before);
                continue;
            }
            let Ok(slot) = upstream.inner.endpoints.idle_slot() else {
                later(now + LOOK);
                continue;
            };
            if !endpoint.connects.spare() {
                later(now + NO_TURN);
                continue;
            }
            row.is_opening = true;
            drop(shelves);
            let (this, weak) = (Arc::clone(self), Weak::clone(&self.upstream));
            // Nobody has to wait for it: nothing was sent.
            upstream.inner.endpoints.in_background(async move {
                let Some(inner) = weak.upgrade() else { return };
                let dialled = Upstream { inner }.dial_ahead(&endpoint).await;
                this.opened(&endpoint, dialled, slot);
            });
        }
        wake
    }

    fn share(&self, upstream: &Upstream) -> usize {
        upstream.share(&self.home)
    }

    fn opened(&self, endpoint: &Arc<Endpoint>, dialled: Result<Stream, Option<Stream>>, slot: OwnedSemaphorePermit) {
        let mut shelves = self.shelves();
        let inner = self.upstream.upgrade().filter(|_| !shelves.is_closed && !self.is_over());
        let left = if let Some(inner) = inner {
            let row = shelves.of(endpoint);
            row.is_opening = false;
            match dialled {
                Ok(stream) => {
                    row.failures = 0;
                    let age = inner.config.pool.prewarm_max_age.mul_f64(rand::random_range(SPREAD));
                    let counted = Counted::new(&inner.metrics.idle[Kind::Prewarm as usize]);
                    let since = Instant::now();
                    let until = since + age;
                    let (slot, counted) = (Some(slot), Some(counted));
                    row.prewarmed.push(Waiting { stream, since, until, _slot: slot, _counted: counted, _place: None });
                    None
                }
                Err(left) => {
                    let wait = BACKOFF.0.saturating_mul(1 << row.failures.min(16)).min(BACKOFF.1);
                    row.failures += 1;
                    row.not_before = Instant::now() + wait.mul_f64(rand::random_range(0.5..1.0));
                    left
                }
            }
        } else {
            // Nobody will use it. Its TLS handshake may have left something unread, so it is ended in order, too.
            dialled.map_or_else(|left| left, Some)
        };
        drop(shelves);
        if let Some(stream) = left {
            (self.home.end)(stream);
        }
        self.wake.notify_one();
    }
}

impl Upstream {
    /// A connection that nobody waits for, as far as it can be made ready without a request.
    /// Else what is left of it.
    async fn dial_ahead(&self, endpoint: &Arc<Endpoint>) -> Result<Stream, Option<Stream>> {
        let Inner { config, socket, endpoints, sources, .. } = &*self.inner;
        let dial = net::dial(endpoint.address(), sources, socket, || self.one_more_port(endpoint));
        match timeout(config.connect_timeout, dial).await {
            Ok(Ok(stream)) => {
                let deadline = Instant::now() + config.connect_timeout;
                let secured = tls::secure(stream, endpoint.address(), config, Speaks::Http1, deadline).await;
                let outcome = secured.as_ref().map(drop).map_err(|failure| failure as &dyn fmt::Display);
                endpoints.heard(endpoint, outcome, config);
                secured.map_err(|Failure { error, stream }| {
                    debug!(endpoint = endpoint.name(), %error, "no connection ahead of the next client");
                    stream
                })
            }
            Ok(Err(DialError::Io(error))) => {
                debug!(endpoint = endpoint.name(), %error, "no connection ahead of the next client");
                endpoints.heard(endpoint, Err(&error), config);
                Err(None)
            }
            // It was not asked.
            Ok(Err(DialError::Shortage { .. })) => Err(None),
            Err(late) => {
                endpoints.heard(endpoint, Err(&late), config);
                Err(None)
            }
        }
    }
}
