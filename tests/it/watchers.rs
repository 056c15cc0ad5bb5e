//! One backend WebSocket for thousands of watchers (`pool.shared = "broadcast"`): all hear all, in order, whoever else is slow, leaves,
//! or comes; and who is not the same never shares.
//!
//! Each test prints its figures (`cargo test --test it watchers -- --nocapture`). Full numbers, and bounds of memory, under
//! `TIDEGATE_STRICT=1`: on a release build with the machine to itself.

use crate::harness::{
    Board, DEADLINE, LIMIT, Message,
    crowd::{Backend, Front, Member, Stage, is_strict, tally},
    feed::{Delays, Heard, Part, Stop, ask, end, feed_on, follow, join, join_all, join_by, leave},
    proxy::Metrics,
    ws::{CLOSE, Frame},
};
use proptest::{
    collection::vec,
    prelude::*,
    sample::select,
    test_runner::{Config as Runs, TestRunner},
};
use rand::{SeedableRng as _, rngs::StdRng};
use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::time::{interval, sleep, timeout};

/// As in the reports that this is for.
const EVERY: Duration = Duration::from_millis(10);
const BYTES: usize = 256;

fn watchers() -> usize {
    if is_strict() { 5000 } else { 300 }
}

/// Settings with all paths shared, and these keys of `[pool]` beside.
fn shared(keys: &str) -> String {
    let keys = if keys.is_empty() { String::new() } else { format!(", {keys}") };
    format!("route = [{{ path = '/*', pool = {{ mode = 'shared', shared = 'broadcast'{keys} }} }}]\n")
}

/// Nothing of the pool's is in use, so many upstreams were opened, and nothing of it was ever wrong.
#[track_caller]
fn assert_pool_is_left(t: &Front<'_>, opened: u64) {
    let metrics = t.metrics_when("that nothing is shared any more", |metrics| {
        metrics.sum("tidegate_pool_connections").abs() < 0.5
            && metrics.count("tidegate_pool_references") == 0
            && metrics.count("tidegate_shared_queue_bytes") == 0
    });
    assert_eq!(metrics.count("tidegate_pool_opens_total{result=\"opened\"}"), opened, "opened upstreams");
    assert_eq!(metrics.count("tidegate_pool_waiters"), 0);
    assert_eq!(metrics.count("tidegate_pool_invariant_violations_total"), 0);
}

/// Every one of them went like this.
#[track_caller]
fn assert_all(summaries: impl IntoIterator<Item = String>, expected: &str, count: usize) {
    assert_eq!(tally(summaries), BTreeMap::from([(expected.to_owned(), count)]));
}

/// What a Close and its answer come to.
async fn ended(member: &mut Member, stop: Stop) -> String {
    let Stop::Close(close) = stop else { return format!("{stop:?}") };
    let _ = member.send(&Frame::new(CLOSE, &close.payload[..close.payload.len().min(2)])).await;
    let rest = member.rest().await;
    format!("Close {}, {}", close.code(), rest.summary())
}

/// A feed that says `count` messages in all, a portion each time it is told to, and then waits for the Close.
///
/// The board says how many it may have said by now. The results are what it got at the end.
fn told_feed(stage: &Stage, bytes: usize, every: Duration) -> (Backend<String>, Board<u64>) {
    let allowed = Board::new(0);
    let backend = {
        let allowed = allowed.clone();
        stage.backend(async move |mut member: Member| {
            let request = member.message().await.expect("a handshake");
            member.send_bytes(&Message::switching(&request).bytes()).await.expect("who has asked");
            match feed_on(member, every, bytes, Some(&allowed)).await {
                Some(code) => format!("Close {code}"),
                None => "no Close".to_owned(),
            }
        })
    };
    (backend, allowed)
}

