//! The last 15 minutes: a sample for each second, and what was counted by each tenth one. Pure: moments are arguments.
//!
//! Bounded: 900 samples of 44 bytes and 92 marks of about 1.2 KB come to 150 KB, whatever happens.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

use crate::metrics::{Part, Totals};

/// Samples, one for each second.
pub(super) const SAMPLES: usize = 900;
pub(super) const STEP: Duration = Duration::from_secs(1);

/// Between two marks, in samples.
const MARK_EVERY: u64 = 10;
const MARKS: usize = SAMPLES / 10 + 2;

/// What a sample has, in this order: what is there, what came in its second, and the longest that anything took in it, in
/// microseconds.
pub(super) const SERIES: [&str; 11] = [
    "sessions",
    "connects",
    "not_served",
    "messages_from_clients",
    "messages_from_backends",
    "clean",
    "cut",
    "connect_max_us",
    "close_max_us",
    "queued",
    "lingering",
];

pub(super) type Sample = [u32; SERIES.len()];

/// In a second in which nobody looked, as when the machine was asleep.
pub(super) const UNKNOWN: u32 = u32::MAX;

/// What is there at a moment.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Levels {
    pub sessions: u32,
    /// Connections in all accept queues.
    pub queued: u32,
    pub lingering: u32,
    /// Of a connect and of a close, since it was asked last.
    pub longest: [Duration; 2],
}

#[derive(Debug)]
pub(super) struct History {
    samples: VecDeque<Sample>,
    /// What was counted until then; the first one is the process's start until that is too long ago.
    marks: VecDeque<(Instant, Totals)>,
    /// By the last sample.
    last: (Instant, Totals),
    /// How many samples there have been.
    seq: u64,
}

impl History {
    pub(super) fn new(now: Instant, totals: Totals) -> Self {
        let marks = VecDeque::from([(now, totals.clone())]);
        Self { samples: VecDeque::with_capacity(SAMPLES), marks, last: (now, totals), seq: 0 }
    }

    /// Whether the next sample wants to know what the kernel has counted.
    pub(super) fn wants_kernel(&self) -> bool {
        (self.seq + 1).is_multiple_of(MARK_EVERY)
    }

    /// Of the kernel's counters `totals` has what [`Self::wants_kernel`] asked for.
    pub(super) fn add(&mut self, now: Instant, levels: Levels, mut totals: Totals) {
        let (before, counted) = &self.last;
        if !self.wants_kernel() {
            totals.keep_kernel(counted);
        }
        let came = totals.since(counted);
        // A timer may be late by more than one.
        let elapsed = now.saturating_duration_since(*before) + STEP / 2;
        let seconds = elapsed.as_secs().max(1);
        for _ in 1..seconds.min(SAMPLES as u64) {
            self.push([UNKNOWN; SERIES.len()]);
        }
        let divisor = u32::try_from(seconds).unwrap_or(u32::MAX);
        let rate = |count: u32| count.div_ceil(divisor);
        let [accepted, failed] = handshakes(&came);
        let [from_clients, from_backends] = [0, 1].map(|side| rate(came.part(Part::Messages)[side]));
        let [clean, cut] = [true, false]
            .map(|clean| rate(came.ends().filter(|(end, _)| end.clean == clean).map(|(_, count)| count).sum::<u32>()));
        let [connect, close] = levels.longest.map(|longest| u32::try_from(longest.as_micros()).unwrap_or(UNKNOWN - 1));
        let Levels { sessions, queued, lingering, .. } = levels;
        let (accepted, failed) = (rate(accepted), rate(failed));
        self.push([
            sessions,
            accepted,
            failed,
            from_clients,
            from_backends,
            clean,
            cut,
            connect,
            close,
            queued,
            lingering,
        ]);
        if self.seq.is_multiple_of(MARK_EVERY) || seconds > MARK_EVERY {
            if self.marks.len() == MARKS {
                self.marks.pop_front();
            }
            self.marks.push_back((now, totals.clone()));
        }
        self.last = (now, totals);
    }

    fn push(&mut self, sample: Sample) {
        if self.samples.len() == SAMPLES {
            self.samples.pop_front();
        }
        self.samples.push_back(sample);
        self.seq += 1;
    }

