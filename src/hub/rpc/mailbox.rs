//! What is for one client, until its leg takes it; with a bound, beyond which the client is too slow. Answers can't be left out, so it is ended.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use bytes::{Buf as _, Bytes};

use crate::{
    hub::{End, signed},
    metrics::Metrics,
    upstream::SlowClient,
};

/// See the module. The hub puts in, the leg takes out.
#[derive(Debug)]
pub(super) struct Mailbox {
    state: Mutex<State>,
    most: usize,
    most_bytes: usize,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct State {
    /// Messages as frames.
    frames: VecDeque<Bytes>,
    bytes: usize,
    /// Of the message that its leg is in the middle of, what did not fit.
    rest: usize,
    is_slow: bool,
    end: Option<End>,
    /// Whoever found nothing.
    reader: Option<Waker>,
    /// Whoever can't take anything, and is only to know when that was too long.
    holder: Option<Waker>,
}

/// What was found in it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Bytes, of so many messages that it begins with.
    Bytes(usize, u64),
    /// More than there is room for.
    Slow,
    /// Nothing any more.
    Over(End),
}

impl Mailbox {
    /// For so many messages, of so many bytes together; one larger message is taken all the same, but only alone.
    pub(super) fn new(most: usize, most_bytes: usize, metrics: Arc<Metrics>) -> Self {
        Self { state: Mutex::default(), most, most_bytes, metrics }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under this lock can panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more message.
    pub(super) fn push(&self, frame: Bytes) {
        let mut state = self.lock();
        if state.is_slow || state.end.is_some() {
            return;
        }
        let bytes = state.bytes + frame.len();
        let is_alone = state.frames.is_empty() && state.rest <= self.most_bytes;
        let is_full = state.frames.len() >= self.most || bytes > self.most_bytes;
        let woken = if is_full && !is_alone {
            state.is_slow = true;
            self.metrics.slow_client(SlowClient::Disconnect as usize);
            // Nobody takes them any more, and how long it takes to end a client that does not read is not known.
            self.metrics.shared_queue_bytes.dec_by(signed(state.bytes));
            state.frames = VecDeque::new();
            state.bytes = 0;
            [state.reader.take(), state.holder.take()]
        } else {
            self.metrics.shared_queue_bytes.inc_by(signed(frame.len()));
            state.bytes = bytes;
            state.frames.push_back(frame);
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
    pub(super) fn poll_take(&self, cx: &Context<'_>, rest: &mut Bytes, mut buffer: &mut [u8]) -> Poll<Found> {
        let mut state = self.lock();
        if state.is_slow {
            return Poll::Ready(Found::Slow);
        }
        let (mut bytes, mut messages) = (0, 0);
        state.rest = 0;
        while !buffer.is_empty()
            && let Some(mut frame) = state.frames.pop_front()
        {
            state.bytes -= frame.len();
            self.metrics.shared_queue_bytes.dec_by(signed(frame.len()));
            let count = frame.len().min(buffer.len());
            let (now, later) = buffer.split_at_mut(count);
            frame.copy_to_slice(now);
            buffer = later;
            bytes += count;
            messages += 1;
            if frame.has_remaining() {
                state.rest = frame.len();
                *rest = frame;
            }
        }
        if state.frames.is_empty() {
            // As large as the last burst, for as long as the next pause lasts.
            state.frames = VecDeque::new();
        }
        if bytes > 0 {
            return Poll::Ready(Found::Bytes(bytes, messages));
        }
        if let Some(end) = &state.end {
            return Poll::Ready(Found::Over(end.clone()));
        }
        state.reader = Some(cx.waker().clone());
        Poll::Pending
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

    fn mailbox() -> Mailbox {
        Mailbox::new(3, 10, Arc::new(Metrics::new()))
    }

    /// Several messages are taken at once, one that does not fit in parts; the end comes behind them. Method: a small buffer.
    #[test]
    fn messages_come_in_order_and_then_the_end() {
        let (mailbox, cx) = (mailbox(), Context::from_waker(Waker::noop()));
        let (mut rest, mut buffer) = (Bytes::new(), [0; 6]);
        assert!(mailbox.poll_take(&cx, &mut rest, &mut buffer).is_pending());
        for text in ["ab", "cd", "efgh"] {
            mailbox.push(Bytes::from_static(text.as_bytes()));
        }
        mailbox.finish(End::Lost);
        mailbox.push(Bytes::from_static(b"late"));
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
                mailbox.push(Bytes::from(vec![b'x'; *size]));
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
        let push = |size: usize| mailbox.push(Bytes::from(vec![b'x'; size]));
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
}
