//! An HTTP/2 client (RFC 8441) between scripted clients and tidegate: each connection of theirs becomes a stream of one that all share,
//! so that every script can be played on a stream.
//!
//! `END_STREAM` is a FIN, and a reset a RST, in both directions. A reset without an error, behind END_STREAM, is nothing (RFC 9113 8.1).
//! Over TLS, where clients speak it.

use super::{Board, DEADLINE, LIMIT, Lab, Message, Side, front::write, lab::Place, tls::CLIENTS_NAME};
use bytes::Bytes;
use h2::{
    Reason, RecvStream, SendStream,
    client::{self, ResponseFuture, SendRequest},
    ext::Protocol,
};
use http::{Method, Request, Version};
use socket2::SockRef;
use std::{cell::RefCell, future::poll_fn, net::SocketAddr, pin::Pin, rc::Rc, sync::Arc, thread, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, duplex, split},
    net::{TcpListener, TcpStream, tcp},
    task::LocalSet,
    time::{sleep, timeout},
};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, pki_types::ServerName},
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// How long the connection waits for another stream.
const IDLE: Duration = Duration::from_millis(100);

/// What went over it.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Streams that were begun.
    pub streams: usize,
    /// Those that tidegate has reset, by the reason.
    pub resets: Vec<Reason>,
    /// Connections that ended: whether in order, by GOAWAY without an error.
    pub ended: Vec<bool>,
    /// Connections that were opened.
    pub connections: usize,
    /// Sockets that are over: whether by a FIN, over TLS one with a `close_notify` before it.
    pub closed: Vec<bool>,
    is_over: bool,
}

#[derive(Debug)]
pub struct Streams {
    /// Where scripted clients connect.
    pub address: SocketAddr,
    seen: Board<Seen>,
    thread: Option<thread::JoinHandle<()>>,
}

/// Where it connects.
#[derive(Clone)]
struct To {
    address: SocketAddr,
    tls: Option<TlsConnector>,
}

/// It agrees on HTTP/2.
fn connector(mut config: ClientConfig) -> TlsConnector {
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config).into()
}

type Shared = Rc<RefCell<Option<(SendRequest<Bytes>, Rc<()>)>>>;

impl Streams {
    pub fn start(lab: &Lab, to: SocketAddr, tls: Option<&ClientConfig>) -> Self {
        let to = To { address: to, tls: tls.cloned().map(connector) };
        let place: Place = lab.place(Side::Client);
        let (address, seen) = (Board::new(None), Board::new(Seen::default()));
        let own = SocketAddr::new(lab.address(Side::Client, Side::Client), 0);
        let run = {
            let (address, seen) = (address.clone(), seen.clone());
            move || {
                super::block(LocalSet::new().run_until(async move {
                    let listener = TcpListener::bind(own).await.expect("port 0 is free");
                    address.change(|a| *a = listener.local_addr().ok());
                    let shared = Shared::default();
                    let over = async { while seen.until(LIMIT, |seen| seen.is_over.then_some(())).await.is_none() {} };
                    let accept = async {
                        while let Ok((stream, _)) = listener.accept().await {
                            let (shared, seen, to) = (Rc::clone(&shared), seen.clone(), to.clone());
                            tokio::task::spawn_local(async move {
                                stream.set_nodelay(true).expect("a socket");
                                play(stream, &shared, &to, &seen).await;
                            });
                        }
                    };
                    tokio::select! { () = over => {}, () = accept => {} }
                }));
            }
        };
        let thread = Some(place.spawn("streams", run));
        let address = address.wait(DEADLINE, |address| *address).expect("a listening client of HTTP/2");
        Self { address, seen, thread }
    }

    pub fn seen(&self) -> Seen {
        self.seen.read(Clone::clone)
    }

