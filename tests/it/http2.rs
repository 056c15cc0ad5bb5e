//! HTTP/2 from clients: WebSockets on streams (RFC 8441), plain requests, what is refused, how connections end, and floods.
//!
//! How sessions end on streams is in `close_table.rs`, row by row.

use crate::harness::{
    DEADLINE, Dial, Frame, Message, Peer, Scene, Side, backend, block as block_on,
    crowd::is_strict,
    front::write,
    proxy::Proxy,
    streams::carry,
    tls::{Authority, CLIENTS_NAME},
    ws::{CLOSE, SeenFrame},
};
use bytes::Bytes;
use h2::{
    Reason, RecvStream, SendStream,
    client::{self, SendRequest},
    ext::Protocol,
};
use http::{Method, Request, Response, Version};
use std::{
    cell::Cell,
    future::poll_fn,
    net::SocketAddr,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, duplex},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::LocalSet,
    time::timeout,
};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};

/// A client's connection.
struct Client {
    sender: SendRequest<Bytes>,
}

/// Runs a client of HTTP/2 in the clients' namespace: over TLS where they speak that, else with prior knowledge.
fn visit<T: Send>(t: &Scene, script: impl AsyncFnOnce(Client) -> T + Send) -> T {
    let address = t.proxy().address;
    let connector = t.has_secure_clients().then(|| {
        let mut config = (*t.authority().client()).clone();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        TlsConnector::from(Arc::new(config))
    });
    t.lab().place(Side::Client).run(move || {
        block_on(LocalSet::new().run_until(async move {
            let stream = TcpStream::connect(address).await.expect("tidegate listens");
            stream.set_nodelay(true).expect("a socket");
            let (near, own) = duplex(64 << 10);
            let carried = match connector {
                Some(connector) => {
                    let name = ServerName::try_from(CLIENTS_NAME).expect("a name");
                    let stream = connector.connect(name, stream).await.expect("TLS");
                    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
                    tokio::task::spawn_local(carry(near, stream))
                }
                None => tokio::task::spawn_local(carry(near, stream)),
            };
            // What one stream does not read must not be the others' window.
            let mut builder = client::Builder::new();
            builder.initial_connection_window_size(16 << 20);
            let (sender, connection) = builder.handshake(own).await.expect("a preface");
            tokio::task::spawn_local(connection);
            let settings = async {
                while !sender.is_extended_connect_protocol_enabled() {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            timeout(DEADLINE, settings).await.expect("SETTINGS with extended CONNECT");
            let result = script(Client { sender }).await;
            timeout(DEADLINE, carried).await.expect("the connection's end").expect("no panic");
            result
        }))
    })
}

impl Client {
    async fn ask(
        &mut self,
        request: Request<()>,
        is_over: bool,
    ) -> Result<(Response<RecvStream>, SendStream<Bytes>), h2::Error> {
        poll_fn(|cx| self.sender.poll_ready(cx)).await?;
        let (response, send) = self.sender.send_request(request, is_over)?;
        let response = timeout(DEADLINE, response).await.expect("an answer")?;
        Ok((response, send))
    }

    async fn open(&mut self, path: &str) -> Session {
        let (response, send) = self.ask(websocket(path), false).await.expect("an answer");
        assert_eq!(response.status(), 200);
        Session { head: response.headers().clone(), send, recv: response.into_body(), read: Vec::new() }
    }
}

fn websocket(path: &str) -> Request<()> {
    Request::builder()
        .method(Method::CONNECT)
        .uri(format!("https://app.test{path}"))
        .version(Version::HTTP_2)
        .extension(Protocol::from_static("websocket"))
        .header("sec-websocket-version", "13")
        .body(())
        .expect("a request")
}

/// A WebSocket on a stream.
struct Session {
    head: http::HeaderMap,
    send: SendStream<Bytes>,
    recv: RecvStream,
    read: Vec<u8>,
}

impl Session {
    async fn say(&mut self, frame: &Frame) {
        write(&mut self.send, frame.bytes(Some([1, 2, 3, 4])).into()).await.expect("an open stream");
    }

    /// The next frame; `None`: END_STREAM.
    async fn hear(&mut self) -> Option<SeenFrame> {
        loop {
            if let Some((frame, length)) = SeenFrame::parse(&self.read, Duration::ZERO) {
                self.read.drain(..length);
                return Some(frame);
            }
            let bytes = timeout(DEADLINE, self.recv.data()).await.expect("a frame")?.expect("an open stream");
            let _ = self.recv.flow_control().release_capacity(bytes.len());
            self.read.extend_from_slice(&bytes);
        }
    }

    async fn echo(&mut self, text: &str) {
        self.say(&Frame::text(text)).await;
        assert_eq!(self.hear().await.expect("an echo").text(), text);
    }

    /// Closes it as a client does that waits.
    async fn close(mut self, code: u16) {
        self.say(&Frame::close(code, "")).await;
        let close = self.hear().await.expect("a Close");
        assert_eq!((close.opcode, close.code()), (CLOSE, code));
        assert!(self.hear().await.is_none(), "END_STREAM comes first from the server");
        self.send.send_data(Bytes::new(), true).expect("an open stream");
    }
}

/// Sessions on streams of one connection, with prior knowledge and over TLS, to a backend that speaks HTTP/1.1 and to one that has streams too.
#[test]
fn sessions_share_a_connection() {
    for (is_secure, is_shared) in [(false, false), (true, false), (false, true), (true, true)] {
        let script = async |c: &mut Peer| {
            let request = c.accept_websocket().await;
            c.send_text(request.field("X-Forwarded-Proto").unwrap_or_default()).await;
            c.send_text(request.field("Host").unwrap_or_default()).await;
            backend::echo_on(c).await;
        };
        let mut scene = Scene::new("").backend(script);
        if is_secure {
            scene = scene.secure(Authority::new());
        }
        if is_shared {
            scene = scene.front(crate::harness::front::Manners::default());
        }
        let t = scene.start();
        visit(&t, async |mut client| {
            let mut sessions = Vec::new();
            for index in 0..3 {
                let mut session = client.open("/chat?a=b").await;
                assert!(!session.head.contains_key("sec-websocket-accept"), "{:?}", session.head);
                let proto = if is_secure { "https" } else { "http" };
                assert_eq!(session.hear().await.expect("a text").text(), proto);
                assert_eq!(session.hear().await.expect("a text").text(), "app.test");
                session.echo(&format!("hello {index}")).await;
                sessions.push(session);
            }
            for (index, session) in sessions.iter_mut().enumerate() {
                session.echo(&format!("again {index}")).await;
            }
            for session in sessions {
                session.close(1000).await;
            }
        });
        let line = t.proxy().log_where("a session", |line| line["message"] == "open");
        assert_eq!(line["http"].as_str(), Some("h2"), "{line}");
        let metrics = t.proxy().metrics_when("the end of all", |m| m.sum("tidegate_http2_connections") < 0.5);
        assert!(metrics.sum("tidegate_http2_streams") < 0.5, "{metrics:?}");
        t.no_rst();
    }
}

/// A request of another kind.
fn plain(method: &str, path: &str) -> http::request::Builder {
    Request::builder().method(method).uri(format!("http://app.test{path}")).version(Version::HTTP_2)
}

/// What came of a request that should not be passed on: its status, or why its stream was reset.
async fn outcome(client: &mut Client, request: Request<()>, is_over: bool) -> Result<u16, Reason> {
    match client.ask(request, is_over).await {
        Ok((response, _send)) => Ok(response.status().as_u16()),
        Err(error) => Err(error.reason().expect("a reset")),
    }
}

/// Whatever is no valid request never reaches the backend, and leaves the connection as it is.
#[test]
fn what_is_refused() {
    let t = Scene::new("http.allowed_origins = ['https://app.test']\nhttp.header_count = 16").start();
    visit(&t, async |mut client| {
        let edited = |edit: &dyn Fn(&mut Request<()>)| {
            let mut request = websocket("/canary");
            edit(&mut request);
            request
        };
        let field = |name: &'static str, value: &'static str| {
            edited(&|request| _ = request.headers_mut().append(name, value.parse().expect("a value")))
        };
        for (what, request, is_over, wanted) in [
            (
                "another protocol",
                edited(&|r| _ = r.extensions_mut().insert(Protocol::from_static("connect-udp"))),
                false,
                501,
            ),
            ("no version", edited(&|r| _ = r.headers_mut().remove("sec-websocket-version")), false, 426),
            (
                "version 8",
                edited(&|r| _ = r.headers_mut().insert("sec-websocket-version", "8".parse().expect("8"))),
                false,
                426,
            ),
            ("two versions", field("sec-websocket-version", "13"), false, 426),
            ("a body", field("content-length", "5"), false, 400),
            ("another host", field("host", "other.test"), false, 400),
            ("another page", field("origin", "https://app.test.evil.test"), false, 403),
            ("an end", websocket("/canary"), true, 400),
            (
                "another scheme",
                edited(&|r| *r.uri_mut() = "ftp://app.test/canary".parse().expect("a target")),
                false,
                400,
            ),
            (
                "credentials",
                edited(&|r| *r.uri_mut() = "http://a:b@app.test/canary".parse().expect("a target")),
                false,
                400,
            ),
            (
                "CONNECT",
                Request::connect("app.test:443").version(Version::HTTP_2).body(()).expect("a request"),
                false,
                405,
            ),
        ] {
            assert_eq!(outcome(&mut client, request, is_over).await, Ok(wanted), "{what}");
        }
        let empty = plain("POST", "/canary").header("content-length", "5").body(()).expect("a request");
        assert_eq!(outcome(&mut client, empty, true).await, Err(Reason::PROTOCOL_ERROR), "a length without a body");
        let many = (0..17).fold(plain("GET", "/canary"), |request, index| request.header(format!("x-{index}"), "y"));
        assert_eq!(outcome(&mut client, many.body(()).expect("a request"), true).await, Ok(431));
        let long = plain("GET", "/canary").header("x", "y".repeat(40_000)).body(()).expect("a request");
        assert_eq!(outcome(&mut client, long, true).await, Ok(431));
        let page = edited(&|request| {
            _ = request.headers_mut().insert("origin", "https://app.test".parse().expect("an origin"));
        });
        let (response, _send) = client.ask(page, false).await.expect("an answer");
        assert_eq!(response.status(), 200, "the connection is as it was");
    });
    assert_eq!(t.backend().count(), 1);
    t.no_rst();
}

/// What h2's own client would not send, on bare frames: each of it resets its stream, and nothing else.
#[test]
fn what_is_malformed() {
    let t = Scene::new("").start();
    let get: &[u8] = &[0x82, 0x86, 0x84];
    let literal = |name: &str, value: &str| {
        let mut field = vec![0, u8::try_from(name.len()).expect("short")];
        field.extend_from_slice(name.as_bytes());
        field.push(u8::try_from(value.len()).expect("short"));
        field.extend_from_slice(value.as_bytes());
        field
    };
    let host = literal(":authority", "app.test");
    let with = |more: Vec<u8>| [get, &host, &more].concat();
    let blocks = [
        with(literal("connection", "close")),
        with(literal("transfer-encoding", "chunked")),
        with(literal("upgrade", "websocket")),
        with(literal("keep-alive", "5")),
        with(literal("proxy-connection", "close")),
        with(literal("te", "gzip")),
        with(literal("X-Upper", "a")),
        with(literal(":path", "/twice")),
        with(literal(":unknown", "a")),
        with(literal(":protocol", "websocket")),
        with(literal("x-broken", "a\r\nb: c")),
        [get, &literal("x", "y"), &host].concat(),
        [&get[..1], &host].concat(),
        [&get[1..], &host].concat(),
    ];
    for block in &blocks {
        let (resets, goaway) = t.lab().place(Side::Client).run(|| {
            block_on(async {
                let mut raw = Raw::connect(t.proxy().address).await;
                raw.send(&frame(1, 0x5, 1, block)).await.expect("an open connection");
                // Behind it, so that it was looked at.
                raw.send(&frame(6, 0, 0, &[7; 8])).await.expect("an open connection");
                raw.read_until(|raw| raw.pongs == 1).await;
                (raw.resets, raw.goaway)
            })
        });
        // "Malformed requests ... MUST be treated as a stream error of type PROTOCOL_ERROR" (RFC 9113 8.1.1); h2 makes of names and values that
        // can't be any the end of the connection.
        assert!(
            resets == [(1, 1)] && goaway.is_none() || goaway == Some(1),
            "{}: {resets:?} {goaway:?}",
            block.escape_ascii()
        );
    }
    assert_eq!(t.backend().count(), 0);
}

fn id(index: usize) -> u32 {
    u32::try_from(2 * index + 1).expect("a stream")
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a frame").to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// A client on bare frames.
struct Raw {
    read: OwnedReadHalf,
    write: OwnedWriteHalf,
    buffer: Vec<u8>,
    resets: Vec<(u32, u32)>,
    goaway: Option<u32>,
    pongs: usize,
    has_ended: bool,
}

impl Raw {
    async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.expect("tidegate listens");
        let (read, write) = stream.into_split();
        let (buffer, resets) = (Vec::new(), Vec::new());
        let mut raw = Self { read, write, buffer, resets, goaway: None, pongs: 0, has_ended: false };
        raw.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("a connection");
        raw.send(&frame(4, 0, 0, &[])).await.expect("a connection");
        raw
    }

    async fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.write.write_all(bytes).await
    }

    /// Sends all of it, and reads what comes meanwhile, up to the connection's end.
    async fn pump(&mut self, bytes: &[u8]) {
        let mut sent = 0;
        while sent < bytes.len() && !self.has_ended {
            let mut chunk = vec![0; 16 << 10];
            tokio::select! {
                read = self.read.read(&mut chunk) => self.take(read.ok().map_or(&[][..], |count| &chunk[..count])),
                wrote = self.write.write(&bytes[sent..]) => match wrote {
                    Ok(count) => sent += count,
                    Err(_) => self.has_ended = true,
                },
            }
        }
    }

    async fn read_until(&mut self, test: impl Fn(&Self) -> bool) {
        while !test(self) && !self.has_ended {
            let mut chunk = vec![0; 16 << 10];
            let read = timeout(DEADLINE, self.read.read(&mut chunk)).await.expect("frames, or the end");
            self.take(read.ok().map_or(&[][..], |count| &chunk[..count]));
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        self.has_ended |= bytes.is_empty();
        self.buffer.extend_from_slice(bytes);
        while let Some((&[a, b, c, kind, flags, d, e, f, g], rest)) = self.buffer.split_first_chunk::<9>() {
            let length = usize::try_from(u32::from_be_bytes([0, a, b, c])).expect("a length");
            let Some(payload) = rest.get(..length) else { break };
            let word = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().expect("four bytes"));
            match kind {
                3 => self.resets.push((u32::from_be_bytes([d, e, f, g]), word(0))),
                6 if flags & 1 == 1 => self.pongs += 1,
                7 => self.goaway = Some(word(4)),
                _ => {}
            }
            self.buffer.drain(..9 + length);
        }
    }
}

/// What can be sent over and over: its name, what comes first, and the frames of one time.
struct Flood {
    name: &'static str,
    first: Vec<u8>,
    again: fn(usize) -> Vec<u8>,
}

/// GET of `http://app.test/`.
const GET: &[u8] = b"\x82\x86\x84\x41\x08app.test";
/// POST of the same.
const POST: &[u8] = b"\x83\x86\x84\x41\x08app.test";

fn floods() -> Vec<Flood> {
    let flood = |name, first: Vec<u8>, again: fn(usize) -> Vec<u8>| Flood { name, first, again };
    vec![
        flood("rapid reset", Vec::new(), |n| [frame(1, 5, id(n), GET), frame(3, 0, id(n), &[0, 0, 0, 8])].concat()),
        flood("a window of zero", Vec::new(), |n| [frame(1, 4, id(n), POST), frame(8, 0, id(n), &[0; 4])].concat()),
        flood("a window too large", Vec::new(), |n| {
            [frame(1, 4, id(n), POST), frame(8, 0, id(n), &[0x7f, 255, 255, 255])].concat()
        }),
        flood("malformed requests", Vec::new(), |n| frame(1, 5, id(n), &[GET, b"\0\x0aconnection\x05close"].concat())),
        flood("DATA behind the end", Vec::new(), |n| [frame(1, 5, id(n), GET), frame(0, 0, id(n), b"x")].concat()),
        flood("CONTINUATION", frame(1, 1, 1, GET), |_| frame(9, 0, 1, b"\x00\x01x\x01y")),
        flood("empty CONTINUATION", frame(1, 1, 1, GET), |_| frame(9, 0, 1, b"")),
        flood("empty DATA", frame(1, 4, 1, POST), |_| frame(0, 0, 1, b"")),
        flood("SETTINGS", Vec::new(), |_| frame(4, 0, 0, &[0, 4, 0, 0, 255, 255])),
        flood("PING", Vec::new(), |_| frame(6, 0, 0, &[1; 8])),
        flood("PRIORITY", Vec::new(), |_| frame(2, 0, 1, &[0, 0, 0, 0, 9])),
        flood("windows", Vec::new(), |_| frame(8, 0, 0, &[0, 0, 0, 1])),
        flood("unknown frames", Vec::new(), |_| frame(0x42, 0, 0, b"?")),
        flood("too many streams", Vec::new(), |n| frame(1, 4, id(n), POST)),
    ]
}

/// A flood is the end of its connection: no memory to speak of, and a session beside it does not notice.
#[test]
fn floods_harm_nobody_else() {
    let times = if is_strict() { 1_000_000 } else { 30_000 };
    let script = async |c: &mut Peer| {
        if !c.is_asked().await {
            return;
        }
        let request = c.read_head().await;
        if request.field("Upgrade").is_some() {
            c.reply(Message::switching(&request)).await;
            backend::echo_on(c).await;
        } else {
            c.reply(Message::status(200, "OK", "hello").header("Connection", "close")).await;
            c.fin().await;
            c.transcript_until_end(DEADLINE).await;
        }
    };
    let t = Scene::new("log.filter = 'info'").backend(script).start();
    let pid = t.proxy().pid();
    for flood in floods() {
        let Flood { name, first, again } = flood;
        let before = resident(pid);
        let (goaway, has_ended, echoes, most) = visit(&t, async |mut client| {
            let mut session = client.open("/").await;
            session.echo("before").await;
            let mut raw = Raw::connect(t.proxy().address).await;
            let (mut echoes, mut most) = (0, 0);
            {
                let mut flooding = pin!(async {
                    raw.pump(&first).await;
                    for from in (0..times).step_by(500) {
                        if raw.has_ended {
                            break;
                        }
                        raw.pump(&(from..(from + 500).min(times)).flat_map(again).collect::<Vec<_>>()).await;
                        // The kernel is asked what has come, and the session beside has its turn.
                        tokio::task::yield_now().await;
                    }
                    raw.read_until(|raw| raw.goaway.is_some()).await;
                });
                let is_over = Cell::new(false);
                let flood = async {
                    flooding.as_mut().await;
                    is_over.set(true);
                };
                let beside = async {
                    while !is_over.get() {
                        session.echo("meanwhile").await;
                        echoes += 1;
                        most = most.max(resident(pid));
                    }
                };
                tokio::join!(flood, beside);
            }
            session.echo("after").await;
            session.close(1000).await;
            (raw.goaway, raw.has_ended, echoes, most)
        });
        let grown = most.saturating_sub(before) >> 10;
        println!("{name}: GOAWAY {goaway:?}, ended {has_ended}, {echoes} echoes meanwhile, {grown} KiB more");
        assert!(most < before + (16 << 20), "{name}: {grown} KiB more");
        // ENHANCE_YOUR_CALM, or PROTOCOL_ERROR where it is that in itself.
        assert!(matches!(goaway, Some(11 | 1)), "{name}: {goaway:?}");
    }
    t.proxy().metrics_when("the end of all", |m| {
        m.sum("tidegate_http2_connections") < 0.5 && m.sum("tidegate_http2_streams") < 0.5
    });
}

fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Requests of any kind with their bodies and trailers, and the answers to them, as they would be over HTTP/1.1.
#[test]
fn requests_pass() {
    let script = async |c: &mut Peer| {
        let request = c.read_head().await;
        match request.target() {
            "/head" => {
                c.reply(
                    Message::line("HTTP/1.1 200 OK").header("Content-Length", "12345").header("Connection", "close"),
                )
                .await;
            }
            "/post" => {
                assert_eq!(request.field("Transfer-Encoding"), Some("chunked"));
                assert_eq!(request.field("Expect"), Some("100-continue"));
                while !c.received_ends_with(b"0\r\n\r\n") {
                    let count = c.received_bytes();
                    c.read_bytes(count + 1).await;
                }
                let answer = Message::line("HTTP/1.1 201 Created")
                    .header("Transfer-Encoding", "chunked")
                    .header("Keep-Alive", "timeout=5")
                    .header("Trailer", "X-Sum")
                    .then("5\r\nhello\r\n0\r\nX-Sum: 5\r\n\r\n");
                c.reply(answer).await;
            }
            _ => {
                let text = format!(
                    "{} {} {:?} {:?}",
                    request.line,
                    request.field("Host").unwrap_or_default(),
                    request.all("Cookie"),
                    request.field("Connection")
                );
                c.reply(Message::status(200, "OK", &text)).await;
            }
        }
        c.until_end().await;
    };
    let t = Scene::new("").backend(script).start();
    visit(&t, async |mut client| {
        let get =
            plain("GET", "/get?a").header("cookie", "a=b").header("cookie", "c=d").header("http2-settings", "AAMAAABk");
        let (response, _) = client.ask(get.body(()).expect("a request"), true).await.expect("an answer");
        assert_eq!(response.status(), 200);
        assert!(
            response.headers().contains_key("date") && !response.headers().contains_key("connection"),
            "{response:?}"
        );
        let text = read_all(response.into_body()).await.0;
        assert_eq!(text, "GET /get?a HTTP/1.1 app.test [\"a=b; c=d\"] Some(\"close\")");

        let (response, _) =
            client.ask(plain("HEAD", "/head").body(()).expect("a request"), true).await.expect("an answer");
        assert_eq!(response.headers()["content-length"], "12345");
        assert_eq!(read_all(response.into_body()).await.0, "");

        poll_fn(|cx| client.sender.poll_ready(cx)).await.expect("a connection");
        let post = plain("POST", "/post").header("expect", "100-continue").body(()).expect("a request");
        let (mut response, mut send) = client.sender.send_request(post, false).expect("a connection");
        let interim = timeout(DEADLINE, poll_fn(|cx| response.poll_informational(cx))).await.expect("100");
        assert_eq!(interim.expect("an answer").expect("100").status(), 100);
        write(&mut send, Bytes::from(vec![b'x'; 200_000])).await.expect("it is taken");
        send.send_data(Bytes::new(), true).expect("an open stream");
        let response = timeout(DEADLINE, response).await.expect("an answer").expect("an answer");
        assert_eq!(response.status(), 201);
        assert!(!response.headers().contains_key("keep-alive"), "{response:?}");
        let (text, trailers) = read_all(response.into_body()).await;
        assert_eq!((text.as_str(), trailers.expect("trailers")["x-sum"].as_bytes()), ("hello", &b"5"[..]));
    });
    assert!(t.connection(1).seen().raw.starts_with(b"HEAD /head HTTP/1.1\r\n"));
    t.no_rst();
}

async fn read_all(mut body: RecvStream) -> (String, Option<http::HeaderMap>) {
    let mut text = Vec::new();
    while let Some(bytes) = timeout(DEADLINE, body.data()).await.expect("more, or the end") {
        let bytes = bytes.expect("an open stream");
        let _ = body.flow_control().release_capacity(bytes.len());
        text.extend_from_slice(&bytes);
    }
    (String::from_utf8(text).expect("text"), body.trailers().await.expect("an open stream"))
}

/// An answer that its client does not take waits with the backend, and one that is cut short does not look whole.
#[test]
fn bodies_wait_for_their_client_and_are_not_made_whole() {
    const LENGTH: usize = 8 << 20;
    let script = async |c: &mut Peer| {
        let request = c.read_head().await;
        let answer = Message::line("HTTP/1.1 200 OK").header("Content-Length", &LENGTH.to_string());
        c.reply(answer).await;
        if request.target() == "/cut" {
            c.send_bytes(b"half").await;
            c.fin().await;
        } else {
            c.pump(&vec![b'x'; LENGTH]).await;
        }
        c.until_end().await;
    };
    let t = Scene::new("").backend(script).start();
    let before = resident(t.proxy().pid());
    visit(&t, async |mut client| {
        let (response, _) =
            client.ask(plain("GET", "/long").body(()).expect("a request"), true).await.expect("an answer");
        let (cut, _) = client.ask(plain("GET", "/cut").body(()).expect("a request"), true).await.expect("an answer");
        let mut cut = cut.into_body();
        assert_eq!(cut.data().await.expect("half").expect("half"), "half");
        let error = timeout(DEADLINE, cut.data()).await.expect("an end").expect("an error").expect_err("a reset");
        assert_eq!(error.reason(), Some(Reason::INTERNAL_ERROR));
        let grown = resident(t.proxy().pid()).saturating_sub(before);
        assert!(grown < (LENGTH / 2) as u64, "{grown} bytes more");
        assert_eq!(read_all(response.into_body()).await.0.len(), LENGTH);
    });
    t.no_rst();
}

/// Each session has a place; without one its stream gets a 503, and the next one that of who has left.
#[test]
fn each_session_has_a_place() {
    let t = Scene::new("limits.max_connections = 3").start();
    visit(&t, async |mut client| {
        let mut one = client.open("/").await;
        let two = client.open("/").await;
        let (response, _send) = client.ask(websocket("/"), false).await.expect("an answer");
        assert_eq!(
            (response.status().as_u16(), &response.headers()["retry-after"]),
            (503, &http::HeaderValue::from_static("1"))
        );
        assert!(read_all(response.into_body()).await.0.contains("no room"));
        two.close(1000).await;
        one.echo("still here").await;
        let again = async {
            loop {
                let (response, send) = client.ask(websocket("/"), false).await.expect("an answer");
                if response.status() == 200 {
                    return Session {
                        head: response.headers().clone(),
                        send,
                        recv: response.into_body(),
                        read: Vec::new(),
                    };
                }
            }
        };
        timeout(DEADLINE, again).await.expect("a place").close(1000).await;
        one.close(1000).await;
    });
    t.proxy().metrics_when("who was refused", |m| m.sum("tidegate_refused_total") > 0.5);
    t.no_rst();
}

/// Who is turned away hears so in the HTTP that it speaks.
#[test]
fn who_is_turned_away_hears_so() {
    for is_secure in [false, true] {
        let scene = Scene::new("limits.max_connections = 1");
        let t = if is_secure { scene.secure(Authority::new()).start() } else { scene.start() };
        let held = t.start_client(async |c| {
            c.handshake("/").await;
            c.read_close().await;
            c.answer_close().await;
            c.until_end().await;
        });
        t.connection(0);
        visit(&t, async |mut client| {
            let (response, _send) = client.ask(websocket("/"), false).await.expect("an answer");
            assert_eq!(response.status(), 503);
        });
        t.proxy().sigterm();
        held.join();
    }
}

/// One session whose client takes nothing holds up nobody else on its connection, in either direction.
#[test]
fn a_slow_stream_is_alone() {
    let script = async |c: &mut Peer| {
        let request = c.accept_websocket().await;
        match request.target() {
            "/flood" => {
                let mut message = c.frame_bytes(&Frame::text(&"x".repeat(1000)));
                message = message.repeat(2000);
                c.pump(&message).await;
                c.until_end().await;
            }
            "/deaf" => tokio::time::sleep(Duration::from_secs(2)).await,
            _ => backend::echo_on(c).await,
        }
    };
    let t = Scene::new("").backend(script).start();
    visit(&t, async |mut client| {
        let mut slow = client.open("/flood").await;
        let mut deaf = client.open("/deaf").await;
        let mut other = client.open("/").await;
        let frame = Frame::text(&"y".repeat(2000));
        let mut unread = pin!(async {
            loop {
                deaf.say(&frame).await;
            }
        });
        for _ in 0..200 {
            tokio::select! {
                () = other.echo("meanwhile") => {}
                () = &mut unread => {}
            }
        }
        for _ in 0..2000 {
            assert_eq!(slow.hear().await.expect("a message").text().len(), 1000);
        }
        other.close(1000).await;
    });
}

/// A connection without a stream is told to go, and goes.
#[test]
fn an_idle_connection_ends_with_goaway() {
    let t = Scene::new("http.header_timeout = '300ms'").start();
    let goaway = t.lab().place(Side::Client).run(|| {
        block_on(async {
            let mut raw = Raw::connect(t.proxy().address).await;
            raw.read_until(|_| false).await;
            raw.goaway
        })
    });
    assert_eq!(goaway, Some(0), "NO_ERROR");
    visit(&t, async |mut client| {
        // Longer than that, and silent.
        let mut session = client.open("/").await;
        tokio::time::sleep(Duration::from_millis(600)).await;
        session.echo("still here").await;
        session.close(1000).await;
    });
    t.no_rst();
}

/// Nor is one kept by a stream whose end its client does not take: h2 counts it for ever.
#[test]
fn an_answer_that_is_not_taken_keeps_no_connection() {
    let t = Scene::new("http.header_timeout = '300ms'\nwebsocket.write_timeout = '300ms'").start();
    let goaway = t.lab().place(Side::Client).run(|| {
        block_on(async {
            let mut raw = Raw::connect(t.proxy().address).await;
            // SETTINGS_INITIAL_WINDOW_SIZE 0, and a request that is refused at once: with a text that has no room.
            raw.send(&frame(4, 0, 0, &[0, 4, 0, 0, 0, 0])).await.expect("room");
            raw.send(&frame(1, 5, 1, b"\x82\x86\x84\x41\x03a,b")).await.expect("room");
            raw.read_until(|_| false).await;
            raw.goaway
        })
    });
    assert_eq!(goaway, Some(0), "NO_ERROR");
    assert_eq!(t.backend().count(), 0);
}

/// Over HTTP/1.1 a 200 fails a WebSocket's handshake. On a stream it would be its 200, and a page would be read as frames.
#[test]
fn an_answer_that_is_no_101_is_no_tunnel() {
    let t = Scene::new("")
        .backend(async |c| {
            c.read_head().await;
            c.reply(Message::status(200, "OK", "\u{1}\u{5}hello")).await;
            c.until_end().await;
        })
        .start();
    visit(&t, async |mut client| {
        let (response, _send) = client.ask(websocket("/"), false).await.expect("an answer");
        assert_eq!(response.status(), 502);
    });
    t.no_rst();
}

/// A drain says GOAWAY at the beginning of its window; sessions have their moments, and who comes late is refused so that it may go
/// elsewhere.
#[test]
fn a_drain_tells_each_stream() {
    let t = Scene::new("drain = { delay = '0s', window = '2s', quiet = '10ms' }").start();
    visit(&t, async |mut client| {
        let mut sessions = Vec::new();
        for _ in 0..8 {
            sessions.push(client.open("/").await);
        }
        for session in &mut sessions {
            session.echo("before").await;
        }
        t.proxy().sigterm();
        let refused = async {
            loop {
                match client.ask(websocket("/late"), false).await {
                    // The order is on its way.
                    Ok((_, mut send)) => send.send_reset(Reason::CANCEL),
                    Err(error) => return error,
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let error = timeout(DEADLINE, refused).await.expect("a refusal");
        let is_retriable = error.reason() == Some(Reason::REFUSED_STREAM)
            || error.is_go_away() && error.reason() == Some(Reason::NO_ERROR);
        assert!(is_retriable, "{error:?}");
        for mut session in sessions {
            let close = session.hear().await.expect("a Close");
            assert_eq!((close.opcode, close.code()), (CLOSE, 1001));
            session.say(&Frame::close(1001, "")).await;
            assert!(session.hear().await.is_none());
            let _ = session.send.send_data(Bytes::new(), true);
        }
    });
    assert_eq!(t.proxy().wait_exit(DEADLINE).code(), Some(0));
    t.no_rst();
}

/// With `http2.enabled = false` nobody is offered it.
#[test]
fn it_can_be_switched_off() {
    let t = Scene::new("http2.enabled = false").start();
    let answer = t.lab().place(Side::Client).run(|| {
        block_on(async {
            let mut stream = TcpStream::connect(t.proxy().address).await.expect("tidegate listens");
            stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("a connection");
            let mut answer = Vec::new();
            timeout(DEADLINE, stream.read_to_end(&mut answer)).await.expect("an end").expect("an end in order");
            answer
        })
    });
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"), "{answer:?}");
}

/// tidegate's own shared connections end in a tidegate, as they would in any backend that has streams.
#[test]
fn one_tidegate_behind_another() {
    let t = Scene::new("").start();
    let settings = "pool = { mode = 'multiplexed', idle_timeout = '0s' }";
    let outer = Proxy::start(t.lab(), settings, t.proxy().address, Instant::now());
    let to_outer = Dial { to: Some(outer.address), ..Dial::default() };
    for _ in 0..3 {
        t.client_with(to_outer, async |c| {
            c.handshake("/").await;
            c.send_text("hello").await;
            assert_eq!(c.read_text().await, "hello");
            c.send_close(4001, "bye").await;
            c.until_end().await.assert_closed_with(4001);
        });
    }
    let line = t.proxy().log_where("a session", |line| line["message"] == "open");
    assert_eq!(line["http"].as_str(), Some("h2"), "{line}");
    let line = outer.log_where("a session", |line| line["message"] == "open");
    assert_eq!(line["way"].as_str(), Some("multiplexed"), "{line}");
    outer.sigterm();
    assert_eq!(outer.wait_exit(DEADLINE).code(), Some(0));
    t.no_rst();
}
