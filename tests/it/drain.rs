//! The way to the end, as an operator steers it: at the admin listener, with `tidegate drain`, with signals.

use crate::harness::{
    DEADLINE, Side, backend, http::Message, lab::Running, peer::Peer, proxy::Proxy, scene::Scene, transcript::Seen,
};
use serde_json::Value;
use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::Output,
    thread,
    time::Duration,
};

/// Asks for something that changes it.
fn post(proxy: &Proxy, path: &str) -> Message {
    let request = Message::line(&format!("POST {path} HTTP/1.1")).header("Host", "localhost");
    proxy.admin(&request.header("Content-Length", "0")).unwrap_or_else(|e| panic!("POST {path}: {e}"))
}

fn status(proxy: &Proxy) -> Value {
    let response = proxy.get("/status");
    assert_eq!((response.code(), response.field("content-type")), (200, Some("application/json")));
    serde_json::from_slice(&response.body).expect("JSON")
}

fn phase(proxy: &Proxy) -> String {
    status(proxy)["phase"].as_str().expect("a phase").to_owned()
}

/// `tidegate drain`, where the proxy runs.
fn drain(t: &Scene, arguments: &[&str]) -> Output {
    let mut command = t.lab().command_in(Side::Proxy, env!("CARGO_BIN_EXE_tidegate"));
    command.args(["drain", "--admin", &t.proxy().admin.to_string()]).args(arguments);
    command.output().expect("the binary that was just built")
}

/// Ends everything now. Two signals at once would be one.
fn signal_twice(proxy: &Proxy) {
    proxy.sigterm();
    proxy.log_where("the signal", |line| line["message"] == "SIGTERM");
    proxy.sigterm();
}

/// A session that waits for its Close.
fn start_session(t: &Scene) -> Running<Seen> {
    let client = t.start_client(async move |c: &mut Peer| {
        c.handshake("/").await;
        c.read_close().await;
        c.answer_close().await;
        c.until_end().await
    });
    t.proxy().metrics_when("an open session", |metrics| metrics.get("tidegate_connections_active") > 0.0);
    client
}

/// A client that comes, is echoed and goes.
fn is_served(t: &Scene) {
    let seen = t.client(async |c| {
        c.handshake("/").await;
        c.send_text("hello").await;
        assert_eq!(c.read_text().await, "hello");
        c.send_close(1000, "").await;
        c.until_end().await
    });
    seen.assert_closed_with(1000);
}

/// Drained by an operator a process stays, so that nothing starts it again, until a signal ends it.
#[test]
fn a_drain_by_an_operator_leaves_the_process_alive() {
    let t = Scene::new("drain = { delay = '0s', window = '0s' }").start();
    let client = start_session(&t);
    assert_eq!(phase(t.proxy()), "running");
    let response = post(t.proxy(), "/drain");
    assert_eq!(response.code(), 202, "{response:?}");
    client.join().assert_closed_with(1001);
    let waited = t.proxy().get("/drain/wait");
    assert_eq!((waited.code(), waited.text().as_str()), (200, "drained\n"));
    let after = status(t.proxy());
    assert_eq!((&after["phase"], &after["sessions"], &after["accepts"]), (&"drained".into(), &0.into(), &false.into()));
    t.proxy().metrics_when("drained", |metrics| metrics.get("tidegate_drain_state") > 3.5);
    assert_eq!(t.proxy().get("/readyz").code(), 503);
    assert_eq!(t.proxy().get("/livez").code(), 200);
    assert!(t.proxy().exit_status().is_none(), "it waits for a signal");
    // Asked again it says the same, at once.
    assert_eq!(post(t.proxy(), "/drain").code(), 202);
    assert_eq!(t.proxy().get("/drain/wait").text(), "drained\n");
    t.proxy().sigterm();
    assert_eq!(t.proxy().wait_exit(DEADLINE).code(), Some(0));
    t.no_rst();
}

/// An echo that does not mind readiness probes.
async fn echo(c: &mut Peer) {
    if c.is_asked().await {
        backend::echo(c).await;
    }
}

/// Until the listeners close a drain can be undone, and nobody has noticed anything.
#[test]
fn a_drain_is_undone() {
    for (readiness, in_delay) in [("after-delay", 200), ("immediate", 503)] {
        let t = Scene::new(&format!("drain = {{ delay = '60s', readiness = '{readiness}' }}")).backend(echo).start();
        assert_eq!(post(t.proxy(), "/undrain").code(), 200, "nothing to undo is no error");
        assert_eq!(post(t.proxy(), "/drain").code(), 202);
        let first = status(t.proxy());
        assert_eq!((&first["phase"], &first["accepts"]), (&"delay".into(), &true.into()));
        assert_eq!(t.proxy().get("/readyz").code(), in_delay, "{readiness}");
        is_served(&t);
        // Asked twice it does not begin again.
        assert_eq!(post(t.proxy(), "/drain").code(), 202);
        let second = status(t.proxy());
        assert!(second["phase_left_ms"].as_u64() <= first["phase_left_ms"].as_u64(), "{first} {second}");
        assert_eq!(post(t.proxy(), "/undrain").code(), 200);
        assert_eq!(phase(t.proxy()), "running");
        assert_eq!(t.proxy().get("/readyz").code(), 200);
        is_served(&t);
        assert_eq!(t.proxy().log().iter().filter(|line| line["message"] == "draining").count(), 1);
        // And it may still be drained.
        signal_twice(t.proxy());
        assert_eq!(t.proxy().wait_exit(DEADLINE).code(), Some(0));
        t.no_rst();
    }
}

