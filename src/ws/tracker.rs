//! Knows where the frames of one direction begin and end, and refuses what RFC 6455 forbids, at the header.
//!
//! It is fed bytes in any portions and says the same whatever the portions are. It keeps at most one header
//! ([`MAX_HEADER`] bytes) and never a payload.

#[cfg(test)]
mod tests;

use super::{
    Code,
    frame::{Header, MAX_CONTROL, MAX_HEADER, Opcode},
};

/// Whose frames these are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// "A client MUST mask all frames" (RFC 6455 5.1).
    Client,
    /// "A server MUST NOT mask any frames" (RFC 6455 5.1).
    Server,
}

/// Which reserved bits the negotiated extensions allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rsv {
    /// No extension.
    None,
    /// permessage-deflate: RSV1, on the first frame of a message only (RFC 7692 6).
    Deflate,
    /// An extension that tidegate does not know: anything.
    Any,
}

/// The sizes that are allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Of one frame's payload, in bytes.
    pub frame: u64,
    /// Of one message's payload, all fragments together, in bytes on the wire.
    pub message: u64,
}

/// How a header breaks the protocol or a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Violation {
    /// A reserved opcode.
    Opcode,
    /// A reserved bit that no extension allows.
    Rsv,
    /// A client's frame without a mask.
    Unmasked,
    /// A server's frame with a mask.
    Masked,
    /// A length in more bytes than needed, or with the highest bit set.
    Length,
    /// A fragmented or overlong control frame.
    Control,
    /// A continuation without a beginning, or a beginning inside a message.
    Fragments,
    /// A Close with a payload that must not be.
    Close,
    /// A Close whose reason is no UTF-8.
    CloseReason,
    /// A frame over the limit.
    FrameTooBig,
    /// A message over the limit.
    MessageTooBig,
    /// More control frames than anybody needs. The tracker has no clock: the relay counts.
    ControlFlood,
    /// A message where clients only listen. No tracker says this nor what follows: whoever reads the messages does.
    Uninvited,
    /// A binary message where only text is understood.
    Binary,
    /// A text that is no UTF-8.
    Text,
    /// A message that is more than may wait for the backend that clients share.
    TooMuch,
    /// A message that has begun, and goes on too slowly or not at all.
    Late,
    /// A message that there is no memory for.
    Memory,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::error::Error for Violation {}

impl Violation {
    /// What it is, short enough for a Close.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Opcode => "reserved opcode",
            Self::Rsv => "reserved bit without an extension",
            Self::Unmasked => "frame without a mask",
            Self::Masked => "frame with a mask",
            Self::Length => "frame length not in its minimal form",
            Self::Control => "fragmented or overlong control frame",
            Self::Fragments => "fragments out of order",
            Self::Close => "invalid Close payload",
            Self::CloseReason => "Close reason is not UTF-8",
            Self::FrameTooBig => "frame over the limit (websocket.max_frame)",
            Self::MessageTooBig => "message over the limit (websocket.max_message)",
            Self::ControlFlood => "too many control frames (websocket.max_control_rate)",
            Self::Uninvited => "no messages are taken here (pool.allow_client_messages)",
            Self::Binary => "only text is understood here",
            Self::Text => "text is not UTF-8",
            Self::TooMuch => "message over the limit (pool.queue_bytes)",
            Self::Late => "message not whole in time (websocket.hold_timeout)",
            Self::Memory => "no memory for the message (limits.memory)",
        }
    }

    /// What its sender is told.
    pub const fn code(self) -> Code {
        match self {
            Self::FrameTooBig | Self::MessageTooBig | Self::TooMuch => Code::TOO_BIG,
            Self::CloseReason | Self::Text => Code::INVALID,
            Self::ControlFlood | Self::Uninvited | Self::Late => Code::POLICY,
            Self::Binary => Code::UNSUPPORTED,
            Self::Memory => Code::TRY_AGAIN,
            _ => Code::PROTOCOL,
        }
    }
}

/// What the bytes fed so far amount to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Everything was consumed; the frame goes on.
    More,
    /// A header is complete and allowed; its payload follows.
    Header(Header),
    /// The frame is complete: a boundary.
    End(Header),
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Tracker {
    limits: Limits,
    position: Position,
}

impl Tracker {
    /// At the first frame of a direction.
    pub const fn new(sender: Sender, rsv: Rsv, limits: Limits) -> Self {
        Self { limits, position: Position::new(sender, rsv) }
    }

