//! WebSockets that share connections of HTTP/2 to their backend (RFC 8441): what the backend gets to see, who shares with whom,
//! and what clients notice of backends that can't do that or misbehave, which is nothing as far as possible.
//!
//! How sessions end on streams is in `close_table.rs`, row by row.

use crate::harness::{
    DEADLINE, Gate, Message, Peer, Scene, Side, backend,
    front::{Greets, Manners, Treat},
    proxy::Metrics,
    scene::Dial,
    transcript::End,
};
use h2::Reason;
use std::{fs, sync::Arc, time::Duration};

const ONE_WORKER: &str = "listen.workers = 1\npool = { mode = 'multiplexed', idle_timeout = '0s' }\n";

/// With these settings of `[pool]` too.
fn one_worker(pool: &str) -> String {
    format!("listen.workers = 1\npool = {{ mode = 'multiplexed', idle_timeout = '0s', {pool} }}\n")
}

fn treating(treat: impl Fn(usize) -> Treat + Send + Sync + 'static) -> Manners {
    Manners { treat: Arc::new(treat), ..Manners::default() }
}

fn greeting(greets: impl Fn(usize) -> Greets + Send + Sync + 'static) -> Manners {
    Manners { greets: Arc::new(greets), ..Manners::default() }
}

/// What a client is answered that comes to nothing.
fn refusal(t: &Scene) -> Message {
    t.client(async |c| c.request(Message::websocket("/")).await)
}

/// While a session is open, and after it has been told that the backend takes WebSockets.
fn beside_a_session(t: &Scene, others: impl FnOnce()) {
    let (opened, gone) = (Gate::new("the session is open"), Gate::new("the others have been served"));
    let (open, go_on) = (opened.clone(), gone.clone());
    let session = t.start_client(async move |c| {
        c.handshake("/").await;
        says(c, "before").await;
        open.open();
        go_on.passed().await;
        says(c, "after").await;
        bye(c).await;
    });
    opened.pass();
    others();
    gone.open();
    session.join();
}

/// The log says that the backend can't.
fn is_left_in_peace(t: &Scene) -> bool {
    let said = |line: &serde_json::Value| line["message"].as_str().is_some_and(|text| text.contains("of its own to"));
    t.proxy().log().iter().any(said)
}

/// The same, as soon as it is there.
fn until_left_in_peace(t: &Scene) {
    t.proxy()
        .log_where("that it can't", |line| line["message"].as_str().is_some_and(|text| text.contains("of its own to")));
}

async fn says(c: &mut Peer, text: &str) {
    c.send_text(text).await;
    assert_eq!(c.read_text().await, text);
}

async fn bye(c: &mut Peer) {
    c.send_close(1000, "").await;
    c.until_end().await.assert_closed_with(1000);
}

/// A session that goes as it should.
fn visit(t: &Scene) {
    t.client(async |c| {
        c.handshake("/").await;
        says(c, "hello").await;
        bye(c).await;
    });
}

/// The handshake crosses as RFC 8441 5 has it: its own header fields stay behind, everything else arrives, and the client gets
/// the accept key that it needs.
#[test]
fn a_handshake_is_bridged() {
    let t = Scene::new(ONE_WORKER)
        .backend(async |c: &mut Peer| {
            let request = c.read_head().await;
            c.reply(Message::switching(&request).header("Sec-WebSocket-Protocol", "chat").header("X-From", "app"))
                .await;
            backend::echo_on(c).await;
        })
        .front(Manners::default())
        .start();
    t.client(async |c| {
        let request = Message::websocket("/where?to=there").header("Sec-WebSocket-Protocol", "chat, talk");
        let head = c.handshake_with(request.header("Cookie", "a=b")).await;
        assert_eq!((head.field("Sec-WebSocket-Protocol"), head.field("X-From")), (Some("chat"), Some("app")));
        says(c, "hello").await;
        bye(c).await;
    });
    let (line, fields) = t.front().seen().request.expect("a stream");
    assert_eq!(line, "CONNECT http://tidegate.test/where?to=there");
    let field = |name: &str| fields.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
    for (name, value) in [
        ("connection", None),
        ("upgrade", None),
        ("sec-websocket-key", None),
        ("host", None),
        ("sec-websocket-version", Some("13")),
        ("sec-websocket-protocol", Some("chat, talk")),
        ("cookie", Some("a=b")),
        ("x-forwarded-host", Some("tidegate.test")),
    ] {
        assert_eq!(field(name), value, "{name}: {fields:?}");
    }
    t.no_rst();
}

