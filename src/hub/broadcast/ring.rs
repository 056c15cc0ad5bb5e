//! The newest messages of a backend, each encoded once, for all who read them at their own pace.
//!
//! A reader is a number: that of the next message. Nothing is kept for it, and it keeps nobody waiting: who is behind by more than is kept
//! finds that out itself.
//!
//! The newest messages may wait for others to go out with. What comes behind them has as much room as it would have without them, so nobody
//! is behind because of what waits.

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
    batch: Batch,
}

/// What waits is less than this, and goes out as soon as it is not: zeroes, nothing waits. There is room for it beside all else.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Batch {
    pub messages: usize,
    pub bytes: usize,
}

struct State {
    messages: VecDeque<Message>,
    /// The number of the oldest.
    first: u64,
    bytes: usize,
    /// Of these, bytes of messages that have no memory of their own.
    own: usize,
    /// For them.
    memory: Memory,
    waiting: Waiting,
    end: Option<End>,
}

/// Of the newest messages, those that wait for others to go out with.
#[derive(Clone, Copy, Default)]
struct Waiting {
    messages: usize,
    bytes: usize,
    /// See [`State`].
    own: usize,
}

struct Message {
    /// As it is sent.
    frame: Bytes,
    /// It is large: whoever is in the middle of it keeps its memory, too.
    has_memory: bool,
}

impl State {
    /// Takes memory for a large message; for that, older ones may have to go, but for what waited for it: `is_awaited`.
    fn enclose(&mut self, frame: Bytes, is_awaited: bool) -> Message {
        if frame.len() <= FREE {
            return Message { frame, has_memory: false };
        }
        loop {
            if let Some(frame) = self.memory.whole(&frame) {
                return Message { frame, has_memory: true };
            }
            let is_last = is_awaited && self.messages.len() <= self.waiting.messages;
            // Dropped at once, or nothing would be gained.
            if is_last || self.forget().is_none() {
                return Message { frame, has_memory: false };
            }
            self.memory.fit(self.own);
        }
    }

    fn keep(&mut self, message: Message) {
        let bytes = message.frame.len();
        let own = if message.has_memory { 0 } else { bytes };
        self.bytes += bytes;
        self.own += own;
        self.waiting.messages += 1;
        self.waiting.bytes += bytes;
        self.waiting.own += own;
        self.messages.push_back(message);
    }

    /// Whether the oldest message has to go, for the newest. That one is kept whatever its size, and what waited for it beside it.
    fn is_full(&mut self, most: usize, most_bytes: usize, batch: Batch) -> bool {
        let Some(Message { frame, has_memory }) = self.messages.back() else { return false };
        let (size, has_memory) = (frame.len(), *has_memory);
        if self.messages.len() > most {
            return true;
        }
        if self.messages.len() == 1 {
            return false;
        }
        if self.bytes - size + size.min(most_bytes) > most_bytes + batch.bytes {
            return true;
        }
        if self.memory.fit(self.own) {
            return false;
        }
        // Large, and there was no memory for it.
        let apart = if has_memory || size <= FREE { 0 } else { size };
        self.own - apart > self.memory.bytes() + batch.bytes.min(FREE / 2)
    }

    /// Nothing waits any longer.
    fn go_out(&mut self) {
        self.waiting = Waiting::default();
        // One that is alone is kept all the same.
        self.memory.fit(self.own);
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
    /// Empty; of more than one message it keeps so many bytes together, as far as there is memory, and `batch` beside.
    pub(super) fn new(most_bytes: usize, batch: Batch, memory: Memory) -> Self {
        let (messages, waiting) = (VecDeque::new(), Waiting::default());
        let state = State { messages, first: 0, bytes: 0, own: 0, memory, waiting, end: None };
        Self { state: RwLock::new(state), most_bytes, batch }
    }

    /// Takes new messages, and lets go of the oldest but `most`. Gives by how many bytes it became larger, and whether all goes out now:
    /// otherwise it waits, for more or [`Ring::go_out`].
    pub(super) fn push(&self, frames: impl IntoIterator<Item = Bytes>, most: usize) -> (i64, bool) {
        let mut dropped = Vec::new();
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let before = state.bytes;
        let is_awaited = state.waiting.messages > 0;
        for frame in frames {
            let message = state.enclose(frame, is_awaited);
            state.keep(message);
            while state.is_full(most, self.most_bytes, self.batch)
                && let Some(oldest) = state.forget()
            {
                dropped.push(oldest);
            }
        }
        let Waiting { messages, bytes, own } = state.waiting;
        let is_much = messages >= self.batch.messages || bytes >= self.batch.bytes;
        // As much memory as what waits has is there for what comes next.
        let wanted = state.own.max(2 * own);
        let goes_out = is_much || !state.memory.fit(wanted);
        if goes_out {
            state.go_out();
        }
        let after = state.bytes;
        drop(state);
        // Their memory is given back without the lock.
        drop(dropped);
        (signed(after) - signed(before), goes_out)
    }

    /// Nothing waits any longer.
    pub(super) fn go_out(&self) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).go_out();
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
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::hub::memory::{FREE, PORTION, tests::budget};

