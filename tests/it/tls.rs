//! TLS to the backend: whom tidegate believes, what is said when it does not, and that nothing is lost on the way.
//!
//! How sessions end over TLS is in `close_table.rs`, row by row.

use crate::harness::{
    Gate, LIMIT, Message, Peer, Scene, backend, front,
    tls::{Authority, Manners, NAME, settings},
    ws::Frame,
};
use std::fs;
use std::time::Duration;
use tokio_rustls::rustls::{
    SupportedProtocolVersion,
    version::{TLS12, TLS13},
};

const ONLY_12: &[&SupportedProtocolVersion] = &[&TLS12];
const ONLY_13: &[&SupportedProtocolVersion] = &[&TLS13];

/// A session that goes as it should.
fn visit(t: &Scene) {
    t.client(async |c| {
        c.handshake("/").await;
        c.send_text("hello").await;
        assert_eq!(c.read_text().await, "hello");
        c.send_close(1000, "").await;
        c.until_end().await.assert_closed_with(1000);
    });
}

/// For connections on which nothing may be asked.
async fn echo_if_asked(c: &mut Peer) {
    if c.is_asked().await {
        backend::echo(c).await;
    }
}

/// What a client is told who gets no session, and what the log says about it.
#[track_caller]
fn refusal(t: &Scene) -> (u16, String) {
    let code = t.client(async |c| c.request(Message::websocket("/")).await.code());
    let line = t.proxy().log_where("a request that failed", |line| line["message"] == "request failed");
    (code, line["error"].as_str().expect("an error").to_owned())
}

/// A backend that can't be believed is not spoken to: its own front hears why, the client gets 502, and the log says what is wrong
/// and what to do.
#[test]
fn certificates_are_verified() {
    let authority = Authority::new();
    for (identity, words, fix) in [
        (Authority::new().sign(NAME), "UnknownIssuer", "upstream.tls_ca"),
        (authority.sign("other.test"), "not valid for name", "upstream.tls_server_name"),
        (authority.sign_until(NAME, 2020), "expired", "renew the backend's certificate"),
    ] {
        let front = Manners { identity: Some(identity), ..Manners::default() };
        let t = Scene::new(&settings(&authority)).tls(front).start();
        let (code, error) = refusal(&t);
        assert_eq!(code, 502);
        assert!(error.contains(words) && error.contains(fix), "{words}: {error}");
        let seen = t.tls().seen_when("a handshake that failed", |seen| !seen.failed.is_empty());
        assert!(seen.failed[0].contains("alert") && seen.protocols.is_empty(), "{words}: {seen:?}");
        assert_eq!(t.backend().count(), 0, "{words}");
        t.no_rst();
    }
}

/// Where a backend wants to know who asks, it is told; and when nobody can say so, the log says what it lacks. TLS 1.3 looks at the
/// client's certificate only after the client's part of the handshake is over.
#[test]
fn a_client_certificate_is_shown() {
    for versions in [ONLY_12, ONLY_13] {
        let authority = Authority::new();
        let own = authority.sign("tidegate.test");
        let settings = format!(
            "{}upstream.tls_client_certificate = '{}'\nupstream.tls_client_key = '{}'\n",
            settings(&authority),
            own.certificate_file.display(),
            own.key_file.display()
        );
        let t = Scene::new(&settings).tls(Manners { versions, ..Manners::asking(authority) }).start();
        visit(&t);
        t.no_rst();

        let front = Manners { versions, ..Manners::asking(Authority::new()) };
        let t = Scene::new("").tls(front).start();
        let (code, error) = refusal(&t);
        assert_eq!(code, 502);
        assert!(error.contains("upstream.tls_client_certificate"), "{error}");
        assert_eq!(t.backend().count(), 0);
        t.no_rst();
    }
}

