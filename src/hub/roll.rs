//! The WebSockets that clients share just now, for people who ask: where each one stands. Those of earlier settings are among them.
//!
//! It is written by the task behind each, and by its clients as they come and go. Nobody waits for who asks.

use std::{
    cmp::Reverse,
    collections::HashSet,
    fmt,
    ops::Deref,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use serde::Serialize;
use slab::Slab;
use tokio::time::Instant;

use super::{Kind, key::Digest};
use crate::{metrics::Reconnect, pool::KeySnapshot, stamp::Stamp};

/// All of them, of all routes. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct Roll(Arc<Mutex<Slab<Arc<Known>>>>);

/// Its place there, until it is dropped.
pub(super) struct Listed {
    known: Arc<Known>,
    roll: Roll,
    place: usize,
}

/// What is known of one.
#[derive(Debug)]
pub struct Known {
    route: Arc<str>,
    kind: Kind,
    key: Digest,
    now: Mutex<Now>,
    /// Of a broadcast those in their handshake included.
    pub(super) clients: AtomicUsize,
    /// With rpc.
    pub(super) outstanding: AtomicUsize,
    pub(super) subscriptions: AtomicUsize,
    /// Times that clients missed something.
    gaps: AtomicU64,
    /// Times that a backend was lost and found again.
    reconnects: AtomicU64,
}

#[derive(Debug)]
struct Now {
    state: State,
    since: Instant,
    endpoint: Option<Arc<str>>,
    /// When its clients were given up last, and why.
    given_up: Option<(Stamp, &'static str)>,
}

/// Where one stands; the worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum State {
    /// The backend was lost.
    Searching,
    /// It could not be opened just now, and is not tried again at once.
    Failed,
    Opening,
    /// It comes to its end.
    Closing,
    Open,
    /// Its clients ask nothing (rpc), so that none is needed.
    Resting,
}

impl State {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Searching => "searching",
            Self::Failed => "failed",
            Self::Opening => "opening",
            Self::Closing => "closing",
            Self::Open => "open",
            Self::Resting => "resting",
        }
    }
}

/// What is told of one.
#[derive(Debug, Serialize)]
pub struct Told {
    #[serde(skip)]
    rank: (State, Reverse<usize>),
    /// The path of the route.
    route: String,
    /// `broadcast` or `rpc`.
    pattern: &'static str,
    /// Of what clients have in common, as in their log lines.
    key: String,
    /// Where it is, or was last.
    endpoint: Option<String>,
    /// `opening`, `open`, `searching`, `closing`, `resting` or `failed`.
    state: &'static str,
    /// For how long; not known where it failed.
    since_ms: Option<u64>,
    clients: usize,
    /// Clients whose handshake waits for it.
    waiting: usize,
    /// Requests without an answer, and subscriptions (rpc).
    outstanding: usize,
    subscriptions: usize,
    gaps: u64,
    reconnects: u64,
    /// The last open failed: until then nobody tries again.
    retry_in_ms: Option<u64>,
}

impl Roll {
    fn lock(&self) -> MutexGuard<'_, Slab<Arc<Known>>> {
        // Nothing under this lock can panic half-way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that is being opened.
    pub(super) fn enter(&self, route: &Arc<str>, kind: Kind, key: Digest) -> Listed {
        let now = Now { state: State::Opening, since: Instant::now(), endpoint: None, given_up: None };
        let known = Arc::new(Known {
            route: Arc::clone(route),
            kind,
            key,
            now: Mutex::new(now),
            clients: AtomicUsize::new(0),
            outstanding: AtomicUsize::new(0),
            subscriptions: AtomicUsize::new(0),
            gaps: AtomicU64::new(0),
            reconnects: AtomicU64::new(0),
        });
        let place = self.lock().insert(Arc::clone(&known));
        Listed { known, roll: self.clone(), place }
    }

