//! JSON-RPC 2.0 messages as text: what stands where, and what the hub itself says.
//!
//! A message is looked at, never built anew: only its id, or a subscription's, is replaced in the text, so all else keeps its bytes. What lies
//! deeper than that is passed over by `serde_json`, which keeps a byte per level and does not recurse.
//!
//! What two readers could understand differently is for nobody: a name that is there twice, or in another case (Go's JSON takes "ID" for
//! "id", and the last one of two), would let a client choose the id that its backend answers to.

use std::{borrow::Cow, fmt};

use serde::{
    Deserializer as _,
    de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

/// Ids that are longer than this many bytes are refused: they are kept until the answer is here.
pub const MAX_ID_BYTES: usize = 1024;
/// Methods that are longer than this many bytes, as they are written, are refused: one that subscribes is kept as long as its subscription.
pub const MAX_METHOD_BYTES: usize = 256;
/// Of an object that is looked into; JSON-RPC knows six.
const MAX_MEMBERS: usize = 64;
/// What is longer than this many bytes is no id of a subscription.
pub const MAX_SUBSCRIPTION_ID_BYTES: usize = 256;

/// An error object of the hub's own, whose reason stands in its `data`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    code: i32,
    message: &'static str,
    reason: &'static str,
    /// The backend may have carried the request out.
    is_open: bool,
}

impl Fault {
    pub const NOT_JSON: Self = Self::new(-32700, "Parse error", "not JSON");
    pub const INVALID: Self = Self::new(-32600, "Invalid Request", "not a request of JSON-RPC 2.0");
    pub const AMBIGUOUS: Self = Self::new(-32600, "Invalid Request", "a member is there twice, or spelt differently");
    pub const LONG_ID: Self = Self::new(-32600, "Invalid Request", "the id is too long");
    pub const LONG_METHOD: Self = Self::new(-32600, "Invalid Request", "the method is too long");
    pub const EMPTY_BATCH: Self = Self::new(-32600, "Invalid Request", "an empty batch");
    pub const LONG_REQUEST: Self = Self::new(-32600, "Invalid Request", "websocket.max_message");
    pub const LONG_BATCH: Self = Self::new(-32600, "Invalid Request", "the batch is too long");
    pub const MANY_INVALID: Self = Self::new(-32600, "Invalid Request", "too many of the batch are not requests");
    pub const NO_METHOD: Self =
        Self::new(-32601, "Method not found", "clients of a shared connection take no requests");
    pub const NO_SUBSCRIPTION: Self = Self::new(-32602, "Invalid params", "no such subscription of this client");
    // From here on codes that JSON-RPC leaves to servers, and that neither Ethereum's (EIP-1474) nor geth nor Solana use.
    pub const LOST: Self = Self::open(-32050, "the backend was lost", "backend lost");
    pub const TIMEOUT: Self = Self::open(-32051, "the backend did not answer in time", "timeout");
    pub const TOO_MANY_REQUESTS: Self = Self::new(-32052, "too many requests outstanding", "pool.max_requests");
    pub const UNFINISHED: Self =
        Self::new(-32052, "too many requests outstanding", "websocket.max_message is full of answers of other batches");
    pub const ABANDONED: Self = Self::new(
        -32052,
        "too many requests outstanding",
        "the backend owes too many answers to clients that have left",
    );
    pub const TOO_MANY_SUBSCRIPTIONS: Self = Self::new(-32053, "too many subscriptions", "pool.max_subscriptions");
    pub const LATE: Self =
        Self::new(-32053, "too many subscriptions", "the backend owes too many answers that are late");
    pub const TOO_LARGE: Self = Self::open(-32054, "the answer is too large", "websocket.max_message");
    pub const NO_MEMORY: Self = Self::open(-32056, "no memory for the answer", "limits.memory");
    pub const NO_ROOM: Self = Self::new(-32056, "no memory for another request", "limits.memory");
    pub const FULL: Self = Self::new(-32056, "no memory for another batch", "limits.memory");
    pub const ENDED: Self = Self::new(-32055, "the subscription ended while it began", "ended by another client");

    const fn new(code: i32, message: &'static str, reason: &'static str) -> Self {
        Self { code, message, reason, is_open: false }
    }

    const fn open(code: i32, message: &'static str, reason: &'static str) -> Self {
        Self { code, message, reason, is_open: true }
    }

