//! What clients say to the backend, in order of arrival, as far as there is room.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;

/// See the module. Whoever finds it full waits, and holds up nobody else.
pub(super) struct Inbound {
    queue: Mutex<Queue>,
    most: usize,
    most_bytes: usize,
}

#[derive(Default)]
struct Queue {
    messages: VecDeque<(bool, Bytes)>,
    bytes: usize,
    /// Whoever passes them on.
    reader: Option<Waker>,
    /// Those for whom there was no room.
    waiting: Vec<Waker>,
}

impl Inbound {
    /// For so many messages, of so many bytes together; one larger message is taken all the same.
    pub(super) const fn new(most: usize, most_bytes: usize) -> Self {
        let queue = Queue { messages: VecDeque::new(), bytes: 0, reader: None, waiting: Vec::new() };
        Self { queue: Mutex::new(queue), most, most_bytes }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing under this lock can panic half-way.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a message, of which is said whether it is text, as soon as there is room.
    pub(super) fn poll_push(&self, cx: &Context<'_>, message: &(bool, Bytes)) -> Poll<()> {
        let mut queue = self.lock();
        let bytes = queue.bytes + message.1.len();
        if !queue.messages.is_empty() && (queue.messages.len() >= self.most || bytes > self.most_bytes) {
            if !queue.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                queue.waiting.push(cx.waker().clone());
            }
            return Poll::Pending;
        }
        queue.bytes = bytes;
        queue.messages.push_back(message.clone());
        let reader = queue.reader.take();
        drop(queue);
        if let Some(reader) = reader {
            reader.wake();
        }
        Poll::Ready(())
    }

    /// The oldest one.
    pub(super) fn poll_pop(&self, cx: &Context<'_>) -> Poll<(bool, Bytes)> {
        let mut queue = self.lock();
        let Some(message) = queue.messages.pop_front() else {
            queue.reader = Some(cx.waker().clone());
            return Poll::Pending;
        };
        queue.bytes -= message.1.len();
        let waiting = std::mem::take(&mut queue.waiting);
        drop(queue);
        waiting.into_iter().for_each(Waker::wake);
        Poll::Ready(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is put in comes out in order; beyond the bounds whoever has more waits, but for a message that is alone.
    #[test]
    fn messages_wait_in_order() {
        let (inbound, cx) = (Inbound::new(2, 10), Context::from_waker(Waker::noop()));
        let message = |length: usize| (true, Bytes::from(vec![b'x'; length]));
        assert!(inbound.poll_pop(&cx).is_pending());
        assert!(inbound.poll_push(&cx, &message(99)).is_ready());
        assert!(inbound.poll_push(&cx, &message(1)).is_pending());
        assert_eq!(inbound.poll_pop(&cx), Poll::Ready(message(99)));
        for length in [1, 2] {
            assert!(inbound.poll_push(&cx, &message(length)).is_ready());
        }
        assert!(inbound.poll_push(&cx, &message(3)).is_pending());
        assert_eq!(inbound.poll_pop(&cx), Poll::Ready(message(1)));
        assert!(inbound.poll_push(&cx, &message(3)).is_ready());
        assert_eq!(inbound.poll_pop(&cx), Poll::Ready(message(2)));
        assert_eq!(inbound.poll_pop(&cx), Poll::Ready(message(3)));
        assert!(inbound.poll_pop(&cx).is_pending());
    }
}
