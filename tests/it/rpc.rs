//! JSON-RPC of many clients on one WebSocket of the backend: who gets which answer, when there is a WebSocket at all, and what becomes of
//! clients when it is lost. What may be in a message is looked at where that is done (`src/hub/rpc/core/tests.rs`).

use std::{collections::BTreeMap, time::Duration};

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{
    Board, DEADLINE, Frame, LIMIT, Message, Peer, Scene, backend,
    crowd::is_strict,
    transcript::End,
    ws::{CLOSE, PING, PONG},
};

/// What a backend has been asked, on all of its connections.
#[derive(Clone)]
struct Asked {
    heads: Board<Vec<Message>>,
    /// Methods in order of arrival, with their params.
    methods: Board<Vec<(String, Value)>>,
    /// By subscription: whether it lives.
    subscriptions: Board<BTreeMap<String, bool>>,
    /// Connections that have ended with the Close handshake.
    over: Board<usize>,
}

impl Asked {
    fn new() -> Self {
        let (heads, methods) = (Board::new(Vec::new()), Board::new(Vec::new()));
        Self { heads, methods, subscriptions: Board::new(BTreeMap::new()), over: Board::new(0) }
    }

    /// As soon as it was asked this so often.
    async fn heard(&self, method: &str, count: usize) {
        let heard = |methods: &Vec<(String, Value)>| {
            (methods.iter().filter(|(name, _)| name == method).count() >= count).then_some(())
        };
        self.methods.until(DEADLINE, heard).await.unwrap_or_else(|| panic!("{count} times {method}"));
    }

    fn count(&self, method: &str) -> usize {
        self.methods.read(|methods| methods.iter().filter(|(name, _)| name == method).count())
    }

    /// A backend that gives back params (`echo`), in any order and in batches; with the answers to so many others (`burst`); not before it is told to
    /// (`hold`, `free`); or
    /// ends without a Close (`die`). `fan` has it tell everybody so often.
    fn script(&self) -> impl AsyncFn(&mut Peer) + Send + Sync + 'static {
        let asked = self.clone();
        async move |c: &mut Peer| {
            let request = c.read_head().await;
            asked.heads.change(|heads| heads.push(request.clone()));
            let mut response = Message::switching(&request);
            if let Some(protocols) = request.field("Sec-WebSocket-Protocol") {
                response = response.header("Sec-WebSocket-Protocol", protocols.split(',').next().unwrap_or_default());
            }
            c.reply(response).await;
            let (mut echoes, mut bursts, mut held) = (Vec::new(), Vec::new(), Vec::new());
            loop {
                // Where nothing comes for a moment, what was kept back goes out.
                let patience = if echoes.is_empty() { LIMIT } else { Duration::from_millis(2) };
                let frame = match c.next_frame(patience).await {
                    Ok(frame) => frame,
                    Err(End::Timeout) => {
                        send(c, &mut echoes).await;
                        continue;
                    }
                    Err(_) => return,
                };
                match frame.opcode {
                    CLOSE => {
                        c.answer_close().await;
                        return asked.over.change(|over| *over += 1);
                    }
                    PING => _ = c.send(&Frame::new(PONG, &frame.payload)).await,
                    PONG => {}
                    _ => {
                        let message: Value = serde_json::from_str(&frame.text()).expect("tidegate passes on JSON");
                        let elements = match message {
                            Value::Array(elements) => elements,
                            one => vec![one],
                        };
                        for element in elements {
                            let Some(method) = element["method"].as_str() else { continue };
                            let (id, params) = (&element["id"], element["params"].clone());
                            asked.methods.change(|methods| methods.push((method.to_owned(), params.clone())));
                            let answer = |result: &Value| format!(r#"{{"jsonrpc":"2.0","result":{result},"id":{id}}}"#);
                            match method {
                                "echo" => echoes.push(answer(&params)),
                                "burst" => bursts.push(answer(&params)),
                                "hold" => held.push(answer(&params)),
                                "free" => {
                                    held.push(answer(&params));
                                    for answer in held.drain(..) {
                                        c.send_text(&answer).await;
                                    }
                                }
                                "die" => return,
                                "odd" => say_odd(c, &answer(&params)).await,
                                "dislike" => {
                                    let code = params[0].as_u64().and_then(|code| code.try_into().ok());
                                    c.send_close(code.expect("a code"), "").await;
                                    c.until_end().await;
                                    return;
                                }
                                "fan" => {
                                    let text = "x".repeat(1000);
                                    for _ in 0..params[0].as_u64().expect("a number") {
                                        c.send_text(&format!(
                                            r#"{{"jsonrpc":"2.0","method":"all","params":["{text}"]}}"#
                                        ))
                                        .await;
                                    }
                                    c.send_text(&answer(&params)).await;
                                }
                                // The same for everybody, as Solana has it.
                                "slotSubscribe" => _ = c.send_text(&answer(&7.into())).await,
                                "slots" => say_slots(c, &params, &answer(&params)).await,
                                "eth_subscribe" => {
                                    let number = asked.subscriptions.change(|all| {
                                        let name = format!("0x{:x}", all.len() + 1);
                                        all.insert(name.clone(), true);
                                        name
                                    });
                                    // The first news overtake the answer.
                                    c.send_text(&news(&number, "first")).await;
                                    c.send_text(&answer(&number.as_str().into())).await;
                                    c.send_text(&news(&number, "second")).await;
                                }
                                "eth_unsubscribe" => {
                                    let name = params[0].as_str().expect("an id").to_owned();
                                    let lived = asked.subscriptions.change(|all| all.insert(name, false));
                                    c.send_text(&answer(&(lived == Some(true)).into())).await;
                                }
                                _ => {}
                            }
                        }
                        if echoes.len() >= 7 {
                            send(c, &mut echoes).await;
                        }
                        if bursts.len() >= BURST {
                            send(c, &mut bursts).await;
                        }
                    }
                }
            }
        }
    }
}

