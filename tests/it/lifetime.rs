//! Sessions that are ended for their age, or because nothing was said.

use crate::harness::{
    DEADLINE, backend,
    peer::Peer,
    scene::Scene,
    ws::{self, Frame, SeenFrame},
};
use std::time::{Duration, Instant};

/// A session that is old enough is closed at a quiet point, backend first, and nobody has lost anything.
#[test]
fn a_session_that_is_old_is_closed() {
    let t = Scene::new("websocket = { max_age = '1s', max_age_jitter = 20 }").start();
    let begun = Instant::now();
    let seen = t.client(async |c| {
        c.handshake("/").await;
        let mut count = 0;
        // It talks all the time, with pauses that are longer than `drain.quiet`.
        loop {
            c.send_text(&count.to_string()).await;
            let frame = c.read_frame().await;
            if frame.opcode == ws::CLOSE {
                break;
            }
            assert_eq!(frame.text(), count.to_string());
            count += 1;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        c.answer_close().await;
        c.until_end().await
    });
    seen.assert_closed_with(1001);
    assert!(begun.elapsed() >= Duration::from_millis(800), "{:?}", begun.elapsed());
    t.connection(0).seen().assert_closed_with(1001);
    let line = t.proxy().log_where("the end", |line| line["message"] == "close");
    assert_eq!((&line["initiator"], &line["why"]), (&"tidegate".into(), &"websocket.max_age".into()), "{line}");
    assert_eq!(line["reason"], "the session has reached its age");
    t.no_rst();
}

/// Nobody is cut inside a message for his age: what has begun is finished first.
#[test]
fn nobody_is_too_old_inside_a_message() {
    let t = Scene::new("websocket = { max_age = '1s', max_age_jitter = 0 }").start();
    let seen = t.client(async |c| {
        c.handshake("/").await;
        c.send(&Frame::text("one ").fin(false)).await;
        tokio::time::sleep(Duration::from_millis(1500)).await;
        c.send(&Frame::new(ws::CONTINUATION, "message")).await;
        c.read_close().await;
        c.answer_close().await;
        c.until_end().await
    });
    seen.assert_closed_with(1001);
    let texts: Vec<String> = seen.frames.iter().map(SeenFrame::text).collect();
    assert_eq!(texts[..2], ["one ", "message"], "its echo came before the Close");
    t.no_rst();
}

/// Without data for `websocket.idle_timeout` a session is closed, although Pings are answered; data keep it open.
#[test]
fn a_session_in_which_nothing_is_said_is_closed() {
    let settings = "websocket = { idle_timeout = '1s', ping_interval = '100ms' }";
    let script = async |c: &mut Peer| {
        c.accept_websocket().await;
        backend::echo_on(c).await;
    };
    let t = Scene::new(settings).backend(script).start();
    let begun = Instant::now();
    let seen = t.client(async |c| {
        c.handshake("/").await;
        let mut echoes = 0;
        let close = loop {
            // It says something, and later on it only answers Pings.
            if echoes < 4 && begun.elapsed() >= Duration::from_millis(400) * (echoes + 1) {
                c.send_text("still here").await;
            }
            let frame = c.next_frame(DEADLINE).await.expect("a Ping, an echo, or the Close");
            match frame.opcode {
                ws::PING => _ = c.send(&Frame::new(ws::PONG, &frame.payload)).await,
                ws::TEXT => echoes += 1,
                _ => break frame,
            }
        };
        assert_eq!((close.opcode, echoes), (ws::CLOSE, 4));
        c.answer_close().await;
        c.until_end().await
    });
    seen.assert_closed_with(1001);
    assert!(begun.elapsed() >= Duration::from_millis(2600), "{:?}", begun.elapsed());
    let line = t.proxy().log_where("the end", |line| line["message"] == "close");
    assert_eq!((&line["why"], &line["clean"]), (&"websocket.idle_timeout".into(), &true.into()), "{line}");
    t.no_rst();
}

/// A message that is begun and never goes on keeps no session open, be it between two frames or inside one.
#[test]
fn half_a_message_is_no_sign_of_life() {
    let settings = "websocket = { idle_timeout = '1s', ping_interval = '0s', hold_timeout = '100ms' }\nclose.handshake_timeout = '500ms'";
    for (begun, length) in [(Frame::text("").fin(false), usize::MAX), (Frame::text(&"x".repeat(40_000)), 30_000)] {
        let script = async |c: &mut Peer| {
            c.accept_websocket().await;
            c.until_end().await;
        };
        let t = Scene::new(settings).backend(script).start();
        let seen = t.client(async |c| {
            c.handshake("/").await;
            let bytes = c.frame_bytes(&begun);
            c.send_bytes(&bytes[..length.min(bytes.len())]).await;
            c.until_end().await
        });
        seen.assert_closed_with(1001);
        let line = t.proxy().log_where("the end", |line| line["message"] == "close");
        assert_eq!(line["why"], "websocket.idle_timeout", "{line}");
        t.no_rst();
    }
}
