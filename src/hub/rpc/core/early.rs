//! Notifications that wait for clients to be told the id that they are about. Each is kept once, whoever waits for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
};

use super::{Action, Client, subscriptions::Key};

/// Those that wait, for all clients; beyond, the oldest one goes. What came before its id is told moments later.
pub(super) const MAX_HELD: usize = 1024;
/// Bytes of these.
const MAX_HELD_BYTES: usize = 1 << 20;
/// Of both, what there may be because of one client: one that lets its batch wait costs others nothing.
pub(super) const SHARE: usize = 4;

/// They are counted as they come.
pub(super) type Moment = u64;

#[derive(Debug, Default)]
pub(super) struct Early {
    all: BTreeMap<Moment, Held>,
    bytes: usize,
    of_key: BTreeMap<Key, BTreeSet<Moment>>,
    of_client: BTreeMap<Client, Share>,
    next: Moment,
    /// Those that waited in vain.
    pub(super) forgotten: u64,
    /// Those that were too many.
    pub(super) overflowed: u64,
}

#[derive(Debug)]
struct Held {
    key: Key,
    /// The backend's, and where in it the id stands.
    text: Arc<str>,
    id: Range<usize>,
    /// Of those who wait who began first. `None`: nobody holds it yet, since it overtook the answer that tells whose it is.
    client: Option<Client>,
    is_told: bool,
}

#[derive(Debug, Default)]
struct Share {
    held: BTreeSet<Moment>,
    bytes: usize,
}

impl Early {
    /// Of what comes next.
    pub(super) fn next(&self) -> Moment {
        self.next
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &Key> {
        self.of_key.keys()
    }

    pub(super) fn hold(&mut self, key: &Key, text: Arc<str>, id: Range<usize>, client: Option<Client>) {
        let moment = self.next;
        self.next += 1;
        self.bytes += text.len();
        if let Some(client) = client {
            let share = self.of_client.entry(client).or_default();
            share.held.insert(moment);
            share.bytes += text.len();
        }
        self.of_key.entry(key.clone()).or_default().insert(moment);
        self.all.insert(moment, Held { key: key.clone(), text, id, client, is_told: false });
        while let Some(oldest) = self.too_many(client) {
            self.remove(oldest);
            self.overflowed += 1;
        }
    }

    /// Which one has to go. A long one may be all that there is of a client.
    fn too_many(&self, client: Option<Client>) -> Option<Moment> {
        if let Some(share) = client.and_then(|client| self.of_client.get(&client))
            && share.held.len() > 1
            && (share.held.len() > MAX_HELD / SHARE || share.bytes > MAX_HELD_BYTES / SHARE)
        {
            return share.held.first().copied();
        }
        let is_full = self.all.len() > MAX_HELD || self.bytes > MAX_HELD_BYTES;
        self.all.first_key_value().filter(|_| is_full).map(|(moment, _)| *moment)
    }

    /// To this client, all of this key from this moment on.
    pub(super) fn tell(
        &mut self,
        key: &Key,
        since: Moment,
        client: Client,
        seen: &Arc<str>,
        actions: &mut Vec<Action>,
    ) {
        let Some(moments) = self.of_key.get(key) else { return };
        for moment in moments.range(since..) {
            let Some(held) = self.all.get_mut(moment) else { continue };
            held.is_told = true;
            let (text, id) = (Arc::clone(&held.text), held.id.clone());
            actions.push(Action::News { text, id, holders: vec![(client, Arc::clone(seen))] });
        }
    }

    /// Nobody waits for what came before this moment.
    pub(super) fn forget_before(&mut self, key: &Key, until: Moment) {
        while let Some(moment) = self.of_key.get(key).and_then(|moments| moments.first().copied())
            && moment < until
        {
            let is_told = self.remove(moment).is_some_and(|held| held.is_told);
            self.forgotten += u64::from(!is_told);
        }
    }

    fn remove(&mut self, moment: Moment) -> Option<Held> {
        let held = self.all.remove(&moment)?;
        self.bytes -= held.text.len();
        if let Some(moments) = self.of_key.get_mut(&held.key) {
            moments.remove(&moment);
            if moments.is_empty() {
                self.of_key.remove(&held.key);
            }
        }
        if let Some(client) = held.client
            && let Some(share) = self.of_client.get_mut(&client)
        {
            share.held.remove(&moment);
            share.bytes -= held.text.len();
            if share.held.is_empty() {
                self.of_client.remove(&client);
            }
        }
        Some(held)
    }

    /// All waited in vain. Moments are not used again.
    pub(super) fn clear(&mut self) {
        let forgotten = self.forgotten + self.all.values().filter(|held| !held.is_told).count() as u64;
        *self = Self { next: self.next, forgotten, overflowed: self.overflowed, ..Self::default() };
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty() && self.bytes == 0 && self.of_key.is_empty() && self.of_client.is_empty()
    }
}
