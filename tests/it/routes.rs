//! Routes: which backend a request goes to, by its path, and what a reload makes of them.

use crate::harness::{
    Board, DEADLINE, Gate, Message,
    backend::{self, Backend, Options},
    peer::Peer,
    proxy::Proxy,
    scene::Scene,
};
use serde_json::{Value, json};
use std::thread;

/// Says its name to everybody: to a session at its beginning, to a plain request as the answer. Then an echo.
fn named(name: &'static str) -> impl AsyncFn(&mut Peer) + Send + Sync + 'static {
    async move |c: &mut Peer| {
        while c.is_asked().await {
            let request = c.read_head().await;
            if request.field("Upgrade").is_none() {
                c.reply(Message::status(200, "OK", name)).await;
                continue;
            }
            c.reply(Message::switching(&request)).await;
            c.send_text(name).await;
            return backend::echo_on(c).await;
        }
    }
}

/// Says no, once `is_due`.
fn refuses(asked: &Board<u32>, is_due: &Board<bool>) -> impl AsyncFn(&mut Peer) + Send + Sync + 'static {
    let (asked, is_due) = (asked.clone(), is_due.clone());
    async move |c: &mut Peer| {
        while c.is_asked().await {
            c.read_head().await;
            asked.change(|asked| *asked += 1);
            is_due.until(DEADLINE, |is_due| is_due.then_some(())).await.expect("leave to answer");
            c.reply(Message::status(403, "Forbidden", "no")).await;
        }
    }
}

/// A scene whose backend is "all", and two more for routes.
struct Ways {
    t: Scene,
    chat: Backend,
    rest: Backend,
}

impl Ways {
    fn start() -> Self {
        let t = Scene::new("reload.watch = '0s'").backend(named("all")).start();
        let [chat, rest] = ["chat", "rest"].map(|name| Backend::start(t.lab(), Options::default(), named(name)));
        Self { t, chat, rest }
    }

    /// Sets routes, each a path and a backend.
    fn set(&self, routes: &[(&str, &Backend)]) -> Value {
        let routes: Vec<_> = routes
            .iter()
            .map(|(path, backend)| format!("{{ path = '{path}', upstream = '{}' }}", backend.address))
            .collect();
        self.t.proxy().configure(&format!("reload.watch = '0s'\nroute = [{}]", routes.join(", ")));
        reload(self.t.proxy())
    }

    /// Who serves a session at `path`; or the status that it is refused with.
    fn session(&self, path: &str) -> Result<String, u16> {
        self.t.client(async |c| {
            let request = Message::websocket(path);
            let response = c.request(request).await;
            if response.code() != 101 {
                c.until_end().await;
                return Err(response.code());
            }
            let name = c.read_text().await;
            c.send_close(1000, "").await;
            c.until_end().await;
            Ok(name)
        })
    }
}

fn reload(proxy: &Proxy) -> Value {
    let request = Message::line("POST /reload HTTP/1.1").header("Host", "localhost").header("Content-Length", "0");
    let response = proxy.admin(&request).expect("an answer");
    assert_eq!(response.code(), 200, "{response:?}");
    serde_json::from_slice(&response.body).expect("JSON")
}

/// Exactly the path, everything below, and what no route is for; sessions and plain requests, also several on one connection.
#[test]
fn requests_go_where_their_path_leads() {
    let ways = Ways::start();
    ways.set(&[("/chat", &ways.chat), ("/rest/*", &ways.rest), ("/rest/chat/*", &ways.chat)]);
    let paths = [
        ("/", "all"),
        ("/chat", "chat"),
        ("/chat?room=/rest/", "chat"),
        ("/chat/", "all"),
        ("/rest", "all"),
        ("/rest/", "rest"),
        ("/rest/a%20b", "rest"),
        ("/rest/chat", "rest"),
        ("/rest/chat/1", "chat"),
    ];
    for (path, name) in paths {
        assert_eq!(ways.session(path).as_deref(), Ok(name), "{path}");
    }
    ways.t.client(async |c| {
        for (path, name) in paths {
            assert_eq!(c.request(Message::get(path)).await.text(), name, "{path}");
        }
    });
    let close = ways
        .t
        .proxy()
        .log_where("a session's end", |line| line["message"] == "close" && line["path"] == "/rest/chat/1");
    assert_eq!(close["route"], "/rest/chat/*");
    assert_eq!(close["endpoint"], ways.chat.address.to_string().as_str());
    let close =
        ways.t.proxy().log_where("a session's end", |line| line["message"] == "close" && line["path"] == "/chat/");
    assert_eq!(close["route"], "");
    ways.t.no_rst();
}

