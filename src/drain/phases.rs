//! The process's way to its end, as a machine without I/O: what happens goes in, what is to be done comes out.
//!
//! ```text
//! Running --drain, signal--> Delay --after drain.delay--> Window --nobody is served any more--> Lingering --all sockets closed--> Drained
//!    ^-------- undo ----------/
//! ```
//!
//! - **Delay**: goes on accepting, `drain.delay` long. Only here a drain can be undone.
//! - **Window**: listeners are closed, sessions end one by one, `drain.window` long; what is left when `drain.timeout` has
//!   passed after that is cut.
//! - **Lingering**: every client has its Close and our FIN; sockets wait for the peers' (`close.linger`).
//! - **Drained**: nothing is left. The process ends when a signal asked for that, else it waits for one: a sidecar that ended
//!   by itself would be started again.
//!
//! A process that another one replaced (`restart.rs`) drains without the delay, and ends by itself.
//!
//! The first signal drains, or lets a drain that was begun otherwise go on as it does. The second one ends every session now,
//! still with Close frames; the third does not wait for that.

use std::time::Duration;

use tokio::time::Instant;

use super::Config;

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Clients are served.
    Running,
    /// The same, but not for long.
    Delay,
    /// Sessions are ended.
    Window,
    /// Sockets are.
    Lingering,
    /// All are.
    Drained,
}

impl Phase {
    /// For people and programs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Delay => "delay",
            Self::Window => "window",
            Self::Lingering => "lingering",
            Self::Drained => "drained",
        }
    }
}

/// Where the process is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// The phase.
    pub phase: Phase,
    /// When it began.
    pub since: Instant,
    /// When it is over at the latest.
    pub until: Option<Instant>,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Close the listeners, tell the sessions.
    Begin,
    /// End every session now, still with a Close.
    Hurry,
    /// End what is left without waiting.
    Cut,
    /// End the process.
    Exit,
}

/// The machine.
#[derive(Debug)]
pub struct Phases {
    status: Status,
    config: Times,
    /// When what is left is cut.
    last: Option<Instant>,
    signals: u32,
    is_replaced: bool,
    is_hurried: bool,
    is_cut: bool,
}

/// How long each phase takes.
#[derive(Debug, Clone, Copy)]
struct Times {
    delay: Duration,
    window: Duration,
    timeout: Duration,
    /// What a session takes to end once it was told, with peers that answer nothing.
    ending: Duration,
}

impl Phases {
    /// Running. `ending`: the longest that a session takes to end once it was told, with peers that answer nothing.
    pub fn new(config: &Config, ending: Duration, now: Instant) -> Self {
        let config = Times { delay: config.delay, window: config.window, timeout: config.timeout, ending };
        let status = Status { phase: Phase::Running, since: now, until: None };
        Self { status, config, last: None, signals: 0, is_replaced: false, is_hurried: false, is_cut: false }
    }

    /// Other times for what is still to begin: a delay that has begun keeps its own, and so does a window.
    pub fn reconfigure(&mut self, config: &Config, ending: Duration) {
        if self.status.phase <= Phase::Delay {
            self.config = Times { delay: config.delay, window: config.window, timeout: config.timeout, ending };
        }
    }

    /// Where it is.
    pub fn status(&self) -> Status {
        self.status
    }

    /// Somebody wants a drain: begins one, unless one has begun.
    pub fn drain(&mut self, now: Instant) {
        if self.status.phase == Phase::Running {
            self.enter(Phase::Delay, now, Some(now + self.config.delay));
        }
    }

    /// Another process serves in place of this one: nobody has to be told first, so a drain begins without its delay. The
    /// process ends when it is drained.
    pub fn replaced(&mut self, now: Instant) {
        self.is_replaced = true;
        if self.status.phase <= Phase::Delay {
            self.enter(Phase::Delay, now, Some(now));
        }
    }

    /// Somebody wants none after all; false: listeners are closed, it is too late. A signal can't be taken back, nor can a
    /// successor.
    #[must_use]
    pub fn undo(&mut self, now: Instant) -> bool {
        if self.signals > 0 || self.is_replaced || self.status.phase > Phase::Delay {
            return false;
        }
        if self.status.phase == Phase::Delay {
            self.enter(Phase::Running, now, None);
        }
        true
    }

    /// SIGTERM or SIGINT.
    pub fn signal(&mut self, now: Instant) {
        self.signals = self.signals.saturating_add(1);
        self.drain(now);
    }

    /// Nobody is served any more.
    pub fn nobody_is_served(&mut self, now: Instant) {
        if self.status.phase == Phase::Window {
            self.enter(Phase::Lingering, now, self.last);
        }
    }

    /// No socket is left.
    pub fn all_ended(&mut self, now: Instant) {
        if self.status.phase != Phase::Drained {
            self.enter(Phase::Drained, now, None);
        }
    }

    /// When [`Self::next`] has something new to say, if nothing happens.
    pub fn wake(&self) -> Option<Instant> {
        if self.is_cut { None } else { self.status.until }
    }

