//! The socket calls that neither socket2 nor rustix offers safely. The only module with `unsafe` in it.

#![allow(unsafe_code)]

use std::{
    io, mem,
    os::fd::{AsRawFd, BorrowedFd},
    sync::Arc,
};

use tokio::io::{Interest, unix::AsyncFd};

use super::Listener;

/// Registers a listening socket with the runtime that this is called on.
pub(super) fn watch(listener: Arc<Listener>) -> io::Result<AsyncFd<Arc<Listener>>> {
    // SAFETY: the descriptor must be the same and open as long as the value is there: a listener owns it, and never puts
    // another in its place.
    unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) }.map_err(io::Error::from)
}

/// Bytes that the peer's kernel has not acknowledged, a FIN of ours counted as one (`SIOCOUTQ` in tcp(7)).
pub(super) fn out_queue(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: TIOCOUTQ writes one int to its argument, which outlives the call; the descriptor is open while borrowed.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// How many connections wait in a listening socket's accept queue, and how many may: the backlog as the kernel granted
/// it. A queue holds one more than that (`sk_acceptq_is_full` in include/net/sock.h).
///
/// `TCP_INFO` tells it of a listening socket in two fields that mean something else for others
/// (`tcp_get_info` in net/ipv4/tcp.c).
pub(super) fn accept_queue(fd: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    const LISTEN: u8 = 10; // TCP_LISTEN, include/net/tcp_states.h
    // SAFETY: all fields of tcp_info are integers, for which zeroes are a value.
    let mut info: libc::tcp_info = unsafe { mem::zeroed() };
    let mut length = libc::socklen_t::try_from(mem::size_of_val(&info)).expect("a small struct");
    // SAFETY: the kernel writes at most `length` bytes to `info`, which outlives the call; the descriptor is open while
    // borrowed.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast::<libc::c_void>(),
            &raw mut length,
        )
    };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    if info.tcpi_state != LISTEN {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no listening socket"));
    }
    Ok((info.tcpi_unacked, info.tcpi_sacked))
}

/// Gives a socket's buffers back to autotuning, after a size was set (`SO_BUF_LOCK`, Linux 5.15, include/uapi/asm-generic/socket.h).
pub(super) fn unlock_buffers(fd: BorrowedFd<'_>) -> io::Result<()> {
    const SO_BUF_LOCK: libc::c_int = 72;
    set_int(fd, libc::SOL_SOCKET, SO_BUF_LOCK, 0)
}

/// The port is chosen by `connect()`, when the peer is known, rather than by `bind()`: so one address has all its ports
/// toward each peer, and not once for all (`IP_BIND_ADDRESS_NO_PORT` in ip(7), also for IPv6).
pub(super) fn bind_without_port(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_int(fd, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)
}

/// epoll says nothing of a socket with fewer unread bytes, but of its FIN or RST (`SO_RCVLOWAT` in socket(7); `tcp_data_ready` and
/// `tcp_set_rcvlowat`, net/ipv4/tcp*.c). At most half of its buffer. A read takes whatever is there, as ever.
pub(super) fn set_low_water(fd: BorrowedFd<'_>, bytes: i32) -> io::Result<()> {
    set_int(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, bytes)
}

fn set_int(fd: BorrowedFd<'_>, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the kernel reads one int from its argument, which outlives the call; the descriptor is open while borrowed.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            (&raw const value).cast::<libc::c_void>(),
            libc::socklen_t::try_from(mem::size_of_val(&value)).expect("an int"),
        )
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
