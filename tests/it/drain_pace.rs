//! A drain of a thousand busy sessions takes its time and loses nothing: every message is counted at both ends.
//!
//! Each test prints its figures (`cargo test --test it drain_pace -- --nocapture`). No speed is asserted; how Closes are
//! spread, and how many messages cross one on the wire, only where `TIDEGATE_STRICT=1` asks for it: a machine that is busy makes clients late.

use crate::harness::{
    Board, DEADLINE, Frame,
    crowd::{Member, Rest, Stage, connect, is_strict, tally},
    talk::{Account, Talk, assert_only_crossed, talk},
    ws::{BINARY, CLOSE},
};
use futures_util::future::join_all;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use tokio::time::{Instant as TokioInstant, MissedTickBehavior, interval, interval_at};

const TALKERS: usize = 1000;
const PACE: Duration = Duration::from_millis(200);
/// Messages that each talker has had back when the drain begins.
const WARM: u64 = 22;
const WINDOW: Duration = Duration::from_secs(5);

/// A megabyte in a second.
const FRAME: usize = 64 << 10;
const FRAMES_PER_SECOND: u32 = 16;

/// The payload of a frame of a stream: its number, over and over, so that a part of another frame would be seen in it.
fn numbered(number: u64) -> Vec<u8> {
    number.to_be_bytes().repeat(FRAME / 8)
}

/// What a backend has to tell of a session.
#[derive(Debug)]
enum Served {
    /// So many messages came, and each was sent back before the Close was answered.
    Echo { messages: u64, close: u16 },
    /// So many whole frames were sent before the Close was answered.
    Stream { frames: u64, close: u16 },
}

/// Streams when it is asked to, else sends everything back; then answers the Close and ends first, as a server should. In both
/// it answers in order: what it has sent before its Close is to arrive.
async fn serve(mut member: Member) -> Served {
    member.handshake().await;
    let (mut messages, mut is_stream, mut frames) = (0, false, 0);
    let mut pace = interval(Duration::from_secs(1) / FRAMES_PER_SECOND);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let close = loop {
        tokio::select! {
            frame = member.frame() => match frame.expect("a Close before the end") {
                frame if frame.opcode == CLOSE => break frame,
                frame if frame.text() == "stream" => is_stream = true,
                frame => {
                    member.send(&frame.again()).await.expect("an open session");
                    messages += 1;
                }
            },
            _ = pace.tick(), if is_stream => {
                member.send(&Frame::binary(numbered(frames))).await.expect("an open session");
                frames += 1;
            }
        }
    };
    member.send(&Frame::new(CLOSE, &close.payload[..2])).await.expect("an open session");
    let rest = member.fin_and_rest().await;
    assert_eq!(rest.summary(), "Fin", "after both Closes: {rest:?}");
    let close = close.code();
    if is_stream { Served::Stream { frames, close } } else { Served::Echo { messages, close } }
}

/// What the client of a stream has to tell.
#[derive(Debug)]
struct Streamed {
    frames: u64,
    rest: Rest,
}

/// Reads a stream until the Close, and answers that.
async fn read_stream(mut client: Member, has_begun: impl FnOnce()) -> Streamed {
    client.send(&Frame::text("stream")).await.expect("an open session");
    let (mut frames, mut has_begun) = (0, Some(has_begun));
    let close = loop {
        let frame = client.frame().await.expect("a Close before the end");
        if frame.opcode != BINARY {
            break frame;
        }
        // In order, none left out, each of them whole.
        assert!(frame.payload == numbered(frames), "frame {frames} is another: {frame:?}");
        frames += 1;
        has_begun.take().into_iter().for_each(|has_begun| has_begun());
    };
    let closed_at = Instant::now();
    assert_eq!(close.opcode, CLOSE, "{close:?}");
    client.send(&Frame::new(CLOSE, &close.payload[..2])).await.expect("an open session");
    let mut rest = client.rest().await;
    rest.closes.insert(0, close);
    rest.closed_at = Some(closed_at);
    Streamed { frames, rest }
}

/// How many Closes came in each tenth of the window, counted from the signal; the last number is of those that came later.
#[track_caller]
fn assert_spread<'a>(what: &str, rests: impl Iterator<Item = &'a Rest>, signal_at: Instant) {
    let mut tenths = [0_usize; 11];
    for rest in rests {
        let after = rest.closed_at.expect("a Close").saturating_duration_since(signal_at);
        let index = (after.as_millis() * 10 / WINDOW.as_millis()).min(10);
        tenths[usize::try_from(index).expect("ten at most")] += 1;
    }
    println!("  Closes of {what} in each {:?} from the signal on, and later: {tenths:?}", WINDOW / 10);
    let count: usize = tenths.iter().sum();
    if is_strict() {
        // A fifth has two hundred of a thousand; that it has none, or a tenth a third of all, is no bad luck: a busy machine's clients
        // may see it so, which read late.
        assert!(tenths.iter().all(|tenth| *tenth <= count / 3), "{what} close in bunches: {tenths:?}");
        assert!(tenths[..2].iter().sum::<usize>() > 0, "no {what} in the window's first fifth: {tenths:?}");
        // The last second is kept for those whose next exchange is awaited.
        assert!(tenths[6..].iter().sum::<usize>() > 0, "no {what} toward the window's end: {tenths:?}");
    }
}