    /// The answer to the request with this id, which is JSON text.
    pub fn answer(&self, id: &str) -> String {
        let Self { code, message, reason, is_open } = self;
        let open = if *is_open { r#","carried_out":"unknown""# } else { "" };
        format!(
            r#"{{"jsonrpc":"2.0","id":{id},"error":{{"code":{code},"message":"{message}","data":{{"source":"tidegate","reason":"{reason}"{open}}}}}}}"#
        )
    }
}

/// What came at once.
#[derive(Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// Not a list. Whether it is JSON is not known yet: [`Parts::read`] finds out.
    One(&'a str),
    /// JSON throughout.
    Batch(Vec<&'a str>),
}

impl<'a> Message<'a> {
    /// Takes at most so many elements in a batch.
    pub fn read(text: &'a str, max_elements: usize) -> Result<Self, Fault> {
        if !text.trim_ascii_start().starts_with('[') {
            return Ok(Self::One(text));
        }
        match elements(text, max_elements) {
            None => Err(Fault::NOT_JSON),
            Some(elements) if elements.is_empty() => Err(Fault::EMPTY_BATCH),
            Some(elements) if elements.len() > max_elements => Err(Fault::LONG_BATCH),
            Some(elements) => Ok(Self::Batch(elements)),
        }
    }
}

/// The members of a request or a response, as JSON text: parts of the message's own.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    pub jsonrpc: Option<&'a str>,
    pub id: Option<&'a str>,
    pub method: Option<&'a str>,
    pub params: Option<&'a str>,
    pub result: Option<&'a str>,
    pub error: Option<&'a str>,
    /// One of these is there twice, or in another case.
    pub is_ambiguous: bool,
}

impl<'a> Parts<'a> {
    pub fn read(text: &'a str) -> Result<Self, Fault> {
        let names = ["jsonrpc", "id", "method", "params", "result", "error"];
        let Members { values, is_ambiguous, .. } = members(text, names).map_err(|is_long| {
            let is_json = is_long || serde_json::from_str::<IgnoredAny>(text).is_ok();
            if is_json { Fault::INVALID } else { Fault::NOT_JSON }
        })?;
        let [jsonrpc, id, method, params, result, error] = values;
        Ok(Self { jsonrpc, id, method, params, result, error, is_ambiguous })
    }

    /// It says of itself that it is an error; a null is none.
    pub fn is_error(&self) -> bool {
        self.error.is_some_and(|error| error != "null")
    }
}

/// What a notification's params are about: their `subscription`, or, of a list, the first element.
pub fn subscription_of(params: &str) -> Option<&str> {
    if params.starts_with('[') {
        return elements(params, 1)?.first().copied();
    }
    let members = members(params, ["subscription"]).ok()?;
    members.values[0].filter(|_| !members.is_ambiguous)
}

/// The one value that there is in params, whatever its name: another one might be what the backend looks at.
pub fn only_value(params: &str) -> Option<&str> {
    let (value, count) = if params.starts_with('[') {
        let elements = elements(params, 1)?;
        (elements.first().copied(), elements.len())
    } else {
        let members = members(params, []).ok()?;
        (members.last, members.count)
    };
    value.filter(|_| count == 1)
}

/// JSON text of a string or number: "String, Number, or NULL value if included" (JSON-RPC 2.0, 4).
pub fn is_id(value: &str) -> bool {
    value == "null" || value.starts_with(|first: char| matches!(first, '"' | '-' | '0'..='9'))
}

/// A subscription's id as JSON text that is the same for the same string; `None`: it is none.
pub fn subscription_id(value: &str) -> Option<Cow<'_, str>> {
    if !is_id(value) || value == "null" || value.len() > MAX_SUBSCRIPTION_ID_BYTES {
        return None;
    }
    // Whoever escapes a letter says the same as who does not.
    if value.contains('\\') { Some(Cow::Owned(quoted(&string(value)?))) } else { Some(Cow::Borrowed(value)) }
}

/// What a JSON string says; `None`: it is none, or half a surrogate pair is in it.
pub fn string(value: &str) -> Option<Cow<'_, str>> {
    let inner = value.strip_prefix('"')?.strip_suffix('"')?;
    if inner.contains('\\') { serde_json::from_str(value).ok().map(Cow::Owned) } else { Some(Cow::Borrowed(inner)) }
}

