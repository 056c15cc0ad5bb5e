//! One WebSocket of the backend for many clients: who shares it, what they get, and what becomes of them when it ends.

use crate::harness::{
    Board, DEADLINE, Frame, Gate, LIMIT, Message, NO_CODE, Peer, Scene, backend,
    proxy::Metrics,
    scene::{encrypted, secure, streams},
    transcript::End,
    ws::{CLOSE, PING, PONG},
};

/// What a backend is told to do on each of its connections.
#[derive(Clone, Debug)]
enum Word {
    Say(Frame),
    Close(u16, &'static str),
    /// It ends without a Close.
    Fin,
    Rst,
}

/// A backend that says to all of its connections what it is told, from then on.
#[derive(Clone)]
struct Feed {
    words: Board<Vec<Word>>,
    /// Of each connection that was accepted.
    heads: Board<Vec<Message>>,
    /// What clients have said, in order of arrival.
    heard: Board<Vec<String>>,
}

impl Feed {
    fn new() -> Self {
        Self { words: Board::new(Vec::new()), heads: Board::new(Vec::new()), heard: Board::new(Vec::new()) }
    }

    fn say(&self, word: Word) {
        self.words.change(|words| words.push(word));
    }

    fn text(&self, text: &str) {
        self.say(Word::Say(Frame::text(text)));
    }

    /// What each connection does.
    fn script(&self) -> impl AsyncFn(&mut Peer) + Send + Sync + 'static {
        let feed = self.clone();
        async move |c: &mut Peer| {
            let request = c.read_head().await;
            feed.serve(c, request).await;
        }
    }

    /// What one does that has said this.
    async fn serve(&self, c: &mut Peer, request: Message) {
        let mut next = self.words.read(Vec::len);
        self.heads.change(|heads| heads.push(request.clone()));
        let mut response = Message::switching(&request);
        if let Some(protocols) = request.field("Sec-WebSocket-Protocol") {
            let first = protocols.split(',').next().unwrap_or_default();
            response = response.header("Sec-WebSocket-Protocol", first).header("Set-Cookie", "first=1");
        }
        c.reply(response).await;
        loop {
            let word = tokio::select! {
                word = self.words.until(LIMIT, |words| words.get(next).cloned()) => word.expect("a word in time"),
                frame = c.next_frame(LIMIT) => {
                    let Ok(frame) = frame else { return };
                    match frame.opcode {
                        CLOSE => {
                            c.answer_close().await;
                            return;
                        }
                        PING => _ = c.send(&Frame::new(PONG, &frame.payload)).await,
                        PONG => self.heard.change(|heard| heard.push("pong".to_owned())),
                        _ => self.heard.change(|heard| heard.push(frame.text())),
                    }
                    continue;
                }
            };
            next += 1;
            match word {
                Word::Say(frame) => _ = c.send(&frame).await,
                Word::Close(code, reason) => {
                    c.send_close(code, reason).await;
                    c.until_end().await;
                    return;
                }
                Word::Fin => return,
                Word::Rst => return c.rst(),
            }
        }
    }

    /// As soon as there are so many connections.
    async fn has_accepted(&self, count: usize) {
        let accepted = self.heads.until(DEADLINE, |heads| (heads.len() >= count).then_some(())).await;
        accepted.unwrap_or_else(|| panic!("{count} connections"));
    }
}

/// Settings of the route that all clients use, and others.
fn settings(pool: &str, others: &str) -> String {
    format!("{others}\nroute = [{{ path = '/feed/*', pool = {{ mode = 'shared', shared = 'broadcast', {pool} }} }}]\n")
}

fn scene(feed: &Feed, pool: &str) -> Scene {
    Scene::new(&settings(pool, "")).backend(feed.script()).start()
}

async fn leave(c: &mut Peer) {
    c.send_close(1000, "").await;
    c.until_end().await.assert_closed_with(1000);
}

/// Those who are there, for each other.
struct Meeting {
    count: usize,
    here: Board<usize>,
}

impl Meeting {
    fn of(count: usize) -> Self {
        Self { count, here: Board::new(0) }
    }

    /// Waits for all the others; true for the last of them.
    async fn join(&self) -> bool {
        let (is_last, all) = self.here.change(|here| {
            *here += 1;
            (here.is_multiple_of(self.count), here.next_multiple_of(self.count))
        });
        let met = self.here.until(DEADLINE, |here| (*here >= all).then_some(())).await;
        met.expect("all the others");
        is_last
    }
}

