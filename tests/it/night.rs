//! A bad night, told afterwards: from the metrics, the log and the live page alone it must be plain what happened, who ended what,
//! and in which order; and all three must say just what the clients saw.

use crate::harness::{
    DEADLINE, End, Frame, Side,
    crowd::{Front, Member, Stage, tally, together},
    http::Message,
    left_out,
    visit::{Errand, Outcome, arrive, echo, leave, visit},
    ws::CLOSE,
};
use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

const SESSIONS: usize = 500;
const KNOCKS: usize = 20;
const SPIKE: usize = 400;
const RUDE: usize = 10;

/// What its clients could hear of the end of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Heard {
    /// A Close with this code, and FIN.
    Close(u16),
    /// Nothing: it reset the connection itself.
    Nothing,
}

/// Sessions by the addresses of their clients, with what each of them heard in the end. In the order in which they ended.
type Ledger = Vec<(SocketAddr, Heard)>;

async fn open(t: &Front<'_>, count: usize) -> Vec<Member> {
    let arrivals = join_all((0..count).map(|_| arrive(t.address, DEADLINE))).await;
    let mut members: Vec<_> = arrivals.into_iter().map(|arrival| arrival.result.expect("a session")).collect();
    for member in &mut members {
        assert_eq!(echo(member, "good evening").await, Ok(()));
    }
    members
}

/// Each reads its Close, answers it, and reads on until its FIN.
async fn ended(members: Vec<Member>) -> Ledger {
    together(members, async |mut member| {
        let (local, close) = (member.local(), member.frame().await.expect("a Close"));
        assert_eq!(close.opcode, CLOSE);
        let _ = member.send(&Frame::new(CLOSE, &close.payload[..2])).await;
        assert_eq!(member.rest().await.end, End::Fin);
        (local, Heard::Close(close.code()))
    })
    .await
}

fn post(t: &Front<'_>, path: &str) {
    let request =
        Message::line(&format!("POST {path} HTTP/1.1")).header("Host", "localhost").header("Content-Length", "0");
    let response = t.admin(&request).expect("an answer");
    assert!((200..300).contains(&response.code()), "{response:?}");
}

/// Whoever looks at the page while the backend is away is told so.
#[track_caller]
fn assert_tells_of_it(page: &Value) {
    let problems = page["problems"].as_array().expect("a list");
    assert!(problems.iter().any(|it| it["what"].as_str().is_some_and(|what| what.contains("502"))), "{problems:?}");
}

fn live(t: &Front<'_>) -> Value {
    serde_json::from_slice(&t.get("/live.json").body).expect("JSON")
}

