//! Thousands of clients at once before a shared connection that is not there yet (`pool.mode = "multiplexed"`): how many the backend gets to
//! see, what becomes of the clients when none comes about, and what those leave behind who go before.
//!
//! The gate begins with 64 handshakes at a time. So that all of a crowd wait for the same open, however slow the machine is, the link to
//! the backend is cut until they do: the kernel then says its SYN again.

use crate::harness::{
    Message, Side,
    crowd::{self, Front, Member, Stage, is_strict},
    front::{self, Manners, Treat},
    visit::{Arrival, Errand, Outcome, arrive, echo, leave, visit},
};
use futures_util::future::join_all;
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{sync::Barrier, time::sleep};

/// Longer than any machine takes.
const PATIENCE: Duration = Duration::from_mins(2);

/// One worker, since workers share no connections; and times for slow machines (of `write_timeout` the kernel has its own for a SYN).
const SETTINGS: &str = "listen.workers = 1\n\
                        upstream = { connect_timeout = '120s', queue_timeout = '120s' }\n\
                        websocket.write_timeout = '120s'\n\
                        pool = { mode = 'multiplexed', max_streams = 16_384, max_uses = 0, idle_timeout = '300ms' }\n";

/// Descriptors are 20,000, and the budget sets two of them aside for each client, also where streams take none.
fn sizes() -> &'static [usize] {
    if is_strict() { &[4000, 9500] } else { &[2000] }
}

/// A backend that echoes on streams, as many as are wanted.
fn backend(stage: &Stage) -> front::Front {
    let manners = Manners { max_streams: 65_536, treat: Arc::new(|_| Treat::Echo), ..Manners::default() };
    // Nobody is to come by HTTP/1.1: there is nothing behind it.
    front::Front::start(stage.lab(), manners, SocketAddr::from(([0, 0, 0, 0], 9)))
}

