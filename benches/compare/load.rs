//! The load generator: one thread, one order, one line of JSON with the outcome.
//!
//! It reads the proxy's CPU time itself, in the same instant as its own count, so that no other process has to be
//! scheduled between the two.

use std::{
    collections::{BTreeMap, VecDeque},
    io, mem,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
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
    transport::{Dialer, Dialers, Transport},
    wire::{BINARY, CLOSE, CLOSE_NORMAL, Role, frame},
};

/// The bound of one session's steps: what takes longer is a failure.
const STEP_LIMIT: Duration = Duration::from_secs(10);

/// The only message of a session that had none before.
const LAST_BYTES: usize = 64;

/// Between the last connection and the look at the memory.
const SETTLE: Duration = Duration::from_secs(1);

/// Those of a report, of 100,000.
const QUANTILES: [(&str, u64); 5] =
    [("p50", 50_000), ("p90", 90_000), ("p99", 99_000), ("p999", 99_900), ("max", 100_000)];

#[derive(Debug, Serialize, Deserialize)]
pub struct Order {
    pub address: SocketAddr,
    /// The processes whose CPU time and memory are asked for.
    pub proxy: Vec<u32>,
    pub backend: u32,
    /// Threads of the kernel that receive for all of these.
    pub receivers: Vec<u32>,
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
    /// Messages at once: as many as connections, or fewer.
    Echo {
        under_way: usize,
        warmup: f64,
        seconds: f64,
    },
    Idle {
        sessions: usize,
    },
    /// So many sessions; 0: as many as there are in that time.
    Churn {
        warmup: f64,
        seconds: f64,
        sessions: u64,
    },
    Spike {
        clients: usize,
        plain: bool,
    },
    Waves {
        waves: u32,
        clients: usize,
    },
    Held {
        sessions: usize,
        clients: usize,
    },
    Ramp(Ramp),
    Fanout {
        watchers: usize,
        seconds: f64,
    },
    Open {
        sessions: usize,
        rate: u32,
        seconds: f64,
    },
    Audit {
        sessions: usize,
        waits: bool,
    },
    Drain {
        sessions: usize,
    },
    Kill {
        sessions: usize,
    },
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
    /// How often which; of `Echo` and `Idle` the first one only.
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

    /// All times of something, and some of their quantiles, by names of [`QUANTILES`], in microseconds.
    pub fn insert_quantiles(&mut self, name: &str, quantiles: &[&str], times: Histogram) {
        for (quantile, of_100_000) in QUANTILES.into_iter().filter(|(quantile, _)| quantiles.contains(quantile)) {
            if let Some(us) = times.quantile_us(of_100_000) {
                self.insert(&format!("{name}_{quantile}_us"), us);
            }
        }
        self.histograms.insert(name.to_owned(), times);
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
                locked(&self.first_error).get_or_insert_with(|| error.to_string());
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
            Work::Echo { under_way, warmup, seconds } => echo(&order, &counts, under_way, warmup, seconds).await,
            Work::Idle { sessions } => idle(&order, &counts, sessions).await,
            Work::Churn { warmup, seconds, sessions: 0 } => churn(&order, &counts, warmup, seconds).await,
            Work::Churn { sessions, .. } => churn_all(&order, &counts, sessions).await,
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
    if let Some(error) = locked(&counts.first_error).take() {
        outcome.errors.insert(format!("{error} (the first)"), 1);
    }
    println!("{}", serde_json::to_string(&outcome)?);
    Ok(())
}

/// A message is sent when one before has come back, on the connection that has waited longest: as many are under way as there are tasks,
/// and they wander over all connections. With as many tasks as connections each connection always has one.
async fn echo(
    order: &Order,
    counts: &Arc<Counts>,
    under_way: usize,
    warmup: f64,
    seconds: f64,
) -> anyhow::Result<Outcome> {
    let message: Arc<[u8]> = frame(Role::Client, BINARY, &vec![b'x'; order.bytes]).into();
    let mut open = VecDeque::with_capacity(order.connections);
    let dialers = order.dialers()?;
    for mut dialer in limited(dialers.all(order.connections)).await? {
        open.push_back(limited(dialer.open()).await?);
    }
    let open = Arc::new(Mutex::new(open));
    // Only now: those that talk would hold up who still connects.
    let mut tasks = JoinSet::new();
    for _ in 0..under_way {
        let (open, message, counts, bytes) = (Arc::clone(&open), Arc::clone(&message), Arc::clone(counts), order.bytes);
        tasks.spawn(async move {
            // A connection that has failed is not given back.
            loop {
                let next = locked(&open).pop_front();
                let Some(mut connection) = next else { break };
                let result = connection.echo(&message, bytes).await;
                if result.is_ok() {
                    locked(&open).push_back(connection);
                }
                counts.count(result);
            }
        });
    }
    window(order, counts, warmup, seconds).await
}

/// What clients of [`churn`] have in common.
struct Clients {
    message: Arc<[u8]>,
    bytes: usize,
    close: Arc<[u8]>,
    /// Sessions that have not begun yet.
    left: AtomicU64,
    /// From the Close, and from the answering one, to the FIN.
    closing: Mutex<[Histogram; 2]>,
    failures: Mutex<BTreeMap<String, u64>>,
}

const CLOSING: [&str; 2] = ["close_to_fin", "answer_to_fin"];

impl Clients {
    fn new(order: &Order, sessions: u64) -> Arc<Self> {
        Arc::new(Self {
            message: frame(Role::Client, BINARY, &vec![b'x'; order.bytes]).into(),
            bytes: order.bytes,
            close: frame(Role::Client, CLOSE, &CLOSE_NORMAL).into(),
            left: AtomicU64::new(sessions),
            closing: Mutex::default(),
            failures: Mutex::default(),
        })
    }

