//! The relay of one session: passes the bytes of frames on as they are, in both directions, until both legs have ended.
//!
//! One task, one poll function, no channel. Bytes go through the thread's scratch buffer straight to the other side;
//! only what the other side does not take, and the beginning of a frame that is not whole yet, is kept. So an idle
//! session owns no buffer, and a stalled one at most one scratch buffer per direction, or one pipe in the kernel (`splice.rs`).
//!
//! What ends a session, and how, is decided in `ending.rs`; sockets are handed over to whoever lingers for them.
//! Payloads are never looked at, except those of control frames.

mod ending;
#[cfg(debug_assertions)]
mod fault;
mod lane;
mod splice;
#[cfg(test)]
mod tests;

use std::{
    future::{Future, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use tokio::task::yield_now;

pub use self::ending::{Cause, Gone, Initiator};
use self::{
    ending::{Act, Ending, View, What},
    lane::Lane,
};
use crate::{
    admission::{Delay, Delays},
    alarms::{Alarms, Place},
    drain::{Drain, Moments},
    metrics::Traffic,
    net::{self, Fault, Stream, with_scratch},
    side::Side,
    stamp::Stamp,
    ws::{CloseFrame, Code, Header, Limits, Opcode, Rsv, Sender, Step, Violation, frame, frame::ControlFrame},
};
/// What the sessions of a worker share.
#[derive(Debug, Clone)]
pub struct Shared {
    /// What is configured.
    pub config: Config,
    /// What is counted with every message.
    pub traffic: Arc<Traffic>,
    /// The order to end.
    pub drain: Drain,
    /// Who waits for `close.delay` only.
    pub delays: Arc<Delays>,
    /// What wakes them. A clone is for sessions of the same runtime.
    pub alarms: Arc<Alarms>,
}

impl Shared {
    /// Of the sessions of one runtime.
    pub fn new(config: Config, traffic: Arc<Traffic>, drain: Drain, delays: Arc<Delays>) -> Self {
        let alarms = Alarms::new();
        drain.wakes(&alarms);
        Self { config, traffic, drain, delays, alarms }
    }
}

/// What the relay needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The largest message payload, in bytes on the wire.
    pub max_message: u64,
    /// The largest frame payload, in bytes.
    pub max_frame: u64,
    /// Pings and Pongs of a client in a second; 0: any number.
    pub max_control_rate: u32,
    /// Frames up to this payload are passed on only when whole; 1 KiB to 32 KiB.
    pub hold_frame: usize,
    /// The rest of a payload of which at least so many bytes are to come is not copied, where both legs are bare sockets; `None`: all is.
    pub splice_from: Option<usize>,
    /// How long an incomplete frame is held.
    pub hold_timeout: Duration,
    /// Silence after which a side gets a Ping; zero: never.
    pub ping_interval: Duration,
    /// Silence after a Ping that means the side is gone.
    pub pong_timeout: Duration,
    /// How long a side may take none of the bytes that wait for it.
    pub write_timeout: Duration,
    /// How long the backend is not told that a client left without waiting.
    pub close_delay: Duration,
    /// For a peer's answering Close.
    pub close_handshake_timeout: Duration,
    /// The longest that a session lasts; `None`: for ever.
    pub max_age: Option<Duration>,
    /// The part of `max_age`, in per cent, by which one is shorter than another.
    pub max_age_jitter: u32,
    /// A session without data for this long is ended; `None`: never.
    pub idle_timeout: Option<Duration>,
    /// What the backend gets when the client left without a Close.
    pub client_lost_code: u16,
    /// What the client gets when the backend left without a Close.
    pub backend_lost_code: u16,
    /// What the client gets when the backend broke the protocol or a limit.
    pub backend_error_code: u16,
}

impl Config {
    const fn limits(&self) -> Limits {
        Limits { frame: self.max_frame, message: self.max_message }
    }
}

/// Bytes of one read.
const READ: usize = 64 * 1024;

/// The longest turn of one session: each connect on the same worker waits for several turns, each message for one. The runtime's own bound,
/// 128 reads and writes, may take milliseconds, and does not count those of bare sockets (`net/direct.rs`).
const TURN: Duration = Duration::from_micros(100);

/// How long after a client's Close its FIN counts as one that came with it.
const APART: Duration = Duration::from_millis(2);

/// What a client is told.
const TOO_OLD: &str = "the session has reached its age";
const IDLE: &str = "nothing was said for long";
const SLOW: &str = "too slow";
const FAULT: &str = "a fault of the proxy";

/// What keeps one client waiting longer than `drain.quiet`: its was the last word, so an answer may be in the making.
const ANSWER_PATIENCE: u32 = 10;

/// A leg as the handshake left it.
#[derive(Debug)]
pub struct Leg {
    /// Its socket; `None`: it is gone already.
    pub stream: Option<Stream>,
    /// What came with its side of the handshake.
    pub early: Bytes,
}

/// A leg that has ended: its socket is to linger.
#[derive(Debug)]
pub struct Ended {
    /// Whose it is.
    pub side: Side,
    /// `None`: reset, there is nothing to linger for.
    pub stream: Option<Stream>,
    /// Its Close frame was received.
    pub is_done: bool,
    /// Its FIN was read, and so all that it ever said.
    pub has_ended: bool,
}

/// How a session went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Who began to end it.
    pub initiator: Initiator,
    /// Why.
    pub cause: Cause,
    /// The code it ended with.
    pub code: Option<u16>,
    /// The reason text of the initiator's Close.
    pub reason: String,
    /// From the first sign of the end until now.
    pub ending: Duration,
    /// A Close came from the client, from the backend.
    pub heard: [bool; 2],
    /// A Close was sent to the client, to the backend.
    pub told: [bool; 2],
    /// The codes of the Closes that the client, the backend sent; `None` also for a Close without one.
    pub sent: [Option<u16>; 2],
    /// The codes of the Closes that the client, the backend got.
    pub got: [Option<u16>; 2],
    /// How the client, the backend went, other than by a Close handshake.
    pub gone: [Option<Gone>; 2],
    /// The client, the backend has the beginning of a frame and not its end.
    pub cut: [bool; 2],
    /// `close.delay` was cut short, since the session's place was needed.
    pub delay_cut: bool,
    /// What the client, the backend sent.
    pub counts: [Counts; 2],
}