/// A backend whose front doesn't speak HTTP/2, says nothing, or has no extended CONNECT, or fails at it: the client gets its
/// session over HTTP/1.1, and so does the next one without another try; the log says so once.
#[test]
fn backends_that_cannot_are_left_in_peace() {
    const FAILS: &str = "it advertises extended CONNECT (RFC 8441) and fails at it";
    const CLOSES: &str = "it advertises extended CONNECT (RFC 8441) and does not answer it";
    for (manners, label, why) in [
        (greeting(|_| Greets::Http400), "no_http2", "it does not speak HTTP/2"),
        (greeting(|_| Greets::Garbage), "no_http2", "it does not speak HTTP/2"),
        (greeting(|_| Greets::Fin), "closed", "it ends connections of HTTP/2 before its SETTINGS"),
        (greeting(|_| Greets::Nothing), "no_settings", "it sent no HTTP/2 SETTINGS within 2s"),
        (
            Manners { advertises: false, ..Manners::default() },
            "no_extension",
            "its HTTP/2 has no extended CONNECT (RFC 8441)",
        ),
        (treating(|_| Treat::Status(500)), "fails", FAILS),
        (treating(|_| Treat::Page), "fails", FAILS),
        (treating(|_| Treat::Reset(Reason::PROTOCOL_ERROR)), "fails", FAILS),
        (treating(|_| Treat::Reset(Reason::HTTP_1_1_REQUIRED)), "fails", FAILS),
        (treating(|_| Treat::Close), "unanswered", CLOSES),
    ] {
        let t = Scene::new(ONE_WORKER).front(manners).start();
        for _ in 0..3 {
            visit(&t);
        }
        let seen = t.front().seen();
        assert_eq!((seen.streams.len(), seen.plain), (1, 3), "{why}: {seen:?}");
        let said = |line: &serde_json::Value| {
            line["message"] == "each WebSocket gets a connection of its own to this backend" && line["why"] == why
        };
        t.proxy().log_where(why, said);
        assert_eq!(t.proxy().log().into_iter().filter(said).count(), 1);
        let metrics = t.proxy().metrics();
        for (label, count) in [(label, 1), ("known", 2)] {
            assert_eq!(metrics.count(&format!("tidegate_pool_fallbacks_total{{why=\"{label}\"}}")), count, "{label}");
        }
        let way = |line: &serde_json::Value| line["message"] == "close" && line["way"] == "dedicated";
        let begun = std::time::Instant::now();
        // A line may be behind the end that it tells of.
        while t.proxy().log().into_iter().filter(way).count() < 3 {
            assert!(begun.elapsed() < DEADLINE, "not three sessions of their own");
            std::thread::sleep(Duration::from_millis(5));
        }
        t.no_rst();
    }
}

/// A backend that is not there gives 502, as it does without streams, and is found when it is back; nothing is remembered.
#[test]
fn an_unreachable_backend_is_not_taken_for_an_old_one() {
    let t = Scene::new(ONE_WORKER).start();
    t.backend().stop_listening();
    t.client(async |c| assert_eq!(c.request(Message::websocket("/")).await.code(), 502));
    assert!(!is_left_in_peace(&t));
}

/// A connection that ends before its SETTINGS may be one of a backend that is being restarted: while that has shared, it is a
/// connect that failed; otherwise HTTP/1.1 is tried, and says whether there is anything to be remembered.
#[test]
fn an_early_end_is_no_proof() {
    let t = Scene::new(ONE_WORKER).front(greeting(|nth| if nth == 1 { Greets::Fin } else { Greets::Settings })).start();
    visit(&t);
    t.front().seen_when("the end of its connection", |seen| seen.ended.len() == 1);
    assert_eq!(refusal(&t).code(), 502);
    std::thread::sleep(Duration::from_millis(60));
    visit(&t);
    let seen = t.front().seen();
    assert_eq!((seen.streams, seen.plain, is_left_in_peace(&t)), (vec![1, 0, 1], 0, false));

    let t = Scene::new(ONE_WORKER)
        .backend(async |c: &mut Peer| {
            let request = c.read_head().await;
            if request.target() == "/none" {
                c.reply(Message::status(403, "Forbidden", "")).await;
                c.fin().await;
                c.until_end().await;
            } else {
                c.reply(Message::switching(&request)).await;
                backend::echo_on(c).await;
            }
        })
        .front(greeting(|nth| if nth == 0 { Greets::Fin } else { Greets::Settings }))
        .start();
    t.client(async |c| assert_eq!(c.request(Message::websocket("/none")).await.code(), 403));
    std::thread::sleep(Duration::from_millis(60));
    visit(&t);
    let seen = t.front().seen();
    assert_eq!((seen.streams, seen.plain, is_left_in_peace(&t)), (vec![0, 1], 1, false));
}

