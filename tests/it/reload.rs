//! The configuration, read again under way: by whom, what of it changes for whom, and that nobody is cut for it.

use crate::harness::{
    Board, DEADLINE, Frame, LIMIT, Side,
    backend::{self, Backend, Options},
    crowd::{self, Member, Stage, connect, is_strict, tally, together},
    http::Message,
    peer::Peer,
    proxy::Proxy,
    scene::Scene,
    tls::{self, Authority, Identity, Manners},
    ws::{CLOSE, TEXT},
};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::{
    cell::Cell,
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    thread,
    time::{Duration, Instant},
};
use tokio::time::interval;

/// Asks for something that changes it.
fn post(proxy: &Proxy, path: &str) -> Message {
    let request = Message::line(&format!("POST {path} HTTP/1.1")).header("Host", "localhost");
    proxy.admin(&request.header("Content-Length", "0")).unwrap_or_else(|e| panic!("POST {path}: {e}"))
}

/// What a reload at the admin listener came to.
fn reload(proxy: &Proxy) -> (u16, Value) {
    let response = post(proxy, "/reload");
    assert_eq!(response.field("content-type"), Some("application/json"), "{response:?}");
    (response.code(), serde_json::from_slice(&response.body).expect("JSON"))
}

/// The keys in one of the lists of a report.
fn keys<'a>(report: &'a Value, list: &str) -> Vec<&'a str> {
    let changes = report[list].as_array().unwrap_or_else(|| panic!("no {list} in {report}"));
    changes.iter().map(|change| change["key"].as_str().expect("a key")).collect()
}

fn has_reloaded(proxy: &Proxy, by: &str) -> Value {
    proxy.log_where(&format!("a reload by {by}"), |line| line["message"] == "reloaded" && line["by"] == by)
}

/// Whether a message of so many bytes comes back in a new session, or what it is closed with.
fn echoes(t: &Scene, bytes: usize) -> Result<(), u16> {
    t.client(async |c| {
        c.handshake("/").await;
        let result = says(c, bytes).await;
        if result.is_ok() {
            c.send_close(1000, "").await;
        } else {
            c.answer_close().await;
        }
        c.until_end().await;
        result
    })
}

async fn says(c: &mut Peer, bytes: usize) -> Result<(), u16> {
    let text = "x".repeat(bytes);
    c.send_text(&text).await;
    let frame = c.read_frame().await;
    if frame.opcode == CLOSE {
        return Err(frame.code());
    }
    assert_eq!((frame.opcode, frame.text()), (TEXT, text));
    Ok(())
}

/// An echo that does not mind readiness probes.
async fn echo(c: &mut Peer) {
    if c.is_asked().await {
        backend::echo(c).await;
    }
}

