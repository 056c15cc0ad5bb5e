//! Frames that are valid, and far too many: they cost their sender its session, or nothing but their relay.

use crate::harness::{
    crowd::{self, Member, Stage, is_strict},
    visit::{self, Outcome, leave},
    ws::{CLOSE, CONTINUATION, Frame, PING, PONG, SeenFrame},
};

/// Resident memory may grow by so much while a flood is under way: a relay's buffers, and what an allocator makes of them.
const GROWTH: u64 = 4 << 20;

/// Frames of one flood.
fn size() -> usize {
    if is_strict() { 1_000_000 } else { 30_000 }
}

/// Sends a flood in large portions; how many bytes of it were taken. It may end early: that is seen by who reads.
async fn pour(member: &mut Member, frame: &Frame, count: usize) {
    const PORTION: usize = 1000;
    let portion = member.bytes_of(frame).repeat(PORTION);
    for _ in 0..count / PORTION {
        if member.send_bytes(&portion).await.is_err() {
            return;
        }
    }
}

/// A client that sends more Pings than anybody needs gets 1008. Who talks meanwhile notices nothing.
#[test]
fn a_flood_of_pings_ends_its_session() {
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let t = stage.tidegate("websocket.max_control_rate = 100", backend.address);
    let (seen, beside) = stage.clients(async || {
        let mut other = crowd::connect(t.address, 1).await.remove(0);
        let mut member = crowd::connect(t.address, 1).await.remove(0);
        // In one portion: a slow machine must not make several seconds of it.
        let ping = member.bytes_of(&Frame::new(PING, "")).repeat(300);
        member.send_bytes(&ping).await.expect("room");
        let echoed = visit::echo(&mut other, "meanwhile").await;
        let rest = member.rest().await;
        let closes: Vec<_> = rest.closes.iter().map(|close| (close.code(), close.text())).collect();
        ((rest.messages, closes, rest.end), (echoed, leave(other).await))
    });
    let (pongs, closes, end) = seen;
    println!("300 Pings at once: {pongs} Pongs, {closes:?}, {end:?}");
    assert!(pongs <= 100, "{pongs} Pongs");
    assert_eq!(closes, [(1008, "too many control frames (websocket.max_control_rate)".to_owned())]);
    assert_eq!(beside, (Ok(()), Outcome::Served));
    let line = t.log_where("the end", |line| line["abnormal"] == "client_violation");
    assert_eq!((&line["code"], &line["initiator"]), (&1008.into(), &"tidegate".into()), "{line}");
    t.assert_nothing_left();
    t.assert_sent_no_rst();
}

/// Without that limit each Ping is answered, and memory does not grow with their number.
#[test]
fn pings_without_a_limit_are_relayed_in_no_memory() {
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let t = stage.tidegate("websocket.max_control_rate = 0", backend.address);
    let count = size();
    let (pongs, grown, left) = stage.clients(async || {
        let mut member = crowd::connect(t.address, 1).await.remove(0);
        assert_eq!(visit::echo(&mut member, "first").await, Ok(()));
        let before = t.resident();
        let (mut pongs, mut most) = (0, 0);
        let mut sent = 0;
        while pongs < count {
            if sent < count {
                pour(&mut member, &Frame::new(PING, "p"), 1000).await;
                sent += 1000;
            }
            // What is owed is read before more is sent: the flood is in what is between, and not in this client.
            while pongs + 10_000 < sent || (sent == count && pongs < count) {
                let frame = member.frame().await.expect("a Pong");
                assert_eq!(frame.opcode, PONG);
                pongs += 1;
            }
            if pongs % 10_000 == 0 {
                most = t.resident().max(most);
            }
        }
        (pongs, most.saturating_sub(before), leave(member).await)
    });
    println!("{count} Pings: {pongs} Pongs, {} KiB more", grown / 1024);
    assert_eq!((pongs, left), (count, Outcome::Served));
    assert!(grown < GROWTH, "{grown} bytes more");
    t.assert_nothing_left();
    t.assert_no_rst();
}

/// A message in fragments of a byte each passes in no memory, as long as it is below the limit; beyond it is 1009.
#[test]
fn fragments_of_a_byte() {
    let count = size();
    let stage = Stage::new();
    let backend = stage.backend(async |mut member: Member| {
        member.handshake().await;
        let mut frames = 0;
        loop {
            match member.frame().await {
                Ok(frame) if frame.opcode == CLOSE => {
                    let _ = member.send(&Frame::new(CLOSE, &frame.payload[..2])).await;
                    let rest = member.fin_and_rest().await;
                    return (frames, frame.code(), rest.end);
                }
                Ok(_) => frames += 1,
                Err(end) => return (frames, 0, end),
            }
        }
    });
    let t = stage.tidegate(&format!("websocket.max_message = '{count}'"), backend.address);
    let (grown, closes) = stage.clients(async || {
        let mut member = crowd::connect(t.address, 1).await.remove(0);
        member.send(&Frame::text("a").fin(false)).await.expect("room");
        let before = t.resident();
        let mut most = 0;
        let fragment = Frame::new(CONTINUATION, "a").fin(false);
        for _ in 1..count / 10_000 {
            pour(&mut member, &fragment, 10_000).await;
            most = t.resident().max(most);
        }
        // One more than there may be.
        pour(&mut member, &fragment, 10_000).await;
        let rest = member.rest().await;
        let closes: Vec<_> = rest.closes.iter().map(SeenFrame::code).collect();
        (most.saturating_sub(before), (closes, rest.end))
    });
    let (frames, code, end) = backend.results(1).remove(0);
    println!("{count} fragments: {frames} at the backend, {} KiB more; then {closes:?}", grown / 1024);
    assert_eq!(frames, count);
    assert_eq!((code, format!("{end:?}").as_str()), (1001, "Fin"), "at the backend");
    assert_eq!((closes.0.as_slice(), format!("{:?}", closes.1).as_str()), (&[1009][..], "Fin"));
    assert!(grown < GROWTH, "{grown} bytes more");
    t.assert_nothing_left();
    t.assert_sent_no_rst();
}
