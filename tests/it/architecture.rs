//! The invariants of the design that can be read off the source: who may use what.
//!
//! Only code is looked at: comments, the contents of strings, and what is for tests alone are blanked out first, so
//! that a rule may be spoken of where it is kept.

use std::{fs, path::Path};

/// Who stands on which floor, as in `src/lib.rs`. A module uses only what stands below it, or beside it where that is no
/// floor of rooms.
const FLOORS: [&[&str]; 7] = [
    &["ws", "side", "fields", "sparse"],
    &[
        "admission",
        "alarms",
        "budget",
        "drain",
        "gate",
        "log_lines",
        "log_queue",
        "metrics",
        "net",
        "pool",
        "slots",
        "stamp",
        "system",
        "token",
    ],
    &["listen", "downstream", "upstream", "relay", "close"],
    &["session", "hub"],
    &["admin", "config", "demo", "doctor", "notify", "restart"],
    &["server", "reload"],
    &["main", "cli"],
];

/// The floor of rooms that do not know one another.
const ROOMS: usize = 2;

/// A file of `src/`: its path there with `/`, and what is in it.
struct Source {
    path: String,
    text: String,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.to_owned() }
    }

    /// The module of the crate that it belongs to: `relay` for `relay/lane.rs`.
    fn room(&self) -> &str {
        let first = self.path.split('/').next().unwrap_or_default();
        first.strip_suffix(".rs").unwrap_or(first)
    }

    /// A file that is compiled for tests alone.
    fn is_test(&self) -> bool {
        self.path.ends_with("/tests.rs") || self.path.contains("/tests/")
    }
}

/// Everything that breaks an invariant, as `path: what`.
fn findings(sources: &[Source]) -> Vec<String> {
    let mut findings = Vec::new();
    for source in sources {
        let mut find = |what: String| findings.push(format!("{}: {what}", source.path));
        if !source.text.starts_with("//!") {
            find("does not open with its promise (//!)".to_owned());
        }
        let code = code(&source.text);
        let words = words(&code);
        let has = |word: &str| words.contains(&word);
        if has("unsafe") && source.path != "net/sys.rs" {
            find("unsafe".to_owned());
        }
        if has("set_linger") {
            find("SO_LINGER".to_owned());
        }
        if source.is_test() {
            continue;
        }
        if has("unwrap") {
            find("unwrap without a reason".to_owned());
        }
        // Tasks are spawned on a tracker or on a set that somebody joins, never on the runtime itself.
        let dense = words.join("");
        let detached = ["tokio::spawn(", "task::spawn(", "tokio::task::spawn", "use tokio::spawn", "Handle::current()"];
        for spawn in detached.iter().filter(|spawn| dense.contains(&spawn.replace(' ', ""))) {
            find(format!("a detached task: {spawn}"));
        }
        if has("spawn_local") {
            find("a detached task: spawn_local".to_owned());
        }
        let paths = used(&words);
        let uses = |path: &str| paths.iter().any(|used| *used == path || used.starts_with(&format!("{path}::")));
        let room = source.room();
        let mut forbidden: Vec<String> = Vec::new();
        if room == "ws" {
            forbidden.extend(
                ["tokio", "tokio_util", "tracing", "std::time", "rand", "std::net", "std::io"].map(str::to_owned),
            );
        }
        if room != "config" {
            forbidden.push("toml".to_owned());
        }
        if room != "metrics" {
            forbidden.push("prometheus_client".to_owned());
        }
        // `lib.rs` only names them all.
        if let Some(floor) = FLOORS.iter().position(|floor| floor.contains(&room)) {
            let hidden = if floor == ROOMS { floor } else { floor + 1 };
            let others = FLOORS[hidden..].iter().copied().flatten().filter(|other| **other != room);
            forbidden.extend(others.map(|other| format!("crate::{other}")));
        } else if room != "lib" {
            find("stands on no floor".to_owned());
        }
        for path in forbidden.iter().filter(|path| uses(path)) {
            find(format!("uses {path}"));
        }
    }
    findings
}

