//! One WebSocket of the demo, from the upgrade to the last FIN.
//!
//! An ending is always the same three steps: the Close handshake, our FIN, reading until the client's. Each has its time.

use std::sync::Arc;

use futures_util::{SinkExt, StreamExt};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::Demo;
use super::room::Seat;

type Socket = WebSocketStream<TcpStream>;

/// Allocated for every connection, so small.
const READ_BUFFER_BYTES: usize = 4 << 10;
/// Beside the one message that is being written: its header, a Pong, a Close.
const WRITE_BUFFER_SPARE_BYTES: usize = 4 << 10;

/// What a WebSocket was opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Echo,
    Broadcast,
    Feed,
}

/// How a conversation ended.
#[derive(Debug)]
enum End {
    /// The client sent its Close, or is gone: nothing of ours is owed but the answer, which tungstenite sends.
    Client,
    /// We end it, with this.
    Ours(CloseCode, &'static str),
}

/// Runs the WebSocket on what hyper hands over. `_permit` is its place among the demo's connections.
pub(super) async fn run(demo: Arc<Demo>, upgraded: OnUpgrade, kind: Kind, _permit: Arc<OwnedSemaphorePermit>) {
    let Ok(upgraded) = upgraded.await else {
        return; // the client left before its 101
    };
    let parts = upgraded.downcast::<TokioIo<TcpStream>>().expect("serve_http gave hyper a TokioIo<TcpStream>");
    let limits = &demo.limits;
    let message_bytes = match kind {
        Kind::Echo => limits.echo_message,
        Kind::Broadcast | Kind::Feed => limits.broadcast_message,
    };
    let config = WebSocketConfig::default()
        .max_message_size(Some(message_bytes))
        .max_frame_size(Some(message_bytes))
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(0) // every message leaves at once
        .max_write_buffer_size(message_bytes + WRITE_BUFFER_SPARE_BYTES);
    // Its first frames may have come with the request.
    let first = parts.read_buf.to_vec();
    let mut socket =
        WebSocketStream::from_partially_read(parts.io.into_inner(), first, Role::Server, Some(config)).await;

    let end = match kind {
        Kind::Echo => tokio::select! {
            end = echo(&mut socket, &demo) => end,
            () = demo.stop.cancelled() => End::Ours(CloseCode::Away, "the demo backend is stopping"),
        },
        Kind::Broadcast => {
            let seat = demo.room.join(limits.queue);
            listen(&mut socket, seat, &demo, |message| demo.room.say(&message)).await
        }
        Kind::Feed => {
            let _counted = demo.feed.count();
            // A feed has nobody to ask: what a client says is passed over.
            listen(&mut socket, demo.feed.room.join(limits.queue), &demo, drop).await
        }
    };
    finish(socket, end, &demo).await;
}

/// Sends back what comes. A client that does not read is not read either.
async fn echo(socket: &mut Socket, demo: &Demo) -> End {
    loop {
        match heard(socket.next().await) {
            Ok(Some(message)) => {
                if let Err(end) = send(socket, message, demo).await {
                    return end;
                }
            }
            Ok(None) => {}
            Err(end) => return end,
        }
    }
}

/// Sends what is said in a room, and gives what the client says to `say`, until one of both has enough.
async fn listen(socket: &mut Socket, seat: Seat, demo: &Demo, say: impl Fn(Message)) -> End {
    let Seat { mut queue, slow } = seat;
    let conversation = async {
        loop {
            tokio::select! {
                next = socket.next() => match heard(next) {
                    Ok(Some(message)) => say(message),
                    Ok(None) => {}
                    Err(end) => return end,
                },
                Some(message) = queue.recv() => {
                    if let Err(end) = send(socket, message, demo).await {
                        return end;
                    }
                }
            }
        }
    };
    tokio::select! {
        end = conversation => end,
        () = demo.stop.cancelled() => End::Ours(CloseCode::Away, "the demo backend is stopping"),
        () = slow.cancelled() => End::Ours(CloseCode::Again, "too slow for this broadcast"),
    }
}

/// What the client said, `None` for what tungstenite answers by itself, or why the conversation is over.
fn heard(next: Option<Result<Message, Error>>) -> Result<Option<Message>, End> {
    match next {
        Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => Ok(Some(message)),
        Some(Ok(Message::Close(_))) | None => Err(End::Client),
        Some(Ok(_)) => Ok(None),
        Some(Err(error)) => Err(why(&error)),
    }
}

async fn send(socket: &mut Socket, message: Message, demo: &Demo) -> Result<(), End> {
    match timeout(demo.limits.write_timeout, socket.send(message)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(why(&error)),
        Err(_) => Err(End::Ours(CloseCode::Again, "nothing was read for too long")),
    }
}

/// The close code that an error of the client's asks for (RFC 6455 7.4.1).
fn why(error: &Error) -> End {
    match error {
        Error::Capacity(_) => End::Ours(CloseCode::Size, "message too large"),
        Error::Utf8(_) => End::Ours(CloseCode::Invalid, "text is not UTF-8"),
        // tungstenite calls the end of the stream a protocol error; there is nobody left to tell.
        Error::Protocol(tokio_tungstenite::tungstenite::error::ProtocolError::ResetWithoutClosingHandshake) => {
            End::Client
        }
        Error::Protocol(_) => End::Ours(CloseCode::Protocol, "protocol error"),
        _ => End::Client,
    }
}

/// The Close handshake, our FIN, and reading on until the client's: closing a socket with unread bytes would reset it.
async fn finish(mut socket: Socket, end: End, demo: &Demo) {
    let handshake = async {
        if let End::Ours(code, reason) = end {
            socket.close(Some(CloseFrame { code, reason: reason.into() })).await?;
        }
        // Drives the answer out, or waits for the client's; what else it says now has no hearer.
        while let Some(message) = socket.next().await {
            message?;
        }
        Ok::<_, Error>(())
    };
    // In time or not, the next step is the same.
    let _ = timeout(demo.limits.close_timeout, handshake).await;

    let mut stream = socket.into_inner();
    let linger = async {
        stream.shutdown().await?;
        let mut discarded = [0; 1024];
        while stream.read(&mut discarded).await? > 0 {}
        Ok::<_, std::io::Error>(())
    };
    let _ = timeout(demo.limits.linger, linger).await;
}
