//! A world at random: clients with colliding ids, a backend that carries out what it hears in order and answers in any, leaves, losses, silence.
//!
//! Every question has a number of its own in a member that nobody knows (`n`), which the backend puts into its answer, too: so it is known of
//! each answer whose it is, whatever its id says.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use proptest::{
    collection::vec,
    prelude::any,
    test_runner::{Config, TestRunner},
};
use serde::Deserialize;
use serde_json::{Value, value::RawValue};

use super::super::{Action, Client, Core, Limits, with_id};
use crate::hub::rpc::methods::Methods;

const TIMEOUT: Duration = Duration::from_secs(10);
const LIMITS: Limits =
    Limits { max_requests: 6, max_subscriptions: 3, request_timeout: TIMEOUT, max_message_bytes: 1 << 20 };
/// Many are the same, or would be for who reads them as numbers or strings.
const IDS: [&str; 12] =
    ["1", "1", "2", "\"1\"", "null", "1.0", "-0", "1e0", r#""\u0031""#, "18446744073709551617", "\"\"", "\"\u{e9}\""];
/// Text, id and code of what is no request.
const INVALID: [(&str, &str, i64); 5] = [
    ("1", "null", -32600),
    ("[[]]", "null", -32600),
    (r#"{"jsonrpc":"2.0","method":1,"id":7}"#, "7", -32600),
    (r#"{"jsonrpc":"2.0","method":"call","id":1,"ID":2}"#, "null", -32600),
    (r#"{"jsonrpc":"2.0","method":"call","id":{"a":1}}"#, "null", -32600),
];

/// What a client waits for.
#[derive(Debug, Clone)]
struct Ask {
    n: u64,
    id: &'static str,
    what: What,
    at: Instant,
}

#[derive(Debug, Clone, PartialEq)]
enum What {
    Call,
    Subscribe,
    Unsubscribe(String),
    /// The hub's error.
    Fault(i64),
    /// The hub's word that it is unsubscribed.
    Done,
}

/// What the hub has asked the backend, and has no answer to.
#[derive(Debug)]
struct Out {
    client: Option<Client>,
    what: What,
    at: Instant,
    /// Of an unsubscribe: the backend's id; and of a client's, whose it is.
    ends: Option<(String, Option<u64>)>,
}

/// A subscription of a client's, by its question's number.
#[derive(Debug)]
struct Sub {
    client: Client,
    backend: String,
    seen: Option<String>,
    /// The last notification that its client got.
    last: Option<u64>,
}

#[derive(Debug, Default)]
struct Person {
    singles: Vec<Ask>,
    batches: Vec<Vec<Ask>>,
}

/// What an answer may be.
#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(borrow)]
    id: &'a RawValue,
    n: Option<u64>,
    #[serde(borrow)]
    result: Option<&'a RawValue>,
    error: Option<Value>,
}

struct World {
    core: Core,
    now: Instant,
    /// The backend gives the same id for the same question while it lives, as Solana's does, and answers in order.
    shares: bool,
    last_n: u64,
    last_client: Client,
    last_hub_id: u64,
    people: BTreeMap<Client, Person>,
    outs: BTreeMap<u64, Out>,
    subs: BTreeMap<u64, Sub>,
    /// At the backend: its answers that are not sent, live subscriptions with their topic and the last notification.
    answers: Vec<(u64, String)>,
    live: BTreeMap<String, (u64, u64)>,
    last_backend_id: u64,
    sent: Vec<String>,
    actions: usize,
    /// The last random number.
    drawn: u128,
    /// Notifications of the batch that is being made.
    telling: usize,
    /// Errors that clients were told of, by code, and 0 for what the hub has unsubscribed itself.
    codes: BTreeSet<i64>,
}

impl World {
    fn new(shares: bool) -> Self {
        let methods = Methods::new(vec!["*_subscribe *_unsubscribe *_event".parse().unwrap()]);
        let methods = methods.for_all(&["news".to_owned()]);
        Self {
            core: Core::new(LIMITS, methods),
            now: Instant::now(),
            shares,
            last_n: 0,
            last_client: 0,
            last_hub_id: 0,
            people: BTreeMap::new(),
            outs: BTreeMap::new(),
            subs: BTreeMap::new(),
            answers: Vec::new(),
            live: BTreeMap::new(),
            last_backend_id: 0,
            sent: Vec::new(),
            actions: 0,
            drawn: 0,
            telling: 0,
            codes: BTreeSet::new(),
        }
    }

    /// What comes next, drawn from a number.
    fn step(&mut self, drawn: u32) {
        let (op, drawn) = (drawn % 32, drawn as usize / 32);
        let client = self.people.keys().nth(drawn % self.people.len().max(1)).copied();
        let drawn = drawn / 7;
        match (op, client) {
            (0..3, _) if self.people.len() < 5 => {
                self.last_client += 1;
                self.people.insert(self.last_client, Person::default());
            }
            (3..11, Some(client)) => self.ask(client, drawn),
            (11..14, Some(client)) => self.ask_batch(client, drawn),
            (14..20, _) => self.answer(1 + drawn % 3, drawn / 3),
            (20..24, _) => self.notify(drawn),
            (24, _) => self.repeat(drawn),
            (25, Some(client)) => self.leave(client),
            (26, Some(client)) => self.malformed(client),
            (27, _) => self.odd_backend(),
            (28, _) if drawn % 8 == 0 => self.lose(),
            _ => self.pass(Duration::from_millis(drawn as u64 % 3000)),
        }
        self.check();
    }

    fn check(&self) {
        assert_eq!(self.core.outstanding(), self.outs.len(), "{:?}", self.outs);
        assert_eq!(self.core.subscriptions(), self.subs.len(), "{:?}", self.subs);
        assert_eq!(self.core.references(), self.outs.len() + self.subs.len());
        assert_eq!(self.core.deadline(), self.outs.values().map(|out| out.at + TIMEOUT).min());
        assert_eq!(self.core.is_at_rest(), self.outs.is_empty() && self.subs.is_empty());
        for sub in self.subs.values() {
            let is_own =
                |out: &Out| out.client == Some(sub.client) && out.what == What::Unsubscribe(sub.backend.clone());
            let is_live = self.live.contains_key(&sub.backend);
            assert!(is_live || self.outs.values().any(is_own), "{sub:?} was ended by somebody else");
        }
    }

    /// A new question of this client, and what is to become of it; `taken` are those before it in its batch.
    fn question(&mut self, client: Client, drawn: usize, taken: &[Ask]) -> (String, Option<Ask>) {
        self.last_n += 1;
        let (n, at) = (self.last_n, self.now);
        let id = IDS[drawn % IDS.len()];
        let kind = drawn / IDS.len() % 16;
        let drawn = drawn / IDS.len() / 16;
        let is_out = |ask: &&Ask| !matches!(ask.what, What::Fault(_) | What::Done);
        let outs = self.outs.values().filter(|out| out.client == Some(client));
        let taken: Vec<_> = taken.iter().filter(is_out).collect();
        let count = outs.clone().count() + taken.len() + self.telling;
        let is_full = count >= LIMITS.max_requests;
        let request = |method: &str, params: &str| {
            format!(r#"{{"n":{n},"jsonrpc":"2.0","id" : {id},"method":"{method}","params":{params}}}"#)
        };
        match kind {
            0..6 => {
                let what = if is_full { What::Fault(-32052) } else { What::Call };
                (request("call", r#"{"subscription":5}"#), Some(Ask { n, id, what, at }))
            }
            6..9 => {
                let subscribing = outs.filter(|out| out.what == What::Subscribe).count()
                    + taken.iter().filter(|ask| ask.what == What::Subscribe).count();
                let subscribed = self.subs.values().filter(|sub| sub.client == client).count();
                let what = match subscribing + subscribed >= LIMITS.max_subscriptions {
                    true => What::Fault(-32053),
                    false if is_full => What::Fault(-32052),
                    false => What::Subscribe,
                };
                (request("a_subscribe", &format!("[{}]", drawn % 3)), Some(Ask { n, id, what, at }))
            }
            // One of anybody's.
            9..13 => {
                let known: Vec<_> = self.subs.iter().filter(|(_, sub)| sub.seen.is_some()).collect();
                if known.is_empty() {
                    let what = What::Fault(-32602);
                    return (request("a_unsubscribe", "[\"0x1\"]"), Some(Ask { n, id, what, at }));
                }
                let (_, sub) = known[drawn % known.len()];
                let (seen, backend) = (sub.seen.clone().expect("filtered"), sub.backend.clone());
                let what = if sub.client != client {
                    What::Fault(-32602)
                } else if self.subs.values().filter(|other| other.backend == backend).count() > 1 {
                    What::Done
                } else if is_full {
                    What::Fault(-32052)
                } else {
                    What::Unsubscribe(backend)
                };
                if what == What::Done {
                    self.subs.retain(|_, sub| sub.seen.as_ref() != Some(&seen));
                }
                (request("a_unsubscribe", &format!("[{seen}]")), Some(Ask { n, id, what, at }))
            }
            13 => {
                let seen = self.subs.values().find(|sub| sub.client == client).and_then(|sub| sub.seen.clone());
                let Some(seen) = seen else {
                    return self.notification(r#"{"jsonrpc":"2.0","method":"tell"}"#, is_full);
                };
                self.subs.retain(|_, sub| sub.seen.as_ref() != Some(&seen));
                (format!(r#"{{"jsonrpc":"2.0","method":"a_unsubscribe","params":[{seen}]}}"#), None)
            }
            14 => self.notification(r#"{"jsonrpc":"2.0","method":"tell","params":{"id":1}}"#, is_full),
            _ => {
                let (text, id, code) = INVALID[drawn % INVALID.len()];
                // Alone a list in a list is a batch of its own.
                let (text, id, code) = if text.starts_with('[') { INVALID[0] } else { (text, id, code) };
                (text.to_owned(), Some(Ask { n, id, what: What::Fault(code), at }))
            }
        }
    }

    /// That is one too many only together with others that are not sent.
    fn notification(&mut self, text: &str, is_full: bool) -> (String, Option<Ask>) {
        self.telling += usize::from(!is_full);
        let ask = Ask { n: self.last_n, id: "null", what: What::Fault(-32052), at: self.now };
        (text.to_owned(), is_full.then_some(ask))
    }

    fn ask(&mut self, client: Client, drawn: usize) {
        let (text, ask) = self.question(client, drawn, &[]);
        self.people.get_mut(&client).expect("there").singles.extend(ask);
        self.tell(client, &text);
    }

    fn ask_batch(&mut self, client: Client, drawn: usize) {
        let (mut texts, mut asks) = (Vec::new(), Vec::new());
        for index in 0..=drawn % 4 {
            let (text, ask) = self.question(client, drawn.wrapping_mul(31).wrapping_add(index * 77), &asks);
            texts.push(text);
            asks.extend(ask);
        }
        if drawn.is_multiple_of(5) {
            texts.push(INVALID[1].0.to_owned());
            self.last_n += 1;
            asks.push(Ask { n: self.last_n, id: "null", what: What::Fault(-32600), at: self.now });
        }
        if !asks.is_empty() {
            self.people.get_mut(&client).expect("there").batches.push(asks);
        }
        self.tell(client, &format!("[{}]", texts.join(" , ")));
    }

    fn tell(&mut self, client: Client, text: &str) {
        let mut actions = Vec::new();
        self.core.client_says(client, text, self.now, &mut actions);
        self.hear(actions);
        self.telling = 0;
        // What the hub answers itself it answers at once.
        let waits = |ask: &Ask| !matches!(ask.what, What::Fault(_) | What::Done);
        let person = &self.people[&client];
        assert!(person.singles.iter().all(waits), "{text}: {person:?}");
        assert!(person.batches.iter().all(|batch| batch.iter().any(waits)), "{text}: {person:?}");
    }

    fn malformed(&mut self, client: Client) {
        for (text, code) in [("{\"jsonrpc\"", -32700), ("[", -32700), ("[]", -32600), ("true", -32600)] {
            let what = What::Fault(code);
            let ask = Ask { n: 0, id: "null", what, at: self.now };
            self.people.get_mut(&client).expect("there").singles.push(ask);
            self.tell(client, text);
        }
    }

    /// The backend answers some of what waits, in one message or in several.
    fn answer(&mut self, count: usize, drawn: usize) {
        let mut texts = Vec::new();
        for index in 0..count {
            if self.answers.is_empty() {
                break;
            }
            let at = if self.shares { 0 } else { (drawn / 2 + index * 13) % self.answers.len() };
            texts.push(self.answers.remove(at));
        }
        let says = |text: &str, world: &mut Self| {
            world.sent.push(text.to_owned());
            world.backend_says(text);
        };
        // Where one answer may make the hub end what the next one names, the world has to see it between them.
        if drawn.is_multiple_of(2) && !texts.is_empty() && !self.shares {
            for (id, text) in &texts {
                self.is_answered(*id, text);
            }
            let texts: Vec<_> = texts.into_iter().map(|(_, text)| text).collect();
            return says(&format!("[{}]", texts.join(",")), self);
        }
        for (id, text) in texts {
            self.is_answered(id, &text);
            says(&text, self);
        }
    }

    /// What an answer of the backend's changes, before anybody hears of it.
    fn is_answered(&mut self, id: u64, text: &str) {
        let answer: Value = serde_json::from_str(text).expect("made here");
        let Some(out) = self.outs.remove(&id) else { return };
        if let Some((_, Some(n))) = out.ends
            && answer["result"] == true
        {
            self.subs.remove(&n);
        }
        if let (Some(client), What::Subscribe, Some(n)) = (out.client, &out.what, answer["n"].as_u64())
            && !answer["result"].is_null()
        {
            let backend = answer["result"].to_string();
            let is_ended = |(other, out): (&u64, &Out)| {
                *other > id && out.ends.as_ref().is_some_and(|(ended, _)| *ended == backend)
            };
            if !self.outs.iter().any(is_ended) {
                self.subs.insert(n, Sub { client, backend, seen: None, last: None });
            }
        }
    }

    fn backend_says(&mut self, text: &str) {
        let mut actions = Vec::new();
        let drawn = &mut self.drawn;
        let mut draw = || {
            *drawn += 1;
            *drawn
        };
        self.core.backend_says(text, self.now, &mut draw, &mut actions);
        self.hear(actions);
    }

    /// A subscription's news, of one that its client may not know yet; or news for all.
    fn notify(&mut self, drawn: usize) {
        let count = self.live.len();
        let Some((id, (_, last))) = self.live.iter_mut().nth(drawn % (count + 1)) else {
            return self.backend_says(r#"{"jsonrpc":"2.0","method":"news","params":[1]}"#);
        };
        *last += 1;
        let (id, last) = (id.clone(), *last);
        self.backend_says(&format!(
            r#"{{"jsonrpc":"2.0","method":"a_event","params":{{"subscription":{id},"result":{{"to":{id},"last":{last}}}}}}}"#
        ));
        for sub in self.subs.values().filter(|sub| sub.backend == id && sub.seen.is_some()) {
            assert_eq!(sub.last, Some(last), "{sub:?} did not get its news");
        }
    }

    /// What was said before, ids that never were, and what is not JSON: nobody hears of it.
    fn repeat(&mut self, drawn: usize) {
        let known: BTreeSet<_> = self.outs.keys().chain(self.answers.iter().map(|(id, _)| id)).copied().collect();
        let stray = (0..50).find(|id| !known.contains(id)).unwrap_or(0);
        let mut texts = vec![format!(r#"{{"jsonrpc":"2.0","id":{stray},"n":1,"result":"0x7"}}"#), "{\"id\"".to_owned()];
        texts.extend(self.sent.get(drawn % self.sent.len().max(1)).cloned());
        for text in texts {
            let before = self.actions;
            self.backend_says(&text);
            assert_eq!(self.actions, before, "{text}");
        }
    }

    fn odd_backend(&mut self) {
        let before = self.actions;
        self.backend_says(r#"{"jsonrpc":"2.0","id":1,"method":"call"}"#);
        assert_eq!(self.actions, before + 1);
    }

    fn leave(&mut self, client: Client) {
        self.people.remove(&client);
        // The backend goes on with them, for nobody.
        for out in self.outs.values_mut().filter(|out| out.client == Some(client)) {
            out.client = None;
            if let Some(ends) = &mut out.ends {
                ends.1 = None;
            }
        }
        self.subs.retain(|_, sub| sub.client != client);
        let mut actions = Vec::new();
        self.core.client_left(client, self.now, &mut actions);
        self.hear(actions);
    }

    fn lose(&mut self) {
        self.answers.clear();
        self.live.clear();
        self.outs.clear();
        let ended: BTreeSet<_> = std::mem::take(&mut self.subs).into_values().map(|sub| sub.client).collect();
        let mut actions = Vec::new();
        self.core.backend_lost(self.now, &mut actions);
        let told: BTreeSet<_> = actions
            .extract_if(.., |action| matches!(action, Action::EndClient { .. }))
            .map(|action| match action {
                Action::EndClient { client } => client,
                _ => 0,
            })
            .collect();
        assert_eq!(told, ended);
        self.hear(actions);
        for person in self.people.values() {
            assert!(person.singles.is_empty() && person.batches.is_empty(), "{person:?}");
        }
        for client in ended {
            self.leave(client);
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        let now = self.now;
        let ended: Vec<_> = self.outs.extract_if(.., |_, out| out.at + TIMEOUT <= now).collect();
        for (_, out) in ended {
            if let Some((_, Some(n))) = out.ends {
                self.subs.remove(&n);
            }
        }
        let mut actions = Vec::new();
        self.core.due(now, &mut actions);
        self.hear(actions);
    }

    fn hear(&mut self, actions: Vec<Action>) {
        self.actions += actions.len();
        for action in actions {
            match action {
                Action::ToClient { client, text } => self.heard_by_client(client, &text),
                Action::ToAll { text } => assert!(text.contains("news"), "{text}"),
                Action::News { text, id, holders } => {
                    for (client, seen) in holders {
                        self.heard_by_client(client, &with_id(&text, &id, &seen).concat());
                    }
                }
                Action::ToBackend { ref text } | Action::Tell { ref text, .. } | Action::Refusal { ref text } => {
                    if let Action::Tell { client, count, .. } = action {
                        self.core.told(client, count);
                    }
                    match serde_json::from_str(text).expect("the hub speaks JSON") {
                        Value::Array(elements) => elements.iter().for_each(|element| self.heard_by_backend(element)),
                        element => self.heard_by_backend(&element),
                    }
                }
                Action::EndClient { client } => panic!("{client} is ended, with nothing lost"),
            }
        }
    }

    /// Carried out at once and in order; answered some time.
    fn heard_by_backend(&mut self, text: &Value) {
        let Some(method) = text["method"].as_str() else {
            assert_eq!((&text["id"], &text["error"]["code"]), (&1.into(), &(-32601).into()));
            return;
        };
        if text.get("id").is_none() {
            return assert_eq!(method, "tell");
        }
        let id = text["id"].as_u64().expect("a number of the hub's");
        assert!(id > self.last_hub_id, "an id came twice");
        self.last_hub_id = id;
        let n = text["n"].as_u64();
        let asks = |person: &Person| -> Vec<Ask> {
            person
                .singles
                .iter()
                .chain(person.batches.iter().flatten())
                .filter(|ask| Some(ask.n) == n)
                .cloned()
                .collect()
        };
        let asked = self.people.iter().find_map(|(client, person)| Some((*client, asks(person).pop()?)));
        let mut ends = None;
        let result = match method {
            "call" => format!("\"{n:?}\""),
            "a_subscribe" => {
                let topic = text["params"][0].as_u64().expect("made here");
                let same = self.live.iter().find(|(_, live)| self.shares && live.0 == topic);
                let backend_id = if let Some((id, _)) = same {
                    id.clone()
                } else {
                    self.last_backend_id += 1;
                    let id = self.last_backend_id;
                    match id % 3 {
                        0 => format!("\"0x{id:x}\""),
                        1 => format!("\"{id}\""),
                        _ => id.to_string(),
                    }
                };
                self.live.entry(backend_id.clone()).or_insert((topic, 0));
                backend_id
            }
            "a_unsubscribe" => {
                let backend_id = text["params"][0].to_string();
                let whose = asked.as_ref().and_then(|(client, _)| {
                    let own = |sub: &&Sub| sub.client == *client && sub.backend == backend_id;
                    self.subs.iter().find(|(_, sub)| own(sub)).map(|(n, _)| *n)
                });
                ends = Some((backend_id.clone(), whose));
                self.live.remove(&backend_id).is_some().to_string()
            }
            _ => panic!("{text}"),
        };
        if let Some((_, ask)) = &asked {
            assert!(matches!(ask.what, What::Call | What::Subscribe | What::Unsubscribe(_)), "{ask:?} was passed on");
        } else {
            assert!(n.is_none() && method == "a_unsubscribe", "nobody asked {text}");
        }
        let answer = match n {
            // Some calls fail.
            Some(n) if method == "call" && n % 5 == 0 => format!(r#""n":{n},"error":{{"code":1,"message":"x"}}"#),
            Some(n) => format!(r#""n":{n},"result":{result}"#),
            None => format!(r#""result":{result}"#),
        };
        self.answers.push((id, format!(r#"{{"id":{id},{answer},"jsonrpc":"2.0"}}"#)));
        let (client, what) = asked.map_or((None, What::Done), |(client, ask)| (Some(client), ask.what));
        self.outs.insert(id, Out { client, what, at: self.now, ends });
    }

    fn heard_by_client(&mut self, client: Client, text: &str) {
        assert!(self.people.contains_key(&client), "{text} is for {client}, who has left");
        if text.starts_with('[') {
            let answers: Vec<&RawValue> = serde_json::from_str(text).expect("the hub speaks JSON");
            let batches = self.people[&client].batches.clone();
            let fits = |ask: &Ask, answer: &str| self.fits(ask, answer);
            let whole = batches.iter().position(|batch| {
                batch.len() == answers.len() && batch.iter().zip(&answers).all(|(ask, answer)| fits(ask, answer.get()))
            });
            let whole = whole.unwrap_or_else(|| panic!("{text} is none of {batches:#?}"));
            let batch = self.people.get_mut(&client).expect("there").batches.remove(whole);
            for (ask, answer) in batch.iter().zip(answers) {
                self.takes(client, ask, answer.get());
            }
            return;
        }
        let value: Value = serde_json::from_str(text).expect("the hub speaks JSON");
        if value.get("method").is_some() {
            let seen = value["params"]["subscription"].to_string();
            let shares = self.shares;
            let sub = self.subs.values_mut().find(|sub| sub.seen.as_ref() == Some(&seen));
            let sub = sub.unwrap_or_else(|| panic!("{client} was not told of what this is: {text}"));
            assert_eq!(sub.client, client, "{text}");
            assert_eq!(sub.backend, value["params"]["result"]["to"].to_string());
            let last = value["params"]["result"]["last"].as_u64().expect("made here");
            assert!(sub.last.map_or(shares || last == 1, |before| before + 1 == last), "{sub:?}, and then {text}");
            sub.last = Some(last);
            return;
        }
        let singles = self.people[&client].singles.clone();
        let own = singles.iter().position(|ask| self.fits(ask, text));
        let own = own.unwrap_or_else(|| panic!("{text} is for none of {singles:#?}"));
        let ask = self.people.get_mut(&client).expect("there").singles.remove(own);
        self.takes(client, &ask, text);
    }

    /// This is an answer to it, byte for byte as far as the id goes, and it is time for it.
    fn fits(&self, ask: &Ask, text: &str) -> bool {
        let answer: Answer<'_> = serde_json::from_str(text).expect("the hub answers by the book");
        let code = answer.error.as_ref().and_then(|error| error["code"].as_i64());
        let is_carried = !matches!(ask.what, What::Fault(_) | What::Done);
        answer.id.get() == ask.id
            && match (answer.n, code) {
                (Some(n), _) => n == ask.n && is_carried,
                (None, Some(-32050)) => is_carried && self.answers.is_empty() && self.outs.is_empty(),
                (None, Some(-32051)) => is_carried && ask.at + TIMEOUT <= self.now,
                (None, Some(-32055)) => ask.what == What::Subscribe && self.shares,
                (None, Some(code)) => ask.what == What::Fault(code),
                (None, None) => ask.what == What::Done && answer.result.is_some_and(|result| result.get() == "true"),
            }
    }

    fn takes(&mut self, client: Client, ask: &Ask, text: &str) {
        let answer: Answer<'_> = serde_json::from_str(text).expect("it was read before");
        if answer.n.is_none() {
            self.codes.insert(answer.error.as_ref().map_or(0, |error| error["code"].as_i64().unwrap_or(0)));
        }
        let (Some(n), Some(result)) = (answer.n, answer.result) else { return };
        match &ask.what {
            What::Call => assert_eq!(result.get(), format!("\"{:?}\"", Some(n))),
            What::Subscribe => {
                let others: Vec<_> = self.subs.values().filter_map(|sub| sub.seen.clone()).collect();
                let seen = result.get().to_owned();
                assert!(!others.contains(&seen), "an id that another one has: {seen}");
                // It may be over already: the batch that it is in was answered later.
                if let Some(sub) = self.subs.get_mut(&n) {
                    assert_eq!(sub.client, client);
                    assert_eq!(sub.backend.starts_with("\"0x"), seen.starts_with("\"0x"));
                    assert_eq!(sub.backend.starts_with('"'), seen.starts_with('"'));
                    sub.seen = Some(seen);
                }
            }
            _ => {}
        }
    }

    /// All is answered, and all leave: nothing is left, here or at the backend.
    fn end(&mut self, in_time: bool) {
        if in_time {
            while !self.answers.is_empty() {
                self.answer(1, 1);
                self.check();
            }
        } else {
            self.pass(TIMEOUT);
        }
        for person in self.people.values() {
            assert!(person.singles.is_empty() && person.batches.is_empty(), "{person:?} waits for ever");
        }
        while let Some(client) = self.people.keys().next().copied() {
            self.leave(client);
            self.check();
        }
        while !self.answers.is_empty() {
            self.answer(1, 1);
            self.check();
        }
        assert_eq!(self.core.references(), 0);
        assert!(self.core.is_at_rest());
        assert!(self.live.is_empty(), "left at the backend: {:?}", self.live);
    }
}

/// Random steps in short runs, by backends of both kinds: each answer reaches who asked, with the id that they gave it, once and in full; no
/// news reaches another one; references are what is outstanding and subscribed; and when all have left nothing is left anywhere.
#[test]
fn everybody_gets_exactly_their_own() {
    let config = Config { cases: 600, failure_persistence: None, ..Config::default() };
    let said = Cell::new(0);
    let codes = RefCell::new(BTreeSet::new());
    TestRunner::new(config)
        .run(&(vec(any::<u32>(), 100..400), any::<bool>(), any::<bool>()), |(drawn, shares, in_time)| {
            let mut world = World::new(shares);
            for drawn in drawn {
                world.step(drawn);
            }
            world.end(in_time);
            said.set(said.get() + world.actions);
            codes.borrow_mut().append(&mut world.codes);
            Ok(())
        })
        .unwrap();
    assert!(said.get() > 50_000, "{} messages", said.get());
    let all = BTreeSet::from([-32700, -32602, -32600, -32055, -32053, -32052, -32051, -32050, 0]);
    assert_eq!(*codes.borrow(), all, "not all of it has happened");
}
