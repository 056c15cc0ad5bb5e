//! A WebSocket handshake on a fresh connection, without a connection object of hyper's: one write, a read or two.
//!
//! Nine of ten handshakes are answered with 101, and then there is no body, no second request, nothing that hyper would be
//! needed for. Reading the header is httparse's work, as it is in hyper. Any other answer is handed to hyper from its first
//! byte on, so that bodies are read in one way only.

use std::{
    future::poll_fn,
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
};

use bytes::Bytes;
use http::Version;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    time::{Instant, timeout_at},
};

use super::{Config, Control, Error, Failure};
use crate::{
    fields::{Lines, Spans, spans},
    net::{Kept, Stream, concat, with_scratch},
};

/// The most header fields of an answer, as in hyper.
const MAX_HEADERS: usize = 100;

/// What is read at once of an answer: most are shorter.
const MOST: usize = 1024;

/// What a backend said first.
pub(super) enum First {
    /// 101, not checked yet: its version and header, its socket, and what came behind it.
    Switching(Version, Lines, Stream, Bytes),
    /// Something else, or nothing that could be read: for hyper to look at.
    Other(Replay),
}

/// A connection on which it is as if the request that was sent had not been sent, nor the answer been read: what is written
/// goes nowhere, and what was read of the answer is read again.
#[derive(Debug)]
pub(super) struct Replay {
    stream: Kept,
    /// The request was written once more: before that hyper would take the answer for one to nothing.
    is_due: bool,
    reader: Option<Waker>,
}

impl Replay {
    fn new(stream: Kept, answer: Bytes) -> Self {
        Self { stream: stream.rewind(answer), is_due: false, reader: None }
    }
}

impl From<Replay> for Kept {
    fn from(replay: Replay) -> Self {
        replay.stream
    }
}

impl AsyncRead for Replay {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.is_due {
            self.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Replay {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.is_due = true;
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Sends the request and reads until the end of the answer's header.
pub(super) async fn ask(
    stream: Stream,
    head: &[u8],
    config: &Config,
    deadline: Instant,
    control: &Control,
) -> Result<First, Failure> {
    let mut stream = Kept::new(stream, config.write_timeout);
    let asked = tokio::select! {
        biased;
        () = control.given_up() => None,
        asked = timeout_at(deadline, exchange(&mut stream, head, config.header_bytes)) => Some(asked),
    };
    let Some(Ok((read, answer))) = asked else {
        return Err(Failure {
            error: Error::Timeout("backend did not answer in time"),
            stream: Some(stream.into_inner()),
        });
    };
    match answer {
        Some((version, lines)) => Ok(First::Switching(version, lines, stream.into_inner(), read)),
        None => Ok(First::Other(Replay::new(stream, read))),
    }
}

/// What was read, less the header of a 101 if it began with one. Failures show when it is read again.
async fn exchange(stream: &mut Kept, head: &[u8], limit: usize) -> (Bytes, Option<(Version, Lines)>) {
    let mut read = Bytes::new();
    let sent = stream.write_now(head);
    // When this fails the backend may have answered, and closed, before it had read all.
    let _ = stream.write_all(&head[sent..]).await;
    loop {
        match poll_fn(|cx| poll_more(stream, cx)).await {
            Ok(more) if !more.is_empty() => read = concat(read, more),
            _ => return (read, None),
        }
        match parse_switching(&read) {
            Parsed::Switching(length, version, spans) if length <= limit => {
                let behind = read.split_off(length);
                return (behind, Some((version, Lines::new(read, spans))));
            }
            Parsed::Partial if read.len() <= limit => {}
            _ => return (read, None),
        }
    }
}

/// What is there, no larger than it is; none: the backend has ended.
fn poll_more(stream: &mut Kept, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
    with_scratch(|buffer| {
        let mut buffer = ReadBuf::new(&mut buffer[..MOST]);
        ready!(Pin::new(stream).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(Bytes::copy_from_slice(buffer.filled())))
    })
}

enum Parsed {
    Partial,
    /// The length of the header, its version, and where its lines are.
    Switching(usize, Version, Spans),
    Other,
}

fn parse_switching(bytes: &[u8]) -> Parsed {
    let mut fields = [const { MaybeUninit::uninit() }; MAX_HEADERS];
    let mut head = httparse::Response::new(&mut []);
    let parsed = httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut head, bytes, &mut fields);
    let length = match parsed {
        Ok(httparse::Status::Complete(length)) => length,
        // What has a status already need not be waited for.
        Ok(httparse::Status::Partial) if head.code.is_none_or(|code| code == 101) => return Parsed::Partial,
        Ok(httparse::Status::Partial) | Err(_) => return Parsed::Other,
    };
    if head.code != Some(101) {
        return Parsed::Other;
    }
    let Some(spans) = spans(head.headers, bytes) else { return Parsed::Other };
    let version = if head.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 };
    Parsed::Switching(length, version, spans)
}
