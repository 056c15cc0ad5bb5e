//! Where tidegate puts its Close frames: the relay itself over sockets, cut at every byte of random streams.
//!
//! A case is a stream of frames in each direction and one way to end the session. Every position of the stream under
//! test has a session of its own: so many bytes are written and taken by the relay, and then the process drains, or the
//! peer dies. What the other peer got must be whole frames, exactly as they were sent, then one Close, and then FIN.

use crate::harness::ws::{self, Frame, SeenFrame};
use futures_util::future::join_all;
use proptest::{
    collection::vec,
    prelude::*,
    sample::{Index, select},
    test_runner::{Config as Runs, TestRunner},
};
use std::{io, ops::Range, sync::Arc, time::Duration};
use tidegate::{
    close::{Bounds, Keeps, Linger, Patience},
    drain::{self, Drain},
    metrics::Metrics,
    net::Stream,
    relay::{Config, Leg, Relay, Report, Shared},
    side::Side,
    ws::Rsv,
};
use tokio::{net::UnixStream, task::JoinSet, time::timeout};

/// No wait in here is longer, unless something is wrong.
const TOO_LONG: Duration = Duration::from_secs(20);

/// Sessions at a time: four descriptors each.
const BATCH: usize = 64;

/// Every position of a stream up to this length is tried, and of a longer one those in and around its headers and ends,
/// and about [`SAMPLE`] others, evenly spread.
const EVERY_POSITION: usize = 400;
const SAMPLE: usize = 24;

/// How the side whose stream is cut goes on after the cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// FIN.
    Fin,
    /// RST, as far as a Unix-domain socket has one: it is closed with something unread in it.
    Reset,
    /// The process drains, and the side finishes its frame and takes part in the Close handshake.
    Drain,
    /// The process drains, and the side says nothing any more.
    DrainSilent,
}

impl Way {
    fn is_drain(self) -> bool {
        matches!(self, Self::Drain | Self::DrainSilent)
    }
}

/// The frames of one direction.
#[derive(Debug, Clone)]
struct Sent {
    bytes: Vec<u8>,
    frames: Vec<SentFrame>,
}

#[derive(Debug, Clone)]
struct SentFrame {
    range: Range<usize>,
    header: usize,
    /// Larger than `hold_frame`: passed on as it comes.
    is_large: bool,
}

/// What a position in a stream is.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// The end of the last whole frame before it.
    whole: usize,
    /// The end of the frame that it is in; the same at a boundary.
    end: usize,
    /// In the payload of a frame that is not held.
    is_inside: bool,
}

impl Sent {
    fn place(&self, at: usize) -> Place {
        let here = self.frames.iter().find(|frame| frame.range.start < at && at < frame.range.end);
        here.map_or(Place { whole: at, end: at, is_inside: false }, |frame| Place {
            whole: frame.range.start,
            end: frame.range.end,
            is_inside: frame.is_large && at >= frame.range.start + frame.header,
        })
    }

    /// The positions to be tried; `first` is where the evenly spread ones begin.
    fn positions(&self, first: Index) -> Vec<usize> {
        let len = self.bytes.len();
        if len <= EVERY_POSITION {
            return (0..=len).collect();
        }
        let near = self.frames.iter().flat_map(|frame| {
            let header_end = frame.range.start + frame.header;
            (frame.range.start.saturating_sub(2)..header_end + 3)
                .chain(frame.range.end.saturating_sub(2)..frame.range.end)
        });
        let mut positions: Vec<_> =
            near.chain((first.index(len / SAMPLE)..len).step_by(len / SAMPLE)).chain([len]).collect();
        positions.retain(|position| *position <= len);
        positions.sort_unstable();
        positions.dedup();
        positions
    }
}

/// A kind of frame and its payload's size.
type Choice = (u8, bool, usize);

/// Messages in fragments, with control frames between them, as `side` sends them.
fn sent(side: Side, choices: &[Choice], hold: usize) -> Sent {
    let mut sent = Sent { bytes: Vec::new(), frames: Vec::new() };
    let mut in_message = false;
    for (number, (kind, fin, size)) in choices.iter().enumerate() {
        let payload: Vec<u8> = (0..*size).map(|at| u8::try_from((at * 7 + number) % 251).expect("below")).collect();
        let frame = if *kind < 3 {
            Frame::new(if *kind == 0 { ws::PONG } else { ws::PING }, &payload[..payload.len().min(125)])
        } else {
            let opcode = if in_message { ws::CONTINUATION } else { [ws::TEXT, ws::BINARY][usize::from(*kind % 2)] };
            in_message = !fin;
            Frame::new(opcode, payload).fin(*fin)
        };
        let key = [1, 2, 0x88, u8::try_from(number).expect("few frames")];
        let bytes = frame.bytes((side == Side::Client).then_some(key));
        let start = sent.bytes.len();
        let range = start..start + bytes.len();
        let header = bytes.len() - frame.payload.len();
        sent.frames.push(SentFrame { range, header, is_large: frame.payload.len() > hold });
        sent.bytes.extend(bytes);
    }
    sent
}

