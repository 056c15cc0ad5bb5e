//! Connections to the backend that wait for their use: opened ahead of WebSocket handshakes, and kept after plain requests. Whatever the
//! backend does to them meanwhile, no client notices.

use crate::harness::{
    DEADLINE, End, Gate, Message, Peer, Scene, Seen,
    backend::{self, echo},
};
use rustix::process::Signal;
use std::time::{Duration, Instant};

const PREWARM: &str = "listen.workers = 1\npool.prewarm_max_age = '1h'\n";
const KEEP_ALIVE: &str = "listen.workers = 1\npool.keep_alive = 4\npool.keep_alive_timeout = '1h'\n";

/// An echo, also behind connections on which nothing ever comes.
async fn patient_echo(c: &mut Peer) {
    if c.is_asked().await {
        echo(c).await;
    }
}

/// A session from its handshake to its end in order.
async fn session(c: &mut Peer) {
    c.handshake("/").await;
    c.send_text("hello").await;
    assert_eq!(c.read_text().await, "hello");
    c.send_close(1000, "").await;
    let seen = c.until_end().await;
    assert_eq!((seen.closes(), seen.end), (vec![1000], End::Fin));
}

fn idle(t: &Scene, kind: &str, count: u64) {
    let name = format!("tidegate_upstream_idle_connections{{kind=\"{kind}\"}}");
    t.proxy().metrics_when(&format!("{name} {count}"), |metrics| metrics.count(&name) == count);
}

fn uses(t: &Scene, kind: &str) -> [u64; 3] {
    let metrics = t.proxy().metrics();
    ["hit", "miss", "stale"].map(|result| {
        metrics.count(&format!("tidegate_upstream_idle_uses_total{{kind=\"{kind}\",result=\"{result}\"}}"))
    })
}

fn ended_unused(seen: &Seen) {
    assert_eq!((seen.raw.as_slice(), seen.end), (&[][..], End::Fin));
}

/// Open before the first client comes, used by those that come, replaced behind their backs; ended by a FIN without a byte at the
/// drain, which they do not delay.
#[test]
fn handshakes_find_connections_open() {
    let t = Scene::new(&format!("{PREWARM}pool.prewarm = 3")).backend(patient_echo).start();
    t.connection(2);
    idle(&t, "prewarm", 3);
    for round in 1..=5 {
        t.client(session);
        t.connection(2 + round);
        idle(&t, "prewarm", 3);
    }
    assert_eq!((uses(&t, "prewarm"), t.backend().count()), ([5, 0, 0], 8));
    t.proxy().sigterm();
    assert!(t.proxy().wait_exit(DEADLINE).success());
    let seen: Vec<_> = (0..8).map(|index| t.connection(index).seen()).collect();
    let (unused, used): (Vec<_>, Vec<_>) = seen.into_iter().partition(|seen| seen.raw.is_empty());
    assert_eq!((unused.len(), used.len()), (3, 5));
    unused.iter().for_each(ended_unused);
    t.no_rst();
}

/// What `prewarm` says is for all workers together, also where it is no multiple of their number.
#[test]
fn all_workers_share_what_is_opened_ahead() {
    let settings = "listen.workers = 2\npool.prewarm = 3\npool.prewarm_max_age = '1h'";
    let t = Scene::new(settings).backend(patient_echo).start();
    idle(&t, "prewarm", 3);
    t.clients(8, session);
    idle(&t, "prewarm", 3);
    assert_eq!(uses(&t, "prewarm")[2], 0);
}

