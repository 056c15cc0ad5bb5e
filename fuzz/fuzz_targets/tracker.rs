//! The tracker: no panic; the same events whatever the portions, also when whole frames are taken at once; a boundary is claimed exactly where a frame ends.
//!
//! The input is one byte that chooses role, reserved bits and limits, one that says how many portion sizes follow
//! (0 to 15), these sizes, and then the stream. The sizes are used in turn, a 0 as 256; without any it is fed whole.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::ws::{Header, Limits, Rsv, Sender, Step, Tracker, Violation};

/// A frame that ended, or at least has a header, and where its header and itself end in the stream.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    header: Header,
    header_end: usize,
    end: Option<usize>,
}

fuzz_target!(|input: &[u8]| {
    let [choice, count, rest @ ..] = input else { return };
    let Some((sizes, stream)) = rest.split_at_checked(usize::from(count & 15)) else { return };
    let tracker = tracker(*choice);
    let whole = run(tracker.clone(), stream, false, |_| stream.len());
    assert_eq!(whole, run(tracker.clone(), stream, true, |_| stream.len()), "whole frames, other events");
    let mut sizes = sizes.iter().cycle();
    let in_portions = run(tracker.clone(), stream, choice & 0x80 != 0, |_| match sizes.next() {
        Some(0) => 256,
        Some(size) => usize::from(*size),
        None => stream.len(),
    });
    assert_eq!(whole, in_portions, "other portions, other events");
    // Byte by byte every position is looked at; long payloads add nothing to it.
    let by_byte = run(tracker, &stream[..stream.len().min(512)], true, |_| 1);
    if stream.len() <= 512 {
        assert_eq!(whole, by_byte, "byte by byte, other events");
    }
});

fn tracker(choice: u8) -> Tracker {
    let sender = if choice & 1 == 0 { Sender::Client } else { Sender::Server };
    let rsv = [Rsv::None, Rsv::Deflate, Rsv::Any, Rsv::None][usize::from(choice >> 1 & 3)];
    let frame = [u64::MAX, 1 << 20, 200, 16][usize::from(choice >> 3 & 3)];
    let message = [u64::MAX, 1 << 21, 300, 16][usize::from(choice >> 5 & 3)];
    Tracker::new(sender, rsv, Limits { frame, message })
}

/// Feeds `stream` in portions and says what came of it; `by_frame`: whole frames are taken at once where there are any.
fn run(
    mut tracker: Tracker,
    stream: &[u8],
    by_frame: bool,
    mut portion: impl FnMut(usize) -> usize,
) -> (Vec<Seen>, Option<Violation>) {
    let mut seen: Vec<Seen> = Vec::new();
    let mut at = 0;
    assert!(tracker.at_boundary());
    while at < stream.len() {
        let until = (at + portion(at).max(1)).min(stream.len());
        loop {
            if by_frame {
                match tracker.whole(&stream[at..until]) {
                    Ok(Some((used, header))) => {
                        assert_eq!(used as u64, u64::from(header.size) + header.payload);
                        assert!(tracker.at_boundary());
                        seen.push(Seen { header, header_end: at + usize::from(header.size), end: Some(at + used) });
                        at += used;
                        continue;
                    }
                    Ok(None) => {}
                    Err(violation) => return (seen, Some(violation)),
                }
            }
            let (used, step) = match tracker.step(&stream[at..until]) {
                Ok(step) => step,
                Err(violation) => return (seen, Some(violation)),
            };
            at += used;
            match step {
                Step::More => break,
                Step::Header(header) => {
                    let start = seen.last().map_or(0, |last| last.end.expect("frames do not overlap"));
                    assert_eq!(at - start, usize::from(header.size));
                    assert!(!tracker.at_boundary());
                    assert_eq!(tracker.payload_begun(), Some(header));
                    seen.push(Seen { header, header_end: at, end: None });
                }
                Step::End(header) => {
                    let last = seen.last_mut().expect("a header comes before its end");
                    assert_eq!(last.header, header);
                    assert_eq!((at - last.header_end) as u64, header.payload);
                    last.end = Some(at);
                    assert!(tracker.at_boundary());
                    assert!(!header.opcode.is_control() || header.fin && header.payload <= 125);
                    let in_message = if header.opcode.is_control() { tracker.in_message() } else { !header.fin };
                    assert_eq!(tracker.in_message(), in_message);
                }
            }
        }
        assert_eq!(at, until, "a portion was not consumed");
        let at_end = seen.last().is_none_or(|last| last.end == Some(at)) && (at == 0 || !seen.is_empty());
        assert_eq!(tracker.at_boundary(), at_end);
    }
    (seen, None)
}
