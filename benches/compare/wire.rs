//! WebSocket on raw bytes, for both ends of the measurement, made to cost little: frames are prepared once, received
//! payloads are counted and not looked at, reads go through one buffer per thread. It shares no code with tidegate. Over TCP, TLS, or a stream
//! of HTTP/2.

use std::{
    cell::RefCell,
    io::{self, ErrorKind},
    mem,
    net::SocketAddr,
    pin::Pin,
    task::{Poll, ready},
    time::Instant,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use tokio::{
    io::{AsyncRead as _, AsyncWriteExt as _, BufReader, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// Opcodes of RFC 6455 5.2.
pub const BINARY: u8 = 0x2;
pub const CLOSE: u8 = 0x8;
const PING: u8 = 0x9;
const PONG: u8 = 0xA;

/// 1000, a normal closure.
pub const CLOSE_NORMAL: [u8; 2] = 1000_u16.to_be_bytes();

/// The path of a session with the feed, that of one that is left in the middle (`audit.rs`), and that of all others.
pub const FEED: &str = "/feed";
pub const AUDIT: &str = "/audit";
const ECHO: &str = "/echo";

/// The key and the answer of the example in RFC 6455 1.3.
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// The same for all frames: that proxies see random ones is a promise between browsers and the network, not needed here.
const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

const SCRATCH_BYTES: usize = 256 * 1024;
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// The answer to a plain request.
const PLAIN_BODY_BYTES: usize = 1024;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH_BYTES]);
}

/// Who masks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Client,
    Backend,
}

/// A final frame as `role` sends it.
pub fn frame(role: Role, opcode: u8, payload: &[u8]) -> Vec<u8> {
    let masked: u8 = if role == Role::Client { 0x80 } else { 0 };
    let mut frame = vec![0x80 | opcode];
    if let Ok(short @ 0..126) = u8::try_from(payload.len()) {
        frame.push(masked + short);
    } else if let Ok(medium) = u16::try_from(payload.len()) {
        frame.push(masked + 126);
        frame.extend(medium.to_be_bytes());
    } else {
        frame.push(masked + 127);
        frame.extend((payload.len() as u64).to_be_bytes());
    }
    match role {
        Role::Client => {
            frame.extend(MASK);
            frame.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        }
        Role::Backend => frame.extend(payload),
    }
    frame
}

/// What arrived: the length of its payload, and the payload itself only if it is a control frame's.
#[derive(Debug)]
pub struct Received {
    pub opcode: u8,
    pub length: usize,
    pub control: Vec<u8>,
    /// The first bytes of a backend's data, as far as there are so many.
    pub first: [u8; FIRST],
}

/// A feed says there when it was sent.
const FIRST: usize = 8;

/// Where the reading of a frame stands.
#[derive(Debug, Default)]
pub struct Reader {
    header: [u8; 14],
    header_have: usize,
    /// None: within the header.
    payload_left: Option<usize>,
    control: Vec<u8>,
    first: [u8; FIRST],
    first_have: usize,
}

impl Reader {
    /// Takes bytes up to the end of a frame, and says how many. None: all were taken, and more are needed.
    pub fn take(&mut self, bytes: &[u8]) -> Option<(Received, usize)> {
        let mut taken = 0;
        let left = loop {
            if let Some(left) = self.payload_left {
                break left;
            }
            let length_bytes = match self.header[1] & 0x7f {
                126 => 2,
                127 => 8,
                _ => 0,
            };
            let mask_bytes = if self.header[1] & 0x80 == 0 { 0 } else { 4 };
            let need = if self.header_have < 2 { 2 } else { 2 + length_bytes + mask_bytes };
            let missing = need - self.header_have;
            if missing > 0 {
                let now = missing.min(bytes.len() - taken);
                self.header[self.header_have..][..now].copy_from_slice(&bytes[taken..][..now]);
                self.header_have += now;
                taken += now;
                if now < missing {
                    return None;
                }
            } else {
                self.payload_left = Some(self.length());
            }
        };
        let now = left.min(bytes.len() - taken);
        if self.header[0] & 0x08 != 0 {
            self.control.extend(&bytes[taken..][..now]);
        } else if self.first_have < FIRST {
            let first = now.min(FIRST - self.first_have);
            self.first[self.first_have..][..first].copy_from_slice(&bytes[taken..][..first]);
            self.first_have += first;
        }
        taken += now;
        self.payload_left = Some(left - now);
        if left > now {
            return None;
        }
        let mut control = mem::take(&mut self.control);
        if self.header[1] & 0x80 != 0 {
            let mask: [u8; 4] = self.header[self.header_have - 4..][..4].try_into().expect("four bytes");
            control.iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
        }
        let received = Received { opcode: self.header[0] & 0x0f, length: self.length(), control, first: self.first };
        self.first_have = 0;
        self.header_have = 0;
        self.payload_left = None;
        Some((received, taken))
    }

