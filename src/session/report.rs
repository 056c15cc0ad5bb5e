//! What is said and counted of a session.

use std::{borrow::Cow, sync::Arc, time::Duration};

use super::{About, Context, roster::Entry};
use crate::{
    hub::{Digest, Known},
    log_lines::{self, Shown, checked, log_line, shown, unquoted, word},
    relay::{Cause, Gone, Initiator, Report},
    side::Side,
    upstream::{Load, Mode},
};

impl Context {
    /// Whether it ended in order.
    pub(super) fn count(&self, report: &Report) -> bool {
        let clean = abnormal(report).next().is_none();
        self.metrics.close(initiator(report.initiator), report.code, clean, report.ending);
        if !clean {
            abnormal(report).for_each(|cause| self.metrics.abnormal(cause));
        }
        // Most have none of them, and all workers write to each count.
        if report.delay_cut {
            self.metrics.delays_cut.inc();
        }
        let crossed = report.counts[Side::Client as usize].crossed;
        if crossed > 0 {
            self.metrics.crossed_messages.inc_by(crossed);
        }
        clean
    }
}

const fn initiator(initiator: Initiator) -> &'static str {
    match initiator {
        Initiator::Client => "client",
        Initiator::Backend => "backend",
        Initiator::Tidegate => "tidegate",
    }
}

/// The causes for which a session counts as abnormal, of `metrics::ABNORMAL`.
fn abnormal(report: &Report) -> impl Iterator<Item = &'static str> + '_ {
    let sides = Side::BOTH.into_iter().filter_map(|side| {
        let index = side as usize;
        // After a fault nobody is waited for.
        let unanswered = report.told[index] && !report.heard[index] && report.cause != Cause::Fault;
        let [fin, reset, silent, stalled, violation, no_answer] = match side {
            Side::Client => [
                "client_fin",
                "client_reset",
                "client_silent",
                "client_stalled",
                "client_violation",
                "client_no_answer",
            ],
            Side::Backend => [
                "backend_fin",
                "backend_reset",
                "backend_silent",
                "backend_stalled",
                "backend_violation",
                "backend_no_answer",
            ],
        };
        // How it left is told by its first sign: a RST for our data after its Close and FIN is normal.
        let first = match report.cause {
            Cause::Gone(gone, how) if gone == side => Some(how),
            _ => None,
        };
        match first.or(report.gone[index]) {
            Some(Gone::Silent) => Some(silent),
            Some(Gone::Stalled) => Some(stalled),
            Some(Gone::Broke(_)) => Some(violation),
            Some(Gone::Reset) if first.is_some() => Some(reset),
            Some(Gone::Fin) if first.is_some() => Some(fin),
            None if side == Side::Client && report.cause == Cause::Slow => Some(stalled),
            _ if unanswered => Some(no_answer),
            _ => None,
        }
    });
    let own = [(report.cut != [false; 2], "cut_inside_frame"), (report.cause == Cause::Fault, "panic")];
    sides.chain(own.into_iter().filter_map(|(is_so, cause)| is_so.then_some(cause)))
}

/// Why a session ended that no rule ended.
const BUG: &str = "a bug in tidegate: please report it";

/// A session between its two log lines. Dropped without a report it was cut: by the end of the drain, or by a panic.
pub(super) struct Open {
    entry: Arc<Entry>,
    context: Arc<Context>,
    /// In the roster.
    key: u32,
    /// The log has its first line, and so gets its last one.
    is_told: bool,
    /// If it is told: nothing has to be escaped where its texts are JSON. They are looked at once for both lines.
    is_plain: bool,
    is_closed: bool,
    /// The endpoint has one more until both legs have ended.
    _load: Option<Load>,
}

impl Open {
    pub(super) fn new(
        context: &Arc<Context>,
        about: About,
        (endpoint, load): (Arc<str>, Option<Load>),
        way: Mode,
    ) -> Self {
        let Context { metrics, roster, log_sample: sample, .. } = &**context;
        let entry = Arc::new(Entry::new(about, endpoint, way));
        let is_told = *sample == 1 || *sample > 0 && rand::random_ratio(1, *sample);
        let mut is_plain = false;
        if is_told {
            let Entry { path, request_id, route, endpoint, .. } = &*entry;
            is_plain =
                [&**path, &**request_id, &**route, &**endpoint].iter().all(|text| log_lines::is_plain(text.as_bytes()));
            let whose = entry.whose();
            log_line!(
                INFO,
                "open",
                client = whose.address,
                http = word(whose.http()),
                tls = whose.tls().map(word),
                sni = whose.sni(),
                path = checked(&**path, is_plain),
                request_id = checked(&**request_id, is_plain),
                trace_id = entry.trace_id().map(shown),
                route = checked(unquoted(route), is_plain),
                endpoint = checked(unquoted(endpoint), is_plain),
                way = word(way.as_str()),
                key = key(entry.shared()),
            );
        }
        let key = roster.add(Arc::clone(&entry));
        metrics.sessions.inc();
        Self { entry, context: Arc::clone(context), key, is_told, is_plain, is_closed: false, _load: load }
    }

