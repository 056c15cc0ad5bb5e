//! The WebSockets that clients share, as an operator sees them: where each stands, and how one gets from a client to its own.

use std::{thread, time::Duration};

use serde_json::Value;

use crate::harness::{Board, DEADLINE, End, Gate, LIMIT, Message, Peer, Scene, Side, lab::Running, ws::CLOSE};

fn settings(pool: &str) -> String {
    format!("route = [{{ path = '/s/*', pool = {{ mode = 'shared', idle_timeout = '45s', {pool} }} }}]\n")
}

/// A backend whose first WebSocket ends without a Close when it is told to. The others last.
fn lost_once(lost: &Gate) -> impl AsyncFn(&mut Peer) + Send + Sync + 'static {
    let (lost, count) = (lost.clone(), Board::new(0));
    async move |c: &mut Peer| {
        c.accept_websocket().await;
        if count.change(|count| std::mem::replace(count, 1)) == 0 {
            return lost.passed().await;
        }
        while c.next_frame(LIMIT).await.is_ok_and(|frame| frame.opcode != CLOSE) {}
        c.answer_close().await;
    }
}

/// What `/connections` says, as soon as its one WebSocket is so.
fn listed(t: &Scene, what: &str, test: impl Fn(&Value) -> bool) -> Value {
    let begun = std::time::Instant::now();
    loop {
        let all: Value = serde_json::from_slice(&t.proxy().get("/connections").body).expect("JSON");
        if test(&all["websockets"][0]) {
            return all;
        }
        assert!(begun.elapsed() < DEADLINE, "never {what}: {all:#}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A client that is there until it may leave.
fn stay(t: &Scene, leave: &Gate) -> Running<()> {
    let leave = leave.clone();
    t.start_client(async move |c| {
        c.handshake("/s/a?token=swordfish").await;
        leave.passed().await;
        c.send_close(1000, "").await;
        c.until_end().await.assert_closed_with(1000);
    })
}

fn tidegate(t: &Scene, arguments: &[&str]) -> String {
    let mut command = t.lab().command_in(Side::Proxy, env!("CARGO_BIN_EXE_tidegate"));
    command.args(arguments).args(["--admin", &t.proxy().admin.to_string()]);
    let output = command.output().expect("the binary");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// While a backend is looked for its WebSocket is not told to be open, but to be searched for, with all who wait; and the same key stands in the log
/// lines of its clients, in the list of them, and there. Method: two clients, a backend that ends and takes nobody any more.
#[test]
fn a_lost_one_is_searched_for() {
    let (lost, leave) = (Gate::new("the backend is lost"), Gate::new("all was asked"));
    let pool = settings("shared = 'broadcast', reconnect_grace = '45s'");
    let t = Scene::new(&pool).backend(lost_once(&lost)).start();
    let clients = [(); 2].map(|()| stay(&t, &leave));
    let backend = t.backend().address.to_string();
    let is_open = |one: &Value| one["state"] == "open" && one["clients"] == 2;
    let all = listed(&t, "open for two", |one| is_open(one));
    let one = &all["websockets"][0];
    assert_eq!((&one["route"], &one["pattern"]), (&"/s/*".into(), &"broadcast".into()), "{one}");
    assert_eq!((&one["endpoint"], &one["gaps"]), (&backend.as_str().into(), &0.into()), "{one}");
    assert_eq!((&all["shared"], &all["more_websockets"]), (&serde_json::json!([]), &0.into()), "{all}");
    let key = one["key"].as_str().expect("a key");
    assert_eq!(key.len(), 12, "{one}");
    t.proxy().log_where("a session's begin", |line| line["message"] == "open" && line["key"] == key);
    t.backend().stop_listening();
    lost.open();
    let all = listed(&t, "searched for", |one| one["state"] == "searching");
    let one = &all["websockets"][0];
    assert_eq!((&one["clients"], &one["gaps"], &one["reconnects"]), (&2.into(), &1.into(), &0.into()), "{one}");
    assert!(one["key"] == key && all["sessions"].as_array().is_some_and(|all| all.iter().all(|one| one["key"] == key)));
    let screen = tidegate(&t, &["status"]);
    let row = screen.lines().find(|line| line.contains(key)).unwrap_or_else(|| panic!("no {key} in {screen}"));
    assert!(row.starts_with("/s/*") && row.contains(" searching "), "{row}");
    let live: Value = serde_json::from_str(&tidegate(&t, &["status", "--format", "json"])).expect("JSON");
    assert_eq!(live["websockets"][0]["key"], key, "{live}");
    assert!(
        screen.contains("error: shared WebSockets whose backend was lost and is looked for: 1, with 2 clients"),
        "{screen}"
    );
    let table = tidegate(&t, &["connections"]);
    assert_eq!(table.matches(&format!(" {key} ")).count(), 2, "{table}");
    leave.open();
    for client in clients {
        client.join();
    }
    t.proxy().log_where("a session's end", |line| line["message"] == "close" && line["key"] == key);
    listed(&t, "gone", Value::is_null);
    assert!(!t.proxy().printed().iter().any(|(_, line)| line.contains("swordfish")), "the log tells a secret");
}

/// One that was lost and is found again is open again, and says how often that was.
#[test]
fn one_that_is_found_again_is_open() {
    let (lost, leave) = (Gate::new("the backend is lost"), Gate::new("all was asked"));
    let t = Scene::new(&settings("shared = 'broadcast'")).backend(lost_once(&lost)).start();
    let client = stay(&t, &leave);
    listed(&t, "open", |one| one["state"] == "open" && one["clients"] == 1);
    lost.open();
    let all = listed(&t, "open again", |one| one["state"] == "open" && one["reconnects"] == 1);
    assert_eq!(all["websockets"][0]["gaps"], 1, "{all}");
    leave.open();
    client.join();
}

/// Clients whose backend was not back in time get 1012, and their log lines say that this is why.
#[test]
fn the_log_says_that_it_was_given_up() {
    for kind in ["broadcast", "rpc"] {
        let lost = Gate::new("the backend is lost");
        let pool = format!("shared = '{kind}', reconnect_grace = '100ms'");
        let t = Scene::new(&settings(&pool)).backend(lost_once(&lost)).start();
        let client = t.start_client(async move |c| {
            c.handshake("/s/a").await;
            if kind == "rpc" {
                // Else nobody needs the backend.
                c.send_text(r#"{"jsonrpc":"2.0","id":1,"method":"a"}"#).await;
                assert!(c.read_text().await.contains("-32050"));
                c.send_text(r#"{"jsonrpc":"2.0","id":1,"method":"a"}"#).await;
            }
            assert_eq!(c.read_close().await, 1012);
            c.answer_close().await;
            assert_eq!(c.until_end().await.end, End::Fin);
        });
        listed(&t, "in use", |one| one["clients"] == 1 && (kind != "rpc" || one["outstanding"] == 1));
        t.backend().stop_listening();
        lost.open();
        client.join();
        let close = t.proxy().log_where("a session's end", |line| line["message"] == "close");
        assert_eq!(close["why"], "backend gone beyond pool.reconnect_grace", "{close}");
    }
}

/// With rpc it is told what keeps the WebSocket open, and that there is none where nobody asks.
#[test]
fn what_is_asked_is_told() {
    let free = Gate::new("the backend may answer");
    let backend = {
        let free = free.clone();
        async move |c: &mut Peer| {
            c.accept_websocket().await;
            if let Ok(frame) = c.next_frame(LIMIT).await
                && frame.opcode != CLOSE
            {
                free.passed().await;
                c.send_text(r#"{"jsonrpc":"2.0","result":0,"id":1}"#).await;
                while c.next_frame(LIMIT).await.is_ok_and(|frame| frame.opcode != CLOSE) {}
            }
            c.answer_close().await;
        }
    };
    let route = "route = [{ path = '/s/*', pool = { mode = 'shared', shared = 'rpc', idle_timeout = '0s' } }]";
    let t = Scene::new(route).backend(backend).start();
    t.client(async |c| {
        c.handshake("/s/a").await;
        let resting = listed(&t, "at rest", |one| one["state"] == "resting" && one["clients"] == 1);
        assert_eq!(resting["websockets"][0]["outstanding"], 0, "{resting}");
        c.send_text(r#"{"jsonrpc":"2.0","id":"x","method":"a"}"#).await;
        let asked = listed(&t, "asked", |one| one["state"] == "open" && one["outstanding"] == 1);
        let one = &asked["websockets"][0];
        assert_eq!((&one["pattern"], &one["subscriptions"]), (&"rpc".into(), &0.into()), "{one}");
        free.open();
        assert!(c.read_text().await.contains("\"id\":\"x\""));
        listed(&t, "at rest again", |one| one["state"] == "resting");
        c.send_close(1000, "").await;
        c.until_end().await.assert_closed_with(1000);
    });
    listed(&t, "gone", Value::is_null);
}

/// Who is turned away where a WebSocket is shared is told of with route and backend, whatever it was for: the backend is gone, or the route has as many as
/// may be.
#[test]
fn refusals_name_their_route() {
    let (kept, leave) = (Gate::new("all was asked"), Gate::new("all was asked"));
    let t = Scene::new(&settings("shared = 'broadcast', max_keys = 1")).backend(lost_once(&kept)).start();
    let client = stay(&t, &leave);
    listed(&t, "open", |one| one["state"] == "open" && one["clients"] == 1);
    t.client(async |c| assert_eq!(c.request(Message::websocket("/s/b")).await.code(), 503));
    leave.open();
    client.join();
    kept.open();
    let line = t.proxy().log_where("a refusal", |line| line["reason"] == "pool_keys");
    assert_eq!(line["route"], "/s/*", "{line}");
    let t = Scene::new(&settings("shared = 'rpc'")).start();
    t.backend().stop_listening();
    t.client(async |c| assert_eq!(c.request(Message::websocket("/s/a")).await.code(), 502));
    let line = t.proxy().log_where("a failure", |line| line["message"] == "request failed");
    let address = t.backend().address.to_string();
    assert_eq!((&line["route"], &line["endpoint"]), (&"/s/*".into(), &address.as_str().into()), "{line}");
}

/// With `authorize = "always"` a refusal of who wants to join, and a backend that can't be asked, are told apart from those of who opens: by words, by
/// the count, and in the answer. Those who are there notice nothing.
#[test]
fn who_may_not_join_is_told_apart() {
    let count = Board::new(0);
    let script = async move |c: &mut Peer| {
        // That of all, and of the first client, which is shown too.
        if count.change(|count| std::mem::replace(count, *count + 1)) > 1 {
            c.read_head().await;
            c.reply(Message::status(401, "Unauthorized", "not you")).await;
            return;
        }
        c.accept_websocket().await;
        while c.next_frame(LIMIT).await.is_ok_and(|frame| frame.opcode != CLOSE) {}
        c.answer_close().await;
    };
    let t = Scene::new(&settings("shared = 'broadcast', authorize = 'always'")).backend(script).start();
    let backend = t.backend().address.to_string();
    let leave = Gate::new("all was asked");
    let client = stay(&t, &leave);
    listed(&t, "open", |one| one["state"] == "open" && one["clients"] == 1);
    let join = || Message::websocket("/s/a?token=swordfish");
    t.client(async |c| assert_eq!(c.request(join()).await.code(), 401));
    t.backend().stop_listening();
    t.client(async |c| {
        let answer = c.request(join()).await;
        assert_eq!((answer.code(), answer.text().contains("could not be asked")), (502, true), "{answer:?}");
    });
    leave.open();
    client.join();
    let said = |what: &str| {
        let what = format!("{what} a shared WebSocket (pool.authorize)");
        let line = t.proxy().log_where(&what, |line| line["message"] == what.as_str());
        assert_eq!((&line["route"], &line["endpoint"]), (&"/s/*".into(), &backend.as_str().into()), "{line}");
    };
    said("the backend refused a client that was to join");
    said("the backend could not be asked whether a client may join");
    let metrics = t.proxy().metrics();
    for (result, count) in [("accepted", 1), ("unauthorized", 1), ("unreachable", 1), ("refused", 0)] {
        assert_eq!(metrics.count(&format!("tidegate_handshakes_total{{result=\"{result}\"}}")), count, "{result}");
    }
}

/// A refusal that is too long to be passed on to all who wait is passed on without its body, and without what is said of that.
#[test]
fn a_refusal_without_its_body_has_no_encoding() {
    let script = async |c: &mut Peer| {
        c.read_head().await;
        let answer = Message::status(403, "Forbidden", &"x".repeat(100_000));
        c.reply(answer.header("Content-Encoding", "gzip").header("Content-Type", "text/x").header("Retry-After", "7"))
            .await;
    };
    let t = Scene::new(&settings("shared = 'broadcast'")).backend(script).start();
    t.client(async |c| {
        let answer = c.request(Message::websocket("/s/a")).await;
        assert_eq!((answer.code(), answer.text().as_str(), answer.field("Retry-After")), (403, "", Some("7")));
        assert_eq!((answer.field("Content-Encoding"), answer.field("Content-Type")), (None, None), "{answer:?}");
    });
}
