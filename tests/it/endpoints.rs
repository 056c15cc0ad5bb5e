//! Several endpoints of one backend: who gets which sessions, and what becomes of them when one dies, and comes back.

use crate::harness::{
    Board, DEADLINE, End, Frame, Message,
    crowd::{self, EchoProcess, Front, Member, Stage, tally},
    visit::{Errand, Outcome, arrive, assert_served, echo, leave, visit},
    ws::CLOSE,
};
use futures_util::future::join_all;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
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
        let lines = t.log().into_iter().filter(|line| line["message"] == "open");
        let address = |text: &serde_json::Value| text.as_str().and_then(|text| text.parse().ok());
        let all: HashMap<_, _> = lines
            .map(|line| (address(&line["client"]).expect("one"), address(&line["endpoint"]).expect("one")))
            .collect();
        if all.len() >= at_least {
            return all;
        }
        assert!(begun.elapsed() < DEADLINE, "{} of {at_least} sessions were logged", all.len());
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