/// Until so many wait for the connection.
async fn until_waiting(t: &Front<'_>, count: usize) {
    let begun = Instant::now();
    loop {
        let waiting = t.metrics().count("tidegate_pool_waiters");
        if waiting == count as u64 {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{waiting} of {count} wait");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Nothing of the pool's is in use, and nothing of it was ever wrong.
#[track_caller]
fn assert_pool_is_left(t: &Front<'_>) {
    t.metrics_when("that no shared connection is left", |metrics| {
        metrics.sum("tidegate_pool_connections").abs() < 0.5 && metrics.count("tidegate_pool_references") == 0
    });
    let metrics = t.metrics();
    for zero in ["tidegate_pool_waiters", "tidegate_pool_invariant_violations_total"] {
        assert_eq!(metrics.count(zero), 0, "{zero}");
    }
}

fn opens(t: &Front<'_>, result: &str) -> u64 {
    t.metrics().count(&format!("tidegate_pool_opens_total{{result=\"{result}\"}}"))
}

/// A session that lasts until all have theirs. Its outcome.
async fn stay(arrival: Arrival, all: &Barrier) -> Outcome {
    let mut result = arrival.result;
    let echoed = match &mut result {
        Ok(member) => echo(member, "hello").await,
        Err(outcome) => Err(*outcome),
    };
    all.wait().await;
    match (result, echoed) {
        (Ok(member), Ok(())) => leave(member).await,
        (_, outcome) => outcome.expect_err("one of both"),
    }
}

/// All come in the same moment, and all stay until the last one has its echo: the backend has accepted one connection. When the last has
/// left it goes, after `pool.idle_timeout`.
#[test]
fn a_crowd_opens_one_connection() {
    for (&count, waits) in sizes().iter().flat_map(|count| [(count, false), (count, true)]) {
        let stage = Stage::new();
        let backend = backend(&stage);
        let t = stage.tidegate(SETTINGS, backend.address);
        if waits && !stage.lab().cut(Side::Backend) {
            return;
        }
        let outcomes = stage.clients(async || {
            let all = Barrier::new(count);
            let clients = join_all((0..count).map(async |_| stay(arrive(t.address, PATIENCE).await, &all).await));
            let link = async {
                if waits {
                    until_waiting(&t, count).await;
                    assert_eq!(t.metrics().count("tidegate_pool_connections{state=\"opening\"}"), 1);
                    stage.lab().mend(Side::Backend);
                }
            };
            tokio::join!(clients, link).0
        });
        assert_eq!(crowd::tally(outcomes), BTreeMap::from([(Outcome::Served, count)]));
        let seen = backend.seen_when("its end", |seen| seen.ended.len() == seen.streams.len());
        assert_eq!((seen.streams, seen.plain, seen.ended), (vec![count], 0, vec![true]));
        assert_pool_is_left(&t);
        let metrics = t.metrics();
        for (name, wanted) in [
            ("tidegate_pool_opens_total{result=\"opened\"}", 1),
            ("tidegate_pool_idle_closes_total", 1),
            ("tidegate_pool_goaways_total", 0),
        ] {
            assert_eq!(metrics.count(name), wanted, "{name}");
        }
        assert!(
            (metrics.sum("tidegate_pool_opens_total") - metrics.get("tidegate_pool_idle_closes_total")).abs() < 0.5
        );
        t.assert_nothing_left();
        t.assert_no_rst();
    }
}

/// The least time in which so many connects in a row may have failed: 50 ms after the first, twice as long after each further one, a
/// second at most; and of each half, since it is jittered.
fn least_time(opens: u64) -> Duration {
    (1..opens).map(|nth| Duration::from_millis(50 << (nth - 1).min(5)).min(Duration::from_secs(1)) / 2).sum()
}

/// All wait for the same open, and nobody listens: each of them gets its 502 of that one. Who comes then gets it as well, and the backend hears
/// of no more connects than the backoff allows, however many come.
#[test]
fn a_crowd_fails_with_one_connect() {
    const LATER: usize = 200;
    for &count in sizes() {
        let stage = Stage::new();
        let backend = backend(&stage);
        let before = stage.lab().counters(Side::Backend);
        let t = stage.tidegate(SETTINGS, backend.address);
        if !stage.lab().cut(Side::Backend) {
            return;
        }
        // A SYN that nobody listens for is answered by a RST.
        let refused = || (&stage.lab().counters(Side::Backend) - &before).get("OutRsts");
        stage.clients(async || {
            let clients = join_all((0..count).map(|_| visit(t.address, Errand::Echo)));
            let link = async {
                until_waiting(&t, count).await;
                backend.stop_listening().await;
                let begun = Instant::now();
                stage.lab().mend(Side::Backend);
                begun
            };
            let (visits, begun) = tokio::join!(clients, link);
            let outcomes = crowd::tally(visits.into_iter().map(|visit| visit.outcome));
            assert_eq!(outcomes, BTreeMap::from([(Outcome::Status(502), count)]));
            assert_eq!((opens(&t, "failed"), refused()), (1, 1), "connects for {count} clients");
            for _ in 0..LATER {
                assert_eq!(visit(t.address, Errand::Echo).await.outcome, Outcome::Status(502));
            }
            let (opens, took) = (opens(&t, "failed"), begun.elapsed());
            assert!(least_time(opens) <= took, "{opens} connects within {took:?}");
            assert_eq!(refused(), i64::try_from(opens).expect("a few"));
        });
        let metrics = t.metrics();
        assert_eq!(metrics.count("tidegate_pool_refusals_total{reason=\"failed\"}"), (count + LATER) as u64);
        assert!(
            (metrics.sum("tidegate_pool_opens_total") - metrics.get("tidegate_pool_opens_total{result=\"failed\"}"))
                .abs()
                < 0.5
        );
        assert_eq!(backend.seen().streams, [0_usize; 0]);
        assert_pool_is_left(&t);
        t.assert_nothing_left();
        t.assert_sent_no_rst();
    }
}

/// Half of a crowd leaves while the connection is being opened, by FIN and by RST: the others get their sessions on it, and nothing is left
/// of those.
#[test]
fn half_of_a_crowd_leaves() {
    for &count in sizes() {
        let stage = Stage::new();
        let backend = backend(&stage);
        let t = stage.tidegate(SETTINGS, backend.address);
        if !stage.lab().cut(Side::Backend) {
            return;
        }
        let stays = count / 2;
        let outcomes = stage.clients(async || {
            let (all, left) = (Barrier::new(stays), Barrier::new(count - stays + 1));
            let staying = join_all((0..stays).map(async |_| stay(arrive(t.address, PATIENCE).await, &all).await));
            let leaving = join_all((0..count - stays).map(async |index| {
                let mut member = Member::connect(t.address).await;
                let request = Message::websocket("/").bytes();
                member.send_bytes(&request).await.expect("a connected socket");
                left.wait().await;
                if index % 2 == 0 {
                    member.rst();
                } else {
                    let rest = member.fin_and_rest().await;
                    assert_eq!((rest.summary().as_str(), rest.messages), ("Fin", 0));
                }
            }));
            let link = async {
                until_waiting(&t, count).await;
                left.wait().await;
                until_waiting(&t, stays).await;
                stage.lab().mend(Side::Backend);
            };
            tokio::join!(staying, leaving, link).0
        });
        assert_eq!(crowd::tally(outcomes), BTreeMap::from([(Outcome::Served, stays)]));
        let seen = backend.seen_when("its end", |seen| seen.ended.len() == seen.streams.len());
        // The backend has heard of nobody who left.
        assert_eq!(seen.all_streams(), stays);
        assert_eq!((seen.streams.len(), seen.plain), (1, 0));
        let cancelled = t.metrics().count("tidegate_pool_refusals_total{reason=\"cancelled\"}");
        assert_eq!(cancelled, (count - stays) as u64);
        assert_pool_is_left(&t);
        t.assert_nothing_left();
        t.assert_sent_no_rst();
    }
}
