//! Backends that follow a script, and a collection of scripts that no honest backend would follow.
//!
//! A script is an async closure or function over `&mut Peer`, called for each connection; what it does not end is ended in the
//! orderly way when it returns. What each connection sent is kept byte for byte, also after its end.

use super::{
    Board, DEADLINE, LIMIT, Lab, Message, Peer, Seen, Side,
    peer::Role,
    transcript::{End, Transcript},
    ws::{CLOSE, Frame, PING, PONG},
};
use futures_util::{FutureExt, future::LocalBoxFuture};
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    any::Any,
    net::{IpAddr, SocketAddr},
    panic::AssertUnwindSafe,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};
use tokio::{
    net::TcpListener,
    task::{JoinSet, LocalSet},
};

type Script = dyn for<'a> Fn(&'a mut Peer) -> LocalBoxFuture<'a, ()> + Send + Sync;

/// What is said where a backend is started.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// `SO_RCVBUF` of the listening socket, which its connections inherit.
    pub recv_buffer: Option<usize>,
    pub backlog: i32,
    pub seed: u64,
    /// The zero of all offsets.
    pub started: Instant,
}

impl Default for Options {
    fn default() -> Self {
        Self { recv_buffer: None, backlog: 65_535, seed: 0, started: Instant::now() }
    }
}

/// A listener in the backend's namespace with the scripts of its connections; all ends on drop.
#[derive(Debug)]
pub struct Backend {
    pub address: SocketAddr,
    connections: Board<Vec<Board<Transcript>>>,
    stage: Board<Stage>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Listening,
    /// The listener is to be closed.
    Closing,
    /// The listener is closed, the connections go on.
    Closed,
    /// All ends.
    Stopped,
}

impl Backend {
    pub fn start<F>(lab: &Lab, options: Options, script: F) -> Self
    where
        F: AsyncFn(&mut Peer) + Send + Sync + 'static,
    {
        Self::start_boxed(lab, options, boxed(script))
    }

    fn start_boxed(lab: &Lab, options: Options, script: Arc<Script>) -> Self {
        let address = Board::new(None);
        let connections = Board::new(Vec::new());
        let stage = Board::new(Stage::Listening);
        let ip = lab.address(Side::Backend, Side::Proxy);
        let run = {
            let (address, connections, stage) = (address.clone(), connections.clone(), stage.clone());
            move || {
                super::block(LocalSet::new().run_until(async move {
                    let listener = listen(ip, options);
                    address.change(|a| *a = Some(listener.local_addr().expect("a bound socket")));
                    serve(listener, options, script, connections, stage).await;
                }));
            }
        };
        let thread = lab.place(Side::Backend).spawn("backend", run);
        let address = address.wait(DEADLINE, |address| *address).expect("a listening backend");
        Self { address, connections, stage, thread: Some(thread) }
    }

    /// The nth connection, as soon as it has been accepted.
    #[track_caller]
    pub fn connection(&self, index: usize) -> Connection {
        let found = self.connections.wait(DEADLINE, |all| all.get(index).cloned());
        let count = self.count();
        let transcript =
            found.unwrap_or_else(|| panic!("connection {index} was never accepted by the backend; {count} were"));
        Connection { index, transcript }
    }

    /// How many connections have been accepted.
    pub fn count(&self) -> usize {
        self.connections.read(Vec::len)
    }

    /// Closes the listener: new connections are refused, the others go on.
    pub fn stop_listening(&self) {
        self.stage.change(|stage| *stage = Stage::Closing);
        let closed = self.stage.wait(DEADLINE, |stage| (*stage == Stage::Closed).then_some(()));
        closed.expect("the backend's thread closes its listener");
    }

    pub fn transcripts(&self) -> Vec<Board<Transcript>> {
        self.connections.read(Vec::clone)
    }

