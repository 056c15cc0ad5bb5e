//! Sockets in their last wait cost next to nothing, and nobody is turned away for them.

use crate::harness::{
    DEADLINE, End, Frame,
    crowd::{Front, Member, Stage, connect, is_strict, tally, together},
    proxy::Metrics,
    ws::CLOSE,
};
use std::{
    cell::RefCell,
    time::{Duration, Instant},
};
use tokio::time::{sleep, timeout};

const LINGERING: &str = "tidegate_lingering_sockets";
const EVICTED: &str = "tidegate_lingered_total{leg=\"client\",how=\"evicted\"}";

/// Sockets wait for a minute for peers that never end, and it does not take long until they wait.
const WAITING: &str = "close = { handshake_timeout = '100ms', linger = '60s', linger_max = '60s' }";

/// Echoes, and leaves without a Close when it is told to.
async fn leaves_on_demand(mut member: Member) {
    member.handshake().await;
    while let Ok(frame) = member.frame().await {
        if frame.opcode == CLOSE {
            let _ = member.send(&Frame::new(CLOSE, &frame.payload)).await;
            member.fin_and_rest().await;
            return;
        }
        if frame.text() == "leave" {
            return;
        }
        member.send(&frame.again()).await.expect("an open session");
    }
}

/// Sessions whose backend leaves: their clients have a Close and our FIN, and stay as they are.
async fn left_alone(front: &Front<'_>, count: usize) -> Vec<Member> {
    let clients = connect(front.address, count).await;
    together(clients, async |mut client| {
        client.send(&Frame::text("leave")).await.expect("an open session");
        let close = timeout(DEADLINE, client.frame()).await.expect("in time").expect("a Close");
        assert_eq!((close.opcode, close.code()), (CLOSE, 1012));
        let end = timeout(DEADLINE, client.frame()).await.expect("in time");
        assert_eq!(end.expect_err("nothing follows a Close"), End::Fin);
        client
    })
    .await
}

fn count(metrics: &Metrics, name: &str) -> usize {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
    let count = metrics.get(name).round() as usize;
    count
}

/// Round trips of 64 sessions that take turns, 99th percentile, for a while.
async fn echo_p99(front: &Front<'_>) -> Duration {
    let clients = connect(front.address, 64).await;
    let times = RefCell::new(Vec::new());
    let until = Instant::now() + Duration::from_secs(3);
    together(clients, async |mut client| {
        while Instant::now() < until {
            let begun = Instant::now();
            client.send(&Frame::text("0123456789abcdef")).await.expect("an open session");
            client.frame().await.expect("an echo");
            times.borrow_mut().push(begun.elapsed());
            sleep(Duration::from_millis(5)).await;
        }
        client.send(&Frame::close(1000, "")).await.expect("an open session");
        assert_eq!(client.rest().await.summary(), "Close 1000, Fin");
    })
    .await;
    let mut times = times.into_inner();
    times.sort_unstable();
    times[times.len() * 99 / 100]
}

/// 10,000 sockets that wait for a minute: at most 10 MiB of memory and 1 % of a processor, and new sessions are none the worse.
#[test]
fn lingering_sockets_are_not_felt() {
    let (waves, each) = if is_strict() { (2, 5000) } else { (2, 750) };
    let total = waves * each;
    let stage = Stage::new();
    let backend = stage.backend(leaves_on_demand);
    let t = stage.tidegate(WAITING, backend.address);
    let held = stage.clients(async || {
        let before = echo_p99(&t).await;
        // What the sessions themselves need is there from then on, and is used again.
        for _ in 0..2 {
            let ended = left_alone(&t, each).await;
            together(ended, async |member| assert_eq!(member.fin_and_rest().await.end, End::Fin)).await;
        }
        t.metrics_when("nobody waits", |m| count(m, LINGERING) == 0);
        echo_p99(&t).await;
        let (mut held, mut memory) = (Vec::new(), Vec::new());
        memory.push(t.resident());
        for _ in 0..waves {
            held.extend(left_alone(&t, each).await);
            memory.push(t.resident());
        }
        let lingering = t.metrics_when("all of them wait", |m| count(m, LINGERING) == total);
        // They are no connections any more: who waits holds a descriptor and nothing else.
        assert_eq!(count(&lingering, "tidegate_client_connections"), 0);
        let cpu = t.cpu_time();
        sleep(Duration::from_secs(5)).await;
        let cpu = t.cpu_time().saturating_sub(cpu).as_secs_f64() / 5.0 * 100.0;
        let after = echo_p99(&t).await;
        // What the allocator has is given back with a delay.
        memory.push(t.resident());
        let grown = memory[waves + 1].saturating_sub(memory[0]);
        println!(
            "{total} sockets wait: memory {:?} KiB ({} KiB more), {cpu:.1} % of a processor; p99 of an echo \
             {before:.1?} before and {after:.1?} beside them",
            memory.iter().map(|bytes| bytes / 1024).collect::<Vec<_>>(),
            grown / 1024,
        );
        if is_strict() {
            // 10 MiB for 10,000.
            assert!(grown <= 1048 * total as u64, "{grown} bytes for {total} sockets");
            assert!(cpu <= 1.0, "{cpu} % of a processor");
        }
        held
    });
    drop(held);
    t.assert_nothing_left();
    t.assert_no_rst();
}

