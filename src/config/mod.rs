//! From `proxy.toml`, the environment and flags to settings that hold: checked, resolved, the same for everybody.
//!
//! Two stages. What is written: the values of all sources, each with its place. What is true: [`Settings`], with defaults
//! filled in, everything within its bounds, sensible together. What is wrong is reported all at once, each with its place and
//! the fix ([`Findings`]). Nothing outside of this directory knows TOML.
//!
//! Sources, later ones win: the file, `TIDEGATE_SECTION__KEY` in the environment, flags.

mod checks;
mod finding;
mod keys;
mod reload;
#[cfg(feature = "manual")]
mod schema;
mod units;
mod written;

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    fmt::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{
    Serialize,
    ser::{SerializeMap as _, Serializer},
};

use self::keys::{Name, OVERRIDES, PATH, POOL, ROUTE};
#[cfg(feature = "manual")]
pub use self::schema::schema;
pub use self::{
    finding::{Finding, Findings, Level, Place},
    reload::{Change, Read, Rejected, Reloaded, read, read_no_more, reload},
    written::Seen,
};
use crate::{
    admission, close, downstream, drain, hub, listen,
    net::SocketConfig,
    relay,
    token::{BadToken, Token},
    upstream::{self, Addresses, Mode, Pattern, Pool, Rules},
};

/// The `proxy.toml` that comes with the program: every key with its default and its explanation.
pub const SHIPPED: &str = include_str!("../../proxy.toml");

/// What is true: every value is within its bounds, and they fit together.
///
/// The default is what an empty file gives. Serialized, it has the sections, keys and values of `proxy.toml`.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// `[listen]`, without `keepalive`.
    pub listen: listen::Config,
    /// `[limits]`.
    pub limits: admission::Config,
    /// `[http]`.
    pub downstream: downstream::Config,
    /// `[upstream]`, `[pool]`, `http.header_bytes` and `websocket.write_timeout`.
    pub upstream: upstream::Config,
    /// Of `[pool]`, how WebSockets are shared where they are.
    pub sharing: hub::Config,
    /// `[websocket]` without the buffers, and the delay, the handshake and the codes of `[close]`.
    pub relay: relay::Config,
    /// The lingers of `[close]`.
    pub close: close::Config,
    /// `[drain]`.
    pub drain: drain::Config,
    /// `[admin]`.
    pub admin: Admin,
    /// `[reload]`.
    pub reload: Reload,
    pub grace: Grace,
    /// `listen.keepalive` and the buffers of `[websocket]`.
    pub socket: SocketConfig,
    /// `[log]`.
    pub log: Log,
    /// Each `[[route]]`, in the order of the file, which says nothing.
    pub routes: Vec<Route>,
}

/// A `[[route]]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// The paths that it is for. `None` only as long as there are errors.
    path: Option<Pattern>,
    /// Its backend.
    address: Addresses,
    /// How connections to that are used.
    pool: Pool,
    /// How WebSockets to it are shared, if they are.
    sharing: hub::Config,
    /// Whom it is for.
    rules: Rules,
    /// What it has of its own, in the order of its keys.
    own: [bool; OVERRIDES],
}

/// `[admin]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admin {
    /// Where it listens; port 0 means any free one.
    pub address: Option<std::net::SocketAddr>,
    /// Where the token is by which others than this host may change something; empty: nobody else may.
    pub token_file: String,
    /// What was in it.
    pub token: Option<Token>,
}

/// What `[drain]` has to fit into: only `checks.rs` uses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grace {
    /// From SIGTERM, or the hooks before it, to SIGKILL; `None`: not known.
    pub period: Option<Duration>,
    /// What the backend takes to stop when its clients are gone.
    pub backend_stop: Duration,
}

/// `[reload]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reload {
    /// How often it is looked whether the file has changed; `None`: never.
    pub watch: Option<Duration>,
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// How lines look.
    pub format: LogFormat,
    /// Levels of modules: what `tracing_subscriber::filter::Targets` reads.
    pub filter: String,
    /// Of so many sessions one has its lines; 0: none.
    pub sample: u32,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, else JSON.
    Auto,
    /// One JSON object per line.
    Json,
    /// For people.
    Text,
}