/// One that advertises it and answers nothing costs one client its wait, and not each that comes.
#[test]
fn a_backend_without_an_answer_is_left_in_peace() {
    let settings = format!("{ONE_WORKER}upstream.handshake_timeout = '300ms'\n");
    let t = Scene::new(&settings).front(treating(|_| Treat::Silence)).start();
    assert_eq!(refusal(&t).code(), 504);
    for _ in 0..3 {
        visit(&t);
    }
    let seen = t.front().seen();
    assert_eq!((seen.all_streams(), seen.plain), (1, 3));
    until_left_in_peace(&t);
}

/// A backend that has shared may be replaced by one that can't: what a connection has shown holds for that one.
#[test]
fn a_backend_that_was_replaced_is_tried_anew() {
    let t =
        Scene::new(ONE_WORKER).front(treating(|stream| if stream == 0 { Treat::Play } else { Treat::Page })).start();
    visit(&t);
    t.front().seen_when("the end of its connection", |seen| seen.ended.len() == 1);
    for _ in 0..2 {
        visit(&t);
    }
    let seen = t.front().seen();
    assert_eq!((seen.streams, seen.plain), (vec![1, 1], 2));
    until_left_in_peace(&t);
}

/// What a backend may have looked at is not sent to it again, on no way, once WebSockets were seen to work on a connection.
#[test]
fn nothing_is_sent_twice() {
    let t =
        Scene::new(ONE_WORKER).front(treating(|stream| if stream == 1 { Treat::Close } else { Treat::Play })).start();
    let open = Gate::new("the session is open");
    let opened = open.clone();
    let session = t.start_client(async move |c| {
        c.handshake("/").await;
        opened.open();
        c.read_close().await
    });
    open.pass();
    assert_eq!(refusal(&t).code(), 502);
    session.join();
    let seen = t.front().seen();
    assert_eq!((seen.streams, seen.plain), (vec![2], 0));
}

/// Refused twice, a client is told to come later, and others share on; no connection is opened for each refusal.
#[test]
fn refusals_open_no_connections() {
    const CLIENTS: usize = 10;
    let t = Scene::new("listen.workers = 1\npool = { mode = 'multiplexed', idle_timeout = '2s' }\n")
        .front(treating(|stream| if stream == 0 { Treat::Play } else { Treat::Reset(Reason::REFUSED_STREAM) }))
        .start();
    beside_a_session(&t, || {
        for _ in 0..CLIENTS {
            let response = refusal(&t);
            assert_eq!(response.code(), 503);
            assert!(response.field("Retry-After").is_some(), "{response:?}");
        }
    });
    let seen = t.front().seen();
    assert!(seen.streams.len() <= 3 && seen.plain == 0, "{seen:?}");
}

/// Whoever waits for a stream holds up nobody else, on no other way to the same backend; and is told when it takes too long.
#[test]
fn a_full_pool_holds_up_nobody_else() {
    let settings = format!(
        "{}upstream.max_pending = 1\nupstream.queue_timeout = '3s'\n\
         route = [{{ path = '/own', pool = {{ mode = 'dedicated' }} }}]\n",
        one_worker("max_streams = 1, max_connections = 1")
    );
    let t = Scene::new(&settings).front(Manners::default()).start();
    beside_a_session(&t, || {
        let waiting = t.start_client(async |c| c.request(Message::websocket("/")).await);
        while t.proxy().metrics().count("tidegate_pool_waiters") == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        t.client(async |c| {
            c.handshake("/own").await;
            says(c, "hello").await;
            bye(c).await;
        });
        let metrics = t.proxy().metrics();
        assert_eq!(metrics.count("tidegate_pool_waiters"), 1, "it waits still");
        assert!((metrics.sum("tidegate_upstream_waiting") - 1.0).abs() < 0.1);
        let response = waiting.join();
        assert_eq!(response.code(), 503);
        assert!(response.field("Retry-After").is_some(), "{response:?}");
        let refused = t.proxy().metrics().sum_with("tidegate_refused_total", "reason=\"pool_full\"");
        assert!((refused - 1.0).abs() < 0.1, "{refused}");
    });
    visit(&t);
    assert_eq!(t.front().seen().plain, 1);
    t.no_rst();
}

