//! The close table on a virtual clock: row by row, and under random events.
//!
//! A [`Scene`] stands in for the relay around [`Ending`]: it tells and asks in the same order, and its sockets are two
//! flags. Time moves only from event to event and to the moments that `Ending` asks for.

use std::time::Duration;

use proptest::{collection::vec, prelude::*};

use super::*;
use Side::{Backend, Client};

/// `close.delay`, in milliseconds.
const DELAY: u64 = 100;

/// `close.handshake_timeout`, in milliseconds.
const ANSWER: u64 = 2_000;

/// `write_timeout`, in milliseconds.
const STALL: u64 = 30_000;

fn config() -> Config {
    Config {
        max_message: 1 << 20,
        max_frame: 1 << 20,
        max_control_rate: 0,
        hold_frame: 16 << 10,
        splice_from: None,
        hold_timeout: Duration::from_secs(5),
        ping_interval: Duration::from_secs(30),
        pong_timeout: Duration::from_secs(10),
        write_timeout: Duration::from_millis(STALL),
        max_age: None,
        max_age_jitter: 0,
        idle_timeout: None,
        close_delay: Duration::from_millis(DELAY),
        close_handshake_timeout: Duration::from_millis(ANSWER),
        client_lost_code: 1001,
        backend_lost_code: 1012,
        backend_error_code: 1014,
    }
}

/// Something that the relay hears or sees.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Event {
    /// A Close frame of this side, with its code.
    Close(Side, Option<u16>),
    /// The same with its FIN right behind it.
    CloseAndFin(Side, Option<u16>),
    Fin(Side),
    Reset(Side),
    /// Its Pong did not come.
    Silent(Side),
    /// What waited for it waited for too long.
    Stalled(Side),
    Broke(Side, Violation),
    Drain,
    /// A small frame of this side.
    Frame(Side),
    /// The beginning of a frame that is passed on as it comes.
    Begins(Side),
    /// More of it.
    Goes(Side),
    /// The rest of it.
    Ends(Side),
    /// From now on this side takes no bytes.
    Block(Side),
    /// It takes some of those that wait, but not all.
    Trickle(Side),
    /// It takes all again.
    Unblock(Side),
    /// Nothing: the relay's task was woken for another reason.
    Woken,
}

/// What a side is told.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Told {
    /// The other side's Close, as it was.
    Verbatim,
    /// A Close of ours with this code, if any.
    Own(Option<u16>),
    Fin,
}

/// The bytes toward one side.
#[derive(Debug, Clone, Copy)]
struct Toward {
    boundary: bool,
    blocked: bool,
    pending: bool,
    progress: Stamp,
    unblocked: Stamp,
}

struct Scene {
    config: Config,
    ending: Ending,
    start: Stamp,
    now: Stamp,
    toward: [Toward; 2],
    /// This side is inside a frame that is not held.
    mid_frame: [bool; 2],
    /// Nothing more can be read from it.
    read_done: [bool; 2],
    let_go: [bool; 2],
    /// In this turn: it was sent its Close, and whether a FIN was to follow at once.
    closed: [Option<bool>; 2],
    wake: Option<Stamp>,
    said: Vec<(u64, Side, Told)>,
    /// When a write last went on, or a frame that stood in the way of a Close ended.
    progress: Option<Stamp>,
}

impl Scene {
    fn new(ending: Ending) -> Self {
        let start = Stamp::now();
        let toward = Toward { boundary: true, blocked: false, pending: false, progress: start, unblocked: start };
        Self {
            config: config(),
            ending,
            start,
            now: start,
            toward: [toward; 2],
            mid_frame: [false; 2],
            read_done: [false; 2],
            let_go: [false; 2],
            closed: [None; 2],
            wake: None,
            said: Vec::new(),
            progress: None,
        }
    }

    /// Plays `events`, each at its millisecond, and then waits until both legs have ended, if an end has begun.
    fn play(events: &[(u64, Event)]) -> Self {
        Self::play_on(Ending::new(false), events)
    }

    fn play_on(ending: Ending, events: &[(u64, Event)]) -> Self {
        let mut scene = Self::new(ending);
        for (at, event) in events {
            let at = scene.start + Duration::from_millis(*at);
            scene.wait_until(Some(at));
            scene.now = at;
            scene.hear(*event);
            scene.turn();
        }
        scene.wait_until(None);
        scene
    }

    /// Follows the timer up to `until`, or to its end.
    fn wait_until(&mut self, until: Option<Stamp>) {
        while let Some(wake) = self.wake.filter(|wake| until.is_none_or(|until| *wake < until)) {
            self.now = wake;
            self.turn();
        }
    }

    fn is_over(&self) -> bool {
        self.let_go == [true; 2]
    }

    fn millis(&self) -> u64 {
        u64::try_from((self.now - self.start).as_millis()).unwrap()
    }

    /// The relay reads from this side, rather than letting it wait for the other one.
    fn reads(&self, side: Side) -> bool {
        let waits = self.toward[side.other() as usize].pending && self.ending.forwards(side);
        !self.read_done[side as usize] && !self.let_go[side as usize] && !waits
    }

