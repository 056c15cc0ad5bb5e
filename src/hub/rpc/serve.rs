//! The task behind a hub: between its clients, the core, and whatever WebSocket there is just now. What becomes of all of them when that is
//! lost is in `loss.rs`.

mod loss;
mod told;

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    future::poll_fn,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
};

use bytes::Bytes;
use http::HeaderValue;
use tokio::time::{Instant, Sleep, sleep_until, timeout_at};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tracing::debug;

use self::told::Told;
use super::{
    super::{
        End, Opener,
        encode::{encode, encode_pieces},
        key::Key,
        line::{Fault, Heard, Line, OTHER_PROTOCOL, for_all_who_speak},
        memory::Memory,
        roll::State,
        search::Search,
    },
    Callers, Hub, Opened,
    core::{Action, Client, Core, with_id},
    mailbox::{Mailbox, Whose},
    queue::Word,
};
use crate::{
    metrics::Reconnect,
    pool::{AcquireError, Lease, Pool, Reports},
    upstream::Home,
    ws::Code,
};

/// Messages of each side, and bytes of them, after which others have their turn.
const BATCH: usize = 256;
const BATCH_BYTES: usize = 256 << 10;

/// Messages to clients in one turn: one of the backend's may hold thousands, each for all.
const DELIVERIES: usize = 16_384;
/// Of a message, so many bytes are as much work as one more client is.
const DELIVERY_BYTES: usize = 256;

/// `None`: not before the search was over.
type Acquiring = Pin<Box<dyn Future<Output = Option<Result<Lease<Key, Opener>, AcquireError<Fault>>>> + Send>>;

/// See the module.
pub(super) struct Server {
    hub: Arc<Hub>,
    callers: Arc<Callers>,
    key: Key,
    home: Home,
    core: Core,
    /// For what the core keeps, and what is for all clients.
    memory: Memory,
    clients: HashMap<Client, Arc<Mailbox>>,
    /// What the core has said is to be done, and how much of it was done in this turn. Until the rest is nothing else is heard.
    actions: VecDeque<Action>,
    done: usize,
    /// Where WebSockets come from; known while there are clients.
    pool: Option<Pool<Key, Opener>>,
    open: Option<Open>,
    /// The subprotocol that its clients were told.
    protocol: Option<HeaderValue>,
    /// Held while something is outstanding, subscribed or unsent.
    lease: Option<Lease<Key, Opener>>,
    acquiring: Option<Acquiring>,
    /// For a backend that was lost, or can't be reached.
    search: Option<Search>,
    /// Why the last try came to nothing.
    error: String,
    /// By which the backend was found, that may not stay.
    before: Option<Search>,
    /// Until then no WebSocket is asked for.
    sleep: Option<Pin<Box<Sleep>>>,
    /// Messages for the backend.
    unsent: VecDeque<Unsent>,
    unsent_bytes: usize,
    /// For them, and what is just being sent; and whether that was enough.
    unsent_memory: Memory,
    has_memory: bool,
    /// Whose message is just being heard.
    speaker: Option<Client>,
    /// Who alone has spoken on the WebSocket before, and on how many, when the backend ended it because of a message.
    blamed: Option<(Client, u32)>,
    timer: Option<(Instant, Pin<Box<Sleep>>)>,
    begun: Pin<Box<WaitForCancellationFutureOwned>>,
    told: Told,
}

/// Whose messages a WebSocket has had.
#[derive(Debug, Clone, Copy)]
enum Speakers {
    Nobody,
    One(Client),
    /// Then it can't be said whose message was the one that the backend did not like.
    Several,
}

impl Speakers {
    fn and(self, client: Option<Client>) -> Self {
        match (self, client) {
            (Self::Nobody, Some(client)) => Self::One(client),
            (Self::One(one), Some(client)) if one == client => self,
            _ => Self::Several,
        }
    }

    const fn only(self) -> Option<Client> {
        if let Self::One(client) = self { Some(client) } else { None }
    }
}

/// A message for the backend, whose it is, and whose notifications are in it, and how many.
struct Unsent {
    text: String,
    speaker: Option<Client>,
    tells: Option<(Client, usize)>,
}

