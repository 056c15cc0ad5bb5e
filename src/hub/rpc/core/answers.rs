//! What the backend says, and whom it is for.

use std::time::Instant;

use super::{
    super::{
        message::{
            Fault, MAX_ID_BYTES, MAX_METHOD_BYTES, Message, Parts, is_id, splice, string, subscription_id,
            subscription_of,
        },
        methods::Names,
    },
    Action, Asker, Client, Core, Key, Kind, Number, Request, list,
};

/// Elements of a backend's batch: more than it was asked at once (a client's has a thousand) is no answer.
const MAX_BACKEND_BATCH: usize = 4096;

impl Core {
    /// A message of the backend's. `random` makes ids of subscriptions that nobody can guess, where they are texts.
    pub fn backend_says(
        &mut self,
        text: &str,
        now: Instant,
        random: &mut dyn FnMut() -> u128,
        actions: &mut Vec<Action>,
    ) {
        match Message::read(text, MAX_BACKEND_BATCH) {
            Ok(Message::One(text)) => self.dispatch(text, now, random, actions),
            Ok(Message::Batch(elements)) => {
                for element in elements {
                    self.dispatch(element, now, random, actions);
                }
            }
            Err(_) => self.counts.malformed += 1,
        }
    }

    fn dispatch(&mut self, text: &str, now: Instant, random: &mut dyn FnMut() -> u128, actions: &mut Vec<Action>) {
        let parts = match Parts::read(text) {
            Ok(parts) if !parts.is_ambiguous => parts,
            Ok(_) | Err(_) => return self.counts.malformed += 1,
        };
        match (parts.method, parts.id) {
            // With a null there are notifications of servers that began with JSON-RPC 1.0.
            (Some(method), None | Some("null")) => match string(method) {
                Some(method) => self.notify(&method, text, &parts, actions),
                None => self.counts.malformed += 1,
            },
            (Some(_), Some(id)) if is_id(id) => {
                self.counts.backend_requests += 1;
                if id.len() <= MAX_ID_BYTES {
                    actions.push(Action::Refusal { text: Fault::NO_METHOD.answer(id) });
                }
            }
            (None, Some("null")) => self.counts.without_id += 1,
            (None, Some(id)) => self.answer(id, text, &parts, now, random, actions),
            (Some(_), Some(_)) | (None, None) => self.counts.malformed += 1,
        }
    }

    fn notify(&mut self, method: &str, text: &str, parts: &Parts<'_>, actions: &mut Vec<Action>) {
        let about = parts.params.and_then(subscription_of);
        if !self.methods.is_notification(method) {
            // It may be of somebody's subscription, of which nothing is known here: to all would be to the wrong ones. One that names its
            // subscription is, whatever its method.
            let is_own = about.is_some() && parts.params.is_some_and(|params| params.starts_with('{'));
            if is_own || !self.methods.is_for_all(method) {
                self.counts.unlisted += 1;
                self.unlisted = Some(method[..method.floor_char_boundary(MAX_METHOD_BYTES)].to_owned());
            } else {
                actions.push(Action::ToAll { text: text.to_owned() });
            }
            return;
        }
        let key = about.and_then(|id| Some((id, Key { id: subscription_id(id)?.into(), notification: method.into() })));
        let Some((id, key)) = key else { return self.counts.unheard += 1 };
        if self.subscriptions.notify(&key, text, id, actions) {
            return;
        }
        if self.awaited.contains_key(method) {
            self.subscriptions.keep(&key, text, id);
        } else {
            self.counts.unheard += 1;
        }
    }