/// All watchers of one key are on one connection of the backend, and each hears everything, in order. When the last one has left it is
/// closed, after `pool.idle_timeout`, by a Close of tidegate's.
#[test]
fn thousands_are_on_one_upstream() {
    let count = watchers();
    let messages: u64 = if is_strict() { 1000 } else { 200 };
    let stage = Stage::new();
    let (backend, allowed) = told_feed(&stage, BYTES, EVERY);
    let t = stage.tidegate(&shared("idle_timeout = '200ms'"), backend.address);
    let (delays, took, cpu, summaries) = stage.clients(async || {
        let members = join_all(t.address, &Message::websocket("/feed"), count).await;
        let (begun, cpu) = (Instant::now(), t.cpu_time());
        allowed.change(|allowed| *allowed = messages);
        let delays = RefCell::new(Delays::default());
        let followed = futures_util::future::join_all(members.into_iter().map(async |mut member| {
            let (mut heard, mut own) = (Heard::default(), Delays::default());
            let stop = follow(&mut member, &mut heard, &mut own, |heard| heard.messages() == messages).await;
            delays.borrow_mut().add(&own);
            assert!(matches!(stop, Stop::Enough), "{stop:?} after {heard:?}");
            assert_eq!((heard.0.len(), heard.0[0].first), (1, 0), "{heard:?}");
            member
        }))
        .await;
        let (took, cpu) = (begun.elapsed(), t.cpu_time().saturating_sub(cpu));
        let left = futures_util::future::join_all(followed.into_iter().map(leave)).await;
        (delays.into_inner(), took, cpu, left)
    });
    let deliveries = count as u64 * messages;
    println!(
        "{count} watchers, {messages} messages of {BYTES} B in {took:.1?}: under way {delays}; {} ns of CPU for each of {deliveries} \
         deliveries",
        cpu.as_nanos() / u128::from(deliveries),
    );
    assert_all(summaries, "Close 1000, Fin", count);
    // One connection has ended, and there was no other.
    assert_eq!(backend.results(1), ["Close 1000"]);
    assert_pool_is_left(&t, 1);
    let metrics = t.metrics();
    for (name, wanted) in [
        ("tidegate_shared_messages_total", messages),
        ("tidegate_shared_deliveries_total", deliveries),
        ("tidegate_shared_gaps_total{cause=\"slow\"}", 0),
        ("tidegate_shared_gaps_total{cause=\"lost\"}", 0),
    ] {
        assert_eq!(metrics.count(name), wanted, "{name}");
    }
    t.assert_nothing_left();
    t.assert_no_rst();
}

/// A watcher that waits takes next to no memory: what thousands more of them add, after all have heard something.
#[test]
fn an_idle_watcher_takes_little_memory() {
    const BEFORE: usize = 500;
    // What a handshake under way takes is not given back by an allocator that has once had it: the fewer, the less of it is counted.
    const AT_ONCE: usize = 16;
    const KIB: u64 = 1024;
    let count = if is_strict() { 8000 } else { 2000 };
    let stage = Stage::new();
    let (backend, allowed) = told_feed(&stage, BYTES, Duration::from_micros(100));
    // Lines of the log that wait to be written are not a watcher's.
    let t = stage.tidegate(&format!("log.sample = 0\n{}", shared("idle_timeout = '0s'")), backend.address);
    let (each, summaries) = stage.clients(async || {
        let request = Message::websocket("/feed");
        // What the program itself takes for the first ones is not theirs: room for handshakes, for reading, for the ring.
        let mut members = join_by(AT_ONCE, t.address, &request, BEFORE).await;
        let hear = async |members: &mut Vec<Member>, wanted: u64| {
            allowed.change(|allowed| *allowed = wanted);
            let all = members.iter_mut().map(async |member| {
                let (mut heard, mut delays) = (Heard::default(), Delays::default());
                let last = |heard: &Heard| heard.0.last().is_some_and(|part| part.last + 1 == wanted);
                let stop = follow(member, &mut heard, &mut delays, last).await;
                assert!(matches!(stop, Stop::Enough), "{stop:?} after {heard:?}");
            });
            futures_util::future::join_all(all).await;
        };
        hear(&mut members, 20).await;
        let before = t.resident();
        members.extend(join_by(AT_ONCE, t.address, &request, count).await);
        hear(&mut members, 40).await;
        let each = t.resident().saturating_sub(before) / count as u64;
        (each, futures_util::future::join_all(members.into_iter().map(leave)).await)
    });
    println!("{count} idle watchers: {each} bytes of memory each");
    // 4 KiB, and the steps in which an allocator grows: from one run to the next 2 %. Without optimisation futures are larger.
    let bound = if is_strict() { 4 * KIB + KIB / 8 } else { 12 * KIB };
    assert!(each <= bound, "{each} bytes, {bound} allowed");
    assert_all(summaries, "Close 1000, Fin", BEFORE + count);
    t.assert_nothing_left();
}

