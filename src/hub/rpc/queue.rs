//! What clients tell their hub, in order of arrival: that they are there, what they say, that they have left.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;

use super::{core::Client, mailbox::Mailbox};
use crate::hub::{
    End,
    memory::Memory,
    turnstile::{Ticket, Turnstile},
};

/// See the module. Messages are bounded: whoever finds it full waits, first come, first served, and holds up nobody else. Clients have their turn
/// one after the other, each with a message, and none has more than its share. The rest is twice for each client.
#[derive(Debug)]
pub(super) struct Queue<T, P> {
    state: Mutex<State<T, P>>,
    /// Messages of one client.
    share: usize,
}

/// Of the messages that there may be, one client may have one in so many.
const SHARE: usize = 16;

#[derive(Debug)]
struct State<T, P> {
    /// Who comes and goes.
    words: VecDeque<Word<P>>,
    /// Messages of those who have any, and whose turn it is.
    texts: HashMap<Client, Texts>,
    turns: VecDeque<Client>,
    /// Those for whom there was no room.
    turnstile: Turnstile,
    /// What was opened for the hub, which waits behind nothing.
    opened: Option<T>,
    /// The hub.
    reader: Option<Waker>,
    /// The hub is gone.
    is_over: bool,
}

/// What one client has said.
#[derive(Debug, Default)]
struct Texts {
    /// Never empty. With the memory that was taken for each.
    texts: VecDeque<(Bytes, Option<Memory>)>,
    /// It has more to say, and its share already.
    waiting: Option<Waker>,
}

/// What a client tells.
#[derive(Debug)]
pub(super) enum Word<P> {
    /// With the pool that WebSockets come from: who keeps it keeps all of it.
    Joined(Client, Arc<Mailbox>, P),
    /// UTF-8, and the memory that was taken for it.
    Text(Client, Bytes, Option<Memory>),
    Left(Client),
}

impl<T, P> State<T, P> {
    /// The oldest message of this client, and whether there are more. Adds those who find room where it was.
    fn take(&mut self, client: Client, woken: &mut Vec<Waker>) -> Option<(Bytes, Option<Memory>, bool)> {
        let own = self.texts.get_mut(&client)?;
        let (text, memory) = own.texts.pop_front()?;
        woken.extend(own.waiting.take());
        let has_more = !own.texts.is_empty();
        if !has_more {
            self.texts.remove(&client);
        }
        woken.append(&mut self.turnstile.exit(text.len()));
        Some((text, memory, has_more))
    }

    /// A message of whoever's turn it is.
    fn take_next(&mut self, woken: &mut Vec<Waker>) -> Option<Word<P>> {
        loop {
            // Who has left may still have a turn.
            let client = self.turns.pop_front()?;
            if let Some((text, memory, has_more)) = self.take(client, woken) {
                if has_more {
                    self.turns.push_back(client);
                }
                return Some(Word::Text(client, text, memory));
            }
        }
    }
}