/// What an application refuses is passed on with its body, and says nothing against streams: an answer that may come from a
/// server without them is asked for once more over HTTP/1.1, once streams have worked no more.
#[test]
fn refusals_of_the_application_pass() {
    let manners = treating(|stream| match stream {
        0 | 2 => Treat::Status(404),
        3 => Treat::Status(403),
        _ => Treat::Play,
    });
    let t = Scene::new("listen.workers = 1\npool = { mode = 'multiplexed', idle_timeout = '2s' }\n")
        .backend(async |c: &mut Peer| {
            let request = c.read_head().await;
            if request.target() == "/none" {
                c.reply(Message::status(404, "Not Found", "nothing here")).await;
                c.fin().await;
                c.until_end().await;
            } else {
                c.reply(Message::switching(&request)).await;
                backend::echo_on(c).await;
            }
        })
        .front(manners)
        .start();
    let refused = |status: u16, body: &str| {
        t.client(async |c| {
            let response = c.request(Message::websocket("/none")).await;
            assert_eq!((response.code(), response.text().as_str()), (status, body), "{response:?}");
        });
    };
    refused(404, "nothing here");
    assert_eq!((t.front().seen().all_streams(), t.front().seen().plain), (1, 1));
    visit(&t);
    refused(404, "no");
    refused(403, "no");
    visit(&t);
    assert_eq!((t.front().seen().all_streams(), t.front().seen().plain), (5, 1));
    t.no_rst();
}

/// Where END_STREAM on a stream that is forgotten would end the connection, for all who share it, there is none: the stream is
/// reset, at once, when its session has ended or its handshake was refused.
#[test]
fn forgetful_backends_get_no_end_stream() {
    let t = Scene::new(ONE_WORKER).front(treating(|_| Treat::Forget)).start();
    beside_a_session(&t, || {
        t.client(async |c| {
            let refused = c.request(Message::websocket("/refused")).await;
            assert_eq!(refused.code(), 403);
        });
        // Its answer is of the application, so it says nothing of the connection.
        visit(&t);
        t.front().seen_when("the ends of both", |seen| seen.reset.len() == 2);
    });
    let seen = t.front().seen_when("the last end", |seen| seen.reset.len() == 3);
    assert_eq!((seen.reset, seen.streams), (vec![true; 3], vec![3]));
    assert!(!is_left_in_peace(&t));
    t.no_rst();
}

/// A connection that has had `pool.max_uses` handshakes takes no more, and ends with the last of its sessions. Whatever a backend
/// does with one that it has had for long enough, it does to nobody.
#[test]
fn connections_are_not_used_for_ever() {
    let settings = "listen.workers = 1\npool = { mode = 'multiplexed', max_uses = 3 }\n";
    let t = Scene::new(settings).front(treating(|_| Treat::Echo)).start();
    beside_a_session(&t, || {
        for _ in 0..5 {
            visit(&t);
        }
        let seen = t.front().seen_when("the end of one that had three", |seen| seen.ended.len() == 1);
        assert_eq!((seen.streams, seen.ended), (vec![3, 3], vec![true]));
    });
    t.front().seen_when("the end of the other", |seen| seen.ended == [true; 2]);
    assert_eq!(t.proxy().metrics().count("tidegate_pool_goaways_total"), 2);
    t.no_rst();
}

/// A stream that is refused without having been looked at is begun once more, on another connection: its client notices nothing.
/// What else goes wrong with it is said to the client.
#[test]
fn refused_streams_go_elsewhere() {
    let manners = treating(|stream| match stream {
        1 => Treat::Reset(Reason::REFUSED_STREAM),
        4 => Treat::Reset(Reason::INTERNAL_ERROR),
        _ => Treat::Play,
    });
    let t = Scene::new(ONE_WORKER).front(manners).start();
    t.client(async |c| {
        c.handshake("/").await;
        visit(&t);
        // The connection that has refused gets no more, and keeps what it has.
        says(c, "still here").await;
        bye(c).await;
    });
    assert_eq!(t.front().seen_when("the end", |seen| seen.ended.len() == 2).streams, [2, 1]);
    // On a connection that has shown that it can.
    beside_a_session(&t, || assert_eq!(refusal(&t).code(), 502));
    visit(&t);
    assert_eq!(t.front().seen().plain, 0);
    t.no_rst();
}

