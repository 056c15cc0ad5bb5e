//! The close table of the design: whatever one side does, the other gets a Close frame and a FIN, and nobody a RST.

use crate::harness::{Gate, NO_CODE, Peer, Scene, backend};
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