/// Asked for in any of the three ways, new sessions have the new settings, and one that is open keeps its own to its end.
#[test]
fn new_sessions_have_the_new_settings_and_old_ones_their_own() {
    for by in ["SIGHUP", "POST /reload", "a change of a file"] {
        let watch = if by == "a change of a file" { "100ms" } else { "0s" };
        let settings = |max: u32| format!("websocket.max_message = '{max}'\nreload.watch = '{watch}'");
        let t = Scene::new(&settings(1000)).start();
        let (reloaded, said) = (Board::new(false), Board::new(false));
        let client = {
            let (reloaded, said) = (reloaded.clone(), said.clone());
            t.start_client(async move |c: &mut Peer| {
                c.handshake("/").await;
                says(c, 1000).await.expect("an echo");
                said.change(|said| *said = true);
                reloaded.until(DEADLINE, |reloaded| reloaded.then_some(())).await.expect("a reload");
                says(c, 1000).await.expect("an echo");
                c.send_text(&"x".repeat(1001)).await;
                let code = c.read_close().await;
                c.answer_close().await;
                c.until_end().await;
                code
            })
        };
        said.wait(DEADLINE, |said| said.then_some(())).expect("an open session");
        t.proxy().configure(&settings(500));
        match by {
            "SIGHUP" => t.proxy().signal(Signal::HUP),
            "POST /reload" => {
                let (code, report) = reload(t.proxy());
                // A frame is a part of a message.
                assert_eq!(
                    (code, keys(&report, "applied")),
                    (200, vec!["websocket.max_message", "websocket.max_frame"])
                );
                assert_eq!((&report["result"], &report["rejected"]), (&json!("applied"), &json!([])));
                let change = json!({"key": "websocket.max_message", "from": "1000", "to": "500"});
                assert_eq!((&report["applied"][0], &report["restart_required"]), (&change, &json!([])));
            }
            _ => {}
        }
        let line = has_reloaded(t.proxy(), by);
        assert!(
            line["applied"].as_str().is_some_and(|keys| keys.contains("websocket.max_message: \"1000\" -> \"500\""))
        );
        assert_eq!((echoes(&t, 501), echoes(&t, 500)), (Err(1009), Ok(())), "{by}");
        reloaded.change(|reloaded| *reloaded = true);
        assert_eq!(client.join(), 1009, "its limit is the old one");
        let metrics = t.proxy().metrics();
        assert_eq!(metrics.count("tidegate_reloads_total{result=\"applied\"}"), 1);
        assert_eq!(metrics.count("tidegate_config_last_reload_successful"), 1);
        t.no_rst();
    }
}

/// New sessions go to the new backend, also those of a connection that is kept alive; readiness speaks of the new one at once;
/// and who is with the old one stays there.
#[test]
fn new_sessions_go_to_the_new_backend() {
    let t = Scene::new("reload.watch = '0s'").backend(echo).start();
    let other = Backend::start(t.lab(), Options::default(), async |c: &mut Peer| {
        while c.is_asked().await {
            let request = c.read_head().await;
            if request.field("Upgrade").is_none() {
                c.reply(Message::status(200, "OK", "the other")).await;
                continue;
            }
            c.reply(Message::switching(&request)).await;
            c.send_text("the other").await;
            return backend::echo_on(c).await;
        }
    });
    let (reloaded, said) = (Board::new(false), Board::new(false));
    let client = {
        let (reloaded, said) = (reloaded.clone(), said.clone());
        t.start_client(async move |c: &mut Peer| {
            c.handshake("/").await;
            says(c, 1).await.expect("an echo");
            said.change(|said| *said = true);
            reloaded.until(DEADLINE, |reloaded| reloaded.then_some(())).await.expect("a reload");
            says(c, 2).await.expect("an echo");
            c.send_close(1000, "").await;
            c.until_end().await
        })
    };
    said.wait(DEADLINE, |said| said.then_some(())).expect("an open session");
    t.proxy().configure(&format!("reload.watch = '0s'\nupstream.address = '{}'", other.address));
    let (code, report) = reload(t.proxy());
    assert_eq!((code, keys(&report, "applied")), (200, vec!["upstream.address"]));
    let kept_alive = t.client(async |c| {
        c.handshake("/").await;
        let text = c.read_text().await;
        c.send_close(1000, "").await;
        c.until_end().await;
        text
    });
    assert_eq!(kept_alive, "the other");
    reloaded.change(|reloaded| *reloaded = true);
    client.join().assert_closed_with(1000);
    assert_eq!((t.backend().count(), other.count()), (1, 1));

    t.backend().stop_listening();
    assert_eq!(t.proxy().get("/readyz").code(), 200);
    other.stop_listening();
    assert_eq!(t.proxy().get("/readyz").code(), 200, "what was found is kept for a while");
    t.proxy().configure("reload.watch = '0s'");
    assert_eq!(reload(t.proxy()).0, 200);
    assert_eq!(t.proxy().get("/readyz").code(), 503, "but only of this backend");
}