/// A backend that speaks no TLS, or hangs up, is named as such; one that says nothing is waited for no longer than
/// `connect_timeout`. In each case the connection ends in order.
#[test]
fn backends_without_tls() {
    let authority = Authority::new();
    let settings = format!("{}upstream.connect_timeout = '300ms'", settings(&authority));
    let http = async |c: &mut Peer| {
        c.is_asked().await;
        c.reply(Message::status(400, "Bad Request", "what?")).await;
        c.fin().await;
        c.until_end().await;
    };
    let t = Scene::new(&settings).backend(http).start();
    let (code, error) = refusal(&t);
    assert_eq!(code, 502);
    assert!(error.contains("does it speak TLS there?"), "{error}");
    t.no_rst();

    let hangs_up = async |c: &mut Peer| {
        c.is_asked().await;
        c.fin().await;
        c.until_end().await;
    };
    let t = Scene::new(&settings).backend(hangs_up).start();
    let (code, error) = refusal(&t);
    assert_eq!(code, 502);
    assert!(error.contains("closed the connection in the handshake"), "{error}");
    t.no_rst();

    let t = Scene::new(&settings).backend(async |c: &mut Peer| _ = c.transcript_until_end(LIMIT).await).start();
    let (code, error) = refusal(&t);
    assert_eq!(code, 504);
    assert!(error.contains("TLS handshake in time"), "{error}");
    t.no_rst();
}

/// What is large, and read late, arrives whole in both directions, and what waits is bounded: rustls holds a record, the relay what
/// it also holds without TLS.
#[test]
fn large_messages_and_slow_readers() {
    const SIZE: usize = 8 << 20;
    let payload: Vec<u8> = (0..SIZE).map(|at| u8::try_from(at % 251).unwrap()).collect();
    let expected = payload.clone();
    let script = async move |c: &mut Peer| {
        c.accept_websocket().await;
        // By then all that lies between is full.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let frame = c.read_frame().await;
        assert!(frame.payload == expected, "not what was sent");
        let answer = c.frame_bytes(&Frame::binary(&expected));
        assert!(c.pump(&answer).await);
        backend::echo_on(c).await;
    };
    let t = Scene::new("").tls(Manners::default()).backend(script).backend_recv_buffer(32 << 10).start();
    t.client(async |c| {
        c.handshake("/").await;
        let frame = c.frame_bytes(&Frame::binary(&payload));
        assert!(c.pump(&frame).await);
        let answer = c.read_frame().await;
        assert!(answer.payload == payload, "not what was sent");
        c.send_close(1000, "").await;
        c.until_end().await.assert_closed_with(1000);
    });
    t.no_rst();
}

/// A frame in the same record as the 101 is not forgotten in a buffer, though nothing comes behind it.
#[test]
fn early_data_is_in_the_record_of_the_101() {
    let t = Scene::new("").tls(Manners::default()).backend(backend::frame_with_101).start();
    t.client(async |c| {
        c.handshake("/").await;
        assert_eq!(c.read_text().await, "first");
        c.send_text("second").await;
        assert_eq!(c.read_text().await, "second");
        c.send_close(1000, "").await;
        c.until_end().await.assert_closed_with(1000);
    });
    let seen = t.tls().seen_when("its end", |seen| seen.notified == 1);
    assert_eq!(seen.protocols, [Some("http/1.1".to_owned())]);
    assert_eq!(seen.names, [Some(NAME.to_owned())]);
    t.no_rst();
}

/// A plain request, its response, and a response that ends with the connection, which is an end also without `close_notify`.
#[test]
fn plain_requests() {
    for notifies in [true, false] {
        let script = async |c: &mut Peer| {
            let request = c.read_head().await;
            assert_eq!(request.line, "GET /path HTTP/1.1");
            c.reply(Message::line("HTTP/1.1 200 OK").header("Connection", "close").then(b"until the end")).await;
            c.fin().await;
            c.until_end().await;
        };
        let t = Scene::new("").tls(Manners { notifies, ..Manners::default() }).backend(script).start();
        let response = t.client(async |c| c.request(Message::get("/path")).await);
        assert_eq!((response.code(), response.body.as_slice()), (200, b"until the end".as_slice()));
        t.tls().seen_when("its end", |seen| seen.notified == 1);
        t.no_rst();
    }
}

