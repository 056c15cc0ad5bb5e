//! An open loop: messages at a fixed rate over many sessions, whether or not those before were answered. A message's time counts from when
//! it was due, not from when it was sent, so that what delays the sender too is in it ("coordinated omission").
//!
//! ```text
//! message k, on session k mod N, is due at begin + k / rate; its answer is the next one of its session
//! ```
//!
//! A loop around epoll, not the runtime: its timers have steps of a millisecond, and a message takes a twentieth of that. How late the
//! sender itself was is measured too, and is part of the other times.

#![expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use anyhow::ensure;
use rustix::{
    buffer::spare_capacity,
    event::epoll::{self, CreateFlags, Event, EventData, EventFlags},
    io::Errno,
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};

use crate::{
    histogram::Histogram,
    load::{Order, Outcome, limited},
    procfs::{Cpu, Strangers},
    wire::{BINARY, Connection, Reader, Role, frame},
};

/// At the rate, before it is measured.
pub const WARMUP: Duration = Duration::from_secs(1);

/// For answers that have not come when the last message was sent. What comes later counts as lost.
pub const GRACE: Duration = Duration::from_secs(5);

/// To read counters takes some tenths of a millisecond: times of messages that are due so near to it are not looked at.
const GUARD: Duration = Duration::from_millis(10);

const READ_BYTES: usize = 64 * 1024;
const EVENTS: usize = 256;

/// Of the timer, beyond all sessions.
const TIMER: u64 = u64::MAX;

/// When which message is due.
#[derive(Debug, Clone, Copy)]
struct Plan {
    begin: Instant,
    rate: u32,
    /// Where the measured messages begin and end.
    from: Instant,
    to: Instant,
}

impl Plan {
    fn due(&self, message: u64) -> Instant {
        self.begin + Duration::from_secs_f64(message as f64 / f64::from(self.rate))
    }

    fn is_counted(&self, due: Instant) -> bool {
        (self.from..self.to).contains(&due)
    }

    fn is_timed(&self, due: Instant) -> bool {
        due >= self.from + GUARD && due + GUARD < self.to
    }
}

#[derive(Debug)]
struct Session {
    socket: TcpStream,
    reader: Reader,
    /// The one whose answer comes next.
    message: u64,
}

#[derive(Debug, Default)]
struct Seen {
    sent: u64,
    answered: u64,
    times: Histogram,
    late: Histogram,
    first_error: Option<String>,
}

