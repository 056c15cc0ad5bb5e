//! A stream in the hands of hyper.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use rustix::net::{SendFlags, send};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};

use super::{READ_AHEAD, Stream, direct::Bare, set_low_water, with_scratch};

/// A peer that sends a byte at a time costs a wake for each: beyond some it is looked at every so often.
#[derive(Debug, Default)]
struct Crumbs {
    /// Looks since the last one that brought something, or our last word.
    looks: u32,
    /// Until the next one, unless [`CRUMBS_AT_ONCE`] come before.
    pause: Option<Pin<Box<Sleep>>>,
}

/// A header that comes in more pieces than this has somebody behind it who cuts it up.
const MOST_LOOKS: u32 = 64;

/// What a look has to bring for others to be forgotten, in bytes.
const NO_CRUMB: usize = 256;

/// Between two looks at crumbs.
const CRUMBS_PAUSE: Duration = Duration::from_millis(10);

/// Of these a look is worth it at once, in bytes.
const CRUMBS_AT_ONCE: i32 = 4096;

/// See [`Kept::at_pace`].
#[derive(Debug, thiserror::Error)]
#[error("the peer takes nothing, or too little")]
struct TooSlow;

/// That is why a [`Kept`] takes no more.
pub fn is_too_slow(error: &io::Error) -> bool {
    matches!(error.get_ref(), Some(error) if error.is::<TooSlow>())
}

/// Since nothing more went out.
#[derive(Debug)]
struct Stalled {
    timer: Pin<Box<Sleep>>,
    /// What the peer's kernel had not acknowledged at the last look.
    unacked: Option<usize>,
}

/// A stream in the hands of hyper: it can't be ended, and does not wait for ever for a reader.
///
/// hyper flushes what it has when it ends a connection, and with a `shutdown` that does nothing it gives the socket back
/// open, for whoever ends it in order.
#[derive(Debug)]
pub struct Kept {
    stream: Stream,
    /// How long the peer may take nothing of what waits for it.
    write_timeout: Duration,
    /// Bytes that it takes in a second at least, while some wait.
    rate: u32,
    stalled: Option<Box<Stalled>>,
    crumbs: Option<Crumbs>,
    /// What was read already.
    early: Bytes,
    has_read: bool,
}

impl Kept {
    /// Of a connected stream.
    pub const fn new(stream: Stream, write_timeout: Duration) -> Self {
        Self { stream, write_timeout, rate: 0, stalled: None, crumbs: None, early: Bytes::new(), has_read: false }
    }

    /// The same, of a peer that asks and is answered: it has to take so many bytes in each second that it is waited for, and may be
    /// behind by `patience`. When what it sends comes in many small pieces, these are read together, up to 10 ms later.
    #[must_use]
    pub fn at_pace(mut self, rate: u32, patience: Duration) -> Self {
        (self.rate, self.write_timeout, self.crumbs) = (rate, patience, Some(Crumbs::default()));
        self
    }

    /// What was read already is read again.
    #[must_use]
    pub fn rewind(mut self, early: Bytes) -> Self {
        self.early = early;
        self
    }

    /// Something was read of it.
    pub const fn has_read(&self) -> bool {
        self.has_read
    }

    /// Its peer does not take what was written last, which waits for that.
    pub const fn is_stalled(&self) -> bool {
        self.stalled.is_some()
    }

    /// The stream itself.
    pub fn into_inner(self) -> Stream {
        self.into_parts().0
    }

    /// What comes next, at most [`READ_AHEAD`] bytes; none: the peer has ended.
    pub fn poll_some(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        with_scratch(|buffer| {
            let length = ready!(self.stream.poll_read_slice(cx, &mut buffer[..READ_AHEAD]))?;
            Poll::Ready(Ok(Bytes::copy_from_slice(&buffer[..length])))
        })
    }

    /// Writes what the kernel takes now, of a socket that epoll may not have had a word about yet; gives how much that is.
    pub fn write_now(&mut self, bytes: &[u8]) -> usize {
        let fd = self.stream.bare().map(Bare::fd);
        fd.and_then(|fd| send(fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).ok()).unwrap_or(0)
    }

    /// Waits for epoll's first word about a socket. Until then a write would be one that has to wait, which hyper does not
    /// do for an answer to a broken request.
    pub async fn writable(&self) {
        if let Stream::Tcp(stream) | Stream::Dialled(stream, _) = &self.stream {
            let _ = stream.writable().await;
        }
    }

    /// The stream, and what was read already and not read again.
    pub fn into_parts(mut self) -> (Stream, Bytes) {
        self.look_again();
        (self.stream, self.early)
    }

    /// The pause is over: the kernel tells of whatever has come in it.
    fn look_again(&mut self) {
        if self.crumbs.as_mut().is_some_and(|crumbs| crumbs.pause.take().is_some())
            && let Some(socket) = self.stream.socket()
            && let Err(error) = set_low_water(socket, 1)
        {
            // It can't be: what was set a moment ago can be set again.
            tracing::warn!(%error, "a socket is heard of only when it has much to be read");
        }
    }

