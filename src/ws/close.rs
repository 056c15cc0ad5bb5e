//! Close codes and the payload of a Close frame (RFC 6455 5.5.1 and 7.4).

use super::{
    Violation,
    frame::{ControlFrame, MAX_CONTROL, Opcode, apply_mask},
};

/// A close code that may stand on the wire. 1005, 1006 and 1015 never do: they report the lack of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Code(u16);

impl Code {
    /// What it was for is done.
    pub const NORMAL: Self = Self(1000);
    /// An endpoint goes away: a server that shuts down, a browser that leaves the page.
    pub const GOING_AWAY: Self = Self(1001);
    /// The peer broke the protocol.
    pub const PROTOCOL: Self = Self(1002);
    /// Data of a kind that is not taken.
    pub const UNSUPPORTED: Self = Self(1003);
    /// Data that is not what it says it is, such as text that is no UTF-8.
    pub const INVALID: Self = Self(1007);
    /// A rule of ours that no other code is for.
    pub const POLICY: Self = Self(1008);
    /// A message too big to be processed.
    pub const TOO_BIG: Self = Self(1009);
    /// The server met an unexpected condition.
    pub const INTERNAL: Self = Self(1011);
    /// The service restarts; clients may come back after a random delay of 5 to 30 s (IANA registry).
    pub const RESTART: Self = Self(1012);
    /// Try again later: too much at the moment (IANA registry).
    pub const TRY_AGAIN: Self = Self(1013);

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

    /// What an endpoint answers to a Close with this code: "it typically echos the status code it received" (RFC 6455
    /// 5.5.1); nothing to nothing, nor to a code that must not be sent.
    pub fn answer(code: Option<u16>) -> Self {
        code.and_then(Code::new).map_or(Self::EMPTY, |code| Self::new(code, ""))
    }

    /// The frame for the wire; `mask` as in [`ControlFrame::new`].
    pub fn to_frame(&self, mask: Option<[u8; 4]>) -> ControlFrame {
        ControlFrame::new(Opcode::Close, self.payload(), mask)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::{collection::vec, prelude::*};
    use tokio_tungstenite::tungstenite::protocol::frame::{FrameHeader, coding};

    use super::*;

    fn code() -> impl Strategy<Value = Code> {
        let number = prop_oneof![1000..=1003_u16, 1007..=1014_u16, 3000..=4999_u16];
        number.prop_map(|number| Code::new(number).expect("allowed"))
    }

    fn key() -> impl Strategy<Value = Option<[u8; 4]>> {
        proptest::option::of(any::<[u8; 4]>())
    }

    fn masked(payload: &[u8], key: Option<[u8; 4]>) -> Vec<u8> {
        payload.iter().enumerate().map(|(at, byte)| byte ^ key.map_or(0, |key| key[at % 4])).collect()
    }

    /// Every number there is: tungstenite allows the same, but for 1014, which IANA registered after its list.
    #[test]
    fn codes_are_those_that_may_be_sent() {
        for number in 0..=u16::MAX {
            let theirs = coding::CloseCode::from(number).is_allowed();
            assert_eq!(Code::new(number).is_some(), theirs || number == 1014, "{number}");
        }
        for never in [0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000] {
            assert_eq!(Code::new(never), None);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// What is written is read as the same, masked or not, and a long reason is cut at a character.
        #[test]
        fn a_close_is_read_as_it_was_written(code in code(), reason in "\\PC{0,140}", key in key()) {
            let close = CloseFrame::new(code, &reason);
            let frame = close.to_frame(key);
            let mut cursor = Cursor::new(frame.as_bytes());
            let (header, length) = FrameHeader::parse(&mut cursor).unwrap().expect("a whole header");
            prop_assert_eq!((header.is_final, header.mask, u8::from(header.opcode)), (true, key, 8));
            prop_assert!(!header.rsv1 && !header.rsv2 && !header.rsv3);
            let payload = &frame.as_bytes()[usize::try_from(cursor.position()).unwrap()..];
            prop_assert_eq!(payload.len() as u64, length);
            prop_assert!(payload.len() <= MAX_CONTROL);
            prop_assert_eq!(CloseFrame::read(payload, key), Ok(close));
            prop_assert_eq!(close.code(), Some(code.get()));
            prop_assert!(reason.starts_with(close.reason()));
            // Cut only where it must be, and by less than one character.
            prop_assert!(close.reason() == reason || close.reason().len() > MAX_CONTROL - 2 - 4);
        }

        /// Of arbitrary payloads exactly those are read that RFC 6455 5.5.1 allows, and they are kept as they are.
        #[test]
        fn only_valid_payloads_are_read(
            number in prop_oneof![any::<u16>(), 990..1020_u16],
            tail in prop_oneof![vec(any::<u8>(), 0..140), "\\PC{0,40}".prop_map(String::into_bytes)],
            len in prop_oneof![3 => Just(usize::MAX), 1 => 0..4_usize],
            key in key(),
        ) {
            let mut payload = number.to_be_bytes().to_vec();
            payload.extend(tail);
            payload.truncate(len);
            let close = CloseFrame::read(&masked(&payload, key), key);
            let is_valid = payload.is_empty()
                || (payload.len() >= 2
                    && payload.len() <= MAX_CONTROL
                    && Code::new(number).is_some()
                    && String::from_utf8(payload[2..].to_vec()).is_ok());
            prop_assert_eq!(close.is_ok(), is_valid);
            if let Ok(close) = close {
                prop_assert_eq!(close.payload(), payload.as_slice());
                prop_assert_eq!(close.code(), (!payload.is_empty()).then_some(number));
                prop_assert_eq!(close.reason().as_bytes(), payload.get(2..).unwrap_or_default());
            }
        }

        /// An echo has the same code and no reason; to a Close without a code it is one without a code.
        #[test]
        fn an_echo_repeats_the_code(code in code(), reason in "\\PC{0,60}", key in key()) {
            let echo = CloseFrame::answer(CloseFrame::new(code, &reason).code());
            prop_assert_eq!((echo.code(), echo.reason()), (Some(code.get()), ""));
            prop_assert_eq!(echo.payload().len(), 2);
            prop_assert_eq!(CloseFrame::answer(echo.code()), echo);
            prop_assert_eq!(CloseFrame::answer(None), CloseFrame::EMPTY);
            prop_assert_eq!(CloseFrame::EMPTY.to_frame(key).as_bytes().len(), if key.is_some() { 6 } else { 2 });
        }
    }
}