/// Ended by the backend while they waited, or when the handshake was on its way, by FIN or by RST: the client gets its session.
#[test]
fn no_client_notices_a_stale_one() {
    #[derive(Clone, Copy, Debug)]
    enum Way {
        Fin,
        Rst,
        FinWhenAsked,
        RstWhenAsked,
    }
    for way in [Way::Fin, Way::Rst, Way::FinWhenAsked, Way::RstWhenAsked] {
        let gate = Gate::new("all are open");
        let opened = gate.clone();
        let t = Scene::new(&format!("{PREWARM}pool.prewarm = 2"))
            .backend(async move |c: &mut Peer| {
                if c.index() >= 2 {
                    return patient_echo(c).await;
                }
                match way {
                    Way::Fin | Way::Rst => opened.passed().await,
                    Way::FinWhenAsked | Way::RstWhenAsked => assert!(c.is_asked().await),
                }
                match way {
                    Way::Fin | Way::FinWhenAsked => c.fin().await,
                    Way::Rst | Way::RstWhenAsked => return c.rst(),
                }
                c.until_end().await;
            })
            .start();
        idle(&t, "prewarm", 2);
        gate.open();
        for _ in 0..4 {
            t.client(session);
        }
        let [_, _, stale] = uses(&t, "prewarm");
        if matches!(way, Way::FinWhenAsked | Way::RstWhenAsked) {
            assert!((1..=2).contains(&stale), "{way:?}: {stale}");
        }
        let accepted = t.proxy().metrics().count("tidegate_handshakes_total{result=\"accepted\"}");
        assert_eq!(accepted, 4, "{way:?}");
    }
}

/// An answer that was begun is an answer: the handshake is not sent again.
#[test]
fn half_an_answer_is_no_reason_for_another_try() {
    let t = Scene::new(&format!("{PREWARM}pool.prewarm = 1"))
        .backend(async |c| {
            if c.is_asked().await {
                c.read_head().await;
                c.send_bytes(b"HTTP/1.1 101 Swi").await;
                c.fin().await;
                c.until_end().await;
            }
        })
        .start();
    idle(&t, "prewarm", 1);
    t.client(async |c| assert_eq!(c.request(Message::websocket("/")).await.code(), 502));
    assert_eq!(uses(&t, "prewarm"), [1, 0, 0]);
    idle(&t, "prewarm", 1);
    let asked = (0..t.backend().count()).filter(|index| !t.connection(*index).seen_so_far().raw.is_empty());
    assert_eq!(asked.count(), 1);
}

/// Below the time after which the backend would end it, each is ended by us, without a byte, and another one opened.
#[test]
fn old_ones_are_replaced() {
    let t = Scene::new("listen.workers = 1\npool.prewarm = 1\npool.prewarm_max_age = '200ms'")
        .backend(patient_echo)
        .start();
    for index in 0..3 {
        ended_unused(&t.connection(index).seen());
    }
    t.client(session);
    assert_eq!(uses(&t, "prewarm")[2], 0);
}

/// A reload that wants fewer ends the others in order.
#[test]
fn a_reload_that_wants_fewer() {
    let t = Scene::new(&format!("{PREWARM}pool.prewarm = 3")).backend(patient_echo).start();
    idle(&t, "prewarm", 3);
    t.proxy().configure(&format!("{PREWARM}pool.prewarm = 1"));
    t.proxy().signal(Signal::HUP);
    t.proxy().log_where("the reload", |line| line["message"] == "reloaded");
    idle(&t, "prewarm", 1);
    t.client(session);
    idle(&t, "prewarm", 1);
    let seen: Vec<_> = (0..3).map(|index| t.connection(index).seen()).collect();
    let (unused, used): (Vec<_>, Vec<_>) = seen.into_iter().partition(|seen| seen.raw.is_empty());
    unused.iter().for_each(ended_unused);
    assert_eq!((unused.len(), used.len(), t.backend().count()), (2, 1, 4));
}

