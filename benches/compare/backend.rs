//! The echo backend: one thread with one accept loop. It answers every message with one of the same length, every plain
//! request with 200 and a small body, and prints where it listens.

use std::{
    collections::HashMap,
    io::{self, Write as _},
    net::SocketAddr,
    ops::RangeInclusive,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use socket2::{Domain, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    time::sleep,
};
use tokio_util::task::TaskTracker;

use crate::wire::{BINARY, CLOSE, CLOSE_NORMAL, Connection, Request, Role, frame};

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
type Prepared = Mutex<HashMap<usize, Arc<[u8]>>>;

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
        loop {
            let (stream, _) = listener.accept().await?;
            let prepared = Arc::clone(&prepared);
            // An error is the client's to count: it has lost its session.
            let works = options.works;
            tasks.spawn(async move { serve(stream, &prepared, works).await });
        }
    })
}

async fn serve(stream: TcpStream, prepared: &Prepared, works: bool) -> io::Result<()> {
    let mut connection = match Connection::accept(stream).await? {
        Request::Session(connection) => connection,
        Request::Answered => return Ok(()),
    };
    let mut last: Option<(usize, Arc<[u8]>)> = None;
    while let Some(received) = connection.next().await? {
        if received.opcode == CLOSE {
            return connection.closed(&frame(Role::Backend, CLOSE, &CLOSE_NORMAL)).await;
        }
        let message = match &last {
            Some((length, message)) if *length == received.length => message,
            _ => {
                let mut prepared = prepared.lock().unwrap_or_else(PoisonError::into_inner);
                let message = prepared
                    .entry(received.length)
                    .or_insert_with_key(|length| frame(Role::Backend, BINARY, &vec![b'x'; *length]).into());
                &last.insert((received.length, Arc::clone(message))).1
            }
        };
        if works {
            sleep(Duration::from_secs_f64(rand::random_range(WORK_SECONDS))).await;
        }
        connection.write(message).await?;
    }
    Ok(())
}
