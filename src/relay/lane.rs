//! One direction of a session: what was read and may not be passed on yet, and what the other side did not take yet.

use std::{
    io,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;

use super::poll_write;
use crate::{
    net::{Pipe, Stream},
    stamp::Stamp,
    ws::{Header, Opcode, Position, Rsv, Sender},
};

/// Bytes on their way from one side to the other.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) tracker: Position,
    /// `None` while there are none, as in an idle session.
    kept: Option<Box<Kept>>,
    /// Nothing has come since the runtime was asked to tell of it.
    pub(super) is_awaited: bool,
    /// The frame that is under way is not held: its bytes go on, or are discarded, as they come.
    pub(super) streams: bool,
    /// The other side has the beginning of a frame and not its end.
    pub(super) inside_frame: bool,
    /// Text or Binary: the first frame of the message that is under way.
    pub(super) opcode: Opcode,
    /// When its last byte came, by [`Stamp::short`]. Here it has a place where there would be nothing else.
    heard: u32,
    /// While bytes wait, or the other side is inside a frame: when it last took some, or they first had to wait. Else: since when neither
    /// is so.
    pub(super) progress: Stamp,
    /// Whole data messages that were passed on.
    pub(super) messages: u64,
    /// Bytes that were read.
    pub(super) bytes: u64,
}

/// The bytes of a lane.
#[derive(Debug, Default)]
struct Kept {
    /// What was read beyond the handshake; comes before anything from the socket.
    early: Bytes,
    /// The beginning of one small frame, or of a header. At most the hold limit and a header.
    held: Vec<u8>,
    held_since: Option<Stamp>,
    /// Whole frames (and parts of large ones) that the other side did not take; from `taken` on. At most one scratch
    /// buffer and a control frame, since nothing is read while there are any.
    pending: Vec<u8>,
    taken: usize,
    /// What the other side did not take of a large payload, where it is not in this process; goes before `pending`. Never empty.
    pipe: Option<Pipe>,
}

impl Lane {
    pub(super) fn new(sender: Sender, rsv: Rsv, early: &Bytes, now: Stamp) -> Self {
        // Without anything in it, it would still hold the whole buffer that it was read into.
        let kept =
            (!early.is_empty()).then(|| Box::new(Kept { early: Bytes::copy_from_slice(early), ..Kept::default() }));
        Self {
            tracker: Position::new(sender, rsv),
            kept,
            is_awaited: false,
            streams: false,
            inside_frame: false,
            opcode: Opcode::Binary,
            heard: now.short(),
            progress: now,
            messages: 0,
            bytes: 0,
        }
    }

    /// So many bytes came.
    pub(super) const fn has_read(&mut self, count: u64, now: Stamp) {
        self.bytes += count;
        self.heard = now.short();
    }

    /// For how long nothing has come. A side that is asked at all is asked more often than every 49 days.
    pub(super) fn silence(&self, now: Stamp) -> Duration {
        Duration::from_millis(now.short().wrapping_sub(self.heard).into())
    }

    /// The frame of `header` begins; up to `hold` bytes of payload are passed on only when whole.
    pub(super) fn begin(&mut self, header: Header, hold: usize, forwards: bool) {
        if matches!(header.opcode, Opcode::Text | Opcode::Binary) {
            self.opcode = header.opcode;
        }
        self.streams = header.payload > hold as u64;
        self.inside_frame = self.streams && forwards;
    }

    fn kept_mut(&mut self) -> &mut Kept {
        self.kept.get_or_insert_default()
    }

    /// Gives memory back when nothing is kept.
    fn tidy(&mut self) {
        self.kept.take_if(|kept| {
            kept.early.is_empty() && kept.held.is_empty() && kept.pending.is_empty() && kept.pipe.is_none()
        });
    }

    /// Of what was read beyond the handshake the next part, if there is one.
    pub(super) fn next_early(&mut self, into: &mut [u8]) -> Option<usize> {
        let early = &mut self.kept.as_mut()?.early;
        let count = early.len().min(into.len());
        into[..count].copy_from_slice(&early.split_to(count));
        self.tidy();
        (count > 0).then_some(count)
    }

