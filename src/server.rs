//! Assembly: workers, their listeners, the admin listener, signals, and the phases of the process's end.
//!
//! ```text
//! Running --SIGTERM--> delay: goes on accepting --> window: listeners closed, sessions end one by one
//!         --second signal, at any time--> every session ends now, still with Close frames
//!         --all ended, or `drain.timeout` after the window--> exit 0
//! ```

use std::{
    io,
    net::{SocketAddr, TcpListener as StdListener},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::Context as _;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::{
    net::TcpListener,
    runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::{Semaphore, mpsc},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use crate::{
    admin, config::Settings, drain::Drain, listen, metrics::Metrics, net, session::Context, upstream::Upstream,
};

/// What runs.
#[derive(Debug)]
pub struct Server {
    /// Where clients connect; the port is real also when 0 was configured.
    pub address: SocketAddr,
    /// Where the admin listener is.
    pub admin: Option<SocketAddr>,
    drain: Drain,
    metrics: Arc<Metrics>,
    /// Ends what is left without waiting any longer.
    abort: CancellationToken,
    /// Closed when the last worker has ended.
    workers: mpsc::Receiver<()>,
    /// The longest that a session takes to end once it was told, with peers that answer nothing.
    ending: Duration,
}

impl Server {
    /// Binds, and starts the worker threads. To be called inside the runtime that is to serve the admin listener.
    pub fn start(settings: &Settings) -> anyhow::Result<Self> {
        raise_descriptor_limit();
        let listen = &settings.listen;
        let listeners =
            net::listeners(listen.address, listen.backlog, listen.workers, &settings.socket).with_context(|| {
                format!("cannot listen on {}: set listen.address (--listen) to another", listen.address)
            })?;
        let address = listeners.first().context("listen.workers is at least 1")?.local_addr()?;
        // Bound before the first client is accepted: an address in use must not cost anybody a session.
        let admin = settings.admin.address.map(|wanted| {
            admin_listener(wanted).with_context(|| {
                format!("cannot listen on {wanted}: set admin.address (TIDEGATE_ADMIN__ADDRESS) to another, or \"off\"")
            })
        });
        let admin = admin.transpose()?;
        let metrics = Arc::new(Metrics::new());
        let drain = Drain::new(settings.drain.clone());
        let abort = CancellationToken::new();
        let upstream = Upstream::new(settings.upstream.clone(), settings.socket.clone());
        let slots = |count| Arc::new(Semaphore::new(count));
        let (handshakes, requests) =
            (slots(settings.downstream.max_handshakes), slots(settings.downstream.max_handshakes));
        let orphans = slots(settings.upstream.max_pending);
        let has_doubted = Arc::default();
        let relay = Arc::new(settings.relay.clone());
        let (alive, workers) = mpsc::channel(1);
        for (index, listener) in listeners.into_iter().enumerate() {
            let context = Context {
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
            };
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            let (abort, alive) = (abort.clone(), alive.clone());
            thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        () = worker(listener, context) => {}
                        () = abort.cancelled() => {}
                    }
                });
                // Not waiting for a name that is still being looked up.
                runtime.shutdown_background();
                drop(alive);
            })?;
        }
        let admin = match admin {
            Some(listener) => {
                let address = listener.local_addr()?;
                // It outlives the drain, and goes with its runtime.
                let tracker = TaskTracker::new();
                let admin =
                    admin::Admin::new(Arc::clone(&metrics), upstream, drain.clone(), settings.close, tracker.clone());
                tracker.spawn(admin.serve(TcpListener::from_std(listener)?));
                Some(address)
            }
            None => None,
        };
        let ending = settings.relay.close_delay
            + settings.relay.close_handshake_timeout * 3
            + settings.close.linger_max
            + Duration::from_secs(1);
        Ok(Self { address, admin, drain, metrics, abort, workers, ending })
    }

    /// Ends everything: the delay, the window, what is left after it. Each further item of `signals` leaves less time: the
    /// second one ends every session now, the third does not wait for that. Returns when all sessions have ended, or their
    /// time has.
    pub async fn drain(&mut self, signals: &mut Signals) {
        let config = self.drain.config().clone();
        let begun = Instant::now();
        let total = config.delay + config.window + config.timeout;
        let sessions = self.metrics.sessions.get();
        info!(
            delay_ms = millis(config.delay),
            window_ms = millis(config.window),
            latest_exit_ms = millis(total),
            sessions,
            hint = "the same signal again ends everything now",
            "draining"
        );
        self.metrics.drain_state.set(1);
        let hurried = tokio::select! {
            () = sleep(config.delay) => false,
            () = signals.next() => true,
        };
        self.metrics.drain_state.set(2);
        self.drain.begin();
        info!(sessions = self.metrics.sessions.get(), "listeners close, sessions end");
        let last = Instant::now() + config.window + config.timeout;
        let (drain, ending) = (&self.drain, self.ending);
        let late = async {
            if !hurried {
                tokio::select! {
                    // By the end of the window every session was told.
                    () = sleep_until(last) => return,
                    () = signals.next() => {}
                }
            }
            info!("second signal: ending everything now");
            drain.hurry();
            tokio::select! {
                () = sleep_until(last.min(Instant::now() + ending)) => {}
                () = signals.next() => {}
            }
        };
        let is_late = tokio::select! {
            _ = self.workers.recv() => false,
            () = late => true,
        };
        if is_late {
            warn!(
                sessions = self.metrics.sessions.get(),
                lingering = self.metrics.lingering.get(),
                connections = self.metrics.connections.get(),
                "out of time (drain.timeout): what is left is cut"
            );
            self.abort.cancel();
            self.workers.recv().await;
        }
        info!(took_ms = millis(begun.elapsed()), sessions, "drained");
    }

    /// Resolves when no worker is left, which before a drain means that they failed.
    pub async fn failed(&mut self) {
        self.workers.recv().await;
    }
}

/// Serves until SIGTERM or SIGINT, then drains. The calling thread serves the admin listener.
pub fn run(settings: &Settings, started: impl FnOnce(&Server)) -> anyhow::Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut signals = Signals::new()?;
        let mut server = Server::start(settings)?;
        info!(address = %server.address, workers = settings.listen.workers, backend = %settings.upstream.address, "listening");
        if let Some(address) = server.admin {
            info!(%address, "admin listening");
        }
        started(&server);
        tokio::select! {
            () = signals.next() => {}
            () = server.failed() => anyhow::bail!("the workers ended by themselves"),
        }
        server.drain(&mut signals).await;
        Ok(())
    })
}

/// SIGTERM and SIGINT, which mean the same.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => info!("SIGTERM"),
            _ = self.interrupt.recv() => info!("SIGINT"),
        }
    }
}

/// One thread: its accept loop until the drain, then its sessions until the last.
async fn worker(listener: StdListener, context: Context) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "a worker cannot use its listener");
            return;
        }
    };
    let context = Arc::new(context);
    let accept = |stream, peer| context.accept(stream, peer);
    listen::accept_loop(listener, context.drain.begun(), &context.metrics, accept).await;
    context.tracker.close();
    context.tracker.wait().await;
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn admin_listener(address: SocketAddr) -> io::Result<StdListener> {
    let listener = StdListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// A session takes two descriptors, and the soft limit is often 1,024.
fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            warn!(%error, "cannot raise the limit of open files to its maximum");
        }
    }
}
