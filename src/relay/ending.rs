//! The close table of one session as a state machine: what was heard and said goes in, what is to be done comes out.
//!
//! No I/O and no clock: time is an argument. The rules stand in [`Ending::close_due`] and [`Ending::fin_due`], one arm
//! per row of the table in `ARCHITECTURE.md`; everything else is bookkeeping.

#[cfg(test)]
mod tests;

use super::Config;
use crate::{
    side::Side,
    stamp::Stamp,
    ws::{CloseFrame, Code, Violation},
};

/// How a side stopped to be of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// Its FIN came.
    Fin,
    /// Its RST came, or its socket failed in another way.
    Reset,
    /// It did not answer a Ping of ours, nor say anything else.
    Silent,
    /// It takes nothing of what waits for it.
    Stalled,
    /// It broke the protocol or a limit.
    Broke(Violation),
}

/// Who ended a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Initiator {
    /// The client was the first to send Close or to leave.
    Client,
    /// The backend was.
    Backend,
    /// tidegate: a drain, or somebody broke a rule or did not answer.
    Tidegate,
}

/// Why a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// A Close frame.
    Close,
    /// A side went without one.
    Gone(Side, Gone),
    /// The process drains.
    Drain,
    /// It was `websocket.max_age` old.
    Age,
    /// Nothing was said for `websocket.idle_timeout`.
    Idle,
    /// The client took nothing for `pool.stall_timeout`, and what waits for it waits in a connection that others share; or it is behind by
    /// more than is kept for those who share a WebSocket.
    Slow,
    /// A bug of ours: a panic.
    Fault,
}

/// Which Close is to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// The other side's frame, byte for byte.
    Verbatim,
    /// One of ours.
    Own(CloseFrame),
}

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Act {
    /// Send a Close to this side, then tell [`Ending::sent_close`].
    Close(Side, What),
    /// Nothing more will be said to this side: FIN, and let it linger; then tell [`Ending::let_go`].
    Fin(Side),
}

/// What the relay knows of the bytes toward a side.
#[derive(Debug, Clone, Copy)]
pub(super) struct View {
    /// A frame may be put in now.
    pub boundary: bool,
    /// Nothing waits to be written.
    pub flushed: bool,
    /// When bytes were last taken, or first had to wait.
    pub progress: Stamp,
    /// When what had waited was last gone, or a frame that was not held ended: before that the other side was not read,
    /// or could not answer.
    pub unblocked: Stamp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Nothing,
    /// Queued; not yet taken by the kernel.
    Close,
    /// In the kernel.
    Flushed,
    /// Its leg was handed over to linger.
    Fin,
}

/// A Close frame, by the code it carries, if any.
#[derive(Debug, Clone, Copy)]
struct Coded(Option<u16>);

#[derive(Debug, Clone, Copy)]
struct Leg {
    /// Its Close was received.
    close: Option<Coded>,
    gone: Option<Gone>,
    /// When the first of both happened.
    since: Option<Stamp>,
    /// When it was gone.
    gone_at: Option<Stamp>,
    told: Told,
    /// When its Close was in the kernel: the timers start here.
    flushed_at: Option<Stamp>,
    /// When its leg was handed over: nothing more is heard from it.
    let_go_at: Option<Stamp>,
    /// The Close that it was told.
    said: Option<Coded>,
    /// The other side died inside a frame that was partly passed on: no Close can be put in any more.
    cut: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Ending {
    /// From the first sign on, or if there is something to know of its backend: most sessions have neither, and are to cost little.
    signs: Option<Box<Signs>>,
}

/// What was heard and said of an end.
#[derive(Debug)]
struct Signs {
    /// After the backend's Close nothing comes from it, not even its FIN.
    is_forgotten: bool,
    legs: [Leg; 2],
    /// The client's Close was heard, but whether it waits for an answer is being looked at.
    unsettled: bool,
    /// It is to end because we say so.
    leave: Option<(Stamp, CloseFrame)>,
    /// We wanted it to end when somebody had begun already, or its place was needed: from then on `close.delay` is over.
    hastened_at: Option<Stamp>,
    first: Option<(Initiator, Cause, Stamp)>,
}

impl Signs {
    /// Nobody said anything about an end.
    const NONE: Self = {
        let leg = Leg {
            close: None,
            gone: None,
            since: None,
            gone_at: None,
            told: Told::Nothing,
            flushed_at: None,
            let_go_at: None,
            said: None,
            cut: false,
        };
        Self { is_forgotten: false, legs: [leg; 2], unsettled: false, leave: None, hastened_at: None, first: None }
    };
}

impl Ending {
    /// Of a session in which nobody said anything about an end. `is_forgotten`: the backend's FIN does not come.
    pub(super) fn new(is_forgotten: bool) -> Self {
        Self { signs: is_forgotten.then(|| Box::new(Signs { is_forgotten, ..Signs::NONE })) }
    }