impl<T, P> Queue<T, P> {
    /// For so many messages, of so many bytes together, as far as there is memory; one larger message is taken all the same.
    pub(super) fn new(most: usize, most_bytes: usize, memory: Memory) -> Self {
        let state = State {
            words: VecDeque::new(),
            texts: HashMap::new(),
            turns: VecDeque::new(),
            turnstile: Turnstile::new(most, most_bytes, memory),
            opened: None,
            reader: None,
            is_over: false,
        };
        Self { state: Mutex::new(state), share: (most / SHARE).max(1) }
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

    /// Takes a message as soon as there is room, and its memory; until then `ticket` is its client's place. Where the hub is gone it is for
    /// nobody.
    pub(super) fn poll_say(
        &self,
        cx: &Context<'_>,
        client: Client,
        ticket: &mut Ticket,
        text: &Bytes,
        memory: Option<&mut Memory>,
    ) -> Poll<()> {
        let mut state = self.lock();
        if state.is_over {
            return Poll::Ready(());
        }
        if let Some(own) = state.texts.get_mut(&client).filter(|own| own.texts.len() >= self.share) {
            // It waits for itself, and in nobody's way.
            own.waiting = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if !state.turnstile.enter(ticket, text.len(), cx.waker()) {
            return Poll::Pending;
        }
        let own = state.texts.entry(client).or_default();
        own.texts.push_back((text.clone(), memory.map(Memory::take)));
        if own.texts.len() == 1 {
            state.turns.push_back(client);
        }
        let reader = state.reader.take();
        drop(state);
        if let Some(reader) = reader {
            reader.wake();
        }
        Poll::Ready(())
    }

    /// What waits for room is not to be said any more.
    pub(super) fn take_back(&self, client: Client, ticket: &mut Ticket) {
        let mut state = self.lock();
        let woken = state.turnstile.leave(ticket);
        let waiting = state.texts.get_mut(&client).and_then(|own| own.waiting.take());
        drop(state);
        drop(waiting);
        woken.into_iter().for_each(Waker::wake);
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

    pub(super) fn leave(&self, client: Client, ticket: &mut Ticket) {
        self.take_back(client, ticket);
        self.change(|state| {
            if !state.is_over {
                state.words.push_back(Word::Left(client));
            }
        });
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
        let mut woken = state.turnstile.call_all();
        woken.extend(state.texts.drain().filter_map(|(_, own)| own.waiting));
        state.turns = VecDeque::new();
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
        let (mut state, mut woken) = (self.lock(), Vec::new());
        let word = match state.words.front() {
            Some(Word::Left(client)) => {
                let client = *client;
                let mut next = None;
                while let Some((text, memory, _)) = state.take(client, &mut woken) {
                    if has_room {
                        next = Some((text, memory));
                        break;
                    }
                }
                let State { texts, turns, .. } = &mut *state;
                if turns.len() > 2 * texts.len() + 64 {
                    turns.retain(|client| texts.contains_key(client));
                }
                match next {
                    Some((text, memory)) => Some(Word::Text(client, text, memory)),
                    None => state.words.pop_front(),
                }
            }
            Some(_) => state.words.pop_front(),
            None if has_room => state.take_next(&mut woken),
            None => None,
        };
        if state.words.is_empty() && state.texts.is_empty() {
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
        state.words.is_empty() && state.texts.is_empty() && state.opened.is_none()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        task::Wake,
    };

    use super::*;
    use crate::{
        hub::{
            leg::Found,
            memory::{FREE, PORTION, tests::budget},
        },
        metrics::Metrics,
    };

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A queue, and of each client its ticket and how often it was woken.
    struct World {
        queue: Queue<(), ()>,
        clients: HashMap<Client, (Ticket, Arc<Count>)>,
    }

    impl World {
        fn new(most: usize, most_bytes: usize) -> Self {
            let queue = Queue::new(most, most_bytes, Memory::new(&budget(None)));
            Self { queue, clients: HashMap::new() }
        }

        fn say(&mut self, client: Client, length: usize) -> bool {
            let (ticket, count) = self.clients.entry(client).or_default();
            let waker = Waker::from(Arc::clone(count));
            let text = Bytes::from(vec![b'x'; length]);
            self.queue.poll_say(&Context::from_waker(&waker), client, ticket, &text, None).is_ready()
        }

        fn leave(&mut self, client: Client) {
            let (ticket, _) = self.clients.entry(client).or_default();
            self.queue.leave(client, ticket);
        }

        fn pop(&self, has_room: bool) -> (Client, usize) {
            match self.queue.pop(has_room) {
                Some(Word::Text(client, text, _)) => (client, text.len()),
                Some(Word::Left(client)) => (client, usize::MAX),
                Some(Word::Joined(..)) | None => (0, 0),
            }
        }

        fn woken<const N: usize>(&self, clients: [Client; N]) -> [usize; N] {
            clients.map(|client| self.clients[&client].1.0.load(Ordering::Relaxed))
        }
    }

    /// Of messages there are so many, or so many bytes, and who has one more waits for another to go; what a client has said comes before that it
    /// has left.
    #[test]
    fn messages_wait_for_room() {
        let mut world = World::new(32, 10);
        assert!(world.say(1, 99) && !world.say(2, 1));
        world.leave(1);
        assert_eq!([(); 3].map(|()| world.pop(true)), [(1, 99), (1, usize::MAX), (0, 0)]);
        assert!(world.say(2, 1) && world.say(1, 4) && world.say(3, 5) && !world.say(4, 2));
        assert_eq!(world.pop(true), (2, 1));
        assert!(!world.say(4, 2) && !world.say(5, 1), "behind who waits");
        assert_eq!(world.pop(true), (1, 4));
        assert!(world.say(5, 1) && world.say(4, 2));
        assert_eq!([(); 4].map(|()| world.pop(true)), [(3, 5), (5, 1), (4, 2), (0, 0)]);
        assert!(world.queue.is_empty());
    }

    /// Who says a lot has one turn among the others, and no more places than its share, for which it waits in nobody's way.
    #[test]
    fn nobody_is_ahead_of_all() {
        let mut world = World::new(64, 1000);
        assert_eq!((1..=6).filter(|length| world.say(1, *length)).count(), 4);
        assert!(world.say(2, 7) && world.say(3, 8) && world.say(2, 9));
        assert_eq!(world.pop(true), (1, 1));
        assert_eq!(world.woken([1, 2, 3]), [1, 0, 0]);
        assert!(world.say(1, 5));
        let order = [(2, 7), (3, 8), (1, 2), (2, 9), (1, 3), (1, 4), (1, 5), (0, 0)];
        assert_eq!([(); 8].map(|()| world.pop(true)), order);
        assert!(world.queue.is_empty());
    }

    /// A place that becomes free is for who has waited for longest: nobody who comes later is let in before, nobody else is woken, and who
    /// leaves makes way for the next. Method: one place for many.
    #[test]
    fn nobody_overtakes_who_was_woken() {
        let mut world = World::new(1, 1000);
        assert!(world.say(1, 1) && !world.say(2, 2) && !world.say(3, 3) && !world.say(4, 4));
        assert_eq!(world.pop(true), (1, 1));
        assert_eq!(world.woken([1, 2, 3, 4]), [0, 1, 0, 0]);
        assert!(!world.say(5, 5) && !world.say(1, 1) && world.say(2, 2));
        assert_eq!(world.pop(true), (2, 2));
        world.leave(3);
        assert_eq!(world.woken([2, 3, 4, 5, 1]), [1, 1, 1, 0, 0]);
        assert!(world.say(4, 4));
        assert_eq!([world.pop(true), world.pop(true)], [(3, usize::MAX), (4, 4)]);
        assert!(world.say(5, 5));
    }

    /// Without room for what clients say it is still heard who leaves, whose messages are then lost; and the others keep theirs.
    #[test]
    fn who_leaves_is_heard_without_room() {
        let mut world = World::new(64, 1000);
        assert!(world.say(1, 1) && world.say(2, 2) && world.say(1, 3));
        world.leave(1);
        assert_eq!([world.pop(false), world.pop(false)], [(1, usize::MAX), (0, 0)]);
        assert_eq!([world.pop(true), world.pop(true)], [(2, 2), (0, 0)]);
        assert!(world.queue.is_empty());
    }

    /// What was taken for a message is taken as long as that is there, wherever it goes. Method: a budget of two portions.
    #[test]
    fn a_message_keeps_its_memory() {
        let admission = budget(Some(2 * PORTION));
        let taken = || admission.memory().expect("a budget").0;
        let queue = Queue::<(), ()>::new(9, 1 << 20, Memory::new(&admission));
        let (cx, mut ticket, mut memory) =
            (Context::from_waker(Waker::noop()), Ticket::default(), Memory::new(&admission));
        let text = Bytes::from(vec![b'x'; FREE + 2 * PORTION]);
        assert!(memory.fit(text.len()));
        assert!(queue.poll_say(&cx, 1, &mut ticket, &text, Some(&mut memory)).is_ready());
        drop(memory);
        assert_eq!(taken(), 2 * PORTION as u64);
        let word = queue.pop(true);
        assert!(matches!(word, Some(Word::Text(1, _, Some(_)))) && taken() == 2 * PORTION as u64);
        drop(word);
        assert_eq!(taken(), 0);
    }

    /// When the hub is gone whoever has just joined hears that it is over, and so does whoever joins later; nobody waits for room.
    #[test]
    fn nobody_waits_for_a_hub_that_is_gone() {
        let mut world = World::new(1, 1);
        let mailboxes =
            [(); 2].map(|()| Arc::new(Mailbox::new(1, 1, Memory::new(&budget(None)), Arc::new(Metrics::new()))));
        world.queue.join(1, Arc::clone(&mailboxes[0]), ());
        assert!(world.say(1, 9) && !world.say(1, 9) && !world.say(2, 9));
        world.queue.close();
        assert_eq!(world.woken([1, 2]), [1, 1]);
        world.queue.join(2, Arc::clone(&mailboxes[1]), ());
        world.queue.open(());
        assert!(world.say(2, 9) && world.queue.is_empty());
        for mailbox in mailboxes {
            let cx = Context::from_waker(Waker::noop());
            assert_eq!(mailbox.poll_take(&cx, &mut Bytes::new(), &mut [0; 9]), Poll::Ready(Found::Over(End::Lost)));
        }
    }
}
