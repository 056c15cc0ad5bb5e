//! Close codes and the payload of a Close frame (RFC 6455 5.5.1 and 7.4).

use super::{
    Violation,
    frame::{ControlFrame, MAX_CONTROL, Opcode, apply_mask},
};

/// A close code that may stand on the wire. 1005, 1006 and 1015 never do: they report the lack of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Code(u16);

impl Code {
    /// The purpose of the connection was fulfilled.
    pub const NORMAL: Self = Self(1000);
    /// An endpoint goes away: a server that shuts down, a browser that leaves the page.
    pub const GOING_AWAY: Self = Self(1001);
    /// The peer broke the protocol.
    pub const PROTOCOL: Self = Self(1002);
    /// Data that is not what it says it is, such as text that is no UTF-8.
    pub const INVALID: Self = Self(1007);
    /// A message broke a policy, when no other code fits.
    pub const POLICY: Self = Self(1008);
    /// A message too big to be processed.
    pub const TOO_BIG: Self = Self(1009);
    /// The server met an unexpected condition.
    pub const INTERNAL: Self = Self(1011);
    /// The service restarts; clients may come back after a random delay of 5 to 30 s (IANA registry).
    pub const RESTART: Self = Self(1012);
    /// A gateway got an invalid answer from its upstream (IANA registry).
    pub const BAD_GATEWAY: Self = Self(1014);

    /// `None` for a code that an endpoint must not send (RFC 6455 7.4.1, 7.4.2).
    pub const fn new(code: u16) -> Option<Self> {
        match code {
            1000..=1003 | 1007..=1014 | 3000..=4999 => Some(Self(code)),
            _ => None,
        }
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }
}

/// What a Close frame carries: nothing, or a code and a reason.
///
/// Codes are kept as they came, since frames of others are passed on as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CloseFrame {
    payload: [u8; MAX_CONTROL],
    len: u8,
}

impl CloseFrame {
    /// A Close without a code.
    pub const EMPTY: Self = Self { payload: [0; MAX_CONTROL], len: 0 };

    /// A Close of ours; a reason longer than 123 bytes is cut at a character.
    pub fn new(code: Code, reason: &str) -> Self {
        let mut end = reason.len().min(MAX_CONTROL - 2);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        let mut payload = [0; MAX_CONTROL];
        payload[..2].copy_from_slice(&code.get().to_be_bytes());
        payload[2..2 + end].copy_from_slice(&reason.as_bytes()[..end]);
        Self { payload, len: u8::try_from(2 + end).expect("at most 125") }
    }

    /// Reads the payload of a Close frame, which `mask` hides when it came from a client.
    ///
    /// It breaks the protocol with a single byte, a code that must not be sent, or a reason that is no UTF-8.
    pub fn read(payload: &[u8], mask: Option<[u8; 4]>) -> Result<Self, Violation> {
        let mut own = [0; MAX_CONTROL];
        let own_payload = own.get_mut(..payload.len()).ok_or(Violation::Control)?;
        own_payload.copy_from_slice(payload);
        if let Some(key) = mask {
            apply_mask(own_payload, key);
        }
        match own_payload {
            [] => {}
            [_] => return Err(Violation::Close),
            [high, low, reason @ ..] => {
                Code::new(u16::from_be_bytes([*high, *low])).ok_or(Violation::Close)?;
                std::str::from_utf8(reason).map_err(|_| Violation::CloseReason)?;
            }
        }
        Ok(Self { payload: own, len: u8::try_from(payload.len()).expect("at most 125, since it fits") })
    }

    /// The payload in the clear.
    pub fn payload(&self) -> &[u8] {
        &self.payload[..usize::from(self.len)]
    }

    /// The code, when there is one.
    pub fn code(&self) -> Option<u16> {
        match self.payload() {
            [high, low, ..] => Some(u16::from_be_bytes([*high, *low])),
            _ => None,
        }
    }

    /// The reason; empty when there is none.
    pub fn reason(&self) -> &str {
        let reason = self.payload().get(2..).unwrap_or_default();
        std::str::from_utf8(reason).unwrap_or_default()
    }

    /// What an endpoint answers: "it typically echos the status code it received" (RFC 6455 5.5.1); nothing to nothing.
    #[must_use]
    pub fn echo(&self) -> Self {
        match self.code().and_then(Code::new) {
            Some(code) => Self::new(code, ""),
            None => Self::EMPTY,
        }
    }

    /// The frame for the wire; `mask` as in [`ControlFrame::new`].
    pub fn to_frame(&self, mask: Option<[u8; 4]>) -> ControlFrame {
        ControlFrame::new(Opcode::Close, self.payload(), mask)
    }
}