/// On a connection that is kept alive, each request goes where new ones go at its time.
#[test]
fn a_connection_that_is_kept_alive_changes_with_its_next_request() {
    let named = |name: &'static str| {
        async move |c: &mut Peer| {
            if c.is_asked().await {
                c.read_head().await;
                c.reply(Message::status(200, "OK", name)).await;
            }
        }
    };
    let t = Scene::new("reload.watch = '0s'").backend(named("one")).start();
    let other = Backend::start(t.lab(), Options::default(), named("other"));
    let (reloaded, said) = (Board::new(false), Board::new(false));
    let client = {
        let (reloaded, said) = (reloaded.clone(), said.clone());
        t.start_client(async move |c: &mut Peer| {
            let first = c.request(Message::get("/")).await.text();
            said.change(|said| *said = true);
            reloaded.until(DEADLINE, |reloaded| reloaded.then_some(())).await.expect("a reload");
            (first, c.request(Message::get("/")).await.text())
        })
    };
    said.wait(DEADLINE, |said| said.then_some(())).expect("an answer");
    t.proxy().configure(&format!("reload.watch = '0s'\nupstream.address = '{}'", other.address));
    assert_eq!(reload(t.proxy()).0, 200);
    reloaded.change(|reloaded| *reloaded = true);
    assert_eq!(client.join(), ("one".to_owned(), "other".to_owned()));
    t.no_rst();
}

/// Of an invalid file nothing is taken, also not what is right in it; the answer, the log and the metrics say so, with the place
/// and the fix.
#[test]
fn an_invalid_file_changes_nothing() {
    let settings = "reload.watch = '0s'\nwebsocket.max_message = '1000'\n";
    let t = Scene::new(settings).start();
    let good = t.proxy().configuration(settings);
    let bad =
        good.replace("max_message = \"1000\"", "max_message = \"500\"\nping_intervall = \"1s\"\npong_timeout = 7");
    assert_ne!(good, bad);
    fs::write(t.proxy().config(), &bad).expect("room");
    let (code, report) = reload(t.proxy());
    assert_eq!((code, &report["result"]), (422, &json!("rejected")), "{report}");
    assert_eq!(keys(&report, "rejected"), ["websocket.max_message", "websocket.max_frame", "websocket.pong_timeout"]);
    assert_eq!((keys(&report, "applied"), keys(&report, "restart_required")), (vec![], vec![]));
    let findings = report["findings"].as_array().expect("a list");
    assert_eq!(findings.len(), 2, "{report}");
    let line = bad.lines().position(|line| line.starts_with("ping_intervall")).expect("it is there") + 1;
    let place = format!("{}:{line}:1", t.proxy().config().display());
    let of_key = findings.iter().find(|finding| finding["place"] == place.as_str()).expect("its place");
    assert!(of_key["fix"].as_str().is_some_and(|fix| fix.contains("ping_interval")), "{of_key}");
    // As it is said to whoever checks the file.
    let mut check = t.lab().command_in(Side::Proxy, env!("CARGO_BIN_EXE_tidegate"));
    let checked = check.args(["check", "-c"]).arg(t.proxy().config()).output().expect("the binary that was just built");
    let said: Vec<_> = findings.iter().map(|finding| finding["text"].as_str().expect("a text")).collect();
    assert_eq!(String::from_utf8_lossy(&checked.stderr).trim_end(), said.join("\n\n"));
    t.proxy().log_where("the finding", |line| line["finding"].as_str().is_some_and(|text| text.contains(&place)));
    assert_eq!((echoes(&t, 1000), echoes(&t, 1001)), (Ok(()), Err(1009)));
    let metrics = t.proxy().metrics();
    assert_eq!(metrics.count("tidegate_reloads_total{result=\"rejected\"}"), 1);
    assert_eq!(metrics.count("tidegate_config_last_reload_successful"), 0);

    // A file that is gone is none that says nothing.
    fs::remove_file(t.proxy().config()).expect("it is there");
    let (code, report) = reload(t.proxy());
    assert_eq!((code, &report["rejected"]), (422, &json!([])), "{report}");
    assert_eq!(echoes(&t, 1001), Err(1009));

    let by_command = || {
        let mut command = t.lab().command_in(Side::Proxy, env!("CARGO_BIN_EXE_tidegate"));
        let output = command.args(["reload", "--admin", &t.proxy().admin.to_string()]).output();
        let output = output.expect("the binary that was just built");
        let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).expect("UTF-8"));
        (output.status.code(), stdout, stderr)
    };
    let (code, stdout, stderr) = by_command();
    assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
    assert!(stderr.contains("nothing has changed") && stderr.contains("no such configuration file"), "{stderr}");
    fs::write(t.proxy().config(), good).expect("room");
    let (code, stdout, stderr) = by_command();
    let report: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!((code, &report["result"], stderr.as_str()), (Some(0), &json!("applied"), ""));
    let metrics = t.proxy().metrics();
    assert_eq!(metrics.count("tidegate_reloads_total{result=\"rejected\"}"), 3);
    assert_eq!(metrics.count("tidegate_config_last_reload_successful"), 1);
    t.no_rst();
}

