//! Assembly: workers, their listeners, the admin listener, signals. The way to the process's end is in [`crate::drain`]; here
//! it is gone.

use std::{
    future, io,
    net::{SocketAddr, TcpListener as StdListener},
    os::fd::AsFd as _,
    process,
    sync::{Arc, Weak},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::{
    net::TcpListener,
    runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::{Semaphore, mpsc, watch},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use crate::{
    admin::{self, Order},
    admission::{self, Admission, Memory},
    budget::{self, Budget, Host, NoRoom},
    close::{self, Keeps, Linger},
    config::Settings,
    drain::{Act, Drain, Phase, Phases, Status},
    gate::Gate,
    hub::Hubs,
    listen::{self, Accepted, Balancer, Door},
    metrics::{Counted, Metrics},
    net::{self, Inherited, Listener, Origin, Wish},
    notify::{self, Manager, Pulse, Word},
    relay,
    reload::{self, Parts, Reload},
    restart::{self, Predecessor, Restarts, Successor},
    session::{Context, Current},
    side::Side,
    system::{self, MemoryWatch, System},
    upstream::{Home, Upstreams},
};

/// While sessions end: how often it is looked whether somebody is still served.
const LOOK: Duration = Duration::from_millis(20);

/// For the last answers of the admin listener.
const FAREWELL: Duration = Duration::from_millis(50);

/// What runs.
#[derive(Debug)]
pub struct Server {
    /// Where clients connect; the port is real also when 0 was configured.
    pub address: SocketAddr,
    /// Where the admin listener is.
    pub admin: Option<SocketAddr>,
    /// Threads that serve: as many as were asked for, or as descriptors allow.
    pub workers: usize,
    drain: Drain,
    /// When the drain began, and with how many sessions.
    drained: (Instant, i64),
    /// What is asked for at the admin listener.
    orders: mpsc::Receiver<Order>,
    metrics: Arc<Metrics>,
    /// Ends what is left without waiting any longer.
    abort: CancellationToken,
    /// Closed when no queue has a client any more.
    accepting: mpsc::Receiver<()>,
    /// Closed when the last worker has ended.
    alive: mpsc::Receiver<()>,
    /// What can be changed while it runs.
    reload: Box<Reload>,
    succession: Succession,
    manager: Box<Manager>,
}

/// What this process has from the one before, and leaves to the next.
#[derive(Debug)]
struct Succession {
    /// One for each accept queue; its loop closes it.
    listeners: Vec<Weak<Listener>>,
    /// As long as this process is the one that answers there.
    admin: Option<StdListener>,
    /// Nobody is let in at the admin listener any more.
    admin_closed: CancellationToken,
    /// Whoever only looks on there is let go: then, and at the end of the process.
    farewell: CancellationToken,
    /// Clients are accepted from then on: at once, unless another process does it still.
    go: CancellationToken,
    /// That process.
    predecessor: Option<Predecessor>,
    /// Another process serves in place of this one.
    is_replaced: bool,
}

impl Server {
    /// Binds, and starts the worker threads. To be called inside the runtime that is to serve the admin listener.
    #[expect(clippy::too_many_lines, reason = "an assembly in order")]
    pub fn start(settings: &Settings) -> anyhow::Result<Self> {
        let system = System::default();
        let inherited = system.open_descriptors();
        let descriptors = raise_descriptor_limit();
        net::check_sources(&settings.upstream.source_addresses)?;
        let metrics = Arc::new(Metrics::new());
        let Inherited { clients, admin: admin_passed, predecessor } =
            net::inherit(settings.listen.backlog, &settings.socket).context("the sockets passed by LISTEN_FDS")?;
        let Queues { workers, listeners, sockets, passed, effective } =
            open_listeners(clients, &settings.listen, &settings.socket, descriptors, &system, &metrics)
                .with_context(|| format!("{descriptors} descriptors (RLIMIT_NOFILE)"))?;
        let address = listeners.first().context("there is always one")?.local_addr()?;
        // Bound before the first client is accepted: an address in use must not cost anybody a session.
        let admin_passed = admin_passed.filter(|passed| {
            passed.local_addr().is_ok_and(|at| settings.admin.address.is_some_and(|wanted| is_at(at, wanted)))
        });
        let has_admin = admin_passed.is_some();
        let admin = match (admin_passed, settings.admin.address) {
            (Some(passed), _) => Some(passed),
            (None, Some(wanted)) => Some(admin_listener(wanted).with_context(|| {
                format!("cannot listen on {wanted}: set admin.address (TIDEGATE_ADMIN__ADDRESS) to another, or \"off\"")
            })?),
            (None, None) => None,
        };
        // For the process that comes after this one.
        let admin_kept = admin.as_ref().map(StdListener::try_clone).transpose()?;
        let ports = system.ephemeral_ports();
        let upstreams = Upstreams::new(settings.upstream.clone(), settings.ways(), &settings.socket, &metrics, ports);
        let mut runtimes = Runtimes(Vec::new());
        for _ in 0..workers {
            let runtime = runtime::Builder::new_current_thread().enable_all().build();
            runtimes.0.push(runtime.with_context(|| {
                format!("a worker of {workers} cannot begin with {descriptors} descriptors (RLIMIT_NOFILE): raise the limit (ulimit -Hn)")
            })?);
        }
        let bounds = Arc::new(close::Bounds::new(settings.close.max_lingering));
        let lingers: Vec<_> = (0..workers).map(|_| Linger::new(&bounds, Some(Arc::clone(&metrics)))).collect();
        let admin_linger = Linger::new(&bounds, None);
        let mut memory = memory_watch(&settings.limits, &system)?;
        let host = Host {
            descriptors,
            // Whatever is open by now stays open.
            open: system.open_descriptors().unwrap_or(64),
            memory: memory.as_mut().and_then(MemoryLimit::now).map(|(limit, used)| {
                // What the process before this one has is free again when it has drained.
                let parent = predecessor.as_ref().and_then(|_| system.parent_memory());
                (limit, used - parent.map_or(0, |parent| parent.resident.min(used)))
            }),
            workers,
            ports: upstreams.ports(),
            idle: upstreams.idle(),
            has_tls: settings.downstream.tls.server.is_some(),
        };
        let budget = match Budget::new(&host, settings.limits.max_connections) {
            Err(error @ NoRoom::Memory { limit, .. }) if settings.limits.memory == Memory::Auto => {
                // It may be others that use it at the moment: an end now would only be the first of many.
                warn!(%error, "clients are turned away as long as memory is short");
                Budget::new(&Host { memory: Some((limit, 0)), ..host }, settings.limits.max_connections)?
            }
            budget => budget?,
        };
        say(&budget, &host, settings);
        judge_backlog(settings.listen.backlog, effective, budget.capacity.connections, system.somaxconn());
        if let Some((limit, used)) = host.memory {
            metrics.saw_memory(limit, used);
        }
        metrics.max_connections.set(i64::try_from(budget.capacity.connections).unwrap_or(i64::MAX));
        upstreams.allow_idle(budget.idle);
        let admission = Admission::new(budget.capacity, &settings.limits);

        for linger in &lingers {
            linger.make_room_for(&admission);
        }

        let drain = Drain::new(settings.drain.clone());
        let abort = CancellationToken::new();
        let slots = |count| Arc::new(Semaphore::new(count));
        let (handshakes, requests) = (slots(settings.upstream.max_waiting), slots(settings.upstream.max_waiting));
        let orphans = slots(settings.upstream.max_pending.min(budget.spare / 4));
        let leftovers = slots(budget.spare / 4);
        let has_doubted = Arc::default();
        let waiters = Arc::default();
        let (alive, all_ended) = mpsc::channel(1);
        let (accepts, accepting) = mpsc::channel(1);
        let (inboxes, accepted): (Vec<_>, Vec<_>) = runtimes.0.iter().map(|_| mpsc::unbounded_channel()).unzip();
        let handles = runtimes.0.iter().map(|runtime| runtime.handle().clone());
        let balancer = Balancer::new(handles.zip(inboxes), &waiters, settings.listen.hand_off);
        let go = CancellationToken::new();
        let own = listeners.iter().take(sockets).map(Arc::downgrade).collect();
        let mut queues: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
        let bound = listeners.iter().map(Arc::downgrade).collect();
        let mut contexts = Vec::new();
        for (index, listener) in listeners.into_iter().enumerate() {
            queues[index % workers].push(listener);
        }
        let mut pulse = Pulse::default();
        let homes: Arc<[Home]> = runtimes
            .0
            .iter()
            .zip(&lingers)
            .enumerate()
            .map(|(worker, (runtime, linger))| {
                let (last, patience) = (linger.clone(), settings.close.patience);
                let end = Arc::new(move |stream| last.add(Side::Backend, stream, false, &patience, Keeps::Nothing));
                let (runtime, tracker, drain) = (runtime.handle().clone(), TaskTracker::new(), drain.clone());
                Home { worker, workers, runtime, tracker, drain, end }
            })
            .collect();
        let hubs = Hubs::new(&upstreams, settings.sharing(), &homes, &settings.relay, &metrics, &admission);
        let each = runtimes.take().into_iter().zip(accepted).zip(queues).zip(lingers);
        for (index, (((runtime, accepted), listeners), linger)) in each.enumerate() {
            let home = homes[index].clone();
            let tracker = home.tracker.clone();
            let (config, delays) = (settings.relay.clone(), admission.delays());
            let relay = relay::Shared::new(config, metrics.traffic(), drain.clone(), delays);
            let context = Arc::new(Context {
                current: Current::default(),
                downstream: settings.downstream.clone(),
                relay: Arc::new(relay),
                log_sample: settings.log.sample,
                close: settings.close.patience,
                linger,
                upstreams: upstreams.clone(),
                home,
                hubs: hubs.clone(),
                metrics: Arc::clone(&metrics),
                roster: Arc::default(),
                tracker,
                gate: Gate::new(&waiters),
                pending: balancer.pending(index),
                admission: admission.clone(),
                handshakes: Arc::clone(&handshakes),
                requests: Arc::clone(&requests),
                orphans: Arc::clone(&orphans),
                leftovers: Arc::clone(&leftovers),
                has_doubted: Arc::clone(&has_doubted),
            });
            contexts.push(Arc::clone(&context));
            let (balancer, go) = (balancer.clone(), go.clone());
            let accepts = accepts.clone();
            let worker = Worker { index, context, balancer, listeners, go, accepted, accepts };
            let (abort, alive, heart) = (abort.clone(), alive.clone(), pulse.heart());
            let pipes = budget.pipes;
            thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
                net::limit_pipes(pipes);
                runtime.block_on(async {
                    tokio::select! {
                        () = worker.run() => {}
                        () = abort.cancelled() => {}
                        () = heart.run() => {}
                    }
                });
                // Not waiting for a name that is still being looked up.
                runtime.shutdown_background();
                drop(alive);
            })?;
        }
        // What is on the main thread's runtime outlives the drain, and goes with it.
        let tracker = TaskTracker::new();
        if let Some(mut memory) = memory {
            let seen = Arc::clone(&metrics);
            tracker.spawn(async move {
                loop {
                    sleep(MEMORY_LOOK).await;
                    if let Some((limit, used)) = memory.now() {
                        admission.observe_memory(used, limit);
                        seen.saw_memory(limit, used);
                    }
                }
            });
        }
        if let Some(context) = contexts.first() {
            tracker.spawn(watch_certificates(Arc::clone(context)));
        }
        let (control, orders) = admin::Control::new(drain.clone());
        let for_admin = watch::Sender::new(admin::Parts {
            upstreams,
            hubs,
            close: settings.close.patience,
            settings: Arc::new(settings.clone()),
            address,
            inherited,
        });
        let admin_closed = CancellationToken::new();
        let farewell = admin_closed.child_token();
        let admin = match admin {
            Some(listener) => {
                let address = listener.local_addr()?;
                let admin = admin::Admin::new(
                    Arc::clone(&metrics),
                    for_admin.subscribe(),
                    contexts.iter().map(|context| Arc::clone(&context.roster)).collect(),
                    control,
                    admin_linger.clone(),
                    tracker.clone(),
                );
                tracker.spawn(admin_linger.run());
                let (listener, go) = (TcpListener::from_std(listener)?, go.clone());
                let (closed, farewell) = (admin_closed.clone(), farewell.clone());
                tracker.spawn(async move {
                    go.cancelled().await;
                    admin.serve(listener, closed, farewell).await;
                });
                Some(address)
            }
            None => None,
        };
        let most_orphans = budget.spare / 4;
        let in_use =
            Parts { contexts, homes, listeners: bound, bounds, admin: for_admin, ports, most_orphans, tracker };
        let reload = Box::new(Reload::new(settings.clone(), in_use));
        let drained = (Instant::now(), 0);
        // Now that nothing can fail any more.
        let tell = |stream| Predecessor::tell_ready(stream, passed > 0, has_admin);
        let predecessor = predecessor.map(tell).transpose().context("the process that is to be succeeded is gone")?;
        if predecessor.is_none() {
            go.cancel();
        }
        let succession = Succession {
            listeners: own,
            admin: admin_kept,
            admin_closed,
            farewell,
            go,
            predecessor,
            is_replaced: false,
        };
        Ok(Self {
            address,
            admin,
            workers,
            drain,
            drained,
            orders,
            metrics,
            abort,
            accepting,
            alive: all_ended,
            reload,
            succession,
            manager: Box::new(Manager::new(pulse)),
        })
    }

    /// Serves until a signal, or whoever asked for it, has drained it and a signal has ended it.
    ///
    /// # Errors
    ///
    /// The workers ended by themselves.
    #[expect(clippy::too_many_lines, reason = "the one loop that sees everything that happens")]
    pub async fn run(mut self, signals: &mut Signals, restarts: &mut Restarts) -> anyhow::Result<()> {
        let mut phases = Phases::new(&self.drain.config(), ending(self.reload.settings()), Instant::now());
        let mut has_ended = false;
        if self.succession.predecessor.is_none() {
            notify::notify(Word::Ready(process::id()));
        }
        loop {
            while let Some(act) = phases.next(Instant::now()) {
                match act {
                    Act::Begin => {
                        self.drain.begin();
                        info!(sessions = self.metrics.sessions.get(), "listeners close, sessions end");
                    }
                    Act::Hurry => {
                        info!("second signal: ending everything now");
                        self.drain.hurry();
                    }
                    Act::Cut => {
                        warn!(
                            sessions = self.metrics.sessions.get(),
                            lingering = self.metrics.lingering.get(),
                            connections = self.metrics.connections.get(),
                            "out of time (drain.timeout): what is left is cut"
                        );
                        self.abort.cancel();
                    }
                    Act::Exit => {
                        self.tell(phases.status());
                        self.succession.farewell.cancel();
                        // Those who wait for this are told.
                        sleep(FAREWELL).await;
                        return Ok(());
                    }
                }
            }
            self.tell(phases.status());
            let (wake, is_open) = (phases.wake(), phases.status().phase == Phase::Window);
            let is_believed = !self.succession.is_replaced && self.succession.predecessor.is_none();
            if is_believed {
                let (phase, metrics, address) = (phases.status().phase, &self.metrics, self.address);
                self.manager.tell(Instant::now(), phase, || doing(phase, metrics, address));
            }
            if phases.status().phase != Phase::Running {
                restarts.give_up();
            }
            tokio::select! {
                () = signals.next() => {
                    if !self.succession.is_replaced {
                        self.manager.stopping();
                    }
                    phases.signal(Instant::now());
                    // The delay may be none, and its beginning is the drain's.
                    self.tell(phases.status());
                }
                event = restarts.next() => match event {
                    restart::Event::Asked => match (phases.status().phase, &self.succession.predecessor) {
                        (Phase::Running, None) if self.reload.is_read_once() => {
                            let fix = "name a regular file by --config";
                            warn!(fix, "SIGUSR2: the configuration came from a pipe, which a new process would find empty; nothing is done");
                        }
                        (Phase::Running, None) => self.succession.begin(restarts),
                        (Phase::Running, Some(_)) => warn!("SIGUSR2: a restart is under way already; nothing is done"),
                        (phase, _) => warn!(phase = phase.as_str(), "SIGUSR2: a drain has begun; nothing is done"),
                    },
                    restart::Event::Ready(successor) => {
                        if self.succession.hand_over(successor).await {
                            phases.replaced(Instant::now());
                            self.tell(phases.status());
                        }
                    }
                },
                () = async { match &mut self.succession.predecessor {
                    Some(predecessor) => predecessor.lets_go().await,
                    None => future::pending().await,
                } } => self.succession.take_over(),
                Some(order) = self.orders.recv() => match order {
                    Order::Drain(told) => {
                        phases.drain(Instant::now());
                        self.tell(phases.status());
                        // Whoever asked may have left.
                        let _ = told.send(());
                    }
                    Order::Undo(told) => {
                        let is_undone = phases.undo(Instant::now());
                        // What was reloaded meanwhile.
                        phases.reconfigure(&self.drain.config(), ending(self.reload.settings()));
                        self.tell(phases.status());
                        let _ = told.send(is_undone);
                    }
                    Order::Filter(filter, told) => _ = told.send(self.reload.set_filter(&filter)),
                    Order::Reload(told) => self.reload.ask(told, phases.status().phase >= Phase::Window),
                },
                event = self.reload.next() => {
                    if self.reload.go_on(event, phases.status().phase >= Phase::Window) {
                        phases.reconfigure(&self.drain.config(), ending(self.reload.settings()));
                    }
                }
                _ = self.alive.recv(), if !has_ended => {
                    anyhow::ensure!(phases.status().phase >= Phase::Window, "the workers ended by themselves");
                    has_ended = true;
                    phases.all_ended(Instant::now());
                }
                () = self.manager.due(), if is_believed => {}
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
                () = sleep(LOOK), if is_open && self.is_anybody_served() => {}
                () = future::ready(()), if is_open && !self.is_anybody_served() => {
                    phases.nobody_is_served(Instant::now());
                }
            }
        }
    }

    /// Also who is still in an accept queue.
    fn is_anybody_served(&self) -> bool {
        !self.accepting.is_closed() || self.metrics.connections.get() > 0
    }

    /// Tells everybody where the process is on its way.
    fn tell(&mut self, status: Status) {
        let was = *self.drain.status().borrow();
        if was == status {
            return;
        }
        self.metrics.drain_state.set(status.phase as i64);
        self.drain.publish(status);
        if was.phase == status.phase {
            return;
        }
        let config = self.drain.config();
        match status.phase {
            Phase::Running => info!("the drain is undone"),
            Phase::Delay => {
                let sessions = self.metrics.sessions.get();
                self.drained = (status.since, sessions);
                // None for a process that was replaced.
                let delay = status.until.map_or(config.delay, |until| until - status.since);
                let total = delay + config.window + config.timeout;
                info!(
                    delay_ms = millis(delay),
                    window_ms = millis(config.window),
                    latest_exit_ms = millis(total),
                    sessions,
                    hint = "a signal ends the process when it is drained, a second one at once",
                    "draining"
                );
            }
            Phase::Window => {}
            Phase::Lingering => info!(lingering = self.metrics.lingering.get(), "all sessions have ended"),
            Phase::Drained => {
                let (begun, sessions) = self.drained;
                info!(took_ms = millis(status.since - begun), sessions, "drained");
            }
        }
    }
}

