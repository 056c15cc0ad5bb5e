//! What a test sees: a lab, a backend with a script, tidegate between it and the clients, and a report when it fails.
//!
//! ```ignore
//! let t = Scene::new("close.delay = '0ms'").backend(backend::echo).start();
//! let seen = t.client(async |c| {
//!     c.handshake("/").await;
//!     c.send_close(1000, "").await;
//!     c.until_end().await
//! });
//! seen.assert_closed_with(1000);
//! t.connection(0).seen().assert_closed_with(1000);
//! t.no_rst();
//! ```

use super::{
    Board, DEADLINE, LIMIT, Lab, Side,
    backend::{self, Backend, Connection, Options},
    block,
    front::{Front, Manners},
    lab::{Counters, Place, Running},
    peer::{Peer, Role},
    proxy::Proxy,
    report,
    streams::Streams,
    tls::{self, Authority, CLIENTS_NAME, TlsFront},
    transcript::{End, Transcript},
    wire::Wire,
};
use futures_util::future::join_all;
use socket2::SockRef;
use std::{
    cell::Cell,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime},
};
use tokio::{
    io::{AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpSocket, TcpStream},
    task::{JoinSet, LocalSet},
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, pki_types::ServerName},
};

/// How clients connect.
#[derive(Clone, Copy, Debug, Default)]
pub struct Dial {
    /// `SO_RCVBUF`, set before connecting: a small one makes for a window that is soon zero.
    pub recv_buffer: Option<usize>,
    /// None: where the scene's clients connect.
    pub to: Option<SocketAddr>,
    /// Without TLS, also where clients speak it.
    pub is_plain: bool,
    /// What is sent first, before TLS.
    pub before: &'static [u8],
    /// The name to ask for by TLS; None: [`CLIENTS_NAME`].
    pub name: Option<&'static str>,
}

std::thread_local! {
    static MULTIPLEXED: Cell<bool> = const { Cell::new(false) };
    static ENCRYPTED: Cell<bool> = const { Cell::new(false) };
    static SECURE: Cell<bool> = const { Cell::new(false) };
    static STREAMS: Cell<bool> = const { Cell::new(false) };
}

/// Runs a test whose scenes have their backend's connections on streams of HTTP/2.
pub fn multiplexed(test: impl FnOnce()) {
    MULTIPLEXED.set(true);
    test();
    MULTIPLEXED.set(false);
}

/// What a backend of this test has sent goes on in its own time: on a stream, or through what speaks TLS for it.
pub fn backend_has_a_front() -> bool {
    MULTIPLEXED.get() || ENCRYPTED.get()
}

/// Runs a test whose scenes have TLS in front of their backends.
pub fn encrypted(test: impl FnOnce()) {
    ENCRYPTED.set(true);
    test();
    ENCRYPTED.set(false);
}

/// Runs a test whose scenes have clients that speak TLS.
pub fn secure(test: impl FnOnce()) {
    SECURE.set(true);
    test();
    SECURE.set(false);
}

/// Runs a test whose scenes have their clients on streams of an HTTP/2 connection.
pub fn streams(test: impl FnOnce()) {
    STREAMS.set(true);
    test();
    STREAMS.set(false);
}

/// So that connections end with the last of their sessions, which is when a test looks.
const SHARED: &str = "pool = { mode = 'multiplexed', idle_timeout = '0s' }";

/// Runs a test whose scenes have their clients on streams of an HTTP/2 connection over TLS.
pub fn secure_streams(test: impl FnOnce()) {
    secure(|| streams(test));
}

type StartBackend = dyn FnOnce(&Lab, Options) -> Backend;

/// A scene that has not begun yet.
pub struct SceneBuilder {
    settings: String,
    middle: Kind,
    options: Options,
    manners: Option<Manners>,
    tls: Option<tls::Manners>,
    clients: Option<Authority>,
    has_streams: bool,
    start_backend: Box<StartBackend>,
}

#[derive(Clone, Copy)]
enum Kind {
    Tidegate,
    Direct,
    Copy,
}

