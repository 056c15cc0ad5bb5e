//! What is counted. The only module that knows the metrics crate.
//!
//! Counters that move with every message are kept per worker, on cache lines of their own, and summed when asked for.

mod totals;

use std::{
    fmt,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet, text},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        info::Info,
    },
    registry::{Registry, Unit},
};

pub use self::totals::{Close, Part, Totals};
use self::totals::{Closes, Durations};
use crate::{
    admission::Reason,
    pool::stats::{self, Stats},
    side::Side,
    system::{NetCounters, System},
    ws::Opcode,
};

/// Why WebSockets that should share a connection have their own. The backend: speaks no HTTP/2, ends it before its SETTINGS, or sends
/// none; has no extended CONNECT, refuses what it then accepts, gives no answer, wants HTTP/1.1 for this one; was found to be like that
/// (`known`). The connection was lost twice before anything was sent (`unsent`), the drain or a reload has begun (`closing`), or the
/// client's Host can't be said in HTTP/2.
pub const FALLBACKS: [&str; 11] = [
    "no_http2",
    "closed",
    "no_settings",
    "no_extension",
    "fails",
    "unanswered",
    "required",
    "known",
    "unsent",
    "closing",
    "host",
];

/// False in a build that shows what counting costs (`.ci/costs`): nearly all that moves with messages and sessions over TCP then stays 0.
const COUNTS: bool = !cfg!(uncounted);

/// Labels with values from fixed sets only.
type Labels<const N: usize> = [(&'static str, &'static str); N];

/// How a request that wanted something of the backend went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handshake {
    /// 101 on both legs.
    Accepted,
    /// The backend answered with something else.
    Refused,
    /// The same, when it was shown who wants to join others (`pool.authorize`).
    Unauthorized,
    /// No valid WebSocket handshake; the backend was not asked.
    Invalid,
    /// Of a web page that is not among `http.allowed_origins`; the backend was not asked.
    Origin,
    /// Its route is not for clients of that address; the backend was not asked.
    Denied,
    /// The backend answered 101 with a wrong or missing header, or no HTTP.
    BadBackend,
    /// Not connected.
    Unreachable,
    /// A deadline passed.
    Timeout,
    /// Too many at once.
    Shed,
    /// The client left before the answer.
    Abandoned,
}

impl Handshake {
    const ALL: [Self; 11] = [
        Self::Accepted,
        Self::Refused,
        Self::Unauthorized,
        Self::Invalid,
        Self::Origin,
        Self::Denied,
        Self::BadBackend,
        Self::Unreachable,
        Self::Timeout,
        Self::Shed,
        Self::Abandoned,
    ];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Refused => "refused",
            Self::Unauthorized => "unauthorized",
            Self::Invalid => "invalid",
            Self::Origin => "origin",
            Self::Denied => "denied",
            Self::BadBackend => "bad_backend",
            Self::Unreachable => "unreachable",
            Self::Timeout => "timeout",
            Self::Shed => "shed",
            Self::Abandoned => "abandoned",
        }
    }
}

/// How a TLS handshake with a client went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsHandshake {
    /// As it should.
    Full,
    /// The same, shorter, with a ticket of an earlier session.
    Resumed,
    /// The client does not believe our certificate.
    Distrusted,
    /// The client has no certificate, and must have one.
    NoCertificate,
    /// Its certificate is not good.
    BadCertificate,
    /// Nothing could be agreed on, or what came was no TLS.
    Failed,
    /// It was plain HTTP.
    PlainHttp,
    /// The deadline passed.
    Timeout,
    /// The client left.
    Abandoned,
    /// There was no memory for it.
    Shed,
}

impl TlsHandshake {
    const ALL: [Self; 10] = [
        Self::Full,
        Self::Resumed,
        Self::Distrusted,
        Self::NoCertificate,
        Self::BadCertificate,
        Self::Failed,
        Self::PlainHttp,
        Self::Timeout,
        Self::Abandoned,
        Self::Shed,
    ];

    /// For labels and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Resumed => "resumed",
            Self::Distrusted => "distrusted",
            Self::NoCertificate => "no_certificate",
            Self::BadCertificate => "bad_certificate",
            Self::Failed => "failed",
            Self::PlainHttp => "plain_http",
            Self::Timeout => "timeout",
            Self::Abandoned => "abandoned",
            Self::Shed => "shed",
        }
    }
}

/// What came of waiting for a PROXY header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyResult {
    /// It says who the client is.
    Accepted,
    /// It says that it is the balancer itself, or that nobody knows.
    Local,
    /// It would be of somebody who may not send one.
    Untrusted,
    /// Something else came.
    Missing,
    /// It is not as it should be, or too long.
    Broken,
    /// The deadline passed.
    Timeout,
    /// The connection ended before it was there.
    Abandoned,
}

impl ProxyResult {
    const ALL: [Self; 7] =
        [Self::Accepted, Self::Local, Self::Untrusted, Self::Missing, Self::Broken, Self::Timeout, Self::Abandoned];

    /// For labels and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Local => "local",
            Self::Untrusted => "untrusted",
            Self::Missing => "missing",
            Self::Broken => "broken",
            Self::Timeout => "timeout",
            Self::Abandoned => "abandoned",
        }
    }
}

/// Of connections that wait for their use.
const IDLE: [&str; 2] = ["prewarm", "keep_alive"];

/// What came of looking for a connection that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdleUse {
    /// It was used.
    Hit,
    /// None was there.
    Miss,
    /// The backend had ended it, or did so before a byte of an answer.
    Stale,
}

impl IdleUse {
    const ALL: [Self; 3] = [Self::Hit, Self::Miss, Self::Stale];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
            Self::Stale => "stale",
        }
    }
}

/// What came of a reload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReloadResult {
    /// Everything that may change while it runs is as it was written.
    Applied,
    /// Something is wrong with it; all is as it was.
    Rejected,
    /// It was not read, or not looked at: the process is about to end.
    Refused,
}

impl ReloadResult {
    const ALL: [Self; 3] = [Self::Applied, Self::Rejected, Self::Refused];

    /// For people and programs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Rejected => "rejected",
            Self::Refused => "refused",
        }
    }
}

/// Why clients that share a WebSocket missed something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gap {
    /// One was too slow.
    Slow,
    /// The backend was lost, for all of them.
    Lost,
}

/// By the name of the label.
const GAPS: [&str; 2] = ["slow", "lost"];

/// What became of the search for a backend that was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reconnect {
    /// It is back.
    Connected,
    /// It says no, or is another one.
    Refused,
    /// It was not back in time.
    Expired,
    /// Nobody waits for it.
    Unused,
}

impl Reconnect {
    const ALL: [Self; 4] = [Self::Connected, Self::Refused, Self::Expired, Self::Unused];

