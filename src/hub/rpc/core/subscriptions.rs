//! Who holds which subscription.
//!
//! A client sees an id of the hub's own making; the backend's is known here alone. Several may hold the same one of the backend's: some
//! (Solana's) give the same id for the same question twice on a connection, and end it for all with one unsubscribe.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
};

use super::{
    super::{message::quoted, methods::Names},
    Action, Client,
    early::{Early, Moment},
};

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
    /// Until then notifications wait for it that came from this moment on.
    since: Moment,
    /// Its client's own unsubscribe is at the backend.
    pub(super) is_ending: bool,
    /// JSON text of the id that its client sees.
    seen: Arc<str>,
}

/// All of a hub.
#[derive(Debug, Default)]
pub(super) struct Subscriptions {
    all: BTreeMap<Number, Subscription>,
    /// Of texts in them.
    bytes: usize,
    holders: BTreeMap<Key, Holders>,
    by_seen: BTreeMap<Arc<str>, Number>,
    last_number: Number,
    early: Early,
}

/// Of one key. There may be as many as clients have subscriptions, where the backend gives all the same id.
#[derive(Debug, Default)]
struct Holders {
    /// Those whose clients know the id.
    told: BTreeSet<Number>,
    /// The others. Notifications wait for them.
    waiting: BTreeSet<Number>,
}

impl Subscriptions {
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// Of texts that are kept as long as subscriptions are.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn get_mut(&mut self, number: Number) -> Option<&mut Subscription> {
        self.all.get_mut(&number)
    }

    /// Of notifications that waited: in vain, and those that were too many.
    pub(super) fn missed(&self) -> (u64, u64) {
        (self.early.forgotten, self.early.overflowed)
    }

    /// How many hold what the backend knows by this key.
    pub(super) fn holders(&self, key: &Key) -> usize {
        self.holders.get(key).map_or(0, |holders| holders.told.len() + holders.waiting.len())
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
        self.by_seen.insert(Arc::clone(&seen), number);
        // What came before anybody held it is for the first one.
        let since = if self.holders.contains_key(&key) { self.early.next() } else { 0 };
        self.holders.entry(key.clone()).or_default().waiting.insert(number);
        let (is_announced, is_ending) = (false, false);
        let unsubscribe = names.unsubscribe;
        let new = Subscription { client, key, unsubscribe, is_announced, since, is_ending, seen: Arc::clone(&seen) };
        self.bytes += new.bytes();
        self.all.insert(number, new);
        (number, seen)
    }

    /// It is over, and what waits for its client goes. Whether it was the last one of its key stands beside it.
    pub(super) fn remove(&mut self, number: Number) -> Option<(Subscription, bool)> {
        let one = self.all.remove(&number)?;
        self.bytes -= one.bytes();
        self.by_seen.remove(&one.seen);
        let holders = self.holders.get_mut(&one.key)?;
        holders.told.remove(&number);
        let has_waited = holders.waiting.remove(&number);
        let was_last = holders.told.is_empty() && holders.waiting.is_empty();
        if was_last {
            self.holders.remove(&one.key);
        }
        if has_waited {
            self.settle(&one.key);
        }
        Some((one, was_last))
    }

    /// Its client was just told of it: what waits for that follows.
    pub(super) fn announce(&mut self, number: Number, actions: &mut Vec<Action>) {
        let Some(one) = self.all.get_mut(&number) else { return };
        one.is_announced = true;
        self.early.tell(&one.key, one.since, one.client, &one.seen, actions);
        let key = one.key.clone();
        if let Some(holders) = self.holders.get_mut(&key)
            && holders.waiting.remove(&number)
        {
            holders.told.insert(number);
        }
        self.settle(&key);
    }

    /// A notification of this key, whose id is this part of its text, goes to all who hold it. Whether there is anybody.
    pub(super) fn notify(&mut self, key: &Key, text: &str, id: &str, actions: &mut Vec<Action>) -> bool {
        let Some(holders) = self.holders.get(key) else { return false };
        let told = holders.told.iter().filter_map(|number| self.all.get(number));
        let told: Vec<_> = told.map(|one| (one.client, Arc::clone(&one.seen))).collect();
        let waiting = holders.waiting.first().and_then(|number| self.all.get(number)).map(|one| one.client);
        let (id, text) = (place(text, id), Arc::<str>::from(text));
        if waiting.is_some() {
            self.early.hold(key, Arc::clone(&text), id.clone(), waiting);
        }
        if !told.is_empty() {
            actions.push(Action::News { text, id, holders: told });
        }
        true
    }

    /// A notification of what nobody holds yet is kept for whoever is told this id next.
    pub(super) fn keep(&mut self, key: &Key, text: &str, id: &str) {
        self.early.hold(key, text.into(), place(text, id), None);
    }

    /// Nobody will be told this id.
    pub(super) fn forget_key(&mut self, key: &Key) {
        if !self.holders.contains_key(key) {
            self.early.forget_before(key, Moment::MAX);
        }
    }

    /// Nobody waits for an id whose notifications come by this method.
    pub(super) fn forget_method(&mut self, method: &str) {
        let is_over = |key: &&Key| *key.notification == *method && !self.holders.contains_key(*key);
        let over: Vec<_> = self.early.keys().filter(is_over).cloned().collect();
        for key in over {
            self.early.forget_before(&key, Moment::MAX);
        }
    }

    /// What nobody waits for any more goes. Whoever began first waits for the oldest.
    fn settle(&mut self, key: &Key) {
        let first = self.holders.get(key).and_then(|holders| holders.waiting.first());
        let until = first.and_then(|number| self.all.get(number)).map_or(Moment::MAX, |one| one.since);
        self.early.forget_before(key, until);
    }

    /// The backend's connection is gone, and all of this with it. Ids are not used again.
    pub(super) fn clear(&mut self) {
        self.early.clear();
        *self = Self { last_number: self.last_number, early: std::mem::take(&mut self.early), ..Self::default() };
    }

    /// Nothing is left.
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
            && self.bytes == 0
            && self.holders.is_empty()
            && self.by_seen.is_empty()
            && self.early.is_empty()
    }
}

impl Subscription {
    fn bytes(&self) -> usize {
        self.key.id.len() + self.key.notification.len() + self.unsubscribe.len() + self.seen.len()
    }
}

/// Where in its text this part of it stands.
fn place(text: &str, part: &str) -> Range<usize> {
    let start = part.as_ptr().addr() - text.as_ptr().addr();
    start..start + part.len()
}

/// The hub's own request that ends it.
pub(super) fn unsubscribe(request: u64, method: &str, id: &str) -> String {
    format!(r#"{{"jsonrpc":"2.0","id":{request},"method":{},"params":[{id}]}}"#, quoted(method))
}