/// What a side sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Whole data messages that were passed on.
    pub messages: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// Whole data messages that were discarded because an end had begun.
    pub crossed: u64,
}

/// What the sides were asked to see whether they are alive, and have not answered.
#[derive(Debug, Default)]
struct Probes(Option<Box<[Asked; 2]>>);

/// What a side has not answered.
#[derive(Debug, Default)]
struct Asked {
    /// The payload of our last Ping, until its Pong came.
    payload: Option<u64>,
    /// We asked, and this is when silence means that it is gone.
    deadline: Option<Stamp>,
    /// The payload of the other side's Ping.
    relayed: Option<Box<[u8]>>,
}

impl Probes {
    fn asked(&self, side: Side) -> Option<&Asked> {
        self.0.as_ref().map(|asked| &asked[side as usize])
    }

    fn deadline(&self, side: Side) -> Option<Stamp> {
        self.asked(side)?.deadline
    }

    fn asked_mut(&mut self, side: Side) -> &mut Asked {
        &mut self.0.get_or_insert_default()[side as usize]
    }

    /// It said something at all; true: it was waited for.
    fn has_said(&mut self, side: Side) -> bool {
        let Some(asked) = &mut self.0 else { return false };
        let was_awaited = asked[side as usize].deadline.take().is_some();
        self.tidy();
        was_awaited
    }

    /// Its Pong came; true: it is for a Ping of ours.
    fn has_answered(&mut self, side: Side, payload: &[u8]) -> bool {
        let Some(asked) = &mut self.0 else { return false };
        let asked = &mut asked[side as usize];
        let is_ours = asked.payload.is_some_and(|own| own.to_be_bytes() == *payload);
        if is_ours {
            asked.payload = None;
        } else if asked.relayed.as_deref() == Some(payload) {
            asked.relayed = None;
        }
        self.tidy();
        is_ours
    }

    fn tidy(&mut self) {
        self.0.take_if(|asked| asked.iter().all(Asked::is_nothing));
    }
}

impl Asked {
    const fn is_nothing(&self) -> bool {
        self.payload.is_none() && self.deadline.is_none() && self.relayed.is_none()
    }
}

/// What there is of a session only when it ends, or has an age to end at.
#[derive(Debug, Default)]
struct Farewell {
    /// We have ended it, or somebody had begun to: the drain, its age and its silence have no more to say.
    has_left: bool,
    /// When it is old enough, if there is such a thing.
    retires_at: Option<Stamp>,
    /// The drain has begun, and these are its moments.
    moments: Option<Moments>,
    /// A side's Close frame as it came.
    closes: [Option<Box<[u8]>>; 2],
    /// The client's Close was heard, and its socket is looked at once more: not before then, and not in the same turn.
    settling: Option<Stamp>,
    /// As long as `close.delay` holds it; to the end, if that was cut short.
    delay: Option<Delay>,
    /// Whole data messages that were discarded, by the side that sent them.
    crossed: [u64; 2],
    /// Since when nothing here is to be trusted any more but what [`Relay::salvage`] reads.
    failed_at: Option<Stamp>,
}

/// See the module.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
    /// Among the alarms; `None`: it was not polled yet, or both legs have ended.
    place: Option<Place>,
    /// What its alarm stands at, by [`Stamp::short`]: at most [`NEVER`] from now.
    alarm: u32,
    ending: Ending,
    /// By the side whose socket it is.
    streams: [Option<Stream>; 2],
    /// By the side whose bytes they are.
    lanes: [Lane; 2],
    probes: Probes,
    /// EOF or an error was read.
    read_done: [bool; 2],
    /// A write failed; what it still sent is being read.
    broken: [bool; 2],
    /// When a data frame last ended, and whose it was.
    last_data: Stamp,
    last_speaker: Side,
    /// When a part of a message last came that is not whole yet, or went to the other side after it had waited.
    moved: Stamp,
    /// The second that the client's control frames are counted in, by [`Stamp::short`], and how many there were.
    controls: (u32, u32),
    farewell: Option<Box<Farewell>>,
    /// Something began that may be due before the alarm.
    timer_is_late: bool,
    /// While bytes are on their way to a side: it may have more of a frame, or less, than its lane says.
    is_unsure: [bool; 2],
}

impl Relay {
    /// Of two legs after their handshakes. `rsv`: what the negotiated extensions allow. To be made on the worker that
    /// polls it.
    pub fn new(shared: Arc<Shared>, rsv: Rsv, client: Leg, backend: Leg) -> Self {
        let now = Stamp::now();
        let config = &shared.config;
        let retires_at = config.max_age.map(|age| now + lifetime(age, config.max_age_jitter, rand::random()));
        let mut ending = Ending::new(backend.stream.as_ref().is_some_and(Stream::is_forgotten));
        for (side, leg) in [(Side::Client, &client), (Side::Backend, &backend)] {
            if leg.stream.is_none() {
                ending.heard_gone(side, Gone::Reset, false, now);
            }
        }
        Self {
            lanes: [
                Lane::new(Sender::Client, rsv, &client.early, now),
                Lane::new(Sender::Server, rsv, &backend.early, now),
            ],
            streams: [client.stream, backend.stream],
            probes: Probes::default(),
            read_done: [false; 2],
            broken: [false; 2],
            last_data: now,
            last_speaker: Side::Backend,
            moved: now,
            controls: (now.short(), 0),
            farewell: retires_at.map(|_| Box::new(Farewell { retires_at, ..Farewell::default() })),
            timer_is_late: true,
            is_unsure: [false; 2],
            ending,
            place: None,
            alarm: now.short(),
            shared,
        }
    }

