//! All ways to backends: that of `[upstream]`, and those of the routes.

use std::{collections::HashSet, sync::Arc, time::Instant};

use serde::Serialize;
use tokio_util::task::TaskTracker;

use super::{
    Ambiguous, Config, Home, Mode, Pattern, Routes, Seats, Upstream,
    endpoints::{Registry, State},
};
use crate::{
    metrics::Metrics,
    net::{Address, SocketConfig, Sources},
    pool::{ConnectionSnapshot, KeySnapshot},
};

/// Where requests go. Clones share everything.
#[derive(Debug, Clone)]
pub struct Upstreams {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    routes: Routes<Way>,
    ports: Option<u64>,
    registry: Arc<Registry>,
}

/// Where some of them go.
#[derive(Debug, Clone)]
pub struct Way {
    /// The path of its route, as it is written; "" for what no route is for.
    pub route: Arc<str>,
    /// Its backend.
    pub upstream: Upstream,
    /// The sessions of its route, of an earlier one for the same path too.
    pub seats: Seats,
}

/// What one worker shares toward an endpoint.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Shared {
    /// The path of the route; "" for that of `[upstream]`.
    pub route: String,
    /// Its address.
    pub endpoint: String,
    /// Sessions that wait for a stream.
    pub waiters: usize,
    /// The last connect failed: until then nobody tries again.
    pub retry_in_ms: Option<u64>,
    /// Oldest first.
    pub connections: Vec<SharedConnection>,
}

/// A connection that sessions share.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct SharedConnection {
    /// `open`, `idle`, `draining` or `closed`, as in `tidegate_pool_connections`.
    pub state: &'static str,
    /// Sessions that have a stream of it.
    pub references: usize,
    /// So many may have one; `None`: it is not known yet.
    pub capacity: Option<usize>,
}

impl Shared {
    /// Of a route's pool, whose keys are endpoints.
    fn new(route: &str, key: KeySnapshot, now: Instant) -> Self {
        let millis = |until: Instant| u64::try_from((until - now).as_millis()).unwrap_or(u64::MAX);
        let connections =
            key.connections.into_iter().map(|ConnectionSnapshot { state, references, capacity, .. }| {
                SharedConnection { state, references, capacity }
            });
        Self {
            route: route.to_owned(),
            endpoint: key.key,
            waiters: key.waiters,
            retry_in_ms: key.fails_until.filter(|until| *until > now).map(millis),
            connections: connections.collect(),
        }
    }
}

impl Upstreams {
    /// Nothing is connected yet. `config` is that of requests for which none of `routes` is. `ports` is how many ephemeral ports
    /// one address has, if that is known.
    pub fn new(
        config: Config,
        routes: impl IntoIterator<Item = (Pattern, Config)>,
        socket: &SocketConfig,
        metrics: &Arc<Metrics>,
        ports: Option<u64>,
    ) -> Self {
        let registry = Registry::new(Arc::clone(metrics), config.max_pending);
        Self::with(config, routes, socket, metrics, (ports, registry), None)
    }

    /// The ways from now on; these remain for those who have begun with them. At the same endpoint both share their turns and
    /// its health: what it can bear has not changed. How it can be spoken to is found out anew: the backend may be another one.
    #[must_use]
    pub fn reconfigured(
        &self,
        config: Config,
        routes: impl IntoIterator<Item = (Pattern, Config)>,
        socket: &SocketConfig,
        ports: Option<u64>,
        tracker: &TaskTracker,
    ) -> Self {
        let registry = Arc::clone(&self.inner.registry);
        registry.resize(config.max_pending, tracker);
        registry.forget();
        let metrics = Arc::clone(registry.metrics());
        Self::with(config, routes, socket, &metrics, (ports, registry), Some(self))
    }

