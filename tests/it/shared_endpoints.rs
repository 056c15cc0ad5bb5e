//! Several endpoints before whom clients wait, for a connection, an answer, or a stream of a shared connection: for how long, and where they
//! go when it turns out that they wait in vain.
//!
//! What becomes of sessions when an endpoint dies is in `endpoints.rs`.

use crate::harness::{
    DEADLINE, Message, Side,
    crowd::{self, Member, Stage, tally},
    front::{Front, Greets, Manners, Treat},
    tls::{self, Authority},
    visit::{Errand, Outcome, Visit, arrive, echo, leave, visit},
};
use futures_util::future::join_all;
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::time::sleep;

const MODES: [&str; 2] = ["dedicated", "multiplexed"];

/// These are the endpoints.
fn at(endpoints: &[Front]) -> String {
    let addresses: Vec<_> = endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
    format!("listen.workers = 1\nupstream.address = {addresses:?}\n")
}

/// Somebody who accepts, and says nothing until the other side has enough.
async fn silence(mut member: Member) {
    // A request, or what is none; then the end.
    while member.message().await.is_ok() {}
}

/// Connections of HTTP/2 and others, at each.
fn connections(endpoints: &[Front]) -> Vec<(usize, usize)> {
    let seen = endpoints.iter().map(Front::seen);
    seen.map(|seen| (seen.streams.len(), seen.plain)).collect()
}

/// One 504, and not after each endpoint had a deadline of its own. That it is less than two of them is no figure of speed: on a slow machine
/// it is late by less than a whole one.
#[track_caller]
fn assert_one_deadline(visit: &Visit, deadline: Duration) {
    assert_eq!(visit.outcome, Outcome::Status(504));
    assert!(visit.took < deadline * 2, "{:?} with a deadline of {deadline:?}", visit.took);
}

/// Endpoints that accept and answer nothing, neither a handshake nor HTTP/2: what one may have seen is not asked of another. The client
/// hears of it after one deadline: with streams the one for SETTINGS too, and the same endpoint is asked over HTTP/1.1.
#[test]
fn silence_is_heard_once() {
    const ANSWER: Duration = Duration::from_secs(3);
    const SETTINGS: Duration = Duration::from_secs(2);
    for mode in MODES {
        let stage = Stage::new();
        let backend = stage.backend(silence);
        let endpoints = [(); 3].map(|()| {
            let manners = Manners { greets: Arc::new(|_| Greets::Nothing), ..Manners::default() };
            Front::start(stage.lab(), manners, backend.address)
        });
        let settings = format!("{}upstream.handshake_timeout = '3s'\npool.mode = '{mode}'\n", at(&endpoints));
        let t = stage.tidegate(&settings, endpoints[0].address);
        let visit = stage.clients(async || visit(t.address, Errand::Echo).await);
        let mut seen = connections(&endpoints);
        seen.sort_unstable();
        let (asked, deadline) = if mode == "dedicated" { ((0, 1), ANSWER) } else { ((1, 1), SETTINGS + ANSWER) };
        assert_eq!(seen, [(0, 0), (0, 0), asked], "{mode}");
        assert_one_deadline(&visit, deadline);
        assert_eq!(t.metrics().count("tidegate_upstream_retries_total"), 0);
        t.assert_nothing_left();
        t.assert_no_rst();
    }
}

/// Endpoints that accept and never begin with TLS, or to which no packet gets: all that are tried have `upstream.connect_timeout` together.
#[test]
fn a_connect_has_one_deadline() {
    const CONNECT: Duration = Duration::from_secs(4);
    for (mode, is_cut) in MODES.into_iter().flat_map(|mode| [(mode, false), (mode, true)]) {
        let (stage, authority) = (Stage::new(), Authority::new());
        let backend = stage.backend(silence);
        let endpoints = [(); 3].map(|()| Front::start(stage.lab(), Manners::default(), backend.address));
        let tls = tls::settings(&authority);
        let settings = format!("{}{tls}upstream.connect_timeout = '4s'\npool.mode = '{mode}'\n", at(&endpoints));
        let t = stage.tidegate(&settings, endpoints[0].address);
        if is_cut && !stage.lab().cut(Side::Backend) {
            continue;
        }
        let visit = stage.clients(async || visit(t.address, Errand::Echo).await);
        assert_one_deadline(&visit, CONNECT);
        let seen = connections(&endpoints);
        assert!(seen.iter().all(|(h2, others)| *h2 == 0 && *others <= 1), "each at most once: {seen:?}");
        assert_eq!(seen.iter().all(|seen| *seen == (0, 0)), is_cut, "{seen:?}");
        // Counted once for each connect, and not for the last of three.
        let retries = t.metrics().count("tidegate_upstream_retries_total");
        assert!(retries <= 2, "{retries} retries, {mode}, cut: {is_cut}");
        if is_cut {
            stage.lab().mend(Side::Backend);
        }
        t.assert_nothing_left();
    }
}

