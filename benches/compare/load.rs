//! The load generator: one thread, one order, one line of JSON with the outcome.
//!
//! It reads the proxy's CPU time itself, in the same instant as its own count, so that no other process has to be
//! scheduled between the two.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    audit,
    ending::{self, Stop, Timeline},
    fanout, held,
    histogram::Histogram,
    open,
    procfs::{Cpu, Memory},
    ramp::{self, Ramp},
    spike,
    transport::{Dialers, Transport},
    wire::{BINARY, CLOSE, CLOSE_NORMAL, Role, frame},
};

/// The bound of one session's steps: what takes longer is a failure.
const STEP_LIMIT: Duration = Duration::from_secs(10);

/// The only message of a session that had none before.
const LAST_BYTES: usize = 64;

/// Between the last connection and the look at the memory.
const SETTLE: Duration = Duration::from_secs(1);

#[derive(Debug, Serialize, Deserialize)]
pub struct Order {
    pub address: SocketAddr,
    /// The processes whose CPU time and memory are asked for.
    pub proxy: Vec<u32>,
    pub backend: u32,
    /// How to end the proxy in good order.
    pub stop: Option<Stop>,
    /// Sessions at once; where there are more in the end, as many connect at once.
    pub connections: usize,
    /// Payload of a message; 0 in `Idle`: there is none.
    pub bytes: usize,
    pub transport: Transport,
    /// Whom to believe, over TLS.
    pub roots: Option<PathBuf>,
    /// Sessions of a connection, over HTTP/2.
    pub streams: usize,
    pub work: Work,
}

/// Times are in seconds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub enum Work {
    Echo { warmup: f64, seconds: f64 },
    Idle { sessions: usize },
    Churn { warmup: f64, seconds: f64 },
    Spike { clients: usize, plain: bool },
    Waves { waves: u32, clients: usize },
    Held { sessions: usize, clients: usize },
    Ramp(Ramp),
    Fanout { watchers: usize, seconds: f64 },
    Open { sessions: usize, rate: u32, seconds: f64 },
    Audit { sessions: usize, waits: bool },
    Drain { sessions: usize },
    Kill { sessions: usize },
}