/// Three clients have one WebSocket at the backend, and each gets all of its messages, in order and whole, whatever their size. The last
/// one gone it is closed with its Close handshake; the next client opens another.
#[test]
fn one_upstream_feeds_all() {
    let feed = Feed::new();
    let t = scene(&feed, "idle_timeout = '0s'");
    let all = Meeting::of(3);
    let large = "x".repeat(200_000);
    let told = || ["one", "two", &large, "", "four"];
    t.clients(3, async |c: &mut Peer| {
        c.handshake("/feed/a").await;
        if all.join().await {
            for text in told() {
                feed.text(text);
            }
        }
        for text in told() {
            assert!(c.read_text().await == text);
        }
        // A ping is answered, by nobody else.
        c.send(&Frame::new(PING, "there?")).await;
        let pong = c.read_frame().await;
        assert_eq!((pong.opcode, pong.text().as_str()), (PONG, "there?"));
        leave(c).await;
    });
    let seen = t.connection(0).seen();
    seen.assert_closed_with(1000);
    assert_eq!(t.backend().count(), 1);
    t.client(async |c| {
        c.handshake("/feed/a").await;
        feed.text("again");
        assert_eq!(c.read_text().await, "again");
        leave(c).await;
    });
    t.connection(1).seen().assert_closed_with(1000);
    assert_eq!(t.backend().count(), 2);
    let is_over = |metrics: &Metrics| {
        metrics.count("tidegate_pool_keys") == 0 && metrics.count("tidegate_shared_queue_bytes") == 0
    };
    let metrics = t.proxy().metrics_when("nothing is left", is_over);
    assert_eq!(metrics.count("tidegate_shared_messages_total"), 6);
    assert_eq!(metrics.count("tidegate_shared_deliveries_total"), 16);
    assert_eq!(metrics.count("tidegate_pool_opens_total{result=\"opened\"}"), 2);
    let close = t.proxy().log_where("a session's end", |line| line["message"] == "close");
    assert_eq!((&close["way"], &close["clean"]), (&"shared".into(), &true.into()), "{close}");
    t.no_rst();
}

/// Clients that are not alike never share, and the backend hears nothing of a client but what all who share have in common.
#[test]
fn only_those_who_are_alike_share() {
    let feed = Feed::new();
    let t = scene(&feed, "idle_timeout = '0s', key_headers = ['X-Region']");
    let all = Meeting::of(9);
    let others = [
        ("/feed/a", ""),
        ("/feed/b", ""),
        ("/feed/a?x", ""),
        ("/feed/a", "Authorization: Bearer a"),
        ("/feed/a", "Cookie: id=a"),
        ("/feed/a", "Origin: https://app.example"),
        ("/feed/a", "X-Auth-Request-User: a"),
        ("/feed/a", "X-Region: eu"),
        ("/feed/a", "Sec-WebSocket-Protocol: chat"),
    ];
    t.clients(9, async |c: &mut Peer| {
        let (path, field) = others[c.index()];
        let mut request = Message::websocket(path).header("User-Agent", "mine").header("X-Request-Id", "mine");
        if let Some((name, value)) = field.split_once(": ") {
            request = request.header(name, value);
        }
        let request = request.header("X-Own", "mine").header("Sec-WebSocket-Extensions", "permessage-deflate");
        let response = c.handshake_with(request).await;
        assert_eq!(response.field("Sec-WebSocket-Extensions"), None);
        // What the backend said to the one who asked is for nobody else.
        assert_eq!(response.field("Set-Cookie"), None);
        assert_eq!(response.field("Sec-WebSocket-Protocol").is_some(), field.starts_with("Sec-"));
        all.join().await;
        leave(c).await;
    });
    assert_eq!(t.backend().count(), others.len());
    for head in feed.heads.read(Clone::clone) {
        let text = format!("{head:?}");
        for (name, value) in [("User-Agent", "mine"), ("X-Request-Id", "mine"), ("X-Own", "mine")] {
            assert_ne!(head.field(name), Some(value), "{text}");
        }
        for name in ["X-Forwarded-For", "Sec-WebSocket-Extensions"] {
            assert_eq!(head.field(name), None, "{text}");
        }
        assert_eq!(head.field("Host"), Some("tidegate.test"), "{text}");
    }
    let metrics = t.proxy().metrics();
    assert_eq!(metrics.count("tidegate_pool_invariant_violations_total"), 0);
    t.no_rst();
}

/// A backend that ends without a Close, or says that it restarts, is looked for; its clients notice that they missed something only by
/// what they miss.
#[test]
fn a_lost_backend_is_found_again() {
    for (word, how, abnormal) in [
        (Word::Fin, "FIN without Close", "fin"),
        (Word::Rst, "RST", "reset"),
        (Word::Close(1001, "bye"), "Close 1001: bye", ""),
        (Word::Close(1012, ""), "Close 1012", ""),
        (Word::Say(Frame::new(3, "x")), "reserved opcode", "violation"),
    ] {
        let feed = Feed::new();
        let t = scene(&feed, "idle_timeout = '0s'");
        let all = Meeting::of(2);
        t.clients(2, async |c: &mut Peer| {
            c.handshake("/feed/a").await;
            if all.join().await {
                feed.text("before");
                feed.say(word.clone());
                feed.has_accepted(2).await;
                feed.text("after");
            }
            assert_eq!(c.read_text().await, "before");
            assert_eq!(c.read_text().await, "after");
            all.join().await;
            leave(c).await;
        });
        t.connection(1).seen().assert_closed_with(1000);
        let metrics = t.proxy().metrics_when("nobody is there", |metrics| metrics.count("tidegate_pool_keys") == 0);
        assert_eq!(metrics.count("tidegate_shared_gaps_total{cause=\"lost\"}"), 1, "{word:?}");
        assert_eq!(metrics.count("tidegate_shared_reconnects_total{result=\"connected\"}"), 1, "{word:?}");
        assert_eq!(t.backend().count(), 2);
        for known in ["fin", "reset", "violation", "silent", "stalled", "no_answer"] {
            let counted = metrics.count(&format!("tidegate_abnormal_closes_total{{cause=\"backend_{known}\"}}"));
            assert_eq!(counted, u64::from(known == abnormal), "{word:?}: {known}");
        }
        let is_lost =
            |line: &serde_json::Value| line["message"].as_str().is_some_and(|text| text.contains("WebSocket is lost"));
        let said = t.proxy().log_where("the loss", is_lost);
        assert_eq!(said["how"], how, "{said}");
        t.no_rst();
    }
}

