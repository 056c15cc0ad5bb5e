//! Reads and writes of a kernel's socket in fewer steps than the runtime's own, for whoever does them by the message.
//!
//! The runtime is asked for a wake-up only when the socket has nothing, or takes nothing, rather than before each call; and the calls are the
//! kernel's own, without what the C library does for threads that may be cancelled. Nothing here takes from the runtime's budget for one task,
//! so a caller has to bound its turn itself.

use std::{
    io,
    os::fd::AsFd,
    task::{Context, Poll, ready},
};

use rustix::{
    io::{Errno, retry_on_intr},
    net::{RecvFlags, SendFlags, recv, send},
};
use tokio::{
    io::Interest,
    net::{TcpStream, UnixStream},
};

/// A socket that the runtime watches.
pub(super) trait Watched: AsFd {
    /// Does it if the socket is ready, as far as the runtime knows; it no longer is after `WouldBlock`.
    fn try_io(&self, interest: Interest, call: impl FnOnce() -> io::Result<()>) -> io::Result<()>;
    fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
    fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
}

macro_rules! watched {
    ($($stream:ty),*) => {$(
        impl Watched for $stream {
            fn try_io(&self, interest: Interest, call: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
                self.try_io(interest, call)
            }

            fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                self.poll_read_ready(cx)
            }

            fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                self.poll_write_ready(cx)
            }
        }
    )*};
}

watched!(TcpStream, UnixStream);

/// Reads what there is.
pub(super) fn poll_recv(socket: &impl Watched, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
    loop {
        let length = into.len();
        let read = transfer(socket, Interest::READABLE, length, || {
            recv(socket, &mut *into, RecvFlags::empty()).map(|(count, _)| count)
        });
        if let Some(read) = read {
            return Poll::Ready(read);
        }
        ready!(socket.poll_read_ready(cx))?;
    }
}

/// Writes as much as the kernel takes.
pub(super) fn poll_send(socket: &impl Watched, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
    loop {
        let sent = transfer(socket, Interest::WRITABLE, bytes.len(), || send(socket, bytes, SendFlags::NOSIGNAL));
        if let Some(sent) = sent {
            return Poll::Ready(sent);
        }
        ready!(socket.poll_write_ready(cx))?;
    }
}

/// One call, if the socket may be ready; `None`: it is not. A call that moved less than `length` has moved all that there was, or all that
/// there was room for (epoll(7), questions and answers, 9), so that the kernel is not asked again just to hear so.
fn transfer(
    socket: &impl Watched,
    interest: Interest,
    length: usize,
    mut call: impl FnMut() -> rustix::io::Result<usize>,
) -> Option<io::Result<usize>> {
    let mut moved = None;
    let _ = socket.try_io(interest, || match retry_on_intr(&mut call) {
        Err(Errno::AGAIN) => Err(io::ErrorKind::WouldBlock.into()),
        result => {
            let is_all = result.is_ok_and(|count| 0 < count && count < length);
            moved = Some(result.map_err(io::Error::from));
            if is_all { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        }
    });
    moved
}
