//! One client among those who ask on the same WebSocket.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;

use super::{Guest, core::Client, mailbox::Mailbox};
use crate::{
    hub::{
        Opener,
        inbox::{Inbox, Takes, Terms},
        key::Key,
        leg::{self, Found},
        memory::Memory,
        turnstile::Ticket,
    },
    pool::Pool,
};

/// See the module.
pub(super) struct Member {
    guest: Guest,
    client: Client,
    mailbox: Arc<Mailbox>,
    /// Of what it says.
    max_message: u64,
    terms: Terms,
    /// For what it says: its place among those who wait for room.
    ticket: Ticket,
}

impl Member {
    /// One that its hub knows from now on.
    pub(super) fn new(guest: Guest, mailbox: Mailbox, pool: Pool<Key, Opener>, max_message: u64, terms: Terms) -> Self {
        let (client, mailbox) = (guest.number(), Arc::new(mailbox));
        guest.queue().join(client, Arc::clone(&mailbox), pool);
        Self { guest, client, mailbox, max_message, terms, ticket: Ticket::default() }
    }
}

impl leg::Member for Member {
    fn inbox(&self) -> Inbox {
        Inbox::new(Takes::Text, self.max_message).on(self.terms.clone())
    }

    fn poll_take(&mut self, cx: &Context<'_>, rest: &mut Bytes, buffer: &mut [u8]) -> Poll<Found> {
        self.mailbox.poll_take(cx, rest, buffer)
    }

    fn take_last(&mut self, rest: &mut Bytes, buffer: &mut [u8]) -> Option<(usize, u64)> {
        self.mailbox.take_last(rest, buffer)
    }

    fn poll_say(&mut self, cx: &Context<'_>, (_, text): &(bool, Bytes), memory: Option<&mut Memory>) -> Poll<()> {
        self.guest.queue().poll_say(cx, self.client, &mut self.ticket, text, memory)
    }

    fn take_back(&mut self) {
        self.guest.queue().take_back(self.client, &mut self.ticket);
    }

    fn hold(&mut self, cx: &Context<'_>) -> bool {
        self.mailbox.hold(cx)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.guest.queue().leave(self.client, &mut self.ticket);
    }
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("client", &self.client).finish_non_exhaustive()
    }
}
