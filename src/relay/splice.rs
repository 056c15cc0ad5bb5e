//! The rest of a large payload goes from socket to socket within the kernel, and is never copied here and back.
//!
//! Never more than the rest of one frame's payload: the next header is read, and looked at, like all others. What the other side does not take
//! waits in the pipe, and is part of what is pending of the lane: nothing more is read meanwhile, and every deadline, order and end goes by it.

use std::task::{Context, Poll};

use super::{Gone, Relay};
use crate::{net::Pipe, side::Side, stamp::Stamp};

impl Relay {
    /// Moves what has come of a payload that is passed on as it comes; true: something came. `None`: it is to be read.
    pub(super) fn splice(&mut self, cx: &mut Context<'_>, side: Side, dry: &mut bool, now: Stamp) -> Option<bool> {
        let (index, to) = (side as usize, side.other());
        let lane = &mut self.lanes[index];
        let rest = usize::try_from(lane.tracker.rest()).unwrap_or(usize::MAX);
        let is_large = self.shared.config.splice_from.is_some_and(|from| rest >= from);
        // What is not passed on, or can't be any more, is read to be discarded.
        let goes_on =
            lane.inside_frame && self.ending.forwards(side) && !self.broken[index] && !self.broken[to as usize];
        if !is_large || !goes_on || lane.has_early() || lane.has_pending() {
            return None;
        }
        let (Some(source), Some(target)) = (&self.streams[index], &self.streams[to as usize]) else { return None };
        let mut pipe = Pipe::between(source, target)?;
        // It waits by itself.
        lane.is_awaited = false;
        let count = match pipe.poll_fill(cx, source, rest) {
            Poll::Pending => {
                *dry = true;
                return Some(false);
            }
            Poll::Ready(Ok(0)) => return None,
            Poll::Ready(Ok(count)) => count as u64,
            Poll::Ready(Err(_)) => {
                self.read_done[index] = true;
                self.ending.heard_gone(side, Gone::Reset, true, now);
                return Some(true);
            }
        };
        self.timer_is_late |= self.probes.has_said(side);
        self.shared.traffic.read(side, count);
        let lane = &mut self.lanes[index];
        lane.has_read(count, now);
        lane.keep(pipe, now);
        lane.tracker.skip(count);
        // The end of a frame is known before its bytes are written.
        self.is_unsure[to as usize] = true;
        self.digest(cx, side, &[], 0, now);
        self.flush(cx, to, now);
        self.is_unsure[to as usize] = false;
        self.timer_is_late |= self.lanes[index].has_pending();
        Some(true)
    }
}
