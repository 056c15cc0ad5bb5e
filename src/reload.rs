//! The configuration, read again while it runs: who asks for that, the reading, and what is done about it.
//!
//! It is asked for by SIGHUP, at the admin listener, or by a file that is not as it was when it was read: its own, or a certificate or key that it names. No session is cut, whatever
//! has changed: sessions, and handshakes that have begun, keep what they began with; what begins later has the new. What is
//! counted or limited over all of them stays the same object. When the listeners are about to close it is too late.
//!
//! Not here: which keys can be changed (`config/keys.rs`), and what is wrong with a file (`config/`).

use std::{
    fmt, fs, future, io,
    path::PathBuf,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::Duration,
};

use http::StatusCode;
use serde::Serialize;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, oneshot, watch},
};
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::{
    admin,
    admission::connection_bytes,
    close,
    config::{self, Change, FileSource, Finding, Findings, Level, Loaded, Place, Rejected, Seen, Settings, Sources},
    metrics::ReloadResult,
    net::{self, Listener},
    relay,
    session::Context,
    slots,
    upstream::{Home, Upstreams},
};

/// Those that may wait for the reading; as many as may ask at the admin listener, and one signal.
const MAX_ASKING: usize = 256;

/// What can be done to the log while it is written.
pub trait Log: fmt::Debug + Send + Sync {
    /// Replaces its filter, or says what is wrong with the new one.
    fn set_filter(&self, filter: &str) -> Result<(), String>;

    /// Lines that were dropped since whoever reads them was too slow, or gone.
    fn dropped(&self) -> u64;
}

/// Where the configuration comes from, and how its file looked before it was read, with the files that it names.
#[derive(Debug)]
pub struct Source {
    sources: Sources,
    named: Vec<PathBuf>,
    /// `None`: not as it was read.
    seen: Option<Seen>,
    /// A pipe, perhaps of a shell's `<(...)`.
    once: Option<PathBuf>,
}

impl Source {
    /// To be made before the first reading: what changes while that goes on is then found by the first look.
    pub fn new(sources: Sources) -> Self {
        let seen = Some(sources.file.look(&[]));
        let once = match &sources.file {
            FileSource::Named { path, .. } => fs::metadata(path).is_ok_and(|it| !it.is_file()).then(|| path.clone()),
            _ => None,
        };
        Self { sources, named: Vec::new(), seen, once }
    }

    /// What came of the first reading.
    pub fn was_read(&mut self, loaded: &Loaded) {
        self.keep_to(loaded.file.as_deref());
        self.named = loaded.named_files();
        if !self.named.is_empty() {
            // The file as it was before, those that it names as they are now.
            let before = self.seen.take();
            let is_same = before == Some(self.sources.file.look(&[]));
            let seen = self.look();
            self.seen = Some(seen).filter(|_| is_same && loaded.is_as_named_files_are());
        }
    }

    fn look(&self) -> Seen {
        self.sources.file.look(&self.named)
    }

    /// A file that was read once is looked for in no other place. Where it is gone for a moment, as in some ways to replace it,
    /// the defaults must not take its place.
    fn keep_to(&mut self, file: Option<&str>) {
        if let (FileSource::Search(_), Some(file)) = (&self.sources.file, file) {
            self.sources.file = FileSource::Named { path: PathBuf::from(file), by: "its last reading" };
        }
    }
}

/// Who asked.
#[derive(Debug)]
enum By {
    Signal,
    Admin(oneshot::Sender<admin::Reloaded>),
    Change,
}

impl By {
    fn as_str(&self) -> &'static str {
        match self {
            Self::Signal => "SIGHUP",
            Self::Admin(_) => "POST /reload",
            Self::Change => "a change of a file",
        }
    }
}

#[derive(Debug)]
enum Ask {
    Read(By),
    /// `reload.watch` has changed.
    Wake,
}

