//! The end of a socket: FIN, reading on until the peer's FIN, and only then `close()`.
//!
//! Linux answers with RST when a socket is closed with unread input, and again when the peer sends to a closed one;
//! a RST can overtake and destroy what the peer has not read yet. So nothing is closed before its peer has had its
//! say, within a deadline. `SO_LINGER` is not used: it only chooses between blocking and RST.
//!
//! Waiting must cost next to nothing, or it is the waiting that brings a server down. All sockets that a thread lets go of are
//! held by one [`Linger`]: for each a descriptor, with what the runtime has of it, and a few words, no task, no timer, no buffer. When
//! there are too many, or somebody else needs their room, the oldest go first.

#[cfg(test)]
mod tests;
mod tunnels;

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use rustix::{
    io::Errno,
    net::{RecvFlags, Shutdown, recv, shutdown},
};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit},
    task::yield_now,
    time::{Instant, sleep_until},
};

use crate::{
    admission::{Admission, Place, Spares},
    metrics::{Counted, Metrics},
    net::{self, Last, Stream, send_some, with_scratch},
    side::Side,
};

/// What is configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Of each socket.
    pub patience: Patience,
    /// Sockets at once.
    pub max_lingering: usize,
}

/// How long a socket may linger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Without progress.
    pub linger: Duration,
    /// At all.
    pub linger_max: Duration,
}

/// How a socket went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lingered {
    /// Both FINs have passed.
    Fin,
    /// Nothing was unread or unacknowledged and the peer had said that it is done; its FIN had not come.
    Acked,
    /// The peer reset the connection.
    Reset,
    /// The deadline came first. A peer that sends on gets a RST from the kernel.
    Expired,
    /// The same, before the deadline: its room was needed.
    Evicted,
}

impl Lingered {
    /// For metrics, one of `metrics::LINGERED`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fin => "fin",
            Self::Acked => "acked",
            Self::Reset => "reset",
            Self::Expired => "expired",
            Self::Evicted => "evicted",
        }
    }
}

/// What a lingering socket keeps from others until it is closed.
#[derive(Debug)]
pub enum Keeps {
    /// What is left of its client's place.
    Place(Place),
    /// One of a number of slots.
    Slot(OwnedSemaphorePermit),
    /// Nothing that is counted.
    Nothing,
}

/// Bounds that all [`Linger`]s of a process share.
#[derive(Debug)]
pub struct Bounds {
    /// Sockets at once, of all threads.
    max: AtomicUsize,
    count: AtomicUsize,
}

/// The sockets of one thread in their last wait; clones are the same.
#[derive(Debug, Clone)]
pub struct Linger {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    news: Arc<News>,
    bounds: Arc<Bounds>,
    metrics: Option<Arc<Metrics>>,
    sockets: Mutex<Sockets>,
}

/// What there is to be done before the time.
#[derive(Debug, Default)]
struct News {
    /// Something came for these.
    ids: Mutex<Vec<u64>>,
    /// There are such, or something is due earlier than was said, or it is over.
    changed: Notify,
}

/// Whom the runtime tells that something came for a socket.
#[derive(Debug)]
struct Bell {
    id: u64,
    news: Arc<News>,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.news.lock().push(self.id);
        self.news.changed.notify_one();
    }
}

impl News {
    fn lock(&self) -> MutexGuard<'_, Vec<u64>> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct Sockets {
    /// By the order in which they came.
    by_age: BTreeMap<u64, Socket>,
    /// When each is to be looked at.
    due: BTreeSet<(Instant, u64)>,
    /// Those that keep a place which a new client could have.
    spare: BTreeSet<u64>,
    /// Streams of shared connections, until [`Linger::run`] has taken them on.
    tunnels: Vec<tunnels::Leaving>,
    next: u64,
    /// Nobody comes any more.
    is_closed: bool,
}

#[derive(Debug)]
struct Socket {
    /// A bare one.
    stream: Stream,
    bell: Waker,
    /// What is to go out before our FIN; empty: that is on its way.
    unsent: Box<[u8]>,
    side: Side,
    wait: Wait,
    keeps: Keeps,
    /// It sent something after our FIN: since then it is looked at for much, for its FIN, and when it is time.
    is_chatty: bool,
    _counted: Option<Counted>,
}

/// What one of them waits for, and how long. No I/O and no clock: what was found and when is told.
#[derive(Debug)]
struct Wait {
    /// Its Close frame (or the end of its last message) was received: it sends nothing more of its own accord.
    peer_is_done: bool,
    linger: Duration,
    /// When it is closed at the latest.
    last: Instant,
    /// When its peer last took or sent something.
    progress_at: Instant,
    unacked: usize,
    /// Until the kernel is asked again what the peer has acknowledged.
    tick: Duration,
    due: Instant,
}