    /// What is to be done now; to be asked until there is nothing.
    pub fn next(&mut self, now: Instant) -> Option<Act> {
        let Status { phase, until, .. } = self.status;
        match phase {
            Phase::Delay if self.signals > 1 || until.is_some_and(|until| until <= now) => {
                let last = now + self.config.window + self.config.timeout;
                self.last = Some(last);
                self.enter(Phase::Window, now, Some(last));
                Some(Act::Begin)
            }
            Phase::Running | Phase::Delay => None,
            Phase::Window | Phase::Lingering => {
                if self.signals > 1 && !self.is_hurried && !self.is_cut {
                    self.is_hurried = true;
                    let soon = now + self.config.ending;
                    self.last = Some(self.last.map_or(soon, |last| last.min(soon)));
                    self.status.until = self.last;
                    return Some(Act::Hurry);
                }
                let is_late = self.last.is_some_and(|last| last <= now);
                if (is_late || self.signals > 2) && !self.is_cut {
                    self.is_cut = true;
                    return Some(Act::Cut);
                }
                None
            }
            Phase::Drained => (self.signals > 0 || self.is_replaced).then_some(Act::Exit),
        }
    }

    fn enter(&mut self, phase: Phase, since: Instant, until: Option<Instant>) {
        self.status = Status { phase, since, until };
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Readiness, *};
    use proptest::prelude::*;

    const ENDING: Duration = Duration::from_secs(3);

    fn config() -> Config {
        let seconds = Duration::from_secs;
        Config {
            delay: seconds(5),
            window: seconds(20),
            quiet: Duration::ZERO,
            timeout: seconds(4),
            close_code: 1001,
            reason: String::new(),
            readiness: Readiness::AfterDelay,
        }
    }

    /// A process that is driven as `server` drives it, by a clock of its own.
    struct Process {
        phases: Phases,
        zero: Instant,
        now: Instant,
        acts: Vec<(u64, Act)>,
    }

    impl Process {
        fn new() -> Self {
            let now = Instant::now();
            Self { phases: Phases::new(&config(), ENDING, now), zero: now, now, acts: Vec::new() }
        }

        fn act(&mut self) {
            while let Some(act) = self.phases.next(self.now) {
                self.acts.push(((self.now - self.zero).as_secs(), act));
                if act == Act::Exit {
                    break;
                }
            }
        }

        fn pass(&mut self, seconds: u64) {
            let then = self.now + Duration::from_secs(seconds);
            while let Some(wake) = self.phases.wake().filter(|wake| *wake <= then) {
                self.now = self.now.max(wake);
                self.act();
                if self.phases.wake() == Some(wake) {
                    break;
                }
            }
            self.now = then;
            self.act();
        }

        fn phase(&self) -> Phase {
            self.phases.status().phase
        }
    }

    #[test]
    fn a_signal_drains_in_order_and_ends_the_process() {
        let mut process = Process::new();
        process.phases.signal(process.now);
        process.act();
        assert_eq!((process.phase(), &*process.acts), (Phase::Delay, &[][..]));
        process.pass(5);
        assert_eq!((process.phase(), &*process.acts), (Phase::Window, &[(5, Act::Begin)][..]));
        process.pass(10);
        process.phases.nobody_is_served(process.now);
        process.act();
        assert_eq!(process.phase(), Phase::Lingering);
        process.phases.all_ended(process.now);
        process.act();
        assert_eq!(process.acts, [(5, Act::Begin), (15, Act::Exit)]);
    }

    #[test]
    fn what_is_left_at_the_end_is_cut() {
        let mut process = Process::new();
        process.phases.signal(process.now);
        process.pass(60);
        assert_eq!(process.acts, [(5, Act::Begin), (29, Act::Cut)]);
        assert_eq!(process.phases.wake(), None);
    }

    #[test]
    fn a_drain_by_an_operator_leaves_the_process_alive_until_a_signal() {
        let mut process = Process::new();
        process.phases.drain(process.now);
        process.pass(6);
        process.phases.all_ended(process.now);
        process.pass(1000);
        assert_eq!((process.phase(), &*process.acts), (Phase::Drained, &[(5, Act::Begin)][..]));
        process.phases.signal(process.now);
        process.act();
        assert_eq!(process.acts, [(5, Act::Begin), (1006, Act::Exit)]);
    }

    #[test]
    fn a_signal_during_such_a_drain_is_the_first_one() {
        let mut process = Process::new();
        process.phases.drain(process.now);
        process.pass(2);
        process.phases.drain(process.now);
        process.phases.signal(process.now);
        process.pass(3);
        assert_eq!(process.acts, [(5, Act::Begin)]);
        process.phases.all_ended(process.now);
        process.act();
        assert_eq!(process.acts, [(5, Act::Begin), (5, Act::Exit)]);
    }

