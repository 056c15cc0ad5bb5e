//! Sockets of this host, and peers that end, reset, stay, or send on; and the wait alone, on a virtual clock.

use std::{
    io,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};

use proptest::prelude::*;
use tokio::{
    io::{AsyncReadExt as _, AsyncWrite as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use super::*;
use crate::admission::{self, Capacity, Memory, Reason};

/// No test waits for so long.
const NEVER: Duration = Duration::from_hours(1);
const PATIENT: Patience = Patience { linger: NEVER, linger_max: NEVER };

/// A lingering thread, and what it counts.
struct Scene {
    linger: Linger,
    metrics: Arc<Metrics>,
    listener: TcpListener,
}

impl Scene {
    async fn new(max: usize) -> Self {
        let metrics = Arc::new(Metrics::new());
        let linger = Linger::new(&Arc::new(Bounds::new(max)), Some(Arc::clone(&metrics)));
        Self { linger, metrics, listener: TcpListener::bind("127.0.0.1:0").await.expect("a port") }
    }

    /// Our end of a connection, and the peer's.
    async fn pair(&self) -> (Stream, TcpStream) {
        let address = self.listener.local_addr().expect("bound");
        let (peer, ours) = tokio::join!(TcpStream::connect(address), self.listener.accept());
        (Stream::Tcp(ours.expect("a client").0), peer.expect("a listener"))
    }

    async fn add(&self, is_done: bool, patience: &Patience, keeps: Keeps) -> TcpStream {
        let (ours, peer) = self.pair().await;
        self.linger.add(Side::Client, ours, is_done, patience, keeps);
        peer
    }

    /// Runs it until `how` was counted so often.
    async fn until(&self, how: &str, count: u32) {
        let line = format!("tidegate_lingered_total{{leg=\"client\",how=\"{how}\"}} {count}\n");
        let mut run = pin!(self.linger.clone().run());
        let counted = async {
            while !self.metrics.encode().contains(&line) {
                tokio::select! {
                    () = &mut run => {}
                    () = tokio::time::sleep(Duration::from_millis(1)) => {}
                }
            }
        };
        let in_time = timeout(Duration::from_secs(15), counted).await;
        let metrics = self.metrics.encode();
        let counts: Vec<_> = metrics.lines().filter(|line| line.contains("lingered_total{")).collect();
        assert!(in_time.is_ok(), "not {line}: {counts:#?}");
    }
}

async fn end_of(mut peer: TcpStream) -> io::Result<usize> {
    peer.read_to_end(&mut Vec::new()).await
}

#[tokio::test]
async fn a_peer_that_ends_is_let_go_at_once() {
    let scene = Scene::new(10).await;
    let mut peer = scene.add(false, &PATIENT, Keeps::Nothing).await;
    assert_eq!(scene.metrics.lingering.get(), 1);
    // More than is read at once, and of no use to anybody.
    let sending = async {
        peer.write_all(&vec![7; 4 << 20]).await.expect("it is read");
        peer.shutdown().await.expect("open");
    };
    tokio::join!(sending, scene.until("fin", 1));
    assert_eq!(end_of(peer).await.expect("no reset"), 0);
    assert_eq!(scene.metrics.lingering.get(), 0);
}

/// Who has ended, and was heard to its end, gets all that it was sent before our FIN, although the socket is closed at once: more than its kernel
/// takes while nobody reads there.
#[tokio::test]
async fn a_peer_that_has_ended_misses_nothing() {
    let scene = Scene::new(10).await;
    let (mut ours, mut peer) = scene.pair().await;
    peer.write_all(b"the last word").await.expect("open");
    peer.shutdown().await.expect("open");
    ours.read_to_end(&mut Vec::new()).await.expect("its end");
    let (more, mut sent, mut cx) = (vec![7; 64 << 10], 0, Context::from_waker(Waker::noop()));
    while let Poll::Ready(written) = Pin::new(&mut ours).poll_write(&mut cx, &more) {
        sent += written.expect("open");
    }
    assert!(sent > 0);
    scene.linger.close_ended(Side::Client, ours);
    assert_eq!(end_of(peer).await.expect("no reset"), sent);
    scene.until("fin", 1).await;
}

/// A peer's FIN does not keep from it what was still to go out, such as TLS's last word behind a full buffer.
#[tokio::test]
async fn a_peer_that_has_ended_is_told_the_rest() {
    let scene = Scene::new(10).await;
    let (mut ours, mut peer) = scene.pair().await;
    peer.shutdown().await.expect("open");
    let (more, mut sent, mut cx) = (vec![7; 64 << 10], 0, Context::from_waker(Waker::noop()));
    while let Poll::Ready(written) = Pin::new(&mut ours).poll_write(&mut cx, &more) {
        sent += written.expect("open");
    }
    let rest = vec![8; 64 << 10];
    scene.linger.keep(Side::Client, ours, rest.as_slice().into(), false, &PATIENT, Keeps::Nothing);
    let mut received = Vec::new();
    let (read, ()) = tokio::join!(peer.read_to_end(&mut received), scene.until("fin", 1));
    assert_eq!(read.expect("no reset"), sent + rest.len());
    assert!(received.ends_with(&rest));
}

#[tokio::test]
async fn a_peer_that_is_done_need_not_end() {
    let scene = Scene::new(10).await;
    let peer = scene.add(true, &PATIENT, Keeps::Nothing).await;
    scene.until("acked", 1).await;
    assert_eq!(end_of(peer).await.expect("no reset"), 0);
}

#[tokio::test]
async fn a_peer_that_is_not_done_is_waited_for_until_the_deadline() {
    let scene = Scene::new(10).await;
    let short = Patience { linger: Duration::from_millis(50), linger_max: NEVER };
    let begun = Instant::now();
    let peer = scene.add(false, &short, Keeps::Nothing).await;
    scene.until("expired", 1).await;
    assert!(begun.elapsed() >= Duration::from_millis(50));
    assert_eq!(end_of(peer).await.expect("no reset"), 0);
}

/// Who goes on sending makes progress, but not for ever.
#[tokio::test]
async fn the_whole_wait_is_bounded() {
    let scene = Scene::new(10).await;
    let short = Patience { linger: Duration::from_millis(100), linger_max: Duration::from_millis(300) };
    let begun = Instant::now();
    let mut peer = scene.add(false, &short, Keeps::Nothing).await;
    let sending = async {
        while peer.write_all(b"more").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        () = sending => {}
        () = scene.until("expired", 1) => {}
    }
    assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_peer_that_resets_is_let_go() {
    let scene = Scene::new(10).await;
    let (mut ours, peer) = scene.pair().await;
    ours.write_all(b"never read").await.expect("open");
    peer.readable().await.expect("open");
    scene.linger.add(Side::Client, ours, false, &PATIENT, Keeps::Nothing);
    // With something unread it is a RST.
    drop(peer);
    scene.until("reset", 1).await;
}

/// Beyond the bound the oldest goes, and only it.
#[tokio::test]
async fn the_oldest_goes_first() {
    let scene = Scene::new(2).await;
    let mut peers = Vec::new();
    for _ in 0..3 {
        peers.push(scene.add(false, &PATIENT, Keeps::Nothing).await);
    }
    assert_eq!(scene.metrics.lingering.get(), 2);
    scene.until("evicted", 1).await;
    // It is closed in order, and the others still wait for their peers.
    let mut first = peers.remove(0);
    assert_eq!(first.read(&mut [0; 8]).await.expect("a FIN"), 0);
    for mut peer in peers {
        peer.write_all(b"late").await.expect("open");
        peer.shutdown().await.expect("open");
        assert_eq!(end_of(peer).await.expect("no reset"), 0);
    }
    scene.until("fin", 2).await;
}

/// Sockets that only wait are no reason to turn a client away.
#[tokio::test]
async fn they_make_room_for_new_clients() {
    const PLACES: usize = 4; // and so 8 sockets, of which 2 make room
    let scene = Scene::new(100).await;
    let capacity = Capacity {
        connections: PLACES,
        turned_away: 1,
        memory: None,
        connection_bytes: 0,
        full: Reason::MaxConnections,
    };
    let config = admission::Config {
        max_connections: None,
        max_connections_per_address: None,
        handshakes_per_second: None,
        handshakes_per_address: None,
        handshake_delay: Duration::ZERO,
        memory: Memory::Off,
    };
    let admission = Admission::new(capacity, &config);
    let mut peers = Vec::new();
    for _ in 0..PLACES {
        // Both sockets of a session: half a place each.
        let mut place = admission.enter().filter(|place| place.refused.is_none()).expect("a place");
        let half = place.split().expect("it has two");
        assert!(place.split().is_none(), "it is halved already");
        peers.push(scene.add(false, &PATIENT, Keeps::Place(half)).await);
        peers.push(scene.add(false, &PATIENT, Keeps::Place(place.last_half())).await);
    }
    assert!(admission.enter().is_some_and(|place| place.refused.is_some()), "all are taken");
    scene.linger.make_room_for(&admission);
    assert!(admission.enter().is_some_and(|place| place.refused.is_none()), "nobody made room");
    // No more than was needed.
    assert_eq!(scene.metrics.lingering.get(), 6);
}

/// It ends when nobody comes any more and all have gone.
#[tokio::test]
async fn it_ends_with_the_last_socket() {
    let scene = Scene::new(10).await;
    let mut peer = scene.add(false, &PATIENT, Keeps::Nothing).await;
    scene.linger.close();
    let mut run = pin!(scene.linger.clone().run());
    assert!(timeout(Duration::from_millis(50), &mut run).await.is_err(), "one is left");
    peer.shutdown().await.expect("open");
    timeout(Duration::from_secs(15), run).await.expect("nobody is left");
}

/// What a peer and its kernel do.
#[derive(Debug, Clone, Copy)]
enum Event {
    Sends(usize),
    Acks(usize),
    Fin,
    Reset,
    /// Milliseconds.
    Passes(u64),
}

/// What is read of a socket before others have their turn.
const AT_ONCE: usize = 100;

/// The socket of a [`Wait`].
#[derive(Debug)]
struct World {
    now: Instant,
    unread: usize,
    unacked: usize,
    is_fin: bool,
    is_reset: bool,
    progress_at: Instant,
}

impl World {
    fn discard(&mut self) -> Discarded {
        if self.is_reset {
            return Discarded::Reset;
        }
        if self.unread == 0 {
            return if self.is_fin { Discarded::Fin } else { Discarded::Nothing };
        }
        self.unread -= self.unread.min(AT_ONCE);
        Discarded::Bytes
    }

    fn happens(&mut self, event: Event) {
        let is_open = !self.is_fin && !self.is_reset;
        match event {
            Event::Sends(count) if is_open => (self.unread, self.progress_at) = (self.unread + count, self.now),
            Event::Acks(count) if !self.is_reset && self.unacked > 0 => {
                (self.unacked, self.progress_at) = (self.unacked.saturating_sub(count), self.now);
            }
            Event::Fin if is_open => self.is_fin = true,
            Event::Reset => self.is_reset = true,
            _ => {}
        }
    }

    fn has_news(&self) -> bool {
        self.unread > 0 || self.is_fin || self.is_reset
    }
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (1_usize..400).prop_map(Event::Sends),
        4 => (1_usize..400).prop_map(Event::Acks),
        1 => Just(Event::Fin),
        1 => Just(Event::Reset),
        6 => (0_u64..1500).prop_map(Event::Passes),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    /// Whatever the peer does, and however late we look: a socket with something unread is never closed before its deadline, none is
    /// let go because all was acknowledged when it was not, and all end in time.
    #[test]
    fn no_wait_ends_too_early_or_never(
        is_done: bool,
        unacked in 0_usize..1000,
        events in prop::collection::vec((event(), any::<bool>()), 0..40),
    ) {
        let zero = Instant::now();
        let patience = Patience { linger: Duration::from_secs(2), linger_max: Duration::from_secs(10) };
        let mut world = World { now: zero, unread: 0, unacked, is_fin: false, is_reset: false, progress_at: zero };
        let mut wait = Wait::new(is_done, &patience, unacked, zero);
        let mut over = None;
        let rest = [(Event::Passes(20_000), true)];
        'all: for (event, is_prompt) in events.into_iter().chain(rest) {
            let until = world.now + Duration::from_millis(if let Event::Passes(millis) = event { millis } else { 0 });
            world.happens(event);
            // The timers that are due meanwhile, each with the news that the kernel had by then.
            loop {
                while is_prompt && world.has_news() {
                    let found = world.discard();
                    over = wait.go_on(&found, None, world.now);
                    if over.is_some() {
                        break 'all;
                    }
                }
                if wait.due > until {
                    break;
                }
                world.now = world.now.max(wait.due);
                let found = world.discard();
                over = wait.go_on(&found, Some(world.unacked), world.now);
                if over.is_some() {
                    break 'all;
                }
                prop_assert!(wait.due > world.now, "it is due for ever");
            }
            world.now = until;
        }
        let idle = world.now - world.progress_at;
        match over {
            None => prop_assert!(false, "it never ends"),
            Some(Lingered::Fin) => prop_assert!(world.is_fin && world.unread == 0),
            Some(Lingered::Reset) => prop_assert!(world.is_reset),
            Some(Lingered::Acked) => prop_assert!(is_done && world.unread == 0 && world.unacked == 0, "{world:?}"),
            Some(Lingered::Expired) => {
                prop_assert!(idle >= patience.linger || world.now >= zero + patience.linger_max, "{world:?}");
            }
            Some(Lingered::Evicted) => prop_assert!(false, "nobody asked for it"),
        }
        prop_assert!(world.now <= zero + patience.linger_max, "{:?}", world.now - zero);
    }
}
