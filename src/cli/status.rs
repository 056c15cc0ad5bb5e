//! `tidegate status`: what the proxy that runs here is doing, on one screen.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal as _, Write as _},
    thread::sleep,
    time::Duration,
};

use anyhow::Context as _;
use serde_json::{Map, Value};

use super::{
    operate::{self, Admin},
    table::{age, columns},
};

/// Between two looks of `--watch`.
const PAUSE: Duration = Duration::from_secs(1);

/// Home, and nothing below.
const CLEAR: &str = "\x1b[H\x1b[J";

/// WebSockets that clients share, on a screen.
const MOST_SHARED: usize = 16;

/// In one line, without what is long: the history, the configuration, and what the doctor says.
pub(super) fn json(admin: &Admin) -> anyhow::Result<String> {
    let mut all = ask(admin)?;
    for long in ["history", "config", "doctor"] {
        all.as_object_mut().context("what it says is no object")?.remove(long);
    }
    Ok(format!("{all}\n"))
}

/// One screen.
pub(super) fn screen(admin: &Admin) -> anyhow::Result<String> {
    Ok(render(&ask(admin)?))
}

/// One each second, in the place of the one before where that can be done. It ends with an error: of a process that ends.
pub(super) fn watch(admin: &Admin) -> anyhow::Result<()> {
    let mut stdout = io::stdout();
    let begin = if stdout.is_terminal() { CLEAR } else { "" };
    loop {
        let screen = screen(admin)?;
        // Whoever reads may have had enough.
        if stdout.write_all(format!("{begin}{screen}\n").as_bytes()).and_then(|()| stdout.flush()).is_err() {
            return Ok(());
        }
        sleep(PAUSE);
    }
}

fn ask(admin: &Admin) -> anyhow::Result<Value> {
    let said = operate::look(admin, "/live.json")?;
    serde_json::from_str(&said).context("what it says is no JSON")
}

/// What comes from elsewhere is not for a terminal to obey.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.escape_debug().to_string(),
        Value::Number(number) => number.as_u64().map_or_else(|| number.to_string(), grouped),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}

fn amount(number: &Value, unit: &Value) -> String {
    match number.as_u64().filter(|_| unit == "bytes") {
        Some(bytes) => format!("{} MiB", grouped(bytes >> 20)),
        None => text(number),
    }
}

