//! What clients say to the backend, in order of arrival, as far as there is room.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;

use crate::hub::turnstile::{Ticket, Turnstile};

/// See the module. Whoever finds it full waits, and holds up nobody else.
pub(super) struct Inbound {
    queue: Mutex<Queue>,
}

struct Queue {
    messages: VecDeque<(bool, Bytes)>,
    /// Whoever passes them on.
    reader: Option<Waker>,
    /// Those for whom there was no room.
    turnstile: Turnstile,
}

impl Inbound {
    /// For so many messages, of so many bytes together; one larger message is taken all the same.
    pub(super) fn new(most: usize, most_bytes: usize) -> Self {
        let turnstile = Turnstile::new(most, most_bytes);
        Self { queue: Mutex::new(Queue { messages: VecDeque::new(), reader: None, turnstile }) }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing under this lock can panic half-way.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a message, of which is said whether it is text, as soon as there is room. Until then `ticket` is its sender's place.
    pub(super) fn poll_push(&self, cx: &Context<'_>, ticket: &mut Ticket, message: &(bool, Bytes)) -> Poll<()> {
        let mut queue = self.lock();
        if !queue.turnstile.enter(ticket, message.1.len(), cx.waker()) {
            return Poll::Pending;
        }
        queue.messages.push_back(message.clone());
        let reader = queue.reader.take();
        drop(queue);
        if let Some(reader) = reader {
            reader.wake();
        }
        Poll::Ready(())
    }

    /// A sender takes back what waits for room.
    pub(super) fn leave(&self, ticket: &mut Ticket) {
        let woken = self.lock().turnstile.leave(ticket);
        woken.into_iter().for_each(Waker::wake);
    }

    /// The oldest one.
    pub(super) fn poll_pop(&self, cx: &Context<'_>) -> Poll<(bool, Bytes)> {
        let mut queue = self.lock();
        let Some(message) = queue.messages.pop_front() else {
            queue.reader = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let woken = queue.turnstile.exit(message.1.len());
        drop(queue);
        woken.into_iter().for_each(Waker::wake);
        Poll::Ready(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is put in comes out in order; beyond the bounds whoever has more waits, but for a message that is alone; who takes it back
    /// makes room for others.
    #[test]
    fn messages_wait_in_order() {
        let (inbound, cx) = (Inbound::new(2, 10), Context::from_waker(Waker::noop()));
        let message = |length: usize| (true, Bytes::from(vec![b'x'; length]));
        let (mut one, mut other) = (Ticket::default(), Ticket::default());
        assert!(inbound.poll_pop(&cx).is_pending());
        assert!(inbound.poll_push(&cx, &mut one, &message(99)).is_ready());
        assert!(inbound.poll_push(&cx, &mut one, &message(1)).is_pending());
        assert_eq!(inbound.poll_pop(&cx), Poll::Ready(message(99)));
        for length in [1, 2] {
            assert!(inbound.poll_push(&cx, &mut one, &message(length)).is_ready());
        }
        assert!(inbound.poll_push(&cx, &mut one, &message(3)).is_pending());
        assert!(inbound.poll_push(&cx, &mut other, &message(4)).is_pending());
        assert_eq!(inbound.poll_pop(&cx), Poll::Ready(message(1)));
        assert!(inbound.poll_push(&cx, &mut other, &message(4)).is_pending());
        inbound.leave(&mut one);
        assert!(inbound.poll_push(&cx, &mut other, &message(4)).is_ready());
        assert_eq!(inbound.poll_pop(&cx), Poll::Ready(message(2)));
        assert_eq!(inbound.poll_pop(&cx), Poll::Ready(message(4)));
        assert!(inbound.poll_pop(&cx).is_pending());
    }
}
