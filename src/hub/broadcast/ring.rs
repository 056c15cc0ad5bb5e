//! The newest messages of a backend, each encoded once, for all who read them at their own pace.
//!
//! A reader is a number: that of the next message. Nothing is kept for it, and it keeps nobody waiting: who is behind by more than is kept
//! finds that out itself.

use std::{
    collections::VecDeque,
    sync::{PoisonError, RwLock},
};

use bytes::{BufMut, Bytes, BytesMut};

use crate::{
    hub::{End, signed},
    ws::{Opcode, frame::MAX_HEADER},
};

/// See the module.
pub(super) struct Ring {
    state: RwLock<State>,
    /// As many bytes are kept at most, unless a single message has more.
    most_bytes: usize,
}

#[derive(Default)]
struct State {
    /// Each as the frames that it is sent in.
    messages: VecDeque<Bytes>,
    /// The number of the oldest.
    first: u64,
    bytes: usize,
    end: Option<End>,
}

/// What a reader finds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Bytes, of so many messages that it begins with.
    Bytes(usize, u64),
    /// It is behind by more than is kept.
    Behind,
    /// Nothing yet.
    Nothing,
    /// Nothing any more.
    Over(End),
}

/// A message to a client: one frame, or fragments of at most `most` bytes each.
pub(in crate::hub) fn encode(is_text: bool, payload: &[u8], most: u64) -> Bytes {
    let most = usize::try_from(most).unwrap_or(usize::MAX).max(1);
    let mut opcode = if is_text { Opcode::Text } else { Opcode::Binary };
    let mut frames = BytesMut::with_capacity(payload.len() + MAX_HEADER * (payload.len() / most + 1));
    let mut rest = payload;
    loop {
        let part;
        (part, rest) = rest.split_at(rest.len().min(most));
        frames.put_u8(opcode.bits() | if rest.is_empty() { 0x80 } else { 0 });
        match (u8::try_from(part.len()), u16::try_from(part.len())) {
            (Ok(length @ ..126), _) => frames.put_u8(length),
            (_, Ok(length)) => {
                frames.put_u8(126);
                frames.put_u16(length);
            }
            _ => {
                frames.put_u8(127);
                frames.put_u64(part.len() as u64);
            }
        }
        frames.extend_from_slice(part);
        if rest.is_empty() {
            return frames.freeze();
        }
        opcode = Opcode::Continuation;
    }
}

impl Ring {
    /// Empty; of more than one message it keeps so many bytes together.
    pub(super) fn new(most_bytes: usize) -> Self {
        Self { state: RwLock::default(), most_bytes }
    }

    /// Takes new messages, and lets go of the oldest but `most`. Gives by how many bytes it became larger.
    pub(super) fn push(&self, frames: impl IntoIterator<Item = Bytes>, most: usize) -> i64 {
        let mut dropped = Vec::new();
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let before = state.bytes;
        for frame in frames {
            state.bytes += frame.len();
            state.messages.push_back(frame);
            let is_full = |state: &State| {
                state.messages.len() > most || (state.bytes > self.most_bytes && state.messages.len() > 1)
            };
            while is_full(&state)
                && let Some(oldest) = state.messages.pop_front()
            {
                state.bytes -= oldest.len();
                state.first += 1;
                dropped.push(oldest);
            }
        }
        let after = state.bytes;
        drop(state);
        // Their memory is given back without the lock.
        drop(dropped);
        signed(after) - signed(before)
    }

