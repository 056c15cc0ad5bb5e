//! Stage one, what is written: the values of all sources, each with its place, of the types TOML knows. The only file that
//! reads TOML.
//!
//! Not here: whether a value makes sense. And serde's derive is not used to read: it ends at the first error, while whoever
//! corrects a file wants to see all of them.

use std::{
    ffi::OsString,
    fmt,
    fs::{self, File},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{self, Read as _},
    ops::Range,
    path::{Path, PathBuf},
};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    FileSource, Plain, Route, SHIPPED, Sources,
    finding::{Finding, Place},
    keys::{self, MAX_ROUTES, Name, PATH, POOL, ROUTE},
    units::{Refusal, either, refuse},
};

/// A file beyond this is no configuration.
const FILE_BYTES: u64 = 1 << 20;
/// What an override in the environment begins with.
const PREFIX: &str = "TIDEGATE_";
/// Where the configuration is, not a key of it.
pub(super) const FILE_VARIABLE: &str = "TIDEGATE_CONFIG";

/// A value for a known key.
#[derive(Debug)]
pub(super) struct Written {
    pub name: Name,
    pub value: Value,
    pub place: Place,
    /// The place of each item, of a list in a file.
    pub items: Vec<Place>,
}

/// A value, as far as keys have use for it.
#[derive(Debug)]
pub(super) enum Value {
    Text(String),
    Integer(i64),
    List(Vec<Value>),
    Switch(bool),
    /// A type that no key has: its name with an article.
    Other(&'static str),
    /// From outside TOML, where everything is text: to be read as what the key needs.
    Untyped(String),
}

impl fmt::Display for Value {
    /// As in a file, for messages.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) | Self::Untyped(text) => write!(f, "{text:?}"),
            Self::Integer(integer) => write!(f, "{integer}"),
            Self::Switch(on) => write!(f, "{on}"),
            Self::List(_) | Self::Other(_) => f.write_str(self.kind()),
        }
    }
}

impl From<Plain> for Value {
    fn from(plain: Plain) -> Self {
        match plain {
            Plain::Text(text) => Self::Text(text),
            Plain::Integer(number) => Self::Integer(i64::try_from(number).expect("no bound of a key is beyond it")),
            Plain::Switch(on) => Self::Switch(on),
            Plain::List(items) => Self::List(items.into_iter().map(Self::Text).collect()),
        }
    }
}

impl Value {
    /// The text in it; else says that something like `example` was expected.
    pub(super) fn text(&self, noun: &str, example: &str) -> Result<&str, Refusal> {
        match self {
            Self::Text(text) => Ok(text),
            _ => refuse(format!("must be {noun}, but is {}", self.kind()), format!("write it like \"{example}\"")),
        }
    }

    /// The integer in it; else says `fix`.
    pub(super) fn integer(&self, fix: &str) -> Result<i64, Refusal> {
        match self {
            Self::Integer(integer) => Ok(*integer),
            Self::Text(text) if text.is_empty() => refuse("is empty", fix),
            Self::Text(text) if text.parse::<i64>().is_ok() => refuse(
                format!("must be a number, but is a string: {text:?}"),
                format!("write it without quotes: {text}"),
            ),
            Self::Text(text) => refuse(format!("must be a number, but is {text:?}"), fix),
            _ => refuse(format!("must be a number, but is {}", self.kind()), fix),
        }
    }