#[test]
fn it_is_too_late_to_undo_when_the_listeners_are_closed() {
    let t = Scene::new("drain = { delay = '0s', window = '60s', quiet = '60s' }").start();
    let client = start_session(&t);
    assert_eq!(post(t.proxy(), "/drain").code(), 202);
    t.proxy().log_where("the window", |line| line["message"] == "listeners close, sessions end");
    let refused = post(t.proxy(), "/undrain");
    assert_eq!(refused.code(), 409, "{refused:?}");
    assert!(refused.text().contains("too late"), "{refused:?}");
    // The first signal of a process that is drained already: it goes on as it did, and ends.
    t.proxy().sigterm();
    t.proxy().log_where("the signal", |line| line["message"] == "SIGTERM");
    assert_eq!(phase(t.proxy()), "window");
    t.proxy().sigterm();
    client.join().assert_closed_with(1001);
    assert_eq!(t.proxy().wait_exit(DEADLINE).code(), Some(0));
    t.no_rst();
}

/// SIGTERM during the drain of an operator is the first signal, not the second.
#[test]
fn a_signal_during_an_operators_drain_hurries_nobody() {
    let t = Scene::new("drain = { delay = '2s', window = '300ms' }").start();
    let client = start_session(&t);
    assert_eq!(post(t.proxy(), "/drain").code(), 202);
    t.proxy().sigterm();
    assert_eq!(post(t.proxy(), "/undrain").code(), 409, "a signal can't be taken back");
    client.join().assert_closed_with(1001);
    assert_eq!(t.proxy().wait_exit(DEADLINE).code(), Some(0));
    let hurried = |line: &Value| line["message"].as_str().is_some_and(|message| message.contains("second signal"));
    assert!(!t.proxy().log().iter().any(hurried), "{:?}", t.proxy().log());
    t.no_rst();
}

/// A backend's preStop hook waits here: as long as there is a session, and hardly at all when nobody drains.
#[test]
fn a_hook_waits_for_the_end_of_the_drain() {
    let t = Scene::new("drain = { delay = '0s', window = '60s', quiet = '60s', timeout = '60s' }").start();
    let idle = t.proxy().get("/drain/wait");
    assert_eq!((idle.code(), idle.text().as_str()), (200, "not draining\n"));
    assert_eq!(phase(t.proxy()), "running", "asking has no side effect");
    let client = start_session(&t);
    thread::scope(|scope| {
        let waits: Vec<_> = (0..2).map(|_| scope.spawn(|| t.proxy().get("/drain/wait"))).collect();
        assert_eq!(post(t.proxy(), "/drain").code(), 202);
        t.proxy().log_where("the window", |line| line["message"] == "listeners close, sessions end");
        assert_eq!(phase(t.proxy()), "window");
        assert!(waits.iter().all(|wait| !wait.is_finished()), "there is a session");
        signal_twice(t.proxy());
        // The process ends when it is drained, but not before it has said so.
        for wait in waits {
            assert_eq!(wait.join().expect("an answer").text(), "drained\n");
        }
    });
    client.join().assert_closed_with(1001);
    assert_eq!(t.proxy().wait_exit(DEADLINE).code(), Some(0));
    t.no_rst();
}

#[test]
fn the_command_drains_without_a_shell() {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let t = Scene::new("drain = { delay = '500ms', window = '0s' }").start();
    let client = start_session(&t);
    let begun = drain(&t, &["--no-wait"]);
    assert_eq!(begun.status.code(), Some(0), "{begun:?}");
    assert!(text(&begun.stdout).contains("\"phase\":\"delay\""), "{begun:?}");
    let undone = drain(&t, &["--undo"]);
    assert_eq!(undone.status.code(), Some(0), "{undone:?}");
    assert!(text(&undone.stdout).contains("\"phase\":\"running\""), "{undone:?}");
    let drained = drain(&t, &[]);
    assert_eq!(drained.status.code(), Some(0), "{drained:?}");
    assert!(text(&drained.stdout).contains("\"phase\":\"drained\""), "{drained:?}");
    client.join().assert_closed_with(1001);
    let late = drain(&t, &["--undo"]);
    assert_eq!((late.status.code(), text(&late.stdout).as_str()), (Some(1), ""));
    assert!(text(&late.stderr).contains("too late"), "{late:?}");
    t.proxy().sigterm();
    assert_eq!(t.proxy().wait_exit(DEADLINE).code(), Some(0));
    t.no_rst();
    // This one gets a RST, as from any port on which nobody listens.
    let nobody = drain(&t, &["--no-wait"]);
    assert_eq!(nobody.status.code(), Some(1), "{nobody:?}");
    assert!(text(&nobody.stderr).contains("--admin"), "{nobody:?}");
}