    /// For labels and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::Refused => "refused",
            Self::Expired => "expired",
            Self::Unused => "unused",
        }
    }
}

/// Why a JSON-RPC message on a WebSocket that clients share was for nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RpcDrop {
    /// The backend's is no JSON-RPC.
    Malformed,
    /// The backend's is no text.
    Binary,
    /// An error of the backend's about something that it did not understand.
    WithoutId,
    /// The backend's answer to what is not asked, or not any more.
    Stray,
    /// A notification of a subscription that nobody has.
    Unheard,
    /// A notification by a method that is of no subscription, nor for all.
    Unlisted,
    /// A notification of which too many waited for their client to know the id.
    Overflow,
    /// With the id that its client knows it would be too long.
    TooLong,
    /// A response, by a client.
    ClientResponse,
}

impl RpcDrop {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 9] = [
        Self::Malformed,
        Self::Binary,
        Self::WithoutId,
        Self::Stray,
        Self::Unheard,
        Self::Unlisted,
        Self::Overflow,
        Self::TooLong,
        Self::ClientResponse,
    ];

    /// For labels and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Binary => "binary",
            Self::WithoutId => "without_id",
            Self::Stray => "stray",
            Self::Unheard => "unheard",
            Self::Unlisted => "unlisted",
            Self::Overflow => "overflow",
            Self::TooLong => "too_long",
            Self::ClientResponse => "client_response",
        }
    }
}

/// What became of a JSON-RPC request on a WebSocket that clients share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RpcResult {
    /// The backend's result.
    Answered,
    /// The backend's error.
    Error,
    /// No answer in time.
    Timeout,
    /// The backend was lost before it.
    Lost,
    /// Its client has left.
    Left,
    /// It was not passed on.
    Refused,
}

impl RpcResult {
    const ALL: [Self; 6] = [Self::Answered, Self::Error, Self::Timeout, Self::Lost, Self::Left, Self::Refused];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Error => "error",
            Self::Timeout => "timeout",
            Self::Lost => "lost",
            Self::Left => "left",
            Self::Refused => "refused",
        }
    }
}

/// What clients who share a WebSocket may suffer, for the live page: their backend was lost, it was not found again, they were too slow, their request
/// was not answered in time.
const SHARED: [&str; 4] = ["lost", "given_up", "slow", "rpc_timeout"];

/// What is done about slow clients, in the order of `hub::SlowClient`.
const SLOW_CLIENTS: [&str; 3] = ["disconnect", "drop_oldest", "conflate"];

