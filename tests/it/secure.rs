//! TLS from clients: who tidegate is toward them, what becomes of those that do not get as far as a request, and what stays as it is.
//!
//! How sessions end over TLS is in `close_table.rs`, row by row.

use crate::harness::{
    Dial, End, Frame, Gate, Message, Peer, Scene, Side, backend, block,
    crowd::is_strict,
    tls::{Authority, CLIENTS_NAME, Identity, for_clients},
};
use std::{fs, os::unix::fs::symlink, path::Path, sync::Arc, thread, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, pki_types::ServerName},
};

const PLAIN: Dial = Dial { recv_buffer: None, to: None, is_plain: true, before: b"", name: None };

const HANDSHAKES: &str = "tidegate_tls_handshakes_total";

fn handshakes(result: &str) -> String {
    format!("{HANDSHAKES}{{result=\"{result}\"}}")
}

/// A session that goes as it should.
async fn visit(c: &mut Peer) {
    c.handshake("/").await;
    c.send_text("hello").await;
    assert_eq!(c.read_text().await, "hello");
    c.send_close(1000, "").await;
    c.until_end().await.assert_closed_with(1000);
}

/// The certificate that a client gets, who goes again then.
fn certificate_for(t: &Scene, name: &str, has_sni: bool) -> Result<Vec<u8>, String> {
    let mut config = (*t.authority().client()).clone();
    config.enable_sni = has_sni;
    shake_hands(t, config, name)
}

fn shake_hands(t: &Scene, config: ClientConfig, name: &str) -> Result<Vec<u8>, String> {
    let (name, address) = (ServerName::try_from(name.to_owned()).expect("a name"), t.address());
    t.lab().place(Side::Client).run(|| {
        block(async move {
            let stream = TcpStream::connect(address).await.expect("tidegate listens");
            let connect = TlsConnector::from(Arc::new(config)).connect(name, stream);
            let mut stream = connect.await.map_err(|error| error.to_string())?;
            let found = stream.get_ref().1.peer_certificates().expect("a certificate")[0].to_vec();
            let _ = stream.shutdown().await;
            let _ = stream.read(&mut [0]).await;
            Ok(found)
        })
    })
}

/// A `ClientHello` that is longer than one read is waited for; one that asks for a protocol that is not spoken here is refused.
#[test]
fn what_clients_may_ask_for() {
    let t = Scene::new("").secure(Authority::new()).start();
    let long = (0..100).map(|index| format!("{index:0100}").into_bytes());
    for (protocols, is_spoken) in [
        (Vec::new(), true),
        (long.chain([b"http/1.1".to_vec()]).collect(), true),
        (vec![b"h2".to_vec(), b"http/1.1".to_vec()], true),
        (vec![b"h2".to_vec()], true),
        (vec![b"spdy/3.1".to_vec()], false),
    ] {
        let mut config = (*t.authority().client()).clone();
        config.alpn_protocols = protocols;
        let result = shake_hands(&t, config, CLIENTS_NAME);
        assert_eq!(result.is_ok(), is_spoken, "{result:?}");
    }
    let metrics = t.proxy().metrics_when("all of them", |metrics| metrics.sum(HANDSHAKES) > 4.5);
    assert_eq!(["full", "failed"].map(|result| metrics.count(&handshakes(result))), [4, 1]);
    t.no_rst();
}

/// The backend is told that it was TLS, whatever the client says of that; the log says which, and for which name. A client's ticket
/// makes its next handshake a shorter one.
#[test]
fn what_is_said_of_a_session() {
    let script = async |c: &mut Peer| {
        let request = c.accept_websocket().await;
        c.send_text(request.field("X-Forwarded-Proto").unwrap_or_default()).await;
        backend::echo_on(c).await;
    };
    let t = Scene::new("").secure(Authority::new()).backend(script).start();
    for _ in 0..2 {
        t.client(async |c| {
            c.handshake_with(Message::websocket("/").header("X-Forwarded-Proto", "http")).await;
            assert_eq!(c.read_text().await, "https");
            c.send_close(1000, "").await;
            c.until_end().await.assert_closed_with(1000);
        });
    }
    for message in ["open", "close"] {
        let line = t.proxy().log_where("the session", |line| line["message"] == message);
        assert_eq!((line["tls"].as_str(), line["sni"].as_str()), (Some("1.3"), Some(CLIENTS_NAME)), "{line}");
    }
    let metrics = t.proxy().metrics();
    assert_eq!([&handshakes("full"), &handshakes("resumed")].map(|name| metrics.count(name)), [1, 1]);
    t.no_rst();
}

