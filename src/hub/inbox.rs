//! What a client says to its leg within this process: frames into messages and answers.
//!
//! The relay has looked at the frames before, and passes control frames on whole. Kept is at most one message, as far as it has come.

use std::{
    future::Future as _,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::time::{Instant, Sleep, sleep};

use crate::{
    admission::Admission,
    hub::memory::{Memory, PORTION},
    ws::{
        CloseFrame, Header, Limits, Opcode, Rsv, Sender, Step, Tracker, Violation,
        frame::{ControlFrame, MAX_CONTROL, apply_mask},
    },
};

/// What a client says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Said {
    /// A whole message; true: text, which is UTF-8.
    Message(bool, Bytes),
    /// Its Ping is to be answered by this.
    Answer(Box<[u8]>),
    /// Its Close, and the answer to that: the last.
    Close(Box<[u8]>),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Inbox {
    tracker: Tracker,
    takes: Takes,
    /// Of the frame that is being read, as far as it has come; unmasked when it is whole.
    frame: BytesMut,
    /// Its fragments before.
    message: BytesMut,
    is_text: bool,
    /// A message is under way.
    has_begun: bool,
    terms: Option<Terms>,
    /// For what is kept, until [`Inbox::release`].
    memory: Option<Memory>,
    /// When the message has to be whole, or to have come to another portion than this.
    late: Option<(Pin<Box<Sleep>>, usize)>,
}

/// What a message may take that is not whole yet.
#[derive(Debug, Clone)]
pub(super) struct Terms {
    /// For each portion of it.
    pub(super) patience: Duration,
    /// Who has the memory.
    pub(super) admission: Admission,
}

/// Which messages a client may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Takes {
    Nothing,
    Anything,
    Text,
}

impl Inbox {
    /// At a client's first frame. `limit`: of a message, in bytes.
    pub(super) fn new(takes: Takes, limit: u64) -> Self {
        let tracker = Tracker::new(Sender::Client, Rsv::None, Limits { frame: limit, message: limit });
        Self {
            tracker,
            takes,
            frame: BytesMut::new(),
            message: BytesMut::new(),
            is_text: false,
            has_begun: false,
            terms: None,
            memory: None,
            late: None,
        }
    }

    /// What is not whole takes no more than that.
    pub(super) fn on(self, terms: Terms) -> Self {
        Self { memory: Some(Memory::new(&terms.admission)), terms: Some(terms), ..self }
    }

    /// The next thing in `bytes` that is whole, which are moved on behind it; `None`: more is to come.
    ///
    /// After an error it must not be asked again.
    pub(super) fn next(&mut self, bytes: &mut &[u8]) -> Result<Option<Said>, Violation> {
        loop {
            let is_payload = self.tracker.payload_begun().is_some();
            let (used, step) = self.tracker.step(bytes).map_err(|violation| match violation {
                // The relay has looked for what no client may send: the limit here is another one.
                Violation::FrameTooBig | Violation::MessageTooBig => Violation::TooMuch,
                other => other,
            })?;
            let (chunk, rest) = bytes.split_at(used);
            *bytes = rest;
            if is_payload {
                self.fit(self.message.capacity() + grown(&self.frame, chunk.len()))?;
                self.frame.extend_from_slice(chunk);
            }
            match step {
                Step::More => return Ok(None),
                Step::Header(header) => self.begin(header)?,
                Step::End(header) => {
                    let said = self.end(header)?;
                    if said.is_some() {
                        return Ok(said);
                    }
                }
            }
        }
    }

