//! Pipes by which the kernel moves bytes from one socket to another (splice(2)): they are never copied to this process and back.
//!
//! A pipe is filled only when it is empty. So who has to wait waits for a socket, never for a pipe: one that has few bytes in many pieces is
//! full all the same. Each thread has a stock of empty ones; one that is given up with bytes in it is closed. Where there is none, or the
//! system allows none, whoever asks copies as ever.

use std::{
    cell::RefCell,
    io,
    os::fd::{BorrowedFd, OwnedFd},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice},
};
use tokio::io::Interest;

use super::{Stream, direct::Bare};
use crate::sparse::Sparse;

/// Bytes that are in one at most, and what the kernel is asked to give it: 64 pieces, of which each is a packet or a few. It may give less
/// (`fs.pipe-max-size`); then less is moved at once.
const PIPE_BYTES: usize = 256 * 1024;

/// What the kernel has to give it at least, as much as a read takes: a user with too many pages in pipes gets two pages for one
/// (`fs.pipe-user-pages-soft`), by which bytes would move at more cost than by copying.
const LEAST_BYTES: usize = 64 * 1024;

/// Pipes of a thread at most, in use or not: with all that is in them, 8 MiB of the kernel's memory. Once opened they are kept: their
/// descriptors are set aside anyway, and where many readers are behind one would be opened and closed, in four calls, for every other payload.
pub const MOST_PIPES: usize = 32;

/// How long none is opened after one could not be.
const PAUSE: Duration = Duration::from_secs(1);

/// Two descriptors, with bytes between them or without.
#[derive(Debug)]
pub struct Pipe {
    /// `None` only when it was given back.
    ends: Option<Ends>,
    bytes: usize,
}

#[derive(Debug)]
struct Ends {
    reader: OwnedFd,
    writer: OwnedFd,
}

impl Ends {
    fn open() -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        if let Err(error) = fcntl_setpipe_size(&writer, PIPE_BYTES)
            && fcntl_getpipe_size(&writer)? < LEAST_BYTES
        {
            return Err(error.into());
        }
        Ok(Self { reader, writer })
    }
}

/// What a thread has of them.
#[derive(Debug)]
struct Stock {
    empty: Vec<Ends>,
    /// Also those that somebody has.
    count: usize,
    most: usize,
    /// None could be opened.
    short_until: Option<Instant>,
    /// The system does not move bytes this way.
    is_refused: bool,
}

thread_local! {
    static STOCK: RefCell<Stock> = const {
        RefCell::new(Stock { empty: Vec::new(), count: 0, most: MOST_PIPES, short_until: None, is_refused: false })
    };
}

impl Stock {
    fn take(&mut self) -> Option<Ends> {
        if self.is_refused {
            return None;
        }
        if let Some(ends) = self.empty.pop() {
            return Some(ends);
        }
        if self.count >= self.most || self.short_until.is_some_and(|until| Instant::now() < until) {
            return None;
        }
        match Ends::open() {
            Ok(ends) => {
                self.count += 1;
                Some(ends)
            }
            Err(error) => {
                static SAID: Sparse = Sparse::new();
                self.short_until = Some(Instant::now() + PAUSE);
                if let Some(unsaid) = SAID.is_due() {
                    let fix = "raise RLIMIT_NOFILE (ulimit -n), or fs.pipe-user-pages-soft and -hard; nothing is lost meanwhile";
                    tracing::warn!(%error, fix, unsaid, "no pipe can be opened: large payloads are copied, at more CPU time");
                }
                None
            }
        }
    }
}

/// This thread has so many pipes at most, two descriptors each, instead of [`MOST_PIPES`].
pub fn limit_pipes(most: usize) {
    STOCK.with_borrow_mut(|stock| stock.most = most);
}

/// The kernel, or who filters what it is asked, does not do this for these sockets.
fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw_os_error),
        Some(Errno::INVAL | Errno::NOSYS | Errno::PERM | Errno::OPNOTSUPP)
    )
}

/// Does it when the socket is ready, and until it is so no more.
fn poll_io(
    socket: Bare<'_>,
    cx: &mut Context<'_>,
    interest: Interest,
    mut act: impl FnMut(BorrowedFd<'_>) -> rustix::io::Result<usize>,
) -> Poll<io::Result<usize>> {
    loop {
        ready!(if interest.is_readable() { socket.poll_read_ready(cx) } else { socket.poll_write_ready(cx) })?;
        match socket.try_io(interest, || Ok(act(socket.fd())?)) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            done => return Poll::Ready(done),
        }
    }
}

/// Not `MORE`: the last bytes of a message would wait for those of the next one.
const FLAGS: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);

impl Pipe {
    /// An empty one for bytes from one of these to the other; `None`: they are to be copied.
    pub fn between(from: &Stream, to: &Stream) -> Option<Self> {
        (from.is_bare() && to.is_bare())
            .then(|| STOCK.with_borrow_mut(Stock::take))?
            .map(|ends| Self { ends: Some(ends), bytes: 0 })
    }

    /// Nothing is in it.
    pub const fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    fn ends(&self) -> &Ends {
        self.ends.as_ref().expect("given back only at its end")
    }