    /// What it is, with an article.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) | Self::Untyped(_) => "a string",
            Self::Integer(_) => "an integer",
            Self::List(_) => "a list",
            Self::Switch(_) => "a boolean",
            Self::Other(kind) => kind,
        }
    }

    /// Gives text from the environment the type that `slot` needs: what TOML reads as that type is taken as such, all else is
    /// text. So `0x10` is a number, `"a b"` loses its quotes, and lists are `["a", "b"]` or `a,b`.
    pub(super) fn typed(self, slot: &keys::Slot<'_>) -> Self {
        let Self::Untyped(text) = self else {
            return self;
        };
        let fits = |value: &Self| match slot {
            keys::Slot::Count(..) | keys::Slot::Code(..) => matches!(value, Self::Integer(_)),
            keys::Slot::Networks(_)
            | keys::Slot::Addresses(_)
            | keys::Slot::HeaderNames(_)
            | keys::Slot::Subscriptions(_)
            | keys::Slot::Methods(_) => matches!(value, Self::List(_)),
            keys::Slot::Switch(_) => matches!(value, Self::Switch(_)),
            keys::Slot::Backends(_) | keys::Slot::Files(_) => matches!(value, Self::Text(_) | Self::List(_)),
            _ => matches!(value, Self::Text(_)),
        };
        let parsed = DeValue::parse(text.trim()).ok().map(|parsed| Self::from_toml(parsed.get_ref()));
        if let Some(value) = parsed.filter(fits) {
            return value;
        }
        if !matches!(
            slot,
            keys::Slot::Networks(_)
                | keys::Slot::Addresses(_)
                | keys::Slot::HeaderNames(_)
                | keys::Slot::Subscriptions(_)
                | keys::Slot::Methods(_)
        ) {
            return Self::Text(text);
        }
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        Self::List(items.map(|item| Self::Text(item.to_owned())).collect())
    }

    fn from_toml(value: &DeValue<'_>) -> Self {
        match value {
            DeValue::String(text) => Self::Text(text.clone().into_owned()),
            DeValue::Integer(integer) => i64::from_str_radix(integer.as_str(), integer.radix())
                .map_or(Self::Other("one of more than 64 bits"), Self::Integer),
            DeValue::Array(items) => Self::List(items.iter().map(|item| Self::from_toml(item.get_ref())).collect()),
            DeValue::Float(_) => Self::Other("a fraction"),
            DeValue::Boolean(on) => Self::Switch(*on),
            DeValue::Datetime(_) => Self::Other("a date or time"),
            DeValue::Table(_) => Self::Other("a table"),
        }
    }
}

/// What is in all sources.
#[derive(Debug)]
pub(super) struct Everything {
    /// In the order in which later ones win.
    pub written: Vec<Written>,
    /// Where each route begins.
    pub routes: Vec<Place>,
    /// The name of the file, if there is one.
    pub file: Option<String>,
    /// Whether the file could be read. Else what stays at its default says nothing.
    pub complete: bool,
}

/// Reads all sources.
pub(super) fn read(sources: &Sources, findings: &mut Vec<Finding>) -> Everything {
    let (mut written, mut routes) = (Vec::new(), Vec::new());
    let file = read_source(&sources.file, findings);
    let complete = match &file {
        Ok(Some((path, text))) => read_file(path, text, &mut written, &mut routes, findings),
        Ok(None) => true,
        Err(Unreadable) => false,
    };
    read_environment(&sources.env, &mut written, findings);
    let flags = [("--listen", "listen", &sources.listen), ("--upstream", "upstream", &sources.upstream)];
    for (name, section, value) in flags {
        if let Some(value) = value {
            written.push(Written {
                name: Name { section, route: None, key: "address" },
                value: Value::Untyped(value.clone()),
                place: Place::Flag { name, value: value.clone() },
                items: Vec::new(),
            });
        }
    }
    Everything { written, routes, file: file.ok().flatten().map(|(path, _)| path), complete }
}

/// Files at some moment, to be compared with them at another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    configuration: Vec<Result<Vec<u8>, io::ErrorKind>>,
    /// Of those that it names only a sum is kept: there are keys among them.
    named: Vec<Result<u64, io::ErrorKind>>,
}

/// The configuration up to the first file that exists, and all of `named`. A pipe is left alone: what is in it can be read once.
pub(super) fn look(source: &FileSource, named: &[PathBuf]) -> Seen {
    let paths = match source {
        FileSource::Shipped => &[][..],
        FileSource::Named { path, .. } => std::slice::from_ref(path),
        FileSource::Search(paths) => paths,
    };
    let mut configuration = Vec::new();
    for path in paths {
        let read = bytes_of(path, FILE_BYTES + 1);
        let is_last = !matches!(read, Err(io::ErrorKind::NotFound));
        configuration.push(read);
        if is_last {
            break;
        }
    }
    let sum = |bytes: Vec<u8>| {
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        hasher.finish()
    };
    let named = named.iter().map(|path| bytes_of(path, crate::net::TLS_FILE_BYTES + 1).map(sum)).collect();
    Seen { configuration, named }
}

