//! One stream of an HTTP/2 connection as a leg: bytes in both directions, an end in each, and a reset.
//!
//! What comes is not given back to the peer's flow control before it was passed on, so whoever does not read holds up its own
//! stream and no other. How the connection and the stream came about is `upstream`'s matter.

use std::{
    fmt, io,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};

/// See the module. To drop it before both directions have ended resets it (CANCEL).
pub struct Tunnel {
    send: SendStream<Bytes>,
    recv: RecvStream,
    /// What came while it could not be read. At most the stream's window, since nothing of it is given back.
    unread: BytesMut,
    /// Bytes that were read, and may not have been passed on.
    lent: usize,
    end: Option<End>,
    has_finished: bool,
    /// The peer may send what its window has left, and no more.
    is_shut: bool,
    stall_timeout: Option<Duration>,
    peer: Peer,
    /// Its reference to the connection: dropped with it, which is when the stream has ended.
    _lease: Box<dyn fmt::Debug + Send + Sync>,
}

/// What a peer makes of the end of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// It ends what it sends with END_STREAM, and takes ours.
    EndsStreams,
    /// After its Close it neither sends END_STREAM nor bears ours: only RST_STREAM ends a stream of it.
    ForgetsStreams,
    /// It ends them, and has begun them.
    IsClient,
}

/// How what a peer sends came to its end.
#[derive(Debug)]
enum End {
    /// END_STREAM.
    Fin,
    /// RST_STREAM, or the connection is gone.
    Reset(Option<h2::Error>),
}

/// What was found in a stream that nobody reads any more, and thrown away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discarded {
    /// Bytes.
    Bytes,
    /// Its end.
    Fin,
    /// It was reset, or its connection is gone.
    Reset,
}

impl Tunnel {
    /// Of a stream to a backend, after its handshake. `lease` is dropped with it.
    pub fn new(
        send: SendStream<Bytes>,
        recv: RecvStream,
        stall_timeout: Duration,
        peer: Peer,
        lease: impl fmt::Debug + Send + Sync + 'static,
    ) -> Self {
        Self::of(send, recv, Some(stall_timeout), peer, Box::new(lease))
    }

    /// Of a client's stream. Whoever does not take what comes from it holds up nobody else: its connection's window is that of all
    /// its streams together. `lease`: as for a backend's.
    pub fn of_client(send: SendStream<Bytes>, recv: RecvStream, lease: Box<dyn fmt::Debug + Send + Sync>) -> Self {
        Self::of(send, recv, None, Peer::IsClient, lease)
    }

    fn of(
        send: SendStream<Bytes>,
        recv: RecvStream,
        stall_timeout: Option<Duration>,
        peer: Peer,
        lease: Box<dyn fmt::Debug + Send + Sync>,
    ) -> Self {
        let unread = BytesMut::new();
        Self {
            send,
            recv,
            unread,
            lent: 0,
            end: None,
            has_finished: false,
            is_shut: false,
            stall_timeout,
            peer,
            _lease: lease,
        }
    }

    pub(super) const fn stall_timeout(&self) -> Option<Duration> {
        self.stall_timeout
    }

    /// After its peer's Close nothing of it comes, and nothing may be said to it.
    pub fn is_forgotten(&self) -> bool {
        self.peer == Peer::ForgetsStreams
    }