    fn signs(&self) -> &Signs {
        static NONE: Signs = Signs::NONE;
        self.signs.as_deref().unwrap_or(&NONE)
    }

    fn signs_mut(&mut self) -> &mut Signs {
        self.signs.get_or_insert_with(|| Box::new(Signs::NONE))
    }

    fn leg(&self, side: Side) -> &Leg {
        &self.signs().legs[side as usize]
    }

    fn leg_mut(&mut self, side: Side) -> &mut Leg {
        &mut self.signs_mut().legs[side as usize]
    }

    /// Somebody, perhaps we, began to end the session.
    pub(super) fn has_begun(&self) -> bool {
        self.signs().first.is_some()
    }

    /// Who began, why, and when; `None` before.
    pub(super) fn first(&self) -> Option<(Initiator, Cause, Stamp)> {
        self.signs().first
    }

    /// The code that the session ended with: the initiator's, or what the client got of us; `None`: no code.
    pub(super) fn code(&self) -> Option<u16> {
        let (client, backend) = (self.leg(Side::Client), self.leg(Side::Backend));
        match self.signs().first {
            Some((Initiator::Client, Cause::Close, _)) => client.close.and_then(|close| close.0),
            Some((Initiator::Backend, Cause::Close, _)) => backend.close.and_then(|close| close.0),
            _ => self.got(Side::Client),
        }
    }

    /// How this side went without waiting for the Close handshake, if it did.
    pub(super) fn gone(&self, side: Side) -> Option<Gone> {
        self.leg(side).gone
    }

    /// Its Close was received.
    pub(super) fn heard_close_of(&self, side: Side) -> bool {
        self.leg(side).close.is_some()
    }

    /// The code of its Close, if it carried one.
    pub(super) fn close_code_of(&self, side: Side) -> Option<u16> {
        self.leg(side).close.and_then(|close| close.0)
    }

    /// The code of the Close that it got, if it carried one.
    pub(super) fn got(&self, side: Side) -> Option<u16> {
        let leg = self.leg(side);
        leg.flushed_at.and(leg.said).and_then(|close| close.0)
    }

    /// It got a Close: its kernel or ours has all of it.
    pub(super) fn told_close(&self, side: Side) -> bool {
        self.leg(side).flushed_at.is_some()
    }

    /// No Close was sent to it, nor does one wait.
    pub(super) fn is_untold(&self, side: Side) -> bool {
        self.leg(side).told == Told::Nothing
    }

    /// A Close that [`Ending::next`] did not ask for is in the kernel.
    pub(super) fn has_told(&mut self, side: Side, code: Option<u16>, now: Stamp) {
        self.sent_close(side, code);
        let leg = self.leg_mut(side);
        leg.told = Told::Flushed;
        leg.flushed_at = Some(now);
    }

    /// As soon as it has its Close its leg is ended: see [`Ending::fin_due`].
    pub(super) fn ends_with_close(&self, side: Side) -> bool {
        let leg = self.leg(side);
        side == Side::Client && (leg.close.is_some() || leg.gone.is_some())
    }

    /// It was cut inside a frame.
    pub(super) fn was_cut(&self, side: Side) -> bool {
        self.leg(side).cut
    }

    /// What `side` sends is passed on, rather than discarded.
    pub(super) fn forwards(&self, side: Side) -> bool {
        let (from, to) = (self.leg(side), self.leg(side.other()));
        from.close.is_none()
            && !matches!(from.gone, Some(Gone::Broke(_) | Gone::Reset))
            && to.told == Told::Nothing
            && self.can_write(side.other())
    }

    /// What `side` sends can still be understood: it broke nothing and its Close is not yet here.
    pub(super) fn listens(&self, side: Side) -> bool {
        let leg = self.leg(side);
        leg.close.is_none() && leg.gone.is_none()
    }

    /// Bytes can still reach this side.
    pub(super) fn can_write(&self, side: Side) -> bool {
        let leg = self.leg(side);
        // After the client's FIN its kernel may still take data; a backend that is gone is past caring.
        let dead = match leg.gone {
            Some(Gone::Reset | Gone::Stalled) => true,
            Some(Gone::Fin) => side == Side::Backend,
            _ => false,
        };
        !dead && leg.told != Told::Fin
    }