/// GOAWAY: sessions go on where they are, the next one gets another connection, and the old one ends with the last of its own.
#[test]
fn go_away_is_heeded() {
    let t = Scene::new(ONE_WORKER).front(Manners::default()).start();
    let (asked, gone) = (Gate::new("the session is open"), Gate::new("the others have been served"));
    let (open, go_on) = (asked.clone(), gone.clone());
    let first = t.start_client(async move |c| {
        c.handshake("/").await;
        says(c, "before").await;
        open.open();
        go_on.passed().await;
        says(c, "after").await;
        bye(c).await;
    });
    asked.pass();
    t.front().go_away();
    // It has to be heard of before the next client comes.
    t.proxy().log_where("that it goes away", |line| line["message"] == "a shared connection takes nobody else");
    visit(&t);
    gone.open();
    first.join();
    let seen = t.front().seen_when("the end", |seen| seen.ended.len() == 2);
    assert_eq!((seen.streams, seen.ended), (vec![1, 1], vec![true, true]));
    t.no_rst();
}

/// Connections are as few as the sessions need, of what both sides allow; and they are gone when nobody uses them.
#[test]
fn connections_are_filled() {
    for (ours, theirs) in [(4, 100), (100, 4)] {
        let settings = one_worker(&format!("max_streams = {ours}"));
        let t = Scene::new(&settings).front(Manners { max_streams: theirs, ..Manners::default() }).start();
        let open = Arc::new(tokio::sync::Barrier::new(30));
        t.clients(30, async |c| {
            c.handshake("/").await;
            open.wait().await;
            says(c, "all here").await;
            bye(c).await;
        });
        let seen = t.front().seen_when("the end of all", |seen| seen.ended.len() == seen.streams.len());
        let mut streams = seen.streams.clone();
        streams.sort_unstable();
        assert_eq!(streams, [2, 4, 4, 4, 4, 4, 4, 4], "{seen:?}");
        assert_eq!(t.connection(29).seen().closes(), [1000]);
        t.no_rst();
    }
}

/// An idle connection waits for `pool.idle_timeout` for another user; a drain does not wait for that.
#[test]
fn idle_connections_wait_and_give_way_to_a_drain() {
    let settings = "listen.workers = 1\npool = { mode = 'multiplexed', idle_timeout = '60s' }\n\
                    drain = { delay = '0s', window = '100ms' }";
    let t = Scene::new(settings).front(Manners::default()).start();
    for _ in 0..3 {
        visit(&t);
    }
    assert_eq!(t.front().seen().streams, [3]);
    t.proxy().sigterm();
    assert_eq!(t.proxy().wait_exit(DEADLINE).code(), Some(0));
    assert_eq!(t.front().seen_when("its end", |seen| seen.ended.len() == 1).ended, [true]);
    t.no_rst();
}

/// A backend that wants less (`ENHANCE_YOUR_CALM`) gets fewer streams on a connection.
#[test]
fn an_exhausted_backend_gets_less() {
    let t = Scene::new(&one_worker("max_streams = 8"))
        .front(treating(|stream| match stream {
            1..=3 => Treat::Reset(Reason::ENHANCE_YOUR_CALM),
            _ => Treat::Play,
        }))
        .start();
    // On the same connection, whose complaints count once; it may have looked at the requests.
    beside_a_session(&t, || {
        for _ in 0..3 {
            let response = refusal(&t);
            assert_eq!(response.code(), 503);
            assert!(response.field("Retry-After").is_some(), "{response:?}");
        }
    });
    let said =
        |line: &serde_json::Value| line["fix"].as_str().is_some_and(|fix| fix.starts_with("lower pool.max_streams"));
    t.proxy().log_where("that it wants less", said);
    let said: Vec<_> = t.proxy().log().into_iter().filter(said).collect();
    assert_eq!(
        said.iter().map(|line| (line["before"].as_u64(), line["after"].as_u64())).collect::<Vec<_>>(),
        [(Some(8), Some(4))]
    );
    let open = Arc::new(tokio::sync::Barrier::new(8));
    t.clients(8, async |c| {
        c.handshake("/").await;
        open.wait().await;
        bye(c).await;
    });
    let seen = t.front().seen_when("the end of all", |seen| seen.ended.len() == seen.streams.len());
    assert!(seen.streams.iter().all(|streams| *streams <= 4), "{seen:?}");
    t.no_rst();
}

/// What the proxy has in memory, in bytes.
fn resident(t: &Scene) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", t.proxy().pid())).expect("procfs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process with memory");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