    /// Waits until what went over it is as `test` wants it.
    #[track_caller]
    pub fn seen_when(&self, what: &str, test: impl Fn(&Seen) -> bool) -> Seen {
        let found = self.seen.wait(DEADLINE, |seen| test(seen).then(|| seen.clone()));
        found.unwrap_or_else(|| panic!("never {what}: {:?}", self.seen()))
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.seen.change(|seen| seen.is_over = true);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

/// Copies what h2 says to a socket, and what comes to h2; reads until the other side's FIN, whatever h2 does. True: that came in order.
pub async fn carry(near: DuplexStream, far: impl AsyncRead + AsyncWrite) -> bool {
    let ((mut from_h2, mut to_h2), (mut read, mut write)) = (split(near), split(far));
    let out = async {
        let _ = tokio::io::copy(&mut from_h2, &mut write).await;
        let _ = write.shutdown().await;
    };
    let back = async {
        let mut chunk = vec![0; 64 << 10];
        let mut is_gone = false;
        let last = loop {
            match read.read(&mut chunk).await {
                Ok(count @ 1..) => is_gone = is_gone || to_h2.write_all(&chunk[..count]).await.is_err(),
                last => break last,
            }
        };
        let _ = to_h2.shutdown().await;
        last.is_ok()
    };
    tokio::join!(out, back).1
}

/// The connection that is there, or a new one.
async fn reach(shared: &Shared, to: &To, seen: &Board<Seen>) -> (SendRequest<Bytes>, Rc<()>) {
    if let Some((sender, used)) = &*shared.borrow()
        && sender.is_extended_connect_protocol_enabled()
    {
        return (sender.clone(), Rc::clone(used));
    }
    let socket = TcpStream::connect(to.address).await.expect("tidegate listens");
    socket.set_nodelay(true).expect("a socket");
    let (near, own) = duplex(64 << 10);
    let carried: Pin<Box<dyn Future<Output = bool>>> = match &to.tls {
        None => Box::pin(carry(near, socket)),
        Some(connector) => {
            let name = ServerName::try_from(CLIENTS_NAME).expect("a name");
            let stream = connector.connect(name, socket).await.expect("a handshake of TLS");
            assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
            Box::pin(carry(near, stream))
        }
    };
    let board = seen.clone();
    tokio::task::spawn_local(async move {
        let in_order = carried.await;
        board.change(|seen| seen.closed.push(in_order));
    });
    let (sender, connection) = client::handshake(own).await.expect("a preface");
    seen.change(|seen| seen.connections += 1);
    let used = Rc::new(());
    let (of, board) = (Rc::clone(shared), seen.clone());
    let mine = Rc::clone(&used);
    tokio::task::spawn_local(async move {
        let result = connection.await;
        of.borrow_mut().take_if(|(_, used)| Rc::ptr_eq(used, &mine));
        board.change(|seen| seen.ended.push(result.is_ok()));
    });
    let greeted = async {
        while !sender.is_extended_connect_protocol_enabled() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(DEADLINE, greeted).await.expect("SETTINGS with extended CONNECT");
    let mut slot = shared.borrow_mut();
    let (sender, used) = slot.get_or_insert((sender, used));
    let found = (sender.clone(), Rc::clone(used));
    drop(slot);
    let of = Rc::clone(shared);
    // Ends with the last of its streams.
    tokio::task::spawn_local(async move {
        let mut idle = Duration::ZERO;
        while idle < IDLE {
            sleep(IDLE / 4).await;
            // Held here: by the slot, by the task of the connection.
            let is_idle = of.borrow().as_ref().is_none_or(|(_, used)| Rc::strong_count(used) <= 2);
            idle = if is_idle { idle + IDLE / 4 } else { Duration::ZERO };
        }
        of.borrow_mut().take();
    });
    found
}

async fn play(mut from: TcpStream, shared: &Shared, to: &To, seen: &Board<Seen>) {
    let mut read = Vec::new();
    let head = loop {
        let mut chunk = [0; 4096];
        match from.read(&mut chunk).await {
            Ok(0) | Err(_) => return,
            Ok(count) => read.extend_from_slice(&chunk[..count]),
        }
        if let Some((head, length)) = Message::parse_head(&read) {
            read.drain(..length);
            break head;
        }
    };
    let (mut sender, _used) = reach(shared, to, seen).await;
    let Some((key, request)) = bridge(&head) else { panic!("no handshake: {head:?}") };
    let begun = async {
        poll_fn(|cx| sender.poll_ready(cx)).await?;
        sender.send_request(request, false)
    };
    let Ok((response, send)) = begun.await else { return reset_tcp(&from) };
    seen.change(|seen| seen.streams += 1);
    relay(from, response, send, &key, read, seen).await;
}

/// A handshake of HTTP/1.1 as one of HTTP/2, with its key.
fn bridge(head: &Message) -> Option<(String, Request<()>)> {
    let target = head.line.split(' ').nth(1)?;
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri(format!("http://{}{target}", head.field("Host")?))
        .version(Version::HTTP_2)
        .extension(Protocol::from_static("websocket"));
    for (name, value) in &head.fields {
        let name = name.to_ascii_lowercase();
        if !["host", "connection", "upgrade", "sec-websocket-key"].contains(&name.as_str()) {
            request = request.header(name, value);
        }
    }
    Some((head.field("Sec-WebSocket-Key")?.to_owned(), request.body(()).ok()?))
}

async fn relay(
    mut from: TcpStream,
    response: ResponseFuture,
    mut send: SendStream<Bytes>,
    key: &str,
    early: Vec<u8>,
    seen: &Board<Seen>,
) {
    let mut gone = [0];
    let response = tokio::select! {
        response = response => response,
        // Only an end: what comes early waits.
        Err(()) = async { loop {
            match from.peek(&mut gone).await {
                Ok(0) => return Err::<(), ()>(()),
                Ok(_) => sleep(Duration::from_millis(1)).await,
                Err(_) => return Err(()),
            }
        } } => {
            return send.send_reset(Reason::CANCEL);
        }
    };
    let response = match response {
        Ok(response) => response,
        Err(error) => {
            seen.change(|seen| seen.resets.extend(error.reason().filter(|_| error.is_remote())));
            return reset_tcp(&from);
        }
    };
    let is_tunnel = response.status().is_success();
    let line = if is_tunnel { "101 Switching Protocols".to_owned() } else { response.status().to_string() };
    let mut head = Message::line(&format!("HTTP/1.1 {line}"));
    for (name, value) in response.headers() {
        head = head.header(name.as_str(), value.to_str().expect("printable"));
    }
    if is_tunnel {
        let accept = derive_accept_key(key.as_bytes());
        head =
            head.header("Upgrade", "websocket").header("Connection", "Upgrade").header("Sec-WebSocket-Accept", &accept);
    }
    let _ = from.write_all(&head.bytes()).await;
    let mut body = response.into_body();
    let (read, into) = from.split();
    let (up, down) = tokio::join!(upward(&mut send, read, early), downward(&mut body, into, seen));
    if up.is_err() || down.is_err() {
        reset_tcp(&from);
        send.send_reset(Reason::CANCEL);
    }
}

async fn upward(send: &mut SendStream<Bytes>, mut from: tcp::ReadHalf<'_>, early: Vec<u8>) -> Result<(), ()> {
    // Where it was reset without an error, that is what the other direction has seen.
    let mut is_heard = write(send, early.into()).await.is_ok();
    loop {
        let mut chunk = vec![0; 16 << 10];
        match from.read(&mut chunk).await {
            Ok(0) => {
                let _ = send.send_data(Bytes::new(), true);
                return Ok(());
            }
            Ok(count) => {
                chunk.truncate(count);
                is_heard = is_heard && write(send, chunk.into()).await.is_ok();
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

async fn downward(body: &mut RecvStream, mut into: tcp::WriteHalf<'_>, seen: &Board<Seen>) -> Result<(), ()> {
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
            Some(Err(error)) => {
                seen.change(|seen| seen.resets.extend(error.reason().filter(|_| error.is_remote())));
                let socket = SockRef::from(into.as_ref());
                #[expect(clippy::disallowed_methods, reason = "a RST of the other side is passed on as one")]
                let _ = socket.set_linger(Some(Duration::ZERO));
                let _ = socket.shutdown(std::net::Shutdown::Both);
                return Err(());
            }
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "a RST of the other side is passed on as one")]
fn reset_tcp(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}