    /// Sessions from their connect to their end, one after the other, as long as there are any.
    async fn go(self: Arc<Self>, mut dialer: Dialer, counts: Arc<Counts>) {
        let less = |left: u64| left.checked_sub(1);
        while self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok() {
            let mut stage = "connect and upgrade";
            let session = async {
                let mut connection = dialer.open().await?;
                stage = "echo";
                connection.echo(&self.message, self.bytes).await?;
                stage = "close";
                connection.close(&self.close).await
            };
            let result = limited(session).await;
            match result {
                Ok(moments) => {
                    for (histogram, moment) in locked(&self.closing).iter_mut().zip(moments) {
                        histogram.record(moment.elapsed());
                    }
                    counts.done.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => *locked(&self.failures).entry(format!("{stage}: {error}")).or_default() += 1,
            }
        }
    }

    /// Forgets what was seen until now.
    fn begin(&self) {
        *locked(&self.closing) = Default::default();
        locked(&self.failures).clear();
    }

    /// What was seen since.
    fn tell(&self, outcome: &mut Outcome) {
        outcome.errors = mem::take(&mut *locked(&self.failures));
        outcome.failures = outcome.errors.values().sum();
        for (name, histogram) in CLOSING.into_iter().zip(mem::take(&mut *locked(&self.closing))) {
            outcome.insert_quantiles(name, &["p50", "p99", "max"], histogram);
        }
    }
}

/// Sessions, `order.connections` of them at once.
async fn churn(order: &Order, counts: &Arc<Counts>, warmup: f64, seconds: f64) -> anyhow::Result<Outcome> {
    let clients = Clients::new(order, u64::MAX);
    let mut tasks = JoinSet::new();
    for dialer in limited(order.dialers()?.all(order.connections)).await? {
        tasks.spawn(Arc::clone(&clients).go(dialer, Arc::clone(counts)));
    }
    sleep(Duration::from_secs_f64(warmup)).await;
    clients.begin();
    let mut outcome = window(order, counts, 0.0, seconds).await.map_err(|error| {
        let failures = locked(&clients.failures);
        error.context(format!("failures: {failures:?}"))
    })?;
    clients.tell(&mut outcome);
    Ok(outcome)
}

/// Exactly so many sessions, and all that they cost.
async fn churn_all(order: &Order, counts: &Arc<Counts>, sessions: u64) -> anyhow::Result<Outcome> {
    let clients = Clients::new(order, sessions);
    let mut tasks = JoinSet::new();
    let dialers = limited(order.dialers()?.all(order.connections)).await?;
    let others = [order.backend, std::process::id()];
    let (cpu_before, others_before, begun) = (Cpu::of(&order.proxy)?, Cpu::of(&others)?, Instant::now());
    for dialer in dialers {
        tasks.spawn(Arc::clone(&clients).go(dialer, Arc::clone(counts)));
    }
    tasks.join_all().await;
    let seconds = begun.elapsed().as_secs_f64();
    let (cpu, others) = (Cpu::of(&order.proxy)?, Cpu::of(&others)?);
    let mut outcome = Outcome {
        count: counts.done.load(Ordering::Relaxed),
        seconds,
        proxy: cpu - cpu_before,
        others: others - others_before,
        ..Outcome::default()
    };
    clients.tell(&mut outcome);
    anyhow::ensure!(outcome.count + outcome.failures == sessions, "not all sessions came to an end: {outcome:?}");
    Ok(outcome)
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

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub async fn limited<T>(step: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(STEP_LIMIT, step).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
