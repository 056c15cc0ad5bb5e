//! What holds for one session holds for a thousand at the same moment: counted, to the last one.
//!
//! Each test prints its figures (`cargo test --test it crowd -- --nocapture`). No speed is asserted, except where
//! `TIDEGATE_STRICT=1` asks for it: on a release build with the machine to itself.

use crate::harness::{
    Board, DEADLINE, End, Frame,
    crowd::{self, Member, Rest, Stage, connect, is_strict, tally, together},
    talk::{Account, assert_only_crossed, talk},
    ws::{CLOSE, TEXT},
};
use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    io,
    time::{Duration, Instant},
};
use tokio::time::{interval, sleep, timeout};

/// One message, and its echo: from then on the session is known to be relayed.
async fn exchange(member: &mut Member, text: &str) {
    member.send(&Frame::text(text)).await.expect("an open session");
    let echo = member.frame().await.expect("an echo");
    assert_eq!((echo.opcode, echo.text().as_str()), (TEXT, text));
}

/// Every one of them went like this.
#[track_caller]
fn assert_all(summaries: impl IntoIterator<Item = String>, expected: &str, count: usize) {
    assert_eq!(tally(summaries), BTreeMap::from([(expected.to_owned(), count)]));
}

/// The backend's process is killed under 1,000 sessions: each client gets Close 1012 and FIN.
#[test]
fn a_killed_backend_is_a_close_1012_for_each_of_1000() {
    const COUNT: usize = 1000;
    let stage = Stage::new();
    let mut backend = stage.echo_process();
    let t = stage.tidegate("", backend.address);
    let (killed_at, seen) = stage.clients(async || {
        let mut clients = connect(t.address, COUNT).await;
        for client in &mut clients {
            exchange(client, "a").await;
        }
        let killed_at = Instant::now();
        backend.kill();
        (killed_at, together(clients, async |mut client| client.rest().await).await)
    });
    assert_all(seen.iter().map(Rest::summary), "Close 1012, Fin", COUNT);
    let last_close = seen.iter().filter_map(|rest| rest.closed_at).max().expect("there were clients") - killed_at;
    let last_fin = seen.iter().map(|rest| rest.ended_at).max().expect("there were clients") - killed_at;
    println!(
        "{COUNT} clients of a killed backend: the last Close 1012 after {last_close:.1?}, the last FIN after {last_fin:.1?}"
    );
    if is_strict() {
        assert!(last_fin <= Duration::from_millis(200), "the last FIN came after {last_fin:?}");
    }
    t.assert_nothing_left();
    t.assert_sent_no_rst();
}

/// SIGTERM while 1,000 clients talk: each gets Close 1001 and FIN, and an answer to all that was passed on to the backend. What
/// is left without an answer has crossed the Close on the wire, was not passed on, and is counted: to each client its own number.
#[test]
fn a_drain_answers_all_that_it_has_forwarded() {
    const COUNT: usize = 1000;
    let stage = Stage::new();
    let backend = stage.backend(crowd::echo);
    // A backend on a slow machine is waited for, so that only what tidegate does can be at fault.
    let settings = "drain = { delay = '0s', window = '1s' }\nclose.handshake_timeout = '10s'";
    let t = stage.tidegate(settings, backend.address);
    let begun = Board::new(0);
    let (took, talks) = stage.clients(async || {
        let clients = connect(t.address, COUNT).await;
        let paces = Cell::new(100);
        let talking = together(clients, async |client| {
            // From 100 to 200 ms, so that they do not speak in unison.
            let pace = paces.get();
            paces.set(if pace == 200 { 100 } else { pace + 1 });
            talk(client, interval(Duration::from_millis(pace)), 1, || begun.change(|begun| *begun += 1)).await
        });
        let terminating = async {
            let all = begun.until(DEADLINE, |begun| (*begun == COUNT).then_some(())).await;
            assert!(all.is_some(), "{begun:?} of {COUNT} sessions have begun");
            t.sigterm();
            Instant::now()
        };
        let (talks, terminated_at) = tokio::join!(talking, terminating);
        (terminated_at.elapsed(), talks)
    });
    assert_eq!(t.wait_exit(DEADLINE).code(), Some(0));
    assert_all(talks.iter().map(|talk| talk.rest.summary()), "Close 1001, Fin", COUNT);

    let Account { sent, echoed, crossed } = assert_only_crossed(&t, &talks);
    println!(
        "{COUNT} talking clients, drained in {took:.1?}: {sent} messages sent, {echoed} answered, {crossed} crossed the Close"
    );
    assert_eq!(backend.results(COUNT).len(), COUNT);
    t.assert_no_rst();
}

/// What a backend wants of the end of a session, for which the client will not wait.
#[derive(Debug)]
struct Audit {
    /// "", or what went wrong.
    fault: String,
    /// The client's Close.
    close: Option<(u16, String)>,
}

