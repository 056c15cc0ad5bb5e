//! An HTTP/2 server (RFC 8441) in front of a scripted backend: each stream becomes a connection to that, so that every script can
//! be played on a stream. Well-behaved or not, as a test wants it.
//!
//! `END_STREAM` is a FIN, and a reset a RST, in both directions. Whoever speaks HTTP/1.1 gets to the scripted backend unchanged.

use super::{
    Board, DEADLINE, Frame, LIMIT, Lab, Message, Side,
    http::KEY,
    lab::Place,
    ws::{CLOSE, PING, PONG, SeenFrame},
};
use bytes::Bytes;
use h2::{
    Reason, RecvStream, SendStream,
    server::{self, Connection, SendResponse},
};
use http::{HeaderName, HeaderValue, Request, Response, StatusCode};
use socket2::SockRef;
use std::{fmt, future::poll_fn, net::SocketAddr, sync::Arc, thread, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream, tcp},
    task::LocalSet,
};

/// What becomes of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treat {
    /// It is played by the script.
    Play,
    /// It is an echo that closes first, as a server should, and costs no other connection.
    Echo,
    /// The same as Hypercorn does it: it gives its name, and has forgotten the stream when it has answered a Close, without ending it. At
    /// `/refused` it answers with 403.
    Forget,
    /// It is answered with this status.
    Status(u16),
    /// The same, once [`Front::answer`] says so.
    LateStatus(u16),
    /// It is answered with a page and 200, as if it were any request.
    Page,
    /// It is reset.
    Reset(Reason),
    /// It gets no answer.
    Silence,
    /// It gets none, and its connection is closed.
    Close,
    /// It is accepted, and floods: messages of so many bytes, each in a DATA frame of its own, for as long as it may.
    Flood(usize),
}

/// What becomes of a connection that begins as HTTP/2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greets {
    /// With SETTINGS.
    Settings,
    /// `HTTP/1.1 400`, and FIN.
    Http400,
    /// What nobody understands.
    Garbage,
    /// FIN.
    Fin,
    /// Nothing.
    Nothing,
}

/// How a front behaves.
#[derive(Clone)]
pub struct Manners {
    /// By the connection's number.
    pub greets: Arc<dyn Fn(usize) -> Greets + Send + Sync>,
    pub advertises: bool,
    pub max_streams: u32,
    /// By its number, of all streams of all connections.
    pub treat: Arc<dyn Fn(usize) -> Treat + Send + Sync>,
}

impl Default for Manners {
    fn default() -> Self {
        let (greets, treat) = (Arc::new(|_| Greets::Settings), Arc::new(|_| Treat::Play));
        Self { greets, advertises: true, max_streams: 100, treat }
    }
}

impl fmt::Debug for Manners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Manners").field("advertises", &self.advertises).finish_non_exhaustive()
    }
}

/// What came in.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Connections of HTTP/2, in their order: the streams of each.
    pub streams: Vec<usize>,
    /// How those ended that have: whether by a FIN in order.
    pub ended: Vec<bool>,
    /// Connections of HTTP/1.1.
    pub plain: usize,
    /// Floods whose client has said that it is over.
    pub floods_over: usize,
    /// What came on streams that were forgotten: whether it was RST_STREAM.
    pub reset: Vec<bool>,
    /// The header of the last stream.
    pub request: Option<(String, Vec<(String, String)>)>,
    /// As many of the first connections are told to go away.
    goes_away: usize,
    /// As many of the first connections are neither read nor written.
    stands_still: usize,
    answers: bool,
    listening: Listening,
    is_over: bool,
}

/// Whether it takes connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Listening {
    #[default]
    Yes,
    /// It is to stop.
    Closing,
    No,
}

impl Seen {
    pub fn all_streams(&self) -> usize {
        self.streams.iter().sum()
    }
}