fn drain_under(streams: usize) {
    let stage = Stage::new();
    let backend = stage.backend(serve);
    // A backend on a slow machine is waited for, so that only what tidegate does can be at fault.
    let settings =
        format!("drain = {{ delay = '0s', window = '{WINDOW:?}', timeout = '30s' }}\nclose.handshake_timeout = '10s'");
    let t = stage.tidegate(&settings, backend.address);
    let begun = Board::new(0);
    let ((talks, streamed), signal_at) = stage.clients(async || {
        let mut clients = connect(t.address, TALKERS + streams).await;
        let streaming = clients.split_off(TALKERS);
        let start = TokioInstant::now();
        let has_begun = || begun.change(|begun| *begun += 1);
        let talking = clients.into_iter().zip(0_u32..).map(|(client, index)| {
            // Evenly spread over the pace, so that they do not speak in unison.
            let offset = PACE * index / u32::try_from(TALKERS).expect("a small number");
            talk(client, interval_at(start + offset, PACE), WARM, has_begun)
        });
        let streaming = streaming.into_iter().map(|client| read_stream(client, has_begun));
        let terminating = async {
            let all = begun.until(DEADLINE, |begun| (*begun == TALKERS + streams).then_some(())).await;
            assert!(all.is_some(), "{begun:?} of {} sessions have begun", TALKERS + streams);
            t.sigterm();
            Instant::now()
        };
        let ending = async { tokio::join!(join_all(talking), join_all(streaming)) };
        tokio::join!(ending, terminating)
    });
    assert_eq!(t.wait_exit(DEADLINE).code(), Some(0));
    let took = signal_at.elapsed();

    let rests = || talks.iter().map(|talk| &talk.rest).chain(streamed.iter().map(|streamed| &streamed.rest));
    let ends = tally(rests().map(Rest::summary));
    assert_eq!(ends, BTreeMap::from([("Close 1001, Fin".to_owned(), TALKERS + streams)]));
    let Account { sent, echoed, crossed } = assert_only_crossed(&t, &talks);
    println!(
        "{TALKERS} sessions with a message in each {PACE:?}, {streams} streams at 1 MB/s: drained and ended in {took:.2?}; \
         {sent} messages sent, {echoed} answered, {crossed} crossed the Close, 0 lost"
    );
    assert_spread("talkers", talks.iter().map(|talk: &Talk| &talk.rest), signal_at);

    // Both ends count the same.
    let (mut messages, mut frames_sent) = (0, Vec::new());
    for served in backend.results(TALKERS + streams) {
        let (Served::Echo { close, .. } | Served::Stream { close, .. }) = served;
        assert_eq!(close, 1001, "at the backend: {served:?}");
        match served {
            Served::Echo { messages: count, .. } => messages += count,
            Served::Stream { frames, .. } => frames_sent.push(frames),
        }
    }
    assert_eq!(messages, echoed, "messages that the backend got, and that came back");
    let mut frames_received: Vec<_> = streamed.iter().map(|streamed| streamed.frames).collect();
    frames_sent.sort_unstable();
    frames_received.sort_unstable();
    assert_eq!(frames_received, frames_sent, "whole frames that arrived of each stream, and that were sent");
    if streams > 0 {
        assert_spread("streams", streamed.iter().map(|streamed| &streamed.rest), signal_at);
        println!("  {} frames of 64 KiB sent and received, none cut", frames_sent.iter().sum::<u64>());
    }
    t.assert_no_rst();
    if is_strict() {
        assert!(crossed <= 2, "{crossed} of {sent} messages crossed a Close");
        // The window, and what a drain without trouble needs after it.
        assert!(took < WINDOW + Duration::from_secs(1), "it took {took:?}");
    }
}

/// SIGTERM while 1,000 clients send a message in each 200 ms: all get Close 1001 and FIN, spread over the window. What the backend
/// got is answered to the last message, what crossed the Close it never got.
#[test]
fn a_drain_of_1000_talking_sessions_is_spread_and_loses_nothing() {
    drain_under(0);
}

/// The same while 100 more get a stream in frames that are too large to be held back: each frame that the backend has sent before
/// its Close arrives, whole, in front of the client's.
#[test]
fn a_drain_cuts_no_frame_of_100_streams() {
    drain_under(100);
}
