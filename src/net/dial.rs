//! Connecting to a backend: from which address, and what it means when it fails.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use rustix::io::Errno;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpStream, UnixStream};

use super::{Address, SocketConfig, Stream, shortage, sys};
use crate::metrics::Port;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// This host has too little of something; the backend was not asked.
    #[error("{error}: {lack}")]
    Shortage {
        /// Of what.
        lack: Lack,
        /// What the system said.
        error: io::Error,
    },
    /// The backend's side of it.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What this host has too little of; displayed, what to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lack {
    /// Ports toward the backend.
    Ports,
    /// Descriptors.
    Descriptors,
    /// Memory for sockets.
    Memory,
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ports => {
                "every port of net.ipv4.ip_local_port_range is in use toward the backend; name more addresses of this host in \
                 upstream.source_addresses, widen the range, or use a Unix socket"
            }
            Self::Descriptors => "out of descriptors; raise RLIMIT_NOFILE (EMFILE) or fs.file-max (ENFILE), or lower limits.max_connections",
            Self::Memory => "the kernel has no memory for one more socket; see net.ipv4.tcp_mem and the memory limit",
        })
    }
}

/// The addresses of this host to connect from, in turn. Clones share the turn.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    addresses: Arc<[IpAddr]>,
    next: Arc<AtomicUsize>,
}

impl Sources {
    /// None: the kernel chooses.
    pub fn new(addresses: &[IpAddr]) -> Self {
        Self { addresses: addresses.into(), next: Arc::default() }
    }

    /// How many sockets may be connected from the same port to the same peer.
    pub fn count(&self) -> usize {
        self.addresses.len().max(1)
    }

    /// All of `peer`'s family, beginning with the one whose turn it is; one `None` when nothing was configured.
    fn toward(&self, peer: SocketAddr) -> Vec<Option<IpAddr>> {
        if self.addresses.is_empty() {
            return vec![None];
        }
        let mut fitting: Vec<_> = self.addresses.iter().copied().filter(|ip| ip.is_ipv4() == peer.is_ipv4()).collect();
        if !fitting.is_empty() {
            let turn = self.next.fetch_add(1, Ordering::Relaxed) % fitting.len();
            fitting.rotate_left(turn);
        }
        fitting.into_iter().map(Some).collect()
    }
}

/// Whether each of these is an address of this host: said at the start, rather than with every client.
pub fn check_sources(addresses: &[IpAddr]) -> Result<(), DialError> {
    for address in addresses {
        bind(&socket_for(*address)?, *address)?;
    }
    Ok(())
}

fn socket_for(address: IpAddr) -> io::Result<Socket> {
    let domain = if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))
}

fn bind(socket: &Socket, source: IpAddr) -> io::Result<()> {
    socket.bind(&SocketAddr::new(source, 0).into()).map_err(|error| {
        let reason =
            format!("cannot connect from {source} (upstream.source_addresses): {error}; name addresses of this host");
        io::Error::new(io::ErrorKind::InvalidInput, reason)
    })
}

/// Connects to a backend; a host name's addresses are tried in order. Deadlines are the caller's. What `taken` gives lives as
/// long as a TCP socket does.
pub async fn dial(
    address: &Address,
    sources: &Sources,
    config: &SocketConfig,
    taken: impl FnOnce() -> Port,
) -> Result<Stream, DialError> {
    match address {
        Address::Unix(path) => {
            Ok(Stream::Unix(UnixStream::connect(path).await.map_err(|error| lacking(error, false))?))
        }
        Address::Tcp { host, port } => {
            let mut failure = None;
            for address in tokio::net::lookup_host((host.as_str(), *port)).await? {
                match dial_tcp(address, sources, config).await {
                    Ok(stream) => return Ok(Stream::Dialled(stream, taken())),
                    Err(error) => failure = Some(error),
                }
            }
            let nowhere = || io::Error::new(io::ErrorKind::NotFound, "the name has no address").into();
            Err(failure.unwrap_or_else(nowhere))
        }
    }
}

async fn dial_tcp(peer: SocketAddr, sources: &Sources, config: &SocketConfig) -> Result<TcpStream, DialError> {
    let mut failure = None;
    for source in sources.toward(peer) {
        match dial_from(source, peer, config).await {
            // Another address has ports of its own.
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => failure = Some(lacking(error, true)),
            Err(error) => return Err(lacking(error, true)),
            Ok(stream) => return Ok(stream),
        }
    }
    let none = || {
        let family = if peer.is_ipv4() { "IPv4" } else { "IPv6" };
        let reason = format!("none of upstream.source_addresses is an {family} address, but {peer} is");
        io::Error::new(io::ErrorKind::InvalidInput, reason).into()
    };
    Err(failure.unwrap_or_else(none))
}

async fn dial_from(source: Option<IpAddr>, peer: SocketAddr, config: &SocketConfig) -> io::Result<TcpStream> {
    let socket = socket_for(peer.ip())?;
    if peer.ip().is_loopback() {
        // The peer's kernel is ours: it can't vanish without a word.
        SocketConfig { keepalive: None, user_timeout: None, ..config.clone() }.apply(&SockRef::from(&socket))?;
    } else {
        config.apply(&SockRef::from(&socket))?;
    }
    if let Some(source) = source {
        sys::bind_without_port(std::os::fd::AsFd::as_fd(&socket))?;
        bind(&socket, source)?;
    }
    let stream = connect(socket, peer).await?;
    // With the backend down and its port inside the ephemeral range, the kernel may give us that very port, and a
    // simultaneous open with ourselves succeeds.
    let local = stream.local_addr()?;
    if local.port() == peer.port() && (local.ip() == peer.ip() || peer.ip().is_unspecified()) {
        let reason = "connected to itself, so nobody listens there; keep the backend's port out of \
                      net.ipv4.ip_local_port_range, or put it into net.ipv4.ip_local_reserved_ports";
        return Err(io::Error::new(io::ErrorKind::ConnectionRefused, reason));
    }
    Ok(stream)
}

/// Within a host all packets have passed when `connect()` returns, although it says EINPROGRESS, so that is not waited for.
async fn connect(socket: Socket, peer: SocketAddr) -> io::Result<TcpStream> {
    match socket.connect(&peer.into()) {
        Err(error) if error.raw_os_error() != Some(Errno::INPROGRESS.raw_os_error()) => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let stream = TcpStream::from_std(socket.into())?;
    // ENOTCONN: not yet, or not any more.
    if stream.peer_addr().is_err() {
        stream.writable().await?;
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
    }
    Ok(stream)
}

/// Tells what this host lacks from what is the backend's side.
fn lacking(error: io::Error, has_port: bool) -> DialError {
    let lack = match (shortage(&error), error.kind()) {
        (Some("EMFILE" | "ENFILE"), _) => Lack::Descriptors,
        (Some(_), _) => Lack::Memory,
        // EADDRNOTAVAIL of connect(): `__inet_hash_connect` in net/ipv4/inet_hashtables.c found no port.
        (None, io::ErrorKind::AddrNotAvailable) if has_port => Lack::Ports,
        _ => return DialError::Io(error),
    };
    DialError::Shortage { lack, error }
}
