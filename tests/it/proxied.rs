//! Clients that come by a balancer, which says with a PROXY header who they are: who is believed, and what becomes of all else.
//!
//! What is a header is in `src/downstream/proxy.rs`, table by table.

use crate::harness::{Dial, End, Message, Peer, Scene, tls::Authority};

const LAB: &str = "'198.18.0.0/15', '127.0.0.0/8'";

/// The clients of the lab are the balancer, and one more network is of proxies.
fn required(more: &str) -> String {
    format!("listen.proxy_protocol = 'required'\nhttp.trusted_proxies = [{LAB}, '192.0.2.0/24']\n{more}")
}

const HEADERS: &str = "tidegate_proxy_headers_total";

fn headers(result: &str) -> String {
    format!("{HEADERS}{{result=\"{result}\"}}")
}

const LINE: &[u8] = b"PROXY TCP4 203.0.113.7 10.0.0.1 4242 80\r\n";
const PREFIX: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
const IPV4: &[u8] = &[203, 0, 113, 7, 10, 0, 0, 1, 0x10, 0x92, 0, 80];

fn v2(version: u8, family: u8, block: &[u8]) -> Vec<u8> {
    let length = u16::try_from(block.len()).expect("short").to_be_bytes();
    [PREFIX, &[version, family], &length, block].concat()
}

/// Says what it was told of its client.
async fn tells(c: &mut Peer) {
    let request = c.read_head().await;
    let said =
        ["X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Forwarded"].map(|name| request.all(name).join("; "));
    c.reply(Message::status(200, "OK", &said.join(" | "))).await;
    c.fin().await;
    c.until_end().await;
}

/// The client is who the header names, or the balancer itself where it names nobody; in one piece with the request, in one of its own, and
/// byte by byte.
#[test]
fn who_is_named_is_the_client() {
    let t = Scene::new(&required("")).backend(tells).start();
    let own = t.client(async |c| {
        let own = c.local().ip().to_string();
        c.send_bytes(&v2(0x20, 0, b"")).await;
        c.fin().await;
        assert_eq!(c.until_end().await.end, End::Fin);
        own
    });
    let six = [&[0x20, 1, 13, 0xb8][..], &[0; 11], &[7], &[0; 16], &[0x10, 0x92, 0, 80]].concat();
    let rows = [
        (LINE.to_vec(), "203.0.113.7"),
        (b"PROXY TCP6 2001:db8::7 ::1 4242 80\r\n".to_vec(), "2001:db8::7"),
        (b"PROXY UNKNOWN\r\n".to_vec(), &own),
        (v2(0x21, 0x11, IPV4), "203.0.113.7"),
        (v2(0x21, 0x21, &six), "2001:db8::7"),
        (v2(0x21, 0, b""), &own),
        (v2(0x20, 0, b""), &own),
        (v2(0x21, 0x11, &[IPV4, &[4, 0x0f, 0xf1], &[0; 0x0ff1]].concat()), "203.0.113.7"),
    ];
    let request = Message::get("/").header("Connection", "close").bytes();
    for (header, client) in &rows {
        for pieces in 0..3 {
            let said = t.client(async |c| {
                match pieces {
                    0 => _ = c.send_bytes(&[&header[..], &request].concat()).await,
                    1 => {
                        c.send_bytes(header).await;
                        c.sent_is_acked().await;
                        c.send_bytes(&request).await;
                    }
                    _ => {
                        let most = if header.len() > 1000 { 500 } else { 1 };
                        c.drip(&[&header[..], &request].concat(), most, std::time::Duration::from_millis(1)).await;
                    }
                }
                c.read_response().await.text()
            });
            assert_eq!(said, format!("{client} | tidegate.test |  | "), "{} in {pieces}", header.escape_ascii());
        }
    }
    let metrics = t.proxy().metrics();
    let result = ["accepted", "local", "broken", "abandoned"].map(|result| metrics.count(&headers(result)));
    assert_eq!(result, [15, 10, 0, 0]);
    t.no_rst();
}

