//! Plain HTTP through tidegate, and its admin listener.

use crate::harness::{
    DEADLINE, Dial, End, Gate, Message, Peer, Scene, Seen, Side,
    http::Framing,
    proxy::{Metrics, Proxy},
};
use std::time::{Duration, Instant};

/// Reads the only request of a connection with its body, which is counted or chunked without trailers.
async fn read_request(c: &mut Peer) -> Message {
    let mut request = c.read_head().await;
    loop {
        let raw = c.seen().raw;
        let (_, head) = Message::parse_head(&raw).expect("it was just read");
        if let Some((body, length)) = request.framing().body(&raw[head..], false).expect("a valid body") {
            assert_eq!(raw.len(), head + length, "bytes behind the request");
            request.body = body;
            return request;
        }
        c.read_bytes(raw.len() + 1).await;
    }
}

fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

fn has(seen: &Seen, text: &str) -> bool {
    seen.raw.windows(text.len()).any(|window| window == text.as_bytes())
}

/// Waits until a peer has received this.
async fn read_until(c: &mut Peer, text: &str) {
    while !has(&c.seen(), text) {
        let length = c.seen().raw.len();
        c.read_bytes(length + 1).await;
    }
}

/// Some bytes that do not repeat soon.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// Methods, bodies counted and chunked, statuses with and without a body, one request after the other on one connection of
/// the client, each on a connection of its own to the backend.
#[test]
fn requests_and_answers_pass() {
    let t = Scene::new("")
        .backend(async |c| {
            let request = read_request(c).await;
            let text = format!("{} {:?}", request.line, request.text());
            let answer = match request.target().trim_start_matches('/') {
                "chunked" => Message::line("HTTP/1.1 200 OK")
                    .header("Transfer-Encoding", "chunked")
                    .then([chunk(&text[..5]), chunk(&text[5..]), chunk("")].concat()),
                "head" => Message::line("HTTP/1.1 200 OK").header("Content-Length", "12345").header("ETag", "\"x\""),
                "204" => Message::line("HTTP/1.1 204 No Content").header("X-Kept", "yes"),
                "304" => {
                    Message::line("HTTP/1.1 304 Not Modified").header("ETag", "\"x\"").header("Content-Length", "99")
                }
                "404" => Message::status(404, "Nothing Here", &text),
                "hints" => Message::line("HTTP/1.1 103 Early Hints")
                    .header("Link", "</style.css>")
                    .then(Message::status(200, "OK", &text).bytes()),
                _ => Message::status(200, "OK", &text),
            };
            c.reply(answer).await;
            c.until_end().await;
        })
        .start();
    let post = |method: &str, target: &str| {
        let mut request = Message::get(target);
        request.line = format!("{method} {target} HTTP/1.1");
        request
    };
    let chunked_body = [chunk("hel"), chunk("lo"), chunk("")].concat();
    let requests = [
        (Message::get("/"), 200, "GET / HTTP/1.1 \"\""),
        (Message::get("/chunked"), 200, "GET /chunked HTTP/1.1 \"\""),
        (post("POST", "/").body("hello"), 200, "POST / HTTP/1.1 \"hello\""),
        (post("POST", "/empty").body(""), 200, "POST /empty HTTP/1.1 \"\""),
        (
            post("PUT", "/chunked").header("Transfer-Encoding", "chunked").then(&chunked_body),
            200,
            "PUT /chunked HTTP/1.1 \"hello\"",
        ),
        (post("DELETE", "/404"), 404, "DELETE /404 HTTP/1.1 \"\""),
        (post("PROPFIND", "/"), 200, "PROPFIND / HTTP/1.1 \"\""),
        (post("OPTIONS", "*"), 200, "OPTIONS * HTTP/1.1 \"\""),
        (Message::get("/204"), 204, ""),
        (Message::get("/304"), 304, ""),
        (Message::get("/hints"), 200, "GET /hints HTTP/1.1 \"\""),
        (
            Message::line("GET http://other.test/absolute?q HTTP/1.1").header("Host", "lie.test"),
            200,
            "GET /absolute?q HTTP/1.1 \"\"",
        ),
    ];
    let count = requests.len();
    t.client(async |c| {
        for (request, status, text) in requests {
            let response = c.request(request.clone()).await;
            assert_eq!((response.code(), response.text().as_str()), (status, text), "{request:?}");
            match status {
                204 => assert_eq!((response.field("X-Kept"), response.field("Content-Length")), (Some("yes"), None)),
                304 => assert_eq!(response.field("ETag"), Some("\"x\"")),
                404 => assert_eq!(response.line, "HTTP/1.1 404 Nothing Here"),
                _ => {}
            }
        }
        c.send_bytes(&post("HEAD", "/head").set("Connection", "close").bytes()).await;
        let head = c.read_head().await;
        assert_eq!((head.field("Content-Length"), head.field("ETag")), (Some("12345"), Some("\"x\"")));
        let seen = c.until_end().await;
        assert_eq!((seen.end, seen.leftover), (End::Fin, vec![]));
    });
    assert_eq!(t.backend().count(), count + 1);
    for index in 0..=count {
        assert_eq!(t.connection(index).seen().end, End::Fin);
    }
    let absolute = t.connection(count - 1).seen().head.unwrap();
    assert_eq!(absolute.all("Host"), ["other.test"]);
    t.no_rst();
}