/// A backend's FIN without `close_notify` is what it is without TLS: the client gets 1012, and the backend `close_notify` and FIN.
#[test]
fn a_fin_without_close_notify_is_a_fin() {
    let front = Manners { notifies: false, ..Manners::default() };
    let t = Scene::new("").tls(front).backend(backend::fin_without_close).start();
    t.client(async |c| {
        c.handshake("/").await;
        assert_eq!(c.read_close().await, 1012);
        c.answer_close().await;
        c.until_end().await
    });
    let seen = t.tls().seen_when("its end", |seen| seen.notified == 1);
    assert_eq!((seen.truncated, seen.reset), (0, 0), "{seen:?}");
    t.no_rst();
}

/// A backend that takes nothing is given up after `write_timeout`. When it reads again, within the last wait, it finds the record
/// that was under way, `close_notify`, and the FIN: in this order, though there was no room for any of them.
#[test]
fn close_notify_waits_for_room() {
    let gate = Gate::new("the backend reads");
    let open = gate.clone();
    let script = async move |c: &mut Peer| {
        c.accept_websocket().await;
        gate.passed().await;
        c.transcript_until_end(LIMIT).await;
    };
    let settings = "websocket.write_timeout = '300ms'\nclose = { delay = '0ms', linger = '20s', linger_max = '20s' }";
    let t = Scene::new(settings).tls(Manners::default()).backend(script).backend_recv_buffer(32 << 10).start();
    t.client(async |c| {
        c.handshake("/").await;
        let frame = c.frame_bytes(&Frame::binary(vec![7; 8 << 20]));
        c.pump(&frame).await;
        assert_eq!(c.read_close().await, 1012);
        c.answer_close().await;
        c.until_end().await
    });
    t.proxy().metrics_when("a socket in its last wait", |m| m.sum("tidegate_lingering_sockets") > 0.5);
    assert_eq!(t.tls().seen().notified, 0);
    open.open();
    let seen = t.tls().seen_when("close_notify", |seen| seen.notified + seen.truncated == 1);
    assert_eq!((seen.notified, seen.reset), (1, 0), "{seen:?}");
    t.no_rst();
}

/// ALPN: h2 is asked for where streams are to share a connection, and what a backend agrees on is believed. One that does not gets
/// each WebSocket over a connection of its own, and the log says so once.
#[test]
fn what_is_agreed_on_is_spoken() {
    let shared = "listen.workers = 1\npool = { mode = 'multiplexed', idle_timeout = '0s' }";
    let t = Scene::new(shared).front(front::Manners::default()).tls(Manners::default()).start();
    visit(&t);
    let (line, _) = t.front().seen().request.expect("a stream");
    assert_eq!(line, "CONNECT https://tidegate.test/");
    let seen = t.tls().seen_when("its end", |seen| seen.notified == 1);
    assert_eq!(seen.protocols, [Some("h2".to_owned())]);
    t.no_rst();

    for (protocols, agreed) in [(vec![b"http/1.1".to_vec()], Some("http/1.1".to_owned())), (Vec::new(), None)] {
        let front = Manners { protocols, ..Manners::default() };
        let t = Scene::new(shared).tls(front).backend(echo_if_asked).start();
        for _ in 0..2 {
            visit(&t);
        }
        let seen = t.tls().seen_when("their ends", |seen| seen.notified == 2);
        assert_eq!(seen.protocols, vec![agreed; 2], "a connection for each");
        let said = |line: &serde_json::Value| line["why"] == "it agrees on no HTTP/2 (ALPN)";
        t.proxy().log_where("the fallback", said);
        assert_eq!(t.proxy().log().into_iter().filter(said).count(), 1);
        t.no_rst();
    }
}

