//! Thousands of peers at once: a stage for them, peers that cost little, and a backend that is a process of its own.
//!
//! A [`Member`] writes no transcript: what a test of many sessions compares is a [`tally`] of how they went. All clients are
//! on one thread and all connections of a backend on another, since two cores have the proxy to carry as well.

use super::{
    Board, DEADLINE, End, Frame, LIMIT, Lab, Message, Side, block, feed,
    http::KEY,
    lab::Counters,
    left_out,
    proxy::{Metrics, Proxy, Surroundings},
    ws::{CLOSE, PING, PONG, SeenFrame},
};
use futures_util::{
    future::join_all,
    stream::{FuturesUnordered, StreamExt},
};
use rustix::process::{Pid, Resource, Signal, getrlimit, kill_process, setrlimit};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use std::{
    collections::BTreeMap,
    fs,
    io::{self, BufRead, BufReader, Read},
    net::{IpAddr, SocketAddr},
    ops::Deref,
    pin::pin,
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};

/// Clients whose handshake is under way at once: spikes are what `spike.rs` is about.
const CONNECTING: usize = 256;

/// How often each thing happened.
pub fn tally<T: Ord>(items: impl IntoIterator<Item = T>) -> BTreeMap<T, usize> {
    let mut tally = BTreeMap::new();
    for item in items {
        *tally.entry(item).or_default() += 1;
    }
    tally
}

/// Whether bounds of time are asserted as well, as on a release build and a quiet machine.
pub fn is_strict() -> bool {
    std::env::var_os("TIDEGATE_STRICT").is_some_and(|value| value == "1")
}

/// The lab of a crowd. One crowd at a time: two would only measure each other.
#[derive(Debug)]
pub struct Stage {
    lab: Lab,
    started: Instant,
    _turn: MutexGuard<'static, ()>,
}

impl Stage {
    pub fn new() -> Self {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        // A failed test has left nothing behind that the next one could see.
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        raise_descriptor_limit();
        Self { lab: Lab::new(), started: Instant::now(), _turn: turn }
    }

    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// tidegate with these settings.
    pub fn tidegate(&self, settings: &str, backend: SocketAddr) -> Front<'_> {
        self.tidegate_in(Surroundings::default(), settings, backend)
    }

    /// As [`Stage::tidegate`], with less around it, or more.
    pub fn tidegate_in(&self, surroundings: Surroundings<'_>, settings: &str, backend: SocketAddr) -> Front<'_> {
        // A debug line for each session would cost more than the session. And nobody here expects a Ping, which only a machine
        // that takes half a minute for a script would see.
        let quiet = if settings.contains("websocket = {") { "" } else { "websocket.ping_interval = '0s'\n" };
        let settings = format!("log.filter = 'info'\n{quiet}{settings}");
        let baseline = self.lab.counters(Side::Proxy);
        let proxy = Proxy::start_in(&self.lab, surroundings, &settings, backend, self.started);
        let descriptors = proxy.descriptors_but_pipes();
        Front { proxy, lab: &self.lab, baseline, descriptors }
    }

    /// A backend in this process.
    pub fn backend<T: Send + Sync + 'static>(&self, script: impl AsyncFn(Member) -> T + Send + 'static) -> Backend<T> {
        self.backend_with(Accepting::default(), script)
    }

    /// As [`Stage::backend`], where it matters how it accepts.
    pub fn backend_with<T: Send + Sync + 'static>(
        &self,
        accepting: Accepting,
        script: impl AsyncFn(Member) -> T + Send + 'static,
    ) -> Backend<T> {
        let ip = self.lab.address(Side::Backend, Side::Proxy);
        let (address, results, stopped) = (Board::new(None), Board::new(Vec::new()), Board::new(false));
        let run = {
            let (address, results, stopped) = (address.clone(), results.clone(), stopped.clone());
            move || {
                let until_stopped = async { while stopped.until(LIMIT, |s| s.then_some(())).await.is_none() {} };
                let serving = async {
                    let listener = listen(ip, accepting);
                    address.change(|a| *a = listener.local_addr().ok());
                    serve(listener, accepting.stalls, script, |result| results.change(|all| all.push(result))).await;
                };
                block(async {
                    tokio::select! { () = until_stopped => {}, () = serving => {} }
                });
            }
        };
        let thread = Some(self.lab.place(Side::Backend).spawn("backend", run));
        let address = address.wait(DEADLINE, |address| *address).expect("a listening backend");
        Backend { address, results, stopped, thread }
    }

    /// An echo backend that is a process, and so can be killed.
    pub fn echo_process(&self) -> EchoProcess {
        EchoProcess::start(&self.lab)
    }

    /// Runs `script` on the clients' thread, in their namespace.
    pub fn clients<T: Send>(&self, script: impl AsyncFnOnce() -> T + Send) -> T {
        let bounded = async || timeout(LIMIT, script()).await.expect("the clients' script does not end");
        self.lab.place(Side::Client).run(move || block(bounded()))
    }
}

