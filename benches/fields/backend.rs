//! The backend that all five reports have in common: by default one poller and a backlog of 100, and a handler that takes 100 ms for a
//! result and writes it in three parts. While it works it reads nothing, as a program that computes.
//!
//! What a client says first decides what it gets: see [`Ask`]. On standard output it says where it listens, and then, whenever
//! something has changed, what it has seen so far.

use std::{
    io::{self, ErrorKind, Write as _},
    net::{SocketAddr, TcpListener as StdListener},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use futures_util::{SinkExt as _, StreamExt as _, stream::FuturesUnordered};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use socket2::{Domain, Socket, Type};
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpListener, TcpStream},
    runtime,
    time::{Instant, sleep, timeout_at},
};
use tokio_tungstenite::{
    WebSocketStream, accept_async_with_config,
    tungstenite::{
        self, Message,
        protocol::{
            WebSocketConfig,
            frame::{
                Frame,
                coding::{Data, OpCode},
            },
        },
    },
};
use tokio_util::task::TaskTracker;

/// From the question to the first part, and between two parts: 100 ms in all.
const WORK: Duration = Duration::from_millis(80);
const PART: Duration = Duration::from_millis(10);
pub const PARTS: usize = 3;

const PART_BYTES: usize = 256;
const READ_BUFFER_BYTES: usize = 4096;

/// How often it says what it has seen.
const SAYS: Duration = Duration::from_millis(50);

#[derive(Debug, clap::Args)]
pub struct Options {
    #[arg(long)]
    address: SocketAddr,
    /// For `listen()`; the kernel clamps it to `net.core.somaxconn`
    #[arg(long)]
    backlog: u16,
    /// Threads, each of which accepts and serves
    #[arg(long)]
    pollers: usize,
    /// Between the last frame of a session and `close()`; what comes meanwhile is read and thrown away
    #[arg(long)]
    close_delay_ms: u64,
}

/// What a client may say first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// A result, and then the client ends the session.
    Result,
    /// A result, behind which the backend ends the session, and waits for no answer.
    Last,
}

impl Ask {
    pub fn text(self) -> &'static str {
        match self {
            Self::Result => "result",
            Self::Last => "last",
        }
    }
}

/// What it has seen so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    pub accepted: u64,
    /// Of these, not over.
    pub open: u64,
    /// Results that were written as a whole, and those that were not, because the session was gone.
    pub written: u64,
    pub failed_writes: u64,
}

#[derive(Debug, Default)]
struct Counts {
    accepted: AtomicU64,
    over: AtomicU64,
    written: AtomicU64,
    failed_writes: AtomicU64,
}

impl Counts {
    fn seen(&self) -> Seen {
        // In this order a session is never over before it was accepted.
        let over = self.over.load(Ordering::SeqCst);
        let accepted = self.accepted.load(Ordering::SeqCst);
        Seen {
            accepted,
            open: accepted - over,
            written: self.written.load(Ordering::SeqCst),
            failed_writes: self.failed_writes.load(Ordering::SeqCst),
        }
    }
}

/// So small that ten thousand sessions are no matter of memory.
pub fn socket_config() -> WebSocketConfig {
    WebSocketConfig::default().read_buffer_size(READ_BUFFER_BYTES).write_buffer_size(0)
}

pub fn main(options: &Options) -> anyhow::Result<()> {
    let socket = Socket::new(Domain::for_address(options.address), Type::STREAM.nonblocking(), None)?;
    socket.bind(&options.address.into())?;
    socket.listen(options.backlog.into())?;
    let listener = StdListener::from(socket);
    writeln!(io::stdout(), "{}", listener.local_addr()?)?;

    let counts = Arc::new(Counts::default());
    let close_delay = Duration::from_millis(options.close_delay_ms);
    for poller in 0..options.pollers {
        let (listener, counts) = (listener.try_clone()?, Arc::clone(&counts));
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let poll = move || runtime.block_on(poll(listener, close_delay, &counts));
        thread::Builder::new().name(format!("poller-{poller}")).spawn(poll)?;
    }
    let mut said = Seen::default();
    loop {
        thread::sleep(SAYS);
        let seen = counts.seen();
        if seen != said {
            writeln!(io::stdout(), "{}", serde_json::to_string(&seen)?)?;
            said = seen;
        }
    }
}