    #[test]
    fn the_second_signal_hurries_and_the_third_cuts() {
        let mut process = Process::new();
        process.phases.signal(process.now);
        process.pass(1);
        process.phases.signal(process.now);
        process.act();
        assert_eq!(process.acts, [(1, Act::Begin), (1, Act::Hurry)]);
        process.pass(3);
        assert_eq!(process.acts[2..], [(4, Act::Cut)]);

        let mut process = Process::new();
        for _ in 0..3 {
            process.phases.signal(process.now);
        }
        process.act();
        assert_eq!(process.acts, [(0, Act::Begin), (0, Act::Hurry), (0, Act::Cut)]);
    }

    #[test]
    fn a_drain_can_be_undone_until_the_listeners_close() {
        let mut process = Process::new();
        assert!(process.phases.undo(process.now), "nothing to undo is no error");
        process.phases.drain(process.now);
        process.pass(4);
        assert!(process.phases.undo(process.now));
        process.pass(100);
        assert_eq!((process.phase(), &*process.acts), (Phase::Running, &[][..]));
        // It may begin again, with all its time.
        process.phases.drain(process.now);
        process.pass(4);
        assert_eq!(process.phase(), Phase::Delay);
        process.pass(1);
        assert!(!process.phases.undo(process.now), "listeners are closed");
        assert_eq!(process.acts, [(109, Act::Begin)]);

        let mut process = Process::new();
        process.phases.drain(process.now);
        process.phases.signal(process.now);
        assert!(!process.phases.undo(process.now), "somebody waits for the process to end");
    }

    #[test]
    fn a_process_that_was_replaced_drains_at_once_and_ends() {
        let mut process = Process::new();
        process.phases.replaced(process.now);
        assert!(!process.phases.undo(process.now), "clients go to another process");
        process.act();
        assert_eq!((process.phase(), &*process.acts), (Phase::Window, &[(0, Act::Begin)][..]));
        // A signal is the first one: it hurries nobody.
        process.pass(3);
        process.phases.signal(process.now);
        process.pass(7);
        process.phases.all_ended(process.now);
        process.act();
        assert_eq!(process.acts, [(0, Act::Begin), (10, Act::Exit)]);

        // Nor is the delay of a drain that has begun waited for.
        let mut process = Process::new();
        process.phases.drain(process.now);
        process.pass(2);
        process.phases.replaced(process.now);
        process.pass(60);
        assert_eq!(process.acts, [(2, Act::Begin), (26, Act::Cut)]);
    }

    #[derive(Debug, Clone, Copy)]
    enum Event {
        Drain,
        Replaced,
        Undo,
        Signal,
        Nobody,
        Ended,
        Pass(u64),
    }

    proptest! {
        /// Whatever happens in whatever order: phases only go on (but for an undo), everything is done once and in order, and a
        /// process that was signalled is told to cut in time.
        #[test]
        fn it_always_comes_to_its_end(events in prop::collection::vec(prop_oneof![
            Just(Event::Drain), Just(Event::Replaced), Just(Event::Undo), Just(Event::Signal), Just(Event::Nobody), Just(Event::Ended),
            (0_u64..15).prop_map(Event::Pass), (0_u64..15).prop_map(Event::Pass),
        ], 0..40)) {
            let mut process = Process::new();
            let (mut was, mut signalled) = (Phase::Running, None);
            for event in events {
                let now = process.now;
                match event {
                    Event::Drain => process.phases.drain(now),
                    Event::Replaced => {
                        signalled.get_or_insert(now);
                        process.phases.replaced(now);
                    }
                    Event::Undo => {
                        if process.phases.undo(now) {
                            was = Phase::Running;
                        }
                    }
                    Event::Signal => {
                        signalled.get_or_insert(now);
                        process.phases.signal(now);
                    }
                    Event::Nobody => process.phases.nobody_is_served(now),
                    // Workers end once they were told.
                    Event::Ended if process.phase() >= Phase::Window => process.phases.all_ended(now),
                    Event::Ended => {}
                    Event::Pass(seconds) => process.pass(seconds),
                }
                process.act();
                prop_assert!(process.phase() >= was, "{:?} after {was:?}", process.phase());
                was = process.phase();
                let acts: Vec<_> = process.acts.iter().map(|(_, act)| *act).filter(|act| *act != Act::Exit).collect();
                let all = [Act::Begin, Act::Hurry, Act::Cut];
                let mut left = all.iter();
                prop_assert!(acts.iter().all(|act| left.any(|next| next == act)), "{acts:?}");
            }
            if let Some(at) = signalled {
                let spent = (process.now - at).as_secs();
                process.pass(29_u64.saturating_sub(spent));
                if process.phase() != Phase::Drained {
                    prop_assert!(process.acts.iter().any(|(_, act)| *act == Act::Cut), "{:?}", process.acts);
                }
                process.phases.all_ended(process.now);
                process.act();
                prop_assert_eq!(process.acts.last().map(|(_, act)| *act), Some(Act::Exit));
            }
        }
    }
}
