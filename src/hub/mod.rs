//! WebSockets to a backend that many clients share (`pool.mode = "shared"`): one for those who are alike.
//!
//! A client's session is one like all others; only its backend's leg is no socket but an end within this process ([`Joined::leg`]). Which
//! clients are alike says `key.rs`; that there is one WebSocket for them, opened by the first and closed after the last, is the pool's work
//! (`crate::pool`); what goes over it is that of `broadcast/` or `rpc/`. Not here: the order of a session, and answers to clients.
//!
//! ```text
//! leg.rs     a client's end: what it says, and what is for it, whatever is shared
//! inbox.rs   what it says, from frames to messages; turnstile.rs: who waits for room to say it
//! encode.rs  what is for clients, as frames
//! memory.rs  whose memory all that is
//! line.rs    the WebSocket to the backend; search.rs: for how long one that was lost is looked for
//! roll.rs    where each stands, for people
//! ```

mod broadcast;
mod config;
mod encode;
mod inbox;
mod key;
mod leg;
mod line;
mod memory;
mod roll;
pub mod rpc;
mod search;
mod turnstile;

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use self::{
    config::{Authorize, Config, Kind, Replay, SlowClient},
    key::Digest,
    line::{Fault, Refused},
    roll::{Known, Told},
};
use self::{
    inbox::Terms,
    key::Key,
    line::{Lines, REFUSAL_TIMEOUT},
    roll::Roll,
    search::BACKOFF,
};
use crate::{
    admission::Admission,
    metrics::{Metrics, Traffic},
    net::Stream,
    pool::{self, AcquireError, Connector, OpenError, Opened, Pool, Reports},
    relay,
    upstream::{self, Error, Home, Mode, Upstreams},
    ws::Limits,
};

/// More than there are clients: all who are alike share one.
const EVERYBODY: usize = 1 << 30;

/// Those of all routes, for all workers. Clones are the same.
#[derive(Clone, Default)]
pub struct Hubs {
    ways: Arc<Vec<Way>>,
    /// Those of earlier settings too.
    roll: Roll,
}

/// A client's part of one.
#[derive(Debug)]
pub struct Joined {
    /// Its backend's leg.
    pub leg: Stream,
    /// The subprotocol that the backend has chosen.
    pub protocol: Option<HeaderValue>,
    /// Where the backend is.
    pub endpoint: Arc<str>,
    /// Which one it is.
    pub known: Arc<Known>,
}

/// Why a client can't join.
#[derive(Debug)]
pub enum Refusal {
    /// That is what the backend said, or did.
    Backend(Fault),
    /// The same when it was shown who wants to join others (`pool.authorize`).
    Probe(Fault),
    /// As many are shown to it as may be.
    Probes,
    /// As many keys as `pool.max_keys` allows.
    Keys,
    /// As many wait as may, or it has waited for too long.
    Busy,
    /// The process is about to end.
    Closing,
}

/// Those of one route.
struct Way {
    route: Arc<str>,
    pool: Pool<Key, Opener>,
    lines: Lines,
    sharing: Arc<Config>,
    /// Who asks there, if that is what is shared.
    callers: Option<Arc<rpc::Callers>>,
    /// Nobody comes any more.
    gone: CancellationToken,
}

/// Opens them.
struct Opener {
    lines: Lines,
    callers: Option<Arc<rpc::Callers>>,
    route: Arc<str>,
    sharing: Arc<Config>,
    /// What clients may send, and are sent.
    limits: Limits,
    /// For a client's message that has begun.
    hold_timeout: Duration,
    /// By worker.
    homes: Arc<[Home]>,
    metrics: Arc<Metrics>,
    /// Who has memory for what is kept.
    admission: Admission,
    roll: Roll,
}

impl Hubs {
    /// None is open. `sharing`: of each route where clients share, by its path. `homes`: of all workers, in their order. `admission` has memory for what they keep.
    pub fn new(
        upstreams: &Upstreams,
        sharing: impl IntoIterator<Item = (String, Config)>,
        homes: &Arc<[Home]>,
        relay: &relay::Config,
        metrics: &Arc<Metrics>,
        admission: &Admission,
    ) -> Self {
        Self::default().reconfigured(upstreams, sharing, homes, relay, metrics, admission)
    }

