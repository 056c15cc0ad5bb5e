//! The live page at the admin root, and what it shows: `/live.json`, and the same as a stream of events, `/live`.
//!
//! A sample is taken each second, looked at or not, so that the last 15 minutes are there when the page is opened. All else is
//! gathered when somebody looks, once in a second for all of them. Who reads too slowly loses events: there is no queue. Nothing is
//! changed here.

mod history;
mod problems;
mod told;

use std::{
    convert::Infallible,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use self::{
    history::{History, Levels, SERIES, STEP},
    problems::{Limit, Seen, problems},
    told::{Named, Told},
};
use super::{MAX_ENDPOINTS, MAX_WEBSOCKETS, Parts, plain, typed};
use crate::{
    doctor::{self, Facts, Report},
    drain::{Phase, Status},
    metrics::{Close, Metrics, Part, Queue, Totals},
    system::System,
};

const PAGE: &str = include_str!("page.html");

/// In the page, where the number goes that only its own style and script have.
const NONCE: &str = "NONCE";

/// Streams at once, of other hosts and of this one: a few people.
const MAX_STREAMS: [usize; 2] = [16, 16];

/// What was counted is told for these.
const WINDOWS: [Duration; 2] = [Duration::from_mins(1), Duration::from_mins(15)];

/// The doctor looks again after this, and streams begin anew with what it found.
const DOCTOR_AGE: Duration = Duration::from_mins(1);

pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// See the module.
#[derive(Debug)]
pub(super) struct Live {
    metrics: Arc<Metrics>,
    parts: watch::Receiver<Parts>,
    drain: watch::Receiver<Status>,
    system: System,
    started: Instant,
    streams: [Arc<Semaphore>; 2],
    state: Mutex<State>,
    news: watch::Sender<News>,
}

#[derive(Debug)]
struct State {
    history: History,
    /// Sessions when the drain began.
    drained: Option<i64>,
    /// What it found, and when.
    doctor: Option<(Instant, Vec<doctor::Finding>)>,
}

/// The newest event.
#[derive(Debug, Clone, Default)]
struct News {
    event: Bytes,
    /// It changes when a stream has to begin anew.
    epoch: u64,
}

/// The connection may last as long as the stream does.
#[derive(Debug)]
struct Waiting(Arc<AtomicBool>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// One reader.
struct Reader {
    live: Arc<Live>,
    news: watch::Receiver<News>,
    epoch: u64,
    has_begun: bool,
    ended: CancellationToken,
    has_ended: bool,
    _waiting: Waiting,
    _slot: OwnedSemaphorePermit,
}

impl Live {
    pub(super) fn new(
        metrics: Arc<Metrics>,
        parts: watch::Receiver<Parts>,
        drain: watch::Receiver<Status>,
    ) -> Arc<Self> {
        let (system, started) = (System::default(), Instant::now());
        let history = History::new(started, metrics.totals(system.net_counters().as_ref()));
        let state = Mutex::new(State { history, drained: None, doctor: None });
        let streams = MAX_STREAMS.map(|max| Arc::new(Semaphore::new(max)));
        let news = watch::Sender::new(News::default());
        Arc::new(Self { metrics, parts, drain, system, started, streams, state, news })
    }

    /// Samples, and tells whoever listens, until `ended`.
    pub(super) async fn run(self: Arc<Self>, ended: CancellationToken) {
        let (mut drain, mut parts) = (self.drain.clone(), self.parts.clone());
        let mut clock = interval(STEP);
        clock.set_missed_tick_behavior(MissedTickBehavior::Skip);
        // The first one is at once, and nothing has happened yet.
        clock.tick().await;
        let mut ended = pin!(ended.cancelled());
        let (mut epoch, mut begun) = (0, Instant::now());
        loop {
            let has_sample = tokio::select! {
                () = &mut ended => return,
                _ = clock.tick() => true,
                Ok(()) = drain.changed() => false,
            };
            let phase = drain.borrow_and_update().phase;
            {
                let mut state = self.state();
                state.drained = (phase != Phase::Running).then(|| state.drained.unwrap_or(self.metrics.sessions.get()));
                if has_sample {
                    self.sample(&mut state.history);
                }
            }
            if self.news.receiver_count() > 0 {
                let is_other = parts.has_changed().unwrap_or(false);
                if is_other || begun.elapsed() >= DOCTOR_AGE {
                    parts.mark_unchanged();
                    (epoch, begun) = (epoch + 1, Instant::now());
                }
                let event = self.event();
                self.news.send_replace(News { event, epoch });
            }
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sample(&self, history: &mut History) {
        let kernel = if history.wants_kernel() { self.system.net_counters() } else { None };
        let queued = self.metrics.queues().iter().map(|queue| queue.length).sum();
        let levels = Levels {
            sessions: count(self.metrics.sessions.get()),
            queued,
            lingering: count(self.metrics.lingering.get()),
            longest: self.metrics.longest(true),
        };
        history.add(Instant::now(), levels, self.metrics.totals(kernel.as_ref()));
    }

    /// The answer, if the request is for something that is here.
    pub(super) fn answer(
        self: &Arc<Self>,
        request: &Request<Incoming>,
        is_here: bool,
        waiting: &Arc<AtomicBool>,
        ended: &CancellationToken,
    ) -> Option<Response<Body>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return None;
        }
        let mut response = match request.uri().path() {
            "/" if wants_html(request.headers()) => page(),
            "/live.json" => typed("application/json", format!("{}\n", self.told(true))).map(BodyExt::boxed_unsync),
            "/live" => self.stream(request.method(), is_here, waiting, ended),
            _ => return None,
        };
        for (name, value) in [
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::REFERRER_POLICY, "no-referrer"),
            (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        ] {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        Some(response)
    }

    fn stream(
        self: &Arc<Self>,
        method: &Method,
        is_here: bool,
        waiting: &Arc<AtomicBool>,
        ended: &CancellationToken,
    ) -> Response<Body> {
        let Ok(slot) = Arc::clone(&self.streams[usize::from(is_here)]).try_acquire_owned() else {
            return plain(StatusCode::SERVICE_UNAVAILABLE, "too many watch already: see /live.json\n")
                .map(BodyExt::boxed_unsync);
        };
        let content_type = "text/event-stream; charset=utf-8";
        if method == Method::HEAD {
            return typed(content_type, "").map(BodyExt::boxed_unsync);
        }
        waiting.store(true, Ordering::Relaxed);
        let mut news = self.news.subscribe();
        let epoch = news.borrow_and_update().epoch;
        let reader = Reader {
            live: Arc::clone(self),
            news,
            epoch,
            has_begun: false,
            ended: ended.clone(),
            has_ended: false,
            _waiting: Waiting(Arc::clone(waiting)),
            _slot: slot,
        };
        let events = stream::unfold(reader, |mut reader| async {
            let event = reader.next().await?;
            Some((Ok(Frame::data(event)), reader))
        });
        typed(content_type, "").map(|_: Full<Bytes>| StreamBody::new(events).boxed_unsync())
    }

    /// In one line, as JSON is.
    fn event(&self) -> Bytes {
        format!("data: {}\n\n", self.told(false)).into()
    }

    /// What the page shows, as JSON: what changes from one second to the next, or all of it.
    fn told(&self, is_all: bool) -> String {
        let Self { metrics, .. } = self;
        let (now, drain, parts) = (Instant::now(), *self.drain.borrow(), self.parts.borrow().clone());
        let totals = metrics.totals(self.system.net_counters().as_ref());
        let (endpoints, more_endpoints) = parts.upstreams.endpoints(MAX_ENDPOINTS);
        let (shared, more_shared) = parts.upstreams.shared(MAX_ENDPOINTS);
        let (websockets, more_websockets) = parts.hubs.told(MAX_WEBSOCKETS);
        let pool = metrics.pools.census();
        let limits = self.limits(&parts);
        let mut state = self.state();
        if is_all {
            self.ask_doctor(&mut state, &parts);
        }
        let history = &state.history;
        let [minute, quarter] = WINDOWS.map(|window| history.window(now, &totals, window));
        let problems = problems(&Seen {
            came: &minute.0,
            limits: &limits,
            endpoints: metrics.endpoints(),
            searching: parts.hubs.searching(),
            is_backend_down: metrics.is_backend_down(),
            is_reload_good: metrics.is_reload_good(),
            restart_required: metrics.restart_required.get(),
            doubtful_certificates: metrics.doubtful_certificates.get(),
            pool_violations: metrics.pools.violations(),
        });
        let longest = metrics.longest(false);
        let draining = state.drained.map(|sessions_at_start| {
            let config = &parts.settings.drain;
            // What is left after it has `drain.timeout`, and is cut then.
            let window_left_ms = drain.until.filter(|_| drain.phase == Phase::Window).map(|until| {
                let end = until.checked_sub(config.timeout).unwrap_or(until);
                millis(end.saturating_duration_since(now))
            });
            let (window_ms, timeout_ms) = (millis(config.window), millis(config.timeout));
            told::Drain { sessions_at_start, window_left_ms, window_ms, timeout_ms }
        });
        let told = Told {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            unix_ms: millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()),
            uptime_ms: millis(self.started.elapsed()),
            listen: parts.address.to_string(),
            phase: drain.phase.as_str(),
            phase_ms: millis(now.saturating_duration_since(drain.since)),
            phase_left_ms: drain.until.map(|until| millis(until.saturating_duration_since(now))),
            drain: draining,
            sessions: metrics.sessions.get(),
            connections: metrics.connections.get(),
            lingering: metrics.lingering.get(),
            problems,
            limits,
            queues: metrics.queues().iter().map(|queue| [queue.length, queue.limit]).collect(),
            windows: told::Windows { minute: window(&minute, longest), quarter: window(&quarter, longest) },
            kernel: Named(totals.named(Part::Kernel)),
            endpoints,
            more_endpoints,
            shared,
            more_shared,
            websockets,
            more_websockets,
            pool: told::Pool { keys: pool.keys, references: pool.references, waiters: pool.waiters },
            seq: history.seq(),
            sample: Named(SERIES.into_iter().zip(history.last().map(known)).collect()),
            history: is_all.then(|| told::History {
                step_ms: millis(STEP),
                last_seq: history.seq(),
                series: Named(
                    SERIES
                        .into_iter()
                        .enumerate()
                        .map(|(i, name)| (name, history.series(i).map(known).collect()))
                        .collect(),
                ),
            }),
            doctor: is_all.then(|| state.doctor.as_ref().map_or(&[][..], |(_, found)| found)),
            config: is_all.then(|| parts.settings.to_toml()),
        };
        serde_json::to_string(&told).expect("numbers, texts and lists are JSON")
    }

    fn ask_doctor(&self, state: &mut State, parts: &Parts) {
        if state.doctor.as_ref().is_some_and(|(at, _)| at.elapsed() < DOCTOR_AGE) {
            return;
        }
        let mut facts = Facts::gather(&self.system);
        // Now they are those of all clients.
        facts.inherited = parts.inherited;
        let findings = doctor::diagnose(&facts, &parts.settings);
        state.doctor = Some((Instant::now(), Report::new(facts, findings, None).wrong()));
    }

    fn limits(&self, parts: &Parts) -> Vec<Limit> {
        let Self { metrics, .. } = self;
        let queues = metrics.queues();
        // None any more when they are closed.
        let fullest = queues.iter().max_by_key(|queue| u64::from(queue.length) * 1000 / u64::from(queue.limit.max(1)));
        let [memory, used] = metrics.memory();
        // Without a limit nobody looks.
        let resident = || self.system.process_memory().map_or(0, |memory| memory.resident);
        let used = if memory > 0 { used } else { i64::try_from(resident()).unwrap_or(i64::MAX) };
        let waiting = [false, true].map(|is_handshake| metrics.upstream_waiting(is_handshake).get());
        let max_waiting = parts.settings.upstream.max_waiting;
        let of = |name, set_by, used: i64, most: i64, fix| {
            let [used, most] = [used, most].map(|number| u64::try_from(number).unwrap_or(0));
            Limit { name, set_by, used, most, unit: "", fix }
        };
        let size = |size: usize| i64::try_from(size).unwrap_or(i64::MAX);
        let mut limits = vec![of(
            "client connections",
            "limits.max_connections",
            metrics.connections.get(),
            metrics.max_connections.get(),
            "the next ones get 503: raise limits.max_connections, or run more of these",
        )];
        if let Some(fullest) = fullest {
            let sum = |number: fn(&Queue) -> u32| queues.iter().map(|queue| i64::from(number(queue))).sum();
            let set_by = "listen.backlog, net.core.somaxconn";
            let fix = "the next ones are dropped by the kernel: tidegate doctor says what bounds it";
            let all = (sum(|queue| queue.length), sum(|queue| queue.limit));
            limits.push(of("places in all accept queues", set_by, all.0, all.1, fix));
            let name = "places in the fullest accept queue";
            limits.push(of(name, set_by, fullest.length.into(), fullest.limit.into(), fix));
        }
        limits.extend([
            of(
                "handshakes that wait for the backend",
                "upstream.max_waiting",
                waiting[1],
                size(max_waiting),
                "the next ones get 503: the backend does not keep up",
            ),
            of(
                "requests that wait for the backend",
                "upstream.max_waiting",
                waiting[0],
                size(max_waiting),
                "the next ones get 503: the backend does not keep up",
            ),
            of(
                "ports toward the backend",
                "upstream.source_addresses",
                metrics.upstream_ports.get(),
                metrics.upstream_ports_limit.get(),
                "the next ones get 503: name more addresses in upstream.source_addresses",
            ),
            of(
                "lingering sockets",
                "close.max_lingering",
                metrics.lingering.get(),
                size(parts.settings.close.max_lingering),
                "the oldest are closed early, and may reset their peers: raise close.max_lingering",
            ),
            Limit {
                unit: "bytes",
                ..of(
                    "memory",
                    "limits.memory",
                    used,
                    memory,
                    "new clients get 503: raise the limit, or run more of these",
                )
            },
        ]);
        limits
    }
}

impl Reader {
    /// `None`: there are no more.
    async fn next(&mut self) -> Option<Bytes> {
        if self.has_ended {
            return None;
        }
        if !self.has_begun {
            self.has_begun = true;
            return Some(self.begin());
        }
        tokio::select! {
            biased;
            () = self.ended.cancelled() => {
                // Whoever looks sees how it ended.
                self.has_ended = true;
                Some(self.live.event())
            }
            changed = self.news.changed() => {
                changed.ok()?;
                let News { event, epoch } = self.news.borrow_and_update().clone();
                if epoch == self.epoch {
                    return Some(event);
                }
                self.epoch = epoch;
                Some(self.begin())
            }
        }
    }

    fn begin(&self) -> Bytes {
        format!("retry: 1000\nevent: all\ndata: {}\n\n", self.live.told(true)).into()
    }
}

fn window((came, longest, length): &(Totals, [Duration; 2], Duration), longest_now: [Duration; 2]) -> told::Window {
    let named = |part| Named(came.named(part));
    let took = |part, index: usize| {
        // What came since the last sample counts too.
        let longest = longest[index].max(longest_now[index]);
        told::Took {
            count: came.part(part).iter().map(|count| u64::from(*count)).sum(),
            p50_ms: came.quantile(part, 0.5).map(|ms| at_most(ms, longest)),
            p99_ms: came.quantile(part, 0.99).map(|ms| at_most(ms, longest)),
            max_ms: rounded(longest.as_secs_f64() * 1e3),
        }
    };
    let end = |(end, count): (Close, u32)| {
        let Close { initiator, clean, code } = end;
        told::End { initiator, clean, code, count }
    };
    told::Window {
        seconds: length.as_secs(),
        handshakes: named(Part::Handshakes),
        refused: named(Part::Refused),
        requests: named(Part::Requests),
        messages: [0, 1].map(|side| came.part(Part::Messages)[side]),
        closes: came.ends().map(end).collect(),
        abnormal: named(Part::Causes),
        websockets: named(Part::Shared),
        connect: took(Part::Connect, 0),
        close: took(Part::Close, 1),
        kernel: named(Part::Kernel),
    }
}

/// An estimate must not be beyond what is known exactly.
fn at_most(ms: f64, longest: Duration) -> f64 {
    rounded(if longest.is_zero() { ms } else { ms.min(longest.as_secs_f64() * 1e3) })
}

/// To microseconds.
fn rounded(ms: f64) -> f64 {
    (ms * 1e3).round() / 1e3
}

fn known(number: u32) -> Option<u32> {
    (number != history::UNKNOWN).then_some(number)
}

fn count(gauge: i64) -> u32 {
    u32::try_from(gauge.max(0)).unwrap_or(history::UNKNOWN - 1)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A browser does. For `curl` there is the list of paths.
fn wants_html(headers: &HeaderMap) -> bool {
    headers
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains("text/html"))
}

/// It may run its own script, and speak with this listener: nothing else.
fn page() -> Response<Body> {
    let nonce = format!("{:032x}", rand::random::<u128>());
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    );
    let mut response = typed("text/html; charset=utf-8", PAGE.replace(NONCE, &nonce));
    let policy = HeaderValue::from_str(&policy).expect("hexadecimal digits");
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("accept"));
    response.map(BodyExt::boxed_unsync)
}
