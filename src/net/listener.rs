//! Listening sockets: several accept queues on one address, what the kernel granted them, and how they stop.

use std::{
    env, io,
    net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::net::UnixStream as StdUnixStream,
    },
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use listenfd::ListenFd;
use rustix::net::{SocketFlags, acceptfrom_with};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::unix::AsyncFd;

use super::{SocketConfig, sys};
use crate::metrics::Queue;

/// What is wanted of the accept queues of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    /// Connections that may wait to be accepted, in all queues together.
    pub backlog: u32,
    /// Queues, at least: 1 to `most`.
    pub queues: usize,
    /// Queues, at most.
    pub most: usize,
}

impl Wish {
    /// How many queues are opened when each is granted `limit`.
    pub fn sockets(self, limit: u32) -> usize {
        let needed = usize::try_from(self.backlog.div_ceil(limit.max(1))).unwrap_or(usize::MAX);
        // Whole rows: as many for each of the least number of queues, so that none of their owners gets more clients.
        let rows = needed.div_ceil(self.queues).min(self.most / self.queues).max(1);
        rows * self.queues
    }
}

/// A listening socket with its accept queue.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    origin: Origin,
    /// Somebody else holds this socket too, and will go on listening on it. One word for all shares.
    is_held_elsewhere: Arc<AtomicBool>,
}

/// Who opened a listening socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// This process, or one that it succeeds: it is closed with the last of them.
    Ours,
    /// Somebody who passed it and keeps it, as systemd does.
    Theirs,
}

impl Origin {
    /// Its name in `LISTEN_FDNAMES` when it is passed on to a successor.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ours => "tidegate-clients",
            Self::Theirs => "tidegate-passed",
        }
    }
}

/// The name of the admin listener, and of the stream between a process and its successor.
pub const ADMIN_NAME: &str = "tidegate-admin";
/// See [`ADMIN_NAME`].
pub const PREDECESSOR_NAME: &str = "tidegate-predecessor";

/// What was passed by `LISTEN_FDS`.
#[derive(Debug, Default)]
pub struct Inherited {
    /// Where clients connect.
    pub clients: Vec<Listener>,
    /// The admin listener of the process that this one succeeds.
    pub admin: Option<StdListener>,
    /// The way to that process.
    pub predecessor: Option<StdUnixStream>,
}

/// Opens accept queues on an address (`SO_REUSEPORT`), as many as it takes to have the backlog that is wanted.
///
/// `listen()` clamps each queue to `net.core.somaxconn` without a word, but each socket has a queue of its own, which
/// takes no privilege. Port 0 picks a free port, the same for all. Fails with `AddrInUse` when anybody else listens
/// there, also one that would share the port: a forgotten process that takes every other client is worse than an error.
pub fn listen(address: SocketAddr, wish: Wish, config: &SocketConfig) -> io::Result<Vec<Listener>> {
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
    let mut listeners: Vec<Listener> = Vec::new();
    let mut wanted = wish.queues;
    while listeners.len() < wanted {
        let socket = open(address, true)?;
        config.apply(&SockRef::from(&socket))?;
        socket.set_nonblocking(true)?;
        // Each gets the whole backlog: the kernel spreads clients by a hash, so none gets exactly its share.
        socket.listen(saturating(wish.backlog))?;
        if let Some(local) = socket.local_addr()?.as_socket() {
            address = local;
        }
        let listener = Listener { socket: socket.into(), origin: Origin::Ours, is_held_elsewhere: Arc::default() };
        if listeners.is_empty() {
            wanted = wish.sockets(listener.queue()?.limit);
        }
        listeners.push(listener);
    }
    Ok(listeners)
}

/// What was passed by `LISTEN_FDS` (`sd_listen_fds(3)`), by systemd or by a process that this one succeeds.
///
/// The one who passed listening sockets holds them too, so connections that wait in them when we end are not lost. To be called
/// once, early: it takes the descriptors, and the variables out of the environment.
pub fn inherit(backlog: u32, config: &SocketConfig) -> io::Result<Inherited> {
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let names: Vec<&str> = names.split(':').collect();
    let mut passed = ListenFd::from_env();
    let mut inherited = Inherited::default();
    for index in 0..passed.len() {
        let name = names.get(index).copied().unwrap_or_default();
        if name == PREDECESSOR_NAME {
            inherited.predecessor = passed.take_custom(index, libc::AF_UNIX, libc::SOCK_STREAM, "stream")?;
            continue;
        }
        let Some(listener) = passed.take_tcp_listener(index)? else { continue };
        listener.set_nonblocking(true)?;
        if name == ADMIN_NAME {
            inherited.admin = Some(listener);
            continue;
        }
        let socket = SockRef::from(&listener);
        config.apply(&socket)?;
        // On a socket that listens already this only sets its backlog anew.
        socket.listen(saturating(backlog))?;
        let origin = if name == Origin::Ours.name() { Origin::Ours } else { Origin::Theirs };
        let is_held_elsewhere = Arc::new(AtomicBool::new(true));
        inherited.clients.push(Listener { socket: listener.into(), origin, is_held_elsewhere });
    }
    Ok(inherited)
}