    /// The first panic of a script, if there was one.
    pub fn panicked(&self) -> Option<String> {
        let panic_of = |transcript: &Board<Transcript>| {
            transcript.read(|t| t.over.clone().and_then(Result::err).map(|e| format!("{}: {e}", t.label)))
        };
        self.transcripts().iter().find_map(panic_of)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.stage.change(|stage| *stage = Stage::Stopped);
        // A panic of the thread itself was printed by it; here it must not become a second one.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn boxed<F>(script: F) -> Arc<Script>
where
    F: AsyncFn(&mut Peer) + Send + Sync + 'static,
{
    let script = Arc::new(script);
    Arc::new(move |peer| {
        let script = Arc::clone(&script);
        Box::pin(async move { script(peer).await })
    })
}

fn listen(ip: IpAddr, options: Options) -> TcpListener {
    let socket =
        Socket::new(Domain::for_address(SocketAddr::new(ip, 0)), Type::STREAM, Some(Protocol::TCP)).expect("a socket");
    if let Some(bytes) = options.recv_buffer {
        socket.set_recv_buffer_size(bytes).expect("a socket");
    }
    socket.bind(&SocketAddr::new(ip, 0).into()).expect("port 0 is free");
    socket.listen(options.backlog).expect("a bound socket");
    socket.set_nonblocking(true).expect("a socket");
    TcpListener::from_std(socket.into()).expect("inside a runtime")
}

async fn serve(
    listener: TcpListener,
    options: Options,
    script: Arc<Script>,
    connections: Board<Vec<Board<Transcript>>>,
    stage: Board<Stage>,
) {
    let mut tasks = JoinSet::new();
    let stopped = async |stage: &Board<Stage>, wanted: fn(Stage) -> bool| {
        while stage.until(LIMIT, |stage| wanted(*stage).then_some(())).await.is_none() {}
    };
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stopped(&stage, |stage| stage != Stage::Listening) => break,
        };
        let (stream, remote) = accepted.expect("descriptors enough for a test");
        let index = connections.read(Vec::len);
        let label = format!("backend connection {index} from {remote}");
        let transcript = Board::new(Transcript::new(label, options.started));
        let peer = Peer::new(Role::Server, index, stream, transcript.clone(), options.seed);
        connections.change(|all| all.push(transcript.clone()));
        let script = Arc::clone(&script);
        tasks.spawn_local(async move {
            let play = async {
                // ENOTCONN: reset before it was accepted.
                let Ok(mut peer) = peer else { return };
                script(&mut peer).await;
                peer.conclude().await;
            };
            let played = AssertUnwindSafe(play).catch_unwind().await;
            let over = played.map_err(|panic| message(&*panic));
            transcript.change(|t| t.over = Some(over));
        });
    }
    drop(listener);
    stage.change(|stage| *stage = if *stage == Stage::Closing { Stage::Closed } else { *stage });
    stopped(&stage, |stage| stage == Stage::Stopped).await;
}

/// What a panic said.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
}

/// What the backend knows of one connection, during it and afterwards.
#[derive(Clone, Debug)]
pub struct Connection {
    index: usize,
    transcript: Board<Transcript>,
}

impl Connection {
    /// What it sent, once script and connection have ended.
    #[track_caller]
    pub fn seen(&self) -> Seen {
        let over = self.transcript.wait(LIMIT, |t| t.over.clone());
        match over {
            Some(Ok(())) => self.transcript.read(Transcript::seen),
            Some(Err(panic)) => panic!("the backend's script {}: {panic}", self.index),
            None => panic!("the backend's script {} does not end: {:?}", self.index, self.seen_so_far()),
        }
    }

    pub fn seen_so_far(&self) -> Seen {
        self.transcript.read(Transcript::seen)
    }

    /// Waits until what was seen is as `test` wants it.
    #[track_caller]
    pub fn seen_when(&self, what: &str, test: impl Fn(&Seen) -> bool) -> Seen {
        let found = self.transcript.wait(DEADLINE, |t| Some(t.seen()).filter(&test));
        found.unwrap_or_else(|| panic!("the backend never saw {what}: {:?}", self.seen_so_far()))
    }
}

// Scripts. Those with parameters return one.

/// Sends all data back, answers Ping and Close, and then closes first as a server should.
pub async fn echo(peer: &mut Peer) {
    peer.accept_websocket().await;
    echo_on(peer).await;
}

/// As [`echo`], after the handshake.
pub async fn echo_on(peer: &mut Peer) {
    while let Ok(frame) = peer.next_frame(LIMIT).await {
        match frame.opcode {
            CLOSE => {
                peer.answer_close().await;
                return;
            }
            PING => _ = peer.send(&Frame::new(PONG, &frame.payload)).await,
            PONG => {}
            _ => _ = peer.send(&frame.again()).await,
        }
    }
}

/// Accepts TCP and never says a word.
pub async fn silent(peer: &mut Peer) {
    peer.transcript_until_end(LIMIT).await;
}

/// A 101 with another key's answer.
pub async fn wrong_accept(peer: &mut Peer) {
    let request = peer.read_head().await;
    let wrong = "ICX+Yqv66kxgM0FcWaLWlFLwTAI=";
    peer.reply(Message::switching(&request).set("Sec-WebSocket-Accept", wrong)).await;
    peer.until_end().await;
}

