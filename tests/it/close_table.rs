//! The close table of the design: whatever one side does, the other gets a Close frame and a FIN, and nobody a RST.

use crate::harness::{DEADLINE, Gate, NO_CODE, Peer, Scene, backend};
use std::time::Duration;

/// A client that sends Close and waits gets the backend's answer, and each side sees the other's FIN.
#[test]
fn client_close_is_answered_by_the_backend() {
    for code in [1000, 4999, NO_CODE] {
        let t = Scene::new("").backend(backend::echo).start();
        let seen = t.client(async |c| {
            c.handshake("/").await;
            c.send_text("a").await;
            c.send_close(code, "").await;
            c.until_end().await
        });
        assert_eq!(seen.texts(), ["a"]);
        seen.assert_closed_with(code);
        t.connection(0).seen().assert_closed_with(code);
        t.no_rst();
    }
}

/// A backend that dies without a Close: its last word is delivered, then the client gets Close 1012 and FIN.
#[test]
fn backend_end_without_close_gives_1012() {
    for reset in [false, true] {
        let script = async move |c: &mut Peer| {
            c.accept_websocket().await;
            c.send_text("last word").await;
            c.sent_is_acked().await;
            if reset { c.rst() } else { c.fin().await }
        };
        let t = Scene::new("").backend(script).start();
        let seen = t.client(async |c| {
            c.handshake("/").await;
            c.read_close().await;
            c.answer_close().await;
            c.until_end().await
        });
        assert_eq!(seen.texts(), ["last word"]);
        seen.assert_closed_with(1012);
        t.no_rst();
    }
}

/// A client that resets becomes a Close 1001 and a FIN for the backend, not before `close.delay` is over: what the backend
/// writes until then meets an open session.
#[test]
fn client_reset_becomes_1001_for_the_backend() {
    let gone = Gate::new("the client has reset");
    let reset = gone.clone();
    let script = async move |c: &mut Peer| {
        c.accept_websocket().await;
        gone.passed().await;
        let early = c.next_frame(Duration::from_millis(50)).await;
        assert!(early.is_err(), "within the delay: {early:?}");
        c.send_text("a result").await;
        c.read_close().await;
        c.answer_close().await;
        c.fin().await;
        c.until_end().await;
    };
    let t = Scene::new("close.delay = '1s'").backend(script).start();
    t.client(async |c| {
        c.handshake("/").await;
        c.rst();
    });
    reset.open();
    let backend = t.connection(0).seen();
    backend.assert_closed_with(1001);
    assert!(backend.write_failed.is_empty(), "{backend:?}");
    t.no_rst();
}

/// SIGTERM ends sessions with Close 1001 on both sides, and the process with status 0.
#[test]
fn drain_closes_with_1001() {
    let t = Scene::new("drain = { delay = '0s', window = '100ms' }").start();
    let open = Gate::new("the session is open");
    let opened = open.clone();
    let client = t.start_client(async move |c| {
        c.handshake("/").await;
        c.send_text("a").await;
        c.read_text().await;
        opened.open();
        c.read_close().await;
        c.answer_close().await;
        c.until_end().await
    });
    open.pass();
    t.proxy().metrics_when("an active session", |m| m.sum("tidegate_connections_active") > 0.5);
    t.proxy().sigterm();
    client.join().assert_closed_with(1001);
    t.connection(0).seen().assert_closed_with(1001);
    assert_eq!(t.proxy().wait_exit(DEADLINE).code(), Some(0));
    t.no_rst();
}

/// A client that goes on talking after our Close, and answers it late, gets nothing but that Close and FIN.
#[test]
fn a_talkative_client_is_not_reset() {
    let t = Scene::new("").backend(backend::fin_without_close).start();
    let seen = t.client(async |c| {
        c.handshake("/").await;
        c.read_close().await;
        for _ in 0..50 {
            assert!(c.send_text("and another thing").await);
        }
        c.answer_close().await;
        c.until_end().await
    });
    seen.assert_closed_with(1012);
    t.no_rst();
}

/// A client that never answers our Close gets FIN all the same, and is listened to until its own FIN: a socket that was closed
/// at once would answer what it still sends with a RST.
#[test]
fn a_client_that_never_answers_is_lingered_for() {
    let t = Scene::new("close.handshake_timeout = '50ms'").backend(backend::fin_without_close).start();
    let seen = t.client(async |c| {
        c.handshake("/").await;
        c.until_end().await;
        for _ in 0..50 {
            assert!(c.send_text("and another thing").await);
        }
        c.sent_is_acked().await;
        c.fin().await;
        c.seen()
    });
    seen.assert_closed_with(1012);
    t.no_rst();
}
