//! What clients say: what of it goes to the backend, and what the hub answers itself.

use std::time::Instant;

use super::{
    super::{
        message::{
            Fault, MAX_ID_BYTES, MAX_METHOD_BYTES, Message, Parts, is_id, only_value, splice, string, subscription_id,
        },
        methods::Role,
    },
    Action, Asker, Batch, Client, Core, Kind, MAX_ABANDONED, MAX_LATE, Place, list,
    subscriptions::unsubscribe,
};

/// Elements of a client's batch, as geth has it: each may be answered by an error of a hundred bytes.
pub(super) const MAX_BATCH: usize = 1000;
/// Elements of a batch that are no requests, each of which is an error object until the others are answered. With more the batch is none.
const MAX_INVALID: usize = 8;
/// Of an id of the hub's.
const ID_BYTES: usize = 20;

/// What becomes of a client's message.
enum Verdict {
    /// To the backend, from which an answer is to come.
    Ask(String),
    /// To the backend, and that is all.
    Tell(String),
    /// The same, by the hub itself.
    End(String),
    Answer(String),
    Nothing,
}

impl Core {
    /// A client's message. Moments never go back.
    pub fn client_says(&mut self, client: Client, text: &str, now: Instant, actions: &mut Vec<Action>) {
        let elements = match Message::read(text, MAX_BATCH) {
            Ok(Message::One(text)) => {
                match self.judge(client, text, None, 0, now) {
                    Verdict::Ask(text) | Verdict::End(text) => actions.push(Action::ToBackend { text }),
                    Verdict::Tell(text) => actions.push(Action::Tell { client, count: 1, text }),
                    Verdict::Answer(text) => actions.push(Action::ToClient { client, text }),
                    Verdict::Nothing => {}
                }
                return;
            }
            // What is here already is bounded, but what comes with each further batch would not be.
            Ok(Message::Batch(_)) if self.batch_bytes(client) >= self.limits.max_message_bytes => {
                self.counts.refused += 1;
                return actions.push(Action::ToClient { client, text: Fault::UNFINISHED.answer("null") });
            }
            Ok(Message::Batch(_)) if self.kept() >= self.room => {
                self.counts.refused += 1;
                return actions.push(Action::ToClient { client, text: Fault::FULL.answer("null") });
            }
            Ok(Message::Batch(elements)) if text.len() + elements.len() * ID_BYTES > self.limits.max_message_bytes => {
                self.counts.refused += 1;
                return actions.push(Action::ToClient { client, text: Fault::LONG_BATCH.answer("null") });
            }
            Ok(Message::Batch(elements))
                if elements.iter().filter(|element| is_hopeless(element)).nth(MAX_INVALID).is_some() =>
            {
                self.counts.refused += 1;
                return actions.push(Action::ToClient { client, text: Fault::MANY_INVALID.answer("null") });
            }
            Ok(Message::Batch(elements)) => elements,
            Err(fault) => {
                self.counts.refused += 1;
                return actions.push(Action::ToClient { client, text: fault.answer("null") });
            }
        };
        self.last_batch += 1;
        let number = self.last_batch;
        let mut batch = Batch { answers: Vec::new(), missing: 0, bytes: 0, subscriptions: Vec::new() };
        let (mut passed, mut telling) = (Vec::new(), 0);
        // What the list comes to at most, if none grows by more than an id of the hub's.
        let mut bytes = text.len() + elements.len() * ID_BYTES;
        for element in elements {
            let place = Place { batch: number, index: batch.answers.len() };
            let expected = element.len() + ID_BYTES;
            let verdict = self.judge(client, element, Some(place), bytes - expected, now);
            if let Verdict::Ask(text) | Verdict::End(text) = &verdict {
                bytes += text.len().saturating_sub(expected);
            }
            match verdict {
                Verdict::Ask(text) => {
                    batch.answers.push(None);
                    batch.missing += 1;
                    passed.push(text);
                }
                Verdict::Tell(text) => {
                    telling += 1;
                    passed.push(text);
                }
                Verdict::End(text) => passed.push(text),
                Verdict::Answer(text) => {
                    batch.bytes += text.len() + 1;
                    batch.answers.push(Some(text));
                }
                Verdict::Nothing => {}
            }
        }
        if telling > 0 {
            actions.push(Action::Tell { client, count: telling, text: list(&passed) });
        } else if !passed.is_empty() {
            actions.push(Action::ToBackend { text: list(&passed) });
        }
        if batch.missing > 0 {
            let holding = self.clients.entry(client).or_default();
            holding.batches.insert(number);
            holding.bytes += batch.bytes;
            self.kept += batch.bytes;
            self.batches.insert(number, batch);
        } else if !batch.answers.is_empty() {
            // "The Server MUST NOT return an empty Array and should return nothing at all" (JSON-RPC 2.0, 6).
            let answers: Vec<_> = batch.answers.into_iter().flatten().collect();
            let text = list(&answers);
            let is_small = text.len() <= self.limits.max_message_bytes;
            let text = if is_small { text } else { Fault::TOO_LARGE.answer("null") };
            actions.push(Action::ToClient { client, text });
        }
    }

