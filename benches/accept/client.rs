//! The clients: connects by a schedule, the session that saturates its worker, and the sessions that talk meanwhile.
//!
//! All times are from the moment at which something was to happen, not from when this program came to it (open loop): who is
//! late because the machine is busy is late.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream as StdStream},
    num::NonZero,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::ensure;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    runtime,
    task::JoinSet,
    time::{sleep_until, timeout},
};

use crate::{
    process::{is_asked, say},
    proxy::now,
    wire::{BINARY, CLOSE, CLOSE_NORMAL, Connection, Role, frame},
};

/// The key of the example in RFC 6455 1.3.
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
/// What takes longer has failed.
const STEP_LIMIT: Duration = Duration::from_secs(30);
/// Bytes of one write of the saturating session.
const FLOOD_BYTES: usize = 64 * 1024;
const STACK_BYTES: usize = 128 * 1024;

/// Connects, by a schedule.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub enum Connects {
    /// All in the same moment; they stay.
    AtOnce { count: usize },
    /// At random moments, `per_second` on average; each is closed in order once it was answered.
    Steady { per_second: f64, seconds: f64, seed: u64 },
}

/// One connect; microseconds since it was to begin.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Sample {
    pub id: u32,
    /// The client's port.
    pub port: u16,
    /// When it was to begin, in microseconds since 1970.
    pub at: u64,
    /// `connect()` was called.
    pub begun: u64,
    /// The kernel's handshake was done.
    pub connected: u64,
    /// The 101 was read.
    pub upgraded: u64,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Connected {
    pub samples: Vec<Sample>,
    pub failures: u64,
    pub first_error: Option<String>,
}

/// A threads' count of what it did.
#[derive(Debug, Default)]
struct Results(Mutex<Connected>);

impl Results {
    fn add(&self, result: io::Result<Sample>) {
        let mut results = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(sample) => results.samples.push(sample),
            Err(error) => {
                results.failures += 1;
                results.first_error.get_or_insert_with(|| error.to_string());
            }
        }
    }

    fn take(&self) -> Connected {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Says that it is ready, begins when it is asked, and says how it went.
pub fn connects(address: SocketAddr, connects: Connects) -> anyhow::Result<()> {
    say(&"ready")?;
    ensure!(is_asked()?, "nobody asks");
    match connects {
        Connects::AtOnce { count } => at_once(address, count),
        Connects::Steady { per_second, seconds, seed } => steady(address, per_second, seconds, seed),
    }
}

fn request(path: &str, address: SocketAddr, id: u32) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-Request-Id: {id}\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n\r\n"
    )
}

fn is_answer(head: &[u8]) -> io::Result<bool> {
    if !head.ends_with(b"\r\n\r\n") {
        return Ok(false);
    }
    if head.starts_with(b"HTTP/1.1 101 ") {
        return Ok(true);
    }
    let line = String::from_utf8_lossy(head).lines().next().unwrap_or_default().to_owned();
    Err(io::Error::other(format!("not upgraded: {line}")))
}

fn at_once(address: SocketAddr, count: usize) -> anyhow::Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let results = Results::default();
        let (zero, at) = (Instant::now(), now());
        let mut tasks = JoinSet::new();
        for id in 0..u32::try_from(count)? {
            tasks.spawn(async move {
                let connect = async {
                    let begun = micros(zero.elapsed());
                    let mut stream = TcpStream::connect(address).await?;
                    let (connected, port) = (micros(zero.elapsed()), stream.local_addr()?.port());
                    stream.write_all(request("/", address, id).as_bytes()).await?;
                    let mut head = Vec::with_capacity(512);
                    while !is_answer(&head)? {
                        if stream.read_buf(&mut head).await? == 0 {
                            return Err(io::ErrorKind::UnexpectedEof.into());
                        }
                    }
                    let sample = Sample { id, port, at, begun, connected, upgraded: micros(zero.elapsed()) };
                    Ok((stream, sample))
                };
                timeout(STEP_LIMIT, connect).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            });
        }
        let mut open = Vec::with_capacity(count);
        while let Some(result) = tasks.join_next().await {
            match result? {
                Ok((stream, sample)) => {
                    open.push(stream);
                    results.add(Ok(sample));
                }
                Err(error) => results.add(Err(error)),
            }
        }
        say(&results.take())?;
        // They stay until the leg ends.
        is_asked()?;
        drop(open);
        Ok(())
    })
}