/// "12,345".
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn render(all: &Value) -> String {
    let mut out = String::new();
    let up = age(all["uptime_ms"].as_u64().unwrap_or(0));
    let [version, listen, phase] = ["version", "listen", "phase"].map(|key| text(&all[key]));
    let mut line = |text: std::fmt::Arguments<'_>| writeln!(out, "{text}").expect("a String takes everything");
    line(format_args!("tidegate {version}, pid {}, up {up}, {listen}: {phase}{}", all["pid"], phase_left(all)));
    let [sessions, connections, lingering] = ["sessions", "connections", "lingering"].map(|key| text(&all[key]));
    line(format_args!("{sessions} sessions, {connections} connections, {lingering} lingering sockets"));
    let list = |key: &str| all[key].as_array().map(Vec::as_slice).unwrap_or_default();
    for problem in list("problems") {
        line(format_args!("\n{}: {}\n    {}", text(&problem["level"]), text(&problem["what"]), text(&problem["fix"])));
    }
    if list("problems").is_empty() {
        line(format_args!("\nnothing that tidegate can see is wrong"));
    }
    let windows = ["1m", "15m"].map(|name| &all["windows"][name]);
    let rows = [
        ("handshakes", windows.map(accepted)),
        ("not served", windows.map(not_served)),
        ("closed, clean", windows.map(|window| closed(window, true))),
        ("closed, cut", windows.map(|window| closed(window, false))),
        ("what cut them short", windows.map(cut_by)),
        ("messages of clients", windows.map(|window| text(&window["messages"][0]))),
        ("messages of backends", windows.map(|window| text(&window["messages"][1]))),
        ("connect p50, p99, longest", windows.map(|window| latency(&window["connect"]))),
        ("close p50, p99, longest", windows.map(|window| latency(&window["close"]))),
    ];
    let head = ["", "1 MIN", "15 MIN"].map(str::to_owned);
    let rows = rows.into_iter().map(|(name, [short, long])| [name.to_owned(), short, long]);
    line(format_args!("\n{}", columns(&[head].into_iter().chain(rows).collect::<Vec<_>>()).trim_end()));
    let head = ["LIMIT", "USED", "OF", "SET BY"].map(str::to_owned);
    let limits = list("limits").iter().map(|limit| {
        let [used, of] = ["used", "most"].map(|key| amount(&limit[key], &limit["unit"]));
        let of = if limit["most"] == 0 { "-".to_owned() } else { of };
        [text(&limit["name"]), used, of, text(&limit["set_by"])]
    });
    line(format_args!("\n{}", columns(&[head].into_iter().chain(limits).collect::<Vec<_>>()).trim_end()));
    let head = ["BACKEND", "STATE", "SESSIONS"].map(str::to_owned);
    let endpoints =
        list("endpoints").iter().map(|it| [text(&it["address"]), text(&it["state"]), text(&it["sessions"])]);
    line(format_args!("\n{}", columns(&[head].into_iter().chain(endpoints).collect::<Vec<_>>()).trim_end()));
    if all["more_endpoints"] != 0 {
        line(format_args!("and {} more", text(&all["more_endpoints"])));
    }
    let websockets = list("websockets");
    if !websockets.is_empty() {
        let head = [
            "SHARED",
            "PATTERN",
            "KEY",
            "BACKEND",
            "STATE",
            "CLIENTS",
            "WAITING",
            "OUTSTANDING",
            "SUBSCRIPTIONS",
            "GAPS",
            "RECONNECTS",
        ];
        let rows = websockets.iter().take(MOST_SHARED).map(|one| {
            let state = match one["since_ms"].as_u64() {
                Some(ms) => format!("{} {}", text(&one["state"]), age(ms)),
                None => text(&one["state"]),
            };
            let of = |key: &str| text(&one[key]);
            [
                of("route"),
                of("pattern"),
                of("key"),
                of("endpoint"),
                state,
                of("clients"),
                of("waiting"),
                of("outstanding"),
                of("subscriptions"),
                of("gaps"),
                of("reconnects"),
            ]
        });
        let rows = [head.map(str::to_owned)].into_iter().chain(rows);
        line(format_args!("\n{}", columns(&rows.collect::<Vec<_>>()).trim_end()));
        let hidden = websockets.len().saturating_sub(MOST_SHARED) as u64;
        let more = hidden + all["more_websockets"].as_u64().unwrap_or(0);
        if more > 0 {
            line(format_args!("and {} more", grouped(more)));
        }
    }
    out
}

fn phase_left(all: &Value) -> String {
    let left = all["phase_left_ms"].as_u64().map(|ms| format!(", {} at most", age(ms))).unwrap_or_default();
    match all["drain"]["sessions_at_start"].as_u64() {
        Some(sessions) => format!("{left}; {} sessions when the drain began", grouped(sessions)),
        None => left,
    }
}

fn counts(value: &Value) -> impl Iterator<Item = (&String, u64)> {
    let counts = value.as_object().into_iter().flat_map(Map::iter);
    counts.filter_map(|(name, count)| Some((name, count.as_u64().filter(|count| *count > 0)?)))
}

fn accepted(window: &Value) -> String {
    grouped(window["handshakes"]["accepted"].as_u64().unwrap_or(0))
}

fn not_served(window: &Value) -> String {
    // As the page counts them: by the backend's fault, or turned away; the latter by their reason alone.
    let failed = ["unreachable", "timeout", "bad_backend"];
    let results = counts(&window["handshakes"]).filter(|(name, _)| failed.contains(&name.as_str()));
    with_parts(results.chain(counts(&window["refused"])).map(|(name, count)| (name.clone(), count)).collect())
}

