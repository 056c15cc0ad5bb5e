//! One end of a TCP connection for either role, on raw bytes: WebSocket and HTTP, right or wrong, and every way to end.
//!
//! A peer answers nothing by itself: no Pong, no Close. What a script does not say is not sent.

use super::{
    Board, DEADLINE,
    http::{KEY, Message},
    lab::Socket,
    transcript::{End, Event, Seen, Transcript},
    wire::Wire,
    ws::{CLOSE, Frame, SeenFrame, TEXT},
};
use socket2::SockRef;
use std::{
    collections::VecDeque,
    io::{self, ErrorKind},
    net::{Shutdown, SocketAddr},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, split},
    time::timeout,
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Client,
    Server,
}

/// One end of a TCP connection, and what a script can do with it.
///
/// Methods that send return whether all bytes were taken; what went wrong is in the transcript. Methods that read one thing
/// panic when the connection ends or [`DEADLINE`] passes before it is there.
#[derive(Debug)]
pub struct Peer {
    role: Role,
    index: usize,
    /// None once closed.
    stream: Option<Wire>,
    remote: SocketAddr,
    local: SocketAddr,
    /// Received, and not yet part of anything.
    buffer: Vec<u8>,
    frames: VecDeque<SeenFrame>,
    upgraded: bool,
    end: Option<End>,
    fin_sent: bool,
    /// The kernel reports a RST once. If a write was told, the next read says EOF, as after a FIN.
    reset: bool,
    last_close: Option<Vec<u8>>,
    transcript: Board<Transcript>,
    random: u64,
}

impl Peer {
    pub fn new(
        role: Role,
        index: usize,
        stream: impl Into<Wire>,
        transcript: Board<Transcript>,
        seed: u64,
    ) -> io::Result<Self> {
        // A write is a segment: what a test sends in pieces arrives in pieces.
        let stream = stream.into();
        let socket = stream.socket();
        socket.set_nodelay(true)?;
        let (local, remote) = (socket.local_addr()?, socket.peer_addr()?);
        let random = seed ^ (index as u64) << 1 ^ u64::from(role == Role::Client);
        transcript.change(|t| t.note(Event::Did("connected")));
        Ok(Self {
            role,
            index,
            stream: Some(stream),
            remote,
            local,
            buffer: Vec::new(),
            frames: VecDeque::new(),
            upgraded: false,
            end: None,
            fin_sent: false,
            reset: false,
            last_close: None,
            transcript,
            random,
        })
    }

    /// The how-manieth connection of its side this is.
    pub fn index(&self) -> usize {
        self.index
    }

    pub fn local(&self) -> SocketAddr {
        self.local
    }

    pub fn remote(&self) -> SocketAddr {
        self.remote
    }

    /// What was seen up to here.
    pub fn seen(&self) -> Seen {
        self.transcript.read(Transcript::seen)
    }

    /// How many bytes were received, in all.
    pub fn received_bytes(&self) -> usize {
        self.transcript.read(|t| t.raw.len())
    }

    /// Whether the bytes received up to here end so.
    pub fn received_ends_with(&self, end: &[u8]) -> bool {
        self.transcript.read(|t| t.raw.ends_with(end))
    }

    // Handshakes and HTTP.

    /// A client's handshake, which must succeed; returns the response's head.
    pub async fn handshake(&mut self, target: &str) -> Message {
        self.handshake_with(Message::websocket(target)).await
    }

    /// As [`Peer::handshake`], with a request of one's own.
    pub async fn handshake_with(&mut self, request: Message) -> Message {
        let response = self.request(request).await;
        let expected = derive_accept_key(KEY.as_bytes());
        assert_eq!(response.code(), 101, "{response:?}");
        assert_eq!(response.field("Sec-WebSocket-Accept"), Some(expected.as_str()));
        response
    }

    /// Sends a request and reads the response, whatever it is; after a 101 frames are expected.
    pub async fn request(&mut self, request: Message) -> Message {
        self.send_message(&request).await;
        self.read_response().await
    }

    pub async fn read_response(&mut self) -> Message {
        let mut response = self.read_head().await;
        if response.code() == 101 {
            self.upgrade();
            return response;
        }
        let framing = response.framing();
        loop {
            let body = framing.body(&self.buffer, self.end.is_some()).expect("a valid body");
            if let Some((body, length)) = body {
                self.buffer.drain(..length);
                response.body = body;
                return response;
            }
            assert!(self.end.is_none(), "half a body, and the end: {:?}", self.seen());
            self.fill_or_panic("the response's body").await;
        }
    }