pub fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("the soft limit may be raised to the hard one");
}

/// How a backend takes connections.
#[derive(Clone, Copy, Debug)]
pub struct Accepting {
    /// `SO_RCVBUF` and `SO_SNDBUF` of its connections.
    pub buffers: Option<usize>,
    pub backlog: i32,
    /// After its first connection, and then after each so many, it takes none for so long, as in a collection of garbage.
    pub stalls: Option<(usize, Duration)>,
}

impl Default for Accepting {
    fn default() -> Self {
        Self { buffers: None, backlog: 65_535, stalls: None }
    }
}

/// tidegate in front of a crowd. When the test fails it says what it knows, which for a crowd is not all it has printed.
#[derive(Debug)]
pub struct Front<'a> {
    proxy: Proxy,
    lab: &'a Lab,
    baseline: Counters,
    /// Before the first client.
    descriptors: usize,
}

impl Deref for Front<'_> {
    type Target = Proxy;

    fn deref(&self) -> &Proxy {
        &self.proxy
    }
}

impl Front<'_> {
    /// What the kernel counted in the proxy's namespace since tidegate was started.
    pub fn counters(&self) -> Counters {
        &self.lab.counters(Side::Proxy) - &self.baseline
    }

    /// Resident memory in bytes. Not from `status`, whose count may be off by some pages for each thread.
    pub fn resident(&self) -> u64 {
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid())).expect("our own child");
        let line = rollup.lines().find_map(|line| line.strip_prefix("Rss:")).expect("the kernel's format");
        let kib: u64 = line.split_whitespace().next().and_then(|kib| kib.parse().ok()).expect("the kernel's format");
        kib * 1024
    }

    /// Bytes of kernel memory that the proxy's TCP sockets are charged with; None where they can't be told from others.
    ///
    /// Summed over its sockets: the `mem` of `/proc/net/sockstat` is one count for all namespaces of the host. Of what ss
    /// shows it is r (received and unread), w (queued, unsent or unacked), f (set aside), o (options) and bl (backlog).
    /// Not t, which counts copies of what w counts, on their way through a device.
    pub fn socket_memory(&self) -> Option<u64> {
        if !self.lab.counts_are_exact() {
            left_out("the memory of sockets", "no namespaces");
            return None;
        }
        let output = self.lab.command_in(Side::Proxy, "ss").args(["-tanm"]).output().expect("ss is where ip is");
        let text = String::from_utf8_lossy(&output.stdout);
        let fields = text.split("skmem:(").skip(1).filter_map(|rest| rest.split(')').next());
        let charged = fields.flat_map(|fields| fields.split(',')).filter_map(|field| {
            let digits = field.find(|c: char| c.is_ascii_digit())?;
            let (name, value) = field.split_at(digits);
            matches!(name, "r" | "w" | "f" | "o" | "bl").then(|| value.parse::<u64>().ok())?
        });
        Some(charged.sum())
    }

    /// Waits until tidegate holds nothing of any session any more: no gauge, no descriptor.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        const GAUGES: [&str; 3] =
            ["tidegate_connections_active", "tidegate_client_connections", "tidegate_lingering_sockets"];
        let all_zero = |metrics: &Metrics| GAUGES.iter().all(|gauge| metrics.all()[*gauge].abs() < 0.5);
        self.metrics_when("that nothing is left", all_zero);
        let begun = Instant::now();
        loop {
            let now = self.descriptors_but_pipes();
            if now == self.descriptors {
                return;
            }
            let before = self.descriptors;
            assert!(begun.elapsed() < DEADLINE, "descriptors: {before} before the first session, {now} after the last");
            // The last request for metrics may still be in its linger.
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// tidegate's kernel has reset nobody. A peer may have reset it.
    #[track_caller]
    pub fn assert_sent_no_rst(&self) {
        self.settle();
        self.counters().assert_sent_no_rst();
    }

    /// As [`Front::assert_sent_no_rst`], where no peer resets either.
    #[track_caller]
    pub fn assert_no_rst(&self) {
        self.settle();
        self.counters().assert_no_rst();
    }

    /// Waits until the kernel, too, is done with every connection.
    #[track_caller]
    fn settle(&self) {
        let begun = Instant::now();
        while self.lab.counts_are_exact() {
            let sockets = self.lab.sockets(Side::Proxy);
            let left = sockets.iter().filter(|s| s.state != "LISTEN" && s.state != "TIME_WAIT");
            let states = tally(left.map(|s| s.state));
            if states.is_empty() {
                return;
            }
            assert!(begun.elapsed() < DEADLINE, "sockets that do not end: {states:?}");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Front<'_> {
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        eprintln!("---- kernel, in the proxy's namespace: {:?}", self.counters());
        for side in [Side::Client, Side::Backend] {
            // Since the lab was made, which for these two is the same as since the test began.
            eprintln!("---- kernel, {side:?}: {:?}", self.lab.counters(side));
        }
        let printed = self.printed();
        let hidden = printed.len().saturating_sub(40);
        eprintln!("---- the proxy's output, without its first {hidden} lines");
        for (at, text) in &printed[hidden..] {
            eprintln!("{:>10.3} ms {text}", at.as_secs_f64() * 1e3);
        }
        match self.admin(&Message::get("/metrics")) {
            Ok(response) => {
                let text = response.text();
                let tells = |l: &&str| !l.starts_with('#') && !l.ends_with(" 0") && !l.contains("_bucket{");
                eprintln!("---- its metrics that are not zero");
                text.lines().filter(tells).for_each(|line| eprintln!("{line}"));
            }
            Err(error) => eprintln!("---- no metrics: {error}"),
        }
    }
}

/// A listener with a script for each of its connections, and what the scripts came to.
#[derive(Debug)]
pub struct Backend<T> {
    pub address: SocketAddr,
    results: Board<Vec<T>>,
    stopped: Board<bool>,
    thread: Option<JoinHandle<()>>,
}

impl<T> Backend<T> {
    /// Waits until so many connections have ended; their results, in that order.
    #[track_caller]
    pub fn results(&self, count: usize) -> Vec<T> {
        let all = |results: &Vec<T>| (results.len() >= count).then_some(());
        let ended = self.results.wait(DEADLINE, all);
        let so_far = self.results.change(std::mem::take);
        assert!(ended.is_some(), "{} of {count} connections of the backend have ended", so_far.len());
        assert_eq!(so_far.len(), count, "connections of the backend");
        so_far
    }
}

impl<T> Drop for Backend<T> {
    fn drop(&mut self) {
        self.stopped.change(|stopped| *stopped = true);
        let ended = self.thread.take().map(JoinHandle::join);
        // A script's assertion is the test's.
        assert!(!matches!(ended, Some(Err(_))) || thread::panicking(), "the backend panicked");
    }
}

fn listen(ip: IpAddr, accepting: Accepting) -> TcpListener {
    listen_at(SocketAddr::new(ip, 0), accepting)
}

fn listen_at(address: SocketAddr, accepting: Accepting) -> TcpListener {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP)).expect("a socket");
    if let Some(bytes) = accepting.buffers {
        socket.set_recv_buffer_size(bytes).expect("a socket");
        socket.set_send_buffer_size(bytes).expect("a socket");
    }
    // Sessions of a process that was there before may not be over for the kernel.
    socket.set_reuse_address(true).expect("a socket");
    socket.bind(&address.into()).expect("the port is free");
    socket.listen(accepting.backlog).expect("a bound socket");
    socket.set_nonblocking(true).expect("a socket");
    TcpListener::from_std(socket.into()).expect("inside a runtime")
}