/// What takes a restart is said each time until there is one, and changes nothing; the rest of the file is taken.
#[test]
fn what_takes_a_restart_is_said_and_left() {
    let t = Scene::new("reload.watch = '0s'").start();
    t.proxy().configure(
        "reload.watch = '0s'\nlisten.backlog = 77\nlimits.max_connections = 1\nadmin.address = 'off'\nwebsocket.max_message = '500'",
    );
    for applied in [vec!["websocket.max_message", "websocket.max_frame"], vec![]] {
        let (code, report) = reload(t.proxy());
        assert_eq!((code, keys(&report, "applied")), (200, applied));
        assert_eq!(keys(&report, "restart_required"), ["listen.backlog", "limits.max_connections", "admin.address"]);
        assert_eq!(t.proxy().metrics().count("tidegate_config_restart_required_keys"), 3);
    }
    assert!(t.proxy().metrics().get("tidegate_max_connections") > 1.5);
    assert_eq!(echoes(&t, 501), Err(1009));
    // What can't be used on this host can't be seen from the file.
    t.proxy().configure("reload.watch = '0s'\nupstream.source_addresses = ['192.0.2.1']");
    let (code, report) = reload(t.proxy());
    assert_eq!(code, 422, "{report}");
    assert!(keys(&report, "rejected").contains(&"upstream.source_addresses"), "{report}");
    // As it was.
    t.proxy().configure("reload.watch = '0s'");
    let (code, report) = reload(t.proxy());
    assert_eq!((code, keys(&report, "restart_required")), (200, vec![]));
    assert_eq!(t.proxy().metrics().count("tidegate_config_restart_required_keys"), 0);
    t.no_rst();
}

/// The log's filter and the pace of handshakes change, too.
#[test]
fn filters_and_rates_are_applied() {
    let t = Scene::new("reload.watch = '0s'\nlog.filter = 'info'").start();
    t.proxy().configure(
        "reload.watch = '0s'\nlog.filter = 'warn'\nlimits.handshakes_per_second = 1\nlimits.handshake_delay = '0s'",
    );
    let (code, report) = reload(t.proxy());
    let expected = ["limits.handshakes_per_second", "limits.handshake_delay", "log.filter"];
    assert_eq!((code, keys(&report, "applied")), (200, expected.to_vec()));
    let codes = t.clients(3, async |c: &mut Peer| {
        let answer = c.request(Message::websocket("/")).await.code();
        if answer == 101 {
            c.send_close(1000, "").await;
            c.until_end().await;
        }
        answer
    });
    assert_eq!(tally(codes), BTreeMap::from([(101, 1), (503, 2)]));
    t.proxy().configure("reload.watch = '0s'\nlog.filter = 'info'");
    assert_eq!(reload(t.proxy()).0, 200);
    assert_eq!(echoes(&t, 1), Ok(()));
    t.proxy().log_where("the last session", |line| line["message"] == "close");
    let opened = t.proxy().log().iter().filter(|line| line["message"] == "open").count();
    assert_eq!(opened, 1, "lines that were filtered out: {:?}", t.proxy().log());
    t.no_rst();
}