    /// What a client's message is, and what becomes of it. Its place is in a batch that is being read, of which the backend gets so many bytes
    /// besides.
    fn judge(&mut self, client: Client, text: &str, place: Option<Place>, besides: usize, now: Instant) -> Verdict {
        let verdict = self.try_judge(client, text, place, besides, now);
        verdict.unwrap_or_else(|(fault, id)| {
            self.counts.refused += 1;
            Verdict::Answer(fault.answer(id))
        })
    }

    fn try_judge<'a>(
        &mut self,
        client: Client,
        text: &'a str,
        place: Option<Place>,
        besides: usize,
        now: Instant,
    ) -> Result<Verdict, (Fault, &'a str)> {
        // "If there was an error in detecting the id in the Request object, it MUST be Null" (JSON-RPC 2.0, 5).
        let parts = Parts::read(text).map_err(|fault| (fault, "null"))?;
        if parts.is_ambiguous {
            return Err((Fault::AMBIGUOUS, "null"));
        }
        let responds = parts.result.is_some() || parts.error.is_some();
        if responds && parts.method.is_none() {
            self.counts.client_responses += 1;
            return Ok(Verdict::Nothing);
        }
        let id = match parts.id {
            Some(id) if id.len() > MAX_ID_BYTES => return Err((Fault::LONG_ID, "null")),
            Some(id) if !is_id(id) => return Err((Fault::INVALID, "null")),
            id => id,
        };
        let refuse = |fault| (fault, id.unwrap_or("null"));
        // What the backend would not understand it might answer without the id, and nobody would know whose that is.
        let is_valid = !responds
            && parts.jsonrpc.and_then(string).is_some_and(|version| version == "2.0")
            && parts.params.is_none_or(|params| params == "null" || params.starts_with(['{', '[']));
        if parts.method.is_some_and(|method| method.len() > MAX_METHOD_BYTES) {
            return Err(refuse(Fault::LONG_METHOD));
        }
        let Some(method) = parts.method.and_then(string).filter(|_| is_valid) else {
            return Err(refuse(Fault::INVALID));
        };
        if id.is_some_and(|id| text.len() - id.len() + ID_BYTES > self.limits.max_message_bytes) {
            return Err(refuse(Fault::LONG_REQUEST));
        }
        match (self.methods.role(&method), id) {
            (Role::Other, None) => {
                // Nobody answers it, so nothing else would bound how many wait.
                if self.asking(client) >= self.limits.max_requests {
                    return Err(refuse(Fault::TOO_MANY_REQUESTS));
                }
                self.clients.entry(client).or_default().telling += 1;
                Ok(Verdict::Tell(text.to_owned()))
            }
            // Nobody would hear of the id, and so nobody could end it.
            (Role::Subscribe(_), None) => Err(refuse(Fault::INVALID)),
            (Role::Other, Some(id)) => {
                let asked = self.ask(client, id, place, Kind::Call, now).map_err(refuse)?;
                Ok(Verdict::Ask(splice(text, [(id, &asked)])))
            }
            (Role::Subscribe(names), Some(id)) => {
                let holding = self.clients.get(&client);
                let count = holding.map_or(0, |holding| holding.subscriptions.len() + holding.subscribing);
                if count >= self.limits.max_subscriptions {
                    return Err(refuse(Fault::TOO_MANY_SUBSCRIPTIONS));
                }
                let asked = self.ask(client, id, place, Kind::Subscribe(names), now).map_err(refuse)?;
                Ok(Verdict::Ask(splice(text, [(id, &asked)])))
            }
            (Role::Unsubscribe, id) => {
                let seen = parts.params.and_then(only_value);
                let found = seen.and_then(|seen| {
                    let (number, one) = self.subscriptions.find(client, &subscription_id(seen)?)?;
                    // The backend's id may be longer than the one that its client knows.
                    let bytes = match id {
                        Some(id) => text.len() - id.len() - seen.len() + ID_BYTES + one.key.id.len(),
                        None => unsubscribe(u64::MAX, &one.unsubscribe, &one.key.id).len(),
                    };
                    Some((seen, number, one.key.clone(), bytes))
                });
                let Some((seen, number, key, bytes)) = found else { return Err(refuse(Fault::NO_SUBSCRIPTION)) };
                // One that is too long for the backend would end the connection for all.
                if besides + bytes > self.limits.max_message_bytes {
                    return Err(refuse(Fault::LONG_REQUEST));
                }
                let Some(id) = id else {
                    let mut actions = Vec::new();
                    self.end(number, now, &mut actions);
                    return Ok(match actions.pop() {
                        Some(Action::ToBackend { text }) => Verdict::End(text),
                        _ => Verdict::Nothing,
                    });
                };
                // The others want to keep it.
                if self.subscriptions.holders(&key) > 1 {
                    self.forget(number);
                    self.counts.answered += 1;
                    return Ok(Verdict::Answer(format!(r#"{{"jsonrpc":"2.0","id":{id},"result":true}}"#)));
                }
                let kind = Kind::Unsubscribe(key.clone(), Some(number));
                let asked = self.ask(client, id, place, kind, now).map_err(refuse)?;
                if let Some(one) = self.subscriptions.get_mut(number) {
                    one.is_ending = true;
                }
                Ok(Verdict::Ask(splice(text, [(id, &asked), (seen, &key.id)])))
            }
        }
    }

    /// Of a client: requests that are not answered, and notifications that are not sent.
    fn asking(&self, client: Client) -> usize {
        self.clients.get(&client).map_or(0, |holding| holding.requests.len() + holding.telling)
    }

    /// One more of a client's requests, and its id at the backend.
    fn ask(
        &mut self,
        client: Client,
        id: &str,
        place: Option<Place>,
        kind: Kind,
        now: Instant,
    ) -> Result<String, Fault> {
        if self.asking(client) >= self.limits.max_requests {
            return Err(Fault::TOO_MANY_REQUESTS);
        }
        if self.abandoned >= MAX_ABANDONED {
            return Err(Fault::ABANDONED);
        }
        if self.kept() + id.len() > self.room {
            return Err(Fault::NO_ROOM);
        }
        if let Kind::Subscribe(names) = &kind {
            if self.late.len() >= MAX_LATE {
                return Err(Fault::LATE);
            }
            *self.awaited.entry(names.notification.clone()).or_default() += 1;
        }
        let is_subscribe = matches!(kind, Kind::Subscribe(_));
        let asked = self.send(Some(Asker { client, id: id.into(), place }), kind, now);
        let holding = self.clients.entry(client).or_default();
        holding.requests.insert(asked);
        holding.subscribing += usize::from(is_subscribe);
        Ok(asked.to_string())
    }
}

/// A short look at an element of a batch: neither a request nor a response.
fn is_hopeless(element: &str) -> bool {
    let parts = if element.starts_with('{') { Parts::read(element).ok() } else { None };
    parts.is_none_or(|parts| parts.is_ambiguous || parts.method.or(parts.result).or(parts.error).is_none())
}
