//! The proxy under test: tidegate's own parts, put together in four ways. Only who accepts, and on which thread a session
//! then runs, differs between them.
//!
//! `per-core` and `hand-off` are tidegate's `Server` as it is. In `shared` a session stays on its thread too. `multi-1` and
//! `multi-n` are one work-stealing runtime with as many threads, where any thread may go on with any session.

use std::{
    collections::HashMap,
    fmt,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::SystemTime,
};

use anyhow::Context as _;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tidegate::{
    admission::{Admission, Capacity, Memory, Reason},
    close::{Bounds, Linger},
    config::Settings,
    drain::Drain,
    gate::{Gate, Waiters},
    hub::Hubs,
    listen::{self, Balancer, Door},
    metrics::{Counted, Metrics},
    net::{self, Listener, Wish},
    relay,
    server::Server,
    session::{Context, Current},
    upstream::{Home, Upstreams},
};
use tokio::{
    runtime::{self, Runtime},
    sync::{Semaphore, mpsc},
};
use tokio_util::task::TaskTracker;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
};
use tracing_subscriber::{
    Layer,
    filter::filter_fn,
    layer::{Context as LayerContext, SubscriberExt as _},
    util::SubscriberInitExt as _,
};

use crate::process::{is_asked, say};

/// Threads that serve sessions, in every assembly.
pub const WORKERS: usize = 2;

/// How tidegate's parts are put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Assembly {
    /// A current-thread runtime per worker with accept queues of its own; who accepted a session keeps it
    PerCore,
    /// The same, but a clearly busier worker hands what it accepted to the least loaded one
    HandOff,
    /// As per-core, but each worker accepts from the queues of all
    Shared,
    /// One multi-thread runtime, one accept queue, one accept task
    #[value(name = "multi-1")]
    #[serde(rename = "multi-1")]
    Multi1,
    /// One multi-thread runtime, an accept queue and an accept task per thread
    MultiN,
}

impl fmt::Display for Assembly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::PerCore => "per-core",
            Self::HandOff => "hand-off",
            Self::Shared => "shared",
            Self::Multi1 => "multi-1",
            Self::MultiN => "multi-n",
        })
    }
}

/// Where a session began to be relayed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Opened {
    /// The client's port.
    pub port: u16,
    /// The thread's name.
    pub thread: String,
    /// In microseconds since 1970.
    pub at: u64,
}

/// What it says when asked.
#[derive(Debug, Serialize, Deserialize)]
pub struct Told {
    pub opened: Vec<Opened>,
    /// The series of `/metrics` that are about accepting, by name and labels.
    pub metrics: HashMap<String, f64>,
}

/// What keeps a proxy alive.
enum Running {
    Server(Server),
    Parts { metrics: Arc<Metrics>, _runtime: Option<runtime::Runtime> },
}

pub fn main(assembly: Assembly, backend: SocketAddr) -> anyhow::Result<()> {
    let opened = watch();
    let mut settings = Settings::default();
    settings.listen.address = (Ipv4Addr::LOCALHOST, 0).into();
    settings.listen.workers = WORKERS;
    settings.listen.hand_off = assembly == Assembly::HandOff;
    settings.upstream.address = net::Address::Tcp { host: backend.ip().to_string(), port: backend.port() }.into();
    settings.admin.address = Some((Ipv4Addr::LOCALHOST, 0).into());
    // Nobody is turned away: it is about when they are let in.
    settings.limits.memory = Memory::Off;
    settings.limits.max_connections = Some(usize::MAX);

    let main = runtime::Builder::new_current_thread().enable_all().build()?;
    let (address, running) = match assembly {
        Assembly::PerCore | Assembly::HandOff => {
            let server = main.block_on(async { Server::start(&settings) })?;
            (server.address, Running::Server(server))
        }
        Assembly::Shared => shared(&settings)?,
        Assembly::Multi1 => multi(&settings, 1)?,
        Assembly::MultiN => multi(&settings, WORKERS)?,
    };
    // The admin listener is on the runtime that `Server::start` was called on.
    thread::Builder::new().name("main".to_owned()).spawn(move || main.block_on(std::future::pending::<()>()))?;

    say(&address)?;
    while is_asked()? {
        let text = match &running {
            Running::Parts { metrics, .. } => metrics.encode(),
            Running::Server(server) => get(server.admin.context("an admin listener")?).context("/metrics")?,
        };
        let metrics = text
            .lines()
            .filter(|line| SERIES.iter().any(|name| line.starts_with(name)))
            .filter_map(|line| line.rsplit_once(' '))
            .filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?)))
            .collect();
        let opened = lock(&opened).clone();
        say(&Told { opened, metrics })?;
    }
    Ok(())
}