/// What a client says of itself is worth what it is worth without a balancer: nothing, unless the header names one of the proxies.
#[test]
fn what_a_named_client_says_of_others() {
    let t = Scene::new(&required("")).backend(tells).start();
    let claims = [
        ("X-Forwarded-For", "198.51.100.1"),
        ("X-Forwarded-Host", "other.test"),
        ("X-Real-IP", "198.51.100.1"),
        ("Forwarded", "for=198.51.100.1"),
        ("X_Forwarded_For", "198.51.100.1"),
        ("X-Forwarded_Host", "other.test"),
    ];
    for (claim, value) in claims {
        let ask = |from: &str| {
            let request = Message::get("/").header("Connection", "close").header(claim, value);
            let line = format!("PROXY TCP4 {from} 10.0.0.1 4242 80\r\n");
            t.client(async |c| {
                c.send_bytes(&[line.as_bytes(), &request.bytes()].concat()).await;
                c.read_response().await.text()
            })
        };
        assert_eq!(ask("203.0.113.7"), "203.0.113.7 | tidegate.test |  | ", "{claim}");
        let expected = match claim {
            "X-Forwarded-For" => "198.51.100.1, 192.0.2.5 | tidegate.test |  | ",
            "X-Forwarded-Host" => "192.0.2.5 | other.test |  | ",
            "X-Real-IP" => "192.0.2.5 | tidegate.test | 198.51.100.1 | ",
            "Forwarded" => "192.0.2.5 | tidegate.test |  | for=198.51.100.1",
            _ => "192.0.2.5 | tidegate.test |  | ",
        };
        assert_eq!(ask("192.0.2.5"), expected, "{claim}");
    }
    t.no_rst();
}

/// Without a header, or with another one, nothing is served, and nothing reaches a backend, whatever comes behind it: FIN, without a byte.
#[test]
fn nothing_else_is_taken() {
    let t = Scene::new(&required("")).start();
    let line = |text: &str| format!("{text}\r\n").into_bytes();
    let vectors = [
        (b"".to_vec(), "missing"),
        (line("proxy TCP4 203.0.113.7 10.0.0.1 4242 80"), "missing"),
        (line(" PROXY TCP4 203.0.113.7 10.0.0.1 4242 80"), "missing"),
        (line("\r\nPROXY TCP4 203.0.113.7 10.0.0.1 4242 80"), "missing"),
        (line("PROXY\tTCP4 203.0.113.7 10.0.0.1 4242 80"), "missing"),
        (line("X-Forwarded-For: 203.0.113.7"), "missing"),
        (b"\x16\x03\x01\x02\x00\x01".to_vec(), "missing"),
        ([&PREFIX[..11], b"\r\x21\x11\0\x0c", IPV4].concat(), "missing"),
        (line("PROXY"), "missing"),
        (line("PROXY TCP4"), "broken"),
        (line("PROXY TCP5 203.0.113.7 10.0.0.1 4242 80"), "broken"),
        (line("PROXY tcp4 203.0.113.7 10.0.0.1 4242 80"), "broken"),
        (line("PROXY unknown"), "broken"),
        (line("PROXY UNKNOWNER"), "broken"),
        (line("PROXY TCP6 203.0.113.7 10.0.0.1 4242 80"), "broken"),
        (line("PROXY TCP4 203.0.113.256 10.0.0.1 4242 80"), "broken"),
        (line("PROXY TCP4 203.0.113.07 10.0.0.1 4242 80"), "broken"),
        (line("PROXY TCP4 app.example 10.0.0.1 4242 80"), "broken"),
        (line("PROXY TCP4 203.0.113.7 10.0.0.1 65536 80"), "broken"),
        (line("PROXY TCP4 203.0.113.7 10.0.0.1 +4242 80"), "broken"),
        (line("PROXY TCP4 203.0.113.7 10.0.0.1 4242"), "broken"),
        (line("PROXY TCP4 203.0.113.7 10.0.0.1 4242 80 "), "broken"),
        (b"PROXY TCP4 203.0.113.7 10.0.0.1 4242 80\n".to_vec(), "broken"),
        (b"PROXY TCP4 203.0.113.7 10.0.0.1 4242 80\r\r\n".to_vec(), "broken"),
        (line(&format!("PROXY UNKNOWN {}", "a".repeat(92))), "broken"),
        (v2(0x11, 0x11, IPV4), "broken"),
        (v2(0x22, 0x11, IPV4), "broken"),
        (v2(0x21, 0x41, IPV4), "broken"),
        (v2(0x21, 0x10, IPV4), "broken"),
        (v2(0x21, 0x11, &IPV4[..11]), "broken"),
        (v2(0x21, 0x21, IPV4), "broken"),
        (v2(0x21, 0x11, &[IPV4, &[1, 0, 9, 0]].concat()), "broken"),
        (v2(0x21, 0x11, &[IPV4, &[4, 0x0f, 0xf2], &[0; 0x0ff2]].concat()), "broken"),
        ([PREFIX, &[0x21, 0x11, 0xff, 0xff]].concat(), "broken"),
    ];
    assert!(vectors.len() >= 30);
    for (bytes, expected) in &vectors {
        let before = t.proxy().metrics().count(&headers(expected));
        t.client(async |c| {
            c.send_bytes(&[&bytes[..], &Message::websocket("/").bytes()].concat()).await;
            let seen = c.until_end().await;
            assert_eq!((seen.end, c.received_bytes()), (End::Fin, 0), "{}", bytes.escape_ascii());
        });
        assert_eq!(t.proxy().metrics().count(&headers(expected)), before + 1, "{}", bytes.escape_ascii());
    }
    t.proxy().log_where("what to do", |line| line["fix"].as_str().is_some_and(|fix| fix.contains("send-proxy-v2")));
    assert_eq!(t.backend().count(), 0, "somebody got through");
    t.no_rst();
}

