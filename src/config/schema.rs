//! `proxy.toml` as a JSON schema (draft 2020-12), for editors: types, spellings, bounds and defaults from the list of keys, and
//! what `proxy.toml` says of each.
//!
//! It refuses less than [`super::load`]: bounds of durations and sizes are only told to people, and how keys fit together is
//! nothing that a schema knows.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::{
    LogFormat, Route, SHIPPED, Settings,
    keys::{
        self, Key, MAX_ADDRESSES, MAX_BACKENDS, MAX_FILES, MAX_HEADER_NAMES, MAX_METHODS, MAX_NETWORKS, MAX_ORIGINS,
        MAX_ROUTES, MAX_SUBSCRIPTIONS, Number, PATH, PATH_BYTES, POOL, ROUTE, Slot, Time,
    },
    units::{format_duration, format_size},
};
use crate::downstream::{ClientAuth, ProxyProtocol};

// Both in JavaScript's regular expressions and in those of others.
const DURATION: &str = "^([0-9]+h)?([0-9]+m)?([0-9]+s)?([0-9]+ms)?$";
const SIZE: &str = "^[0-9]+(B|KiB|MiB|GiB)?$";
const MEMORY: &str = "^(auto|off|[0-9]+(B|KiB|MiB|GiB)?)$";
const LISTEN: &str = r"^([0-9.]+|\[[^\]]+\]):[0-9]{1,5}$";
const LISTEN_OR_OFF: &str = r"^(off|([0-9.]+|\[[^\]]+\]):[0-9]{1,5})$";
const BACKENDS: &str = r"^(unix:(//)?/.+|[^/,\s]+:[0-9]{1,5})$";
const ADDRESS: &str = "^[0-9A-Fa-f:.]+$";
const NETWORK: &str = "^[0-9A-Fa-f:.]+(/[0-9]{1,3})?$";
const ORIGIN_SPELLING: &str = "^(null|[a-z][a-z0-9+.-]*://[^/]+)$";
const PACE: &str = "^(off|[0-9]+/[smh])$";
const HEADER_NAME: &str = "^[!#$%&'*+.^_`|~0-9A-Za-z-]+$";
const SUBSCRIPTION: &str = r"^\s*\S+\s+\S+\s+\S+\s*$";
const METHOD: &str = r"^(\*|[^\s*]+\*?)$";
const ROUTE_PATH: &str = "^/[^?#]*$";

