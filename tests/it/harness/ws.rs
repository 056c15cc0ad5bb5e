//! A peer for either role, on raw bytes: it builds frames, also impossible ones, reads frames, also from bytes that no
//! library would accept, and writes down everything that came and how it ended. It shares no code with tidegate.
//!
//! A peer answers nothing by itself: no Pong, no Close. What a script does not say is not sent.

use super::{
    Board, DEADLINE,
    http::{KEY, Message},
    lab::Socket,
};
use socket2::SockRef;
use std::{
    collections::VecDeque,
    fmt,
    io::{self, ErrorKind},
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

pub const CONTINUATION: u8 = 0;
pub const TEXT: u8 = 1;
pub const BINARY: u8 = 2;
pub const CLOSE: u8 = 8;
pub const PING: u8 = 9;
pub const PONG: u8 = 10;

/// What stands for the code of an empty Close: 1005 would hide a 1005 on the wire.
pub const NO_CODE: u16 = 0;

/// A frame to be sent. What is not said is right: minimal length, masked if the sender is a client, FIN, no RSV.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub fin: bool,
    /// The three bits as a number, RSV1 = 4.
    pub rsv: u8,
    pub opcode: u8,
    pub payload: Vec<u8>,
    mask: Mask,
    length: Length,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mask {
    ByRole,
    Never,
    Key([u8; 4]),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Length {
    Minimal,
    /// In 16 bits, whatever the payload's true length.
    In16(u16),
    /// In 64 bits, whatever the payload's true length.
    In64(u64),
    /// In 7 bits, at most 125.
    In7(u8),
}

impl Frame {
    pub fn new(opcode: u8, payload: impl AsRef<[u8]>) -> Self {
        let payload = payload.as_ref().to_vec();
        Self {
            fin: true,
            rsv: 0,
            opcode,
            payload,
            mask: Mask::ByRole,
            length: Length::Minimal,
        }
    }

    pub fn text(text: &str) -> Self {
        Self::new(TEXT, text)
    }

    pub fn binary(bytes: impl AsRef<[u8]>) -> Self {
        Self::new(BINARY, bytes)
    }

    /// [`NO_CODE`] makes it empty.
    pub fn close(code: u16, reason: &str) -> Self {
        if code == NO_CODE {
            return Self::new(CLOSE, []);
        }
        Self::new(CLOSE, [&code.to_be_bytes(), reason.as_bytes()].concat())
    }

    #[must_use]
    pub fn fin(self, fin: bool) -> Self {
        Self { fin, ..self }
    }

    #[must_use]
    pub fn rsv(self, rsv: u8) -> Self {
        Self { rsv, ..self }
    }

    #[must_use]
    pub fn masked(self, key: [u8; 4]) -> Self {
        Self {
            mask: Mask::Key(key),
            ..self
        }
    }

    #[must_use]
    pub fn unmasked(self) -> Self {
        Self {
            mask: Mask::Never,
            ..self
        }
    }

    #[must_use]
    pub fn length_in_7(self, length: u8) -> Self {
        assert!(length <= 125, "126 and 127 announce a longer field");
        Self {
            length: Length::In7(length),
            ..self
        }
    }

    #[must_use]
    pub fn length_in_16(self, length: u16) -> Self {
        Self {
            length: Length::In16(length),
            ..self
        }
    }

    #[must_use]
    pub fn length_in_64(self, length: u64) -> Self {
        Self {
            length: Length::In64(length),
            ..self
        }
    }

    /// The frame as bytes; `key` is what [`Mask::ByRole`] comes to.
    pub fn bytes(&self, key: Option<[u8; 4]>) -> Vec<u8> {
        let key = match self.mask {
            Mask::ByRole => key,
            Mask::Never => None,
            Mask::Key(key) => Some(key),
        };
        let mask_bit = if key.is_some() { 0x80 } else { 0 };
        let mut bytes = vec![u8::from(self.fin) << 7 | self.rsv << 4 | self.opcode];
        let length = match (self.length, self.payload.len()) {
            (Length::Minimal, n @ 0..126) => Length::In7(u8::try_from(n).expect("under 126")),
            (Length::Minimal, n @ 126..0x1_0000) => {
                Length::In16(u16::try_from(n).expect("under 65,536"))
            }
            (Length::Minimal, n) => Length::In64(n as u64),
            (told, _) => told,
        };
        match length {
            Length::In7(n) => bytes.push(mask_bit | n),
            Length::In16(n) => {
                bytes.push(mask_bit | 126);
                bytes.extend(n.to_be_bytes());
            }
            Length::In64(n) => {
                bytes.push(mask_bit | 127);
                bytes.extend(n.to_be_bytes());
            }
            Length::Minimal => unreachable!("resolved above"),
        }
        bytes.extend(key.iter().flatten());
        bytes.extend(mask(&self.payload, key));
        bytes
    }
}

fn mask(payload: &[u8], key: Option<[u8; 4]>) -> Vec<u8> {
    let key = key.unwrap_or_default();
    payload
        .iter()
        .zip(key.iter().cycle())
        .map(|(byte, key)| byte ^ key)
        .collect()
}

/// A frame that was received, unmasked.
#[derive(Clone, PartialEq, Eq)]
pub struct SeenFrame {
    /// Since the scene began.
    pub at: Duration,
    pub fin: bool,
    pub rsv: u8,
    pub opcode: u8,
    pub mask: Option<[u8; 4]>,
    /// Whether the length took no more bytes than it needs.
    pub minimal: bool,
    pub payload: Vec<u8>,
}

impl SeenFrame {
    /// The frame at the start of `bytes` and its length there; None if it is not whole.
    pub fn parse(bytes: &[u8], at: Duration) -> Option<(Self, usize)> {
        let [first, second, rest @ ..] = bytes else {
            return None;
        };
        let (length, minimal, rest) = match second & 0x7f {
            126 => {
                let (length, rest) = rest.split_first_chunk()?;
                let length = u64::from(u16::from_be_bytes(*length));
                (length, length > 125, rest)
            }
            127 => {
                let (length, rest) = rest.split_first_chunk()?;
                let length = u64::from_be_bytes(*length);
                (length, length > 0xffff, rest)
            }
            n => (u64::from(n), true, rest),
        };
        let (key, rest) = if second & 0x80 == 0 {
            (None, rest)
        } else {
            let (key, rest) = rest.split_first_chunk()?;
            (Some(*key), rest)
        };
        let payload = rest.get(..usize::try_from(length).ok()?)?;
        let frame = Self {
            at,
            fin: first & 0x80 != 0,
            rsv: first >> 4 & 7,
            opcode: first & 0x0f,
            mask: key,
            minimal,
            payload: mask(payload, key),
        };
        Some((frame, bytes.len() - rest.len() + payload.len()))
    }

    /// The same frame to be sent, masked or not as the new sender's role asks for.
    pub fn again(&self) -> Frame {
        Frame::new(self.opcode, &self.payload)
            .fin(self.fin)
            .rsv(self.rsv)
    }

    /// The code of a Close; [`NO_CODE`] if it is empty or no Close.
    pub fn code(&self) -> u16 {
        match self.payload[..] {
            [high, low, ..] if self.opcode == CLOSE => u16::from_be_bytes([high, low]),
            _ => NO_CODE,
        }
    }

    /// The payload as text, or a Close's reason.
    pub fn text(&self) -> String {
        let from = if self.opcode == CLOSE {
            self.payload.len().min(2)
        } else {
            0
        };
        String::from_utf8_lossy(&self.payload[from..]).into_owned()
    }
}

impl fmt::Debug for SeenFrame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.opcode {
            CONTINUATION => "continuation",
            TEXT => "text",
            BINARY => "binary",
            CLOSE => "close",
            PING => "ping",
            PONG => "pong",
            _ => "unknown",
        };
        write!(f, "{name}")?;
        if self.opcode == CLOSE {
            write!(f, " {}", self.code())?;
        }
        write!(f, " {:?}", self.text().chars().take(60).collect::<String>())?;
        if self.payload.len() > 60 {
            write!(f, "... ({} bytes)", self.payload.len())?;
        }
        for (said, word) in [
            (!self.fin, " not-final"),
            (self.rsv != 0, " rsv"),
            (self.mask.is_some(), " masked"),
            (!self.minimal, " length-not-minimal"),
        ] {
            if said {
                f.write_str(word)?;
            }
        }
        write!(f, " @{:.1?}", self.at)
    }
}

