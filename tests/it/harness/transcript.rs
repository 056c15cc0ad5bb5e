//! What happened to one connection, written down while it happens, and what a test reads out of that.

use super::{
    http::Message,
    ws::{BINARY, CLOSE, SeenFrame, TEXT},
};
use std::{
    fmt,
    io::ErrorKind,
    time::{Duration, Instant},
};

/// How what a peer receives came to an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Fin,
    /// The same, without the `close_notify` that TLS has before it.
    Truncated,
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
        Self { label, started, events, raw, leftover, end: None, over: None }
    }

    pub fn note(&mut self, event: Event) {
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
        out.field("head", &self.head).field("frames", &self.frames).field("end", &self.end);
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
        data.map(|frame| frame.payload.as_slice()).collect::<Vec<_>>().concat()
    }

    pub fn of(&self, opcode: u8) -> impl Iterator<Item = &SeenFrame> {
        self.frames.iter().filter(move |frame| frame.opcode == opcode)
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
