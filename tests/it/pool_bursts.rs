//! The experiment that the upstream pool grew from: requests in bursts with gaps, each a session of one message, and how many connections
//! the backend gets to see. Once each with one of its own, once on a connection that is counted (opened by the first, closed after the
//! last), once on one that is kept for a while.
//!
//! `TIDEGATE_STRICT=1 cargo test --release --test it pool_bursts -- --nocapture` prints the rows of docs/upstream.md. Times are printed and not asserted.

use crate::harness::{
    crowd::{self, Stage, is_strict},
    front::{self, Manners},
    visit::{Outcome, Spread, arrive, echo, leave},
};
use futures_util::future::join_all;
use std::{net::SocketAddr, rc::Rc, time::Duration};
use tokio::{
    sync::Barrier,
    time::{Instant, interval},
};

/// 1,000 in a second: from the beginning of one burst to that of the next.
const EVERY: Duration = Duration::from_millis(100);
const EACH: usize = 100;

/// The clients of one burst. Each gets its answer, and leaves when all have theirs; how each went, and how long its answer took from `connect()` on.
async fn burst(address: SocketAddr) -> Vec<(Outcome, Duration)> {
    let all = Rc::new(Barrier::new(EACH));
    join_all((0..EACH).map(async |_| {
        let begun = Instant::now();
        let mut visit = arrive(address, Duration::from_secs(15)).await.result;
        let answer = match &mut visit {
            Ok(member) => echo(member, "a request").await.err(),
            Err(outcome) => Some(*outcome),
        };
        let took = begun.elapsed();
        all.wait().await;
        match (visit, answer) {
            (Ok(member), None) => (leave(member).await, took),
            (_, outcome) => (outcome.expect("one of both"), took),
        }
    }))
    .await
}

fn bursts(what: &str, pool: &str) -> (front::Seen, usize) {
    let count = if is_strict() { 100 } else { 5 };
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let front = front::Front::start(stage.lab(), Manners { max_streams: 1000, ..Manners::default() }, backend.address);
    // Workers do not share connections: with two there are twice as many.
    let t = stage.tidegate(&format!("listen.workers = 1\npool = {{ {pool} }}"), front.address);
    let went = stage.clients(async || {
        let mut ticks = interval(EVERY);
        let mut went = Vec::new();
        for _ in 0..count {
            ticks.tick().await;
            went.extend(burst(t.address).await);
        }
        went
    });
    let failures = went.iter().filter(|(outcome, _)| *outcome != Outcome::Served).count();
    let times = Spread::of(went.iter().map(|(_, took)| *took));
    let seen = front.seen();
    let (shared, own) = (seen.streams.len(), seen.plain);
    println!("| {what} | {} | {} | {failures} | {times} |", went.len(), shared + own);
    assert_eq!(failures, 0, "{:?}", crowd::tally(went.iter().map(|(outcome, _)| *outcome)));
    assert!(t.metrics().sum("tidegate_pool_invariant_violations_total").abs() < 0.5);
    t.assert_nothing_left();
    (seen, count)
}

#[test]
fn a_connection_for_each_request() {
    let (seen, count) = bursts("one for each request", "mode = 'dedicated'");
    assert_eq!((seen.plain, seen.streams.len()), (count * EACH, 0));
}

/// "Open at 0 to 1, close at 1 to 0": no more than one for each burst.
#[test]
fn a_counted_connection() {
    let (seen, count) = bursts("counted", "mode = 'multiplexed', idle_timeout = '0s', max_streams = 128");
    assert!(seen.plain == 0 && (1..=count).contains(&seen.streams.len()), "{seen:?}");
    assert_eq!(seen.all_streams(), count * EACH);
}

/// And with a timeout that is longer than a gap, one for all.
#[test]
fn a_counted_connection_that_is_kept() {
    let (seen, count) =
        bursts("counted, kept for 10 s", "mode = 'multiplexed', idle_timeout = '10s', max_streams = 128");
    assert_eq!((seen.plain, &seen.streams[..]), (0, &[count * EACH][..]));
}