/// How what a peer receives came to an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Fin,
    /// ECONNRESET.
    Rst,
    /// Neither came within the deadline.
    Timeout,
    /// The peer itself closed its socket before either came.
    Left,
    /// Another error of the socket, as ETIMEDOUT.
    Error(ErrorKind),
}

/// Everything that happened to one connection, as it is written down while it happens.
#[derive(Clone, Debug)]
pub struct Transcript {
    pub label: String,
    pub started: Instant,
    pub events: Vec<(Duration, Event)>,
    /// Every byte received, the head included.
    pub raw: Vec<u8>,
    /// Received bytes that are no whole frame or head.
    pub leftover: Vec<u8>,
    pub end: Option<End>,
    /// Set when the script and the connection have ended; with the message of its panic, if it did.
    pub over: Option<Result<(), String>>,
}

#[derive(Clone, PartialEq, Eq)]
pub enum Event {
    Sent(String),
    Head(Message),
    Frame(SeenFrame),
    /// A write that the peer's or our own kernel refused: EPIPE, ECONNRESET; `TimedOut` if it was never taken.
    WriteFailed(ErrorKind),
    Did(&'static str),
    End(End),
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sent(what) => write!(f, "-> {what}"),
            Self::Head(head) => write!(f, "<- {head:?}"),
            Self::Frame(frame) => write!(f, "<- {frame:?}"),
            Self::WriteFailed(kind) => write!(f, "!! write failed: {kind:?}"),
            Self::Did(what) => write!(f, "-> {what}"),
            Self::End(end) => write!(f, "<- {end:?}"),
        }
    }
}

