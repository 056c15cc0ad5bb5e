//! What another reading of the same sources changes: all that can be changed while it runs, or, with a mistake in it, nothing.
//!
//! Which keys can be is said in `keys.rs`, key by key. Nothing is applied here; that is the caller's.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{
    FileSource, Loaded, Plain, Route, Settings, Sources, Survey, checks,
    finding::{Finding, Findings, Level, Place},
    judge,
    keys::{self, BACKEND, Name, ROUTE},
    survey,
};

/// A key whose value is another one than what runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// `section.key`.
    pub key: String,
    /// What runs.
    pub from: Plain,
    /// What was written; `None`: nothing that could be understood.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<Plain>,
}

/// What was read, and nobody has judged yet.
#[derive(Debug)]
pub struct Read {
    sources: Sources,
    survey: Survey,
}

/// What is to run from now on.
#[derive(Debug)]
pub struct Reloaded {
    /// What was written, but for keys that take a restart: these are as they were.
    pub settings: Settings,
    /// The file that was read.
    pub file: Option<String>,
    /// What changes now.
    pub applied: Vec<Change>,
    /// What was written, and changes with a restart.
    pub restart_required: Vec<Change>,
    /// Warnings and notes.
    pub findings: Vec<Finding>,
    places: HashMap<Name, Place>,
}

/// Why everything stays as it is.
#[derive(Debug)]
pub struct Rejected {
    /// The file, if it could be read.
    pub file: Option<String>,
    /// What would have changed, and keys whose value can't be used.
    pub rejected: Vec<Change>,
    /// What is wrong.
    pub findings: Findings,
}

/// Reads; this may take as long as the disk does.
pub fn read(sources: &Sources) -> Read {
    Read { sources: sources.clone(), survey: survey(sources) }
}

/// What takes the place of a [`read`] of something that could be read once: it would be found empty, which is valid.
pub fn read_no_more(sources: &Sources, path: &Path) -> Read {
    let place = Place::File { path: path.display().to_string() };
    let what = "is no regular file: what was in it can't be read again";
    let mut survey = survey(&Sources { file: FileSource::Shipped, ..sources.clone() });
    survey.findings = vec![Finding::error(what, place, "name a file, or restart tidegate")];
    survey.is_complete = false;
    Read { sources: sources.clone(), survey }
}

/// What comes of a [`read`] next to `running`.
///
/// # Errors
///
/// Something is wrong with what was written, or with it next to what can't be changed without a restart.
pub fn reload(running: &Settings, read: Read) -> Result<Reloaded, Box<Rejected>> {
    let Read { sources, survey } = read;
    let mut settings = merge(running, &survey.settings);
    let (refused, file) = (survey.refused.clone(), survey.file.clone());
    // Of a file that could not be read nobody knows what it would have changed.
    let rejected = if survey.is_complete {
        let mut all: Vec<_> = changes(running, &survey.settings).into_iter().map(|(change, _)| change).collect();
        // What is wrong with a route is among the findings.
        for name in refused.iter().filter(|name| name.route.is_none()) {
            let key = format!("{}.{}", name.section, name.key);
            all.retain(|change| change.key != key);
            let entries = running.entries();
            let from = entries.into_iter().find(|entry| (entry.section, entry.key) == (name.section, name.key));
            all.extend(from.map(|entry| Change { key, from: entry.value, to: None }));
        }
        all
    } else {
        Vec::new()
    };
    let written = survey.settings.clone();
    let reject = |findings| Box::new(Rejected { file: file.clone(), rejected: rejected.clone(), findings });
    let Loaded { findings, file: _, origins, .. } = judge(&sources, survey).map_err(&reject)?;

    // Each alone is as it should be. Together they need not: a backend may be where this process still listens.
    let live: HashSet<_> = keys::keys(&mut settings).iter().filter(|key| key.is_live).map(|key| key.name).collect();
    let places: HashMap<_, _> = origins.into_iter().filter(|(name, _)| live.contains(name)).collect();
    let mut together = Vec::new();
    checks::check(&settings, &checks::Origins { written: &places, refused: &[] }, &mut together);
    together.retain(|finding| finding.level == Level::Error);
    if !together.is_empty() {
        for finding in &mut together {
            finding.fix.push_str("; or restart: until then some keys are as they were at the start");
        }
        return Err(reject(Findings(together)));
    }

    let (now, later): (Vec<_>, Vec<_>) = changes(running, &written).into_iter().partition(|(_, is_live)| *is_live);
    let [applied, restart_required] = [now, later].map(|all| all.into_iter().map(|(change, _)| change).collect());
    Ok(Reloaded { settings, file, applied, restart_required, findings, places })
}

