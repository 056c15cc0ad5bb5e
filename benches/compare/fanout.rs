//! A feed and thousands who watch it: what a message costs for each that gets it, and how long it is under way.

#![expect(clippy::cast_precision_loss, reason = "counts and times far below 2^52")]

use std::{
    cell::RefCell,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use tokio::{
    sync::broadcast::{self, error::RecvError},
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep},
};

use crate::{
    load::{Order, Outcome, limited},
    procfs::{Cpu, Memory, connections, device_drops},
    wire::{BINARY, CLOSE, CLOSE_NORMAL, Connection, FEED, Received, Role, frame},
};

/// What it says: so much, so many times in a second.
pub const BYTES: usize = 256;
pub const RATE: u32 = 100;

/// Of those that the backend has said and a connection has not taken yet; what is older is lost to it.
const BEHIND_MAX: usize = 1024;

/// The feed is silent until nobody has come to the backend for so long: those that listen would hold up who still connects.
const SILENCE: Duration = Duration::from_millis(500);

/// From the last watcher that came to the measuring.
pub const WARMUP: Duration = Duration::from_secs(2);

/// Delays are counted in steps of this, so many of them.
const STEP_US: u64 = 50;
const STEPS: usize = 400_000;

fn now_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

/// The backend's one feed, which all its connections send on.
#[derive(Debug, Clone)]
pub struct Feed {
    said: broadcast::Sender<Bytes>,
    /// When the last one came.
    joined_us: Arc<AtomicU64>,
}

impl Feed {
    pub fn new() -> Self {
        Self { said: broadcast::Sender::new(BEHIND_MAX), joined_us: Arc::default() }
    }

