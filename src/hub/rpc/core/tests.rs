//! Vectors: what comes in, word by word, and what comes of it. `model.rs` has a world that does all of this at random.

mod model;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Action, Core, Limits, MAX_ABANDONED, MAX_LATE,
    early::{MAX_HELD, SHARE},
    questions::MAX_BATCH,
    with_id,
};
use crate::hub::rpc::{
    message::{MAX_ID_BYTES, MAX_METHOD_BYTES},
    methods::Methods,
};

const TIMEOUT: Duration = Duration::from_secs(30);
const LIMITS: Limits =
    Limits { max_requests: 4, max_subscriptions: 2, request_timeout: TIMEOUT, max_message_bytes: 16 << 20 };

/// A hub at a moment, and what its random numbers are.
struct Hub {
    core: Core,
    now: Instant,
    random: u128,
}

impl Hub {
    fn new() -> Self {
        Self::with(LIMITS)
    }

    fn with(limits: Limits) -> Self {
        let methods = ["eth_subscribe eth_unsubscribe eth_subscription", "*Subscribe *Unsubscribe *Notification"];
        let methods = Methods::new(methods.iter().map(|triple| triple.parse().unwrap()).collect());
        let methods = methods.for_all(&["news".to_owned(), "chain_*".to_owned()]);
        Self { core: Core::new(limits, methods), now: Instant::now(), random: 0xa0 }
    }

    fn client(&mut self, client: u64, text: &str) -> Vec<String> {
        let mut actions = Vec::new();
        self.core.client_says(client, text, self.now, &mut actions);
        for action in &actions {
            if let Action::Tell { client, count, .. } = action {
                self.core.told(*client, *count);
            }
        }
        told(actions)
    }

    fn backend(&mut self, text: &str) -> Vec<String> {
        let mut actions = Vec::new();
        let random = &mut self.random;
        let mut draw = || {
            *random += 1;
            *random
        };
        self.core.backend_says(text, self.now, &mut draw, &mut actions);
        told(actions)
    }

    fn left(&mut self, client: u64) -> Vec<String> {
        let mut actions = Vec::new();
        self.core.client_left(client, self.now, &mut actions);
        told(actions)
    }

    fn lost(&mut self) -> Vec<String> {
        let mut actions = Vec::new();
        self.core.backend_lost(self.now, &mut actions);
        told(actions)
    }

    fn after(&mut self, time: Duration) -> Vec<String> {
        self.now += time;
        let mut actions = Vec::new();
        self.core.due(self.now, &mut actions);
        told(actions)
    }