    /// As [`Position::at_boundary`].
    pub const fn at_boundary(&self) -> bool {
        self.position.at_boundary()
    }

    /// As [`Position::payload_begun`].
    pub fn payload_begun(&self) -> Option<Header> {
        self.position.payload_begun()
    }

    /// As [`Position::in_message`].
    pub const fn in_message(&self) -> bool {
        self.position.in_message()
    }

    /// As [`Position::rest`].
    pub const fn rest(&self) -> u64 {
        self.position.rest()
    }

    /// As [`Position::skip`].
    pub const fn skip(&mut self, bytes: u64) {
        self.position.skip(bytes);
    }

    /// As [`Position::whole`].
    pub fn whole(&mut self, input: &[u8]) -> Result<Option<(usize, Header)>, Violation> {
        self.position.whole(input, self.limits)
    }

    /// As [`Position::step`].
    pub fn step(&mut self, input: &[u8]) -> Result<(usize, Step), Violation> {
        self.position.step(input, self.limits)
    }
}

/// A tracker without its limits: these are the same for thousands of sessions, and two of this are in each.
#[derive(Debug, Clone)]
pub struct Position {
    /// Bytes of payload that are still to come.
    left: u64,
    /// The payload of a fragmented message so far.
    message: u64,
    header: [u8; MAX_HEADER],
    /// Bytes of the header that are here.
    have: u8,
    /// Of [`IN_PAYLOAD`], [`IN_MESSAGE`] and [`OF_SERVER`]; above these, in two bits, the [`Rsv`].
    marks: u8,
}

/// The header is whole, and its frame is not.
const IN_PAYLOAD: u8 = 1;

/// Between the first and the last frame of a fragmented message.
const IN_MESSAGE: u8 = 2;

/// The frames are a server's.
const OF_SERVER: u8 = 4;

/// Where the [`Rsv`] begins, and two of its values.
const RSV_AT: u32 = 3;
const RSV_NONE: u8 = Rsv::None as u8;
const RSV_DEFLATE: u8 = Rsv::Deflate as u8;

impl Position {
    /// At the first frame of a direction.
    pub const fn new(sender: Sender, rsv: Rsv) -> Self {
        let sender = match sender {
            Sender::Client => 0,
            Sender::Server => OF_SERVER,
        };
        Self { left: 0, message: 0, header: [0; MAX_HEADER], have: 0, marks: sender | (rsv as u8) << RSV_AT }
    }

    const fn is(&self, mark: u8) -> bool {
        self.marks & mark != 0
    }

    const fn set(&mut self, mark: u8, is_so: bool) {
        self.marks = if is_so { self.marks | mark } else { self.marks & !mark };
    }

    /// Between two frames.
    pub const fn at_boundary(&self) -> bool {
        self.have == 0
    }

    /// The header of the frame whose payload is being read.
    pub fn payload_begun(&self) -> Option<Header> {
        self.is(IN_PAYLOAD).then(|| self.header())
    }

    /// Bytes of payload that are still to come before the frame ends.
    pub const fn rest(&self) -> u64 {
        self.left
    }

    /// So many bytes of payload go by without being fed, at most [`Self::rest`]. Where these were the last, the end of the frame is the next
    /// step, with or without input.
    ///
    /// # Panics
    /// When they are more.
    pub const fn skip(&mut self, bytes: u64) {
        self.left = self.left.checked_sub(bytes).expect("no more than the rest of a payload");
    }

    /// Between the first and the last frame of a fragmented message.
    pub const fn in_message(&self) -> bool {
        self.is(IN_MESSAGE)
    }

    /// Takes the frame that `input` begins with, if all of it is there and none is under way, and says how long it is: what two
    /// [steps](Self::step) do, for the frames that most streams consist of. `None`: nothing was taken.
    pub fn whole(&mut self, input: &[u8], limits: Limits) -> Result<Option<(usize, Header)>, Violation> {
        let &[first, second, ..] = input else { return Ok(None) };
        let size = header_size(second);
        if self.have != 0 || input.len() < size {
            return Ok(None);
        }
        let opcode = self.check_first(first, second)?;
        let header = Header::read(opcode, &input[..size]);
        match usize::try_from(header.payload) {
            Ok(payload) if payload <= input.len() - size => {
                self.check(&header, second, limits)?;
                Ok(Some((size + payload, header)))
            }
            _ => Ok(None),
        }
    }