/// Short streams, of which every position is tried; now and then one with large frames. Sizes around `hold_frame`.
fn choices() -> impl Strategy<Value = (Vec<Choice>, usize)> {
    let small = prop_oneof![4 => 0..30_usize, 1 => Just(0), 2 => select(&[125_usize, 126, 128, 129])];
    let large = prop_oneof![4 => 0..200_usize, 2 => 1_000..1_100_usize,
        2 => select(&[1_024_usize, 1_025, 16_384, 16_385]), 1 => 20_000..40_960_usize];
    let frames = |size: BoxedStrategy<usize>, count| vec((0..8_u8, any::<bool>(), size), count);
    let hold_small = prop_oneof![Just(128_usize), Just(125), Just(16_384)];
    let hold_large = prop_oneof![Just(1_024_usize), Just(16_384)];
    prop_oneof![
        3 => (frames(small.boxed(), 1..8), hold_small),
        1 => (frames(large.boxed(), 1..7), hold_large),
    ]
}

fn config(hold_frame: usize, way: Way) -> Config {
    Config {
        max_message: 16 << 20,
        max_frame: 16 << 20,
        max_control_rate: 0,
        hold_frame,
        // Of each large frame the payload, or what comes of it apart from its header, is moved in the kernel.
        splice_from: Some(1),
        hold_timeout: TOO_LONG,
        ping_interval: Duration::ZERO,
        pong_timeout: TOO_LONG,
        write_timeout: TOO_LONG,
        max_age: None,
        max_age_jitter: 0,
        idle_timeout: None,
        close_delay: Duration::ZERO,
        // Where somebody is to be silent it is waited for; where nobody is, nobody is to be taken for it.
        close_handshake_timeout: if way == Way::DrainSilent { Duration::from_millis(40) } else { TOO_LONG },
        client_lost_code: 1001,
        backend_lost_code: 1012,
        backend_error_code: 1014,
    }
}

fn drain() -> Drain {
    Drain::new(drain::Config {
        delay: Duration::ZERO,
        window: Duration::ZERO,
        quiet: Duration::ZERO,
        timeout: TOO_LONG,
        close_code: 1001,
        reason: "bye".to_owned(),
        readiness: drain::Readiness::AfterDelay,
    })
}

/// A peer of the relay, and what it got.
struct Peer {
    side: Side,
    socket: Option<Stream>,
    sent: Arc<Sent>,
    /// What it is to write before the end begins, and what it has written.
    cut: usize,
    written: usize,
    /// Nothing is read from it until the end, so that closing it resets.
    is_deaf: bool,
    got: Vec<u8>,
}

impl Peer {
    fn io(&self) -> &UnixStream {
        match &self.socket {
            Some(Stream::Unix(socket)) => socket,
            _ => panic!("the {}'s socket is gone", self.side.as_str()),
        }
    }

    /// Reads what is there; true at the end.
    fn read(&mut self) -> bool {
        let mut buffer = [0; 4096];
        loop {
            match self.io().try_read(&mut buffer) {
                Ok(0) => return true,
                Ok(count) => self.got.extend(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) => panic!("the {} was not ended in an orderly way: {error}", self.side.as_str()),
            }
        }
    }

    /// Writes what can be written of the stream up to `end`.
    fn write(&mut self, end: usize) {
        let (sent, written) = (Arc::clone(&self.sent), self.written);
        if written < end {
            match self.io().try_write(&sent.bytes[written..end]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => panic!("the {} can't write: {error}", self.side.as_str()),
            }
        }
    }

    /// The relay has everything up to the cut.
    fn is_taken(&self) -> bool {
        let queued = tidegate::net::unacked(self.io()).expect("a number");
        self.written == self.cut && queued == 0
    }

    /// Takes part in an end as its `way` says; `None`: in all of it.
    async fn end(&mut self, way: Option<Way>) {
        match way {
            Some(Way::Reset) => {
                self.socket = None;
                return;
            }
            Some(Way::Fin) => self.fin(),
            Some(Way::DrainSilent) => {}
            Some(Way::Drain) | None => {
                let end = self.sent.place(self.cut).end;
                while self.written < end {
                    self.write(end);
                    tokio::task::yield_now().await;
                }
                let close = loop {
                    let is_end = self.read();
                    match frames(&self.got).0.into_iter().find(|frame| frame.opcode == ws::CLOSE) {
                        None if !is_end => tokio::task::yield_now().await,
                        close => break close,
                    }
                };
                if let Some(close) = close {
                    let key = (self.side == Side::Client).then_some([9, 8, 7, 6]);
                    let answer = Frame::close(close.code(), "").bytes(key);
                    // Whoever has said FIN already does not need it.
                    let _ = self.io().try_write(&answer);
                    self.fin();
                }
            }
        }
        while !self.read() {
            tokio::task::yield_now().await;
        }
        self.socket = None;
    }