/// 16 clients stop reading while the backend floods each with messages of 20 bytes, as many as flow control allows; on the same
/// connection 48 others talk. Those get every answer, the memory that it takes is bounded, and after `pool.stall_timeout` each
/// of the 16 finds what was under way, Close 1013 and FIN when it reads on.
#[test]
fn slow_readers_harm_nobody_else() {
    const SLOW: usize = 16;
    const OTHERS: usize = 48;
    let settings = one_worker("max_streams = 64, stall_timeout = '1s'");
    let settings = format!(
        "{settings}close = {{ delay = '0ms', handshake_timeout = '300ms', linger = '300ms' }}\n\
                            websocket = {{ ping_interval = '0s', send_buffer = '16KiB' }}"
    );
    let t = Scene::new(&settings)
        .front(treating(|stream| match stream.checked_sub(SLOW + OTHERS) {
            Some(0..SLOW) => Treat::Flood(20),
            _ => Treat::Play,
        }))
        .start();
    // What as many sessions take that are no burden.
    let open = Arc::new(tokio::sync::Barrier::new(SLOW + OTHERS));
    t.clients(SLOW + OTHERS, async |c| {
        c.handshake("/").await;
        open.wait().await;
        says(c, "hello").await;
        bye(c).await;
    });
    let before = resident(&t);
    let (ended, stalled) = (Gate::new("all slow ones were given up"), Arc::new(tokio::sync::Semaphore::new(0)));
    let (t, ended) = (&t, &ended);
    std::thread::scope(|scope| {
        let slow: Vec<_> = (0..SLOW)
            .map(|_| {
                let stalled = Arc::clone(&stalled);
                scope.spawn(move || {
                    t.client_with(Dial { recv_buffer: Some(4096), ..Dial::default() }, async |c| {
                        c.handshake("/").await;
                        stalled.add_permits(1);
                        ended.passed().await;
                        c.read_close().await;
                        c.answer_close().await;
                        c.until_end().await
                    })
                })
            })
            .collect();
        // The flood is for the first streams.
        let all = u32::try_from(SLOW).expect("a few");
        crate::harness::block(stalled.acquire_many(all)).expect("open").forget();
        let rounds = t.clients(OTHERS, async |c| {
            c.handshake("/").await;
            let mut rounds = 0;
            // Until long after all slow ones were given up.
            while rounds < 20 || t.front().seen().floods_over < SLOW {
                says(c, "are you there?").await;
                rounds += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            bye(c).await;
            rounds
        });
        let grown = resident(t).saturating_sub(before);
        // The backend hears of it first.
        t.front().seen_when("all given up", |seen| seen.floods_over == SLOW);
        ended.open();
        for slow in slow {
            let seen = slow.join().expect("a client that was told why");
            assert_eq!((seen.closes(), seen.end), (vec![1013], End::Fin));
            assert!(seen.frames.len() > 100, "{} frames", seen.frames.len());
        }
        let seen = t.front().seen_when("the end", |seen| seen.ended.len() == 2);
        assert_eq!((seen.streams, seen.ended, seen.plain), (vec![SLOW + OTHERS; 2], vec![true; 2], 0));
        let metrics = t.proxy().metrics();
        assert_eq!(metrics.count("tidegate_abnormal_closes_total{cause=\"client_stalled\"}"), SLOW as u64);
        // For each the stream's window, as much that was read already, and the room that both leave; left as frames it would
        // be 3,000 of a few hundred bytes.
        let bound = ((SLOW as u64 * 256) << 10) + (2 << 20);
        assert!(grown < bound, "{grown} bytes for {SLOW} slow readers, of {bound}");
        println!("{SLOW} slow readers: {grown} bytes; rounds of the others: {:?}", rounds.iter().min());
    });
    t.no_rst();
}

/// An operator sees who shares what: with whom, how many, and what is kept for the next.
#[test]
fn shared_connections_are_shown() {
    let settings = "listen.workers = 1\npool = { mode = 'multiplexed', max_streams = 10, idle_timeout = '1h' }\n";
    let t = Scene::new(settings).front(Manners::default()).start();
    let shown = || {
        let all: serde_json::Value = serde_json::from_slice(&t.proxy().get("/connections").body).expect("JSON");
        serde_json::json!({ "shared": all["shared"], "more": all["more"] })
    };
    assert_eq!(shown(), serde_json::json!({ "shared": [], "more": 0 }));
    let with = |state: &str, references: u32| {
        let connection = serde_json::json!({ "state": state, "references": references, "capacity": 10 });
        let endpoint = t.front().address.to_string();
        let key = serde_json::json!({ "route": "", "endpoint": endpoint, "waiters": 0, "retry_in_ms": null, "connections": [connection] });
        serde_json::json!({ "shared": [key], "more": 0 })
    };
    t.client(async |c| {
        c.handshake("/").await;
        says(c, "hello").await;
        assert_eq!(shown(), with("open", 1));
        bye(c).await;
    });
    t.proxy().metrics_when("that nobody uses it", |metrics| metrics.count("tidegate_pool_references") == 0);
    assert_eq!(shown(), with("idle", 0));
}

/// 1,000 sessions at the same time: 16 connections of 64 streams with one worker, and all are gone after the idle timeout.
#[test]
fn a_thousand_share_sixteen() {
    const COUNT: usize = 1000;
    let settings = "listen.workers = 2\npool = { mode = 'multiplexed', max_streams = 64, idle_timeout = '100ms' }\n";
    let t = Scene::new(settings).front(Manners::default()).start();
    let open = Arc::new(tokio::sync::Barrier::new(COUNT));
    t.clients(COUNT, async |c| {
        c.handshake("/").await;
        open.wait().await;
        says(c, "all here").await;
        bye(c).await;
    });
    let seen = t.front().seen_when("the end of all", |seen| seen.ended.len() == seen.streams.len());
    assert_eq!(seen.all_streams(), COUNT);
    let metrics = t.proxy().metrics();
    assert_eq!(metrics.count("tidegate_pool_opens_total{result=\"opened\"}"), seen.streams.len() as u64);
    for zero in ["tidegate_pool_references", "tidegate_pool_waiters", "tidegate_pool_invariant_violations_total"] {
        assert_eq!(metrics.count(zero), 0, "{zero}");
    }
    // Two workers have at most one connection that is not full each.
    assert!((16..=17).contains(&seen.streams.len()), "{seen:?}");
    assert!(seen.ended.iter().all(|in_order| *in_order), "{seen:?}");
    t.no_rst();
}

/// Nothing is left of any session: no gauge, no descriptor.
#[track_caller]
fn nothing_left(t: &Scene, descriptors: usize) {
    const GAUGES: [&str; 8] = [
        "tidegate_connections_active",
        "tidegate_client_connections",
        "tidegate_lingering_sockets",
        "tidegate_upstream_waiting",
        "tidegate_upstream_pending",
        "tidegate_pool_connections",
        "tidegate_pool_references",
        "tidegate_pool_waiters",
    ];
    let all_zero = |metrics: &Metrics| GAUGES.iter().all(|gauge| metrics.sum(gauge).abs() < 0.5);
    let metrics = t.proxy().metrics_when("that nothing is left", all_zero);
    assert_eq!(metrics.count("tidegate_pool_invariant_violations_total"), 0);
    let begun = std::time::Instant::now();
    while t.proxy().descriptors() != descriptors {
        assert!(begun.elapsed() < DEADLINE, "{} descriptors, {descriptors} before", t.proxy().descriptors());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// How a client leaves that has asked and has no answer.
#[derive(Clone, Copy, Debug)]
enum Leaves {
    Fin,
    Rst,
}

impl Leaves {
    const ALL: [Self; 2] = [Self::Fin, Self::Rst];

    /// A client asks, leaves when `is_due` returns, and tidegate has seen it.
    fn after(self, t: &Scene, is_due: impl FnOnce() + Send) {
        t.client(async |c| {
            c.send_bytes(&Message::websocket("/").bytes()).await;
            // It blocks, which a runtime's thread may not.
            std::thread::scope(|scope| scope.spawn(is_due).join().expect("it comes so far"));
            match self {
                Self::Fin => {
                    c.fin().await;
                    let seen = c.until_end().await;
                    assert_eq!((seen.end, seen.frames.len()), (End::Fin, 0));
                }
                Self::Rst => c.rst(),
            }
        });
        t.proxy().metrics_when("that it has left", |metrics| metrics.count("tidegate_client_connections") == 0);
    }
}

/// A client leaves on its way from a stream to a connection of its own: before the connection that would be shared has said anything, before its stream
/// is refused, and before its own connection has an answer. Nothing is left of it, nothing is begun for it that was not, and the
/// next one is served.
#[test]
fn clients_may_leave_while_they_fall_back() {
    for leaves in Leaves::ALL {
        let t = Scene::new(ONE_WORKER).front(greeting(|_| Greets::Nothing)).start();
        let descriptors = t.proxy().descriptors();
        leaves.after(&t, || {
            t.front().seen_when("a connection", |seen| seen.streams.len() == 1);
        });
        visit(&t);
        let metrics = t.proxy().metrics();
        let seen = t.front().seen();
        assert_eq!((seen.streams, seen.plain), (vec![0], 1), "{leaves:?}: one connection that says nothing is enough");
        assert_eq!(metrics.count("tidegate_pool_refusals_total{reason=\"cancelled\"}"), 1);
        nothing_left(&t, descriptors);
        t.no_rst();

        let t = Scene::new(ONE_WORKER)
            .front(treating(|stream| if stream == 0 { Treat::LateStatus(500) } else { Treat::Play }))
            .start();
        let descriptors = t.proxy().descriptors();
        leaves.after(&t, || {
            t.front().seen_when("a stream", |seen| seen.all_streams() == 1);
        });
        t.front().answer();
        nothing_left(&t, descriptors);
        visit(&t);
        let seen = t.front().seen();
        assert_eq!((seen.all_streams(), seen.plain), (2, 0), "{leaves:?}: it is not asked for again");
        nothing_left(&t, descriptors);
        t.no_rst();

        let (asked, left) = (Gate::new("the backend is asked"), Gate::new("the client has left"));
        let (is_asked, go_on) = (asked.clone(), left.clone());
        let t = Scene::new(ONE_WORKER)
            .backend(async move |c: &mut Peer| {
                let request = c.read_head().await;
                if c.index() == 0 {
                    is_asked.open();
                    go_on.passed().await;
                }
                c.reply(Message::switching(&request)).await;
                backend::echo_on(c).await;
            })
            .front(Manners { advertises: false, ..Manners::default() })
            .start();
        let descriptors = t.proxy().descriptors();
        leaves.after(&t, || asked.pass());
        left.open();
        t.connection(0).seen().assert_closed_with(1001);
        visit(&t);
        let seen = t.front().seen();
        assert_eq!((seen.streams, seen.plain), (vec![0], 2), "{leaves:?}");
        nothing_left(&t, descriptors);
        t.no_rst();
    }
}

/// A process is stopped, and its kernel goes on: no FIN comes. Pings find out: its sessions get Close 1012, who has just asked gets 502, and the
/// next one another connection. That is as silent, and stays, since its pings are answered.
#[test]
fn a_connection_that_stands_still_is_given_up() {
    const COUNT: usize = 8;
    let settings = format!("{}upstream.handshake_timeout = '60s'\n", one_worker("ping_interval = '2s'"));
    let t = Scene::new(&settings).front(Manners::default()).start();
    let (t, open) = (&t, Arc::new(tokio::sync::Barrier::new(COUNT)));
    let stopped = Gate::new("the backend stands still");
    std::thread::scope(|scope| {
        let sessions = scope.spawn(|| {
            t.clients(COUNT, async |c| {
                c.handshake("/").await;
                says(c, "hello").await;
                if open.wait().await.is_leader() {
                    t.front().stand_still();
                    stopped.open();
                }
                let code = c.read_close().await;
                c.answer_close().await;
                (code, c.until_end().await.end)
            })
        });
        stopped.pass();
        assert_eq!(refusal(t).code(), 502);
        let ends = sessions.join().expect("sessions with an end");
        assert_eq!(ends, vec![(1012, End::Fin); COUNT]);
    });
    let said = |line: &serde_json::Value| {
        line["message"] == "a shared connection answers no ping: it is given up"
            && line["backend"] == t.front().address.to_string().as_str()
    };
    t.proxy().log_where("why", said);
    t.client(async |c| {
        c.handshake("/").await;
        says(c, "before").await;
        // No message, and more than two pings: whoever answered none would have been given up.
        tokio::time::sleep(Duration::from_secs(7)).await;
        says(c, "after").await;
        bye(c).await;
    });
    assert_eq!(t.proxy().log().into_iter().filter(said).count(), 1);
    // What it sends when it goes on finds a socket that was closed long ago.
    t.counters(Side::Proxy).assert_sent_no_rst();
    t.front().go_on();
    let seen = t.front().seen_when("the end of both", |seen| seen.ended.len() == 2);
    assert_eq!((seen.streams, seen.plain), (vec![COUNT, 1], 0));
    let metrics =
        t.proxy().metrics_when("that none is left", |metrics| metrics.count("tidegate_connections_active") == 0);
    assert_eq!(metrics.count("tidegate_abnormal_closes_total{cause=\"backend_reset\"}"), COUNT as u64, "{metrics:?}");
    for zero in ["tidegate_pool_references", "tidegate_pool_waiters", "tidegate_pool_invariant_violations_total"] {
        assert_eq!(metrics.count(zero), 0, "{zero}");
    }
}
