//! What a service manager is told (`sd_notify(3)`), where there is one (`$NOTIFY_SOCKET`): who serves, what it is doing, that it
//! is alive, and that its end takes longer.
//!
//! Alive means that the main thread's loop goes round, and that since the last time every worker has come to its turn: a worker
//! that is stuck stops the watchdog (`$WATCHDOG_USEC`), whatever the others do. Without a manager all of this costs nothing.
//!
//! Not by a crate: sd-notify (0.5) does not know the abstract sockets that systemd may give.

use std::{
    env,
    fmt::Write as _,
    future,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    process,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};
use tracing::{error, info, warn};

use crate::drain::Phase;

/// How often it is told anything, but for a new phase.
const EVERY: Duration = Duration::from_secs(5);

/// How long an end may go on after each word of it. The bound is the drain's own; a process that says nothing any more is
/// killed after this, or `TimeoutStopSec`, whichever is later.
const EXTENSION: Duration = Duration::from_secs(20);

/// Four looks in the time after which it is killed, so that one worker's long turn is none of its business.
const LOOKS: u32 = 4;

/// What happens once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// The service is served by this process.
    Ready(u32),
    /// It is to end.
    Stopping,
}

/// Tells it.
pub fn notify(word: Word) {
    send(&match word {
        Word::Ready(pid) => format!("READY=1\nMAINPID={pid}\n"),
        Word::Stopping => format!("STOPPING=1\nEXTEND_TIMEOUT_USEC={}\n", EXTENSION.as_micros()),
    });
}

fn send(text: &str) {
    let Some(place) = env::var_os("NOTIFY_SOCKET").filter(|place| !place.is_empty()) else { return };
    let tell = || {
        let address = match place.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(&place)?,
        };
        let socket = UnixDatagram::unbound()?;
        // A manager that does not listen must not hold up what it is told of.
        socket.set_nonblocking(true)?;
        socket.send_to_addr(text.as_bytes(), &address)
    };
    if let Err(error) = tell() {
        warn!(%error, text, "the service manager cannot be told ($NOTIFY_SOCKET)");
    }
}

/// What it is told again and again.
#[derive(Debug)]
pub struct Manager {
    /// `None`: nobody is there.
    next: Option<Instant>,
    every: Duration,
    /// `None`: it does not ask whether this process is alive.
    pulse: Option<Pulse>,
    phase: Option<Phase>,
    status: String,
    is_stopping: bool,
    is_stuck: bool,
}

impl Manager {
    /// As the environment says.
    pub fn new(pulse: Pulse) -> Self {
        let is_there = env::var_os("NOTIFY_SOCKET").is_some_and(|place| !place.is_empty());
        let variable = |name| env::var(name).ok();
        let watchdog = watchdog(variable("WATCHDOG_USEC"), variable("WATCHDOG_PID")).filter(|_| is_there);
        // Nobody is asked before the first look: workers have only just been started.
        let pulse = watchdog.map(|_| pulse);
        let every = watchdog.map_or(EVERY, |watchdog| EVERY.min(watchdog / LOOKS));
        let next = is_there.then(Instant::now);
        Self { next, every, pulse, phase: None, status: String::new(), is_stopping: false, is_stuck: false }
    }

    /// When it is to be told something. Can be dropped at any time.
    pub async fn due(&self) {
        match self.next {
            Some(next) => sleep_until(next).await,
            None => future::pending().await,
        }
    }

    /// A signal ends this process.
    pub fn stopping(&mut self) {
        self.is_stopping = true;
        notify(Word::Stopping);
    }

    /// If it is time, or the phase is new, tells what this process is doing, and whether it is alive.
    pub fn tell(&mut self, now: Instant, phase: Phase, status: impl FnOnce() -> String) {
        let is_due = self.next.is_some_and(|next| next <= now);
        let is_new = self.next.is_some() && self.phase != Some(phase);
        if !is_due && !is_new {
            return;
        }
        self.phase = Some(phase);
        let mut text = String::new();
        let status = status();
        if status != self.status {
            let _ = writeln!(text, "STATUS={status}");
            self.status = status;
        }
        if is_due {
            self.next = Some(now + self.every);
            if self.is_stopping {
                let _ = writeln!(text, "EXTEND_TIMEOUT_USEC={}", EXTENSION.as_micros());
            }
            if self.is_alive(phase) {
                text.push_str("WATCHDOG=1\n");
            }
        }
        if !text.is_empty() {
            send(&text);
        }
    }