/// What a policy does with one watcher that reads nothing, among others that do: the slow one's parts of the feed and its end, and the metrics.
fn one_is_slow(policy: &str) -> (Vec<Part>, String, Metrics) {
    const PORTION: u64 = 16;
    const SIZE: usize = 4096;
    let count = if is_strict() { 5000 } else { 100 };
    // Beyond what kernels and relay take for somebody who does not read.
    let messages: u64 = 512;
    let stage = Stage::new();
    let (backend, allowed) = told_feed(&stage, SIZE, Duration::from_micros(100));
    let settings = shared(&format!("queue_messages = 64, slow_client = '{policy}', idle_timeout = '0s'"));
    let t = stage.tidegate(
        &format!("websocket.send_buffer = '16KiB'\nwebsocket.write_timeout = '300s'\n{settings}"),
        backend.address,
    );
    let (parts, slow_end, summaries, gaps) = stage.clients(async || {
        let request = Message::websocket("/feed");
        let mut slow = Member::narrow(t.address).await;
        assert_eq!(ask(&mut slow, &request).await.code(), 101);
        let members = join_all(t.address, &request, count).await;
        // The feed says the next portion when all the others have the last one: were it held up by the slow one, or one of them left behind,
        // it would go no further.
        let have = Board::new(0_u64);
        let go_on = async {
            for portion in 0..messages / PORTION {
                allowed.change(|allowed| *allowed = (portion + 1) * PORTION);
                let wanted = (portion + 1) * count as u64;
                let all = have.until(DEADLINE, |have| (*have >= wanted).then_some(())).await;
                assert!(all.is_some(), "{have:?} of {wanted} portions were heard");
            }
        };
        let others = futures_util::future::join_all(members.into_iter().map(async |mut member| {
            let (mut heard, mut delays) = (Heard::default(), Delays::default());
            for portion in 1..=messages / PORTION {
                let stop =
                    follow(&mut member, &mut heard, &mut delays, |heard| heard.messages() == portion * PORTION).await;
                assert!(matches!(stop, Stop::Enough), "{stop:?} after {heard:?}");
                have.change(|have| *have += 1);
            }
            assert_eq!(heard.0.len(), 1, "{heard:?}");
            member
        }));
        let ((), others) = tokio::join!(go_on, others);
        // Only now it reads. All is said, so what it gets is what was kept for it.
        let (mut heard, mut delays) = (Heard::default(), Delays::default());
        let last = |heard: &Heard| heard.0.last().is_some_and(|part| part.last + 1 == messages);
        let stop = follow(&mut slow, &mut heard, &mut delays, last).await;
        let gaps = t.metrics();
        let slow_end = match stop {
            Stop::Enough => leave(slow).await,
            stop => ended(&mut slow, stop).await,
        };
        (heard.0, slow_end, futures_util::future::join_all(others.into_iter().map(leave)).await, gaps)
    });
    println!("{policy}: one slow watcher beside {count} heard {parts:?}, then {slow_end}");
    assert_all(summaries, "Close 1000, Fin", count);
    assert_eq!((parts[0].first, parts[0].feed), (0, parts[parts.len() - 1].feed));
    assert!(parts.windows(2).all(|two| two[0].last < two[1].first), "out of order: {parts:?}");
    let times = gaps.count(&format!("tidegate_shared_slow_clients_total{{action=\"{policy}\"}}"));
    // Each time that it was behind by too much it missed something, or had its end.
    assert_eq!(times, (parts.len() as u64 - 1).max(1));
    t.assert_nothing_left();
    t.assert_sent_no_rst();
    (parts, slow_end, gaps)
}

/// `disconnect`: what it had is a beginning without a gap, and then 1013.
#[test]
fn a_slow_watcher_is_disconnected() {
    let (parts, end, metrics) = one_is_slow("disconnect");
    assert_eq!((parts.len(), end.as_str()), (1, "Close 1013, Fin"));
    assert_eq!(metrics.count("tidegate_shared_gaps_total{cause=\"slow\"}"), 0);
}

