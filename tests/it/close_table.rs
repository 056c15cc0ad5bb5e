//! The close table of the design: whatever one side does, the other gets a Close frame and a FIN, and nobody a RST.

use crate::harness::{
    DEADLINE, Gate, NO_CODE, Peer, Scene, Side, backend, left_out,
    scene::{self, Dial},
    transcript::End,
    ws::{self, Frame, SeenFrame},
};
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

/// The last Close and FIN reach a client in one packet, whether that Close is the backend's or tidegate's own. Method: the client's kernel
/// counts segments from its Close to the FIN. A FIN of its own packet is always a second one; an acknowledgement may be, when the machine is
/// slow, so one session out of some has to do with one.
#[test]
fn close_and_fin_are_one_packet() {
    const TRIES: usize = 30;
    async fn ends(c: &mut Peer) {
        c.accept_websocket().await;
        while let Ok(frame) = c.next_frame(DEADLINE).await
            && frame.opcode != ws::CLOSE
        {
            c.send_text(&frame.text()).await;
        }
    }
    let scenes = [Scene::new("").backend(backend::echo).start(), Scene::new("").backend(ends).start()];
    for t in &scenes {
        let count = || t.lab().segments_in(Side::Client);
        let mut counts = Vec::new();
        while counts.len() < TRIES && !counts.contains(&1) {
            let segments = t.client(async |c| {
                c.handshake("/").await;
                // From the first answers on the kernel waits for something that an acknowledgement can go with.
                for _ in 0..3 {
                    c.send_text("a").await;
                    c.read_text().await;
                }
                let before = count();
                c.send_close(1000, "").await;
                c.until_end().await.assert_closed_with(1000);
                before.and_then(|before| Some(count()? - before))
            });
            let Some(segments) = segments else { return left_out("segments of a client", "no namespaces") };
            counts.push(segments);
        }
        assert!(counts.contains(&1), "segments from Close to FIN: {counts:?}");
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

// What follows goes through the table row by row.

/// A Close of the client reaches the backend byte for byte, mask and reason included, and the backend's answer the client,
/// at once: whoever waits is never delayed.
#[test]
fn closes_pass_verbatim_and_at_once() {
    let script = async |c: &mut Peer| {
        c.accept_websocket().await;
        assert_eq!(c.read_close().await, 4001);
        c.send_close(4002, "see you").await;
        c.fin().await;
        c.until_end().await;
    };
    let t = Scene::new("close.delay = '60s'").backend(script).start();
    let frame = Frame::close(4001, "so long").masked([1, 2, 3, 4]);
    let seen = t.client(async |c| {
        c.handshake("/").await;
        c.send(&frame).await;
        c.until_end().await
    });
    seen.assert_closed_with(4002);
    assert_eq!(seen.frames[0].text(), "see you");
    let backend = t.connection(0).seen();
    backend.assert_closed_with(4001);
    assert_eq!((backend.frames[0].text(), backend.frames[0].mask), ("so long".to_owned(), Some([1, 2, 3, 4])));
    t.no_rst();
}

/// A backend that does not answer: the client gets an echo of its code from us, an empty one for an empty one; the backend
/// gets our FIN.
#[test]
fn an_unanswered_client_gets_an_echo() {
    let settings = "close = { handshake_timeout = '100ms', linger = '200ms' }";
    let t = Scene::new(settings).backend(backend::never_answers_close).start();
    for (index, code) in [1000, 4999, NO_CODE].into_iter().enumerate() {
        let seen = t.client(async |c| {
            c.handshake("/").await;
            c.send_close(code, "bye").await;
            c.until_end().await
        });
        seen.assert_closed_with(code);
        let backend = t.connection(index).seen();
        backend.assert_closed_with(code);
    }
    let metrics = t.proxy().metrics_when("all ends", |m| m.sum("tidegate_closes_total") > 2.5);
    assert_eq!(metrics.count("tidegate_abnormal_closes_total{cause=\"backend_no_answer\"}"), 3);
    t.no_rst();
}

/// A client that leaves without waiting, by Close and FIN or by FIN alone: what the backend still sends is delivered, and the
/// backend hears of it only after the delay; the client gets one Close.
#[test]
fn a_client_that_does_not_wait() {
    for with_close in [true, false] {
        let left = Gate::new("the client has left");
        let gone = left.clone();
        let script = async move |c: &mut Peer| {
            c.accept_websocket().await;
            assert_eq!(c.read_text().await, "work, please");
            left.passed().await;
            let early = c.next_frame(Duration::from_millis(200)).await;
            assert!(early.is_err(), "within the delay: {early:?}");
            assert!(c.send_text("the result").await);
            c.read_close().await;
            c.answer_close().await;
            c.fin().await;
            c.until_end().await;
        };
        let t = Scene::new("close.delay = '1s'").backend(script).start();
        let seen = t.client(async |c| {
            c.handshake("/").await;
            let mut last = c.frame_bytes(&Frame::text("work, please"));
            if with_close {
                last.extend(c.frame_bytes(&Frame::close(4000, "done")));
            }
            c.send_bytes(&last).await;
            c.fin().await;
            gone.open();
            c.until_end().await
        });
        assert_eq!(seen.texts(), ["the result"]);
        let code = if with_close { 4000 } else { 1001 };
        seen.assert_closed_with(code);
        let backend = t.connection(0).seen();
        assert_eq!(backend.texts(), ["work, please"]);
        backend.assert_closed_with(code);
        assert!(backend.write_failed.is_empty(), "{backend:?}");
        t.no_rst();
    }
}

/// The delay of a client that left ends early when the backend itself closes, or goes.
#[test]
fn the_delay_ends_with_the_backend() {
    for with_close in [true, false] {
        let left = Gate::new("the client has left");
        let gone = left.clone();
        let script = async move |c: &mut Peer| {
            c.accept_websocket().await;
            left.passed().await;
            if with_close {
                c.send_close(1000, "").await;
            } else {
                c.fin().await;
            }
            c.until_end().await;
        };
        let t = Scene::new("close.delay = '60s'").backend(script).start();
        t.client(async |c| {
            c.handshake("/").await;
            c.rst();
        });
        t.proxy().log_where("an open session", |line| line["message"] == "open");
        gone.open();
        let backend = t.connection(0).seen();
        assert_eq!(backend.closes(), if with_close { vec![1000] } else { vec![] });
        assert_eq!(backend.end, End::Fin);
        t.no_rst();
    }
}

/// A client that closes its socket while the backend goes on sending: the RST of its kernel is the end of nothing for the
/// backend, and no abnormal end for the one who counts.
#[test]
fn a_client_that_closes_its_socket_is_normal() {
    let left = Gate::new("the client has left");
    let gone = left.clone();
    let script = async move |c: &mut Peer| {
        c.accept_websocket().await;
        left.passed().await;
        for _ in 0..3 {
            assert!(c.send_text("a part of the result").await);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        c.read_close().await;
        c.answer_close().await;
        c.fin().await;
        c.until_end().await;
    };
    let t = Scene::new("").backend(script).start();
    t.client(async |c| {
        c.handshake("/").await;
        c.send_close(1000, "").await;
        c.close();
        gone.open();
    });
    let backend = t.connection(0).seen();
    backend.assert_closed_with(1000);
    assert!(backend.write_failed.is_empty(), "{backend:?}");
    let metrics = t.proxy().metrics_when("the end", |m| m.sum("tidegate_closes_total") > 0.5);
    assert!(metrics.sum("tidegate_abnormal_closes_total") < 0.5, "{metrics:?}");
    t.no_rst();
}

/// What a side sends after its own Close is discarded; the other direction goes on until the other side's Close.
#[test]
fn nothing_passes_after_a_close() {
    let script = async |c: &mut Peer| {
        c.accept_websocket().await;
        c.read_close().await;
        c.send_text("one more thing").await;
        c.answer_close().await;
        c.send_text("too late").await;
        c.fin().await;
        c.until_end().await;
    };
    let t = Scene::new("").backend(script).start();
    let seen = t.client(async |c| {
        c.handshake("/").await;
        c.send_close(1000, "").await;
        c.send_text("too late").await;
        c.until_end().await
    });
    assert_eq!(seen.texts(), ["one more thing"]);
    seen.assert_closed_with(1000);
    t.connection(0).seen().assert_closed_with(1000);
    t.no_rst();
}

/// A backend's Close, with FIN at once or not: what it sent before is delivered, its Close is passed on, and the client's
/// answer too, unless the backend has gone.
#[test]
fn a_backend_that_closes() {
    for with_fin in [false, true] {
        // With TLS it is a packet of its own, which the client's answer must not overtake.
        let said = Gate::new("the backend has said all");
        let all = said.clone();
        let script = async move |c: &mut Peer| {
            c.accept_websocket().await;
            let mut last = c.frame_bytes(&Frame::text("last word"));
            last.extend(c.frame_bytes(&Frame::close(4003, "enough")));
            c.send_bytes(&last).await;
            if with_fin {
                c.fin().await;
            }
            all.open();
            c.until_end().await;
        };
        let t = Scene::new("").backend(script).start();
        let seen = t.client(async |c| {
            c.handshake("/").await;
            c.read_close().await;
            said.passed().await;
            c.answer_close().await;
            c.until_end().await
        });
        assert_eq!(seen.texts(), ["last word"]);
        seen.assert_closed_with(4003);
        let backend = t.connection(0).seen();
        // With a front its end may still be on its way when the client answers, and then that is passed on.
        let is_answered = !with_fin || scene::backend_has_a_front() && !backend.closes().is_empty();
        assert_eq!((backend.closes(), backend.end), (if is_answered { vec![4003] } else { vec![] }, End::Fin));
        t.no_rst();
    }
}

/// A client that never answers the backend's Close: the backend gets an echo of ours, masked; both get FIN.
#[test]
fn an_unanswered_backend_gets_an_echo() {
    let script = async |c: &mut Peer| {
        c.accept_websocket().await;
        c.send_close(1000, "").await;
        c.until_end().await;
    };
    let settings = "close = { handshake_timeout = '100ms', linger = '200ms' }";
    let t = Scene::new(settings).backend(script).start();
    t.client(async |c| {
        c.handshake("/").await;
        c.until_end().await
    })
    .assert_closed_with(1000);
    let backend = t.connection(0).seen();
    backend.assert_closed_with(1000);
    assert!(backend.frames[0].mask.is_some(), "{backend:?}");
    t.no_rst();
}

/// Both send Close at once: each gets the other's, and each counts as the answer.
#[test]
fn both_close_at_once() {
    let both = Gate::new("both have sent their Close");
    let sent = both.clone();
    let script = async move |c: &mut Peer| {
        c.accept_websocket().await;
        c.send_close(4010, "backend").await;
        sent.open();
        let seen = c.until_end().await;
        seen.assert_closed_with(4011);
    };
    let t = Scene::new("").backend(script).start();
    let seen = t.client(async |c| {
        c.handshake("/").await;
        both.passed().await;
        c.send_close(4011, "client").await;
        c.until_end().await
    });
    seen.assert_closed_with(4010);
    t.connection(0).seen().assert_closed_with(4011);
    t.no_rst();
}

/// The code for a backend that is lost is configurable; so is the one that the backend gets for a lost client.
#[test]
fn codes_are_configurable() {
    let t = Scene::new("close.backend_lost_code = 1011").backend(backend::fin_without_close).start();
    t.client(async |c| {
        c.handshake("/").await;
        c.read_close().await;
        c.answer_close().await;
        c.until_end().await
    })
    .assert_closed_with(1011);
    let t = Scene::new("close = { client_lost_code = 3999, delay = '0ms' }").start();
    t.client(async |c| {
        c.handshake("/").await;
        c.rst();
    });
    t.connection(0).seen().assert_closed_with(3999);
}

/// A side that answers no Ping is told so and let go; the other one gets a Close. Pings come only from silence, and our
/// Pongs are never passed on.
#[test]
fn a_silent_side_is_found() {
    let settings = "websocket = { ping_interval = '100ms', pong_timeout = '200ms' }\n\
        close = { delay = '0ms', handshake_timeout = '100ms', linger = '1s' }";
    // A backend that answers pings, and a client that does not.
    let t = Scene::new(settings).start();
    let seen = t.client(async |c| {
        c.handshake("/").await;
        c.until_end().await
    });
    seen.assert_closed_with(1001);
    assert_eq!(seen.of(ws::PING).count(), 1, "{seen:?}");
    let backend = t.connection(0).seen();
    backend.assert_closed_with(1001);
    let metrics = t.proxy().metrics_when("the end", |m| m.sum("tidegate_closes_total") > 0.5);
    assert_eq!(metrics.count("tidegate_abnormal_closes_total{cause=\"client_silent\"}"), 1);
    t.no_rst();
    // The other way round.
    let t = Scene::new(settings).backend(backend::never_answers_close).start();
    let seen = t.client(async |c| {
        c.handshake("/").await;
        loop {
            let frame = c.read_frame().await;
            match frame.opcode {
                ws::PING => _ = c.send(&Frame::new(ws::PONG, &frame.payload)).await,
                _ => break,
            }
        }
        c.answer_close().await;
        c.until_end().await
    });
    assert_eq!(seen.closes(), [1012]);
    assert_eq!(seen.end, End::Fin);
    let backend = t.connection(0).seen();
    assert_eq!(backend.of(ws::PONG).count(), 0, "an answer to our Ping was passed on: {backend:?}");
    assert_eq!((backend.closes(), backend.end), (vec![1001], End::Fin));
    t.no_rst();
}

/// Pings of the peers and their Pongs pass, also while tidegate asks itself; while one is unanswered none of ours overtakes it.
#[test]
fn pings_of_the_peers_pass() {
    let script = async |c: &mut Peer| {
        c.accept_websocket().await;
        c.send(&Frame::new(ws::PING, b"from the backend")).await;
        // Answers whatever is asked; ours among them.
        backend::echo_on(c).await;
    };
    let settings = "websocket = { ping_interval = '50ms', pong_timeout = '10s' }";
    let t = Scene::new(settings).backend(script).start();
    let seen = t.client(async |c| {
        c.handshake("/").await;
        let first = c.read_frame().await;
        assert_eq!((first.opcode, &first.payload[..]), (ws::PING, &b"from the backend"[..]));
        // Many intervals: the backend's Ping is unanswered, so none of ours comes.
        let none = c.next_frame(Duration::from_millis(400)).await;
        assert_eq!(none, Err(End::Timeout));
        c.send(&Frame::new(ws::PONG, &first.payload)).await;
        let ours = c.read_frame().await;
        assert_eq!((ours.opcode, ours.payload.len()), (ws::PING, 8));
        c.send(&Frame::new(ws::PONG, &ours.payload)).await;
        c.send(&Frame::new(ws::PING, b"from the client")).await;
        loop {
            let frame = c.read_frame().await;
            if frame.opcode == ws::PONG {
                assert_eq!(frame.payload, b"from the client");
                break;
            }
        }
        c.send_close(1000, "").await;
        c.until_end().await
    });
    assert_eq!(seen.closes(), [1000]);
    let backend = t.connection(0).seen();
    let pongs: Vec<_> = backend.of(ws::PONG).map(SeenFrame::text).collect();
    assert_eq!(pongs, ["from the backend"]);
    t.no_rst();
}

/// Drain: the Close goes upstream first, the backend's last frames reach the client, and what the client sent meanwhile is
/// not forwarded but counted.
#[test]
fn a_drain_goes_upstream_first() {
    let heard = Gate::new("the backend has its Close");
    let crossed = Gate::new("the client has sent once more");
    let (backend_heard, client_sent) = (heard.clone(), crossed.clone());
    let script = async move |c: &mut Peer| {
        c.accept_websocket().await;
        c.send_text("hello").await;
        assert_eq!(c.read_close().await, 1001);
        backend_heard.open();
        client_sent.passed().await;
        // Its last words, and only then its Close: the client must not have got ours before.
        c.send_text("last word").await;
        c.answer_close().await;
        c.fin().await;
        c.until_end().await;
    };
    let settings = "drain = { delay = '0s', window = '0s', close_code = 1012, reason = 'deploy' }";
    let t = Scene::new(settings).backend(script).start();
    let client = t.start_client(async move |c| {
        c.handshake("/").await;
        c.read_text().await;
        heard.passed().await;
        c.send_text("crossed").await;
        c.sent_is_acked().await;
        crossed.open();
        c.read_close().await;
        c.answer_close().await;
        c.until_end().await
    });
    t.proxy().log_where("an open session", |line| line["message"] == "open");
    t.connection(0).seen_when("the greeting was sent", |_| true);
    t.proxy().sigterm();
    let seen = client.join();
    assert_eq!(seen.texts(), ["hello", "last word"]);
    seen.assert_closed_with(1012);
    assert_eq!(seen.frames.last().map(SeenFrame::text).as_deref(), Some("deploy"));
    let backend = t.connection(0).seen();
    backend.assert_closed_with(1001);
    assert_eq!(backend.texts().len(), 0);
    let line = t.proxy().log_where("the end", |line| line["message"] == "close");
    assert_eq!(line["crossed"], 1, "{line}");
    assert_eq!(line["initiator"], "tidegate");
    assert_eq!(t.proxy().wait_exit(DEADLINE).code(), Some(0));
    t.no_rst();
}

/// After our Close a peer's frames are discarded but still followed, in whatever pieces they come: its own Close is found behind
/// a large frame, and byte by byte.
#[test]
fn a_close_in_pieces_is_found() {
    let t = Scene::new("close.handshake_timeout = '60s'").backend(backend::fin_without_close).start();
    let seen = t.client(async |c| {
        c.handshake("/").await;
        c.read_close().await;
        let mut bytes = c.frame_bytes(&Frame::binary(vec![7; 40_000]));
        bytes.extend(c.frame_bytes(&Frame::text("discarded")));
        let (large, rest) = bytes.split_at(30_000);
        c.send_bytes(large).await;
        c.sent_is_acked().await;
        c.send_bytes(rest).await;
        let close = c.frame_bytes(&Frame::close(1012, ""));
        c.drip(&close, 1, Duration::from_millis(2)).await;
        c.until_end().await
    });
    seen.assert_closed_with(1012);
    t.no_rst();
}

/// A second signal does not wait for the window; it is still polite.
#[test]
fn a_second_signal_hurries() {
    let t = Scene::new("drain = { delay = '60s', window = '60s' }").start();
    let client = t.start_client(async move |c| {
        c.handshake("/").await;
        c.read_close().await;
        c.answer_close().await;
        c.until_end().await
    });
    t.proxy().log_where("an open session", |line| line["message"] == "open");
    t.proxy().sigterm();
    t.proxy().log_where("the drain", |line| line["message"] == "draining");
    t.proxy().sigterm();
    client.join().assert_closed_with(1001);
    t.connection(0).seen().assert_closed_with(1001);
    assert_eq!(t.proxy().wait_exit(DEADLINE).code(), Some(0));
    t.no_rst();
}

/// A client that breaks the protocol or a limit: what was forwarded before is answered first; then it gets the code that
/// fits, and the backend 1001.
#[test]
fn a_client_that_breaks_a_rule() {
    let settings = "websocket = { max_frame = '1KiB', max_message = '2KiB' }";
    let t = Scene::new(settings).start();
    let cases: [(&str, Vec<Frame>, u16); 9] = [
        ("unmasked", vec![Frame::text("x").unmasked()], 1002),
        ("reserved opcode", vec![Frame::new(3, "x")], 1002),
        ("reserved bit", vec![Frame::text("x").rsv(4)], 1002),
        ("length not minimal", vec![Frame::text("x").length_in_16(1)], 1002),
        ("length with the highest bit", vec![Frame::text("x").length_in_64(1 << 63)], 1002),
        ("fragmented ping", vec![Frame::new(ws::PING, "x").fin(false)], 1002),
        ("continuation of nothing", vec![Frame::new(ws::CONTINUATION, "x")], 1002),
        ("frame too big", vec![Frame::text("x").length_in_64(1 << 40)], 1009),
        (
            "message too big",
            vec![
                Frame::binary([0; 1024]).fin(false),
                Frame::new(ws::CONTINUATION, [0; 1024]).fin(false),
                Frame::new(ws::CONTINUATION, [0; 1]),
            ],
            1009,
        ),
    ];
    for (index, (what, frames, code)) in cases.into_iter().enumerate() {
        let seen = t.client(async |c| {
            c.handshake("/").await;
            let mut bytes = c.frame_bytes(&Frame::text("answer this"));
            for frame in &frames {
                bytes.extend(c.frame_bytes(frame));
            }
            c.send_bytes(&bytes).await;
            c.until_end().await
        });
        assert_eq!(seen.texts(), ["answer this"], "{what}");
        assert_eq!((seen.closes(), seen.end), (vec![code], End::Fin), "{what}: {seen:?}");
        let backend = t.connection(index).seen();
        assert_eq!((backend.closes(), backend.end), (vec![1001], End::Fin), "{what}: {backend:?}");
    }
    t.no_rst();
}

/// A Close with a payload that must not be is a violation like others: it is not passed on.
#[test]
fn an_invalid_close_is_not_passed_on() {
    let t = Scene::new("").start();
    // One byte; 1005, 1006 and 0, which never stand on the wire; a reason that is no UTF-8.
    let payloads: [(&[u8], u16); 5] =
        [(b"\x03", 1002), (b"\x03\xed", 1002), (b"\x03\xee", 1002), (b"\x00\x00", 1002), (b"\x03\xe8\xff\xff", 1007)];
    for (index, (payload, code)) in payloads.into_iter().enumerate() {
        let seen = t.client(async |c| {
            c.handshake("/").await;
            c.send(&Frame::new(ws::CLOSE, payload)).await;
            c.until_end().await
        });
        seen.assert_closed_with(code);
        t.connection(index).seen().assert_closed_with(1001);
    }
    t.no_rst();
}

/// A backend that breaks the protocol or a limit: it gets the code that fits, the client 1014.
#[test]
fn a_backend_that_breaks_a_rule() {
    let cases = [(Frame::text("x").masked([1, 2, 3, 4]), 1002), (Frame::text("x").length_in_64(1 << 40), 1009)];
    for (frame, code) in cases {
        let script = async move |c: &mut Peer| {
            c.accept_websocket().await;
            let mut bytes = c.frame_bytes(&Frame::text("fine so far"));
            bytes.extend(c.frame_bytes(&frame));
            c.send_bytes(&bytes).await;
            c.until_end().await;
        };
        let t = Scene::new("").backend(script).start();
        let seen = t.client(async |c| {
            c.handshake("/").await;
            c.read_close().await;
            c.answer_close().await;
            c.until_end().await
        });
        assert_eq!(seen.texts(), ["fine so far"]);
        seen.assert_closed_with(1014);
        let backend = t.connection(0).seen();
        assert_eq!((backend.closes(), backend.end), (vec![code], End::Fin), "{backend:?}");
        t.no_rst();
    }
}

/// A backend that dies inside a small frame: nothing of the frame was passed on, so the client still gets its Close. Inside a
/// large one FIN is the only honest end.
#[test]
fn a_backend_that_dies_inside_a_frame() {
    for (size, sent, whole) in [(8000, 4000, false), (16 * 1024, 16 * 1024, false), (100_000, 50_000, true)] {
        let t = Scene::new("").backend(backend::rst_mid_frame(size, sent)).start();
        let seen = t.client(async |c| {
            c.handshake("/").await;
            c.until_end().await
        });
        if whole {
            assert_eq!((seen.closes(), seen.end), (vec![], End::Fin), "{seen:?}");
            assert!(!seen.leftover.is_empty());
            // The counters of an end are read in the middle of it now and then.
            let cut = "tidegate_abnormal_closes_total{cause=\"cut_inside_frame\"}";
            t.proxy().metrics_when("a frame that was cut", |m| m.count(cut) == 1);
        } else {
            seen.assert_closed_with(1012);
        }
        t.no_rst();
    }
}

/// The same for a client: the backend gets a Close, or, inside a large frame, only FIN.
#[test]
fn a_client_that_dies_inside_a_frame() {
    for (size, sent, cut) in [(8000, 4000, false), (100_000, 50_000, true)] {
        let t = Scene::new("close.delay = '0ms'").start();
        t.client(async |c| {
            c.handshake("/").await;
            let bytes = c.frame_bytes(&Frame::binary(vec![7; size]));
            c.send_bytes(&bytes[..sent]).await;
            c.sent_is_acked().await;
            c.rst();
        });
        let backend = t.connection(0).seen();
        assert_eq!((backend.closes(), backend.end), (if cut { vec![] } else { vec![1001] }, End::Fin), "{backend:?}");
        assert_eq!(backend.leftover.is_empty(), !cut);
        t.no_rst();
    }
}

/// A frame that was held for `hold_timeout` goes on as it comes, and arrives whole in the end.
#[test]
fn a_held_frame_is_released() {
    let script = async |c: &mut Peer| {
        c.accept_websocket().await;
        let frame = c.frame_bytes(&Frame::text("a frame in two halves"));
        c.send_bytes(&frame[..10]).await;
        c.read_text().await;
        c.send_bytes(&frame[10..]).await;
        backend::echo_on(c).await;
    };
    let t = Scene::new("websocket.hold_timeout = '100ms'").backend(script).start();
    let seen = t.client(async |c| {
        let head = c.handshake("/").await;
        assert_eq!(head.code(), 101);
        // The first half, of a frame that is not whole.
        c.read_bytes(c.seen().raw.len() + 10).await;
        c.send_text("go on").await;
        assert_eq!(c.read_text().await, "a frame in two halves");
        c.send_close(1000, "").await;
        c.until_end().await
    });
    seen.assert_closed_with(1000);
    t.no_rst();
}

/// A client that takes nothing for `write_timeout` is let go: the backend gets its Close, and is not held up for ever.
#[test]
fn a_stalled_client_is_let_go() {
    let script = async |c: &mut Peer| {
        c.accept_websocket().await;
        let frame = c.frame_bytes(&Frame::binary(vec![7; 16 * 1024 * 1024]));
        let _ = c.pump(&frame).await;
        c.read_close().await;
        c.answer_close().await;
        c.fin().await;
        c.until_end().await;
    };
    let settings = "websocket.write_timeout = '300ms'\nclose = { delay = '0ms', linger = '100ms' }";
    let t = Scene::new(settings).backend(script).start();
    let dial = Dial { recv_buffer: Some(4096), ..Dial::default() };
    let over = Gate::new("the backend has its Close");
    let done = over.clone();
    let place = t.proxy();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            place.log_where("the end", |line| {
                line["message"] == "close" && line["abnormal"] == "client_stalled,cut_inside_frame"
            });
            done.open();
        });
        t.client_with(dial, async |c| {
            c.handshake("/").await;
            over.passed().await;
            c.close();
        });
    });
    let backend = t.connection(0).seen();
    assert_eq!((backend.closes(), backend.end), (vec![1001], End::Fin), "{backend:?}");
}