async fn serve<T: 'static>(
    listener: TcpListener,
    stalls: Option<(usize, Duration)>,
    script: impl AsyncFn(Member) -> T,
    mut ended: impl FnMut(T),
) {
    let script = &script;
    let mut sessions = FuturesUnordered::new();
    let mut count = 0;
    let mut stall = pin!(sleep(Duration::ZERO));
    let mut is_stalled = false;
    loop {
        tokio::select! {
            accepted = listener.accept(), if !is_stalled => {
                let (stream, _) = accepted.expect("descriptors enough for a test");
                let member = Member::new(stream, false);
                sessions.push(async move { script(member).await });
                if let Some((each, pause)) = stalls
                    && count % each == 0
                {
                    stall.as_mut().reset(tokio::time::Instant::now() + pause);
                    is_stalled = true;
                }
                count += 1;
            }
            () = &mut stall, if is_stalled => is_stalled = false,
            Some(result) = sessions.next() => ended(result),
        }
    }
}

/// The scripts of many members, on the calling thread; their results in the order of the members.
pub async fn together<T>(members: Vec<Member>, script: impl AsyncFn(Member) -> T) -> Vec<T> {
    join_all(members.into_iter().map(|member| script(member))).await
}

/// So many clients with their handshakes done.
pub async fn connect(address: SocketAddr, count: usize) -> Vec<Member> {
    let turns = Semaphore::new(CONNECTING);
    let one = async || {
        let _turn = turns.acquire().await.expect("nobody closes it");
        let mut member = Member::connect(address).await;
        member.handshake().await;
        member
    };
    join_all((0..count).map(|_| one())).await
}