/// How often the kernel is asked what the peer has acknowledged: first and longest interval. Only as long as something is not.
const TICK: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

/// Reads of one socket before others have their turn.
const READS: usize = 4;

/// What a look at a socket that still sends is worth, in bytes; the kernel makes it half of its buffer if that is less.
const LOW_WATER: i32 = 64 * 1024;

/// Sockets that are looked at before others have their turn.
const LOOKS: usize = 256;

impl Bounds {
    /// Nobody lingers; at most `max` may at once.
    pub fn new(max: usize) -> Self {
        Self { max: AtomicUsize::new(max), count: AtomicUsize::new(0) }
    }

    /// At most `max` from now on. Those that are too many go with the next one that comes.
    pub fn reconfigure(&self, max: usize) {
        self.max.store(max, Ordering::Relaxed);
    }

    fn is_exceeded(&self) -> bool {
        self.count.load(Ordering::Relaxed) > self.max.load(Ordering::Relaxed)
    }
}

impl Linger {
    /// For the sockets of a thread.
    pub fn new(bounds: &Arc<Bounds>, metrics: Option<Arc<Metrics>>) -> Self {
        let inner = Inner { news: Arc::default(), bounds: Arc::clone(bounds), metrics, sockets: Mutex::default() };
        Self { inner: Arc::new(inner) }
    }

    /// Ends a socket: `shutdown(WR)`, with TLS behind its `close_notify`, then reads and discards until the peer's FIN or a deadline of `patience`, then
    /// `close()`.
    ///
    /// `peer_is_done`: its Close frame (or the end of its last message) was received, so it sends nothing more of
    /// its own accord, and the wait may end when the peer's kernel has everything.
    pub fn add(&self, side: Side, stream: Stream, peer_is_done: bool, patience: &Patience, keeps: Keeps) {
        // Behind its Close comes its close_notify, for which a socket that is gone would reset it.
        let peer_is_done = peer_is_done && !matches!(stream, Stream::Tls(_));
        let (stream, unsent) = match stream.into_last() {
            Ok(Last::Socket { socket, unsent }) => (socket, unsent),
            // It takes no descriptor, so it needs no place.
            Ok(Last::Tunnel(tunnel)) => return self.add_tunnel(side, tunnel, peer_is_done, *patience),
            // Nobody is there to be waited for.
            Ok(Last::Nothing) => return,
            Err(error) => {
                tracing::warn!(%error, "TLS has no last word: its socket is closed at once");
                return self.inner.count(side, Lingered::Evicted);
            }
        };
        self.keep(side, stream, unsent, peer_is_done, patience, keeps);
    }

    fn keep(
        &self,
        side: Side,
        stream: Stream,
        unsent: Box<[u8]>,
        peer_is_done: bool,
        patience: &Patience,
        keeps: Keeps,
    ) {
        let now = Instant::now();
        if unsent.is_empty() && !send_fin(&stream) {
            return self.inner.count(side, Lingered::Reset);
        }
        let mut sockets = self.inner.lock();
        let id = sockets.next;
        sockets.next += 1;
        let bell = Waker::from(Arc::new(Bell { id, news: Arc::clone(&self.inner.news) }));
        // At least our FIN, which has just gone; how much more there is shows when it is looked at.
        let wait = Wait::new(peer_is_done, patience, 1 + unsent.len(), now);
        let is_first = sockets.due.first().is_none_or(|(first, _)| wait.due < *first);
        let counted = self.inner.metrics.as_ref().map(|metrics| Counted::new(&metrics.lingering));
        let mut socket = Socket { stream, bell, unsent, side, wait, keeps, is_chatty: false, _counted: counted };
        // Often all has been said by now.
        if let Some(how) = socket.look(now, true) {
            drop(sockets);
            return self.inner.count(side, how);
        }
        sockets.due.insert((socket.wait.due, id));
        if matches!(&socket.keeps, Keeps::Place(place) if place.refused.is_none()) {
            sockets.spare.insert(id);
        }
        sockets.by_age.insert(id, socket);
        self.inner.bounds.count.fetch_add(1, Ordering::Relaxed);
        let mut gone = [None, None];
        for gone in &mut gone {
            // Who has just come stays, also when the others are with other threads; and a bound that was lowered is reached little by
            // little.
            let oldest = sockets.by_age.first_key_value().map(|(id, _)| *id).filter(|oldest| *oldest != id);
            if let Some(oldest) = oldest.filter(|_| self.inner.bounds.is_exceeded()) {
                *gone = self.inner.evict(&mut sockets, oldest);
            }
        }
        drop(sockets);
        drop(gone);
        if is_first {
            self.inner.news.changed.notify_one();
        }
    }

