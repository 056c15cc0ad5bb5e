//! One client among those who share a WebSocket. To its relay it is the backend's leg.
//!
//! It keeps no message: at most the rest of one that did not fit into a read, one that waits for room, and a few answers. Where its client's
//! messages go, and where those for it are, is for its [`Member`] to know: `broadcast/member.rs`, `rpc/member.rs`.

use std::{
    fmt, io,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf as _, Bytes};

use super::{
    End,
    inbox::{Inbox, Said, answer_to_close},
    memory::Memory,
};
use crate::{
    metrics::Traffic,
    net::{Fault, Local},
    ws::Violation,
};

/// Bytes of answers that wait for a client that does not read; then nothing more is read of it.
const ANSWERS: usize = 1024;

/// What a client is in its room. Dropped, it has left.
pub(super) trait Member: fmt::Debug + Send + Sync + 'static {
    /// For what its client says, from its first frame on.
    fn inbox(&self) -> Inbox;

    /// Moves what is for it and fits; of the last message the rest goes to `rest`, which is empty.
    fn poll_take(&mut self, cx: &Context<'_>, rest: &mut Bytes, buffer: &mut [u8]) -> Poll<Found>;

    /// The same of what is there already: bytes, and of how many messages. Whether it is too slow does not count any more.
    fn take_last(&mut self, rest: &mut Bytes, buffer: &mut [u8]) -> Option<(usize, u64)>;

    /// Passes on what its client says, of which is said whether it is text, as soon as there is room; with the memory that was taken for it.
    fn poll_say(&mut self, cx: &Context<'_>, message: &(bool, Bytes), memory: Option<&mut Memory>) -> Poll<()>;

    /// What waits for room is not to be said any more.
    fn take_back(&mut self);

    /// It can't take anything now. Whether it is too slow.
    fn hold(&mut self, cx: &Context<'_>) -> bool;
}

/// What there is for a client.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Bytes, of so many messages that it begins with.
    Bytes(usize, u64),
    /// More than is kept for it.
    Slow,
    /// Nothing any more.
    Over(End),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Leg<M> {
    member: M,
    traffic: Arc<Traffic>,
    /// Of a message, what did not fit.
    rest: Bytes,
    state: State,
    /// To be said between two messages.
    answers: Vec<u8>,
    inbox: Option<Box<Inbox>>,
    /// A message of its client's that waits for room; until then nothing more is heard.
    outbox: Option<(bool, Bytes)>,
    /// Whoever found nothing to be read.
    reader: Option<Waker>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// It was said what is wrong with its client: only its Close counts.
    Faulty,
    /// Its Close is here: what has come by now goes out, then the answer.
    Closing,
    /// Only the answer.
    Answering,
    /// Nothing more comes.
    Over,
}

impl<M: Member> Leg<M> {
    /// Of one who has just come. `traffic`: of its worker.
    pub(super) fn new(member: M, traffic: Arc<Traffic>) -> Self {
        Self {
            member,
            traffic,
            rest: Bytes::new(),
            state: State::Open,
            answers: Vec::new(),
            inbox: None,
            outbox: None,
            reader: None,
        }
    }

    /// Something is to be read that was not before.
    fn wake_reader(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    fn poll_member(&mut self, cx: &Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        match ready!(self.member.poll_take(cx, &mut self.rest, buffer)) {
            Found::Bytes(count, messages) => {
                self.traffic.deliver(messages);
                Poll::Ready(Ok(count))
            }
            Found::Slow => {
                self.state = State::Faulty;
                Poll::Ready(Err(Fault::Slow.into()))
            }
            Found::Over(End::Lost) => {
                self.state = State::Over;
                Poll::Ready(Ok(0))
            }
            Found::Over(End::Close(frame)) => {
                self.state = State::Answering;
                self.answers = frame.to_vec();
                Poll::Ready(Ok(self.take_answers(buffer)))
            }
        }
    }

    /// What its client says, as far as it may, up to the next message. Gives how many bytes that was.
    fn hear(&mut self, bytes: &[u8]) -> Result<usize, Violation> {
        let inbox = self.inbox.get_or_insert_with(|| Box::new(self.member.inbox()));
        let mut rest = bytes;
        while self.outbox.is_none()
            && self.answers.len() <= ANSWERS
            && let Some(said) = inbox.next(&mut rest)?
        {
            match said {
                Said::Message(is_text, payload) => self.outbox = Some((is_text, payload)),
                Said::Answer(answer) => self.answers.extend_from_slice(&answer),
                Said::Close(answer) => {
                    self.answers.extend_from_slice(&answer);
                    self.state = State::Closing;
                    break;
                }
            }
        }
        Ok(bytes.len() - rest.len())
    }

    /// Passes on what it has to say; ready when that was all.
    fn poll_send(&mut self, cx: &Context<'_>) -> Poll<()> {
        if let Some(message) = &self.outbox {
            ready!(self.member.poll_say(cx, message, self.inbox.as_mut().and_then(|inbox| inbox.memory())));
            self.outbox = None;
            if let Some(inbox) = &mut self.inbox {
                inbox.release();
            }
        }
        Poll::Ready(())
    }

    /// Whether what its client has begun to say takes too long.
    fn look_for_end(&mut self, cx: &mut Context<'_>) -> Result<(), Fault> {
        match self.inbox.as_mut().map(|inbox| inbox.poll_late(cx)) {
            Some(Poll::Ready(violation)) => Err(self.refuse(violation)),
            Some(Poll::Pending) | None => Ok(()),
        }
    }

    fn refuse(&mut self, violation: Violation) -> Fault {
        self.state = State::Faulty;
        self.member.take_back();
        (self.outbox, self.inbox) = (None, None);
        Fault::Broke(violation)
    }

    fn take_answers(&mut self, buffer: &mut [u8]) -> usize {
        let count = self.answers.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.answers[..count]);
        self.answers.drain(..count);
        if self.answers.is_empty() {
            self.answers = Vec::new();
        }
        count
    }
}

impl<M: Member> Local for Leg<M> {
    fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        if !self.rest.is_empty() {
            let count = self.rest.len().min(buffer.len());
            self.rest.copy_to_slice(&mut buffer[..count]);
            if self.rest.is_empty() {
                // Its message need not be kept for it.
                self.rest = Bytes::new();
            }
            return Poll::Ready(Ok(count));
        }
        // What had found no room. Of a client that has said its Close it comes before the answer.
        if self.outbox.is_some() && self.poll_send(cx).is_pending() && self.state == State::Closing {
            return Poll::Pending;
        }
        if self.state == State::Closing {
            self.state = State::Answering;
            if let Some((count, messages)) = self.member.take_last(&mut self.rest, buffer) {
                self.traffic.deliver(messages);
                return Poll::Ready(Ok(count));
            }
        }
        if !self.answers.is_empty() {
            return Poll::Ready(Ok(self.take_answers(buffer)));
        }
        let polled = match self.state {
            State::Open => {
                self.look_for_end(cx)?;
                self.poll_member(cx, buffer)
            }
            State::Faulty => Poll::Pending,
            State::Closing | State::Answering | State::Over => {
                self.state = State::Over;
                return Poll::Ready(Ok(0));
            }
        };
        if polled.is_pending() && !self.reader.as_ref().is_some_and(|reader| reader.will_wake(cx.waker())) {
            self.reader = Some(cx.waker().clone());
        }
        polled
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.state {
            State::Open => {}
            State::Faulty => {
                if let Some(answer) = answer_to_close(bytes) {
                    self.answers = answer.into();
                    self.state = State::Answering;
                    self.wake_reader();
                }
                return Poll::Ready(Ok(bytes.len()));
            }
            State::Closing | State::Answering | State::Over => return Poll::Ready(Ok(bytes.len())),
        }
        ready!(self.poll_send(cx));
        if self.answers.len() > ANSWERS {
            // Read by the same task, which then writes again.
            return Poll::Pending;
        }
        let heard = match self.hear(bytes) {
            Ok(heard) => heard,
            Err(violation) => return Poll::Ready(Err(self.refuse(violation).into())),
        };
        if !self.answers.is_empty() {
            self.wake_reader();
        }
        // What finds no room waits here, and holds up what its client says next.
        let _ = self.poll_send(cx);
        self.look_for_end(cx)?;
        Poll::Ready(Ok(heard))
    }

    fn finish(&mut self) {
        self.state = State::Over;
    }

    fn wait(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.outbox.is_some() {
            let _ = self.poll_send(cx);
        }
        if self.state != State::Open {
            return Ok(());
        }
        self.look_for_end(cx)?;
        if self.member.hold(cx) {
            self.state = State::Faulty;
            return Err(Fault::Slow.into());
        }
        Ok(())
    }
}
