//! The end of a socket: FIN, reading on until the peer's FIN, and only then `close()`.
//!
//! Linux answers with RST when a socket is closed with unread input, and again when the peer sends to a closed one;
//! a RST can overtake and destroy what the peer has not read yet. So nothing is closed before its peer has had its
//! say, within a deadline. `SO_LINGER` is not used: it only chooses between blocking and RST.

use std::{
    future::poll_fn,
    io,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::AsyncWriteExt,
    time::{Instant, sleep_until},
};

use crate::net::{Stream, with_scratch};

/// How long a socket may linger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Without progress.
    pub linger: Duration,
    /// At all.
    pub linger_max: Duration,
}

/// How a socket went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lingered {
    /// Both FINs have passed.
    Fin,
    /// Nothing was unread or unacknowledged and the peer had said that it is done; its FIN had not come.
    Acked,
    /// The peer reset the connection.
    Reset,
    /// The deadline came first. A peer that sends on gets a RST from the kernel: the only case.
    Expired,
}

/// How often the kernel is asked what the peer has acknowledged: first and longest interval.
const TICK: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(250));

/// Ends a socket: `shutdown(WR)`, then reads and discards until the peer's FIN or a deadline of `config`, then `close()`.
///
/// `peer_is_done`: its Close frame (or the end of its last message) was received, so it sends nothing more of
/// its own accord, and the wait may end when the peer's kernel has everything.
pub async fn linger(mut stream: Stream, peer_is_done: bool, config: &Config) -> Lingered {
    if stream.shutdown().await.is_err() {
        // ENOTCONN: the connection is dead already and has no FIN to send.
        return Lingered::Reset;
    }
    let begun = Instant::now();
    let last = begun + config.linger_max;
    let mut progress_at = begun;
    let mut unacked = stream.unacked().unwrap_or(0);
    let mut tick = TICK.0;
    loop {
        let deadline = last.min(progress_at + config.linger);
        let wake = deadline.min(Instant::now() + tick);
        tokio::select! {
            biased;
            read = poll_fn(|cx| poll_discard(&mut stream, cx)) => match read {
                Ok(0) => return Lingered::Fin,
                Ok(_) => {
                    progress_at = Instant::now();
                    if progress_at >= last {
                        return Lingered::Expired;
                    }
                    continue;
                }
                Err(_) => return Lingered::Reset,
            },
            () = sleep_until(wake) => {}
        }
        let now = Instant::now();
        let left = stream.unacked().unwrap_or(0);
        // Here nothing is unread, since the read above was pending.
        if peer_is_done && left == 0 {
            return Lingered::Acked;
        }
        if left < unacked {
            progress_at = now;
        }
        unacked = left;
        if now >= last.min(progress_at + config.linger) {
            return Lingered::Expired;
        }
        tick = (tick * 2).min(TICK.1);
    }
}

fn poll_discard(stream: &mut Stream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
    with_scratch(|buffer| stream.poll_read_slice(cx, buffer))
}