    /// Ends a bare socket on which the peer's FIN was read. Nothing of it is unread and nothing more can come, so there is nothing to wait for, and
    /// `close()` alone sends our FIN, behind what the kernel still has.
    pub fn close_ended(&self, side: Side, stream: Stream) {
        drop(stream);
        self.inner.count(side, Lingered::Fin);
    }

    /// When there is no room for a new client, the oldest socket makes it.
    pub fn make_room_for(&self, admission: &Admission) {
        let inner: Weak<Inner> = Arc::downgrade(&self.inner);
        admission.ask_for_room(inner);
    }

    /// Waits for the sockets of this thread, on its runtime, until [`Self::close`] was called and none is left.
    pub async fn run(self) {
        let inner = &*self.inner;
        let mut tunnels = FuturesUnordered::new();
        let mut alarm = pin!(sleep_until(Instant::now()));
        loop {
            let (wake, is_over) = {
                let mut sockets = inner.lock();
                tunnels.extend(std::mem::take(&mut sockets.tunnels).into_iter().map(tunnels::Leaving::end));
                let is_over = sockets.is_closed && sockets.by_age.is_empty() && tunnels.is_empty();
                (sockets.due.first().map(|(due, _)| *due), is_over)
            };
            if is_over {
                return;
            }
            // Most are gone before they are due. Then it fires for nothing once in a while, which is less than to set it for each.
            if let Some(wake) = wake
                && (alarm.is_elapsed() || wake < alarm.deadline())
            {
                alarm.as_mut().reset(wake);
            }
            tokio::select! {
                () = inner.news.changed.notified() => {
                    let ids = std::mem::take(&mut *inner.news.lock());
                    for some in ids.chunks(LOOKS) {
                        for id in some {
                            inner.look(*id, true);
                        }
                        // Also when there is always more: others have their turn, and so have deadlines.
                        yield_now().await;
                    }
                }
                Some((side, how)) = tunnels.next(), if !tunnels.is_empty() => inner.count(side, how),
                () = &mut alarm, if wake.is_some() => {
                    let now = Instant::now();
                    loop {
                        let due = inner.lock().first_due(now);
                        let Some(id) = due else { break };
                        inner.look(id, false);
                    }
                }
            }
        }
    }

    /// No socket comes any more.
    pub fn close(&self) {
        self.inner.lock().is_closed = true;
        self.inner.news.changed.notify_one();
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Sockets> {
        // Nothing under this lock can panic half-way.
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, side: Side, how: Lingered) {
        if let Some(metrics) = &self.metrics {
            metrics.lingered(side, how.as_str());
        }
    }

    /// Something came, or it is time.
    fn look(&self, id: u64, has_news: bool) {
        let mut sockets = self.lock();
        let Some(socket) = sockets.by_age.get_mut(&id) else { return };
        let was_due = socket.wait.due;
        match socket.look(Instant::now(), has_news) {
            Some(how) => {
                let socket = self.remove(&mut sockets, id, how);
                drop(sockets);
                drop(socket);
            }
            // That it is due later is seen when it is due.
            None if has_news => {}
            None => {
                let due = socket.wait.due;
                sockets.due.remove(&(was_due, id));
                sockets.due.insert((due, id));
            }
        }
    }

    fn evict(&self, sockets: &mut Sockets, id: u64) -> Option<Socket> {
        let socket = sockets.by_age.get(&id)?;
        // What has come by now must not be what it is reset for.
        let how = match discard(&socket.stream) {
            Discarded::Fin => Lingered::Fin,
            Discarded::Reset => Lingered::Reset,
            Discarded::Bytes | Discarded::Nothing => Lingered::Evicted,
        };
        self.remove(sockets, id, how)
    }

    fn remove(&self, sockets: &mut Sockets, id: u64, how: Lingered) -> Option<Socket> {
        let socket = sockets.by_age.remove(&id)?;
        sockets.due.remove(&(socket.wait.due, id));
        sockets.spare.remove(&id);
        self.bounds.count.fetch_sub(1, Ordering::Relaxed);
        self.count(socket.side, how);
        Some(socket)
    }
}

impl Spares for Inner {
    fn count(&self) -> usize {
        self.lock().spare.len()
    }