/// Endpoints that have shared, and then accept connections and say nothing, as if they hung in a restart: another one is tried, but not
/// all of them, one after the other, by the same client.
#[test]
fn endpoints_that_hang_have_one_deadline() {
    let stage = Stage::new();
    let backend = stage.backend(silence);
    let endpoints = [(); 4].map(|()| {
        let greets = Arc::new(|nth| if nth == 0 { Greets::Settings } else { Greets::Nothing });
        let manners = Manners { greets, treat: Arc::new(|_| Treat::Echo), ..Manners::default() };
        Front::start(stage.lab(), manners, backend.address)
    });
    let settings = format!(
        "{}upstream.connect_timeout = '3s'\npool = {{ mode = 'multiplexed', idle_timeout = '1h' }}\n",
        at(&endpoints)
    );
    let t = stage.tidegate(&settings, endpoints[0].address);
    stage.clients(async || {
        let begun = Instant::now();
        while endpoints.iter().any(|endpoint| endpoint.seen().all_streams() == 0) {
            assert!(begun.elapsed() < DEADLINE, "not all are used: {:?}", connections(&endpoints));
            assert_eq!(visit(t.address, Errand::Echo).await.outcome, Outcome::Served);
        }
    });
    for endpoint in &endpoints {
        endpoint.go_away();
        assert_eq!(endpoint.seen_when("the end", |seen| seen.ended.len() == 1).ended, [true]);
    }
    t.metrics_when("that none is left", |metrics| metrics.sum("tidegate_pool_connections").abs() < 0.5);
    let visit = stage.clients(async || visit(t.address, Errand::Echo).await);
    assert_eq!(visit.outcome, Outcome::Status(504));
    let seen = connections(&endpoints);
    let (tried, others) = seen.iter().fold((0, 0), |(tried, others), (h2, plain)| (tried + h2 - 1, others + plain));
    // Each has 2 s for its SETTINGS: after two of them three seconds are over.
    assert!((1..=2).contains(&tried) && others == 0, "{seen:?}");
    assert_eq!(t.metrics().count("tidegate_upstream_retries_total"), tried as u64);
    t.assert_nothing_left();
    // An endpoint that goes away may close before our last word on the connection is there.
    t.assert_sent_no_rst();
}

/// All streams of an endpoint are in use, and clients wait for one. When others find that nobody listens there any more it is left alone,
/// and those who waited get their sessions at another one. Who has one there keeps it.
#[test]
fn nobody_waits_for_a_stream_of_who_is_left_alone() {
    const CLIENTS: usize = 20;
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let endpoints = [1, 100].map(|max_streams| {
        let manners = Manners { max_streams, treat: Arc::new(|_| Treat::Echo), ..Manners::default() };
        Front::start(stage.lab(), manners, backend.address)
    });
    let settings = format!(
        "{}upstream.eject_after = 1\nupstream.eject_time = '1h'\nupstream.queue_timeout = '120s'\n\
         pool = {{ mode = 'multiplexed', max_connections = 1, idle_timeout = '0s' }}\n\
         route = [{{ path = '/own', pool = {{ mode = 'dedicated' }} }}]\n",
        at(&endpoints)
    );
    let t = stage.tidegate(&settings, endpoints[0].address);
    let patience = Duration::from_mins(2);
    let (all, waited) = stage.clients(async || {
        // One at each: of two the less loaded one is no question of chance.
        let mut members = Vec::new();
        for _ in &endpoints {
            members.push(arrive(t.address, patience).await.result.expect("a session"));
        }
        assert_eq!(connections(&endpoints), [(1, 0); 2]);
        let all = members.len() + CLIENTS;
        let clients = join_all((0..CLIENTS).map(|_| arrive(t.address, patience)));
        let others = async {
            let begun = Instant::now();
            let waited = loop {
                let waiting = t.metrics().count("tidegate_pool_waiters");
                if waiting > 0 && endpoints[1].seen().all_streams() as u64 + waiting + 1 == all as u64 {
                    break waiting;
                }
                assert!(begun.elapsed() < DEADLINE, "{waiting} wait: {:?}", connections(&endpoints));
                sleep(Duration::from_millis(5)).await;
            };
            endpoints[0].stop_listening().await;
            let mut others = Vec::new();
            while t.metrics().count("tidegate_upstream_ejections_total") == 0 {
                // They stay, so that the other one becomes the less loaded.
                assert!(others.len() < 2 * CLIENTS, "it is not found out");
                let mut other = Member::connect(t.address).await;
                other.send_bytes(&Message::websocket("/own").bytes()).await.expect("a connected socket");
                assert_eq!(other.message().await.expect("an answer").code(), 101);
                others.push(other);
            }
            (others, waited)
        };
        let (arrivals, (others, waited)) = tokio::join!(clients, others);
        members.extend(arrivals.into_iter().map(|arrival| arrival.result.expect("a session")));
        members.extend(others);
        for member in &mut members {
            assert_eq!(echo(member, "hello").await, Ok(()));
        }
        let count = members.len();
        assert_eq!(tally(join_all(members.into_iter().map(leave)).await), BTreeMap::from([(Outcome::Served, count)]));
        (all, waited)
    });
    let streams = endpoints.each_ref().map(|endpoint| endpoint.seen().streams);
    assert_eq!(streams, [vec![1], vec![all - 1]]);
    let metrics = t.metrics();
    assert_eq!(metrics.count("tidegate_pool_refusals_total{reason=\"cancelled\"}"), waited);
    assert_eq!(metrics.count("tidegate_pool_invariant_violations_total"), 0);
    t.assert_nothing_left();
    t.assert_sent_no_rst();
}
