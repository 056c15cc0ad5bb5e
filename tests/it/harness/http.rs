//! HTTP/1.1 heads, as bytes: what peers send, right or wrong, and what they got. Nothing is normalised on the way.

use std::{fmt, io};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// The key of every handshake: the one of RFC 6455, 1.3.
pub const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

/// A request or a response: a first line, header fields in their order, a body, and bytes that follow in the same write.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Message {
    pub line: String,
    pub fields: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub after: Vec<u8>,
}

impl Message {
    /// A correct WebSocket handshake.
    pub fn websocket(target: &str) -> Self {
        Self::get(target)
            .header("Upgrade", "websocket")
            .header("Connection", "Upgrade")
            .header("Sec-WebSocket-Version", "13")
            .header("Sec-WebSocket-Key", KEY)
    }

    pub fn get(target: &str) -> Self {
        Self::line(&format!("GET {target} HTTP/1.1")).header("Host", "tidegate.test")
    }

    /// The correct answer to a WebSocket handshake.
    pub fn switching(request: &Self) -> Self {
        let key = request.field("Sec-WebSocket-Key").unwrap_or_default();
        Self::line("HTTP/1.1 101 Switching Protocols")
            .header("Upgrade", "websocket")
            .header("Connection", "Upgrade")
            .header("Sec-WebSocket-Accept", &derive_accept_key(key.as_bytes()))
    }

    /// A response with a body, and its length.
    pub fn status(status: u16, reason: &str, body: &str) -> Self {
        Self::line(&format!("HTTP/1.1 {status} {reason}")).body(body)
    }

    /// Any first line.
    pub fn line(line: &str) -> Self {
        Self { line: line.to_owned(), ..Self::default() }
    }

    /// Adds a field, also when there is one of that name.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.fields.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Replaces a field.
    #[must_use]
    pub fn set(self, name: &str, value: &str) -> Self {
        self.without(name).header(name, value)
    }

    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        self.fields.retain(|(n, _)| !n.eq_ignore_ascii_case(name));
        self
    }

    /// Sets the body, and the Content-Length that belongs to it.
    #[must_use]
    pub fn body(mut self, body: impl AsRef<[u8]>) -> Self {
        body.as_ref().clone_into(&mut self.body);
        let length = self.body.len().to_string();
        self.set("Content-Length", &length)
    }

    /// Bytes that go out in the same write, behind the message.
    #[must_use]
    pub fn then(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.after.extend_from_slice(bytes.as_ref());
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = format!("{}\r\n", self.line).into_bytes();
        for (name, value) in &self.fields {
            bytes.extend(format!("{name}: {value}\r\n").into_bytes());
        }
        bytes.extend(b"\r\n");
        bytes.extend(&self.body);
        bytes.extend(&self.after);
        bytes
    }

    /// The head at the start of `bytes` and its length; None if it is not whole.
    pub fn parse_head(bytes: &[u8]) -> Option<(Self, usize)> {
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
        let text = String::from_utf8_lossy(&bytes[..end]);
        let mut lines = text.split("\r\n");
        let mut head = Self::line(lines.next().unwrap_or_default());
        for line in lines {
            let (name, value) = line.split_once(':').unwrap_or((line, ""));
            head = head.header(name, value.trim());
        }
        Some((head, end + 4))
    }

    /// The first field of that name.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.all(name).first().copied()
    }

    pub fn all(&self, name: &str) -> Vec<&str> {
        let named = self.fields.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
        named.map(|(_, value)| value.as_str()).collect()
    }

    /// A response's status; 0 for anything else.
    pub fn code(&self) -> u16 {
        let code = self.line.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1));
        code.and_then(|code| code.parse().ok()).unwrap_or(0)
    }

    pub fn target(&self) -> &str {
        self.line.split(' ').nth(1).unwrap_or_default()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// How the body ends (RFC 9112, 6.3).
    pub fn framing(&self) -> Framing {
        let chunked = self.field("Transfer-Encoding").is_some_and(|te| te.ends_with("chunked"));
        let length = self.field("Content-Length").and_then(|length| length.parse().ok());
        match (self.code(), chunked, length) {
            (101 | 204 | 304, _, _) => Framing::Length(0),
            (_, true, _) => Framing::Chunked,
            (_, _, Some(length)) => Framing::Length(length),
            // A request without either has no body.
            (0, _, None) => Framing::Length(0),
            (_, _, None) => Framing::UntilEnd,
        }
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line)?;
        for (name, value) in &self.fields {
            write!(f, " | {name}: {value}")?;
        }
        if !self.body.is_empty() {
            write!(f, " | body of {} bytes: {:.200}", self.body.len(), self.text())?;
        }
        if !self.after.is_empty() {
            write!(f, " | {} bytes after it", self.after.len())?;
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    Length(usize),
    Chunked,
    UntilEnd,
}

impl Framing {
    /// The body at the start of `bytes` and how many bytes it takes up; None if it is not whole.
    pub fn body(self, bytes: &[u8], ended: bool) -> io::Result<Option<(Vec<u8>, usize)>> {
        match self {
            Self::Length(length) => Ok(bytes.get(..length).map(|body| (body.to_vec(), length))),
            Self::UntilEnd => Ok(ended.then(|| (bytes.to_vec(), bytes.len()))),
            Self::Chunked => dechunk(bytes),
        }
    }
}

/// No trailers: nobody here sends any.
fn dechunk(bytes: &[u8]) -> io::Result<Option<(Vec<u8>, usize)>> {
    let mut body = Vec::new();
    let mut at = 0;
    loop {
        let Some(line) = bytes[at..].windows(2).position(|two| two == b"\r\n") else {
            return Ok(None);
        };
        let digits = String::from_utf8_lossy(&bytes[at..at + line]).into_owned();
        let size = usize::from_str_radix(digits.split(';').next().unwrap_or_default().trim(), 16)
            .map_err(|e| io::Error::other(format!("a chunk of size {digits:?}: {e}")))?;
        at += line + 2;
        let Some(chunk) = bytes.get(at..at + size + 2) else {
            return Ok(None);
        };
        body.extend_from_slice(&chunk[..size]);
        at += size + 2;
        if size == 0 {
            return Ok(Some((body, at)));
        }
    }
}