    /// What its session shares with others.
    pub(super) const fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(super) fn close(&mut self, report: &Report, clean: bool) {
        self.is_closed = true;
        if !self.is_told && clean {
            return;
        }
        let [from_client, from_backend] = report.counts;
        let [client_sent, backend_sent] = report.sent;
        let [client_got, backend_got] = report.got;
        let causes = (!clean).then(|| abnormal(report).collect::<Vec<_>>().join(","));
        let why: Cow<'_, str> = match report.cause {
            Cause::Gone(side, Gone::Broke(violation)) => format!("{}: {violation}", side.as_str()).into(),
            Cause::Drain => "drain".into(),
            Cause::Age => "websocket.max_age".into(),
            Cause::Idle => "websocket.idle_timeout".into(),
            Cause::Slow if self.entry.way == Mode::Shared => "pool.slow_client".into(),
            Cause::Slow => "pool.stall_timeout".into(),
            Cause::Fault => BUG.into(),
            Cause::Gone(Side::Backend, Gone::Fin) => {
                self.entry.shared().map_or("", |shared| shared.why(self.entry.begun)).into()
            }
            _ => "".into(),
        };
        let reason = escaped(&report.reason);
        let Entry { path, request_id, route, endpoint, way, begun, .. } = &*self.entry;
        let whose = self.entry.whose();
        log_line!(
            INFO,
            "close",
            client = whose.address,
            tls = whose.tls().map(word),
            sni = whose.sni(),
            path = checked(&**path, self.is_plain),
            request_id = checked(&**request_id, self.is_plain),
            trace_id = self.entry.trace_id().map(shown),
            route = checked(unquoted(route), self.is_plain),
            endpoint = checked(unquoted(endpoint), self.is_plain),
            way = word(way.as_str()),
            key = key(self.entry.shared()),
            initiator = word(initiator(report.initiator)),
            code = report.code,
            // In quotes also where lines are text: it is the peer's, and looks like a field if it wants to.
            reason = (!reason.is_empty()).then_some(&*reason),
            client_sent,
            client_got,
            backend_sent,
            backend_got,
            clean,
            abnormal = causes.as_deref(),
            why = (!why.is_empty()).then_some(&*why),
            duration_ms = millis(begun.elapsed()),
            ending_ms = millis(report.ending),
            messages_from_client = from_client.messages,
            messages_from_backend = from_backend.messages,
            bytes_from_client = from_client.bytes,
            bytes_from_backend = from_backend.bytes,
            crossed = from_client.crossed,
            delay_cut = report.delay_cut.then_some(true),
        );
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.context.roster.remove(self.key);
        self.context.metrics.sessions.dec();
        if self.is_closed {
            return;
        }
        let (cause, why) =
            if std::thread::panicking() { ("panic", BUG) } else { ("drain_cut", "drain.timeout was over") };
        self.context.metrics.close("tidegate", None, false, Duration::ZERO);
        self.context.metrics.abnormal(cause);
        let Entry { path, request_id, route, endpoint, way, begun, .. } = &*self.entry;
        log_line!(
            WARN,
            "close",
            client = self.entry.whose().address,
            path = &**path,
            request_id = &**request_id,
            trace_id = self.entry.trace_id().map(shown),
            route = unquoted(route),
            endpoint = unquoted(endpoint),
            way = word(way.as_str()),
            key = key(self.entry.shared()),
            initiator = word("tidegate"),
            clean = false,
            abnormal = word(cause),
            why = word(why),
            duration_ms = millis(begun.elapsed()),
        );
    }
}

/// Of the WebSocket that a session shares with others, for the log.
fn key(shared: Option<&Arc<Known>>) -> Option<Shown<Digest>> {
    shared.map(|shared| shown(shared.key()))
}

/// As `escape_debug` has it, which most are already.
fn escaped(reason: &str) -> Cow<'_, str> {
    let is_plain = |byte| matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\'' | b'\\');
    if reason.bytes().all(is_plain) { reason.into() } else { reason.escape_debug().to_string().into() }
}

/// A number for the log.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