impl Succession {
    /// Starts a successor.
    fn begin(&self, restarts: &mut Restarts) {
        let listeners: Vec<_> = self.listeners.iter().filter_map(Weak::upgrade).collect();
        let clients =
            listeners.iter().map(|listener| Ok((listener.as_fd().try_clone_to_owned()?, listener.origin().name())));
        let admin = self.admin.iter().map(|admin| Ok((admin.as_fd().try_clone_to_owned()?, net::ADMIN_NAME)));
        match clients.chain(admin).collect::<io::Result<restart::Passed>>() {
            Ok(passed) => restarts.begin(passed),
            Err(error) => warn!(%error, "no restart: the listening sockets cannot be passed on; this process goes on"),
        }
    }

    /// Leaves everything to it; false: it is gone, and nothing has changed.
    async fn hand_over(&mut self, successor: Successor) -> bool {
        let Successor { has_clients, has_admin, .. } = successor;
        let pid = successor.pid();
        // A service manager believes the process that it knows: so this one has to say it, and before the other speaks.
        notify::notify(Word::Ready(pid));
        if let Err(error) = successor.go().await {
            notify::notify(Word::Ready(process::id()));
            warn!(%error, pid, "no restart: the new process is gone; this process goes on");
            return false;
        }
        info!(pid, has_clients, has_admin, "the new process takes over");
        self.is_replaced = true;
        if has_clients {
            self.listeners.iter().filter_map(Weak::upgrade).for_each(|listener| listener.hand_on());
        }
        // With another address of the admin listener this process keeps its own, to the end.
        self.admin = None;
        if has_admin {
            self.admin_closed.cancel();
        }
        true
    }

