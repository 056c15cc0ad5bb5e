//! Sockets.

use std::{fmt, net::SocketAddr, path::PathBuf, time::Duration};

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

/// Where the admin listener is.
pub type AdminAddress = Option<SocketAddr>;