/// Each gets the certificate of the name that it asks for, and the first one who asks for none, or for another.
#[test]
fn several_names() {
    let authority = Authority::new();
    let all = ["first.test", "second.test", "*.third.test"].map(|name| authority.sign(name));
    let list = |path: fn(&Identity) -> &Path| {
        all.iter().map(|identity| format!("'{}'", path(identity).display())).collect::<Vec<_>>().join(", ")
    };
    let settings = format!(
        "listen.tls_certificate = [{}]\nlisten.tls_key = [{}]\n",
        list(|identity| &identity.certificate_file),
        list(|identity| &identity.key_file)
    );
    let t = Scene::new(&settings).secure(authority).start();
    for (name, has_sni, index) in
        [("first.test", true, 0), ("SECOND.test", true, 1), ("a.third.test", true, 2), ("first.test", false, 0)]
    {
        assert_eq!(certificate_for(&t, name, has_sni).as_deref(), Ok(all[index].der()), "{name}");
    }
    let error = certificate_for(&t, "other.test", true).expect_err("it is for none of them");
    assert!(error.contains("first.test"), "not the first one: {error}");
    t.proxy().metrics_when("that the client did not like it", |m| m.count(&handshakes("distrusted")) == 1);
    t.proxy()
        .log_where("what to do", |line| line["fix"].as_str().is_some_and(|fix| fix.contains("listen.tls_certificate")));
    t.client_with(Dial { name: Some("second.test"), ..Dial::default() }, visit);
    t.no_rst();
}

/// Whoever speaks plain HTTP is told what this port speaks, and nothing of it reaches a backend.
#[test]
fn plain_http_gets_400() {
    let t = Scene::new("").secure(Authority::new()).start();
    for request in [Message::get("/"), Message::websocket("/")] {
        t.client_with(PLAIN, async |c| {
            let response = c.request(request).await;
            assert_eq!(response.code(), 400);
            assert!(response.text().contains("speaks TLS"), "{response:?}");
            assert_eq!(c.until_end().await.end, End::Fin);
        });
    }
    // What it is is told by its first byte, and nobody is waited for who sends no more.
    t.client_with(PLAIN, async |c| {
        c.send_bytes(b"G").await;
        let seen = c.until_end().await;
        assert!(seen.raw.starts_with(b"HTTP/1.1 400 "), "{seen:?}");
        assert_eq!(seen.end, End::Fin);
    });
    assert_eq!(t.proxy().metrics().count(&handshakes("plain_http")), 3);
    t.proxy().log_where("what to do about it", |line| line["fix"].as_str().is_some_and(|fix| fix.contains("https")));
    assert_eq!(t.backend().count(), 0);
    t.no_rst();
}

/// What is no TLS gets an alert and FIN; who leaves in the middle, by FIN, is no mistake of anybody's.
#[test]
fn handshakes_that_fail() {
    let t = Scene::new("").secure(Authority::new()).start();
    let wrong: [&[u8]; 4] = [
        // Another message of a handshake than the first.
        b"\x16\x03\x01\x00\x04\x0e\x00\x00\x00",
        b"\x00\x01\x02\x03\x04\x05\x06\x07",
        b"\x16\x03\x01\xff\xff",
        b"\x16\x03\x01\x00\x05hello",
    ];
    for bytes in wrong {
        t.client_with(PLAIN, async |c| {
            c.send_bytes(bytes).await;
            let seen = c.until_end().await;
            // Of a message that is too large rustls says nothing.
            let alert = (!bytes.ends_with(b"hello")).then_some(&21);
            assert_eq!((seen.end, seen.raw.first()), (End::Fin, alert), "{bytes:?}: {seen:?}");
        });
    }
    t.client_with(PLAIN, async |c| {
        c.send_bytes(b"\x16\x03\x01\x02\x00").await;
        c.fin().await;
        assert_eq!(c.until_end().await.end, End::Fin);
    });
    let stranger = (*Authority::new().client()).clone();
    assert!(shake_hands(&t, stranger, CLIENTS_NAME).is_err());
    let metrics = t.proxy().metrics_when("all of them", |metrics| metrics.sum(HANDSHAKES) > 5.5);
    let found = ["failed", "abandoned", "distrusted"].map(|result| metrics.count(&handshakes(result)));
    assert_eq!(found, [4, 1, 1]);
    t.client(visit);
    assert_eq!(t.backend().count(), 1);
}