    /// Reads what is there, of as many DATA frames as fit; 0 is the end.
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let lent = std::mem::take(&mut self.lent);
        self.give_back(lent);
        let mut filled = self.unread.len().min(buffer.len());
        buffer[..filled].copy_from_slice(&self.unread[..filled]);
        self.unread.advance(filled);
        if self.unread.is_empty() {
            self.unread = BytesMut::new();
        }
        while filled < buffer.len() {
            let Some(mut bytes) = self.poll_data(cx) else { break };
            let count = bytes.len().min(buffer.len() - filled);
            buffer[filled..filled + count].copy_from_slice(&bytes[..count]);
            filled += count;
            bytes.advance(count);
            self.unread.extend_from_slice(&bytes);
        }
        self.lent = filled;
        match &mut self.end {
            _ if filled > 0 => Poll::Ready(Ok(filled)),
            None if buffer.is_empty() => Poll::Ready(Ok(0)),
            None => Poll::Pending,
            Some(End::Fin) => Poll::Ready(Ok(0)),
            Some(End::Reset(error)) => {
                let reset = || io::Error::from(io::ErrorKind::ConnectionReset);
                Poll::Ready(Err(error.take().map_or_else(reset, io::Error::other)))
            }
        }
    }

    /// Joins what has come while it can't be read. Left where it is, each small frame would take a few hundred bytes there, of
    /// which the whole connection may hold only so many (`data_frame_budget` of h2).
    pub(super) fn take_in(&mut self, cx: &mut Context<'_>) {
        while let Some(bytes) = self.poll_data(cx) {
            self.unread.extend_from_slice(&bytes);
        }
    }

    /// The next DATA frame; `None`: none is here, or it has ended.
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Option<Bytes> {
        if self.end.is_some() {
            return None;
        }
        match self.recv.poll_data(cx) {
            Poll::Pending => {}
            Poll::Ready(Some(Ok(bytes))) => return Some(bytes),
            Poll::Ready(Some(Err(error))) => self.end = Some(End::Reset(Some(error))),
            Poll::Ready(None) => self.end = Some(End::Fin),
        }
        None
    }

    /// Nothing is given back from now on: what nobody takes must not come for as long as it may be said.
    pub(super) const fn shut(&mut self) {
        self.is_shut = true;
    }

    fn give_back(&mut self, count: usize) {
        if self.is_shut {
            return;
        }
        // Fails only when more is given back than came.
        let _ = self.recv.flow_control().release_capacity(count);
    }

    /// Writes as much as the peer's windows and the bound of what waits here (`max_send_buffer_size`) allow.
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.has_finished {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.send.reserve_capacity(bytes.len());
        loop {
            let count = self.send.capacity().min(bytes.len());
            if count > 0 {
                let sent = self.send.send_data(Bytes::copy_from_slice(&bytes[..count]), false);
                return Poll::Ready(sent.map(|()| count).map_err(io::Error::other));
            }
            match std::task::ready!(self.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
    }

    /// END_STREAM, behind whatever still waits, if the peer takes it. Idempotent.
    pub fn finish(&mut self) {
        if !std::mem::replace(&mut self.has_finished, true) && self.peer != Peer::ForgetsStreams {
            // Fails when it was reset: then there is nobody to tell.
            let _ = self.send.send_data(Bytes::new(), true);
        }
    }

    /// Reads and throws away; `Pending`: nothing has come.
    pub fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<Discarded> {
        let mut count = std::mem::take(&mut self.lent) + std::mem::take(&mut self.unread).len();
        let mut found = count > 0;
        while let Some(bytes) = self.poll_data(cx) {
            found = true;
            count += bytes.len();
        }
        self.give_back(count);
        match self.end {
            Some(End::Fin) => Poll::Ready(Discarded::Fin),
            Some(End::Reset(_)) => Poll::Ready(Discarded::Reset),
            None if found => Poll::Ready(Discarded::Bytes),
            None => Poll::Pending,
        }
    }

    /// "RST exceptions are represented with the RST_STREAM frame with the CANCEL error code" (RFC 8441 5). To a client that has had
    /// our END_STREAM it is no error: "a server MAY request that the client abort transmission of a request without error by sending a
    /// `RST_STREAM` with an error code of `NO_ERROR` after sending a complete response" (RFC 9113 8.1).
    pub fn reset(mut self) {
        let is_complete = self.peer == Peer::IsClient && self.has_finished;
        self.send.send_reset(if is_complete { Reason::NO_ERROR } else { Reason::CANCEL });
    }
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel").field("stream", &self.recv.stream_id()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, time::Duration};

    use http::{Request, Response};
    use tokio::{
        io::duplex,
        time::{sleep, timeout},
    };
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::net::Stream;

    /// Small frames that come before anybody reads are joined: left with h2 these would be eight times what the connection may hold
    /// of them, and that would be its end.
    #[tokio::test(start_paused = true)]
    async fn small_frames_are_joined_before_they_are_read() {
        const FRAMES: usize = 2000;
        const BUDGET: usize = FRAMES * 255 / 8;
        /// As many may come in a turn of the connection.
        const TURN: usize = 100;
        let (near, far) = duplex(1 << 20);
        let tracker = TaskTracker::new();
        tracker.spawn(async move {
            let mut connection = h2::server::handshake(far).await.expect("a client");
            let (_, mut respond) = connection.accept().await.expect("a request").expect("a request");
            let mut send = respond.send_response(Response::new(()), false).expect("a stream");
            for _ in 0..FRAMES / TURN {
                for _ in 0..TURN {
                    send.send_data(Bytes::from_static(b"x"), false).expect("a stream");
                }
                // The connection moves on only with this.
                let _ = timeout(Duration::from_millis(1), connection.accept()).await;
            }
            while connection.accept().await.is_some() {}
        });
        let mut builder = h2::client::Builder::new();
        builder.data_frame_budget(BUDGET);
        let (mut sender, connection) = builder.handshake(near).await.expect("a server");
        let driver = tracker.spawn(connection);
        let (response, send) = sender.send_request(Request::new(()), false).expect("room for one");
        let recv = response.await.expect("an answer").into_body();
        let mut stream = Stream::Multiplexed(Box::new(Tunnel::new(send, recv, Duration::MAX, Peer::EndsStreams, ())));
        stream.wait_until(sleep(Duration::from_secs(1))).await;
        let mut read = 0;
        while read < FRAMES {
            read += poll_fn(|cx| stream.poll_read_slice(cx, &mut [0; 300])).await.expect("more");
        }
        assert_eq!(read, FRAMES);
        assert!(!driver.is_finished());
    }
}