    /// The next request or response, without its body.
    pub async fn read_head(&mut self) -> Message {
        loop {
            if let Some((head, length)) = Message::parse_head(&self.buffer) {
                self.buffer.drain(..length);
                self.transcript.change(|t| t.note(Event::Head(head.clone())));
                return head;
            }
            self.fill_or_panic("a head").await;
        }
    }

    /// Waits for the other side's first bytes; false: it leaves without any, as a readiness probe does.
    pub async fn is_asked(&mut self) -> bool {
        while self.buffer.is_empty() && self.end.is_none() {
            timeout(DEADLINE, self.fill()).await.expect("bytes, or the end");
        }
        self.end.is_none()
    }

    /// A server's part of the handshake; returns the request.
    pub async fn accept_websocket(&mut self) -> Message {
        let request = self.read_head().await;
        self.reply(Message::switching(&request)).await;
        request
    }

    /// Sends any response; after a 101 frames are expected.
    pub async fn reply(&mut self, response: Message) -> bool {
        let sent = self.send_message(&response).await;
        if response.code() == 101 {
            self.upgrade();
        }
        sent
    }

    async fn send_message(&mut self, message: &Message) -> bool {
        self.write(&message.bytes(), format!("{message:?}")).await
    }

    fn upgrade(&mut self) {
        self.upgraded = true;
        self.take_frames();
    }

    // Sending.

    pub async fn send(&mut self, frame: &Frame) -> bool {
        let bytes = self.frame_bytes(frame);
        let what = SeenFrame::parse(&bytes, Duration::ZERO)
            .map_or_else(|| format!("{} bytes of a frame", bytes.len()), |(f, _)| format!("{f:?}"));
        self.write(&bytes, what.trim_end_matches(" @0.0ns").to_owned()).await
    }

    /// A frame as this peer would send it, to be cut or joined.
    pub fn frame_bytes(&mut self, frame: &Frame) -> Vec<u8> {
        let key = (self.role == Role::Client).then(|| self.random_key());
        frame.bytes(key)
    }

    pub async fn send_text(&mut self, text: &str) -> bool {
        self.send(&Frame::text(text)).await
    }

    pub async fn send_close(&mut self, code: u16, reason: &str) -> bool {
        self.send(&Frame::close(code, reason)).await
    }

    /// Echoes the code of the last Close received (RFC 6455, 5.5.1).
    pub async fn answer_close(&mut self) -> bool {
        let payload = self.last_close.clone().expect("a Close to answer");
        self.send(&Frame::new(CLOSE, &payload[..payload.len().min(2)])).await
    }

    /// Bytes as they are, in one write if the kernel takes them.
    pub async fn send_bytes(&mut self, bytes: &[u8]) -> bool {
        self.write(bytes, format!("{} bytes", bytes.len())).await
    }

    /// Bytes in pieces of `size`, each after a pause.
    pub async fn drip(&mut self, bytes: &[u8], size: usize, pause: Duration) -> bool {
        for piece in bytes.chunks(size) {
            tokio::time::sleep(pause).await;
            if !self.send_bytes(piece).await {
                return false;
            }
        }
        true
    }

    /// As [`Peer::send_bytes`], and reads meanwhile: for more than the buffers on the way can hold.
    pub async fn pump(&mut self, mut bytes: &[u8]) -> bool {
        self.transcript.change(|t| t.note(Event::Sent(format!("{} bytes", bytes.len()))));
        let mut is_flushed = false;
        while !bytes.is_empty() || !is_flushed {
            let Some(stream) = &mut self.stream else {
                return self.write_failed(ErrorKind::NotConnected);
            };
            let (mut reader, mut writer) = split(stream);
            let next = async {
                match bytes {
                    [] => writer.flush().await.map(|()| 0),
                    _ => writer.write(bytes).await,
                }
            };
            let reading = self.end.is_none();
            let mut chunk = vec![0; 64 * 1024];
            tokio::select! {
                biased;
                read = reader.read(&mut chunk), if reading => {
                    self.received(read.map(|n| &chunk[..n]));
                }
                wrote = next => match wrote {
                    Ok(n) => {
                        is_flushed = bytes.is_empty();
                        bytes = &bytes[n..];
                    }
                    Err(e) => return self.write_failed(e.kind()),
                },
                () = tokio::time::sleep(DEADLINE) => return self.write_failed(ErrorKind::TimedOut),
            }
        }
        true
    }

