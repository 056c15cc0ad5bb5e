//! The JSON-RPC core: no panic; whoever is told something is there; what the hub says is JSON; an answer is one to something that was asked by
//! whom it is for; and when all have left and all deadlines are over nothing is left.
//!
//! The input is lines. The first byte of each says what happens: a digit, that this client says the rest; `b`, that the backend does; `a`, that the
//! backend answers the request with the number that follows by the rest; `l`, that a client leaves; `x`, that the backend is lost; `t`, that time goes by.
#![no_main]

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use libfuzzer_sys::fuzz_target;
use serde::de::IgnoredAny;
use serde_json::Value;
use tidegate::hub::rpc::{
    core::{Action, Core, Limits, with_id},
    methods::Methods,
};

const TIMEOUT: Duration = Duration::from_secs(1);

fuzz_target!(|input: &str| {
    let limits = Limits { max_requests: 8, max_subscriptions: 3, request_timeout: TIMEOUT, max_message_bytes: 512 };
    let triples = ["s u n", "*Sub *Un *News"].map(|triple| triple.parse().expect("three words"));
    let mut core = Core::new(limits, Methods::new(triples.to_vec()));
    let mut now = Instant::now();
    let mut drawn = 0;
    let mut random = || {
        drawn += 1;
        drawn
    };
    // How often each client said something that can be answered.
    let mut questions: BTreeMap<u64, usize> = BTreeMap::new();
    let mut last_id = 0;
    for line in input.lines() {
        let mut actions = Vec::new();
        let Some(first) = line.chars().next() else { continue };
        let rest = &line[first.len_utf8()..];
        let client = u64::from(first).wrapping_sub(u64::from('0'));
        match first {
            '0'..='3' => {
                *questions.entry(client).or_default() += 1 + rest.matches(['{', ',', '[']).count();
                core.client_says(client, rest, now, &mut actions);
            }
            'b' => core.backend_says(rest, now, &mut random, &mut actions),
            'a' => {
                let (id, member) = rest.split_once(' ').unwrap_or((rest, "\"result\":true"));
                let text = format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},{member}}}");
                core.backend_says(&text, now, &mut random, &mut actions);
            }
            'l' => {
                let client = rest.parse().unwrap_or(0);
                core.client_left(client, now, &mut actions);
                questions.remove(&client);
            }
            'x' => core.backend_lost(now, &mut actions),
            _ => {
                now += TIMEOUT / 4;
                core.due(now, &mut actions);
                assert!(core.deadline().is_none_or(|deadline| deadline > now));
            }
        }
        for action in actions {
            match action {
                Action::ToClient { client, text } => {
                    let value: Value = json(&text);
                    let left = questions.get_mut(&client).expect("nobody is told of what they did not ask for");
                    // Subscriptions tell without being asked.
                    if value.get("method").is_none() {
                        let count = value.as_array().map_or(1, Vec::len);
                        assert!(count > 0);
                        *left = left.checked_sub(count).expect("more answers than questions");
                    }
                }
                Action::ToAll { text } => _ = json(&text),
                Action::News { text, id, holders } => {
                    for (client, seen) in holders {
                        assert!(questions.contains_key(&client), "nobody is told of what they did not ask for");
                        json(&with_id(&text, &id, &seen).concat());
                    }
                }
                Action::Tell { ref text, .. } | Action::ToBackend { ref text } | Action::Refusal { ref text } => {
                    if let Action::Tell { client, count, .. } = action {
                        core.told(client, count);
                    }
                    let value = json(text);
                    let elements = value.as_array().cloned().unwrap_or_else(|| vec![value]);
                    assert!(!elements.is_empty());
                    for id in elements.iter().filter(|one| one.get("method").is_some()).filter_map(|one| one.get("id"))
                    {
                        let id = id.as_u64().expect("an id of the hub's");
                        assert!(id > last_id, "an id came twice");
                        last_id = id;
                    }
                }
                Action::EndClient { client } => assert!(first == 'x' && questions.contains_key(&client)),
            }
        }
        assert_eq!(core.references(), core.outstanding() + core.subscriptions());
    }
    let mut actions = Vec::new();
    for client in 0..4 {
        core.client_left(client, now, &mut actions);
    }
    core.due(now + TIMEOUT, &mut actions);
    assert!(core.is_at_rest() && core.references() == 0, "{core:?}");
});

/// Numbers too large for `Value` are JSON all the same, and go through as they are; then nothing more is looked at.
fn json(text: &str) -> Value {
    let is_json = serde_json::from_str::<IgnoredAny>(text);
    is_json.unwrap_or_else(|error| panic!("{error}: {text}"));
    serde_json::from_str(text).unwrap_or_default()
}
