//! The payload of a Close frame: no panic; what is read is what was sent; nothing that must not be sent is ever sent.
//!
//! The input is a masking key (its first byte even: no mask) and the payload.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::ws::{CloseFrame, Code, Limits, Opcode, Rsv, Sender, Step, Tracker, frame::apply_mask};

fuzz_target!(|input: &[u8]| {
    let Some((key, payload)) = input.split_first_chunk::<4>() else { return };
    let mask = (key[0] & 1 == 1).then_some(*key);
    let close = CloseFrame::read(payload, mask);
    let mut clear = payload.to_vec();
    if let Some(key) = mask {
        apply_mask(&mut clear, key);
    }
    let is_valid = match clear[..] {
        [] => true,
        [high, low, ref reason @ ..] => {
            Code::new(u16::from_be_bytes([high, low])).is_some()
                && std::str::from_utf8(reason).is_ok()
                && clear.len() <= 125
        }
        [_] => false,
    };
    assert_eq!(close.is_ok(), is_valid);
    let Ok(close) = close else { return };
    assert_eq!(close.payload(), clear);
    assert!(!matches!(close.code(), Some(..1000 | 1004..=1006 | 1015..=2999 | 5000..)));
    let answer = CloseFrame::answer(close.code());
    assert_eq!((answer.code(), answer.reason()), (close.code(), ""));
    if let Some(code) = close.code().and_then(Code::new) {
        assert_eq!(CloseFrame::new(code, close.reason()), close);
    }
    // As a frame it passes the tracker of the role that sends it, and is read as the same.
    let frame = close.to_frame(mask);
    let sender = if mask.is_some() { Sender::Client } else { Sender::Server };
    let mut tracker = Tracker::new(sender, Rsv::None, Limits { frame: 125, message: 125 });
    let Ok((used, Step::Header(header))) = tracker.step(frame.as_bytes()) else { panic!("no header: {frame:?}") };
    assert!(header.fin && header.rsv == 0 && header.opcode == Opcode::Close && header.mask == mask);
    let payload = &frame.as_bytes()[used..];
    assert_eq!(tracker.step(payload), Ok((payload.len(), Step::End(header))));
    assert_eq!(CloseFrame::read(payload, header.mask), Ok(close));
});