/// Of `/metrics`, for a look at what happened.
const SERIES: [&str; 2] = ["tidegate_accepted_total", "tidegate_handed_off_total"];

/// What `Server::start` makes, for assemblies that it does not know.
struct Parts<'a> {
    settings: &'a Settings,
    metrics: Arc<Metrics>,
    upstreams: Upstreams,
    admission: Admission,
    drain: Drain,
    relay: relay::Config,
    handshakes: Arc<Semaphore>,
    requests: Arc<Semaphore>,
    orphans: Arc<Semaphore>,
    has_doubted: Arc<AtomicBool>,
    waiters: Arc<Waiters>,
    bounds: Arc<Bounds>,
}

impl<'a> Parts<'a> {
    fn new(settings: &'a Settings) -> Self {
        let metrics = Arc::new(Metrics::new());
        let slots = |count| Arc::new(Semaphore::new(count));
        let capacity = Capacity {
            connections: Semaphore::MAX_PERMITS,
            turned_away: 1,
            memory: None,
            connection_bytes: 0,
            full: Reason::MaxConnections,
        };
        Self {
            upstreams: Upstreams::new(settings.upstream.clone(), [], &settings.socket, &metrics, None),
            metrics,
            admission: Admission::new(capacity, &settings.limits),
            drain: Drain::new(settings.drain.clone()),
            relay: settings.relay.clone(),
            handshakes: slots(settings.upstream.max_waiting),
            requests: slots(settings.upstream.max_waiting),
            orphans: slots(settings.upstream.max_pending),
            waiters: Arc::default(),
            bounds: Arc::new(Bounds::new(settings.close.max_lingering)),
            has_doubted: Arc::default(),
            settings,
        }
    }

    /// Accept queues, and where they are.
    fn listen(&self, queues: usize) -> anyhow::Result<(SocketAddr, Vec<Arc<Listener>>)> {
        let listen = &self.settings.listen;
        let wish = Wish { backlog: listen.backlog, queues, most: queues };
        let listeners = net::listen(listen.address, wish, &self.settings.socket)?;
        let address = listeners.first().context("at least one")?.local_addr()?;
        Ok((address, listeners.into_iter().map(Arc::new).collect()))
    }

    /// For each accept loop its own: the counters in it have one writer.
    fn context(&self, balancer: &Balancer, runtime: &Runtime) -> Arc<Context> {
        let tracker = TaskTracker::new();
        let home = Home {
            runtime: runtime.handle().clone(),
            tracker: tracker.clone(),
            drain: self.drain.clone(),
            // Nothing is opened ahead here.
            worker: 0,
            workers: 1,
            // None is shared here.
            end: Arc::new(drop),
        };
        let (config, delays) = (self.relay.clone(), self.admission.delays());
        let relay = relay::Shared::new(config, self.metrics.traffic(), self.drain.clone(), delays);
        Arc::new(Context {
            current: Current::default(),
            downstream: self.settings.downstream.clone(),
            relay: Arc::new(relay),
            log_sample: 0,
            close: self.settings.close.patience,
            linger: Linger::new(&self.bounds, Some(Arc::clone(&self.metrics))),
            upstreams: self.upstreams.clone(),
            home,
            hubs: Hubs::default(),
            metrics: Arc::clone(&self.metrics),
            roster: Arc::default(),
            tracker,
            gate: Gate::new(&self.waiters),
            pending: balancer.pending(0),
            admission: self.admission.clone(),
            handshakes: Arc::clone(&self.handshakes),
            requests: Arc::clone(&self.requests),
            orphans: Arc::clone(&self.orphans),
            leftovers: Arc::clone(&self.orphans),
            has_doubted: Arc::clone(&self.has_doubted),
        })
    }