    /// Runs until a leg has ended, and hands it over; the other one goes on in the next call. To be called twice, with
    /// the second future polled by the same task as the first.
    ///
    /// A panic in here is a bug. It ends this session alone, and that in order as far as it can be.
    pub fn next_ended(&mut self) -> impl Future<Output = Ended> {
        poll_fn(|cx| self.poll_ended(cx))
    }

    /// As [`Self::next_ended`], for who is a future himself.
    pub fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        if self.failed_at().is_none() {
            match catch_unwind(AssertUnwindSafe(|| self.poll(cx))) {
                Ok(polled) => {
                    if polled.is_ready() && !self.is_open() {
                        self.forget_alarm();
                    }
                    return polled;
                }
                Err(_) => self.farewell_mut().failed_at = Some(Stamp::now()),
            }
        }
        self.forget_alarm();
        let side = if self.streams[Side::Client as usize].is_some() { Side::Client } else { Side::Backend };
        let saved = catch_unwind(AssertUnwindSafe(|| self.salvage(side)));
        Poll::Ready(saved.unwrap_or(Ended { side, stream: None, is_done: false, has_ended: false }))
    }

    fn forget_alarm(&mut self) {
        if let Some(place) = self.place.take() {
            self.shared.alarms.leave(place);
        }
    }

    /// A leg is here that has not ended.
    pub fn is_open(&self) -> bool {
        self.streams.iter().any(Option::is_some)
    }

    fn farewell_mut(&mut self) -> &mut Farewell {
        self.farewell.get_or_insert_default()
    }

    fn failed_at(&self) -> Option<Stamp> {
        self.farewell.as_ref()?.failed_at
    }

    fn has_left(&self) -> bool {
        self.farewell.as_ref().is_some_and(|farewell| farewell.has_left)
    }

    fn moments(&self) -> Option<Moments> {
        self.farewell.as_ref()?.moments
    }

    fn retires_at(&self) -> Option<Stamp> {
        self.farewell.as_ref()?.retires_at
    }

    fn settling(&self) -> Option<Stamp> {
        self.farewell.as_ref()?.settling
    }

    fn close_of(&self, side: Side) -> Option<&[u8]> {
        self.farewell.as_ref()?.closes[side as usize].as_deref()
    }

    /// After a panic: hands a leg over, with a Close where its peer is known to be between two frames.
    fn salvage(&mut self, side: Side) -> Ended {
        let index = side as usize;
        let mut stream = self.streams[index].take();
        let lane = &mut self.lanes[side.other() as usize];
        // A Close that waits already is part of what is pending.
        let is_whole = !self.is_unsure[index] && !lane.inside_frame && !self.ending.was_cut(side);
        if is_whole && self.ending.can_write(side) && !self.broken[index] {
            let close = CloseFrame::new(Code::INTERNAL, FAULT).to_frame(mask_toward(side));
            let is_untold = self.ending.is_untold(side);
            let close: &[u8] = if is_untold { close.as_bytes() } else { &[] };
            let mut cx = Context::from_waker(Waker::noop());
            // What the kernel takes now: nobody waits for more.
            let now = Stamp::now();
            lane.push(close, now);
            while lane.has_pending()
                && let Poll::Ready(Ok(count)) = lane.poll_write(&mut cx, &mut stream)
            {
                lane.take(count, now);
            }
            if !lane.has_pending() && is_untold {
                self.ending.has_told(side, Some(Code::INTERNAL.get()), now);
            }
        }
        lane.drop_pending();
        let is_reset = self.ending.gone(side) == Some(Gone::Reset);
        // What it has said by now is not known any more.
        let (stream, is_done) = (stream.filter(|_| !is_reset), self.ending.heard_close_of(side));
        Ended { side, stream, is_done, has_ended: false }
    }

    /// How it went; meant for after the second leg.
    pub fn report(&self) -> Report {
        let now = Stamp::now();
        let (initiator, cause, since) = match self.failed_at() {
            Some(at) => (Initiator::Tidegate, Cause::Fault, at),
            None => self.ending.first().unwrap_or((Initiator::Tidegate, Cause::Drain, now)),
        };
        let both = |f: &dyn Fn(Side) -> bool| Side::BOTH.map(f);
        let reason = match (initiator, cause) {
            (Initiator::Client, Cause::Close) => self.reason_of(Side::Client),
            (Initiator::Backend, Cause::Close) => self.reason_of(Side::Backend),
            (_, Cause::Drain) => self.shared.drain.config().reason.clone(),
            (_, Cause::Age) => TOO_OLD.to_owned(),
            (_, Cause::Idle) => IDLE.to_owned(),
            (_, Cause::Slow) => SLOW.to_owned(),
            (_, Cause::Fault) => FAULT.to_owned(),
            _ => String::new(),
        };
        Report {
            initiator,
            cause,
            code: if self.failed_at().is_some() { Some(Code::INTERNAL.get()) } else { self.ending.code() },
            reason,
            ending: now - since,
            heard: both(&|side| self.ending.heard_close_of(side)),
            told: both(&|side| self.ending.told_close(side)),
            sent: Side::BOTH.map(|side| self.ending.close_code_of(side)),
            got: Side::BOTH.map(|side| self.ending.got(side)),
            gone: Side::BOTH.map(|side| self.ending.gone(side)),
            cut: both(&|side| self.ending.was_cut(side)),
            delay_cut: self.is_delay_cut(),
            counts: Side::BOTH.map(|side| {
                let Lane { messages, bytes, .. } = self.lanes[side as usize];
                let crossed = self.farewell.as_ref().map_or(0, |farewell| farewell.crossed[side as usize]);
                Counts { messages, bytes, crossed }
            }),
        }
    }

    fn reason_of(&self, side: Side) -> String {
        let sender = if side == Side::Client { Sender::Client } else { Sender::Server };
        let frame = self.close_of(side).unwrap_or_default();
        let (header, payload) =
            frame.split_at_checked(if sender == Sender::Client { 6 } else { 2 }).unwrap_or_default();
        let mask = header.last_chunk::<4>().copied().filter(|_| sender == Sender::Client);
        CloseFrame::read(payload, mask).map(|close| close.reason().to_owned()).unwrap_or_default()
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        let now = Stamp::now();
        self.shared.alarms.tend();
        let place = *self.place.get_or_insert_with(|| self.shared.alarms.join(cx.waker()));
        self.hear_order();
        if self.is_delay_cut() {
            self.ending.hasten(now);
        }
        let mut due = Due { timer: now.short().wrapping_sub(self.alarm) < FAR, leave: true };
        // Only in a later turn than the one that set it, and only after everything that had come was read.
        let settling = self.settling();
        let mut wake = None;
        // A side that has nothing more to be read in this turn is asked once: that registers the task.
        let mut dry = [false; 2];
        let mut rounds = 0;
        loop {
            let mut progress = false;
            for side in Side::BOTH {
                progress |= self.flush(cx, side, now);
            }
            for side in Side::BOTH {
                progress |= self.read(cx, side, &mut dry[side as usize], now);
            }
            if self.ending.has_begun() {
                // As soon as nothing more is to be read from the client, however much comes from the backend.
                progress |= (!progress || dry[Side::Client as usize]) && self.settle(cx, settling, now);
                match self.ending.next(&self.shared.config, self.views(), now) {
                    Ok(Act::Close(side, what)) => {
                        self.send_close(cx, side, what, now);
                        progress = true;
                    }
                    Ok(Act::Fin(side)) => return Poll::Ready(self.let_go(side, now)),
                    Err(at) => {
                        self.keep_delay(cx, now);
                        // One that is due now is due in the next turn.
                        wake = at.into_iter().chain(self.settling().filter(|at| *at > now)).min();
                        self.timer_is_late = true;
                    }
                }
            }
            rounds += u32::from(progress);
            let is_over = rounds > 1 && now.elapsed() > TURN;
            // Nothing has come of what could be read, and whatever could be written is: another round would find nothing.
            let is_idle = dry == [true; 2] && !self.ending.has_begun();
            if progress && !is_over && !is_idle {
                continue;
            }
            // Only now, when everything that had come was read, or a full turn of it: a late turn of ours is nobody's silence, and what is
            // here already is forwarded before a drain.
            if std::mem::take(&mut due.timer) {
                self.timer_is_late = true;
                self.check_due(cx, now);
            } else if !(std::mem::take(&mut due.leave) && self.leave(now)) {
                if is_over {
                    // Later: the runtime looks at what else has come first, also from the kernel.
                    let _ = pin!(yield_now()).poll(cx);
                }
                break;
            }
        }
        // Who waits for quiet has a moment that moves with every byte.
        self.timer_is_late |=
            !self.has_left() && (self.moments().is_some() || self.retires_at().is_some_and(|at| at <= now));
        if self.timer_is_late {
            self.timer_is_late = false;
            let due = self.next_due(now).into_iter().chain(wake).fold(now + NEVER, Stamp::min);
            // An alarm that is early costs one look; moving it with every message would cost more.
            let is_over = now.short().wrapping_sub(self.alarm) < FAR;
            if is_over || self.alarm.wrapping_sub(due.short()).wrapping_sub(1) < FAR {
                self.alarm = due.short();
                self.shared.alarms.set(place, due);
            }
        }
        Poll::Pending
    }

    /// Hands a leg over to its linger.
    fn let_go(&mut self, side: Side, now: Stamp) -> Ended {
        let lane = &mut self.lanes[side as usize];
        lane.hold(&[], false, now);
        let inside_frame = std::mem::take(&mut lane.inside_frame);
        self.ending.let_go(side, inside_frame, now);
        self.lanes[side.other() as usize].drop_pending();
        let gone = self.ending.gone(side);
        let stream = self.streams[side as usize].take().filter(|_| gone != Some(Gone::Reset));
        // One that would not take what was written has been reset since.
        let has_ended = self.read_done[side as usize] && gone == Some(Gone::Fin) && !self.broken[side as usize];
        Ended { side, stream, is_done: self.ending.heard_close_of(side), has_ended }
    }

    fn views(&self) -> [View; 2] {
        Side::BOTH.map(|side| {
            let lane = &self.lanes[side.other() as usize];
            View {
                boundary: !lane.inside_frame,
                flushed: !lane.has_pending(),
                progress: lane.progress,
                unblocked: lane.progress,
            }
        })
    }

    /// Writes what waits for `side`; true: something went.
    fn flush(&mut self, cx: &mut Context<'_>, side: Side, now: Stamp) -> bool {
        let lane = &mut self.lanes[side.other() as usize];
        if !lane.has_pending() {
            return false;
        }
        if self.broken[side as usize] || !self.ending.can_write(side) {
            lane.drop_pending();
            return true;
        }
        let mut progress = false;
        while lane.has_pending() {
            self.is_unsure[side as usize] = true;
            let written = lane.poll_write(cx, &mut self.streams[side as usize]);
            self.is_unsure[side as usize] = false;
            match written {
                Poll::Ready(Ok(count)) => {
                    lane.take(count, now);
                    self.moved = now;
                }
                Poll::Ready(Err(error)) => {
                    lane.drop_pending();
                    match net::fault(&error) {
                        Some(fault) => self.find_fault(fault, now),
                        None => self.broken[side as usize] = true,
                    }
                    return true;
                }
                Poll::Pending => break,
            }
            progress = true;
        }
        progress
    }

    /// Sends bytes toward `side`, or keeps what it does not take.
    fn write(&mut self, cx: &mut Context<'_>, side: Side, bytes: &[u8], now: Stamp) {
        self.write_with(cx, side, bytes, false, now);
    }

    /// The same. `fin_follows`: as soon as the kernel has it.
    fn write_with(&mut self, cx: &mut Context<'_>, side: Side, bytes: &[u8], fin_follows: bool, now: Stamp) {
        let was_unsure = std::mem::replace(&mut self.is_unsure[side as usize], true);
        self.write_or_keep(cx, side, bytes, fin_follows, now);
        self.is_unsure[side as usize] = was_unsure;
    }

    fn write_or_keep(&mut self, cx: &mut Context<'_>, side: Side, mut bytes: &[u8], fin_follows: bool, now: Stamp) {
        if self.broken[side as usize] || !self.ending.can_write(side) {
            return;
        }
        let lane = &mut self.lanes[side.other() as usize];
        while !bytes.is_empty() {
            if lane.has_pending() {
                lane.push(bytes, now);
                return;
            }
            match poll_write(&mut self.streams[side as usize], cx, bytes, fin_follows) {
                Poll::Ready(Ok(count)) => {
                    if lane.inside_frame {
                        lane.progress = now;
                    }
                    bytes = &bytes[count..];
                }
                Poll::Ready(Err(error)) => {
                    match net::fault(&error) {
                        Some(fault) => self.find_fault(fault, now),
                        None => self.broken[side as usize] = true,
                    }
                    return;
                }
                Poll::Pending => {
                    lane.push(bytes, now);
                    self.timer_is_late = true;
                    return;
                }
            }
        }
    }

    /// Reads once from `side` and passes on what may be; true: something came.
    fn read(&mut self, cx: &mut Context<'_>, side: Side, dry: &mut bool, now: Stamp) -> bool {
        let index = side as usize;
        let is_broken = self.broken[index];
        if self.read_done[index] || (*dry && !is_broken) {
            return false;
        }
        // Back-pressure; but of a side that is gone the last word is heard.
        if self.lanes[index].has_pending() && self.ending.forwards(side) && !is_broken {
            let waited = self.streams[index].as_mut().map_or(Ok(()), |stream| stream.wait(cx));
            let fault = waited.as_ref().err().and_then(net::fault);
            if let Some(fault) = fault {
                self.find_fault(fault, now);
            }
            return fault.is_some();
        }
        if self.lanes[index].streams
            && let Some(is_progress) = self.splice(cx, side, dry, now)
        {
            return is_progress;
        }
        with_scratch(|scratch| {
            let Some(stream) = &mut self.streams[index] else { return false };
            let lane = &mut self.lanes[index];
            let held = lane.held().len();
            if held > 0 {
                scratch[..held].copy_from_slice(lane.held());
            }
            let fresh = if let Some(count) = lane.next_early(&mut scratch[held..held + READ]) {
                Ok(count)
            } else {
                match stream.poll_read_again(cx, &mut scratch[held..held + READ], &mut lane.is_awaited) {
                    Poll::Pending if is_broken => Ok(0),
                    Poll::Pending => {
                        *dry = true;
                        return false;
                    }
                    Poll::Ready(read) => read,
                }
            };
            if let Some(fault) = fresh.as_ref().err().and_then(net::fault) {
                self.find_fault(fault, now);
                return true;
            }
            match fresh {
                Ok(0) | Err(_) => {
                    self.read_done[index] = true;
                    // After a failed write the kernel has reported the reset already and reads give a plain EOF.
                    // TLS that is broken is not: its socket is as it was, and ended in order.
                    let is_reset = fresh.is_err() || (is_broken && !stream.is_broken_tls());
                    let how = if is_reset { Gone::Reset } else { Gone::Fin };
                    let inside_frame = lane.inside_frame;
                    self.ending.heard_gone(side, how, inside_frame, now);
                }
                Ok(fresh) => {
                    // The timer may stand at the deadline, and the next Ping be due before.
                    self.timer_is_late |= self.probes.has_said(side);
                    lane.has_read(fresh as u64, now);
                    self.shared.traffic.read(side, fresh as u64);
                    // Saves a round that would find nothing.
                    *dry = fresh < READ && stream.is_drained(cx, &mut lane.is_awaited);
                    if self.ending.listens(side) {
                        // The end of a frame is known before its bytes are written.
                        let to = side.other() as usize;
                        self.is_unsure[to] = self.lanes[index].inside_frame;
                        self.digest(cx, side, &scratch[..held + fresh], held, now);
                        self.is_unsure[to] = false;
                    }
                }
            }
            true
        })
    }

    /// A leg within this process finds that the client is at fault. The leg goes on until it has its Close, whatever it took of a frame.
    fn find_fault(&mut self, fault: Fault, now: Stamp) {
        match fault {
            Fault::Slow => self.ending.leave(CloseFrame::new(Code::TRY_AGAIN, SLOW), Cause::Slow, now),
            Fault::Broke(violation) => {
                self.lanes[Side::Client as usize].inside_frame = false;
                self.ending.heard_gone(Side::Client, Gone::Broke(violation), false, now);
            }
        }
        self.timer_is_late = true;
    }

    /// Goes through the frames of `bytes`, of which the first `seen` were held and have been tracked, passes them on,
    /// and holds the last one if it is small and not whole.
    fn digest(&mut self, cx: &mut Context<'_>, side: Side, bytes: &[u8], seen: usize, now: Stamp) {
        let index = side as usize;
        let to = side.other();
        let forwards = self.ending.forwards(side);
        let (limits, hold) = (self.shared.config.limits(), self.shared.config.hold_frame);
        let mut at = seen;
        // What may be passed on in one write begins here; the frame that is being looked at begins there.
        let mut run_at = 0;
        let mut frame_at = 0;
        let violation = loop {
            let lane = &mut self.lanes[index];
            let rest = &bytes[at..];
            if rest.is_empty() && lane.tracker.at_boundary() {
                break None;
            }
            let stepped = match lane.tracker.whole(rest, limits) {
                Ok(Some((used, header))) => {
                    lane.begin(header, hold, forwards);
                    Ok((used, Step::End(header)))
                }
                Ok(None) => lane.tracker.step(rest, limits),
                Err(violation) => Err(violation),
            };
            let (used, step) = match stepped {
                Ok(step) => step,
                Err(violation) => break Some(violation),
            };
            at += used;
            match step {
                Step::More => break None,
                Step::Header(header) => lane.begin(header, hold, forwards),
                Step::End(header) => {
                    if std::mem::take(&mut lane.inside_frame) {
                        lane.progress = now;
                    }
                    lane.streams = false;
                    let end = at;
                    if header.opcode.is_control() {
                        // Held until it is whole, so all of it is here.
                        let whole = &bytes[frame_at..end];
                        if header.opcode == Opcode::Close && forwards && run_at < frame_at {
                            // A leg within this process may refuse what was said before: then that came first.
                            self.write(cx, to, &bytes[run_at..frame_at], now);
                            run_at = frame_at;
                            if !self.ending.listens(side) {
                                self.lanes[index].hold(&[], false, now);
                                return;
                            }
                        }
                        match self.control(side, header, &whole[usize::from(header.size)..], whole, now) {
                            Ok(true) => {}
                            Ok(false) => {
                                if forwards {
                                    self.write(cx, to, &bytes[run_at..frame_at], now);
                                }
                                run_at = end;
                            }
                            Err(violation) => break Some(violation),
                        }
                        if self.ending.heard_close_of(side) {
                            self.lanes[index].hold(&[], false, now);
                            return;
                        }
                    } else {
                        (self.last_data, self.last_speaker) = (now, side);
                        if header.fin {
                            if forwards {
                                self.lanes[index].messages += 1;
                            } else {
                                self.farewell_mut().crossed[index] += 1;
                            }
                            self.shared.traffic.message(side, self.lanes[index].opcode);
                        }
                    }
                    frame_at = end;
                }
            }
        };
        let streams = self.lanes[index].streams;
        let run_end = if streams && violation.is_none() { bytes.len() } else { frame_at };
        if forwards && run_at < run_end {
            self.write(cx, to, &bytes[run_at..run_end], now);
        }
        let lane = &mut self.lanes[index];
        if lane.tracker.payload_begun().is_some_and(|header| !header.opcode.is_control()) {
            self.moved = now;
        }
        if let Some(violation) = violation {
            lane.hold(&[], false, now);
            self.ending.heard_gone(side, Gone::Broke(violation), false, now);
        } else if streams {
            lane.hold(&[], false, now);
        } else {
            lane.hold(&bytes[frame_at..], frame_at == 0, now);
            self.timer_is_late |= !lane.held().is_empty();
        }
    }

    /// Looks into a control frame; `Ok(true)`: it is passed on.
    fn control(
        &mut self,
        side: Side,
        header: Header,
        payload: &[u8],
        whole: &[u8],
        now: Stamp,
    ) -> Result<bool, Violation> {
        self.shared.traffic.message(side, header.opcode);
        if side == Side::Client && header.opcode != Opcode::Close && self.is_flood(now) {
            return Err(Violation::ControlFlood);
        }
        match header.opcode {
            Opcode::Close => {
                let close = CloseFrame::read(payload, header.mask)?;
                // Passed on by `ending`, at its time.
                self.farewell_mut().closes[side as usize] = Some(whole.into());
                self.ending.heard_close(side, close.code(), now);
                Ok(false)
            }
            Opcode::Ping => {
                #[cfg(debug_assertions)]
                fault::strike(&clear(payload, header.mask));
                self.probes.asked_mut(side.other()).relayed = Some(clear(payload, header.mask));
                Ok(true)
            }
            _ => Ok(!self.probes.has_answered(side, &clear(payload, header.mask))),
        }
    }

    /// Counts a control frame of the client; true: it is one too many in this second.
    fn is_flood(&mut self, now: Stamp) -> bool {
        let (since, count) = &mut self.controls;
        if now.short().wrapping_sub(*since) >= 1000 {
            (*since, *count) = (now.short(), 0);
        }
        *count = count.saturating_add(1);
        let most = self.shared.config.max_control_rate;
        most != 0 && *count > most
    }

    fn send_close(&mut self, cx: &mut Context<'_>, side: Side, what: What, now: Stamp) {
        let fin_follows = self.ending.ends_with_close(side);
        let code = match what {
            What::Verbatim => {
                let frame = self.farewell_mut().closes[side.other() as usize].take();
                if let Some(frame) = &frame {
                    self.write_with(cx, side, frame, fin_follows, now);
                }
                self.farewell_mut().closes[side.other() as usize] = frame;
                self.ending.close_code_of(side.other())
            }
            What::Own(close) => {
                self.write_with(cx, side, close.to_frame(mask_toward(side)).as_bytes(), fin_follows, now);
                close.code()
            }
        };
        self.ending.sent_close(side, code);
    }

    /// "A client that leaves without waiting": its FIN may be right behind its Close, so the kernel is asked whether more has come,
    /// which is then read in the runtime's next turn. The FIN may also come in a packet of its own: where it matters, since the
    /// client's was the last word and an answer may be in the making, it is given [`APART`]. `settling` was set in an earlier turn.
    fn settle(&mut self, cx: &mut Context<'_>, settling: Option<Stamp>, now: Stamp) -> bool {
        if !self.ending.is_unsettled() {
            return false;
        }
        match settling {
            Some(at) if at <= now => {
                self.farewell_mut().settling = None;
                self.ending.settle();
                return true;
            }
            None if self.settling().is_none() => {
                if self.last_speaker == Side::Client && !self.shared.config.close_delay.is_zero() {
                    self.farewell_mut().settling = Some(now + APART);
                } else if self.streams[Side::Client as usize]
                    .as_mut()
                    .is_some_and(|stream| stream.is_bare() && stream.is_silent())
                {
                    self.ending.settle();
                    return true;
                } else {
                    self.farewell_mut().settling = Some(now);
                    // Wakes the task after the next look of the runtime at the kernel; only its waker is needed.
                    let _ = pin!(yield_now()).poll(cx);
                }
            }
            _ => {}
        }
        false
    }

    /// As long as `close.delay` is all that the session waits for, somebody else may have its place.
    fn keep_delay(&mut self, cx: &Context<'_>, now: Stamp) {
        if self.ending.delayed_until(&self.shared.config, now).is_some() {
            let sockets = self.streams.iter().flatten().count();
            let Farewell { delay, .. } = self.farewell.get_or_insert_default().as_mut();
            delay.get_or_insert_with(|| self.shared.delays.begin(cx.waker(), sockets));
        } else if !self.is_delay_cut()
            && let Some(farewell) = &mut self.farewell
        {
            farewell.delay = None;
        }
    }

    fn is_delay_cut(&self) -> bool {
        self.farewell.as_ref().and_then(|farewell| farewell.delay.as_ref()).is_some_and(Delay::is_over)
    }

    /// Looks whether a drain has begun.
    fn hear_order(&mut self) {
        if !self.has_left() && self.moments().is_none() && self.shared.drain.has_begun() {
            self.farewell_mut().moments = Some(self.shared.drain.moments(rand::random()));
        }
    }

    /// Ends the session when a drain, its age or its silence says so; true: it did.
    fn leave(&mut self, now: Stamp) -> bool {
        let Some((at, cause)) = self.leave_due(now) else { return false };
        if at > now && !(cause == Cause::Drain && self.shared.drain.is_hurried()) {
            return false;
        }
        let config = self.shared.drain.config();
        let reason = match cause {
            Cause::Age => TOO_OLD,
            Cause::Idle => IDLE,
            _ => &config.reason,
        };
        let code = Code::new(config.close_code).unwrap_or(Code::GOING_AWAY);
        self.ending.leave(CloseFrame::new(code, reason), cause, now);
        self.farewell_mut().has_left = true;
        true
    }

    /// When the session may be closed by us, and why: at a quiet point from its moment on, or at its own deadline. A drain, once it
    /// has begun, comes before all else, and alone has a say in a session that is ending already: it may be held by `close.delay`.
    fn leave_due(&self, now: Stamp) -> Option<(Stamp, Cause)> {
        match self.moments() {
            _ if self.has_left() => return None,
            Some(moments) => return Some((self.quiet_at(moments, now), Cause::Drain)),
            None if self.ending.has_begun() => return None,
            None => {}
        }
        let age = self.retires_at().map(|from| {
            // Until then the configuration, which all threads share, is not looked at with every message.
            let at = if now < from {
                from
            } else {
                self.quiet_at(Moments { from, until: from + self.shared.drain.config().window }, now)
            };
            (at, Cause::Age)
        });
        let moved = self.moved.max(self.last_data);
        let idle = self.shared.config.idle_timeout.map(|timeout| (moved + timeout, Cause::Idle));
        age.into_iter().chain(idle).min_by_key(|(at, _)| *at)
    }

    /// The first quiet point within `moments`, as far as can be said now.
    fn quiet_at(&self, moments: Moments, now: Stamp) -> Stamp {
        if !self.is_between_messages() {
            return moments.until.max(now);
        }
        let (side, at) = (self.last_speaker, self.last_data);
        let config = self.shared.drain.config();
        let quiet = at + config.quiet * if side == Side::Client { ANSWER_PATIENCE } else { 1 };
        let fresh = if at >= moments.from { moments.from } else { moments.from + config.exchange() };
        quiet.max(fresh).min(moments.until)
    }

    fn is_between_messages(&self) -> bool {
        self.lanes.iter().all(|lane| {
            lane.tracker.at_boundary() && !lane.tracker.in_message() && !lane.has_pending() && lane.held().is_empty()
        })
    }

    /// Does what is due before an end has begun: pings, and deadlines of held and stalled bytes.
    fn check_due(&mut self, cx: &mut Context<'_>, now: Stamp) {
        if self.ending.has_begun() {
            return;
        }
        for side in Side::BOTH {
            let lane = &mut self.lanes[side as usize];
            if lane.has_pending() && now >= lane.progress + self.shared.config.write_timeout {
                self.ending.stalled(side.other(), true, now);
                return;
            }
            if let Some(timeout) = self.streams[side as usize].as_ref().and_then(Stream::stall_timeout)
                && lane.has_pending()
                && now >= lane.progress + timeout
            {
                self.ending.leave(CloseFrame::new(Code::TRY_AGAIN, SLOW), Cause::Slow, now);
                // A flood would be read, and discarded, at the cost of the others.
                if let Some(stream) = &mut self.streams[side as usize] {
                    stream.shut();
                }
                return;
            }
            if lane.held_since().is_some_and(|since| now >= since + self.shared.config.hold_timeout) {
                self.release(cx, side, now);
            }
            self.probe(cx, side, now);
        }
    }

    /// A frame that was held for too long goes on as it comes. Headers and control frames never do: they are short.
    fn release(&mut self, cx: &mut Context<'_>, side: Side, now: Stamp) {
        let lane = &mut self.lanes[side as usize];
        let held = lane.take_held();
        if lane.tracker.payload_begun().is_some_and(|header| !header.opcode.is_control()) {
            (lane.streams, lane.inside_frame) = (true, true);
            self.write(cx, side.other(), &held, now);
        } else {
            lane.hold(&held, false, now);
        }
    }

    /// Asks a silent side for a sign of life, or finds that it gave none.
    fn probe(&mut self, cx: &mut Context<'_>, side: Side, now: Stamp) {
        if self.shared.config.ping_interval.is_zero() || self.ending.has_begun() || self.is_local(side) {
            return;
        }
        let toward = &self.lanes[side.other() as usize];
        let (boundary, flushed) = (!toward.inside_frame, !toward.has_pending());
        let (lane, probes) = (&mut self.lanes[side as usize], &mut self.probes);
        if lane.has_pending() {
            // Suspended: its answer may lie unread.
            lane.has_read(0, now);
            probes.has_said(side);
            return;
        }
        match probes.deadline(side) {
            Some(_) if !flushed => probes.asked_mut(side).deadline = Some(now + self.shared.config.pong_timeout),
            Some(deadline) if now >= deadline => {
                self.ending.heard_gone(side, Gone::Silent, lane.inside_frame, now);
            }
            None if lane.silence(now) >= self.shared.config.ping_interval && flushed && boundary => {
                let asked = probes.asked_mut(side);
                asked.deadline = Some(now + self.shared.config.pong_timeout);
                // The other side's Ping is as good as one of ours, and none of ours may overtake it.
                if asked.relayed.is_none() {
                    let payload: u64 = rand::random();
                    asked.payload = Some(payload);
                    let ping = ControlFrame::new(Opcode::Ping, &payload.to_be_bytes(), mask_toward(side));
                    self.write(cx, side, ping.as_bytes(), now);
                }
            }
            _ => {}
        }
    }

    /// Whoever is on this side is known to be there.
    fn is_local(&self, side: Side) -> bool {
        self.streams[side as usize].as_ref().is_some_and(Stream::is_local)
    }

    /// When [`Self::check_due`] or [`Self::leave`] has something to do.
    fn next_due(&self, now: Stamp) -> Option<Stamp> {
        if self.ending.has_begun() {
            return self.leave_due(now).map(|(at, _)| at.max(now + TICK));
        }
        let pings = !self.shared.config.ping_interval.is_zero();
        let lanes = self.lanes.iter().zip(&self.streams).flat_map(|(lane, from)| {
            let stalled = lane.has_pending().then(|| {
                let shared = from.as_ref().and_then(Stream::stall_timeout).unwrap_or(self.shared.config.write_timeout);
                lane.progress + self.shared.config.write_timeout.min(shared)
            });
            let held = lane.held_since().map(|since| since + self.shared.config.hold_timeout);
            [stalled, held]
        });
        let probes = Side::BOTH.into_iter().filter(|side| pings && !self.is_local(*side)).map(|side| {
            let interval = self.shared.config.ping_interval;
            let silence = || self.lanes[side as usize].silence(now);
            let due = self.probes.deadline(side).unwrap_or_else(|| now + interval.saturating_sub(silence()));
            // Due but not possible (back-pressure, inside a frame): looked at again in a while.
            Some(if due <= now { now + interval } else { due })
        });
        lanes.chain(probes).chain([self.leave_due(now).map(|(at, _)| at)]).flatten().map(|at| at.max(now + TICK)).min()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.forget_alarm();
    }
}