/// Socket buffers of both legs are those of the time at which a session begins; and autotuning can be had back.
#[test]
fn buffers_are_applied() {
    let settings = |size: &str| format!("reload.watch = '0s'\nwebsocket.recv_buffer = '{size}'");
    let t = Scene::new(&settings("64KiB")).start();
    if !t.lab().counts_are_exact() {
        return;
    }
    // The kernel doubles what it is told.
    let doubled = |kib: usize| format!(",rb{},", kib * 2 * 1024);
    let of_size = |size: usize| {
        let output = t.lab().command_in(Side::Proxy, "ss").args(["-tnmOH", "state", "established"]).output();
        let text = String::from_utf8_lossy(&output.expect("ss is where ip is").stdout).into_owned();
        text.lines().filter(|line| line.contains(&doubled(size))).count()
    };
    let mut clients = Vec::new();
    for (index, size) in [64, 32].into_iter().enumerate() {
        if index > 0 {
            t.proxy().configure(&settings(&format!("{size}KiB")));
            assert_eq!(reload(t.proxy()).0, 200);
        }
        clients.push(t.start_client(async move |c: &mut Peer| {
            c.handshake("/").await;
            c.read_close().await;
            c.answer_close().await;
            c.until_end().await
        }));
        let sessions = index + 1;
        t.proxy()
            .metrics_when("its session", |metrics| metrics.count("tidegate_connections_active") == sessions as u64);
        assert_eq!((of_size(64), of_size(32)), (2, 2 * index));
    }
    t.proxy().configure(&settings("0"));
    assert_eq!(reload(t.proxy()).0, 200);
    let warned = |line: &Value| line["message"].as_str().is_some_and(|text| text.contains("old socket options"));
    assert!(!t.proxy().log().iter().any(warned), "{:?}", t.proxy().log());
    t.proxy().sigterm();
    t.proxy().log_where("the signal", |line| line["message"] == "SIGTERM");
    t.proxy().sigterm();
    for client in clients {
        client.join().assert_closed_with(1001);
    }
    assert_eq!(t.proxy().wait_exit(DEADLINE).code(), Some(0));
    t.no_rst();
}

/// While a drain waits for its delay clients are served as ever, so a reload is as ever; its own times stay, unless it is undone.
/// When the listeners close it is too late: nobody would have the new settings.
#[test]
fn a_reload_during_a_drain() {
    let t = Scene::new("reload.watch = '0s'\ndrain = { delay = '60s', reason = 'old' }").start();
    assert_eq!(post(t.proxy(), "/drain").code(), 202);
    let settings = "reload.watch = '0s'\nwebsocket.max_message = '500'\n\
                    drain = { delay = '0s', window = '60s', quiet = '60s', reason = 'new' }";
    t.proxy().configure(settings);
    let (code, report) = reload(t.proxy());
    assert_eq!((code, &report["result"]), (200, &json!("applied")), "{report}");
    assert_eq!(echoes(&t, 501), Err(1009));
    let status: Value = serde_json::from_slice(&t.proxy().get("/status").body).expect("JSON");
    assert_eq!(status["phase"], "delay", "its own delay is 60 s");
    assert!(status["phase_left_ms"].as_u64() > Some(20_000), "{status}");
    assert_eq!(post(t.proxy(), "/undrain").code(), 200);

    let client = t.start_client(async move |c: &mut Peer| {
        c.handshake("/").await;
        c.read_close().await;
        c.answer_close().await;
        c.until_end().await
    });
    t.proxy().metrics_when("an open session", |metrics| metrics.get("tidegate_connections_active") > 0.0);
    assert_eq!(post(t.proxy(), "/drain").code(), 202);
    // The new delay.
    t.proxy().log_where("the window", |line| line["message"] == "listeners close, sessions end");
    t.proxy().configure("reload.watch = '0s'\ndrain.reason = 'newest'");
    let (code, report) = reload(t.proxy());
    assert_eq!((code, &report["result"]), (409, &json!("refused")), "{report}");
    t.proxy().signal(Signal::HUP);
    t.proxy().log_where("the refusal", |line| line["message"] == "no reload" && line["by"] == "SIGHUP");
    t.proxy().sigterm();
    t.proxy().log_where("the signal", |line| line["message"] == "SIGTERM");
    t.proxy().sigterm();
    let seen = client.join();
    seen.assert_closed_with(1001);
    assert_eq!(seen.frames.last().expect("a Close").text(), "new");
    assert_eq!(t.proxy().wait_exit(DEADLINE).code(), Some(0));
    t.no_rst();
}