    /// For one worker, which nobody gives anything to.
    fn balancer(&self, runtime: &Runtime) -> Balancer {
        Balancer::new([(runtime.handle().clone(), mpsc::unbounded_channel().0)], &self.waiters, false)
    }
}

/// Accepts, on the runtime that this is called on; whoever accepts serves.
async fn accept(listener: Arc<Listener>, context: Arc<Context>, balancer: Balancer) {
    let door = Door { admission: context.admission.clone(), metrics: Arc::clone(&context.metrics) };
    let serve = |stream, peer, place| {
        context.relay.traffic.accept();
        if let Some(accepted) = balancer.place(0, stream, peer, place, Counted::new(&context.metrics.connections)) {
            context.accept(accepted);
        }
    };
    if let Err(error) = listen::accept_loop(listener, context.relay.drain.begun(), &door, serve).await {
        tracing::error!(%error, "cannot use a listener");
    }
}

/// One runtime, and an accept task per queue.
fn multi(settings: &Settings, queues: usize) -> anyhow::Result<(SocketAddr, Running)> {
    let parts = Parts::new(settings);
    let (address, listeners) = parts.listen(queues)?;
    let names = AtomicUsize::new(0);
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_name_fn(move || format!("worker-{}", names.fetch_add(1, Ordering::Relaxed)))
        .enable_all()
        .build()?;
    let loops = TaskTracker::new();
    for listener in listeners {
        let balancer = parts.balancer(&runtime);
        let context = parts.context(&balancer, &runtime);
        runtime.spawn(Arc::clone(&context).take_on(balancer.counter(0)));
        runtime.spawn(context.linger.clone().run());
        loops.spawn_on(accept(listener, context, balancer), runtime.handle());
    }
    Ok((address, Running::Parts { metrics: parts.metrics, _runtime: Some(runtime) }))
}

/// A runtime per worker, and in each an accept task for every queue.
fn shared(settings: &Settings) -> anyhow::Result<(SocketAddr, Running)> {
    let parts = Parts::new(settings);
    let (address, listeners) = parts.listen(WORKERS)?;
    for index in 0..WORKERS {
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let balancer = parts.balancer(&runtime);
        let (context, listeners) = (parts.context(&balancer, &runtime), listeners.clone());
        thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
            let loops = TaskTracker::new();
            runtime.spawn(Arc::clone(&context).take_on(balancer.counter(0)));
            runtime.spawn(context.linger.clone().run());
            for listener in listeners {
                loops.spawn_on(accept(listener, Arc::clone(&context), balancer.clone()), runtime.handle());
            }
            loops.close();
            runtime.block_on(loops.wait());
        })?;
    }
    Ok((address, Running::Parts { metrics: parts.metrics, _runtime: None }))
}

/// Sees to it that each session's beginning is written down, and that warnings are shown. No line is written per session.
fn watch() -> Arc<Mutex<Vec<Opened>>> {
    let opened = Arc::new(Mutex::new(Vec::new()));
    let begins = filter_fn(|event| {
        event.target() == "tidegate::session" && *event.level() == Level::INFO && event.fields().len() == 4
    });
    tracing_subscriber::registry()
        .with(Watch(Arc::clone(&opened)).with_filter(begins))
        .with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_filter(LevelFilter::WARN))
        .init();
    opened
}

struct Watch(Arc<Mutex<Vec<Opened>>>);

impl<S: Subscriber> Layer<S> for Watch {
    fn on_event(&self, event: &Event<'_>, _: LayerContext<'_, S>) {
        let mut open = Open::default();
        event.record(&mut open);
        if let Open { is_open: true, client: Some(client) } = open {
            let thread = thread::current().name().unwrap_or_default().to_owned();
            lock(&self.0).push(Opened { port: client.port(), thread, at: now() });
        }
    }
}

/// The fields of the line at a session's beginning.
#[derive(Default)]
struct Open {
    is_open: bool,
    client: Option<SocketAddr>,
}

impl Visit for Open {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.is_open = format!("{value:?}") == "open",
            "client" => self.client = format!("{value:?}").parse().ok(),
            _ => {}
        }
    }
}

/// In microseconds since 1970: a clock that processes share.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

fn get(admin: SocketAddr) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(admin)?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