/// Requests of which two readers may see different ends: at most one request reaches the backend, framed in one way, and
/// never the second one that is hidden in its body; the client gets an answer, and FIN.
#[test]
fn nothing_is_smuggled() {
    const HIDDEN: &str = "GET /hidden HTTP/1.1\r\nHost: tidegate.test\r\n\r\n";
    let t = Scene::new("")
        .backend(async |c| {
            // A request whose body is soon found to be none may end before its head has gone out.
            while Message::parse_head(&c.seen().raw).is_none() {
                if c.next_frame(Duration::from_millis(1)).await == Err(End::Fin) {
                    return;
                }
            }
            c.read_head().await;
            c.reply(Message::status(200, "OK", "")).await;
            c.until_end().await;
        })
        .start();
    let length = |text: &str| format!("Content-Length: {}", text.len());
    let end_and_hidden = format!("0\r\n\r\n{HIDDEN}");
    let (short, long) = (length("0\r\n\r\n"), length(&end_and_hidden));
    let vectors = [
        ([long.as_str(), "Transfer-Encoding: chunked"], &end_and_hidden, 200),
        (["Transfer-Encoding: chunked", &long], &end_and_hidden, 200),
        (["Transfer-Encoding: chunked", &short], &end_and_hidden, 200),
        (["Transfer-Encoding: chunked", "Content-Length: nonsense"], &end_and_hidden, 200),
        (["Transfer-Encoding: chunked", "Transfer-Encoding: identity"], &end_and_hidden, 400),
        (["Transfer-Encoding: identity", &long], &end_and_hidden, 400),
        (["Transfer-Encoding: xchunked", &long], &end_and_hidden, 400),
        (["Transfer-Encoding: chunked, identity", &long], &end_and_hidden, 400),
        (["Transfer-Encoding : chunked", &long], &end_and_hidden, 400),
        (["Transfer-Encoding:\u{b}chunked", &long], &end_and_hidden, 400),
        (["X: x\r\n Transfer-Encoding: chunked", &long], &end_and_hidden, 400),
        (["Content-Length: 0", &long], &HIDDEN.to_owned(), 400),
        (["Content-Length: +0", "X: x"], &HIDDEN.to_owned(), 400),
        (["Content-Length: 0, 0", "X: x"], &HIDDEN.to_owned(), 400),
        (["Content-Length: 0x0", "X: x"], &HIDDEN.to_owned(), 400),
        (["Content-Length: -1", "X: x"], &HIDDEN.to_owned(), 400),
        (["Content-Length: 18446744073709551616", "X: x"], &HIDDEN.to_owned(), 400),
        (["Transfer-Encoding: chunked", "X: x"], &format!("0x0\r\n\r\n{HIDDEN}"), 400),
        (["Transfer-Encoding: chunked", "X: x"], &format!("-0\r\n\r\n{HIDDEN}"), 400),
        (["Transfer-Encoding: chunked", "X: x"], &format!("10000000000000000\r\n\r\n{HIDDEN}"), 400),
        (["Transfer-Encoding: chunked", "X: x"], &format!("1\r\nxy\r\n0\r\n\r\n{HIDDEN}"), 400),
        (["Transfer-Encoding: chunked", "X: x"], &format!("0;x\n\r\n\r\n{HIDDEN}"), 400),
    ];
    let seen = t.clients(vectors.len(), async |c| {
        let (fields, body, _) = &vectors[c.index()];
        let head = format!("POST /{} HTTP/1.1\r\nHost: tidegate.test\r\n{}\r\n\r\n", c.index(), fields.join("\r\n"));
        c.send_bytes(&[head.as_bytes(), body.as_bytes()].concat()).await;
        c.until_end().await
    });
    for (seen, vector) in seen.iter().zip(&vectors) {
        let (head, _) = Message::parse_head(&seen.raw).unwrap_or_else(|| panic!("{vector:?}: {seen:?}"));
        // What a body is worth shows only after the head has gone on: a backend may have answered by then.
        let malformed_body = vector.0[1] == "X: x" && vector.0[0].starts_with("Transfer");
        assert!(head.code() == vector.2 || malformed_body && head.code() == 200, "{vector:?}: {head:?}");
        assert_eq!(seen.end, End::Fin, "{vector:?}");
    }
    for index in 0..t.backend().count() {
        let seen = t.connection(index).seen();
        let Some(head) = &seen.head else { continue };
        assert!(!has(&seen, "/hidden"), "{:?}", String::from_utf8_lossy(&seen.raw));
        assert_eq!((head.all("Transfer-Encoding"), head.field("Content-Length")), (vec!["chunked"], None), "{head:?}");
    }
    t.no_rst();
}