/// One that is not back within `reconnect_grace`, or then says no, is lost: 1012.
#[test]
fn a_backend_that_does_not_come_back_is_lost() {
    let feed = Feed::new();
    let t = scene(&feed, "idle_timeout = '0s', reconnect_grace = '300ms'");
    let opened = Board::new(0);
    let clients = [(); 2].map(|()| {
        let opened = opened.clone();
        t.start_client(async move |c| {
            c.handshake("/feed/a").await;
            opened.change(|opened| *opened += 1);
            assert_eq!(c.read_close().await, 1012);
            c.answer_close().await;
        })
    });
    opened.wait(DEADLINE, |opened| (*opened == 2).then_some(())).expect("both");
    t.backend().stop_listening();
    feed.say(Word::Fin);
    for client in clients {
        client.join();
    }
    let metrics = t.proxy().metrics_when("the end", |metrics| metrics.count("tidegate_connections_active") == 0);
    assert_eq!(metrics.count("tidegate_shared_reconnects_total{result=\"expired\"}"), 1);
    let close = t.proxy().log_where("a session's end", |line| line["message"] == "close");
    assert_eq!((&close["initiator"], &close["code"]), (&"backend".into(), &1012.into()), "{close}");
    t.no_rst();

    let (count, joined) = (Board::new(0), Gate::new("the client has joined"));
    let t = Scene::new(&settings("idle_timeout = '0s', reconnect_grace = '45s'", ""))
        .backend({
            let joined = joined.clone();
            async move |c: &mut Peer| {
                let request = c.read_head().await;
                if count.change(|count| std::mem::replace(count, 1)) > 0 {
                    c.reply(Message::status(403, "Forbidden", "no more")).await;
                    return;
                }
                c.reply(Message::switching(&request)).await;
                joined.passed().await;
            }
        })
        .start();
    t.client(async |c| {
        c.handshake("/feed/a").await;
        joined.open();
        assert_eq!(c.read_close().await, 1012);
        c.answer_close().await;
    });
    let metrics = t.proxy().metrics();
    assert_eq!(metrics.count("tidegate_shared_reconnects_total{result=\"refused\"}"), 1);
    t.no_rst();
}

/// Nobody waits for a try that lasts longer than the grace: one that is there and says nothing is lost like one that is not there.
#[test]
fn a_backend_that_says_nothing_is_not_waited_for() {
    let feed = Feed::new();
    let pool = "idle_timeout = '0s', reconnect_grace = '500ms'";
    let t = Scene::new(&settings(pool, "upstream.handshake_timeout = '10m'"))
        .backend(backend::answers_once(feed.script()))
        .start();
    t.client(async |c| {
        c.handshake("/feed/a").await;
        feed.say(Word::Fin);
        assert_eq!(c.read_close().await, 1012);
        c.answer_close().await;
        assert_eq!(c.until_end().await.end, End::Fin);
    });
    let metrics = t.proxy().metrics_when("the end", |metrics| metrics.count("tidegate_connections_active") == 0);
    assert_eq!(metrics.count("tidegate_shared_reconnects_total{result=\"expired\"}"), 1);
}

/// A Close of the backend that is about its clients is theirs, as it was.
#[test]
fn a_close_of_the_backend_is_for_all() {
    for (code, reason) in [(1000, "done"), (1008, ""), (4001, "bye, all"), (NO_CODE, "")] {
        let feed = Feed::new();
        let t = scene(&feed, "idle_timeout = '0s'");
        let all = Meeting::of(2);
        t.clients(2, async |c: &mut Peer| {
            c.handshake("/feed/a").await;
            if all.join().await {
                feed.text("last");
                feed.say(Word::Close(code, reason));
            }
            assert_eq!(c.read_text().await, "last");
            let close = c.read_frame().await;
            assert_eq!((close.code(), close.payload.get(2..)), (code, Some(reason.as_bytes()).filter(|_| code > 0)));
            c.answer_close().await;
            assert_eq!(c.until_end().await.end, End::Fin);
        });
        assert_eq!(t.connection(0).seen().closes(), [code]);
        t.no_rst();
    }
}

/// Where clients may say something, a Close about a message is about one client's: the others notice nothing but a gap. Method: one of
/// two says something, and the backend refuses it with each of these codes.
#[test]
fn one_clients_message_is_not_the_end_of_others() {
    for code in [1002, 1003, 1007, 1008, 1009] {
        let feed = Feed::new();
        let t = scene(&feed, "idle_timeout = '0s', allow_client_messages = true");
        let all = Meeting::of(2);
        t.clients(2, async |c: &mut Peer| {
            c.handshake("/feed/a").await;
            if all.join().await {
                c.send_text("odd").await;
                feed.heard.until(DEADLINE, |heard| (heard.len() == 1).then_some(())).await.expect("it");
                feed.say(Word::Close(code, "what?"));
                feed.has_accepted(2).await;
                feed.text("on");
            }
            assert_eq!(c.read_text().await, "on", "{code}");
            all.join().await;
            leave(c).await;
        });
        t.connection(1).seen().assert_closed_with(1000);
        let metrics = t.proxy().metrics();
        assert_eq!(metrics.count("tidegate_shared_reconnects_total{result=\"connected\"}"), 1, "{code}");
        t.no_rst();
    }
}

