//! Who holds which subscription, and what of them waits for its client to know the id.
//!
//! A client sees an id of the hub's own making; the backend's is known here alone. Several may hold the same one of the backend's: some
//! (Solana's) give the same id for the same question twice on a connection, and end it for all with one unsubscribe.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use super::{
    super::{
        message::{Parts, quoted, splice, subscription_of},
        methods::Names,
    },
    Action, Client,
};

/// Notifications that wait, of all clients; beyond, the oldest one goes. What came before its id is told moments later.
const MAX_HELD: usize = 1024;
/// Bytes of these.
const MAX_HELD_BYTES: usize = 1 << 20;

/// A subscription of the hub's own counting.
pub(super) type Number = u64;

/// By which the backend's notifications say of what they are.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    /// JSON text of the id, as `subscription_id` makes it.
    pub(super) id: Box<str>,
    /// The method of the notifications: ids of different ones may be the same.
    pub(super) notification: Box<str>,
}

/// One client's.
#[derive(Debug)]
pub(super) struct Subscription {
    pub(super) client: Client,
    pub(super) key: Key,
    pub(super) unsubscribe: Box<str>,
    /// Its client has been told of it.
    is_announced: bool,
    /// Its client's own unsubscribe is at the backend.
    pub(super) is_ending: bool,
    /// JSON text of the id that its client sees.
    seen: Arc<str>,
}

/// All of a hub.
#[derive(Debug, Default)]
pub(super) struct Subscriptions {
    all: BTreeMap<Number, Subscription>,
    holders: BTreeMap<Key, Vec<Number>>,
    by_seen: BTreeMap<Arc<str>, Number>,
    last_number: Number,
    held: VecDeque<Held>,
    held_bytes: usize,
    /// Notifications that waited in vain.
    pub(super) forgotten: u64,
    /// Those that were too many.
    pub(super) overflowed: u64,
}

/// A notification that waits.
#[derive(Debug)]
struct Held {
    whose: Whose,
    text: String,
}

#[derive(Debug, PartialEq, Eq)]
enum Whose {
    /// Nobody's yet: it overtook the answer that tells whose. The text is the backend's.
    Unknown(Key),
    /// Its client has not been told the id. The text is for the client.
    Of(Number),
}

impl Subscriptions {
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn get_mut(&mut self, number: Number) -> Option<&mut Subscription> {
        self.all.get_mut(&number)
    }

    /// How many hold what the backend knows by this key.
    pub(super) fn holders(&self, key: &Key) -> usize {
        self.holders.get(key).map_or(0, Vec::len)
    }

    /// The one that this client knows by this id.
    pub(super) fn find(&self, client: Client, seen: &str) -> Option<(Number, &Subscription)> {
        let number = *self.by_seen.get(seen)?;
        self.all.get(&number).filter(|one| one.client == client && one.is_announced).map(|one| (number, one))
    }

    /// Each client that has one, and which.
    pub(super) fn clients(&self) -> impl Iterator<Item = (Client, Number)> {
        self.all.iter().map(|(number, one)| (one.client, *number))
    }

    /// A new one, and JSON text of the id for its client, who is to be told of it before [`Self::announce`].
    pub(super) fn add(
        &mut self,
        client: Client,
        key: Key,
        names: Names,
        random: &mut dyn FnMut() -> u128,
    ) -> (Number, Arc<str>) {
        self.last_number += 1;
        let number = self.last_number;
        // As the backend's look: clients may parse them. Numbers can be guessed, which is of no use to whom they don't belong.
        let seen: Arc<str> = match key.id.strip_prefix('"') {
            Some(id) => format!("\"{}{:032x}\"", if id.starts_with("0x") { "0x" } else { "" }, random()).into(),
            None => number.to_string().into(),
        };
        for held in self.held.iter_mut().filter(|held| held.whose == Whose::Unknown(key.clone())) {
            self.held_bytes -= held.text.len();
            held.text = for_client(&held.text, &seen);
            self.held_bytes += held.text.len();
            held.whose = Whose::Of(number);
        }
        self.by_seen.insert(Arc::clone(&seen), number);
        self.holders.entry(key.clone()).or_default().push(number);
        let (is_announced, is_ending) = (false, false);
        let unsubscribe = names.unsubscribe;
        let new = Subscription { client, key, unsubscribe, is_announced, is_ending, seen: Arc::clone(&seen) };
        self.all.insert(number, new);
        (number, seen)
    }