pub async fn open(order: &Order, sessions: usize, rate: u32, seconds: f64) -> anyhow::Result<Outcome> {
    let poll = epoll::create(CreateFlags::CLOEXEC)?;
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
    epoll::add(&poll, &timer, EventData::new_u64(TIMER), EventFlags::IN)?;
    let mut open = Vec::with_capacity(sessions);
    for nth in 0..sessions as u64 {
        let socket = limited(Connection::open(order.address)).await?.into_tcp()?.into_std()?;
        epoll::add(&poll, &socket, EventData::new_u64(nth), EventFlags::IN)?;
        open.push(Session { socket, reader: Reader::default(), message: nth });
    }
    let message = frame(Role::Client, BINARY, &vec![b'x'; order.bytes]);
    let begin = Instant::now();
    let from = begin + WARMUP;
    let plan = Plan { begin, rate, from, to: from + Duration::from_secs_f64(seconds) };
    let others = [order.backend, std::process::id()];
    let (mut before, mut outcome) = (None, None);
    let (mut seen, mut next) = (Seen::default(), 0);
    let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let now = Instant::now();
        if before.is_none() && now >= plan.from {
            before = Some((Cpu::of(&order.proxy)?, Cpu::of(&others)?, Strangers::begin()?, now));
        }
        if let Some((cpu, others_cpu, strangers, begun)) = before.take_if(|_| outcome.is_none() && now >= plan.to) {
            let (proxy, others) = (Cpu::of(&order.proxy)? - cpu, Cpu::of(&others)? - others_cpu);
            let seconds = (now - begun).as_secs_f64();
            let mut told = Outcome { seconds, proxy, others, ..Outcome::default() };
            told.insert("strangers_percent", strangers.percent(proxy.us() + others.us())?);
            outcome = Some(told);
            before = Some((cpu, others_cpu, strangers, begun));
        }
        // A bit longer, so that the last measured ones go as all others do.
        let is_over = now >= plan.to + GUARD;
        if is_over && (seen.answered == seen.sent || now >= plan.to + GRACE) {
            break;
        }
        while !is_over && plan.due(next) <= Instant::now() {
            let late = plan.due(next).elapsed();
            send(&mut open, next, &message, plan, late, &mut seen);
            next += 1;
        }
        // Set anew for each message, it goes off right behind its due time, and not up to a period later.
        let wait = if is_over { GUARD } else { plan.due(next).saturating_duration_since(Instant::now()) };
        let it_value = timespec(wait.max(Duration::from_nanos(1)))?;
        let once = Itimerspec { it_interval: timespec(Duration::ZERO)?, it_value };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &once)?;
        match epoll::wait(&poll, spare_capacity(&mut events), None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in events.drain(..) {
            if event.data.u64() == TIMER {
                // It has been set anew where there is nothing to be read.
                let _ = rustix::io::read(&timer, &mut [0; 8]);
                continue;
            }
            // Not behind all answers that have come.
            if !is_over && plan.due(next) <= Instant::now() {
                let late = plan.due(next).elapsed();
                send(&mut open, next, &message, plan, late, &mut seen);
                next += 1;
            }
            let session = &mut open[usize::try_from(event.data.u64())?];
            if let Err(error) = session.answers(sessions as u64, order.bytes, plan, &mut buffer, &mut seen) {
                epoll::delete(&poll, &session.socket)?;
                seen.first_error.get_or_insert(error.to_string());
            }
        }
    }
    let mut outcome = outcome.unwrap_or_default();
    ensure!(seen.answered > 0, "nothing was answered: {:?}", seen.first_error);
    outcome.count = seen.answered;
    outcome.failures = seen.sent - seen.answered;
    if let Some(error) = seen.first_error {
        outcome.errors.insert(format!("{error} (the first)"), 1);
    }
    for (name, histogram) in [("latency", seen.times), ("sent_late", seen.late)] {
        outcome.insert_quantiles(name, &["p50", "p90", "p99", "p999", "max"], histogram);
    }
    Ok(outcome)
}

fn send(open: &mut [Session], message: u64, bytes: &[u8], plan: Plan, late: Duration, seen: &mut Seen) {
    let due = plan.due(message);
    if plan.is_timed(due) {
        seen.late.record(late);
    }
    if plan.is_counted(due) {
        seen.sent += 1;
    }
    let nth = usize::try_from(message).unwrap_or_default() % open.len();
    // Its answer will be missing. A socket's buffer holds hundreds of messages.
    if (&open[nth].socket).write(bytes).ok() != Some(bytes.len()) {
        let error = "a message could not be sent: too many are under way, or the session has ended";
        seen.first_error.get_or_insert_with(|| error.to_owned());
    }
}

fn timespec(time: Duration) -> anyhow::Result<Timespec> {
    Ok(Timespec { tv_sec: time.as_secs().try_into()?, tv_nsec: time.subsec_nanos().into() })
}

impl Session {
    /// Takes what has come.
    fn answers(
        &mut self,
        sessions: u64,
        bytes: usize,
        plan: Plan,
        buffer: &mut [u8],
        seen: &mut Seen,
    ) -> io::Result<()> {
        let length = match self.socket.read(buffer) {
            Ok(0) => return Err(io::Error::other("FIN")),
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        let now = Instant::now();
        let mut rest = &buffer[..length];
        while let Some((received, taken)) = self.reader.take(rest) {
            rest = &rest[taken..];
            if (received.opcode, received.length) != (BINARY, bytes) {
                return Err(io::Error::other(format!("instead of an echo of {bytes} bytes: {received:?}")));
            }
            let due = plan.due(self.message);
            if plan.is_timed(due) {
                seen.times.record(now.saturating_duration_since(due));
            }
            if plan.is_counted(due) {
                seen.answered += 1;
            }
            self.message += sessions;
        }
        Ok(())
    }
}
