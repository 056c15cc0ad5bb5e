//! What clients tell their hub, in order of arrival: that they are there, what they say, that they have left.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;

use super::{core::Client, mailbox::Mailbox};
use crate::hub::End;

/// See the module. Messages are bounded: whoever finds it full waits, and holds up nobody else. Clients have their turn one after the other, each
/// with a message, and none has more than its share. The rest is twice for each client.
#[derive(Debug)]
pub(super) struct Queue<T, P> {
    state: Mutex<State<T, P>>,
    most: usize,
    most_bytes: usize,
}

/// Of the messages that there may be, one client may have one in so many.
const SHARE: usize = 16;

#[derive(Debug)]
struct State<T, P> {
    /// Who comes and goes.
    words: VecDeque<Word<P>>,
    /// Messages of those who have any, none of which is empty, and whose turn it is.
    texts: HashMap<Client, VecDeque<Bytes>>,
    turns: VecDeque<Client>,
    /// All messages, and their bytes.
    count: usize,
    bytes: usize,
    /// What was opened for the hub, which waits behind nothing.
    opened: Option<T>,
    /// The hub.
    reader: Option<Waker>,
    /// Those for whom there was no room, and in which order they came.
    waiting: HashMap<Client, Waker>,
    order: VecDeque<Client>,
    /// The hub is gone.
    is_over: bool,
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

impl<T, P> State<T, P> {
    /// The oldest message of this client, and whether there are more.
    fn take(&mut self, client: Client) -> Option<(Bytes, bool)> {
        let texts = self.texts.get_mut(&client)?;
        let text = texts.pop_front()?;
        let has_more = !texts.is_empty();
        if !has_more {
            self.texts.remove(&client);
        }
        self.count -= 1;
        self.bytes -= text.len();
        Some((text, has_more))
    }

    /// A message of whoever's turn it is.
    fn take_next(&mut self) -> Option<Word<P>> {
        loop {
            // Who has left may still have a turn.
            let client = self.turns.pop_front()?;
            if let Some((text, has_more)) = self.take(client) {
                if has_more {
                    self.turns.push_back(client);
                }
                return Some(Word::Text(client, text));
            }
        }
    }

    /// Who finds room where this client's message was: itself, if it waits, and who has waited for longest; all when nothing else is to go.
    fn woken(&mut self, client: Option<Client>) -> Vec<Waker> {
        if self.count == 0 {
            self.order.clear();
            return self.waiting.drain().map(|(_, waker)| waker).collect();
        }
        let own = client.and_then(|client| self.waiting.remove(&client));
        let mut woken: Vec<_> = own.into_iter().collect();
        while let Some(first) = self.order.pop_front() {
            if let Some(waker) = self.waiting.remove(&first) {
                woken.push(waker);
                break;
            }
        }
        woken
    }
}

impl<T, P> Queue<T, P> {
    /// For so many messages, of so many bytes together; one larger message is taken all the same.
    pub(super) fn new(most: usize, most_bytes: usize) -> Self {
        let state = State {
            words: VecDeque::new(),
            texts: HashMap::new(),
            turns: VecDeque::new(),
            count: 0,
            bytes: 0,
            opened: None,
            reader: None,
            waiting: HashMap::new(),
            order: VecDeque::new(),
            is_over: false,
        };
        Self { state: Mutex::new(state), most, most_bytes }
    }

    fn lock(&self) -> MutexGuard<'_, State<T, P>> {
        // Nothing under this lock can panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<R>(&self, change: impl FnOnce(&mut State<T, P>) -> R) -> R {
        let mut state = self.lock();
        let changed = change(&mut state);
        let reader = state.reader.take();
        drop(state);
        if let Some(reader) = reader {
            reader.wake();
        }
        changed
    }

