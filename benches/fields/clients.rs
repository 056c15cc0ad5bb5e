//! The clients: so many at once, or so many in each second, each of which connects, asks, gets a result and ends, and notes how long
//! each of it took. One thread.

#![expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, ensure};
use futures_util::{SinkExt as _, StreamExt as _};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::{
    net::TcpStream,
    sync::{Mutex, mpsc, oneshot},
    task::{JoinHandle, JoinSet, yield_now},
    time::{sleep_until, timeout},
};
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{Message, protocol::CloseFrame, protocol::frame::coding::CloseCode},
};
use tokio_util::task::TaskTracker;

use crate::backend::{Ask, PARTS, socket_config};

/// For a whole session. The reports do not say how long their clients waited.
pub const LIMIT: Duration = Duration::from_secs(30);

/// A connect that took longer had to be sent again by the kernel.
const LATE: Duration = Duration::from_secs(1);

/// Calls on one connection, or waiting for it.
const CALLS: usize = 4096;

/// How clients behave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Manner {
    /// Waits for its result, and then for the Close handshake and the FIN.
    Waits,
    /// In turn: the backend ends the session behind the result; the client sends Close at the result's first part, and closes its
    /// socket at once.
    Mixed,
    /// A JSON-RPC call on a connection of its own.
    Call,
    /// A JSON-RPC call on the one connection that all calls share: opened by the first, closed after the last.
    Counted,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Order {
    pub address: SocketAddr,
    pub manner: Manner,
    pub sessions: usize,
    /// Sessions that begin at once, and how often that happens.
    pub burst: usize,
    pub every_ms: u64,
    /// Who would be beyond waits for others to end before it connects.
    pub at_most: usize,
}

/// What came of it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    pub values: BTreeMap<String, f64>,
    pub errors: BTreeMap<String, u64>,
}

#[derive(Debug, Default)]
struct Session {
    /// From `connect()` to the 101.
    connect: Option<Duration>,
    /// From `connect()` to the whole result.
    result: Option<Duration>,
    /// From the Close to the FIN.
    close: Option<Duration>,
    leaves: bool,
    failure: Option<String>,
}

type Client = WebSocketStream<TcpStream>;

pub fn main(order: &str) -> anyhow::Result<()> {
    let order: Order = serde_json::from_str(order)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(run(&order))?;
    println!("{}", serde_json::to_string(&outcome)?);
    Ok(())
}

async fn run(order: &Order) -> anyhow::Result<Outcome> {
    let counted = Arc::new(Counted { address: order.address, state: Mutex::default() });
    let mut tasks = JoinSet::new();
    let mut seen = Vec::new();
    let begun = Instant::now();
    let mut due = begun;
    let mut issued = 0;
    while issued < order.sessions {
        sleep_until(due.into()).await;
        while let Some(ended) = tasks.try_join_next() {
            seen.push(ended?);
        }
        let burst = order.burst.min(order.sessions - issued);
        while tasks.len() + burst > order.at_most {
            let Some(ended) = tasks.join_next().await else { break };
            seen.push(ended?);
        }
        if order.manner == Manner::Counted {
            for id in issued..issued + burst {
                let counted = Arc::clone(&counted);
                tasks.spawn(
                    async move { limited(Instant::now(), async |session| counted.call(id, session).await).await },
                );
            }
        } else {
            connect(order, issued, burst, &mut tasks).await?;
        }
        issued += burst;
        due += Duration::from_millis(order.every_ms);
    }
    let issued = begun.elapsed();
    seen.extend(tasks.join_all().await);
    let mut outcome = outcome(&seen);
    outcome.values.insert("issued_ms".to_owned(), ms(issued));
    outcome.values.insert("all_ms".to_owned(), ms(begun.elapsed()));
    Ok(outcome)
}