/// A WebSocket.
struct Open {
    line: Line,
    endpoint: Arc<str>,
    since: Instant,
    /// Bytes of the message that goes out.
    sending: usize,
    speakers: Speakers,
    /// Nobody needs it any more.
    end: Pin<Box<WaitForCancellationFutureOwned>>,
    _reports: Reports,
}

impl Server {
    pub(super) fn new(hub: &Arc<Hub>, callers: &Arc<Callers>, key: &Key, home: &Home) -> Self {
        Self {
            hub: Arc::clone(hub),
            callers: Arc::clone(callers),
            key: key.clone(),
            home: home.clone(),
            core: Core::new(callers.core_limits(), callers.methods.clone()),
            memory: Memory::new(&callers.admission),
            clients: HashMap::new(),
            actions: VecDeque::new(),
            done: 0,
            pool: None,
            open: None,
            protocol: None,
            lease: None,
            acquiring: None,
            search: None,
            error: String::new(),
            before: None,
            sleep: None,
            unsent: VecDeque::new(),
            unsent_bytes: 0,
            unsent_memory: Memory::new(&callers.admission),
            has_memory: true,
            speaker: None,
            blamed: None,
            timer: None,
            begun: Box::pin(home.drain.begun()),
            told: Told::new(&callers.metrics),
        }
    }

