//! Clients that come all at once: nobody is dropped by a kernel's queue, neither at the front nor at the backend.
//!
//! Each test prints its figures. The full sizes are for `TIDEGATE_STRICT=1`, on a release build with the machine to itself.

use crate::harness::{
    DEADLINE, Side,
    crowd::{self, Accepting, Front, Stage, is_strict},
    lab::Counters,
    left_out,
    visit::{self, Errand, Outcome, Spread, Visit, assert_served, leave, visit},
};
use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::Value;
use std::{
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};
use tokio::{sync::Semaphore, time::sleep_until};

/// Clients that all connect before the first of them is answered; their errands in turn.
async fn at_once(address: SocketAddr, count: usize, errands: &[Errand]) -> Vec<Visit> {
    join_all(errands.iter().cycle().take(count).map(|errand| visit(address, *errand))).await
}

/// The default configuration, whose patience counts on machines that are as fast as a user's. On another one, with the rest of the
/// tests beside it, whoever waits long is not given up.
fn settings() -> &'static str {
    const PATIENT: &str = "upstream = { queue_timeout = '60s', connect_timeout = '60s', handshake_timeout = '60s' }\n\
                           http.header_timeout = '60s'\nclose.handshake_timeout = '30s'";
    if is_strict() { "" } else { PATIENT }
}

/// For a line of figures.
fn spread(visits: &[Visit]) -> Spread {
    Spread::of(visits.iter().map(|visit| visit.took))
}

/// No queue of this namespace has turned anybody away.
#[track_caller]
fn assert_no_overflow(of: &str, counters: &Counters) {
    if !counters.is_exact() {
        left_out("the overflows of accept queues", "the counters are the whole host's");
        return;
    }
    let overflows = ["ListenOverflows", "ListenDrops"].map(|name| counters.get(name));
    assert_eq!(overflows, [0, 0], "overflows and drops of accept queues, {of}");
}

/// What tidegate says of its accept queues is what the kernel shows, and what `wanted` and `somaxconn` come to.
#[track_caller]
fn assert_queues(stage: &Stage, t: &Front<'_>, wanted: u64, somaxconn: u64) -> u64 {
    let is_it = |line: &Value| line["wanted"].is_u64() && line["somaxconn"].is_u64();
    let line = t.log_where("what the kernel grants", is_it);
    let of = |name: &str| line[name].as_u64().unwrap_or_else(|| panic!("no {name} in {line}"));
    let (sockets, effective) = (of("sockets"), of("effective"));
    assert_eq!((of("wanted"), of("somaxconn")), (wanted, somaxconn), "{line}");
    let listening = stage.lab().sockets(Side::Proxy);
    let listening = listening.iter().filter(|s| s.state == "LISTEN" && s.local == t.address).count();
    assert_eq!(sockets, listening as u64, "{line}");
    // A queue of n holds n + 1.
    let each = wanted.min(somaxconn);
    assert!((sockets * each..=sockets * (each + 1)).contains(&effective), "{line}");
    assert!(effective >= wanted || sockets == 128, "{line}");
    sockets
}

/// A host that grants 128 for each accept queue, and clients that connect in the same moment, in which tidegate has no processor:
/// with the default configuration each of them gets its session, its echo and its end, and no queue has overflown.
#[test]
fn queues_of_128_take_a_spike() {
    let sizes: &[usize] = if is_strict() { &[3000, 5000, 9500] } else { &[2000] };
    for &count in sizes {
        let stage = Stage::new();
        if !stage.lab().set(Side::Proxy, "core/somaxconn", "128") {
            return;
        }
        let backend = stage.backend(crowd::anything);
        let t = stage.tidegate(settings(), backend.address);
        let sockets = assert_queues(&stage, &t, 65_535, 128);
        t.signal(Signal::STOP);
        let (visits, waiting) = thread::scope(|scope| {
            // Not on the clients' thread: the kernel's list of so many sockets is long.
            let queued = scope.spawn(|| {
                let begun = Instant::now();
                loop {
                    let sockets = stage.lab().sockets(Side::Proxy);
                    let waiting: u64 = sockets.iter().filter(|s| s.state == "LISTEN").map(|s| s.unread).sum();
                    // Who finds a queue full tries again a second later; that it was full is counted.
                    if waiting == count as u64 || begun.elapsed() > DEADLINE {
                        t.signal(Signal::CONT);
                        return waiting;
                    }
                    thread::sleep(Duration::from_millis(100));
                }
            });
            let visits = stage.clients(async || at_once(t.address, count, &[Errand::Echo]).await);
            (visits, queued.join().expect("no panic"))
        });
        println!(
            "{count} at once, somaxconn 128, {sockets} accept queues: {waiting} waited, 101 after {}; {:?}",
            spread(&visits),
            t.counters()
        );
        assert_no_overflow("in front", &t.counters());
        assert_eq!(waiting, count as u64, "connections in the accept queues");
        assert_served(&visits, count);
        t.assert_nothing_left();
        t.assert_no_rst();
    }
}

/// A backend that nobody has changed: one accept loop, a backlog of 100, and now and then it has other things to do.
const SLOW: Accepting = Accepting { buffers: None, backlog: 100, stalls: Some((1000, Duration::from_millis(200))) };