/// What means nothing to anybody: no JSON, an error about nobody knows what, an answer without a question, a notification by an unknown method.
const ODD: [&str; 4] = [
    "x",
    r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32700,"message":"what?"}}"#,
    r#"{"jsonrpc":"2.0","id":999999,"result":1}"#,
    r#"{"jsonrpc":"2.0","method":"other","params":[]}"#,
];

/// All of that, and news that nobody has subscribed to; then an answer.
async fn say_odd(c: &mut Peer, answer: &str) {
    c.send(&Frame::binary("x")).await;
    for text in ODD {
        c.send_text(text).await;
    }
    c.send_text(&news("0x0", "unasked")).await;
    c.send_text(answer).await;
}

/// So many long news that many may hold; then an answer.
async fn say_slots(c: &mut Peer, params: &Value, answer: &str) {
    let text = "x".repeat(SLOT_BYTES);
    for number in 0..params[0].as_u64().expect("a number") {
        let params = format!(r#"{{"subscription":7,"result":[{number},"{text}"]}}"#);
        c.send_text(&format!(r#"{{"jsonrpc":"2.0","method":"slotNotification","params":{params}}}"#)).await;
    }
    c.send_text(answer).await;
}

/// Requests of a burst.
const BURST: usize = 20;

/// Of news that one backend's id is about, and many hold.
const SLOT_BYTES: usize = 100 << 10;

fn news(subscription: &str, what: &str) -> String {
    format!(
        r#"{{"jsonrpc":"2.0","method":"eth_subscription","params":{{"subscription":"{subscription}","result":"{what}"}}}}"#
    )
}

/// The last ones first: some alone, the others in one batch.
async fn send(c: &mut Peer, answers: &mut Vec<String>) {
    answers.reverse();
    let rest = answers.split_off(answers.len() / 2);
    for answer in std::mem::take(answers) {
        c.send_text(&answer).await;
    }
    c.send_text(&format!("[{}]", rest.join(","))).await;
}

fn settings(pool: &str, others: &str) -> String {
    let drain = "drain.delay = '0s'\ndrain.window = '100ms'";
    format!(
        "{drain}\n{others}\nroute = [{{ path = '/rpc', pool = {{ mode = 'shared', shared = 'rpc', notifications = ['all'], {pool} }} }}]\n"
    )
}

fn scene(asked: &Asked, pool: &str) -> Scene {
    Scene::new(&settings(pool, "")).backend(asked.script()).start()
}

fn request(id: &str, method: &str, params: &str) -> String {
    format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"{method}","params":{params}}}"#)
}

fn answer(id: &str, result: &str) -> String {
    format!(r#"{{"jsonrpc":"2.0","result":{result},"id":{id}}}"#)
}

/// The process ends, and with it what is kept open for the next request.
fn over(t: &Scene) {
    t.proxy().sigterm();
    assert!(t.proxy().wait_exit(DEADLINE).success());
    t.no_rst();
}

async fn leave(c: &mut Peer) {
    c.send_close(1000, "").await;
    c.until_end().await.assert_closed_with(1000);
}

/// One question, and its answer.
async fn ask(c: &mut Peer, what: &str) {
    let params = format!("[\"{what}\"]");
    c.send_text(&request("\"q\"", "echo", &params)).await;
    let told = c.read_text().await;
    assert!(told == answer("\"q\"", &params) || told == format!("[{}]", answer("\"q\"", &params)), "{told}");
}

/// Many clients with the same ids, of all types, alone and in batches, have one WebSocket at a backend that answers in another order and in
/// batches of its own: each gets exactly their own answers, each once, with their ids byte for byte.
#[test]
fn each_gets_exactly_their_own() {
    let (clients, each) = if is_strict() { (500, 201) } else { (20, 42) };
    let ids = ["1", "\"1\"", "1.0", "1e0", "null", "-1", "18446744073709551617", r#""\u0031""#, "\"\u{e9}\"", "\"\""];
    let asked = Asked::new();
    let t = scene(&asked, "idle_timeout = '45s'");
    t.clients(clients, async |c: &mut Peer| {
        c.handshake("/rpc").await;
        let own = |number: usize| {
            let params = format!(r#"[{},{number},{{"id":1}}]"#, c.index());
            let id = ids[number % ids.len()];
            (request(id, "echo", &params), answer(id, &params))
        };
        let (mut wanted, mut texts) = (Vec::new(), Vec::new());
        for number in (0..each).step_by(3) {
            let three = [own(number), own(number + 1), own(number + 2)];
            if number % 2 == 0 {
                // A batch, with one that is not to be answered and one that can't be.
                let tell = r#"{"jsonrpc":"2.0","method":"tell"}"#;
                let [a, b, c] = three;
                texts.push(format!("[{}, {tell}, {}, {}]", a.0, b.0, c.0));
                wanted.push(format!("[{},{},{}]", a.1, b.1, c.1));
            } else {
                for (text, answer) in three {
                    texts.push(text);
                    wanted.push(answer);
                }
            }
        }
        for text in texts {
            c.send_text(&text).await;
        }
        let mut told = Vec::new();
        for _ in &wanted {
            told.push(c.read_text().await);
        }
        told.sort();
        wanted.sort();
        assert!(told == wanted, "{}: {told:#?} is not {wanted:#?}", c.index());
        leave(c).await;
    });
    assert_eq!(t.backend().count(), 1);
    assert_eq!(asked.count("echo"), clients * each);
    let metrics =
        t.proxy().metrics_when("nobody is there", |metrics| metrics.count("tidegate_connections_active") == 0);
    assert_eq!(metrics.count("tidegate_rpc_requests_total{result=\"answered\"}"), (clients * each) as u64);
    assert_eq!(metrics.count("tidegate_rpc_outstanding"), 0);
    assert_eq!(metrics.count("tidegate_shared_queue_bytes"), 0);
    assert_eq!(metrics.count("tidegate_pool_invariant_violations_total"), 0);
    over(&t);
}

/// What many hold by one id of the backend's, and is long, is told in several turns: each gets all of it in order, and behind it the answer to what
/// was asked before it. Method: more holders than one turn has room for messages of that length.
#[test]
fn long_news_to_many_are_in_order() {
    const CLIENTS: usize = 8;
    const EACH: usize = 12;
    const SLOTS: u64 = 3;
    let asked = Asked::new();
    let pool = "subscriptions = ['slotSubscribe slotUnsubscribe slotNotification'], queue_bytes = '16MiB'";
    let t = scene(&asked, pool);
    let ready = Board::new(0);
    t.clients(CLIENTS, async |c: &mut Peer| {
        c.handshake("/rpc").await;
        let mut last = BTreeMap::new();
        for _ in 0..EACH {
            c.send_text(&request("1", "slotSubscribe", "[]")).await;
            let told: Value = serde_json::from_str(&c.read_text().await).expect("JSON");
            last.insert(told["result"].as_u64().expect("a number"), 0);
        }
        assert_eq!(last.len(), EACH);
        ready.change(|ready| *ready += 1);
        ready.until(DEADLINE, |ready| (*ready == CLIENTS).then_some(())).await.expect("all have subscribed");
        if c.index() == 0 {
            c.send_text(&request("2", "slots", &format!("[{SLOTS}]"))).await;
        }
        for _ in 0..SLOTS * EACH as u64 {
            let told: Value = serde_json::from_str(&c.read_text().await).expect("JSON");
            let id = told["params"]["subscription"].as_u64().expect("a number");
            let next = last.get_mut(&id).expect("its own");
            assert_eq!(told["params"]["result"][0], *next);
            *next += 1;
        }
        assert!(last.values().all(|next| *next == SLOTS), "{last:?}");
        if c.index() == 0 {
            assert_eq!(c.read_text().await, answer("2", &format!("[{SLOTS}]")));
        }
        leave(c).await;
    });
    assert_eq!(t.backend().count(), 1);
    over(&t);
}

/// Bursts of requests with pauses between them: the WebSocket is opened for the first request of a burst and by nobody else, and closed, in
/// order, when nothing was asked for `idle_timeout`; clients stay. A burst is answered when all of it has been asked.
#[test]
fn it_is_open_only_while_something_is_asked() {
    const CLIENTS: usize = 4;
    const BURSTS: usize = 3;
    let asked = Asked::new();
    let t = scene(&asked, "idle_timeout = '100ms'");
    // How many have been opened, and are over, before the first burst: by handshakes.
    let (here, before) = (Board::new(0), Board::new(None));
    t.clients(CLIENTS, async |c: &mut Peer| {
        c.handshake("/rpc").await;
        here.change(|here| *here += 1);
        if c.index() == 0 {
            here.until(DEADLINE, |here| (*here == CLIENTS).then_some(())).await.expect("all of them");
            let all = async {
                asked.over.until(DEADLINE, |over| (*over == asked.heads.read(Vec::len)).then_some(*over)).await
            };
            let opened = all.await.expect("nobody asks");
            before.change(|before| *before = Some(opened));
        }
        let opened = before.until(LIMIT, |before| *before).await.expect("the first of them knows");
        for burst in 0..BURSTS {
            asked.over.until(DEADLINE, |over| (*over >= opened + burst).then_some(())).await.expect("a pause");
            let mut wanted = Vec::new();
            for number in 0..BURST / CLIENTS {
                let params = format!("[{burst},{number}]");
                wanted.push(answer("7", &params));
                c.send_text(&request("7", "burst", &params)).await;
            }
            let mut told = Vec::new();
            while told.len() < wanted.len() {
                told.push(c.read_text().await);
            }
            told.sort();
            assert_eq!(told, wanted);
        }
        leave(c).await;
    });
    let metrics = t.proxy().metrics_when("nobody is there", |metrics| metrics.count("tidegate_pool_keys") == 0);
    let opened = before.read(|before| before.expect("set above"));
    assert_eq!(t.backend().count(), opened + BURSTS);
    assert_eq!(metrics.count("tidegate_pool_opens_total{result=\"opened\"}"), (opened + BURSTS) as u64);
    assert_eq!(metrics.count("tidegate_pool_references"), 0);
    for index in 0..opened + BURSTS {
        t.connection(index).seen().assert_closed_with(1000);
    }
    t.no_rst();
}

/// A backend that ends with something outstanding: that gets an error object, who had a subscription gets 1012, the others stay, and so does who
/// asked; the next question is answered by another WebSocket.
#[test]
fn a_lost_backend_is_told_of() {
    let asked = Asked::new();
    let t = scene(&asked, "idle_timeout = '45s'");
    let subscribed = Board::new(false);
    t.clients(3, async |c: &mut Peer| {
        c.handshake("/rpc").await;
        match c.index() {
            0 => {
                c.send_text(&request("\"held\"", "hold", "[]")).await;
                asked.heard("hold", 1).await;
                subscribed.until(DEADLINE, |done| done.then_some(())).await.expect("a subscription");
                c.send_text(&request("2", "die", "[]")).await;
                let told = [c.read_text().await, c.read_text().await].concat();
                assert_eq!(told.matches("\"code\":-32050").count(), 2, "{told}");
                assert!(told.contains("\"id\":\"held\"") && told.contains("\"carried_out\":\"unknown\""), "{told}");
                ask(c, "again").await;
                leave(c).await;
            }
            1 => {
                c.send_text(&request("1", "eth_subscribe", "[]")).await;
                for _ in 0..3 {
                    c.read_text().await;
                }
                subscribed.change(|done| *done = true);
                assert_eq!(c.read_close().await, 1012);
                c.answer_close().await;
                assert_eq!(c.until_end().await.end, End::Fin);
            }
            _ => {
                // The others want it back, so it is looked for.
                asked.heads.until(DEADLINE, |heads| (heads.len() == 2).then_some(())).await.expect("another WebSocket");
                ask(c, "and me").await;
                leave(c).await;
            }
        }
    });
    assert_eq!(t.backend().count(), 2);
    assert_eq!((asked.count("hold"), asked.count("die")), (1, 1), "nothing is sent again");
    let metrics =
        t.proxy().metrics_when("nobody is there", |metrics| metrics.count("tidegate_connections_active") == 0);
    assert_eq!(metrics.count("tidegate_rpc_requests_total{result=\"lost\"}"), 2);
    assert_eq!(metrics.count("tidegate_shared_reconnects_total{result=\"connected\"}"), 1);
    assert_eq!(metrics.count("tidegate_rpc_subscriptions"), 0);
    over(&t);
}

/// A backend that ends the WebSocket for what one client has said: that one gets error objects, at the third time in a row Close 1008, and with
/// the others it goes on. Method: two clients do so, one after the other, the second one three times.
#[test]
fn what_one_says_ends_nobody_else() {
    let asked = Asked::new();
    let t = scene(&asked, "idle_timeout = '45s'");
    let done = Board::new(0);
    t.clients(3, async |c: &mut Peer| {
        c.handshake("/rpc").await;
        let index = c.index();
        if index == 0 {
            ask(c, "before").await;
        } else {
            done.until(DEADLINE, |done| (*done == index).then_some(())).await.expect("those before");
        }
        let codes: &[u16] = [&[][..], &[1009, 1002], &[1003, 1007, 1008]][index];
        for code in codes {
            c.send_text(&request("1", "dislike", &format!("[{code}]"))).await;
            let told = c.read_text().await;
            assert!(told.contains("\"code\":-32050"), "{told}");
        }
        if codes.len() == 3 {
            assert_eq!(c.read_close().await, 1008);
            c.answer_close().await;
            assert_eq!(c.until_end().await.end, End::Fin);
        }
        done.change(|done| *done += 1);
        done.until(DEADLINE, |done| (*done == 3).then_some(())).await.expect("all");
        if codes.len() < 3 {
            ask(c, "after").await;
            leave(c).await;
        }
    });
    assert_eq!(t.backend().count(), 6);
    let metrics =
        t.proxy().metrics_when("nobody is there", |metrics| metrics.count("tidegate_connections_active") == 0);
    assert_eq!(metrics.count("tidegate_shared_reconnects_total{result=\"connected\"}"), 5);
    over(&t);
}

/// One that is not back within `reconnect_grace` is lost for all who are there: an error object for who asked meanwhile, then 1012.
#[test]
fn a_backend_that_does_not_come_back_is_lost() {
    let asked = Asked::new();
    let t = scene(&asked, "idle_timeout = '45s', reconnect_grace = '3s'");
    let here = Board::new(0);
    let clients = [0, 1].map(|index| {
        let (here, asked) = (here.clone(), asked.clone());
        t.start_client(async move |c| {
            c.handshake("/rpc").await;
            ask(c, "hello").await;
            here.change(|here| *here += 1);
            here.until(DEADLINE, |here| (*here == 3).then_some(())).await.expect("the backend takes nobody more");
            if index == 0 {
                c.send_text(&request("1", "die", "[]")).await;
                assert!(c.read_text().await.contains("\"code\":-32050"));
                c.send_text(&request("2", "echo", "[]")).await;
                assert!(c.read_text().await.contains("\"code\":-32050"));
            } else {
                asked.heard("die", 1).await;
            }
            assert_eq!(c.read_close().await, 1012);
            c.answer_close().await;
            assert_eq!(c.until_end().await.end, End::Fin);
        })
    });
    here.wait(DEADLINE, |here| (*here == 2).then_some(())).expect("both");
    t.backend().stop_listening();
    here.change(|here| *here += 1);
    for client in clients {
        client.join();
    }
    let metrics = t.proxy().metrics_when("the end", |metrics| metrics.count("tidegate_connections_active") == 0);
    assert_eq!(metrics.count("tidegate_shared_reconnects_total{result=\"expired\"}"), 1);
    let close = t.proxy().log_where("a session's end", |line| line["message"] == "close");
    assert_eq!((&close["initiator"], &close["code"]), (&"backend".into(), &1012.into()), "{close}");
    t.no_rst();
}

/// Nobody waits for a try that lasts longer than the grace: one that is there and says nothing is lost like one that is not there.
#[test]
fn a_silent_backend_is_not_waited_for() {
    let asked = Asked::new();
    let pool = "idle_timeout = '45s', reconnect_grace = '500ms'";
    let t = Scene::new(&settings(pool, "upstream.handshake_timeout = '10m'"))
        .backend(backend::answers_once(asked.script()))
        .start();
    t.client(async |c| {
        c.handshake("/rpc").await;
        ask(c, "hello").await;
        c.send_text(&request("1", "die", "[]")).await;
        assert!(c.read_text().await.contains("\"code\":-32050"));
        assert_eq!(c.read_close().await, 1012);
        c.answer_close().await;
        assert_eq!(c.until_end().await.end, End::Fin);
    });
    let metrics = t.proxy().metrics_when("the end", |metrics| metrics.count("tidegate_connections_active") == 0);
    assert_eq!(metrics.count("tidegate_shared_reconnects_total{result=\"expired\"}"), 1);
}

/// Each client has its subscription by an id of its own, and news that overtake the answer come behind it. One that leaves, mid-request and
/// mid-subscription, leaves nothing at the backend; the other one ends its own.
#[test]
fn who_leaves_leaves_nothing() {
    let asked = Asked::new();
    let t = scene(&asked, "idle_timeout = '0s'");
    let seen = Board::new(Vec::new());
    t.clients(3, async |c: &mut Peer| {
        c.handshake("/rpc").await;
        c.send_text(&request("1", "eth_subscribe", "[\"newHeads\"]")).await;
        let told: Value = serde_json::from_str(&c.read_text().await).expect("JSON");
        let own = told["result"].as_str().expect("an id").to_owned();
        assert_eq!((&told["id"], own.len()), (&1.into(), 34));
        assert_eq!([c.read_text().await, c.read_text().await], [news(&own, "first"), news(&own, "second")]);
        seen.change(|seen| seen.push(own.clone()));
        let all = seen.until(DEADLINE, |seen| (seen.len() == 3).then(|| seen.clone())).await.expect("all of them");
        let unsubscribe = |id: &str| request("\"u\"", "eth_unsubscribe", &format!("[\"{id}\"]"));
        match c.index() {
            // In order, in the middle of a request.
            0 => {
                c.send_text(&request("1", "hold", "[]")).await;
                asked.heard("hold", 1).await;
                leave(c).await;
            }
            // Without a word.
            1 => c.rst(),
            _ => {
                let other = all.iter().find(|id| **id != own).expect("another one");
                c.send_text(&unsubscribe(other)).await;
                assert!(c.read_text().await.contains("\"code\":-32602"));
                asked.heard("eth_unsubscribe", 2).await;
                // Nobody waits for the other answer that comes now; until then the backend was to have the time that it takes.
                c.send_text(&request("2", "free", "[]")).await;
                assert_eq!(c.read_text().await, answer("2", "[]"));
                c.send_text(&unsubscribe(&own)).await;
                assert_eq!(c.read_text().await, answer("\"u\"", "true"));
                leave(c).await;
            }
        }
    });
    let gauges =
        ["tidegate_rpc_outstanding", "tidegate_rpc_subscriptions", "tidegate_shared_queue_bytes", "tidegate_pool_keys"];
    let metrics =
        t.proxy().metrics_when("nobody is there", |metrics| gauges.iter().all(|gauge| metrics.count(gauge) == 0));
    assert_eq!(asked.subscriptions.read(|all| all.values().filter(|lives| **lives).count()), 0);
    assert_eq!(asked.count("eth_unsubscribe"), 3);
    assert_eq!(metrics.count("tidegate_rpc_requests_total{result=\"left\"}"), 1);
}

/// What is no JSON-RPC is answered with its error object, and the client goes on; what is no text ends it with 1003, and nobody else.
#[test]
fn malformed_messages_harm_nobody() {
    let asked = Asked::new();
    let t = scene(&asked, "idle_timeout = '45s'");
    t.clients(2, async |c: &mut Peer| {
        let response = c.handshake_with(Message::websocket("/rpc").header("Sec-WebSocket-Protocol", "v2, v1")).await;
        assert_eq!(response.field("Sec-WebSocket-Protocol"), Some("v2"));
        for (text, code) in
            [("{\"jsonrpc\":", -32700), ("[]", -32600), ("[1]", -32600), ("{\"id\":1,\"id\":2}", -32600)]
        {
            c.send_text(text).await;
            let told = c.read_text().await;
            assert!(told.contains(&format!("\"code\":{code}")), "{text}: {told}");
            ask(c, &code.to_string()).await;
        }
        c.send(&Frame::new(PING, "there?")).await;
        let pong = c.read_frame().await;
        assert_eq!((pong.opcode, pong.text().as_str()), (PONG, "there?"));
        if c.index() == 0 {
            c.send(&Frame::binary("{}")).await;
            assert_eq!(c.read_close().await, 1003);
            c.answer_close().await;
            assert_eq!(c.until_end().await.end, End::Fin);
        } else {
            leave(c).await;
        }
    });
    assert_eq!(t.backend().count(), 1);
    assert_eq!(asked.count("echo"), 8);
    over(&t);
}

/// What is for nobody reaches nobody, is counted by its reason, and the log has it once of each hub. Method: a backend, and a client, that say one of
/// each.
#[test]
fn what_is_for_nobody_is_told_of() {
    let asked = Asked::new();
    let t = Scene::new(&settings(
        "idle_timeout = '45s', subscriptions = ['eth_subscribe eth_unsubscribe eth_subscription']",
        "log.filter = 'debug'",
    ))
    .backend(asked.script())
    .start();
    t.client(async |c| {
        c.handshake("/rpc").await;
        c.send_text(&answer("1", "1")).await;
        for id in ["1", "2"] {
            c.send_text(&request(id, "odd", "[]")).await;
            assert_eq!(c.read_text().await, answer(id, "[]"));
        }
        leave(c).await;
    });
    let metrics = t.proxy().metrics();
    for (reason, count) in [
        ("malformed", 2),
        ("binary", 2),
        ("without_id", 2),
        ("stray", 2),
        ("unheard", 2),
        ("unlisted", 2),
        ("overflow", 0),
        ("too_long", 0),
        ("client_response", 1),
    ] {
        let counted = metrics.count(&format!("tidegate_rpc_dropped_messages_total{{reason=\"{reason}\"}}"));
        assert_eq!(counted, count, "{reason}");
        let is_it = |line: &Value| {
            line["message"] == "JSON-RPC messages of a shared WebSocket are for nobody" && line["reason"] == reason
        };
        if count > 0 {
            // The log is written by a thread of its own.
            t.proxy().log_where(reason, is_it);
        }
        let said = t.proxy().log().iter().filter(|line| is_it(line)).count();
        assert_eq!(said, usize::from(count > 0), "{reason}");
    }
    over(&t);
}

/// A client that does not read what is for all is ended with 1013, however it is policed otherwise, since answers can't be left out; the others
/// get all of it.
#[test]
fn a_slow_client_is_ended() {
    const COUNT: usize = 3000;
    let asked = Asked::new();
    let pool = "idle_timeout = '0s', queue_messages = 16";
    let t = Scene::new(&settings(pool, "websocket.send_buffer = '8KiB'")).backend(asked.script()).start();
    let (here, told) = (Board::new(0), Board::new(0));
    t.clients(2, async |c: &mut Peer| {
        let is_slow = c.index() == 0;
        if is_slow {
            c.set_recv_buffer(4096);
        }
        c.handshake("/rpc").await;
        here.change(|here| *here += 1);
        here.until(DEADLINE, |here| (*here == 2).then_some(())).await.expect("both");
        if is_slow {
            told.until(DEADLINE, |told| (*told == COUNT).then_some(())).await.expect("the other one is not held up");
            assert_eq!(c.read_close().await, 1013);
            c.answer_close().await;
            assert_eq!(c.until_end().await.end, End::Fin);
            return;
        }
        for _ in 0..COUNT / 10 {
            c.send_text(&request("1", "fan", "[10]")).await;
            for _ in 0..10 {
                assert!(c.read_text().await.contains("\"all\""));
                told.change(|told| *told += 1);
            }
            assert_eq!(c.read_text().await, answer("1", "[10]"));
        }
        leave(c).await;
    });
    let metrics = t.proxy().metrics_when("the end", |metrics| metrics.count("tidegate_connections_active") == 0);
    assert_eq!(metrics.count("tidegate_shared_slow_clients_total{action=\"disconnect\"}"), 1);
    assert_eq!(metrics.count("tidegate_shared_queue_bytes"), 0);
    let close = t.proxy().log_where("its end", |line| line["message"] == "close" && line["code"] == 1013);
    assert_eq!((&close["why"], &close["initiator"]), (&"pool.slow_client".into(), &"tidegate".into()));
    t.no_rst();
}

/// A request has its deadline; its answer comes too late for anybody. Method: the backend is told to send it when its client has the error, and
/// then answers something else.
#[test]
fn an_answer_may_be_too_late() {
    let asked = Asked::new();
    let t = scene(&asked, "idle_timeout = '45s', request_timeout = '1s'");
    t.client(async |c| {
        c.handshake("/rpc").await;
        c.send_text(&request("\"a\"", "hold", "[]")).await;
        let told = c.read_text().await;
        assert!(told.contains("\"id\":\"a\"") && told.contains("\"code\":-32051"), "{told}");
        c.send_text(&request("\"b\"", "free", "[1]")).await;
        assert_eq!(c.read_text().await, answer("\"b\"", "[1]"));
        ask(c, "more").await;
        leave(c).await;
    });
    let metrics = t.proxy().metrics();
    assert_eq!(metrics.count("tidegate_rpc_requests_total{result=\"timeout\"}"), 1);
    assert_eq!(metrics.count("tidegate_rpc_requests_total{result=\"answered\"}"), 2);
    assert_eq!(metrics.count("tidegate_rpc_dropped_messages_total{reason=\"stray\"}"), 1);
    over(&t);
}

/// A drain ends clients one by one, who may ask until then, and the WebSocket that they share after the last of them.
#[test]
fn a_drain_ends_what_is_shared() {
    let asked = Asked::new();
    let t = Scene::new(&settings("", "")).backend(asked.script()).start();
    let here = Board::new(0);
    t.clients(3, async |c: &mut Peer| {
        c.handshake("/rpc").await;
        ask(c, "hello").await;
        let is_last = here.change(|here| {
            *here += 1;
            *here == 3
        });
        if is_last {
            t.proxy().sigterm();
        }
        assert_eq!(c.read_close().await, 1001);
        c.answer_close().await;
        assert_eq!(c.until_end().await.end, End::Fin);
    });
    t.connection(0).seen().assert_closed_with(1001);
    assert!(t.proxy().wait_exit(DEADLINE).success());
    assert_eq!(t.backend().count(), 1);
}

/// Who was there before a reload may ask as before, by its settings then, also where the WebSocket is to be opened anew; whoever comes finds
/// another one. With nobody there any more both are closed.
#[test]
fn who_is_there_asks_on_after_a_reload() {
    let asked = Asked::new();
    let first = settings("idle_timeout = '0s', max_requests = 8", "reload.watch = '0s'");
    let t = Scene::new(&first).backend(asked.script()).start();
    let reloaded = Board::new(false);
    let early = {
        let (asked, reloaded) = (asked.clone(), reloaded.clone());
        t.start_client(async move |c| {
            c.handshake("/rpc").await;
            ask(c, "before").await;
            reloaded.until(DEADLINE, |reloaded| reloaded.then_some(())).await.expect("a reload");
            let opened = asked.heads.read(Vec::len);
            ask(c, "after").await;
            assert_eq!(asked.heads.read(Vec::len), opened + 1);
            for _ in 0..7 {
                c.send_text(&request("1", "hold", "[]")).await;
            }
            c.send_text(&request("1", "free", "[]")).await;
            for _ in 0..8 {
                assert_eq!(c.read_text().await, answer("1", "[]"));
            }
            leave(c).await;
        })
    };
    asked.over.wait(DEADLINE, |over| (*over > 0 && asked.count("echo") == 1).then_some(())).expect("a pause");
    t.proxy().configure(&settings("idle_timeout = '0s', max_requests = 1", "reload.watch = '0s'"));
    t.proxy().signal(Signal::HUP);
    t.proxy().log_where("a reload", |line| line["message"] == "reloaded");
    let listed = || -> Value {
        let told = t.proxy().get("/connections");
        serde_json::from_slice(&told.body).expect("JSON")
    };
    t.client(async |c| {
        c.handshake("/rpc").await;
        c.send_text(&format!("[{},{}]", request("1", "echo", "[]"), request("2", "echo", "[]"))).await;
        assert!(c.read_text().await.contains("\"code\":-32052"));
        // It has no WebSocket just now, and is listed all the same.
        asked.over.until(DEADLINE, |over| (*over == asked.heads.read(Vec::len)).then_some(())).await.expect("a pause");
        let told = listed();
        // So is that of who came before the reload.
        assert_eq!((&told["total"], told["websockets"].as_array().map(Vec::len)), (&2.into(), Some(2)), "{told}");
        leave(c).await;
    });
    reloaded.change(|reloaded| *reloaded = true);
    early.join();
    let metrics = t.proxy().metrics_when("nobody is there", |metrics| metrics.count("tidegate_pool_keys") == 0);
    assert_eq!(metrics.count("tidegate_rpc_outstanding"), 0);
    assert_eq!(metrics.count("tidegate_pool_invariant_violations_total"), 0);
    over(&t);
}