/// What was read, and for whom.
#[derive(Debug)]
pub struct Done {
    by: By,
    read: config::Read,
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// SIGHUP.
    HangUp,
    /// The configuration was read.
    Read(Box<Done>),
}

/// The way to the thread that reads, and looks at the file. A disk that does not answer keeps that thread waiting, and nobody
/// else.
#[derive(Debug)]
pub struct Reader {
    hang_up: Signal,
    ask: SyncSender<Ask>,
    done: mpsc::Receiver<Done>,
    /// `reload.watch` in milliseconds; 0: off.
    watch: Arc<AtomicU64>,
    /// What was read is no file that could be read again.
    is_once: bool,
}

impl Reader {
    /// From now on SIGHUP does not end the process. To be called on the runtime of the main thread.
    pub fn start(source: Source, settings: &Settings) -> io::Result<Self> {
        let hang_up = signal(SignalKind::hangup())?;
        let (ask, asked) = sync_channel(MAX_ASKING);
        let (read, done) = mpsc::channel(1);
        let watch = Arc::new(AtomicU64::new(millis(settings.reload.watch)));
        let (every, is_once) = (Arc::clone(&watch), source.once.is_some());
        // It ends with the process, or when nobody is there to ask it.
        thread::Builder::new().name("config".to_owned()).spawn(move || serve(source, &asked, &every, &read))?;
        Ok(Self { hang_up, ask, done, watch, is_once })
    }
}

