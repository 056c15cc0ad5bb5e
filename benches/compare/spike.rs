//! Clients that come all at once: every `connect()` is issued before anything else is done, and nothing paces them. A client
//! upgrades, has one message echoed, does the Close handshake and waits for the FIN; or it sends a plain GET and reads the
//! whole answer. Once, or in waves, one each second.
//!
//! Times begin with a client's own `connect()`. Not here: retries. What fails once is a failure, of the kind that is reported.

#![expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::io::Errno;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::{
    net::TcpStream,
    task::{JoinSet, yield_now},
    time::{sleep_until, timeout_at},
};

use crate::{
    load::{Order, Outcome},
    watch::Watch,
    wire::{BINARY, CLOSE, CLOSE_NORMAL, Connection, Role, Stream, frame},
};

/// From the first `connect()`: who is not through by then has failed.
pub const LIMIT: Duration = Duration::from_mins(1);

/// Between waves.
const WAVE: Duration = Duration::from_secs(1);

/// Sessions at once: with two descriptors each, a proxy that may have 20,000 has some to spare.
const AT_ONCE: usize = 9_500;

/// What one client saw.
#[derive(Debug, Default)]
pub struct Seen {
    /// From its `connect()` to its 101, or to the end of the whole answer to a GET.
    pub admitted: Option<Duration>,
    pub echoed_at: Option<Instant>,
    /// None: an orderly end.
    pub failure: Option<String>,
}

#[derive(Debug, Clone)]
pub struct Script {
    pub address: SocketAddr,
    plain: bool,
    pub bytes: usize,
    pub message: Arc<[u8]>,
    pub close: Arc<[u8]>,
}

impl Script {
    pub fn new(order: &Order, plain: bool) -> Self {
        Self {
            address: order.address,
            plain,
            bytes: order.bytes,
            message: frame(Role::Client, BINARY, &vec![b'x'; order.bytes]).into(),
            close: frame(Role::Client, CLOSE, &CLOSE_NORMAL).into(),
        }
    }

    /// Issues `clients` connects in one go, and has the clients go on in `tasks`.
    pub async fn burst(&self, clients: usize, tasks: &mut JoinSet<Seen>) -> io::Result<()> {
        let address = SockAddr::from(self.address);
        let domain = Domain::for_address(self.address);
        let sockets: Vec<Socket> =
            (0..clients).map(|_| Socket::new(domain, Type::STREAM.nonblocking(), None)).collect::<io::Result<_>>()?;
        let begun = Instant::now();
        let connects: Vec<(Socket, Instant, io::Result<()>)> = sockets
            .into_iter()
            .map(|socket| {
                let begun = Instant::now();
                let connected = match socket.connect(&address) {
                    Err(error) if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) => Ok(()),
                    result => result,
                };
                (socket, begun, connected)
            })
            .collect();
        let deadline = begun + LIMIT;
        let streams: Vec<(Instant, io::Result<TcpStream>)> = connects
            .into_iter()
            .map(|(socket, begun, connected)| (begun, connected.and_then(|()| TcpStream::from_std(socket.into()))))
            .collect();
        // The runtime asks epoll before it polls the first client, and from then on is ahead of them. Else the first ones
        // found nothing ready and went behind all others: the slowest per cent would be this program's doing.
        yield_now().await;
        for (begun, stream) in streams {
            let script = self.clone();
            tasks.spawn(async move { script.client(stream, begun, deadline).await });
        }
        Ok(())
    }

    /// Everything after its `connect()`.
    async fn client(self, stream: io::Result<TcpStream>, begun: Instant, deadline: Instant) -> Seen {
        let mut seen = Seen::default();
        let mut stage = "connect";
        let session = async {
            let stream = stream?;
            stream.writable().await?;
            if let Some(error) = stream.take_error()? {
                return Err(error);
            }
            if self.plain {
                stage = "answer";
                Connection::get(stream, self.address).await?;
                seen.admitted = Some(begun.elapsed());
                return Ok(());
            }
            stage = "upgrade";
            stream.set_nodelay(true)?;
            let mut connection = Connection::upgrade(Stream::Plain(stream), self.address).await?;
            seen.admitted = Some(begun.elapsed());
            stage = "echo";
            connection.echo(&self.message, self.bytes).await?;
            seen.echoed_at = Some(Instant::now());
            stage = "close";
            connection.close(&self.close).await.map(drop)
        };
        let result = timeout_at(deadline.into(), session).await;
        match result.unwrap_or_else(|_| Err(io::Error::other(format!("not over after {} s", LIMIT.as_secs())))) {
            Ok(()) => {}
            Err(error) => seen.failure = Some(format!("{stage}: {error}")),
        }
        seen
    }
}

/// `clients` at once, and nothing before or after them.
pub async fn spike(order: &Order, clients: usize, plain: bool) -> anyhow::Result<Outcome> {
    let script = Script::new(order, plain);
    let mut tasks = JoinSet::new();
    let watch = Watch::begin(order)?;
    let begun = Instant::now();
    script.burst(clients, &mut tasks).await?;
    let issued = begun.elapsed();
    let seen = tasks.join_all().await;
    let mut outcome = watch.end(order).await?;
    outcome.insert("connects_issued_ms", ms(issued));
    if let Some(last) = seen.iter().filter_map(|seen| seen.echoed_at).max() {
        outcome.insert("last_echo_ms", ms(last - begun));
    }
    count(&mut outcome, seen);
    Ok(outcome)
}

/// A spike each second. One that would find too many of the earlier ones still there waits for them to end.
pub async fn waves(order: &Order, waves: u32, clients: usize) -> anyhow::Result<Outcome> {
    let script = Script::new(order, false);
    let mut tasks = JoinSet::new();
    let mut seen = Vec::new();
    let mut late = Duration::ZERO;
    let watch = Watch::begin(order)?;
    let begun = Instant::now();
    for wave in 0..waves {
        let due = begun + WAVE * wave;
        sleep_until(due.into()).await;
        while let Some(ended) = tasks.try_join_next() {
            seen.push(ended?);
        }
        while tasks.len() + clients > AT_ONCE {
            let Some(ended) = tasks.join_next().await else { break };
            seen.push(ended?);
        }
        late = late.max(due.elapsed());
        script.burst(clients, &mut tasks).await?;
    }
    seen.extend(tasks.join_all().await);
    let mut outcome = watch.end(order).await?;
    outcome.insert("late_ms", ms(late));
    count(&mut outcome, seen);
    Ok(outcome)
}

/// Success, failures by kind, and the times to the 101.
pub fn count(outcome: &mut Outcome, seen: Vec<Seen>) {
    let all = seen.len();
    let mut admitted: Vec<Duration> = seen.iter().filter_map(|seen| seen.admitted).collect();
    for failure in seen.into_iter().filter_map(|seen| seen.failure) {
        outcome.failures += 1;
        *outcome.errors.entry(failure).or_default() += 1;
    }
    outcome.count = all as u64 - outcome.failures;
    outcome.insert("success_percent", outcome.count as f64 / all as f64 * 100.0);
    admitted.sort_unstable();
    for (name, per_mille) in [("admitted_p50_ms", 500), ("admitted_p99_ms", 990), ("admitted_max_ms", 1000)] {
        if let Some(time) = quantile(&admitted, per_mille) {
            outcome.insert(name, ms(time));
        }
    }
}

/// Of what is sorted: the smallest value that so many of a thousand do not exceed.
pub fn quantile(sorted: &[Duration], per_mille: usize) -> Option<Duration> {
    sorted.get((sorted.len() * per_mille).div_ceil(1000).saturating_sub(1)).copied()
}

pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