/// All of it.
pub struct Metrics {
    registry: Registry,
    process: Registry,
    workers: Arc<Mutex<Vec<Arc<Traffic>>>>,
    queues: Arc<OnceLock<Box<LookAtQueues>>>,
    log_drops: Arc<OnceLock<Box<CountDrops>>>,
    /// TCP connections to the backend, each with a port of this host, until they are closed.
    pub upstream_ports: Gauge,
    /// How many there may be; 0: no limit is known.
    pub upstream_ports_limit: Gauge,
    /// Client connections at most.
    pub max_connections: Gauge,
    /// `listen.backlog`, what the kernel's limit for one queue is, and what was reached in all queues.
    pub backlog: [Gauge; 3],
    /// Bytes that may be used, and that are.
    memory: [Gauge; 2],
    /// Waiting and pending, each for requests and handshakes.
    upstream: [[Gauge; 2]; 2],
    /// Endpoints of backends: those that are well, and those that are left alone.
    pub upstream_endpoints: [Gauge; 2],
    /// Connections to backends that wait for their use: prewarmed, and of plain requests.
    pub idle: [Gauge; 2],
    /// What came of looking for one, for each kind.
    idle_uses: [[Counter; 3]; 2],
    /// Connects to another endpoint, after one in vain.
    pub upstream_retries: Counter,
    /// Endpoints that took no connections any more.
    pub upstream_ejections: Counter,
    /// Requests whose path can be read as one of another route.
    pub ambiguous_paths: Counter,
    /// Sessions that are being relayed.
    pub sessions: Gauge,
    /// Client connections, those in their handshake included.
    pub connections: Gauge,
    /// Of them, those that wait for a worker to have room.
    pub connections_queued: Gauge,
    /// Of them, those that speak HTTP/2.
    pub http2_connections: Gauge,
    /// Requests and sessions on their streams that have a place.
    pub http2_streams: Gauge,
    /// Sockets in their last wait.
    pub lingering: Gauge,
    /// 0: running; 1: draining, still accepting; 2: draining, listeners closed.
    pub drain_state: Gauge,
    /// What the last look of `/readyz` at the backend found: 1 or 0.
    backend_up: Gauge,
    backend_was_asked: AtomicBool,
    /// Data messages that came from a client after its session's end had begun; they were not forwarded.
    pub crossed_messages: Counter,
    /// Sessions whose `close.delay` was cut short.
    pub delays_cut: Counter,
    /// Keys that were written otherwise than they run, until a restart.
    pub restart_required: Gauge,
    /// Certificates for clients that have expired, or soon will.
    pub doubtful_certificates: Gauge,
    /// Messages of backends whose WebSockets clients share.
    pub shared_messages: Counter,
    /// Bytes that are kept of them.
    pub shared_queue_bytes: Gauge,
    shared_gaps: [Counter; GAPS.len()],
    shared_slow_clients: [Counter; SLOW_CLIENTS.len()],
    shared_reconnects: [Counter; Reconnect::ALL.len()],
    rpc_requests: [Counter; RpcResult::ALL.len()],
    rpc_drops: [Counter; RpcDrop::ALL.len()],
    /// JSON-RPC requests that wait for their answer.
    pub rpc_outstanding: Gauge,
    /// Subscriptions of clients.
    pub rpc_subscriptions: Gauge,
    pool_fallbacks: Family<Labels<1>, Counter>,
    /// Of all pools of upstream connections.
    pub pools: Arc<Stats>,
    reload_is_good: Gauge,
    reloads: Family<Labels<1>, Counter>,
    handshakes: [Counter; Handshake::ALL.len()],
    handshake_duration: Arc<Durations>,
    tls_handshakes: Family<Labels<1>, Counter>,
    proxy_headers: Family<Labels<1>, Counter>,
    requests: [Counter; STATUS_CLASSES.len()],
    closes: Arc<Closes>,
    abnormal: [Counter; ABNORMAL.len()],
    close_duration: Arc<Durations>,
    lingered: [[Counter; LINGERED.len()]; 2],
    accept_errors: Family<Labels<1>, Counter>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Everything at zero.
    #[expect(clippy::too_many_lines, reason = "a list")]
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("tidegate");
        let mut process = Registry::default();
        process.register_collector(Box::new(ProcessCollector(System::default())));
        let workers = Arc::new(Mutex::new(Vec::new()));
        registry.register_collector(Box::new(TrafficCollector(Arc::clone(&workers))));
        let queues = Arc::new(OnceLock::new());
        registry.register_collector(Box::new(QueueCollector(Arc::clone(&queues))));
        let log_drops = Arc::new(OnceLock::new());
        registry.register_collector(Box::new(LogCollector(Arc::clone(&log_drops))));
        registry.register_collector(Box::new(NamespaceCollector(System::default())));
        let pools = Arc::<Stats>::default();
        registry.register_collector(Box::new(PoolCollector(Arc::clone(&pools))));
        let upstream: [Family<Labels<1>, Gauge>; 2] = Default::default();
        let endpoints: Family<Labels<1>, Gauge> = Family::default();
        let idle: Family<Labels<1>, Gauge> = Family::default();
        let idle_uses: Family<Labels<2>, Counter> = Family::default();
        let lingered: Family<Labels<2>, Counter> = Family::default();
        // A series that alerts are built on must be there before it counts: all of a family are made at once.
        let families: [Family<Labels<1>, Counter>; 8] = Default::default();
        let [handshakes, requests, abnormal, gaps, slow_clients, reconnects, rpc, rpc_drops] = &families;
        let ends = Ends::default();
        registry.register_collector(Box::new(ends.clone()));
        let metrics = Self {
            registry: Registry::default(),
            process,
            workers,
            queues,
            log_drops,
            upstream_ports: Gauge::default(),
            upstream_ports_limit: Gauge::default(),
            max_connections: Gauge::default(),
            backlog: Default::default(),
            memory: Default::default(),
            upstream: upstream.each_ref().map(|family: &Family<Labels<1>, Gauge>| {
                ["request", "handshake"].map(|kind| family.get_or_create(&[("kind", kind)]).clone())
            }),
            upstream_endpoints: ["active", "ejected"].map(|state| endpoints.get_or_create(&[("state", state)]).clone()),
            idle: IDLE.map(|kind| idle.get_or_create(&[("kind", kind)]).clone()),
            idle_uses: IDLE.map(|kind| {
                IdleUse::ALL.map(|what| idle_uses.get_or_create(&[("kind", kind), ("result", what.as_str())]).clone())
            }),
            upstream_retries: Counter::default(),
            upstream_ejections: Counter::default(),
            ambiguous_paths: Counter::default(),
            sessions: Gauge::default(),
            connections: Gauge::default(),
            connections_queued: Gauge::default(),
            http2_connections: Gauge::default(),
            http2_streams: Gauge::default(),
            lingering: Gauge::default(),
            drain_state: Gauge::default(),
            backend_up: Gauge::default(),
            backend_was_asked: AtomicBool::new(false),
            crossed_messages: Counter::default(),
            delays_cut: Counter::default(),
            restart_required: Gauge::default(),
            doubtful_certificates: Gauge::default(),
            shared_messages: Counter::default(),
            shared_queue_bytes: Gauge::default(),
            shared_gaps: GAPS.map(|cause| gaps.get_or_create(&[("cause", cause)]).clone()),
            shared_slow_clients: SLOW_CLIENTS.map(|action| slow_clients.get_or_create(&[("action", action)]).clone()),
            shared_reconnects: Reconnect::ALL
                .map(|result| reconnects.get_or_create(&[("result", result.as_str())]).clone()),
            rpc_requests: RpcResult::ALL.map(|result| rpc.get_or_create(&[("result", result.as_str())]).clone()),
            rpc_drops: RpcDrop::ALL.map(|why| rpc_drops.get_or_create(&[("reason", why.as_str())]).clone()),
            rpc_outstanding: Gauge::default(),
            rpc_subscriptions: Gauge::default(),
            pool_fallbacks: Family::default(),
            pools,
            reload_is_good: Gauge::default(),
            reloads: Family::default(),
            handshakes: Handshake::ALL.map(|result| handshakes.get_or_create(&[("result", result.as_str())]).clone()),
            handshake_duration: Arc::clone(&ends.handshakes),
            tls_handshakes: Family::default(),
            proxy_headers: Family::default(),
            requests: STATUS_CLASSES.map(|class| requests.get_or_create(&[("status", class)]).clone()),
            closes: Arc::clone(&ends.closes),
            abnormal: ABNORMAL.map(|cause| abnormal.get_or_create(&[("cause", cause)]).clone()),
            close_duration: Arc::clone(&ends.took),
            lingered: Side::BOTH.map(|side| {
                LINGERED.map(|how| lingered.get_or_create(&[("leg", side.as_str()), ("how", how)]).clone())
            }),
            accept_errors: Family::default(),
        };
        let Self { sessions, connections, lingering, crossed_messages, .. } = &metrics;
        let [handshakes, requests, abnormal, gaps, slow_clients, reconnects, rpc, rpc_drops] = families;
        registry.register("connections_active", "WebSocket sessions that are being relayed", sessions.clone());
        registry.register(
            "client_connections",
            "Client connections, also those in their handshake",
            connections.clone(),
        );
        let help = "Client connections that wait for a worker to have room for their handshake";
        registry.register("connections_queued", help, metrics.connections_queued.clone());
        let help = "Client connections that speak HTTP/2";
        registry.register("http2_connections", help, metrics.http2_connections.clone());
        let help =
            "Requests and WebSocket sessions on their streams, each of which has a place in limits.max_connections";
        registry.register("http2_streams", help, metrics.http2_streams.clone());
        let help = "Client connections at most: limits.max_connections, or what was derived for it";
        registry.register("max_connections", help, metrics.max_connections.clone());
        let [wanted, somaxconn, effective] = &metrics.backlog;
        registry.register("backlog_wanted", "listen.backlog", wanted.clone());
        registry.register(
            "somaxconn",
            "net.core.somaxconn at the start, the limit of one accept queue",
            somaxconn.clone(),
        );
        let help = "Connections that may wait to be accepted, in all accept queues, as the kernel granted it";
        registry.register("backlog_effective", help, effective.clone());
        let [limit, used] = &metrics.memory;
        registry.register("memory_limit_bytes", "What limits.memory came to; 0: no limit", limit.clone());
        registry.register("memory_used_bytes", "What of it was used when it was last looked at", used.clone());
        let helps = [
            ("upstream_waiting", "Handshakes and plain requests that wait for their turn at the backend"),
            ("upstream_pending", "Those that are with the backend, and not answered yet"),
        ];
        for ((name, help), gauges) in helps.into_iter().zip(upstream) {
            registry.register(name, help, gauges);
        }
        let help = "Endpoints of the backends: active, or ejected since they took no connections";
        registry.register("upstream_endpoints", help, endpoints);
        let help = "Connections to the backends that wait for their use: opened ahead (prewarm), or of plain requests (keep_alive)";
        registry.register("upstream_idle_connections", help, idle);
        let help = "What was found of those: hit, miss (none was there), stale (the backend had ended it, which no client noticed)";
        registry.register("upstream_idle_uses", help, idle_uses);
        let help = "Connects to another endpoint of the same backend, after one that failed";
        registry.register("upstream_retries", help, metrics.upstream_retries.clone());
        let help = "Endpoints that got no clients for a while, since they took no connections";
        registry.register("upstream_ejections", help, metrics.upstream_ejections.clone());
        let help = "Requests that got 400, since their path can be read as one of another route";
        registry.register("ambiguous_paths", help, metrics.ambiguous_paths.clone());
        let help =
            "WebSockets of pool.mode \"multiplexed\" that got a connection of their own, by what stood in the way";
        registry.register("pool_fallbacks", help, metrics.pool_fallbacks.clone());
        for why in FALLBACKS {
            drop(metrics.pool_fallbacks.get_or_create(&[("why", why)]));
        }
        let help = "Messages of backends on WebSockets that clients share, each counted once";
        registry.register("shared_messages", help, metrics.shared_messages.clone());
        let help = "Bytes of those messages that are kept for clients that are behind, or join";
        registry.register("shared_queue_bytes", help, metrics.shared_queue_bytes.clone());
        let help = "Times that clients who share a WebSocket missed messages: one that was slow, or all of them when the backend was lost";
        registry.register("shared_gaps", help, gaps);
        let help = "Times that a client was behind by more than is kept, by what was done about it (pool.slow_client)";
        registry.register("shared_slow_clients", help, slow_clients);
        let help = "Searches for a backend that was lost and whose WebSocket clients share, by result; unused: nobody waited for it";
        registry.register("shared_reconnects", help, reconnects);
        let help = "JSON-RPC requests on WebSockets that clients share, by what became of them";
        registry.register("rpc_requests", help, rpc);
        let help = "JSON-RPC messages on WebSockets that clients share that were for nobody, by reason; client_response: a client's, all others are the backend's";
        registry.register("rpc_dropped_messages", help, rpc_drops);
        registry.register("rpc_outstanding", "Of them, those that wait for an answer", metrics.rpc_outstanding.clone());
        let help = "Subscriptions of clients on WebSockets that they share";
        registry.register("rpc_subscriptions", help, metrics.rpc_subscriptions.clone());
        let help = "TCP connections to the backend, each with a port of this host";
        registry.register("upstream_ports_in_use", help, metrics.upstream_ports.clone());
        let help = "Ports for connections to the backend; 0: no limit is known";
        registry.register("upstream_ports_limit", help, metrics.upstream_ports_limit.clone());
        registry.register("lingering_sockets", "Sockets after our FIN, waiting for the peer's", lingering.clone());
        let help =
            "0: running; 1: draining, still accepting; 2: listeners closed, sessions end; 3: sockets do; 4: drained";
        registry.register("drain_state", help, metrics.drain_state.clone());
        let help = "1: the backend took a connection when /readyz last looked; 0: it did not, or nobody asked yet";
        registry.register("backend_up", help, metrics.backend_up.clone());
        registry.register(
            "crossed_messages",
            "Client messages that came after the end of their session had begun and were not forwarded",
            crossed_messages.clone(),
        );
        let help = "Sessions whose close.delay was cut short, since their place was needed for a client";
        registry.register("close_delays_cut", help, metrics.delays_cut.clone());
        registry.register(
            "reloads",
            "Readings of the configuration after the start, by result",
            metrics.reloads.clone(),
        );
        let help = "1: what was read last of the configuration is what runs, but for keys that take a restart; 0: it was rejected";
        registry.register("config_last_reload_successful", help, metrics.reload_is_good.clone());
        let help = "Keys of the configuration that are written otherwise than they run, until a restart";
        registry.register("config_restart_required_keys", help, metrics.restart_required.clone());
        let help = "Certificates for clients that have expired, or will within three days";
        registry.register("tls_certificates_doubtful", help, metrics.doubtful_certificates.clone());
        registry.register("handshakes", "WebSocket handshakes by result", handshakes);
        let help = "TLS handshakes of clients by result; distrusted: the client did not believe the certificate";
        registry.register("tls_handshakes", help, metrics.tls_handshakes.clone());
        let help = "PROXY headers of connections by result; but for accepted and local these are ended (listen.proxy_protocol)";
        registry.register("proxy_headers", help, metrics.proxy_headers.clone());
        registry.register("http_requests", "Plain requests by the class of their answer", requests);
        registry.register("abnormal_closes", "Ends that were no Close handshake, by cause", abnormal);
        registry.register("lingered", "Sockets whose last wait ended, by leg and how", lingered);
        registry.register("accept_errors", "Failed accepts by error", metrics.accept_errors.clone());
        registry.register("build", "What runs", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        for result in TlsHandshake::ALL {
            let _ = metrics.tls_handshakes.get_or_create(&[("result", result.as_str())]);
        }
        for result in ProxyResult::ALL {
            let _ = metrics.proxy_headers.get_or_create(&[("result", result.as_str())]);
        }
        metrics.reload_is_good.set(1);
        for result in ReloadResult::ALL {
            let _ = metrics.reloads.get_or_create(&[("result", result.as_str())]);
        }
        for error in ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "connection"] {
            let _ = metrics.accept_errors.get_or_create(&[("error", error)]);
        }
        Self { registry, ..metrics }
    }

    /// The counters of one more worker.
    pub fn traffic(&self) -> Arc<Traffic> {
        let traffic = Arc::new(Traffic::default());
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        workers.push(Arc::clone(&traffic));
        traffic
    }

    /// A client was behind by more than is kept.
    pub fn slow_client(&self, action: usize) {
        self.shared_slow_clients[action].inc();
    }

    /// Clients that share a WebSocket missed something.
    pub fn gap(&self, cause: Gap) {
        self.shared_gaps[cause as usize].inc();
    }

    /// The search for a backend came to its end.
    pub fn reconnect(&self, result: Reconnect) {
        self.shared_reconnects[result as usize].inc();
    }

    /// So many JSON-RPC requests came to their end.
    pub fn rpc(&self, result: RpcResult, count: u64) {
        self.rpc_requests[result as usize].inc_by(count);
    }

    /// So many JSON-RPC messages were for nobody.
    pub fn rpc_drop(&self, why: RpcDrop, count: u64) {
        self.rpc_drops[why as usize].inc_by(count);
    }

    /// How the lines are counted that the log has lost; to be said once.
    pub fn log_drops(&self, count: impl Fn() -> u64 + Send + Sync + 'static) {
        let _ = self.log_drops.set(Box::new(count));
    }

    /// How the accept queues are looked at whenever somebody asks; to be said once.
    pub fn look_at_queues(&self, look: impl Fn() -> Vec<Queue> + Send + Sync + 'static) {
        let _ = self.queues.set(Box::new(look));
    }

    /// What limits the memory, and what of it is used, in bytes.
    pub fn saw_memory(&self, limit: u64, used: u64) {
        for (gauge, value) in self.memory.iter().zip([limit, used]) {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        }
    }

    /// WebSocket handshakes, or plain requests, that wait for their turn at the backend.
    pub fn idle_use(&self, kind: usize, what: IdleUse) {
        self.idle_uses[kind][what as usize].inc();
    }

    pub fn upstream_waiting(&self, is_handshake: bool) -> &Gauge {
        &self.upstream[0][usize::from(is_handshake)]
    }

    /// One of [`FALLBACKS`].
    pub fn pool_fallback(&self, why: &'static str) {
        self.pool_fallbacks.get_or_create(&[("why", why)]).inc();
    }

    /// Those that are with the backend, and not answered yet.
    pub fn upstream_pending(&self, is_handshake: bool) -> &Gauge {
        &self.upstream[1][usize::from(is_handshake)]
    }

    /// A WebSocket handshake ended.
    pub fn handshake(&self, result: Handshake, took: Duration) {
        if !COUNTS {
            return;
        }
        self.handshakes[result as usize].inc();
        if result == Handshake::Accepted {
            self.handshake_duration.observe(took);
        }
    }

    /// A TLS handshake with a client ended.
    pub fn tls_handshake(&self, result: TlsHandshake) {
        self.tls_handshakes.get_or_create(&[("result", result.as_str())]).inc();
    }

    /// A PROXY header was waited for.
    pub fn proxy_header(&self, result: ProxyResult) {
        self.proxy_headers.get_or_create(&[("result", result.as_str())]).inc();
    }

    /// The configuration was to be read again.
    pub fn reload(&self, result: ReloadResult) {
        self.reloads.get_or_create(&[("result", result.as_str())]).inc();
        if result != ReloadResult::Refused {
            self.reload_is_good.set((result == ReloadResult::Applied).into());
        }
    }

    /// A plain request was answered.
    pub fn request(&self, status: u16) {
        self.requests[usize::from(status / 100).clamp(1, STATUS_CLASSES.len()) - 1].inc();
    }

    /// A session ended; `initiator` is one of [`INITIATORS`].
    pub fn close(&self, initiator: &'static str, code: Option<u16>, clean: bool, took: Duration) {
        if !COUNTS {
            return;
        }
        self.closes.count(initiator, clean, code_class(code));
        self.close_duration.observe(took);
    }

    /// A session did not end by a Close handshake; `cause` is one of [`ABNORMAL`].
    pub fn abnormal(&self, cause: &'static str) {
        let cause = ABNORMAL.iter().position(|name| *name == cause).expect("one of the names");
        self.abnormal[cause].inc();
    }

    /// A socket's last wait ended; `how` is one of [`LINGERED`].
    pub fn lingered(&self, side: Side, how: &'static str) {
        if !COUNTS {
            return;
        }
        let how = LINGERED.iter().position(|name| *name == how).expect("one of the names");
        self.lingered[side as usize][how].inc();
    }

    /// `accept()` failed.
    pub fn accept_error(&self, error: &'static str) {
        self.accept_errors.get_or_create(&[("error", error)]).inc();
    }

    /// The accept queues as they are now.
    pub fn queues(&self) -> Vec<Queue> {
        self.queues.get().map(|look| look()).unwrap_or_default()
    }

    /// What limits the memory, and what of it was used, in bytes; the limit is 0 where there is none.
    pub fn memory(&self) -> [i64; 2] {
        self.memory.each_ref().map(Gauge::get)
    }

    /// Endpoints that take connections, and those that are left alone.
    pub fn endpoints(&self) -> [i64; 2] {
        self.upstream_endpoints.each_ref().map(Gauge::get)
    }

    /// The backend took no connection when it was last looked at.
    pub fn is_backend_down(&self) -> bool {
        self.backend_was_asked.load(Ordering::Relaxed) && self.backend_up.get() == 0
    }

    /// What came of a look at the backend.
    pub fn saw_backend(&self, is_up: bool) {
        self.backend_up.set(is_up.into());
        self.backend_was_asked.store(true, Ordering::Relaxed);
    }

    /// Whether what was read last of the configuration is what runs.
    pub fn is_reload_good(&self) -> bool {
        self.reload_is_good.get() == 1
    }

    /// All that was counted until now, but for what the kernel counts: that is there when its counters are given.
    pub fn totals(&self, kernel: Option<&NetCounters>) -> Totals {
        let mut totals = Totals::default();
        totals.set(Part::Handshakes, self.handshakes.iter().map(Counter::get));
        totals.set(Part::Requests, self.requests.iter().map(Counter::get));
        totals.set(Part::Causes, self.abnormal.iter().map(Counter::get));
        let given_up =
            [Reconnect::Refused, Reconnect::Expired].map(|result| self.shared_reconnects[result as usize].get());
        let shared = [
            self.shared_gaps[Gap::Lost as usize].get(),
            given_up.iter().sum(),
            self.shared_slow_clients.iter().map(Counter::get).sum(),
            self.rpc_requests[RpcResult::Timeout as usize].get(),
        ];
        totals.set(Part::Shared, shared);
        totals.set(Part::Ends, self.closes.counts());
        totals.set(Part::Connect, self.handshake_duration.counts());
        totals.set(Part::Close, self.close_duration.counts());
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = |read: &dyn Fn(&Traffic) -> u64| workers.iter().map(|worker| read(worker)).sum::<u64>();
        let refused = |reason| move |worker: &Traffic| worker.refused[reason as usize].load(Ordering::Relaxed);
        totals.set(Part::Refused, Reason::ALL.into_iter().map(|reason| sum(&refused(reason))));
        // Text and binary.
        let data = |side| {
            move |worker: &Traffic| {
                worker.messages[side as usize][..2].iter().map(|count| count.load(Ordering::Relaxed)).sum::<u64>()
            }
        };
        totals.set(Part::Messages, Side::BOTH.into_iter().map(|side| sum(&data(side))));
        if let Some(kernel) = kernel {
            totals.set(Part::Kernel, KERNEL.iter().map(|(_, group, field)| kernel.get(group, field).unwrap_or(0)));
        }
        totals
    }

    /// The longest handshake that went well and the longest end of a session since they were taken last.
    pub fn longest(&self, takes: bool) -> [Duration; 2] {
        [&self.handshake_duration, &self.close_duration].map(|durations| durations.longest(takes))
    }

    /// The exposition in the text format of `OpenMetrics`.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        let encoded = text::encode_registry(&mut out, &self.registry)
            .and_then(|()| text::encode_registry(&mut out, &self.process))
            .and_then(|()| text::encode_eof(&mut out));
        encoded.expect("writing to a String does not fail");
        out
    }
}