/// Requests that a client sends without waiting for the answers are answered in their order.
#[test]
fn pipelined_requests_are_answered_in_order() {
    let t = Scene::new("")
        .backend(async |c| {
            let request = c.read_head().await;
            c.reply(Message::status(200, "OK", request.target())).await;
            c.until_end().await;
        })
        .start();
    t.client(async |c| {
        let all: Vec<_> = (0..20).map(|n| Message::get(&format!("/{n}")).bytes()).collect();
        c.send_bytes(&all.concat()).await;
        for n in 0..20 {
            assert_eq!(c.read_response().await.text(), format!("/{n}"));
        }
    });
    t.no_rst();
}

/// Trailers pass in both directions, to those who say that they want them.
#[test]
fn trailers_pass() {
    let with_trailer = |head: Message| {
        head.header("Transfer-Encoding", "chunked")
            .header("Trailer", "X-Sum")
            .then([chunk("hello"), "0\r\nX-Sum: 42\r\n\r\n".to_owned()].concat())
    };
    let t = Scene::new("")
        .backend(async move |c| {
            let request = c.read_head().await;
            assert_eq!((request.field("TE"), request.field("Connection")), (Some("trailers"), Some("close, TE")));
            read_until(c, "X-Sum: 42\r\n\r\n".to_lowercase().as_str()).await;
            c.reply(with_trailer(Message::line("HTTP/1.1 200 OK"))).await;
            c.until_end().await;
        })
        .start();
    t.client(async |c| {
        let mut request = Message::get("/").header("TE", "trailers").header("Connection", "TE");
        "POST / HTTP/1.1".clone_into(&mut request.line);
        c.send_bytes(&with_trailer(request).bytes()).await;
        read_until(c, "x-sum: 42\r\n\r\n").await;
        assert!(has(&c.seen(), "5\r\nhello\r\n0\r\n"), "{:?}", c.seen());
    });
    t.no_rst();
}

/// `Expect: 100-continue`: the client gets its 100 before it has sent anything of the body, and then the answer.
#[test]
fn a_client_may_wait_for_100() {
    let t = Scene::new("")
        .backend(async |c| {
            let request = read_request(c).await;
            c.reply(Message::status(200, "OK", &request.text())).await;
            c.until_end().await;
        })
        .start();
    t.client(async |c| {
        let mut request = Message::get("/").header("Expect", "100-continue").header("Content-Length", "5");
        "POST / HTTP/1.1".clone_into(&mut request.line);
        c.send_bytes(&request.bytes()).await;
        assert_eq!(c.read_head().await.code(), 100);
        c.send_bytes(b"hello").await;
        let response = c.read_response().await;
        assert_eq!((response.code(), response.text().as_str()), (200, "hello"));
    });
    t.no_rst();
}

/// Server-sent events: each reaches the client before the backend writes the next, with or without chunks.
#[test]
fn events_are_not_buffered() {
    const EVENTS: usize = 20;
    for chunked in [true, false] {
        let gates: Vec<_> = (0..EVENTS).map(|_| Gate::new("the event has arrived")).collect();
        let arrived = gates.clone();
        let script = async move |c: &mut Peer| {
            c.read_head().await;
            let mut head = Message::line("HTTP/1.1 200 OK").header("Content-Type", "text/event-stream");
            if chunked {
                head = head.header("Transfer-Encoding", "chunked");
            }
            c.reply(head).await;
            for (index, gate) in arrived.iter().enumerate() {
                let event = format!("data: {index:03}\n\n");
                let event = if chunked { chunk(&event) } else { event };
                c.send_bytes(event.as_bytes()).await;
                gate.passed().await;
            }
            c.send_bytes(if chunked { b"0\r\n\r\n" } else { b"" }).await;
            c.fin().await;
            c.until_end().await;
        };
        let t = Scene::new("").backend(script).start();
        t.client(async |c| {
            c.send_bytes(&Message::get("/events").bytes()).await;
            for (index, gate) in gates.iter().enumerate() {
                read_until(c, &format!("data: {index:03}\n\n")).await;
                gate.open();
            }
            // Without chunks the end of the backend's answer is the end of its connection; here it is a chunk all the same.
            read_until(c, "\r\n0\r\n\r\n").await;
        });
        t.no_rst();
    }
}