/// The schema of a whole file.
pub fn schema() -> Value {
    let explanations = explanations();
    let explained = |section, key| explanations.get(&(section, key)).copied().unwrap_or_default();
    let mut sections: Vec<(&str, Map<String, Value>)> = Vec::new();
    for Key { name, is_live, slot, .. } in keys::keys(&mut Settings::unresolved()) {
        let mut property = property(&slot, explained(name.section, name.key), is_live);
        property["default"] = json!(slot.write());
        match sections.last_mut() {
            Some((section, keys)) if *section == name.section => _ = keys.insert(name.key.to_owned(), property),
            _ => sections.push((name.section, Map::from_iter([(name.key.to_owned(), property)]))),
        }
    }
    let mut sections: Map<_, _> = sections.into_iter().map(|(name, keys)| (name.to_owned(), table(keys))).collect();

    // Without defaults: what a route has not of its own is as it is for all.
    let mut route = Route::unresolved();
    let (path, others) = route.keys();
    let mut keys = Map::from_iter([(PATH.to_owned(), property(&path, explained(ROUTE, PATH), true))]);
    let mut pool = Map::new();
    for (key, slot, _) in others {
        match key.strip_prefix(POOL) {
            Some(key) => pool.insert(key.to_owned(), property(&slot, explained(POOL.trim_end_matches('.'), key), true)),
            None => keys.insert(key.to_owned(), property(&slot, explained(ROUTE, key), true)),
        };
    }
    keys.insert(POOL.trim_end_matches('.').to_owned(), table(pool));
    let mut route = table(keys);
    route["required"] = json!([PATH]);
    sections.insert(ROUTE.to_owned(), json!({"type": "array", "maxItems": MAX_ROUTES, "items": route}));

    let mut schema = table(sections);
    schema["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    schema["title"] = json!(concat!("proxy.toml of tidegate ", env!("CARGO_PKG_VERSION")));
    schema
}

fn table(keys: Map<String, Value>) -> Value {
    let mut table = json!({"type": "object", "additionalProperties": false});
    table["properties"] = Value::Object(keys);
    table
}

fn property(slot: &Slot<'_>, explained: &str, is_live: bool) -> Value {
    let text = |pattern: &str| json!({"type": "string", "pattern": pattern});
    let one_of = |texts: &[&str]| json!({"enum": texts});
    let list = |pattern: &str, most: usize| json!({"type": "array", "maxItems": most, "items": {"type": "string", "pattern": pattern}});
    let mut notes = Vec::new();
    let mut property = match slot {
        Slot::Listen(_) => text(LISTEN),
        Slot::ListenOrOff(_) => text(LISTEN_OR_OFF),
        // Each of these words is about one of the types.
        Slot::Backends(_) => json!({
            "type": ["string", "array"], "pattern": BACKENDS,
            "minItems": 1, "maxItems": MAX_BACKENDS, "uniqueItems": true, "items": {"type": "string", "pattern": BACKENDS},
        }),
        Slot::Path(_) => text(ROUTE_PATH),
        Slot::Mode(_) => one_of(&["dedicated", "multiplexed", "shared"]),
        Slot::Word(word) => one_of(&word.words()),
        Slot::HeaderNames(_) => list(HEADER_NAME, MAX_HEADER_NAMES),
        Slot::Subscriptions(_) => list(SUBSCRIPTION, MAX_SUBSCRIPTIONS),
        Slot::Methods(_) => list(METHOD, MAX_METHODS),
        Slot::Count(_, range) => json!({"type": "integer", "minimum": range.start(), "maximum": range.end()}),
        Slot::Size(number, range) => {
            let is_optional = matches!(number, Number::OptionU32(_) | Number::OptionUsize(_));
            let none = if is_optional { "0, or " } else { "" };
            notes.push(format!("{none}{} to {}", format_size(*range.start()), format_size(*range.end())));
            let least = if is_optional { 0 } else { *range.start() };
            json!({"type": ["string", "integer"], "pattern": SIZE, "minimum": least, "maximum": range.end()})
        }
        Slot::Time(time, range, _) => {
            let none = if matches!(time, Time::OrOff(_)) { "0s, or " } else { "" };
            notes.push(format!("{none}{} to {}", format_duration(*range.start()), format_duration(*range.end())));
            json!({"type": "string", "minLength": 2, "pattern": DURATION})
        }
        Slot::Code(_, codes) => {
            let codes = codes.iter().map(|codes| json!({"minimum": codes.start(), "maximum": codes.end()}));
            json!({"type": "integer", "anyOf": codes.collect::<Vec<_>>()})
        }
        Slot::Networks(_) => list(NETWORK, MAX_NETWORKS),
        Slot::Origins(_) => list(ORIGIN_SPELLING, MAX_ORIGINS),
        Slot::Addresses(_) => list(ADDRESS, MAX_ADDRESSES),
        Slot::Switch(_) => json!({"type": "boolean"}),
        Slot::Memory(_, least) => json!({"type": ["string", "integer"], "pattern": MEMORY, "minimum": least}),
        // Characters, of which there are no more than bytes.
        Slot::Text(_, most) => json!({"type": "string", "maxLength": most}),
        Slot::File(_) => json!({"type": "string", "maxLength": PATH_BYTES}),
        Slot::Files(_) => json!({
            "type": ["string", "array"], "maxLength": PATH_BYTES,
            "maxItems": MAX_FILES, "items": {"type": "string", "minLength": 1, "maxLength": PATH_BYTES},
        }),
        Slot::Host(_) | Slot::Filter(_) => json!({"type": "string"}),
        Slot::Readiness(_) => one_of(&["after-delay", "immediate"]),
        Slot::Pace(_) => text(PACE),
        Slot::ClientAuth(_) => one_of(&ClientAuth::ALL.map(ClientAuth::as_str)),
        Slot::ProxyProtocol(_) => one_of(&ProxyProtocol::ALL.map(ProxyProtocol::as_str)),
        Slot::Format(_) => one_of(&LogFormat::ALL.map(LogFormat::as_str)),
    };
    if !is_live {
        notes.push("takes a restart".to_owned());
    }
    let notes = if notes.is_empty() { String::new() } else { format!(" [{}]", notes.join("; ")) };
    property["description"] = json!(format!("{explained}{notes}"));
    property
}

/// What [`SHIPPED`] says behind each key, those of the routes' example included.
fn explanations() -> HashMap<(&'static str, &'static str), &'static str> {
    let mut section = "";
    let mut explanations = HashMap::new();
    for line in SHIPPED.lines() {
        let line = line.strip_prefix("# ").unwrap_or(line);
        if line.starts_with('[') {
            section = line.trim_matches(['[', ']']);
        } else if let Some((key, rest)) = line.split_once(" = ")
            && let Some((_, explanation)) = rest.split_once("# ")
        {
            explanations.insert((section, key), explanation);
        }
    }
    explanations
}

#[cfg(test)]
mod tests {
    use super::{super::keys::BACKEND, *};

    /// Each key is there, with an explanation that is a text of its own, and the default that the shipped file has, too.
    #[test]
    fn every_key_is_explained_and_has_its_default() {
        let schema = schema();
        let shipped: toml::Table = SHIPPED.parse().unwrap();
        let mut seen = Vec::new();
        for (section, key) in keys::names() {
            let property = &schema["properties"][section]["properties"][key];
            let explained = property["description"].as_str().unwrap();
            assert!(explained.len() > 12 && !explained.starts_with(" ["), "{section}.{key}: {explained:?}");
            assert!(!seen.contains(&explained), "{section}.{key}: {explained:?}");
            seen.push(explained);
            assert_eq!(property["default"], json!(shipped[section][key]), "{section}.{key}");
        }
        let route = &schema["properties"][ROUTE]["items"]["properties"];
        for key in [PATH, BACKEND, "allow", "deny", "max_sessions"] {
            assert!(route[key]["description"].as_str().unwrap().len() > 12, "{key}: {}", route[key]);
        }
        assert_eq!(route["pool"]["properties"].as_object().unwrap().len(), 29);
        let property = |section: &str, key: &str| schema["properties"][section]["properties"][key].clone();
        assert_eq!(
            property("websocket", "idle_timeout")["description"].as_str().unwrap().split(" [").nth(1),
            Some("0s, or 1s to 24h]")
        );
        assert_eq!(
            property("listen", "backlog")["description"].as_str().unwrap().split(" [").nth(1),
            Some("takes a restart]")
        );
        assert_eq!(
            property("drain", "close_code")["anyOf"],
            json!([{"minimum": 1001, "maximum": 1001}, {"minimum": 1012, "maximum": 1012}])
        );
    }
}