    /// Goes on to the next event and says how many bytes of `input` lie before it.
    ///
    /// A header and the end of its frame are two events, also when the payload is empty. After an error the tracker
    /// must not be fed again.
    pub fn step(&mut self, input: &[u8], limits: Limits) -> Result<(usize, Step), Violation> {
        if self.is(IN_PAYLOAD) {
            let used = usize::try_from(self.left).map_or(input.len(), |left| left.min(input.len()));
            self.left -= used as u64;
            if self.left > 0 {
                return Ok((used, Step::More));
            }
            let header = self.header();
            self.set(IN_PAYLOAD, false);
            self.have = 0;
            return Ok((used, Step::End(header)));
        }
        let mut used = 0;
        loop {
            let have = usize::from(self.have);
            let need = if have < 2 { 2 } else { header_size(self.header[1]) };
            let take = (need - have).min(input.len() - used);
            self.header[have..have + take].copy_from_slice(&input[used..used + take]);
            used += take;
            self.have += u8::try_from(take).expect("a header has at most 14 bytes");
            if have + take < need {
                return Ok((used, Step::More));
            }
            if need > 2 || header_size(self.header[1]) == 2 {
                break;
            }
            // A wrong first byte is refused before the rest of the header came.
            self.check_first(self.header[0], self.header[1])?;
        }
        let opcode = self.check_first(self.header[0], self.header[1])?;
        let header = Header::read(opcode, &self.header[..usize::from(self.have)]);
        self.check(&header, self.header[1], limits)?;
        self.set(IN_PAYLOAD, true);
        self.left = header.payload;
        Ok((used, Step::Header(header)))
    }

    /// The rules that need only the first two bytes.
    fn check_first(&self, first: u8, second: u8) -> Result<Opcode, Violation> {
        let fin = first & 0x80 != 0;
        let rsv = first & 0x70;
        let opcode = Opcode::from_bits(first & 0x0F).ok_or(Violation::Opcode)?;
        let rsv_allowed = match self.marks >> RSV_AT {
            RSV_NONE => rsv == 0,
            RSV_DEFLATE => rsv == 0 || (rsv == 0x40 && matches!(opcode, Opcode::Text | Opcode::Binary)),
            _ => true,
        };
        if !rsv_allowed {
            return Err(Violation::Rsv);
        }
        match (self.is(OF_SERVER), second & 0x80 != 0) {
            (false, false) => return Err(Violation::Unmasked),
            (true, true) => return Err(Violation::Masked),
            _ => {}
        }
        if opcode.is_control() {
            if !fin || usize::from(second & 0x7F) > MAX_CONTROL {
                return Err(Violation::Control);
            }
        } else if (opcode == Opcode::Continuation) != self.in_message() {
            return Err(Violation::Fragments);
        }
        Ok(opcode)
    }

    /// The other rules, on a complete header.
    fn check(&mut self, header: &Header, second: u8, limits: Limits) -> Result<(), Violation> {
        match second & 0x7F {
            // "the minimal number of bytes MUST be used to encode the length" (RFC 6455 5.2)
            126 if header.payload < 126 => return Err(Violation::Length),
            // "the most significant bit MUST be 0" (RFC 6455 5.2)
            127 if u16::try_from(header.payload).is_ok() || header.payload >> 63 != 0 => return Err(Violation::Length),
            _ => {}
        }
        if header.payload > limits.frame {
            return Err(Violation::FrameTooBig);
        }
        if !header.opcode.is_control() {
            let message = if self.in_message() { self.message } else { 0 };
            self.message = message.saturating_add(header.payload);
            if self.message > limits.message {
                return Err(Violation::MessageTooBig);
            }
            self.set(IN_MESSAGE, !header.fin);
        }
        Ok(())
    }

    /// The header that is here as a whole.
    fn header(&self) -> Header {
        let opcode = Opcode::from_bits(self.header[0] & 0x0F).expect("others are refused before the header is whole");
        Header::read(opcode, &self.header[..usize::from(self.have)])
    }
}

/// The size of a header by its second byte.
const fn header_size(second: u8) -> usize {
    let extended = match second & 0x7F {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    2 + extended + if second & 0x80 == 0 { 0 } else { 4 }
}