    /// Fills it, if it is empty, with what `from` has, up to `most` bytes; 0: that is the end, or has to be read.
    pub fn poll_fill(&mut self, cx: &mut Context<'_>, from: &Stream, most: usize) -> Poll<io::Result<usize>> {
        let (Some(from), true) = (from.bare(), self.is_empty()) else { return Poll::Ready(Ok(0)) };
        let (into, most) = (&self.ends().writer, most.min(PIPE_BYTES));
        // Where nothing is in the pipe, only the socket may make it wait. Or an urgent byte, which only a read gets past (`tcp_read_sock`,
        // net/ipv4/tcp.c): so that is what finds out.
        let filled = ready!(poll_io(from, cx, Interest::READABLE, |from| {
            match splice(from, None, into, None, most, FLAGS) {
                Err(Errno::AGAIN) => Ok(0),
                moved => moved,
            }
        }));
        match filled {
            Err(error) if is_refusal(&error) => {
                refuse(&error);
                Poll::Ready(Ok(0))
            }
            filled => {
                self.bytes = filled?;
                Poll::Ready(Ok(self.bytes))
            }
        }
    }

    /// Moves what is in it to `to`, as much as that takes; never 0. `Ok(None)`: it can't be moved, so it is to be [read](Self::read).
    pub fn poll_empty(&mut self, cx: &mut Context<'_>, to: &Stream) -> Poll<io::Result<Option<usize>>> {
        let Some(to) = to.bare() else { return Poll::Ready(Ok(None)) };
        let (from, bytes) = (&self.ends().reader, self.bytes);
        // Nobody else fills it or takes from it, so only the socket may make it wait.
        let moved = ready!(poll_io(to, cx, Interest::WRITABLE, |to| splice(from, None, to, None, bytes, FLAGS)));
        Poll::Ready(match moved {
            Err(error) if is_refusal(&error) => {
                refuse(&error);
                Ok(None)
            }
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            moved => moved.map(|moved| {
                self.bytes -= moved;
                Some(moved)
            }),
        })
    }

    /// What is in it, which is then empty.
    pub fn read(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.bytes];
        while self.bytes > 0 {
            let at = bytes.len() - self.bytes;
            match rustix::io::read(&self.ends().reader, &mut bytes[at..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.bytes -= count,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(bytes)
    }
}

/// From now on this thread copies.
fn refuse(error: &io::Error) {
    let is_known = STOCK.with_borrow_mut(|stock| {
        stock.count -= stock.empty.len();
        stock.empty = Vec::new();
        std::mem::replace(&mut stock.is_refused, true)
    });
    if !is_known {
        tracing::info!(%error, "the system does not move bytes from socket to socket (splice): large payloads are copied until a restart");
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let ends = self.ends.take();
        // Where the thread itself ends there is no stock any more.
        let _ = STOCK.try_with(|stock| {
            let mut stock = stock.borrow_mut();
            match ends {
                Some(ends) if self.bytes == 0 && stock.count <= stock.most && !stock.is_refused => {
                    stock.empty.push(ends);
                }
                _ => stock.count = stock.count.saturating_sub(1),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, io::Write as _};

    use tokio::net::UnixStream;

    use super::*;

    fn in_runtime(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("descriptors");
        runtime.block_on(test);
    }

    fn pair() -> (std::os::unix::net::UnixStream, Stream) {
        let (theirs, ours) = std::os::unix::net::UnixStream::pair().expect("descriptors");
        ours.set_nonblocking(true).expect("a socket");
        (theirs, Stream::Unix(UnixStream::from_std(ours).expect("a runtime")))
    }

    /// Pipes that are empty come back to the stock, others are closed; there are no more than may be.
    #[test]
    fn a_thread_has_so_many_at_most() {
        in_runtime(async {
            limit_pipes(2);
            let ((_a, from), (_b, to)) = (pair(), pair());
            let (one, two) = (Pipe::between(&from, &to), Pipe::between(&from, &to));
            assert!(one.is_some() && two.is_some() && Pipe::between(&from, &to).is_none());
            drop(one);
            let mut three = Pipe::between(&from, &to).expect("one came back");
            // As if something was in it.
            three.bytes = 1;
            drop(three);
            STOCK.with_borrow(|stock| assert_eq!((stock.count, stock.empty.len()), (1, 0)));
            drop(two);
            STOCK.with_borrow(|stock| assert_eq!((stock.count, stock.empty.len()), (1, 1)));
            limit_pipes(0);
            assert!(Pipe::between(&from, &to).is_some(), "what there is may be used");
            STOCK.with_borrow(|stock| assert_eq!((stock.count, stock.empty.len()), (0, 0)));
        });
    }

    /// Where the system turns out to refuse, bytes that are in a pipe already are not lost, and the thread takes no pipe any more.
    #[test]
    fn what_can_not_be_moved_is_read() {
        in_runtime(async {
            let ((mut a, from), (_b, to)) = (pair(), pair());
            a.write_all(b"0123456789").expect("room");
            let mut pipe = Pipe::between(&from, &to).expect("a pipe");
            let filled = poll_fn(|cx| pipe.poll_fill(cx, &from, 7)).await;
            assert_eq!(filled.expect("moved"), 7);
            refuse(&Errno::PERM.into());
            assert!(Pipe::between(&from, &to).is_none());
            assert_eq!(pipe.read().expect("read"), b"0123456");
            assert!(pipe.is_empty());
            drop(pipe);
            STOCK.with_borrow(|stock| assert_eq!((stock.count, stock.empty.len()), (0, 0)));
        });
    }
}
