//! One client among those who get the same messages: where it is in them, and what it says.
//!
//! To its relay it is the backend's leg. It keeps no message: at most the rest of one that did not fit into a read, and a few answers.

use std::{
    fmt, io,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use bytes::{Buf as _, Bytes};

use super::{Present, ring::Found, ward::Bed};
use crate::{
    admission::Admission,
    hub::{
        End,
        inbox::{Inbox, Said, Takes, Terms, answer_to_close},
        turnstile::Ticket,
    },
    metrics::{Gap, Traffic},
    net::{Fault, Local},
    upstream::SlowClient,
    ws::Violation,
};

/// Answers that wait for a client that does not read; then nothing more is read of it.
const ANSWERS: usize = 1024;

/// See the module.
pub(super) struct Leg {
    present: Present,
    /// Which of its worker's.
    id: u64,
    worker: usize,
    traffic: Arc<Traffic>,
    /// The next message.
    at: u64,
    /// Of the last one, what did not fit.
    rest: Bytes,
    state: State,
    /// To be said between two messages.
    answers: Vec<u8>,
    inbox: Option<Box<Inbox>>,
    /// A message for the backend that waits for room; until then nothing more is heard.
    outbox: Option<(bool, Bytes)>,
    /// Its place there.
    ticket: Ticket,
    /// Who has memory for what is not whole.
    admission: Admission,
    bed: Option<Bed>,
    /// Whoever found nothing to be read.
    reader: Option<Waker>,
    /// The reference to the hub: given back with the leg.
    _lease: Box<dyn fmt::Debug + Send + Sync>,
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
    /// From message `at` on.
    pub(super) fn new(
        present: Present,
        at: u64,
        worker: usize,
        traffic: Arc<Traffic>,
        admission: Admission,
        lease: Box<dyn fmt::Debug + Send + Sync>,
    ) -> Self {
        let id = present.number();
        Self {
            present,
            id,
            worker,
            traffic,
            at,
            rest: Bytes::new(),
            state: State::Open,
            answers: Vec::new(),
            inbox: None,
            outbox: None,
            ticket: Ticket::default(),
            admission,
            bed: None,
            reader: None,
            _lease: lease,
        }
    }

    /// It is behind by more than is kept. Gives whether it goes on.
    fn fall_behind(&mut self) -> Result<(), Fault> {
        let hub = self.present.hub();
        let action = hub.sharing.slow_client;
        hub.metrics.slow_client(action as usize);
        match action {
            SlowClient::Disconnect => {
                self.state = State::Faulty;
                return Err(Fault::Slow);
            }
            SlowClient::DropOldest => self.at = hub.ring.first(),
            SlowClient::Conflate => self.at = hub.ring.behind(1),
        }
        hub.metrics.gap(Gap::Slow);
        Ok(())
    }

    fn wait_for_news(&mut self, waker: &Waker, holds: Option<u64>) {
        let ward = &self.present.hub().wards[self.worker];
        self.bed = Some(ward.wait(self.id, self.bed, waker, holds));
    }

    /// Something is to be read that was not before.
    fn wake_reader(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    fn poll_ring(&mut self, cx: &Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut is_waiting = false;
        loop {
            let hub = self.present.hub();
            match hub.ring.read(&mut self.at, &mut self.rest, buffer) {
                Found::Bytes(count, messages) => {
                    self.traffic.deliver(messages);
                    return Poll::Ready(Ok(count));
                }
                Found::Behind => self.fall_behind()?,
                // What came in between would else be missed.
                Found::Nothing if !is_waiting => {
                    self.wait_for_news(cx.waker(), None);
                    is_waiting = true;
                }
                Found::Nothing => return Poll::Pending,
                Found::Over(End::Lost) => {
                    self.state = State::Over;
                    return Poll::Ready(Ok(0));
                }
                Found::Over(End::Close(frame)) => {
                    self.state = State::Answering;
                    self.answers = frame.to_vec();
                    return Poll::Ready(Ok(take(&mut self.answers, buffer)));
                }
            }
        }
    }

    /// What its client says, as far as it may, up to the next message. Gives how many bytes that was.
    fn hear(&mut self, bytes: &[u8]) -> Result<usize, Violation> {
        let hub = Arc::clone(self.present.hub());
        let new = || {
            let takes = if hub.inbound.is_some() { Takes::Anything } else { Takes::Nothing };
            let terms = Terms { patience: hub.hold_timeout, admission: self.admission.clone() };
            Box::new(Inbox::new(takes, hub.max_message).on(terms))
        };
        let inbox = self.inbox.get_or_insert_with(new);
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

    /// Passes on what it has for the backend; ready when that was all.
    fn poll_send(&mut self, cx: &Context<'_>) -> Poll<()> {
        if let Some(message) = &self.outbox {
            if let Some(inbound) = &self.present.hub().inbound {
                std::task::ready!(inbound.poll_push(cx, &mut self.ticket, message));
            }
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

    fn take_back(&mut self) {
        self.outbox = None;
        if let Some(inbound) = &self.present.hub().inbound {
            inbound.leave(&mut self.ticket);
        }
    }

    fn refuse(&mut self, violation: Violation) -> Fault {
        self.state = State::Faulty;
        self.take_back();
        self.inbox = None;
        Fault::Broke(violation)
    }
}

/// Moves what fits.
fn take(from: &mut Vec<u8>, buffer: &mut [u8]) -> usize {
    let count = from.len().min(buffer.len());
    buffer[..count].copy_from_slice(&from[..count]);
    from.drain(..count);
    if from.is_empty() {
        *from = Vec::new();
    }
    count
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
            let hub = self.present.hub();
            if let Found::Bytes(count, messages) = hub.ring.read(&mut self.at, &mut self.rest, buffer) {
                self.traffic.deliver(messages);
                return Poll::Ready(Ok(count));
            }
        }
        if !self.answers.is_empty() {
            return Poll::Ready(Ok(take(&mut self.answers, buffer)));
        }
        let polled = match self.state {
            State::Open => {
                self.look_for_end(cx)?;
                self.poll_ring(cx, buffer)
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
        std::task::ready!(self.poll_send(cx));
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
        if self.present.hub().sharing.slow_client != SlowClient::Disconnect {
            return Ok(());
        }
        self.wait_for_news(cx.waker(), Some(self.at));
        // After that, or it could be missed.
        if self.present.hub().ring.first() > self.at {
            self.fall_behind()?;
        }
        Ok(())
    }
}

impl Drop for Leg {
    fn drop(&mut self) {
        self.take_back();
        if let Some(bed) = self.bed {
            self.present.hub().wards[self.worker].leave(self.id, bed);
        }
    }
}

impl fmt::Debug for Leg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leg").field("at", &self.at).field("state", &self.state).finish_non_exhaustive()
    }
}
