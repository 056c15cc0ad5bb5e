//! What peers cost that take nothing, or give only half: bounded, whatever their number, and not at the expense of others.

use crate::harness::{
    DEADLINE, Frame, LIMIT,
    crowd::{self, Accepting, Front, Member, Stage, connect, together},
    ws::BINARY,
};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    sync::Semaphore,
    time::{sleep, timeout},
};

const KIB: u64 = 1024;

/// New sessions, `count` of them at once with five messages each, are served as if there was nobody else.
async fn assert_others_are_served(address: SocketAddr, count: usize) -> Duration {
    let begun = Instant::now();
    let others = connect(address, count).await;
    together(others, async |mut other| {
        for text in ["a", "b", "c", "d", "e"] {
            other.send(&Frame::text(text)).await.expect("an open session");
            let echo = timeout(DEADLINE, other.frame()).await.expect("in time").expect("an echo");
            assert_eq!(echo.text(), text);
        }
        other.send(&Frame::close(1000, "")).await.expect("an open session");
        assert_eq!(other.rest().await.summary(), "Close 1000, Fin");
    })
    .await;
    begun.elapsed()
}

/// What was measured, per session, to be printed and asserted.
#[derive(Clone, Copy, Debug)]
struct Growth {
    resident: u64,
    /// None where sockets of others can't be told from ours.
    sockets: Option<u64>,
}

/// What the proxy uses; the difference of two of them, by the number of sessions, is a [`Growth`].
fn usage(front: &Front<'_>) -> (u64, Option<u64>) {
    (front.resident(), front.socket_memory())
}

fn growth(before: (u64, Option<u64>), after: (u64, Option<u64>), sessions: u64) -> Growth {
    let sockets = before.1.zip(after.1).map(|(before, after)| after.saturating_sub(before) / sessions);
    Growth { resident: after.0.saturating_sub(before.0) / sessions, sockets }
}