impl Read {
    /// The file, if it could be read.
    pub fn file(&self) -> Option<&str> {
        self.survey.file.as_deref()
    }

    /// The files that it names, and that were read with it, good or not.
    pub fn named_files(&self) -> Vec<PathBuf> {
        self.survey.settings.named_files()
    }
}

impl Reloaded {
    /// Where a key was written.
    pub fn place(&self, section: &'static str, key: &'static str) -> Place {
        self.places.get(&Name { section, route: None, key }).cloned().unwrap_or(Place::Default)
    }
}

impl Rejected {
    /// Good as a file, and still not to be used here.
    pub fn of(reloaded: Reloaded, finding: Finding) -> Self {
        let Reloaded { file, mut applied, restart_required, .. } = reloaded;
        applied.extend(restart_required);
        Self { file, rejected: applied, findings: Findings(vec![finding]) }
    }
}

/// `written`, with all that takes a restart as it is in `running`.
fn merge(running: &Settings, written: &Settings) -> Settings {
    let (mut running, mut merged) = (running.clone(), written.clone());
    for (from, mut to) in keys::keys(&mut running).into_iter().zip(keys::keys(&mut merged)) {
        if !from.is_live {
            to.slot.read(&from.slot.write().into()).expect("what was written by a key is read by the same key");
        }
    }
    merged.resolve();
    merged
}

/// Each with whether it can be applied while running.
fn changes(from: &Settings, to: &Settings) -> Vec<(Change, bool)> {
    let mut copy = to.clone();
    let is_live = keys::keys(&mut copy).into_iter().map(|key| key.is_live);
    let pairs = from.entries().into_iter().zip(to.entries()).zip(is_live).filter(|((from, to), _)| from != to);
    let changes = pairs.map(|((from, to), is_live)| {
        (Change { key: format!("{}.{}", from.section, from.key), from: from.value, to: Some(to.value) }, is_live)
    });
    let renewed = renewed_files(from, to).into_iter().chain(changes_of_routes(from, to));
    changes.chain(renewed.map(|change| (change, true))).collect()
}

/// Certificates, keys and tokens under the same names as before, with something else in them.
fn renewed_files(from: &Settings, to: &Settings) -> Vec<Change> {
    let (clients, backends) = (&to.downstream.tls, &to.upstream.tls);
    let (clients_before, backends_before) = (&from.downstream.tls, &from.upstream.tls);
    let of_clients = clients.server != clients_before.server && clients.files() == clients_before.files();
    let shows_the_same =
        matches!((&clients.server, &clients_before.server), (Some(now), Some(before)) if now.shows_the_same(before));
    let key_of_clients = if shows_the_same { "listen.tls_client_ca" } else { "listen.tls_certificate" };
    let of_backends = backends.client != backends_before.client && backends.files() == backends_before.files();
    let of_admin = to.admin.token != from.admin.token && to.admin.token_file == from.admin.token_file;
    [(key_of_clients, of_clients), ("upstream.tls", of_backends), ("admin.token_file", of_admin)]
        .into_iter()
        .filter(|(_, is_renewed)| *is_renewed)
        .map(|(key, _)| Change {
            key: key.to_owned(),
            from: Plain::Text("what was in its files".to_owned()),
            to: Some(Plain::Text("what is in them now".to_owned())),
        })
        .collect()
}

/// Routes are known by their paths: their order means nothing. One that is not there has an empty list for its backend.
fn changes_of_routes(from: &Settings, to: &Settings) -> Vec<Change> {
    let by_path = |settings: &Settings| -> BTreeMap<_, _> {
        settings.routes.iter().filter_map(|route| Some((route.path.as_ref()?.to_string(), route.clone()))).collect()
    };
    let (mut from_routes, to_routes) = (by_path(from), by_path(to));
    let mut changes = Vec::new();
    for (path, mut route) in to_routes {
        let before = from_routes.remove(&path);
        let is_new = before.is_none();
        let mut before = before.unwrap_or_else(|| {
            let mut route = Route::unresolved();
            route.resolve(&to.upstream, &to.sharing);
            route
        });
        for ((key, old, was_own), (_, new, is_own)) in before.keys().1.zip(route.keys().1) {
            let is_added = is_new && key == BACKEND;
            let from = if is_added { Plain::List(Vec::new()) } else { old.write() };
            // What it has from the sections that are for all is said of these.
            if from != new.write() && (is_added || *was_own || *is_own) {
                changes.push(Change { key: key_of(&path, key), from, to: Some(new.write()) });
            }
        }
    }
    for (path, mut route) in from_routes {
        let from = route.keys().1.next().map(|(_, slot, _)| slot.write());
        let none = Plain::List(Vec::new());
        changes.push(Change { key: key_of(&path, BACKEND), from: from.unwrap_or(none.clone()), to: Some(none) });
    }
    changes
}