fn millis(watch: Option<Duration>) -> u64 {
    u64::try_from(watch.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

/// Reads when asked, and when the file is not as it was read, but as it was at the last look: in the middle of being
/// written it may look like a whole one that says less.
fn serve(mut source: Source, asked: &Receiver<Ask>, watch: &AtomicU64, read: &mpsc::Sender<Done>) {
    let mut last = source.look();
    loop {
        let ask = match watch.load(Ordering::Relaxed) {
            0 => asked.recv().map_err(|_| RecvTimeoutError::Disconnected),
            every => asked.recv_timeout(Duration::from_millis(every)),
        };
        let by = match ask {
            Ok(Ask::Read(by)) => by,
            Ok(Ask::Wake) => continue,
            Err(RecvTimeoutError::Timeout) => By::Change,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let before = std::mem::replace(&mut last, source.look());
        let is_look = matches!(by, By::Change);
        if is_look && (source.seen.as_ref() == Some(&last) || last != before) {
            continue;
        }
        let read_now = || match &source.once {
            Some(path) => config::read_no_more(&source.sources, path),
            None => config::read(&source.sources),
        };
        let mut survey = read_now();
        if survey.named_files() != source.named {
            // They are looked at before they are read.
            last = source.sources.file.look(&survey.named_files());
            survey = read_now();
        }
        source.named = survey.named_files();
        // Written to in this very moment: by the next look it will have been another change.
        if is_look && last != source.look() {
            continue;
        }
        source.seen = Some(last.clone());
        source.keep_to(survey.file());
        if read.blocking_send(Done { by, read: survey }).is_err() {
            return;
        }
    }
}

/// What a reload changes, and what it is changed to.
#[derive(Debug)]
pub struct Reload {
    /// What runs.
    settings: Settings,
    parts: Parts,
    /// `None`: the process has none of its own.
    log: Option<Arc<dyn Log>>,
    /// `None`: nothing is read again.
    reader: Option<Reader>,
}

/// Where settings are in use.
#[derive(Debug)]
pub struct Parts {
    /// One of each worker, one at least.
    pub contexts: Vec<Arc<Context>>,
    /// Where each of them is.
    pub homes: Arc<[Home]>,
    /// All that clients connect to.
    pub listeners: Vec<Weak<Listener>>,
    /// Of sockets in their last wait.
    pub bounds: Arc<close::Bounds>,
    /// What the admin listener uses.
    pub admin: watch::Sender<admin::Parts>,
    /// Ephemeral ports of one address, if that is known.
    pub ports: Option<u64>,
    /// The most handshakes that may be carried on without their client, whatever `upstream.max_pending` is.
    pub most_orphans: usize,
    /// For what outlives a reload.
    pub tracker: TaskTracker,
}

/// What is said about it.
#[derive(Debug, Default, Serialize)]
struct Report {
    result: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<String>,
    applied: Vec<Change>,
    restart_required: Vec<Change>,
    rejected: Vec<Change>,
    findings: Vec<Said>,
}

/// A finding.
#[derive(Debug, Serialize)]
struct Said {
    level: String,
    place: String,
    what: String,
    fix: String,
    /// As `tidegate check` prints it.
    text: String,
}

impl From<&Finding> for Said {
    fn from(finding: &Finding) -> Self {
        let Finding { level, what, place, fix } = finding;
        let (level, place, text) = (level.to_string(), place.to_string(), finding.to_string());
        Self { level, place, what: what.clone(), fix: fix.clone(), text }
    }
}

impl Reload {
    /// Of a process that runs with these settings.
    pub fn new(settings: Settings, parts: Parts) -> Self {
        Self { settings, parts, log: None, reader: None }
    }

    /// From now on it can be asked for.
    pub fn read_by(&mut self, reader: Reader) {
        self.reader = Some(reader);
    }

    /// The log, whose filter can be replaced from now on.
    pub fn logs_to(&mut self, log: Arc<dyn Log>) {
        self.log = Some(log);
    }

    /// Until `log.filter` is changed; an error says what is wrong with it.
    pub fn set_filter(&self, filter: &str) -> Result<(), String> {
        self.log.as_ref().map_or(Err("there is no log".to_owned()), |log| log.set_filter(filter))
    }

    /// What runs.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Its configuration is from where nobody can read it a second time, also no other process.
    pub fn is_read_once(&self) -> bool {
        self.reader.as_ref().is_some_and(|reader| reader.is_once)
    }

    /// The next thing that happens. Nothing is lost when it is not waited for.
    pub async fn next(&mut self) -> Event {
        let Some(reader) = &mut self.reader else { return future::pending().await };
        tokio::select! {
            Some(()) = reader.hang_up.recv() => Event::HangUp,
            Some(done) = reader.done.recv() => Event::Read(Box::new(done)),
            else => future::pending().await,
        }
    }

    /// Somebody at the admin listener wants it.
    pub fn ask(&self, told: oneshot::Sender<admin::Reloaded>, is_ending: bool) {
        self.ask_by(By::Admin(told), is_ending);
    }

    fn ask_by(&self, by: By, is_ending: bool) {
        let Some(reader) = &self.reader else { return self.refuse(by, "there is no file to read again") };
        if is_ending {
            return self.refuse(by, ENDING);
        }
        if let Err(TrySendError::Full(Ask::Read(by)) | TrySendError::Disconnected(Ask::Read(by))) =
            reader.ask.try_send(Ask::Read(by))
        {
            self.refuse(by, "the file is still being read");
        }
    }

    /// Goes on with what happened; true: other settings than before may be in force. `is_ending`: nobody will be served any
    /// more, so there is nothing that a reload could change.
    pub fn go_on(&mut self, event: Event, is_ending: bool) -> bool {
        let Done { by, read } = match event {
            Event::HangUp => {
                info!("SIGHUP");
                self.ask_by(By::Signal, is_ending);
                return false;
            }
            Event::Read(done) => *done,
        };
        if is_ending {
            self.refuse(by, ENDING);
            return false;
        }
        let reloaded = config::reload(&self.settings, read).and_then(|reloaded| {
            // Bound once, which can't be seen from the file alone.
            match net::check_sources(&reloaded.settings.upstream.source_addresses) {
                Ok(()) => Ok(reloaded),
                Err(error) => {
                    let (level, place) = (Level::Error, reloaded.place("upstream", "source_addresses"));
                    let fix = "name addresses of this host".to_owned();
                    let finding = Finding { level, what: error.to_string(), place, fix };
                    Err(Box::new(Rejected::of(reloaded, finding)))
                }
            }
        });
        match reloaded {
            Ok(config::Reloaded { settings, file, applied, restart_required, findings, .. }) => {
                self.apply(settings);
                // Only now: whoever reads it may count on it.
                info!(
                    by = by.as_str(),
                    file,
                    applied = list(&applied),
                    restart_required = list(&restart_required),
                    "reloaded"
                );
                for finding in findings.iter().filter(|finding| finding.level < Level::Note) {
                    warn!(finding = finding.line(), "reloaded");
                }
                self.metrics().reload(ReloadResult::Applied);
                self.metrics().restart_required.set(i64::try_from(restart_required.len()).unwrap_or(i64::MAX));
                let findings = findings.iter().map(Said::from).collect();
                let result = ReloadResult::Applied.as_str();
                let report = Report { result, file, applied, restart_required, findings, ..Report::default() };
                by.tell(StatusCode::OK, &report);
                true
            }
            Err(rejected) => {
                let Rejected { file, rejected, findings: Findings(findings) } = *rejected;
                for finding in &findings {
                    warn!(finding = finding.line(), "reload");
                }
                warn!(
                    by = by.as_str(),
                    file,
                    rejected = list(&rejected),
                    findings = findings.len(),
                    "the reload is rejected: everything stays as it is"
                );
                self.metrics().reload(ReloadResult::Rejected);
                let findings = findings.iter().map(Said::from).collect();
                let result = ReloadResult::Rejected.as_str();
                let report = Report { result, file, rejected, findings, ..Report::default() };
                by.tell(StatusCode::UNPROCESSABLE_ENTITY, &report);
                false
            }
        }
    }

    fn refuse(&self, by: By, why: &'static str) {
        warn!(by = by.as_str(), why, "no reload");
        self.metrics().reload(ReloadResult::Refused);
        let what = why.to_owned();
        let finding =
            Finding { level: Level::Error, what, place: Place::Default, fix: "ask again, or restart".to_owned() };
        let result = ReloadResult::Refused.as_str();
        by.tell(StatusCode::CONFLICT, &Report { result, findings: vec![Said::from(&finding)], ..Report::default() });
    }

    /// Puts new settings in the place of the old ones, each where it is in use.
    fn apply(&mut self, new: Settings) {
        let Self { settings: old, parts, log, reader } = self;
        let Parts { contexts, homes, listeners, bounds, admin, ports, most_orphans, tracker } = parts;
        let first = contexts.first().expect("there is a worker").latest();
        let is_same = new.upstream == old.upstream && new.ways().eq(old.ways()) && new.socket == old.socket;
        let is_shared_alike = new.sharing().eq(old.sharing());
        let upstreams = if is_same {
            first.upstreams.clone()
        } else {
            first.upstreams.reconfigured(new.upstream.clone(), new.ways(), &new.socket, *ports, tracker)
        };
        for (slots, from, to) in [
            (&first.handshakes, old.upstream.max_waiting, new.upstream.max_waiting),
            (&first.requests, old.upstream.max_waiting, new.upstream.max_waiting),
            (&first.orphans, old.upstream.max_pending.min(*most_orphans), new.upstream.max_pending.min(*most_orphans)),
        ] {
            slots::resize(slots, from, to, tracker);
        }
        if new.socket != old.socket {
            for listener in listeners.iter().filter_map(Weak::upgrade) {
                if let Err(error) = listener.reconfigure(&new.socket) {
                    warn!(%error, "new clients have the old socket options, until a restart");
                }
            }
        }
        let is_same_for_sessions = new.downstream == old.downstream
            && new.relay == old.relay
            && new.close.patience == old.close.patience
            && new.log.sample == old.log.sample
            && upstreams.is(&first.upstreams)
            && is_shared_alike;
        if !is_same_for_sessions {
            if !is_same {
                warn_of_idle(&upstreams);
            }
            warn_of_ports(&upstreams, first.metrics.max_connections.get());
            if !is_same {
                first.upstreams.retire(&upstreams);
            }
            // Clients who have joined stay; whoever comes now finds others.
            let hubs = if is_same && is_shared_alike && new.relay == old.relay {
                first.hubs.clone()
            } else {
                first.hubs.reconfigured(&upstreams, new.sharing(), homes, &new.relay, &first.metrics, &first.admission)
            };
            for context in contexts {
                let context = context.latest();
                if !is_same {
                    upstreams.prewarm(&context.home);
                }
                context.current.set(Arc::new(Context {
                    downstream: new.downstream.clone(),
                    relay: Arc::new(relay::Shared {
                        config: new.relay.clone(),
                        ..relay::Shared::clone(&context.relay)
                    }),
                    close: new.close.patience,
                    log_sample: new.log.sample,
                    upstreams: upstreams.clone(),
                    hubs: hubs.clone(),
                    ..Context::clone(&context)
                }));
            }
            // Nobody may be there to see it.
            admin.send_modify(|parts| {
                (parts.upstreams, parts.hubs, parts.close) = (upstreams, hubs, new.close.patience);
            });
        }
        bounds.reconfigure(new.close.max_lingering);
        let has_tls = new.downstream.tls.server.is_some();
        first.admission.reconfigure(&new.limits, connection_bytes(has_tls));
        if has_tls && old.downstream.tls.server.is_none() {
            let fix = "restart when it suits, so that limits.max_connections is derived anew";
            warn!(fix, "clients now come by TLS, which takes memory that was not reckoned with at the start");
        }
        first.relay.drain.reconfigure(new.drain.clone());
        if new.log.filter != old.log.filter
            && let Some(log) = log
            && let Err(error) = log.set_filter(&new.log.filter)
        {
            warn!(error, "the log keeps its filter");
        }
        if let Some(Reader { ask, watch, .. }) = reader
            && watch.swap(millis(new.reload.watch), Ordering::Relaxed) != millis(new.reload.watch)
        {
            // When it is full, the thread is awake.
            let _ = ask.try_send(Ask::Wake);
        }
        admin.send_modify(|parts| parts.settings = Arc::new(new.clone()));
        *old = new;
    }

    pub(crate) fn metrics(&self) -> &crate::metrics::Metrics {
        &self.parts.contexts.first().expect("there is a worker").metrics
    }
}

const ENDING: &str = "too late: listeners are closed, or the process is to end";

impl By {
    fn tell(self, status: StatusCode, report: &Report) {
        if let Self::Admin(told) = self {
            let mut json = serde_json::to_string(report).expect("texts, numbers and lists are JSON");
            json.push('\n');
            // Whoever asked may have left.
            let _ = told.send(admin::Reloaded { status, json });
        }
    }
}

/// For a line of the log.
fn list(changes: &[Change]) -> String {
    let one = |Change { key, from, to }: &Change| match to {
        Some(to) => format!("{key}: {from} -> {to}"),
        None => key.clone(),
    };
    changes.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// What may wait was taken out of the budget at the start.
fn warn_of_idle(upstreams: &Upstreams) {
    let (wanted, most) = (upstreams.idle(), upstreams.most_idle());
    if wanted > most {
        let fix = "restart, so that more is set aside";
        warn!(wanted, most, fix, "pool.prewarm and pool.keep_alive together are more than may wait");
    }
}

/// How many connections there may be was computed at the start, for the ports of that time.
fn warn_of_ports(upstreams: &Upstreams, max_connections: i64) {
    let max_connections = u64::try_from(max_connections).unwrap_or(0);
    if let Some(ports) = upstreams.ports().filter(|ports| *ports < max_connections) {
        let fix = "restart, so that clients beyond that are turned away before the backend is dialled, or name more \
                   addresses of this host in upstream.source_addresses";
        warn!(ports, max_connections, fix, "fewer ports toward the backend than connections at once");
    }
}