    /// Those from now on. Whoever has joined before stays where he is.
    #[must_use]
    pub fn reconfigured(
        &self,
        upstreams: &Upstreams,
        sharing: impl IntoIterator<Item = (String, Config)>,
        homes: &Arc<[Home]>,
        relay: &relay::Config,
        metrics: &Arc<Metrics>,
        admission: &Admission,
    ) -> Self {
        let roll = &self.roll;
        let (mut ways, mut shared) = (Vec::new(), HashMap::<_, _>::from_iter(sharing));
        for way in upstreams.ways() {
            let config = way.upstream.config();
            let Some(home) = homes.first().filter(|_| config.pool.mode == Mode::Shared) else { continue };
            let Some(sharing) = shared.remove(&*way.route) else { continue };
            let lines = Lines::new(&way.upstream, relay, metrics);
            let (route, sharing) = (Arc::clone(&way.route), Arc::new(sharing));
            let message_limits = Limits { frame: relay.max_frame, message: relay.max_message };
            let callers = (sharing.kind == Some(Kind::Rpc))
                .then(|| rpc::Callers::new(&route, &sharing, message_limits, homes, metrics, admission, roll));
            let opener = Opener {
                lines: lines.clone(),
                callers: callers.clone(),
                route: Arc::clone(&route),
                sharing: Arc::clone(&sharing),
                limits: message_limits,
                hold_timeout: relay.hold_timeout,
                homes: Arc::clone(homes),
                metrics: Arc::clone(metrics),
                admission: admission.clone(),
                roll: roll.clone(),
            };
            let pool = Pool::new(limits(config), opener, Arc::clone(&metrics.pools), &home.tracker, &home.runtime);
            let gone = CancellationToken::new();
            let (of, over, drain, of_callers) = (pool.clone(), gone.clone(), home.drain.clone(), callers.clone());
            home.spawn(async move {
                tokio::select! {
                    () = drain.begun() => {}
                    () = over.cancelled() => {}
                }
                if let Some(callers) = of_callers {
                    // Whoever is there may ask until his own end.
                    callers.left().await;
                }
                of.close();
            });
            ways.push(Way { route, pool, lines, sharing, callers, gone });
        }
        Self { ways: Arc::new(ways), roll: roll.clone() }
    }

    /// Makes a client one of those who are alike: its handshake, as it would be passed on to the backend of `route`. To be called on its
    /// worker, whose `home` and `traffic` these are.
    ///
    /// # Errors
    ///
    /// What it is to be told.
    pub async fn join(
        &self,
        route: &str,
        request: Request<()>,
        home: &Home,
        traffic: &Arc<Traffic>,
        admission: &Admission,
    ) -> Result<Joined, Refusal> {
        let way = self.ways.iter().find(|way| *way.route == *route);
        let Way { pool, lines, sharing, callers, .. } = way.ok_or(Refusal::Closing)?;
        let key = Key::new(route, &request, sharing);
        let asked_at = Instant::now();
        // Before anything is opened: what is opened then is for whoever is there.
        let mut guest = match callers {
            Some(callers) => Some(callers.enter(&key).ok_or(Refusal::Keys)?),
            None => None,
        };
        // One that ends in this very moment is no answer to anybody.
        for _ in 0..2 {
            if !pool.is_busy(&key) && pool.busy() >= sharing.max_keys {
                return Err(Refusal::Keys);
            }
            // A refusal that is remembered is no WebSocket; but it, too, takes memory.
            if !pool.knows(&key) && pool.keys().saturating_sub(pool.busy()) >= sharing.max_keys {
                pool.forget_failure();
            }
            let lease = pool.acquire(&key).await.map_err(refusal)?;
            let (present, opened_at, protocol, endpoint) = match &*lease {
                Connected::Feed(hub) if hub.is_over() => continue,
                Connected::Feed(hub) => {
                    (Some((Arc::clone(hub), hub.enter())), hub.opened_at(), hub.protocol(), hub.endpoint())
                }
                Connected::Calls(link) => (None, link.opened_at, link.protocol.clone(), Arc::clone(&link.endpoint)),
            };
            if lease.is_closed() {
                continue;
            }
            // What the backend has said since is said of this one too, if nothing is left out.
            let is_shown = key.is_whole() && opened_at >= asked_at;
            if sharing.authorize == Authorize::Always && !is_shown {
                let mut own = request.clone();
                own.headers_mut().remove(http::header::SEC_WEBSOCKET_EXTENSIONS);
                lines.show(own, home).await.ok_or(Refusal::Probes)?.map_err(Refusal::Probe)?;
            }
            let (leg, known) = match (present, guest.take()) {
                (Some((hub, present)), _) => (hub.leg(present, home, traffic, admission, lease), hub.known()),
                // It holds a lease itself as long as anybody asks.
                (None, Some(guest)) => {
                    let terms = Terms { patience: lines.hold_timeout(), admission: admission.clone() };
                    let known = guest.known();
                    (guest.leg(pool.clone(), terms, traffic), known)
                }
                (None, None) => break,
            };
            return Ok(Joined { leg: Stream::Local(leg), protocol, endpoint, known });
        }
        Err(Refusal::Backend(Error::BadAccept("the backend ends WebSockets as soon as they are open").into()))
    }

