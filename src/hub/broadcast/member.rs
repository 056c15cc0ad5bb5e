//! One client among those who get the same messages: where it is in them.

use std::{
    fmt,
    task::{Context, Poll, Waker, ready},
};

use bytes::Bytes;

use super::{Present, ring, ward::Bed};
use crate::{
    admission::Admission,
    hub::{
        SlowClient,
        inbox::{Inbox, Takes, Terms},
        leg::{self, Found},
        memory::Memory,
        turnstile::Ticket,
    },
    metrics::Gap,
};

/// See the module.
pub(super) struct Member {
    present: Present,
    /// Which of its worker's.
    id: u64,
    worker: usize,
    /// The next message.
    at: u64,
    /// For what it says: its place among those who wait for room.
    ticket: Ticket,
    /// Who has memory for what is not whole.
    admission: Admission,
    bed: Option<Bed>,
    /// The reference to the hub: given back with the leg.
    _lease: Box<dyn fmt::Debug + Send + Sync>,
}

impl Member {
    /// From message `at` on.
    pub(super) fn new(
        present: Present,
        at: u64,
        worker: usize,
        admission: Admission,
        lease: Box<dyn fmt::Debug + Send + Sync>,
    ) -> Self {
        let (id, ticket) = (present.number(), Ticket::default());
        Self { present, id, worker, at, ticket, admission, bed: None, _lease: lease }
    }

    /// It is behind by more than is kept. Gives whether it goes on.
    fn fall_behind(&mut self) -> bool {
        let hub = self.present.hub();
        let action = hub.sharing.slow_client;
        hub.metrics.slow_client(action as usize);
        match action {
            SlowClient::Disconnect => return false,
            SlowClient::DropOldest => self.at = hub.ring.first(),
            SlowClient::Conflate => self.at = hub.ring.behind(1),
        }
        hub.metrics.gap(Gap::Slow);
        hub.known.gap();
        true
    }

    fn wait_for_news(&mut self, waker: &Waker, holds: Option<u64>) {
        let ward = &self.present.hub().wards[self.worker];
        self.bed = Some(ward.wait(self.id, self.bed, waker, holds));
    }
}

impl leg::Member for Member {
    fn inbox(&self) -> Inbox {
        let hub = self.present.hub();
        let takes = if hub.inbound.is_some() { Takes::Anything } else { Takes::Nothing };
        let terms = Terms { patience: hub.hold_timeout, admission: self.admission.clone() };
        Inbox::new(takes, hub.max_message).on(terms)
    }

    fn poll_take(&mut self, cx: &Context<'_>, rest: &mut Bytes, buffer: &mut [u8]) -> Poll<Found> {
        let mut is_waiting = false;
        loop {
            match self.present.hub().ring.read(&mut self.at, rest, buffer) {
                ring::Found::Bytes(count, messages) => return Poll::Ready(Found::Bytes(count, messages)),
                ring::Found::Behind if self.fall_behind() => {}
                ring::Found::Behind => return Poll::Ready(Found::Slow),
                // What came in between would else be missed.
                ring::Found::Nothing if !is_waiting => {
                    self.wait_for_news(cx.waker(), None);
                    is_waiting = true;
                }
                ring::Found::Nothing => return Poll::Pending,
                ring::Found::Over(end) => return Poll::Ready(Found::Over(end)),
            }
        }
    }

    fn take_last(&mut self, rest: &mut Bytes, buffer: &mut [u8]) -> Option<(usize, u64)> {
        match self.present.hub().ring.read(&mut self.at, rest, buffer) {
            ring::Found::Bytes(count, messages) => Some((count, messages)),
            ring::Found::Behind | ring::Found::Nothing | ring::Found::Over(_) => None,
        }
    }

    fn poll_say(&mut self, cx: &Context<'_>, message: &(bool, Bytes), memory: Option<&mut Memory>) -> Poll<()> {
        if let Some(inbound) = &self.present.hub().inbound {
            ready!(inbound.poll_push(cx, &mut self.ticket, message, memory));
        }
        Poll::Ready(())
    }

    fn take_back(&mut self) {
        if let Some(inbound) = &self.present.hub().inbound {
            inbound.leave(&mut self.ticket);
        }
    }

    fn hold(&mut self, cx: &Context<'_>) -> bool {
        if self.present.hub().sharing.slow_client != SlowClient::Disconnect {
            return false;
        }
        self.wait_for_news(cx.waker(), Some(self.at));
        // After that, or it could be missed.
        self.present.hub().ring.first() > self.at && !self.fall_behind()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        leg::Member::take_back(self);
        if let Some(bed) = self.bed {
            self.present.hub().wards[self.worker].leave(self.id, bed);
        }
    }
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("at", &self.at).finish_non_exhaustive()
    }
}
