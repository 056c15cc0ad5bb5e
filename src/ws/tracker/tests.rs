//! The tracker against random streams, against tungstenite, and rule by rule.

use std::{collections::BTreeSet, io::Cursor};

use proptest::{collection::vec, prelude::*};
use tokio_tungstenite::tungstenite::{
    Error,
    error::ProtocolError,
    protocol::frame::{FrameHeader, coding},
};

use super::*;
use crate::ws::CloseFrame;

const NO_LIMITS: Limits = Limits { frame: u64::MAX, message: u64::MAX };

/// A frame as it is to be written; always allowed by the generator, unless a byte is changed later.
#[derive(Debug, Clone)]
struct Frame {
    fin: bool,
    rsv: u8,
    opcode: Opcode,
    key: Option<[u8; 4]>,
    payload: usize,
}

impl Frame {
    /// The header in its minimal form, written without the code under test.
    fn header(&self) -> Vec<u8> {
        let mask = if self.key.is_some() { 0x80 } else { 0 };
        let mut bytes = vec![u8::from(self.fin) << 7 | self.rsv | self.opcode.bits()];
        if let Ok(short @ ..126) = u8::try_from(self.payload) {
            bytes.push(mask | short);
        } else if let Ok(middle) = u16::try_from(self.payload) {
            bytes.push(mask | 0x7E);
            bytes.extend(middle.to_be_bytes());
        } else {
            bytes.push(mask | 0x7F);
            bytes.extend((self.payload as u64).to_be_bytes());
        }
        bytes.extend(self.key.iter().flatten());
        bytes
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.header();
        let len = bytes.len() + self.payload;
        // Any payload will do; this one looks like headers.
        bytes.extend([0x82, 0xFE, 0x7F, 0x00, 0x88].iter().cycle().take(self.payload));
        bytes.truncate(len);
        bytes
    }
}

/// Sizes around those at which the form of a header changes.
fn payload() -> impl Strategy<Value = usize> {
    prop_oneof![40 => 0..20_usize, 10 => Just(0), 20 => 120..132_usize, 5 => 200..500_usize, 1 => 65_530..65_545_usize]
}

/// A stream of allowed frames of one side: fragmented messages with control frames between their fragments.
fn frames(sender: Sender) -> impl Strategy<Value = Vec<Frame>> {
    let frame = (0..10_u8, any::<bool>(), any::<bool>(), payload(), any::<[u8; 4]>());
    vec(frame, 1..12).prop_map(move |choices| {
        let mut in_message = false;
        let frames = choices.into_iter().map(|(kind, fin, compressed, payload, key)| {
            let key = (sender == Sender::Client).then_some(key);
            if kind < 4 {
                let opcode = [Opcode::Ping, Opcode::Pong, Opcode::Close, Opcode::Ping][usize::from(kind)];
                return Frame { fin: true, rsv: 0, opcode, key, payload: payload.min(MAX_CONTROL) };
            }
            let begins = !std::mem::replace(&mut in_message, !fin);
            let opcode = match (begins, kind % 2) {
                (false, _) => Opcode::Continuation,
                (true, 0) => Opcode::Text,
                (true, _) => Opcode::Binary,
            };
            Frame { fin, rsv: if begins && compressed { 0x40 } else { 0 }, opcode, key, payload }
        });
        frames.collect()
    })
}

fn sender() -> impl Strategy<Value = Sender> {
    prop_oneof![Just(Sender::Client), Just(Sender::Server)]
}

fn rsv() -> impl Strategy<Value = Rsv> {
    prop_oneof![Just(Rsv::None), Just(Rsv::Deflate), Just(Rsv::Any)]
}

fn limit() -> impl Strategy<Value = u64> {
    prop_oneof![Just(u64::MAX), 0..300_u64, Just(65_535), Just(65_536)]
}

fn bytes_of(frames: &[Frame]) -> Vec<u8> {
    frames.iter().flat_map(Frame::bytes).collect()
}

