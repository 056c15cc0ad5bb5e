//! The echo backend: one thread with one accept loop. It answers every message with one of the same length, every plain
//! request with 200 and a small body, and prints where it listens. On one path it says something by itself (`fanout.rs`), on another it prints how sessions ended (`audit.rs`). Over HTTP/1.1, and over HTTP/2 (RFC 8441), by what comes first.

use std::{
    collections::HashMap,
    io::{self, Write as _},
    net::SocketAddr,
    ops::RangeInclusive,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use h2::server::SendResponse;
use http::{Method, Request as HttpRequest, Response, StatusCode};
use socket2::{Domain, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    time::sleep,
};
use tokio_util::task::TaskTracker;

use crate::{
    audit,
    fanout::Feed,
    wire::{BINARY, CLOSE, CLOSE_NORMAL, Connection, Reader, Request, Role, frame},
};

#[derive(Debug, clap::Args)]
pub struct Options {
    #[arg(long)]
    address: SocketAddr,
    /// For `listen()`; the kernel clamps it to `net.core.somaxconn`
    #[arg(long)]
    backlog: u16,
    /// Works for 10 to 50 ms before it answers a message
    #[arg(long)]
    works: bool,
}

/// How long a backend that works does so for one message. It sleeps, as one that waits for a database.
const WORK_SECONDS: RangeInclusive<f64> = 0.010..=0.050;

/// The frames that were sent so far, by their payload's length.
type Prepared = Mutex<HashMap<usize, Bytes>>;

/// Of the connection preface (RFC 9113 3.4), where HTTP/1.1 has a method of a request.
const PREFACE: &[u8] = b"PRI";

/// Of HTTP/2: as many as tidegate may be told to have, each with the window that is the protocol's default.
const STREAMS: u32 = 4096;
const CONNECTION_WINDOW_BYTES: u32 = STREAMS * 65_535;

pub fn main(options: &Options) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let socket = Socket::new(Domain::for_address(options.address), Type::STREAM.nonblocking(), None)?;
        socket.bind(&options.address.into())?;
        socket.listen(options.backlog.into())?;
        let listener = TcpListener::from_std(socket.into())?;
        writeln!(io::stdout(), "{}", listener.local_addr()?)?;
        let prepared = Arc::new(Prepared::default());
        let tasks = TaskTracker::new();
        let feed = Feed::new();
        tasks.spawn(feed.clone().run());
        loop {
            let (stream, _) = listener.accept().await?;
            let (prepared, feed) = (Arc::clone(&prepared), feed.clone());
            // An error is the client's to count: it has lost its session.
            let works = options.works;
            tasks.spawn(async move { serve(stream, &prepared, &feed, works).await });
        }
    })
}

async fn serve(stream: TcpStream, prepared: &Arc<Prepared>, feed: &Feed, works: bool) -> io::Result<()> {
    let mut first = [0; PREFACE.len()];
    // It comes in one piece.
    if stream.peek(&mut first).await? == PREFACE.len() && first == PREFACE {
        return serve_http2(stream, prepared, works).await;
    }
    let mut connection = match Connection::accept(stream).await? {
        Request::Session(connection) => connection,
        Request::Feed(connection) => return feed.serve(connection).await,
        Request::Audit(connection) => return audit::serve(connection).await,
        Request::Answered => return Ok(()),
    };
    let mut answers = Answers::new(prepared);
    while let Some(received) = connection.next().await? {
        if received.opcode == CLOSE {
            return connection.closed(&frame(Role::Backend, CLOSE, &CLOSE_NORMAL)).await;
        }
        if works {
            work().await;
        }
        connection.write(answers.to(received.length)).await?;
    }
    Ok(())
}

async fn serve_http2(stream: TcpStream, prepared: &Arc<Prepared>, works: bool) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut builder = h2::server::Builder::new();
    builder
        .enable_connect_protocol()
        .max_concurrent_streams(STREAMS)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
    let mut connection = builder.handshake::<_, Bytes>(stream).await.map_err(io::Error::other)?;
    let tasks = TaskTracker::new();
    while let Some(accepted) = connection.accept().await {
        let (request, respond) = accepted.map_err(io::Error::other)?;
        let prepared = Arc::clone(prepared);
        tasks.spawn(async move { serve_stream(request, respond, &prepared, works).await });
    }
    Ok(())
}

async fn serve_stream(
    request: HttpRequest<h2::RecvStream>,
    mut respond: SendResponse<Bytes>,
    prepared: &Prepared,
    works: bool,
) -> Result<(), h2::Error> {
    let mut response = Response::new(());
    if request.method() != Method::CONNECT {
        *response.status_mut() = StatusCode::NOT_FOUND;
        return respond.send_response(response, true).map(drop);
    }
    let mut send = respond.send_response(response, false)?;
    let (mut receive, mut reader, mut answers) = (request.into_body(), Reader::default(), Answers::new(prepared));
    while let Some(bytes) = receive.data().await.transpose()? {
        receive.flow_control().release_capacity(bytes.len())?;
        let mut rest = &*bytes;
        while let Some((received, taken)) = reader.take(rest) {
            rest = &rest[taken..];
            let is_close = received.opcode == CLOSE;
            let answer = if is_close {
                frame(Role::Backend, CLOSE, &CLOSE_NORMAL).into()
            } else {
                if works {
                    work().await;
                }
                answers.to(received.length).clone()
            };
            // What its windows do not allow yet waits in h2: no more than the client has asked for.
            send.send_data(answer, is_close)?;
        }
    }
    Ok(())
}

async fn work() {
    sleep(Duration::from_secs_f64(rand::random_range(WORK_SECONDS))).await;
}

/// Of a session. Most have one length only, and look it up once.
struct Answers<'a> {
    prepared: &'a Prepared,
    last: Option<(usize, Bytes)>,
}

impl<'a> Answers<'a> {
    fn new(prepared: &'a Prepared) -> Self {
        Self { prepared, last: None }
    }

    fn to(&mut self, length: usize) -> &Bytes {
        let last = self.last.take().filter(|(last, _)| *last == length);
        let (_, answer) = self.last.insert(last.unwrap_or_else(|| {
            let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
            let answer =
                prepared.entry(length).or_insert_with(|| frame(Role::Backend, BINARY, &vec![b'x'; length]).into());
            (length, answer.clone())
        }));
        answer
    }
}