/// One end of a connection. It answers nothing by itself.
#[derive(Debug)]
pub struct Member {
    stream: TcpStream,
    is_client: bool,
    /// It has sent its one Close.
    has_closed: bool,
    /// Received, and not yet part of anything.
    buffer: Vec<u8>,
    /// Of `buffer`, what was taken already.
    taken: usize,
}

/// What came until the end.
#[derive(Clone, Debug)]
pub struct Rest {
    pub messages: usize,
    /// In their payloads.
    pub bytes: usize,
    pub closes: Vec<SeenFrame>,
    /// When the last Close came.
    pub closed_at: Option<Instant>,
    pub end: End,
    pub ended_at: Instant,
    /// Bytes that are no whole frame, and frames behind a Close.
    pub is_ragged: bool,
}

impl Rest {
    /// In a few words, to be counted.
    pub fn summary(&self) -> String {
        let closes: Vec<_> = self.closes.iter().map(|close| format!("Close {}, ", close.code())).collect();
        let ragged = if self.is_ragged { " with bytes that should not be" } else { "" };
        format!("{}{:?}{ragged}", closes.concat(), self.end)
    }
}

impl Member {
    fn new(stream: TcpStream, is_client: bool) -> Self {
        // ENOTCONN is seen with the first read.
        let _ = stream.set_nodelay(true);
        Self { stream, is_client, has_closed: false, buffer: Vec::new(), taken: 0 }
    }