/// A direction and what comes in it: allowed frames, some of them changed in a byte or two, or arbitrary bytes.
fn stream() -> impl Strategy<Value = (Tracker, Vec<u8>)> {
    let bytes = sender().prop_flat_map(|sender| {
        let edits = vec((any::<prop::sample::Index>(), any::<u8>()), 0..3);
        let changed = (frames(sender), edits).prop_map(|(frames, edits)| {
            let mut bytes = bytes_of(&frames);
            for (at, byte) in edits {
                // Among the first bytes, where the headers are.
                let near = bytes.len().min(200);
                bytes[at.index(near)] = byte;
            }
            bytes
        });
        let any_bytes = vec(any::<u8>(), 0..64);
        (Just(sender), prop_oneof![3 => changed.boxed(), 1 => any_bytes.boxed()])
    });
    (bytes, rsv(), limit(), limit()).prop_map(|((sender, bytes), rsv, frame, message)| {
        (Tracker::new(sender, rsv, Limits { frame, message }), bytes)
    })
}

/// What a tracker says of a stream: each event with its position, and a violation with the frames that ended before.
type Said = (Vec<(usize, Step)>, Option<(usize, Violation)>);

/// A tracker, how far it has come in a stream, and what it has said of it.
struct Fed {
    tracker: Tracker,
    at: usize,
    events: Vec<(usize, Step)>,
    /// Frames.
    ended: usize,
}

impl Fed {
    fn new(tracker: Tracker) -> Self {
        Self { tracker, at: 0, events: Vec::new(), ended: 0 }
    }

    /// Feeds what comes before `until`; `by_frame`: whole frames are taken at once where there are any.
    fn step_to(&mut self, until: usize, bytes: &[u8], by_frame: bool) -> Result<(), Violation> {
        loop {
            let portion = &bytes[self.at..until];
            if by_frame && let Some((used, header)) = self.tracker.whole(portion)? {
                assert!(self.tracker.at_boundary());
                self.events.push((self.at + usize::from(header.size), Step::Header(header)));
                self.at += used;
                self.ended += 1;
                self.events.push((self.at, Step::End(header)));
                continue;
            }
            let (used, step) = self.tracker.step(portion)?;
            self.at += used;
            if step == Step::More {
                assert_eq!(self.at, until, "more was asked for with bytes left");
                return Ok(());
            }
            self.ended += usize::from(matches!(step, Step::End(_)));
            self.events.push((self.at, step));
            assert!(usize::from(self.tracker.position.have) <= MAX_HEADER);
        }
    }

    fn said(self, violation: Option<Violation>) -> Said {
        (self.events, violation.map(|violation| (self.ended, violation)))
    }
}

/// Feeds `bytes` in portions of the given sizes, used in turn.
fn feed(tracker: Tracker, bytes: &[u8], sizes: &[usize]) -> Said {
    feed_whole(tracker, bytes, sizes, false)
}

/// The same; `by_frame`: whole frames are taken at once where there are any.
fn feed_whole(tracker: Tracker, bytes: &[u8], sizes: &[usize], by_frame: bool) -> Said {
    let mut fed = Fed::new(tracker);
    for size in sizes.iter().cycle() {
        if fed.at == bytes.len() {
            break;
        }
        let until = (fed.at + size).min(bytes.len());
        if let Err(violation) = fed.step_to(until, bytes, by_frame) {
            return fed.said(Some(violation));
        }
    }
    fed.said(None)
}

