//! JSON-RPC 2.0 of many clients on one connection of a backend, as a state machine: messages go in, actions come out.
//!
//! Each request gets an id of the hub's own, and its answer the client's again; so do subscriptions. Everybody gets exactly their own answers,
//! each once: the backend's, or an error object of the hub's when there is none.
//!
//! Not in it: I/O, locks, a clock, a log, random numbers. Clients are numbers here, and a message is text: what stands around it is for the caller
//! to know, who also carries the actions out, in their order.
//!
//! ```text
//! a client's           to the backend                  to the client
//! request              with the hub's id               its answer, with the client's id
//! batch                its requests, as a batch        one list, when all answers are here
//! notification         as it is                        -; if too many are not sent yet: an error object
//! subscribe            with the hub's id               with an id of the hub's in place of the backend's
//! unsubscribe          with the backend's id           its answer; if others hold it too: at once, and nothing to the backend
//! response             -                               -
//! anything else        -                               an error object
//! ```

mod answers;
mod early;
mod questions;
mod subscriptions;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use self::subscriptions::{Key, Number, Subscriptions, unsubscribe};
use super::{
    message::Fault,
    methods::{Methods, Names},
};

/// Answers to subscribe that are awaited after their deadline, of all clients: while there are so many nobody else subscribes. None is forgotten,
/// since nobody could end what it begins.
const MAX_LATE: usize = 1024;
/// Requests that are nobody's any more, while there are so many nobody asks for more: else who leaves and comes again could have any number.
const MAX_ABANDONED: usize = 4096;

/// A number that no other client of the hub has or had.
pub type Client = u64;

/// What a hub and its clients may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests of one client that are not answered, and notifications that are not sent.
    pub max_requests: usize,
    /// Subscriptions of one client, with those that are asked for.
    pub max_subscriptions: usize,
    /// After which a request gets an error object for an answer.
    pub request_timeout: Duration,
    /// Of a message that the hub makes of another one; and of one client's answers that wait for the rest of their batch.
    pub max_message_bytes: usize,
}

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    ToClient {
        client: Client,
        text: String,
    },
    /// To all clients of the hub.
    ToAll {
        text: String,
    },
    ToBackend {
        text: String,
    },
    /// The same, with so many notifications of this client in it: [`Core::told`] is to hear of it when they are sent.
    Tell {
        client: Client,
        count: usize,
        text: String,
    },
    /// A notification, to each of these clients with the id that they know in place of that part of it: [`with_id`].
    News {
        text: Arc<str>,
        id: Range<usize>,
        holders: Vec<(Client, Arc<str>)>,
    },
    /// To the backend, which has asked something: only if there is room, since it may ask without end.
    Refusal {
        text: String,
    },
    /// The backend was lost, and with it a subscription of this client, to whom nothing else would say so. Comes behind its answers.
    EndClient {
        client: Client,
    },
}

/// A text with another id in its place, in pieces.
pub fn with_id<'a>(text: &'a str, place: &Range<usize>, id: &'a str) -> [&'a str; 3] {
    [&text[..place.start], id, &text[place.end..]]
}

/// What became of requests, and what came that was for nobody.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// With a result, or by the hub for an unsubscribe that was not passed on.
    pub answered: u64,
    /// With an error object of the backend's.
    pub failed: u64,
    pub timed_out: u64,
    /// With the backend.
    pub lost: u64,
    /// Whose client left first.
    pub left: u64,
    /// Malformed, or too many: not passed on.
    pub refused: u64,
    /// Responses that clients sent.
    pub client_responses: u64,
    /// Of the backend's messages those that are not JSON-RPC.
    pub malformed: u64,
    /// Responses to what is not asked, or not any more.
    pub strays: u64,
    /// Errors without an id: something was sent that the backend does not understand.
    pub without_id: u64,
    /// What the backend asked its client.
    pub backend_requests: u64,
    /// Notifications of subscriptions that nobody has.
    pub unheard: u64,
    /// Notifications by methods that are of no subscription, nor for all.
    pub unlisted: u64,
    /// Notifications of which too many waited for their clients to know the id.
    pub overflowed: u64,
}

