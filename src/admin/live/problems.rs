//! What is wrong at the moment, as far as tidegate can see it, with what to do about it. Pure: what is known goes in.
//!
//! It is for somebody who was just woken up: few lines, the worst first. What is not known is not guessed at.

use serde::Serialize;

use crate::{
    admission::Reason,
    metrics::{Part, Totals},
};

/// One thing that is wrong.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Problem {
    /// `error`: clients are hurt; `warning`: they soon may be; `note`.
    pub level: &'static str,
    pub what: String,
    /// What to do.
    pub fix: &'static str,
}

/// Something of which there is only so much.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Limit {
    pub name: &'static str,
    /// The key of the configuration, or what else decides.
    pub set_by: &'static str,
    pub used: u64,
    /// 0: nobody knows of one.
    pub most: u64,
    /// `bytes`, or none.
    pub unit: &'static str,
    #[serde(skip)]
    pub fix: &'static str,
}

/// What is known.
#[derive(Debug)]
pub(super) struct Seen<'a> {
    /// What was counted in the last minute.
    pub came: &'a Totals,
    pub limits: &'a [Limit],
    /// Endpoints that take connections, and that are left alone.
    pub endpoints: [i64; 2],
    /// WebSockets that clients share whose backend was lost and is looked for, and their clients.
    pub searching: (usize, usize),
    pub is_reload_good: bool,
    /// As far as /readyz knows.
    pub is_backend_down: bool,
    /// Keys that take a restart, certificates that expire, and mistakes in the pool.
    pub restart_required: i64,
    pub doubtful_certificates: i64,
    pub pool_violations: u64,
}

/// From this part of a limit on it is worth a word.
const NEARLY: [u64; 2] = [9, 10];

pub(super) fn problems(seen: &Seen<'_>) -> Vec<Problem> {
    let mut found: [Vec<Problem>; 3] = Default::default();
    let came = seen.came;
    let mut say = |level: &'static str, what: String, fix: &'static str| {
        let place = ["error", "warning"].iter().position(|worse| *worse == level).unwrap_or(2);
        found[place].push(Problem { level, what, fix });
    };
    if seen.is_backend_down {
        let what = "the backend took no connection when /readyz last looked".to_owned();
        say("error", what, "no clients are sent here: look at the backend; the line `not ready` of the log says why");
    }
    let [active, ejected] = seen.endpoints;
    if ejected > 0 {
        let level = if active == 0 { "error" } else { "warning" };
        let what = format!("endpoints of backends that take no connections: {ejected} of {}", active + ejected);
        say(level, what, "tidegate status names them; look at the backend itself");
    }
    shared(seen, &mut say);
    for (name, what, fix) in [
        (
            "unreachable",
            "that could not be connected to the backend (502)",
            "is the backend there, where upstream.address says?",
        ),
        ("timeout", "without an answer of the backend in time (504)", "the backend is slow or hangs: look at it"),
        ("bad_backend", "without a valid answer of the backend (502)", "the log names what is wrong with it"),
    ] {
        let count = came.get(Part::Handshakes, name);
        if count > 0 {
            say("error", minute("handshakes ", what, "", count), fix);
        }
    }
    for (reason, count) in came.named(Part::Refused) {
        let fix = Reason::ALL.into_iter().find(|known| known.as_str() == reason).map_or("", Reason::fix);
        say("error", minute("clients that were turned away (", reason, ")", count), fix);
    }
    for (cause, count) in came.named(Part::Causes) {
        let (level, fix) = match cause {
            "backend_reset" | "backend_fin" => ("error", "clients got Close 1012; did the backend crash or restart?"),
            "backend_silent" | "backend_stalled" | "backend_no_answer" => ("error", "the backend hangs: look at it"),
            "backend_violation" => ("error", "the backend breaks the protocol: the log says how"),
            "drain_cut" => ("error", "drain.timeout was over: raise it, and the grace period with it"),
            "cut_inside_frame" => ("warning", "a side died inside a large frame: see websocket.hold_frame"),
            "panic" => ("error", "a bug in tidegate: please report it, with the log"),
            "client_violation" => ("warning", "a client broke the protocol or a limit: `why` in the log says which"),
            "client_silent" | "client_stalled" | "client_no_answer" => {
                ("note", "clients that were gone, or read nothing: normal on bad networks, unless there are many")
            }
            // Clients come and go as they like: a browser that is closed, a phone in a tunnel.
            _ => ("note", "clients left without a word: normal, unless there are many"),
        };
        say(level, minute("sessions that ended without a Close handshake (", cause, ")", count), fix);
    }
    for Limit { name, used, most, unit, fix, .. } in seen.limits.iter().filter(|limit| limit.most > 0) {
        let (used, most) = if *unit == "bytes" { (used >> 20, most >> 20) } else { (*used, *most) };
        let unit = if *unit == "bytes" { " MiB" } else { "" };
        if used >= most {
            say("error", format!("full: {name}, {used} of {most}{unit}"), fix);
        } else if used.saturating_mul(NEARLY[1]) >= most.saturating_mul(NEARLY[0]) {
            say("warning", format!("nearly full: {name}, {used} of {most}{unit}"), fix);
        }
    }
    let overflows = came.get(Part::Kernel, "listen_overflows");
    if overflows > 0 {
        let what =
            minute("connections that found an accept queue full, in the whole network namespace", "", "", overflows);
        say("warning", what, "tidegate doctor says what bounds the queues; the backend's are counted too");
    }
    if !seen.is_reload_good {
        say("error", "the configuration was rejected when it was read last".to_owned(), "tidegate check says why");
    }
    if seen.restart_required > 0 {
        let what = format!("keys of the configuration that are not in force yet: {}", seen.restart_required);
        say("note", what, "restart when it suits: SIGUSR2; a container is replaced");
    }
    if seen.doubtful_certificates > 0 {
        let what = format!("certificates for clients that have expired, or soon will: {}", seen.doubtful_certificates);
        say("warning", what, "renew them: who comes after their end is not served; `tidegate check` names the files");
    }
    if seen.pool_violations > 0 {
        say("error", "the pool of connections made a mistake".to_owned(), "a bug in tidegate: please report it");
    }
    // What is as bad stays in this order.
    found.into_iter().flatten().collect()
}