/// A client's message is bounded by what may wait for the backend: 1009 beyond, at its header, and for that client alone.
#[test]
fn a_message_of_a_client_is_bounded() {
    let feed = Feed::new();
    let t = scene(&feed, "idle_timeout = '0s', allow_client_messages = true, queue_bytes = '64KiB'");
    let all = Meeting::of(2);
    t.clients(2, async |c: &mut Peer| {
        c.handshake("/feed/a").await;
        all.join().await;
        if c.index() == 0 {
            let header = [0x82, 0xff, 0, 0, 0, 0, 0, 1, 0, 1, 1, 2, 3, 4];
            c.send_bytes(&header).await;
            assert_eq!(c.read_close().await, 1009);
            c.answer_close().await;
            assert_eq!(c.until_end().await.end, End::Fin);
        } else {
            let most = "x".repeat(64 << 10);
            c.send_text(&most).await;
            let heard = feed.heard.until(DEADLINE, |heard| heard.first().cloned()).await;
            assert!(heard.expect("it") == most);
            leave(c).await;
        }
    });
    t.no_rst();
}

/// What the backend answers in place of a 101 is the answer for all who wait; one that is not there is 502.
#[test]
fn a_refusal_is_for_all_who_wait() {
    let all_wait = Gate::new("all three wait");
    let go = all_wait.clone();
    let t = Scene::new(&settings("idle_timeout = '0s'", ""))
        .backend(async move |c: &mut Peer| {
            if c.read_head().await.target() == "/feed/c" {
                return;
            }
            go.passed().await;
            let response = Message::status(401, "Unauthorized", "who are you?").header("WWW-Authenticate", "Bearer");
            c.reply(response.header("Set-Cookie", "session=1")).await;
        })
        .start();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            t.proxy().metrics_when("all three wait", |metrics| metrics.count("tidegate_pool_waiters") == 3);
            all_wait.open();
        });
        t.clients(3, async |c: &mut Peer| {
            let response = c.request(Message::websocket("/feed/a")).await;
            assert_eq!((response.code(), response.text().as_str()), (401, "who are you?"));
            assert_eq!((response.field("WWW-Authenticate"), response.field("Set-Cookie")), (Some("Bearer"), None));
        });
    });
    assert_eq!(t.backend().count(), 1);
    // No answer at all, and nobody there: as it is on a connection of one's own.
    t.client(async |c| assert_eq!(c.request(Message::websocket("/feed/c")).await.code(), 502));
    t.backend().stop_listening();
    t.client(async |c| assert_eq!(c.request(Message::websocket("/feed/b")).await.code(), 502));
    t.no_rst();
}

/// Who may not speak gets 1008, and the others notice nothing of it.
#[test]
fn messages_of_clients_are_refused() {
    let feed = Feed::new();
    let t = scene(&feed, "idle_timeout = '0s'");
    let all = Meeting::of(2);
    t.clients(2, async |c: &mut Peer| {
        c.handshake("/feed/a").await;
        all.join().await;
        if c.index() == 0 {
            c.send_text("hello?").await;
            assert_eq!(c.read_close().await, 1008);
            c.answer_close().await;
            assert_eq!(c.until_end().await.end, End::Fin);
            all.join().await;
        } else {
            all.join().await;
            feed.text("on");
            assert_eq!(c.read_text().await, "on");
            leave(c).await;
        }
    });
    assert_eq!(feed.heard.read(Vec::len), 0);
    let metrics = t.proxy().metrics();
    assert_eq!(metrics.count("tidegate_abnormal_closes_total{cause=\"client_violation\"}"), 1);
    t.no_rst();
}

/// Where clients may speak, the backend gets all of it, each client's in its order, fragments joined, and its text as text.
#[test]
fn messages_of_clients_are_passed_on() {
    const EACH: usize = 50;
    let feed = Feed::new();
    let t = scene(&feed, "idle_timeout = '0s', allow_client_messages = true, queue_messages = 4");
    let all = Meeting::of(3);
    t.clients(3, async |c: &mut Peer| {
        c.handshake("/feed/a").await;
        let name = c.index();
        for number in 0..EACH {
            c.send(&Frame::text(&format!("{name} ")).fin(false)).await;
            c.send(&Frame::new(0, number.to_string())).await;
        }
        let heard = feed.heard.until(DEADLINE, |heard| (heard.len() == 3 * EACH).then_some(())).await;
        heard.expect("all of it");
        all.join().await;
        leave(c).await;
    });
    let heard = feed.heard.read(Clone::clone);
    for name in 0..3 {
        let own: Vec<_> = heard.iter().filter_map(|text| text.strip_prefix(&format!("{name} "))).collect();
        assert_eq!(own, (0..EACH).map(|number| number.to_string()).collect::<Vec<_>>());
    }
    t.no_rst();
}

/// What a client gets of what was before it: nothing, the last message, or some.
#[test]
fn who_comes_late_gets_what_was() {
    for (replay, expected) in [
        ("replay = 'none'", &["new"][..]),
        ("replay = 'last'", &["four", "new"]),
        ("replay = 'last_n', replay_messages = 3", &["two", "three", "four", "new"]),
        ("replay = 'last_n', replay_messages = 9, queue_messages = 9", &["one", "two", "three", "four", "new"]),
    ] {
        let feed = Feed::new();
        let t = scene(&feed, &format!("idle_timeout = '0s', {replay}"));
        let all = Meeting::of(2);
        t.clients(2, async |c: &mut Peer| {
            if c.index() == 0 {
                c.handshake("/feed/a").await;
                for text in ["one", "two", "three", "four"] {
                    feed.text(text);
                    assert_eq!(c.read_text().await, text);
                }
                all.join().await;
                all.join().await;
                feed.text("new");
                assert_eq!(c.read_text().await, "new");
            } else {
                all.join().await;
                c.handshake("/feed/a").await;
                all.join().await;
                for text in expected {
                    assert_eq!(c.read_text().await, *text, "{replay}");
                }
            }
            leave(c).await;
        });
        t.no_rst();
    }
}