    /// The number of the last sample, which grows by one with each second.
    pub(super) fn seq(&self) -> u64 {
        self.seq
    }

    pub(super) fn last(&self) -> Sample {
        self.samples.back().copied().unwrap_or_default()
    }

    /// One of [`SERIES`], oldest first.
    pub(super) fn series(&self, index: usize) -> impl Iterator<Item = u32> + '_ {
        self.samples.iter().map(move |sample| sample[index])
    }

    /// What was counted in a `window` that ends now, when `totals` were; it may be up to 10 s longer, and as long as the process
    /// runs. The longest connect and close in it, but for the time since the last sample; and how long it is.
    pub(super) fn window(&self, now: Instant, totals: &Totals, window: Duration) -> (Totals, [Duration; 2], Duration) {
        let age = |at: &Instant| now.saturating_duration_since(*at);
        let mark = self.marks.iter().rev().find(|(at, _)| age(at) >= window);
        let (at, before) = mark.or(self.marks.front()).expect("there is one from the start");
        let samples = usize::try_from(age(at).as_secs()).unwrap_or(SAMPLES).min(SAMPLES);
        let longest = [7, 8].map(|index| {
            let seconds = self.samples.iter().rev().take(samples.max(1)).map(|sample| sample[index]);
            let micros = seconds.filter(|micros| *micros != UNKNOWN).max().unwrap_or(0);
            Duration::from_micros(micros.into())
        });
        (totals.since(before), longest, age(at))
    }
}

/// Those that went well, and those that were not served: that failed by the backend's fault or ours, or were turned away.
fn handshakes(came: &Totals) -> [u32; 2] {
    // Of the others the client itself is at fault, or it has its backend's answer.
    let ours = ["bad_backend", "unreachable", "timeout"];
    let failed: u32 = ours.iter().map(|result| came.get(Part::Handshakes, result)).sum();
    let refused: u32 = came.part(Part::Refused).iter().sum();
    [came.get(Part::Handshakes, "accepted"), failed + refused]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Handshake, Metrics};

    /// Two hours of samples, some of them late: never more than 15 minutes are kept, and the numbers go on.
    #[test]
    fn the_ring_is_bounded() {
        let (start, metrics) = (Instant::now(), Metrics::new());
        let mut history = History::new(start, metrics.totals(None));
        let mut now = start;
        for second in 0..7200_u32 {
            now += STEP * if second % 1000 == 999 { 40 } else { 1 };
            metrics.handshake(Handshake::Accepted, Duration::from_millis(3));
            let levels = Levels { sessions: second, ..Levels::default() };
            history.add(now, levels, metrics.totals(None));
            assert!(history.samples.len() <= SAMPLES && history.marks.len() <= MARKS);
        }
        assert_eq!((history.samples.len(), history.seq()), (SAMPLES, 7200 + 7 * 39));
        assert_eq!((history.last()[0], history.last()[1]), (7199, 1));
        let size = SAMPLES * size_of::<Sample>() + MARKS * size_of::<(Instant, Totals)>();
        assert!(size < 160_000, "{size} bytes");
        let (came, _, length) = history.window(now, &metrics.totals(None), Duration::from_mins(15));
        assert!((900..=910).contains(&length.as_secs()), "{length:?}");
        assert!((850..=910).contains(&came.get(Part::Handshakes, "accepted")), "{came:?}");
    }

    /// A window is no longer than the process runs; what is counted since the last sample is in it; the longest is exact.
    #[test]
    fn a_window_ends_now() {
        let (start, metrics) = (Instant::now(), Metrics::new());
        let mut history = History::new(start, metrics.totals(None));
        metrics.handshake(Handshake::Accepted, Duration::from_millis(137));
        let levels = Levels { longest: metrics.longest(true), ..Levels::default() };
        history.add(start + STEP, levels, metrics.totals(None));
        metrics.close("backend", None, false, Duration::from_millis(20));
        let now = start + STEP + STEP / 2;
        let (came, [connect, _], length) = history.window(now, &metrics.totals(None), Duration::from_mins(1));
        assert_eq!((connect, length), (Duration::from_millis(137), STEP + STEP / 2));
        let ends: Vec<_> = came.ends().map(|(end, count)| (end.initiator, end.clean, end.code, count)).collect();
        assert_eq!(ends, [("backend", false, "none", 1)]);
    }
}