    /// `most` of those that there are, for people, the worst and the largest first; and how many there are besides.
    pub fn told(&self, most: usize) -> (Vec<Told>, usize) {
        let kind = |way: &Way| way.sharing.kind.unwrap_or(Kind::Broadcast);
        self.roll.told(most, self.ways.iter().map(|way| (&*way.route, kind(way), way.pool.snapshot())))
    }

    /// Those whose backend was lost and is looked for, and their clients.
    pub fn searching(&self) -> (usize, usize) {
        self.roll.searching()
    }
}

impl fmt::Debug for Hubs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hubs").finish_non_exhaustive()
    }
}

/// How it ends for a client, behind what was said before.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    /// The backend is gone for good, or what the client had there.
    Lost,
    /// By its Close, which is this frame.
    Close(Bytes),
}

/// For gauges.
fn signed(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// One for each key, however many use it.
fn limits(config: &upstream::Config) -> pool::Config {
    let upstream::Config { pool, connect_timeout, handshake_timeout, queue_timeout, max_waiting, .. } = config;
    // Each of its parts has a deadline of its own, after which it ends in order.
    let patience = *queue_timeout + *connect_timeout + *handshake_timeout + REFUSAL_TIMEOUT + Duration::from_secs(5);
    pool::Config {
        limits: pool::Limits {
            max_connections: 1,
            max_waiters: *max_waiting,
            idle_timeout: pool.idle_timeout,
            keeps_unasked: false,
            backoff: BACKOFF.0,
            max_backoff: BACKOFF.1,
        },
        open_timeout: patience,
        max_wait: patience,
    }
}

fn refusal(error: AcquireError<Fault>) -> Refusal {
    match error {
        AcquireError::Open(OpenError::Failed(fault)) => Refusal::Backend(match &*fault {
            Fault::Upstream { error, endpoint } => Fault::Upstream { error: error.again(), endpoint: endpoint.clone() },
            Fault::Refused(refused) => Fault::Refused(Arc::clone(refused)),
        }),
        AcquireError::Open(OpenError::TimedOut) => {
            Refusal::Backend(Error::Timeout("backend did not answer in time").into())
        }
        AcquireError::Open(OpenError::Stillborn | OpenError::Panicked) => {
            Refusal::Backend(Error::BadAccept("the backend ends WebSockets as soon as they are open").into())
        }
        AcquireError::Full | AcquireError::Timeout => Refusal::Busy,
        AcquireError::Open(OpenError::Aborted) | AcquireError::Closing => Refusal::Closing,
    }
}

impl Drop for Way {
    /// Those who use one have it until they end.
    fn drop(&mut self) {
        self.gone.cancel();
    }
}

/// What one is for.
#[derive(Debug)]
enum Connected {
    /// What the backend says goes to all.
    Feed(Arc<broadcast::Hub>),
    /// Each gets what they asked for.
    Calls(Arc<rpc::Link>),
}

impl Connector<Key> for Opener {
    type Connection = Connected;
    type Error = Fault;

    async fn open(&self, key: &Key, reports: Reports) -> Result<Opened<Self::Connection>, Fault> {
        let home = &self.homes[key.share(self.homes.len())];
        let connection = match &self.callers {
            None => Connected::Feed(broadcast::Hub::open(self, key, home, reports).await?),
            Some(callers) => {
                // Not for a client: those who asked may be gone.
                let guest = callers.enter(key).ok_or(Error::PoolFull)?;
                let line = self.lines.open(key.request(), home).await?;
                Connected::Calls(guest.opened(line, reports))
            }
        };
        Ok(Opened { connection, capacity: EVERYBODY })
    }

    fn close(&self, _: &Key, connection: &Self::Connection) {
        match connection {
            Connected::Feed(hub) => hub.close(),
            Connected::Calls(link) => link.close(),
        }
    }
}

impl Refused {
    /// It would say the same again.
    fn is_final(&self) -> bool {
        use http::StatusCode;
        self.status.is_client_error()
            && ![StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS].contains(&self.status)
    }
}