/// An answer may be long in coming: the deadline of WebSocket handshakes is not that of plain requests.
#[test]
fn long_polling() {
    let t = Scene::new("upstream.handshake_timeout = '100ms'")
        .backend(async |c| {
            c.read_head().await;
            tokio::time::sleep(Duration::from_millis(400)).await;
            c.reply(Message::status(200, "OK", "news")).await;
            c.until_end().await;
        })
        .start();
    let response = t.client(async |c| c.request(Message::get("/poll")).await);
    assert_eq!((response.code(), response.text().as_str()), (200, "news"));
    t.no_rst();
}

/// 5 MiB up and down: a reader that pauses stops the writer, and everything arrives.
#[test]
fn large_bodies_wait_for_their_readers() {
    const LENGTH: usize = 5 << 20;
    let body = noise(LENGTH);
    for chunked in [false, true] {
        let (read, reading) = (Gate::new("the backend reads"), Gate::new("the client reads"));
        let (may_read, client_reads) = (read.clone(), reading.clone());
        let script = async move |c: &mut Peer| {
            c.read_head().await;
            may_read.passed().await;
            let mut last = 0;
            // A chunked body is longer than its content, by what only its end tells.
            while if chunked { !c.received_ends_with(b"\r\n0\r\n\r\n") } else { last < LENGTH } {
                c.read_bytes(last + 1).await;
                last = c.received_bytes();
            }
            let raw = c.seen().raw;
            let (head, length) = Message::parse_head(&raw).unwrap();
            let framing = if chunked { Framing::Chunked } else { Framing::Length(LENGTH) };
            assert_eq!(head.framing(), framing);
            // The head is part of what was counted above.
            c.read_bytes(if chunked { raw.len() } else { length + LENGTH }).await;
            let (got, _) = framing.body(&c.seen().raw[length..], false).unwrap().expect("a whole body");
            assert!(got == noise(LENGTH), "not the client's body");
            let mut answer = Message::line("HTTP/1.1 200 OK");
            answer = if chunked {
                let size = format!("{LENGTH:x}\r\n");
                answer.header("Transfer-Encoding", "chunked").then(size).then(&got).then("\r\n0\r\n\r\n")
            } else {
                answer.body(&got)
            };
            let bytes = answer.bytes();
            let mut write = Box::pin(c.send_bytes(&bytes));
            let stalled = tokio::time::timeout(Duration::from_millis(100), &mut write).await.is_err();
            assert!(stalled, "5 MiB fit into no buffer");
            client_reads.open();
            assert!(write.await);
            c.until_end().await;
        };
        let t = Scene::new("").backend_recv_buffer(64 << 10).backend(script).start();
        let dial = Dial { recv_buffer: Some(64 << 10), ..Dial::default() };
        let response = t.client_with(dial, async |c| {
            let mut request = Message::get("/");
            "POST / HTTP/1.1".clone_into(&mut request.line);
            request = if chunked {
                let size = format!("{LENGTH:x}\r\n");
                request.header("Transfer-Encoding", "chunked").then(size).then(&body).then("\r\n0\r\n\r\n")
            } else {
                request.body(&body)
            };
            let bytes = request.bytes();
            let mut write = Box::pin(c.send_bytes(&bytes));
            let stalled = tokio::time::timeout(Duration::from_millis(100), &mut write).await.is_err();
            assert!(stalled, "5 MiB fit into no buffer");
            read.open();
            assert!(write.await);
            reading.passed().await;
            c.read_response().await
        });
        assert_eq!(response.code(), 200);
        assert!(response.body == body, "not the backend's body");
        t.no_rst();
    }
}

/// A backend that answers before it has read the request, and will not read the rest: its whole answer reaches the client,
/// also when that reads nothing before the backend is done. The answers have many sizes, so that there is one whose end has
/// to wait inside tidegate and not in a buffer of the kernel.
#[test]
fn an_answer_before_the_end_of_the_request() {
    const STEP: usize = 16 << 10;
    let script = async |c: &mut Peer| {
        let size = c.read_head().await.target()[1..].parse().unwrap();
        c.pump(&Message::status(413, "Too Much", &"x".repeat(size)).bytes()).await;
        c.fin().await;
        c.until_end().await;
    };
    let t = Scene::new("websocket.send_buffer = '16KiB'").backend(script).start();
    let seen = t.clients(40, async |c| {
        c.set_recv_buffer(8 << 10);
        let size = c.index() * STEP;
        let mut request = Message::get("/").header("Content-Length", "100000000");
        request.line = format!("POST /{size} HTTP/1.1");
        c.send_bytes(&request.then(noise(20_000)).bytes()).await;
        // For the buffers to fill: the test says nothing wrong if they do not, only less.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let response = c.read_response().await;
        assert_eq!((response.code(), response.body.len()), (413, size));
        c.until_end().await
    });
    for seen in seen {
        assert_eq!(seen.end, End::Fin);
    }
    t.no_rst();
}