    fn poll_patiently(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut Stream>, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(result) = write(Pin::new(&mut self.stream), cx) {
            self.stalled = None;
            self.look_again();
            if let Some(crumbs) = &mut self.crumbs {
                crumbs.looks = 0;
            }
            return Poll::Ready(result);
        }
        let Self { stream, write_timeout, rate, stalled, .. } = self;
        let Stalled { timer, unacked } = &mut **stalled.get_or_insert_with(|| {
            Box::new(Stalled { timer: Box::pin(sleep(*write_timeout)), unacked: stream.unacked() })
        });
        loop {
            ready!(timer.as_mut().poll(cx));
            // The kernel takes more only when a third of its buffer is free (sk_stream_write_space), which takes a slow peer long.
            let left = stream.unacked();
            let taken = unacked.zip(left).map_or(0, |(before, left)| before.saturating_sub(left));
            let owed = u128::from(*rate) * write_timeout.as_millis() / 1000;
            if taken == 0 || (taken as u128) < owed {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, TooSlow)));
            }
            *unacked = left;
            timer.as_mut().reset(Instant::now() + *write_timeout);
        }
    }
}

impl AsyncRead for Kept {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.early.is_empty() {
            buffer.put_slice(&this.early.split_to(this.early.len().min(buffer.remaining())));
            return Poll::Ready(Ok(()));
        }
        let pause = this.crumbs.as_mut().and_then(|crumbs| crumbs.pause.as_mut());
        let was_paused = pause.is_some_and(|pause| pause.as_mut().poll(cx).is_ready());
        if was_paused {
            this.look_again();
        }
        let before = buffer.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buffer);
        let length = buffer.filled().len() - before;
        this.has_read |= length > 0;
        let Some(crumbs) = &mut this.crumbs else { return polled };
        if polled.is_ready() {
            if length >= NO_CRUMB {
                crumbs.looks = 0;
            }
            return polled;
        }
        crumbs.looks = crumbs.looks.saturating_add(1);
        // Behind a pause it is first seen whether there is any need for another one.
        if crumbs.looks > MOST_LOOKS
            && !was_paused
            && crumbs.pause.is_none()
            && let Some(socket) = this.stream.socket()
            && set_low_water(socket, CRUMBS_AT_ONCE).is_ok()
        {
            let pause = crumbs.pause.insert(Box::pin(sleep(CRUMBS_PAUSE)));
            let _ = pause.as_mut().poll(cx);
        }
        Poll::Pending
    }
}

impl AsyncWrite for Kept {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().poll_patiently(cx, |stream, cx| stream.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_patiently(cx, |stream, cx| stream.poll_write_vectored(cx, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    /// What the kernel says of a socket to whoever watches it.
    fn is_told(kept: &Kept) -> bool {
        let socket = kept.stream.socket().expect("a socket");
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&now)).expect("poll") == 1
    }

    /// Who sends a byte at a time is heard of less often, and nothing is lost of it; our own word, and the handing over, end that.
    #[tokio::test]
    async fn crumbs_are_swept_together() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let mut peer = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("connected");
        peer.set_nodelay(true).expect("a socket");
        let (stream, _) = listener.accept().await.expect("accepted");
        let mut kept = Kept::new(Stream::Tcp(stream), Duration::from_mins(1)).at_pace(1, Duration::from_mins(1));
        let mut sent = 0u8;
        let mut crumb = async |peer: &mut TcpStream| {
            sent = sent.wrapping_add(1);
            peer.write_all(&[sent]).await.expect("sent");
            sent
        };
        let mut byte = [0];
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut look = |kept: &mut Kept| {
            let mut buffer = [0; 16];
            assert!(Pin::new(kept).poll_read(&mut cx, &mut ReadBuf::new(&mut buffer)).is_pending());
        };
        let is_paused = |kept: &Kept| kept.crumbs.as_ref().is_some_and(|crumbs| crumbs.pause.is_some());
        let mut rounds = 0;
        while !is_paused(&kept) {
            let next = crumb(&mut peer).await;
            kept.read_exact(&mut byte).await.expect("a byte");
            assert_eq!(byte[0], next);
            look(&mut kept);
            rounds += 1;
        }
        // In each of them it is looked at once or twice in vain.
        assert!((MOST_LOOKS / 2..=MOST_LOOKS + 1).contains(&rounds), "{rounds}");
        // A single byte is no news any more, until the pause is over.
        let next = crumb(&mut peer).await;
        assert!(!is_told(&kept));
        kept.read_exact(&mut byte).await.expect("a byte");
        assert_eq!(byte[0], next);
        look(&mut kept);
        assert!(is_paused(&kept), "the next one begins");
        // Much of it is news at once, also then; and our own word makes a single byte news.
        peer.write_all(&[0; CRUMBS_AT_ONCE as usize]).await.expect("sent");
        let mut many = vec![0; CRUMBS_AT_ONCE as usize];
        kept.read_exact(&mut many).await.expect("all of it");
        kept.write_all(b"!").await.expect("sent");
        crumb(&mut peer).await;
        let stream = kept.into_inner();
        let Stream::Tcp(stream) = &stream else { panic!("another stream") };
        stream.readable().await.expect("news");
    }
}