/// The directory of a Kubernetes config map: the file is a symlink into `..data`, which is a symlink to a directory that is put in the place of the
/// one before. A file that is being written is left alone until it stands still.
#[test]
fn a_config_map_is_swapped() {
    let settings = |max: u32| format!("websocket.max_message = '{max}'\nreload.watch = '100ms'");
    let t = Scene::new(&settings(1000)).start();
    let file = t.proxy().config();
    let folder = file.parent().expect("a folder");
    let swap = |name: &str, text: &str| {
        fs::create_dir(folder.join(name)).expect("a folder");
        fs::write(folder.join(name).join("proxy.toml"), text).expect("room");
        symlink(name, folder.join("..data_tmp")).expect("a link");
        fs::rename(folder.join("..data_tmp"), folder.join("..data")).expect("the same folder");
    };
    swap("..2026_1", &t.proxy().configuration(&settings(1000)));
    symlink("..data/proxy.toml", folder.join("link")).expect("a link");
    fs::rename(folder.join("link"), &file).expect("the same folder");
    swap("..2026_2", &t.proxy().configuration(&settings(500)));
    fs::remove_dir_all(folder.join("..2026_1")).expect("it is there");
    let line = has_reloaded(t.proxy(), "a change of a file");
    assert_eq!((line["restart_required"].as_str(), echoes(&t, 501)), (Some(""), Err(1009)), "{line}");
    swap("..2026_3", "[websocket]\nmax_message = 0\n");
    fs::remove_dir_all(folder.join("..2026_2")).expect("it is there");
    let rejected = t.proxy().log_where("the rejection", |line| !line["rejected"].is_null());
    assert_eq!(rejected["by"], "a change of a file");
    assert_eq!(echoes(&t, 500), Ok(()));
    // Said once, and not with each look.
    swap("..2026_4", &t.proxy().configuration(&settings(700)));
    t.proxy().log_where("the third", |line| {
        line["applied"].as_str().is_some_and(|keys| keys.contains("websocket.max_message: \"500\" -> \"700\""))
    });
    let metrics = t.proxy().metrics();
    let results =
        ["applied", "rejected"].map(|result| metrics.count(&format!("tidegate_reloads_total{{result=\"{result}\"}}")));
    assert_eq!(results, [2, 1]);
    t.no_rst();
}

/// A client that talks until it is told to stop: everything comes back, in order.
async fn talk(mut client: Member, pace: Duration, is_over: &Cell<bool>) -> (u64, String) {
    let (mut sent, mut echoed, mut pace) = (0_u64, 0_u64, interval(pace));
    while !is_over.get() || echoed < sent {
        tokio::select! {
            frame = client.frame() => {
                let frame = frame.unwrap_or_else(|end| panic!("{end:?} without a Close"));
                assert_eq!((frame.opcode, frame.text()), (TEXT, echoed.to_string()));
                echoed += 1;
            }
            _ = pace.tick(), if !is_over.get() => {
                client.send(&Frame::text(&sent.to_string())).await.expect("an open session");
                sent += 1;
            }
        }
    }
    client.send(&Frame::close(1000, "")).await.expect("an open session");
    (echoed, client.rest().await.summary())
}

