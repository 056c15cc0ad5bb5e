//! The backend: one thread echoes every message; what comes to `/sink` is read by a thread of its own and thrown away.
//!
//! It notes when it accepted and answered each handshake that has an X-Request-Id, so that a slow handshake can be told
//! apart into the proxy's part and its own.

use std::{
    collections::HashMap,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream as StdStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use serde::{Deserialize, Serialize};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    runtime,
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::task::TaskTracker;

use crate::{
    process::{is_asked, say},
    proxy::now,
    wire::{BINARY, CLOSE, CLOSE_NORMAL, Connection, Request, Role, frame},
};

/// It must never be the queue that overflows.
const BACKLOG: u32 = 65_535;
const HEAD_BYTES_MAX: usize = 16 * 1024;
const SINK_BYTES: usize = 256 * 1024;

/// A handshake, in microseconds since 1970.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Handshake {
    pub accepted: u64,
    /// Its whole request was there.
    pub read: u64,
    pub answered: u64,
}

/// By request id.
pub type Handshakes = HashMap<u32, Handshake>;

/// Frames that were sent, by their payload's length: prepared once.
type Prepared = Arc<Mutex<HashMap<usize, Arc<[u8]>>>>;

pub fn main() -> anyhow::Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = runtime.block_on(async {
        let socket = TcpSocket::new_v4()?;
        socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
        socket.listen(BACKLOG)
    })?;
    let address: SocketAddr = listener.local_addr()?;
    let handshakes = Arc::new(Mutex::new(Handshakes::new()));
    let noted = Arc::clone(&handshakes);
    thread::Builder::new().name("echo".to_owned()).spawn(move || runtime.block_on(serve_all(listener, noted)))?;
    say(&address)?;
    while is_asked()? {
        let handshakes = std::mem::take(&mut *handshakes.lock().unwrap_or_else(PoisonError::into_inner));
        say(&handshakes)?;
    }
    Ok(())
}

async fn serve_all(listener: TcpListener, handshakes: Arc<Mutex<Handshakes>>) {
    let prepared = Prepared::default();
    let tasks = TaskTracker::new();
    loop {
        // Who fails here is missed by its client, which counts it.
        let Ok((stream, _)) = listener.accept().await else { continue };
        let accepted = now();
        let (prepared, handshakes) = (Arc::clone(&prepared), Arc::clone(&handshakes));
        tasks.spawn(async move { serve(stream, accepted, prepared, handshakes).await });
    }
}

async fn serve(
    stream: TcpStream,
    accepted: u64,
    prepared: Prepared,
    handshakes: Arc<Mutex<Handshakes>>,
) -> io::Result<()> {
    let head = head(&stream).await?;
    let read = now();
    if head.starts_with("GET /sink ") {
        let stream = stream.into_std()?;
        thread::Builder::new().name("sink".to_owned()).spawn(move || sink(stream))?;
        return Ok(());
    }
    let Request::Session(mut connection) = Connection::accept(stream).await? else { return Ok(()) };
    if let Some(id) = value(&head, "x-request-id").and_then(|id| id.parse().ok()) {
        let handshake = Handshake { accepted, read, answered: now() };
        handshakes.lock().unwrap_or_else(PoisonError::into_inner).insert(id, handshake);
    }
    while let Some(received) = connection.next().await? {
        if received.opcode == CLOSE {
            return connection.closed(&frame(Role::Backend, CLOSE, &CLOSE_NORMAL)).await;
        }
        let message = {
            let mut prepared = prepared.lock().unwrap_or_else(PoisonError::into_inner);
            let make = |length: &usize| frame(Role::Backend, BINARY, &vec![b'x'; *length]).into();
            Arc::clone(prepared.entry(received.length).or_insert_with_key(make))
        };
        connection.write(&message).await?;
    }
    Ok(())
}

/// The request's head, left unread.
async fn head(stream: &TcpStream) -> io::Result<String> {
    let mut head = vec![0; HEAD_BYTES_MAX];
    loop {
        let length = stream.peek(&mut head).await?;
        if head[..length].windows(4).any(|four| four == b"\r\n\r\n") {
            return Ok(String::from_utf8_lossy(&head[..length]).into_owned());
        }
        if length == 0 || length == HEAD_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // Rare on loopback; the rest is about to come, and readiness can't tell.
        tokio::task::yield_now().await;
    }
}

/// Reads as fast as it can, in the cheapest way.
fn sink(mut stream: StdStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    let mut buffer = vec![0; SINK_BYTES];
    let length = stream.read(&mut buffer)?;
    let head = String::from_utf8_lossy(&buffer[..length]).into_owned();
    let key = value(&head, "sec-websocket-key").ok_or(io::ErrorKind::InvalidData)?;
    let accept = derive_accept_key(key.as_bytes());
    write!(
        stream,
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Accept: {accept}\r\n\r\n"
    )?;
    while stream.read(&mut buffer)? > 0 {}
    Ok(())
}

fn value<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = head.lines().filter_map(|line| line.split_once(':'));
    lines.find_map(|(key, value)| key.eq_ignore_ascii_case(name).then(|| value.trim()))
}