/// As [`feed`], but of each payload the portions that the sizes say are skipped, in turns with those that are fed.
fn feed_and_skip(tracker: Tracker, bytes: &[u8], sizes: &[usize]) -> Said {
    let mut fed = Fed::new(tracker);
    for (turn, size) in sizes.iter().cycle().enumerate() {
        if fed.at == bytes.len() && fed.tracker.payload_begun().is_none_or(|_| fed.tracker.rest() > 0) {
            break;
        }
        let mut until = (fed.at + size).min(bytes.len());
        if turn % 2 == 0 {
            let rest = usize::try_from(fed.tracker.rest()).expect("of this stream");
            let skipped = rest.min(until - fed.at);
            fed.tracker.skip(skipped as u64);
            fed.at += skipped;
            // What is at its end says so without more input.
            until = fed.at;
        }
        if let Err(violation) = fed.step_to(until, bytes, false) {
            return fed.said(Some(violation));
        }
    }
    fed.said(None)
}

/// The first event of a header on its own.
fn first(mut tracker: Tracker, bytes: &[u8]) -> Result<(usize, Step), Violation> {
    tracker.step(bytes)
}

/// A tracker that is inside a fragmented message, or not.
fn prepared(sender: Sender, rsv: Rsv, in_message: bool) -> Tracker {
    let mut tracker = Tracker::new(sender, rsv, NO_LIMITS);
    if in_message {
        let key = (sender == Sender::Client).then_some([0; 4]);
        let begin = Frame { fin: false, rsv: 0, opcode: Opcode::Text, key, payload: 0 }.bytes();
        assert!(matches!(tracker.step(&begin), Ok((_, Step::Header(_)))));
        assert!(matches!(tracker.step(&[]), Ok((0, Step::End(_)))));
    }
    assert_eq!(tracker.in_message(), in_message);
    tracker
}

fn opcode_of(theirs: coding::OpCode) -> Opcode {
    Opcode::from_bits(u8::from(theirs)).expect("tungstenite refuses reserved opcodes")
}

