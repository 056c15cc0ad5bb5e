//! Which way a request goes, by its path.
//!
//! A path is compared as it was sent, without its query and without decoding anything. A backend may read it in another way, so
//! one that would choose another route then is nobody's: it can be refused, and never gets to where its name does not lead.

use std::{borrow::Cow, collections::HashMap, fmt};

/// What the path of a request must be.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Pattern {
    /// Exactly this.
    Exact(String),
    /// This, which ends with a slash, or anything that begins with it.
    Below(String),
}

impl fmt::Display for Pattern {
    /// As it is written.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(path) => f.write_str(path),
            Self::Below(path) => write!(f, "{path}*"),
        }
    }
}

impl Pattern {
    /// What is left when its percent-encoding is undone: two of the same can't be told from one another by every backend.
    #[must_use]
    pub fn decoded(&self) -> Self {
        match self {
            Self::Exact(path) => Self::Exact(decode(path).into_owned()),
            Self::Below(path) => Self::Below(decode(path).into_owned()),
        }
    }
}

/// The path can be read as another one, which would go another way; or it has dot segments, and these two may be the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ambiguous<'a, T> {
    /// Its way as it was sent.
    pub chosen: &'a T,
    /// Its way if it is read otherwise; there may be more.
    pub other: &'a T,
}

/// The ways that paths may go. The most specific one is chosen: exactly this path, else the longest beginning.
#[derive(Debug, Clone)]
pub struct Routes<T> {
    ways: Vec<T>,
    otherwise: T,
    as_sent: Table,
    decoded: Table,
}

/// Indices of ways.
#[derive(Debug, Clone, Default)]
struct Table {
    exact: HashMap<String, usize>,
    /// The longest first.
    below: Vec<(String, usize)>,
}

impl Table {
    fn add(&mut self, pattern: Pattern, way: usize) {
        match pattern {
            Pattern::Exact(path) => _ = self.exact.insert(path, way),
            Pattern::Below(path) => self.below.push((path, way)),
        }
    }

    fn find(&self, path: &str) -> Option<usize> {
        let below = || self.below.iter().find(|(begin, _)| path.starts_with(begin.as_str())).map(|(_, way)| *way);
        self.exact.get(path).copied().or_else(below)
    }
}

impl<T> Routes<T> {
    /// Each pattern once. `otherwise` is for paths that fit none.
    pub fn new(routes: impl IntoIterator<Item = (Pattern, T)>, otherwise: T) -> Self {
        let (mut as_sent, mut decoded) = (Table::default(), Table::default());
        let mut ways = Vec::new();
        for (pattern, to) in routes {
            decoded.add(pattern.decoded(), ways.len());
            as_sent.add(pattern, ways.len());
            ways.push(to);
        }
        for table in [&mut as_sent, &mut decoded] {
            table.below.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
        }
        Self { ways, otherwise, as_sent, decoded }
    }

    /// Where requests go that no route is for.
    pub fn otherwise(&self) -> &T {
        &self.otherwise
    }

    /// All ways there are.
    pub fn all(&self) -> impl Iterator<Item = &T> {
        self.ways.iter().chain([&self.otherwise])
    }

    /// The way of a request for `path`, which is as it was sent.
    ///
    /// # Errors
    ///
    /// It has dot segments; or it might be another way, once percent-encoding, backslashes, empty segments and the parameters of
    /// segments (`;a=b`) are resolved, some of them or all.
    pub fn choose(&self, path: &str) -> Result<&T, Ambiguous<'_, T>> {
        let way = self.as_sent.find(path);
        let chosen = self.way(way);
        if self.ways.is_empty() || is_plain(path) {
            return Ok(chosen);
        }
        let ambiguous = |other| Err(Ambiguous { chosen, other: self.way(other) });
        let decoded = decode(path).replace('\\', "/");
        let bare = without_parameters(&decoded);
        // No client that means well sends these: browsers resolve them. What a backend makes of them, nobody knows.
        if bare.split('/').any(|segment| segment == "." || segment == "..") {
            return ambiguous(self.decoded.find(&without_dots(&bare)));
        }
        let merged = merge_slashes(path);
        let readings = [
            self.as_sent.find(&without_parameters(path)),
            self.as_sent.find(&without_parameters(&merged)),
            self.as_sent.find(&merged),
            self.as_sent.find(&merge_slashes(&without_parameters(path))),
            self.decoded.find(&decoded),
            self.decoded.find(&bare),
            self.decoded.find(&merge_slashes(&decoded)),
            self.decoded.find(&merge_slashes(&bare)),
        ];
        readings.into_iter().find(|reading| *reading != way).map_or(Ok(chosen), ambiguous)
    }

    fn way(&self, index: Option<usize>) -> &T {
        index.and_then(|index| self.ways.get(index)).unwrap_or(&self.otherwise)
    }
}