/// Reload after reload while everybody talks, and new clients come and go: no message is lost, nobody is closed, and what a reload
/// leaves behind does not add up. With `TIDEGATE_STRICT=1`: 1,000 of them under 1,000 sessions.
#[test]
fn reloads_under_busy_sessions() {
    let (count, reloads): (usize, u64) = if is_strict() { (1000, 1000) } else { (200, 100) };
    // Enough of them that the allocator has what it needs.
    let settled = reloads / 4;
    let stage = Stage::new();
    let backend = stage.backend(crowd::echo);
    let t = stage.tidegate("reload.watch = '0s'", backend.address);
    let is_over = Board::new(false);
    let reloading = || {
        let mut resident = 0;
        let begun = Instant::now();
        for index in 0..reloads {
            // Something of everything that can be replaced.
            t.configure(&format!(
                "log.filter = 'info'\nreload.watch = '0s'\nclose.linger = '10s'\n\
                 websocket = {{ max_message = '{}KiB', recv_buffer = '{}KiB' }}\nclose.delay = '{}ms'\n\
                 upstream = {{ max_pending = {}, max_waiting = {} }}\nlimits.handshakes_per_second = {}\ndrain.window = '{}ms'",
                64 + index % 3,
                64 + index % 5,
                50 + index % 7,
                32 + index % 11,
                1000 + index % 13,
                5000 + index % 17,
                index,
            ));
            let (code, report) = reload(&t);
            assert_eq!((code, keys(&report, "restart_required")), (200, vec![]), "{report}");
            assert!(keys(&report, "applied").len() >= 6, "{report}");
            if index + 1 == settled {
                resident = t.resident();
            }
        }
        (begun.elapsed(), resident, t.resident())
    };
    let has_begun = Board::new(false);
    let begun = |of: &Board<bool>| of.wait(DEADLINE, |begun| begun.then_some(())).expect("clients that talk");
    let ((took, before, after), talks, visits) = thread::scope(|scope| {
        let reloading = scope.spawn(|| {
            begun(&has_begun);
            let outcome = catch_unwind(AssertUnwindSafe(reloading));
            is_over.change(|is_over| *is_over = true);
            outcome.unwrap_or_else(|panic| resume_unwind(panic))
        });
        // Apart from the others, which keep a thread busy.
        let visiting = scope.spawn(|| {
            begun(&has_begun);
            stage.clients(async || {
                let mut visits = Vec::new();
                while is_over.until(Duration::from_millis(20), |is_over| is_over.then_some(())).await.is_none() {
                    let begun = Instant::now();
                    let mut visitor = connect(t.address, 1).await.pop().expect("there is one");
                    visitor.send(&Frame::text("hello")).await.expect("an open session");
                    assert_eq!(visitor.frame().await.expect("an echo").text(), "hello");
                    visitor.send(&Frame::close(1000, "")).await.expect("an open session");
                    assert_eq!(visitor.rest().await.summary(), "Close 1000, Fin");
                    visits.push(begun.elapsed());
                }
                visits
            })
        });
        let talks = stage.clients(async || {
            let clients = connect(t.address, count).await;
            has_begun.change(|begun| *begun = true);
            let (over, paces) = (Cell::new(false), Cell::new(0));
            let talking = together(clients, async |client| {
                // From 100 to 200 ms, so that they do not speak in unison.
                let pace = paces.replace((paces.get() + 1) % 101);
                talk(client, Duration::from_millis(100 + pace), &over).await
            });
            let ending = async {
                is_over.until(LIMIT, |is_over| is_over.then_some(())).await.expect("the last reload");
                over.set(true);
            };
            tokio::join!(talking, ending).0
        });
        let reloads = reloading.join().unwrap_or_else(|panic| resume_unwind(panic));
        (reloads, talks, visiting.join().unwrap_or_else(|panic| resume_unwind(panic)))
    });
    let longest = visits.iter().max().copied().unwrap_or_default();
    let messages: u64 = talks.iter().map(|(echoed, _)| echoed).sum();
    assert_eq!(tally(talks.into_iter().map(|(_, end)| end)), BTreeMap::from([("Close 1000, Fin".to_owned(), count)]));
    assert_eq!(t.metrics().count("tidegate_reloads_total{result=\"applied\"}"), reloads);
    println!(
        "{reloads} reloads in {took:.1?} under {count} sessions: {messages} messages, all answered; {} came and went, in {longest:.1?} at most; \
         {} KiB of memory after {settled} reloads, {} KiB after the last",
        visits.len(),
        before / 1024,
        after / 1024,
    );
    assert!(after <= before + (2 << 20), "{before} bytes after {settled} reloads, {after} in the end");
    t.assert_nothing_left();
    t.assert_no_rst();
}

