//! One request on one connection, by hyper, driven inside the caller's own task.
//!
//! A connection object of hyper's is for one request, also on a connection that had others before and will have more: it begins and
//! ends with a bare socket, so that what waits in between (`idle.rs`) is the same for both kinds, and can be looked at.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
};

use bytes::Bytes;
use http::{
    Request, Response, StatusCode, Version,
    header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, UPGRADE},
};
use http_body::Body;
use http_body_util::Empty;
use hyper::{
    body::Incoming,
    client::conn::http1::{self, Connection as Driver, SendRequest},
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, timeout_at},
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::{
    Answer, Config, Connection, Control, Error, Failure, Reply, ReplyBody,
    handshake::{self, First, Replay},
    tls,
};
use crate::{
    fields::{Ask, Header, Switching, has_token},
    net::{Kept, Stream, concat},
};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What hyper may work on: the socket can be had back from it.
trait Transport: AsyncRead + AsyncWrite + Into<Kept> + Unpin + Send + 'static {}

impl<S: AsyncRead + AsyncWrite + Into<Kept> + Unpin + Send + 'static> Transport for S {}

/// A hyper connection that is polled until it is done, and gives its socket back.
struct Driven<S: Transport, B: Body + 'static> {
    driver: Option<Driver<TokioIo<S>, B>>,
    /// Says when the connection could have another request.
    sender: SendRequest<B>,
    is_done: bool,
}

impl<S, B> Driven<S, B>
where
    S: Transport,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    /// Once done it stays done: hyper must not be polled again.
    fn poll(&mut self, cx: &mut std::task::Context<'_>) -> Poll<()> {
        if !self.is_done
            && let Some(driver) = &mut self.driver
        {
            // An error here reaches the response or its body too.
            self.is_done = Pin::new(driver).poll(cx).is_ready();
        }
        if self.is_done { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Ready when the response, and the request, are over.
    fn poll_over(&mut self, cx: &mut std::task::Context<'_>) -> Poll<Over> {
        match (self.poll(cx), self.sender.poll_ready(cx)) {
            (Poll::Ready(()), _) => Poll::Ready(Over::Ended),
            (Poll::Pending, Poll::Ready(Ok(()))) => Poll::Ready(Over::Idle),
            (Poll::Pending, _) => Poll::Pending,
        }
    }

    /// The socket of one that is idle, if nothing is on its way in either direction.
    fn into_idle(mut self) -> Result<Stream, Option<Stream>> {
        let Some(driver) = self.driver.take() else { return Err(None) };
        let parts = driver.into_parts();
        let kept = parts.io.into_inner().into();
        // An answer may be there before all of its request was taken.
        let is_clean = parts.read_buf.is_empty() && !kept.is_stalled();
        let (stream, unread) = kept.into_parts();
        if is_clean && unread.is_empty() { Ok(stream) } else { Err(Some(stream)) }
    }

    fn into_kept(mut self) -> Option<Kept> {
        Some(self.driver.take()?.into_parts().io.into_inner().into())
    }

    fn into_parts(mut self) -> Option<(Stream, Bytes)> {
        let parts = self.driver.take()?.into_parts();
        let (stream, unread) = parts.io.into_inner().into().into_parts();
        Some((stream, concat(parts.read_buf, unread)))
    }
}

/// What is left of a connection after a response.
enum Over {
    /// It can have another request (RFC 9112 9.3), as far as hyper knows.
    Idle,
    /// It can't.
    Ended,
}

/// Sends the request and waits for the response's header; a failure gives the socket back.
async fn send<S, B>(
    stream: S,
    request: Request<B>,
    config: &Config,
    deadline: Instant,
    control: &Control,
) -> Result<(Response<Incoming>, Driven<S, B>), Failure>
where
    S: Transport,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    let (sender, connection) = http1::Builder::new()
        .max_header_size(config.header_bytes)
        // hyper wants at least 8 KiB.
        .max_buf_size(config.header_bytes.max(8 * 1024))
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| Error::NoAnswer(Arc::new(error)))?;
    let mut driven = Driven { driver: Some(connection), sender, is_done: false };
    let answer = {
        let mut response = pin!(driven.sender.send_request(request));
        let waited = poll_fn(|cx| {
            let _ = driven.poll(cx);
            response.as_mut().poll(cx)
        });
        tokio::select! {
            biased;
            () = control.given_up() => None,
            answer = timeout_at(deadline, waited) => Some(answer),
        }
    };
    let error = match answer {
        Some(Ok(Ok(response))) => return Ok((response, driven)),
        // Of what the user gives to hyper here, only the body can fail.
        Some(Ok(Err(error))) if error.is_user() => Error::Body(error),
        // A backend may look at our certificate only then.
        Some(Ok(Err(error))) => match tls::explain(&error) {
            Some(what) => Error::Tls { backend: config.address.to_string(), what },
            None => Error::NoAnswer(Arc::new(error)),
        },
        Some(Err(_)) | None => Error::Timeout("backend did not answer in time"),
    };
    let kept = driven.into_kept();
    if let Some(kept) = &kept {
        control.has_heard(kept.has_read());
    }
    Err(Failure { error, stream: kept.map(Kept::into_inner) })
}