/// There is one way to read it.
fn is_plain(path: &str) -> bool {
    !path.bytes().any(|byte| matches!(byte, b'%' | b'\\' | b';')) && !path.contains("//") && !path.contains("/.")
}

/// Percent-encoding is undone once; what is none stays as it is. What is not UTF-8 then is no part of any pattern.
fn decode(path: &str) -> Cow<'_, str> {
    if !path.contains('%') {
        return Cow::Borrowed(path);
    }
    let bytes = path.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let digit = |offset: usize| bytes.get(at + offset).and_then(|&digit| char::from(digit).to_digit(16));
        if let (b'%', Some(high), Some(low)) = (byte, digit(1), digit(2)) {
            decoded.push(u8::try_from(high * 16 + low).unwrap_or(b'%'));
            at += 3;
        } else {
            decoded.push(byte);
            at += 1;
        }
    }
    Cow::Owned(String::from_utf8_lossy(&decoded).into_owned())
}

/// What some take for the whole of each segment (Servlets do).
fn without_parameters(path: &str) -> String {
    let segments: Vec<_> = path.split('/').map(|segment| segment.split(';').next().unwrap_or_default()).collect();
    segments.join("/")
}

fn merge_slashes(path: &str) -> String {
    let mut merged = String::with_capacity(path.len());
    for c in path.chars() {
        if !(c == '/' && merged.ends_with('/')) {
            merged.push(c);
        }
    }
    merged
}

