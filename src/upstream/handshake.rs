//! A WebSocket handshake on a fresh connection, without a connection object of hyper's: one write, a read or two.
//!
//! Nine of ten handshakes are answered with 101, and then there is no body, no second request, nothing that hyper would be
//! needed for. Reading the header is httparse's work, as it is in hyper. Any other answer is handed to hyper from its first
//! byte on, so that bodies are read in one way only.

use std::{
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use bytes::{Bytes, BytesMut};
use http::{Request, Response, StatusCode, Version};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    time::{Instant, timeout_at},
};

use super::{Config, Control, Error, Failure};
use crate::{
    fields::{read_header, write_header},
    net::{Kept, Stream, concat},
};

/// The most header fields of an answer, as in hyper.
const MAX_HEADERS: usize = 100;

/// Room for most requests, and answers.
const MOST: usize = 1024;

/// What a backend said first.
pub(super) enum First {
    /// 101, not checked yet: its header, its socket, and what came behind it.
    Switching(Response<()>, Stream, Bytes),
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
    request: &Request<()>,
    config: &Config,
    deadline: Instant,
    control: &Control,
) -> Result<First, Failure> {
    let mut stream = Kept::new(stream, config.write_timeout);
    let asked = tokio::select! {
        biased;
        () = control.given_up() => None,
        asked = timeout_at(deadline, exchange(&mut stream, request, config.header_bytes)) => Some(asked),
    };
    let Some(Ok((read, answer))) = asked else {
        return Err(Failure {
            error: Error::Timeout("backend did not answer in time"),
            stream: Some(stream.into_inner()),
        });
    };
    match answer {
        Some(response) => Ok(First::Switching(response, stream.into_inner(), read)),
        None => Ok(First::Other(Replay::new(stream, read))),
    }
}

/// What was read, less the header of a 101 if it began with one. Failures show when it is read again.
async fn exchange(stream: &mut Kept, request: &Request<()>, limit: usize) -> (Bytes, Option<Response<()>>) {
    let mut read = Bytes::new();
    let head = head(request);
    let sent = stream.write_now(&head);
    // When this fails the backend may have answered, and closed, before it had read all.
    let _ = stream.write_all(&head[sent..]).await;
    loop {
        let mut more = BytesMut::with_capacity(MOST);
        match stream.read_buf(&mut more).await {
            Ok(0) | Err(_) => return (read, None),
            Ok(_) => read = concat(read, more.freeze()),
        }
        match parse_switching(&read) {
            Parsed::Switching(length, response) if length <= limit => {
                return (read.slice(length..), Some(response));
            }
            Parsed::Partial if read.len() <= limit => {}
            _ => return (read, None),
        }
    }
}

enum Parsed {
    Partial,
    /// The length of the header, and what is in it.
    Switching(usize, Response<()>),
    Other,
}

fn parse_switching(bytes: &Bytes) -> Parsed {
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
    let Some(headers) = read_header(head.headers, bytes) else { return Parsed::Other };
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *response.version_mut() = if head.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 };
    *response.headers_mut() = headers;
    Parsed::Switching(length, response)
}

/// The request as it goes out.
fn head(request: &Request<()>) -> Vec<u8> {
    let mut head = Vec::with_capacity(MOST);
    let target = request.uri().path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    // "http://host?query" has an empty path, which is sent as "/" (RFC 9112 3.2.1).
    let root = if target.starts_with('/') { "" } else { "/" };
    for part in [request.method().as_str(), " ", root, target, " HTTP/1.1\r\n"] {
        head.extend_from_slice(part.as_bytes());
    }
    write_header(request.headers(), &mut head);
    head
}