    /// It reads, and the bytes still mean something.
    fn listens(&self, side: Side) -> bool {
        self.reads(side) && self.ending.listens(side)
    }

    fn hear(&mut self, event: Event) {
        let now = self.now;
        match event {
            Event::Close(side, code) => {
                if self.listens(side) && !self.mid_frame[side as usize] {
                    self.ending.heard_close(side, code, now);
                }
            }
            Event::CloseAndFin(side, code) => {
                self.hear(Event::Close(side, code));
                self.hear(Event::Fin(side));
            }
            Event::Fin(side) | Event::Reset(side) => {
                // After a FIN only a reset can come.
                let can_reset = matches!(event, Event::Reset(_)) && !self.let_go[side as usize];
                if self.reads(side) || can_reset {
                    let how = if can_reset { Gone::Reset } else { Gone::Fin };
                    let inside_frame = !self.toward[side.other() as usize].boundary;
                    self.read_done[side as usize] = true;
                    self.ending.heard_gone(side, how, inside_frame, now);
                }
            }
            Event::Silent(side) => {
                if !self.ending.has_begun() && self.reads(side) {
                    let inside_frame = !self.toward[side.other() as usize].boundary;
                    self.ending.heard_gone(side, Gone::Silent, inside_frame, now);
                }
            }
            Event::Stalled(side) => {
                if !self.ending.has_begun() && self.toward[side as usize].pending {
                    self.ending.stalled(side, true, now);
                }
            }
            Event::Broke(side, violation) => {
                if self.listens(side) && !self.mid_frame[side as usize] {
                    self.ending.heard_gone(side, Gone::Broke(violation), false, now);
                }
            }
            Event::Drain => self.ending.leave(CloseFrame::new(Code::GOING_AWAY, "bye"), Cause::Drain, now),
            Event::Frame(side) => {
                if self.listens(side) && !self.mid_frame[side as usize] && self.ending.forwards(side) {
                    self.write(side.other());
                }
            }
            Event::Begins(side) => {
                if self.listens(side) && !self.mid_frame[side as usize] {
                    self.mid_frame[side as usize] = true;
                    if self.ending.forwards(side) {
                        self.toward[side.other() as usize].boundary = false;
                        self.write(side.other());
                    }
                }
            }
            Event::Goes(side) => {
                let forwards = self.ending.forwards(side);
                if self.listens(side) && self.mid_frame[side as usize] && forwards {
                    self.write(side.other());
                }
            }
            Event::Ends(side) => {
                if self.listens(side) && self.mid_frame[side as usize] {
                    self.mid_frame[side as usize] = false;
                    if !self.toward[side.other() as usize].boundary {
                        self.progress = Some(now);
                        self.toward[side.other() as usize].boundary = true;
                        self.toward[side.other() as usize].unblocked = now;
                    }
                    if self.ending.forwards(side) {
                        self.write(side.other());
                    }
                }
            }
            Event::Block(side) => self.toward[side as usize].blocked = true,
            Event::Unblock(side) => self.toward[side as usize].blocked = false,
            Event::Trickle(side) => {
                if self.toward[side as usize].pending && self.ending.can_write(side) {
                    self.toward[side as usize].progress = now;
                    self.progress = Some(now);
                }
            }
            Event::Woken => {}
        }
    }

    fn write(&mut self, side: Side) {
        let toward = &mut self.toward[side as usize];
        if self.ending.can_write(side) && !toward.pending {
            // Taken at once, or first had to wait.
            toward.pending = toward.blocked;
            toward.progress = self.now;
            if !toward.blocked {
                self.progress = Some(self.now);
            }
        }
    }

    /// One turn of the relay's task, with the turn of the runtime that it grants a client's FIN behind its Close.
    fn turn(&mut self) {
        self.poll();
        if self.ending.is_unsettled() {
            self.ending.settle();
            self.poll();
        }
    }

    fn poll(&mut self) {
        self.closed = [None; 2];
        for _ in 0..20 {
            for side in Side::BOTH {
                let toward = &mut self.toward[side as usize];
                if !toward.pending {
                    continue;
                }
                if !self.ending.can_write(side) {
                    toward.pending = false;
                } else if !toward.blocked {
                    toward.pending = false;
                    (toward.progress, toward.unblocked) = (self.now, self.now);
                    self.progress = Some(self.now);
                }
            }
            let views = self.toward.map(|toward| View {
                boundary: toward.boundary,
                flushed: !toward.pending,
                progress: toward.progress,
                unblocked: toward.unblocked,
            });
            match self.ending.next(&self.config, views, self.now) {
                Ok(Act::Close(side, what)) => self.close(side, what),
                Ok(Act::Fin(side)) => {
                    assert!(!self.let_go[side as usize], "a second FIN for the {}", side.as_str());
                    // What this side had begun is never finished; [`Scene::close`] goes by the machine's own word for it.
                    let inside_frame = !std::mem::replace(&mut self.toward[side.other() as usize].boundary, true);
                    self.ending.let_go(side, inside_frame, self.now);
                    self.let_go[side as usize] = true;
                    self.toward[side as usize].pending = false;
                    self.said.push((self.millis(), side, Told::Fin));
                }
                Err(wake) => {
                    assert!(wake.is_none_or(|wake| wake > self.now), "a timer that is due already");
                    self.assert_fin_follows();
                    let goes_on = self.ending.has_begun() && !self.is_over() && !self.ending.is_unsettled();
                    assert!(wake.is_some() || !goes_on, "waits for ever: {:?}", self.ending);
                    self.wake = wake.filter(|_| goes_on);
                    return;
                }
            }
        }
        panic!("does not come to rest: {:?}", self.ending);
    }

