//! The live page at the admin root, and its JSON and events. How it looks, and that it shows what clients saw, is in `interop/run page`.

use crate::harness::{DEADLINE, Message, Peer, Scene, Side, backend::echo, proxy::Proxy, scene::secure};
use serde_json::Value;
use socket2::{Domain, Socket, Type};
use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    time::Instant,
};

/// As many as may listen from where the proxy is.
const STREAMS: usize = 16;

fn json(t: &Scene) -> Value {
    serde_json::from_str(&t.proxy().get("/live.json").text()).expect("JSON")
}

/// Asks until it is as `test` wants it.
#[track_caller]
fn json_when(t: &Scene, what: &str, test: impl Fn(&Value) -> bool) -> Value {
    let begun = Instant::now();
    loop {
        let found = json(t);
        if test(&found) {
            return found;
        }
        assert!(begun.elapsed() < DEADLINE, "/live.json never said {what}: {found:#}");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

/// One who listens at `/live`.
struct Listener(BufReader<TcpStream>);

impl Listener {
    /// And the status. By HTTP/1.0, so that nothing stands between the events, or by what is said.
    fn new(t: &Scene, version: &str) -> (u16, Self) {
        let mut this = Self::connect(t, None);
        write!(this.0.get_mut(), "GET /live HTTP/{version}\r\nHost: localhost\r\n\r\n").expect("it reads");
        let status = this.line().split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
        while !this.line().is_empty() {}
        (status, this)
    }

    /// Says nothing yet. `buffer`: `SO_RCVBUF`, in bytes.
    fn connect(t: &Scene, buffer: Option<usize>) -> Self {
        let admin = t.proxy().admin;
        let stream = t.lab().place(Side::Proxy).run(|| {
            let socket = Socket::new(Domain::for_address(admin), Type::STREAM, None).expect("a socket");
            if let Some(bytes) = buffer {
                socket.set_recv_buffer_size(bytes).expect("a size");
            }
            socket.connect(&admin.into()).expect("it listens");
            TcpStream::from(socket)
        });
        stream.set_read_timeout(Some(DEADLINE)).expect("a socket");
        Self(BufReader::new(stream))
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("an orderly end, or more");
        line.trim_end().to_owned()
    }

    /// Its name ("" for the usual one) and what it says; `None`: there are no more.
    fn event(&mut self) -> Option<(String, Value)> {
        let (mut name, mut data) = (String::new(), None);
        loop {
            let line = self.line();
            match line.split_once(": ") {
                Some(("event", is)) => is.clone_into(&mut name),
                Some(("data", is)) => data = Some(serde_json::from_str(is).expect("JSON")),
                Some(("retry", "1000")) => {}
                None if line.is_empty() => return Some((name, data?)),
                _ => panic!("no line of an event: {line:?}"),
            }
        }
    }

    #[track_caller]
    fn event_when(&mut self, what: &str, test: impl Fn(&str, &Value) -> bool) -> Value {
        let begun = Instant::now();
        while let Some((name, data)) = self.event() {
            if test(&name, &data) {
                return data;
            }
            assert!(begun.elapsed() < DEADLINE, "no event said {what}");
        }
        panic!("the events ended without {what}");
    }
}

fn post(proxy: &Proxy, path: &str) -> u16 {
    let request = Message::line(&format!("POST {path} HTTP/1.1")).header("Host", "localhost");
    proxy.admin(&request.header("Content-Length", "0")).expect("an answer").code()
}

/// A session with one message, which its client ends.
fn visit(t: &Scene) {
    t.client(async |c| {
        c.handshake("/").await;
        c.send_text("hello").await;
        assert_eq!(c.read_text().await, "hello");
        c.send_close(1000, "").await;
        c.until_end().await.assert_closed_with(1000);
    });
}

/// All that the page shows is there for curl: after sessions that ended in two ways, the counts are theirs, and the same that
/// `/metrics` has. The history has one number for each second in each of its series.
#[test]
fn json_has_what_the_page_shows() {
    let t = Scene::new("close.delay = '0ms'").backend(echo).start();
    (0..3).for_each(|_| visit(&t));
    t.client(async |c| {
        c.handshake("/").await;
        c.rst();
    });
    let found = json_when(&t, "4 ends and a sample", |found| {
        let closes = found["windows"]["15m"]["closes"].as_array().expect("a list");
        let ended: u64 = closes.iter().filter_map(|close| close["count"].as_u64()).sum();
        ended == 4 && found["seq"].as_u64() > Some(0)
    });
    for key in [
        "version",
        "pid",
        "unix_ms",
        "uptime_ms",
        "listen",
        "phase",
        "phase_ms",
        "phase_left_ms",
        "drain",
        "sessions",
        "connections",
        "lingering",
        "problems",
        "limits",
        "queues",
        "windows",
        "kernel",
        "endpoints",
        "more_endpoints",
        "shared",
        "more_shared",
        "websockets",
        "more_websockets",
        "pool",
        "seq",
        "sample",
        "history",
        "doctor",
        "config",
    ] {
        assert!(found.get(key).is_some(), "no {key} in {found:#}");
    }
    for window in ["1m", "15m"] {
        let window = &found["windows"][window];
        assert_eq!(window["handshakes"], serde_json::json!({ "accepted": 4 }), "{window:#}");
        assert_eq!(window["messages"], serde_json::json!([3, 3]), "{window:#}");
        let closes = window["closes"].as_array().expect("a list");
        let clean = closes.iter().find(|close| close["clean"] == true).expect("three of them");
        assert_eq!(
            (&clean["initiator"], &clean["code"], &clean["count"]),
            (&"client".into(), &"1000".into(), &3.into())
        );
        assert_eq!(window["abnormal"], serde_json::json!({ "client_reset": 1 }), "{window:#}");
        let [connect, close] = [&window["connect"], &window["close"]];
        assert_eq!((&connect["count"], &close["count"]), (&4.into(), &4.into()));
        for took in [connect, close] {
            let ms = |key| took[key].as_f64().unwrap_or_else(|| panic!("no {key} in {took}"));
            assert!(ms("p50_ms") <= ms("p99_ms") && ms("p99_ms") <= ms("max_ms"), "{took}");
        }
    }
    let metrics = t.proxy().metrics();
    let count = |labels: &str| metrics.count(&format!("tidegate_closes_total{{{labels}}}"));
    assert_eq!(count("initiator=\"client\",code_class=\"1000\",clean=\"true\""), 3);
    assert!((metrics.sum("tidegate_closes_total") - 4.0).abs() < 0.1);
    assert_eq!(metrics.count("tidegate_handshake_duration_seconds_count"), 4);
    assert_eq!(metrics.count("tidegate_handshake_duration_seconds_bucket{le=\"+Inf\"}"), 4);
    assert_eq!(metrics.count("tidegate_close_duration_seconds_count"), 4);
    let series = found["history"]["series"].as_object().expect("series by name");
    let lengths: Vec<_> = series.values().map(|series| series.as_array().map(Vec::len)).collect();
    assert_eq!(
        lengths,
        vec![found["history"]["last_seq"].as_u64().map(|seq| usize::try_from(seq).expect("small")); 11]
    );
    let sample = found["sample"].as_object().expect("numbers by name");
    assert!(sample.keys().eq(series.keys()), "{sample:?}");
    assert!(
        found["config"].as_str().is_some_and(|toml| toml.contains("[close]\ndelay = \"0s\"")),
        "{}",
        found["config"]
    );
}

/// The configuration names files of keys. What is in them is not shown.
#[test]
fn no_secret_is_shown() {
    secure(|| {
        let t = Scene::new("").backend(echo).start();
        let text = t.proxy().get("/live.json").text();
        assert!(text.contains("tls_key = \\\"/"), "a key's path is what is looked at: {text}");
        assert!(!text.contains("PRIVATE KEY") && !text.contains("BEGIN"), "{text}");
    });
}

/// Whoever listens is told everything at once, then each second the newest; and everything again after a reload.
#[test]
fn events_come_at_once_and_again() {
    let t = Scene::new("").backend(echo).start();
    let (status, mut listener) = Listener::new(&t, "1.0");
    let (name, all) = listener.event().expect("one at once");
    assert_eq!((status, name.as_str(), &all["sessions"]), (200, "all", &0.into()));
    let next = listener.event_when("the next second", |_, now| now["seq"].as_u64() > all["seq"].as_u64());
    assert!(next.get("config").is_none() && next.get("history").is_none(), "{next:#}");
    let gone = crate::harness::Gate::new("gone");
    let client = t.start_client({
        let gone = gone.clone();
        async move |c| {
            c.handshake("/").await;
            gone.passed().await;
            c.send_close(1000, "").await;
            c.until_end().await
        }
    });
    listener.event_when("a session", |_, now| now["sample"]["sessions"] == 1);
    gone.open();
    client.join().assert_closed_with(1000);
    t.proxy().configure("websocket.max_message = '1MiB'");
    assert_eq!(post(t.proxy(), "/reload"), 200);
    listener.event_when("what was reloaded", |name, now| {
        name == "all" && now["config"].as_str().is_some_and(|toml| toml.contains("max_message = \"1MiB\""))
    });
}

/// As many as may listen do; the next one is told so, and a probe is answered meanwhile. Who goes makes room.
#[test]
fn listeners_are_bounded() {
    // A readiness probe connects, and asks nothing.
    let script = async |c: &mut Peer| {
        if c.is_asked().await {
            echo(c).await;
        }
    };
    let t = Scene::new("").backend(script).start();
    let mut listeners: Vec<_> = (0..STREAMS).map(|_| Listener::new(&t, "1.1")).collect();
    assert!(listeners.iter().all(|(status, _)| *status == 200));
    assert_eq!(Listener::new(&t, "1.1").0, 503);
    for path in ["/livez", "/readyz", "/live.json", "/metrics"] {
        assert_eq!(t.proxy().get(path).code(), 200, "{path}");
    }
    listeners.pop();
    let begun = Instant::now();
    while Listener::new(&t, "1.1").0 != 200 {
        assert!(begun.elapsed() < DEADLINE, "who left keeps its place");
    }
}

/// One reads nothing while far more is to be told than sockets hold: he loses events, since nothing is kept for him. Another one is told
/// the newest all the while, clients are served, and the process ends as ever.
#[test]
fn a_stalled_reader_harms_nobody() {
    let t = Scene::new("drain = { delay = '60s', window = '0s' }").backend(echo).start();
    // Else they hold megabytes.
    let holds_little = t.lab().set(Side::Proxy, "ipv4/tcp_wmem", "4096 16384 65536");
    let rounds = if holds_little { 300 } else { 2500 };
    let mut stalled = Listener::connect(&t, Some(2048));
    write!(stalled.0.get_mut(), "GET /live HTTP/1.0\r\n\r\n").expect("it reads");
    let (_, mut other) = Listener::new(&t, "1.0");
    let told = std::thread::scope(|s| {
        // Each change of the phase is an event.
        let told = s.spawn(|| {
            let mut bytes = 0;
            while let Some((_, data)) = other.event() {
                bytes += data.to_string().len();
                if data["phase"] == "drained" {
                    break;
                }
            }
            bytes
        });
        for _ in 0..rounds {
            assert_eq!((post(t.proxy(), "/drain"), post(t.proxy(), "/undrain")), (202, 200));
        }
        visit(&t);
        t.proxy().sigterm();
        // Two at once would be one. The second ends the delay.
        t.proxy().log_where("SIGTERM", |line| line["message"] == "SIGTERM");
        t.proxy().sigterm();
        assert_eq!(t.proxy().wait_exit(DEADLINE).code(), Some(0));
        told.join().expect("it was told")
    });
    let mut rest = Vec::new();
    // However it ends: he did not read.
    let _ = stalled.0.read_to_end(&mut rest);
    println!("{told} bytes for who reads, {} for who does not", rest.len());
    assert!(rest.len() < told / 2, "{} of {told} bytes waited for him", rest.len());
}

/// A drain is told from its first moment on; at the process's end the events end as HTTP wants it, behind the last word.
#[test]
fn events_end_with_the_process() {
    let t = Scene::new("drain = { delay = '60s', window = '0s' }").backend(echo).start();
    let (_, mut listener) = Listener::new(&t, "1.0");
    let (_, mut whole) = Listener::new(&t, "1.1");
    assert_eq!(post(t.proxy(), "/drain"), 202);
    let drain = listener.event_when("the drain", |_, now| now["phase"] == "delay");
    assert_eq!(drain["drain"]["sessions_at_start"], 0, "{drain:#}");
    assert!(drain["phase_left_ms"].as_u64().is_some_and(|left| (1..=60_000).contains(&left)), "{drain:#}");
    // The first ends the process when it is drained, the second ends the delay.
    t.proxy().sigterm();
    listener.event_when("still the same", |_, now| now["phase"] == "delay");
    t.proxy().sigterm();
    listener.event_when("the end", |_, now| now["phase"] == "drained");
    while listener.event().is_some() {}
    let mut rest = Vec::new();
    whole.0.read_to_end(&mut rest).expect("a FIN");
    assert!(rest.ends_with(b"\r\n0\r\n\r\n"), "{:?}", String::from_utf8_lossy(&rest[rest.len().saturating_sub(100)..]));
    assert_eq!(t.proxy().wait_exit(DEADLINE).code(), Some(0));
}

/// The page may run its own script, speak with where it comes from, and nothing else; each one has a nonce of its own. What is no
/// browser gets a list, and nothing can be changed.
#[test]
fn the_page_is_alone() {
    let t = Scene::new("").backend(echo).start();
    let browser = Message::get("/").header("Accept", "text/html,application/xhtml+xml,*/*;q=0.8");
    let pages = [(); 2].map(|()| t.proxy().admin(&browser).expect("an answer"));
    let nonces = pages.map(|page| {
        let policy = page.field("Content-Security-Policy").expect("a policy").to_owned();
        let (_, nonce) = policy.split_once("script-src 'nonce-").expect("a nonce");
        let (nonce, _) = nonce.split_once('\'').expect("its end");
        let wanted = format!(
            "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
             frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
        );
        assert_eq!((policy.as_str(), nonce.len()), (wanted.as_str(), 32));
        let text = page.text();
        assert_eq!(text.matches(&format!("nonce=\"{nonce}\"")).count(), 2);
        assert!(!text.contains("NONCE") && !text.contains("innerHTML") && !text.contains("src="), "{text}");
        assert!(text.len() < 30_000, "{} bytes", text.len());
        for (name, value) in [("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")] {
            assert_eq!(page.field(name), Some(value));
        }
        nonce.to_owned()
    });
    assert_ne!(nonces[0], nonces[1]);
    let list = t.proxy().get("/");
    assert!(list.text().contains("/live.json"), "{}", list.text());
    for path in ["/", "/live", "/live.json"] {
        assert_eq!(post(t.proxy(), path), 405, "{path}");
    }
    let head = Message::line("HEAD /live HTTP/1.1").header("Host", "localhost");
    assert_eq!(t.proxy().admin(&head).expect("an answer").code(), 200);
}

/// On loopback nobody is told anything under a name that may have been bound anew to it, as that of a page; probes are.
#[test]
fn a_page_of_another_name_reads_nothing() {
    let t = Scene::new("").start();
    let ask = |path: &str, host: &str| {
        let request = Message::line(&format!("GET {path} HTTP/1.1")).header("Host", host).header("Connection", "close");
        t.lab().place(Side::Proxy).run(|| {
            let mut stream = TcpStream::connect(t.proxy().admin).expect("the admin listener");
            stream.write_all(&request.bytes()).expect("an open connection");
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).expect("an answer");
            Message::parse_head(&bytes).expect("an answer").0.code()
        })
    };
    for path in ["/", "/live.json", "/connections", "/status"] {
        assert_eq!(
            [ask(path, "evil.example:9090"), ask(path, "localhost:9090"), ask(path, "127.0.0.1")],
            [421, 200, 200],
            "{path}"
        );
    }
    assert_eq!([ask("/livez", "evil.example"), ask("/metrics", "evil.example")], [200, 200]);
}