    /// Of a complete header.
    fn length(&self) -> usize {
        let bytes = match self.header[1] & 0x7f {
            126 => &self.header[2..4],
            127 => &self.header[2..10],
            short => return short.into(),
        };
        bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte))
    }
}

/// What a client wanted of the backend.
#[derive(Debug)]
pub enum Request {
    Session(Connection),
    /// A session with the feed.
    Feed(Connection),
    /// A session whose end is looked at.
    Audit(Connection),
    /// Plain requests: all of them were answered.
    Answered,
}

/// What a connection goes over.
#[derive(Debug)]
pub enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<BufReader<TcpStream>>>),
    Http2(SendStream<Bytes>, RecvStream),
}

/// One end of an upgraded connection.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    role: Role,
    reader: Reader,
    /// Arrived behind the frame that was asked for; mostly empty.
    rest: Vec<u8>,
}

impl Connection {
    /// Connects and upgrades.
    pub async fn open(address: SocketAddr) -> io::Result<Self> {
        Self::open_at(address, ECHO).await
    }

    /// Connects and upgrades at a path.
    pub async fn open_at(address: SocketAddr, path: &str) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Self::upgrade_to(Stream::Plain(stream), address, path).await
    }

    /// Of a client, upgraded.
    pub fn client(stream: Stream) -> Self {
        Self::new(stream, Role::Client)
    }

    /// Upgrades a connection to `address`.
    pub async fn upgrade(stream: Stream, address: SocketAddr) -> io::Result<Self> {
        Self::upgrade_to(stream, address, ECHO).await
    }

    async fn upgrade_to(stream: Stream, address: SocketAddr, path: &str) -> io::Result<Self> {
        let mut connection = Self::new(stream, Role::Client);
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n\r\n"
        );
        connection.write(request.as_bytes()).await?;
        let head = connection.head().await?;
        if head.starts_with("HTTP/1.1 101 ") && header(&head, "sec-websocket-accept") == Some(ACCEPT) {
            Ok(connection)
        } else {
            Err(io::Error::other(format!("not upgraded: {}", head.lines().next().unwrap_or_default())))
        }
    }

    /// A plain request on a connection to `address`, its whole answer, and the peer's FIN.
    pub async fn get(stream: TcpStream, address: SocketAddr) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut connection = Self::new(Stream::Plain(stream), Role::Client);
        let request = format!("GET /plain HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        connection.write(request.as_bytes()).await?;
        let head = connection.head().await?;
        let length = header(&head, "content-length").and_then(|length| length.parse().ok());
        if !head.starts_with("HTTP/1.1 200 ") || length != Some(PLAIN_BODY_BYTES) {
            return Err(io::Error::other(format!("not answered: {}", head.lines().next().unwrap_or_default())));
        }
        let mut have = connection.rest.len();
        while let Some(now) = read(&mut connection.stream, <[u8]>::len).await? {
            have += now;
        }
        if have == PLAIN_BODY_BYTES { Ok(()) } else { Err(ErrorKind::UnexpectedEof.into()) }
    }

    /// Reads a request. One for an upgrade is answered with 101; all others are answered until the end of the connection.
    pub async fn accept(stream: TcpStream) -> io::Result<Request> {
        stream.set_nodelay(true)?;
        let mut connection = Self::new(Stream::Plain(stream), Role::Backend);
        loop {
            let head = match connection.head().await {
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(Request::Answered),
                head => head?,
            };
            if let Some(key) = header(&head, "sec-websocket-key") {
                let response = format!(
                    "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                     Sec-WebSocket-Accept: {}\r\n\r\n",
                    derive_accept_key(key.as_bytes())
                );
                connection.write(response.as_bytes()).await?;
                return Ok(match head.split(' ').nth(1) {
                    Some(FEED) => Request::Feed(connection),
                    Some(AUDIT) => Request::Audit(connection),
                    _ => Request::Session(connection),
                });
            }
            let last = header(&head, "connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
            let connection_field = if last { "Connection: close\r\n" } else { "" };
            let mut response =
                format!("HTTP/1.1 200 OK\r\n{connection_field}Content-Length: {PLAIN_BODY_BYTES}\r\n\r\n");
            response.extend(std::iter::repeat_n('x', PLAIN_BODY_BYTES));
            connection.write(response.as_bytes()).await?;
            if last {
                connection.shutdown().await?;
                connection.until_fin().await?;
                return Ok(Request::Answered);
            }
        }
    }

    /// The socket, of which nothing more was read than what was asked for.
    pub fn into_tcp(self) -> io::Result<TcpStream> {
        match self.stream {
            Stream::Plain(stream) if self.rest.is_empty() => Ok(stream),
            _ => Err(io::Error::other("not a socket alone")),
        }
    }

    fn new(stream: Stream, role: Role) -> Self {
        Self { stream, role, reader: Reader::default(), rest: Vec::new() }
    }

    async fn head(&mut self) -> io::Result<String> {
        let mut head = mem::take(&mut self.rest);
        loop {
            if let Some(end) = head.windows(4).position(|four| four == b"\r\n\r\n") {
                self.rest = head.split_off(end + 4);
                return String::from_utf8(head).map_err(io::Error::other);
            }
            if head.len() > HEAD_BYTES_MAX {
                return Err(io::Error::other("a head without an end"));
            }
            if read(&mut self.stream, |bytes| head.extend(bytes)).await?.is_none() {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
    }

    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.stream {
            Stream::Plain(stream) => stream.write_all(bytes).await,
            Stream::Tls(stream) => {
                stream.write_all(bytes).await?;
                stream.flush().await
            }
            // What the peer's windows do not allow yet waits in h2: one message at most.
            Stream::Http2(send, _) => send.send_data(Bytes::copy_from_slice(bytes), false).map_err(io::Error::other),
        }
    }

    async fn shutdown(&mut self) -> io::Result<()> {
        match &mut self.stream {
            Stream::Plain(stream) => stream.shutdown().await,
            Stream::Tls(stream) => stream.shutdown().await,
            Stream::Http2(send, _) => send.send_data(Bytes::new(), true).map_err(io::Error::other),
        }
    }

    /// The next data or Close frame. Pings are answered, Pongs passed over. None: the peer's FIN.
    pub async fn next(&mut self) -> io::Result<Option<Received>> {
        loop {
            let Self { stream, reader, rest, .. } = self;
            let found = if rest.is_empty() {
                let taken = read(stream, |bytes| {
                    let found = reader.take(bytes);
                    if let Some((_, taken)) = &found {
                        rest.extend(&bytes[*taken..]);
                    }
                    found
                });
                let Some(found) = taken.await? else { return Ok(None) };
                found
            } else {
                let found = reader.take(rest);
                let taken = found.as_ref().map_or(rest.len(), |(_, taken)| *taken);
                rest.drain(..taken);
                found
            };
            match found {
                Some((Received { opcode: PING, control, .. }, _)) => {
                    self.write(&frame(self.role, PONG, &control)).await?;
                }
                None | Some((Received { opcode: PONG, .. }, _)) => {}
                Some((received, _)) => return Ok(Some(received)),
            }
        }
    }

    /// One message there and one back, `length` bytes of payload each.
    pub async fn echo(&mut self, message: &[u8], length: usize) -> io::Result<()> {
        self.write(message).await?;
        match self.next().await? {
            Some(Received { opcode: BINARY, length: back, .. }) if back == length => Ok(()),
            other => Err(io::Error::other(format!("instead of an echo of {length} bytes: {other:?}"))),
        }
    }

    /// The orderly end, by the client: Close, the peer's Close, the peer's FIN. Says when the first was written, and when the second was read.
    pub async fn close(mut self, close: &[u8]) -> io::Result<[Instant; 2]> {
        let begun = Instant::now();
        self.write(close).await?;
        match self.next().await? {
            Some(Received { opcode: CLOSE, .. }) => {
                let answered = Instant::now();
                self.until_fin().await.map(|()| [begun, answered])
            }
            other => Err(io::Error::other(format!("instead of a Close: {other:?}"))),
        }
    }

    /// The same, by the backend, which has read a Close: the answering Close, FIN, and all that still comes.
    pub async fn closed(mut self, close: &[u8]) -> io::Result<()> {
        self.write(close).await?;
        self.shutdown().await?;
        self.until_fin().await
    }

    pub async fn until_fin(mut self) -> io::Result<()> {
        loop {
            match read(&mut self.stream, |_| ()).await {
                Ok(Some(())) => {}
                // A stream has an end in each direction, a socket is just closed. HAProxy resets it behind its own end: then it is over.
                Ok(None) if matches!(self.stream, Stream::Http2(..)) => {
                    let _ = self.shutdown().await;
                    return Ok(());
                }
                Ok(None) => return Ok(()),
                // "... with an error code of NO_ERROR after sending a complete response" (RFC 9113 8.1).
                Err(error) if is_no_error(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// One read; None: FIN. Unlike `try_read`, this does not ask again after a read that did not fill the buffer.
async fn read<R>(stream: &mut Stream, take: impl FnOnce(&[u8]) -> R) -> io::Result<Option<R>> {
    let mut take = Some(take);
    std::future::poll_fn(|context| {
        if let Stream::Http2(_, receive) = stream {
            return loop {
                match ready!(receive.poll_data(context)) {
                    None => break Poll::Ready(Ok(None)),
                    Some(Err(error)) => break Poll::Ready(Err(io::Error::other(error))),
                    Some(Ok(bytes)) if bytes.is_empty() => {}
                    Some(Ok(bytes)) => {
                        receive.flow_control().release_capacity(bytes.len()).map_err(io::Error::other)?;
                        let take = take.take().expect("polled to its end once");
                        break Poll::Ready(Ok(Some(take(&bytes))));
                    }
                }
            };
        }
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            let read = match stream {
                Stream::Plain(stream) => Pin::new(stream).poll_read(context, &mut buffer),
                Stream::Tls(stream) => Pin::new(stream).poll_read(context, &mut buffer),
                Stream::Http2(..) => unreachable!("it was read above"),
            };
            match ready!(read) {
                // A FIN without close_notify is a FIN: what matters came before it.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => {}
                result => result?,
            }
            let take = take.take().expect("polled to its end once");
            let bytes = buffer.filled();
            Poll::Ready(Ok((!bytes.is_empty()).then(|| take(bytes))))
        })
    })
    .await
}

/// A stream was reset, though without an error.
fn is_no_error(error: &io::Error) -> bool {
    let error = error.get_ref().and_then(|error| error.downcast_ref::<h2::Error>());
    error.is_some_and(|error| error.is_reset() && error.reason() == Some(Reason::NO_ERROR))
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = head.lines().filter_map(|line| line.split_once(':'));
    lines.find_map(|(key, value)| key.eq_ignore_ascii_case(name).then(|| value.trim()))
}