/// A path that a backend may take for one of another route reaches none.
#[test]
fn a_path_with_two_meanings_is_refused() {
    let ways = Ways::start();
    let odd = ["/x/../chat", "/x/%2e%2e/chat", "/%63hat", "/rest%2fa", "//chat", "/rest/../../chat"];
    for path in odd {
        assert_eq!(ways.session(path).as_deref(), Ok("all"), "without routes it is as it was sent: {path}");
    }
    ways.set(&[("/chat", &ways.chat), ("/rest/*", &ways.rest)]);
    for path in odd {
        assert_eq!(ways.session(path), Err(400), "{path}");
    }
    ways.t.client(async |c| {
        assert_eq!(c.request(Message::get("/rest/%2e%2e/chat")).await.code(), 400);
        assert_eq!(c.request(Message::get("/rest/a%2fb")).await.text(), "rest");
    });
    assert_eq!((ways.chat.count(), ways.rest.count()), (0, 1));
    let metrics = ways.t.proxy().metrics();
    assert_eq!(metrics.count("tidegate_handshakes_total{result=\"invalid\"}"), 6);
    assert_eq!(metrics.count("tidegate_http_requests_total{status=\"4xx\"}"), 1);
    assert_eq!(metrics.count("tidegate_ambiguous_paths_total"), 7);
    let line = ways.t.proxy().log_where("such a path", |line| line["message"].to_string().contains("two ways"));
    assert_eq!(
        [&line["level"], &line["path"], &line["route"], &line["other"]],
        [&json!("WARN"), &json!("/x/../chat"), &json!(""), &json!("/chat")]
    );
    assert!(line["fix"].to_string().contains("dot segments"), "{line}");
    ways.t.no_rst();
}

/// Whatever fails at a backend is said with the route that led there, the endpoint, and no key that is not the route's.
#[test]
fn what_fails_names_its_route_and_its_endpoint() {
    let (asked, is_due) = (Board::new(0), Board::new(false));
    let settings = "reload.watch = '0s'\nupstream.max_pending = 1\nupstream.queue_timeout = '100ms'";
    let t = Scene::new(settings).backend(named("all")).start();
    let gone = Backend::start(t.lab(), Options::default(), named("gone"));
    let no = Backend::start(t.lab(), Options::default(), refuses(&asked, &is_due));
    let (gone_at, no_at) = (gone.address.to_string(), no.address.to_string());
    drop(gone);
    t.proxy().configure(&format!(
        "{settings}\nroute = [{{ path = '/gone', upstream = '{gone_at}' }}, {{ path = '/no', upstream = '{no_at}' }}]"
    ));
    reload(t.proxy());
    let status = async |c: &mut Peer, request| {
        let response = c.request(request).await;
        c.until_end().await;
        response.code()
    };
    let get = |path| Message::get(path).header("Connection", "close");
    t.client(async |c| assert_eq!(status(c, Message::websocket("/gone")).await, 502));
    t.client(async |c| assert_eq!(status(c, get("/gone")).await, 502));
    let first = t.start_client(async move |c: &mut Peer| {
        assert_eq!(c.request(Message::websocket("/no?secret")).await.code(), 403);
        c.until_end().await
    });
    asked.wait(DEADLINE, |asked| (*asked == 1).then_some(())).expect("the first");
    t.client(async |c| assert_eq!(status(c, Message::websocket("/no")).await, 503));
    is_due.change(|is_due| *is_due = true);
    first.join();

    let names = |message: &'static str, route: &'static str, endpoint: &str| {
        let line = t.proxy().log_where(message, |line| line["message"] == message && line["route"] == route);
        assert_eq!(line["endpoint"], endpoint, "{line}");
        line
    };
    let failed = names("request failed", "/gone", &gone_at);
    let error = failed["error"].as_str().expect("a text");
    assert!(error.contains(&gone_at) && !error.contains("upstream.address"), "{error}");
    assert_eq!(names("the backend refused a handshake", "/no", &no_at)["path"], "/no");
    let turned_away = names("clients are turned away with 503", "/no", &no_at);
    assert_eq!(turned_away["reason"], "queue_timeout");
}

