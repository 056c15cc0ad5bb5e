//! The endpoints of a backend: who they are, how many sessions each has, and which of them take connections.
//!
//! An endpoint is the same object for all routes that lead to it, and over reloads: its turns, its sessions and what is known of
//! it belong to whoever listens there. Names are looked up by the system's resolver, which says nothing of how long an answer
//! holds; so they are looked up again and again, while clients come, one look-up at a time and behind their backs.
//!
//! "localhost" is one endpoint, whatever addresses it has: they are all this host.

use std::{
    collections::HashMap,
    fmt,
    future::{Future, pending},
    io,
    net::{IpAddr, SocketAddr},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde::Serialize;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::{Notify, OwnedSemaphorePermit, Semaphore, TryAcquireError, watch},
    time::{Instant, timeout, timeout_at},
};
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::{
    Addresses, Config, Error, Failure,
    choice::{Candidate, Health, Policy, choose},
    idle,
    multiplexed::Knowledge,
    open::LATE,
    tls::{self, Speaks},
    turns::Turns,
};
use crate::{
    metrics::{Counted, Metrics, Port, Ports},
    net::{self, Address, SocketConfig, Sources},
};

/// Of one name; the rest of an answer is left out.
const MAX_OF_NAME: usize = 256;

/// An answer that is older than twice the interval is from before nobody came for a while: the next one is waited for, for so long.
const FRESH: Duration = Duration::from_secs(1);

/// How long an endpoint that was only looked at has for its side of the end.
const LOOK_LINGER: Duration = Duration::from_secs(1);

/// Where a process listens.
pub(super) struct Endpoint {
    address: Address,
    /// As it is displayed.
    name: Arc<str>,
    /// Connections that it may not have accepted yet, of both kinds: one that is out of turn waits in its accept queue.
    pub(super) connects: Turns,
    /// WebSocket handshakes until they are answered. Plain requests have no part in these: an answer may be long in coming
    /// (long polling).
    pub(super) handshakes: Turns,
    /// Whether it takes WebSockets over HTTP/2.
    pub(super) knowledge: Knowledge,
    /// Idle connections of plain requests, on all workers.
    pub(super) kept: idle::Count,
    load: AtomicUsize,
    /// Not its sessions: these may share connections, and a Unix socket takes none.
    pub(super) ports: Arc<Ports>,
    /// That they become scarce was said.
    pub(super) has_warned: AtomicBool,
    known: Mutex<Known>,
    /// Told when it is left alone.
    ejections: Notify,
    /// In which state it is counted.
    counted: Mutex<Counted>,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct Known {
    health: Health,
    /// When it was last looked at, for `health_interval`.
    looked: Option<Instant>,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Endpoint").field(&self.name).finish()
    }
}

/// A session or request at an endpoint. It is counted there until this is dropped.
#[derive(Debug)]
pub struct Load(Arc<Endpoint>);

impl Load {
    fn new(endpoint: Arc<Endpoint>) -> Self {
        endpoint.load.fetch_add(1, Ordering::Relaxed);
        Self(endpoint)
    }

    /// The endpoint's address.
    pub fn endpoint(&self) -> &Arc<str> {
        &self.0.name
    }