/// Of WebSockets that clients share.
fn shared(seen: &Seen<'_>, say: &mut dyn FnMut(&'static str, String, &'static str)) {
    let (searching, clients) = seen.searching;
    if searching > 0 {
        let what = format!(
            "shared WebSockets whose backend was lost and is looked for: {searching}, with {clients} clients that wait"
        );
        say(
            "error",
            what,
            "look at the backend; tidegate status names them; after pool.reconnect_grace clients get Close 1012",
        );
    }
    for (what, count) in seen.came.named(Part::Shared) {
        let (level, what, fix) = match what {
            "lost" => (
                "warning",
                "times that the backend of a shared WebSocket was lost",
                "its restarts and its own log; what it said meanwhile is missed",
            ),
            "given_up" => (
                "error",
                "shared WebSockets that were given up",
                "clients got Close 1012; the log says why: a shared WebSocket is given up",
            ),
            "slow" => (
                "warning",
                "times that a client was too slow for a shared WebSocket",
                "one that is on a bad network, or many: pool.queue_messages, pool.queue_bytes, pool.slow_client",
            ),
            "rpc_timeout" => (
                "error",
                "JSON-RPC requests without an answer in time",
                "the backend is slow or hangs: look at it; pool.request_timeout",
            ),
            _ => continue,
        };
        say(level, minute(what, "", "", count), fix);
    }
}

/// Once, since it is said of many things.
#[inline(never)]
fn minute(what: &str, which: &str, end: &str, count: u32) -> String {
    format!("{what}{which}{end}: {count} in the last minute")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::metrics::{Gap, Handshake, Metrics, Reconnect, RpcResult};

    fn seen<'a>(came: &'a Totals, limits: &'a [Limit]) -> Seen<'a> {
        Seen {
            came,
            limits,
            endpoints: [1, 0],
            searching: (0, 0),
            is_reload_good: true,
            is_backend_down: false,
            restart_required: 0,
            doubtful_certificates: 0,
            pool_violations: 0,
        }
    }

    /// A process that serves well has nothing to say, however many came and went.
    #[test]
    fn nothing_is_wrong() {
        let metrics = Metrics::new();
        metrics.handshake(Handshake::Accepted, Duration::ZERO);
        metrics.handshake(Handshake::Refused, Duration::ZERO);
        metrics.close("client", Some(1000), true, Duration::ZERO);
        assert_eq!(problems(&seen(&metrics.totals(None), &[])), []);
    }

    /// What hurts clients comes first, what only may come later; a limit of 0 is none, and one that is reached is named.
    #[test]
    fn the_worst_comes_first() {
        let metrics = Metrics::new();
        metrics.abnormal("client_reset");
        metrics.abnormal("backend_reset");
        metrics.gap(Gap::Lost);
        metrics.slow_client(0);
        metrics.rpc(RpcResult::Timeout, 3);
        metrics.reconnect(Reconnect::Expired);
        let limit = |name, used, most| Limit { name, set_by: "", used, most, unit: "", fix: "" };
        let limits = [limit("places", 9, 10), limit("ports", 5, 5), limit("memory", 7, 0), limit("queues", 8, 10)];
        let totals = metrics.totals(None);
        let found =
            problems(&Seen { endpoints: [0, 2], searching: (1, 40), restart_required: 1, ..seen(&totals, &limits) });
        let found: Vec<_> = found.iter().map(|problem| (problem.level, problem.what.as_str())).collect();
        assert_eq!(
            found,
            [
                ("error", "endpoints of backends that take no connections: 2 of 2"),
                ("error", "shared WebSockets whose backend was lost and is looked for: 1, with 40 clients that wait"),
                ("error", "shared WebSockets that were given up: 1 in the last minute"),
                ("error", "JSON-RPC requests without an answer in time: 3 in the last minute"),
                ("error", "sessions that ended without a Close handshake (backend_reset): 1 in the last minute"),
                ("error", "full: ports, 5 of 5"),
                ("warning", "times that the backend of a shared WebSocket was lost: 1 in the last minute"),
                ("warning", "times that a client was too slow for a shared WebSocket: 1 in the last minute"),
                ("warning", "nearly full: places, 9 of 10"),
                ("note", "sessions that ended without a Close handshake (client_reset): 1 in the last minute"),
                ("note", "keys of the configuration that are not in force yet: 1"),
            ]
        );
    }
}