/// Issues `count` connects in one go, and has the clients go on in `tasks`.
async fn connect(order: &Order, first: usize, count: usize, tasks: &mut JoinSet<Session>) -> io::Result<()> {
    let address = SockAddr::from(order.address);
    let domain = Domain::for_address(order.address);
    let sockets: Vec<Socket> =
        (0..count).map(|_| Socket::new(domain, Type::STREAM.nonblocking(), None)).collect::<io::Result<_>>()?;
    let connects: Vec<(Instant, io::Result<Socket>)> = sockets
        .into_iter()
        .map(|socket| {
            let begun = Instant::now();
            let connected = match socket.connect(&address) {
                Err(error) if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) => Ok(()),
                result => result,
            };
            (begun, connected.map(|()| socket))
        })
        .collect();
    let streams: Vec<(Instant, io::Result<TcpStream>)> = connects
        .into_iter()
        .map(|(begun, socket)| (begun, socket.and_then(|socket| TcpStream::from_std(socket.into()))))
        .collect();
    // The runtime then asks epoll before it polls the first of them.
    yield_now().await;
    for (number, (begun, stream)) in (first..).zip(streams) {
        let (address, manner) = (order.address, order.manner);
        tasks.spawn(async move {
            limited(begun, async |session| client(stream, begun, address, manner, number, session).await).await
        });
    }
    Ok(())
}

/// A session, or why there is none.
async fn limited(begun: Instant, work: impl AsyncFnOnce(&mut Session) -> anyhow::Result<()>) -> Session {
    let mut session = Session::default();
    let result = timeout(LIMIT.saturating_sub(begun.elapsed()), work(&mut session)).await;
    let stage = match &session {
        Session { connect: None, .. } => "connect",
        Session { result: None, .. } => "result",
        _ => "close",
    };
    session.failure = match result {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(format!("{stage}: {error:#}")),
        Err(_) => Some(format!("{stage}: not over after {} s", LIMIT.as_secs())),
    };
    session
}

async fn upgrade(stream: TcpStream, address: SocketAddr, path: &str) -> anyhow::Result<Client> {
    stream.set_nodelay(true)?;
    let url = format!("ws://{address}{path}");
    Ok(client_async_with_config(url, stream, Some(socket_config())).await?.0)
}

async fn client(
    stream: io::Result<TcpStream>,
    begun: Instant,
    address: SocketAddr,
    manner: Manner,
    number: usize,
    session: &mut Session,
) -> anyhow::Result<()> {
    let stream = stream?;
    stream.writable().await?;
    if let Some(error) = stream.take_error()? {
        return Err(error.into());
    }
    let path = if manner == Manner::Call { "/rpc" } else { "/" };
    let mut socket = upgrade(stream, address, path).await?;
    session.connect = Some(begun.elapsed());
    let ask = match manner {
        Manner::Mixed if number.is_multiple_of(2) => Ask::Last,
        Manner::Mixed => {
            session.leaves = true;
            Ask::Result
        }
        _ => Ask::Result,
    };
    if manner == Manner::Call {
        socket.send(Message::text(call(number))).await?;
        ensure!(answered(&socket.next().await.context("the end")??) == Some(number), "another answer");
    } else {
        socket.send(Message::text(ask.text())).await?;
        for _ in 0..if session.leaves { 1 } else { PARTS } {
            let part = socket.next().await.context("the end")??;
            ensure!(part.is_binary(), "instead of a part: {part:?}");
        }
    }
    session.result = Some(begun.elapsed());
    let ended = Instant::now();
    if ask == Ask::Last {
        let close = socket.next().await.context("an end without a Close")??;
        ensure!(close.is_close(), "instead of a Close: {close:?}");
    } else {
        socket.send(Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }))).await?;
    }
    if session.leaves {
        return Ok(());
    }
    // The peer's Close, if it is not there yet; ours, if it is owed; the peer's FIN.
    while let Some(message) = socket.next().await {
        message?;
    }
    session.close = Some(ended.elapsed());
    Ok(())
}

fn call(id: usize) -> String {
    serde_json::json!({ "jsonrpc": "2.0", "id": id, "method": "work" }).to_string()
}

fn answered(message: &Message) -> Option<usize> {
    let answer: Value = serde_json::from_str(message.to_text().ok()?).ok()?;
    answer.get("result")?;
    answer["id"].as_u64()?.try_into().ok()
}

/// The rule of the report: one connection, and a counter of those who wait for it, under one lock.
struct Counted {
    address: SocketAddr,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waiting: usize,
    shared: Option<Shared>,
}

struct Shared {
    calls: mpsc::Sender<(usize, oneshot::Sender<()>)>,
    over: JoinHandle<anyhow::Result<()>>,
}