/// One more of something, until it is dropped.
#[derive(Debug)]
pub struct Counted(#[cfg(not(uncounted))] Gauge);

#[cfg(not(uncounted))]
impl Counted {
    /// Counts up.
    pub fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

#[cfg(uncounted)]
impl Counted {
    /// Nothing.
    pub fn new(_: &Gauge) -> Self {
        Self()
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        #[cfg(not(uncounted))]
        self.0.dec();
    }
}

/// Ports of this host toward one endpoint, of open connections.
#[derive(Debug)]
pub struct Ports {
    here: AtomicU64,
    all: Gauge,
}

impl Ports {
    /// None yet. They are counted with those toward all others, too.
    pub fn new(metrics: &Metrics) -> Arc<Self> {
        Arc::new(Self { here: AtomicU64::new(0), all: metrics.upstream_ports.clone() })
    }

    /// How many there are.
    pub fn in_use(&self) -> u64 {
        self.here.load(Ordering::Relaxed)
    }
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub struct Port(Arc<Ports>);

impl Port {
    /// Counts up.
    pub fn new(ports: &Arc<Ports>) -> Self {
        ports.here.fetch_add(1, Ordering::Relaxed);
        if COUNTS {
            ports.all.inc();
        }
        Self(Arc::clone(ports))
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.0.here.fetch_sub(1, Ordering::Relaxed);
        if COUNTS {
            self.0.all.dec();
        }
    }
}

const STATUS_CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

/// The causes of [`Metrics::abnormal`].
pub const ABNORMAL: [&str; 15] = [
    "client_fin",
    "client_reset",
    "client_silent",
    "client_stalled",
    "client_violation",
    "client_no_answer",
    "backend_fin",
    "backend_reset",
    "backend_silent",
    "backend_stalled",
    "backend_violation",
    "backend_no_answer",
    "cut_inside_frame",
    "drain_cut",
    "panic",
];

/// How sockets go after their last wait.
pub const LINGERED: [&str; 5] = ["fin", "acked", "reset", "expired", "evicted"];

/// Who begins the end of a session.
pub const INITIATORS: [&str; 3] = ["client", "backend", "tidegate"];

/// Codes by name as far as RFC 6455 and IANA name them; the rest by range, so that the set stays fixed.
const CODES: [&str; 16] = [
    "none", "1000", "1001", "1002", "1003", "1007", "1008", "1009", "1010", "1011", "1012", "1013", "1014", "3xxx",
    "4xxx", "other",
];

/// The index of a code's name in [`CODES`].
const fn code_class(code: Option<u16>) -> usize {
    match code {
        None => 0,
        Some(code @ 1000..=1003) => code as usize - 999,
        Some(code @ 1007..=1014) => code as usize - 1002,
        Some(3000..=3999) => 13,
        Some(4000..=4999) => 14,
        Some(_) => 15,
    }
}

/// What one worker relays. Only that worker writes, so nothing here is contended.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Traffic {
    accepted: AtomicU64,
    handed_off: AtomicU64,
    refused: [AtomicU64; Reason::ALL.len()],
    bytes: [AtomicU64; 2],
    messages: [[AtomicU64; OPCODES.len()]; 2],
    delivered: AtomicU64,
}

const OPCODES: [&str; 5] = ["text", "binary", "close", "ping", "pong"];

impl Traffic {
    /// A client connection was accepted.
    pub fn accept(&self) {
        add(&self.accepted, 1);
    }

    /// Another worker serves it.
    pub fn hand_off(&self) {
        add(&self.handed_off, 1);
    }

    /// A client was turned away with a 503.
    pub fn refuse(&self, reason: Reason) {
        add(&self.refused[reason as usize], 1);
    }

    /// Bytes were read from `side`.
    pub fn read(&self, side: Side, bytes: u64) {
        add(&self.bytes[side as usize], bytes);
    }

    /// A message of `side` was complete; `opcode` is that of its first frame.
    pub fn message(&self, side: Side, opcode: Opcode) {
        let index = match opcode {
            Opcode::Text => 0,
            Opcode::Binary | Opcode::Continuation => 1,
            Opcode::Close => 2,
            Opcode::Ping => 3,
            Opcode::Pong => 4,
        };
        add(&self.messages[side as usize][index], 1);
    }

    /// Messages of a WebSocket that clients share were read for one of them.
    pub fn deliver(&self, messages: u64) {
        add(&self.delivered, messages);
    }
}

/// Without a locked instruction: there is one writer.
fn add(counter: &AtomicU64, count: u64) {
    if COUNTS {
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct TrafficCollector(Arc<Mutex<Vec<Arc<Traffic>>>>);

impl Collector for TrafficCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let workers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = |read: &dyn Fn(&Traffic) -> &AtomicU64| {
            ConstCounter::new(workers.iter().map(|worker| read(worker).load(Ordering::Relaxed)).sum::<u64>())
        };
        let directions = [(Side::Client, "client_to_backend"), (Side::Backend, "backend_to_client")];

        let mut bytes =
            encoder.encode_descriptor("bytes", "Bytes of frames that were read", None, MetricType::Counter)?;
        for (side, direction) in directions {
            let value = sum(&|worker| &worker.bytes[side as usize]);
            value.encode(bytes.encode_family(&[("direction", direction)])?)?;
        }
        let help = "Messages and control frames that were read, by the opcode of their first frame";
        let mut messages = encoder.encode_descriptor("messages", help, None, MetricType::Counter)?;
        for (side, direction) in directions {
            for (index, opcode) in OPCODES.into_iter().enumerate() {
                let value = sum(&|worker| &worker.messages[side as usize][index]);
                value.encode(messages.encode_family(&[("direction", direction), ("opcode", opcode)])?)?;
            }
        }
        let help = "Messages of backends on WebSockets that clients share, counted for each client";
        let delivered = encoder.encode_descriptor("shared_deliveries", help, None, MetricType::Counter)?;
        sum(&|worker| &worker.delivered).encode(delivered)?;
        let help = "Client connections that were accepted";
        let mut accepted = encoder.encode_descriptor("accepted", help, None, MetricType::Counter)?;
        for (index, worker) in workers.iter().enumerate() {
            let value = ConstCounter::new(worker.accepted.load(Ordering::Relaxed));
            value.encode(accepted.encode_family(&[("worker", index.to_string())])?)?;
        }
        let help =
            "Of them, those that the worker gave to a less busy one at once; what waits goes to whichever has room";
        let mut handed_off = encoder.encode_descriptor("handed_off", help, None, MetricType::Counter)?;
        for (index, worker) in workers.iter().enumerate() {
            let value = ConstCounter::new(worker.handed_off.load(Ordering::Relaxed));
            value.encode(handed_off.encode_family(&[("worker", index.to_string())])?)?;
        }
        let help = "Clients that were turned away with a 503, by reason";
        let mut refused = encoder.encode_descriptor("refused", help, None, MetricType::Counter)?;
        for (index, worker) in workers.iter().enumerate() {
            for reason in Reason::ALL {
                let value = ConstCounter::new(worker.refused[reason as usize].load(Ordering::Relaxed));
                let labels = [("worker", index.to_string()), ("reason", reason.as_str().to_owned())];
                value.encode(refused.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// An accept queue at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue {
    /// Connections that wait in it.
    pub length: u32,
    /// As many as may.
    pub limit: u32,
}

type LookAtQueues = dyn Fn() -> Vec<Queue> + Send + Sync;

struct QueueCollector(Arc<OnceLock<Box<LookAtQueues>>>);

impl fmt::Debug for QueueCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueCollector").finish_non_exhaustive()
    }
}

impl Collector for QueueCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let queues = self.0.get().map(|look| look()).unwrap_or_default();
        let help = "Connections that wait to be accepted, by accept queue";
        let mut length = encoder.encode_descriptor("accept_queue_length", help, None, MetricType::Gauge)?;
        for (index, queue) in queues.iter().enumerate() {
            ConstGauge::new(i64::from(queue.length)).encode(length.encode_family(&[("queue", index.to_string())])?)?;
        }
        let help = "Connections that may wait, by accept queue, as the kernel granted it";
        let mut limit = encoder.encode_descriptor("accept_queue_limit", help, None, MetricType::Gauge)?;
        for (index, queue) in queues.iter().enumerate() {
            ConstGauge::new(i64::from(queue.limit)).encode(limit.encode_family(&[("queue", index.to_string())])?)?;
        }
        Ok(())
    }
}

/// The log's own count of what it has lost.
struct LogCollector(Arc<OnceLock<Box<CountDrops>>>);

type CountDrops = dyn Fn() -> u64 + Send + Sync;

impl fmt::Debug for LogCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogCollector").finish_non_exhaustive()
    }
}

