//! Sockets: addresses, options, listening, dialling, and the buffer that all reads go through.
//!
//! `sys.rs` has the few calls that no crate offers safely. `SO_LINGER` is deliberately absent: `close` says what is
//! done instead.

mod dial;
mod direct;
mod dotted;
mod identity;
mod kept;
mod lent;
mod listener;
mod local;
mod pipe;
mod sys;
mod tls;
mod tunnel;

use std::{
    cell::RefCell,
    fmt,
    future::{Future, poll_fn},
    io,
    os::fd::{AsFd, BorrowedFd},
    path::PathBuf,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};

use self::direct::Bare;
pub(crate) use self::dotted::Dotted;
pub use self::{
    dial::{DialError, Lack, Sources, check_sources, dial},
    kept::{Kept, is_too_slow},
    lent::{Back, Lent, lend},
    listener::{ADMIN_NAME, Inherited, Listener, Origin, PREDECESSOR_NAME, Wish, inherit, listen},
    local::{Fault, Local, fault},
    pipe::{MOST_PIPES, Pipe, limit_pipes},
    tls::{
        Accepting, ClientCertificate, Secured, TLS_FILE_BYTES, Tls, TlsClient, TlsFile, TlsFileError, TlsServer,
        encrypt, is_server_name, send_some, tls_error,
    },
    tunnel::{Discarded, Peer, Tunnel},
};
use crate::{metrics::Port, sparse::Sparse};

/// Where a backend is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// `host:port`; the host is resolved at each dial.
    Tcp {
        /// Name or literal address, without brackets.
        host: String,
        /// Never 0.
        port: u16,
    },
    /// A Unix-domain stream socket.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Options of every socket, on both legs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketConfig {
    /// First keep-alive probe after this much silence; `None`: no keep-alive.
    pub keepalive: Option<Duration>,
    /// `SO_RCVBUF` in bytes; `None`: the kernel's autotuning.
    pub recv_buffer: Option<usize>,
    /// `SO_SNDBUF` in bytes; `None`: the kernel's autotuning.
    pub send_buffer: Option<usize>,
    /// `TCP_USER_TIMEOUT`: longer than any deadline of ours, since it also ends live peers with a zero window.
    pub user_timeout: Option<Duration>,
}

impl SocketConfig {
    /// Before `listen()` or `connect()`, so that the window scale fits the buffer. Linux passes all of these on to
    /// accepted sockets (`sk_clone_lock` in net/core/sock.c copies the whole listening socket).
    fn apply(&self, socket: &SockRef<'_>) -> io::Result<()> {
        socket.set_tcp_nodelay(true)?;
        if let Some(timeout) = self.user_timeout {
            socket.set_tcp_user_timeout(Some(timeout))?;
        }
        if let Some(time) = self.keepalive {
            socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(time))?;
        }
        if let Some(size) = self.recv_buffer {
            socket.set_recv_buffer_size(size)?;
        }
        if let Some(size) = self.send_buffer {
            socket.set_send_buffer_size(size)?;
        }
        Ok(())
    }
}

/// The errors that are about this system and not about one connection.
pub fn shortage(error: &io::Error) -> Option<&'static str> {
    match error.raw_os_error()? {
        libc::EMFILE => Some("EMFILE"),
        libc::ENFILE => Some("ENFILE"),
        libc::ENOBUFS => Some("ENOBUFS"),
        libc::ENOMEM => Some("ENOMEM"),
        _ => None,
    }
}

/// A leg's transport: a socket of the kernel, bare or with TLS, or a stream of a connection that others share.
///
/// Whatever has more to it than a socket is boxed, so that plain sessions are no larger for it.
#[derive(Debug)]
pub enum Stream {
    /// TCP, accepted.
    Tcp(TcpStream),
    /// TCP, connected by us: it has a port of ours, and is counted until it is closed.
    Dialled(TcpStream, Port),
    /// A Unix-domain socket.
    Unix(UnixStream),
    /// One of these, encrypted.
    Tls(Box<Tls>),
    /// A stream of an HTTP/2 connection.
    Multiplexed(Box<Tunnel>),
    /// An end within this process.
    Local(Box<dyn Local>),
}

/// What is left of a leg when nothing more is said on it.
#[derive(Debug)]
pub enum Last {
    /// Its socket.
    Socket {
        /// It, and nothing else.
        socket: Stream,
        /// What is to go out before its FIN, and the kernel did not take: the end of what TLS had to say.
        unsent: Box<[u8]>,
    },
    /// Its stream.
    Tunnel(Box<Tunnel>),
    /// It was within this process, and is gone.
    Nothing,
}