/// The rules of RFC 6455 5.1 to 5.5 once more, on tungstenite's reading of a header, in the order in which they are
/// checked. `size`: the bytes that the header took.
fn verdict(
    theirs: &FrameHeader,
    length: u64,
    size: usize,
    sender: Sender,
    rsv: Rsv,
    in_message: bool,
) -> Option<Violation> {
    let opcode = opcode_of(theirs.opcode);
    let other_bits = theirs.rsv2 || theirs.rsv3;
    let begins = matches!(opcode, Opcode::Text | Opcode::Binary);
    match rsv {
        Rsv::None if theirs.rsv1 || other_bits => return Some(Violation::Rsv),
        Rsv::Deflate if other_bits || (theirs.rsv1 && !begins) => return Some(Violation::Rsv),
        _ => {}
    }
    match sender {
        Sender::Client if theirs.mask.is_none() => return Some(Violation::Unmasked),
        Sender::Server if theirs.mask.is_some() => return Some(Violation::Masked),
        _ => {}
    }
    // A longer form of the length is not allowed in a control frame, whatever it says.
    if opcode.is_control() && (!theirs.is_final || size > if theirs.mask.is_some() { 6 } else { 2 }) {
        return Some(Violation::Control);
    }
    if !opcode.is_control() && begins == in_message {
        return Some(Violation::Fragments);
    }
    (size != theirs.len(length) || length > i64::MAX as u64).then_some(Violation::Length)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(768))]

    /// Any portions of a stream give the same events at the same positions, or the same violation in the same frame.
    #[test]
    fn portions_do_not_matter((tracker, bytes) in stream(), sizes in vec(1..300_usize, 1..8)) {
        let whole = feed(tracker.clone(), &bytes, &[bytes.len().max(1)]);
        prop_assert_eq!(&feed(tracker.clone(), &bytes, &sizes), &whole);
        prop_assert_eq!(&feed(tracker.clone(), &bytes, &[1]), &whole);
        // Whole frames at once.
        prop_assert_eq!(&feed_whole(tracker.clone(), &bytes, &[bytes.len().max(1)], true), &whole);
        prop_assert_eq!(&feed_whole(tracker.clone(), &bytes, &sizes, true), &whole);
        // Nor does it who was not fed a payload.
        prop_assert_eq!(&feed_and_skip(tracker, &bytes, &sizes), &whole);
    }

    /// Of arbitrary header bytes tidegate and tungstenite read the same, and tidegate refuses what the RFC forbids and
    /// nothing else; of a part of a header it wants more, or refuses it for the same reason.
    #[test]
    fn arbitrary_headers_are_read_as_tungstenite_does(
        mut bytes in any::<[u8; MAX_HEADER]>(),
        plausible in any::<bool>(),
        length in payload(),
        sender in sender(),
        rsv in rsv(),
        in_message in any::<bool>(),
    ) {
        if plausible {
            // Lengths that are really used; arbitrary ones are hardly ever near the limits of their form.
            bytes[2..10].copy_from_slice(&(length as u64).to_be_bytes());
            if bytes[1] & 0x7F == 126 {
                bytes[2..4].copy_from_slice(&u16::try_from(length).unwrap_or(0).to_be_bytes());
            }
        }
        let tracker = prepared(sender, rsv, in_message);
        let mut cursor = Cursor::new(&bytes);
        let ours = first(tracker.clone(), &bytes);
        let size = match FrameHeader::parse(&mut cursor) {
            Ok(Some((theirs, payload))) => {
                let size = usize::try_from(cursor.position()).unwrap();
                let expected = match verdict(&theirs, payload, size, sender, rsv, in_message) {
                    Some(violation) => Err(violation),
                    None => Ok((size, Step::Header(Header {
                        fin: theirs.is_final,
                        rsv: bytes[0] & 0x70,
                        opcode: opcode_of(theirs.opcode),
                        mask: theirs.mask,
                        payload,
                        size: u8::try_from(size).unwrap(),
                    }))),
                };
                prop_assert_eq!(ours, expected);
                size
            }
            Err(Error::Protocol(ProtocolError::InvalidOpcode(_))) => {
                prop_assert_eq!(ours, Err(Violation::Opcode));
                2
            }
            other => panic!("14 bytes are a header: {other:?}"),
        };
        for part in 0..size {
            let of_part = first(tracker.clone(), &bytes[..part]);
            prop_assert!(of_part == Ok((part, Step::More)) || (part >= 2 && of_part == ours), "{of_part:?}");
        }
    }

    /// Headers that tungstenite writes are read as they were meant.
    #[test]
    fn valid_headers_are_read_as_tungstenite_writes_them(
        (sender, sent) in sender().prop_flat_map(|sender| (Just(sender), frames(sender))),
        huge in any::<u64>(),
    ) {
        let mut in_message = false;
        for frame in sent {
            let length = if frame.opcode.is_control() { frame.payload as u64 } else {
                [frame.payload as u64, huge >> 1, huge >> 40][frame.payload % 3]
            };
            let theirs = FrameHeader {
                is_final: frame.fin,
                rsv1: frame.rsv & 0x40 != 0,
                rsv2: false,
                rsv3: false,
                opcode: coding::OpCode::from(frame.opcode.bits()),
                mask: frame.key,
            };
            let mut bytes = Vec::new();
            theirs.format(length, &mut bytes).unwrap();
            let Frame { fin, rsv, opcode, key: mask, .. } = frame;
            let size = u8::try_from(bytes.len()).unwrap();
            let header = Header { fin, rsv, opcode, mask, payload: length, size };
            let step = first(prepared(sender, Rsv::Deflate, in_message), &bytes);
            prop_assert_eq!(step, Ok((bytes.len(), Step::Header(header))));
            if !opcode.is_control() {
                in_message = !fin;
            }
        }
    }

    /// A boundary is claimed exactly where a frame ends, and a message exactly between its first and last fragment.
    #[test]
    fn a_boundary_is_where_a_frame_ends(
        (sender, frames) in sender().prop_flat_map(|sender| (Just(sender), frames(sender))),
    ) {
        let mut tracker = Tracker::new(sender, Rsv::Deflate, NO_LIMITS);
        let mut in_message = false;
        for frame in frames {
            prop_assert!(tracker.at_boundary());
            let (bytes, header) = (frame.bytes(), frame.header().len());
            for (at, byte) in bytes.iter().enumerate() {
                let mut rest = std::slice::from_ref(byte);
                loop {
                    let (used, step) = tracker.step(rest).unwrap();
                    rest = &rest[used..];
                    if step == Step::More {
                        break;
                    }
                }
                let position = at + 1;
                prop_assert_eq!(tracker.at_boundary(), position == bytes.len());
                let inside = position >= header && position < bytes.len();
                prop_assert_eq!(tracker.payload_begun().is_some(), inside);
            }
            if !frame.opcode.is_control() {
                in_message = !frame.fin;
            }
            prop_assert_eq!(tracker.in_message(), in_message);
        }
    }

    /// Limits are kept at the header, before any payload: of each frame, and of all fragments of a message together;
    /// control frames between them do not count.
    #[test]
    fn limits_are_kept_at_the_header(
        (sender, frames) in sender().prop_flat_map(|sender| (Just(sender), frames(sender))),
        frame in limit(),
        message in limit(),
    ) {
        let mut tracker = Tracker::new(sender, Rsv::Deflate, Limits { frame, message });
        let mut so_far = 0;
        for sent in frames {
            let length = sent.payload as u64;
            let data = !sent.opcode.is_control();
            so_far += if data { length } else { 0 };
            let step = tracker.step(&sent.header());
            if length > frame {
                prop_assert_eq!(step, Err(Violation::FrameTooBig));
                return Ok(());
            }
            if data && so_far > message {
                prop_assert_eq!(step, Err(Violation::MessageTooBig));
                return Ok(());
            }
            prop_assert!(matches!(step, Ok((_, Step::Header(_)))), "{step:?}");
            prop_assert!(matches!(tracker.step(&vec![0; sent.payload]), Ok((used, Step::End(_))) if used == sent.payload));
            if data && sent.fin {
                so_far = 0;
            }
        }
    }
}