impl Counted {
    async fn call(&self, id: usize, session: &mut Session) -> anyhow::Result<()> {
        let begun = Instant::now();
        let (answer, answered) = oneshot::channel();
        {
            let mut state = self.state.lock().await;
            if state.shared.is_none() {
                state.shared = Some(self.open().await?);
            }
            state.waiting += 1;
            let shared = state.shared.as_ref().context("it was opened")?;
            shared.calls.send((id, answer)).await.map_err(|_| anyhow!("it has ended"))?;
        }
        session.connect = Some(begun.elapsed());
        let result = answered.await;
        session.result = result.is_ok().then(|| begun.elapsed());
        let ended = Instant::now();
        let mut state = self.state.lock().await;
        state.waiting -= 1;
        if state.waiting == 0
            && let Some(Shared { calls, over }) = state.shared.take()
        {
            drop(calls);
            over.await??;
            session.close = Some(ended.elapsed());
        }
        result.context("it has ended")
    }

    async fn open(&self) -> anyhow::Result<Shared> {
        let stream = TcpStream::connect(self.address).await?;
        let socket = upgrade(stream, self.address, "/rpc").await?;
        let (calls, to_do) = mpsc::channel(CALLS);
        Ok(Shared { calls, over: TaskTracker::new().spawn(share(socket, to_do)) })
    }
}

async fn share(mut socket: Client, mut calls: mpsc::Receiver<(usize, oneshot::Sender<()>)>) -> anyhow::Result<()> {
    let mut waiting: HashMap<usize, oneshot::Sender<()>> = HashMap::new();
    loop {
        tokio::select! {
            next = calls.recv() => {
                let Some((id, answer)) = next else { break };
                waiting.insert(id, answer);
                socket.send(Message::text(call(id))).await?;
            }
            message = socket.next() => {
                let id = answered(&message.context("the end")??);
                if let Some(answer) = id.and_then(|id| waiting.remove(&id)) {
                    // Nobody may wait for it any more.
                    let _ = answer.send(());
                }
            }
        }
    }
    socket.close(None).await?;
    while let Some(message) = socket.next().await {
        message?;
    }
    Ok(())
}

fn outcome(seen: &[Session]) -> Outcome {
    let mut outcome = Outcome::default();
    let count = |which: &dyn Fn(&Session) -> bool| seen.iter().filter(|session| which(session)).count() as f64;
    let failed = count(&|session| session.connect.is_none());
    let late = count(&|session| session.connect.is_some_and(|time| time >= LATE));
    let percent = |part: f64| part * 100.0 / (seen.len() as f64).max(1.0);
    let values = [
        ("sessions", seen.len() as f64),
        ("failed", failed),
        ("late", late),
        // What a client would say that waits for a second.
        ("missed_percent", percent(failed + late)),
        // They asked, and have stayed.
        ("lost", count(&|session| session.connect.is_some() && session.result.is_none())),
        ("unclean", count(&|session| session.result.is_some() && session.failure.is_some())),
    ];
    outcome.values.extend(values.map(|(name, value)| (name.to_owned(), value)));
    for error in seen.iter().filter_map(|session| session.failure.clone()) {
        *outcome.errors.entry(error).or_default() += 1;
    }
    let mut times = |name: &str, mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        let [Some(p50), Some(p99), Some(max)] = [500, 990, 1000].map(|per_mille| quantile(&times, per_mille)) else {
            return;
        };
        let mean = times.iter().sum::<f64>() / times.len() as f64;
        let variance = times.iter().map(|time| (time - mean).powi(2)).sum::<f64>() / times.len() as f64;
        for (what, value) in [("p50", p50), ("p99", p99), ("max", max), ("deviation", variance.sqrt())] {
            outcome.values.insert(format!("{name}_{what}"), value);
        }
    };
    times("connect", seen.iter().filter_map(|session| session.connect).map(ms).collect());
    times(
        "result",
        seen.iter().filter(|session| !session.leaves).filter_map(|session| session.result).map(ms).collect(),
    );
    times("close", seen.iter().filter_map(|session| session.close).map(ms).collect());
    outcome
}

/// Of what is sorted: the smallest value that so many of a thousand do not exceed.
fn quantile(sorted: &[f64], per_mille: usize) -> Option<f64> {
    sorted.get((sorted.len() * per_mille).div_ceil(1000).saturating_sub(1)).copied()
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