/// `drop_oldest`: it stays, and goes on with the oldest that is left, up to the last one. Gaps are counted.
#[test]
fn a_slow_watcher_loses_the_oldest() {
    let (parts, end, metrics) = one_is_slow("drop_oldest");
    assert_eq!((parts[parts.len() - 1].last, end.as_str()), (511, "Close 1000, Fin"));
    assert!(parts[parts.len() - 1].messages() >= 64, "{parts:?}");
    assert_eq!(metrics.count("tidegate_shared_gaps_total{cause=\"slow\"}"), parts.len() as u64 - 1);
    assert!(parts.len() > 1, "it was not slow");
}

/// `conflate`: it stays, and goes on with the newest.
#[test]
fn a_slow_watcher_gets_the_newest() {
    let (parts, end, metrics) = one_is_slow("conflate");
    assert_eq!((parts[parts.len() - 1], end.as_str()), (Part { first: 511, last: 511, ..parts[0] }, "Close 1000, Fin"));
    assert_eq!(metrics.count("tidegate_shared_gaps_total{cause=\"slow\"}"), parts.len() as u64 - 1);
    assert!(parts.len() > 1, "it was not slow");
}

/// The backend is killed, and is back after 2 s: all watchers stay, and hear the new feed. That something may be missing is counted.
#[test]
fn a_backend_comes_back_under_its_watchers() {
    let count = watchers();
    let stage = Stage::new();
    let mut backend = stage.echo_process();
    // Longer than a slow machine takes to start it again.
    let t = stage.tidegate(&shared("reconnect_grace = '120s', idle_timeout = '0s'"), backend.address);
    let (away, back, summaries) = stage.clients(async || {
        let members = join_all(t.address, &Message::websocket("/feed"), count).await;
        // How many have heard enough of the first feed, and of the second.
        let heard_of = Board::new([0; 2]);
        let all = async |nth: usize| {
            let all = heard_of.until(LIMIT, |heard| (heard[nth] == count).then_some(())).await;
            assert!(all.is_some(), "{heard_of:?} of {count}");
        };
        let script = async {
            all(0).await;
            let killed = Instant::now();
            backend.kill();
            sleep(Duration::from_secs(2)).await;
            backend.again(&stage);
            let away = killed.elapsed();
            all(1).await;
            (away, killed.elapsed().saturating_sub(away))
        };
        let watching = futures_util::future::join_all(members.into_iter().map(async |mut member| {
            let (mut heard, mut delays) = (Heard::default(), Delays::default());
            for nth in [0, 1] {
                let enough = |heard: &Heard| heard.feeds() > nth && heard.messages() >= 5;
                let stop = follow(&mut member, &mut heard, &mut delays, enough).await;
                assert!(matches!(stop, Stop::Enough), "{stop:?} after {heard:?}");
                heard_of.change(|heard| heard[nth] += 1);
            }
            assert_eq!(heard.0.len(), 2, "{heard:?}");
            leave(member).await
        }));
        let ((away, back), summaries) = tokio::join!(script, watching);
        (away, back, summaries)
    });
    println!("{count} watchers of a backend that was away for {away:.1?}: all heard it again {back:.1?} later");
    assert_all(summaries, "Close 1000, Fin", count);
    let metrics = t.metrics();
    assert_eq!(metrics.count("tidegate_shared_gaps_total{cause=\"lost\"}"), 1);
    assert_eq!(metrics.count("tidegate_pool_invariant_violations_total"), 0);
    t.assert_nothing_left();
    t.assert_sent_no_rst();
}

