//! Listeners that close, and listeners that are handed on, while clients connect as fast as they can: none of them is reset.

use crate::harness::{
    Board, DEADLINE, LIMIT, Lab, Side,
    crowd::{self, Front, Stage, is_strict},
    proxy::Surroundings,
    visit::{Errand, Outcome, visit},
};
use futures_util::future::join_all;
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::{SocketAddr, TcpListener},
    thread::{self, JoinHandle},
    time::Duration,
};
use tokio::time::sleep;

/// A drain that ends what is left soon: what is tested is how it begins.
const DRAIN: &str = "drain = { delay = '0s', window = '200ms' }";

/// Clients that come one after the other, in as many places as may be, until it is dropped.
#[derive(Debug)]
struct Flood {
    outcomes: Board<BTreeMap<Outcome, usize>>,
    stopped: Board<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Flood {
    /// Half of them want a session, half a plain answer.
    fn start(lab: &Lab, address: SocketAddr) -> Self {
        const PLACES: usize = 64;
        let (outcomes, stopped) = (Board::new(BTreeMap::new()), Board::new(false));
        let run = {
            let (outcomes, stopped) = (outcomes.clone(), stopped.clone());
            move || {
                let place = async |errand| {
                    while !stopped.read(|stopped| *stopped) {
                        let outcome = visit(address, errand).await.outcome;
                        outcomes.change(|all| *all.entry(outcome).or_default() += 1);
                        if let Outcome::Unconnected(_) = outcome {
                            // Not all of the processor for those who are refused.
                            sleep(Duration::from_millis(1)).await;
                        }
                    }
                };
                let places = (0..PLACES).map(|n| place(if n % 2 == 0 { Errand::Echo } else { Errand::Get }));
                crate::harness::block(join_all(places));
            }
        };
        let thread = Some(lab.place(Side::Client).spawn("flood", run));
        Self { outcomes, stopped, thread }
    }

    /// How many had a connection, and have ended.
    fn connected(&self) -> usize {
        self.outcomes.read(connected)
    }

    /// Waits until so many had a connection.
    #[track_caller]
    fn wait(&self, count: usize) {
        let reached = self.outcomes.wait(LIMIT, |all| (connected(all) >= count).then_some(()));
        assert!(reached.is_some(), "{count} connects never came: {:?}", self.outcomes);
    }

    /// The last ones end; how all of them went.
    fn end(mut self) -> BTreeMap<Outcome, usize> {
        self.stop();
        self.outcomes.read(Clone::clone)
    }

    fn stop(&mut self) {
        self.stopped.change(|stopped| *stopped = true);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(!matches!(ended, Some(Err(_))) || thread::panicking(), "the flood panicked");
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop();
    }
}

fn connected(outcomes: &BTreeMap<Outcome, usize>) -> usize {
    let connected = outcomes.iter().filter(|(outcome, _)| !matches!(outcome, Outcome::Unconnected(_)));
    connected.map(|(_, count)| count).sum()
}

/// Ends a process in the midst of the flood.
#[track_caller]
fn terminate(t: &Front<'_>) {
    t.sigterm();
    assert_eq!(t.wait_exit(DEADLINE).code(), Some(0));
}

/// What may become of a client that is connected to a server which is told to end: its request is answered, and a session that
/// it has may be ended with a Close.
fn is_orderly(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::Served | Outcome::Closed(1001))
}

/// SIGTERM while clients connect as fast as they can, again and again on the same port: a client that is connected gets its
/// answer, and is never reset; who comes too late is refused as by any closed port.
#[test]
fn a_listener_that_closes_resets_nobody() {
    let (total, each) = if is_strict() { (50_000, 2500) } else { (4000, 1000) };
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let mut settings = DRAIN.to_owned();
    let mut flood = None;
    let mut ends = 0;
    // 20 of them, which is when the total is reached: while none is open, nobody connects.
    while ends < total / each || flood.as_ref().map_or(0, Flood::connected) < total {
        let t = stage.tidegate(&settings, backend.address);
        settings = format!("{DRAIN}\nlisten.address = '{}'", t.address);
        let flood = flood.get_or_insert_with(|| Flood::start(stage.lab(), t.address));
        flood.wait(flood.connected() + each);
        terminate(&t);
        ends += 1;
    }
    let outcomes = flood.expect("the loop ran").end();
    println!("{ends} listeners closed under {} connects: {outcomes:?}", connected(&outcomes));
    let is_late =
        |outcome: Outcome| matches!(outcome, Outcome::Unconnected(ErrorKind::ConnectionRefused | ErrorKind::TimedOut));
    let others: BTreeMap<_, _> = outcomes.iter().filter(|(o, _)| !is_orderly(**o) && !is_late(**o)).collect();
    assert_eq!(others, BTreeMap::new());
    assert!(outcomes.contains_key(&Outcome::Unconnected(ErrorKind::ConnectionRefused)), "no listener was ever closed");
}

/// A listening socket that is passed on by descriptor, as systemd does it, from one process to the next while clients connect as
/// fast as they can: not one of them fails to connect, is reset or goes without its answer, whether the next process is there before the last one ends or
/// only afterwards.
#[test]
fn a_listener_that_is_handed_on_loses_nobody() {
    let (generations, each) = if is_strict() { (16, 2500) } else { (4, 500) };
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let lab = stage.lab();
    let listener = lab.place(Side::Proxy).run(|| {
        let address = SocketAddr::new(lab.address(Side::Proxy, Side::Client), 0);
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP)).expect("a socket");
        socket.bind(&address.into()).expect("port 0 is free");
        socket.listen(4096).expect("a bound socket");
        TcpListener::from(socket)
    });
    let address = listener.local_addr().expect("a bound socket");
    let start = || {
        let listener = listener.try_clone().expect("descriptors enough for a test").into();
        let surroundings = Surroundings { listener: Some(listener), ..Surroundings::default() };
        let t = stage.tidegate_in(surroundings, &format!("{DRAIN}\nlisten.address = '{address}'"), backend.address);
        assert_eq!(t.address, address);
        t
    };
    let mut t = start();
    let flood = Flood::start(lab, address);
    for generation in 0..generations {
        flood.wait(flood.connected() + each);
        if generation % 2 == 0 {
            let next = start();
            terminate(&t);
            t = next;
        } else {
            terminate(&t);
            t = start();
        }
    }
    flood.wait(flood.connected() + each);
    let outcomes = flood.end();
    println!("a listener handed on {generations} times under {} connects: {outcomes:?}", connected(&outcomes));
    let others: BTreeMap<_, _> = outcomes.iter().filter(|(outcome, _)| !is_orderly(**outcome)).collect();
    assert_eq!(others, BTreeMap::new());
    // Descriptors were first counted with clients there.
    t.metrics_when("that nothing is left", |metrics| metrics.get("tidegate_client_connections") < 0.5);
    let refused = ["ListenOverflows", "ListenDrops", "TCPAbortOnClose"].map(|name| t.counters().get(name));
    if t.counters().is_exact() {
        assert_eq!(refused, [0; 3], "{:?}", t.counters());
    }
}