/// Where settings come from.
#[derive(Debug, Clone)]
pub struct Sources {
    /// The file.
    pub file: FileSource,
    /// The environment; only names that begin with `TIDEGATE_` are looked at.
    pub env: Vec<(OsString, OsString)>,
    /// `--listen`, over `listen.address`.
    pub listen: Option<String>,
    /// `--upstream`, over `upstream.address`.
    pub upstream: Option<String>,
}

/// Which file is read.
#[derive(Debug, Clone)]
pub enum FileSource {
    /// This one. That it is missing is an error.
    Named {
        /// The file.
        path: PathBuf,
        /// Who named it: `--config`, or the environment variable.
        by: &'static str,
    },
    /// The first of these that exists. That there is none is worth a note.
    Search(Vec<PathBuf>),
    /// [`SHIPPED`].
    Shipped,
}

/// Settings, and how they came about.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// What is true.
    pub settings: Settings,
    /// The file that was read, as it was named.
    pub file: Option<String>,
    /// Warnings and notes, warnings first.
    pub findings: Vec<Finding>,
    /// Where each key was written last; those not in it have their defaults.
    origins: HashMap<Name, Place>,
}

/// A key and its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its section.
    pub section: &'static str,
    /// Its name in there.
    pub key: &'static str,
    /// As it would be written in a file.
    pub value: Plain,
}

/// A value as it would be written: durations, sizes and addresses are texts. Displayed, it is TOML.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Plain {
    /// A string.
    Text(String),
    /// A number.
    Integer(u64),
    /// `true` or `false`.
    Switch(bool),
    /// A list of strings.
    List(Vec<String>),
}

impl FileSource {
    /// How it looks now, together with `named`: whether they are others than at another time. They are found anew, so also behind
    /// symlinks that were swapped, as in a `ConfigMap` or `Secret` of Kubernetes.
    pub fn look(&self, named: &[PathBuf]) -> Seen {
        written::look(self, named)
    }
}

impl Sources {
    /// As a process finds them: `config`, else `$TIDEGATE_CONFIG`, else `./proxy.toml`, else `/etc/tidegate/proxy.toml`.
    ///
    /// An empty `$TIDEGATE_CONFIG` counts as unset, since many a template can only empty a variable.
    pub fn from_process(config: Option<PathBuf>, listen: Option<String>, upstream: Option<String>) -> Self {
        let named = config.map(|path| (path, "--config")).or_else(|| {
            let path = std::env::var_os(written::FILE_VARIABLE).filter(|path| !path.is_empty())?;
            Some((PathBuf::from(path), written::FILE_VARIABLE))
        });
        let file = match named {
            Some((path, by)) => FileSource::Named { path, by },
            None => FileSource::Search(vec![PathBuf::from("proxy.toml"), PathBuf::from("/etc/tidegate/proxy.toml")]),
        };
        Self { file, env: std::env::vars_os().collect(), listen, upstream }
    }
}

/// Reads, checks and resolves. The same sources may be loaded again, for a reload.
///
/// Without any file the defaults are run on, under the environment and flags. This is deliberate: a sidecar's backend is on
/// the same host, and an image needs no file then. A note says so, unless both addresses were given as flags.
///
/// # Errors
///
/// Everything that is wrong, together with the warnings there would have been.
pub fn load(sources: &Sources) -> Result<Loaded, Findings> {
    judge(sources, survey(sources))
}

/// What all sources come to, good or not.
#[derive(Debug)]
struct Survey {
    settings: Settings,
    file: Option<String>,
    /// Errors and warnings.
    findings: Vec<Finding>,
    origins: HashMap<Name, Place>,
    /// Keys whose value could not be used.
    refused: Vec<Name>,
    /// The file could be read.
    is_complete: bool,
}

