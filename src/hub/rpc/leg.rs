//! One client among those who ask on the same WebSocket. To its relay it is the backend's leg.

use std::{
    fmt, io,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf as _, Bytes};

use super::{
    Guest,
    core::Client,
    mailbox::{Found, Mailbox},
};
use crate::{
    hub::{
        End, Opener,
        inbox::{Inbox, Said, Takes, Terms, answer_to_close},
        key::Key,
    },
    metrics::Traffic,
    net::{Fault, Local},
    pool::Pool,
    ws::Violation,
};

/// Bytes of answers to Pings that wait for a client that does not read; then nothing more is read of it.
const ANSWERS: usize = 1024;

/// See the module.
pub(super) struct Leg {
    guest: Guest,
    client: Client,
    mailbox: Arc<Mailbox>,
    /// Of what it says.
    max_message: u64,
    terms: Terms,
    traffic: Arc<Traffic>,
    /// Of a message, what did not fit.
    rest: Bytes,
    state: State,
    /// To be said between two messages.
    answers: Vec<u8>,
    inbox: Option<Box<Inbox>>,
    /// A message for the hub that waits for room.
    outbox: Option<Bytes>,
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

impl Leg {
    /// One that its hub knows from now on.
    pub(super) fn new(
        guest: Guest,
        mailbox: Arc<Mailbox>,
        pool: Pool<Key, Opener>,
        max_message: u64,
        terms: Terms,
        traffic: Arc<Traffic>,
    ) -> Self {
        let client = guest.number();
        guest.queue().join(client, Arc::clone(&mailbox), pool);
        Self {
            guest,
            client,
            mailbox,
            max_message,
            terms,
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

    /// What its client says, up to the next message. Gives how many bytes that was.
    fn hear(&mut self, bytes: &[u8]) -> Result<usize, Violation> {
        let (limit, terms) = (self.max_message, &self.terms);
        let new = || Box::new(Inbox::new(Takes::Text, limit).on(terms.clone()));
        let inbox = self.inbox.get_or_insert_with(new);
        let mut rest = bytes;
        while self.outbox.is_none()
            && self.answers.len() <= ANSWERS
            && let Some(said) = inbox.next(&mut rest)?
        {
            match said {
                Said::Message(_, text) => self.outbox = Some(text),
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

    /// Passes on what it has for the hub; ready when that was all.
    fn poll_send(&mut self, cx: &Context<'_>) -> Poll<()> {
        if let Some(text) = &self.outbox {
            ready!(self.guest.queue().poll_say(cx, self.client, text));
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

    fn poll_mailbox(&mut self, cx: &Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        match ready!(self.mailbox.poll_take(cx, &mut self.rest, buffer)) {
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
}

impl Local for Leg {
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
            if let Poll::Ready(Found::Bytes(count, messages)) = self.mailbox.poll_take(cx, &mut self.rest, buffer) {
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
                self.poll_mailbox(cx, buffer)
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
        if self.mailbox.hold(cx) {
            self.state = State::Faulty;
            return Err(Fault::Slow.into());
        }
        Ok(())
    }
}

impl Drop for Leg {
    fn drop(&mut self) {
        self.guest.queue().leave(self.client);
    }
}

impl fmt::Debug for Leg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leg").field("client", &self.client).field("state", &self.state).finish_non_exhaustive()
    }
}
