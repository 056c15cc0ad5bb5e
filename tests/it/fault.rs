//! A bug in one session is no other session's matter: what a panic leaves unharmed, and how its own session ends.
//!
//! Only a debug build can be made to panic, so these are the only tests of a crowd whose full size is not for a release build.

use crate::harness::{
    crowd::{self, Member, Stage, is_strict, tally},
    left_out,
    proxy::Surroundings,
    visit::{self, Outcome, leave},
    ws::{CLOSE, Frame, PING},
};
use futures_util::future::join_all;
use std::collections::BTreeMap;

/// Who is asked to panic.
const FAULT: &str = "a fault, please";

/// Echoes until a Close or the end; says what that was.
async fn echo(mut member: Member) -> String {
    member.handshake().await;
    loop {
        match member.frame().await {
            Ok(frame) if frame.opcode == CLOSE => {
                let (code, reason) = (frame.code(), frame.text());
                let _ = member.send(&Frame::new(CLOSE, &frame.payload[..frame.payload.len().min(2)])).await;
                let rest = member.fin_and_rest().await;
                return format!("{code} {reason:?} {:?}", rest.end);
            }
            Ok(frame) => _ = member.send(&frame.again()).await,
            Err(end) => return format!("{end:?}"),
        }
    }
}

#[test]
fn a_panic_ends_its_session_alone() {
    if !cfg!(debug_assertions) {
        left_out("a panic", "a release build can't be made to");
        return;
    }
    let (count, faults) = if is_strict() { (9000, 1) } else { (300, 10) };
    let stage = Stage::new();
    let backend = stage.backend(echo);
    let surroundings = Surroundings { fault: Some(FAULT), ..Surroundings::default() };
    let t = stage.tidegate_in(surroundings, "", backend.address);
    let (unlucky, others) = stage.clients(async || {
        let mut members = crowd::connect(t.address, count).await;
        let unlucky = members.split_off(count - faults);
        let unlucky = crowd::together(unlucky, async |mut member| {
            let _ = member.send(&Frame::new(PING, FAULT)).await;
            let rest = member.rest().await;
            let closes: Vec<_> = rest.closes.iter().map(|close| (close.code(), close.text())).collect();
            format!("{closes:?} {:?}", rest.end)
        })
        .await;
        let others =
            join_all(members.into_iter().map(async |mut member| match visit::echo(&mut member, "still here").await {
                Ok(()) => leave(member).await,
                Err(outcome) => outcome,
            }))
            .await;
        (tally(unlucky), tally(others))
    });
    println!("{faults} panics among {count} sessions: {unlucky:?}, the others {others:?}");
    assert_eq!(unlucky, BTreeMap::from([(r#"[(1011, "a fault of the proxy")] Fin"#.to_owned(), faults)]));
    assert_eq!(others, BTreeMap::from([(Outcome::Served, count - faults)]));
    let expected = [(r#"1011 "a fault of the proxy" Fin"#, faults), (r#"1000 "" Fin"#, count - faults)];
    let expected = expected.map(|(how, count)| (how.to_owned(), count));
    assert_eq!(tally(backend.results(count)), expected.into(), "at the backend");
    let line = t.log_where("the panic", |line| line["message"].as_str().is_some_and(|m| m.starts_with("panic")));
    assert!(line["at"].as_str().is_some_and(|at| at.contains("relay")), "{line}");
    let line = t.log_where("the end", |line| line["abnormal"] == "panic");
    assert_eq!((&line["code"], &line["initiator"]), (&1011.into(), &"tidegate".into()), "{line}");
    t.assert_nothing_left();
    t.assert_no_rst();
}

/// Whoever has the beginning of a frame gets no Close inside it; the other one gets its own all the same.
#[test]
fn a_panic_inside_a_frame() {
    const LARGE: usize = 100_000;
    if !cfg!(debug_assertions) {
        left_out("a panic", "a release build can't be made to");
        return;
    }
    let stage = Stage::new();
    let backend = stage.backend(async |mut member: Member| {
        member.handshake().await;
        let large = member.bytes_of(&Frame::binary(vec![7; LARGE]));
        member.send_bytes(&large[..LARGE / 2]).await.expect("room");
        member.rest().await.summary()
    });
    let surroundings = Surroundings { fault: Some(FAULT), ..Surroundings::default() };
    let t = stage.tidegate_in(surroundings, "", backend.address);
    let seen = stage.clients(async || {
        let mut member = Member::connect(t.address).await;
        member.handshake().await;
        while member.unread() < LARGE / 4 {
            assert!(member.fill().await.is_none(), "the beginning of a frame");
        }
        member.send(&Frame::new(PING, FAULT)).await.expect("room");
        member.rest().await.summary()
    });
    assert_eq!(seen, "Fin with bytes that should not be");
    assert_eq!(backend.results(1), ["Close 1011, Fin"]);
    t.assert_nothing_left();
    t.assert_no_rst();
}