/// Sends `count` frames from the client's word on, one in each `pace`, then reads the Close, answers it and ends first.
async fn audit(mut member: Member, count: usize, pace: Duration) -> Audit {
    member.handshake().await;
    let mut close = None;
    let ended = async {
        let go = member.frame().await.map_err(|end| format!("{end:?} instead of a word"))?;
        assert_eq!(go.text(), "go");
        for _ in 0..count {
            let sent = member.send(&Frame::text("one more row of the result")).await;
            sent.map_err(|error: io::Error| format!("write: {:?}", error.kind()))?;
            sleep(pace).await;
        }
        let frame = member.frame().await.map_err(|end| format!("{end:?} instead of a Close"))?;
        assert_eq!(frame.opcode, CLOSE, "{frame:?}");
        close = Some((frame.code(), frame.text()));
        // Verbatim, down to the mask.
        assert_eq!(frame.mask, Some([1, 2, 3, 4]), "{frame:?}");
        let sent = member.send(&Frame::new(CLOSE, &frame.payload[..2])).await;
        sent.map_err(|error| format!("write of the Close: {:?}", error.kind()))?;
        match member.fin_and_rest().await {
            Rest { messages: 0, end: End::Fin, is_ragged: false, .. } => Ok(()),
            rest => Err(format!("after both Closes: {}", rest.summary())),
        }
    };
    let fault = ended.await.err().unwrap_or_default();
    Audit { fault, close }
}

/// Word and Close in one, and away: what comes then is answered by the kernel, with RST.
async fn leave_at_once(address: std::net::SocketAddr, count: usize) {
    let clients = connect(address, count).await;
    let index = Cell::new(0);
    together(clients, async |mut client| {
        let close = Frame::close(4000, &format!("client {}", index.replace(index.get() + 1)));
        let bytes = [client.bytes_of(&Frame::text("go")), client.bytes_of(&close)].concat();
        client.send_bytes(&bytes).await.expect("an open session");
    })
    .await;
}

/// 2,000 clients send Close and close their sockets while the backend goes on sending, within `close.delay` and far beyond it:
/// no write of the backend fails, it gets each client's own Close, and a FIN. tidegate's kernel resets nobody.
#[test]
fn close_audit() {
    const COUNT: usize = 2000;
    for (frames, pace) in [(3, Duration::from_millis(10)), (5, Duration::from_millis(300))] {
        let stage = Stage::new();
        let backend = stage.backend(async move |member| audit(member, frames, pace).await);
        let t = stage.tidegate("", backend.address);
        let begun = Instant::now();
        stage.clients(async || leave_at_once(t.address, COUNT).await);
        let audits = backend.results(COUNT);
        assert_eq!(tally(audits.iter().map(|audit| audit.fault.as_str())), BTreeMap::from([("", COUNT)]));
        let closes: BTreeSet<_> = audits.into_iter().filter_map(|audit| audit.close).collect();
        let expected = (0..COUNT).map(|index| (4000, format!("client {index}"))).collect();
        assert_eq!(closes, expected);
        t.assert_nothing_left();
        t.assert_sent_no_rst();
        println!(
            "close audit, {frames} frames in {:?} each: {COUNT} clean ends at the backend, in {:.1?}; {:?}",
            pace,
            begun.elapsed(),
            t.counters(),
        );
    }
}

/// The audit finds what it looks for: the same clients without a proxy fail the same backend's writes.
#[test]
fn close_audit_without_a_proxy() {
    const COUNT: usize = 50;
    let stage = Stage::new();
    let backend = stage.backend(async |member| audit(member, 3, Duration::from_millis(10)).await);
    stage.clients(async || leave_at_once(backend.address, COUNT).await);
    let faults = tally(backend.results(COUNT).into_iter().map(|audit| audit.fault));
    println!("close audit without a proxy: {faults:?}");
    assert_eq!(faults.get(""), None, "clean ends: {faults:?}");
}