/// Waits until `counter` has stood still for half a second.
async fn stands_still(counter: &AtomicU64) -> u64 {
    let (mut last, mut since, begun) = (counter.load(Ordering::Relaxed), Instant::now(), Instant::now());
    while since.elapsed() < Duration::from_millis(500) {
        assert!(begun.elapsed() < LIMIT, "{last} and still counting");
        sleep(Duration::from_millis(10)).await;
        let now = counter.load(Ordering::Relaxed);
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    last
}

/// 1,000 clients ask for 10 MB each and do not read a byte of them: each costs at most 160 KiB of tidegate's memory and 1 MiB of
/// the kernel's, the backend is held up rather than tidegate filled, and others are served.
#[test]
fn a_reader_that_stops_costs_a_bounded_amount() {
    const COUNT: u64 = 1000;
    const OFFERED: u64 = 10_000_000;
    let stage = Stage::new();
    let taken = Arc::new(AtomicU64::new(0));
    let offered = Arc::clone(&taken);
    // Buffers like tidegate's: what is measured is not how much the backend's own kernel would hold.
    let backend = stage.backend_with(
        Accepting { buffers: Some(128 << 10), ..Accepting::default() },
        async move |mut member: Member| {
            member.handshake().await;
            match member.frame().await {
                Ok(frame) if frame.text() == "10 MB, please" => {
                    // Small enough to be held back until whole, so that the held half comes on top of all else.
                    let messages = member.bytes_of(&Frame::binary(vec![b'x'; 16_000])).repeat(10);
                    let sent = |count| _ = offered.fetch_add(count as u64, Ordering::Relaxed);
                    for _ in 0..OFFERED / 160_000 {
                        if member.send_until_heard(&messages, sent).await.is_some() {
                            // The client's end, and no frame of ours is whole: FIN is what is left to say.
                            member.fin_and_rest().await;
                            return;
                        }
                    }
                }
                Ok(frame) => {
                    let _ = member.send(&frame.again()).await;
                    crowd::echo_on(member).await;
                }
                Err(_) => {}
            }
        },
    );
    // The buffers are the default ones; a stalled client would be given up after 30 s, which a slow machine may need here.
    let t = stage.tidegate("websocket.write_timeout = '300s'", backend.address);
    let (empty, idle, stalled, moved, served) = stage.clients(async || {
        let empty = usage(&t);
        let mut clients = connect(t.address, usize::try_from(COUNT).expect("a small number")).await;
        let idle = usage(&t);
        for client in &mut clients {
            client.send(&Frame::text("10 MB, please")).await.expect("an open session");
        }
        let moved = stands_still(&taken).await;
        let stalled = usage(&t);
        let served = assert_others_are_served(t.address, 20).await;
        // Nobody who stalls was given up meanwhile.
        assert!(t.metrics().get("tidegate_connections_active") > 999.5);
        (empty, idle, stalled, moved, served)
    });
    // Counted from the beginning: memory that the handshakes left behind is used again, and would make each seem to cost less.
    let (each, before) = (growth(empty, stalled, COUNT), growth(empty, idle, COUNT));
    println!(
        "{COUNT} readers that stopped: {} KiB of memory each, of which {} as a session before; {} KiB in the kernel's sockets \
         each; {} KiB had left the backend for each; 20 others were served in {served:.1?}",
        each.resident / KIB,
        before.resident / KIB,
        each.sockets.map_or_else(|| "?".to_owned(), |bytes| (bytes / KIB).to_string()),
        moved / COUNT / KIB,
    );
    assert!(moved < COUNT * OFFERED, "nothing was held up");
    assert!(each.resident <= 160 * KIB, "{each:?}");
    assert!(each.sockets.is_none_or(|bytes| bytes <= 1024 * KIB), "{each:?}");
    t.assert_nothing_left();
    t.assert_sent_no_rst();
}

/// 5,000 clients send half of a frame that is held until it is whole, and wait: each costs its frame and little more, and others
/// are served. Then the frames are finished, and are answered as if nothing had been.
#[test]
fn half_a_frame_costs_no_more_than_the_frame() {
    const COUNT: u64 = 5000;
    const FRAME: usize = 16 << 10;
    // What a session itself may cost, both of its sockets and their handshakes included.
    const SESSION: u64 = 16 * KIB;
    let stage = Stage::new();
    let backend = stage.backend(crowd::echo);
    let t = stage.tidegate("websocket.hold_timeout = '300s'", backend.address);
    let (empty, idle, held, served) = stage.clients(async || {
        let empty = usage(&t);
        let clients = connect(t.address, usize::try_from(COUNT).expect("a small number")).await;
        let idle = usage(&t);
        let frame = clients[0].bytes_of(&Frame::binary(vec![b'x'; FRAME]));
        let (first, second) = frame.split_at(FRAME / 2);
        let read_before = t.metrics().sum("tidegate_bytes_total");
        let clients = together(clients, async |mut client| {
            client.send_bytes(first).await.expect("an open session");
            client
        })
        .await;
        #[expect(clippy::cast_precision_loss, reason = "far from 2^52")]
        let all = read_before + (COUNT * first.len() as u64) as f64;
        while t.metrics().sum("tidegate_bytes_total") < all - 0.5 {
            sleep(Duration::from_millis(10)).await;
        }
        let held = usage(&t);
        let served = assert_others_are_served(t.address, 20).await;
        let turns = Semaphore::new(100);
        together(clients, async |mut client| {
            let _turn = turns.acquire().await.expect("nobody closes it");
            client.send_bytes(second).await.expect("an open session");
            let echo = timeout(DEADLINE, client.frame()).await.expect("in time").expect("an echo");
            assert_eq!((echo.opcode, echo.payload.len()), (BINARY, FRAME));
            client.send(&Frame::close(1000, "")).await.expect("an open session");
            assert_eq!(client.rest().await.summary(), "Close 1000, Fin");
        })
        .await;
        (empty, idle, held, served)
    });
    let (session, half) = (growth(empty, idle, COUNT), growth(idle, held, COUNT));
    println!(
        "{COUNT} clients with half a frame: {} bytes of memory each, {} before it as a session; 20 others were served in {served:.1?}",
        half.resident, session.resident,
    );
    // The frame, its header, and half as much again for what the allocator makes of it.
    let bound = (FRAME as u64 + 14) * 3 / 2;
    assert!(half.resident <= bound, "{half:?}, {bound} allowed");
    assert!(session.resident <= SESSION, "{session:?}, {SESSION} allowed");
    t.assert_nothing_left();
    t.assert_no_rst();
}
