//! The WebSocket handshake: what becomes a tunnel, what does not, and what everybody is told.

use crate::harness::{
    DEADLINE, End, Frame, Gate, LIMIT, Message, Peer, Scene, Seen, Side, backend,
    http::KEY,
    proxy::Metrics,
    ws::{CLOSE, TEXT},
};
use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

/// What backends answer to those handshakes of which nothing may come.
const STATUSES: [u16; 8] = [101, 200, 204, 301, 400, 403, 426, 500];

/// In the place of a status: no handshake at all, passed on as a plain request.
const PLAIN: u16 = 0;

/// Handshakes that must not become a tunnel, with the status that tidegate itself answers.
fn bad_handshakes(target: &str) -> [(&'static str, Vec<u8>, u16); 54] {
    let good = || Message::websocket(target);
    let method = |name: &str| {
        let mut request = good();
        request.line = format!("{name} {target} HTTP/1.1");
        request.bytes()
    };
    let line = |line: &str| {
        let mut request = good();
        line.clone_into(&mut request.line);
        request.bytes()
    };
    let set = |name: &str, value: &str| good().set(name, value).bytes();
    let also = |name: &str, value: &str| good().header(name, value).bytes();
    let without = |name: &str| good().without(name).bytes();
    let edit = |from: &str, to: &str| {
        let text = String::from_utf8(good().bytes()).expect("ASCII");
        assert!(text.contains(from), "{from:?} is not in {text:?}");
        text.replacen(from, to, 1).into_bytes()
    };
    let chunks = "5\r\nhello\r\n0\r\n\r\n";
    [
        ("POST", method("POST"), 400),
        ("PUT", method("PUT"), 400),
        ("HEAD", method("HEAD"), 400),
        ("OPTIONS", method("OPTIONS"), 400),
        ("get", method("get"), 400),
        ("CONNECT", line("CONNECT tidegate.test:80 HTTP/1.1"), 405),
        ("HTTP/1.0", line(&format!("GET {target} HTTP/1.0")), 400),
        ("HTTP/1.2", line(&format!("GET {target} HTTP/1.2")), 400),
        ("HTTP/2.0", line(&format!("GET {target} HTTP/2.0")), 400),
        ("no version", line(&format!("GET {target}")), 400),
        ("no key", without("Sec-WebSocket-Key"), 400),
        ("an empty key", set("Sec-WebSocket-Key", ""), 400),
        ("two keys", also("Sec-WebSocket-Key", KEY), 400),
        ("two keys in a line", set("Sec-WebSocket-Key", &format!("{KEY}, {KEY}")), 400),
        ("a key of 15 bytes", set("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25j"), 400),
        ("a key of 17 bytes", set("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZWU="), 400),
        ("a key without padding", set("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ"), 400),
        ("a key that is no base64", set("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25j*Q=="), 400),
        ("no version of WebSocket", without("Sec-WebSocket-Version"), 426),
        ("version 12", set("Sec-WebSocket-Version", "12"), 426),
        ("version 14", set("Sec-WebSocket-Version", "14"), 426),
        ("version 013", set("Sec-WebSocket-Version", "013"), 426),
        ("versions 13 and 13", also("Sec-WebSocket-Version", "13"), 426),
        ("version 13, 8", set("Sec-WebSocket-Version", "13, 8"), 426),
        ("version 13,13", set("Sec-WebSocket-Version", "13,13"), 426),
        ("no Upgrade", without("Upgrade"), PLAIN),
        ("Upgrade: h2c", set("Upgrade", "h2c"), PLAIN),
        ("Upgrade: websocket/13", set("Upgrade", "websocket/13"), PLAIN),
        (
            "h2c with its settings",
            good()
                .set("Upgrade", "h2c")
                .set("Connection", "Upgrade, HTTP2-Settings")
                .header("HTTP2-Settings", "AAMAAABkAARAAAAAAAIAAAAA")
                .bytes(),
            PLAIN,
        ),
        (
            "h2c that Connection does not name",
            good()
                .set("Upgrade", "h2c")
                .without("Connection")
                .header("HTTP2-Settings", "AAMAAABkAARAAAAAAAIAAAAA")
                .bytes(),
            PLAIN,
        ),
        ("h2c, kept alive", good().set("Upgrade", "h2c").set("Connection", "keep-alive").bytes(), PLAIN),
        ("Upgrade: websocket, h2c", set("Upgrade", "websocket, h2c"), 400),
        ("Upgrade: h2c, websocket", set("Upgrade", "h2c, websocket"), 400),
        ("Upgrade in two lines", also("Upgrade", "h2c"), 400),
        ("websocket twice", also("Upgrade", "websocket"), 400),
        ("no Connection", without("Connection"), 400),
        ("Connection: keep-alive", set("Connection", "keep-alive"), 400),
        ("Connection names the key", set("Connection", "Upgrade, Sec-WebSocket-Key"), 400),
        ("Connection names the version", set("Connection", "sec-websocket-version, Upgrade"), 400),
        ("Connection names Host", set("Connection", "Upgrade, Host"), 400),
        ("Connection names Origin", set("Connection", "Upgrade, Origin"), 400),
        ("a counted body", good().body("hello").bytes(), 400),
        ("a chunked body", good().header("Transfer-Encoding", "chunked").then(chunks).bytes(), 400),
        (
            "Content-Length and Transfer-Encoding",
            good().header("Content-Length", "0").header("Transfer-Encoding", "chunked").then(chunks).bytes(),
            400,
        ),
        (
            "Transfer-Encoding and Content-Length",
            good().header("Transfer-Encoding", "chunked").header("Content-Length", "0").then(chunks).bytes(),
            400,
        ),
        ("two lengths", good().header("Content-Length", "0").header("Content-Length", "5").bytes(), 400),
        ("a folded line", edit("Upgrade: websocket", "Upgrade:\r\n websocket"), 400),
        ("a space before the colon", edit("Upgrade:", "Upgrade :"), 400),
        ("a bare CR", edit("Upgrade: websocket", "Upgrade: web\rsocket"), 400),
        ("a NUL", edit("Upgrade: websocket", "Upgrade: websocket\0"), 400),
        ("no Host", without("Host"), 400),
        ("two Hosts", also("Host", "elsewhere.test"), 400),
        ("an authority as the target", line("GET tidegate.test:80 HTTP/1.1"), 400),
        ("an asterisk as the target", line("GET * HTTP/1.1"), 400),
    ]
}

/// What a client sends behind a handshake, to see whether it becomes the bytes of a tunnel: a request, and a frame with one.
fn canary(client: &mut Peer, number: usize) -> Vec<u8> {
    let request = Message::get(&format!("/canary-{number}")).bytes();
    let frame = client.frame_bytes(&Frame::new(TEXT, &request));
    [request, frame].concat()
}

/// Answers each request with the status that is the first part of its path, right or wrong; without one: 200.
async fn status_by_path(c: &mut Peer) {
    let request = c.read_head().await;
    let status = request.target().split('/').nth(1).and_then(|part| part.parse().ok()).unwrap_or(200);
    let answer = match status {
        101 => Message::switching(&request),
        204 => Message::line("HTTP/1.1 204 Fine"),
        _ => Message::status(status, "As Asked", "the backend's body"),
    };
    c.reply(answer).await;
    c.until_end().await;
}

/// The first response of what a client received.
fn first_response(seen: &Seen) -> Message {
    let head = Message::parse_head(&seen.raw);
    head.unwrap_or_else(|| panic!("no response in {:?}", String::from_utf8_lossy(&seen.raw))).0
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// Each bad handshake at each backend, with a canary behind it: the client gets an answer in HTTP that is no 101, and FIN.
/// What reached the backend are whole requests without any upgrade, one a connection: those that are plain HTTP, and behind
/// them the canary as a request of its own. The frame with the canary arrives nowhere.
#[test]
fn no_bad_handshake_becomes_a_tunnel() {
    let count = bad_handshakes("/").len();
    assert!(count >= 40);
    let t = Scene::new("").backend(status_by_path).start();
    let seen = t.clients(count * STATUSES.len(), async |c| {
        let (status, bad) = (STATUSES[c.index() / count], c.index() % count);
        let (_, request, _) = &bad_handshakes(&format!("/{status}/{bad}"))[bad];
        let canary = canary(c, c.index());
        c.send_bytes(&[request.as_slice(), &canary].concat()).await;
        c.until_end().await
    });
    for (index, seen) in seen.iter().enumerate() {
        let (status, (name, _, expected)) = (STATUSES[index / count], &bad_handshakes("/")[index % count]);
        let expected = match (*expected, status) {
            // Whoever accepts what nobody asked for is no good backend.
            (PLAIN, 101) => 502,
            (PLAIN, status) => status,
            (refused, _) => refused,
        };
        let response = first_response(seen);
        assert_eq!(response.code(), expected, "{name} at a backend that answers {status}: {response:?}");
        assert!(!contains(&seen.raw, b"HTTP/1.1 101"), "{name} at a backend that answers {status}: {seen:?}");
        assert_eq!(seen.end, End::Fin, "{name} at a backend that answers {status}");
        match expected {
            // RFC 9110, 15.5.22 and RFC 6455, 4.2.2; RFC 9110, 15.5.6.
            426 if status != 426 => {
                assert_eq!(response.field("Upgrade"), Some("websocket"), "{response:?}");
                assert_eq!(response.field("Sec-WebSocket-Version"), Some("13"), "{response:?}");
            }
            405 => assert!(response.field("Allow").is_some(), "{response:?}"),
            _ => {}
        }
    }
    let plain = bad_handshakes("/").iter().filter(|(_, _, expected)| *expected == PLAIN).count() * STATUSES.len();
    let mut canaries = 0;
    for index in 0..t.backend().count() {
        let seen = t.connection(index).seen();
        let (request, length) = Message::parse_head(&seen.raw).unwrap();
        assert_eq!(seen.raw.len(), length, "more than one request: {:?}", String::from_utf8_lossy(&seen.raw));
        for one_hop in ["Upgrade", "HTTP2-Settings"] {
            assert_eq!(request.all(one_hop), [""; 0], "{request:?}");
        }
        assert_eq!(request.all("Connection"), ["close"], "{request:?}");
        assert!(request.field("X-Forwarded-For").is_some(), "{request:?}");
        assert_eq!(seen.end, End::Fin, "{request:?}");
        canaries += usize::from(request.target().starts_with("/canary-"));
    }
    assert_eq!((t.backend().count(), canaries), (2 * plain, plain));
    t.no_rst();
}

/// A valid handshake that the backend answers with something else: the answer is passed on as it is, both connections are
/// closed, and what the client sent behind its handshake reaches the backend in no form.
#[test]
fn a_refusal_is_passed_on_verbatim() {
    fn refusal(status: u16, chunked: bool) -> Message {
        let refusal = Message::line(&format!("HTTP/1.1 {status} No Tunnel Today"))
            .header("X-First", "1")
            .header("Set-Cookie", "a=b; Path=/")
            .header("Set-Cookie", "c=d")
            .header("Location", "https://elsewhere.test/?q=%20")
            .header("WWW-Authenticate", "Basic realm=\"a, b\"")
            .header("Content-Type", "text/plain")
            .header("Date", "Sun, 06 Nov 1994 08:49:37 GMT");
        match status {
            204 => refusal,
            _ if chunked => refusal.header("Transfer-Encoding", "chunked").then("3\r\nsor\r\n2\r\nry\r\n0\r\n\r\n"),
            _ => refusal.body("sorry"),
        }
    }
    let t = Scene::new("")
        .backend(async |c| {
            let request = c.read_head().await;
            let mut parts = request.target().split('/').skip(1);
            let status = parts.next().unwrap().parse().unwrap();
            c.reply(refusal(status, parts.next() == Some("chunked"))).await;
            c.until_end().await;
        })
        .start();
    let statuses = &STATUSES[1..];
    let seen = t.clients(statuses.len() * 2, async |c| {
        let (status, form) = (statuses[c.index() / 2], ["counted", "chunked"][c.index() % 2]);
        let canary = canary(c, c.index());
        let response = c.request(Message::websocket(&format!("/{status}/{form}")).then(canary)).await;
        (response, c.until_end().await)
    });
    for (index, (response, seen)) in seen.into_iter().enumerate() {
        let (status, chunked) = (statuses[index / 2], index % 2 == 1);
        let expected = refusal(status, chunked);
        assert_eq!(response.line, expected.line);
        assert_eq!(response.text(), if status == 204 { "" } else { "sorry" });
        let fields = response.fields.iter().map(|(name, value)| (name.to_ascii_lowercase(), value.clone()));
        let own = |field: &(String, String)| field != &("connection".to_owned(), "close".to_owned());
        let fields: Vec<_> = fields.filter(own).collect();
        let expected: Vec<_> = expected.fields.into_iter().map(|(n, v)| (n.to_ascii_lowercase(), v)).collect();
        assert_eq!(fields, expected);
        assert_eq!(response.field("Connection"), Some("close"));
        assert_eq!((seen.end, seen.leftover), (End::Fin, vec![]));
    }
    assert_eq!(t.backend().count(), statuses.len() * 2);
    for index in 0..t.backend().count() {
        let seen = t.connection(index).seen();
        let (request, length) = Message::parse_head(&seen.raw).unwrap();
        assert_eq!((request.field("Upgrade"), seen.raw.len()), (Some("websocket"), length), "{request:?}");
        assert_eq!(seen.end, End::Fin);
    }
    t.no_rst();
}

/// A 101 that does not complete the handshake (RFC 6455, 4.1) is a 502 for the client, and FIN for the backend.
#[test]
fn a_wrong_101_is_a_502() {
    const ACCEPT: &str = "Sec-WebSocket-Accept";
    const CASES: [(&str, &str); 9] = [
        ("/wrong", "wrong Sec-WebSocket-Accept"),
        ("/no-accept", "without Sec-WebSocket-Accept"),
        ("/two-accepts", "more than one Sec-WebSocket-Accept"),
        ("/no-upgrade", "without Upgrade: websocket"),
        ("/no-connection", "without Connection: Upgrade"),
        ("/h2c", "without Upgrade: websocket"),
        ("/connection-close", "without Connection: Upgrade"),
        ("/bare", "101 without"),
        ("/old", "HTTP/1.0"),
    ];
    let t = Scene::new("")
        .backend(async |c| {
            let request = c.read_head().await;
            let good = Message::switching(&request);
            let accept = good.field(ACCEPT).unwrap().to_owned();
            let answer = match request.target() {
                "/wrong" => good.set(ACCEPT, "ICX+Yqv66kxgM0FcWaLWlFLwTAI="),
                "/no-accept" => good.without(ACCEPT),
                "/two-accepts" => good.header(ACCEPT, &accept),
                "/no-upgrade" => good.without("Upgrade"),
                "/no-connection" => good.without("Connection"),
                "/h2c" => good.set("Upgrade", "h2c"),
                "/connection-close" => good.set("Connection", "close"),
                "/bare" => Message::line("HTTP/1.1 101 Switching Protocols"),
                "/old" => {
                    let mut old = good;
                    "HTTP/1.0 101 Switching Protocols".clone_into(&mut old.line);
                    old
                }
                other => panic!("{other}"),
            };
            // It believes itself in a tunnel and talks.
            c.reply(answer.then(Frame::text("hello").bytes(None))).await;
            c.until_end().await;
        })
        .start();
    for (index, (target, reason)) in CASES.into_iter().enumerate() {
        let (response, seen) = t.client(async |c| {
            let canary = canary(c, index);
            let response = c.request(Message::websocket(target).then(canary)).await;
            (response, c.until_end().await)
        });
        assert_eq!(response.code(), 502, "{target}: {response:?}");
        assert!(response.text().contains(reason), "{target}: {response:?}");
        assert_eq!(response.field("Retry-After"), Some("1"), "{response:?}");
        assert_eq!((seen.end, seen.leftover), (End::Fin, vec![]), "{target}");
        let backend = t.connection(index).seen();
        let (_, length) = Message::parse_head(&backend.raw).unwrap();
        assert_eq!((backend.end, backend.raw.len()), (End::Fin, length), "{target}");
        assert_eq!(backend.write_failed, [], "{target}");
    }
    assert_eq!(t.backend().count(), CASES.len());
    t.no_rst();
}

/// What a client sends behind its handshake waits for the 101, and then arrives, whole and in order: the bytes in the same
/// write as the request, those in the next writes, 60 KiB in all, and first of all what the backend wrote behind its 101.
#[test]
fn nothing_is_tunnelled_before_the_101() {
    const FRAMES: usize = 60;
    let text = |index: usize| format!("{index:04}{}", "x".repeat(1020));
    // One that is there as a whole goes another way than one that is not.
    for in_pieces in [false, true] {
        let sent = Gate::new("all is sent");
        let all_sent = sent.clone();
        let script = async move |c: &mut Peer| {
            let request = c.read_head().await;
            all_sent.passed().await;
            // Whatever comes within this time came too early. Nothing depends on its length.
            let early = c.transcript_until_end(Duration::from_millis(100)).await;
            let (_, head) = Message::parse_head(&early.raw).unwrap();
            assert_eq!(early.raw.len(), head, "bytes before the 101");
            c.reply(Message::switching(&request).then(Frame::text("first").bytes(None))).await;
            for index in 0..FRAMES {
                assert_eq!(c.read_text().await, text(index));
            }
            c.send_text("all").await;
            backend::echo_on(c).await;
        };
        let t = Scene::new("").backend(script).start();
        let seen = t.client(async |c| {
            let frames: Vec<_> = (0..FRAMES).map(|index| c.frame_bytes(&Frame::text(&text(index)))).collect();
            let (first, rest) = frames.split_at(3);
            let handshake = Message::websocket("/").then(first.concat()).bytes();
            let (begin, end) = handshake.split_at(if in_pieces { 20 } else { 0 });
            if in_pieces {
                c.send_bytes(begin).await;
                c.sent_is_acked().await;
            }
            c.send_bytes(end).await;
            for frames in rest.chunks(19) {
                c.send_bytes(&frames.concat()).await;
            }
            sent.open();
            assert_eq!(c.read_response().await.code(), 101);
            assert_eq!(c.read_text().await, "first");
            assert_eq!(c.read_text().await, "all");
            c.send_close(1000, "").await;
            c.until_end().await
        });
        seen.assert_closed_with(1000);
        t.connection(0).seen().assert_closed_with(1000);
        t.no_rst();
    }
}

/// What client and backend agree on is theirs: offers and choices of extensions and subprotocols pass verbatim, and with
/// them RSV1.
#[test]
fn extensions_and_subprotocols_pass() {
    const OFFER: &str =
        "permessage-deflate; client_max_window_bits; server_max_window_bits=10, permessage-deflate, x-odd";
    const CHOICE: &str = "permessage-deflate; server_no_context_takeover; client_max_window_bits=\"12\"";
    let t = Scene::new("")
        .backend(async |c| {
            let request = c.read_head().await;
            assert_eq!(request.all("Sec-WebSocket-Extensions"), [OFFER]);
            assert_eq!(request.all("Sec-WebSocket-Protocol"), ["v12.stomp, v11.stomp", "mqtt"]);
            assert_eq!(request.all("Sec-WebSocket-Key"), [KEY]);
            let switching = Message::switching(&request)
                .header("Sec-WebSocket-Extensions", CHOICE)
                .header("Sec-WebSocket-Protocol", "v11.stomp")
                .header("Set-Cookie", "session=1");
            c.reply(switching).await;
            backend::echo_on(c).await;
        })
        .start();
    let seen = t.client(async |c| {
        let request = Message::websocket("/")
            .header("Sec-WebSocket-Extensions", OFFER)
            .header("Sec-WebSocket-Protocol", "v12.stomp, v11.stomp")
            .header("Sec-WebSocket-Protocol", "mqtt");
        let response = c.handshake_with(request).await;
        assert_eq!(response.all("Sec-WebSocket-Extensions"), [CHOICE]);
        assert_eq!(response.all("Sec-WebSocket-Protocol"), ["v11.stomp"]);
        assert_eq!(response.all("Set-Cookie"), ["session=1"]);
        c.send(&Frame::text("compressed").rsv(4)).await;
        assert_eq!(c.read_frame().await.rsv, 4);
        c.send_close(1000, "").await;
        c.until_end().await
    });
    seen.assert_closed_with(1000);
    assert_eq!(t.connection(0).seen().frames[0].rsv, 4);
    t.no_rst();
}

/// RSV1 without an extension that gives it a meaning breaks the protocol (RFC 6455, 5.2), on either side; also when it was
/// offered and not taken.
#[test]
fn rsv1_needs_an_extension() {
    let t = Scene::new("")
        .backend(async |c| {
            let request = c.accept_websocket().await;
            if request.target() == "/backend" {
                c.send(&Frame::text("compressed").rsv(4)).await;
            }
            backend::echo_on(c).await;
        })
        .start();
    for (index, target) in ["/client", "/backend"].into_iter().enumerate() {
        let seen = t.client(async |c| {
            c.handshake_with(Message::websocket(target).header("Sec-WebSocket-Extensions", "permessage-deflate")).await;
            if target == "/client" {
                c.send(&Frame::text("compressed").rsv(4)).await;
            }
            c.read_close().await;
            c.answer_close().await;
            c.until_end().await
        });
        let backend = t.connection(index).seen();
        let (to_client, to_backend) = if target == "/client" { (1002, 1001) } else { (1014, 1002) };
        seen.assert_closed_with(to_client);
        assert_eq!(seen.texts(), [""; 0], "{target}");
        assert_eq!(backend.closes(), [to_backend], "{target}");
        assert_eq!(backend.texts(), [""; 0], "{target}");
    }
    t.no_rst();
}

/// Backends that give no answer, each asked for a WebSocket and for a page: 502 or 504 with a reason and Retry-After, and
/// whoever is still there sees FIN.
#[test]
fn a_backend_without_an_answer() {
    const HUGE: usize = 40_000;
    const CASES: [(&str, u16, &str); 9] = [
        ("/silent", 504, "in time"),
        ("/closes", 502, "no valid answer"),
        ("/closes-unread", 502, "no valid answer"),
        ("/resets", 502, "no valid answer"),
        ("/garbage", 502, "no valid answer"),
        ("/half-a-head", 502, "no valid answer"),
        ("/huge-header", 502, "no valid answer"),
        ("/many-headers", 502, "no valid answer"),
        ("/no-status", 502, "no valid answer"),
    ];
    let timeouts = "upstream = { handshake_timeout = '300ms', response_timeout = '300ms' }";
    let t = Scene::new(timeouts)
        .backend(async |c| {
            let target = c.read_head().await.target().to_owned();
            match target.as_str() {
                "/silent" => {}
                "/closes" => c.fin().await,
                "/closes-unread" => return c.close(),
                "/resets" => return c.rst(),
                "/garbage" => _ = c.send_bytes(b"SSH-2.0-OpenSSH_9.9\r\n\0\0\0\r\n\r\n").await,
                "/half-a-head" => {
                    c.send_bytes(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: webso").await;
                    c.fin().await;
                }
                "/huge-header" => {
                    let huge = Message::status(200, "OK", "").header("X", &"x".repeat(HUGE));
                    c.reply(huge).await;
                }
                "/many-headers" => {
                    let many = (0..200).fold(Message::status(200, "OK", ""), |m, n| m.header(&format!("X-{n}"), "x"));
                    c.reply(many).await;
                }
                "/no-status" => _ = c.send_bytes(b"HTTP/1.1 abc\r\n\r\n").await,
                other => panic!("{other}"),
            }
            c.until_end().await;
        })
        .start();
    let ask = async |c: &mut Peer, first: usize| {
        let index = c.index() - first;
        let (target, _, _) = CASES[index / 2];
        let request = if index.is_multiple_of(2) { Message::websocket(target) } else { Message::get(target) };
        let begun = Instant::now();
        let response = c.request(request.set("X-Request-Id", target)).await;
        (index / 2, begun.elapsed(), response)
    };
    for (case, elapsed, response) in t.clients(CASES.len() * 2, async |c| ask(c, 0).await) {
        let (target, status, reason) = CASES[case];
        assert_eq!(response.code(), status, "{target}: {response:?}");
        assert!(response.text().contains(reason), "{target}: {response:?}");
        assert_eq!(response.field("Retry-After"), Some("1"), "{target}: {response:?}");
        assert!(status != 504 || elapsed >= Duration::from_millis(300), "{target}: after {elapsed:?}");
    }
    assert_eq!(t.backend().count(), CASES.len() * 2);
    for index in 0..t.backend().count() {
        let seen = t.connection(index).seen();
        let target = seen.head.as_ref().unwrap().target();
        let left = matches!(target, "/closes-unread" | "/resets");
        assert_eq!(seen.end, if left { End::Left } else { End::Fin }, "{target}");
        assert_eq!(seen.write_failed, [], "{target}");
    }
    t.no_rst();
}

/// A backend that nobody can reach: refused at once is a 502, no answer to the SYN is a 504 after `upstream.connect_timeout`.
#[test]
fn an_unreachable_backend() {
    let t = Scene::new("upstream.connect_timeout = '200ms'").start();
    let ask = |status: u16, reason: &str| {
        for request in [Message::websocket("/"), Message::get("/")] {
            let response = t.client(async |c| c.request(request).await);
            assert_eq!(response.code(), status, "{response:?}");
            assert!(response.text().contains(reason), "{response:?}");
            assert_eq!(response.field("Retry-After"), Some("1"));
            assert!(!response.text().contains("198.18."), "an inner address: {response:?}");
        }
    };
    if t.lab().cut(Side::Backend) {
        ask(504, "in time");
        t.lab().mend(Side::Backend);
    }
    t.backend().stop_listening();
    ask(502, "not reachable");
    assert_eq!(t.backend().count(), 0);
    t.no_rst();
}

/// Too large a header, or too many of them, are a 431 at once; a header that comes slowly is cut at `http.header_timeout`.
/// Neither reaches the backend, and what the client still sends meets no RST.
#[test]
fn headers_have_limits() {
    let t = Scene::new("http.header_timeout = '500ms'").start();
    let many = |count: usize| (0..count).fold(Message::websocket("/"), |m, n| m.header(&format!("X-{n}"), "x"));
    let too_much = [
        Message::websocket("/").header("X", &"x".repeat(33_000)),
        Message::websocket(&format!("/{}", "x".repeat(33_000))),
        many(96),
        many(10_000),
    ];
    for request in too_much {
        let (response, seen) = t.client(async |c| {
            let response = c.request(request).await;
            (response, c.until_end().await)
        });
        assert_eq!((response.code(), seen.end), (431, End::Fin), "{response:?}");
    }
    // As many as there may be, and as large.
    for request in [many(95), Message::websocket("/").header("X", &"x".repeat(32_000))] {
        t.client(async |c| _ = c.handshake_with(request).await);
    }
    for start in ["", "GET ", "GET / HTTP/1.1\r\nHost: tidegate.test\r\nX: "] {
        let begun = Instant::now();
        t.client(async |c| {
            c.send_bytes(start.as_bytes()).await;
            while c.transcript_until_end(Duration::from_millis(20)).await.end != End::Fin {
                assert!(begun.elapsed() < DEADLINE, "it goes on dripping: {:?}", c.seen());
                assert!(start.is_empty() || c.send_bytes(b"x").await);
            }
            assert!(begun.elapsed() >= Duration::from_millis(500), "cut early");
            for _ in 0..5 {
                assert!(c.send_bytes(b"x").await);
            }
            c.sent_is_acked().await;
        });
    }
    assert_eq!(t.backend().count(), 2);
    t.no_rst();
}

/// A client that leaves while the backend is dialled: the dial is given up, and the backend never hears of it.
#[test]
fn a_client_leaves_during_the_dial() {
    let t = Scene::new("").start();
    if !t.lab().cut(Side::Backend) {
        return;
    }
    for resets in [false, true] {
        t.client(async |c| {
            c.send_bytes(&Message::websocket("/").bytes()).await;
            // The SYN is out: it was read, and the dial has begun.
            let dialling = || t.lab().sockets(Side::Proxy).iter().any(|s| s.state == "SYN_SENT");
            let begun = Instant::now();
            while !dialling() {
                assert!(begun.elapsed() < DEADLINE, "nobody dials");
                tokio::task::yield_now().await;
            }
            if resets { c.rst() } else { c.fin().await }
        });
        t.settle();
    }
    t.lab().mend(Side::Backend);
    t.proxy().metrics_when("two abandoned handshakes", |m| abandoned(m) == 2);
    assert_eq!(t.backend().count(), 0);
    t.no_rst();
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a counter")]
fn abandoned(metrics: &Metrics) -> usize {
    metrics.get("tidegate_handshakes_total{result=\"abandoned\"}").round() as usize
}

/// A client that leaves after its request has reached the backend: a late 101 is answered by Close 1001 and FIN, any other
/// late answer is read to its end, and a late 101 that is wrong is closed in order as well.
#[test]
fn a_client_leaves_before_the_101() {
    for resets in [false, true] {
        let (arrived, gone) = (Gate::new("the request has arrived"), Gate::new("the client has left"));
        let (has_arrived, has_gone) = (arrived.clone(), gone.clone());
        let script = async move |c: &mut Peer| {
            let request = c.read_head().await;
            if c.index() == 2 {
                has_arrived.open();
            }
            has_gone.passed().await;
            match request.target() {
                "/101" => {
                    c.reply(Message::switching(&request).then(Frame::text("hello").bytes(None))).await;
                    c.send_text("and more").await;
                    c.read_close().await;
                    c.answer_close().await;
                }
                "/403" => _ = c.reply(Message::status(403, "Forbidden", &"no".repeat(100_000))).await,
                _ => _ = c.reply(Message::switching(&request).without("Upgrade")).await,
            }
            c.fin().await;
            c.until_end().await;
        };
        let t = Scene::new("").backend(script).start();
        let targets = ["/101", "/403", "/wrong"];
        t.clients(targets.len(), async |c| {
            c.send_bytes(&Message::websocket(targets[c.index()]).bytes()).await;
            arrived.passed().await;
            if resets { c.rst() } else { c.fin().await }
        });
        t.proxy().metrics_when("the abandoned handshakes", |m| abandoned(m) == targets.len());
        gone.open();
        for index in 0..targets.len() {
            let seen = t.connection(index).seen();
            assert_eq!((seen.end, &seen.write_failed[..]), (End::Fin, &[][..]), "{seen:?}");
            if seen.head.as_ref().unwrap().target() == "/101" {
                seen.assert_closed_with(1001);
            }
        }
        t.no_rst();
    }
}

/// A client that has sent a frame behind its handshake, and left: the backend gets frame and Close, whatever it says.
#[test]
fn a_client_leaves_its_first_frame_behind() {
    for resets in [false, true] {
        let (arrived, gone) = (Gate::new("the request has arrived"), Gate::new("the client has left"));
        let (has_arrived, has_gone) = (arrived.clone(), gone.clone());
        let script = async move |c: &mut Peer| {
            let request = c.read_head().await;
            has_arrived.open();
            has_gone.passed().await;
            c.reply(Message::switching(&request)).await;
            backend::echo_on(c).await;
        };
        let t = Scene::new("").backend(script).start();
        t.client(async |c| {
            let frame = c.frame_bytes(&Frame::text("a last word"));
            c.send_bytes(&Message::websocket("/").then(frame).bytes()).await;
            arrived.passed().await;
            if resets {
                c.rst();
                gone.open();
            } else {
                c.fin().await;
                gone.open();
                c.until_end().await;
            }
        });
        let seen = t.connection(0).seen();
        seen.assert_closed_with(1001);
        assert!(resets || seen.texts() == ["a last word"], "{seen:?}");
        t.no_rst();
    }
}

/// What tidegate makes of a request's header: one-hop fields go, `Connection` cannot be used to remove what tidegate adds,
/// who the client is comes from the socket, and everything else is as it was.
#[test]
fn what_the_backend_is_told() {
    let script = async |c: &mut Peer| {
        let request = c.read_head().await;
        let answer = if request.field("Upgrade").is_some() {
            Message::switching(&request)
        } else {
            Message::status(200, "OK", "")
        };
        c.reply(answer).await;
        backend::echo_on(c).await;
    };
    let tricky = |request: Message, connection: &str| {
        request
            .set("Host", "app.test:8080")
            .set("Connection", connection)
            .header("X-Forwarded-For", "203.0.113.7, 10.0.0.1")
            .header("X-Forwarded-For", "10.0.0.2")
            .header("X-Forwarded-Proto", "https")
            .header("X-Forwarded-Host", "public.test")
            .header("X-Forwarded-Port", "443")
            .header("X-Forwarded-Prefix", "/app")
            .header("X-Real-IP", "203.0.113.7")
            .header("Forwarded", "for=203.0.113.7")
            .header("X-Request-Id", "abc-123")
            .header("Keep-Alive", "timeout=5")
            .header("Proxy-Connection", "keep-alive")
            .header("Proxy-Authorization", "Basic c2VjcmV0")
            .header("TE", "gzip")
            .header("X-Hop", "of one hop")
            .header("Cookie", "a=b")
            .header("Cookie", "c=d")
            .header("Authorization", "Bearer token")
            .header("Origin", "https://public.test")
            .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    };
    let forwarded =
        ["X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded-Port", "X-Forwarded-Prefix"];
    for trusted in [false, true] {
        let networks = if trusted { "['198.18.0.0/15', '127.0.0.0/8']" } else { "['203.0.113.0/24']" };
        let t = Scene::new(&format!("http.trusted_proxies = {networks}")).backend(script).start();
        let requests = [
            tricky(Message::websocket("/a?b=c%20d"), "X-Forwarded-For, Upgrade, x-forwarded-host, X-Hop"),
            tricky(Message::websocket("/a?b=c%20d"), "keep-alive, Upgrade, X-Hop"),
            tricky(Message::get("/a?b=c%20d"), "X-Forwarded-For, close, x-forwarded-host, X-Hop, Host, Upgrade"),
            tricky(Message::get("/a?b=c%20d"), "close, X-Hop"),
            tricky(Message::get("/"), "close, X-Hop").without("X-Request-Id"),
        ];
        for (index, request) in requests.into_iter().enumerate() {
            let client = t.client(async |c| {
                c.request(request.clone()).await;
                c.local().ip().to_string()
            });
            let got = t.connection(index).seen().head.unwrap();
            let upgrade = index < 2;
            assert_eq!(got.line, request.line);
            assert_eq!(got.all("Host"), ["app.test:8080"]);
            // Nor can Connection be used to remove what a trusted proxy says.
            let expected = if trusted {
                [
                    Some(format!("203.0.113.7, 10.0.0.1, 10.0.0.2, {client}")),
                    Some("https".to_owned()),
                    Some("public.test".to_owned()),
                    Some("443".to_owned()),
                    Some("/app".to_owned()),
                ]
            } else {
                [Some(client.clone()), Some("http".to_owned()), Some("app.test:8080".to_owned()), None, None]
            };
            for (name, expected) in forwarded.into_iter().zip(expected) {
                assert_eq!(got.all(name), expected.iter().map(String::as_str).collect::<Vec<_>>(), "{name} of {got:?}");
            }
            let spoofable = [("X-Real-IP", "203.0.113.7"), ("Forwarded", "for=203.0.113.7")];
            for (name, value) in spoofable {
                assert_eq!(got.field(name), trusted.then_some(value), "{name} of {got:?}");
            }
            let id = got.field("X-Request-Id").unwrap();
            assert!(if index == 4 { id.len() == 16 } else { id == "abc-123" }, "{got:?}");
            for one_hop in ["Keep-Alive", "Proxy-Connection", "Proxy-Authorization", "TE", "X-Hop"] {
                assert_eq!(got.field(one_hop), None, "{got:?}");
            }
            for kept in ["Cookie", "Authorization", "Origin", "traceparent"] {
                assert_eq!(got.all(kept), request.all(kept), "{got:?}");
            }
            let connection = if upgrade { "Upgrade" } else { "close" };
            assert_eq!(got.all("Connection"), [connection], "{got:?}");
            assert_eq!(got.field("Upgrade"), upgrade.then_some("websocket"), "{got:?}");
        }
        t.no_rst();
    }
}

/// `Connection` may list as much as there is room for in a header: empty elements from a client, who may name 32 fields, and any number of options from a backend.
/// What is named is taken away in both directions, and all else goes on: in a handshake that is there at once, in one that is too long for that, in a refusal,
/// and in a plain request.
#[test]
fn connection_may_list_much() {
    let fields = |message: Message| (1..80).fold(message.header("X-Hop", "a"), |m, n| m.header(&format!("X-{n}"), "a"));
    let options = |count| (0..count).map(|n| format!("o{n},")).collect::<Vec<_>>().concat();
    let script = async move |c: &mut Peer| {
        let request = c.read_head().await;
        let answer = match request.target() {
            "/refused" => Message::status(403, "Forbidden", ""),
            "/plain" => Message::status(200, "OK", ""),
            _ => Message::switching(&request),
        };
        let connection = format!("{}x-HOP,Upgrade,X-79", options(4_000));
        c.reply(fields(answer.set("Connection", &connection))).await;
        backend::echo_on(c).await;
    };
    let t = Scene::new("").backend(script).start();
    let commas = ",".repeat(30_000);
    let named = options(30);
    let requests = [
        ("/", format!("{named}Upgrade,X-HOP"), 101),
        ("/", format!("x-hop{commas}Upgrade"), 101),
        ("/", format!("{named}Upgrade,X-HOP,one"), 400),
        ("/refused", format!("x-hop{commas}Upgrade"), 403),
        ("/refused", "Upgrade,x-hop".to_owned(), 403),
        ("/plain", format!("x-hop{commas}close"), 200),
        ("/plain", format!("{named}x-hop,close,one"), 400),
    ];
    let mut index = 0;
    for (target, connection, status) in requests {
        let request = if target == "/plain" { Message::get(target) } else { Message::websocket(target) };
        // Of a handshake that is there at once there are at most 64 fields.
        let is_long = connection.len() > 1_000 || target == "/plain";
        let request = if is_long { fields(request) } else { request.header("X-Hop", "a").header("X-1", "a") };
        let response = t.client(async |c| c.request(request.set("Connection", &connection)).await);
        assert_eq!(response.code(), status, "{response:?}");
        if status == 400 {
            continue;
        }
        let got = t.connection(index).seen().head.unwrap();
        index += 1;
        let last = if is_long { 79 } else { 1 };
        for (message, last) in [(&got, last), (&response, 78)] {
            assert_eq!((message.field("X-Hop"), message.field("X-1")), (None, Some("a")), "{message:?}");
            assert_eq!(message.field(&format!("X-{last}")), Some("a"), "{message:?}");
            assert!(message.field("Connection").is_none_or(|connection| connection.len() < 20), "{message:?}");
        }
        assert_eq!(response.field("X-79"), None, "{response:?}");
    }
    assert_eq!(t.backend().count(), index);
    t.no_rst();
}

/// Cross-site WebSocket hijacking: a page of somebody else opens a WebSocket with the cookies of the user. Where origins are listed these
/// alone may, byte by byte; the backend never hears of the others. Clients that are no browsers have none, and plain requests have
/// rules of their own (CORS).
#[test]
fn pages_need_leave() {
    let t = Scene::new("http.allowed_origins = ['https://app.example', 'https://app.example:8443']").start();
    let with = |origins: &[&str]| {
        origins.iter().fold(Message::websocket("/"), |request, origin| request.header("Origin", origin))
    };
    for stranger in [
        &["https://evil.example"][..],
        &["null"],
        &[""],
        &["https://app.example.evil.example"],
        &["https://evilapp.example"],
        &["https://app.example@evil.example"],
        &["https://app.example/"],
        &["https://app.example:443"],
        &["http://app.example"],
        &["https://APP.example"],
        &["https://app.example, https://app.example"],
        &["https://app.example https://evil.example"],
        &["https://app.example", "https://evil.example"],
        &["https://app.example", "https://app.example"],
        &["*"],
        &["\u{1b}[31mhttps://app.example"],
    ] {
        t.client(async |c| {
            let response = c.request(with(stranger)).await;
            assert!([400, 403].contains(&response.code()), "{stranger:?}: {response:?}");
            c.until_end().await;
        });
    }
    for friend in [&["https://app.example"][..], &["https://app.example:8443"], &[]] {
        t.client(async |c| {
            c.handshake_with(with(friend)).await;
            c.send_close(1000, "").await;
            c.until_end().await.assert_closed_with(1000);
        });
    }
    t.client(async |c| {
        let foreign = Message::get("/").header("Origin", "https://evil.example").header("Connection", "close");
        // Of a backend that knows nothing but WebSockets.
        assert_eq!(c.request(foreign).await.code(), 502);
    });
    assert_eq!(t.backend().count(), 4, "the backend heard of strangers");
    let metrics = t.proxy().metrics();
    assert_eq!(metrics.count("tidegate_handshakes_total{result=\"origin\"}"), 15);
    t.proxy().log_where("who was refused", |line| line["origin"] == "https://evil.example");
    t.no_rst();
}

/// A target with an authority in it: the path goes to the backend, and Host is that authority; with credentials it is refused.
#[test]
fn a_target_in_absolute_form() {
    let t = Scene::new("").start();
    t.client(async |c| {
        let mut request = Message::websocket("/");
        "GET http://other.test:81/path?query HTTP/1.1".clone_into(&mut request.line);
        c.handshake_with(request).await;
    });
    let got = t.connection(0).seen().head.unwrap();
    assert_eq!((got.target(), got.all("Host")), ("/path?query", vec!["other.test:81"]));
    let refused = t.client(async |c| {
        let mut request = Message::websocket("/");
        "GET http://user:password@other.test/ HTTP/1.1".clone_into(&mut request.line);
        c.request(request).await
    });
    assert_eq!(refused.code(), 400, "{refused:?}");
    assert_eq!(t.backend().count(), 1);
    t.no_rst();
}

/// Paths are logged at a length of at most 256 bytes, also when the cut is inside a character; lines that end in a bare LF,
/// which RFC 9112 (2.2) lets pass, reach the backend as they should be.
#[test]
fn odd_but_valid_handshakes() {
    let t = Scene::new("").start();
    for ascii in 250..258 {
        let target = format!("/{}äöü€", "x".repeat(ascii - 1));
        let seen = t.client(async |c| {
            c.handshake(&target).await;
            c.send_close(1000, "").await;
            c.until_end().await
        });
        seen.assert_closed_with(1000);
    }
    t.client(async |c| {
        let bytes = Message::websocket("/lf").header("Cookie", "a=b").bytes();
        c.send_bytes(String::from_utf8(bytes).unwrap().replace("\r\n", "\n").as_bytes()).await;
        assert_eq!(c.read_response().await.code(), 101);
    });
    let seen = t.connection(t.backend().count() - 1).seen();
    let (head, _) = Message::parse_head(&seen.raw).unwrap();
    assert_eq!((head.target(), head.field("Cookie")), ("/lf", Some("a=b")));
    let end = seen.raw.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    // Behind it are masks, which are random.
    let bare = seen.raw[..end].windows(2).any(|two| two[1] == b'\n' && two[0] != b'\r');
    assert!(!bare, "a bare LF went on");
    t.no_rst();
}

/// With `upstream.max_waiting` handshakes waiting for the backend, one more gets 503 with Retry-After and FIN, and the waiting
/// ones get their answers. What that client sent behind its handshake is nobody's. Plain requests are counted apart, so that
/// neither kind can keep the other out.
#[test]
fn one_handshake_too_many() {
    for is_upgrade in [true, false] {
        let (arrived, go) = (Gate::new("both have arrived"), Gate::new("answer"));
        let (have_arrived, answer) = (arrived.clone(), go.clone());
        let script = async move |c: &mut Peer| {
            let request = c.read_head().await;
            if request.target() != "/wait" {
                c.reply(Message::status(200, "OK", "not counted with them")).await;
                c.until_end().await;
                return;
            }
            if c.index() == 1 {
                have_arrived.open();
            }
            answer.passed().await;
            if is_upgrade {
                c.reply(Message::switching(&request)).await;
                backend::echo_on(c).await;
            } else {
                c.reply(Message::status(200, "OK", "at last")).await;
                c.until_end().await;
            }
        };
        let t = Scene::new("http = { retry_after = '7s' }\nupstream = { max_waiting = 2 }").backend(script).start();
        let of_kind = |path: &str, is_upgrade| if is_upgrade { Message::websocket(path) } else { Message::get(path) };
        let expected = if is_upgrade { 101 } else { 200 };
        let wait = async move |c: &mut Peer| {
            let response = c.request(of_kind("/wait", is_upgrade)).await;
            assert_eq!(response.code(), expected);
        };
        let waiting: Vec<_> = (0..2).map(|_| t.start_client(wait)).collect();
        arrived.pass();
        let (response, seen) = t.client(async |c| {
            let canary = if is_upgrade { canary(c, 0) } else { vec![] };
            let response = c.request(of_kind("/wait", is_upgrade).then(canary)).await;
            c.fin().await;
            (response, c.until_end().await)
        });
        assert_eq!((response.code(), response.field("Retry-After")), (503, Some("7")), "{response:?}");
        assert_eq!((seen.end, seen.leftover), (End::Fin, vec![]), "{response:?}");
        assert_eq!(t.backend().count(), 2);
        let other = t.client(async |c| c.request(of_kind("/now", !is_upgrade)).await);
        assert_eq!(other.code(), 200, "{other:?}");
        go.open();
        for client in waiting {
            client.join();
        }
        t.no_rst();
    }
}

/// Clients that were shed and keep their connections open hold nobody up: neither others that ask for the same, nor handshakes.
#[test]
fn who_was_shed_keeps_nobody_out() {
    // Twice what a worker works on at once.
    const SHED: usize = 130;
    static TOLD: AtomicUsize = AtomicUsize::new(0);
    let (arrived, told, go) =
        (Gate::new("the first has arrived"), Gate::new("all are told"), Gate::new("all may leave"));
    let (has_arrived, answer) = (arrived.clone(), go.clone());
    let script = async move |c: &mut Peer| {
        let request = c.read_head().await;
        if request.target() == "/wait" {
            has_arrived.open();
            answer.passed().await;
            c.reply(Message::status(200, "OK", "at last")).await;
            c.until_end().await;
        } else {
            c.reply(Message::switching(&request)).await;
            backend::echo_on(c).await;
        }
    };
    let t = Scene::new("upstream.max_waiting = 1\nlisten.workers = 1").backend(script).start();
    let first = t.start_client(async |c| assert_eq!(c.request(Message::get("/wait")).await.code(), 200));
    arrived.pass();
    let mut shed = Vec::new();
    for _ in 0..SHED {
        let (told, go) = (told.clone(), go.clone());
        shed.push(t.start_client(async move |c| {
            assert_eq!(c.request(Message::get("/")).await.code(), 503);
            if TOLD.fetch_add(1, Ordering::SeqCst) + 1 == SHED {
                told.open();
            }
            go.passed().await;
        }));
    }
    told.pass();
    t.client(async |c| assert_eq!(c.request(Message::websocket("/")).await.code(), 101));
    go.open();
    for client in shed.into_iter().chain([first]) {
        client.join();
    }
    t.no_rst();
}

/// With `upstream.max_pending` = 2 the backend never has more than two handshakes to answer, and those who wait get their
/// turn in the order in which they came.
#[test]
fn handshakes_take_turns() {
    static PENDING: AtomicUsize = AtomicUsize::new(0);
    let go = Gate::new("answer");
    let answer = go.clone();
    let script = async move |c: &mut Peer| {
        let request = c.read_head().await;
        let pending = PENDING.fetch_add(1, Ordering::SeqCst) + 1;
        assert!(pending <= 2, "{pending} at once");
        answer.passed().await;
        // Long enough for a third one to come, if there is one.
        tokio::time::sleep(Duration::from_millis(20)).await;
        PENDING.fetch_sub(1, Ordering::SeqCst);
        c.reply(Message::switching(&request)).await;
        backend::echo_on(c).await;
    };
    // One worker: with several the order of arrival is that of the kernel's dice.
    let t = Scene::new("upstream.max_pending = 2\nlisten.workers = 1").backend(script).start();
    let mut clients = Vec::new();
    for index in 0..10 {
        let sent = Gate::new("the request is sent");
        let is_sent = sent.clone();
        clients.push(t.start_client(async move |c| {
            c.send_bytes(&Message::websocket(&format!("/{index}")).bytes()).await;
            c.sent_is_acked().await;
            is_sent.open();
            assert_eq!(c.read_response().await.code(), 101);
            c.send_close(1000, "").await;
            c.until_end().await
        }));
        sent.pass();
    }
    t.connection(1);
    // All ten wait, and the backend has been asked for two.
    t.proxy().metrics_when("ten clients", |m| m.sum("tidegate_client_connections") > 9.5);
    assert_eq!(t.backend().count(), 2);
    go.open();
    for client in clients {
        client.join().assert_closed_with(1000);
    }
    let order: Vec<_> = (0..10).map(|index| t.connection(index).seen().head.unwrap().target().to_owned()).collect();
    let mut pairs = order.clone();
    // Two at a time: the order within a pair is that of the backend's accept queue.
    pairs.chunks_mut(2).for_each(<[String]>::sort);
    assert_eq!(pairs, (0..10).map(|index| format!("/{index}")).collect::<Vec<_>>(), "{order:?}");
    t.no_rst();
}

/// A WebSocket handshake waits for its turn no longer than `upstream.queue_timeout`, and then the backend has not heard of it;
/// one that has its turn waits for the answer no longer than `upstream.handshake_timeout`.
#[test]
fn a_turn_may_come_too_late() {
    let settings = "upstream = { max_pending = 1, queue_timeout = '300ms', handshake_timeout = '900ms' }";
    let t = Scene::new(settings).backend(backend::silent).start();
    let begun = Instant::now();
    let responses = t.clients(20, async |c| (c.request(Message::websocket("/")).await, begun.elapsed()));
    let mut codes: Vec<_> = responses.iter().map(|(response, _)| response.code()).collect();
    codes.sort_unstable();
    assert_eq!(codes, [[503; 19].as_slice(), &[504]].concat());
    for (response, elapsed) in &responses {
        assert_eq!(response.field("Retry-After"), Some("1"), "{response:?}");
        let least = if response.code() == 503 { 300 } else { 900 };
        assert!(elapsed.as_millis() >= least, "{response:?} after {elapsed:?}");
    }
    assert_eq!(t.backend().count(), 1);
    assert_eq!(t.connection(0).seen().end, End::Fin);
    t.proxy().metrics_when("19 refused", |m| {
        let refused = m.sum_with("tidegate_refused_total", "reason=\"queue_timeout\"");
        (refused - 19.0).abs() < 0.5
    });
    t.no_rst();
}

/// A client that leaves while it waits for its turn is no handshake for the backend, and keeps nobody else's turn.
#[test]
fn a_client_leaves_the_queue() {
    let go = Gate::new("answer");
    let answer = go.clone();
    let script = async move |c: &mut Peer| {
        let request = c.read_head().await;
        answer.passed().await;
        c.reply(Message::switching(&request)).await;
        backend::echo_on(c).await;
    };
    let t = Scene::new("upstream.max_pending = 1").backend(script).start();
    let first = t.start_client(async |c| _ = c.handshake("/first").await);
    t.connection(0);
    for resets in [false, true] {
        t.client(async |c| {
            c.send_bytes(&Message::websocket("/left").bytes()).await;
            c.sent_is_acked().await;
            if resets { c.rst() } else { c.fin().await }
        });
    }
    t.proxy().metrics_when("two clients that left", |m| m.sum("tidegate_client_connections") < 1.5);
    let last = t.start_client(async |c| _ = c.handshake("/last").await);
    go.open();
    first.join();
    last.join();
    let targets: Vec<_> =
        (0..t.backend().count()).map(|n| t.connection(n).seen().head.unwrap().target().to_owned()).collect();
    assert_eq!(targets, ["/first", "/last"]);
    t.no_rst();
}

/// A response that goes on for long after the handshake was refused reaches the client as it comes, and the client may leave
/// in its middle: the backend's FIN is waited for.
#[test]
fn a_long_refusal() {
    let (read, left) = (Gate::new("the first part was read"), Gate::new("the client left"));
    let (is_read, has_left) = (read.clone(), left.clone());
    let script = async move |c: &mut Peer| {
        c.read_head().await;
        let head = Message::line("HTTP/1.1 403 Forbidden").header("Transfer-Encoding", "chunked");
        c.reply(head.then("5\r\nfirst\r\n")).await;
        is_read.passed().await;
        c.send_bytes(b"6\r\nsecond\r\n").await;
        has_left.passed().await;
        for _ in 0..20 {
            assert!(c.send_bytes(b"5\r\nafter\r\n").await);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        c.send_bytes(b"0\r\n\r\n").await;
        c.transcript_until_end(LIMIT).await;
    };
    let t = Scene::new("").backend(script).start();
    t.client(async |c| {
        c.send_bytes(&Message::websocket("/").bytes()).await;
        let head = c.read_head().await;
        assert_eq!(head.code(), 403);
        let length = c.seen().raw.len();
        read.open();
        c.read_bytes(length + 1).await;
        c.rst();
        left.open();
    });
    let seen = t.connection(0).seen();
    assert_eq!((seen.end, &seen.write_failed[..]), (End::Fin, &[][..]), "{seen:?}");
    assert_eq!(seen.of(CLOSE).count(), 0);
    t.no_rst();
}