    /// From now on this process is the one that serves.
    fn take_over(&mut self) {
        self.predecessor = None;
        self.listeners.iter().filter_map(Weak::upgrade).for_each(|listener| listener.take_over());
        self.go.cancel();
        info!(pid = process::id(), "this process has taken over");
        notify::notify(Word::Ready(process::id()));
    }
}

/// For people who ask the service manager.
fn doing(phase: Phase, metrics: &Metrics, address: SocketAddr) -> String {
    let sessions = metrics.sessions.get();
    match phase {
        Phase::Running => format!("serving on {address}, sessions: {sessions}"),
        Phase::Delay => format!("draining, still accepting on {address}, sessions: {sessions}"),
        Phase::Window => format!("draining, sessions left: {sessions}"),
        Phase::Lingering => format!("draining, sockets in their last wait: {}", metrics.lingering.get()),
        Phase::Drained => "drained".to_owned(),
    }
}

/// The longest that a session takes to end once it was told, with peers that answer nothing.
fn ending(settings: &Settings) -> Duration {
    settings.relay.close_delay
        + settings.relay.close_handshake_timeout * 3
        + settings.close.patience.linger_max
        + Duration::from_secs(1)
}

/// Serves until SIGTERM or SIGINT, then drains. The calling thread serves the admin listener. Without a source to read again
/// there are no reloads.
pub fn run(
    settings: &Settings,
    source: Option<reload::Source>,
    log: Arc<dyn reload::Log>,
    started: impl FnOnce(&Server),
) -> anyhow::Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        let mut signals = Signals::new()?;
        let mut restarts = Restarts::new()?;
        let reader = source.map(|source| reload::Reader::start(source, settings)).transpose()?;
        let mut server = Server::start(settings)?;
        {
            let log = Arc::clone(&log);
            server.reload.metrics().log_drops(move || log.dropped());
        }
        server.reload.logs_to(log);
        if let Some(reader) = reader {
            server.reload.read_by(reader);
        }
        let (backend, routes) = (&settings.upstream.address, settings.routes.len());
        info!(address = %server.address, workers = server.workers, %backend, routes, "listening");
        if let Some(address) = server.admin {
            info!(%address, "admin listening");
        }
        started(&server);
        server.run(&mut signals, &mut restarts).await
    });
    // Not waiting for a name that is still being looked up.
    runtime.shutdown_background();
    result
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