    fn ring(most_bytes: usize) -> Ring {
        Ring::new(most_bytes, Batch::default(), Memory::new(&budget(None)))
    }

    fn texts(range: std::ops::Range<usize>) -> impl Iterator<Item = Bytes> {
        range.map(|number| Bytes::from(format!("<{number}>")))
    }

    fn message(size: usize) -> Bytes {
        Bytes::from(vec![b'x'; size])
    }

    /// As many messages as may be are kept, and as many bytes; one that is larger than that alone is kept alone.
    #[test]
    fn the_newest_messages_are_kept() {
        let ring = ring(100);
        assert_eq!(ring.push(texts(0..5), 3), (9, true));
        assert_eq!((ring.first(), ring.behind(0), ring.bytes()), (2, 5, 9));
        assert_eq!((ring.behind(0), ring.behind(1), ring.behind(2), ring.behind(9)), (5, 4, 3, 2));
        assert_eq!(ring.push([Bytes::from(vec![b'x'; 99])], 3), (90, true));
        assert_eq!((ring.first(), ring.behind(0), ring.bytes()), (5, 6, 99));
        ring.push([Bytes::from(vec![b'y'; 200])], 3);
        assert_eq!((ring.first(), ring.behind(0), ring.bytes()), (6, 7, 200));
        ring.push(texts(7..8), 3);
        assert_eq!((ring.first(), ring.behind(0), ring.bytes()), (7, 8, 3));
        assert_eq!(ring.push(texts(8..9), 0), (-3, true));
        assert_eq!((ring.first(), ring.behind(0), ring.bytes()), (9, 9, 0));
    }

    /// Where there is no memory less is kept, but the newest message always; what is taken is given back.
    #[test]
    fn as_much_is_kept_as_there_is_memory_for() {
        let admission = budget(Some(2 * PORTION));
        let taken = || admission.memory().expect("a budget").0;
        let ring = Ring::new(1 << 20, Batch::default(), Memory::new(&admission));
        ring.push([message(FREE)], 9);
        ring.push([message(PORTION)], 9);
        assert_eq!((ring.first(), taken()), (0, PORTION as u64));
        let others = admission.more_memory(PORTION as u64).expect("the rest");
        ring.push([message(FREE)], 9);
        assert_eq!((ring.first(), ring.bytes(), taken()), (1, FREE + PORTION, 2 * PORTION as u64));
        ring.push([message(3 * PORTION)], 9);
        assert_eq!((ring.first(), ring.bytes()), (3, 3 * PORTION));
        drop(others);
        ring.push([message(1)], 9);
        assert_eq!((ring.first(), ring.bytes(), taken()), (4, 1, 0));
        ring.push([message(2 * PORTION)], 9);
        assert_eq!((ring.first(), taken()), (4, 2 * PORTION as u64));
        drop(ring);
        assert_eq!(taken(), 0);
    }