/// Routes are added, led elsewhere and taken away while sessions are open: none of these is cut, and each stays where it is.
#[test]
fn a_reload_of_routes_cuts_nobody() {
    let ways = Ways::start();
    let (step, said) = (Board::new(0), Board::new(0));
    let stays = |path: &'static str, name: &'static str| {
        let (step, said) = (step.clone(), said.clone());
        ways.t.start_client(async move |c: &mut Peer| {
            c.handshake(path).await;
            assert_eq!(c.read_text().await, name);
            said.change(|said| *said += 1);
            for now in 1..=3 {
                step.until(DEADLINE, |step| (*step >= now).then_some(())).await.expect("a reload");
                c.send_text("still here").await;
                assert_eq!(c.read_text().await, "still here");
                said.change(|said| *said += 1);
            }
            c.send_close(1000, "").await;
            c.until_end().await
        })
    };
    let all_said = |count| said.wait(DEADLINE, |said| (*said == count).then_some(())).expect("all sessions");
    let first = stays("/chat", "all");
    all_said(1);
    let chat = format!("{}", ways.chat.address);
    let report = ways.set(&[("/chat", &ways.chat)]);
    assert_eq!(report["applied"], json!([{"key": "route.\"/chat\".upstream", "from": [], "to": chat}]));
    let second = stays("/chat", "chat");
    all_said(2);
    step.change(|step| *step = 1);
    all_said(4);

    let report = ways.set(&[("/chat", &ways.rest)]);
    let rest = format!("{}", ways.rest.address);
    assert_eq!(report["applied"], json!([{"key": "route.\"/chat\".upstream", "from": chat, "to": rest}]));
    assert_eq!(ways.session("/chat").as_deref(), Ok("rest"));
    step.change(|step| *step = 2);
    all_said(6);

    let report = ways.set(&[]);
    assert_eq!(report["applied"], json!([{"key": "route.\"/chat\".upstream", "from": rest, "to": []}]));
    assert_eq!(ways.session("/chat").as_deref(), Ok("all"));
    step.change(|step| *step = 3);
    for client in [first, second] {
        client.join().assert_closed_with(1000);
    }
    ways.t.no_rst();
}