    fn answer(
        &mut self,
        id: &str,
        text: &str,
        parts: &Parts<'_>,
        now: Instant,
        random: &mut dyn FnMut() -> u128,
        actions: &mut Vec<Action>,
    ) {
        // As it was sent: a number without a sign, a fraction or an exponent.
        let Ok(hub_id) = id.parse() else { return self.counts.strays += 1 };
        let key = |names: &Names| {
            let id = parts.result.filter(|_| !parts.is_error()).and_then(subscription_id)?;
            Some(Key { id: id.into(), notification: names.notification.clone() })
        };
        let (asker, kind) = if let Some(names) = self.late.remove(&hub_id) {
            self.counts.strays += 1;
            (None, Kind::Subscribe(names))
        } else {
            let Some(Request { asker, kind, .. }) = self.take(hub_id) else { return self.counts.strays += 1 };
            (asker, kind)
        };
        if let Kind::Unsubscribe(_, Some(number)) = kind {
            if !parts.is_error() && parts.result.is_some_and(|result| result != "false") {
                self.forget(number);
            } else if let Some(one) = self.subscriptions.get_mut(number) {
                one.is_ending = false;
            }
        }
        let Some(asker) = asker else {
            // What begins is nobody's.
            if let Kind::Subscribe(names) = kind
                && let Some(key) = key(&names)
            {
                self.subscriptions.forget_key(&key);
                if self.subscriptions.holders(&key) == 0 && !self.ends(&key, hub_id) {
                    self.unsubscribe(key, &names.unsubscribe, now, actions);
                }
            }
            return;
        };
        *(if parts.is_error() { &mut self.counts.failed } else { &mut self.counts.answered }) += 1;
        let Kind::Subscribe(names) = kind else {
            let text = splice(text, [(id, &asker.id)]);
            return self.deliver(&asker, text, None, now, actions);
        };
        let notification = names.notification.clone();
        match (key(&names), parts.result) {
            // An unsubscribe that was sent behind this one ends what this one has just found.
            (Some(key), _) if self.ends(&key, hub_id) => {
                self.subscriptions.forget_key(&key);
                let text = Fault::ENDED.answer(&asker.id);
                self.deliver(&asker, text, None, now, actions);
            }
            (Some(key), Some(result)) => {
                let client = asker.client;
                let (number, seen) = self.subscriptions.add(client, key, names, random);
                self.clients.entry(client).or_default().subscriptions.insert(number);
                let text = splice(text, [(id, &asker.id), (result, &seen)]);
                match self.look_for_room(&asker, &text) {
                    Ok(()) => self.deliver(&asker, text, Some(number), now, actions),
                    Err(fault) => {
                        self.deliver(&asker, fault.answer(&asker.id), None, now, actions);
                        self.end(number, now, actions);
                    }
                }
            }
            (..) => {
                let text = splice(text, [(id, &asker.id)]);
                self.deliver(&asker, text, None, now, actions);
            }
        }
        self.is_told(&notification);
    }

    /// An unsubscribe is at the backend that was sent after the request `hub_id`.
    pub(super) fn ends(&self, key: &Key, hub_id: u64) -> bool {
        self.ending.range((key.clone(), hub_id)..=(key.clone(), u64::MAX)).next().is_some()
    }

    /// Whether the answer is too large, or its batch with it, or there is no memory for it to wait.
    fn look_for_room(&self, asker: &Asker, text: &str) -> Result<(), Fault> {
        let is_in_batch = asker.place.is_some();
        let before = if is_in_batch { self.batch_bytes(asker.client) } else { 0 };
        if before + text.len() + "[]".len() > self.limits.max_message_bytes {
            return Err(Fault::TOO_LARGE);
        }
        if is_in_batch && self.kept() + text.len() > self.room {
            return Err(Fault::NO_MEMORY);
        }
        Ok(())
    }

    pub(super) fn batch_bytes(&self, client: Client) -> usize {
        self.clients.get(&client).map_or(0, |holding| holding.bytes)
    }

    /// The answer goes to whoever asked: at once, or when their batch is whole. What it begins, if anything, is theirs from then on.
    pub(super) fn deliver(
        &mut self,
        asker: &Asker,
        text: String,
        begins: Option<Number>,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        let client = asker.client;
        let text = self.look_for_room(asker, &text).map_or_else(|fault| fault.answer(&asker.id), |()| text);
        let Some(place) = asker.place else {
            actions.push(Action::ToClient { client, text });
            if let Some(number) = begins {
                self.subscriptions.announce(number, actions);
            }
            return self.tidy(client);
        };
        let Some(batch) = self.batches.get_mut(&place.batch) else { return };
        if let Some(holding) = self.clients.get_mut(&client) {
            holding.bytes += text.len() + 1;
        }
        // With the comma behind it.
        batch.bytes += text.len() + 1;
        self.kept += text.len() + 1;
        batch.subscriptions.extend(begins);
        batch.answers[place.index] = Some(text);
        batch.missing -= 1;
        if batch.missing > 0 {
            return;
        }
        let Some(batch) = self.batches.remove(&place.batch) else { return };
        self.kept -= batch.bytes;
        if let Some(holding) = self.clients.get_mut(&client) {
            holding.bytes -= batch.bytes;
            holding.batches.remove(&place.batch);
        }
        let answers: Vec<_> = batch.answers.into_iter().flatten().collect();
        let text = list(&answers);
        if text.len() > self.limits.max_message_bytes {
            // By the errors in it. What has begun in it its client will never know, and so could not end.
            actions.push(Action::ToClient { client, text: Fault::TOO_LARGE.answer("null") });
            for number in batch.subscriptions {
                self.end(number, now, actions);
            }
        } else {
            actions.push(Action::ToClient { client, text });
            for number in batch.subscriptions {
                self.subscriptions.announce(number, actions);
            }
        }
        self.tidy(client);
    }
}