/// Bytes that the peer's kernel has not acknowledged, a FIN of ours counted as one (`SIOCOUTQ` in tcp(7)).
pub fn unacked(fd: impl AsFd) -> io::Result<usize> {
    sys::out_queue(fd.as_fd())
}

/// Whoever watches a socket hears nothing of fewer bytes from now on, but of its FIN or RST. A read takes whatever is there. With 1 it hears at
/// once of what has come meanwhile.
pub fn set_low_water(fd: impl AsFd, bytes: i32) -> io::Result<()> {
    sys::set_low_water(fd.as_fd(), bytes)
}

impl Stream {
    /// Takes it away from whoever wrote and read.
    pub fn into_last(self) -> io::Result<Last> {
        Ok(match self {
            Self::Tcp(_) | Self::Dialled(..) | Self::Unix(_) => Last::Socket { socket: self, unsent: Box::default() },
            Self::Tls(tls) => return tls.into_last(),
            Self::Multiplexed(tunnel) => Last::Tunnel(tunnel),
            Self::Local(_) => Last::Nothing,
        })
    }

    /// Reads into `buffer` at once or not at all; 0 is the peer's FIN, or the end of what TLS can make sense of: the socket is as
    /// it was, and may be ended in order.
    ///
    /// Unlike `try_read` it does not ask the kernel again after a short read, which says that nothing is left there. TLS may have
    /// more all the same, so only `Pending` means that whoever waits is woken. Whoever reads again has passed on what it read before.
    pub fn poll_read_slice(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        self.poll_read_again(cx, buffer, &mut false)
    }

    /// The same for one who asks often, and always with the same task's waker. `is_awaited` is this function's and [`Self::is_drained`]'s,
    /// false in the beginning, and whenever somebody else has read or waited in between.
    pub fn poll_read_again(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
        is_awaited: &mut bool,
    ) -> Poll<io::Result<usize>> {
        match self.bare() {
            Some(socket) => direct::poll_recv(socket, cx, buffer, is_awaited),
            None => self.poll_read_above(cx, buffer),
        }
    }

    /// After a read that was not filled: there is nothing more, and whoever waits is woken by what comes. False if that is not known.
    pub fn is_drained(&self, cx: &mut Context<'_>, is_awaited: &mut bool) -> bool {
        self.bare().is_some_and(|socket| direct::poll_await(socket, cx, is_awaited).is_pending())
    }

    /// Of what is more than a socket.
    fn poll_read_above(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        static SAID: Sparse = Sparse::new();
        let mut buffer = ReadBuf::new(buffer);
        if let Err(error) = ready!(Pin::new(self).poll_read(cx, &mut buffer)) {
            let Some(broken) = tls_error(&error) else { return Poll::Ready(Err(error)) };
            if let Some(unsaid) = SAID.is_due() {
                tracing::warn!(error = %broken, unsaid, "TLS is broken: nothing more can be read");
            }
        }
        Poll::Ready(Ok(buffer.filled().len()))
    }

    /// Writes as much as is taken at once, or nothing.
    pub fn poll_write_slice(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_with(cx, bytes, false)
    }

    /// The same. `fin_follows`: it will be ended at once, and the kernel may wait for that.
    pub fn poll_write_with(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
        fin_follows: bool,
    ) -> Poll<io::Result<usize>> {
        match self.bare() {
            Some(socket) => direct::poll_send(socket, cx, bytes, fin_follows),
            None => Pin::new(self).poll_write(cx, bytes),
        }
    }

    /// What both sides have agreed to use it for, if it is encrypted (ALPN).
    pub fn protocol(&self) -> Option<&[u8]> {
        match self {
            Self::Tls(tls) => tls.protocol(),
            Self::Tcp(_) | Self::Dialled(..) | Self::Unix(_) | Self::Multiplexed(_) | Self::Local(_) => None,
        }
    }

    /// It is for HTTP/2, by ALPN.
    pub fn is_http2(&self) -> bool {
        self.protocol() == Some(b"h2")
    }

    /// Its TLS is broken. Nothing more is read or written; the socket is as it was.
    pub fn is_broken_tls(&self) -> bool {
        matches!(self, Self::Tls(tls) if tls.is_broken())
    }

    /// What was agreed on with a client, if it is encrypted.
    pub fn secured(&self) -> Option<Secured> {
        match self {
            Self::Tls(tls) => tls.secured(),
            Self::Tcp(_) | Self::Dialled(..) | Self::Unix(_) | Self::Multiplexed(_) | Self::Local(_) => None,
        }
    }