    /// `most` of them, the worst and the largest first, and how many there are besides. `pools`: each route, and what its pool knows.
    pub(super) fn told<'a>(
        &self,
        most: usize,
        pools: impl Iterator<Item = (&'a str, Kind, Vec<KeySnapshot>)>,
    ) -> (Vec<Told>, usize) {
        let mut all: Vec<Arc<Known>> = self.lock().iter().map(|(_, known)| Arc::clone(known)).collect();
        all.sort_by_cached_key(|known| known.rank());
        let mut more = all.len().saturating_sub(most);
        // Those that are not shown are known, too: their pools tell of them once more.
        let hidden: HashSet<(Arc<str>, String)> =
            all.drain(all.len() - more..).map(|known| (Arc::clone(&known.route), known.key.to_string())).collect();
        let mut told: Vec<_> = all.iter().map(|known| known.told()).collect();
        let (listed, now) = (told.len(), std::time::Instant::now());
        for (route, kind, keys) in pools {
            let is_hidden = |key: &str| !hidden.is_empty() && hidden.contains(&(Arc::from(route), key.to_owned()));
            for KeySnapshot { key, waiters, fails_until, connections } in keys {
                let retry_in_ms = fails_until.filter(|until| *until > now).map(|until| millis(until - now));
                if let Some(one) = told[..listed].iter_mut().find(|one| one.key == key && one.route == route) {
                    (one.waiting, one.retry_in_ms) = (waiters, retry_in_ms);
                } else if retry_in_ms.is_none() || !connections.is_empty() || is_hidden(&key) {
                    // It is one of those that are not shown, or about to be one.
                } else if told.len() < listed + most {
                    let mut one = Told::new(route, kind, key, State::Failed);
                    (one.waiting, one.retry_in_ms) = (waiters, retry_in_ms);
                    told.push(one);
                } else {
                    more += 1;
                }
            }
        }
        told.sort_by_key(|one| one.rank);
        more += told.len().saturating_sub(most);
        told.truncate(most);
        (told, more)
    }

    /// Those whose backend was lost, and is being looked for; and their clients.
    pub(super) fn searching(&self) -> (usize, usize) {
        let all = self.lock();
        let lost = all.iter().filter(|(_, known)| known.lock().state == State::Searching);
        lost.fold((0, 0), |(count, clients), (_, known)| (count + 1, clients + known.clients.load(Relaxed)))
    }
}

impl Listed {
    /// For its clients' sessions.
    pub(super) fn known(&self) -> Arc<Known> {
        Arc::clone(&self.known)
    }
}

impl Deref for Listed {
    type Target = Known;

    fn deref(&self) -> &Known {
        &self.known
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.roll.lock().try_remove(self.place);
    }
}

impl fmt::Debug for Listed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.known.fmt(f)
    }
}

impl Known {
    fn lock(&self) -> MutexGuard<'_, Now> {
        // Nothing under this lock can panic.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For logs.
    pub fn key(&self) -> Digest {
        self.key
    }

    /// Why the backend's end was that of a client's session which began at this moment.
    pub fn why(&self, begun: Stamp) -> &'static str {
        match (self.lock().given_up, self.kind) {
            (Some((at, why)), _) if at >= begun => why,
            (_, Kind::Rpc) => "backend lost, and subscriptions with it",
            (_, Kind::Broadcast) => "shared WebSocket ended",
        }
    }

    pub(super) fn is(&self, state: State) {
        let mut now = self.lock();
        if now.state != state {
            (now.state, now.since) = (state, Instant::now());
        }
    }

    /// It is open, there.
    pub(super) fn is_at(&self, endpoint: &Arc<str>) {
        self.is(State::Open);
        self.lock().endpoint = Some(Arc::clone(endpoint));
    }

    /// The same, after a search.
    pub(super) fn is_found_at(&self, endpoint: &Arc<str>) {
        self.reconnects.fetch_add(1, Relaxed);
        self.is_at(endpoint);
    }

    pub(super) fn gap(&self) {
        self.gaps.fetch_add(1, Relaxed);
    }

    /// Its clients get their end.
    pub(super) fn give_up(&self, why: &'static str) {
        self.lock().given_up = Some((Stamp::now(), why));
    }

    fn rank(&self) -> (State, Reverse<usize>) {
        (self.lock().state, Reverse(self.clients.load(Relaxed)))
    }

    fn told(&self) -> Told {
        let now = self.lock();
        let rank = (now.state, Reverse(self.clients.load(Relaxed)));
        Told {
            rank,
            endpoint: now.endpoint.as_ref().map(ToString::to_string),
            since_ms: Some(millis(now.since.elapsed())),
            clients: rank.1.0,
            outstanding: self.outstanding.load(Relaxed),
            subscriptions: self.subscriptions.load(Relaxed),
            gaps: self.gaps.load(Relaxed),
            reconnects: self.reconnects.load(Relaxed),
            ..Told::new(&self.route, self.kind, self.key.to_string(), now.state)
        }
    }
}