fn bytes_of(path: &Path, most: u64) -> Result<Vec<u8>, io::ErrorKind> {
    let mut bytes = Vec::new();
    let read = fs::metadata(path).and_then(|metadata| {
        if metadata.is_file() {
            File::open(path)?.take(most).read_to_end(&mut bytes)?;
        }
        Ok(bytes)
    });
    read.map_err(|error| error.kind())
}

/// The findings say why.
struct Unreadable;

/// The file's name and text, if there is one.
fn read_source(source: &FileSource, findings: &mut Vec<Finding>) -> Result<Option<(String, String)>, Unreadable> {
    let (paths, by): (Vec<PathBuf>, _) = match source {
        FileSource::Shipped => {
            return Ok(Some(("proxy.toml (built in)".to_owned(), SHIPPED.to_owned())));
        }
        FileSource::Named { path, by } => (vec![path.clone()], Some(*by)),
        FileSource::Search(paths) => (paths.clone(), None),
    };
    for path in paths {
        let name = path.display().to_string();
        let mut refuse = |what: String, fix: &str, place: Place| {
            findings.push(Finding::error(what, place, fix));
        };
        let mut bytes = Vec::new();
        let result = File::open(&path).and_then(|file| file.take(FILE_BYTES + 1).read_to_end(&mut bytes));
        let place = Place::File { path: name.clone() };
        match result {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let Some(by) = by else { continue };
                refuse(
                    format!("there is no such configuration file (named by {by})"),
                    "name a file that exists",
                    place,
                );
            }
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => {
                refuse("the configuration file is a directory".to_owned(), "name the file in it", place);
            }
            // A file that is there was meant to be read, named or not.
            Err(error) => refuse(
                format!("cannot read the configuration file: {error}"),
                "make it a file that tidegate's user may read",
                place,
            ),
            Ok(_) if bytes.len() as u64 > FILE_BYTES => {
                refuse("the configuration file is larger than 1MiB".to_owned(), "name the right file", place);
            }
            Ok(_) => match String::from_utf8(bytes) {
                Ok(text) => return Ok(Some((name, text))),
                Err(error) => {
                    let good = error.utf8_error().valid_up_to();
                    let text = String::from_utf8_lossy(error.as_bytes());
                    refuse(
                        "the configuration file is not UTF-8".to_owned(),
                        "save it as UTF-8",
                        Place::in_file(&name, &text, good..good + 1),
                    );
                }
            },
        }
        return Err(Unreadable);
    }
    Ok(None)
}

/// What is in a file, and whether it is TOML. After an error of TOML's own nothing else in it is judged: too much of that would
/// follow from the first.
fn read_file(
    path: &str,
    text: &str,
    written: &mut Vec<Written>,
    routes: &mut Vec<Place>,
    findings: &mut Vec<Finding>,
) -> bool {
    let (document, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        report_syntax(path, text, errors, findings);
        return false;
    }

    let names = keys::names();
    for (section, content) in document.get_ref() {
        let name = section.get_ref().as_ref();
        if name == ROUTE {
            read_routes((path, text), (section.span(), content.get_ref()), written, routes, findings);
            continue;
        }
        let mut refuse = |what: String, fix: String, span| {
            findings.push(Finding::error(what, Place::in_file(path, text, span), fix));
        };
        let known = names.iter().find(|(section, _)| *section == name).map(|(section, _)| *section);
        let DeValue::Table(table) = content.get_ref() else {
            let tables = matches!(content.get_ref(), DeValue::Array(items) if items.iter().any(|item| item.get_ref().is_table()));
            if let (true, Some(known)) = (tables, known) {
                refuse(
                    format!("[{known}] is written as a list"),
                    format!("write [{known}] in single brackets, once"),
                    section.span(),
                );
            } else if tables {
                refuse(format!("unknown section [[{name}]]"), suggest_section(name), section.span());
            } else if known.is_some() {
                refuse(
                    format!("`{name}` is a section, not a key"),
                    format!("write [{name}] on a line of its own, and its keys below"),
                    section.span(),
                );
            } else {
                let homes = homes_of(name);
                let fix =
                    if homes.is_empty() { suggest_section(name) } else { format!("put it below {}", either(&homes)) };
                refuse(format!("`{name}` stands outside of every section"), fix, section.span());
            }
            continue;
        };
        let Some(known) = known else {
            refuse(format!("unknown section [{name}]"), suggest_section(name), section.span());
            continue;
        };
        for (key, value) in table {
            let key_name = key.get_ref().as_ref();
            if let Some((_, key)) = names.iter().find(|name| **name == (known, key_name)) {
                let name = Name { section: known, route: None, key };
                written.push(Written::in_file((path, text), name, value));
            } else {
                refuse(format!("unknown key `{key_name}` in [{known}]"), suggest_key(known, key_name), key.span());
            }
        }
    }
    true
}