    /// Nothing more comes. The first end counts.
    pub(super) fn finish(&self, end: End) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).end.get_or_insert(end);
    }

    /// It has ended.
    pub(super) fn is_over(&self) -> bool {
        self.state.read().unwrap_or_else(PoisonError::into_inner).end.is_some()
    }

    /// The number of the oldest message that is kept.
    pub(super) fn first(&self) -> u64 {
        self.state.read().unwrap_or_else(PoisonError::into_inner).first
    }

    /// Bytes that are kept.
    pub(super) fn bytes(&self) -> usize {
        self.state.read().unwrap_or_else(PoisonError::into_inner).bytes
    }

    /// Where a reader begins who gets up to `count` of the messages that are there.
    pub(super) fn behind(&self, count: usize) -> u64 {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.first + state.messages.len().saturating_sub(count) as u64
    }

    /// Reads whole messages into `buffer`, as many as fit, and moves `at` on. The first one may be larger: then `rest` is what did not fit.
    pub(super) fn read(&self, at: &mut u64, rest: &mut Bytes, buffer: &mut [u8]) -> Found {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let Some(from) = at.checked_sub(state.first) else { return Found::Behind };
        let (mut filled, mut count) = (0, 0);
        let from = usize::try_from(from).unwrap_or(usize::MAX).min(state.messages.len());
        for frame in state.messages.range(from..) {
            let room = &mut buffer[filled..];
            if frame.len() > room.len() && filled > 0 {
                break;
            }
            let fits = frame.len().min(room.len());
            room[..fits].copy_from_slice(&frame[..fits]);
            filled += fits;
            count += 1;
            if fits < frame.len() {
                *rest = frame.slice(fits..);
                break;
            }
        }
        *at += count;
        match &state.end {
            _ if count > 0 => Found::Bytes(filled, count),
            Some(end) => Found::Over(end.clone()),
            None => Found::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio_tungstenite::tungstenite::protocol::frame::FrameHeader;

    use super::*;

    fn texts(range: std::ops::Range<usize>) -> impl Iterator<Item = Bytes> {
        range.map(|number| Bytes::from(format!("<{number}>")))
    }

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
    }

    /// As many messages as may be are kept, and as many bytes; one that is larger than that alone is kept alone.
    #[test]
    fn the_newest_messages_are_kept() {
        let ring = Ring::new(100);
        assert_eq!(ring.push(texts(0..5), 3), 9);
        assert_eq!((ring.first(), ring.behind(0), ring.bytes()), (2, 5, 9));
        assert_eq!((ring.behind(0), ring.behind(1), ring.behind(2), ring.behind(9)), (5, 4, 3, 2));
        assert_eq!(ring.push([Bytes::from(vec![b'x'; 99])], 3), 90);
        assert_eq!((ring.first(), ring.behind(0), ring.bytes()), (5, 6, 99));
        ring.push([Bytes::from(vec![b'y'; 200])], 3);
        assert_eq!((ring.first(), ring.behind(0), ring.bytes()), (6, 7, 200));
        ring.push(texts(7..8), 3);
        assert_eq!((ring.first(), ring.behind(0), ring.bytes()), (7, 8, 3));
        assert_eq!(ring.push(texts(8..9), 0), -3);
        assert_eq!((ring.first(), ring.behind(0), ring.bytes()), (9, 9, 0));
    }

    /// A reader gets what there is, then nothing, then the end; who is behind is told so first, and a large message comes in parts.
    #[test]
    fn a_reader_reads_at_its_own_pace() {
        let (ring, mut at, mut rest, mut buffer) = (Ring::new(1000), 0, Bytes::new(), [0; 8]);
        assert_eq!(ring.read(&mut at, &mut rest, &mut buffer), Found::Nothing);
        ring.push(texts(0..3), 3);
        assert_eq!(ring.read(&mut at, &mut rest, &mut buffer), Found::Bytes(6, 2));
        assert_eq!((&buffer[..6], at), (&b"<0><1>"[..], 2));
        ring.push(texts(3..6), 3);
        assert_eq!(ring.read(&mut at, &mut rest, &mut buffer), Found::Behind);
        at = ring.first();
        ring.push([Bytes::from_static(b"0123456789")], 3);
        at += 3;
        assert_eq!(ring.read(&mut at, &mut rest, &mut buffer), Found::Bytes(8, 1));
        assert_eq!((&rest[..], at), (&b"89"[..], 7));
        ring.finish(End::Close(Bytes::from_static(b"bye")));
        ring.finish(End::Lost);
        assert_eq!(ring.read(&mut at, &mut rest, &mut buffer), Found::Over(End::Close(Bytes::from_static(b"bye"))));
        at = 3;
        assert_eq!(ring.read(&mut at, &mut rest, &mut buffer), Found::Behind);
    }

    proptest! {
        /// Whoever reads, however seldom and into however small a buffer, gets each message whole and in order, but for those that were
        /// dropped while he was behind.
        #[test]
        fn nothing_is_torn_or_out_of_order(steps in proptest::collection::vec((any::<bool>(), 1..40_usize), 1..100)) {
            let ring = Ring::new(60);
            let (mut at, mut rest, mut pushed, mut got) = (0, Bytes::new(), 0, Vec::new());
            for (pushes, size) in steps {
                if pushes {
                    ring.push(texts(pushed..pushed + size / 4), 8);
                    pushed += size / 4;
                    continue;
                }
                let mut buffer = vec![0; size];
                let taken = rest.split_to(rest.len().min(size));
                got.extend_from_slice(&taken);
                if !rest.is_empty() || !taken.is_empty() {
                    continue;
                }
                match ring.read(&mut at, &mut rest, &mut buffer) {
                    Found::Bytes(count, _) => got.extend_from_slice(&buffer[..count]),
                    Found::Behind => at = ring.first(),
                    Found::Nothing => prop_assert_eq!(at, ring.behind(0)),
                    Found::Over(_) => unreachable!("it goes on"),
                }
            }
            got.extend_from_slice(&rest);
            let got = String::from_utf8(got).expect("text");
            let numbers: Vec<usize> =
                got.split_inclusive('>').map(|part| part[1..part.len() - 1].parse().expect("whole")).collect();
            prop_assert!(numbers.is_sorted_by(|a, b| a < b), "{:?}", numbers);
        }
    }
}