/// The source without comments, string contents, and everything behind `#[cfg(test)]`; line ends stay.
fn code(text: &str) -> String {
    let text = text.as_bytes();
    let mut code = String::new();
    let mut at = 0;
    while let Some(&byte) = text.get(at) {
        let rest = &text[at..];
        let skip = match byte {
            b'/' if rest.starts_with(b"//") => rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len()),
            b'/' if rest.starts_with(b"/*") => find(rest, b"*/").map_or(rest.len(), |end| end + 2),
            b'r' if raw_string(text, at).is_some() => raw_string(text, at).expect("just seen"),
            b'"' => string(rest),
            // A character literal, not a lifetime.
            b'\'' if rest.get(1) == Some(&b'\\') => {
                rest[3..].iter().position(|byte| *byte == b'\'').map_or(3, |end| end + 4)
            }
            b'\'' if rest.get(2) == Some(&b'\'') => 3,
            b'#' if rest.starts_with(b"#[cfg(test)]") => item(&rest[12..]) + 12,
            _ => {
                code.push(char::from(byte));
                at += 1;
                continue;
            }
        };
        code.push(' ');
        at += skip.max(1);
    }
    code
}

/// The length of the item at the start of `text`: up to its `;`, or its braces and what is in them.
fn item(text: &[u8]) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while let Some(&byte) = text.get(at) {
        let rest = &text[at..];
        at += match byte {
            b'"' => string(rest),
            b'r' if raw_string(text, at).is_some() => raw_string(text, at).expect("just seen"),
            b'\'' if rest.get(2) == Some(&b'\'') => 3,
            b'/' if rest.starts_with(b"//") => rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len()),
            b';' if depth == 0 => return at + 1,
            b'{' => {
                depth += 1;
                1
            }
            b'}' if depth <= 1 => return at + 1,
            b'}' => {
                depth -= 1;
                1
            }
            _ => 1,
        };
    }
    at
}

/// The length of the string literal at the start of `text`.
fn string(text: &[u8]) -> usize {
    let mut at = 1;
    while let Some(&byte) = text.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    text.len()
}

/// The length of the raw string literal that begins with the `r` at `at`; `None`: it is another `r`.
fn raw_string(text: &[u8], at: usize) -> Option<usize> {
    if at > 0 && (text[at - 1].is_ascii_alphanumeric() && text[at - 1] != b'b' || text[at - 1] == b'_') {
        return None;
    }
    let hashes = text[at + 1..].iter().take_while(|byte| **byte == b'#').count();
    let open = at + 1 + hashes;
    if text.get(open) != Some(&b'"') {
        return None;
    }
    let close = [b"\"".as_slice(), &vec![b'#'; hashes]].concat();
    find(&text[open + 1..], &close).map(|end| open + 1 + end + close.len() - at)
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

/// Identifiers and `::` as words, every other visible character on its own.
fn words(code: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = code.trim_start();
    while !rest.is_empty() {
        let name = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
        let len = match name {
            0 if rest.starts_with("::") => 2,
            0 => rest.chars().next().map_or(1, char::len_utf8),
            name => name,
        };
        words.push(&rest[..len]);
        rest = rest[len..].trim_start();
    }
    words
}

/// Every path that the code names, groups of imports unfolded: `use a::{b, c::d}` is `a::b` and `a::c::d`.
///
/// A path that begins with `super` or `self` stays within its room, since no room has a file outside its folder.
fn used(words: &[&str]) -> Vec<String> {
    let mut used = Vec::new();
    // The path so far, and those before the groups that are open; `None` for braces of another kind.
    let mut path = String::new();
    let mut open: Vec<Option<String>> = Vec::new();
    let is_name = |word: &str| word.starts_with(|c: char| c.is_alphabetic() || c == '_');
    let is_before_path = |word: &str| ["use", "dyn", "impl", "for", "mut", "as", "return", "in"].contains(&word);
    let mut last = "";
    for &word in words {
        match word {
            // At the start of a path it says nothing more.
            "::" if (is_name(last) && !is_before_path(last)) || last == ">" => path.push_str("::"),
            "::" => path.clear(),
            "{" => open.push(path.ends_with("::").then(|| path.clone())),
            "}" => {
                open.pop();
                path.clear();
            }
            word if is_name(word) => {
                if last != "::" {
                    path.clear();
                    if matches!(last, "{" | ",") {
                        path.push_str(open.last().and_then(Option::as_deref).unwrap_or_default());
                    }
                }
                path.push_str(word);
                used.push(path.clone());
            }
            _ => path.clear(),
        }
        last = word;
    }
    used
}

/// All of `src/`, by path.
fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root.clone()];
    let mut sources = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the source") {
            let path = entry.expect("an entry of it").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let inside = path.strip_prefix(&root).expect("found below it").to_string_lossy().replace('\\', "/");
                sources.push(Source { path: inside, text: fs::read_to_string(&path).expect("readable") });
            }
        }
    }
    sources.sort_by(|one, other| one.path.cmp(&other.path));
    sources
}