impl Collector for LogCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let dropped = self.0.get().map_or(0, |count| count());
        let help = "Log lines that were dropped since whoever reads them was too slow";
        let metric = encoder.encode_descriptor("log_lines_dropped", help, None, MetricType::Counter)?;
        ConstCounter::new(dropped).encode(metric)
    }
}

/// How sessions begin and end.
#[derive(Debug, Clone, Default)]
struct Ends {
    handshakes: Arc<Durations>,
    closes: Arc<Closes>,
    took: Arc<Durations>,
}

impl Collector for Ends {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "Sessions that ended, by who began it, the code, and whether both Close handshakes were completed";
        let mut closes = encoder.encode_descriptor("closes", help, None, MetricType::Counter)?;
        // All of them, so that none begins at 1.
        for (Close { initiator, clean, code }, count) in self.closes.all() {
            let labels =
                [("initiator", initiator), ("code_class", code), ("clean", if clean { "true" } else { "false" })];
            ConstCounter::new(count).encode(closes.encode_family(&labels)?)?;
        }
        let unit = Unit::Seconds;
        for (name, help, durations) in [
            (
                "handshake_duration",
                "From the beginning of a handshake to the backend's 101; the wait of connections_queued comes before it",
                &self.handshakes,
            ),
            ("close_duration", "From the first sign of a session's end to the FINs on both legs", &self.took),
        ] {
            let mut encoder = encoder.encode_descriptor(name, help, Some(&unit), MetricType::Histogram)?;
            let buckets = durations.coarse();
            let count = buckets.iter().map(|(_, count)| count).sum();
            encoder.encode_histogram::<NoLabelSet>(durations.seconds(), count, &buckets, None)?;
        }
        Ok(())
    }
}