/// The system call takes an int, and clamps by itself.
fn saturating(backlog: u32) -> i32 {
    i32::try_from(backlog).unwrap_or(i32::MAX)
}

impl Listener {
    /// Takes a connection out of the queue; `WouldBlock` when there is none. The stream is non-blocking.
    pub fn accept(&self) -> io::Result<(StdStream, SocketAddr)> {
        let (socket, peer) = acceptfrom_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
        let peer = peer.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a client without an IP address"))?;
        Ok((socket.into(), peer))
    }

    /// To await connections, on the runtime that this is called on.
    pub fn watch(self: &Arc<Self>) -> io::Result<AsyncFd<Arc<Self>>> {
        sys::watch(Arc::clone(self))
    }

    /// Its accept queue now; a queue holds one connection more than its limit (`sk_acceptq_is_full` in include/net/sock.h).
    pub fn queue(&self) -> io::Result<Queue> {
        let (length, limit) = sys::accept_queue(self.as_fd())?;
        Ok(Queue { length, limit })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        let address = SockRef::from(&self.socket).local_addr()?.as_socket();
        address.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no IP address"))
    }

    /// Somebody else holds it too, and will go on listening.
    pub fn is_held_elsewhere(&self) -> bool {
        self.is_held_elsewhere.load(Ordering::Acquire)
    }

    /// From now on a successor listens on it: it is only to be let go.
    pub fn hand_on(&self) {
        self.is_held_elsewhere.store(true, Ordering::Release);
    }

    /// Whoever passed it has let go of it, unless that is somebody who keeps it.
    pub fn take_over(&self) {
        self.is_held_elsewhere.store(self.origin == Origin::Theirs, Ordering::Release);
    }

    /// Who opened it.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// For connections that are accepted from now on. Those that the kernel already holds may be as they were.
    pub fn reconfigure(&self, config: &SocketConfig) -> io::Result<()> {
        let socket = SockRef::from(&self.socket);
        if config.keepalive.is_none() {
            socket.set_keepalive(false)?;
        }
        config.apply(&socket)?;
        if config.recv_buffer.is_none() || config.send_buffer.is_none() {
            // Last, since older kernels can't (before 5.15).
            sys::unlock_buffers(self.as_fd())?;
            // Whichever has a size gets it again.
            config.apply(&socket)?;
        }
        Ok(())
    }

    /// The same socket, and so the same queue, for one more accept loop.
    pub fn share(&self) -> io::Result<Self> {
        let is_held_elsewhere = Arc::clone(&self.is_held_elsewhere);
        Ok(Self { socket: self.socket.try_clone()?, origin: self.origin, is_held_elsewhere })
    }

    /// From now on it takes no new SYN; handshakes under way still finish.
    ///
    /// A client whose SYN is dropped tries again a second later and finds another listener, or is refused: both are better
    /// than the RST that a connection in `SYN_RECV` gets when its listener closes. Accepted sockets inherit the filter,
    /// which is harmless, since they see no SYN.
    pub fn refuse_new_connections(&self) -> io::Result<()> {
        // The filter sees the segment from its TCP header on. Byte 13 holds the flags; 0x02 is SYN.
        const LOAD_BYTE: u16 = 0x30; // BPF_LD | BPF_B | BPF_ABS
        const JUMP_IF_SET: u16 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
        const RETURN: u16 = 0x06; // BPF_RET | BPF_K
        let op = socket2::SockFilter::new;
        SockRef::from(&self.socket).attach_filter(&[
            op(LOAD_BYTE, 0, 0, 13),
            op(JUMP_IF_SET, 0, 1, 0x02),
            op(RETURN, 0, 0, 0),
            op(RETURN, 0, 0, u32::MAX),
        ])
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