/// A backend that dies inside its answer: the client must not take what it got for the whole.
#[test]
fn a_truncated_answer_is_no_whole_one() {
    let t = Scene::new("")
        .backend(async |c| {
            let request = c.read_head().await;
            let (form, end) = request.target()[1..].split_once('/').unwrap();
            let head = Message::line("HTTP/1.1 200 OK");
            let part = match form {
                "counted" => head.header("Content-Length", "1000").then("x".repeat(500)),
                "chunked" => head.header("Transfer-Encoding", "chunked").then(chunk(&"x".repeat(500))),
                // Until the end: a RST is no end.
                _ => head.then("x".repeat(500)),
            };
            c.reply(part).await;
            c.sent_is_acked().await;
            if end == "rst" {
                // What is unread when a RST comes is gone.
                tokio::time::sleep(Duration::from_millis(50)).await;
                c.rst();
            }
        })
        .start();
    for target in ["/counted/fin", "/counted/rst", "/chunked/fin", "/chunked/rst", "/until-end/rst"] {
        let (head, seen) = t.client(async |c| {
            c.send_bytes(&Message::get(target).bytes()).await;
            (c.read_head().await, c.until_end().await)
        });
        assert_eq!((head.code(), seen.end), (200, End::Fin), "{target}");
        assert!(matches!(head.framing(), Framing::Chunked | Framing::Length(1000)), "{target}: {head:?}");
        let (_, length) = Message::parse_head(&seen.raw).unwrap();
        assert!(seen.raw.len() >= length + 500, "{target}: what there was is delivered: {seen:?}");
        let whole = head.framing().body(&seen.raw[length..], true).unwrap();
        assert_eq!(whole, None, "{target}");
    }
    t.no_rst();
}

/// A client of HTTP/1.0 gets what it understands: no chunks, the end of the connection as the end of the body, and the
/// backend is asked in HTTP/1.1.
#[test]
fn a_client_of_http_1_0() {
    let t = Scene::new("")
        .backend(async |c| {
            let request = c.read_head().await;
            assert!(request.line.ends_with(" HTTP/1.1"), "{request:?}");
            let answer = Message::line("HTTP/1.1 200 OK").header("Transfer-Encoding", "chunked");
            c.reply(answer.then([chunk("hel"), chunk("lo"), chunk("")].concat())).await;
            c.until_end().await;
        })
        .start();
    let hosts = [None, Some("old.test")];
    for (index, host) in hosts.into_iter().enumerate() {
        let (head, seen) = t.client(async |c| {
            let mut request = Message::line("GET / HTTP/1.0");
            if let Some(host) = host {
                request = request.header("Host", host);
            }
            c.send_bytes(&request.bytes()).await;
            (c.read_head().await, c.until_end().await)
        });
        assert_eq!((head.line.as_str(), head.field("Transfer-Encoding")), ("HTTP/1.0 200 OK", None), "{head:?}");
        assert_eq!((seen.end, seen.leftover), (End::Fin, b"hello".to_vec()), "{head:?}");
        let got = t.connection(index).seen().head.unwrap();
        assert_eq!(got.all("Host"), [host.unwrap_or_default()]);
        assert_eq!(got.field("X-Forwarded-Host"), host);
    }
    t.no_rst();
}