/// What the pools of upstream connections count.
#[derive(Debug)]
struct PoolCollector(Arc<Stats>);

impl Collector for PoolCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Self(pools) = self;
        let census = pools.census();
        let help = "Upstream connections that are shared, by state; closed: ended, with references that are not given back yet";
        let mut connections = encoder.encode_descriptor("pool_connections", help, None, MetricType::Gauge)?;
        for (state, count) in stats::STATES.into_iter().zip(census.connections) {
            ConstGauge::new(count).encode(connections.encode_family(&[("state", state)])?)?;
        }
        for (name, help, count) in [
            ("pool_references", "References that are held on shared upstream connections", census.references),
            ("pool_waiters", "Those that wait for a reference", census.waiters),
            ("pool_keys", "Keys of which the pools remember anything", census.keys),
        ] {
            let gauge = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(count).encode(gauge)?;
        }
        let help = "Opens of shared upstream connections that ended, by result";
        let mut opens = encoder.encode_descriptor("pool_opens", help, None, MetricType::Counter)?;
        for (result, count) in stats::OPENS.into_iter().zip(pools.opens()) {
            ConstCounter::new(count).encode(opens.encode_family(&[("result", result)])?)?;
        }
        let help = "What it took to come by a reference, by how: at once (hit, or revive of an idle connection), or after a wait for a new \
                    connection (open) or another one (wait)";
        let unit = Unit::Seconds;
        let mut acquires =
            encoder.encode_descriptor("pool_acquire_duration", help, Some(&unit), MetricType::Histogram)?;
        let bounds = stats::ACQUIRE_BOUNDS_SECONDS.into_iter().chain([f64::INFINITY]);
        for (how, took) in stats::HOWS.into_iter().zip(pools.acquires()) {
            let buckets: Vec<_> = bounds.clone().zip(took.buckets).collect();
            let labels = [("how", how)];
            let mut family = acquires.encode_family(&labels)?;
            family.encode_histogram::<NoLabelSet>(took.seconds, took.buckets.iter().sum(), &buckets, None)?;
        }
        let help = "Those that got no reference, by reason";
        let mut refusals = encoder.encode_descriptor("pool_refusals", help, None, MetricType::Counter)?;
        for (reason, count) in stats::REFUSALS.into_iter().zip(pools.refusals()) {
            ConstCounter::new(count).encode(refusals.encode_family(&[("reason", reason)])?)?;
        }
        for (name, help, count) in [
            (
                "pool_idle_closes",
                "Shared upstream connections that were closed since nobody used them",
                pools.idle_closes(),
            ),
            (
                "pool_goaways",
                "Shared upstream connections that take nobody else, by GOAWAY or pool.max_uses",
                pools.goaways(),
            ),
            (
                "pool_invariant_violations",
                "Mistakes in the pool itself; anything but 0 is an alert",
                pools.violations(),
            ),
        ] {
            let counter = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            ConstCounter::new(count).encode(counter)?;
        }
        Ok(())
    }
}

