//! Messages as the frames that clients get, unmasked.

use bytes::{BufMut, Bytes, BytesMut};

use crate::ws::{Opcode, frame::MAX_HEADER};

/// A message to a client: one frame, or fragments of at most `most` bytes each.
pub(super) fn encode(is_text: bool, payload: &[u8], most: u64) -> Bytes {
    let most = usize::try_from(most).unwrap_or(usize::MAX).max(1);
    let mut opcode = if is_text { Opcode::Text } else { Opcode::Binary };
    let mut frames = BytesMut::with_capacity(payload.len() + MAX_HEADER * (payload.len() / most + 1));
    let mut rest = payload;
    loop {
        let part;
        (part, rest) = rest.split_at(rest.len().min(most));
        put_header(&mut frames, opcode.bits() | if rest.is_empty() { 0x80 } else { 0 }, part.len());
        frames.extend_from_slice(part);
        if rest.is_empty() {
            return frames.freeze();
        }
        opcode = Opcode::Continuation;
    }
}

/// The same of a text in pieces.
pub(super) fn encode_pieces(pieces: [&str; 3], most: u64) -> Bytes {
    let length = pieces.iter().map(|piece| piece.len()).sum::<usize>();
    if length as u64 > most {
        return encode(true, pieces.concat().as_bytes(), most);
    }
    let mut frame = BytesMut::with_capacity(length + MAX_HEADER);
    put_header(&mut frame, Opcode::Text.bits() | 0x80, length);
    for piece in pieces {
        frame.extend_from_slice(piece.as_bytes());
    }
    frame.freeze()
}

fn put_header(frames: &mut BytesMut, first: u8, length: usize) {
    frames.put_u8(first);
    match (u8::try_from(length), u16::try_from(length)) {
        (Ok(length @ ..126), _) => frames.put_u8(length),
        (_, Ok(length)) => {
            frames.put_u8(126);
            frames.put_u16(length);
        }
        _ => {
            frames.put_u8(127);
            frames.put_u64(length as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio_tungstenite::tungstenite::protocol::frame::FrameHeader;

    use super::*;

    /// A header says what tungstenite reads in it, for each of the three forms of a length.
    #[test]
    fn frames_are_as_they_should_be() {
        for length in [0, 1, 125, 126, 127, 65_535, 65_536, 100_000] {
            let payload = vec![b'x'; length];
            let frame = encode(true, &payload, u64::MAX);
            let mut cursor = std::io::Cursor::new(&frame[..]);
            let (header, told) = FrameHeader::parse(&mut cursor).expect("valid").expect("whole");
            assert_eq!((header.is_final, u8::from(header.opcode), header.mask, told), (true, 1, None, length as u64));
            assert_eq!(&frame[usize::try_from(cursor.position()).expect("small")..], &payload[..]);
        }
        assert_eq!(encode(false, b"x", 9)[..], [0x82, 1, b'x']);
        assert_eq!(encode(true, b"abcde", 2)[..], *b"\x01\x02ab\x00\x02cd\x80\x01e");
        assert_eq!(encode(true, b"abcd", 2)[..], *b"\x01\x02ab\x80\x02cd");
        for most in [2, 6, 1000] {
            assert_eq!(encode_pieces(["ab", "", "cdef"], most), encode(true, b"abcdef", most), "{most}");
        }
    }
}