    /// A client that has said nothing yet.
    pub async fn connect(address: SocketAddr) -> Self {
        let connected = Self::try_connect(address, DEADLINE).await;
        connected.unwrap_or_else(|e| panic!("connect to {address}: {e}"))
    }

    /// As [`Member::connect`], where it may also come to nothing.
    pub async fn try_connect(address: SocketAddr, within: Duration) -> Result<Self, io::ErrorKind> {
        let connecting = TcpSocket::new_v4().expect("descriptors enough for a test").connect(address);
        let stream = timeout(within, connecting).await.map_err(|_| io::ErrorKind::TimedOut)?;
        stream.map(|stream| Self::new(stream, true)).map_err(|error| error.kind())
    }

    /// A client whose kernel takes little that it does not read.
    pub async fn narrow(address: SocketAddr) -> Self {
        let socket = TcpSocket::new_v4().expect("descriptors enough for a test");
        socket.set_recv_buffer_size(4 << 10).expect("a socket");
        let stream = timeout(DEADLINE, socket.connect(address)).await.expect("in time");
        Self::new(stream.unwrap_or_else(|e| panic!("connect to {address}: {e}")), true)
    }

    /// Bytes that were received, and that nobody has asked for.
    pub fn unread(&self) -> usize {
        self.buffer.len() - self.taken
    }

    pub fn local(&self) -> SocketAddr {
        self.stream.local_addr().expect("a socket")
    }

    /// The client's or the server's part of the handshake, which must succeed.
    pub async fn handshake(&mut self) {
        // Made once: all keys are the same, and so are all answers.
        static HEADS: OnceLock<[Vec<u8>; 2]> = OnceLock::new();
        let [request, response] = HEADS.get_or_init(|| {
            let request = Message::websocket("/");
            [request.bytes(), Message::switching(&request).bytes()]
        });
        if self.is_client {
            self.send_bytes(request).await.expect("the other side has just accepted");
            let head = self.head().await;
            assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        } else {
            let head = self.head().await;
            assert!(head.contains(KEY), "{head}");
            self.send_bytes(response).await.expect("the other side has just asked");
        }
    }

    /// The next response, or request, with its body, or the end that came instead.
    pub async fn message(&mut self) -> Result<Message, End> {
        loop {
            let received = &self.buffer[self.taken..];
            if let Some((mut head, length)) = Message::parse_head(received) {
                let body = head.framing().body(&received[length..], false).unwrap_or_default();
                if let Some((body, of_body)) = body {
                    self.taken += length + of_body;
                    head.body = body;
                    return Ok(head);
                }
            }
            if let Some(end) = self.fill().await {
                return Err(end);
            }
        }
    }

    async fn head(&mut self) -> String {
        loop {
            if let Some(at) = self.buffer.windows(4).position(|four| four == b"\r\n\r\n") {
                self.taken = at + 4;
                return String::from_utf8_lossy(&self.buffer[..at]).into_owned();
            }
            let read = timeout(DEADLINE, self.fill()).await;
            assert!(matches!(read, Ok(None)), "{read:?} instead of a head: {:?}", self.buffer);
        }
    }

    /// A frame as this member would send it.
    pub fn bytes_of(&self, frame: &Frame) -> Vec<u8> {
        frame.bytes(self.is_client.then_some([1, 2, 3, 4]))
    }

    pub async fn send(&mut self, frame: &Frame) -> io::Result<()> {
        self.has_closed |= frame.opcode == CLOSE;
        self.send_bytes(&self.bytes_of(frame)).await
    }

