//! One direction of a session: what was read and may not be passed on yet, and what the other side did not take yet.

use bytes::Bytes;
use tokio::time::Instant;

use crate::ws::{Limits, Opcode, Rsv, Sender, Tracker};

/// Bytes on their way from one side to the other.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) tracker: Tracker,
    /// What hyper had read beyond the handshake; comes before anything from the socket.
    pub(super) early: Bytes,
    /// The beginning of one small frame, or of a header. At most the hold limit and a header.
    pub(super) held: Vec<u8>,
    pub(super) held_since: Option<Instant>,
    /// Whole frames (and parts of large ones) that the other side did not take; from `taken` on. At most one scratch
    /// buffer and a control frame, since nothing is read while there are any.
    pending: Vec<u8>,
    taken: usize,
    /// The frame that is under way is not held: its bytes go on, or are discarded, as they come.
    pub(super) streams: bool,
    /// The other side has the beginning of a frame and not its end.
    pub(super) inside_frame: bool,
    /// When the other side last took bytes, or they first had to wait.
    pub(super) progress: Instant,
    /// When a part of a message last came that is not whole yet, or went to the other side after it had waited.
    pub(super) moved: Instant,
    /// When what had waited was last gone, or a frame that was not held ended.
    pub(super) unblocked: Instant,
    /// Text or Binary: the first frame of the message that is under way.
    pub(super) opcode: Opcode,
    pub(super) counts: Counts,
}

/// What went through a lane.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Whole data messages that were passed on.
    pub messages: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// Whole data messages that were discarded because an end had begun.
    pub crossed: u64,
}

impl Lane {
    pub(super) fn new(sender: Sender, rsv: Rsv, limits: Limits, early: &Bytes, now: Instant) -> Self {
        Self {
            tracker: Tracker::new(sender, rsv, limits),
            // Without anything in it, it would still hold the whole buffer that hyper read into.
            early: if early.is_empty() { Bytes::new() } else { Bytes::copy_from_slice(early) },
            held: Vec::new(),
            held_since: None,
            pending: Vec::new(),
            taken: 0,
            streams: false,
            inside_frame: false,
            progress: now,
            moved: now,
            unblocked: now,
            opcode: Opcode::Binary,
            counts: Counts::default(),
        }
    }

    /// What waits to be written.
    pub(super) fn pending(&self) -> &[u8] {
        &self.pending[self.taken..]
    }

    pub(super) fn has_pending(&self) -> bool {
        self.taken < self.pending.len()
    }

    /// Keeps what the other side did not take.
    pub(super) fn push(&mut self, bytes: &[u8], now: Instant) {
        if !self.has_pending() {
            self.progress = now;
        }
        // Exact: a stalled reader costs what it is owed and not the next power of two.
        self.pending.reserve_exact(bytes.len());
        self.pending.extend_from_slice(bytes);
    }

    /// The other side took `count` of the pending bytes. Memory is given back when it took all.
    pub(super) fn take(&mut self, count: usize, now: Instant) {
        self.taken += count;
        (self.progress, self.moved) = (now, now);
        if !self.has_pending() {
            self.unblocked = now;
            self.drop_pending();
        }
    }

    pub(super) fn drop_pending(&mut self) {
        self.pending = Vec::new();
        self.taken = 0;
    }

    /// Keeps the beginning of a frame. `continues`: of the same frame as before, so `bytes` begins with what is held.
    pub(super) fn hold(&mut self, bytes: &[u8], continues: bool, now: Instant) {
        if bytes.is_empty() {
            self.held = Vec::new();
            self.held_since = None;
        } else if continues {
            self.held.extend_from_slice(&bytes[self.held.len()..]);
            self.held_since.get_or_insert(now);
        } else {
            self.held.clear();
            self.held.extend_from_slice(bytes);
            self.held_since = Some(now);
        }
    }
}
