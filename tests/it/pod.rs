//! What becomes of clients when their Pod is deleted, or its backend restarted, with the manifests as they are shipped: parsed, and
//! done as the kubelet does it ([`kubelet`](crate::harness::kubelet)).

use crate::harness::{
    Board, DEADLINE, Lab, Side, block,
    crowd::{self, Rest, connect, tally},
    kubelet::{Manifest, Pod},
    talk::{Account, Talk, assert_only_crossed, talk},
};
use futures_util::future::join_all;
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};
use tokio::time::{Instant as TokioInstant, interval_at};

const PACE: Duration = Duration::from_millis(500);

/// So many clients that talk until they get a Close, on a thread of their own; `begun` counts those that were answered.
async fn talkers(address: SocketAddr, count: u32, begun: &Board<u32>) -> Vec<Talk> {
    let clients = connect(address, count as usize).await;
    let start = TokioInstant::now();
    let has_begun = || begun.change(|begun| *begun += 1);
    let talking = clients.into_iter().zip(0_u32..).map(|(client, index)| {
        // Evenly spread over the pace, so that they do not speak in unison.
        talk(client, interval_at(start + PACE * index / count, PACE), 2, has_begun)
    });
    join_all(talking).await
}

/// Sessions that talk, in a Pod that is deleted; what the hooks are for is in `order`, the order in which the kubelet does things.
fn deleted(manifest: &str, order: &[&str]) {
    const SESSIONS: u32 = 500;
    const LATE: u32 = 20;
    crowd::raise_descriptor_limit();
    let lab = Lab::new();
    let manifest = Manifest::rendered(manifest);
    let grace = manifest.grace;
    let pod = Pod::start(&lab, manifest);
    pod.becomes_ready();

    let begun = Board::new(0);
    let (talks, deleted_at) = thread::scope(|scope| {
        let clients = |count| {
            let (place, address, begun) = (lab.place(Side::Client), pod.address, &begun);
            scope.spawn(move || place.run(|| block(talkers(address, count, begun))))
        };
        let early = clients(SESSIONS);
        let all_begun = |count: u32| begun.wait(DEADLINE, |begun| (*begun == count).then_some(()));
        assert!(all_begun(SESSIONS).is_some(), "{begun:?} of {SESSIONS} have begun");
        let deleted_at = Instant::now();
        let deletion = scope.spawn(|| pod.delete());
        // Not everybody knows at once that the Pod is going: who comes in drain.delay is served like all others.
        pod.tidegate()
            .log_where("that it drains", |line| line["message"].as_str().is_some_and(|m| m.contains("drain")));
        let late = clients(LATE);
        assert!(all_begun(SESSIONS + LATE).is_some(), "{begun:?} have begun, of which {SESSIONS} before");
        let mut talks = early.join().expect("clients");
        talks.extend(late.join().expect("clients"));
        deletion.join().expect("a kubelet");
        (talks, deleted_at)
    });

    let ends = tally(talks.iter().map(|talk| talk.rest.summary()));
    assert_eq!(ends, BTreeMap::from([("Close 1001, Fin".to_owned(), (SESSIONS + LATE) as usize)]));
    let Account { sent, echoed, crossed } = assert_only_crossed(&pod.tidegate(), &talks);
    let backend_sigterm = pod.when("echo: SIGTERM", Duration::ZERO);
    let last = talks.iter().map(|talk: &Talk| talk.rest.ended_at).max().expect("clients");
    assert!(last < backend_sigterm, "a client was served {:?} after the backend's SIGTERM", last - backend_sigterm);
    let events = pod.events();
    let mut rest = events.iter();
    for event in order {
        assert!(rest.any(|found| found.starts_with(event)), "not in this order: {event}; but {events:#?}");
    }
    assert!(!events.iter().any(|event| event.ends_with("SIGKILL")), "{events:#?}");
    assert_eq!(pod.tidegate().exit_status().and_then(|status| status.code()), Some(0));
    let took = deleted_at.elapsed();
    assert!(took < grace, "{took:?} of {grace:?}");
    pod.assert_no_rst();
    println!(
        "{SESSIONS} sessions and {LATE} that came in the delay: all 1001 and FIN, the last {:.1?} before the backend's SIGTERM; {sent} \
         messages sent, {echoed} answered, {crossed} crossed the Close, 0 lost; all over {took:.1?} after the deletion, of {grace:?}",
        backend_sigterm - last,
    );
}

/// The sidecar's own hook begins the drain; that of the backend keeps it until all is over.
#[test]
fn a_pod_with_a_sidecar_is_deleted() {
    deleted(
        "demo.yaml",
        &[
            "tidegate: started",
            "tidegate: startup probe passed",
            "echo: started",
            "tidegate: hook ends: 0",
            "echo: hook ends",
            "echo: SIGTERM",
            "echo: exited",
            "tidegate: SIGTERM",
            "tidegate: exited",
        ],
    );
}

/// Without native sidecars SIGTERM itself begins the drain.
#[test]
fn a_pod_with_plain_containers_is_deleted() {
    deleted("plain-container.yaml", &["tidegate: SIGTERM", "echo: hook ends", "echo: SIGTERM", "echo: exited"]);
}

/// The backend alone is restarted, hook and all: its clients are told so, tidegate stays and does not drain, and all goes on.
#[test]
fn a_backend_is_restarted_by_its_liveness_probe() {
    const SESSIONS: u32 = 100;
    crowd::raise_descriptor_limit();
    let lab = Lab::new();
    let pod = Pod::start(&lab, Manifest::rendered("demo.yaml"));
    pod.becomes_ready();
    let pid = pod.tidegate().pid();

    let rests: Vec<Rest> = thread::scope(|scope| {
        let connected = Board::new(false);
        let (place, address) = (lab.place(Side::Client), pod.address);
        let has_connected = connected.clone();
        let clients = scope.spawn(move || {
            place.run(|| {
                block(async {
                    let clients = connect(address, SESSIONS as usize).await;
                    has_connected.change(|connected| *connected = true);
                    crowd::together(clients, async |mut client| client.rest().await).await
                })
            })
        });
        assert!(connected.wait(DEADLINE, |connected| connected.then_some(())).is_some(), "nobody connects");
        pod.liveness_fails("echo");
        clients.join().expect("clients")
    });
    let ends = tally(rests.iter().map(Rest::summary));
    assert_eq!(ends, BTreeMap::from([("Close 1012, Fin".to_owned(), SESSIONS as usize)]));
    let tidegate = pod.tidegate();
    assert_eq!((tidegate.exit_status(), tidegate.pid()), (None, pid), "it is no affair of the sidecar's");
    assert!(tidegate.metrics().get("tidegate_drain_state").abs() < 0.5, "it drains");
    pod.becomes_ready();
    let (place, address) = (lab.place(Side::Client), pod.address);
    place.run(|| {
        block(async {
            let clients = connect(address, SESSIONS as usize).await;
            let rests = crowd::together(clients, async |mut client| {
                client.send(&crate::harness::Frame::close(1000, "")).await.expect("an open session");
                client.rest().await
            })
            .await;
            let ends = tally(rests.iter().map(Rest::summary));
            assert_eq!(ends, BTreeMap::from([("Close 1000, Fin".to_owned(), SESSIONS as usize)]));
        });
    });
}