/// A thread waits for each moment: it is woken by the kernel alone, to the microsecond, and no other connect is in its way.
fn steady(address: SocketAddr, per_second: f64, seconds: f64, seed: u64) -> anyhow::Result<()> {
    // Random, so that no rhythm of the machine meets all of them or none.
    let mut random = StdRng::seed_from_u64(seed);
    let mut moments = Vec::new();
    let mut moment = 0.0;
    loop {
        moment -= (1.0 - random.random::<f64>()).ln() / per_second;
        if moment > seconds {
            break;
        }
        moments.push(Duration::from_secs_f64(moment));
    }
    let (moments, results, next) = (Arc::new(moments), Arc::new(Results::default()), Arc::new(AtomicUsize::new(0)));
    let (begin, at) = (Instant::now(), now());
    // As many as may be under way at once without one being late for the next: a quarter of a second's.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small and positive")]
    let count = (per_second / 4.0).ceil() as usize + 8;
    let mut threads = Vec::with_capacity(count);
    for _ in 0..count {
        let (moments, results, next) = (Arc::clone(&moments), Arc::clone(&results), Arc::clone(&next));
        let connects = move || {
            // Its own timers: 50 us by default.
            let _ = rustix::thread::set_current_timer_slack(NonZero::new(1));
            loop {
                let nth = next.fetch_add(1, Ordering::Relaxed);
                let Some(&moment) = moments.get(nth) else { return };
                let id = u32::try_from(nth).unwrap_or(u32::MAX);
                thread::sleep((begin + moment).saturating_duration_since(Instant::now()));
                results.add(connect_and_close(address, id, begin + moment, at + micros(moment)));
            }
        };
        threads.push(thread::Builder::new().stack_size(STACK_BYTES).spawn(connects)?);
    }
    for thread in threads {
        ensure!(thread.join().is_ok(), "a thread panicked");
    }
    say(&results.take())
}

fn connect_and_close(address: SocketAddr, id: u32, moment: Instant, at: u64) -> io::Result<Sample> {
    let elapsed = || micros(moment.elapsed());
    let begun = elapsed();
    let mut stream = StdStream::connect(address)?;
    let connected = elapsed();
    stream.set_read_timeout(Some(STEP_LIMIT))?;
    stream.set_nodelay(true)?;
    stream.write_all(request("/", address, id).as_bytes())?;
    read_answer(&mut stream)?;
    let sample = Sample { id, port: stream.local_addr()?.port(), at, begun, connected, upgraded: elapsed() };
    stream.write_all(&frame(Role::Client, CLOSE, &CLOSE_NORMAL))?;
    io::copy(&mut stream, &mut io::sink())?;
    Ok(sample)
}

fn read_answer(stream: &mut StdStream) -> io::Result<()> {
    let mut head = Vec::with_capacity(512);
    let mut buffer = [0; 512];
    while !is_answer(&head)? {
        match stream.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => head.extend(&buffer[..length]),
        }
    }
    Ok(())
}

/// The session that saturates its worker.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Flood {
    /// Payload of a frame.
    pub bytes: usize,
    /// `SO_SNDBUF`; 0: the kernel's choice, up to `net.ipv4.tcp_wmem`.
    pub send_buffer: usize,
}

/// One session that sends as fast as it is read. Asked, it says how many bytes it has sent.
pub fn flood(address: SocketAddr, flood: Flood) -> anyhow::Result<()> {
    let Flood { bytes, send_buffer } = flood;
    let mut stream = StdStream::connect(address)?;
    // A client elsewhere takes none of the proxy's processors. This one does, for as long as its kernel takes its bytes, and whoever
    // is to be woken there waits for it: milliseconds when its buffer holds megabytes.
    if send_buffer > 0 {
        socket2::SockRef::from(&stream).set_send_buffer_size(send_buffer)?;
    }
    stream.write_all(request("/sink", address, 0).as_bytes())?;
    read_answer(&mut stream)?;
    let message = frame(Role::Client, BINARY, &vec![b'x'; bytes]);
    let messages = message.repeat(FLOOD_BYTES.div_ceil(message.len()));
    let sent = Arc::new(AtomicU64::new(0));
    let port = stream.local_addr()?.port();
    let (count, is_broken) = (Arc::clone(&sent), Arc::new(AtomicBool::new(false)));
    let broken = Arc::clone(&is_broken);
    thread::Builder::new().name("flood".to_owned()).spawn(move || {
        while stream.write_all(&messages).is_ok() {
            count.fetch_add(messages.len() as u64, Ordering::Relaxed);
        }
        broken.store(true, Ordering::Relaxed);
    })?;
    say(&port)?;
    while is_asked()? {
        ensure!(!is_broken.load(Ordering::Relaxed), "the saturating session has ended");
        say(&sent.load(Ordering::Relaxed))?;
    }
    Ok(())
}