    /// Refuses what is not for it before it is kept.
    fn begin(&mut self, header: Header) -> Result<(), Violation> {
        match (header.opcode, self.takes) {
            (Opcode::Text | Opcode::Binary, Takes::Nothing) => Err(Violation::Uninvited),
            (Opcode::Binary, Takes::Text) => Err(Violation::Binary),
            (Opcode::Text | Opcode::Binary, _) => {
                self.is_text = header.opcode == Opcode::Text;
                self.has_begun = true;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Of a message, as far as it has come.
    fn kept(&self) -> usize {
        self.message.len() + self.frame.len()
    }

    /// Takes what these bytes need.
    fn fit(&mut self, bytes: usize) -> Result<(), Violation> {
        let has_memory = self.memory.as_mut().is_none_or(|memory| memory.fit(bytes));
        if has_memory { Ok(()) } else { Err(Violation::Memory) }
    }

    /// What was taken for the last message, for whoever has that from now on.
    pub(super) fn memory(&mut self) -> Option<&mut Memory> {
        self.memory.as_mut()
    }

    /// The last message is somebody else's by now.
    pub(super) fn release(&mut self) {
        if let Some(memory) = &mut self.memory {
            memory.fit(0);
        }
    }

    /// Ready when the message that is under way goes on too slowly. To be asked after all that came.
    pub(super) fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<Violation> {
        let patience = self.terms.as_ref().filter(|_| self.has_begun).map(|terms| terms.patience);
        let Some(patience) = patience else {
            self.late = None;
            return Poll::Pending;
        };
        let portion = self.kept() / PORTION;
        let (timer, since) = self.late.get_or_insert_with(|| (Box::pin(sleep(patience)), portion));
        if std::mem::replace(since, portion) != portion {
            timer.as_mut().reset(Instant::now() + patience);
        }
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Violation::Late)
    }

    fn end(&mut self, header: Header) -> Result<Option<Said>, Violation> {
        let mut payload = std::mem::take(&mut self.frame);
        if let Some(mask) = header.mask {
            apply_mask(&mut payload, mask);
        }
        match header.opcode {
            Opcode::Ping => Ok(Some(Said::Answer(ControlFrame::new(Opcode::Pong, &payload, None).as_bytes().into()))),
            Opcode::Pong => Ok(None),
            Opcode::Close => {
                let close = CloseFrame::read(&payload, None)?;
                Ok(Some(Said::Close(CloseFrame::answer(close.code()).to_frame(None).as_bytes().into())))
            }
            Opcode::Text | Opcode::Binary | Opcode::Continuation => {
                if self.message.is_empty() {
                    self.message = payload;
                } else {
                    self.fit(grown(&self.message, payload.len()) + payload.capacity())?;
                    self.message.extend_from_slice(&payload);
                    drop(payload);
                }
                self.fit(self.message.capacity())?;
                if !header.fin {
                    return Ok(None);
                }
                self.has_begun = false;
                let message = std::mem::take(&mut self.message).freeze();
                if self.is_text && std::str::from_utf8(&message).is_err() {
                    return Err(Violation::Text);
                }
                Ok(Some(Said::Message(self.is_text, message)))
            }
        }
    }
}

/// Its bytes, with so many more: where there is no room for them it becomes twice as large.
fn grown(buffer: &BytesMut, more: usize) -> usize {
    let (needed, capacity) = (buffer.len() + more, buffer.capacity());
    if needed > capacity { needed.max(2 * capacity) } else { capacity }
}

/// The answer to the Close at the end of a write of the relay's after a fault: from then on that is all that counts. What waited before it
/// may begin anywhere in a frame, so it is looked for from the end.
pub(super) fn answer_to_close(bytes: &[u8]) -> Option<Box<[u8]>> {
    /// Before the payload: its first byte, its length, and the mask.
    const HEADER: usize = 2 + 4;
    (0..=MAX_CONTROL).find_map(|length| {
        let frame = &bytes[bytes.len().checked_sub(HEADER + length)?..];
        let is_close = frame[0] == 0x80 | Opcode::Close.bits() && usize::from(frame[1]) == 0x80 | length;
        let mut inbox = is_close.then(|| Inbox::new(Takes::Nothing, MAX_CONTROL as u64))?;
        match inbox.next(&mut &*frame) {
            Ok(Some(Said::Close(answer))) => Some(answer),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;
    use crate::hub::memory::tests::budget;

    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [1, 2, 3, 4];
        let length = u8::try_from(payload.len()).expect("a short one");
        let payload = payload.iter().zip(mask.iter().cycle()).map(|(byte, key)| byte ^ key);
        [first, 0x80 | length].into_iter().chain(mask).chain(payload).collect()
    }

    /// Whatever the portions, the same is said: fragments are joined, pings answered in between, a Close is the last. Method: all of it
    /// in portions of each length.
    #[test]
    fn frames_become_messages() {
        let all = [
            frame(0x01, b"he"),
            frame(0x89, b"you"),
            frame(0x80, b"llo"),
            frame(0x8a, b""),
            frame(0x82, &[0xff, 0]),
            frame(0x88, &[0x03, 0xe8, b'x']),
        ]
        .concat();
        let expected = [
            Said::Answer([0x8a, 3, b'y', b'o', b'u'].into()),
            Said::Message(true, Bytes::from_static(b"hello")),
            Said::Message(false, Bytes::from_static(&[0xff, 0])),
            Said::Close([0x88, 2, 0x03, 0xe8].into()),
        ];
        for portion in 1..=all.len() {
            let (mut inbox, mut said) = (Inbox::new(Takes::Anything, 100), Vec::new());
            for mut bytes in all.chunks(portion) {
                while let Some(more) = inbox.next(&mut bytes).expect("nothing wrong") {
                    said.push(more);
                }
                assert!(bytes.is_empty());
            }
            assert_eq!(said, expected, "{portion}");
        }
    }

    /// What a client may not say is refused at its header, control frames never are; text has to be UTF-8.
    #[test]
    fn what_is_not_for_it_is_refused() {
        let next = |takes, bytes: &[u8]| Inbox::new(takes, 100).next(&mut &*bytes);
        assert_eq!(next(Takes::Nothing, &frame(0x81, b"hi")[..6]), Err(Violation::Uninvited));
        assert_eq!(next(Takes::Nothing, &frame(0x02, b"hi")), Err(Violation::Uninvited));
        assert!(matches!(next(Takes::Nothing, &frame(0x89, b"hi")), Ok(Some(Said::Answer(_)))));
        assert_eq!(next(Takes::Text, &frame(0x82, b"hi")), Err(Violation::Binary));
        assert_eq!(next(Takes::Anything, &frame(0x81, &[0xff])), Err(Violation::Text));
        assert_eq!(answer_to_close(&frame(0x88, &[3, 0xe9])).as_deref(), Some(&[0x88, 2, 3, 0xe9][..]));
        assert_eq!(answer_to_close(&frame(0x81, b"hi")), None);
        // Behind what waited, from the middle of a frame on.
        let close = frame(0x88, &[&[3, 0xe9][..], &[b'x'; 123]].concat());
        let waited = frame(0x81, &[b'x'; 90]);
        for from in 0..waited.len() {
            let write = [&waited[from..], &close].concat();
            assert_eq!(answer_to_close(&write).as_deref(), Some(&[0x88, 2, 3, 0xe9][..]), "{from}");
            assert_eq!(answer_to_close(&write[..write.len() - 1]), None, "{from}");
        }
        assert_eq!(answer_to_close(&frame(0x88, b"")).as_deref(), Some(&[0x88, 0][..]));
        assert_eq!(answer_to_close(b"x"), None);
    }

    /// A message that has begun has its time for each portion, whatever comes in between, and takes memory. Method: a clock that is moved.
    #[test]
    fn half_a_message_is_not_kept_for_ever() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.expect("a runtime").block_on(async {
            let admission = budget(Some(3 * PORTION));
            let terms = Terms { patience: Duration::from_secs(30), admission };
            let inbox = || Inbox::new(Takes::Anything, 1 << 20).on(terms.clone());
            let says = async |inbox: &mut Inbox, bytes: &[u8], after: u64| {
                let said = inbox.next(&mut &*bytes).expect("nothing wrong").is_some();
                let late = async |inbox: &mut Inbox| poll_fn(|cx| Poll::Ready(inbox.poll_late(cx).is_ready())).await;
                assert!(!late(inbox).await);
                tokio::time::advance(Duration::from_secs(after)).await;
                (said, late(inbox).await)
            };
            let mut one = inbox();
            assert_eq!(says(&mut one, &frame(0x01, b""), 29).await, (false, false));
            assert_eq!(says(&mut one, &frame(0x80, b"x"), 99).await, (true, false));
            assert_eq!(says(&mut one, &frame(0x01, b"x"), 20).await, (false, false));
            assert_eq!(says(&mut one, &frame(0x89, b"x"), 11).await, (true, true));
            // Whoever has come to another portion has its time anew.
            let mut one = inbox();
            let portion = vec![0; PORTION];
            let header = [0x82, 0xff, 0, 0, 0, 0, 0, 8, 0, 0, 1, 2, 3, 4];
            assert_eq!(says(&mut one, &header, 20).await, (false, false));
            assert_eq!(says(&mut one, &portion, 20).await, (false, false));
            assert_eq!(says(&mut one, &portion, 31).await, (false, true));
            // Two portions are taken.
            let mut other = inbox();
            assert_eq!(says(&mut other, &header, 0).await, (false, false));
            assert_eq!(says(&mut other, &portion, 0).await, (false, false));
            assert_eq!(other.next(&mut &portion[..]), Err(Violation::Memory));
            drop(one);
            assert_eq!(inbox().next(&mut &[&header[..], &portion].concat()[..]), Ok(None));
            let too_much = [&header[..2], &[0, 0, 0, 0, 0, 17, 0, 0, 1, 2, 3, 4]].concat();
            assert_eq!(inbox().next(&mut &too_much[..]), Err(Violation::TooMuch));
        });
    }
}