    pub async fn send_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// As much as the kernel takes.
    pub async fn send_some(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes).await
    }

    /// Sends for as long as the other side says nothing; tells `sent` how much the kernel has taken each time. Returns the
    /// frame or the end that came before all was sent.
    pub async fn send_until_heard(&mut self, mut bytes: &[u8], sent: impl Fn(usize)) -> Option<Result<SeenFrame, End>> {
        while !bytes.is_empty() {
            let ready = self.stream.ready(Interest::READABLE | Interest::WRITABLE).await.expect("a registered socket");
            let read = if ready.is_readable() { self.try_fill() } else { Err(io::ErrorKind::WouldBlock.into()) };
            if !matches!(&read, Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
                // A whole frame, or an end, which reading again finds again.
                return Some(self.frame().await);
            }
            match self.stream.try_write(bytes) {
                Ok(count) => {
                    sent(count);
                    bytes = &bytes[count..];
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Some(Err(End::Error(error.kind()))),
            }
        }
        None
    }

    /// The next frame, or the end. Dropping the future loses nothing.
    pub async fn frame(&mut self) -> Result<SeenFrame, End> {
        loop {
            if let Some((frame, length)) = SeenFrame::parse(&self.buffer[self.taken..], Duration::ZERO) {
                self.taken += length;
                return Ok(frame);
            }
            if let Some(end) = self.fill().await {
                return Err(end);
            }
        }
    }

    /// Reads once; an end, if that came.
    pub async fn fill(&mut self) -> Option<End> {
        self.buffer.drain(..std::mem::take(&mut self.taken));
        loop {
            if self.stream.readable().await.is_err() {
                return Some(End::Left);
            }
            match self.try_fill() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Some(End::Rst),
                Err(error) => return Some(End::Error(error.kind())),
                Ok(0) => return Some(End::Fin),
                Ok(_) => return None,
            }
        }
    }

    /// Apart, so that a member that waits does not hold the memory for what it waits for.
    fn try_fill(&mut self) -> io::Result<usize> {
        let mut chunk = [0; 16 * 1024];
        let count = self.stream.try_read(&mut chunk)?;
        self.buffer.extend_from_slice(&chunk[..count]);
        Ok(count)
    }

    /// Reads until the end, at most [`DEADLINE`] from one frame to the next; answers a Close unless it has sent its own.
    pub async fn rest(&mut self) -> Rest {
        let (mut messages, mut bytes, mut closes, mut closed_at, mut is_ragged) = (0, 0, Vec::new(), None, false);
        let end = loop {
            match timeout(DEADLINE, self.frame()).await.unwrap_or(Err(End::Timeout)) {
                Ok(frame) if frame.opcode == CLOSE => {
                    closed_at = Some(Instant::now());
                    if !self.has_closed {
                        // What came of it is seen with the end.
                        let _ = self.send(&Frame::new(CLOSE, &frame.payload[..frame.payload.len().min(2)])).await;
                    }
                    closes.push(frame);
                }
                Ok(frame) => {
                    is_ragged |= !closes.is_empty();
                    messages += 1;
                    bytes += frame.payload.len();
                }
                Err(end) => break end,
            }
        };
        is_ragged |= self.taken < self.buffer.len();
        Rest { messages, bytes, closes, closed_at, end, ended_at: Instant::now(), is_ragged }
    }

    /// FIN; then what still comes.
    pub async fn fin_and_rest(mut self) -> Rest {
        // What came of it is seen with the end.
        let _ = self.stream.shutdown().await;
        self.rest().await
    }

    /// FIN. Reading goes on.
    pub async fn fin(&mut self) {
        let _ = self.stream.shutdown().await;
    }

    /// A frame and FIN in one packet. Reading goes on.
    pub async fn send_with_fin(&mut self, frame: &Frame) -> io::Result<()> {
        SockRef::from(&self.stream).set_tcp_cork(true)?;
        self.send(frame).await?;
        self.stream.shutdown().await
    }

    /// RST.
    #[expect(clippy::disallowed_methods, reason = "the test's tool to reset on purpose")]
    pub fn rst(self) {
        SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)).expect("a socket");
    }
}

/// Sends all data back, answers Ping and Close, and then closes first as a server should.
pub async fn echo(mut member: Member) {
    member.handshake().await;
    echo_on(member).await;
}