/// Files are read again with a reload, also when nothing else has changed: a new root is believed, and a broken file changes
/// nothing.
#[test]
fn files_are_read_again() {
    let (old, new) = (Authority::new(), Authority::new());
    let front = Manners { identity: Some(new.sign(NAME)), ..Manners::default() };
    let t = Scene::new(&settings(&old)).tls(front).start();
    assert_eq!(refusal(&t).0, 502);
    let reload = || {
        let request = Message::line("POST /reload HTTP/1.1").header("Host", "localhost").header("Content-Length", "0");
        t.proxy().admin(&request).expect("an answer")
    };
    fs::copy(new.file(), old.file()).unwrap();
    assert_eq!(reload().code(), 200);
    visit(&t);
    fs::write(old.file(), "-----BEGIN CERTIFICATE-----\nno\n").unwrap();
    let response = reload();
    assert_eq!(response.code(), 422);
    let body = String::from_utf8_lossy(&response.body).into_owned();
    assert!(body.contains("upstream.tls_ca"), "{body}");
    visit(&t);
    t.no_rst();
}

/// `/readyz` asks for the whole of a connection: a backend that can't be believed is not ready.
#[test]
fn readiness_includes_tls() {
    let t = Scene::new("").tls(Manners::default()).backend(echo_if_asked).start();
    assert_eq!(t.proxy().get("/readyz").code(), 200);
    t.tls().seen_when("its end", |seen| seen.notified == 1);
    let authority = Authority::new();
    let t = Scene::new(&settings(&authority)).tls(Manners::default()).start();
    let response = t.proxy().get("/readyz");
    assert_eq!(response.code(), 503);
    let body = String::from_utf8_lossy(&response.body).into_owned();
    assert!(body.contains("UnknownIssuer"), "{body}");
}

/// A backend's `close_notify` that is long in coming behind its Close is waited for: once its socket was closed, it would be reset.
#[test]
fn a_late_close_notify_is_no_reason_for_a_rst() {
    let script = async |c: &mut Peer| {
        c.accept_websocket().await;
        c.read_close().await;
        c.answer_close().await;
        // Longer than it takes to see that the backend has acknowledged everything.
        tokio::time::sleep(Duration::from_millis(500)).await;
        c.fin().await;
        c.until_end().await;
    };
    let t = Scene::new("close = { handshake_timeout = '100ms', linger = '20s', linger_max = '20s' }")
        .tls(Manners::default())
        .backend(script)
        .start();
    t.client(async |c| {
        c.handshake("/").await;
        c.send_close(1000, "").await;
        c.until_end().await.assert_closed_with(1000);
    });
    t.tls().seen_when("its end", |seen| seen.notified == 1);
    let fin = "tidegate_lingered_total{leg=\"backend\",how=\"fin\"}";
    t.proxy().metrics_when("the backend's FIN", |metrics| metrics.all().get(fin).is_some_and(|count| *count > 0.5));
    t.no_rst();
}

/// Where HTTP/2 was wanted and HTTP/1.1 is agreed on, no connection is dialled in vain: there are as many as sessions, also when several
/// waited for the first.
#[test]
fn what_agreed_on_http_1_is_used_for_that() {
    let front = Manners { protocols: vec![b"http/1.1".to_vec()], ..Manners::default() };
    let t = Scene::new("listen.workers = 1\npool.mode = 'multiplexed'").tls(front).backend(echo_if_asked).start();
    t.clients(5, async |c| {
        c.handshake("/").await;
        c.send_text("hello").await;
        assert_eq!(c.read_text().await, "hello");
        c.send_close(1000, "").await;
        c.until_end().await.assert_closed_with(1000);
    });
    let seen = t.tls().seen_when("their ends", |seen| seen.notified == 5);
    assert_eq!((seen.protocols.len(), t.backend().count()), (5, 5));
    assert!((0..5).all(|index| !t.connection(index).seen().raw.is_empty()));
    t.no_rst();
}