    /// False also when nobody asks.
    fn is_alive(&mut self, phase: Phase) -> bool {
        let Some(pulse) = &self.pulse else { return false };
        // From then on workers end, each with its last session.
        let silent = pulse.silent(phase >= Phase::Window);
        match (silent.is_empty(), self.is_stuck) {
            (false, false) => {
                error!(workers = ?silent, "workers do not come to their turn: the watchdog is not told that all is well");
            }
            (true, true) => info!("all workers come to their turn again"),
            _ => {}
        }
        self.is_stuck = !silent.is_empty();
        if !self.is_stuck {
            pulse.beat();
        }
        !self.is_stuck
    }
}

/// After what time without a word from this process it is ended (`sd_watchdog_enabled(3)`).
fn watchdog(time: Option<String>, pid: Option<String>) -> Option<Duration> {
    let time = time?.parse().ok().filter(|time| *time > 0).map(Duration::from_micros)?;
    // Of another process, as of one that this one was started by.
    let is_ours = pid.is_none_or(|pid| pid.parse() == Ok(process::id()));
    is_ours.then_some(time)
}

/// Whether all workers come to their turn.
#[derive(Debug, Default)]
pub struct Pulse(Vec<Weak<Beats>>);

/// A worker's part in it.
#[derive(Debug)]
pub struct Heart(Arc<Beats>);

/// How often a worker was asked, and which of these it has answered last. Gone with the worker.
#[derive(Debug, Default)]
struct Beats {
    asked: AtomicU64,
    answered: AtomicU64,
    wake: Notify,
}

impl Pulse {
    /// Of one more worker.
    pub fn heart(&mut self) -> Heart {
        let beats = Arc::default();
        self.0.push(Arc::downgrade(&beats));
        Heart(beats)
    }

    fn beat(&self) {
        for beats in self.0.iter().filter_map(Weak::upgrade) {
            beats.asked.fetch_add(1, Ordering::Relaxed);
            beats.wake.notify_one();
        }
    }

    /// Those that have not answered the last beat, or have ended though they may not.
    fn silent(&self, may_end: bool) -> Vec<usize> {
        let is_silent = |beats: &Weak<Beats>| match beats.upgrade() {
            Some(beats) => beats.answered.load(Ordering::Relaxed) < beats.asked.load(Ordering::Relaxed),
            None => !may_end,
        };
        self.0.iter().enumerate().filter(|(_, beats)| is_silent(beats)).map(|(index, _)| index).collect()
    }
}

impl Heart {
    /// Answers, for as long as it is polled: on the worker's thread, and so only between the turns of what else is there.
    pub async fn run(self) {
        loop {
            self.0.wake.notified().await;
            self.0.answered.store(self.0.asked.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::Future as _,
        task::{Context, Waker},
    };

    use super::*;

    /// The time is in microseconds, and for one process; whatever cannot be understood is no watchdog.
    #[test]
    fn the_watchdog_is_whose_it_says() {
        let own = process::id().to_string();
        let of = |time: &str, pid: Option<&str>| watchdog(Some(time.to_owned()), pid.map(str::to_owned));
        assert_eq!(of("30000000", None), Some(Duration::from_secs(30)));
        assert_eq!(of("30000000", Some(&own)), Some(Duration::from_secs(30)));
        for (time, pid) in [("0", None), ("", None), ("30s", None), ("-1", None), ("30", Some("1")), ("30", Some(""))] {
            assert_eq!(of(time, pid), None, "{time:?} {pid:?}");
        }
        assert_eq!(watchdog(None, None), None);
    }

    /// One of two workers is not polled: it alone is silent, until it has its turn. One that has ended is silent, too, as long
    /// as none may.
    #[test]
    fn who_has_no_turn_is_silent() {
        let mut pulse = Pulse::default();
        let (one, other) = (pulse.heart(), pulse.heart());
        assert_eq!(pulse.silent(false), Vec::<usize>::new(), "nobody was asked yet");
        let (mut one, mut other) = (Box::pin(one.run()), Box::pin(other.run()));
        let mut turn = Context::from_waker(Waker::noop());
        for _ in 0..3 {
            pulse.beat();
            assert_eq!(pulse.silent(false), [0, 1]);
            assert!(one.as_mut().poll(&mut turn).is_pending());
            assert_eq!(pulse.silent(false), [1]);
            assert!(other.as_mut().poll(&mut turn).is_pending());
            assert_eq!(pulse.silent(false), Vec::<usize>::new());
        }
        drop(other);
        assert_eq!((pulse.silent(false), pulse.silent(true)), (vec![1], vec![]));
    }
}