/// The backend is killed and stays away for longer than `pool.reconnect_grace`: each gets Close 1012 and FIN, and who comes then 502.
#[test]
fn a_backend_that_stays_away_is_1012_for_all() {
    let count = watchers();
    let stage = Stage::new();
    let mut backend = stage.echo_process();
    let t = stage.tidegate(&shared("reconnect_grace = '500ms'"), backend.address);
    let (took, summaries, late) = stage.clients(async || {
        let request = Message::websocket("/feed");
        let members = join_all(t.address, &request, count).await;
        let begun = Board::new(0);
        let killing = async {
            let all = begun.until(DEADLINE, |begun| (*begun == count).then_some(())).await;
            assert!(all.is_some(), "{begun:?} of {count} have heard something");
            backend.kill();
            Instant::now()
        };
        let watching = futures_util::future::join_all(members.into_iter().map(async |mut member| {
            let (mut heard, mut delays) = (Heard::default(), Delays::default());
            let stop = follow(&mut member, &mut heard, &mut delays, |heard| heard.messages() == 1).await;
            assert!(matches!(stop, Stop::Enough), "{stop:?}");
            begun.change(|begun| *begun += 1);
            let stop = follow(&mut member, &mut heard, &mut delays, |_| false).await;
            assert_eq!(heard.0.len(), 1, "{heard:?}");
            ended(&mut member, stop).await
        }));
        let (killed, summaries) = tokio::join!(killing, watching);
        let took = killed.elapsed();
        let mut late = Member::connect(t.address).await;
        (took, summaries, ask(&mut late, &request).await.code())
    });
    println!(
        "{count} watchers of a backend that stays away for longer than 500 ms: the last one has its end after {took:.1?}"
    );
    assert_all(summaries, "Close 1012, Fin", count);
    assert_eq!(late, 502);
    assert_pool_is_left(&t, 1);
    t.assert_nothing_left();
    t.assert_sent_no_rst();
}

/// SIGTERM: each watcher hears a feed without a gap up to its Close 1001 and FIN, and the backend gets one Close.
#[test]
fn a_drain_is_1001_for_all_watchers() {
    let count = watchers();
    let stage = Stage::new();
    let codes = Board::new(Vec::new());
    let backend = {
        let codes = codes.clone();
        stage.backend(async move |mut member: Member| {
            let request = member.message().await.expect("a handshake");
            member.send_bytes(&Message::switching(&request).bytes()).await.expect("who has asked");
            let code = feed_on(member, EVERY, BYTES, None).await.expect("a Close before the end");
            codes.change(|codes| codes.push(code));
        })
    };
    let t = stage.tidegate(&format!("drain = {{ delay = '0s', window = '1s' }}\n{}", shared("")), backend.address);
    let (took, summaries) = stage.clients(async || {
        let members = join_all(t.address, &Message::websocket("/feed"), count).await;
        let begun = Board::new(0);
        let terminating = async {
            let all = begun.until(DEADLINE, |begun| (*begun == count).then_some(())).await;
            assert!(all.is_some(), "{begun:?} of {count} have heard something");
            t.sigterm();
            Instant::now()
        };
        let watching = futures_util::future::join_all(members.into_iter().map(async |mut member| {
            let (mut heard, mut delays) = (Heard::default(), Delays::default());
            let stop = follow(&mut member, &mut heard, &mut delays, |heard| heard.messages() == 1).await;
            assert!(matches!(stop, Stop::Enough), "{stop:?}");
            begun.change(|begun| *begun += 1);
            let stop = follow(&mut member, &mut heard, &mut delays, |_| false).await;
            assert_eq!(heard.0.len(), 1, "{heard:?}");
            ended(&mut member, stop).await
        }));
        let (terminated, summaries) = tokio::join!(terminating, watching);
        (terminated.elapsed(), summaries)
    });
    assert_eq!(t.wait_exit(DEADLINE).code(), Some(0));
    println!("{count} watchers, drained in {took:.1?}");
    assert_all(summaries, "Close 1001, Fin", count);
    backend.results(1);
    assert!(codes.read(|codes| matches!(codes[..], [1000 | 1001])), "{codes:?}");
    t.assert_no_rst();
}

/// A backend that says to each of its connections, once, what it was asked with, and how many connections it had until then.
fn mirror(stage: &Stage) -> (Backend<()>, Board<usize>) {
    let opened = Board::new(0);
    let count = opened.clone();
    let backend = stage.backend(async move |mut member: Member| {
        let request = member.message().await.expect("a handshake");
        count.change(|count| *count += 1);
        let mut response = Message::switching(&request);
        if let Some(offered) = request.field("Sec-WebSocket-Protocol") {
            response = response.header("Sec-WebSocket-Protocol", offered.split(',').next().unwrap_or_default().trim());
        }
        member.send_bytes(&response.bytes()).await.expect("who has asked");
        let _ = member.send(&Frame::text(&String::from_utf8_lossy(&request.bytes()))).await;
        while let Ok(frame) = member.frame().await {
            if frame.opcode == CLOSE {
                return end(member, &frame).await;
            }
        }
    });
    (backend, opened)
}

