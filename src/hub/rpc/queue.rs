//! What clients tell their hub, in order of arrival: that they are there, what they say, that they have left.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;

use super::{core::Client, mailbox::Mailbox};

/// See the module. Messages are bounded: whoever finds it full waits, and holds up nobody else. The rest is twice for each client.
#[derive(Debug)]
pub(super) struct Queue<T, P> {
    state: Mutex<State<T, P>>,
    most: usize,
    most_bytes: usize,
}

#[derive(Debug)]
struct State<T, P> {
    words: VecDeque<Word<P>>,
    /// Of these, messages, and their bytes.
    texts: usize,
    bytes: usize,
    /// What was opened for the hub, which waits behind nothing.
    opened: Option<T>,
    /// The hub.
    reader: Option<Waker>,
    /// Those for whom there was no room.
    waiting: Vec<Waker>,
}

/// What a client tells.
#[derive(Debug)]
pub(super) enum Word<P> {
    /// With the pool that WebSockets come from: who keeps it keeps all of it.
    Joined(Client, Arc<Mailbox>, P),
    /// UTF-8.
    Text(Client, Bytes),
    Left(Client),
}

impl<T, P> Queue<T, P> {
    /// For so many messages, of so many bytes together; one larger message is taken all the same.
    pub(super) fn new(most: usize, most_bytes: usize) -> Self {
        let state =
            State { words: VecDeque::new(), texts: 0, bytes: 0, opened: None, reader: None, waiting: Vec::new() };
        Self { state: Mutex::new(state), most, most_bytes }
    }

    fn lock(&self) -> MutexGuard<'_, State<T, P>> {
        // Nothing under this lock can panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State<T, P>)) {
        let mut state = self.lock();
        change(&mut state);
        let reader = state.reader.take();
        drop(state);
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// Takes a message as soon as there is room.
    pub(super) fn poll_say(&self, cx: &Context<'_>, client: Client, text: &Bytes) -> Poll<()> {
        let mut state = self.lock();
        let bytes = state.bytes + text.len();
        if state.texts > 0 && (state.texts >= self.most || bytes > self.most_bytes) {
            if !state.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                state.waiting.push(cx.waker().clone());
            }
            return Poll::Pending;
        }
        state.texts += 1;
        state.bytes = bytes;
        state.words.push_back(Word::Text(client, text.clone()));
        let reader = state.reader.take();
        drop(state);
        if let Some(reader) = reader {
            reader.wake();
        }
        Poll::Ready(())
    }

    pub(super) fn join(&self, client: Client, mailbox: Arc<Mailbox>, pool: P) {
        self.change(|state| state.words.push_back(Word::Joined(client, mailbox, pool)));
    }

    pub(super) fn leave(&self, client: Client) {
        self.change(|state| state.words.push_back(Word::Left(client)));
    }

    /// The hub is to look at it, and at whoever is there.
    pub(super) fn wake(&self) {
        self.change(|_| {});
    }

    pub(super) fn open(&self, opened: T) {
        self.change(|state| state.opened = Some(opened));
    }

    /// Whoever comes next wakes this one.
    pub(super) fn listen(&self, waker: &Waker) {
        let mut state = self.lock();
        if !state.reader.as_ref().is_some_and(|reader| reader.will_wake(waker)) {
            state.reader = Some(waker.clone());
        }
    }

    pub(super) fn take_opened(&self) -> Option<T> {
        self.lock().opened.take()
    }

    /// The oldest one.
    pub(super) fn pop(&self) -> Option<Word<P>> {
        let mut state = self.lock();
        let word = state.words.pop_front();
        let mut waiting = Vec::new();
        if let Some(Word::Text(_, text)) = &word {
            state.texts -= 1;
            state.bytes -= text.len();
            waiting = std::mem::take(&mut state.waiting);
        }
        if state.words.is_empty() {
            // As large as the last burst, for as long as the next pause lasts.
            state.words = VecDeque::new();
        }
        drop(state);
        waiting.into_iter().for_each(Waker::wake);
        word
    }

    /// There is nothing to be looked at.
    pub(super) fn is_empty(&self) -> bool {
        let state = self.lock();
        state.words.is_empty() && state.opened.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words come out in order; of messages there are so many, or so many bytes, and who has one more waits for the first to go.
    #[test]
    fn messages_wait_for_room() {
        let (queue, cx) = (Queue::<(), ()>::new(2, 10), Context::from_waker(Waker::noop()));
        let say = |client, length: usize| queue.poll_say(&cx, client, &Bytes::from(vec![b'x'; length])).is_ready();
        let pop = || match queue.pop() {
            Some(Word::Text(client, text)) => (client, text.len()),
            Some(Word::Left(client)) => (client, usize::MAX),
            Some(Word::Joined(..)) | None => (0, 0),
        };
        assert!(say(1, 99) && !say(2, 1));
        queue.leave(1);
        assert_eq!([pop(), pop(), pop()], [(1, 99), (1, usize::MAX), (0, 0)]);
        assert!(say(1, 4) && say(2, 5) && !say(1, 1));
        assert_eq!(pop(), (1, 4));
        assert!(!say(1, 6) && say(1, 5));
        assert_eq!([pop(), pop()], [(2, 5), (1, 5)]);
        assert!(queue.is_empty());
    }
}