/// Routes that are for some, and for nobody: 403 for the others, sessions and plain requests alike, whatever they say they are and however
/// the path is written; their backend never hears of it. A proxy speaks for others, and where it does not say for whom, nobody may.
#[test]
fn routes_for_some() {
    let trusting = "http.trusted_proxies = ['198.18.0.0/15', '127.0.0.0/8']\n";
    let routes = "route = [\
        { path = '/office/*', allow = ['203.0.113.0/24'], deny = ['203.0.113.66/32'] },\
        { path = '/closed/*', deny = ['0.0.0.0/0', '::/0'] },\
        { path = '/here', allow = ['198.18.0.0/15', '127.0.0.0/8'] }]";
    let ask = |t: &Scene, request: Message| {
        t.client(async |c| {
            let code = c.request(request).await.code();
            if code == 101 {
                c.send_close(1000, "").await;
            }
            c.until_end().await;
            code
        })
    };
    let script = async |c: &mut Peer| {
        let request = c.read_head().await;
        if request.field("Upgrade").is_none() {
            c.reply(Message::status(200, "OK", "all")).await;
            c.fin().await;
            c.until_end().await;
            return;
        }
        c.reply(Message::switching(&request)).await;
        backend::echo_on(c).await;
    };
    for (trusts, rows) in [
        (
            "",
            &[
                ("/office/a", None, false),
                ("/office/a", Some("203.0.113.7"), false),
                ("/closed/a", None, false),
                ("/here", None, true),
                ("/here", Some("unknown"), true),
                ("/", None, true),
            ][..],
        ),
        (
            trusting,
            &[
                ("/office/a", Some("203.0.113.7"), true),
                ("/office/a", Some("203.0.113.66"), false),
                ("/office/a", Some("203.0.113.7, 192.0.2.1"), false),
                ("/office/a", Some("203.0.113.7, unknown"), false),
                ("/office/a", None, false),
                ("/closed/a", Some("203.0.113.7"), false),
                ("/here", None, true),
                ("/here", Some("203.0.113.7"), false),
                ("/here", Some("unknown"), false),
                ("/", Some("unknown"), true),
            ],
        ),
    ] {
        let t = Scene::new(&format!("{trusts}{routes}")).backend(script).start();
        let mut served = 0;
        for (path, chain, may) in rows {
            for request in [Message::websocket(path), Message::get(path).header("Connection", "close")] {
                let is_upgrade = request.field("Upgrade").is_some();
                let request = chain.iter().fold(request, |request, chain| request.header("X-Forwarded-For", chain));
                let expected = match (may, is_upgrade) {
                    (false, _) => 403,
                    (true, true) => 101,
                    (true, false) => 200,
                };
                assert_eq!(ask(&t, request), expected, "{path} {chain:?}");
                served += usize::from(*may);
            }
        }
        for path in ["/x/../closed/a", "/%63losed/a", "//closed/a", "/closed;v=1/a", "/here/../closed/a"] {
            assert_eq!(ask(&t, Message::websocket(path)), 400, "{path}");
        }
        assert_eq!(t.backend().count(), served, "somebody got through");
        let denied = rows.iter().filter(|(.., may)| !may).count();
        let metrics = t.proxy().metrics();
        assert_eq!(metrics.count("tidegate_handshakes_total{result=\"denied\"}"), denied as u64);
        t.proxy().log_where("what to do", |line| line["route"] == "/office/*" && line["fix"].is_string());
        t.no_rst();
    }
}

/// A route has so many sessions and no more, other routes are not concerned; one that ends makes room, and a reload counts those that are
/// there.
#[test]
fn sessions_of_a_route() {
    let settings = |most: u32| format!("reload.watch = '0s'\nroute = [{{ path = '/few', max_sessions = {most} }}]");
    let t = Scene::new(&settings(1)).start();
    let ask = |path: &str| {
        t.client(async |c| {
            let answer = c.request(Message::websocket(path)).await;
            if answer.code() == 101 {
                c.send_close(1000, "").await;
            } else {
                assert_eq!(answer.field("Retry-After"), Some("1"));
            }
            c.until_end().await;
            answer.code()
        })
    };
    let end = Gate::new("others have tried");
    thread::scope(|scope| {
        let (t, connected) = (&t, Gate::new("it has its session"));
        let (at, until) = (connected.clone(), end.clone());
        let held = scope.spawn(move || {
            t.client(async move |c| {
                c.handshake("/few").await;
                at.open();
                until.passed().await;
                c.send_close(1000, "").await;
                c.until_end().await.assert_closed_with(1000);
            });
        });
        connected.pass();
        assert_eq!([ask("/few"), ask("/few"), ask("/")], [503, 503, 101]);
        t.proxy().configure(&settings(2));
        reload(t.proxy());
        assert_eq!(ask("/few"), 101);
        t.proxy().configure(&settings(1));
        reload(t.proxy());
        assert_eq!(ask("/few"), 503);
        end.open();
        held.join().expect("no panic");
    });
    t.proxy().metrics_when("that nobody is there", |metrics| metrics.sum("tidegate_client_connections") < 0.5);
    assert_eq!(ask("/few"), 101);
    let metrics = t.proxy().metrics();
    assert!((metrics.sum_with("tidegate_refused_total", "reason=\"route_sessions\"") - 3.0).abs() < 0.5);
    t.no_rst();
}