    /// Bytes before the first Close.
    fn passed_on(&self) -> usize {
        let mut at = 0;
        while let Some((frame, size)) = SeenFrame::parse(&self.got[at..], Duration::ZERO) {
            if frame.opcode == ws::CLOSE {
                break;
            }
            at += size;
        }
        at
    }

    fn fin(&mut self) {
        // The relay may have closed it meanwhile.
        let _ = rustix::net::shutdown(self.io(), rustix::net::Shutdown::Write);
    }
}

/// The frames in `bytes`, and where what is no whole frame begins.
fn frames(bytes: &[u8]) -> (Vec<SeenFrame>, usize) {
    let mut frames = Vec::new();
    let mut at = 0;
    while let Some((frame, size)) = SeenFrame::parse(&bytes[at..], Duration::ZERO) {
        frames.push(frame);
        at += size;
    }
    (frames, at)
}

struct Session {
    client: Peer,
    backend: Peer,
}

impl Session {
    /// Until both cuts are reached.
    async fn begin(&mut self) {
        loop {
            for peer in [&mut self.client, &mut self.backend] {
                peer.write(peer.cut);
                if !peer.is_deaf {
                    peer.read();
                }
            }
            if self.client.is_taken() && self.backend.is_taken() {
                return;
            }
            tokio::task::yield_now().await;
        }
    }
}

/// The relay, and what a session does with its legs.
async fn relay(mut relay: Relay) -> Report {
    let patience = Patience { linger: TOO_LONG, linger_max: TOO_LONG };
    let linger = Linger::new(&Arc::new(Bounds::new(2)), None);
    let ends = async {
        for _ in 0..2 {
            let ended = relay.next_ended().await;
            if let Some(stream) = ended.stream {
                linger.add(ended.side, stream, ended.is_done, &patience, Keeps::Nothing);
            }
        }
        linger.close();
    };
    tokio::join!(ends, linger.clone().run());
    relay.report()
}

/// One case: `source` is cut at each position, and the other side somewhere.
#[derive(Debug)]
struct Case {
    source: Side,
    way: Way,
    hold: usize,
    sent: [Arc<Sent>; 2],
    other_cut: usize,
}

impl Case {
    fn new(source: Side, way: Way, hold: usize, choices: &[Choice], other: &[Choice], other_cut: Index) -> Self {
        // A peer that is to reset needs something that it has not read.
        let other = if way == Way::Reset { &[(1, true, 5)] } else { other };
        let (sent, other) = (sent(source, choices, hold), sent(source.other(), other, hold));
        // Whole frames: they are there to be left unread, or not to be waited for.
        let is_whole = matches!(way, Way::Reset | Way::DrainSilent);
        let len = other.bytes.len();
        let other_cut = if is_whole { len } else { other_cut.index(len + 1) };
        let mut sent = [sent, other].map(Arc::new);
        if source == Side::Backend {
            sent.reverse();
        }
        Self { source, way, hold, sent, other_cut }
    }

    async fn run(&self, positions: &[usize]) {
        let drain = drain();
        let (config, traffic) = (config(self.hold, self.way), Metrics::new().traffic());
        let shared = Arc::new(Shared::new(config, traffic, drain.clone(), Arc::default()));
        let mut sessions = Vec::new();
        let mut relays = Vec::new();
        let mut tasks = JoinSet::new();
        for position in positions {
            let [client, backend] = Side::BOTH.map(|side| {
                let (ours, theirs) = UnixStream::pair().expect("two sockets");
                let peer = Peer {
                    side,
                    socket: Some(Stream::Unix(theirs)),
                    sent: Arc::clone(&self.sent[side as usize]),
                    cut: if side == self.source { *position } else { self.other_cut },
                    written: 0,
                    is_deaf: side == self.source && self.way == Way::Reset,
                    got: Vec::new(),
                };
                (peer, Leg { stream: Some(Stream::Unix(ours)), early: bytes::Bytes::new() })
            });
            sessions.push(Session { client: client.0, backend: backend.0 });
            relays.push(Relay::new(Arc::clone(&shared), Rsv::None, client.1, backend.1));
        }
        for (index, one) in relays.into_iter().enumerate() {
            tasks.spawn(async move { (index, relay(one).await) });
        }
        join_all(sessions.iter_mut().map(Session::begin)).await;
        if self.way.is_drain() {
            drain.hurry();
        }
        join_all(sessions.iter_mut().map(async |session| {
            let way = |side| (side == self.source).then_some(self.way);
            let Session { client, backend } = session;
            tokio::join!(client.end(way(Side::Client)), backend.end(way(Side::Backend)));
        }))
        .await;
        let mut reports = tasks.join_all().await;
        reports.sort_by_key(|(index, _)| *index);
        for ((session, position), (_, report)) in sessions.iter().zip(positions).zip(&reports) {
            for peer in [&session.client, &session.backend] {
                if let Err(wrong) = self.judge(peer, *position, report) {
                    panic!("cut at {position}, the {}: {wrong}\n{report:?}", peer.side.as_str());
                }
            }
        }
    }

