//! The proxy under test: tidegate's own parts, put together in four ways. Only who accepts, and on which thread a session
//! then runs, differs between them.
//!
//! `per-core` and `hand-off` are tidegate's `Server` as it is. `multi-1` and `multi-n` are one work-stealing runtime with as
//! many threads, where any thread may go on with any session.

use std::{
    collections::HashMap,
    fmt,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::SystemTime,
};

use anyhow::Context as _;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tidegate::{
    config::Settings, drain::Drain, listen, metrics::Metrics, net, server::Server, session::Context, upstream::Upstream,
};
use tokio::{net::TcpListener, runtime, sync::Semaphore};
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
    Multi { metrics: Arc<Metrics>, _runtime: runtime::Runtime },
}

pub fn main(assembly: Assembly, backend: SocketAddr) -> anyhow::Result<()> {
    let opened = watch();
    let mut settings = Settings::default();
    settings.listen.address = (Ipv4Addr::LOCALHOST, 0).into();
    settings.listen.workers = WORKERS;
    settings.upstream.address = net::Address::Tcp { host: backend.ip().to_string(), port: backend.port() };
    settings.admin.address = Some((Ipv4Addr::LOCALHOST, 0).into());
    // None is turned away: it is about when they are accepted.
    settings.downstream.max_handshakes = 65_536;

    let main = runtime::Builder::new_current_thread().enable_all().build()?;
    let (address, running) = main.block_on(async {
        anyhow::Ok(match assembly {
            Assembly::PerCore | Assembly::HandOff => {
                let server = Server::start(&settings)?;
                (server.address, Running::Server(server))
            }
            Assembly::Multi1 => multi(&settings, 1)?,
            Assembly::MultiN => multi(&settings, WORKERS)?,
        })
    })?;
    let admin = match &running {
        Running::Server(server) => server.admin,
        Running::Multi { .. } => None,
    };
    // The admin listener is served by the thread that called `Server::start`.
    let server =
        thread::Builder::new().name("main".to_owned()).spawn(move || main.block_on(std::future::pending::<()>()));
    drop(server?);

    say(&address)?;
    while is_asked()? {
        let text = match (&running, admin) {
            (Running::Multi { metrics, .. }, _) => metrics.encode(),
            (Running::Server(_), Some(admin)) => get(admin).context("/metrics")?,
            (Running::Server(_), None) => String::new(),
        };
        let metrics = text
            .lines()
            .filter(|line| line.starts_with("tidegate_accept") || line.starts_with("tidegate_handed"))
            .filter_map(|line| line.rsplit_once(' '))
            .filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?)))
            .collect();
        let opened = lock(&opened).clone();
        say(&Told { opened, metrics })?;
    }
    Ok(())
}

/// As `Server::start` does it, but with one runtime: an accept task per queue, each with a context of its own, since its
/// counters have one writer.
fn multi(settings: &Settings, accept_tasks: usize) -> anyhow::Result<(SocketAddr, Running)> {
    let listen = &settings.listen;
    let listeners = net::listeners(listen.address, listen.backlog, accept_tasks, &settings.socket)?;
    let address = listeners.first().context("at least one")?.local_addr()?;
    let metrics = Arc::new(Metrics::new());
    let drain = Drain::new(settings.drain.clone());
    let upstream = Upstream::new(settings.upstream.clone(), settings.socket.clone());
    let slots = |count| Arc::new(Semaphore::new(count));
    let (handshakes, requests) = (slots(settings.downstream.max_handshakes), slots(settings.downstream.max_handshakes));
    let orphans = slots(settings.upstream.max_pending);
    let relay = Arc::new(settings.relay.clone());
    let has_doubted = Arc::default();
    let names = AtomicUsize::new(0);
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_name_fn(move || format!("worker-{}", names.fetch_add(1, Ordering::Relaxed)))
        .enable_all()
        .build()?;
    let loops = TaskTracker::new();
    for listener in listeners {
        let context = Arc::new(Context {
            downstream: settings.downstream.clone(),
            relay: Arc::clone(&relay),
            close: settings.close,
            upstream: upstream.clone(),
            metrics: Arc::clone(&metrics),
            traffic: metrics.traffic(),
            drain: drain.clone(),
            tracker: TaskTracker::new(),
            handshakes: Arc::clone(&handshakes),
            requests: Arc::clone(&requests),
            orphans: Arc::clone(&orphans),
            has_doubted: Arc::clone(&has_doubted),
        });
        let _entered = runtime.enter();
        let listener = TcpListener::from_std(listener)?;
        loops.spawn(async move {
            let accept = |stream, peer| context.accept(stream, peer);
            listen::accept_loop(listener, context.drain.begun(), &context.metrics, accept).await;
        });
    }
    Ok((address, Running::Multi { metrics, _runtime: runtime }))
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