/// What a server with a long wait before `close()` dies of: those who wait hold the places of those who come. Here they make
/// room: ten times as many clients as there are places are served, one after the other, although none of them ever ends.
#[test]
fn nobody_is_turned_away_for_sockets_that_wait() {
    const PLACES: usize = 40;
    const ROUNDS: usize = 10;
    let stage = Stage::new();
    let backend = stage.backend(leaves_on_demand);
    let t = stage.tidegate(&format!("{WAITING}\nlimits.max_connections = {PLACES}"), backend.address);
    stage.clients(async || {
        let mut held = Vec::new();
        for _ in 0..ROUNDS {
            // Half of the places at a time: these end before the next ones come.
            held.extend(left_alone(&t, PLACES / 2).await);
        }
        let metrics = t.metrics();
        let evicted = count(&metrics, EVICTED);
        let waiting = count(&metrics, LINGERING);
        println!("{} clients on {PLACES} places: {evicted} waits were cut short, {waiting} go on", held.len());
        assert_eq!(evicted + waiting, held.len());
        assert!(evicted > 0 && waiting > 0);
        assert!(metrics.sum("tidegate_refused_total").abs() < 0.5, "{metrics:#?}");
    });
    t.assert_nothing_left();
    t.assert_sent_no_rst();
}

/// `close.max_lingering`: the oldest go first, in order: they have their FIN, and nothing of theirs was unread.
#[test]
fn the_number_of_waits_is_bounded() {
    const MAX: usize = 25;
    let stage = Stage::new();
    let backend = stage.backend(leaves_on_demand);
    let settings = "close = { handshake_timeout = '100ms', linger = '60s', linger_max = '60s', max_lingering = 25 }\nlisten.workers = 1";
    let t = stage.tidegate(settings, backend.address);
    stage.clients(async || {
        let held = left_alone(&t, MAX * 2).await;
        let metrics = t.metrics_when("half of them are gone", |m| count(m, EVICTED) == MAX);
        assert_eq!(count(&metrics, LINGERING), MAX);
        // Whoever is still waited for ends in order; the others have nobody any more.
        let ends = together(held, async |member| member.fin_and_rest().await.end).await;
        let ends = tally(ends.iter().map(|end| format!("{end:?}")));
        assert_eq!(ends.get("Fin"), Some(&(MAX * 2)), "{ends:?}");
    });
    t.assert_nothing_left();
    t.assert_sent_no_rst();
}

/// The same for sessions that `close.delay` holds: ten times as many clients as there are places leave without waiting, one after
/// the other, and those whose delay is the oldest make room. Their backends get Close 1001 all the same.
#[test]
fn nobody_is_turned_away_for_a_delay() {
    const PLACES: usize = 40;
    const CLIENTS: usize = 400;
    const BURST: usize = PLACES / 2;
    let stage = Stage::new();
    let backend = stage.backend(async |mut member: Member| {
        member.handshake().await;
        let close = loop {
            let frame = member.frame().await.expect("a Close");
            if frame.opcode == CLOSE {
                break frame;
            }
            member.send(&frame.again()).await.expect("an open session");
        };
        member.send(&Frame::new(CLOSE, &close.payload)).await.expect("an open session");
        (close.code(), member.fin_and_rest().await.end)
    });
    let settings =
        format!("close.delay = '60s'\nlimits.max_connections = {PLACES}\ndrain = {{ delay = '0s', window = '1s' }}");
    let t = stage.tidegate(&settings, backend.address);
    let waiting = stage.clients(async || {
        for index in 0..CLIENTS {
            let mut client = connect(t.address, 1).await.pop().expect("there is one");
            client.send(&Frame::text("hello")).await.expect("an open session");
            assert_eq!(client.frame().await.expect("an echo").text(), "hello", "{index}");
            client.rst();
        }
        let metrics = t.metrics();
        let cut = count(&metrics, "tidegate_close_delays_cut_total");
        let waiting = count(&metrics, "tidegate_connections_active");
        println!("{CLIENTS} clients on {PLACES} places: {cut} delays were cut short, {waiting} go on");
        assert!(metrics.sum("tidegate_refused_total").abs() < 0.5, "{metrics:#?}");
        // No more than had to: each of those that go on has one socket left, and so half a place.
        assert!(cut + waiting == CLIENTS && waiting > PLACES, "{cut} {waiting}");
        waiting
    });
    // Many at once, and no place is free: each gets that of another. Not as many as there are places: on a busy machine a client's
    // end may not have been noticed yet, and a worker that looks for connections has a place meanwhile.
    let burst = stage.clients(async || {
        let clients = connect(t.address, BURST).await;
        together(clients, async |client| client.rst()).await.len()
    });
    assert_eq!(burst, BURST);
    // The drain ends the rest.
    t.sigterm();
    assert_eq!(t.wait_exit(DEADLINE).code(), Some(0));
    let ends = tally(backend.results(CLIENTS + BURST).iter().map(|(code, end)| format!("{code} {end:?}")));
    assert_eq!(ends.get("1001 Fin"), Some(&(CLIENTS + BURST)), "{ends:?}, {waiting} waited");
    t.assert_sent_no_rst();
}