/// One deadline is for the TLS handshake and the header behind it. Half of these drip into the one, half into the other, always sooner than
/// the deadline is over; all are ended by FIN, and the others are served meanwhile.
#[test]
fn drippers_are_cut() {
    // Many take their time on a machine of two cores before they have sent a byte.
    let (count, timeout, pause) = if is_strict() { (1000, 20, 2000) } else { (40, 8, 800) };
    let pause = Duration::from_millis(pause);
    let t = Scene::new(&format!("http.header_timeout = '{timeout}s'")).secure(Authority::new()).start();
    let hello = {
        let config = t.authority().client();
        let name = ServerName::try_from(CLIENTS_NAME).expect("a name");
        let mut client = tokio_rustls::rustls::ClientConnection::new(config, name).expect("a client");
        let mut hello = Vec::new();
        client.write_tls(&mut hello).expect("a ClientHello");
        hello
    };
    let (address, config) = (t.address(), t.authority().client());
    let place = t.lab().place(Side::Client);
    thread::scope(|scope| {
        let drippers = scope.spawn(|| {
            place.run(|| {
                block(async {
                    let mut all = JoinSet::new();
                    for index in 0..count {
                        let (hello, config) = (hello.clone(), Arc::clone(&config));
                        all.spawn(async move {
                            let mut stream = TcpStream::connect(address).await.expect("tidegate listens");
                            if index % 2 == 0 {
                                return drip(&mut stream, &hello, pause).await;
                            }
                            let name = ServerName::try_from(CLIENTS_NAME).expect("a name");
                            let mut stream =
                                TlsConnector::from(config).connect(name, stream).await.expect("a handshake");
                            drip(&mut stream, "GET / HTTP/1.1\r\nX: y".repeat(20).as_bytes(), pause).await
                        });
                    }
                    all.join_all().await
                })
            })
        });
        t.client(visit);
        let ends = drippers.join().expect("no panic");
        assert!(ends.iter().all(|was_fin| *was_fin), "{ends:?}");
    });
    t.proxy().metrics_when("that they were late", |m| m.count(&handshakes("timeout")) == count / 2);
    t.client(visit);
    t.no_rst();
}

/// A byte after the other, until the other side has ended: true when that was in order.
async fn drip(
    stream: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin),
    bytes: &[u8],
    pause: Duration,
) -> bool {
    for byte in bytes {
        let end = tokio::time::timeout(pause, stream.read(&mut [0])).await;
        match end {
            Err(_) => {}
            Ok(read) => return matches!(read, Ok(0)),
        }
        let _ = stream.write_all(&[*byte]).await;
        let _ = stream.flush().await;
    }
    false
}