/// A Kubernetes secret with our certificate and key, which the configuration names after a while: when its directory is swapped that is
/// a reload, without a change of the configuration. A key that does not fit changes nothing, and is spoken of once.
#[test]
fn a_secret_is_swapped() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (good, bad) = (authority.sign("tidegate.test"), stranger.sign("tidegate.test"));
    let of_tls = format!("{}reload.watch = '100ms'\n", tls::settings(&authority));
    let t = Scene::new(&of_tls).tls(Manners::asking(authority)).backend(echo).start();
    let folder = t.proxy().config().parent().expect("a folder").join("secret");
    fs::create_dir(&folder).expect("a folder");
    let swap = |name: &str, certificate: &Identity, key: &Identity| {
        let new = folder.join(name);
        fs::create_dir(&new).expect("a folder");
        fs::copy(&certificate.certificate_file, new.join("tls.crt")).expect("room");
        fs::copy(&key.key_file, new.join("tls.key")).expect("room");
        symlink(name, folder.join("..data_tmp")).expect("a link");
        fs::rename(folder.join("..data_tmp"), folder.join("..data")).expect("the same folder");
    };
    let served = || {
        t.client(async |c| {
            let code = c.request(Message::websocket("/")).await.code();
            if code == 101 {
                c.send_close(1000, "").await;
                c.until_end().await;
            }
            code
        })
    };
    let reloads = |result: &'static str, count: u64| {
        let name = format!("tidegate_reloads_total{{result=\"{result}\"}}");
        t.proxy().metrics_when(&format!("{name} {count}"), |metrics| metrics.count(&name) == count);
    };
    assert_eq!(served(), 502, "it asks for a certificate");

    swap("..2026_1", &bad, &bad);
    for file in ["tls.crt", "tls.key"] {
        symlink(format!("..data/{file}"), folder.join(file)).expect("a link");
    }
    let file = |name: &str| folder.join(name).display().to_string();
    t.proxy().configure(&format!(
        "{of_tls}upstream.tls_client_certificate = '{}'\nupstream.tls_client_key = '{}'\n",
        file("tls.crt"),
        file("tls.key")
    ));
    reloads("applied", 1);
    assert_eq!(served(), 502, "it does not believe that one");
    swap("..2026_2", &good, &good);
    fs::remove_dir_all(folder.join("..2026_1")).expect("it is there");
    reloads("applied", 2);
    assert_eq!(served(), 101);
    swap("..2026_3", &good, &bad);
    reloads("rejected", 1);
    assert_eq!(served(), 101);
    swap("..2026_4", &good, &good);
    reloads("applied", 3);
    assert_eq!(served(), 101);
    reloads("rejected", 1);
    let by_change = |line: &Value| line["message"] == "reloaded" && line["by"] == "a change of a file";
    assert_eq!(t.proxy().log().into_iter().filter(by_change).count(), 3);
    t.no_rst();
}