    /// It is over, and what waits for its client goes. Whether it was the last one of its key stands beside it.
    pub(super) fn remove(&mut self, number: Number) -> Option<(Subscription, bool)> {
        let one = self.all.remove(&number)?;
        self.by_seen.remove(&one.seen);
        let holders = self.holders.get_mut(&one.key)?;
        holders.retain(|holder| *holder != number);
        let was_last = holders.is_empty();
        if was_last {
            self.holders.remove(&one.key);
        }
        if !one.is_announced {
            self.forget(|whose| *whose == Whose::Of(number));
        }
        Some((one, was_last))
    }

    /// Its client was just told of it: what waits for that follows.
    pub(super) fn announce(&mut self, number: Number, actions: &mut Vec<Action>) {
        let Some(one) = self.all.get_mut(&number) else { return };
        one.is_announced = true;
        let client = one.client;
        self.held.retain_mut(|held| {
            if held.whose != Whose::Of(number) {
                return true;
            }
            let text = std::mem::take(&mut held.text);
            self.held_bytes -= text.len();
            actions.push(Action::ToClient { client, text });
            false
        });
    }

    /// A notification of this key, whose id is this part of its text, goes to all who hold it. Whether there is anybody.
    pub(super) fn notify(&mut self, key: &Key, text: &str, id: &str, actions: &mut Vec<Action>) -> bool {
        let Some(holders) = self.holders.get(key) else { return false };
        let (mut told, mut waiting) = (Vec::new(), Vec::new());
        for number in holders {
            let Some(one) = self.all.get(number) else { continue };
            if one.is_announced {
                told.push((one.client, Arc::clone(&one.seen)));
            } else {
                waiting.push(Held { whose: Whose::Of(*number), text: splice(text, [(id, &one.seen)]) });
            }
        }
        if !told.is_empty() {
            let start = id.as_ptr().addr() - text.as_ptr().addr();
            let id = start..start + id.len();
            actions.push(Action::News { text: text.to_owned(), id, holders: told });
        }
        for held in waiting {
            self.hold(held);
        }
        true
    }

    /// A notification of what nobody holds yet is kept for whoever is told this id next.
    pub(super) fn keep(&mut self, key: Key, text: &str) {
        self.hold(Held { whose: Whose::Unknown(key), text: text.to_owned() });
    }

    fn hold(&mut self, held: Held) {
        self.held_bytes += held.text.len();
        self.held.push_back(held);
        while self.held.len() > MAX_HELD || self.held_bytes > MAX_HELD_BYTES {
            let Some(oldest) = self.held.pop_front() else { return };
            self.held_bytes -= oldest.text.len();
            self.overflowed += 1;
        }
    }

    /// Nobody will be told this id.
    pub(super) fn forget_key(&mut self, key: &Key) {
        self.forget(|whose| matches!(whose, Whose::Unknown(unknown) if unknown == key));
    }

    /// Nobody waits for an id whose notifications come by this method.
    pub(super) fn forget_method(&mut self, method: &str) {
        self.forget(|whose| matches!(whose, Whose::Unknown(key) if *key.notification == *method));
    }

    fn forget(&mut self, is_over: impl Fn(&Whose) -> bool) {
        let before = self.held.len();
        self.held.retain(|held| !is_over(&held.whose));
        self.forgotten += (before - self.held.len()) as u64;
        self.held_bytes = self.held.iter().map(|held| held.text.len()).sum();
    }

    /// The backend's connection is gone, and all of this with it. Ids are not used again.
    pub(super) fn clear(&mut self) {
        let (last_number, overflowed) = (self.last_number, self.overflowed);
        let forgotten = self.forgotten + self.held.len() as u64;
        *self = Self { last_number, forgotten, overflowed, ..Self::default() };
    }

    /// Nothing is left.
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty() && self.holders.is_empty() && self.by_seen.is_empty() && self.held.is_empty()
    }
}

/// The backend's notification with the id that its client knows.
fn for_client(text: &str, seen: &str) -> String {
    let id = Parts::read(text).ok().and_then(|parts| subscription_of(parts.params?));
    id.map_or_else(|| text.to_owned(), |id| splice(text, [(id, seen)]))
}

/// The hub's own request that ends it.
pub(super) fn unsubscribe(request: u64, method: &str, id: &str) -> String {
    format!(r#"{{"jsonrpc":"2.0","id":{request},"method":{},"params":[{id}]}}"#, quoted(method))
}