/// For who needs one of the settings, whatever is wrong with the others: a key that could not be used has its default.
pub fn as_far_as_it_is_good(sources: &Sources) -> Settings {
    survey(sources).settings
}

fn survey(sources: &Sources) -> Survey {
    let mut findings = Vec::new();
    let written::Everything { written, routes, file, complete } = written::read(sources, &mut findings);

    let mut settings = Settings::unresolved();
    settings.routes = routes.iter().map(|_| Route::unresolved()).collect();
    let mut origins = HashMap::new();
    let mut refused = Vec::new();
    let paths: HashMap<_, _> = written
        .iter()
        .filter(|written| written.name.key == PATH)
        .filter_map(|written| Some((written.name.route?, written.value.text("", "").ok()?.to_owned())))
        .collect();
    let mut keys: HashMap<_, _> = keys::keys(&mut settings).into_iter().map(|key| (key.name, key)).collect();
    for written in written {
        let name = written.name;
        let key = keys.get_mut(&name).expect("only known keys are in what was written");
        match key.slot.read(&written.value.typed(&key.slot)) {
            Ok(()) => {
                origins.insert(name, written.place);
                if let Some(is_own) = &mut key.is_own {
                    **is_own = true;
                }
            }
            Err(refusal) => {
                refused.push(name);
                let key = match name.route {
                    Some(route) => {
                        let path = paths.get(&route).filter(|_| name.key != PATH);
                        format!("`{}` of {}", name.key, written::named_route(route, path.map(String::as_str)))
                    }
                    None => format!("`{}.{}`", name.section, name.key),
                };
                let item = refusal.item.and_then(|item| written.items.get(item).cloned());
                let place = item.unwrap_or(written.place);
                findings.push(Finding::error(format!("{key} {}", refusal.what), place, refusal.fix));
            }
        }
    }
    drop(keys);

    // A frame is part of a message. Whoever lowers the limit of messages need not know that there is one of frames as well.
    if !origins.contains_key(&checks::MAX_FRAME) {
        settings.relay.max_frame = settings.relay.max_frame.min(settings.relay.max_message);
    }
    settings.resolve();
    if complete {
        let origins = checks::Origins { written: &origins, refused: &refused };
        checks::load_certificates(&mut settings, &origins, &mut findings);
        checks::load_token(&mut settings, &origins, &mut findings);
        checks::check(&settings, &origins, &mut findings);
    }
    Survey { settings, file, findings, origins, refused, is_complete: complete }
}

fn judge(sources: &Sources, survey: Survey) -> Result<Loaded, Findings> {
    let Survey { settings, file, mut findings, origins, .. } = survey;
    if findings.iter().any(|finding| finding.level == Level::Error) {
        findings.sort_by(|a, b| (a.level, &a.place).cmp(&(b.level, &b.place)));
        return Err(Findings(findings));
    }

    if let (FileSource::Search(paths), None) = (&sources.file, &file)
        && (sources.listen.is_none() || sources.upstream.is_none())
    {
        let paths: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
        findings.push(Finding {
            level: Level::Note,
            what: format!(
                "no configuration file found, so its defaults are used: {} -> {}",
                settings.listen.address, settings.upstream.address
            ),
            place: Place::Default,
            fix: format!(
                "looked for {}; `tidegate config --default > proxy.toml` writes one to start from",
                paths.join(" and ")
            ),
        });
    }

    findings.sort_by(|a, b| (a.level, &a.place).cmp(&(b.level, &b.place)));
    Ok(Loaded { settings, file, findings, origins })
}

impl Default for Settings {
    fn default() -> Self {
        let mut settings = Self::unresolved();
        settings.resolve();
        settings
    }
}