    /// Waits for something else, with what is to be done meanwhile.
    pub async fn wait_until<T>(&mut self, other: impl Future<Output = T>) -> T {
        let mut other = pin!(other);
        poll_fn(|cx| {
            let found = other.as_mut().poll(cx);
            if found.is_pending()
                && let Self::Multiplexed(tunnel) = self
            {
                tunnel.take_in(cx);
            }
            found
        })
        .await
    }

    /// What is to be done when it can't be read, since what was read before is not passed on yet. An error is a [`Fault`].
    pub fn wait(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self {
            Self::Multiplexed(tunnel) => tunnel.take_in(cx),
            Self::Local(local) => return local.wait(cx),
            Self::Tcp(_) | Self::Dialled(..) | Self::Unix(_) | Self::Tls(_) => {}
        }
        Ok(())
    }

    /// It is a socket of the kernel, and nothing else.
    pub const fn is_bare(&self) -> bool {
        self.bare().is_some()
    }

    const fn bare(&self) -> Option<Bare<'_>> {
        match self {
            Self::Tcp(stream) | Self::Dialled(stream, _) => Some(Bare::Tcp(stream)),
            Self::Unix(stream) => Some(Bare::Unix(stream)),
            Self::Tls(_) | Self::Multiplexed(_) | Self::Local(_) => None,
        }
    }

    /// It ends within this process, where nobody has to be asked whether he is there.
    pub fn is_local(&self) -> bool {
        matches!(self, Self::Local(_))
    }

    /// Nobody takes what comes from it: it is to end soon.
    pub fn shut(&mut self) {
        if let Self::Multiplexed(tunnel) = self {
            tunnel.shut();
        }
    }

    /// Nothing has come from the peer, no FIN or RST either, as its kernel has it now. For one that is not being read.
    pub fn is_silent(&mut self) -> bool {
        // TLS has words of its own, such as tickets for the next time. What it has not taken yet does not count as such.
        if let Self::Tls(_) = self {
            let mut cx = Context::from_waker(std::task::Waker::noop());
            if self.poll_read_slice(&mut cx, &mut [0; 1]).is_ready() {
                return false;
            }
        }
        let Some(fd) = self.socket() else { return false };
        let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
        matches!(rustix::net::recv(fd, &mut [0; 1], flags), Err(rustix::io::Errno::AGAIN))
    }

    /// The socket that is below it, if it has one of its own.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        let below = match self {
            Self::Tls(tls) => tls.below()?,
            _ => self,
        };
        below.bare().map(Bare::fd)
    }

    /// See [`unacked`]; `None`: it has no socket of its own.
    pub fn unacked(&self) -> Option<usize> {
        unacked(self.socket()?).ok()
    }

    /// How long others bear with it when nobody takes what comes from it; `None`: it is nobody else's.
    pub fn stall_timeout(&self) -> Option<Duration> {
        match self {
            Self::Tcp(_) | Self::Dialled(..) | Self::Unix(_) | Self::Tls(_) | Self::Local(_) => None,
            Self::Multiplexed(tunnel) => tunnel.stall_timeout(),
        }
    }

    /// After its peer's Close no end of it comes.
    pub fn is_forgotten(&self) -> bool {
        matches!(self, Self::Multiplexed(tunnel) if tunnel.is_forgotten())
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) | Self::Dialled(stream, _) => Pin::new(stream).poll_read(cx, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(tls) => tls.poll_read(cx, buffer),
            Self::Multiplexed(tunnel) => {
                let count = ready!(tunnel.poll_read(cx, buffer.initialize_unfilled()))?;
                buffer.advance(count);
                Poll::Ready(Ok(()))
            }
            Self::Local(local) => {
                let count = ready!(local.poll_read(cx, buffer.initialize_unfilled()))?;
                buffer.advance(count);
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) | Self::Dialled(stream, _) => Pin::new(stream).poll_write(cx, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(tls) => tls.poll_write(cx, bytes),
            Self::Multiplexed(tunnel) => tunnel.poll_write(cx, bytes),
            Self::Local(local) => local.poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) | Self::Dialled(stream, _) => Pin::new(stream).poll_write_vectored(cx, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bytes),
            Self::Tls(tls) => tls.poll_write_vectored(cx, bytes),
            Self::Multiplexed(tunnel) => tunnel.poll_write(cx, first(bytes)),
            Self::Local(local) => local.poll_write(cx, first(bytes)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// `shutdown(WR)`, or END_STREAM: the FIN goes out behind whatever is still queued.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) | Self::Dialled(stream, _) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(tls) => tls.poll_shutdown(cx),
            Self::Multiplexed(tunnel) => {
                tunnel.finish();
                Poll::Ready(Ok(()))
            }
            Self::Local(local) => {
                local.finish();
                Poll::Ready(Ok(()))
            }
        }
    }
}