/// As in TOML, if routes were called by their paths there.
fn key_of(path: &str, key: &str) -> String {
    format!("{ROUTE}.{}.{key}", Plain::Text(path.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{FileSource, keys::OVERRIDES},
        upstream,
    };

    fn of(name: &str) -> Read {
        let path = PathBuf::from(format!("tests/config/valid/{name}.toml"));
        let file = FileSource::Named { path, by: "--config" };
        read(&Sources { file, env: Vec::new(), listen: None, upstream: None })
    }

    /// Each key is on one side or the other, and stays there: what takes a restart is as it was, and all else as it was written.
    /// Method: two files that differ in every key.
    #[test]
    fn each_key_is_applied_or_takes_a_restart() {
        let (least, most) = (of("least").survey.settings, of("most"));
        let written = most.survey.settings.clone();
        let Reloaded { settings, applied, restart_required, findings, .. } = reload(&least, most).expect("valid");
        assert_eq!(findings, []);
        let all = least.entries().len();
        assert_eq!(applied.len() + restart_required.len(), all, "a key is the same in both files");
        let value_of = |settings: &Settings, key: &str| {
            let mut entries = settings.entries().into_iter();
            entries.find(|entry| format!("{}.{}", entry.section, entry.key) == key).expect("a key").value
        };
        for change in &applied {
            assert_eq!(value_of(&settings, &change.key), value_of(&written, &change.key), "{}", change.key);
        }
        for change in &restart_required {
            assert_eq!(value_of(&settings, &change.key), value_of(&least, &change.key), "{}", change.key);
        }
        let fixed: Vec<_> = restart_required.iter().map(|change| change.key.as_str()).collect();
        let expected = [
            "listen.address",
            "listen.backlog",
            "listen.max_sockets",
            "listen.accept_loops",
            "listen.workers",
            "listen.hand_off",
            "limits.max_connections",
            "limits.memory",
            "admin.address",
            "log.format",
        ];
        assert_eq!(fixed, expected);
        // What takes a restart is said again each time, and the rest is done.
        let again = reload(&settings, of("most")).expect("valid");
        assert_eq!((again.applied, again.restart_required), (Vec::new(), restart_required));
        assert_eq!(again.settings, settings);
    }

    /// What can't be changed yet counts, not what was written for it: else a backend could be this process itself.
    #[test]
    fn what_is_written_has_to_fit_what_runs() {
        let running = Settings::default();
        let mut read = of("empty");
        read.survey.settings.listen.address.set_port(8081);
        read.survey.settings.upstream.address =
            super::super::units::parse_backend("127.0.0.1:8080").expect("one").into();
        let rejected = reload(&running, read).expect_err("a loop");
        assert!(rejected.findings.to_string().contains("restart"), "{}", rejected.findings);
        let keys: Vec<_> = rejected.rejected.iter().map(|change| change.key.as_str()).collect();
        assert_eq!(keys, ["listen.address", "upstream.address"]);
    }

    /// Routes are known by their paths, wherever they stand in the file, and all of them is applied.
    #[test]
    fn what_changed_of_routes() {
        let running = of("routes").survey.settings;
        let mut read = of("routes");
        let routes = &mut read.survey.settings.routes;
        let of_pool = &mut routes[0];
        (of_pool.pool.prewarm, of_pool.pool.max_streams) = (5, 7);
        of_pool.own = [true; OVERRIDES];
        routes.remove(1);
        routes.reverse();
        let mut added = routes[0].clone();
        added.path = Some(upstream::Pattern::Exact("/new".to_owned()));
        routes.push(added);
        let Reloaded { settings, applied, restart_required, .. } = reload(&running, read).expect("valid");
        let said: Vec<_> = applied
            .iter()
            .map(|Change { key, from, to }| format!("{key}: {from} -> {}", to.as_ref().expect("understood")))
            .collect();
        let expected = [
            r#"route."/chat/*".pool.prewarm: 0 -> 5"#,
            r#"route."/chat/*".pool.max_streams: 64 -> 7"#,
            r#"route."/new".upstream: [] -> ["10.0.0.1:9000", "app:9000", "unix:/run/app.sock"]"#,
            r#"route."/chat".upstream: ["127.0.0.1:9001", "127.0.0.1:9002"] -> []"#,
        ];
        assert_eq!(said, expected);
        assert_eq!((restart_required, settings.routes.len()), (Vec::new(), 5));
        assert_eq!(changes(&settings, &settings), []);
    }
}