/// Files are swapped as Kubernetes does it with a Secret: nobody is cut, and whoever comes gets the new certificate. One that is broken
/// changes nothing.
#[test]
fn a_certificate_is_swapped_under_sessions() {
    let count = if is_strict() { 1000 } else { 100 };
    let authority = Authority::new();
    let (old, new) = (authority.sign_until(CLIENTS_NAME, 2998), authority.sign_until(CLIENTS_NAME, 2999));
    let folder = authority.folder().to_owned();
    let swap = |name: &str, certificate: &Path, key: &Path| {
        fs::create_dir(folder.join(name)).expect("a folder");
        fs::copy(certificate, folder.join(name).join("tls.crt")).expect("room");
        fs::copy(key, folder.join(name).join("tls.key")).expect("room");
        symlink(name, folder.join("..data_tmp")).expect("a link");
        fs::rename(folder.join("..data_tmp"), folder.join("..data")).expect("the same folder");
    };
    swap("..2026_1", &old.certificate_file, &old.key_file);
    for file in ["tls.crt", "tls.key"] {
        symlink(format!("..data/{file}"), folder.join(file)).expect("a link");
    }
    let [certificate, key] = ["tls.crt", "tls.key"].map(|file| folder.join(file).display().to_string());
    let settings =
        format!("listen.tls_certificate = '{certificate}'\nlisten.tls_key = '{key}'\nreload.watch = '100ms'\n");
    let t = Scene::new(&settings).secure(authority).start();
    assert_eq!(certificate_for(&t, CLIENTS_NAME, true).as_deref(), Ok(old.der()));
    let swapped = Gate::new("the certificate was swapped");
    thread::scope(|scope| {
        let sessions = scope.spawn(|| {
            t.clients(count, async |c| {
                c.handshake("/").await;
                c.send_text("before").await;
                assert_eq!(c.read_text().await, "before");
                swapped.passed().await;
                c.send_text("after").await;
                assert_eq!(c.read_text().await, "after");
                c.send_close(1000, "").await;
                c.until_end().await.assert_closed_with(1000);
            })
        });
        let all = u32::try_from(count).expect("a few");
        t.proxy().metrics_when("all sessions", |m| m.sum("tidegate_connections_active") > f64::from(all) - 0.5);
        swap("..2026_2", &new.certificate_file, &new.key_file);
        fs::remove_dir_all(folder.join("..2026_1")).expect("it is there");
        // Under the same names as before: what was in them is what changed.
        t.proxy().log_where("the reload", |line| {
            let applied = line["applied"].as_str().unwrap_or_default();
            line["message"] == "reloaded" && applied.contains("listen.tls_certificate")
        });
        assert_eq!(certificate_for(&t, CLIENTS_NAME, true).as_deref(), Ok(new.der()));
        // A key that is not the certificate's.
        swap("..2026_3", &old.certificate_file, &new.key_file);
        fs::remove_dir_all(folder.join("..2026_2")).expect("it is there");
        t.proxy().log_where("what is wrong", |line| {
            line["message"] == "reload"
                && line["finding"].as_str().is_some_and(|text| text.contains("`listen.tls_key`"))
        });
        assert_eq!(certificate_for(&t, CLIENTS_NAME, true).as_deref(), Ok(new.der()));
        let active = t.proxy().metrics().sum("tidegate_connections_active");
        assert!((active - f64::from(all)).abs() < 0.5, "{active} of {count} sessions are left");
        swapped.open();
        assert_eq!(sessions.join().expect("no panic").len(), count);
    });
    let printed = t.proxy().printed();
    assert!(printed.iter().all(|(_, line)| !line.contains("PRIVATE KEY")), "a key in the log");
    t.no_rst();
}

/// TLS goes on and off with a reload, for whoever comes then.
#[test]
fn it_is_turned_on_and_off() {
    let authority = Authority::new();
    let settings = for_clients(&authority.sign(CLIENTS_NAME));
    let t = Scene::new(&settings).secure(authority).start();
    let reload = |settings: &str| {
        t.proxy().configure(settings);
        let request = Message::line("POST /reload HTTP/1.1").header("Host", "localhost").header("Content-Length", "0");
        let response = t.proxy().admin(&request).expect("an answer");
        assert_eq!(response.code(), 200, "{response:?}");
    };
    t.client(async |c| {
        c.handshake("/").await;
        reload("");
        t.client_with(PLAIN, visit);
        c.send_text("still there").await;
        assert_eq!(c.read_text().await, "still there");
        c.send_close(1000, "").await;
        c.until_end().await.assert_closed_with(1000);
    });
    reload(&settings);
    t.client(visit);
    t.no_rst();
}

/// A client's FIN without `close_notify` is what it is without TLS: an end without a Close, counted as such.
#[test]
fn a_fin_without_close_notify_is_a_fin() {
    let t = Scene::new("close.delay = '0ms'").secure(Authority::new()).start();
    t.client(async |c| {
        c.handshake("/").await;
        c.send_text("last word").await;
        c.read_text().await;
        c.bare_fin();
        assert_eq!(c.until_end().await.end, End::Fin);
    });
    t.connection(0).seen().assert_closed_with(1001);
    let fin = "tidegate_abnormal_closes_total{cause=\"client_fin\"}";
    t.proxy().metrics_when("the abnormal end", |metrics| metrics.count(fin) == 1);
    t.no_rst();
}