/// What the backend was asked with for this client; the client stays.
async fn seen_for(address: SocketAddr, request: &Message) -> (Member, Message) {
    let mut member = join(address, request).await;
    let frame = timeout(DEADLINE, member.frame()).await.expect("in time").expect("what the backend saw");
    let (seen, _) = Message::parse_head(&frame.payload).expect("a request");
    (member, seen)
}

/// Clients stand for a proxy that says who somebody is: what it says is not theirs to say otherwise.
const TRUSTED: &str = "http.trusted_proxies = ['0.0.0.0/0']\n";

/// Kept for who comes later, and closed at once when nobody is left.
const MIRRORED: &str = "replay = 'last', idle_timeout = '0s', key_headers = ['X-Room']";

/// One header that says who somebody is, with another value: another upstream. The same one: the same.
#[test]
fn who_is_not_the_same_does_not_share() {
    const IDENTITY: [&str; 14] = [
        "Authorization",
        "Cookie",
        "Origin",
        "X-Forwarded-User",
        "X-Forwarded-Email",
        "X-Forwarded-Groups",
        "X-Forwarded-Preferred-Username",
        "X-Forwarded-Access-Token",
        "X-Auth-Request-User",
        "X-Remote-User",
        "X-Api-Key",
        "X-Tenant-Id",
        "Cf-Access-Jwt-Assertion",
        "X-Room",
    ];
    let stage = Stage::new();
    let (backend, opened) = mirror(&stage);
    let t = stage.tidegate(&format!("{TRUSTED}{}", shared(MIRRORED)), backend.address);
    stage.clients(async || {
        let mut stay = Vec::new();
        for (nth, name) in IDENTITY.into_iter().enumerate() {
            let before = opened.read(|count| *count);
            assert_eq!(before, 2 * nth);
            for value in ["https://alice.example", "https://bob.example", "https://alice.example"] {
                let request =
                    Message::websocket("/feed").header(name, value).set("User-Agent", &format!("{value} {nth}"));
                let (member, seen) = seen_for(t.address, &request).await;
                assert_eq!(seen.all(name), [value], "{seen:?}");
                assert_eq!(seen.field("User-Agent"), None, "{seen:?}");
                stay.push(member);
            }
            assert_eq!(opened.read(|count| *count), before + 2, "{name}");
        }
        futures_util::future::join_all(stay.into_iter().map(leave)).await;
    });
    assert_pool_is_left(&t, 2 * IDENTITY.len() as u64);
    t.assert_nothing_left();
}

/// What tells people apart, and what does not and so may never be seen by a backend, of one client or another.
const CARRIED: [&str; 8] = [
    "Authorization",
    "Cookie",
    "Origin",
    "X-Forwarded-User",
    "X-Auth-Request-Email",
    "X-Remote-User",
    "X-Api-Key",
    "X-Room",
];
const KEPT_BACK: [&str; 5] = ["User-Agent", "Accept-Language", "X-Request-Id", "X-Custom", "Referer"];

/// Values out of which others are made by putting two together, so that a key that forgets where one ends takes one client for another.
fn header() -> impl Strategy<Value = (&'static str, &'static str)> {
    let names = select([&CARRIED[..], &KEPT_BACK[..]].concat());
    (names, select(&["a", "b", "ab", "a, b", "a; b", "a,b", "Cookie: a", "a b", "b a"][..]))
}