/// All about one hub.
#[derive(Debug)]
pub struct Core {
    limits: Limits,
    methods: Methods,
    /// The id on the backend's connection that was given out last; never again, on whatever connection.
    last_id: u64,
    /// By these ids, which is also the order of their deadlines.
    requests: BTreeMap<u64, Request>,
    /// Of these, so many are of nobody.
    abandoned: usize,
    /// Of these, each unsubscribe: a subscribe that was sent before it may be answered with what it ends.
    ending: BTreeSet<(Key, u64)>,
    /// Methods by which notifications may come before it is known whose they are, and how many subscribes are outstanding.
    awaited: BTreeMap<Box<str>, usize>,
    /// Subscribes whose answer is for nobody any more.
    late: BTreeMap<u64, Names>,
    batches: BTreeMap<u64, Batch>,
    last_batch: u64,
    /// Bytes of answers in them, and of ids of requests. With those of subscriptions there may be so many.
    kept: usize,
    room: usize,
    subscriptions: Subscriptions,
    /// The method of the last notification that is unlisted.
    unlisted: Option<String>,
    /// Those with anything outstanding or subscribed.
    clients: BTreeMap<Client, Holding>,
    counts: Counts,
}

/// What is at the backend.
#[derive(Debug)]
struct Request {
    /// `None`: the hub itself, or somebody who left.
    asker: Option<Asker>,
    kind: Kind,
    deadline: Instant,
}

#[derive(Debug)]
struct Asker {
    client: Client,
    /// As it came.
    id: Box<str>,
    place: Option<Place>,
}

/// In a batch.
#[derive(Debug, Clone, Copy)]
struct Place {
    batch: u64,
    index: usize,
}

#[derive(Debug)]
enum Kind {
    Call,
    Subscribe(Names),
    Unsubscribe(Key, Option<Number>),
}

/// A client's batch that is at the backend.
#[derive(Debug)]
struct Batch {
    answers: Vec<Option<String>>,
    missing: usize,
    bytes: usize,
    /// Begun by answers in it.
    subscriptions: Vec<Number>,
}

/// What a client has.
#[derive(Debug, Default)]
struct Holding {
    requests: BTreeSet<u64>,
    subscriptions: BTreeSet<Number>,
    /// Of the requests, those that ask for a subscription.
    subscribing: usize,
    /// Notifications that are not sent.
    telling: usize,
    batches: BTreeSet<u64>,
    /// In its batches.
    bytes: usize,
}

impl Core {
    pub fn new(limits: Limits, methods: Methods) -> Self {
        Self {
            limits,
            methods,
            last_id: 0,
            requests: BTreeMap::new(),
            abandoned: 0,
            ending: BTreeSet::new(),
            awaited: BTreeMap::new(),
            late: BTreeMap::new(),
            batches: BTreeMap::new(),
            last_batch: 0,
            kept: 0,
            room: usize::MAX,
            subscriptions: Subscriptions::default(),
            unlisted: None,
            clients: BTreeMap::new(),
            counts: Counts::default(),
        }
    }

    /// What the backend's connection is needed for: requests that are not answered, and subscriptions.
    pub fn references(&self) -> usize {
        self.outstanding() + self.subscriptions()
    }

    /// Requests, with those of the hub itself.
    pub fn outstanding(&self) -> usize {
        self.requests.len()
    }

    /// Of clients; several may be one at the backend.
    pub fn subscriptions(&self) -> usize {
        self.subscriptions.len()
    }

    /// Since the beginning.
    pub fn counts(&self) -> Counts {
        let (forgotten, overflowed) = self.subscriptions.missed();
        Counts { unheard: self.counts.unheard + forgotten, overflowed, ..self.counts }
    }

