//! A stream in the hands of h2: it can't be ended there, comes back when its connection is over, and is read in turns.
//!
//! On either side of a connection; what goes over it is not looked at.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Where a connection's stream comes back to.
#[derive(Debug)]
pub struct Back<S> {
    stream: Mutex<Option<S>>,
    was_heard: AtomicBool,
    /// Bytes that may still be read in this turn.
    turn: AtomicUsize,
}

/// See the module.
#[derive(Debug)]
pub struct Lent<S> {
    /// `None` only when it was given back.
    stream: Option<S>,
    back: Arc<Back<S>>,
}

/// Lends a stream, with where it comes back to.
pub fn lend<S>(stream: S) -> (Lent<S>, Arc<Back<S>>) {
    let back = Back { stream: Mutex::new(None), was_heard: AtomicBool::new(false), turn: AtomicUsize::new(usize::MAX) };
    let back = Arc::new(back);
    (Lent { stream: Some(stream), back: Arc::clone(&back) }, back)
}

impl<S> Back<S> {
    /// It, if it is back.
    pub fn take(&self) -> Option<S> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// So many bytes may be read until this is said again.
    pub fn begin_turn(&self, bytes: usize) {
        self.turn.store(bytes, Ordering::Relaxed);
    }

    /// Something was read, or its end was, since this was last asked.
    pub fn was_heard(&self) -> bool {
        self.was_heard.swap(false, Ordering::Relaxed)
    }
}

impl<S: Unpin> Lent<S> {
    fn stream(&mut self) -> io::Result<Pin<&mut S>> {
        self.stream.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl<S> Drop for Lent<S> {
    fn drop(&mut self) {
        *self.back.stream.lock().unwrap_or_else(PoisonError::into_inner) = self.stream.take();
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Lent<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let left = this.back.turn.load(Ordering::Relaxed);
        if left == 0 {
            // Behind whoever has become ready meanwhile.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        let read = this.stream()?.poll_read(cx, buffer);
        if read.is_ready() {
            this.back.was_heard.store(true, Ordering::Relaxed);
            this.back.turn.store(left.saturating_sub(buffer.filled().len() - before), Ordering::Relaxed);
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Lent<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().stream()?.poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().stream()?.poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().stream()?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