/// The source keeps the invariants; and it was really read, since a check that finds no files finds nothing wrong.
#[test]
fn the_source_keeps_the_invariants() {
    let sources = sources();
    for room in FLOORS.iter().copied().flatten().chain(&["lib"]) {
        assert!(sources.iter().any(|source| source.room() == *room), "no file of {room}");
    }
    for file in [
        "ws/tracker.rs",
        "ws/frame.rs",
        "ws/close.rs",
        "relay/mod.rs",
        "relay/ending.rs",
        "relay/lane.rs",
        "net/sys.rs",
    ] {
        assert!(sources.iter().any(|source| source.path == file && source.text.len() > 1_000), "no {file}");
    }
    assert_eq!(findings(&sources), Vec::<String>::new());
    // Each rule about one exception would be seen if it were not one.
    let moved = |path: &str, to: &str| {
        let text = &sources.iter().find(|source| source.path == path).expect("read above").text;
        findings(&[Source::new(to, text)])
    };
    assert!(moved("net/sys.rs", "drain.rs").contains(&"drain.rs: unsafe".to_owned()));
    assert!(moved("metrics.rs", "net/sys.rs").contains(&"net/sys.rs: uses prometheus_client".to_owned()));
    assert!(moved("relay/mod.rs", "ws/mod.rs").contains(&"ws/mod.rs: uses tokio".to_owned()));
}

/// The check itself: each violation is found in a few lines that have it.
#[test]
fn planted_violations_are_found() {
    for (path, text, expected) in [
        ("ws/a.rs", "use tokio::time::Instant;", "uses tokio"),
        ("ws/a.rs", "use ::tokio::io;", "uses tokio"),
        ("ws/a.rs", "use std::{fmt, time::Duration};", "uses std::time"),
        ("ws/a.rs", "use std::{fmt, collections::{HashMap, self}, time};", "uses std::time"),
        ("ws/a.rs", "fn f() { let t = std::time::Instant::now(); }", "uses std::time"),
        ("ws/a.rs", "fn f() { tracing::info!(\"x\"); }", "uses tracing"),
        ("ws/a.rs", "fn f() -> u8 { rand::random() }", "uses rand"),
        ("ws/a.rs", "use crate::net::Side;", "uses crate::net"),
        ("net/sys.rs", "use crate::relay::Relay;", "uses crate::relay"),
        ("relay/a.rs", "use crate::{drain::Drain, upstream};", "uses crate::upstream"),
        ("relay/a.rs", "use crate::{ws::{Code, Rsv}, close::linger};", "uses crate::close"),
        ("close/mod.rs", "fn f(c: &crate::config::Config) {}", "uses crate::config"),
        ("listen/mod.rs", "use crate::session::Session;", "uses crate::session"),
        ("upstream/mod.rs", "use crate::server;", "uses crate::server"),
        ("downstream/a.rs", "pub use crate::admin::x;", "uses crate::admin"),
        ("downstream/a.rs", "type A = Vec<crate::cli::Cli>;", "uses crate::cli"),
        ("net/sys.rs", "use crate::{side::Side, session::Session};", "uses crate::session"),
        ("fields.rs", "use crate::net::Address;", "uses crate::net"),
        ("session.rs", "use crate::config::Config;", "uses crate::config"),
        ("config/mod.rs", "use crate::server;", "uses crate::server"),
        ("server.rs", "use crate::cli::Args;", "uses crate::cli"),
        ("attic.rs", "fn f() {}", "stands on no floor"),
        ("session.rs", "fn f() { toml::from_str(s); }", "uses toml"),
        ("server.rs", "use prometheus_client::registry::Registry;", "uses prometheus_client"),
        ("session.rs", "fn f() { unsafe { g() } }", "unsafe"),
        ("session.rs", "fn f() { socket.set_linger(None); }", "SO_LINGER"),
        ("session.rs", "fn f() { g().unwrap(); }", "unwrap without a reason"),
        ("session.rs", "fn f() { g()\n    .unwrap () }", "unwrap without a reason"),
        ("session.rs", "fn f() { tokio::spawn(g()); }", "a detached task: tokio::spawn("),
        ("session.rs", "fn f() { tokio::task ::spawn (g()); }", "a detached task: task::spawn("),
        ("session.rs", "fn f() { tokio::task::spawn_blocking(g); }", "a detached task: tokio::task::spawn"),
        ("session.rs", "use tokio::spawn;", "a detached task: use tokio::spawn"),
        ("session.rs", "fn f() { set.spawn_local(g()); }", "a detached task: spawn_local"),
        ("session.rs", "fn f() { let c = '\"'; g().unwrap() } // \"", "unwrap without a reason"),
        (
            "session.rs",
            "#[cfg(test)]\nmod tests { fn f() { \"}\"; } }\nfn g() { h().unwrap() }",
            "unwrap without a reason",
        ),
        ("session.rs", "#[cfg(test)]\nmod tests;\nfn g() { h().unwrap() }", "unwrap without a reason"),
        ("session.rs", "const A: &str = r#\"a \" b\"#; fn g() { h().unwrap() }", "unwrap without a reason"),
    ] {
        let found = findings(&[Source::new(path, &format!("//! A promise.\n{text}\n"))]);
        assert!(found.contains(&format!("{path}: {expected}")), "{text}: {found:?}");
    }
    let found = findings(&[Source::new("session.rs", "use std::fmt;\n")]);
    assert_eq!(found, ["session.rs: does not open with its promise (//!)"]);
}