/// 500 sessions; their backend is killed; some knock while it is away; it is back, and so are they; others come all at once to a
/// proxy that stands still and has one short accept queue; some leave rudely; a drain ends the rest.
#[test]
fn a_bad_night_can_be_told() {
    let stage = Stage::new();
    // A queue of 128 is too short for this spike.
    let is_clamped = stage.lab().set(Side::Proxy, "core/somaxconn", "128");
    let mut backend = stage.echo_process();
    let settings = "listen = { max_sockets = 1, backlog = 128, workers = 1 }\ndrain = { delay = '0s', window = '1s', timeout = '60s' }\n\
                    upstream = { queue_timeout = '60s', handshake_timeout = '60s' }\nclose.handshake_timeout = '30s'";
    let t = stage.tidegate(settings, backend.address);
    let ledger: [Ledger; 4] = stage.clients(async || {
        let evening = open(&t, SESSIONS).await;
        backend.kill();
        let killed = ended(evening).await;
        for _ in 0..KNOCKS {
            assert_eq!(visit(t.address, Errand::Echo).await.outcome, Outcome::Status(502));
        }
        assert_tells_of_it(&live(&t));
        backend.again(&stage);
        let mut night = open(&t, SESSIONS).await;

        // Nobody is let in while it stands still.
        t.signal(Signal::STOP);
        let spike = async {
            let visitors = join_all((0..SPIKE).map(|_| async {
                let member = arrive(t.address, DEADLINE).await.result.expect("a session");
                let local = member.local();
                (local, leave(member).await)
            }));
            visitors.await
        };
        let go_on = async {
            // Until the queue is full, and somebody has found it so; where it is not clamped, until all are in it.
            while stage.lab().sockets(Side::Proxy).iter().filter(|s| s.state == "LISTEN").map(|s| s.unread).sum::<u64>()
                < if is_clamped { 129 } else { SPIKE as u64 }
            {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            t.signal(Signal::CONT);
        };
        let (visitors, ()) = tokio::join!(spike, go_on);
        assert_eq!(tally(visitors.iter().map(|(_, outcome)| *outcome)), BTreeMap::from([(Outcome::Served, SPIKE)]));
        let visitors = visitors.into_iter().map(|(local, _)| (local, Heard::Close(1000))).collect();

        let rude = night.drain(..RUDE).map(|member| {
            let local = member.local();
            member.rst();
            (local, Heard::Nothing)
        });
        let rude = rude.collect();
        t.metrics_when("the end of who left", |metrics| {
            metrics.count("tidegate_connections_active") == (SESSIONS - RUDE) as u64
        });
        post(&t, "/drain");
        [killed, visitors, rude, ended(night).await]
    });
    assert_eq!(t.get("/drain/wait").text(), "drained\n");
    let [killed, visitors, rude, drained] = &ledger;
    let all = |heard| move |(_, was): &(SocketAddr, Heard)| *was == heard;
    assert!(killed.iter().all(all(Heard::Close(1012))) && drained.iter().all(all(Heard::Close(1001))));
    assert_eq!([killed, visitors, rude, drained].map(Vec::len), [SESSIONS, SPIKE, RUDE, SESSIONS - RUDE]);

    by_metrics(&t, is_clamped);
    by_the_page(&t);
    by_the_log(&t, &ledger);
    t.sigterm();
    assert_eq!(t.wait_exit(DEADLINE).code(), Some(0));
    t.counters().assert_aborted_nothing();
}

/// Who ended how many, and how; and what else went wrong.
fn by_metrics(t: &Front<'_>, is_clamped: bool) {
    let metrics = t.metrics();
    let of = |name: &str, labels: &[&str]| -> usize {
        let found = metrics
            .all()
            .keys()
            .filter(|key| key.split('{').next() == Some(name) && labels.iter().all(|label| key.contains(label)));
        found.map(|key| usize::try_from(metrics.count(key)).expect("a count")).sum()
    };
    let closes = "tidegate_closes_total";
    assert_eq!(of(closes, &["initiator=\"backend\"", "clean=\"false\""]), SESSIONS, "{metrics:?}");
    assert_eq!(of(closes, &["initiator=\"client\"", "clean=\"true\""]), SPIKE);
    assert_eq!(of(closes, &["initiator=\"client\"", "clean=\"false\""]), RUDE);
    assert_eq!(of(closes, &["initiator=\"tidegate\"", "clean=\"true\"", "1001"]), SESSIONS - RUDE);
    assert_eq!(of(closes, &[]), 2 * SESSIONS + SPIKE);
    let abnormal = "tidegate_abnormal_closes_total";
    assert_eq!(of(abnormal, &["cause=\"backend_"]), SESSIONS);
    assert_eq!(of(abnormal, &["cause=\"client_reset\""]), RUDE);
    assert_eq!(of(abnormal, &[]), SESSIONS + RUDE);
    let handshakes = "tidegate_handshakes_total";
    assert_eq!(of(handshakes, &["accepted"]), 2 * SESSIONS + SPIKE);
    assert_eq!(of(handshakes, &["unreachable"]), KNOCKS);
    assert_eq!(of(handshakes, &[]), 2 * SESSIONS + SPIKE + KNOCKS);
    assert_eq!(of("tidegate_connections_active", &[]), 0);
    assert_eq!(of("tidegate_drain_state", &[]), 4);
    if is_clamped && stage_is_exact(t) {
        assert!(of("tidegate_listen_overflows_total", &[]) > 0, "who has waited for a place in the queue");
    } else {
        left_out("the overflows of the accept queue", "the queue is not clamped, or the counters are the whole host's");
    }
}

fn stage_is_exact(t: &Front<'_>) -> bool {
    t.counters().is_exact()
}

/// The same, as whoever is woken up sees it.
fn by_the_page(t: &Front<'_>) {
    let page = live(t);
    let window = &page["windows"]["15m"];
    assert_eq!(
        (&window["handshakes"]["accepted"], &window["handshakes"]["unreachable"]),
        (&(2 * SESSIONS + SPIKE).into(), &KNOCKS.into())
    );
    let count = |initiator: &str, clean: bool| -> u64 {
        let closes = window["closes"].as_array().expect("a list").iter();
        let found = closes.filter(|close| close["initiator"] == initiator && close["clean"] == clean);
        found.map(|close| close["count"].as_u64().expect("a number")).sum()
    };
    let expected = [
        ("backend", false, SESSIONS),
        ("client", true, SPIKE),
        ("client", false, RUDE),
        ("tidegate", true, SESSIONS - RUDE),
    ];
    for (initiator, clean, wanted) in expected {
        assert_eq!(count(initiator, clean), wanted as u64, "{initiator} {clean}: {window}");
    }
    assert_eq!((&page["phase"], &page["sessions"]), (&"drained".into(), &0.into()));
}

/// Each session has one line at its beginning and one at its end, which says what its client saw; and the lines stand in the order
/// in which it happened.
fn by_the_log(t: &Front<'_>, ledger: &[Ledger; 4]) {
    let log = t.log();
    let of = |message: &str| log.iter().filter(|line| line["message"] == message).collect::<Vec<_>>();
    let (opened, closed) = (of("open"), of("close"));
    let sessions: usize = ledger.iter().map(Vec::len).sum();
    assert_eq!((opened.len(), closed.len()), (sessions, sessions));
    // A client may have had the port of another that was gone: in their order they are what they say.
    let mut rest = closed.into_iter();
    for (part, initiator, clean) in
        [(0, "backend", false), (1, "client", true), (2, "client", false), (3, "tidegate", true)]
    {
        let mut wanted: BTreeSet<_> = ledger[part].iter().copied().collect();
        for line in rest.by_ref().take(ledger[part].len()) {
            let client: SocketAddr = line["client"].as_str().and_then(|text| text.parse().ok()).expect("an address");
            let got = line["client_got"]
                .as_u64()
                .map_or(Heard::Nothing, |code| Heard::Close(u16::try_from(code).expect("a code")));
            assert!(wanted.remove(&(client, got)), "nobody saw that: {line}");
            assert_eq!((&line["initiator"], &line["clean"]), (&initiator.into(), &clean.into()), "{line}");
        }
        assert!(wanted.is_empty(), "{wanted:?}");
    }
    let at = |test: &dyn Fn(&Value) -> bool| log.iter().position(test).expect("a line");
    let last = |test: &dyn Fn(&Value) -> bool| log.iter().rposition(test).expect("a line");
    let killed = last(&|line| line["initiator"] == "backend");
    let away = at(&|line| line["message"] == "request failed");
    let drain = at(&|line| line["message"] == "a drain is asked for");
    let drained = at(&|line| line["initiator"] == "tidegate");
    assert!(killed < away && away < drain && drain < drained, "{killed} {away} {drain} {drained}");
}
