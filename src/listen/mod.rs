//! Accepting: the loop of one accept queue, from its first connection to its last.
//!
//! An accept loop waits for nothing but its queue and a place; whoever serves may look at what has arrived already, and never
//! waits. It takes a batch, then lets others have their turn, so that neither a flood of clients nor a worker that relays at
//! full speed keeps the other out.

mod balance;

use std::{
    future::Future,
    io,
    net::{SocketAddr, TcpStream as StdStream},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::unix::AsyncFd,
    task::yield_now,
    time::{Instant, sleep, timeout_at},
};
use tracing::{debug, warn};

pub use self::balance::{Accepted, Accounting, Balancer, ConnectionCounter, ConnectionGuard, Pending};
use crate::{
    admission::{Admission, Place},
    metrics::Metrics,
    net::{Listener, shortage},
    sparse::Sparse,
};

/// What the accept loops need to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where clients connect.
    pub address: SocketAddr,
    /// Connections that may wait to be accepted, in all accept queues together.
    pub backlog: u32,
    /// Accept queues at most.
    pub max_sockets: usize,
    /// Accept queues at least, each with an accept loop of its own; 0: as many as workers.
    pub accept_loops: usize,
    /// Threads that serve; at least 1.
    pub workers: usize,
    /// A connection that a clearly busier worker has accepted goes to the least loaded one.
    pub hand_off: bool,
}

/// What an accept loop works with.
#[derive(Debug, Clone)]
pub struct Door {
    /// Who lets in.
    pub admission: Admission,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// Connections that are accepted before others have their turn.
const BATCH: usize = 64;

/// Between two attempts when the system has no room for one more connection: first and longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

/// How long handshakes of the kernel that are under way get when the listener is about to close: longer than a round trip
/// of any client, and nobody waits for it.
const LAST_HANDSHAKES: Duration = Duration::from_secs(1);

/// How a batch ended.
enum Batch {
    /// The queue may hold more.
    Full,
    /// The queue is empty, or whoever is in it has made it ready anew.
    Empty,
    /// There is no place for one more.
    NoPlace,
    /// The system has too little of something; its name.
    Shortage(&'static str, io::Error),
}

/// Takes connections until `stop` resolves, then those that the kernel has already taken, and closes the listener.
///
/// Closing it with connections in its queue would reset each of them; so first it takes no new SYN, then the queue
/// is emptied. A listener that somebody else holds too is just let go. `serve` must not wait: the loop accepts nothing
/// meanwhile.
pub async fn accept_loop(
    listener: Arc<Listener>,
    stop: impl Future<Output = ()>,
    door: &Door,
    mut serve: impl FnMut(StdStream, SocketAddr, Place),
) -> io::Result<()> {
    let mut stop = pin!(stop);
    let listener = listener.watch()?;
    let mut backoff = Backoff::new();
    let accepting = async {
        loop {
            backoff.after(batch(&listener, door, &mut serve).await?, door).await;
        }
    };
    tokio::select! {
        result = accepting => return result,
        () = &mut stop => {}
    }
    if listener.get_ref().is_held_elsewhere() {
        return Ok(());
    }
    if let Err(error) = listener.get_ref().refuse_new_connections() {
        debug!(%error, "no filter on the listener: a connection that is just being made may be reset");
    }
    let until = Instant::now() + LAST_HANDSHAKES;
    while let Ok(batch) = timeout_at(until, batch(&listener, door, &mut serve)).await {
        backoff.after(batch?, door).await;
    }
    loop {
        match take(listener.get_ref(), usize::MAX, door, &mut serve) {
            Batch::Empty => return Ok(()),
            batch => backoff.after(batch, door).await,
        }
    }
}

/// Waits until the queue has something, and takes up to a batch of it.
async fn batch(
    listener: &AsyncFd<Arc<Listener>>,
    door: &Door,
    serve: &mut impl FnMut(StdStream, SocketAddr, Place),
) -> io::Result<Batch> {
    let mut ready = listener.readable().await?;
    // An accept() that finds none has allocated a socket before it looked (`do_accept` in net/socket.c): to ask how many there are takes
    // a third of that. Whoever comes later makes the queue ready anew. 0 is also what a kernel says that does not tell (gVisor).
    let length = match listener.get_ref().queue() {
        Ok(queue) if queue.length > 0 => queue.length as usize,
        _ => usize::MAX,
    };
    let batch = take(listener.get_ref(), length, door, serve);
    if matches!(batch, Batch::Empty) {
        ready.clear_ready();
    }
    Ok(batch)
}

/// Takes as many as there are known to be, up to a batch; all of the queue, if one of them fails.
fn take(
    listener: &Listener,
    mut length: usize,
    door: &Door,
    serve: &mut impl FnMut(StdStream, SocketAddr, Place),
) -> Batch {
    let mut failed = 0;
    for taken in 0..BATCH {
        if taken == length {
            return Batch::Empty;
        }
        let Some(place) = door.admission.enter() else { return Batch::NoPlace };
        let error = match listener.accept() {
            Ok((stream, peer)) => {
                door.admission.accepted(&place);
                serve(stream, peer, place);
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Batch::Empty,
            Err(error) => error,
        };
        let Some(name) = shortage(&error) else {
            // The connection itself failed before it was taken (accept(2)): the next one may be fine.
            door.metrics.accept_error("connection");
            debug!(%error, "a connection failed before it was accepted");
            failed += 1;
            // It may still be there, where nothing would say so anew.
            length = usize::MAX;
            if failed == BATCH {
                return Batch::Shortage("connection", error);
            }
            continue;
        };
        // The budget was wrong: something else takes descriptors. One client after the other gets an answer all the same.
        if let Some(last) = door.admission.last_resort()
            && let Ok((stream, peer)) = listener.accept()
        {
            serve(stream, peer, last);
        }
        return Batch::Shortage(name, error);
    }
    Batch::Full
}

/// Of all loops together.
static SAID: Sparse = Sparse::new();

/// The waits between batches.
struct Backoff(Duration);

impl Backoff {
    fn new() -> Self {
        Self(BACKOFF.0)
    }

    async fn after(&mut self, batch: Batch, door: &Door) {
        match batch {
            Batch::Shortage(name, error) => {
                door.metrics.accept_error(name);
                if let Some(unsaid) = SAID.is_due() {
                    let fix = "raise RLIMIT_NOFILE (ulimit -n, or the container runtime's); `tidegate doctor` says how";
                    warn!(%error, name, fix, unsaid, "cannot accept: clients are turned away, or wait in the accept queue");
                }
                sleep(self.0).await;
                self.0 = (self.0 * 2).min(BACKOFF.1);
                return;
            }
            Batch::NoPlace => door.admission.room().await,
            Batch::Full => yield_now().await,
            Batch::Empty => {}
        }
        self.0 = BACKOFF.0;
    }
}