/// With `batch_delay` what comes one by one goes out together, and an end does not wait: neither a Close of the backend's nor its loss. Method:
/// the longest delay there is. While one WebSocket's messages wait, which tidegate has read one by one, another's last message and its Close
/// reach a client, and so does what a third one's backend says before it is lost; then the three messages come with one read. The machine may
/// be so slow that the delay is over meanwhile, so one try out of some has to go like this.
#[test]
fn what_waits_goes_out_together() {
    const TRIES: usize = 5;
    let feeds = ["/feed/waits", "/feed/closes", "/feed/is_lost"].map(|target| (target, Feed::new()));
    let t = Scene::new(&settings("idle_timeout = '0s', batch_delay = '1s'", ""))
        .backend({
            let feeds = feeds.clone();
            async move |c: &mut Peer| {
                let request = c.read_head().await;
                let (_, feed) = feeds.iter().find(|(target, _)| request.target() == *target).expect("a feed");
                feed.serve(c, request).await;
            }
        })
        .start();
    let [(waits, waiting), (closes, closing), (is_lost, losing)] = &feeds;
    let mut tries = Vec::new();
    while tries.len() < TRIES {
        let (order, joined) = (Board::new(Vec::new()), Gate::new("the first client has joined"));
        let first = t.start_client({
            let (waits, order, joined) = (*waits, order.clone(), joined.clone());
            async move |c| {
                c.handshake(waits).await;
                joined.open();
                c.sip(4096).await;
                order.change(|order| order.push(c.seen().texts().join(" ")));
                for text in ["one", "two", "three"] {
                    assert_eq!(c.read_text().await, text);
                }
                leave(c).await;
            }
        });
        joined.pass();
        let before = t.proxy().metrics().count("tidegate_shared_messages_total");
        for (text, count) in [("one", 1), ("two", 2), ("three", 3)] {
            waiting.text(text);
            let is_read = |metrics: &Metrics| metrics.count("tidegate_shared_messages_total") == before + count;
            t.proxy().metrics_when("that it was read", is_read);
        }
        for (target, feed, word) in [(closes, closing, Word::Close(1000, "done")), (is_lost, losing, Word::Fin)] {
            t.client(async |c| {
                c.handshake(target).await;
                feed.text("last");
                feed.say(word.clone());
                assert_eq!(c.read_text().await, "last");
                if let Word::Close(code, _) = word {
                    assert_eq!(c.read_close().await, code);
                    c.answer_close().await;
                    assert_eq!(c.until_end().await.end, End::Fin);
                } else {
                    leave(c).await;
                }
            });
            order.change(|order| order.push((*target).to_owned()));
        }
        first.join();
        tries.push(order.read(Clone::clone));
        if tries.last().is_some_and(|order| *order == [*closes, *is_lost, "one two three"]) {
            break;
        }
    }
    let last = tries.last().expect("a try");
    assert_eq!(*last, [*closes, *is_lost, "one two three"], "{tries:?}");
    t.no_rst();
}

/// With `batch_delay` nobody is slow because of what waits: a small message does, then one comes that is as large as all that may be kept, or
/// larger.
#[test]
fn what_waits_is_not_dropped() {
    for (queue_bytes, size) in [("1KiB", 1000), ("1KiB", 5000), ("1MiB", (1 << 20) - 10)] {
        for policy in ["disconnect", "drop_oldest", "conflate"] {
            let feed = Feed::new();
            let keys = format!("queue_bytes = '{queue_bytes}', slow_client = '{policy}'");
            let t = scene(&feed, &format!("idle_timeout = '0s', batch_delay = '1s', {keys}"));
            let all = Meeting::of(2);
            let told = ["small".repeat(20), "x".repeat(size)];
            t.clients(2, async |c: &mut Peer| {
                c.handshake("/feed/a").await;
                if all.join().await {
                    feed.text(&told[0]);
                    let is_read = |metrics: &Metrics| metrics.count("tidegate_shared_messages_total") == 1;
                    t.proxy().metrics_when("that it was read", is_read);
                    feed.text(&told[1]);
                }
                for text in &told {
                    assert!(c.read_text().await == *text, "{keys}");
                }
                leave(c).await;
            });
            let metrics = t.proxy().metrics();
            assert!(metrics.sum("tidegate_shared_slow_clients_total") < 0.5, "{keys}");
            assert_eq!(metrics.count("tidegate_shared_deliveries_total"), 4, "{keys}");
            t.no_rst();
        }
    }
}