/// How long a session lasts. `share`, 0 to 1, is its place among those that began at the same time.
fn lifetime(max: Duration, jitter_percent: u32, share: f64) -> Duration {
    max.mul_f64(1.0 - share.clamp(0.0, 1.0) * f64::from(jitter_percent.min(100)) / 100.0)
}

/// What is still to be looked at in one poll, once each.
struct Due {
    timer: bool,
    leave: bool,
}

/// What stands for no deadline.
const NEVER: Duration = Duration::from_hours(24);

/// Of two moments in short the one is at or behind the other, rather than before it, when it is by less than this.
const FAR: u32 = u32::MAX / 2;

/// Timers are not set closer than this: the runtime's resolution.
const TICK: Duration = Duration::from_millis(1);

fn poll_write(
    stream: &mut Option<Stream>,
    cx: &mut Context<'_>,
    bytes: &[u8],
    fin_follows: bool,
) -> Poll<std::io::Result<usize>> {
    match stream {
        Some(stream) => match stream.poll_write_with(cx, bytes, fin_follows) {
            Poll::Ready(Ok(0)) => Poll::Ready(Err(std::io::ErrorKind::WriteZero.into())),
            result => result,
        },
        None => Poll::Ready(Err(std::io::ErrorKind::NotConnected.into())),
    }
}

/// "The masking key needs to be unpredictable", and only a client's frames are masked (RFC 6455 5.3).
fn mask_toward(side: Side) -> Option<[u8; 4]> {
    (side == Side::Backend).then(rand::random)
}

fn clear(payload: &[u8], mask: Option<[u8; 4]>) -> Box<[u8]> {
    let mut payload: Box<[u8]> = payload.into();
    if let Some(mask) = mask {
        frame::apply_mask(&mut payload, mask);
    }
    payload
}