impl std::fmt::Debug for SceneBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SceneBuilder").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl SceneBuilder {
    fn new(settings: &str, middle: Kind) -> Self {
        let seed = std::env::var("TIDEGATE_SEED").ok().and_then(|seed| seed.parse().ok());
        let options = Options { seed: seed.unwrap_or_else(by_clock), ..Options::default() };
        Self {
            settings: settings.to_owned(),
            middle,
            options,
            manners: MULTIPLEXED.get().then(Manners::default),
            tls: ENCRYPTED.get().then(tls::Manners::default),
            clients: SECURE.get().then(Authority::new),
            has_streams: STREAMS.get(),
            start_backend: Box::new(|lab, options| Backend::start(lab, options, backend::echo)),
        }
    }

    /// The script of the backend's connections. Without it: [`backend::echo`].
    #[must_use]
    pub fn backend<F>(mut self, script: F) -> Self
    where
        F: AsyncFn(&mut Peer) + Send + Sync + 'static,
    {
        self.start_backend = Box::new(|lab, options| Backend::start(lab, options, script));
        self
    }

    /// `SO_RCVBUF` of the backend's connections.
    #[must_use]
    pub fn backend_recv_buffer(mut self, bytes: usize) -> Self {
        self.options.recv_buffer = Some(bytes);
        self
    }

    /// The backlog of the backend's listener.
    #[must_use]
    pub fn backend_backlog(mut self, backlog: i32) -> Self {
        self.options.backlog = backlog;
        self
    }

    /// The backend's connections are streams of HTTP/2 connections to a [`Front`].
    #[must_use]
    pub fn front(mut self, manners: Manners) -> Self {
        self.manners = Some(manners);
        self
    }

    /// The backend's connections come by a [`TlsFront`].
    #[must_use]
    pub fn tls(mut self, manners: tls::Manners) -> Self {
        self.tls = Some(manners);
        self
    }

    /// Clients speak TLS, and believe `authority`. Without other settings tidegate has a certificate of its for [`CLIENTS_NAME`].
    #[must_use]
    pub fn secure(mut self, authority: Authority) -> Self {
        self.clients = Some(authority);
        self
    }

    /// Clients are on streams of an HTTP/2 connection.
    #[must_use]
    pub fn streams(mut self) -> Self {
        self.has_streams = true;
        self
    }

    pub fn start(mut self) -> Scene {
        if let Some(authority) = self.clients.as_ref().filter(|_| !self.settings.contains("tls_certificate")) {
            self.settings = format!("{}{}", tls::for_clients(&authority.sign(CLIENTS_NAME)), self.settings);
        }
        if self.manners.is_some() && !self.settings.contains("pool") {
            self.settings = format!("{SHARED}\n{}", self.settings);
        }
        let lab = Lab::new();
        let started = Instant::now();
        let options = Options { started, ..self.options };
        let baseline = Side::ALL.map(|side| lab.counters(side));
        let backend = (self.start_backend)(&lab, options);
        let front = self.manners.map(|manners| Front::start(&lab, manners, backend.address));
        let address = front.as_ref().map_or(backend.address, |front| front.address);
        let tls = self.tls.map(|manners| TlsFront::start(&lab, manners, address));
        let address = tls.as_ref().map_or(address, |tls| tls.address);
        if let Some(tls) = tls.as_ref().filter(|_| !self.settings.contains("tls_ca")) {
            self.settings = format!("{}{}", tls.settings(), self.settings);
        }
        let middle = match self.middle {
            Kind::Tidegate => Middle::Tidegate(Proxy::start(&lab, &self.settings, address, started)),
            Kind::Direct => Middle::Direct,
            Kind::Copy => Middle::Copy(CopyRelay::start(&lab, address)),
        };
        let (seed, clients) = (options.seed, Mutex::default());
        let secure = self.clients.as_ref().map(Authority::client);
        let authority = self.clients;
        let streams = match &middle {
            Middle::Tidegate(proxy) if self.has_streams => Some(Streams::start(&lab, proxy.address, secure.as_deref())),
            _ => None,
        };
        // Then it is they who speak TLS.
        let secure = secure.filter(|_| streams.is_none());
        Scene { streams, middle, tls, front, backend, secure, authority, seed, started, baseline, clients, lab }
    }
}