/// One thread: its accept loops until the drain, then its sessions until the last.
struct Worker {
    index: usize,
    context: Arc<Context>,
    balancer: Balancer,
    listeners: Vec<Arc<Listener>>,
    /// Its accept loops begin.
    go: CancellationToken,
    /// Those that other workers have accepted for it.
    accepted: mpsc::UnboundedReceiver<Accepted>,
    /// Dropped when it has begun with the last of them.
    accepts: mpsc::Sender<()>,
}

impl Worker {
    async fn run(self) {
        let Self { index, context, balancer, listeners, go, mut accepted, accepts } = self;
        let door = Door { admission: context.admission.clone(), metrics: Arc::clone(&context.metrics) };
        // Each loop is a task of its own: a queue that is full of clients keeps none of the others waiting.
        let loops = TaskTracker::new();
        let lingering = TaskTracker::new();
        lingering.spawn(context.linger.clone().run());
        context.tracker.spawn(Arc::clone(&context).take_on(balancer.counter(index)));
        {
            let (context, go) = (Arc::clone(&context), go.clone());
            loops.spawn(async move {
                tokio::select! {
                    biased;
                    () = go.cancelled() => {}
                    () = context.relay.drain.begun() => return,
                }
                let context = context.latest();
                context.upstreams.prewarm(&context.home);
            });
        }
        for listener in listeners {
            let (context, balancer, door, go) = (Arc::clone(&context), balancer.clone(), door.clone(), go.clone());
            loops.spawn(async move {
                tokio::select! {
                    biased;
                    () = go.cancelled() => {}
                    // Somebody else accepts, and goes on with it.
                    () = context.relay.drain.begun() => return,
                }
                let serve = |stream, peer, place| {
                    context.relay.traffic.accept();
                    match balancer.place(index, stream, peer, place, Counted::new(&context.metrics.connections)) {
                        Some(accepted) => context.latest().accept(accepted),
                        None => context.relay.traffic.hand_off(),
                    }
                };
                if let Err(error) = listen::accept_loop(listener, context.relay.drain.begun(), &door, serve).await {
                    tracing::error!(%error, "a worker cannot use a listener");
                }
            });
        }
        loops.close();
        let accepting = loops.wait();
        tokio::pin!(accepting);
        loop {
            tokio::select! {
                Some(accepted) = accepted.recv() => context.latest().accept(accepted),
                () = &mut accepting => break,
            }
        }
        // The loops of other workers may still have a client for this one: theirs end at the same time.
        drop(balancer);
        while let Some(accepted) = accepted.recv().await {
            context.latest().accept(accepted);
        }
        drop(accepts);
        context.tracker.close();
        context.tracker.wait().await;
        // Whoever could add to them has ended.
        context.linger.close();
        lingering.close();
        lingering.wait().await;
    }
}

