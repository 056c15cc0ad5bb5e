//! The harness on trial: what it says about others must be true.

use crate::harness::{
    Dial, End, Frame, Gate, Lab, Message, NO_CODE, Peer, Scene, Side, backend,
    proxy::Metrics,
    ws::{BINARY, CLOSE, SeenFrame, TEXT},
};
use std::{
    io::ErrorKind,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::protocol::frame::{Frame as Theirs, FrameHeader, coding};

/// Frames and the end pass in both directions, and each side writes down the other's bytes.
#[test]
fn a_direct_exchange() {
    let t = Scene::direct().start();
    let seen = t.client(async |c| {
        c.handshake("/path").await;
        c.send_text("hello").await;
        assert_eq!(c.read_text().await, "hello");
        c.send_close(1000, "bye").await;
        c.until_end().await
    });
    seen.assert_closed_with(1000);
    assert_eq!(seen.frames[1].text(), "", "the backend echoes the code alone");
    let backend = t.connection(0).seen();
    assert_eq!(backend.head.as_ref().unwrap().target(), "/path");
    assert_eq!(backend.texts(), ["hello"]);
    assert!(backend.frames.iter().all(|frame| frame.mask.is_some()));
    backend.assert_closed_with(1000);
    for side in Side::ALL {
        t.counters(side).assert_no_rst();
    }
}

/// A RST is counted as sent in the sender's namespace, as a reset connection in the receiver's, and not at all in the third:
/// the test fails if the counters are those of another namespace.
#[test]
fn a_reset_is_counted_where_it_was_sent() {
    let t = Scene::direct().backend(backend::rst_mid_frame(100, 50)).start();
    let seen = t.client(async |c| {
        c.handshake("/").await;
        c.until_end().await
    });
    assert_eq!((seen.end, seen.frames.len(), seen.leftover.len()), (End::Rst, 0, 50));
    if t.lab().counts_are_exact() {
        let of = |side, name| t.counters(side).get(name);
        let sent = Side::ALL.map(|side| of(side, "OutRsts"));
        let got = Side::ALL.map(|side| of(side, "EstabResets"));
        assert_eq!((sent, got), ([0, 0, 1], [1, 0, 1]));
        assert_eq!(of(Side::Backend, "TCPAbortOnData"), 1);
        t.no_rst();
    }
}

/// `no_rst` fails when the namespace in the middle sends a RST: here the refusal of a port on which nobody listens.
#[test]
fn no_rst_notices_a_reset_by_the_middle() {
    let t = Scene::copying().start();
    t.no_rst();
    let closed = SocketAddr::new(t.lab().address(Side::Proxy, Side::Client), 1);
    // One more than may be answers to what a busy host has sent twice.
    for _ in 0..=t.counters(Side::Proxy).excused() {
        let dial = async move || TcpStream::connect(closed).await.map_err(|e| e.kind());
        let refused = t.lab().spawn_in(Side::Client, dial).join();
        assert_eq!(refused.unwrap_err(), ErrorKind::ConnectionRefused);
    }
    if t.lab().counts_are_exact() {
        let noticed = catch_unwind(AssertUnwindSafe(|| t.no_rst()));
        assert!(noticed.is_err(), "{:?}", t.counters(Side::Proxy));
    }
}

/// The same bytes, three ends: the transcript tells them apart, and an end of one's own from all of them.
#[test]
fn the_transcript_tells_fin_from_rst_from_silence() {
    let script = async |c: &mut Peer| {
        c.accept_websocket().await;
        c.send_text("a").await;
        match c.index() {
            0 => c.fin().await,
            1 => {
                c.sent_is_acked().await;
                c.rst();
            }
            2 => c.close_with_unread().await,
            _ => _ = c.until_end().await,
        }
    };
    let t = Scene::direct().backend(script).start();
    let mut ends = Vec::new();
    for deadline in [5_000, 5_000, 5_000, 50].map(Duration::from_millis) {
        ends.push(t.client(async |c| {
            c.handshake("/").await;
            c.send_text("unread").await;
            let seen = c.transcript_until_end(deadline).await;
            assert_eq!(seen.texts(), ["a"]);
            seen.end
        }));
    }
    assert_eq!(ends, [End::Fin, End::Rst, End::Rst, End::Timeout]);
    assert_eq!(t.connection(1).seen().end, End::Left);
}

/// What a peer cannot write is written down.
#[test]
fn a_failed_write_is_recorded() {
    let gate = Gate::new("reset");
    let reset = gate.clone();
    let t = Scene::direct()
        .backend(async move |c| {
            c.accept_websocket().await;
            gate.passed().await;
            // The first write finds the reset, the second a socket that knows of it.
            c.send_text("a").await;
            c.send_text("b").await;
        })
        .start();
    t.client(async |c| {
        c.handshake("/").await;
        c.rst();
    });
    // The kernel of the backend has taken the RST when it counts it.
    while t.lab().counts_are_exact() && t.counters(Side::Backend).get("EstabResets") == 0 {
        std::thread::yield_now();
    }
    reset.open();
    let seen = t.connection(0).seen();
    if t.lab().counts_are_exact() {
        assert_eq!(seen.write_failed, [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe]);
    }
    assert_eq!(seen.end, End::Rst, "also where a write was the first to hear of it");
}

/// A peer that does not read closes its window: the other's write is not taken until it reads again.
#[test]
fn a_zero_window_stops_the_writer() {
    let gate = Gate::new("read again");
    let t = Scene::direct().backend(backend::zero_window(gate.clone())).backend_recv_buffer(32 << 10).start();
    let payload = vec![7; 12 << 20];
    let dial = Dial { recv_buffer: Some(32 << 10), ..Dial::default() };
    let seen = t.client_with(dial, async |c| {
        c.handshake("/").await;
        let frame = c.frame_bytes(&Frame::binary(&payload));
        let mut write = Box::pin(c.pump(&frame));
        let stalled = tokio::time::timeout(Duration::from_millis(200), &mut write).await.is_err();
        assert!(stalled, "12 MiB fit into no buffer");
        gate.open();
        assert!(write.await);
        c.read_frame().await;
        c.send_close(NO_CODE, "").await;
        c.until_end().await
    });
    assert_eq!(seen.data(), payload);
    seen.assert_closed_with(NO_CODE);
}

/// Many clients at once, each with an answer of its own.
#[test]
fn many_clients_at_once() {
    let t = Scene::direct().start();
    let seen = t.clients(100, async |c| {
        let name = format!("client {}", c.index());
        c.handshake("/").await;
        c.send_text(&name).await;
        assert_eq!(c.read_text().await, name);
        c.send_close(1000, "").await;
        c.until_end().await
    });
    assert_eq!(seen.len(), 100);
    for seen in &seen {
        seen.assert_closed_with(1000);
    }
    assert_eq!(t.backend().count(), 100);
}

/// Whatever the relay in the middle does not break arrives: a frame that comes with the 101, a response that is none, the
/// bytes that a client sent too early.
#[test]
fn handshakes_right_and_wrong() {
    let t = Scene::copying().backend(backend::frame_with_101).start();
    let first = t.client(async |c| {
        let early = c.frame_bytes(&Frame::text("early"));
        c.handshake_with(Message::websocket("/").then(early)).await;
        (c.read_text().await, c.read_text().await)
    });
    assert_eq!(first, ("first".to_owned(), "early".to_owned()));

    let no = Message::status(503, "Service Unavailable", "later").header("Retry-After", "1");
    let t = Scene::copying().backend(backend::answers(no)).start();
    let response = t.client(async |c| c.request(Message::websocket("/")).await);
    assert_eq!((response.code(), response.text().as_str()), (503, "later"));
    assert_eq!(response.field("retry-after"), Some("1"));
}

/// After a cut nothing arrives and nobody is told; after the mending everything does.
#[test]
fn a_link_can_be_cut() {
    let t = Scene::direct().start();
    t.client(async |c| {
        c.handshake("/").await;
        if !t.lab().cut(Side::Backend) {
            return;
        }
        c.send_text("lost for now").await;
        let silence = c.next_frame(Duration::from_millis(300)).await;
        assert_eq!(silence, Err(End::Timeout));
        t.lab().mend(Side::Backend);
        assert_eq!(c.read_text().await, "lost for now");
    });
}

/// A script's failed assertion fails the test, also when the test never asks for that connection.
#[test]
#[should_panic(expected = "the backend did not like it")]
fn a_backend_that_panics_fails_the_test() {
    let t = Scene::direct().backend(async |_| panic!("the backend did not like it")).start();
    t.client(async |c| _ = c.until_end().await);
    t.connection(0).seen();
}

/// Our frames are those of RFC 6455 as another implementation reads them, at each boundary of the length.
#[test]
fn frames_agree_with_tungstenite() {
    for length in [0, 1, 125, 126, 127, 65_535, 65_536, 70_000] {
        for key in [None, Some([1, 2, 3, 4])] {
            let payload: Vec<u8> = (0..=255).cycle().take(length).collect();
            let ours = Frame::binary(&payload).bytes(key);
            let mut theirs = Vec::new();
            let header = FrameHeader {
                is_final: true,
                opcode: coding::OpCode::Data(coding::Data::Binary),
                mask: key,
                ..FrameHeader::default()
            };
            Theirs::from_payload(header, payload.clone().into()).format(&mut theirs).unwrap();
            assert!(ours == theirs, "{length} bytes, key {key:?}");

            let (seen, taken) = SeenFrame::parse(&ours, Duration::ZERO).unwrap();
            assert_eq!((taken, seen.payload), (ours.len(), payload));
            assert_eq!((seen.opcode, seen.fin, seen.minimal), (BINARY, true, true));
            assert_eq!(SeenFrame::parse(&ours[..ours.len() - 1], Duration::ZERO), None);
        }
    }
    let close = SeenFrame::parse(&Frame::close(1012, "gone").bytes(None), Duration::ZERO).unwrap().0;
    assert_eq!((close.opcode, close.code(), close.text().as_str()), (CLOSE, 1012, "gone"));
    let lie = Frame::text("hello").length_in_16(5).bytes(None);
    assert!(!SeenFrame::parse(&lie, Duration::ZERO).unwrap().0.minimal);
    let huge = Frame::new(TEXT, "hello").length_in_64(1 << 63).bytes(None);
    assert_eq!(SeenFrame::parse(&huge, Duration::ZERO), None);
}

/// Chunked, counted and unended bodies are told apart.
#[test]
fn bodies_end_where_they_should() {
    let body = |head: &str, rest: &str, ended| {
        let (head, _) = Message::parse_head(format!("{head}\r\n\r\n").as_bytes()).unwrap();
        let body = head.framing().body(rest.as_bytes(), ended).unwrap();
        body.map(|(body, length)| (String::from_utf8(body).unwrap(), length))
    };
    let ok = "HTTP/1.1 200 OK";
    let found = |text: &str, length| Some((text.to_owned(), length));
    assert_eq!(body(&format!("{ok}\r\nContent-Length: 2"), "abc", false), found("ab", 2));
    let chunked = format!("{ok}\r\nTransfer-Encoding: chunked");
    assert_eq!(body(&chunked, "1\r\na\r\n2\r\nbc\r\n0\r\n\r\nX", false), found("abc", 18));
    assert_eq!(body(&chunked, "1\r\na\r\n2\r\nbc\r\n", false), None);
    assert_eq!(body(ok, "abc", false), None);
    assert_eq!(body(ok, "abc", true), found("abc", 3));
}

/// A sample's name keeps its labels, whatever is in them.
#[test]
fn metrics_are_parsed() {
    let text = "# TYPE a counter\na_total{x=\"1 2\",y=\"}\"} 3\na_total{x=\"2\"} 4 1700000000\nb 0.5\n# EOF\n";
    let metrics = Metrics::parse(text);
    assert!((metrics.get("a_total{x=\"1 2\",y=\"}\"}") - 3.0).abs() < f64::EPSILON);
    assert!((metrics.sum("a_total") - 7.0).abs() < f64::EPSILON);
    assert!((metrics.get("b") - 0.5).abs() < f64::EPSILON);
    assert!(metrics.get("absent").abs() < f64::EPSILON);
}

/// Two labs at once do not see each other, and nothing of them is left behind.
#[test]
fn a_lab_is_alone_and_leaves_nothing() {
    let (one, two) = (Lab::new(), Lab::new());
    let (from, to) = (Side::Proxy, Side::Backend);
    assert_ne!(one.address(to, from), two.address(to, from));
    if !one.counts_are_exact() {
        return;
    }
    let listener = one.spawn_in(Side::Backend, {
        let ip = one.address(Side::Backend, Side::Proxy);
        async move || TcpListener::bind((ip, 0)).await.map(drop)
    });
    listener.join().expect("the lab's own address");
    let name = one.place(Side::Proxy).file().expect("a namespace");
    assert!(name.exists());
    let output = one.command_in(Side::Proxy, "cat").arg("/proc/sys/net/core/somaxconn").output();
    assert_eq!(output.unwrap().stdout, b"65535\n");
    drop(one);
    assert!(!name.exists());
}