#[derive(Debug)]
pub struct Front {
    pub address: SocketAddr,
    seen: Board<Seen>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Front {
    pub fn start(lab: &Lab, manners: Manners, backend: SocketAddr) -> Self {
        let place: Place = lab.place(Side::Backend);
        let (address, seen) = (Board::new(None), Board::new(Seen::default()));
        let at = SocketAddr::new(lab.address(Side::Backend, Side::Proxy), 0);
        let run = {
            let (address, seen) = (address.clone(), seen.clone());
            move || {
                super::block(LocalSet::new().run_until(async move {
                    let listener = TcpListener::bind(at).await.expect("port 0 is free");
                    address.change(|a| *a = listener.local_addr().ok());
                    let over = async { while seen.until(LIMIT, |seen| seen.is_over.then_some(())).await.is_none() {} };
                    let all = seen.clone();
                    // It has the listener, which goes with it.
                    let accept = async move {
                        while let Ok((stream, _)) = listener.accept().await {
                            let (manners, seen) = (manners.clone(), all.clone());
                            tokio::task::spawn_local(async move { serve(stream, manners, seen, backend).await });
                        }
                    };
                    let closing = |seen: &Seen| (seen.listening == Listening::Closing).then_some(());
                    let closes = async { while seen.until(LIMIT, closing).await.is_none() {} };
                    let listens = async {
                        tokio::select! { () = accept => {}, () = closes => {} }
                        seen.change(|seen| seen.listening = Listening::No);
                        std::future::pending::<()>().await;
                    };
                    tokio::select! { () = over => {}, () = listens => {} }
                }));
            }
        };
        let thread = Some(place.spawn("front", run));
        let address = address.wait(DEADLINE, |address| *address).expect("a listening front");
        Self { address, seen, thread }
    }

    pub fn seen(&self) -> Seen {
        self.seen.read(Clone::clone)
    }

    /// Waits until what came in is as `test` wants it.
    #[track_caller]
    pub fn seen_when(&self, what: &str, test: impl Fn(&Seen) -> bool) -> Seen {
        let found = self.seen.wait(DEADLINE, |seen| test(seen).then(|| seen.clone()));
        found.unwrap_or_else(|| panic!("the front never saw {what}: {:?}", self.seen()))
    }

    /// GOAWAY on all connections that there are; what is open on them goes on.
    pub fn go_away(&self) {
        self.seen.change(|seen| seen.goes_away = seen.streams.len());
    }

    /// All connections that there are stand still, as those of a process that was stopped: their kernel takes what comes, and nobody
    /// answers. Who comes then is served.
    pub fn stand_still(&self) {
        self.seen.change(|seen| seen.stands_still = seen.streams.len());
    }

    /// They go on.
    pub fn go_on(&self) {
        self.seen.change(|seen| seen.stands_still = 0);
    }

    /// Streams that wait for this are answered.
    pub fn answer(&self) {
        self.seen.change(|seen| seen.answers = true);
    }

    /// Closes the listener: new connections are refused, the others go on.
    pub async fn stop_listening(&self) {
        self.seen.change(|seen| seen.listening = Listening::Closing);
        let closed = self.seen.until(DEADLINE, |seen| (seen.listening == Listening::No).then_some(())).await;
        closed.expect("the front's thread closes its listener");
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.seen.change(|seen| seen.is_over = true);
        // A panic of the thread was printed by it; here it must not become a second one.
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

async fn serve(mut stream: TcpStream, manners: Manners, seen: Board<Seen>, backend: SocketAddr) {
    stream.set_nodelay(true).expect("a socket");
    let mut first = [0; 3];
    while let Ok(1..=2) = stream.peek(&mut first).await {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    if &first != b"PRI" {
        seen.change(|seen| seen.plain += usize::from(first != [0; 3]));
        if let Ok(mut to) = TcpStream::connect(backend).await {
            let _ = copy_bidirectional(&mut stream, &mut to).await;
        }
        return;
    }
    let index = seen.change(|seen| {
        seen.streams.push(0);
        seen.streams.len() - 1
    });
    let greets = (manners.greets)(index);
    let greeting: &[u8] = match greets {
        Greets::Settings => {
            let mut builder = server::Builder::new();
            builder.max_concurrent_streams(manners.max_streams).initial_connection_window_size(16 << 20);
            if manners.advertises {
                builder.enable_connect_protocol();
            }
            if let Ok(connection) = builder.handshake(stream).await {
                let in_order = streams(connection, index, &manners, &seen, backend).await;
                seen.change(|seen| seen.ended.push(in_order));
            }
            return;
        }
        Greets::Http400 => b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        Greets::Garbage => b"220 mail.example ESMTP, what can I do for you today?\r\n",
        Greets::Fin | Greets::Nothing => b"",
    };
    let _ = stream.write_all(greeting).await;
    if greets != Greets::Nothing {
        let _ = stream.shutdown().await;
    }
    let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
}

/// True: it ended in order.
async fn streams(
    mut connection: Connection<TcpStream, Bytes>,
    index: usize,
    manners: &Manners,
    seen: &Board<Seen>,
    backend: SocketAddr,
) -> bool {
    let mut has_gone = false;
    loop {
        let accepted = tokio::select! {
            accepted = connection.accept() => accepted,
            Some(()) = seen.until(LIMIT, |seen| (seen.goes_away > index).then_some(())), if !has_gone => {
                has_gone = true;
                connection.graceful_shutdown();
                continue;
            }
            Some(()) = seen.until(LIMIT, |seen| (seen.stands_still > index).then_some(())) => {
                while seen.until(LIMIT, |seen| (seen.stands_still <= index).then_some(())).await.is_none() {}
                continue;
            }
        };
        let Some(Ok((request, response))) = accepted else {
            return accepted.is_none();
        };
        let number = seen.change(|seen| {
            seen.streams[index] += 1;
            let fields = request
                .headers()
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_str().expect("printable").to_owned()));
            seen.request = Some((format!("{} {}", request.method(), request.uri()), fields.collect()));
            seen.all_streams() - 1
        });
        let how = (manners.treat)(number);
        if how == Treat::Close {
            return false;
        }
        tokio::task::spawn_local(treat(request, response, how, backend, seen.clone()));
    }
}

async fn treat(
    request: Request<RecvStream>,
    mut response: SendResponse<Bytes>,
    treat: Treat,
    backend: SocketAddr,
    seen: Board<Seen>,
) {
    let answer = |status: u16| {
        let mut answer = Response::new(());
        *answer.status_mut() = StatusCode::from_u16(status).expect("a status");
        answer
    };
    match treat {
        Treat::Play => {
            // A stream that is gone already.
            let _ = play(request, response, backend).await;
        }
        Treat::Echo => {
            if let Ok(mut send) = response.send_response(answer(200), false) {
                let _ = echo(request.into_body(), &mut send).await;
            }
        }
        Treat::Forget => {
            let is_refused = request.uri().path() == "/refused";
            let mut answer = answer(if is_refused { 403 } else { 200 });
            answer.headers_mut().insert("server", HeaderValue::from_static("hypercorn-h2"));
            let Ok(mut send) = response.send_response(answer, is_refused) else { return };
            let mut body = request.into_body();
            if is_refused || until_close(&mut body, &mut send).await.is_ok() {
                let is_reset = matches!(body.data().await, Some(Err(error)) if error.is_reset());
                seen.change(|seen| seen.reset.push(is_reset));
            }
        }
        Treat::Status(status) | Treat::LateStatus(status) => {
            if matches!(treat, Treat::LateStatus(_)) {
                while seen.until(LIMIT, |seen| seen.answers.then_some(())).await.is_none() {}
            }
            if let Ok(mut send) = response.send_response(answer(status), false) {
                let _ = send.send_data(Bytes::from_static(b"no"), true);
            }
        }
        Treat::Page => {
            let mut answer = answer(200);
            answer.headers_mut().insert("content-type", HeaderValue::from_static("text/html"));
            if let Ok(mut send) = response.send_response(answer, false) {
                let _ = send.send_data(Bytes::from_static(b"<p>a page"), true);
            }
        }
        // Told apart before.
        Treat::Close => {}
        Treat::Silence => _ = poll_fn(|cx| response.poll_reset(cx)).await,
        Treat::Reset(reason) => response.send_reset(reason),
        Treat::Flood(size) => {
            let Ok(mut send) = response.send_response(answer(200), false) else { return };
            let mut message = vec![0x82, u8::try_from(size - 2).expect("a short one")];
            message.resize(size, b'x');
            let message = Bytes::from(message);
            let mut body = request.into_body();
            tokio::select! {
                () = async { while write(&mut send, message.clone()).await.is_ok() {} } => {}
                // Its windows are as large as the client's patience.
                () = async { while let Some(Ok(bytes)) = body.data().await {
                    let _ = body.flow_control().release_capacity(bytes.len());
                } } => {
                    seen.change(|seen| seen.floods_over += 1);
                    let _ = send.send_data(Bytes::new(), true);
                }
            }
        }
    }
}

async fn echo(mut body: RecvStream, send: &mut SendStream<Bytes>) -> Result<(), ()> {
    until_close(&mut body, send).await?;
    send.send_data(Bytes::new(), true).map_err(|_| ())?;
    while let Some(Ok(bytes)) = body.data().await {
        let _ = body.flow_control().release_capacity(bytes.len());
    }
    Ok(())
}

/// Echoes until it has answered a Close.
async fn until_close(body: &mut RecvStream, send: &mut SendStream<Bytes>) -> Result<(), ()> {
    let mut read = Vec::new();
    while let Some(Ok(bytes)) = body.data().await {
        let _ = body.flow_control().release_capacity(bytes.len());
        read.extend_from_slice(&bytes);
        while let Some((frame, length)) = SeenFrame::parse(&read, Duration::ZERO) {
            read.drain(..length);
            let answer = match frame.opcode {
                CLOSE => Frame::new(CLOSE, &frame.payload[..frame.payload.len().min(2)]),
                PING => Frame::new(PONG, &frame.payload),
                PONG => continue,
                _ => frame.again(),
            };
            write(send, answer.bytes(None).into()).await?;
            if frame.opcode == CLOSE {
                return Ok(());
            }
        }
    }
    Err(())
}

/// Writes one DATA frame.
pub async fn write(send: &mut SendStream<Bytes>, bytes: Bytes) -> Result<(), ()> {
    let mut bytes = bytes;
    while !bytes.is_empty() {
        send.reserve_capacity(bytes.len());
        if send.capacity() == 0 {
            poll_fn(|cx| send.poll_capacity(cx)).await.ok_or(())?.map_err(|_| ())?;
            continue;
        }
        let now = bytes.split_to(bytes.len().min(send.capacity()));
        send.send_data(now, false).map_err(|_| ())?;
    }
    Ok(())
}

async fn play(
    request: Request<RecvStream>,
    mut response: SendResponse<Bytes>,
    backend: SocketAddr,
) -> Result<(), h2::Error> {
    let mut to = TcpStream::connect(backend).await.expect("a scripted backend");
    to.set_nodelay(true).expect("a socket");
    let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
    let mut head = Message::line(&format!("GET {target} HTTP/1.1"))
        .header("Host", request.uri().authority().map_or("", |host| host.as_str()))
        .header("Upgrade", "websocket")
        .header("Connection", "Upgrade")
        .header("Sec-WebSocket-Key", KEY);
    for (name, value) in request.headers() {
        head = head.header(name.as_str(), value.to_str().expect("printable"));
    }
    let mut body = request.into_body();
    let _ = to.write_all(&head.bytes()).await;
    let mut read = Vec::new();
    let head = loop {
        let mut chunk = [0; 4096];
        tokio::select! {
            count = to.read(&mut chunk) => match count {
                Ok(0) | Err(_) => {
                    response.send_reset(Reason::CANCEL);
                    return Ok(());
                }
                Ok(count) => read.extend_from_slice(&chunk[..count]),
            },
            reset = poll_fn(|cx| response.poll_reset(cx)) => {
                reset_tcp(&to);
                return reset.map(|_| ());
            }
        }
        if let Some((head, length)) = Message::parse_head(&read) {
            read.drain(..length);
            break head;
        }
    };
    let mut answer = Response::new(());
    *answer.status_mut() = StatusCode::from_u16(if head.code() == 101 { 200 } else { head.code() }).expect("a status");
    for (name, value) in &head.fields {
        let name: HeaderName = name.parse().expect("a name");
        if !["connection", "upgrade", "sec-websocket-accept"].contains(&name.as_str()) {
            answer.headers_mut().append(name, HeaderValue::from_str(value).expect("a value"));
        }
    }
    let mut send = response.send_response(answer, false)?;
    let (from, into) = to.split();
    let up = upward(&mut body, into);
    let down = downward(&mut send, from, read);
    let (up, down) = tokio::join!(up, down);
    if up.is_err() || down.is_err() {
        // The one that noticed has told its own side.
        reset_tcp(&to);
        send.send_reset(Reason::CANCEL);
    }
    Ok(())
}

async fn upward(body: &mut RecvStream, mut into: tcp::WriteHalf<'_>) -> Result<(), ()> {
    loop {
        match body.data().await {
            None => {
                let _ = into.shutdown().await;
                return Ok(());
            }
            Some(Ok(bytes)) => {
                // When it fails, that is found by whoever reads.
                let _ = into.write_all(&bytes).await;
                let _ = body.flow_control().release_capacity(bytes.len());
            }
            Some(Err(_)) => {
                let socket = SockRef::from(into.as_ref());
                #[expect(clippy::disallowed_methods, reason = "a RST of the other side is passed on as one")]
                let _ = socket.set_linger(Some(Duration::ZERO));
                let _ = socket.shutdown(std::net::Shutdown::Both);
                return Err(());
            }
        }
    }
}

async fn downward(send: &mut SendStream<Bytes>, mut from: tcp::ReadHalf<'_>, early: Vec<u8>) -> Result<(), ()> {
    if write(send, early.into()).await.is_err() {
        return Err(());
    }
    loop {
        let mut chunk = vec![0; 16 << 10];
        match from.read(&mut chunk).await {
            Ok(0) => return send.send_data(Bytes::new(), true).map_err(|_| ()),
            Ok(count) => {
                chunk.truncate(count);
                write(send, chunk.into()).await?;
            }
            Err(_) => {
                // h2 drops what was not written yet, and the connection's task has its turn first.
                for _ in 0..8 {
                    tokio::task::yield_now().await;
                }
                send.send_reset(Reason::CANCEL);
                return Err(());
            }
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "a RST of the other side is passed on as one")]
fn reset_tcp(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}