    /// The kernel keeps a Close back for the FIN that is said to follow at once. It did, if the Close was taken; and no other at the client, but
    /// where time was up in the same turn.
    fn assert_fin_follows(&self) {
        for side in Side::BOTH {
            let Some(follows) = self.closed[side as usize].filter(|_| !self.toward[side as usize].pending) else {
                continue;
            };
            let is_there = self.let_go[side as usize];
            let may_come_unsaid = side == Backend || self.ending.leg(side).gone == Some(Gone::Stalled);
            assert!(follows == is_there || !follows && may_come_unsaid, "{}: {:?}", side.as_str(), self.ending);
        }
    }

    /// What may be sent when, whatever happened before.
    fn close(&mut self, side: Side, what: What) {
        let toward = self.toward[side as usize];
        assert!(toward.boundary, "a Close inside a frame");
        assert!(!self.let_go[side as usize], "a Close after FIN");
        assert!(self.said.iter().all(|(_, told, _)| *told != side), "a second Close for the {}", side.as_str());
        assert!(!self.ending.was_cut(side), "a Close after half a frame");
        let gone = self.ending.gone(side);
        assert!(!matches!(gone, Some(Gone::Reset | Gone::Stalled)), "a Close for somebody who is {gone:?}");
        assert!(side == Client || gone != Some(Gone::Fin), "a Close for a backend that has left");
        let (told, code) = match what {
            What::Verbatim => {
                assert!(self.ending.heard_close_of(side.other()), "a frame that never came");
                (Told::Verbatim, self.ending.close_code_of(side.other()))
            }
            What::Own(close) => (Told::Own(close.code()), close.code()),
        };
        assert!(code.is_none_or(|code| Code::new(code).is_some()), "{code:?} on the wire");
        self.said.push((self.millis(), side, told));
        self.closed[side as usize] = Some(self.ending.ends_with_close(side));
        self.write(side);
        self.ending.sent_close(side, code);
    }

    fn said_to(&self, side: Side) -> impl Iterator<Item = (u64, Told)> {
        self.said.iter().filter(move |(_, to, _)| *to == side).map(|(at, _, told)| (*at, *told))
    }
}

fn side() -> impl Strategy<Value = Side> {
    prop_oneof![Just(Client), Just(Backend)]
}

fn event() -> impl Strategy<Value = Event> {
    let code = prop_oneof![Just(None), Just(Some(1000)), Just(Some(1001)), (3000..=4999_u16).prop_map(Some)];
    let violation = prop_oneof![Just(Violation::Masked), Just(Violation::FrameTooBig), Just(Violation::Close)];
    (0..26_u8, side(), code, violation).prop_map(|(kind, side, code, violation)| match kind {
        0..=2 => Event::Close(side, code),
        3 => Event::CloseAndFin(side, code),
        4 | 5 => Event::Fin(side),
        6 => Event::Reset(side),
        7 => Event::Silent(side),
        8 => Event::Stalled(side),
        9 => Event::Broke(side, violation),
        10 | 11 => Event::Drain,
        12 | 13 => Event::Frame(side),
        14..=16 => Event::Begins(side),
        17 | 18 => Event::Ends(side),
        19 | 20 => Event::Block(side),
        21 => Event::Trickle(side),
        22 => Event::Unblock(side),
        23 | 24 => Event::Goes(side),
        _ => Event::Woken,
    })
}

