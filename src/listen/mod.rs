//! Accepting: the loop of one accept queue, from its first connection to its last.

use std::{
    future::{Future, poll_fn},
    io,
    net::SocketAddr,
    pin::pin,
    task::Poll,
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    time::{Instant, sleep, timeout_at},
};
use tracing::{debug, warn};

use crate::{metrics::Metrics, net};

/// What the accept loops need to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where clients connect.
    pub address: SocketAddr,
    /// Connections that may wait to be accepted, per accept queue; the kernel clamps it.
    pub backlog: u32,
    /// Threads, each with an accept queue of its own; at least 1.
    pub workers: usize,
}

/// Between two attempts when the system has no room for one more connection: first and longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

/// How long handshakes of the kernel that are under way get when the listener is about to close.
const LAST_HANDSHAKES: Duration = Duration::from_millis(200);

/// Takes connections until `stop` resolves, then those that the kernel has already taken, and closes the listener.
///
/// Closing it with connections in its queue would reset each of them; so first it takes no new SYN, then the queue
/// is emptied. `serve` must not wait: the loop accepts nothing meanwhile.
pub async fn accept_loop(
    listener: TcpListener,
    stop: impl Future<Output = ()>,
    metrics: &Metrics,
    mut serve: impl FnMut(TcpStream, SocketAddr),
) {
    let mut stop = pin!(stop);
    let mut backoff = BACKOFF.0;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stop => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                backoff = BACKOFF.0;
                serve(stream, peer);
            }
            Err(error) => {
                let Some(name) = shortage(&error) else {
                    // The connection itself failed before it was taken (accept(2)): the next one may be fine.
                    metrics.accept_error("connection");
                    debug!(%error, "a connection failed before it was accepted");
                    continue;
                };
                metrics.accept_error(name);
                warn!(%error, name, wait_ms = u64::try_from(backoff.as_millis()).unwrap_or(u64::MAX), "cannot accept: out of a resource; clients wait in the accept queue");
                tokio::select! {
                    () = sleep(backoff) => {}
                    () = &mut stop => break,
                }
                backoff = (backoff * 2).min(BACKOFF.1);
            }
        }
    }
    if let Err(error) = net::refuse_new_connections(&listener) {
        debug!(%error, "no filter on the listener: a connection that is just being made may be reset");
    }
    let until = Instant::now() + LAST_HANDSHAKES;
    while let Ok(accepted) = timeout_at(until, listener.accept()).await {
        match accepted {
            Ok((stream, peer)) => serve(stream, peer),
            // Out of descriptors, say: those in the queue can't be helped any more.
            Err(error) if shortage(&error).is_some() => break,
            Err(_) => {}
        }
    }
    while let Poll::Ready(Ok((stream, peer))) = poll_fn(|cx| Poll::Ready(listener.poll_accept(cx))).await {
        serve(stream, peer);
    }
}

/// The errors of accept(2) that are about this system and not about one connection.
fn shortage(error: &io::Error) -> Option<&'static str> {
    match error.raw_os_error()? {
        libc::EMFILE => Some("EMFILE"),
        libc::ENFILE => Some("ENFILE"),
        libc::ENOBUFS => Some("ENOBUFS"),
        libc::ENOMEM => Some("ENOMEM"),
        _ => None,
    }
}