fn closed(window: &Value, is_clean: bool) -> String {
    let closes = window["closes"].as_array().into_iter().flatten().filter(|close| close["clean"] == is_clean);
    let by = closes.map(|close| {
        let code = text(&close["code"]);
        (format!("{} {code}", text(&close["initiator"])), close["count"].as_u64().unwrap_or(0))
    });
    with_parts(by.collect())
}

fn cut_by(window: &Value) -> String {
    with_parts(counts(&window["abnormal"]).map(|(name, count)| (name.clone(), count)).collect())
}

/// The sum, and the three largest parts of it.
fn with_parts(mut parts: Vec<(String, u64)>) -> String {
    parts.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    let sum = grouped(parts.iter().map(|(_, count)| count).sum());
    let told: Vec<_> =
        parts.iter().take(3).map(|(name, count)| format!("{}: {}", name.escape_debug(), grouped(*count))).collect();
    let more = if parts.len() > 3 { ", ..." } else { "" };
    if told.is_empty() { sum } else { format!("{sum} ({}{more})", told.join(", ")) }
}

fn latency(of: &Value) -> String {
    if of["count"].as_u64().unwrap_or(0) == 0 {
        return "-".to_owned();
    }
    let [p50, p99, longest] = ["p50_ms", "p99_ms", "max_ms"].map(|key| of[key].as_f64().unwrap_or(0.0));
    format!("{p50:.1}, {p99:.1}, {longest:.1} ms")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_are_grouped() {
        for (number, text) in [(0, "0"), (999, "999"), (1_000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(number), text);
        }
    }

    /// A proxy that drains, with something wrong, as a person sees it.
    #[test]
    fn a_screen() {
        let window = json!({
            "handshakes": {"accepted": 1200, "unreachable": 2}, "refused": {"connections": 1}, "messages": [6000, 5999],
            "closes": [
                {"initiator": "client", "clean": true, "code": "1000", "count": 7},
                {"initiator": "tidegate", "clean": true, "code": "1001", "count": 90},
                {"initiator": "backend", "clean": false, "code": "none", "count": 3},
            ],
            "connect": {"count": 1200, "p50_ms": 0.51, "p99_ms": 2.0, "max_ms": 17.04},
            "close": {"count": 0, "p50_ms": null, "p99_ms": null, "max_ms": 0.0},
        });
        let all = json!({
            "version": "0.1.0", "pid": 7, "uptime_ms": 11_045_000, "listen": "0.0.0.0:8080", "phase": "window",
            "phase_left_ms": 12_500, "drain": {"sessions_at_start": 1100}, "sessions": 1003, "connections": 1004, "lingering": 0,
            "problems": [{"level": "error", "what": "the backend \u{1b}[2J", "fix": "is it there?"}],
            "windows": {"1m": window, "15m": window},
            "limits": [
                {"name": "client connections", "set_by": "limits.max_connections", "used": 1004, "most": 9705},
                {"name": "memory", "set_by": "limits.memory", "used": 19_931_136, "most": 0, "unit": "bytes"},
            ],
            "endpoints": [{"address": "127.0.0.1:9000", "state": "active", "sessions": 1003}], "more_endpoints": 2,
            "websockets": [
                {"route": "/feed/*", "pattern": "broadcast", "key": "0123456789ab", "endpoint": "127.0.0.1:9000", "state": "searching",
                 "since_ms": 4200, "clients": 1200, "waiting": 3, "outstanding": 0, "subscriptions": 0, "gaps": 2, "reconnects": 1},
                {"route": "/rpc", "pattern": "rpc", "key": "89abcdef0123", "endpoint": null, "state": "failed", "since_ms": null,
                 "clients": 0, "waiting": 0, "outstanding": 0, "subscriptions": 0, "gaps": 0, "reconnects": 0, "retry_in_ms": 700},
            ],
            "more_websockets": 7,
        });
        insta::assert_snapshot!(render(&all));
    }
}
