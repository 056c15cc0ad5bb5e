//! Clients of a crowd that go on talking to an echo until they are told to go, and what became of each of their messages.

use super::{
    Frame,
    crowd::{Member, Rest},
    proxy::Proxy,
    ws::{CLOSE, TEXT},
};
use std::{collections::BTreeMap, time::Instant};
use tokio::time::Interval;

/// What such a client has to tell.
#[derive(Clone, Debug)]
pub struct Talk {
    pub client: String,
    pub sent: u64,
    pub echoed: u64,
    pub rest: Rest,
}

/// Sends a message with each tick until a Close comes, and answers that. Tells when so many have been echoed.
pub async fn talk(mut client: Member, mut pace: Interval, warm: u64, is_warm: impl FnOnce()) -> Talk {
    let (local, mut sent, mut echoed, mut is_warm) = (client.local().to_string(), 0, 0, Some(is_warm));
    let close = loop {
        tokio::select! {
            frame = client.frame() => match frame {
                Ok(frame) if frame.opcode == TEXT => {
                    // In order, and none left out.
                    assert_eq!(frame.text(), echoed.to_string());
                    echoed += 1;
                    if echoed == warm {
                        is_warm.take().into_iter().for_each(|is_warm| is_warm());
                    }
                }
                Ok(frame) => break frame,
                Err(end) => panic!("{end:?} without a Close"),
            },
            _ = pace.tick() => {
                client.send(&Frame::text(&sent.to_string())).await.expect("an open session");
                sent += 1;
            }
        }
    };
    let closed_at = Instant::now();
    assert_eq!(close.opcode, CLOSE, "{close:?}");
    client.send(&Frame::new(CLOSE, &close.payload[..2])).await.expect("an open session");
    let mut rest = client.rest().await;
    rest.closes.insert(0, close);
    rest.closed_at = Some(closed_at);
    Talk { client: local, sent, echoed, rest }
}

/// What talkers have sent, what was echoed, and what crossed the Close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Account {
    pub sent: u64,
    pub echoed: u64,
    pub crossed: u64,
}

/// To each client its own number: all that was passed on has its echo, and what has none was not passed on, but has crossed the
/// Close on the wire. Of a tidegate that has ended: metrics are gone with the process, the log says the same of each session.
#[track_caller]
pub fn assert_only_crossed(t: &Proxy, talks: &[Talk]) -> Account {
    let closes: Vec<_> = t.log().into_iter().filter(|line| line["message"] == "close").collect();
    let counted = closes.iter().filter_map(|line| {
        let counts = (line["messages_from_client"].as_u64()?, line["crossed"].as_u64()?);
        Some((line["client"].as_str()?, counts))
    });
    let counted: BTreeMap<_, _> = counted.collect();
    let of = |talk: &Talk| (talk.echoed, talk.sent - talk.echoed);
    let differing: Vec<_> = talks.iter().filter(|talk| counted.get(talk.client.as_str()) != Some(&of(talk))).collect();
    assert!(
        differing.is_empty(),
        "{} clients lack other answers than those that crossed; the first: {:?}, logged as {:?}",
        differing.len(),
        differing[0],
        closes.iter().find(|line| line["client"] == differing[0].client.as_str()),
    );
    let (sent, echoed) = (talks.iter().map(|talk| talk.sent).sum(), talks.iter().map(|talk| talk.echoed).sum());
    Account { sent, echoed, crossed: sent - echoed }
}