/// What a tracker keeps is a header and a few numbers, whatever comes: no payload, and nothing on the heap.
#[test]
fn the_state_is_small() {
    const { assert!(!std::mem::needs_drop::<Tracker>()) };
    const { assert!(size_of::<Position>() <= 32) };
    let mut tracker = Tracker::new(Sender::Client, Rsv::None, NO_LIMITS);
    let header = [0x82, 0xFF, 0, 0, 0, 0, 0, 1, 0, 0, 1, 2, 3, 4];
    for (at, byte) in header[..MAX_HEADER - 1].iter().enumerate() {
        assert_eq!(tracker.step(&[*byte]), Ok((1, Step::More)));
        assert_eq!(usize::from(tracker.position.have), at + 1);
    }
    assert!(matches!(tracker.step(&header[MAX_HEADER - 1..]), Ok((1, Step::Header(_)))));
    assert!(!tracker.at_boundary());
    // 64 KiB of payload leave nothing behind.
    assert!(matches!(tracker.step(&vec![7; 0x1_0000]), Ok((0x1_0000, Step::End(_)))));
    assert_eq!((tracker.position.have, tracker.at_boundary()), (0, true));
}

/// Each rule on its own: the frames that break it byte by byte, and their nearest neighbours that do not.
#[test]
fn every_violation_by_its_bytes() {
    use Sender::{Client, Server};
    use Violation as V;
    const LIMITS: Limits = Limits { frame: 200, message: 300 };
    const LARGE: Limits = NO_LIMITS;
    type Row<'a> = (Sender, Rsv, Limits, &'a [&'a [u8]], Option<Violation>);
    let rows: &[Row<'_>] = &[
        // Reserved opcodes: 3 to 7 and 0xB to 0xF.
        (Server, Rsv::Any, LARGE, &[&[0x83, 0]], Some(V::Opcode)),
        (Server, Rsv::Any, LARGE, &[&[0x87, 0]], Some(V::Opcode)),
        (Server, Rsv::Any, LARGE, &[&[0x8B, 0]], Some(V::Opcode)),
        (Server, Rsv::Any, LARGE, &[&[0x8F, 0]], Some(V::Opcode)),
        (Server, Rsv::Any, LARGE, &[&[0x82, 0]], None),
        (Server, Rsv::Any, LARGE, &[&[0x8A, 0]], None),
        // Reserved bits without an extension, and with permessage-deflate where they do not belong.
        (Server, Rsv::None, LARGE, &[&[0xC1, 0]], Some(V::Rsv)),
        (Server, Rsv::None, LARGE, &[&[0xA1, 0]], Some(V::Rsv)),
        (Server, Rsv::None, LARGE, &[&[0x91, 0]], Some(V::Rsv)),
        (Server, Rsv::Deflate, LARGE, &[&[0xC1, 0]], None),
        (Server, Rsv::Deflate, LARGE, &[&[0xA1, 0]], Some(V::Rsv)),
        (Server, Rsv::Deflate, LARGE, &[&[0xD1, 0]], Some(V::Rsv)),
        (Server, Rsv::Deflate, LARGE, &[&[0xC9, 0]], Some(V::Rsv)),
        (Server, Rsv::Deflate, LARGE, &[&[0x41, 0], &[0xC0, 0]], Some(V::Rsv)),
        (Server, Rsv::Any, LARGE, &[&[0xF1, 0]], None),
        (Server, Rsv::Any, LARGE, &[&[0xF9, 0]], None),
        // Masks.
        (Client, Rsv::None, LARGE, &[&[0x81, 0]], Some(V::Unmasked)),
        (Client, Rsv::None, LARGE, &[&[0x81, 0x80, 1, 2, 3, 4]], None),
        (Server, Rsv::None, LARGE, &[&[0x81, 0x80, 1, 2, 3, 4]], Some(V::Masked)),
        // Lengths in more bytes than needed, or negative.
        (Server, Rsv::None, LARGE, &[&[0x82, 126, 0, 125]], Some(V::Length)),
        (Server, Rsv::None, LARGE, &[&[0x82, 126, 0, 126]], None),
        (Server, Rsv::None, LARGE, &[&[0x82, 127, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF]], Some(V::Length)),
        (Server, Rsv::None, LARGE, &[&[0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0]], None),
        (Server, Rsv::None, LARGE, &[&[0x82, 127, 0x80, 0, 0, 0, 0, 0, 0, 0]], Some(V::Length)),
        (Server, Rsv::None, LARGE, &[&[0x82, 127, 0x7F, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF]], None),
        // Control frames: whole and at most 125 bytes.
        (Server, Rsv::None, LARGE, &[&[0x09, 0]], Some(V::Control)),
        (Server, Rsv::None, LARGE, &[&[0x08, 0]], Some(V::Control)),
        (Server, Rsv::None, LARGE, &[&[0x89, 126]], Some(V::Control)),
        (Server, Rsv::None, LARGE, &[&[0x88, 127]], Some(V::Control)),
        (Server, Rsv::None, LARGE, &[&[0x89, 125]], None),
        // Fragments: none without a beginning, no beginning inside a message.
        (Server, Rsv::None, LARGE, &[&[0x80, 0]], Some(V::Fragments)),
        (Server, Rsv::None, LARGE, &[&[0x00, 0]], Some(V::Fragments)),
        (Server, Rsv::None, LARGE, &[&[0x01, 0], &[0x81, 0]], Some(V::Fragments)),
        (Server, Rsv::None, LARGE, &[&[0x01, 0], &[0x80, 0], &[0x80, 0]], Some(V::Fragments)),
        (Server, Rsv::None, LARGE, &[&[0x01, 0], &[0x89, 0], &[0x80, 0], &[0x82, 0]], None),
        // Sizes: exactly the limit is allowed.
        (Server, Rsv::None, LIMITS, &[&[0x82, 126, 0, 200]], None),
        (Server, Rsv::None, LIMITS, &[&[0x82, 126, 0, 201]], Some(V::FrameTooBig)),
        (Server, Rsv::None, LIMITS, &[&[0x02, 126, 0, 200], &[0x80, 100]], None),
        (Server, Rsv::None, LIMITS, &[&[0x02, 126, 0, 200], &[0x80, 101]], Some(V::MessageTooBig)),
        (Server, Rsv::None, LIMITS, &[&[0x02, 126, 0, 200], &[0x89, 125], &[0x80, 100], &[0x82, 126, 0, 200]], None),
    ];
    let mut broken = BTreeSet::new();
    for (sender, rsv, limits, headers, expected) in rows {
        let mut tracker = Tracker::new(*sender, *rsv, *limits);
        let (last, before) = headers.split_last().expect("no row is empty");
        for header in before {
            let Ok((_, Step::Header(header))) = tracker.step(header) else { panic!("{header:x?} is refused") };
            let payload = vec![0; usize::try_from(header.payload).unwrap()];
            assert!(matches!(tracker.step(&payload), Ok((_, Step::End(_)))));
        }
        let result = tracker.step(last);
        assert_eq!(result.err(), *expected, "{sender:?} {rsv:?} {headers:x?}: {result:?}");
        broken.extend(expected.map(|violation| format!("{violation:?}")));
    }
    // The relay finds this one, in the payload.
    for (payload, violation) in [(&[3_u8][..], V::Close), (&[3, 0xED], V::Close), (&[3, 0xE8, 0xFF], V::CloseReason)] {
        assert_eq!(CloseFrame::read(payload, None), Err(violation));
        broken.insert(format!("{violation:?}"));
    }
    // A new variant does not get through here without a row above.
    let of = |violation| match violation {
        V::Opcode | V::Rsv | V::Unmasked | V::Masked | V::Length | V::Control | V::Fragments | V::Close => 1002,
        V::CloseReason | V::Text => 1007,
        V::FrameTooBig | V::MessageTooBig | V::TooMuch => 1009,
        V::ControlFlood | V::Uninvited | V::Late => 1008,
        V::Binary => 1003,
        V::Memory => 1013,
    };
    let all = [
        V::Opcode,
        V::Rsv,
        V::Unmasked,
        V::Masked,
        V::Length,
        V::Control,
        V::Fragments,
        V::Close,
        V::CloseReason,
        V::FrameTooBig,
        V::MessageTooBig,
        V::ControlFlood,
        V::Uninvited,
        V::Binary,
        V::Text,
        V::TooMuch,
        V::Late,
        V::Memory,
    ];
    // A matter of time, which the relay counts; and of what a message is and takes, which its reader knows.
    let of_readers = [V::ControlFlood, V::Uninvited, V::Binary, V::Text, V::TooMuch, V::Late, V::Memory];
    broken.extend(of_readers.map(|violation| format!("{violation:?}")));
    assert_eq!(broken, all.iter().map(|violation| format!("{violation:?}")).collect());
    for violation in all {
        assert_eq!(violation.code().get(), of(violation));
    }
}

/// What is wrong in the first two bytes is refused before the rest of the header came; what is right is not hurried.
#[test]
fn the_first_two_bytes_are_judged_at_once() {
    for (bytes, expected) in [
        ([0xC2, 0xFE], Err(Violation::Rsv)),
        ([0x82, 0x7E], Err(Violation::Unmasked)),
        ([0x89, 0xFF], Err(Violation::Control)),
        ([0x80, 0xFE], Err(Violation::Fragments)),
        ([0x83, 0x80], Err(Violation::Opcode)),
        ([0x82, 0x80], Ok((2, Step::More))),
        ([0x82, 0xFF], Ok((2, Step::More))),
    ] {
        assert_eq!(first(Tracker::new(Sender::Client, Rsv::None, NO_LIMITS), &bytes), expected, "{bytes:x?}");
    }
}