    fn with(
        config: Config,
        routes: impl IntoIterator<Item = (Pattern, Config)>,
        socket: &SocketConfig,
        metrics: &Arc<Metrics>,
        (ports, registry): (Option<u64>, Arc<Registry>),
        before: Option<&Self>,
    ) -> Self {
        // Their sessions go on.
        let seats = |route: &str| {
            let earlier = before.and_then(|before| before.inner.routes.all().find(|way| *way.route == *route));
            earlier.map_or_else(Seats::default, |way| way.seats.clone())
        };
        // A port is taken toward one destination.
        let each = ports.map(|ports| ports.saturating_mul(Sources::new(&config.source_addresses).count() as u64));
        let way = |route: String, config| Way {
            seats: seats(&route),
            route: route.into(),
            upstream: Upstream::new(config, socket.clone(), Arc::clone(metrics), each, &registry),
        };
        let otherwise = way(String::new(), config);
        let ways = routes.into_iter().map(|(pattern, config)| (pattern.clone(), way(pattern.to_string(), config)));
        let routes = Routes::new(ways, otherwise);
        let all: HashSet<_> = routes.all().flat_map(|way| way.upstream.config().address.as_slice()).collect();
        let takes_ports = all.iter().all(|address| matches!(address, Address::Tcp { .. }));
        let ports = each.filter(|ports| takes_ports && *ports > 0).map(|ports| ports.saturating_mul(all.len() as u64));
        metrics.upstream_ports_limit.set(ports.map_or(0, |ports| i64::try_from(ports).unwrap_or(i64::MAX)));
        // Sessions that share connections take few. Where they can't after all, those for whom there is none get 503 all the same.
        let ports = ports.filter(|_| routes.all().any(|way| way.upstream.config().pool.mode == Mode::Dedicated));
        Self { inner: Arc::new(Inner { routes, ports, registry }) }
    }

    /// Keeps connections ready for the handshakes of a worker, as far as that is configured. Once is enough, for each worker.
    pub fn prewarm(&self, home: &Home) {
        for way in self.inner.routes.all() {
            way.upstream.prewarm(home);
        }
    }

    /// `next` takes the place of these ways: no connection waits for its use here any more. Those that `next` would make again wait
    /// there, first of all for the same route; the others are ended.
    pub fn retire(&self, next: &Self) {
        for way in self.inner.routes.all() {
            let mut heirs: Vec<_> =
                next.inner.routes.all().filter(|heir| heir.upstream.connects_like(&way.upstream)).collect();
            heirs.sort_by_key(|heir| heir.route != way.route);
            let heirs: Vec<_> = heirs.into_iter().map(|heir| &heir.upstream).collect();
            way.upstream.inner.idle.hand_over(&heirs);
        }
    }

    /// So many connections may wait for their use, all ways, endpoints and kinds together; none before this was said.
    pub fn allow_idle(&self, count: usize) {
        self.inner.registry.allow_idle(count);
    }

    /// How many may.
    pub fn most_idle(&self) -> usize {
        self.inner.registry.most_idle()
    }

    /// How many connections are to wait for their use, a name counted as one endpoint.
    pub fn idle(&self) -> usize {
        self.inner.routes.all().map(|way| way.upstream.config().idle()).sum()
    }

    /// The way of a request for `path`, as it was sent and without its query.
    ///
    /// # Errors
    ///
    /// Read in another way it is one of another route.
    pub fn choose(&self, path: &str) -> Result<&Way, Ambiguous<'_, Way>> {
        self.inner.routes.choose(path)
    }

    /// All ways.
    pub fn ways(&self) -> impl Iterator<Item = &Way> {
        self.inner.routes.all()
    }

    /// The way of requests that no route is for.
    pub fn otherwise(&self) -> &Upstream {
        &self.inner.routes.otherwise().upstream
    }

    /// The state of `most` endpoints, old ones that still have sessions among them; and how many there are besides.
    pub fn endpoints(&self, most: usize) -> (Vec<State>, usize) {
        self.inner.registry.states(most)
    }

    /// The shared connections of each worker toward `most` endpoints of its ways; and toward how many there are besides.
    pub fn shared(&self, most: usize) -> (Vec<Shared>, usize) {
        let now = Instant::now();
        let all = self.inner.routes.all().flat_map(|way| {
            let keys = way.upstream.inner.shared.snapshot();
            keys.into_iter().map(|key| Shared::new(&way.route, key, now))
        });
        let mut all: Vec<_> = all.collect();
        let more = all.len().saturating_sub(most);
        all.truncate(most);
        (all, more)
    }

    /// It is this very one, and not one that took its place.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// How many sessions have a port toward a backend, for all sources together, a name counted as one; `None`: some take none, all
    /// share connections, or nobody knows.
    pub fn ports(&self) -> Option<u64> {
        self.inner.ports
    }
}
