//! What one address may have: connections, and handshakes; and that others do not notice when it has had enough.
//!
//! How they are counted is in `src/admission/addresses.rs`.

use crate::harness::{Dial, End, Gate, Message, Peer, Scene};

fn refused(reason: &str) -> String {
    format!("reason=\"{reason}\"")
}

const REFUSED: &str = "tidegate_refused_total";

/// The clients of the lab are the balancer.
const BALANCED: &str = "listen.proxy_protocol = 'required'\nhttp.trusted_proxies = ['198.18.0.0/15', '127.0.0.0/8']\n";

async fn greet(c: &mut Peer) {
    c.handshake("/").await;
    c.send_text("hello").await;
    assert_eq!(c.read_text().await, "hello");
}

async fn leave(c: &mut Peer) {
    c.send_close(1000, "").await;
    c.until_end().await.assert_closed_with(1000);
}

/// Who has as many connections as it may gets a 503 for the next one, and its place is there again when one has ended; meanwhile another
/// address, named by a balancer, is served.
#[test]
fn connections() {
    const ONE: Dial = Dial {
        recv_buffer: None,
        to: None,
        is_plain: false,
        before: b"PROXY TCP4 203.0.113.7 10.0.0.1 1 80\r\n",
        name: None,
    };
    const OTHER: Dial = Dial { before: b"PROXY TCP4 203.0.113.8 10.0.0.1 1 80\r\n", ..ONE };
    for (settings, one, other) in [("", Dial::default(), None), (BALANCED, ONE, Some(OTHER))] {
        let t = Scene::new(&format!("{settings}limits.max_connections_per_address = 2")).start();
        let end = Gate::new("others have tried");
        let refused_one = || {
            t.client_with(one, async |c| {
                let answer = c.request(Message::websocket("/")).await;
                let retry = answer.field("Retry-After").map(str::to_owned);
                assert_eq!((answer.code(), retry.as_deref(), c.until_end().await.end), (503, Some("1"), End::Fin));
            });
        };
        let visit = |dial| {
            t.client_with(dial, async |c| {
                greet(c).await;
                leave(c).await;
            });
        };
        std::thread::scope(|scope| {
            let held: Vec<_> = (0..2)
                .map(|_| {
                    let connected = Gate::new("it has its session");
                    let (at, until) = (connected.clone(), end.clone());
                    let t = &t;
                    let session = scope.spawn(move || {
                        t.client_with(one, async move |c| {
                            greet(c).await;
                            at.open();
                            until.passed().await;
                            leave(c).await;
                        });
                    });
                    connected.pass();
                    session
                })
                .collect();
            for _ in 0..3 {
                refused_one();
            }
            if let Some(other) = other {
                visit(other);
            }
            end.open();
            for session in held {
                session.join().expect("no panic");
            }
        });
        // Both are given back.
        for _ in 0..3 {
            t.proxy().metrics_when("that nobody is there", |metrics| metrics.sum("tidegate_client_connections") < 0.5);
            visit(one);
        }
        let metrics = t.proxy().metrics();
        assert!((metrics.sum_with(REFUSED, &refused("address_connections")) - 3.0).abs() < 0.5);
        t.proxy().log_where("what to do", |line| {
            line["fix"].as_str().is_some_and(|fix| fix.contains("limits.max_connections_per_address"))
        });
        t.no_rst();
    }
}

/// Handshakes beyond the rate get 429 and when to come again, before a backend hears of them; the connection is counted by who speaks,
/// also behind a proxy of HTTP, where what is on the left of the chain makes nobody another.
#[test]
fn handshakes() {
    let t = Scene::new(&format!("{BALANCED}limits.handshakes_per_address = '2/h'")).start();
    let ask = |before: &str, chain: Option<&str>| {
        let mut request = Message::websocket("/");
        if let Some(chain) = chain {
            request = request.header("X-Forwarded-For", chain);
        }
        t.client(async |c| {
            c.send_bytes(before.as_bytes()).await;
            let answer = c.request(request).await;
            let retry = answer.field("Retry-After").and_then(|seconds| seconds.parse::<u32>().ok());
            assert_eq!(
                retry.is_some_and(|seconds| (1700..=1801).contains(&seconds)),
                answer.code() == 429,
                "{answer:?}"
            );
            answer.code()
        })
    };
    let [one, other] = ["PROXY TCP6 2001:db8::7 ::1 1 80\r\n", "PROXY TCP6 2001:db8:0:1::7 ::1 1 80\r\n"];
    let local = "PROXY UNKNOWN\r\n";
    assert_eq!([ask(one, None), ask(one, Some("192.0.2.1")), ask(one, Some("192.0.2.2"))], [101, 101, 429]);
    assert_eq!(ask("PROXY TCP6 2001:db8::8 ::1 1 80\r\n", None), 429, "another host of the same network");
    assert_eq!(ask(other, None), 101);
    let chains = ["203.0.113.7", "192.0.2.1, 203.0.113.7", "192.0.2.2, 203.0.113.7"];
    assert_eq!(chains.map(|chain| ask(local, Some(chain))), [101, 101, 429]);
    assert_eq!(ask(local, Some("203.0.113.7, 203.0.113.8")), 101);
    // The proxy itself has those of many.
    assert_eq!([(); 4].map(|()| ask(local, None)), [101; 4]);
    let metrics = t.proxy().metrics();
    assert!((metrics.sum_with(REFUSED, &refused("address_rate")) - 3.0).abs() < 0.5);
    t.proxy().log_where("what to do", |line| {
        line["fix"].as_str().is_some_and(|fix| fix.contains("limits.handshakes_per_address"))
    });
    assert_eq!(t.backend().count(), 10);
    t.no_rst();
}
