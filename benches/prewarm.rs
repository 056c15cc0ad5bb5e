//! What a client waits for its 101, with and without connections opened ahead (`pool.prewarm`), to a backend that is a round trip away.
//!
//! Between tidegate and the backend is a relay in user space that holds all bytes back for 10 ms, in each direction. Its kernel takes connections
//! at once, so it also lets a connection's first bytes begin their way only a round trip after that was accepted, as a TCP handshake
//! would have it. A handshake of TLS needs no such help: its round trips are bytes (once tidegate speaks TLS to a backend, it is
//! another row here).
//!
//! Not here: throughput, and many clients at once (`compare`).

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// In each direction.
const DELAY: Duration = Duration::from_millis(10);

const CLIENTS: usize = 200;

/// Between one client and the next: for what was used to be replaced.
const PAUSE: Duration = Duration::from_millis(25);

const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        println!("| transport | `pool.prewarm` | p50 | p99 |\n|---|---|---|---|");
        for prewarm in [0, 8] {
            let took = run(prewarm).await?;
            let of = |share: usize| took[(took.len() - 1) * share / 100].as_secs_f64() * 1e3;
            println!("| TCP | {prewarm} | {:.1} ms | {:.1} ms |", of(50), of(99));
        }
        Ok(())
    })
}

/// How long each client waited from its connect to its 101, sorted.
async fn run(prewarm: usize) -> Result<Vec<Duration>> {
    // All of it ends with these.
    let mut tasks = JoinSet::new();
    let backend = TcpListener::bind("127.0.0.1:0").await?;
    let behind = backend.local_addr()?;
    tasks.spawn(accept(backend, |stream| async move { answer(stream).await }));
    let relay = TcpListener::bind("127.0.0.1:0").await?;
    let before = relay.local_addr()?;
    tasks.spawn(accept(relay, move |stream| delay(stream, behind)));
    let tidegate = Tidegate::start(prewarm, before)?;
    // For those that are opened ahead of the first.
    sleep(Duration::from_millis(500)).await;
    let mut took = Vec::with_capacity(CLIENTS);
    for _ in 0..CLIENTS {
        took.push(timeout(Duration::from_secs(10), visit(tidegate.address)).await??);
        sleep(PAUSE).await;
    }
    took.sort_unstable();
    Ok(took)
}

async fn accept<F>(listener: TcpListener, serve: impl Fn(TcpStream) -> F)
where
    F: Future<Output = std::io::Result<()>> + Send + 'static,
{
    let mut tasks = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let _ = stream.set_nodelay(true);
        tasks.spawn(serve(stream));
        while tasks.try_join_next().is_some() {}
    }
}

/// A 101 for whoever asks, and then nothing until it ends.
async fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    let mut read = Vec::new();
    while !read.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut read).await? == 0 {
            return Ok(());
        }
    }
    let accept = derive_accept_key(KEY.as_bytes());
    let head = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    while stream.read_buf(&mut read).await? > 0 {
        read.clear();
    }
    Ok(())
}

async fn delay(stream: TcpStream, to: SocketAddr) -> std::io::Result<()> {
    let established = Instant::now() + 2 * DELAY;
    let onward = TcpStream::connect(to).await?;
    onward.set_nodelay(true)?;
    let ((a_read, a_write), (b_read, b_write)) = (stream.into_split(), onward.into_split());
    tokio::try_join!(pass(a_read, b_write, established), pass(b_read, a_write, established))?;
    Ok(())
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, established: Instant) -> std::io::Result<()> {
    let (queue, mut held) = mpsc::channel::<(Instant, Vec<u8>)>(1024);
    let read = async move {
        loop {
            let mut bytes = Vec::with_capacity(16 * 1024);
            let count = from.read_buf(&mut bytes).await?;
            let due = Instant::now().max(established) + DELAY;
            if queue.send((due, bytes)).await.is_err() || count == 0 {
                return std::io::Result::Ok(());
            }
        }
    };
    let write = async move {
        while let Some((due, bytes)) = held.recv().await {
            sleep_until(due).await;
            if bytes.is_empty() {
                return to.shutdown().await;
            }
            to.write_all(&bytes).await?;
        }
        Ok(())
    };
    tokio::try_join!(read, write)?;
    Ok(())
}

async fn visit(address: SocketAddr) -> std::io::Result<Duration> {
    let begun = Instant::now();
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let request = format!(
        "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut read = Vec::new();
    while !read.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut read).await? == 0 {
            break;
        }
    }
    let took = begun.elapsed();
    if !read.starts_with(b"HTTP/1.1 101 ") {
        return Err(std::io::Error::other(String::from_utf8_lossy(&read).into_owned()));
    }
    stream.shutdown().await?;
    Ok(took)
}

/// Killed when it is dropped: its sessions are over.
struct Tidegate {
    child: Child,
    address: SocketAddr,
    _config: tempfile::NamedTempFile,
}

impl Tidegate {
    fn start(prewarm: usize, backend: SocketAddr) -> Result<Self> {
        let mut config = tempfile::NamedTempFile::with_suffix(".toml")?;
        write!(
            config,
            "listen.address = '127.0.0.1:0'\nlisten.workers = 1\nadmin.address = 'off'\nupstream.address = '{backend}'\n\
             pool.prewarm = {prewarm}\nlog.format = 'json'\nlog.filter = 'info'\n"
        )?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
        command
            .args(["run", "-c"])
            .arg(config.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let outputs: [Option<Box<dyn std::io::Read + Send>>; 2] =
            [child.stdout.take().map(|it| Box::new(it) as _), child.stderr.take().map(|it| Box::new(it) as _)];
        let (send, found) = std::sync::mpsc::channel();
        for output in outputs.into_iter().flatten() {
            let send = send.clone();
            // Read to its end, so that it never waits for us.
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(std::result::Result::ok) {
                    let Ok(line) = serde_json::from_str::<serde_json::Value>(&line) else { continue };
                    if line["message"] == "listening"
                        && let Some(address) = line["address"].as_str().and_then(|address| address.parse().ok())
                    {
                        let _ = send.send(address);
                    }
                }
            });
        }
        let address = found.recv_timeout(Duration::from_secs(10));
        let mut started = Self { child, address: SocketAddr::from(([0, 0, 0, 0], 0)), _config: config };
        started.address = address?;
        Ok(started)
    }
}

impl Drop for Tidegate {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