    fn begin(&mut self, initiator: Initiator, cause: Cause, now: Stamp) {
        self.signs_mut().first.get_or_insert((initiator, cause, now));
    }

    /// `side` sent its Close.
    pub(super) fn heard_close(&mut self, side: Side, code: Option<u16>, now: Stamp) {
        self.begin(if side == Side::Client { Initiator::Client } else { Initiator::Backend }, Cause::Close, now);
        let leg = self.leg_mut(side);
        leg.close.get_or_insert(Coded(code));
        leg.since.get_or_insert(now);
        if side == Side::Client {
            self.signs_mut().unsettled = true;
        }
    }

    /// The client's socket was looked at once more after its Close: no FIN came with it.
    pub(super) fn settle(&mut self) {
        self.signs_mut().unsettled = false;
    }

    /// The client's Close awaits [`Ending::settle`].
    pub(super) fn is_unsettled(&self) -> bool {
        self.signs().unsettled
    }

    /// `side` is gone. `inside_frame`: what it sent last was part of a frame of which the other side has the beginning.
    pub(super) fn heard_gone(&mut self, side: Side, how: Gone, inside_frame: bool, now: Stamp) {
        let initiator = match (how, side) {
            (Gone::Silent | Gone::Stalled | Gone::Broke(_), _) => Initiator::Tidegate,
            (_, Side::Client) => Initiator::Client,
            (_, Side::Backend) => Initiator::Backend,
        };
        self.begin(initiator, Cause::Gone(side, how), now);
        self.signs_mut().unsettled = false;
        let leg = self.leg_mut(side);
        match leg.gone {
            None => leg.gone = Some(how),
            // Worse news replace the better: what was half-closed can still be reset.
            Some(Gone::Fin | Gone::Silent | Gone::Broke(_)) if matches!(how, Gone::Reset | Gone::Stalled) => {
                leg.gone = Some(how);
            }
            Some(_) => return,
        }
        leg.since.get_or_insert(now);
        leg.gone_at.get_or_insert(now);
        if inside_frame {
            self.leg_mut(side.other()).cut = true;
        }
    }

    /// `side` takes nothing of what waits for it; `cut`: it will miss a part of that.
    pub(super) fn stalled(&mut self, side: Side, cut: bool, now: Stamp) {
        self.leg_mut(side).cut |= cut;
        self.heard_gone(side, Gone::Stalled, false, now);
    }

    /// The backend is not told yet that the client has left: until then at the latest (`close.delay`).
    pub(super) fn delayed_until(&self, config: &Config, now: Stamp) -> Option<Stamp> {
        let (client, backend) = (self.leg(Side::Client), self.leg(Side::Backend));
        let is_delayed = backend.told == Told::Nothing && backend.gone.is_none() && backend.close.is_none();
        let until = self.delay(client.gone_at.filter(|_| is_delayed)?, config);
        (until > now).then_some(until)
    }

    /// `close.delay` is over for it.
    pub(super) fn hasten(&mut self, now: Stamp) {
        self.signs_mut().hastened_at.get_or_insert(now);
    }

    fn delay(&self, since: Stamp, config: &Config) -> Stamp {
        let due = since + config.close_delay;
        self.signs().hastened_at.map_or(due, |at| due.min(at))
    }

    /// We want it to end, of no fault of anybody: this is its moment.
    pub(super) fn leave(&mut self, close: CloseFrame, cause: Cause, now: Stamp) {
        if self.has_begun() {
            self.hasten(now);
        } else {
            self.begin(Initiator::Tidegate, cause, now);
            self.signs_mut().leave = Some((now, close));
        }
    }

    /// The Close that [`Ending::next`] asked for was queued.
    pub(super) fn sent_close(&mut self, side: Side, code: Option<u16>) {
        let leg = self.leg_mut(side);
        leg.told = Told::Close;
        leg.said = Some(Coded(code));
    }

    /// The FIN that [`Ending::next`] asked for was left to the linger. `inside_frame`: as in [`Ending::heard_gone`].
    pub(super) fn let_go(&mut self, side: Side, inside_frame: bool, now: Stamp) {
        let leg = self.leg_mut(side);
        leg.told = Told::Fin;
        leg.let_go_at = Some(now);
        let other = self.leg_mut(side.other());
        other.cut |= inside_frame && other.told == Told::Nothing;
    }