/// What SECURITY.md says is shown by a test is shown by one that is there.
#[test]
fn the_threat_model_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("SECURITY.md")).expect("SECURITY.md");
    let named: Vec<_> = text.split('`').skip(1).step_by(2).filter_map(|code| code.split_once("::")).collect();
    for (module, test) in &named {
        let source = fs::read_to_string(root.join(format!("tests/it/{module}.rs"))).unwrap_or_default();
        let is_there = if test.is_empty() { !source.is_empty() } else { source.contains(&format!("fn {test}(")) };
        assert!(is_there, "SECURITY.md: there is no {module}::{test}");
    }
    assert!(named.len() > 20, "{named:?}");
}

/// The check itself: what only looks like a violation is left alone.
#[test]
fn innocent_code_is_left_alone() {
    for (path, text) in [
        ("ws/a.rs", "use super::frame::Header; // no tokio::time here"),
        ("ws/a.rs", "/* use tokio; */ const A: &str = \"tokio::spawn( unsafe \\\" tracing::x\";"),
        ("ws/a.rs", "fn f<'a>(x: &'a str) -> char { 'u' }"),
        ("ws/a.rs", "#[cfg(test)]\nmod tests { use tokio::time; fn f() { g().unwrap(); } }"),
        ("ws/a/tests.rs", "use tokio_tungstenite::tungstenite; fn f() { g().unwrap(); }"),
        ("ws/a.rs", "use std::fmt; fn time() {} fn f() { time(); }"),
        ("relay/a.rs", "use crate::{net::Side, ws::close, drain::Drain, metrics::Traffic};"),
        ("relay/a.rs", "use super::Config; use crate::relay::lane::Lane; fn f() { self.closes.close(); }"),
        ("config/a.rs", "use toml::Spanned;"),
        ("config/a.rs", "use crate::{relay, upstream, close};"),
        ("drain.rs", "use crate::{metrics::Metrics, side::Side};"),
        ("cli/mod.rs", "use crate::{server, config::Config, demo};"),
        ("metrics.rs", "use prometheus_client::registry::Registry;"),
        ("net/sys.rs", "#[allow(unsafe_code)] fn f() { unsafe { g() } }"),
        ("session.rs", "use crate::{relay::Relay, close}; fn f() { tracker.spawn(g()); a.unwrap_or(0); }"),
        ("listen/mod.rs", "fn f() { self.tasks.spawn_on(g(), &handle); let config = Config { close: 1 }; }"),
    ] {
        let found = findings(&[Source::new(path, &format!("//! A promise.\n{text}\n"))]);
        assert_eq!(found, Vec::<String>::new(), "{text}");
    }
}