/// A spike in front of such a backend: all are served, sessions as well as plain requests, and neither its queue nor those in
/// front overflow.
#[test]
fn a_spike_is_not_handed_on() {
    const SESSIONS: &[Errand] = &[Errand::Echo];
    const REQUESTS: &[Errand] = &[Errand::Get];
    const BOTH: &[Errand] = &[Errand::Echo, Errand::Get];
    let sizes: &[_] = if is_strict() {
        &[(SESSIONS, 9500), (REQUESTS, 3000), (REQUESTS, 4000), (BOTH, 4000)]
    } else {
        &[(SESSIONS, 2000), (REQUESTS, 1000), (BOTH, 1000)]
    };
    for &(errands, count) in sizes {
        let stage = Stage::new();
        if !stage.lab().set(Side::Proxy, "core/somaxconn", "4096") {
            return;
        }
        let backend = stage.backend_with(SLOW, crowd::anything);
        let before = stage.lab().counters(Side::Backend);
        let t = stage.tidegate(settings(), backend.address);
        let visits = stage.clients(async || at_once(t.address, count, errands).await);
        let behind = &stage.lab().counters(Side::Backend) - &before;
        println!(
            "{count} at once ({errands:?}) before a backlog of 100: answered after {}; {:?}, behind {behind:?}",
            spread(&visits),
            t.counters()
        );
        assert_no_overflow("in front", &t.counters());
        assert_no_overflow("of the backend", &behind);
        assert_served(&visits, count);
        assert_eq!(backend.results(count).len(), count);
        t.assert_nothing_left();
        t.assert_no_rst();
    }
}

/// The test above finds what it looks for: fewer clients overrun the same backend when nothing is between them.
#[test]
fn a_backlog_of_100_is_overrun_without_a_proxy() {
    const COUNT: usize = 500;
    let stage = Stage::new();
    let backend = stage.backend_with(SLOW, crowd::anything);
    let before = stage.lab().counters(Side::Backend);
    let visits = stage.clients(async || at_once(backend.address, COUNT, &[Errand::Echo]).await);
    let behind = &stage.lab().counters(Side::Backend) - &before;
    println!("{COUNT} at once, a backlog of 100, no proxy: 101 after {}; {behind:?}", spread(&visits));
    if behind.is_exact() {
        assert!(behind.get("ListenOverflows") > 0, "{behind:?}");
    }
}

/// Wave after wave of clients, each by the clock and not when the one before it has gone: all are served.
#[test]
fn waves_of_clients_are_served() {
    // Two descriptors each in this process, which is the backend as well, and in tidegate, where they stay a little longer.
    const AT_MOST: usize = 8000;
    let (waves, each, pause) =
        if is_strict() { (20, 2500, Duration::from_millis(500)) } else { (6, 500, Duration::from_millis(300)) };
    let stage = Stage::new();
    // A client's port is free for the next one, but not at once.
    let _ = stage.lab().set(Side::Client, "ipv4/ip_local_port_range", "1025 65000");
    let backend = stage.backend(crowd::anything);
    let t = stage.tidegate(settings(), backend.address);
    let (took, visits) = stage.clients(async || {
        let begun = tokio::time::Instant::now();
        let places = Semaphore::new(AT_MOST);
        let one = async |wave: u32| {
            sleep_until(begun + pause * wave).await;
            let _place = places.acquire().await.expect("nobody closes it");
            visit(t.address, Errand::Echo).await
        };
        let all = (0..waves).flat_map(|wave| (0..each).map(move |_| wave));
        let visits = join_all(all.map(one)).await;
        (begun.elapsed(), visits)
    });
    println!("{waves} waves of {each}, one in {pause:?}, all in {took:.1?}: 101 after {}", spread(&visits));
    assert_no_overflow("in front", &t.counters());
    assert_served(&visits, visits.len());
    t.assert_nothing_left();
    t.assert_no_rst();
}

/// A spike upon many sessions that stay: all who come are served, and all who stay still get their echo.
#[test]
fn a_spike_upon_held_sessions() {
    let (held, spike) = if is_strict() { (7500, 1900) } else { (500, 300) };
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let t = stage.tidegate(settings(), backend.address);
    let (visits, echoes, ends) = stage.clients(async || {
        let members = crowd::connect(t.address, held).await;
        let visits = at_once(t.address, spike, &[Errand::Echo]).await;
        let echoes = join_all(members.into_iter().map(async |mut member| {
            let echo = visit::echo(&mut member, "still here").await;
            (member, echo.err())
        }));
        let (members, echoes): (Vec<_>, Vec<_>) = echoes.await.into_iter().unzip();
        let ends = join_all(members.into_iter().map(leave)).await;
        (visits, crowd::tally(echoes), crowd::tally(ends))
    });
    println!("{spike} at once upon {held} held: 101 after {}", spread(&visits));
    assert_no_overflow("in front", &t.counters());
    assert_served(&visits, spike);
    assert_eq!(echoes, [(None, held)].into());
    assert_eq!(ends, [(Outcome::Served, held)].into());
    t.assert_nothing_left();
    t.assert_no_rst();
}