impl Told {
    fn new(route: &str, kind: Kind, key: String, state: State) -> Self {
        let pattern = match kind {
            Kind::Broadcast => "broadcast",
            Kind::Rpc => "rpc",
        };
        Self {
            rank: (state, Reverse(0)),
            route: route.to_owned(),
            pattern,
            key,
            endpoint: None,
            state: state.as_str(),
            since_ms: None,
            clients: 0,
            waiting: 0,
            outstanding: 0,
            subscriptions: 0,
            gaps: 0,
            reconnects: 0,
            retry_in_ms: None,
        }
    }
}

/// Why clients get their end, for their log lines.
pub(super) const fn given_up(result: Reconnect) -> &'static str {
    match result {
        Reconnect::Refused => "backend refused the shared WebSocket, or chose another subprotocol",
        Reconnect::Expired => "backend gone beyond pool.reconnect_grace",
        Reconnect::Connected | Reconnect::Unused => "",
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The worst come first, then the largest, as many as are wanted; those whose open has just failed are among them, and whoever has ended is not.
    /// One that is searched for, and that its pool can't open, is one, also where it is not shown.
    #[test]
    fn the_worst_come_first() {
        let (roll, route) = (Roll::default(), Arc::from("/r"));
        let enter = |number: u64| roll.enter(&route, Kind::Broadcast, Digest::of(number));
        let listed: Vec<_> = (1..=4).map(enter).collect();
        for (one, clients) in listed.iter().zip([1, 3, 2, 1]) {
            one.is_at(&Arc::from("10.0.0.1:80"));
            one.clients.store(clients, Relaxed);
        }
        listed[3].is(State::Searching);
        listed[3].gap();
        drop(enter(5));
        let failed = |key: &str, waiters| KeySnapshot {
            key: key.to_owned(),
            connections: Vec::new(),
            waiters,
            fails_until: Some(std::time::Instant::now() + Duration::from_mins(1)),
        };
        let keys = vec![failed("00000000000f", 0), failed(&listed[1].key().to_string(), 5)];
        let (told, more) = roll.told(3, [("/r", Kind::Broadcast, keys)].into_iter());
        let told: Vec<_> = told.iter().map(|one| (one.state, one.key.as_str(), one.clients, one.waiting)).collect();
        let keys =
            [("searching", "000000000004", 1, 0), ("failed", "00000000000f", 0, 0), ("open", "000000000002", 3, 5)];
        assert_eq!((told, more), (keys.to_vec(), 2));
        listed[2].is(State::Searching);
        let keys = || vec![failed("000000000003", 0), failed("000000000004", 0)];
        for (most, besides) in [(0, 4), (1, 3), (2, 2), (9, 0)] {
            let (told, more) = roll.told(most, [("/r", Kind::Broadcast, keys())].into_iter());
            assert_eq!((told.len(), more), (4 - besides, besides), "{most}");
        }
        listed[2].is(State::Open);
        assert_eq!(roll.searching(), (1, 1));
    }

    /// A session that had begun when its WebSocket was given up has ended for that, and no later one.
    #[test]
    fn who_was_there_is_told_why() {
        let one = Roll::default().enter(&Arc::from("/r"), Kind::Rpc, Digest::of(1));
        let begun = Stamp::now();
        assert!(one.why(begun).contains("subscriptions"));
        one.give_up(given_up(Reconnect::Expired));
        assert!(one.why(begun).contains("pool.reconnect_grace"));
        assert!(one.why(Stamp::now() + Duration::from_secs(1)).contains("subscriptions"));
    }
}