/// What the kernel counts for the network namespace as a whole: in a pod, for the backend and everybody else too.
#[derive(Debug)]
struct NamespaceCollector(System);

/// Metric, help, and where the kernel has it: a group and a field of /proc/net/netstat or /proc/net/snmp
/// (net/ipv4/proc.c).
const NAMESPACE_COUNTERS: [(&str, &str, &str, &str); 7] = [
    ("listen_overflows", "Connections that found an accept queue full", "TcpExt", "ListenOverflows"),
    ("listen_drops", "Connections that a listening socket dropped, for whatever reason", "TcpExt", "ListenDrops"),
    (
        "tcp_out_rsts",
        "RST that were sent, also as the answer to a SYN for a port where nobody listens",
        "Tcp",
        "OutRsts",
    ),
    ("tcp_estab_resets", "Connections that ended by a RST, sent or received", "Tcp", "EstabResets"),
    ("tcp_timeouts", "Retransmission timers that fired", "TcpExt", "TCPTimeouts"),
    ("tcp_delayed_acks", "ACKs that were sent late", "TcpExt", "DelayedACKs"),
    ("tcp_delayed_acks_lost", "ACKs that were sent again, since the peer had sent again", "TcpExt", "DelayedACKLost"),
];

/// `tcp_aborts_total{kind}`: the kind, and the field of "`TcpExt`".
const ABORTS: [(&str, &str); 6] = [
    ("on_data", "TCPAbortOnData"),
    ("on_close", "TCPAbortOnClose"),
    ("on_memory", "TCPAbortOnMemory"),
    ("on_timeout", "TCPAbortOnTimeout"),
    ("on_linger", "TCPAbortOnLinger"),
    ("failed", "TCPAbortFailed"),
];