    pub(super) fn get(&self) -> &Arc<Endpoint> {
        &self.0
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.load.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Endpoint {
    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    /// The same, as it is displayed.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    pub(super) fn is_ejected(&self) -> bool {
        self.known().health.ejected_since().is_some()
    }

    /// A connection came about.
    fn succeeded(&self) {
        if self.known().health.succeeded(Instant::now()) {
            info!(endpoint = %self.name, "an endpoint takes connections again");
            self.count();
        }
    }

    /// None came about, and that is not this host's fault.
    fn failed(&self, policy: Policy, error: &dyn fmt::Display) {
        if self.known().health.failed(Instant::now(), policy, rand::random()) {
            let fix = "see whether it runs; it is tried again by itself";
            warn!(endpoint = %self.name, %error, fix, "an endpoint takes no connections: others get its clients");
            self.metrics.upstream_ejections.inc();
            self.count();
            self.ejections.notify_waiters();
        }
    }

    fn count(&self) {
        // Looked at under the lock, so that whoever comes last has seen all.
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        *counted = Counted::new(&self.metrics.upstream_endpoints[usize::from(self.is_ejected())]);
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What may be said of an endpoint.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct State {
    /// Where it is.
    pub address: String,
    /// `active`, or `ejected` while it is left alone since it takes no connections.
    pub state: &'static str,
    /// Sessions and plain requests that are with it, or on their way.
    pub sessions: usize,
}

/// All endpoints and names of a process.
#[derive(Debug)]
pub(super) struct Registry {
    metrics: Arc<Metrics>,
    known: Mutex<Everybody>,
    /// Look-ups, and looks at endpoints. They end by themselves, and nobody has to wait for them.
    tracker: TaskTracker,
    /// For connections that wait for their use, as many as the budget has set aside.
    idle: Arc<Semaphore>,
    /// How many that are in all.
    most_idle: AtomicUsize,
}

#[derive(Debug)]
struct Everybody {
    max_pending: usize,
    endpoints: HashMap<Address, Weak<Endpoint>>,
    names: HashMap<(String, u16), Weak<Name>>,
}

impl Registry {
    pub(super) fn new(metrics: Arc<Metrics>, max_pending: usize) -> Arc<Self> {
        let known = Everybody { max_pending, endpoints: HashMap::new(), names: HashMap::new() };
        Arc::new(Self {
            metrics,
            known: Mutex::new(known),
            tracker: TaskTracker::new(),
            idle: Arc::new(Semaphore::new(0)),
            most_idle: AtomicUsize::new(0),
        })
    }

    pub(super) fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// So many connections more may wait for their use.
    pub(super) fn allow_idle(&self, count: usize) {
        self.idle.add_permits(count.min(Semaphore::MAX_PERMITS / 2));
        self.most_idle.fetch_add(count, Ordering::Relaxed);
    }

    /// How many may.
    pub(super) fn most_idle(&self) -> usize {
        self.most_idle.load(Ordering::Relaxed)
    }

    /// So many turns from now on, at each.
    pub(super) fn resize(&self, max_pending: usize, tracker: &TaskTracker) {
        let mut known = self.known();
        let from = std::mem::replace(&mut known.max_pending, max_pending);
        for endpoint in known.endpoints.values().filter_map(Weak::upgrade) {
            endpoint.connects.resize(from, max_pending, tracker);
            endpoint.handshakes.resize(from, max_pending, tracker);
        }
    }

    /// What was found out of whoever listens there is found out anew.
    pub(super) fn forget(&self) {
        for endpoint in self.known().endpoints.values().filter_map(Weak::upgrade) {
            endpoint.knowledge.forget();
        }
    }

    /// The state of `most` of them, those that are left alone first, and how many there are besides.
    pub(super) fn states(&self, most: usize) -> (Vec<State>, usize) {
        let mut all: Vec<_> = self.known().endpoints.values().filter_map(Weak::upgrade).collect();
        all.sort_by_cached_key(|endpoint| (!endpoint.is_ejected(), Arc::clone(&endpoint.name)));
        let besides = all.len().saturating_sub(most);
        let state = |endpoint: &Arc<Endpoint>| State {
            address: endpoint.name.to_string(),
            state: if endpoint.is_ejected() { "ejected" } else { "active" },
            sessions: endpoint.load(),
        };
        (all.iter().take(most).map(state).collect(), besides)
    }

    fn endpoint(&self, address: Address) -> Arc<Endpoint> {
        let mut known = self.known();
        if let Some(endpoint) = known.endpoints.get(&address).and_then(Weak::upgrade) {
            return endpoint;
        }
        // Names may give others each time.
        known.endpoints.retain(|_, endpoint| endpoint.strong_count() > 0);
        let endpoint = Arc::new(Endpoint {
            name: address.to_string().into(),
            address: address.clone(),
            connects: Turns::new(known.max_pending),
            handshakes: Turns::new(known.max_pending),
            knowledge: Knowledge::default(),
            kept: idle::Count::default(),
            load: AtomicUsize::new(0),
            ports: Ports::new(&self.metrics),
            has_warned: AtomicBool::new(false),
            known: Mutex::default(),
            ejections: Notify::new(),
            counted: Mutex::new(Counted::new(&self.metrics.upstream_endpoints[0])),
            metrics: Arc::clone(&self.metrics),
        });
        known.endpoints.insert(address, Arc::downgrade(&endpoint));
        endpoint
    }

    fn name(&self, host: &str, port: u16) -> Arc<Name> {
        let mut known = self.known();
        let key = (host.to_owned(), port);
        if let Some(name) = known.names.get(&key).and_then(Weak::upgrade) {
            return name;
        }
        known.names.retain(|_, name| name.strong_count() > 0);
        let name =
            Arc::new(Name { host: host.to_owned(), port, answer: Mutex::default(), is_new: watch::Sender::new(()) });
        known.names.insert(key, Arc::downgrade(&name));
        name
    }

    fn known(&self) -> MutexGuard<'_, Everybody> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A host name, and what it came to.
#[derive(Debug)]
struct Name {
    host: String,
    port: u16,
    answer: Mutex<Answer>,
    /// Told with every answer.
    is_new: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Answer {
    /// Those of the last answer that had any.
    endpoints: Vec<Arc<Endpoint>>,
    at: Option<Instant>,
    /// Since when a look-up is under way.
    under_way: Option<Instant>,
    /// What came of the last look-up.
    failure: Option<(io::ErrorKind, String)>,
}

/// Says that a look-up is over, also one whose task was dropped.
struct UnderWay(Arc<Name>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.answer().under_way = None;
        self.0.is_new.send_replace(());
    }
}

impl Name {
    fn answer(&self) -> MutexGuard<'_, Answer> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks anew if what is known is old, or nothing. Until when an answer to that should be waited for, although something is known.
    fn ask(self: &Arc<Self>, interval: Duration, registry: &Arc<Registry>) -> Option<Instant> {
        let mut answer = self.answer();
        let age = answer.at.map_or(Duration::MAX, |at| at.elapsed());
        if !answer.endpoints.is_empty() && age < interval {
            return None;
        }
        if answer.under_way.is_none() {
            answer.under_way = Some(Instant::now());
            let (name, shared) = (Arc::clone(self), Arc::clone(registry));
            let under_way = UnderWay(Arc::clone(self));
            registry.tracker.spawn(async move {
                let found = tokio::net::lookup_host((name.host.as_str(), name.port)).await;
                name.heard(found.map(Iterator::collect), &shared);
                drop(under_way);
            });
        }
        answer.under_way.filter(|_| age >= 2 * interval).map(|begun| begun + FRESH)
    }

    /// An answer that is none, or empty, changes nothing: a resolver that is down must not take the backend with it.
    fn heard(&self, found: io::Result<Vec<SocketAddr>>, registry: &Registry) {
        let found = found.and_then(|mut found| {
            found.sort_unstable();
            found.dedup();
            found.truncate(MAX_OF_NAME);
            let none = || io::Error::new(io::ErrorKind::NotFound, "the name has no address");
            if found.is_empty() { Err(none()) } else { Ok(found) }
        });
        match found {
            Ok(found) => {
                let endpoints: Vec<_> = found.into_iter().map(|found| registry.endpoint(address_of(found))).collect();
                let mut answer = self.answer();
                answer.at = Some(Instant::now());
                answer.failure = None;
                let before = std::mem::replace(&mut answer.endpoints, endpoints);
                let is_same = before.iter().map(|one| &one.name).eq(answer.endpoints.iter().map(|one| &one.name));
                let all: Vec<_> = answer.endpoints.iter().map(|one| Arc::clone(&one.name)).collect();
                drop(answer);
                if !is_same {
                    let (host, port) = (&self.host, self.port);
                    info!(
                        host,
                        port,
                        endpoints = all.join(", "),
                        before = before.len(),
                        "a backend's name was looked up"
                    );
                }
            }
            Err(error) => {
                let mut answer = self.answer();
                answer.at = Some(Instant::now());
                let is_first = answer.failure.replace((error.kind(), error.to_string())).is_none();
                let kept = answer.endpoints.len();
                drop(answer);
                // Without any the client that waits for it is told, and so is the log.
                if is_first && kept > 0 {
                    let (host, port) = (&self.host, self.port);
                    warn!(host, port, %error, kept, "a backend's name can't be looked up: its endpoints stay");
                }
            }
        }
    }
}

fn address_of(found: SocketAddr) -> Address {
    let host = match found {
        // Of a link-local address the interface is a part.
        SocketAddr::V6(v6) if v6.scope_id() != 0 => format!("{}%{}", v6.ip(), v6.scope_id()),
        _ => found.ip().to_string(),
    };
    Address::Tcp { host, port: found.port() }
}

/// The endpoints that a backend has.
#[derive(Debug)]
pub(super) struct Endpoints {
    members: Vec<Member>,
    registry: Arc<Registry>,
}

#[derive(Debug)]
enum Member {
    One(Arc<Endpoint>),
    Name(Arc<Name>),
}

/// Nobody is left to be asked.
pub(super) struct Nobody {
    /// What was looked up in vain.
    pub failure: Option<(Address, io::Error)>,
}

impl Endpoints {
    pub(super) fn new(addresses: &Addresses, registry: &Arc<Registry>) -> Self {
        let member = |address: &Address| match address {
            Address::Tcp { host, port } if is_looked_up(host) => Member::Name(registry.name(host, *port)),
            _ => Member::One(registry.endpoint(address.clone())),
        };
        Self { members: addresses.as_slice().iter().map(member).collect(), registry: Arc::clone(registry) }
    }

    /// All of the same process, for which there is no other.
    fn only(&self) -> Option<&Arc<Endpoint>> {
        match &self.members[..] {
            [Member::One(one)] => Some(one),
            _ => None,
        }
    }

    /// The endpoint for one more, other than those in `tried`. Waits for names of which nothing is known yet.
    pub(super) async fn pick(&self, tried: &[Arc<Endpoint>], looks: &Looks<'_>) -> Result<Load, Nobody> {
        if let Some(only) = self.only() {
            return if tried.is_empty() { Ok(Load::new(Arc::clone(only))) } else { Err(Nobody { failure: None }) };
        }
        // Before it is asked for: no answer must be missed.
        let mut news: Vec<_> = self.names().map(|name| name.is_new.subscribe()).collect();
        let asked: Vec<_> = self.names().map(|name| name.ask(looks.config.resolve_interval, &self.registry)).collect();
        let mut all = self.now();
        for (news, until) in news.iter_mut().zip(&asked) {
            // The sender is in the name, so no wait fails.
            match until {
                _ if all.is_empty() => _ = news.changed().await,
                Some(until) => _ = timeout_at(*until, news.changed()).await,
                None => {}
            }
        }
        if all.is_empty() || asked.iter().any(Option::is_some) {
            all = self.now();
        }
        if all.is_empty() {
            let failure = self.names().find_map(|name| {
                let (kind, text) = name.answer().failure.clone()?;
                let address = Address::Tcp { host: name.host.clone(), port: name.port };
                Some((address, io::Error::new(kind, text)))
            });
            return Err(Nobody { failure });
        }
        if all.len() > 1 {
            self.look(&all, looks);
        }
        choose_from(&all, tried).ok_or(Nobody { failure: None })
    }

    /// Whether there is another one than those in `tried`, and well unless all are allowed.
    pub(super) fn has_another(&self, tried: &[Arc<Endpoint>], is_well: bool) -> bool {
        let is_another = |one: &Arc<Endpoint>| !(contains(tried, one) || (is_well && one.is_ejected()));
        self.members.iter().any(|member| match member {
            Member::One(one) => is_another(one),
            Member::Name(name) => name.answer().endpoints.iter().any(is_another),
        })
    }

    /// Ends when it makes no sense to wait for a turn there: it is left alone, and another one is not.
    pub(super) async fn is_in_vain(&self, endpoint: &Endpoint, tried: &[Arc<Endpoint>]) {
        if self.only().is_some() {
            return pending().await;
        }
        loop {
            let mut ejection = pin!(endpoint.ejections.notified());
            ejection.as_mut().enable();
            // It is not in `tried`, but is not well either.
            if endpoint.is_ejected() && self.has_another(tried, true) {
                return;
            }
            ejection.await;
        }
    }

    /// A connection came about, or not: that counts where there are others that clients can be sent to.
    pub(super) fn heard(&self, endpoint: &Endpoint, result: Result<(), &dyn fmt::Display>, config: &Config) {
        if self.only().is_some() {
            return;
        }
        match result {
            Ok(()) => endpoint.succeeded(),
            // Not the last one.
            Err(_) if self.now().len() < 2 => {}
            Err(error) => endpoint.failed(policy(config), error),
        }
    }

    fn names(&self) -> impl Iterator<Item = &Arc<Name>> {
        self.members.iter().filter_map(|member| match member {
            Member::Name(name) => Some(name),
            Member::One(_) => None,
        })
    }

    /// Asks for the addresses of its names, if what is known of them is old; nobody waits for that.
    pub(super) fn ask(&self, config: &Config) {
        for name in self.names() {
            name.ask(config.resolve_interval, &self.registry);
        }
    }

    /// For a connection that is to wait for its use.
    pub(super) fn idle_slot(&self) -> Result<OwnedSemaphorePermit, TryAcquireError> {
        Arc::clone(&self.registry.idle).try_acquire_owned()
    }

    /// Runs something on this worker that has nothing to bring to an end.
    pub(super) fn in_background(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.registry.tracker.spawn(task);
    }

    /// All that are known.
    pub(super) fn now(&self) -> Vec<Arc<Endpoint>> {
        let mut all = Vec::new();
        for member in &self.members {
            match member {
                Member::One(one) => all.push(Arc::clone(one)),
                Member::Name(name) => all.extend(name.answer().endpoints.iter().cloned()),
            }
        }
        all
    }

    /// Sees whether those are back that were left alone, and at the others when it is time to: in tasks of their own, since no
    /// client should have to wait for that.
    fn look(&self, all: &[Arc<Endpoint>], looks: &Looks<'_>) {
        let now = Instant::now();
        for endpoint in all {
            let mut known = endpoint.known();
            let is_trial = known.health.begin_trial(now);
            let every = looks.config.health_interval;
            let is_time = every.is_some_and(|every| known.looked.is_none_or(|at| now.duration_since(at) >= every));
            let is_due = is_trial || (is_time && known.health.ejected_since().is_none());
            if !is_due {
                continue;
            }
            known.looked = Some(now);
            drop(known);
            let trial = Trial(Arc::clone(endpoint));
            let (sources, socket, config) = (looks.sources.clone(), looks.socket.clone(), looks.config.clone());
            self.registry.tracker.spawn(async move {
                let Trial(endpoint) = &trial;
                let deadline = Instant::now() + config.connect_timeout;
                let port = || Port::new(&endpoint.ports);
                let connected = match timeout_at(deadline, net::dial(&endpoint.address, &sources, &socket, port)).await
                {
                    Ok(Ok(stream)) => {
                        let speaks = Speaks::with(&config.pool);
                        tls::secure(stream, &endpoint.address, &config, speaks, deadline).await
                    }
                    Ok(Err(net::DialError::Io(source))) => {
                        Err(Error::Unreachable { address: endpoint.address.clone(), source }.into())
                    }
                    // It was not asked.
                    Ok(Err(net::DialError::Shortage { .. })) => return,
                    Err(_) => Err(Error::Timeout(LATE).into()),
                };
                let stream = match connected {
                    Ok(stream) => {
                        endpoint.succeeded();
                        Some(stream)
                    }
                    Err(Failure { error, stream }) => {
                        debug!(endpoint = %endpoint.name, %error, "an endpoint was looked at in vain");
                        endpoint.failed(policy(&config), &error);
                        stream
                    }
                };
                if let Some(mut stream) = stream {
                    // A FIN without a byte of a request, and its own is waited for.
                    let _ = stream.shutdown().await;
                    let mut unread = [0; 512];
                    let end = async { while matches!(stream.read(&mut unread).await, Ok(1..)) {} };
                    let _ = timeout(LOOK_LINGER, end).await;
                }
                drop(trial);
            });
        }
    }
}

/// What it takes to look at an endpoint.
pub(super) struct Looks<'a> {
    pub config: &'a Config,
    pub sources: &'a Sources,
    pub socket: &'a SocketConfig,
}

/// Ends with its task, whatever became of that.
struct Trial(Arc<Endpoint>);

impl Drop for Trial {
    fn drop(&mut self) {
        self.0.known().health.end_trial();
    }
}

fn policy(config: &Config) -> Policy {
    Policy { after: config.eject_after, time: config.eject_time }
}

fn contains(all: &[Arc<Endpoint>], one: &Arc<Endpoint>) -> bool {
    all.iter().any(|other| Arc::ptr_eq(other, one))
}

fn choose_from(all: &[Arc<Endpoint>], tried: &[Arc<Endpoint>]) -> Option<Load> {
    let candidates: Vec<_> = all
        .iter()
        .map(|endpoint| Candidate {
            load: endpoint.load(),
            ejected: endpoint.known().health.ejected_since(),
            is_tried: contains(tried, endpoint),
        })
        .collect();
    let chosen = choose(&candidates, &mut rand::rng())?;
    Some(Load::new(Arc::clone(&all[chosen])))
}

/// Literal addresses are not, and what is under localhost is this host (RFC 6761 6.3).
fn is_looked_up(host: &str) -> bool {
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    let is_here = name == "localhost" || name.ends_with(".localhost");
    !is_here && host.split('%').next().is_none_or(|host| host.parse::<IpAddr>().is_err())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    fn named(name: &Name) -> Vec<String> {
        name.answer().endpoints.iter().map(|one| one.name.to_string()).collect()
    }

    fn found(addresses: &[&str]) -> Vec<SocketAddr> {
        addresses.iter().map(|address| address.parse().expect("an address")).collect()
    }

    /// Each address is an endpoint, the same one as long as it is there; an answer that fails or is empty changes nothing.
    #[test]
    fn names_keep_what_they_came_to() {
        let metrics = Arc::new(Metrics::new());
        let registry = Registry::new(Arc::clone(&metrics), 4);
        let name = registry.name("app", 9000);
        assert!(Arc::ptr_eq(&name, &registry.name("app", 9000)), "all routes share it");
        name.heard(Ok(found(&["10.0.0.2:9000", "[fd00::1]:9000", "10.0.0.2:9000"])), &registry);
        assert_eq!(named(&name), ["10.0.0.2:9000", "[fd00::1]:9000"]);
        let first = Load::new(Arc::clone(&name.answer().endpoints[0]));
        let fixed = registry.endpoint(Address::Tcp { host: "10.0.0.2".to_owned(), port: 9000 });
        assert!(Arc::ptr_eq(first.get(), &fixed), "written out it is the same");
        name.heard(Ok(found(&["10.0.0.2:9000", "10.0.0.3:9000"])), &registry);
        assert_eq!((named(&name).len(), fixed.load()), (2, 1));
        for none in [Ok(found(&[])), Err(io::Error::other("the resolver is down"))] {
            name.heard(none, &registry);
            assert_eq!(named(&name), ["10.0.0.2:9000", "10.0.0.3:9000"]);
        }
        assert_eq!(metrics.upstream_endpoints[0].get(), 2, "the one that is gone is not counted");
        drop((name, first, fixed));
        assert_eq!(metrics.upstream_endpoints[0].get(), 0);
    }

    /// Whoever comes while nothing is known waits for the answer, and is told when there is none.
    #[tokio::test(start_paused = true)]
    async fn what_is_not_known_yet_is_waited_for() {
        let registry = Registry::new(Arc::new(Metrics::new()), 4);
        let config = Settings::default().upstream;
        let (sources, socket) = (Sources::default(), Settings::default().socket);
        let looks = Looks { config: &config, sources: &sources, socket: &socket };
        let address = Address::Tcp { host: "app.invalid".to_owned(), port: 1 };
        let endpoints = Endpoints::new(&address.into(), &registry);
        let Some(name) = endpoints.names().next() else { panic!("a name") };
        // As if a look-up was under way.
        name.answer().under_way = Some(Instant::now());
        let under_way = UnderWay(Arc::clone(name));
        let waiting = endpoints.pick(&[], &looks);
        let heard = async {
            name.heard(Ok(found(&["10.0.0.2:1"])), &registry);
            drop(under_way);
        };
        let (picked, ()) = tokio::join!(waiting, heard);
        assert_eq!(picked.ok().map(|load| load.endpoint().to_string()), Some("10.0.0.2:1".to_owned()));

        name.answer().endpoints.clear();
        name.answer().under_way = Some(Instant::now());
        let under_way = UnderWay(Arc::clone(name));
        let waiting = endpoints.pick(&[], &looks);
        let heard = async {
            name.heard(Err(io::Error::other("the resolver is down")), &registry);
            drop(under_way);
        };
        let (picked, ()) = tokio::join!(waiting, heard);
        let failure =
            picked.err().and_then(|nobody| nobody.failure).map(|(address, error)| format!("{address}: {error}"));
        assert_eq!(failure.as_deref(), Some("app.invalid:1: the resolver is down"));
    }

    /// Of many those are named that something is wrong with.
    #[test]
    fn states_are_told_of_so_many() {
        let registry = Registry::new(Arc::new(Metrics::new()), 4);
        let all: Vec<_> = (1..=9)
            .map(|last| registry.endpoint(Address::Tcp { host: format!("10.0.0.{last}"), port: 80 }))
            .map(Load::new)
            .collect();
        all[7].get().failed(Policy { after: 1, time: Duration::from_secs(1) }, &"refused");
        let (states, besides) = registry.states(2);
        let state = |address: &str, state, sessions| State { address: address.to_owned(), state, sessions };
        assert_eq!(states, [state("10.0.0.8:80", "ejected", 1), state("10.0.0.1:80", "active", 1)]);
        assert_eq!(besides, 7);
        assert_eq!((registry.states(9).0.len(), registry.states(9).1), (9, 0));
        drop(all);
        assert_eq!(registry.states(9), (Vec::new(), 0));
    }

    #[test]
    fn what_is_looked_up() {
        for (host, is) in [
            ("app", true),
            ("app.ns.svc.cluster.local.", true),
            ("localhost", false),
            ("LocalHost.", false),
            ("app.localhost", false),
            ("10.0.0.1", false),
            ("fd00::1", false),
            ("fe80::1%eth0", false),
        ] {
            assert_eq!(is_looked_up(host), is, "{host}");
        }
    }
}