/// A seed for this run. Nothing depends on its quality.
fn by_clock() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::from(now.subsec_nanos()) ^ now.as_secs() << 20
}

/// What is between the clients and the backend.
#[derive(Debug)]
enum Middle {
    Tidegate(Proxy),
    /// Nothing: to prove the harness, or to compare.
    Direct,
    /// A relay of bytes that knows nothing.
    Copy(CopyRelay),
}

/// All that belongs to one test. Fields are dropped in their order: the proxy, the backend, and the network last.
#[derive(Debug)]
pub struct Scene {
    streams: Option<Streams>,
    middle: Middle,
    tls: Option<TlsFront>,
    front: Option<Front>,
    backend: Backend,
    /// Of clients that speak TLS.
    secure: Option<Arc<ClientConfig>>,
    /// Whom they believe; its folder is there until all is over.
    authority: Option<Authority>,
    seed: u64,
    started: Instant,
    baseline: [Counters; 3],
    clients: Mutex<Vec<Board<Transcript>>>,
    lab: Lab,
}

impl Scene {
    /// Tidegate with these settings (TOML, over those of `Proxy::start`).
    #[expect(clippy::new_ret_no_self, reason = "a test begins with it, and says the rest in the same breath")]
    pub fn new(settings: &str) -> SceneBuilder {
        SceneBuilder::new(settings, Kind::Tidegate)
    }

    /// Clients connect to the backend itself.
    pub fn direct() -> SceneBuilder {
        SceneBuilder::new("", Kind::Direct)
    }

    /// Clients connect to a relay that copies bytes.
    pub fn copying() -> SceneBuilder {
        SceneBuilder::new("", Kind::Copy)
    }

    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    #[track_caller]
    pub fn proxy(&self) -> &Proxy {
        match &self.middle {
            Middle::Tidegate(proxy) => proxy,
            Middle::Direct | Middle::Copy(_) => panic!("this scene has no tidegate"),
        }
    }

    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    #[track_caller]
    pub fn front(&self) -> &Front {
        self.front.as_ref().expect("a scene with HTTP/2 in front of its backend")
    }

    #[track_caller]
    pub fn tls(&self) -> &TlsFront {
        self.tls.as_ref().expect("a scene with TLS in front of its backend")
    }

    pub fn has_secure_clients(&self) -> bool {
        self.authority.is_some()
    }

    #[track_caller]
    pub fn streams(&self) -> &Streams {
        self.streams.as_ref().expect("a scene with clients on streams")
    }

    /// Whom clients believe that speak TLS.
    #[track_caller]
    pub fn authority(&self) -> &Authority {
        self.authority.as_ref().expect("a scene with clients that speak TLS")
    }