/// As [`echo`], after the handshake.
pub async fn echo_on(mut member: Member) {
    while let Ok(frame) = member.frame().await {
        let answer = match frame.opcode {
            CLOSE => {
                let _ = member.send(&Frame::new(CLOSE, &frame.payload[..frame.payload.len().min(2)])).await;
                member.fin_and_rest().await;
                return;
            }
            PING => Frame::new(PONG, &frame.payload),
            PONG => continue,
            _ => frame.again(),
        };
        // Its failure is seen with the next read.
        let _ = member.send(&answer).await;
    }
}

/// Serves what clients of any kind ask for: sessions as [`echo`], those of `/feed` as a feed, and plain requests, one after the other,
/// with a short body.
pub async fn anything(mut member: Member) {
    loop {
        let Ok(request) = member.message().await else { break };
        let response = if request.field("Upgrade").is_some() {
            Message::switching(&request)
        } else {
            Message::status(200, "OK", "anything")
        };
        if member.send_bytes(&response.bytes()).await.is_err() {
            break;
        }
        if response.code() == 101 && request.target().starts_with("/feed") {
            feed::feed_on(member, feed::EVERY, feed::BYTES, None).await;
            return;
        }
        if response.code() == 101 {
            return echo_on(member).await;
        }
    }
    member.fin_and_rest().await;
}

/// What tells this binary that it is to be the backend, and the address to listen on.
const BE_THE_BACKEND: &str = "TIDEGATE_TEST_BACKEND";

/// The words before the address on the backend's stdout.
const LISTENING: &str = "backend listening on ";

/// [`anything`] as a process: this binary, run once more with one of its tests as the entry.
#[derive(Debug)]
pub struct EchoProcess {
    pub address: SocketAddr,
    child: Child,
}

impl EchoProcess {
    fn start(lab: &Lab) -> Self {
        Self::start_at(lab, Side::Backend, SocketAddr::new(lab.address(Side::Backend, Side::Proxy), 0))
    }

    /// Another process where this one was.
    pub fn again(&mut self, stage: &Stage) {
        *self = Self::start_at(&stage.lab, Side::Backend, self.address);
    }

    /// On an address of this side's network.
    pub fn start_at(lab: &Lab, side: Side, address: SocketAddr) -> Self {
        let binary = std::env::current_exe().expect("a running binary has a path");
        let mut command: Command = lab.command_in(side, binary);
        let mut child = command
            .args(["--exact", "harness::crowd::backend_process", "--ignored", "--nocapture"])
            .env(BE_THE_BACKEND, address.to_string())
            // It ends with this pipe, and so with the test, however that ends.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary that runs");
        let stdout = child.stdout.take().expect("it was asked for");
        let lines = BufReader::new(stdout).lines().map_while(Result::ok);
        // Its line may begin with what libtest says of it.
        let address = lines
            .filter_map(|line| line.split_once(LISTENING).map(|(_, address)| address.to_owned()))
            .find_map(|address| address.trim().parse().ok());
        Self { address: address.expect("a backend that says where it listens"), child }
    }

    pub fn sigterm(&self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).expect("our own child");
    }

    pub fn has_exited(&mut self) -> bool {
        self.child.try_wait().expect("our own child").is_some()
    }

    /// SIGKILL. Until it is gone its kernel still takes connections for it.
    pub fn kill(&mut self) {
        self.child.kill().expect("our own child");
        self.child.wait().expect("our own child");
    }
}

impl Drop for EchoProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test but the entry of [`EchoProcess`]. Passes when it is run for any other reason.
#[test]
#[ignore = "the backend process of other tests"]
fn backend_process() {
    let Some(address) = std::env::var(BE_THE_BACKEND).ok().and_then(|address| address.parse().ok()) else { return };
    raise_descriptor_limit();
    thread::spawn(|| {
        let _ = io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
    block(async {
        let listener = listen_at(address, Accepting::default());
        println!("{LISTENING}{}", listener.local_addr().expect("a bound socket"));
        // Not everybody who connects asks for something.
        serve(listener, None, anything, |()| {}).await;
    });
}