    /// What to do next, or when to ask again at the latest. To be asked after everything that was told.
    pub(super) fn next(&mut self, config: &Config, views: [View; 2], now: Stamp) -> Result<Act, Option<Stamp>> {
        if !self.has_begun() {
            return Err(None);
        }
        let mut wake: Option<Stamp> = None;
        let mut at_latest = |at: Stamp| wake = Some(wake.map_or(at, |wake| wake.min(at)));
        for side in Side::BOTH {
            let view = views[side as usize];
            let leg = self.leg_mut(side);
            if leg.told == Told::Close && view.flushed {
                leg.told = Told::Flushed;
                leg.flushed_at = Some(now);
            }
        }
        for side in Side::BOTH {
            let view = views[side as usize];
            let close = self.close_due(side, config, views);
            if let Some((at, what)) = close {
                if at > now {
                    at_latest(at);
                } else if view.boundary && !self.leg(side).cut {
                    return Ok(Act::Close(side, what));
                }
            }
            // A Close that is due or queued and can't get out: bounded like one that is not answered.
            let leg = self.leg(side);
            let waits_since = match (leg.told, close) {
                (Told::Nothing, Some((at, _))) if at <= now => Some(at),
                (Told::Nothing, _) if leg.cut && !view.flushed => leg.since.or(self.leg(side.other()).since),
                (Told::Close, _) => Some(view.progress),
                _ => None,
            };
            if let Some(since) = waits_since.filter(|_| self.can_write(side)) {
                // A frame that does not end is its source's fault, bytes that are not taken this side's.
                let deadline = if view.flushed {
                    let goes_on = since.max(view.progress) + config.close_handshake_timeout;
                    goes_on.min(since + config.close_handshake_timeout + config.write_timeout)
                } else {
                    since.max(view.progress) + config.write_timeout
                };
                if deadline > now {
                    at_latest(deadline);
                } else if view.flushed {
                    self.leg_mut(side).cut = true;
                } else {
                    self.stalled(side, true, now);
                }
            }
            match self.fin_due(side, config, views, now) {
                Some(at) if at <= now => return Ok(Act::Fin(side)),
                Some(at) => at_latest(at),
                None => {}
            }
        }
        Err(wake)
    }

