//! Frames as bytes: to be sent, also impossible ones, and as received, also those that no library would accept.

use std::{fmt, time::Duration};

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
        Self { fin: true, rsv: 0, opcode, payload, mask: Mask::ByRole, length: Length::Minimal }
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
        Self { mask: Mask::Key(key), ..self }
    }

    #[must_use]
    pub fn unmasked(self) -> Self {
        Self { mask: Mask::Never, ..self }
    }

    #[must_use]
    pub fn length_in_7(self, length: u8) -> Self {
        assert!(length <= 125, "126 and 127 announce a longer field");
        Self { length: Length::In7(length), ..self }
    }

    #[must_use]
    pub fn length_in_16(self, length: u16) -> Self {
        Self { length: Length::In16(length), ..self }
    }

    #[must_use]
    pub fn length_in_64(self, length: u64) -> Self {
        Self { length: Length::In64(length), ..self }
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
            (Length::Minimal, n @ 126..0x1_0000) => Length::In16(u16::try_from(n).expect("under 65,536")),
            (Length::Minimal, n) => Length::In64(n as u64),
            (told, _) => told,
        };
        match length {
            Length::In7(n) => bytes.push(mask_bit | n),
            Length::In16(n) => {
                bytes.push(mask_bit | 0x7e);
                bytes.extend(n.to_be_bytes());
            }
            Length::In64(n) => {
                bytes.push(mask_bit | 0x7f);
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
    let mut masked = payload.to_vec();
    let Some(key) = key else { return masked };
    // By eight: tests are built without optimisation, and byte by byte a large frame takes seconds.
    let word = u64::from_ne_bytes([key, key].concat().try_into().expect("twice four"));
    let (words, rest) = masked.as_chunks_mut();
    for eight in words {
        *eight = (u64::from_ne_bytes(*eight) ^ word).to_ne_bytes();
    }
    for (byte, key) in rest.iter_mut().zip(key.iter().cycle()) {
        *byte ^= key;
    }
    masked
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
            opcode: first % 16,
            mask: key,
            minimal,
            payload: mask(payload, key),
        };
        Some((frame, bytes.len() - rest.len() + payload.len()))
    }

    /// The same frame to be sent, masked or not as the new sender's role asks for.
    pub fn again(&self) -> Frame {
        Frame::new(self.opcode, &self.payload).fin(self.fin).rsv(self.rsv)
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
        let from = if self.opcode == CLOSE { self.payload.len().min(2) } else { 0 };
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
