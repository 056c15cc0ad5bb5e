//! The log: what a session leaves there, how little of it is wanted, and what is changed while the process runs.

use crate::harness::{Peer, Scene, Side, backend, http::Message};
use serde_json::Value;

const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// Lines with this message.
fn lines(t: &Scene, message: &str) -> Vec<Value> {
    let printed = t.proxy().printed().into_iter();
    let lines = printed.filter_map(|(_, line)| serde_json::from_str::<Value>(&line).ok());
    lines.filter(|line| line["message"] == message).collect()
}

async fn visit(c: &mut Peer) {
    c.handshake("/").await;
    c.send_close(1000, "").await;
    c.until_end().await;
}

/// `tidegate log`, where the proxy runs.
fn set_filter(t: &Scene, filter: &str) -> (Option<i32>, String) {
    let mut command = t.lab().command_in(Side::Proxy, env!("CARGO_BIN_EXE_tidegate"));
    let output = command.args(["log", filter, "--admin", &t.proxy().admin.to_string()]).output().expect("the binary");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// A client's trace is passed on as it is, and both lines of its session have its id; where there is none, none is made up.
#[test]
fn a_trace_is_known_by_its_id() {
    let t = Scene::new("").backend(backend::echo).start();
    for trace in [Some(TRACE), None] {
        t.client(async |c| {
            let mut request = Message::websocket("/");
            if let Some(trace) = trace {
                request = request.header("traceparent", trace);
            }
            c.handshake_with(request).await;
            c.send_close(1000, "").await;
            c.until_end().await;
        });
    }
    for (index, id) in [Some("4bf92f3577b34da6a3ce929d0e0e4736"), None].into_iter().enumerate() {
        let request = t.connection(index).seen().head.clone().expect("a handshake");
        assert_eq!(request.field("traceparent"), id.map(|_| TRACE));
        for message in ["open", "close"] {
            let line = t.proxy().log_where(message, |line| {
                line["message"] == message && line["trace_id"] == id.map_or(Value::Null, Value::from)
            });
            assert!(!line["request_id"].as_str().expect("an id").is_empty());
        }
    }
    t.no_rst();
}

/// Sessions that are not sampled leave nothing in the log, unless one of their ends was none: that is always told.
#[test]
fn what_is_healthy_need_not_be_told() {
    let t = Scene::new("log.sample = 0").backend(backend::echo).start();
    for _ in 0..20 {
        t.client(visit);
    }
    t.client(async |c| {
        c.handshake("/reset").await;
        c.rst();
    });
    let told = t.proxy().log_where("what was reset", |line| line["message"] == "close");
    assert_eq!((&told["path"], &told["clean"]), (&"/reset".into(), &false.into()));
    t.proxy().metrics_when("21 sessions", |metrics| metrics.sum("tidegate_closes_total") > 20.5);
    assert_eq!((lines(&t, "open").len(), lines(&t, "close").len()), (0, 1));
}

/// What is logged is changed without the file, and a filter that is none changes nothing.
#[test]
fn the_filter_is_changed_at_run_time() {
    let t = Scene::new("").backend(backend::echo).start();
    t.client(visit);
    let first = t.proxy().log_where("the first session", |line| line["message"] == "close")["client"].clone();
    assert_eq!(set_filter(&t, "warn"), (Some(0), String::new()));
    t.client(visit);
    t.proxy().metrics_when("its end", |metrics| {
        metrics.sum("tidegate_closes_total") > 1.5 && metrics.get("tidegate_connections_active") < 0.5
    });
    let (code, said) = set_filter(&t, "tidegate=loud");
    assert!(code == Some(1) && said.contains("is no filter"), "{code:?} {said}");
    assert_eq!(set_filter(&t, "info,tidegate::relay=trace"), (Some(0), String::new()));
    t.client(visit);
    // One thread writes them, in their order.
    t.proxy().log_where("the third session", |line| line["message"] == "close" && line["client"] != first);
    assert_eq!((lines(&t, "open").len(), lines(&t, "close").len()), (2, 2));
    assert!(t.proxy().metrics().get("tidegate_log_lines_dropped_total") < 0.5);
    t.no_rst();
}