impl Transcript {
    pub fn new(label: String, started: Instant) -> Self {
        let (events, raw, leftover) = (Vec::new(), Vec::new(), Vec::new());
        Self {
            label,
            started,
            events,
            raw,
            leftover,
            end: None,
            over: None,
        }
    }

    fn note(&mut self, event: Event) {
        self.events.push((self.started.elapsed(), event));
    }

    pub fn seen(&self) -> Seen {
        let mut seen = Seen {
            head: None,
            frames: Vec::new(),
            leftover: self.leftover.clone(),
            raw: self.raw.clone(),
            write_failed: Vec::new(),
            end: self.end.unwrap_or(End::Timeout),
        };
        for (_, event) in &self.events {
            match event {
                Event::Head(head) => seen.head = Some(head.clone()),
                Event::Frame(frame) => seen.frames.push(frame.clone()),
                Event::WriteFailed(kind) => seen.write_failed.push(*kind),
                Event::Sent(_) | Event::Did(_) | Event::End(_) => {}
            }
        }
        seen
    }
}

/// What one peer got to see of the other.
#[derive(Clone, PartialEq, Eq)]
pub struct Seen {
    /// The last request or response.
    pub head: Option<Message>,
    pub frames: Vec<SeenFrame>,
    /// What followed the last whole frame.
    pub leftover: Vec<u8>,
    pub raw: Vec<u8>,
    pub write_failed: Vec<ErrorKind>,
    pub end: End,
}

impl fmt::Debug for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Seen");
        out.field("head", &self.head)
            .field("frames", &self.frames)
            .field("end", &self.end);
        if !self.leftover.is_empty() {
            out.field("leftover_bytes", &self.leftover.len());
        }
        if !self.write_failed.is_empty() {
            out.field("write_failed", &self.write_failed);
        }
        out.finish_non_exhaustive()
    }
}

impl Seen {
    /// The codes of all Close frames.
    pub fn closes(&self) -> Vec<u16> {
        self.of(CLOSE).map(SeenFrame::code).collect()
    }

    /// The payloads of all text frames.
    pub fn texts(&self) -> Vec<String> {
        self.of(TEXT).map(SeenFrame::text).collect()
    }

    /// The payloads of all data frames, joined.
    pub fn data(&self) -> Vec<u8> {
        let data = self.frames.iter().filter(|frame| frame.opcode <= BINARY);
        data.flat_map(|frame| frame.payload.iter().copied())
            .collect()
    }

    pub fn of(&self, opcode: u8) -> impl Iterator<Item = &SeenFrame> {
        self.frames
            .iter()
            .filter(move |frame| frame.opcode == opcode)
    }

    /// One Close with this code, nothing behind it, FIN.
    #[track_caller]
    pub fn assert_closed_with(&self, code: u16) {
        assert_eq!(self.closes(), [code], "the Close frames in {self:?}");
        let last = self.frames.last().map(|frame| frame.opcode);
        assert_eq!(last, Some(CLOSE), "a frame behind the Close: {self:?}");
        assert_eq!(self.leftover.len(), 0, "bytes behind the Close: {self:?}");
        assert_eq!(self.end, End::Fin, "the end of {self:?}");
    }
}

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
    stream: Option<TcpStream>,
    remote: SocketAddr,
    local: SocketAddr,
    /// Received, and not yet part of anything.
    buffer: Vec<u8>,
    frames: VecDeque<SeenFrame>,
    upgraded: bool,
    end: Option<End>,
    last_close: Option<Vec<u8>>,
    transcript: Board<Transcript>,
    random: u64,
}

