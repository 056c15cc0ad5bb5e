//! The echo backend: one thread, answers every message with one of the same length, and prints where it listens.

use std::{
    collections::HashMap,
    io::{self, Write as _},
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::TaskTracker;

use crate::wire::{BINARY, CLOSE, CLOSE_NORMAL, Connection, Role, frame};

/// The frames that were sent so far, by their payload's length.
type Prepared = Mutex<HashMap<usize, Arc<[u8]>>>;

pub fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        writeln!(io::stdout(), "{}", listener.local_addr()?)?;
        let prepared = Arc::new(Prepared::default());
        let tasks = TaskTracker::new();
        loop {
            let (stream, _) = listener.accept().await?;
            let prepared = Arc::clone(&prepared);
            // An error is the client's to count: it has lost its session.
            tasks.spawn(async move { serve(stream, &prepared).await });
        }
    })
}

async fn serve(stream: TcpStream, prepared: &Prepared) -> io::Result<()> {
    let mut connection = Connection::accept(stream).await?;
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
        connection.write(message).await?;
    }
    Ok(())
}