    /// Says something, for ever. Each message begins with when that was.
    pub async fn run(self) {
        let mut ticks = interval(Duration::from_secs(1) / RATE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let mut payload = vec![b'x'; BYTES];
        loop {
            ticks.tick().await;
            let silence = now_us().saturating_sub(self.joined_us.load(Ordering::Relaxed));
            if Duration::from_micros(silence) < SILENCE {
                continue;
            }
            payload[..8].copy_from_slice(&now_us().to_be_bytes());
            // Nobody may be there.
            let _ = self.said.send(frame(Role::Backend, BINARY, &payload).into());
        }
    }

    /// One connection of it, to its end.
    pub async fn serve(&self, mut connection: Connection) -> io::Result<()> {
        let mut said = self.said.subscribe();
        self.joined_us.store(now_us(), Ordering::Relaxed);
        loop {
            tokio::select! {
                received = connection.next() => match received? {
                    Some(Received { opcode: CLOSE, .. }) => {
                        return connection.closed(&frame(Role::Backend, CLOSE, &CLOSE_NORMAL)).await;
                    }
                    Some(_) => {}
                    None => return Ok(()),
                },
                message = said.recv() => match message {
                    Ok(message) => connection.write(&message).await?,
                    // It is missing at the watchers, and seen there.
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return Ok(()),
                },
            }
        }
    }
}

thread_local! {
    /// Of this program's one thread.
    static DELAYS: RefCell<Vec<u32>> = RefCell::new(vec![0; STEPS]);
}

/// What all watchers count while it is measured.
#[derive(Debug, Default)]
struct Counts {
    is_measured: AtomicBool,
    delivered: AtomicU64,
    lost: AtomicU64,
}

async fn watch(mut connection: Connection, counts: Arc<Counts>) -> io::Result<()> {
    let end = loop {
        match connection.next().await {
            Ok(Some(Received { opcode: BINARY, first, .. })) => {
                if counts.is_measured.load(Ordering::Relaxed) {
                    counts.delivered.fetch_add(1, Ordering::Relaxed);
                    let us = now_us().saturating_sub(u64::from_be_bytes(first));
                    let step = usize::try_from(us / STEP_US).map_or(STEPS - 1, |step| step.min(STEPS - 1));
                    DELAYS.with_borrow_mut(|delays| delays[step] += 1);
                }
            }
            Ok(Some(Received { opcode: CLOSE, control, .. })) => {
                let code = control.first_chunk().map_or(0, |code| u16::from_be_bytes(*code));
                break Err(io::Error::other(format!("Close {code}")));
            }
            Ok(_) => break Err(io::Error::other("FIN without a Close")),
            Err(error) => break Err(error),
        }
    };
    counts.lost.fetch_add(1, Ordering::Relaxed);
    end
}

/// `watchers` come, and then watch for `seconds`.
pub async fn fanout(order: &Order, watchers: usize, seconds: f64) -> anyhow::Result<Outcome> {
    let counts = Arc::new(Counts::default());
    let before = Memory::of(&order.proxy)?;
    let (mut coming, mut watching) = (JoinSet::new(), JoinSet::new());
    for nth in 0..order.connections {
        let (address, share) = (order.address, (watchers + nth) / order.connections);
        coming.spawn(async move {
            let mut open = Vec::with_capacity(share);
            for _ in 0..share {
                open.push(limited(Connection::open_at(address, FEED)).await);
            }
            open
        });
    }
    let mut outcome = Outcome::default();
    while let Some(came) = coming.join_next().await {
        for connection in came? {
            match connection {
                Ok(connection) => _ = watching.spawn(watch(connection, Arc::clone(&counts))),
                Err(error) => {
                    outcome.failures += 1;
                    *outcome.errors.entry(format!("connect: {error}")).or_default() += 1;
                }
            }
        }
    }
    sleep(WARMUP).await;
    let others = [order.backend, std::process::id()];
    let front = order.proxy.first().copied().unwrap_or(order.backend);
    let (receivers, drops) = (Cpu::of(&order.receivers)?, device_drops(front)?);
    let (cpu, others_cpu, begun) = (Cpu::of(&order.proxy)?, Cpu::of(&others)?, Instant::now());
    counts.is_measured.store(true, Ordering::Relaxed);
    sleep(Duration::from_secs_f64(seconds)).await;
    counts.is_measured.store(false, Ordering::Relaxed);
    outcome.seconds = begun.elapsed().as_secs_f64();
    outcome.proxy = Cpu::of(&order.proxy)? - cpu;
    outcome.others = Cpu::of(&others)? - others_cpu;
    let (receivers, drops) = (Cpu::of(&order.receivers)? - receivers, device_drops(front)? - drops);
    outcome.count = counts.delivered.load(Ordering::Relaxed);
    let after = Memory::of(&order.proxy)?;
    let lost = counts.lost.load(Ordering::Relaxed);
    if lost > 0 {
        outcome.failures += lost;
        while let Some(ended) = watching.try_join_next() {
            if let Err(error) = ended? {
                *outcome.errors.entry(error.to_string()).or_default() += 1;
            }
        }
    }
    anyhow::ensure!(outcome.count > 0, "nothing was delivered in {} s: {:?}", outcome.seconds, outcome.errors);
    let offered = watchers as f64 * f64::from(RATE) * outcome.seconds;
    outcome.insert("delivered_percent", outcome.count as f64 / offered * 100.0);
    if !order.receivers.is_empty() {
        outcome.insert("receive_us", receivers.us() as f64 / outcome.count as f64);
        outcome.insert("packets_dropped", drops as f64);
    }
    outcome.insert("upstreams", connections(order.backend)? as f64);
    if !order.proxy.is_empty() {
        outcome.insert("watcher_kib", (after.rss_kib as f64 - before.rss_kib as f64) / watchers as f64);
    }
    DELAYS.with_borrow(|delays| {
        for (name, per_mille) in [("delay_p50_ms", 500), ("delay_p99_ms", 990), ("delay_max_ms", 1000)] {
            outcome.insert(name, quantile(delays, per_mille) as f64 / 1e3);
        }
    });
    Ok(outcome)
}

/// In microseconds: what so many of a thousand do not exceed.
fn quantile(steps: &[u32], per_mille: u64) -> u64 {
    let all: u64 = steps.iter().copied().map(u64::from).sum();
    let mut left = (all * per_mille).div_ceil(1000);
    let step = steps.iter().position(|count| {
        left = left.saturating_sub((*count).into());
        left == 0
    });
    step.map_or(0, |step| (step as u64 + 1) * STEP_US)
}