/// With `batch_delay` each client gets all there is, in order and once, and with an end what waited for it.
#[test]
fn what_waits_goes_out_in_order() {
    let feed = Feed::new();
    let t = scene(&feed, "idle_timeout = '0s', batch_delay = '1s'");
    let all = Meeting::of(3);
    t.clients(3, async |c: &mut Peer| {
        c.handshake("/feed/a").await;
        if all.join().await {
            (0..100).for_each(|number| feed.text(&number.to_string()));
            feed.say(Word::Close(1000, "done"));
        }
        for number in 0..100 {
            assert_eq!(c.read_text().await, number.to_string());
        }
        assert_eq!(c.read_close().await, 1000);
        c.answer_close().await;
        assert_eq!(c.until_end().await.end, End::Fin);
    });
    assert_eq!(t.proxy().metrics().count("tidegate_shared_slow_clients_total{action=\"disconnect\"}"), 0);
    t.no_rst();
}

/// A client that stops reading holds up nobody. It is disconnected, or goes on with what is kept; what it missed is counted.
#[test]
fn a_slow_client_harms_nobody() {
    const COUNT: usize = 3000;
    for policy in ["disconnect", "drop_oldest", "conflate"] {
        let feed = Feed::new();
        let pool = format!("idle_timeout = '0s', queue_messages = 16, slow_client = '{policy}'");
        // Small buffers, so that what is not read is soon more than is kept.
        let others = "websocket.send_buffer = '8KiB'";
        let t = Scene::new(&settings(&pool, others)).backend(feed.script()).start();
        let all = Meeting::of(2);
        let text = |number: usize| format!("{number:06}{}", "x".repeat(2000));
        let number = |text: &str| text[..6].parse::<usize>().expect("a number");
        t.clients(2, async |c: &mut Peer| {
            let is_slow = c.index() == 0;
            if is_slow {
                c.set_recv_buffer(4096);
            }
            c.handshake("/feed/a").await;
            all.join().await;
            if !is_slow {
                for at in 0..COUNT {
                    feed.text(&text(at));
                    assert!(c.read_text().await == text(at), "{policy}: {at}");
                }
                all.join().await;
                all.join().await;
                return leave(c).await;
            }
            all.join().await;
            if policy == "disconnect" {
                assert_eq!(c.read_close().await, 1013);
                c.answer_close().await;
                assert_eq!(c.until_end().await.end, End::Fin);
                all.join().await;
                return;
            }
            let mut seen = vec![number(&c.read_text().await)];
            while seen.last() != Some(&(COUNT - 1)) {
                seen.push(number(&c.read_text().await));
            }
            assert!(seen.is_sorted_by(|a, b| a < b) && seen.len() < COUNT, "{policy}: {seen:?}");
            let kept = seen.iter().rev().zip(seen.iter().rev().skip(1)).take_while(|(b, a)| *b - *a == 1).count();
            assert_eq!(kept > 8, policy == "drop_oldest", "{policy}: {seen:?}");
            all.join().await;
            leave(c).await;
        });
        let metrics = t.proxy().metrics_when("the end", |metrics| metrics.count("tidegate_connections_active") == 0);
        let slow = metrics.count(&format!("tidegate_shared_slow_clients_total{{action=\"{policy}\"}}"));
        assert!(slow >= 1, "{policy}");
        let gaps = metrics.count("tidegate_shared_gaps_total{cause=\"slow\"}");
        assert_eq!(gaps, if policy == "disconnect" { 0 } else { slow }, "{policy}");
        if policy == "disconnect" {
            let close = t.proxy().log_where("its end", |line| line["message"] == "close" && line["code"] == 1013);
            assert_eq!((&close["why"], &close["initiator"]), (&"pool.slow_client".into(), &"tidegate".into()));
        }
        t.no_rst();
    }
}

/// With `authorize = "always"` the backend judges each who joins, by a handshake of its own that comes to nothing.
#[test]
fn each_who_joins_is_judged() {
    let feed = Feed::new();
    let judge = feed.script();
    let pool = "idle_timeout = '0s', authorize = 'always', ignore_headers = ['Authorization']";
    let t = Scene::new(&settings(pool, "")).backend(judge).start();
    t.client(async |c| {
        c.handshake_with(Message::websocket("/feed/a").header("Authorization", "Bearer a")).await;
        feed.text("hello");
        assert_eq!(c.read_text().await, "hello");
        leave(c).await;
    });
    let heads = feed.heads.read(Clone::clone);
    let shown: Vec<_> = heads.iter().map(|head| head.field("Authorization").is_some()).collect();
    // The shared one carries what is in its key; the other is the client's own.
    assert_eq!(shown, [false, true]);
    t.connection(1).seen().assert_closed_with(1000);
    t.no_rst();
}

/// A drain ends clients one by one, as ever, and the WebSocket that they share after the last of them; one that nobody uses at once.
#[test]
fn a_drain_ends_what_is_shared() {
    let feed = Feed::new();
    let others = "drain.delay = '0s'\ndrain.window = '100ms'";
    let t = Scene::new(&settings("idle_timeout = '1h'", others)).backend(feed.script()).start();
    t.client(async |c| {
        c.handshake("/feed/unused").await;
        leave(c).await;
    });
    let all = Meeting::of(3);
    t.clients(3, async |c: &mut Peer| {
        c.handshake("/feed/a").await;
        if all.join().await {
            t.proxy().sigterm();
        }
        assert_eq!(c.read_close().await, 1001);
        c.answer_close().await;
        assert_eq!(c.until_end().await.end, End::Fin);
    });
    for index in 0..2 {
        t.connection(index).seen().assert_closed_with(1001);
    }
    assert!(t.proxy().wait_exit(DEADLINE).success());
    assert_eq!(t.backend().count(), 2);
}