    fn give_one_up(&self) -> bool {
        let mut sockets = self.lock();
        let Some(oldest) = sockets.spare.first().copied() else { return false };
        let oldest = self.evict(&mut sockets, oldest);
        drop(sockets);
        oldest.is_some()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let left = self.lock().by_age.len();
        self.bounds.count.fetch_sub(left, Ordering::Relaxed);
    }
}

impl Sockets {
    fn first_due(&self, now: Instant) -> Option<u64> {
        self.due.first().filter(|(due, _)| *due <= now).map(|(_, id)| *id)
    }
}

impl Socket {
    /// `Some`: it is over. Else it says when it is to be looked at again.
    fn look(&mut self, now: Instant, has_news: bool) -> Option<Lingered> {
        // Also when it is only time: what came just now must not be what it is reset for.
        let found = if has_news { self.discard() } else { discard(&self.stream) };
        if matches!(found, Discarded::Bytes) && !self.is_chatty {
            // Who goes on a byte at a time must not cost a wake for each. If it fails it does.
            self.is_chatty = true;
            let _ = self.stream.socket().map(|fd| net::set_low_water(fd, LOW_WATER));
        }
        if !has_news && !self.unsent.is_empty() {
            self.unsent = send_some(&self.stream, std::mem::take(&mut self.unsent));
            if self.unsent.is_empty() && !send_fin(&self.stream) {
                return Some(Lingered::Reset);
            }
        }
        // A peer that has ended may still read, and of TLS it wants the last word: its FIN is found again when that has gone.
        let found = if self.unsent.is_empty() || !matches!(found, Discarded::Fin) { found } else { Discarded::Nothing };
        let left = (!has_news).then(|| self.stream.unacked().unwrap_or(0) + self.unsent.len());
        self.wait.go_on(&found, left, now)
    }

    /// As [`discard`], of what the runtime knows of; then it says when there is more.
    fn discard(&mut self) -> Discarded {
        with_scratch(|buffer| {
            let mut found = Discarded::Nothing;
            for _ in 0..READS {
                match self.stream.poll_read_slice(&mut Context::from_waker(&self.bell), buffer) {
                    Poll::Ready(Ok(0)) => return Discarded::Fin,
                    Poll::Ready(Ok(_)) => found = Discarded::Bytes,
                    Poll::Ready(Err(_)) => return Discarded::Reset,
                    Poll::Pending => return found,
                }
            }
            self.bell.wake_by_ref();
            found
        })
    }
}

impl Wait {
    fn new(peer_is_done: bool, patience: &Patience, unacked: usize, now: Instant) -> Self {
        let (linger, last) = (patience.linger, now + patience.linger_max);
        let mut wait = Self { peer_is_done, linger, last, progress_at: now, unacked, tick: TICK.0, due: now };
        wait.due = wait.next_due(now);
        wait
    }

    /// `Some`: it is over. `left`: what the peer has not acknowledged; `None`: nobody has asked, since it is not time yet.
    fn go_on(&mut self, found: &Discarded, left: Option<usize>, now: Instant) -> Option<Lingered> {
        match found {
            Discarded::Fin => return Some(Lingered::Fin),
            Discarded::Reset => return Some(Lingered::Reset),
            Discarded::Bytes => self.progress_at = now,
            Discarded::Nothing => {}
        }
        if now >= self.last {
            return Some(Lingered::Expired);
        }
        let left = left?;
        // Of bytes there may be more than were read at once.
        if self.peer_is_done && left == 0 && matches!(found, Discarded::Nothing) {
            return Some(Lingered::Acked);
        }
        if left < self.unacked {
            self.progress_at = now;
        }
        self.unacked = left;
        if now >= self.progress_at + self.linger {
            return Some(Lingered::Expired);
        }
        self.due = self.next_due(now);
        self.tick = (self.tick * 2).min(TICK.1);
        None
    }

    /// When everything is acknowledged there is nothing to ask for but the end.
    fn next_due(&self, now: Instant) -> Instant {
        let deadline = self.last.min(self.progress_at + self.linger);
        if self.unacked > 0 || self.peer_is_done { deadline.min(now + self.tick) } else { deadline }
    }
}

/// What was found in a socket, and thrown away.
enum Discarded {
    Nothing,
    Bytes,
    Fin,
    Reset,
}

/// FIN; false: the connection is dead already (ENOTCONN) and has none to send.
fn send_fin(stream: &Stream) -> bool {
    stream.socket().is_some_and(|fd| shutdown(fd, Shutdown::Write).is_ok())
}

/// Reads what the kernel has by now, whatever the runtime knows of it.
fn discard(stream: &Stream) -> Discarded {
    let Some(fd) = stream.socket() else { return Discarded::Reset };
    with_scratch(|buffer| {
        let mut found = Discarded::Nothing;
        for _ in 0..READS {
            match recv(fd, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Discarded::Fin,
                Ok((length, _)) => {
                    found = Discarded::Bytes;
                    if length < buffer.len() {
                        break;
                    }
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(_) => return Discarded::Reset,
            }
        }
        found
    })
}