/// What the live page shows of the kernel's counters: a name as in `/metrics`, a group and a field.
pub const KERNEL: [(&str, &str, &str); 11] = [
    ("listen_overflows", "TcpExt", "ListenOverflows"),
    ("listen_drops", "TcpExt", "ListenDrops"),
    ("tcp_aborts on_data", "TcpExt", "TCPAbortOnData"),
    ("tcp_aborts on_close", "TcpExt", "TCPAbortOnClose"),
    ("tcp_aborts on_memory", "TcpExt", "TCPAbortOnMemory"),
    ("tcp_aborts on_timeout", "TcpExt", "TCPAbortOnTimeout"),
    ("tcp_aborts on_linger", "TcpExt", "TCPAbortOnLinger"),
    ("tcp_aborts failed", "TcpExt", "TCPAbortFailed"),
    ("tcp_out_rsts", "Tcp", "OutRsts"),
    ("tcp_estab_resets", "Tcp", "EstabResets"),
    ("tcp_timeouts", "TcpExt", "TCPTimeouts"),
];

impl Collector for NamespaceCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        if let Some(counters) = self.0.net_counters() {
            for (name, help, group, field) in NAMESPACE_COUNTERS {
                if let Some(value) = counters.get(group, field) {
                    let help = format!("{help}; of the whole network namespace");
                    let metric = encoder.encode_descriptor(name, &help, None, MetricType::Counter)?;
                    ConstCounter::new(value).encode(metric)?;
                }
            }
            let help = "Connections that the kernel ended abortively, by kind; of the whole network namespace";
            let mut aborts = encoder.encode_descriptor("tcp_aborts", help, None, MetricType::Counter)?;
            for (kind, field) in ABORTS {
                if let Some(value) = counters.get("TcpExt", field) {
                    ConstCounter::new(value).encode(aborts.encode_family(&[("kind", kind)])?)?;
                }
            }
        }
        if let Some(sockets) = self.0.tcp_sockets() {
            let help = "Sockets in TIME_WAIT; of the whole network namespace";
            let metric = encoder.encode_descriptor("tcp_time_wait", help, None, MetricType::Gauge)?;
            ConstGauge::new(i64::try_from(sockets.time_wait).unwrap_or(i64::MAX)).encode(metric)?;
        }
        Ok(())
    }
}

/// What every process tells of itself, under the names that Prometheus' own libraries have for it.
#[derive(Debug)]
struct ProcessCollector(System);

impl Collector for ProcessCollector {
    #[expect(clippy::cast_precision_loss, reason = "a count of descriptors")]
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut tell = |name, help, unit: Option<&Unit>, value: f64| {
            ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?)
        };
        if let Some(memory) = self.0.process_memory() {
            let [resident, size] = [memory.resident, memory.virtual_size].map(|bytes| bytes as f64);
            tell("process_resident_memory", "Memory that the process has in use", Some(&Unit::Bytes), resident)?;
            tell("process_virtual_memory", "Address space of the process", Some(&Unit::Bytes), size)?;
        }
        if let Some(open) = self.0.open_descriptors() {
            tell("process_open_fds", "Descriptors that the process has open", None, open as f64)?;
        }
        if let Some(most) = crate::system::descriptor_limit().soft {
            tell("process_max_fds", "Descriptors that it may have open", None, most as f64)?;
        }
        if let Some(process) = self.0.process() {
            tell("process_threads", "Threads of the process", None, process.threads as f64)?;
            let help = "When the process was started, since 1970";
            tell("process_start_time", help, Some(&Unit::Seconds), process.started_seconds)?;
            let help = "Processor time that the process has used, user and system";
            let cpu = encoder.encode_descriptor("process_cpu", help, Some(&Unit::Seconds), MetricType::Counter)?;
            ConstCounter::new(process.cpu_seconds).encode(cpu)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the pools count is there before anything was counted, and with all of its buckets: 16 bounds and the rest.
    #[test]
    fn pools_are_told_of_from_the_start() {
        let text = Metrics::new().encode();
        for line in [
            "tidegate_pool_connections{state=\"idle\"} 0",
            "tidegate_pool_fallbacks_total{why=\"known\"} 0",
            "tidegate_pool_references 0",
            "tidegate_pool_opens_total{result=\"panicked\"} 0",
            "tidegate_pool_acquire_duration_seconds_bucket{le=\"0.0005\",how=\"revive\"} 0",
            "tidegate_pool_acquire_duration_seconds_bucket{le=\"+Inf\",how=\"wait\"} 0",
            "tidegate_pool_acquire_duration_seconds_count{how=\"hit\"} 0",
            "tidegate_pool_refusals_total{reason=\"cancelled\"} 0",
            "tidegate_pool_invariant_violations_total 0",
        ] {
            assert!(text.lines().any(|found| found == line), "no {line} in:\n{text}");
        }
        assert_eq!(text.matches("tidegate_pool_acquire_duration_seconds_bucket{").count(), 4 * 17);
    }
}
