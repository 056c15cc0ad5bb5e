//! The end of a stream that shares its connection: END_STREAM, reading on until the peer's, and RST_STREAM only when that does
//! not come, or the peer is known to forget its streams.
//!
//! Such a stream has no socket that could be closed too early. What waits for its end is the reference to its connection.

use std::{
    future::poll_fn,
    task::{Context, Poll, Waker},
};

use tokio::time::{Instant, timeout_at};

use super::{Linger, Lingered, Patience};
use crate::{
    net::{Discarded, Tunnel},
    side::Side,
};

/// A stream in its last wait.
#[derive(Debug)]
pub(super) struct Leaving {
    side: Side,
    tunnel: Box<Tunnel>,
    patience: Patience,
    since: Instant,
}

impl Linger {
    pub(super) fn add_tunnel(&self, side: Side, mut tunnel: Box<Tunnel>, peer_is_done: bool, patience: Patience) {
        if peer_is_done && tunnel.is_forgotten() {
            tunnel.reset();
            return self.inner.count(side, Lingered::Acked);
        }
        tunnel.finish();
        // Often all has been said by now.
        match tunnel.poll_discard(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Discarded::Fin) => return self.inner.count(side, Lingered::Fin),
            Poll::Ready(Discarded::Reset) => return self.inner.count(side, Lingered::Reset),
            Poll::Ready(Discarded::Bytes) | Poll::Pending => {}
        }
        self.inner.lock().tunnels.push(Leaving { side, tunnel, patience, since: Instant::now() });
        self.inner.news.changed.notify_one();
    }
}

impl Leaving {
    /// Waits for its end, or for as long as patience lasts. What still comes is no progress: a backend that floods it would
    /// otherwise keep its place for as long as `linger_max`.
    pub(super) async fn end(mut self) -> (Side, Lingered) {
        let deadline = self.since + self.patience.linger.min(self.patience.linger_max);
        let ended = timeout_at(deadline, async {
            loop {
                match poll_fn(|cx| self.tunnel.poll_discard(cx)).await {
                    Discarded::Bytes => tokio::task::yield_now().await,
                    Discarded::Fin => return Lingered::Fin,
                    Discarded::Reset => return Lingered::Reset,
                }
            }
        });
        let how = ended.await.unwrap_or(Lingered::Expired);
        if how == Lingered::Expired {
            self.tunnel.reset();
        }
        (self.side, how)
    }
}