    /// Who is in the middle of a large message keeps its memory, whatever the ring has let go of. Method: a budget of three portions.
    #[test]
    fn who_is_in_the_middle_keeps_memory() {
        let admission = budget(Some(3 * PORTION));
        let taken = || admission.memory().expect("a budget").0;
        let ring = Ring::new(1 << 20, Batch::default(), Memory::new(&admission));
        ring.push([message(2 * PORTION)], 9);
        let (mut at, mut rest) = (0, Bytes::new());
        assert_eq!(ring.read(&mut at, &mut rest, &mut [0; 9]), Found::Bytes(9, 1));
        ring.push([message(1)], 1);
        assert_eq!((ring.first(), ring.bytes(), taken()), (1, 1, 2 * PORTION as u64));
        // There is no memory for it, so it is alone.
        ring.push([message(2 * PORTION)], 9);
        assert_eq!((ring.first(), ring.bytes()), (2, 2 * PORTION));
        drop(rest);
        ring.push([message(3 * PORTION)], 9);
        assert_eq!((ring.first(), ring.bytes(), taken()), (3, 3 * PORTION, 3 * PORTION as u64));
        ring.push(None, 0);
        ring.push([message(1)], 0);
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

    /// What waits goes out as soon as it is half of what is kept, and is not counted against what comes behind it: nobody who had all when it
    /// began to wait is behind, whatever the size of one message, and of several as far as they alone would be kept.
    #[test]
    fn what_waits_is_kept_beside_what_comes() {
        let batch = Batch { messages: 4, bytes: 50 };
        for (waits, comes) in [
            (vec![1], vec![100]),
            (vec![1], vec![1000]),
            (vec![49], vec![50]),
            (vec![49], vec![99]),
            (vec![16, 16, 17], vec![1000]),
            (vec![49], vec![40, 60]),
            (vec![1, 1, 1], vec![1; 8]),
        ] {
            let ring = Ring::new(100, batch, Memory::new(&budget(None)));
            // There is always something from before.
            let before = ring.push((0..8).map(|_| message(12)), 12);
            assert_eq!(before, (96, true));
            let at = ring.behind(0);
            let (all, count) = (waits.iter().chain(&comes).sum::<usize>(), waits.len() + comes.len());
            for size in waits {
                assert!(!ring.push([message(size)], 12).1, "{size}");
            }
            assert!(ring.push(comes.iter().map(|size| message(*size)), 12).1, "{comes:?}");
            let (mut next, mut rest, mut buffer) = (at, Bytes::new(), [0; 2000]);
            assert_eq!(ring.read(&mut next, &mut rest, &mut buffer), Found::Bytes(all, count as u64), "{comes:?}");
            // What went out is kept like all else.
            ring.push([message(100)], 12);
            ring.push([message(51)], 12);
            assert_eq!(ring.bytes(), 51);
        }
    }

    /// What waits goes out when somebody says so, or when there is as much as may wait; then the next may wait.
    #[test]
    fn what_waits_goes_out() {
        let ring = Ring::new(100, Batch { messages: 4, bytes: 50 }, Memory::new(&budget(None)));
        let waits = |count: usize, size: usize| !ring.push((0..count).map(|_| message(size)), 12).1;
        assert!(waits(3, 1) && !waits(1, 1));
        assert!(waits(2, 1) && waits(1, 1));
        ring.go_out();
        assert!(waits(3, 1) && !waits(2, 1));
        assert!(waits(1, 49) && !waits(1, 1));
        assert!(!waits(1, 50));
        assert!(waits(1, 49));
    }

    /// Where memory is short less waits, and that is kept as well: for its messages there is memory, or they are within half of what needs
    /// none. Method: budgets of nothing and of three portions.
    #[test]
    fn what_waits_has_memory() {
        let batch = Batch { messages: 512, bytes: 512 << 10 };
        let ring = |admission: &_| Ring::new(1 << 20, batch, Memory::new(admission));
        for comes in [1, FREE, FREE + 1, PORTION, 2 << 20] {
            let none = budget(Some(0));
            let ring = ring(&none);
            assert!(!ring.push([message(FREE / 2)], 1536).1);
            assert!(ring.push([message(comes)], 1536).1, "{comes}");
            assert_eq!((ring.first(), ring.bytes()), (0, FREE / 2 + comes));
            // It is not kept for longer.
            ring.push([message(FREE / 2 + 1)], 1536);
            ring.push([message(FREE)], 1536);
            assert!(ring.bytes() <= FREE + FREE / 2, "{comes}: {}", ring.bytes());
        }
        let some = budget(Some(3 * PORTION));
        let taken = || some.memory().expect("a budget").0;
        let ring = ring(&some);
        let whole = FREE + 3 * PORTION;
        assert!(!ring.push((0..whole / 2 / 4096).map(|_| message(4096)), 1536).1);
        assert_eq!(taken(), 3 * PORTION as u64);
        assert!(ring.push([message(2 << 20)], 1536).1);
        assert_eq!(ring.first(), 0);
        assert!(!ring.push([message(1)], 1536).1);
        assert_eq!((ring.bytes(), taken()), (1, 0));
    }

    proptest! {
        /// Nobody is behind who would not be if nothing waited. Method: the same pushes into a ring where messages wait and into one where they
        /// don't. A reader of the one reads when something went out, a reader of the other when something came, and both may be late.
        #[test]
        fn nobody_is_behind_because_of_what_waits(
            pushes in vec((vec(1..150_usize, 1..12), any::<bool>(), any::<bool>()), 1..60),
        ) {
            let (waits, plain) = (Ring::new(100, Batch { messages: 4, bytes: 50 }, Memory::new(&budget(None))), ring(100));
            let (mut at, mut plain_at, mut is_called, mut is_behind) = (0, 0, false, false);
            for (sizes, is_due, is_late) in pushes {
                let frames = || sizes.iter().map(|size| message(*size));
                is_called |= waits.push(frames(), 8 + 4).1;
                plain.push(frames(), 8);
                is_behind |= plain.first() > plain_at;
                prop_assert!(is_behind || waits.first() <= at);
                if is_due {
                    waits.go_out();
                    is_called = true;
                }
                if !is_late {
                    plain_at = plain.behind(0);
                    at = if is_called { waits.behind(0) } else { at };
                    (is_called, is_behind) = (false, false);
                }
                (at, plain_at) = (at.max(waits.first()), plain_at.max(plain.first()));
            }
        }

        /// Whoever reads, however seldom and into however small a buffer, gets each message whole and in order, but for those that were
        /// dropped while he was behind.
        #[test]
        fn nothing_is_torn_or_out_of_order(steps in vec((any::<bool>(), 1..40_usize), 1..100)) {
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
