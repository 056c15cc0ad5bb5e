//! A leg that ends within this process: no socket, but what others have read already, or will write elsewhere.
//!
//! To the relay it is a peer like any other, whose frames come unmasked or masked by whose leg it stands for. What no peer can say by its
//! bytes it says by a [`Fault`].

use std::{
    fmt, io,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

use crate::ws::Violation;

/// See the module. Dropped, it has ended in both directions.
pub trait Local: fmt::Debug + Send + Sync {
    /// Reads what is there; 0 is the end. An error may be a [`Fault`], which is said once.
    fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>>;

    /// Takes some of these bytes. After a [`Fault`] it takes the rest too, and only a Close counts.
    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>>;

    /// Nothing more will be written. Idempotent.
    fn finish(&mut self);

    /// What it has can't be read, since what was read before is not passed on yet. An error as in [`Local::poll_read`].
    fn wait(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let _ = cx;
        Ok(())
    }
}

/// What is wrong with the client of a leg, and not with the leg.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// It is too slow for what it is sent.
    #[error("too slow")]
    Slow,
    /// It says what it may not say here.
    #[error(transparent)]
    Broke(Violation),
}

impl From<Fault> for io::Error {
    fn from(fault: Fault) -> Self {
        Self::other(fault)
    }
}

/// What stands behind an error of a leg, if it is a [`Fault`].
pub fn fault(error: &io::Error) -> Option<Fault> {
    error.get_ref()?.downcast_ref().copied()
}

/// One end of a pipe, for whoever speaks WebSocket at the other.
impl Local for DuplexStream {
    fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut buffer = ReadBuf::new(buffer);
        ready!(AsyncRead::poll_read(Pin::new(self), cx, &mut buffer))?;
        Poll::Ready(Ok(buffer.filled().len()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write(Pin::new(self), cx, bytes)
    }

    fn finish(&mut self) {
        // Ready at once, by tokio's documentation of it.
        let _ = AsyncWrite::poll_shutdown(Pin::new(self), &mut Context::from_waker(Waker::noop()));
    }
}