/// A client that leaves before the answer, or in its middle: the backend's writing is not met by a RST, and then it sees FIN.
#[test]
fn a_client_leaves_a_plain_request() {
    for (resets, midway) in [(false, false), (true, false), (false, true), (true, true)] {
        let (arrived, gone) = (Gate::new("the client may leave"), Gate::new("the client has left"));
        let (has_arrived, has_gone) = (arrived.clone(), gone.clone());
        let script = async move |c: &mut Peer| {
            c.read_head().await;
            let head = Message::line("HTTP/1.1 200 OK").header("Transfer-Encoding", "chunked");
            if midway {
                c.reply(head.clone().then(chunk("first"))).await;
            }
            has_arrived.open();
            has_gone.passed().await;
            if !midway {
                c.reply(head).await;
            }
            for _ in 0..10 {
                assert!(c.send_bytes(chunk(&"x".repeat(1000)).as_bytes()).await, "{:?}", c.seen());
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            c.send_bytes(chunk("").as_bytes()).await;
            c.until_end().await;
        };
        let t = Scene::new("").backend(script).start();
        t.client(async |c| {
            c.send_bytes(&Message::get("/").bytes()).await;
            if midway {
                read_until(c, "first").await;
            }
            arrived.passed().await;
            if resets { c.rst() } else { c.fin().await }
        });
        // With a FIN the client's script ended with tidegate's own; a RST is processed before the next probe is answered.
        t.proxy().metrics_when("no client", |m| m.sum("tidegate_client_connections") < 0.5);
        gone.open();
        let seen = t.connection(0).seen();
        assert_eq!((seen.end, &seen.write_failed[..]), (End::Fin, &[][..]), "{resets} {midway}: {seen:?}");
        t.no_rst();
    }
}

/// A client that leaves in the middle of its own body: the backend gets no request that looks whole, and FIN.
#[test]
fn a_client_leaves_inside_its_body() {
    for resets in [false, true] {
        let half = Gate::new("half of the body has arrived");
        let arrived = half.clone();
        let script = async move |c: &mut Peer| {
            c.read_head().await;
            read_until(c, "half of it").await;
            arrived.open();
            c.until_end().await;
        };
        let t = Scene::new("").backend(script).start();
        t.client(async |c| {
            let mut request = Message::get("/").header("Content-Length", "1000").then("half of it");
            "POST / HTTP/1.1".clone_into(&mut request.line);
            c.send_bytes(&request.bytes()).await;
            half.passed().await;
            if resets { c.rst() } else { c.fin().await }
        });
        let seen = t.connection(0).seen();
        assert_eq!(seen.end, End::Fin);
        assert_eq!(Framing::Length(1000).body(&seen.leftover, true).unwrap(), None);
        t.no_rst();
    }
}

/// Bodies that stand still are cut after `upstream.body_timeout`, in both directions, in order.
#[test]
fn bodies_must_move_on() {
    let t = Scene::new("upstream.body_timeout = '300ms'")
        .backend(async |c| {
            let request = c.read_head().await;
            if request.target() == "/answer" {
                c.reply(Message::line("HTTP/1.1 200 OK").header("Content-Length", "10").then("half")).await;
            }
            c.until_end().await;
        })
        .start();
    let (head, seen) = t.client(async |c| {
        c.send_bytes(&Message::get("/answer").bytes()).await;
        (c.read_head().await, c.until_end().await)
    });
    assert_eq!((head.code(), seen.end, seen.leftover.as_slice()), (200, End::Fin, b"half".as_slice()));
    let (response, seen) = t.client(async |c| {
        let mut request = Message::get("/request").header("Content-Length", "10").then("half");
        "POST /request HTTP/1.1".clone_into(&mut request.line);
        let response = c.request(request).await;
        (response, c.until_end().await)
    });
    assert_eq!(response.code(), 400, "{response:?}");
    assert_eq!(seen.end, End::Fin);
    for index in 0..2 {
        assert_eq!(t.connection(index).seen().end, End::Fin);
    }
    t.no_rst();
}

/// A body that comes a byte at a time is cut when its patience is used up, however often a byte comes.
#[test]
fn bodies_must_keep_a_pace() {
    const LENGTH: usize = 200;
    let t = Scene::new("http = { header_timeout = '500ms', body_rate = 1000 }")
        .backend(async |c| {
            c.read_head().await;
            c.until_end().await;
        })
        .start();
    let (response, seen) = t.client(async |c| {
        let mut request = Message::get("/").header("Content-Length", &LENGTH.to_string());
        "POST / HTTP/1.1".clone_into(&mut request.line);
        c.send_bytes(&request.bytes()).await;
        // Never silent for as long as `header_timeout`, and whole if nobody counts.
        c.drip(&[b'a'; LENGTH], 1, Duration::from_millis(20)).await;
        (c.read_response().await, c.until_end().await)
    });
    assert_eq!(response.code(), 400, "{response:?}");
    assert_eq!(seen.end, End::Fin);
    let backend = t.connection(0).seen();
    assert_eq!(backend.end, End::Fin);
    assert!(backend.leftover.len() < LENGTH, "{} bytes", backend.leftover.len());
}

/// An answer that its client takes by a few bytes now and then is ended, and its backend is not held up by it; one that is taken at its
/// pace is whole, also where the kernel takes nothing more for longer than `header_timeout`, since it waits for a third of its buffer.
#[test]
fn answers_must_be_taken_at_a_pace() {
    const LENGTH: usize = 1 << 20;
    let cut = Gate::new("the backend's connection has ended");
    let is_cut = cut.clone();
    let script = async move |c: &mut Peer| {
        let target = c.read_head().await.target().to_owned();
        c.pump(&Message::status(200, "OK", &"x".repeat(LENGTH)).bytes()).await;
        c.until_end().await;
        if target == "/drip" {
            is_cut.open();
        }
    };
    let settings = "http = { header_timeout = '1s', body_rate = 1000 }\nroute = [{ path = '/drip' }]";
    let t = Scene::new(settings).backend(script).start();
    let dial = Dial { recv_buffer: Some(16 << 10), ..Dial::default() };
    let seen = t.client_with(dial, async |c| {
        c.send_bytes(&Message::get("/drip").bytes()).await;
        let mut passed = std::pin::pin!(cut.passed());
        while tokio::time::timeout(Duration::from_millis(20), &mut passed).await.is_err() {
            c.sip(4).await;
        }
        c.until_end().await
    });
    assert!(seen.raw.len() < LENGTH, "{} bytes", seen.raw.len());
    let line = t.proxy().log_where("that it was too slow", |line| {
        line["message"] == "a client takes its answer too slowly: its connection is ended"
    });
    let client = t.lab().address(Side::Client, Side::Proxy).to_string();
    assert_eq!((&line["level"], &line["route"]), (&"WARN".into(), &"/drip".into()), "{line}");
    assert!(line["client"].as_str().is_some_and(|address| address.starts_with(&client)), "{line}");
    let response = t.client_with(dial, async |c| {
        c.send_bytes(&Message::get("/").bytes()).await;
        while c.received_bytes() < LENGTH {
            c.sip(8 << 10).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        c.read_response().await
    });
    assert_eq!((response.code(), response.body.len()), (200, LENGTH));
}

/// SIGTERM during an exchange: it is finished, its connection told to close and closed by FIN; an idle connection gets FIN.
#[test]
fn an_exchange_survives_sigterm() {
    let (arrived, go) = (Gate::new("the request has arrived"), Gate::new("answer"));
    let (has_arrived, answer) = (arrived.clone(), go.clone());
    let script = async move |c: &mut Peer| {
        let request = c.read_head().await;
        if request.target() == "/slow" {
            c.reply(Message::line("HTTP/1.1 200 OK").header("Transfer-Encoding", "chunked").then(chunk("first"))).await;
            has_arrived.open();
            answer.passed().await;
            c.send_bytes([chunk("last"), chunk("")].concat().as_bytes()).await;
        } else {
            c.reply(Message::status(200, "OK", "quick")).await;
        }
        c.until_end().await;
    };
    let t = Scene::new("drain = { delay = '0s', window = '10s' }").backend(script).start();
    let idle_is_open = Gate::new("the idle connection has had its answer");
    let opened = idle_is_open.clone();
    let idle = t.start_client(async move |c| {
        assert_eq!(c.request(Message::get("/quick")).await.text(), "quick");
        opened.open();
        c.until_end().await
    });
    let slow = t.start_client(async |c| {
        let response = c.request(Message::get("/slow")).await;
        (response, c.until_end().await)
    });
    idle_is_open.pass();
    arrived.pass();
    t.proxy().sigterm();
    assert_eq!(idle.join().end, End::Fin);
    let not_ready = t.proxy().get("/readyz");
    assert_eq!((not_ready.code(), not_ready.text().as_str()), (503, "draining\n"));
    assert_eq!(t.proxy().get("/livez").code(), 200, "a process that drains is alive");
    go.open();
    let (response, seen) = slow.join();
    assert_eq!((response.code(), response.text().as_str(), seen.end), (200, "firstlast", End::Fin));
    assert_eq!(t.proxy().wait_exit(DEADLINE).code(), Some(0));
    t.no_rst();
}

/// The admin listener's pages, and what it says to everything else.
#[test]
fn admin_pages() {
    let t = Scene::new("").backend(async |c| _ = c.until_end().await).start();
    let request = |method: &str, target: &str| {
        let mut request = Message::get(target);
        request.line = format!("{method} {target} HTTP/1.1");
        request
    };
    let ask = |method: &str, target: &str| t.proxy().admin(&request(method, target)).expect("an answer");
    for target in ["/livez", "/readyz", "/metrics", "/"] {
        assert_eq!(ask("GET", target).code(), 200, "{target}");
        assert_eq!(ask("GET", &format!("{target}?verbose")).code(), 200, "{target}");
        for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
            let refused = ask(method, target);
            assert_eq!((refused.code(), refused.field("Allow")), (405, Some("GET, HEAD")), "{method} {target}");
        }
    }
    for target in ["/nothing", "/livez/", "//livez", "/metrics/x"] {
        assert_eq!(ask("GET", target).code(), 404, "{target}");
    }
    assert_eq!(ask("GET", "/livez").field("Cache-Control"), Some("no-store"));
    let metrics = ask("GET", "/metrics");
    let kind = metrics.field("Content-Type").unwrap_or_default();
    assert!(kind.starts_with("application/openmetrics-text; version=1.0.0"), "{kind}");
    t.no_rst();
}

/// Readiness is the backend's: dialled at most once per 5 s, however many ask and at once, and left by FIN, also where the
/// backend has something to say at the end. Whoever asks is answered with what was found then.
#[test]
fn readiness_dials_the_backend_seldom() {
    fn ask(proxy: &Proxy) -> u16 {
        proxy.get("/readyz").code()
    }
    let t = Scene::new("")
        .backend(async |c| {
            c.until_end().await;
            // As some servers do that got no request.
            tokio::time::sleep(Duration::from_millis(50)).await;
            c.send_bytes(&Message::status(400, "Bad Request", "").bytes()).await;
        })
        .start();
    let proxy = t.proxy();
    let answers: Vec<_> = std::thread::scope(|s| {
        let asked: Vec<_> = (0..20).map(|_| s.spawn(|| ask(proxy))).collect();
        asked.into_iter().map(|asked| asked.join().unwrap()).collect()
    });
    assert_eq!(answers, [200; 20]);
    let seen = t.connection(0).seen();
    assert_eq!(t.backend().count(), 1);
    assert_eq!((seen.end, seen.raw.len(), &seen.write_failed[..]), (End::Fin, 0, &[][..]));
    t.backend().stop_listening();
    assert_eq!(ask(proxy), 200, "what was found is true for 5 s");
    let begun = Instant::now();
    while ask(proxy) == 200 {
        assert!(begun.elapsed() < DEADLINE, "the backend is gone and nobody notices");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(begun.elapsed() > Duration::from_secs(4), "dialled again after {:?}", begun.elapsed());
    assert_eq!(proxy.get("/livez").code(), 200, "liveness is not the backend's");
    assert_eq!(t.backend().count(), 1);
    t.no_rst();
}

/// `/metrics` is in the format that it promises: each sample belongs to a described family, no sample twice, `# EOF` at the end; and a request
/// is counted, whatever its path, without a series of its own.
#[test]
fn metrics_are_openmetrics() {
    let t = Scene::new("")
        .backend(async |c| {
            c.read_head().await;
            c.reply(Message::status(404, "Not Found", "")).await;
            c.until_end().await;
        })
        .start();
    let ask = |count: usize, path: &str| {
        t.client(async |c| {
            for n in 0..count {
                c.request(Message::get(&format!("/{path}/{n}"))).await;
            }
        });
    };
    let requests = |m: &Metrics| m.sum("tidegate_http_requests_total");
    ask(1, "once");
    // With the ends of both connections, which are counted a moment later.
    let ended = |m: &Metrics| m.sum("tidegate_lingered_total") > 1.5;
    let before = t.proxy().metrics_when("a request", |m| (requests(m) - 1.0).abs() < 0.1 && ended(m));
    ask(50, "often");
    let after = t.proxy().metrics_when("all requests", |m| (requests(m) - 51.0).abs() < 0.1);
    let names = |m: &Metrics| m.all().keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&before), names(&after));

    let text = t.proxy().get("/metrics").text();
    assert!(text.ends_with("# EOF\n"));
    let (mut family, mut samples) = (String::new(), Vec::new());
    for line in text.lines() {
        if let Some(described) = line.strip_prefix("# ") {
            let mut words = described.split(' ');
            match (words.next(), words.next()) {
                (Some("HELP" | "TYPE" | "UNIT"), Some(name)) => {
                    assert!(name.starts_with("tidegate_") || name.starts_with("process_"), "{line}");
                    name.clone_into(&mut family);
                }
                (Some("EOF"), None) => {}
                _ => panic!("{line}"),
            }
            continue;
        }
        let (sample, value) = line.rsplit_once(' ').unwrap();
        assert!(sample.starts_with(&family), "{line} is not of {family}");
        assert!(value.parse::<f64>().is_ok(), "{line}");
        samples.push(sample.to_owned());
    }
    let count = samples.len();
    samples.sort();
    samples.dedup();
    assert_eq!(samples.len(), count, "a sample twice");
    t.no_rst();
    assert_eq!(t.counters(Side::Client).get("EstabResets"), 0);
}