/// As most backends do, which also take several slashes for one.
fn without_dots(path: &str) -> String {
    let mut kept = Vec::new();
    for segment in path.split('/') {
        match segment {
            "" | "." => {}
            ".." => _ = kept.pop(),
            _ => kept.push(segment),
        }
    }
    let is_below = matches!(path.rsplit('/').next(), Some("" | "." | "..")) && !kept.is_empty();
    format!("/{}{}", kept.join("/"), if is_below { "/" } else { "" })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn routes() -> Routes<&'static str> {
        let exact = |path: &str| Pattern::Exact(path.to_owned());
        let below = |path: &str| Pattern::Below(path.to_owned());
        let routes = [
            (below("/a/"), "a"),
            (exact("/a/b"), "exact"),
            (below("/a/b/"), "ab"),
            (exact("/chat"), "chat"),
            (below("/chat/"), "below chat"),
            (exact("/caf%C3%A9"), "café"),
        ];
        Routes::new(routes, "otherwise")
    }

    #[test]
    fn the_most_specific_one_is_chosen() {
        let routes = routes();
        for (path, to) in [
            ("/", "otherwise"),
            ("*", "otherwise"),
            ("/a", "otherwise"),
            ("/a/", "a"),
            ("/a/x", "a"),
            ("/a/b", "exact"),
            ("/a/b/", "ab"),
            ("/a/b/c/d", "ab"),
            ("/a/bc", "a"),
            ("/chat", "chat"),
            ("/chat/", "below chat"),
            ("/chatter", "otherwise"),
            ("/CHAT", "otherwise"),
            ("/a/.hidden", "a"),
            ("/a/...", "a"),
            ("/caf%C3%A9", "café"),
        ] {
            assert_eq!(routes.choose(path), Ok(&to), "{path}");
        }
    }

    /// Whatever a backend may make of a path, it goes where that goes, or nowhere.
    #[test]
    fn what_can_be_read_in_two_ways_goes_nowhere() {
        let routes = routes();
        for path in [
            "/x/../chat",
            "/x/%2e%2E/chat",
            "/x/..%2fchat",
            "/x\\..\\chat",
            "/./chat",
            "/chat/..",
            "/chat/.",
            "/a/%2e",
            "/%63hat",
            "/caf%c3%a9",
            "/chat%2f",
            "/chat%2Fx",
            "/chat%5cx",
            "/chat\\x",
            "/a%2fb",
            "/a/b%2f..",
            "//chat",
            "/a//b",
            "/a/b//..//c",
            "/chat;a=b",
            "/x/..;/chat",
            "/chat%3bx",
            // Decoded it is "/;/x/chat".
            "/;%2fx/chat",
        ] {
            assert!(routes.choose(path).is_err(), "{path}");
        }
        for (path, chosen, other) in [
            ("/x/../chat", "otherwise", "chat"),
            ("/chat/..", "below chat", "otherwise"),
            ("/chat/x/..", "below chat", "below chat"),
            ("/x/..", "otherwise", "otherwise"),
            ("/%63hat", "otherwise", "chat"),
            ("/chat%2fx", "otherwise", "below chat"),
            ("/a/b;v=1", "a", "exact"),
        ] {
            let ambiguous = Ambiguous { chosen: &chosen, other: &other };
            assert_eq!(routes.choose(path), Err(ambiguous), "{path}");
        }
        // However it is read, it goes the same way.
        for (path, to) in [
            ("/x%2fy", "otherwise"),
            ("/x//y", "otherwise"),
            ("/a/x%20y", "a"),
            ("/a/x%2fb", "a"),
            ("/a/%ff%zz%", "a"),
            ("/chat/%7Eme", "below chat"),
            ("/a//x", "a"),
            ("/a/x;v=1/y", "a"),
            ("/chat/%252e%252e", "below chat"),
        ] {
            assert_eq!(routes.choose(path), Ok(&to), "{path}");
        }
        // Without routes there is one way for all, as it was sent.
        assert_eq!(Routes::new([], 1).choose("/x/../%2e/a%2fb"), Ok(&1));
    }

    fn pieces() -> impl Strategy<Value = String> {
        let piece = prop::sample::select(vec![
            "/", "/", "/", "//", "a", "b", "chat", "%61", "%2f", "%2F", "%5c", "\\", ".", "..", "%2e", "%2E.", ";",
            ";x", "%3b", "%25", "%", "%C3%A9", "caf",
        ]);
        prop::collection::vec(piece, 0..10).prop_map(|pieces| format!("/{}", pieces.concat()))
    }

    /// As a backend might, in steps.
    fn resolve(step: usize, path: &str) -> String {
        match step {
            0 => decode(path).into_owned(),
            1 => path.replace('\\', "/"),
            2 => merge_slashes(path),
            3 => without_parameters(path),
            _ => {
                let mut kept: Vec<&str> = Vec::new();
                for segment in path.split('/') {
                    match segment {
                        "." => {}
                        ".." => _ = kept.pop(),
                        _ => kept.push(segment),
                    }
                }
                let resolved = kept.join("/");
                if resolved.starts_with('/') { resolved } else { format!("/{resolved}") }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]
        /// Whatever a backend resolves, in whatever order, it finds what was chosen.
        #[test]
        fn what_is_chosen_is_what_a_backend_finds(path in pieces(), steps in prop::sample::subsequence(vec![0, 1, 2, 3, 4], 0..=5).prop_shuffle()) {
            let routes = routes();
            if let Ok(chosen) = routes.choose(&path) {
                let mut read = path.clone();
                let mut is_decoded = false;
                for step in steps {
                    is_decoded |= step == 0;
                    read = resolve(step, &read);
                }
                let table = if is_decoded { &routes.decoded } else { &routes.as_sent };
                let found = table.find(&read).map_or(&routes.otherwise, |way| &routes.ways[way]);
                prop_assert_eq!(chosen, found, "{} read as {}", path, read);
            }
        }
    }
}