impl Peer {
    pub fn new(
        role: Role,
        index: usize,
        stream: TcpStream,
        transcript: Board<Transcript>,
        seed: u64,
    ) -> io::Result<Self> {
        // A write is a segment: what a test sends in pieces arrives in pieces.
        stream.set_nodelay(true)?;
        let (local, remote) = (stream.local_addr()?, stream.peer_addr()?);
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
        assert_eq!(
            response.field("Sec-WebSocket-Accept"),
            Some(expected.as_str())
        );
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
            let body = framing
                .body(&self.buffer, self.end.is_some())
                .expect("a valid body");
            if let Some((body, length)) = body {
                self.buffer.drain(..length);
                response.body = body;
                return response;
            }
            self.fill_or_panic("the response's body").await;
        }
    }

    /// The next request or response, without its body.
    pub async fn read_head(&mut self) -> Message {
        loop {
            if let Some((head, length)) = Message::parse_head(&self.buffer) {
                self.buffer.drain(..length);
                self.transcript
                    .change(|t| t.note(Event::Head(head.clone())));
                return head;
            }
            self.fill_or_panic("a head").await;
        }
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
        let what = SeenFrame::parse(&bytes, Duration::ZERO).map_or_else(
            || format!("{} bytes of a frame", bytes.len()),
            |(f, _)| format!("{f:?}"),
        );
        self.write(&bytes, what.trim_end_matches(" @0.0ns").to_owned())
            .await
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
        self.send(&Frame::new(CLOSE, &payload[..payload.len().min(2)]))
            .await
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
        self.transcript
            .change(|t| t.note(Event::Sent(format!("{} bytes", bytes.len()))));
        while !bytes.is_empty() {
            let Some(stream) = &mut self.stream else {
                return self.write_failed(ErrorKind::NotConnected);
            };
            let (mut reader, mut writer) = stream.split();
            let reading = self.end.is_none();
            let mut chunk = vec![0; 64 * 1024];
            tokio::select! {
                biased;
                read = reader.read(&mut chunk), if reading => {
                    self.received(read.map(|n| &chunk[..n]));
                }
                wrote = writer.write(bytes) => match wrote {
                    Ok(n) => bytes = &bytes[n..],
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
        match timeout(DEADLINE, stream.write_all(bytes)).await {
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
                if sockets
                    .iter()
                    .find(this)
                    .is_none_or(|socket| socket.unacked == 0)
                {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(DEADLINE, acked)
            .await
            .expect("the other kernel takes no more");
    }

    fn write_failed(&mut self, kind: ErrorKind) -> bool {
        self.transcript.change(|t| t.note(Event::WriteFailed(kind)));
        false
    }

    /// splitmix64: a failing test is repeated with the same masks.
    fn random_key(&mut self) -> [u8; 4] {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let [a, b, c, d, ..] = (z ^ (z >> 31)).to_le_bytes();
        [a, b, c, d]
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
        assert!(
            more || ends_it,
            "the end instead of {what}: {:?}",
            self.seen()
        );
    }

    async fn fill(&mut self) {
        let Some(stream) = &mut self.stream else {
            return self.ended(End::Left);
        };
        let mut chunk = vec![0; 64 * 1024];
        let read = stream.read(&mut chunk).await;
        self.received(read.map(|n| &chunk[..n]));
    }

    fn received(&mut self, read: io::Result<&[u8]>) {
        match read {
            Ok([]) => self.ended(End::Fin),
            Ok(bytes) => {
                self.buffer.extend_from_slice(bytes);
                self.transcript.change(|t| t.raw.extend_from_slice(bytes));
                self.take_frames();
            }
            Err(e) if e.kind() == ErrorKind::ConnectionReset => self.ended(End::Rst),
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
            self.transcript
                .change(|t| t.events.push((at, Event::Frame(frame.clone()))));
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
        self.did("FIN");
        if let Some(stream) = &mut self.stream {
            // ENOTCONN if the other side has reset it.
            let _ = stream.shutdown().await;
        }
    }

    /// RST, as from a process that died badly.
    #[expect(
        clippy::disallowed_methods,
        reason = "the test's tool to reset on purpose"
    )]
    pub fn rst(&mut self) {
        self.did("RST");
        if let Some(stream) = self.stream.take() {
            SockRef::from(&stream)
                .set_linger(Some(Duration::ZERO))
                .expect("a socket");
        }
        self.ended(End::Left);
    }

    /// close(): FIN, or RST if something is unread. Nothing more is read.
    pub fn close(&mut self) {
        self.did("close()");
        self.stream = None;
        self.ended(End::Left);
    }

    /// close() while received bytes are unread, which makes it a RST.
    pub async fn close_with_unread(&mut self) {
        if let Some(stream) = &self.stream {
            let waited = timeout(DEADLINE, stream.peek(&mut [0])).await;
            let unread = matches!(waited, Ok(Ok(1)));
            assert!(
                unread,
                "nothing came that could be left unread: {:?}",
                self.seen()
            );
        }
        self.close();
    }

    /// How much the kernel may hold for us: with a small one, not reading closes the window soon. To be set before the
    /// connection is made where it matters: see `Dial::recv_buffer` and `SceneBuilder::backend_recv_buffer`.
    pub fn set_recv_buffer(&self, bytes: usize) {
        let stream = self.stream.as_ref().expect("an open connection");
        SockRef::from(stream)
            .set_recv_buffer_size(bytes)
            .expect("a socket");
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
