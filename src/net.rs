//! Sockets: addresses, options, the few calls that no crate offers safely, and the buffer that all reads go through.
//!
//! The only module with `unsafe` in it. `SO_LINGER` is deliberately absent: `close.rs` says what is done instead.

use std::{
    cell::RefCell,
    fmt,
    future::Future,
    io,
    net::{SocketAddr, TcpListener as StdListener},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpSocket, TcpStream, UnixStream},
    time::{Sleep, sleep},
};

/// Where a backend is.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    pub user_timeout: Duration,
}

impl SocketConfig {
    /// Before `listen()` or `connect()`, so that the window scale fits the buffer. Linux passes all of these on to
    /// accepted sockets (`sk_clone_lock` in net/core/sock.c copies the whole listening socket).
    fn apply(&self, socket: &SockRef<'_>) -> io::Result<()> {
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_user_timeout(Some(self.user_timeout))?;
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

/// `count` listening sockets on one address, each with an accept queue of its own (`SO_REUSEPORT`).
///
/// Port 0 picks a free port, the same for all. Fails with `AddrInUse` when anybody else listens there, also one that
/// would share the port: a forgotten process that takes every other client is worse than an error.
pub fn listeners(
    address: SocketAddr,
    backlog: u32,
    count: usize,
    config: &SocketConfig,
) -> io::Result<Vec<StdListener>> {
    let open = |address: SocketAddr, share: bool| -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(share)?;
        socket.bind(&address.into())?;
        Ok(socket)
    };
    drop(open(address, false)?);
    let mut address = address;
    let mut listeners = Vec::with_capacity(count);
    for _ in 0..count {
        let socket = open(address, true)?;
        config.apply(&SockRef::from(&socket))?;
        socket.set_nonblocking(true)?;
        // The kernel clamps to somaxconn by itself; the system call takes an int.
        socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX))?;
        let listener = StdListener::from(socket);
        address = listener.local_addr()?;
        listeners.push(listener);
    }
    Ok(listeners)
}

/// From now on the listening socket takes no new SYN; handshakes under way still finish.
///
/// A client whose SYN is dropped tries again a second later and finds another listener, or is refused: both are better
/// than the RST that a connection in `SYN_RECV` gets when its listener closes. Accepted sockets inherit the filter,
/// which is harmless, since they see no SYN.
pub fn refuse_new_connections(listener: &impl AsFd) -> io::Result<()> {
    // The filter sees the segment from its TCP header on. Byte 13 holds the flags; 0x02 is SYN.
    const LOAD_BYTE: u16 = 0x30; // BPF_LD | BPF_B | BPF_ABS
    const JUMP_IF_SET: u16 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    let op = socket2::SockFilter::new;
    SockRef::from(listener).attach_filter(&[
        op(LOAD_BYTE, 0, 0, 13),
        op(JUMP_IF_SET, 0, 1, 0x02),
        op(RETURN, 0, 0, 0),
        op(RETURN, 0, 0, u32::MAX),
    ])
}

/// Connects to a backend; a host name's addresses are tried in order. Deadlines are the caller's.
pub async fn dial(address: &Address, config: &SocketConfig) -> io::Result<Stream> {
    match address {
        Address::Unix(path) => Ok(Stream::Unix(UnixStream::connect(path).await?)),
        Address::Tcp { host, port } => {
            let mut failure = None;
            for address in tokio::net::lookup_host((host.as_str(), *port)).await? {
                match dial_tcp(address, config).await {
                    Ok(stream) => return Ok(Stream::Tcp(stream)),
                    Err(error) => failure = Some(error),
                }
            }
            Err(failure.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address")))
        }
    }
}

async fn dial_tcp(address: SocketAddr, config: &SocketConfig) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    config.apply(&SockRef::from(&socket))?;
    let stream = socket.connect(address).await?;
    // With the backend down and its port inside the ephemeral range, the kernel may give us that very port, and a
    // simultaneous open with ourselves succeeds.
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(io::Error::new(io::ErrorKind::ConnectionRefused, "connected to itself: nobody listens there"));
    }
    Ok(stream)
}

/// A leg's transport.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(TcpStream),
    /// A Unix-domain socket.
    Unix(UnixStream),
}

impl Stream {
    /// Bytes that the peer's kernel has not acknowledged, a FIN of ours counted as one (`SIOCOUTQ` in tcp(7)).
    pub fn unacked(&self) -> io::Result<usize> {
        out_queue(self.as_fd())
    }

    /// Reads into `buffer` at once or not at all; 0 is the peer's FIN.
    ///
    /// Unlike `try_read` it does not ask the kernel again after a short read, which says that nothing is left.
    pub fn poll_read_slice(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut buffer = ReadBuf::new(buffer);
        ready!(Pin::new(self).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(buffer.filled().len()))
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bytes),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// `shutdown(WR)`: the FIN goes out behind whatever is still queued.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
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
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Kept {
    /// Of a connected stream.
    pub const fn new(stream: Stream, write_timeout: Duration) -> Self {
        Self { stream, write_timeout, stalled: None }
    }

    /// The stream itself.
    pub fn into_inner(self) -> Stream {
        self.stream
    }

    fn poll_patiently(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut Stream>, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(result) = write(Pin::new(&mut self.stream), cx) {
            self.stalled = None;
            return Poll::Ready(result);
        }
        let timeout = self.write_timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(timeout)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer takes nothing")))
    }
}

impl AsyncRead for Kept {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buffer)
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

#[allow(unsafe_code)]
fn out_queue(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: TIOCOUTQ writes one int to its argument, which outlives the call; the descriptor is open while borrowed.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(bytes).unwrap_or(0))
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