/// As many keys as may be; beyond that 503, but not for those who join one that is there.
#[test]
fn keys_are_bounded() {
    let feed = Feed::new();
    let t = scene(&feed, "idle_timeout = '0s', max_keys = 2");
    let all = Meeting::of(4);
    t.clients(4, async |c: &mut Peer| {
        let path = ["/feed/a", "/feed/b", "/feed/a", "/feed/c"][c.index()];
        if c.index() == 3 {
            all.join().await;
            assert_eq!(c.request(Message::websocket(path)).await.code(), 503);
            all.join().await;
        } else {
            c.handshake(path).await;
            all.join().await;
            all.join().await;
            leave(c).await;
        }
    });
    let metrics = t.proxy().metrics();
    assert!(metrics.sum_with("tidegate_refused_total", "reason=\"pool_keys\"") > 0.0);
    t.no_rst();
}

/// A refusal that is remembered is no WebSocket: others who are refused get their answer too, and who is let in is let in.
#[test]
fn refusals_take_no_key() {
    let feed = Feed::new();
    let script = feed.script();
    let t = Scene::new(&settings("idle_timeout = '0s', max_keys = 2, key_headers = ['X-Bad']", ""))
        .backend({
            let feed = feed.clone();
            async move |c: &mut Peer| {
                if c.index() < 6 {
                    c.read_head().await;
                    feed.heads.change(|heads| heads.push(Message::line("GET / HTTP/1.1")));
                    c.reply(Message::status(401, "Unauthorized", "")).await;
                } else {
                    script(c).await;
                }
            }
        })
        .start();
    for index in 0..6 {
        t.client(async |c| {
            let request = Message::websocket("/feed/a").header("X-Bad", &index.to_string());
            assert_eq!(c.request(request).await.code(), 401);
        });
        // Of those that were refused no more are remembered than there may be others.
        assert!(t.proxy().metrics().count("tidegate_pool_keys") <= 2);
    }
    t.client(async |c| {
        c.handshake("/feed/a").await;
        leave(c).await;
    });
    t.no_rst();
}

/// What is open when nobody waits for it any more is closed at once, however long others are kept. Method: the only client leaves
/// before the backend answers.
#[test]
fn what_nobody_waits_for_is_closed() {
    let feed = Feed::new();
    let left = Gate::new("the client has left");
    let t = Scene::new(&settings("idle_timeout = '1h'", ""))
        .backend({
            let (feed, left) = (feed.clone(), left.clone());
            async move |c: &mut Peer| {
                let request = c.read_head().await;
                feed.heads.change(|heads| heads.push(request.clone()));
                left.passed().await;
                c.reply(Message::switching(&request)).await;
                c.next_frame(LIMIT).await.expect("its Close");
                c.answer_close().await;
            }
        })
        .start();
    t.client(async |c| {
        c.send_bytes(&Message::websocket("/feed/a").bytes()).await;
        feed.has_accepted(1).await;
        c.rst();
    });
    t.proxy().metrics_when("nobody waits", |metrics| metrics.count("tidegate_pool_waiters") == 0);
    left.open();
    t.connection(0).seen().assert_closed_with(1000);
    let metrics = t.proxy().metrics_when("nothing is left", |metrics| metrics.count("tidegate_pool_keys") == 0);
    assert_eq!(metrics.count("tidegate_pool_invariant_violations_total"), 0);
}

/// Messages may be larger than frames may be: what comes in fragments goes on in fragments, in both directions, each within the limit.
#[test]
fn messages_may_be_larger_than_frames() {
    let feed = Feed::new();
    let pool = "idle_timeout = '0s', allow_client_messages = true";
    let others = "websocket.max_message = '64KiB'\nwebsocket.max_frame = '1KiB'";
    let t = Scene::new(&settings(pool, others)).backend(feed.script()).start();
    t.client(async |c| {
        c.handshake("/feed/a").await;
        let parts = ["a", "b", "c"].map(|letter| letter.repeat(1000));
        for (index, part) in parts.iter().enumerate() {
            let frame = if index == 0 { Frame::text(part) } else { Frame::new(0, part) };
            feed.say(Word::Say(frame.clone().fin(index == 2)));
            c.send(&frame.fin(index == 2)).await;
        }
        let (mut text, mut is_whole) = (String::new(), false);
        while !is_whole {
            let frame = c.read_frame().await;
            assert!(frame.payload.len() <= 1024);
            (text, is_whole) = (text + &frame.text(), frame.fin);
        }
        assert!(text == parts.concat());
        let heard = feed.heard.until(DEADLINE, |heard| heard.first().cloned()).await;
        assert!(heard.expect("it all") == parts.concat());
        leave(c).await;
    });
    t.no_rst();
}