/// Events at intervals around the timers' lengths.
fn events() -> impl Strategy<Value = Vec<(u64, Event)>> {
    let pause = prop_oneof![4 => Just(0), 4 => 1..60_u64, 2 => 60..300_u64, 2 => 300..2_500_u64, 1 => Just(DELAY),
        1 => Just(ANSWER)];
    vec((pause, event()), 1..20).prop_map(|events| {
        let mut now = 0;
        let at = |(pause, event)| {
            now += pause;
            (now, event)
        };
        events.into_iter().map(at).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    /// Whatever happens, an end that has begun comes to an end, by a rule and in time:
    ///
    /// - each side gets FIN exactly once, and at most one Close, before it and at a frame boundary ([`Scene::close`]);
    /// - a side gets FIN without a Close only when its own RST came, when it took nothing for the write timeout,
    ///   when the other side left it half a frame, or when it is a backend whose FIN came before;
    /// - both have their FIN at the latest one delay and two stalls and handshake timeouts after the first sign of the
    ///   end, or after the last byte that a side took or the end of a large frame, whichever is later.
    #[test]
    fn every_end_comes_to_an_end(events in events()) {
        let scene = Scene::play(&events);
        let Some((_, _, first)) = scene.ending.first() else {
            prop_assert!(scene.said.is_empty());
            return Ok(());
        };
        prop_assert!(scene.is_over());
        for side in Side::BOTH {
            let said: Vec<_> = scene.said_to(side).collect();
            prop_assert_eq!(said.iter().filter(|(_, told)| *told == Told::Fin).count(), 1);
            prop_assert_eq!(said.last().map(|(_, told)| *told), Some(Told::Fin));
            let gone = scene.ending.gone(side);
            let excused = matches!(gone, Some(Gone::Reset | Gone::Stalled))
                || (side == Backend && gone == Some(Gone::Fin))
                || scene.ending.was_cut(side);
            let stalled = gone == Some(Gone::Stalled);
            prop_assert!(scene.ending.told_close(side) == (said.len() == 2) || stalled);
            prop_assert!(said.len() == 2 || excused, "no Close for the {}: {:?}", side.as_str(), scene.ending);
        }
        let last = scene.said.last().expect("two FINs").0;
        let from = u64::try_from((first.max(scene.progress.unwrap_or(first)) - scene.start).as_millis()).unwrap();
        prop_assert!(last <= from + DELAY + 2 * (ANSWER + STALL), "from {from} to {last}");
    }

    /// A side that goes on and on with a frame is not waited for without end: when nobody is slow to take what is sent,
    /// both have their FIN in a time that is counted from the first sign of the end alone.
    #[test]
    fn a_slow_source_is_bounded(events in events()) {
        let begin = [(0, Event::Begins(Client)), (0, Event::Begins(Backend))];
        let events: Vec<_> = events
            .into_iter()
            .filter(|(_, event)| !matches!(event, Event::Block(_)))
            // Bytes of a large frame all the time, more often than any timer.
            .chain((0..200).flat_map(|second| Side::BOTH.map(|side| (second * 1_000, Event::Goes(side)))))
            .collect();
        let mut events = [&begin[..], &events].concat();
        events.sort_by_key(|(at, _)| *at);
        let scene = Scene::play(&events);
        if let Some((_, _, first)) = scene.ending.first() {
            let took = scene.start + Duration::from_millis(scene.said[scene.said.len() - 1].0) - first;
            prop_assert!(took <= Duration::from_millis(DELAY + 2 * (ANSWER + STALL)), "{took:?}");
        }
    }

    /// When everybody takes what is sent and finishes its frames, only a reset, or a backend's own FIN, keeps a side
    /// from its Close.
    #[test]
    fn without_stalls_every_side_gets_its_close(events in events()) {
        let events: Vec<_> = events
            .into_iter()
            .filter(|(_, event)| !matches!(event, Event::Block(_) | Event::Begins(_) | Event::Silent(_)))
            .collect();
        let scene = Scene::play(&events);
        for side in Side::BOTH.into_iter().filter(|_| scene.ending.has_begun()) {
            let gone = scene.ending.gone(side);
            prop_assert!(!scene.ending.was_cut(side) && gone != Some(Gone::Stalled));
            let left = gone == Some(Gone::Reset) || (side == Backend && gone == Some(Gone::Fin));
            prop_assert!(scene.ending.told_close(side) || left);
        }
        // Then it does not take long either: nobody is waited for twice.
        if let Some((_, _, first)) = scene.ending.first() {
            let took = scene.start + Duration::from_millis(scene.said[scene.said.len() - 1].0) - first;
            prop_assert!(took <= Duration::from_millis(DELAY + 2 * ANSWER), "{took:?}");
        }
    }

    /// Being asked more often changes nothing.
    #[test]
    fn questions_change_nothing(events in events(), questions in vec(0..12_000_u64, 1..20)) {
        let mut asked: Vec<_> = events.iter().copied().chain(questions.iter().map(|at| (*at, Event::Woken))).collect();
        asked.sort_by_key(|(at, _)| *at);
        prop_assert_eq!(Scene::play(&events).said, Scene::play(&asked).said);
    }

    /// `close.delay` and `close.handshake_timeout` are kept from below as well. A backend that says nothing is told of
    /// a client that left without waiting exactly the delay later, or with a drain, and of one that waits at once; and nobody is
    /// answered for a side that may still answer itself.
    #[test]
    fn nobody_is_hurried(events in events()) {
        let scene = Scene::play(&events);
        let Some((_, cause, first)) = scene.ending.first() else { return Ok(()) };
        let first = u64::try_from((first - scene.start).as_millis()).unwrap();
        let close_at = |side| scene.said_to(side).find(|(_, told)| *told != Told::Fin);
        let backend_spoke = scene.ending.heard_close_of(Backend) || scene.ending.gone(Backend).is_some();
        if let (Cause::Gone(Client, Gone::Fin | Gone::Reset | Gone::Silent), Some((at, _)), false) =
            (cause, close_at(Backend), backend_spoke)
        {
            let drained = events.iter().find(|(at, event)| *event == Event::Drain && *at >= first).map(|(at, _)| *at);
            prop_assert!(at >= drained.unwrap_or(u64::MAX).min(first + DELAY));
        }
        // A Close of ours in answer to a side's own.
        for side in Side::BOTH.into_iter().filter(|side| scene.ending.heard_close_of(*side)) {
            let other_gone = scene.ending.gone(side.other()).is_some();
            let began_it = matches!(cause, Cause::Close) && !scene.ending.heard_close_of(side.other());
            if let (Some((at, Told::Own(_))), true, false) = (close_at(side), began_it, other_gone) {
                prop_assert!(at >= first + ANSWER, "answered for the other side after {}", at - first);
            }
        }
    }
}

/// One row: what happens, and what each side is told, in order, with the milliseconds of both.
fn row(events: &[(u64, Event)], expected: &[(u64, Side, Told)]) {
    row_on(Ending::new(false), events, expected);
}

fn row_on(ending: Ending, events: &[(u64, Event)], expected: &[(u64, Side, Told)]) {
    let scene = Scene::play_on(ending, events);
    assert_eq!(scene.said, expected, "after {events:?}");
    assert!(scene.is_over());
}

const C1000: Option<u16> = Some(1000);

/// "client sends Close and waits": the backend has it at once, and the client the backend's answer; the client is let
/// go first, the backend with its FIN.
#[test]
fn a_client_closes_and_waits() {
    row(
        &[(0, Event::Close(Client, C1000)), (30, Event::Close(Backend, C1000)), (40, Event::Fin(Backend))],
        &[
            (0, Backend, Told::Verbatim),
            (30, Client, Told::Verbatim),
            (30, Client, Told::Fin),
            (40, Backend, Told::Fin),
        ],
    );
    // What the backend says is passed on, whatever its code; and without its FIN it is waited for.
    row(
        &[(0, Event::Close(Client, C1000)), (30, Event::Close(Backend, Some(4000)))],
        &[
            (0, Backend, Told::Verbatim),
            (30, Client, Told::Verbatim),
            (30, Client, Told::Fin),
            (30 + ANSWER, Backend, Told::Fin),
        ],
    );
    // One whose FIN does not come is not waited for, once it has said its Close.
    row_on(
        Ending::new(true),
        &[(0, Event::Close(Client, C1000)), (30, Event::Close(Backend, C1000))],
        &[
            (0, Backend, Told::Verbatim),
            (30, Client, Told::Verbatim),
            (30, Client, Told::Fin),
            (30, Backend, Told::Fin),
        ],
    );
}

/// The same, and the backend does not answer: the client gets an echo of its own code after the timeout, an empty one
/// for an empty Close.
#[test]
fn a_client_closes_and_the_backend_does_not_answer() {
    for code in [C1000, Some(4999), None] {
        row(
            &[(0, Event::Close(Client, code)), (50, Event::Frame(Backend))],
            &[
                (0, Backend, Told::Verbatim),
                (ANSWER, Client, Told::Own(code)),
                (ANSWER, Client, Told::Fin),
                (ANSWER, Backend, Told::Fin),
            ],
        );
    }
    // Or it leaves instead.
    for event in [Event::Fin(Backend), Event::Reset(Backend)] {
        row(
            &[(0, Event::Close(Client, C1000)), (50, event)],
            &[
                (0, Backend, Told::Verbatim),
                (50, Client, Told::Own(C1000)),
                (50, Client, Told::Fin),
                (50, Backend, Told::Fin),
            ],
        );
    }
}

/// "client sends Close and FIN at once": the backend gets it after the delay, or as soon as it ends by itself.
#[test]
fn a_client_closes_and_leaves() {
    row(
        &[(0, Event::CloseAndFin(Client, C1000)), (DELAY + 30, Event::Close(Backend, C1000))],
        &[
            (DELAY, Backend, Told::Verbatim),
            (DELAY + 30, Client, Told::Verbatim),
            (DELAY + 30, Client, Told::Fin),
            (DELAY + 30 + ANSWER, Backend, Told::Fin),
        ],
    );
    row(
        &[(0, Event::CloseAndFin(Client, C1000)), (30, Event::Close(Backend, Some(1001))), (60, Event::Fin(Backend))],
        &[
            (30, Client, Told::Verbatim),
            (30, Client, Told::Fin),
            (30, Backend, Told::Verbatim),
            (60, Backend, Told::Fin),
        ],
    );
    // The client's own answer is owed also when the backend says nothing.
    row(
        &[(0, Event::CloseAndFin(Client, C1000))],
        &[
            (DELAY, Backend, Told::Verbatim),
            (DELAY + ANSWER, Client, Told::Own(C1000)),
            (DELAY + ANSWER, Client, Told::Fin),
            (DELAY + ANSWER, Backend, Told::Fin),
        ],
    );
}

/// "FIN alone": 1001 for the backend after the delay; what it still says goes to the client, and so does its Close.
#[test]
fn a_client_leaves_without_a_word() {
    row(
        &[(0, Event::Fin(Client)), (50, Event::Frame(Backend)), (DELAY + 20, Event::Close(Backend, Some(1001)))],
        &[
            (DELAY, Backend, Told::Own(Some(1001))),
            (DELAY + 20, Client, Told::Verbatim),
            (DELAY + 20, Client, Told::Fin),
            (DELAY + 20 + ANSWER, Backend, Told::Fin),
        ],
    );
    row(
        &[(0, Event::Fin(Client))],
        &[
            (DELAY, Backend, Told::Own(Some(1001))),
            (DELAY + ANSWER, Client, Told::Own(Some(1001))),
            (DELAY + ANSWER, Client, Told::Fin),
            (DELAY + ANSWER, Backend, Told::Fin),
        ],
    );
}

/// A client that has left is no reason to hold up a drain, or to be cut by its end: its moment is the end of the delay.
#[test]
fn a_drain_ends_the_delay() {
    for (left, to_backend) in
        [(Event::Fin(Client), Told::Own(Some(1001))), (Event::CloseAndFin(Client, C1000), Told::Verbatim)]
    {
        row(
            &[(0, left), (40, Event::Drain), (60, Event::CloseAndFin(Backend, C1000))],
            &[
                (40, Backend, to_backend),
                (60, Client, Told::Verbatim),
                (60, Client, Told::Fin),
                (60, Backend, Told::Fin),
            ],
        );
    }
    row(
        &[(0, Event::Reset(Client)), (40, Event::Drain), (60, Event::CloseAndFin(Backend, C1000))],
        &[(0, Client, Told::Fin), (40, Backend, Told::Own(Some(1001))), (60, Backend, Told::Fin)],
    );
}

/// "client RST": nothing for it, 1001 for the backend after the delay.
#[test]
fn a_client_is_reset() {
    row(
        &[
            (0, Event::Reset(Client)),
            (DELAY + 20, Event::Close(Backend, Some(1001))),
            (DELAY + 30, Event::Fin(Backend)),
        ],
        &[(0, Client, Told::Fin), (DELAY, Backend, Told::Own(Some(1001))), (DELAY + 30, Backend, Told::Fin)],
    );
}

/// "silent past the ping timeout": 1001 and FIN for the client, in case it hears them; 1001 for the backend after the
/// delay.
#[test]
fn a_client_is_silent() {
    row(
        &[(0, Event::Silent(Client)), (DELAY + 20, Event::Close(Backend, Some(1001)))],
        &[
            (0, Client, Told::Own(Some(1001))),
            (0, Client, Told::Fin),
            (DELAY, Backend, Told::Own(Some(1001))),
            (DELAY + 20 + ANSWER, Backend, Told::Fin),
        ],
    );
}

/// "backend sends Close": verbatim, and its reply is awaited and passed on; what the backend gets after the timeout is
/// an echo of its own code.
#[test]
fn a_backend_closes() {
    row(
        &[(0, Event::Close(Backend, Some(1001))), (30, Event::Close(Client, C1000)), (50, Event::Fin(Backend))],
        &[
            (0, Client, Told::Verbatim),
            (30, Client, Told::Fin),
            (30, Backend, Told::Verbatim),
            (50, Backend, Told::Fin),
        ],
    );
    row(
        &[(0, Event::Close(Backend, Some(1001)))],
        &[
            (0, Client, Told::Verbatim),
            (ANSWER, Client, Told::Fin),
            (ANSWER, Backend, Told::Own(Some(1001))),
            (2 * ANSWER, Backend, Told::Fin),
        ],
    );
    // The client answers by leaving.
    row(
        &[(0, Event::Close(Backend, None)), (30, Event::Fin(Client)), (40, Event::Fin(Backend))],
        &[
            (0, Client, Told::Verbatim),
            (30, Client, Told::Fin),
            (30, Backend, Told::Own(None)),
            (40, Backend, Told::Fin),
        ],
    );
}

/// "with FIN at once": nothing is owed to the backend; the client still has its time to answer.
#[test]
fn a_backend_closes_and_leaves() {
    row(
        &[(0, Event::CloseAndFin(Backend, C1000)), (30, Event::Close(Client, C1000))],
        &[(0, Client, Told::Verbatim), (0, Backend, Told::Fin), (30, Client, Told::Fin)],
    );
    row(
        &[(0, Event::CloseAndFin(Backend, C1000))],
        &[(0, Client, Told::Verbatim), (0, Backend, Told::Fin), (ANSWER, Client, Told::Fin)],
    );
}

/// "backend FIN/RST/killed without Close": 1012 for the client, and its answer is waited for.
#[test]
fn a_backend_dies() {
    for event in [Event::Fin(Backend), Event::Reset(Backend)] {
        row(
            &[(0, event), (30, Event::Close(Client, Some(1012)))],
            &[(0, Client, Told::Own(Some(1012))), (0, Backend, Told::Fin), (30, Client, Told::Fin)],
        );
    }
}

/// "backend silent past the ping timeout": 1012 for the client; Close, then FIN, for the backend.
#[test]
fn a_backend_is_silent() {
    row(
        &[(0, Event::Silent(Backend)), (30, Event::Close(Client, Some(1012)))],
        &[
            (0, Client, Told::Own(Some(1012))),
            (0, Backend, Told::Own(Some(1001))),
            (0, Backend, Told::Fin),
            (30, Client, Told::Fin),
        ],
    );
}

/// "drain": 1001 upstream first; the backend's last frames, up to its Close; then the client's Close. What the client
/// sends meanwhile is not passed on.
#[test]
fn a_drain_goes_upstream_first() {
    let events = [
        (0, Event::Drain),
        (10, Event::Frame(Backend)),
        (30, Event::Close(Backend, Some(1001))),
        (40, Event::Fin(Backend)),
        (50, Event::Close(Client, Some(1001))),
    ];
    row(
        &events,
        &[
            (0, Backend, Told::Own(Some(1001))),
            (30, Client, Told::Own(Some(1001))),
            (40, Backend, Told::Fin),
            (50, Client, Told::Fin),
        ],
    );
    let mut scene = Scene::new(Ending::new(false));
    scene.hear(Event::Drain);
    scene.turn();
    assert!(!scene.ending.forwards(Client), "a request would be processed without an answer");
    assert!(scene.ending.forwards(Backend));
    // A backend that does not answer, and a client that does not either.
    row(
        &[(0, Event::Drain)],
        &[
            (0, Backend, Told::Own(Some(1001))),
            (ANSWER, Client, Told::Own(Some(1001))),
            (ANSWER, Backend, Told::Fin),
            (2 * ANSWER, Client, Told::Fin),
        ],
    );
    // A second order changes nothing.
    row(
        &[(0, Event::Close(Client, C1000)), (1, Event::Drain), (30, Event::CloseAndFin(Backend, C1000))],
        &[
            (0, Backend, Told::Verbatim),
            (30, Client, Told::Verbatim),
            (30, Client, Told::Fin),
            (30, Backend, Told::Fin),
        ],
    );
}

/// A drain inside a large frame of the client: the frame is finished first.
#[test]
fn a_drain_waits_for_the_end_of_a_frame() {
    row(
        &[
            (0, Event::Begins(Client)),
            (10, Event::Drain),
            (500, Event::Ends(Client)),
            (510, Event::CloseAndFin(Backend, Some(1001))),
            (520, Event::Close(Client, Some(1001))),
        ],
        &[
            (500, Backend, Told::Own(Some(1001))),
            (510, Client, Told::Own(Some(1001))),
            (510, Backend, Told::Fin),
            (520, Client, Told::Fin),
        ],
    );
}

/// The same with a frame that does not end: FIN is all that the backend can get, and the client still gets its Close.
#[test]
fn a_drain_does_not_wait_for_ever_for_the_end_of_a_frame() {
    row(
        &[(0, Event::Begins(Client)), (10, Event::Drain)],
        &[
            (10 + ANSWER, Backend, Told::Fin),
            (10 + ANSWER, Client, Told::Own(Some(1001))),
            (10 + 2 * ANSWER, Client, Told::Fin),
        ],
    );
    row(
        &[(0, Event::Begins(Backend)), (10, Event::Drain)],
        &[(10, Backend, Told::Own(Some(1001))), (10 + ANSWER, Backend, Told::Fin), (10 + ANSWER, Client, Told::Fin)],
    );
}

/// A backend that goes on sending a large frame is heard out, although its answer is late; only one that stops inside
/// is not, and one that never ends.
#[test]
fn a_large_frame_that_goes_on_is_finished() {
    let goes = |from: u64, until: u64| (from..until).map(|second| (second * 1_000, Event::Goes(Backend)));
    for (first, to_backend) in [
        (Event::Close(Client, C1000), Told::Verbatim),
        (Event::Drain, Told::Own(Some(1001))),
        (Event::Broke(Client, Violation::Masked), Told::Own(Some(1001))),
    ] {
        let begin = [(0, Event::Begins(Backend)), (10, first)];
        let end = [(10_000, Event::Ends(Backend)), (10_010, Event::CloseAndFin(Backend, C1000))];
        let scene = Scene::play(&begin.into_iter().chain(goes(1, 10)).chain(end).collect::<Vec<_>>());
        assert_eq!(scene.said[0], (10, Backend, to_backend), "{first:?}");
        assert!(scene.ending.told_close(Client) && !scene.ending.was_cut(Client), "{first:?}");
        assert_eq!(scene.said_to(Client).next().map(|(at, _)| at), Some(10_010), "{first:?}");
        // It stops inside.
        let scene = Scene::play(&begin.into_iter().chain(goes(1, 10)).collect::<Vec<_>>());
        assert_eq!(scene.said_to(Client).collect::<Vec<_>>(), [(9_000 + ANSWER, Told::Fin)], "{first:?}");
        // It never ends.
        let scene = Scene::play(&begin.into_iter().chain(goes(1, 200)).collect::<Vec<_>>());
        assert_eq!(scene.said_to(Client).collect::<Vec<_>>(), [(10 + ANSWER + STALL, Told::Fin)], "{first:?}");
    }
}

/// A drain inside a large frame of the client that goes on and on: it is waited for as long as for a slow reader.
#[test]
fn a_large_frame_that_never_ends_is_cut() {
    let goes = (1..200).map(|second| (second * 1_000, Event::Goes(Client)));
    let events: Vec<_> = [(0, Event::Begins(Client)), (10, Event::Drain)].into_iter().chain(goes).collect();
    row(
        &events,
        &[
            (10 + ANSWER + STALL, Backend, Told::Fin),
            (10 + ANSWER + STALL, Client, Told::Own(Some(1001))),
            (10 + 2 * ANSWER + STALL, Client, Told::Fin),
        ],
    );
}

/// "client breaks a limit or the protocol": what was forwarded before is answered, then its code; 1001 for the backend.
#[test]
fn a_client_breaks_a_rule() {
    for (violation, code) in [(Violation::Unmasked, 1002), (Violation::MessageTooBig, 1009)] {
        row(
            &[
                (0, Event::Frame(Client)),
                (10, Event::Broke(Client, violation)),
                (20, Event::Frame(Backend)),
                (30, Event::CloseAndFin(Backend, Some(1001))),
            ],
            &[
                (10, Backend, Told::Own(Some(1001))),
                (30, Client, Told::Own(Some(code))),
                (30, Client, Told::Fin),
                (30, Backend, Told::Fin),
            ],
        );
    }
}

/// "backend breaks a limit or the protocol": 1014, as configured, for the client; its own code for the backend.
#[test]
fn a_backend_breaks_a_rule() {
    for (violation, code) in [(Violation::Masked, 1002), (Violation::FrameTooBig, 1009)] {
        row(
            &[(0, Event::Broke(Backend, violation)), (30, Event::Close(Client, Some(1014)))],
            &[
                (0, Client, Told::Own(Some(1014))),
                (0, Backend, Told::Own(Some(code))),
                (0, Backend, Told::Fin),
                (30, Client, Told::Fin),
            ],
        );
    }
}

/// "source dies inside a frame too large to hold back": FIN without a Close for the other side.
#[test]
fn a_source_dies_inside_a_large_frame() {
    for event in [Event::Fin(Backend), Event::Reset(Backend)] {
        row(&[(0, Event::Begins(Backend)), (10, event)], &[(10, Client, Told::Fin), (10, Backend, Told::Fin)]);
    }
    row(
        &[(0, Event::Begins(Client)), (10, Event::Reset(Client))],
        &[(10, Client, Told::Fin), (10, Backend, Told::Fin)],
    );
    // The client itself is still owed its Close, since it said only that it sends nothing more.
    let scene = Scene::play(&[(0, Event::Begins(Client)), (10, Event::Fin(Client))]);
    assert_eq!(scene.said_to(Backend).map(|(_, told)| told).collect::<Vec<_>>(), [Told::Fin]);
    assert_eq!(scene.said_to(Client).count(), 2);
}

/// "both send Close at once": each gets the other's, as the answer to its own.
#[test]
fn both_close_at_once() {
    let mut scene = Scene::new(Ending::new(false));
    scene.hear(Event::Close(Client, C1000));
    scene.hear(Event::Close(Backend, Some(1001)));
    scene.turn();
    assert_eq!(scene.said[..2], [(0, Client, Told::Verbatim), (0, Client, Told::Fin)]);
    assert_eq!(scene.said[2..], [(0, Backend, Told::Verbatim)]);
    scene.wait_until(None);
    assert_eq!(scene.said[3..], [(ANSWER, Backend, Told::Fin)]);
}

/// "a peer never answers our Close": FIN after the timeout, on either side.
#[test]
fn nobody_answers() {
    row(
        &[(0, Event::Fin(Backend))],
        &[(0, Client, Told::Own(Some(1012))), (0, Backend, Told::Fin), (ANSWER, Client, Told::Fin)],
    );
    row(
        &[(0, Event::Reset(Client))],
        &[(0, Client, Told::Fin), (DELAY, Backend, Told::Own(Some(1001))), (DELAY + ANSWER, Backend, Told::Fin)],
    );
}

/// A side that takes nothing gets FIN after the timeout, counted from the last byte it took.
#[test]
fn a_close_that_cannot_get_out_is_bounded() {
    row(
        &[
            (0, Event::Block(Client)),
            (10, Event::Frame(Backend)),
            (20, Event::Trickle(Client)),
            (30, Event::Drain),
            (40, Event::Trickle(Client)),
        ],
        &[
            (30, Backend, Told::Own(Some(1001))),
            (40 + ANSWER, Client, Told::Own(Some(1001))),
            (40 + ANSWER, Backend, Told::Fin),
            (40 + STALL, Client, Told::Fin),
        ],
    );
}