/// Upload and download stand, both full to the brim; then the backend ends with Close and FIN, and never reads a byte. A client
/// that only now begins to read gets all of the 2 MiB, the Close and a FIN; also one that answers the Close only behind the rest
/// of its upload, long after that FIN.
#[test]
fn a_full_download_arrives_while_the_upload_stands() {
    const DOWNLOAD: usize = 2 << 20;
    const UPLOAD: usize = 8 << 20;
    for is_late in [false, true] {
        let (stage, stands, has_read) = (Stage::new(), Board::new(false), Board::new(false));
        let backend = {
            let (stands, has_read) = (stands.clone(), has_read.clone());
            stage.backend(async move |mut member: Member| {
                member.handshake().await;
                stands.until(DEADLINE, |stands| stands.then_some(())).await.expect("an upload that stands");
                let frame = member.bytes_of(&Frame::binary(vec![b'x'; DOWNLOAD / 32]));
                let sent = async {
                    for _ in 0..32 {
                        member.send_bytes(&frame).await?;
                    }
                    member.send(&Frame::close(1000, "that was all")).await
                };
                let sent = sent.await.map_err(|error| error.kind());
                member.fin().await;
                // Held, and not read.
                has_read.until(DEADLINE, |has_read| has_read.then_some(())).await.expect("a client that reads");
                sent
            })
        };
        // For an answer that a late client does not give in time.
        let t = stage.tidegate("close.handshake_timeout = '500ms'", backend.address);
        let (uploaded, downloaded, code, end) = stage.clients(async || {
            let mut client = connect(t.address, 1).await.pop().expect("there is one");
            let upload = client.bytes_of(&Frame::binary(vec![b'y'; 16 << 10])).repeat(UPLOAD / (16 << 10));
            let mut uploaded = 0;
            while uploaded < upload.len()
                && let Ok(taken) = timeout(Duration::from_millis(500), client.send_some(&upload[uploaded..])).await
            {
                uploaded += taken.expect("an open session");
            }
            stands.change(|stands| *stands = true);
            let mut downloaded = 0;
            let close = loop {
                match client.frame().await.expect("a download and a Close") {
                    frame if frame.opcode == CLOSE => break frame,
                    frame => downloaded += frame.payload.len(),
                }
            };
            if is_late {
                let fin = timeout(DEADLINE, client.frame()).await;
                assert!(matches!(fin, Ok(Err(End::Fin))), "{fin:?} instead of a FIN");
            }
            // The rest of its upload comes first: it is inside a frame.
            client.send_bytes(&upload[uploaded..]).await.expect("somebody who takes it");
            client.send(&Frame::new(CLOSE, &close.payload)).await.expect("somebody who takes it");
            let rest = client.fin_and_rest().await;
            has_read.change(|has_read| *has_read = true);
            (uploaded, downloaded, close.code(), rest.summary())
        });
        let answered = if is_late { "after the FIN" } else { "before the FIN" };
        println!(
            "{uploaded} bytes of upload stood; {downloaded} of download arrived, then Close {code}, answered {answered}: {end}"
        );
        assert!(uploaded < UPLOAD, "all of the upload went somewhere");
        assert_eq!((downloaded, code, end.as_str()), (DOWNLOAD, 1000, "Fin"));
        assert_eq!(backend.results(1), [Ok(())]);
        t.assert_nothing_left();
        t.assert_sent_no_rst();
    }
}

/// 1,000 sessions that end in every way there is leave nothing behind: no gauge, no descriptor.
#[test]
fn nothing_is_left_of_1000_sessions() {
    const COUNT: usize = 1000;
    const CLIENT: [&str; 6] = ["close", "close and leave", "fin", "rst", "nothing", "silence"];
    const BACKEND: [&str; 5] = ["echo", "fin", "rst", "close", "close and fin"];
    let stage = Stage::new();
    let backend = stage.backend(async |mut member: Member| {
        member.handshake().await;
        let Ok(way) = member.frame().await else { return };
        match way.text().as_str() {
            "fin" => _ = member.fin_and_rest().await,
            "rst" => member.rst(),
            "close" => {
                let _ = member.send(&Frame::close(1000, "")).await;
                let _ = member.frame().await;
                member.fin_and_rest().await;
            }
            "close and fin" => {
                let _ = member.send(&Frame::close(1000, "")).await;
                member.fin_and_rest().await;
            }
            _ => {
                let _ = member.send(&way.again()).await;
                crowd::echo_on(member).await;
            }
        }
    });
    let settings = "close = { delay = '50ms', handshake_timeout = '500ms' }";
    let t = stage.tidegate(settings, backend.address);
    let ways = stage.clients(async || {
        let clients = connect(t.address, COUNT).await;
        let index = Cell::new(0);
        together(clients, async |mut client: Member| {
            let index = index.replace(index.get() + 1);
            let (way, backends) = (CLIENT[index % CLIENT.len()], BACKEND[index / CLIENT.len() % BACKEND.len()]);
            // What comes of it is up to who is first.
            let _ = client.send(&Frame::text(backends)).await;
            if index.is_multiple_of(2) {
                let _ = client.frame().await;
            }
            match way {
                "close" => {
                    let _ = client.send(&Frame::close(1000, "")).await;
                    client.rest().await;
                }
                "close and leave" => _ = client.send(&Frame::close(1000, "")).await,
                "fin" => _ = client.fin_and_rest().await,
                "rst" => client.rst(),
                "nothing" => {}
                // Reads all, answers nothing.
                _ => while backends != "echo" && client.frame().await.is_ok() {},
            }
            format!("{way} / {backends}")
        })
        .await
    });
    let ways = tally(ways);
    assert_eq!(ways.len(), CLIENT.len() * BACKEND.len(), "{ways:?}");
    t.assert_nothing_left();
    t.assert_sent_no_rst();
    println!("{COUNT} sessions that ended in {} ways left nothing behind", ways.len());
}