fn request() -> impl Strategy<Value = Message> {
    let targets = select(&["/feed", "/feed?a=b", "/feed?a", "/feed/a", "/feed?"][..]);
    let hosts = select(&["tidegate.test", "other.test", "tidegate.test:8080"][..]);
    let protocols = proptest::option::weighted(0.3, select(&["a", "b", "a, b", "b, a"][..]));
    (targets, hosts, protocols, vec(header(), 0..4)).prop_map(|(target, host, protocols, headers)| {
        let mut request = Message::websocket(target).set("Host", host);
        if let Some(protocols) = protocols {
            request = request.header("Sec-WebSocket-Protocol", protocols);
        }
        headers.into_iter().fold(request, |request, (name, value)| {
            // Of these there is one; who sends two is refused, or is a mistake of its own.
            let single = ["Origin", "Authorization"].contains(&name);
            if single { request.set(name, value) } else { request.header(name, value) }
        })
    })
}

/// All that makes a client another one than others.
fn identity(request: &Message) -> Vec<Vec<String>> {
    let owned = |values: Vec<&str>| values.into_iter().map(str::to_owned).collect();
    let mut parts = vec![vec![request.target().to_owned()], owned(request.all("Host"))];
    parts.push(
        request
            .all("Sec-WebSocket-Protocol")
            .iter()
            .flat_map(|all| all.split(','))
            .map(|one| one.trim().to_owned())
            .collect(),
    );
    parts.extend(CARRIED.iter().map(|name| owned(request.all(name))));
    parts
}