impl Order {
    fn dialers(&self) -> anyhow::Result<Dialers> {
        Dialers::new(self.address, self.transport, self.streams, self.roots.as_deref())
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Messages or sessions, within `seconds`.
    pub count: u64,
    pub seconds: f64,
    pub failures: u64,
    /// How often which; of `Echo`, `Idle` and `Churn` the first one only.
    pub errors: BTreeMap<String, u64>,
    pub proxy: Cpu,
    /// Of load and backend.
    pub others: Cpu,
    /// Before the first and after the last session connected; `Idle` only.
    pub memory: Option<[Memory; 2]>,
    /// What else was measured, by the names of the columns.
    pub values: BTreeMap<String, f64>,
    /// All times, by what they are of.
    pub histograms: BTreeMap<String, Histogram>,
    /// How it ended for clients, in words, and for how many.
    pub endings: BTreeMap<String, u64>,
    pub timeline: Option<Timeline>,
}

impl Outcome {
    pub fn insert(&mut self, name: &str, value: f64) {
        self.values.insert(name.to_owned(), value);
    }
}

/// What all tasks count.
#[derive(Debug, Default)]
struct Counts {
    done: AtomicU64,
    failures: AtomicU64,
    first_error: Mutex<Option<String>>,
}

impl Counts {
    fn count(&self, result: io::Result<()>) {
        match result {
            Ok(()) => _ = self.done.fetch_add(1, Ordering::Relaxed),
            Err(error) => {
                self.failures.fetch_add(1, Ordering::Relaxed);
                let mut first = self.first_error.lock().unwrap_or_else(PoisonError::into_inner);
                first.get_or_insert_with(|| error.to_string());
            }
        }
    }
}

pub fn main(order: &str) -> anyhow::Result<()> {
    let order: Order = serde_json::from_str(order)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let counts = Arc::new(Counts::default());
    let mut outcome = runtime.block_on(async {
        match order.work {
            Work::Echo { warmup, seconds } => echo(&order, &counts, warmup, seconds).await,
            Work::Idle { sessions } => idle(&order, &counts, sessions).await,
            Work::Churn { warmup, seconds } => churn(&order, &counts, warmup, seconds).await,
            Work::Spike { clients, plain } => spike::spike(&order, clients, plain).await,
            Work::Waves { waves, clients } => spike::waves(&order, waves, clients).await,
            Work::Held { sessions, clients } => held::held(&order, sessions, clients).await,
            Work::Ramp(ramp) => ramp::ramp(&order, &ramp).await,
            Work::Fanout { watchers, seconds } => fanout::fanout(&order, watchers, seconds).await,
            Work::Open { sessions, rate, seconds } => open::open(&order, sessions, rate, seconds).await,
            Work::Audit { sessions, waits } => audit::audit(&order, sessions, waits).await,
            Work::Drain { sessions } => ending::ending(&order, sessions, true).await,
            Work::Kill { sessions } => ending::ending(&order, sessions, false).await,
        }
    })?;
    outcome.failures += counts.failures.load(Ordering::Relaxed);
    if let Some(error) = counts.first_error.lock().unwrap_or_else(PoisonError::into_inner).take() {
        outcome.errors.insert(format!("{error} (the first)"), 1);
    }
    println!("{}", serde_json::to_string(&outcome)?);
    Ok(())
}

/// Every connection sends a message when the one before has come back.
async fn echo(order: &Order, counts: &Arc<Counts>, warmup: f64, seconds: f64) -> anyhow::Result<Outcome> {
    let message: Arc<[u8]> = frame(Role::Client, BINARY, &vec![b'x'; order.bytes]).into();
    let mut open = Vec::with_capacity(order.connections);
    let dialers = order.dialers()?;
    for mut dialer in limited(dialers.all(order.connections)).await? {
        open.push(limited(dialer.open()).await?);
    }
    // Only now: those that talk would hold up who still connects.
    let mut tasks = JoinSet::new();
    for mut connection in open {
        let (message, counts, bytes) = (Arc::clone(&message), Arc::clone(counts), order.bytes);
        tasks.spawn(async move {
            loop {
                let result = connection.echo(&message, bytes).await;
                let failed = result.is_err();
                counts.count(result);
                if failed {
                    break;
                }
            }
        });
    }
    window(order, counts, warmup, seconds).await
}

/// Sessions from their connect to their end, one after the other, `order.connections` of them at once.
async fn churn(order: &Order, counts: &Arc<Counts>, warmup: f64, seconds: f64) -> anyhow::Result<Outcome> {
    let message: Arc<[u8]> = frame(Role::Client, BINARY, &vec![b'x'; order.bytes]).into();
    let close: Arc<[u8]> = frame(Role::Client, CLOSE, &CLOSE_NORMAL).into();
    let mut tasks = JoinSet::new();
    let dialers = order.dialers()?;
    for mut dialer in limited(dialers.all(order.connections)).await? {
        let (message, close, counts) = (Arc::clone(&message), Arc::clone(&close), Arc::clone(counts));
        let bytes = order.bytes;
        tasks.spawn(async move {
            loop {
                let session = async {
                    let mut connection = dialer.open().await?;
                    connection.echo(&message, bytes).await?;
                    connection.close(&close).await
                };
                counts.count(limited(session).await);
            }
        });
    }
    window(order, counts, warmup, seconds).await
}

/// What is done and what it costs within `seconds`, while tasks go on.
async fn window(order: &Order, counts: &Counts, warmup: f64, seconds: f64) -> anyhow::Result<Outcome> {
    let others = [order.backend, std::process::id()];
    sleep(Duration::from_secs_f64(warmup)).await;
    let (cpu_before, others_before) = (Cpu::of(&order.proxy)?, Cpu::of(&others)?);
    let (begun, done_before) = (Instant::now(), counts.done.load(Ordering::Relaxed));
    sleep(Duration::from_secs_f64(seconds)).await;
    let (seconds, done) = (begun.elapsed().as_secs_f64(), counts.done.load(Ordering::Relaxed));
    let (cpu, others) = (Cpu::of(&order.proxy)?, Cpu::of(&others)?);
    anyhow::ensure!(done > done_before, "nothing was done in {seconds} s: {:?}", counts.first_error);
    Ok(Outcome {
        count: done - done_before,
        seconds,
        proxy: cpu - cpu_before,
        others: others - others_before,
        ..Outcome::default()
    })
}

/// Opens sessions, each with one echo or without, and looks at the memory when all of them are silent.
async fn idle(order: &Order, counts: &Arc<Counts>, sessions: usize) -> anyhow::Result<Outcome> {
    let message: Arc<[u8]> = frame(Role::Client, BINARY, &vec![b'x'; order.bytes]).into();
    // Of sessions that say nothing all are asked in the end.
    let (last_bytes, first) = if order.bytes == 0 { (LAST_BYTES, false) } else { (order.bytes, true) };
    let last = frame(Role::Client, BINARY, &vec![b'x'; last_bytes]);
    let before = Memory::of(&order.proxy)?;
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    let dialers = Arc::new(order.dialers()?);
    for nth in 0..order.connections {
        let share = (sessions + nth) / order.connections;
        let (dialers, bytes, message, counts) =
            (Arc::clone(&dialers), order.bytes, Arc::clone(&message), Arc::clone(counts));
        tasks.spawn(async move {
            let mut open = Vec::with_capacity(share);
            let mut dialer = None;
            for nth in 0..share {
                let session = async {
                    if nth % dialers.streams == 0 {
                        dialer = Some(dialers.one().await?);
                    }
                    let mut connection = match &mut dialer {
                        Some(dialer) => dialer.open().await?,
                        None => return Err(io::ErrorKind::NotConnected.into()),
                    };
                    if first {
                        connection.echo(&message, bytes).await?;
                    }
                    open.push(connection);
                    Ok(())
                };
                counts.count(limited(session).await);
            }
            open
        });
    }
    let mut open = tasks.join_all().await.into_iter().flatten().collect::<Vec<_>>();
    let seconds = begun.elapsed().as_secs_f64();
    sleep(SETTLE).await;
    let after = Memory::of(&order.proxy)?;
    // A session that was lost takes no memory: all of them must still be there.
    for connection in &mut open {
        if let Err(error) = limited(connection.echo(&last, last_bytes)).await {
            counts.count(Err(error));
        }
    }
    Ok(Outcome { count: open.len() as u64, seconds, memory: Some([before, after]), ..Outcome::default() })
}

pub async fn limited<T>(step: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(STEP_LIMIT, step).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