async fn poll(listener: StdListener, close_delay: Duration, counts: &Arc<Counts>) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let tasks = TaskTracker::new();
    loop {
        // Who fails here is missed by its client, which counts it.
        let Ok((stream, _)) = listener.accept().await else { continue };
        counts.accepted.fetch_add(1, Ordering::SeqCst);
        let counts = Arc::clone(counts);
        tasks.spawn(async move {
            // An error is the client's to count, or was counted.
            let _ = serve(stream, close_delay, &counts).await;
            counts.over.fetch_add(1, Ordering::SeqCst);
        });
    }
}

async fn serve(stream: TcpStream, close_delay: Duration, counts: &Counts) -> tungstenite::Result<()> {
    stream.set_nodelay(true)?;
    let mut socket = accept_async_with_config(stream, Some(socket_config())).await?;
    let ended = match socket.next().await.transpose()? {
        Some(Message::Text(text)) if text.starts_with('{') => calls(&mut socket, text.to_string(), counts).await,
        Some(Message::Text(text)) => session(&mut socket, text.as_str() == Ask::Last.text(), counts).await,
        _ => Ok(()),
    };
    let stream = socket.into_inner();
    if ended.is_ok() {
        hold(stream, close_delay).await;
    }
    ended
}

/// One result.
async fn session(socket: &mut WebSocketStream<TcpStream>, ends: bool, counts: &Counts) -> tungstenite::Result<()> {
    sleep(WORK).await;
    for part in 0..PARTS {
        if part > 0 {
            sleep(PART).await;
        }
        let written = socket.send(Message::binary(vec![b'x'; PART_BYTES])).await;
        if written.is_err() {
            counts.failed_writes.fetch_add(1, Ordering::SeqCst);
            return written;
        }
    }
    counts.written.fetch_add(1, Ordering::SeqCst);
    if ends {
        return socket.close(None).await;
    }
    while let Some(message) = socket.next().await {
        message?;
    }
    Ok(())
}

/// Any number of JSON-RPC calls at once. An answer is one message in three frames: parts of others must not come in between.
async fn calls(socket: &mut WebSocketStream<TcpStream>, first: String, counts: &Counts) -> tungstenite::Result<()> {
    let work = async |call: String| {
        sleep(WORK + 2 * PART).await;
        let call: Value = serde_json::from_str(&call).unwrap_or_default();
        serde_json::json!({ "jsonrpc": "2.0", "id": call["id"], "result": "x".repeat(PART_BYTES) }).to_string()
    };
    let mut under_way = FuturesUnordered::new();
    under_way.push(work(first));
    loop {
        let answer = tokio::select! {
            message = socket.next() => {
                match message.transpose()? {
                    Some(Message::Text(text)) => under_way.push(work(text.to_string())),
                    Some(_) => {}
                    None => return Ok(()),
                }
                continue;
            }
            Some(answer) = under_way.next() => answer,
        };
        for (part, bytes) in answer.as_bytes().chunks(answer.len().div_ceil(PARTS)).enumerate() {
            let data = if part == 0 { Data::Text } else { Data::Continue };
            let frame = Frame::message(bytes.to_vec(), OpCode::Data(data), part + 1 == PARTS);
            let written = socket.send(Message::Frame(frame)).await;
            if written.is_err() {
                counts.failed_writes.fetch_add(1, Ordering::SeqCst);
                return written;
            }
        }
        counts.written.fetch_add(1, Ordering::SeqCst);
    }
}

/// `close()` after a delay, or at once when there is none.
async fn hold(mut stream: TcpStream, delay: Duration) {
    let until = Instant::now() + delay;
    let mut buffer = [0; READ_BUFFER_BYTES];
    if delay.is_zero() {
        return;
    }
    loop {
        match timeout_at(until, stream.read(&mut buffer)).await {
            // Also after the peer's FIN: the report's server waited in any case.
            Ok(Ok(0)) => return tokio::time::sleep_until(until).await,
            Ok(Ok(_)) => {}
            Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}