    pub(super) fn has_early(&self) -> bool {
        self.kept.as_ref().is_some_and(|kept| !kept.early.is_empty())
    }

    /// The beginning of a frame that is not passed on yet.
    pub(super) fn held(&self) -> &[u8] {
        self.kept.as_ref().map_or(&[], |kept| &kept.held)
    }

    /// Since when it is held.
    pub(super) fn held_since(&self) -> Option<Stamp> {
        self.kept.as_ref().and_then(|kept| kept.held_since)
    }

    pub(super) fn has_pending(&self) -> bool {
        self.kept.as_ref().is_some_and(|kept| !kept.pending.is_empty() || kept.pipe.is_some())
    }

    /// Writes of what waits what comes first, as far as it is taken; [`Self::take`] is to be told of it.
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>, stream: &mut Option<Stream>) -> Poll<io::Result<usize>> {
        let Some(kept) = self.kept.as_deref_mut() else { return Poll::Ready(Ok(0)) };
        if let (Some(pipe), Some(stream)) = (&mut kept.pipe, &*stream) {
            match pipe.poll_empty(cx, stream) {
                Poll::Ready(Ok(Some(count))) => return Poll::Ready(Ok(count)),
                Poll::Ready(Ok(None)) => {
                    let rest = pipe.read();
                    kept.pipe = None;
                    kept.pending.splice(..kept.taken, rest?);
                    kept.taken = 0;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
        poll_write(stream, cx, &kept.pending[kept.taken..], false)
    }

    /// Keeps what is in a pipe, before all else that waits.
    pub(super) fn keep(&mut self, pipe: Pipe, now: Stamp) {
        self.progress = now;
        self.kept_mut().pipe = Some(pipe);
    }

    /// Keeps what the other side did not take.
    pub(super) fn push(&mut self, bytes: &[u8], now: Stamp) {
        if bytes.is_empty() {
            return;
        }
        if !self.has_pending() {
            self.progress = now;
        }
        let pending = &mut self.kept_mut().pending;
        // Exact: a stalled reader costs what it is owed and not the next power of two.
        pending.reserve_exact(bytes.len());
        pending.extend_from_slice(bytes);
    }

    /// The other side took `count` of the pending bytes. Memory is given back when it took all.
    pub(super) fn take(&mut self, count: usize, now: Stamp) {
        self.progress = now;
        let kept = self.kept_mut();
        if let Some(pipe) = &kept.pipe {
            // It knows how much was taken of it.
            if !pipe.is_empty() {
                return;
            }
            kept.pipe = None;
        } else {
            kept.taken += count;
        }
        if kept.taken == kept.pending.len() {
            self.drop_pending();
        }
    }

    pub(super) fn drop_pending(&mut self) {
        if let Some(kept) = &mut self.kept {
            (kept.pending, kept.taken, kept.pipe) = (Vec::new(), 0, None);
            self.tidy();
        }
    }

    /// Keeps the beginning of a frame. `continues`: of the same frame as before, so `bytes` begins with what is held.
    pub(super) fn hold(&mut self, bytes: &[u8], continues: bool, now: Stamp) {
        if bytes.is_empty() {
            self.take_held();
            return;
        }
        let Kept { held, held_since, .. } = self.kept_mut();
        if continues {
            held.extend_from_slice(&bytes[held.len()..]);
            held_since.get_or_insert(now);
        } else {
            held.clear();
            held.extend_from_slice(bytes);
            *held_since = Some(now);
        }
    }

    /// What is held, for whoever passes it on or forgets it.
    pub(super) fn take_held(&mut self) -> Vec<u8> {
        let Some(kept) = &mut self.kept else { return Vec::new() };
        kept.held_since = None;
        let held = std::mem::take(&mut kept.held);
        self.tidy();
        held
    }
}