/// The workers' runtimes until their threads have them. One must not just be dropped where another is running, and an error
/// at the start does that.
struct Runtimes(Vec<runtime::Runtime>);

impl Runtimes {
    fn take(&mut self) -> Vec<runtime::Runtime> {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Runtimes {
    fn drop(&mut self) {
        for runtime in self.take() {
            runtime.shutdown_background();
        }
    }
}

/// How often the use of memory is looked at, where it is limited.
const MEMORY_LOOK: Duration = Duration::from_millis(100);

/// How often the dates of certificates are looked at, and how often what was found is said again.
const CERTIFICATE_LOOK: (Duration, Duration) = (Duration::from_mins(1), Duration::from_hours(6));

/// Counts certificates for clients that have expired or soon will, and says so: also where nobody reloads, since nobody renews.
async fn watch_certificates(context: Arc<Context>) {
    let mut said = Vec::new();
    let mut said_at = None;
    loop {
        let now = context.latest();
        let tls = &now.downstream.tls;
        let doubts = tls.server.as_ref().map(net::TlsServer::doubts).unwrap_or_default();
        now.metrics.doubtful_certificates.set(i64::try_from(doubts.len()).unwrap_or(i64::MAX));
        if doubts != said || said_at.is_some_and(|at: Instant| at.elapsed() >= CERTIFICATE_LOOK.1) {
            for (index, doubt) in &doubts {
                let fix = "renew it: a new file is taken up by itself (reload.watch), or with `tidegate reload`";
                let file = &tls.certificates[*index];
                warn!(file, fix, "a certificate for clients {doubt}");
            }
            (said, said_at) = (doubts, Some(Instant::now()));
        }
        // Or what a reload replaces would be kept until the next look.
        drop(now);
        sleep(CERTIFICATE_LOOK.0).await;
    }
}

/// What is used of the memory that may be.
struct MemoryLimit {
    /// The user's, in bytes, for what this process has in memory.
    own: Option<u64>,
    /// The host's: it may be lower than what the user thinks.
    host: MemoryWatch,
    system: System,
}

impl MemoryLimit {
    /// The limit, and what is used: of the one that has less room.
    fn now(&mut self) -> Option<(u64, u64)> {
        let own = self.own.and_then(|limit| Some((limit, self.system.process_memory()?.resident)));
        let host = self.host.now().map(|memory| (memory.limit, memory.used));
        own.into_iter().chain(host).min_by_key(|(limit, used)| limit.saturating_sub(*used))
    }
}

fn memory_watch(limits: &admission::Config, system: &System) -> io::Result<Option<MemoryLimit>> {
    let own = match limits.memory {
        Memory::Off => return Ok(None),
        Memory::Limit(bytes) => Some(bytes),
        Memory::Auto => None,
    };
    let mut limit = MemoryLimit { own, host: MemoryWatch::new(system.clone())?, system: system.clone() };
    Ok(limit.now().is_some().then_some(limit))
}

/// The accept queues, and who they are for.
struct Queues {
    /// Fewer than were asked for when there are not enough descriptors.
    workers: usize,
    /// In turn for each worker, one at least.
    listeners: Vec<Arc<Listener>>,
    /// The first so many have a queue each, the others share these.
    sockets: usize,
    /// Of them were passed.
    passed: usize,
    /// Connections that may wait in all of them.
    effective: u64,
}

/// Those that were passed to this process, else new ones.
fn open_listeners(
    mut listeners: Vec<Listener>,
    listen: &listen::Config,
    socket: &net::SocketConfig,
    descriptors: u64,
    system: &System,
    metrics: &Metrics,
) -> anyhow::Result<Queues> {
    let most = budget::most_queues(descriptors, listen.max_sockets);
    let workers = listen.workers.min(most);
    if workers < listen.workers {
        warn!(
            workers,
            wanted = listen.workers,
            descriptors,
            max_sockets = listen.max_sockets,
            "fewer workers: each has an accept queue, and these may be listen.max_sockets and an eighth of the descriptors"
        );
    }
    // With another address since the process before this one, that one closes its sockets when it drains. What a service
    // manager passed is where it wants us.
    listeners.retain(|listener| {
        listener.origin() == Origin::Theirs || listener.local_addr().is_ok_and(|at| is_at(at, listen.address))
    });
    let passed = listeners.len();
    if passed == 0 {
        let queues = listen.accept_loops.clamp(workers, most);
        let wish = Wish { backlog: listen.backlog, queues, most };
        listeners = net::listen(listen.address, wish, socket).with_context(|| {
            format!("cannot listen on {}: set listen.address (--listen) to another", listen.address)
        })?;
    }
    let sockets = listeners.len();
    let queues = listeners.iter().map(Listener::queue).collect::<io::Result<Vec<_>>>()?;
    let effective: u64 = queues.iter().map(|queue| u64::from(queue.limit)).sum();
    let (wanted, somaxconn) = (listen.backlog, system.somaxconn());
    info!(wanted, somaxconn, sockets, effective, passed, "accept queues");
    for (gauge, value) in metrics.backlog.iter().zip([u64::from(wanted), somaxconn.unwrap_or(0), effective]) {
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    }
    let mut listeners: Vec<Arc<Listener>> = listeners.into_iter().map(Arc::new).collect();
    look_at_queues(metrics, &listeners);
    // A socket that was passed is shared by workers that would have none.
    for index in sockets..workers {
        listeners.push(Arc::new(listeners[index % sockets].share()?));
    }
    Ok(Queues { workers, listeners, sockets, passed, effective })
}

/// What may wait is compared with what was wanted, and with what could be served at all.
fn judge_backlog(wanted: u32, effective: u64, connections: usize, somaxconn: Option<u64>) {
    if effective >= u64::from(wanted) {
        return;
    }
    let fix = "raise net.core.somaxconn, listen.max_sockets or RLIMIT_NOFILE; `tidegate doctor` says which";
    let message = "fewer can wait to be accepted than listen.backlog asks for";
    if effective < u64::try_from(connections).unwrap_or(u64::MAX) {
        warn!(wanted, effective, somaxconn, fix, "{message}");
    } else {
        info!(wanted, effective, somaxconn, "{message}, but as many as can be served");
    }
}

/// For metrics; a listener is closed all the same when its loop lets go of it.
fn look_at_queues(metrics: &Metrics, listeners: &[Arc<Listener>]) {
    let listeners: Vec<Weak<Listener>> = listeners.iter().map(Arc::downgrade).collect();
    metrics.look_at_queues(move || {
        let queues = listeners.iter().filter_map(|listener| listener.upgrade()?.queue().ok());
        queues.collect()
    });
}

fn say(budget: &Budget, host: &Host, settings: &Settings) {
    let Host { descriptors, open, memory, ports, .. } = host;
    let Budget { capacity, limited_by, .. } = budget;
    let mib = |bytes: u64| bytes >> 20;
    info!(
        max_connections = capacity.connections,
        %limited_by,
        descriptors,
        descriptors_open = open,
        turned_away_at_once = capacity.turned_away,
        memory_limit_mib = memory.map(|(limit, _)| mib(limit)),
        memory_used_mib = memory.map(|(_, used)| mib(used)),
        upstream_ports = ports,
        "budget"
    );
    if let Some(wanted) = settings.limits.max_connections.filter(|wanted| *wanted > capacity.connections) {
        let fix = capacity.full.fix();
        warn!(wanted, max_connections = capacity.connections, %limited_by, fix, "limits.max_connections is more than there is room for");
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Whether what was bound for one process is what another one wants: any port will do where none is named.
fn is_at(bound: SocketAddr, wanted: SocketAddr) -> bool {
    bound.ip() == wanted.ip() && (wanted.port() == 0 || bound.port() == wanted.port())
}

fn admin_listener(address: SocketAddr) -> io::Result<StdListener> {
    let listener = StdListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// A session takes two descriptors, and the soft limit is often 1,024. Gives the limit in force.
fn raise_descriptor_limit() -> u64 {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            warn!(%error, "cannot raise the limit of open files to its maximum");
        }
    }
    system::descriptor_limit().soft.unwrap_or(u64::MAX)
}