    /// Takes a message as soon as there is room. Where the hub is gone it is for nobody.
    pub(super) fn poll_say(&self, cx: &Context<'_>, client: Client, text: &Bytes) -> Poll<()> {
        let mut state = self.lock();
        if state.is_over {
            return Poll::Ready(());
        }
        let bytes = state.bytes + text.len();
        let own = state.texts.get(&client).map_or(0, VecDeque::len);
        let is_full = state.count >= self.most || bytes > self.most_bytes || own >= (self.most / SHARE).max(1);
        if state.count > 0 && is_full {
            if state.waiting.insert(client, cx.waker().clone()).is_none() {
                state.order.push_back(client);
            }
            return Poll::Pending;
        }
        state.count += 1;
        state.bytes = bytes;
        if own == 0 {
            state.turns.push_back(client);
        }
        state.texts.entry(client).or_default().push_back(text.clone());
        let reader = state.reader.take();
        drop(state);
        if let Some(reader) = reader {
            reader.wake();
        }
        Poll::Ready(())
    }

    /// Where the hub is gone it has ended for this client, too.
    pub(super) fn join(&self, client: Client, mailbox: Arc<Mailbox>, pool: P) {
        let refused = self.change(|state| {
            if state.is_over {
                return Some((mailbox, pool));
            }
            state.words.push_back(Word::Joined(client, mailbox, pool));
            None
        });
        if let Some((mailbox, _)) = refused {
            mailbox.finish(End::Lost);
        }
    }

    pub(super) fn leave(&self, client: Client) {
        let woken = self.change(|state| {
            if !state.is_over {
                state.words.push_back(Word::Left(client));
            }
            // It may have been woken for a place that it does not take now.
            if state.waiting.remove(&client).is_none() {
                return state.woken(None);
            }
            let State { waiting, order, .. } = state;
            if order.len() > 2 * waiting.len() + 64 {
                order.retain(|client| waiting.contains_key(client));
            }
            Vec::new()
        });
        woken.into_iter().for_each(Waker::wake);
    }

    /// The hub is to look at it, and at whoever is there.
    pub(super) fn wake(&self) {
        self.change(|_| {});
    }

    pub(super) fn open(&self, opened: T) {
        let unused = self.change(|state| if state.is_over { Some(opened) } else { state.opened.replace(opened) });
        drop(unused);
    }

    /// The hub is gone, and will never look again: whoever has come, or comes, hears of that.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.is_over = true;
        let (words, opened) = (std::mem::take(&mut state.words), state.opened.take());
        state.texts = HashMap::new();
        state.turns = VecDeque::new();
        (state.count, state.bytes) = (0, 0);
        let woken = state.woken(None);
        drop(state);
        drop(opened);
        for word in words {
            if let Word::Joined(_, mailbox, _) = word {
                mailbox.finish(End::Lost);
            }
        }
        woken.into_iter().for_each(Waker::wake);
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

    /// The next word. Who comes and goes is told before what others say; messages only where there is room, and of who leaves where there is none
    /// they are lost.
    pub(super) fn pop(&self, has_room: bool) -> Option<Word<P>> {
        let mut state = self.lock();
        let (word, woken) = match state.words.front() {
            Some(Word::Left(client)) => {
                let client = *client;
                let mut next = None;
                while let Some((text, _)) = state.take(client) {
                    if has_room {
                        next = Some(text);
                        break;
                    }
                }
                let State { texts, turns, .. } = &mut *state;
                if turns.len() > 2 * texts.len() + 64 {
                    turns.retain(|client| texts.contains_key(client));
                }
                let word = match next {
                    Some(text) => Some(Word::Text(client, text)),
                    None => state.words.pop_front(),
                };
                (word, state.woken(None))
            }
            Some(_) => (state.words.pop_front(), Vec::new()),
            None if has_room => {
                let word = state.take_next();
                let woken = match &word {
                    Some(Word::Text(client, _)) => state.woken(Some(*client)),
                    _ => Vec::new(),
                };
                (word, woken)
            }
            None => (None, Vec::new()),
        };
        if state.words.is_empty() && state.count == 0 {
            // As large as the last burst, for as long as the next pause lasts.
            state.words = VecDeque::new();
            state.texts = HashMap::new();
            state.turns = VecDeque::new();
        }
        drop(state);
        woken.into_iter().for_each(Waker::wake);
        word
    }