/// Who is not of the networks may not say who anybody is, and is not served as himself either.
#[test]
fn a_header_of_anyone_else() {
    let t = Scene::new("listen.proxy_protocol = 'required'\nhttp.trusted_proxies = ['192.0.2.0/24', '203.0.113.0/24']")
        .start();
    for bytes in [&[LINE, &Message::websocket("/").bytes()].concat()[..], &Message::websocket("/").bytes(), b""] {
        t.client(async |c| {
            c.send_bytes(bytes).await;
            let seen = c.until_end().await;
            assert_eq!((seen.end, c.received_bytes()), (End::Fin, 0));
        });
    }
    assert_eq!(t.proxy().metrics().count(&headers("untrusted")), 3);
    t.proxy()
        .log_where("what to do", |line| line["fix"].as_str().is_some_and(|fix| fix.contains("http.trusted_proxies")));
    assert_eq!(t.backend().count(), 0, "somebody got through");
    t.no_rst();
}

/// The header comes before TLS, and sessions are as they are without it; the log has the client's own address.
#[test]
fn before_tls() {
    let t = Scene::new(&required("")).secure(Authority::new()).start();
    t.client_with(Dial { before: LINE, ..Dial::default() }, async |c| {
        c.handshake("/").await;
        c.send_text("hello").await;
        assert_eq!(c.read_text().await, "hello");
        c.send_close(1000, "").await;
        c.until_end().await.assert_closed_with(1000);
    });
    t.proxy().log_where("whose session it was", |line| {
        line["message"] == "close" && line["client"] == "203.0.113.7:4242" && line["tls"] == "1.3"
    });
    t.no_rst();
}

/// One deadline is for the header and what follows it, whichever of them does not come; who ends before that is no mistake.
#[test]
fn who_is_waited_for() {
    let t = Scene::new(&required("http.header_timeout = '300ms'")).start();
    for (bytes, result) in [(&b"PROXY TCP4 203.0"[..], "timeout"), (&PREFIX[..7], "timeout"), (LINE, "accepted")] {
        let before = t.proxy().metrics().count(&headers(result));
        t.client(async |c| {
            c.send_bytes(bytes).await;
            assert_eq!((c.until_end().await.end, c.received_bytes()), (End::Fin, 0));
        });
        assert_eq!(t.proxy().metrics().count(&headers(result)), before + 1);
    }
    for bytes in [&b""[..], b"PROXY TCP4 203.0"] {
        t.client(async |c| {
            c.send_bytes(bytes).await;
            c.fin().await;
            assert_eq!(c.until_end().await.end, End::Fin);
        });
    }
    t.proxy().metrics_when("both that left", |metrics| metrics.count(&headers("abandoned")) == 2);
    let is_said = |line: &serde_json::Value| line["fix"].as_str().is_some_and(|fix| fix.contains("proxy_protocol"));
    assert!(!t.proxy().log().iter().any(is_said), "a health check is no mistake");
    t.no_rst();
}

/// For whom there is no place he is told so, behind his header.
#[test]
fn who_is_turned_away() {
    let t = Scene::new(&required("limits.max_connections = 1")).start();
    t.client_with(Dial { before: LINE, ..Dial::default() }, async |first| {
        first.handshake("/").await;
        let second = t.start_client(async |c: &mut Peer| {
            c.send_bytes(&[LINE, &Message::websocket("/").bytes()].concat()).await;
            let answer = c.read_response().await;
            (answer.code(), c.until_end().await.end)
        });
        assert_eq!(tokio::task::spawn_blocking(move || second.join()).await.unwrap(), (503, End::Fin));
        first.send_close(1000, "").await;
        first.until_end().await.assert_closed_with(1000);
    });
    t.no_rst();
}