impl Settings {
    /// Computes what follows from other settings, or from the host.
    fn resolve(&mut self) {
        if self.listen.workers == 0 {
            // Two so that one busy worker does not stop accepting, four since a sidecar is a guest beside its backend.
            let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
            self.listen.workers = cores.clamp(2, 4);
        }
        self.upstream.header_bytes = self.downstream.header_bytes;
        self.upstream.write_timeout = self.relay.write_timeout;
        for route in &mut self.routes {
            route.resolve(&self.upstream, &self.sharing);
        }
        // TCP_USER_TIMEOUT also ends a live peer that only keeps its window at zero, and it ends it with a reset. So it must
        // never be first: all our own deadlines, one after the other, have ended such a socket in order before. It remains for
        // peers that are no longer there. The 15 s cover what the kernel adds by probing in growing intervals. At
        // most this is a bit over three days, which fits the kernel's 32 bits of milliseconds.
        self.socket.user_timeout = Some(
            self.relay.write_timeout
                + self.relay.close_handshake_timeout
                + self.close.patience.linger_max
                + Duration::from_secs(15),
        );
    }

    /// All keys with their values, in the order of `proxy.toml`; without routes.
    pub fn entries(&self) -> Vec<Entry> {
        self.named().into_iter().filter(|(name, _)| name.route.is_none()).map(|(_, entry)| entry).collect()
    }

    /// Also of each route what it has of its own.
    fn named(&self) -> Vec<(Name, Entry)> {
        let mut copy = self.clone(); // keys() is one list for reading and writing, so it wants to be able to write
        keys::keys(&mut copy)
            .into_iter()
            .filter(|key| key.is_own.as_deref() != Some(&false))
            .map(|key| (key.name, Entry { section: key.name.section, key: key.name.key, value: key.slot.write() }))
            .collect()
    }

    /// The files that are named, and read with them.
    fn named_files(&self) -> Vec<PathBuf> {
        let token = Some(&self.admin.token_file).filter(|path| !path.is_empty()).map(PathBuf::from);
        [self.upstream.tls.files(), self.downstream.tls.files(), token.into_iter().collect()].concat()
    }

    /// Each route's paths and its way to its backend.
    pub fn ways(&self) -> impl Iterator<Item = (Pattern, upstream::Config)> {
        self.routes.iter().filter_map(|Route { path, address, pool, rules, .. }| {
            let (address, pool, rules) = (address.clone(), pool.clone(), rules.clone());
            let config = upstream::Config { address, pool, rules, ..self.upstream.clone() };
            Some((path.clone()?, config))
        })
    }

    /// How clients of each route share a WebSocket where they do, by its path.
    pub fn sharing(&self) -> impl Iterator<Item = (String, hub::Config)> {
        let shared = self.routes.iter().filter(|route| route.pool.mode == Mode::Shared);
        shared.filter_map(|Route { path, sharing, .. }| Some((path.as_ref()?.to_string(), sharing.clone())))
    }

    /// A `proxy.toml` that reads back to the same settings, as far as durations are whole milliseconds.
    pub fn to_toml(&self) -> String {
        write_toml(self, &|_| None)
    }

    /// The defaults as `proxy.toml` has them, `workers = 0` included, for [`Serialize`].
    pub fn shipped() -> Self {
        Self::unresolved()
    }

    /// What a log line at the start should say: both addresses, the workers, and whatever is not the default.
    pub fn summary(&self) -> String {
        let defaults = Self::default().entries();
        let routes = self.routes.len();
        let always = [("listen", "address"), ("listen", "workers"), ("upstream", "address"), ("admin", "address")];
        let mut line = String::new();
        for (entry, default) in self.entries().into_iter().zip(defaults) {
            if entry != default || always.contains(&(entry.section, entry.key)) {
                let space = if line.is_empty() { "" } else { " " };
                write!(line, "{space}{}.{}={}", entry.section, entry.key, entry.value)
                    .expect("a String takes everything");
            }
        }
        if routes > 0 {
            write!(line, " routes={routes}").expect("a String takes everything");
        }
        line
    }
}

impl Admin {
    fn read_token(&self) -> Result<Option<Token>, BadToken> {
        if self.token_file.is_empty() { Ok(None) } else { Token::read(Path::new(&self.token_file)).map(Some) }
    }
}

