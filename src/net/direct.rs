//! Reads and writes of a kernel's socket in fewer steps than the runtime's own, for whoever does them by the message.
//!
//! The runtime is asked for a wake-up only when the socket has nothing, or takes nothing, rather than before each call; and the calls are the
//! kernel's own, without what the C library does for threads that may be cancelled. Nothing here takes from the runtime's budget for one task,
//! so a caller has to bound its turn itself.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    task::{Context, Poll, ready},
};

use rustix::{
    io::{Errno, retry_on_intr},
    net::{RecvFlags, SendFlags, recv, send},
};
use tokio::{
    io::Interest,
    net::{TcpStream, UnixStream},
    task::coop::has_budget_remaining,
};

/// A socket of the kernel with nothing above it, which the runtime watches.
#[derive(Debug, Clone, Copy)]
pub(super) enum Bare<'a> {
    Tcp(&'a TcpStream),
    Unix(&'a UnixStream),
}

impl<'a> Bare<'a> {
    /// Does it if the socket is ready, as far as the runtime knows; it no longer is after `WouldBlock`.
    pub(super) fn try_io<R>(self, interest: Interest, call: impl FnOnce() -> io::Result<R>) -> io::Result<R> {
        match self {
            Self::Tcp(stream) => stream.try_io(interest, call),
            Self::Unix(stream) => stream.try_io(interest, call),
        }
    }

    pub(super) fn poll_read_ready(self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => stream.poll_read_ready(cx),
            Self::Unix(stream) => stream.poll_read_ready(cx),
        }
    }

    pub(super) fn poll_write_ready(self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => stream.poll_write_ready(cx),
            Self::Unix(stream) => stream.poll_write_ready(cx),
        }
    }

    pub(super) fn fd(self) -> BorrowedFd<'a> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

/// One kind of [`Bare`] socket: what is done by the message is compiled for each, with the call to the kernel in the middle of it.
trait Watched: AsFd {
    fn try_io(&self, interest: Interest, call: impl FnOnce() -> io::Result<()>) -> io::Result<()>;
}

impl Watched for TcpStream {
    fn try_io(&self, interest: Interest, call: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.try_io(interest, call)
    }
}

impl Watched for UnixStream {
    fn try_io(&self, interest: Interest, call: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.try_io(interest, call)
    }
}

/// What came of one call.
enum Call {
    /// The socket is not ready, as the runtime has known it for a while.
    Unready,
    /// It has just turned out not to be.
    Refused,
    Done(io::Result<usize>),
}

/// Reads what there is. `is_awaited` is this function's, one for each reader, false in the beginning: the task is woken when something comes,
/// and nothing has come since it was found so; then the runtime need not be asked again. All calls are to be with the same task's waker.
pub(super) fn poll_recv(
    socket: Bare<'_>,
    cx: &mut Context<'_>,
    into: &mut [u8],
    is_awaited: &mut bool,
) -> Poll<io::Result<usize>> {
    loop {
        match recv_once(socket, into) {
            Call::Done(read) => {
                *is_awaited = false;
                return Poll::Ready(read);
            }
            // Only a call makes a socket unready, and whoever waited was woken when it had become ready.
            Call::Unready if *is_awaited => return Poll::Pending,
            Call::Unready | Call::Refused => ready!(poll_await(socket, cx, is_awaited))?,
        }
    }
}

/// Reads what there is; `None`: there is nothing, as far as is known.
pub(super) fn try_recv(socket: Bare<'_>, into: &mut [u8]) -> Option<io::Result<usize>> {
    match recv_once(socket, into) {
        Call::Done(read) => Some(read),
        Call::Unready | Call::Refused => None,
    }
}

/// Waits until the socket is ready to be read.
pub(super) fn poll_await(socket: Bare<'_>, cx: &mut Context<'_>, is_awaited: &mut bool) -> Poll<io::Result<()>> {
    let polled = socket.poll_read_ready(cx);
    // One whose budget is used up is only to be polled once more: nothing was asked for it.
    *is_awaited = polled.is_pending() && has_budget_remaining();
    polled
}

/// Writes as much as the kernel takes. `fin_follows`: at once, and may go out with it.
pub(super) fn poll_send(
    socket: Bare<'_>,
    cx: &mut Context<'_>,
    bytes: &[u8],
    fin_follows: bool,
) -> Poll<io::Result<usize>> {
    // The kernel keeps what is not a whole segment until the FIN, which it puts into the same one (`tcp_send_fin` in net/ipv4/tcp_output.c),
    // or for 200 ms.
    let flags = if fin_follows { SendFlags::NOSIGNAL | SendFlags::MORE } else { SendFlags::NOSIGNAL };
    loop {
        let sent = match socket {
            Bare::Tcp(stream) => transfer(stream, Interest::WRITABLE, bytes.len(), || send(stream, bytes, flags)),
            Bare::Unix(stream) => transfer(stream, Interest::WRITABLE, bytes.len(), || send(stream, bytes, flags)),
        };
        match sent {
            Call::Done(sent) => return Poll::Ready(sent),
            Call::Unready | Call::Refused => ready!(socket.poll_write_ready(cx))?,
        }
    }
}

fn recv_once(socket: Bare<'_>, into: &mut [u8]) -> Call {
    fn from(socket: &impl Watched, into: &mut [u8]) -> Call {
        let length = into.len();
        transfer(socket, Interest::READABLE, length, || {
            recv(socket, &mut *into, RecvFlags::empty()).map(|(count, _)| count)
        })
    }
    match socket {
        Bare::Tcp(stream) => from(stream, into),
        Bare::Unix(stream) => from(stream, into),
    }
}