    /// There is nothing to be looked at.
    pub(super) fn is_empty(&self) -> bool {
        let state = self.lock();
        state.words.is_empty() && state.count == 0 && state.opened.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    type Words = Queue<(), ()>;

    fn say(queue: &Words, client: Client, length: usize) -> bool {
        let cx = Context::from_waker(Waker::noop());
        queue.poll_say(&cx, client, &Bytes::from(vec![b'x'; length])).is_ready()
    }

    fn pop(queue: &Words, has_room: bool) -> (Client, usize) {
        match queue.pop(has_room) {
            Some(Word::Text(client, text)) => (client, text.len()),
            Some(Word::Left(client)) => (client, usize::MAX),
            Some(Word::Joined(..)) | None => (0, 0),
        }
    }

    /// Of messages there are so many, or so many bytes, and who has one more waits for another to go; what a client has said comes before that it
    /// has left.
    #[test]
    fn messages_wait_for_room() {
        let queue = Words::new(32, 10);
        assert!(say(&queue, 1, 99) && !say(&queue, 2, 1));
        queue.leave(1);
        assert_eq!([(); 3].map(|()| pop(&queue, true)), [(1, 99), (1, usize::MAX), (0, 0)]);
        assert!(say(&queue, 1, 4) && say(&queue, 2, 5) && !say(&queue, 1, 2) && say(&queue, 1, 1));
        assert_eq!(pop(&queue, true), (1, 4));
        assert!(!say(&queue, 3, 5) && say(&queue, 3, 4));
        assert_eq!([(); 4].map(|()| pop(&queue, true)), [(2, 5), (1, 1), (3, 4), (0, 0)]);
        assert!(queue.is_empty());
    }

    /// Who says a lot has one turn among the others, and no more places than its share; who has waited for longest is next, and all who wait are
    /// woken in the end.
    #[test]
    fn nobody_is_ahead_of_all() {
        let queue = Words::new(64, 1000);
        assert_eq!((1..=6).filter(|length| say(&queue, 1, *length)).count(), 4);
        assert!(say(&queue, 2, 7) && say(&queue, 3, 8) && say(&queue, 2, 9));
        let order = [(1, 1), (2, 7), (3, 8), (1, 2), (2, 9), (1, 3), (1, 4), (0, 0)];
        assert_eq!([(); 8].map(|()| pop(&queue, true)), order);
        let state = queue.lock();
        assert!(state.waiting.is_empty() && state.order.is_empty());
    }

    /// Without room for what clients say it is still heard who leaves, whose messages are then lost; and the others keep theirs.
    #[test]
    fn who_leaves_is_heard_without_room() {
        let queue = Words::new(64, 1000);
        assert!(say(&queue, 1, 1) && say(&queue, 2, 2) && say(&queue, 1, 3));
        queue.leave(1);
        assert_eq!([pop(&queue, false), pop(&queue, false)], [(1, usize::MAX), (0, 0)]);
        assert_eq!([pop(&queue, true), pop(&queue, true)], [(2, 2), (0, 0)]);
        assert!(queue.is_empty());
    }

    /// When the hub is gone whoever has just joined hears that it is over, and so does whoever joins later; nobody waits for room.
    #[test]
    fn nobody_waits_for_a_hub_that_is_gone() {
        let queue = Words::new(1, 1);
        let mailboxes = [(); 2].map(|()| Arc::new(Mailbox::new(1, 1, Arc::new(Metrics::new()))));
        queue.join(1, Arc::clone(&mailboxes[0]), ());
        assert!(say(&queue, 1, 9) && !say(&queue, 2, 9));
        queue.close();
        queue.join(2, Arc::clone(&mailboxes[1]), ());
        queue.open(());
        assert!(say(&queue, 2, 9) && queue.is_empty());
        for mailbox in mailboxes {
            let cx = Context::from_waker(Waker::noop());
            let found = mailbox.poll_take(&cx, &mut Bytes::new(), &mut [0; 9]);
            assert_eq!(found, Poll::Ready(super::super::mailbox::Found::Over(End::Lost)));
        }
    }
}