    /// Serves until nobody is there and nothing is open.
    pub(super) async fn run(mut self) {
        poll_fn(|cx| self.poll(cx)).await;
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // Before anything is looked at, or what comes in between would be missed.
        self.hub.queue.listen(cx.waker());
        self.take_opened();
        self.done = 0;
        self.carry_on(DELIVERIES);
        let mut is_busy = self.hear_backend(cx);
        is_busy |= self.hear_clients();
        self.look_at_time(cx);
        is_busy |= self.get_lease(cx);
        is_busy |= self.send(cx);
        self.end_unused(cx);
        is_busy |= !self.actions.is_empty();
        self.memory.fit(self.core.kept());
        self.told.tell(&self.core, &self.callers.route, &self.key);
        self.note();
        if is_busy {
            // Behind those who have just been woken.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let is_idle = self.clients.is_empty() && self.open.is_none() && !self.is_needed();
        if is_idle && self.callers.leave(&self.key, &self.hub) { Poll::Ready(()) } else { Poll::Pending }
    }

    /// For people who look.
    fn note(&self) {
        let known = &self.hub.known;
        for (count, now) in [
            (&known.clients, self.clients.len()),
            (&known.outstanding, self.core.outstanding()),
            (&known.subscriptions, self.core.subscriptions()),
        ] {
            count.store(now, Ordering::Relaxed);
        }
        known.is(match (&self.open, &self.search) {
            (_, Some(_)) => State::Searching,
            (Some(_), None) => State::Open,
            // Its first client waits for the backend's 101.
            (None, None) if self.acquiring.is_some() || self.clients.is_empty() => State::Opening,
            (None, None) => State::Resting,
        });
    }

    /// The backend is needed.
    fn is_needed(&self) -> bool {
        self.core.references() > 0 || !self.actions.is_empty() || !self.unsent.is_empty() || self.search.is_some()
    }

    fn take_opened(&mut self) {
        let Some(Opened { line, link, reports }) = self.hub.queue.take_opened() else { return };
        debug!(route = %self.callers.route, key = %self.key, endpoint = %link.endpoint, "a shared WebSocket is open");
        if !self.clients.is_empty() && self.protocol != link.protocol {
            // Its clients were told another subprotocol.
            OTHER_PROTOCOL.clone_into(&mut self.error);
            self.give_up(Reconnect::Refused);
        }
        self.protocol.clone_from(&link.protocol);
        self.hub.known.is_at(&link.endpoint);
        let end = Box::pin(link.end.clone().cancelled_owned());
        let (endpoint, since) = (Arc::clone(&link.endpoint), Instant::now());
        let open = Open { line, endpoint, since, sending: 0, speakers: Speakers::Nobody, end, _reports: reports };
        if let Some(old) = self.open.replace(open) {
            self.home.tracker.spawn(old.line.end(Code::NORMAL));
        }
    }

    /// Whether there may be more.
    fn hear_backend(&mut self, cx: &mut Context<'_>) -> bool {
        let mut bytes = 0;
        for _ in 0..BATCH {
            if bytes > BATCH_BYTES || !self.actions.is_empty() {
                return true;
            }
            let Some(open) = &mut self.open else { return false };
            let Poll::Ready(heard) = open.line.poll_heard(cx) else { return false };
            match heard {
                Heard::Message(true, text) => {
                    self.told.metrics.shared_messages.inc();
                    bytes += text.len();
                    let mut actions = Vec::new();
                    let text = std::str::from_utf8(&text).unwrap_or_default();
                    let now = Instant::now().into_std();
                    if self.core.has_batches() {
                        self.make_room(text.len());
                    }
                    self.core.backend_says(text, now, &mut rand::random::<u128>, &mut actions);
                    self.carry_out(actions);
                }
                // JSON is text; whose this is can't be known.
                Heard::Message(false, _) => self.told.binary += 1,
                Heard::Close(close) => self.lose(for_all_who_speak(close)),
                Heard::Lost => self.lose(None),
            }
        }
        true
    }

    /// Whether there may be more, for which there is room. Who comes and goes needs none.
    fn hear_clients(&mut self) -> bool {
        let mut bytes = 0;
        for heard in 0..BATCH {
            // One is heard in any case: who listens to a backend that says much may want to leave.
            if bytes > BATCH_BYTES || !self.actions.is_empty() || heard > 0 && self.done >= DELIVERIES {
                return true;
            }
            let mut actions = Vec::new();
            match self.hub.queue.pop(self.has_room()) {
                Some(Word::Joined(client, mailbox, pool)) => {
                    self.clients.insert(client, mailbox);
                    self.pool = Some(pool);
                }
                Some(Word::Text(client, text, memory)) => {
                    // For what becomes of it.
                    if let Some(memory) = memory {
                        self.unsent_memory.absorb(memory);
                    }
                    bytes += text.len();
                    let text = std::str::from_utf8(&text).unwrap_or_default();
                    self.make_room(text.len());
                    self.core.client_says(client, text, Instant::now().into_std(), &mut actions);
                    self.speaker = Some(client);
                }
                Some(Word::Left(client)) => {
                    self.clients.remove(&client);
                    let before = self.core.subscriptions();
                    self.core.client_left(client, Instant::now().into_std(), &mut actions);
                    self.done += before - self.core.subscriptions();
                }
                None => return false,
            }
            self.carry_out(actions);
            self.speaker = None;
            self.fit_unsent();
        }
        true
    }

    /// In batches, for so many bytes more, if there is memory.
    fn make_room(&mut self, bytes: usize) {
        self.memory.fit(self.core.kept() + bytes);
        self.core.allow(self.memory.bytes());
    }

    /// For what a client says.
    fn has_room(&self) -> bool {
        let sharing = &self.callers.sharing;
        let is_sending = self.open.as_ref().is_some_and(|open| open.sending > 0);
        let is_full = self.unsent.len() >= sharing.queue_messages || self.unsent_bytes >= sharing.queue_bytes;
        if self.unsent.is_empty() { self.has_memory || !is_sending } else { self.has_memory && !is_full }
    }

    /// Takes what the messages need that are not sent yet, and gives back the rest.
    fn fit_unsent(&mut self) {
        let sending = self.open.as_ref().map_or(0, |open| open.sending);
        self.has_memory = self.unsent_memory.fit(self.unsent_bytes + sending);
    }

    fn look_at_time(&mut self, cx: &mut Context<'_>) {
        loop {
            let Some(deadline) = self.core.deadline().map(Instant::from_std) else {
                self.timer = None;
                return;
            };
            let (_, timer) = match &mut self.timer {
                Some(timer) if timer.0 == deadline => timer,
                other => other.insert((deadline, Box::pin(sleep_until(deadline)))),
            };
            if timer.as_mut().poll(cx).is_pending() {
                return;
            }
            let mut actions = Vec::new();
            self.core.due(Instant::now().into_std(), &mut actions);
            self.carry_out(actions);
        }
    }

    /// Holds a lease while it is needed. Whether something has changed.
    fn get_lease(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.is_needed() {
            self.lease = None;
            self.acquiring = None;
            return false;
        }
        if self.lease.is_some() {
            return false;
        }
        if let Some(sleep) = &mut self.sleep {
            if sleep.as_mut().poll(cx).is_pending() {
                return false;
            }
            self.sleep = None;
        }
        let Some(pool) = &self.pool else { return false };
        // What was lost long ago has nothing to do with the one that is asked for now.
        if self.acquiring.is_none() && self.search.is_none() {
            self.before.take_if(|before| before.until() <= Instant::now());
        }
        let acquiring = self.acquiring.get_or_insert_with(|| {
            let (pool, key, until) = (pool.clone(), self.key.clone(), self.search.as_ref().map(Search::until));
            Box::pin(async move {
                let acquire = pool.acquire(&key);
                match until {
                    Some(until) => timeout_at(until, acquire).await.ok(),
                    None => Some(acquire.await),
                }
            })
        });
        let Poll::Ready(acquired) = acquiring.as_mut().poll(cx) else { return false };
        self.acquiring = None;
        match acquired {
            Some(Ok(lease)) => {
                self.take_opened();
                // It may have ended in this very moment: then another one is asked for.
                if self.open.is_some() && !lease.is_closed() {
                    self.lease = Some(lease);
                    self.find();
                }
            }
            Some(Err(error)) => self.miss(&error),
            None => self.give_up(Reconnect::Expired),
        }
        true
    }

    /// Whether there is room again for what clients wait to say.
    fn send(&mut self, cx: &mut Context<'_>) -> bool {
        let had_room = self.has_room();
        let Some(open) = &mut self.open else { return false };
        if open.sending > 0 && open.line.poll_ready(cx) == Poll::Ready(true) {
            open.sending = 0;
        }
        if self.lease.is_some() {
            while !self.unsent.is_empty()
                && open.line.poll_ready(cx) == Poll::Ready(true)
                && let Some(Unsent { text, speaker, tells }) = self.unsent.pop_front()
            {
                let length = text.len();
                self.unsent_bytes -= length;
                open.line.send(true, Bytes::from(text));
                (open.speakers, open.sending) = (open.speakers.and(speaker), length);
                if let Some((client, count)) = tells {
                    self.core.told(client, count);
                }
            }
        }
        open.line.poll_flush(cx);
        self.fit_unsent();
        !had_room && self.has_room()
    }

    /// Ends a WebSocket that is not used: when the pool says so, or nobody is to come any more.
    fn end_unused(&mut self, cx: &mut Context<'_>) {
        let has_begun = self.begun.as_mut().poll(cx).is_ready();
        if has_begun && self.clients.is_empty() && self.hub.queue.is_empty() && self.core.references() > 0 {
            // What those who have left had asked is not waited for.
            self.forget_all();
            self.lease = None;
        }
        let is_needed = self.is_needed() || self.acquiring.is_some();
        let Some(open) = &mut self.open else { return };
        let is_over = open.end.as_mut().poll(cx).is_ready() || has_begun && !is_needed;
        if is_over && let Some(open) = self.open.take() {
            self.core.closed_unused();
            self.blamed = None;
            let code = if has_begun { Code::GOING_AWAY } else { Code::NORMAL };
            debug!(
                route = %self.callers.route, key = %self.key, endpoint = %open.endpoint,
                "a shared WebSocket is closed: nobody uses it"
            );
            self.home.tracker.spawn(open.line.end(code));
        }
    }

    fn say(&mut self, text: String, tells: Option<(Client, usize)>) {
        self.unsent_bytes += text.len();
        self.unsent.push_back(Unsent { text, speaker: self.speaker, tells });
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        self.actions.extend(actions);
        self.carry_on(DELIVERIES);
    }

    /// Carries out what is next, until so much was done in this turn.
    fn carry_on(&mut self, most: usize) {
        let limits = self.callers.limits;
        while self.done < most
            && let Some(action) = self.actions.pop_front()
        {
            self.done += match &action {
                Action::ToAll { text } => self.clients.len() + work(text.len()),
                Action::ToClient { text, .. } => work(text.len()),
                // As many as are told.
                Action::News { .. } => 0,
                _ => 1,
            };
            match action {
                Action::ToClient { client, text } => {
                    // A notification may have become too long by the id that its client knows.
                    let is_too_long = text.len() as u64 > limits.message;
                    self.told.too_long += u64::from(is_too_long);
                    if let Some(mailbox) = self.clients.get(&client).filter(|_| !is_too_long) {
                        mailbox.push(encode(true, text.as_bytes(), limits.frame), Whose::Own);
                    }
                }
                Action::ToAll { text } => {
                    let frame = encode(true, text.as_bytes(), limits.frame);
                    let (frame, whose) = match self.memory.whole(&frame) {
                        Some(frame) => (frame, Whose::All),
                        None => (frame, Whose::AllAtOnce),
                    };
                    self.clients.values().for_each(|mailbox| mailbox.push(frame.clone(), whose));
                }
                Action::News { text, id, mut holders } => {
                    // One text is encoded for each of them, who may be thousands: the rest is told in another turn.
                    let (count, done) = part(holders.len(), text.len(), most - self.done);
                    self.done += done;
                    for (client, seen) in holders.drain(..count) {
                        // It may have become too long by the id that its client knows.
                        let is_too_long = (text.len() - id.len() + seen.len()) as u64 > limits.message;
                        self.told.too_long += u64::from(is_too_long);
                        if let Some(mailbox) = self.clients.get(&client).filter(|_| !is_too_long) {
                            mailbox.push(encode_pieces(with_id(&text, &id, &seen), limits.frame), Whose::Own);
                        }
                    }
                    if !holders.is_empty() {
                        self.actions.push_front(Action::News { text, id, holders });
                    }
                }
                Action::Refusal { .. } if !self.has_room() => {}
                Action::ToBackend { text } | Action::Refusal { text } => self.say(text, None),
                Action::Tell { client, count, text } => self.say(text, Some((client, count))),
                Action::EndClient { client } => {
                    if let Some(mailbox) = self.clients.get(&client) {
                        mailbox.finish(End::Lost);
                    }
                }
            }
        }
    }
}

/// What a message of so many bytes to one client counts.
fn work(bytes: usize) -> usize {
    1 + bytes / DELIVERY_BYTES
}

/// To how many of these clients such a message goes in what is left of a turn, and what that counts. At least to one.
fn part(clients: usize, bytes: usize, left: usize) -> (usize, usize) {
    let count = left.div_ceil(work(bytes)).max(1).min(clients);
    (count, count * work(bytes))
}

impl Drop for Server {
    /// Whatever came of it, a panic too, its clients hear of it.
    fn drop(&mut self) {
        self.hub.known.is(State::Closing);
        self.finish_all(&End::Lost);
        self.hub.queue.close();
        self.callers.forget(&self.key, &self.hub);
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("key", &self.key).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is encoded in one turn is bounded, whatever the length of a message and however many clients it is for; and each of them is told.
    #[test]
    fn a_turn_encodes_so_much() {
        for (clients, bytes) in
            [(0, 9), (1, 0), (16_384, 0), (100_000, 200), (1000, 4 << 10), (300, 1 << 20), (3, 16 << 20)]
        {
            let (mut told, mut turns) = (0, 0);
            while told < clients {
                let (mut count, mut done) = (0, 0);
                while done < DELIVERIES && told + count < clients {
                    let more = part(clients - told - count, bytes, DELIVERIES - done);
                    (count, done) = (count + more.0, done + more.1);
                }
                assert!(count == 1 || count * bytes <= DELIVERIES * DELIVERY_BYTES + bytes, "{count} of {bytes}");
                told += count;
                turns += 1;
            }
            assert_eq!(told, clients);
            assert!(turns <= 2 + clients * work(bytes) / DELIVERIES, "{turns} turns for {clients} of {bytes}");
        }
        // When all is to be told at once.
        assert_eq!(part(100_000, 1 << 20, usize::MAX).0, 100_000);
    }
}