    /// Which Close this side is owed, and when; `None`: none, or not before something else happens.
    #[allow(clippy::match_same_arms, reason = "one arm per row of the close table")]
    fn close_due(&self, side: Side, config: &Config, views: [View; 2]) -> Option<(Stamp, What)> {
        let leg = self.leg(side);
        if leg.told != Told::Nothing || !self.can_write(side) {
            return None;
        }
        let other = self.leg(side.other());
        let own = |code: Code| What::Own(CloseFrame::new(code, ""));
        let blame = |violation: Violation| What::Own(CloseFrame::new(violation.code(), violation.as_str()));
        let configured = |code: u16, default: Code| own(Code::new(code).unwrap_or(default));
        let echo_of = |close: Coded| What::Own(CloseFrame::answer(close.0));
        let delayed = |since: Stamp| self.delay(since, config);
        // Whatever is still awaited from the other side is given up then.
        let unanswered = self.answer_due(side.other(), config, views);
        let other_unanswered = match (unanswered, other.let_go_at) {
            (Some(unanswered), Some(let_go)) => Some(unanswered.min(let_go)),
            (unanswered, let_go) => unanswered.or(let_go),
        };
        let other_since = other.since;
        match side {
            Side::Backend => {
                if let (Some(how), Some(since)) = (leg.gone, leg.gone_at) {
                    return Some((
                        since,
                        match how {
                            Gone::Broke(violation) => blame(violation),
                            _ => own(Code::GOING_AWAY),
                        },
                    ));
                }
                if let Some((at, _)) = self.signs().leave {
                    return Some((at, own(Code::GOING_AWAY)));
                }
                match (leg.close, other.close, other.gone) {
                    // Its Close is owed an answer.
                    (Some(_), Some(_), _) => Some((other_since?, What::Verbatim)),
                    (Some(close), None, Some(_)) => Some((other.gone_at?, echo_of(close))),
                    (Some(close), None, None) => Some((other_unanswered?, echo_of(close))),
                    // The client left without waiting: the backend may be just writing a result.
                    (None, Some(_), Some(_)) => Some((delayed(other.gone_at?), What::Verbatim)),
                    (None, Some(_), None) if self.signs().unsettled => None,
                    (None, Some(_), None) => Some((other_since?, What::Verbatim)),
                    // It broke a rule: everything that was forwarded before is answered first.
                    (None, None, Some(Gone::Broke(_))) => Some((other.gone_at?, own(Code::GOING_AWAY))),
                    (None, None, Some(_)) => {
                        let code = configured(config.client_lost_code, Code::GOING_AWAY);
                        Some((delayed(other.gone_at?), code))
                    }
                    (None, None, None) => None,
                }
            }
            Side::Client => {
                if leg.gone == Some(Gone::Silent) {
                    return Some((leg.gone_at?, own(Code::GOING_AWAY)));
                }
                let ours = match (self.signs().leave, leg.gone) {
                    (_, Some(Gone::Broke(violation))) => Some(blame(violation)),
                    (Some((_, close)), _) => Some(What::Own(close)),
                    _ => None,
                };
                if let Some(ours) = ours {
                    if let (Some((at, _)), Some((_, Cause::Slow, _))) = (self.signs().leave, self.signs().first) {
                        // There is more on its way already than it takes.
                        return Some((at, ours));
                    }
                    // The backend's last frames go first: up to its Close or end.
                    return match other.since {
                        Some(at) => Some((at, ours)),
                        None if other.cut => Some((leg.since.or(other_unanswered)?, ours)),
                        None => Some((other_unanswered?, ours)),
                    };
                }
                match (other.close, other.gone, leg.close) {
                    (Some(_), _, _) => Some((other_since?, What::Verbatim)),
                    (None, Some(Gone::Broke(_)), _) => {
                        Some((other.gone_at?, configured(config.backend_error_code, Code::INTERNAL)))
                    }
                    // It asked for an end and gets one, although the backend owes the answer.
                    (None, Some(_), Some(close)) => Some((other.gone_at?, echo_of(close))),
                    (None, Some(_), None) => {
                        Some((other.gone_at?, configured(config.backend_lost_code, Code::RESTART)))
                    }
                    (None, None, Some(close)) => Some((other_unanswered?, echo_of(close))),
                    // Half-closed without a Close, and the backend does not answer ours.
                    (None, None, None) if leg.gone.is_some() => Some((other_unanswered?, own(Code::GOING_AWAY))),
                    (None, None, None) => None,
                }
            }
        }
    }

    /// When the answer to the Close that this side got is no longer waited for.
    fn answer_due(&self, side: Side, config: &Config, views: [View; 2]) -> Option<Stamp> {
        let flushed_at = self.leg(side).flushed_at?;
        // While the other one did not take what this one had sent, this one was not read, and its answer may lie there;
        // and inside a frame that goes on it can't answer.
        let toward_other = views[side.other() as usize];
        let is_between = toward_other.flushed && toward_other.boundary;
        let read_since = if is_between { toward_other.unblocked } else { toward_other.progress };
        let due = flushed_at.max(read_since) + config.close_handshake_timeout;
        Some(due.min(flushed_at + config.close_handshake_timeout + config.write_timeout))
    }

    /// When this side's leg is to be ended; `None`: not before something else happens.
    fn fin_due(&self, side: Side, config: &Config, views: [View; 2], now: Stamp) -> Option<Stamp> {
        let leg = self.leg(side);
        let view = views[side as usize];
        match (leg.told, leg.gone) {
            (Told::Fin, _) => None,
            (_, Some(Gone::Reset | Gone::Stalled)) => Some(now),
            // A backend's FIN says that it reads nothing more either; a client may be waiting for its last data.
            (_, Some(Gone::Fin)) if side == Side::Backend => Some(now),
            // "FIN is the only honest end": its last frame stays incomplete.
            (Told::Nothing, _) if leg.cut && view.flushed => Some(now),
            (Told::Nothing | Told::Close, _) => None,
            (Told::Flushed, Some(_)) => Some(now),
            // "the server MUST close the connection immediately" after both Closes (RFC 6455 7.1.1).
            (Told::Flushed, None) if side == Side::Client && leg.close.is_some() => Some(now),
            (Told::Flushed, None) if side == Side::Backend && leg.close.is_some() && self.signs().is_forgotten => {
                Some(now)
            }
            // Without the peer's Close; or with the backend's, where we are the client and wait for its FIN.
            (Told::Flushed, None) => {
                self.answer_due(side, config, views).max(leg.since.map(|at| at + config.close_handshake_timeout))
            }
        }
    }
}