/// Whoever is turned away hears so over TLS.
#[test]
fn no_room_is_said_over_tls() {
    let t = Scene::new("limits.max_connections = 1").secure(Authority::new()).start();
    t.client(async |c| {
        c.handshake("/").await;
        t.client(async |c| {
            let response = c.request(Message::websocket("/")).await;
            assert_eq!((response.code(), response.field("Retry-After")), (503, Some("1")));
            assert_eq!(c.until_end().await.end, End::Fin);
        });
        c.send_close(1000, "").await;
        c.until_end().await.assert_closed_with(1000);
    });
    t.no_rst();
}

/// Plain requests share a connection, also while one after the other comes; a frame that comes with the handshake is not forgotten.
#[test]
fn what_comes_early_and_what_comes_again() {
    let t = Scene::new("").secure(Authority::new()).start();
    t.client(async |c| {
        let mut bytes = Message::websocket("/").bytes();
        bytes.extend(c.frame_bytes(&Frame::text("early")));
        c.send_bytes(&bytes).await;
        assert_eq!(c.read_response().await.code(), 101);
        assert_eq!(c.read_text().await, "early");
        c.send_close(1000, "").await;
        c.until_end().await.assert_closed_with(1000);
    });
    t.no_rst();
    let script = async |c: &mut Peer| {
        let request = c.read_head().await;
        let proto = request.field("X-Forwarded-Proto").unwrap_or_default().to_owned();
        c.reply(Message::status(200, "OK", &proto)).await;
        c.fin().await;
        c.until_end().await;
    };
    let t = Scene::new("").secure(Authority::new()).backend(script).start();
    t.client(async |c| {
        for _ in 0..3 {
            let response = c.request(Message::get("/path")).await;
            assert_eq!((response.code(), response.text().as_str()), (200, "https"));
        }
    });
    assert_eq!(t.proxy().metrics().count(&handshakes("full")), 1);
    t.no_rst();
}

/// What is large, and read late, arrives whole in both directions.
#[test]
fn large_messages_and_slow_readers() {
    const SIZE: usize = 8 << 20;
    let payload: Vec<u8> = (0..SIZE).map(|at| u8::try_from(at % 251).unwrap()).collect();
    let t = Scene::new("").secure(Authority::new()).start();
    let dial = Dial { recv_buffer: Some(32 << 10), ..Dial::default() };
    t.client_with(dial, async |c| {
        c.handshake("/").await;
        let frame = c.frame_bytes(&Frame::binary(&payload));
        assert!(c.pump(&frame).await);
        // By then all that lies between is full.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let answer = c.read_frame().await;
        assert!(answer.payload == payload, "not what was sent");
        c.send_close(1000, "").await;
        c.until_end().await.assert_closed_with(1000);
    });
    t.no_rst();
}

/// A drain does not wait for who has not finished a handshake, or has not asked for anything yet, longer than a moment; both are ended
/// by FIN.
#[test]
fn a_drain_ends_what_has_not_begun() {
    let settings = "drain = { delay = '0s', window = '0s' }\nhttp.header_timeout = '1h'";
    let t = Scene::new(settings).secure(Authority::new()).start();
    let begun = Gate::new("both are connected");
    let (half, silent) = (begun.clone(), Gate::new("one is connected"));
    let said = silent.clone();
    let silent_one = t.start_client(async move |c| {
        said.open();
        c.until_end().await.end
    });
    silent.pass();
    thread::scope(|scope| {
        let half_one = scope.spawn(|| {
            t.client_with(PLAIN, async |c| {
                c.send_bytes(b"\x16\x03\x01\x02\x00\x01").await;
                half.open();
                c.until_end().await.end
            })
        });
        begun.pass();
        t.proxy().metrics_when("both connections", |m| m.sum("tidegate_client_connections") > 1.5);
        t.proxy().sigterm();
        assert_eq!(half_one.join().expect("no panic"), End::Fin);
    });
    assert_eq!(silent_one.join(), End::Fin);
    assert_eq!(t.proxy().wait_exit(crate::harness::DEADLINE).code(), Some(0));
    t.no_rst();
}