/// What stands under `[[route]]`.
fn read_routes(
    (path, text): (&str, &str),
    (span, content): (Range<usize>, &DeValue<'_>),
    written: &mut Vec<Written>,
    routes: &mut Vec<Place>,
    findings: &mut Vec<Finding>,
) {
    let mut refuse = |what: String, fix: String, span| {
        findings.push(Finding::error(what, Place::in_file(path, text, span), fix));
    };
    let tables = match content {
        DeValue::Array(items) if items.iter().all(|item| item.get_ref().is_table()) => items.iter(),
        DeValue::Table(_) => {
            let fix = "write [[route]] in double brackets: there may be several".to_owned();
            return refuse("[route] is not written as a list".to_owned(), fix, span);
        }
        _ => {
            let fix = "write [[route]] on a line of its own, and its keys below".to_owned();
            return refuse("`route` is a list of sections, not a key".to_owned(), fix, span);
        }
    };
    if let Some(beyond) = tables.clone().nth(MAX_ROUTES) {
        let fix = format!("use at most {MAX_ROUTES}: \"/chat/*\" is one for everything below");
        refuse(format!("has {} routes", tables.len()), fix, beyond.span());
        return;
    }
    let known = Route::names();
    for (index, table) in tables.enumerate() {
        let place = Place::in_file(path, text, table.span());
        let Some(table) = table.get_ref().as_table() else { continue };
        let route = named_route(index, table.get(PATH).and_then(|path| path.get_ref().as_str()));
        routes.push(place.clone());
        if !table.contains_key(PATH) {
            let fix = r#"add path = "/chat", or path = "/chat/*" for everything below"#;
            findings.push(Finding::error(format!("{route} has no `path`"), place, fix));
        }
        for (key, value) in table {
            // `pool.mode = ...`, or [route.pool] below: to TOML both are a table in a table.
            let prefix = format!("{}.", key.get_ref());
            let inner = value.get_ref().as_table().filter(|_| prefix == POOL);
            let pairs = match inner {
                Some(inner) => {
                    inner.iter().map(|(key, value)| (format!("{prefix}{}", key.get_ref()), key, value)).collect()
                }
                None => vec![(key.get_ref().to_string(), key, value)],
            };
            for (name, key, value) in pairs {
                if let Some(key) = known.iter().find(|key| **key == name) {
                    let name = Name { section: ROUTE, route: Some(index), key };
                    written.push(Written::in_file((path, text), name, value));
                } else {
                    let what = format!("unknown key `{name}` in {route}");
                    findings.push(Finding::error(
                        what,
                        Place::in_file(path, text, key.span()),
                        suggest_route_key(&name),
                    ));
                }
            }
        }
    }
}

impl Written {
    fn in_file((path, text): (&str, &str), name: Name, value: &Spanned<DeValue<'_>>) -> Self {
        let items = match value.get_ref() {
            DeValue::Array(items) => items.iter().map(|item| Place::in_file(path, text, item.span())).collect(),
            _ => Vec::new(),
        };
        let place = Place::in_file(path, text, value.span());
        Self { name, value: Value::from_toml(value.get_ref()), place, items }
    }
}

/// What a route is called in messages: its place in the file, from 1, and its path.
pub(super) fn named_route(index: usize, path: Option<&str>) -> String {
    let path: Option<String> = path.map(|path| path.chars().take(60).collect());
    format!("[[route]] {}{}", index + 1, path.map_or(String::new(), |path| format!(" ({path:?})")))
}

/// What is in the environment, in the order of its names.
///
/// Without a double underscore a variable is not for us: for a service that is called tidegate, Kubernetes itself puts
/// `TIDEGATE_SERVICE_HOST` and `TIDEGATE_PORT` into every pod.
fn read_environment(variables: &[(OsString, OsString)], written: &mut Vec<Written>, findings: &mut Vec<Finding>) {
    let mut variables: Vec<_> = variables.iter().map(|(name, value)| (name.to_string_lossy(), value)).collect();
    variables.sort();
    let names = keys::names();
    let variable = |(section, key): (&str, &str)| format!("{PREFIX}{}__{}", section.to_uppercase(), key.to_uppercase());
    for (name, value) in variables {
        let Some(rest) = name.strip_prefix(PREFIX).filter(|_| name != FILE_VARIABLE) else {
            continue;
        };
        let place = Place::Env { name: name.to_string(), value: value.to_string_lossy().into_owned() };
        if let Some((section, key)) = names.iter().find(|key| variable(**key) == name) {
            match value.to_str() {
                Some(text) => written.push(Written {
                    name: Name { section, route: None, key },
                    value: Value::Untyped(text.to_owned()),
                    place,
                    items: Vec::new(),
                }),
                None => {
                    findings.push(Finding::error(format!("`{section}.{key}` is not UTF-8"), place, "set it to UTF-8"));
                }
            }
        } else if let Some((section, key)) = rest.split_once("__") {
            let (section, key) = (section.to_lowercase(), key.to_lowercase());
            if section == ROUTE {
                let what = "routes can't be set in the environment".to_owned();
                findings.push(Finding::error(what, place, "write them into the file, as [[route]]"));
                continue;
            }
            let in_section =
                nearest(names.iter().map(|(section, _)| *section), &section).first().copied().unwrap_or(&section);
            let candidates = nearest(names.iter().filter(|(name, _)| *name == in_section).map(|(_, key)| *key), &key);
            let fix = match candidates.as_slice() {
                [] => match names.iter().find(|(_, name)| *name == key) {
                    Some(elsewhere) => format!("did you mean {}?", variable(*elsewhere)),
                    None => "`tidegate config --default` shows all sections and keys".to_owned(),
                },
                keys => {
                    let keys = keys.iter().map(|key| variable((in_section, key)));
                    format!("did you mean {}?", either(&keys.collect::<Vec<_>>()))
                }
            };
            let what = if names.contains(&(&section, &key)) {
                format!("`{section}.{key}` is not in upper case")
            } else {
                format!("unknown key `{section}.{key}`")
            };
            findings.push(Finding::error(what, place, fix));
        } else if let Some(key) =
            names.iter().find(|(section, key)| format!("{section}_{key}").eq_ignore_ascii_case(rest))
        {
            let what = "this has no effect: section and key need two underscores between them".to_owned();
            findings.push(Finding::warning(what, place, format!("write {}", variable(*key))));
        }
    }
}

/// The candidates that `name` probably meant: the nearest one, else those that contain it or are contained in it.
fn nearest<'a>(candidates: impl Iterator<Item = &'a str>, name: &str) -> Vec<&'a str> {
    let mut candidates: Vec<&str> = candidates.collect();
    candidates.dedup();
    let name = name.replace('-', "_").to_lowercase();
    let distance = |candidate: &&str| strsim::damerau_levenshtein(candidate, &name);
    match candidates.iter().copied().min_by_key(distance) {
        Some(best) if distance(&best) <= (name.chars().count() / 3).max(1) => vec![best],
        _ => candidates
            .into_iter()
            .filter(|candidate| name.len() > 2 && (candidate.contains(&name) || name.contains(candidate)))
            .collect(),
    }
}