/// A 101 that lacks a field: "Upgrade", "Connection" or "Sec-WebSocket-Accept".
pub fn switching_without(field: &'static str) -> impl AsyncFn(&mut Peer) + Send + Sync + 'static {
    async move |peer: &mut Peer| {
        let request = peer.read_head().await;
        peer.reply(Message::switching(&request).without(field)).await;
        peer.until_end().await;
    }
}

/// Any response instead of a 101. The connection stays open until the other side closes it.
pub fn answers(response: Message) -> impl AsyncFn(&mut Peer) + Send + Sync + 'static {
    async move |peer: &mut Peer| {
        peer.read_head().await;
        peer.reply(response.clone()).await;
        peer.until_end().await;
    }
}

/// 200 with a short body, as from a server that ignores Upgrade.
pub async fn ok_instead_of_101(peer: &mut Peer) {
    answers(Message::status(200, "OK", "hello"))(peer).await;
}

/// Its first frame is in the same segment as the 101; then as [`echo`].
pub async fn frame_with_101(peer: &mut Peer) {
    let request = peer.read_head().await;
    let first = Frame::text("first").bytes(None);
    peer.reply(Message::switching(&request).then(first)).await;
    echo_on(peer).await;
}

/// RST after `sent` of the bytes of a text frame of `size`.
pub fn rst_mid_frame(size: usize, sent: usize) -> impl AsyncFn(&mut Peer) + Send + Sync + 'static {
    async move |peer: &mut Peer| {
        peer.accept_websocket().await;
        let bytes = Frame::new(super::ws::TEXT, vec![b'x'; size]).bytes(None);
        peer.send_bytes(&bytes[..sent]).await;
        // A RST overtakes what the other kernel has not been read out of yet: let it be taken first.
        peer.sent_is_acked().await;
        peer.rst();
    }
}

/// FIN after its first frame, without a Close.
pub async fn fin_without_close(peer: &mut Peer) {
    peer.accept_websocket().await;
    peer.send_text("a").await;
    peer.fin().await;
    peer.until_end().await;
}

/// Close and FIN in a row, waiting for nothing.
pub async fn close_and_fin(peer: &mut Peer) {
    peer.accept_websocket().await;
    peer.send_text("a").await;
    peer.send_close(1000, "bye").await;
    peer.fin().await;
    peer.until_end().await;
}

/// FIN at once after the handshake, but goes on reading.
pub async fn half_close(peer: &mut Peer) {
    peer.accept_websocket().await;
    peer.fin().await;
    peer.until_end().await;
}

/// Reads nothing until the gate opens: with a small `recv_buffer` its window is soon zero. Then as [`echo`].
pub fn zero_window(gate: super::Gate) -> impl AsyncFn(&mut Peer) + Send + Sync + 'static {
    async move |peer: &mut Peer| {
        peer.accept_websocket().await;
        gate.passed().await;
        echo_on(peer).await;
    }
}

/// Only the first connection follows the script: those after it are accepted, and get no answer.
pub fn answers_once<F>(script: F) -> impl AsyncFn(&mut Peer) + Send + Sync + 'static
where
    F: AsyncFn(&mut Peer) + Send + Sync + 'static,
{
    async move |peer: &mut Peer| {
        if peer.index() == 0 {
            return script(peer).await;
        }
        peer.read_head().await;
        peer.until_end().await;
    }
}

/// Reads everything and never answers a Close.
pub async fn never_answers_close(peer: &mut Peer) {
    peer.accept_websocket().await;
    peer.transcript_until_end(LIMIT).await;
}

/// Answers a Close after a while.
pub fn answers_close_after(delay: Duration) -> impl AsyncFn(&mut Peer) + Send + Sync + 'static {
    async move |peer: &mut Peer| {
        peer.accept_websocket().await;
        peer.read_close().await;
        tokio::time::sleep(delay).await;
        peer.answer_close().await;
        peer.fin().await;
        peer.until_end().await;
    }
}

/// A text frame, byte by byte, one each millisecond; then a Close.
pub async fn drip(peer: &mut Peer) {
    peer.accept_websocket().await;
    let bytes = Frame::text("drop by drop").bytes(None);
    peer.drip(&bytes, 1, Duration::from_millis(1)).await;
    peer.send_close(1000, "").await;
    let answer = peer.next_frame(DEADLINE).await;
    assert_ne!(answer, Err(End::Timeout));
}