/// Random clients who try to be taken for one another: what the backend saw for a client is its own, in full, and nothing else; there are as many
/// upstreams as there are different clients.
#[test]
fn nobody_is_taken_for_another() {
    let cases = if is_strict() { 256 } else { 12 };
    let stage = Stage::new();
    let (backend, opened) = mirror(&stage);
    let t = stage.tidegate(&format!("{TRUSTED}{}", shared(MIRRORED)), backend.address);
    let runs = Runs { cases, failure_persistence: None, ..Runs::default() };
    let mut clients = 0;
    let result = TestRunner::new(runs).run(&vec(request(), 2..20), |requests| {
        let before = opened.read(|count| *count);
        let seen = stage.clients(async || {
            let all = requests.iter().map(|request| seen_for(t.address, request));
            let (members, seen): (Vec<_>, Vec<_>) = futures_util::future::join_all(all).await.into_iter().unzip();
            futures_util::future::join_all(members.into_iter().map(leave)).await;
            seen
        });
        // Keys of one case are no keys of the next.
        t.metrics_when("that nothing is shared any more", |metrics| {
            metrics.sum("tidegate_pool_connections").abs() < 0.5
        });
        for (request, seen) in requests.iter().zip(&seen) {
            prop_assert_eq!(identity(request), identity(seen), "{:?} was seen as {:?}", request, seen);
            for name in KEPT_BACK {
                let values = seen.all(name);
                prop_assert!(
                    values.iter().all(|value| !request.all(name).contains(value)),
                    "{:?} shows {}",
                    seen,
                    name
                );
            }
            prop_assert!(seen.field("X-Forwarded-For").is_none(), "{:?}", seen);
        }
        let different: BTreeSet<_> = requests.iter().map(identity).collect();
        prop_assert_eq!(opened.read(|count| *count) - before, different.len(), "upstreams");
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
    clients += opened.read(|count| *count);
    println!("{cases} crowds: {clients} upstreams");
    t.assert_nothing_left();
}

/// What a backend knows of its keys: of each the number of its newest connection, and of all that it is open.
#[derive(Debug, Default)]
struct Keys {
    opened: u64,
    newest: BTreeMap<String, u64>,
    open: BTreeMap<String, u64>,
}

/// A feed that says on each connection which one it is, and which is the newest of its key. Its results are the ends.
fn keyed_feed(stage: &Stage) -> (Backend<String>, Arc<Mutex<Keys>>) {
    let known = Arc::new(Mutex::new(Keys::default()));
    let backend = {
        let known = Arc::clone(&known);
        stage.backend(async move |mut member: Member| {
            let request = member.message().await.expect("a handshake");
            let lock = || known.lock().unwrap_or_else(PoisonError::into_inner);
            let key = request.target().to_owned();
            let number = {
                let mut keys = lock();
                keys.opened += 1;
                let number = keys.opened;
                keys.newest.insert(key.clone(), number);
                *keys.open.entry(key.clone()).or_default() += 1;
                number
            };
            member.send_bytes(&Message::switching(&request).bytes()).await.expect("who has asked");
            let mut ticks = interval(Duration::from_millis(50));
            let close = loop {
                tokio::select! {
                    frame = member.frame() => break frame,
                    _ = ticks.tick() => {
                        let newest = lock().newest.get(&key).copied().unwrap_or_default();
                        let _ = member.send(&Frame::text(&format!("{number} {newest}"))).await;
                    }
                }
            };
            *lock().open.entry(key).or_default() -= 1;
            match close {
                Ok(close) if close.opcode == CLOSE => {
                    let code = close.code();
                    end(member, &close).await;
                    format!("Close {code}")
                }
                other => format!("{other:?}"),
            }
        })
    };
    (backend, known)
}

/// Clients come to random keys and leave again, in each way there is, while upstreams are opened, kept for a moment, revived and closed.
///
/// A connection is in use when somebody hears what is said on it. So each message says which connection it is said on, and which is the newest
/// one of its key: on one that has a successor nobody hears anything that was said after that was opened.
#[test]
fn upstreams_of_a_key_never_overlap() {
    let (keys, clients, lasts) = if is_strict() { (200, 2000_u64, 60) } else { (20, 100, 5) };
    // So long at most, in milliseconds, that a key has nobody as often as somebody.
    let (stay, pause) = (300, clients / keys * 450);
    let stage = Stage::new();
    let (backend, known) = keyed_feed(&stage);
    let settings = format!("limits.handshakes_per_second = 0\n{}", shared("idle_timeout = '30ms'"));
    let t = stage.tidegate(&settings, backend.address);
    let seed = rand::random::<u64>();
    println!("seed {seed}");
    let (visits, heard) = stage.clients(async || {
        let (random, until) = (RefCell::new(StdRng::seed_from_u64(seed)), Instant::now() + Duration::from_secs(lasts));
        let (visits, heard) = (Cell::new(0_u64), Cell::new(0_u64));
        let draw = |below: u64| random.borrow_mut().random_range(0..below);
        let client = async || {
            loop {
                sleep(Duration::from_millis(draw(pause))).await;
                if Instant::now() >= until {
                    break;
                }
                visits.set(visits.get() + 1);
                let request = Message::websocket(&format!("/key/{}", draw(keys)));
                let mut member = Member::connect(t.address).await;
                if draw(20) == 0 {
                    // Gone before its 101.
                    let _ = member.send_bytes(&request.bytes()).await;
                    member.rst();
                    continue;
                }
                let response = ask(&mut member, &request).await;
                assert_eq!(response.code(), 101, "{response:?}");
                let stays = sleep(Duration::from_millis(draw(stay)));
                tokio::pin!(stays);
                loop {
                    tokio::select! {
                        frame = member.frame() => {
                            let frame = frame.expect("a feed");
                            let text = frame.text();
                            let numbers: Vec<u64> = text.split(' ').filter_map(|number| number.parse().ok()).collect();
                            let [number, newest] = numbers[..] else { panic!("{frame:?}") };
                            assert_eq!(number, newest, "two upstreams of one key at once");
                            heard.set(heard.get() + 1);
                        }
                        () = &mut stays => break,
                    }
                }
                match draw(4) {
                    0 => member.rst(),
                    1 => _ = member.fin_and_rest().await,
                    2 => {
                        let summary = leave(member).await;
                        assert_eq!(summary, "Close 1000, Fin");
                    }
                    // Close, and away without waiting for the answer.
                    _ => _ = member.send(&Frame::close(1000, "")).await,
                }
            }
        };
        futures_util::future::join_all((0..clients).map(|_| client())).await;
        (visits.get(), heard.get())
    });
    let opened = known.lock().unwrap_or_else(PoisonError::into_inner).opened;
    println!(
        "{visits} visits of {clients} clients to {keys} keys in {lasts} s: {opened} upstreams, {heard} messages heard"
    );
    assert_pool_is_left(&t, opened);
    let ends = backend.results(usize::try_from(opened).expect("a few"));
    assert_all(ends, "Close 1000", usize::try_from(opened).expect("a few"));
    assert!(known.lock().unwrap_or_else(PoisonError::into_inner).open.values().all(|open| *open == 0));
    t.assert_nothing_left();
    t.assert_sent_no_rst();
}