/// A reload leaves those who share as they are; whoever comes then shares with others who come then.
#[test]
fn a_reload_leaves_those_who_share() {
    let feed = Feed::new();
    let t = Scene::new(&settings("idle_timeout = '0s'", "reload.watch = '0s'")).backend(feed.script()).start();
    let (joined, reloaded) = (Gate::new("the first has joined"), Gate::new("the reload"));
    let first = t.start_client({
        let (feed, joined, reloaded) = (feed.clone(), joined.clone(), reloaded.clone());
        async move |c| {
            c.handshake("/feed/a").await;
            joined.open();
            reloaded.passed().await;
            feed.text("still there");
            assert_eq!(c.read_text().await, "still there");
            leave(c).await;
        }
    });
    joined.pass();
    t.proxy().configure(&settings("idle_timeout = '0s', replay = 'last'", "reload.watch = '0s'"));
    let request = Message::line("POST /reload HTTP/1.1").header("Host", "localhost").header("Content-Length", "0");
    assert_eq!(t.proxy().admin(&request).expect("an answer").code(), 200);
    let all = Meeting::of(2);
    t.clients(2, async |c: &mut Peer| {
        c.handshake("/feed/a").await;
        if all.join().await {
            assert_eq!(feed.heads.read(Vec::len), 2);
            // The one of before is told of until it ends.
            let told: serde_json::Value = serde_json::from_str(&t.proxy().get("/connections").text()).expect("JSON");
            let clients = |shared: &serde_json::Value| shared["clients"].as_u64();
            let shared: Vec<_> = told["websockets"].as_array().expect("a list").iter().map(clients).collect();
            assert_eq!(shared, [Some(2), Some(1)], "{told}");
            reloaded.open();
        }
        assert_eq!(c.read_text().await, "still there");
        leave(c).await;
    });
    first.join();
    for index in 0..2 {
        t.connection(index).seen().assert_closed_with(1000);
    }
    t.no_rst();
}

/// Clients on streams of HTTP/2, and a backend with TLS: it is all the same.
#[test]
fn streams_and_tls_share_as_well() {
    for run in [streams, encrypted, secure] {
        run(one_upstream_feeds_all);
    }
}

/// What is shared is told of to people: a route, a hash, how many.
#[test]
fn keys_are_told_by_a_hash() {
    let feed = Feed::new();
    let t = scene(&feed, "");
    t.client(async |c| {
        let request = Message::websocket("/feed/a?token=swordfish");
        c.handshake_with(request.header("Authorization", "Bearer swordfish")).await;
        let told = t.proxy().get("/connections").text();
        let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
        let shared = &told["websockets"][0];
        assert_eq!(shared["route"], "/feed/*");
        assert_eq!(shared["key"].as_str().map(str::len), Some(12), "{shared}");
        assert_eq!((&shared["clients"], &shared["state"]), (&1.into(), &"open".into()), "{shared}");
        leave(c).await;
    });
    for target in ["/connections", "/live.json", "/metrics", "/status"] {
        assert!(!t.proxy().get(target).text().contains("swordfish"), "{target}");
    }
    let close = t.proxy().log_where("a session's end", |line| line["message"] == "close");
    assert_eq!(close["endpoint"], t.backend().address.to_string().as_str());
    let told = t.proxy().printed().iter().any(|(_, line)| line.contains("swordfish"));
    assert!(!told, "the log tells a secret");
}

/// Within `idle_timeout` after the last client the next one finds it open. When it is lost in that time, nobody looks for it.
#[test]
fn what_nobody_uses_is_kept_for_a_while() {
    let feed = Feed::new();
    let t = scene(&feed, "idle_timeout = '1h'");
    for text in ["one", "two"] {
        t.client(async |c| {
            c.handshake("/feed/a").await;
            feed.text(text);
            assert_eq!(c.read_text().await, text);
            leave(c).await;
        });
        let is_idle = |metrics: &Metrics| metrics.count("tidegate_pool_connections{state=\"idle\"}") == 1;
        t.proxy().metrics_when("nobody uses it", is_idle);
    }
    assert_eq!(t.backend().count(), 1);
    feed.say(Word::Fin);
    let metrics = t.proxy().metrics_when("nothing is left", |metrics| metrics.count("tidegate_pool_keys") == 0);
    assert_eq!(metrics.count("tidegate_shared_reconnects_total{result=\"unused\"}"), 1);
    assert_eq!(metrics.count("tidegate_shared_gaps_total{cause=\"lost\"}"), 0);
    assert_eq!((t.backend().count(), metrics.count("tidegate_pool_invariant_violations_total")), (1, 0));
    t.no_rst();
}

/// A backend that is silent, and answers no Ping, is lost as well: its WebSocket gets a Close, and another one is opened.
#[test]
fn a_silent_backend_is_lost() {
    let feed = Feed::new();
    let (lively, asked) = (feed.script(), Board::new(0));
    let others = "websocket.ping_interval = '500ms'\nwebsocket.pong_timeout = '2s'";
    let t = Scene::new(&settings("idle_timeout = '0s'", others))
        .backend(async move |c: &mut Peer| {
            if asked.change(|asked| std::mem::replace(asked, 1)) > 0 {
                return lively(c).await;
            }
            c.accept_websocket().await;
            while c.next_frame(LIMIT).await.is_ok_and(|frame| frame.opcode != CLOSE) {}
            c.answer_close().await;
        })
        .start();
    t.client(async |c| {
        c.handshake("/feed/a").await;
        let mut is_told = false;
        loop {
            tokio::select! {
                () = feed.has_accepted(1), if !is_told => {
                    is_told = true;
                    feed.text("back");
                }
                frame = c.read_frame() => match frame.opcode {
                    PING => _ = c.send(&Frame::new(PONG, &frame.payload)).await,
                    _ => break assert_eq!(frame.text(), "back"),
                },
            }
        }
        leave(c).await;
    });
    assert_eq!(t.connection(0).seen().closes(), [1001]);
    let metrics = t.proxy().metrics();
    assert_eq!(metrics.count("tidegate_shared_gaps_total{cause=\"lost\"}"), 1);
    assert_eq!(metrics.count("tidegate_abnormal_closes_total{cause=\"backend_silent\"}"), 1);
    t.no_rst();
}