/// However many wait for it elsewhere, a hook in the Pod itself can wait for the end of the drain.
#[test]
fn nobody_elsewhere_takes_the_turn_of_a_hook() {
    // On an address that the clients' namespace can reach.
    let t = Scene::new("drain.delay = '1h'\nadmin.address = '0.0.0.0:0'").start();
    let address = SocketAddr::new(t.lab().address(Side::Proxy, Side::Client), t.proxy().admin.port());
    post(t.proxy(), "/drain");
    let request = Message::get("/drain/wait").set("Connection", "close").bytes();
    let held: Vec<_> = (0..80)
        .map(|_| {
            t.lab().place(Side::Client).run(|| {
                let mut stream = TcpStream::connect(address).expect("the admin listener");
                stream.write_all(&request).expect("an open connection");
                stream
            })
        })
        .collect();
    let refused = held.iter().find_map(|stream| {
        stream.set_read_timeout(Some(Duration::from_millis(50))).expect("not zero");
        let mut bytes = [0; 12];
        (&*stream).read_exact(&mut bytes).ok().map(|()| bytes)
    });
    assert_eq!(refused.as_ref(), Some(b"HTTP/1.1 503"), "64 may wait");
    let hook = thread::scope(|scope| {
        let hook = scope.spawn(|| t.proxy().get("/drain/wait"));
        post(t.proxy(), "/undrain");
        hook.join().expect("an answer")
    });
    assert_eq!((hook.code(), String::from_utf8_lossy(&hook.body).as_ref()), (200, "not draining\n"));
}

/// From another host only who has the token may begin a drain, also after it was replaced; and no log shows it.
#[test]
fn a_drain_from_elsewhere_takes_the_token() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, token: &str| {
        let path = folder.path().join(name);
        fs::write(&path, format!("{token}\n")).expect("room");
        path.display().to_string()
    };
    let (right, other) = ("the-right-one-0123", "another-one-456789");
    let (theirs, wrong) = (file("theirs", right), file("wrong", other));
    let of_the_proxy = file("token", right);
    let t =
        Scene::new(&format!("drain.delay = '1h'\nadmin = {{ address = '0.0.0.0:0', token_file = '{of_the_proxy}' }}"))
            .start();
    let admin = SocketAddr::new(t.lab().address(Side::Proxy, Side::Client), t.proxy().admin.port()).to_string();
    let ask = |arguments: &[&str]| {
        let mut command = t.lab().command_in(Side::Client, env!("CARGO_BIN_EXE_tidegate"));
        let output = command.args(["drain", "--admin", &admin]).args(arguments).output().expect("the binary");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    // On one host everybody is here.
    let is_elsewhere = t.lab().counts_are_exact();
    let refused = |arguments: &[&str], why: &str| {
        if is_elsewhere {
            let (code, said) = ask(arguments);
            assert!(code == Some(1) && said.contains(why), "{code:?} {said}");
            assert_eq!(phase(t.proxy()), "running");
        }
    };
    refused(&["--no-wait"], "Authorization: Bearer");
    refused(&["--no-wait", "--token-file", &wrong], "this is not the token");
    assert_eq!(ask(&["--no-wait", "--token-file", &theirs]), (Some(0), String::new()));
    assert_eq!(phase(t.proxy()), "delay");
    assert_eq!(ask(&["--undo", "--token-file", &theirs]).0, Some(0));
    file("token", other);
    let reloaded = post(t.proxy(), "/reload");
    assert!(reloaded.code() == 200 && reloaded.text().contains("admin.token_file"), "{reloaded:?}");
    refused(&["--no-wait", "--token-file", &theirs], "this is not the token");
    assert_eq!(ask(&["--no-wait", "--token-file", &wrong]), (Some(0), String::new()));
    let printed = t.proxy().printed();
    assert!(printed.iter().all(|(_, line)| !line.contains(right) && !line.contains(other)), "{printed:?}");
}

/// Whoever can reach the admin listener may look; a web page may not even ask.
#[test]
fn a_drain_is_not_begun_by_accident() {
    let t = Scene::new("").backend(backend::echo).start();
    let by_get = t.proxy().get("/drain");
    assert_eq!((by_get.code(), by_get.field("allow")), (405, Some("POST")));
    let of_a_page = Message::line("POST /drain HTTP/1.1").header("Host", "localhost").header("Content-Length", "0");
    let of_a_page = t.proxy().admin(&of_a_page.header("Origin", "https://example.com")).expect("an answer");
    assert_eq!(of_a_page.code(), 403, "{of_a_page:?}");
    assert_eq!(phase(t.proxy()), "running");
    is_served(&t);
    t.no_rst();
}
