//! The newest messages of a backend, each encoded once, for all who read them at their own pace.
//!
//! A reader is a number: that of the next message. Nothing is kept for it, and it keeps nobody waiting: who is behind by more than is kept
//! finds that out itself.

use std::{
    collections::VecDeque,
    sync::{PoisonError, RwLock},
};

use bytes::Bytes;

use crate::hub::{
    End,
    memory::{FREE, Memory},
    signed,
};

/// See the module.
pub(super) struct Ring {
    state: RwLock<State>,
    /// As many bytes are kept at most, unless a single message has more.
    most_bytes: usize,
}

struct State {
    messages: VecDeque<Message>,
    /// The number of the oldest.
    first: u64,
    bytes: usize,
    /// Bytes of all messages that there were.
    told: u64,
    /// Of these, bytes of messages that have no memory of their own.
    own: usize,
    /// For them.
    memory: Memory,
    end: Option<End>,
}

struct Message {
    /// As it is sent.
    frame: Bytes,
    /// It is large: whoever is in the middle of it keeps its memory, too.
    has_memory: bool,
}

impl State {
    /// Takes memory for a large message; for that, older ones may have to go.
    fn enclose(&mut self, frame: Bytes) -> Message {
        if frame.len() <= FREE {
            return Message { frame, has_memory: false };
        }
        loop {
            if let Some(frame) = self.memory.whole(&frame) {
                return Message { frame, has_memory: true };
            }
            // Dropped at once, or nothing would be gained.
            if self.forget().is_none() {
                return Message { frame, has_memory: false };
            }
            self.memory.fit(self.own);
        }
    }

    fn keep(&mut self, message: Message) {
        let bytes = message.frame.len();
        self.bytes += bytes;
        self.told += bytes as u64;
        self.own += if message.has_memory { 0 } else { bytes };
        self.messages.push_back(message);
    }

    /// Lets go of the oldest one.
    fn forget(&mut self) -> Option<Message> {
        let oldest = self.messages.pop_front()?;
        let bytes = oldest.frame.len();
        self.bytes -= bytes;
        self.own -= if oldest.has_memory { 0 } else { bytes };
        self.first += 1;
        Some(oldest)
    }
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

impl Ring {
    /// Empty; of more than one message it keeps so many bytes together, as far as there is memory.
    pub(super) fn new(most_bytes: usize, memory: Memory) -> Self {
        let state = State { messages: VecDeque::new(), first: 0, bytes: 0, told: 0, own: 0, memory, end: None };
        Self { state: RwLock::new(state), most_bytes }
    }

    /// Takes new messages, and lets go of the oldest but `most`. Gives by how many bytes it became larger.
    pub(super) fn push(&self, frames: impl IntoIterator<Item = Bytes>, most: usize) -> i64 {
        let mut dropped = Vec::new();
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let before = state.bytes;
        for frame in frames {
            let message = state.enclose(frame);
            state.keep(message);
            let is_full = |state: &mut State| {
                let mut is_large = || state.bytes > self.most_bytes || !state.memory.fit(state.own);
                state.messages.len() > most || (state.messages.len() > 1 && is_large())
            };
            while is_full(&mut state)
                && let Some(oldest) = state.forget()
            {
                dropped.push(oldest);
            }
        }
        let (after, own) = (state.bytes, state.own);
        // One that is alone is kept all the same.
        state.memory.fit(own);
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

    /// How many messages there were, and how many bytes they had.
    pub(super) fn told(&self) -> (u64, u64) {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        (state.first + state.messages.len() as u64, state.told)
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
        for Message { frame, .. } in state.messages.range(from..) {
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

    use super::*;
    use crate::hub::memory::{FREE, PORTION, tests::budget};

    fn ring(most_bytes: usize) -> Ring {
        Ring::new(most_bytes, Memory::new(&budget(None)))
    }

    fn texts(range: std::ops::Range<usize>) -> impl Iterator<Item = Bytes> {
        range.map(|number| Bytes::from(format!("<{number}>")))
    }

    /// As many messages as may be are kept, and as many bytes; one that is larger than that alone is kept alone.
    #[test]
    fn the_newest_messages_are_kept() {
        let ring = ring(100);
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

    /// Where there is no memory less is kept, but the newest message always; what is taken is given back.
    #[test]
    fn as_much_is_kept_as_there_is_memory_for() {
        let admission = budget(Some(2 * PORTION));
        let taken = || admission.memory().expect("a budget").0;
        let ring = Ring::new(1 << 20, Memory::new(&admission));
        let message = |size: usize| Some(Bytes::from(vec![b'x'; size]));
        ring.push(message(FREE), 9);
        ring.push(message(PORTION), 9);
        assert_eq!((ring.first(), taken()), (0, PORTION as u64));
        let others = admission.more_memory(PORTION as u64).expect("the rest");
        ring.push(message(FREE), 9);
        assert_eq!((ring.first(), ring.bytes(), taken()), (1, FREE + PORTION, 2 * PORTION as u64));
        ring.push(message(3 * PORTION), 9);
        assert_eq!((ring.first(), ring.bytes()), (3, 3 * PORTION));
        drop(others);
        ring.push(message(1), 9);
        assert_eq!((ring.first(), ring.bytes(), taken()), (4, 1, 0));
        ring.push(message(2 * PORTION), 9);
        assert_eq!((ring.first(), taken()), (4, 2 * PORTION as u64));
        drop(ring);
        assert_eq!(taken(), 0);
    }

    /// Who is in the middle of a large message keeps its memory, whatever the ring has let go of. Method: a budget of three portions.
    #[test]
    fn who_is_in_the_middle_keeps_memory() {
        let admission = budget(Some(3 * PORTION));
        let taken = || admission.memory().expect("a budget").0;
        let ring = Ring::new(1 << 20, Memory::new(&admission));
        let message = |size: usize| Some(Bytes::from(vec![b'x'; size]));
        ring.push(message(2 * PORTION), 9);
        let (mut at, mut rest) = (0, Bytes::new());
        assert_eq!(ring.read(&mut at, &mut rest, &mut [0; 9]), Found::Bytes(9, 1));
        ring.push(message(1), 1);
        assert_eq!((ring.first(), ring.bytes(), taken()), (1, 1, 2 * PORTION as u64));
        // There is no memory for it, so it is alone.
        ring.push(message(2 * PORTION), 9);
        assert_eq!((ring.first(), ring.bytes()), (2, 2 * PORTION));
        drop(rest);
        ring.push(message(3 * PORTION), 9);
        assert_eq!((ring.first(), ring.bytes(), taken()), (3, 3 * PORTION, 3 * PORTION as u64));
        ring.push(None, 0);
        ring.push(message(1), 0);
        assert_eq!((ring.bytes(), taken()), (0, 0));
    }

    /// A reader gets what there is, then nothing, then the end; who is behind is told so first, and a large message comes in parts.
    #[test]
    fn a_reader_reads_at_its_own_pace() {
        let (ring, mut at, mut rest, mut buffer) = (ring(1000), 0, Bytes::new(), [0; 8]);
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
            let ring = ring(60);
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