    /// The method of the last notification that was for nobody since its method is not set up; as it was sent, at most so many bytes of it.
    pub fn unlisted(&self) -> &str {
        self.unlisted.as_deref().unwrap_or_default()
    }

    /// Nothing is outstanding, subscribed or kept for anybody.
    pub fn is_at_rest(&self) -> bool {
        self.requests.is_empty()
            && self.abandoned == 0
            && self.ending.is_empty()
            && self.awaited.is_empty()
            && self.batches.is_empty()
            && self.kept == 0
            && self.subscriptions.is_empty()
            && self.clients.is_empty()
    }

    /// Batches wait for answers.
    pub fn has_batches(&self) -> bool {
        !self.batches.is_empty()
    }

    /// Bytes of answers that wait for the rest of their batches, of ids of requests that are not answered, and of what is known of subscriptions; of
    /// all clients.
    pub fn kept(&self) -> usize {
        self.kept + self.subscriptions.bytes()
    }

    /// There may be so many, from now on. At first any number.
    pub fn allow(&mut self, bytes: usize) {
        self.room = bytes;
    }

    /// When [`Self::due`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.requests.first_key_value().map(|(_, request)| request.deadline)
    }

    /// Notifications of this client's are sent.
    pub fn told(&mut self, client: Client, count: usize) {
        if let Some(holding) = self.clients.get_mut(&client) {
            holding.telling = holding.telling.saturating_sub(count);
            self.tidy(client);
        }
    }

    /// The client is gone: nothing is for it any more, and what it holds at the backend is given back. What it has asked the backend still does.
    pub fn client_left(&mut self, client: Client, now: Instant, actions: &mut Vec<Action>) {
        let Some(holding) = self.clients.remove(&client) else { return };
        for number in holding.batches {
            self.batches.remove(&number);
        }
        self.kept -= holding.bytes;
        for id in holding.requests {
            let Some(request) = self.requests.get_mut(&id) else { continue };
            self.kept -= request.asker.take().map_or(0, |asker| asker.id.len());
            let told = if let Kind::Subscribe(names) = &request.kind { Some(names.notification.clone()) } else { None };
            self.counts.left += 1;
            self.abandoned += 1;
            if let Some(notification) = told {
                self.is_told(&notification);
            }
        }
        for number in holding.subscriptions {
            self.end(number, now, actions);
        }
    }

    /// The backend's connection is gone. What was asked may have been carried out or not, so nothing is asked again; and subscriptions are gone
    /// without a word, so their clients have to begin anew.
    pub fn backend_lost(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let mut ended = Vec::new();
        for (client, number) in self.subscriptions.clients() {
            ended.push(client);
            if let Some(holding) = self.clients.get_mut(&client) {
                holding.subscriptions.remove(&number);
            }
        }
        self.subscriptions.clear();
        while let Some((_, request)) = self.take_first() {
            if let Some(asker) = request.asker {
                self.counts.lost += 1;
                let text = Fault::LOST.answer(&asker.id);
                self.deliver(&asker, text, None, now, actions);
            }
        }
        self.late.clear();
        self.awaited.clear();
        ended.sort_unstable();
        ended.dedup();
        // What was not sent never is.
        self.clients.retain(|_, holding| {
            holding.telling = 0;
            !holding.is_idle()
        });
        actions.extend(ended.into_iter().map(|client| Action::EndClient { client }));
    }

    /// The backend's connection has ended while nobody used it. What would have come late on it never comes.
    pub fn closed_unused(&mut self) {
        self.late.clear();
    }

    /// Whoever waits for longer than they should gets an error object.
    pub fn due(&mut self, now: Instant, actions: &mut Vec<Action>) {
        while self.deadline().is_some_and(|deadline| deadline <= now) {
            let Some((id, request)) = self.take_first() else { return };
            if let Kind::Unsubscribe(_, Some(number)) = request.kind {
                // It was asked for, and will most likely be carried out: what comes of it until then is for nobody.
                self.forget(number);
            }
            let notification = if let Kind::Subscribe(names) = request.kind {
                let notification = names.notification.clone();
                // Its answer is nobody's any more, and will be unsubscribed from.
                self.late.insert(id, names);
                Some(notification)
            } else {
                None
            };
            let Some(asker) = request.asker else { continue };
            self.counts.timed_out += 1;
            if let Some(notification) = notification {
                self.is_told(&notification);
            }
            let text = Fault::TIMEOUT.answer(&asker.id);
            self.deliver(&asker, text, None, now, actions);
        }
    }

    fn send(&mut self, asker: Option<Asker>, kind: Kind, now: Instant) -> u64 {
        self.last_id += 1;
        let id = self.last_id;
        if let Kind::Unsubscribe(key, _) = &kind {
            self.ending.insert((key.clone(), id));
        }
        self.abandoned += usize::from(asker.is_none());
        self.kept += asker.as_ref().map_or(0, |asker| asker.id.len());
        self.requests.insert(id, Request { asker, kind, deadline: now + self.limits.request_timeout });
        id
    }

    /// The request is not outstanding any more.
    fn take(&mut self, id: u64) -> Option<Request> {
        let request = self.requests.remove(&id)?;
        if let Kind::Unsubscribe(key, _) = &request.kind {
            self.ending.remove(&(key.clone(), id));
        }
        self.abandoned -= usize::from(request.asker.is_none());
        let is_subscribe = matches!(request.kind, Kind::Subscribe(_));
        if let Some(asker) = &request.asker {
            self.kept -= asker.id.len();
            if let Some(holding) = self.clients.get_mut(&asker.client) {
                holding.requests.remove(&id);
                holding.subscribing -= usize::from(is_subscribe);
            }
        }
        Some(request)
    }

    fn take_first(&mut self) -> Option<(u64, Request)> {
        let id = *self.requests.first_key_value()?.0;
        self.take(id).map(|request| (id, request))
    }

    /// One less waits for an id of this kind.
    fn is_told(&mut self, notification: &str) {
        if let Some(count) = self.awaited.get_mut(notification) {
            *count -= 1;
            if *count == 0 {
                self.awaited.remove(notification);
                self.subscriptions.forget_method(notification);
            }
        }
    }

    /// A client's subscription is over, by its client's will. The backend is told if nobody else holds it, and nobody told it before.
    fn end(&mut self, number: Number, now: Instant, actions: &mut Vec<Action>) {
        if let Some((one, true)) = self.forget(number)
            && !one.is_ending
        {
            self.unsubscribe(one.key, &one.unsubscribe, now, actions);
        }
    }

    fn forget(&mut self, number: Number) -> Option<(subscriptions::Subscription, bool)> {
        let removed = self.subscriptions.remove(number);
        if let Some((one, _)) = &removed
            && let Some(holding) = self.clients.get_mut(&one.client)
        {
            holding.subscriptions.remove(&number);
            self.tidy(one.client);
        }
        removed
    }

    /// By the hub itself, which only waits for the answer.
    fn unsubscribe(&mut self, key: Key, method: &str, now: Instant, actions: &mut Vec<Action>) {
        let id = key.id.clone();
        let asked = self.send(None, Kind::Unsubscribe(key, None), now);
        actions.push(Action::ToBackend { text: unsubscribe(asked, method, &id) });
    }

    /// Nothing is kept of whom there is nothing to be kept.
    fn tidy(&mut self, client: Client) {
        if self.clients.get(&client).is_some_and(Holding::is_idle) {
            self.clients.remove(&client);
        }
    }
}

impl Holding {
    fn is_idle(&self) -> bool {
        let is_asking = !self.requests.is_empty() || !self.batches.is_empty() || self.telling > 0;
        !is_asking && self.subscriptions.is_empty()
    }
}

fn list(elements: &[String]) -> String {
    format!("[{}]", elements.join(","))
}
