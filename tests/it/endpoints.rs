//! Several endpoints of one backend: who gets which sessions, and what becomes of them when one dies, and comes back.

use crate::harness::{
    Board, DEADLINE, End, Frame, Message,
    crowd::{self, EchoProcess, Front, Member, Stage, tally},
    tls::{self, Authority, Manners, NAME, TlsFront},
    visit::{Errand, Outcome, arrive, assert_served, echo, leave, visit},
    ws::CLOSE,
};
use futures_util::future::join_all;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use rustix::process::Signal;
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    net::SocketAddr,
    path::Path,
    time::Instant,
};

const ENDPOINTS: usize = 3;

/// A stage with three endpoints, and tidegate before them.
fn settings(endpoints: &[EchoProcess], more: &str) -> String {
    let addresses: Vec<_> = endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
    format!("upstream.address = {addresses:?}\nupstream.eject_time = '200ms'\n{more}")
}

/// So many sessions, opened at once: none fails.
async fn open(t: &Front<'_>, count: usize) -> Vec<Member> {
    let arrivals = join_all((0..count).map(|_| arrive(t.address, DEADLINE))).await;
    arrivals.into_iter().map(|arrival| arrival.result.expect("a session")).collect()
}

/// The endpoint of each session that was opened so far, by its client, as the log says it.
fn opened(t: &Front<'_>, at_least: usize) -> HashMap<SocketAddr, SocketAddr> {
    let begun = Instant::now();
    loop {
        let lines: Vec<_> = t.log().into_iter().filter(|line| line["message"] == "open").collect();
        let count = lines.len();
        let address = |text: &serde_json::Value| text.as_str().and_then(|text| text.parse().ok());
        // A client may have the port of one that has gone.
        let all = lines
            .iter()
            .map(|line| (address(&line["client"]).expect("one"), address(&line["endpoint"]).expect("one")))
            .collect();
        if count >= at_least {
            return all;
        }
        assert!(begun.elapsed() < DEADLINE, "{count} of {at_least} sessions were logged");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

fn shares<'a>(
    members: impl IntoIterator<Item = &'a Member>,
    opened: &HashMap<SocketAddr, SocketAddr>,
) -> BTreeMap<SocketAddr, usize> {
    tally(members.into_iter().map(|member| opened[&member.local()]))
}

/// An endpoint is killed: its sessions get 1012, and nobody else notices; who comes then goes elsewhere. When it is there again it
/// gets sessions again.
#[test]
fn an_endpoint_dies_and_comes_back() {
    let stage = Stage::new();
    let mut endpoints: Vec<_> = (0..ENDPOINTS).map(|_| stage.echo_process()).collect();
    let t = stage.tidegate(&settings(&endpoints, ""), endpoints[0].address);
    let dead = endpoints[1].address;
    stage.clients(async || {
        let members = open(&t, 60).await;
        let placed = opened(&t, 60);
        let before = shares(&members, &placed);
        assert_eq!(before.len(), ENDPOINTS, "{before:?}");
        endpoints[1].kill();
        // At once, and while its sessions are being closed.
        let others = open(&t, 100).await;
        let (lost, kept): (Vec<_>, Vec<_>) = members.into_iter().partition(|member| placed[&member.local()] == dead);
        assert_eq!(lost.len(), before[&dead]);
        for mut member in lost {
            let close = member.frame().await.expect("a Close");
            assert_eq!((close.opcode, close.code()), (CLOSE, 1012));
            let _ = member.send(&Frame::new(CLOSE, &close.payload[..2])).await;
            assert_eq!(member.rest().await.end, End::Fin);
        }
        let placed = opened(&t, 160);
        let after = shares(&others, &placed);
        assert!(!after.contains_key(&dead), "{after:?}");
        let status: serde_json::Value = serde_json::from_slice(&t.get("/status").body).expect("JSON");
        let listed = status["endpoints"].as_array().expect("a list");
        assert_eq!((listed.len(), status["more_endpoints"].as_u64()), (ENDPOINTS, Some(0)), "{status}");
        assert_eq!((&listed[0]["address"], &listed[0]["state"]), (&dead.to_string().into(), &"ejected".into()));
        for well in &listed[1..] {
            let address: SocketAddr = well["address"].as_str().and_then(|text| text.parse().ok()).expect("an address");
            let sessions = shares(kept.iter().chain(&others), &placed)[&address];
            assert_eq!((&well["state"], &well["sessions"]), (&"active".into(), &sessions.into()), "{status}");
        }
        for mut member in kept.into_iter().chain(others) {
            assert_eq!(echo(&mut member, "a").await, Ok(()));
            assert_eq!(leave(member).await, Outcome::Served);
        }
        let metrics = t.metrics();
        assert_eq!(metrics.count("tidegate_upstream_ejections_total"), 1);
        assert_eq!(metrics.count("tidegate_upstream_endpoints{state=\"ejected\"}"), 1);
        assert_eq!(metrics.count("tidegate_upstream_endpoints{state=\"active\"}"), 2);
        assert!(metrics.count("tidegate_upstream_retries_total") >= 2);
        assert_eq!(t.get("/readyz").code(), 200);

        endpoints[1].again(&stage);
        let begun = Instant::now();
        while t.metrics().count("tidegate_upstream_endpoints{state=\"ejected\"}") > 0 {
            assert!(begun.elapsed() < DEADLINE, "it does not come back");
            // It is looked for while clients come.
            assert_served(&[visit(t.address, Errand::Echo).await], 1);
        }
        let seen = opened(&t, 160).len();
        let members = open(&t, 30).await;
        let shares = shares(&members, &opened(&t, seen + 30));
        assert!(shares.get(&dead).is_some_and(|count| *count > 0), "{shares:?}");
        for member in members {
            assert_eq!(leave(member).await, Outcome::Served);
        }
    });
    t.log_where("the endpoint's end", |line| line["level"] == "WARN" && line["endpoint"] == dead.to_string().as_str());
    let failed = t.metrics().sum("tidegate_handshakes_total")
        - t.metrics().sum_with("tidegate_handshakes_total", "result=\"accepted\"");
    assert!(failed.abs() < 0.5, "{:?}", t.metrics());
}

/// Sessions, not handshakes, are spread: after hundreds have come and gone, in any order, each endpoint has its share of those that
/// are there.
#[test]
fn each_endpoint_has_its_share_under_churn() {
    let stage = Stage::new();
    let endpoints: Vec<_> = (0..ENDPOINTS).map(|_| stage.echo_process()).collect();
    let t = stage.tidegate(&settings(&endpoints, ""), endpoints[0].address);
    stage.clients(async || {
        let mut random = StdRng::seed_from_u64(5);
        let mut members = Vec::new();
        for round in 1..=6 {
            members.extend(open(&t, 150).await);
            let placed = opened(&t, 150 * round);
            let shares = shares(&members, &placed);
            let even = members.len() / ENDPOINTS;
            assert!(
                shares.len() == ENDPOINTS && shares.values().all(|share| share.abs_diff(even) <= even / 5),
                "{shares:?} after round {round}"
            );
            // Half of them leave, more of the first endpoint's than of the others'.
            let first = endpoints[0].address;
            let leaves = |member: &Member, random: &mut StdRng| {
                random.random_bool(if placed[&member.local()] == first { 0.8 } else { 0.4 })
            };
            let (gone, left): (Vec<_>, Vec<_>) = members.into_iter().partition(|member| leaves(member, &mut random));
            members = left;
            for outcome in join_all(gone.into_iter().map(leave)).await {
                assert_eq!(outcome, Outcome::Served);
            }
        }
        for outcome in join_all(members.into_iter().map(leave)).await {
            assert_eq!(outcome, Outcome::Served);
        }
    });
    t.assert_sent_no_rst();
}

/// When nobody is there, clients are told so, readiness too; and one of them is enough to be served.
#[test]
fn one_of_them_is_enough() {
    let stage = Stage::new();
    let mut endpoints: Vec<_> = (0..ENDPOINTS).map(|_| stage.echo_process()).collect();
    let t = stage.tidegate(&settings(&endpoints, ""), endpoints[0].address);
    for endpoint in &mut endpoints {
        endpoint.kill();
    }
    stage.clients(async || {
        let visits = join_all((0..20).map(|_| visit(t.address, Errand::Echo))).await;
        assert!(visits.iter().all(|visit| visit.outcome == Outcome::Status(502)), "{visits:?}");
        assert_eq!(t.get("/readyz").code(), 503);
        assert_eq!(t.metrics().count("tidegate_upstream_endpoints{state=\"ejected\"}"), 3);
        endpoints[2].again(&stage);
        // All are left alone: whoever comes tries them all the same.
        assert_served(&[visit(t.address, Errand::Echo).await], 1);
        assert_eq!(t.metrics().count("tidegate_upstream_endpoints{state=\"active\"}"), 1);
    });
    t.assert_sent_no_rst();
}

/// Endpoints are looked at while clients come: by a connection that asks nothing, and ends in order.
#[test]
fn a_look_at_an_endpoint_is_a_fin_and_no_byte() {
    let (stage, looks) = (Stage::new(), Board::new(Vec::new()));
    let backends = [(); 2].map(|()| {
        let looks = looks.clone();
        stage.backend(async move |mut member: Member| match member.message().await {
            Ok(request) => {
                let _ = member.send_bytes(&Message::switching(&request).bytes()).await;
                crowd::echo_on(member).await;
            }
            Err(end) => {
                member.fin_and_rest().await;
                looks.change(|looks| looks.push(end));
            }
        })
    });
    let addresses = backends.each_ref().map(|backend| backend.address.to_string());
    let settings = format!("upstream.address = {addresses:?}\nupstream.health_interval = '100ms'");
    let t = stage.tidegate(&settings, backends[0].address);
    stage.clients(async || {
        // The first client finds that nobody was looked at yet.
        assert_served(&[visit(t.address, Errand::Echo).await], 1);
    });
    let looks = looks.wait(DEADLINE, |looks| (looks.len() == 2).then(|| looks.clone()));
    assert_eq!(looks, Some(vec![End::Fin, End::Fin]));
    t.assert_nothing_left();
    t.assert_no_rst();
}

/// TLS in front of a backend. Each has an authority of its own: one is believed, and the others are not.
fn tls_front(stage: &Stage, backend: SocketAddr) -> TlsFront {
    TlsFront::start(stage.lab(), Manners { protocols: vec![b"http/1.1".to_vec()], ..Manners::default() }, backend)
}

/// An endpoint that is there, but with which TLS does not come about, is one that takes no connections: the client is served
/// elsewhere, and soon nobody is sent there.
#[test]
fn without_tls_another_endpoint_is_tried() {
    #[derive(Clone, Copy, Debug)]
    enum Way {
        Unbelieved,
        HangsUp,
        Silent,
    }
    for mode in ["dedicated", "multiplexed"] {
        for way in [Way::Unbelieved, Way::HangsUp, Way::Silent] {
            let stage = Stage::new();
            let backend = stage.backend(crowd::anything);
            let [good, front] = [(); 2].map(|()| tls_front(&stage, backend.address));
            let other = stage.backend(async move |mut member: Member| {
                if let Way::HangsUp = way {
                    member.fin().await;
                }
                // No request comes, and nothing is said to what does.
                let _ = member.message().await;
                member.fin().await;
            });
            let bad = if let Way::Unbelieved = way { front.address } else { other.address };
            let addresses = [good.address, bad].map(|address| address.to_string());
            let settings = format!(
                "upstream.address = {addresses:?}\nupstream.eject_time = '1h'\nupstream.connect_timeout = '6s'\n\
                 listen.workers = 1\npool.mode = '{mode}'\n{}",
                good.settings()
            );
            let t = stage.tidegate(&settings, good.address);
            stage.clients(async || {
                for _ in 0..2 {
                    let visits = join_all((0..10).map(|_| visit(t.address, Errand::Echo))).await;
                    assert_served(&visits, 10);
                }
                let visits = join_all((0..10).map(|_| visit(t.address, Errand::Get))).await;
                assert_served(&visits, 10);
            });
            let metrics = t.metrics();
            assert_eq!(metrics.count("tidegate_upstream_ejections_total"), 1, "{mode} {way:?}");
            assert!(metrics.count("tidegate_upstream_retries_total") >= 1, "{mode} {way:?}");
            let line = t.log_where("the endpoint's end", |line| line["endpoint"] == addresses[1].as_str());
            let error = line["error"].as_str().expect("an error");
            let (words, fix) = match way {
                Way::Unbelieved => ("UnknownIssuer", "upstream.tls_ca"),
                Way::HangsUp => ("closed the connection in the handshake", "does it speak TLS there?"),
                Way::Silent => ("did not finish the TLS handshake in time", ""),
            };
            assert!(error.contains(words) && error.contains(fix), "{mode} {way:?}: {error}");
            t.assert_nothing_left();
            t.assert_no_rst();
        }
    }
}

/// An endpoint that was left alone for its certificate is so until that is believed: a connection without TLS is no sign of it.
#[test]
fn an_endpoint_is_looked_at_with_its_tls() {
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let [good, bad] = [(); 2].map(|()| tls_front(&stage, backend.address));
    let addresses = [good.address, bad.address].map(|address| address.to_string());
    let settings = |ca: &Path| {
        format!(
            "upstream.address = {addresses:?}\nupstream.eject_time = '100ms'\nreload.watch = '0s'\n\
             upstream.tls = true\nupstream.tls_ca = '{}'\nupstream.tls_server_name = '{NAME}'",
            ca.display()
        )
    };
    let t = stage.tidegate(&settings(&good.authority().file()), good.address);
    let visits_until = |what: &str, is_so: &dyn Fn() -> bool| {
        let begun = Instant::now();
        while !is_so() {
            assert!(begun.elapsed() < DEADLINE, "never {what}");
            // It is looked at while clients come.
            stage.clients(async || assert_served(&[visit(t.address, Errand::Echo).await], 1));
        }
    };
    let ejections = || t.metrics().count("tidegate_upstream_ejections_total");
    visits_until("left alone", &|| ejections() == 1);
    let looks = bad.seen().failed.len() + 3;
    visits_until("looked at", &|| bad.seen().failed.len() >= looks);
    // Nobody was sent there meanwhile, who would have found out a second time.
    assert_eq!(ejections(), 1);
    let believed = good.authority().folder().join("both.pem");
    let [own, others] = [good.authority().file(), bad.authority().file()].map(|file| fs::read(file).expect("PEM"));
    fs::write(&believed, [own, others].concat()).expect("room for certificates");
    t.configure(&settings(&believed));
    t.signal(Signal::HUP);
    t.log_where("the reload", |line| line["message"] == "reloaded");
    visits_until("back", &|| t.metrics().count("tidegate_upstream_endpoints{state=\"active\"}") == 2);
    visits_until("used", &|| !bad.seen().protocols.is_empty());
    t.assert_nothing_left();
    t.assert_no_rst();
}

/// A certificate that is wrong everywhere is a mistake to be seen: each is asked once for a client, that gets 502, and the log says
/// what is wrong, and what to do.
#[test]
fn what_is_wrong_everywhere_is_said() {
    let stage = Stage::new();
    let backend = stage.backend(crowd::anything);
    let fronts = [(); ENDPOINTS].map(|()| tls_front(&stage, backend.address));
    let believed = Authority::new();
    let addresses = fronts.each_ref().map(|front| front.address.to_string());
    let settings =
        format!("upstream.address = {addresses:?}\nupstream.eject_time = '1h'\n{}", tls::settings(&believed));
    let t = stage.tidegate(&settings, fronts[0].address);
    for count in 1..=4 {
        let visited = stage.clients(async || visit(t.address, Errand::Echo).await);
        assert_eq!(visited.outcome, Outcome::Status(502));
        for front in &fronts {
            front.seen_when("its failure", |seen| seen.failed.len() >= count);
        }
        assert_eq!(fronts.each_ref().map(|front| front.seen().failed.len()), [count; ENDPOINTS]);
    }
    let line = t.log_where("the failure", |line| line["message"] == "request failed");
    let error = line["error"].as_str().expect("an error");
    assert!(error.contains("UnknownIssuer") && error.contains("upstream.tls_ca"), "{error}");
    let ready = t.get("/readyz");
    assert_eq!(ready.code(), 503);
    assert!(ready.text().contains("UnknownIssuer"), "{}", ready.text());
    t.assert_nothing_left();
    t.assert_no_rst();
}