fn first<'a>(bytes: &'a [io::IoSlice<'_>]) -> &'a [u8] {
    bytes.iter().find(|bytes| !bytes.is_empty()).map_or(&[], |bytes| bytes)
}

/// What is read at once of a client's first request: most are shorter.
const READ_AHEAD: usize = 4 * 1024;

/// What a client has sent already, up to [`READ_AHEAD`] bytes; `None`: nothing yet, else an end or an error, which
/// shows when it is read from again.
///
/// For a socket that is not registered with epoll: one that just was has to be waited for, even if it has something.
pub fn read_ahead(stream: &std::net::TcpStream) -> Option<Bytes> {
    with_scratch(|buffer| {
        match rustix::net::recv(stream, &mut buffer[..READ_AHEAD], rustix::net::RecvFlags::DONTWAIT) {
            Ok((length, _)) => Some(Bytes::copy_from_slice(&buffer[..length])),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => None,
            Err(_) => Some(Bytes::new()),
        }
    })
}

/// The same of a socket that was found to be readable; `None`: it is not, after all.
pub fn read_ahead_of_ready(stream: &TcpStream) -> Option<Bytes> {
    with_scratch(|buffer| {
        let read = direct::try_recv(Bare::Tcp(stream), &mut buffer[..READ_AHEAD])?;
        Some(read.map_or(Bytes::new(), |length| Bytes::copy_from_slice(&buffer[..length])))
    })
}

/// What a peer has sent already and nobody has read, as `look` has it, up to `most` bytes; it stays where it is. None at all: the peer has
/// ended. `None`: there is nothing yet.
pub fn peek<T>(socket: impl AsFd, most: usize, look: impl FnOnce(&[u8]) -> T) -> io::Result<Option<T>> {
    use rustix::net::RecvFlags;
    with_scratch(|buffer| match rustix::net::recv(socket, &mut buffer[..most], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((length, _)) => Ok(Some(look(&buffer[..length]))),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
        Err(error) => Err(error.into()),
    })
}

/// Takes so many bytes away that were seen by [`peek`], and nothing of what is behind them.
pub fn skip(socket: impl AsFd, mut length: usize) -> io::Result<()> {
    with_scratch(|buffer| {
        while length > 0 {
            match rustix::net::recv(&socket, &mut buffer[..length], rustix::net::RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((read, _)) => length -= read,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    })
}

/// Waits for what a client sends first, up to [`READ_AHEAD`] bytes; none: it has ended.
pub async fn read_ahead_of(stream: &TcpStream) -> io::Result<Bytes> {
    loop {
        stream.readable().await?;
        let read: io::Result<_> = with_scratch(|buffer| {
            let length = stream.try_read(&mut buffer[..READ_AHEAD])?;
            Ok(Bytes::copy_from_slice(&buffer[..length]))
        });
        match read {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            read => return read,
        }
    }
}

/// What came first, and what came after it.
pub fn concat(first: Bytes, rest: Bytes) -> Bytes {
    match (first.is_empty(), rest.is_empty()) {
        (true, _) => rest,
        (_, true) => first,
        _ => [first, rest].concat().into(),
    }
}

/// Bytes of the buffer that [`with_scratch`] lends: 64 KiB of a read behind the largest held frame (32 KiB) and its header.
pub const SCRATCH: usize = 64 * 1024 + 32 * 1024 + 64;

thread_local! {
    static SCRATCH_BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH]);
}

/// Lends the thread's scratch buffer, of [`SCRATCH`] bytes with arbitrary content, for the length of one call.
///
/// # Panics
/// When called inside itself.
pub fn with_scratch<R>(user: impl FnOnce(&mut [u8]) -> R) -> R {
    SCRATCH_BUFFER.with_borrow_mut(|buffer| user(buffer))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What has more to it than a socket is behind a pointer, so that plain sessions do not pay for it.
    #[test]
    fn a_stream_is_as_large_as_a_socket() {
        #[expect(dead_code, reason = "only its size is of interest")]
        enum Bare {
            Tcp(TcpStream),
            Dialled(TcpStream, Port),
            Unix(UnixStream),
        }
        assert_eq!(size_of::<Stream>(), size_of::<Bare>());
        assert_eq!(size_of::<Option<Stream>>(), size_of::<Bare>());
    }
}