    /// Whether `peer` got what it may get.
    fn judge(&self, peer: &Peer, position: usize, report: &Report) -> Result<(), String> {
        let side = peer.side;
        let is_source = side == self.source;
        if is_source && self.way == Way::Reset {
            return Ok(());
        }
        let (frames, whole) = frames(&peer.got);
        let from = &self.sent[side.other() as usize].bytes;
        // What was passed on is what was sent; the Close is ours.
        let close = frames.iter().position(|frame| frame.opcode == ws::CLOSE);
        let close_size = close.map_or(0, |_| peer.got.len() - peer.passed_on());
        let passed = &peer.got[..peer.got.len() - close_size];
        if !from.starts_with(passed) {
            return Err(format!("other bytes than were sent: {frames:?}"));
        }
        let cut = if is_source { self.other_cut } else { position };
        let place = self.sent[side.other() as usize].place(cut);
        // The side whose stream this is goes on after the cut only when it takes part in the end.
        let goes_on = is_source || self.way == Way::Drain;
        let died_inside = place.is_inside && !goes_on;
        let Some(close) = close else {
            if report.told[side as usize] {
                return Err("a Close is reported that it did not get".to_owned());
            }
            if is_source && side == Side::Backend && self.way == Way::Fin {
                return Ok(());
            }
            if !died_inside {
                return Err(format!("no Close: {frames:?}"));
            }
            if passed.len() != cut || !report.cut[side as usize] {
                return Err(format!("{} bytes of {cut} before a FIN inside a large frame", passed.len()));
            }
            return Ok(());
        };
        if died_inside {
            return Err("a Close after half a frame".to_owned());
        }
        if close + 1 != frames.len() || whole != peer.got.len() {
            return Err(format!("something after the Close: {:?}", &frames[close + 1..]));
        }
        if report.cut[side as usize] || !report.told[side as usize] {
            return Err("a Close is not reported".to_owned());
        }
        if goes_on {
            // A frame that was under way is finished, unless it crossed the Close.
            if passed.len() != place.whole && (passed.len() != place.end || passed.len() < place.whole) {
                return Err(format!("{} bytes of {place:?}", passed.len()));
            }
            if place.is_inside && passed.len() != place.end {
                return Err(format!("a large frame is not finished: {} bytes of {place:?}", passed.len()));
            }
        } else if passed.len() != place.whole {
            return Err(format!("{} bytes of {place:?}", passed.len()));
        }
        let close = &frames[close];
        let code =
            if side == Side::Client && self.source == Side::Backend && !self.way.is_drain() { 1012 } else { 1001 };
        let is_masked = close.mask.is_some();
        if close.code() != code
            || is_masked != (side == Side::Backend)
            || !close.fin
            || close.rsv != 0
            || !close.minimal
        {
            return Err(format!("another Close: {close:?}"));
        }
        Ok(())
    }
}

/// 104 pairs of streams, one of each pair cut at every position (or, in a long one, at all those in and around its headers
/// and ends, and at some others): 13 for each side and each way to end it.
#[test]
fn a_close_is_put_in_at_frame_boundaries_only() {
    let runs = Runs { cases: 13, max_shrink_iters: 200, failure_persistence: None, ..Runs::default() };
    for source in Side::BOTH {
        for way in [Way::Fin, Way::Reset, Way::Drain, Way::DrainSilent] {
            let input = (choices(), choices(), any::<Index>(), any::<Index>());
            let result =
                TestRunner::new(runs.clone()).run(&input, |((choices, hold), (other, _), other_cut, first)| {
                    let case = Case::new(source, way, hold, &choices, &other, other_cut);
                    let runtime =
                        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                    for positions in case.sent[source as usize].positions(first).chunks(BATCH) {
                        let done = runtime.block_on(async { timeout(TOO_LONG, case.run(positions)).await });
                        prop_assert!(done.is_ok(), "some session of {positions:?} does not end");
                    }
                    Ok(())
                });
            if let Err(failure) = result {
                panic!("{source:?}, {way:?}: {failure}");
            }
        }
    }
}