/// One call, if the socket may be ready. A call that moved less than `length` has moved all that there was, or all that there was room for
/// (epoll(7), questions and answers, 9), so that the kernel is not asked again just to hear so.
fn transfer(
    socket: &impl Watched,
    interest: Interest,
    length: usize,
    mut call: impl FnMut() -> rustix::io::Result<usize>,
) -> Call {
    let mut came = Call::Unready;
    let _ = socket.try_io(interest, || match retry_on_intr(&mut call) {
        Err(Errno::AGAIN) => {
            came = Call::Refused;
            Err(io::ErrorKind::WouldBlock.into())
        }
        result => {
            let is_all = result.is_ok_and(|count| 0 < count && count < length);
            came = Call::Done(result.map_err(io::Error::from));
            if is_all { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        }
    });
    came
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        io::{Read, Write},
        net::{TcpListener, TcpStream as StdStream},
        pin::pin,
        task::Waker,
    };

    use super::*;

    fn pair() -> (StdStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let theirs = StdStream::connect(listener.local_addr().expect("an address")).expect("a listener");
        let (ours, _) = listener.accept().expect("a connection");
        ours.set_nonblocking(true).expect("a socket");
        (theirs, TcpStream::from_std(ours).expect("a runtime"))
    }

    fn in_runtime(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("descriptors");
        runtime.block_on(test);
    }

    /// Whatever comes in whatever portions is read, the end included, by one who is asked again and again while nothing is there; also
    /// when there is less than there is room for, just as much, or more.
    #[test]
    fn nothing_that_comes_is_missed() {
        in_runtime(async {
            let (mut theirs, ours) = pair();
            let mut is_awaited = false;
            let mut buffer = [0; 8];
            let mut got = Vec::new();
            for length in (0..40).chain([300]) {
                // Twice nothing: the second time the runtime is not asked.
                poll_fn(|cx| {
                    for _ in 0..2 {
                        assert!(poll_recv(Bare::Tcp(&ours), cx, &mut buffer, &mut is_awaited).is_pending());
                        assert!(is_awaited);
                    }
                    Poll::Ready(())
                })
                .await;
                let sent: Vec<u8> = (0..length).map(|byte| u8::try_from(byte % 256).expect("a byte")).collect();
                theirs.write_all(&sent).expect("room");
                got.clear();
                while got.len() < sent.len() {
                    let count = poll_fn(|cx| poll_recv(Bare::Tcp(&ours), cx, &mut buffer, &mut is_awaited))
                        .await
                        .expect("bytes");
                    assert!(count > 0 && !is_awaited);
                    got.extend_from_slice(&buffer[..count]);
                }
                assert_eq!(got, sent);
                // What was just as much as there was room for may have more behind it, which the kernel has to say.
                let mut cx = Context::from_waker(Waker::noop());
                assert!(poll_recv(Bare::Tcp(&ours), &mut cx, &mut buffer, &mut is_awaited).is_pending());
                is_awaited = false;
            }
            drop(theirs);
            assert_eq!(
                poll_fn(|cx| poll_recv(Bare::Tcp(&ours), cx, &mut buffer, &mut is_awaited)).await.expect("the end"),
                0
            );
        });
    }

    /// Who has used up the budget that the runtime gives a task for one turn, and so was not taken down as waiting, waits in the next one.
    #[test]
    fn a_budget_that_is_used_up_loses_no_wakeup() {
        in_runtime(async {
            let (mut theirs, ours) = pair();
            let reader = tokio_util::task::TaskTracker::new().spawn(async move {
                let mut is_awaited = false;
                let mut turns = 0;
                poll_fn(|cx| {
                    turns += 1;
                    if turns == 1 {
                        while has_budget_remaining() {
                            let _ = pin!(tokio::task::coop::consume_budget()).poll(cx);
                        }
                    }
                    poll_recv(Bare::Tcp(&ours), cx, &mut [0; 8], &mut is_awaited)
                })
                .await
            });
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            theirs.write_all(b"word").expect("room");
            let read = tokio::time::timeout(std::time::Duration::from_secs(20), reader).await;
            assert_eq!(read.expect("a wake-up").expect("no panic").expect("bytes"), 4);
        });
    }

    /// A socket that takes no more does so again when its peer has read, and nothing is lost on the way.
    #[test]
    fn what_is_not_taken_is_taken_later() {
        in_runtime(async {
            let (mut theirs, ours) = pair();
            let bytes: Vec<u8> = (0..1_000_000_u32).map(|at| at.to_le_bytes()[usize::from(at % 2 == 0)]).collect();
            let mut sent = 0;
            let mut cx = Context::from_waker(Waker::noop());
            while let Poll::Ready(count) = poll_send(Bare::Tcp(&ours), &mut cx, &bytes[sent % bytes.len()..], false) {
                sent += count.expect("a peer");
            }
            let reader = std::thread::spawn(move || {
                let mut got = Vec::new();
                theirs.read_to_end(&mut got).expect("bytes");
                got
            });
            let until = sent.next_multiple_of(bytes.len()) + bytes.len();
            let mut rest = pin!(poll_fn(|cx| {
                while sent < until {
                    sent +=
                        ready!(poll_send(Bare::Tcp(&ours), cx, &bytes[sent % bytes.len()..], false)).expect("a peer");
                }
                Poll::Ready(())
            }));
            rest.as_mut().await;
            drop(ours);
            let got = reader.join().expect("no panic");
            assert_eq!(got.len(), until);
            assert!(got.chunks(bytes.len()).all(|chunk| chunk == bytes));
        });
    }
}