/// The same rows where one of the legs is something else than a bare socket.
macro_rules! rows {
    ($($row:ident),* $(,)?) => {
        /// A stream of an HTTP/2 connection.
        mod multiplexed {
            $(
                #[test]
                fn $row() {
                    crate::harness::scene::multiplexed(super::$row);
                }
            )*
        }

        /// TLS. At its end `close_notify` comes before each FIN.
        mod encrypted {
            $(
                #[test]
                fn $row() {
                    crate::harness::scene::encrypted(super::$row);
                }
            )*
        }

        /// A stream of an HTTP/2 connection with the client.
        mod streams {
            $(
                #[test]
                fn $row() {
                    crate::harness::scene::streams(super::$row);
                }
            )*
        }

        /// TLS with the client.
        mod secure {
            $(
                #[test]
                fn $row() {
                    crate::harness::scene::secure(super::$row);
                }
            )*
        }

        /// A stream of an HTTP/2 connection over TLS with the client.
        mod secure_streams {
            $(
                #[test]
                fn $row() {
                    crate::harness::scene::secure_streams(super::$row);
                }
            )*
        }
    };
}

rows!(
    client_close_is_answered_by_the_backend,
    backend_end_without_close_gives_1012,
    client_reset_becomes_1001_for_the_backend,
    drain_closes_with_1001,
    a_talkative_client_is_not_reset,
    a_client_that_never_answers_is_lingered_for,
    closes_pass_verbatim_and_at_once,
    an_unanswered_client_gets_an_echo,
    a_client_that_does_not_wait,
    the_delay_ends_with_the_backend,
    a_client_that_closes_its_socket_is_normal,
    nothing_passes_after_a_close,
    a_backend_that_closes,
    an_unanswered_backend_gets_an_echo,
    both_close_at_once,
    codes_are_configurable,
    a_silent_side_is_found,
    pings_of_the_peers_pass,
    a_drain_goes_upstream_first,
    a_close_in_pieces_is_found,
    a_second_signal_hurries,
    a_client_that_breaks_a_rule,
    an_invalid_close_is_not_passed_on,
    a_backend_that_breaks_a_rule,
    a_backend_that_dies_inside_a_frame,
    a_client_that_dies_inside_a_frame,
    a_held_frame_is_released,
    a_stalled_client_is_let_go,
);
