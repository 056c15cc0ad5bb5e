//! What is counted. The only module that knows the metrics crate.
//!
//! Counters that move with every message are kept per worker, on cache lines of their own, and summed when asked for.

mod collectors;
mod labels;
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
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::Registry,
};

pub use self::{
    collectors::Queue,
    labels::{
        ABNORMAL, FALLBACKS, Gap, Handshake, INITIATORS, IdleUse, KERNEL, LINGERED, ProxyResult, Reconnect,
        ReloadResult, RpcDrop, RpcResult, TlsHandshake,
    },
    totals::{Close, Part, Totals},
};
use self::{
    collectors::{
        CountDrops, Ends, LogCollector, LookAtQueues, NamespaceCollector, PoolCollector, ProcessCollector,
        QueueCollector, TrafficCollector,
    },
    labels::{CODES, GAPS, IDLE, SHARED, SLOW_CLIENTS, STATUS_CLASSES, code_class},
    totals::{Closes, Durations},
};
use crate::{
    admission::Reason,
    pool::stats::Stats,
    side::Side,
    system::{NetCounters, System},
    ws::Opcode,
};

/// False in a build that shows what counting costs (`.ci/costs`): nearly all that moves with messages and sessions over TCP then stays 0.
const COUNTS: bool = !cfg!(uncounted);

/// Labels with values from fixed sets only.
type Labels<const N: usize> = [(&'static str, &'static str); N];

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

    /// A connection that waits, of the kind with this number in `idle`, was looked for.
    pub fn idle_use(&self, kind: usize, what: IdleUse) {
        self.idle_uses[kind][what as usize].inc();
    }

    /// WebSocket handshakes, or plain requests, that wait for their turn at the backend.
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
