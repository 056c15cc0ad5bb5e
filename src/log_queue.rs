//! Log lines on their way to their reader: in a queue of bytes, written by a thread of its own.
//!
//! A reader that stops reading must not stop the proxy: beyond a bound lines are dropped, and counted.
//!
//! tracing-appender has such a thread, too. There each line is an allocation, wakes the thread, and is a `write()`: for a session's two
//! lines that took a quarter of all that they cost. Here lines that come soon after each other are written together, as far as a pipe
//! takes them as a whole.

use std::{
    io::{self, ErrorKind, Write},
    mem,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use tracing_subscriber::fmt::MakeWriter;

/// Bytes that may wait for the reader, beside as many that are being written: some 16,000 lines of sessions in all.
const MAX_WAITING: usize = 4 * 1024 * 1024;
/// Bytes that a pipe takes as a whole or not at all (`PIPE_BUF` in pipe(7)): others may write to it too, and no line is to be cut.
const MAX_WRITE: usize = 4096;
/// Room in bytes that is kept for lines to come.
const MAX_KEPT: usize = 64 * 1024;
/// How long lines wait for others to be written with them, where some were written just before.
const PAUSE: Duration = Duration::from_millis(1);
/// For the reader to take the last lines.
const PATIENCE: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct LogQueue(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    /// For the thread: there are lines, or it is to end.
    wake: Condvar,
    /// Of the thread: it has ended.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Ends with a line's end.
    lines: Vec<u8>,
    /// Lines that nobody will read.
    dropped: u64,
    /// The thread has to be woken.
    is_asleep: bool,
    is_closed: bool,
    has_ended: bool,
}

impl LogQueue {
    /// With its thread. What waits is written when [`LastLines`] is dropped.
    ///
    /// # Errors
    ///
    /// There can't be one more thread.
    pub(crate) fn start(writer: impl Write + Send + 'static) -> io::Result<(Self, LastLines)> {
        let shared = Arc::new(Shared::default());
        let this = Arc::clone(&shared);
        thread::Builder::new().name("log".to_owned()).spawn(move || this.write_to(writer))?;
        Ok((Self(Arc::clone(&shared)), LastLines(shared)))
    }

    /// Never waits for the reader.
    pub(crate) fn put(&self, line: &[u8]) {
        let mut waiting = self.0.lock();
        if line.len() > MAX_WAITING - waiting.lines.len() {
            waiting.dropped += 1;
            return;
        }
        let Waiting { lines, .. } = &mut *waiting;
        if lines.capacity() - lines.len() < line.len() {
            // Twice as much as ever, but no more than is needed at most.
            let wanted = (2 * lines.capacity()).max(MAX_KEPT).clamp(lines.len() + line.len(), MAX_WAITING);
            lines.reserve_exact(wanted - lines.len());
        }
        lines.extend_from_slice(line);
        let is_asleep = mem::take(&mut waiting.is_asleep);
        drop(waiting);
        if is_asleep {
            self.0.wake.notify_one();
        }
    }

    /// Lines that nobody will read.
    pub(crate) fn dropped(&self) -> u64 {
        self.0.lock().dropped
    }

    /// Both are clones of one.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Lines as text, one in each write.
impl Write for &LogQueue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.put(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogQueue {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> &'a Self {
        self
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_to(&self, mut writer: impl Write) {
        let (mut lines, mut is_cut) = (Vec::new(), false);
        while self.take(&mut lines) {
            if let Err(lost) = write_all(&mut writer, &lines, &mut is_cut) {
                self.lock().dropped += lost;
            }
            lines.clear();
            lines.shrink_to(MAX_KEPT);
            let waiting = self.lock();
            drop(self.wake.wait_timeout_while(waiting, PAUSE, |waiting| !waiting.is_closed));
        }
        self.lock().has_ended = true;
        self.ended.notify_all();
    }

    /// Waits for lines, and leaves the room of the last ones for those that come next. False: there will be none.
    fn take(&self, lines: &mut Vec<u8>) -> bool {
        let mut waiting = self.lock();
        while waiting.lines.is_empty() && !waiting.is_closed {
            waiting.is_asleep = true;
            waiting = self.wake.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        waiting.is_asleep = false;
        mem::swap(&mut waiting.lines, lines);
        !lines.is_empty()
    }
}

/// Writes them, behind a line's end if what was written last is no whole line.
///
/// # Errors
///
/// So many lines could not be written.
fn write_all(writer: &mut impl Write, mut lines: &[u8], is_cut: &mut bool) -> Result<(), u64> {
    let lost = |lines: &[u8]| lines.split_inclusive(|byte| *byte == b'\n').count() as u64;
    if *is_cut {
        write(writer, b"\n").map_err(|_| lost(lines))?;
        *is_cut = false;
    }
    while !lines.is_empty() {
        let written = write(writer, &lines[..whole_lines(lines)]).map_err(|_| lost(lines))?;
        *is_cut = lines[written - 1] != b'\n';
        lines = &lines[written..];
    }
    Ok(())
}

/// Some of it, however long that takes.
fn write(writer: &mut impl Write, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match writer.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // Another process that has it too has made it so.
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(PAUSE),
            result => return result,
        }
    }
}

/// The length of as many whole lines as are written at once; of the first one, if that is longer.
fn whole_lines(lines: &[u8]) -> usize {
    let is_end = |byte: &u8| *byte == b'\n';
    let (first, rest) = lines.split_at(lines.len().min(MAX_WRITE));
    match first.iter().rposition(is_end) {
        Some(last) => last + 1,
        None => first.len() + rest.iter().position(is_end).map_or(rest.len(), |end| end + 1),
    }
}

/// Dropped, it waits until what was said is written; for a second, if nobody reads it.
#[derive(Debug)]
#[must_use = "lines that are said last are lost without it"]
pub(crate) struct LastLines(Arc<Shared>);

impl Drop for LastLines {
    fn drop(&mut self) {
        let mut waiting = self.0.lock();
        waiting.is_closed = true;
        self.0.wake.notify_one();
        drop(self.0.ended.wait_timeout_while(waiting, PATIENCE, |waiting| !waiting.has_ended));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A reader that is told what to do with each write.
    struct Reader {
        orders: mpsc::Receiver<io::Result<usize>>,
        written: mpsc::Sender<Vec<u8>>,
    }

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // Without orders all is taken at once.
            let most = self.orders.recv().unwrap_or(Ok(usize::MAX))?;
            let taken = &bytes[..most.min(bytes.len())];
            self.written.send(taken.to_vec()).map_err(io::Error::other)?;
            Ok(taken.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    type Orders = mpsc::Sender<io::Result<usize>>;

    /// The reader's end is there until the thread has ended, however long that takes here.
    fn queue() -> (LogQueue, LastLines, Orders, mpsc::Receiver<Vec<u8>>) {
        let ((order, orders), (written, read)) = (mpsc::channel(), mpsc::channel());
        let (queue, last) = LogQueue::start(Reader { orders, written }).expect("a thread");
        (queue, last, order, read)
    }

    /// From several threads, each of which finds its lines in its order, as they are; and the last ones are written at the end.
    #[test]
    fn all_lines_arrive() {
        let (queue, last, order, read) = queue();
        drop(order);
        thread::scope(|scope| {
            for thread in 0..4 {
                let queue = &queue;
                scope.spawn(move || (0..5_000).for_each(|line| queue.put(format!("{thread} {line}\n").as_bytes())));
            }
        });
        drop(last);
        let text = String::from_utf8(read.iter().flatten().collect()).expect("text");
        for thread in 0..4 {
            let prefix = format!("{thread} ");
            let lines = text.lines().filter_map(|line| line.strip_prefix(&prefix)).map(str::parse::<u32>);
            assert!(lines.map(Result::unwrap).eq(0..5_000));
        }
        assert_eq!((text.lines().count(), queue.dropped()), (20_000, 0));
    }

    /// Lines wait for a reader that does not read, up to the bound; those beyond it are counted, and the others are whole.
    #[test]
    fn a_reader_that_stands_still_stops_nobody() {
        let (queue, last, order, read) = queue();
        let line = [vec![b'x'; 1023], vec![b'\n']].concat();
        for _ in 0..20_000 {
            queue.put(&line);
        }
        let dropped = queue.dropped();
        // The thread may have some that it took before.
        let waiting = MAX_WAITING as u64 / 1024;
        assert!((20_000 - 2 * waiting..=20_000 - waiting).contains(&dropped), "{dropped}");
        queue.put(b"short, but there is no room\n");
        assert_eq!(queue.dropped(), dropped + 1);
        drop(order);
        drop(last);
        let bytes: Vec<u8> = read.iter().flatten().collect();
        assert!(bytes.chunks(1024).all(|chunk| chunk == line));
        assert_eq!(bytes.len() as u64 / 1024, 20_000 - dropped);
    }

    /// Whatever a write comes to, what follows is what follows.
    #[test]
    fn writes_that_fail() {
        let (queue, last, order, read) = queue();
        for told in [Ok(3), Err(ErrorKind::Interrupted.into()), Err(ErrorKind::WouldBlock.into()), Ok(100)] {
            order.send(told).expect("it waits");
        }
        queue.put(b"first\n");
        assert_eq!([read.recv(), read.recv()].map(Result::unwrap), [b"fir".to_vec(), b"st\n".to_vec()]);
        queue.put(b"second\n");
        for told in [Ok(3), Err(ErrorKind::StorageFull.into())] {
            order.send(told).expect("it waits");
        }
        assert_eq!(read.recv().unwrap(), b"sec");
        // What is written next is a line of its own, as soon as there is room for its beginning.
        while queue.dropped() == 0 {
            thread::yield_now();
        }
        queue.put(b"third\n");
        order.send(Ok(0)).expect("it waits");
        while queue.dropped() == 1 {
            thread::yield_now();
        }
        queue.put(b"fourth\n");
        drop(order);
        drop(last);
        queue.put(b"too late\n");
        assert_eq!(read.iter().flatten().collect::<Vec<_>>(), b"\nfourth\n");
        assert_eq!(queue.dropped(), 2);
    }

    /// No write has a part of a line, nor more than a pipe takes as a whole, but for a line that is longer.
    #[test]
    fn writes_are_of_whole_lines() {
        let (queue, last, order, read) = queue();
        let lines: Vec<_> = (0..1_000).map(|line| "x".repeat(line * 7 % 5_000) + "\n").collect();
        for line in &lines {
            queue.put(line.as_bytes());
        }
        drop(order);
        drop(last);
        let writes: Vec<_> = read.iter().collect();
        assert!(writes.len() < lines.len());
        for write in &writes {
            let count = write.split_inclusive(|byte| *byte == b'\n').count();
            assert!(write.ends_with(b"\n") && (write.len() <= MAX_WRITE || count == 1), "{} {count}", write.len());
        }
        assert_eq!(writes.concat(), lines.concat().as_bytes());
    }

    /// Nobody reads: the end comes all the same.
    #[test]
    fn the_end_does_not_wait_for_ever() {
        let (queue, last, order, read) = queue();
        queue.put(b"a line\n");
        drop(last);
        assert!(read.try_recv().is_err());
        drop(order);
        assert_eq!(read.recv().unwrap(), b"a line\n");
    }
}