    async fn write(&mut self, bytes: &[u8], what: String) -> bool {
        self.transcript.change(|t| t.note(Event::Sent(what)));
        let Some(stream) = &mut self.stream else {
            return self.write_failed(ErrorKind::NotConnected);
        };
        let write = async {
            stream.write_all(bytes).await?;
            stream.flush().await
        };
        match timeout(DEADLINE, write).await {
            Ok(Ok(())) => true,
            Ok(Err(e)) => self.write_failed(e.kind()),
            Err(_) => self.write_failed(ErrorKind::TimedOut),
        }
    }

    /// Waits until the other kernel has everything that was sent; only then a RST does not take it back.
    pub async fn sent_is_acked(&self) {
        let acked = async {
            loop {
                let sockets = Socket::list().expect("procfs");
                let this = |s: &&Socket| s.local == self.local && s.remote == self.remote;
                // A front's end of it is here too, and what it has not read a RST takes back.
                let front = |s: &&Socket| s.local == self.remote && s.remote == self.local;
                let is_read = sockets.iter().find(front).is_none_or(|socket| socket.unread == 0);
                if is_read && sockets.iter().find(this).is_none_or(|socket| socket.unacked == 0) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(DEADLINE, acked).await.expect("the other kernel takes no more");
    }

    fn write_failed(&mut self, kind: ErrorKind) -> bool {
        self.reset |= kind == ErrorKind::ConnectionReset;
        self.transcript.change(|t| t.note(Event::WriteFailed(kind)));
        false
    }

    /// splitmix64: a failing test is repeated with the same masks.
    fn random_key(&mut self) -> [u8; 4] {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let high = u32::try_from(z >> 32).expect("32 bits are left");
        high.to_le_bytes()
    }

    // Reading.

    /// The next frame, or how it ended.
    pub async fn next_frame(&mut self, deadline: Duration) -> Result<SeenFrame, End> {
        let read = async {
            loop {
                if let Some(frame) = self.frames.pop_front() {
                    return Ok(frame);
                }
                if let Some(end) = self.end {
                    return Err(end);
                }
                self.fill().await;
            }
        };
        timeout(deadline, read).await.unwrap_or(Err(End::Timeout))
    }

    pub async fn read_frame(&mut self) -> SeenFrame {
        let next = self.next_frame(DEADLINE).await;
        next.unwrap_or_else(|end| panic!("{end:?} instead of a frame: {:?}", self.seen()))
    }

    /// The next frame's text; it must be a text frame.
    pub async fn read_text(&mut self) -> String {
        let frame = self.read_frame().await;
        assert_eq!(frame.opcode, TEXT, "{frame:?}");
        frame.text()
    }

    /// Reads up to the next Close; its code.
    pub async fn read_close(&mut self) -> u16 {
        loop {
            let frame = self.read_frame().await;
            if frame.opcode == CLOSE {
                return frame.code();
            }
        }
    }

    /// Waits until so many bytes have been received, in all.
    pub async fn read_bytes(&mut self, total: usize) {
        while self.transcript.read(|t| t.raw.len()) < total {
            self.fill_or_panic("enough bytes").await;
        }
    }

    /// Reads until FIN, RST or [`DEADLINE`].
    pub async fn until_end(&mut self) -> Seen {
        self.transcript_until_end(DEADLINE).await
    }

    pub async fn transcript_until_end(&mut self, deadline: Duration) -> Seen {
        let read = async {
            while self.end.is_none() {
                self.fill().await;
            }
        };
        if timeout(deadline, read).await.is_err() {
            self.write_end(End::Timeout);
        }
        self.seen()
    }

    async fn fill_or_panic(&mut self, what: &str) {
        let filled = timeout(DEADLINE, self.fill()).await;
        let more = filled.is_ok() && self.end.is_none();
        // What ends by the end is looked at once more by the caller.
        let ends_it = filled.is_ok() && what.ends_with("body") && self.end == Some(End::Fin);
        assert!(more || ends_it, "the end instead of {what}: {:?}", self.seen());
    }

    async fn fill(&mut self) {
        self.sip(64 * 1024).await;
    }

    /// Reads once, as much as this at most.
    pub async fn sip(&mut self, most: usize) {
        let Some(stream) = &mut self.stream else {
            return self.ended(End::Left);
        };
        let mut chunk = vec![0; most];
        let read = stream.read(&mut chunk).await;
        self.received(read.map(|n| &chunk[..n]));
    }

    fn received(&mut self, read: io::Result<&[u8]>) {
        match read {
            Ok([]) => self.ended(if self.reset { End::Rst } else { End::Fin }),
            Ok(bytes) => {
                self.buffer.extend_from_slice(bytes);
                self.transcript.change(|t| t.raw.extend_from_slice(bytes));
                self.take_frames();
            }
            Err(e) if e.kind() == ErrorKind::ConnectionReset => self.ended(End::Rst),
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => self.ended(End::Truncated),
            Err(e) => self.ended(End::Error(e.kind())),
        }
    }

    fn take_frames(&mut self) {
        let mut taken = 0;
        while self.upgraded {
            let at = self.transcript.read(|t| t.started.elapsed());
            let Some((frame, length)) = SeenFrame::parse(&self.buffer[taken..], at) else {
                break;
            };
            taken += length;
            if frame.opcode == CLOSE {
                self.last_close = Some(frame.payload.clone());
            }
            self.transcript.change(|t| t.events.push((at, Event::Frame(frame.clone()))));
            self.frames.push_back(frame);
        }
        self.buffer.drain(..taken);
    }

    fn ended(&mut self, end: End) {
        if self.end.is_some() {
            return;
        }
        self.end = Some(end);
        self.write_end(end);
    }

    fn write_end(&mut self, end: End) {
        self.transcript.change(|t| {
            t.end = Some(end);
            t.leftover.clone_from(&self.buffer);
            t.note(Event::End(end));
        });
    }

    // Endings.

    /// FIN. Reading goes on: this is the half-close.
    pub async fn fin(&mut self) {
        if let Some(stream) = &mut self.stream
            && !self.fin_sent
        {
            self.fin_sent = true;
            self.transcript.change(|t| t.note(Event::Did("FIN")));
            // ENOTCONN if the other side has reset it.
            let _ = stream.shutdown().await;
        }
    }

    /// FIN, and nothing else, also where TLS wants a `close_notify` before it.
    pub fn bare_fin(&mut self) {
        self.fin_sent = true;
        self.did("FIN without close_notify");
        if let Some(stream) = &self.stream {
            SockRef::from(stream.socket()).shutdown(Shutdown::Write).expect("a connection");
        }
    }

    /// RST, as from a process that died badly.
    #[expect(clippy::disallowed_methods, reason = "the test's tool to reset on purpose")]
    pub fn rst(&mut self) {
        self.did("RST");
        if let Some(stream) = self.stream.take() {
            SockRef::from(stream.socket()).set_linger(Some(Duration::ZERO)).expect("a socket");
        }
        self.ended(End::Left);
    }

    /// `close()`: FIN, or RST if something is unread. Nothing more is read.
    pub fn close(&mut self) {
        self.did("close()");
        self.stream = None;
        self.ended(End::Left);
    }

    /// `close()` while received bytes are unread, which makes it a RST.
    pub async fn close_with_unread(&mut self) {
        if let Some(stream) = &self.stream {
            let waited = timeout(DEADLINE, stream.socket().peek(&mut [0])).await;
            let unread = matches!(waited, Ok(Ok(1)));
            assert!(unread, "nothing came that could be left unread: {:?}", self.seen());
        }
        self.close();
    }

    /// How much the kernel may hold for us: with a small one, not reading closes the window soon. To be set before the
    /// connection is made where it matters: see `Dial::recv_buffer` and `SceneBuilder::backend_recv_buffer`.
    pub fn set_recv_buffer(&self, bytes: usize) {
        let stream = self.stream.as_ref().expect("an open connection");
        SockRef::from(stream.socket()).set_recv_buffer_size(bytes).expect("a socket");
    }

    /// After the script: what it did not end is ended in the orderly way.
    pub async fn conclude(mut self) {
        if self.end.is_none() && self.stream.is_some() {
            self.fin().await;
            self.until_end().await;
        }
        if self.stream.is_some() {
            self.close();
        }
    }

    fn did(&mut self, what: &'static str) {
        self.transcript.change(|t| t.note(Event::Did(what)));
    }
}