    /// Client 1 and 2 hold a subscription each, by ids of this kind.
    fn subscribed(backend_ids: [&str; 2]) -> Self {
        let mut hub = Self::new();
        for (client, id) in (1..).zip(backend_ids) {
            hub.client(client, r#"{"jsonrpc":"2.0","id":"s","method":"eth_subscribe","params":["newHeads"]}"#);
            hub.backend(&format!(r#"{{"jsonrpc":"2.0","id":{client},"result":{id}}}"#));
        }
        assert_eq!(hub.core.subscriptions(), 2);
        hub
    }
}

/// Who is told what: `1: ` a client, `*: ` all, `>: ` the backend.
fn told(actions: Vec<Action>) -> Vec<String> {
    let told = actions.into_iter().flat_map(|action| match action {
        Action::ToClient { client, text } => vec![format!("{client}: {text}")],
        Action::ToAll { text } => vec![format!("*: {text}")],
        Action::News { text, id, holders } => {
            let one = |(client, seen): &(_, Arc<str>)| format!("{client}: {}", with_id(&text, &id, seen).concat());
            holders.iter().map(one).collect()
        }
        Action::ToBackend { text } | Action::Tell { text, .. } => vec![format!(">: {text}")],
        Action::Refusal { text } => vec![format!("?: {text}")],
        Action::EndClient { client } => vec![format!("{client}: end")],
    });
    told.collect()
}

fn fault(client: u64, id: &str, code: i32) -> impl Fn(&[String]) {
    let expected = format!(r#"{client}: {{"jsonrpc":"2.0","id":{id},"error":{{"code":{code},"#);
    move |told| {
        assert!(told.len() == 1 && told[0].starts_with(&expected), "{told:?} is not {expected}");
        serde_json::from_str::<serde_json::Value>(&told[0][3..]).unwrap();
    }
}

const NOTHING: [String; 0] = [];

/// A message keeps all its bytes but those of its id: one that is written as oddly as JSON allows goes to the backend and back, with
/// an id of each kind, twice at once.
#[test]
fn only_the_id_is_replaced() {
    for id in
        ["1", "-0", "1.0", "1e+2", "18446744073709551617", "\"1\"", "\"\"", r#""\u0069\"d\\""#, "\"\u{e9}\"", "null"]
    {
        let mut hub = Hub::new();
        let odd = |id: &str| {
            format!(
                " {{ \"params\" :{{\"id\":[1 , {{\"id\":2}}], \"x\":1.50e1}},\"ext\":\"\\ud83d\", \"id\" :\t{id} ,\n\"me\\u0074hod\":\"a\\u0062c\",\"jsonrpc\":\"2.\\u0030\"}} "
            )
        };
        assert_eq!(hub.client(7, &odd(id)), [format!(">: {}", odd("1"))]);
        assert_eq!(hub.client(7, &odd(id)), [format!(">: {}", odd("2"))]);
        assert_eq!(hub.core.references(), 2);
        let answer =
            |id: &str, from: &str| format!("{{\"result\" : {{\"id\":{from}}},\"id\": {id}, \"jsonrpc\":\"2.0\"}}");
        assert_eq!(hub.backend(&answer("2", "2.0")), [format!("7: {}", answer(id, "2.0"))]);
        assert_eq!(hub.backend(&answer("2", "2.0")), NOTHING, "answered twice");
        assert_eq!(hub.backend(&answer("1", "-1")), [format!("7: {}", answer(id, "-1"))]);
        assert!(hub.core.is_at_rest());
        assert_eq!((hub.core.counts().answered, hub.core.counts().strays), (2, 1));
    }
}

/// Notifications count as requests do until they are sent, also those of one batch; then an error object says so, and when they are sent, or the
/// backend is lost, there is room again.
#[test]
fn a_client_has_so_many_notifications_at_once() {
    let tell = r#"{"jsonrpc":"2.0","method":"m"}"#;
    let mut hub = Hub::new();
    let said = |hub: &mut Hub, text: &str| {
        let mut actions = Vec::new();
        hub.core.client_says(1, text, hub.now, &mut actions);
        actions
    };
    let is_told =
        |count| move |action: &Action| matches!(action, Action::Tell { client: 1, count: all, .. } if *all == count);
    assert!(said(&mut hub, tell).iter().all(is_told(1)));
    assert!(hub.client(1, r#"{"jsonrpc":"2.0","id":1,"method":"m"}"#)[0].starts_with('>'));
    let actions = said(&mut hub, &format!("[{tell},{tell},{tell}]"));
    assert!(is_told(2)(&actions[0]), "{actions:?}");
    let told = told(actions);
    assert!(
        told.len() == 2 && told[1].starts_with(r#"1: [{"jsonrpc":"2.0","id":null,"error":{"code":-32052"#),
        "{told:?}"
    );
    fault(1, "7", -32052)(&hub.client(1, r#"{"jsonrpc":"2.0","id":7,"method":"m"}"#));
    fault(1, "null", -32052)(&hub.client(1, tell));
    hub.core.told(1, 2);
    assert!(said(&mut hub, tell).iter().all(is_told(1)));
    hub.lost();
    assert!(hub.core.is_at_rest());
    assert!(said(&mut hub, &format!("[{tell},{tell},{tell},{tell}]")).iter().all(is_told(4)));
    hub.left(1);
    hub.core.told(1, 4);
    assert!(hub.core.is_at_rest());
}

/// Where there is no memory for answers to wait for the rest of their batch, error objects do so, and another batch is refused, and one more request
/// too; what was asked alone before is answered, and so are batches when there is memory again.
#[test]
fn batches_take_memory() {
    let mut hub = Hub::new();
    let two = r#"[{"jsonrpc":"2.0","id":"a","method":"x"},{"jsonrpc":"2.0","id":"b","method":"x"}]"#;
    let answer = |id: u64, length: usize| format!(r#"{{"jsonrpc":"2.0","id":{id},"result":"{}"}}"#, "x".repeat(length));
    hub.core.allow(300);
    hub.client(1, two);
    assert_eq!(hub.backend(&answer(1, 300)), NOTHING);
    assert!(hub.core.has_batches() && (1..300).contains(&hub.core.kept()));
    hub.client(2, r#"{"jsonrpc":"2.0","id":"c","method":"x"}"#);
    hub.core.allow(100);
    fault(2, "null", -32056)(&hub.client(2, two));
    fault(2, "\"d\"", -32056)(&hub.client(2, r#"{"jsonrpc":"2.0","id":"d","method":"x"}"#));
    assert!(hub.backend(&answer(3, 300))[0].contains(r#""id":"c","result""#));
    hub.core.allow(1000);
    let told = hub.backend(&answer(2, 1)).concat();
    assert!(told.contains(r#""id":"a","error":{"code":-32056"#) && told.contains(r#""id":"b","result""#), "{told}");
    assert_eq!(told.matches(r#""carried_out":"unknown""#).count(), 1);
    hub.client(1, two);
    hub.backend(&answer(4, 9));
    hub.left(1);
    hub.backend(&answer(5, 9));
    assert!(hub.core.is_at_rest());
}

/// Ids of requests that are not answered take memory as answers do, and so do subscriptions: without it one more is refused, and what ends, in each
/// way that there is, gives its own back.
#[test]
fn ids_take_memory() {
    let mut hub = Hub::new();
    let id = |letter: &str| format!("\"{}\"", letter.repeat(98));
    let ask = |letter: &str, method: &str| format!(r#"{{"jsonrpc":"2.0","id":{},"method":"{method}"}}"#, id(letter));
    hub.core.allow(250);
    for letter in ["a", "b"] {
        assert!(hub.client(1, &ask(letter, "m"))[0].starts_with('>'));
    }
    assert_eq!(hub.core.kept(), 200);
    fault(2, &id("c"), -32056)(&hub.client(2, &ask("c", "m")));
    fault(2, &id("c"), -32056)(&hub.client(2, &ask("c", "eth_subscribe")));
    assert!(hub.client(2, r#"{"jsonrpc":"2.0","id":1,"method":"m"}"#)[0].starts_with('>'));
    hub.backend(r#"{"jsonrpc":"2.0","id":1,"result":1}"#);
    assert_eq!(hub.core.kept(), 101);
    assert!(hub.client(2, &ask("c", "eth_subscribe"))[0].starts_with('>'));
    hub.left(1);
    assert_eq!(hub.core.kept(), 101);
    let long = "x".repeat(200);
    hub.backend(&format!(r#"{{"jsonrpc":"2.0","id":4,"result":"{long}"}}"#));
    let names = "eth_unsubscribe".len() + "eth_subscription".len();
    assert_eq!(hub.core.kept(), 1 + 202 + names + 34);
    fault(3, "1", -32056)(&hub.client(3, r#"{"jsonrpc":"2.0","id":1,"method":"m"}"#));
    // For who leaves nothing is kept, though the backend still has to answer.
    hub.left(2);
    assert_eq!(hub.core.kept(), 0);
    assert!(hub.client(3, &ask("a", "m"))[0].starts_with('>'));
    hub.after(TIMEOUT);
    assert_eq!(hub.core.kept(), 0);
    assert!(hub.client(3, &ask("a", "eth_subscribe"))[0].starts_with('>'));
    hub.lost();
    assert!(hub.core.kept() == 0 && hub.core.is_at_rest());
}

/// What is no request gets an error object with its id, if that can be told, and the backend hears nothing of it.
#[test]
fn malformed_messages_are_answered_by_the_hub() {
    let long = format!(r#"{{"jsonrpc":"2.0","id":"{}","method":"a"}}"#, "x".repeat(MAX_ID_BYTES));
    // Of neither more is read than has to be: how they end is not known.
    let (many, long_batch) = (format!("{{{}", r#""a":1,"#.repeat(65)), format!("[{}", "1,".repeat(MAX_BATCH + 1)));
    let long_method = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"{}"}}"#, "x".repeat(MAX_METHOD_BYTES));
    for (text, id, code) in [
        ("", "null", -32700),
        ("{", "null", -32700),
        (r#"{"jsonrpc":"2.0","id":1,"method":"a"} x"#, "null", -32700),
        (r#"{"jsonrpc":"2.0","id":01,"method":"a"}"#, "null", -32700),
        (r#"{"jsonrpc":"2.0","id":1,"method":"a",}"#, "null", -32700),
        (r#"[{"jsonrpc":"2.0","id":1,"method":"a"},"#, "null", -32700),
        (r#"[{"jsonrpc":"2.0","id":1,"method":"a"}]]"#, "null", -32700),
        ("nul", "null", -32700),
        ("\u{feff}{}", "null", -32700),
        ("12", "null", -32600),
        ("\"a\"", "null", -32600),
        ("[]", "null", -32600),
        ("[ ]", "null", -32600),
        ("{}", "null", -32600),
        (r#"{"jsonrpc":"2.0","method":1,"params":"bar"}"#, "null", -32600),
        (r#"{"jsonrpc":"2.0","id":1}"#, "1", -32600),
        (r#"{"id":1,"method":"a"}"#, "1", -32600),
        (r#"{"jsonrpc":"1.0","id":1,"method":"a"}"#, "1", -32600),
        (r#"{"jsonrpc":2.0,"id":1,"method":"a"}"#, "1", -32600),
        (r#"{"jsonrpc":"2.0","id":"x","method":["a"]}"#, "\"x\"", -32600),
        (r#"{"jsonrpc":"2.0","id":"x","method":"\ud800"}"#, "\"x\"", -32600),
        (r#"{"jsonrpc":"2.0","id":1,"method":"a","params":"b"}"#, "1", -32600),
        (r#"{"jsonrpc":"2.0","id":1,"method":"a","result":1}"#, "1", -32600),
        (r#"{"jsonrpc":"2.0","id":{},"method":"a"}"#, "null", -32600),
        (r#"{"jsonrpc":"2.0","id":[1],"method":"a"}"#, "null", -32600),
        (r#"{"jsonrpc":"2.0","id":true,"method":"a"}"#, "null", -32600),
        (r#"{"jsonrpc":"2.0","id":1,"id":2,"method":"a"}"#, "null", -32600),
        (r#"{"jsonrpc":"2.0","id":1,"\u0069d":2,"method":"a"}"#, "null", -32600),
        (r#"{"jsonrpc":"2.0","id":1,"method":"a","method":"b"}"#, "null", -32600),
        (r#"{"jsonrpc":"2.0","id":1,"method":"a","params":[],"params":[]}"#, "null", -32600),
        // Go takes these for the members that they look like.
        (r#"{"jsonrpc":"2.0","ID":1,"method":"a"}"#, "null", -32600),
        (r#"{"jsonrpc":"2.0","id":1,"Id":2,"method":"a"}"#, "null", -32600),
        ("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"a\",\"param\u{17f}\":[]}", "null", -32600),
        // And C these.
        (r#"{"jsonrpc":"2.0","id":1,"method":"a","id\u0000":2}"#, "null", -32600),
        (r#"{"jsonrpc":"2.0","method":"eth_subscribe","params":[]}"#, "null", -32600),
        (&long, "null", -32600),
        (&long_method, "1", -32600),
        (&many, "null", -32600),
        (&long_batch, "null", -32600),
    ] {
        let mut hub = Hub::new();
        fault(3, id, code)(&hub.client(3, text));
        assert!(hub.core.is_at_rest() && hub.core.counts().refused == 1, "{text}");
    }
}

/// Depth is memory of a byte per level: a text of a million levels is malformed or passed on, and the stack holds.
#[test]
fn depth_does_no_harm() {
    let mut hub = Hub::new();
    let deep = "[".repeat(1_000_000);
    fault(1, "null", -32700)(&hub.client(1, &deep));
    fault(1, "null", -32700)(&hub.client(1, &deep.replace('[', "{\"a\":")));
    assert_eq!(hub.backend(&deep), NOTHING);
    let whole = [&*deep, &*"]".repeat(1_000_000)].concat();
    let told = hub.client(1, &format!(r#"{{"jsonrpc":"2.0","id":"a","method":"a","params":{whole}}}"#));
    assert_eq!(told, [format!(r#">: {{"jsonrpc":"2.0","id":1,"method":"a","params":{whole}}}"#)]);
    let told = hub.backend(&format!(r#"{{"jsonrpc":"2.0","result":{whole},"id":1}}"#));
    assert_eq!(told, [format!(r#"1: {{"jsonrpc":"2.0","result":{whole},"id":"a"}}"#)]);
}

/// A batch with all that there may be in it, as the specification has it: one list comes back when the last answer is here, in the order of the
/// requests, whatever else is answered in between.
#[test]
fn a_batch_is_answered_as_a_whole() {
    let mut hub = Hub::new();
    assert_eq!(
        hub.client(
            1,
            r#"[{"jsonrpc":"2.0","method":"sum","params":[1,2,4],"id":"1"}, {"jsonrpc":"2.0","method":"notify_hello","params":[7]},
                {"foo":"boo"}, 1, {"jsonrpc":"2.0","id":5,"result":1}, {"jsonrpc":"2.0","method":"get_data","id":"1"}]"#
        ),
        [
            r#">: [{"jsonrpc":"2.0","method":"sum","params":[1,2,4],"id":1},{"jsonrpc":"2.0","method":"notify_hello","params":[7]},{"jsonrpc":"2.0","method":"get_data","id":2}]"#
        ]
    );
    assert_eq!(
        hub.client(2, r#"{"jsonrpc":"2.0","id":9,"method":"a"}"#),
        [r#">: {"jsonrpc":"2.0","id":3,"method":"a"}"#]
    );
    assert_eq!(
        hub.backend(r#"[{"jsonrpc":"2.0","result":["x"],"id":2}, {"jsonrpc":"2.0","result":3,"id":3}]"#),
        [r#"2: {"jsonrpc":"2.0","result":3,"id":9}"#]
    );
    let told = hub.backend(r#"{"jsonrpc":"2.0","result":7,"id":1}"#);
    let invalid = r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32600,"message":"Invalid Request","data":{"source":"tidegate","reason":"not a request of JSON-RPC 2.0"}}}"#;
    let first = r#"{"jsonrpc":"2.0","result":7,"id":"1"}"#;
    let last = r#"{"jsonrpc":"2.0","result":["x"],"id":"1"}"#;
    assert_eq!(told, [format!("1: [{first},{invalid},{invalid},{last}]")]);
    assert!(hub.core.is_at_rest());
    assert_eq!(hub.core.counts().client_responses, 1);
    // Notifications alone are not answered at all, what is invalid throughout is, without the backend.
    let notifications = r#"[{"jsonrpc":"2.0","method":"a"},{"jsonrpc":"2.0","method":"b"}]"#;
    assert_eq!(hub.client(1, notifications), [format!(">: {notifications}")]);
    assert_eq!(hub.client(1, "[1, 2]"), [format!("1: [{invalid},{invalid}]")]);
    assert_eq!(hub.client(1, r#"[{"jsonrpc":"2.0","id":5,"result":1}]"#), NOTHING);
    fault(1, "null", -32600)(&hub.client(1, &format!("[{}1]", "1,".repeat(MAX_BATCH))));
    // More than a few are one error, and nothing of it is passed on.
    let request = r#"{"jsonrpc":"2.0","id":1,"method":"m"}"#;
    fault(1, "null", -32600)(&hub.client(1, &format!("[{request},{{}},1,2,3,4,5,6,7,8]")));
    assert!(hub.core.is_at_rest());
}

/// Requests beyond the limit are refused, each for itself, and others are not touched by it.
#[test]
fn a_client_has_so_many_requests_at_once() {
    let mut hub = Hub::new();
    let request = r#"{"jsonrpc":"2.0","id":"a","method":"m"}"#;
    let told = hub.client(1, &format!("[{}]", [request; 5].join(",")));
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].matches("\"m\"").count(), 4);
    fault(1, "\"a\"", -32052)(&hub.client(1, request));
    assert_eq!(hub.client(2, request), [r#">: {"jsonrpc":"2.0","id":5,"method":"m"}"#]);
    let answers: Vec<_> = (1..=4).map(|id| format!(r#"{{"jsonrpc":"2.0","id":{id},"result":{id}}}"#)).collect();
    let told = hub.backend(&format!("[{}]", answers.join(",")));
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].matches("\"id\":\"a\"").count(), 5);
    assert_eq!(told[0].matches("-32052").count(), 1);
    assert_eq!(hub.client(1, request).len(), 1);
    assert_eq!(hub.core.outstanding(), 2);
}

/// Answers that wait for the rest of their batch are bounded: what is too much is an error object in its place, or in that of all, and while it
/// is, no batch more is taken.
#[test]
fn a_batch_takes_no_more_than_its_room() {
    let limits = Limits { max_message_bytes: 4096, ..LIMITS };
    let mut hub = Hub::with(limits);
    let request = r#"{"jsonrpc":"2.0","id":"a","method":"m"}"#;
    hub.client(1, &format!("[{request},{request},{request}]"));
    let large = "x".repeat(limits.max_message_bytes - 50);
    assert_eq!(hub.backend(&format!(r#"{{"jsonrpc":"2.0","id":1,"result":"{large}"}}"#)), NOTHING);
    assert_eq!(hub.backend(&format!(r#"{{"jsonrpc":"2.0","id":2,"result":"{large}"}}"#)), NOTHING);
    let told = hub.client(1, "[1]");
    fault(1, "null", -32052)(&told);
    assert!(told[0].contains("websocket.max_message"), "{told:?}");
    assert_eq!(hub.client(1, request).len(), 1, "what is no batch is not concerned");
    // What fits does not with the errors in place of what does not: one error for all of it.
    fault(1, "null", -32054)(&hub.backend(r#"{"jsonrpc":"2.0","id":3,"error":{}}"#));
    assert_eq!(hub.client(1, "[1]").len(), 1);
    // A subscription that can't be told is given back.
    hub.client(1, r#"[{"jsonrpc":"2.0","id":"a","method":"eth_subscribe"}]"#);
    let told = hub.backend(&format!(r#"{{"jsonrpc":"2.0","id":5,"result":"0x1","{large}":"{large}"}}"#));
    assert!(told[0].contains("-32054"), "{told:?}");
    assert_eq!(told[1], r#">: {"jsonrpc":"2.0","id":6,"method":"eth_unsubscribe","params":["0x1"]}"#);
    assert_eq!((told.len(), hub.core.subscriptions()), (2, 0));
}

/// What the hub makes of a message is no longer than a message may be: a request is refused, an answer an error, at the first byte too many.
#[test]
fn no_message_becomes_too_long() {
    let limits = Limits { max_message_bytes: 1000, ..LIMITS };
    let request = |bytes: usize| {
        let text = format!(r#"{{"jsonrpc":"2.0","id":"0123456789","method":"m","params":["{}"]}}"#, "x".repeat(bytes));
        (text.len(), text)
    };
    let (length, _) = request(0);
    let mut hub = Hub::with(limits);
    let fits = 1000 - 20 + 12 - length;
    assert!(hub.client(1, &request(fits).1)[0].starts_with('>'));
    fault(1, "\"0123456789\"", -32600)(&hub.client(1, &request(fits + 1).1));
    fault(1, "null", -32600)(&hub.client(1, &format!("[{}]", request(fits - 1).1)));
    assert!(hub.client(1, &format!("[{}]", request(fits - 14).1))[0].starts_with('>'));
    let answer = |id: usize, bytes: usize| format!(r#"{{"jsonrpc":"2.0","id":{id},"result":"{}"}}"#, "x".repeat(bytes));
    let fits = 1000 - 2 - answer(1, 0).len() - 11;
    assert!(hub.backend(&answer(1, fits))[0].contains("xxx"));
    let told = hub.backend(&answer(2, fits + 1));
    assert!(told[0].starts_with("1: [") && told[0].contains("-32054"), "{told:?}");
    // Errors alone may be too much for one list.
    fault(1, "null", -32054)(&hub.client(1, "[1,1,1,1,1,1,1,1]"));
    assert!(hub.core.is_at_rest());
}

/// An unsubscribe grows by the backend's id, which may be longer than the one that its client knows. At the first byte too many it is refused, and the
/// subscription goes on; of a list as many are as would not fit, with an id or without one. Method: ids of 200 bytes in place of 34.
#[test]
fn no_unsubscribe_becomes_too_long() {
    let subscribed = || {
        let mut hub = Hub::with(Limits { max_message_bytes: 1000, ..LIMITS });
        for (id, letter) in (1..).zip(["a", "b"]) {
            hub.client(1, r#"{"jsonrpc":"2.0","id":1,"method":"eth_subscribe"}"#);
            hub.backend(&format!(r#"{{"jsonrpc":"2.0","id":{id},"result":"{}"}}"#, letter.repeat(198)));
        }
        assert_eq!(hub.core.subscriptions(), 2);
        hub
    };
    let unsubscribe = |id: &str, seen: u32, bytes: usize| {
        let more = "x".repeat(bytes);
        format!(r#"{{"jsonrpc":"2.0",{id}"method":"eth_unsubscribe","params":["{seen:032x}"],"x":"{more}"}}"#)
    };
    let own = r#""id":"0123456789","#;
    let fits = 1000 - (unsubscribe(own, 0xa1, 0).len() - 12 + 20 - 34 + 200);
    let told = subscribed().client(1, &unsubscribe(own, 0xa1, fits));
    assert!(told[0].starts_with(">: ") && told[0].len() == 1000 + ">: ".len() - 19, "{told:?}");
    let mut hub = subscribed();
    fault(1, "\"0123456789\"", -32600)(&hub.client(1, &unsubscribe(own, 0xa1, fits + 1)));
    assert_eq!((hub.core.subscriptions(), hub.core.outstanding()), (2, 0));
    for id in [own, ""] {
        let both = [0xa1, 0xa2].map(|seen| unsubscribe(id, seen, 0)).join(",").len() + "[]".len() + 2 * 20;
        for (room, passed) in [(0, 0), (200, 1), (400, 2)] {
            let padded = format!(
                "[{},{}{}]",
                unsubscribe(id, 0xa1, 0),
                unsubscribe(id, 0xa2, 0),
                " ".repeat(1000 - room - both)
            );
            let told = subscribed().client(1, &padded).concat();
            assert_eq!(told.matches("eth_unsubscribe").count(), passed, "{told}");
            assert_eq!(told.contains("websocket.max_message"), passed == 0 || passed == 1 && id.is_empty(), "{told}");
        }
    }
}

/// What the backend says to nobody goes to nobody: ids of others, none, malformed, questions of its own.
#[test]
fn odd_words_of_the_backend_reach_nobody() {
    let mut hub = Hub::new();
    hub.client(1, r#"{"jsonrpc":"2.0","id":"a","method":"m"}"#);
    for odd in [
        r#"{"jsonrpc":"2.0","id":2,"result":1}"#,
        r#"{"jsonrpc":"2.0","id":"1","result":1}"#,
        r#"{"jsonrpc":"2.0","id":1.0,"result":1}"#,
        r#"{"jsonrpc":"2.0","id":-1,"result":1}"#,
        r#"{"jsonrpc":"2.0","id":18446744073709551617,"result":1}"#,
        r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32700,"message":"Parse error"}}"#,
        r#"{"jsonrpc":"2.0","id":1,"result":1,"id":1}"#,
        r#"{"jsonrpc":"2.0","result":1}"#,
        "{\"jsonrpc\"",
        "[]",
        "7",
        r#"{"jsonrpc":"2.0","id":[1],"method":"m"}"#,
    ] {
        assert_eq!(hub.backend(odd), NOTHING, "{odd}");
    }
    assert_eq!(
        hub.backend(r#"{"jsonrpc":"2.0","id": "ping" ,"method":"m"}"#),
        [
            r#"?: {"jsonrpc":"2.0","id":"ping","error":{"code":-32601,"message":"Method not found","data":{"source":"tidegate","reason":"clients of a shared connection take no requests"}}}"#
        ]
    );
    let long = "x".repeat(MAX_ID_BYTES);
    assert_eq!(hub.backend(&format!(r#"{{"jsonrpc":"2.0","id":"{long}","method":"m"}}"#)), NOTHING);
    let counts = hub.core.counts();
    assert_eq!((counts.strays, counts.without_id, counts.malformed, counts.backend_requests), (5, 1, 6, 2));
    assert_eq!(hub.backend(r#"{"jsonrpc":"2.0","id":1,"result":1}"#), [r#"1: {"jsonrpc":"2.0","id":"a","result":1}"#]);
}

/// Notifications are for all by methods that are listed for it; others, of no subscription or of one that is not configured, for nobody.
#[test]
fn notifications_are_for_all_or_for_one() {
    let mut hub = Hub::new();
    for text in [
        r#"{"jsonrpc":"2.0","method":"news","params":{"a":1}}"#,
        r#"{"jsonrpc":"2.0","method":"news","params":["a"]}"#,
        r#"{"method":"news","id":null}"#,
        r#"{"jsonrpc":"2.0","method":"chain_head"}"#,
    ] {
        assert_eq!(hub.backend(text), [format!("*: {text}")]);
    }
    for text in [
        r#"{"jsonrpc":"2.0","method":"news","params":{"subscription":1}}"#,
        r#"{"jsonrpc":"2.0","method":"eth_subscription","params":{"subscription":"0x1","result":1}}"#,
        r#"{"jsonrpc":"2.0","method":"eth_subscription","params":{"result":1}}"#,
        r#"{"jsonrpc":"2.0","method":"eth_subscription"}"#,
        r#"{"jsonrpc":"2.0","method":"newsy"}"#,
        r#"{"jsonrpc":"2.0","method":"chain","params":[7,1]}"#,
    ] {
        assert_eq!(hub.backend(text), NOTHING);
    }
    assert_eq!((hub.core.counts().unheard, hub.core.counts().unlisted), (3, 3));
    assert_eq!(hub.core.unlisted(), "chain");
    assert!(hub.core.is_at_rest());
}

/// A client knows its subscriptions by ids of the hub's, shaped like the backend's; the others can't end them.
#[test]
fn subscription_ids_are_mapped() {
    for (backend_ids, seen) in [
        (["\"0x1\"", "\"0x2\""], ["\"0x000000000000000000000000000000a1\"", "\"0x000000000000000000000000000000a2\""]),
        (["\"q\"", "\"r\""], ["\"000000000000000000000000000000a1\"", "\"000000000000000000000000000000a2\""]),
        (["5", "4"], ["1", "2"]),
    ] {
        let mut hub = Hub::subscribed(backend_ids);
        let news = |id: &str| {
            format!(
                r#"{{"jsonrpc":"2.0","method":"eth_subscription","params":{{"result":{{"subscription":3}},"subscription": {id}}}}}"#
            )
        };
        for index in [1, 0, 1] {
            let told = hub.backend(&news(backend_ids[index]));
            assert_eq!(told, [format!("{}: {}", index + 1, news(seen[index]))]);
        }
        let list = |id: &str| format!(r#"{{"jsonrpc":"2.0","method":"eth_subscription","params":[ {id} ,1]}}"#);
        assert_eq!(hub.backend(&list(backend_ids[0])), [format!("1: {}", list(seen[0]))]);
        // What is not this client's, or not only that.
        let unsubscribe =
            |params: &str| format!(r#"{{"jsonrpc":"2.0","id":"u","method":"eth_unsubscribe","params":{params}}}"#);
        for params in [
            format!("[{}]", seen[1]),
            format!("[{}]", backend_ids[0]),
            format!("[{},{}]", seen[0], backend_ids[1]),
            format!(r#"{{"subscription":{},"id":{}}}"#, seen[0], backend_ids[1]),
            "[]".to_owned(),
            "{}".to_owned(),
            "null".to_owned(),
            "[null]".to_owned(),
        ] {
            fault(1, "\"u\"", -32602)(&hub.client(1, &unsubscribe(&params)));
        }
        assert_eq!(hub.core.references(), 2);
        // A list, and then by name.
        for (index, open, end) in [(0, "[ ", " ]"), (1, r#"{"id":"#, "}")] {
            let client = index as u64 + 1;
            let told = hub.client(client, &unsubscribe(&format!("{open}{}{end}", seen[index])));
            let id = client + 2;
            assert_eq!(
                told,
                [format!(
                    r#">: {{"jsonrpc":"2.0","id":{id},"method":"eth_unsubscribe","params":{open}{}{end}}}"#,
                    backend_ids[index]
                )]
            );
            // Until it is answered it is the client's.
            assert_eq!(hub.backend(&news(backend_ids[index])).len(), 1);
            let told = hub.backend(&format!(r#"{{"jsonrpc":"2.0","id":{id},"result":true}}"#));
            assert_eq!(told, [format!(r#"{client}: {{"jsonrpc":"2.0","id":"u","result":true}}"#)]);
            assert_eq!(hub.backend(&news(backend_ids[index])), NOTHING);
            fault(client, "\"u\"", -32602)(&hub.client(client, &unsubscribe(&format!("[{}]", seen[index]))));
        }
        assert!(hub.core.is_at_rest());
    }
}

/// An unsubscribe that the backend refuses ends nothing; one without an id is carried out by the hub.
#[test]
fn an_unsubscribe_may_fail_or_have_no_id() {
    for refusal in [r#""error":{"code":1,"message":"busy"}"#, r#""result":false"#] {
        let mut hub = Hub::subscribed(["7", "8"]);
        hub.client(1, r#"{"jsonrpc":"2.0","id":"u","method":"eth_unsubscribe","params":[1]}"#);
        let told = hub.backend(&format!(r#"{{"jsonrpc":"2.0","id":3,{refusal}}}"#));
        assert_eq!(told, [format!(r#"1: {{"jsonrpc":"2.0","id":"u",{refusal}}}"#)]);
        assert_eq!(hub.core.subscriptions(), 2);
        let told = hub.client(1, r#"{"jsonrpc":"2.0","method":"eth_unsubscribe","params":[1]}"#);
        assert_eq!(told, [r#">: {"jsonrpc":"2.0","id":4,"method":"eth_unsubscribe","params":[7]}"#]);
        assert_eq!((hub.core.subscriptions(), hub.core.references()), (1, 2));
        assert_eq!(hub.backend(r#"{"jsonrpc":"2.0","id":4,"result":true}"#), NOTHING);
        assert_eq!(hub.core.references(), 1);
    }
}

/// Two clients are given the same id by the backend, as Solana's does for the same question: both get what comes, and the backend hears of an
/// unsubscribe from the second one alone.
#[test]
fn an_id_of_the_backend_may_be_held_by_two() {
    let mut hub = Hub::new();
    for client in [1, 2] {
        hub.client(client, r#"{"jsonrpc":"2.0","id":1,"method":"slotSubscribe"}"#);
        hub.backend(&format!(r#"{{"jsonrpc":"2.0","id":{client},"result":77}}"#));
    }
    let news = |id: &str| {
        format!(r#"{{"jsonrpc":"2.0","method":"slotNotification","params":{{"result":1,"subscription":{id}}}}}"#)
    };
    assert_eq!(hub.backend(&news("77")), [format!("1: {}", news("1")), format!("2: {}", news("2"))]);
    assert_eq!(
        hub.client(1, r#"{"jsonrpc":"2.0","id":"u","method":"slotUnsubscribe","params":[1]}"#),
        [r#"1: {"jsonrpc":"2.0","id":"u","result":true}"#]
    );
    assert_eq!(hub.backend(&news("77")), [format!("2: {}", news("2"))]);
    // One who has left asked for the same: the second one keeps it.
    hub.client(4, r#"{"jsonrpc":"2.0","id":"s","method":"slotSubscribe"}"#);
    assert_eq!(hub.left(4), NOTHING);
    assert_eq!(hub.backend(r#"{"jsonrpc":"2.0","id":3,"result":77}"#), NOTHING);
    assert_eq!(hub.core.references(), 1);
    // A third one asks, and the second one leaves before it is answered: what the answer names is gone.
    hub.client(3, r#"{"jsonrpc":"2.0","id":"s","method":"slotSubscribe"}"#);
    assert_eq!(hub.left(2), [r#">: {"jsonrpc":"2.0","id":5,"method":"slotUnsubscribe","params":[77]}"#]);
    fault(3, "\"s\"", -32055)(&hub.backend(r#"{"jsonrpc":"2.0","id":4,"result":77}"#));
    assert_eq!(hub.backend(r#"{"jsonrpc":"2.0","id":5,"result":true}"#), NOTHING);
    assert!(hub.core.is_at_rest());
}

/// Notifications that overtake the answer that tells of them come behind it; in a batch, behind the batch.
#[test]
fn early_notifications_wait() {
    let news = |id: &str, n: u32| {
        format!(r#"{{"jsonrpc":"2.0","method":"eth_subscription","params":{{"subscription":{id},"result":{n}}}}}"#)
    };
    let mut hub = Hub::new();
    hub.client(1, r#"{"jsonrpc":"2.0","id":"s","method":"eth_subscribe"}"#);
    for (id, n) in [("8", 1), ("9", 2), ("8", 3)] {
        assert_eq!(hub.backend(&news(id, n)), NOTHING);
    }
    assert_eq!(
        hub.backend(r#"{"jsonrpc":"2.0","id":1,"result":8}"#),
        [
            r#"1: {"jsonrpc":"2.0","id":"s","result":1}"#.to_owned(),
            format!("1: {}", news("1", 1)),
            format!("1: {}", news("1", 3))
        ]
    );
    assert_eq!(hub.core.counts().unheard, 1, "the one of which nobody asked");
    hub.client(2, r#"[{"jsonrpc":"2.0","id":"s","method":"eth_subscribe"},{"jsonrpc":"2.0","id":"c","method":"m"}]"#);
    assert_eq!(hub.backend(&news("4", 1)), NOTHING);
    assert_eq!(hub.backend(r#"{"jsonrpc":"2.0","id":2,"result":4}"#), NOTHING);
    assert_eq!(hub.backend(&news("4", 2)), NOTHING);
    assert_eq!(hub.backend(&news("8", 4)), [format!("1: {}", news("1", 4))]);
    assert_eq!(
        hub.backend(r#"{"jsonrpc":"2.0","id":3,"result":0}"#),
        [
            r#"2: [{"jsonrpc":"2.0","id":"s","result":2},{"jsonrpc":"2.0","id":"c","result":0}]"#.to_owned(),
            format!("2: {}", news("2", 1)),
            format!("2: {}", news("2", 2))
        ]
    );
    // What waits is bounded; the oldest ones go.
    hub.client(3, r#"{"jsonrpc":"2.0","id":"s","method":"eth_subscribe"}"#);
    for n in 0..2000 {
        assert_eq!(hub.backend(&news("5", n)), NOTHING);
    }
    let told = hub.backend(r#"{"jsonrpc":"2.0","id":4,"result":5}"#);
    assert_eq!((told.len(), told.last()), (1025, Some(&format!("3: {}", news("3", 1999)))));
    assert_eq!((hub.core.counts().unheard, hub.core.counts().overflowed), (1, 2000 - 1024));
}

/// A batch whose list is too large tells of none of its subscriptions, so they end: the backend is told, nobody hears of them, and their client has
/// room for others. Method: two subscriptions, of which another client holds one too, and a call with a large answer; answered, and timed out.
#[test]
fn what_a_batch_does_not_tell_of_ends() {
    let subscribe = r#"{"jsonrpc":"2.0","id":"s","method":"slotSubscribe"}"#;
    let news = |id: u64, n: &str| {
        format!(r#"{{"jsonrpc":"2.0","method":"slotNotification","params":{{"subscription":{id},"result":"{n}"}}}}"#)
    };
    for is_answered in [true, false] {
        let mut hub = Hub::with(Limits { max_message_bytes: 500, ..LIMITS });
        hub.client(2, subscribe);
        hub.backend(r#"{"jsonrpc":"2.0","id":1,"result":7}"#);
        hub.client(1, &format!(r#"[{subscribe},{subscribe},{{"jsonrpc":"2.0","id":"c","method":"m"}}]"#));
        let large = "x".repeat(if is_answered { 200 } else { 290 });
        for (id, of) in [(2, 7), (3, 8)] {
            assert_eq!(
                hub.backend(&format!(r#"{{"jsonrpc":"2.0","id":{id},"result":{of},"x":"{}"}}"#, &large[..150])),
                NOTHING
            );
        }
        assert_eq!(hub.backend(&news(8, "waits")), NOTHING);
        let told = if is_answered {
            hub.backend(&format!(r#"{{"jsonrpc":"2.0","id":4,"result":"{large}"}}"#))
        } else {
            hub.after(TIMEOUT)
        };
        fault(1, "null", -32054)(&told[..1]);
        let ended = r#">: {"jsonrpc":"2.0","id":5,"method":"slotUnsubscribe","params":[8]}"#;
        assert_eq!(told[1..], [ended]);
        assert_eq!((hub.core.subscriptions(), hub.core.counts().unheard), (1, 1));
        assert_eq!(hub.backend(&news(8, "late")), NOTHING);
        assert_eq!(hub.backend(&news(7, "goes on")), [format!("2: {}", news(1, "goes on"))]);
        hub.backend(r#"{"jsonrpc":"2.0","id":5,"result":true}"#);
        assert_eq!(hub.client(1, &format!("[{subscribe},{subscribe}]")).len(), 1);
        hub.left(1);
        hub.left(2);
        hub.lost();
        assert!(hub.core.is_at_rest());
    }
}

/// What waits is kept once, however many wait for it, and each gets what came after their own subscription began; a client that lets its batch
/// wait has a share of the room, and others keep theirs. Method: two batches that wait for a call, on one id of the backend's, and one on another.
#[test]
fn what_waits_is_kept_once() {
    let news = |id: u64, n: u64| {
        format!(r#"{{"jsonrpc":"2.0","method":"slotNotification","params":{{"subscription":{id},"result":{n}}}}}"#)
    };
    let batch = r#"[{"jsonrpc":"2.0","id":"s","method":"slotSubscribe"},{"jsonrpc":"2.0","id":"c","method":"m"}]"#;
    let answer = |id: u64, result: u64| format!(r#"{{"jsonrpc":"2.0","id":{id},"result":{result}}}"#);
    let mut hub = Hub::new();
    for (client, id) in [(1, 7), (2, 7), (3, 8)] {
        hub.client(client, batch);
        assert_eq!(hub.backend(&answer(2 * client - 1, id)), NOTHING);
        assert_eq!(hub.backend(&news(id, client)), NOTHING);
    }
    // All that there may be because of client 1, who waits for longest; the third one's stays.
    let share = (MAX_HELD / SHARE) as u64;
    for n in 10..10 + share {
        assert_eq!(hub.backend(&news(7, n)), NOTHING);
    }
    assert_eq!(hub.core.counts().overflowed, 2);
    assert_eq!(hub.backend(&answer(6, 0))[1..], [format!("3: {}", news(3, 3))]);
    let told = hub.backend(&answer(4, 0));
    assert_eq!((told.len() as u64, &told[1]), (1 + share, &format!("2: {}", news(2, 10))));
    // They still wait for the first one; those that the second one was told are not forgotten.
    hub.backend(&news(7, 5));
    assert_eq!(hub.core.counts().overflowed, 3);
    assert_eq!(hub.left(1), NOTHING);
    assert_eq!(
        (hub.core.counts().unheard, hub.core.counts().overflowed),
        (1, 3),
        "what waited for the first one alone"
    );
    assert_eq!(hub.backend(&news(7, 6)), [format!("2: {}", news(2, 6))]);
    hub.left(2);
    hub.left(3);
    hub.lost();
    assert!(hub.core.is_at_rest());
}

/// Many who hold the same of the backend's may leave. Method: 100,000 holders of one id, who all leave, with work that would be quadratic if each
/// were looked for among all others.
#[test]
fn many_may_hold_the_same() {
    let mut hub = Hub::with(Limits { max_requests: 1000, max_subscriptions: 1000, ..LIMITS });
    let subscribe = r#"{"jsonrpc":"2.0","id":"s","method":"slotSubscribe"}"#;
    let mut id = 0;
    for client in 0..100 {
        hub.client(client, &format!("[{}]", [subscribe; 1000].join(",")));
        for _ in 0..1000 {
            id += 1;
            hub.backend(&format!(r#"{{"jsonrpc":"2.0","id":{id},"result":7}}"#));
        }
    }
    assert_eq!(hub.core.subscriptions(), 100_000);
    for client in 0..99 {
        assert_eq!(hub.left(client), NOTHING);
    }
    assert_eq!(hub.left(99).len(), 1);
    assert_eq!(hub.core.subscriptions(), 0);
}

/// Who leaves takes what they hold with them: the backend is told of subscriptions, also of one whose answer comes only then, and nobody hears
/// what is answered behind them.
#[test]
fn who_leaves_leaves_nothing() {
    let mut hub = Hub::subscribed(["\"0x1\"", "\"0x2\""]);
    hub.client(1, r#"{"jsonrpc":"2.0","id":"c","method":"m"}"#);
    hub.client(1, r#"[{"jsonrpc":"2.0","id":"s","method":"eth_subscribe"},{"jsonrpc":"2.0","id":"c","method":"m"}]"#);
    assert_eq!(hub.left(1), [r#">: {"jsonrpc":"2.0","id":6,"method":"eth_unsubscribe","params":["0x1"]}"#]);
    assert_eq!((hub.core.outstanding(), hub.core.subscriptions()), (4, 1), "the backend still works on it");
    assert_eq!(hub.backend(r#"{"jsonrpc":"2.0","id":3,"result":1}"#), NOTHING);
    assert_eq!(
        hub.backend(r#"[{"jsonrpc":"2.0","id":4,"result":"0x3"},{"jsonrpc":"2.0","id":5,"result":1}]"#),
        [r#">: {"jsonrpc":"2.0","id":7,"method":"eth_unsubscribe","params":["0x3"]}"#]
    );
    assert_eq!(hub.backend(r#"{"jsonrpc":"2.0","id":6,"result":true}"#), NOTHING);
    assert_eq!(hub.core.references(), 2);
    // Nobody waits for longer for what never is answered.
    assert_eq!(hub.after(TIMEOUT), NOTHING);
    assert_eq!(hub.core.references(), 1);
    assert_eq!(hub.core.counts().left, 3);
    assert_eq!(hub.left(1), NOTHING);
    // With its own unsubscribe under way the hub sends none.
    hub.client(
        2,
        r#"{"jsonrpc":"2.0","id":"u","method":"eth_unsubscribe","params":["0x000000000000000000000000000000a2"]}"#,
    );
    assert_eq!(hub.left(2), NOTHING);
    assert_eq!(hub.core.references(), 1);
    assert_eq!(hub.backend(r#"{"jsonrpc":"2.0","id":8,"result":true}"#), NOTHING);
    assert!(hub.core.is_at_rest());
}

/// Who asks, leaves and comes again has no more at the backend than is allowed of those who have left; and no subscription that begins late is
/// forgotten, however many there are.
#[test]
fn what_was_left_behind_is_bounded() {
    let call = r#"{"jsonrpc":"2.0","id":1,"method":"m"}"#;
    let subscribe = r#"{"jsonrpc":"2.0","id":1,"method":"eth_subscribe"}"#;
    let mut hub = Hub::new();
    for client in 10..MAX_ABANDONED as u64 + 10 {
        assert_eq!(hub.client(client, call).len(), 1);
        assert_eq!(hub.left(client), NOTHING);
    }
    assert_eq!(hub.core.outstanding(), MAX_ABANDONED);
    let told = hub.client(9, call);
    fault(9, "1", -32052)(&told);
    assert!(told[0].contains("clients that have left"), "{told:?}");
    hub.backend(r#"{"jsonrpc":"2.0","id":7,"result":1}"#);
    assert!(hub.client(9, call)[0].starts_with('>'));
    hub.after(TIMEOUT);
    assert!(hub.core.is_at_rest());
    let first = hub.core.last_id + 1;
    for client in 10..MAX_LATE as u64 + 15 {
        assert!(hub.client(client, subscribe)[0].starts_with('>'));
        hub.left(client);
    }
    hub.after(TIMEOUT);
    let told = hub.client(9, subscribe);
    fault(9, "1", -32053)(&told);
    assert!(told[0].contains("answers that are late"), "{told:?}");
    assert!(hub.core.is_at_rest());
    for id in first..first + MAX_LATE as u64 + 5 {
        let told = hub.backend(&format!(r#"{{"jsonrpc":"2.0","id":{id},"result":"0x{id}"}}"#));
        assert!(told.len() == 1 && told[0].contains("eth_unsubscribe"), "{told:?}");
    }
    assert!(hub.client(9, subscribe)[0].starts_with('>'));
}

/// The backend is lost: whatever is outstanding gets an error that says so, once; whoever holds a subscription is to be ended; and the ids of
/// before are nobody's.
#[test]
fn a_lost_backend_is_told_of() {
    let mut hub = Hub::subscribed(["\"0x1\"", "\"0x2\""]);
    hub.client(3, r#"{"jsonrpc":"2.0","id":"c","method":"m"}"#);
    hub.client(2, r#"[{"jsonrpc":"2.0","id":"s","method":"eth_subscribe"},{"jsonrpc":"2.0","id":"d","method":"m"}]"#);
    hub.backend(r#"{"jsonrpc":"2.0","id":5,"result":1}"#);
    let lost = |id: &str| {
        format!(
            r#"{{"jsonrpc":"2.0","id":"{id}","error":{{"code":-32050,"message":"the backend was lost","data":{{"source":"tidegate","reason":"backend lost","carried_out":"unknown"}}}}}}"#
        )
    };
    assert_eq!(
        hub.lost(),
        [
            format!("3: {}", lost("c")),
            format!(r#"2: [{},{{"jsonrpc":"2.0","id":"d","result":1}}]"#, lost("s")),
            "1: end".to_owned(),
            "2: end".to_owned()
        ]
    );
    assert!(hub.core.is_at_rest() && hub.core.counts().lost == 2);
    assert_eq!(hub.lost(), NOTHING);
    assert_eq!(hub.backend(r#"{"jsonrpc":"2.0","id":3,"result":1}"#), NOTHING);
    assert_eq!(
        hub.client(3, r#"{"jsonrpc":"2.0","id":"c","method":"m"}"#),
        [r#">: {"jsonrpc":"2.0","id":6,"method":"m"}"#]
    );
}

/// Each request has its deadline, in a batch too; what comes later reaches nobody, and a subscription that comes later is given back.
#[test]
fn a_deadline_is_an_error_object() {
    let mut hub = Hub::new();
    assert_eq!(hub.core.deadline(), None);
    hub.client(1, r#"{"jsonrpc":"2.0","id":"s","method":"eth_subscribe"}"#);
    assert_eq!(hub.core.deadline(), Some(hub.now + TIMEOUT));
    assert_eq!(hub.after(TIMEOUT / 2), NOTHING);
    hub.client(1, r#"[{"jsonrpc":"2.0","id":"a","method":"m"},{"jsonrpc":"2.0","id":"b","method":"m"}]"#);
    hub.backend(r#"{"jsonrpc":"2.0","id":3,"result":1}"#);
    fault(1, "\"s\"", -32051)(&hub.after(TIMEOUT / 2));
    assert_eq!(hub.core.deadline(), Some(hub.now + TIMEOUT / 2));
    let told = hub.after(TIMEOUT / 2);
    assert!(told[0].starts_with(r#"1: [{"jsonrpc":"2.0","id":"a","error":{"code":-32051,"#), "{told:?}");
    assert!(told[0].ends_with(r#",{"jsonrpc":"2.0","id":"b","result":1}]"#), "{told:?}");
    assert!(hub.core.is_at_rest());
    assert_eq!(hub.backend(r#"{"jsonrpc":"2.0","id":2,"result":1}"#), NOTHING);
    assert_eq!(
        hub.backend(r#"{"jsonrpc":"2.0","id":1,"result":"0x5"}"#),
        [r#">: {"jsonrpc":"2.0","id":4,"method":"eth_unsubscribe","params":["0x5"]}"#]
    );
    assert_eq!(hub.core.counts().timed_out, 2);
}

/// Subscriptions of a client are bounded, with those that are asked for.
#[test]
fn a_client_has_so_many_subscriptions() {
    let mut hub = Hub::subscribed(["1", "2"]);
    let subscribe = r#"{"jsonrpc":"2.0","id":"s","method":"eth_subscribe"}"#;
    assert_eq!(hub.client(1, subscribe).len(), 1);
    fault(1, "\"s\"", -32053)(&hub.client(1, subscribe));
    hub.backend(r#"{"jsonrpc":"2.0","id":3,"error":{"code":1}}"#);
    // What is no id is no subscription, and the client's to see.
    hub.client(1, subscribe);
    assert_eq!(
        hub.backend(r#"{"jsonrpc":"2.0","id":4,"result":{"a":1}}"#),
        [r#"1: {"jsonrpc":"2.0","id":"s","result":{"a":1}}"#]
    );
    hub.client(1, subscribe);
    hub.backend(r#"{"jsonrpc":"2.0","id":5,"result":3}"#);
    fault(1, "\"s\"", -32053)(&hub.client(1, subscribe));
    assert_eq!(hub.core.subscriptions(), 3);
}