impl Loaded {
    /// The files that it names, and that were read with it, as they are there.
    pub fn named_files(&self) -> Vec<PathBuf> {
        self.settings.named_files()
    }

    /// What was in these is still there. To be asked after a look at them, so that none that was replaced since is missed.
    pub fn is_as_named_files_are(&self) -> bool {
        let (upstream, downstream) = (&self.settings.upstream.tls, &self.settings.downstream.tls);
        let (mut to_backends, mut to_clients) = (upstream.clone(), downstream.clone());
        let is_read = to_backends.load().is_ok() && to_clients.load().is_ok();
        let is_token = self.settings.admin.read_token().is_ok_and(|token| token == self.settings.admin.token);
        is_read && is_token && to_backends == *upstream && to_clients == *downstream
    }

    /// Like [`Settings::to_toml`], with a comment at each value that is not a default: where it was written.
    pub fn to_toml(&self) -> String {
        write_toml(&self.settings, &|name| self.origins.get(&name).map(ToString::to_string))
    }
}

fn write_toml(settings: &Settings, comment: &dyn Fn(Name) -> Option<String>) -> String {
    let mut text = String::new();
    let mut section = None;
    for (name, entry) in settings.named() {
        if section.replace((name.section, name.route)) != Some((name.section, name.route)) {
            let newline = if text.is_empty() { "" } else { "\n" };
            let title = if name.route.is_some() { format!("[[{ROUTE}]]") } else { format!("[{}]", name.section) };
            writeln!(text, "{newline}{title}").expect("a String takes everything");
        }
        let comment = comment(name)
            .map_or(String::new(), |comment| format!(" # {}", comment.replace(char::is_control, "\u{fffd}")));
        writeln!(text, "{} = {}{comment}", entry.key, entry.value).expect("a String takes everything");
    }
    text
}

impl Serialize for Settings {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        /// The keys of one section.
        struct Section<'a>(&'a [Entry]);
        impl Serialize for Section<'_> {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_map(self.0.iter().map(|entry| (entry.key, &entry.value)))
            }
        }
        /// What a route has of its own; `pool.mode` is a key in a table, as in TOML.
        struct Own<'a>(&'a [(Name, Entry)]);
        impl Serialize for Own<'_> {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                let mut map = serializer.serialize_map(None)?;
                let mut pool = BTreeMap::new();
                for (_, Entry { key, value, .. }) in self.0 {
                    match key.strip_prefix(POOL) {
                        Some(key) => _ = pool.insert(key, value),
                        None => map.serialize_entry(key, value)?,
                    }
                }
                if !pool.is_empty() {
                    map.serialize_entry("pool", &pool)?;
                }
                map.end()
            }
        }
        let entries = self.entries();
        let mut map = serializer.serialize_map(None)?;
        for section in entries.chunk_by(|a, b| a.section == b.section) {
            map.serialize_entry(section[0].section, &Section(section))?;
        }
        if !self.routes.is_empty() {
            let mut named = self.named();
            named.retain(|(name, _)| name.route.is_some());
            let routes: Vec<_> = named.chunk_by(|(a, _), (b, _)| a.route == b.route).map(Own).collect();
            map.serialize_entry(ROUTE, &routes)?;
        }
        map.end()
    }
}

impl LogFormat {
    const ALL: [Self; 3] = [Self::Auto, Self::Json, Self::Text];

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Json => "json",
            Self::Text => "text",
        }
    }
}

impl fmt::Display for Plain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => write!(f, "{}", toml::Value::String(text.clone())),
            Self::Integer(integer) => write!(f, "{integer}"),
            Self::Switch(on) => write!(f, "{on}"),
            Self::List(items) => {
                let items: Vec<toml::Value> = items.iter().map(|item| toml::Value::String(item.clone())).collect();
                write!(f, "{}", toml::Value::Array(items))
            }
        }
    }
}