/// While nobody listens there, it is tried again ever more seldom: by the fourth attempt half of 100, 200 and 400 ms have passed.
#[test]
fn a_backend_that_is_down_is_left_in_peace() {
    let t = Scene::new("listen.workers = 1\npool.prewarm = 4\npool.prewarm_max_age = '100ms'")
        .backend(patient_echo)
        .start();
    idle(&t, "prewarm", 4);
    let failures = || {
        let lines = t.proxy().log().into_iter();
        lines.filter(|line| line["message"] == "no connection ahead of the next client").count()
    };
    t.backend().stop_listening();
    let begun = Instant::now();
    while failures() < 4 {
        assert!(begun.elapsed() < DEADLINE, "{} attempts", failures());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(begun.elapsed() >= Duration::from_millis(350), "{:?}", begun.elapsed());
}

/// Answers all that comes: by its target, and with a short body.
async fn serve(c: &mut Peer) {
    while c.is_asked().await {
        let request = c.read_head().await;
        c.reply(Message::status(200, "OK", request.target())).await;
    }
}

async fn get(c: &mut Peer, target: &str) {
    let response = c.request(Message::get(target)).await;
    assert_eq!((response.code(), response.text().as_str()), (200, target));
}

/// A hundred requests of a client, one after the other, and those of ten others: one connection to the backend.
#[test]
fn plain_requests_share_a_connection() {
    let t = Scene::new(KEEP_ALIVE).backend(serve).start();
    t.client(async |c| {
        for number in 0..100 {
            get(c, &format!("/{number}")).await;
        }
    });
    for number in 0..10 {
        t.client(async |c| get(c, &format!("/other/{number}")).await);
    }
    assert_eq!((t.backend().count(), uses(&t, "keep_alive")), (1, [109, 1, 0]));
    idle(&t, "keep_alive", 1);
    t.proxy().sigterm();
    assert!(t.proxy().wait_exit(DEADLINE).success());
    assert_eq!(t.connection(0).seen().end, End::Fin);
    t.no_rst();
}

/// No more of them wait than there may, and none for longer than it may.
#[test]
fn few_wait_and_not_for_long() {
    let t =
        Scene::new("listen.workers = 1\npool.keep_alive = 2\npool.keep_alive_timeout = '300ms'").backend(serve).start();
    t.clients(8, async |c| get(c, "/").await);
    let waiting = t.proxy().metrics().count("tidegate_upstream_idle_connections{kind=\"keep_alive\"}");
    assert!(waiting <= 2, "{waiting}");
    for index in 0..t.backend().count() {
        assert_eq!(t.connection(index).seen().end, End::Fin);
    }
    idle(&t, "keep_alive", 0);
    t.no_rst();
}

/// Which answers leave a connection that can be used again, and which do not.
#[test]
fn only_whole_answers_leave_a_connection() {
    let ok = |version: &str| Message::line(&format!("{version} 200 OK"));
    let counted = |body: &str| ok("HTTP/1.1").header("Content-Length", &body.len().to_string()).then(body);
    let chunked = |body: &str| ok("HTTP/1.1").header("Transfer-Encoding", "chunked").then(body);
    let cases = [
        ("GET", counted("hello"), true),
        ("GET", counted(""), true),
        ("GET", chunked("5\r\nhello\r\n0\r\n\r\n"), true),
        ("GET", Message::line("HTTP/1.1 204 No Content"), true),
        ("GET", Message::line("HTTP/1.1 404 Not Found").header("Content-Length", "0"), true),
        ("GET", Message::line("HTTP/1.1 103 Early Hints").then(counted("hello").bytes()), true),
        ("HEAD", ok("HTTP/1.1").header("Content-Length", "12345"), true),
        ("POST", counted("hello"), true),
        ("GET", counted("hello").header("Connection", "close"), false),
        ("GET", counted("hello").header("Connection", "x, Close"), false),
        ("GET", ok("HTTP/1.0").header("Content-Length", "5").then("hello"), false),
        ("GET", ok("HTTP/1.0").header("Connection", "keep-alive").header("Content-Length", "5").then("hello"), false),
        // Bytes that nobody has asked for would be the answer to whoever comes next.
        ("GET", counted("hello").then(counted("smuggled").bytes()), false),
        ("GET", chunked("5\r\nhello\r\n0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"), false),
        ("HEAD", counted("hello"), false),
        ("GET", Message::line("HTTP/1.1 204 No Content").then("hello"), false),
    ];
    for (method, answer, is_reused) in cases {
        let reply = answer.clone();
        let t = Scene::new(KEEP_ALIVE)
            .backend(async move |c: &mut Peer| {
                while c.is_asked().await {
                    let request = c.read_head().await;
                    let is_first = request.target() == "/first";
                    c.reply(if is_first { reply.clone() } else { Message::status(200, "OK", request.target()) }).await;
                }
            })
            .start();
        t.client(async |c| {
            let mut request = Message::get("/first").header("Connection", "close");
            request.line = format!("{method} /first HTTP/1.1");
            c.send_bytes(&request.bytes()).await;
            let seen = c.until_end().await;
            assert!(!seen.raw.windows(8).any(|bytes| bytes == b"smuggled"), "{seen:?}");
        });
        t.client(async |c| get(c, "/second").await);
        assert_eq!(t.backend().count(), if is_reused { 1 } else { 2 }, "{method} {answer:?}");
    }
}

/// Half an answer, ended by the backend or left by its client: what comes behind it on that connection is nobody's answer.
#[test]
fn half_an_answer_leaves_none() {
    for by_client in [false, true] {
        let t = Scene::new(KEEP_ALIVE)
            .backend(async move |c: &mut Peer| {
                while c.is_asked().await {
                    let request = c.read_head().await;
                    if request.target() != "/first" {
                        c.reply(Message::status(200, "OK", request.target())).await;
                        continue;
                    }
                    c.reply(Message::line("HTTP/1.1 200 OK").header("Content-Length", "10").then("hello")).await;
                    if !by_client {
                        c.fin().await;
                    }
                    c.until_end().await;
                }
            })
            .start();
        t.client(async |c| {
            c.send_bytes(&Message::get("/first").bytes()).await;
            while !c.received_ends_with(b"hello") {
                c.read_bytes(c.received_bytes() + 1).await;
            }
            if by_client {
                c.close();
            } else {
                c.until_end().await;
            }
        });
        assert_eq!(t.connection(0).seen().end, End::Fin);
        t.client(async |c| get(c, "/second").await);
        assert_eq!((t.backend().count(), uses(&t, "keep_alive")), (2, [0, 2, 0]), "by the client: {by_client}");
    }
}

/// What comes while a connection waits is found before it is used.
#[test]
fn bytes_that_come_later_are_nobodys_answer() {
    let (gate, is_sent) = (Gate::new("the first is answered"), Gate::new("more is sent"));
    let (opened, sent) = (gate.clone(), is_sent.clone());
    let t = Scene::new(KEEP_ALIVE)
        .backend(async move |c: &mut Peer| {
            if c.index() > 0 {
                return serve(c).await;
            }
            c.read_head().await;
            c.reply(Message::status(200, "OK", "/first")).await;
            opened.passed().await;
            c.send_bytes(&Message::status(200, "OK", "smuggled").bytes()).await;
            c.sent_is_acked().await;
            sent.open();
            c.until_end().await;
        })
        .start();
    t.client(async |c| {
        get(c, "/first").await;
        gate.open();
        is_sent.passed().await;
        get(c, "/second").await;
    });
    assert_eq!(t.backend().count(), 2);
}

/// The backend ends a connection that waited as soon as it is asked again: what may be sent twice is, once, on a fresh one. What may
/// not never goes where that can happen.
#[test]
fn only_what_may_be_sent_twice_is() {
    let line = |method: &str, target: &str| {
        let mut request = Message::get(target);
        request.line = format!("{method} {target} HTTP/1.1");
        request
    };
    let cases = [
        (line("GET", "/"), 200, 2),
        (line("HEAD", "/"), 200, 2),
        (line("DELETE", "/"), 200, 2),
        (line("PUT", "/").body(""), 200, 2),
        (line("POST", "/").body(""), 200, 1),
        (line("POST", "/").body("hello"), 200, 1),
        (line("PUT", "/").body("hello"), 200, 1),
        (line("PATCH", "/").body(""), 200, 1),
        // Not even a fresh one answers.
        (line("GET", "/never"), 502, 2),
        (line("POST", "/never").body(""), 502, 1),
    ];
    for (request, status, times) in cases {
        let t = Scene::new(KEEP_ALIVE)
            .backend(async |c| {
                if !c.is_asked().await {
                    return;
                }
                let first = c.read_head().await;
                if first.target() != "/never" {
                    c.reply(Message::line("HTTP/1.1 200 OK").header("Content-Length", "0")).await;
                    c.is_asked().await;
                }
                c.fin().await;
                c.until_end().await;
            })
            .start();
        t.client(async |c| {
            c.request(Message::get("/warm")).await;
        });
        idle(&t, "keep_alive", 1);
        t.client(async |c| {
            c.send_bytes(&request.clone().header("Connection", "close").bytes()).await;
            assert_eq!(c.read_head().await.code(), status, "{request:?}");
            c.until_end().await;
        });
        let method = request.line.split(' ').next().expect("a method");
        let seen: usize = (0..t.backend().count())
            .map(|index| {
                let raw = t.connection(index).seen_so_far().raw;
                let line = format!("{method} {} ", request.target());
                raw.windows(line.len()).filter(|bytes| *bytes == line.as_bytes()).count()
            })
            .sum();
        assert_eq!((seen, t.backend().count()), (times, 2), "{request:?}");
    }
}

/// A connection of a WebSocket, or of one that was refused, is nobody else's.
#[test]
fn what_was_asked_to_upgrade_is_not_kept() {
    let t = Scene::new(KEEP_ALIVE)
        .backend(async |c| {
            if c.index() == 0 {
                c.read_head().await;
                c.reply(Message::status(403, "Forbidden", "no")).await;
                c.until_end().await;
            } else if c.index() == 1 {
                backend::echo(c).await;
            } else {
                serve(c).await;
            }
        })
        .start();
    t.client(async |c| assert_eq!(c.request(Message::websocket("/")).await.code(), 403));
    t.client(session);
    t.client(async |c| get(c, "/").await);
    assert_eq!((t.backend().count(), uses(&t, "keep_alive")), (3, [0, 1, 0]));
    assert_eq!(t.connection(1).seen().end, End::Fin);
}

/// Sessions, and plain requests.
async fn anything(c: &mut Peer) {
    while c.is_asked().await {
        let request = c.read_head().await;
        if request.field("Upgrade").is_some() {
            c.reply(Message::switching(&request)).await;
            return backend::echo_on(c).await;
        }
        c.reply(Message::status(200, "OK", request.target())).await;
    }
}

/// What a reload would open again it leaves open, also where routes come and go; what it would open in another way it ends in order.
#[test]
fn a_reload_keeps_what_it_would_open_again() {
    let settings = |more: &str| {
        format!("{PREWARM}{KEEP_ALIVE}pool.prewarm = 2\nreload.watch = '0s'\n{more}").replacen(
            "listen.workers = 1\n",
            "",
            1,
        )
    };
    let t = Scene::new(&settings("")).backend(anything).start();
    let reload = |more: &str| {
        t.proxy().configure(&settings(more));
        let request = Message::line("POST /reload HTTP/1.1").header("Host", "localhost").header("Content-Length", "0");
        assert_eq!(t.proxy().admin(&request).expect("an answer").code(), 200, "{more}");
    };
    idle(&t, "prewarm", 2);
    t.client(async |c| get(c, "/0").await);
    assert_eq!(t.backend().count(), 3);
    for (round, more) in [
        "upstream.queue_timeout = '7s'",
        "route = [{ path = '/other', upstream = '127.0.0.1:9', pool.prewarm = 0 }]",
        "route = [{ path = '/same', upstream = '127.0.0.1:9', pool = { keep_alive = 0, prewarm = 0 } }]\npool.max_streams = 7",
        "upstream.health_interval = '1h'",
    ]
    .into_iter()
    .enumerate()
    {
        reload(more);
        let round = round + 1;
        t.client(async |c| get(c, &format!("/{round}")).await);
        t.client(session);
        t.connection(2 + round);
        idle(&t, "prewarm", 2);
        idle(&t, "keep_alive", 1);
        // One is opened for each session that has used one.
        assert_eq!(t.backend().count(), 3 + round, "{more}");
    }
    assert_eq!((uses(&t, "prewarm"), uses(&t, "keep_alive")), ([4, 0, 0], [4, 1, 0]));
    assert!((0..7).all(|index| t.connection(index).seen_so_far().closes().len() <= 1));
    reload("websocket.recv_buffer = '64KiB'");
    t.connection(8);
    idle(&t, "prewarm", 2);
    idle(&t, "keep_alive", 0);
    let seen: Vec<_> = (0..7).map(|index| t.connection(index).seen()).collect();
    assert_eq!(seen.iter().filter(|seen| seen.raw.is_empty()).count(), 2);
    assert!(seen.iter().all(|seen| seen.end == End::Fin), "{seen:?}");
    assert_eq!(t.backend().count(), 9);
    t.proxy().sigterm();
    assert!(t.proxy().wait_exit(DEADLINE).success());
    t.no_rst();
}