/// Sessions of the closed loop.
const ECHO_CONNECTIONS: usize = 64;

/// Sessions that each send a message when the one before has come back. Asked, it says how many have.
pub fn echo(address: SocketAddr, bytes: usize) -> anyhow::Result<()> {
    let done = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&done);
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let mut connections = Vec::with_capacity(ECHO_CONNECTIONS);
    for _ in 0..ECHO_CONNECTIONS {
        connections.push(runtime.block_on(async { timeout(STEP_LIMIT, Connection::open(address)).await })??);
    }
    thread::Builder::new().name("echo".to_owned()).spawn(move || {
        runtime.block_on(async {
            let message: Arc<[u8]> = frame(Role::Client, BINARY, &vec![b'x'; bytes]).into();
            let mut tasks = JoinSet::new();
            for mut connection in connections {
                let (message, count) = (Arc::clone(&message), Arc::clone(&count));
                tasks.spawn(async move {
                    while connection.echo(&message, bytes).await.is_ok() {
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            tasks.join_all().await;
        });
    })?;
    say(&"ready")?;
    while is_asked()? {
        say(&done.load(Ordering::Relaxed))?;
    }
    Ok(())
}

/// Sessions that each send a message `per_second` times and get it back.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Talk {
    pub sessions: usize,
    pub per_second: f64,
    pub bytes: usize,
}

/// Of one interval between two questions.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Talked {
    /// Microseconds from when it was to be sent until it was back, of each message.
    pub latencies: Vec<u64>,
    pub failures: u64,
    pub first_error: Option<String>,
}

/// Opens the sessions, says so, and from then on says how they fare.
pub fn talk(address: SocketAddr, talk: Talk) -> anyhow::Result<()> {
    let talked = Arc::new(Mutex::new(Talked::default()));
    let note = Arc::clone(&talked);
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let (ready, is_ready) = std::sync::mpsc::channel();
    thread::Builder::new().name("talk".to_owned()).spawn(move || {
        let result = runtime.block_on(talk_on(address, talk, &note, &ready));
        if let Err(error) = result {
            let mut talked = note.lock().unwrap_or_else(PoisonError::into_inner);
            talked.failures += 1;
            talked.first_error.get_or_insert_with(|| error.to_string());
        }
    })?;
    is_ready.recv()?;
    say(&"ready")?;
    while is_asked()? {
        let talked = std::mem::take(&mut *talked.lock().unwrap_or_else(PoisonError::into_inner));
        say(&talked)?;
    }
    Ok(())
}

async fn talk_on(
    address: SocketAddr,
    talk: Talk,
    talked: &Arc<Mutex<Talked>>,
    ready: &std::sync::mpsc::Sender<()>,
) -> anyhow::Result<()> {
    let message: Arc<[u8]> = frame(Role::Client, BINARY, &vec![b'x'; talk.bytes]).into();
    let mut connections = Vec::with_capacity(talk.sessions);
    for _ in 0..talk.sessions {
        connections.push(timeout(STEP_LIMIT, Connection::open(address)).await??);
    }
    let interval = Duration::from_secs_f64(1.0 / talk.per_second);
    let begin = tokio::time::Instant::now() + interval;
    let mut tasks = JoinSet::new();
    for (nth, mut connection) in connections.into_iter().enumerate() {
        let (message, talked) = (Arc::clone(&message), Arc::clone(talked));
        let mut at =
            begin + interval.mul_f64(f64::from(u32::try_from(nth)?) / f64::from(u32::try_from(talk.sessions)?));
        tasks.spawn(async move {
            loop {
                sleep_until(at).await;
                let result = connection.echo(&message, talk.bytes).await;
                let took = micros(at.elapsed());
                let mut talked = talked.lock().unwrap_or_else(PoisonError::into_inner);
                if let Err(error) = result {
                    talked.failures += 1;
                    talked.first_error.get_or_insert_with(|| error.to_string());
                    return;
                }
                talked.latencies.push(took);
                at += interval;
            }
        });
    }
    ready.send(())?;
    tasks.join_all().await;
    Ok(())
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
