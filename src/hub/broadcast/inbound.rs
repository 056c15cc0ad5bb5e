//! What clients say to the backend, in order of arrival, as far as there is room.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;

use crate::hub::{
    memory::Memory,
    turnstile::{Ticket, Turnstile},
};

/// See the module. Whoever finds it full waits, and holds up nobody else.
pub(super) struct Inbound {
    queue: Mutex<Queue>,
}

struct Queue {
    messages: VecDeque<Message>,
    /// Whoever passes them on.
    reader: Option<Waker>,
    /// Those for whom there was no room.
    turnstile: Turnstile,
}

/// Whether it is text, and what it is; and the memory that was taken for it.
type Message = ((bool, Bytes), Option<Memory>);

impl Inbound {
    /// For so many messages, of so many bytes together, as far as there is memory; one larger message is taken all the same.
    pub(super) fn new(most: usize, most_bytes: usize, memory: Memory) -> Self {
        let turnstile = Turnstile::new(most, most_bytes, memory);
        Self { queue: Mutex::new(Queue { messages: VecDeque::new(), reader: None, turnstile }) }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing under this lock can panic half-way.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a message, of which is said whether it is text, as soon as there is room. Until then `ticket` is its sender's place,
    /// and `memory` its sender's.
    pub(super) fn poll_push(
        &self,
        cx: &Context<'_>,
        ticket: &mut Ticket,
        message: &(bool, Bytes),
        memory: Option<&mut Memory>,
    ) -> Poll<()> {
        let mut queue = self.lock();
        if !queue.turnstile.enter(ticket, message.1.len(), cx.waker()) {
            return Poll::Pending;
        }
        queue.messages.push_back((message.clone(), memory.map(Memory::take)));
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
    pub(super) fn poll_pop(&self, cx: &Context<'_>) -> Poll<Message> {
        let mut queue = self.lock();
        let Some(message) = queue.messages.pop_front() else {
            queue.reader = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let woken = queue.turnstile.exit(message.0.1.len());
        drop(queue);
        woken.into_iter().for_each(Waker::wake);
        Poll::Ready(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::memory::tests::budget;

    /// What is put in comes out in order; beyond the bounds whoever has more waits, but for a message that is alone; who takes it back
    /// makes room for others.
    #[test]
    fn messages_wait_in_order() {
        let (inbound, cx) = (Inbound::new(2, 10, Memory::new(&budget(None))), Context::from_waker(Waker::noop()));
        let message = |length: usize| (true, Bytes::from(vec![b'x'; length]));
        let pop = || inbound.poll_pop(&cx).map(|(message, _)| message);
        let (mut one, mut other) = (Ticket::default(), Ticket::default());
        assert!(pop().is_pending());
        assert!(inbound.poll_push(&cx, &mut one, &message(99), None).is_ready());
        assert!(inbound.poll_push(&cx, &mut one, &message(1), None).is_pending());
        assert_eq!(pop(), Poll::Ready(message(99)));
        for length in [1, 2] {
            assert!(inbound.poll_push(&cx, &mut one, &message(length), None).is_ready());
        }
        assert!(inbound.poll_push(&cx, &mut one, &message(3), None).is_pending());
        assert!(inbound.poll_push(&cx, &mut other, &message(4), None).is_pending());
        assert_eq!(pop(), Poll::Ready(message(1)));
        assert!(inbound.poll_push(&cx, &mut other, &message(4), None).is_pending());
        inbound.leave(&mut one);
        assert!(inbound.poll_push(&cx, &mut other, &message(4), None).is_ready());
        assert_eq!(pop(), Poll::Ready(message(2)));
        assert_eq!(pop(), Poll::Ready(message(4)));
        assert!(pop().is_pending());
    }
}