/// A string as JSON text.
pub fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The text with parts of it replaced, each of which is a slice of it; none within another one.
pub fn splice<const N: usize>(text: &str, mut pieces: [(&str, &str); N]) -> String {
    pieces.sort_unstable_by_key(|(old, _)| old.as_ptr().addr());
    let mut spliced = String::with_capacity(text.len() + pieces.iter().map(|(_, new)| new.len()).sum::<usize>());
    let mut at = 0;
    for (old, new) in pieces {
        let start = old.as_ptr().addr() - text.as_ptr().addr();
        spliced.push_str(&text[at..start]);
        spliced.push_str(new);
        at = start + old.len();
    }
    spliced.push_str(&text[at..]);
    spliced
}

/// The elements of a list; one more than so many of a longer one, of which nothing else is looked at. `None`: it is no list, or not JSON.
fn elements(list: &str, most: usize) -> Option<Vec<&str>> {
    let mut reader = serde_json::Deserializer::from_str(list);
    let mut elements = Vec::new();
    let read = reader.deserialize_seq(Elements(most, &mut elements));
    (elements.len() > most || read.is_ok() && reader.end().is_ok()).then_some(elements)
}

struct Elements<'e, 'de>(usize, &'e mut Vec<&'de str>);

impl<'de> Visitor<'de> for Elements<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        while let Some(element) = list.next_element::<&RawValue>()? {
            self.1.push(element.get());
            if self.1.len() > self.0 {
                // No more than that is read.
                return Err(Error::custom("too many"));
            }
        }
        Ok(())
    }
}

/// What was found in an object.
struct Members<'a, const N: usize> {
    /// In the order of the names that were asked for.
    values: [Option<&'a str>; N],
    /// Of all members.
    count: usize,
    last: Option<&'a str>,
    is_ambiguous: bool,
}

/// An error: it is no object, or not JSON; or, if that is true, has too many members, and not all were looked at.
fn members<'a, const N: usize>(object: &'a str, names: [&str; N]) -> Result<Members<'a, N>, bool> {
    let mut reader = serde_json::Deserializer::from_str(object);
    let mut is_long = false;
    let members = reader.deserialize_map(Names(names, &mut is_long)).map_err(|_| is_long)?;
    reader.end().map_err(|_| false)?;
    Ok(members)
}

/// What is asked for; and whether there are too many.
struct Names<'n, const N: usize>([&'n str; N], &'n mut bool);

impl<'de, const N: usize> Visitor<'de> for Names<'_, N> {
    type Value = Members<'de, N>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Self::Value, A::Error> {
        let mut members = Members { values: [None; N], count: 0, last: None, is_ambiguous: false };
        while let Some(name) = object.next_key_seed(Name(&self.0))? {
            let value = object.next_value::<&RawValue>()?.get();
            members.count += 1;
            members.last = Some(value);
            if members.count > MAX_MEMBERS {
                *self.1 = true;
                return Err(Error::custom("too many"));
            }
            match name {
                Which::This(index) => members.is_ambiguous |= members.values[index].replace(value).is_some(),
                Which::Alike => members.is_ambiguous = true,
                Which::Other => {}
            }
        }
        Ok(members)
    }
}

/// A member's name, which is not kept.
struct Name<'n>(&'n [&'n str]);

enum Which {
    This(usize),
    /// Some reader takes it for one of these.
    Alike,
    Other,
}

impl<'de> DeserializeSeed<'de> for Name<'_> {
    type Value = Which;

    fn deserialize<D: serde::Deserializer<'de>>(self, name: D) -> Result<Which, D::Error> {
        name.deserialize_str(self)
    }
}

impl Visitor<'_> for Name<'_> {
    type Value = Which;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Which, E> {
        if let Some(index) = self.0.iter().position(|own| *own == name) {
            return Ok(Which::This(index));
        }
        // As Go's JSON folds names, for which a long s and the sign of Kelvin are letters; and as C does, which stops at a NUL.
        let folded = || {
            name.chars().take_while(|letter| *letter != '\0').map(|letter| match letter {
                '\u{17f}' => 's',
                '\u{212a}' => 'k',
                letter => letter.to_ascii_lowercase(),
            })
        };
        Ok(if self.0.iter().any(|own| own.chars().eq(folded())) { Which::Alike } else { Which::Other })
    }
}