/// The sections that have a key of this name, in brackets.
fn homes_of(key: &str) -> Vec<String> {
    keys::names().into_iter().filter(|(_, name)| *name == key).map(|(section, _)| format!("[{section}]")).collect()
}

fn suggest_section(name: &str) -> String {
    let mut sections: Vec<&str> = keys::names().into_iter().map(|(section, _)| section).collect();
    sections.dedup();
    let all = format!("the sections are [{}] and [[{ROUTE}]]", sections.join("], ["));
    sections.push(ROUTE);
    match nearest(sections.iter().copied(), name).as_slice() {
        [] => all,
        sections => {
            let sections = sections.iter().map(|section| match *section {
                ROUTE => format!("[[{section}]]"),
                _ => format!("[{section}]"),
            });
            format!("did you mean {}?", either(&sections.collect::<Vec<_>>()))
        }
    }
}

/// What to write instead of the unknown key `name` in `section`, which is known.
fn suggest_key(section: &str, name: &str) -> String {
    let names = keys::names();
    let own: Vec<&str> = names.iter().filter(|(of, _)| *of == section).map(|(_, key)| *key).collect();
    let near = nearest(own.iter().copied(), name);
    if !near.is_empty() {
        let near: Vec<String> = near.iter().map(|key| format!("`{key}`")).collect();
        return format!("did you mean {}?", either(&near));
    }
    let homes = homes_of(name);
    if !homes.is_empty() {
        return format!("`{name}` is a key of {}", homes.join(" and "));
    }
    if let Some((of, key)) =
        names.iter().find(|(_, key)| strsim::damerau_levenshtein(key, name) <= name.chars().count() / 3)
    {
        return format!("did you mean `{key}` in [{of}]?");
    }
    format!("the keys of [{section}] are `{}`", own.join("`, `"))
}

