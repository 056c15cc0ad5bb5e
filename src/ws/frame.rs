//! Frame headers and the small frames that tidegate itself sends.

/// The largest header: 2 bytes, 8 of extended length, 4 of mask (RFC 6455 5.2).
pub const MAX_HEADER: usize = 14;

/// "All control frames MUST have a payload length of 125 bytes or less" (RFC 6455 5.5).
pub const MAX_CONTROL: usize = 125;

/// What a frame is (RFC 6455 5.2); reserved opcodes are refused before they get here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opcode {
    /// A further fragment of a message.
    Continuation,
    /// Text, or its first fragment.
    Text,
    /// Binary, or its first fragment.
    Binary,
    /// The last frame of a side.
    Close,
    /// Asks for a Pong.
    Ping,
    /// Answers a Ping, or comes unasked.
    Pong,
}

impl Opcode {
    /// From the low four bits of a header's first byte; `None`: reserved.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0x0 => Some(Self::Continuation),
            0x1 => Some(Self::Text),
            0x2 => Some(Self::Binary),
            0x8 => Some(Self::Close),
            0x9 => Some(Self::Ping),
            0xA => Some(Self::Pong),
            _ => None,
        }
    }

    /// The four bits of a header.
    pub const fn bits(self) -> u8 {
        match self {
            Self::Continuation => 0x0,
            Self::Text => 0x1,
            Self::Binary => 0x2,
            Self::Close => 0x8,
            Self::Ping => 0x9,
            Self::Pong => 0xA,
        }
    }

    /// Close, Ping or Pong.
    pub const fn is_control(self) -> bool {
        matches!(self, Self::Close | Self::Ping | Self::Pong)
    }
}

/// A header that is complete and allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The last frame of its message.
    pub fin: bool,
    /// RSV1, RSV2, RSV3 in the bits 0x40, 0x20, 0x10.
    pub rsv: u8,
    /// What it is.
    pub opcode: Opcode,
    /// The masking key, from clients only.
    pub mask: Option<[u8; 4]>,
    /// Bytes of payload.
    pub payload: u64,
    /// Bytes of the header itself, 2 to [`MAX_HEADER`].
    pub size: u8,
}

impl Header {
    /// Of the bytes of a whole header, whose opcode is known already.
    pub(super) fn read(opcode: Opcode, bytes: &[u8]) -> Self {
        let (first, second) = (bytes[0], bytes[1]);
        let mask = if second & 0x80 == 0 { None } else { bytes.last_chunk().copied() };
        let payload = match second & 0x7F {
            126 => u64::from(u16::from_be_bytes([bytes[2], bytes[3]])),
            127 => bytes[2..].first_chunk().map_or(0, |length| u64::from_be_bytes(*length)),
            short => u64::from(short),
        };
        let size = u8::try_from(bytes.len()).unwrap_or(u8::MAX);
        Self { fin: first & 0x80 != 0, rsv: first & 0x70, opcode, mask, payload, size }
    }
}

/// Masks or unmasks in place (RFC 6455 5.3).
pub fn apply_mask(payload: &mut [u8], mask: [u8; 4]) {
    for (byte, key) in payload.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= key;
    }
}

/// A control frame of ours, on the stack: at most 6 bytes of header and 125 of payload.
#[derive(Clone, Copy)]
pub struct ControlFrame {
    bytes: [u8; 6 + MAX_CONTROL],
    len: usize,
}

impl ControlFrame {
    /// Builds one; `mask` is a fresh random key toward a backend and `None` toward a client.
    ///
    /// A payload over 125 bytes is cut there: callers bound theirs, and a control frame that breaks the protocol is worse.
    pub fn new(opcode: Opcode, payload: &[u8], mask: Option<[u8; 4]>) -> Self {
        debug_assert!(opcode.is_control() && payload.len() <= MAX_CONTROL);
        let payload = &payload[..payload.len().min(MAX_CONTROL)];
        let mut bytes = [0; 6 + MAX_CONTROL];
        bytes[0] = 0x80 | opcode.bits();
        bytes[1] = u8::try_from(payload.len()).expect("cut at 125 above");
        let mut start = 2;
        if let Some(key) = mask {
            bytes[1] |= 0x80;
            bytes[2..6].copy_from_slice(&key);
            start = 6;
        }
        let len = start + payload.len();
        bytes[start..len].copy_from_slice(payload);
        if let Some(key) = mask {
            apply_mask(&mut bytes[start..len], key);
        }
        Self { bytes, len }
    }

    /// The frame as it goes on the wire.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl std::fmt::Debug for ControlFrame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ControlFrame").field(&self.as_bytes()).finish()
    }
}
