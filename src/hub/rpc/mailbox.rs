//! What is for one client, until its leg takes it; with a bound, beyond which the client is too slow. Answers can't be left out, so it is ended.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use bytes::{Buf as _, Bytes};

use crate::{
    hub::{End, SlowClient, leg::Found, memory::Memory, signed},
    metrics::Metrics,
};

#[derive(Debug)]
struct Frame {
    bytes: Bytes,
    is_own: bool,
}

/// Whose a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    /// This client's alone.
    Own,
    /// All clients have it, and it has its memory.
    All,
    /// As [`Whose::All`], but there is no memory for it: it is for those who are not behind, or whose own has room for it as it is.
    AllAtOnce,
}

/// See the module. The hub puts in, the leg takes out.
#[derive(Debug)]
pub(super) struct Mailbox {
    state: Mutex<State>,
    most: usize,
    most_bytes: usize,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
struct State {
    /// Messages as frames.
    frames: VecDeque<Frame>,
    bytes: usize,
    /// Of these, bytes that are nobody else's.
    own: usize,
    /// Of the message that its leg is in the middle of, what did not fit; and all of it, if that is nobody else's.
    rest: usize,
    rest_of: usize,
    /// For its own.
    memory: Memory,
    is_slow: bool,
    end: Option<End>,
    /// Whoever found nothing.
    reader: Option<Waker>,
    /// Whoever can't take anything, and is only to know when that was too long.
    holder: Option<Waker>,
}

impl Mailbox {
    /// For so many messages, of so many bytes together, as far as there is memory; one larger message is taken all the same, but only alone.
    pub(super) fn new(most: usize, most_bytes: usize, memory: Memory, metrics: Arc<Metrics>) -> Self {
        let state = State {
            frames: VecDeque::new(),
            bytes: 0,
            own: 0,
            rest: 0,
            rest_of: 0,
            memory,
            is_slow: false,
            end: None,
            reader: None,
            holder: None,
        };
        Self { state: Mutex::new(state), most, most_bytes, metrics }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under this lock can panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more message.
    pub(super) fn push(&self, frame: Bytes, whose: Whose) {
        let mut state = self.lock();
        if state.is_slow || state.end.is_some() {
            return;
        }
        let bytes = state.bytes + frame.len();
        let is_alone = state.frames.is_empty() && state.rest <= self.most_bytes;
        let is_full = state.frames.len() >= self.most || bytes > self.most_bytes;
        let own = state.own + frame.len();
        let needed = own + state.rest_of;
        let is_own = match whose {
            Whose::Own => true,
            Whose::All => false,
            // Nothing is asked for: what is for all would be taken once for each.
            Whose::AllAtOnce => needed <= state.memory.bytes(),
        };
        let own = if is_own { own } else { state.own };
        let has_memory = match whose {
            Whose::Own => state.memory.fit(needed),
            Whose::All => true,
            Whose::AllAtOnce => is_own || state.frames.is_empty() && state.rest == 0,
        };
        let woken = if is_full && !is_alone || !has_memory {
            state.is_slow = true;
            self.metrics.slow_client(SlowClient::Disconnect as usize);
            // Nobody takes them any more, and how long it takes to end a client that does not read is not known.
            self.metrics.shared_queue_bytes.dec_by(signed(state.bytes));
            state.frames = VecDeque::new();
            (state.bytes, state.own) = (0, 0);
            let needed = state.rest_of;
            state.memory.fit(needed);
            [state.reader.take(), state.holder.take()]
        } else {
            self.metrics.shared_queue_bytes.inc_by(signed(frame.len()));
            (state.bytes, state.own) = (bytes, own);
            state.frames.push_back(Frame { bytes: frame, is_own });
            [state.reader.take(), None]
        };
        drop(state);
        woken.into_iter().flatten().for_each(Waker::wake);
    }

    /// Nothing more comes. The first end counts.
    pub(super) fn finish(&self, end: End) {
        let mut state = self.lock();
        state.end.get_or_insert(end);
        let woken = [state.reader.take(), state.holder.take()];
        drop(state);
        woken.into_iter().flatten().for_each(Waker::wake);
    }

    /// Moves what fits; of the last message the rest goes to `rest`, which is empty.
    pub(super) fn poll_take(&self, cx: &Context<'_>, rest: &mut Bytes, buffer: &mut [u8]) -> Poll<Found> {
        let mut state = self.lock();
        if state.is_slow {
            return Poll::Ready(Found::Slow);
        }
        let (bytes, messages) = self.take(&mut state, rest, buffer);
        if bytes > 0 {
            return Poll::Ready(Found::Bytes(bytes, messages));
        }
        if let Some(end) = &state.end {
            return Poll::Ready(Found::Over(end.clone()));
        }
        state.reader = Some(cx.waker().clone());
        Poll::Pending
    }

    /// The same of what is there already, whatever there is besides.
    pub(super) fn take_last(&self, rest: &mut Bytes, buffer: &mut [u8]) -> Option<(usize, u64)> {
        Some(self.take(&mut self.lock(), rest, buffer)).filter(|(bytes, _)| *bytes > 0)
    }

    fn take(&self, state: &mut State, rest: &mut Bytes, mut buffer: &mut [u8]) -> (usize, u64) {
        let (mut bytes, mut messages) = (0, 0);
        (state.rest, state.rest_of) = (0, 0);
        while !buffer.is_empty()
            && let Some(Frame { bytes: mut frame, is_own }) = state.frames.pop_front()
        {
            let own = if is_own { frame.len() } else { 0 };
            state.bytes -= frame.len();
            state.own -= own;
            self.metrics.shared_queue_bytes.dec_by(signed(frame.len()));
            let count = frame.len().min(buffer.len());
            let (now, later) = buffer.split_at_mut(count);
            frame.copy_to_slice(now);
            buffer = later;
            bytes += count;
            messages += 1;
            if frame.has_remaining() {
                (state.rest, state.rest_of) = (frame.len(), own);
                *rest = frame;
            }
        }
        if state.frames.is_empty() {
            // As large as the last burst, for as long as the next pause lasts.
            state.frames = VecDeque::new();
        }
        state.memory.fit(state.own + state.rest_of);
        (bytes, messages)
    }

    /// Its leg can't take anything now. Whether it is too slow.
    pub(super) fn hold(&self, cx: &Context<'_>) -> bool {
        let mut state = self.lock();
        state.holder = Some(cx.waker().clone());
        state.is_slow
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        let bytes = self.lock().bytes;
        self.metrics.shared_queue_bytes.dec_by(signed(bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::memory::{FREE, PORTION, tests::budget};

    fn mailbox() -> Mailbox {
        Mailbox::new(3, 10, Memory::new(&budget(None)), Arc::new(Metrics::new()))
    }

    /// Several messages are taken at once, one that does not fit in parts; the end comes behind them. Method: a small buffer.
    #[test]
    fn messages_come_in_order_and_then_the_end() {
        let (mailbox, cx) = (mailbox(), Context::from_waker(Waker::noop()));
        let (mut rest, mut buffer) = (Bytes::new(), [0; 6]);
        assert!(mailbox.poll_take(&cx, &mut rest, &mut buffer).is_pending());
        for text in ["ab", "cd", "efgh"] {
            mailbox.push(Bytes::from_static(text.as_bytes()), Whose::Own);
        }
        mailbox.finish(End::Lost);
        mailbox.push(Bytes::from_static(b"late"), Whose::Own);
        assert_eq!(mailbox.poll_take(&cx, &mut rest, &mut buffer), Poll::Ready(Found::Bytes(6, 3)));
        assert_eq!((&buffer, &*rest), (b"abcdef", &b"gh"[..]));
        assert_eq!(mailbox.poll_take(&cx, &mut rest, &mut buffer), Poll::Ready(Found::Over(End::Lost)));
        assert_eq!(mailbox.metrics.shared_queue_bytes.get(), 0);
    }

    /// Who takes nothing is too slow at the first message too many, or byte, and then nothing is kept; one message alone may be of any size.
    #[test]
    fn who_takes_nothing_is_slow() {
        let cx = Context::from_waker(Waker::noop());
        for (sizes, is_slow) in [(&[50][..], false), (&[1, 1, 1], false), (&[1, 1, 1, 1], true), (&[5, 6], true)] {
            let mailbox = mailbox();
            for size in sizes {
                mailbox.push(Bytes::from(vec![b'x'; *size]), Whose::Own);
            }
            assert_eq!(mailbox.hold(&cx), is_slow, "{sizes:?}");
            let kept = if is_slow { 0 } else { sizes.iter().sum::<usize>() };
            assert_eq!(mailbox.metrics.shared_queue_bytes.get(), signed(kept), "{sizes:?}");
            let found = mailbox.poll_take(&cx, &mut Bytes::new(), &mut [0; 99]);
            assert_eq!(found == Poll::Ready(Found::Slow), is_slow, "{sizes:?}");
            let metrics = Arc::clone(&mailbox.metrics);
            drop(mailbox);
            assert_eq!(metrics.shared_queue_bytes.get(), 0);
        }
    }
    /// Who is in the middle of a large message may have others behind it, but no second large one.
    #[test]
    fn one_large_message_is_enough() {
        let (mailbox, cx) = (mailbox(), Context::from_waker(Waker::noop()));
        let push = |size: usize| mailbox.push(Bytes::from(vec![b'x'; size]), Whose::Own);
        push(50);
        let (mut rest, mut buffer) = (Bytes::new(), [0; 20]);
        assert_eq!(mailbox.poll_take(&cx, &mut rest, &mut buffer), Poll::Ready(Found::Bytes(20, 1)));
        push(10);
        assert!(!mailbox.hold(&cx));
        assert_eq!(mailbox.poll_take(&cx, &mut rest, &mut buffer), Poll::Ready(Found::Bytes(10, 1)));
        push(50);
        assert_eq!(mailbox.poll_take(&cx, &mut rest, &mut buffer), Poll::Ready(Found::Bytes(20, 1)));
        push(11);
        assert!(mailbox.hold(&cx));
    }

    /// Who is behind by more than there is memory for is too slow, and what is for all takes memory once, or goes to those who are not behind;
    /// small messages to all who have room as it is. Method: a budget of two portions.
    #[test]
    fn there_may_be_no_memory() {
        let admission = budget(Some(2 * PORTION));
        let taken = || admission.memory().expect("a budget").0;
        let mailbox = || Mailbox::new(99, 1 << 20, Memory::new(&admission), Arc::new(Metrics::new()));
        let cx = Context::from_waker(Waker::noop());
        let message = |size: usize| Bytes::from(vec![b'x'; size]);
        let (one, other) = (mailbox(), mailbox());
        one.push(message(FREE), Whose::Own);
        one.push(message(9 * PORTION), Whose::All);
        assert_eq!(taken(), 0);
        one.push(message(PORTION + 1), Whose::Own);
        other.push(message(FREE), Whose::Own);
        assert!(taken() == 2 * PORTION as u64 && !one.hold(&cx) && !other.hold(&cx));
        other.push(message(1), Whose::Own);
        assert!(other.hold(&cx) && !one.hold(&cx));
        // What its leg is in the middle of takes memory until it is gone.
        let mut buffer = vec![0; FREE + 9 * PORTION + 1];
        assert_eq!(one.poll_take(&cx, &mut Bytes::new(), &mut buffer), Poll::Ready(Found::Bytes(buffer.len(), 3)));
        assert_eq!(taken(), PORTION as u64);
        one.push(message(FREE - 1), Whose::AllAtOnce);
        assert!(!one.hold(&cx), "it has room for it as it is");
        one.push(message(1), Whose::AllAtOnce);
        assert!(one.hold(&cx), "it is behind");
        assert_eq!(taken(), PORTION as u64);
        drop(one);
        assert_eq!(taken(), 0);
        let third = mailbox();
        third.push(message(9 * PORTION), Whose::AllAtOnce);
        third.push(message(1), Whose::AllAtOnce);
        third.push(message(FREE - 1), Whose::AllAtOnce);
        assert!(!third.hold(&cx));
        third.push(message(1), Whose::AllAtOnce);
        assert!(third.hold(&cx));
    }
}