/// Takes a connection that can have another request; gives it back if it is not wanted.
pub(super) type Keep = Box<dyn FnOnce(Stream) -> Option<Stream> + Send>;

/// A response, and what goes on while its body is read.
fn reply<S, B>(response: Response<Incoming>, mut driven: Driven<S, B>, keep: Option<Keep>) -> Reply
where
    S: Transport,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    let connection: Connection = Box::pin(async move {
        match (poll_fn(|cx| driven.poll_over(cx)).await, keep) {
            (Over::Idle, Some(keep)) => driven.into_idle().map_or_else(|stream| stream, keep),
            _ => driven.into_parts().map(|(stream, _)| stream),
        }
    });
    Reply { response: response.map(ReplyBody::Connection), connection }
}

/// See [`super::Upstream::websocket`].
pub(super) async fn websocket(
    stream: Stream,
    ask: &Ask,
    config: &Config,
    control: &Control,
) -> Result<Answer, Failure> {
    let deadline = Instant::now() + config.handshake_timeout;
    let (version, head, parts) = match handshake::ask(stream, &ask.head(), config, deadline, control).await? {
        First::Switching(version, lines, stream, early) => (version, Switching::Lines(lines), Some((stream, early))),
        // Boxed, since few come to it, and each has room for the largest of its steps.
        First::Other(asked) => {
            let again = ask.request().into_owned();
            match Box::pin(ask_again(asked, again, config, deadline, control)).await? {
                Again::Switching(response, parts) => {
                    (response.version(), Switching::Map(response.into_parts().0.headers), parts)
                }
                Again::Other(reply) => return Ok(reply.into()),
            }
        }
    };
    let checked = match &head {
        Switching::Lines(lines) => check_accept(version, lines, ask.key()),
        Switching::Map(headers) => check_accept(version, headers, ask.key()),
    };
    if let Err(reason) = checked {
        return Err(Failure { error: Error::BadAccept(reason), stream: parts.map(|(stream, _)| stream) });
    }
    let (stream, early) = parts.ok_or(Error::BadAccept("the connection is gone"))?;
    Ok(Answer::Tunnel { stream, early, head })
}

/// What hyper makes of an answer.
enum Again {
    Switching(Response<()>, Option<(Stream, Bytes)>),
    Other(Reply),
}

/// Has hyper look at an answer that is no 101 at first sight.
async fn ask_again(
    asked: Replay,
    request: Request<()>,
    config: &Config,
    deadline: Instant,
    control: &Control,
) -> Result<Again, Failure> {
    let again = request.map(|()| Empty::<Bytes>::new());
    let (response, mut driven) = send(asked, again, config, deadline, control).await?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Ok(Again::Other(reply(response, driven, None)));
    }
    // Behind another answer of 1xx.
    poll_fn(|cx| driven.poll(cx)).await;
    Ok(Again::Switching(response.map(|_| ()), driven.into_parts()))
}

/// The client's part of RFC 6455 4.1, done on the client's behalf.
fn check_accept(version: Version, header: &impl Header, key: &[u8]) -> Result<(), &'static str> {
    // "A server MUST ignore an Upgrade header field that is received in an HTTP/1.0 request" (RFC 9110 7.8), and the version
    // of a response is the highest that its sender conforms to.
    if version != Version::HTTP_11 {
        return Err("101 in HTTP/1.0");
    }
    if !has_token(header, &UPGRADE, "websocket") {
        return Err("101 without Upgrade: websocket");
    }
    if !has_token(header, &CONNECTION, "upgrade") {
        return Err("101 without Connection: Upgrade");
    }
    let mut accepts = header.values_of(&SEC_WEBSOCKET_ACCEPT);
    match (accepts.next(), accepts.next()) {
        (Some(accept), None) if accept == derive_accept_key(key).as_bytes() => Ok(()),
        (Some(_), None) => Err("101 with a wrong Sec-WebSocket-Accept"),
        (None, _) => Err("101 without Sec-WebSocket-Accept"),
        (Some(_), Some(_)) => Err("101 with more than one Sec-WebSocket-Accept"),
    }
}

/// See [`super::Upstream::plain`].
pub(super) async fn plain<B>(
    stream: Stream,
    request: Request<B>,
    config: &Config,
    control: &Control,
    keep: Option<Keep>,
) -> Result<Reply, Failure>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    let stream = Kept::new(stream, config.write_timeout);
    let deadline = Instant::now() + config.response_timeout;
    let (response, driven) = send(stream, request, config, deadline, control).await?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let stream = driven.into_parts().map(|(stream, _)| stream);
        return Err(Failure {
            error: Error::BadAccept("the backend upgraded a request that asked for no upgrade"),
            stream,
        });
    }
    // What "keep-alive" of HTTP/1.0 means was never the same everywhere (RFC 9112 C.2.2).
    let keep = keep.filter(|_| response.version() == Version::HTTP_11);
    Ok(reply(response, driven, keep))
}