    /// What the backend knows of its nth connection, as soon as it is accepted.
    #[track_caller]
    pub fn connection(&self, index: usize) -> Connection {
        self.backend.connection(index)
    }

    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        if let Some(streams) = &self.streams {
            return streams.address;
        }
        match &self.middle {
            Middle::Tidegate(proxy) => proxy.address,
            Middle::Direct => self.backend.address,
            Middle::Copy(relay) => relay.address,
        }
    }

    /// A connected client that follows `script`; returns what it returns. What it does not end is ended in the orderly way.
    pub fn client<T: Send>(&self, script: impl AsyncFnOnce(&mut Peer) -> T + Send) -> T {
        self.client_with(Dial::default(), script)
    }

    pub fn client_with<T: Send>(&self, dial: Dial, script: impl AsyncFnOnce(&mut Peer) -> T + Send) -> T {
        let entry = self.entry(dial);
        self.lab.place(Side::Client).run(|| block(entry.play(script)))
    }

    /// `count` clients at once, on one thread; their results in the order of their index.
    pub fn clients<T: Send>(&self, count: usize, script: impl AsyncFn(&mut Peer) -> T + Send + Sync) -> Vec<T> {
        let entries: Vec<_> = (0..count).map(|_| self.entry(Dial::default())).collect();
        let script = &script;
        let play = |entry: Entry| entry.play(async move |peer: &mut Peer| script(peer).await);
        let all = move || block(join_all(entries.into_iter().map(play)));
        self.lab.place(Side::Client).run(all)
    }

    /// A client that follows its script while the test goes on.
    pub fn start_client<T: Send + 'static>(
        &self,
        script: impl AsyncFnOnce(&mut Peer) -> T + Send + 'static,
    ) -> Running<T> {
        let entry = self.entry(Dial::default());
        self.lab.spawn_in(Side::Client, async move || entry.play(script).await)
    }

    fn entry(&self, dial: Dial) -> Entry {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let index = clients.len();
        let transcript = Board::new(Transcript::new(format!("client {index}"), self.started));
        clients.push(transcript.clone());
        let to = dial.to.unwrap_or_else(|| self.address());
        let connector = self.secure.clone().filter(|_| !dial.is_plain).map(TlsConnector::from);
        Entry { index, dial, to, connector, transcript, seed: self.seed }
    }

    /// What happened on a side since the scene began.
    pub fn counters(&self, side: Side) -> Counters {
        &self.lab.counters(side) - &self.baseline[side as usize]
    }

    /// Waits until the proxy's namespace holds no socket of any session, also none that the kernel finishes alone.
    #[track_caller]
    pub fn settle(&self) {
        if !self.lab.counts_are_exact() {
            return;
        }
        let begun = Instant::now();
        loop {
            let mut sockets = self.lab.sockets(Side::Proxy);
            sockets.retain(|s| s.state != "LISTEN" && s.state != "TIME_WAIT");
            if sockets.is_empty() {
                return;
            }
            assert!(begun.elapsed() < DEADLINE, "sockets that do not end: {sockets:#?}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// From the beginning until all sockets were gone, the proxy's kernel has sent no RST, aborted nothing, turned nobody away.
    #[track_caller]
    pub fn no_rst(&self) {
        self.settle();
        if let Middle::Tidegate(proxy) = &self.middle {
            // A panic ends its session's sockets, which from outside may look like an end in order.
            let printed = proxy.printed();
            let panic = printed.iter().find(|(_, line)| line.contains("panicked at"));
            assert_eq!(panic, None, "tidegate panicked");
            let broken = printed.iter().find(|(_, line)| line.contains("an invariant of the pool does not hold"));
            assert_eq!(broken, None, "a mistake in the pool");
        }
        if let Some(streams) = &self.streams {
            let seen = streams.seen_when("the end of its connections", |seen| {
                seen.ended.len() == seen.connections && seen.closed.len() == seen.connections
            });
            assert!(seen.streams > 0 && seen.ended.iter().chain(&seen.closed).all(|in_order| *in_order), "{seen:?}");
            // What we end, we end without an error.
            assert!(seen.resets.iter().all(|reason| *reason == h2::Reason::NO_ERROR), "{seen:?}");
        }
        if let Some(front) = self.front.as_ref().filter(|_| MULTIPLEXED.get()) {
            let seen = front.seen();
            assert!(seen.plain == 0 && seen.all_streams() > 0, "not on streams: {seen:?}");
            assert!(seen.ended.len() == seen.streams.len() && seen.ended.iter().all(|in_order| *in_order), "{seen:?}");
        }
        if let Some(tls) = self.tls.as_ref().filter(|_| ENCRYPTED.get()) {
            // Each connection is over: its FIN had come, so close_notify had.
            let seen = tls.seen_when("the end of its connections", |seen| {
                seen.notified + seen.truncated + seen.reset == seen.protocols.len()
            });
            assert!(!seen.protocols.is_empty() && seen.truncated == 0, "{seen:?}");
        }
        for client in self.clients.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            client
                .read(|seen| assert_ne!(seen.end, Some(End::Truncated), "a FIN without close_notify: {}", seen.label));
        }
        let counters = self.counters(Side::Proxy);
        // An EstabResets is also a RST that was received: it proves something where no peer sent any.
        let peers_reset = [Side::Client, Side::Backend].into_iter().any(|side| self.counters(side).get("OutRsts") != 0);
        if peers_reset {
            counters.assert_sent_no_rst();
        } else {
            counters.assert_no_rst();
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let panicked = self.backend.panicked();
        if thread::panicking() || panicked.is_some() {
            let proxy = match &self.middle {
                Middle::Tidegate(proxy) => Some(proxy),
                Middle::Direct | Middle::Copy(_) => None,
            };
            let mut transcripts = self.clients.lock().unwrap_or_else(PoisonError::into_inner).clone();
            transcripts.extend(self.backend.transcripts());
            let report = report::write(&self.lab, &self.baseline, proxy, &transcripts, self.seed);
            eprintln!("{report}");
        }
        // A script's assertion is the test's, also where the test did not look at its connection.
        if let Some(panic) = panicked.filter(|_| !thread::panicking()) {
            panic!("{panic}");
        }
    }
}

/// A client that has not connected yet.
struct Entry {
    index: usize,
    dial: Dial,
    to: SocketAddr,
    connector: Option<TlsConnector>,
    transcript: Board<Transcript>,
    seed: u64,
}

impl Entry {
    async fn play<T>(self, script: impl AsyncFnOnce(&mut Peer) -> T) -> T {
        let transcript = self.transcript.clone();
        let play = async move {
            let stream = timeout(DEADLINE, self.connect()).await.expect("no answer to the SYN, or to the ClientHello");
            let mut peer =
                Peer::new(Role::Client, self.index, stream, self.transcript, self.seed).expect("a connected socket");
            let result = script(&mut peer).await;
            peer.conclude().await;
            result
        };
        let result = timeout(LIMIT, play).await.expect("the client's script does not end");
        transcript.change(|t| t.over = Some(Ok(())));
        result
    }

    async fn connect(&self) -> Wire {
        let socket = TcpSocket::new_v4().expect("a socket");
        if let Some(bytes) = self.dial.recv_buffer {
            SockRef::from(&socket).set_recv_buffer_size(bytes).expect("a socket");
        }
        let mut stream = socket.connect(self.to).await.unwrap_or_else(|e| panic!("connect to {}: {e}", self.to));
        if !self.dial.before.is_empty() {
            // Together with nothing else.
            stream.set_nodelay(true).expect("a socket");
            stream.write_all(self.dial.before).await.expect("an open connection");
        }
        let Some(connector) = &self.connector else { return stream.into() };
        stream.set_nodelay(true).expect("a socket");
        let name = ServerName::try_from(self.dial.name.unwrap_or(CLIENTS_NAME)).expect("a name");
        connector.connect(name, stream).await.unwrap_or_else(|e| panic!("TLS with {}: {e}", self.to)).into()
    }
}

/// Copies bytes between each client and the backend: a stand-in for tidegate where the harness itself is tested.
#[derive(Debug)]
struct CopyRelay {
    address: SocketAddr,
    stopped: Board<bool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl CopyRelay {
    fn start(lab: &Lab, backend: SocketAddr) -> Self {
        let place: Place = lab.place(Side::Proxy);
        let (address, stopped) = (Board::new(None), Board::new(false));
        let front = SocketAddr::new(lab.address(Side::Proxy, Side::Client), 0);
        let run = {
            let (address, stopped) = (address.clone(), stopped.clone());
            move || {
                block(LocalSet::new().run_until(async move {
                    let listener = TcpListener::bind(front).await.expect("port 0 is free");
                    address.change(|a| *a = listener.local_addr().ok());
                    let mut tasks = JoinSet::new();
                    let end = stopped.until(LIMIT, |stopped| stopped.then_some(()));
                    let accept = async {
                        while let Ok((mut client, _)) = listener.accept().await {
                            tasks.spawn_local(async move {
                                let mut server = TcpStream::connect(backend).await?;
                                copy_bidirectional(&mut client, &mut server).await
                            });
                        }
                    };
                    tokio::select! { _ = end => {}, () = accept => {} }
                }));
            }
        };
        let thread = Some(place.spawn("copy relay", run));
        let address = address.wait(DEADLINE, |address| *address).expect("a listening relay");
        Self { address, stopped, thread }
    }
}

impl Drop for CopyRelay {
    fn drop(&mut self) {
        self.stopped.change(|stopped| *stopped = true);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}