/// What to write instead of the unknown key `name` of a route.
fn suggest_route_key(name: &str) -> String {
    let own = Route::names();
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    // What they begin with would make all of the pool's look alike; and `mode` is `pool.mode`.
    let endings: Vec<String> = own.iter().map(|key| last(key)).collect();
    let near = nearest(endings.iter().map(String::as_str), &last(name));
    let near: Vec<&str> = own.iter().copied().filter(|key| near.contains(&last(key).as_str())).collect();
    if !near.is_empty() {
        let near: Vec<String> = near.iter().map(|key| format!("`{key}`")).collect();
        return format!("did you mean {}?", either(&near));
    }
    let homes = homes_of(&last(name));
    if !homes.is_empty() {
        return format!("`{}` is a key of {}, for all routes", last(name), homes.join(" and "));
    }
    format!("the keys of a route are `{}`", own.join("`, `"))
}

/// Reports the errors of TOML's parser, one per line: one mistake makes it stumble several times.
fn report_syntax(path: &str, text: &str, errors: Vec<toml::de::Error>, findings: &mut Vec<Finding>) {
    let mut lines = Vec::new();
    for error in errors {
        let mut span = error.span().unwrap_or_default();
        // What is missing at the end of a line is shown there, and not at the start of the next.
        while span.is_empty() && span.start > 0 && matches!(text.as_bytes().get(span.start - 1), Some(b'\n' | b'\r')) {
            span = span.start - 1..span.start - 1;
        }
        let (what, fix) = explain(error.message(), text.get(span.clone()).unwrap_or_default());
        let place = Place::in_file(path, text, span);
        let Place::Line { line, .. } = place else {
            continue;
        };
        if !lines.contains(&line) {
            lines.push(line);
            findings.push(Finding::error(what, place, fix));
        }
    }
}

/// An error of TOML's parser about the text `at`, in our words: what is wrong and what to do.
fn explain(message: &str, at: &str) -> (String, &'static str) {
    // The parser takes what is not there for a string without quotes.
    let message = if message.starts_with("string values must be quoted") && at.trim().is_empty() {
        "missing value"
    } else {
        message
    };
    let fixes = [
        ("duplicate key", "a section or key may stand only once: join them"),
        ("string values must be quoted", "put the value in double quotes"),
        ("invalid basic string", "begin and end the value with a double quote, on one line"),
        ("missing value", "write a value after the equals sign, or put a # before the line"),
        ("key with no value", "write `key = value`, or put a # before the line"),
        ("unclosed array", "end the list with ]"),
        ("unclosed table", "end the section's name with ]"),
        ("invalid unquoted key", "no key has such characters"),
        ("invalid float", "numbers are whole; put everything else in double quotes"),
        ("invalid integer", "put what is not a number in double quotes"),
        ("invalid date", "put the value in double quotes"),
    ];
    let fix = fixes.iter().find(|(start, _)| message.starts_with(start));
    let fix =
        fix.map_or("a line is `[section]`, `key = value` or `# comment`; strings need double quotes", |(_, fix)| fix);
    let message = message.trim_end_matches(", expected nothing").trim_end_matches(", expected literal string");
    (format!("not TOML: {message}"), fix)
}
